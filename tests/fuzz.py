"""Mutations of what the bridge is given: bodies, the CLI's lines, bytes on its socket.

`python tests/fuzz.py SECONDS [PART...]` runs each part, or those named, for that long with fresh
seeds; test_fuzz.py runs a short part of each.  A failure prints its smallest case, and the seed.
"""

import contextlib
import copy
import gc
import itertools
import json
import logging
import random
import re
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from client import IMAGE, Answer, request_body
from grammar import check_stream, loose_message
from host import STANDIN, isolate
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from messages import (
    CACHED,
    FIXTURES,
    FOUND,
    JUNK,
    PAGE,
    PDF,
    REDACTED,
    SERVED,
    THOUGHT,
    asks,
    places,
    role,
    text,
    user,
)
from servers import Server

import translate
from bridge import Config
from sessions import Cli, Kind, Turn
from translate import ApiError, Request, cli_error, frame, parse_request

Json = dict[str, Any]
TURN_ID = "00000000-0000-4000-8000-000000000000"
SMALL = st.integers(0, 10**6)

# ---------------------------------------------------------------- bodies

FIELDS: dict[str, list[Any]] = {
    "system": [
        "Be terse.",
        "",
        [text("a", **CACHED), text("x-anthropic-billing-header: cch=1;")],
        [],
    ],
    "stream": [True, False],
    "metadata": [{"user_id": "x"}],
    "temperature": [0, 0.5, 1],
    "top_p": [0.9],
    "top_k": [0, 40],
    "stop_sequences": [[], ["END", "\u2028"]],
    "service_tier": ["auto", "standard_only"],
    "thinking": [
        {"type": "enabled", "budget_tokens": 1024},
        {"type": "adaptive"},
        {"type": "disabled"},
    ],
    "output_config": [
        {"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
        {},
    ],
    "tool_choice": [
        {"type": "auto", "disable_parallel_tool_use": True},
        {"type": "tool", "name": "weather"},
    ],
    "cache_control": [{"type": "ephemeral"}],
    "new": [{"of": ["a", "beta"]}],
}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", None]}},
    "required": ["city"],
}
TOOLS: list[Json] = [
    {"name": "weather", "description": "The weather.", "input_schema": SCHEMA, **CACHED},
    {"type": "custom", "name": "time", "input_schema": {"type": "object"}, "defer_loading": True},
    {"type": "computer_toolset_20260101", "display_width_px": 800},
]
SOURCE: Json = {
    "type": "document",
    "source": {"type": "content", "content": [text("x", **CACHED), IMAGE]},
    "title": None,
}
ASKED: list[Json] = [
    text("look", **CACHED),
    text("é\u2028 😀", citations=None),
    IMAGE,
    {**IMAGE, "alt": "a heron"},
    PAGE,
    PDF,
    FOUND,
    SOURCE,
]
CITATION: Json = {"type": "char_location", "cited_text": "x", "document_index": 0}
SAID: list[Json] = [
    text("so"),
    text("\u2028 then\n"),
    text("cited", citations=[CITATION]),
    THOUGHT,
    REDACTED,
    {"type": "fallback"},
    {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {}},
]
# Messages of the role system.
SYSTEM: list[Json] = [
    role("system", "s"),
    role("system", [text("s", **CACHED)]),
    role("system", [{"type": "tool_addition", "name": "time"}, text("s")]),
    {**role("system", []), "output_config": {"effort": "low"}},
]
# Ends of a conversation that an answer continues.
CONTINUED: list[Any] = ["It is", [THOUGHT, text("It is", **CACHED)], [{"type": "new"}]]
RESULTS: list[Any] = [
    None,
    "sunny",
    "",
    [],
    [text("x", **CACHED), IMAGE, PAGE, FOUND],
    [{"type": "tool_reference", "tool_name": "time"}],
]
HUGE: list[Any] = [
    "x" * 100_000,
    2**63 - 1,
    2**64,
    10**40,
    -(2**70),
    1e308,
    [text("y")] * 500,
    [[]] * 2000,
    {f"k{number}": number for number in range(500)},
]
HUGE += [json.loads("[" * deep + "]" * deep) for deep in (190, 200, 246, 251, 300)]
BODY_CHANGES = (
    "delete",
    "retype",
    "retype",
    "borrow",
    "duplicate",
    "nest",
    "rename",
    "new",
    "huge",
)
BODY_STEPS = st.lists(st.tuples(st.sampled_from(BODY_CHANGES), SMALL, SMALL), max_size=4)


