"""The strict grammar of a Messages stream: what every client reads without an error and in the same way.

stream = message_start  block*  message_delta+  message_stop      ping anywhere before the end
block  = content_block_start(i)  content_block_delta(i)*  content_block_stop(i)      i = 0, 1, 2 ...
error  may take any event's place, and is the last one
"""

import contextlib
import json
from typing import Any

Json = dict[str, Any]

# Shapes: a type (an int is never negative), a tuple of allowed values, {key: shape} with `?` after optional keys, or
# None for any value.  Keys without a shape hold anything but null; events have no such keys.
DELTA_USAGE = {
    "output_tokens": int,
    "cache_creation_input_tokens?": int,
    "cache_read_input_tokens?": int,
    "cache_creation?": {"ephemeral_5m_input_tokens": int, "ephemeral_1h_input_tokens": int},
    "service_tier?": ("standard", "priority", "batch"),
}
START = {
    **{"id": str, "type": ("message",), "role": ("assistant",), "model": str, "content": ([],)},
    **{"stop_reason": (None,), "stop_sequence": (None,), "usage": {"input_tokens": int, **DELTA_USAGE}},
}
BLOCKS = {
    "text": {"text": ("",), "citations?": list},
    "thinking": {"thinking": ("",), "signature": ("",)},
    "redacted_thinking": {"data": str},
    "tool_use": {"id": str, "name": str, "input": ({},)},
}
DELTAS: dict[str, Json] = {
    "text": {"text_delta": {"text": str}, "citations_delta": {"citation": dict}},
    "thinking": {"thinking_delta": {"thinking": str}, "signature_delta": {"signature": str}},
    "redacted_thinking": {},
    "tool_use": {"input_json_delta": {"partial_json": str}},
}
EVENTS = {
    "message_start": {"message": START},
    "content_block_start": {"index": int, "content_block": dict},
    "content_block_delta": {"index": int, "delta": dict},
    "content_block_stop": {"index": int},
    "message_delta": {
        "delta": {"stop_reason": str, "stop_sequence": None, "stop_details?": dict},
        "usage": {"input_tokens?": int, **DELTA_USAGE},
    },
    "message_stop": {},
    "ping": {},
    "error": {"error": {"type": str, "message": str}, "request_id": str},
}
NAMES = ("id", "model", "name", "stop_reason", "type", "message")  # strings that are never empty


def check_stream(events: list[Json]) -> Json:
    """Assert the grammar.  Returns the message that a client assembles, or the error event that took its end."""
    message: Json = {}
    block: Json | None = None  # the open one
    tool_input, ended = "", False
    for number, event in enumerate(events):
        kind = str(event.get("type"))
        at = f"event {number} ({kind})"
        assert not ended, f"{at} after the end"
        assert kind in EVENTS, f"{at}: unknown type"
        check(event, EVENTS[kind], at)
        assert len(event) == len(EVENTS[kind]) + 1, f"{at}: its keys are {', '.join(event)}"
        if kind == "error":
            assert event is events[-1], f"{at}: something follows it"
            return {"message": None, "error": event}
        if kind in ("message_start", "ping"):
            assert kind == "ping" or not message, f"{at}: the second one"
            message = message if kind == "ping" else json.loads(json.dumps(event["message"]))
            continue
        assert message, f"{at} before message_start"
        assert (block is not None) == (kind in ("content_block_delta", "content_block_stop")), f"{at}: open: {block}"
        if "index" in event:
            assert message["stop_reason"] is None, f"{at} after message_delta"
            expected = len(message["content"]) - (block is not None)
            assert event["index"] == expected, f"{at}: index {event['index']}, expected {expected}"
        if kind == "content_block_start":
            assert str(event["content_block"].get("type")) in BLOCKS, f"{at}: {event['content_block']}"
            check(event["content_block"], BLOCKS[event["content_block"]["type"]], at)
            block, tool_input = json.loads(json.dumps(event["content_block"])), ""
            message["content"].append(block)
        elif kind == "content_block_delta" and block:
            delta = event["delta"]
            assert str(delta.get("type")) in DELTAS[block["type"]], f"{at}: {delta} in a {block['type']} block"
            check(delta, DELTAS[block["type"]][delta["type"]], at)
            tool_input += delta.get("partial_json", "")
            for key in {"text", "thinking"} & set(delta):
                block[key] += delta[key]
            block |= {"signature": delta["signature"]} if "signature" in delta else {}
            block |= {"citations": [*block.get("citations", []), delta["citation"]]} if "citation" in delta else {}
        elif kind == "content_block_stop" and block:
            if tool_input:
                block["input"] = None
                with contextlib.suppress(ValueError):
                    block["input"] = json.loads(tool_input)
                assert isinstance(block["input"], dict), f"{at}: the tool's input is {tool_input}"
            block = None
        elif kind == "message_delta":
            message |= event["delta"]
            sequence = message["stop_sequence"]
            assert sequence is None or isinstance(sequence, str), f"{at}: {event['delta']}"
            assert sequence is None or message["stop_reason"] == "stop_sequence", f"{at}: {event['delta']}"
            assert "type" in message.get("stop_details", ["type"]), f"{at}: {event['delta']}"
            used = {key: count for key, count in event["usage"].items() if type(count) is int}  # what clients take over
            assert used["output_tokens"] >= message["usage"]["output_tokens"], f"{at}: output_tokens went down"
            message["usage"] |= used
        elif kind == "message_stop":
            assert message["stop_reason"], f"{at} without message_delta"
            ended = True
    assert ended, "the stream ended without message_stop or error"
    return {"message": message, "error": None}


def check(value: Json, shape: Json, at: str) -> None:
    for name, allowed in shape.items():
        key = name.removesuffix("?")
        assert key in value or key != name, f"{at}: no {key}"
        found = value.get(key)
        if key not in value or allowed is None:
            continue
        if isinstance(allowed, tuple):
            assert found in allowed, f"{at}: {key} is {found!r}"
            continue
        assert type(found) is (dict if isinstance(allowed, dict) else allowed), f"{at}: {key} is {found!r}"
        assert allowed is not int or found >= 0, f"{at}: {key} is {found}"
        assert found != "" or key not in NAMES, f"{at}: {key} is empty"
        if isinstance(allowed, dict):
            check(found, allowed, f"{at}.{key}")
    nulls = [key for key, inner in value.items() if inner is None and key not in shape]
    assert not nulls, f"{at}: {', '.join(nulls)} is null: leave it out"
