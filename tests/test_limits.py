"""What one client may take, and that it costs only himself; how a restart goes."""

import asyncio
import gc
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from client import Answer, Client, request_body
from host import ROOT, STANDIN, wait_until
from servers import Program, Server, kept_names
from stand_in import Log
from test_processes import in_work

import bridge
from sessions import Turn

Serve = Callable[..., Server]


def error(answer: Answer) -> tuple[int, str]:
    return answer.status, answer.json["error"]["type"]


def test_a_connection_too_many_gets_503_and_the_others_go_on(serve: Serve) -> None:
    server = serve(max_connections=3)
    held = [server.connect() for _ in range(3)]
    assert server.bridge
    # Type: ignore[union-attr].
    wait_until(lambda: len(server.bridge.connections) == 3, "the connections")
    answer = server.call("GET", "/healthz")
    assert error(answer) == (503, "api_error")
    assert answer.headers["retry-after"] == "1"
    assert "connections" in answer.json["error"]["message"]
    for client in held:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
        client.close()
    wait_until(lambda: not server.bridge.connections, "their ends")  # type: ignore[union-attr]
    assert server.post().status == 200


def test_what_is_beyond_a_limit_is_refused(serve: Serve) -> None:
    server = serve(max_body_bytes=1000)
    assert error(server.post("x" * 1000)) == (413, "request_too_large")
    large = "y" * bridge.MAX_HEADER_BYTES
    for path, headers in (("/healthz", {"x": large}), ("/healthz?" + large, {})):
        answer = server.call("GET", path, headers=headers)
        assert error(answer) == (431, "invalid_request_error")
    deep = json.loads("[" * 202 + "]" * 202)
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        answer = server.call("POST", path, request_body("x", metadata=deep))
        assert "200 levels" in answer.json["error"]["message"]
    assert server.post().status == 200


def test_a_queue_that_is_full_gets_529_at_once(
    serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor
) -> None:
    server = serve(max_sessions=1, max_queue=2)
    requests = [background.submit(server.post, "PAUSE")]
    wait_until(lambda: log.got("PAUSE"), "the first")
    requests += [background.submit(server.post, f"{number}") for number in range(2)]
    in_work(server, 3)
    answer = server.post("one too many")
    assert error(answer) == (529, "overloaded_error")
    assert "2 requests wait for room already" in answer.json["error"]["message"]
    gate.touch()
    assert [request.result().status for request in requests] == [200] * 3


def test_a_program_without_file_descriptors_fails_the_request_and_goes_on(
    launch: Callable[..., Program],
) -> None:
    program = launch()
    used = len(os.listdir(f"/proc/{program.process.pid}/fd"))
    resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE, (used + 2, 4096))
    answer = program.post()
    assert error(answer) == (502, "claude_cli_error")
    assert "cannot be started" in answer.json["error"]["message"]
    resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE, (4096, 4096))
    assert program.post().status == 200


