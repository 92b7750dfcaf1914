"""What the tests share: a network of their own, the real CLIs, the stub API, bridges, the check
that nothing leaks.

The whole test run moves into a network namespace with loopback alone where the machine allows it,
so that no CLI can reach anything but the stub.  A second version of the CLI and the clients that
people use are fetched before that, with npm and uv, where these are installed.
"""

import contextlib
import gc
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import first_party
import pytest
from client import Json
from host import STANDIN, children, isolate, open_files, wait_until
from installed import (
    CLI_PARAMS,
    CLIS,
    JS_CLIENTS,
    OPENCODE,
    OTHER_PYTHON,
    PIP_CLIENTS,
    PYTHONS,
    WHEELS,
    find_clis,
    from_pip,
    js_clients,
    opencode,
    other_python,
    wheels,
)
from servers import BRIDGE, ENGINE, KEEP, Launch, Program, Serve, Server, kept_names, make_nobody
from stand_in import Log
from stubs import Stub
from wire import Wire

import sessions
from bridge import Config

# The longest begin, so that no worker waits for another at the end.
LONGEST = (
    "test_conformance",
    "test_typescript_clients",
    "test_a_newcomer",
    "test_conversations_that_run_at_once",
    "test_library_gets",
    "test_openai_client",
    "test_hermes",
    "test_put_in_place_by_the_readme",
    "test_what_the_dockerfile_builds",
    "test_at_the_apis_own_address",
    "test_a_cli_without_a_feature",
)

ISOLATION = ""


def pytest_configure(config: pytest.Config) -> None:
    global ISOLATION
    # In a background job of a shell SIGINT is ignored, and then by all that the tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Python programs start faster when they may keep their compiled form.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    # The stand-in runs on this one: a version manager in front of python3 would take longer
    # than the stand-in itself.
    here = os.path.dirname(sys.executable)
    os.environ["PATH"] = os.pathsep.join([here, os.environ["PATH"]])
    with ThreadPoolExecutor() as executor:
        fetches = [executor.submit(fetch) for fetch in (js_clients, opencode, wheels, other_python)]
        clis = executor.submit(find_clis)
        pythons = {
            name: executor.submit(from_pip, name, *packages)
            for name, packages in PIP_CLIENTS.items()
        }
    javascript, opened, packages, python = (fetch.result() for fetch in fetches)
    JS_CLIENTS[:] = filter(None, [javascript])
    OPENCODE[:] = filter(None, [opened])
    WHEELS[:] = filter(None, [packages])
    OTHER_PYTHON[:] = filter(None, [python])
    made = {name: python.result() for name, python in pythons.items()}
    PYTHONS.update({name: path for name, path in made.items() if path})
    try:
        CLIS.update(clis.result())
    except LookupError as error:
        raise pytest.UsageError(*error.args) from None
    ISOLATION = isolate() if sys.platform == "linux" else "not isolated"
    if first_party.IS_ON:
        first_party.lead_to_the_stub()


def pytest_report_header() -> str:
    return f"real CLIs: {', '.join(CLIS) or 'none'}; {ISOLATION}"


# Of these each test runs with one version of the CLI, every twelfth with the older one, which takes
# longer to start, and one that asks for a streamed or a whole answer asks for one of the two;
# `CLIS=all python -m pytest` runs them with both, `CLIS=2.1.197,2.1.330` with these.
IN_TURN = (
    "test_agent",
    "test_check",
    "test_cli",
    "test_continue",
    "test_conversation",
    "test_counting",
    "test_environment",
    "test_fidelity",
    "test_gate",
    "test_js_clients",
    "test_logins",
    "test_models",
    "test_real",
    "test_rebuilt",
    "test_repairs",
    "test_server",
    "test_stand_in",
    "test_tools",
)
# These with both: what arrives of any request is what differs most between versions.
WITH_BOTH = ("test_generated_requests", "test_a_text_after_a_call", "test_whether_continued")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest first, and each test with the real CLI once."""
    items.sort(key=lambda item: not item.name.startswith(LONGEST))
    if os.environ.get("CLIS"):
        return
    others = list(filter(is_for_another_run, items))
    # One that says itself with which version it runs has no other run.
    kept = {any_run(item) for item in items if item not in others}
    left_out = [item for item in others if any_run(item) in kept]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish() -> None:
    """What is there now stays to the end: the garbage collector need not look at it again."""
    gc.freeze()


def any_run(item: pytest.Item) -> str:
    """The name that a test has with any version and for any kind of answer."""
    return re.sub("bundled|npm|streamed|whole|True|False", "", item.nodeid)


def is_for_another_run(item: pytest.Item) -> bool:
    """Whether a test with the real CLI is left to a run with both versions and both kinds of
    answers."""
    callspec = getattr(item, "callspec", None)
    params = callspec.params if callspec else {}
    if "cli" not in params or item.path.stem not in IN_TURN or len(CLIS) < 2:
        return False
    if item.name.startswith(WITH_BOTH):
        return False
    chance = zlib.crc32(any_run(item).encode())
    is_for_older = chance % 12 == 0 and not item.name.startswith(LONGEST)
    is_other_version = params["cli"] != ("npm" if is_for_older else "bundled")
    is_streamed = chance // 12 % 2 == 0
    return is_other_version or params.get("stream", is_streamed) != is_streamed


@pytest.fixture(scope="session")
def stub() -> Iterator["Stub"]:
    with Stub() as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_left(stub: "Stub") -> Iterator[None]:
    """Every test ends with the children and the file descriptors it began with."""
    processes, files = {p.pid for p in children()}, set(open_files().items())
    yield
    wait_until(lambda: {p.pid for p in children()} <= processes, "the end of all children")
    wait_until(
        lambda: set(open_files().items()) <= files,
        f"closed files: {set(open_files().items()) - files}",
    )


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stub: "Stub") -> Path:
    """An empty HOME, nobody's account, and the stub as the API.  Returns HOME."""
    home = tmp_path / "home"
    home.mkdir()
    make_nobody(monkeypatch, home, stub.url)
    for name, value in ENGINE.items():
        monkeypatch.setenv(name, value)
    # A fork of this large process takes 50 ms; without `die_with_parent` there is none.  Bridges
    # that are programs (`launch`) do fork.
    monkeypatch.setattr(sessions, "die_with_parent", None)
    # So that no test waits for them.
    monkeypatch.setattr(sessions, "SWEEP_SECS", 0.1)
    monkeypatch.setattr(sessions, "CALM_SECS", 0)
    monkeypatch.setattr(sessions, "ALLOWED", (*sessions.ALLOWED, "STANDIN"))
    return home


