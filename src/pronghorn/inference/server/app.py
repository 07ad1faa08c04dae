"""The routes of the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from pronghorn.inference.server.answers import Answer, Piece
from pronghorn.inference.server.calls import Call, ChatCall, chat_call, completion_call
from pronghorn.inference.server.fields import parse_object
from pronghorn.inference.server.guard import Guard, Limits
from pronghorn.inference.server.model import ServedModel
from pronghorn.inference.server.page import chat_page
from pronghorn.inference.server.problems import CallProblem
from pronghorn.inference.server.shapes import ChatShape, CompletionShape, Shape, Usage
from pronghorn.inference.server.streams import ClientGone, EventStream, unless_gone
from pronghorn.inference.server.text import TokenNames
from pronghorn.inference.server.worker import Job, Worker, refusal

GONE = 499


def build_app(
    worker: Worker,
    *,
    token: str | None,
    loopback: bool,
    origins: frozenset[str] = frozenset(),
    limits: Limits,
) -> Starlette:
    """The ASGI application in front of a worker; arguments as `Guard`'s."""
    service = Service(worker)
    middleware = [Middleware(Guard, token=token, loopback=loopback, origins=origins, limits=limits)]
    if origins:
        asked_first = Middleware(
            CORSMiddleware,
            allow_origins=sorted(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
        middleware.insert(0, asked_first)
    app = Starlette(
        routes=[
            Route("/", service.page),
            Route("/health", service.health),
            Route("/metrics", service.metrics),
            Route("/v1/models", service.models),
            Route("/v1/models/{name:path}", service.model),
            Route("/v1/completions", service.completions, methods=["POST"]),
            Route("/v1/chat/completions", service.chat, methods=["POST"]),
        ],
        middleware=middleware,
        exception_handlers={CallProblem: _problem, HTTPException: _http_problem, Exception: _unexpected},
    )
    app.router.redirect_slashes = False  # to wherever the Host header says
    return app


class Service:
    """Endpoints over a worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        # Long prompts take a while to encode; the event loop goes on meanwhile. One thread keeps their order.
        self._encoding = ThreadPoolExecutor(1, "pronghorn-encode")

    async def page(self, request: Request) -> Response:
        return chat_page()

    async def health(self, request: Request) -> Response:
        ready = self._worker.state == "ready"
        return JSONResponse({"status": self._worker.state}, 200 if ready else 503)

    async def models(self, request: Request) -> Response:
        model = self._worker.check_ready()
        return JSONResponse({"object": "list", "data": [_described(model, name) for name in model.variants]})

    async def model(self, request: Request) -> Response:
        model = self._worker.check_ready()
        return JSONResponse(_described(model, model.variant_of(request.path_params["name"]).name))

    async def metrics(self, request: Request) -> Response:
        counts = self._worker.counts
        lines = [
            f"pronghorn_{name} {value}"
            for name, value in {
                "requests_open": self._worker.open_requests,
                "requests_running": counts.running,
                "requests_waiting": counts.waiting,
                "cache_blocks_free": counts.free_blocks,
                "cache_blocks": counts.total_blocks,
                "steps_total": counts.steps,
                "tokens_generated_total": counts.tokens,
            }.items()
        ]
        return PlainTextResponse("\n".join(lines) + "\n")

    async def chat(self, request: Request) -> Response | EventStream:
        return await self._answer(request, chat_call, ChatShape)

    async def completions(self, request: Request) -> Response | EventStream:
        return await self._answer(request, completion_call, CompletionShape)

    async def _answer(
        self, request: Request, parse: Callable[[dict[str, Any]], Call], shape_of: type[Shape]
    ) -> Response | EventStream:
        model = self._worker.check_ready()
        _check_json(request)
        call = parse(parse_object(await request.body()))
        variant = model.variant_of(call.model)
        prompts = await asyncio.get_running_loop().run_in_executor(self._encoding, model.prompts_of, call)
        requests = model.requests_of(call, prompts)
        shape = shape_of(variant.name, TokenNames(variant.tokenizer), call.logprobs)
        answers = [
            Answer(
                variant.tokenizer,
                call.stop,
                asked.sampling.stop_token_ids,
                before=() if isinstance(call, ChatCall) else asked.prompt_ids,
            )
            for asked in requests
        ]
        run = _Run(self._worker, self._worker.submit(requests), answers, sum(map(len, prompts)))
        streams = False
        try:
            await unless_gone(request.receive, run.taken())
            if call.stream:
                streams = True
                return EventStream(run.chunks(shape, call.include_usage), run.close)
            return JSONResponse(await unless_gone(request.receive, run.whole(shape)))
        except ClientGone:
            return Response(status_code=GONE)  # nobody reads it
        except Exception as error:
            raise refusal(error) from error
        finally:
            if not streams:
                run.close()


class _Run:
    """One call at work: its requests and the answers that grow out of them."""

    def __init__(self, worker: Worker, job: Job, answers: list[Answer], prompt_tokens: int) -> None:
        self._worker, self._job, self._answers = worker, job, answers
        self._prompt_tokens = prompt_tokens

    async def taken(self) -> None:
        await self._worker.taken(self._job)

    def close(self) -> None:
        self._worker.close(self._job)

    async def pieces(self) -> AsyncIterator[list[tuple[int, Piece]]]:
        """(which answer, what it gained since the last time) until all answers have ended."""
        async for events in self._worker.events(self._job):
            gained: dict[int, Piece] = {}
            for index, event in events:
                piece = self._answers[index].feed(event)
                if piece.finish is not None:
                    self._worker.cancel(self._job, index)  # a stop string ends it before the engine knows
                gained.setdefault(index, Piece()).add(piece)
            yield [(i, piece) for i, piece in gained.items() if piece.text or piece.tokens or piece.finish]

    async def whole(self, shape: Shape) -> dict[str, Any]:
        answers = [Piece() for _ in self._answers]
        async for pieces in self.pieces():
            for index, piece in pieces:
                answers[index].add(piece)
        return shape.whole(answers, self._usage())

    async def chunks(self, shape: Shape, include_usage: bool) -> AsyncIterator[list[dict[str, Any]]]:
        """What a stream tells at a time. What came while the client was slow is told in one chunk an answer."""
        begun: set[int] = set()
        nothing = {"usage": None} if include_usage else {}
        try:
            async for pieces in self.pieces():
                yield [
                    shape.chunk(index, piece, first=index not in begun) | nothing for index, piece in pieces
                ]
                begun.update(index for index, _ in pieces)
        except Exception as error:
            yield [refusal(error).as_dict()]  # the status was sent long ago
            return
        if include_usage:
            yield [shape.usage_chunk(self._usage())]

    def _usage(self) -> Usage:
        return Usage(self._prompt_tokens, sum(answer.token_count for answer in self._answers))


def _described(model: ServedModel, name: str) -> dict[str, Any]:
    described = {"id": name, "object": "model", "created": model.created, "owned_by": "pronghorn"}
    return described if name == model.base else {**described, "parent": model.base}


def _check_json(request: Request) -> None:
    """A page elsewhere can send plain text or forms without asking first, but not JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise CallProblem(415, "the Content-Type must be application/json", code="unsupported_media_type")


async def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, CallProblem)
    return JSONResponse(error.as_dict(), error.status, error.headers)


async def _http_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    text = {404: f"there is no {path}", 405: f"{path} does not take {method}"}
    problem = CallProblem(error.status_code, text.get(error.status_code, error.detail))
    return JSONResponse(problem.as_dict(), error.status_code, error.headers)


async def _unexpected(request: Request, error: Exception) -> Response:
    return JSONResponse(CallProblem(500, "unexpected; the server's log says more").as_dict(), 500)
