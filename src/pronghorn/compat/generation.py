"""What scripts call on a model beyond Transformers' and this library's own methods, and `model.generate` with what
`apply_chat_template` returned, whatever it returns today."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pronghorn.errors import DropInUnavailable
from pronghorn.loading import saving
from pronghorn.loading.arguments import note_without_effect, refuse_unknown

_WITHOUT_EFFECT_ON_GGUF = frozenset({"first_conversion", "maximum_memory_usage", "temporary_location"})


def add_methods(model: Any) -> None:
    """Put the methods of this module on an instance; its class stays as it is."""
    if "generate" not in model.__dict__:
        model.__dict__["generate"] = partial(generate, model)
    for method in (save_lora, load_lora, fast_generate):
        model.__dict__[method.__name__] = partial(method, model)
    if "save_pretrained_gguf" in model.__dict__:  # which a model without a head has not
        for method in (save_pretrained_gguf, save_pretrained_merged, push_to_hub_merged):
            model.__dict__[method.__name__] = partial(method, model)


def generate(model: Any, inputs: Any = None, *args: Any, **given: Any) -> Any:
    """The class's own `generate`; an encoding as `inputs` or `input_ids` becomes keyword arguments."""
    encoding = inputs if isinstance(inputs, Mapping) else given.get("input_ids")
    if isinstance(encoding, Mapping):
        inputs = None if encoding is inputs else inputs
        given = {**encoding, **{name: value for name, value in given.items() if value is not encoding}}
    if inputs is not None:
        args = inputs, *args
    return type(model).generate(model, *args, **given)


def save_pretrained_gguf(
    model: Any,
    save_directory: str,
    tokenizer: Any = None,
    quantization_method: Any = "fast_quantized",
    *,
    quantization_type: Any = None,
    **given: Any,
) -> Any:
    """`loading.saving.save_pretrained_gguf`; scripts print the Modelfile that they find on the tokenizer then."""
    refuse_unknown(given, saving.save_pretrained_gguf, {*_WITHOUT_EFFECT_ON_GGUF, "quantization_type"})
    unused = {name: given.pop(name) for name in _WITHOUT_EFFECT_ON_GGUF & given.keys()}
    note_without_effect(unused, "save_pretrained_gguf")
    method = quantization_method if quantization_type is None else quantization_type
    export = saving.save_pretrained_gguf(model, save_directory, tokenizer, method, **given)
    written = Path(export.folder) / "Modelfile"
    if tokenizer is not None and written.exists():
        tokenizer._ollama_modelfile = written.read_text(encoding="utf-8")
    return export


def save_pretrained_merged(
    model: Any, save_directory: str, tokenizer: Any = None, save_method: str = "merged_16bit", **given: Any
) -> Any:
    """`loading.saving.save_pretrained_merged`, which scripts force to write 4 bits."""
    return saving.save_pretrained_merged(model, save_directory, tokenizer, _unforced(save_method), **given)


def push_to_hub_merged(
    model: Any, repo_id: str, tokenizer: Any = None, save_method: str = "merged_16bit", **given: Any
) -> Any:
    """`loading.saving.push_to_hub_merged`, likewise."""
    return saving.push_to_hub_merged(model, repo_id, tokenizer, _unforced(save_method), **given)


def _unforced(save_method: str) -> str:
    return save_method.removesuffix("_forced")


def save_lora(model: Any, save_directory: str) -> None:
    """The adapter alone, in PEFT's form."""
    model.save_pretrained(save_directory)


def load_lora(model: Any, *args: Any, **given: Any) -> Any:
    """Raises: DropInUnavailable, as vLLM's adapters have no counterpart."""
    raise DropInUnavailable(
        "model.load_lora hands an adapter to vLLM, which has no part here",
        fix="leave it out: a model answers with its adapter; FastLanguageModel.from_pretrained loads a saved one",
    )


def fast_generate(model: Any, *args: Any, **given: Any) -> Any:
    """Raises: DropInUnavailable, as vLLM has no part here."""
    raise DropInUnavailable(
        "model.fast_generate answers by vLLM, which has no part here",
        fix="FastLanguageModel.for_inference(model), then model.generate(**inputs), which runs on pronghorn's engine",
    )
