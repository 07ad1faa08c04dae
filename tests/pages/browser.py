"""A page in headless Chromium: opened in a frame of a given width, and asked what it shows."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

_ASKING = """
const frame = document.querySelector('iframe'), said = {errors: []};
frame.addEventListener('load', () => {
  const page = frame.contentDocument, view = frame.contentWindow;
  said.width = view.innerWidth;
  said.needs = page.documentElement.scrollWidth;
  said.background = view.getComputedStyle(page.body).backgroundColor;
  said.images = page.images.length;
  said.links = page.querySelectorAll('[src], [href]').length;
  said.small = [...page.querySelectorAll('.plot span, td, p, h1')].filter(
    part => parseFloat(view.getComputedStyle(part).fontSize) < 11).length;
  const plot = page.querySelector('.plot');
  if (plot) {
    const box = plot.getBoundingClientRect();
    said.before = page.querySelector('.readout').textContent;
    const place = {clientX: box.left + box.width * AT_POINTER, clientY: box.top + 5};
    plot.dispatchEvent(new view.PointerEvent('pointermove', place));
    said.readout = page.querySelector('.readout').textContent;
    plot.dispatchEvent(new view.PointerEvent('pointerleave'));
    said.after = page.querySelector('.readout').textContent;
  }
  said.ran = Boolean(view.evil);
  document.querySelector('pre').textContent = JSON.stringify(said);
});
"""


def ask(
    page: Path, folder: Path, *, width: int = 1200, dark: bool = False, at: float = 0.5
) -> dict[str, Any]:
    """What a page says of itself at a width; `at` is where a pointer stands over its first chart, from 0 to 1."""
    asking = folder / "asking.html"
    script = _ASKING.replace("AT_POINTER", str(at))
    asking.write_text(
        f'<!doctype html><meta charset="utf-8"><iframe style="width:{width}px;height:900px;border:0" '
        f'src="{page.resolve().as_uri()}"></iframe><pre></pre><script>{script}</script>',
        encoding="utf-8",
    )
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-web-security",
        "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=2000",
        f"--window-size={width + 100},1000", "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom",
        *(["--blink-settings=preferredColorScheme=0"] if dark else []), asking.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    said = re.search(r"<pre>(.+?)</pre>", done.stdout, re.S)
    assert said is not None, done.stderr[-2000:]
    answers: dict[str, Any] = json.loads(html.unescape(said[1]))
    return answers
