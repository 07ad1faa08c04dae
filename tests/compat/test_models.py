"""Ids, adapters, the embedding's learning rate, uploading, and what is refused."""

import copy
import pickle

import pytest
import torch
from datasets import Dataset

from pronghorn.compat.arguments import SFTConfig, TrainingArguments, UnslothTrainingArguments
from pronghorn.compat.model_ids import Meant, meant_by, redirect
from pronghorn.compat.models import FastLanguageModel, FastModel, FastVisionModel
from pronghorn.compat.trainer import ScriptTrainer, UnslothVisionDataCollator, give_own_rate
from pronghorn.errors import GatedModel, HubUnreachable, TargetModuleNotFound, TokenizerProblem
from pronghorn.loading import fast
from tests.export.hub_server import WRITE, running_hub
from tests.tiny import save_tiny

QUIET = {
    "output_dir": "out", "max_steps": 1, "logging_steps": 1, "report_to": "none", "disable_tqdm": True,
    "save_strategy": "no", "use_cpu": True, "dataloader_pin_memory": False,
}  # fmt: skip


@pytest.mark.parametrize(
    "name,meant",
    [
        ("unsloth/llama-3-8b-bnb-4bit", ("meta-llama/Meta-Llama-3-8B", True)),
        ("unsloth/Meta-Llama-3.1-8B-Instruct-unsloth-bnb-4bit", ("meta-llama/Llama-3.1-8B-Instruct", True)),
        ("unsloth/Llama-3.2-1B-Instruct", ("meta-llama/Llama-3.2-1B-Instruct", False)),
        ("unsloth/Qwen2.5-7B-bnb-4bit", ("Qwen/Qwen2.5-7B", True)),
        ("unsloth/mistral-7b-instruct-v0.3-bnb-4bit", ("mistralai/Mistral-7B-Instruct-v0.3", True)),
        ("unsloth/something-else", ("unsloth/something-else", False)),
        ("Qwen/Qwen3-8B", ("Qwen/Qwen3-8B", False)),
        ("my-bnb-4bit", ("my-bnb-4bit", False)),
    ],
)
def test_ids_lead_to_the_original(name, meant):
    found = meant_by(name)
    assert (found.name, found.four_bit) == meant


def test_a_local_folder_and_a_redirection_win(tmp_path):
    (tmp_path / "unsloth" / "llama-3-8b-bnb-4bit").mkdir(parents=True)
    assert meant_by("unsloth/llama-3-8b-bnb-4bit") == Meant("unsloth/llama-3-8b-bnb-4bit")
    redirect({"unsloth/llama-3-8b-bnb-4bit": "here", "": "there"})
    try:
        assert meant_by("unsloth/llama-3-8b-bnb-4bit") == Meant("here", four_bit=True)
        assert meant_by("unsloth/Qwen3-4B").name == "there"
        assert meant_by("Qwen/Qwen3-4B").name == "Qwen/Qwen3-4B"
    finally:
        redirect({})


def test_what_was_downloaded_before_is_taken(monkeypatch):
    have = {"unsloth/llama-3-8b-bnb-4bit": "/cache/config.json"}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, file: have.get(repo))
    assert meant_by("unsloth/llama-3-8b-bnb-4bit") == Meant("unsloth/llama-3-8b-bnb-4bit")
    assert meant_by("unsloth/llama-3-8b").name == "meta-llama/Meta-Llama-3-8B"


def test_a_gated_original_gives_way_to_the_copy(monkeypatch, tiny):
    asked = []

    def download(source, **_):
        asked.append(source.location)
        if source.location.startswith("meta-llama"):
            raise GatedModel("its terms were not accepted")
        return fast.locate(tiny)

    monkeypatch.setattr(fast, "download", download)
    model, _ = FastLanguageModel.from_pretrained("unsloth/Llama-3.2-1B")
    assert (
        asked == ["meta-llama/Llama-3.2-1B", "unsloth/Llama-3.2-1B"] and model.config.num_hidden_layers == 2
    )

    def offline(source, **_):
        raise HubUnreachable("no network")

    monkeypatch.setattr(fast, "download", offline)
    with pytest.raises(HubUnreachable):
        FastLanguageModel.from_pretrained("unsloth/Llama-3.2-1B")


