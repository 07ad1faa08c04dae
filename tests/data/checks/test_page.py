"""The page needs nothing but itself, and nothing of the data acts in it."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from pronghorn.data import check
from pronghorn.errors import CommandMisused

EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>\"' onload=x \u202e</pre>"


class Reader(HTMLParser):
    """Collects tags and attributes, and that every tag closes."""

    VOID = ("meta", "br", "rect", "line")

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.open = set(), [], []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def rows():
    chat = {"messages": [{"role": "user", "content": EVIL}, {"role": "assistant", "content": EVIL}]}
    return [chat, {EVIL: EVIL}, {"messages": [{"role": EVIL, "content": ""}]}, EVIL, {"text": "ok " * 500}]


def test_the_page(tmp_path):
    path = tmp_path / "<b>rows&.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()) + EVIL + "\n", encoding="utf-8")
    report = check(path)
    written = report.write_html(tmp_path / "page.html")
    page = written.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(page)
    assert not reader.open
    assert not reader.tags & {"script", "img", "iframe", "object", "link", "a", "form", "b>rows&.jsonl"}
    names = {name for name, _ in reader.attributes}
    assert not {name for name in names if name.startswith("on") or name in ("src", "href")}
    assert "\u202e" not in page and "<U+202E>" not in page and "&lt;U+202E&gt;" in page
    assert "http" not in page.replace("http-equiv", "")
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page
    assert "<svg" in page and "lengths" in page.lower()


def test_the_page_replaces_no_data(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"text": "a"}\n')
    report = check(tmp_path / "r.jsonl")
    for name in ("r.jsonl", "absent/page.html", "."):
        with pytest.raises(CommandMisused):
            report.write_html(tmp_path / name)
    assert (tmp_path / "r.jsonl").read_text() == '{"text": "a"}\n'
    assert "no problems" in report.write_html(tmp_path / "p.html").read_text()
