"""Headless Chromium, spoken to over a pipe in its own protocol (JSON, a NUL byte after each message)."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = [
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # tests run as root in containers; the pages are our own
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
]


def chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


@contextmanager
def browser(program: str, profile: Path) -> Iterator[Browser]:
    to_read, to_write = os.pipe(), os.pipe()
    # The browser reads from descriptor 3 and writes to 4; ours must not be these when they are moved there.
    theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (to_read[0], to_write[1])]
    mover = (
        "import os, sys; a, b, *c = sys.argv[1:]; os.dup2(int(a), 3); os.dup2(int(b), 4); os.execv(c[0], c)"
    )
    command = [sys.executable, "-ISc", mover, *map(str, theirs), program, *FLAGS]
    command += [f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, pass_fds=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for fd in (to_read[0], to_write[1], *theirs):
        os.close(fd)
    found = Browser(to_write[0], to_read[1])
    try:
        yield found
    finally:
        found.send("Browser.close")
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(to_write[0])
        os.close(to_read[1])


class Browser:
    """The pipe: commands with their results, and events as they come."""

    def __init__(self, read_from: int, write_to: int) -> None:
        self._read_from, self._write_to = read_from, write_to
        self._rest = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []

    def send(self, method: str, where: str | None = None, **parameters: Any) -> int:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if where is not None:
            message["sessionId"] = where
        os.write(self._write_to, json.dumps(message).encode() + b"\0")
        return self._number

    def call(self, method: str, where: str | None = None, **parameters: Any) -> dict[str, Any]:
        number = self.send(method, where, **parameters)
        while True:
            message = self._next(20)
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            if "method" in message:
                self.events.append(message)

    def _next(self, seconds: float) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read_from], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser says nothing"
            self._rest += os.read(self._read_from, 1 << 16)
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def open(
        self, address: str, *, width: int = 1000, height: int = 720, dark: bool = False, phone: bool = False
    ) -> Page:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        where = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, where)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.call("Page.navigate", url=address)
        page.until("document.readyState === 'complete'")
        return page


class Page:
    """One tab."""

    def __init__(self, of: Browser, where: str) -> None:
        self._browser, self._where = of, where

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._where, **parameters)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 15.0) -> None:
        end = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < end, f"{expression} did not come true"
            time.sleep(0.02)

    def write(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def press_enter(self) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key="Enter",
                code="Enter",
                windowsVirtualKeyCode=13,
                text="\r" if kind == "keyDown" else "",
            )

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def events(self, method: str) -> list[dict[str, Any]]:
        self.value("0")  # collect what is on its way
        return [
            event["params"]
            for event in self._browser.events
            if event["method"] == method and event.get("sessionId") == self._where
        ]

    def complaints(self) -> list[str]:
        """Errors of scripts, of the content policy and of the network."""
        thrown = [e["exceptionDetails"]["text"] for e in self.events("Runtime.exceptionThrown")]
        return thrown + [e["entry"]["text"] for e in self.events("Log.entryAdded")]
