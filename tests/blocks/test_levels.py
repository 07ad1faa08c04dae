"""The declared bytes of a save level are the bytes that a layer really keeps."""

from __future__ import annotations

import pytest
import torch

from pronghorn.blocks import (
    LEVELS,
    LayerWidths,
    host_bytes_per_token,
    kept_bytes_per_token,
    parks,
    saved_bytes_per_token,
)
from pronghorn.engine import bind, binding_of
from pronghorn.engine.forward import build_layer
from pronghorn.engine.layer_call import LayerCall
from pronghorn.engine.stream import flatten_rows
from tests.families.parity import add_adapter
from tests.tiny import tiny_model


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gemma3_text", "phi3", "granite", "youtu", "cohere2", "olmo2"]
)
def test_declared_bytes_are_kept_bytes(family: str, level: str) -> None:
    model = add_adapter(tiny_model(family), r=4)
    bind(model, save_levels=level)
    base, config = model.get_base_model(), model.config
    embeddings = base.model.embed_tokens(torch.arange(12).view(2, 6))
    hidden_states, stream = flatten_rows(embeddings, None, None, {})
    layer = build_layer(base.model.layers[0], LayerCall.of(binding_of(model), hidden_states, stream, 0))
    _, saves = layer.forward(hidden_states, level)
    kept = saves.tensors()
    alive = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept}
    assert sum(t.nbytes for t in kept) == sum(alive.values()), "a view keeps more alive"
    measured = sum(alive.values()) + hidden_states.numel() * 4
    attention = base.model.layers[0].self_attn
    latent = family == "youtu"
    head_dim = attention.qk_head_dim if latent else attention.head_dim
    # One adapter serves what one module gives.
    ranks = (2, 2) if family == "phi3" else (3, 3) if latent else (4, 3)
    of_v = config.num_attention_heads * config.v_head_dim if latent else 0
    codes = config.q_lora_rank + config.kv_lora_rank + config.qk_rope_head_dim + of_v if latent else None
    widths = LayerWidths(
        hidden=config.hidden_size,
        q=config.num_attention_heads * head_dim,
        kv=config.num_key_value_heads * head_dim,
        heads=config.num_attention_heads,
        intermediate=config.intermediate_size,
        attention_ranks=4 * ranks[0],
        glu_ranks=4 * ranks[1],
        element=4,
        residual_element=4,
        output_norms=family in ("gemma3_text", "olmo2"),
        pre_norms=family != "olmo2",
        parallel=family == "cohere2",
        codes=codes,
        raised=2 * config.num_attention_heads * head_dim + of_v + 2 * 4 if latent else 0,
    )
    assert measured == 12 * kept_bytes_per_token(level, widths)


def test_kept_tensors_are_replaced_one_by_one() -> None:
    """What `take` lets go of comes back under the same names."""
    from pronghorn.blocks import LayerSaves
    from pronghorn.blocks.attention import AttentionSaves
    from pronghorn.blocks.glu import GluSaves

    q, lse, summed = torch.ones(1), torch.ones(2), torch.ones(3)
    saves = LayerSaves(AttentionSaves(q=q, lse=lse), GluSaves(summed=summed))
    kept = saves.tensors()
    put = saves.take()
    assert saves.tensors() == []
    again = put([tensor * 2 for tensor in kept])
    assert again.attention.q.equal(q * 2) and again.attention.lse.equal(lse * 2)
    assert again.glu.summed.equal(summed * 2) and again.attention.out is None


def test_levels_for_llama_8b() -> None:
    """The figures that docs/architecture.md quotes."""
    widths = LayerWidths(4096, 4096, 1024, 32, 14336, 4 * 16, 3 * 16, 2, 2)
    kept = [8192, 8192, 37120, 37120, 94560, 94560, 110944]
    assert [kept_bytes_per_token(level, widths) for level in LEVELS] == kept
    for level, size in zip(LEVELS, kept, strict=True):
        on_host = size if parks(level) else 0
        assert (host_bytes_per_token(level, widths), saved_bytes_per_token(level, widths)) == (
            on_host,
            size - on_host,
        )