def test_the_name_says_four_bits_unless_the_script_says_otherwise(tiny):
    redirect({"": tiny})
    try:
        four, _ = FastModel.from_pretrained("unsloth/gemma-2b-bnb-4bit")
        sixteen, _ = FastModel.from_pretrained("unsloth/gemma-2b-bnb-4bit", load_in_4bit=False)
    finally:
        redirect({})
    layers = [type(model.model.layers[0].mlp.up_proj).__name__ for model in (four, sixteen)]
    assert layers == ["Linear4bit", "Linear"]


def test_an_adapter_with_its_model_in_one_call(tiny):
    model, tokenizer = FastModel.get_peft_model(
        model_name=tiny, r=4, max_seq_length=64, load_in_4bit=False, finetune_attention_modules=False
    )
    assert tokenizer.eos_token and model.base_model.model.max_seq_length == 64
    assert set(model.peft_config["default"].target_modules) == {"gate_proj", "up_proj", "down_proj"}
    with pytest.raises(TargetModuleNotFound, match="no module is left"):
        FastModel.get_peft_model(model_name=tiny, finetune_language_layers=False)


def test_a_text_model_is_no_vision_model(tiny):
    """It is loaded and adapted under that name all the same, but no images come into its batches."""
    model, tokenizer = FastVisionModel.from_pretrained(tiny, load_in_4bit=False)
    model = FastVisionModel.get_peft_model(model, r=4)
    assert len(model.peft_config["default"].target_modules) == 7
    with pytest.raises(TokenizerProblem, match="reads no images"):
        UnslothVisionDataCollator(model, tokenizer)
    image = [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]
    with pytest.raises(TokenizerProblem, match="the rows hold images"):
        ScriptTrainer(
            model, UnslothTrainingArguments(**QUIET), train_dataset=[{"messages": image}], tokenizer=tokenizer
        )


def test_embeddings_move_at_their_own_rate(tiny):
    """One SGD step without decay: the change of each weight is its rate times its gradient."""

    def changes(rate):
        model, tokenizer = FastLanguageModel.from_pretrained(tiny, dtype="float32", load_in_4bit=False)
        model = FastLanguageModel.get_peft_model(
            model, r=4, target_modules=["q_proj", "embed_tokens", "lm_head"]
        )
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        args = UnslothTrainingArguments(
            **QUIET, learning_rate=0.1, embedding_learning_rate=rate, optim="sgd", lr_scheduler_type="constant",
            max_grad_norm=0.0,
        )  # fmt: skip
        rows = Dataset.from_list([{"text": "one two three"}] * 4)
        ScriptTrainer(model, args, train_dataset=rows, tokenizer=tokenizer).train()
        after = dict(model.named_parameters())
        return {name: after[name].detach() - old for name, old in before.items()}

    whole, tenth, none = changes(None), changes(0.01), changes(0.0)
    embeddings = [name for name in whole if "embed_tokens" in name or "lm_head" in name]
    assert len(embeddings) == 2 and any("lora_B" in name for name in whole)
    for name, change in whole.items():
        expected = (0.1, 0.0) if name in embeddings else (1.0, 1.0)
        # fp32 weights of size 1 and below: a difference of two is good to about 2^-23.
        torch.testing.assert_close(tenth[name], expected[0] * change, rtol=1e-3, atol=3e-7, msg=name)
        torch.testing.assert_close(none[name], expected[1] * change, rtol=1e-3, atol=3e-7, msg=name)
    assert whole[embeddings[0]].abs().max() > 1e-4


