"""Many clients that misbehave, for long, while what the bridge stands on is taken away.

`python tests/soak.py [MINUTES [WARM-UP [LOGIN]]]`: 30 minutes after 2, unless it is told otherwise.

The bridge runs as a program; its CLI is the stand-in, or with LOGIN (`key` or `subscription`) the
real one in front of the stub API.  Every complete answer must be that of the conversation that was
sent: the stand-in repeats the last text, the number of messages and a digest of all of them; of the
real CLI, the request is looked up that came to the stub.  Meanwhile processes are killed, the CLI
is replaced by another version, TMPDIR is cleaned and the login is written anew.  At the end the
bridge must be at rest with the descriptors, threads and children that it had after the warm-up, and
about the memory that it had after half of the time.  Then it is restarted again and again while its
clients go on, every other time as a part of a host that forks: they may be refused, and get no
wrong answer.  Exit status 1 when anything is wrong.
"""

import asyncio
import contextlib
import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import aiohttp
import psutil
from client import arrived, assemble
from grammar import check_stream
from host import ROOT, TESTS, children, isolate
from installed import find_clis
from stand_in import digest
from user import logged_in

from bridge import Config, serve

Json = dict[str, Any]
WARM_UP = 2.0  # minutes
RESTARTS = 4  # in the last part
CLEAN_SECS = 15.0  # what is older in TMPDIR is removed
# Bytes of memory: lost conversations that are remembered (sessions.MAX_CACHED), and the allocator.
GROWTH_IN_ALL = 8 << 20
# Bytes of memory in the second half, when as many lost conversations are remembered as ever
# (sessions.MAX_CACHED): what an allocator keeps, and some for each answer.  A leak of 1 KiB a request
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
# The loop's, the log's, and two that read large requests (sessions.Threads), once one came.
THREADS = 4
# Two versions of the stand-in: with announcements and a bare mode, and without.
VERSIONS = ("2.1.332", "2.1.260")
SCRIPT = """#!{python}
import sys
sys.path[:0] = [{tests!r}]
import stand_in
if "--version" in sys.argv:
    print("{version} (stand-in for Claude Code)")
else:
    stand_in.main()
"""


# ---------------------------------------------------------------- what the bridge stands on


class StandIn:
    """The stand-in repeats what it was asked, and a digest of the conversation."""

    def question(self, words: str) -> str:
        return f"{words} {uuid.uuid4().hex[:6]} DIGEST"

    def calling(self, count: int) -> str:
        return f"TOOL {count}"

    def ticks(self, count: int) -> str:
        return "".join(f"{number} " for number in range(count))

    def answer(self, asked: str, messages: list[Json]) -> str:
        return f"echo: {asked}; {len(messages)} messages {digest(messages)}"

    async def arrived(self, http: aiohttp.ClientSession, asked: str) -> list[str]:
        """Its answer shows what it was given."""
        return []


class RealCli:
    """The stub API says what it is told to, and keeps the requests that come."""

    def __init__(self, stub_url: str) -> None:
        self.log_url = f"{stub_url}/_log?since=-100"

    def question(self, words: str) -> str:
        say = "" if words.startswith(("SLOW", "USE_TOOL")) else "SAY "
        return f"{say}{words} {uuid.uuid4().hex[:8]}"

    def calling(self, count: int) -> str:
        return f"USE_TOOL t INPUT={{}}END COUNT={count}"

    def ticks(self, count: int) -> str:
        return "".join(f"tick{number} " for number in range(count))

    def answer(self, asked: str, messages: list[Json]) -> str:
        results = [
            block["content"] for block in messages[-1]["content"] if block["type"] == "tool_result"
        ]
        if not results:
            return asked.removeprefix("SAY ")
        return "Tool said: "

    async def arrived(self, http: aiohttp.ClientSession, asked: str) -> list[str]:
        """Digests of the conversations whose newest message has this text, as they came."""
        async with http.get(self.log_url) as answer:
            rows = await answer.json()
        bodies = [row["body"] for row in rows if row["path"].startswith("/v1/messages")]
        found = [arrived(body) for body in bodies]
        return [digest(messages) for messages in found if asked in json.dumps(messages[-1])]


