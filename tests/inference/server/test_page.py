"""The chat page in a real browser."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

from tests.inference.server import browser as browsers
from tests.inference.server.fakes import FakeEngine, saying, served_model
from tests.inference.server.running import call, running, until
from tests.tiny import tiny_tokenizer

HOSTILE = "Use <b>bold</b>: <img src=x onerror='window.stolen=1'><script>window.stolen=1</script> &amp; é🦌"


def answering(request):
    """Hostile markup when asked for it, and a long answer when asked for that."""
    question = tiny_tokenizer().decode(request.prompt_ids)
    if "long" in question:
        return tiny_tokenizer()("word after word, ", add_special_tokens=False)["input_ids"] * 400
    return saying(HOSTILE if "markup" in question else "Grass, sagebrush and cactus.")(request)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = browsers.chromium()
    if program is None:
        pytest.skip("there is no Chromium on this machine")
    with browsers.browser(program, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def server():
    engine = FakeEngine(answering, pause=0.004)
    with running(lambda: (engine, served_model(context=100_000))) as found:
        found.engine = engine
        yield found


def opened(browser, server, **view):
    page = browser.open(f"http://127.0.0.1:{server.port}/", **view)
    page.until("!document.getElementById('model').disabled")
    return page


def question(page, text):
    page.value("document.getElementById('question').focus()")
    page.write(text)
    page.press_enter()


LAST = "[...document.querySelectorAll('.said.assistant .text')].at(-1)"
DONE = "document.getElementById('stop').hidden && document.querySelector('.note') !== null"


def test_the_headers_let_nothing_else_run(server):
    status, headers, _ = call(server, "GET", "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff"


def test_the_page_is_one_file_that_makes_no_markup():
    text = files("pronghorn.inference.server").joinpath("page.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|//cdn|\bsrc=|\bhref=|url\(|@import", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", text)
    assert not re.search(r"\son[a-z]+=", text)


def test_a_conversation(browser, server):
    page = opened(browser, server)
    assert page.value("[...document.getElementById('model').options].map((o) => o.value)") == [
        "tiny",
        "formal",
    ]
    question(page, "What does it eat?")
    page.until(DONE)
    assert page.value(f"{LAST}.textContent") == "Grass, sagebrush and cactus."
    assert re.fullmatch(r"\d+ tokens in \d+\.\d s", page.value("document.querySelector('.note').textContent"))
    question(page, "And then?")
    page.until(f"{DONE} && document.querySelectorAll('.note').length === 2")
    prompt = tiny_tokenizer().decode(server.engine.submitted[-1].prompt_ids)
    assert prompt.count("<|im_start|>") == 4 and "cactus.<|im_end|>" in prompt and "And then?" in prompt
    here = f"http://127.0.0.1:{server.port}/"
    assert all(e["request"]["url"].startswith(here) for e in page.events("Network.requestWillBeSent"))
    assert page.complaints() == []


def test_an_answer_comes_piece_by_piece_and_can_be_stopped(browser, server):
    page = opened(browser, server)
    question(page, "a long one")
    page.until(f"{LAST}?.textContent.length > 20")
    first = page.value(f"{LAST}.textContent")
    page.until(f"{LAST}.textContent.length > {len(first)}")
    before = len(server.engine.cancelled)
    page.value("document.getElementById('stop').click()")
    until(lambda: len(server.engine.cancelled) > before and not server.engine.has_work)
    page.until(DONE)
    assert page.value("document.querySelector('.note').textContent") == "stopped"
    assert page.value(f"{LAST}.textContent").startswith(first)


def test_a_new_chat_forgets_the_old_one(browser, server):
    page = opened(browser, server)
    question(page, "a long one")
    page.until(f"{LAST}?.textContent.length > 20")
    page.value("document.getElementById('anew').click()")
    until(lambda: not server.engine.has_work)
    question(page, "What does it eat?")
    page.until(DONE)
    assert page.value("document.querySelectorAll('.said').length") == 2
    assert "long" not in tiny_tokenizer().decode(server.engine.submitted[-1].prompt_ids)


def test_markup_stays_text(browser, server):
    page = opened(browser, server)
    question(page, "markup <i id=mine>please</i>")
    page.until(DONE)
    assert page.value(f"{LAST}.textContent") == HOSTILE
    assert page.value("document.querySelectorAll('#talk b, #talk img, #talk script, #mine').length") == 0
    assert page.value("window.stolen === undefined")
    assert page.complaints() == []


def test_the_content_policy_stops_what_is_injected(browser, server):
    page = opened(browser, server)
    page.value("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.stolen=1\">')")
    page.value("document.head.append(Object.assign(document.createElement('script'), {text: 'stolen=1'}))")
    assert page.value("fetch('https://elsewhere.invalid/').then(() => false, () => true)")
    assert page.value("window.stolen === undefined")
    assert any("Content Security Policy" in text for text in page.complaints())


def test_the_adapter_and_settings_that_were_chosen(browser, server):
    page = opened(browser, server)
    page.value("document.getElementById('model').value = 'formal'")
    page.value("document.getElementById('temperature').value = '0'")
    page.value("document.getElementById('most').value = '3'")
    page.value("document.getElementById('system').value = 'Be brief.'")
    question(page, "What does it eat?")
    page.until(DONE)
    request = server.engine.submitted[-1]
    assert (request.adapter, request.sampling.temperature, request.sampling.max_new_tokens) == (
        "adapter0",
        0,
        3,
    )
    assert tiny_tokenizer().decode(request.prompt_ids).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert page.value("document.querySelector('.said.assistant .who').textContent") == "formal"
    assert page.value("document.querySelector('.note').textContent").endswith("cut at the limit")


def test_an_error_is_told_and_can_be_tried_again(browser, server):
    page = opened(browser, server)
    page.value("document.getElementById('most').value = '1000000'")
    question(page, "What does it eat?")
    page.until("document.querySelector('.error') !== null")
    assert "exceed the context" in page.value("document.querySelector('.error').textContent")
    page.value("document.getElementById('most').value = ''")
    page.value("document.querySelector('.error button').click()")
    page.until(DONE)
    assert page.value(f"{LAST}.textContent") == "Grass, sagebrush and cactus."


def test_a_token_is_asked_for(browser):
    engine = FakeEngine(saying("Hello."))
    with running(lambda: (engine, served_model()), token="secret") as server:
        page = browser.open(f"http://127.0.0.1:{server.port}/")
        for shown in ("wrong", "secret"):
            page.until("document.getElementById('door').open")
            page.value(f"document.getElementById('token').value = '{shown}'")
            page.value("document.querySelector('#door button').click()")
            page.until(
                f"document.getElementById('door-text').textContent.includes('wrong') || '{shown}' == 'secret'"
            )
        page.until("!document.getElementById('model').disabled")
        question(page, "Hi")
        page.until(DONE)
        assert page.value(f"{LAST}.textContent") == "Hello."


@pytest.mark.parametrize("dark", [False, True])
def test_a_narrow_screen_and_a_dark_one(browser, server, dark):
    page = opened(browser, server, width=320, height=560, phone=True, dark=dark)
    question(page, "x" * 200)
    page.until(DONE)
    assert page.value("document.documentElement.scrollWidth") == 320
    assert page.value("document.getElementById('send').getBoundingClientRect().right") <= 320
    shade = page.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", shade)[:3])) < 200) is dark
