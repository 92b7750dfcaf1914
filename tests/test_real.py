"""Conversations through the real CLI, both versions where both are installed: what arrives at the
stub API counts."""

import copy
import http.client
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import psutil
import pytest
from client import IMAGE, Answer, Client, Json, arrived, request_body, sent, text
from host import TESTS, wait_until
from processes import alive
from servers import KEEP, Launch, Program, Serve, Server, linux
from stubs import Stub

import sessions


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


DOCUMENT = {
    "type": "document",
    "source": {"type": "text", "media_type": "text/plain", "data": "an apple"},
    "title": "t",
}


def last_arrived(stub: Stub) -> list[Json]:
    return arrived(stub.log()[-1]["body"])


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("stream", [False, True])
def test_text_answer_has_the_apis_ids_usage_and_stop_reason(real: Server, stream: bool) -> None:
    answers = [real.post("SAY it is so", stream=stream) for _ in range(2)]
    for answer in answers:
        message = answer.message
        assert answer.status == 200
        assert answer.headers["request-id"].startswith("req_")
        assert message["content"] == [text("it is so")]
        assert message["stop_reason"] == "end_turn"
        assert message["stop_sequence"] is None
        assert message["model"].startswith("claude-sonnet")
        # message_start says 1, message_delta 17, `result` the sum of the turn: the middle one is
        # the message's
        assert message["usage"]["output_tokens"] == 17
        assert message["usage"]["input_tokens"] == 10
        assert message["usage"]["cache_read_input_tokens"] == 5
    assert answers[0].message["id"] != answers[1].message["id"]


def test_streamed_and_not_are_the_same_message(real: Server) -> None:
    plain, streamed = (real.post("THINK", stream=stream).message for stream in (False, True))
    for message in (plain, streamed):
        del message["id"]
    assert plain == streamed
    assert [block["type"] for block in plain["content"]] == [
        "thinking",
        "redacted_thinking",
        "text",
    ]
    assert plain["content"][0] == {"type": "thinking", "thinking": "hmm...", "signature": "c2ln"}


