"""What a user or a launcher does with the program: mistyped words, --help, signals, a log that
nobody reads, `login`."""

import dataclasses
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from client import Client
from host import ROOT, STANDIN, wait_until
from processes import alive
from servers import Program
from stand_in import Log
from test_metrics import measure
from test_program import printed, refuses

import bridge

Launch = Callable[..., Program]
BRIDGE = [sys.executable, str(ROOT / "bridge.py")]
GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


def run(*arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    variables = {**os.environ, **environ}
    command = [*BRIDGE, *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-idel", "3"], "there is no --max-idel; did you mean --max-idle?"),
        (["--max_idle=3"], "there is no --max_idle; did you mean --max-idle?"),
        (["--confg", "x"], "there is no --confg; did you mean --config?"),
        (["--verzion"], "there is no --verzion; did you mean --version?"),
        (["--xyzzy"], "there is no --xyzzy; see --help"),
        (["chekc"], "there is no such command; did you mean check?"),
        (["provider"], "there is no such command; did you mean providers?"),
        (
            ["sesame"],
            "there is no such command; a value with spaces needs quotes; see --help",
        ),
        (["check", "sesame"], "check takes nothing but flags; see --help"),
        (["--url", "http://localhost:1"], "there is no --url; see --help"),
        (["--max-idle"], "--max-idle takes a value; see --help"),
        (["--max-idle", "--spares", "1"], "--max-idle takes a value; see --help"),
    ],
)
def test_a_mistyped_word_is_refused_with_what_was_probably_meant(
    words: list[str], said: str
) -> None:
    with pytest.raises(bridge.ConfigError) as caught:
        bridge.read_flags(words, {})
    assert str(caught.value) == said


