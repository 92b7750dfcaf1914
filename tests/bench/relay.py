"""What the bridge adds to a token: its relay against a plain copy, many clients against one, delays
at a steady pace.

`copy` is the 30-line program that users might write instead: the same bytes from pipe to socket,
without a look.
"""

import asyncio
import json
import os
import selectors
import socket
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from program import Program, request

FEEDER = str(Path(__file__).resolve().parent / "feeder.py")
EVENTS = 50_000
MANY = 100
EACH = 20_000  # events for each of many clients
AT_PACE, SECS, PACE = 100, 4, 100  # conversations at a steady pace: seconds, deltas a second


def ask(
    program: Program,
    requests: list[bytes],
    seen: Callable[[bytes], None] = lambda data: None,
    every: float = 0,
) -> float:
    """Send all requests, one `every` so many seconds, and read every answer to its end; `seen` gets
    what is read.  Returns the seconds from the first byte of an answer on."""
    waiting = selectors.DefaultSelector()
    unsent, due, began = list(requests), time.perf_counter(), 0.0
    while unsent or waiting.get_map():
        while unsent and time.perf_counter() >= due:
            client = program.connect()
            client.sendall(unsent.pop())
            waiting.register(client, selectors.EVENT_READ, [b""])
            due += every
        for key, _ in waiting.select(every or None):
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
    """Begin conversations, so that their processes are there, and return the requests that go on in
    them."""
    firsts = [f"FEED 1 {uuid.uuid4()}" for _ in range(count)]
    for at in range(0, count, 10):
        ask(program, [request([first]) for first in firsts[at : at + 10]])
    return [request([first, "word", text]) for first in firsts]


def lateness(program: Program, clients: int, seconds: int, pace: int) -> list[float]:
    """Milliseconds between the writing of a delta by its child and its arrival at its client, for
    all deltas."""
    late: list[float] = []

    def seen(data: bytes) -> None:
        now = time.monotonic_ns()
        for piece in data.split(b'"text_delta","text":"')[1:]:
            late.append((now - int(piece[: piece.index(b'"')])) / 1e6)

    ask(
        program, conversations(program, clients, f"PACE {seconds * pace} {pace}"), seen, 1 / clients
    )
    return sorted(late)


async def copy() -> None:
    """The plain copy: a child for each connection, its stdout to the socket."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        text = json.loads(await reader.readexactly(size))["messages"][0]["content"]
        pipe = asyncio.subprocess.PIPE
        child = await asyncio.create_subprocess_exec(FEEDER, stdin=pipe, stdout=pipe)
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


def measure(rounds: int) -> dict[str, list[float]]:
    limits = {
        "CLAUDE_CLI_BIN": FEEDER,
        "CLAUDE_CLI_MAX_SESSIONS": "2000",
        "CLAUDE_CLI_MAX_IDLE": "250",
    }
    plain, bridge = Program(str(Path(__file__).resolve())), Program(**limits, CLAUDE_CLI_SPARES="0")
    measured: dict[str, list[float]] = {
        name: [] for name in ("copy", "relay", "many", "cpu", "late", "late 99")
    }
    try:
        for _ in range(rounds):
            measured["copy"].append(EVENTS / ask(plain, [request([f"FEED {EVENTS}"])]))
            one, many = (
                conversations(bridge, 1, f"FEED {EVENTS}"),
                conversations(bridge, MANY, f"FEED {EACH}"),
            )
            cpu = bridge.cpu()
            measured["relay"].append(EVENTS / ask(bridge, one))
            measured["cpu"].append((bridge.cpu() - cpu) * 1e6 / EVENTS)
            measured["many"].append(MANY * EACH / ask(bridge, many))
            late = lateness(bridge, AT_PACE, SECS, PACE)
            measured["late"].append(late[len(late) // 2])
            measured["late 99"].append(late[len(late) * 99 // 100])
    finally:
        plain.close()
        bridge.close()
    return measured


if __name__ == "__main__":
    sys.exit(asyncio.run(copy()))
