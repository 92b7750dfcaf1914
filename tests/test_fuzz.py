"""A short part of tests/fuzz.py, the same cases in every run, and what it found."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import fuzz
import pytest
from client import request_body
from messages import RESULT, TOOL, USE, role, text, user
from servers import Server
from test_translation import BEGIN, END, delta_line, event_line, text_line

import translate
from translate import ApiError, parse_request

Json = dict[str, Any]


@pytest.fixture
def server() -> Iterator[Server]:
    with fuzz.watched_bridge(fuzz.bridge_config()) as server:
        yield server


def used(body: Json) -> None:
    """Assert that a body is a request, and what must come of one."""
    data = json.dumps(body).encode()
    fuzz.check_use(parse_request(data), body)


def test_a_mutated_body_is_a_request_or_refused_with_its_place() -> None:
    assert fuzz.run(fuzz.bodies, fuzz.check_body, 250) >= 250


def test_a_mutated_body_that_is_posted_is_answered_with_200_or_400(server: Server) -> None:
    assert fuzz.run(fuzz.bodies, lambda body: fuzz.check_posted(server, body), 30) >= 30


def test_the_tokens_of_a_mutated_body_are_counted_or_it_is_refused(server: Server) -> None:
    assert fuzz.run(fuzz.bodies, lambda body: fuzz.check_counted(server, body), 30) >= 30


def test_mutated_lines_give_events_in_the_right_order_however_they_are_read() -> None:
    assert fuzz.run(fuzz.mutated_lines(), lambda case: fuzz.check_lines(*case), 300) >= 300


def test_mutated_bytes_are_answered_in_http_or_the_connection_ends(server: Server) -> None:
    assert fuzz.run(fuzz.wires, lambda case: fuzz.check_wire(server, *case), 120) >= 120


def test_the_bodies_and_lines_that_are_mutated_are_valid() -> None:
    fuzz.run(fuzz.valid_bodies(), used, 100)
    for lines, turn_id in fuzz.RECORDED:
        fuzz.check_lines(lines, turn_id, 7, strict=True)


@pytest.mark.parametrize(
    "message",
    [
        "messages.0.content.1.text: Field required",
        "nothing.here: x",
        "max_tokens.0: x",
        "no place",
        "messages.1: x",
        "messages: text content blocks must be non-empty (messages.1)",
    ],
)
def test_a_refusal_without_a_place_of_the_body_is_found(message: str) -> None:
    with pytest.raises(AssertionError):
        fuzz.check_refusal(message, json.dumps(request_body()).encode())


def test_a_bug_in_a_request_is_found() -> None:
    with (
        pytest.raises(AssertionError, match="bug in request"),
        fuzz.watched_bridge(fuzz.bridge_config()),
    ):
        logging.getLogger("claude_cli_bridge").error("bug in request %s", "req_1")


# ---------------------------------------------------------------- what it found


@pytest.mark.parametrize("name", [5, None, []])
@pytest.mark.parametrize("kind", ["auto", "any", "none"])
def test_a_name_in_a_tool_choice_that_has_none_is_no_bug(kind: str, name: object) -> None:
    """The API is the judge of it."""
    used(request_body(tools=[TOOL], tool_choice={"type": kind, "name": name}))


@pytest.mark.parametrize("more", [0, 1])
def test_a_schema_that_can_be_read_can_be_listed(more: int) -> None:
    """Process._read answers tools/list inside asyncio's callback, where an error ends the pipe."""
    levels = translate.MAX_DEPTH - 4 + more  # four are around it
    schema = {"type": "object", "x": json.loads("[" * levels + "0" + "]" * levels)}
    body = request_body(tools=[{**TOOL, "input_schema": schema}])
    data = json.dumps(body).encode()
    if more:
        with pytest.raises(ApiError, match="JSON of more than"):
            parse_request(data)
    else:
        fuzz.check_use(parse_request(data), body)


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ([*user(text("a")), *user(RESULT)], "messages.1.content.0"),
        (
            [
                role("user", "a"),
                role("assistant", [USE]),
                *user(RESULT),
                *user(text("b"), {**RESULT, "tool_use_id": "t2"}),
            ],
            "messages.3.content.1",
        ),
    ],
)
def test_an_orphan_is_found_where_the_client_put_it(messages: list[Json], place: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_request(json.dumps(request_body(messages)).encode())
    assert caught.value.message.startswith(f"{place}: unexpected `tool_use_id`")


FAULT = event_line(type="content_block_start", index=7, content_block={"type": "text", "text": ""})
BAD_DELTA = delta_line(0, "text_delta", "text", b"").replace(b'"text":""', b'"text":5')


@pytest.mark.parametrize("fault", [BAD_DELTA, FAULT], ids=["a delta", "another event"])
def test_what_came_before_a_fault_in_one_read_is_sent(fault: bytes) -> None:
    reads = [[*BEGIN, text_line(b"Hi"), text_line(b" there"), fault]]
    events, _, error = fuzz.relayed(reads, strict=False)
    assert error
    assert [event["delta"]["text"] for event in events[2:4]] == ["Hi", " there"]


@pytest.mark.parametrize("name", [{}, [], 5, None])
def test_a_tool_call_without_a_name_is_none_of_the_clients(name: object) -> None:
    call = event_line(
        type="content_block_start",
        index=0,
        content_block={"type": "tool_use", "id": "t", "name": name},
    )
    events, _, error = fuzz.relayed([[BEGIN[0], call, *END]], strict=False)
    assert error or events[-1] == {"type": "message_stop"}
