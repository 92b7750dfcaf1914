"""What a request has to be, what passes to the API as sent, and the form in which it goes on."""

import base64
import copy
import json
import re
import typing
from typing import Any

import anthropic.types
import pytest
from client import request_body
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import (
    CACHED,
    FOUND,
    IMAGE,
    JUNK,
    PAGE,
    PDF,
    PNG,
    QUICK,
    REDACTED,
    RESULT,
    THOUGHT,
    TOOL,
    USE,
    parsed,
    places,
    put,
    role,
    text,
    user,
)

import translate
from translate import CANNOT_CONTINUE, ApiError, parse_request

Json = dict[str, Any]


# ---------------------------------------------------------------- refused

UNANSWERED = (
    "`tool_use` ids were found without `tool_result` blocks immediately after: t1. "
    "Each `tool_use` block must have a corresponding `tool_result` block in the next message."
)
TWO_RESULTS = (
    "each tool_use must have a single result. Found multiple `tool_result` blocks with id: t1"
)
ORPHAN = (
    "unexpected `tool_use_id` found in `tool_result` blocks: t1. "
    "Each `tool_result` block must have a corresponding `tool_use` block in the previous message."
)
NO_CONTENT = (
    "all messages must have non-empty content except for the optional final assistant message"
)
NOT_A_MODEL = "model: String should be a model name"
GIF = base64.b64encode(b"GIF89a").decode()
USE_2, RESULT_2 = USE | {"id": "t2"}, RESULT | {"tool_use_id": "t2"}
SERVER_USE = {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {}}
SERVER_RESULT = {"type": "web_search_tool_result", "tool_use_id": "s1", "content": []}


def answered(use: Json, *blocks: Json) -> list[Any]:
    return ["x", role("assistant", [use]), *user(*blocks)]


def image(**source: Any) -> list[Any]:
    return user(IMAGE | {"source": IMAGE["source"] | source})


