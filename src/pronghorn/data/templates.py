"""Which tokens of a rendered conversation the assistant wrote, for any chat template.

A template with ``{% generation %}`` blocks says so itself. For the others the conversation is rendered as text more
than once and the renderings are compared, so nothing about the template's syntax is assumed.
"""

from __future__ import annotations

import re
from typing import Any

from jinja2 import TemplateError

from pronghorn.errors import ChatTemplateOpaque, RowInvalid, TokenizerProblem

#: Unlikely in any text, no whitespace at its ends, and differing from both candidates' first and last letters.
_MARKERS = ("\u0416pronghorn\u0416", "\u0428antilope\u0428")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_GENERATION_TAG = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")
#: Stand at both ends of a generation block while its place is looked for; from Unicode's private use area.
_BLOCK_BEGINS, _BLOCK_ENDS = "\ue0d7\ue0f1", "\ue0f1\ue0d7"

Message = dict[str, Any]
Span = tuple[int, int]


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template and finds the assistant's part of the text."""

    def __init__(self, tokenizer: Any, **template_arguments: Any) -> None:
        self.tokenizer = tokenizer
        self.arguments = {k: v for k, v in template_arguments.items() if v is not None}

    def with_arguments(self, **template_arguments: Any) -> ChatRenderer:
        """The same renderer with further variables for the template (`tools`, `enable_thinking`, …)."""
        return ChatRenderer(self.tokenizer, **{**self.arguments, **template_arguments})

    @property
    def template(self) -> str:
        """The chat template.

        Raises:
            TokenizerProblem: the tokenizer has none.
        """
        template = self.arguments.get("chat_template") or getattr(self.tokenizer, "chat_template", None)
        if not template:
            raise TokenizerProblem(
                "these are chat rows, but the tokenizer has no chat template",
                where=str(getattr(self.tokenizer, "name_or_path", "") or type(self.tokenizer).__name__),
                fix="train an instruct model, set tokenizer.chat_template, or render the rows to text yourself "
                "with formatting_func",
            )
        return template if isinstance(template, str) else str(template)

    def text(self, messages: list[Message], *, ask: bool = False) -> str:
        """The conversation as text; with `ask` it ends where the assistant's next answer begins.

        Raises:
            TokenizerProblem: there is no chat template.
            RowInvalid: the template refuses the conversation.
        """
        return self._render(messages, tokenize=False, add_generation_prompt=ask)

    def _render(self, messages: list[Message], **how: Any) -> Any:
        _ = self.template
        try:
            return self.tokenizer.apply_chat_template(messages, **{**self.arguments, **how})
        except (TemplateError, TypeError, ValueError, AttributeError, LookupError) as error:
            # jinja2's own, and what a template's expressions raise on content of another type than they expect
            raise RowInvalid(
                f"the chat template refuses a conversation: {error}",
                fix="bring the roles into the order it expects, or change the template",
            ) from error

    def tokens(self, text: str) -> list[int]:
        """Token ids of rendered text; the template has already written the special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def assistant_mask(self, messages: list[Message]) -> tuple[list[int], list[bool]]:
        """Token ids of the conversation, and for each whether the assistant wrote it (its end-of-turn token included).

        Raises:
            ChatTemplateOpaque: the assistant's part cannot be found in what the template renders.
        """
        return mask_spans(self.tokenizer, *self.answers(messages))

    def answers(self, messages: list[Message]) -> tuple[str, list[Span]]:
        """The rendered conversation, and the character spans of what the assistant wrote in it.

        Raises:
            ChatTemplateOpaque: the assistant's part cannot be found in what the template renders.
        """
        if _GENERATION.search(self.template):
            return self._answers_in_generation_blocks(messages)
        text = self.text(messages)
        return text, self.assistant_spans(messages, text)

    def assistant_spans(self, messages: list[Message], text: str) -> list[Span]:
        """Character spans of the assistant's turns in `text`, the rendering of `messages`."""
        return [
            self._turn_span(messages, index, text)
            for index, message in enumerate(messages)
            if message.get("role") == "assistant"
        ]

    def _turn_span(self, messages: list[Message], index: int, text: str) -> Span:
        """From the end of the generation prompt to the end of the turn.

        Where the renderings of messages[:i] and messages[:i+1] are prefixes of the whole, they give both ends. A
        template that renders an earlier turn differently once another follows (Qwen3 drops earlier reasoning) is
        asked where the content lies instead, and the end-of-turn text is that of the turn rendered as the last one.
        """
        asked = self._try_text(messages[:index], ask=True)
        until = text if index == len(messages) - 1 else self._try_text(messages[: index + 1])
        start = len(asked) if asked and text.startswith(asked) else None
        if start is not None and until is not None and text.startswith(until) and len(until) > start:
            return start, self._with_stop_token(
                text, start, start + len(_without_trailing_space(until[start:]))
            )
        content = self._content_span(messages, index, text)
        if content is None:
            raise ChatTemplateOpaque(
                f"the chat template does not show where message {index + 1}, an assistant's, begins and ends",
                where=str(getattr(self.tokenizer, "name_or_path", "") or "chat template"),
                fix="add {% generation %} around the assistant's part of the template, or train on all tokens "
                "(assistant_only_loss=False, or data.responses_only: false)",
            )
        begin = start if start is not None and start <= content[0] else content[0]
        end = content[1] + len(self._end_of_turn(messages, index, text[content[1] :]))
        return begin, self._with_stop_token(text, begin, end)

    def _end_of_turn(self, messages: list[Message], index: int, rest: str) -> str:
        """What the template writes after the turn's content, as far as `rest` agrees with it."""
        closing = self._try_text(messages[: index + 1])
        content = closing and self._content_span(messages[: index + 1], index, closing)
        if not closing or not content:
            return ""
        tail = closing[content[1] :]
        length = _common_prefix(tail, rest)
        if length < len(tail):
            # Where they part ways may be inside a token of the next turn ("<|" of "<|user|>"): what closes this one
            # ends with the last whole special token.
            ends = [
                tail.rfind(token, 0, length) + len(token)
                for token in self._special_tokens()
                if token in tail[:length]
            ]
            length = max(ends, default=length)
        return _without_trailing_space(tail[:length])

    def _with_stop_token(self, text: str, start: int, end: int) -> int:
        """The end of a turn, moved behind the special token that follows where the turn has none of its own.

        That token is what stops an answer: gpt-oss ends turns in the middle with <|end|> but the last with <|return|>,
        and GLM's answers stop at the next turn's <|user|>.
        """
        special = self._special_tokens()
        if any(text.endswith(token, start, end) for token in special):
            return end
        gap = len(text) - len(text[end:].lstrip())
        return gap + max((len(token) for token in special if text.startswith(token, gap)), default=end - gap)

    def _special_tokens(self) -> set[str]:
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return {str(token) for token in (*self.tokenizer.all_special_tokens, *added.values())} - {""}

    def _content_span(self, messages: list[Message], index: int, text: str) -> Span | None:
        """Where the content of one message lies: what changes in the text when the content does."""
        if not isinstance(messages[index].get("content"), str):
            return None
        spans = []
        for marker in _MARKERS:
            other = self._try_text(
                [*messages[:index], {**messages[index], "content": marker}, *messages[index + 1 :]]
            )
            if other is None or marker not in other:
                return None
            at = other.index(marker)
            end = len(text) - (len(other) - at - len(marker))
            if text[:at] != other[:at] or text[end:] != other[at + len(marker) :] or end < at:
                return None
            spans.append((at, end))
        return spans[0] if len(set(spans)) == 1 else None

    def _try_text(self, messages: list[Message], *, ask: bool = False) -> str | None:
        """`text`, or None where the template refuses an unfinished conversation."""
        try:
            return self.text(messages, ask=ask)
        except TokenizerProblem:
            raise
        except Exception:  # templates raise jinja2's TemplateError, but also whatever their expressions raise
            return None

    def _answers_in_generation_blocks(self, messages: list[Message]) -> tuple[str, list[Span]]:
        """The template's own spans. A special token right after an answer ends the turn and belongs to it.

        The blocks are found in the rendered text, since Transformers' own mask loses a block that begins with a space,
        and all after it.
        """
        marked = self._render(messages, tokenize=False, chat_template=_mark_blocks(self.template))
        text, spans = _unmarked(marked)
        return text, [(start, self._with_next_special(text, start, end)) for start, end in spans]

    def _with_next_special(self, text: str, start: int, end: int) -> int:
        """The end of a generation block, behind the special token that follows, unless the block ends with one."""
        special = self._special_tokens()
        said = text[start:end].rstrip()
        if any(said.endswith(token) for token in special):
            return end
        return end + max((len(token) for token in special if text.startswith(token, end)), default=0)


