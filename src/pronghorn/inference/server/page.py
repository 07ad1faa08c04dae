"""The chat page: one file without anything from elsewhere, and headers that let it run nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from starlette.responses import Response


@cache
def _page() -> tuple[bytes, dict[str, str]]:
    text = files("pronghorn.inference.server").joinpath("page.html").read_text(encoding="utf-8")
    policy = {
        "default-src": "'none'",
        "script-src": _hash_of(text, "script"),
        "style-src": _hash_of(text, "style"),
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return text.encode("utf-8"), headers


def _hash_of(text: str, tag: str) -> str:
    """The policy's word for the one script or style in the page; anything that is injected has another hash."""
    inside = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    assert len(inside) == 1
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside[0].encode()).digest()).decode()}'"


def chat_page() -> Response:
    content, headers = _page()
    return Response(content, media_type="text/html", headers=headers)
