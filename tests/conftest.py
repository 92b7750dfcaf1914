"""What the tests share: a network of their own, the real CLIs, the stub API, bridges, the check
that nothing leaks.

The whole test run moves into a network namespace with loopback alone where the machine allows it,
so that no CLI can reach anything but the stub.  A second version of the CLI and the clients that
people use are fetched before that, with npm and uv, where these are installed.
"""

import asyncio
import base64
import contextlib
import ctypes
import fcntl
import http.client
import importlib.util
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import tomllib
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
sys.path[:0] = [str(TESTS), str(ROOT)]

from standin import Log  # noqa: E402

from bridge import Bridge, Config  # noqa: E402
from bridge import serve as serve_bridge  # noqa: E402

Json = dict[str, Any]
NPM_VERSION = "2.1.197"
# What tests/test_clients.py and tests/test_plano.py drive: environments, because these packages do not go together.
PIP_CLIENTS = {
    "anthropic-0": ("anthropic==0.125.0",),
    "langchain": ("langchain-anthropic==1.7.7", "anthropic>=2.12,<3"),
    "llm": ("llm==0.36", "llm-anthropic==0.30", "openai==3.54.0"),
    "litellm": ("litellm[proxy]==1.106.2",),
    "planoai": ("planoai==0.4.39",),
}
STANDIN = TESTS / "standin.py"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
LONGEST = (
    "test_conformance",
    "test_typescript_clients",
    "test_a_newcomer",
    "test_library_gets",
    "test_openai_client",
)
CLONE_NEWNET, CLONE_NEWUSER = 0x40000000, 0x10000000


def cached(name: str) -> Path:
    """A folder of the user's cache, kept between runs."""
    return CACHE / "claude-cli-bridge-tests" / name


def fetched(*command: str | Path, folder: Path | None = None) -> bool:
    """Run an installer; without a network it fails, at once or much later."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return not subprocess.run(
            command, cwd=folder, capture_output=True, timeout=300, check=False
        ).returncode
    return False


def from_npm(name: str, wanted: str, *packages: str) -> Path | None:
    """What npm installs: the path `wanted` in it, if it is there."""
    folder = cached(name)
    if not (folder / wanted).exists() and shutil.which("npm"):
        folder.mkdir(parents=True, exist_ok=True)
        options = ("--no-audit", "--no-fund", "--prefer-offline", "--fetch-retries=1")
        fetched("npm", "install", *options, *packages, folder=folder)
    return folder / wanted if (folder / wanted).exists() else None


def made(name: str, made_of: list[str], make: Callable[[Path], bool]) -> Path | None:
    """The folder that `make` fills, once for what it is made of."""
    folder, want = cached(name), "\n".join((sys.version, *made_of))
    record = folder.with_name(f"{name}.made-of")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{name}.lock").open("w") as lock:  # another run may be at it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if record.exists() and record.read_text() == want:
            return folder
        record.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        if not make(folder):
            return None
        record.write_text(want)
        return folder


def from_pip(name: str, *requirements: str) -> Path | None:
    """The Python of a virtual environment with these packages.  Filled by uv, because pip takes
    five times as long."""
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

    def make(folder: Path) -> bool:
        return (
            uv is not None
            and fetched(sys.executable, "-m", "venv", "--without-pip", folder)
            and fetched(uv, "pip", "install", "--python", folder / "bin/python", *requirements)
        )

    folder = made(name, [*requirements], make)
    return folder and folder / "bin/python"


def wheels() -> Path | None:
    """All that the README's first command installs, for a pip without a network."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    needed = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *extras["cli"],
        *(one for one in extras["test"] if one.startswith("editables")),
    ]
    return made(
        "wheels",
        needed,
        lambda folder: fetched(sys.executable, "-m", "pip", "download", "-d", folder, *needed),
    )


def npm_cli() -> Path | None:
    """The older CLI from the npm registry."""
    wanted = "node_modules/@anthropic-ai/claude-code-linux-x64/claude"
    return from_npm(NPM_VERSION, wanted, f"@anthropic-ai/claude-code@{NPM_VERSION}")


