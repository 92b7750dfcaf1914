"""What is written to the CLI: lines, rows of a transcript, settings, answers of the MCP server."""

import json
from typing import Any

import pytest
from client import request_body
from messages import (
    CACHED,
    FOUND,
    IMAGE,
    PAGE,
    PDF,
    REDACTED,
    RESULT,
    RESULT_2,
    THOUGHT,
    TOOL,
    URL_IMAGE,
    USE,
    USE_2,
    first_turns,
    parsed,
    role,
    text,
    user,
)

import translate

Json = dict[str, Any]


def read(line: bytes) -> Json:
    """A line, which is one."""
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    value: Json = json.loads(line)
    return value


# ---------------------------------------------------------------- messages to the CLI


def test_every_user_line_ends_with_the_guard_and_says_its_turn() -> None:
    for content in ([text("/compact")], [IMAGE, text("a")], [RESULT]):
        line = read(translate.user_line(content, "uuid-1"))
        assert line["message"] == role("user", [*content, text("\n")])
        assert (line["type"], line["uuid"]) == ("user", "uuid-1")
        assert line["parent_tool_use_id"] is None


def test_a_user_line_without_content_has_no_guard_and_says_its_turn() -> None:
    """It starts a turn on what the process holds, and adds nothing."""
    line = read(translate.user_line([], "uuid-1"))
    assert line["message"] == role("user", [])
    assert (line["type"], line["uuid"]) == ("user", "uuid-1")
    assert "shouldQuery" not in line
    assert read(translate.user_line([], "x", query=False))["shouldQuery"] is False


def test_a_user_line_that_asks_nothing_says_so() -> None:
    assert "shouldQuery" not in read(translate.user_line([text("a")], "x"))
    assert read(translate.user_line([text("a")], "x", query=False))["shouldQuery"] is False


def test_no_line_to_the_cli_holds_a_line_break() -> None:
    content = [text("a\nb\r\u2028\u0085")]
    lines = [
        translate.user_line(content, "x"),
        translate.user_line([], "x"),
        translate.control_line("x", a="\n"),
        translate.initialize_line(["a\nb"], has_tools=True),
        *translate.transcript(
            [role("user", content), role("assistant", content)], "m", [{"type": "a\n"}], "\n"
        ),
    ]
    assert all(read(line) for line in lines)


def test_lines_keep_all_digits_of_64_bits_and_longer_integers_are_floats_as_for_the_cli() -> None:
    for number, kept in ((2**64 - 1, 2**64 - 1), (-(2**63), -(2**63)), (10**30 + 7, 1e30)):
        use = USE | {"input": {"n": number}}
        messages = parsed([role("user"), role("assistant", [use]), *user(RESULT)]).messages
        _, _, row, *_ = translate.transcript(messages, "m")
        found = read(row)["message"]["content"][0]["input"]["n"]
        assert (found, type(found)) == (kept, type(kept))


# Conversations as the CLI reads them with --resume; no result in them is one that
# `as_cli_sends` changes.
PASTS: dict[str, list[Any]] = {
    "none": [],
    "question": user(text("a")),
    "talk": [*user(text("a"), IMAGE), role("assistant", [THOUGHT, text("b")])],
    "images": user(IMAGE, text("a"), IMAGE | {"title": "t", "new": 1}, URL_IMAGE),
    "documents": user(PAGE | CACHED, text("a", citations=None), FOUND, {"type": "new"}),
    "tools": [
        *user(text("a")),
        role("assistant", [text("b"), USE, USE_2]),
        *user(RESULT | {"content": [IMAGE]}, RESULT_2 | CACHED, text("c")),
        role("assistant", [REDACTED, text("c")]),
    ],
    "results at the end": [
        role("assistant", [USE]),
        *user(RESULT | {"content": [text("a"), PAGE]}),
    ],
    "prefill": [*user(text("a")), role("assistant", [text("b"), {"type": "new"}])],
    "assistant first": [role("assistant", [text("a")]), *user(text("b"))],
}


