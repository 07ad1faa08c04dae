"""The engine's thread: queue, cancelling, failing, starting and stopping."""

from __future__ import annotations

import http.client
import json
import signal
import threading
from contextlib import suppress

import pytest

from pronghorn.errors import ModelNotFound, RequestTooLong
from pronghorn.inference.server.guard import Limits
from pronghorn.inference.server.listen import Server
from tests.inference.server.fakes import FakeEngine, saying, served_model
from tests.inference.server.running import ask, call, connected, raw_request, running, until
from tests.tiny import tiny_tokenizer

LONG = [70] * 10_000
MODEL = served_model(context=100_000)
CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hi"}]}


def endless(**arguments):
    return FakeEngine(lambda request: LONG, pause=0.002, **arguments)


def in_background(target, *arguments, **keywords):
    results = []
    thread = threading.Thread(target=lambda: results.append(target(*arguments, **keywords)), daemon=True)
    thread.start()
    return thread, results


def test_the_engine_has_one_thread():
    engine = FakeEngine(saying("Hello."))
    with running(lambda: (engine, MODEL)) as server:
        for _ in range(3):
            ask(server)
    assert len(engine.threads) == 1
    assert threading.get_ident() not in engine.threads


def test_requests_run_side_by_side():
    engine = FakeEngine(lambda request: [70] * 50, pause=0.01, max_batch=4)
    with running(lambda: (engine, MODEL)) as server:
        started = [in_background(ask, server, max_tokens=50) for _ in range(4)]
        for thread, _ in started:
            thread.join(20)
        assert [results[0][0] for _, results in started] == [200] * 4
        assert server.worker.counts.tokens == 4 * 50
        assert server.worker.counts.steps < 3 * 50


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place(stream):
    engine = endless(max_batch=2)
    with running(lambda: (engine, MODEL)) as server:
        with connected(server) as client:
            client.sendall(raw_request(CHAT, {**HELLO, "stream": stream, "n": 2}))
            until(lambda: engine.running == 2)
            assert engine.free_blocks == 0
            if stream:
                assert b"200 OK" in client.recv(1 << 16)
        until(lambda: not engine.has_work)
        assert sorted(engine.cancelled) == [0, 1]
        assert engine.free_blocks == engine.total_blocks
        assert server.worker.open_requests == 0


def test_a_client_that_goes_away_while_it_waits():
    engine = endless(max_batch=1)
    with running(lambda: (engine, MODEL)) as server:
        with connected(server) as first, connected(server) as second:
            first.sendall(raw_request(CHAT, HELLO))
            until(lambda: engine.running == 1)
            second.sendall(raw_request(CHAT, HELLO))
            until(lambda: engine.waiting == 1)
            second.close()
            until(lambda: engine.cancelled == [1])


def test_a_full_queue():
    engine = endless(max_batch=1)
    with running(lambda: (engine, MODEL), most_open=2) as server:
        with connected(server) as first:
            first.sendall(raw_request(CHAT, {**HELLO, "n": 2}))
            until(lambda: server.worker.open_requests == 2)
            status, headers, answer = ask(server, max_tokens=1)
            assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
            assert int(headers["retry-after"]) >= 1
        until(lambda: server.worker.open_requests == 0)
        assert ask(server, max_tokens=1)[0] == 200


def test_a_call_that_never_fits_the_queue():
    with running(lambda: (endless(), MODEL), most_open=2) as server:
        status, _, answer = ask(server, n=3)
        assert (status, answer["error"]["param"]) == (400, "n")


def test_a_stop_string_ends_the_request():
    tokens = tiny_tokenizer()("one two ", add_special_tokens=False)["input_ids"] * 500
    engine = FakeEngine(lambda request: tokens, pause=0.001)
    with running(lambda: (engine, MODEL)) as server:
        answer = ask(server, stop="two")[2]
        assert answer["choices"][0]["message"]["content"] == "one "
        until(lambda: engine.cancelled == [0])
        assert answer["usage"]["completion_tokens"] < 20


def test_while_the_model_is_loaded():
    go = threading.Event()

    def load():
        go.wait(10)
        return FakeEngine(saying("Hello.")), MODEL

    with running(load, wait=False) as server:
        until(lambda: call(server, "GET", "/health")[0] == 503)
        assert call(server, "GET", "/health")[2] == {"status": "starting"}
        status, headers, answer = ask(server)
        assert (status, answer["error"]["code"]) == (503, "server_starting")
        assert "retry-after" in headers
        go.set()
        until(lambda: call(server, "GET", "/health")[0] == 200)
        assert ask(server)[0] == 200


def test_a_model_that_cannot_be_loaded_ends_the_server():
    def load():
        raise ModelNotFound("there is no model")

    with pytest.raises(ModelNotFound):
        Server(load).run()


