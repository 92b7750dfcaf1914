"""What the CLI changes of its own accord is prevented, refused as the API would, or told.  With the
real CLI; the table is in tests/README.md."""

import json
import os
import zlib
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from struct import pack
from typing import Any

import pytest
from client import Json, arrived, error_of, request_body, text
from servers import Serve, Server
from test_tools import TOOL, result, start, user

Since = Callable[[], list[Json]]

# Inputs of tools whose names are the CLI's own, and what it makes of them.
REWRITTEN: dict[str, tuple[str, Json, Json]] = {
    "plan": ("ExitPlanMode", {"plan": "p", "x": 1}, {"x": 1}),
    "edit": (
        "Edit",
        {"new_string": "b ", "old_string": "a", "file_path": "/x"},
        {"replace_all": False, "file_path": "/x", "old_string": "a", "new_string": "b "},
    ),
    "edit-of-another-shape": ("Edit", {"path": "/x", "text": "a  "}, {"path": "/x", "text": "a  "}),
    "write": (
        "Write",
        {"file_path": "/x.py", "content": "a  \r\nb\t\n"},
        {"file_path": "/x.py", "content": "a\r\nb\n"},
    ),
    # White space is what JavaScript takes for it.
    "write-odd-spaces": (
        "Write",
        {"file_path": "/x.py", "content": "a\x1c\nb\ufeff\u3000\nc\x85\n"},
        {"file_path": "/x.py", "content": "a\x1c\nb\nc\x85\n"},
    ),
    "write-markdown": (
        "Write",
        {"file_path": "/x.md", "content": "a  \n"},
        {"file_path": "/x.md", "content": "a  \n"},
    ),
}


def last_input(since: Since) -> Any:
    blocks = [block for message in arrived(since()[-1]["body"]) for block in message["content"]]
    return [block["input"] for block in blocks if block["type"] == "tool_use"][-1]


@pytest.mark.parametrize("name", REWRITTEN)
def test_an_input_of_a_tool_that_the_cli_takes_for_its_own_arrives_alike_and_is_told(
    serve: Serve, cli: Path, since: Since, name: str
) -> None:
    tool_name, given, written = REWRITTEN[name]
    tool = {"name": tool_name, "input_schema": {"type": "object"}}
    server = serve(bin=cli, max_idle=0)
    messages = [user(text(f"USE_TOOL {tool_name} INPUT={json.dumps(given)}END"))]
    answer = server.post(messages, tools=[tool]).message
    (call,) = [block for block in answer["content"] if block["type"] == "tool_use"]
    assert call["input"] == given
    # Claude Code as a client echoes what it would write itself.
    echoed = [*answer["content"][:-1], {**call, "input": written}]
    for content, how in (echoed, "hot"), (answer["content"], "rebuilt; reason=continued"):
        history = [*messages, {"role": "assistant", "content": content}, user(result(call))]
        told = server.post(history, tools=[tool])
        assert told.session == how
        assert json.dumps(last_input(since)) == json.dumps(written)
        place = f"messages.1.content.{len(content) - 1}.input"
        is_told = place in told.headers.get("x-bridge-not-sent", "")
        assert is_told == (content[-1]["input"] != written)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("Bash", {"command": "cd / && ls", "timeout": "5"}),
        ("Bash", {"command": "find . -exec ls {} \\\\;"}),
        ("Read", {"file_path": "/x", "offset": "3"}),
        ("Edit", {"file_path": "/x", "old_str": "a", "new_str": "b"}),
        ("mine", {"a": [{"__proto__": 1}]}),
    ],
)
def test_a_call_that_the_process_holds_in_another_form_goes_on_in_a_fresh_one(
    serve: Serve, cli: Path, since: Since, name: str, given: Json
) -> None:
    tool = {"name": name, "input_schema": {"type": "object"}}
    server = serve(bin=cli)
    messages = [user(text(f"USE_TOOL {name} INPUT={json.dumps(given)}END"))]
    answer = server.post(messages, tools=[tool]).message
    (call,) = [block for block in answer["content"] if block["type"] == "tool_use"]
    assert call["input"] == given
    history = [*messages, {"role": "assistant", "content": answer["content"]}]
    told = server.post([*history, user(result(call))], tools=[tool])
    assert last_input(since) == given
    assert "x-bridge-not-sent" not in told.headers
    # Each version changes some of them.
    assert told.session in ("hot", "rebuilt; reason=tool_use")