def test_sdk_with_both_key_styles(real: Server) -> None:
    for key in ({"api_key": "k"}, {"auth_token": "k"}):
        with anthropic.Anthropic(base_url=real.url, max_retries=0, **key) as client:
            asked = {
                "model": "sonnet",
                "max_tokens": 99,
                "messages": [{"role": "user", "content": "SAY hi"}],
            }
            assert client.messages.create(**asked).content[0].text == "hi"
            with client.messages.stream(**asked) as stream:
                assert "".join(stream.text_stream) == "hi"
                assert stream.get_final_message().stop_reason == "end_turn"


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("MAXTOK", "max_tokens"),
        ("REFUSE", "refusal"),
        ("EMPTY", "end_turn"),
        ("ONLYBLANKS", "end_turn"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_answer_ends_with_the_first_stop_reason_whatever_the_cli_does_next(
    real: Server, word: str, reason: str, stream: bool
) -> None:
    answer = real.post(word, stream=stream)
    assert answer.message["stop_reason"] == reason
    assert answer.text == {"MAXTOK": "cut sho", "ONLYBLANKS": " \n"}.get(word, "")
    wait_until(lambda: not real.processes(), "the end of a process that would go on by itself")


def test_an_api_that_refuses_to_stream_is_a_clear_error(real: Server) -> None:
    """The CLI asks again without streaming, which nobody asked for and somebody may pay for."""
    for stream in (False, True):
        answer = real.post("NOSTREAM", stream=stream)
        assert (answer.status, answer.json["error"]["type"]) == (404, "not_found_error")
        assert "sent it again with changes" in answer.json["error"]["message"]


@pytest.mark.parametrize(
    "value",
    ["\u00e9\u4e2d\U0001f600\u2028\u0085\u202e end", 'a\x00b\x1b[31m -- --help $(x) `y` "q"'],
)
def test_any_text_survives_both_ways(real: Server, stub: Stub, value: str) -> None:
    answer = real.post("SAY " + value, stream=True)
    assert answer.text == value
    assert last_arrived(stub) == sent(["SAY " + value])


# ---------------------------------------------------------------- conversations


def converse(
    client: Client, turns: int, first: str = "SAY one", **fields: Any
) -> tuple[list[str], list[Answer]]:
    """A conversation of some turns; its history and the answers."""
    history, answers = [first], []
    for number in range(turns):
        answers.append(client.post(history, **fields))
        history.append(answers[-1].text)
        if number < turns - 1:
            history.append(f"SAY answer {number}")
    return history, answers


def test_later_turns_stay_in_one_process_and_the_api_sees_the_whole_history(
    real: Server, since: Callable[[], list[Json]]
) -> None:
    history, answers = converse(real, 4, system="Be terse.")
    assert [answer.session for answer in answers] == ["new", "hot", "hot", "hot"]
    assert len(real.processes()) == 1
    assert [arrived(row["body"]) for row in since()] == [
        sent(history[: 2 * n + 1]) for n in range(4)
    ]


def test_a_hot_turn_writes_only_the_new_message(serve: Serve, cli: Path, tmp_path: Path) -> None:
    log, wrapper = tmp_path / "stdin", tmp_path / "claude"
    wrapper.write_text(f'#!/bin/sh\ntee -a {log} | {cli} "$@"\n')
    wrapper.chmod(0o755)
    server = serve(bin=wrapper)
    first = server.post("SAY first words")
    # `tee` writes to the file last.
    wait_until(lambda: b'"type":"user"' in log.read_bytes().splitlines()[-1], "the first turn")
    before = log.read_bytes()
    assert server.post(["SAY first words", first.text, "SAY second"]).session == "hot"
    wait_until(lambda: len(log.read_bytes()) > len(before), "the second turn")
    new = [json.loads(line) for line in log.read_bytes()[len(before) :].splitlines()]
    assert [line["message"]["content"] for line in new if line["type"] == "user"] == [
        [text("SAY second"), text("\n")]
    ]
    assert len(new) == 1


HISTORY: list[Any] = [
    {"role": "user", "content": [text("look"), IMAGE, DOCUMENT, text("well?")]},
    {
        "role": "assistant",
        "content": [
            text("I see. "),
            {"type": "tool_use", "id": "toolu_1", "name": "w", "input": {"a": [1]}},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": [text("18C"), IMAGE]},
            text("and so?"),
        ],
    },
    "It is mild.",
    "SAY good",
]


def test_history_that_no_process_holds_arrives_as_it_was_sent(real: Server, stub: Stub) -> None:
    answer = real.post(HISTORY)
    assert answer.session == "rebuilt; reason=unknown-history"
    wanted = copy.deepcopy(sent(HISTORY))
    assert last_arrived(stub) == wanted
    again = real.post([*HISTORY, answer.text, "SAY more"])
    assert again.session == "hot"
    assert last_arrived(stub)[:5] == wanted


def test_tool_results_of_a_history_keep_is_error_and_emptiness(real: Server, stub: Stub) -> None:
    calls = [{"type": "tool_use", "id": f"toolu_{n}", "name": "w", "input": {}} for n in range(3)]
    results = [
        {"type": "tool_result", "tool_use_id": "toolu_2", "content": "boom", "is_error": True},
        {"type": "tool_result", "tool_use_id": "toolu_0", "content": "fine"},
        {"type": "tool_result", "tool_use_id": "toolu_1"},
    ]
    messages = ["go", {"role": "assistant", "content": calls}, {"role": "user", "content": results}]
    assert real.post(messages).status == 200
    blocks = last_arrived(stub)[-1]["content"]
    assert [(b["tool_use_id"], b.get("content"), b.get("is_error", False)) for b in blocks] == [
        ("toolu_2", "boom", True),
        ("toolu_0", [text("fine")], False),  # as the CLI writes one that it gets in place
        ("toolu_1", None, False),
    ]


THOUGHT = {"type": "thinking", "thinking": "hm", "signature": "c2ln"}


@pytest.mark.parametrize("first", [["hi"], []])
def test_thinking_of_a_history_arrives_as_it_was_sent(
    real: Server, stub: Stub, first: list[str]
) -> None:
    thought = {
        "role": "assistant",
        "content": [THOUGHT, {"type": "redacted_thinking", "data": "eHh4"}, text("a")],
    }
    asked = [*first, thought, {"role": "user", "content": "SAY x"}]
    assert real.post(asked, thinking={"type": "adaptive"}).text == "x"
    assert last_arrived(stub) == sent(asked)


@pytest.mark.parametrize("model", ["claude-opus-4-1", "claude-cli/claude-sonnet-4-5", "haiku"])
def test_the_model_asked_for_is_the_model_that_answers(
    real: Server, since: Callable[[], list[Json]], model: str
) -> None:
    answer = real.post("SAY x", model=model)
    assert answer.message["model"] == since()[0]["body"]["model"]
    assert model.removeprefix("claude-cli/") in answer.message["model"]


def test_an_answer_cut_by_max_tokens_is_billed_once_as_a_rule(
    real: Server, since: Callable[[], list[Json]]
) -> None:
    # The CLI calls the API again within 4 ms of the end: against a stub as fast as this one the
    # interrupt may lose.
    for number in range(3):
        assert real.post(f"MAXTOK {number}").message["stop_reason"] == "max_tokens"
    wait_until(lambda: not real.processes(), "the end of the processes")
    wait_until(lambda: all(row["end"] for row in since()), "the ends of the API calls")
    assert len(since()) <= 6


def test_a_refusal_is_billed_once(real: Server, since: Callable[[], list[Json]]) -> None:
    assert real.post("REFUSE").message["stop_reason"] == "refusal"
    wait_until(lambda: not real.processes(), "the end of the process")
    assert len(since()) == 1


def test_long_history_arrives_in_order(real: Server, stub: Stub) -> None:
    history = [f"message {number}" for number in range(101)]
    assert real.post(history).status == 200
    assert last_arrived(stub) == sent(history)


def test_history_may_begin_with_the_assistant_and_repeat_a_role(real: Server, stub: Stub) -> None:
    roles = [
        ("assistant", "I begin"),
        ("user", "one"),
        ("user", "two"),
        ("assistant", "three"),
        ("user", "SAY x"),
    ]
    assert real.post([{"role": role, "content": value} for role, value in roles]).status == 200
    assert last_arrived(stub) == [
        {"role": "assistant", "content": [text("I begin")]},
        {"role": "user", "content": [text("one"), text("two")]},
        {"role": "assistant", "content": [text("three")]},
        {"role": "user", "content": [text("SAY x")]},
    ]


def test_system_message_inside_the_conversation_reaches_the_model(real: Server, stub: Stub) -> None:
    assert (
        real.post(
            [{"role": "user", "content": "hi"}, {"role": "system", "content": "Be terse."}]
        ).status
        == 200
    )
    reminder = text("<system-reminder>\nBe terse.\n</system-reminder>")
    assert last_arrived(stub) == [{"role": "user", "content": [text("hi"), reminder]}]


def rewritten(history: list[str]) -> dict[str, list[Any]]:
    """What clients do to a conversation of two answered turns, and what they then ask."""
    return {
        "goes on": [*history, "SAY next"],
        "edits the first message": ["SAY edited", *history[1:], "SAY next"],
        "edits the last message": [*history[:2], "SAY edited"],
        "undoes a turn": [*history[:2], "SAY other"],
        "retries": history[:3],
        "retries the first": history[:1],
        "edits an answer": [history[0], "something else", *history[2:], "SAY next"],
        "compacts": ["Summary: we said one.", "Understood.", "SAY next"],
    }


def test_the_api_sees_the_clients_conversation_whatever_the_client_rewrote(
    real: Server, stub: Stub
) -> None:
    history, _ = converse(real, 2)
    for change, asked in rewritten(history).items():
        answer = real.post(asked)
        assert last_arrived(stub) == sent(asked)
        assert (answer.session == "hot") == (change == "goes on"), change


def test_equal_first_messages_are_two_conversations(real: Server, stub: Stub) -> None:
    a, b = ([text.text for text in [real.post("SAY hello")]] for _ in range(2))
    for mine, other in ((a, "apples"), (b, "pears")):
        asked = ["SAY hello", mine[0], "SAY " + other]
        asked += [real.post(asked).text, "SAY again"]
        assert real.post(asked).session == "hot"
        assert last_arrived(stub) == sent(asked)


@pytest.mark.parametrize(
    "echo",
    [
        lambda answer: answer,
        lambda answer: [text(answer)],
        lambda answer: [
            {
                "text": answer + "\n",
                "type": "text",
                "citations": None,
                "cache_control": {"type": "ephemeral"},
            }
        ],
        lambda answer: [{"type": "text", "text": answer, "parsed_output": {"x": 1}}],
    ],
)
def test_an_answer_that_the_client_rewrote_without_meaning_it_is_still_hot(
    real: Server, echo: Callable[[str], Any]
) -> None:
    answer = real.post(
        [
            {
                "role": "user",
                "content": [{**text("SAY well"), "cache_control": {"type": "ephemeral"}}],
            }
        ]
    )
    messages = ["SAY well", {"role": "assistant", "content": echo(answer.text)}, "SAY next"]
    assert real.post(messages).session == "hot"


def test_thinking_that_the_client_drops_or_keeps_is_still_hot(real: Server) -> None:
    for keep in (True, False):
        content = real.post(f"THINK {keep}").message["content"]
        kept = content if keep else content[2:]
        assert (
            real.post([f"THINK {keep}", {"role": "assistant", "content": kept}, "SAY next"]).session
            == "hot"
        )


def test_conversation_survives_the_death_of_its_process(real: Server, stub: Stub) -> None:
    history, _ = converse(real, 2)
    killed = [process.pid for process in real.processes()]
    for number in killed:
        psutil.Process(number).kill()
    wait_until(lambda: not any(map(psutil.pid_exists, killed)), "the death")
    answer = real.post([*history, "SAY on"])
    assert answer.session == "rebuilt; reason=died"
    assert last_arrived(stub) == sent([*history, "SAY on"])


def test_pinned_session_continues_with_only_what_is_new(real: Server, stub: Stub) -> None:
    first = real.post("SAY one", session="my-chat", system="Be terse.")
    second = real.post("SAY two", session="my-chat")
    assert (first.session, second.session) == ("new", "hot")
    assert second.headers["x-arch-claude-cli-session"] == first.headers["x-arch-claude-cli-session"]
    assert last_arrived(stub) == sent(["SAY one", "one", "SAY two"])
    third = real.post(
        ["SAY one", "one", "SAY two", "two", "SAY three"], session="my-chat", system="Be terse."
    )
    assert third.session == "hot"
    edited = real.post(["SAY one", "ONE", "SAY three"], session="my-chat", system="Be terse.")
    assert edited.session.startswith("rebuilt")
    assert last_arrived(stub) == sent(["SAY one", "ONE", "SAY three"])


# ---------------------------------------------------------------- input that the CLI would take for its own

COMMANDS = (
    "/compact",
    "/x",
    "/help me",
    "see @/etc/hostname",
    "@/etc/hostname",
    "--version",
    "#note",
    "!ls",
)


def test_commands_and_file_mentions_are_plain_text(
    real: Server, since: Callable[[], list[Json]]
) -> None:
    """As the first message, as the newest one after another text, and in the past."""

    def ask(*asked: Any) -> str:
        count = len(since())
        answer = real.post(list(asked))
        assert answer.status == 200
        [row] = since()[count:]
        assert arrived(row["body"]) == sent(list(asked))
        assert Path("/etc/hostname").read_text().strip() not in json.dumps(row["body"]["messages"])
        return answer.text

    for value in COMMANDS:
        ask(value, ask(value), {"role": "user", "content": [text("a"), text(value)]})
    ask(*(words for value in COMMANDS for words in (value, "well")), "and now")


@pytest.mark.parametrize(
    "system",
    ["Be a pirate.", [text("Be a"), {**text("pirate."), "cache_control": {"type": "ephemeral"}}]],
)
def test_system_prompt_is_the_requests_alone(
    real: Server, since: Callable[[], list[Json]], system: Any
) -> None:
    assert real.post("SAY x", system=system).status == 200
    body = since()[-1]["body"]
    # The CLI says who it is in two short lines of its own; they stay true.
    *own, ours = [block["text"] for block in body["system"]]
    assert ours == ("Be a pirate." if isinstance(system, str) else "Be a\n\npirate.")
    assert len(own) == 2
    assert sum(map(len, own)) < 200
    assert body["tools"] == []


def test_without_system_prompt_there_is_none(real: Server, since: Callable[[], list[Json]]) -> None:
    assert real.post("SAY x").status == 200
    assert sum(len(block["text"]) for block in since()[-1]["body"]["system"]) < 200


def test_system_prompt_of_300_kb_arrives_whole(
    real: Server, since: Callable[[], list[Json]]
) -> None:
    system = "lorem ipsum dolor " * 17000
    assert real.post("SAY x", system=system).status == 200
    assert since()[-1]["body"]["system"][-1]["text"] == system


def test_nothing_of_the_users_own_settings_arrives(
    serve: Serve,
    cli: Path,
    environment: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    since: Callable[[], list[Json]],
) -> None:
    project = tmp_path / "project"
    for folder in (environment / ".claude", project / ".claude", project):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "CLAUDE.md").write_text("CANARY memory")
        (folder / "settings.json").write_text(
            json.dumps({"env": {"ANTHROPIC_BASE_URL": "http://127.0.0.1:9"}, "model": "opus"})
        )
    servers = {"mcpServers": {"canary": {"command": "touch", "args": [str(tmp_path / "started")]}}}
    (environment / ".claude.json").write_text(json.dumps(servers))
    (project / ".mcp.json").write_text(json.dumps(servers))
    monkeypatch.chdir(project)
    assert serve(bin=cli).post("SAY x").text == "x"
    row = since()[-1]
    assert "CANARY" not in json.dumps(row["body"])
    assert str(project) not in json.dumps(row["body"])
    assert row["body"]["tools"] == []
    assert row["body"]["model"].startswith("claude-sonnet")
    assert not (tmp_path / "started").exists()


