"""Seconds to the first content byte: the bare CLI, the bridge, and `query()` of the claude-agent-sdk once per request.

Each round measures every one of them, one after another, in front of the stub API.
"""

import asyncio
import os
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from program import Program, request

import sessions
import translate

DELTA = b'"content_block_delta"'
REST_SECS = 0.3  # between hot turns: a client takes a moment
SYSTEM = "Be terse."


class BareCli:
    """The CLI as a program that drives it by itself would start it."""

    def __init__(self, config: sessions.PoolConfig, cwd: str) -> None:
        command = sessions.arguments(config, "sonnet")
        environ = sessions.child_environment(config, os.environ)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=environ, cwd=cwd, **pipes)
        self.write(translate.initialize_line([SYSTEM], []))

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


def first_delta(bridge: Program, messages: list[str], expected: bytes) -> tuple[float, str]:
    """Stream one answer: seconds to its first delta, and its text."""
    with bridge.connect() as connection:
        began = time.perf_counter()
        connection.sendall(request(messages, system=SYSTEM))
        data = b""
        while DELTA not in data:
            data += connection.recv(65536)
        took = time.perf_counter() - began
        while b'"message_stop"' not in data:
            data += connection.recv(65536)
    assert b"x-bridge-session: " + expected in data, data[:500]
    pieces = data.split(b'"text_delta","text":"')[1:]
    return took, b"".join(piece[: piece.index(b'"')] for piece in pieces).decode()


def history(length: int) -> list[str]:
    """A conversation that no process holds, of `length` messages before the new one."""
    mark = uuid.uuid4().hex
    return [f"message {number} of {mark}" for number in range(length)] + ["SAY on"]


async def query(cli: str, cwd: str, messages: list[str]) -> float:
    """What a Python user would write: the conversation as one prompt."""
    from claude_agent_sdk import ClaudeAgentOptions, StreamEvent
    from claude_agent_sdk import query as sdk_query

    options = ClaudeAgentOptions(
        cli_path=cli,
        cwd=cwd,
        model="sonnet",
        system_prompt=SYSTEM,
        tools=[],
        setting_sources=[],
        include_partial_messages=True,
    )
    began, took = time.perf_counter(), 0.0
    async for message in sdk_query(prompt="\n\n".join(messages), options=options):
        if not took and isinstance(message, StreamEvent) and message.event["type"] == "content_block_delta":
            took = time.perf_counter() - began
    return took


def one_round(bridge: Program, config: sessions.PoolConfig, cwd: str) -> Iterator[tuple[str, float]]:
    """Name and seconds of each measure."""
    bridge.rest()
    began = time.perf_counter()
    bare = BareCli(config, cwd)
    bare.ask("SAY hello")
    yield "bare new", time.perf_counter() - began
    bare.read_until(b'"type":"result"')
    bridge.rest()
    talk = [f"SAY {uuid.uuid4().hex}"]
    took, text = first_delta(bridge, talk, b"new")
    yield "bridge new", took
    bridge.rest()
    for number in range(5):
        time.sleep(REST_SECS)
        began = time.perf_counter()
        bare.ask(f"SAY {number}")
        yield "bare hot", time.perf_counter() - began
        bare.read_until(b'"type":"result"')
        talk += [text, f"SAY {number}"]
        time.sleep(REST_SECS)
        took, text = first_delta(bridge, talk, b"hot")
        yield "bridge hot", took
    bare.close()
    for length in (20, 200):
        bridge.rest()
        yield f"bridge {length}", first_delta(bridge, history(length), b"rebuilt")[0]
    bridge.rest()
    yield "query new", asyncio.run(query(config.bin, cwd, ["SAY hello"]))
    yield "query 20", asyncio.run(query(config.bin, cwd, history(20)))
    yield "query 200", asyncio.run(query(config.bin, cwd, history(200)))


def measure(rounds: int, cli: Path, home: str, keep: tuple[str, ...]) -> dict[str, list[float]]:
    measured: dict[str, list[float]] = {}
    config = sessions.PoolConfig(bin=str(cli), keep_env=keep)
    bridge = Program(CLAUDE_CLI_BIN=str(cli), CLAUDE_CLI_KEEP_ENV=",".join(keep))
    try:
        for number in range(rounds + 1):
            for name, seconds in one_round(bridge, config, home):
                if number:  # the first round warms the page cache
                    measured.setdefault(name, []).append(seconds)
    finally:
        bridge.close()
    return measured
