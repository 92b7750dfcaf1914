"""Answers that the CLI prints whole, and what it prints beside a stream: `assistant` events."""

from typing import Any

from client import assemble
from messages import (
    CALL,
    DONE,
    GOOD,
    REDACTED,
    TEXT,
    TURNS,
    USED,
    bare,
    checked,
    failure,
    plain,
    play,
    stream,
    text,
)
from test_blocks import CITATION, HIT, PARIS, SEARCH
from test_translation import AFTER, BEFORE, REST

Json = dict[str, Any]

PLAIN_BLOCKS = [
    {"type": "thinking", "thinking": "hmm", "signature": "c2ln"},
    REDACTED,
    text("Let me see.", citations=None),
    text("It says so.", citations=[CITATION]),
    {"type": "server_tool_use", **SEARCH, "input": {"query": "x"}},
    {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": [HIT]},
    {"type": "new", "id": "x", "more": [1]},
    {**CALL, "input": PARIS, "caller": None},
]


def test_an_answer_that_was_not_streamed_becomes_a_whole_stream() -> None:
    result = {**DONE, "stop_reason": "tool_use", "usage": USED}
    for events in (
        [*map(plain, PLAIN_BLOCKS), result],
        [plain(*PLAIN_BLOCKS), result],
    ):
        message = checked(play(events))
        assert message["content"] == [
            *PLAIN_BLOCKS[:2],
            text("Let me see."),
            *PLAIN_BLOCKS[3:7],
            {**CALL, "input": PARIS},
        ]
        assert message["stop_reason"] == "tool_use"
        assert message["usage"] == {**USED, "service_tier": "standard"}


def test_an_answer_that_was_not_streamed_is_the_same_for_the_sdk() -> None:
    known = [block for block in PLAIN_BLOCKS if block["type"] != "new"]
    for reason in (*REST, "tool_use"):
        played = play([plain(*known, stop_reason=reason), DONE])
        assert bare(checked(played)) == bare(assemble(played.sent))


def test_a_plain_answer_keeps_its_own_counts_and_stop_reason() -> None:
    """2.1.197 writes zeros into result.usage; both versions add up what the CLI went on to do."""
    message = plain(text("Hi"), stop_reason="max_tokens")
    for counts in (
        {"input_tokens": 0, "output_tokens": 0},
        {"input_tokens": 99, "output_tokens": 99},
    ):
        played = play([message, {**DONE, "stop_reason": "end_turn", "usage": counts}])
        assembled = checked(played)
        assert assembled["usage"] == {**USED, "service_tier": "standard"}
        assert (assembled["stop_reason"], played.translator.rests) == ("max_tokens", False)


def test_a_plain_answer_names_what_stopped_it() -> None:
    details = {"type": "refusal", "category": None}
    ends = {"stop_reason": "stop_sequence", "stop_sequence": "END", "stop_details": details}
    message = checked(play([plain(text("Hi"), **ends), DONE]))
    assert {key: message[key] for key in ends} == ends


def test_a_plain_answer_ends_with_end_turn_when_the_result_names_no_reason() -> None:
    for reason in (None, "", 5):
        played = play([plain(text("Hi")), {**DONE, "stop_reason": reason}])
        assert checked(played)["stop_reason"] == "end_turn"


def test_a_plain_answer_whose_turn_failed_is_an_error() -> None:
    failed = {**DONE, "is_error": True, "api_error_status": 529}
    assert failure([plain(text("Hi")), failed]).status == 529


def test_a_plain_answer_that_calls_a_tool_ends_when_the_cli_asks_for_the_result() -> None:
    call = {"claudecode/toolUseId": "toolu_1"}
    asks = {
        "type": "control_request",
        "request": {"message": {"method": "tools/call", "params": {"_meta": call}}},
    }
    played = play([plain({**CALL, "input": PARIS}, stop_reason="tool_use"), asks])
    assert checked(played)["stop_reason"] == "tool_use"
    assert played.translator.rests


def test_a_plain_answer_that_calls_a_tool_without_a_reason_ends_with_tool_use() -> None:
    call = {"claudecode/toolUseId": "toolu_1"}
    asks = {
        "type": "control_request",
        "request": {"message": {"method": "tools/call", "params": {"_meta": call}}},
    }
    played = play([plain({**CALL, "input": PARIS}), asks])
    assert checked(played)["stop_reason"] == "tool_use"


def test_assistant_events_repeat_what_was_streamed_and_are_left_out() -> None:
    echo = plain(text("Hi"))
    assert play([*stream(*TEXT[:3]), echo, *stream(*TEXT[3:]), echo]).emitted == GOOD
    assert play([*stream(*TEXT[:5]), echo, *stream(*TEXT[5:])]).emitted == GOOD


def test_assistant_events_of_another_message_are_left_out_while_one_is_streamed() -> None:
    other = plain(text("no"), id="msg_2")
    for at in range(1, len(TEXT)):
        assert play([*stream(*TEXT[:at]), other, *stream(*TEXT[at:])]).emitted == GOOD


def test_the_echo_of_an_agents_message_may_come_after_it() -> None:
    echo = plain(text("Hi"))
    message = checked(play([*BEFORE, echo, *AFTER], agent=True))
    assert message["content"] == [text("Hi"), text(" there")]


def test_an_agent_may_go_on_without_streaming() -> None:
    use = {**CALL, "name": "Read"}
    first = [plain(text("Hi"), stop_reason="tool_use"), plain(use, stop_reason="tool_use")]
    second = [plain(text(" there"), id="msg_2", stop_reason="end_turn"), DONE]
    for events in ([*first, *second], [*BEFORE, *second], [*first, *AFTER]):
        message = checked(play(events, agent=True))
        assert message["content"] == [text("Hi"), text(" there")]
        assert message["stop_reason"] == "end_turn"


def test_a_plain_answer_of_another_message_does_not_mix_with_the_first() -> None:
    other = plain(text("no"), id="msg_2")
    message = checked(play([plain(text("Hi")), other, DONE]))
    assert message["content"] == [text("Hi")]


def test_synthetic_assistant_events_never_become_an_answer() -> None:
    synthetic = plain(text("Not logged in"), model="<synthetic>")
    whole = [*stream(*TEXT[:4]), synthetic, *stream(*TEXT[4:]), synthetic, DONE]
    for events in ([synthetic, DONE], whole):
        assert "Not logged in" not in str(play(events).sent)
    assert play([synthetic, DONE]).emitted == []
    recorded = [
        event for turn in TURNS.values() for event in turn.events if event["type"] == "assistant"
    ]
    recorded = [event for event in recorded if event["message"]["model"] == "<synthetic>"]
    assert recorded
    assert all(play([event, DONE]).emitted == [] for event in recorded)