SCHEMA = {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}
PARAMETERS: list[Json] = [
    {"temperature": 0.25, "max_tokens": 200_000},
    {"top_p": 0.5, "top_k": 7},
    {"stop_sequences": ["@@", "##"], "service_tier": "standard_only"},
    {"thinking": {"type": "enabled", "budget_tokens": 2000}, "max_tokens": 3000},
    {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}},
    {"output_config": {"effort": "max", "format": {"type": "json_schema", "schema": SCHEMA}}},
]


def test_parameters_are_the_requests_alone(real: Server, since: Callable[[], list[Json]]) -> None:
    """In one conversation, of which every other turn has some."""
    history: list[str] = []
    for asked in PARAMETERS:
        for fields in (asked, {"max_tokens": 50}):
            history.append(f"SAY {len(history)}")
            answer = real.post(history, **fields)
            assert answer.session == ("hot" if len(history) > 1 else "new")
            history.append(answer.text)
        with_them, without = (row["body"] for row in since()[-2:])
        assert {name: with_them[name] for name in asked} == asked
        assert without["max_tokens"] == 50
        assert without["output_config"] == {"effort": "high"}  # the API's default
        # With older models the CLI sends the API's default itself.
        assert without.get("temperature", 1) == 1
        assert not {
            "top_p",
            "top_k",
            "stop_sequences",
            "thinking",
            "service_tier",
        } & set(without)


