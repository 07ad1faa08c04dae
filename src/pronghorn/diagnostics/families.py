"""docs/families.md, generated from the registry of families.

python -m pronghorn.diagnostics.families --write docs/families.md
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from pronghorn.families import ACTIVATIONS, FAMILIES, STOCK, DecoderFamily
from pronghorn.pages import write_whole

_HEAD = """# Model families

Written by `python -m pronghorn.diagnostics.families --write docs/families.md` from `pronghorn.families`; a test holds
it to the code. How to add one: [adding-a-family.md](adding-a-family.md).

## On the fast path

Loss, logits and every gradient are compared with Transformers and PEFT for each of them: LoRA, 4-bit and full
fine-tuning, rows and packed streams, every save level. All have what Llama has (RMSNorm before attention and MLP, RoPE
of heads or of a part of them as Transformers' module gives it, grouped queries, a gated MLP), and besides:
"""

_OTHERWISE = """
## What of these models runs otherwise, and why

`binding_of(model).describe()` says it of a loaded model; each reason is logged once. `strict=True` refuses a model that
would stay stock.
"""

_MADE_OF = """
## Models made of them

Fish-Speech's two transformers, `dual_ar` and `fish_qwen3_omni`, are a Llama, Qwen2 or Qwen3 decoder each
([speech.md](speech.md)): loss, logits and every gradient are compared with its formulas written out. `pronghorn speech`
trains them; Orpheus is a Llama.

DeepSeek-R1 is a DeepSeek-V3; its distills are Llama and Qwen2 models.
"""

_STOCK = """
## Stock

These types train on Transformers' forward, as any type does that is not on this page; their layers have what no block
computes:
"""

#: what a known family meets, what runs then, and why
_FALLBACKS = (
    ("a config with attention dropout", "the whole model as stock", "no kernel"),
    (f"an activation other than {', '.join(ACTIVATIONS)}", "the whole model as stock", "no kernel"),
    (
        "parts of other classes, or weights in modules of their own",
        "the whole model as stock",
        "not reviewed",
    ),
    ("generation with a KV cache", "this call as stock", "the blocks keep none"),
    ("hidden states or attentions asked for", "this call as stock", "the blocks give none"),
    ("an attention mask of four dimensions", "this call as stock", "attention goes by documents"),
    (
        "hooks, a replaced forward or PEFT's layers on a norm, an attention or an MLP",
        "every call as stock",
        "the blocks stand in for these modules",
    ),
    (
        "a forward laid over the model, its decoder or a layer before it is loaded or bound",
        "the whole model as stock",
        "the blocks stand in for these modules",
    ),
    (
        "hooks on the model, its decoder or a layer; PEFT's virtual tokens",
        "generation in Transformers' own loop",
        "the engine calls none of these",
    ),
    (
        "DoRA, hooks on a projection, PEFT methods other than LoRA",
        "the projection through its own module",
        "outside the formulas",
    ),
    (
        "capped attention logits on a GPU",
        "FlexAttention; where it cannot compile, document by document",
        "packed kernels know no cap",
    ),
    (
        "images that see one another both ways, on a GPU",
        "FlexAttention; where it cannot compile, document by document",
        "packed kernels are causal",
    ),
    (
        "batches with images",
        "the vision tower kernel by kernel, the language model as one CUDA graph",
        "the tower's shapes change with the images",
    ),
    (
        "generation for a prompt with images",
        "Transformers' own loop and decoder",
        "the engine reads text",
    ),
    ("attention in fp32 on a GPU, or heads wider than 256", "document by document", "no packed kernel"),
    (
        "adapter dropout, projections through their own module, attention document by document, `dynamic` RoPE",
        "steps kernel by kernel, not as one CUDA graph",
        "they ask the host",
    ),
)


def page() -> str:
    """The page."""
    rows = []
    for family in FAMILIES:
        types = ", ".join(f"`{kind}`" for kind in family.model_types)
        besides = "; ".join(_differences(family)) or "nothing"
        rows.append((family.name, types, besides, _told(family, "unsupported") or "nothing"))
    stock = [(f"`{kind}`", what) for kind, what in sorted(STOCK.items())]
    return "\n".join(
        [
            _HEAD,
            *_table(("family", "`model_type`", "besides", "stays stock with"), rows),
            _OTHERWISE,
            *_table(("what", "runs", "why"), _FALLBACKS),
            _MADE_OF,
            _STOCK,
            *_table(("`model_type`", "what"), stock),
            "",
        ]
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _differences(family: DecoderFamily) -> Iterator[str]:
    parts = family.parts
    if family.reads_images:
        yield "the text part of a model for images, whose vision tower runs as stock"
    if family.image_blocks:
        yield "tokens of an image see one another"
    if family.mixture is not None:
        yield "mixture of experts"
    if parts.input_norm is None:
        yield "no norms in front of attention and MLP"
    if parts.side_by_side:
        yield "attention and MLP side by side on one LayerNorm"
    if family.turns == "pairs":
        yield "RoPE that turns neighbouring pairs"
    if parts.qkv is not None:
        yield "q, k, v in one module"
    if parts.gate_up is not None:
        yield "gate, up in one module"
    if parts.q_norm is not None:
        yield "norms of q and k"
    if parts.gated:
        yield "a gate on the attention's output"
    if parts.recurrent is not None:
        yield "linear attention (gated delta rule) in most layers"
    if parts.sinks is not None:
        yield "attention sinks"
    if parts.attention_output_norm is not None:
        yield "norms of what attention and MLP give"
    if family.norm_offset:
        yield "norms by 1 + w"
    for name in ("parts_of", "window", "rotation", "scales"):
        told = _told(family, name)
        if told:
            yield told


def _told(family: DecoderFamily, name: str) -> str:
    """What the docstring of a family's function says, in a table's cell; nothing where it has the default."""
    function: Callable[..., object] = getattr(family, name)
    if function is DecoderFamily.__dataclass_fields__[name].default:
        return ""
    text = " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split()).rstrip(".")
    return text[:1].lower() + text[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the page of model families, or write it to its file.")
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.write is None:
        sys.stdout.write(page())
        return
    write_whole(page(), options.write)


if __name__ == "__main__":
    main()