@pytest.mark.parametrize("messages", PASTS.values(), ids=PASTS.keys())
def test_a_transcript_is_a_chain_of_all_messages_as_they_are(messages: list[Any]) -> None:
    first, *rows, last = map(read, translate.transcript(messages, "claude-x"))
    assert first["type"] == "system"
    found = [{key: row["message"][key] for key in ("role", "content")} for row in rows]
    assert found == messages
    assert [row["type"] for row in rows] == [message["role"] for message in messages]
    parent = None
    for row in (first, *rows, last):
        assert row["parentUuid"] == parent
        assert (row["isSidechain"], bool(row["timestamp"])) == (False, True)
        parent = row["uuid"]
    assert len({row["uuid"] for row in (first, *rows, last)}) == len(messages) + 2


@pytest.mark.parametrize("messages", PASTS.values(), ids=PASTS.keys())
def test_a_transcript_ends_with_a_message_of_its_model_that_the_api_does_not_see(
    messages: list[Any],
) -> None:
    *rows, last = map(read, translate.transcript(messages, "claude-x"))
    assert (last["type"], last["isVirtual"]) == ("assistant", True)
    assert not any("isVirtual" in row for row in rows)
    assert last["message"]["model"] == "claude-x"
    past = [row["message"]["model"] for row in rows if row["type"] == "assistant"]
    assert set(past) <= {"<synthetic>"}  # under which the CLI keeps thinking
    assert all(block.get("text") != "" for block in last["message"]["content"])


def test_messages_of_the_past_have_ids_of_their_own() -> None:
    """The CLI would merge those that share one."""
    messages = [role(name, [text("a")]) for name in ("user", "assistant") * 3]
    rows = map(read, translate.transcript(messages, "m", ANNOUNCED))
    ids = [row["message"]["id"] for row in rows if row["type"] == "assistant"]
    assert len(set(ids)) == len(ids) == 4


ANNOUNCED: list[Json] = [
    {"type": "environment", "text": "Linux"},
    {"type": "date", "date": "2026-01-01"},
]


def test_what_the_cli_announced_stands_before_all_messages_of_a_transcript() -> None:
    messages = PASTS["tools"]
    rows = [read(row) for row in translate.transcript(messages, "m", ANNOUNCED)]
    assert [row.get("attachment") for row in rows[1:3]] == ANNOUNCED
    kinds = ["system", "attachment", "attachment", *(m["role"] for m in messages), "assistant"]
    assert [row["type"] for row in rows] == kinds
    parents = [None, *(row["uuid"] for row in rows)]
    assert [row["parentUuid"] for row in rows] == parents[:-1]
    assert len(set(parents)) == len(parents)


def test_every_row_of_a_transcript_names_the_session_if_there_is_one() -> None:
    for session_id in ("", "00000000-0000-4000-8000-000000000000"):
        rows = translate.transcript(PASTS["talk"], "m", ANNOUNCED, session_id)
        assert {read(row).get("sessionId", "") for row in rows} == {session_id}


# A tool's result -> as the CLI writes it for the API, with its keys in that order.
WRITTEN: dict[str, tuple[Json, Json]] = {
    "string": (
        RESULT,
        {"tool_use_id": "t1", "type": "tool_result", "content": [text("sunny")]},
    ),
    "blocks": (
        RESULT | {"content": [text("a"), text("b", citations=None)], "is_error": False},
        {"tool_use_id": "t1", "type": "tool_result", "content": [text("a"), text("b")]},
    ),
    "error": (
        RESULT | {"is_error": True},
        {
            "type": "tool_result",
            "content": "sunny",
            "is_error": True,
            "tool_use_id": "t1",
        },
    ),
    "error of a block": (
        RESULT | {"is_error": True, "content": [text("no")]},
        {
            "type": "tool_result",
            "content": "no",
            "is_error": True,
            "tool_use_id": "t1",
        },
    ),
}


@pytest.mark.parametrize(("block", "written"), WRITTEN.values(), ids=WRITTEN.keys())
def test_a_result_is_written_into_a_transcript_as_the_cli_writes_it_in_place(
    block: Json, written: Json
) -> None:
    """The prompt cache compares bytes."""
    given: Any = block
    assert json.dumps(translate.as_cli_sends(given)) == json.dumps(written)
    _, row, _ = translate.transcript([role("user", [block, text("a"), block])], "m")
    assert read(row)["message"]["content"] == [written, text("a"), written]


