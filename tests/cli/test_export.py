"""`pronghorn export`: a trained adapter as GGUF and as a checkpoint, and what happens when it is not the model."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from pronghorn.cli.export import read_held_out
from pronghorn.cli.main import main
from pronghorn.errors import CommandMisused
from pronghorn.export.gate import Limits
from tests.tiny import save_tiny, tiny_tokenizer

pytest.importorskip("gguf")

IDS = torch.tensor([[1, 17, 90, 33, 250, 7, 30, 12]])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    base = save_tiny(folder / "model", "llama")
    from pronghorn import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(str(base), dtype="float32", load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        expected = model.eval()(input_ids=IDS, use_cache=False).logits
    model.save_pretrained(str(folder / "adapter"))
    tokenizer.save_pretrained(str(folder / "adapter"))
    return folder / "adapter", expected


def reload(folder, name):
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_an_adapter_as_gguf(adapter, tmp_path, capsys):
    command = ["export", str(adapter[0]), "--to", "gguf", "--out", str(tmp_path / "out"), "--json"]
    assert main([*command, "--quantization", "q8_0,f16", "--quantization", "f32"]) == 0
    out = capsys.readouterr().out
    said = json.loads(out.splitlines()[-1])
    assert [file.rsplit("/")[-1] for file in said["files"]] == [
        "out.Q8_0.gguf",
        "out.F16.gguf",
        "out.F32.gguf",
    ]
    assert said["passed"] and all(found["adapted_weights"] == 14 for found in said["checks"])
    assert all(item["divergence"] < 0.02 for found in said["checks"] for item in found["comparisons"])
    assert (tmp_path / "out" / "Modelfile").read_text().startswith("FROM ./out.Q8_0.gguf")
    # The command computes in bf16 where the machine likes it; the adapter's own effect is some units.
    found = reload(tmp_path / "out", "out.F32.gguf")
    torch.testing.assert_close(found, adapter[1], atol=0.05, rtol=0)


@pytest.mark.parametrize("form", ["merged_16bit", "merged_4bit", "fp8", "lora", "gguf_lora"])
def test_other_forms(adapter, tmp_path, capsys, form):
    assert main(["export", str(adapter[0]), "--to", form, "--out", str(tmp_path / "out")]) == 0
    expected = {"lora": "adapter_config.json", "gguf_lora": "out.lora.gguf"}.get(form, "model.safetensors")
    assert (tmp_path / "out" / expected).is_file()
    out = capsys.readouterr().out
    assert ("every tensor is the trained one" in out) if form.endswith("lora") else ("KL" in out)
    assert "14 adapted weights looked for" in out


def test_an_export_that_differs_is_kept_marked_and_the_status_is_not_zero(
    adapter, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("pronghorn.export.gguf.architecture.interleave", lambda tensor, heads: tensor)
    assert main(["export", str(adapter[0]), "--to", "gguf", "--out", str(tmp_path / "out")]) == 2
    assert "PH611" in capsys.readouterr().err
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"out.Q8_0.gguf", "out.Q8_0.gguf.failed.txt"} <= names


def test_a_merged_checkpoint_that_differs(adapter, tmp_path, monkeypatch, capsys):
    from pronghorn.export import checkpoint_gate

    monkeypatch.setitem(checkpoint_gate.LIMITS, "merged_16bit", Limits(-1.0, 0.0))
    command = ["export", str(adapter[0]), "--to", "merged_16bit", "--out", str(tmp_path / "out"), "--json"]
    assert main(command) == 2
    said = capsys.readouterr()
    assert "PH611" in said.err
    report = json.loads(said.out.splitlines()[-1])
    assert not report["passed"] and "at most -1 expected" in report["checks"][0]["problems"][0]
    assert (tmp_path / "out" / "export.failed.txt").is_file()
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_what_does_not_go_together(adapter, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["export", str(adapter[0]), "--to", "lora", "--quantization", "q8_0", "--out", out]) == 2
    assert main(["export", str(adapter[0]), "--to", "gguf", "--quantization", "q9", "--out", out]) == 2
    assert main(["export", str(adapter[0]), "--to", "gguf", "--held-out", "none.txt", "--out", out]) == 2
    error = capsys.readouterr().err
    assert "--to gguf" in error and "'q9' does not exist" in error and "none.txt" in error
    assert not list(tmp_path.iterdir())


def test_held_out_rows(tmp_path):
    lines = tmp_path / "rows.txt"
    lines.write_text("one\n\ntwo\n")
    assert read_held_out(lines, tiny_tokenizer()) == ["one", "two"]
    rows = tmp_path / "rows.jsonl"
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    rows.write_text("\n".join([json.dumps(chat), json.dumps({"text": "plain"}), "no JSON", "[1]"]))
    first, second = read_held_out(rows, tiny_tokenizer())
    assert "<|im_start|>user\nHi" in first and second == "plain"
    sharegpt = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
    alpaca = {"instruction": "Hi", "output": "Ho"}
    rows.write_text("\n".join(map(json.dumps, [sharegpt, alpaca, {"prompt": "Hi", "completion": "Ho"}])))
    of_turns, of_alpaca, of_pair = read_held_out(rows, tiny_tokenizer())
    assert of_turns == of_alpaca == first and of_pair.startswith("HiHo")
    (tmp_path / "rows.csv").write_text("text\none\n")
    assert read_held_out(tmp_path / "rows.csv", tiny_tokenizer()) == ["one"]
    lines.write_bytes(b"caf\xe9")
    with pytest.raises(CommandMisused, match="no text to compare on"):
        read_held_out(lines, tiny_tokenizer())
    rows.write_text("no JSON")
    with pytest.raises(CommandMisused, match="no text to compare on"):
        read_held_out(rows, tiny_tokenizer())
