"""What people and probes read: the page at /, /healthz with its questions, and wrong addresses."""

import base64
import json
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

import pytest
from client import Answer, request_body
from host import STANDIN, wait_until
from servers import Server
from stand_in import Log
from test_access import ask
from test_api import count
from test_http import quiet  # noqa: F401 - an autouse fixture

import bridge
import sessions
from bridge import user_name

Serve = Callable[..., Server]
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
        self.text += " " if tag == "span" else ""

    def handle_data(self, data: str) -> None:
        self.text += data


def page(server: Server, accept: dict[str, str], **headers: str) -> str:
    """The text of the page at /."""
    answer = server.call("GET", "/", None, {**accept, **headers})
    kind = "html" if accept else "plain"
    assert (answer.status, answer.headers["content-type"]) == (200, f"text/{kind}; charset=utf-8")
    text = answer.body.decode()
    return Reader(text).text if accept else text


# ---------------------------------------------------------------- the page


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
    times = re.sub(r"\d\d:\d\d:\d\d|\d+\.\d\d s", "-", said)
    assert "healthz" not in times
    _, _, last = times.partition("Last requests")
    assert re.findall(r"- (/\S+) (\d+), -, (\w+(?:, \w+)*)", last) == [
        ("/v1/messages", "200", "sonnet, rebuilt, unknown"),
        ("/nope", "404", "not_found_error, no"),
        ("/v1/messages", "200", "sonnet, hot"),
        ("/v1/messages", "200", "sonnet, new"),
    ]


def test_the_page_is_html_for_a_browser_and_runs_and_loads_nothing(serve: Serve) -> None:
    answer = serve().call("GET", "/", None, HTML)
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    tags = set(Reader(answer.body.decode()).tags)
    assert {"title", "h1", "h2", "p", "pre"} <= tags
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
    assert re.findall(r"/nope(\d+) ", said) == [str(number) for number in range(24, 4, -1)]


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
    assert str(strange) in Reader(answer.body.decode()).text
    assert json.dumps(str(strange))[1:-1] in page(server, {})


# ---------------------------------------------------------------- health


def deep(server: Server) -> tuple[int, str]:
    answer = server.call("GET", "/healthz?deep=1")
    assert answer.headers["content-type"] == "text/plain"
    return answer.status, answer.body.decode()


def test_a_deep_look_asks_the_cli_but_no_model(serve: Serve, log: Log) -> None:
    server = serve()
    assert deep(server) == (200, "ok")
    [(pid, _)] = log.started().items()
    assert log.requests(pid) == ["initialize"]
    assert [line["type"] for line in log.lines(pid)] == ["control_request"]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("exit-at-start", "the claude CLI does not work: "),
        ("hang-at-start", "the claude CLI did not answer within 0.5 seconds"),
        ("not-logged-in", f"nobody is logged in: no login of user {user_name()} in "),
    ],
)
def test_a_deep_look_says_why_nothing_can_be_answered(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, model: str, words: str
) -> None:
    if model == "hang-at-start":
        monkeypatch.setattr(bridge, "INFO_SECS", 0.5)
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    monkeypatch.setattr(sessions, "PROBE_MODEL", model)
    server = serve()
    status, said = deep(server)
    assert (status, said[: len(words)]) == (503, words)
    answer = server.call("GET", "/healthz")
    assert (answer.status, answer.body) == (200, b"ok")
    wait_until(lambda: not server.processes(), "the end of the process that was asked")


def test_a_key_that_the_cli_does_not_get_is_the_reason_that_nobody_is_logged_in(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "PROBE_MODEL", "not-logged-in")
    _, said = deep(serve(keep_env=("ANTHROPIC_BASE_URL",)))
    assert "CLAUDE_CLI_KEEP_ENV=ANTHROPIC_API_KEY passes it on" in said


def test_a_deep_look_says_that_there_is_no_room(
    serve: Serve,
    gate: Path,
    log: Log,
    background: ThreadPoolExecutor,
) -> None:
    server = serve(max_sessions=1)
    assert deep(server) == (200, "ok")
    running = background.submit(server.post, "PAUSE")
    wait_until(lambda: log.got("PAUSE"), "the turn")
    assert deep(server) == (503, "all 1 processes are busy")
    gate.touch()
    assert running.result().status == 200
    assert deep(server) == (200, "ok")


