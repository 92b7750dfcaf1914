"""A conversation in a process: what is written turn by turn, its name, what is kept of it."""

import gc
import http.client
import json
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from client import IMAGE, Answer, Json, arrived, error_of, request_body, text
from host import wait_until
from processes import HEADER, PROBE, check_own, in_work, kill, pid, talk
from servers import Serve, Server, both
from stand_in import Log
from test_tools import CALL, TOOL, result, start, user
from test_tools import TOOL as WEATHER
from test_tools import result as tool_result

from sessions import NO_IMAGE, State
from translate import listed_tool

# ---------------------------------------------------------------- turn by turn


def test_a_hot_turn_writes_only_the_new_message_to_the_same_process(serve: Serve, log: Log) -> None:
    server = serve()
    conversation, first = talk(server, "hello", system="be brief")
    for number in range(2):
        before = len(log.lines(pid(first)))
        answer = server.post(conversation, system="be brief")
        assert (answer.session, pid(answer)) == ("hot", pid(first))
        assert answer.text == f"echo: and now; {3 + 2 * number} messages"
        [line] = log.lines(pid(first))[before:]
        assert line["message"]["content"] == [
            {"type": "text", "text": "and now"},
            {"type": "text", "text": "\n"},
        ]
        conversation += [answer.text, "and now"]


def test_settings_are_sent_again_only_when_they_change(serve: Serve, log: Log) -> None:
    server = serve()
    conversation, first = talk(server, "hello", temperature=0.5)
    answer = server.post(conversation, temperature=0.5)
    server.post([*conversation, answer.text, "more"], temperature=0.7)
    assert log.requests(pid(first)) == ["initialize", "apply_flag_settings", "apply_flag_settings"]


def test_thinking_that_is_echoed_is_compared_and_what_is_left_out_is_told(
    real: Server, since: Callable[[], list[Json]]
) -> None:
    thinking = {"thinking": {"type": "adaptive"}}
    content = real.post("THINK", **thinking).message["content"]
    history: list[Any] = ["THINK", {"role": "assistant", "content": content}, "SAY on"]
    answer = real.post(history, **thinking)
    assert (answer.session, answer.headers.get("x-bridge-not-sent")) == ("hot", None)
    other = [{**content[0], "thinking": "another thought"}, *content[1:]]
    history[1] = {"role": "assistant", "content": other}
    answer = real.post(history, **thinking)
    assert answer.session.startswith("rebuilt")
    assert arrived(since()[-1]["body"])[1]["content"] == other


def test_a_client_that_leaves_out_thinking_is_told_that_the_process_keeps_it(real: Server) -> None:
    said = real.post("THINK").text
    answer = real.post(["THINK", said, "SAY on"])
    assert (answer.session, answer.headers["x-bridge-not-sent"]) == ("hot", "thinking")


def holders(mark: str) -> list[str]:
    """What in this process holds a text with the mark, by type."""
    found = []
    for item in gc.get_objects():
        for value in gc.get_referents(item):
            is_text = isinstance(value, str) and value is not mark and mark in value
            is_data = isinstance(value, bytes | bytearray) and mark.encode() in value
            if is_text or is_data:
                found.append(type(item).__name__)
    return found


def tools_of_8_mb(mark: str) -> list[dict[str, Any]]:
    """A thousand tools, their names the only short thing about them."""
    schema = {"type": "object", "properties": {"x": {"description": f"{mark} {'y' * 4000}"}}}
    tool = {"description": f"{mark} {'x' * 4000}", "input_schema": schema}
    return [{"name": "probe", **tool}, *({"name": f"tool_{n}", **tool} for n in range(1, 1000))]


@both
@pytest.mark.parametrize("end", ["idle", "parked", "rebuilt"])
def test_nothing_of_a_requests_size_is_kept_beyond_its_turn(
    serve: Serve, end: str, stream: bool
) -> None:
    """A process may rest for ten minutes, and a connection for longer: each would hold a request of
    megabytes for nothing.  The client's connection is still open."""
    mark = f"heron-{end}-{stream}"
    server = serve()
    words = {"idle": "hello", "parked": "PROBE", "rebuilt": "hello"}[end]
    past: list[Any] = ["before", "yes"] if end == "rebuilt" else []
    asked = [*past, f"{mark} {'z' * 1_000_000} {words}"]
    body = json.dumps(request_body(asked, stream=stream, tools=tools_of_8_mb(mark))).encode()
    assert len(body) > 8_000_000
    head = "POST /v1/messages HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n"
    with server.connect() as client:
        client.sendall((head % len(body)).encode() + body)
        del asked, body
        response = http.client.HTTPResponse(client)
        response.begin()
        assert response.status == 200
        assert (b"tool_use" in response.read()) == (end == "parked")
        response.close()
        assert server.bridge
        (one,) = server.bridge.pool.room.sessions
        wait_until(lambda: one.state in (State.IDLE, State.PARKED), "the end of the turn")
        wait_until(lambda: not holders(mark), f"freedom from {holders(mark)}", 10)
        assert {str(tool) for tool in one.process.tools[1:2]} == {str(listed_tool("tool_1"))}


