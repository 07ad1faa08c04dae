"""What a request must be before anything is done with it: where it comes from, who sends it, how large and how slow."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pronghorn.inference.server.problems import CallProblem

#: Read without a token: whether the server runs, and the page that asks for the token.
OPEN_PATHS = frozenset({"/", "/health"})
LINGER_SECONDS = 1.0


@dataclass(frozen=True)
class Limits:
    """What one client may take of the server.

    Args:
        body_bytes: of a request.
        body_seconds: for a request's body to arrive in.
        head_seconds: for a request's head to arrive in.
        write_seconds: for a client to read on, once it leaves its answer lying.
        connections: at a time.
        grace_seconds: for answers to end in, when the server is told to stop.
    """

    body_bytes: int = 8 << 20
    body_seconds: float = 30.0
    head_seconds: float = 15.0
    write_seconds: float = 30.0
    connections: int = 1024
    grace_seconds: float = 20.0


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Guard:
    """ASGI middleware around the whole application.

    Args:
        token: what callers must show; None lets everyone in.
        loopback: the server listens on this machine alone. Then the Host header must name this machine: a page of
            another site whose name was made to point here (DNS rebinding) sends its own name.
        origins: web pages elsewhere that may call, such as https://chat.example.org; their hosts may be this one, too
            (behind a proxy that passes the Host header on).
    """

    def __init__(
        self, app: ASGIApp, *, token: str | None, loopback: bool, origins: frozenset[str], limits: Limits
    ) -> None:
        self._app = app
        self._token = None if token is None else token.encode("utf-8")
        self._loopback = loopback
        self._origins = origins
        self._hosts = {_split(origin).hostname for origin in origins}
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        try:
            self._check_place(headers)
            self._check_token(scope, headers)
            body = await self._read(headers, receive)
        except CallProblem as problem:
            # What is left of the body is not read, so the connection cannot be used for another request.
            response = JSONResponse(
                problem.as_dict(), problem.status, {**problem.headers, "Connection": "close"}
            )
            await response(scope, receive, send)
            return
        await self._app(scope, _replayed(body, receive), send)

    def _check_place(self, headers: Headers) -> None:
        host = headers.get("host", "")
        name = _split(f"//{host}").hostname or ""
        if self._loopback and not is_loopback(name) and name not in self._hosts:
            raise CallProblem(403, f"the host '{host}' is not this machine", code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and origin not in self._origins and _split(origin).netloc != host:
            raise CallProblem(403, f"pages of {origin} may not call this server", code="wrong_origin")

    def _check_token(self, scope: Scope, headers: Headers) -> None:
        if self._token is None or scope["path"] in OPEN_PATHS:
            return
        kind, _, shown = headers.get("authorization", "").partition(" ")
        # Header values are latin-1 in ASGI.
        if kind.lower() != "bearer" or not hmac.compare_digest(shown.strip().encode("latin-1"), self._token):
            raise CallProblem(401, "the token is missing or wrong", code="invalid_api_key")

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        """The whole body.

        Raises:
            CallProblem: 413 when it is too large, 408 when it takes too long.
        """
        most = self._limits.body_bytes
        length = headers.get("content-length", "0")
        announced = int(length) if length.isdecimal() else 0
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                more = announced <= most
                while more:
                    chunk, more = await _next_chunk(receive)
                    body += chunk
                    more = more and len(body) <= most
        except TimeoutError:
            raise CallProblem(408, "the body did not arrive in time", code="timeout") from None
        if max(announced, len(body)) <= most:
            return bytes(body)
        # A client that waits for "100 Continue" sends nothing, and one that means to send far too much is cut off.
        if "expect" not in headers and announced <= 8 * most:
            await _discard(receive, 8 * most)
        raise CallProblem(413, f"the body exceeds {most} bytes", code="body_too_large")


async def _next_chunk(receive: Receive) -> tuple[bytes, bool]:
    """(what came of the body, whether there is more)."""
    message = await receive()
    return message.get("body", b""), message.get("more_body", False)


async def _discard(receive: Receive, most: int) -> None:
    """Read on for a moment: a client that is still sending would see the connection break instead of the answer."""
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            more = True
            while more and most > 0:
                chunk, more = await _next_chunk(receive)
                most -= len(chunk)


def _split(address: str) -> SplitResult:
    """The parts of a URL; of none where it is no URL."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read already, then what comes after it."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
