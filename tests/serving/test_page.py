"""The page to chat with: what it may load and run, and, in a browser, what it does."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import html.parser
import json
import re
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from l4jax.serving.app import build_app
from l4jax.serving.page import FILE, page_route
from tests.serving.running import call, running

CHAT = "/v1/chat/completions"
PAGE = FILE.read_text()


class Parts(html.parser.HTMLParser):
    """The page's elements, and the texts of its scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and (tag := self.tags[-1][0]) in self.texts and data.strip():
            self.texts[tag].append(data)


PARTS = Parts(PAGE)


def policy(headers):
    return dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))


def test_the_page_is_one_small_file_that_loads_nothing():
    assert len(PAGE.encode()) < 40_000 and PAGE.isprintable() is False and "\r" not in PAGE
    assert re.search(r"https?:|//[a-z0-9.-]+\.[a-z]|@import|url\(", re.sub(r"^\s*//.*$", "", PAGE, flags=re.MULTILINE)) is None
    for tag, attributes in PARTS.tags:
        assert tag not in {"img", "iframe", "object", "embed", "base", "audio", "video"}
        assert "src" not in attributes and "style" not in attributes and "action" not in attributes
        assert not any(name.startswith("on") for name in attributes), "the policy lets no handler in an attribute run"
        assert tag == "link" or "href" not in attributes
    (icon,) = [attributes["href"] for tag, attributes in PARTS.tags if tag == "link"]
    assert icon.startswith("data:image/png;base64,") and base64.b64decode(icon.partition(",")[2]).startswith(b"\x89PNG")


def test_the_script_makes_no_html_of_texts_and_stores_nothing_but_the_key():
    (script,) = PARTS.texts["script"]
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "DOMParser", "srcdoc", "import("):
        assert word not in script
    assert not re.search(r"localStorage|indexedDB|cookie|setTimeout\([\"'`]", script)
    assert script.count("setItem(") == 1 and "setItem(KEY, key)" in script


def test_headers_and_hashes(server):
    found = {}
    for method in ("GET", "HEAD"):
        connection, response = server.open(method, "/")
        with contextlib.closing(connection):
            found[method] = {name.lower(): value for name, value in response.getheaders()}
            assert (response.status, response.read()) == (200, PAGE.encode() if method == "GET" else b"")
    headers = found["GET"]
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-cache"
    for name in ("content-length", "content-security-policy", "content-type"):
        assert found["HEAD"][name] == headers[name]
    rules = policy(headers)
    for kind, texts in PARTS.texts.items():
        (digest,) = [hashlib.sha256(text.encode()).digest() for text in texts]
        assert rules.pop(f"{kind}-src") == f"'sha256-{base64.b64encode(digest).decode()}'"
    assert rules.pop("connect-src") == "'self'" and rules.pop("img-src") == "data:"
    assert rules.pop("require-trusted-types-for") == "'script'"
    assert rules == dict.fromkeys(("default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types"), "'none'")


def test_the_page_needs_no_key_and_what_it_asks_for_does(served):
    app = build_app(served, ["secret"])
    status, _, body = call(app, "/")
    assert (status, body) == (200, PAGE.encode())
    assert [call(app, path)[0] for path in ("/v1/models", "/metrics", "/page.html", "//")] == [401] * 4
    assert call(app, "/", method="POST")[0] == 405


def test_without_the_page_its_path_is_like_any_other(served):
    for keys, expected in (([], 404), (["secret"], 401)):
        app = build_app(served, keys, page=False)
        statuses = [call(app, path)[0] for path in ("/", "/nothing")]
        assert statuses == [expected] * 2


def test_other_sites_get_no_leave_to_use_the_api(server):
    other = {"Origin": "https://elsewhere.example"}
    asked = {**other, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "seed": 1}

    def answer(method, path, headers, body=None):
        connection, response = server.open(method, path, body, headers)
        with contextlib.closing(connection):
            names = {name.lower() for name, _ in response.getheaders()}
            assert not any(name.startswith("access-control") for name in names), names
            content = json.loads(response.read()) if path == CHAT and response.status == 200 else response.read()
            return response.status, names, content["choices"] if isinstance(content, dict) else len(content)

    for path in ("/", "/health", "/ready", "/v1/models"):
        assert answer("GET", path, other) == answer("GET", path, {})
    assert answer("POST", CHAT, other, body) == answer("POST", CHAT, {}, body)
    for path in ("/", CHAT, "/nothing"):
        assert answer("OPTIONS", path, asked)[0] == (404 if path == "/nothing" else 405)


