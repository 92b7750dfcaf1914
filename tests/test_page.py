"""The page at /, which people read."""

import base64
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

import pytest
from client import request_body
from host import STANDIN, wait_until
from servers import Serve, Server
from stand_in import Log
from wire import GET, Wire, ask, post

import bridge
from bridge import user_name

pytestmark = pytest.mark.usefixtures("quiet")

KEY = {"x-api-key": "sesame-key"}
BASIC = 'Basic realm="the password is the key"'
HTML = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
WAYS = pytest.mark.parametrize("accept", [{}, HTML], ids=["text", "HTML"])


class Reader(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def page(server: Server, accept: dict[str, str], **headers: str) -> str:
    """The text of the page at /."""
    answer = server.call("GET", "/", None, {**accept, **headers})
    kind = "html" if accept else "plain"
    assert (answer.status, answer.headers["content-type"]) == (200, f"text/{kind}; charset=utf-8")
    text = answer.body.decode()
    return Reader(text).text if accept else text


@WAYS
def test_the_page_says_what_the_bridge_is_doing(
    serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor, accept: dict[str, str]
) -> None:
    server = serve()
    first = server.post("hello")
    assert server.post(["hello", first.text, "and now"]).status == 200
    assert server.call("GET", "/nope").status == 404
    assert (
        server.post(["other", "yes", "x" * 10], system="sesame").session
        == "rebuilt; reason=unknown-history"
    )
    assert server.call("GET", "/healthz").status == 200
    running = background.submit(server.post, "PAUSE")
    wait_until(lambda: log.got("PAUSE"), "the turn")
    said = re.sub(r"\s+", " ", page(server, accept))
    gate.touch()
    assert running.result().status == 200
    for words in (
        f"export ANTHROPIC_BASE_URL={server.url} export ANTHROPIC_API_KEY=unused",
        f"curl {server.url}/v1/messages",
        f"version {bridge.__version__}",
        f"claude CLI {STANDIN} its version 2.1.260",
        f"login stand-in (user {user_name()} in ",
        "s; turns: 0",
        "s; turns: 2",
    ):
        assert words in said
    assert said.index("Connect") < said.index("State") < said.index("Last requests")
    assert "healthz" not in said
    _, _, last = said.partition("Last requests")
    assert re.findall(r" (?:route|conversation|path|status|reason)=(\S+)", last) == [
        *("/v1/messages", "rebuilt", "200", "unknown-history"),
        *("/nope", "404", '"no'),
        *("/v1/messages", "hot", "200"),
        *("/v1/messages", "new", "200"),
    ]


def test_the_page_is_html_for_a_browser_and_runs_and_loads_nothing(serve: Serve) -> None:
    answer = serve().call("GET", "/", None, HTML)
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    tags = set(Reader(answer.body.decode()).tags)
    assert {"title", "pre"} <= tags
    assert not tags & {"script", "img", "link", "iframe", "form"}


@WAYS
def test_the_page_shows_no_secret_and_nothing_that_was_said(
    serve: Serve, accept: dict[str, str]
) -> None:
    server = serve(api_key=KEY["x-api-key"])
    for number, path in enumerate(("/v1/messages", "/path?sesame", "/v1/models/x?sesame")):
        body = request_body("sesame-prompt", system="sesame-system", stream=bool(number))
        assert server.call("POST", path, body, KEY).status in (200, 404, 405)
    assert server.call("POST", "/v1/messages", {"sesame-field": 1}, KEY).status == 400
    assert server.call("GET", "/", None, {"x-api-key": "sesame-wrong"}).status == 401
    assert server.call("GET", "/", None, {**KEY, "origin": "http://evil"}).status == 403
    said = page(server, accept, **KEY)
    assert "sesame" not in said
    assert "sk-stub" not in said
    assert "echo" not in said


def test_the_page_opens_in_a_browser_with_the_key_as_password(serve: Serve) -> None:
    """RFC 7617; nothing else does: a browser sends its password to every path."""
    server = serve(api_key=KEY["x-api-key"])
    refused = server.call("GET", "/", None, HTML)
    assert (refused.status, refused.headers["www-authenticate"]) == (401, BASIC)

    def opens(pair: str, method: str = "GET", path: str = "/") -> bool:
        value = b"Basic " + base64.b64encode(pair.encode())
        return server.call(method, path, None, {"authorization": value.decode()}).status == 200

    assert opens(":sesame-key")
    assert opens("anybody:sesame-key")
    assert opens("anybody:sesame-key", "HEAD")
    assert not opens("sesame-key")
    assert not opens("sesame-key:")
    assert not opens("anybody:sesame-keys")
    assert not opens("anybody:sesame-key", "GET", "/metrics")
    answer = server.call("GET", "/v1/models", None, {"authorization": "Basic !"})
    assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert server.call("GET", "/", None, {"authorization": "Basic !"}).status == 401


@WAYS
def test_the_page_shows_how_to_connect_without_the_key(
    serve: Serve, accept: dict[str, str]
) -> None:
    said = page(serve(api_key=KEY["x-api-key"]), accept, **KEY)
    assert "export ANTHROPIC_API_KEY=$CLAUDE_CLI_API_KEY" in said
    assert 'x-api-key: $CLAUDE_CLI_API_KEY"' in said


def test_what_the_page_says_to_type_works(serve: Serve) -> None:
    server = serve()
    lines = page(server, {}).partition("Connect")[2].partition("State")[0]
    done = subprocess.run(["sh", "-ec", lines], capture_output=True, text=True, check=True)
    assert "echo: Say hello." in done.stdout


def test_the_page_shows_the_last_twenty_requests(serve: Serve) -> None:
    server = serve()
    for number in range(25):
        server.call("GET", f"/nope{number}")
    said = page(server, HTML)
    assert re.findall(r"path=/nope(\d+) ", said) == [str(number) for number in range(24, 4, -1)]


def test_what_clients_without_the_key_sent_is_not_on_the_page(
    serve: Serve, connect: Callable[[Server], Wire], caplog: pytest.LogCaptureFixture
) -> None:
    """They cannot push others off it."""
    caplog.set_level("INFO", "claude_cli_bridge")
    origin = "http://localhost:3000"
    server = serve(api_key=KEY["x-api-key"], send_secs=1, allowed_origins=(origin,))
    preflight = b"OPTIONS /v1/messages HTTP/1.1\r\nHost: localhost\r\nOrigin: %b\r\n\r\n"
    requests = {
        preflight % origin.encode(): 200,
        b"bad\r\n\r\n": 400,
        post()[:40]: 408,
        post(b"", b"x: " + b"x" * 200_000): 431,
        post(b"").replace(b"Content-Length: 0", b"Content-Length: 99999999"): 401,
        GET.replace(b"GET", b"POST"): 405,
    }
    for data, status in requests.items():
        wire = connect(server)
        wire.send(data)
        assert wire.answer().status == status
    wait_until(lambda: caplog.text.count("request_id=") == len(requests), "the lines")
    assert "Last requests none" in re.sub(r"\s+", " ", page(server, {}, **KEY))


def test_the_refusals_of_clients_with_the_key_are_on_the_page(
    serve: Serve, connect: Callable[[Server], Wire], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "claude_cli_bridge")
    server = serve(api_key=KEY["x-api-key"], send_secs=1)
    key = b"x-api-key: " + KEY["x-api-key"].encode()
    requests = {
        post(b"{", key): 400,
        post(b"{", key)[:-1]: 408,
        post(b"", key).replace(b"Content-Length: 0", b"Content-Length: 99999999"): 413,
        post(b"", key, path="/nope"): 404,
        post(b"", key).replace(b"POST", b"PUT"): 405,
    }
    for data, status in requests.items():
        wire = connect(server)
        wire.send(data)
        assert wire.answer().status == status
    wait_until(lambda: caplog.text.count("request_id=") == len(requests), "the lines")
    shown = re.findall(r"=/\S+ status=(\d+)", page(server, {}, **KEY))
    assert list(map(int, reversed(shown))) == list(requests.values())


def test_the_page_is_refreshed_without_a_script(serve: Serve) -> None:
    body = serve().call("GET", "/", None, HTML).body
    assert b'<meta http-equiv="refresh" content="10">' in body


@WAYS
def test_the_page_changes_nothing(serve: Serve, log: Log, accept: dict[str, str]) -> None:
    server = serve()
    assert "not known yet" in page(server, accept)
    assert server.processes() == []
    assert log.started() == {}
    first = server.post("hello")
    processes = server.processes()
    lines = [log.lines(process.pid) for process in processes]
    page(server, accept)
    assert server.processes() == processes
    assert [log.lines(process.pid) for process in processes] == lines
    assert server.post(["hello", first.text, "and now"]).session == "hot"


@WAYS
def test_the_page_is_open_to_whom_the_rest_is(serve: Serve, accept: dict[str, str]) -> None:
    server = serve(api_key=KEY["x-api-key"])
    lines = [f"{name}: {value}" for name, value in accept.items()]
    for more, status in (
        (["Host: localhost"], 401),
        (["Host: localhost", "x-api-key: another"], 401),
        (["Host: evil.example", "x-api-key: sesame-key"], 403),
        (["Host: localhost", "x-api-key: sesame-key", "Origin: http://evil.example"], 403),
        (["Host: localhost", "x-api-key: sesame-key", "Sec-Fetch-Site: cross-site"], 403),
        (["Host: localhost", "x-api-key: sesame-key"], 200),
    ):
        assert ask(server, *more, *lines, request="GET / HTTP/1.1").status == status


def test_what_the_page_shows_is_escaped(serve: Serve, tmp_path: Path) -> None:
    strange = tmp_path / "<script>&amp;\"'"
    strange.symlink_to(STANDIN)
    server = serve(bin=strange)
    answer = server.call("GET", "/", None, HTML)
    assert b"<script>" not in answer.body
    for accept in ({}, HTML):
        assert str(strange) in page(server, accept)
