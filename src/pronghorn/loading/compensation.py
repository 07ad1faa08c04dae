"""`init_lora_weights="loftq"` on a model in 4 bits: the original weights, and which base such an adapter belongs to."""

from __future__ import annotations

import base64
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from pronghorn.engine import base_causal_lm
from pronghorn.errors import AdapterMismatch, QuantisationRefused, UnknownArgument, nearest
from pronghorn.loading.checkpoint import check_folder, read_header, weight_files
from pronghorn.loading.source import Source, read_json
from pronghorn.loading.tokenizer import load_tokenizer
from pronghorn.weights import is_four_bit

if TYPE_CHECKING:
    from pronghorn.quantising.compensation import CompensationReport

logger = logging.getLogger("pronghorn")

LOFTQ = "loftq"
#: what `loftq_config` may say here; the first two are PEFT's
_KNOWN = ("loftq_bits", "loftq_iter", "original", "calibration", "tokens")
#: in adapter_config.json under "loftq_config", which stock PEFT leaves alone
MARK = "quantised_base"
#: of how many modules, and how many bytes of each, a base is known again; a code that a GPU rounds otherwise at a tie
#: makes no other base
_MODULES, _BYTES, _ALIKE = 16, 32, 0.95


def is_compensating(model: Any, init_lora_weights: Any) -> bool:
    """Whether an adapter is to begin with what quantisation lost: PEFT's own "loftq" is for unquantised models.

    Raises:
        QuantisationRefused: for a beginning that would change weights that are in 4 bits.
    """
    quantised = any(is_four_bit(module) for module in model.modules())
    if quantised and str(init_lora_weights).startswith("pissa"):
        raise QuantisationRefused(
            "pissa takes the adapter's part out of the base, whose weights are in 4 bits and would be rounded again",
            fix='use init_lora_weights="loftq", which makes up for the rounding and leaves the base as it is',
        )
    return quantised and init_lora_weights == LOFTQ


def loftq_settings(loftq_config: Any) -> dict[str, Any]:
    """What a `loftq_config` says, PEFT's own or a dictionary.

    Raises:
        UnknownArgument: for names and values that do not exist, or would change the base.
    """
    if loftq_config is None:
        return {}
    given = dict(loftq_config if isinstance(loftq_config, Mapping) else vars(loftq_config))
    for name in given:
        if name not in _KNOWN:
            raise UnknownArgument(
                f"loftq_config has no '{name}'", fix=nearest(name, _KNOWN) or f"it has {', '.join(_KNOWN)}"
            )
    if given.get("loftq_bits", 4) != 4:
        raise UnknownArgument(
            f"loftq_bits={given['loftq_bits']!r}, but the model is in 4 bits", fix="leave it out"
        )
    if given.get("loftq_iter", 1) != 1:
        raise UnknownArgument(
            "loftq_iter above 1 quantises the base anew each time, and the adapter would not fit the one on the disk",
            fix="leave it out",
        )
    return given


def begin_with_residual(model: Any, loftq_config: Any) -> CompensationReport:
    """Set a new adapter of a PEFT model to what quantisation lost, and note on it which base it belongs to.

    Raises:
        QuantisationRefused: where the original weights cannot be found.
        UnknownArgument: for a `loftq_config` that does not exist.
    """
    from pronghorn.quantising.calibration import calibration_rows
    from pronghorn.quantising.compensation import compensate

    settings = loftq_settings(loftq_config)
    base = base_causal_lm(model)
    source = base.__dict__.get("pronghorn_source")
    original = OriginalWeights(_original_folder(source, settings.get("original")))
    ids = None
    if settings.get("calibration") is not None:
        tokenizer = load_tokenizer(source) if source is not None and source.is_local else None
        ids = calibration_rows(settings["calibration"], tokenizer, settings.get("tokens", 8192)).ids
    report = compensate(model, original, ids)
    model.__dict__["pronghorn_compensation"] = report
    for config in model.peft_config.values():
        config.loftq_config = {MARK: codes_of(base)}
    return report