def test_a_rate_without_embeddings_says_so_and_is_given_once(caplog):
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = torch.optim.AdamW(
        [{"params": weights[:2], "weight_decay": 0.5}, {"params": weights[2:]}], lr=1.0
    )
    give_own_rate(optimizer, [], 0.1)
    assert "no effect" in caplog.text and len(optimizer.param_groups) == 2
    give_own_rate(optimizer, weights[:1], 0.1)
    give_own_rate(optimizer, weights[:1], 0.2)
    groups = [(len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert groups == [(1, 1.0, 0.5), (1, 1.0, 0.01), (1, 0.1, 0.5)]


KINDS = [TrainingArguments, SFTConfig, UnslothTrainingArguments]


@pytest.mark.parametrize("kind", KINDS)
def test_use_reentrant_goes_where_transformers_keeps_it(kind):
    assert kind(**QUIET, use_reentrant=True).gradient_checkpointing_kwargs == {"use_reentrant": True}
    both = kind(**QUIET, use_reentrant=False, gradient_checkpointing_kwargs={"debug": True})
    assert both.gradient_checkpointing_kwargs == {"use_reentrant": False, "debug": True}
    assert kind(**QUIET).gradient_checkpointing_kwargs in (None, {})


@pytest.mark.parametrize("kind", KINDS)
def test_older_names_keep_their_meaning(kind, caplog):
    args = kind(
        **QUIET, warmup_ratio=0.25, evaluation_strategy="no", group_by_length=True, overwrite_output_dir=True,
        logging_dir="logs", save_safetensors=True, adafactor=False,
    )  # fmt: skip
    assert args.get_warmup_steps(40) == 10
    assert args.eval_strategy == "no" and args.train_sampling_strategy == "group_by_length"
    assert "adafactor" not in str(args.optim)
    assert caplog.text.count("warmup_ratio= is called warmup_steps= now") == 1
    assert kind(**QUIET, warmup_ratio=0.1, warmup_steps=5).warmup_steps == 5
    assert kind(**QUIET, warmup_ratio=0.1, warmup_steps=0).warmup_steps == 0.1
    assert type(copy.deepcopy(args)) is kind and pickle.loads(pickle.dumps(args)).to_dict() == args.to_dict()
    with pytest.raises(TypeError, match="lerning_rate"):
        kind(**QUIET, lerning_rate=1.0)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in of the hub's HTTP API."""
    with running_hub() as running:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", running.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        yield running


def test_models_of_scripts_are_uploaded(tmp_path, tiny, hub):
    pytest.importorskip("gguf")
    model, tokenizer = FastLanguageModel.from_pretrained(tiny, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=2)
    model.push_to_hub_merged("name", tokenizer, save_method="merged_16bit", token=WRITE, private=True)
    assert hub.private == {"me/name": True}
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= hub.files["me/name"].keys()
    assert not list(tmp_path.glob("upload-*"))  # here nothing stays
    model.save_pretrained_gguf("files", tokenizer, quantization_method="f16")
    assert [path.name for path in (tmp_path / "files").glob("*.gguf")] == ["files.F16.gguf"]
    model.push_to_hub_gguf("me/name", tokenizer, quantization_method="f16", token=WRITE)
    assert len(hub.files["me/name"]["name.F16.gguf"]) > 100_000


def test_generate_takes_what_the_chat_template_gives(tiny):
    """Older scripts hand the result over as input_ids; it was a tensor once."""
    model, tokenizer = FastLanguageModel.from_pretrained(tiny, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=2)
    FastLanguageModel.for_inference(model)
    question = [{"role": "user", "content": "what does it eat?"}]
    encoding = tokenizer.apply_chat_template(
        question, tokenize=True, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    how = {"max_new_tokens": 4, "do_sample": False}
    expected = type(model).generate(model, **encoding, **how)
    given = (encoding, encoding["input_ids"])
    for inputs in given:
        assert torch.equal(model.generate(input_ids=inputs, **how), expected)
        assert torch.equal(model.generate(inputs, **how), expected)
    assert torch.equal(model.generate(**encoding, **how), expected)
    other = copy.deepcopy(model)
    assert other.generate.args[0] is other


def test_a_folder_named_like_the_id_is_loaded(tmp_path, tiny):
    save_tiny(tmp_path / "unsloth" / "Llama-3.2-1B", "llama", num_hidden_layers=1)
    model, _ = FastLanguageModel.from_pretrained("unsloth/Llama-3.2-1B", load_in_4bit=False)
    assert model.config.num_hidden_layers == 1
