"""The bridge under the launchers of the README: a real supervisord, and what systemd does with the
units."""

import getpass
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from xmlrpc.client import ServerProxy

import psutil
import pytest
import readme
from client import Client, Json
from host import ROOT, STANDIN, children, wait_until
from servers import KEEP
from stand_in import Log
from supervisor.xmlrpc import SupervisorTransport
from test_limits import activate
from test_processes import alive, pid

import bridge
import sessions

INSTALLED = "/opt/claude-cli-bridge/.venv/bin/claude-cli-bridge"
# The longest that a shutdown takes: new connections, answers, their last words, the ends of the
# processes.
SHUTDOWN_SECS = (
    bridge.Config().drain_secs
    + 2 * bridge.GRACE_SECS
    + sum(seconds for _, seconds in sessions.ENDING)
)
CLAUDE = '[[model_providers]]\nmodel = "claude-cli/*"\n'
OTHERS = '[[model_providers]]\nmodel = "openai/gpt-5"\n'


def installed(folder: Path) -> Path:
    """The program, where the README does not have it."""
    path = folder / "claude-cli-bridge"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT / "bridge.py"} "$@"\n')
    path.chmod(0o755)
    return path


# ---------------------------------------------------------------- supervisord

SECTION = readme.block("[program:claude-cli-bridge]")
# Beside it a program that ends as soon as it is started, which shows that supervisord had time to
# restart others.
MAIN = """
[unix_http_server]
file = {folder}/socket
[supervisord]
nodaemon = true
user = {user}
logfile = {folder}/supervisord.log
pidfile = {folder}/supervisord.pid
childlogdir = {folder}
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
[program:witness]
command = true
startsecs = 0
autorestart = true
"""


@dataclass
class Supervisor:
    folder: Path
    client: Client

    def call(self, method: str, *arguments: Any) -> Any:
        transport = SupervisorTransport(None, None, f"unix://{self.folder}/socket")
        with ServerProxy("http://localhost", transport) as proxy:
            return getattr(proxy.supervisor, method)(*arguments)

    @property
    def info(self) -> Json:
        found: Json = self.call("getProcessInfo", "claude-cli-bridge")
        return found

    @property
    def said(self) -> list[str]:
        """The bridge's lines in its log file."""
        return (self.folder / "bridge.log").read_text().splitlines()

    @property
    def listeners(self) -> int:
        return sum("listening on" in line for line in self.said)

    def starts(self, name: str) -> int:
        return (self.folder / "supervisord.log").read_text().count(f"spawned: '{name}'")


