"""What other users and the CLI get to see of the bridge: its socket, `ps`, file descriptors, its
log."""

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from client import request_body
from host import wait_until
from servers import Launch, Program, Serve, kept_names, linux
from stand_in import Log

NOBODY, SOMEBODY = 65534, 65533
KEY = "sesame-key"
TOOL = {
    "name": "sesame_tool",
    "description": "sesame-description",
    "input_schema": {"type": "object"},
}

# ---------------------------------------------------------------- the unix socket

DIAL = """
import os, socket, sys
user, path = int(sys.argv[1]), sys.argv[2]
os.setgroups([]), os.setgid(user), os.setuid(user)
try:
    socket.socket(socket.AF_UNIX).connect(path)
except OSError as error:
    sys.exit(type(error).__name__)
"""


@pytest.fixture
def folder() -> Iterator[str]:
    """A folder that all can enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        os.chmod(path, 0o755)
        yield path


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_only_the_owner_of_a_unix_socket_can_use_it(folder: str, serve: Serve) -> None:
    """Nothing but the socket's own mode decides: it is the owner whose change lets a user in."""
    path = f"{folder}/bridge.sock"

    def dial(user: int) -> str:
        command = [sys.executable, "-IS", "-c", DIAL, str(user), path]
        return subprocess.run(command, capture_output=True, text=True, check=False).stderr.strip()

    serve(listen_addr=f"unix:{path}")
    assert dial(NOBODY) == "PermissionError"
    os.chown(path, NOBODY, NOBODY)
    assert dial(NOBODY) == ""
    assert dial(SOMEBODY) == "PermissionError"
    os.chown(path, SOMEBODY, NOBODY)  # the group is no owner
    assert dial(NOBODY) == "PermissionError"


# ---------------------------------------------------------------- ps and /proc


def seen(pid: int) -> str:
    """What all users can read of a process."""
    names = ("cmdline", "comm", "status", "stat")
    return "\n".join(Path(f"/proc/{pid}/{name}").read_text() for name in names)


@linux
@pytest.mark.parametrize("tools", ["", "default"], ids=["model mode", "agent mode"])
def test_ps_shows_no_key_and_nothing_of_a_request(
    launch: Launch, log: Log, gate: Path, background: ThreadPoolExecutor, tools: str
) -> None:
    names = ["CLAUDE_CLI_API_KEY", *kept_names()]
    keep = {"CLAUDE_CLI_KEEP_ENV": ",".join(names), "CLAUDE_CLI_SPARES": "1"}
    program = launch(CLAUDE_CLI_API_KEY=KEY, CLAUDE_CLI_TOOLS=tools, **keep)
    messages = ["sesame-past", "sesame-said", "sesame-prompt PAUSE"]
    plain = request_body(
        messages,
        system="sesame-system",
        metadata={"user_id": "sesame-user"},
        stop_sequences=["sesame"],
    )
    for body in (plain, {**plain, "tools": [TOOL]}):
        background.submit(program.call, "POST", "/v1/messages", body, {"x-api-key": KEY})
    wait_until(lambda: log.asked("PAUSE") == 2, "the turns")
    wait_until(lambda: len(program.children()) > 2, "a spare")
    assert "sesame" not in seen(program.process.pid)
    looked_at = 0
    for child in program.children():
        # The one that was asked who is logged in may have ended: its files go, and before it is
        # waited for they are empty.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            public, environ = seen(child.pid), Path(f"/proc/{child.pid}/environ").read_bytes()
            assert "sesame" not in public
            assert b"sesame" not in environ
            if environ:
                assert b"ANTHROPIC_API_KEY=sk-stub" in environ
                looked_at += 1
    assert looked_at >= 2  # those of the two turns
    gate.touch()


def descriptors(pid: int) -> dict[int, str]:
    found = {}
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            found[int(path.name)] = os.readlink(path)
    return found


@linux
@pytest.mark.parametrize("spares", [0, 1])
def test_a_process_has_its_own_pipes_and_nothing_of_the_bridge_or_of_other_processes(
    launch: Launch, log: Log, gate: Path, background: ThreadPoolExecutor, spares: int
) -> None:
    """A listening socket would outlive the bridge; the end of another's stdin would keep that one
    alive. Python before 3.12 makes stdin a pair of sockets."""
    program = launch(CLAUDE_CLI_SPARES=str(spares))
    with contextlib.ExitStack() as stack:
        for number in range(3):
            stack.enter_context(program.connect())
            assert program.post(f"idle {number}").status == 200
            background.submit(program.post, f"PAUSE {number}", stream=True)
            wait_until(partial(log.got, f"PAUSE {number}"), "the turn")
        assert (
            len(
                [
                    target
                    for target in descriptors(program.process.pid).values()
                    if "socket:" in target
                ]
            )
            > 6
        )
        pids = {log.got(f"{word} {number}") for word in ("idle", "PAUSE") for number in range(3)}
        pids |= {pid for pid in log.started() if pid in {child.pid for child in program.children()}}
        used: set[str] = set()
        for pid in pids:
            found = descriptors(pid)
            standard = [found.pop(number) for number in range(3)]
            assert standard[0].startswith(("pipe:", "socket:"))
            assert all(target.startswith("pipe:") for target in standard[1:])
            pipes = [target for target in found.values() if target.startswith("pipe:")]
            assert set(found.values()) - set(pipes) == {f"{log.folder}/{pid}.ndjson"}
            gates = set(pipes)
            assert len(gates) == 1
            assert not used & {*standard, *gates}
            used |= {*standard, *gates}
        gate.touch()


