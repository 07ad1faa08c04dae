"""``pronghorn serve MODEL``: answers over HTTP with OpenAI's API, and a chat page."""

from __future__ import annotations

import argparse
import os
import threading
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pronghorn.cli.arguments import add_adapters, add_model, read_adapters
from pronghorn.cli.console import say
from pronghorn.cli.numbers import positive, whole
from pronghorn.errors import CommandMisused, PackageMissing

if TYPE_CHECKING:
    from pronghorn.inference.server.listen import Server

TOKEN_VARIABLE = "PRONGHORN_TOKEN"
HIGHEST_PORT = 65535


def register(commands: Any) -> None:
    """Add ``serve`` to the parser's commands."""
    parser = commands.add_parser(
        "serve",
        help="answer over HTTP with OpenAI's API, by a model and any number of its adapters",
        description="Serves /v1/chat/completions, /v1/completions, /v1/models, /health and /metrics, and a chat page "
        "at /. Listens on this machine alone unless --host says otherwise, which needs a token.",
    )
    add_model(parser)
    add_adapters(parser)
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS")
    parser.add_argument("--port", type=whole, default=8000, metavar="N", help="0 takes a free one")
    parser.add_argument(
        "--token",
        metavar="TEXT",
        help=f"what callers must show; better in the variable {TOKEN_VARIABLE}, which other users here cannot read",
    )
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a web page elsewhere that may call, such as https://chat.example.org (repeatable)",
    )
    parser.add_argument(
        "--max-batch", type=positive, default=64, metavar="N", help="answers written at a time (default 64)"
    )
    parser.add_argument(
        "--max-waiting",
        type=whole,
        default=256,
        metavar="N",
        help="answers that wait; what comes beyond is told to try again (default 256)",
    )
    parser.add_argument(
        "--max-context",
        type=positive,
        metavar="N",
        help="tokens of a prompt with its answer (default: the model's)",
    )
    parser.add_argument("--load-in-4bit", action="store_true")


def run(options: argparse.Namespace) -> int:
    """Serve until it is told to stop; 0 when it was, what went wrong otherwise."""
    if options.port > HIGHEST_PORT:
        raise CommandMisused(f"there is no port {options.port}", fix=f"use 0 to {HIGHEST_PORT}")
    for origin in options.allow_origin:
        parts = urlsplit(origin)
        if parts.scheme not in ("http", "https") or f"{parts.scheme}://{parts.netloc}" != origin:
            raise CommandMisused(
                f"'{origin}' is no web origin", fix="write it as browsers do: https://chat.example.org"
            )
    server = _server(options)
    host = f"[{options.host}]" if ":" in options.host else options.host
    say(f"listening on http://{host}:{server.port}; loading {options.model}")
    threading.Thread(target=_tell_when_ready, args=(server, host), daemon=True).start()
    server.run()
    say("stopped")
    return 0


def _server(options: argparse.Namespace) -> Server:
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise PackageMissing(f"serving needs {' and '.join(missing)}", fix="pip install 'pronghorn[serve]'")
    adapters = read_adapters(options.adapters)
    from pronghorn.cli.models import resolve_model
    from pronghorn.cli.quiet import quiet_libraries
    from pronghorn.inference.server.listen import Server

    def load() -> Any:
        quiet_libraries()
        from pronghorn.inference.server.loading import load_served

        return load_served(
            resolve_model(options.model),
            adapters,
            max_batch=options.max_batch,
            max_context=options.max_context,
            load_in_4bit=options.load_in_4bit,
        )

    return Server(
        load,
        host=options.host,
        port=options.port,
        token=options.token or os.environ.get(TOKEN_VARIABLE),
        most_open=options.max_batch + options.max_waiting,
        origins=frozenset(options.allow_origin),
    )


def _tell_when_ready(server: Server, host: str) -> None:
    model = server.worker.wait_until_loaded()
    if model is not None:
        say(f"ready: {', '.join(model.variants)}")
        say(f"  chat page  http://{host}:{server.port}/")
        say(f"  API        http://{host}:{server.port}/v1")
        say("Ctrl-C stops it once what is being answered is done; a second one ends the answers.")
