"""The bridge as a program: its settings, its signals, its log."""

import contextlib
import json
import shlex
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from client import Answer, request_body
from host import STANDIN, wait_until
from servers import Program
from stand_in import Log

from translate import digest

Launch = Callable[..., Program]
HEADER = "x-arch-claude-cli-session"
formats = pytest.mark.parametrize("log_format", ["text", "json"])


def alive(number: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    return False


def printed(program: Program, words: str) -> None:
    wait_until(
        lambda: any(words in line for line in program.lines),
        f"a line with {words!r}: {program.lines}",
    )


# settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MAX_SESSIONS", "many"),
        ("MAX_SESSIONS", "1.5"),
        ("MAX_SESSIONS", "0"),
        ("MAX_IDLE", "-1"),
        ("WATCHDOG_SECS", "-1"),
        ("WATCHDOG_SECS", "nan"),
        ("SESSION_TTL_SECS", "inf"),
        ("DRAIN_SECS", "1s"),
        ("LOG_FORMAT", "xml"),
        ("LISTEN_ADDR", "nonsense"),
        ("LISTEN_ADDR", "127.0.0.1:99999"),
        ("LISTEN_ADDR", "0.0.0.0:0"),
        ("LISTEN_ADDR", "[::]:0"),
        ("LISTEN_ADDR", "unix:/no/such/folder/socket"),
        ("BIN", "/no/such/claude"),
        ("BIN", "/etc/passwd"),
    ],
)
def test_a_setting_that_cannot_work_ends_the_start_with_one_line_that_names_it(
    launch: Launch, name: str, value: str
) -> None:
    program = launch(wait=False, **{f"CLAUDE_CLI_{name}": value})
    assert program.wait() == 2
    wait_until(lambda: program.lines, "the line")
    [line] = program.lines
    assert line.startswith(f"claude-cli-bridge: CLAUDE_CLI_{name}: ")


def test_an_address_in_use_ends_the_start_with_one_line_that_names_it(launch: Launch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        program = launch(wait=False, CLAUDE_CLI_LISTEN_ADDR=f"127.0.0.1:{taken.getsockname()[1]}")
        assert program.wait() == 2
    wait_until(lambda: program.lines, "the line")
    [line] = program.lines
    assert line.startswith("claude-cli-bridge: CLAUDE_CLI_LISTEN_ADDR: ")
    assert "in use" in line


def test_flags_go_before_the_environment(launch: Launch) -> None:
    flags = ("--bin", str(STANDIN), "--max-sessions", "2", "--log-format", "json")
    program = launch(
        *flags,
        CLAUDE_CLI_BIN="/no/such",
        CLAUDE_CLI_MAX_SESSIONS="many",
        CLAUDE_CLI_LOG_FORMAT="xml",
    )
    assert program.post().text == "echo: hello; 1 messages"


# the start


def test_the_start_asks_who_is_logged_in_and_sends_nothing_to_the_model(
    launch: Launch, log: Log
) -> None:
    program = launch()
    printed(program, "logged in: stand-in (user ")
    wait_until(lambda: not program.children(), "the end of the process that was asked")
    [(pid, _)] = log.started().items()
    assert log.requests(pid) == ["initialize"]
    assert [line["type"] for line in log.lines(pid)] == ["control_request"]


def test_without_a_login_the_bridge_starts_and_says_how_to_log_in(launch: Launch) -> None:
    program = launch(STANDIN_SONNET="not-logged-in")
    printed(program, "nobody is logged in: no login of user ")
    answer = program.post(model="not-logged-in")
    assert (answer.status, answer.json["error"]["type"]) == (401, "authentication_error")
    assert "nobody is logged in: no login of user " in answer.json["error"]["message"]
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("model", ["exit-at-start", "hang-at-start"])
def test_a_cli_that_does_not_work_is_said_at_the_start_and_does_not_stop_it(
    launch: Launch, model: str
) -> None:
    program = launch(STANDIN_SONNET=model, CLAUDE_CLI_WATCHDOG_SECS="1")
    printed(program, "cannot be used: ")
    assert program.call("GET", "/healthz").status == 200
    assert program.post(model="opus").text == "echo: hello; 1 messages"


# the end

signals = pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"]
)


@signals
def test_a_signal_ends_an_idle_bridge_with_its_processes_and_connections(
    launch: Launch, log: Log, number: signal.Signals
) -> None:
    program = launch(CLAUDE_CLI_DRAIN_SECS="1000")
    assert program.post().status == 200
    with program.connect() as unused:
        program.process.send_signal(number)
        assert program.wait() == 0
        assert unused.recv(1) == b""
    assert log.started()
    assert not [pid for pid in log.started() if alive(pid)]
    assert not [line for line in program.lines if "Traceback" in line]