@st.composite
def valid_bodies(draw: Callable[..., Any]) -> Json:
    """A request that the API takes, with any of its parameters and blocks."""
    messages: list[Json] = []
    ids: list[str] = []
    for turn in range(draw(st.integers(0, 3)) * 2 + 1):
        if turn % 2:
            ids = [f"t{turn}_{number}" for number in range(draw(st.integers(0, 2)))]
            blocks = [*draw(st.lists(st.sampled_from(SAID), max_size=2)), text("well")]
            blocks += [
                {"type": "tool_use", "id": one, "name": "weather", "input": {"city": "Paris"}}
                for one in ids
            ]
            messages.append(role("assistant", blocks))
            continue
        blocks = [
            {
                "type": "tool_result",
                "tool_use_id": one,
                "content": draw(st.sampled_from(RESULTS)),
                "is_error": turn > 2,
            }
            for one in ids
        ]
        blocks += draw(st.lists(st.sampled_from(ASKED), min_size=not blocks, max_size=3))
        cut = draw(st.integers(1, len(blocks)))  # consecutive messages of one role are one turn
        messages += user(*blocks[:cut]) + (user(*blocks[cut:]) if blocks[cut:] else [])
        if draw(st.integers(0, 4)) == 0:
            messages.append(draw(st.sampled_from(SYSTEM)))
    if draw(st.integers(0, 4)) == 0:
        messages.append(role("assistant", draw(st.sampled_from(CONTINUED))))
    names = draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=5, unique=True))
    fields = {name: draw(st.sampled_from(FIELDS[name])) for name in names}
    tools = TOOLS[: draw(st.integers(0, 3))]
    return own(
        request_body(messages, max_tokens=4096, **fields, **({"tools": tools} if tools else {}))
    )


def own(value: Any) -> Any:
    """A copy that shares no part with itself, as deepcopy's may: what is put into one place is put
    there alone."""
    return json.loads(json.dumps(value))


