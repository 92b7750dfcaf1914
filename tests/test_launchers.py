"""The bridge under a real supervisord."""

import getpass
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

import psutil
import pytest
from conftest import KEEP, ROOT, STANDIN, Client, children, wait_until
from standin import Log
from test_processes import alive, pid

CONFIG = """
[unix_http_server]
file = {folder}/supervisor.sock
[supervisord]
nodaemon = true
user = {user}
logfile = {folder}/supervisord.log
pidfile = {folder}/supervisord.pid
childlogdir = {folder}
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
[supervisorctl]
serverurl = unix://{folder}/supervisor.sock
[program:bridge]
command = {python} {root}/bridge.py --listen-addr 127.0.0.1:{port} --bin {standin} --keep-env {keep}
stopwaitsecs = 30
startsecs = 0
stderr_logfile = {folder}/bridge.log
"""


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Runs supervisorctl; `bridge` on a free port is under a supervisord of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    values = {"folder": tmp_path, "python": sys.executable, "root": ROOT, "port": port, "standin": STANDIN}
    path = tmp_path / "supervisord.conf"
    path.write_text(CONFIG.format(**values, keep=",".join(KEEP), user=getpass.getuser()))
    command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def control(*words: str) -> str:
        if not words:
            return str(port)
        command = [sys.executable, "-m", "supervisor.supervisorctl", "-c", str(path), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout

    wait_until(lambda: "RUNNING" in control("status"), "the start", 30)
    yield control
    process.terminate()
    process.wait()


def bridges() -> list[psutil.Process]:
    return [child for child in children() if str(ROOT / "bridge.py") in child.cmdline()]


@pytest.mark.parametrize("way", ["restart", "kill"])
def test_supervisord_restarts_the_bridge_without_an_orphan(
    gate: Path, log: Log, supervisor: Callable[..., str], background: ThreadPoolExecutor, way: str
) -> None:
    client = Client("127.0.0.1", int(supervisor()))
    wait_until(lambda: "listening" in supervisor("tail", "bridge", "stderr"), "the listener")
    first = client.post()
    asked = background.submit(client.post, "PAUSE") if way == "kill" else None
    if asked:
        wait_until(lambda: log.got("PAUSE"), "a turn")
    [old] = bridges()
    before = {child.pid for child in children(old.pid)}
    assert pid(first) in before
    if asked:
        old.kill()
        assert isinstance(asked.exception(), OSError | HTTPException)
    else:
        assert "started" in supervisor("restart", "bridge")
    wait_until(lambda: not any(map(alive, before)), "the end of all children")
    wait_until(lambda: [new.pid for new in bridges()] not in ([], [old.pid]), "the restart", 30)
    wait_until(lambda: "RUNNING" in supervisor("status"), "the new one")
    wait_until(lambda: supervisor("tail", "bridge", "stderr").count("listening") == 2, "the new listener")
    answer = client.post(["hello", first.text, "and now"])
    assert (answer.status, answer.session) == (200, "rebuilt; reason=unknown-history")
