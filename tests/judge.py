"""What the API refuses, as far as the conformance drivers ask for it: the stub API judges with it
when it is told to.

The bridge refuses none of this itself.  Wording: the API's own, as seen in public threads.
"""

import binascii
from typing import Any

Json = dict[str, Any]


class Refused(Exception):
    """A request that the API refuses with 400; its text is the API's message."""


def bad(place: str, message: str) -> Refused:
    return Refused(f"{place}: {message}")


class Tagged(dict[str, Any]):
    """A shape chosen by the value's `type`."""


# Shapes: a type, a tuple of allowed values, [shape of the items], {key: shape} with `?` after
# optional keys, Tagged, or `bytes` for base64 text.  Keys that are not named may hold anything
# (API: clients send betas and new fields).
STRING_OR_BLOCKS = object()
TEXT = {"text": str}
IMAGE = {
    "source": Tagged(
        base64={"media_type": ("image/jpeg", "image/png", "image/gif", "image/webp"), "data": bytes}
    )
}
PDF = {"media_type": ("application/pdf",), "data": bytes}
DOCUMENT = {
    "source": Tagged(base64=PDF, text={"data": str}, content={"content": STRING_OR_BLOCKS}),
    "title?": str,
}
SEARCH_RESULT = {"source": str, "title": str, "content": [Tagged(text=TEXT)]}
INNER_BLOCKS = Tagged(text=TEXT, image=IMAGE, document=DOCUMENT, search_result=SEARCH_RESULT)
THINKING = {"thinking": str, "signature": str}
TOOL_USE = {"id": str, "name": str, "input": dict}
TOOL_RESULT = {"tool_use_id": str, "content?": STRING_OR_BLOCKS, "is_error?": bool}
BLOCKS = {
    "user": Tagged(INNER_BLOCKS, tool_result=TOOL_RESULT),
    "assistant": Tagged(
        text=TEXT, thinking=THINKING, redacted_thinking={"data": str}, tool_use=TOOL_USE
    ),
    "system": Tagged(text=TEXT),
}
EFFORTS = ("low", "medium", "high", "xhigh", "max")
REQUEST = {
    **{
        "model": str,
        "max_tokens": int,
        "messages": list,
        "stream?": bool,
        "metadata?": dict,
        "tools?": [dict],
    },
    **{"temperature?": float, "top_p?": float, "top_k?": int, "stop_sequences?": [str]},
    "service_tier?": ("auto", "standard_only"),
    "thinking?": Tagged(enabled={"budget_tokens": int}, adaptive={}, disabled={}, between_tools={}),
    "output_config?": {"effort?": EFFORTS, "format?": Tagged(json_schema={"schema": dict})},
    "tool_choice?": Tagged(auto={}, any={}, none={}, tool={"name": str}),
}
TYPE_NAMES = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    list: "list",
    dict: "object",
}
MOST_BREAKPOINTS = 4
# The CLI lists no tool without a type.
TOOL = {"name": str, "description?": str, "input_schema": {"type": ("object",)}}


def check(value: Any, shape: Any, place: str) -> None:
    """Raise ApiError 400, in the API's wording and with the place, unless `value` has the shape."""
    if isinstance(shape, Tagged):
        check(value, dict, place)
        tag = value.get("type")
        if not isinstance(tag, str) or tag not in shape:
            tags = ", ".join(repr(name) for name in shape)
            wrong = f"Input tag {tag!r} found using 'type' does not match any of the expected tags: {tags}"
            raise bad(*((f"{place}.type", "Field required") if tag is None else (place, wrong)))
        check(value, shape[tag], f"{place}.{tag}")
    elif isinstance(shape, dict):
        check(value, dict, place)
        for name, inner in shape.items():
            key = name.removesuffix("?")
            where = f"{place}.{key}".lstrip(".")
            if value.get(key) is not None:
                check(value[key], inner, where)
            elif key == name:
                raise bad(where, "Field required")
    elif isinstance(shape, list):
        check(value, list, place)
        for number, item in enumerate(value):
            check(item, shape[0], f"{place}.{number}")
    elif isinstance(shape, tuple):
        if value not in shape:
            raise bad(place, f"Input should be {' or '.join(map(repr, shape))}")
    elif shape is STRING_OR_BLOCKS:
        if not isinstance(value, str):
            check(value, [INNER_BLOCKS], place)
    elif shape is bytes:
        check(value, str, place)
        try:
            valid = bool(binascii.a2b_base64(value, strict_mode=True))
        except ValueError:
            valid = False
        if not valid:
            raise bad(place, "Input should be valid base64")
    elif type(value) not in ((int, float) if shape is float else (shape,)):
        raise bad(place, f"Input should be a valid {TYPE_NAMES[shape]}")


