"""`get_peft_model`, and adapters loaded from a folder."""

import copy
import json
import pickle

import pytest
import torch
from peft import PeftModel
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)

from pronghorn.engine import binding_of
from pronghorn.errors import AdapterProblem, PronghornError, TargetModuleNotFound, UnknownArgument
from pronghorn.export import save_adapter
from pronghorn.loading import FastLanguageModel, FastVisionModel
from tests.tiny import FAMILIES, save_tiny, tiny_model, tiny_tokenizer

IDS = torch.tensor([[1, 17, 90, 33, 250, 7, 300, 12]])


def adapted(family="llama", model=None, **arguments):
    return FastLanguageModel.get_peft_model(
        model if model is not None else tiny_model(family), **{"r": 4, **arguments}
    )


def randomise(model, seed=0):
    """Give B (and everything else that is trained) values that show in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_adapts_every_projection_and_trains_nothing_else(family):
    model = adapted(family)
    assert isinstance(model, PeftModel)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    modules = {"phi3": 4, "glm": 6, "glm4": 6, "youtu": 8, "minicpm3": 8, "qwen3_5_text": 6}.get(family, 7)
    assert len(trained) == 2 * 2 * modules
    assert all("lora_" in name for name in trained)
    assert binding_of(model).bound
    assert set(binding_of(model).save_levels) == {"offload"}


def test_names_of_separate_projections_mean_the_module_that_gives_them():
    """Scripts name q_proj and gate_proj whatever the model; Phi-3 has them in one module."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = adapted("phi3", target_modules=names)
    expected = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert set(model.peft_config["default"].target_modules) == expected


def test_adapters_are_fp32_on_a_16_bit_base():
    model = adapted(model=tiny_model("llama", dtype=torch.bfloat16))
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "lora_" not in n} == {torch.bfloat16}


def test_initialisation_depends_on_random_state_alone_and_leaves_the_global_state():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = adapted(random_state=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second, third = adapted(random_state=5), adapted(random_state=6)
    a = "base_model.model.model.layers.1.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(first.get_parameter(a), second.get_parameter(a))
    assert not torch.equal(first.get_parameter(a), third.get_parameter(a))


def test_arguments_reach_peft():
    model = adapted(
        lora_alpha=32, lora_dropout=0.25, use_rslora=True, bias="lora_only", layers_to_transform=[1],
        rank_pattern={"q_proj": 2}, max_seq_length=77,
    )  # fmt: skip
    layer = model.base_model.model.model.layers[1].self_attn
    assert layer.q_proj.lora_A["default"].weight.shape[0] == 2
    assert layer.v_proj.scaling["default"] == 32 / 2  # alpha / sqrt(r)
    assert layer.v_proj.lora_dropout["default"].p == 0.25
    assert not hasattr(model.base_model.model.model.layers[0].self_attn.q_proj, "lora_A")
    assert model.max_seq_length == 77


def test_dora_and_all_linear():
    model = adapted(target_modules="all-linear", use_dora=True)
    assert "default" in model.base_model.model.model.layers[0].mlp.down_proj.lora_magnitude_vector


def test_the_default_on_a_model_with_other_names_is_all_linear_layers():
    config = Phi3Config(
        vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=0,
    )  # fmt: skip
    model = adapted(model=Phi3ForCausalLM(config))
    names = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name in model.state_dict() if "lora_A" in name}
    assert names == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