# What the bridge reads itself: (messages, other fields, how the message begins).
REFUSED: list[tuple[Any, Json, str]] = [
    # fields
    ("x", {"model": ...}, "model: Field required"),
    ("x", {"max_tokens": ...}, "max_tokens: Field required"),
    ("x", {"messages": ...}, "messages: Field required"),
    ("x", {"model": None}, "model: Field required"),
    ("x", {"max_tokens": None}, "max_tokens: Field required"),
    ("x", {"messages": None}, "messages: Field required"),
    ("x", {"model": 5}, "model: Input should be a valid string"),
    ("x", {"model": ""}, NOT_A_MODEL),
    ("x", {"model": "--dangerously"}, NOT_A_MODEL),
    ("x", {"model": "claude-cli/-x"}, NOT_A_MODEL),
    ("x", {"model": "claude-cli/"}, NOT_A_MODEL),
    ("x", {"model": "a b"}, NOT_A_MODEL),
    ("x", {"model": "a\n"}, NOT_A_MODEL),
    ("x", {"model": "a" * 300}, NOT_A_MODEL),
    ("x", {"stream": "yes"}, "stream: Input should be a valid boolean"),
    ("x", {"stream": 1}, "stream: Input should be a valid boolean"),
    ("x", {"messages": "hello"}, "messages: Input should be a valid list"),
    ("x", {"messages": {}}, "messages: Input should be a valid list"),
    ("x", {"system": 5}, "system: Input should be a valid list"),
    ("x", {"system": 0}, "system: Input should be a valid list"),
    ("x", {"system": False}, "system: Input should be a valid list"),
    ("x", {"system": {}}, "system: Input should be a valid list"),
    ("x", {"system": [IMAGE]}, "system.0.type: Input should be 'text'"),
    ("x", {"system": [{"text": "x"}]}, "system.0.type: Input should be 'text'"),
    ("x", {"system": [text("x"), "x"]}, "system.1: Input should be a valid object"),
    ("x", {"system": [{"type": "text"}]}, "system.0.text: Input should be a valid string"),
    ("x", {"tools": "x"}, "tools: Input should be a valid list"),
    ("x", {"tools": {}}, "tools: Input should be a valid list"),
    ("x", {"tools": [TOOL, 5]}, "tools.1: Input should be a valid object"),
    ("x", {"tools": [{"name": 5}]}, "tools.0.name: Input should be a valid string"),
    # messages
    ([], {}, "messages: at least one message is required"),
    ([5], {}, "messages.0: Input should be a valid object"),
    ([{"content": "x"}], {}, "messages.0.role: Input should be a valid string"),
    ([{"role": "user"}], {}, "messages.0.content: Field required"),
    ([role("tool")], {}, "messages.0.role: Input should be 'user' or 'assistant'"),
    ([role(None)], {}, "messages.0.role: Input should be a valid string"),
    ([role(5)], {}, "messages.0.role: Input should be a valid string"),
    (["x", role("user", None)], {}, "messages.1.content: Input should be a valid list"),
    ([role("user", 5)], {}, "messages.0.content: Input should be a valid list"),
    ([role("user", {})], {}, "messages.0.content: Input should be a valid list"),
    # the role `system`
    (
        [role("system"), "x"],
        {},
        'messages: Unexpected role "system". The Messages API accepts a top-level `system`',
    ),
    (
        ["x", "y", role("system")],
        {},
        "messages.2: role 'system' must follow a user turn, and precede an 'assistant'",
    ),
    (
        [role("user"), role("system"), role("user")],
        {},
        "messages.1: role 'system' must follow a user turn, and precede",
    ),
    ([role("user"), role("system"), 5], {}, "messages.1: role 'system' must follow a user turn"),
    (
        [role("user"), role("system", [text(" ")])],
        {},
        "messages: text content blocks must contain non-whitespace text (messages.1)",
    ),
    (
        [role("user"), role("system", [{"type": []}])],
        {},
        "messages.1.content.0.type: Input should be a valid string",
    ),
    ([role("user"), role("system", None)], {}, "messages.1.content: Input should be a valid list"),
    # texts that the CLI would drop
    ([role("user", "")], {}, f"messages.0: {NO_CONTENT}"),
    (["x", role("assistant", []), role("user")], {}, f"messages.1: {NO_CONTENT}"),
    (user(text("")), {}, "messages: text content blocks must be non-empty (messages.0)"),
    (
        user(text("a"), text(" \n")),
        {},
        "messages: text content blocks must contain non-whitespace text (messages.0)",
    ),
    ([role("user", "\t")], {}, "messages: text content blocks must contain non-whitespace text"),
    (
        ["x", role("assistant", [text(" ")]), role("user")],
        {},
        "messages: text content blocks must contain non-whitespace text (messages.1)",
    ),
    # blocks
    (user("x"), {}, "messages.0.content.0: Input should be a valid object"),
    (user({"text": "x"}), {}, "messages.0.content.0.type: Input should be a valid string"),
    (user({"type": []}), {}, "messages.0.content.0.type: Input should be a valid string"),
    (user({"type": "text"}), {}, "messages.0.content.0.text.text: Input should be a valid string"),
    (user(text("a") | {"text": 5}), {}, "messages.0.content.0.text.text: Input should be"),
    # images that the CLI would replace
    (user(IMAGE | {"source": None}), {}, "messages.0.content.0.image.source: Input should be"),
    (image(data="?"), {}, "messages.0.content.0.image.source.base64.data: Input should be valid"),
    (image(data=""), {}, "messages.0.content.0.image.source.base64.data: Input should be valid"),
    (image(data=5), {}, "messages.0.content.0.image.source.base64.data: Input should be a valid"),
    (image(media_type=None), {}, "messages.0.content.0.image.source.base64.media_type: Input"),
    (
        image(data=GIF),
        {},
        "messages.0.content.0.image.source.base64.media_type: The image was specified using the "
        "image/png media type, but appears to be image/gif",
    ),
    # calls of tools and their results
    (user(USE), {}, "messages.0.content.0: `tool_use` blocks can only be in `assistant` messages"),
    (
        ["x", role("assistant", [RESULT]), "y"],
        {},
        "messages.1.content.0: `tool_result` blocks can only be in `user` messages",
    ),
    (answered(USE | {"id": None}, RESULT), {}, "messages.1.content.0.tool_use.id: Input should"),
    (answered(USE | {"name": 5}, RESULT), {}, "messages.1.content.0.tool_use.name: Input should"),
    (
        answered(USE | {"name": "x" * 201}, RESULT),
        {},
        "messages.1.content.0.tool_use.name: String should have at most 200 characters",
    ),
    (
        answered(USE | {"input": "{}"}, RESULT),
        {},
        "messages.1.content.0.tool_use.input: Input should be a valid object",
    ),
    (
        answered(USE, RESULT | {"tool_use_id": 5}),
        {},
        "messages.2.content.0.tool_result.tool_use_id: Input should be a valid string",
    ),
    (user(RESULT), {}, f"messages.0.content.0: {ORPHAN}"),
    (["x", "y", *user(text("a"), RESULT)], {}, f"messages.2.content.1: {ORPHAN}"),
    (
        [*answered(USE, RESULT), role("assistant"), *user(RESULT)],
        {},
        f"messages.4.content.0: {ORPHAN}",
    ),
    (["x", role("assistant", [USE]), "y"], {}, f"messages.2: {UNANSWERED}"),
    (
        ["x", role("assistant", [USE]), role("assistant"), role("user")],
        {},
        "messages.3: `tool_use` ids were found without",
    ),
    (
        answered(USE, RESULT | {"tool_use_id": "t2"}),
        {},
        "messages.2.content.0: unexpected `tool_use_id`",
    ),
    (
        [*answered(USE, RESULT), *answered(USE, RESULT)[1:]],
        {},
        "messages: `tool_use` ids must be unique",
    ),
    (
        ["x", role("assistant", [USE, USE]), *user(RESULT)],
        {},
        "messages: `tool_use` ids must be unique",
    ),
    (
        ["x", role("assistant", [USE, USE_2]), *user(RESULT, RESULT_2, RESULT)],
        {},
        f"messages.2.content.2: {TWO_RESULTS}",
    ),
    (
        ["x", role("assistant", [USE]), *user(RESULT), *user(text("a"), RESULT)],
        {},
        f"messages.3.content.1: {TWO_RESULTS}",
    ),
    (["x", role("assistant", [USE])], {}, f"messages.1: {UNANSWERED}"),
    (
        ["x", "y", role("assistant", [text("a"), USE, text("b")])],
        {},
        f"messages.1: {UNANSWERED}",
    ),
    # an end that cannot be continued
    ([role("assistant", [THOUGHT])], {}, f"messages.0: {CANNOT_CONTINUE}"),
    (["x", role("assistant", [REDACTED])], {}, f"messages.1: {CANNOT_CONTINUE}"),
    (["x", "y", role("assistant", [THOUGHT])], {}, f"messages.2: {CANNOT_CONTINUE}"),
    (["x", role("assistant", [SERVER_USE])], {}, f"messages.1.content.0: {CANNOT_CONTINUE}"),
    (
        ["x", role("assistant", [text("a"), THOUGHT])],
        {},
        f"messages.1.content.1: {CANNOT_CONTINUE}",
    ),
    (
        ["x", role("assistant", [text("a"), SERVER_USE, text("b")])],
        {},
        f"messages.1.content.1: {CANNOT_CONTINUE}",
    ),
    (
        ["x", role("assistant", [text("a"), {"type": "fallback"}])],
        {},
        f"messages.1.content.1: {CANNOT_CONTINUE}",
    ),
]


@pytest.mark.parametrize(
    ("messages", "fields", "words"), REFUSED, ids=[words[:50] for _, _, words in REFUSED]
)
def test_what_the_bridge_reads_itself_is_checked_in_the_apis_words(
    messages: Any, fields: Json, words: str
) -> None:
    with pytest.raises(ApiError) as caught:
        parsed(messages, **fields)
    error = caught.value
    assert (error.status, error.error_type, error.can_retry) == (
        400,
        "invalid_request_error",
        False,
    )
    assert error.message.startswith(words)


@pytest.mark.parametrize("more", [0, 4])
def test_an_image_may_have_five_mebibytes_of_base64(more: int) -> None:
    begun = PNG.replace("=", "A")
    data = begun + "A" * ((5 << 20) - len(begun) + more)
    if not more:
        assert parsed(image(data=data)).messages == image(data=data)
        return
    with pytest.raises(ApiError) as caught:
        parsed(image(data=data))
    assert caught.value.status == 400
    assert caught.value.message == (
        "messages.0.content.0.image.source.base64: "
        "image exceeds 5 MB maximum: 5242884 bytes > 5242880 bytes"
    )


