"""The strict grammar of a Messages stream: what every client reads without an error, and alike.

stream = message_start  block*  message_delta+  message_stop      ping anywhere before the end
block  = content_block_start(i)  content_block_delta(i)*  content_block_stop(i)    i = 0, 1, 2 ...
error  may take any event's place, and is the last one

The API adds types and keys as it likes, so what is new passes: an event once the message has begun,
a block, a delta in any block, a key of anything.  What is known has to be as the SDKs know it.
"""

import contextlib
import json
from typing import Any

Json = dict[str, Any]

# Shapes: a type (an int is never negative, a NAME never empty), a tuple of allowed values, the
# shape of an object, or None for any value.  `?` stands after keys that may be left out.
CREATION = {"ephemeral_5m_input_tokens": int, "ephemeral_1h_input_tokens": int}
SERVER_TOOLS = {"web_search_requests": int, "web_fetch_requests": int}
FINAL_USAGE = {
    "output_tokens": int,
    "input_tokens?": int,
    "cache_creation_input_tokens?": int,
    "cache_read_input_tokens?": int,
    "cache_creation?": CREATION,
    "server_tool_use?": SERVER_TOOLS,
    "service_tier?": ("standard", "priority", "batch"),
}
FIRST_USAGE = FINAL_USAGE | {"input_tokens": int}
MESSAGE = {
    "id": str,
    "type": ("message",),
    "role": ("assistant",),
    "model": str,
    "content": ([],),
    "stop_reason": (None,),
    "stop_sequence": (None,),
    "usage": dict,
}
ENDS = {"stop_reason": str, "stop_sequence": None, "stop_details?": {"type": str}}
EVENTS: dict[str, Json] = {
    "message_start": {"message": dict},
    "content_block_start": {"index": int, "content_block": {"type": str}},
    "content_block_delta": {"index": int, "delta": {"type": str}},
    "content_block_stop": {"index": int},
    "message_delta": {"delta": dict, "usage": dict},
    "message_stop": {},
    "ping": {},
    "error": {"error": {"type": str, "message": str}, "request_id": str},
}
CALL = {"id": str, "name": str, "input": dict}
BLOCKS: dict[str, Json] = {
    "text": {"text": ("",), "citations?": list},
    "thinking": {"thinking": ("",), "signature": ("",)},
    "redacted_thinking": {"data": str},
    "tool_use": CALL,
    "server_tool_use": CALL,
    "mcp_tool_use": CALL,
}
INPUT = {"input_json_delta": {"partial_json": str}}
DELTAS: dict[str, dict[str, Json]] = {
    "text": {"text_delta": {"text": str}, "citations_delta": {"citation": dict}},
    "thinking": {"thinking_delta": {"thinking": str}, "signature_delta": {"signature": str}},
    "redacted_thinking": {},
    "tool_use": INPUT,
    "server_tool_use": INPUT,
    "mcp_tool_use": INPUT,
}
KNOWN_DELTAS = {kind: shape for kinds in DELTAS.values() for kind, shape in kinds.items()}
KNOWN_KEYS = frozenset(
    ("type", "id", "name", "data", "text", "thinking", "signature", "input", "citations")
)
NAMES = ("id", "model", "name", "stop_reason", "type", "message")  # strings that are never empty


def check_stream(events: list[Json]) -> Json:
    """Assert the grammar.

    Returns the message that a client assembles, or the error event that took its end.
    """
    client = Client()
    for number, event in enumerate(events):
        client.read(event, f"event {number} ({event.get('type')})")
    assert client.ended, "the stream ended without message_stop or error"
    return {"message": None if client.error else client.message, "error": client.error}


def check_order(events: list[Json]) -> None:
    """Assert the grammar's order of events, whatever is in them."""
    place = "begin"
    count = 0
    for number, event in enumerate(events):
        kind = event["type"]
        at = f"event {number} ({kind}) at {place}"
        assert place != "end", at
        if kind == "error":
            place = "end"
        if kind not in ORDER:
            assert place != "begin" or kind == "ping", at
            continue
        before, following = ORDER[kind]
        assert place in before, at
        place = following
        if kind.startswith("content_block_"):
            count += kind == "content_block_start"
            assert event["index"] == count - 1, f"{at}: index {event['index']}"
    assert place == "end", "the stream ended without message_stop or error"


def loose_message(events: list[Json]) -> Json | None:
    """Assert the order, whatever the CLI put into the events.

    Returns the message that a client assembles; None: of an error, or of what no client knows.
    """
    check_order(events)
    with contextlib.suppress(AssertionError):
        message: Json | None = check_stream(events)["message"]
        return message
    return None


# Event -> where it may stand, and where the next one does.
ORDER = {
    "message_start": (("begin",), "outside"),
    "content_block_start": (("outside",), "inside"),
    "content_block_delta": (("inside",), "inside"),
    "content_block_stop": (("inside",), "outside"),
    "message_delta": (("outside", "after"), "after"),
    "message_stop": (("after",), "end"),
}


