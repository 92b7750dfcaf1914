"""Record a CLI again: `python tests/record.py /path/to/claude [scenario ...]` writes tests/fixtures/<version>/*.ndjson.

One row a line: {"dir": "in" | "out" | "exit", "t": seconds since spawn, "line": ...}; see tests/fixtures/README.md.
The CLI talks to the stub API in a network namespace with loopback alone.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest

Json = dict[str, Any]
COMMON = [
    *("-p", "--input-format", "stream-json", "--output-format", "stream-json", "--verbose"),
    *("--include-partial-messages", "--no-session-persistence", "--setting-sources", "", "--strict-mcp-config"),
    *("--disable-slash-commands", "--model", "sonnet", "--allowedTools", "mcp__client__*"),
]
MODEL_MODE = ["--tools", "", "--permission-mode", "default"]
AGENT_MODE = ["--permission-mode", "acceptEdits"]
TOOL = {
    "name": "get_weather",
    "description": "d",
    "inputSchema": {"type": "object", "properties": {"city": {"type": "string"}}},
}


class Recorder:
    """One CLI process whose lines are kept."""

    def __init__(self, cli: str, arguments: list[str], environ: dict[str, str], folder: str) -> None:
        self.began = time.monotonic()
        self.rows: list[Json] = []
        self.folder = folder
        command = [cli, *COMMON, *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=environ, cwd=folder, text=True, **pipes)

    def keep(self, direction: str, line: Json) -> None:
        text = json.dumps(line, ensure_ascii=False).replace(self.folder, "/home/user/project")
        row = {"dir": direction, "t": round(time.monotonic() - self.began, 3), "line": json.loads(text)}
        self.rows.append(row)

    def send(self, line: Json) -> None:
        self.keep("in", line)
        assert self.process.stdin
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()

    def read(self) -> Json | None:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            return None
        event: Json = json.loads(line)
        self.keep("out", shortened(event))
        if event["type"] == "control_request" and event["request"]["subtype"] == "mcp_message":
            self.serve_tool(event)
        return event

    def until(self, kind: str) -> None:
        while (event := self.read()) and event["type"] != kind:
            pass

    def serve_tool(self, event: Json) -> None:
        message = event["request"]["message"]
        results: dict[str, Json] = {
            "initialize": {"capabilities": {"tools": {}}, "serverInfo": {"name": "client", "version": "1"}},
            "tools/list": {"tools": [TOOL]},
            "tools/call": {"content": [{"type": "text", "text": "sunny, 18C"}], "isError": False},
        }
        result = results.get(message["method"], {})
        if message["method"] == "initialize":
            result["protocolVersion"] = message["params"]["protocolVersion"]
        answer = {"jsonrpc": "2.0", "id": message.get("id", 0), "result": result}
        response = {"subtype": "success", "request_id": event["request_id"], "response": {"mcp_response": answer}}
        self.send({"type": "control_response", "response": response})

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        while self.read():
            pass
        self.rows.append(
            {"dir": "exit", "t": round(time.monotonic() - self.began, 3), "line": {"returncode": self.process.wait()}}
        )


def shortened(event: Json) -> Json:
    """The event without the long lists of commands and descriptions that the answer to `initialize` holds."""
    text = json.dumps(event)
    inner = json.loads(text).get("response", {}).get("response")
    if event["type"] != "control_response" or not isinstance(inner, dict) or "models" not in inner:
        return event
    inner["commands"] = []
    inner["agents"] = [{"name": agent["name"]} for agent in inner.get("agents", [])]
    inner["models"] = [{**model, "description": model.get("displayName")} for model in inner["models"]]
    return {**event, "response": {**event["response"], "response": inner}}


def control(subtype: str, **fields: Any) -> Json:
    return {"type": "control_request", "request_id": subtype, "request": {"subtype": subtype, **fields}}


def user(content: Any, **fields: Any) -> Json:
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    message = {"role": "user", "content": [*blocks, {"type": "text", "text": "\n"}]}
    return {"type": "user", "message": message, "session_id": "", "parent_tool_use_id": None, **fields}


def assistant(content: list[Json]) -> Json:
    message = {"id": "msg_replay_1", "type": "message", "role": "assistant", "model": "claude-sonnet-5"}
    message |= {
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 0, "output_tokens": 0},
        "content": content,
    }
    return {"type": "assistant", "message": message, "session_id": "", "parent_tool_use_id": None}


def turns(*texts: str, **initialize: Any) -> Callable[[Recorder], None]:
    def run(recorder: Recorder) -> None:
        recorder.send(control("initialize", hooks=None, **(initialize or {"systemPrompt": ["You are terse."]})))
        recorder.until("control_response")
        for text in texts:
            recorder.send(user(text))
            recorder.until("result")

    return run


def interrupt(recorder: Recorder) -> None:
    turns()(recorder)
    recorder.send(user("SLOW"))
    for _ in range(8):
        recorder.until("stream_event")
    recorder.send(control("interrupt"))
    recorder.until("result")


def settings(recorder: Recorder) -> None:
    turns()(recorder)
    body = json.dumps({"temperature": 0.1, "stop_sequences": ["END"]})
    env = {"CLAUDE_CODE_MAX_OUTPUT_TOKENS": "77", "CLAUDE_CODE_EXTRA_BODY": body}
    recorder.send(control("apply_flag_settings", settings={"env": env, "effortLevel": "low"}))
    recorder.until("control_response")
    recorder.send(user("hello"))
    recorder.until("result")


def history(recorder: Recorder) -> None:
    turns(systemPrompt=["You are terse."], sdkMcpServers=["client"])(recorder)
    recorder.send(user("weather in Paris and Rome?", shouldQuery=False))
    recorder.until("result")
    calls = [
        {"type": "tool_use", "id": f"toolu_{key}", "name": "mcp__client__get_weather", "input": {"city": city}}
        for key, city in (("a", "Paris"), ("b", "Rome"))
    ]
    recorder.send(assistant([{"type": "text", "text": "checking"}, *calls]))
    results: list[Json] = [
        {"type": "tool_result", "tool_use_id": "toolu_a", "content": "sunny"},
        {
            "type": "tool_result",
            "tool_use_id": "toolu_b",
            "content": [{"type": "text", "text": "rain"}],
            "is_error": True,
        },
    ]
    recorder.send(user(results, shouldQuery=False))
    recorder.until("result")
    recorder.send(user("thanks"))
    recorder.until("result")


def context(recorder: Recorder) -> None:
    turns()(recorder)
    recorder.send(user("count these tokens", shouldQuery=False))
    recorder.until("result")
    recorder.send(control("get_context_usage"))
    recorder.until("control_response")


def slash(recorder: Recorder) -> None:
    turns()(recorder)
    recorder.send({**user(""), "message": {"role": "user", "content": "/compact"}})
    recorder.until("result")


CLIENT = {"systemPrompt": ["You are terse."], "sdkMcpServers": ["client"]}
AGENT = {"appendSystemPrompt": "Be terse."}
SUBAGENT = '{"description":"d","prompt":"say hi","subagent_type":"general-purpose","run_in_background":false}'
WEATHER = 'USE_TOOL get_weather INPUT={"city":"Paris"}END'
SCENARIOS: dict[str, Callable[[Recorder], None]] = {
    "text": turns("hello"),
    "two_turns": turns("hello", "and again"),
    "unicode": turns("SAY \u00e9\u4e2d\U0001f600\u2028\u0085 end"),
    "thinking": turns("THINK about it"),
    "max_tokens": turns("MAXTOK"),
    "refusal": turns("REFUSE"),
    "empty": turns("EMPTY"),
    "not_streamed": turns("NOSTREAM"),
    "mid_stream_error": turns("MIDFAIL"),
    "error_400_prompt_too_long": turns("FAIL400"),
    "error_401": turns("FAIL401"),
    "error_429": turns("FAIL429"),
    "error_529": turns("FAIL529"),
    "not_logged_in": turns("hello"),
    "retry_then_success": turns("RETRYONCE"),
    "client_tool": turns(WEATHER, **CLIENT),
    "client_tools_parallel": turns(WEATHER + " COUNT=2", **CLIENT),
    "builtin_tool": turns('USE_TOOL Read INPUT={"file_path":"/etc/hostname"}END', **AGENT),
    "subagent": turns(f"USE_TOOL Agent INPUT={SUBAGENT}END", **AGENT),
    "interrupt": interrupt,
    "turn_settings": settings,
    "history_replay": history,
    "context_usage": context,
    "slash_command_unescaped": slash,
}


def record(cli: str, names: list[str]) -> Iterator[tuple[str, list[Json]]]:
    for name in names:
        with conftest.Stub() as stub, tempfile.TemporaryDirectory() as home:
            environ = {"PATH": os.environ["PATH"], "HOME": home, "ANTHROPIC_BASE_URL": stub.url}
            environ |= {"DISABLE_TELEMETRY": "1", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}
            environ |= {"DISABLE_AUTOUPDATER": "1", "ENABLE_TOOL_SEARCH": "false", "CLAUDE_CODE_MAX_RETRIES": "1"}
            if name != "not_logged_in":
                environ["ANTHROPIC_API_KEY"] = "sk-stub"
            agent = name in ("builtin_tool", "subagent")
            recorder = Recorder(cli, AGENT_MODE if agent else MODEL_MODE, environ, home)
            SCENARIOS[name](recorder)
            recorder.end()
            yield name, recorder.rows


def main() -> None:
    cli = sys.argv[1]
    version = subprocess.run([cli, "--version"], capture_output=True, text=True, check=True).stdout.split()[0]
    conftest.isolate()
    folder = Path(__file__).parent / "fixtures" / version
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in record(cli, sys.argv[2:] or list(SCENARIOS)):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / f"{name}.ndjson").write_text("\n".join(lines) + "\n")
        print(f"{name}: {len(rows)} rows", flush=True)


if __name__ == "__main__":
    main()
