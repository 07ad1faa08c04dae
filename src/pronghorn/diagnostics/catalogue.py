"""The catalogue of errors, written from the classes in `pronghorn.errors` and `diagnostics.explanations`.

python -m pronghorn.diagnostics.catalogue --write docs/errors.md

writes docs/errors.md, and the Chinese docs/errors.zh-CN.md beside it.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path

from pronghorn import errors
from pronghorn.diagnostics.explanations import EXPLANATIONS
from pronghorn.pages import write_whole

LANGUAGES = ("en", "zh")

GROUPS = {
    "1": ("Checkpoints and models", "检查点与模型"),
    "2": ("Adapters and the engine", "适配器与引擎"),
    "3": ("Data", "数据"),
    "4": ("Configuration and commands", "配置与命令"),
    "5": ("Hardware and memory", "硬件与显存"),
    "6": ("Saving and export", "保存与导出"),
    "7": ("Training runs", "训练过程"),
    "8": ("Answers", "推理"),
}
_COMMAND = "python -m pronghorn.diagnostics.catalogue --write docs/errors.md"
_HEADS = {
    "en": f"""\
# Errors

[中文](errors.zh-CN.md)

Everything a user can cause ends in one of these: one line with a code that does not change, what happened, where, and
the smallest change that helps. The command prints it without a traceback and exits with status 2; in Python it is an
exception of `pronghorn.errors`, all of them subclasses of `PronghornError`. `pronghorn explain PH401` prints an entry
of this page, and `pronghorn explain "RuntimeError: ..."` the one that another library's error belongs to.

```
[PH401] unknown key 'lerning_rate' under 'training' (config.yaml, line 12). Fix: did you mean 'learning_rate'?
```

This file is written by `{_COMMAND}`.
""",
    "zh": f"""\
# 错误码

[English](errors.md)

用户可能引起的一切问题都归为下列错误之一：一行文字，含不变的代码、发生了什么、在哪里，以及最小的修改办法。命令不打印
traceback，以状态码 2 退出；在 Python 中它是 `pronghorn.errors` 的异常，都是 `PronghornError` 的子类。
`pronghorn explain PH401` 打印本页的一条，`pronghorn explain "RuntimeError: ..."` 查找其他库的报错属于哪一条。

```
[PH401] unknown key 'lerning_rate' under 'training' (config.yaml, line 12). Fix: did you mean 'learning_rate'?
```

本文件由 `{_COMMAND}` 生成。
""",
}
_LABELS = {"en": ("Cause", "Fix"), "zh": ("原因", "解决")}
_TABLE_HEADS = {"en": ("code", "class", "when"), "zh": ("代码", "类", "何时")}


@dataclass(frozen=True)
class Entry:
    """All that is told about one error in one language."""

    code: str
    name: str
    when: str
    cause: str
    fix: str
    example: str


def error_classes() -> list[type[errors.PronghornError]]:
    """All error classes of `pronghorn.errors` except the base, by code."""
    found = [
        item
        for _, item in inspect.getmembers(errors, inspect.isclass)
        if issubclass(item, errors.PronghornError) and item is not errors.PronghornError
    ]
    return sorted(found, key=lambda item: item.code)


def entry_of(kind: type[errors.PronghornError], language: str = "en") -> Entry:
    """What is told about an error; a class that has no explanation yet has its docstring alone."""
    found = EXPLANATIONS.get(kind.code)
    if found is None:
        return Entry(kind.code, kind.__name__, _purpose(kind), "", "", "")
    if language == "zh":
        when, cause, fix = found.zh
        return Entry(kind.code, kind.__name__, when, cause, fix, found.example)
    return Entry(kind.code, kind.__name__, _purpose(kind), found.cause, found.fix, found.example)


def catalogue(language: str = "en") -> str:
    """The text of docs/errors.md, or of docs/errors.zh-CN.md."""
    parts = [_HEADS[language]]
    for digit, titles in GROUPS.items():
        entries = [entry_of(kind, language) for kind in error_classes() if kind.code[2] == digit]
        if entries:
            colon = "：" if language == "zh" else ":"
            parts.append(f"## PH{digit}xx{colon} {titles[LANGUAGES.index(language)]}\n".replace("： ", "："))
            parts.append(_table(entries, language))
            parts.extend(_section(entry, language) for entry in entries)
    return "\n".join(parts)


def _table(entries: list[Entry], language: str) -> str:
    rows = [
        f"| {entry.code} | `{entry.name}` | {entry.when.replace('|', chr(92) + '|')} |" for entry in entries
    ]
    return "\n".join([f"| {' | '.join(_TABLE_HEADS[language])} |", "| --- | --- | --- |", *rows, ""])


def _section(entry: Entry, language: str) -> str:
    if not entry.cause:
        return ""
    cause, fix = _LABELS[language]
    colon = "：" if language == "zh" else ": "
    return "\n".join(
        [
            f"### {entry.code} `{entry.name}`",
            "",
            f"**{cause}**{colon}{entry.cause}",
            "",
            f"**{fix}**{colon}{entry.fix}",
            "",
            "```",
            entry.example,
            "```",
            "",
        ]
    )


def _purpose(item: type) -> str:
    first = inspect.getdoc(item) or ""
    return " ".join(first.split("\n\n")[0].split())


def write(path: Path) -> list[Path]:
    """Write the English page to `path` and the Chinese one beside it; returns both."""
    pages = {path: catalogue("en"), path.with_suffix(".zh-CN.md"): catalogue("zh")}
    for page, text in pages.items():
        write_whole(text, page)
    return list(pages)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the catalogue of errors, or write it to its files.")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="the English page; the Chinese one goes beside it"
    )
    parser.add_argument("--lang", choices=LANGUAGES, default="en", help="of what is printed")
    options = parser.parse_args()
    if options.write is None:
        sys.stdout.write(catalogue(options.lang))
        return
    write(options.write)


if __name__ == "__main__":
    main()
