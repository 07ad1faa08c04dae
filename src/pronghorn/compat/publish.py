"""Methods that scripts call on a model to upload it: each lives on the instance, no class is touched."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any


def add_publishing(model: Any) -> None:
    """`push_to_hub_merged` and `push_to_hub_gguf`, beside the library's own `save_pretrained_merged` and `_gguf`."""
    for name, function in (
        ("push_to_hub_merged", push_to_hub_merged),
        ("push_to_hub_gguf", push_to_hub_gguf),
    ):
        if name not in model.__dict__:
            model.__dict__[name] = partial(function, model)


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
    with _folder_for(repo_id) as folder:
        model.save_pretrained_merged(str(folder), tokenizer, save_method=save_method)
        return upload(folder, repo_id, token=token, private=private, commit_message=commit_message)


def push_to_hub_gguf(
    model: Any,
    repo_id: str,
    tokenizer: Any = None,
    quantization_method: str | list[str] = "fast_quantized",
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str = "Trained with pronghorn",
    **_: Any,
) -> str:
    """Write GGUF files into a temporary folder and upload them; returns the repository's address."""
    with _folder_for(repo_id) as folder:
        model.save_pretrained_gguf(str(folder), tokenizer, quantization_method=quantization_method)
        return upload(folder, repo_id, token=token, private=private, commit_message=commit_message)


@contextmanager
def _folder_for(repo_id: str) -> Iterator[Path]:
    """An empty folder of the repository's name, on the disk that is worked on, and removed in the end."""
    with tempfile.TemporaryDirectory(prefix="upload-", dir=Path.cwd()) as folder:
        yield Path(folder) / repo_id.rsplit("/", 1)[-1]


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
