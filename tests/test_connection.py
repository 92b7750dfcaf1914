"""A connection, byte by byte: connect, send bytes, look at the bytes that come back."""

import contextlib
import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from client import request_body
from host import wait_until
from processes import FLOOD, is_held_up, read_all, reaped, send
from servers import Server
from stand_in import Log

Serve = Callable[..., Server]


# ---------------------------------------------------------------- clients


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
