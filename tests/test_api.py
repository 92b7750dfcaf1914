"""Counting, the model list, and parameters that never mix.  With the real CLI; what arrives at the
stub API counts."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from client import Answer, Client, Json, request_body
from servers import Server
from stubs import Stub

TOOL = {
    "name": "get_weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}


def count(server: Client, messages: Any = "hello", **fields: Any) -> Answer:
    body = request_body(messages, **{"max_tokens": ..., **fields})
    return server.call("POST", "/v1/messages/count_tokens?beta=true", body)


def test_counting_asks_the_api_once_and_no_model(
    real: Server, since: Callable[[], list[Json]]
) -> None:
    first = count(real, system="Be terse.")
    assert first.status == 200
    upstream = len(since())
    assert upstream
    assert {row["path"] for row in since()} == {"/v1/messages/count_tokens"}
    again = count(real, system="Be terse.")
    assert again.json == first.json
    assert len(since()) == upstream
    assert set(first.json) == {"input_tokens"}


def test_a_count_grows_with_all_that_is_counted(real: Server) -> None:
    history = ["hello", "world", "and on"]
    questions: list[dict[str, Any]] = [
        {},
        {"system": "Be terse. " * 50},
        {"tools": [TOOL]},
        {"messages": history},
    ]
    base, *larger = [count(real, **question).json["input_tokens"] for question in questions]
    assert all(0 < base < more for more in larger)


def test_a_tool_adds_to_a_count_what_it_adds_at_the_api(real: Server, stub: Stub) -> None:
    tool = {**TOOL, "description": "The weather. " * 30}
    asked = [
        {"messages": "foo", "model": "claude-opus-5-5", "tools": tools} for tools in ([], [tool])
    ]
    api = Client("127.0.0.1", stub.port)
    ours, theirs = (
        [count(server, **body).json["input_tokens"] for body in asked] for server in (real, api)
    )
    assert abs((ours[1] - ours[0]) - (theirs[1] - theirs[0])) < 50


def test_a_count_is_validated_as_a_message_is(serve: Callable[..., Server]) -> None:
    server = serve()
    for body, words in (
        (b"{", "not valid JSON"),
        (request_body(model=...), "model: Field required"),
        ({"model": "sonnet", "messages": []}, "messages: at least one message is required"),
    ):
        answer = server.call("POST", "/v1/messages/count_tokens", body)
        assert (answer.status, answer.json["error"]["type"]) == (400, "invalid_request_error")
        assert words in answer.json["error"]["message"]
    assert server.processes() == []


def test_counts_at_once_take_a_process_for_each_core_and_wait_for_no_turn(
    real: Server, stub: Stub
) -> None:
    assert real.bridge
    pool = real.bridge.pool
    with ThreadPoolExecutor() as threads:
        turn = threads.submit(real.post, "SLOW 170")
        counts = [threads.submit(count, real, f"question {number}") for number in range(4)]
        most = 0
        while not all(done.done() for done in counts):
            states = [session.state.value for session in list(pool.sessions)]
            most = max(most, sum(state != "retired" for state in states))
            time.sleep(0.005)  # leave the interpreter to the bridge's thread
        assert not turn.done()
        assert 1 < most <= 1 + (os.cpu_count() or 1)  # the turn's, and those that count
        assert [done.result().status for done in counts] == [200] * 4
        assert turn.result().status == 200


def test_the_model_list_is_the_clis_own(real: Server) -> None:
    page = real.call("GET", "/v1/models?limit=1000&beta=true").json
    ids = [model["id"] for model in page["data"]]
    assert "claude-cli/sonnet" in ids
    assert any(name.startswith("claude-sonnet-") for name in ids)
    assert len(set(ids)) == len(ids)
    assert (page["has_more"], page["first_id"], page["last_id"]) == (False, ids[0], ids[-1])
    for model in page["data"]:
        assert model["type"] == "model"
        assert model["lifecycle"] == "active"
        assert model["display_name"]
        assert model["created_at"]


def test_abilities_of_a_model_are_those_of_the_clis_list_in_its_own_words(
    real: Server, cli: Path
) -> None:
    """The SDK's own type wants ten `capabilities`, of which the CLI knows two."""
    models = real.call("GET", "/v1/models").json["data"]
    found = {model["id"]: model["claude_cli"] for model in models}
    sonnet = found["claude-cli/sonnet"]
    assert sonnet["supportsEffort"] is True
    assert "high" in sonnet["supportedEffortLevels"]
    assert not any("capabilities" in model for model in models)
    # The older CLI says nothing of its Haiku, which has no effort.
    assert (found["claude-cli/haiku"] == {}) == ("2.1.197" in str(cli))


def test_the_model_list_is_always_whole(real: Server) -> None:
    whole = real.call("GET", "/v1/models").json
    for query in ("limit=1", f"after_id={whole['last_id']}", "before_id=nope", "limit=x"):
        answer = real.call("GET", "/v1/models?" + query)
        assert (answer.status, answer.json) == (200, whole)


@pytest.mark.parametrize("name", ["sonnet", "claude-cli/sonnet", "claude-cli%2Fsonnet"])
def test_a_model_is_found_by_id_and_alias(real: Server, name: str) -> None:
    assert real.call("GET", "/v1/models/" + name).json["id"] == "claude-cli/sonnet"


def test_an_unknown_model_is_404(real: Server) -> None:
    answer = real.call("GET", "/v1/models/no-such%2Fmodel")
    assert (answer.status, answer.json["error"]["type"]) == (404, "not_found_error")
    assert real.call("DELETE", "/v1/models").status == 405


def test_parameters_of_parallel_conversations_never_mix(
    real: Server, since: Callable[[], list[Json]]
) -> None:
    def converse(number: int) -> None:
        history = [f"SAY conversation {number}"]
        for turn in range(25):
            fields: Json = {"temperature": number / 4} if turn % 2 else {"top_k": number + 1}
            answer = real.post(history, max_tokens=1000 + number, **fields)
            assert answer.session == ("hot" if turn else "new")
            history += [answer.text, f"SAY turn {turn} of {number}"]

    with ThreadPoolExecutor() as threads:
        list(threads.map(converse, (1, 2)))
    assert len(since()) == 50
    for row in since():
        body = row["body"]
        number = body["max_tokens"] - 1000
        turn = sum(message["role"] == "assistant" for message in body["messages"])
        assert f"conversation {number}" in str(body["messages"][0])
        assert body.get("temperature") == (number / 4 if turn % 2 else None)
        assert body.get("top_k") == (None if turn % 2 else number + 1)