# Blocks -> whether the CLI would scale an image in them.
IMAGES: dict[str, tuple[list[Any], bool]] = {
    "none": ([], False),
    "text": ([text("a"), PAGE], False),
    "image": ([text("a"), IMAGE], True),
    "image by URL": ([URL_IMAGE], False),
    "image in a result": ([RESULT | {"content": [text("a"), IMAGE]}], True),
    "image by URL in a result": ([RESULT | {"content": [URL_IMAGE]}], False),
    "image in a document": (
        [{"type": "document", "source": {"type": "content", "content": [IMAGE]}}],
        True,
    ),
    "image in a document of a result": (
        [
            RESULT
            | {"content": [{"type": "document", "source": {"type": "content", "content": [IMAGE]}}]}
        ],
        True,
    ),
    "PDF": ([PDF], False),
    "no block in a result": ([RESULT | {"content": [5, None]}], False),
}


@pytest.mark.parametrize(("blocks", "found"), IMAGES.values(), ids=IMAGES.keys())
def test_images_by_value_are_found_in_a_message_and_in_its_blocks(
    blocks: list[Any], found: bool
) -> None:
    assert translate.has_images(blocks) == found


# What the CLI keeps of a conversation of its own.
KEPT = [
    {"type": "queue-operation", "operation": "enqueue"},
    {"type": "user", "message": role("user"), "attachment": None},
    {"type": "attachment", "attachment": {"type": "environment", "text": "Linux"}},
    {"type": "attachment", "attachment": {"type": "todo", "text": "x"}},
    {"type": "attachment", "attachment": {"type": "model", "text": "Opus", "id": "m"}},
    {"type": "attachment", "attachment": {"type": "session_context", "text": "s"}},
    {"type": "attachment", "attachment": {"type": ["date"]}},
    {"type": "attachment", "attachment": {"type": "date", "date": "2026-01-01"}},
    {"type": "assistant", "message": role("assistant")},
]


def test_the_announcements_of_a_conversation_are_four_of_its_attachments() -> None:
    rows = "".join(json.dumps(row) + "\n" for row in KEPT).encode()
    assert translate.announcements(rows) == [
        {"type": "environment", "text": "Linux"},
        {"type": "model", "text": "", "id": "m"},
        {"type": "session_context", "text": "s"},
        {"type": "date", "date": "2026-01-01"},
    ]
    assert translate.announcements(b"") == []


# ---------------------------------------------------------------- settings of the CLI


def test_the_system_prompt_goes_through_initialize() -> None:
    for system, sent in ((["a", "b"], ["a", "b"]), ([], [""])):
        line = read(translate.initialize_line(system, has_tools=False))
        assert line == {
            "type": "control_request",
            "request_id": "initialize",
            "request": {"subtype": "initialize", "hooks": None, "systemPrompt": sent},
        }


def test_an_agent_keeps_its_own_system_prompt_before_the_clients() -> None:
    for system, sent in ((["a", "b"], "a\n\nb"), ([], "")):
        request = read(translate.initialize_line(system, has_tools=False, agent=True))["request"]
        assert request == {"subtype": "initialize", "hooks": None, "appendSystemPrompt": sent}


def test_initialize_names_the_server_of_the_clients_tools_if_there_are_any() -> None:
    request = read(translate.initialize_line([], has_tools=True))["request"]
    assert request["sdkMcpServers"] == ["client"]


def extra_body(request: translate.Request, *, listed: bool = False) -> Any:
    env = translate.turn_environment(request, has_listed_tools=listed)
    return json.loads(env["CLAUDE_CODE_EXTRA_BODY"])


def test_the_settings_of_a_turn_hold_the_fields_of_its_body_as_sent() -> None:
    fields = {
        "temperature": 0,
        "stop_sequences": ["END"],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "tools": [TOOL | CACHED],
        "tool_choice": {"type": "tool", "name": "weather"},
        "new": {"a": None, "n": 2**63},
        "top_k": None,
    }
    sent = {"max_tokens": 2000, **fields}
    assert extra_body(parsed(**sent)) == extra_body(parsed(**sent), listed=True) == sent


