"""Who is who: a process answers a request only if the API would take the process's conversation
and the request's history for the same.

Conversations are generated and changed somewhere.  What counts as the same in spite of a change is
written in SAME, apart from the rules in translate.py, each row with its reason.
"""

import contextlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pytest
import readme
from client import Answer
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from messages import (
    CACHED,
    FOUND,
    IMAGE,
    PAGE,
    PDF,
    QUICK,
    REDACTED,
    THOUGHT,
    TOOL,
    places,
    role,
    text,
    user,
)
from processes import pid
from servers import Serve, Server

from sessions import Kind, Session, State
from translate import ApiError, Request, parse_request

Json = dict[str, Any]
Draw = Callable[[Any], Any]

# A case is what a client sends: {"betas": the header, "body": the body}.

# ---------------------------------------------------------------- what is the same

THINKING = ("thinking", "redacted_thinking")
NON_ANSWER_TYPES = (*THINKING, "fallback")


def copied(value: Any) -> Any:
    return orjson.loads(orjson.dumps(value))


def as_list(content: Any) -> Any:
    """A string as the blocks that it stands for."""
    if isinstance(content, str):
        return [text(content)] if content else []
    return content


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def blocks_in(block: Json) -> list[Any]:
    source = block.get("source")
    return listed((source if isinstance(source, dict) else block).get("content"))


def kind_of(block: Any) -> Any:
    return block.get("type") if isinstance(block, dict) else None


def marked(value: Any) -> bool:
    return isinstance(value, dict) and value.get("cache_control") is not None


def known_blocks(case: Json) -> Iterator[Json]:
    """The blocks of messages, and what is in them: results, sources, citations."""

    def walk(value: Any) -> Iterator[Json]:
        for block in value if isinstance(value, list) else [value]:
            if isinstance(block, dict):
                yield block
                for key in ("content", "citations", "source"):
                    yield from walk(block.get(key))

    for message in case["body"]["messages"]:
        yield from walk(message["content"])


def same_model(case: Json) -> None:
    case["body"]["model"] = case["body"]["model"].removeprefix("claude-cli/")


def same_betas(case: Json) -> None:
    case["betas"] = sorted({name.strip() for name in case["betas"].split(",")} - {""})


def same_marks(case: Json) -> None:
    body = case["body"]
    are_own = sum(map(marked, [*(body.get("tools") or []), body])) > 1
    messages = [message for message in body["messages"] if not is_unsaid(message)]
    for message, following in zip_longest(messages, messages[1:]):
        content = listed(message["content"])
        after = [block["type"] == "tool_result" for block in content]
        goes_on = following is not None and following["role"] in ("user", "system")
        for number, block in enumerate(content if goes_on else content[:-1]):
            is_end = all(after[number:]) and not goes_on
            are_own |= message["role"] == "user" and marked(block) and not is_end
    body["marks"] = "client" if are_own else "cli"

    for message in body["messages"]:
        if not are_own:
            strip_marks(message["content"])


def strip_marks(content: Any) -> None:
    for block in listed(content):
        if isinstance(block, dict):
            block.pop("cache_control", None)
            strip_marks(blocks_in(block))


def same_tools(case: Json) -> None:
    names = {tool.get("name") for tool in case["body"].get("tools") or []} - {None}
    case["body"]["tools"] = sorted(names)


def same_system(case: Json) -> None:
    blocks = as_list(case["body"].get("system") or [])
    texts = [block["text"] for block in blocks if block["text"]]
    texts = [value for value in texts if not value.startswith("x-anthropic-billing-header:")]
    case["body"]["system"] = texts


def same_fields(case: Json) -> None:
    case["body"] = {
        name: case["body"][name] for name in ("model", "system", "tools", "marks", "messages")
    }


def same_message_keys(case: Json) -> None:
    case["body"]["messages"] = [
        {"role": message["role"], "content": message["content"]}
        for message in case["body"]["messages"]
    ]


def same_ending(case: Json) -> None:
    messages = case["body"]["messages"]
    if messages[1:] and messages[-1] in (role("assistant", ""), role("assistant", [])):
        messages.pop()


def same_strings(case: Json) -> None:
    for message in case["body"]["messages"]:
        message["content"] = as_list(message["content"])
    for block in known_blocks(case):
        if block.get("type") in ("tool_result", "content") and "content" in block:
            block["content"] = as_list(block["content"])


