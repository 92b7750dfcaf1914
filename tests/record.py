"""Record a CLI: `python tests/record.py /path/to/claude [scenario ...]`.

The CLI gets the arguments, the environment and the lines that the bridge gives it.  It talks to
the stub API, in a network namespace with loopback alone.  tests/fixtures/README.md explains the
files that it writes.
"""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import client
import host
import servers
import stubs
from client import Json, text
from test_logins import LOGINS

import sessions
import translate
from sessions import Kind, Pool, PoolConfig
from translate import CliEvent, Request

ALIAS = "sonnet"
AGENT = ("builtin_tool", "subagent")  # in agent mode
SUBSCRIBER = ("quota_allowed", "quota_warning", "quota_rejected")  # with a subscription's token
TOOL = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
SUNNY = {"content": [{"type": "text", "text": "sunny, 18C"}], "isError": False}


class Recorder:
    """One process of the CLI whose lines are kept."""

    def __init__(self, config: PoolConfig, environ: dict[str, str]) -> None:
        self.rows: list[Json] = []
        self.tools: list[Json] = []  # the client's tools, for the CLI to list
        self.home = environ["HOME"]
        self.agent = bool(config.tools)
        pool = Pool(config, environ)
        self.announced = asyncio.run(self.look(pool))
        self.model = pool.cli.info.full_name(ALIAS)
        self.own_id = str(uuid.uuid4())
        project = Path(self.home, "project")
        project.mkdir()
        (project / "notes.txt").write_text("buy milk\n")
        is_bare = not self.agent and pool.inspector.is_bare()
        has_full_name = self.model.startswith(translate.FULL_NAME_PREFIX)
        kind = Kind("" if has_full_name else ALIAS, self.agent, is_bare)
        reading, self.gate = os.pipe()
        self.gate_folder = sessions.gate_folder(reading)
        gate = f"{self.gate_folder}/gate.jsonl"
        self.stderr = Path(self.home, "stderr")
        self.began = time.monotonic()
        with self.stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*sessions.arguments(config, kind, ""), "--resume", gate],
                env=sessions.child_environment(config, environ, kind),
                cwd=project if self.agent else "/",
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                pass_fds=(reading,),
                start_new_session=True,
                preexec_fn=sessions.die_with_parent,
            )
        os.close(reading)

    async def look(self, pool: Pool) -> list[Json]:
        """Let the pool ask what it wants to know before a conversation; what the CLI announces."""
        async with pool:
            await pool.inspector.info()
            kind = Kind(agent=self.agent, bare=not self.agent and pool.inspector.is_bare())
            return await pool.inspector.announcements_for(ALIAS, kind)

    # Rows

    def keep(self, direction: str, **what: Any) -> None:
        at = round(time.monotonic() - self.began, 3)
        row = json.dumps({"dir": direction, "t": at, **what}, ensure_ascii=False)
        row = row.replace(self.home, "/home/user")
        row = row.replace(self.gate_folder, "/home/user/gate")
        in_a_name = re.sub(r"\W|_", "-", self.home)  # of a folder in ~/.claude/projects
        row = row.replace(in_a_name, "-home-user")
        self.rows.append(json.loads(row))

    def open_gate(self, rows: list[bytes]) -> None:
        for row in rows:
            os.write(self.gate, row)
            self.keep("gate", line=json.loads(row))
        os.close(self.gate)

    def send(self, line: bytes) -> None:
        assert self.process.stdin
        self.keep("in", line=json.loads(line))
        self.process.stdin.write(line)
        self.process.stdin.flush()

    def read(self) -> CliEvent | None:
        """The next event; None: there is none left.  A control request is answered."""
        assert self.process.stdout
        while line := self.process.stdout.readline():
            try:
                event: CliEvent = json.loads(line)
            except ValueError:
                self.keep("out", text=line.decode().rstrip("\n"))
                continue
            self.keep("out", line=shortened(event))
            if event["type"] == "control_request":
                self.answer(event)
            return event
        return None

    def until(self, found: Callable[[CliEvent], Any]) -> Any:
        while event := self.read():
            if what := found(event):
                return what
        raise EOFError("the CLI ended")

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        while self.read():
            pass
        status = self.process.wait()
        self.keep("exit", line={"returncode": status, "stderr": self.stderr.read_text()})

    def close(self) -> None:
        self.process.kill()
        with self.process:
            shutil.rmtree(self.gate_folder)

    # What the bridge does

    def set_up(self, request: Request, *, query: bool = True) -> list[bytes]:
        """As Pool._set_up: all but the lines that start the turn, which it returns."""
        describe = translate.tools_for_turn if query else translate.tools_for_count
        self.tools = describe(request)
        settings = translate.turn_environment(request)
        given = {name: value for name, value in settings.items() if value}
        system, has_tools = request.system, bool(self.tools)
        rows = translate.transcript(request.messages, self.model, self.announced, self.own_id)
        self.open_gate(rows)
        self.send(translate.initialize_line(system, has_tools=has_tools, agent=self.agent))
        self.send(translate.control_line("apply_flag_settings", settings={"env": given}))
        return [translate.user_line([], str(uuid.uuid4()), query=query)]

    def ask(self, request: Request) -> None:
        for line in self.set_up(request):
            self.send(line)

    def go_on(self, words: str) -> None:
        self.send(translate.user_line(translate.as_blocks(words), str(uuid.uuid4())))

    def answer(self, event: CliEvent) -> None:
        """As Process._answer_control, but a tool has its result at once."""
        result = SUNNY if translate.tool_call_id(event) else None
        self.send(translate.control_answer(event, self.tools, result))


