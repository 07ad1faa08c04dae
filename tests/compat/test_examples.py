"""Every script in examples/dropin runs through `pronghorn run` on a tiny local model, and does what it says."""

import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from pronghorn import binding_of
from pronghorn.cli.main import main
from pronghorn.compat.script import run_script
from tests.data.chat_tokenizers import chat_tokenizer
from tests.tiny import tiny_model

SCRIPTS = Path(__file__).resolve().parents[2] / "examples" / "dropin"

pytestmark = [
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="the trainer would take the GPU, the tiny model the CPU"
    ),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def run(name, tiny, *arguments):
    """The script's globals; every id under unsloth/ is the tiny model."""
    return run_script(SCRIPTS / f"{name}.py", arguments, {"": tiny})


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def falls(curve):
    return all(math.isfinite(loss) for loss in curve) and sum(curve[-2:]) < sum(curve[:2]) - 0.1


def test_qlora_in_three_parts_and_its_adapter_answers(tiny, capsys):
    seen = run("qlora", tiny)
    assert falls(losses(seen["trainer"]))
    assert seen["trainer_stats"].metrics["train_runtime"] > 0
    assert (
        type(seen["model"].base_model.model.model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"
    )
    assert seen["dataset"][0]["text"].endswith(seen["EOS_TOKEN"])
    assert seen["trainer"].args.lr_scheduler_type == "cosine" and seen["trainer"].args.max_length == 256
    said = capsys.readouterr()
    assert "seconds used for training" in said.out
    assert said.err.count("stands in for unsloth") == 1
    answered = run("inference", tiny, "outputs/dropin/qlora/lora_model")
    assert answered["model"].peft_config and answered["output"].shape[0] == 1


def test_chat_template_trains_on_answers_alone(tiny, capsys):
    seen = run("chat_template", tiny)
    assert "trained on: '7 metres are 700 centimetres.<|im_end|>" in capsys.readouterr().out
    assert falls(losses(seen["trainer"]))
    assert seen["trainer"].args.gradient_checkpointing is False  # the save level does it
    assert seen["tokenizer"].eos_token == "<|im_end|>"


def test_learning_rates_start_alike_and_end_apart(tiny):
    curves = run("learning_rates", tiny)["losses"]
    assert len(curves) == 4
    assert len({round(curve[0], 4) for curve in curves.values()}) == 1
    last = [curve[-1] for curve in curves.values()]
    assert last == sorted(last, reverse=True) and last[0] - last[-1] > 0.3


def test_best_learning_rate_is_found_and_trains(tiny, capsys):
    seen = run("best_learning_rate", tiny)
    assert 1e-5 < seen["best"] < 1 and seen["trainer"].args.learning_rate == seen["best"]
    assert f"best learning rate: {seen['best']:.1e}" in capsys.readouterr().out
    curve = losses(seen["trainer"])
    assert len(curve) == 16 and falls(curve)
    assert Path("outputs/dropin/best_learning_rate/lr_finder.svg").exists()


def test_merge_answers_as_the_adapter_did(tiny):
    seen = run("merge", tiny)
    assert seen["same_answer"] is True
    untrained = AutoModelForCausalLM.from_pretrained(tiny)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(seen["stock"].state_dict()[name], untrained.state_dict()[name])


def test_buckets_are_of_rows_of_like_length(tiny):
    seen = run("buckets", tiny)
    assert sum(seen["counts"].values()) == 64 and len(seen["counts"]) >= 2
    assert all(row["length"] <= row["bucket"] for row in seen["dataset"])
    assert falls(losses(seen["trainer"]))


def test_cleaning_leaves_what_can_be_trained_on(tiny, capsys):
    seen = run("cleaning", tiny)
    assert "54 rows, 44 after cleaning" in capsys.readouterr().out
    assert falls(losses(seen["trainer"]))


def test_inference_streams_an_answer(tiny, capsys):
    seen = run("inference", tiny)
    assert 0 < seen["new_tokens"] <= 24 and not seen["model"].training
    assert re.search(r"\d+ tokens", capsys.readouterr().out)


def test_full_finetuning_gives_the_embeddings_their_own_rate(tiny):
    seen = run("full_finetuning", tiny)
    model, groups = seen["model"], seen["trainer"].optimizer.param_groups
    own = {id(p) for group in groups if group["lr"] == pytest.approx(1e-4) for p in group["params"]}
    assert own == {id(model.model.embed_tokens.weight), id(model.lm_head.weight)}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert falls(losses(seen["trainer"]))


def test_wrong_labels_through_the_command(tiny, capsys):
    assert main(["run", "--model", tiny, str(SCRIPTS / "wrong_labels.py")]) == 0
    said = capsys.readouterr().out
    clean, wrong = re.search(r"([\d.]+) as they are, ([\d.]+) with 5 wrong", said).groups()
    assert float(clean) != float(wrong) and max(float(clean), float(wrong)) < 5.5


def test_vision_trains_saves_and_answers(tmp_path, capsys):
    tiny_vision = pytest.importorskip("tests.tiny_vision")
    seen = run("vision", str(tiny_vision.save_tiny_vision(tmp_path / "vl", "gemma3")))
    assert falls(losses(seen["trainer"]))
    trained = {name for name, p in seen["model"].named_parameters() if p.requires_grad}
    assert trained and all(".language_model." in name for name in trained)
    assert "answer: " in capsys.readouterr().out
    merged = AutoModelForImageTextToText.from_pretrained("outputs/dropin/vision/merged").eval()
    assert torch.equal(merged.generate(**seen["inputs"], max_new_tokens=8), seen["output"])


def test_gemma_learns_its_own_chat_format(tmp_path, capsys):
    tiny_model("gemma3_text", vocab_size=448).save_pretrained(tmp_path / "gemma")
    chat_tokenizer("gemma").save_pretrained(tmp_path / "gemma")
    seen = run("gemma_chat", str(tmp_path / "gemma"))
    assert "trained on: '5 metres are 500 centimetres.<end_of_turn>'" in capsys.readouterr().out
    assert falls(losses(seen["trainer"])) and seen["output"].shape[0] == 1
    assert Path("outputs/dropin/gemma_chat/merged/model.safetensors").exists()


def test_continued_pretraining_moves_embeddings_at_their_own_rate(tiny):
    seen = run("continued_pretraining", tiny)
    assert falls(losses(seen["trainer"])) and len(seen["pieces"]) > 1
    rates = {round(group["initial_lr"], 6) for group in seen["trainer"].optimizer.param_groups}
    assert rates == {5e-3, 5e-4}
    assert seen["trainer"].args.get_warmup_steps(10) == 1


def test_preference_prefers(tiny, capsys):
    seen = run("preference", tiny)
    curve = losses(seen["dpo_trainer"])
    # The reference is the model without its adapter, which begins as that: log 2.
    assert curve[0] == pytest.approx(math.log(2), abs=1e-3) and curve[-1] < curve[0] - 0.05
    assert (seen["dpo_trainer"].args.beta, seen["dpo_trainer"].args.max_length) == (0.1, 128)
    assert Path("outputs/dropin/preference/lora_model/adapter_model.safetensors").exists()
    assert binding_of(seen["model"]).bound


def test_rewards_are_sought(tiny, caplog):
    seen = run("rewards", tiny)
    rewards = [entry["reward"] for entry in seen["trainer"].state.log_history if "reward" in entry]
    assert len(rewards) == 2 and Path("outputs/dropin/rewards/lora_model").is_dir()
    assert "fast_inference=True changes nothing" in caplog.text


def test_ollama_gets_its_files(tiny, capsys):
    pytest.importorskip("gguf")
    run("ollama", tiny)
    folder = Path("outputs/dropin/ollama/model")
    assert {path.name for path in folder.iterdir()} == {"Modelfile", "model.F16.gguf", "model.Q8_0.gguf"}
    assert (folder / "Modelfile").read_text() in capsys.readouterr().out


def test_reasoning_asks_with_vllms_parameters_and_answers_through_the_saved_adapter(tiny, capsys):
    seen = run("reasoning", tiny)
    assert falls(losses(seen["format_trainer"]))
    args = seen["trainer"].args
    assert (args.per_device_train_batch_size, args.use_vllm, args.min_p) == (4, False, 0.1)
    assert any("reward" in entry for entry in seen["trainer"].state.log_history)
    assert seen["before"] != seen["after"] and isinstance(seen["after"], str)
    assert list(seen["model"].peft_config) == ["default"]


def test_a_table_becomes_conversations_of_which_answers_are_learnt(tiny, capsys):
    seen = run("table", tiny)
    ended = seen["tokenizer"].eos_token
    assert seen["dataset"][0]["text"].startswith(
        "Answer in one sentence.\n\n# Question\nConvert metres to centimetres.\nThe quantity is:\n2 metres\n\n"
        f"# Answer\n2 metres are 200 centimetres.{ended}\n\n# Question\n"
    )
    answers = [turn["content"] for turn in seen["dataset"][0]["conversations"] if turn["role"] == "assistant"]
    assert [part.strip() for part in seen["learnt"].split(ended)] == [*answers, ""]
    assert falls(losses(seen["trainer"])) and seen["output"].shape[0] == 1


def test_codes_are_learnt_and_the_run_goes_on_from_its_checkpoint(tiny, capsys):
    seen = run("codes", tiny)
    curve = losses(seen["trainer"])
    assert len(curve) == 8 and falls(curve)  # four of them before the checkpoint
    assert len(seen["tokenizer"]("<code_3></speech>", add_special_tokens=False)["input_ids"]) == 2
    moved = seen["again"].get_input_embeddings().weight
    assert torch.equal(moved, seen["model"].get_input_embeddings().weight)


def test_every_script_is_run_here():
    """make_rows.py only writes the rows, which are those in the repository."""
    here = Path(__file__).read_text()
    names = {path.stem for path in SCRIPTS.glob("*.py")} - {"make_rows"}
    assert len(names) == 19
    assert all(f'"{name}"' in here or f"{name}.py" in here for name in names)
