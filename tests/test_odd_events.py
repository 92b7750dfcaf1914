"""Whatever the CLI prints, a client gets a stream of the grammar: odd events, and mutations."""

import copy
import json
from typing import Any

import pytest
from client import assemble
from grammar import check_stream, loose_message
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import (
    CALL,
    DONE,
    JUNK,
    QUICK,
    STOP,
    TEXT,
    TURNS,
    Played,
    checked,
    closed,
    finish,
    opened,
    piece,
    plain,
    play,
    put,
    start,
    stream,
    text,
)
from test_blocks import KNOWN, NEW
from test_translation import AGENT, LATE

import translate
from translate import decode

Json = dict[str, Any]


def nested(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


def answer(*blocks: Json, reason: str = "end_turn") -> list[Json]:
    return stream(start(), *blocks, finish(reason), STOP)


def failed(**fields: Any) -> Json:
    return {**DONE, "is_error": True, **fields}


def call_of(partial_json: str) -> list[Json]:
    delta = piece(type="input_json_delta", partial_json=partial_json)
    return answer(opened(**CALL), delta, closed(), reason="tool_use")


THOUGHT = {"type": "thinking", "thinking": "", "signature": ""}
HALF = json.dumps(stream(*TEXT)[2] | {"event": piece(text="\ud83d")}).encode()
# Each ends in a message or an ApiError.
ODD: dict[str, list[Json]] = {
    # types
    "event type is a list": stream(*TEXT[:2], {"type": []}, *TEXT[2:]),
    "event type of two lines": stream(*TEXT[:2], {"type": "a\nevent: b"}, *TEXT[2:]),
    # how blocks begin
    "input of a text": answer(opened(input={}), piece(), closed()),
    "text of a new block is a number": answer(opened(type="new", text=5), piece(), closed()),
    # pieces
    "delta of no block and no index": stream(*TEXT[:4], {**piece(), "index": None}, *TEXT[4:]),
    "delta after the end, no index": stream(*TEXT[:5], {**piece(), "index": None}, STOP),
    "half a surrogate pair": [*stream(*TEXT[:2]), *decode(HALF), *stream(*TEXT[3:])],
    # inputs
    "input is a list": call_of("[1]"),
    "input that is cut off before another block": answer(
        opened(**CALL),
        piece(type="input_json_delta", partial_json="{"),
        closed(),
        {**opened(), "index": 1},
        {**closed(), "index": 1},
        reason="max_tokens",
    ),
    # the message
    "content is a text": stream(start(content="x"), *TEXT[1:]),
    # its end
    "empty stop_reason": stream(*TEXT[:4], finish(""), STOP),
    "delta in the end": stream(*TEXT[:4], finish(delta=1), STOP),
    # errors
    "error is null": stream({"type": "error", "error": None}),
    "error without message": stream(*TEXT[:2], {"type": "error", "error": {}}, *TEXT[2:]),
    "error type is null": stream({"type": "error", "error": {"type": None, "message": ""}}),
    "error is null, later": stream(*TEXT[:2], {"type": "error", "error": None}, *TEXT[2:]),
    # failures
    "result of numbers": [failed(result=5, errors=5, api_error_status=True)],
    "result of an empty text": [failed(result="", errors=[])],
    "result of blank text": [failed(result=None, errors=[""])],
    "result of advice alone": [
        failed(result="API Error: 500 . This is a server-side issue, usually temporary")
    ],
    "result of an empty error": [
        failed(result='API Error: 400 {"error": {"type": "", "message": ""}}')
    ],
}
# What is in them is passed on, or is an error: the order of events is kept all the same.
MISTYPED: dict[str, list[Json]] = {
    "event is null": [*stream(*TEXT[:2]), {"type": "stream_event", "event": None}],
    # types
    "block type is a list": answer(opened(type=[]), closed()),
    "delta type is null": answer(opened(), piece(type=None), closed()),
    "block type is empty": answer(opened(type=""), closed()),
    "delta type is empty": answer(opened(), piece(type=""), closed()),
    # how blocks begin
    "tool without id": answer(opened(**CALL | {"id": None}), closed(), reason="tool_use"),
    "input at the start is a text": answer(opened(**CALL | {"input": "x"}), closed()),
    "citations at the start are a text": answer(
        opened(citations="x"), piece(type="citations_delta", citation={}), closed()
    ),
    "text at the start": answer(opened(text="Oh: "), piece(), closed()),
    "text at the start is a number": answer(opened(text=5), piece(), closed()),
    "thoughts at the start": answer(
        opened(**THOUGHT | {"thinking": "Oh: ", "signature": "s"}),
        piece(type="thinking_delta", thinking="hm"),
        closed(),
    ),
    "signature at the start is a number": answer(opened(**THOUGHT | {"signature": 5}), closed()),
    "server's input is a text": answer(
        opened(type="server_tool_use", id="x", name="x", input="y"), closed()
    ),
    "tool of an empty id": answer(opened(**CALL | {"id": ""}), closed(), reason="tool_use"),
    "tool of an empty name": answer(opened(**CALL | {"name": ""}), closed(), reason="tool_use"),
    "server's tool without id": answer(opened(type="server_tool_use", name="x"), closed()),
    "redacted thinking without data": answer(opened(type="redacted_thinking"), closed()),
    "citations of a new block are a text": answer(
        opened(type="new", citations="x"), piece(type="citations_delta", citation={}), closed()
    ),
    # pieces
    "citation of null": answer(opened(), piece(type="citations_delta", citation=None), closed()),
    "thoughts of a text": answer(opened(), piece(type="thinking_delta", thinking="hm"), closed()),
    "input of pieces of a text": answer(
        opened(), piece(type="input_json_delta", partial_json="{}"), closed()
    ),
    "signature of a text": answer(opened(), piece(type="signature_delta", signature="s"), closed()),
    "citation of a thought": answer(
        opened(**THOUGHT), piece(type="citations_delta", citation={}), closed()
    ),
    "text of a call": answer(opened(**CALL), piece(), closed(), reason="tool_use"),
    "signature of null": answer(
        opened(**THOUGHT), piece(type="signature_delta", signature=None), closed()
    ),
    # the message
    "model is a number": stream(start(model=5), *TEXT[1:]),
    "model of null": stream(start(model=None), *TEXT[1:]),
    "empty id": stream(start(id=""), *TEXT[1:]),
    "new delta of a text's text": answer(opened(), piece(), piece(type="new", text=5), closed()),
    "new delta of a call's id": answer(
        opened(**CALL), piece(type="new", id=None), closed(), reason="tool_use"
    ),
    "event type is empty": stream(*TEXT[:2], {"type": ""}, *TEXT[2:]),
    "role of a user": stream(start(role="user"), *TEXT[1:]),
    "type of another": stream(start(type="x"), *TEXT[1:]),
    "stop_sequence is a number": stream(*TEXT[:4], finish("stop_sequence", stop_sequence=5), STOP),
    "stop_details are a text": stream(*TEXT[:4], finish(stop_details="x"), STOP),
    "stop_details of an odd type": stream(*TEXT[:4], finish(stop_details={"type": 5}), STOP),
    "usage in the end": stream(*TEXT[:4], finish(usage=5), STOP),
    "id at the end": stream(*TEXT[:4], {**finish(), "id": "msg_9"}, STOP),
    "content in the end": stream(*TEXT[:4], finish(content=5), STOP),
    "content at the end": stream(*TEXT[:4], {**finish(), "content": 5}, STOP),
}


def loosely_checked(played: Played) -> None:
    """The order of events is right, and so is the message if the events are as clients know them."""
    message = loose_message(played.sent)
    if message:
        assert message == played.message


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
@pytest.mark.parametrize("events", ODD.values(), ids=ODD.keys())
def test_whatever_the_cli_prints_a_client_gets_a_stream_of_the_grammar(events: list[Json]) -> None:
    for agent in (False, True):
        played = play(events, agent=agent)
        message = check_stream(played.sent)["message"]
        assert message == (played.message if played.translator.done else None)
        if message:
            assemble(played.sent)
            kept: Any = played.message
            translate.message_digest(kept)


@pytest.mark.parametrize("events", MISTYPED.values(), ids=MISTYPED.keys())
def test_what_lies_about_types_is_an_error_or_passes_in_the_order_of_the_grammar(
    events: list[Json],
) -> None:
    for agent in (False, True):
        loosely_checked(play(events, agent=agent))


UNKNOWN_SHAPES = {
    "message_start without a message": stream({"type": "message_start"}),
    "message is a list": stream({"type": "message_start", "message": []}),
    "block is null": answer({**opened(), "content_block": None}),
    "block without a type": answer({**opened(), "content_block": {"text": ""}}),
    "delta is a text": answer(opened(), {**piece(), "delta": "x"}),
    "delta without a text": answer(opened(), {**piece(), "delta": {"type": "text_delta"}}),
    "text of a number": answer(opened(), piece(text=5), closed()),
    "tool without a name": answer(opened(type="tool_use", id="t", input={}), closed()),
}


@pytest.mark.parametrize("events", UNKNOWN_SHAPES.values(), ids=UNKNOWN_SHAPES.keys())
def test_an_event_of_an_unknown_shape_is_a_502(events: list[Json]) -> None:
    error = play(events).error
    assert error
    assert (error.status, error.error_type) == (502, "claude_cli_error")
    words = "the claude CLI printed an event of an unknown shape ("
    assert error.message.startswith(words)
    assert error.message.endswith("Error)")


def test_an_input_whose_echo_is_a_good_request_arrives_whole_and_a_deeper_one_fails_the_turn() -> (
    None
):
    most = translate.MAX_DEPTH // 2
    value = json.loads(nested(most))
    assert checked(play(call_of(nested(most))))["content"][0]["input"] == value
    for levels in (most + 1, 300, 1000):
        error = play(call_of(nested(levels))).error
        assert error
        assert "nested too deeply" in error.message


NOISE: list[Json] = [
    *LATE.values(),
    *stream(*TEXT, piece(1), opened(1), closed(1), finish("tool_use"), finish(None)),
    *stream({"type": "ping"}, {"type": "new"}, opened(type="new"), piece(type="new", x=1)),
    *stream(opened(**CALL), piece(type="input_json_delta", partial_json='{"a'), start(id="msg_2")),
    {"type": "keep_alive"},
    {"type": "stream_event", "event": None},
    {"type": "status", "user_message_uuids": ["another"]},
    {"type": None},
    {},
    plain(text("Hi")),
    plain(text("Hi"), id="msg_2"),
    plain(text("made up"), model="<synthetic>"),
    {**DONE, "num_turns": 0},
    {**DONE, "stop_reason": "stop_sequence", "usage": None},
]
# Lists of the CLI's commands and models say nothing about a turn, and would draw most mutations.
SHORT_TURNS = [
    [event for event in turn.events if len(json.dumps(event)) < 3000] for turn in TURNS.values()
]
SHORT_TURNS += [AGENT]
SHORT_TURNS += [answer(*events) for events, _ in [*KNOWN.values(), *NEW.values()]]
OPERATIONS = st.sampled_from(
    ["drop", "duplicate", "swap", "truncate", "cut off", "rename", "junk", "junk", "noise"]
)
NUMBERS = st.integers(0, 10**6)
STEPS = st.lists(st.tuples(OPERATIONS, NUMBERS, NUMBERS), min_size=1, max_size=6)


def mutate(turn: list[Json], steps: list[tuple[str, int, int]]) -> list[Json]:
    events: list[Any] = copy.deepcopy(turn)
    for operation, number, other in steps:
        at = number % len(events) if events else 0
        if operation == "noise":
            events.insert(at, copy.deepcopy(NOISE[other % len(NOISE)]))
        elif not events:
            continue
        elif operation == "drop":
            del events[at]
        elif operation == "duplicate":
            events.insert(at, copy.deepcopy(events[at]))
        elif operation == "swap":
            to = other % len(events)
            events[at], events[to] = events[to], events[at]
        elif operation == "truncate":
            line = json.dumps(events[at]).encode()
            events[at : at + 1] = decode(line[: other % len(line)])
        elif operation == "cut off":
            del events[at:]
        elif operation == "rename":
            put(events[at], other, "brand_new", "type")
        else:
            put(events[at], other // len(JUNK), JUNK[other % len(JUNK)])
    return printed(events)


def printed(events: list[Json]) -> list[Any]:
    """Events as they are read from what the CLI prints."""
    return [event for given in events for event in decode(json.dumps(given).encode())]


@settings(max_examples=400, **QUICK)
@given(turn=st.sampled_from(SHORT_TURNS), steps=STEPS, agent=st.booleans())
def test_a_mutated_turn_ends_in_a_message_or_an_error_in_the_order_of_the_grammar(
    turn: list[Json], steps: Any, agent: bool
) -> None:
    played = play(mutate(turn, steps), agent=agent)
    if {step[0] for step in steps} & {"junk", "rename", "swap"}:
        loosely_checked(played)
    else:
        message = check_stream(played.sent)["message"]
        assert message == (played.message if played.translator.done else None)