def mutate_body(body: Json, steps: list[tuple[str, int, int]]) -> bytes:
    for what, number, other in steps:
        found = places(body)
        if not found:
            break
        container, key = found[number % len(found)]
        if what == "delete":
            del container[key]
        elif what == "retype":
            container[key] = own(JUNK[other % len(JUNK)])
        elif what == "borrow":  # a value of another place
            source, name = found[other % len(found)]
            container[key] = own(source[name])
        elif what == "duplicate" and isinstance(container, list):
            container.insert(other % (len(container) + 1), own(container[key]))
        elif what == "nest":
            container[key] = [container[key]] if other % 2 else {str(key): container[key]}
        elif isinstance(container, dict) and what in ("rename", "new"):
            names = [name for holder, name in found if isinstance(name, str)] + [
                "thread",
                "container",
                "mcp_servers",
            ]
            value = container.pop(key) if what == "rename" else JUNK[other // 7 % len(JUNK)]
            container[names[other % len(names)]] = own(value)
        elif what == "huge":
            container[key] = own(HUGE[other % len(HUGE)])
    # Cut or broken in one case of 30: nearly all of these are not JSON.
    data = json.dumps(body).encode()
    if steps and steps[0][1] % 30 == 0:
        at = steps[0][2] % len(data)
        data = data[:at] if at % 2 else data[:at] + b"\xff\x00" + data[at:]
    return data


bodies = st.builds(mutate_body, valid_bodies(), BODY_STEPS)
NOT_JSON = ("The request body is not valid JSON: ", "The request body is not a JSON object.")


def check_refusal(message: str, body: bytes) -> None:
    """A refusal says why, and names a place that is in the body, or that is missing there."""
    if message.startswith(NOT_JSON):
        return
    place, colon, why = message.partition(": ")
    assert colon, f"no place: {message}"
    assert why, f"no reason: {message}"
    more = re.search(r"\((messages\.\d+)\)$", why)  # what "messages: ..." is about
    for named in (place, *(more.groups() if more else ())):
        assert is_place(named, json.loads(body)), f"{named} is not in the body: {message}"


def is_place(place: str, body: Any) -> bool:
    """Whether the path leads to a value of the body, or to a key that an object of it lacks."""
    known = [body]
    keys = place.split(".")
    for number, key in enumerate(keys):
        below: list[Any] = []
        for value in known:
            if isinstance(value, dict) and key in value:
                below.append(value[key])
            elif isinstance(value, dict) and number == len(keys) - 1:
                below.append(None)  # it is missing
            elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
                below.append(value[int(key)])
            if isinstance(value, dict) and value.get("type") == key:
                below.append(value)  # the API names a union's member in the path
        known = below
    return bool(known)


def check_use(request: Request, body: Json) -> None:
    """A valid request survives everything that is done with it, and all of it is carried."""
    roles = [message["role"] for message in request.messages]
    assert request.continues == (roles[-1] == "assistant")
    assert all(one != next_one for one, next_one in itertools.pairwise(roles))
    check_transcript(request)
    for has_listed_tools in (True, False):
        check_settings(request, body, has_listed_tools=has_listed_tools)
    check_not_sent(request, body)
    check_lines_in(request)


def check_transcript(request: Request) -> None:
    """A fresh process gets the whole conversation; results of tools as the CLI writes them."""
    announced = [{"type": "date", "date": "2026-01-01"}]
    given = translate.transcript(request.messages, request.model, announced, TURN_ID)
    check_json_lines(given)
    rows = [json.loads(row) for row in given]
    parents = [None, *(row["uuid"] for row in rows)]
    assert [row["parentUuid"] for row in rows] == parents[:-1]
    assert {row["sessionId"] for row in rows} == {TURN_ID}
    first, attachment, *carried, last = rows
    assert (first["type"], attachment["attachment"]) == ("system", announced[0])
    assert (last["type"], last["isVirtual"]) == ("assistant", True)
    assert last["message"]["model"] == request.model
    ids = [row["message"]["id"] for row in rows if row["type"] == "assistant"]
    assert len(set(ids)) == len(ids)
    assert len(carried) == len(request.messages)
    for row, message in zip(carried, request.messages, strict=True):
        assert row["type"] == row["message"]["role"] == message["role"]
        content = row["message"]["content"]
        for written, block in zip(content, message["content"], strict=True):
            if block["type"] == "tool_result":
                assert meaning(written) == meaning(block)
            else:
                assert written == block


def meaning(block: Any) -> Json:
    """A block without what may be written in several ways."""
    return translate.canonical(block)


def check_settings(request: Request, body: Json, *, has_listed_tools: bool) -> None:
    """All fields but the bridge's own go to the API as sent, but for what is said not to."""
    settings = translate.turn_environment(request, has_listed_tools=has_listed_tools)
    assert all(isinstance(value, str) for value in settings.values())
    check_json_lines([translate.control_line("x", env=settings)])
    own_fields = translate.OWN_FIELDS - {"tools"}
    fields = {name: value for name, value in body.items() if name not in own_fields}
    wanted = json.loads(json.dumps(fields), parse_int=read_integer)
    for number, tool in enumerate(wanted.get("tools") or []):
        if f"tools.{number}.defer_loading" in request.not_sent:
            del tool["defer_loading"]
    if not wanted.get("tools"):  # null, or none
        wanted.pop("tools", None)
        wanted |= {"tools": []} if has_listed_tools else {}
    assert json.loads(settings["CLAUDE_CODE_EXTRA_BODY"]) == wanted


def read_integer(text: str) -> float:
    """An integer as orjson reads it: one of more than 64 bits is a float, as in the CLI."""
    value = int(text)
    return value if -(1 << 63) <= value < 1 << 64 else float(value)


def check_not_sent(request: Request, body: Json) -> None:
    """What cannot arrive as sent is named once, in what a header can hold, and is in the body."""
    assert len(set(request.not_sent)) == len(request.not_sent)
    for place in request.not_sent:
        assert not translate.NOT_IN_HEADER.search(place), place
        if place == "cache_control":  # wherever it is
            assert any(key == place for _, key in places(body))
        else:
            assert is_place(place, body), place


def check_lines_in(request: Request) -> None:
    """The lines that a process may be written for a request are lines of JSON."""
    listed = translate.tools_for_turn(request)
    lines = [
        translate.initialize_line(request.system, has_tools=bool(listed)),
        translate.initialize_line(request.system, has_tools=False, agent=True),
    ]
    for tools in (listed, translate.tools_for_count(request)):
        assert all(isinstance(tool["name"], str) for tool in tools)
        asked: Any = {"type": "", "request": {"message": {"method": "tools/list"}}}
        lines.append(translate.control_answer(asked, tools))
    for message in request.messages:
        blocks = message["content"]
        called: Any = {"type": "", "request": {"message": {}}}
        for result in (translate.tool_results(blocks) or {}).values():
            lines.append(translate.control_answer(called, [], result))
    check_json_lines(lines)


def check_json_lines(lines: list[bytes]) -> None:
    for line in lines:
        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        assert isinstance(json.loads(line), dict)


def check_body(body: bytes) -> None:
    """A body is a request that can be used, or is refused with 400 and a place."""
    refusal = None
    try:
        check_use(parse_request(body), json.loads(body))
    except ApiError as error:
        refusal = error
    if refusal:
        assert (refusal.status, refusal.error_type) == (400, "invalid_request_error")
        frame(refusal.body("r"))
        check_refusal(refusal.message, body)


def check_posted(server: Server, body: bytes) -> None:
    """Over a socket: 200 with a message or a stream of the grammar, of the conversation that was
    sent, or 400 in the API's error shape."""
    if has_strange_results(body):
        return
    answer = server.call("POST", "/v1/messages", body)
    if answer.status != 200:
        check_refused(answer, body)
        return
    if answer.headers["content-type"] == "text/event-stream":
        assert check_stream(answer.events)["message"]
    request = parse_request(body)
    # The stand-in is of a version that puts some of it elsewhere.
    lost = request.not_sent + request.misplaced
    assert answer.headers.get("x-bridge-not-sent", "") == ", ".join(lost)
    count = len(request.messages)
    assert re.search(rf"echo: .*; {count} messages", answer.text, re.DOTALL), answer.text[:200]


def has_strange_results(body: bytes) -> bool:
    """Whether a tool_result holds what only the API can judge: the stand-in, which answers with the
    texts of results, cannot read it."""
    with contextlib.suppress(ApiError):
        for message in parse_request(body).messages:
            for block in message["content"]:
                content = block.get("content")
                if block["type"] != "tool_result" or not content or isinstance(content, str):
                    continue
                if not isinstance(content, list) or not all(map(is_block, content)):
                    return True
    return False


def is_block(value: Any) -> bool:
    match value:
        case {"type": "text"}:
            return isinstance(value.get("text"), str)
        case {"type": str()}:
            return True
    return False


def check_counted(server: Server, body: bytes) -> None:
    """Tokens are counted of what is a request, max_tokens or not; what is none is refused."""
    answer = server.call("POST", "/v1/messages/count_tokens", body)
    if answer.status != 200:
        check_refused(answer, body)
        return
    parse_request(body, counting=True)
    assert type(answer.json["input_tokens"]) is int
    assert answer.json["input_tokens"] > 0


def check_refused(answer: Answer, body: bytes) -> None:
    assert answer.status == 400, answer.body[:500]
    error = answer.json
    assert (error["type"], error["error"]["type"]) == ("error", "invalid_request_error")
    assert error["request_id"] == answer.headers["request-id"]
    check_refusal(error["error"]["message"], body)


# ---------------------------------------------------------------- the CLI's lines


def recorded() -> list[tuple[list[bytes], str]]:
    """The lines of each recording as the CLI wrote them, without lists of commands and models, and
    the id of the last user line that asked for a turn; empty: it has none."""
    found = []
    for path in sorted(FIXTURES.glob("*/*.ndjson")):
        lines: list[bytes] = []
        turn_id = ""
        for row in map(json.loads, path.read_text().rstrip("\n").split("\n")):
            if row["dir"] == "in" and asks(row["line"]):
                turn_id = row["line"].get("uuid", "")
            if row["dir"] != "out":
                continue
            compact = {"ensure_ascii": False, "separators": (",", ":")}
            line = row["text"] if "text" in row else json.dumps(row["line"], **compact)
            if len(line) < 3000:
                lines.append(line.encode())
        found.append((lines, turn_id))
    return found


RECORDED = recorded()
DELTA = (
    translate.STREAM_EVENT
    + b'{"type":"content_block_delta","index":0,"delta":{"type":"text_delta",'
)
PIECES = [
    b"{",
    b"}",
    b'"',
    b"\\",
    b"\\u",
    b"\\ud83d",
    b"\n",
    b"\xff",
    b"\xe2\x80\xa8",
    b"null",
    b'"}},',
    b"\0",
    b",",
    DELTA,
]
LINE_STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "drop",
                "double",
                "move",
                "truncate",
                "retype",
                "retype",
                "flip",
                "insert",
                "borrow",
            ]
        ),
        SMALL,
        SMALL,
    ),
    max_size=6,
)


