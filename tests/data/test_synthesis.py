"""Documents to rows: read with their headings, cut, asked about by a stand-in for a model, filtered, gone on with."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

import pytest

from pronghorn.data.synthesis import documents as reading
from pronghorn.data.synthesis.chunks import Chunk, cut
from pronghorn.data.synthesis.documents import Document, Section, read_document, read_documents
from pronghorn.data.synthesis.duplicates import Asked
from pronghorn.data.synthesis.filters import answer_in, questions_in
from pronghorn.data.synthesis.prompts import CHINESE, ENGLISH, prompts_for
from pronghorn.data.synthesis.run import Synthesis, Written, synthesize_rows
from pronghorn.data.synthesis.words import content_words
from pronghorn.errors import (
    CommandMisused,
    DocumentUnreadable,
    PackageMissing,
    SynthesisChanged,
    UnknownArgument,
)


def words(text: str) -> int:
    return len(text.split())


# --- documents --------------------------------------------------------------------------------------------------

MARKDOWN = """---
title: x
---
# Guide

Intro with a [link](http://x.y "t"), ![picture](a.png) and **bold**.

## Install <!-- hidden -->

```bash
# no heading
pip install
```

### Details ###

More.

## Use

Run it.
"""


def test_markdown_sections_keep_their_headings_and_code(tmp_path):
    path = tmp_path / "guide.md"
    path.write_text(MARKDOWN)
    document = read_document(path)
    assert [(section.headings, section.text) for section in document.sections] == [
        (("Guide",), "Intro with a link,  and bold."),
        (("Guide", "Install"), "```bash\n# no heading\npip install\n```"),
        (("Guide", "Install", "Details"), "More."),
        (("Guide", "Use"), "Run it."),
    ]


def test_html_leaves_navigation_and_scripts_out(tmp_path):
    pytest.importorskip("bs4")
    path = tmp_path / "page.html"
    path.write_text(
        "<html><head><title>t</title><script>var x</script></head><body><nav><p>menu</p></nav><h1>Top</h1>"
        "<p>One <b>two</b>\n three.</p><div>Loose.<ul><li>item</li></ul></div><h2>Sub</h2><pre>a\n  b</pre>"
        "<footer><p>foot</p></footer></body></html>"
    )
    assert [(section.headings, section.text) for section in read_document(path).sections] == [
        (("Top",), "One two three.\n\nLoose.\n\nitem"),
        (("Top", "Sub"), "a\n  b"),
    ]


def pdf_of(lines: list[str]) -> bytes:
    """The smallest PDF with one page of text."""
    drawn = "BT /F1 12 Tf 72 720 Td 14 TL " + " ".join(f"({line}) Tj T*" for line in lines) + " ET"
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        "/Resources << /Font << /F1 5 0 R >> >> >>",
        f"<< /Length {len(drawn)} >>\nstream\n{drawn}\nendstream",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    data, places = b"%PDF-1.4\n", []
    for number, text in enumerate(objects, start=1):
        places.append(len(data))
        data += f"{number} 0 obj\n{text}\nendobj\n".encode()
    start = len(data)
    data += b"xref\n0 6\n0000000000 65535 f \n" + b"".join(
        f"{place:010d} 00000 n \n".encode() for place in places
    )
    return data + f"trailer\n<< /Size 6 /Root 1 0 R >>\nstartxref\n{start}\n%%EOF\n".encode()


def test_pdf_lines_become_sentences(tmp_path):
    pytest.importorskip("pypdf")
    path = tmp_path / "paper.pdf"
    path.write_bytes(pdf_of(["The prong-", "horn runs", "fast.", "It eats grass."]))
    (section,) = read_document(path).sections
    assert section.text == "The pronghorn runs fast.\nIt eats grass."
    path.write_bytes(pdf_of([]))
    with pytest.raises(DocumentUnreadable, match="may be pictures"):
        read_document(path)
    path.write_bytes(b"%PDF-1.4 broken")
    with pytest.raises(DocumentUnreadable, match="no PDF that can be read"):
        read_document(path)


def test_word_documents(tmp_path):
    docx = pytest.importorskip("docx")
    path = tmp_path / "report.docx"
    document = docx.Document()
    document.add_heading("Report", 0)
    document.add_paragraph("First.")
    document.add_heading("Part", 1)
    table = document.add_table(rows=1, cols=2)
    table.rows[0].cells[0].text, table.rows[0].cells[1].text = "speed", "88 km/h"
    document.save(path)
    assert [(section.headings, section.text) for section in read_document(path).sections] == [
        (("Report",), "First."), (("Report", "Part"), "speed | 88 km/h"),
    ]  # fmt: skip
    path.write_bytes(b"PK no zip")
    with pytest.raises(DocumentUnreadable, match="no Word document"):
        read_document(path)


def test_folders_and_what_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "b.txt").write_bytes("\ufeffzwei\r\n".encode())
    (tmp_path / "a.md").write_text("eins")
    (tmp_path / "c.bin").write_bytes(b"x")
    assert [document.sections[0].text for document in read_documents([tmp_path])] == ["eins", "zwei"]
    with pytest.raises(DocumentUnreadable, match=r"no kind that is read.*\.pdf"):
        read_document(tmp_path / "c.bin")
    with pytest.raises(DocumentUnreadable, match="cannot be read"):
        read_document(tmp_path / "none.txt")
    with pytest.raises(DocumentUnreadable, match="no such file"):
        read_documents([tmp_path / "folder"])
    (tmp_path / "latin.txt").write_bytes("Käse".encode("latin-1"))
    with pytest.raises(DocumentUnreadable, match="no UTF-8"):
        read_document(tmp_path / "latin.txt")
    (tmp_path / "empty.md").write_text("# Only a title\n")
    with pytest.raises(DocumentUnreadable, match="holds no text"):
        read_document(tmp_path / "empty.md")
    (tmp_path / "inner").mkdir()
    with pytest.raises(DocumentUnreadable, match="holds no documents"):
        read_documents([tmp_path / "inner"])
    with pytest.raises(PackageMissing, match=r"pronghorn\[documents\]"):
        reading._package("no_such_package_here", "no-such-package")


# --- chunks -----------------------------------------------------------------------------------------------------


def document_of(*sections: tuple[tuple[str, ...], str]) -> Document:
    return Document("doc.md", "0", tuple(Section(*section) for section in sections))


def sentences(start: int, end: int) -> str:
    return " ".join(f"Sentence number {n} has seven words." for n in range(start, end))


def test_chunks_hold_so_many_tokens_and_overlap_in_whole_sentences():
    chunks = cut(document_of((("A",), sentences(0, 20))), words, size=30, overlap=8, least=3)
    assert all(words(chunk.text) <= 30 for chunk in chunks)
    assert [chunk.number for chunk in chunks] == list(range(1, len(chunks) + 1))
    for before, after in pairwise(chunks):
        repeated = after.text[: after.overlap].strip()
        assert repeated and before.text.endswith(repeated) and repeated.startswith("Sentence")
    rest = "".join(chunk.text[chunk.overlap :].strip() + " " for chunk in chunks)
    assert " ".join(rest.split()) == sentences(0, 20)
    assert all(chunk.shown.startswith("A\n\n") for chunk in chunks)
    assert not any(chunk.overlap for chunk in cut(document_of((("A",), sentences(0, 20))), words, 30, 0, 3))


def test_chunks_end_at_headings_unless_they_are_small():
    chunks = cut(
        document_of(
            (("A",), sentences(0, 1)), (("A", "B"), sentences(1, 2)), (("A", "C"), sentences(2, 6)),
            (("D",), sentences(6, 8)),
        ),
        words, size=40, overlap=5, least=3,
    )  # fmt: skip
    assert [chunk.headings for chunk in chunks] == [("A",), ("D",)]
    assert "\n\nB\n\n" in chunks[0].text and "\n\nC\n\n" in chunks[0].text
    assert not chunks[1].overlap
    long = cut(document_of((("A", "B"), sentences(0, 5)), (("A", "C"), sentences(5, 9))), words, 40, 5, 3)
    assert [chunk.headings for chunk in long] == [("A", "B"), ("A", "C")]


def test_a_sentence_longer_than_a_chunk_and_one_too_short():
    long = " ".join(f"w{n}" for n in range(100))
    chunks = cut(document_of(((), long)), words, size=30, overlap=0, least=3)
    assert " ".join(chunk.text for chunk in chunks) == long and all(
        words(chunk.text) <= 30 for chunk in chunks
    )
    assert cut(document_of(((), "Too short.")), words, size=30, overlap=0, least=3) == []


# --- filters ----------------------------------------------------------------------------------------------------

TEXT = (
    "The pronghorn is the fastest land animal of North America. It reaches 88 kilometres per hour and eats grass, "
    "sagebrush and cactus. It is active by day and by night. Its closest living relatives are the giraffe and the "
    "okapi."
)
CHUNK = Chunk("doc.md", 1, ("Animals",), TEXT)


@pytest.mark.parametrize(
    "written, kept, reasons",
    [
        ("1. What does the pronghorn eat?\n2) How fast is the pronghorn?", 2, {}),
        ("- **What does the pronghorn eat?**", 1, {}),
        ("Q1: What does the pronghorn eat?\n\nHere is more: How fast is the pronghorn?", 1, {}),
        ("1. What does the pronghorn eat?\n2. What does the pronghorn eat?", 1, {"duplicate": 1}),
        ("The pronghorn eats grass.", 0, {"not a question": 1}),
        ("Who wrote the Iliad and the Odyssey?", 0, {"question not about the chunk": 1}),
        ("What does pronghorn.eat() return?", 0, {"question names what the chunk does not": 1}),
        ("Why?", 0, {"question too short or long": 1}),
        ("What does this text say about the pronghorn?", 0, {"question about the prompt": 1}),
        ("How fast is the pronghorn? What does it eat?", 0, {"several questions": 1}),
        ("", 0, {}),
    ],
)
def test_questions_are_parsed_and_filtered(written, kept, reasons):
    rejected: Counter[str] = Counter()
    assert len(questions_in(written, CHUNK, 5, rejected)) == kept
    assert rejected == reasons


def test_no_more_questions_than_asked_for():
    written = "1. What does the pronghorn eat?\n2. How fast is the pronghorn?\n3. Is the okapi a relative?"
    assert len(questions_in(written, CHUNK, 2, Counter())) == 2


@pytest.mark.parametrize(
    "written, reason",
    [
        ("The pronghorn eats grass, sagebrush and cactus.", None),
        ("**Answer:** Grass, sagebrush and cactus.", None),
        ("NOT IN THE TEXT", "refused or not in the chunk"),
        ("I'm sorry, but I cannot answer that.", "refused or not in the chunk"),
        ("Grass.", "answer too short or long"),
        ("grass sagebrush cactus " * 60, "answer too short or long"),
        ("It eats grass.\nQuestion: How fast is the pronghorn?", "answer copies the prompt"),
        ("It eats grass.\n\nAnswer: It eats grass and cactus.", "answer copies the prompt"),
        ("According to the text above, it eats grass and cactus.", "answer copies the prompt"),
        ("Grass, sagebrush and cactus, or the okapi?", "answer is a question"),
        ("It eats grass and cactus. " * 4, "answer repeats itself"),
        ("The pronghorn eats and eats.", "answer says nothing new"),
        (
            "The closest living relatives of it are the giraffe and the okapi.",
            "answer not about the question",
        ),
        ("It hunts rabbits, mice and small birds.", "answer not supported by the chunk"),
        ("The pronghorn eats 8 grass and cactus.", "answer names what the chunk does not"),
        ("The pronghorn eats 88 grass and 99 cactus.", "answer names what the chunk does not"),
        ("The pronghorn eats `grass` and `sage_brush`.", "answer names what the chunk does not"),
        (
            "The fastest pronghorn grass of America is a relative of the okapi and giraffe.",
            "answer put together of far parts",
        ),
    ],
)
def test_answers_are_kept_where_the_chunk_supports_them(written, reason):
    rejected: Counter[str] = Counter()
    answer = answer_in(written, True, "What does the pronghorn eat?", CHUNK, rejected)
    assert (answer is None) == (reason is not None)
    assert rejected == ({reason: 1} if reason else {})
    assert answer is None or not answer.startswith("**")


def test_an_answer_that_was_cut_off():
    rejected: Counter[str] = Counter()
    assert answer_in("It eats grass, sagebrush and", False, "What does it eat?", CHUNK, rejected) is None
    assert rejected == {"answer not finished": 1}


def test_words_that_carry_meaning():
    assert content_words("How does it generate what is generated?") == content_words("generates")
    assert content_words("How fast is it?") == content_words("the fastest")
    assert content_words("What is the max_seq_length of 2048?") == {"max", "seq", "length", "2048"}
    assert content_words("叉角羚的速度") == {"叉角", "角羚", "速度"}


def test_chinese_chunks_are_asked_in_chinese():
    assert prompts_for("叉角羚是北美洲跑得最快的陆地动物，时速可达88公里。") is CHINESE
    assert prompts_for(TEXT) is ENGLISH
    chunk = Chunk("a", 1, (), "叉角羚是北美洲跑得最快的陆地动物，时速可达88公里。")
    (question,) = questions_in("1. 叉角羚跑得有多快？", chunk, 3, Counter())
    assert (
        answer_in("答：叉角羚的时速可达88公里。", True, question, chunk, Counter())
        == "叉角羚的时速可达88公里。"
    )


def test_questions_asked_before():
    asked = Asked()
    assert asked.add("What does the large brown pronghorn eat in North America?") is None
    assert asked.add("what does the large brown pronghorn eat in north america") == "duplicate"
    assert asked.add("What do large brown pronghorns eat in North America?") == "near duplicate"
    assert asked.add("What does the large brown okapi eat in South Africa?") is None


# --- a whole run ------------------------------------------------------------------------------------------------


class Author:
    """Asks about the numbered facts of a chunk, and answers with the fact; counts what it was asked."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls: list[tuple[int, float, int, str]] = []
        self.fail_at = fail_at

    def __call__(self, prompts, *, max_new_tokens, temperature, seed, beginning=""):
        if self.fail_at is not None and len(self.calls) >= self.fail_at:
            raise KeyboardInterrupt
        self.calls.append((len(prompts), temperature, seed, beginning))
        return [Written(self.answer(prompt, beginning)) for prompt in prompts]

    def answer(self, prompt: str, beginning: str) -> str:
        if beginning:
            numbers = [word for word in prompt.split() if word.startswith("K")]
            return "\n".join(
                [f"{i + 1}. Which animal is number {n}?" for i, n in enumerate(numbers)] + ["", "More?"]
            )
        number = prompt.rsplit("number ", 1)[1].rstrip("?")
        return "NOT IN THE TEXT" if number == "K7" else f"Number {number} is the animal A{number[1:]}."


@pytest.fixture
def folder(tmp_path):
    facts = [f"Number K{n} is the animal A{n} of the list, which is a large one indeed." for n in range(40)]
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "facts.md").write_text("# Facts\n\n" + "\n\n".join(facts))
    return tmp_path