def test_the_settings_of_a_turn_take_back_those_of_the_one_before() -> None:
    first = translate.turn_environment(parsed(user(PAGE | CACHED, text("a")), header="b", top_k=1))
    second = translate.turn_environment(parsed())
    assert first.keys() == second.keys()
    assert (first["ANTHROPIC_BETAS"], first["DISABLE_PROMPT_CACHING"]) == ("b", "1")
    assert second == {
        "CLAUDE_CODE_EXTRA_BODY": '{"max_tokens":1024}',
        "ANTHROPIC_BETAS": "",
        "DISABLE_PROMPT_CACHING": "",
        "FORCE_PROMPT_CACHING_5M": "",
        "ENABLE_PROMPT_CACHING_1H": "",
    }


@pytest.mark.parametrize(
    ("thinking", "off"),
    [(None, "1"), ("disabled", "1"), ("adaptive", "0"), ("between_tools", "0"), ("new", "0")],
)
def test_an_agent_thinks_if_it_is_asked_to_in_whatever_way(thinking: str, off: str) -> None:
    body = request_body("hello", thinking=thinking and {"type": thinking})
    request = translate.parse_request(json.dumps(body).encode(), agent=True)
    assert translate.turn_environment(request)["CLAUDE_CODE_DISABLE_THINKING"] == off


def test_the_settings_of_a_turn_say_how_long_the_clis_breakpoints_are_kept() -> None:
    hour = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    for message, forced, enabled in (
        (text("a"), "", ""),
        (text("a", **CACHED), "1", ""),
        (text("a", **hour), "", "1"),
    ):
        settings = translate.turn_environment(parsed(user(message)))
        assert settings["FORCE_PROMPT_CACHING_5M"] == forced
        assert settings["ENABLE_PROMPT_CACHING_1H"] == enabled
        assert settings["DISABLE_PROMPT_CACHING"] == ""


def test_a_request_without_tools_says_so_where_the_process_has_some_listed() -> None:
    for tools in (..., None, []):
        request = parsed(tools=tools)
        assert extra_body(request, listed=True) == {"max_tokens": 1024, "tools": []}
        assert "tools" not in extra_body(request) or extra_body(request)["tools"] == tools
        assert request.fields.get("tools") in (None, [])


# ---------------------------------------------------------------- control requests of the CLI


def request_of(message: Any, **keys: Any) -> Any:
    request = {"subtype": "mcp_message", "server_name": "client", "message": message}
    return {"type": "control_request", "request_id": "r1", "request": request, **keys}


def mcp(event: Any, tools: list[Json] | None = None, result: Json | None = None) -> Json:
    """The answer of the MCP server."""
    response = read(translate.control_answer(event, tools or [], result))["response"]
    assert (response["subtype"], response["request_id"]) == ("success", "r1")
    answer: Json = response["response"]["mcp_response"]
    assert answer["jsonrpc"] == "2.0"
    return answer


def test_the_mcp_server_says_who_it_is_in_the_version_that_the_cli_speaks() -> None:
    event = request_of(
        {"method": "initialize", "id": 0, "params": {"protocolVersion": "2025-11-25"}}
    )
    result = mcp(event)["result"]
    assert result["protocolVersion"] == "2025-11-25"
    assert result["capabilities"] == {"tools": {}}
    assert result["serverInfo"]["name"] == translate.MCP_SERVER


def test_the_mcp_server_lists_its_tools() -> None:
    tools = [translate.listed_tool("a"), translate.listed_tool("b")]
    answer = mcp(request_of({"method": "tools/list", "id": 7}), tools)
    assert (answer["id"], answer["result"]) == (7, {"tools": tools})


def test_a_call_is_answered_with_its_result() -> None:
    result = {"content": [text("sunny")], "isError": False}
    answer = mcp(request_of({"method": "tools/call", "id": 3}), result=result)
    assert (answer["id"], answer["result"]) == (3, result)


def test_a_notification_is_answered_with_nothing() -> None:
    assert mcp(request_of({"method": "notifications/initialized"}))["result"] == {}


def test_other_control_requests_are_refused() -> None:
    for request in ({"subtype": "can_use_tool"}, {}, None, "x", {"message": None}):
        event: Any = {"type": "control_request", "request_id": "r1", "request": request}
        response = read(translate.control_answer(event, []))["response"]
        assert response == {"subtype": "error", "request_id": "r1", "error": "not supported"}