def js_clients() -> Path | None:
    """The folder with the TypeScript clients that tests/drivers/ts_check.mjs drives, under `js`."""
    packages = ("@anthropic-ai/sdk@1.12.0", "ai@7.0.173", "@ai-sdk/anthropic@4.0.105", "zod@4")
    found = from_npm("ts-ai-7/js", "node_modules/zod", *packages)
    return found and found.parents[2]


def opencode() -> Path | None:
    """OpenCode; this package holds the program of `opencode-ai` for any Linux on x86-64."""
    package = "opencode-linux-x64-baseline"
    return from_npm(
        "opencode-1.18.33", f"node_modules/{package}/bin/opencode", f"{package}@1.18.33"
    )


def bundled_cli() -> Path | None:
    wheel = importlib.util.find_spec("claude_agent_sdk")
    binary = Path(wheel.origin).parent / "_bundled/claude" if wheel and wheel.origin else None
    return binary if binary and binary.exists() else None


def isolate() -> str:
    """Move this process into a network namespace with loopback alone; say how it went."""
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWNET if uid == 0 else CLONE_NEWNET | CLONE_NEWUSER):
        return f"not isolated: unshare: {os.strerror(ctypes.get_errno())}"
    if uid:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    with socket.socket() as probe:  # ip link set lo up
        fcntl.ioctl(probe, 0x8914, struct.pack("16sh", b"lo", 0x1 | 0x40))
    return "in a network namespace with loopback alone"


CLIS: dict[str, Path] = {}
JS_CLIENTS: list[Path] = []
OPENCODE: list[Path] = []
WHEELS: list[Path] = []
PYTHONS: dict[str, Path] = {}  # of PIP_CLIENTS
ISOLATION = ""


def pytest_configure(config: pytest.Config) -> None:
    global ISOLATION
    with ThreadPoolExecutor() as executor:
        fetches = [executor.submit(fetch) for fetch in (js_clients, opencode, wheels, npm_cli)]
        pythons = {
            name: executor.submit(from_pip, name, *packages)
            for name, packages in PIP_CLIENTS.items()
        }
    javascript, opened, packages, older = (fetch.result() for fetch in fetches)
    JS_CLIENTS[:] = filter(None, [javascript])
    OPENCODE[:] = filter(None, [opened])
    WHEELS[:] = filter(None, [packages])
    PYTHONS.update({name: made for name, python in pythons.items() if (made := python.result())})
    for path in (bundled_cli(), older):
        if path:
            version = subprocess.run(
                [path, "--version"], capture_output=True, text=True, check=True
            ).stdout.split()[0]
            CLIS[version] = path
    ISOLATION = isolate() if sys.platform == "linux" else "not isolated"


def pytest_report_header() -> str:
    return f"real CLIs: {', '.join(CLIS) or 'none'}; {ISOLATION}"


