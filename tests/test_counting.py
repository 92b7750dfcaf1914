"""Processes that count tokens: what they count, their room, their time, and what becomes of them."""

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from client import Client, Json, count, error_of, request_body
from host import wait_until
from processes import in_work, send
from servers import Serve, Server, plain_cli
from stand_in import Log
from stubs import Stub
from test_metrics import measure

import sessions
from sessions import State

TOOL = {
    "name": "get_weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}


def test_counting_asks_the_api_once_and_no_model(
    real: Server, since: Callable[[], list[Json]]
) -> None:
    first = count(real, system="Be terse.")
    assert first.status == 200
    upstream = len(since())
    assert upstream
    assert {row["path"] for row in since()} == {"/v1/messages/count_tokens"}
    again = count(real, system="Be terse.")
    assert again.json == first.json
    assert len(since()) == upstream
    assert set(first.json) == {"input_tokens"}


def test_a_count_grows_with_all_that_is_counted(real: Server) -> None:
    history = ["hello", "world", "and on"]
    questions: list[dict[str, Any]] = [
        {},
        {"system": "Be terse. " * 50},
        {"tools": [TOOL]},
        {"messages": history},
    ]
    base, *larger = [count(real, **question).json["input_tokens"] for question in questions]
    assert all(0 < base < more for more in larger)


def test_a_tool_adds_to_a_count_what_it_adds_at_the_api(real: Server, stub: Stub) -> None:
    tool = {**TOOL, "description": "The weather. " * 30}
    asked = [
        {"messages": "foo", "model": "claude-opus-5-5", "tools": tools} for tools in ([], [tool])
    ]
    api = Client("127.0.0.1", stub.port)
    ours, theirs = (
        [count(server, **body).json["input_tokens"] for body in asked] for server in (real, api)
    )
    assert abs((ours[1] - ours[0]) - (theirs[1] - theirs[0])) < 50


def test_a_count_is_validated_as_a_message_is(serve: Serve) -> None:
    server = serve()
    for body, words in (
        (b"{", "not valid JSON"),
        (request_body(model=...), "model: Field required"),
        ({"model": "sonnet", "messages": []}, "messages: at least one message is required"),
    ):
        answer = server.call("POST", "/v1/messages/count_tokens", body)
        assert (answer.status, answer.json["error"]["type"]) == (400, "invalid_request_error")
        assert words in answer.json["error"]["message"]
    assert server.processes() == []


def test_counts_at_once_take_a_process_for_each_core_and_wait_for_no_turn(
    real: Server, stub: Stub
) -> None:
    assert real.bridge
    pool = real.bridge.pool
    with ThreadPoolExecutor() as threads, send(real, "SLOW 10000", stream=True) as turn:
        assert turn.recv(1)  # it runs, longer than any machine counts
        counts = [threads.submit(count, real, f"question {number}") for number in range(4)]
        most = 0
        while not all(done.done() for done in counts):
            states = [session.state.value for session in list(pool.room.sessions)]
            most = max(most, sum(state != "retired" for state in states))
            time.sleep(0.005)  # leave the interpreter to the bridge's thread
        assert len(pool.room.in_states(State.BUSY)) == 1  # the turn still runs
        assert 1 < most <= 1 + (os.cpu_count() or 1)  # the turn's, and those that count
        assert [done.result().status for done in counts] == [200] * 4


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


def test_a_conversation_that_the_cli_does_not_take_is_not_counted(
    serve: Serve, tmp_path: Path
) -> None:
    """Its `result` is an error, and what it would count is not all."""
    changed = """sed -u 's/"is_error": *false/"is_error":true/'"""
    program = plain_cli(tmp_path / "claude", f'"$STANDIN" "$@" | {changed}')
    answer = count(serve(bin=program))
    assert (answer.status, answer.json["error"]["type"]) == (502, "claude_cli_error")


def test_a_process_that_dies_while_it_counts_is_said_to_have_died(serve: Serve) -> None:
    server = serve()
    answer = count(server, model="initialized.exit")
    assert (answer.status, answer.json["error"]["type"]) == (502, "claude_cli_error")
    assert measure(server)("processes_ended_total", reason="died") == 1


def test_what_was_not_seen_to_be_counted_by_the_api_is_no_count(
    serve: Serve, cli: Path, environment: Path
) -> None:
    """The CLI would pass off an estimate.  Here the user's settings keep it from logging its calls,
    as another version might."""
    folder = environment / ".claude"
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_text(json.dumps({"env": {"ANTHROPIC_LOG": "off"}}))
    server = serve(bin=cli, setting_sources="user")
    answer = count(server)
    assert error_of(answer) == (502, "claude_cli_error")
    assert "did not answer" in answer.json["error"]["message"]
