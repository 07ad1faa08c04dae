"""A chat template's text: settings, macros, checks, and the body of the format."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from pronghorn.data.chat_templates.registry import ChatTemplate, common_macros
from pronghorn.errors import UnknownArgument

_MAPPED = ("role", "content", "user", "assistant", "system", "tool")
_GENERATION_TAG = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")


def compose(
    template: ChatTemplate,
    *,
    stop: str | None = None,
    begin: bool = True,
    system: str | None = None,
    mapping: Mapping[str, str] | None = None,
) -> str:
    """The text to set as `tokenizer.chat_template`.

    Args:
        stop: the token that ends an answer; None is the tokenizer's EOS, whichever that is.
        begin: the text begins with the tokenizer's BOS.
        system: the system message of conversations without one.
        mapping: what the rows call `role`, `content` and the roles; the plain names are understood, too.
    """
    settings = {
        "begin": "bos_token or ''" if begin else "''",
        "stop": "eos_token" if stop is None else quoted(stop),
        **template.settings,
    }
    parts = [f"{{%- set {name} = {value} -%}}" for name, value in settings.items()]
    parts += [common_macros(), renaming(mapping), _refusals(template), _opening(system), template.body]
    return "\n".join(part for part in parts if part)


def renaming(mapping: Mapping[str, str] | None) -> str:
    """Jinja that brings messages with other names for role, content and the roles to the plain names.

    Raises:
        UnknownArgument: a key that is no name of ours.
    """
    if not mapping or all(ours == theirs for ours, theirs in mapping.items()):
        return ""
    unknown = [key for key in mapping if key not in _MAPPED]
    if unknown:
        raise UnknownArgument(
            f"mapping has the unknown key '{unknown[0]}'",
            where="mapping",
            fix=f"its keys are {', '.join(_MAPPED)}",
        )
    role, content = quoted(mapping.get("role", "role")), quoted(mapping.get("content", "content"))
    roles = {theirs: ours for ours, theirs in mapping.items() if ours not in ("role", "content")}
    names = "{" + ", ".join(f"{quoted(theirs)}: {quoted(ours)}" for theirs, ours in roles.items()) + "}"
    return f"""\
{{%- set renamed = namespace(messages=[]) -%}}
{{%- for message in messages -%}}
    {{%- set role = message[{role}] if {role} in message else message['role'] -%}}
    {{%- set content = message[{content}] if {content} in message else message['content'] -%}}
    {{%- set role = {names}.get(role, role) -%}}
    {{%- set renamed.messages = renamed.messages + [dict(message, role=role, content=content)] -%}}
{{%- endfor -%}}
{{%- set messages = renamed.messages -%}}"""


def _refusals(template: ChatTemplate) -> str:
    """Jinja that refuses what the format has no place for, instead of leaving it out unseen."""
    name = template.name
    lines = [
        "{%- for message in messages -%}",
        f"    {{%- if message['role'] not in {list(template.roles)!r} -%}}",
        "        {{- raise_exception('the template "
        + name
        + " has no place for the role ' + message['role'] | string) -}}",
        "    {%- endif -%}",
    ]
    if not template.tools:
        lines += [
            "    {%- if tools or message['tool_calls'] -%}",
            f"        {{{{- raise_exception('the template {name} has no place for tools') -}}}}",
            "    {%- endif -%}",
        ]
    return "\n".join([*lines, "{%- endfor -%}"])


def _opening(system: str | None) -> str:
    if not system:
        return ""
    return f"""\
{{%- if not messages or messages[0]['role'] != 'system' -%}}
    {{%- set messages = [{{'role': 'system', 'content': {quoted(system)}}}] + messages -%}}
{{%- endif -%}}"""


def quoted(text: str) -> str:
    """A Jinja literal."""
    return json.dumps(text, ensure_ascii=False)


def without_generation_blocks(template: str) -> str:
    """The same template for programs that do not know ``{% generation %}``; it renders the same text."""

    def condition(match: re.Match[str]) -> str:
        tag = "endif" if "endgeneration" in match[0] else "if true"
        return "{%" + match[1] + f" {tag} " + match[2] + "%}"

    return _GENERATION_TAG.sub(condition, template)