def test_a_count_needs_no_max_tokens() -> None:
    body = json.dumps(request_body("x", max_tokens=...)).encode()
    assert "max_tokens" not in parse_request(body, counting=True).fields
    with pytest.raises(ApiError, match="max_tokens: Field required"):
        parse_request(body)


@pytest.mark.parametrize("header", ["a b", "a;\x7f", "é", "a,b c"])
def test_a_header_of_betas_holds_visible_ascii(header: str) -> None:
    with pytest.raises(ApiError, match="anthropic-beta: names are visible ASCII") as caught:
        parsed(header=header)
    assert caught.value.status == 400


def test_threads_are_declined_with_the_code_that_makes_the_sdks_send_the_history() -> None:
    for thread in ({"type": "create"}, {"type": "continue", "previous_message_id": "x"}, {}, False):
        with pytest.raises(ApiError) as caught:
            parsed(thread=thread)
        error = caught.value.body("r")["error"]
        assert error["details"] == {"error_code": "thread_unsupported_request"}
        assert error["type"] == "invalid_request_error"


# ---------------------------------------------------------------- JSON and its limits


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1",
        b"\xff",
        b'"\xff"',
        b"{'a': 1}",
        b'{"a": NaN}',
        b'{"a": 1e999}',
        b'{"a": "\\ud83d"}',
        b"[" * 20000,
        b"9" * 5000,
    ],
)
def test_a_body_that_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError, match="The request body is not valid JSON: ") as caught:
        parse_request(body)
    assert caught.value.status == 400


@pytest.mark.parametrize("body", [b"[]", b"null", b'"x"', b"5"])
def test_a_body_that_is_not_an_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError, match="not a JSON object") as caught:
        parse_request(body)
    assert caught.value.status == 400


def test_the_depth_of_a_body_has_a_limit() -> None:
    def asked(levels: int) -> bytes:
        schema = json.loads('{"type":"object","a":' * levels + "1" + "}" * levels)
        tool = {"name": "t", "input_schema": schema}
        return json.dumps(request_body("hi", tools=[tool])).encode()

    assert parse_request(asked(197)).tool_names  # three levels around the schema
    with pytest.raises(ApiError, match="body: JSON of more than 200 levels"):
        parse_request(asked(198))


def test_a_body_of_long_numbers_that_is_nested_too_deeply_is_refused() -> None:
    body = b'{"a":%d,"b":%b}' % (10**30, b"[" * 1000 + b"]" * 1000)
    with pytest.raises(ApiError, match="body: JSON of more than 200 levels"):
        parse_request(body)


def test_a_text_without_an_end_is_looked_at_once() -> None:
    """Or it would take hours."""
    body = b"[" + b"," * 100_001 + b'"' + b'\\"' * 1_000_000
    with pytest.raises(ApiError, match="body: more than 100000 JSON values"):
        parse_request(body)


def test_the_number_of_values_has_a_limit() -> None:
    for value in (
        [0] * 100_000,
        [[]] * 50_000,
        [{}] * 50_000,
        {str(n): 0 for n in range(100_000)},
    ):
        body = json.dumps(request_body("hi", new=value)).encode()
        with pytest.raises(ApiError, match="body: more than 100000 JSON values"):
            parse_request(body)


@settings(max_examples=60, **QUICK)
@given(st.lists(st.text('"\\\\[,x', max_size=5), max_size=4), st.integers(995, 1005))
def test_an_escape_at_the_end_of_a_piece_is_no_quote(texts: list[str], length: int) -> None:
    """A large body is looked at in pieces."""
    said = ["x" * length + text for text in texts]
    padding = [" " * 100_000, "[" * 200_000]
    assert not translate.has_more_values(json.dumps([*said, *padding]).encode())
    values = [0] * 100_001
    assert translate.has_more_values(json.dumps([*said, *padding, values]).encode())


@pytest.mark.parametrize("value", ["x,", "[{,", '",', '\\",', "\\\\,"], ids=repr)
def test_what_a_text_holds_is_no_value(value: str) -> None:
    message = value * 200_000
    body = json.dumps(request_body(message)).encode()
    assert parse_request(body).messages == user(text(message))


def test_integers_of_64_bits_keep_their_digits_and_longer_ones_are_floats_as_for_the_cli() -> None:
    for number, kept in ((2**64 - 1, 2**64 - 1), (-(2**63), -(2**63)), (10**30 + 7, 1e30)):
        use = USE | {"input": {"n": [number]}}
        request = parsed(answered(use, RESULT), new={"n": number})
        for found in (
            request.messages[1]["content"][0]["input"]["n"][0],
            request.fields["new"]["n"],
        ):
            assert (found, type(found)) == (kept, type(kept))


# ---------------------------------------------------------------- what the API judges

SCHEMA = {"type": "json_schema", "schema": {"type": "object"}}
# Fields that go to the API as sent, right or wrong.
FIELDS: dict[str, Json] = {
    "new fields": {"new_field": 1, "foo": {"bar": []}},
    "nulls": dict.fromkeys(
        [
            "temperature",
            "top_p",
            "top_k",
            "stop_sequences",
            "service_tier",
            "thinking",
            "output_config",
            "tools",
            "tool_choice",
            "container",
            "mcp_servers",
            "thread",
            "cache_control",
            "speed",
        ]
    ),
    "sampling": {"temperature": 0, "top_p": 1, "top_k": 0, "stop_sequences": []},
    "ranges": {"temperature": 9, "top_p": -1, "top_k": -1, "stop_sequences": [""]},
    "types": {"temperature": "hot", "top_k": 1.5, "stop_sequences": 5, "service_tier": "gold"},
    "a long answer": {"max_tokens": 10**9},
    "less than nothing": {"max_tokens": -1},
    "not even a number": {"max_tokens": "5"},
    "thinking": {"thinking": {"type": "enabled", "budget_tokens": 5}},
    "new thinking": {"thinking": {"type": "new"}, "output_config": {"effort": "most"}},
    "no thinking": {"thinking": True},
    "format": {"output_config": {"format": SCHEMA}, "output_format": SCHEMA},
    "tool_choice": {"tool_choice": {"type": "tool", "name": "nobody"}},
    "no tool_choice": {"tool_choice": "auto"},
    "MCP": {"mcp_servers": [{"type": "url", "url": "http://x", "name": "x"}]},
    "container": {"container": {"skills": []}},
    "cache_control": {"cache_control": {"type": "ephemeral", "ttl": "1h"}},
    "context_management": {"context_management": {"edits": [{"type": "clear_thinking_20251015"}]}},
    "diagnostics": {"diagnostics": {"previous_message_id": None}},
    "tools": {"tools": [TOOL | CACHED, {"type": "web_search_20250305", "name": "web_search"}]},
    "odd tools": {"tools": [{}, {"type": "new", "name": None}, TOOL, TOOL | {"input_schema": 5}]},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS.keys())
