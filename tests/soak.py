"""Many clients that misbehave, for long, while children are killed.

`python tests/soak.py [MINUTES [WARM-UP]]`: 30 minutes after 2, unless it is told otherwise.

The bridge runs as a program with the stand-in as its CLI.  Every complete answer must be that of
the conversation that was sent: it repeats the last text, the number of messages and a digest of all
of them.  At the end the bridge must be at rest with the descriptors, threads and children that it
had after the warm-up, and about the memory that it had after half of the time.  Then it is
restarted while its clients go on: they may be refused, and get no wrong answer.  Exit status 1
when anything is wrong.
"""

import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from typing import IO, Any

import aiohttp
import psutil
from client import assemble
from grammar import check_stream
from host import ROOT, STANDIN, children, isolate
from stand_in import digest

Json = dict[str, Any]
CLIENTS = 50
WARM_UP = 2.0  # minutes
KILL_SECS = 0.5  # between two kills
# Bytes of memory: lost conversations that are remembered (sessions.MAX_PAST), and the allocator.
GROWTH_IN_ALL = 8 << 20
# Bytes of memory in the second half, when as many lost conversations are remembered as ever
# (sessions.MAX_PAST): what an allocator keeps, and some for each answer.  A leak of 1 KiB a request
# is more after 2,048 answers.
GROWTH, GROWTH_PER_ANSWER = 1 << 20, 512
TOOL = {"name": "t", "input_schema": {"type": "object"}}
USER = b'{"role":"user","content":[%b]}'
BODY = b'{"model":"sonnet","max_tokens":9,"messages":[%b]}'
# What a client may send to cost much: each gets an error of its own, and disturbs nobody.
HOSTILE = (
    b"",
    b"[" * 100_000,
    b'{"model":"sonnet","messages":[' + b"9" * 1_000_000 + b"]}",
    BODY % (USER % b",".join([b'{"type":"text","text":""}'] * 50_000)),
    BODY % (USER % (b'{"type":"text","text":"a","x":[' + b"[]," * 600_000 + b"[]]}")),
    BODY % b",".join([USER % b'{"type":"tool_result","tool_use_id":"t"}'] * 5_000),
    b"\xff" * 3_000_000,
)
SETTINGS = {
    "CLAUDE_CLI_SESSION_TTL_SECS": "5",
    "CLAUDE_CLI_MAX_IDLE": "16",
    "CLAUDE_CLI_WATCHDOG_SECS": "60",
}


class Left(Exception):
    """The client went away in mid answer, as it meant to."""


class Load:
    """The clients of one bridge, and what became of their requests."""

    def __init__(self, url: str, bridge: psutil.Process) -> None:
        self.url = url
        self.bridge = bridge
        self.is_restarted = False
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as http:
            killer = asyncio.create_task(self.kill())
            await asyncio.gather(*(Client(self, http).run(end) for _ in range(CLIENTS)))
            killer.cancel()

    async def kill(self) -> None:
        while True:
            await asyncio.sleep(random.uniform(0, 2 * KILL_SECS))
            with contextlib.suppress(psutil.NoSuchProcess):
                victims = [
                    child
                    for child in self.bridge.children()
                    if child.status() != psutil.STATUS_ZOMBIE
                ]
                if victims:
                    random.choice(victims).kill()
                    self.counts["kills"] += 1