def test_experts_that_no_adapter_reaches_are_told_with_what_reaches_them(caplog):
    def mixture():
        sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
        return PhimoeForCausalLM(
            PhimoeConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2)
        )

    def told():
        return [
            record.getMessage() for record in caplog.records if "no adapter on the exp" in record.getMessage()
        ]

    adapted(model=mixture())
    assert len(told()) == 1 and "['experts.gate_up_proj', 'experts.down_proj']" in told()[0]
    caplog.clear()
    both = adapted(model=mixture(), target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    assert sum("experts" in name and "lora_A" in name for name, _ in both.named_parameters()) == 2
    adapted(model=mixture(), target_modules=["q_proj"])  # chosen by name
    adapted()
    assert not told()
    adapted(model=mixture(), target_parameters=["experts.down_proj"])
    assert "['experts.gate_up_proj']" in told()[0]


def test_one_name_and_a_pattern_as_a_string():
    one = adapted(target_modules="q_proj")
    assert sum("lora_A" in name for name, _ in one.named_parameters()) == 2
    pattern = adapted(target_modules=r".*\.layers\.0\..*(q|k)_proj")
    assert sum("lora_A" in name for name, _ in pattern.named_parameters()) == 2


def test_head_and_embeddings_among_the_targets_are_trained_whole():
    model = adapted(target_modules=["q_proj", "embed_tokens", "lm_head"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trained == {
        "base_model.model.model.embed_tokens.modules_to_save.default.weight",
        "base_model.model.lm_head.modules_to_save.default.weight",
    }


@pytest.mark.parametrize(
    "arguments, hint",
    [
        ({"target_modules": ["q_prj"]}, "did you mean 'q_proj'"),
        ({"target_modules": "q_prj"}, "did you mean 'q_proj'"),
        ({"target_modules": ["q_proj", "zzz"]}, "its modules are"),
        ({"target_modules": r".*\.nothing"}, "matches no module"),
        ({"target_modules": "(["}, "regular expression"),
        ({"target_modules": []}, "no module is left"),
        ({"target_modules": 5}, "are no names"),
        ({"target_modules": ["lm_head"]}, "no module is left"),
        ({"modules_to_save": ["lm_heat"]}, "did you mean 'lm_head'"),
        ({"layers_to_transform": [2]}, "the model has 2"),
    ],
)
def test_modules_that_do_not_exist(arguments, hint):
    with pytest.raises(TargetModuleNotFound) as caught:
        adapted(**arguments)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    "arguments, hint",
    [
        ({"lora_alfa": 3}, "did you mean 'lora_alpha'"),
        ({"bias": "some"}, "'lora_only'"),
        ({"r": 0}, "rank"),
        ({"r": None}, "r=None is no rank"),
        ({"r": True}, "r=True is no rank"),
        ({"lora_alpha": 0}, "no effect"),
        ({"lora_dropout": "0.1"}, "below 1"),
        ({"max_seq_length": -1}, "no number of tokens"),
        ({"lora_dropout": 1.0}, "below 1"),
        ({"qat_scheme": "int4"}, "qat_scheme"),
    ],
)
def test_arguments_that_do_not_exist(arguments, hint):
    with pytest.raises(UnknownArgument) as caught:
        adapted(**arguments)
    assert hint in str(caught.value)


def test_a_second_adapter_is_refused_and_the_first_stays():
    model = randomise(adapted())
    before = logits(model)
    for wrapped in (model, model.get_base_model()):
        with pytest.raises(AdapterProblem):
            adapted(model=wrapped)
    assert torch.equal(logits(model), before)


def test_what_peft_refuses_is_one_clear_error():
    with pytest.raises(AdapterProblem, match="PEFT refuses"):
        adapted(target_modules=["input_layernorm"])


def test_gradients_reach_the_adapter_of_a_4_bit_model(tmp_path):
    path = save_tiny(tmp_path / "m", "llama")
    model, _ = FastLanguageModel.from_pretrained(str(path), dtype="float32", load_in_4bit=True)
    model = randomise(adapted(model=model)).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


# --- copies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_save_themselves_and_not_the_original(tmp_path, duplicate):
    path = save_tiny(tmp_path / "m", "llama")
    model, _ = FastLanguageModel.from_pretrained(str(path), dtype="float32")
    model = adapted(model=model)
    twin = randomise(duplicate(model))
    assert twin.save_pretrained_merged.args[0] is twin
    assert twin.get_base_model().save_pretrained_merged.args[0] is twin.get_base_model()
    twin.save_pretrained_merged(str(tmp_path / "twin"), None)
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "twin")
    torch.testing.assert_close(logits(merged), logits(twin), atol=1e-5, rtol=0)
    assert not torch.allclose(logits(merged), logits(model), atol=1e-2)


def test_state_dict_names_are_pefts():
    names = adapted().state_dict()
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight" in names
    assert not any("pronghorn" in name for name in names)


# --- adapters from a folder ---------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    base = save_tiny(tmp_path / "base", "qwen2")
    model, tokenizer = FastLanguageModel.from_pretrained(str(base), dtype="float32")
    model = randomise(adapted(model=model, modules_to_save=["lm_head"]))
    save_adapter(model, tokenizer, tmp_path / "adapter")
    return tmp_path / "adapter", model


def test_an_adapter_folder_loads_its_base_and_trains_on(saved):
    folder, model = saved
    again, tokenizer = FastLanguageModel.from_pretrained(str(folder), dtype="float32")
    torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=0)
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert binding_of(again).bound
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in again.named_parameters() if p.requires_grad} == trained
    again.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert callable(again.save_pretrained_merged)


def test_stock_peft_loads_a_saved_adapter(saved):
    from transformers import AutoModelForCausalLM

    folder, model = saved
    base = AutoModelForCausalLM.from_pretrained(folder.parent / "base")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(base, folder)), logits(model), atol=1e-5, rtol=0
    )


def refused(folder, code, *parts):
    with pytest.raises(PronghornError) as caught:
        FastLanguageModel.from_pretrained(str(folder), dtype="float32")
    assert caught.value.code == code, caught.value
    for part in parts:
        assert part in str(caught.value)


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_moved_base(saved):
    edit(saved[0], base_model_name_or_path=str(saved[0].parent / "bsae"))
    refused(saved[0], "PH101", "bsae", "adapter_config.json")


