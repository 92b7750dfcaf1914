"""The messages of a request: what is refused, what passes as sent, their one form, and whose cache
breakpoints they have."""

import base64
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from client import request_body
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import (
    BASH,
    CACHED,
    DEFERRED,
    DOCUMENT,
    FOUND,
    IMAGE,
    JSON_VALUES,
    PAGE,
    PDF,
    PNG,
    QUICK,
    REDACTED,
    REFERENCE,
    RESULT,
    RESULT_2,
    SERVER_RESULT,
    SERVER_USE,
    THOUGHT,
    TOOL,
    USE,
    USE_2,
    answered,
    check_refused,
    parsed,
    role,
    text,
    texts,
    user,
)

from translate import (
    CANNOT_CONTINUE,
    ApiError,
    check_ending,
    dropped_parts,
    parse_request,
    read_messages,
)

Json = dict[str, Any]


# ---------------------------------------------------------------- refused

UNANSWERED = (
    "`tool_use` ids were found without `tool_result` blocks immediately after: t1. "
    "Each `tool_use` block must have a corresponding `tool_result` block in the next message."
)
ORPHAN = (
    "unexpected `tool_use_id` found in `tool_result` blocks: t1. "
    "Each `tool_result` block must have a corresponding `tool_use` block in the previous message, "
    "and be the only one for it."
)
NO_CONTENT = (
    "all messages must have non-empty content except for the optional final assistant message"
)
GIF = base64.b64encode(b"GIF89a").decode()


def image(**source: Any) -> list[Any]:
    return user(IMAGE | {"source": IMAGE["source"] | source})


# What the bridge reads itself: (messages, how the error begins).
REFUSED: list[tuple[Any, str]] = [
    ([], "messages: at least one message is required"),
    ([5], "messages.0: Input should be a valid object"),
    ([{"content": "x"}], "messages.0.role: Input should be a valid string"),
    ([{"role": "user"}], "messages.0.content: Field required"),
    ([role("tool")], "messages.0.role: Input should be 'user' or 'assistant'"),
    ([role(None)], "messages.0.role: Input should be a valid string"),
    ([role(5)], "messages.0.role: Input should be a valid string"),
    (["x", role("user", None)], "messages.1.content: Input should be a valid list"),
    ([role("user", 5)], "messages.0.content: Input should be a valid list"),
    ([role("user", {})], "messages.0.content: Input should be a valid list"),
    # the role `system`
    (
        [role("system"), "x"],
        'messages: Unexpected role "system". The Messages API accepts a top-level `system`',
    ),
    (
        ["x", "y", role("system")],
        "messages.2: role 'system' must follow a user turn, and precede an 'assistant'",
    ),
    (
        [role("user"), role("system"), role("user")],
        "messages.1: role 'system' must follow a user turn, and precede",
    ),
    ([role("user"), role("system"), 5], "messages.1: role 'system' must follow a user turn"),
    (
        [role("user"), role("system", [text(" ")])],
        "messages: text content blocks must contain non-whitespace text (messages.1)",
    ),
    (
        [role("user"), role("system", [{"type": []}])],
        "messages.1.content.0.type: Input should be a valid string",
    ),
    ([role("user"), role("system", None)], "messages.1.content: Input should be a valid list"),
    # texts that the CLI would drop
    ([role("user", "")], f"messages.0: {NO_CONTENT}"),
    (["x", role("assistant", []), role("user")], f"messages.1: {NO_CONTENT}"),
    (user(text("")), "messages: text content blocks must be non-empty (messages.0)"),
    (
        user(text("a"), text(" \n")),
        "messages: text content blocks must contain non-whitespace text (messages.0)",
    ),
    ([role("user", "\t")], "messages: text content blocks must contain non-whitespace text"),
    # as JavaScript counts it
    (user(text("\ufeff")), "messages: text content blocks must contain non-whitespace text"),
    (
        ["x", role("assistant", [text(" ")]), role("user")],
        "messages: text content blocks must contain non-whitespace text (messages.1)",
    ),
    # blocks
    (user("x"), "messages.0.content.0: Input should be a valid object"),
    (user({"text": "x"}), "messages.0.content.0.type: Input should be a valid string"),
    (user({"type": []}), "messages.0.content.0.type: Input should be a valid string"),
    (user({"type": "text"}), "messages.0.content.0.text.text: Input should be a valid string"),
    (user(text("a") | {"text": 5}), "messages.0.content.0.text.text: Input should be"),
    # images that the CLI would replace
    (user(IMAGE | {"source": None}), "messages.0.content.0.image.source: Input should be"),
    (image(data="?"), "messages.0.content.0.image.source.base64.data: Input should be valid"),
    (image(data=""), "messages.0.content.0.image.source.base64.data: Input should be valid"),
    (image(data=5), "messages.0.content.0.image.source.base64.data: Input should be a valid"),
    (image(media_type=None), "messages.0.content.0.image.source.base64.media_type: Input"),
    (
        image(data=GIF),
        "messages.0.content.0.image.source.base64.media_type: "
        "Input should be image/gif, as the image appears to be",
    ),
    # calls of tools and their results
    (user(USE), "messages.0.content.0: `tool_use` blocks can only be in `assistant` messages"),
    (
        ["x", role("assistant", [RESULT]), "y"],
        "messages.1.content.0: `tool_result` blocks can only be in `user` messages",
    ),
    (answered(USE | {"id": None}, RESULT), "messages.1.content.0.tool_use.id: Input should"),
    (answered(USE | {"name": 5}, RESULT), "messages.1.content.0.tool_use.name: Input should"),
    (
        answered(USE | {"name": "x" * 201}, RESULT),
        "messages.1.content.0.tool_use.name: String should have at most 200 characters",
    ),
    (
        answered(USE | {"input": "{}"}, RESULT),
        "messages.1.content.0.tool_use.input: Input should be a valid object",
    ),
    (
        answered(USE, RESULT | {"tool_use_id": 5}),
        "messages.2.content.0.tool_result.tool_use_id: Input should be a valid string",
    ),
    (user(RESULT), f"messages.0.content.0: {ORPHAN}"),
    (["x", "y", *user(text("a"), RESULT)], f"messages.2.content.1: {ORPHAN}"),
    (
        [*answered(USE, RESULT), role("assistant"), *user(RESULT)],
        f"messages.4.content.0: {ORPHAN}",
    ),
    (["x", role("assistant", [USE]), "y"], f"messages.2: {UNANSWERED}"),
    (
        ["x", role("assistant", [USE]), role("assistant"), role("user")],
        "messages.3: `tool_use` ids were found without",
    ),
    (
        answered(USE, RESULT | {"tool_use_id": "t2"}),
        "messages.2.content.0: unexpected `tool_use_id`",
    ),
    (
        [*answered(USE, RESULT), *answered(USE, RESULT)[1:]],
        "messages: `tool_use` ids must be unique",
    ),
    (
        ["x", role("assistant", [USE, USE]), *user(RESULT)],
        "messages: `tool_use` ids must be unique",
    ),
    (
        ["x", role("assistant", [USE, USE_2]), *user(RESULT, RESULT_2, RESULT)],
        f"messages.2.content.2: {ORPHAN}",
    ),
    (
        ["x", role("assistant", [USE]), *user(RESULT), *user(text("a"), RESULT)],
        f"messages.3.content.1: {ORPHAN}",
    ),
    (["x", role("assistant", [USE])], f"messages.1: {UNANSWERED}"),
    (
        ["x", "y", role("assistant", [text("a"), USE, text("b")])],
        f"messages.1: {UNANSWERED}",
    ),
    # an end that cannot be continued
    ([role("assistant", [THOUGHT])], f"messages.0.content.0: {CANNOT_CONTINUE}"),
    (["x", role("assistant", [REDACTED])], f"messages.1.content.0: {CANNOT_CONTINUE}"),
    (["x", "y", role("assistant", [THOUGHT])], f"messages.2.content.0: {CANNOT_CONTINUE}"),
    (["x", role("assistant", [SERVER_USE])], f"messages.1.content.0: {CANNOT_CONTINUE}"),
    (
        ["x", role("assistant", [text("a"), THOUGHT])],
        f"messages.1.content.1: {CANNOT_CONTINUE}",
    ),
    (
        ["x", role("assistant", [text("a"), SERVER_USE, text("b")])],
        f"messages.1.content.1: {CANNOT_CONTINUE}",
    ),
    (
        ["x", role("assistant", [text("a"), {"type": "fallback"}])],
        f"messages.1.content.1: {CANNOT_CONTINUE}",
    ),
]


