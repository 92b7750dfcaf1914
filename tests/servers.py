"""The bridge, in a thread of this process or as a program."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import first_party
import psutil
import pytest
from client import Client
from host import ROOT, STANDIN, children, wait_until

from bridge import Bridge, Config
from bridge import serve as serve_bridge

# The program, as the installed command starts it: Python compiles a script anew at each start.
START = f"import sys; sys.path[0] = {str(ROOT)!r}; import bridge; bridge.main()"
BRIDGE = [sys.executable, "-c", START]
ADDRESS = "CLAUDE_CLI_LISTEN_ADDR"
# The CLI's JavaScript engine without helper threads and without its optimizing compiler: a process
# of a test lives for a second, beside others.  It then takes a third less processor time.
ENGINE = {
    "BUN_JSC_numberOfGCMarkers": "1",
    "BUN_JSC_useConcurrentGC": "0",
    "BUN_JSC_useConcurrentJIT": "0",
    "BUN_JSC_useDFGJIT": "0",
}
# What the CLI gets of the tests' environment.
KEEP = ("ANTHROPIC_API_KEY", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", *ENGINE)
if not first_party.IS_ON:
    KEEP = ("ANTHROPIC_BASE_URL", *KEEP)


OPT_OUTS = ("DISABLE_TELEMETRY", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC")
if first_party.IS_ON:
    OPT_OUTS = ()


def make_nobody(patch: pytest.MonkeyPatch, home: Path, api_url: str) -> None:
    """Make this process that of a user with an empty home, nobody's account and another API."""
    for name in list(os.environ):
        if name.startswith(("ANTHROPIC_", "CLAUDE", "OTEL_")):
            patch.delenv(name)
    patch.setenv("HOME", str(home))
    # The stand-in runs on the Python under test, and not behind a version manager's slow shim.
    patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    patch.setenv("DISABLE_AUTOUPDATER", "1")
    for name in OPT_OUTS:
        patch.setenv(name, "1")
    patch.setenv("ANTHROPIC_BASE_URL", api_url)
    patch.setenv("ANTHROPIC_API_KEY", "sk-stub")


def kept_names(environ: Mapping[str, str] = os.environ) -> list[str]:
    """What a bridge that is a program passes on to its CLI: KEEP, and what the stand-in reads."""
    return [*KEEP, *(name for name in environ if name.startswith("STANDIN"))]


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


@dataclass
class Program(Client):
    """The bridge as a user starts it: a process with arguments and an environment."""

    process: subprocess.Popen[str] = field(kw_only=True)
    lines: list[str] = field(default_factory=list)  # what it printed on stderr

    def wait(self) -> int:
        return self.process.wait(30)

    def children(self) -> list[psutil.Process]:
        """Its children that run a program of their own: one that was forked just now still is the
        bridge itself, with the bridge's arguments and environment."""
        found = []
        for child in children(self.process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                bridge = psutil.Process(self.process.pid)
                if child.cmdline() != bridge.cmdline():
                    found.append(child)
        return found


def plain_cli(path: Path, lines: str) -> Path:
    """A program in place of the CLI, whose version is a good one."""
    path.write_text(
        f'#!/bin/bash\n[ "$1" = --version ] && echo 2.1.260 && exit\nSTANDIN={STANDIN}\n{lines}\n'
    )
    path.chmod(0o755)
    return path


def is_up(program: Program) -> bool:
    """Whether it answers."""
    try:
        return program.call("GET", "/healthz").status == 200
    except OSError:
        return False


def activate(listener: socket.socket, *program: str) -> subprocess.Popen[str]:
    """Start the bridge as systemd does: the socket is file descriptor 3."""
    code = "import os, sys; os.dup2(int(sys.argv[1]), 3)"
    code += "; os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()))"
    code += "; os.execv(sys.argv[2], sys.argv[2:])"
    program = program or (*BRIDGE,)
    environ = {
        **os.environ,
        "CLAUDE_CLI_BIN": str(STANDIN),
        "CLAUDE_CLI_KEEP_ENV": ",".join(kept_names()),
    }
    command = [sys.executable, "-c", code, str(listener.fileno()), *program]
    return subprocess.Popen(
        command, env=environ, stderr=subprocess.PIPE, text=True, pass_fds=[listener.fileno()]
    )


Serve = Callable[..., Server]
Launch = Callable[..., Program]
both = pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
linux = pytest.mark.skipif(sys.platform != "linux", reason="of Linux")


def run(*arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    """Run the program to its end."""
    variables = {**os.environ, **environ}
    command = [*BRIDGE, *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


def refusal(*words: str, **environ: str) -> str:
    """The one line of a program that does not start."""
    done = run(*words, CLAUDE_CLI_BIN=environ.pop("CLAUDE_CLI_BIN", str(STANDIN)), **environ)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    return line.removeprefix("claude-cli-bridge: ")


def printed(program: Program, words: str) -> None:
    """Wait until the program has printed these words."""
    wait_until(
        lambda: any(words in line for line in program.lines),
        f"a line with {words!r}: {program.lines}",
    )


def refuses(program: Program) -> bool:
    """Whether it takes no more connections."""
    try:
        program.connect().close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:  # at the very moment
        return False
    return False
