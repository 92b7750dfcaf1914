"""The events of the CLI become one Messages stream, whatever it prints."""

import copy
import json
from typing import Any

import pytest
from client import assemble
from grammar import check_stream, loose_message
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import (
    CALL,
    DONE,
    GOOD,
    JUNK,
    QUICK,
    RECORDINGS,
    REDACTED,
    SERVED,
    STOP,
    TEXT,
    TURNS,
    Played,
    Recorded,
    bare,
    checked,
    closed,
    failed,
    failure,
    finish,
    first_turns,
    opened,
    piece,
    plain,
    play,
    put,
    start,
    stream,
    synthetic,
    text,
)

import translate
from translate import NEXT, ApiError, Translator, decode

Json = dict[str, Any]

every_turn = pytest.mark.parametrize("turn", TURNS.values(), ids=TURNS.keys())


# ---------------------------------------------------------------- recordings

HELLO = ("end_turn", "hello'. History has ", ["text"])
BROKE_OFF = (502, "api_error", "The API ended the answer before it was complete.")
NOBODY_ANSWERED = (502, "claude_cli_error", "the claude CLI closed its output")
# Scenario, or version/scenario -> the end of each turn: (stop_reason, words of its text, the types
# of its blocks), or (status, error.type, the beginning of the message).
ENDS: dict[str, list[tuple[Any, ...]]] = {
    "text": [HELLO],
    "two_turns": [HELLO, ("end_turn", "'and again'. History has ", ["text"])],
    "unicode": [("end_turn", "héllo ✓ 🎉 \u2028 \x00 日本語 ", ["text"])],
    "thinking": [("end_turn", "thought", ["thinking", "redacted_thinking", "text"])],
    "turn_settings": [HELLO],
    "history": [("end_turn", "'thanks'. History has ", ["text"])],
    "history_tool_results": [("end_turn", "Tool said: ", ["text"])],
    "retry_then_success": [("end_turn", "RETRYONCE'. History has ", ["text"])],
    "not_streamed": [(404, "not_found_error", "the API refused the request")],
    "empty": [("end_turn", "", [])],
    "max_tokens": [("max_tokens", "cut sho", ["text"])],
    "refusal": [("refusal", "", ["text"])],
    "client_tool": [("tool_use", "Let me use it.", ["text", "tool_use"])],
    "client_tools_parallel": [("tool_use", "Let me use it.", ["text", "tool_use", "tool_use"])],
    "unlisted_tool": [("tool_use", "Let me use it.", ["text", "tool_use"])],
    "builtin_tool": [("end_turn", "Let me use it.Tool said: ", ["text", "text"])],
    "subagent": [("end_turn", "Let me use it.Tool said: ", ["text", "text"])],
    "error_400": [(400, "invalid_request_error", "prompt is too long")],
    "error_401": [(401, "authentication_error", "Invalid API key")],
    "error_429": [(429, "rate_limit_error", "slow down")],
    "error_529": [(529, "overloaded_error", "Overloaded")],
    "error_code": [(403, "permission_error", "no")],
    "image_removed": [(400, "invalid_request_error", "an image in the conversation could not be")],
    "quota_allowed": [("end_turn", "'QUOTA allowed'. History has ", ["text"])],
    "quota_warning": [("end_turn", "'QUOTA allowed_warning'. History has ", ["text"])],
    "quota_rejected": [(429, "rate_limit_error", "You've hit your ")],
    "not_logged_in": [(401, "authentication_error", "Not logged in · Please run /login")],
    "mid_stream_error": [(529, "overloaded_error", "Overloaded")],
    "interrupt": [BROKE_OFF],
    "2.1.197/interrupt": [(502, "claude_cli_error", "[ede_diagnostic]")],
    # No model was asked in these.
    "context_usage": [NOBODY_ANSWERED],
    "slash_command_unescaped": [NOBODY_ANSWERED],
    "refused_control": [(502, "claude_cli_error", "the claude CLI refused")],
    "gate_closed_empty": [
        (502, "claude_cli_error", "No conversation found with session ID"),
    ],
}


@every_turn
def test_every_recorded_turn_is_a_stream_of_the_grammar(turn: Recorded) -> None:
    played = turn.play()
    message = check_stream(played.sent)["message"]
    assert message == (played.message if played.translator.done else None)
    assert played.translator.done == (played.error is None)


@pytest.mark.parametrize("name", RECORDINGS)
def test_every_recorded_turn_ends_as_its_scenario_says(name: str) -> None:
    ends = ENDS.get(name) or ENDS[name.partition("/")[2]]
    for turn, (how, words, kinds) in zip(RECORDINGS[name], ends, strict=True):
        played = turn.play()
        if played.error:
            assert (played.error.status, played.error.error_type) == (how, words)
            assert played.error.message.startswith(kinds)
            continue
        message = played.message
        said = "".join(block.get("text", "") for block in message["content"])
        found = [block["type"] for block in message["content"]]
        assert (message["stop_reason"], found) == (how, kinds)
        assert words in said
        assert bool(said) == bool(words)
        calls_of_the_api = 2 if turn.scenario in ("builtin_tool", "subagent") else 1
        for count, tokens in {
            "input_tokens": 10,
            "output_tokens": 17,
            "cache_creation_input_tokens": 3,
            "cache_read_input_tokens": 5,
        }.items():
            assert message["usage"][count] == tokens * calls_of_the_api


@every_turn
def test_the_json_answer_is_what_a_client_assembles(turn: Recorded) -> None:
    played = turn.play()
    if played.translator.done:
        assert bare(checked(played)) == bare(assemble(played.sent))


@every_turn
def test_a_turn_rests_after_a_text_that_the_model_ended_or_a_call_of_a_listed_tool(
    turn: Recorded,
) -> None:
    translator = turn.play().translator
    if translator.done:
        visible = any(block.get("text") for block in translator.message["content"])
        rests = translator.stop_reason == "end_turn" and visible
        if translator.stop_reason == "tool_use":
            rests = turn.scenario != "unlisted_tool"
        assert translator.process_waits == rests


def test_the_thinking_of_an_answer_comes_whole_with_its_signature() -> None:
    for turn in first_turns("thinking").values():
        content = turn.play().message["content"]
        assert content[0] == {"type": "thinking", "thinking": "hmm...", "signature": "c2ln"}


def test_client_tools_keep_their_names() -> None:
    for turn in first_turns("client_tool").values():
        played = turn.play()
        call = played.message["content"][1]
        assert (call["name"], call["input"]) == ("get_weather", {"city": "Paris"})
        assert [item["id"] for item in played.translator.calls] == [call["id"]]


def test_a_recorded_turn_is_left_out_where_another_was_asked_for() -> None:
    """2.1.330 and later say which user lines a turn answers."""
    turns = [
        turn
        for turn in TURNS.values()
        if any("user_message_uuids" in event for event in turn.events)
    ]
    assert turns
    assert not any(play(turn.events, turn_id="another").emitted for turn in turns)


# ---------------------------------------------------------------- the order of events

# AnswerState -> events that lead there, in an agent's turn.
AGENTS_CALL = (start(), opened(**CALL | {"name": "Read"}))
LEADING = {
    "waiting": (),
    "open": TEXT[:4],
    "block": (start(), opened()),
    "hidden": AGENTS_CALL,
    "ended": TEXT[:5],
    "working": (*AGENTS_CALL, closed(), finish("tool_use")),
    "done": TEXT,
}
EVENTS: dict[str, Json] = {
    "message_start": start(id="msg_2"),
    "content_block_start": opened(),
    "content_block_delta": piece(),
    "content_block_stop": closed(),
    "message_delta": finish(),
    "message_stop": STOP,
}


