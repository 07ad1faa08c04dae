"""Unknown words of the command name the one that was probably meant."""

import pytest

from pronghorn.cli.main import build_parser, main
from pronghorn.errors import nearest


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["tain", "run.yaml"], "did you mean 'train'?"),
        (["tune", "run.yaml"], "did you mean 'search'?"),
        (["data", "chek", "rows.jsonl"], "did you mean 'check'?"),
        (["train", "run.yaml", "--sett", "a.b=1"], "did you mean '--set'?"),
        (["train", "run.yaml", "--jsn=1"], "did you mean '--json'?"),
        (["export", "model", "--out", "out", "--to", "ggfu"], "did you mean 'gguf'?"),
    ],
)
def test_the_word_that_was_meant(words, meant, capsys):
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args(words)
    assert ended.value.code == 2 and capsys.readouterr().err.rstrip().endswith(meant)


def test_words_unlike_any_are_only_refused(capsys):
    for words in (["zzz"], ["train", "run.yaml", "--zzz"]):
        with pytest.raises(SystemExit):
            build_parser().parse_args(words)
        assert "did you mean" not in capsys.readouterr().err


def test_settings_by_what_they_are_called_elsewhere(tmp_path, capsys):
    assert nearest("lr", ["learning_rate", "seed"]) == "did you mean 'learning_rate'?"
    assert nearest("lr", ["seed"]) == ""
    run = tmp_path / "run.yaml"
    run.write_text("model: {name: tiny}\ndata: {dataset: rows.jsonl}\nadapter: {rank: 8}\n")
    assert main(["train", str(run)]) == 2
    assert "did you mean 'r'?" in capsys.readouterr().err
    for line, fix in (
        ("learning_rate: 1e-4", "write it under 'training', as learning_rate"),
        ("model_name_or_path: tiny", "write it under 'model', as name"),
        ("trainning: {}", "did you mean 'training'?"),
    ):
        run.write_text(f"model: {{name: tiny}}\ndata: {{dataset: rows.jsonl}}\n{line}\n")
        assert main(["train", str(run)]) == 2
        said = capsys.readouterr().err
        assert f"{run}, line 3" in said and fix in said
