"""The gate for merged checkpoints: loaded by stock Transformers and compared with the live model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pronghorn.engine import base_causal_lm
from pronghorn.errors import ExportDiffers
from pronghorn.export.gate import Comparison, compare, make_probe, torch_predictor

#: Most mean KL divergence in nats. Merging rounds a bf16 weight by at most 2⁻⁹ of its size, NF4 by a tenth.
MOST_DIVERGENCE = {"merged_16bit": 0.02, "merged_4bit": 0.45}
MARK = "export.failed.txt"


def check_checkpoint(
    model: Any, tokenizer: Any, folder: Path, save_method: str, held_out: Sequence[str] | None = None
) -> Comparison:
    """Load a folder with `AutoModelForCausalLM` and compare it with the model it was made of.

    Raises:
        ExportDiffers: when it predicts otherwise; the folder is kept, with export.failed.txt in it.
    """
    from transformers import AutoModelForCausalLM

    live = torch_predictor(model)
    probe = make_probe(live, tokenizer, held_out)
    dtype = base_causal_lm(model).config.dtype
    device = model.get_input_embeddings().weight.device
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": device})
    found = compare("transformers", torch_predictor(again.eval()), probe)
    mark = folder / MARK
    if not found.divergence <= MOST_DIVERGENCE[save_method]:
        mark.write_text(f"{found}\n", encoding="utf-8")
        raise ExportDiffers(
            f"the merged model differs from the model: {found}; at most {MOST_DIVERGENCE[save_method]} nats expected",
            where=str(folder),
            fix="save the adapter (--to lora), and report this with the output of pronghorn doctor",
        )
    mark.unlink(missing_ok=True)
    return found
