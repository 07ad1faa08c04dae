"""Answers that end when the client goes away, and server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send

Result = TypeVar("Result")


class ClientGone(Exception):
    """The client closed the connection before it had its answer."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` returns, or raises. It is cancelled when the client closes the connection.

    The request's body must have been read.

    Raises:
        ClientGone: when that came first.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for task in (working, leaving):
            task.cancel()
        # Its own clean-up is over before the caller's begins.
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """A response of server-sent events: each object a `data:` line, `[DONE]` the last.

    Args:
        objects: what is sent, some at a time; it turns its own errors into objects.
        close: called once, whatever happens.
    """

    def __init__(self, objects: AsyncIterator[list[dict[str, Any]]], close: Callable[[], None]) -> None:
        self._objects = objects
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send_all(send))
        except ClientGone:
            return
        finally:
            self._close()

    async def _send_all(self, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # a proxy is to pass each piece on at once
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for items in self._objects:
            text = "".join(f"data: {_to_json(item)}\n\n" for item in items)
            await send({"type": "http.response.body", "body": text.encode("utf-8"), "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