def test_a_call_is_known_by_the_id_of_its_block() -> None:
    meta = {"claudecode/toolUseId": "toolu_1"}
    message = {"method": "tools/call", "params": {"name": "x", "_meta": meta}}
    assert translate.tool_call_id(request_of(message)) == "toolu_1"
    assert translate.mcp_message(request_of(message))["method"] == "tools/call"
    for other in (
        {},
        None,
        {"method": "tools/list"},
        message | {"method": "x"},
        message | {"params": None},
        message | {"params": {"_meta": {"claudecode/toolUseId": 5}}},
    ):
        assert translate.tool_call_id(request_of(other)) == ""
    nothing: Any = {"type": "control_request"}
    assert (translate.tool_call_id(nothing), translate.mcp_message(nothing)) == ("", {})


def test_the_recorded_requests_of_the_cli_are_known() -> None:
    for scenario in ("client_tool", "client_tools_parallel"):
        for turn in first_turns(scenario).values():
            requests: list[Any] = [e for e in turn.events if e["type"] == "control_request"]
            methods = [translate.mcp_message(event)["method"] for event in requests]
            assert methods[0] == "initialize"
            assert "tools/list" in methods
            called = [call for event in requests if (call := translate.tool_call_id(event))]
            assert called == [call["id"] for call in turn.play().translator.calls]
            for event in requests:
                answer = read(translate.control_answer(event, []))["response"]
                assert answer["subtype"] == "success"
                assert answer["request_id"] == event["request_id"]


def test_a_tool_is_listed_for_a_turn_by_its_name_alone_and_is_always_loaded() -> None:
    listed = translate.listed_tool("weather")
    assert (listed["name"], listed["inputSchema"]) == ("weather", {"type": "object"})
    assert listed["_meta"]["anthropic/alwaysLoad"] is True
    assert listed["_meta"]["anthropic/maxResultSizeChars"] > 500_000


def test_names_that_the_conversation_has_called_are_listed_if_there_are_tools() -> None:
    """A toolset has members without an entry of their own."""
    called = [role("user"), role("assistant", [USE, USE_2 | {"name": "member"}])]
    called += user(RESULT, RESULT_2)
    for tools, names in (
        ([TOOL], ["weather", "member"]),
        ([{"name": "bash"}], ["bash", "weather", "member"]),
        ([], []),
        (None, []),
    ):
        request = parsed(called, tools=tools)
        assert translate.tools_for_turn(request) == [translate.listed_tool(name) for name in names]


def test_a_tool_is_listed_for_a_count_as_it_is() -> None:
    schema = {"type": "object", "properties": {"a": {}}}
    tools = [
        {"name": "a", "description": "d", "input_schema": schema},
        {"name": "b", "description": None, "input_schema": 5},
        {"type": "mcp_toolset", "mcp_server_name": "x"},
    ]
    first, second = translate.tools_for_count(parsed(tools=tools))
    assert (first["name"], first["description"], first["inputSchema"]) == ("a", "d", schema)
    assert second == translate.listed_tool("b") | {"description": ""}
    assert translate.tools_for_count(parsed(tools=None)) == []


# ---------------------------------------------------------------- results of tools


SUNNY = {"content": [text("sunny")], "isError": False}
# A result -> as MCP gives it.
RESULTS: dict[str, tuple[Json, Json]] = {
    "string": (RESULT, SUNNY),
    "block": (RESULT | {"content": [text("sunny")]}, SUNNY),
    "blocks": (
        RESULT | {"content": [text("a"), text(" b\n")]},
        {"content": [text("a"), text(" b\n")], "isError": False},
    ),
    "error of a block": (
        RESULT | {"is_error": True, "content": [text("sunny")]},
        SUNNY | {"isError": True},
    ),
    "error": (RESULT | {"is_error": True}, SUNNY | {"isError": True}),
    "no error": (RESULT | {"is_error": False}, SUNNY),
    "white space at the end": (RESULT | {"content": "no\n"}, SUNNY | {"content": [text("no\n")]}),
    "nulls": (RESULT | {"is_error": None, "new": None}, SUNNY),
    "null in a text": (RESULT | {"content": [text("sunny", citations=None)]}, SUNNY),
    "as long as may be": (
        RESULT | {"content": [text("x" * 200_000), text("y" * 200_000)]},
        SUNNY | {"content": [text("x" * 200_000), text("y" * 200_000)]},
    ),
}


