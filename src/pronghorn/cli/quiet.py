"""Keeps the output of a command to what it says itself. Called by commands alone, never by the library."""

from __future__ import annotations

import logging
import os
import warnings

from pronghorn.importing import collector_paused


def quiet_libraries() -> None:
    """Hide progress bars, deprecations and notes of the libraries underneath; their errors still show."""
    # Read by tqdm when it is imported; Transformers' GGUF reader has no other switch.
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    # bitsandbytes reports an optional CPU kernel that it could not download.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with collector_paused():
        import datasets
        from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # Importing these sets their levels. The hub's client reports each of its retries; datasets logs a file it cannot
    # read before it raises, and what it raises is explained.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
