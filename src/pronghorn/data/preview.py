"""One row as the model sees it: its tokens, which of them are trained on, what truncation loses, what looks wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pronghorn.data.answers import TokenTexts
from pronghorn.data.chat_templates.fit import control_tokens, is_whole, puts_bos
from pronghorn.data.rows import IGNORED, AnswerRenderer, row_kind, supervised

Level = Literal["ok", "warning"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, and what it was found to be."""

    level: Level
    text: str


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one kind: trained on or not, special or not, kept or cut off."""

    text: str
    supervised: bool
    special: bool
    cut: bool


@dataclass(frozen=True)
class RowPreview:
    """A row's tokens. Labels are -100 where a token is not trained on; `kept` tokens are left by truncation.

    Args:
        tokens: the text that each token stands for; a token that is a part of a letter stands for U+FFFD.
    """

    kind: str
    ids: list[int]
    tokens: list[str]
    labels: list[int]
    special: list[bool]
    kept: int
    checks: list[Check]
    runs: list[Run]

    @property
    def supervised(self) -> int:
        """Tokens trained on, after truncation; the first token of a row never is."""
        return supervised(self.labels[: self.kept])

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "tokens_in_all": len(self.ids),
            "tokens_kept": self.kept,
            "tokens_trained_on": self.supervised,
            "ids": self.ids,
            "tokens": self.tokens,
            "labels": self.labels,
            "special": self.special,
            "checks": [{"level": check.level, "text": check.text} for check in self.checks],
        }


def preview_row(
    row: Mapping[str, Any],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    responses_only: bool = True,
    text_field: str = "text",
    vocabulary: int | None = None,
) -> RowPreview:
    """The tokens and labels that training would make of a row, cut to `max_length` from the right.

    Raises:
        RowInvalid: the row is of no known kind, malformed, or refused by the chat template.
        TokenizerProblem: a chat row, and the tokenizer has no chat template.
        ChatTemplateOpaque: the assistant's turns cannot be told from the rest.
    """
    rendered = AnswerRenderer(tokenizer, responses_only, text_field, vocabulary)(row)
    ids, labels = rendered["input_ids"], rendered["labels"]
    known = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    special = [token in known for token in ids]
    kept = min(len(ids), max_length or len(ids))
    texts = TokenTexts(tokenizer)
    preview = RowPreview(
        kind=row_kind(row, text_field) or "rows",
        ids=ids,
        tokens=texts(ids),
        labels=labels,
        special=special,
        kept=kept,
        checks=[],
        runs=_runs(texts, ids, labels, special, kept),
    )
    preview.checks.extend(_checks(preview, tokenizer))
    return preview


def _runs(texts: TokenTexts, ids: list[int], labels: list[int], special: list[bool], kept: int) -> list[Run]:
    """Tokens of one kind decoded together, so that letters of several tokens are whole."""
    runs: list[Run] = []
    start = 0
    kinds = [
        (label != IGNORED, is_special, i >= kept)
        for i, (label, is_special) in enumerate(zip(labels, special, strict=True))
    ]
    for end in range(1, len(ids) + 1):
        if end == len(ids) or kinds[end] != kinds[start] or special[end]:
            runs.append(Run(texts.together(ids[start:end]), *kinds[start]))
            start = end
    return runs


def _checks(preview: RowPreview, tokenizer: Any) -> list[Check]:
    """What a person would look for: the beginning, the ends of answers, split control tokens, and what is lost."""
    checks = [_begin(preview.ids, tokenizer), *_ends(preview, tokenizer)]
    text = "".join(
        token for token, special in zip(preview.tokens, preview.special, strict=True) if not special
    )
    for token in control_tokens(text):
        if not is_whole(tokenizer, token):
            count = len(tokenizer(token, add_special_tokens=False)["input_ids"])
            checks.append(
                Check("warning", f"'{token}' is no token of this tokenizer: it becomes {count} tokens")
            )
    total = supervised(preview.labels)
    if not total:
        checks.append(Check("warning", "no token is trained on"))
    if preview.kept < len(preview.ids):
        lost = total - preview.supervised
        left = ", and none is left" if total and lost == total else ""
        what = (
            f"{lost} of {total} tokens to train on are lost{left}" if lost else "nothing to train on is lost"
        )
        cut = f"cut to {preview.kept} of {len(preview.ids)} tokens: {what}"
        checks.append(Check("warning" if lost else "ok", cut))
    return checks


def _begin(ids: list[int], tokenizer: Any) -> Check:
    bos, name = tokenizer.bos_token_id, tokenizer.bos_token
    count = 0
    while bos is not None and ids[count : count + 1] == [bos]:
        count += 1
    if count > 1:
        return Check("warning", f"begins with '{name}' {count} times")
    if count == 1:
        return Check("ok", f"begins with '{name}', the BOS token")
    if bos is not None and puts_bos(tokenizer):
        return Check("warning", f"does not begin with '{name}', which this tokenizer puts before every text")
    return Check("ok", "begins without a BOS token, as this tokenizer's texts do")


def _ends(preview: RowPreview, tokenizer: Any) -> list[Check]:
    """Whether what is trained on ends with EOS: without it the model never learns to stop."""
    trained = [label != IGNORED for label in preview.labels]
    last = [i for i, inside in enumerate(trained) if inside and (i + 1 == len(trained) or not trained[i + 1])]
    eos = tokenizer.eos_token_id
    if not last:
        return []
    open_ended = [i for i in last if not any(token == eos for token in preview.ids[max(0, i - 1) : i + 1])]
    what = "the trained part" if len(last) == 1 else f"each of the {len(last)} trained parts"
    if not open_ended:
        return [Check("ok", f"{what} ends with '{tokenizer.eos_token}', the EOS token")]
    ends = list(dict.fromkeys(preview.tokens[i] for i in open_ended))
    shown = ", ".join(repr(end) for end in ends[:3])
    return [
        Check(
            "warning",
            f"{len(open_ended)} of {len(last)} trained parts end with {shown}, not with the EOS token "
            f"'{tokenizer.eos_token}': generation stops there only if the model's generation_config says so",
        )
    ]
