"""Methods that scripts call on a model to write or upload it: each lives on the instance, no class is touched."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pronghorn.errors import DropInUnavailable


def add_publishing(model: Any) -> None:
    """`save_pretrained_gguf`, `push_to_hub_merged` and `push_to_hub_gguf`, where the library has not put its own."""
    for name, function in (
        ("save_pretrained_gguf", save_pretrained_gguf),
        ("push_to_hub_merged", push_to_hub_merged),
        ("push_to_hub_gguf", push_to_hub_gguf),
    ):
        if name not in model.__dict__:
            model.__dict__[name] = partial(function, model)


def save_pretrained_gguf(
    model: Any,
    save_directory: str,
    tokenizer: Any = None,
    quantization_method: str | list[str] = "q8_0",
    **_: Any,
) -> Any:
    """Write a GGUF file through `pronghorn.export.save_gguf`.

    Raises:
        DropInUnavailable: this version of the library does not write GGUF.
    """
    from pronghorn import export

    writer: Callable[..., Any] | None = getattr(export, "save_gguf", None)
    if writer is None:
        raise DropInUnavailable(
            "save_pretrained_gguf: this version of pronghorn does not write GGUF files",
            fix="model.save_pretrained_merged(folder, tokenizer), then llama.cpp's convert_hf_to_gguf.py",
        )
    return writer(model, tokenizer, save_directory, quantization_method)


def push_to_hub_merged(
    model: Any,
    repo_id: str,
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str = "Trained with pronghorn",
    **_: Any,
) -> str:
    """Merge into a temporary folder and upload it; returns the repository's address."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained_merged(folder, tokenizer, save_method=save_method)
        return upload(folder, repo_id, token=token, private=private, commit_message=commit_message)


def push_to_hub_gguf(
    model: Any,
    repo_id: str,
    tokenizer: Any = None,
    quantization_method: str | list[str] = "q8_0",
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str = "Trained with pronghorn",
    **_: Any,
) -> str:
    """Write GGUF files into a temporary folder and upload them; returns the repository's address."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained_gguf(folder, tokenizer, quantization_method=quantization_method)
        return upload(folder, repo_id, token=token, private=private, commit_message=commit_message)


def upload(
    folder: str | Path, repo_id: str, *, token: str | bool | None, private: bool | None, commit_message: str
) -> str:
    """Everything in a folder as one commit of a model repository, which is made where there is none."""
    from huggingface_hub import HfApi

    hub = HfApi(token=token)
    address = hub.create_repo(repo_id, private=private, repo_type="model", exist_ok=True)
    hub.upload_folder(
        repo_id=address.repo_id, folder_path=str(folder), repo_type="model", commit_message=commit_message
    )
    return str(address)