def test_fields_that_the_bridge_does_not_read_go_to_the_api_as_sent(fields: Json) -> None:
    request = parsed(**fields)
    sent = {name: value for name, value in fields.items() if name != "tools" or value}
    assert request.fields == {"max_tokens": 1024, **sent}
    assert request.messages == user(text("hello"))
    assert (request.model, request.system, request.stream) == ("sonnet", [], False)
    assert request.not_sent == []


def test_what_the_bridge_says_to_the_cli_in_other_ways_is_no_part_of_the_body() -> None:
    request = parsed(system="a", stream=True, metadata={"user_id": "x"}, betas=["b"])
    assert request.fields == {"max_tokens": 1024}
    assert (request.system, request.stream) == (["a"], True)


URL = {"type": "url", "url": "http://x"}
FILE = {"type": "file", "file_id": "f"}
# Blocks of a user that go to the API as sent.
BLOCKS: dict[str, Json] = {
    "image": IMAGE,
    "image by URL": {"type": "image", "source": URL},
    "image of a file": {"type": "image", "source": FILE},
    "image of a new type": IMAGE | {"source": IMAGE["source"] | {"media_type": "image/png"}},
    "image of a new source": {"type": "image", "source": {"type": "new", "x": 1}},
    "image of no known data": {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/bmp", "data": "AAAA"},
    },
    "PDF": PDF,
    "PDF by URL": {"type": "document", "source": URL},
    "document of nothing": {"type": "document"},
    "page": PAGE,
    "page with citations": PAGE | {"citations": {"enabled": True}},
    "search result": FOUND,
    "upload": {"type": "container_upload", "file_id": "f"},
    "new block": {"type": "new", "x": [{"y": None}]},
    "null": text("a", citations=None, parsed_output=None),
    "new key": text("a", new_key=[1]),
    "content key of its own": text("a", content=[1], source={"content": 5}),
    "tool_use_id of its own": text("a", tool_use_id="t1", id=5),
    "tool_use of its own": {"type": "mcp_tool_result", "tool_use_id": 5},
}


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS.keys())
def test_blocks_of_a_user_pass_as_sent(block: Json) -> None:
    request = parsed(user(block, text("b")))
    assert request.messages == user(block, text("b"))
    assert request.not_sent == []


# Blocks of an assistant that go to the API as sent.
SAID: dict[str, list[Json]] = {
    "thinking": [THOUGHT, REDACTED, text("b")],
    "thinking without signature": [{"type": "thinking", "thinking": "x"}, text("b")],
    "server's tools": [SERVER_USE, SERVER_RESULT, text("b", citations=[{"type": "new"}])],
    "server's call alone": [SERVER_USE],
    "odd ids": [SERVER_USE | {"id": []}, SERVER_RESULT | {"tool_use_id": {}}, text("b")],
    "image": [IMAGE],
    "new block": [{"type": "new"}],
}


@pytest.mark.parametrize("blocks", SAID.values(), ids=SAID.keys())
def test_blocks_of_an_assistant_pass_as_sent(blocks: list[Json]) -> None:
    messages = parsed(["a", role("assistant", blocks), "c"]).messages
    assert messages[1] == role("assistant", blocks)


# Assistant messages that end a conversation, and that the answer continues.
CONTINUED: dict[str, list[Json]] = {
    "prefill": [text("The answer is")],
    "prefill behind thinking": [THOUGHT, text("{")],
    "pause of a server's tool": [text("a"), SERVER_USE, SERVER_RESULT],
    "new block": [{"type": "new"}],
}


@pytest.mark.parametrize("blocks", CONTINUED.values(), ids=CONTINUED.keys())
def test_an_answer_continues_the_assistant_message_that_ends_a_conversation(
    blocks: list[Json],
) -> None:
    for messages in (
        ["a", role("assistant", blocks)],
        [role("user", "a"), role("system"), role("assistant", blocks)],
        [*answered(USE, RESULT), role("assistant", blocks)],
        [role("assistant", blocks)],
    ):
        request = parsed(messages)
        assert request.continues
        assert request.messages[-1] == role("assistant", blocks)
        assert set(request.not_sent) <= {"messages.1.role"}


def test_an_answer_continues_nothing_where_the_user_has_the_last_word() -> None:
    for messages in (
        "a",
        ["a", "b", "c"],
        answered(USE, RESULT),
        [role("user"), role("system")],
        [role("user"), "b", role("user"), role("system", [])],
    ):
        assert not parsed(messages).continues


def test_assistant_messages_at_the_end_are_continued_as_one() -> None:
    request = parsed(["a", "b", role("assistant", [SERVER_USE, SERVER_RESULT])])
    assert request.messages[1:] == [role("assistant", [text("b"), SERVER_USE, SERVER_RESULT])]
    assert request.continues


# What a tool_use and its tool_result may hold, besides.
EXCHANGES: dict[str, tuple[Json, list[Json]]] = {
    "string": (USE, [RESULT]),
    "nulls": (USE | {"caller": None}, [RESULT | {"is_error": None, "content": None}]),
    "nothing": (USE, [{"type": "tool_result", "tool_use_id": "t1"}]),
    "error": (USE, [RESULT | {"is_error": True}]),
    "odd error": (USE, [RESULT | {"is_error": "no"}]),
    "blocks": (USE, [RESULT | {"content": [text("x", citations=None), IMAGE, FOUND, PDF]}]),
    "empty text": (USE, [RESULT | {"content": [text("")]}]),
    "odd image": (USE, [RESULT | {"content": [IMAGE | {"source": URL}]}]),
    "odd content": (USE, [RESULT | {"content": 5}]),
    "no blocks": (USE, [RESULT | {"content": [5, USE]}]),
    "text behind": (USE, [RESULT, text("b")]),
    "text before": (USE, [text("b"), RESULT]),
    "odd name": (USE | {"name": ""}, [RESULT]),
    "long name": (USE | {"name": "x" * 200}, [RESULT]),
}


