"""Every trained family as GGUF: what the file says, and that llama.cpp (where it is installed) computes the same."""

import logging

import pytest
import torch
from gguf import GGUFReader, dequantize

from pronghorn.errors import NotExportable
from pronghorn.export import save_gguf, save_gguf_adapter
from pronghorn.export.gguf import llama_cpp
from pronghorn.export.gguf.architecture import deinterleave, interleave
from pronghorn.export.gguf.families import FAMILIES
from tests.export.test_merged import logits, trained
from tests.families.mixtures import tiny_mixture
from tests.tiny import LATENT, MIXTURES, tiny_model, tiny_tokenizer
from tests.tiny_vision import HYBRIDS, MODELS, tiny_vision_model

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.9,
    "mscale_all_dim": 0.9,
    "original_max_position_embeddings": 64,
}
_OWN_ANGLES = {"rope_type": "default", "rope_theta": 500.0}
VISION = MODELS | HYBRIDS
#: Heads of k and v of one size, as llama.cpp has them.
_RECURRENT = {"linear_key_head_dim": 32}
_SECTIONS = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "mrope_section": [2, 1, 1],
}
_GEMMA3_LAYERS = ["sliding_attention"] * 5 + ["full_attention"]
#: What llama.cpp has built in for Gemma: attention scaled by the head's size. Windows are shorter than the rows.
SETTINGS = {
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "query_pre_attn_scalar": 16, "sliding_window": 32},
    "gemma3_text": {
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 16,
        "sliding_window": 32,
        "num_hidden_layers": 7,
    },
    "gemma3": {
        "query_pre_attn_scalar": 16,
        "sliding_window": 32,
        "num_hidden_layers": 6,
        "layer_types": _GEMMA3_LAYERS,
    },
    "cohere": {"tie_word_embeddings": True, "logit_scale": 0.7},
    "cohere2": {
        "tie_word_embeddings": True,
        "num_hidden_layers": 4,
        "sliding_window": 32,
        "logit_scale": 0.7,
    },
    "olmo3": {
        "num_hidden_layers": 4,
        "sliding_window": 32,
        "rope_parameters": {
            "full_attention": {**_YARN, "factor": 8.0, "mscale": 0.5, "beta_fast": 4.0, "beta_slow": 0.5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "smollm3": {"num_hidden_layers": 4},
    "glm4": {"partial_rotary_factor": 0.5, "attention_bias": True},
    "deepseek_v2": {
        "topk_method": "greedy",
        "n_group": None,
        "rope_parameters": {**_YARN, "rope_type": "default"},
    },
    "deepseek_v3": {"rope_parameters": _YARN},
    "glm4_moe_lite": {"mlp_layer_types": ["dense", "sparse", "sparse"], "num_hidden_layers": 3},
    "youtu": {"tie_word_embeddings": True},
    "mixtral": {"sliding_window": None},
    "qwen3_moe": {"sliding_window": None, "mlp_only_layers": []},
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_moe"), _RECURRENT),
    "qwen3_5_text": {**_RECURRENT, "rope_parameters": _SECTIONS, "linear_num_value_heads": 6},
    "qwen3_5_moe_text": {**_RECURRENT, "rope_parameters": _SECTIONS},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.3,
        "logits_scaling": 1.7,
    },
}
#: Adapted weights a layer, where they are not the seven of Llama: experts' gate and up are two in a file.
ADAPTED = {
    "phi3": 4,
    "glm4": 6,
    "qwen2_moe": 10,
    # Keys' and values' share of one module apart; of three layers one is dense.
    "youtu": 9,
    "deepseek_v2": 11,
    "deepseek_v3": 11,
    "glm4_moe_lite": 11,
    # Half of the layers have in_proj_qkv, or in two parts in_proj_qkvz, in q's, k's and v's place.
    "qwen3_5_text": 6,
    "qwen3_5": 6,
    "qwen3_5_moe_text": 9,
    "qwen3_5_moe": 9,
    "qwen3_next": 9.5,
}


def family_model(family, **changes):
    make = tiny_mixture if family in MIXTURES else tiny_vision_model if family in VISION else tiny_model
    return make(family, **{**SETTINGS.get(family, {}), **changes})


def read(path):
    reader = GGUFReader(path)
    found = {
        tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in reader.tensors
    }
    return {name: field.contents() for name, field in reader.fields.items()}, found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_the_trained_model_again(tmp_path, family):
    model = trained(family_model(family))
    expected = logits(model)
    found = save_gguf(model, tiny_tokenizer(), tmp_path / "out", "f32").checks[0]
    layers = model.config.get_text_config().num_hidden_layers
    assert found.passed and found.adapted == layers * ADAPTED.get(family, 7)
    # llama.cpp keeps keys and values in fp16, and adds experts up in another order.
    limit = 2e-5 if family in MIXTURES or family in VISION else 2e-6
    assert all(item.divergence < limit for item in found.comparisons)
    readers = [item.reader for item in found.comparisons]
    first = "transformers" if FAMILIES[family].in_transformers else "the file's tensors"
    assert readers == ([first, "llama.cpp"] if llama_cpp.available() else [first])
    assert torch.equal(logits(model), expected)  # still there, unmerged


@pytest.mark.parametrize(
    "family, tied",
    [(family, True) for family in ("llama", "qwen2", "phi3", "granite")] + [("gemma3_text", False)],
)
def test_heads_tied_and_of_their_own(tmp_path, family, tied):
    done = save_gguf(
        family_model(family, tie_word_embeddings=tied), tiny_tokenizer(), tmp_path / "out", "f32"
    )
    assert ("output.weight" in read(done.files[0])[1]) is not tied
    assert all(item.divergence < 2e-6 for item in done.checks[0].comparisons)


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_a_head_of_its_own_that_the_architecture_has_not_is_refused(tmp_path, family):
    with pytest.raises(NotExportable, match=r"lm_head\.weight has no place"):
        save_gguf(family_model(family, tie_word_embeddings=False), tiny_tokenizer(), tmp_path / "out", "f32")
    assert not list(tmp_path.iterdir())


def test_gemmas_norms_hold_what_is_multiplied_by_and_settings_are_keys(tmp_path):
    model = family_model(
        "gemma2", final_logit_softcapping=20.0, attn_logit_softcapping=30.0, num_hidden_layers=3
    )
    fields, found = read(save_gguf(model, tiny_tokenizer(), tmp_path / "out", "f32", verify=False).files[0])
    layer = model.model.layers[0]
    for name, norm in (
        ("attn_norm", layer.input_layernorm),
        ("post_attention_norm", layer.post_attention_layernorm),
        ("ffn_norm", layer.pre_feedforward_layernorm),
        ("post_ffw_norm", layer.post_feedforward_layernorm),
    ):
        assert torch.equal(found[f"blk.0.{name}.weight"], norm.weight + 1)
    assert torch.equal(found["output_norm.weight"], model.model.norm.weight + 1)
    assert fields["gemma2.final_logit_softcapping"] == 20.0
    assert fields["gemma2.attn_logit_softcapping"] == 30.0
    assert fields["gemma2.attention.sliding_window"] == 32


def test_gemma_3_has_two_ropes(tmp_path):
    ropes = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 7000.0},
    }
    model = family_model("gemma3_text", rope_parameters=ropes)
    done = save_gguf(model, tiny_tokenizer(), tmp_path / "out", "f32")
    fields, found = read(done.files[0])
    assert fields["gemma3.rope.freq_base"] == 50000.0 and fields["gemma3.rope.freq_base_swa"] == 7000.0
    assert fields["gemma3.rope.scaling.factor"] == 8.0
    weight = model.model.layers[0].self_attn.q_norm.weight
    assert torch.equal(found["blk.0.attn_q_norm.weight"], weight + 1)
    assert all(item.divergence < 2e-6 for item in done.checks[0].comparisons)