def shortened(event: CliEvent) -> CliEvent:
    """The event without the long lists and descriptions in the answers to two control requests."""
    hello = translate.control_result(event, "initialize")
    if hello:
        hello["commands"] = []
        if "agents" in hello:
            hello["agents"] = [{"name": agent["name"]} for agent in hello["agents"]]
        for model in hello["models"]:
            model["description"] = model["displayName"]
    usage = translate.control_result(event, "get_context_usage")
    if "gridRows" in usage:
        usage["gridRows"] = []
    return event


def is_result(event: CliEvent) -> bool:
    return event["type"] == "result"


def is_streamed(event: CliEvent) -> bool:
    return event["type"] == "stream_event"


def asked(*messages: Any, betas: str = "", **fields: Any) -> Request:
    body = client.request_body([*messages], system="You are terse.", **fields)
    return translate.parse_request(json.dumps(body).encode(), betas)


# Scenarios


def turns(first: Any, *more: str, **fields: Any) -> Callable[[Recorder], None]:
    def run(recorder: Recorder) -> None:
        recorder.ask(asked(first, **fields))
        recorder.until(is_result)
        for words in more:
            recorder.go_on(words)
            recorder.until(is_result)

    return run


def past(*messages: Any) -> Callable[[Recorder], None]:
    """A turn with a past in which tools were called."""

    def run(recorder: Recorder) -> None:
        recorder.ask(asked(*messages, tools=[TOOL]))
        recorder.until(is_result)

    return run


def interrupt(recorder: Recorder, words: str = "SLOW") -> None:
    recorder.ask(asked(words))
    for _ in range(8):
        recorder.until(is_streamed)
    recorder.send(translate.control_line("interrupt"))
    recorder.until(is_result)


def responds(event: Json, request_id: str) -> bool:
    response = event.get("response")
    return isinstance(response, dict) and response.get("request_id") == request_id


def count(recorder: Recorder) -> None:
    """As Pool._count."""
    request = asked("hello", "hi", "count these tokens", tools=[TOOL])
    for line in recorder.set_up(request, query=False):
        recorder.send(line)
    recorder.until(is_result)
    recorder.send(translate.control_line("get_context_usage"))
    recorder.until(lambda event: responds(event, "get_context_usage"))


def slash_command(recorder: Recorder) -> None:
    recorder.set_up(asked("hello"))
    line = json.loads(translate.user_line([], str(uuid.uuid4())))
    line["message"]["content"] = "/compact"
    recorder.send(translate.json_line(line))
    recorder.until(is_result)


def refused_control(recorder: Recorder) -> None:
    recorder.set_up(asked("hello"))
    recorder.send(translate.control_line("unheard_of"))
    recorder.until(lambda event: responds(event, "unheard_of"))


def use(tool: str, **fields: Any) -> str:
    return f"USE_TOOL {tool} INPUT={json.dumps(fields)}END"


def said(*content: Json) -> Json:
    return {"role": "assistant", "content": [THOUGHT, *content]}


def call(city: str) -> Json:
    return {
        "type": "tool_use",
        "id": f"toolu_{city}",
        "name": "get_weather",
        "input": {"city": city},
    }


def result(city: str, content: Any, **fields: Any) -> Json:
    return {"type": "tool_result", "tool_use_id": f"toolu_{city}", "content": content, **fields}