@pytest.mark.parametrize(("use", "blocks"), EXCHANGES.values(), ids=EXCHANGES.keys())
def test_calls_and_results_pass_as_sent(use: Json, blocks: list[Json]) -> None:
    request = parsed(answered(use, *blocks))
    assert request.messages == [*user(text("x")), role("assistant", [use]), *user(*blocks)]


# ---------------------------------------------------------------- the form in which it goes on

MODELS = {
    "claude-cli/sonnet": "sonnet",
    "sonnet": "sonnet",
    "sonnet[1m]": "sonnet[1m]",
    "claude-haiku-4-5-20251001": "claude-haiku-4-5-20251001",
    "claude-opus-4@20250514": "claude-opus-4@20250514",
    "us.anthropic.claude-sonnet-4-20250514-v1:0": "us.anthropic.claude-sonnet-4-20250514-v1:0",
    "arn:aws:bedrock:us-east-1:1:inference-profile/x": (
        "arn:aws:bedrock:us-east-1:1:inference-profile/x"
    ),
    "claude-cli/claude-cli/x": "claude-cli/x",
}


@pytest.mark.parametrize(("name", "model"), MODELS.items())
def test_a_model_name_loses_the_bridges_prefix_and_nothing_else(name: str, model: str) -> None:
    assert parsed(model=name).model == model


ADDED = {"type": "tool_addition", "tool": {"type": "tool_reference", "tool_name": "x"}}
REMINDER = "<system-reminder>\nx\n</system-reminder>"
# name -> (messages, their normal form as (role, blocks))
NORMAL: dict[str, tuple[Any, list[tuple[str, list[Json]]]]] = {
    "string": (
        ["a"],
        [("user", [text("a")])],
    ),
    "same role": (
        [role("user", "a"), role("user", [text("b")])],
        [("user", [text("a"), text("b")])],
    ),
    "same role of an assistant": (
        ["a", role("assistant", "b"), role("assistant", "c"), role("user", "d")],
        [("user", [text("a")]), ("assistant", [text("b"), text("c")]), ("user", [text("d")])],
    ),
    "assistant first": (
        [role("assistant", "a"), role("user", "b")],
        [("assistant", [text("a")]), ("user", [text("b")])],
    ),
    "system role at the end": (
        [role("user", "a"), role("system")],
        [("user", [text("a"), text(REMINDER)])],
    ),
    "system role of blocks": (
        [role("user", "a"), role("system", [text("x", **CACHED)])],
        [("user", [text("a"), text(REMINDER)])],
    ),
    "system role of settings alone": (
        [role("user", "a"), role("system", ""), role("assistant", "b"), role("user", "c")],
        [("user", [text("a")]), ("assistant", [text("b")]), ("user", [text("c")])],
    ),
    "system role without blocks": (
        [role("user", "a"), role("system", [])],
        [("user", [text("a")])],
    ),
    "system role without a text": (
        [role("user", "a"), role("system", [ADDED, IMAGE])],
        [("user", [text("a")])],
    ),
    "system role of a text among other blocks": (
        [role("user", "a"), role("system", [ADDED, text("x"), ADDED])],
        [("user", [text("a"), text(REMINDER)])],
    ),
    "system role of several blocks": (
        [role("user", "a"), role("system", [text("x"), text("y")])],
        [("user", [text("a"), text(REMINDER.replace("x", "x\ny"))])],
    ),
    "system role before an assistant": (
        [role("user", "a"), role("system"), role("assistant", "b"), role("user", "c")],
        [
            ("user", [text("a"), text(REMINDER)]),
            ("assistant", [text("b")]),
            ("user", [text("c")]),
        ],
    ),
    "parallel tools, other order, text behind": (
        ["a", role("assistant", [USE, USE_2]), *user(RESULT_2, RESULT, text("b"))],
        [
            ("user", [text("a")]),
            ("assistant", [USE, USE_2]),
            ("user", [RESULT_2, RESULT, text("b")]),
        ],
    ),
    "results in two messages": (
        ["a", role("assistant", [USE, USE_2]), *user(RESULT), *user(RESULT_2)],
        [
            ("user", [text("a")]),
            ("assistant", [USE, USE_2]),
            ("user", [RESULT, RESULT_2]),
        ],
    ),
    "thinking alone": (
        ["a", role("assistant", [THOUGHT, REDACTED]), role("user", "b")],
        [("user", [text("a"), text("b")])],
    ),
    "call and result, and the system's role between them and the answer": (
        [*answered(USE, RESULT), role("system"), role("assistant", "b"), role("user", "c")],
        [
            ("user", [text("x")]),
            ("assistant", [USE]),
            ("user", [RESULT, text(REMINDER)]),
            ("assistant", [text("b")]),
            ("user", [text("c")]),
        ],
    ),
}


@pytest.mark.parametrize(("messages", "normal"), NORMAL.values(), ids=NORMAL.keys())
def test_messages_are_brought_into_one_form(
    messages: Any, normal: list[tuple[str, list[Json]]]
) -> None:
    assert parsed(messages).messages == [role(name, blocks) for name, blocks in normal]


SYSTEMS: list[tuple[Any, list[str]]] = [
    (None, []),
    ("", []),
    ([], []),
    ("Be terse.", ["Be terse."]),
    ([text("a", **CACHED), text("b"), text("")], ["a", "b"]),
    ([text("x-anthropic-billing-header: cc_version=2; cch=abc;"), text("a")], ["a"]),
]


@pytest.mark.parametrize(("system", "texts"), SYSTEMS)
def test_a_system_prompt_is_its_texts_without_the_billing_line(
    system: Any, texts: list[str]
) -> None:
    assert parsed(system=system).system == texts


def test_betas_are_the_header_in_one_order_and_each_once() -> None:
    for header in ("b-2,a-1", "a-1, b-2", " b-2 ,,a-1,b-2,"):
        assert parsed(header=header).betas == "a-1,b-2"
    assert parsed().betas == ""


def test_the_id_of_the_user_is_that_of_the_metadata() -> None:
    assert parsed(metadata={"user_id": "x"}).user_id == "x"
    for odd in (..., None, {}, {"user_id": None}, {"user_id": 5}, "x"):
        assert parsed(metadata=odd).user_id == ""


