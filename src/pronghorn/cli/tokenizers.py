"""The tokenizer that a name on the command line means, without the model's weights where it has files of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pronghorn.cli.models import resolve_model


def tokenizer_named(name: str) -> Any:
    """The tokenizer of a model folder, a folder of tokenizer files, an adapter, a .gguf file or a hub id.

    Raises:
        ModelNotFound: there is nothing of that name.
        TokenizerProblem: it has no tokenizer, or a damaged one.
    """
    from pronghorn.loading.hub import download
    from pronghorn.loading.source import Source, base_of_adapter, locate
    from pronghorn.loading.tokenizer import has_tokenizer, load_tokenizer

    path = Path(name).expanduser()
    if path.is_dir() and has_tokenizer(Source("folder", str(path))):
        return load_tokenizer(Source("folder", str(path)))
    source = locate(resolve_model(name))
    if source.kind == "adapter":
        source = base_of_adapter(source)
    if not source.is_local:
        source = download(source, token=None, trust_remote_code=False)
    return load_tokenizer(source)
