"""What goes wrong in a process or at a client fails that one request, in the right words, and
nothing else."""

import contextlib
import http.client
import json
import logging
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from client import Answer, request_body
from host import wait_until
from servers import Program, Server
from stand_in import Log

import sessions

Serve = Callable[..., Server]
both = pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])


def reaped(pid: int) -> bool:
    return pid > 0 and not psutil.pid_exists(pid)


def check_failure(answer: Answer, *, begun: bool, status: int, kind: str, words: str) -> None:
    """An error answer; in mid stream one error event, at the end, and no message_stop."""
    if begun:
        kinds = [event["type"] for event in answer.events]
        assert answer.status == 200
        assert kinds[0] == "message_start"
        assert kinds.index("error") == len(kinds) - 1
        assert "message_stop" not in kinds
        body = answer.events[-1]
    else:
        assert answer.status == status
        assert answer.headers["content-type"] == "application/json"
        body = answer.json
    assert body["error"]["type"] == kind
    assert words in body["error"]["message"]
    assert body["request_id"] == answer.headers["request-id"]


MID, START = True, False
DIED = {"status": 502, "kind": "claude_cli_error"}
SILENT = {"status": 504, "kind": "timeout_error", "words": "silent for 1 seconds"}
FAULTS = {
    "DIE 3": (MID, {**DIED, "words": "exited with status 3: stand-in: told to die"}),
    "HALF": (MID, {**DIED, "words": "exited with status 0"}),
    "STDERR 300000 DIE 4": (MID, {**DIED, "words": "exited with status 4: stand-in: told to die"}),
    "DIE-START": (
        START,
        {**DIED, "words": "exited with status 1: stand-in: told to die before any event"},
    ),
    "HANG": (MID, SILENT),
    "HANG-START": (START, SILENT),
    "RETRY 100 HANG-START": (START, SILENT),
    "RATELIMIT 1": (
        START,
        {"status": 429, "kind": "rate_limit_error", "words": "You've hit your 5-hour limit"},
    ),
}


@both
@pytest.mark.parametrize("text", FAULTS)
def test_a_fault_fails_its_request_alone_and_retires_its_process(
    serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor, text: str, stream: bool
) -> None:
    server = serve(watchdog_secs=1)
    other = background.submit(server.post, "PAUSE other", stream=True)
    wait_until(lambda: log.got("PAUSE other"), "the other conversation's turn")
    begun, failure = FAULTS[text]
    check_failure(server.post(text, stream=stream), begun=begun and stream, **failure)
    wait_until(lambda: reaped(log.got(text)), "the end of the process")
    gate.touch()
    assert other.result().text == "echo: PAUSE other; 1 messages"
    assert server.post("next", stream=stream).text == "echo: next; 1 messages"
    assert other.result().events[-1] == {"type": "message_stop"}


@both
@pytest.mark.parametrize(
    ("model", "status", "kind", "words"),
    [
        (
            "exit-at-start",
            502,
            "claude_cli_error",
            "exited with status 1: stand-in: told to exit at the start",
        ),
        ("hang-at-start", 504, "timeout_error", "silent for 1 seconds"),
        ("not-logged-in", 401, "authentication_error", "nobody is logged in: no login of user "),
    ],
)
def test_a_process_that_does_not_come_up_is_an_error_status(
    serve: Serve, stream: bool, model: str, status: int, kind: str, words: str
) -> None:
    server = serve(watchdog_secs=1)
    answer = server.post("hello", model=model, stream=stream)
    check_failure(answer, begun=False, status=status, kind=kind, words=words)
    assert answer.headers.get("x-should-retry") == ("false" if status == 401 else None)


def test_a_cli_that_cannot_be_started_is_502(serve: Serve, tmp_path: Path) -> None:
    program = tmp_path / "claude"
    program.write_bytes(b"\0not a program")
    program.chmod(0o755)
    server = serve(bin=program, max_sessions=1)
    for _ in range(2):  # its slot is free again
        check_failure(
            server.post(), begun=False, **DIED, words="cannot be started: Exec format error"
        )


@both
@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("DIE-PAST", {**DIED, "words": "told to die while the past is put in"}),
        ("HANG-PAST", SILENT),
    ],
)
def test_a_fault_while_a_history_is_rebuilt_is_an_error_status(
    serve: Serve, log: Log, text: str, failure: dict[str, object], stream: bool
) -> None:
    answer = serve(watchdog_secs=1).post([text, "yes", "go on"], stream=stream)
    check_failure(answer, begun=False, **failure)
    wait_until(lambda: reaped(log.got(text)), "the end of the process")


