"""A stand-in for the hub's HTTP API on this machine: repositories, preupload, LFS, commits, and ways to fail."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

WRITE, READ = "hf_write_0123456789", "hf_read_0123456789"


class Hub:
    """What the stand-in knows, and what it was asked."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.messages: list[str] = []
        self.asked: list[tuple[str, str]] = []
        self.objects: dict[str, bytes] = {}
        #: an upload of a large file ends with a closed connection, that many times
        self.breaks = 0
        #: a commit is answered with this status and an echo of the token
        self.refuses: int | None = None


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, value: Any = None, status: int = 200, **headers: str) -> None:
        raw = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(raw)

    def _refused(self) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in (WRITE, READ):
            self._answer(
                {"error": f"Invalid credentials: {token}"},
                401,
                X_Error_Message="Invalid credentials in Authorization header",
            )
        elif token == READ and self.command == "POST":
            self._answer({"error": "Forbidden: you do not have the rights"}, 403)
        elif self.hub.refuses is not None and "/commit/" in self.path:
            self._answer({"error": f"it does not work, Bearer {token}"}, self.hub.refuses)
        else:
            return False
        return True

    def do_GET(self) -> None:
        self.hub.asked.append(("GET", self.path))
        if self._refused():
            return
        name = re.match(r"/api/models/([^/]+/[^/]+?)(?:/revision/.*)?$", self.path)
        if name is None or name[1] not in self.hub.private:
            self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return
        self._answer({"id": name[1], "private": self.hub.private[name[1]], "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        body = self._body()
        self.hub.asked.append(("POST", self.path))
        if self._refused():
            return
        if self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self._validate(json.loads(body)["content"])
        elif "/preupload/" in self.path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".gguf")) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif "/commit/" in self.path:
            self._commit(self.path.split("/api/models/")[1].split("/commit/")[0], body)
        else:
            self._answer({"error": "unknown"}, 404)

    def do_PUT(self) -> None:
        self.hub.asked.append(("PUT", self.path))
        if self.hub.breaks:
            self.hub.breaks -= 1
            self.close_connection = True
            self.connection.close()
            return
        data = self._body()
        oid = self.path.rsplit("/", 1)[1]
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.objects[oid] = data
        self._answer()

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        address = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.private:
            self._answer({**address, "error": "You already created this model repo"}, 409)
            return
        self.hub.private[name] = bool(asked.get("private") or asked.get("visibility") == "private")
        self.hub.files[name] = {}
        self._answer(address)

    def _validate(self, content: str) -> None:
        wrong = re.search(r"^base_model: (?:''|/.*)$", content, re.MULTILINE)
        errors = [{"message": '"base_model" is not valid'}] if wrong else []
        self._answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for item in asked["objects"]:
            if item["oid"] in self.hub.objects:  # arrived before
                objects.append(item)
                continue
            href = f"{self.hub.url}/objects/{item['oid']}"
            objects.append({**item, "actions": {"upload": {"href": href, "header": {}}}})
        self._answer({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif line["key"] == "file":
                self.hub.files[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.files[name][value["path"]] = self.hub.objects[value["oid"]]
        commit = {
            "commitUrl": f"{self.hub.url}/{name}/commit/1",
            "commitOid": "1" * 40,
            "pullRequestUrl": None,
        }
        self._answer(commit)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """The stand-in on a free port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    server.RequestHandlerClass = type("Handler", (_Handler,), {"hub": hub})
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
