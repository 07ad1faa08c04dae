"""`model.generate` through the engine: Transformers' arguments in, what its own `generate` gives out.

Transformers prepares everything as for itself (configuration, lengths, processors, criteria) and hands over where its
decoding loop would begin, by its `custom_generate` argument. What the engine does not do (beams, processors and
criteria of the caller's own, scores or attentions in the result, …) goes to Transformers, with the reason logged once.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pronghorn.engine.binding import base_causal_lm
from pronghorn.errors import EngineRefused
from pronghorn.inference.engine import Engine
from pronghorn.inference.moving import on_device
from pronghorn.inference.paging import BLOCK_TOKENS
from pronghorn.inference.requests import Request, SamplingParams

logger = logging.getLogger("pronghorn")

#: arguments of `generate` that the engine has no counterpart of
_FOREIGN = (
    "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "assistant_model", "negative_prompt_ids",
    "negative_prompt_attention_mask", "custom_generate", "synced_gpus", "stop_strings", "tokenizer",
    "assistant_tokenizer", "past_key_values", "inputs_embeds", "position_ids", "cache_implementation",
)  # fmt: skip
#: what Transformers' preparation may leave for the model's forward
_UNDERSTOOD = {
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "cache_position",
}
_PROCESSORS = {
    "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper",
    "RepetitionPenaltyLogitsProcessor",
}  # fmt: skip
#: keeps the most likely token alone, as Transformers' top_p of 0 does
_LEAST_TOP_P = 1e-9
_CRITERIA = {"MaxLengthCriteria", "EosTokenCriteria"}
#: a result that holds more than tokens
_TELLING = (
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
)


class _NotOurs(Exception):
    """The engine does not do what a call asks for; the message says what that is."""


def use_engine(model: Any) -> None:
    """Let this instance's `generate` run through the engine; `undo_engine` takes it off."""
    base = base_causal_lm(model)
    if not isinstance(base.__dict__.get("generate"), EngineGenerate):
        bound = _taken_kept(base) or EngineGenerate(base)
        bound.former = base.__dict__.get("generate")
        base.__dict__["generate"] = bound


def undo_engine(model: Any) -> None:
    """Give the instance its former `generate` back, and the cache's memory free."""
    base = base_causal_lm(model)
    _taken_kept(base)
    bound = base.__dict__.get("generate")
    if isinstance(bound, EngineGenerate):
        del base.__dict__["generate"]
        if bound.former is not None:
            base.__dict__["generate"] = bound.former


@contextmanager
def answering(model: Any) -> Iterator[None]:
    """Evaluation mode and the engine, for one call; both as they were afterwards. The engine is kept for the next call,
    until the model is put into training mode."""
    base = base_causal_lm(model)
    had, training = base.__dict__.get("generate"), bool(model.training)
    use_engine(model)
    bound = base.__dict__["generate"]
    try:
        model.eval()
        yield
    finally:
        if bound is not had:
            undo_engine(model)
        model.train(training)
        if bound is not had and "train" not in base.__dict__:
            base.__dict__["train"] = _Kept(base, bound)


def _taken_kept(base: Any) -> EngineGenerate | None:
    """What an earlier call of `answering` has kept, taken off the instance."""
    kept = base.__dict__.get("train")
    return base.__dict__.pop("train").bound if isinstance(kept, _Kept) else None


class _Kept:
    """Stands in for an instance's `train` while an engine is kept for it: training lets go of the engine's memory."""

    def __init__(self, model: Any, bound: EngineGenerate) -> None:
        self.model, self.bound = model, bound

    def __call__(self, mode: bool = True) -> Any:
        """As Module's `train`."""
        if mode:
            _taken_kept(self.model)
        return type(self.model).train(self.model, mode)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Kept:
        return _Kept(copy.deepcopy(self.model, memo), copy.deepcopy(self.bound, memo))


