"""The bridge inside another program, copied into a package, and on a machine that has little of
anything."""

import asyncio
import contextlib
import gc
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import readme
import uvloop
from client import Client, request_body
from host import ROOT, STANDIN, children, open_files, wait_until
from installed import CLIS
from processes import alive
from servers import Launch, Program, kept_names
from stand_in import Log

from bridge import Config, serve

T = TypeVar("T")
Run = Callable[[Coroutine[Any, Any, T]], T]
EMBEDDED = readme.block("from bridge import Config, serve")
FILES = ("bridge.py", "sessions.py", "translate.py")

# ---------------------------------------------------------------- inside another asyncio program


@pytest.fixture(scope="module", autouse=True)
def libuv() -> None:
    """Its first loop opens a pipe that stays for the life of the program."""
    uvloop.new_event_loop().close()


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run[Any]:
    """asyncio.run with each kind of loop; libuv keeps /dev/null open from its first stream."""

    async def first_stream() -> None:
        (await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)).close()

    def start(work: Coroutine[Any, Any, Any]) -> Any:
        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(first_stream())
            return runner.run(work)

    return start


def holds() -> tuple[set[object], set[int], dict[str, str]]:
    """The tasks, children and file descriptors of this program."""
    return set(asyncio.all_tasks()), {child.pid for child in children()}, open_files()


def keep_alive(client: Client) -> HTTPConnection:
    """A connection that stays open after its answer."""
    connection = HTTPConnection(client.host, client.port)
    connection.request("GET", "/healthz")
    connection.getresponse().read()
    return connection


async def host(config: Config) -> None:
    """A program with work of its own, which starts and stops the bridge twice."""
    work = asyncio.create_task(asyncio.Event().wait())
    for _ in range(2):
        before = holds()
        sock = socket.create_server(("127.0.0.1", 0))
        client = Client(*sock.getsockname())
        async with serve(config, sock) as bridge:
            assert bridge.addresses == [f"{client.host}:{client.port}"]
            conversation = ["hello"]
            for number, stream in enumerate((False, True, False)):
                answer = await asyncio.to_thread(client.post, conversation, stream=stream)
                assert answer.session == ("hot" if number else "new")
                assert answer.text == f"echo: {conversation[-1]}; {2 * number + 1} messages"
                conversation += [answer.text, "and now"]
            held = await asyncio.to_thread(keep_alive, client)
            assert all(
                after > earlier for after, earlier in zip(holds()[:2], before[:2], strict=True)
            )
        held.close()
        assert holds() == before
    assert not work.done()
    work.cancel()


def test_after_each_stop_a_host_program_has_the_tasks_children_and_files_it_had_before(
    run: Run[None],
) -> None:
    config = Config(bin=str(STANDIN), listen_addr="unix:/no/such/place")
    for _ in range(2):
        run(host(config))


def test_on_any_loop_as_many_connections_are_served_as_there_may_be(run: Run[list[bytes]]) -> None:
    """All of them are there when the loop looks."""

    def answer_to(client: socket.socket) -> bytes:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        return client.recv(12)

    async def program() -> list[bytes]:
        sock = socket.create_server(("127.0.0.1", 0))
        with contextlib.ExitStack() as stack:
            async with serve(Config(bin=str(STANDIN), max_connections=5), sock):
                clients = [socket.create_connection(sock.getsockname()) for _ in range(8)]
                for client in clients:
                    stack.enter_context(client)
                return [await asyncio.to_thread(answer_to, client) for client in clients]

    assert sorted(run(program())) == [b"HTTP/1.1 200"] * 5 + [b"HTTP/1.1 503"] * 3


def test_clients_that_connect_as_serve_ends_are_closed_and_none_is_left_to_the_collector(
    run: Run[None],
) -> None:
    """With uvloop they are accepted in another moment than with asyncio."""

    async def connect_and_end(steps: int) -> None:
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(socket.socket()) for _ in range(5)]
            config = Config(bin=str(STANDIN), listen_addr="127.0.0.1:0", spares=0)
            async with serve(config) as bridge:
                host, _, port = bridge.addresses[0].rpartition(":")
                for client in clients:
                    client.setblocking(False)
                    client.connect_ex((host, int(port)))
                for _ in range(steps):
                    await asyncio.sleep(0)

    gc.collect()  # what other tests have left
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for number in range(20):
            run(connect_and_end(number % 4))
        gc.collect()
    assert [str(each.message) for each in found] == []


