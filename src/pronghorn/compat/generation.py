"""What scripts call on a model beyond Transformers' and this library's own methods, and `model.generate` with what
`apply_chat_template` returned, whatever it returns today; answers in vLLM's form are in `answers`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pronghorn.compat.answers import fast_generate, load_lora
from pronghorn.errors import DropInUnavailable, ExportDiffers
from pronghorn.loading import saving
from pronghorn.loading.arguments import note_without_effect, refuse_unknown

logger = logging.getLogger("pronghorn")

#: what `save_pretrained` of Transformers takes beside, in the way that it is done here
_WITHOUT_EFFECT_ON_MERGING = frozenset(
    {"commit_message", "is_main_process", "maximum_memory_usage", "private", "safe_serialization", "save_function",
     "save_peft_format", "state_dict", "tags", "temporary_location", "variant"}
)  # fmt: skip
_WITHOUT_EFFECT_ON_GGUF = frozenset({"first_conversion", "maximum_memory_usage", "temporary_location"})


def add_methods(model: Any) -> None:
    """Put the methods of this module on an instance; its class stays as it is."""
    if "generate" not in model.__dict__:
        model.__dict__["generate"] = partial(generate, model)
    for method in (save_lora, load_lora, fast_generate, save_pretrained_torchao):
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
    if inputs is not None or args:
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
    upload = _of_uploading(given)
    known = {*_WITHOUT_EFFECT_ON_GGUF, *_WITHOUT_EFFECT_ON_MERGING, "quantization_type"}
    refuse_unknown(given, saving.save_pretrained_gguf, known)
    unused = {name: given.pop(name) for name in known & given.keys()}
    note_without_effect(unused, "save_pretrained_gguf")
    method = quantization_method if quantization_type is None else quantization_type
    if upload is not None:
        return saving.push_to_hub_gguf(model, save_directory, tokenizer, method, **upload, **given)
    export = saving.save_pretrained_gguf(model, save_directory, tokenizer, method, **given)
    written = Path(export.folder) / "Modelfile"
    if tokenizer is not None and written.exists():
        tokenizer._ollama_modelfile = written.read_text(encoding="utf-8")
    return export


def save_pretrained_merged(
    model: Any,
    save_directory: str,
    tokenizer: Any = None,
    save_method: str | None = "merged_16bit",
    **given: Any,
) -> Any:
    """`loading.saving.save_pretrained_merged`. Scripts force it to write 4 bits: what the rounding takes away is then
    said, and the script goes on."""
    upload = _of_uploading(given)
    refuse_unknown(given, saving.save_pretrained_merged, _WITHOUT_EFFECT_ON_MERGING)
    unused = {name: given.pop(name) for name in [*given] if name in _WITHOUT_EFFECT_ON_MERGING}
    note_without_effect(unused, "save_pretrained_merged")
    method = _unforced(save_method)
    if upload is not None:
        return push_to_hub_merged(model, save_directory, tokenizer, method, **upload, **given)
    try:
        return saving.save_pretrained_merged(model, save_directory, tokenizer, method, **given)
    except ExportDiffers as error:
        if method == save_method or method != "merged_4bit":
            raise
        logger.warning("pronghorn: %s", error)
        return error.export


def push_to_hub_merged(
    model: Any, repo_id: str, tokenizer: Any = None, save_method: str | None = "merged_16bit", **given: Any
) -> Any:
    """`loading.saving.push_to_hub_merged`, under the same names of forms."""
    return saving.push_to_hub_merged(model, repo_id, tokenizer, _unforced(save_method), **given)


def _of_uploading(given: dict[str, Any]) -> dict[str, Any] | None:
    """What belongs to uploading, out of what is given; None where nothing is to be uploaded."""
    wanted, token = given.pop("push_to_hub", False), given.pop("token", None)
    if not wanted:
        return None
    own = {name: given.pop(name) for name in ("private", "commit_message") if name in given}
    return {"token": token, **{name: value for name, value in own.items() if value is not None}}


def _unforced(save_method: str | None) -> str:
    return (save_method or "merged_16bit").removesuffix("_forced")


def unsloth_save_model(
    model: Any,
    tokenizer: Any,
    save_directory: str,
    save_method: str = "lora",
    push_to_hub: bool = False,
    token: str | bool | None = None,
    **given: Any,
) -> Any:
    """The function behind the methods, which older scripts call."""
    if push_to_hub:
        return push_to_hub_merged(model, save_directory, tokenizer, save_method, token=token, **given)
    return save_pretrained_merged(model, save_directory, tokenizer, save_method, **given)


def save_pretrained_torchao(model: Any, *args: Any, **given: Any) -> Any:
    """Raises: DropInUnavailable."""
    raise DropInUnavailable(
        "model.save_pretrained_torchao writes torchao's forms, which are not written here",
        fix="model.save_pretrained_merged(folder, tokenizer, save_method='merged_16bit'), then torchao on that folder",
    )


def save_lora(model: Any, save_directory: str) -> None:
    """The adapter alone, in PEFT's form."""
    model.save_pretrained(save_directory)