class EngineGenerate:
    """Stands in for `model.generate`. Copies and pickles go without the engine, which is made when first needed.

    Args:
        model: a Transformers causal LM; adapters on it are read as they are at each call.
        former: what the instance's `generate` was; None: its class's.
    """

    def __init__(self, model: Any, former: Any = None) -> None:
        self.model, self.former = model, former
        self._engine: Engine | None = None
        self._told: set[str] = set()
        self._lock = threading.Lock()
        #: the thread whose answers the engine computes
        self._answering: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_engine", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({**state, "_engine": None, "_answering": None, "_lock": threading.Lock()})

    def __deepcopy__(self, memo: dict[int, Any]) -> EngineGenerate:
        return EngineGenerate(copy.deepcopy(self.model, memo), copy.deepcopy(self.former, memo))

    def __call__(self, inputs: Any = None, generation_config: Any = None, *args: Any, **given: Any) -> Any:
        """As Transformers' `generate`."""
        reason = self._foreign(generation_config, args, given)
        if reason is None:
            try:
                return self._by_engine(inputs, generation_config, dict(given))
            except _NotOurs as refusal:
                reason = str(refusal)
            except EngineRefused as refusal:
                reason = refusal.message
        if reason not in self._told:
            self._told.add(reason)
            logger.warning("pronghorn: generate runs Transformers' own loop: %s", reason)
        return self._stock(inputs, generation_config, *args, **given)

    def _stock(self, *args: Any, **given: Any) -> Any:
        if self.former is not None:
            return self.former(*args, **given)
        return type(self.model).generate(self.model, *args, **given)

    def _foreign(self, config: Any, args: tuple[Any, ...], given: Mapping[str, Any]) -> str | None:
        """What a call asks for that Transformers' preparation would not bring to us; None for nothing."""
        if any(value is not None for value in args):
            return "arguments by position"
        named = [name for name in _FOREIGN if given.get(name) is not None]
        if named:
            return f"{named[0]} was given"
        for source in (config, self.model.generation_config):
            for name in ("stop_strings", "cache_implementation"):
                if getattr(source, name, None):
                    return f"the generation config sets {name}"
        return None

    # --- through the engine ----------------------------------------------------------------------------------------

    def _by_engine(self, inputs: Any, config: Any, given: dict[str, Any]) -> Tensor:
        streamer = given.pop("streamer", None)

        def loop(model: Any, input_ids: Tensor, **prepared: Any) -> Tensor:
            return self._loop(input_ids, streamer, **prepared)

        encoding = inputs if isinstance(inputs, Mapping) else given.get("input_ids")
        if isinstance(
            encoding, Mapping
        ):  # what `apply_chat_template` returns today, given as the ids it once returned
            inputs = None if encoding is inputs else inputs
            given = {**encoding, **{name: value for name, value in given.items() if value is not encoding}}
        configs = config, self.model.generation_config
        if not any(getattr(source, "cache_config", None) for source in configs):
            # No cache of Transformers' own, which takes a third of its preparation.
            given["use_cache"] = False
        out: Tensor = type(self.model).generate(self.model, inputs, config, custom_generate=loop, **given)
        return out

    def _loop(
        self,
        input_ids: Tensor,
        streamer: Any,
        *,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **prepared: Any,
    ) -> Tensor:
        """Transformers' decoding loop: input_ids [B, L] -> [B, L + new]."""
        _check(logits_processor, stopping_criteria, generation_config, prepared)
        _check_autocast(self.model)
        if streamer is not None and len(input_ids) > 1:
            raise _NotOurs("a streamer for several rows")
        rows = _rows(input_ids, prepared.get("attention_mask"))
        counts = _counts_padding(logits_processor)
        ends = _ends(stopping_criteria, generation_config)
        new = max(1, stopping_criteria.max_length - input_ids.shape[1])
        sampling = _sampling(generation_config, logits_processor, new, ends)
        with self._alone():
            engine = self._engine_for([len(kept) for kept, _ in rows], new)
            adapter = self._adapter(engine)
            requests = [Request(tuple(kept), sampling, adapter) for kept, _ in rows]
            if streamer is not None:
                streamer.put(input_ids.cpu())
            paddings = [padding if counts else set() for _, padding in rows]
            answers = _answers(engine, requests, paddings, streamer)
        if streamer is not None:
            streamer.end()
        return _joined(input_ids, answers, generation_config)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Threads wait for each other's answers; a streamer that asks again would wait for itself."""
        if self._answering == threading.get_ident():
            raise _NotOurs("it is asked from within another answer")
        with self._lock:
            self._answering = threading.get_ident()
            try:
                yield
            finally:
                self._answering = None

    def _engine_for(self, lengths: list[int], new: int) -> Engine:
        """An engine with room for prompts of these lengths and their answers."""
        context = max(lengths) + new
        wanted = sum(-(-(length + new) // BLOCK_TOKENS) * BLOCK_TOKENS for length in lengths)
        engine = self._engine
        if engine is not None:
            engine.refresh()
            room = engine.total_blocks * BLOCK_TOKENS
            if engine.max_context >= context and engine.asked_batch >= len(lengths) and room >= wanted:
                return engine
        self._engine = engine = None  # its memory goes before the next one's is taken
        self._engine = Engine(
            self.model,
            max_batch=_rounded(len(lengths), 8),
            max_context=_rounded(context, 1024),
            cache_tokens=_rounded(wanted, 4096),
        )
        return self._engine

    @staticmethod
    def _adapter(engine: Engine) -> str | None:
        """The adapter that the model itself runs."""
        if engine.several_active:
            raise _NotOurs("several adapters are active at once")
        return engine.active_adapter


def _rounded(number: int, least: int) -> int:
    return max(least, 1 << (number - 1).bit_length())


def _check(processors: Any, criteria: Any, config: Any, prepared: Mapping[str, Any]) -> None:
    """Refuse what only Transformers' own loops do."""
    mode = str(getattr(config.get_generation_mode(), "value", config.get_generation_mode()))
    if mode not in ("greedy_search", "sample"):
        raise _NotOurs(f"it decodes by {mode.replace('_', ' ')}")
    for found, known in ((processors, _PROCESSORS), (criteria, _CRITERIA)):
        other = next((type(item).__name__ for item in found if type(item).__name__ not in known), None)
        if other is not None:
            raise _NotOurs(f"it applies a {other}")
    telling = next((name for name in _TELLING if getattr(config, name, None)), None)
    if telling is not None:
        raise _NotOurs(f"{telling} was asked for")
    other = next((name for name, v in prepared.items() if v is not None and name not in _UNDERSTOOD), None)
    if other is not None:
        raise _NotOurs(f"the model's forward is given {other}")


def _check_autocast(model: Any) -> None:
    """Refuse products in another dtype than the model's."""
    device = model.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != model.dtype:
        raise _NotOurs(
            f"autocast to {torch.get_autocast_dtype(device)} is on, and the model is {model.dtype}"
        )


def _rows(input_ids: Tensor, mask: Tensor | None) -> list[tuple[list[int], set[int]]]:
    """Each row's tokens without its padding, and what the padding consists of."""
    ids = input_ids.tolist()
    if mask is None:
        return [(row, set()) for row in ids]
    rows = []
    for row, kept in zip(
        ids, mask.tolist() if mask.shape == input_ids.shape else [[0]] * len(ids), strict=True
    ):
        left_out = kept.count(0)
        # A token left out in the middle still counts where there is a window, or a state.
        if any(kept[:left_out]) or not 0 < kept.count(1) == len(kept) - left_out:
            raise _NotOurs("the attention mask is not that of rows padded on the left")
        rows.append((row[left_out:], set(row[:left_out])))
    return rows


def _counts_padding(processors: Any) -> bool:
    """Whether the repetition penalty takes padding for a part of the prompt, as Transformers' once did."""
    for item in processors:
        ignored = getattr(item, "prompt_ignore_length", None)
        if isinstance(ignored, int) and ignored > 0:
            raise _NotOurs("the repetition penalty leaves out a part of the prompt")
        if ignored is not None:
            return False
    return True


def _ends(criteria: Any, config: Any) -> tuple[int, ...]:
    """The tokens that end an answer: those of the configuration, which the criteria have on the model's device."""
    if not any(hasattr(item, "eos_token_id") for item in criteria):
        return ()
    found = config.eos_token_id
    if isinstance(found, Tensor):
        found = found.tolist()
    return tuple(map(int, found)) if isinstance(found, (list, tuple)) else (int(found),)


def _sampling(config: Any, processors: Any, new: int, ends: tuple[int, ...]) -> SamplingParams:
    """What the configuration asks for; warpers exist only where it samples."""
    names = {type(item).__name__ for item in processors}
    penalty = config.repetition_penalty if "RepetitionPenaltyLogitsProcessor" in names else 1.0
    if not config.do_sample:
        return SamplingParams(new, repetition_penalty=penalty, stop_token_ids=ends)
    return SamplingParams(
        new,
        temperature=config.temperature if "TemperatureLogitsWarper" in names else 1.0,
        top_p=max(config.top_p, _LEAST_TOP_P) if "TopPLogitsWarper" in names else 1.0,
        top_k=config.top_k if "TopKLogitsWarper" in names else 0,
        min_p=config.min_p if "MinPLogitsWarper" in names else 0.0,
        repetition_penalty=penalty,
        stop_token_ids=ends,
    )


def _answers(
    engine: Engine, requests: list[Request], paddings: list[set[int]], streamer: Any
) -> list[list[int]]:
    """The new tokens of each request; an exception leaves none behind."""
    answers: dict[int, list[int]] = {}
    try:
        for request, padding in zip(requests, paddings, strict=True):
            answers[engine.submit(request, also_seen=padding, refresh=False)] = []
        while engine.has_work:
            for event in engine.step():
                for token in event.tokens:
                    answers[event.request_id].append(token.id)
                    if streamer is not None:
                        streamer.put(torch.tensor([token.id]))
    finally:
        for number in answers:
            engine.cancel(number)
        while engine.has_work:
            engine.step()
    return list(answers.values())


def _joined(input_ids: Tensor, answers: list[list[int]], config: Any) -> Tensor:
    """[B, L + longest answer]; shorter ones end in padding."""
    longest = max(map(len, answers))
    filler = 0
    if any(len(answer) < longest for answer in answers):
        pad = getattr(config, "_pad_token_tensor", None)
        filler = 0 if pad is None else int(pad)
    rows = [[*answer, *[filler] * (longest - len(answer))] for answer in answers]
    return torch.cat([input_ids, on_device(rows, input_ids.dtype, input_ids.device)], 1)