def test_the_first_line_names_the_page_unless_there_is_none(capsys):
    from types import SimpleNamespace

    from l4jax.serving.front import _Front

    for page, expected in ((True, "a request. Chat at http://[::1]:80 or try:"), (False, "a request. Try:")):
        front = SimpleNamespace(_options=SimpleNamespace(keys=[], page=page), _served=SimpleNamespace(name="tiny", max_model_len=1024))
        _Front._print_address(front, "::1", 80)
        assert capsys.readouterr().out.splitlines()[0].endswith(expected)


# ---- In a browser


FIGURES = """# HELP vllm:num_requests_running Requests that are being computed.
vllm:num_requests_running{{model_name="a {{b}} c"}} 2.0
vllm:num_requests_waiting{{model_name="a {{b}} c"}} {n}
vllm:kv_cache_usage_perc{{model_name="a {{b}} c"}} 0.125
vllm:generation_tokens_total{{model_name="a {{b}} c"}} {tokens}
vllm:time_to_first_token_seconds_sum{{model_name="a {{b}} c"}} {seconds}
vllm:time_to_first_token_seconds_bucket{{le="+Inf",model_name="a {{b}} c"}} {n}
vllm:time_to_first_token_seconds_count{{model_name="a {{b}} c"}} {n}
vllm:spec_decode_num_drafts_total{{model_name="a {{b}} c"}} {rounds}
vllm:spec_decode_num_accepted_tokens_total{{model_name="a {{b}} c"}} {accepted}
"""


class Fake(BaseHTTPRequestHandler):
    """A server that says what a test wants it to say: whole statuses, or events that are cut after every byte."""

    protocol_version = "HTTP/1.1"
    loading: tuple[str, ...] = ()
    """What ``/ready`` still says before it is ready."""
    status, events = 200, ()
    rest = b""
    """What follows the events."""
    bodies: tuple[bytes, ...] = ()
    """What has been sent to it."""
    polls = 0
    """How often its figures were read."""

    def log_message(self, *arguments):
        pass

    def answer(self, status, body, **headers):
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(raw)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self):
        if self.path == "/":
            page = asyncio.run(page_route().endpoint(None))
            self.answer(200, page.body, **dict(page.headers))
        elif self.path == "/ready" and self.loading:
            (now, *type(self).loading) = self.loading
            self.answer(503, {"error": {"message": now}})
        elif self.path == "/v1/models":
            self.answer(200, {"data": [{"id": "<b>fake</b>", "max_model_len": 8192}]})
        else:
            n = type(self).polls = self.polls + 1
            self.answer(
                200, FIGURES.format(n=n, tokens=int(50 * time.monotonic()), rounds=10 * n, accepted=15 * n, seconds=0.3 * n).encode()
            )

    def do_POST(self):
        type(self).bodies = (*self.bodies, self.rfile.read(int(self.headers["Content-Length"])))
        if self.status != 200:
            self.answer(self.status, {"error": {"message": f"no, {self.status}; try again later"}})
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for byte in b"".join(b"data: %s\n\n" % json.dumps(event, ensure_ascii=False).encode() for event in self.events) + self.rest:
            self.wfile.write(b"1\r\n%c\r\n" % byte)
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")


def delta(text, **fields):
    return {"choices": [{"index": 0, "delta": {"content": text}, **fields}], "usage": {"completion_tokens": 3}}


