"""An engine without a model: every request gets the tokens that a script gives it, one a step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from pronghorn.inference.requests import Event, Request, Token
from pronghorn.inference.server.model import ServedModel
from pronghorn.inference.variants import Variant
from tests.tiny import TINY, tiny_tokenizer


class FakeEngine:
    """Answers with `script(request)`, tokens; a block a request.

    Args:
        max_batch: requests that run at a time.
        pause: seconds a step takes.
    """

    def __init__(
        self, script: Callable[[Request], Sequence[int]], *, max_batch: int = 8, pause: float = 0.0
    ) -> None:
        self._script = script
        self._max_batch = max_batch
        self._pause = pause
        self._left: dict[int, list[int]] = {}
        self._requests: dict[int, Request] = {}
        self.submitted: list[Request] = []
        self.cancelled: list[int] = []
        self.total_blocks = max_batch
        self.threads: set[int] = set()

    def submit(self, request: Request) -> int:
        self.threads.add(threading.get_ident())
        tokens = list(self._script(request))[: request.sampling.max_new_tokens]
        number = len(self.submitted)
        self.submitted.append(request)
        self._left[number], self._requests[number] = tokens, request
        return number

    def cancel(self, request_id: int) -> None:
        self._left.pop(request_id, None)
        self.cancelled.append(request_id)

    def step(self) -> list[Event]:
        self.threads.add(threading.get_ident())
        time.sleep(self._pause)
        events = []
        for number in list(self._left)[: self._max_batch]:
            token, request = self._left[number].pop(0), self._requests[number]
            wanted = request.sampling.logprobs
            top = tuple((token + i, -0.5 - i) for i in range(wanted or 0))
            finish: Any = None
            if token in request.sampling.stop_token_ids:
                finish = "stop"
            elif not self._left[number]:
                finish = "length"
            if finish:
                del self._left[number]
            events.append(Event(number, (Token(token, None if wanted is None else -0.5, top),), finish))
        return events

    @property
    def has_work(self) -> bool:
        return bool(self._left)

    @property
    def running(self) -> int:
        return min(len(self._left), self._max_batch)

    @property
    def waiting(self) -> int:
        return len(self._left) - self.running

    @property
    def free_blocks(self) -> int:
        return self.total_blocks - self.running


def served_model(tokenizer: Any = None, **changes: Any) -> ServedModel:
    """The base model `tiny` with an adapter `formal`."""
    tokenizer = tokenizer or tiny_tokenizer()
    stops = (tokenizer.eos_token_id,)
    variants = [Variant("tiny", None, tokenizer, stops), Variant("formal", "adapter0", tokenizer, stops)]
    values: dict[str, Any] = {
        "variants": {variant.name: variant for variant in variants},
        "base": "tiny",
        "context": 256,
        "vocabulary": TINY["vocab_size"],
        "created": 1_700_000_000,
    }
    return ServedModel(**{**values, **changes})


def saying(text: str, tokenizer: Any = None) -> Callable[[Request], list[int]]:
    """A script that writes the same text, then EOS, whatever is asked."""
    tokenizer = tokenizer or tiny_tokenizer()
    tokens = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return lambda request: tokens