def test_a_signal_during_the_start_ends_the_bridge(launch: Launch, log: Log) -> None:
    program = launch(STANDIN_SONNET="hang-at-start", CLAUDE_CLI_DRAIN_SECS="1000")
    wait_until(log.started, "the process that is asked who is logged in")
    program.process.send_signal(signal.SIGTERM)
    assert program.wait() == 0
    assert not [pid for pid in log.started() if alive(pid)]


def refuses(program: Program) -> bool:
    try:
        program.connect().close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:  # at the very moment
        return False
    return False


@signals
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_on_shutdown_running_answers_are_completed_and_new_connections_refused(
    launch: Launch,
    gate: Path,
    log: Log,
    background: ThreadPoolExecutor,
    number: signal.Signals,
    stream: bool,
) -> None:
    program = launch(CLAUDE_CLI_DRAIN_SECS="1000")
    running = background.submit(program.post, "PAUSE", stream=stream)
    wait_until(lambda: log.got("PAUSE"), "the turn")
    program.process.send_signal(number)
    wait_until(lambda: refuses(program), "closed doors")
    assert program.process.poll() is None
    gate.touch()
    assert running.result().text == "echo: PAUSE; 1 messages"
    assert running.result().message["stop_reason"] == "end_turn"
    assert program.wait() == 0
    assert not [pid for pid in log.started() if alive(pid)]


@pytest.mark.parametrize(
    ("text", "stream", "begun"),
    [("PAUSE", True, True), ("PAUSE", False, False), ("PAUSE-START", True, False)],
    ids=["in mid stream", "whole", "before the first event"],
)
def test_on_shutdown_an_answer_that_takes_too_long_ends_with_an_error(
    launch: Launch,
    gate: Path,
    log: Log,
    background: ThreadPoolExecutor,
    text: str,
    stream: bool,
    begun: bool,
) -> None:
    program = launch(CLAUDE_CLI_DRAIN_SECS="0.5")
    running = background.submit(program.post, text, stream=stream)
    wait_until(lambda: log.got(text), "the turn")
    program.process.send_signal(signal.SIGTERM)
    answer = running.result()
    if begun:
        kinds = [event["type"] for event in answer.events]
        assert kinds.index("error") == len(kinds) - 1 > 0
        assert "message_stop" not in kinds
        body = answer.events[-1]
    else:
        assert answer.status == 503
        body = answer.json
    assert body["error"]["type"] == "api_error"
    assert "shutting down" in body["error"]["message"]
    assert program.wait() == 0
    assert log.requests(log.got(text))[-1] == "interrupt"
    assert not [pid for pid in log.started() if alive(pid)]


def test_when_the_bridge_is_killed_in_mid_answer_no_process_is_left(
    launch: Launch, log: Log, background: ThreadPoolExecutor
) -> None:
    """Not even one that does not look at its pipes: the end of the bridge itself must reach it."""
    program = launch()
    assert program.post("hello", model="ignore-sigterm").status == 200
    running = background.submit(program.post, "HANG-START", model="ignore-sigterm")
    wait_until(lambda: log.got("HANG-START"), "the turn")
    program.process.kill()
    program.wait()
    wait_until(lambda: not [pid for pid in log.started() if alive(pid)], "the end of all processes")
    assert running.exception() is not None


# the log


def rows(program: Program, log_format: str) -> list[dict[str, object]]:
    """The log's lines about requests."""
    if log_format == "json":
        return [json.loads(line) for line in program.lines if "request_id" in line]
    lines = [line.split(" INFO ")[1] for line in program.lines if "request_id=" in line]
    return [dict(pair.split("=", 1) for pair in shlex.split(line)) for line in lines]


DIED = "the claude CLI exited with status 1"
NOT_JSON = "The request body is not valid JSON: unexpected end of data: line 1 column 2 (char 1)"
NO_ROUTE = (
    "no route for '/nowhere': this is the Anthropic Messages API (POST /v1/messages); "
    "the base URL is {}"
)


