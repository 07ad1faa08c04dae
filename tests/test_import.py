"""`import pronghorn` is free, and nothing global is ever patched."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _run(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ok" in done.stdout


def test_import_loads_nothing():
    _run(
        """
import sys
sys.path[:0] = ["src"]
import pronghorn
assert "FastLanguageModel" in dir(pronghorn) and "SFTTrainer" in dir(pronghorn)
heavy = [name for name in ("torch", "transformers", "trl", "peft", "triton", "bitsandbytes", "datasets", "numpy")
         if name in sys.modules]
assert not heavy, heavy
assert pronghorn.__version__ and issubclass(pronghorn.PronghornError, Exception)
try:
    pronghorn.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise AssertionError
print("ok")
"""
    )


def test_loading_a_model_does_not_import_what_training_needs():
    _run(
        """
import sys
sys.path[:0] = ["src"]
from pronghorn import FastLanguageModel
heavy = ["accelerate", "bitsandbytes", "datasets", "gguf", "matplotlib", "pandas", "peft", "pyarrow", "rich", "scipy",
         "sklearn", "sympy", "tensorboard", "torch._dynamo", "torch._inductor", "torchvision",
         "transformers.modeling_utils", "transformers.trainer", "triton", "trl"]
ours = ["data.checks", "data.reading", "export.gguf", "export.hub", "quantising.dynamic", "training", "tuning"]
found = [name for name in [*heavy, *(f"pronghorn.{name}" for name in ours)] if name in sys.modules]
assert not found, found
print("ok")
"""
    )


def test_every_public_name_is_there_and_the_version_agrees_with_the_package():
    import tomllib

    import pronghorn

    for name in pronghorn.__all__:
        assert getattr(pronghorn, name) is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == pronghorn.__version__


def test_nothing_global_changes_when_a_model_is_bound_and_adapted():
    _run(
        """
import sys
sys.path[:0] = ["src", "."]
import torch, transformers, peft, trl
from transformers.models.llama import modeling_llama
from transformers import modeling_utils
from peft.tuners.lora import layer as lora_layer
from peft import peft_model
from trl.trainer import sft_trainer

MODULES = [modeling_llama, modeling_utils, lora_layer, peft_model, sft_trainer, torch.nn, torch.nn.functional]

def snapshot():
    seen = {}
    for module in MODULES:
        for name, value in vars(module).items():
            seen[module.__name__, name] = id(value)
            if isinstance(value, type):
                for member, function in vars(value).items():
                    # ABCs and dataclasses fill their caches when they are used; functions stay.
                    if callable(function) or isinstance(function, (staticmethod, classmethod, property)):
                        seen[module.__name__, name, member] = id(function)
    return seen

def changed(before):
    after = snapshot()
    return sorted(str(key) for key in before.keys() | after.keys() if before.get(key) != after.get(key)
                  and not (len(key) == 2 and key[1].startswith("__")))

from tests.tiny import tiny_model
peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))  # what they do themselves
before = snapshot()
import pronghorn.engine, pronghorn.loading, pronghorn.export
assert not changed(before), changed(before)

from pronghorn import FastLanguageModel, bind
model = tiny_model("llama")
bind(model)
model = FastLanguageModel.get_peft_model(model, r=2)
model.train()
ids = torch.randint(5, 300, (1, 12))
model(input_ids=ids, labels=ids).loss.backward()
assert not changed(before), changed(before)
print("ok")
"""
    )
