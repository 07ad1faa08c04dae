"""Reading the fields of a JSON object one by one; what is wrong is told by the field's name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from pronghorn.errors import nearest
from pronghorn.inference.server.problems import CallProblem, wrong_field

#: Fields of OpenAI's that say nothing about the answer.
BOOKKEEPING = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object that a body is.

    Raises:
        CallProblem: 400, saying where it is none.
    """
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise CallProblem(400, f"the body is not UTF-8 (byte {error.start})", code="invalid_json") from error
    except RecursionError as error:
        raise CallProblem(400, "the body is nested too deeply", code="invalid_json") from error
    except ValueError as error:
        raise CallProblem(400, f"the body is no JSON: {error}", code="invalid_json") from error
    if not isinstance(found, dict):
        raise CallProblem(400, "the body must be a JSON object", code="invalid_json")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


class Fields:
    """Takes fields out of an object; `nothing_left` refuses those that nobody took. null counts as left out.

    Raises:
        CallProblem: 400 with the field's name, from every method.
    """

    def __init__(self, values: dict[str, Any], within: str = "") -> None:
        self._values = values
        self._within = within
        self._known: set[str] = set()

    def take(self, name: str) -> Any:
        self._known.add(name)
        return self._values.get(name)

    def number(self, name: str, low: float, high: float) -> float | None:
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, "must be a number")
        # An integer may be too long for a float; it is out of range then.
        if not (low <= value <= high) or (isinstance(value, float) and not math.isfinite(value)):
            raise self.wrong(name, f"must be from {low:g} to {high:g}")
        return float(value)

    def whole(self, name: str, low: int, high: int) -> int | None:
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, "must be a whole number")
        if not low <= value <= high:
            raise self.wrong(name, f"must be from {low} to {high}")
        return value

    def switch(self, name: str) -> bool:
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "must be true or false")
        return bool(value)

    def text(self, name: str) -> str | None:
        value = self.take(name)
        return None if value is None else self.checked_text(name, value)

    def checked_text(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self.wrong(name, "must be a string")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            # JSON can write half of a pair (\ud800), which is no letter and which no tokenizer takes.
            raise self.wrong(name, "holds half of a surrogate pair, which is no text") from None
        return value

    def inner(self, name: str) -> Fields:
        """The fields of an object that is a field."""
        value = self.take(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, "must be an object")
        return Fields(value or {}, f"{self._within}{name}.")

    def only(self, name: str, harmless: Callable[[Any], bool], message: str) -> None:
        """Refuse a field whose effect does not exist here, unless its value asks for none."""
        value = self.take(name)
        if value is not None and not harmless(value):
            raise self.wrong(name, message, "unsupported_parameter")

    def nothing_left(self) -> None:
        unknown = [name for name in self._values if name not in self._known | BOOKKEEPING]
        if unknown:
            hint = nearest(unknown[0], self._known)
            raise self.wrong(
                unknown[0], f"is no field of this call{'; ' + hint if hint else ''}", "unknown_parameter"
            )

    def wrong(self, name: str, message: str, code: str = "invalid_value") -> CallProblem:
        return wrong_field(self._within + name, f"'{self._within}{name}' {message}", code)