def same_reminder(case: Json) -> None:
    for message in case["body"]["messages"]:
        if message["role"] == "system":
            texts = [block["text"] for block in message["content"] if block["type"] == "text"]
            words = "<system-reminder>\n" + "\n".join(texts) + "\n</system-reminder>"
            message.update(role("user", [text(words)] if texts else []))


def is_unsaid(message: Json) -> bool:
    """Whether it is an assistant message that has only thinking."""
    kinds = {block["type"] for block in listed(message["content"])}
    return message["role"] == "assistant" and bool(kinds) and kinds <= {*NON_ANSWER_TYPES}


def same_unsaid(case: Json) -> None:
    messages = case["body"]["messages"]
    messages[:] = [message for message in messages if not is_unsaid(message)]


def same_roles(case: Json) -> None:
    merged: list[Json] = []
    for message in case["body"]["messages"]:
        if merged and merged[-1]["role"] == message["role"]:
            merged[-1]["content"] += message["content"]
        elif message["content"]:
            merged.append(message)
    case["body"]["messages"] = merged


def same_references(case: Json) -> None:
    for message in case["body"]["messages"]:
        for block in message["content"]:
            for part in listed(block.get("content")) if block["type"] == "tool_result" else []:
                if kind_of(part) == "tool_reference":
                    name = part.get("tool_name")
                    part.clear()
                    part.update(text(f"Tool loaded: {name}"))


def same_errors(case: Json) -> None:
    for message in case["body"]["messages"]:
        for block in message["content"]:
            is_result = block["type"] == "tool_result"
            if is_result and block.get("is_error") is True and listed(block.get("content")):
                block["content"] = [part for part in block["content"] if kind_of(part) == "text"]


def same_nulls(case: Json) -> None:
    for block in known_blocks(case):
        for key in [key for key, value in block.items() if value is None]:
            del block[key]


def same_noise(case: Json) -> None:
    for block in known_blocks(case):
        block.pop("parsed_output", None)
        if block.get("caller") == {"type": "direct"}:
            del block["caller"]


def same_defaults(case: Json) -> None:
    off = ({"enabled": False}, [])
    for block in known_blocks(case):
        if block.get("is_error") is False:
            del block["is_error"]
        if block.get("citations") in off:
            del block["citations"]
        if block.get("content") in ("", []):
            del block["content"]


def same_numbers(case: Json) -> None:
    for block in known_blocks(case):
        for container, key in places({"input": block["input"]}) if "input" in block else []:
            number = container[key]
            if type(number) is float and number.is_integer() and abs(number) < 2**53:
                container[key] = int(number)


def same_texts(case: Json) -> None:
    for message in case["body"]["messages"]:
        if message["role"] == "user":
            continue
        joined: list[Json] = []
        for block in message["content"]:
            if joined and is_plain_text(block) and is_plain_text(joined[-1]):
                joined[-1]["text"] += block["text"]
            else:
                joined.append(block)
        for block in filter(is_plain_text, joined):
            block["text"] = block["text"].strip()
        message["content"] = joined


def is_plain_text(block: Json) -> bool:
    return block.keys() == {"type", "text"} and block["type"] == "text"


class Row(NamedTuple):
    apply: Callable[[Json], None]
    reason: str
    readme: str  # words of tests/README.md that say so


