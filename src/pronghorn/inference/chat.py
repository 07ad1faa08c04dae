"""A conversation with a model or an adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from pronghorn.errors import RequestTooLong
from pronghorn.inference.generate import Messages, Sampling, encode_chat, generate


def load_for_chat(model_or_adapter: str, **arguments: Any) -> tuple[Any, Any]:
    """(model, tokenizer) ready to generate; ``arguments`` are those of `FastLanguageModel.from_pretrained`."""
    from pronghorn.loading import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(model_or_adapter, **arguments)
    FastLanguageModel.for_inference(model)
    return model, tokenizer


@dataclass
class Conversation:
    """Turns so far. The oldest are forgotten once ``max_length`` tokens no longer hold them and an answer.

    Attributes:
        forgotten: how many questions, each with its answer, are no longer among the turns.
    """

    model: Any
    tokenizer: Any
    max_length: int
    system: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    turns: Messages = field(default_factory=list)
    forgotten: int = 0

    def ask(self, text: str, on_text: Callable[[str], None] | None = None) -> str:
        """The model's answer to ``text``; both are added to the turns.

        Raises:
            RequestTooLong: the question alone leaves no room for an answer.
        """
        self.turns.append({"role": "user", "content": text})
        try:
            room = self._forget_what_does_not_fit()
            sampling = replace(self.sampling, max_new_tokens=min(self.sampling.max_new_tokens, room))
            answer = generate(self.model, self.tokenizer, self._messages(), sampling, on_text)
        except BaseException:  # an interrupted answer leaves no question without one
            self.turns.pop()
            raise
        self.turns.append({"role": "assistant", "content": answer})
        return answer

    def _messages(self) -> Messages:
        opening = [{"role": "system", "content": self.system}] if self.system else []
        return opening + self.turns

    def _forget_what_does_not_fit(self) -> int:
        """How many tokens are left for the answer: as many as it may have, or at least half of all while there are
        turns to forget."""
        wanted = min(self.sampling.max_new_tokens, self.max_length // 2)
        kept = list(self.turns)
        try:
            while (left := self.max_length - self._length()) < wanted and len(self.turns) > 2:
                del self.turns[:2]
            if left < 1:
                raise RequestTooLong(
                    f"the question takes {self.max_length - left:,} tokens, and with its answer there is room for "
                    f"{self.max_length:,}",
                    fix="ask something shorter",
                )
        except BaseException:
            self.turns[:] = kept
            raise
        self.forgotten += (len(kept) - len(self.turns)) // 2
        return left

    def _length(self) -> int:
        return int(encode_chat(self.tokenizer, self._messages())["input_ids"].shape[1])
