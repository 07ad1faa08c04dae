"""What a server serves: its names, its tokenizer, and what a call leaves to the model."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pronghorn.errors import TokenizerProblem, nearest
from pronghorn.inference.requests import Request, SamplingParams
from pronghorn.inference.server.calls import NOTHING_CHOSEN, Call, ChatCall, Chosen, CompletionCall
from pronghorn.inference.server.problems import CallProblem, wrong_field
from pronghorn.inference.variants import Variant


@dataclass(frozen=True)
class ServedModel:
    """One base model and its adapters.

    Args:
        variants: what can be asked, by name. A call without a name means the first.
        base: the base's name.
        context: tokens that a prompt and its answer may have together.
        vocabulary: token ids are below it.
        created: seconds since 1970.
        chosen: the generation config's way of choosing tokens, for what a call leaves out.
    """

    variants: Mapping[str, Variant]
    base: str
    context: int
    vocabulary: int
    created: int
    chosen: Chosen = NOTHING_CHOSEN

    def variant_of(self, asked: str | None) -> Variant:
        """What a call's `model` means.

        Raises:
            CallProblem: 404 when there is no such model.
        """
        if asked is None:
            return next(iter(self.variants.values()))
        if asked not in self.variants:
            hint = nearest(asked, self.variants) or f"there is {', '.join(self.variants)}"
            raise CallProblem(
                404, f"there is no model '{asked}'; {hint}", param="model", code="model_not_found"
            )
        return self.variants[asked]

    def prompts_of(self, call: Call) -> list[tuple[int, ...]]:
        """The tokens of a call's prompts.

        Raises:
            CallProblem: 400 when the chat template refuses the messages, or a prompt has no tokens or unknown ones.
        """
        variant = self.variant_of(call.model)
        if isinstance(call, ChatCall):
            return [_chat_tokens(variant, call)]
        assert isinstance(call, CompletionCall)
        return [self._tokens(variant, prompt) for prompt in call.prompts]

    def _tokens(self, variant: Variant, prompt: str | tuple[int, ...]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            tokens = tuple(variant.tokenizer(prompt)["input_ids"])
        else:
            tokens = prompt
            if not all(0 <= token < self.vocabulary for token in tokens):
                raise wrong_field(
                    "prompt", f"'prompt' has tokens that are not from 0 to {self.vocabulary - 1}"
                )
        if not tokens:
            raise wrong_field("prompt", "'prompt' has no tokens")
        return tokens

    def requests_of(self, call: Call, prompts: list[tuple[int, ...]]) -> list[Request]:
        """What the engine is asked for: `call.choices` requests a prompt, in order.

        Raises:
            CallProblem: 400 when a prompt and its answer do not fit the context.
        """
        variant = self.variant_of(call.model)
        requests = []
        for prompt in prompts:
            room = self.context - len(prompt)
            wanted = call.max_tokens or room
            if wanted > room or room < 1:
                asked = f" and {wanted} of its answer" if call.max_tokens else ""
                raise CallProblem(
                    400,
                    f"{len(prompt)} tokens of the prompt{asked} exceed the context of {self.context} tokens",
                    param="messages" if isinstance(call, ChatCall) else "prompt",
                    code="context_length_exceeded",
                )
            for choice in range(call.choices):
                sampling = self._sampling(call, variant, wanted, choice)
                requests.append(Request(prompt, sampling, variant.adapter))
        return requests

    def _sampling(self, call: Call, variant: Variant, new_tokens: int, choice: int) -> SamplingParams:
        asked, usual = call.chosen, self.chosen
        return SamplingParams(
            max_new_tokens=new_tokens,
            temperature=_first(asked.temperature, usual.temperature, 1.0),
            top_p=_first(asked.top_p, usual.top_p, 1.0),
            top_k=_first(asked.top_k, usual.top_k, 0),
            min_p=_first(asked.min_p, usual.min_p, 0.0),
            repetition_penalty=_first(asked.repetition_penalty, usual.repetition_penalty, 1.0),
            # Answers to one prompt differ, and the same call gives the same answers.
            seed=secrets.randbits(62) if asked.seed is None else (asked.seed + choice) % (1 << 63),
            stop_token_ids=(*variant.stop_tokens, *variant.special_tokens(call.stop)),
            logprobs=call.logprobs,
        )


def _chat_tokens(variant: Variant, call: ChatCall) -> tuple[int, ...]:
    from jinja2 import TemplateError

    try:
        return variant.chat_tokens(call.messages, **call.template)
    except TemplateError as error:
        raise wrong_field("messages", f"the chat template refuses the messages: {error}") from error
    except TokenizerProblem as error:
        raise CallProblem(400, f"{error.message}; use /v1/completions", code="no_chat_template") from error


def _first(*values: Any) -> Any:
    """The first value that is given."""
    return next(value for value in values if value is not None)