@pytest.mark.parametrize("state", NEXT)
@pytest.mark.parametrize("kind", EVENTS)
def test_an_event_leads_to_the_next_state_or_fails_the_turn(state: str, kind: str) -> None:
    """All but what stands before the answer, or after it: that is left out."""
    translator = Translator(agent=True)
    for line in stream(*LEADING[state]):
        translator.feed(line)
    assert translator.state == state
    [line] = stream(EVENTS[kind])
    if kind in NEXT[state]:
        translator.feed(line)
        assert translator.state == NEXT[state][kind]
    elif state in ("waiting", "done"):
        assert translator.feed(line) == []
        assert translator.state == state
    else:
        with pytest.raises(ApiError) as caught:
            translator.feed(line)
        assert caught.value.status == 502


BROKEN = {
    "second message": (*TEXT[:4], start(id="msg_2")),
    "same message twice": (TEXT[0], *TEXT),
    "block in a block": (*TEXT[:2], opened(1)),
    "piece of no block": (TEXT[0], piece()),
    "piece of another block": (*TEXT[:2], piece(1)),
    "end of no block": (TEXT[0], closed()),
    "end of another block": (*TEXT[:2], closed(1)),
    "end inside a block": (*TEXT[:3], finish()),
    "block after the end": (*TEXT[:5], opened(1)),
    "second end": (*TEXT[:5], finish()),
    "no stop_reason": (*TEXT[:4], STOP),
    "no message": ({"type": "message_start"},),
    "piece without text": (*TEXT[:2], {**piece(), "delta": {"type": "text_delta"}}),
    "piece of no index": (*TEXT[:2], {**piece(), "index": None}),
    "input that is not JSON": (
        TEXT[0],
        opened(**CALL),
        piece(type="input_json_delta", partial_json="{"),
        closed(),
    ),
    "error": (
        *TEXT[:3],
        {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}},
    ),
}


@pytest.mark.parametrize("events", BROKEN.values(), ids=BROKEN.keys())
def test_an_answer_out_of_order_ends_in_an_error(events: tuple[Json, ...]) -> None:
    played = play([*stream(*events), *stream(STOP), DONE])
    assert played.error
    assert check_stream(played.sent)["error"]


def test_an_error_in_the_stream_keeps_its_type_and_text() -> None:
    error = failure(stream(*BROKEN["error"]))
    assert (error.status, error.error_type, error.message) == (
        529,
        "overloaded_error",
        "Overloaded",
    )


@pytest.mark.parametrize(
    ("given", "status", "kind"),
    [
        ("overloaded_error", 529, "overloaded_error"),
        ("invalid_request_error", 400, "invalid_request_error"),
        ("rate_limit_error", 429, "rate_limit_error"),
        ("brand_new_error", 502, "brand_new_error"),
        (None, 502, "api_error"),
    ],
)
def test_an_error_in_the_stream_has_the_status_of_its_type(
    given: str | None, status: int, kind: str
) -> None:
    error = translate.stream_error({"type": given, "message": "no"})
    assert (error.status, error.error_type, error.message) == (status, kind, "no")
    assert error.is_from_api


def test_a_call_that_was_cut_off_ends_and_the_stop_reason_decides_whether_it_is_an_error() -> None:
    cut = BROKEN["input that is not JSON"]
    assert play(stream(*cut)).emitted == list(cut)
    for reason in ("tool_use", "end_turn", "stop_sequence", "pause_turn"):
        played = play(stream(*cut, finish(reason), STOP))
        assert played.emitted == list(cut)
        assert played.error
        assert "tool input is not a JSON object" in played.error.message
    for reason in ("max_tokens", "refusal"):
        played = play(stream(*cut, finish(reason), STOP))
        assert played.error is None
        assert [event["type"] for event in played.emitted[4:]] == ["message_delta", "message_stop"]


LATE: dict[str, Json] = {
    "result": DONE,
    "failed result": {**DONE, "is_error": True, "api_error_status": 500},
    "assistant": {
        "type": "assistant",
        "message": {**start(id="msg_2")["message"], "content": [{"type": "text"}]},
    },
    "message_start": stream(start(id="msg_2"))[0],
    "stream error": stream({"type": "error", "error": {"type": "api_error", "message": "no"}})[0],
    "new event": stream({"type": "new"})[0],
    "refused control request": {
        "type": "control_response",
        "response": {"subtype": "error", "request_id": "settings", "error": "no"},
    },
    "api_retry": {"type": "system", "subtype": "api_retry", "retry_delay_ms": 5},
    "rate limit": {
        "type": "rate_limit_event",
        "rate_limit_info": {"status": "rejected", "resetsAt": 5},
    },
}


@pytest.mark.parametrize("event", LATE.values(), ids=LATE.keys())
def test_nothing_follows_message_stop(event: Json) -> None:
    played = play([*stream(*TEXT), event])
    assert not played.error
    assert played.emitted == GOOD


def test_the_first_result_that_follows_the_answer_is_kept() -> None:
    assert play([*stream(*TEXT), DONE, {**DONE, "result": "x"}]).translator.result == DONE
    assert play(stream(*TEXT)).translator.result is None


def test_a_result_before_the_answer_is_not_the_turns() -> None:
    played = play([{**DONE, "num_turns": 0}, *stream(*TEXT), DONE])
    assert played.emitted == GOOD
    assert played.translator.result == DONE


def test_a_message_stop_that_got_lost_comes_with_the_result_even_if_that_is_an_error() -> None:
    for is_error in (False, True):
        played = play([*stream(*TEXT[:-1]), {**DONE, "is_error": is_error}])
        assert checked(played)["stop_reason"] == "end_turn"
        assert played.translator.result == {**DONE, "is_error": is_error}


def test_a_refused_control_request_fails_the_turn() -> None:
    refused = LATE["refused control request"]
    error = failure([refused])
    assert (error.status, error.error_type) == (502, "claude_cli_error")


# ---------------------------------------------------------------- the model that answers

OPUS, SONNET = "claude-opus-4-8", "claude-sonnet-5-5"


def test_a_count_that_the_api_refused_is_no_call_of_the_turn() -> None:
    for path, error in (("", 404), ("/count_tokens", None)):
        url = f"https://api/v1/messages{path}"
        [refused] = translate.decode(f"[log_x] post {url} failed with status 404 in 5ms".encode())
        played = play([refused, *stream(*TEXT)])
        assert (played.error.status if played.error else None) == error
        assert played.translator.api_calls == (1 if error else 0)


def test_an_answer_of_another_model_fails_before_anything_is_sent() -> None:
    """For one that it does not take, the CLI silently asks another."""
    answer = stream(start(model=SONNET), *TEXT[1:])
    played = play(answer, model=OPUS)
    assert played.error
    assert (played.error.status, played.error.error_type) == (502, "claude_cli_error")
    assert played.error.message == f"the claude CLI used {SONNET} instead of {OPUS}"
    assert (played.emitted, played.message) == ([], {})


def test_an_answer_of_the_model_that_was_asked_is_passed_on() -> None:
    answer = stream(start(model=f"{OPUS}-20260101"), *TEXT[1:])
    for asked in (OPUS, f"{OPUS}[1m]", "opus", ""):
        played = play(answer, model=asked)
        assert checked(played)["model"] == f"{OPUS}-20260101"


def test_models_that_an_agent_asks_later_may_be_others() -> None:
    begun = start(model=OPUS)
    later = start(id="msg_2", model=SONNET)
    events = stream(begun, *READ, finish("tool_use"), STOP, later, *TEXT[1:])
    assert checked(play(events, agent=True, model=OPUS))["model"] == OPUS