class Client:
    """One client with one conversation at a time."""

    def __init__(self, load: Load, http: aiohttp.ClientSession) -> None:
        self.load = load
        self.http = http
        self.fresh()

    def fresh(self) -> None:
        self.messages: list[Json] = []
        self.tools = random.random() < 0.3
        self.pin = str(uuid.uuid4()) if random.random() < 0.25 else ""

    async def run(self, end: float) -> None:
        while time.monotonic() < end:
            try:
                await self.act(random.random())
            except Left:
                self.load.counts["leaves"] += 1
                self.fresh()  # what its process holds by now is not known
            except aiohttp.ClientConnectionError:
                if not self.load.is_restarted:
                    self.load.wrong.append("a connection failed")
                self.load.counts["refused in the restart"] += 1
                self.fresh()
            except Exception as error:  # noqa: BLE001 - each is counted as wrong
                self.load.wrong.append(f"{type(error).__name__}: {error}"[:500])
                self.fresh()
            if len(self.messages) > 12:
                self.fresh()
            await asyncio.sleep(random.expovariate(4))

    async def act(self, chance: float) -> None:
        asked = self.messages[:-1]  # the last request, its answer not included
        if chance < 0.02:
            await self.attack(random.choice(HOSTILE))
        elif chance < 0.10 and asked:
            self.load.counts["retries"] += 1
            await self.ask(asked)
        elif chance < 0.16 and asked and not (self.pin and len(asked) == 1):
            self.load.counts["twins"] += 1  # the same request twice at once
            await asyncio.gather(self.ask(asked), self.ask(asked))
        elif chance < 0.24 and asked:
            self.load.counts["edits"] += 1
            edited = [*asked[:-1], self.user("instead")]
            if not any(block["type"] == "tool_result" for block in asked[-1]["content"]):
                await self.ask(edited)
        elif chance < 0.32 and len(self.messages) > 2:
            self.load.counts["forks"] += 1
            texts = [
                n
                for n, m in enumerate(self.messages)
                if m["content"][0]["type"] == "text" and not n % 2
            ]
            await self.ask([*self.messages[: random.choice(texts)], self.user("forked")])
        elif chance < 0.40:
            words = f"SLOW {random.randrange(3, 90)}"
            await self.ask([*self.settled(), self.user(words)], leave=True)
        elif chance < 0.46:
            self.load.counts["new conversations"] += 1  # an open tool call is abandoned
            self.fresh()
        elif chance < 0.58 and self.tools:
            await self.ask([*self.settled(), self.user(f"TOOL {random.randrange(1, 4)}")])
        elif chance < 0.66 and self.pin and self.messages and self.messages == self.settled():
            await self.ask([*self.messages, self.user("more")], only_new=True)
        elif chance < 0.72:
            await self.ask([*self.settled(), self.user(f"SLOW {random.randrange(2, 30)}")])
        else:
            await self.ask([*self.messages, self.results() if self.calls() else self.user("next")])

    async def attack(self, data: bytes) -> None:
        async with self.http.post(self.load.url, data=data) as answer:
            error = json.loads(await answer.read())["error"]
        is_told = answer.status in (400, 413) or (answer.status == 503 and self.load.is_restarted)
        assert is_told, (answer.status, error)
        self.load.counts["hostile bodies"] += 1

    def user(self, words: str) -> Json:
        return {
            "role": "user",
            "content": [{"type": "text", "text": f"{words} {uuid.uuid4().hex[:6]} DIGEST"}],
        }

    def calls(self) -> list[str]:
        last = self.messages[-1]["content"] if self.messages else []
        return [block["id"] for block in last if block["type"] == "tool_use"]

    def settled(self) -> list[Json]:
        """The conversation without a question whose tool calls are not answered."""
        end = len(self.messages)
        while end and any(
            block["type"] == "tool_use" for block in self.messages[end - 1]["content"]
        ):
            end -= 2
        return self.messages[:end]

    def results(self) -> Json:
        words = random.choice(["result", "result", "TOOL 1"])
        blocks = [
            {
                "type": "tool_result",
                "tool_use_id": call,
                "content": f"{words} {uuid.uuid4().hex[:6]} DIGEST",
            }
            for call in self.calls()
        ]
        return {
            "role": "user",
            "content": blocks,
        }  # in the order of the calls, in which a process hears them

    async def ask(
        self, messages: list[Json], *, leave: bool = False, only_new: bool = False
    ) -> None:
        """One request; its complete answer is checked, and the conversation goes on from it."""
        stream, tools = (
            random.random() < 0.5,
            self.tools,
        )  # a twin that dies may begin afresh meanwhile
        body: Json = {
            "model": "sonnet",
            "max_tokens": 99,
            "messages": messages[-1:] if only_new else messages,
        }
        body |= {"stream": stream, **({"tools": [TOOL]} if tools else {})}
        if self.pin and len(messages) == 1:
            self.pin = str(uuid.uuid4())  # under the old name it would be what is new
        headers = {"x-arch-claude-cli-session": self.pin} if self.pin else {}
        counts = self.load.counts
        async with self.http.post(self.load.url, json=body, headers=headers) as answer:
            if leave:
                await self.leave(answer, stream)
            data = await answer.read()
        counts[f"status {answer.status}"] += 1
        how = answer.headers.get("x-bridge-session")
        counts[f"session {how}"] += 1
        if answer.status != 200:
            error = json.loads(data)["error"]
            if answer.status == 503 and self.load.is_restarted:
                counts["refused in the restart"] += 1
                return self.fresh()
            assert answer.status == 502, (answer.status, error)
            counts["died"] += 1
            return self.fresh()
        if stream:
            blocks = data.decode().split("\n\n")[:-1]
            events = [json.loads(block.split("\ndata: ")[1]) for block in blocks]
            error = check_stream(events)["error"]
            if error and self.load.is_restarted and "shutting down" in error["error"]["message"]:
                counts["cut short by the restart"] += 1
                return self.fresh()
            if error:
                assert "the claude CLI" in error["error"]["message"], error
                counts["died in mid stream"] += 1
                return self.fresh()
            message = assemble(events)
        else:
            message = json.loads(data)
        if only_new:
            counts["only what is new"] += 1
            messages = messages if how == "hot" else messages[-1:]
        self.check(message, messages, str(how), tools=tools)
        counts["complete"] += 1
        self.messages = [*messages, {"role": "assistant", "content": message["content"]}]

    async def leave(self, answer: aiohttp.ClientResponse, stream: bool) -> None:
        if stream and random.random() < 0.8:
            with contextlib.suppress(aiohttp.ClientError):
                for _ in range(random.randrange(1, 20)):
                    await answer.content.readany()
        answer.close()
        raise Left

    def check(self, message: Json, messages: list[Json], how: str, *, tools: bool) -> None:
        """The stand-in's answer to this conversation."""
        last = messages[-1]["content"][-1]
        asked = last.get("text") or last["content"]
        words = asked.split()
        calls = [block for block in message["content"] if block["type"] == "tool_use"]
        if words[0] == "TOOL" and tools:
            good = len(calls) == int(words[1]) and message["stop_reason"] == "tool_use"
        else:
            numbers = "".join(f"{n} " for n in range(int(words[1]))) if words[0] == "SLOW" else ""
            wanted = numbers or f"echo: {asked}; {len(messages)} messages {digest(messages)}"
            good = [block.get("text") for block in message["content"]] == [wanted]
        if not good:
            self.load.wrong.append(f"{how}: wrong answer to {last}: {message['content']}"[:500])


