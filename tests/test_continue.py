"""Answers that go on from an assistant message.  With the real CLI."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from client import Json, request_body, text
from installed import ASKED_FOR, CLIS
from servers import Serve
from test_logins import LOGINS, log_in

from sessions import CONTINUES, Cli

BEGUN = {"role": "assistant", "content": [text("It is")]}


@pytest.fixture(params=ASKED_FOR or ["bundled"])
def going_on(request: pytest.FixtureRequest) -> Path:
    """A CLI whose conversations can end with an assistant message."""
    if not CLIS:
        pytest.skip("no CLI is installed")
    version = request.param if ASKED_FOR else next(iter(CLIS))
    if not Cli(version=version).is_at_least(CONTINUES):
        pytest.skip("this version refuses it")
    return CLIS[version]


@pytest.fixture
def floor() -> tuple[str, Path]:
    """The oldest CLI that the tests have, and its version."""
    version, cli = list(CLIS.items() or [("", Path())])[-1]
    if Cli(version=version).is_at_least(CONTINUES):
        pytest.skip("there is no older CLI")
    return version, cli


def without_marks(message: Json) -> Json:
    content = message["content"]
    blocks = [text(content)] if isinstance(content, str) else content
    plain = [{k: v for k, v in block.items() if k != "cache_control"} for block in blocks]
    return {**message, "content": plain}


@pytest.mark.parametrize("name", ["key", "subscription"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_goes_on_from_the_assistant_message_at_the_end_as_it_was_sent(
    serve: Serve,
    going_on: Path,
    environment: Path,
    since: Callable[[], list[Json]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    stream: bool,
) -> None:
    server = serve(bin=going_on, keep_env=log_in(LOGINS[name], environment, monkeypatch))
    history: list[Any] = ["SAY first", "first", "SAY so", BEGUN]
    begun = server.post(history, stream=stream)
    assert (begun.status, begun.session) == (200, "rebuilt; reason=prefill")
    assert begun.message["content"] == [text("so")]
    [row] = since()
    assert without_marks(row["body"]["messages"][-1]) == BEGUN
    roles = [one["role"] for one in row["body"]["messages"] if one["role"] != "system"]
    assert roles == ["user", "assistant", "user", "assistant"]
    # The client makes one message of both.
    history[-1:] = ["It is so", "SAY more"]
    more = server.post(history, stream=stream)
    assert (more.status, more.text) == (200, "more")
    assert more.session.startswith("rebuilt")
    assert without_marks(since()[-1]["body"]["messages"][-2])["content"] == [text("It is so")]


@pytest.mark.parametrize("name", ["key", "subscription"])
def test_an_answer_that_paused_goes_on_when_the_client_sends_it_back(
    serve: Serve,
    going_on: Path,
    environment: Path,
    since: Callable[[], list[Json]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    server = serve(bin=going_on, keep_env=log_in(LOGINS[name], environment, monkeypatch))
    tools = [{"type": "web_search_20250305", "name": "web_search"}]
    asked = {"role": "user", "content": "SEARCH PAUSED herons"}
    paused = server.post([asked], tools=tools)
    assert (paused.status, paused.json["stop_reason"]) == (200, "pause_turn")
    answered = {"role": "assistant", "content": paused.json["content"]}
    resumed = server.post([asked, answered], tools=tools)
    assert resumed.status == 200
    first, second = since()
    assert without_marks(second["body"]["messages"][-1]) == answered
    kept = len(first["body"]["messages"])
    assert list(map(without_marks, second["body"]["messages"][:kept])) == list(
        map(without_marks, first["body"]["messages"])
    )


def test_an_older_cli_refuses_an_assistant_message_at_the_end_in_words_and_asks_nothing(
    serve: Serve, floor: tuple[str, Path], since: Callable[[], list[Json]]
) -> None:
    version, cli = floor
    server = serve(bin=cli)
    asked = ["SAY so", BEGUN]
    counted = request_body(asked, max_tokens=...)
    refused = [
        server.post(asked),
        server.post(asked, stream=True),
        server.call("POST", "/v1/messages/count_tokens", counted),
    ]
    words = (
        "a conversation that ends with an assistant message needs Claude Code "
        f"{CONTINUES} or newer; this is {version}"
    )
    for answer in refused:
        assert answer.status == 400
        assert answer.json["error"]["type"] == "invalid_request_error"
        place, said = answer.json["error"]["message"].split(": ", 1)
        assert (place.partition(".")[0], said) == ("messages", words)
    assert since() == []
    assert server.processes() == []
