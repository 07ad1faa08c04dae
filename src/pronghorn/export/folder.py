"""Write a folder completely or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

from pronghorn.errors import SaveFailed

#: What an earlier export leaves; these never survive a new one, everything else in the folder does.
_OURS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template*",
    "export.failed.txt",
    "quantisation.json",
)

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_MARGIN = 1 << 20  # bytes for configuration files, beside weights and tokenizer


def write_folder(path: str | os.PathLike[str], needed: int, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a temporary sibling of `path`, then put it in place.

    An export that stands there is replaced only once the new one is complete; other files in the folder are kept.
    On any failure the temporary folder is removed and `path` is as it was.

    Args:
        needed: bytes the new files take, about; checked against the free space first.

    Raises:
        SaveFailed: when the disk is full or the folder cannot be written, and for the working directory, which would be
            taken away from under the process.
    """
    target = folder_of(path).resolve()
    if target == Path.cwd() or target in Path.cwd().parents:
        raise SaveFailed(
            "the working directory cannot be replaced", where=str(target), fix="name a folder in it"
        )
    return _write(path, needed, write, _put_in_place)


def write_beside(path: str | os.PathLike[str], needed: int, write: Callable[[Path], None]) -> Path:
    """As `write_folder`, but what stands in the folder stays; only files of the same names are replaced, each by one
    rename once all are complete."""
    return _write(path, needed, write, _put_beside)


def _write(
    path: str | os.PathLike[str],
    needed: int,
    write: Callable[[Path], None],
    put: Callable[[Path, Path], None],
) -> Path:
    target = folder_of(path)
    if target.exists() and not target.is_dir():
        raise SaveFailed("the place to save to is a file", where=str(target), fix="name a folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_space(target, needed)
        temporary = target.parent / f".{target.name}.{uuid4().hex[:8]}.partial"
        temporary.mkdir()
    except OSError as error:
        raise _failed(error, target, needed) from error
    try:
        write(temporary)
        put(temporary, target)
    except Exception as error:
        if (known := _as_os_error(error)) is None:
            raise
        raise _failed(known, target, needed) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def folder_of(path: str | os.PathLike[str]) -> Path:
    """The folder to save to, as an absolute path.

    Raises:
        SaveFailed: for no name at all, which would be the working directory.
    """
    if not os.fspath(path):
        raise SaveFailed("no folder to save to is named", fix="name one")
    return Path(path).expanduser().absolute()


def _as_os_error(error: Exception) -> OSError | None:
    """The failure of a write: tokenizers and safetensors wrap it into exceptions of their own, and numpy leaves its
    number out."""
    if isinstance(error, OSError):
        short = error.errno is None and re.search(r"\d+ requested and \d+ written", str(error))
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if short else error
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


def _put_in_place(temporary: Path, target: Path) -> None:
    """Two renames; between them the old export stands under its temporary name, and comes back if the second fails."""
    if not target.exists():
        os.replace(temporary, target)
        return
    old = target.parent / f"{temporary.name}.old"
    os.replace(target, old)
    try:
        os.replace(temporary, target)
    except OSError:
        os.replace(old, target)
        raise
    for item in list(old.iterdir()):
        if not any(item.match(pattern) for pattern in _OURS) and not (target / item.name).exists():
            os.replace(item, target / item.name)
    shutil.rmtree(old, ignore_errors=True)


def _put_beside(temporary: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for item in sorted(temporary.iterdir()):
        os.replace(item, target / item.name)


def _check_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < needed + _MARGIN:
        raise SaveFailed(
            f"the disk is too full: {needed + _MARGIN:,} bytes are needed, {free:,} are free",
            where=str(target),
            fix="free some space or save to another disk; nothing was written",
        )


def _failed(error: OSError, target: Path, needed: int) -> SaveFailed:
    if error.errno in DISK_FULL:
        free = shutil.disk_usage(target.parent).free
        return SaveFailed(
            f"the disk filled up while saving: {needed + _MARGIN:,} bytes are needed, {free:,} are free",
            where=str(target),
            fix="free some space or save to another disk; what was there before is untouched",
        )
    return SaveFailed(
        f"the folder cannot be written: {error.strerror or error}",
        where=str(target),
        fix="save to a folder you may write to; what was there before is untouched",
    )