def mutate_lines(lines: list[bytes], steps: list[tuple[str, int, int]]) -> list[bytes]:
    lines = list(lines)
    for what, number, other in steps:
        if not lines:
            break
        at = number % len(lines)
        cut = other % (len(lines[at]) + 1)
        if what == "drop":
            del lines[at]
        elif what == "double":
            lines.insert(other % len(lines), lines[at])
        elif what == "move":
            lines.insert(other % len(lines), lines.pop(at))
        elif what == "truncate":
            lines[at] = lines[at][:cut]
        elif what == "insert":
            lines[at] = lines[at][:cut] + PIECES[number % len(PIECES)] + lines[at][cut:]
        elif what == "flip" and cut < len(lines[at]):
            lines[at] = (
                lines[at][:cut] + bytes([lines[at][cut] ^ (1 << number % 8)]) + lines[at][cut + 1 :]
            )
        elif what in ("retype", "borrow"):
            with contextlib.suppress(ValueError):
                event = json.loads(lines[at])
                found = places(event)
                if not found:
                    continue
                container, key = found[other % len(found)]
                source = JUNK if what == "retype" else [holder[name] for holder, name in found]
                container[key] = copy.deepcopy(source[other // 7 % len(source)])
                lines[at] = json.dumps(
                    event, ensure_ascii=number % 2 == 0, separators=(",", ":")
                ).encode("utf-8", "surrogatepass")
    return [line for whole in lines for line in whole.split(b"\n")]


class Reads:
    """A process whose output comes in these reads, as sessions.Process gives them to a turn."""

    def __init__(self, reads: list[list[bytes]]) -> None:
        self.reads = iter(reads)
        self.failure: ApiError | None = None
        self.working = False
        self.has_listed = True
        self.tools = [translate.listed_tool(name) for name in SERVED]
        self.cli = Cli()

    def write(self, *lines: bytes) -> None:
        pass

    def kill(self, number: int) -> None:
        pass

    def fail(self, error: ApiError) -> None:
        pass

    async def read(self) -> deque[Any]:
        if self.failure:
            raise self.failure
        events: deque[Any] = deque()
        try:
            for line in next(self.reads):
                events += translate.decode(line)
        except ApiError as error:
            self.failure = error
        except StopIteration:
            raise cli_error("the claude CLI closed its output") from None
        return events


REQUEST = parse_request(json.dumps(request_body(stream=True)).encode())


def relayed(
    reads: list[list[bytes]], *, turn_id: str = "", strict: bool = True
) -> tuple[list[Json], Json, str]:
    """What a client gets of the lines, through Turn.relay: the events, the message that is kept,
    the error.

    The order of the events is checked, and what is in them if `strict`; if it is right although it
    need not be, the client's message is the one that is kept.
    """
    sent: list[bytes] = []

    process: Any = Reads(reads)
    session: Any = SimpleNamespace(kind=Kind("sonnet"), process=process, turn_id=turn_id, model="")
    turn = Turn(REQUEST, session, "hot")

    async def relay() -> None:
        async for frames in turn.relay():
            sent.append(frames)

    failure = None
    try:
        relay().send(None)  # nothing in it waits
    except StopIteration:
        pass
    except ApiError as error:
        failure = error
    whole = b"".join(sent)
    assert not any(mark in whole for mark in (b"\xe2\x80\xa8", b"\xe2\x80\xa9", b"\xc2\x85"))
    blocks = whole.decode().split("\n\n")[:-1]
    events = [json.loads(block.split("\ndata: ")[1]) for block in blocks]
    ended = [*events, failure.body("r")] if failure else events
    if strict:
        assert check_stream(ended)["message"] == (None if failure else turn.translator.message)
    elif message := loose_message(ended):
        assert message == turn.translator.message
    return events, turn.translator.message, failure.message if failure else ""


def check_lines(lines: list[bytes], turn_id: str, size: int, *, strict: bool = False) -> None:
    """Nothing but ApiError comes of any lines, and events in the right order, the same however many
    lines come in a read."""
    outcomes = [
        relayed(
            [lines[at : at + step] for at in range(0, len(lines), step)],
            turn_id=turn_id,
            strict=strict,
        )
        for step in {size, 1}
    ]
    assert outcomes[0] == outcomes[-1]


@st.composite
def mutated_lines(draw: Callable[..., Any]) -> tuple[list[bytes], str, int]:
    """Lines of a recording, the id of the turn they are read for, and how many come in a read."""
    lines, turn_id = draw(st.sampled_from(RECORDED))
    changed = mutate_lines(lines, draw(LINE_STEPS))
    return changed, draw(st.sampled_from(["", turn_id])), draw(st.integers(1, 40))


# ---------------------------------------------------------------- bytes on the socket

HELLO = json.dumps(request_body("hello there", model="haiku")).encode()
STREAMED = json.dumps(request_body("hello there", model="haiku", stream=True)).encode()
CHUNKED = b"5;a=b\r\n%b\r\n%x\r\n%b\r\n0\r\nx-trailer: 1\r\n\r\n" % (
    HELLO[:5],
    len(HELLO) - 5,
    HELLO[5:],
)
HOST = b"Host: localhost\r\n"
GET = b"GET /healthz HTTP/1.1\r\n" + HOST
POST = b"POST /v1/messages HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
REQUESTS = [
    GET + b"\r\n",
    GET.replace(b"1.1", b"1.0") + b"\r\n",
    b"GET http://localhost/v1/models?limit=2 HTTP/1.1\r\n" + HOST + b"\r\n",
    b"HEAD / HTTP/1.1\r\n" + HOST + b"\r\n",
    b"OPTIONS /v1/messages HTTP/1.1\r\n" + HOST + b"Origin: http://localhost\r\n\r\n",
    b"DELETE /nowhere HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\n\r\nabc",
    POST + b"Content-Length: %d\r\n\r\n%b" % (len(HELLO), HELLO),
    POST + b"Content-Length: %d\r\n\r\n%b" % (len(STREAMED), STREAMED),
    POST + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKED,
    POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
    POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    POST + b"x-arch-claude-cli-session: fuzz\r\nContent-Length: 2\r\n\r\n[]",
]
TOKENS = [
    b"\r\n",
    b"\n",
    b"\r",
    b" ",
    b"\t",
    b":",
    b"\0",
    b"\xff",
    b"%",
    b"/",
    b"?",
    b"#",
    b"\r\n\r\n",
    b"\r\n ",
    b"-1",
]
TOKENS += [
    b"0\r\n\r\n",
    b"ffffffffffffffffff\r\n",
    b"-5\r\n",
    b"5_0",
    b"\xb2",
    b"9" * 25,
    b"9" * 5000,
    b"HTTP/1.1",
    b"HTTP/9.9",
]
TOKENS += [
    b"Content-Length: 5\r\n",
    b"Content-Length: +5\r\n",
    b"Transfer-Encoding: gzip, chunked\r\n",
    b"Host: [::1]:99999\r\n",
]
TOKENS += [
    b"Content-Encoding: gzip\r\n",
    b"Connection: close\r\n",
    b"Upgrade: h2c\r\nConnection: Upgrade\r\n",
]
TOKENS += [
    b"Expect: 100-continue\r\n",
    b"Expect: x\r\n",
    b"Origin: null\r\n",
    b"x-api-key: \xe9\r\n",
    b"Host: x\r\n",
]
TOKENS += [
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00",
    b"X: y\r\n" * 300,
    b"X-Long: " + b"y" * 70_000 + b"\r\n",
]
TOKENS += [
    b"x-arch-claude-cli-session: \x80\r\n",
    b"%ff%00",
    b"?limit=0&after_id=%00",
    b"?limit=\xb2",
    b"?limit=%C2%B2",
]
WIRE_STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["flip", "drop", "token", "token", "cut", "repeat", "header", "header", "swap"]
        ),
        SMALL,
        SMALL,
    ),
    max_size=5,
)
ENDS = ["end", "end", "close", "reset"]


