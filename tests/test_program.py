"""The bridge as a program: its words, its start, its signals, its log."""

import contextlib
import ctypes
import dataclasses
import fcntl
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from client import Client, Json, error_of
from host import ROOT, STANDIN, wait_until
from processes import HEADER, alive, in_pool, read_all, send
from servers import (
    ADDRESS,
    BRIDGE,
    KEEP,
    Launch,
    Program,
    activate,
    is_up,
    linux,
    printed,
    refusal,
    refuses,
    run,
)
from stand_in import Log
from test_metrics import measure
from wire import GET

import bridge
from bridge import ConfigError, read_flags
from sessions import Pool
from translate import digest

formats = pytest.mark.parametrize("log_format", ["text", "json"])
signals = pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"]
)


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
    for group in bridge.GROUPS:
        assert f"{group.capitalize()}:" in lines


def test_version_is_printed() -> None:
    assert run("--version").stdout == f"claude-cli-bridge {bridge.__version__}\n"


WORDS = {
    "--port 8080": "there is no --port; use --listen-addr=127.0.0.1:PORT",
    "-p 8080": "there is no -p; use --listen-addr=127.0.0.1:PORT",
    "--host=0.0.0.0": "there is no --host; use --listen-addr=HOST:14001",
    "serve": "there is no such command; use `claude-cli-bridge` alone to start it",
    "start": "there is no such command; use `claude-cli-bridge` alone to start it",
    "run": "there is no such command; use `claude-cli-bridge` alone to start it",
    "help": "there is no such command; use --help",
    "version": "there is no such command; use --version",
    "--verbose": "there is no --verbose; use --log-level=debug",
    "--debug": "there is no --debug; use --log-level=debug",
    "--log-file x": "there is no --log-file; use 2>FILE: the log goes to stderr",
    "--model opus": "there is no --model; use `model` in each request",
}