@pytest.mark.parametrize(
    "family, change, message",
    [
        ("gemma2", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar=24"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "sliding window"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma", {"hidden_act": "silu"}, "hidden_act='silu'"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob=True"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "layers without experts"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm=True in 2 layers"),
        ("cohere2", {"layer_types": ["full_attention"] * 4}, "sliding window"),
        ("olmo3", {"layer_types": ["full_attention"] * 4}, "sliding window"),
        (
            "olmo3",
            {"rope_parameters": {"full_attention": _OWN_ANGLES, "sliding_attention": _YARN}},
            "another RoPE in windowed layers",
        ),
        ("exaone4", {"sliding_window": 32}, "sliding_window=32"),
        ("smollm3", {"no_rope_layers": [1, 1, 0, 1]}, "that rotate"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave=False"),
        ("deepseek_v3", {"q_lora_rank": None}, "q_lora_rank=None in 3 layers"),
        ("deepseek_v3", {"rope_parameters": {**_YARN, "mscale": 0.5}}, "mscale other than"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 3}, "group_limited_greedy"),
        ("qwen3_5_text", {"layer_types": ["full_attention", "linear_attention"]}, "other layers of full"),
        ("qwen3_5_text", {"layer_types": ["linear_attention"] * 2}, "full attention, this one has none"),
        ("qwen3_5_text", {"linear_value_head_dim": 16}, "linear_value_head_dim"),
        ("qwen3_5_text", {"rope_parameters": {**_SECTIONS, "mrope_section": [1, 2, 1]}}, "mrope_section"),
        ("qwen3_5_text", {"rope_parameters": {**_SECTIONS, "mrope_section": [11, 11, 10]}}, "mrope_section"),
        ("qwen3_next", {"norm_topk_prob": False}, "norm_topk_prob=False"),
        ("glm4_moe_lite", {"mlp_layer_types": ["sparse", "dense", "sparse"]}, "behind ones with"),
    ],
)
def test_what_llama_cpp_has_built_in_otherwise_is_refused(tmp_path, family, change, message):
    with pytest.raises(NotExportable, match=message):
        save_gguf(family_model(family, **change), tiny_tokenizer(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_granites_multipliers(tmp_path):
    model = family_model("granite")
    fields, found = read(save_gguf(model, tiny_tokenizer(), tmp_path / "out", "f32", verify=False).files[0])
    expected = {"embedding_scale": 3.0, "residual_scale": 0.7, "attention.scale": 0.3, "logit_scale": 1.7}
    assert {key: fields[f"granite.{key}"] for key in expected} == pytest.approx(expected)
    stored = model.model.layers[1].self_attn.k_proj.weight
    assert torch.equal(found["blk.1.attn_k.weight"], interleave(stored, 2))
    assert torch.equal(deinterleave(interleave(stored, 2), 2), stored)


def test_experts_stand_apart_and_routers_are_not_rounded(tmp_path):
    model = family_model("qwen2_moe")
    file = save_gguf(model, tiny_tokenizer(), tmp_path / "out", "f32", verify=False).files[0]
    fields, found = read(file)
    moe = model.model.layers[0].mlp
    gate, up = moe.experts.gate_up_proj.chunk(2, dim=1)
    assert torch.equal(found["blk.0.ffn_gate_exps.weight"], gate)
    assert torch.equal(found["blk.0.ffn_up_exps.weight"], up)
    assert torch.equal(found["blk.0.ffn_down_exps.weight"], moe.experts.down_proj)
    assert torch.equal(found["blk.0.ffn_gate_inp_shexp.weight"], moe.shared_expert_gate.weight[0])
    config = model.config
    expected = {
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
    }
    assert {key: fields[f"qwen2moe.{key}"] for key in expected} == expected
    file = save_gguf(model, tiny_tokenizer(), tmp_path / "out", "q8_0", verify=False).files[0]
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
    assert kinds["blk.0.ffn_up_exps.weight"] == "Q8_0" and kinds["blk.0.ffn_gate_inp.weight"] == "F32"


def test_keys_and_values_of_a_code_stand_apart(tmp_path):
    model = family_model("deepseek_v3")
    file = save_gguf(model, tiny_tokenizer(), tmp_path / "out", "f32", verify=False).files[0]
    fields, found = read(file)
    stored = model.model.layers[1].self_attn.kv_b_proj.weight.view(4, 24 + 32, 64)
    assert torch.equal(found["blk.1.attn_k_b.weight"], stored[:, :24].transpose(1, 2))
    assert torch.equal(found["blk.1.attn_v_b.weight"], stored[:, 24:])
    router = model.model.layers[1].mlp.gate
    assert torch.equal(found["blk.1.exp_probs_b.bias"], router.e_score_correction_bias)
    expected = {
        "attention.head_count_kv": 1, "attention.key_length": 64 + 16, "attention.value_length": 64,
        "attention.key_length_mla": 24 + 16, "attention.value_length_mla": 32, "attention.kv_lora_rank": 64,
        "leading_dense_block_count": 1, "expert_gating_func": 2, "expert_group_count": 4, "rope.dimension_count": 16,
        "rope.scaling.yarn_log_multiplier": pytest.approx(0.09),
    }  # fmt: skip
    assert {key: fields[f"deepseek2.{key}"] for key in expected} == expected


def test_heads_of_linear_attention_in_llama_cpps_order(tmp_path):
    """2 heads of k, 6 of v: those of the first of k are 0, 2, 4 in the file."""
    model = family_model("qwen3_5_text")
    file = save_gguf(model, tiny_tokenizer(), tmp_path / "out", "q8_0", verify=False).files[0]
    fields, found = read(file)
    layer, order = model.model.layers[0].linear_attn, [0, 3, 1, 4, 2, 5]
    assert torch.equal(found["blk.0.ssm_a"], -layer.A_log.exp()[order])
    assert torch.equal(found["blk.0.ssm_dt.bias"], layer.dt_bias[order])
    conv = layer.conv1d.weight[:, 0]
    values = conv[128:].view(6, 32, 4)[order].flatten(0, 1)
    assert torch.equal(found["blk.0.ssm_conv1d.weight"], torch.cat([conv[:128], values]))
    assert torch.equal(found["blk.0.ssm_norm.weight"], layer.norm.weight)  # not 1 + w
    assert torch.equal(found["blk.0.attn_norm.weight"], 1 + model.model.layers[0].input_layernorm.weight)
    out = layer.out_proj.weight.view(64, 6, 32)[:, order].flatten(1)
    torch.testing.assert_close(found["blk.0.ssm_out.weight"].view(64, 192), out, atol=0.01, rtol=0)
    expected = {
        "ssm.conv_kernel": 4, "ssm.state_size": 32, "ssm.group_count": 2, "ssm.time_step_rank": 6,
        "ssm.inner_size": 192, "full_attention_interval": 2, "rope.dimension_sections": [2, 1, 1, 0],
        "rope.dimension_count": 8,
    }  # fmt: skip
    assert {key: fields[f"qwen35.{key}"] for key in expected} == expected
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
    assert kinds["blk.0.ssm_conv1d.weight"] == "F32" and kinds["blk.0.ssm_out.weight"] == "Q8_0"


def test_a_model_for_images_without_its_tower(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "pronghorn"):
        done = save_gguf(family_model("qwen3_vl"), tiny_tokenizer(), tmp_path / "out", "f32", verify=False)
    assert "mmproj" in caplog.text
    fields, found = read(done.files[0])
    assert not any("v." in name[:2] or "visual" in name for name in found)
    assert fields["qwen3vl.rope.dimension_sections"] == [4, 2, 2, 0]
    assert fields["qwen3vl.n_deepstack_layers"] == 2


@pytest.mark.parametrize(
    "family, targets, message",
    [
        ("youtu", {}, "kv_b_proj.weight stands in two parts"),
        ("mixtral", {}, "no linear layer"),
        ("qwen3_next", {"target_modules": ["q_proj"]}, "in_proj_qkvz.weight stands in two parts"),
    ],
)
def test_adapters_without_a_gguf_form(tmp_path, family, targets, message):
    with pytest.raises(NotExportable, match=message):
        save_gguf_adapter(trained(family_model(family), **targets), tmp_path / "out")


@pytest.mark.parametrize("partial", [1.0, 0.5])
def test_phi_3s_long_rope(tmp_path, partial):
    half = int(16 * partial) // 2
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": partial,
        "short_factor": [1.0 + 0.1 * i for i in range(half)],
        "long_factor": [2.0 + i for i in range(half)],
        "original_max_position_embeddings": 512,
    }
    model = trained(
        family_model(
            "phi3",
            rope_parameters=rope,
            max_position_embeddings=4096,
            original_max_position_embeddings=512,
            sliding_window=None,
        )
    )
    done = save_gguf(model, tiny_tokenizer(), tmp_path / "out", "f32")
    fields, found = read(done.files[0])
    assert found["rope_factors_short.weight"].tolist() == pytest.approx(rope["short_factor"])
    assert found["rope_factors_long.weight"].tolist() == pytest.approx(rope["long_factor"])
    # sqrt(1 + ln(4096 / 512) / ln(512))
    assert fields["phi3.rope.scaling.attn_factor"] == pytest.approx(1.1547, abs=1e-4)
    assert fields["phi3.rope.scaling.original_context_length"] == 512
    assert fields["phi3.rope.dimension_count"] == int(16 * partial)
    assert found["blk.0.attn_qkv.weight"].shape == (128, 64) and found["blk.0.ffn_up.weight"].shape == (
        256,
        64,
    )
    assert all(item.divergence < 2e-6 for item in done.checks[0].comparisons)


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_a_window_that_llama_cpp_does_not_compute_is_said(tmp_path, caplog, family):
    with caplog.at_level(logging.WARNING, "pronghorn"):
        save_gguf(
            family_model(family, sliding_window=64), tiny_tokenizer(), tmp_path / "out", "f32", verify=False
        )
    assert f"no sliding window for {family} models: beyond 64 tokens" in caplog.text


@pytest.mark.skipif(llama_cpp.unavailable() is not None, reason="llama.cpp's binding is not here")
@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family not in (*MIXTURES, *LATENT, "qwen3_5_moe")]
)
def test_llama_cpp_adds_the_adapter_to_the_base(tmp_path, family):
    base = family_model(family)
    plain = save_gguf(base, tiny_tokenizer(), tmp_path / "base", "f32", verify=False).files[0]
    model = trained(base)
    file = save_gguf_adapter(model, tmp_path / "adapter").files[0]
    ids = [1, 17, 90, 33, 250, 7]
    with torch.no_grad():
        expected = model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    scale = float(expected.std())
    with llama_cpp.LlamaCpp(plain, adapter=file) as opened:
        # llama.cpp keeps keys and values in fp16: 2⁻¹¹ of values of some units.
        torch.testing.assert_close(opened.logits(ids), expected, atol=0.02 * scale, rtol=0)
    with llama_cpp.LlamaCpp(plain) as opened:
        assert (opened.logits(ids) - expected).abs().max() > 0.3 * scale
