"""Requests that must not be answered: of other sites, without a token, too large, too slow, or no HTTP at all."""

from __future__ import annotations

import json
import socket
import time
from contextlib import suppress
from dataclasses import replace

import pytest

from pronghorn.errors import CannotServe
from pronghorn.inference.server.guard import Limits, is_loopback
from pronghorn.inference.server.listen import Server
from tests.inference.server.fakes import FakeEngine, saying, served_model
from tests.inference.server.running import ask, call, connected, raw_request, running, until

SMALL = Limits(body_bytes=4000, body_seconds=0.7, head_seconds=0.7, write_seconds=0.7)
CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def server():
    engine = FakeEngine(saying("Hello."))
    with running(lambda: (engine, served_model()), limits=SMALL) as found:
        found.engine = engine
        yield found


@pytest.fixture(scope="module")
def locked():
    origins = frozenset({"https://friend.example"})
    engine = FakeEngine(saying("Hello."))
    with running(lambda: (engine, served_model()), token="secret", origins=origins) as found:
        yield found


def received(client: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    data = b""
    with suppress(ConnectionResetError):
        while chunk := client.recv(1 << 16):
            data += chunk
    return data


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:9999", "[::1]:80", "LOCALHOST"])
def test_names_of_this_machine(server, host):
    assert call(server, "GET", "/v1/models", Host=host)[0] == 200


@pytest.mark.parametrize("host", ["rebound.example", "127.0.0.1.evil.example", "192.168.0.9:8000", "", "["])
def test_a_name_that_was_made_to_point_here(server, host):
    """A page of rebound.example, whose address became 127.0.0.1, is of the same origin for a browser."""
    status, _, answer = call(server, "GET", "/v1/models", Host=host)
    assert status in (400, 403)
    assert status == 400 or answer["error"]["code"] == "wrong_host"


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", "http://["])
def test_pages_of_other_sites(server, origin):
    status, headers, answer = call(server, "POST", CHAT, HELLO, Origin=origin)
    assert (status, answer["error"]["code"]) == (403, "wrong_origin")
    assert "access-control-allow-origin" not in headers


def test_the_servers_own_page_may_call(server):
    here = f"127.0.0.1:{server.port}"
    assert call(server, "POST", CHAT, HELLO, Origin=f"http://{here}", Host=here)[0] == 200


def test_no_preflight_is_granted(server):
    """Without one, a browser does not send JSON for a page of another site."""
    status, headers, _ = call(
        server, "OPTIONS", CHAT, Origin="https://evil.example", Access_Control_Request_Method="POST"
    )
    assert status == 403
    assert not any(name.startswith("access-control") for name in headers)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_form_is_no_call(server, kind):
    status, _, answer = call(server, "POST", CHAT, json.dumps(HELLO).encode(), Content_Type=kind)
    assert (status, answer["error"]["code"]) == (415, "unsupported_media_type")


def test_a_page_that_was_allowed(locked):
    friend = "https://friend.example"
    status, headers, _ = call(
        locked,
        "OPTIONS",
        CHAT,
        Origin=friend,
        Access_Control_Request_Method="POST",
        Access_Control_Request_Headers="authorization",
    )
    assert (status, headers["access-control-allow-origin"]) == (200, friend)
    status, headers, _ = call(locked, "POST", CHAT, HELLO, Origin=friend, Authorization="Bearer secret")
    assert (status, headers["access-control-allow-origin"]) == (200, friend)
    assert call(locked, "POST", CHAT, HELLO, Origin="https://evil.example")[0] == 403
    for host, expected in (("friend.example", 200), ("evil.example", 403)):
        assert call(locked, "GET", "/health", Host=host)[0] == expected


@pytest.mark.parametrize(
    "header", [None, "secret", "Bearer", "Bearer secre", "Bearer secret2", "Basic secret"]
)
def test_without_the_token(locked, header):
    headers = {"Authorization": header} if header else {}
    for method, path, body in [("GET", "/v1/models", None), ("GET", "/metrics", None), ("POST", CHAT, HELLO)]:
        status, got, answer = call(locked, method, path, body, **headers)
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert got["www-authenticate"] == "Bearer"
    assert call(locked, "GET", "/health")[0] == 200


def test_with_the_token(locked):
    assert call(locked, "GET", "/v1/models", Authorization="bearer secret")[0] == 200


@pytest.mark.parametrize(
    "host,local", [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("0.0.0.0", False), ("::", False)]
)
def test_which_addresses_are_this_machine(host, local):
    assert is_loopback(host) is local


@pytest.mark.parametrize("token", [None, ""])
def test_others_need_a_token(token):
    with pytest.raises(CannotServe, match="can be reached by others"):
        Server(lambda: (FakeEngine(saying("")), served_model()), host="0.0.0.0", token=token)


def test_a_token_that_no_header_carries():
    with pytest.raises(CannotServe, match="header"):
        Server(lambda: (FakeEngine(saying("")), served_model()), token="gehéim")


def test_an_address_that_is_taken(server):
    with pytest.raises(CannotServe, match=f"port {server.port}"):
        Server(lambda: (FakeEngine(saying("")), served_model()), port=server.port)


def test_unknown_paths_and_methods(server):
    status, _, answer = call(server, "GET", "/v2/models")
    assert (status, answer["error"]["type"]) == (404, "invalid_request_error")
    assert call(server, "GET", "/health/")[0] == 404
    status, headers, answer = call(server, "GET", CHAT)
    assert (status, headers["allow"]) == (405, "POST")
    assert "GET" in answer["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b'{"messages": NaN}'])
def test_bodies_that_are_no_json(server, body):
    status, _, answer = call(server, "POST", CHAT, body)
    assert (status, answer["error"]["code"]) == (400, "invalid_json")


def test_a_body_that_is_too_large(server):
    status, headers, answer = ask(server, user="x" * 5000)
    assert (status, answer["error"]["code"]) == (413, "body_too_large")
    assert headers["connection"] == "close"
    assert ask(server, user="x" * 3000)[0] == 200


def test_a_body_that_announces_too_much_is_not_waited_for(server):
    with connected(server) as client:
        client.sendall(
            b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n" % CHAT.encode()
        )
        assert received(client).startswith(b"HTTP/1.1 413 ")


def test_a_client_that_asks_before_it_sends(server):
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 5000\r\n\r\n"
    with connected(server) as client:
        client.sendall(head % CHAT.encode())
        assert received(client).startswith(b"HTTP/1.1 413 ")


def test_a_chunked_body_that_does_not_end(server):
    with connected(server) as client:
        client.sendall(
            b"POST %s HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" % CHAT.encode()
        )
        chunk = b"1000\r\n" + b"x" * 0x1000 + b"\r\n"
        for _ in range(3):
            client.sendall(chunk)
        assert received(client).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_is_too_slow(server):
    request = raw_request(CHAT, HELLO)
    with connected(server) as client:
        client.sendall(request[:-5])
        began = time.monotonic()
        assert received(client).startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\n"])
def test_a_head_that_is_too_slow(server, sent):
    with connected(server) as client:
        client.sendall(sent)
        assert received(client) == b""


def test_a_head_that_drips(server):
    """A byte now and then does not make the time begin anew, on a second request either."""
    with connected(server) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        while b"ready" not in client.recv(1 << 16):
            pass
        client.settimeout(0.05)
        began = time.monotonic()
        assert drips(client, 100) < 100
        assert time.monotonic() - began < 3


def drips(client: socket.socket, count: int) -> int:
    """Bytes that could be sent one by one before the server closed the connection."""
    for sent in range(count):
        try:
            client.sendall(b"G")
            if client.recv(1) == b"":
                return sent
        except TimeoutError:
            continue
        except ConnectionError:
            return sent
    return count


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"HELO there\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",  # no Host
        b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 600_000,
    ],
    ids=["tls", "helo", "no-host", "two-hosts", "length", "encoding", "long"],
)
def test_what_is_no_http(server, sent):
    with connected(server) as client:
        with suppress(ConnectionError):
            client.sendall(sent)
        assert received(client)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 431", b"HTTP/1.1 501", b"")
    assert ask(server)[0] == 200


def test_a_reader_that_stops_reading_is_let_go():
    """Its answer is cancelled, once what the sockets hold is full."""
    engine = FakeEngine(lambda request: [70] * 10_000)
    model = served_model(context=20_000)
    with running(lambda: (engine, model), limits=replace(SMALL, write_seconds=0.3)) as server:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", server.port))
            client.sendall(raw_request(CHAT, {**HELLO, "stream": True, "logprobs": True, "top_logprobs": 20}))
            until(lambda: bool(engine.submitted))
            until(lambda: bool(engine.cancelled), 20)
        assert not engine.has_work
        assert ask(server, max_tokens=2)[0] == 200
