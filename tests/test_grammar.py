"""The grammar that other tests rely on: what it refuses, what it lets pass, what it assembles."""

from typing import Any

import pytest
from grammar import check_stream
from messages import CALL, STOP, TEXT, closed, finish, opened, piece, start

Json = dict[str, Any]

GOOD = list(TEXT)
ERROR: Json = {
    "type": "error",
    "error": {"type": "api_error", "message": "m"},
    "request_id": "r",
}
PING: Json = {"type": "ping"}


def with_blocks(*events: Json, reason: str = "end_turn") -> list[Json]:
    return [start(), *events, finish(reason), STOP]


def with_usage(**counts: Any) -> list[Json]:
    return [start(usage={"input_tokens": 1, "output_tokens": 1, **counts}), *TEXT[1:]]


def with_input(partial_json: Any) -> list[Json]:
    delta = piece(type="input_json_delta", partial_json=partial_json)
    return with_blocks(opened(**CALL), delta, closed(), reason="tool_use")


REFUSED: dict[str, list[Json]] = {
    # the order of events
    "empty": [],
    "no message_start": GOOD[1:],
    "two message_starts": [*GOOD[:1], *GOOD],
    "no message_stop": GOOD[:-1],
    "no message_delta": [*GOOD[:-2], STOP],
    "after message_stop": [*GOOD, STOP],
    "ping after message_stop": [*GOOD, PING],
    "error after message_stop": [*GOOD, ERROR],
    "after an error": [*GOOD[:2], ERROR, *GOOD[2:]],
    "new event before the message": [{"type": "new"}, *GOOD],
    "new event after the message": [*GOOD, {"type": "new"}],
    # the order of blocks
    "block not closed": [*GOOD[:3], *GOOD[4:]],
    "block not opened": [*GOOD[:1], *GOOD[2:]],
    "block in a block": [*GOOD[:2], opened(1), *GOOD[2:]],
    "index gap": with_blocks(opened(1), closed(1)),
    "index from before": with_blocks(opened(), closed(), opened(), closed()),
    "wrong index of a delta": with_blocks(opened(), piece(1), closed()),
    "wrong index of a stop": with_blocks(opened(), closed(1)),
    "index is no integer": with_blocks({**opened(), "index": True}, closed()),
    "block after message_delta": [*GOOD[:-1], opened(1), closed(1), STOP],
    # types
    "no type": [*GOOD[:2], {}, *GOOD[2:]],
    "type of nothing": [*GOOD[:2], {"type": ""}, *GOOD[2:]],
    "type of two lines": [*GOOD[:2], {"type": "a\nb"}, *GOOD[2:]],
    "block without type": with_blocks({**opened(), "content_block": {}}, closed()),
    "block type of nothing": with_blocks(opened(type=""), closed()),
    "delta without type": with_blocks(opened(), {**piece(), "delta": {"text": ""}}, closed()),
    "delta type of nothing": with_blocks(opened(), piece(type=""), closed()),
    # known blocks
    "text of null": with_blocks(opened(text=None), closed()),
    "text at the start": with_blocks(opened(text="Hi"), closed()),
    "citations of null": with_blocks(opened(citations=None), closed()),
    "new key of null": with_blocks(opened(new=None), closed()),
    "thinking without signature": with_blocks(opened(type="thinking", thinking=""), closed()),
    "redacted thinking without data": with_blocks(opened(type="redacted_thinking"), closed()),
    "call without id": with_blocks(opened(type="tool_use", name="n", input={}), closed()),
    "call with an empty id": with_blocks(opened(**CALL | {"id": ""}), closed()),
    "call without input": with_blocks(opened(type="tool_use", id="x", name="n"), closed()),
    "server's call without a name": with_blocks(
        opened(type="server_tool_use", id="x", input={}), closed()
    ),
    # known deltas
    "text of a number": with_blocks(opened(), piece(text=5), closed()),
    "delta of another block": with_blocks(
        opened(), piece(type="thinking_delta", thinking=""), closed()
    ),
    "input of a text": with_blocks(
        opened(), piece(type="input_json_delta", partial_json=""), closed()
    ),
    "signature of a text": with_blocks(
        opened(), piece(type="signature_delta", signature="s"), closed()
    ),
    "signature of null": with_blocks(
        opened(type="thinking", thinking="", signature=""),
        piece(type="signature_delta", signature=None),
        closed(),
    ),
    "input is a list": with_input("[]"),
    "input is half": with_input("{"),
    "input is null": with_input(None),
    # the message
    "no id": [start(id=None), *GOOD[1:]],
    "no model": [start(model=""), *GOOD[1:]],
    "another role": [start(role="user"), *GOOD[1:]],
    "content at the start": [start(content=[{"type": "text", "text": "Hi"}]), *GOOD[1:]],
    "stop_reason at the start": [start(stop_reason="end_turn"), *GOOD[1:]],
    "null key": [start(container=None), *GOOD[1:]],
    "empty key": [start(context_management={}), *GOOD[1:]],
    # its end
    "no stop_reason": [*GOOD[:-2], finish(None), STOP],
    "empty stop_reason": [*GOOD[:-2], finish(""), STOP],
    "sequence of another reason": [*GOOD[:-2], finish(stop_sequence="END"), STOP],
    "sequence of a number": [*GOOD[:-2], finish("stop_sequence", stop_sequence=5), STOP],
    "details without type": [*GOOD[:-2], finish(stop_details={"a": 1}), STOP],
    "null at the end": [*GOOD[:-2], finish(container=None), STOP],
    "empty beside the end": [*GOOD[:-2], {**finish(), "context_management": {}}, STOP],
    "content at the end": [*GOOD[:-2], {**finish(), "content": "x"}, STOP],
    "usage in the delta": [*GOOD[:-2], finish(usage={"x": 1}), STOP],
    # usage
    "no usage": [start(usage=None), *GOOD[1:]],
    "usage without input": [start(usage={"output_tokens": 1}), *GOOD[1:]],
    "null count": with_usage(cache_read_input_tokens=None),
    "negative count": with_usage(cache_read_input_tokens=-1),
    "count of a text": with_usage(input_tokens="1"),
    "half of cache_creation": with_usage(cache_creation={"ephemeral_5m_input_tokens": 1}),
    "half of server_tool_use": with_usage(server_tool_use={"web_search_requests": 1}),
    "unknown tier": with_usage(service_tier="gold"),
    "no iterations": with_usage(iterations=[]),
    "output_tokens go down": with_usage(output_tokens=99),
    # an error
    "error without text": [{**ERROR, "error": {"type": "api_error", "message": ""}}],
    "error without type": [{**ERROR, "error": {"message": "m"}}],
}