SETTINGS = Synthesis(pairs_per_chunk=2, chunk_tokens=60, overlap_tokens=20, group=2, model="author")


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_of_documents(folder):
    author, out = Author(), folder / "rows.jsonl"
    result = synthesize_rows([folder / "docs"], out, author, words, SETTINGS)
    rows = rows_of(out)
    assert len(rows) == result.rows > 15 and result.documents == 1 and result.resumed == 0
    assert rows[0]["messages"] == [
        {"role": "user", "content": "Which animal is number K0?"},
        {"role": "assistant", "content": "Number K0 is the animal A0."},
    ]
    assert rows[0]["source"].endswith("facts.md#1") and rows[0]["headings"] == "Facts"
    questions = [row["messages"][0]["content"] for row in rows]
    assert len(set(questions)) == len(questions) and "Which animal is number K7?" not in questions
    assert result.rejected == {"refused or not in the chunk": 1}
    assert not list(folder.glob("rows.jsonl.*"))
    questioned, answered = author.calls[0::2], author.calls[1::2]
    assert {(t, b) for _, t, _, b in questioned} == {(0.3, "1.")} and {(t, b) for _, t, _, b in answered} == {
        (0.0, "")
    }
    assert len({seed for *_, seed, _ in questioned}) == len(questioned)