def test_a_recorded_answer_is_of_the_model_that_the_cli_lists() -> None:
    for scenario in ("text", "client_tool"):
        for version, turn in first_turns(scenario).items():
            events: list[Any] = turn.events
            answers = [translate.control_result(event, "initialize") for event in events]
            info = translate.read_info(next(filter(None, answers)))
            model = info.full_name("sonnet")
            played = play(turn.events, turn_id=turn.turn_id, model=model)
            assert checked(played)["model"] == model, (version, scenario)
            other = play(turn.events, turn_id=turn.turn_id, model=OPUS)
            assert other.error, (version, scenario)


# ---------------------------------------------------------------- whose events they are


def test_events_of_subagents_are_left_out() -> None:
    inner = stream(start(id="msg_2"), opened(), piece(text="no"), closed(), finish(), STOP)
    inner.append(plain(text("no"), id="msg_3"))
    inner = [{**event, "parent_tool_use_id": "toolu_1"} for event in inner]
    assert play([*inner, DONE]).emitted == []
    assert play([*inner, *stream(*TEXT[:3]), *inner, *stream(*TEXT[3:])]).emitted == GOOD


def of_turn(turn_ids: Any, *events: Json) -> list[Json]:
    """Events as 2.1.330 prints them: the first one says whose they are."""
    first, *others = stream(*events)
    return [{**first, "user_message_uuids": turn_ids}, *others]


def test_events_of_a_turn_that_the_cli_made_by_itself_are_left_out() -> None:
    other = start(id="msg_2"), opened(), piece(text="no"), closed(), finish(), STOP
    its_result = {**DONE, "user_message_uuids": [], "is_error": True}
    for turn_ids in ([], ["another"], [None]):
        events = [*of_turn(turn_ids, *other), its_result, *of_turn(["x", "mine"], *TEXT), DONE]
        played = play(events, turn_id="mine")
        assert (played.emitted, played.error, played.translator.result) == (GOOD, None, DONE)


def test_events_that_name_no_turn_are_of_the_last_that_was_named() -> None:
    odd = of_turn(None, *TEXT)
    assert play(odd, turn_id="mine").emitted == GOOD
    assert play([*of_turn(["another"], start(id="msg_2")), *odd], turn_id="mine").emitted == []


def test_without_an_id_of_its_own_a_turn_takes_every_event() -> None:
    assert play(of_turn(["another"], *TEXT)).emitted == GOOD


# ---------------------------------------------------------------- tools


def test_every_call_is_the_clients_but_a_process_rests_only_where_it_can_hand_it_over() -> None:
    names = {"weather": True, "get_weather": True, "Bash": False, "mcp__client__weather": False}
    for name, rests in names.items():
        call = opened(**CALL | {"name": name})
        played = play(stream(start(), call, closed(), finish("tool_use"), STOP))
        assert checked(played)["content"][0]["name"] == name
        assert [item["name"] for item in played.translator.calls] == [name]
        assert played.translator.process_waits == rests


# (what the model wrote, what the process holds, whether that is the same)
HELD: dict[str, tuple[Json, Json, bool]] = {
    "alike": ({"a": [1, {}]}, {"a": [1, {}]}, True),
    # JavaScript has no other numbers, so a fresh process would have the same.
    "long number": ({"a": 1234567890123456789}, {"a": 1234567890123456800}, True),
    "large number": ({"a": 1e16}, {"a": 10000000000000000}, True),
    "number for its text": ({"a": "5"}, {"a": 5}, False),
    "number for a truth": ({"a": True}, {"a": 1}, False),
    "key that is lost": ({"__proto__": 1}, {}, False),
}


def repeated(*blocks: Any) -> Json:
    return {"type": "assistant", "message": {"id": "msg_1", "content": list(blocks)}}


@pytest.mark.parametrize(("given", "held", "is_same"), HELD.values(), ids=HELD.keys())
def test_a_process_that_holds_another_input_of_a_call_does_not_rest(
    given: Json, held: Json, is_same: bool
) -> None:
    written = piece(type="input_json_delta", partial_json=json.dumps(given))
    events = [
        *stream(start(), opened(**CALL), written, closed()),
        repeated(CALL | {"input": held}),
        *stream(finish("tool_use"), STOP),
    ]
    played = play(events)
    assert checked(played)["content"][0]["input"] == given
    assert played.translator.process_waits == is_same


def test_blocks_of_an_unknown_shape_do_not_fail_an_answer() -> None:
    bare = {"type": "tool_use"}
    for event in (repeated(5), repeated(bare), repeated({"type": "x", "content": [bare]})):
        played = play([*stream(*TEXT[:4]), event, *stream(finish("end_turn"), STOP)])
        assert (played.translator.done, played.translator.process_waits) == (True, True)
    for odd in ({"type": "new", "text": {"a": 1}}, {"type": "new", "text": [1]}):
        played = play(stream(*TEXT[:4], opened(1, **odd), closed(1), finish("end_turn"), STOP))
        assert played.translator.done
    unsaid = {"type": "tool_use", "id": "toolu_1", "name": "weather"}
    played = play(stream(start(), opened(**unsaid), closed(), finish("tool_use"), STOP))
    assert (played.translator.done, played.translator.process_waits) == (True, True)


def test_one_call_that_cannot_be_handed_over_is_enough_for_a_process_not_to_rest() -> None:
    other = opened(1, **CALL | {"id": "toolu_2", "name": "Bash"})
    calls = (opened(**CALL), closed(), other, closed(1))
    assert not play(stream(start(), *calls, finish("tool_use"), STOP)).translator.process_waits


def test_an_answer_of_calls_that_did_not_end_for_them_does_not_rest() -> None:
    for reason in ("end_turn", "pause_turn", "max_tokens"):
        events = (*TEXT[:4], opened(1, **CALL), closed(1), finish(reason), STOP)
        assert not play(stream(*events)).translator.process_waits
    assert not play(stream(*TEXT[:4], finish("tool_use"), STOP)).translator.process_waits


READ = (
    opened(1, **CALL | {"name": "Read"}),
    piece(1, type="input_json_delta", partial_json="{}"),
    closed(1),
)
# What an agent says before its call and after it.
BEFORE = stream(start(), opened(), piece(), closed(), *READ, finish("tool_use"), STOP)
AFTER = stream(start(id="msg_2"), opened(), piece(text=" there"), closed(), finish(), STOP)
ITS_RESULT = {"type": "user", "message": {"role": "user", "content": []}}
AGENT = [*BEFORE, ITS_RESULT, *AFTER]


def test_an_agents_calls_are_left_out_and_the_answer_goes_on_in_the_next_message() -> None:
    message = checked(play(AGENT, agent=True))
    assert message["content"] == [text("Hi"), text(" there")]
    assert (message["id"], message["stop_reason"]) == ("msg_1", "end_turn")


def test_an_agent_is_working_between_its_messages() -> None:
    translator = Translator(agent=True)
    for line in BEFORE:
        translator.feed(line)
    assert (translator.state, translator.process_waits) == ("working", False)
    for line in (ITS_RESULT, *AFTER):
        translator.feed(line)
    assert (translator.state, translator.process_waits) == ("done", True)


def test_an_agents_last_message_without_words_ends_the_process() -> None:
    """It would go on by itself, whatever was said before."""
    for silent in ((), (opened(), closed())):
        after = stream(start(id="msg_2"), *silent, finish(), STOP)
        played = play([*BEFORE, ITS_RESULT, *after], agent=True)
        assert checked(played)["content"][0] == text("Hi")
        assert not played.translator.process_waits


