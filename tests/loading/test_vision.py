"""Models that read images: loaded with their processor, adapted, saved, reloaded by stock Transformers and PEFT."""

import pytest
import torch

pytest.importorskip("PIL")

from peft import PeftModel
from transformers import AutoModelForImageTextToText

from pronghorn import FastLanguageModel, FastModel, FastVisionModel
from pronghorn.engine import binding_of
from pronghorn.errors import (
    CheckpointCorrupt,
    TargetModuleNotFound,
    TokenizerProblem,
    UnknownArgument,
    UnsupportedCheckpoint,
)
from tests.families.parity import relative_error
from tests.tiny import save_tiny
from tests.tiny_vision import MODELS, save_tiny_vision, vision_batch

PLAIN = {"load_in_4bit": False, "dtype": torch.float32, "max_seq_length": 128}
NAMES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module", params=sorted(MODELS))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    return save_tiny_vision(tmp_path_factory.mktemp("vision") / kind, kind)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return save_tiny_vision(tmp_path_factory.mktemp("vision") / "qwen", "qwen2_5_vl")


def adapted(model):
    """Names of the modules with an adapter."""
    return {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}


def trained(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model.eval()


def logits(model, batch):
    with torch.no_grad():
        return model(**batch, use_cache=False).logits


def test_an_adapter_and_a_merged_model_are_stock_ones(kind, folder, tmp_path):
    model, processor = FastVisionModel.from_pretrained(folder, **PLAIN)
    assert binding_of(model).bound and processor.image_processor is not None
    assert model.max_seq_length == 128 and processor.tokenizer.chat_template == processor.chat_template
    model = trained(FastVisionModel.get_peft_model(model, r=4))
    assert {name.rsplit(".", 1)[1] for name in adapted(model)} == NAMES
    assert all(".language_model." in name for name in adapted(model))
    batch = {n: x for n, x in vision_batch(kind, [(3, (2, 2), 5)]).items() if n != "labels"}
    live = logits(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    processor.save_pretrained(tmp_path / "adapter")
    base = AutoModelForImageTextToText.from_pretrained(folder)
    assert relative_error(logits(base, batch), live) > 1e-2
    stock = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert relative_error(logits(stock, batch), live) < 1e-5
    export = model.save_pretrained_merged(tmp_path / "merged", processor)
    assert export.checks[0].passed and export.checks[0].adapted == len(adapted(model))
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    assert relative_error(logits(merged, batch), live) < 1e-5
    again, own = FastVisionModel.from_pretrained(tmp_path / "adapter", **PLAIN)
    assert relative_error(logits(again.eval(), batch), live) < 1e-5 and type(own) is type(processor)


def test_one_model_under_three_names(qwen):
    vision, text, any_kind = (
        loader.from_pretrained(qwen, **PLAIN) for loader in (FastVisionModel, FastLanguageModel, FastModel)
    )
    assert type(vision[0]) is type(text[0]) is type(any_kind[0])
    assert type(vision[1]) is type(any_kind[1]) and not hasattr(text[1], "image_processor")
    (qwen / "processor_config.json").rename(qwen / "elsewhere.json")
    try:
        assert not hasattr(FastModel.from_pretrained(qwen, **PLAIN)[1], "image_processor")
        with pytest.raises(TokenizerProblem, match="has no image processor"):
            FastVisionModel.from_pretrained(qwen, **PLAIN)
        (qwen / "processor_config.json").write_text("{")
        with pytest.raises(TokenizerProblem, match="the processor cannot be read"):
            FastVisionModel.from_pretrained(qwen, **PLAIN)
    finally:
        (qwen / "elsewhere.json").rename(qwen / "processor_config.json")


@pytest.mark.parametrize(
    "asked,names,where",
    [
        ({"finetune_mlp_modules": False}, {"q_proj", "k_proj", "v_proj", "o_proj"}, {"language_model"}),
        ({"finetune_attention_modules": False}, {"gate_proj", "up_proj", "down_proj"}, {"language_model"}),
        ({"target_modules": ["q_proj", "up_proj"]}, {"q_proj", "up_proj"}, {"language_model"}),
        ({"target_modules": "all-linear"}, NAMES, {"language_model"}),
        ({"target_modules": "all-linear", "layers_to_transform": [1]}, NAMES, {"language_model"}),
        ({"target_modules": r".*visual\.blocks\.0\.attn\.qkv"}, {"qkv"}, {"visual"}),
        ({"finetune_vision_layers": True}, {*NAMES, "qkv", "proj"}, {"language_model", "visual"}),
        (
            {
                "finetune_vision_layers": True,
                "finetune_language_layers": False,
                "finetune_mlp_modules": False,
            },
            {"qkv", "proj"},
            {"visual"},
        ),
    ],
)
def test_where_adapters_go(qwen, asked, names, where):
    model, _ = FastVisionModel.from_pretrained(qwen, **PLAIN)
    found = adapted(FastVisionModel.get_peft_model(model, r=4, **asked))
    assert {name.rsplit(".", 1)[1] for name in found} == names
    assert {"visual" if ".visual." in name else "language_model" for name in found} == where
    if "layers_to_transform" in asked:
        assert all(".layers.1." in name for name in found)
    assert "merger" not in " ".join(found)


def test_layers_are_counted_and_names_are_checked(qwen):
    model, _ = FastVisionModel.from_pretrained(qwen, **PLAIN)
    with pytest.raises(TargetModuleNotFound, match="layer 2"):
        FastVisionModel.get_peft_model(model, layers_to_transform=2, target_modules=["q_proj"])
    with pytest.raises(TargetModuleNotFound, match="no module is left"):
        FastVisionModel.get_peft_model(model, finetune_language_layers=False)
    with pytest.raises(TargetModuleNotFound, match="query"):
        FastVisionModel.get_peft_model(model, target_modules=["query"])
    with pytest.raises(UnknownArgument, match="finetune_vision"):
        FastVisionModel.get_peft_model(model, finetune_vision=True)


def test_four_bits_leave_the_tower_as_it_is(kind, folder):
    pytest.importorskip("bitsandbytes")
    model, _ = FastVisionModel.from_pretrained(folder, load_in_4bit=True, dtype=torch.float32)
    stored = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert len(stored) == 7 * len(binding_of(model).layers)
    assert all(".language_model.layers." in name for name in stored)
    assert "nf4" in binding_of(model).describe()


def test_dynamic_four_bits_are_of_the_language_model(qwen):
    pytest.importorskip("bitsandbytes")
    model, _ = FastVisionModel.from_pretrained(qwen, dynamic_4bit=True, dtype=torch.float32)
    stored = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert stored and all(".language_model.layers." in name for name in stored)


def test_int8_layers_are_those_of_the_language_model(qwen):
    model, _ = FastVisionModel.from_pretrained(qwen, load_in_int8=True, dtype=torch.float32)
    stored = {name for name, module in model.named_modules() if type(module).__name__ == "Int8Linear"}
    assert len(stored) == 14 and all(".language_model.layers." in name for name in stored)


def test_a_text_model_reads_no_images(tmp_path):
    with pytest.raises(UnsupportedCheckpoint, match="reads no images"):
        FastVisionModel.from_pretrained(save_tiny(tmp_path / "text", "qwen2"), **PLAIN)


def test_a_damaged_checkpoint_is_named(qwen, tmp_path):
    (tmp_path / "vl").mkdir()
    for file in qwen.iterdir():
        (tmp_path / "vl" / file.name).write_bytes(
            file.read_bytes()[: 500 if file.suffix == ".safetensors" else None]
        )
    with pytest.raises(CheckpointCorrupt, match=r"model\.safetensors"):
        FastVisionModel.from_pretrained(tmp_path / "vl", **PLAIN)