def mutate_bytes(parts: list[bytes], steps: list[tuple[str, int, int]]) -> bytes:
    data = b"".join(parts)
    for what, number, other in steps:
        at = number % (len(data) + 1)
        to = at + 1 + other % 40
        if what == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ (1 << other % 8)]) + data[at + 1 :]
        elif what == "drop":
            data = data[:at] + data[to:]
        elif what == "token":
            data = data[:at] + TOKENS[other % len(TOKENS)] + data[at:]
        elif what == "header":  # at the end of a line of a head
            ends = [match.end() for match in re.finditer(b"\r\n", data)] or [0]
            at = ends[number % len(ends)]
            data = data[:at] + TOKENS[other % len(TOKENS)] + data[at:]
        elif what == "cut":
            data = data[:at]
        elif what == "repeat":
            data = data[:to] + data[at:]
        elif what == "swap":
            data = data[:at] + data[to : to + 20] + data[at:to] + data[to + 20 :]
    return data


wires = st.tuples(
    st.builds(
        mutate_bytes, st.lists(st.sampled_from(REQUESTS), min_size=1, max_size=3), WIRE_STEPS
    ),
    st.sampled_from(ENDS),
    st.integers(1, 5000) | st.just(1 << 20),
)


def check_wire(server: Server, data: bytes, end: str, size: int) -> None:
    """Whatever comes: answers of HTTP, none of them a failure of the bridge; the connection ends;
    others are served."""
    got = b""
    with (
        contextlib.closing(server.connect()) as client,
        contextlib.suppress(ConnectionError),
    ):  # TimeoutError: it hangs
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, min(len(data), 20 * size), size):
            client.sendall(data[at : at + size])
        client.sendall(data[20 * size :])
        if end == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif end == "end":
            with contextlib.suppress(OSError):  # the bridge has closed it already
                client.shutdown(socket.SHUT_WR)
            while part := client.recv(1 << 16):
                got += part
    assert not got or got.startswith(b"HTTP/1.1 "), got[:100]
    statuses = {int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", got)}
    assert statuses <= {100, 200, 204, *range(400, 500), 505}, (statuses, got[:1000])
    assert server.call("GET", "/healthz").body == b"ok"


# ---------------------------------------------------------------- running


class Bugs(logging.Handler):
    """What is logged as a bug, by the bridge or by asyncio (an exception that nobody took)."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(self.format(record))


@contextlib.contextmanager
def watched_bridge(config: Config) -> Iterator[Server]:
    """A bridge in this process; at the end nothing was logged as a bug, and it still answers."""
    bugs = Bugs()
    loggers = [logging.getLogger(name) for name in ("claude_cli_bridge", "asyncio")]
    for logger in loggers:
        logger.addHandler(bugs)
    try:
        with Server(config=config) as server:
            yield server
            assert server.post("still there").text == "echo: still there; 1 messages"
        gc.collect()  # a task's exception that nobody took is said when the task goes
        assert not bugs.found, "\n".join(bugs.found)
    finally:
        for logger in loggers:
            logger.removeHandler(bugs)


def bridge_config() -> Config:
    return Config(
        listen_addr="127.0.0.1:0",
        bin=str(STANDIN),
        spares=1,
        max_idle=1,
        max_sessions=8,
        watchdog_secs=20,
    )


def parts(server: Server) -> dict[str, tuple[Any, Callable[[Any], None]]]:
    """name -> (cases, check)."""
    return {
        "bodies": (bodies, check_body),
        "posted": (bodies, lambda body: check_posted(server, body)),
        "counted": (bodies, lambda body: check_counted(server, body)),
        "lines": (mutated_lines(), lambda case: check_lines(*case)),
        "wire": (wires, lambda case: check_wire(server, *case)),
    }


def run(cases: Any, check: Callable[[Any], None], examples: int, number: int | None = None) -> int:
    """Check so many cases, always the same ones unless a seed is given; how many there were."""
    count = 0

    def one(case: Any) -> None:
        nonlocal count
        count += 1
        check(case)

    usual = settings(
        **{
            "max_examples": examples,
            "deadline": None,
            "database": None,
            "derandomize": number is None,
        },
        **{"suppress_health_check": list(HealthCheck), "phases": [Phase.generate, Phase.shrink]},
        report_multiple_bugs=False,
    )
    test: Any = usual(given(cases)(one))
    (seed(number)(test) if number is not None else test)()
    return count


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60
    only = sys.argv[2:]
    print(isolate())
    logging.getLogger("claude_cli_bridge").propagate = False
    with watched_bridge(bridge_config()) as server:
        for name, (cases, check) in parts(server).items():
            if only and name not in only:
                continue
            end, count, number = time.monotonic() + seconds, 0, 0
            while time.monotonic() < end:
                number = random.SystemRandom().randrange(1 << 32)
                try:
                    count += run(cases, check, 50 if name in ("posted", "counted") else 500, number)
                except BaseException:
                    print(f"{name}: failed after {count} cases, in those of seed {number}")
                    raise
            print(f"{name}: {count} cases in {seconds:g} s", flush=True)


if __name__ == "__main__":
    main()