# In the order in which they are applied.
SAME = {
    "model prefix": Row(
        same_model, "it is the bridge's own", "with or without `claude-cli/` before it"
    ),
    "betas": Row(same_betas, "a header is a set", "another set of betas is another process"),
    "marks": Row(
        same_marks,
        "the CLI's own stand for those at the ends of messages, and are set anew for each turn",
        "They stand for yours there, with your `ttl`",
    ),
    "tools": Row(same_tools, "all but the names is sent with each turn", "the names of tools"),
    "system": Row(
        same_system,
        "the CLI takes its texts alone; the billing line is the CLI's own",
        "the texts of the system prompt are joined, and lose their cache_control",
    ),
    "fields": Row(
        same_fields, "they are sent with each turn", "known today or not, for that request alone"
    ),
    "keys of messages": Row(
        same_message_keys, "x-bridge-not-sent tells of them", "names the fields and places"
    ),
    "empty ending": Row(
        same_ending,
        "the API takes it for none",
        "An empty assistant message at the end is taken for none",
    ),
    "strings": Row(
        same_strings, "API: a string is one text block", "a string is written as a text block"
    ),
    "system messages": Row(
        same_reminder,
        "the CLI has no place for them",
        "a system message becomes a &lt;system-reminder> in the user message beside it",
    ),
    "unsaid": Row(
        same_unsaid,
        "the CLI leaves them out",
        "an assistant message that has only thinking is left out",
    ),
    "roles": Row(
        same_roles, "API: they are one message", "neighbouring messages of one role are joined"
    ),
    "references": Row(
        same_references, "the CLI drops them", "becomes the text `Tool loaded: NAME`"
    ),
    "errors": Row(
        same_errors, "the CLI drops the rest", "all but the text of a failed tool's result"
    ),
    "nulls": Row(
        same_nulls, "API: null is a key that is not there", "A key of a block that is null"
    ),
    "noise": Row(
        same_noise,
        "SDKs add it to answers and echo it",
        "`parsed_output`, and a `caller` of type `direct`, are ignored",
    ),
    "defaults": Row(
        same_defaults, "they say what the API assumes", "is_error of false is left out"
    ),
    "numbers": Row(
        same_numbers,
        "JavaScript has one type of number: it echoes 1.0 as 1",
        "In a tool's input 1.0 is 1",
    ),
    "texts": Row(
        same_texts,
        "clients join, split and trim what the model said",
        "Neighbouring texts of an assistant count as one",
    ),
}
THINKING_ROW = Row(
    lambda case: drop_thinking(case),
    "clients leave it out; the process keeps it, and the answer says so",
    "if you leave it out, the process keeps it",
)


def drop_thinking(case: Json) -> None:
    for message in case["body"]["messages"]:
        blocks = message["content"]
        message["content"] = [block for block in blocks if block["type"] not in THINKING]


def history(case: Json, *, thinking: bool = True) -> str:
    """What the API would get of a case, up to the newest message."""
    case = copied(case)
    for name, row in SAME.items():
        if name == "texts" and not thinking:
            THINKING_ROW.apply(case)
        row.apply(case)
    case["body"]["messages"].pop()
    return json.dumps(case, sort_keys=True)


def echoes_thinking(case: Json) -> bool:
    said = copied(case)
    for name in ("strings", "system messages", "unsaid"):
        SAME[name].apply(said)
    blocks = [block for message in said["body"]["messages"] for block in message["content"]]
    return any(block["type"] in THINKING for block in blocks)


def is_same(had: Json, asked: Json) -> bool:
    """Whether the history of one is that of the other."""
    thinking = echoes_thinking(asked)
    return history(had, thinking=thinking) == history(asked, thinking=thinking)


# ---------------------------------------------------------------- sessions


def read(case: Json, messages: list[Any] | None = None) -> Request:
    body = case["body"] if messages is None else {**case["body"], "messages": messages}
    return parse_request(json.dumps(body).encode(), case["betas"])


def answered(message: Json) -> Json:
    """An assistant message as the bridge's answer that it was: blocks without marks."""
    blocks = copied(as_list(message["content"]))
    strip_marks(blocks)
    return role("assistant", blocks)


def rests(answer: Json) -> bool:
    """Whether a process is filed after it."""
    return any(block.get("text") or block["type"] == "tool_use" for block in answer["content"])


def session_of(case: Json) -> Session | None:
    """The session that has given the answers of a conversation, the last one before the last
    message; none: it is not on file."""
    messages = case["body"]["messages"]
    session = None
    for number, message in enumerate(messages[:-1]):
        if message["role"] != "assistant":
            continue
        answer = answered(message)
        if not number or messages[number - 1]["role"] == "assistant" or not rests(answer):
            session = None
            continue
        request = read(case, messages[:number])
        if not session or not session.matches(request):
            none: Any = None
            session = Session(none, Kind("sonnet"), State.BUSY)
            session.parts = request.fingerprint.parts
            session.chain = request.fingerprint.past
            session.unthinking_chain = request.fingerprint.past_without_thinking
        session.extend(request, answer)
    return session


def as_had(case: Json) -> Json:
    """The case as its process has it: the last answer as it was given, nothing of the question."""
    case = copied(case)
    messages = case["body"]["messages"]
    messages[-2:] = [answered(messages[-2]), role("user", "next")]
    return case


# ---------------------------------------------------------------- conversations

