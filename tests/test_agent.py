"""Agent mode: the CLI's own tools run, and a turn of several API messages is one answer.  With the
real CLI."""

import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from client import Json, arrived, count, sent
from grammar import check_stream
from host import wait_until
from servers import Launch, Serve, Server

SUBAGENT = '{"description":"d","prompt":"SAY from below","subagent_type":"general-purpose","run_in_background":false}'


@pytest.fixture
def agent(serve: Serve, cli: Path, tmp_path: Path) -> Serve:
    """Start an agent: its working directory holds note.txt."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "note.txt").write_text("the note says heron")

    def start(**settings: object) -> Server:
        return serve(bin=cli, **{"tools": "default", "cwd": str(folder), **settings})

    return start


def read_note(server: Server) -> str:
    return f'USE_TOOL Read INPUT={{"file_path":"{server.config.cwd}/note.txt"}}END'


@pytest.mark.parametrize("stream", [False, True])
def test_a_built_in_tool_runs_and_the_turn_is_one_message(
    agent: Serve, since: Callable[[], list[Json]], stream: bool
) -> None:
    server = agent()
    answer = server.post(read_note(server), stream=stream)
    assert [block["type"] for block in answer.message["content"]] == ["text", "text"]
    assert "the note says heron" in answer.text
    assert answer.message["stop_reason"] == "end_turn"
    assert (answer.message["usage"]["input_tokens"], answer.message["usage"]["output_tokens"]) == (
        20,
        34,
    )
    assert len(since()) == 2
    if stream:
        assert check_stream(answer.events)["message"]["id"] == answer.message["id"]


def test_a_subagent_is_left_out(agent: Serve, since: Callable[[], list[Json]]) -> None:
    answer = agent().post(f"USE_TOOL Agent INPUT={SUBAGENT}END", stream=True)
    message = check_stream(answer.events)["message"]
    assert [block["type"] for block in message["content"]] == ["text", "text"]
    assert message["content"][1]["text"].startswith("Tool said: ")
    assert len(since()) == 3
    assert message["usage"]["output_tokens"] == 34  # the subagent's call is its own


def test_the_requests_system_prompt_is_appended_to_claude_codes(
    agent: Serve, since: Callable[[], list[Json]]
) -> None:
    assert agent().post("SAY x", system=[{"type": "text", "text": "Be brief."}]).text == "x"
    system = [block["text"] for block in since()[0]["body"]["system"]]
    assert system[-1].endswith("Be brief.") or any("Be brief." in text for text in system)
    assert sum(map(len, system)) > 5000
    assert len(since()[0]["body"]["tools"]) > 5


def test_a_list_of_tools_is_all_there_is(agent: Serve, since: Callable[[], list[Json]]) -> None:
    assert agent(tools="Read,Grep").post("SAY x").text == "x"
    assert {tool["name"] for tool in since()[0]["body"]["tools"]} == {"Read", "Grep"}


@pytest.mark.parametrize(("mode", "written"), [("default", False), ("acceptEdits", True)])
def test_the_permission_mode_decides_what_runs(agent: Serve, mode: str, written: bool) -> None:
    server = agent(permission_mode=mode)
    path = Path(server.config.cwd) / "new.txt"
    answer = server.post(f'USE_TOOL Write INPUT={{"file_path":"{path}","content":"hello"}}END')
    assert answer.message["stop_reason"] == "end_turn"
    assert path.exists() == written


def test_a_conversation_with_an_agent_goes_on_in_its_process(
    agent: Serve, since: Callable[[], list[Json]]
) -> None:
    server = agent()
    first = server.post(read_note(server))
    content = first.message["content"]
    asked = [read_note(server), {"role": "assistant", "content": content}, "SAY on"]
    assert server.post(asked).session == "hot"
    assert "heron" in str(since()[-1]["body"]["messages"])
    server.close()


def test_a_request_with_tools_is_served_in_model_mode(
    agent: Serve, since: Callable[[], list[Json]]
) -> None:
    tool = {"name": "mine", "input_schema": {"type": "object", "properties": {}}}
    answer = agent().post("USE_TOOL mine INPUT={}END", tools=[tool])
    assert answer.message["stop_reason"] == "tool_use"
    assert [tool["name"] for tool in since()[0]["body"]["tools"]] == ["mine"]
    assert arrived(since()[0]["body"]) == sent(["USE_TOOL mine INPUT={}END"])


def test_pings_fill_the_time_of_a_tool_and_the_watchdog_lets_it_run(
    agent: Serve, background: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.PING_SECS", 0.2)
    server = agent(tools="Bash", watchdog_secs=60)
    asked = 'USE_TOOL Bash INPUT={"command":"sleep 3; echo slept"}END'
    answering = background.submit(server.post, asked, stream=True)
    assert server.bridge
    pool = server.bridge.pool
    wait_until(lambda: any(item.process.working for item in list(pool.room.sessions)), "the tool")
    for session in list(pool.room.sessions):
        session.process._alive_at -= 61
        assert not session.process.check_silence(60)
    answer = answering.result()
    assert check_stream(answer.events)["message"]["stop_reason"] == "end_turn"
    assert "slept" in answer.text
    kinds = [event["type"] for event in answer.events]
    first_block = kinds.index("content_block_stop")
    assert kinds[first_block : kinds.index("content_block_start", first_block)].count("ping") >= 3


# What could go on after an answer: the calls, and how many requests to the API the turn takes.
SCRIPT = "export const meta = {name:'n',description:'d',phases:[]}\nreturn await agent('SAY x')"
LATER: dict[str, tuple[str, Json, int]] = {
    "agent": ("Agent", {"description": "d", "prompt": "SAY from below"}, 3),
    "agent-later": (
        "Agent",
        {"description": "d", "prompt": "SAY from below", "run_in_background": True},
        3,
    ),
    "command": ("Bash", {"command": "echo made", "run_in_background": True}, 2),
    "command-too-long": ("Bash", {"command": "tail -f note.txt", "timeout": 1000}, 2),
    "monitor": ("Monitor", {"command": "cat note.txt", "description": "d", "timeout_ms": 9000}, 2),
    "cron": ("CronCreate", {"cron": "* * * * *", "prompt": "SAY cron", "recurring": True}, 2),
    "wakeup": ("ScheduleWakeup", {"delaySeconds": 60, "prompt": "SAY up", "reason": "r"}, 2),
    "workflow": ("Workflow", {"script": SCRIPT}, 2),
}


@pytest.mark.parametrize("name", LATER)
def test_nothing_goes_on_after_an_answer(
    agent: Serve, since: Callable[[], list[Json]], name: str
) -> None:
    """A task in the background would ask the model when it ends: a call that nobody asked for, and
    an answer that the next request could take for its own.  The turn after it lasts longer."""
    server = agent(permission_mode="acceptEdits")
    tool, value, calls = LATER[name]
    long = 'USE_TOOL Bash INPUT={"command":"sleep 2; echo slept"}END'
    conversation: list[object] = []
    for words, said in (
        (f"USE_TOOL {tool} INPUT={json.dumps(value)}END", "Tool said: "),
        (long, "slept"),
        ("SAY on", "on"),
        ("SAY more", "more"),
    ):
        conversation.append({"role": "user", "content": words})
        answer = server.post(conversation)
        assert said in answer.text
        assert answer.session == ("hot" if len(conversation) > 1 else "new")
        conversation.append({"role": "assistant", "content": answer.message["content"]})
    assert answer.text == "more"
    server.close()
    assert len(since()) == calls + 2 + 1 + 1


def test_the_model_is_offered_no_tool_that_works_after_an_answer(
    agent: Serve, since: Callable[[], list[Json]]
) -> None:
    """Nor one that promises to, and does not: with some permission modes they would run unasked."""
    assert agent().post("SAY x").text == "x"
    tools = {tool["name"]: tool for tool in since()[0]["body"]["tools"]}
    assert {"Agent", "Bash", "Read"} <= tools.keys()
    assert not ({tool for tool, _, _ in LATER.values()} - {"Agent", "Bash"}) & tools.keys()
    for name in ("Agent", "Bash"):
        assert "run_in_background" not in tools[name]["input_schema"]["properties"]


def test_an_agent_that_has_nothing_to_say_of_a_result_is_not_asked_again(
    agent: Serve, since: Callable[[], list[Json]]
) -> None:
    """Its CLI would ask the model to go on, after an answer that has words before the call."""
    server = agent()
    (Path(server.config.cwd) / "note.txt").write_text("NOWORDS")
    asked = [read_note(server)]
    first = server.post(asked)
    assert (first.status, first.message["stop_reason"]) == (200, "end_turn")
    asked += [{"role": "assistant", "content": first.message["content"]}, "SAY on"]
    second = server.post(asked)
    assert (second.text, second.session) == ("on", "rebuilt; reason=end_turn")
    server.close()
    assert len(since()) == 3


MCP_SERVER = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    answers = {
        "initialize": {
            "protocolVersion": "2025-06-18",
            "capabilities": {"tools": {}},
            "serverInfo": {"name": "x", "version": "1"},
        },
        "tools/list": {"tools": [{"name": "greet", "inputSchema": {"type": "object"}}]},
        "tools/call": {"content": [{"type": "text", "text": "hello from below"}]},
    }
    if "id" in asked:
        result = answers.get(asked["method"], {})
        print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": result}), flush=True)
"""