@pytest.mark.parametrize(("messages", "words"), REFUSED, ids=[words[:50] for _, words in REFUSED])
def test_what_the_bridge_reads_of_the_messages_is_checked_in_the_apis_words(
    messages: Any, words: str
) -> None:
    check_refused(words, messages)


@pytest.mark.parametrize("value", ["\x1f", "\x85"])
def test_a_text_that_is_white_space_in_python_alone_passes_as_sent(value: str) -> None:
    assert parsed(value).messages == [role("user", [text(value)])]


@pytest.mark.parametrize("value", ["\ufeff", "\u2003\n"])
def test_a_text_that_is_white_space_in_javascript_is_refused(value: str) -> None:
    check_refused("messages: text content blocks must contain non-whitespace text", value)


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
    [message] = image(data=data)
    with pytest.raises(ApiError, match="image exceeds 5 MB maximum"):
        parsed(answered(USE, RESULT | {"content": message["content"]}))


# ---------------------------------------------------------------- what the API judges

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
    "prefill after thinking": [THOUGHT, text("{")],
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


def test_an_agent_continues_no_assistant_message() -> None:
    """Its CLI would add a message of its own after it."""
    for blocks in CONTINUED.values():
        with pytest.raises(ApiError, match=r"^messages\.1\.content\.\d: .* cannot continue"):
            parse_request(
                json.dumps(request_body(["a", role("assistant", blocks)])).encode(), agent=True
            )


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
    "text after": (USE, [RESULT, text("b")]),
    "text before": (USE, [text("b"), RESULT]),
    "odd name": (USE | {"name": ""}, [RESULT]),
    "long name": (USE | {"name": "x" * 200}, [RESULT]),
}


