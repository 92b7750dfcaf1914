"""The processes of a bridge, as a test sees them, and a pool without a server."""

import asyncio
import contextlib
import http.client
import json
import os
import socket
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import psutil
from client import Answer, request_body
from host import STANDIN, wait_until
from servers import Program, Server
from stand_in import Log

from sessions import Pool, PoolConfig, Session, State, Turn
from translate import parse_request

HEADER = "x-arch-claude-cli-session"
PROBE = {"name": "probe", "input_schema": {"type": "object"}}
FLOOD = "FLOOD 80000"  # about 20 MB of events
# What a process that died makes of its request.
DIED = {"status": 502, "kind": "claude_cli_error"}


def pid(answer: Answer) -> int:
    """The process that answered."""
    return int(answer.message["id"].split("_")[2])


def alive(number: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    return False


def kill(number: int) -> None:
    """End a process, and wait until the bridge has reaped it."""
    psutil.Process(number).kill()
    wait_until(lambda: not psutil.pid_exists(number), "its end")


def in_work(server: Server, count: int) -> None:
    """Wait until the bridge works on this many requests, those that wait for room included."""
    wait_until(
        lambda: server.bridge and len(server.bridge.answers) == count, f"{count} requests in work"
    )


def talk(
    server: Server, first: str, session: str | None = None, **fields: object
) -> tuple[list[str], Answer]:
    """A first turn.  Returns the conversation with its answer and with a next message."""
    answer = server.post(first, session=session, **fields)
    return [first, answer.text, "and now"], answer


def in_pool(use: Callable[[Pool], Coroutine[Any, Any, None]], **settings: Any) -> None:
    """Run a program of one pool."""

    async def program() -> None:
        config = PoolConfig(**{"bin": str(STANDIN), "spares": 0, "queue_secs": 3, **settings})
        async with Pool(config, dict(os.environ)) as pool:
            await use(pool)

    asyncio.run(program())


async def take_turn(pool: Pool, *texts: str, **fields: Any) -> tuple[Turn, str]:
    """A turn, and its answer."""
    request = parse_request(json.dumps(request_body(list(texts), **fields)).encode())
    async with pool.turn(request, None) as turn:
        async for _ in turn.relay():
            pass
    return turn, "".join(block["text"] for block in turn.translator.message["content"])


def open_gate(gate: Path) -> None:
    gate.touch()


async def soon(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - it has no event of its own
            await asyncio.sleep(0)


def reaped(pid: int) -> bool:
    return pid > 0 and not psutil.pid_exists(pid)


def fall_silent(server: Server, number: int) -> None:
    """Let the watchdog's time pass for a process, again and again until it is ended: what was on
    its way meanwhile is a sign of life."""
    session = session_of(server, number)

    def is_ended() -> bool:
        session.process._alive_at -= server.config.watchdog_secs
        return session.state is State.RETIRED

    wait_until(is_ended, "the watchdog")


def check_failure(answer: Answer, *, begun: bool, status: int, kind: str, words: str) -> None:
    """An error answer; in mid stream one error event, at the end, and no message_stop."""
    if begun:
        kinds = [event["type"] for event in answer.events]
        assert answer.status == 200
        assert kinds[0] == "message_start"
        assert kinds.index("error") == len(kinds) - 1
        assert "message_stop" not in kinds
        body = answer.events[-1]
    else:
        assert answer.status == status
        assert answer.headers["content-type"] == "application/json"
        body = answer.json
    assert body["error"]["type"] == kind
    assert words in body["error"]["message"]
    assert body["request_id"] == answer.headers["request-id"]


def send(server: Server | Program, messages: object, **fields: object) -> socket.socket:
    """Send a request by hand, so that the test decides what is read and when the client leaves."""
    client = socket.socket()
    # Small, but not less than segments of loopback.
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)
    client.settimeout(30)
    client.connect((server.host, server.port))
    body = json.dumps(request_body(messages, **fields)).encode()
    client.sendall(
        b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        b"content-length: %d\r\n\r\n%b" % (len(body), body)
    )
    return client


def read_all(client: socket.socket) -> Answer:
    response = http.client.HTTPResponse(client)
    response.begin()
    return Answer(
        response.status,
        {name.lower(): value for name, value in response.getheaders()},
        response.read(),
    )


def written(pid: int) -> int:
    return psutil.Process(pid).io_counters().write_chars


def is_held_up(log: Log, text: str) -> bool:
    """Whether the process of this turn got to write 1 MiB and then no more for a while."""
    pid = log.got(text)
    if not pid or written(pid) < 1 << 20:
        return False
    before = written(pid)
    time.sleep(0.2)
    return written(pid) == before


def session_of(server: Server, number: int) -> Session:
    """The session of a process."""
    assert server.bridge
    return next(one for one in list(server.bridge.pool.room.sessions) if one.process.pid == number)


def check_own(answer: Answer, text: str, *, stream: bool) -> None:
    """The answer is the request's own, and whole."""
    assert (answer.status, answer.text) == (200, text)
    assert answer.message["stop_reason"] == "end_turn"
    assert "unasked" not in answer.body.decode()
    assert not stream or answer.events[-1] == {"type": "message_stop"}


def pool_of(server: Server) -> Pool:
    assert server.bridge
    return server.bridge.pool