def test_stop_sequence_ends_the_answer_and_leaves_the_session_warm(real: Server) -> None:
    answer = real.post("SAY alpha STOP beta", stop_sequences=["STOP"])
    assert (answer.text, answer.message["stop_reason"]) == ("alpha ", "stop_sequence")
    assert answer.message["stop_sequence"] == "STOP"
    assert real.post(["SAY alpha STOP beta", "alpha", "SAY on"]).session == "hot"


# ---------------------------------------------------------------- errors


FAILURES = {
    "FAIL400": (400, "invalid_request_error"),
    "FAIL401": (401, "authentication_error"),
    "FAIL403": (403, "permission_error"),
    "FAIL429": (429, "rate_limit_error"),
    "FAIL500": (500, "api_error"),
    "FAIL529": (529, "overloaded_error"),
}


def test_api_failure_keeps_its_status_and_type(real: Server) -> None:
    for number, (word, failure) in enumerate(FAILURES.items()):
        answer = real.post(word, stream=bool(number % 2))
        assert (answer.status, answer.json["error"]["type"]) == failure
        assert answer.json["request_id"] == answer.headers["request-id"]
    assert real.post("SAY fine").text == "fine"


@pytest.mark.parametrize("stream", [False, True])
def test_unknown_model_is_404(real: Server, stream: bool) -> None:
    answer = real.post("hi", model="no-such-model-xyz", stream=stream)
    assert (answer.status, answer.json["error"]["type"]) == (404, "not_found_error")
    assert "no-such-model-xyz" in answer.json["error"]["message"]