def check_ranges(data: Json) -> None:
    for name, least in (("max_tokens", 1), ("top_k", 0)):
        if (data.get(name) or 0) < least:
            raise bad(name, f"Input should be greater than or equal to {least}")
    for name in ("temperature", "top_p"):
        if not 0 <= (data.get(name) or 0) <= 1:
            raise bad(name, "range: 0..1")
    if "" in (data.get("stop_sequences") or []):
        raise bad("stop_sequences", "each stop sequence must be non-empty")
    thinking = data.get("thinking")
    if thinking and thinking["type"] == "enabled":
        budget = thinking["budget_tokens"]
        if budget < 1024:
            raise bad(
                "thinking.enabled.budget_tokens", "Input should be greater than or equal to 1024"
            )
        if budget >= data["max_tokens"]:
            raise Refused("`max_tokens` must be greater than `thinking.budget_tokens`.")


def breakpoints(value: Any) -> list[Any]:
    """Each `cache_control` in blocks or tools, and in the blocks that they hold, in their order."""
    found = []
    for block in value if isinstance(value, list) else []:
        if isinstance(block, dict):
            source = block.get("source")
            holder = source if isinstance(source, dict) else block
            found += breakpoints(holder.get("content"))
            found += filter(None, [block.get("cache_control")])
    return found


def check_breakpoints(body: Json) -> None:
    found = breakpoints(body.get("tools")) + breakpoints(body.get("system"))
    for message in body["messages"]:
        found += breakpoints(message.get("content"))
    found += filter(None, [body.get("cache_control")])
    if len(found) > MOST_BREAKPOINTS:
        words = f"A maximum of {MOST_BREAKPOINTS} blocks with cache_control may be provided."
        raise Refused(f"{words} Found {len(found)}.")
    times = ["1h" if control.get("ttl") == "1h" else "5m" for control in found]
    if times != sorted(times):  # "1h" < "5m"
        words = "a ttl='1h' cache_control block must not come after a ttl='5m' cache_control block."
        order = (
            "Note that blocks are processed in the following order: `tools`, `system`, `messages`."
        )
        raise Refused(f"{words} {order}")


def check_contents(messages: list[Json]) -> None:
    for number, message in enumerate(messages):
        is_prefill = number == len(messages) - 1 and message["role"] == "assistant"
        if not message["content"] and not is_prefill:
            words = "all messages must have non-empty content"
            raise bad(
                f"messages.{number}", f"{words} except for the optional final assistant message"
            )


def judge(body: Json) -> None:
    """Raise Refused unless the API would take the request."""
    check(body, REQUEST, "")
    check_ranges(body)
    check_breakpoints(body)
    check_contents(body["messages"])
    names = [tool.get("name") for tool in body.get("tools") or []]
    if len(names) != len(set(names)):
        raise bad("tools", "Tool names must be unique.")
    for number, tool in enumerate(body.get("tools") or []):
        if tool.get("type") in (None, "custom"):
            check(tool, TOOL, f"tools.{number}")
    for number, message in enumerate(body["messages"]):
        if isinstance(message["content"], list):
            check(message["content"], [BLOCKS[message["role"]]], f"messages.{number}.content")
