"""Uploads to the hub: asked for the right to write first, nothing lost where the network breaks off."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

from pronghorn.errors import ExportDiffers, UploadFailed

logger = logging.getLogger("pronghorn")

_TOKENS = "https://huggingface.co/settings/tokens"
_LOG_IN = (
    f"log in with `hf auth login`, or pass token=...; a token with the right to write is made at {_TOKENS}"
)


def push(
    write: Callable[[str], Any],
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str = "Trained with pronghorn",
) -> str:
    """Write an export into a folder of its own and send that as one commit of a model repository.

    The repository is made, or asked for, before anything is computed, so that a wrong token costs no time. The folder
    is in the working directory, is named after the repository, and is removed once everything has arrived.

    Args:
        write: fills the folder that it is given, which does not exist yet.
        token: None or True: the one of `hf auth login` or HF_TOKEN.
        private: True makes the repository private, and refuses one that is public already.

    Returns:
        the repository's address.

    Raises:
        UploadFailed: without a token or the right to write, or where the network breaks off; the message says where
            everything is and how to go on.
        PronghornError: what `write` raises.
    """
    hub, given = _client(token)
    try:
        address = hub.create_repo(repo_id, private=private, repo_type="model", exist_ok=True)
        refuse = private is True and hub.model_info(address.repo_id).private is False
    except Exception as error:  # of httpx, of the hub and of its validators, by version
        raise _failed(error, repo_id, given, None) from None
    if refuse:
        raise UploadFailed(
            f"{address.repo_id} exists and is public, and private=True does not change that",
            fix="make it private in its settings, or choose another name; nothing was uploaded",
        )
    place = Path.cwd() / f"upload-{uuid4().hex[:8]}"
    folder = place / repo_id.rsplit("/", 1)[-1]
    _write(write, place, folder)
    _clear_card(folder / "README.md")
    try:
        hub.upload_folder(
            repo_id=address.repo_id, folder_path=folder, repo_type="model", commit_message=commit_message
        )
    except KeyboardInterrupt:
        logger.warning("pronghorn: interrupted; %s", _go_on(address.repo_id, folder))
        raise
    except Exception as error:  # as above, and of the client that sends large files
        raise _failed(error, address.repo_id, given, folder) from None
    shutil.rmtree(place)
    return str(address)


def _write(write: Callable[[str], Any], place: Path, folder: Path) -> None:
    """Fill the folder; what failed the gate stays, marked, and what was interrupted goes."""
    try:
        place.mkdir()
        write(str(folder))
    except ExportDiffers:
        raise
    except BaseException as error:
        shutil.rmtree(place, ignore_errors=True)
        if isinstance(error, OSError):
            raise UploadFailed(
                f"the upload cannot be prepared here: {error.strerror or error}",
                where=str(place),
                fix="call it from a folder you may write to",
            ) from error
        raise


def _clear_card(path: Path) -> None:
    """Take a base that is a folder of this machine out of a model card: the hub refuses such a card, and nobody else
    needs to know the path."""
    if not path.is_file():
        return
    from huggingface_hub import ModelCard

    card = ModelCard.load(path)
    base = card.data.base_model
    if not isinstance(base, str) or (base and not Path(base).is_absolute()):
        return
    logger.warning(
        "pronghorn: the adapter's base is not on the hub: others cannot load the adapter by itself"
    )
    card.data.base_model = None
    card.data.tags = [tag for tag in card.data.tags or [] if not tag.startswith("base_model:")]
    card.save(path)


def _client(token: str | bool | None) -> tuple[Any, str | None]:
    """(the hub's client, the token as text).

    Raises:
        UploadFailed: without a token.
    """
    from huggingface_hub import HfApi, get_token

    given = token if isinstance(token, str) and token else None if token is False else get_token()
    if not given:
        raise UploadFailed("there is no token to upload with", fix=_LOG_IN)
    return HfApi(token=given), given


def _failed(error: Exception, repo_id: str, token: str | None, folder: Path | None) -> UploadFailed:
    """What went wrong in one sentence, without the token in it.

    Args:
        folder: where everything is, once it has been written.
    """
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    status = getattr(getattr(error, "response", None), "status_code", None)
    said = " ".join(str(error).split())[:300] or type(error).__name__
    said = said.replace(token, "***") if token else said
    after = f"; then {_go_on(repo_id, folder)}" if folder else ""
    if isinstance(error, HFValidationError):
        return UploadFailed(f"'{repo_id}' is no name for a repository: {said}", fix="use owner/name")
    if isinstance(error, OfflineModeIsEnabled):
        return UploadFailed(
            "this process was told to stay offline (HF_HUB_OFFLINE)",
            fix=f"unset it{after}",
            where=_at(folder),
        )
    if status == 401:
        return UploadFailed("the hub does not accept the token", fix=f"{_LOG_IN}{after}", where=_at(folder))
    if status in (403, 404):
        return UploadFailed(
            f"the token may not write to {repo_id}",
            fix=f"use a token with the right to write there ({_TOKENS}), or a name under your own account{after}",
            where=_at(folder),
        )
    if status is not None or isinstance(error, ValueError):  # of what it was sent
        return UploadFailed(
            f"the hub refused the upload to {repo_id}: {said}",
            fix=f"see what it says{after}" if folder else "see what it says",
            where=_at(folder),
        )
    if folder is None:
        return UploadFailed(
            f"the hub cannot be reached: {type(error).__name__}: {said}",
            fix="check the network; save_pretrained_merged and save_pretrained_gguf need none",
        )
    return UploadFailed(
        f"the upload to {repo_id} broke off: {type(error).__name__}: {said}",
        fix=_go_on(repo_id, folder),
        where=_at(folder),
    )


def _at(folder: Path | None) -> str:
    return str(folder or "")


def _go_on(repo_id: str, folder: Path) -> str:
    return f"everything is in {folder}; go on with `hf upload {repo_id} {folder}`"