def test_the_tools_of_the_servers_that_the_user_names_run_unasked(
    agent: Serve, tmp_path: Path
) -> None:
    named = {"command": sys.executable, "args": ["-c", MCP_SERVER]}
    file = tmp_path / "mcp.json"
    file.write_text(json.dumps({"mcpServers": {"plain": named, "of ours.2": named}}))
    server = agent(mcp_config=str(file))
    for tool in ("mcp__plain__greet", "mcp__of_ours_2__greet"):
        assert "hello from below" in server.post(f"USE_TOOL {tool} INPUT={{}}END").text


def test_the_commands_of_an_agent_do_not_log_their_calls_of_the_api(
    agent: Serve, environment: Path
) -> None:
    """As the SDKs would, and another CLI.  A count needs that log of its own CLI."""
    (environment / ".claude").mkdir()
    allowed = {"permissions": {"allow": ["Bash"]}}
    (environment / ".claude/settings.json").write_text(json.dumps(allowed))
    server = agent(tools="Bash", setting_sources="user")
    assert count(server, "hello").status == 200
    asked: list[object] = []
    for thinking in ("disabled", "adaptive"):
        asked.append('USE_TOOL Bash INPUT={"command":"echo logs-$ANTHROPIC_LOG-"}END')
        answer = server.post(asked, thinking={"type": thinking})
        assert "logs--" in answer.text
        asked.append({"role": "assistant", "content": answer.message["content"]})
    assert answer.session == "hot"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is refused")