@both
@pytest.mark.parametrize(
    "text",
    [
        "NOISE é漢😀",
        "SPLIT é漢😀",
        "SPLIT NOISE",
        "STDERR 2000000",
        "TWORESULTS",
        "SLOW 130",
        "RETRY 2600",
        "BIGLINE 5000000",
    ],
)
def test_strange_output_does_not_fail_an_answer(serve: Serve, text: str, stream: bool) -> None:
    takes_long = text.startswith(("SLOW", "RETRY"))
    server = serve(watchdog_secs=2 if takes_long else 60)
    expected = {
        "SLOW": "".join(f"{n} " for n in range(130)),
        "BIGLINE": f"echo: {text}; 1 messages" + "x" * 5_000_000,
    }.get(text.split()[0], f"echo: {text}; 1 messages")
    answer = server.post(text, stream=stream)
    assert answer.text == expected
    assert answer.message["stop_reason"] == "end_turn"
    again = server.post([text, answer.text, "and now"], stream=stream)
    # A second result that comes in a read of its own is one that nobody asked for.
    spoke = text == "TWORESULTS" and again.session == "rebuilt; reason=unasked"
    assert again.session == "hot" or spoke
    assert again.text == "echo: and now; 3 messages"


def test_an_answer_is_complete_without_a_result_and_its_process_is_not_used_again(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "LATE_SECS", 0.2)
    server = serve()
    answer = server.post("NORESULT")
    assert answer.text == "echo: NORESULT; 1 messages"
    again = server.post(["NORESULT", answer.text, "and now"])
    assert (again.session, again.text) == ("rebuilt; reason=failed", "echo: and now; 3 messages")


@pytest.mark.parametrize("text", ["TORN-DELTA", "TORN-EVENT"])
def test_a_line_that_is_cut_off_behind_a_complete_answer_does_not_fail_it(
    serve: Serve, text: str
) -> None:
    server = serve()
    streamed, whole = server.post(text, stream=True), server.post(text)
    assert (whole.status, whole.text) == (200, f"echo: {text}; 1 messages")
    assert (streamed.events[-1], streamed.text) == ({"type": "message_stop"}, whole.text)
    again = server.post([text, whole.text, "and now"])
    assert (again.session, again.text) == ("rebuilt; reason=failed", "echo: and now; 3 messages")


@both
def test_a_line_without_an_end_fails_the_answer(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(sessions, "MAX_LINE", 1 << 20)
    answer = serve().post("BIGLINE 3000000", stream=stream)
    check_failure(answer, begun=False, **DIED, words="a line of more than 1 MiB")


def test_a_process_that_no_longer_reads_fails_its_next_turn_and_is_ended(
    serve: Serve, log: Log
) -> None:
    server = serve(watchdog_secs=3)
    answer = server.post("NOSTDIN")
    check_failure(
        server.post(["NOSTDIN", answer.text, "and now"]),
        begun=False,
        status=504,
        kind="timeout_error",
        words="silent",
    )
    wait_until(lambda: reaped(log.got("NOSTDIN")), "the end of the process")
    assert server.post(["NOSTDIN", answer.text, "and now"]).text == "echo: and now; 3 messages"


@both
@pytest.mark.parametrize(("seconds", "retry"), [(-100, None), (40, None), (4000, "false")])
def test_a_rate_limit_says_when_it_ends_and_whether_to_wait(
    serve: Serve, stream: bool, seconds: int, retry: str | None
) -> None:
    began = time.time()
    answer = serve().post(f"RATELIMIT {int(began) + seconds}", stream=stream)
    assert answer.status == 429
    assert max(1, seconds - 15) <= int(answer.headers["retry-after"]) <= max(1, seconds)
    assert answer.headers.get("x-should-retry") == retry


# clients


def send(server: Server | Program, messages: object, **fields: object) -> socket.socket:
    """Send a request by hand, so that the test decides what is read and when the client leaves."""
    client = socket.socket()
    # Small, but not less than segments of loopback.
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)
    client.settimeout(30)
    client.connect((server.host, server.port))
    body = json.dumps(request_body(messages, **fields)).encode()
    client.sendall(
        b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        b"content-length: %d\r\n\r\n%b" % (len(body), body)
    )
    return client


def read_all(client: socket.socket) -> Answer:
    response = http.client.HTTPResponse(client)
    response.begin()
    return Answer(
        response.status,
        {name.lower(): value for name, value in response.getheaders()},
        response.read(),
    )


def written(pid: int) -> int:
    return psutil.Process(pid).io_counters().write_chars


def is_held_up(log: Log, text: str) -> bool:
    """Whether the process of this turn got to write 1 MiB and then no more for a while."""
    pid = log.got(text)
    if not pid or written(pid) < 1 << 20:
        return False
    before = written(pid)
    time.sleep(0.2)
    return written(pid) == before