def _mark_blocks(template: str) -> str:
    """The template with a mark written at both ends of each generation block; `with` has a scope as the block has."""

    def marked(match: re.Match[str]) -> str:
        before, is_end, after = match.groups()
        tag, mark = ("endwith", _BLOCK_ENDS) if is_end else ("with", _BLOCK_BEGINS)
        return f"{{%{before} {tag} %}}{{{{ '{mark}' }}}}{{% {tag} {after}%}}"

    return _GENERATION_TAG.sub(marked, template)


def _unmarked(marked: str) -> tuple[str, list[Span]]:
    """The text without marks, and where they stood."""
    text, spans = "", []
    first, *blocks = marked.split(_BLOCK_BEGINS)
    text += first
    for block in blocks:
        said, _, rest = block.partition(_BLOCK_ENDS)
        spans.append((len(text), len(text) + len(said)))
        text += said + rest
    return text, spans


def mask_spans(tokenizer: Any, text: str, spans: list[Span]) -> tuple[list[int], list[bool]]:
    """Token ids of `text` and whether each has a character inside one of `spans`."""
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        mask = [any(begin < stop and end > start for start, stop in spans) for begin, end in offsets]
        return list(encoded["input_ids"]), mask
    # A slow tokenizer gives no offsets: tokenise the pieces between the spans' ends.
    ids: list[int] = []
    mask = []
    position = 0
    for start, stop in [*spans, (len(text), len(text))]:
        for piece, inside in ((text[position:start], False), (text[start:stop], True)):
            tokens = list(tokenizer(piece, add_special_tokens=False)["input_ids"]) if piece else []
            ids += tokens
            mask += [inside] * len(tokens)
        position = stop
    return ids, mask


def _without_trailing_space(text: str) -> str:
    """`text` up to its last visible character: the newline after an end-of-turn token is not the assistant's."""
    return text.rstrip() or text


def _common_prefix(one: Any, other: Any) -> int:
    """Number of leading items that both have in common."""
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length
