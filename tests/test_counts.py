"""Processes that count tokens: their room, their time, and what becomes of them.  (What they count
is in test_api, with the real CLI.)"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from host import wait_until
from servers import Server
from stand_in import Log
from test_api import count
from test_metrics import measure
from test_processes import in_work

import sessions

Serve = Callable[..., Server]
PROBE = {"name": "probe", "input_schema": {"type": "object"}}
OTHER = {"name": "other", "input_schema": {"type": "object"}}


def test_a_message_that_waits_gets_the_room_of_a_count_that_ends(
    serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor
) -> None:
    server = serve(max_sessions=1, queue_secs=5)
    counted = background.submit(count, server, model="slow-start")
    wait_until(lambda: log.started(), "the process that counts")
    answer = background.submit(server.post, "hello")
    in_work(server, 2)
    gate.touch()
    assert counted.result().status == 200
    assert answer.result().text == "echo: hello; 1 messages"


def test_a_count_that_gets_no_process_in_time_is_529(
    serve: Serve,
    gate: Path,
    log: Log,
    background: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The time in which the CLI must count begins when it can."""
    monkeypatch.setattr(sessions, "COUNT_SECS", 0.5)
    server = serve(max_sessions=1, queue_secs=1.5)
    running = background.submit(server.post, "PAUSE")
    wait_until(lambda: log.got("PAUSE"), "the turn")
    answer = count(server)
    assert (answer.status, answer.json["error"]["type"]) == (529, "overloaded_error")
    assert answer.headers["retry-after"]
    gate.touch()
    assert running.result().status == 200


def test_a_cli_that_does_not_count_in_time_is_504(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "COUNT_SECS", 0.5)
    answer = count(serve(), model="initialized.hang")
    assert (answer.status, answer.json["error"]["type"]) == (504, "timeout_error")
    assert "did not count" in answer.json["error"]["message"]


def test_a_process_that_dies_while_it_counts_is_said_to_have_died(serve: Serve) -> None:
    server = serve()
    answer = count(server, model="initialized.exit")
    assert (answer.status, answer.json["error"]["type"]) == (502, "claude_cli_error")
    assert measure(server)("processes_ended_total", reason="died") == 1