@formats
def test_each_request_is_one_line_in_the_log(launch: Launch, log_format: str) -> None:
    program = launch("--log-format", log_format)
    first = program.post("hello")
    hot = program.post(["hello", first.text, "and now"], stream=True)
    rebuilt = program.post(["other", "yes", "and now"], model="claude-cli/opus")
    died = program.post("DIE-START")
    answers = [
        first,
        hot,
        rebuilt,
        died,
        program.call("POST", "/v1/messages", b"{"),
        program.call("GET", "/nowhere"),
    ]
    wait_until(
        lambda: len(rows(program, log_format)) == len(answers), f"the lines: {program.lines}"
    )
    expected = [
        ("new", None, "sonnet", 200, None),
        ("hot", None, "sonnet", 200, None),
        ("rebuilt", "unknown-history", "opus", 200, None),
        ("new", DIED, "sonnet", 502, "claude_cli_error"),
        (None, NOT_JSON, None, 400, "invalid_request_error"),
        (None, NO_ROUTE.format(program.url), None, 404, "not_found_error"),
    ]
    for row, answer, values in zip(rows(program, log_format), answers, expected, strict=True):
        assert row["request_id"] == answer.headers["request-id"]
        # Not the name itself, by which whoever reads the log could go on with it.
        name = answer.headers.get(HEADER)
        assert row.get("session") == (digest(name).hex()[:12] if name else None)
        found = [row.get(name) for name in ("conversation", "reason", "model", "status", "error")]
        assert found == [
            str(value) if log_format == "text" and value is not None else value for value in values
        ]
        assert float(str(row["secs"])) >= 0
    assert [int(str(row["output_tokens"])) for row in rows(program, log_format)[:3]] == [4, 5, 5]
    assert all(int(str(row["input_tokens"])) == 10 for row in rows(program, log_format)[:3])


def test_every_line_of_a_json_log_is_json(launch: Launch) -> None:
    program = launch("--log-format", "json")
    assert program.post().status == 200
    wait_until(lambda: any("request_id" in line for line in program.lines), "the line")
    assert all(json.loads(line) for line in program.lines)


def requests(program: Program) -> Iterator[Answer]:
    """One of each kind, with a word in it that must not be seen again."""
    key = {"x-api-key": "sesame-key"}

    def post(messages: object, **fields: object) -> Answer:
        fields = {"system": "sesame-system", "metadata": {"user_id": "sesame-user"}, **fields}
        return program.call(
            "POST", "/v1/messages?x=sesame-query", request_body(messages, **fields), key
        )

    for n, text in enumerate(
        ("", "DIE 1", "HALF", "HANG-START", "DIE-START", "NOISE", "RATELIMIT 1", "HANG")
    ):
        yield post(f"sesame-prompt {text}", stream=bool(n % 2))
    yield post("hello", model="sesame/../model!")
    yield post([{"role": "sesame", "content": 1}])
    yield program.call("POST", "/v1/messages", b'{"sesame-body', key)
    yield program.call("POST", "/v1/messages", b"{}", {"x-api-key": "sesame-wrong"})
    yield program.call("GET", "/path?x=sesame-query", None, key)
    yield program.call("GET", "/v1/models/model?x=sesame-query", None, key)
    yield program.call("PUT", "/v1/messages", b"", {**key, "origin": "http://evil.example"})


@formats
def test_no_prompt_answer_or_key_is_in_the_log_not_on_faults_either(
    launch: Launch, log_format: str
) -> None:
    program = launch(
        *("--log-format", log_format, "--watchdog-secs", "1"),
        **{"CLAUDE_CLI_API_KEY": "sesame-key", "CLAUDE_CODE_OAUTH_TOKEN": "sesame-token"},
        CLAUDE_CLI_KEEP_ENV="CLAUDE_CODE_OAUTH_TOKEN",
    )
    statuses = [answer.status for answer in requests(program)]
    wait_until(
        lambda: sum("request_id" in line for line in program.lines) == len(statuses), "the lines"
    )
    assert {200, 400, 401, 403, 404, 429, 502, 504} <= set(statuses)
    assert not [line for line in program.lines if "sesame" in line or "echo" in line]


def test_a_relative_path_of_the_cli_is_found(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(STANDIN.parent.parent)
    program = launch(CLAUDE_CLI_BIN="tests/standin.py")
    assert program.post("hello").text == "echo: hello; 1 messages"


def test_a_unix_socket_in_use_is_refused_and_a_stale_one_is_replaced(
    launch: Launch, tmp_path: Path
) -> None:
    path = tmp_path / "bridge.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    first = launch(CLAUDE_CLI_LISTEN_ADDR=f"unix:{path}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    second = launch(CLAUDE_CLI_LISTEN_ADDR=f"unix:{path}", wait=False)
    assert second.wait() == 2
    wait_until(lambda: second.lines, "a line that says why")
    assert f"cannot listen on unix:{path}: already in use" in second.lines[-1]
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    first.process.terminate()
    assert first.wait() == 0
    assert not path.exists()
