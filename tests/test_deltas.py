"""Deltas: whatever they hold, a client gets it once, in order, in frames that no client splits."""

import json
from typing import Any

import pytest
from grammar import check_stream
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import QUICK, SERVED, TURNS, Recorded, checked

import translate
from translate import ApiError, Translator

Json = dict[str, Any]
DELTA = b'{"type":"stream_event","event":{"type":"content_block_delta","index":'
TAIL = b',"session_id":"s","parent_tool_use_id":null,"uuid":"u","api_message_id":"msg_1"}'


def outcome(lines: list[bytes]) -> tuple[list[Json], Json, str]:
    """What a client gets of the lines, the message that is kept, and the error."""
    translator, frames, error = Translator(SERVED), b"", ""
    try:
        for line in lines:
            for event in translate.decode(line):
                frames += b"".join(map(translate.frame, translator.feed(event)))
    except ApiError as failure:
        error = failure.message
    assert not any(mark in frames for mark in (b"\xe2\x80\xa8", b"\xe2\x80\xa9", b"\xc2\x85"))
    blocks = frames.decode().split("\n\n")[:-1]
    return [json.loads(block.split("\ndata: ")[1]) for block in blocks], translator.message, error


def delta(index: int, kind: str, key: str, value: bytes, tail: bytes = TAIL) -> bytes:
    """A line with a delta; `value` are the bytes between its quotes."""
    head = b'%b%d,"delta":{"type":"%b","%b":"' % (DELTA, index, kind.encode(), key.encode())
    return head + value + b'"}}' + tail


def text(value: bytes, tail: bytes = TAIL) -> bytes:
    return delta(0, "text_delta", "text", value, tail)


def event(**fields: Any) -> bytes:
    return json.dumps(
        {"type": "stream_event", "event": fields, "parent_tool_use_id": None}
    ).encode()


MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "m",
    "content": [],
    "usage": {},
}
BEGIN = [
    event(type="message_start", message=MESSAGE),
    event(type="content_block_start", index=0, content_block={"type": "text", "text": ""}),
]
END = [
    event(type="content_block_stop", index=0),
    event(type="message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 3}),
    event(type="message_stop"),
]
SUBAGENTS = TAIL.replace(b"null", b'"toolu_1"')
STOP = b'{"type":"stream_event","event":{"type":"content_block_stop","index":0}}'


@pytest.mark.parametrize("turn", TURNS.values(), ids=TURNS.keys())
def test_the_deltas_of_a_recording_are_passed_on_as_they_came(turn: Recorded) -> None:
    played = turn.play()
    if not played.error:
        checked(played)
    kinds = ("content_block_delta",)
    sent = [event["delta"] for event in played.emitted if event["type"] in kinds]
    came = [
        event["event"]["delta"]
        for event in turn.events
        if event["type"] == "stream_event"
        and event["event"]["type"] in kinds
        and event["parent_tool_use_id"] is None
    ]
    left = iter(came)
    assert all(delta in left for delta in sent)  # in order; an agent's calls are left out


@pytest.mark.parametrize(
    ("lines", "texts"),
    [
        ([text(b"plain"), text(b" and more")], ["plain", " and more"]),
        ([text(b"line\\n \\u00e9 \\\\")], ["line\n é \\"]),
        ([text("é \u2028 \u2029 \u0085 😀".encode())], ["é \u2028 \u2029 \u0085 😀"]),
        ([text(b'say \\"}},{ \\"')], ['say "}},{ "']),
        ([text(b""), text(b"after nothing")], ["", "after nothing"]),
        # One that is cut in two is two halves, for which no UTF-8 has a form.
        ([text(b"\\ud83d"), text(b"\\ude00"), text(b"\\ud83d\\ude00")], ["\ufffd", "\ufffd", "😀"]),
        ([text(b"a subagent's", SUBAGENTS), text(b"the client's")], ["the client's"]),
        (
            [text(b"with an inner object", TAIL[:-1] + b',"more":{"a":1}}')],
            ["with an inner object"],
        ),
    ],
)
def test_an_odd_delta_is_decoded(lines: list[bytes], texts: list[str]) -> None:
    events, message, error = outcome([*BEGIN, *lines, *END])
    assert error == ""
    assert [event["delta"]["text"] for event in events[2:-3]] == texts
    assert check_stream(events)["message"] == message
    assert message["content"] == [{"type": "text", "text": "".join(texts)}]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([text(b"\x01")], "a damaged line"),
        ([text(b"a\\x")], "a damaged line"),
        ([text(b"\\"), text(b"n")], "a damaged line"),
        ([text(b"cut", TAIL[:30])], "a damaged line"),
        ([text(b"cut", TAIL[:-1])], "a damaged line"),
        ([text(b"quote", TAIL.replace(b'"u"', b'"u'))], "a damaged line"),
        ([text(b"comma", TAIL[:-1] + b",}")], "a damaged line"),
        ([text(b"two", TAIL + STOP)], "a damaged line"),
    ],
)
def test_a_delta_that_is_none_fails_the_turn(lines: list[bytes], words: str) -> None:
    events, message, error = outcome([*BEGIN, text(b"Hi"), *lines, *END])
    assert words in error
    assert check_stream([*events, ApiError(502, error).body("r")])["error"]
    assert events[2]["delta"]["text"] == "Hi"
    assert message["stop_reason"] is None


def test_deltas_of_a_text_that_has_the_key_of_a_call_are_text() -> None:
    begun = event(
        type="content_block_start", index=0, content_block={"type": "text", "text": "", "input": {}}
    )
    _, message, error = outcome([BEGIN[0], begun, text(b"a"), text(b"b"), *END])
    assert (message["content"][0]["text"], error) == ("ab", "")


@settings(max_examples=100, **QUICK)
@given(texts=st.lists(st.text(max_size=12), max_size=12), ascii_only=st.booleans())
def test_any_text(texts: list[str], ascii_only: bool) -> None:
    values = [json.dumps(value, ensure_ascii=ascii_only).encode()[1:-1] for value in texts]
    events, message, error = outcome([*BEGIN, *map(text, values), *END])
    assert [event["delta"]["text"] for event in events[2:-3]] == texts
    assert message["content"] == [{"type": "text", "text": "".join(texts)}]
    assert error == ""


def test_a_delta_of_another_turn_is_left_out() -> None:
    translator = Translator(turn_id="mine")
    for line in BEGIN:
        for found in translate.decode(line):
            translator.feed(found)
    for turn, kept in (("another", 0), ("mine", 1)):
        tail = TAIL[:-1] + b',"user_message_uuids":["%b"]}' % turn.encode()
        for found in translate.decode(text(b"a", tail)):
            assert len(translator.feed(found)) == kept
        for found in translate.decode(text(b"b")):  # names none: of the one named last
            assert len(translator.feed(found)) == kept