def test_an_interrupted_run_goes_on_and_ends_the_same(folder):
    whole, out = folder / "whole.jsonl", folder / "rows.jsonl"
    author = Author()
    synthesize_rows([folder / "docs"], whole, author, words, SETTINGS)
    first = Author(fail_at=5)
    with pytest.raises(KeyboardInterrupt):
        synthesize_rows([folder / "docs"], out, first, words, SETTINGS)
    assert not out.exists()
    journal = folder / "rows.jsonl.progress"
    assert len(journal.read_text().splitlines()) == 1 + 2  # what it is of, and two groups of two calls each
    with journal.open("ab") as file:
        file.write(b'{"rows": [{"mess')  # a line that a power cut left
    second, progress = Author(), []
    result = synthesize_rows(
        [folder / "docs"], out, second, words, SETTINGS, progress=lambda *numbers: progress.append(numbers)
    )
    assert result.resumed == 2 and len(second.calls) == len(author.calls) - 4
    assert out.read_bytes() == whole.read_bytes()
    assert progress[0][0] == 1 and progress[-1][0] == progress[-1][1] == (result.chunks + 1) // 2
    assert not journal.exists()


def test_a_run_goes_on_only_with_the_same_documents_and_settings(folder):
    out = folder / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        synthesize_rows([folder / "docs"], out, Author(fail_at=3), words, SETTINGS)
    other = Synthesis(**{**SETTINGS.__dict__, "seed": 1})
    with pytest.raises(SynthesisChanged, match=r"of other seed: 3407, now 1.*--restart"):
        synthesize_rows([folder / "docs"], out, Author(), words, other)
    (folder / "docs" / "more.md").write_text(sentences(0, 10))
    with pytest.raises(SynthesisChanged, match=r"of other (chunks|documents)"):
        synthesize_rows([folder / "docs"], out, Author(), words, SETTINGS)
    result = synthesize_rows([folder / "docs"], out, Author(), words, other, restart=True)
    assert result.resumed == 0 and result.documents == 2


def test_an_output_that_exists_and_documents_too_short(folder):
    out = folder / "rows.jsonl"
    out.write_text("mine")
    with pytest.raises(CommandMisused, match="--overwrite"):
        synthesize_rows([folder / "docs"], out, Author(), words, SETTINGS)
    assert out.read_text() == "mine"
    synthesize_rows([folder / "docs"], out, Author(), words, SETTINGS, overwrite=True)
    assert len(rows_of(out)) > 15
    (folder / "short.txt").write_text("Hi.")
    with pytest.raises(DocumentUnreadable, match="too short"):
        synthesize_rows([folder / "short.txt"], folder / "none.jsonl", Author(), words, SETTINGS)
    with pytest.raises(UnknownArgument, match="overlap_tokens"):
        Synthesis(chunk_tokens=64, overlap_tokens=64)
    with pytest.raises(UnknownArgument, match="pairs_per_chunk"):
        Synthesis(pairs_per_chunk=0)
