"""Servers in a thread of the test's process, and raw connections to them."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pronghorn.inference.server.listen import Server


@contextmanager
def running(load: Callable[[], Any], *, wait: bool = True, **arguments: Any) -> Iterator[Server]:
    """A server on a free port; `wait` until its model is loaded."""
    server = Server(load, **arguments)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            server.run()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        if wait:
            until(lambda: server.worker.state != "starting", 60)
        yield server
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"
    server.failures = failures  # type: ignore[attr-defined]


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.005)


def call(
    server: Server, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, dict[str, str], Any]:
    """(status, headers in lower case, JSON or text) of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    sent = {"Content-Type": "application/json"} if body is not None else {}
    data = body if isinstance(body, bytes | type(None)) else json.dumps(body).encode()
    sent.update({name.replace("_", "-"): value for name, value in headers.items()})
    try:
        connection.request(method, path, data, sent)
        response = connection.getresponse()
        text = response.read().decode()
    finally:
        connection.close()
    got = {name.lower(): value for name, value in response.getheaders()}
    return response.status, got, json.loads(text) if "json" in got.get("content-type", "") else text


def ask(server: Server, **fields: Any) -> tuple[int, dict[str, str], Any]:
    """A chat call with one question, unless `messages` are given."""
    body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
    return call(server, "POST", "/v1/chat/completions", body)


@contextmanager
def connected(server: Server) -> Iterator[socket.socket]:
    """A bare connection, for clients that do not behave."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as opened:
        yield opened


def raw_request(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    return head.encode() + b"\r\n\r\n" + data