def test_bypass_permissions_as_root_is_refused_at_start(launch: Launch) -> None:
    program = launch("--tools", "default", "--permission-mode", "bypassPermissions", wait=False)
    assert program.wait() == 2
    wait_until(lambda: program.lines, "the reason")
    assert program.lines[-1].startswith("claude-cli-bridge: --permission-mode: ")


def test_the_processes_of_an_agent_end_with_it(agent: Serve) -> None:
    server = agent(permission_mode="acceptEdits", tools="Bash")
    with server.connect() as client:
        body = b'{"model":"sonnet","max_tokens":99,"stream":true,"messages":[{"role":"user","content":"SLOW 40"}]}'
        client.sendall(
            b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n%b"
            % (len(body), body)
        )
        assert client.recv(65536)
    wait_until(lambda: not server.processes(), "the end of the agent")


@pytest.mark.parametrize("tools", [[], None])
def test_an_agent_keeps_its_own_tools_when_a_request_has_none(
    serve: Serve, cli: Path, since: Callable[[], list[Json]], tmp_path: Path, tools: Any
) -> None:
    server = serve(bin=cli, tools="Read,Grep", cwd=str(tmp_path))
    assert server.post("SAY x", tools=tools).text == "x"
    assert {tool["name"] for tool in since()[-1]["body"]["tools"]} >= {"Read"}
