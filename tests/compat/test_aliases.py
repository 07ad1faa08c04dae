"""Who sees which library, during a script, in a notebook and afterwards."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from pronghorn.cli.main import main
from pronghorn.compat.aliases import DropIn, is_active
from pronghorn.compat.names import MODULES, REPLACED
from pronghorn.compat.script import run_script
from pronghorn.errors import CommandMisused, NotInDropIn, PronghornError

ROOT = Path(__file__).resolve().parents[2]


def script(folder, text, name="script.py"):
    path = folder / name
    path.write_text(text)
    return path


def process(code, cwd, *paths):
    environment = {"PYTHONPATH": ":".join([*map(str, paths), str(ROOT / "src")]), "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, timeout=240, check=False,
        env=environment,
    )  # fmt: skip


def test_a_script_and_its_own_modules_see_ours_and_libraries_the_real_one(tmp_path):
    script(tmp_path, "from trl import SFTTrainer\nimport trl\nvia = trl.SFTConfig\n", "helper.py")
    seen = run_script(
        script(
            tmp_path,
            "import trl, transformers\n"
            "from trl import SFTTrainer, SFTConfig, RLOOTrainer\n"
            "from transformers import TrainingArguments, AutoTokenizer\n"
            "import transformers.models.llama.modeling_llama as modeling\n"
            "import trl.trainer.sft_trainer as inside\n"
            "import helper\n"
            "from pronghorn.training import rows as ours\n"
            "library = ours.trl.SFTTrainer if ours.trl is not trl else None\n"
            "from unsloth import UnslothTrainer\n",
        )
    )
    import transformers
    import trl

    from pronghorn.compat.arguments import SFTConfig, TrainingArguments
    from pronghorn.compat.trainer import ScriptTrainer

    assert seen["SFTTrainer"] is ScriptTrainer is seen["UnslothTrainer"] is seen["helper"].SFTTrainer
    assert seen["SFTConfig"] is SFTConfig is seen["helper"].via
    assert seen["RLOOTrainer"] is trl.RLOOTrainer and seen["AutoTokenizer"] is transformers.AutoTokenizer
    assert seen["TrainingArguments"] is TrainingArguments
    assert seen["library"] is trl.SFTTrainer is seen["inside"].SFTTrainer
    assert trl.SFTTrainer is not ScriptTrainer and seen["modeling"].LlamaModel is transformers.LlamaModel


def test_a_library_that_asks_during_a_script_gets_the_real_one(tmp_path, monkeypatch):
    """A package in site-packages, imported by the script for the first time."""
    packages = tmp_path / "site-packages"
    packages.mkdir()
    (packages / "installed_one.py").write_text("from trl import SFTTrainer\nimport transformers\n")
    monkeypatch.syspath_prepend(str(packages))
    from pronghorn.compat import aliases

    monkeypatch.setattr(aliases, "_PACKAGES", (f"{packages}/",))
    with DropIn():
        import installed_one
        import trl

        from_test = trl.SFTTrainer
    import trl as real

    assert installed_one.SFTTrainer is real.SFTTrainer
    assert from_test is not real.SFTTrainer  # this file is nobody's package


def test_everything_is_taken_back(tmp_path):
    import transformers
    import trl

    before = sys.modules["trl"], sys.modules["transformers"], list(sys.meta_path), list(sys.path), sys.argv
    written = {name: id(value) for name, value in vars(trl).items()}
    run_script(
        script(tmp_path, "import sys\nassert sys.argv[1:] == ['--lr', '1']\nimport unsloth\n"), ["--lr", "1"]
    )
    with pytest.raises(ZeroDivisionError):
        run_script(script(tmp_path, "from unsloth import FastModel\n1 / 0\n"))
    assert before == (trl, transformers, list(sys.meta_path), list(sys.path), sys.argv)
    assert not is_active() and not any(name.startswith("unsloth") for name in sys.modules)
    assert {name: id(vars(trl)[name]) for name in written} == written


def test_a_script_that_asks_itself_keeps_the_commands_models(tmp_path, tiny):
    text = (
        "import pronghorn.compat.unsloth\n"
        "from unsloth import FastLanguageModel\n"
        "model, _ = FastLanguageModel.from_pretrained('unsloth/Qwen3-4B', load_in_4bit=False)\n"
    )
    seen = run_script(script(tmp_path, text), [], {"": tiny})
    assert seen["model"].config.hidden_size == 64 and not is_active()


def test_every_name_resolves():
    from importlib import import_module

    with DropIn():
        for module, names in {**MODULES, **REPLACED}.items():
            for name in names:
                assert getattr(import_module(module), name) is not None
        import unsloth
        import unsloth.kernels

        from pronghorn.kernels import fast_linear_forward

        assert unsloth.kernels.fast_linear_forward is fast_linear_forward
        assert set(MODULES["unsloth"]) <= set(dir(unsloth))


def test_what_has_no_counterpart_is_said():
    with DropIn():
        with pytest.raises(NotInDropIn, match=r"PH405.*did you mean 'FastLanguageModel'"):
            from unsloth import FastLanguageModels  # noqa: F401
        with pytest.raises(NotInDropIn, match=r"unsloth\.dataprep has no counterpart"):
            import unsloth.dataprep  # noqa: F401
        with pytest.raises(ImportError):  # what scripts catch
            from unsloth import FastSentenceTransformer  # noqa: F401


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm itself is found then")
def test_vllm_is_there_for_the_script_alone(tmp_path):
    from trl.import_utils import is_vllm_available

    text = "import vllm\nfrom vllm import SamplingParams\nfrom trl.import_utils import is_vllm_available\n"
    seen = run_script(script(tmp_path, text + "found = is_vllm_available()\n"))
    assert seen["SamplingParams"]().max_tokens == 16 and seen["found"] is False
    assert "vllm" not in sys.modules and not is_vllm_available()


def test_in_a_notebook_beside_an_installed_unsloth(tmp_path):
    """The fake one would end the process if it were imported; a cell has no file."""
    (tmp_path / "unsloth").mkdir()
    (tmp_path / "unsloth" / "__init__.py").write_text("raise SystemExit('the real one was imported')")
    meta = tmp_path / "unsloth-2026.1.2.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: unsloth\nVersion: 2026.1.2\n")
    done = process(
        "import pronghorn.compat.unsloth\n"
        "import pronghorn.compat.unsloth as again\n"
        "from unsloth import FastLanguageModel\n"
        "from unsloth.chat_templates import train_on_responses_only\n"
        "from trl import SFTTrainer, SFTConfig\n"
        "import trl.trainer.sft_trainer as real\n"
        "assert again.FastLanguageModel is FastLanguageModel\n"
        "assert SFTTrainer.__module__.startswith('pronghorn') and issubclass(SFTTrainer, real.SFTTrainer)\n"
        "print('ok')\n",
        tmp_path,
        tmp_path,
    )
    assert done.returncode == 0 and "ok" in done.stdout, done.stderr[-2000:]
    assert done.stderr.count("stands in for unsloth; the installed unsloth 2026.1.2 is not used") == 1


def test_a_loaded_unsloth_is_refused(monkeypatch):
    from types import ModuleType

    monkeypatch.setitem(sys.modules, "unsloth", ModuleType("unsloth"))
    with pytest.raises(PronghornError, match=r"PH406.*itself is loaded"):
        DropIn().start()
    assert not is_active()


def test_the_command_tells_the_scripts_line_and_its_status(tmp_path, capsys):
    wrong = script(tmp_path, "import unsloth\n\nunsloth.FastLanguageModel.from_pretrained('./nowhere')\n")
    assert main(["run", str(wrong)]) == 2
    said = capsys.readouterr().err
    assert f"pronghorn: {wrong}, line 3: [PH101]" in said and "Traceback" not in said
    broken = script(tmp_path, "x = {}\nx['key']\n", "broken.py")
    assert main(["run", str(broken)]) == 1
    said = capsys.readouterr().err
    assert "KeyError: 'key'" in said and "line 2" in said and "runpy" not in said
    older = script(tmp_path, "from trl import PPOTrainerOfOld\n", "older.py")
    assert main(["run", str(older)]) == 2
    assert "[PH405] cannot import name 'PPOTrainerOfOld'" in capsys.readouterr().err
    if find_spec("vllm") is None:
        assert main(["run", str(script(tmp_path, "from vllm import LLM\n", "vllm_one.py"))]) == 2
        assert "[PH405] vllm.LLM has no counterpart" in capsys.readouterr().err
        assert main(["run", str(script(tmp_path, "import vllm.engine\n", "vllm_two.py"))]) == 2
        assert "[PH406] the script imports vllm" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["run", str(script(tmp_path, "import sys\nsys.exit(7)\n", "ends.py"))])
    assert ended.value.code == 7
    assert main(["run", "nowhere.py"]) == 2
    assert "PH402" in capsys.readouterr().err
    assert main(["run", "--model", "unsloth/x=", str(broken)]) == 2


def test_no_script_is_no_run(tmp_path):
    with pytest.raises(CommandMisused, match="there is no script"):
        run_script(tmp_path / "nothing.py")