def test_error_in_mid_stream_is_an_error_event_and_the_end(real: Server) -> None:
    events = real.post("MIDFAIL please, and say so", stream=True).events
    assert events[0]["type"] == "message_start"
    assert events[-1]["type"] == "error"
    assert not {"message_stop", "message_delta"} & {event["type"] for event in events}
    assert real.post("MIDFAIL please, and say so").status in (502, 529)
    assert real.post("SAY fine").text == "fine"


def test_retried_api_failure_is_an_answer(serve: Serve, cli: Path) -> None:
    assert (
        serve(bin=cli, retries=1)
        .post(f"RETRYONCE {time.time()}")
        .text.startswith("You said: 'RETRYONCE")
    )


@pytest.mark.parametrize("stream", [False, True])
def test_nobody_logged_in_is_401_with_the_cure(serve: Serve, cli: Path, stream: bool) -> None:
    server = serve(
        bin=cli, keep_env=("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "ANTHROPIC_BASE_URL")
    )
    answer = server.post("hi", stream=stream)
    assert (answer.status, answer.json["error"]["type"]) == (401, "authentication_error")
    assert "/login" in answer.json["error"]["message"]
    assert answer.headers["x-should-retry"] == "false"


# ---------------------------------------------------------------- the client leaves


def ask_and_leave(client: Client, seen: Callable[[], object], **fields: Any) -> None:
    connection = http.client.HTTPConnection(client.host, client.port)
    connection.request(
        "POST",
        "/v1/messages",
        json.dumps(request_body(**fields)),
        {"content-type": "application/json"},
    )
    wait_until(seen, "the API call")
    assert connection.sock
    connection.sock.close()
    connection.close()


@pytest.mark.parametrize("stream", [False, True])
def test_the_api_call_of_a_client_that_left_ends_at_once(
    real: Server, since: Callable[[], list[Json]], stream: bool
) -> None:
    ask_and_leave(real, since, messages="SLOW 200", stream=stream)
    began = time.monotonic()
    wait_until(lambda: since()[0]["end"], "the end of the API call", 8)
    assert since()[0]["end"] == "left"
    assert since()[0]["seconds"] < 9  # the whole answer takes ten
    wait_until(
        lambda: not real.processes(), "the end of the process", began + 10 - time.monotonic()
    )
    assert real.post("SAY fine").text == "fine"
    assert len(since()) == 2  # nothing more was billed


# ---------------------------------------------------------------- the end of the bridge


def start_slow_answer(
    program: Program, seen: Callable[[], object], words: str, stream: bool = True
) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(program.host, program.port, timeout=60)
    body = json.dumps(request_body(words, stream=stream))
    connection.request("POST", "/v1/messages", body, {"content-type": "application/json"})
    wait_until(seen, "the API call")
    return connection


def test_running_answer_is_finished_on_sigterm(
    launch: Launch, cli: Path, since: Callable[[], list[Json]]
) -> None:
    program = launch(CLAUDE_CLI_BIN=str(cli))
    connection = start_slow_answer(program, since, "SLOW 40")
    program.process.send_signal(signal.SIGTERM)
    data = connection.getresponse().read()
    connection.close()
    assert data.endswith(b'data: {"type":"message_stop"}\n\n')
    assert program.wait() == 0
    assert not program.children()


def test_answer_longer_than_the_drain_time_ends_in_an_error(
    launch: Launch, cli: Path, since: Callable[[], list[Json]]
) -> None:
    program = launch(CLAUDE_CLI_BIN=str(cli), CLAUDE_CLI_DRAIN_SECS="0.5")
    streamed = start_slow_answer(program, since, "SLOW 400")
    plain = start_slow_answer(program, lambda: len(since()) == 2, "SLOW 400 b", stream=False)
    program.process.send_signal(signal.SIGINT)
    assert b"event: error\n" in streamed.getresponse().read()
    response = plain.getresponse()
    assert (response.status, json.loads(response.read())["error"]["type"]) == (503, "api_error")
    assert program.wait() == 0
    wait_until(lambda: all(row["end"] == "left" for row in since()), "the end of the API calls")
    for connection in (streamed, plain):
        connection.close()


@linux
def test_sigkill_of_the_bridge_leaves_no_child_and_no_api_call(
    launch: Launch, cli: Path, since: Callable[[], list[Json]]
) -> None:
    program = launch(CLAUDE_CLI_BIN=str(cli))
    connection = start_slow_answer(program, since, "SLOW 200")
    assert Client(program.host, program.port).post("SAY idle").text == "idle"
    orphans = program.children()
    assert len(orphans) >= 2
    program.process.kill()
    program.wait()
    connection.close()
    wait_until(lambda: not any(alive(orphan.pid) for orphan in orphans), "their end")
    wait_until(lambda: since()[0]["end"] == "left", "the end of the API call")


def test_start_makes_no_model_call_and_its_spare_serves_the_first_conversation(
    launch: Launch, cli: Path, since: Callable[[], list[Json]]
) -> None:
    program = launch(CLAUDE_CLI_BIN=str(cli), CLAUDE_CLI_SPARES="1")
    wait_until(
        lambda: any("logged in: ANTHROPIC_API_KEY" in line for line in program.lines),
        "the login state",
    )
    spare = b'processes{state="spare"} 1'
    wait_until(lambda: spare in program.call("GET", "/metrics").body, "the spare")
    wait_until(lambda: len(program.children()) == 1, "the end of the process that was asked")
    [waiting] = [child.pid for child in program.children()]
    assert since() == []
    answer = program.post("SAY hi", system="Be terse.", max_tokens=77)
    assert (answer.text, answer.session) == ("hi", "new")
    assert waiting in {child.pid for child in program.children()}
    assert since()[-1]["body"]["max_tokens"] == 77
    assert since()[-1]["body"]["system"][-1]["text"] == "Be terse."
    wait_until(lambda: len(program.children()) == 2, "the next spare")


def test_start_says_that_nobody_is_logged_in(launch: Launch, cli: Path) -> None:
    program = launch(
        CLAUDE_CLI_BIN=str(cli), CLAUDE_CLI_KEEP_ENV="CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC"
    )
    wait_until(
        lambda: any("nobody is logged in" in line for line in program.lines), "the login state"
    )


# ---------------------------------------------------------------- the process

SCRUBBED = {
    "CLAUDECODE": "1",
    "CLAUDE_CODE_ENTRYPOINT": "cli",
    "CLAUDE_CODE_USE_BEDROCK": "1",
    "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "5",
    "ANTHROPIC_MODEL": "opus",
    "ANTHROPIC_AUTH_TOKEN": "secret",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
    "CLAUDE_CLI_API_KEY": "secret",
}


def test_child_gets_no_name_of_the_scrub_list_unless_kept(
    serve: Serve, cli: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SCRUBBED.items():
        monkeypatch.setenv(name, value)
    server = serve(bin=cli, keep_env=(*KEEP, "OTEL_EXPORTER_OTLP_ENDPOINT"))
    assert server.post("SAY x").text == "x"
    (process,) = server.processes()
    environ = process.environ()
    assert not (set(SCRUBBED) - {"OTEL_EXPORTER_OTLP_ENDPOINT"}) & set(environ)
    assert environ["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://127.0.0.1:9"
    assert (process.cwd() == "/") == server.bridge.pool.cli.is_at_least(sessions.ANNOUNCES)
    assert "SAY" not in " ".join(process.cmdline())


# ---------------------------------------------------------------- the conformance driver of the shared tools


@pytest.mark.timeout(240)
def test_conformance(serve: Serve, cli: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver also sends what the API refuses, so it needs an API that does."""
    with Stub("--judge") as judging:
        monkeypatch.setenv("ANTHROPIC_BASE_URL", judging.url)
        # The driver's raw sockets send `host: x`.
        server = serve(bin=cli, allowed_hosts=("x",))
        command = [
            sys.executable,
            str(TESTS / "drivers/conformance.py"),
            server.url,
            "--model",
            "sonnet",
        ]
        command += [
            "--require",
            "tools,images,documents,thinking,sampling,system_role,json,stop_sequences,max_tokens",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        server.close()
    assert "40 passed, 0 failed" in done.stdout, done.stdout + done.stderr