FLOOD = "FLOOD 80000"  # about 20 MB of events


def test_a_client_that_does_not_read_holds_up_its_own_process_and_nothing_else(
    serve: Serve, log: Log
) -> None:
    server = serve()
    before = psutil.Process().memory_info().rss
    with send(server, FLOOD, stream=True) as slow:
        wait_until(lambda: is_held_up(log, FLOOD), "a process that can write no more")
        assert server.post("next").text == "echo: next; 1 messages"
        assert is_held_up(log, FLOOD)
        assert written(log.got(FLOOD)) < 14 << 20
        assert psutil.Process().memory_info().rss - before < 32 << 20
        answer = read_all(slow)
    deltas = [
        event["delta"]["text"] for event in answer.events if event["type"] == "content_block_delta"
    ]
    assert deltas == [f"{n} " for n in range(80000)]
    assert answer.events[-1] == {"type": "message_stop"}


@pytest.mark.parametrize(
    ("messages", "stream", "read"),
    [
        ("PAUSE", True, True),
        ("PAUSE-START", True, False),
        ("PAUSE", False, False),
        (["PAUSE-PAST", "yes", "go on"], True, False),
        (["PAUSE-PAST", "yes", "go on"], False, False),
    ],
    ids=[
        "in mid stream",
        "before the first byte",
        "whole answer",
        "rebuilding, stream",
        "rebuilding, whole",
    ],
)
def test_when_the_client_leaves_the_turn_is_interrupted_and_its_process_ends(
    serve: Serve, gate: Path, log: Log, messages: str | list[str], stream: bool, read: bool
) -> None:
    server = serve()
    first = messages if isinstance(messages, str) else messages[0]
    with send(server, messages, stream=stream) as client:
        wait_until(lambda: log.got(first), "the turn")
        pid = log.got(first)
        data = b""
        while read and b"content_block_delta" not in data:
            data += client.recv(65536)
    wait_until(lambda: reaped(pid), "the end of the process")
    assert log.requests(pid)[-1] == "interrupt"
    assert not gate.exists()
    assert server.post("next").text == "echo: next; 1 messages"


def test_the_silence_of_a_slow_client_is_not_the_clis(serve: Serve, log: Log) -> None:
    server = serve(watchdog_secs=3)
    assert server.bridge
    with send(server, FLOOD, stream=True) as slow:
        wait_until(lambda: is_held_up(log, FLOOD), "a process that can write no more")
        (session,) = server.bridge.pool.sessions
        wait_until(
            lambda: time.monotonic() > session.process._alive_at + 3.1,
            "more than the watchdog's time",
        )
        answer = read_all(slow)
    assert answer.events[-1] == {"type": "message_stop"}


def test_a_client_that_never_reads_on_loses_its_connection_and_frees_its_process(
    serve: Serve, log: Log
) -> None:
    server = serve(max_sessions=1, idle_secs=1)
    with send(server, FLOOD, stream=True):
        wait_until(lambda: is_held_up(log, FLOOD), "a process that can write no more")
        assert server.post("next").text == "echo: next; 1 messages"


def test_a_client_that_leaves_without_reading_frees_its_process(serve: Serve, log: Log) -> None:
    server = serve(max_sessions=1)
    with send(server, FLOOD, stream=True):
        wait_until(lambda: is_held_up(log, FLOOD), "a process that can write no more")
    wait_until(lambda: reaped(log.got(FLOOD)), "the end of the process")
    assert server.post("next").text == "echo: next; 1 messages"


@pytest.mark.parametrize("session", [None, "pinned"])
def test_a_client_that_leaves_while_its_request_waits_takes_no_room(
    serve: Serve,
    gate: Path,
    log: Log,
    background: ThreadPoolExecutor,
    caplog: pytest.LogCaptureFixture,
    session: str | None,
) -> None:
    caplog.set_level(logging.INFO, "claude_cli_bridge")
    server = serve(max_sessions=1)
    first = background.submit(server.post, "PAUSE", session=session)
    wait_until(lambda: log.got("PAUSE"), "the turn that holds the room")
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(server.connect())
        body = json.dumps(request_body("never")).encode()
        header = f"x-arch-claude-cli-session: {session}\r\n" if session else ""
        head = f"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\n{header}content-length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        wait_until(lambda: server.bridge and len(server.bridge._answers) == 2, "a second request")
    wait_until(lambda: "status=499" in caplog.text, "the log line of a client that left")
    gate.touch()
    assert first.result().text == "echo: PAUSE; 1 messages"
    assert server.post("next", session=session).status == 200
    assert not log.got("never")
