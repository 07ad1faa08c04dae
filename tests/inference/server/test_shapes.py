"""What has no place in JSON is told as OpenAI tells it."""

from __future__ import annotations

import json
import math

import pytest

from pronghorn.inference.requests import Token
from pronghorn.inference.server.answers import Piece
from pronghorn.inference.server.shapes import ChatShape, CompletionShape, Usage
from pronghorn.inference.server.text import TokenNames
from tests.tiny import tiny_tokenizer


@pytest.mark.parametrize("shape", [ChatShape, CompletionShape])
def test_the_impossible_has_a_number(shape):
    piece = Piece("a", [(Token(70, -math.inf, ((70, -0.5), (71, -math.inf))), 0)], "stop")
    whole = shape("tiny", TokenNames(tiny_tokenizer()), 2).whole([piece], Usage(1, 1))
    assert "-9999.0" in json.dumps(whole, allow_nan=False)
