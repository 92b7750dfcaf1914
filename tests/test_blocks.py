"""What a Messages stream carries: blocks, deltas and keys, known and new ones, and the usage."""

import json
from typing import Any

import pytest
from client import assemble
from grammar import check_stream
from messages import (
    CALL,
    GOOD,
    REDACTED,
    STOP,
    TEXT,
    bare,
    checked,
    closed,
    finish,
    opened,
    piece,
    play,
    start,
    stream,
    text,
)
from test_translation import REST

Json = dict[str, Any]


def block(type: str, *deltas: Json, **keys: Any) -> list[Json]:
    pieces = [{"type": "content_block_delta", "index": 0, "delta": delta} for delta in deltas]
    return [opened(type=type, **keys), *pieces, closed()]


def deltas(type: str, key: str, *values: Any) -> list[Json]:
    return [{"type": type, key: value} for value in values]


WEATHER = {"id": "toolu_1", "name": "weather", "input": {}}
SEARCH = {"id": "srvtoolu_1", "name": "web_search", "input": {}}
INPUT = deltas("input_json_delta", "partial_json", "", '{"city": "Pa', 'ris"}')
TEXTS = deltas("text_delta", "text", "Hi", "", " there")
CITATION = {"type": "char_location", "cited_text": "x", "document_title": None}
CITED = deltas("citations_delta", "citation", CITATION)
THINKING = [
    *deltas("thinking_delta", "thinking", "h", "m"),
    *deltas("signature_delta", "signature", "c2ln"),
]
PARIS = {"city": "Paris"}
CALLER = {"type": "code_execution_20250825", "tool_id": "x"}
HIT = {"type": "web_search_result", "url": "http://x", "title": "X", "page_age": None}
# What the SDKs know: (events, the block that a client assembles).
KNOWN: dict[str, tuple[list[Json], Json]] = {
    "text": (
        block("text", *TEXTS),
        text("Hi there"),
    ),
    "text with citations": (
        block("text", *TEXTS, *CITED),
        text("Hi there", citations=[CITATION]),
    ),
    "thinking": (
        block("thinking", *THINKING, thinking="", signature=""),
        {"type": "thinking", "thinking": "hm", "signature": "c2ln"},
    ),
    "empty thinking": (
        block("thinking", thinking="", signature=""),
        {"type": "thinking", "thinking": "", "signature": ""},
    ),
    "redacted thinking": (
        block(**REDACTED),
        REDACTED,
    ),
    "call": (
        block("tool_use", *INPUT, **WEATHER),
        {"type": "tool_use", **WEATHER, "input": PARIS},
    ),
    "call without input": (
        block("tool_use", **WEATHER),
        {"type": "tool_use", **WEATHER},
    ),
    "call that begins with its input": (
        block("tool_use", **WEATHER | {"input": PARIS}),
        {"type": "tool_use", **WEATHER, "input": PARIS},
    ),
    "call from code execution": (
        block("tool_use", *INPUT, **WEATHER, caller=CALLER),
        {
            "type": "tool_use",
            **WEATHER,
            "input": PARIS,
            "caller": CALLER,
        },
    ),
    "server's call": (
        block("server_tool_use", *INPUT, **SEARCH),
        {"type": "server_tool_use", **SEARCH, "input": PARIS},
    ),
    "server's result": (
        block("web_search_tool_result", tool_use_id="srvtoolu_1", content=[HIT]),
        {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": [HIT]},
    ),
    "nulls": (
        block("text", *TEXTS, citations=None, parsed_output=None),
        text("Hi there"),
    ),
    "a call's null": (
        block("tool_use", *INPUT, **WEATHER, caller=None),
        {"type": "tool_use", **WEATHER, "input": PARIS},
    ),
    "citations at the start": (
        block("text", *CITED, *TEXTS, *CITED, citations=[]),
        text("Hi there", citations=[CITATION, CITATION]),
    ),
}


@pytest.mark.parametrize(("events", "content"), KNOWN.values(), ids=KNOWN.keys())
def test_a_known_block_is_the_same_in_the_json_answer_and_for_the_sdk(
    events: list[Json], content: Json
) -> None:
    for reason in (*REST, "tool_use"):
        played = play(stream(start(), *events, finish(reason), STOP))
        message = checked(played)
        assert (message["stop_reason"], message["content"]) == (reason, [content])
        assert bare(message) == bare(assemble(played.sent))


NEW_DELTA = {"type": "new_delta", "new": [1]}
# What the SDK's accumulator does not know, and passes as it came.
NEW: dict[str, tuple[list[Json], Json]] = {
    "block": (
        block("new", id="x", more={"a": [None]}),
        {"type": "new", "id": "x", "more": {"a": [None]}},
    ),
    "block of new deltas": (
        block("new", NEW_DELTA),
        {"type": "new", "new": [1]},
    ),
    "delta of a text": (
        block("text", *TEXTS, NEW_DELTA),
        text("Hi there", new=[1]),
    ),
    "delta of a call": (
        block("tool_use", *INPUT, NEW_DELTA, **WEATHER),
        {"type": "tool_use", **WEATHER, "input": PARIS, "new": [1]},
    ),
    "key of a text": (
        block("text", *TEXTS, new={"a": None}),
        text("Hi there", new={"a": None}),
    ),
    "compaction": (
        block("compaction", {"type": "compaction_delta", "content": "short"}),
        {"type": "compaction", "content": "short"},
    ),
    "call of an MCP server": (
        block("mcp_tool_use", *INPUT, **SEARCH, server_name="s"),
        {"type": "mcp_tool_use", **SEARCH, "input": PARIS, "server_name": "s"},
    ),
    "block of texts": (
        block("new", *TEXTS, text="Oh: "),
        {"type": "new", "text": "Oh: Hi there"},
    ),
    "block of an input": (
        block("new", *INPUT, input={}),
        {"type": "new", "input": PARIS},
    ),
    "block of thoughts": (
        block("new", *THINKING),
        {"type": "new", "thinking": "hm", "signature": "c2ln"},
    ),
    "block of an input that it does not begin with": (
        block("new", *INPUT),
        {"type": "new", "input": PARIS},
    ),
}


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
@pytest.mark.parametrize(("events", "content"), NEW.values(), ids=NEW.keys())
def test_a_new_type_or_key_passes_as_it_came(events: list[Json], content: Json) -> None:
    played = play(stream(start(), *events, finish(), STOP))
    assert checked(played)["content"] == [content]
    assert played.sent[1:-2] == events
    assemble(played.sent)  # the SDK reads it


def test_blocks_are_counted_anew_where_the_cli_counts_otherwise() -> None:
    blocks = (opened(3), piece(3), closed(3), opened(7), piece(7, text=" there"), closed(7))
    message = checked(play(stream(start(), *blocks, finish(), STOP)))
    assert message["content"] == [text("Hi"), text(" there")]


def test_new_events_pass_once_the_message_has_begun() -> None:
    new = {"type": "new", "index": 5, "more": {"a": None}}
    ping = {"type": "ping"}
    for at in range(1, len(TEXT)):
        for event in (new, ping):
            played = play(stream(*TEXT[:at], event, *TEXT[at:]))
            assert played.emitted == [*GOOD[:at], event, *GOOD[at:]]
            assert check_stream(played.sent)["message"] == played.message
            assemble(played.sent)
    assert play(stream(new, ping, *TEXT, new)).emitted == GOOD


@pytest.mark.parametrize("at", range(len(TEXT)))
def test_new_keys_of_events_pass(at: int) -> None:
    events = list(TEXT)
    events[at] = {**events[at], "new": {"a": 1}}
    emitted = play(stream(*events)).emitted
    assert emitted[at]["new"] == {"a": 1}
    del emitted[at]["new"]
    assert emitted == GOOD


def test_new_keys_of_the_message_and_of_its_end_pass() -> None:
    edits = {"applied_edits": [{"type": "compact_20260112"}]}
    container = {"id": "c", "expires_at": "2026-01-01"}
    end = {**finish(container=container), "context_management": edits, "newer": 1}
    played = play(stream(start(new="n", container=container), *TEXT[1:4], end, STOP))
    message = checked(played)
    assert played.emitted[0]["message"]["new"] == message["new"] == "n"
    assert message["container"] == container
    assert played.emitted[-2]["context_management"] == message["context_management"] == edits
    assert played.emitted[-2]["delta"]["container"] == container
    assert played.emitted[-2]["newer"] == message["newer"] == 1


def test_keys_that_hold_nothing_are_left_out_where_strict_clients_break_on_them() -> None:
    nothing: Json = {"a": None, "context_management": {}, "iterations": []}
    counts = {"input_tokens": 10, "output_tokens": 1, **nothing}
    end = {**finish(**nothing), **nothing, "usage": {"output_tokens": 17, **nothing}}
    begun = start(usage=counts, container=None, **nothing)
    played = play(stream(begun, opened(a=None), *TEXT[2:4], end, STOP))
    assert played.emitted == GOOD
    checked(played)


def test_an_integer_of_an_input_that_is_longer_than_64_bits_is_a_float_as_for_the_cli() -> None:
    whole, long = 2**63 - 1, 1234567890123456789012345678901234567890
    partial = f'{{"a": [{whole}, {-whole}], "b": [{long}, -{long}]}}'
    delta = piece(type="input_json_delta", partial_json=partial)
    played = play(stream(start(), opened(**CALL), delta, closed(), finish("tool_use"), STOP))
    assert not played.error
    assert played.sent[2]["delta"]["partial_json"] == partial  # the client gets all digits
    found = played.message["content"][0]["input"]
    assert found == {"a": [whole, -whole], "b": [float(long), -float(long)]}
    assert json.dumps(found["b"]) == json.dumps([float(long), -float(long)])


def test_the_start_of_a_block_passes_as_it_came_but_for_nulls() -> None:
    begun = opened(type="tool_use", id="t", name="weather", input={"city": "Paris"}, caller=None)
    played = play(stream(start(), begun, closed(), finish("tool_use"), STOP))
    del begun["content_block"]["caller"]
    assert played.emitted[1:-2] == [begun, closed()]
    assert checked(played)["content"] == [begun["content_block"]]


# ---------------------------------------------------------------- usage


def test_counts_of_the_end_replace_those_of_the_start() -> None:
    final = {
        "input_tokens": 12,
        "output_tokens": 17,
        "cache_read_input_tokens": 7,
    }
    first = {"input_tokens": 10, "output_tokens": 3, "cache_creation_input_tokens": 2}
    played = play(stream(start(usage=first), *TEXT[1:4], {**finish(), "usage": final}, STOP))
    assert played.emitted[-2]["usage"] == final
    assert checked(played)["usage"] == first | final


def test_counts_that_the_end_leaves_open_are_those_of_the_start() -> None:
    for final in (
        {"output_tokens": 17},
        {"output_tokens": 17, "input_tokens": None},
        {},
        None,
    ):
        played = play(stream(*TEXT[:4], {**finish(), "usage": final}, STOP))
        counts = {"input_tokens": 10, "output_tokens": 17 if final else 1}
        assert checked(played)["usage"] == counts


LEAST = {"input_tokens": 0, "output_tokens": 0}
# (what came, what is passed on beside the two counts that are always there)
USAGES: list[tuple[Any, Json]] = [
    ({}, {}),
    (None, {}),
    ({"cache_creation_input_tokens": 3}, {"cache_creation_input_tokens": 3}),
    ({"service_tier": "standard"}, {"service_tier": "standard"}),
    ({"server_tool_use": None}, {}),
    ({"inference_geo": "us", "speed": None, "iterations": []}, {"inference_geo": "us"}),
    (
        {"output_tokens_details": {"thinking_tokens": 4}, "new": 1},
        {"output_tokens_details": {"thinking_tokens": 4}, "new": 1},
    ),
]


@pytest.mark.parametrize(("came", "passed"), USAGES, ids=repr)
def test_a_usage_has_the_two_main_counts_and_no_null(came: Any, passed: Json) -> None:
    assert play(stream(start(usage=came))).message["usage"] == LEAST | passed
    for events in ((start(usage=came), *TEXT[1:]), (*TEXT[:4], {**finish(), "usage": came}, STOP)):
        checked(play(stream(*events)))