@pytest.mark.parametrize("steps", range(30))
def test_serve_that_is_cancelled_at_any_step_leaves_nothing(run: Run[None], steps: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    async def embed() -> None:
        async with serve(Config(bin=str(STANDIN), listen_addr=f"127.0.0.1:{port}")):
            await asyncio.Event().wait()

    async def program() -> None:
        tasks, processes, _ = holds()
        task = asyncio.create_task(embed())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        with pytest.raises(OSError):  # noqa: PT011 - refused, by whatever name
            await asyncio.open_connection("127.0.0.1", port)
        assert holds()[:2] == (tasks, processes)

    run(program())


@pytest.mark.parametrize("address", ["127.0.0.1:0", "unix:{}/socket"])
def test_a_host_program_can_leave_the_listening_to_the_bridge(
    run: Run[None], tmp_path: Path, address: str
) -> None:
    def ask(where: str) -> bytes:
        path = where.removeprefix("unix:")
        family = socket.AF_INET if path == where else socket.AF_UNIX
        host, _, port = where.rpartition(":")
        with socket.socket(family) as client:
            client.settimeout(30)
            client.connect((host, int(port)) if path == where else path)
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            with client.makefile("rb") as file:
                return file.read()

    async def scenario() -> None:
        for _ in range(2):
            before = holds()
            config = Config(bin=str(STANDIN), listen_addr=address.format(tmp_path))
            async with serve(config) as bridge:
                answer = await asyncio.to_thread(ask, bridge.addresses[0])
                assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
                assert bridge.url.removeprefix("unix:").encode() in answer
            assert holds() == before
            assert not (tmp_path / "socket").exists()

    run(scenario())


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize("words", ["hello", "PAUSE", "PAUSE-START"])
def test_three_cancels_within_a_moment_leave_no_child_task_or_socket(
    run: Run[None], gate: Path, log: Log, tmp_path: Path, words: str, steps: int
) -> None:
    path = tmp_path / "socket"

    async def ask() -> None:
        reader, writer = await asyncio.open_unix_connection(str(path))
        with contextlib.closing(writer):
            body = json.dumps(request_body(words, stream=True)).encode()
            head = f"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
            writer.write(head.encode() + b"\r\n\r\n" + body)
            with contextlib.suppress(OSError):
                await reader.read()

    async def host() -> None:
        async with serve(
            Config(bin=str(STANDIN), listen_addr=f"unix:{path}", spares=2, drain_secs=1)
        ):
            started.set()
            await asyncio.Event().wait()

    async def scenario() -> None:
        before = holds()
        task = asyncio.create_task(host())
        await started.wait()
        client = asyncio.create_task(ask())
        await asyncio.to_thread(wait_until, lambda: log.got(words), "the turn")
        for _ in range(3):
            task.cancel()
            for _ in range(steps):
                await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
        await client
        assert holds()[:2] == before[:2]
        assert not path.exists()

    started = asyncio.Event()
    run(scenario())


# ---------------------------------------------------------------- copied


@pytest.fixture
def vendored(tmp_path: Path) -> Path:
    """A package that holds copies of the three files."""
    folder = tmp_path / "vendored"
    folder.mkdir()
    (folder / "__init__.py").touch()
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    return folder


TURN = """
import asyncio, json, sys, threading
from http.client import HTTPConnection
known = set(sys.modules)
from {module} import Config, serve

def ask(address):
    connection = HTTPConnection(address)
    connection.request("POST", "/v1/messages", sys.argv[2])
    text = json.loads(connection.getresponse().read())["content"][0]["text"]
    connection.close()
    return text

async def main():
    async with serve(Config(bin=sys.argv[1], listen_addr="127.0.0.1:0")) as bridge:
        return await asyncio.to_thread(ask, bridge.addresses[0])

text, file = asyncio.run(main()), sys.modules[Config.__module__].__file__
print(json.dumps({{"text": text, "file": file, "modules": [*(sys.modules.keys() - known)]}}))
"""


@pytest.mark.parametrize("module", ["vendored.bridge", "bridge"])
def test_a_copy_answers_and_imports_nothing_but_h11_orjson_and_the_standard_library(
    vendored: Path, module: str
) -> None:
    folder = vendored.parent if "." in module else vendored  # is what Python looks into first
    command = [
        sys.executable,
        "-c",
        TURN.format(module=module),
        STANDIN,
        json.dumps(request_body()),
    ]
    found = json.loads(
        subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, check=True, timeout=30).stdout
    )
    assert found["text"] == "echo: hello; 1 messages"
    assert found["file"] == str(vendored / "bridge.py")
    ours = (
        {"vendored"} if folder == vendored.parent else {name.removesuffix(".py") for name in FILES}
    )
    modules = {name.partition(".")[0] for name in found["modules"]}
    assert modules - sys.stdlib_module_names == {"h11", "orjson", *ours}