@pytest.fixture
def fake():
    handler = type("Told", (Fake,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        listening.daemon_threads = True
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        handler.url = f"http://127.0.0.1:{listening.server_port}/"
        yield handler
        listening.shutdown()


@pytest.fixture(scope="module")
def chromium():
    program = shutil.which("chromium") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        program = None
    if program is None:
        pytest.fail("the tests of the page need Chromium and Playwright; docs/testing.md says how to get them", pytrace=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium):
    """Opens pages; at the end, none of them may have had an error or broken the policy."""
    context = chromium.new_context(viewport={"width": 1200, "height": 800})
    context.set_default_timeout(20_000)
    context.add_init_script(
        "window.violations = []; document.addEventListener('securitypolicyviolation', (e) => violations.push(e.blockedURI))"
    )
    pages, errors = [], []

    def open_page(url):
        page = context.new_page()
        pages.append(page)
        page.on("pageerror", lambda error: errors.append(str(error)))
        # Chromium itself reports each answer of the server's that has an error's status.
        page.on("console", lambda message: "Failed to load resource" in message.text or errors.append(message.text))
        page.goto(url)
        return page

    yield open_page
    violations = [page.evaluate("violations") for page in pages]
    context.close()
    assert errors == [] and violations == [[]] * len(pages)


def ask(page, text):
    page.wait_for_selector("#send:enabled")
    page.fill("#box", text)
    page.press("#box", "Enter")


def wait_until(true):
    for _ in range(200):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come true in 10 s")


def ended(server, key, reason):
    connection, response = server.open("GET", "/metrics", headers={"x-api-key": key})
    with contextlib.closing(connection):
        text = response.read().decode()
    (found,) = re.findall(rf'^vllm:request_success_total{{finished_reason="{reason}".*}} (\S+)$', text, re.MULTILINE)
    return float(found)


@pytest.fixture(scope="module")
def locked(checkpoint):
    with running(checkpoint, "--api-key", "secret") as server:
        yield server


@pytest.mark.browser
def test_a_conversation(locked, opened):
    page = opened(f"http://{locked.host}:{locked.port}/")
    sent = []
    page.on("request", lambda request: request.method == "POST" and sent.append(request.post_data))
    page.wait_for_selector("#model:text('needs an API key')")
    ask(page, "hello")
    page.wait_for_selector(".wrong:text('Not answered (401): the API key is missing or wrong')")
    assert page.input_value("#box") == "hello" and page.locator(".question").count() == 0

    page.fill("#key", "secret")
    page.press("#key", "Tab")
    page.wait_for_selector("#model:text('up to 1,024 tokens')")
    assert page.text_content("#name") == "tiny" and page.evaluate("sessionStorage.length + localStorage.length") == 0
    page.fill("#system", "Be brief.")
    page.fill("#temperature", "0.5")
    page.fill("#top_p", "0.75")
    page.fill("#max_tokens", "20")
    seed = 2**64 - 3
    page.fill("#seed", str(seed))
    page.press("#box", "Enter")
    page.wait_for_selector(f".foot span:text('seed {seed}')")
    assert page.locator(".question").all_text_contents() == ["hello"] and page.locator(".wrong").count() == 0
    expected = {"temperature": 0.5, "top_p": 0.75, "max_tokens": 20, "seed": seed, "stream": True}
    first = json.loads(sent[-1])
    assert {name: first[name] for name in expected} == expected
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}
    assert first["messages"] == [system, user]
    answer = locked.answer(CHAT, {**first, "stream": False, "stream_options": None}, {"x-api-key": "secret"})[1]["choices"][0]
    assert answer["seed"] == seed

    page.fill("#seed", "")
    ask(page, "again")
    page.wait_for_selector(".foot >> nth=1")
    second = json.loads(sent[-1])
    assert "seed" not in second and re.search(r"seed \d+", page.text_content(".foot >> nth=1"))
    assert second["messages"] == [
        system,
        user,
        {"role": "assistant", "content": answer["message"]["content"]},
        {**user, "content": "again"},
    ]

    values = page.locator("#numbers div:not([hidden]) dd")
    wait_until(lambda: len(found := values.all_text_contents()) == 5 and "–" not in found)
    page.click("#new")
    assert page.locator("#talk > *").count() == 0 and page.is_visible("#welcome")


@pytest.mark.browser
@pytest.mark.parametrize("way", ["button", "escape", "new chat"])
def test_an_answer_grows_and_can_be_stopped(locked, opened, way):
    page = opened(f"http://{locked.host}:{locked.port}/")
    # The tiny model would end its answer soon.
    page.route("**" + CHAT, lambda route: route.continue_(post_data=json.dumps({**route.request.post_data_json, "ignore_eos": True})))
    page.wait_for_selector("#send:enabled")
    page.fill("#key", "secret")
    aborted = ended(locked, "secret", "abort")
    ask(page, "write a long text")
    lengths = {0}
    wait_until(lambda: lengths.add(len(page.text_content(".answer"))) or len(lengths) > 3)
    assert page.is_hidden("#send") and page.get_attribute("#stop", "hidden") is None
    if way == "button":
        page.click("#stop")
    elif way == "escape":
        page.press("#box", "Escape")
    else:
        page.click("#new")
    wait_until(lambda: ended(locked, "secret", "abort") == aborted + 1)
    page.wait_for_selector("#send:visible")
    if way == "new chat":
        assert page.locator("#talk > *").count() == 0
    else:
        assert re.search(r"\d+ tokens · .*stopped", page.text_content(".foot")) and page.locator(".wrong").count() == 0


@pytest.mark.browser
def test_a_key_is_kept_for_the_tab_only_if_asked_for(locked, opened):
    page = opened(f"http://{locked.host}:{locked.port}/")
    page.fill("#key", "secret")
    page.check("#keep")
    page.reload()
    page.wait_for_selector("#model:text('up to')")
    assert page.input_value("#key") == "secret"
    page.uncheck("#keep")
    page.reload()
    page.wait_for_selector("#model:text('needs an API key')")


@pytest.mark.browser
def test_figures_are_read_while_the_page_is_visible(fake, opened):
    page = opened(fake.url)
    page.wait_for_selector("#round:text('2.50')")
    running, waiting, rate, cache, first, _ = page.locator("#numbers dd").all_text_contents()
    assert (running, waiting, cache, first) == ("2", str(fake.polls), "12.5 %", "0.3 s") and 40 < float(rate) < 60

    def hide(hidden):
        page.evaluate(f"Object.defineProperty(document, 'hidden', {{ value: {hidden}, configurable: true }})")
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")

    hide("true")
    page.wait_for_timeout(200)
    polls = fake.polls
    page.wait_for_timeout(2500)
    assert fake.polls == polls
    hide("false")
    wait_until(lambda: fake.polls == polls + 1)


HTML = '<img src=x onerror="window.broken = 1"><script>window.broken = 1</script> naïve 日本 🙂👨‍👩‍👧'


@pytest.mark.browser
def test_an_answer_stays_text_wherever_the_network_cuts_it(fake, opened):
    text = f"{HTML}\n\n```html\n{HTML}\n  indented\n```\nAnd **more**, ``` inside a line"
    fake.events = [delta("", seed=18446744073709551615), *map(delta, text), delta("", finish_reason="length")]
    fake.rest = b": still working\n\ndata: [DONE]\r\n\r\n"
    page = opened(fake.url)
    ask(page, HTML)
    page.wait_for_selector(".foot")
    shown = page.locator(".answer .part:not(.code)").all_text_contents()
    assert shown == [HTML, "And **more**, ``` inside a line"]
    assert page.text_content(".code code") == f"{HTML}\n  indented" and page.text_content(".code span") == "html"
    assert page.text_content(".question") == HTML and page.text_content("#name") == "<b>fake</b>" == page.title()
    assert page.text_content("#spoken") == text
    assert "seed 18446744073709551615 · ended by the limit of tokens" in page.text_content(".foot")
    assert page.locator("#talk img, #talk script, #name b").count() == 0 and page.evaluate("window.broken") is None
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click(".foot button")
    page.wait_for_selector(".foot button:text('Copied')")
    assert page.evaluate("navigator.clipboard.readText()") == text


@pytest.mark.browser
def test_a_page_waits_until_the_model_is_loaded(fake, opened):
    fake.loading = [f"the model is being loaded: {n} of 5 programs; try again later" for n in range(1, 3)]
    fake.events, fake.rest = [delta("yes")], b"data: [DONE]\n\n"
    page = opened(fake.url)
    page.fill("#box", "hello")
    page.press("#box", "Enter")
    for n in (1, 2):
        page.wait_for_selector(f"#waiting:text('The model is being loaded: {n} of 5 programs. This page goes on by itself.')")
    page.wait_for_selector("#send:enabled")
    assert page.text_content("#waiting") == "" and page.input_value("#box") == "hello" and fake.bodies == ()
    page.click("#send")
    page.wait_for_selector(".part:text('yes')")


@pytest.mark.browser
def test_errors_are_sentences_and_lose_nothing(fake, opened):
    page = opened(fake.url)
    for fake.status in (429, 503, 400):  # the handler's attribute
        ask(page, f"question {fake.status}")
        page.wait_for_selector(f".wrong:text('Not answered ({fake.status}): no, {fake.status}; try again later.')")
        assert page.input_value("#box") == f"question {fake.status}"
        assert page.locator(".wrong").count() == 1 and page.locator(".question").count() == 0
    fake.status, fake.events = 200, [delta("half"), {"error": {"message": "the engine has stopped"}}]
    ask(page, "one")
    page.wait_for_selector(".wrong:text('Broken off: the engine has stopped.')")
    assert page.text_content(".answer .part") == "half" and "broken off" in page.text_content(".foot")
    fake.events = [delta("half")]
    ask(page, "two")
    page.wait_for_selector(".wrong:text('the connection was closed before')")
    assert [message["content"] for message in json.loads(fake.bodies[-1])["messages"]] == ["one", "half", "two"]
    page.fill("#seed", "x")
    ask(page, "three")
    page.press("#box", "Shift+Enter")
    assert page.input_value("#box") == "three\n" and len(fake.bodies) == 5


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_cut_off_and_everything_is_named(fake, opened, width, scheme):
    fake.events, fake.rest = [delta("word " * 200 + "x" * 500 + "\n```\n" + "y" * 500 + "\n```")], b"data: [DONE]\n\n"
    page = opened(fake.url)
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 640})
    ask(page, "z" * 500)
    page.wait_for_selector(".foot")
    for settings in ("true", "false"):
        if page.get_attribute("#open", "aria-expanded") != settings:
            page.click("#open")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        for name in ("#new", "#open", "#send", "#box"):
            found = page.locator(name).bounding_box()
            assert found["x"] >= 0 and found["x"] + found["width"] <= width and found["y"] + found["height"] <= 640
    unnamed = "[...document.querySelectorAll('input, textarea')].filter((e) => e.labels.length === 0).length"
    assert page.evaluate(unnamed) == 0