# ---------------------------------------------------------------- its name


@pytest.mark.parametrize(
    ("token", "name", "stream"),
    [
        ("0f6c1d4e-0000-4000-8000-123456789abc", "0f6c1d4e-0000-4000-8000-123456789abc", True),
        ("my chat", str(uuid.uuid5(uuid.NAMESPACE_OID, "my chat")), False),
    ],
    ids=["a UUID", "another token"],
)
def test_the_answer_carries_the_id_of_the_pinned_session(
    serve: Serve, token: str, name: str, stream: bool
) -> None:
    server = serve()
    conversation, answer = talk(server, "hello", session=token, stream=stream)
    assert answer.headers[HEADER] == name
    # The answer's id names the same session.
    again = server.post(conversation, session=name, stream=stream)
    assert (again.headers[HEADER], again.session) == (name, "hot")
    rebuilt = server.post(["other", "yes", "and now"], session=token, stream=stream)
    assert (rebuilt.headers[HEADER], rebuilt.session) == (name, "rebuilt; reason=unknown-history")


def test_sessions_without_a_header_have_ids_of_their_own_that_last(serve: Serve) -> None:
    server = serve()
    conversation, first = talk(server, "hello")
    _, second = talk(server, "hello")
    assert str(uuid.UUID(first.headers[HEADER])) == first.headers[HEADER] != second.headers[HEADER]
    assert server.post(conversation).headers[HEADER] in (
        first.headers[HEADER],
        second.headers[HEADER],
    )


def test_user_messages_alone_continue_a_live_pinned_session(serve: Serve) -> None:
    server = serve()
    system = {"system": "be brief"}
    _, first = talk(server, "hello", session="s", **system)
    for sent, expected, how in (
        (system, "echo: more; 3 messages", "hot"),
        ({}, "echo: more; 5 messages", "hot"),  # the system prompt was said already
        ({"system": "be verbose"}, "echo: more; 1 messages", "rebuilt; reason=system-changed"),
    ):
        answer = server.post("more", session="s", **sent)
        assert (answer.text, answer.session) == (expected, how)
        assert answer.headers[HEADER] == first.headers[HEADER]


def test_user_messages_alone_after_the_pinned_session_is_gone_are_refused(
    serve: Serve,
) -> None:
    server = serve()
    _, first = talk(server, "hello", session="s")
    kill(pid(first))
    answer = server.post("more", session="s")
    assert answer.status == 400
    assert "is gone; send the whole conversation" in answer.json["error"]["message"]


def test_an_image_after_a_pinned_conversation_needs_the_whole_conversation(serve: Serve) -> None:
    """Only a fresh process takes it, and that does not know what was said before.  The process that
    does know it stays."""
    server = serve()
    first = server.post("hello", session="s")
    image = user(IMAGE, text("what is it?"))
    refused = server.post([image], session="s")
    assert error_of(refused) == (400, "invalid_request_error")
    assert refused.json["error"]["message"] == NO_IMAGE
    second = server.post("more", session="s")
    assert (second.session, pid(second)) == ("hot", pid(first))
    whole = ["hello", first.text, "more", second.text, image]
    answer = server.post(whole, session="s")
    assert (answer.status, answer.session) == (200, "rebuilt; reason=images")
    assert answer.text == "echo: what is it?; 5 messages"


def test_text_beside_results_that_a_pinned_conversation_waits_for_does_not_end_it(
    serve: Serve,
) -> None:
    server = serve()
    asked = server.post("PROBE", session="s", tools=[PROBE])
    [call] = asked.message["content"]
    refused = server.post([user(result(call), text("and?"))], session="s", tools=[PROBE])
    assert error_of(refused) == (400, "invalid_request_error")
    # As the API words it: its call is not in the request.
    assert "unexpected `tool_use_id`" in refused.json["error"]["message"]
    whole = ["PROBE", {"role": "assistant", "content": [call]}, user(result(call))]
    answer = server.post(whole, session="s", tools=[PROBE])
    assert (answer.session, pid(answer)) == ("hot", pid(asked))