def measure(bridge: psutil.Process) -> dict[str, int]:
    """Of the bridge alone; its children are counted."""
    memory = bridge.memory_full_info()
    row = {
        "pss": memory.pss,
        "rss": memory.rss,
        "fds": bridge.num_fds(),
        "threads": bridge.num_threads(),
    }
    return {
        **row,
        "children": len(children(bridge.pid)),
        "connections": len(bridge.net_connections()),
    }


async def rest(bridge: psutil.Process) -> dict[str, int]:
    """Wait until all processes are reaped and all connections closed."""
    end = time.monotonic() + 60
    while bridge.children(recursive=True) or len(bridge.net_connections()) > 1:
        if time.monotonic() > end:
            for child in children(bridge.pid):  # the comparison says how many
                print(
                    "left:",
                    child,
                    child.status(),
                    round(time.time() - child.create_time()),
                    "s old",
                )
            break
        await asyncio.sleep(0.1)
    await asyncio.sleep(1)  # the thread that waited for the last one ends
    return measure(bridge)


class Program:
    """The bridge as a program, which can be started again at the same address."""

    def __init__(self, log: IO[str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.log = log
        self.wrong: list[str] = []
        self.start()

    def start(self) -> None:
        environ = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("CLAUDE", "ANTHROPIC_"))
        }
        environ |= {
            **SETTINGS,
            "CLAUDE_CLI_BIN": str(STANDIN),
            "CLAUDE_CLI_LISTEN_ADDR": f"127.0.0.1:{self.port}",
        }
        environ["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{environ['PATH']}"
        command = [sys.executable, str(ROOT / "bridge.py")]
        self.process = subprocess.Popen(command, env=environ, stderr=self.log)
        while socket.socket().connect_ex(("127.0.0.1", self.port)):
            assert self.process.poll() is None, "the bridge did not start"
            time.sleep(0.05)

    def stop(self) -> None:
        self.process.terminate()
        if status := self.process.wait(30):
            self.wrong.append(f"the bridge ended with status {status}")

    def restart(self) -> None:
        self.stop()
        self.start()


async def restarted(program: Program, url: str, minutes: float) -> Load:
    """Clients go on while the bridge is restarted."""
    load = Load(url, psutil.Process(program.process.pid))
    load.is_restarted = True
    running = asyncio.create_task(load.run(60 * minutes))
    await asyncio.sleep(30 * minutes)
    await asyncio.to_thread(program.restart)
    load.bridge = psutil.Process(program.process.pid)
    await running
    return load


async def soak(minutes: float, warm_up: float, program: Program) -> list[str]:
    url = f"http://127.0.0.1:{program.port}/v1/messages"
    bridge = psutil.Process(program.process.pid)
    loads, rests = [], []
    for part in (warm_up, minutes / 2, minutes / 2):
        loads.append(Load(url, bridge))
        await loads[-1].run(60 * part)
        rests.append(await rest(bridge))
        complete = loads[-1].counts["complete"]
        print(f"{part:g} minutes: {complete} complete answers; at rest {rests[-1]}", flush=True)
    loads.append(await restarted(program, url, warm_up))
    last = await rest(loads[-1].bridge)
    print(f"with a restart: {loads[-1].counts['complete']} complete answers; at rest {last}")
    counts = loads[1].counts + loads[2].counts + loads[3].counts
    wrong = [line for load in loads for line in load.wrong]
    for name, count in sorted(counts.items()):
        print(f"{name:45} {count:8}")
    print(f"{'wrong answers':45} {len(wrong):8}")
    before, middle, after = rests
    growth = GROWTH + GROWTH_PER_ANSWER * loads[2].counts["complete"]
    for name, count in after.items():
        most = before[name]
        if name == "rss":
            most = min(most + GROWTH_IN_ALL, middle[name] + growth)
        if (
            count > most and name != "pss"
        ):  # which is larger when other programs with the same libraries end
            wrong.append(
                f"{name} grew from {before[name]} over {middle[name]} to {count}; {most} at most"
            )
    for name in ("fds", "threads", "children", "connections"):
        if last[name] > before[name]:
            wrong.append(f"{name} after the restart: {last[name]}, {before[name]} before")
    # A kill takes at most the one answer that its process was giving.
    for load in loads:
        died = load.counts["died"] + load.counts["died in mid stream"]
        if died > load.counts["kills"]:
            wrong.append(f"{died} answers died of {load.counts['kills']} kills")
    return wrong


def main() -> None:
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 30.0
    warm_up = float(sys.argv[2]) if len(sys.argv) > 2 else WARM_UP
    print(isolate())
    with tempfile.TemporaryFile("w+") as log:
        program = Program(log)
        try:
            wrong = asyncio.run(soak(minutes, warm_up, program))
            program.stop()
            wrong += program.wrong
        finally:
            program.process.kill()
            program.process.wait()
        log.seek(0)
        # Besides a line for each request, and how it began and ended, nothing is to be said.
        usual = (
            "request_id=",
            "listening on",
            "shutting down",
            "the claude CLI is",
            "the claude CLI does not",
        )
        wrong += [line.rstrip() for line in log if not any(words in line for words in usual)]
    for line in wrong[:50]:
        print("WRONG:", line)
    print(f"{len(wrong)} things are wrong" if wrong else "all is well")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
