"""A process that speaks unasked: what it says is nobody's answer, and the process ends."""

import gc
import http.client
import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from client import Answer, request_body
from host import wait_until
from servers import Server
from stand_in import UNASKED, Log
from test_processes import HEADER, alive, pid
from test_spares import spare
from test_tools import CALL, start, user
from test_tools import TOOL as WEATHER
from test_tools import result as tool_result

import sessions
from sessions import Session, State
from translate import listed_tool

Serve = Callable[..., Server]
TOOL = {"name": "probe", "input_schema": {"type": "object"}}
both = pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
kinds = pytest.mark.parametrize("kind", UNASKED)


@pytest.fixture
def speaking(monkeypatch: pytest.MonkeyPatch, kind: str, log: Log) -> Callable[[int], None]:
    """Have a process say what nobody asked for."""
    monkeypatch.setenv("STANDIN_UNASKED", kind)
    monkeypatch.setattr(sessions, "ENDING", ((None, 0.1), *sessions.ENDING[1:]))

    def speak(number: int) -> None:
        os.kill(number, signal.SIGUSR1)
        # It may be ended for what it said before it leaves its mark.
        wait_until(
            lambda: number in log.reached("unasked") or not alive(number), "what nobody asked for"
        )

    return speak


def session(server: Server, number: int) -> Session:
    """The session of a process."""
    assert server.bridge
    return next(one for one in list(server.bridge.pool.sessions) if one.process.pid == number)


def settled(server: Server, number: int) -> None:
    """Wait for the end of a turn: until then a process may still say the rest of it."""
    process = session(server, number).process
    wait_until(lambda: process._ended_well.done(), "the result")


def check_own(answer: Answer, text: str, *, stream: bool) -> None:
    """The answer is the request's own, and whole."""
    assert (answer.status, answer.text) == (200, text)
    assert answer.message["stop_reason"] == "end_turn"
    assert "unasked" not in answer.body.decode()
    assert not stream or answer.events[-1] == {"type": "message_stop"}


@both
@kinds
def test_a_spare_that_speaks_is_given_to_nobody(
    serve: Serve, log: Log, speaking: Callable[[int], None], kind: str, stream: bool
) -> None:
    """It has no conversation yet, so all that it can say is wrong."""
    server = serve(spares=1)
    server.post("hello")  # so that the spare is for the model of the next request as well
    waiting = spare(server)
    wait_until(lambda: waiting in log.started(), "its start")
    speaking(waiting)
    wait_until(lambda: not alive(waiting), "its end")
    answer = server.post("next", stream=stream)
    check_own(answer, "echo: next; 1 messages", stream=stream)
    assert (answer.session, pid(answer) == waiting) == ("new", False)


@both
@kinds
def test_a_resting_process_that_speaks_ends_and_its_conversation_is_rebuilt(
    serve: Serve, speaking: Callable[[int], None], kind: str, stream: bool
) -> None:
    """Its next turn would begin with an answer to something else, and so would all that follow."""
    server = serve()
    first = server.post("hello", stream=stream)
    settled(server, pid(first))
    speaking(pid(first))
    wait_until(lambda: not alive(pid(first)), "its end")
    conversation = ["hello", first.text, "and now"]
    answer = server.post(conversation, stream=stream)
    check_own(answer, "echo: and now; 3 messages", stream=stream)
    assert answer.session == "rebuilt; reason=unasked"
    again = server.post([*conversation, answer.text, "more"], stream=stream)
    check_own(again, "echo: more; 5 messages", stream=stream)
    assert again.session == "hot"


@both
@kinds
def test_a_pinned_process_that_speaks_ends_as_well(
    serve: Serve, speaking: Callable[[int], None], kind: str, stream: bool
) -> None:
    """A client that sends only what is new is told that the past is lost, and nothing is asked."""
    server = serve()
    first = server.post("hello", session="s")
    settled(server, pid(first))
    speaking(pid(first))
    wait_until(lambda: not alive(pid(first)), "its end")
    answer = server.post("and now", session="s", stream=stream)
    assert answer.status == 400
    assert "send the whole conversation" in answer.json["error"]["message"]
    whole = server.post(["hello", first.text, "and now"], session="s", stream=stream)
    check_own(whole, "echo: and now; 3 messages", stream=stream)


@both
@kinds
def test_a_parked_process_that_speaks_ends_and_the_tools_result_is_not_lost(
    serve: Serve, speaking: Callable[[int], None], kind: str, stream: bool
) -> None:
    """It waits inside a tool call, where it has nothing to say but another call of this answer."""
    server = serve()
    asked = server.post("PROBE", tools=[TOOL], stream=stream)
    number = pid(asked)
    (call,) = asked.message["content"]
    assert session(server, number).state is State.PARKED
    speaking(number)
    wait_until(lambda: not alive(number), "its end")
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": "18C"}
    answer = server.post(
        [
            "PROBE",
            {"role": "assistant", "content": [call]},
            {"role": "user", "content": [result]},
        ],
        tools=[TOOL],
        stream=stream,
    )
    check_own(answer, "echo: 18C; 3 messages", stream=stream)
    assert answer.session == "rebuilt; reason=unasked"


@both
@kinds
def test_a_process_that_speaks_while_it_is_ended_disturbs_nobody(
    serve: Serve,
    speaking: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    stream: bool,
) -> None:
    """Its pipes are read until it is gone."""
    monkeypatch.setattr(sessions, "ENDING", ((None, 0.1), (None, 60.0)))
    server = serve(max_idle=0)
    first = server.post("hello", model="ignore-sigterm", stream=stream)
    ending = session(server, pid(first))
    wait_until(lambda: ending.state is State.RETIRED, "its retirement")
    speaking(pid(first))
    assert alive(pid(first))
    conversation: list[Any] = ["hello", first.text, "and now"]
    answer = server.post(conversation, model="ignore-sigterm", stream=stream)
    check_own(answer, "echo: and now; 3 messages", stream=stream)
    assert answer.session == "rebuilt; reason=evicted"
    assert pid(answer) != pid(first)
    for number in (pid(first), pid(answer)):
        os.kill(number, signal.SIGKILL)


@both
@pytest.mark.parametrize("kind", [kind for kind in UNASKED if kind != "result"])
def test_what_comes_with_the_end_of_an_answer_is_no_part_of_it_and_of_no_other(
    serve: Serve,
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    stream: bool,
) -> None:
    """In the same read, behind the result: the turn still listens, and must not hide it."""
    monkeypatch.setenv("STANDIN_UNASKED", kind)
    server = serve()
    first = server.post("BEHIND", stream=stream)
    check_own(first, "echo: BEHIND; 1 messages", stream=stream)
    wait_until(lambda: pid(first) in log.reached("unasked"), "what nobody asked for")
    answer = server.post(["BEHIND", first.text, "and now"], stream=stream)
    check_own(answer, "echo: and now; 3 messages", stream=stream)
    assert answer.session == "rebuilt; reason=unasked"
    assert pid(answer) != pid(first)


# what is another client's, or was another turn's


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
        (one,) = server.bridge.pool.sessions
        wait_until(lambda: one.state in (State.IDLE, State.PARKED), "the end of the turn")
        wait_until(lambda: not holders(mark), f"freedom from {holders(mark)}", 10)
        assert {str(tool) for tool in one.process.tools[1:2]} == {str(listed_tool("tool_1"))}
