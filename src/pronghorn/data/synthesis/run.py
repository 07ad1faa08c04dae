"""From documents to a file of rows: groups of chunks are asked about and answered, filtered, and noted in a journal."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pronghorn.data.synthesis.chunks import Chunk, cut
from pronghorn.data.synthesis.documents import Document, read_documents
from pronghorn.data.synthesis.duplicates import Asked
from pronghorn.data.synthesis.filters import answer_in, questions_in
from pronghorn.data.synthesis.journal import Group, Journal
from pronghorn.data.synthesis.prompts import CHINESE, ENGLISH, QUESTIONS_BEGIN, prompts_for
from pronghorn.errors import CommandMisused, DocumentUnreadable, UnknownArgument

#: Tokens that a question may take; a list of them takes as many times as many.
_QUESTION_TOKENS = 32


@dataclass(frozen=True)
class Written:
    """What a model wrote. `finished`: it ended by itself, not at the limit of tokens."""

    text: str
    finished: bool = True


class Writer(Protocol):
    """Answers prompts, each a user's only message. The same arguments give the same answers.

    Every answer begins with `beginning`, which the model goes on from.
    """

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        beginning: str = "",
    ) -> list[Written]: ...


@dataclass(frozen=True)
class Synthesis:
    """How rows are made.

    Args:
        pairs_per_chunk: questions asked about each chunk; fewer are left after filtering.
        chunk_tokens: tokens of a chunk at most.
        overlap_tokens: tokens of a chunk that the next one begins with.
        answer_tokens: tokens that an answer may take; a longer one is rejected.
        temperature: of the questions; answers are always the most likely ones.
        group: chunks worked on together.
        batch: prompts that the model answers at once. Like the group, it changes which rows come out.
        model: name of the model, for the journal.
    """

    pairs_per_chunk: int = 3
    chunk_tokens: int = 400
    overlap_tokens: int = 40
    answer_tokens: int = 160
    temperature: float = 0.3
    group: int = 8
    batch: int = 8
    seed: int = 3407
    model: str = ""

    def __post_init__(self) -> None:
        for name, least in (
            ("pairs_per_chunk", 1),
            ("chunk_tokens", 32),
            ("answer_tokens", 1),
            ("group", 1),
            ("batch", 1),
        ):
            if getattr(self, name) < least:
                raise UnknownArgument(f"{name} is {getattr(self, name)}", fix=f"at least {least}")
        if not 0 <= self.overlap_tokens <= self.chunk_tokens // 2:
            raise UnknownArgument(
                f"overlap_tokens is {self.overlap_tokens}", fix=f"0 to {self.chunk_tokens // 2}, half a chunk"
            )


@dataclass(frozen=True)
class SynthesisResult:
    """What came out. `rejected` counts by reason; `resumed` groups were finished by an earlier run."""

    output: str
    documents: int
    chunks: int
    rows: int
    resumed: int
    rejected: Counter[str] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "rejected": dict(self.rejected.most_common())}


Progress = Callable[[int, int, int], None]


def synthesize_rows(
    documents: Iterable[str | os.PathLike[str] | Document],
    output: str | os.PathLike[str],
    write: Writer,
    count_tokens: Callable[[str], int],
    settings: Synthesis | None = None,
    *,
    restart: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> SynthesisResult:
    """Questions and answers about documents, as chat rows in a JSON Lines file.

    A row is ``{"messages": [question, answer], "source": "manual.md#3", "headings": "Part > Chapter"}``. The output
    is written when all chunks are done; until then a journal beside it keeps what is finished, and the same call goes
    on after it. The same documents, model and settings give the same rows, interrupted or not.

    Args:
        documents: files, folders, or documents that are read already.
        restart: begin anew, whatever the journal holds.
        overwrite: replace an output that exists.
        progress: told (groups done, groups in all, rows so far).

    Raises:
        DocumentUnreadable: a document cannot be read, or all together are too short to be asked about.
        CommandMisused: the output exists.
        SynthesisChanged: the journal is of other documents or settings.
    """
    settings = settings or Synthesis()
    output = checked_output(output, overwrite or restart)
    documents = read_documents(documents)
    chunks = [
        chunk
        for document in documents
        for chunk in cut(document, count_tokens, settings.chunk_tokens, settings.overlap_tokens)
    ]
    if not chunks:
        raise DocumentUnreadable("the documents are too short to be asked about", fix="give longer ones")
    output.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(output, _facts(documents, settings, len(chunks)), restart)
    resumed = len(journal.groups)
    groups = [chunks[i : i + settings.group] for i in range(0, len(chunks), settings.group)]
    for number, group in enumerate(groups):
        if number >= len(journal.groups):
            journal.add(_work(group, number, write, settings))
        if progress is not None:
            progress(number + 1, len(groups), sum(len(done.rows) for done in journal.groups[: number + 1]))
    rows, rejected = _without_duplicates(journal.groups)
    _write(output, rows)
    journal.remove()
    return SynthesisResult(str(output), len(documents), len(chunks), len(rows), resumed, rejected)


def checked_output(output: str | os.PathLike[str], replace: bool) -> Path:
    """Where rows are written to.

    Raises:
        CommandMisused: something stands there, and is not to be replaced.
    """
    path = Path(output).expanduser()
    if path.is_dir() or (path.exists() and not replace):
        raise CommandMisused(
            f"'{output}' exists", fix="name another output, or replace a file with --overwrite"
        )
    return path


def _facts(documents: Sequence[Document], settings: Synthesis, chunks: int) -> dict[str, Any]:
    """What the rows depend on."""
    return {
        "documents": [[document.name, document.digest] for document in documents],
        "chunks": chunks,
        "prompts": [asdict(ENGLISH), asdict(CHINESE)],
        **asdict(settings),
    }


def _work(chunks: Sequence[Chunk], number: int, write: Writer, settings: Synthesis) -> Group:
    """Questions about all chunks of a group at once, then all their answers."""
    group = Group()
    # Neighbouring groups must not draw the same numbers, nor the same group of two seeds.
    seed = (settings.seed * 1_000_003 + number) % 2**31
    asked = write(
        [prompts_for(c.text).questions.format(text=c.shown, count=settings.pairs_per_chunk) for c in chunks],
        max_new_tokens=_QUESTION_TOKENS * settings.pairs_per_chunk,
        temperature=settings.temperature,
        seed=seed,
        beginning=QUESTIONS_BEGIN,
    )
    pairs = [
        (chunk, question)
        for chunk, written in zip(chunks, asked, strict=True)
        for question in questions_in(written.text, chunk, settings.pairs_per_chunk, group.rejected)
    ]
    answers = write(
        [
            prompts_for(chunk.text).answer.format(text=chunk.shown, question=question)
            for chunk, question in pairs
        ],
        max_new_tokens=settings.answer_tokens,
        temperature=0.0,
        seed=seed,
    )
    for (chunk, question), written in zip(pairs, answers, strict=True):
        answer = answer_in(written.text, written.finished, question, chunk, group.rejected)
        if answer is not None:
            group.rows.append(_row(chunk, question, answer))
    return group


def _row(chunk: Chunk, question: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        "source": f"{chunk.document}#{chunk.number}",
        "headings": " > ".join(chunk.headings),
    }


def _without_duplicates(groups: Sequence[Group]) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The rows of all groups in their order, each question once; and all that was rejected."""
    asked, rows = Asked(), []
    rejected: Counter[str] = Counter()
    for group in groups:
        rejected.update(group.rejected)
        for row in group.rows:
            why = asked.add(row["messages"][0]["content"])
            if why is None:
                rows.append(row)
            else:
                rejected[why] += 1
    return rows, rejected


def _write(output: Path, rows: Sequence[dict[str, Any]]) -> None:
    temporary = output.with_name(output.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(temporary, output)
