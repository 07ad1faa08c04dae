"""The folder a command leaves its results in, checked before the work starts."""

from __future__ import annotations

import os
from pathlib import Path

from pronghorn.errors import CommandMisused


def output_folder(name: str, option: str) -> Path:
    """``name`` as an existing folder that can be written to; ``option`` is what the user changes.

    Raises:
        CommandMisused: it is a file, or cannot be made or written.
    """
    folder = Path(name).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "a file stands there" if isinstance(error, FileExistsError) else str(error.strerror).lower()
        raise CommandMisused(
            f"the output folder cannot be made: {reason}", where=name, fix=f"name another with {option}"
        ) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CommandMisused(
            "the output folder cannot be written to", where=name, fix=f"name another with {option}"
        )
    return folder
