"""What the tests of translate.py share: parts of requests, the CLI's events, recordings, junk."""

import base64
import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from client import request_body
from grammar import check_stream
from hypothesis import HealthCheck
from hypothesis import strategies as st

from translate import ApiError, Request, Translator, cli_error, decode, frame, parse_request

Json = dict[str, Any]

FIXTURES = Path(__file__).parent / "fixtures"
# Settings of hypothesis: the same cases in every run.
QUICK = {
    "derandomize": True,
    "report_multiple_bugs": False,
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}

# ---------------------------------------------------------------- requests


def text(value: str, **keys: Any) -> Json:
    return {"type": "text", "text": value, **keys}


def role(name: Any, content: Any = "x") -> Json:
    return {"role": name, "content": content}


def user(*blocks: Any) -> list[Any]:
    return [{"role": "user", "content": list(blocks)}]


PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
IMAGE: Json = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": PNG},
}
URL_IMAGE: Json = {"type": "image", "source": {"type": "url", "url": "http://x"}}
PDF: Json = {
    "type": "document",
    "source": {"type": "base64", "media_type": "application/pdf", "data": PNG},
}
PAGE: Json = {
    "type": "document",
    "source": {"type": "text", "media_type": "text/plain", "data": "x"},
    "title": "T",
}
FOUND: Json = {
    "type": "search_result",
    "source": "s",
    "title": "t",
    "content": [text("x")],
}
THOUGHT: Json = {"type": "thinking", "thinking": "", "signature": "c2ln"}
REDACTED: Json = {"type": "redacted_thinking", "data": "eHh4"}
USE: Json = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Paris"}}
RESULT: Json = {"type": "tool_result", "tool_use_id": "t1", "content": "sunny"}
USE_2, RESULT_2 = USE | {"id": "t2"}, RESULT | {"tool_use_id": "t2"}
SERVER_USE: Json = {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {}}
SERVER_RESULT: Json = {"type": "web_search_tool_result", "tool_use_id": "s1", "content": []}
CACHED: Json = {"cache_control": {"type": "ephemeral"}}
DOCUMENT: Json = {
    "type": "document",
    "source": {"type": "content", "content": [text("x", **CACHED)]},
}
TOOL: Json = {"name": "weather", "input_schema": {"type": "object"}}
BASH: Json = {"type": "bash_20250124", "name": "bash"}
DEFERRED = TOOL | {"defer_loading": True}
REFERENCE: Json = {"type": "tool_reference", "tool_name": "weather"}


def answered(use: Json, *blocks: Json) -> list[Any]:
    return ["x", role("assistant", [use]), *user(*blocks)]


def parsed(messages: Any = "hello", /, header: str = "", **fields: Any) -> Request:
    """A request with a header anthropic-beta; fields of `...` are left out."""
    body = {**request_body(messages), **fields}
    sent = {name: value for name, value in body.items() if value is not ...}
    return parse_request(json.dumps(sent).encode(), header)


def check_refused(words: str, messages: Any, /, **fields: Any) -> None:
    """That the bridge refuses a request as the API would, in words that begin like these."""
    with pytest.raises(ApiError) as caught:
        parsed(messages, **fields)
    error = caught.value
    assert (error.status, error.error_type, error.can_retry) == (
        400,
        "invalid_request_error",
        False,
    )
    assert error.message.startswith(words)


# ---------------------------------------------------------------- events of the CLI


def stream(*events: Json) -> list[Json]:
    return [
        {"type": "stream_event", "event": event, "parent_tool_use_id": None} for event in events
    ]


def start(**fields: Any) -> Json:
    message = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 10, "output_tokens": 1},
        **fields,
    }
    return {"type": "message_start", "message": message}


def opened(index: int = 0, /, type: str = "text", **keys: Any) -> Json:
    """The start of a block.  A text begins empty."""
    if type == "text":
        keys = {"text": "", **keys}
    block = {"type": type, **keys}
    return {"type": "content_block_start", "index": index, "content_block": block}


def piece(index: int = 0, /, type: str = "text_delta", **keys: Any) -> Json:
    """A delta.  That of a text says "Hi"."""
    if type == "text_delta":
        keys = {"text": "Hi", **keys}
    return {"type": "content_block_delta", "index": index, "delta": {"type": type, **keys}}


def closed(index: int = 0) -> Json:
    return {"type": "content_block_stop", "index": index}


def finish(reason: str | None = "end_turn", **keys: Any) -> Json:
    return {
        "type": "message_delta",
        "delta": {"stop_reason": reason, "stop_sequence": None, **keys},
        "usage": {"output_tokens": 17},
    }


STOP: Json = {"type": "message_stop"}
TEXT = (start(), opened(), piece(), closed(), finish(), STOP)
CALL: Json = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {}}
DONE: Json = {
    "type": "result",
    "subtype": "success",
    "is_error": False,
    "num_turns": 1,
    "result": "Hi",
}


def failed(**fields: Any) -> Any:
    """A `result` that is an error."""
    return {**DONE, "is_error": True, **fields}


def synthetic(**fields: Any) -> Any:
    """The `assistant` event before such a `result`."""
    return {"type": "assistant", "message": {"model": "<synthetic>"}, **fields}


USED = {
    "input_tokens": 10,
    "output_tokens": 17,
    "cache_creation_input_tokens": 3,
    "cache_read_input_tokens": 5,
}