def test_the_size_is_that_of_the_body() -> None:
    body = json.dumps(request_body("hi")).encode()
    assert parse_request(body).size == len(body)


# ---------------------------------------------------------------- tools

BASH = {"type": "bash_20250124", "name": "bash"}


def test_tools_keep_their_names_and_their_order() -> None:
    tools = [TOOL, BASH, TOOL | {"name": "mcp__client__x"}, TOOL]
    assert parsed(tools=tools).tool_names == ["weather", "bash", "mcp__client__x"]
    assert parsed(tools=None).tool_names == parsed(tools=[]).tool_names == parsed().tool_names == []


def test_a_tool_without_a_name_is_called_by_those_of_its_members() -> None:
    computer = parsed(tools=[{"type": "computer_toolset_20260801"}]).tool_names
    assert {"screenshot", "left_click", "type"} < set(computer)
    browser = parsed(tools=[{"type": "browser_toolset_20260801"}, TOOL]).tool_names
    assert {"navigate", "screenshot", "weather"} < set(browser)
    assert parsed(tools=[{"type": "mcp_toolset", "mcp_server_name": "x"}]).tool_names == []


@pytest.mark.parametrize("kind", ["computer", "browser"])
def test_the_members_of_a_toolset_are_those_that_the_sdk_knows(kind: str) -> None:
    members = getattr(anthropic.types, f"{kind}_member_name")
    known = typing.get_args(getattr(members, f"{kind.title()}MemberName"))
    assert set(translate.TOOLSETS[f"{kind}_toolset_"].split()) == set(known)


DEFERRED = TOOL | {"defer_loading": True}
REFERENCE = {"type": "tool_reference", "tool_name": "weather"}


def test_a_tool_that_a_reference_has_loaded_is_deferred_no_more() -> None:
    """The CLI leaves the references out, and the model would never see the tool."""
    tools = [DEFERRED, DEFERRED | {"name": "other"}, BASH]
    loaded = parsed(answered(USE, RESULT | {"content": [REFERENCE, text("a")]}), tools=tools)
    assert loaded.fields["tools"] == [TOOL, *tools[1:]]
    assert loaded.messages[-1]["content"] == [
        RESULT | {"content": [text("Tool loaded: weather"), text("a")]}
    ]
    assert parsed(answered(USE, RESULT), tools=tools).fields["tools"] == tools


def test_of_the_result_of_an_error_its_texts_arrive() -> None:
    content = [text("a"), IMAGE, text("b"), PAGE]
    request = parsed(answered(USE, RESULT | {"is_error": True, "content": content}))
    assert request.messages[-1]["content"] == [
        RESULT | {"is_error": True, "content": [text("a"), text("b")]}
    ]


# ---------------------------------------------------------------- cache breakpoints

DOCUMENT = {"type": "document", "source": {"type": "content", "content": [text("x", **CACHED)]}}
HOUR: Json = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
CALLS = ["x", role("assistant", [USE, USE_2])]
SEVERAL = [text("a", **CACHED), text("b", **CACHED)]
# name -> (messages, other fields, how long those of the CLI are kept, whether they fail
# to stand for some)
CLI: dict[str, tuple[Any, Json, str, bool]] = {
    "none": ("hello", {}, "", False),
    "null inside a message": (user(text("a", cache_control=None), text("b")), {}, "", False),
    # where the CLI has its own
    "end of a message": (user(text("a"), text("b", **CACHED)), {}, "5m", False),
    "end of each message of the user": (
        [*user(text("a", **CACHED)), "b", *user(text("c", **CACHED))],
        {},
        "5m",
        False,
    ),
    "result at the end": ([*CALLS, *user(RESULT, RESULT_2 | CACHED)], {}, "5m", False),
    "each of the results at the end": (
        [*CALLS, *user(RESULT | CACHED, RESULT_2 | CACHED)],
        {},
        "5m",
        False,
    ),
    "result before one at the end": (
        [*CALLS, *user(RESULT | CACHED, RESULT_2)],
        {},
        "5m",
        False,
    ),
    "results at the end behind a text": (
        [*CALLS, *user(text("a"), RESULT | CACHED, RESULT_2)],
        {},
        "5m",
        False,
    ),
    "text behind the results": (
        [*CALLS, *user(RESULT, RESULT_2, text("a", **CACHED))],
        {},
        "5m",
        False,
    ),
    "end of the system": ("hello", {"system": [text("a"), text("b", **CACHED)]}, "5m", False),
    # what goes to the API as sent, and leaves the CLI room
    "one tool": ("hello", {"tools": [TOOL, TOOL | CACHED]}, "5m", False),
    "the whole request": ("hello", CACHED, "5m", False),
    # where the CLI has none
    "assistant": ([role("user"), role("assistant", SEVERAL), role("user")], {}, "5m", True),
    "system": ("hello", {"system": SEVERAL}, "5m", True),
    "start of the system": (
        "hello",
        {"system": [text("a", **CACHED), text("b")]},
        "5m",
        True,
    ),
    "inside a result": (
        answered(USE, RESULT | {"content": [text("x", **CACHED), text("y")]}),
        {},
        "5m",
        True,
    ),
    "inside a document": (user(DOCUMENT, text("a")), {}, "5m", True),
    "role of the system": ([role("user"), role("system", SEVERAL)], {}, "", True),
    # how long they are kept
    "message for an hour": (user(text("a", **HOUR)), {}, "1h", False),
    "system for an hour": ("hello", {"system": [text("a", **HOUR)]}, "1h", False),
    "tool for an hour": ("hello", {"tools": [TOOL | HOUR]}, "1h", False),
    "whole request for an hour": ("hello", HOUR, "1h", False),
    "all for an hour": (
        user(text("a", **HOUR)),
        {"system": [text("a", **HOUR)], **HOUR},
        "1h",
        False,
    ),
    "message for another time": (
        user(text("a", cache_control={"type": "ephemeral", "ttl": "5m"})),
        {},
        "5m",
        False,
    ),
    "system longer than the message": (
        user(text("a", **CACHED)),
        {"system": [text("a", **HOUR)]},
        "5m",
        True,
    ),
}
# name -> (messages, other fields, whether some are lost)
CLIENT: dict[str, tuple[Any, Json, bool]] = {
    "inside a message": (user(PAGE | CACHED, text("b")), {}, False),
    "inside an early message": (
        [*user(text("a", **CACHED), text("b")), role("assistant"), role("user")],
        {},
        False,
    ),
    "result before a text": ([*CALLS, *user(RESULT, RESULT_2 | CACHED, text("a"))], {}, False),
    "text before a result": (answered(USE, text("a", **CACHED), RESULT), {}, False),
    "inside a message for an hour": (user(PAGE | HOUR, text("b", **CACHED)), {}, False),
    "inside a message, a document and a result": (
        [
            *user(DOCUMENT | CACHED, text("b")),
            role("assistant", [text("a", **CACHED), USE]),
            *user(RESULT | {"content": [text("x", **CACHED)]}),
        ],
        {},
        False,
    ),
    "two tools": ("hello", {"tools": [TOOL | CACHED, BASH | CACHED]}, False),
    "a tool and the whole request": ("hello", {"tools": [TOOL | CACHED], **CACHED}, False),
    "inside a message and on the system": (
        user(PAGE | CACHED, text("b")),
        {"system": [text("a", **CACHED)]},
        True,
    ),
}