def test_an_agents_calls_of_the_api_are_those_of_its_answer() -> None:
    played = play(AGENT, agent=True)
    assert played.translator.api_calls == 2


def test_an_agents_answer_counts_the_tokens_of_all_its_messages() -> None:
    first = {"input_tokens": 10, "output_tokens": 1, "cache_read_input_tokens": 5}
    end = {**finish(), "usage": {"input_tokens": 7, "output_tokens": 17}}
    read = (*READ, {**finish("tool_use"), "usage": {"output_tokens": 30}}, STOP)
    events = [
        *stream(start(usage=first), opened(), piece(), closed(), *read),
        *stream(start(id="msg_2", usage=first), opened(), piece(), closed(), *read),
        *stream(start(id="msg_3", usage=first), opened(), piece(), closed(), end, STOP),
    ]
    counts = checked(play(events, agent=True))["usage"]
    assert counts == {
        "input_tokens": 10 + 10 + 7,
        "output_tokens": 30 + 30 + 17,
        "cache_read_input_tokens": 15,
        "cache_creation_input_tokens": 0,
    }


def test_of_the_usage_of_an_agents_messages_only_counts_of_tokens_are_kept() -> None:
    other = {"service_tier": "standard", "cache_creation": {"ephemeral_5m_input_tokens": 3}}
    first = {"input_tokens": 10, "output_tokens": 1, **other}
    read = {**finish("tool_use"), "usage": {"output_tokens": 30, "server_tool_use": {"n": 1}}}
    end = {**finish(), "usage": {"output_tokens": 17, "cache_read_input_tokens": 5, **other}}
    events = [
        *stream(start(usage=first), *TEXT[1:4], *READ, read, STOP),
        *stream(start(id="msg_2", usage=first), *TEXT[1:4], end, STOP),
    ]
    assert checked(play(events, agent=True))["usage"] == {
        "input_tokens": 10 + 10,
        "output_tokens": 30 + 17,
        "cache_read_input_tokens": 5,
        "cache_creation_input_tokens": 0,
    }


def test_a_refused_call_of_a_subagent_does_not_fail_the_answer_and_one_of_the_answer_does() -> None:
    refused = {"type": "api_call", "subtype": "message", "response": 400}
    played = play([*BEFORE, refused, ITS_RESULT, *AFTER], agent=True)
    assert checked(played)["content"] == [text("Hi"), text(" there")]
    alone = play([refused, *stream(*TEXT)]).error
    assert alone
    assert (alone.status, alone.error_type) == (400, "invalid_request_error")


def test_new_events_inside_an_agents_call_are_its_own_business() -> None:
    new = {"type": "new"}
    hidden = (READ[0], new, *READ[1:], finish("tool_use"), new, STOP, new)
    events = stream(start(), *TEXT[1:4], *hidden, start(id="msg_2"), *TEXT[1:])
    assert new not in play(events, agent=True).emitted


# ---------------------------------------------------------------- where an answer ends

REST = {
    "end_turn": True,
    "stop_sequence": True,
    "pause_turn": True,
    "max_tokens": False,
    "refusal": False,
    "model_context_window_exceeded": False,
    "new": False,
}


@pytest.mark.parametrize("reason", REST)
def test_the_answer_ends_at_its_stop_reason_unless_the_cli_rests_there(reason: str) -> None:
    translator = Translator()
    for line in stream(*TEXT[:4]):
        translator.feed(line)
    kinds = [event["type"] for event in translator.feed(*stream(finish(reason)))]
    assert kinds == (["message_delta"] if REST[reason] else ["message_delta", "message_stop"])
    assert (translator.process_waits, translator.done) == (REST[reason], not REST[reason])


@pytest.mark.parametrize(
    "events",
    [
        (),
        (opened(), closed()),
        (
            opened(type="thinking", thinking="", signature=""),
            piece(type="thinking_delta", thinking="hm"),
            closed(),
        ),
        (opened(type="server_tool_use", id="x", name="web_search", input={}), closed()),
    ],
)
def test_an_answer_without_a_visible_text_is_complete_and_does_not_rest(
    events: tuple[Json, ...],
) -> None:
    played = play(stream(start(), *events, finish()))
    checked(played)
    assert not played.translator.process_waits


def test_a_stop_sequence_is_named() -> None:
    for reason, named in (("stop_sequence", "END"), ("end_turn", None)):
        played = play(stream(*TEXT[:4], finish(reason, stop_sequence=named), STOP))
        assert checked(played)["stop_sequence"] == named


def test_stop_details_of_a_refusal_arrive() -> None:
    details = {"type": "refusal", "category": "cyber", "explanation": None}
    for turn in first_turns("refusal").values():
        events = copy.deepcopy(turn.events)
        [delta] = [
            event["event"]["delta"]
            for event in events
            if event["type"] == "stream_event" and event["event"]["type"] == "message_delta"
        ]
        delta["stop_details"] = details
        played = play(events)
        assert checked(played)["stop_details"] == details
        assert bare(played.message) == bare(assemble(played.sent))


# ---------------------------------------------------------------- blocks, deltas and keys, known and new ones


def block(type: str, *deltas: Json, **keys: Any) -> list[Json]:
    pieces = [{"type": "content_block_delta", "index": 0, "delta": delta} for delta in deltas]
    return [opened(type=type, **keys), *pieces, closed()]


def deltas(type: str, key: str, *values: Any) -> list[Json]:
    return [{"type": type, key: value} for value in values]


