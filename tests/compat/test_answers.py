"""`model.fast_generate` and what goes with it: the same tokens as `model.generate`, through the adapter that is asked
for, and the model as it was afterwards."""

import copy
import gc
import weakref

import pytest
import torch
from datasets import Dataset

from pronghorn.compat.answers import SamplingParams, _times
from pronghorn.compat.models import FastLanguageModel
from pronghorn.errors import DropInUnavailable, UnknownArgument, UploadFailed
from pronghorn.inference import model_generate
from pronghorn.inference.model_generate import EngineGenerate
from pronghorn.loading import saving

GREEDY = SamplingParams(temperature=0, max_tokens=6)
PROMPTS = ["The pronghorn is", "What does it eat?"]


@pytest.fixture
def loaded(tiny):
    """A model whose adapter changes its answers, in training mode."""
    model, tokenizer = FastLanguageModel.from_pretrained(tiny, load_in_4bit=False, fast_inference=True)
    model = FastLanguageModel.get_peft_model(model, r=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
    return model.train(), tokenizer


def by_generate(model, tokenizer, prompt):
    ids = tokenizer(prompt, return_tensors="pt")
    model.eval()
    out = model.generate(**ids, max_new_tokens=6, do_sample=False)[0][ids["input_ids"].shape[1] :]
    model.train()
    return tokenizer.decode(out, skip_special_tokens=True)


def texts(outputs):
    return [output.outputs[0].text for output in outputs]


def test_without_a_request_the_base_answers_and_with_one_its_adapter(loaded, tmp_path):
    model, tokenizer = loaded
    through = [by_generate(model, tokenizer, prompt) for prompt in PROMPTS]
    with model.disable_adapter():
        base = [by_generate(model, tokenizer, prompt) for prompt in PROMPTS]
    assert through != base
    assert texts(model.fast_generate(PROMPTS, sampling_params=GREEDY, lora_request=None)) == base
    model.save_lora(str(tmp_path / "lora"))
    request = model.load_lora(str(tmp_path / "lora"))
    assert texts(model.fast_generate(PROMPTS, GREEDY, lora_request=request)) == through

    # trained on since: the folder's adapter answers, and the model goes on with its own
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.neg_()
    since = [by_generate(model, tokenizer, prompt) for prompt in PROMPTS]
    assert since != through
    assert texts(model.fast_generate(PROMPTS, GREEDY, lora_request=request)) == through
    assert [by_generate(model, tokenizer, prompt) for prompt in PROMPTS] == since
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert model.training and list(model.peft_config) == ["default"]
    assert not isinstance(model.base_model.model.__dict__.get("generate"), EngineGenerate)


def test_one_engine_answers_until_the_model_is_trained(loaded, monkeypatch, tmp_path):
    made = []

    class Counted(model_generate.Engine):
        def __init__(self, *args, **given):
            made.append(weakref.ref(self))
            super().__init__(*args, **given)

    monkeypatch.setattr(model_generate, "Engine", Counted)
    model, _ = loaded
    model.save_lora(str(tmp_path / "lora"))
    request = model.load_lora(str(tmp_path / "lora"))
    before = texts(model.fast_generate(PROMPTS, GREEDY, lora_request=request))
    assert texts(model.fast_generate(PROMPTS, GREEDY, lora_request=request)) == before and len(made) == 1
    # A write that nothing counts, as optimizers' are.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.neg_()
    model.save_lora(str(tmp_path / "since"))
    request = model.load_lora(str(tmp_path / "since"))
    since = texts(model.fast_generate(PROMPTS, GREEDY, lora_request=request))
    assert since != before and len(made) == 1
    model.train()
    gc.collect()
    assert made[0]() is None
    assert texts(model.fast_generate(PROMPTS, GREEDY, lora_request=request)) == since and len(made) == 2
    copied = copy.deepcopy(model)
    assert texts(copied.fast_generate(PROMPTS, GREEDY)) == texts(model.fast_generate(PROMPTS, GREEDY))
    FastLanguageModel.for_inference(model)
    base = model.base_model.model
    assert isinstance(base.__dict__["generate"], EngineGenerate) and "train" not in base.__dict__
    assert base.__dict__["generate"]._engine is made[1]()
    FastLanguageModel.for_training(model)
    gc.collect()
    assert made[1]() is None and "generate" in base.__dict__ and model.training and base.training


def test_a_model_without_an_adapter_answers_through_a_saved_one(loaded, tiny, tmp_path):
    model, _ = loaded
    model.save_lora(str(tmp_path / "lora"))
    plain, _ = FastLanguageModel.from_pretrained(tiny, load_in_4bit=False)
    before = texts(plain.fast_generate(PROMPTS, GREEDY))
    request = plain.load_lora(str(tmp_path / "lora"))
    assert texts(plain.fast_generate(PROMPTS, GREEDY, lora_request=request)) == texts(
        model.fast_generate(PROMPTS, GREEDY, lora_request=model.load_lora(str(tmp_path / "lora")))
    )
    assert texts(plain.fast_generate(PROMPTS, GREEDY)) == before
    with pytest.raises(DropInUnavailable, match="no adapter in 'nowhere'"):
        plain.load_lora("nowhere")


def test_sampling_is_what_the_parameters_say(loaded):
    model, tokenizer = loaded
    sampling = SamplingParams(n=3, temperature=1.0, top_k=-1, min_p=0.01, seed=7, max_tokens=4)
    first, again = (model.fast_generate("Grass", sampling)[0] for _ in range(2))
    assert [answer.text for answer in first.outputs] == [answer.text for answer in again.outputs]
    assert len({tuple(answer.token_ids) for answer in first.outputs}) > 1
    assert first.prompt == "Grass" and first.prompt_token_ids == tokenizer("Grass")["input_ids"]

    answer = model.fast_generate("Grass", SamplingParams(temperature=0, max_tokens=6))[0].outputs[0]
    assert (answer.finish_reason, len(answer.token_ids)) == ("length", 6)
    ended = SamplingParams(temperature=0, max_tokens=6, stop_token_ids=[answer.token_ids[2]])
    stopped = model.fast_generate({"prompt_token_ids": first.prompt_token_ids}, ended)[0].outputs[0]
    first_one = answer.token_ids.index(answer.token_ids[2])
    assert stopped.finish_reason == "stop" and stopped.token_ids == answer.token_ids[: first_one + 1]
    stop = answer.text[-1]
    cut = model.fast_generate("Grass", SamplingParams(temperature=0, max_tokens=6, stop=stop))[0].outputs[0]
    assert (cut.text, cut.stop_reason) == (answer.text.partition(stop)[0], stop)


def test_tensors_go_to_generate_and_what_is_not_followed_is_said(loaded):
    model, tokenizer = loaded
    ids = tokenizer("Grass", return_tensors="pt")
    assert model.fast_generate(**ids, max_new_tokens=2).shape[1] == ids["input_ids"].shape[1] + 2
    with pytest.raises(UnknownArgument, match="presence_penalty"):
        SamplingParams(presence_penalty=0.5)
    with pytest.raises(UnknownArgument, match="prompts of text"):
        model.fast_generate(**ids, sampling_params=GREEDY)


def test_sampling_of_training_comes_from_the_scripts_parameters():
    from pronghorn.compat.preference import GRPOConfig

    sampling = SamplingParams(min_p=0.1, top_p=0.9, top_k=-1, seed=3407)
    args = GRPOConfig("out", vllm_sampling_params=sampling, temperature=0.7, top_p=0.5, report_to="none")
    assert (args.temperature, args.top_p, args.min_p) == (0.7, 0.5, 0.1)
    assert args.top_k in (0, None)


def test_new_tokens_are_whole_and_have_rows(tiny):
    from pronghorn.compat.tokens import add_new_tokens
    from pronghorn.errors import ChatTemplateMismatch

    model, tokenizer = FastLanguageModel.from_pretrained(tiny, load_in_4bit=False)
    known = len(tokenizer)
    mean = model.get_input_embeddings().weight[:known].float().mean(0)
    add_new_tokens(model, tokenizer, new_tokens=["<|one|>", "<|end|>", "<|two|>"])
    ids = tokenizer("<|one|><|two|>", add_special_tokens=False)["input_ids"]
    assert ids == [known, known + 1]
    torch.testing.assert_close(model.get_input_embeddings().weight[known].float(), mean, atol=1e-3, rtol=1e-2)
    adapted = FastLanguageModel.get_peft_model(model, r=4)
    with pytest.raises(ChatTemplateMismatch, match="before get_peft_model"):
        add_new_tokens(adapted, tokenizer, ["<|three|>"])


def test_arguments_of_transformers_loading(tiny):
    from transformers import BitsAndBytesConfig

    model, _ = FastLanguageModel.from_pretrained(
        tiny, torch_dtype=torch.float32, low_cpu_mem_usage=True, offload_embedding=False, device_map="sequential",
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    )  # fmt: skip
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.quant_type == "fp4" and model.dtype == torch.float32
    with pytest.raises(UnknownArgument, match="HF_HOME"):
        FastLanguageModel.from_pretrained(tiny, cache_dir="here")
    with pytest.raises(UnknownArgument, match="qat_scheme='int4'"):
        FastLanguageModel.from_pretrained(tiny, qat_scheme="int4")


def test_four_bits_that_are_forced_are_written_and_what_they_lose_is_said(
    loaded, monkeypatch, caplog, tmp_path
):
    from pronghorn.compat import generation
    from pronghorn.errors import ExportDiffers

    def differs(model, folder, *_, **__):
        error = ExportDiffers("the adapter is lost")
        error.export = folder
        raise error

    monkeypatch.setattr(generation.saving, "save_pretrained_merged", differs)
    model, tokenizer = loaded
    assert model.save_pretrained_merged("four", tokenizer, save_method="merged_4bit_forced") == "four"
    assert "the adapter is lost" in caplog.text
    with pytest.raises(ExportDiffers):
        model.save_pretrained_merged("four", tokenizer, save_method="merged_4bit")
    with pytest.raises(DropInUnavailable, match="torchao"):
        model.save_pretrained_torchao("ao", tokenizer)


def test_a_text_of_the_scripts_own_is_trained_on_rather_than_the_conversation(loaded):
    from pronghorn.compat.arguments import SFTConfig
    from pronghorn.compat.trainer import ScriptTrainer

    model, tokenizer = loaded
    chat = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    rows = Dataset.from_list([{"messages": chat, "text": "my own words"}] * 4)
    args = SFTConfig("out", report_to="none", use_cpu=True)
    trainer = ScriptTrainer(model, args, train_dataset=rows, eval_dataset={"a": rows}, tokenizer=tokenizer)
    for dataset in (trainer.train_dataset, trainer.eval_dataset["a"]):
        assert tokenizer.decode(dataset[0]["input_ids"]).startswith("my own words")


def test_generate_takes_a_configuration_that_only_transformers_follows(loaded):
    from transformers import GenerationConfig

    model, tokenizer = loaded
    FastLanguageModel.for_inference(model)
    config = GenerationConfig(max_new_tokens=2, do_sample=False)
    ids = tokenizer("Grass", return_tensors="pt")
    out = model.generate(**ids, generation_config=config, return_dict_in_generate=True, output_scores=True)
    assert len(out.scores) == 2


@pytest.mark.parametrize("by_ids", [False, True])
def test_the_collator_of_older_versions_masks_by_its_marks(loaded, by_ids):
    from pronghorn.compat.arguments import SFTConfig
    from pronghorn.compat.trainer import DataCollatorForCompletionOnlyLM, ScriptTrainer

    model, tokenizer = loaded
    mark = tokenizer("A:", add_special_tokens=False)["input_ids"] if by_ids else "A:"
    rows = Dataset.from_dict({"text": ["Q: one A: two Q: three A: four"] * 4})
    for instruction, kept in (("Q:", " two  four"), (None, " two Q: three  four")):
        trainer = ScriptTrainer(
            model,
            SFTConfig("out", report_to="none", use_cpu=True),
            DataCollatorForCompletionOnlyLM(mark, instruction, tokenizer=tokenizer, mlm=False),
            rows,
            tokenizer=tokenizer,
        )
        labels = [token for token in trainer.train_dataset[0]["labels"] if token != -100]
        assert tokenizer.decode(labels) == kept + tokenizer.eos_token


def test_patches_of_an_image_stay_in_order_for_several_answers():
    """Some processors give the patches of all images as rows of one tensor."""
    assert _times(torch.tensor([[0], [1], [2]]), 2, 1).flatten().tolist() == [0, 1, 2, 0, 1, 2]
    assert _times(torch.tensor([[5, 6], [7, 8]]), 2, 2).tolist() == [[5, 6], [5, 6], [7, 8], [7, 8]]


def test_saving_that_uploads_asks_for_a_token_and_what_is_misspelt_is_refused(loaded, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    model, tokenizer = loaded
    for save in (model.save_pretrained_merged, model.save_pretrained_gguf):
        with pytest.raises(UploadFailed, match="no token"):
            save("me/model", tokenizer, push_to_hub=True, token="")
        with pytest.raises(UnknownArgument, match="no argument 'tokn'"):
            save("folder", tokenizer, push_to_hub=False, tokn="x")
    model.save_pretrained_merged("plain", tokenizer, push_to_hub=False, token=None, safe_serialization=True)
    assert (tmp_path / "plain" / "model.safetensors").exists()


def test_what_is_uploaded_as_private_stays_private(loaded, monkeypatch):
    model, tokenizer = loaded
    seen = []
    for name in ("push_to_hub_merged", "push_to_hub_gguf"):
        monkeypatch.setattr(saving, name, lambda *given, **named: seen.append(named))
    for save in (model.save_pretrained_merged, model.save_pretrained_gguf):
        save("me/model", tokenizer, push_to_hub=True, token="x", private=True, commit_message="One")
    assert seen == [{"token": "x", "private": True, "commit_message": "One"}] * 2