def test_a_deep_look_is_good_for_a_while(
    serve: Serve, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many ask: a process is started for one of them."""
    monkeypatch.setattr(bridge, "PROBLEM_SECS", 1000)
    monkeypatch.setattr(sessions, "PROBE_MODEL", "exit-at-start")
    server = serve()
    assert len({deep(server) for _ in range(5)}) == 1
    assert len(log.started()) == 1


def test_of_many_who_ask_at_once_one_starts_a_process(
    serve: Serve, log: Log, background: ThreadPoolExecutor
) -> None:
    server = serve()
    answers = [background.submit(deep, server) for _ in range(8)]
    assert {answer.result() for answer in answers} == {(200, "ok")}
    assert len(log.started()) == 1


def test_a_deep_look_finds_the_room_of_a_process_that_counted(serve: Serve) -> None:
    server = serve(max_sessions=1)
    assert count(server).status == 200
    assert deep(server) == (200, "ok")


def test_a_problem_is_looked_for_again_sooner_than_a_good_answer(
    serve: Serve, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge, "PROBLEM_SECS", 0)
    monkeypatch.setattr(sessions, "PROBE_MODEL", "exit-at-start")
    server = serve()
    assert [deep(server)[0] for _ in range(2)] == [503, 503]
    assert len(log.started()) == 2


def test_a_deep_look_finds_that_a_cli_that_worked_works_no_more(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli = tmp_path / "claude"
    cli.symlink_to(STANDIN)
    server = serve(bin=cli)
    assert deep(server) == (200, "ok")
    cli.unlink()
    assert deep(server) == (200, "ok")  # for a while
    assert server.bridge
    server.bridge.health.forget()
    assert deep(server)[0] == 503


@pytest.mark.parametrize("query", ["deep=1", "x=1"])
def test_the_questions_to_health_are_not_open_to_all(serve: Serve, query: str) -> None:
    server = serve(api_key=KEY["x-api-key"])
    request = f"GET /healthz?{query} HTTP/1.1"
    key = "x-api-key: sesame-key"
    assert ask(server, "Host: localhost", request=request).status == 401
    assert ask(server, "Host: evil.example", key, request=request).status == 403
    assert ask(server, "Host: localhost", key, "Origin: null", request=request).status == 403
    assert ask(server, "Host: localhost", key, request=request).status == 200
    assert server.call("GET", "/healthz").body == b"ok"


@pytest.mark.parametrize("query", ["", "?deep=1"])
def test_head_of_health_has_no_body(serve: Serve, query: str) -> None:
    answer = ask(serve(), "Host: localhost", request=f"HEAD /healthz{query} HTTP/1.1")
    assert (answer.status, answer.body) == (200, b"")


# ---------------------------------------------------------------- wrong addresses


def message(answer: Answer) -> str:
    assert (answer.status, answer.json["error"]["type"]) == (404, "not_found_error")
    return str(answer.json["error"]["message"])


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/responses/resp_1",
        "/v1/completions",
        "/v1/embeddings",
        "/chat/completions",
        "//v1/chat/completions",
    ],
)
def test_a_client_of_openais_api_is_told_what_this_is(serve: Serve, path: str) -> None:
    body = json.dumps(request_body()).encode()
    said = message(serve().call("POST", path, body))
    assert "Anthropic Messages API, not OpenAI's" in said
    assert "LiteLLM" in said


def test_an_unknown_path_is_answered_with_the_base_url(serve: Serve) -> None:
    server = serve()
    said = message(server.call("GET", "/v1/nope?sesame"))
    assert said.endswith(f"the base URL is {server.url}")
    assert "'/v1/nope'" in said
    assert "sesame" not in said


@pytest.mark.parametrize("path", ["//v1/messages", "///v1/messages?beta=true", "//messages"])
def test_a_base_url_with_a_slash_at_its_end_works(serve: Serve, path: str) -> None:
    answer = serve().call("POST", path, request_body("hello"))
    assert answer.text == "echo: hello; 1 messages"
