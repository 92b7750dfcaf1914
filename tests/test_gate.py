"""The gate: the pipe through which a conversation reaches a process, and nothing but a pipe."""

import os
import signal
import stat
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from client import Json, prime
from host import wait_until
from processes import alive
from servers import Launch, Program, Serve, linux, plain_cli
from stand_in import Log
from test_metrics import measure

import sessions
from sessions import GATES, close_gates

Run = Callable[..., None]  # post in the background
SECRET = "a heron that nobody else is to read of"


# ---------------------------------------------------------------- where it is


def test_a_temporary_folder_that_cannot_be_written_fails_the_request_and_is_named(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    server = serve(spares=1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    answer = server.post()
    assert (answer.status, answer.json["error"]["type"]) == (502, "claude_cli_error")
    assert f"Not a directory: '{tmp_path}/file" in answer.json["error"]["message"]
    (tmp_path / "file").unlink()
    (tmp_path / "file").mkdir()
    assert server.post().status == 200


def test_a_temporary_folder_that_is_gone_is_replaced(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    assert server.post().status == 200


# ---------------------------------------------------------------- who holds it


def test_a_program_that_closes_descriptors_is_named(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "GATE_SECS", 1.0)
    closing = 'for n in /proc/self/fd/*; do n=${n##*/}; [ $n -gt 2 ] && eval "exec $n>&-"; done'
    server = serve(bin=plain_cli(tmp_path / "claude", f"{closing}\nexec sleep 1000"))
    answer = server.post("hello")
    assert (answer.status, answer.json["error"]["type"]) == (502, "claude_cli_error")
    assert "closes the descriptors that it inherits" in answer.json["error"]["message"]


@linux
def test_a_fork_of_the_host_program_does_not_hold_a_gate(serve: Serve) -> None:
    server = serve(spares=1, watchdog_secs=10)
    assert server.bridge
    pool = server.bridge.pool
    prime(server)
    wait_until(lambda: pool.starter.spares, "the spare")
    child = os.fork()
    if not child:
        signal.pause()
        os._exit(0)
    try:
        assert server.post("hello").status == 200
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# ---------------------------------------------------------------- what a killed bridge leaves


def has_spare(program: Program) -> bool:
    """Whether a spare waits at its gate, and not one that is asked who is logged in."""
    return measure(program)("processes", state="spare") == 1


def waiting_spare(program: Program, log: Log, run: Run) -> None:
    prime(program)
    wait_until(lambda: has_spare(program), "the spare")


def half_through_the_gate(program: Program, log: Log, run: Run) -> None:
    run(["x" * 5_000_000 + SECRET, SECRET, SECRET], model="gate.half-deaf")
    wait_until(lambda: log.reached("gate.half-deaf"), "the child at its gate")


def running_turn(program: Program, log: Log, run: Run) -> None:
    run([SECRET, SECRET, f"{SECRET} HANG-START"], model="ignore-sigterm")
    wait_until(lambda: log.asked("HANG-START"), "the turn")


def parked(program: Program, log: Log, run: Run) -> None:
    tool = {"name": "probe", "description": SECRET, "input_schema": {"type": "object"}}
    answer = program.post([SECRET, SECRET, f"{SECRET} PROBE"], tools=[tool], system=SECRET)
    assert answer.message["stop_reason"] == "tool_use"


def files_with(text: bytes, *folders: Path) -> list[Path]:
    """The files below these folders that hold a text; pipes and links are none."""
    found = [path for folder in folders for path in folder.rglob("*")]
    return [path for path in found if path.is_file() and text in path.read_bytes()]


@linux
@pytest.mark.parametrize("state", [waiting_spare, half_through_the_gate, running_turn, parked])
def test_a_killed_bridge_leaves_no_child_and_no_word_of_a_conversation(
    launch: Launch,
    log: Log,
    background: ThreadPoolExecutor,
    environment: Path,
    tmp_path: Path,
    state: Callable[[Program, Log, Run], None],
) -> None:
    """SIGKILL gives it no time to clear up: what was never written need not be cleared up."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    spares = "1" if state is waiting_spare else "0"
    program = launch(TMPDIR=str(temporary), CLAUDE_CLI_SPARES=spares)
    running: list[Future[Any]] = []

    def run(*arguments: Any, **fields: Any) -> None:
        running.append(background.submit(program.post, *arguments, **fields))

    state(program, log, run)
    children = program.children()
    assert children
    program.process.kill()
    program.wait()
    wait_until(lambda: not [child for child in children if alive(child.pid)], "their end")
    assert all(turn.exception() for turn in running)
    assert files_with(SECRET.encode(), temporary, environment) == []
    assert not files_with(b"x" * 1000, temporary, environment)


@linux  # on macOS its logs are elsewhere
def test_the_cli_writes_down_no_word_of_a_tool_that_fails(
    serve: Serve, cli: Path, environment: Path
) -> None:
    """It logs what its MCP servers say of a failure."""
    server = serve(bin=cli)
    tool = {"name": "look", "input_schema": {"type": "object"}}
    messages: list[Any] = ["USE_TOOL look INPUT={}END"]
    answer = server.post(messages, tools=[tool])
    *_, call = answer.message["content"]
    result = {"type": "tool_result", "tool_use_id": call["id"], "is_error": True, "content": SECRET}
    messages += [
        {"role": "assistant", "content": answer.message["content"]},
        {"role": "user", "content": [result]},
    ]
    answer = server.post(messages, tools=[tool])
    assert (SECRET in answer.text, answer.session) == (True, "hot")
    server.close()
    assert files_with(SECRET.encode(), environment) == []


@linux
@pytest.mark.parametrize("state", ["spare", "running", "parked"])
def test_a_killed_bridge_with_the_real_cli_leaves_no_word_of_a_conversation(
    launch: Launch,
    cli: Path,
    since: Callable[[], list[Json]],
    background: ThreadPoolExecutor,
    environment: Path,
    tmp_path: Path,
    state: str,
) -> None:
    """The CLI is told to keep nothing, and its conversation comes through a pipe."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    spares = "1" if state == "spare" else "0"
    program = launch(TMPDIR=str(temporary), CLAUDE_CLI_BIN=str(cli), CLAUDE_CLI_SPARES=spares)
    past: list[Any] = [SECRET, SECRET]
    running = None
    if state == "spare":
        wait_until(lambda: has_spare(program), "the spare")
    elif state == "running":
        running = background.submit(program.post, [*past, f"SLOW 200 {SECRET}"], stream=True)
        wait_until(since, "the API call")
    else:
        words = f'USE_TOOL probe INPUT={{"secret":"{SECRET}"}}END'
        tool = {"name": "probe", "description": SECRET, "input_schema": {"type": "object"}}
        answer = program.post([*past, words], tools=[tool], system=SECRET)
        assert answer.message["stop_reason"] == "tool_use"
    children = program.children()
    assert children
    program.process.kill()
    program.wait()
    wait_until(lambda: not [child for child in children if alive(child.pid)], "their end")
    assert running is None or running.exception()
    assert files_with(SECRET.encode(), temporary, environment) == []


# ---------------------------------------------------------------- a gate by itself


def test_the_path_of_a_gate_leads_to_its_pipe_and_has_a_folder_of_its_own() -> None:
    reading, writing = os.pipe()
    paths = [Path(sessions.gate_folder(reading), "gate.jsonl") for _ in range(2)]
    try:
        assert paths[0].parent != paths[1].parent
        assert {stat.S_IMODE(path.parent.stat().st_mode) for path in paths} == {0o700}
        os.write(writing, b"past")
        os.close(writing)
        assert paths[0].read_bytes() == b"past"
    finally:
        os.close(reading)
        for path in paths:
            path.unlink()
            path.parent.rmdir()


def test_what_forks_closes_the_gates_that_are_open_and_no_other_file() -> None:
    pipes = [os.pipe() for _ in range(3)]
    gates = [os.fdopen(writing, "wb", 0) for _, writing in pipes]
    GATES.update(gates)
    gates[2].close()
    other = os.dup(pipes[2][0])  # another file in the place of a gate that is closed
    assert other == pipes[2][1]
    close_gates()
    assert [os.read(reading, 1) for reading, _ in pipes] == [b""] * 3
    os.fstat(other)
    for descriptor in (*(reading for reading, _ in pipes), other):
        os.close(descriptor)
