"""The guide as a site: it builds without a warning, and a page shows its own language."""

import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from tests.docs.pages import ROOT
from tests.pages.browser import CHROMIUM, needs_chromium


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    folder = tmp_path_factory.mktemp("site") / "site"
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_it_builds_strictly(site):
    assert "三分钟上手" in (site / "zh" / "index.html").read_text(encoding="utf-8")


class Menu(HTMLParser):
    """The first links of the menu's entries that are shown, and where the language's switch leads."""

    def __init__(self, text):
        super().__init__()
        self.shown, self.switch, self.language = [], {}, ""
        self._hidden = 0
        self._menu = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        classes = (given.get("class") or "").split()
        self._menu = self._menu or "md-nav--primary" in classes
        if tag == "html":
            self.language = given["lang"]
        if tag == "li" and (self._hidden or "none" in (given.get("style") or "")):
            self._hidden += 1
        if tag == "a" and "md-select__link" in classes:
            self.switch[given["hreflang"]] = given["href"]
        if tag == "a" and self._menu and not self._hidden and "md-nav__link" in classes:
            self.shown.append(given["href"])

    def handle_endtag(self, tag):
        if tag == "li" and self._hidden:
            self._hidden -= 1


@needs_chromium
@pytest.mark.parametrize(
    ("page", "language", "other", "there"),
    [
        ("planning.html", "en", "zh", "/zh/planning.html"),
        ("zh/planning.html", "zh", "en", "/planning.html"),
        ("errors.html", "en", "zh", "/errors.zh-CN.html"),
        ("errors.zh-CN.html", "zh", "en", "/errors.html"),
        ("families.html", "en", "zh", "zh/index.html"),
    ],
)
def test_a_page_shows_its_own_languages_menu(site, tmp_path, page, language, other, there):
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom",
        "--host-resolver-rules=MAP * ~NOTFOUND", (site / page).as_uri(),
    ]  # fmt: skip
    menu = Menu(subprocess.run(command, capture_output=True, text=True, timeout=90).stdout)
    pages = [link for link in menu.shown if not link.startswith("#")]
    mine = r"(?!\.\./(?!errors\.zh))" if page.startswith("zh/") else r"zh/|errors\.zh"
    chinese = {link for link in pages if re.match(mine, link)}
    assert menu.language == language and len(pages) > 15
    assert chinese == (set(pages) if language == "zh" else set())
    assert menu.switch[other].endswith(there)
