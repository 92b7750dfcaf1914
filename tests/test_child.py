"""A child process as bytes: its start, its lines, its pace, its end."""

import asyncio
import logging
import os
import resource
import signal
from pathlib import Path

import psutil
import pytest
from client import error_of
from host import wait_until
from processes import (
    DIED,
    FLOOD,
    PROBE,
    alive,
    check_failure,
    is_held_up,
    pid,
    read_all,
    send,
    written,
)
from servers import Launch, Serve, both, linux, plain_cli
from stand_in import Log

import sessions
from sessions import Cli, Process

# ---------------------------------------------------------------- its start


def test_a_cli_that_cannot_be_started_is_502(serve: Serve, tmp_path: Path) -> None:
    program = tmp_path / "claude"
    program.write_bytes(b"\0not a program")
    program.chmod(0o755)
    server = serve(bin=program, max_sessions=1)
    for _ in range(2):  # its slot is free again
        check_failure(
            server.post(),
            begun=False,
            **DIED,
            words="cannot be started: [Errno 8] Exec format error",
        )


def test_a_program_without_file_descriptors_fails_the_request_and_goes_on(
    launch: Launch,
) -> None:
    program = launch()
    used = len(os.listdir(f"/proc/{program.process.pid}/fd"))
    resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE, (used + 2, 4096))
    answer = program.post()
    assert error_of(answer) == (502, "claude_cli_error")
    assert "cannot be started" in answer.json["error"]["message"]
    resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE, (4096, 4096))
    assert program.post().status == 200


# ---------------------------------------------------------------- its lines, and its pace


@both
def test_a_line_without_an_end_fails_the_answer(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(sessions, "MAX_LINE", 1 << 20)
    answer = serve().post("BIGLINE 3000000", stream=stream)
    check_failure(answer, begun=False, **DIED, words="a line of more than 1 MiB")


def test_a_client_that_does_not_read_holds_up_its_own_process_and_nothing_else(
    serve: Serve, log: Log
) -> None:
    server = serve()
    before = psutil.Process().memory_info().rss
    with send(server, FLOOD, stream=True) as slow:
        wait_until(lambda: is_held_up(log, FLOOD), "a process that can write no more")
        assert server.post("next").text == "echo: next; 1 messages"
        wait_until(lambda: is_held_up(log, FLOOD), "that it is held up still")
        assert written(log.got(FLOOD)) < 14 << 20
        assert psutil.Process().memory_info().rss - before < 32 << 20
        answer = read_all(slow)
    deltas = [
        event["delta"]["text"] for event in answer.events if event["type"] == "content_block_delta"
    ]
    assert deltas == [f"{n} " for n in range(80000)]
    assert answer.events[-1] == {"type": "message_stop"}


def test_a_line_of_stderr_is_one_line_of_the_log_and_a_key_that_comes_in_two_reads_is_masked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def use() -> None:
        process = Process(Cli())
        process.pid = 7
        process.pipe_data_received(2, b"the key sk-ant-ap")
        assert caplog.records == []
        process.pipe_data_received(2, b"i03-SECRETSECRET is no\none\n\nmo")
        process.pipe_data_received(2, b"re\n")

    with caplog.at_level(logging.DEBUG, "claude_cli_bridge"):
        asyncio.run(use())
    words = ["the key sk-ant-*** is no", "one", "more"]
    assert caplog.messages == [f"process 7 prints: {line}" for line in words]


# ---------------------------------------------------------------- its end


def test_a_process_that_ignores_the_end_of_its_input_and_sigterm_is_killed(serve: Serve) -> None:
    answer = serve(max_idle=0).post(model="ignore-sigterm")
    assert answer.status == 200
    wait_until(lambda: not psutil.pid_exists(pid(answer)), "the end of the process")


def test_a_process_whose_tool_call_is_yet_to_come_is_killed_at_once(serve: Serve, log: Log) -> None:
    """It would call the API once more when its stdin closes."""
    server = serve()
    answer = server.post("PROBE", tools=[PROBE], model="called.wait")
    assert answer.message["stop_reason"] == "tool_use"
    wait_until(lambda: log.reached("called.wait"), "the process")
    server.close()
    assert log.reached("eof") == []


@linux
def test_a_process_that_dies_while_another_keeps_its_output_open_fails_its_turn(
    serve: Serve, tmp_path: Path
) -> None:
    """One that has left its group, so that it is not killed with it."""
    kept = tmp_path / "pid"
    lines = f"setsid sh -c 'echo $$ > {kept}; exec sleep 60' &\n"
    lines += f"until [ -s {kept} ]; do sleep 0.01; done; exit 3"
    answer = serve(bin=plain_cli(tmp_path / "claude", lines)).post("hello")
    os.kill(int(kept.read_text()), signal.SIGKILL)
    assert answer.status == 502
    assert "exited with status 3" in answer.json["error"]["message"]


def test_what_a_process_leaves_behind_is_killed_with_it(serve: Serve) -> None:
    answer = serve(max_idle=0).post("ORPHAN")
    wait_until(lambda: not psutil.pid_exists(pid(answer)), "the end of the process")
    wait_until(lambda: not alive(int(answer.text.split()[-1])), "the end of its child")