def test_requests_of_one_session_header_run_one_after_another(
    serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor
) -> None:
    server = serve()
    first = background.submit(server.post, "PAUSE", session="s")
    wait_until(lambda: log.got("PAUSE"), "the first turn")
    others = [background.submit(server.post, f"more {n}", session="s") for n in range(3)]
    in_work(server, 4)
    assert server.post("else", session="t").status == 200
    assert len(log.started()) == 2
    gate.touch()
    counts = sorted(turn.result().text.split("; ")[1] for turn in others)
    assert counts == ["3 messages", "5 messages", "7 messages"]
    assert {pid(turn.result()) for turn in others} == {pid(first.result())}


def test_a_name_whose_process_is_gone_wants_the_whole_conversation(serve: Serve) -> None:
    server = serve(max_idle=0)
    first = server.post("My name is Ada.", session="s")
    assert first.status == 200
    answer = server.post("What is my name?", session="s")
    assert (answer.status, answer.json["error"]["type"]) == (400, "invalid_request_error")
    assert "send the whole conversation" in answer.json["error"]["message"]
    whole = ["My name is Ada.", first.text, "What is my name?"]
    assert server.post(whole, session="s").text == "echo: What is my name?; 3 messages"


def test_a_named_conversation_that_waits_for_results_refuses_a_text_and_goes_on(
    real: Server,
) -> None:
    messages, (call,) = start(real, session="s")
    refused = real.post("never mind", session="s")
    assert refused.status == 400
    assert "`tool_use` ids were found without `tool_result`" in refused.json["error"]["message"]
    answer = real.post([*messages, user(result(call, "18C"))], session="s", tools=[TOOL])
    assert (answer.status, answer.session) == (200, "hot")


def keyed(server: Server, header: str, key: str, text: str, *, stream: bool) -> Answer:
    """A turn of the session `s` of a client with this key."""
    value = f"Bearer {key}" if header == "authorization" else key
    body = request_body(text, stream=stream)
    return server.call("POST", "/v1/messages", body, {HEADER: "s", header: value})


@both
@pytest.mark.parametrize("header", ["x-api-key", "authorization"])
def test_two_clients_with_keys_of_their_own_share_no_session_of_one_name(
    serve: Serve, log: Log, background: ThreadPoolExecutor, gate: Path, header: str, stream: bool
) -> None:
    """Names are easily equal (`main`, `1`): the other's past would be told, and charged.  Neither
    waits for the other."""
    server = serve()
    ours = keyed(server, header, "key-of-one", "ours", stream=stream)
    theirs = keyed(server, header, "key-of-two", "theirs", stream=stream)
    assert (ours.session, theirs.session) == ("new", "new")
    assert pid(ours) != pid(theirs)
    check_own(theirs, "echo: theirs; 1 messages", stream=stream)
    running = background.submit(keyed, server, header, "key-of-one", "PAUSE", stream=stream)
    wait_until(lambda: log.asked("PAUSE"), "the turn of the one")
    again = keyed(server, header, "key-of-two", "more", stream=stream)
    gate.touch()
    check_own(again, "echo: more; 3 messages", stream=stream)
    check_own(running.result(), "echo: PAUSE; 3 messages", stream=stream)
    assert (running.result().session, again.session) == ("hot", "hot")
    assert (pid(running.result()), pid(again)) == (pid(ours), pid(theirs))
    nobody = server.post("and I", session="s", stream=stream)
    check_own(nobody, "echo: and I; 1 messages", stream=stream)
    assert nobody.session == "new"


@both
@pytest.mark.parametrize("how", ["result", "text", "call"])
def test_a_pinned_conversation_that_leaves_out_its_tools_goes_on(
    real: Server, how: str, stream: bool
) -> None:
    """Where its process waits for a result the answer is the API's, and else an answer."""
    fields: dict[str, Any] = {"session": "s", "stream": stream}
    if how == "call":
        assert real.post("SAY one", tools=[WEATHER], **fields).text == "one"
        answer = real.post(CALL, **fields)
        assert answer.message["stop_reason"] == "tool_use"
    else:
        asked, (call,) = start(real, **fields)
        if how == "result":
            answer = real.post([*asked, user(tool_result(call))], **fields)
            assert answer.message["stop_reason"] == "end_turn"
            assert "18C" in answer.text
    last = real.post("SAY two", **fields)
    if how == "result":
        assert (last.status, last.text) == (200, "two")
    else:
        assert last.status == 400
        assert "`tool_use` ids were found" in last.json["error"]["message"]
