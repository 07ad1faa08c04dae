"""What a model of a trained family is in GGUF: names, sizes, and the values and order of rows that llama.cpp wants."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from pronghorn.errors import NotExportable
from pronghorn.export.gguf import recurrent
from pronghorn.export.gguf.families import GgufFamily, family_of
from pronghorn.export.gguf.latent import KV_B, KV_B_PARTS, is_latent, join_kv_b, kv_b_shapes, split_kv_b
from pronghorn.export.gguf.rope import add_rope, rope_factors, rope_of
from pronghorn.export.safetensors_file import Entry

logger = logging.getLogger("pronghorn")

#: What a model for images has besides its language model, and what stands before the names of that.
_TOWERS, _LANGUAGE_MODEL = ("visual", "vision_tower", "multi_modal_projector"), "language_model."
#: Experts' gate and up [E, 2I, H], which stand apart in a file; experts' down, whose name has no ".weight".
_JOINED, _JOINED_PARTS = "experts.gate_up_proj", ("experts.gate_proj.weight", "experts.up_proj.weight")
_STACKED = "experts.down_proj"
#: A matrix of one row, which is a vector in a file.
_ROW = "shared_expert_gate.weight"


@dataclass(frozen=True)
class Dialect:
    """How one model is written down in GGUF; of a model for images `config` is its language model's part of `whole`."""

    family: GgufFamily
    config: Any
    whole: Any

    @property
    def architecture(self) -> str:
        return self.family.architecture

    @property
    def heads(self) -> int:
        return int(self.config.num_attention_heads)

    @property
    def kv_heads(self) -> int:
        if is_latent(self.config):  # the codes are all heads' keys and values
            return 1
        return int(getattr(self.config, "num_key_value_heads", None) or self.heads)

    @property
    def head_dim(self) -> int:
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.heads)

    @property
    def rotary_dim(self) -> int:
        """Elements of a head among which are those that turn."""
        return int(self.config.qk_rope_head_dim) if is_latent(self.config) else self.head_dim

    @property
    def key_and_value_length(self) -> tuple[int, int]:
        """Elements of a head's key and value, as they lie in llama.cpp's cache."""
        if is_latent(self.config):
            return self.config.kv_lora_rank + self.config.qk_rope_head_dim, self.config.kv_lora_rank
        return self.head_dim, self.head_dim

    def is_written(self, name: str) -> bool:
        """Whether a checkpoint's tensor belongs to the language model."""
        return not any(part in _TOWERS for part in name.split("."))

    def places(self, name: str) -> list[str]:
        """GGUF's names of a checkpoint's tensor: none where it has no place, two for experts' joined gate and up, for
        what makes keys and values of a code, and for what gives q, k, v and z at once."""
        table = _names(self.architecture, int(self.config.num_hidden_layers))
        name = name.replace(_LANGUAGE_MODEL, "", 1).replace(
            "e_score_correction_bias", "e_score_correction.bias"
        )
        parts = [f"{name}.weight" if name.endswith(_STACKED) else name]
        if recurrent.LAYER in name:
            parts = recurrent.names_in_file(name)
        for whole, halves in ((_JOINED, _JOINED_PARTS), (KV_B, KV_B_PARTS)):
            if name.endswith(whole):
                parts = [f"{name.removesuffix(whole)}{part}" for part in halves]
        found = [table.get_name(part, try_suffixes=(".weight", ".bias")) for part in parts]
        return [] if None in found else found

    def written(self, name: str, tensor: Tensor) -> list[Tensor]:
        """A checkpoint's tensor as it stands in the file, one for each of its places."""
        if name.endswith(_JOINED):
            return list(tensor.chunk(2, dim=1))
        if name.endswith(KV_B):
            return split_kv_b(tensor, self.config)
        if recurrent.LAYER in name:
            return recurrent.write(name, tensor, self.config)
        if name.endswith(_ROW):
            return [tensor[0]]
        if (heads := self._rotated_heads(name)) is not None:
            return [interleave(tensor, heads)]
        return [tensor + self.family.norm_offset if self._is_offset_norm(name) else tensor]

    def restored(self, name: str, tensors: list[Tensor]) -> Tensor:
        """The way back from `written`; `name` is the checkpoint's."""
        if name.endswith(_JOINED):
            return torch.cat(tensors, dim=1)
        if name.endswith(KV_B):
            return join_kv_b(tensors)
        if recurrent.LAYER in name:
            return recurrent.restore(name, tensors, self.config)
        if name.endswith(_ROW):
            return tensors[0][None]
        if (heads := self._rotated_heads(name)) is not None:
            return deinterleave(tensors[0], heads)
        return tensors[0] - self.family.norm_offset if self._is_offset_norm(name) else tensors[0]

    def orders_columns(self, name: str) -> bool:
        """Whether it is a weight's columns, not its rows, that lie otherwise in the file."""
        return recurrent.orders_columns(name, self.config)

    def entries(self, entry: Entry) -> list[Entry]:
        """What a checkpoint's tensor becomes, in fp32.

        Raises:
            NotExportable: where it has no place.
        """
        places = self.places(entry.name)
        if not places:
            raise NotExportable(
                f"the tensor {entry.name} has no place in a GGUF file of {self.architecture}",
                fix="save_pretrained_merged keeps it",
            )
        shapes = [entry.shape]
        if entry.name.endswith(_JOINED):
            shapes = [(entry.shape[0], entry.shape[1] // 2, entry.shape[2])] * 2
        elif entry.name.endswith(KV_B):
            shapes = kv_b_shapes(self.config)
        elif recurrent.LAYER in entry.name:
            shapes = recurrent.shapes(entry.name, entry.shape, self.config)
        elif entry.name.endswith(_ROW):
            shapes = [entry.shape[1:]]
        return [
            Entry(place, shape, torch.float32, partial(self._made, entry, index))
            for index, (place, shape) in enumerate(zip(places, shapes, strict=True))
        ]

    def _made(self, entry: Entry, index: int) -> Tensor:
        return self.written(entry.name, entry.make())[index]

    def _rotated_heads(self, name: str) -> int | None:
        part = name.split(".")[-2] if "." in name else ""
        heads = {"q_proj": self.heads, "k_proj": self.kv_heads}.get(part)
        return heads if self.family.permutes else None

    def _is_offset_norm(self, name: str) -> bool:
        return self.family.norm_offset != 0.0 and name.endswith("norm.weight") and recurrent.LAYER not in name


def dialect_of(config: Any) -> Dialect:
    """The dialect of a model's config.

    Raises:
        NotExportable: for a family without one, or settings that llama.cpp would compute otherwise.
    """
    return Dialect(family_of(config), config.get_text_config(), config)


def gguf_entries(dialect: Dialect, entries: Sequence[Entry]) -> list[Entry]:
    """A merged checkpoint's tensors under GGUF's names, rows in llama.cpp's order, in fp32; factors of the RoPE first.
    Of a model for images the language model's.

    Raises:
        NotExportable: for a tensor that has no place.
    """
    factors = rope_factors(dialect.config, dialect.rotary_dim)
    if dialect.whole is not dialect.config:
        logger.warning(
            "pronghorn: the GGUF file holds the language model; for images llama.cpp reads the vision tower from a "
            "file of its own (mmproj), that of the base model where the tower was not trained"
        )
    found = [Entry(name, tuple(f.shape), torch.float32, lambda f=f: f) for name, f in factors.items()]  # type: ignore[misc]
    of_text = [entry for entry in entries if dialect.is_written(entry.name)]
    return found + [written for entry in of_text for written in dialect.entries(entry)]


@lru_cache(maxsize=4)
def _names(architecture: str, layers: int) -> Any:
    """gguf's own table of names, which takes a while to make."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    return get_tensor_name_map(arch, layers)


def interleave(tensor: Tensor, heads: int) -> Tensor:
    """Rows of q or k [N·D, ...] from halves (i, i + D/2) to neighbours (2i, 2i + 1) in each head."""
    split = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return split.transpose(1, 2).reshape(tensor.shape)


def deinterleave(tensor: Tensor, heads: int) -> Tensor:
    """The way back from `interleave`."""
    split = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return split.transpose(1, 2).reshape(tensor.shape)


def add_architecture(writer: Any, dialect: Dialect, vocabulary: int) -> None:
    """Sizes, RoPE and what the family has besides, as llama.cpp reads them.

    Raises:
        NotExportable: for a RoPE that llama.cpp has no metadata for.
    """
    config = dialect.config
    writer.add_block_count(int(config.num_hidden_layers))
    writer.add_context_length(int(config.max_position_embeddings))
    writer.add_embedding_length(int(config.hidden_size))
    if (inner := getattr(config, "intermediate_size", None)) is not None:
        writer.add_feed_forward_length(int(inner))
    writer.add_head_count(dialect.heads)
    writer.add_head_count_kv(dialect.kv_heads)
    if hasattr(config, "layer_norm_eps"):
        writer.add_layer_norm_eps(float(config.layer_norm_eps))
    else:
        writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_vocab_size(vocabulary)
    key, value = dialect.key_and_value_length
    writer.add_key_length(key)
    writer.add_value_length(value)
    add_rope(writer, config, dialect.architecture, dialect.rotary_dim, dialect.family.partial_rotary)
    section = rope_of(config).get("mrope_section")
    if section is not None:  # how positions in three axes share a head
        writer.add_rope_dimension_sections([*section, 0, 0][:4])
    dialect.family.describe(writer, config)
    if dialect.whole is not config:
        _describe_images(writer, dialect)


def _describe_images(writer: Any, dialect: Dialect) -> None:
    """How many layers take what earlier layers of a tower gave."""
    layers = getattr(dialect.whole.vision_config, "deepstack_visual_indexes", None)
    if layers is not None:
        writer.add_num_deepstack_layers(len(layers))