WEATHER = {"id": "toolu_1", "name": "weather", "input": {}}
SEARCH = {"id": "srvtoolu_1", "name": "web_search", "input": {}}
INPUT = deltas("input_json_delta", "partial_json", "", '{"city": "Pa', 'ris"}')
TEXTS = deltas("text_delta", "text", "Hi", "", " there")
CITATION = {"type": "char_location", "cited_text": "x", "document_title": None}
CITED = deltas("citations_delta", "citation", CITATION)
THOUGHTS = [
    *deltas("thinking_delta", "thinking", "h", "m"),
    *deltas("signature_delta", "signature", "c2ln"),
]
PARIS = {"city": "Paris"}
CALLER = {"type": "code_execution_20250825", "tool_id": "x"}
HIT = {"type": "web_search_result", "url": "http://x", "title": "X", "page_age": None}
# What the SDKs know: (events, the block that a client assembles).
KNOWN: dict[str, tuple[list[Json], Json]] = {
    "text": (
        block("text", *TEXTS),
        text("Hi there"),
    ),
    "text with citations": (
        block("text", *TEXTS, *CITED),
        text("Hi there", citations=[CITATION]),
    ),
    "thinking": (
        block("thinking", *THOUGHTS, thinking="", signature=""),
        {"type": "thinking", "thinking": "hm", "signature": "c2ln"},
    ),
    "empty thinking": (
        block("thinking", thinking="", signature=""),
        {"type": "thinking", "thinking": "", "signature": ""},
    ),
    "redacted thinking": (
        block(**REDACTED),
        REDACTED,
    ),
    "call": (
        block("tool_use", *INPUT, **WEATHER),
        {"type": "tool_use", **WEATHER, "input": PARIS},
    ),
    "call without input": (
        block("tool_use", **WEATHER),
        {"type": "tool_use", **WEATHER},
    ),
    "call that begins with its input": (
        block("tool_use", **WEATHER | {"input": PARIS}),
        {"type": "tool_use", **WEATHER, "input": PARIS},
    ),
    "call from code execution": (
        block("tool_use", *INPUT, **WEATHER, caller=CALLER),
        {
            "type": "tool_use",
            **WEATHER,
            "input": PARIS,
            "caller": CALLER,
        },
    ),
    "server's call": (
        block("server_tool_use", *INPUT, **SEARCH),
        {"type": "server_tool_use", **SEARCH, "input": PARIS},
    ),
    "server's result": (
        block("web_search_tool_result", tool_use_id="srvtoolu_1", content=[HIT]),
        {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": [HIT]},
    ),
    "nulls": (
        block("text", *TEXTS, citations=None, parsed_output=None),
        text("Hi there"),
    ),
    "a call's null": (
        block("tool_use", *INPUT, **WEATHER, caller=None),
        {"type": "tool_use", **WEATHER, "input": PARIS},
    ),
    "citations at the start": (
        block("text", *CITED, *TEXTS, *CITED, citations=[]),
        text("Hi there", citations=[CITATION, CITATION]),
    ),
}


@pytest.mark.parametrize(("events", "content"), KNOWN.values(), ids=KNOWN.keys())
def test_a_known_block_is_the_same_in_the_json_answer_and_for_the_sdk(
    events: list[Json], content: Json
) -> None:
    for reason in (*REST, "tool_use"):
        played = play(stream(start(), *events, finish(reason), STOP))
        message = checked(played)
        assert (message["stop_reason"], message["content"]) == (reason, [content])
        assert bare(message) == bare(assemble(played.sent))


NEW_DELTA = {"type": "new_delta", "new": [1]}
# What the SDK's accumulator does not know, and passes as it came.
NEW: dict[str, tuple[list[Json], Json]] = {
    "block": (
        block("new", id="x", more={"a": [None]}),
        {"type": "new", "id": "x", "more": {"a": [None]}},
    ),
    "block of new deltas": (
        block("new", NEW_DELTA),
        {"type": "new", "new": [1]},
    ),
    "delta of a text": (
        block("text", *TEXTS, NEW_DELTA),
        text("Hi there", new=[1]),
    ),
    "delta of a call": (
        block("tool_use", *INPUT, NEW_DELTA, **WEATHER),
        {"type": "tool_use", **WEATHER, "input": PARIS, "new": [1]},
    ),
    "key of a text": (
        block("text", *TEXTS, new={"a": None}),
        text("Hi there", new={"a": None}),
    ),
    "compaction": (
        block("compaction", {"type": "compaction_delta", "content": "short"}),
        {"type": "compaction", "content": "short"},
    ),
    "call of an MCP server": (
        block("mcp_tool_use", *INPUT, **SEARCH, server_name="s"),
        {"type": "mcp_tool_use", **SEARCH, "input": PARIS, "server_name": "s"},
    ),
    "block of texts": (
        block("new", *TEXTS, text="Oh: "),
        {"type": "new", "text": "Oh: Hi there"},
    ),
    "block of an input": (
        block("new", *INPUT, input={}),
        {"type": "new", "input": PARIS},
    ),
    "block of thoughts": (
        block("new", *THOUGHTS),
        {"type": "new", "thinking": "hm", "signature": "c2ln"},
    ),
    "block of an input that it does not begin with": (
        block("new", *INPUT),
        {"type": "new", "input": PARIS},
    ),
}


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
@pytest.mark.parametrize(("events", "content"), NEW.values(), ids=NEW.keys())
def test_a_new_type_or_key_passes_as_it_came(events: list[Json], content: Json) -> None:
    played = play(stream(start(), *events, finish(), STOP))
    assert checked(played)["content"] == [content]
    assert played.sent[1:-2] == events
    assemble(played.sent)  # the SDK reads it


def test_blocks_are_counted_anew_where_the_cli_counts_otherwise() -> None:
    blocks = (opened(3), piece(3), closed(3), opened(7), piece(7, text=" there"), closed(7))
    message = checked(play(stream(start(), *blocks, finish(), STOP)))
    assert message["content"] == [text("Hi"), text(" there")]


def test_new_events_pass_once_the_message_has_begun() -> None:
    new = {"type": "new", "index": 5, "more": {"a": None}}
    ping = {"type": "ping"}
    for at in range(1, len(TEXT)):
        for event in (new, ping):
            played = play(stream(*TEXT[:at], event, *TEXT[at:]))
            assert played.emitted == [*GOOD[:at], event, *GOOD[at:]]
            assert check_stream(played.sent)["message"] == played.message
            assemble(played.sent)
    assert play(stream(new, ping, *TEXT, new)).emitted == GOOD


@pytest.mark.parametrize("at", range(len(TEXT)))
def test_new_keys_of_events_pass(at: int) -> None:
    events = list(TEXT)
    events[at] = {**events[at], "new": {"a": 1}}
    emitted = play(stream(*events)).emitted
    assert emitted[at]["new"] == {"a": 1}
    del emitted[at]["new"]
    assert emitted == GOOD


def test_new_keys_of_the_message_and_of_its_end_pass() -> None:
    edits = {"applied_edits": [{"type": "compact_20260112"}]}
    container = {"id": "c", "expires_at": "2026-01-01"}
    end = {**finish(container=container), "context_management": edits, "newer": 1}
    played = play(stream(start(new="n", container=container), *TEXT[1:4], end, STOP))
    message = checked(played)
    assert played.emitted[0]["message"]["new"] == message["new"] == "n"
    assert message["container"] == container
    assert played.emitted[-2]["context_management"] == message["context_management"] == edits
    assert played.emitted[-2]["delta"]["container"] == container
    assert played.emitted[-2]["newer"] == message["newer"] == 1


def test_keys_that_hold_nothing_are_left_out_where_strict_clients_break_on_them() -> None:
    nothing: Json = {"a": None, "context_management": {}, "iterations": []}
    counts = {"input_tokens": 10, "output_tokens": 1, **nothing}
    end = {**finish(**nothing), **nothing, "usage": {"output_tokens": 17, **nothing}}
    begun = start(usage=counts, container=None, **nothing)
    played = play(stream(begun, opened(a=None), *TEXT[2:4], end, STOP))
    assert played.emitted == GOOD
    checked(played)


def test_an_integer_of_an_input_that_is_longer_than_64_bits_is_a_float_as_for_the_cli() -> None:
    whole, long = 2**63 - 1, 1234567890123456789012345678901234567890
    partial = f'{{"a": [{whole}, {-whole}], "b": [{long}, -{long}]}}'
    delta = piece(type="input_json_delta", partial_json=partial)
    played = play(stream(start(), opened(**CALL), delta, closed(), finish("tool_use"), STOP))
    assert not played.error
    assert played.sent[2]["delta"]["partial_json"] == partial  # the client gets all digits
    found = played.message["content"][0]["input"]
    assert found == {"a": [whole, -whole], "b": [float(long), -float(long)]}
    assert json.dumps(found["b"]) == json.dumps([float(long), -float(long)])


def test_the_start_of_a_block_passes_as_it_came_but_for_nulls() -> None:
    begun = opened(type="tool_use", id="t", name="weather", input={"city": "Paris"}, caller=None)
    played = play(stream(start(), begun, closed(), finish("tool_use"), STOP))
    del begun["content_block"]["caller"]
    assert played.emitted[1:-2] == [begun, closed()]
    assert checked(played)["content"] == [begun["content_block"]]


# ---------------------------------------------------------------- usage


def test_counts_of_the_end_replace_those_of_the_start() -> None:
    final = {
        "input_tokens": 12,
        "output_tokens": 17,
        "cache_read_input_tokens": 7,
    }
    first = {"input_tokens": 10, "output_tokens": 3, "cache_creation_input_tokens": 2}
    played = play(stream(start(usage=first), *TEXT[1:4], {**finish(), "usage": final}, STOP))
    assert played.emitted[-2]["usage"] == final
    assert checked(played)["usage"] == first | final


def test_counts_that_the_end_leaves_open_are_those_of_the_start() -> None:
    for final in (
        {"output_tokens": 17},
        {"output_tokens": 17, "input_tokens": None},
        {},
        None,
    ):
        played = play(stream(*TEXT[:4], {**finish(), "usage": final}, STOP))
        counts = {"input_tokens": 10, "output_tokens": 17 if final else 1}
        assert checked(played)["usage"] == counts


LEAST = {"input_tokens": 0, "output_tokens": 0}
# (what came, what is passed on beside the two counts that are always there)
USAGES: list[tuple[Any, Json]] = [
    ({}, {}),
    (None, {}),
    ({"cache_creation_input_tokens": 3}, {"cache_creation_input_tokens": 3}),
    ({"service_tier": "standard"}, {"service_tier": "standard"}),
    ({"server_tool_use": None}, {}),
    ({"inference_geo": "us", "speed": None, "iterations": []}, {"inference_geo": "us"}),
    (
        {"output_tokens_details": {"thinking_tokens": 4}, "new": 1},
        {"output_tokens_details": {"thinking_tokens": 4}, "new": 1},
    ),
]


@pytest.mark.parametrize(("came", "passed"), USAGES, ids=repr)
def test_a_usage_has_the_two_main_counts_and_no_null(came: Any, passed: Json) -> None:
    assert play(stream(start(usage=came))).message["usage"] == LEAST | passed
    for events in ((start(usage=came), *TEXT[1:]), (*TEXT[:4], {**finish(), "usage": came}, STOP)):
        checked(play(stream(*events)))


# ---------------------------------------------------------------- deltas

DELTA = b'{"type":"stream_event","event":{"type":"content_block_delta","index":'
TAIL = b',"session_id":"s","parent_tool_use_id":null,"uuid":"u","api_message_id":"msg_1"}'


def outcome(lines: list[bytes]) -> tuple[list[Json], Json, str]:
    """What a client gets of the lines, the message that is kept, and the error."""
    translator, frames, error = Translator(SERVED), b"", ""
    try:
        for line in lines:
            for event in translate.decode(line):
                frames += b"".join(map(translate.frame, translator.feed(event)))
    except ApiError as failure:
        error = failure.message
    assert not any(mark in frames for mark in (b"\xe2\x80\xa8", b"\xe2\x80\xa9", b"\xc2\x85"))
    blocks = frames.decode().split("\n\n")[:-1]
    return [json.loads(block.split("\ndata: ")[1]) for block in blocks], translator.message, error


def delta_line(index: int, kind: str, key: str, value: bytes, tail: bytes = TAIL) -> bytes:
    """A line with a delta; `value` are the bytes between its quotes."""
    head = b'%b%d,"delta":{"type":"%b","%b":"' % (DELTA, index, kind.encode(), key.encode())
    return head + value + b'"}}' + tail


def text_line(value: bytes, tail: bytes = TAIL) -> bytes:
    return delta_line(0, "text_delta", "text", value, tail)


def event_line(**fields: Any) -> bytes:
    return json.dumps(
        {"type": "stream_event", "event": fields, "parent_tool_use_id": None}
    ).encode()


MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "m",
    "content": [],
    "usage": {},
}
BEGIN = [
    event_line(type="message_start", message=MESSAGE),
    event_line(type="content_block_start", index=0, content_block={"type": "text", "text": ""}),
]
END = [
    event_line(type="content_block_stop", index=0),
    event_line(type="message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 3}),
    event_line(type="message_stop"),
]
SUBAGENTS = TAIL.replace(b"null", b'"toolu_1"')
STOP_LINE = b'{"type":"stream_event","event":{"type":"content_block_stop","index":0}}'


@pytest.mark.parametrize("turn", TURNS.values(), ids=TURNS.keys())
def test_the_deltas_of_a_recording_are_passed_on_as_they_came(turn: Recorded) -> None:
    played = turn.play()
    if not played.error:
        checked(played)
    kinds = ("content_block_delta",)
    sent = [event["delta"] for event in played.emitted if event["type"] in kinds]
    came = [
        event["event"]["delta"]
        for event in turn.events
        if event["type"] == "stream_event"
        and event["event"]["type"] in kinds
        and event["parent_tool_use_id"] is None
    ]
    left = iter(came)
    assert all(delta in left for delta in sent)  # in order; an agent's calls are left out


@pytest.mark.parametrize(
    ("lines", "texts"),
    [
        ([text_line(b"plain"), text_line(b" and more")], ["plain", " and more"]),
        ([text_line(b"line\\n \\u00e9 \\\\")], ["line\n é \\"]),
        ([text_line("é \u2028 \u2029 \u0085 😀".encode())], ["é \u2028 \u2029 \u0085 😀"]),
        ([text_line(b'say \\"}},{ \\"')], ['say "}},{ "']),
        ([text_line(b""), text_line(b"after nothing")], ["", "after nothing"]),
        # One that is cut in two is two halves, for which no UTF-8 has a form.
        (
            [text_line(b"\\ud83d"), text_line(b"\\ude00"), text_line(b"\\ud83d\\ude00")],
            ["\ufffd", "\ufffd", "😀"],
        ),
        ([text_line(b"a subagent's", SUBAGENTS), text_line(b"the client's")], ["the client's"]),
        (
            [text_line(b"with an inner object", TAIL[:-1] + b',"more":{"a":1}}')],
            ["with an inner object"],
        ),
    ],
)
def test_an_odd_delta_is_decoded(lines: list[bytes], texts: list[str]) -> None:
    events, message, error = outcome([*BEGIN, *lines, *END])
    assert error == ""
    assert [event["delta"]["text"] for event in events[2:-3]] == texts
    assert check_stream(events)["message"] == message
    assert message["content"] == [{"type": "text", "text": "".join(texts)}]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([text_line(b"\x01")], "a damaged line"),
        ([text_line(b"a\\x")], "a damaged line"),
        ([text_line(b"\\"), text_line(b"n")], "a damaged line"),
        ([text_line(b"cut", TAIL[:30])], "a damaged line"),
        ([text_line(b"cut", TAIL[:-1])], "a damaged line"),
        ([text_line(b"quote", TAIL.replace(b'"u"', b'"u'))], "a damaged line"),
        ([text_line(b"comma", TAIL[:-1] + b",}")], "a damaged line"),
        ([text_line(b"two", TAIL + STOP_LINE)], "a damaged line"),
    ],
)
def test_a_delta_that_is_none_fails_the_turn(lines: list[bytes], words: str) -> None:
    events, message, error = outcome([*BEGIN, text_line(b"Hi"), *lines, *END])
    assert words in error
    assert check_stream([*events, ApiError(502, error).body("r")])["error"]
    assert events[2]["delta"]["text"] == "Hi"
    assert message["stop_reason"] is None