@pytest.mark.parametrize("way", ["vendored/bridge.py", "-m vendored.bridge"])
def test_a_copy_is_a_program(vendored: Path, way: str) -> None:
    command = [sys.executable, *way.split()]
    said = subprocess.run(
        [*command, "--help"], cwd=vendored.parent, capture_output=True, text=True, check=True
    )
    assert "--listen-addr" in said.stdout
    command += ["--listen-addr", "127.0.0.1:0", "--bin", str(STANDIN)]
    with subprocess.Popen(
        command, cwd=vendored.parent, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        port = re.search(r"listening on http://127.0.0.1:(\d+)", process.stderr.readline())
        assert port
        assert Client("127.0.0.1", int(port[1])).post().text == "echo: hello; 1 messages"
        process.terminate()
        assert process.wait(30) == 0


def test_the_readmes_host_program_runs_beside_the_three_files(vendored: Path) -> None:
    (vendored / "program.py").write_text(EMBEDDED)
    environ = {
        **os.environ,
        "CLAUDE_CLI_BIN": str(STANDIN),
        "CLAUDE_CLI_KEEP_ENV": ",".join(kept_names()),
    }
    command = [sys.executable, vendored / "program.py"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environ, **pipes) as process:
        assert process.stdout
        address = re.fullmatch(r"listening on 127.0.0.1:(\d+)\n", process.stdout.readline())
        assert address
        assert Client("127.0.0.1", int(address[1])).post().text == "echo: hello; 1 messages"
        before = [child.pid for child in children(process.pid)]
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    # What Python itself prints, and nothing of the bridge's log.
    assert said.startswith("Traceback")
    assert said.endswith("KeyboardInterrupt\n")
    assert not [number for number in before if alive(number)]


# ---------------------------------------------------------------- where there is little

START = readme.block("ulimit -S -v 65536", readme.DEPLOY)
UNLIMITED = readme.block("ulimit -S -v unlimited", readme.DEPLOY)

UNSHARE = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else [])]
# Only $TMPDIR can be written to, nobody has a HOME, and /proc is empty where told.
CONFINE = """
mount --bind "$TMPDIR" "$TMPDIR"
while read -r _ point _; do
    test "$point" = "$TMPDIR" || mount -o remount,bind,ro "$point" || exit 3
done < /proc/self/mounts
test "$PROC" = yes || mount -t tmpfs -o ro tmpfs /proc || exit 3
test "$PROC" = yes || test ! -e /proc/self || exit 3
test ! -w "$0" || exit 3
unset HOME
exec ./start
"""


