"""Linear attention by the gated delta rule in GGUF. llama.cpp multiplies by a = -exp(A_log), keeps the convolution as
[C, W], and wants [q | k | v] and z apart, where Qwen3-Next has them head by head.

It repeats heads of q and k one after the other for those of v, while Transformers lets neighbours share one. In files
of Qwen3.5 the heads of v lie as it reads them, wherever they are a dimension: head j of k's i-th of v at j + i · K
instead of j · N / K + i.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pronghorn.export.gguf.rope import rope_of, rotated

#: what stands before the names of such a layer's tensors
LAYER = "linear_attn."
#: the sections of a head that Qwen3.5 turns by a token's time, height and width, where a config does not say
_SECTIONS = (11, 11, 10)
_JOINED, _PARTS = "in_proj_qkvz.weight", ("in_proj_qkv.weight", "in_proj_z.weight")
_DECAY, _CONV, _OUT = "A_log", "conv1d.weight", "out_proj.weight"
#: what has heads of v, and nothing before them
_VALUES = ("in_proj_z.weight", "in_proj_b.weight", "in_proj_a.weight", "dt_bias", _DECAY)
#: q and k first
_MIXED = ("in_proj_qkv.weight", _CONV)


def names_in_file(name: str) -> list[str]:
    """The names by which gguf's table knows the parts of a checkpoint's tensor."""
    before, _, part = name.rpartition(LAYER)
    if part == _JOINED:
        return [f"{before}{LAYER}{half}" for half in _PARTS]
    return [f"{before}{LAYER}dt_proj.bias"] if part == "dt_bias" else [name]


def write(name: str, tensor: Tensor, config: Any) -> list[Tensor]:
    """A checkpoint's tensor as it stands in the file, one for each of `names_in_file`."""
    part = name.rpartition(LAYER)[2]
    if part == _JOINED:
        by_keys = tensor.unflatten(0, (config.linear_num_key_heads, -1)).split(_of_a_key(config), 1)
        q, k, v, z = (x.flatten(0, 1) for x in by_keys)
        return [torch.cat([q, k, v]), z]
    if part == _DECAY:
        tensor = -tensor.exp()
    elif part == _CONV:
        tensor = tensor.squeeze(1)
    return [_ordered(part, tensor, config, _of_one_key_apart)]


def restore(name: str, tensors: list[Tensor], config: Any) -> Tensor:
    """The way back from `write`."""
    part, keys = name.rpartition(LAYER)[2], config.linear_num_key_heads
    if part == _JOINED:
        width = keys * config.linear_key_head_dim
        q, k, v = tensors[0].split([width, width, tensors[0].shape[0] - 2 * width])
        return torch.cat([x.unflatten(0, (keys, -1)) for x in (q, k, v, tensors[1])], 1).flatten(0, 1)
    tensor = _ordered(part, tensors[0], config, _of_one_key_together)
    if part == _DECAY:
        return (-tensor).log()
    return tensor.unsqueeze(1) if part == _CONV else tensor


def shapes(name: str, shape: tuple[int, ...], config: Any) -> list[tuple[int, ...]]:
    """Of the tensors that `write` gives."""
    part = name.rpartition(LAYER)[2]
    if part == _JOINED:
        values = config.linear_num_value_heads * config.linear_value_head_dim
        return [(shape[0] - values, *shape[1:]), (values, *shape[1:])]
    return [(shape[0], *shape[2:])] if part == _CONV else [shape]


def orders_columns(name: str, config: Any) -> bool:
    """Whether it is a weight's columns, not its rows, that lie otherwise in the file."""
    return name.endswith(f"{LAYER}{_OUT}") and _has_other_order(config)


def describe_recurrent(writer: Any, config: Any) -> None:
    """Sizes of the heads, and which layers are of full attention."""
    writer.add_ssm_conv_kernel(int(config.linear_conv_kernel_dim))
    writer.add_ssm_state_size(int(config.linear_key_head_dim))
    writer.add_ssm_group_count(int(config.linear_num_key_heads))
    writer.add_ssm_time_step_rank(int(config.linear_num_value_heads))
    writer.add_ssm_inner_size(int(config.linear_num_value_heads * config.linear_value_head_dim))
    writer.add_full_attention_interval(full_attention_interval(config))
    if _has_other_order(config) and "mrope_section" not in rope_of(config):
        writer.add_rope_dimension_sections([*_SECTIONS, 0])


def turns_whole_width(config: Any) -> bool:
    """Whether llama.cpp turns all that Transformers turns: pair p by section p % 3, as long as that has more."""
    if not _has_other_order(config):
        return True
    sections = tuple(rope_of(config).get("mrope_section", _SECTIONS))[:3]
    pairs = (p % sum(sections) for p in range(rotated(config, config.head_dim) // 2))
    return sum(sections) <= config.head_dim and all(p < 3 * sections[p % 3] for p in pairs)


def full_attention_interval(config: Any) -> int:
    """Every so many layers one is of full attention."""
    return 1 + list(config.layer_types).index("full_attention")


def _of_a_key(config: Any) -> list[int]:
    """Rows of q, k, v and z that Qwen3-Next has together for a head of k."""
    values = config.linear_num_value_heads // config.linear_num_key_heads * config.linear_value_head_dim
    return [config.linear_key_head_dim, config.linear_key_head_dim, values, values]


def _has_other_order(config: Any) -> bool:
    return str(config.model_type).startswith("qwen3_5")


def _ordered(part: str, tensor: Tensor, config: Any, order: Any) -> Tensor:
    """The tensor with its heads of v in another order."""
    keys, group = config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads
    if not _has_other_order(config):
        return tensor
    if part in _VALUES:
        return order(tensor, 0, keys, group)
    if part == _OUT:
        return order(tensor, 1, keys, group)
    if part in _MIXED:
        first = 2 * keys * config.linear_key_head_dim
        return torch.cat([tensor[:first], order(tensor[first:], 0, keys, group)])
    return tensor


def _of_one_key_apart(x: Tensor, dim: int, keys: int, group: int) -> Tensor:
    return x.unflatten(dim, (keys, group, -1)).transpose(dim, dim + 1).flatten(dim, dim + 2)


def _of_one_key_together(x: Tensor, dim: int, keys: int, group: int) -> Tensor:
    return _of_one_key_apart(x, dim, group, keys)
