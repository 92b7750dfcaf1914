"""Seconds to the first content byte: the bare CLI, bridges with and without a spare, and `query()`
of the claude-agent-sdk once per request.

Each round measures every one of them, one after another, in front of the stub API.
"""

import asyncio
import contextlib
import http.client
import json
import os
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import urlsplit

from program import Program, request
from user import User

import sessions
import translate

DELTA = b'"content_block_delta"'
REST_SECS = 0.3  # between hot turns: a client takes a moment
SYSTEM = "Be terse."
LENGTHS = (20, 200, 1000)  # messages of the history that is rebuilt
MODELS = ("opus", "sonnet", "haiku")
LARGE, SMALL = "opus", "haiku"
DELAYS = (0.0, 0.5, 1.0)  # seconds after the start of a bridge
HOT_TURNS = 5
TITLES = 10
COUNTS = 24  # Claude Code asks about that many questions for /context


class Bench:
    """What is measured: the CLI, and two bridges in front of it."""

    def __init__(self, user: User) -> None:
        self.user = user
        self.config = user.config
        self.cwd = user.home
        self.spare = self.start()  # as it is by default: with a spare
        self.bare = self.start(CLAUDE_CLI_SPARES="0")

    def start(self, **settings: str) -> Program:
        settings["CLAUDE_CLI_BIN"] = self.config.bin
        settings["CLAUDE_CLI_KEEP_ENV"] = ",".join(self.config.keep_env)
        settings["CLAUDE_CLI_QUEUE_SECS"] = "300"  # none is refused, however slow the machine is
        return Program(**settings)

    def rest(self) -> None:
        """Wait until both bridges have nothing to do."""
        self.spare.rest()
        self.bare.rest()

    def close(self) -> None:
        self.spare.close()
        self.bare.close()


class BareCli:
    """The CLI as a program that drives it by itself would start it."""

    def __init__(self, config: sessions.PoolConfig, cwd: str) -> None:
        kind = sessions.Kind("sonnet")
        command = sessions.arguments(config, kind, "")
        environ = sessions.child_environment(config, os.environ, kind)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=environ, cwd=cwd, **pipes)
        self.write(translate.initialize_line([SYSTEM], has_tools=False))

    def write(self, line: bytes) -> None:
        assert self.process.stdin
        self.process.stdin.write(line)
        self.process.stdin.flush()

    def ask(self, text: str) -> None:
        """Send a user line and read up to the first delta."""
        self.write(translate.user_line([{"type": "text", "text": text}], str(uuid.uuid4())))
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


@dataclass
class Streamed:
    """An answer that was streamed."""

    seconds: float  # to its first delta
    text: str
    session: str  # hot, new or rebuilt


def stream(bridge: Program, messages: list[str], model: str = "sonnet") -> Streamed:
    with bridge.connect() as connection:
        began = time.perf_counter()
        connection.sendall(request(messages, system=SYSTEM, model=model))
        data = b""
        while DELTA not in data:
            part = connection.recv(65536)
            assert part, data[:500]
            data += part
        took = time.perf_counter() - began
        while b'"message_stop"' not in data:
            part = connection.recv(65536)
            assert part, data[-500:]
            data += part
    session = data.partition(b"x-bridge-session: ")[2].partition(b"\r\n")[0]
    pieces = data.split(b'"text_delta","text":"')[1:]
    text = b"".join(piece[: piece.index(b'"')] for piece in pieces).decode()
    return Streamed(took, text, session.partition(b";")[0].decode())


def first_delta(
    bridge: Program, messages: list[str], expected: str, model: str = "sonnet"
) -> Streamed:
    answer = stream(bridge, messages, model)
    assert answer.session == expected, f"{answer.session}, expected {expected}"
    return answer


def question() -> list[str]:
    """A conversation that begins."""
    return [f"SAY {uuid.uuid4().hex}"]


def history(length: int) -> list[str]:
    """A conversation that no process holds, of `length` messages before the new one."""
    mark = uuid.uuid4().hex
    return [f"message {number} of {mark}" for number in range(length)] + ["SAY on"]


async def query(cli: str, cwd: str, messages: list[str]) -> float:
    """What a Python user would write: the conversation as one prompt, in prose."""
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
        if took or not isinstance(message, StreamEvent):
            continue
        if message.event["type"] == "content_block_delta":
            took = time.perf_counter() - began
    assert took, "no delta came"
    return took


# Each of these yields names of measures and what was measured; all of them make a round.

Measures = Iterator[tuple[str, float]]