@pytest.fixture
def confined(tmp_path: Path) -> Iterator[Launch]:
    """The bridge as the README starts it under a limit, in a mount namespace: confined(cli, "no")
    without /proc."""
    if sys.platform != "linux" or subprocess.run([*UNSHARE, "true"], check=False).returncode:
        pytest.skip("there are no mount namespaces here")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / "tmp").mkdir()
    scripts = {"start": START, "claude-unlimited": UNLIMITED, "confine": CONFINE}
    scripts[".venv/bin/claude-cli-bridge"] = (
        f'#!/bin/sh\nexec {sys.executable} {ROOT / "bridge.py"} "$@"\n'
    )
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started: list[Program] = []

    def start(cli: Path, proc: str) -> Program:
        (tmp_path / "claude").symlink_to(cli)
        variables = {
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
            "TMPDIR": str(tmp_path / "tmp"),
        }
        variables |= {"PROC": proc, "CLAUDE_CLI_LISTEN_ADDR": f"127.0.0.1:{port}"}
        variables |= {"CLAUDE_CLI_KEEP_ENV": ",".join(kept_names()), "CLAUDE_CLI_MAX_IDLE": "16"}
        command = [*UNSHARE, "sh", tmp_path / "confine"]
        environ = {**os.environ, **variables}
        process = subprocess.Popen(
            command, env=environ, cwd=tmp_path, stderr=subprocess.PIPE, text=True
        )
        started.append(Program("127.0.0.1", port, process=process))
        assert process.stderr
        for line in process.stderr:
            started[0].lines.append(line)
            if "logged in" in line:
                return started[0]
        pytest.fail(f"start: {started[0].lines}")

    yield start
    for program in started:
        program.process.kill()
        program.process.communicate()


def stop(program: Program) -> list[str]:
    """End it by a signal; nothing may be left of it.  Returns what it said meanwhile."""
    before = [child.pid for child in program.children()]
    assert before
    program.process.terminate()
    _, said = program.process.communicate(timeout=30)
    assert program.process.returncode == 0
    assert not [number for number in before if alive(number)]
    return said.splitlines()


def converse(client: Client, first: str, turns: int) -> list[str]:
    """A conversation whose turns are streamed or not, in turn; returns what its sessions were."""
    conversation, sessions = [first], []
    for number in range(turns):
        answer = client.post(conversation, stream=bool(number % 2))
        assert answer.status == 200, answer.body
        conversation += [answer.text, f"SAY {number}"]
        sessions.append(answer.session)
    return sessions


def limits(program: Program) -> list[int]:
    """What the children's address space is limited to."""
    found = []
    for child in program.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(child.rlimit(resource.RLIMIT_AS)[0])
    return found


def test_without_home_or_a_disk_64_mb_are_enough(
    confined: Launch, gate: Path, background: ThreadPoolExecutor, tmp_path: Path
) -> None:
    program = confined(STANDIN, "yes")
    assert psutil.Process(program.process.pid).rlimit(resource.RLIMIT_AS)[0] == 64 << 20
    wait_until(lambda: set(limits(program)) == {resource.RLIM_INFINITY}, "children without a limit")
    assert converse(program, "hello", 4) == ["new", "hot", "hot", "hot"]
    counted = program.call(
        "POST", "/v1/messages/count_tokens", request_body(["hello", "yes", "and now"])
    )
    assert counted.json == {"input_tokens": 30}
    running = [background.submit(converse, program, f"{number} PAUSE", 3) for number in range(10)]
    wait_until(lambda: len(program.children()) > 10, "ten processes")
    assert not any(one.done() for one in running)
    gate.touch()
    assert [one.result() for one in running] == [["new", "hot", "hot"]] * 10
    sizes = [program.post(["x" * size, "yes", "and now"]).status for size in (450_000, 500_000)]
    assert sizes == [200, 413]
    said = program.lines + stop(program)
    assert not [line for line in said if "INFO" not in line]
    assert os.listdir(tmp_path / "tmp") == []


def test_the_real_cli_needs_no_home_and_one_folder_behind_a_bridge_with_64_mb(
    confined: Launch,
) -> None:
    if not CLIS:
        pytest.skip("no real CLI is installed")
    program = confined(next(iter(CLIS.values())), "yes")
    assert converse(program, "SAY it", 3) == ["new", "hot", "hot"]
    counted = program.call("POST", "/v1/messages/count_tokens", request_body("hello"))
    assert counted.json["input_tokens"] > 0
    stop(program)