WORDS = st.sampled_from(["a", "b", "ab", "a b", "a\n", "1", "é", "<b>"])
INPUTS = st.recursive(
    st.sampled_from([None, True, False, 0, 1, 1.0, 1.5, "1", "", 2**60, 1e20]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner),
    max_leaves=4,
)
PHASES = (Phase.generate, Phase.shrink)  # an explanation takes a minute
MARKS = st.sampled_from([{"type": "ephemeral"}, {"type": "ephemeral", "ttl": "1h"}])
CITED = {"type": "web_search_result_location", "cited_text": "x", "url": "u", "title": None}
URL = {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}}
GIF = {"type": "image", "source": {"type": "base64", "media_type": "image/gif", "data": "R0lGODlh"}}
NEW = {"type": "new", "a": {"b": [1, None]}, "content": [{"type": "x", "n": 1.0}]}
SEARCH: list[Json] = [
    {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {"query": "x"}},
    {
        "type": "web_search_tool_result",
        "tool_use_id": "s1",
        "content": [{"type": "web_search_result", "url": "u", "page_age": None}],
    },
]
FALLBACK = {"type": "fallback", "from": {"model": "a"}, "to": {"model": "b"}}
TOOLS: list[Json] = [
    TOOL,
    {"name": "time", "description": "d", "input_schema": {"type": "object"}, **CACHED},
    {"type": "web_search_20250305", "name": "web_search", "max_uses": 1},
    {"type": "mcp_toolset", "mcp_server_name": "x"},
]
THOUGHTS = [
    THOUGHT,
    REDACTED,
    {"type": "thinking", "thinking": "hm", "signature": "c2ln"},
]


def draw_document(draw: Draw) -> Json:
    parts: list[Any] = [draw(WORDS), [text(draw(WORDS)), GIF]]
    source = {"type": "content", "content": draw(st.sampled_from(parts))}
    return {"type": "document", "source": source}


def draw_user_block(draw: Draw) -> Json:
    kind = draw(st.integers(0, 9))
    if kind < 5:
        return text(draw(WORDS))
    if kind == 5:
        return draw_document(draw)
    block: Json = draw(st.sampled_from([IMAGE, URL, PAGE, PDF, FOUND, NEW]))
    return block


def draw_result(draw: Draw, call: str) -> Json:
    result: Json = {"type": "tool_result", "tool_use_id": call}
    kind = draw(st.integers(0, 3))
    if kind == 1:
        result["content"] = draw(WORDS)
    elif kind > 1:
        parts = [text("a"), text("b"), GIF, FOUND, PAGE]
        parts += [{"type": "tool_reference", "tool_name": "time"}, draw_document(draw)]
        result["content"] = draw(st.lists(st.sampled_from(parts), max_size=3))
    is_error = draw(st.sampled_from([..., ..., True, False]))
    return result if is_error is ... else result | {"is_error": is_error}


def draw_answer(draw: Draw, call: str) -> list[Json]:
    blocks: list[Json] = []
    if draw(st.integers(0, 2)) == 0:
        blocks.append(draw(st.sampled_from(THOUGHTS)))
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.integers(0, 9))
        if kind < 6:
            blocks.append(text(draw(WORDS)))
        elif kind == 6:
            blocks.append(text(draw(WORDS), citations=[CITED]))
        elif kind == 7:
            blocks += SEARCH
        else:
            blocks.append(draw(st.sampled_from([NEW, FALLBACK, *THOUGHTS])))
    if draw(st.integers(0, 2)) == 0:
        name = draw(st.sampled_from(["weather", "time"]))
        value = draw(st.dictionaries(st.sampled_from("ab"), INPUTS, min_size=1, max_size=2))
        blocks.append({"type": "tool_use", "id": call, "name": name, "input": value})
    return blocks


def draw_marks(draw: Draw, blocks: list[Json]) -> None:
    """Cache breakpoints on some blocks, and in some."""
    for number, block in enumerate(blocks):
        inner = [part for part in blocks_in(block) if isinstance(part, dict)]
        if draw(st.integers(0, 9)) == 0:
            blocks[number] = {**block, "cache_control": draw(MARKS)}
        elif inner and draw(st.integers(0, 9)) == 0:
            inner[0]["cache_control"] = draw(MARKS)