def hot_turns(bench: Bench) -> Measures:
    """A conversation begins, and goes on: at the CLI by itself, and at the bridge."""
    bench.spare.rest()
    began = time.perf_counter()
    bare = BareCli(bench.config, bench.cwd)
    bare.ask("SAY hello")
    yield "bare new", time.perf_counter() - began
    bare.read_until(b'"type":"result"')
    bench.spare.rest()
    talk = question()
    answer = first_delta(bench.spare, talk, "new")
    yield "new", answer.seconds
    bench.spare.rest()
    for number in range(HOT_TURNS):
        time.sleep(REST_SECS)
        began = time.perf_counter()
        bare.ask(f"SAY {number}")
        yield "bare hot", time.perf_counter() - began
        bare.read_until(b'"type":"result"')
        talk += [answer.text, f"SAY {number}"]
        time.sleep(REST_SECS)
        answer = first_delta(bench.spare, talk, "hot")
        yield "hot", answer.seconds
    bare.close()
    bench.spare.rest()
    yield "alike", first_delta(bench.spare, question(), "new").seconds


def rebuilds(bench: Bench) -> Measures:
    """Conversations that no process holds, with a spare that is ready and without one."""
    bench.bare.rest()
    yield "new, no spare", first_delta(bench.bare, question(), "new").seconds
    for length in LENGTHS:
        bench.spare.rest()
        yield f"{length}", first_delta(bench.spare, history(length), "rebuilt").seconds
        bench.rest()
        answer = first_delta(bench.bare, history(length), "rebuilt")
        yield f"{length}, no spare", answer.seconds


def models_in_turn(bench: Bench) -> Measures:
    for model in MODELS:
        bench.spare.rest()
        yield f"new {model}", first_delta(bench.spare, question(), "new", model).seconds


def titles(bench: Bench) -> Measures:
    """A large model's conversation with calls of a small one between its turns: how many of its
    turns were hot."""
    bench.spare.rest()
    talk = question()
    answer = first_delta(bench.spare, talk, "new", LARGE)
    hot = 0
    for number in range(TITLES):
        time.sleep(REST_SECS)
        yield "title", first_delta(bench.spare, question(), "new", SMALL).seconds
        time.sleep(REST_SECS)
        talk += [answer.text, f"SAY {number}"]
        answer = stream(bench.spare, talk, LARGE)
        hot += answer.session == "hot"
    yield "titles hot", hot


def first_second(bench: Bench) -> Measures:
    """The first request of a bridge, so many seconds after it listens, and a bare CLI that is
    started when the request is sent; each alone."""
    for delay in DELAYS:
        bench.rest()
        bridge = bench.start()
        try:
            time.sleep(delay)
            yield f"first after {delay:g}", first_delta(bridge, question(), "new").seconds
        finally:
            bridge.close()
        bench.rest()
        began = time.perf_counter()
        bare = BareCli(bench.config, bench.cwd)
        bare.ask("SAY hello")
        yield f"bare after {delay:g}", time.perf_counter() - began
        bare.close()


def counts(bench: Bench) -> Measures:
    """Counts of tokens at once, as of a /context: by the bridge, and straight by the stub API."""
    bench.rest()
    stub = urlsplit(os.environ["ANTHROPIC_BASE_URL"]).port
    yield "counts", seconds_of_counts(bench.spare.port)
    yield "stub counts", seconds_of_counts(stub or 0)


def seconds_of_counts(port: int) -> float:
    mark = uuid.uuid4().hex
    with ThreadPoolExecutor(COUNTS) as executor:
        began = time.perf_counter()
        list(executor.map(lambda number: count(port, f"tool_{number}_{mark}"), range(COUNTS)))
        return time.perf_counter() - began


def count(port: int, name: str) -> None:
    """Ask for the tokens of a tool of that name."""
    tool = {"name": name, "description": "It helps.", "input_schema": {"type": "object"}}
    messages = [{"role": "user", "content": "x"}]
    body = {"model": "sonnet", "messages": messages, "tools": [tool]}
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/v1/messages/count_tokens", json.dumps(body))
    answer = json.loads(connection.getresponse().read())
    connection.close()
    assert answer.get("input_tokens"), answer


def queries(bench: Bench) -> Measures:
    bench.rest()
    yield "query new", asyncio.run(query(bench.config.bin, bench.cwd, ["SAY hello"]))
    for length in (20, 200):
        messages = history(length)
        yield f"query {length}", asyncio.run(query(bench.config.bin, bench.cwd, messages))


PARTS = (hot_turns, rebuilds, models_in_turn, titles, first_second, counts, queries)
Part = Callable[[Bench], Measures]


def measure(rounds: int, user: User, parts: tuple[Part, ...] = PARTS) -> dict[str, list[float]]:
    measured: dict[str, list[float]] = {}
    with contextlib.closing(Bench(user)) as bench:
        for number in range(rounds + 1):
            for part in parts:
                for name, value in part(bench):
                    if number:  # the first round warms the page cache
                        measured.setdefault(name, []).append(value)
    return measured
