"""What turns a text's tokens into its vector, and the files in which sentence-transformers keeps that.

A folder in its layout is a Transformers checkpoint with, beside it,

    modules.json                        the steps: Transformer, Pooling and, for vectors of length one, Normalize
    1_Pooling/config.json               how token vectors become one
    sentence_bert_config.json           the longest text in tokens
    config_sentence_transformers.json   prompts by name, and the one that is used where none is named
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pronghorn.errors import CheckpointCorrupt, UnknownArgument, UnsupportedCheckpoint, nearest
from pronghorn.loading.source import read_json

Pooling = Literal["mean", "cls", "last"]
POOLINGS: tuple[Pooling, ...] = ("mean", "cls", "last")

MODULES, PROMPTS, LENGTHS = "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"
_POOLING_FOLDER = "1_Pooling"
#: Names that every version of sentence-transformers reads; newer ones have others besides.
_KINDS = "sentence_transformers.models"
_OLD_KEYS = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "last": "pooling_mode_lasttoken",
}
_NEW_NAMES: dict[str, Pooling] = {"mean": "mean", "cls": "cls", "lasttoken": "last"}


@dataclass(frozen=True)
class Layout:
    """How vectors are made of token vectors.

    Args:
        pooling: "mean" of all tokens, the first ("cls") or the "last" one; None where a folder does not say.
        normalize: vectors have length one.
        prompts: texts put in front, by name, such as "query" and "document".
        default_prompt: the name of the prompt that is used where none is named.
        max_seq_length: the longest text in tokens; None where a folder does not say.
    """

    pooling: Pooling | None = None
    normalize: bool = True
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    max_seq_length: int | None = None

    def prompt(self, name: str | None) -> str:
        """The text of a prompt; None stands for the default one, or none at all.

        Raises:
            UnknownArgument: there is none of that name.
        """
        name = self.default_prompt if name is None else name
        if name is None:
            return ""
        if name not in self.prompts:
            known = ", ".join(sorted(self.prompts)) or "none"
            raise UnknownArgument(
                f"the model has no prompt '{name}'",
                fix=nearest(name, self.prompts) or f"its prompts are: {known}",
            )
        return self.prompts[name]


def check_pooling(pooling: str) -> Pooling | None:
    """A pooling by name; None for "auto".

    Raises:
        UnknownArgument: for another name.
    """
    if pooling not in ("auto", *POOLINGS):
        raise UnknownArgument(
            f"pooling='{pooling}' does not exist",
            fix=nearest(pooling, POOLINGS) or f"use auto, {', '.join(POOLINGS)}",
        )
    return None if pooling == "auto" else pooling  # type: ignore[return-value]


def model_folder(folder: Path) -> Path:
    """Where the checkpoint lies: the folder itself, or the folder in it that older layouts name."""
    for module in _modules(folder):
        if _kind(module) == "Transformer" and module.get("path"):
            inner = folder / str(module["path"])
            return inner if inner.resolve().is_relative_to(folder.resolve()) else folder
    return folder


def read_layout(folder: Path, pooling: Pooling | None = None) -> Layout | None:
    """The layout of a local folder; None where it has none. A pooling that is given is taken instead of the folder's.

    Raises:
        UnsupportedCheckpoint: for a step or a pooling that is not computed here.
        CheckpointCorrupt: for an unreadable file.
    """
    modules = _modules(folder)
    if not modules:
        return None
    kinds = [_kind(module) for module in modules]
    foreign = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if foreign or "Transformer" not in kinds:
        what = f"a step '{foreign[0]}'" if foreign else "no Transformer"
        raise UnsupportedCheckpoint(
            f"the embedding model has {what}: Transformer, Pooling and Normalize are computed here",
            where=str(folder / MODULES),
            fix="take another model, or train this one with sentence-transformers",
        )
    if pooling is None and "Pooling" in kinds:
        pooling = _read_pooling(folder / str(modules[kinds.index("Pooling")].get("path") or _POOLING_FOLDER))
    inner = model_folder(folder)
    settings = read_json(inner / LENGTHS) if (inner / LENGTHS).is_file() else {}
    texts = read_json(folder / PROMPTS) if (folder / PROMPTS).is_file() else {}
    prompts = {str(name): str(text) for name, text in (texts.get("prompts") or {}).items()}
    length = settings.get("max_seq_length")
    return Layout(
        pooling,
        "Normalize" in kinds,
        prompts,
        texts.get("default_prompt_name"),
        length if isinstance(length, int) and length > 0 else None,
    )


def write_layout(folder: Path, layout: Layout, width: int) -> None:
    """Put the layout's files into a folder that holds the checkpoint. `width`: elements of a token vector."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if layout.normalize else [])]
    paths = ["", _POOLING_FOLDER, "2_Normalize"]
    modules = [
        {"idx": index, "name": str(index), "path": paths[index], "type": f"{_KINDS}.{kind}"}
        for index, kind in enumerate(kinds)
    ]
    pooling = {"word_embedding_dimension": width, "include_prompt": True}
    pooling |= {key: name == layout.pooling for name, key in _OLD_KEYS.items()}
    (folder / _POOLING_FOLDER).mkdir(exist_ok=True)
    if layout.normalize:
        (folder / paths[2]).mkdir(exist_ok=True)
    _write(folder / MODULES, modules)
    _write(folder / _POOLING_FOLDER / "config.json", pooling)
    _write(folder / LENGTHS, {"max_seq_length": layout.max_seq_length, "do_lower_case": False})
    prompts = {"prompts": dict(layout.prompts), "default_prompt_name": layout.default_prompt}
    _write(folder / PROMPTS, {"model_type": "SentenceTransformer", **prompts, "similarity_fn_name": "cosine"})


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _modules(folder: Path) -> list[dict[str, Any]]:
    """The steps that modules.json lists; none where there is no such file."""
    path = folder / MODULES
    if not path.is_file():
        return []
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        modules = error
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise CheckpointCorrupt(
            f"{MODULES} is no list of steps", where=str(path), fix="download or save the model again"
        )
    return modules


def _kind(module: Mapping[str, Any]) -> str:
    return str(module.get("type", "")).rsplit(".", 1)[-1]


def _read_pooling(folder: Path) -> Pooling:
    path = folder / "config.json"
    config = read_json(path)
    named = config.get("pooling_mode")
    modes = [named] if isinstance(named, str) else list(named or [])
    if not modes:
        modes = [key for key, on in config.items() if key.startswith("pooling_mode_") and on is True]
    names = {**_NEW_NAMES, **{key: name for name, key in _OLD_KEYS.items()}}
    if len(modes) != 1 or modes[0] not in names:
        raise UnsupportedCheckpoint(
            f"the embedding model pools by {', '.join(map(str, modes)) or 'nothing'}: one of {', '.join(POOLINGS)} "
            "is computed here",
            where=str(path),
            fix="give pooling= to take one of these instead",
        )
    if config.get("include_prompt") is False:
        raise UnsupportedCheckpoint(
            "the embedding model leaves its prompt's tokens out of the vector, which is not computed here",
            where=str(path),
            fix="take another model, or train this one with sentence-transformers",
        )
    return names[modes[0]]  # type: ignore[return-value]