@pytest.mark.parametrize("typed", WORDS)
def test_a_word_that_everybody_tries_is_answered_with_what_to_type(typed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_flags(typed.split(), {})
    assert str(caught.value) == WORDS[typed]


def test_a_key_on_the_command_line_is_not_repeated() -> None:
    said = refusal("--api-key", "sesame")
    assert "CLAUDE_CLI_API_KEY in the environment" in said
    assert "sesame" not in said


def test_a_value_in_two_words_is_told_of_quotes() -> None:
    assert refusal("--tools", "Read", "Grep").endswith(
        "a value with spaces needs quotes; see --help"
    )


def test_what_is_typed_instead_works(launch: Launch) -> None:
    """The flags of the table are flags, and take these values."""
    flags = {word for said in WORDS.values() for word in re.findall(r"--[a-z-]+=\S+", said)}
    assert flags == {
        "--listen-addr=127.0.0.1:PORT",
        "--listen-addr=HOST:14001",
        "--log-level=debug",
    }
    program = launch("--log-level=debug")
    assert program.post().status == 200
    printed(program, " DEBUG request req_")


@pytest.mark.parametrize("command", bridge.COMMANDS)
def test_each_command_has_a_help_of_its_own(command: str) -> None:
    done = run(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: claude-cli-bridge {command} ")
    assert len(done.stdout.splitlines()) < 10
    assert max(map(len, done.stdout.splitlines())) <= 80


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


def test_login_is_the_clis_own_in_this_terminal(tmp_path: Path) -> None:
    script = tmp_path / "claude"
    script.write_text('#!/bin/sh\necho "$@"; cat; exit 7\n')
    script.chmod(0o755)
    command = [*BRIDGE, "login", "--bin", str(script)]
    done = subprocess.run(command, input="code", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, "auth login\ncode", "")
    script.write_text("no program\n")
    done = run("login", "--bin", str(script))
    assert done.returncode == 2
    assert "cannot be run: [Errno 8] Exec format error" in done.stderr
    done = run("login", "--bin", "/no/such")
    assert done.returncode == 2
    assert done.stderr.startswith("claude-cli-bridge: --bin: '/no/such' is not an executable file")


# ---------------------------------------------------------------- the start


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
    printed(program, "nobody is logged in: found no login of user ")
    answer = program.post(model="not-logged-in")
    assert (answer.status, answer.json["error"]["type"]) == (401, "authentication_error")
    assert "nobody is logged in: found no login of user " in answer.json["error"]["message"]
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("model", ["exit-at-start", "hang-at-start"])
def test_a_cli_that_does_not_work_is_said_at_the_start_and_does_not_stop_it(
    launch: Launch, model: str
) -> None:
    program = launch(STANDIN_SONNET=model, CLAUDE_CLI_WATCHDOG_SECS="1")
    printed(program, "cannot be used: ")
    assert program.call("GET", "/healthz").status == 200
    assert program.post(model="opus").text == "echo: hello; 1 messages"


def test_the_start_says_whose_login_it_is(launch: Launch, environment: Path) -> None:
    program = launch()
    where = f"(user {bridge.user_name()} in {environment}/.claude)"
    printed(program, f"logged in: stand-in {where}")


@pytest.mark.parametrize(
    ("settings", "who"),
    [
        ({}, "any local program"),
        ({"CLAUDE_CLI_API_KEY": "sesame"}, "any client with the key"),
        ({ADDRESS: "unix:~/bridge.sock"}, "any local program"),
    ],
)
def test_agent_mode_says_at_the_start_who_can_run_what_where(
    launch: Launch, tmp_path: Path, settings: dict[str, str], who: str
) -> None:
    program = launch("--tools", "Read", "--cwd", str(tmp_path), **settings)
    where = f"as user {bridge.user_name()}, in {tmp_path}"
    how = "(tools Read, permission mode default)"
    printed(program, f"agent mode: {who} can use the CLI's own tools {where} {how}")


def test_a_tool_that_the_cli_does_not_have_is_warned_of(
    launch: Launch, cli: Path, since: Callable[[], list[Json]]
) -> None:
    program = launch("--tools", "Raed, Grep,Agent", "--bin", str(cli))
    printed(program, "CLAUDE_CLI_TOOLS: the CLI has no tool Raed; did you mean Read?")
    assert not [line for line in program.lines if "Grep;" in line or "no tool Agent" in line]
    assert since() == []


def test_a_tool_is_no_command_and_a_comma_at_the_end_of_tools_names_none(cli: Path) -> None:
    async def use(pool: Pool) -> None:
        [said] = await bridge.missing_from_agent(pool)
        assert said == "CLAUDE_CLI_TOOLS: the CLI has no tool Run"

    in_pool(use, bin=str(cli), tools="Run, Bash,", keep_env=KEEP)


def test_where_nobody_is_logged_in_is_told_also_of_a_folder_whose_name_is_no_utf8(
    launch: Launch, tmp_path: Path
) -> None:
    program = launch(CLAUDE_CONFIG_DIR=os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    answer = program.post(model="not-logged-in")
    assert answer.status == 401
    assert f"in {tmp_path}/caf?" in answer.message["error"]["message"]


def test_an_mcp_server_that_cannot_start_is_warned_of(
    launch: Launch, cli: Path, tmp_path: Path, since: Callable[[], list[Json]]
) -> None:
    file = tmp_path / "mcp.json"
    file.write_text(json.dumps({"mcpServers": {"broken": {"command": "/no/such/program"}}}))
    program = launch("--tools", "default", "--mcp-config", str(file), "--bin", str(cli))
    printed(program, "the MCP server broken is not there: failed")
    assert not [line for line in program.lines if "has no tool" in line]
    assert since() == []


def test_large_blocks_are_given_back_where_the_c_library_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Library:
        """One that notes what it is told."""

        def __init__(self) -> None:
            self.told: list[tuple[int, int]] = []

        def mallopt(self, name: int, value: int) -> int:
            self.told.append((name, value))
            return 1

    library = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    bridge.give_back_memory()
    bridge.give_back_memory()
    m_mmap_threshold = -3  # mallopt(3)
    assert library.told == [(m_mmap_threshold, 256 << 10)] * 2
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    bridge.give_back_memory()
    bridge.give_back_memory()


@linux
def test_signals_and_limits_that_a_launcher_has_set_do_no_harm(
    launch: Launch,
) -> None:
    lines = "import os, resource, signal, sys\n"
    lines += "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
    lines += "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGCHLD])\n"
    lines += "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
    lines += "resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))\n"
    lines += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {"CLAUDE_CLI_BIN": str(STANDIN), "CLAUDE_CLI_LISTEN_ADDR": f"127.0.0.1:{port}"}
    command = [sys.executable, "-c", lines, str(ROOT / "bridge.py")]
    with subprocess.Popen(
        command, env={**os.environ, **settings}, stderr=subprocess.DEVNULL
    ) as process:
        program = Program("127.0.0.1", port, process=process)  # type: ignore[arg-type]
        wait_until(lambda: is_up(program), "the bridge")
        first = program.post("hello")
        assert program.post(["hello", first.text, "more"]).session == "hot"
        limit = psutil.Process(process.pid).rlimit(psutil.RLIMIT_NOFILE)
        assert limit[0] == min(limit[1], 65_536)
        process.terminate()
        assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("number", "problem"), [(1, "descriptor 3 is no socket"), (2, "expected one socket")]
)
def test_a_socket_of_a_service_manager_that_is_none_or_more_is_one_line_and_status_2(
    number: int, problem: str
) -> None:
    command = (
        f'LISTEN_PID=$$ LISTEN_FDS={number} exec "{sys.executable}" "{ROOT}/bridge.py" 3</dev/null'
    )
    environ = {**os.environ, "CLAUDE_CLI_BIN": str(STANDIN)}
    done = subprocess.run(
        ["sh", "-c", command], env=environ, capture_output=True, text=True, check=False
    )
    said = [line for line in done.stderr.splitlines() if "LISTEN_FDS" in line]
    assert (done.returncode, len(said)) == (2, 1)
    assert problem in said[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["datagram", "datagram at a path", "connected"])
def test_a_socket_of_a_service_manager_that_cannot_listen_is_one_line_and_status_2(
    tmp_path: Path, kind: str
) -> None:
    with contextlib.ExitStack() as stack:
        if kind == "connected":
            sock, other = socket.socketpair()
            stack.enter_context(other)
        elif kind == "datagram":
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.bind(("127.0.0.1", 0))
        else:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            sock.bind(str(tmp_path / "socket"))
        stack.enter_context(sock)
        program = activate(sock)
        _, said = program.communicate(timeout=30)
    assert (program.returncode, len(said.splitlines())) == (2, 1), said
    assert said.startswith("claude-cli-bridge: CLAUDE_CLI_LISTEN_ADDR: cannot listen on ")


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


# ---------------------------------------------------------------- the end


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


@signals
def test_on_shutdown_running_answers_are_completed_and_new_connections_refused(
    launch: Launch,
    gate: Path,
    log: Log,
    background: ThreadPoolExecutor,
    number: signal.Signals,
) -> None:
    program = launch(CLAUDE_CLI_DRAIN_SECS="1000")
    running = background.submit(program.post, "PAUSE", stream=True)
    wait_until(lambda: log.got("PAUSE"), "the turn")
    program.process.send_signal(number)
    wait_until(lambda: refuses(program), "closed doors")
    assert program.process.poll() is None
    gate.touch()
    assert running.result().text == "echo: PAUSE; 1 messages"
    assert running.result().message["stop_reason"] == "end_turn"
    assert program.wait() == 0
    assert not [pid for pid in log.started() if alive(pid)]


def with_sighup(handler: signal.Handlers, start: Callable[[], Program]) -> Program:
    """Start a program that inherits this handler.  These tests may run under nohup themselves, which
    ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, handler)
    try:
        return start()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_sighup_completes_running_answers_and_ends_the_bridge(
    launch: Launch, gate: Path, log: Log, background: ThreadPoolExecutor
) -> None:
    program = with_sighup(signal.SIG_DFL, lambda: launch(CLAUDE_CLI_DRAIN_SECS="1000"))
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
    program = with_sighup(signal.SIG_IGN, launch)
    program.process.send_signal(signal.SIGHUP)
    assert program.post().status == 200
    assert not [line for line in program.lines if "shutting down" in line]
    program.process.send_signal(signal.SIGTERM)
    assert program.wait() == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_second_signal_cuts_running_answers_short(
    launch: Launch, gate: Path, log: Log, stream: bool
) -> None:
    program = launch(CLAUDE_CLI_DRAIN_SECS="60")
    with send(program, "PAUSE", stream=stream) as client:
        wait_until(lambda: log.got("PAUSE"), "the turn")
        while stream and b"content_block_delta" not in client.recv(65536, socket.MSG_PEEK):
            pass
        program.process.send_signal(signal.SIGTERM)
        wait_until(lambda: any("shutting down" in line for line in program.lines), "the shutdown")
        assert program.process.poll() is None
        program.process.send_signal(signal.SIGTERM)
        assert program.wait() == 0
        answer = read_all(client)
    event = answer.events[-1] if stream else answer.json
    assert event["error"]["type"] == "api_error"
    assert "shutting down" in event["error"]["message"]


def test_two_signals_at_once_still_end_answers_with_a_503(
    launch: Launch, gate: Path, log: Log, background: ThreadPoolExecutor
) -> None:
    program = launch(CLAUDE_CLI_DRAIN_SECS="60")
    running = background.submit(program.post, "PAUSE")
    wait_until(lambda: log.got("PAUSE"), "the turn")
    program.process.send_signal(signal.SIGTERM)
    program.process.send_signal(signal.SIGINT)
    assert error_of(running.result()) == (503, "api_error")
    assert program.wait() == 0


def test_a_restart_behind_an_inherited_socket_refuses_no_connection(
    listener: socket.socket,
) -> None:
    address = listener.getsockname()

    def ask() -> str:
        with socket.socket(listener.family) as client:
            client.settimeout(30)
            client.connect(address)
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            data = b""
            while chunk := client.recv(4096):
                data += chunk
            return data.split(b"\r\n")[0].decode()

    with ThreadPoolExecutor(4) as executor:
        answers = []
        for _ in range(3):
            program = activate(listener)
            assert program.stderr
            answers += [executor.submit(ask) for _ in range(10)]
            answers[-1].result()
            answers += [executor.submit(ask) for _ in range(10)]
            program.terminate()
            answers += [executor.submit(ask) for _ in range(10)]
            said = program.stderr.read()
            assert program.wait(30) == 0
            program.stderr.close()
            where = address if isinstance(address, str) else f"127.0.0.1:{address[1]}"
            assert (
                f"listening on {'unix:' if isinstance(address, str) else 'http://'}{where}" in said
            )
        program = activate(listener)
        answers.append(executor.submit(ask))  # by then it takes signals
        assert [answer.result() for answer in answers] == ["HTTP/1.1 200 OK"] * len(answers)
        program.terminate()
        assert program.stderr
        program.stderr.read()
        assert program.wait(30) == 0
        program.stderr.close()
    assert not isinstance(address, str) or Path(address).exists()  # it is the service manager's


# ---------------------------------------------------------------- the log


def rows(program: Program, log_format: str) -> list[dict[str, object]]:
    """The log's lines about requests."""
    if log_format == "json":
        return [json.loads(line) for line in program.lines if "request_id" in line]
    lines = [line.split(" INFO ")[1] for line in program.lines if "request_id=" in line]
    return [dict(pair.split("=", 1) for pair in shlex.split(line)) for line in lines]


DIED = "the claude CLI exited with status 1"
NOT_JSON = "The request body is not valid JSON: unexpected end of data: line 1 column 2 (char 1)"
NO_ROUTE = (
    "no route for '/nowhere': this is the Anthropic Messages API, not OpenAI's (LiteLLM can "
    "translate); the base URL is {}"
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
        assert row.get("session") == (digest(name)[:12] if name else None)
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


def test_a_path_that_is_not_utf_8_can_be_logged_as_json(launch: Launch, tmp_path: Path) -> None:
    cli = os.fsencode(tmp_path) + b"/cl\xffaude"
    os.symlink(STANDIN, cli)
    program = launch("--log-format", "json", CLAUDE_CLI_BIN=os.fsdecode(cli))
    printed(program, "cl?aude")
    assert program.post().status == 200


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
