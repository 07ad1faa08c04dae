"""Where adapters go on a model that reads images: regular expressions of PEFT's for its language model and its tower.

Names alone would not do: vision towers have layers called gate_proj or q_proj, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from pronghorn.engine import base_causal_lm
from pronghorn.errors import TargetModuleNotFound
from pronghorn.families import LayerParts, family_of

_LANGUAGE_MODEL = "model.language_model"
_PARTS = LayerParts()


def reads_images(config: Any) -> bool:
    """Whether a model's configuration has a part for images."""
    return getattr(config, "vision_config", None) is not None


def language_path(model: Any) -> str | None:
    """Where the language model of a model that reads images is; None for a model that reads text alone."""
    base = base_causal_lm(model)
    family = family_of(base.config.model_type)
    if family is not None:
        return family.path if family.reads_images else None
    has = isinstance(getattr(base, "model", None), nn.Module) and hasattr(base.model, "language_model")
    return _LANGUAGE_MODEL if has and reads_images(base.config) else None


def language_targets(path: str, names: Iterable[str], layers: int | Iterable[int] | None = None) -> str:
    """The modules of these names in the layers of the language model; `layers` are their numbers, None means all."""
    chosen = r"\d+" if layers is None else "|".join(map(str, [layers] if isinstance(layers, int) else layers))
    return rf"{re.escape(path)}\.layers\.(?:{chosen})\.(?:.*\.)?(?:{'|'.join(map(re.escape, names))})"


def language_linears(model: Any, path: str) -> list[str]:
    """Last parts of the names of the language model's linear layers."""
    layers = base_causal_lm(model).get_submodule(path).layers
    names = (name for name, module in layers.named_modules() if isinstance(module, nn.Linear))
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def tower_targets(
    model: Any,
    *,
    vision: bool,
    language: bool,
    attention: bool,
    mlp: bool,
    layers: int | Iterable[int] | None = None,
) -> str | list[str] | None:
    """`target_modules` for the chosen parts; None for all of a model that reads text alone.

    Raises:
        TargetModuleNotFound: nothing was chosen.
    """
    base, path = base_causal_lm(model), language_path(model)
    if path is None and language and attention and mlp:
        return None
    family = family_of(base.config.model_type)
    parts = _PARTS if family is None else family.parts
    groups = [
        *(group for kind in parts.kinds for group in kind.attention_projections.values() if attention),
        *(parts.mlp_projections if mlp else ()),
    ]
    names = [name for group in groups for name in group]
    found = []
    if language and names:
        found.append(names if path is None else language_targets(path, names, layers))
    if path is None and found:
        return found[0]
    if vision and path is not None:
        found += _vision_patterns(base, path, attention, mlp)
    if not found:
        raise TargetModuleNotFound(
            "no module is left for LoRA",
            fix="finetune_language_layers=True with finetune_attention_modules or finetune_mlp_modules",
        )
    return "|".join(f"(?:{pattern})" for pattern in found)


def _vision_patterns(base: Any, path: str, attention: bool, mlp: bool) -> list[str]:
    """Linear layers of attention and MLP in the layers of what is not the language model; one pattern for all that are
    alike. What joins the tower to it has an `mlp`, too, but no numbered layers."""
    found = []
    for name, module in base.named_modules():
        if not isinstance(module, nn.Linear) or name.startswith((f"{path}.", "lm_head")):
            continue
        of_attention, of_mlp = "attn" in name or "attention" in name, "mlp" in name
        if re.search(r"\.\d+\.", name) is None:
            continue
        if (of_attention and attention) or (of_mlp and not of_attention and mlp):
            found.append(re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(name)))
    return list(dict.fromkeys(found))
