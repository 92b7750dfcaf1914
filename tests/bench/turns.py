"""Seconds to the first content byte, the bare CLI against the bridge: `python tests/bench/turns.py [rounds]`.

Each round measures every row once, one after another in one run, in front of the stub API; the table shows medians, the
spread (lowest to highest) and each median as a ratio to the bare CLI's.  Nothing reaches the network.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import conftest  # noqa: E402

import sessions  # noqa: E402
import translate  # noqa: E402

DELTA = b'"content_block_delta"'
REST_SECS = 0.1  # before a hot turn: the CLI's `result` comes 20 ms after its answer, and a client takes a moment


class BareCli:
    """The CLI as a program that drives it by itself would start it."""

    def __init__(self, config: sessions.PoolConfig, cwd: str) -> None:
        command = sessions.arguments(config, "sonnet")
        environ = sessions.child_environment(config, os.environ)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=environ, cwd=cwd, **pipes)
        self.write(translate.initialize_line("initialize", ["Be terse."]))

    def write(self, line: bytes) -> None:
        assert self.process.stdin
        self.process.stdin.write(line)
        self.process.stdin.flush()

    def ask(self, text: str) -> None:
        """Send a user line and read up to the first delta."""
        self.write(translate.user_line([{"type": "text", "text": text}]))
        self.read_until(DELTA)

    def read_until(self, mark: bytes) -> None:
        assert self.process.stdout
        while mark not in (line := self.process.stdout.readline()):
            assert line, "the CLI ended"

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()


def first_delta(client: conftest.Client, messages: list[Any]) -> tuple[float, str, str]:
    """Stream one answer: seconds to its first delta, its text, and what x-bridge-session said."""
    body = json.dumps(conftest.request_body(messages, stream=True, system="Be terse.")).encode()
    head = f"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    with socket.create_connection((client.host, client.port)) as connection:
        began = time.perf_counter()
        connection.sendall(head.encode() + body)
        data = b""
        while DELTA not in data:
            data += connection.recv(65536)
        took = time.perf_counter() - began
        while chunk := connection.recv(65536):
            data += chunk
    lines = [line[6:] for line in data.split(b"\n") if line.startswith(b"data: ") and DELTA in line]
    pieces = [json.loads(line)["delta"]["text"] for line in lines]
    session = next(line.split(b": ")[1].decode().strip() for line in data.split(b"\r\n") if b"x-bridge-session" in line)
    return took, "".join(pieces), session


def history(length: int) -> list[str]:
    """A conversation that no process holds, of `length` messages before the new one."""
    mark = uuid.uuid4().hex
    return [f"message {number} of {mark}" for number in range(length)] + ["SAY on"]


def one_round(server: conftest.Server, config: sessions.PoolConfig, cwd: str) -> Iterator[tuple[str, float]]:
    began = time.perf_counter()
    bare = BareCli(config, cwd)
    bare.ask("SAY hello")
    yield "bare CLI, spawn to first delta", time.perf_counter() - began
    bare.read_until(b'"type":"result"')
    time.sleep(REST_SECS)
    began = time.perf_counter()
    bare.ask("SAY more")
    yield "bare CLI, hot turn", time.perf_counter() - began
    bare.close()
    first = f"SAY {uuid.uuid4().hex}"
    took, text, session = first_delta(server, [first])
    assert session == "new"
    yield "bridge, new conversation", took
    time.sleep(REST_SECS)
    took, _, session = first_delta(server, [first, text, "SAY more"])
    assert session == "hot"
    yield "bridge, hot turn", took
    for length in (20, 200):
        took, _, session = first_delta(server, history(length))
        assert session.startswith("rebuilt")
        yield f"bridge, rebuilt with {length} messages", took


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    cli = conftest.bundled_cli() or sys.exit("the extra `cli` is not installed")
    version = subprocess.run([cli, "--version"], capture_output=True, text=True, check=True).stdout.split()[0]
    conftest.isolate()
    measured: dict[str, list[float]] = {}
    with conftest.Stub() as stub, tempfile.TemporaryDirectory() as home:
        os.environ |= {"HOME": home, "ANTHROPIC_BASE_URL": stub.url, "ANTHROPIC_API_KEY": "sk-stub"}
        os.environ |= {"DISABLE_TELEMETRY": "1", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}
        config = conftest.Config(bin=str(cli), listen_addr="127.0.0.1:0", keep_env=conftest.KEEP)
        with conftest.Server(config=config) as server:
            for number in range(rounds + 1):
                for name, seconds in one_round(server, config, home):
                    if number:  # the first round warms the page cache
                        measured.setdefault(name, []).append(seconds)
    print(f"{rounds} rounds, CLI {version}, {os.cpu_count()} cores, Python {sys.version.split()[0]}")
    print("| measure | median ms | spread ms | ratio |\n|---|---|---|---|")
    for name, values in measured.items():
        base = "bare CLI, hot turn" if name.endswith("hot turn") else "bare CLI, spawn to first delta"
        ratio = statistics.median(values) / statistics.median(measured[base])
        spread = f"{min(values) * 1000:.0f}-{max(values) * 1000:.0f}"
        print(f"| {name} | {statistics.median(values) * 1000:.0f} | {spread} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
