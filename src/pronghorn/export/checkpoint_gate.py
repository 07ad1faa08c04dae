"""The gate for merged checkpoints: loaded by stock Transformers and compared with the live model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pronghorn.engine import auto_class, base_causal_lm
from pronghorn.errors import PronghornError
from pronghorn.export.adapter_probe import look_for_changes
from pronghorn.export.gate import (
    Checked,
    Limits,
    compare,
    make_blind_probe,
    make_probe,
    place_for_second,
    torch_predictor,
)
from pronghorn.export.merge import adapted_weights
from pronghorn.weights import read_weight

logger = logging.getLogger("pronghorn")

#: Merging rounds a bf16 weight by at most 2⁻⁹ of its size, e4m3 by at most 2⁻⁴, NF4 by a tenth of its block's largest.
LIMITS = {
    "merged_16bit": Limits(0.02, 0.02),
    "fp8": Limits(0.10, 0.08),
    "merged_4bit": Limits(0.45, 0.25),
    "quantised": Limits(0.02, 0.02),  # the same codes
}
#: Bytes a weight takes once stock Transformers has loaded it; fp8 is compared as it is stored, dequantised.
_ELEMENT_BYTES = {"merged_16bit": 2.0, "fp8": 2.0, "merged_4bit": 0.75, "quantised": 0.75}


def check_checkpoint(
    model: Any, tokenizer: Any, folder: Path, save_method: str, held_out: Sequence[str] | None = None
) -> Checked:
    """Load a folder with Transformers' automatic class, compare it with the live model, and look for every adapter.

    It is loaded beside the model where the GPU has room, else into the host's memory; where neither has room it is not
    opened, which is said. A folder that does not load is a problem of the folder.
    """
    checked = Checked(folder.name)
    base = base_causal_lm(model)
    device = place_for_second(model, _ELEMENT_BYTES[save_method] * (2 if base.dtype.itemsize == 4 else 1))
    try:
        if device is None:
            raise torch.OutOfMemoryError
        _compare(checked, model, tokenizer, folder, save_method, held_out, device)
    except torch.OutOfMemoryError:
        logger.warning("pronghorn: %s is not compared with the model: the memory is too small", folder.name)
    return checked


def _compare(
    checked: Checked,
    model: Any,
    tokenizer: Any,
    folder: Path,
    save_method: str,
    held_out: Sequence[str] | None,
    device: torch.device,
) -> None:
    base, live = base_causal_lm(model), torch_predictor(model)
    if tokenizer is None:
        probe = make_blind_probe(live, base.get_input_embeddings().weight.shape[0])
    else:
        probe = make_probe(live, getattr(tokenizer, "tokenizer", tokenizer), held_out)
    try:
        again = _open(folder, base, save_method, device)
        found = compare("transformers", torch_predictor(again), probe)
    except torch.OutOfMemoryError:
        raise
    except (PronghornError, ValueError, KeyError, RuntimeError, OSError, AttributeError) as error:
        checked.problems.append(f"cannot be opened: {type(error).__name__}: {error}")
        return
    checked.judge(found, LIMITS[save_method].against(model))
    checked.adapted, lost = look_for_changes(changed_weights(model, again))
    checked.problems += lost


def _open(folder: Path, base: Any, save_method: str, device: torch.device) -> Any:
    """The folder through stock Transformers.

    Raises:
        RuntimeError: for tensors that are missing or have no place.
    """
    extra: dict[str, Any] = {}
    if save_method == "fp8":
        # Its fp8 products need a GPU and a kernel from the hub; here the stored weights are judged.
        from transformers import FineGrainedFP8Config

        extra["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    loader = auto_class(base.config, architecture=type(base).__name__)
    again, info = loader.from_pretrained(
        folder, dtype=base.config.dtype, device_map={"": device}, output_loading_info=True, **extra
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            raise RuntimeError(f"{kind.replace('_', ' ')}: {len(info[kind])}, first {sorted(info[kind])[0]}")
    return again.eval()


def changed_weights(model: Any, again: Any) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """(name, W, W', what stock Transformers holds) of every weight that an adapter changes."""
    for name, make_base, make_merged in adapted_weights(model):
        owner, _, part = name.rpartition(".")
        module = again.get_submodule(owner)
        weight = read_weight(module) if part == "weight" else None
        held = getattr(module, part).detach() if weight is None else weight.dense(torch.float32)
        yield name, make_base(), make_merged(), held.to(torch.float32)