def test_deltas_of_a_text_that_has_the_key_of_a_call_are_text() -> None:
    begun = event_line(
        type="content_block_start", index=0, content_block={"type": "text", "text": "", "input": {}}
    )
    _, message, error = outcome([BEGIN[0], begun, text_line(b"a"), text_line(b"b"), *END])
    assert (message["content"][0]["text"], error) == ("ab", "")


@settings(max_examples=100, **QUICK)
@given(texts=st.lists(st.text(max_size=12), max_size=12), ascii_only=st.booleans())
def test_any_text(texts: list[str], ascii_only: bool) -> None:
    values = [json.dumps(value, ensure_ascii=ascii_only).encode()[1:-1] for value in texts]
    events, message, error = outcome([*BEGIN, *map(text_line, values), *END])
    assert [event["delta"]["text"] for event in events[2:-3]] == texts
    assert message["content"] == [{"type": "text", "text": "".join(texts)}]
    assert error == ""


def test_a_delta_of_another_turn_is_left_out() -> None:
    translator = Translator(turn_id="mine")
    for line in BEGIN:
        for found in translate.decode(line):
            translator.feed(found)
    for turn, kept in (("another", 0), ("mine", 1)):
        tail = TAIL[:-1] + b',"user_message_uuids":["%b"]}' % turn.encode()
        for found in translate.decode(text_line(b"a", tail)):
            assert len(translator.feed(found)) == kept
        for found in translate.decode(text_line(b"b")):  # names none: of the one named last
            assert len(translator.feed(found)) == kept


