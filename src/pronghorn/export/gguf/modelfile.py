"""An Ollama Modelfile beside a GGUF file, its template taken from what the tokenizer's chat template renders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_SYSTEM, _USER, _ANSWER, _NEXT = "\x01system\x01", "\x01user\x01", "\x01answer\x01", "\x01next\x01"


@dataclass(frozen=True)
class Turns:
    """The text around what is said, without the BOS that llama.cpp adds itself."""

    before_system: str
    after_system: str
    before_user: str
    before_answer: str
    after_answer: str
    default_system: str = ""

    def render(self, system: str, turns: list[tuple[str, str]], question: str) -> str:
        """As Ollama renders it: the prompt for an answer to `question`."""
        text = f"{self.before_system}{system}{self.after_system}" if system else ""
        for user, answer in turns:
            text += f"{self.before_user}{user}{self.before_answer}{answer}{self.after_answer}"
        return f"{text}{self.before_user}{question}{self.before_answer}"


def modelfile(tokenizer: Any, file_name: str) -> str:
    """The Modelfile's text. Where the chat template has no such form, TEMPLATE is left out: Ollama then goes by the
    template in the GGUF file."""
    lines = [f"FROM ./{file_name}"]
    turns = read_turns(tokenizer)
    if turns is not None:
        system = (
            f"{{{{ if .System }}}}{turns.before_system}{{{{ .System }}}}{turns.after_system}{{{{ end }}}}"
        )
        asked = f"{turns.before_user}{{{{ .Prompt }}}}{turns.before_answer}"
        answer = f"{{{{ .Response }}}}{turns.after_answer}"
        lines.append(f'TEMPLATE """{system}{asked}{answer}"""')
        if turns.default_system:
            lines.append(f'SYSTEM """{turns.default_system}"""')
    lines += [f'PARAMETER stop "{token}"' for token in _stops(tokenizer, turns)]
    return "\n".join(lines) + "\n"


def _stops(tokenizer: Any, turns: Turns | None) -> list[str]:
    end = tokenizer.eos_token
    after = turns.after_answer.strip() if turns else ""
    return [
        token for token in dict.fromkeys([end, after]) if token and '"' not in token and "\n" not in token
    ]


def read_turns(tokenizer: Any) -> Turns | None:
    """What a chat template puts around each turn; None where it does not come out as the template renders it."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        full = _render(tokenizer, _SYSTEM, [(_USER, _ANSWER)], _NEXT)
        short = _render(tokenizer, "", [], _USER)
    except Exception:  # a template raises what it likes for turns it does not take
        return None
    places = [full.find(mark) for mark in (_SYSTEM, _USER, _ANSWER, _NEXT)]
    if -1 in places or places != sorted(places) or _USER not in short:
        return None
    before_system, rest = full.split(_SYSTEM)
    between, rest = rest.split(_USER)
    before_answer, rest = rest.split(_ANSWER)
    again, last = rest.split(_NEXT)
    alone = short.split(_USER)[0]
    turns = _split(before_system, between, before_answer, again, alone, tokenizer.eos_token or "")
    if turns is None or last != before_answer or not _agrees(tokenizer, turns):
        return None
    return turns


def _split(before: str, between: str, answer: str, again: str, alone: str, end: str) -> Turns | None:
    """Tell where the system's turn ends and the user's begins, and the same for an answer and the next question."""
    if (
        alone.startswith(before)
        and alone.endswith(between)
        and before
        and len(alone) > len(before) + len(between)
    ):
        default = alone[len(before) : len(alone) - len(between)]
        common = _common_end(between, again)
        cut = common.find(end) + len(end) if end and end in common else 0
        cut += len(common[cut:]) - len(common[cut:].lstrip("\n"))
        user = common[cut:]
        return Turns(before, between.removesuffix(user), user, answer, again.removesuffix(user), default)
    if between.endswith(alone) and again.endswith(alone):
        return Turns(before, between.removesuffix(alone), alone, answer, again.removesuffix(alone))
    return None


def _common_end(left: str, right: str) -> str:
    size = 0
    while size < min(len(left), len(right)) and left[-1 - size] == right[-1 - size]:
        size += 1
    return left[len(left) - size :]


def _render(tokenizer: Any, system: str, turns: list[tuple[str, str]], question: str) -> str:
    messages = [{"role": "system", "content": system}] if system else []
    for user, answer in turns:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": question})
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return text.removeprefix(tokenizer.bos_token) if begins_with_bos(tokenizer) else text


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself, and so llama.cpp, puts BOS before a text."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _agrees(tokenizer: Any, turns: Turns) -> bool:
    cases: list[tuple[str, list[tuple[str, str]], str]] = [
        ("", [], "Hello?"),
        ("Be brief.", [], "Hello?"),
        ("Be brief.", [("Hi", "Ho"), ("a", "b")], "c"),
    ]
    return all(
        turns.render(system or turns.default_system, said, asked) == _render(tokenizer, system, said, asked)
        for system, said, asked in cases
    )