@st.composite
def cases(draw: Draw, *, agent: bool = False) -> Json:
    """A conversation that ends with a question, after an answer."""
    messages: list[Json] = []
    calls: list[str] = []
    are_marked = draw(st.booleans())
    for number in range(draw(st.integers(1, 3))):
        asked = [draw_result(draw, call) for call in calls]
        more = draw(st.integers(0 if asked else 1, 2))
        asked += [draw_user_block(draw) for _ in range(more)]
        said = draw_answer(draw, f"t{number}")
        calls = [block["id"] for block in said if block["type"] == "tool_use"]
        messages.append(role("user", copied(asked)))
        if draw(st.integers(0, 5)) == 0:
            messages.append(role("system", draw(WORDS)))
        messages.append(role("assistant", copied(said)))
    last = [*(draw_result(draw, call) for call in calls), text("next")]
    messages.append(role("user", last))
    for message in messages:
        if are_marked and message["role"] != "system":
            draw_marks(draw, message["content"])
    body: Json = {"model": draw(st.sampled_from(["sonnet", "claude-cli/opus"])), "max_tokens": 9}
    system = draw(st.sampled_from([..., "", "a", [text("a"), text("b", **CACHED)]]))
    tools = [] if agent else draw(st.lists(st.sampled_from(TOOLS), max_size=3))
    if system is not ...:
        body["system"] = copied(system)
    if tools:
        body["tools"] = copied(tools)
    body["messages"] = messages
    return {"betas": draw(st.sampled_from(["", "x", "x,y", "y, x"])), "body": body}


# ---------------------------------------------------------------- changes

SCALARS = [1, 1.0, True, "1", 0.5, 0, -0.0, False, None, "", 2**60 + 1]
ADDED: list[tuple[str, Any]] = [
    ("new", 1),
    ("new", None),
    ("parsed_output", {"x": 1}),
    ("cache_control", {"type": "ephemeral"}),
    ("cache_control", {"type": "ephemeral", "ttl": "1h"}),
    ("cache_control", None),
    ("citations", []),
    ("citations", {"enabled": False}),
    ("citations", {"enabled": True}),
    ("citations", None),
    ("is_error", False),
    ("is_error", True),
    ("caller", {"type": "direct"}),
    ("caller", {"type": "code_execution_20250825", "tool_id": "x"}),
    ("content", []),
    ("content", ""),
    ("title", "t"),
    ("id", "x"),
]


def pick(found: list[Any], number: int) -> Any:
    return found[number % len(found)]


def spots(case: Json, kind: type | tuple[type, ...]) -> list[tuple[Any, Any]]:
    return [(box, key) for box, key in places(case) if isinstance(box[key], kind)]


def edit(case: Json, a: int, b: int) -> None:
    """A text by one character, or a value."""
    box, key = pick(spots(case, (str, int, float)), a)
    value = box[key]
    if isinstance(value, str):
        edits = [f"{value}x", value[1:], f"{value} ", f" {value}", value.swapcase(), value[:-1]]
        box[key] = pick(edits, b)
    else:
        box[key] = pick(SCALARS, b)


ALIKE = [[1, 1.0, True, "1"], [0, 0.0, False, None, "", "0"], ["true", True, 1], [[], {}, None, ""]]


def another_type(case: Json, a: int, b: int) -> None:
    """A value in a tool's input by one that looks like it."""
    found = [box for box, key in places(case["body"]) if key == "input"]
    values = [(box, key) for one in found for box, key in places({"input": one["input"]})]
    values = [(box, key) for box, key in values if key != "input"]
    for box, key in values[a % len(values) :]:
        alike = next((row for row in ALIKE if str(box[key]) in map(str, row)), None)
        if alike:
            box[key] = copied(pick(alike, b))
            return


def drop(case: Json, a: int, b: int) -> None:
    box, key = pick(places(case["body"]), a)
    del box[key]


def add(case: Json, a: int, b: int) -> None:
    """A key to a block or a message."""
    found = [box[key] for box, key in spots(case["body"], dict)]
    key, value = pick(ADDED, b)
    pick(found, a)[key] = copied(value)


def exchange(case: Json, a: int, b: int) -> None:
    """Two values, wherever they are."""
    (box, key), (other, name) = pick(places(case), a), pick(places(case), b)
    first, second = copied(box[key]), copied(other[name])
    box[key] = second
    with contextlib.suppress(KeyError, IndexError, TypeError):
        other[name] = first


def neighbours(case: Json, a: int, b: int) -> None:
    """The order of two."""
    found = [box[key] for box, key in spots(case["body"], list) if len(box[key]) > 1]
    if found:
        values = pick(found, a)
        at = b % (len(values) - 1)
        values[at], values[at + 1] = values[at + 1], values[at]


