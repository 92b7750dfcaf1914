"""The server: routes, answers, health, what is logged of a request."""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from client import Answer, Json, count, error_of, request_body
from host import STANDIN, wait_until
from processes import talk
from servers import Launch, Serve, Server, printed
from stand_in import Log
from test_logins import LOGINS, log_in
from test_page import KEY
from wire import GET, HOST, PROBE_BODY, Wire, ask, assert_error, assert_whole, post

import bridge
import sessions
from bridge import user_name

pytestmark = pytest.mark.usefixtures("quiet")


# ---------------------------------------------------------------- routes


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/nope", 404, "not_found_error"),
        ("POST", "/nope", 404, "not_found_error"),
        ("GET", "*", 404, "not_found_error"),
        ("POST", "/v1/messages/", 404, "not_found_error"),
        ("POST", "/V1/messages", 404, "not_found_error"),
        ("POST", "/v1/../v1/messages", 404, "not_found_error"),
        ("CONNECT", "localhost:1", 404, "not_found_error"),
        ("GET", "/v1/messages", 405, "invalid_request_error"),
        ("PUT", "/v1/messages", 405, "invalid_request_error"),
        ("OPTIONS", "/v1/messages", 405, "invalid_request_error"),
        ("post", "/v1/messages", 405, "invalid_request_error"),
        ("DELETE", "/messages", 405, "invalid_request_error"),
        ("POST", "/healthz", 405, "invalid_request_error"),
        ("POST", "/", 405, "invalid_request_error"),
        ("BREW", "/healthz", 405, "invalid_request_error"),
    ],
)
def test_unknown_paths_and_methods_are_refused_and_their_bodies_are_no_requests(
    wire: Wire, method: str, path: str, status: int, kind: str
) -> None:
    wire.send(post(GET, path=path).replace(b"POST", method.encode(), 1), GET)
    assert_error(wire.answer(), status, kind)
    assert wire.answer().body == b"ok"


def test_a_405_says_what_is_allowed(wire: Wire) -> None:
    """RFC 9110, 15.5.6: the server MUST generate an Allow header."""
    wire.send(GET.replace(b"/healthz", b"/v1/messages"), post(path="/healthz"))
    assert wire.answer().headers["allow"] == "POST"
    assert wire.answer().headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("path", ["/messages", "/v1/messages", "/v1/v1/messages"])
@pytest.mark.parametrize("query", ["", "?", "?beta=true", "?a=1&b=%2F?/nope"])
def test_wrong_base_urls_work_and_queries_are_ignored(wire: Wire, path: str, query: str) -> None:
    wire.send(post(path=path + query) + GET.replace(b"/healthz", b"/healthz" + query.encode()))
    assert_whole(wire.answer())
    assert wire.answer().body == b"ok"


@pytest.mark.parametrize(
    ("path", "status"), [("/", 200), ("/healthz", 200), ("/nope", 404), ("/v1/messages", 405)]
)
def test_an_answer_to_head_has_no_body(wire: Wire, path: str, status: int) -> None:
    wire.send(f"HEAD {path} HTTP/1.1\r\n".encode() + HOST + b"\r\n" + GET)
    assert wire.answer("HEAD").status == status
    assert wire.answer().body == b"ok"


def test_head_says_what_get_would(wire: Wire) -> None:
    wire.send(GET.replace(b"GET", b"HEAD") + GET)
    head, answer = wire.answer("HEAD"), wire.answer()
    for name in ("request-id", "date"):
        del head.headers[name], answer.headers[name]
    assert head.headers == answer.headers == {"content-type": "text/plain", "content-length": "2"}


def test_every_answer_has_a_request_id_of_its_own(wire: Wire) -> None:
    wire.send(
        GET, post(), post("one"), post("two", stream=True), post(path="/nope"), GET, b"bad\r\n\r\n"
    )
    answers = [wire.answer() for _ in range(7)]
    assert [answer.status for answer in answers] == [200, 400, 200, 200, 404, 200, 400]
    assert len({answer.headers["request-id"] for answer in answers}) == 7