@pytest.fixture
def supervise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Supervisor]]:
    """Start a supervisord with the README's section and this configuration file."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("CLAUDE_CLI_LISTEN_ADDR", f"127.0.0.1:{port}")
    monkeypatch.setenv("CLAUDE_CLI_BIN", str(STANDIN))
    monkeypatch.setenv("CLAUDE_CLI_KEEP_ENV", ",".join(KEEP))
    places = {
        INSTALLED: installed(tmp_path),
        "/etc/claude-cli-bridge.toml": tmp_path / "bridge.toml",
        "/var/log/claude-cli-bridge.log": tmp_path / "bridge.log",
        "/var/lib/claude-cli-bridge": tmp_path / "home",
        "user = claude": f"user = {getpass.getuser()}",
    }
    section = SECTION
    for place, here in places.items():
        assert place in section
        section = section.replace(place, str(here))
    path = tmp_path / "supervisord.conf"
    path.write_text(MAIN.format(folder=tmp_path, user=getpass.getuser()) + section)
    started: list[subprocess.Popen[bytes]] = []

    def start(providers: str) -> Supervisor:
        (tmp_path / "bridge.toml").write_text(providers)
        command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(path)]
        started.append(
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )
        wait_until((tmp_path / "bridge.log").exists, "a start", 30)
        return Supervisor(tmp_path, Client("127.0.0.1", port))

    yield start
    for process in started:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("way", ["restart", "kill"])
def test_supervisord_restarts_the_bridge_without_an_orphan(
    gate: Path,
    log: Log,
    supervise: Callable[..., Supervisor],
    background: ThreadPoolExecutor,
    way: str,
) -> None:
    supervisor = supervise(CLAUDE)
    wait_until(lambda: supervisor.listeners, "the listener", 30)
    assert supervisor.info["statename"] == "RUNNING"
    first = supervisor.client.post()
    asked = background.submit(supervisor.client.post, "PAUSE") if way == "kill" else None
    if asked:
        wait_until(lambda: log.got("PAUSE"), "a turn")
    old = psutil.Process(supervisor.info["pid"])
    before = {child.pid for child in children(old.pid)}
    assert pid(first) in before
    if asked:
        old.kill()
        assert isinstance(asked.exception(), OSError | HTTPException)
    else:
        assert supervisor.call("stopProcess", "claude-cli-bridge")
        assert supervisor.call("startProcess", "claude-cli-bridge")
    wait_until(lambda: not any(map(alive, before)), "the end of all children")
    wait_until(lambda: supervisor.listeners == 2, "the new listener", 30)
    assert supervisor.info["pid"] != old.pid
    assert supervisor.info["statename"] == "RUNNING"
    answer = supervisor.client.post(["hello", first.text, "and now"])
    assert (answer.status, answer.session) == (200, "rebuilt; reason=unknown-history")


@pytest.mark.parametrize(
    ("providers", "status", "words"),
    [(OTHERS, 0, "claude-cli"), ("model_providers = 1\n", 2, "cannot be read")],
    ids=["nothing to serve", "settings that cannot work"],
)
def test_supervisord_leaves_a_bridge_alone_that_ended_on_purpose(
    supervise: Callable[..., Supervisor], providers: str, status: int, words: str
) -> None:
    supervisor = supervise(providers)
    wait_until(lambda: supervisor.info["statename"] == "EXITED", "its end", 30)
    assert supervisor.info["exitstatus"] == status
    others = supervisor.starts("witness")
    wait_until(lambda: supervisor.starts("witness") > others + 1, "restarts of another program")
    assert supervisor.starts("claude-cli-bridge") == 1
    assert supervisor.info["statename"] == "EXITED"
    [line] = supervisor.said
    assert words in line


def test_supervisord_gives_a_shutdown_the_time_it_may_take() -> None:
    settings = dict(line.split(" = ", 1) for line in SECTION.splitlines()[1:])
    assert float(settings["stopwaitsecs"]) > SHUTDOWN_SECS


# ---------------------------------------------------------------- systemd

SOCKET = readme.block("ListenStream=")
SERVICE = readme.block("ExecStart=")


def settings_of(unit: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in unit.splitlines() if "=" in line)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_systemd_finds_no_fault_in_the_units_and_little_that_they_expose(tmp_path: Path) -> None:
    units = {"claude-cli-bridge.socket": SOCKET, "claude-cli-bridge.service": SERVICE}
    for name, text in units.items():
        (tmp_path / name).write_text(text.replace(INSTALLED, str(installed(tmp_path))))

    def analyze(*words: str) -> str:
        command = ["systemd-analyze", *words]
        done = subprocess.run(command, cwd=tmp_path, text=True, check=False, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stderr

    assert analyze("verify", *(f"./{name}" for name in units)) == ""
    if (
        "--threshold"
        in subprocess.run(["systemd-analyze", "--help"], capture_output=True, text=True).stdout
    ):
        analyze(
            "security", "--offline=yes", "--threshold=20", "./claude-cli-bridge.service"
        )  # 2.0 of 10


def test_systemd_can_start_ask_and_stop_the_bridge_by_its_units(tmp_path: Path) -> None:
    unit = settings_of(SERVICE)
    host, _, _ = settings_of(SOCKET)["ListenStream"].rpartition(":")
    command = shlex.split(unit["ExecStart"].replace(INSTALLED, str(installed(tmp_path))))
    with socket.create_server((host, 0)) as listener:
        process = activate(listener, *command)
        answer = Client(*listener.getsockname()).post()
        assert answer.text == "echo: hello; 1 messages"
        process.terminate()
        assert process.stderr
        assert f"listening on http://{host}:{listener.getsockname()[1]}" in process.stderr.read()
        assert process.wait(30) == 0
        process.stderr.close()
    assert float(unit["TimeoutStopSec"]) > SHUTDOWN_SECS
    assert (
        unit["KillMode"] == "mixed"
    )  # or else the CLIs get the signal, too, and running answers fail
