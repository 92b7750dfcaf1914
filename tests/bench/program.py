"""What the benchmarks share: servers in processes of their own, requests, and the table."""

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]


class Program:
    """A server in a process of its own: the bridge, or what it is compared with."""

    def __init__(self, *command: str, **settings: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        environ = {**os.environ, "CLAUDE_CLI_LISTEN_ADDR": f"127.0.0.1:{self.port}", **settings}
        command = command or (str(ROOT / "bridge.py"),)
        began = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, *command], env=environ, stderr=subprocess.DEVNULL
        )
        self.psutil = psutil.Process(self.process.pid)
        while True:
            try:
                self.connect().close()
                break
            except ConnectionRefusedError:
                assert self.process.poll() is None, "the server did not start"
                time.sleep(0.001)
        self.seconds_to_listen = time.perf_counter() - began

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port))

    def cpu(self) -> float:
        """Seconds of CPU, those of its children left out."""
        times = self.psutil.cpu_times()
        return float(times.user + times.system)

    def rest(self) -> None:
        """Wait until its children have nothing to do: the spare is ready, the last turn is over."""
        before, quiet = -1.0, 0
        while quiet < 3:
            time.sleep(0.1)
            times = [child.cpu_times() for child in self.psutil.children() if child.is_running()]
            now = sum(item.user + item.system for item in times)
            quiet = quiet + 1 if now == before else 0
            before = now

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def request(messages: list[str], **fields: Any) -> bytes:
    """A streaming request; user and assistant speak in turn."""
    talk = [
        {"role": ("user", "assistant")[n % 2], "content": message}
        for n, message in enumerate(messages)
    ]
    body = {"model": "sonnet", "max_tokens": 1024, "stream": True, "messages": talk, **fields}
    data = json.dumps(body).encode()
    return b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n%b" % (
        len(data),
        data,
    )


def spread(values: list[float], digits: int) -> str:
    """The median, and the lowest and highest value."""
    middle, *ends = (
        f"{value:,.{digits}f}" for value in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} ({' to '.join(ends)})"
