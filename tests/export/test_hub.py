"""Uploads against a stand-in of the hub's HTTP API: what arrives, and what is said where it does not."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pronghorn.errors import ExportDiffers, UnknownArgument, UploadFailed
from pronghorn.export.gate import Limits
from pronghorn.loading import FastLanguageModel
from tests.export.hub_server import READ, WRITE, running_hub
from tests.export.test_merged import logits, trained
from tests.tiny import save_tiny


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running_hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's retries
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        yield running


@pytest.fixture
def model(tmp_path):
    path = save_tiny(tmp_path / "base", "llama")
    model, tokenizer = FastLanguageModel.from_pretrained(str(path), dtype="float32", load_in_4bit=False)
    return trained(model), tokenizer


def fetched(hub, name, folder):
    folder.mkdir()
    for file, data in hub.files[name].items():
        (folder / file).write_bytes(data)
    return folder


def test_a_merged_model(hub, model, tmp_path):
    live, tokenizer = model
    address = live.push_to_hub_merged(
        "me/animal", tokenizer, token=WRITE, private=True, commit_message="Second try"
    )
    assert address == f"{hub.url}/me/animal" and hub.private == {"me/animal": True}
    assert hub.messages == ["Second try"]
    names = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
    }
    assert names <= hub.files["me/animal"].keys()
    again = AutoModelForCausalLM.from_pretrained(fetched(hub, "me/animal", tmp_path / "back"))
    torch.testing.assert_close(logits(again), logits(live), atol=1e-5, rtol=1e-5)
    assert not list(Path.cwd().iterdir())  # here nothing stays


def test_an_adapter_does_not_tell_where_its_base_lies(hub, model, tmp_path):
    live, tokenizer = model
    live.push_to_hub("animal", tokenizer, token=WRITE)
    files = hub.files["me/animal"]
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= files.keys()
    assert str(tmp_path).encode() not in files["README.md"]
    back = load_file(fetched(hub, "me/animal", tmp_path / "back") / "adapter_model.safetensors")
    assert len(back) == 28 and hub.private["me/animal"] is False


def test_a_model_without_adapter_is_uploaded_whole(hub, tmp_path):
    path = save_tiny(tmp_path / "base", "qwen2")
    model, _ = FastLanguageModel.from_pretrained(str(path), dtype="float32", load_in_4bit=False)
    model.push_to_hub("me/whole", token=WRITE)
    assert {"model.safetensors", "tokenizer.json"} <= hub.files["me/whole"].keys()


def test_gguf_in_several_formats(hub, model):
    live, tokenizer = model
    live.push_to_hub_gguf("me/animal", tokenizer, ["q8_0", "f16"], token=WRITE)
    assert {"animal.Q8_0.gguf", "animal.F16.gguf", "Modelfile"} == hub.files["me/animal"].keys()


@pytest.mark.parametrize(
    "token, message",
    [
        (None, "there is no token"),
        (False, "there is no token"),
        ("", "there is no token"),
        ("hf_wrong_987654321", "does not accept the token"),
        (READ, "may not write to me/animal"),
    ],
)
def test_a_token_that_does_not_do_is_one_clear_error_before_anything_is_computed(
    hub, model, caplog, token, message
):
    live, tokenizer = model
    with caplog.at_level(logging.DEBUG), pytest.raises(UploadFailed, match=message) as raised:
        live.push_to_hub_merged("me/animal", tokenizer, token=token)
    assert raised.value.code == "PH606" and not list(Path.cwd().iterdir())
    assert raised.value.__cause__ is None  # no pages of other libraries' errors
    for text in (str(raised.value), caplog.text):
        assert not token or token not in text


def test_a_connection_that_breaks_off_loses_nothing_and_can_be_gone_on_with(hub, model, caplog, tmp_path):
    live, tokenizer = model
    hub.breaks = 1000
    with caplog.at_level(logging.DEBUG), pytest.raises(UploadFailed, match="broke off") as raised:
        live.push_to_hub_merged("me/animal", tokenizer, token=WRITE)
    said = re.search(r"go on with `hf upload me/animal (\S+)`", str(raised.value))
    folder = Path(said[1])
    assert folder.name == "animal" and WRITE not in str(raised.value) + caplog.text
    again = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(again), logits(live), atol=1e-5, rtol=1e-5)
    assert not hub.files["me/animal"]
    hub.breaks = 0
    from huggingface_hub import HfApi

    HfApi(token=WRITE).upload_folder(repo_id="me/animal", folder_path=folder)  # what the command does
    assert "model.safetensors" in hub.files["me/animal"]


def test_one_broken_connection_is_tried_again(hub, model):
    live, tokenizer = model
    hub.breaks = 1
    live.push_to_hub("me/animal", tokenizer, token=WRITE)
    assert "adapter_model.safetensors" in hub.files["me/animal"]


def test_the_token_is_not_in_what_the_hub_says(hub, model, caplog):
    live, tokenizer = model
    hub.refuses = 400
    with caplog.at_level(logging.DEBUG), pytest.raises(UploadFailed, match="refused the upload") as raised:
        live.push_to_hub("me/animal", tokenizer, token=WRITE)
    assert WRITE not in str(raised.value) + caplog.text
    assert (Path(raised.value.where) / "adapter_model.safetensors").is_file()


def test_no_hub_at_all(hub, model, monkeypatch):
    live, tokenizer = model
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UploadFailed, match=r"cannot be reached.*save_pretrained_merged"):
        live.push_to_hub_gguf("me/animal", tokenizer, token=WRITE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UploadFailed, match=r"cannot be reached|stay offline"):
        live.push_to_hub("me/animal", tokenizer, token=WRITE)
    assert not list(Path.cwd().iterdir())


def test_private_is_not_taken_for_granted(hub, model):
    live, tokenizer = model
    hub.private["me/open"], hub.files["me/open"] = False, {}
    with pytest.raises(UploadFailed, match="me/open exists and is public"):
        live.push_to_hub("me/open", tokenizer, token=WRITE, private=True)
    assert not hub.files["me/open"] and not list(Path.cwd().iterdir())
    live.push_to_hub("me/open", tokenizer, token=WRITE)  # as it is
    assert "adapter_model.safetensors" in hub.files["me/open"]


def test_what_fails_the_gate_is_not_uploaded_and_kept(hub, model, monkeypatch):
    from pronghorn.export import checkpoint_gate

    monkeypatch.setitem(checkpoint_gate.LIMITS, "merged_16bit", Limits(-1.0, 0.0))
    live, tokenizer = model
    with pytest.raises(ExportDiffers) as raised:
        live.push_to_hub_merged("me/animal", tokenizer, token=WRITE)
    assert not hub.files["me/animal"]
    assert (Path(raised.value.where) / "export.failed.txt").is_file()


def test_wrong_arguments(hub, model):
    live, tokenizer = model
    with pytest.raises(UnknownArgument, match="did you mean 'private'"):
        live.push_to_hub_merged("me/animal", tokenizer, token=WRITE, privat=True)
    with pytest.raises(UnknownArgument, match="did you mean 'merged_16bit'"):
        live.push_to_hub_merged("me/animal", tokenizer, "merged_16bits", token=WRITE)
    with pytest.raises(UploadFailed, match=r"no name for a repository"):
        live.push_to_hub("me/ani/mal", tokenizer, token=WRITE)
    live.push_to_hub("me/animal", tokenizer, token=WRITE, safe_serialization=True, tags=["x"])
    assert json.loads(hub.files["me/animal"]["adapter_config.json"])["r"] == 4