def test_a_message_is_json(wire: Wire) -> None:
    wire.send(post("hello"))
    answer = wire.answer()
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json["type"] == "message"


@pytest.mark.parametrize("limit", [b"9" * 5000, b"0" * 5000, b"1_0", b"%C3%BF", b"-1", b""])
@pytest.mark.parametrize("path", [b"/v1/models", b"/healthz"])
def test_no_query_is_too_strange_for_an_answer(wire: Wire, path: bytes, limit: bytes) -> None:
    wire.send(GET.replace(b"/healthz", path + b"?limit=" + limit))
    answer = wire.answer()
    assert answer.status == 200


# ---------------------------------------------------------------- wrong addresses


def message_of(answer: Answer) -> str:
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
    said = message_of(serve().call("POST", path, body))
    assert "Anthropic Messages API, not OpenAI's" in said
    assert "LiteLLM" in said


def test_an_unknown_path_is_answered_with_the_base_url(serve: Serve) -> None:
    server = serve()
    said = message_of(server.call("GET", "/v1/nope?sesame"))
    assert said.endswith(f"the base URL is {server.url}")
    assert "'/v1/nope'" in said
    assert "sesame" not in said


@pytest.mark.parametrize("path", ["//v1/messages", "///v1/messages?beta=true", "//messages"])
def test_a_base_url_with_a_slash_at_its_end_works(serve: Serve, path: str) -> None:
    answer = serve().call("POST", path, request_body("hello"))
    assert answer.text == "echo: hello; 1 messages"


# ---------------------------------------------------------------- messages


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"hello",
        b"{} {}",
        b"null",
        b"[]",
        b"true",
        b'"text"',
        b"7",
        b"NaN",
        b'{"temperature": NaN}',
        b'{"max_tokens": Infinity}',
        b"{'model': 1}",
        b'{"a": 1,}',
        b'{"model": "\xff"}',
        b'{"model": "\\ud800"}',
        b"\xef\xbb\xbf{}",
        '{"model": "m"}'.encode("utf-16"),
        b"\0",
        b"[" * 200_000 + b"]" * 200_000,
        b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
        PROBE_BODY[:-1] + b', "metadata": ' + b"[" * 500 + b"]" * 500 + b"}",
        b"1" * 100_000,
    ],
    ids=lambda body: repr(body[:20]),
)
def test_a_body_that_is_no_json_object_gets_400_and_the_connection_stays(
    wire: Wire, body: bytes
) -> None:
    wire.send(post(body) + GET)
    assert_error(wire.answer(), 400, "invalid_request_error")
    assert wire.answer().body == b"ok"


@pytest.mark.parametrize("stream", [False, None, ...])
def test_stream_false_null_or_missing_is_no_stream(wire: Wire, stream: object) -> None:
    wire.send(post(json.dumps(request_body("hello", stream=stream)).encode()))
    answer = wire.answer()
    assert answer.headers["content-type"] == "application/json"
    assert answer.text.startswith("echo: hello;")


def test_streams_ask_proxies_not_to_hold_them_back_and_other_answers_do_not(wire: Wire) -> None:
    wire.send(post("one", stream=True), post("two"))
    assert wire.answer().headers["x-accel-buffering"] == "no"
    assert "x-accel-buffering" not in wire.answer().headers