# Of these each test runs with one version of the CLI, half of them with each, as a start of the CLI
# takes most of their time; `CLIS=all python -m pytest` runs them with both.
IN_TURN = (
    "test_agent",
    "test_api",
    "test_check",
    "test_environment",
    "test_js_clients",
    "test_real",
    "test_tools",
    "test_unasked",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest first, so that no worker waits for another at the end."""
    items.sort(key=lambda item: not item.name.startswith(LONGEST))
    if os.environ.get("CLIS") == "all":
        return
    left_out = [item for item in items if is_of_other_version(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def is_of_other_version(item: pytest.Item) -> bool:
    """Whether a test with the real CLI is left to another run, with the other version."""
    callspec = getattr(item, "callspec", None)
    version = callspec.params.get("cli") if callspec else None
    if version is None or item.path.stem not in IN_TURN or len(CLIS) < 2:
        return False
    name = item.nodeid.replace(str(version), "")
    return version != ("bundled", "npm")[zlib.crc32(name.encode()) % 2]


def wait_until(condition: Callable[[], object], what: str, seconds: float = 15) -> None:
    """Poll for something that another process does; the time is a limit for failure, not a
    measure."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"never came: {what}"
        time.sleep(0.01)


def children(pid: int | None = None) -> list[psutil.Process]:
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # this one alone
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
    return found


def open_files() -> dict[str, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found[name] = os.readlink(f"/proc/self/fd/{name}")
    return {name: target for name, target in found.items() if not target.startswith("/proc/")}


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
    for name in list(os.environ):
        if name.startswith(("ANTHROPIC_", "CLAUDE", "OTEL_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    # The stand-in runs on the Python under test, and not behind a version manager's slow shim.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("DISABLE_AUTOUPDATER", "1")
    monkeypatch.setenv("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", stub.url)
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-stub")
    return home


KEEP = ("ANTHROPIC_BASE_URL", "ANTHROPIC_API_KEY", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC")


@pytest.fixture(params=["bundled", "npm"])
def cli(request: pytest.FixtureRequest) -> Path:
    """The real CLI, once for each version that is there."""
    versions = list(CLIS.values())
    number = 0 if request.param == "bundled" else 1
    if number >= len(versions):
        pytest.skip("this version of the CLI is not installed")
    return versions[number]


class Stub:
    """The stub of the Messages API, as a process of its own."""

    def __init__(self, *arguments: str) -> None:
        self.arguments = arguments

    def __enter__(self) -> "Stub":
        command = [sys.executable, TESTS / "stub_api.py", *self.arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()

    def log(self, since: int = 0) -> list[Json]:
        """The requests to /v1/messages, from number `since` on: path, headers, body, end,
        seconds."""
        return [row for row in self._rows("") if row["path"].startswith("/v1/messages")][since:]

    def last(self) -> Json:
        """The last request to /v1/messages."""
        return [row for row in self._rows("?since=-9") if row["path"].startswith("/v1/messages")][
            -1
        ]

    def _rows(self, query: str) -> list[Json]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port)) as connection:
            connection.request("GET", "/_log" + query)
            rows: list[Json] = json.loads(connection.getresponse().read())
        return rows


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Json:
        value: Json = json.loads(self.body)
        return value

    @property
    def events(self) -> list[Json]:
        """The events of a stream; asserts that each event's name is its type."""
        events = []
        for block in self.body.decode().split("\n\n")[:-1]:
            name, data = block.split("\n")
            event = json.loads(data.removeprefix("data: "))
            assert name == "event: " + event["type"]
            events.append(event)
        return events

    @property
    def message(self) -> Json:
        """The message, assembled by the SDK's own accumulator if it was streamed."""
        if self.headers["content-type"] == "application/json":
            return self.json
        return assemble(self.events)

    @property
    def text(self) -> str:
        return "".join(block.get("text", "") for block in self.message["content"])

    @property
    def session(self) -> str:
        return self.headers["x-bridge-session"]


def assemble(events: list[Json]) -> Json:
    """What a client makes of a stream, by the accumulator of the `anthropic` SDK."""
    from anthropic.lib.streaming._messages import accumulate_event

    snapshot: Any = None
    buffers: dict[int, bytes] = {}
    for event in events:
        if event["type"] not in ("ping", "error"):
            raw: Any = event
            snapshot = accumulate_event(event=raw, current_snapshot=snapshot, json_bufs=buffers)
    value: Json = snapshot.model_dump(mode="json", exclude_none=True)
    return {"stop_reason": None, "stop_sequence": None, **value}


@dataclass
class Client:
    """A plain HTTP client of one bridge."""

    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Answer:
        with contextlib.closing(
            http.client.HTTPConnection(self.host, self.port, timeout=60)
        ) as connection:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(
                method, path, data, {"content-type": "application/json", **(headers or {})}
            )
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, found, response.read())

    def post(self, messages: Any = "hello", *, session: str | None = None, **fields: Any) -> Answer:
        """POST /v1/messages; a string is one user message, a list of strings is user and assistant
        in turn."""
        headers = {"x-arch-claude-cli-session": session} if session else {}
        return self.call("POST", "/v1/messages", request_body(messages, **fields), headers)

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=30)


def request_body(messages: Any = "hello", **fields: Any) -> Json:
    if isinstance(messages, str):
        messages = [messages]
    messages = [
        {"role": ("user", "assistant")[number % 2], "content": message}
        if isinstance(message, str)
        else message
        for number, message in enumerate(messages)
    ]
    body = {"model": "sonnet", "max_tokens": 1024, "messages": messages, **fields}
    return {name: value for name, value in body.items() if value is not ...}


def text(value: str) -> Json:
    return {"type": "text", "text": value}


def sent(messages: list[Any]) -> list[Json]:
    """A client's messages in the form that `arrived` gives."""
    plain = request_body(messages)["messages"]
    return [
        {**m, "content": [text(m["content"])] if isinstance(m["content"], str) else m["content"]}
        for m in plain
    ]


def arrived(body: Json) -> list[Json]:
    """The conversation of an API request without what the CLI adds: its date and environment lines
    (a system-reminder of 2.1.197, system messages of 2.1.330) and its cache breakpoints."""
    messages = []
    for message in body["messages"]:
        blocks = (
            [text(message["content"])]
            if isinstance(message["content"], str)
            else message["content"]
        )
        blocks = [
            {key: value for key, value in block.items() if key != "cache_control"}
            for block in blocks
        ]
        blocks = [
            b
            for b in blocks
            if not b.get("text", "").startswith("<system-reminder>\nAs you answer the user's")
        ]
        if blocks and message["role"] != "system":
            messages.append({"role": message["role"], "content": blocks})
    return messages


def png() -> str:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + b"\xff\0\0" * 8) * 8))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")).decode()


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": png()}}