def test_a_breakpoint_on_a_call_does_not_arrive_and_is_told(
    serve: Serve, cli: Path, since: Since
) -> None:
    """The other ones of a client that sets its own do."""
    mark = {"cache_control": {"type": "ephemeral"}}
    call = {"type": "tool_use", "id": "toolu_1", "name": "t", "input": {}}
    history = [
        user({**text("a page"), **mark}, text("a question")),
        {"role": "assistant", "content": [call | mark]},
        user(result(call) | mark),
    ]
    tool = {"name": "t", "input_schema": {"type": "object"}}
    answer = serve(bin=cli).post(history, tools=[tool])
    assert answer.headers["x-bridge-not-sent"] == "messages.1.content.0.cache_control"
    marked = [
        block["type"]
        for message in since()[-1]["body"]["messages"]
        for block in message["content"]
        if "cache_control" in block
    ]
    assert marked == ["text", "tool_result"]


@pytest.mark.parametrize("words", ["USE_TOOL unknown INPUT={}END", "MAXTOK", "ONLYBLANKS"])
def test_the_model_is_not_asked_again_by_the_cli(
    serve: Serve, cli: Path, since: Since, words: str
) -> None:
    """The CLI would answer a call of a tool that is not there, and go on with an answer that was
    cut off."""
    server = serve(bin=cli)
    tool = {"name": "mine", "input_schema": {"type": "object"}}
    for _ in range(3):
        answer = server.post(words, tools=[tool])
        assert answer.status == 200
        assert "x-bridge-api-calls" not in answer.headers
    server.close()
    assert len(since()) == 3


def test_more_than_one_call_of_the_api_for_a_turn_is_told(
    serve: Serve, cli: Path, since: Since
) -> None:
    answer = serve(bin=cli, retries=1).post(f"RETRYONCE {cli}")  # once for each text
    assert (answer.status, answer.headers["x-bridge-api-calls"]) == (200, "2")
    assert len(since()) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_in_mid_stream_has_the_apis_own_words(real: Server, stream: bool) -> None:
    answer = real.post("MIDFAIL", stream=stream)
    error = answer.events[-1]["error"] if stream else answer.json["error"]
    assert (answer.status, error) == (
        200 if stream else 529,
        {"type": "overloaded_error", "message": "Overloaded"},
    )


def test_a_text_after_a_call_is_told_where_the_cli_moves_it(
    serve: Serve, cli: Path, since: Since
) -> None:
    call = {"type": "tool_use", "id": "toolu_1", "name": "mine", "input": {}}
    tool = {"name": "mine", "input_schema": {"type": "object"}}
    said = [text("before"), call, text("after")]
    history = [user(text("a")), {"role": "assistant", "content": said}, user(result(call))]
    answer = serve(bin=cli).post(history, tools=[tool])
    kinds = [block["type"] for block in arrived(since()[-1]["body"])[1]["content"]]
    told = answer.headers.get("x-bridge-not-sent", "")
    assert ("messages.1.content.2" in told) == (kinds != ["text", "tool_use", "text"])


def test_a_count_says_what_it_leaves_out(real: Server) -> None:
    tools = [
        {"name": "a", "description": "d" * 2048, "input_schema": {"type": "object"}},
        {"name": "b", "description": "d" * 2049, "input_schema": {"type": "object"}},
        {"type": "web_search_20250305", "name": "web_search"},
    ]
    output = {"format": {"type": "json_schema", "schema": {"type": "object"}}}
    path = "/v1/messages/count_tokens"
    choice = {"type": "any"}
    body = request_body("hi", max_tokens=..., tools=tools, output_config=output, tool_choice=choice)
    counted = real.call("POST", path, body)
    left_out = "output_config, tool_choice, tools.1.description, tools.2"
    assert (counted.status, counted.headers["x-bridge-not-counted"]) == (200, left_out)
    plain = real.call("POST", path, request_body("hi", max_tokens=...))
    assert "x-bridge-not-counted" not in plain.headers