# ---------------------------------------------------------------- the log


def statuses(program: Program, log_format: str) -> list[int]:
    lines = [line for line in program.lines if "request_id" in line]
    if log_format == "json":
        return [json.loads(line)["status"] for line in lines]
    return [int(line.split(" status=")[1].split()[0]) for line in lines]


def requests(program: Program, log: Log) -> Iterator[int]:
    """One of each kind, with a word in it that must not be seen again.  Yields the status that the
    log must show."""
    key = {"x-api-key": KEY}
    fields = {"system": "sesame-system", "metadata": {"user_id": "sesame-user"}, "tools": [TOOL]}

    def send(messages: object, headers: dict[str, str] = key, **more: object) -> int:
        body = request_body(messages, **{**fields, **more})
        return program.call("POST", "/v1/messages?x=sesame-query", body, headers).status

    for stream in (False, True):
        yield send("sesame-prompt", stream=stream)
        yield send(["sesame-prompt", "sesame-said", "sesame-more"], stream=stream)
        yield send("sesame-prompt DIE", stream=stream)
        yield send("sesame-prompt DIE-START", stream=stream)
        yield send("sesame-prompt HALF", stream=stream)
        yield send("sesame-prompt HANG", stream=stream)
    yield send("sesame-prompt NOISE")
    yield send("sesame-prompt RATELIMIT 1")
    yield send("sesame-prompt", model="sesame/../model!")
    yield send("sesame-prompt", model="exit-at-start")
    yield send([{"role": "sesame", "content": "sesame"}])
    yield send("sesame-prompt", temperature="sesame")
    yield send("sesame-prompt", {"x-api-key": "sesame-wrong"})
    yield send("sesame-prompt", {"authorization": "Bearer sesame-wrong"})
    yield send("sesame-prompt", {**key, "origin": "http://evil.example"})
    yield send("sesame-prompt", {**key, "host": "evil.example"})
    for method, path, body in (
        ("POST", "/v1/messages", b'{"sesame-body'),
        ("GET", "/path?x=sesame-query", None),
        ("GET", "/v1/models/model?x=sesame-query", None),
    ):
        yield program.call(method, path, body, key).status
    for text in ("sesame-prompt PAUSE-START", "sesame-prompt PAUSE"):  # clients that leave
        data = json.dumps(request_body(text, stream=True, **fields)).encode()
        head = (
            f"POST /v1/messages?x=sesame-query HTTP/1.1\r\nhost: localhost\r\nx-api-key: {KEY}\r\n"
        )
        with program.connect() as client:
            # A reset.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
            wait_until(partial(log.got, text), "the turn")
            if text.endswith("PAUSE"):
                assert client.recv(1)
        yield 200 if text.endswith("PAUSE") else 499
    with program.connect() as client:
        client.sendall(b"POST /v1/messages HTTP/1.1 sesame-line\r\nsesame-header\r\n\r\n")
        assert b" 400 " in client.recv(1 << 16)
    yield 400


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_key_prompt_or_answer_is_printed_for_good_requests_faults_and_clients_that_leave(
    launch: Launch, log: Log, gate: Path, capfd: pytest.CaptureFixture[str], log_format: str
) -> None:
    program = launch(
        *("--log-format", log_format, "--watchdog-secs", "2"),
        CLAUDE_CLI_API_KEY=KEY,
        CLAUDE_CODE_OAUTH_TOKEN="sesame-token",
        CLAUDE_CLI_KEEP_ENV=",".join([*kept_names(), "CLAUDE_CODE_OAUTH_TOKEN"]),
    )
    expected = list(requests(program, log))
    wait_until(
        lambda: len(statuses(program, log_format)) == len(expected), f"the lines: {program.lines}"
    )
    assert sorted(statuses(program, log_format)) == sorted(expected)
    assert {200, 400, 401, 403, 404, 429, 499, 502, 504} == set(expected)
    program.process.terminate()
    assert program.wait() == 0
    printed = [*program.lines, *capfd.readouterr()]
    assert [
        line for line in printed if "sesame" in line or "echo" in line or "Traceback" in line
    ] == []