def test_a_delta_in_an_event_of_another_type_is_not_passed_on() -> None:
    note: Any = {"type": "note", "event": piece(text="no"), "parent_tool_use_id": None}
    played = play([*stream(*TEXT[:2]), note, *stream(*TEXT[2:])])
    assert played.emitted == GOOD
    assert checked(played)["content"] == [text("Hi")]


# ---------------------------------------------------------------- odd events, and mutations


def nested(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


def answer(*blocks: Json, reason: str = "end_turn") -> list[Json]:
    return stream(start(), *blocks, finish(reason), STOP)


def call_of(partial_json: str) -> list[Json]:
    delta = piece(type="input_json_delta", partial_json=partial_json)
    return answer(opened(**CALL), delta, closed(), reason="tool_use")


NO_THOUGHT = {"type": "thinking", "thinking": "", "signature": ""}
HALF = json.dumps(stream(*TEXT)[2] | {"event": piece(text="\ud83d")}).encode()
# Each ends in a message or an ApiError.
ODD: dict[str, list[Json]] = {
    # types
    "event type is a list": stream(*TEXT[:2], {"type": []}, *TEXT[2:]),
    "event type of two lines": stream(*TEXT[:2], {"type": "a\nevent: b"}, *TEXT[2:]),
    # how blocks begin
    "input of a text": answer(opened(input={}), piece(), closed()),
    "text of a new block is a number": answer(opened(type="new", text=5), piece(), closed()),
    # pieces
    "delta of no block and no index": stream(*TEXT[:4], {**piece(), "index": None}, *TEXT[4:]),
    "delta after the end, no index": stream(*TEXT[:5], {**piece(), "index": None}, STOP),
    "half a surrogate pair": [*stream(*TEXT[:2]), *decode(HALF), *stream(*TEXT[3:])],
    # inputs
    "input is a list": call_of("[1]"),
    "input that is cut off before another block": answer(
        opened(**CALL),
        piece(type="input_json_delta", partial_json="{"),
        closed(),
        {**opened(), "index": 1},
        {**closed(), "index": 1},
        reason="max_tokens",
    ),
    # the message
    "content is a text": stream(start(content="x"), *TEXT[1:]),
    # its end
    "empty stop_reason": stream(*TEXT[:4], finish(""), STOP),
    "delta in the end": stream(*TEXT[:4], finish(delta=1), STOP),
    # errors
    "error is null": stream({"type": "error", "error": None}),
    "error without message": stream(*TEXT[:2], {"type": "error", "error": {}}, *TEXT[2:]),
    "error type is null": stream({"type": "error", "error": {"type": None, "message": ""}}),
    "error is null, later": stream(*TEXT[:2], {"type": "error", "error": None}, *TEXT[2:]),
    # failures
    "result of numbers": [failed(result=5, errors=5, api_error_status=True)],
    "result of an empty text": [failed(result="", errors=[])],
    "result of blank text": [failed(result=None, errors=[""])],
    "result of advice alone": [
        failed(result="API Error: 500 . This is a server-side issue, usually temporary")
    ],
    "result of an empty error": [
        failed(result='API Error: 400 {"error": {"type": "", "message": ""}}')
    ],
}
# What is in them is passed on, or is an error: the order of events is kept all the same.
MISTYPED: dict[str, list[Json]] = {
    "event is null": [*stream(*TEXT[:2]), {"type": "stream_event", "event": None}],
    # types
    "block type is a list": answer(opened(type=[]), closed()),
    "delta type is null": answer(opened(), piece(type=None), closed()),
    "block type is empty": answer(opened(type=""), closed()),
    "delta type is empty": answer(opened(), piece(type=""), closed()),
    # how blocks begin
    "tool without id": answer(opened(**CALL | {"id": None}), closed(), reason="tool_use"),
    "input at the start is a text": answer(opened(**CALL | {"input": "x"}), closed()),
    "citations at the start are a text": answer(
        opened(citations="x"), piece(type="citations_delta", citation={}), closed()
    ),
    "text at the start": answer(opened(text="Oh: "), piece(), closed()),
    "text at the start is a number": answer(opened(text=5), piece(), closed()),
    "thoughts at the start": answer(
        opened(**NO_THOUGHT | {"thinking": "Oh: ", "signature": "s"}),
        piece(type="thinking_delta", thinking="hm"),
        closed(),
    ),
    "signature at the start is a number": answer(opened(**NO_THOUGHT | {"signature": 5}), closed()),
    "server's input is a text": answer(
        opened(type="server_tool_use", id="x", name="x", input="y"), closed()
    ),
    "tool of an empty id": answer(opened(**CALL | {"id": ""}), closed(), reason="tool_use"),
    "tool of an empty name": answer(opened(**CALL | {"name": ""}), closed(), reason="tool_use"),
    "server's tool without id": answer(opened(type="server_tool_use", name="x"), closed()),
    "redacted thinking without data": answer(opened(type="redacted_thinking"), closed()),
    "citations of a new block are a text": answer(
        opened(type="new", citations="x"), piece(type="citations_delta", citation={}), closed()
    ),
    # pieces
    "citation of null": answer(opened(), piece(type="citations_delta", citation=None), closed()),
    "thoughts of a text": answer(opened(), piece(type="thinking_delta", thinking="hm"), closed()),
    "input of pieces of a text": answer(
        opened(), piece(type="input_json_delta", partial_json="{}"), closed()
    ),
    "signature of a text": answer(opened(), piece(type="signature_delta", signature="s"), closed()),
    "citation of a thought": answer(
        opened(**NO_THOUGHT), piece(type="citations_delta", citation={}), closed()
    ),
    "text of a call": answer(opened(**CALL), piece(), closed(), reason="tool_use"),
    "signature of null": answer(
        opened(**NO_THOUGHT), piece(type="signature_delta", signature=None), closed()
    ),
    # the message
    "model is a number": stream(start(model=5), *TEXT[1:]),
    "model of null": stream(start(model=None), *TEXT[1:]),
    "empty id": stream(start(id=""), *TEXT[1:]),
    "new delta of a text's text": answer(opened(), piece(), piece(type="new", text=5), closed()),
    "new delta of a call's id": answer(
        opened(**CALL), piece(type="new", id=None), closed(), reason="tool_use"
    ),
    "event type is empty": stream(*TEXT[:2], {"type": ""}, *TEXT[2:]),
    "role of a user": stream(start(role="user"), *TEXT[1:]),
    "type of another": stream(start(type="x"), *TEXT[1:]),
    "stop_sequence is a number": stream(*TEXT[:4], finish("stop_sequence", stop_sequence=5), STOP),
    "stop_details are a text": stream(*TEXT[:4], finish(stop_details="x"), STOP),
    "stop_details of an odd type": stream(*TEXT[:4], finish(stop_details={"type": 5}), STOP),
    "usage in the end": stream(*TEXT[:4], finish(usage=5), STOP),
    "id at the end": stream(*TEXT[:4], {**finish(), "id": "msg_9"}, STOP),
    "content in the end": stream(*TEXT[:4], finish(content=5), STOP),
    "content at the end": stream(*TEXT[:4], {**finish(), "content": 5}, STOP),
}


def loosely_checked(played: Played) -> None:
    """The order of events is right, and so is the message if the events are as clients know them."""
    message = loose_message(played.sent)
    if message:
        assert message == played.message


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
@pytest.mark.parametrize("events", ODD.values(), ids=ODD.keys())
def test_whatever_the_cli_prints_a_client_gets_a_stream_of_the_grammar(events: list[Json]) -> None:
    for agent in (False, True):
        played = play(events, agent=agent)
        message = check_stream(played.sent)["message"]
        assert message == (played.message if played.translator.done else None)
        if message:
            assemble(played.sent)
            kept: Any = played.message
            translate.message_digest(kept)


@pytest.mark.parametrize("events", MISTYPED.values(), ids=MISTYPED.keys())
def test_what_lies_about_types_is_an_error_or_passes_in_the_order_of_the_grammar(
    events: list[Json],
) -> None:
    for agent in (False, True):
        loosely_checked(play(events, agent=agent))


UNKNOWN_SHAPES = {
    "message_start without a message": stream({"type": "message_start"}),
    "message is a list": stream({"type": "message_start", "message": []}),
    "block is null": answer({**opened(), "content_block": None}),
    "block without a type": answer({**opened(), "content_block": {"text": ""}}),
    "delta is a text": answer(opened(), {**piece(), "delta": "x"}),
    "delta without a text": answer(opened(), {**piece(), "delta": {"type": "text_delta"}}),
    "text of a number": answer(opened(), piece(text=5), closed()),
    "tool without a name": answer(opened(type="tool_use", id="t", input={}), closed()),
}


@pytest.mark.parametrize("events", UNKNOWN_SHAPES.values(), ids=UNKNOWN_SHAPES.keys())
def test_an_event_of_an_unknown_shape_is_a_502(events: list[Json]) -> None:
    error = play(events).error
    assert error
    assert (error.status, error.error_type) == (502, "claude_cli_error")
    words = "the claude CLI printed an event of an unknown shape ("
    assert error.message.startswith(words)
    assert error.message.endswith("Error)")


def test_an_input_whose_echo_is_a_good_request_arrives_whole_and_a_deeper_one_fails_the_turn() -> (
    None
):
    most = translate.MAX_DEPTH // 2
    value = json.loads(nested(most))
    assert checked(play(call_of(nested(most))))["content"][0]["input"] == value
    for levels in (most + 1, 300, 1000):
        error = play(call_of(nested(levels))).error
        assert error
        assert "nested too deeply" in error.message


NOISE: list[Json] = [
    *LATE.values(),
    *stream(*TEXT, piece(1), opened(1), closed(1), finish("tool_use"), finish(None)),
    *stream({"type": "ping"}, {"type": "new"}, opened(type="new"), piece(type="new", x=1)),
    *stream(opened(**CALL), piece(type="input_json_delta", partial_json='{"a'), start(id="msg_2")),
    {"type": "keep_alive"},
    {"type": "stream_event", "event": None},
    {"type": "status", "user_message_uuids": ["another"]},
    {"type": None},
    {},
    plain(text("Hi")),
    plain(text("Hi"), id="msg_2"),
    plain(text("made up"), model="<synthetic>"),
    {**DONE, "num_turns": 0},
    {**DONE, "stop_reason": "stop_sequence", "usage": None},
]
# Lists of the CLI's commands and models say nothing about a turn, and would draw most mutations.
SHORT_TURNS = [
    [event for event in turn.events if len(json.dumps(event)) < 3000] for turn in TURNS.values()
]
SHORT_TURNS += [AGENT]
SHORT_TURNS += [answer(*events) for events, _ in [*KNOWN.values(), *NEW.values()]]
OPERATIONS = st.sampled_from(
    ["drop", "duplicate", "swap", "truncate", "cut off", "rename", "junk", "junk", "noise"]
)
NUMBERS = st.integers(0, 10**6)
STEPS = st.lists(st.tuples(OPERATIONS, NUMBERS, NUMBERS), min_size=1, max_size=6)


def mutate(turn: list[Json], steps: list[tuple[str, int, int]]) -> list[Json]:
    events: list[Any] = copy.deepcopy(turn)
    for operation, number, other in steps:
        at = number % len(events) if events else 0
        if operation == "noise":
            events.insert(at, copy.deepcopy(NOISE[other % len(NOISE)]))
        elif not events:
            continue
        elif operation == "drop":
            del events[at]
        elif operation == "duplicate":
            events.insert(at, copy.deepcopy(events[at]))
        elif operation == "swap":
            to = other % len(events)
            events[at], events[to] = events[to], events[at]
        elif operation == "truncate":
            line = json.dumps(events[at]).encode()
            events[at : at + 1] = decode(line[: other % len(line)])
        elif operation == "cut off":
            del events[at:]
        elif operation == "rename":
            put(events[at], other, "brand_new", "type")
        else:
            put(events[at], other // len(JUNK), JUNK[other % len(JUNK)])
    return printed(events)


def printed(events: list[Json]) -> list[Any]:
    """Events as they are read from what the CLI prints."""
    return [event for given in events for event in decode(json.dumps(given).encode())]


@settings(max_examples=400, **QUICK)
@given(turn=st.sampled_from(SHORT_TURNS), steps=STEPS, agent=st.booleans())
def test_a_mutated_turn_ends_in_a_message_or_an_error_in_the_order_of_the_grammar(
    turn: list[Json], steps: Any, agent: bool
) -> None:
    played = play(mutate(turn, steps), agent=agent)
    if {step[0] for step in steps} & {"junk", "rename", "swap"}:
        loosely_checked(played)
    else:
        message = check_stream(played.sent)["message"]
        assert message == (played.message if played.translator.done else None)


# ---------------------------------------------------------------- errors


def test_a_turn_hands_on_what_the_event_before_its_failure_says() -> None:
    event = synthetic(api_error_type="tool_error", api_error_code="bad_tool")
    error = failure([event, failed(api_error_status=400, result="API Error: 400 no")])
    assert (error.status, error.error_type, error.message) == (400, "tool_error", "no")
    assert error.error_code == "bad_tool"


def test_a_turn_in_which_the_cli_removes_what_the_api_refused_fails_with_the_apis_message() -> None:
    said = "API Error: an image in the conversation could not be processed and was removed."
    event = synthetic(message={"model": "<synthetic>", "content": [text(said)]})
    error = failure([event, *stream(*TEXT)])
    assert (error.status, error.message) == (
        400,
        "an image in the conversation could not be processed",
    )
    for odd in (None, 5, [5], [{"type": "text"}], said[:40], "API Error: it went and was removed."):
        event = synthetic(message={"model": "<synthetic>", "content": odd})
        assert play([event, *stream(*TEXT)]).emitted == GOOD


def test_why_a_control_request_is_refused_is_not_logged() -> None:
    """It can quote the system prompt or a field of the request."""
    refusal = {"subtype": "error", "error": "sesame"}
    with pytest.raises(ApiError, match="sesame") as caught:
        Translator().feed({"type": "control_response", "response": refusal})
    assert caught.value.log_reason == "the claude CLI refused a control request"