@pytest.mark.parametrize(("block", "result"), RESULTS.values(), ids=RESULTS.keys())
def test_a_result_is_handed_over_in_its_process(block: Json, result: Json) -> None:
    assert translate.tool_results([block]) == {"t1": result}


# What only a fresh process can carry.
NOT_HANDED_OVER: dict[str, list[Any]] = {
    "text beside": [RESULT, text("a")],
    "text alone": [text("a")],
    "document": [RESULT | {"content": [PAGE]}],
    "search result": [RESULT | {"content": [FOUND]}],
    "image": [RESULT | {"content": [text("a"), IMAGE]}],
    "image by URL": [RESULT | {"content": [URL_IMAGE]}],
    "nothing": [{"type": "tool_result", "tool_use_id": "t1"}],
    "content of null": [RESULT | {"content": None}],
    "empty string": [RESULT | {"content": ""}],
    "no blocks": [RESULT | {"content": []}],
    "white space": [RESULT | {"content": " \n"}],
    "empty text": [RESULT | {"content": [text("")]}],
    "white space among texts": [RESULT | {"content": [text("a"), text(" ")]}],
    "error of several texts": [RESULT | {"is_error": True, "content": [text("a"), text("b")]}],
    "error with white space at its end": [RESULT | {"is_error": True, "content": "no\n"}],
    "error with white space at its start": [RESULT | {"is_error": True, "content": "\ufeffno"}],
    "error that is too long": [RESULT | {"is_error": True, "content": "x" * 10_001}],
    "error that says nothing": [RESULT | {"is_error": True, "content": ""}],
    "new block": [RESULT | {"content": [{"type": "new"}]}],
    "no block": [RESULT | {"content": [5]}],
    "odd content": [RESULT | {"content": 5}],
    "odd text": [RESULT | {"content": [{"type": "text", "text": 5}]}],
    "too long": [RESULT | {"content": "x" * 400_001}],
    "too long for JavaScript": [RESULT | {"content": "\U0001f600" * 200_001}],
    "too long together": [RESULT | {"content": [text("x" * 200_001)] * 2}],
    "new key": [RESULT | {"new": 1}],
    "breakpoint of the client": [RESULT | CACHED, RESULT_2],
    "new key of a text": [RESULT | {"content": [text("a", new=1)]}],
    "breakpoint inside": [RESULT | {"content": [text("a", **CACHED)]}],
    "new key of an image": [RESULT | {"content": [IMAGE | {"new": 1}]}],
    "new key of a source": [
        RESULT | {"content": [IMAGE | {"source": IMAGE["source"] | {"new": 1}}]}
    ],
    "odd error": [RESULT | {"is_error": "no"}],
}


@pytest.mark.parametrize("blocks", NOT_HANDED_OVER.values(), ids=NOT_HANDED_OVER.keys())
def test_what_mcp_cannot_carry_is_not_handed_over(blocks: list[Any]) -> None:
    assert translate.tool_results(blocks) is None


def test_a_result_that_mcp_cannot_carry_stands_in_a_transcript_as_it_is() -> None:
    alone = [blocks for blocks in NOT_HANDED_OVER.values() if len(blocks) == 1]
    assert len(alone) > 20
    for blocks in alone:
        _, row, _ = translate.transcript([role("user", blocks)], "m")
        assert read(row)["message"]["content"] == blocks


def test_parallel_results_may_come_in_any_order() -> None:
    for blocks in ([RESULT, RESULT_2], [RESULT_2, RESULT]):
        assert translate.tool_results(blocks) == {"t1": SUNNY, "t2": SUNNY}


def test_a_line_of_blanks_in_a_written_file_is_looked_at_once() -> None:
    """Or it would take hours."""
    content = "a" + " " * 1_000_000 + "b \n"
    call: Any = {**USE, "name": "Write", "input": {"file_path": "/x", "content": content}}
    assert translate.cli_input(call)["content"] == content[:-2] + "\n"