class Refusing(FakeEngine):
    def submit(self, request):
        raise RequestTooLong("too long for the cache", fix="at most 7 new tokens")


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses(stream):
    with running(lambda: (Refusing(saying("")), MODEL)) as server:
        status, _, answer = ask(server, stream=stream)
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        assert "at most 7" in answer["error"]["message"]


class Broken(FakeEngine):
    def submit(self, request):
        raise KeyError("a mistake of ours")


def test_a_mistake_of_ours_is_logged(caplog):
    with running(lambda: (Broken(saying("")), MODEL)) as server:
        status, _, answer = ask(server)
    assert (status, answer["error"]["type"]) == (500, "server_error")
    assert "mistake" not in answer["error"]["message"] and "a mistake of ours" in caplog.text


class Failing(FakeEngine):
    """Fails in its third step, and if `again` in every one from then on."""

    def __init__(self, again: bool) -> None:
        super().__init__(lambda request: [70] * 5)
        self.steps, self.again = 0, again

    def step(self):
        self.steps += 1
        if self.steps == 3 or (self.steps > 3 and self.again):
            raise RuntimeError("device on fire")
        return super().step()


def test_one_failure_is_survived(caplog):
    engine = Failing(again=False)
    with running(lambda: (engine, MODEL)) as server:
        status, _, answer = ask(server)
        assert (status, answer["error"]["type"]) == (500, "server_error")
        assert "fire" not in answer["error"]["message"]  # that is for the log
        assert engine.cancelled == [0]
        assert ask(server)[0] == 200
    assert "device on fire" in caplog.text


def test_a_failure_within_a_stream():
    engine = Failing(again=False)
    with running(lambda: (engine, MODEL)) as server:
        status, _, text = ask(server, stream=True)
        assert status == 200
        lines = [line[6:] for line in text.split("\n\n") if line]
        assert json.loads(lines[-2])["error"]["code"] == "engine_failed"
        assert lines[-1] == "[DONE]"


def test_an_engine_that_goes_on_failing_ends_the_server():
    server = Server(lambda: (Failing(again=True), MODEL))
    ended = []

    def run():
        try:
            server.run()
        except RuntimeError as error:
            ended.append(str(error))

    thread, _ = in_background(run)
    until(lambda: server.worker.state == "ready")
    assert ask(server)[0] == 500
    with suppress(ConnectionError, http.client.HTTPException):  # it may have gone already
        assert ask(server)[0] in (500, 503)
    thread.join(10)
    assert not thread.is_alive()
    assert server.worker.state == "failed"
    assert ended == ["device on fire"]


def test_stopping_lets_answers_end():
    engine = FakeEngine(lambda request: [70] * 60, pause=0.01)
    with running(lambda: (engine, MODEL)) as server:
        thread, results = in_background(ask, server, max_tokens=60)
        with connected(server) as idle:
            until(lambda: engine.has_work)
            server.stop()
            until(lambda: server.worker.state == "stopping")
            thread.join(20)
            assert results[0][0] == 200
            assert results[0][2]["usage"]["completion_tokens"] == 60
            assert idle.recv(1) == b""  # nobody waits for a connection that asks nothing


def test_stopping_does_not_wait_for_ever():
    engine = endless()
    with running(lambda: (engine, MODEL), limits=Limits(grace_seconds=0.3)) as server:
        thread, results = in_background(ask, server, stream=True)
        until(lambda: engine.has_work)
        server.stop()
        thread.join(20)
        status, _, text = results[0]
        assert status == 200
        assert json.loads(text.split("\n\n")[-3][6:])["error"]["code"] == "server_stopping"
        until(lambda: not engine.has_work)


def test_a_second_signal_ends_answers_and_a_third_waits_for_nothing():
    engine = endless()
    with running(lambda: (engine, MODEL)) as server:
        thread, results = in_background(ask, server, stream=True)
        until(lambda: engine.has_work)
        server._http.handle_exit(signal.SIGINT, None)
        until(lambda: server.worker.state == "stopping")
        assert engine.has_work
        server._http.handle_exit(signal.SIGINT, None)
        thread.join(20)
        assert "server_stopping" in results[0][2]
        server._http.handle_exit(signal.SIGINT, None)
        until(lambda: server._http.force_exit)


def test_metrics():
    engine = FakeEngine(saying("Hello."))
    with running(lambda: (engine, MODEL)) as server:
        tokens = ask(server)[2]["usage"]["completion_tokens"]
        status, headers, text = call(server, "GET", "/metrics")
        assert (status, headers["content-type"].partition(";")[0]) == (200, "text/plain")
        values = dict(line.split() for line in text.splitlines())
        assert int(values["pronghorn_tokens_generated_total"]) == tokens
        assert values["pronghorn_cache_blocks_free"] == values["pronghorn_cache_blocks"] == "8"
        assert values["pronghorn_requests_open"] == "0"