def test_a_mistyped_word_ends_the_program_with_one_line() -> None:
    done = run("--max-idel", "3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "claude-cli-bridge: there is no --max-idel; did you mean --max-idle?\n"


def test_mistyped_variables_are_warned_of_at_the_start(launch: Launch) -> None:
    program = launch(
        CLAUDE_CLI_MAX_SESSION="3",
        CLAUDE_CLI_XYZZY="sesame",
        CLAUDE_CLI_CONFIG="",
        CLAUDE_CLI_KEEP_ENV="ANTHROPIC_API_KEYS",
    )
    printed(program, "CLAUDE_CLI_MAX_SESSION is no setting; did you mean CLAUDE_CLI_MAX_SESSIONS?")
    printed(program, "CLAUDE_CLI_XYZZY is no setting")
    printed(program, "ANTHROPIC_API_KEYS is not set; did you mean ANTHROPIC_API_KEY?")
    assert not [line for line in program.lines if "sesame" in line or "CONFIG is" in line]


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_says_all_there_is_in_lines_of_80_characters(word: str) -> None:
    done = run(word, CLAUDE_CLI_MAX_IDLE="nonsense")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    first = [line.split()[0] for line in lines if re.match(r"  \S", line)]
    settings = {"--" + item.name.replace("_", "-") for item in dataclasses.fields(bridge.Config)}
    expected = settings - {"--api-key"} | {"check", "login", "providers"}
    assert set(first) == expected | {"--config", "--version", "--help,"}
    assert len(first) == len(set(first))
    assert "[127.0.0.1:14001]" in done.stdout
    assert "CLAUDE_CLI_API_KEY has no flag" in done.stdout
    for group in bridge.GROUPS.values():
        assert f"{group}:" in lines


def test_version_is_printed() -> None:
    assert run("--version").stdout == f"claude-cli-bridge {bridge.__version__}\n"


@pytest.mark.parametrize(
    ("words", "closed", "status"),
    [
        (["--version"], "| (exec <&-)", 141),
        (["--help"], "| (exec <&-)", 141),
        (["providers", "--config", "{file}"], ">&-", 0),
        (["check", "--bin", "{cli}", "--watchdog-secs", "1"], ">&-", 1),
    ],
)
def test_an_output_that_nobody_reads_is_no_traceback(
    tmp_path: Path, words: list[str], closed: str, status: int
) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"model_providers": []}')
    script = f'set -o pipefail; {{ sleep 0.5; "$@"; }} {closed}'
    command = [
        "bash",
        "-c",
        script,
        "bash",
        *BRIDGE,
        *(word.format(file=file, cli=STANDIN) for word in words),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (status, "")


def test_a_path_that_is_not_utf_8_can_be_logged_as_json(launch: Launch, tmp_path: Path) -> None:
    cli = os.fsencode(tmp_path) + b"/cl\xffaude"
    os.symlink(STANDIN, cli)
    program = launch("--log-format", "json", CLAUDE_CLI_BIN=os.fsdecode(cli))
    printed(program, "cl?aude")
    assert program.post().status == 200


@pytest.mark.parametrize("words", [["check", "--listen-addr", "nowhere"], ["chekc"]])
def test_a_mistake_is_said_in_one_line_by_check_and_before_it(words: list[str]) -> None:
    done = run(*words)
    said = (done.stdout + done.stderr).splitlines()
    assert len(said) == 1
    assert "settings: --listen-addr: " in said[0] or "did you mean check?" in said[0]


def test_login_is_the_clis_own_in_this_terminal(tmp_path: Path) -> None:
    script = tmp_path / "claude"
    script.write_text('#!/bin/sh\necho "$@"; cat; exit 7\n')
    script.chmod(0o755)
    command = [*BRIDGE, "login", "--bin", str(script)]
    done = subprocess.run(command, input="code", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, "auth login\ncode", "")
    done = run("login", "--bin", "/no/such")
    assert done.returncode == 2
    assert done.stderr.startswith("claude-cli-bridge: --bin: '/no/such' does not exist")


def test_a_key_that_is_not_utf8_ends_the_start_and_is_not_printed(launch: Launch) -> None:
    program = launch(wait=False, CLAUDE_CLI_API_KEY="sesame\udcff")
    assert program.wait() == 2
    wait_until(lambda: program.lines, "the line")
    [line] = program.lines
    assert line.startswith("claude-cli-bridge: CLAUDE_CLI_API_KEY: must be one line of UTF-8")
    assert "sesame" not in line


# ---------------------------------------------------------------- signals


def test_sighup_completes_running_answers_and_ends_the_bridge(
    launch: Launch, gate: Path, log: Log, background: ThreadPoolExecutor
) -> None:
    program = launch(CLAUDE_CLI_DRAIN_SECS="1000")
    running = background.submit(program.post, "PAUSE", stream=True)
    wait_until(lambda: log.got("PAUSE"), "the turn")
    program.process.send_signal(signal.SIGHUP)
    printed(program, "running answers: 1, which get 1000 s (Ctrl-C again stops them)")
    wait_until(lambda: refuses(program), "closed doors")
    assert program.process.poll() is None
    gate.touch()
    assert running.result().message["stop_reason"] == "end_turn"
    assert program.wait() == 0
    assert not [pid for pid in log.started() if alive(pid)]


def test_under_nohup_sighup_is_ignored(launch: Launch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does; children inherit it
    try:
        program = launch()
    finally:
        signal.signal(signal.SIGHUP, before)
    program.process.send_signal(signal.SIGHUP)
    assert program.post().status == 200
    assert not [line for line in program.lines if "shutting down" in line]
    program.process.send_signal(signal.SIGTERM)
    assert program.wait() == 0


# ---------------------------------------------------------------- the log


def unread(*arguments: str) -> tuple["subprocess.Popen[bytes]", Client]:
    """The program with a stderr of which one line was read."""
    environ = {**os.environ, "CLAUDE_CLI_BIN": str(STANDIN), "CLAUDE_CLI_SPARES": "0"}
    command = [*BRIDGE, "--listen-addr", "127.0.0.1:0", *arguments]
    process = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, bufsize=0)
    assert process.stderr
    fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
    found = re.search(rb"listening on http://127.0.0.1:(\d+)", process.stderr.readline())
    assert found
    return process, Client("127.0.0.1", int(found[1]))


def pipelined(client: Client, count: int) -> int:
    """The answers to that many requests on one connection."""
    with client.connect() as connection:
        sender = threading.Thread(target=connection.sendall, args=(GET * count,))
        sender.start()
        with connection.makefile("rb") as file:
            answers = 0
            while answers < count:
                answers += file.readline().endswith(b"HTTP/1.1 200 OK\r\n")
        sender.join()
    return answers


def test_a_reader_of_the_log_that_stops_reading_loses_lines_that_are_counted_and_no_answer() -> (
    None
):
    process, client = unread()
    assert process.stderr
    try:
        count = bridge.MAX_LOG_LINES + 500
        assert pipelined(client, count) == count
        lost = measure(client)("log_lines_lost_total")
        assert lost > 0
        assert client.post().text == "echo: hello; 1 messages"
        written = 0
        while written < count - lost:  # all others are there once it reads again
            line = process.stderr.readline()
            assert line.endswith(b"\n")
            written += b"route=/healthz" in line
        process.terminate()
        assert b"shutting down" in process.stderr.read()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.stderr.close()
        process.wait()


def test_a_reader_of_the_log_that_left_loses_lines_that_are_counted_and_no_answer() -> None:
    process, client = unread("--log-format", "json")
    assert process.stderr
    process.stderr.close()
    try:
        assert [client.post().status for _ in range(3)] == [200] * 3
        wait_until(lambda: measure(client)("log_lines_lost_total") >= 3, "the lines")
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_a_program_started_without_open_standard_files_works_and_writes_its_log_nowhere(
    tmp_path: Path, closed: str
) -> None:
    """The next file opened would have been number 2, and a client would have got the log.

    What Python's libraries read may be there: libffi 3.5 keeps itself open, before anything runs.
    """
    path = tmp_path / "socket"
    environ = {**os.environ, "CLAUDE_CLI_BIN": str(STANDIN)}
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", *BRIDGE, "--listen-addr", f"unix:{path}"]
    process = subprocess.Popen(command, env=environ)
    try:
        wait_until(path.exists, "the start")
        for number in (2,) if closed == "2>&-" else range(3):
            target = os.readlink(f"/proc/{process.pid}/fd/{number}")
            told = Path(f"/proc/{process.pid}/fdinfo/{number}").read_text()
            flags = int(told.split("flags:")[1].split()[0], 8)
            is_library = ".so" in target and flags & os.O_ACCMODE == os.O_RDONLY
            assert is_library or target == "/dev/null"
        with socket.socket(socket.AF_UNIX) as client:
            wait_until(lambda: not client.connect_ex(str(path)), "the listener")
            client.sendall(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
            with client.makefile("rb") as file:
                assert file.read().endswith(b"\r\n\r\nok")
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