def test_a_clock_that_jumps_disturbs_nobody(
    serve: Serve,
    gate: Path,
    log: Log,
    background: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = serve()
    running = background.submit(server.post, "PAUSE", stream=True)
    wait_until(lambda: log.got("PAUSE"), "the turn")
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert server.post("meanwhile").text == "echo: meanwhile; 1 messages"
    monkeypatch.setattr("time.time", lambda: 4e9)
    assert server.post("after").status == 200
    gate.touch()
    assert running.result().text.startswith("echo: PAUSE;")


# signals and restarts


@pytest.mark.parametrize("stream", [False, True])
def test_a_second_signal_cuts_running_answers_short(
    launch: Callable[..., Program],
    gate: Path,
    log: Log,
    background: ThreadPoolExecutor,
    stream: bool,
) -> None:
    program = launch(CLAUDE_CLI_DRAIN_SECS="60")
    running = background.submit(program.post, "PAUSE", stream=stream)
    wait_until(lambda: log.got("PAUSE"), "the turn")
    program.process.send_signal(signal.SIGTERM)
    wait_until(lambda: any("shutting down" in line for line in program.lines), "the shutdown")
    assert program.process.poll() is None
    program.process.send_signal(signal.SIGTERM)
    assert program.wait() == 0
    answer = running.result()
    event = answer.events[-1] if stream else answer.json
    assert event["error"]["type"] == "api_error"
    assert "shutting down" in event["error"]["message"]


@pytest.fixture(params=["tcp", "unix"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[socket.socket]:
    """A socket that a service manager holds."""
    family = socket.AF_UNIX if request.param == "unix" else socket.AF_INET
    with socket.socket(family) as sock:
        sock.bind(str(tmp_path / "socket") if request.param == "unix" else ("127.0.0.1", 0))
        sock.listen(100)
        yield sock


def activate(listener: socket.socket, *program: str) -> subprocess.Popen[str]:
    """Start the bridge as systemd does: the socket is file descriptor 3."""
    code = "import os, sys; os.dup2(int(sys.argv[1]), 3)"
    code += "; os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()))"
    code += "; os.execv(sys.argv[2], sys.argv[2:])"
    program = program or (sys.executable, str(ROOT / "bridge.py"))
    environ = {
        **os.environ,
        "CLAUDE_CLI_BIN": str(STANDIN),
        "CLAUDE_CLI_KEEP_ENV": ",".join(kept_names()),
    }
    command = [sys.executable, "-c", code, str(listener.fileno()), *program]
    return subprocess.Popen(
        command, env=environ, stderr=subprocess.PIPE, text=True, pass_fds=[listener.fileno()]
    )


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
        assert [answer.result() for answer in answers] == ["HTTP/1.1 200 OK"] * len(answers)
        program.terminate()
        assert program.stderr
        program.stderr.read()
        assert program.wait(30) == 0
        program.stderr.close()
    assert not isinstance(address, str) or Path(address).exists()  # it is the service manager's


def test_who_connected_before_a_restart_behind_an_inherited_socket_is_still_answered(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.GRACE_SECS", 20)

    async def scenario() -> bytes:
        def ask_late() -> bytes:
            wait_until(lambda: running.closing, "the shutdown")
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            return client.recv(4096)

        async with bridge.serve(bridge.Config(bin=str(STANDIN), spares=0), listener) as running:
            client.connect(listener.getsockname())
            await asyncio.to_thread(wait_until, lambda: running.connections, "the connection")
            answer = asyncio.create_task(asyncio.to_thread(ask_late))
        return await answer

    with socket.socket(listener.family) as client:
        assert asyncio.run(scenario()).startswith(b"HTTP/1.1 200")


def test_a_socket_that_other_machines_can_reach_needs_a_key() -> None:
    async def scenario(key: str) -> None:
        async with bridge.serve(bridge.Config(bin=str(STANDIN), spares=0, api_key=key), sock):
            pass

    for address in ("0.0.0.0", "::"):
        with socket.create_server(
            (address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET
        ) as sock:
            with pytest.raises(bridge.ConfigError, match="CLAUDE_CLI_API_KEY"):
                asyncio.run(scenario(""))
            asyncio.run(scenario("secret"))


def test_two_signals_at_once_still_end_answers_with_a_503(
    launch: Callable[..., Program], gate: Path, log: Log, background: ThreadPoolExecutor
) -> None:
    program = launch(CLAUDE_CLI_DRAIN_SECS="60")
    running = background.submit(program.post, "PAUSE")
    wait_until(lambda: log.got("PAUSE"), "the turn")
    program.process.send_signal(signal.SIGTERM)
    program.process.send_signal(signal.SIGINT)
    assert error(running.result()) == (503, "api_error")
    assert program.wait() == 0


@pytest.mark.parametrize("ahead", [10, 100_000])
def test_a_client_that_leaves_is_noticed_however_much_it_sent_ahead(
    serve: Serve, gate: Path, log: Log, ahead: int
) -> None:
    server = serve()
    body = json.dumps(request_body("SLOW 1000", stream=True)).encode()
    head = f"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with server.connect() as client:
        client.sendall(head.encode() + body)
        assert client.recv(100)
        client.sendall(b"x" * ahead)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_until(
        lambda: log.got("SLOW 1000") and "interrupt" in log.requests(log.got("SLOW 1000")),
        "the interrupt",
        10,
    )


def test_what_a_turn_held_is_freed_when_its_client_leaves_and_not_by_the_garbage_collector(
    serve: Serve,
) -> None:
    server = serve()
    assert server.bridge
    connections = server.bridge.connections
    body = json.dumps(request_body("SLOW 1000", stream=True)).encode()
    head = f"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    gc.collect()
    gc.disable()
    try:
        with server.connect() as client:
            client.sendall(head.encode() + body)
            assert client.recv(100)
            client.sendall(
                b"x" * 300_000
            )  # so much that it is no longer read: a write finds out that it left
            wait_until(
                lambda: not any(c.writer.transport.is_reading() for c in connections.values()),
                "its end",
            )
        wait_until(
            lambda: not any(isinstance(item, Turn) for item in gc.get_objects()),
            "the end of the turn",
        )
    finally:
        gc.enable()


def test_an_embedding_program_may_bring_its_own_socket() -> None:
    async def scenario() -> None:
        for _ in range(2):
            with socket.create_server(("127.0.0.1", 0)) as sock:
                port = sock.getsockname()[1]
                config = bridge.Config(
                    bin=str(STANDIN), listen_addr="unix:/no/such/place", spares=0
                )
                async with bridge.serve(config, sock) as running:
                    assert running.addresses == [f"127.0.0.1:{port}"]
                    answer = await asyncio.to_thread(Client("127.0.0.1", port).post)
                    assert answer.text == "echo: hello; 1 messages"
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())
