"""Deltas that keep their bytes give a client exactly what decoded ones give him."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import FIXTURES, QUICK, SERVED

import translate
from translate import ApiError, Translator

Json = dict[str, Any]
Outcome = tuple[list[Json], Json, str]
TAIL = b',"session_id":"s","parent_tool_use_id":null,"uuid":"u","api_message_id":"msg_1"}'


def outcome(lines: list[bytes], *, raw: bool, reads: int = 1) -> Outcome:
    """What a client gets of the lines, the message that is kept, and the error; `reads` lines come
    in one read."""
    translator, frames, error = Translator(SERVED), b"", ""
    try:
        for at in range(0, len(lines), reads):
            run: list[bytes] = []
            for line in lines[at : at + reads]:
                if raw and line.startswith(translate.DELTA_START):
                    run.append(line)
                    continue
                frames, run = frames + b"".join(translator.relay(run)), []
                for event in translate.decode(line):
                    frames += b"".join(map(translate.frame, translator.feed(event)))
            for frame in translator.relay(run):
                frames += frame
    except ApiError as failure:
        error = failure.message
    assert not any(mark in frames for mark in (b"\xe2\x80\xa8", b"\xe2\x80\xa9", b"\xc2\x85"))
    blocks = frames.decode().split("\n\n")[:-1]
    return [json.loads(block.split("\ndata: ")[1]) for block in blocks], translator.message, error


def delta(index: int, kind: str, key: str, value: bytes, tail: bytes = TAIL) -> bytes:
    head = b'%b%d,"delta":{"type":"%b","%b":"' % (
        translate.DELTA_START,
        index,
        kind.encode(),
        key.encode(),
    )
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


@pytest.mark.parametrize(
    "path", sorted(FIXTURES.glob("*/*.ndjson")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_recordings(path: Path) -> None:
    rows = [json.loads(row) for row in path.read_text().rstrip("\n").split("\n")]
    out = [row["line"] for row in rows if row["dir"] == "out" and "line" in row]
    lines = [json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() for line in out]
    assert any(
        line.startswith(translate.DELTA_START) for line in lines
    ) or "content_block_delta" not in str(out)
    for reads in (1, 4, len(lines)):
        assert outcome(lines, raw=True, reads=reads) == outcome(lines, raw=False)


@pytest.mark.parametrize(
    "lines",
    [
        [text(b"plain"), text(b" and more")],
        # No half of an escape is made whole.
        [text(b"line\\n \\u00e9 \\\\"), text(b"\\"), text(b"n")],
        [text("é \u2028 \u2029 \u0085 \U0001f600".encode())],
        [text(b"\\ud83d"), text(b"\\ude00"), text(b"\\ud83d\\ude00")],
        [text(b"ok"), text(b"\xff\xfe")],
        [text(b"ok"), text(b"\x01")],
        [text(b"a\\x")],
        [text(b'say \\"}},{ \\"')],
        [text(b"for a subagent", TAIL.replace(b"null", b'"toolu_1"')), text(b"for the client")],
        [text(b"glued") + text(b" to it")],
        [text(b"glued", TAIL[:-1] + b"}" + TAIL[1:])],
        [
            text(
                b"glued",
                TAIL + b'{"type":"stream_event","event":{"type":"content_block_stop","index":0}}',
            )
        ],
        [text(b"cut", TAIL[:30])],
        [text(b"cut", TAIL[:-1])],
        [text(b"nested", TAIL[:-1] + b',"more":{"parent_tool_use_id":null}}')],
        [text(b"hidden", TAIL[:-1] + b',"event":{"type":"content_block_stop","index":0}}')],
        [delta(1, "text_delta", "text", b"of another block"), text(b"mine")],
        [delta(0, "thinking_delta", "thinking", b"of another kind"), text(b"mine")],
        [delta(0, "text_delta", "text", b'a","text":"b')],
        [text(b""), text(b"after nothing")],
    ],
)
def test_odd_lines(lines: list[bytes]) -> None:
    whole = [*BEGIN, *lines, *END]
    decoded = outcome(whole, raw=False)
    assert outcome(whole, raw=True) == decoded
    raw = outcome(whole, raw=True, reads=len(whole))
    assert raw == decoded or (raw[2] == decoded[2] != "" and raw[0] == decoded[0][: len(raw[0])])


def test_deltas_of_a_text_that_has_the_key_of_a_call_are_text() -> None:
    begun = event(
        type="content_block_start", index=0, content_block={"type": "text", "text": "", "input": {}}
    )
    lines = [BEGIN[0], begun, text(b"a"), text(b"b"), *END]
    for raw in (True, False):
        _, message, error = outcome(lines, raw=raw, reads=5)
        assert (message["content"][0]["text"], error) == ("ab", "")


@settings(max_examples=150, **QUICK)
@given(
    texts=st.lists(st.text(max_size=12), max_size=12),
    cut=st.integers(1, 16),
    ascii_only=st.booleans(),
)
def test_any_text(texts: list[str], cut: int, ascii_only: bool) -> None:
    values = [
        json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")[1:-1]
        for value in texts
    ]
    lines = [*BEGIN, *map(text, values), *END]
    found = outcome(lines, raw=True, reads=cut)
    assert found == outcome(lines, raw=False)
    assert found[1]["content"] == [{"type": "text", "text": "".join(texts)}]


def test_a_delta_of_another_turn_is_left_out() -> None:
    translator = Translator(turn_id="mine")
    for line in BEGIN:
        for found in translate.decode(line):
            translator.feed(found)
    others = TAIL[:-1] + b',"user_message_uuids":["another"]}'
    mine = TAIL[:-1] + b',"user_message_uuids":["mine"]}'
    assert b"".join(translator.relay([text(b"a", others)])) == b""
    assert b'"text":"b"' in b"".join(translator.relay([text(b"b", mine)]))


def test_half_a_character_is_replaced_and_costs_no_more() -> None:
    lines = [*BEGIN, text(b"a\\ud83d"), text(b"\\\\ud83d \\uDE00 b"), *END]
    for raw in (True, False):
        events, message, error = outcome(lines, raw=raw)
        assert (message["content"][0]["text"], error) == ("a\ufffd\\ud83d \ufffd b", "")
        assert events[-1] == {"type": "message_stop"}


def test_a_delta_keeps_its_bytes() -> None:
    """A number's form, a key's escape: nothing of the event is written anew."""
    translator = Translator()
    for line in BEGIN:
        for found in translate.decode(line):
            translator.feed(found)
    inner = b'{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"\\u0041\\/"}}'
    line = b'{"type":"stream_event","event":' + inner + TAIL
    assert b"".join(translator.relay([line, line])) == 2 * (
        b"event: content_block_delta\ndata: " + inner + b"\n\n"
    )
    assert translator.message["content"] == [{"type": "text", "text": ""}]