def plain(*blocks: Json, **fields: Any) -> Json:
    """An `assistant` event: the same content once more."""
    message = {
        **start()["message"],
        "usage": {**USED, "service_tier": "standard"},
        "context_management": None,
        "content": list(blocks),
        **fields,
    }
    return {"type": "assistant", "message": message, "parent_tool_use_id": None}


# ---------------------------------------------------------------- playing them

SERVED = ("get_weather", "weather")  # the client's tools


@dataclass
class Played:
    """What became of some events."""

    translator: Translator
    emitted: list[Json]
    error: ApiError | None

    @property
    def message(self) -> Json:
        return self.translator.message

    @property
    def sent(self) -> list[Json]:
        """What a client gets, through the wire's bytes, which are made after the last event."""
        ends = [self.error.body("req_1")] if self.error else []
        lines = [frame(event).split(b"\n") for event in [*self.emitted, *ends]]
        return [json.loads(data.removeprefix(b"data: ")) for _, data, *_ in lines]


def play(events: list[Json], *, agent: bool = False, turn_id: str = "", model: str = "") -> Played:
    """What sessions.Turn makes of events that come in one read, so that some follow the end."""
    played = Played(Translator(SERVED, agent=agent, turn_id=turn_id, model=model), [], None)
    try:
        for event in events:
            given: Any = event
            emitted: list[Any] = played.translator.feed(given)
            played.emitted += emitted
        if not played.translator.done:
            raise cli_error("the claude CLI closed its output")
    except ApiError as error:
        played.error = error
    return played


def bare(value: Any) -> Any:
    """Without keys that hold null: the SDK's models have more of those."""
    if isinstance(value, dict):
        return {key: bare(inner) for key, inner in value.items() if inner is not None}
    return [bare(inner) for inner in value] if isinstance(value, list) else value


def checked(played: Played) -> Json:
    """The message that a client assembles, which is the one that the bridge keeps."""
    assert not played.error
    message: Json = check_stream(played.sent)["message"]
    assert message == played.message
    return message


def failure(events: list[Json]) -> ApiError:
    """The error in which events end."""
    error = play(events).error
    assert error
    return error


GOOD = play(stream(*TEXT)).emitted

# ---------------------------------------------------------------- recordings


@dataclass(frozen=True)
class Recorded:
    """A turn of a recording."""

    version: str
    scenario: str
    events: list[Json]
    turn_id: str  # the id of the user line that asked for it; empty: it has none

    def play(self) -> Played:
        agent = self.scenario in ("builtin_tool", "subagent")
        return play(self.events, agent=agent, turn_id=self.turn_id)


def asks(line: Json) -> bool:
    """Whether a line to the CLI starts a turn."""
    return bool(line["type"] == "user" and line.get("shouldQuery", True))


def recorded(path: Path) -> list[Recorded]:
    """The turns of a recording.

    A turn ends at its `result`, which a `result` of no turns is not: that of a line of history.
    """
    rows = [json.loads(row) for row in path.read_text().rstrip("\n").split("\n")]
    turns: list[list[Json]] = [[]]
    ids = []
    for row in rows:
        if row["dir"] == "out":
            line = row["text"] if "text" in row else json.dumps(row["line"])
            for event in decode(line.encode()):
                turn: list[Any] = turns[-1]
                turn.append(event)
                if event["type"] == "result" and event.get("num_turns"):
                    turns.append([])
        elif row["dir"] == "in" and asks(row["line"]):
            ids.append(row["line"].get("uuid", ""))
    complete = turns[:-1] or turns
    ids += [""] * (len(complete) - len(ids))
    version, scenario = path.parent.name, path.stem
    return [
        Recorded(version, scenario, events, turn_id)
        for events, turn_id in zip(complete, ids, strict=False)
    ]


# By version/scenario, and the turns by version/scenario/number.
RECORDINGS = {
    f"{path.parent.name}/{path.stem}": recorded(path)
    for path in sorted(FIXTURES.glob("*/*.ndjson"))
}
TURNS = {
    f"{name}/{number}": turn
    for name, turns in RECORDINGS.items()
    for number, turn in enumerate(turns)
}
VERSIONS = sorted({turn.version for turn in TURNS.values()})


def first_turns(scenario: str) -> dict[str, Recorded]:
    """The first turn of a scenario in each version that was recorded."""
    turns = [TURNS.get(f"{version}/{scenario}/0") for version in VERSIONS]
    return {turn.version: turn for turn in turns if turn}


# ---------------------------------------------------------------- any JSON, and junk

texts = st.text(st.characters(codec="utf-8") | st.sampled_from("\u2028\u2029\u0085\n\r\x00"))
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
)
JUNK: list[Any] = [
    None,
    0,
    -1,
    7,
    1.5,
    True,
    "",
    "x",
    "text_delta",
    [],
    {},
    [None],
    {"type": None},
    {"type": []},
    [{}],
    "tool_use",
    "end_turn",
    "stop_sequence",
    2**63,
    2**70,
    {"a": {"b": None}},
    "\u2028\x00\ud83d",
]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    found: list[tuple[Any, Any]] = []
    keys: Any = ()
    if isinstance(value, dict):
        keys = value.keys()
    elif isinstance(value, list):
        keys = range(len(value))
    for key in keys:
        found += [(value, key), *places(value[key])]
    return found


def put(value: Any, number: int, junk: Any, name: str = "") -> None:
    """Replace one of the values in `value`, the one that `number` stands for; with `name`, one
    under that key."""
    found = [(container, key) for container, key in places(value) if not name or key == name]
    if found:
        container, key = found[number % len(found)]
        container[key] = copy.deepcopy(junk)