@pytest.mark.parametrize(("messages", "fields", "ttl", "is_lossy"), CLI.values(), ids=CLI.keys())
def test_breakpoints_where_the_cli_sets_its_own_are_left_to_it(
    messages: Any, fields: Json, ttl: str, is_lossy: bool
) -> None:
    request = parsed(messages, **fields)
    assert (request.caching, request.ttl) == ("cli", ttl)
    assert '"cache_control"' not in json.dumps(request.messages)
    lost = [place for place in request.not_sent if place.endswith("cache_control")]
    assert bool(lost) == is_lossy


@pytest.mark.parametrize(("messages", "fields", "is_lossy"), CLIENT.values(), ids=CLIENT.keys())
def test_other_breakpoints_are_the_clients(messages: Any, fields: Json, is_lossy: bool) -> None:
    request = parsed(messages, **fields)
    assert (request.caching, request.ttl) == ("client", "")
    if messages != "hello":
        assert [message["content"] for message in request.messages] == [
            [text("x")] if isinstance(content, str) else content
            for content in (m if isinstance(m, str) else m["content"] for m in messages)
        ]
    assert request.not_sent == ["cache_control"] * is_lossy


def test_the_breakpoints_of_tools_and_of_the_whole_request_go_to_the_api() -> None:
    for fields in ({"tools": [TOOL | CACHED]}, CACHED):
        assert parsed(**fields).fields == {"max_tokens": 1024, **fields}


def test_breakpoints_are_found_where_blocks_stand_and_nowhere_else() -> None:
    inner = {"type": "document", "source": {"type": "content", "content": [text("x", **CACHED)]}}
    use = USE | {"input": {"cache_control": 1, "content": [CACHED]}}
    result = RESULT | {"content": [inner, text("y", **CACHED)], **CACHED}
    request = parsed([role("user"), role("assistant", [use | CACHED]), *user(result)])
    assert request.messages[1]["content"] == [use]
    bare = {"type": "document", "source": {"type": "content", "content": [text("x")]}}
    assert request.messages[2]["content"] == [RESULT | {"content": [bare, text("y")]}]


# ---------------------------------------------------------------- what cannot arrive as sent

FALLBACK = {"type": "fallback"}
ADVICE = {"type": "advisor_tool_result", "tool_use_id": "s1"}
# (messages, other fields, not_sent)
LOST: dict[str, tuple[Any, Json, list[str]]] = {
    "metadata": ("x", {"metadata": {"user_id": "x"}}, ["metadata"]),
    "betas": ("x", {"betas": ["x-2026"]}, ["betas"]),
    "nothing": ("x", {"metadata": None, "betas": None, "system": "a"}, []),
    "billing line": (
        "x",
        {"system": [text("x-anthropic-billing-header: cch=1;"), text("a")]},
        ["system.0"],
    ),
    "role": ([role("user"), role("system")], {}, ["messages.1.role"]),
    "blocks of the system without text": (
        [role("user"), role("system", [ADDED, text("a"), IMAGE | {"new": 1}])],
        {},
        ["messages.1.role", "messages.1.content.0", "messages.1.content.2"],
    ),
    "settings of the system": (
        [role("user"), role("system", []) | {"output_config": {"effort": "low"}}],
        {},
        ["messages.1.role", "messages.1.output_config"],
    ),
    "thinking alone": (["x", role("assistant", [THOUGHT]), role("user")], {}, ["messages.1"]),
    "mark of a fallback alone": (
        ["x", role("assistant", [REDACTED, FALLBACK]), role("user")],
        {},
        ["messages.1"],
    ),
    "mark of a fallback": (
        ["x", role("assistant", [text("a")]), role("assistant", [FALLBACK]), role("user")],
        {},
        ["messages.2"],
    ),
    "mark of a fallback among texts": (
        ["x", role("assistant", [text("a"), FALLBACK, text("b")]), role("user")],
        {},
        ["messages.1.content.1"],
    ),
    "server's call that waits": (
        [
            "x",
            role("assistant", [text("a")]),
            role("assistant", [SERVER_USE, SERVER_RESULT, SERVER_USE | {"id": "s2"}, USE]),
            *user(RESULT),
        ],
        {},
        ["messages.2.content.2"],
    ),
    "several": (
        [role("user"), role("system") | {"id": 2}],
        {"metadata": {}},
        ["metadata", "messages.1.role", "messages.1.id"],
    ),
    "keys that the API refuses itself": (
        [role("user") | {"name": "x"}, role("system", [text("b", new=1)])],
        {"system": [text("a", citations=[{"type": "new"}], new=1)]},
        ["messages.1.role"],
    ),
    "key of a call": (
        answered(USE | {"caller": {"type": "code_execution_20250825"}}, RESULT),
        {},
        ["messages.1.content.0.caller"],
    ),
    "advice": (
        [
            "x",
            role("assistant", [SERVER_USE | {"name": "advisor"}, ADVICE, text("b")]),
            role("user"),
        ],
        {},
        ["messages.1.content.0", "messages.1.content.1"],
    ),
    "image of an error": (
        answered(USE, RESULT | {"is_error": True, "content": [text("a"), IMAGE]}),
        {},
        ["messages.2.content.0.content.1"],
    ),
    "reference to a tool": (
        answered(USE, RESULT | {"content": [REFERENCE]}),
        {"tools": [BASH, DEFERRED]},
        ["messages.2.content.0.content.0", "tools.1.defer_loading"],
    ),
    "null of a message": ([role("user") | {"name": None}], {}, []),
    "the CLI's own words for nothing": (
        [role("user", "(no content)"), role("assistant", "(no content)"), role("user")],
        {},
        ["messages.1.content.0"],
    ),
    "breakpoint of the system, beside the client's own": (
        [role("user", [text("a", **CACHED), text("b")]), role("system", [text("c", **CACHED)])],
        {},
        ["messages.1.role", "messages.1.content.0.cache_control"],
    ),
    "breakpoint in a document of a result": (
        answered(
            USE,
            RESULT
            | {
                "content": [
                    {
                        "type": "document",
                        "source": {"type": "content", "content": [text("a", **CACHED)]},
                    }
                ]
            },
        ),
        {},
        ["cache_control"],
    ),
}


