"""Bring a hub repository onto this machine, so that it is checked and loaded like any local folder."""

from __future__ import annotations

from pathlib import Path

from pronghorn.errors import GatedModel, HubUnreachable, ModelNotFound, nearest
from pronghorn.loading.source import Source, locate

_SMALL = ["*.json", "*.jinja", "*.txt", "*.model", "tokenizer*"]
_WEIGHTS = ["model*.safetensors", "adapter_model.safetensors"]
_CODE = ["*.py"]


def download(source: Source, *, token: str | bool | None, trust_remote_code: bool) -> Source:
    """The local copy of a hub repository: configuration, tokenizer, safetensors or one GGUF file; never pickles.

    Raises:
        ModelNotFound: for an unknown or private repository.
        GatedModel: for one whose terms were not accepted.
        HubUnreachable: without a network, for one that is not in the cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    weights = [source.gguf_file] if source.gguf_file else _WEIGHTS
    try:
        folder = snapshot_download(
            source.location,
            revision=source.revision,
            token=token,
            allow_patterns=_SMALL + weights + (_CODE if trust_remote_code else []),
            ignore_patterns=["original/*", "onnx/*", "openvino/*"],
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise _not_found(source, error) from error
    except RuntimeError as error:  # httpx' connection errors, depending on the client's version
        raise _not_found(source, error) from error
    return locate(folder, gguf_file=source.gguf_file)


def _not_found(source: Source, error: Exception) -> ModelNotFound:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError

    first_line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    here = [p.name for p in Path.cwd().iterdir() if p.is_dir()]
    said = f"'{source.location}' is no local folder and the hub did not give it: {first_line.strip()}"
    if isinstance(error, GatedRepoError):
        return GatedModel(
            said,
            fix=f"accept its terms at https://huggingface.co/{source.location}, then `hf auth login` or token=...",
        )
    fix = nearest(source.location, here)
    if not isinstance(error, (HfHubHTTPError, HFValidationError)):
        return HubUnreachable(
            said,
            fix=fix
            or "check the network, or give a local folder (`hf download` on another machine makes one)",
        )
    return ModelNotFound(
        said,
        fix=fix
        or "check the name; for a private or gated model pass token=...; without a network give a local folder",
    )
