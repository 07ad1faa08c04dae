"""``pronghorn chat MODEL_OR_ADAPTER``: one answer with --prompt, otherwise a conversation."""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import TYPE_CHECKING

from pronghorn.cli.console import say
from pronghorn.cli.models import resolve_model
from pronghorn.cli.quiet import quiet_libraries
from pronghorn.errors import CommandMisused, RequestTooLong

if TYPE_CHECKING:
    from pronghorn.inference import Conversation

CONTEXT = 4096


def run(options: Namespace) -> int:
    if options.prompt is not None and not options.prompt.strip():
        raise CommandMisused("--prompt is empty", fix="give a question")
    quiet_libraries()
    from pronghorn.inference import Conversation, Sampling, load_for_chat

    model, tokenizer = load_for_chat(
        resolve_model(options.model), max_seq_length=None, load_in_4bit=options.load_in_4bit
    )
    conversation = Conversation(
        model,
        tokenizer,
        max_length=min(CONTEXT, getattr(model.config, "max_position_embeddings", CONTEXT)),
        system=options.system,
        sampling=Sampling(max_new_tokens=options.max_new_tokens, temperature=options.temperature),
    )
    if options.prompt is not None:
        conversation.ask(options.prompt, _print_piece)
        say()
        return 0
    return _converse(conversation)


def _converse(conversation: Conversation) -> int:
    """Read questions until the end of input. Ctrl-C stops an answer, and at the prompt the conversation."""
    if sys.stdin.isatty():
        say("Ask something. An empty line or Ctrl-D ends the conversation, Ctrl-C stops an answer.")
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return 0
        if not question:
            return 0
        remembered_from = conversation.forgotten
        try:
            conversation.ask(question, _print_piece)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
        except RequestTooLong as error:
            print(f"pronghorn: {error}", file=sys.stderr)
            continue
        say()
        if conversation.forgotten > remembered_from:
            _tell_forgotten(conversation)


def _tell_forgotten(conversation: Conversation) -> None:
    count = conversation.forgotten
    which = (
        "the first question and its answer are"
        if count == 1
        else f"the first {count} questions and answers are"
    )
    print(
        f"pronghorn: the conversation outgrew the {conversation.max_length:,} tokens that it may have: {which} "
        "forgotten",
        file=sys.stderr,
    )


def _print_piece(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
