"""What the bridge adds to a token: its relay against a plain copy, one client against many, delays at a steady pace.

`copy` is the 30-line program that users might write instead: the same bytes from pipe to socket, without a look.
"""

import asyncio
import json
import os
import selectors
import socket
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil

HERE = Path(__file__).parent
FEEDER = HERE / "feeder.py"
ROOT = HERE.parents[1]
EVENTS = 50_000


class Program:
    """A server in a process of its own: the bridge, or the plain copy."""

    def __init__(self, *command: str, **settings: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        environ = {**os.environ, "CLAUDE_CLI_BIN": str(FEEDER), "CLAUDE_CLI_LISTEN_ADDR": f"127.0.0.1:{self.port}"}
        environ |= {"CLAUDE_CLI_MAX_SESSIONS": "400", "CLAUDE_CLI_MAX_IDLE": "400", **settings}
        command = command or (str(ROOT / "bridge.py"),)
        self.process = subprocess.Popen([sys.executable, *command], env=environ, stderr=subprocess.DEVNULL)
        self.psutil = psutil.Process(self.process.pid)
        while True:
            try:
                self.connect().close()
                return
            except ConnectionRefusedError:
                time.sleep(0.01)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port))

    def cpu(self) -> float:
        """Seconds of CPU, those of its children left out."""
        times = self.psutil.cpu_times()
        return times.user + times.system

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def request(text: str, *past: str) -> bytes:
    """The request that asks for `text`, after `past` and an answer of "word0 " to it."""
    messages = [{"role": "user", "content": text}]
    if past:
        messages = [
            *({"role": "user", "content": p} for p in past),
            {"role": "assistant", "content": "word0"},
            *messages,
        ]
    body = json.dumps({"model": "sonnet", "max_tokens": 9, "stream": True, "messages": messages}).encode()
    return b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


def ask(
    program: Program, requests: list[bytes], seen: Callable[[bytes], None] = lambda data: None, rest: float = 0
) -> float:
    """Send all requests at once, read every answer to its end; `seen` gets what is read.  Returns the seconds from the
    first byte of an answer on."""
    waiting = selectors.DefaultSelector()
    for data in requests:
        client = program.connect()
        client.sendall(data)
        waiting.register(client, selectors.EVENT_READ, [b""])
    began = 0.0
    while waiting.get_map():
        time.sleep(rest)
        for key, _ in waiting.select():
            assert isinstance(key.fileobj, socket.socket)
            data = key.fileobj.recv(1 << 20)
            began = began or time.perf_counter()
            seen(data)
            key.data[0] = (key.data[0] + data[-400:])[-400:]
            if b'"message_stop"' in key.data[0] or not data:
                waiting.unregister(key.fileobj)
                key.fileobj.close()
    return time.perf_counter() - began


def conversations(program: Program, count: int, text: str) -> list[bytes]:
    """Begin conversations, so that their processes are there, and return the requests that go on in them."""
    firsts = [f"FEED 1 {uuid.uuid4()}" for _ in range(count)]
    for at in range(0, count, 10):
        ask(program, [request(first) for first in firsts[at : at + 10]])
    return [request(text, first) for first in firsts]


def lateness(program: Program, clients: int, seconds: int, pace: int) -> list[float]:
    """Milliseconds between the writing of a delta by its child and its arrival at its client, for all deltas."""
    late: list[float] = []

    def seen(data: bytes) -> None:
        now = time.monotonic_ns()
        for piece in data.split(b'"text_delta","text":"')[1:]:
            late.append((now - int(piece[: piece.index(b'"')])) / 1e6)

    ask(program, conversations(program, clients, f"PACE {seconds * pace} {pace}"), seen)
    return late


async def copy() -> None:
    """The plain copy: a child for each connection, its stdout to the socket."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        text = json.loads(await reader.readexactly(size))["messages"][0]["content"]
        child = await asyncio.create_subprocess_exec(
            FEEDER, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert child.stdin
        assert child.stdout
        line = {"type": "user", "message": {"content": [{"type": "text", "text": text}]}}
        child.stdin.write(json.dumps(line).encode() + b"\n")
        while data := await child.stdout.read(65536):
            writer.write(data)
            await writer.drain()
            if b'"result"' in data[-100:]:
                break
        child.stdin.close()
        writer.close()
        await child.wait()

    port = int(os.environ["CLAUDE_CLI_LISTEN_ADDR"].rpartition(":")[2])
    async with await asyncio.start_server(serve, "127.0.0.1", port) as server:
        await server.serve_forever()


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    plain, bridge = Program(__file__, "copy"), Program()
    copied, relayed, cost, many = [], [], [], []
    try:
        for _ in range(rounds):
            copied.append(EVENTS / ask(plain, [request(f"FEED {EVENTS}")]))
            one, hundred = (
                conversations(bridge, 1, f"FEED {EVENTS}"),
                conversations(bridge, 100, f"FEED {EVENTS // 100}"),
            )
            cpu = bridge.cpu()
            relayed.append(EVENTS / ask(bridge, one))
            cost.append((bridge.cpu() - cpu) * 1e6 / EVENTS)
            many.append(EVENTS / ask(bridge, hundred))
        print("copy, events/s", spread(copied, 0))
        print("relay, events/s", spread(relayed, 0))
        print("relay against copy", spread([a / b for a, b in zip(relayed, copied, strict=True)]))
        print("CPU us an event", spread(cost))
        print("100 clients against one", spread([a / b for a, b in zip(many, relayed, strict=True)]))
        late = sorted(lateness(bridge, 200, 5, 100))
        print("late ms, median and 99th", late[len(late) // 2], late[len(late) * 99 // 100], len(late))
    finally:
        plain.close()
        bridge.close()


if __name__ == "__main__":
    if sys.argv[1:] == ["copy"]:
        asyncio.run(copy())
    else:
        main()