@pytest.mark.parametrize(("use", "blocks"), EXCHANGES.values(), ids=EXCHANGES.keys())
def test_calls_and_results_pass_as_sent(use: Json, blocks: list[Json]) -> None:
    request = parsed(answered(use, *blocks))
    assert request.messages == [*user(text("x")), role("assistant", [use]), *user(*blocks)]


# ---------------------------------------------------------------- the form in which it goes on

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
    "parallel tools, other order, text after": (
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


# ---------------------------------------------------------------- tools


def test_of_the_result_of_an_error_its_texts_arrive() -> None:
    content = [text("a"), IMAGE, text("b"), PAGE]
    request = parsed(answered(USE, RESULT | {"is_error": True, "content": content}))
    assert request.messages[-1]["content"] == [
        RESULT | {"is_error": True, "content": [text("a"), text("b")]}
    ]


# ---------------------------------------------------------------- cache breakpoints

HOUR: Json = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
CALLS = ["x", role("assistant", [USE, USE_2])]
SEVERAL = [text("a", **CACHED), text("b", **CACHED)]
FETCHED = {
    "type": "web_fetch_tool_result",
    "tool_use_id": "srvtoolu_1",
    "content": {
        "type": "web_fetch_result",
        "url": "http://x",
        "content": {"type": "document", "source": {"type": "file", "file_id": "f"}, **CACHED},
    },
}
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
    "results at the end after a text": (
        [*CALLS, *user(text("a"), RESULT | CACHED, RESULT_2)],
        {},
        "5m",
        False,
    ),
    "text after the results": (
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
    "page that was fetched": (
        [role("user"), role("assistant", [FETCHED]), "hello"],
        {},
        "5m",
        True,
    ),
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
    assert request.caching == ttl
    assert '"cache_control"' not in json.dumps(request.messages)
    lost = [place for place in request.not_sent if place.endswith("cache_control")]
    assert bool(lost) == is_lossy


@pytest.mark.parametrize(("messages", "fields", "is_lossy"), CLIENT.values(), ids=CLIENT.keys())
def test_other_breakpoints_are_the_clients(messages: Any, fields: Json, is_lossy: bool) -> None:
    request = parsed(messages, **fields)
    assert request.caching == "client"
    if messages != "hello":
        assert [message["content"] for message in request.messages] == [
            [text("x")] if isinstance(content, str) else content
            for content in (m if isinstance(m, str) else m["content"] for m in messages)
        ]
    assert request.not_sent == ["cache_control"] * is_lossy


def test_a_breakpoint_before_a_message_that_is_left_out_is_inside_its_message() -> None:
    """API: what stands on both sides of it is one message."""
    thought = role("assistant", [THOUGHT])
    request = parsed([*user(text("a", **CACHED)), thought, role("user", "b")])
    assert request.caching == "client"
    assert request.messages == [role("user", [text("a", **CACHED), text("b")])]
    assert request.not_sent == ["messages.1"]
    answered_between = parsed([*user(text("a", **CACHED)), "yes", role("user", "b")])
    assert answered_between.caching == "5m"


def test_a_breakpoint_on_a_call_is_lost_beside_those_of_the_client() -> None:
    inside = user(PAGE | CACHED, text("b"))
    request = parsed([*inside, role("assistant", [text("a"), USE | CACHED]), *user(RESULT)])
    assert request.caching == "client"
    assert request.not_sent == ["messages.1.content.1.cache_control"]


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
    "a name of a tool that is no reference to it": (
        user(text("a", tool_name=DEFERRED["name"])),
        {"tools": [BASH, DEFERRED]},
        [],
    ),
    "null of a message": ([role("user") | {"name": None}], {}, []),
    "the CLI's own words for nothing": (
        [role("user", "(no content)"), role("assistant", "(no content)\ufeff"), role("user")],
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


class Watched(list[str]):
    """A list that counts how many of its items were looked at."""

    looked_at = 0

    def __iter__(self) -> Iterator[str]:
        self.looked_at += len(self)
        return super().__iter__()

    def __contains__(self, item: object) -> bool:
        self.looked_at += len(self)
        return super().__contains__(item)


def test_a_last_message_of_many_parts_that_are_left_out_takes_linear_work() -> None:
    for count in (20, 20_000):
        not_sent = Watched()
        raw = [role("user"), role("assistant", [FALLBACK] * count + [text("a")])]
        newest = read_messages(raw, not_sent)[-1]
        not_sent += dropped_parts(newest)
        with pytest.raises(ApiError, match=CANNOT_CONTINUE):
            check_ending(newest, is_agent=False, not_sent=not_sent)
        assert len(not_sent) == count
        assert not_sent.looked_at <= 2 * count


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


@settings(max_examples=120, **QUICK)
@given(st.dictionaries(texts, JSON_VALUES, max_size=4))
def test_any_key_of_a_block_passes_as_sent(keys: Json) -> None:
    sent = {**keys, "type": "new"}
    sent.pop("cache_control", None)
    assert parsed(user(sent, text("a"))).messages == user(sent, text("a"))