def twice(case: Json, a: int, b: int) -> None:
    found = [box[key] for box, key in spots(case["body"], list) if box[key]]
    values = pick(found, a)
    values.insert(b % len(values), copied(pick(values, b)))


def block_of(case: Json, a: int, b: int) -> tuple[Json, int]:
    message = pick(case["body"]["messages"], a)
    message["content"] = as_list(message["content"])
    return message, b % len(message["content"])


def move(case: Json, a: int, b: int) -> None:
    """A block to the next message."""
    message, at = block_of(case, a, b)
    other, _ = block_of(case, a + 1, 0)
    if other["role"] != "system":
        other["content"].insert(0, message["content"].pop(at))


def another_role(case: Json, a: int, b: int) -> None:
    message = pick(case["body"]["messages"], a)
    message["role"] = pick(["user", "assistant", "system"], b)


def setting(case: Json, a: int, b: int) -> None:
    name, value = pick(
        [
            ("model", "haiku"),
            ("model", f"claude-cli/{case['body']['model'].removeprefix('claude-cli/')}"),
            ("system", "b"),
            ("system", [text("a"), text("x-anthropic-billing-header: 1")]),
            ("system", [text("ab")]),
            ("tools", [TOOL]),
            ("tools", None),
            ("tools", [TOOLS[3]]),
            ("temperature", 0.5),
            ("cache_control", {"type": "ephemeral"}),
            ("metadata", {"user_id": "x"}),
        ],
        b,
    )
    case["body"][name] = copied(value)


def beta(case: Json, a: int, b: int) -> None:
    case["betas"] = pick(["x", "y,x", " x , y ", "x,x", "x,y,z", "xy", ""], b)


def texts_of(case: Json, name: str) -> list[tuple[list[Json], int]]:
    found = []
    for message in case["body"]["messages"]:
        content = listed(message["content"])
        for at, block in enumerate(content):
            if message["role"] == name and isinstance(block, dict) and block.get("type") == "text":
                found.append((content, at))
    return found


def split(case: Json, a: int, b: int) -> None:
    """A text into two blocks."""
    if found := texts_of(case, pick(["assistant", "assistant", "user"], b)):
        content, at = pick(found, a)
        value = content[at]["text"]
        cut = value.replace(" ", "")[:1]
        content[at : at + 1] = [{**content[at], "text": cut}, {**content[at], "text": value[1:]}]


def join(case: Json, a: int, b: int) -> None:
    """A text with the one after it."""
    found = texts_of(case, pick(["assistant", "user"], b))
    pairs = [(c, at) for c, at in found if (c, at + 1) in found]
    if pairs:
        content, at = pick(pairs, a)
        content[at]["text"] += content.pop(at + 1)["text"]


def trim(case: Json, a: int, b: int) -> None:
    """White space around a text of the assistant."""
    if found := texts_of(case, "assistant"):
        content, at = pick(found, a)
        content[at]["text"] = pick(["{}\n ", "\n{}", " {} "], b).format(content[at]["text"].strip())


def two_messages(case: Json, a: int, b: int) -> None:
    message, at = block_of(case, a, b)
    messages = case["body"]["messages"]
    number = messages.index(message)
    content = message["content"]
    if at:
        parts = [{**message, "content": content[:at]}, {**message, "content": content[at:]}]
        messages[number : number + 1] = parts


def one_message(case: Json, a: int, b: int) -> None:
    messages = case["body"]["messages"]
    at = a % (len(messages) - 1)
    if messages[at]["role"] == messages[at + 1]["role"]:
        messages[at]["content"] = as_list(messages[at]["content"]) + as_list(
            messages.pop(at + 1)["content"]
        )


def no_thinking(case: Json, a: int, b: int) -> None:
    """All of it, or one."""
    found = [
        (message["content"], block)
        for message in case["body"]["messages"]
        for block in listed(message["content"])
        if isinstance(block, dict) and block.get("type") in THINKING
    ]
    for content, block in found[: 1 if b % 3 == 0 else None]:
        content.remove(block)


def as_string(case: Json, a: int, b: int) -> None:
    """One text block as a string, or the other way round."""
    found = [(box, key) for box, key in places(case["body"]) if key == "content"]
    box, key = pick(found, a)
    if isinstance(box[key], str):
        box[key] = [text(box[key])]
    elif isinstance(box[key], list) and len(box[key]) == 1:
        box[key] = box[key][0].get("text", box[key])