def ask_with(server: Server, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return server.call("POST", "/v1/messages", request_body("SAY x"), named)


def test_headers_of_the_api_that_the_cli_sets_itself_are_named_as_not_sent(
    real: Server, since: Callable[[], list[Json]]
) -> None:
    told = [
        ask_with(real, anthropic_version="2026-10-21"),
        ask_with(real, anthropic_version="2026-10-21", anthropic_workspace_id="wrkspc_1"),
        ask_with(real, anthropic_workspace_id="wrkspc_1"),
        ask_with(real, anthropic_version="2023-06-01"),
        ask_with(real),
    ]
    assert [answer.status for answer in told] == [200] * 5
    names = [(answer.headers.get("x-bridge-not-sent") or "").split(", ") for answer in told]
    assert [sorted(listed) for listed in names] == [
        ["anthropic-version"],
        ["anthropic-version", "anthropic-workspace-id"],
        ["anthropic-workspace-id"],
        [""],
        [""],
    ]
    rows = [json.dumps(row["headers"]).lower() for row in since()]
    assert len(rows) == 5
    for row in rows:
        assert '"anthropic-version": "2023-06-01"' in row
        assert "wrkspc_1" not in row


class Forwarder:
    """A loopback listener whose connections lead to another port."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.port = 0
        self.threads = [threading.Thread(target=self._accept)]
        self.threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                far = socket.create_connection(("127.0.0.1", self.port))
                for pair in ((near, far), (far, near)):
                    self.threads.append(threading.Thread(target=self._copy, args=pair))
                    self.threads[-1].start()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for thread in self.threads:
            thread.join()


@pytest.fixture
def forwarder() -> Iterator[Forwarder]:
    running = Forwarder()
    yield running
    running.close()


def started(server: Server) -> int:
    """How many processes of the CLI the bridge has started."""
    lines = server.call("GET", "/metrics").body.decode().splitlines()
    [line] = [
        line for line in lines if line.startswith("claude_cli_bridge_processes_started_total")
    ]
    return int(line.split()[-1])


@pytest.mark.parametrize("name", ["key", "subscription"])
def test_a_request_of_an_own_child_is_refused_before_it_starts_another_child(
    serve: Serve,
    cli: Path,
    environment: Path,
    monkeypatch: pytest.MonkeyPatch,
    forwarder: Forwarder,
    name: str,
) -> None:
    monkeypatch.setenv("ANTHROPIC_BASE_URL", forwarder.url)
    server = serve(bin=cli, keep_env=log_in(LOGINS[name], environment, monkeypatch))
    forwarder.port = server.port
    answer = server.post("SAY x", model="claude-sonnet-5-5")
    words = "this request comes from the claude CLI that this bridge runs"
    assert (answer.status, answer.json["error"]["type"]) == (400, "invalid_request_error")
    assert words in answer.json["error"]["message"]
    assert "its ANTHROPIC_BASE_URL is the bridge's own" in answer.json["error"]["message"]
    assert 1 <= started(server) <= 2
    counted = request_body("hi", model="claude-sonnet-5-5", max_tokens=...)
    answer = server.call("POST", "/v1/messages/count_tokens", counted)
    assert answer.status == 400
    assert started(server) <= 3


# ---------------------------------------------------------------- limits


def test_a_connection_too_many_gets_503_and_the_others_go_on(serve: Serve) -> None:
    server = serve(max_connections=3)
    held = [server.connect() for _ in range(3)]
    assert server.bridge
    # Type: ignore[union-attr].
    wait_until(lambda: len(server.bridge.connections) == 3, "the connections")
    answer = server.call("GET", "/healthz")
    assert error_of(answer) == (503, "api_error")
    assert answer.headers["retry-after"] == "1"
    assert "connections" in answer.json["error"]["message"]
    for client in held:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
        client.close()
    wait_until(lambda: not server.bridge.connections, "their ends")  # type: ignore[union-attr]
    assert server.post().status == 200


def at_once(server: Server, connect: Callable[[Server], Wire]) -> list[tuple[int, Wire]]:
    """Eight clients, all of them there when the bridge looks, and how each is answered; those that
    are served come first."""
    assert server.loop
    are_there = threading.Event()
    server.loop.call_soon_threadsafe(partial(are_there.wait, 10))
    clients = [connect(server) for _ in range(8)]
    are_there.set()
    for client in clients:
        client.send(GET)
    answered = [(client.answer().status, client) for client in clients]
    return sorted(answered, key=lambda pair: pair[0])


def test_of_clients_that_connect_at_once_as_many_are_served_as_there_may_be(
    serve: Serve, connect: Callable[[Server], Wire]
) -> None:
    statuses = [status for status, _ in at_once(serve(max_connections=5), connect)]
    assert statuses == [200] * 5 + [503] * 3


def test_a_refused_client_that_lingers_takes_no_place(
    serve: Serve, connect: Callable[[Server], Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge, "LINGER_SECS", 1000)
    server = serve(max_connections=5)
    clients = at_once(server, connect)
    clients[0][1].close()
    wait_until(lambda: server.call("GET", "/healthz").status == 200, "the place")
    assert server.bridge
    refused = [item for item in server.bridge.connections.values() if item.is_surplus]
    assert len(refused) >= 3


def test_a_clock_that_jumps_disturbs_nobody(
    serve: Serve,
    gate: Path,
    log: Log,
    background: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = serve()
    running = background.submit(server.post, "PAUSE", stream=True)
    wait_until(lambda: log.got("PAUSE"), "the turn")
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert server.post("meanwhile").text == "echo: meanwhile; 1 messages"
    monkeypatch.setattr("time.time", lambda: 4e9)
    assert server.post("after").status == 200
    gate.touch()
    assert running.result().text.startswith("echo: PAUSE;")


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
        ("hang-at-start", "the claude CLI does not work: no answer in time"),
        ("not-logged-in", f"nobody is logged in: found no login of user {user_name()} in "),
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


def test_who_asks_while_the_only_place_is_taken_to_find_out_gets_the_same_answer(
    serve: Serve,
    log: Log,
    gate: Path,
    background: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sessions, "PROBE_MODEL", "slow-start")
    server = serve(max_sessions=1)
    first = background.submit(deep, server)
    wait_until(log.started, "its process")
    second = background.submit(deep, server)
    wait_until(lambda: second.done() or len(server.bridge.answers) == 2, "another one")
    gate.touch()
    assert first.result() == second.result() == (200, "ok")


def test_a_deep_look_finds_the_room_of_a_process_that_counted(serve: Serve) -> None:
    server = serve(max_sessions=1)
    assert count(server).status == 200
    assert deep(server) == (200, "ok")


def test_a_deep_look_takes_the_place_of_no_conversation(serve: Serve) -> None:
    server = serve(max_sessions=1)
    conversation, _ = talk(server, "hello")
    assert deep(server) == (200, "ok")
    assert server.post(conversation).session == "hot"


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
    server.bridge.health = bridge.Health()
    assert deep(server)[0] == 503


def test_a_401_of_the_api_makes_a_deep_look_ask_the_cli_again(serve: Serve, log: Log) -> None:
    server = serve()
    assert deep(server) == deep(server) == (200, "ok")
    assert len(log.started()) == 1
    assert server.post(model="not-logged-in").status == 401
    before = len(log.started())
    assert deep(server) == (200, "ok")
    assert len(log.started()) == before + 1


def test_a_deep_look_that_is_to_be_forgotten_while_it_asks_is_not_kept(
    serve: Serve,
    gate: Path,
    log: Log,
    background: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sessions, "PROBE_MODEL", "slow-start")
    server = serve()
    asked = background.submit(deep, server)
    wait_until(log.started, "the question")
    assert server.bridge
    server.bridge.health = bridge.Health()
    gate.touch()
    assert asked.result() == deep(server) == (200, "ok")
    assert len(log.started()) == 2


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


# ---------------------------------------------------------------- the reason of an error, and the log


def test_a_client_gets_the_cure_that_the_log_has(launch: Launch) -> None:
    program = launch(
        STANDIN_SONNET="not-logged-in",
        CLAUDE_CLI_KEEP_ENV="ANTHROPIC_BASE_URL,STANDIN_SONNET",
        ANTHROPIC_API_KEY="sk-x",
    )
    cure = "CLAUDE_CLI_KEEP_ENV=ANTHROPIC_API_KEY passes it on"
    printed(program, cure)
    answer = program.post(model="not-logged-in")
    assert answer.status == 401
    assert cure in answer.json["error"]["message"]


@pytest.mark.parametrize("text", ["FAIL400", "MIDFAIL"])
def test_what_the_api_worded_is_not_in_the_log(
    real: Server, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    """It can quote the prompt."""
    caplog.set_level("INFO", "claude_cli_bridge")
    answer = real.post(text)
    assert answer.status >= 400
    message = answer.json["error"]["message"]
    assert message
    wait_until(lambda: "route=/v1/messages" in caplog.text, "the line")
    assert f"status={answer.status} error={answer.json['error']['type']} " in caplog.text
    assert message not in caplog.text


def test_each_refusal_of_the_bridge_has_its_reason_in_the_log(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "claude_cli_bridge")
    server = serve(api_key="sesame")
    key = {"x-api-key": "sesame"}
    answers = [
        server.call("POST", "/v1/messages", b"{"),
        server.call("POST", "/v1/messages", b"{", key),
        server.call("GET", "/v1/messages", None, key),
        server.call("GET", "/nowhere?x", None, key),
        server.call("POST", "/v1/messages", request_body("DIE-START"), key),
    ]
    assert [answer.status for answer in answers] == [401, 400, 405, 404, 502]
    wait_until(lambda: caplog.text.count("request_id=") == len(answers), "the lines")
    rows = [record.row for record in caplog.records if hasattr(record, "row")]
    reasons = [answer.json["error"]["message"] for answer in answers]
    reasons[-1] = "the claude CLI exited with status 1"  # what it printed can quote a prompt
    assert [row["reason"] for row in rows] == reasons
    assert (rows[2]["route"], rows[3]["path"]) == ("/v1/messages", "/nowhere")


def test_nothing_that_a_client_wrote_in_a_body_is_a_reason_in_the_log(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "claude_cli_bridge")
    server = serve()
    result = {"type": "tool_result", "tool_use_id": "SECRET \x9b" * 100, "content": "x"}
    call = {"type": "tool_use", "id": "SECRET", "name": "t", "input": {}}
    image = {"type": "base64", "media_type": "SECRET", "data": "iVBORw0KGgoAAAAA"}
    for content in (
        [[result]],
        ["hi", [call], "go on"],
        [[{"type": "image", "source": image}]],
    ):
        messages = [
            {"role": ("user", "assistant")[number % 2], "content": blocks}
            for number, blocks in enumerate(content)
        ]
        assert server.post(messages).status == 400
    assert server.call("GET", "/v1/models/SECRET%9b").status == 404
    assert server.call("GET", "/sk-ant-api03-SECRETSECRET/x%9b").status == 404
    wait_until(lambda: caplog.text.count("request_id=") == 5, "the lines")
    assert "SECRET" not in caplog.text
    assert b"SECRET" not in server.call("GET", "/").body
    assert caplog.text.isascii()


@pytest.mark.parametrize("words", ["FAIL401", "FAIL404", "OUTDATED"])
def test_what_helps_against_an_error_of_the_api_is_in_the_log_alone(
    real: Server, caplog: pytest.LogCaptureFixture, words: str
) -> None:
    status, hint = {
        "FAIL401": (401, "the API refused the CLI's login"),
        "FAIL404": (404, "GET /v1/models lists the models"),
        "OUTDATED": (400, sessions.update_cure(real.config.bin)),
    }[words]
    answer = real.post(words)
    assert answer.status == status
    assert hint in caplog.text
    assert hint not in answer.json["error"]["message"]


def test_a_bug_is_a_500_of_its_request_alone_and_the_log_says_where_it_was(
    serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the bug itself says can hold a prompt."""

    async def broken(*_: object) -> None:
        raise ValueError("-".join(["a", "prompt"]))

    monkeypatch.setitem(bridge.ROUTES, "/metrics", ("GET, HEAD", broken))
    monkeypatch.setattr(bridge.log, "propagate", False)  # no error for `quiet`
    monkeypatch.setattr(bridge.log, "handlers", [caplog.handler])
    server = serve()
    answer = server.call("GET", "/metrics")
    assert error_of(answer) == (500, "api_error")
    assert answer.json["error"]["message"] == "internal error of the bridge"
    assert server.post("hello").text == "echo: hello; 1 messages"
    assert "ValueError" in caplog.text
    assert "in broken" in caplog.text
    assert "a-prompt" not in caplog.text
