"""Why a conversation is rebuilt, in words that its user can act on.  The stand-in is the CLI."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from client import Answer, request_body
from host import wait_until
from processes import alive, kill, pid, talk
from servers import Serve, Server

import sessions


def unknown(server: Server) -> Answer:
    return server.post(["hello", "yes", "and now"])


def expired(server: Server) -> Answer:
    conversation, answer = talk(server, "hello")
    wait_until(lambda: not alive(pid(answer)), "the end of the process")
    return server.post(conversation)


def evicted(server: Server) -> Answer:
    conversation, _ = talk(server, "hello")
    talk(server, "another")
    return server.post(conversation)


def died(server: Server) -> Answer:
    conversation, answer = talk(server, "hello")
    kill(pid(answer))
    return server.post(conversation)


def system_changed(server: Server) -> Answer:
    conversation, _ = talk(server, "hello")
    return server.post(conversation, system="be brief")


def model_changed(server: Server) -> Answer:
    conversation, _ = talk(server, "hello")
    return server.post(conversation, model="opus")


def pinned_system_changed(server: Server) -> Answer:
    conversation, _ = talk(server, "hello", session="s")
    return server.post(conversation, session="s", system="be brief")


def fault_in_a_turn(server: Server) -> Answer:
    conversation, _ = talk(server, "hello")
    assert server.post([*conversation[:2], "DIE 1"]).status == 502
    return server.post(conversation)


def client_left(server: Server) -> Answer:
    conversation, _ = talk(server, "hello")
    body = json.dumps(request_body([*conversation[:2], "PAUSE"], stream=True)).encode()
    with server.connect() as client:
        head = (
            f"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        client.sendall(head.encode() + body)
        assert client.recv(65536)
    wait_until(lambda: not server.processes(), "the end of the process")
    return server.post(conversation)


def continued(server: Server) -> Answer:
    conversation, _ = talk(server, "hello")
    assert server.post(conversation).session == "hot"
    return server.post(conversation)


def edited(server: Server) -> Answer:
    conversation, _ = talk(server, "hello")
    return server.post(["hallo", *conversation[1:]])


def edited_pinned(server: Server) -> Answer:
    conversation, _ = talk(server, "hello", session="s")
    return server.post(["hallo", *conversation[1:]], session="s")


def pinned(server: Server) -> Answer:
    conversation, _ = talk(server, "hello", session="s")
    return server.post(conversation)


def max_tokens(server: Server) -> Answer:
    conversation, _ = talk(server, "REPLAY 2.1.330/max_tokens")
    return server.post(conversation)


@pytest.mark.parametrize(
    ("reason", "lose", "settings"),
    [
        ("unknown-history", unknown, {}),
        ("unknown-history", edited, {}),
        ("unknown-history", edited_pinned, {}),
        ("expired", expired, {"session_ttl_secs": 0.1}),
        ("evicted", evicted, {"max_idle": 1}),
        ("evicted", evicted, {"max_sessions": 1}),
        ("died", died, {}),
        ("system-changed", system_changed, {}),
        ("system-changed", pinned_system_changed, {}),
        ("model-changed", model_changed, {}),
        ("died", fault_in_a_turn, {}),
        ("interrupted", client_left, {}),
        ("continued", continued, {}),
        ("pinned", pinned, {}),
        ("max_tokens", max_tokens, {}),
    ],
)
def test_a_lost_session_is_rebuilt_and_the_reason_is_said(
    serve: Serve,
    reason: str,
    lose: Callable[[Server], Answer],
    settings: dict[str, float],
    gate: Path,
) -> None:
    answer = lose(serve(**settings))
    assert answer.session == f"rebuilt; reason={reason}"
    assert answer.text == "echo: and now; 3 messages"


def test_of_many_past_conversations_the_newest_are_known(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "MAX_CACHED", 4)
    server = serve(max_idle=0)
    first, _ = talk(server, "first")
    wait_until(lambda: not server.processes(), "its end")
    for number in range(4):
        last, _ = talk(server, f"number {number}")
        wait_until(lambda: not server.processes(), "its end")
    assert server.post(last).session == "rebuilt; reason=evicted"
    assert server.post(first).session == "rebuilt; reason=unknown-history"
