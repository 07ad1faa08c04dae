"""A conversation with a model or an adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pronghorn.inference.generate import Messages, Sampling, encode_chat, generate


def load_for_chat(model_or_adapter: str, **arguments: Any) -> tuple[Any, Any]:
    """(model, tokenizer) ready to generate; ``arguments`` are those of `FastLanguageModel.from_pretrained`."""
    from pronghorn.loading import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(model_or_adapter, **arguments)
    FastLanguageModel.for_inference(model)
    return model, tokenizer


@dataclass
class Conversation:
    """Turns so far. The oldest are forgotten once ``max_length`` tokens no longer hold them and an answer."""

    model: Any
    tokenizer: Any
    max_length: int
    system: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    turns: Messages = field(default_factory=list)

    def ask(self, text: str, on_text: Callable[[str], None] | None = None) -> str:
        """The model's answer to ``text``; both are added to the turns."""
        self.turns.append({"role": "user", "content": text})
        try:
            self._forget_what_does_not_fit()
            answer = generate(self.model, self.tokenizer, self._messages(), self.sampling, on_text)
        except BaseException:  # an interrupted answer leaves no question without one
            self.turns.pop()
            raise
        self.turns.append({"role": "assistant", "content": answer})
        return answer

    def _messages(self) -> Messages:
        opening = [{"role": "system", "content": self.system}] if self.system else []
        return opening + self.turns

    def _forget_what_does_not_fit(self) -> None:
        room = self.max_length - self.sampling.max_new_tokens
        while (
            len(self.turns) > 2 and encode_chat(self.tokenizer, self._messages())["input_ids"].shape[1] > room
        ):
            del self.turns[:2]