@pytest.mark.parametrize("events", REFUSED.values(), ids=REFUSED.keys())
def test_the_grammar_refuses(events: list[Json]) -> None:
    with pytest.raises(AssertionError):
        check_stream(events)


def test_pings_may_stand_anywhere_before_the_end() -> None:
    events = [event for pair in GOOD for event in (PING, pair)]
    assert check_stream(events)["message"]["stop_reason"] == "end_turn"


def test_an_error_may_take_any_events_place() -> None:
    for length in range(len(GOOD)):
        assert check_stream([*GOOD[:length], ERROR]) == {"message": None, "error": ERROR}


def test_an_input_is_empty_without_pieces_or_what_they_say() -> None:
    assert check_stream(with_input(""))["message"]["content"][0]["input"] == {}
    assert check_stream(with_input('{"a": 1}'))["message"]["content"][0]["input"] == {"a": 1}


# What an API of tomorrow may send -> the content of the message.
NEW: dict[str, tuple[list[Json], list[Json]]] = {
    "event": (
        with_blocks({"type": "new", "x": None}, opened(), {"type": "new"}, closed()),
        [{"type": "text", "text": ""}],
    ),
    "block": (
        with_blocks(opened(type="new", x=1), closed()),
        [{"type": "new", "x": 1}],
    ),
    "key of a block": (
        with_blocks(opened(x=[]), piece(), closed()),
        [{"type": "text", "text": "Hi", "x": []}],
    ),
    "delta": (
        with_blocks(opened(), piece(), piece(type="new_delta", x=1), closed()),
        [{"type": "text", "text": "Hi", "x": 1}],
    ),
    "block of known deltas": (
        with_blocks(
            opened(type="new"),
            piece(),
            piece(type="thinking_delta", thinking="hm"),
            piece(type="input_json_delta", partial_json="{}"),
            closed(),
        ),
        [{"type": "new", "text": "Hi", "thinking": "hm", "input": {}}],
    ),
    "key of events": (
        [
            {**start(), "x": 1},
            {**opened(), "x": 1},
            {**piece(), "x": 1},
            {**closed(), "x": 1},
            {**finish(), "x": 1},
            {**STOP, "x": 1},
        ],
        [{"type": "text", "text": "Hi"}],
    ),
}


@pytest.mark.parametrize(("events", "content"), NEW.values(), ids=NEW.keys())
def test_what_is_new_passes_and_is_assembled(events: list[Json], content: list[Json]) -> None:
    assert check_stream(events)["message"]["content"] == content


def test_new_keys_of_the_message_its_end_and_its_usage_are_assembled() -> None:
    end = {**finish(container={"id": "c"}), "x": 1, "usage": {"output_tokens": 17, "y": 2}}
    events = [start(new="n"), *TEXT[1:4], end, STOP]
    message = check_stream(events)["message"]
    assert (message["new"], message["container"], message["x"]) == ("n", {"id": "c"}, 1)
    assert message["usage"] == {"input_tokens": 10, "output_tokens": 17, "y": 2}