class Client:
    """A client that is as strict as the strictest, and forgets nothing of what it reads."""

    def __init__(self) -> None:
        self.message: Json = {}  # as far as it has come
        self.error: Json | None = None
        self.ended = False
        self._block: Json | None = None  # the open one
        self._input = ""  # of the open block
        self._is_cut = False  # the input of the last block is not JSON: max_tokens cut it off

    def read(self, event: Json, at: str) -> None:
        assert not self.ended, f"{at} after the end"
        kind = event.get("type")
        assert isinstance(kind, str), f"{at}: no type"
        assert kind, f"{at}: no type"
        assert kind.isprintable(), f"{at}: a type that breaks the lines of an event stream"
        check(event, EVENTS.get(kind, {}), at)
        if kind == "error":
            self.error = event
            self.ended = True
            return
        if kind == "ping":
            return
        assert bool(self.message) == (kind != "message_start"), f"{at} at this place"
        if kind in EVENTS and kind.startswith("content_block_"):
            self._read_block_event(kind, event, at)
        elif kind == "message_start":
            self._start(event["message"], at)
        elif kind == "message_delta":
            self._end(event, at)
        elif kind == "message_stop":
            assert self.message["stop_reason"], f"{at} without message_delta"
            self.ended = True

    def _start(self, message: Json, at: str) -> None:
        check(message, MESSAGE, at)
        check(message["usage"], FIRST_USAGE, f"{at}.usage")
        check_nothing_empty(message, at, besides=MESSAGE)
        check_nothing_empty(message["usage"], f"{at}.usage")
        self.message = copied(message)

    def _read_block_event(self, kind: str, event: Json, at: str) -> None:
        content = self.message["content"]
        assert self.message["stop_reason"] is None, f"{at} after message_delta"
        assert not self._is_cut, f"{at} after an input that is not JSON"
        begins = kind == "content_block_start"
        assert begins == (self._block is None), f"{at}: open is {self._block}"
        expected = len(content) if begins else len(content) - 1
        assert event["index"] == expected, f"{at}: index {event['index']}, expected {expected}"
        if self._block is None:
            self._block = copied(event["content_block"])
            check(self._block, BLOCKS.get(self._block["type"], {}), at)
            nulls = [key for key, value in self._block.items() if value is None]
            assert not nulls, f"{at}: {', '.join(nulls)} is null: leave it out"
            content.append(self._block)
            self._input = ""
        elif kind == "content_block_delta":
            self._add(self._block, copied(event["delta"]), at)
        else:
            if self._input:
                whole = parsed_input(self._input)
                self._is_cut = whole is None
                self._block["input"] = whole or {}
            self._block = None

    def _add(self, block: Json, delta: Json, at: str) -> None:
        kind = delta.pop("type")
        if kind in KNOWN_DELTAS:
            allowed = DELTAS.get(block["type"], KNOWN_DELTAS)
            assert kind in allowed, f"{at}: {kind} in a {block['type']} block"
            check(delta, KNOWN_DELTAS[kind], at)
        match kind:
            case "text_delta" | "thinking_delta":
                key = kind.removesuffix("_delta")
                before = block.get(key)
                block[key] = before + delta[key] if isinstance(before, str) else delta[key]
            case "input_json_delta":
                self._input += delta["partial_json"]
            case "citations_delta":
                block["citations"] = [*block.get("citations", ()), delta["citation"]]
            case "signature_delta":
                block["signature"] = delta["signature"]
            case _:  # the keys of something new are the block's, and are new as well
                assert not KNOWN_KEYS & delta.keys(), f"{at}: {kind} has a known key"
                block.update(delta)

    def _end(self, event: Json, at: str) -> None:
        assert self._block is None, f"{at} inside a block"
        ends, usage = event["delta"], event["usage"]
        check(ends, ENDS, at)
        check(usage, FINAL_USAGE, f"{at}.usage")
        check_nothing_empty(ends, at, besides=ENDS)
        check_nothing_empty(event, at, besides=EVENTS["message_delta"])
        check_nothing_empty(usage, f"{at}.usage")
        is_whole = ends["stop_reason"] in ("tool_use", "end_turn", "stop_sequence", "pause_turn")
        assert not (self._is_cut and is_whole), f"{at}: the tool's input is not JSON"
        sequence = ends["stop_sequence"]
        assert sequence is None or type(sequence) is str, f"{at}: stop_sequence is {sequence!r}"
        stopped = ends["stop_reason"] == "stop_sequence"
        assert sequence is None or stopped, f"{at}: stop_sequence of {ends['stop_reason']}"
        before = self.message["usage"]["output_tokens"]
        assert usage["output_tokens"] >= before, f"{at}: output_tokens went down"
        more = {key: value for key, value in event.items() if key not in ("type", "delta", "usage")}
        taken = {**ends, **more}
        kept = {key for key in MESSAGE if not key.startswith("stop_")} & taken.keys()
        assert not kept, f"{at}: {', '.join(kept)} belongs to message_start"
        self.message.update(copied(taken))
        self.message["usage"].update(copied(usage))


def copied(value: Json) -> Json:
    copy: Json = json.loads(json.dumps(value))
    return copy


def parsed_input(text: str) -> Json | None:
    """None: it is not a JSON object."""
    with contextlib.suppress(ValueError):
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    return None


def check_nothing_empty(value: Json, at: str, besides: Json | None = None) -> None:
    """The Vercel AI SDK breaks on some keys that hold null, {} or []: there are none."""
    known = {key.removesuffix("?") for key in besides or {}}
    empty = [key for key, inner in value.items() if inner in (None, {}, []) and key not in known]
    assert not empty, f"{at}: {', '.join(empty)} is empty: leave it out"


def check(value: Json, shape: Json, at: str) -> None:
    for name, allowed in shape.items():
        key = name.removesuffix("?")
        assert key in value or key != name, f"{at}: no {key}"
        if key not in value or allowed is None:
            continue
        found = value[key]
        if isinstance(allowed, tuple):
            assert found in allowed, f"{at}: {key} is {found!r}"
            continue
        kind = dict if isinstance(allowed, dict) else allowed
        assert type(found) is kind, f"{at}: {key} is {found!r}"
        assert kind is not int or found >= 0, f"{at}: {key} is {found}"
        assert found != "" or key not in NAMES, f"{at}: {key} is empty"
        if isinstance(allowed, dict):
            check(found, allowed, f"{at}.{key}")