class OriginalWeights:
    """Weights of linear modules out of a 16-bit checkpoint, one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = {name: file for file in weight_files(folder) for name in read_header(file)}

    def __call__(self, module: str) -> Tensor:
        """A module's weight as it is stored.

        Raises:
            QuantisationRefused: when the checkpoint has none of this name.
        """
        name = f"{module}.weight"
        # Some checkpoints hold the decoder alone.
        found = next((n for n in (name, name.removeprefix("model.")) if n in self._files), None)
        if found is None:
            raise QuantisationRefused(
                f"the original checkpoint has no '{name}'",
                where=str(self.folder),
                fix='name the 16-bit checkpoint that the base was made of: loftq_config={"original": folder}',
            )
        with safe_open(self._files[found], framework="pt") as file:
            return file.get_tensor(found)  # type: ignore[no-any-return]


def _original_folder(source: Source | None, named: Any) -> Path:
    """The folder of the 16-bit checkpoint.

    Raises:
        QuantisationRefused: where there is none to be found.
    """
    folder = Path(named) if named is not None else _made_of(source)
    if folder is None or not (folder / "config.json").is_file():
        raise QuantisationRefused(
            "what quantisation lost can only be told from the original weights, and they are not known"
            if folder is None
            else f"there is no 16-bit checkpoint in '{folder}'",
            fix='name the 16-bit checkpoint that the base was made of: loftq_config={"original": folder}; pronghorn '
            "export --to merged_16bit makes one of a GGUF file",
        )
    if check_folder(folder).get("quantization_config"):
        raise QuantisationRefused(
            "the checkpoint named as the original is quantised itself",
            where=str(folder),
            fix="name the 16-bit one that it was made of",
        )
    return folder


def _made_of(source: Source | None) -> Path | None:
    if source is None or source.gguf_file is not None:
        return None
    if not source.is_local:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(source.location, "config.json", revision=source.revision)
        return Path(cached).parent if isinstance(cached, str) else None
    from pronghorn.export.quantised import REPORT_FILE

    note = source.path / REPORT_FILE
    if note.is_file():
        original = read_json(note).get("original")
        return Path(original) if isinstance(original, str) else None
    return source.path


# --- which base an adapter belongs to --------------------------------------------------------------------------


def codes_of(model: Any) -> dict[str, str]:
    """The first codes of some quantised modules by name, base64: enough to know a quantised base again."""
    quantised = [
        (name.replace(".base_layer", ""), module)
        for name, module in base_causal_lm(model).named_modules()
        if is_four_bit(module)
    ]
    chosen = quantised[:: -(-len(quantised) // _MODULES)]
    return {name: base64.b64encode(_first_codes(module)).decode() for name, module in chosen}


def _first_codes(module: Any) -> bytes:
    return bytes(module.weight.data.view(torch.uint8).flatten()[:_BYTES].tolist())


def check_base(model: Any, config: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """The mark of an adapter that makes up for a base's quantisation; None for any other adapter.

    Args:
        config: adapter_config.json.

    Raises:
        AdapterMismatch: when the model is not that base: there it would add what is not missing.
    """
    mark = (config.get("loftq_config") or {}).get(MARK)
    if not isinstance(mark, dict):
        return None
    modules = {
        name.replace(".base_layer", ""): module for name, module in base_causal_lm(model).named_modules()
    }
    alike = total = 0
    for name, codes in mark.items():
        module, known = modules.get(name), base64.b64decode(codes)
        held = _first_codes(module) if module is not None and is_four_bit(module) else b""
        total += len(known)
        alike += sum(a == b for a, b in zip(known, held, strict=False))
    if total and alike < _ALIKE * total:
        quantised = any(map(is_four_bit, modules.values()))
        raise AdapterMismatch(
            "the adapter makes up for the quantisation of its base (init_lora_weights='loftq'), and this base is "
            + ("quantised otherwise" if quantised else "not quantised"),
            where=where,
            fix="load it on the base it was trained on: "
            + (
                "the same folder, or with the same dynamic_4bit and bnb_4bit arguments"
                if quantised
                else "with load_in_4bit=True, or the quantised folder"
            ),
        )
    return {MARK: mark}