@dataclass
class Setup:
    """What the bridge stands on."""

    cli: StandIn | RealCli
    settings: Json  # fields of Config
    environ: dict[str, str]
    clis: list[Path]  # to which the file that the bridge starts leads, by turns
    clients: int
    pause: float  # seconds between two kills

    def replace_cli(self) -> int:
        """Put another version in place of the CLI, as an update does."""
        self.clis.append(self.clis.pop(0))
        new = Path(self.settings["bin"] + ".new")
        new.unlink(missing_ok=True)
        new.symlink_to(self.clis[0])
        new.replace(self.settings["bin"])
        return 1

    def clean(self) -> int:
        """Remove what is old in TMPDIR, and now and then all of it; how many folders."""
        folder = Path(self.environ["TMPDIR"])
        is_all = random.random() < 0.1
        count = 0
        with contextlib.suppress(FileNotFoundError):  # the bridge removes them too
            for path in folder.iterdir():
                if is_all or time.time() - path.lstat().st_mtime > CLEAN_SECS:
                    shutil.rmtree(path, ignore_errors=True)
                    count += 1
        if is_all:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(exist_ok=True)
        return count

    def write_login(self) -> int:
        """Write the same login once more, as the CLI does when it has a new token."""
        path = Path(self.environ["HOME"]) / ".claude/.credentials.json"
        if not path.exists():
            return 0
        new = path.with_suffix(".new")
        new.write_bytes(path.read_bytes())
        new.replace(path)
        return 1

    def left(self) -> list[str]:
        """What the bridge has left in TMPDIR."""
        names = [path.name for path in Path(self.environ["TMPDIR"]).iterdir()]
        return [name for name in names if name.startswith("claude-cli-bridge-")]


@contextlib.contextmanager
def standing(login: str) -> Iterator[Setup]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in ("tmp", "home"):
            (folder / name).mkdir()
        settings: Json = {"bin": str(folder / "claude"), "watchdog_secs": 60}
        if login:
            clis = list(find_clis().values())[:2]
            user = stack.enter_context(logged_in(login, clis[0]))
            settings |= {"session_ttl_secs": 30, "max_idle": 6, "max_sessions": 16}
            settings |= {"queue_secs": 300, "keep_env": user.config.keep_env}
            setup = Setup(RealCli(user.stub.url), settings, {**os.environ}, clis, 6, 5.0)
        else:
            settings |= {"session_ttl_secs": 5, "max_idle": 16}
            environ = {
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("CLAUDE", "ANTHROPIC_"))
            }
            environ["HOME"] = str(folder / "home")
            environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"
            setup = Setup(StandIn(), settings, environ, stand_ins(folder), 50, 0.5)
        setup.environ["TMPDIR"] = str(folder / "tmp")
        setup.replace_cli()
        yield setup


def stand_ins(folder: Path) -> list[Path]:
    """The stand-in as each of VERSIONS."""
    paths = []
    for version in VERSIONS:
        paths.append(folder / version)
        text = SCRIPT.format(python=sys.executable, tests=str(TESTS), version=version)
        paths[-1].write_text(text)
        paths[-1].chmod(0o755)
    return paths


# ---------------------------------------------------------------- clients


class Left(Exception):
    """The client went away in mid answer, as it meant to."""


class Load:
    """The clients of one bridge, and what became of their requests."""

    def __init__(self, url: str, bridge: psutil.Process, setup: Setup) -> None:
        self.url = url
        self.bridge = bridge
        self.setup = setup
        self.is_restarted = False
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        pause = self.setup.pause
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as http:
            harm = [
                asyncio.create_task(self.harm("kills", pause, self.kill)),
                asyncio.create_task(self.harm("CLIs replaced", 6 * pause, self.setup.replace_cli)),
                asyncio.create_task(self.harm("folders removed", 4 * pause, self.setup.clean)),
                asyncio.create_task(self.harm("logins written", 6 * pause, self.setup.write_login)),
            ]
            clients = [Client(self, http) for _ in range(self.setup.clients)]
            await asyncio.gather(*(client.run(end) for client in clients))
            for task in harm:
                task.cancel()
            await asyncio.wait(harm)
            self.wrong += [
                f"{task.exception()!r}"
                for task in harm
                if not task.cancelled() and task.exception()
            ]

    async def harm(self, name: str, pause: float, function: Callable[[], int]) -> None:
        """Do it again and again, and count how often it was done."""
        while True:
            await asyncio.sleep(random.uniform(0, 2 * pause))
            self.counts[name] += function()

    def kill(self) -> int:
        """Kill a process of the CLI, whatever it does."""
        with contextlib.suppress(psutil.NoSuchProcess):
            victims = [
                child
                for child in self.bridge.children()
                if child.status() != psutil.STATUS_ZOMBIE and "--resume" in child.cmdline()
            ]
            if victims:
                random.choice(victims).kill()
                return 1
        return 0


