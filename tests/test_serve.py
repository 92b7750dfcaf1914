"""From the listening to the end: addresses, sockets, shutdown."""

import asyncio
import contextlib
import gc
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from client import Client
from host import ROOT, STANDIN, wait_until
from processes import alive
from servers import Launch, Serve, Server, linux
from stand_in import Log
from test_access import KEY
from wire import GET, Wire, ask, assert_error, assert_refused, dial, let_in, post, stuck

import bridge

pytestmark = pytest.mark.usefixtures("quiet")


# ---------------------------------------------------------------- addresses


def test_an_address_in_use_ends_the_start_with_one_line_that_names_it(launch: Launch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        program = launch(wait=False, CLAUDE_CLI_LISTEN_ADDR=f"127.0.0.1:{taken.getsockname()[1]}")
        assert program.wait() == 2
    wait_until(lambda: program.lines, "the line")
    [line] = program.lines
    assert line.startswith("claude-cli-bridge: CLAUDE_CLI_LISTEN_ADDR: ")
    assert "in use" in line


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_port_of_roots_is_refused_by_that() -> None:
    """The process has the rights of another user, and the test's environment."""
    lines = (
        "import os, sys",
        f"sys.path.insert(0, {str(ROOT)!r})",
        "import bridge",
        "os.setgid(65534); os.setuid(65534)",
        f"sys.argv[1:] = ['--listen-addr', '127.0.0.1:80', '--bin', {sys.executable!r}]",
        "bridge.find_cli = lambda given: given",  # its folder may be root's
        "bridge.main()",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "claude-cli-bridge: --listen-addr: cannot listen on 127.0.0.1:80: "
    )
    assert done.stderr.endswith("permission denied\n")


def test_an_ipv6_address_can_be_listened_on(serve: Serve) -> None:
    server = serve(listen_addr="[::1]:0")
    assert server.bridge
    assert server.bridge.addresses == [f"[::1]:{server.port}"]
    with closing(socket.create_connection(("::1", server.port), timeout=10)) as client:
        assert let_in(ask(server, f"Host: [::1]:{server.port}", connection=client))


# ---------------------------------------------------------------- Unix sockets


def test_a_unix_socket_can_be_listened_on(serve: Serve, socket_path: Path) -> None:
    server = serve(listen_addr=f"unix:{socket_path}")
    assert server.bridge
    assert server.bridge.addresses == [f"unix:{socket_path}"]
    assert stat.S_ISSOCK(socket_path.stat().st_mode)
    assert let_in(ask(server, "Host: localhost", connection=dial(socket_path)))
    assert_refused(
        ask(server, "Host: evil.example", connection=dial(socket_path)), 403, "permission_error"
    )
    assert_refused(ask(server, "Host: ", connection=dial(socket_path)), 403, "permission_error")


def test_the_umask_stays_as_it_is_and_a_unix_socket_is_its_owners_alone(
    serve: Serve, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It belongs to the whole program: a file that another thread makes meanwhile would get it."""
    masks: list[int] = []
    before = os.umask(0)
    monkeypatch.setattr(os, "umask", masks.append)
    try:
        serve(listen_addr=f"unix:{socket_path}")
        assert stat.S_IMODE(socket_path.stat().st_mode) == 0o600
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert masks == []


def test_a_unix_socket_in_use_is_refused_and_a_stale_one_is_replaced(
    launch: Launch, tmp_path: Path
) -> None:
    path = tmp_path / "bridge.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    first = launch(CLAUDE_CLI_LISTEN_ADDR=f"unix:{path}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    second = launch(CLAUDE_CLI_LISTEN_ADDR=f"unix:{path}", wait=False)
    assert second.wait() == 2
    wait_until(lambda: second.lines, "a line that says why")
    assert f"cannot listen on unix:{path}: already in use" in second.lines[-1]
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    first.process.terminate()
    assert first.wait() == 0
    assert not path.exists()


def test_a_unix_socket_is_in_use_before_its_server_has_started(socket_path: Path) -> None:
    path = str(socket_path)
    with bridge.bind_unix(path), pytest.raises(OSError, match="already in use"):
        bridge.bind_unix(path)
    socket_path.unlink()


def test_a_unix_socket_left_by_a_killed_bridge_is_no_obstacle(
    serve: Serve, socket_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(socket_path))
    server = serve(listen_addr=f"unix:{socket_path}")
    assert let_in(ask(server, "Host: localhost", connection=dial(socket_path)))


def test_a_socket_of_another_kind_is_not_replaced(serve: Serve, socket_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(socket_path))
        with pytest.raises(bridge.ConfigError, match="already in use"):
            serve(listen_addr=f"unix:{socket_path}")
        assert socket_path.exists()


def test_a_bridge_that_ends_leaves_the_socket_of_another_that_took_its_path(
    serve: Serve, socket_path: Path
) -> None:
    first = serve(listen_addr=f"unix:{socket_path}")
    socket_path.unlink()
    second = serve(listen_addr=f"unix:{socket_path}")
    first.close()
    assert let_in(ask(second, "Host: localhost", connection=dial(socket_path)))
    second.close()
    assert not socket_path.exists()


def test_a_bridge_that_ends_leaves_a_file_that_took_the_place_of_its_socket(
    serve: Serve, socket_path: Path
) -> None:
    server = serve(listen_addr=f"unix:{socket_path}")
    socket_path.unlink()
    socket_path.write_text("mine")
    server.close()
    assert socket_path.read_text() == "mine"
    with pytest.raises(bridge.ConfigError, match="what is there is no socket"):
        serve(listen_addr=f"unix:{socket_path}")
    assert socket_path.read_text() == "mine"


def test_a_path_that_is_not_utf_8_can_be_listened_on_and_shown(
    serve: Serve, tmp_path: Path
) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.sock"))
    serve(listen_addr=f"unix:{path}")
    for target, status in (("/", 200), ("/nothing", 404)):
        with closing(dial(path)) as client:
            client.sendall(f"GET {target} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
            with client.makefile("rb") as file:
                said = file.read()
        assert said.startswith(b"HTTP/1.1 %d " % status)
        assert "?.sock" in said.decode() or "\ufffd.sock" in said.decode()
        assert status == 404 or b"curl --unix-socket" in said


# ---------------------------------------------------------------- sockets that it is given


async def ask_through(sock: socket.socket, family: int, host: str) -> tuple[str, bytes]:
    """The bridge's own URL behind a socket that it was given, and how it answers to a Host."""
    config = bridge.Config(bin=str(STANDIN), spares=0, api_key=KEY)
    async with bridge.serve(config, sock) as running:
        with socket.socket(family) as client:
            client.setblocking(False)
            await asyncio.get_running_loop().sock_connect(client, sock.getsockname())
            reader, writer = await asyncio.open_connection(sock=client)
            writer.write(f"GET / HTTP/1.0\r\nHost: {host}\r\nx-api-key: {KEY}\r\n\r\n".encode())
            said = await reader.readline()
            writer.close()
            await writer.wait_closed()
        return running.url, said


def test_the_address_of_a_socket_that_it_was_given_is_a_good_host() -> None:
    with socket.create_server(("0.0.0.0", 0)) as sock:
        port = sock.getsockname()[1]
        url, said = asyncio.run(ask_through(sock, socket.AF_INET, "0.0.0.0"))
    assert url == f"http://127.0.0.1:{port}"
    assert said == b"HTTP/1.1 200 OK\r\n"


@linux
def test_a_socket_of_an_abstract_name_can_be_listened_on() -> None:
    name = f"claude-cli-bridge-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("\0" + name)
        sock.listen()
        url, said = asyncio.run(ask_through(sock, socket.AF_UNIX, "localhost"))
    assert (url, said) == (f"unix:@{name}", b"HTTP/1.1 200 OK\r\n")


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


# ---------------------------------------------------------------- shutdown


def test_idle_and_half_sent_connections_are_closed_at_shutdown(
    server: Server, connect: Callable[[Server], Wire]
) -> None:
    wires = [connect(server) for _ in range(4)]
    for wire, data in zip(wires, [b"", GET, GET + b"GET /he", b"bad\r\n\r\n"], strict=True):
        wire.send(data)
    assert [wire.answer().status for wire in wires[1:]] == [200, 200, 400]
    server.close()
    assert all(wire.ended() for wire in wires)


@pytest.mark.parametrize("stream", [False, True])
def test_at_shutdown_idle_connections_end_at_once_and_running_answers_are_completed(
    server: Server, connect: Callable[[Server], Wire], gate: Path, stream: bool
) -> None:
    idle, busy = connect(server), connect(server)
    idle.send(GET)
    assert idle.answer().status == 200
    busy.send(post("PAUSE", stream=stream))
    wait_until(server.processes, "the start of the answer")
    if stream:
        answer = busy.head()
    closing = threading.Thread(target=server.close)
    closing.start()
    assert idle.ended()
    gate.touch()
    if stream:
        answer.body = b"".join(iter(busy.chunk, b""))
    else:
        answer = busy.answer()
    closing.join()
    assert answer.status == 200
    assert answer.text.startswith("echo: PAUSE;")
    assert busy.ended()


def test_no_request_is_taken_during_shutdown(
    server: Server, connect: Callable[[Server], Wire], gate: Path
) -> None:
    busy = connect(server)
    busy.send(post("PAUSE", stream=True))
    answer = busy.head()
    closing = threading.Thread(target=server.close)
    closing.start()
    wait_until(lambda: server.bridge and server.bridge.closing, "the start of the shutdown")
    busy.send(post("one more"))
    gate.touch()
    answer.body = b"".join(iter(busy.chunk, b""))
    assert answer.text.startswith("echo: PAUSE;")
    closing.join()
    with contextlib.suppress(ConnectionResetError):
        assert busy.ended()


@pytest.mark.parametrize(
    ("text", "stream", "begun"),
    [("PAUSE", True, True), ("PAUSE", False, False), ("PAUSE-START", True, False)],
    ids=["in mid stream", "whole", "before the first event"],
)
def test_an_answer_that_outlasts_the_shutdown_ends_in_an_error(
    serve: Serve,
    connect: Callable[[Server], Wire],
    gate: Path,
    log: Log,
    text: str,
    stream: bool,
    begun: bool,
) -> None:
    server = serve(drain_secs=0)
    wire = connect(server)
    wire.send(post(text, stream=stream))
    wait_until(lambda: log.got(text), "the turn")
    if begun:
        answer = wire.head()
    server.close()
    if begun:
        answer.body = b"".join(iter(wire.chunk, b""))
        kinds = [event["type"] for event in answer.events]
        assert kinds.index("error") == len(kinds) - 1 > 0
        assert "message_stop" not in kinds
        error = answer.events[-1]["error"]
    else:
        answer = wire.answer()
        assert_error(answer, 503, "api_error")
        error = answer.json["error"]
    assert error["type"] == "api_error"
    assert "shutting down" in error["message"]
    assert wire.ended()
    assert log.requests(log.got(text))[-1] == "interrupt"
    assert not [process for process in log.started() if alive(process)]


@pytest.mark.parametrize(
    "request_",
    [post("FLOOD 200000", stream=True), GET.replace(b"/healthz", b"/") * 9_999],
    ids=["stream", "pipeline"],
)
def test_a_client_that_does_not_read_cannot_hold_up_the_shutdown(
    serve: Serve, connect: Callable[[Server], Wire], gate: Path, request_: bytes
) -> None:
    server = serve(drain_secs=0.1)
    wire = connect(server)
    wire.socket.settimeout(0.2)  # of each piece
    rest = memoryview(request_)

    def is_stuck() -> bool:
        nonlocal rest
        with contextlib.suppress(TimeoutError):  # the pipeline is full
            rest = rest[wire.socket.send(rest[: 1 << 14]) :]
        return stuck(server)

    wait_until(is_stuck, "a writer that waits for its client", 60)
    closing = threading.Thread(target=server.close)
    closing.start()
    closing.join(5)
    hangs = closing.is_alive()
    wire.close()
    closing.join()
    assert not hangs


@pytest.mark.parametrize("steps", range(8))
def test_a_connection_that_comes_with_the_shutdown_is_closed_by_it(steps: int) -> None:
    async def scenario() -> bytes:
        config = bridge.Config(listen_addr="127.0.0.1:0", bin=str(STANDIN), spares=0)
        async with bridge.serve(config) as running:
            host, _, port = running.addresses[0].rpartition(":")
            client = socket.create_connection((host, int(port)))
            client.setblocking(False)
            for _ in range(steps):
                await asyncio.sleep(0)
        for _ in range(8):
            await asyncio.sleep(0)
        gc.collect()  # asyncio loses a connection whose listener closes while it accepts it
        got = b""
        with client, contextlib.suppress(ConnectionResetError):
            got = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 1), 5)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return got

    assert asyncio.run(scenario()) == b""