def test_an_adapter_without_base(saved):
    edit(saved[0], base_model_name_or_path=None)
    refused(saved[0], "PH102", "base_model_name_or_path")


def test_an_adapter_on_itself(saved):
    edit(saved[0], base_model_name_or_path=str(saved[0]))
    refused(saved[0], "PH102", "adapter itself")


def test_an_adapter_of_another_rank(saved):
    edit(saved[0], r=8)
    refused(saved[0], "PH108", str(saved[0]))


def test_an_adapter_of_another_model(saved, tmp_path):
    other = save_tiny(tmp_path / "other", "qwen2", num_hidden_layers=1)
    edit(saved[0], base_model_name_or_path=str(other))
    refused(saved[0], "PH108", "layers.1.")
    deeper = save_tiny(tmp_path / "deeper", "qwen2", num_hidden_layers=3)
    edit(saved[0], base_model_name_or_path=str(deeper))
    refused(saved[0], "PH102", "layers.2.")


@pytest.mark.parametrize("family,sizes", [("phi3", {}), ("gemma2", {"head_dim": 32})], ids=["phi3", "gemma2"])
def test_an_adapter_of_another_family(saved, tmp_path, family, sizes):
    other = save_tiny(tmp_path / "other", family, **sizes)
    edit(saved[0], base_model_name_or_path=str(other))
    refused(saved[0], "PH108", f"another model than this {family} one")


def test_a_truncated_adapter(saved):
    file = saved[0] / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    refused(saved[0], "PH102", "truncated")


def test_a_pickled_adapter_and_none_at_all(saved):
    (saved[0] / "adapter_model.safetensors").unlink()
    refused(saved[0], "PH102", "adapter_model.safetensors")
    torch.save({}, saved[0] / "adapter_model.bin")
    refused(saved[0], "PH103", "adapter_model.bin")


@pytest.mark.parametrize("made_by", [FastLanguageModel, FastVisionModel])
def test_a_model_with_its_tokenizer_in_place_of_a_model(made_by):
    with pytest.raises(UnknownArgument, match="model, tokenizer = "):
        made_by.get_peft_model((tiny_model("llama"), tiny_tokenizer()), r=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' is something else than LoRA"),
        ({"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS' is something else than LoRA"),
        ({"inference_mode": True}, "inference_mode=True makes a new adapter that is not trained"),
        (
            {"trainable_token_indices": [5, 320]},
            "trainable_token_indices has 320, the model embeds 320 tokens",
        ),
        ({"trainable_token_indices": {"embed_tokens": [-1]}}, "trainable_token_indices has -1"),
        ({"rank_pattern": {"q_prj": 2}}, "rank_pattern has 'q_prj', .*'q_proj'"),
        ({"alpha_pattern": {"q_proj(": 2}}, "alpha_pattern has 'q_proj\\(', which is no regular expression"),
        ({"exclude_modules": ["k_prj"]}, "exclude_modules has 'k_prj', .*'k_proj'"),
        ({"init_lora_weights": "pissa_niter_4"}, "random numbers, .*'pissa'"),
    ],
)
def test_settings_that_would_have_no_effect_or_another_are_refused(arguments, message):
    with pytest.raises(PronghornError, match=message):
        adapted(**arguments)


def test_replicated_layers_only_where_no_config_counts_them():
    model = adapted(layer_replication=[[0, 2], [1, 2]])
    assert len(model.base_model.model.model.layers) == 3 and logits(model).isfinite().all()
    with pytest.raises(AdapterProblem, match="layer_types"):
        adapted("qwen2", layer_replication=[[0, 2], [1, 2]])


def test_patterns_and_a_revision_reach_peft():
    model = adapted(rank_pattern={"layers.0.*q_proj": 2}, exclude_modules=["k_proj"], revision="main")
    layers = [layer.self_attn for layer in model.base_model.model.model.layers]
    assert [layer.q_proj.r["default"] for layer in layers] == [2, 4]
    assert not hasattr(layers[0].k_proj, "lora_A") and model.peft_config["default"].revision == "main"


def test_all_linear_layers_but_those_that_cannot_bear_an_adapter():
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 1}
    mamba = adapted(model=MambaForCausalLM(MambaConfig(**sizes, state_size=4)))
    assert set(mamba.peft_config["default"].target_modules) == {"in_proj", "x_proj"}
    experts = PhimoeForCausalLM(
        PhimoeConfig(
            **sizes, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, num_local_experts=2
        )
    )
    experts = adapted(model=experts, target_modules="all-linear")
    assert set(experts.peft_config["default"].target_modules) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert logits(experts).isfinite().all()


@pytest.mark.parametrize("family", ["phi3", "llama"])
def test_all_linear_layers_of_some_decoder_layers(family):
    model = adapted(
        family, layers_to_transform=[1], **({} if family == "phi3" else {"target_modules": "all-linear"})
    )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * (4 if family == "phi3" else 7) and all(
        ".layers.1." in name for name in trained
    )