THOUGHT = {"type": "thinking", "thinking": "hmm...", "signature": "c2ln"}
TOOL_PAST = [
    "weather in Paris and Rome?",
    said(text("checking"), call("Paris"), call("Rome")),
    {
        "role": "user",
        "content": [
            result("Paris", "sunny"),
            result("Rome", [text("no such city")], is_error=True),
        ],
    },
]
WEATHER = use("get_weather", city="Paris")
SUBAGENT = use(
    "Agent",
    description="d",
    prompt="say hi",
    subagent_type="general-purpose",
    run_in_background=False,
)
SCENARIOS: dict[str, Callable[[Recorder], None]] = {
    "text": turns("hello"),
    "two_turns": turns("hello", "and again"),
    "unicode": turns("SAY h\u00e9llo \u2713 \U0001f389 \u2028 \x00 \u65e5\u672c\u8a9e \u0085 end"),
    "thinking": turns("THINK about it"),
    "max_tokens": turns("MAXTOK"),
    "refusal": turns("REFUSE"),
    "empty": turns("EMPTY"),
    "not_streamed": turns("NOSTREAM"),
    "mid_stream_error": turns("MIDFAIL"),
    "error_400": turns("FAIL400"),
    "error_401": turns("FAIL401"),
    "error_429": turns("FAIL429"),
    "error_529": turns("FAIL529"),
    "error_code": turns("FAIL403 CODE bad_place"),
    "image_removed": turns({"role": "user", "content": [client.IMAGE, text("BADIMAGE")]}),
    "not_logged_in": turns("hello"),
    "quota_allowed": turns("QUOTA allowed"),
    "quota_warning": turns("QUOTA allowed_warning"),
    "quota_rejected": turns("QUOTA rejected FAIL429"),
    "retry_then_success": turns("RETRYONCE"),
    "client_tool": turns(WEATHER, tools=[TOOL]),
    "client_tools_parallel": turns(WEATHER + " COUNT=2", tools=[TOOL]),
    "unlisted_tool": turns(use("get_time"), tools=[TOOL]),
    "builtin_tool": turns(use("Read", file_path="notes.txt")),
    "subagent": turns(SUBAGENT),
    "interrupt": interrupt,
    "turn_settings": turns(
        "hello", temperature=0.1, stop_sequences=["END"], betas="files-api-2025-04-14"
    ),
    "history": past(*TOOL_PAST, said(text("mixed")), "thanks"),
    "history_tool_results": past(*TOOL_PAST),
    "context_usage": count,
    "slash_command_unescaped": slash_command,
    "refused_control": refused_control,
    "gate_closed_empty": lambda recorder: recorder.open_gate([]),
}


def environment(home: str, url: str) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": home,
        "TMPDIR": home,
        "DISABLE_TELEMETRY": "1",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "ANTHROPIC_BASE_URL": url,
        **servers.ENGINE,
    }


def account(cli: str, name: str) -> Json:
    """What the CLI says of a login (test_logins) in its answer to `initialize`."""
    login = LOGINS[name]
    kept = (*servers.KEEP, *login.kept)
    config = PoolConfig(bin=cli, keep_env=kept, setting_sources=login.sources, spares=0)

    async def look(environ: dict[str, str]) -> Json:
        async with Pool(config, environ) as pool:
            return dict((await pool.inspector.info()).account)

    with tempfile.TemporaryDirectory() as home:
        for file, content in login.files.items():
            path = Path(home, file)
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content))
        # The discard port: nobody is asked anything.
        return asyncio.run(look({**environment(home, "http://127.0.0.1:9"), **login.kept}))


def record(
    cli: str, url: str, name: str, run: Callable[[Recorder], None] | None = None
) -> list[Json]:
    """The rows of a scenario in front of the API at `url`; with `run`, of another conversation
    under its login and settings."""
    config = PoolConfig(
        bin=cli,
        keep_env=(*servers.KEEP, "CLAUDE_CODE_OAUTH_TOKEN"),
        retries=1 if name == "retry_then_success" else 0,
        spares=0,
        tools="default" if name in AGENT else "",
    )
    with tempfile.TemporaryDirectory() as home:
        environ = environment(home, url)
        if name in SUBSCRIBER:
            environ["CLAUDE_CODE_OAUTH_TOKEN"] = "sk-ant-oat01-stub"
        elif name != "not_logged_in":
            environ["ANTHROPIC_API_KEY"] = "sk-stub"
        recorder = Recorder(config, environ)
        try:
            (run or SCENARIOS[name])(recorder)
            recorder.end()
        finally:
            recorder.close()
        return recorder.rows


def main() -> None:
    cli, *names = sys.argv[1:]
    how = host.isolate()
    if how.startswith("not"):
        sys.exit(how)
    version = subprocess.check_output([cli, "--version"], text=True).split()[0]
    folder = Path(__file__).parent / "fixtures" / version
    folder.mkdir(parents=True, exist_ok=True)
    if not names or "accounts" in names:
        accounts = {name: account(cli, name) for name in LOGINS}
        (folder / "accounts.json").write_text(json.dumps(accounts, indent=1) + "\n")
    for name in names or SCENARIOS:
        if name == "accounts":
            continue
        with stubs.Stub() as stub:
            rows = record(cli, stub.url, name)
        lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows]
        (folder / f"{name}.ndjson").write_text("\n".join(lines) + "\n")
        print(f"{name}: {len(rows)} rows", flush=True)


if __name__ == "__main__":
    main()
