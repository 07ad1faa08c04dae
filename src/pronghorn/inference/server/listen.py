"""Listening: sockets, the HTTP connection's own limits, starting and stopping."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from pronghorn.errors import CannotServe
from pronghorn.inference.server.app import build_app
from pronghorn.inference.server.guard import Limits, is_loopback
from pronghorn.inference.server.model import ServedModel
from pronghorn.inference.server.problems import CallProblem
from pronghorn.inference.server.worker import EngineLike, Worker

STANDARD = Limits()


class Server:
    """An engine behind HTTP.

    Args:
        load: makes the engine and says what it serves; called in the engine's thread after the address is taken.
        host, port: where to listen; port 0 takes a free one.
        token: what callers must show. Needed unless the address is this machine's own.
        most_open: answers that may run and wait at a time.
        origins: web pages elsewhere that may call.

    Raises:
        CannotServe: the address cannot be had, or would be open to everyone.
    """

    def __init__(
        self,
        load: Callable[[], tuple[EngineLike, ServedModel]],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        most_open: int = 256,
        origins: frozenset[str] = frozenset(),
        limits: Limits = STANDARD,
    ) -> None:
        loopback = is_loopback(host)
        if not loopback and not token:
            raise CannotServe(
                f"{host} can be reached by others, and there is no token",
                fix="give one with --token or PRONGHORN_TOKEN, or listen on 127.0.0.1",
            )
        if token and not (token.isascii() and token.isprintable() and " " not in token):
            raise CannotServe(
                "the token has characters that a header cannot carry", fix="use ASCII letters and digits"
            )
        self._limits = limits
        self._socket = _bound(host, port)
        self.worker = Worker(load, most_open=most_open, on_end=self.stop)
        app = build_app(self.worker, token=token, loopback=loopback, origins=origins, limits=limits)
        self._http = _Http(self._config(app, limits), lambda: self._from_anywhere(self._stop_harder))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended_answers = False

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    def run(self) -> None:
        """Serve until a signal or `stop`.

        Raises:
            Exception: what loading the model raised, or what ended the engine.
        """
        asyncio.run(self._serve())
        if self.worker.error is not None:
            raise self.worker.error

    def stop(self) -> None:
        """End `run`, from any thread, once what is being answered is done or the time of grace is over."""
        self._from_anywhere(self._stop_gently)

    def _from_anywhere(self, action: Callable[[], None]) -> None:
        """Run it in the event loop; from another thread or a signal's handler."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(action)

    def _stop_gently(self) -> None:
        """Nothing new, and an end to what takes too long."""
        if not self._http.should_exit and self._loop is not None:
            self._http.should_exit = True
            self.worker.refuse_new()
            self._loop.call_later(self._limits.grace_seconds, self._end_answers)

    def _end_answers(self) -> None:
        self._ended_answers = True
        self.worker.fail_open(CallProblem(503, "the server is stopping", code="server_stopping"))

    def _stop_harder(self) -> None:
        """What a signal does: stop; at the second one end all answers; at the third one do not even wait for that."""
        if not self._http.should_exit:
            self._stop_gently()
        elif not self._ended_answers:
            self._end_answers()
        else:
            self._http.force_exit = True

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.worker.start(self._loop)
        try:
            await self._http.serve(sockets=[self._socket])
        finally:
            await asyncio.to_thread(self.worker.stop)

    @staticmethod
    def _config(app: Any, limits: Limits) -> uvicorn.Config:
        class Protocol(_PatientConnection):
            head_seconds = limits.head_seconds
            write_seconds = limits.write_seconds

        return uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=limits.connections,
            # Answers that are ended by us end with a sentence; this is for those that even then do not.
            timeout_graceful_shutdown=round(limits.grace_seconds) + 5,
        )


class _Http(uvicorn.Server):
    """uvicorn's server, which leaves it to us what a signal means and does not raise it again at the end."""

    def __init__(self, config: uvicorn.Config, signalled: Callable[[], None]) -> None:
        super().__init__(config)
        self._signalled = signalled

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signalled()


class _PatientConnection(H11Protocol):
    """A connection whose client must send its request's head, and read its answer, within a time."""

    head_seconds: float
    write_seconds: float
    _head: asyncio.TimerHandle | None = None
    _write: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering and self._head is not None:
            self._head.cancel()
            self._head = None
        elif not answering and self._head is None:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head, self._write):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write = self.loop.call_later(self.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        if self._write is not None:
            self._write.cancel()
        super().resume_writing()

    def _await_head(self) -> None:
        self._head = self.loop.call_later(self.head_seconds, self.transport.abort)


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise CannotServe(
            f"cannot listen on {host}, port {port}: {error.strerror or error}",
            fix="choose another --port, or --port 0 for a free one",
        ) from error