@pytest.fixture
def since(stub: Stub) -> Callable[[], list[Json]]:
    """The API requests that reached the stub during this test."""
    start = len(stub.log())
    return lambda: stub.log(start)


@dataclass
class Server(Client):
    """A bridge in a thread of this process, with an event loop of its own."""

    host: str = ""
    port: int = 0
    config: Config = field(default_factory=Config)
    bridge: Bridge | None = None
    loop: asyncio.AbstractEventLoop | None = None

    def __enter__(self) -> "Server":
        self._ready = threading.Event()
        self._stop: asyncio.Event | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        self._ready.wait()
        if self._failure:
            self._thread.join()
            raise self._failure
        return self

    async def _run(self) -> None:
        try:
            self.loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            async with serve_bridge(self.config) as self.bridge:
                self.host, _, port = self.bridge.addresses[0].rpartition(":")
                self.port = int(port) if port.isdecimal() else 0
                self._ready.set()
                await self._stop.wait()
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not left, f"tasks left: {left}"
        except BaseException as error:  # noqa: BLE001 - handed to the test
            self._failure = error
            self._ready.set()

    def close(self) -> None:
        """Ask the bridge to shut down, and wait for it."""
        assert self.loop
        assert self._stop
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def __exit__(self, *_: object) -> None:
        self.close()
        if self._failure:
            raise self._failure

    def processes(self) -> list[psutil.Process]:
        """The bridge's children: those of this process that run its CLI."""
        found = []
        for child in children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if self.config.bin in child.cmdline():
                    found.append(child)
        return found


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
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
def real(serve: Callable[..., Server], cli: Path) -> Server:
    """A bridge with the real CLI in front of the stub."""
    return serve(bin=cli)


@dataclass
class Program(Client):
    """The bridge as a user starts it: a process with arguments and an environment."""

    process: subprocess.Popen[str] = field(kw_only=True)
    lines: list[str] = field(default_factory=list)  # what it printed on stderr

    def wait(self) -> int:
        return self.process.wait(30)

    def children(self) -> list[psutil.Process]:
        return children(self.process.pid)


@pytest.fixture
def launch() -> Iterator[Callable[..., Program]]:
    """Start the bridge as a program: launch("--max-idle", "2", CLAUDE_CLI_BIN=...).  It listens on
    a free port, and has no spares."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: str, wait: bool = True, **variables: str) -> Program:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            settings = {
                "CLAUDE_CLI_BIN": str(STANDIN),
                "CLAUDE_CLI_LISTEN_ADDR": f"127.0.0.1:{port}",
            }
            settings["CLAUDE_CLI_SPARES"] = "0"
            environ = {**os.environ, "CLAUDE_CLI_KEEP_ENV": ",".join(KEEP), **settings, **variables}
            command = [sys.executable, str(ROOT / "bridge.py"), *arguments]
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
