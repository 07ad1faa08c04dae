"""Question and answer rows out of documents, written by a local model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from pronghorn.data.synthesis.documents import read_documents
from pronghorn.data.synthesis.run import (
    Progress,
    Synthesis,
    SynthesisResult,
    Written,
    checked_output,
    synthesize_rows,
)
from pronghorn.inference.batch import generate_batch
from pronghorn.inference.chat import load_for_chat
from pronghorn.inference.generate import Sampling


@dataclass(frozen=True)
class ModelWriter:
    """Lets a loaded model answer prompts."""

    model: Any
    tokenizer: Any
    batch_size: int = 8

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        beginning: str = "",
    ) -> list[Written]:
        answers = generate_batch(
            self.model,
            self.tokenizer,
            [[{"role": "user", "content": prompt}] for prompt in prompts],
            Sampling(max_new_tokens=max_new_tokens, temperature=temperature),
            beginning=beginning,
            batch_size=self.batch_size,
            seed=seed,
        )
        return [Written(text, finished) for text, finished in answers]


def synthesize(
    documents: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    model: Any,
    output: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    settings: Synthesis | None = None,
    restart: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    **loading: Any,
) -> SynthesisResult:
    """Let a model ask and answer questions about documents; writes chat rows to a JSON Lines file.

    Args:
        documents: files (.txt, .md, .html, .pdf, .docx) and folders of them.
        model: a folder, a .gguf file or a hub id; or a loaded model with its `tokenizer`.
        settings: see `Synthesis`.
        restart, overwrite, progress: see `pronghorn.data.synthesis.run.synthesize_rows`.
        **loading: for `FastLanguageModel.from_pretrained`, such as load_in_4bit.

    Raises:
        PronghornError: whatever loading the model and `synthesize_rows` raise.
    """
    if isinstance(documents, str | os.PathLike):
        documents = [documents]
    # What is wrong with these is told before a model is loaded.
    read = read_documents(documents)
    checked_output(output, overwrite or restart)
    name = os.fspath(model) if isinstance(model, str | os.PathLike) else ""
    if name:
        model, tokenizer = load_for_chat(name, **{"max_seq_length": None, "load_in_4bit": False, **loading})
    elif tokenizer is None:
        raise TypeError(
            "a loaded model needs its tokenizer: synthesize(documents, model, output, tokenizer=tokenizer)"
        )
    settings = settings or Synthesis()
    if not settings.model:
        settings = replace(settings, model=name or str(getattr(model.config, "name_or_path", "")))

    @cache
    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    writer = ModelWriter(model, tokenizer, settings.batch)
    return synthesize_rows(
        read,
        output,
        writer,
        count_tokens,
        settings,
        restart=restart,
        overwrite=overwrite,
        progress=progress,
    )