@pytest.fixture(params=CLI_PARAMS)
def cli(request: pytest.FixtureRequest) -> Path:
    """The real CLI, once for each version that is there."""
    if request.param in CLIS:
        return CLIS[request.param]
    versions = list(CLIS.values())
    number = 0 if request.param == "bundled" else 1
    if number >= len(versions):
        pytest.skip("this version of the CLI is not installed")
    return versions[number]


@pytest.fixture
def since(stub: Stub) -> Callable[[], list[Json]]:
    """The API requests that reached the stub during this test."""
    start = len(stub.log())
    return lambda: stub.log(start)


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start bridges in this process: serve(bin=..., max_sessions=..., ...) with the fields of
    Config; no spares."""
    with contextlib.ExitStack() as stack:

        def start(**settings: Any) -> Server:
            settings = {
                "listen_addr": "127.0.0.1:0",
                "keep_env": KEEP,
                "bin": str(STANDIN),
                "spares": 0,
                **settings,
            }
            settings["bin"] = str(settings["bin"])
            return stack.enter_context(Server(config=Config(**settings)))

        yield start


@pytest.fixture
def real(serve: Serve, cli: Path) -> Server:
    """A bridge with the real CLI in front of the stub."""
    return serve(bin=cli)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Start the bridge as a program: launch("--max-idle", "2", CLAUDE_CLI_BIN=...).  It listens on
    a free port, has no spares, and is killed at the end."""
    # Who is killed leaves what is there.
    temporary = tmp_path / "tmp-of-programs"
    temporary.mkdir()
    with contextlib.ExitStack() as stack:

        def start(*arguments: str, wait: bool = True, **variables: str) -> Program:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            settings = {
                "CLAUDE_CLI_BIN": str(STANDIN),
                "CLAUDE_CLI_LISTEN_ADDR": f"127.0.0.1:{port}",
            }
            settings["CLAUDE_CLI_SPARES"] = "0"
            settings["TMPDIR"] = str(temporary)
            environ = {
                **os.environ,
                "CLAUDE_CLI_KEEP_ENV": ",".join(kept_names({**os.environ, **variables})),
                **settings,
                **variables,
            }
            command = [*BRIDGE, *arguments]
            process = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)
            program = Program("127.0.0.1", port, process=process)
            assert process.stderr
            errors = process.stderr
            reader = threading.Thread(
                target=lambda: program.lines.extend(iter(errors.readline, ""))
            )
            reader.start()

            def end() -> None:
                process.kill()
                process.wait()
                reader.join()
                errors.close()

            stack.callback(end)
            if wait:
                wait_until(
                    lambda: any("listening on" in line for line in program.lines),
                    f"start: {program.lines}",
                )
            return program

        yield start


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that PAUSE waits for."""
    monkeypatch.setenv("STANDIN_GATE", str(tmp_path / "gate"))
    return tmp_path / "gate"


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Log:
    """What the stand-ins were given."""
    monkeypatch.setenv("STANDIN_LOG", str(tmp_path / "log"))
    (tmp_path / "log").mkdir()
    return Log(str(tmp_path / "log"))


@pytest.fixture
def background(gate: Path) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as executor:
        yield executor
        gate.touch()  # a test that failed does not wait for its other requests


@pytest.fixture
def quiet() -> Iterator[None]:
    """No test makes the bridge or asyncio log an error: a bug, an exception nobody looked at."""
    errors: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: errors.append(
        f"{record.name}: {record.getMessage()} {record.exc_info}"
    )  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    yield
    gc.collect(1)  # exceptions of tasks that nobody awaited are reported when the task is collected
    logging.getLogger().removeHandler(handler)
    assert errors == []


@pytest.fixture
def server(quiet: None, gate: Path, serve: Serve) -> Server:
    return serve()


@pytest.fixture
def connect() -> Iterator[Callable[[Server], Wire]]:
    with contextlib.ExitStack() as stack:
        yield lambda server: stack.enter_context(contextlib.closing(Wire(server)))


@pytest.fixture
def wire(server: Server, connect: Callable[[Server], Wire]) -> Wire:
    return connect(server)


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    return tmp_path / "bridge.sock"


@pytest.fixture(params=["tcp", "unix"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[socket.socket]:
    """A socket that a service manager holds."""
    family = socket.AF_UNIX if request.param == "unix" else socket.AF_INET
    with socket.socket(family) as sock:
        sock.bind(str(tmp_path / "socket") if request.param == "unix" else ("127.0.0.1", 0))
        sock.listen(100)
        yield sock