def plain_numbers(case: Json, a: int, b: int) -> None:
    """As JavaScript writes them."""
    for box, key in spots(case["body"]["messages"], float):
        box[key] = int(box[key]) if box[key].is_integer() and box[key] < 1e15 else box[key]


def other_order(case: Json, a: int, b: int) -> None:
    box, key = pick(spots(case["body"], dict), a)
    box[key] = dict(reversed(box[key].items()))


def endings(case: Json, a: int, b: int) -> None:
    case["body"]["messages"].append(role("assistant", pick(["", []], b)))


def reminders(case: Json, a: int, b: int) -> None:
    for message in case["body"]["messages"]:
        if message["role"] == "system" and isinstance(message["content"], str):
            words = f"<system-reminder>\n{message['content']}\n</system-reminder>"
            message.update(role("user", words))


CHANGES = [
    *(edit, edit, edit, drop, drop, add, add, exchange, neighbours, neighbours, twice),
    *(move, another_role, setting, setting, beta, split, join, trim, two_messages, one_message),
    *(no_thinking, no_thinking, as_string, as_string, plain_numbers, other_order, endings),
    *(reminders, another_type, another_type),
]


def changed(case: Json, seed: int) -> tuple[Json, Request] | None:
    """The case with one change or two, and how it is read; none: it is no request any more."""
    case = copied(case)
    chance = random.Random(seed)
    try:
        for _ in range(chance.choice([1, 1, 2])):
            chance.choice(CHANGES)(case, chance.randrange(10**4), chance.randrange(10**4))
        request = read(case)
    except (ApiError, LookupError, TypeError, AttributeError, ValueError, ZeroDivisionError):
        return None
    return None if is_loose(case) else (case, request)


def is_loose(case: Json) -> bool:
    """Whether a 0 stands for false: test_a_zero_is_not_false."""
    found = [box[key] for box, key in places(case) if key in ("is_error", "enabled")]
    return any(value == 0 and value is not False for value in found)


# ---------------------------------------------------------------- the rule

SEEDS = st.integers(0, 10**6)


def test_a_session_holds_a_request_if_and_only_if_its_history_is_the_same() -> None:
    seen: Counter[bool] = Counter()

    @settings(max_examples=100, phases=PHASES, **QUICK)
    @given(cases(), SEEDS)
    def check(case: Json, seed: int) -> None:
        session = session_of(case)
        had = {thinking: history(as_had(case), thinking=thinking) for thinking in (False, True)}
        for other, request in filter(None, (changed(case, seed + n) for n in range(12))):
            if session:
                thinking = echoes_thinking(other)
                same = history(other, thinking=thinking) == had[thinking]
                assert session.matches(request) == same
                seen[same] += 1

    check()
    assert min(seen.values()) > 200


def test_the_session_of_a_changed_conversation_holds_the_unchanged_one_only_if_it_is_the_same() -> (
    None
):
    seen: Counter[bool] = Counter()

    @settings(max_examples=60, phases=PHASES, **QUICK)
    @given(cases(), SEEDS)
    def check(case: Json, seed: int) -> None:
        for other, _ in filter(None, (changed(case, seed + n) for n in range(8))):
            roles = [message["role"] for message in other["body"]["messages"][-3:]]
            session = session_of(other) if roles == ["user", "assistant", "user"] else None
            if session:
                same = is_same(as_had(other), case)
                assert session.matches(read(case)) == same
                seen[same] += 1

    check()
    assert min(seen.values()) > 60


@pytest.mark.parametrize("row", [*SAME.values(), THINKING_ROW], ids=[*SAME, "thinking"])
def test_the_readme_says_what_is_deliberately_the_same(row: Row) -> None:
    assert row.readme in readme.EVIDENCE.read_text()


# ---------------------------------------------------------------- faults that were found


def talk(*messages: Any, **fields: Any) -> Json:
    """A conversation of texts and contents in turn, with a question after it."""
    roles = [role(("user", "assistant")[n % 2], content) for n, content in enumerate(messages)]
    body = {"model": "sonnet", "max_tokens": 9, "messages": [*roles, *user(text("next"))]}
    return {"betas": "", "body": {**body, **fields}}


def holds(had: Json, asked: Json) -> bool:
    session = session_of(had)
    assert session
    return session.matches(read(asked))