class Client:
    """One client with one conversation at a time."""

    def __init__(self, load: Load, http: aiohttp.ClientSession) -> None:
        self.load = load
        self.http = http
        self.cli = load.setup.cli
        self.fresh()

    def fresh(self) -> None:
        self.conversation = object()
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
            await self.ask([*self.settled(), self.user(self.cli.calling(random.randrange(1, 4)))])
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
        text = self.cli.question(words)
        return {"role": "user", "content": [{"type": "text", "text": text}]}

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
        words = random.choice(["result", "result", self.cli.calling(1)])
        blocks = [
            {
                "type": "tool_result",
                "tool_use_id": call,
                "content": self.cli.question(words),
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
        # A twin that dies may begin another conversation meanwhile.
        conversation, tools = self.conversation, self.tools
        stream = random.random() < 0.5
        body: Json = {
            "model": "sonnet",
            "max_tokens": 999,
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
            if only_new and "conversation of this name is gone" in error["message"]:
                counts["only what is new, and its process is gone"] += 1
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
        counts["only what is new"] += only_new
        await self.check(message, messages, str(how), tools=tools)
        counts["complete"] += 1
        if conversation is self.conversation:
            self.messages = [*messages, {"role": "assistant", "content": message["content"]}]

    async def leave(self, answer: aiohttp.ClientResponse, stream: bool) -> None:
        if stream and random.random() < 0.8:
            with contextlib.suppress(aiohttp.ClientError):
                for _ in range(random.randrange(1, 20)):
                    await answer.content.readany()
        answer.close()
        raise Left

    async def check(self, message: Json, messages: list[Json], how: str, *, tools: bool) -> None:
        """It is the CLI's answer to this conversation."""
        last = messages[-1]["content"][-1]
        asked = last.get("text") or last["content"]
        calls = [block for block in message["content"] if block["type"] == "tool_use"]
        counted = [n for n in (1, 2, 3) if asked.startswith(self.cli.calling(n))]
        words = asked.split()
        if counted and tools:
            good = len(calls) == counted[0] and message["stop_reason"] == "tool_use"
        else:
            slow = words[0] == "SLOW"
            ticks = self.cli.ticks(int(words[1])) if slow else ""
            wanted = ticks or self.cli.answer(asked, messages)
            texts = [block.get("text") or "" for block in message["content"]]
            good = len(texts) == 1 and texts[0].startswith(wanted)
        if not good:
            self.load.wrong.append(f"{how}: wrong answer to {last}: {message['content']}"[:500])
        found = await self.cli.arrived(self.http, asked)
        if found and digest(messages) not in found:
            self.load.wrong.append(f"{how}: another conversation came than {messages}"[:1500])
        self.load.counts["looked up"] += bool(found)


# ---------------------------------------------------------------- the bridge


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

    def __init__(self, setup: Setup, log: IO[str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.setup = setup
        self.log = log
        self.wrong: list[str] = []
        self.start()

    def start(self, *, is_hosted: bool = False) -> None:
        fields = {**self.setup.settings, "listen_addr": f"127.0.0.1:{self.port}"}
        environ = self.setup.environ.copy()
        if is_hosted:
            command = [sys.executable, __file__, "host", json.dumps(fields)]
        else:
            command = [sys.executable, str(ROOT / "bridge.py")]
            for name, value in fields.items():
                text = ",".join(value) if name == "keep_env" else str(value)
                environ[f"CLAUDE_CLI_{name.upper()}"] = text
        self.process = subprocess.Popen(command, env=environ, stderr=self.log)
        while socket.socket().connect_ex(("127.0.0.1", self.port)):
            assert self.process.poll() is None, "the bridge did not start"
            time.sleep(0.05)

    def stop(self) -> None:
        self.process.terminate()
        if status := self.process.wait(30):
            self.wrong.append(f"the bridge ended with status {status}")
        if left := self.setup.left():
            self.wrong.append(f"left in TMPDIR: {left}")

    def restart(self, *, is_hosted: bool) -> None:
        self.stop()
        self.start(is_hosted=is_hosted)


async def host(config: Config) -> None:
    """A program that embeds the bridge, and forks while it serves."""
    logging.basicConfig(level=logging.INFO)
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    ended = threading.Event()
    forking = threading.Thread(target=fork_often, args=(ended,))
    async with serve(config):
        forking.start()
        await stopping.wait()
    ended.set()
    forking.join()


def fork_often(ended: threading.Event) -> None:
    """Have children that live for some seconds, and hold what they have inherited."""
    running: set[int] = set()
    while not ended.wait(random.uniform(0, 1)):
        child = os.fork()
        if not child:
            time.sleep(random.uniform(0, 3))
            os._exit(0)
        running.add(child)
        running = {one for one in running if os.waitpid(one, os.WNOHANG) == (0, 0)}
    for one in running:
        os.waitpid(one, 0)


async def restarted(program: Program, url: str, minutes: float) -> Load:
    """Clients go on while the bridge is restarted, every other time in a host that forks."""
    load = Load(url, psutil.Process(program.process.pid), program.setup)
    load.is_restarted = True
    running = asyncio.create_task(load.run(60 * minutes))
    for number in range(RESTARTS):
        await asyncio.sleep(60 * minutes / (RESTARTS + 1))
        await asyncio.to_thread(program.restart, is_hosted=number % 2 == 0)
        load.bridge = psutil.Process(program.process.pid)
    await running
    return load


async def soak(minutes: float, warm_up: float, program: Program) -> list[str]:
    url = f"http://127.0.0.1:{program.port}/v1/messages"
    bridge = psutil.Process(program.process.pid)
    loads, rests = [], []
    for part in (warm_up, minutes / 2, minutes / 2):
        loads.append(Load(url, bridge, program.setup))
        await loads[-1].run(60 * part)
        rests.append(await rest(bridge))
        complete = loads[-1].counts["complete"]
        print(f"{part:g} minutes: {complete} complete answers; at rest {rests[-1]}", flush=True)
    loads.append(await restarted(program, url, max(warm_up, minutes / 5)))
    last = await rest(loads[-1].bridge)
    print(
        f"with {RESTARTS} restarts: {loads[-1].counts['complete']} complete answers; at rest {last}"
    )
    counts = loads[1].counts + loads[2].counts + loads[3].counts
    wrong = [line for load in loads for line in load.wrong]
    for name, count in sorted(counts.items()):
        print(f"{name:45} {count:8}")
    print(f"{'wrong answers':45} {len(wrong):8}")
    before, middle, after = rests
    growth = GROWTH + GROWTH_PER_ANSWER * loads[2].counts["complete"]
    for name, count in after.items():
        most = before[name]
        if name == "threads":
            most = max(most, THREADS)
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
    # A kill takes at most the one answer that its process was giving; so does a folder that is
    # removed before its process has opened what is in it.
    for load in loads:
        died = load.counts["died"] + load.counts["died in mid stream"]
        causes = load.counts["kills"] + load.counts["folders removed"]
        if died > causes:
            wrong.append(f"{died} answers died of {causes} kills and removed folders")
    return wrong


def main() -> None:
    if sys.argv[1:2] == ["host"]:
        asyncio.run(host(Config(**json.loads(sys.argv[2]))))
        return
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 30.0
    warm_up = float(sys.argv[2]) if len(sys.argv) > 2 else WARM_UP
    login = sys.argv[3] if len(sys.argv) > 3 else ""
    print(isolate())
    with standing(login) as setup, tempfile.TemporaryFile("w+") as log:
        program = Program(setup, log)
        try:
            wrong = asyncio.run(soak(minutes, warm_up, program))
            program.stop()
            wrong += program.wrong
        finally:
            program.process.kill()
            program.process.wait()
        log.seek(0)
        # Besides a line for each request, how it began and ended, and who was killed, or lost its
        # folder, as the login was looked at, nothing is to be said.
        usual = (
            "request_id=",
            "listening on",
            "shutting down",
            "the claude CLI is",
            "the claude CLI does not",
            "exited with status -9",
            "Error: Can't access working directory",
        )
        wrong += [line.rstrip() for line in log if not any(words in line for words in usual)]
    for line in wrong[:50]:
        print("WRONG:", line)
    print(f"{len(wrong)} things are wrong" if wrong else "all is well")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
