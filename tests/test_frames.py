"""The frames of a stream."""

import json
from typing import Any

from hypothesis import given, settings
from messages import JSON_VALUES, QUICK, texts

import translate
from translate import frame


@settings(max_examples=120, **QUICK)
@given(JSON_VALUES, texts)
def test_a_frame_is_an_event_line_and_one_data_line_and_comes_back_equal(
    value: Any, key: str
) -> None:
    event = {key: value, "type": "content_block_delta"}
    name, data, *rest = frame(event).decode().splitlines()
    assert (name, rest) == ("event: content_block_delta", [""])
    assert json.loads(data.removeprefix("data: ")) == event


def test_characters_that_split_lines_are_escaped_in_a_frame() -> None:
    value = "a\u2028b\u2029c\u0085d\u00c2é漢😀"
    data = frame({"type": "ping", "t": value})
    assert not any(raw in data.decode() for raw in "\u2028\u2029\u0085")
    assert b"\\u2028b\\u2029c\\u0085d" in data
    assert json.loads(data.split(b"\n")[1][6:])["t"] == value
    assert translate.PING == b'event: ping\ndata: {"type":"ping"}\n\n'
