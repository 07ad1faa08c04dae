"""`pronghorn chat` on a model and on an adapter."""

import pytest

from pronghorn.cli.main import main
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    model_folder = save_tiny(folder / "model", "qwen2")
    from pronghorn import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(model_folder), max_seq_length=64, dtype="float32", load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(model, r=4)
    model.save_pretrained(str(folder / "adapter"))
    tokenizer.save_pretrained(str(folder / "adapter"))
    return folder / "adapter"


def test_one_answer_of_an_adapter_is_repeatable(adapter, capsys):
    command = ["chat", str(adapter), "--prompt", "What does it eat?", "--max-new-tokens", "8"]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert first.strip()
    assert main(command) == 0
    assert capsys.readouterr().out == first


def test_the_adapter_answers_like_its_model_before_training(adapter, capsys):
    outputs = []
    for folder in (adapter, adapter.parent / "model"):
        assert main(["chat", str(folder), "--prompt", "Hello?", "--max-new-tokens", "6"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_conversation_from_a_pipe(adapter, monkeypatch, capsys):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("Hello?\nAnd then?\n"))
    assert main(["chat", str(adapter), "--max-new-tokens", "4"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_a_conversation_that_outgrows_the_context_goes_on_and_says_so(adapter, monkeypatch, capsys):
    import io

    monkeypatch.setattr("pronghorn.cli.chat.CONTEXT", 64)
    asked = ["Hello?", "And then?", "long " * 100, "And what is it that it eats there?", "And now?"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(asked)))
    assert main(["chat", str(adapter), "--max-new-tokens", "8"]) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) >= 4
    too_long, *forgotten = [line for line in said.err.splitlines() if line.startswith("pronghorn:")]
    assert "[PH801]" in too_long and "room for 64" in too_long and "shorter" in too_long
    assert forgotten and all("outgrew the 64 tokens" in line for line in forgotten)
    assert main(["chat", str(adapter), "--prompt", "long " * 100]) == 2
    assert "[PH801]" in capsys.readouterr().err


def test_mistakes(adapter, tmp_path, capsys):
    assert main(["chat", str(adapter), "--prompt", " "]) == 2
    assert "[PH402]" in capsys.readouterr().err
    assert main(["chat", str(tmp_path / "absent"), "--prompt", "Hello?"]) == 2
    assert "[PH101]" in capsys.readouterr().err
    bare = save_tiny(tmp_path / "bare", "llama", chat_template=False)
    assert main(["chat", str(bare), "--prompt", "Hello?"]) == 2
    assert "chat template" in capsys.readouterr().err
