"""One test for each kind of fault that was found by reading: who is who, what the CLI repairs, what a
launcher hands down, what waits."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from host import ROOT, STANDIN, wait_until
from servers import Program, Server, is_up

import bridge
from bridge import Config

Serve = Callable[..., Server]
linux = pytest.mark.skipif(sys.platform != "linux", reason="of Linux")


# ---------------------------------------------------------------- what a launcher hands down


@linux
def test_signals_and_limits_that_a_launcher_has_set_do_no_harm(
    launch: Callable[..., Program],
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


def test_a_socket_of_a_service_manager_that_is_none_is_one_line_and_status_2() -> None:
    command = f'LISTEN_PID=$$ LISTEN_FDS=1 exec "{sys.executable}" "{ROOT}/bridge.py" 3</dev/null'
    environ = {**os.environ, "CLAUDE_CLI_BIN": str(STANDIN)}
    done = subprocess.run(
        ["sh", "-c", command], env=environ, capture_output=True, text=True, check=False
    )
    said = [line for line in done.stderr.splitlines() if "LISTEN_FDS" in line]
    assert (done.returncode, len(said)) == (2, 1)
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- an embedding program


def test_a_config_is_not_changed_and_its_types_are_checked() -> None:
    async def program() -> None:
        config = Config(bin="true", listen_addr="127.0.0.1:0", spares=0)
        async with bridge.serve(config):
            assert config.bin == "true"
        wrong: Any = "4"
        with pytest.raises(bridge.ConfigError, match="CLAUDE_CLI_MAX_IDLE"):
            async with bridge.serve(Config(bin="true", max_idle=wrong)):
                pass

    asyncio.run(program())


# ---------------------------------------------------------------- waiting


def test_another_version_of_http_is_505(serve: Serve) -> None:
    with serve().connect() as client:
        client.sendall(b"GET / HTTP/9.9\r\nhost: localhost\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 505 ")