@pytest.mark.parametrize("key", ["is_error", "citations"])
def test_a_zero_is_not_false(key: str) -> None:
    call = {"type": "tool_use", "id": "t1", "name": "weather", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "x"}
    had = talk([PAGE], [call], [result], "b")
    asked = copied(had)
    if key == "is_error":
        asked["body"]["messages"][2]["content"][0]["is_error"] = 0
    else:
        asked["body"]["messages"][0]["content"][0]["citations"] = {"enabled": 0}
    assert holds(had, had)
    assert not holds(had, asked)


@pytest.mark.parametrize("block", [text("x", citations=[CITED]), SEARCH[1]], ids=["cited", "found"])
def test_a_client_that_leaves_out_nulls_everywhere_finds_its_process(block: Json) -> None:
    """As `model_dump(exclude_none=True)` of the SDK's own models does."""

    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: bare(inner) for key, inner in value.items() if inner is not None}
        return [bare(inner) for inner in value] if isinstance(value, list) else value

    had = talk("a", [SEARCH[0], block, text("y")])
    assert holds(had, had)
    assert holds(had, bare(had))


# ---------------------------------------------------------------- processes


def ask(server: Server, case: Json) -> Answer:
    return server.call("POST", "/v1/messages", case["body"], {"anthropic-beta": case["betas"]})


def follow(case: Json, answer: Answer) -> Json:
    """The case with its answer and another question."""
    messages = [*case["body"]["messages"], role("assistant", answer.message["content"])]
    return {**case, "body": {**case["body"], "messages": [*messages, *user(text("go on"))]}}


def agent_serve(serve: Serve, tmp_path: Path) -> Server:
    return serve(tools="default", cwd=str(tmp_path))


@pytest.mark.parametrize("agent", [False, True], ids=["model", "agent"])
def test_of_two_conversations_that_differ_none_is_answered_by_the_others_process(
    serve: Serve, tmp_path: Path, agent: bool
) -> None:
    server = agent_serve(serve, tmp_path) if agent else serve()
    seen: Counter[str] = Counter()

    @settings(max_examples=25, phases=PHASES, **QUICK)
    @given(cases(agent=agent), SEEDS)
    def check(case: Json, seed: int) -> None:
        # No two examples begin alike.
        seen["number"] += 1
        case["body"]["messages"].insert(0, role("user", f"{seen['number']}"))
        others = filter(None, (changed(case, seed + n) for n in range(50)))
        other = next(other for other, request in others if is_asked(other, request))
        pair = [case, other]
        answers = [ask(server, one) for one in pair]
        assert [answer.status for answer in answers] == [200, 200]
        more = [follow(one, answer) for one, answer in zip(pair, answers, strict=True)]
        are_same = history(more[0]) == history(more[1])
        for mine, asked in enumerate(more):
            answer = ask(server, asked)
            assert answer.status == 200
            seen[answer.session] += 1
            is_theirs = is_same(more[1 - mine], asked)
            seen["theirs"] += is_theirs
            if not is_theirs:
                assert pid(answer) != pid(answers[1 - mine])
            if agent and are_same:
                assert answer.session != "hot"

    check()
    assert seen["hot"] >= 10
    assert seen["theirs"] >= 5


def is_asked(case: Json, request: Request) -> bool:
    """Whether it ends with a question, and the stand-in knows its model."""
    is_known = request.model in ("sonnet", "opus", "haiku")
    return is_known and case["body"]["messages"][-1]["role"] == "user"


@pytest.mark.parametrize(
    "tools", [[None, TOOLS[3]], [TOOLS[3], None]], ids=["to model", "to agent"]
)
def test_a_request_with_tools_is_not_answered_by_an_agent(
    serve: Serve, tmp_path: Path, tools: list[Any]
) -> None:
    """Nor one without by a process that has no tools of its own."""
    server = agent_serve(serve, tmp_path)
    first = server.post("a", tools=tools[0] and [tools[0]])
    answer = server.post(["a", first.text, "b"], tools=tools[1] and [tools[1]])
    assert answer.session != "hot"


def test_an_agents_client_that_leaves_out_thinking_does_not_get_another_agent(
    serve: Serve, tmp_path: Path
) -> None:
    server = agent_serve(serve, tmp_path)
    one, other = (talk("a", [thought, text("b")]) for thought in (THOUGHT, REDACTED))
    first, second = ask(server, one), ask(server, other)
    assert first.text == second.text
    more = follow(talk("a", "b"), first)
    assert ask(server, more).session != "hot"