@pytest.mark.parametrize(("messages", "fields", "not_sent"), LOST.values(), ids=LOST.keys())
def test_what_cannot_arrive_as_sent_is_named_once(
    messages: Any, fields: Json, not_sent: list[str]
) -> None:
    assert parsed(messages, **fields).not_sent == not_sent


@pytest.mark.parametrize("name", ["a\r\nx-evil: 1", "é", "\U0001f600", "a, b", ""], ids=ascii)
def test_what_is_named_fits_into_a_header(name: str) -> None:
    # Or the request ends as a 500.
    places = parsed([role("user"), role("system") | {name: 1}]).not_sent
    assert len(places) == 2
    for place in places:
        assert re.fullmatch(r"[\x21-\x2b\x2d-\x7e]+", place)


# ---------------------------------------------------------------- mutations

FULL_BODY = request_body(
    [
        *user(text("look", **CACHED), IMAGE, PAGE, PDF, FOUND),
        role("assistant", [THOUGHT, text("a"), USE, USE_2]),
        *user(RESULT, RESULT_2 | {"content": [text("x"), IMAGE], "is_error": True}),
        role("system", [text("s")]),
        role("assistant", "b"),
        role("user", [DOCUMENT]),
        role("system", "x"),
    ],
    system=[text("a", **CACHED)],
    tools=[TOOL | CACHED, BASH, {"type": "computer_toolset_20260801"}],
    stream=True,
    thinking={"type": "adaptive"},
    output_config={"effort": "low", "format": SCHEMA},
    stop_sequences=["END"],
    temperature=0.5,
    metadata={"user_id": "x"},
)
DEEP = json.loads("[" * 240 + "]" * 240)


def use_whole(body: bytes, betas: str = "") -> None:
    """Parse a body; a valid one must survive all that the bridge does with it."""
    request, refusal = None, None
    try:
        request = parse_request(body, betas)
    except ApiError as error:
        refusal = error
    if request is None:
        assert refusal
        assert (refusal.status, bool(refusal.message)) == (400, True)
        translate.frame(refusal.body("r"))
        return
    assert request.continues == (request.messages[-1]["role"] == "assistant")
    pairs = zip(request.messages, request.messages[1:], strict=False)
    assert all(before["role"] != after["role"] for before, after in pairs)
    settings = translate.turn_environment(request, has_listed_tools=True)
    assert json.loads(settings["CLAUDE_CODE_EXTRA_BODY"])["tools"] is not None
    translate.settings_line(settings)
    translate.initialize_line(request.system, has_tools=bool(request.tool_names))
    list(map(translate.listed_tool, request.tool_names))
    translate.tools_for_count(request)
    translate.transcript(request.messages, request.model)
    newest = request.messages[-1]["content"]
    translate.user_line(newest, "id")
    translate.has_images(newest)
    translate.tool_results(newest, ["t1", "t2"])


def test_the_body_that_is_mutated_is_valid() -> None:
    request = parse_request(json.dumps(FULL_BODY).encode())
    assert (len(request.messages), request.caching) == (5, "client")


EXTRA = ("content", "tool_use_id", "source", "type", "id", "cache_control", "name", "new")
MUTATIONS = st.lists(
    st.tuples(
        st.integers(0, 10**6),
        st.sampled_from([*JUNK, DEEP, RESULT, USE, IMAGE, text("x"), [1]]),
        st.booleans(),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=120, **QUICK)
@given(MUTATIONS)
def test_a_mutated_request_is_served_or_refused_with_400(
    steps: list[tuple[int, Any, bool]],
) -> None:
    body = copy.deepcopy(FULL_BODY)
    for number, junk, extra in steps:
        values = [container[key] for container, key in places(body)]
        objects = [value for value in values if isinstance(value, dict)]
        if extra and objects:
            name = EXTRA[number % len(EXTRA)]
            objects[number % len(objects)][name] = copy.deepcopy(junk)
        else:
            put(body, number, junk)
    use_whole(json.dumps(body).encode())


texts = st.text(st.characters(codec="utf-8") | st.sampled_from("\u2028\u2029\u0085\n\r\x00"))
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
)


@settings(max_examples=150, **QUICK)
@given(
    st.binary() | JSON_VALUES.map(json.dumps).map(str.encode) | st.integers(0, 3000),
    st.text(max_size=8),
)
def test_any_bytes_are_a_request_or_refused_with_400(body: bytes | int, betas: str) -> None:
    whole = json.dumps(FULL_BODY).encode()
    use_whole(whole[:body] if isinstance(body, int) else body, betas)


READ = translate.OWN_FIELDS | {"max_tokens", "tools", "thread"}


@settings(max_examples=120, **QUICK)
@given(st.dictionaries(texts.filter(lambda name: name not in READ), JSON_VALUES, max_size=4))
def test_any_field_that_the_bridge_does_not_know_goes_to_the_api_as_sent(fields: Json) -> None:
    request = parsed(**{"max_tokens": 5, **fields})
    env = translate.turn_environment(request)
    assert json.loads(env["CLAUDE_CODE_EXTRA_BODY"]) == {"max_tokens": 5, **fields}


@settings(max_examples=120, **QUICK)
@given(st.dictionaries(texts, JSON_VALUES, max_size=4))
def test_any_key_of_a_block_passes_as_sent(keys: Json) -> None:
    sent = {**keys, "type": "new"}
    sent.pop("cache_control", None)
    assert parsed(user(sent, text("a"))).messages == user(sent, text("a"))
