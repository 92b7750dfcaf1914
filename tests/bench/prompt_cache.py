"""How much of a request the API's prompt cache could read again: at the bridge, and with `query()`
of the claude-agent-sdk once per request.

The requests are those that reach the stub API.  The cache compares them in the order tools, system
prompt, messages, block by block: a block that has grown is another one.  So the share is the longest
row of blocks with which an earlier request began as well, in bytes, of all bytes of these parts;
breakpoints and metadata are no part of what is compared.
"""

import asyncio
import contextlib
import itertools
import json
import uuid
from collections.abc import Iterator
from typing import Any

from program import Program, request
from user import User

Json = dict[str, Any]
MODEL = "claude-sonnet-5-5"
SYSTEM = "You help with a program. " * 200  # 5 KB
TOOLS: list[Json] = [
    {
        "name": f"tool_{number}",
        "description": "It helps with the program. " * 15,
        "input_schema": {"type": "object", "properties": {"path": {"type": "string"}}},
    }
    for number in range(10)
]
PAIRS = 10  # questions and answers of the history
QUESTION = "please look at the next part of it, " * 5
KINDS = ("new", "hot", "rebuilt", "forked")


def blocks(body: Json) -> list[bytes]:
    """The parts of a request that the cache compares."""
    found: list[Any] = [["tool", tool] for tool in body.get("tools") or []]
    found += [["system", block] for block in as_list(body.get("system"))]
    for message in body["messages"]:
        found += [[message["role"], block] for block in as_list(message["content"])]
    return [json.dumps(unmarked(part), ensure_ascii=False).encode() for part in found]


def as_list(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content or []


def unmarked(value: Any) -> Any:
    """A value without breakpoints."""
    if isinstance(value, dict):
        return {key: unmarked(inner) for key, inner in value.items() if key != "cache_control"}
    return [unmarked(inner) for inner in value] if isinstance(value, list) else value


def share(body: Json, earlier: list[Json]) -> float:
    """The share of a request that one of the earlier ones began with."""
    new = blocks(body)
    read = 0
    for other in earlier:
        pairs = zip(new, blocks(other), strict=False)
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
        read = max(read, sum(len(block) for block, _ in same))
    return read / sum(map(len, new))


class Bridge:
    """A client of the bridge."""

    def __init__(self, user: User) -> None:
        self.user = user
        self.start()

    def start(self) -> None:
        keep = ",".join(self.user.config.keep_env)
        self.program = Program(CLAUDE_CLI_BIN=self.user.config.bin, CLAUDE_CLI_KEEP_ENV=keep)

    def ask(self, messages: list[str]) -> None:
        with self.program.connect() as connection:
            connection.sendall(request(messages, system=SYSTEM, tools=TOOLS, model=MODEL))
            data = b""
            while b'"message_stop"' not in data:
                part = connection.recv(65536)
                assert part, data[-500:]
                data += part

    def restart(self) -> None:
        self.close()
        self.start()

    def close(self) -> None:
        self.program.close()


class Queries:
    """A Python user who asks with `query()`, the conversation as one prompt in prose."""

    def __init__(self, user: User) -> None:
        self.user = user

    def ask(self, messages: list[str]) -> None:
        asyncio.run(self.query("\n\n".join(messages)))

    async def query(self, prompt: str) -> None:
        from claude_agent_sdk import (
            ClaudeAgentOptions,
            SdkMcpTool,
            create_sdk_mcp_server,
            query,
        )

        async def call(arguments: Any) -> Json:
            return {"content": []}

        tools = [
            SdkMcpTool(tool["name"], tool["description"], tool["input_schema"], call)
            for tool in TOOLS
        ]
        options = ClaudeAgentOptions(
            cli_path=self.user.config.bin,
            cwd=self.user.home,
            model=MODEL,
            system_prompt=SYSTEM,
            tools=[],
            mcp_servers={"client": create_sdk_mcp_server("client", tools=tools)},
            setting_sources=[],
        )
        async for _ in query(prompt=prompt, options=options):
            pass

    def restart(self) -> None:
        """Nothing of it outlives a request."""

    def close(self) -> None:
        pass


def conversation() -> list[str]:
    """A history that nobody has asked about yet."""
    mark = uuid.uuid4().hex
    talk = []
    for number in range(PAIRS):
        talk += [f"{QUESTION}{number} of {mark}", "It is done like this. " * 20]
    return talk


def shares(side: Bridge | Queries, user: User) -> Iterator[tuple[str, float]]:
    """For each kind of request, the share that an earlier one of this side began with."""
    bodies: list[Json] = []
    seen = len(user.stub.log())

    def ask(messages: list[str]) -> float:
        nonlocal seen
        side.ask(messages)
        rows = user.stub.log(seen)
        seen += len(rows)
        found = [row["body"] for row in rows if row["path"].split("?")[0] == "/v1/messages"]
        read = share(found[0], bodies)
        bodies.extend(found)
        return read

    ask([QUESTION + uuid.uuid4().hex])
    yield "new", ask([QUESTION + uuid.uuid4().hex])
    talk = conversation()
    ask([*talk, "SAY one"])
    talk += ["SAY one", "one"]
    yield "hot", ask([*talk, "SAY two"])
    yield "forked", ask([*talk, "SAY another"])
    side.restart()
    talk += ["SAY two", "two"]
    yield "rebuilt", ask([*talk, "SAY three"])


def measure(user: User) -> dict[str, float]:
    """By kind; those of `query()` under its name."""
    measured = {}
    with contextlib.closing(Bridge(user)) as bridge:
        for kind, value in shares(bridge, user):
            measured[kind] = value
    for kind, value in shares(Queries(user), user):
        measured[f"query {kind}"] = value
    return measured