def test_the_commands_of_an_agent_see_nothing_of_the_request(
    serve: Serve, cli: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "ls"  # which needs no permission
    program.write_text(f"#!/bin/sh\nenv > {tmp_path}/seen\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    server = serve(bin=cli, tools="Bash", cwd=str(tmp_path))
    server_tool = {
        "type": "url",
        "url": "http://x",
        "name": "x",
        "authorization_token": "mcp-secret",
    }
    body = request_body(
        'USE_TOOL Bash INPUT={"command":"ls"}END',
        max_tokens=4321,
        mcp_servers=[server_tool],
        metadata={"user_id": "somebody"},
    )
    answer = server.call("POST", "/v1/messages", body, headers={"anthropic-beta": "my-beta"})
    assert answer.status == 200
    seen = (tmp_path / "seen").read_text()
    assert "CLAUDE_CODE_ENTRYPOINT" in seen
    for hidden in ("EXTRA_BODY", "mcp-secret", "4321", "my-beta", "somebody"):
        assert hidden not in seen
    told = answer.headers["x-bridge-not-sent"].split(", ")
    assert {"max_tokens", "mcp_servers", "anthropic-beta.my-beta"} <= set(told)


@pytest.mark.parametrize("asked", [None, {"type": "adaptive"}])
def test_an_agent_thinks_if_it_is_asked_to(
    serve: Serve, cli: Path, since: Since, tmp_path: Path, asked: Json | None
) -> None:
    server = serve(bin=cli, tools="Read", cwd=str(tmp_path))
    for words in ("SAY x", "SAY y"):
        fields = {"thinking": asked} if asked else {}
        assert server.post(words, model="claude-sonnet-5-5", **fields).status == 200
        assert since()[-1]["body"].get("thinking") == asked


def large_image() -> Json:
    """3,000 by 2,500 pixels, in few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return pack(">I", len(data)) + kind + data + pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress((b"\0" + b"\0\0\0" * 3000) * 2500)
    header = pack(">IIBBBBB", 3000, 2500, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)
    data += chunk(b"IEND", b"")
    source = {"type": "base64", "media_type": "image/png", "data": b64encode(data).decode()}
    return {"type": "image", "source": source}


def test_a_thinking_signature_that_the_api_refuses_is_the_apis_400(
    real: Server, since: Callable[[], list[Json]]
) -> None:
    """The CLI would take out all thinking, ask again, and answer as if nothing had been."""
    thought = {"type": "thinking", "thinking": "hm", "signature": "bad"}
    history = ["hi", {"role": "assistant", "content": [thought, text("a")]}, "BADSIGN"]
    answer = real.post(history, thinking={"type": "adaptive"})
    assert (answer.status, answer.json["error"]["type"]) == (400, "invalid_request_error")
    assert "sent it again with changes" in answer.json["error"]["message"]
    assert answer.headers["x-should-retry"] == "false"


def test_a_large_image_arrives_as_it_was_sent_in_every_place(
    real: Server, since: Callable[[], list[Json]]
) -> None:
    image = large_image()
    first = real.post([user(text("look"), image)])
    assert arrived(since()[-1]["body"])[-1]["content"] == [text("look"), image]
    history = [user(text("look"), image), {"role": "assistant", "content": first.text}]
    answer = real.post([*history, user(text("and"), image)])
    assert answer.session == "rebuilt; reason=images"
    assert arrived(since()[-1]["body"])[-1]["content"] == [text("and"), image]
    messages, (call,) = start(real)
    shown = user(result(call, [text("see"), image]))
    assert real.post([*messages, shown], tools=[TOOL]).status == 200
    (block,) = arrived(since()[-1]["body"])[-1]["content"]
    assert block["content"] == [text("see"), image]


def test_a_system_message_of_settings_alone_is_left_out_and_told(
    real: Server, since: Callable[[], list[Json]]
) -> None:
    """Claude Code as a client sends it after /compact and /effort."""
    messages = [user(text("SAY x"))]
    messages.append({"role": "system", "content": [], "output_config": {"effort": "medium"}})
    answer = real.post(messages)
    assert answer.text == "x"
    assert "messages.1.output_config" in answer.headers["x-bridge-not-sent"]
    assert arrived(since()[-1]["body"]) == [user(text("SAY x"))]


def test_what_the_cli_itself_refuses_is_a_400(real: Server) -> None:
    shape = {"type": "json_schema", "schema": {"type": "object"}}
    answer = real.post("hello", output_format=shape, output_config={"format": shape})
    assert error_of(answer) == (400, "invalid_request_error")
    assert "Both output_format and output_config" in answer.json["error"]["message"]


def test_a_failure_in_mid_stream_has_the_status_of_its_type(real: Server, cli: Path) -> None:
    """The CLI reports no status of it, and 2.1.197 no type either."""
    answer = real.post("MIDFAIL 400", stream=False)
    is_typed = "2.1.197" not in str(cli)
    assert error_of(answer) == ((400, "invalid_request_error") if is_typed else (500, "api_error"))
