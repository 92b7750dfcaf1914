"""The events of the CLI become one Messages stream: in which order, whose they are, where it ends.

What stands in the stream is a matter of test_blocks.py.
"""

import copy
from typing import Any

import pytest
from client import assemble
from grammar import check_stream
from messages import (
    CALL,
    DONE,
    GOOD,
    RECORDINGS,
    STOP,
    TEXT,
    TURNS,
    Recorded,
    bare,
    checked,
    closed,
    failure,
    finish,
    first_turns,
    opened,
    piece,
    plain,
    play,
    start,
    stream,
    text,
)

import translate
from translate import NEXT, AnswerState, ApiError, Translator

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
    "get_settings": [NOBODY_ANSWERED],
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
        assert played.translator.calls == [call["id"]]


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
    AnswerState.WAITING: (),
    AnswerState.OPEN: TEXT[:4],
    AnswerState.BLOCK: (start(), opened()),
    AnswerState.HIDDEN: AGENTS_CALL,
    AnswerState.ENDED: TEXT[:5],
    AnswerState.WORKING: (*AGENTS_CALL, closed(), finish("tool_use")),
    AnswerState.DONE: TEXT,
}
EVENTS: dict[str, Json] = {
    "message_start": start(id="msg_2"),
    "content_block_start": opened(),
    "content_block_delta": piece(),
    "content_block_stop": closed(),
    "message_delta": finish(),
    "message_stop": STOP,
}


@pytest.mark.parametrize("state", AnswerState)
@pytest.mark.parametrize("kind", EVENTS)
def test_an_event_leads_to_the_next_state_or_fails_the_turn(state: AnswerState, kind: str) -> None:
    """All but what stands before the answer, or behind it: that is left out."""
    translator = Translator(agent=True)
    for line in stream(*LEADING[state]):
        translator.feed(line)
    assert translator.state is state
    [line] = stream(EVENTS[kind])
    if kind in NEXT[state]:
        translator.feed(line)
        assert translator.state is NEXT[state][kind]
    elif state in (AnswerState.WAITING, AnswerState.DONE):
        assert translator.feed(line) == []
        assert translator.state is state
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
    for failed in (False, True):
        played = play([*stream(*TEXT[:-1]), {**DONE, "is_error": failed}])
        assert checked(played)["stop_reason"] == "end_turn"
        assert played.translator.result == {**DONE, "is_error": failed}


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
        assert (played.translator.calls, played.translator.process_waits) == (["toolu_1"], rests)


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
    assert (translator.working, translator.done, translator.process_waits) == (True, False, False)
    for line in (ITS_RESULT, *AFTER):
        translator.feed(line)
    assert (translator.working, translator.done, translator.process_waits) == (False, True, True)


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
