"""The rules of translate.py, with plain values: recordings of both CLIs, tables, and mutations of what is valid."""

import base64
import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import assemble, request_body
from grammar import check_stream
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import translate
from translate import ApiError, Translator, cli_error, decode, extend, frame, parse_request, result_error, usage

Json = dict[str, Any]

FIXTURES = Path(__file__).parent / "fixtures"
QUICK = {
    "derandomize": True,
    "report_multiple_bugs": False,
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


def recording(path: Path) -> list[list[Json]]:
    """The events of each turn; a turn ends at its `result`, which a `result` of no turns (a history line's) is not."""
    rows = [json.loads(row) for row in path.read_text().rstrip("\n").split("\n")]
    events = [event for row in rows if row["dir"] == "out" for event in decode(json.dumps(row["line"]).encode())]
    turns: list[list[Json]] = [[]]
    for event in events:
        turns[-1].append(event)
        if event["type"] == "result" and event["num_turns"]:
            turns.append([])
    return turns[:-1] or turns


RECORDINGS = {f"{path.parent.name}/{path.stem}": recording(path) for path in sorted(FIXTURES.glob("*/*.ndjson"))}
TURNS = {f"{name}/{number}": turn for name, turns in RECORDINGS.items() for number, turn in enumerate(turns)}
every_turn = pytest.mark.parametrize("turn", TURNS.values(), ids=TURNS.keys())


@dataclass
class Played:
    translator: Translator
    emitted: list[Json]
    error: ApiError | None

    @property
    def sent(self) -> list[Json]:
        """What a client gets, through the wire's bytes; they are made after the last event of one read came in."""
        return [json.loads(frame(event).split(b"\n")[1].removeprefix(b"data: ")) for event in self.ended]

    @property
    def ended(self) -> list[Json]:
        return [*self.emitted, self.error.body("req_1")] if self.error else self.emitted


SERVED = ("get_weather", "weather")  # the client's tools


def play(events: list[Json]) -> Played:
    """What sessions.Turn.events makes of them.  All come in one read, so that some follow the end of the answer."""
    played = Played(Translator(SERVED), [], None)
    try:
        for event in events:
            played.emitted += played.translator.feed(event)
        if not played.translator.done:
            raise cli_error("the claude CLI closed its output")
    except ApiError as error:
        played.error = error
    return played


def bare(value: Any) -> Any:
    """Without keys that hold null: the SDK's models have more of those."""
    if isinstance(value, dict):
        return {key: bare(inner) for key, inner in value.items() if inner is not None}
    return [bare(inner) for inner in value] if isinstance(value, list) else value


def stream(*events: Json) -> list[Json]:
    return [{"type": "stream_event", "event": event, "parent_tool_use_id": None} for event in events]


def start(**fields: Any) -> Json:
    counts = {"input_tokens": 10, "output_tokens": 1}
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": [], "usage": counts}
    return {"type": "message_start", "message": {**message, "stop_reason": None, "stop_sequence": None, **fields}}


def opened(index: int = 0, **block: Any) -> Json:
    return {"type": "content_block_start", "index": index, "content_block": {"type": "text", "text": "", **block}}


def piece(index: int = 0, **delta: Any) -> Json:
    return {"type": "content_block_delta", "index": index, "delta": {"type": "text_delta", "text": "Hi", **delta}}


def closed(index: int = 0) -> Json:
    return {"type": "content_block_stop", "index": index}


def finish(reason: str | None = "end_turn", **fields: Any) -> Json:
    delta = {"stop_reason": reason, "stop_sequence": None, **fields}
    return {"type": "message_delta", "delta": delta, "usage": {"output_tokens": 17}}


STOP: Json = {"type": "message_stop"}
TEXT = (start(), opened(), piece(), closed(), finish(), STOP)
CALL: Json = {"type": "tool_use", "id": "toolu_1", "name": "mcp__client__weather", "input": {}}
DONE: Json = {"type": "result", "subtype": "success", "is_error": False, "num_turns": 1, "result": "Hi"}


# ---------------------------------------------------------------- the grammar that the rest relies on

GOOD_STREAM = play(stream(*TEXT)).emitted
CALL_STREAM = [
    *(start(), opened(), closed(), {**opened(1), "content_block": {**CALL, "name": "n"}}),
    *(piece(1, type="input_json_delta", partial_json="{}"), closed(1), finish("tool_use"), STOP),
]
del CALL_STREAM[4]["delta"]["text"]
ERROR_EVENT: Json = {"type": "error", "error": {"type": "api_error", "message": "m"}, "request_id": "r"}
NOT_A_STREAM: dict[str, list[Json]] = {
    "empty": [],
    "no message_start": GOOD_STREAM[1:],
    "two message_starts": GOOD_STREAM[:1] + GOOD_STREAM,
    "no message_stop": GOOD_STREAM[:-1],
    "no message_delta": [*GOOD_STREAM[:-2], STOP],
    "after message_stop": [*GOOD_STREAM, STOP],
    "ping after message_stop": [*GOOD_STREAM, {"type": "ping"}],
    "error after message_stop": [*GOOD_STREAM, ERROR_EVENT],
    "after an error": [*GOOD_STREAM[:2], ERROR_EVENT, *GOOD_STREAM[2:]],
    "error without text": [{**ERROR_EVENT, "error": {"type": "api_error", "message": ""}}],
    "unknown event": [{"type": "new"}, *GOOD_STREAM],
    "extra key": [{"type": "ping", "x": 1}, *GOOD_STREAM],
    "block not closed": GOOD_STREAM[:3] + GOOD_STREAM[4:],
    "block not opened": GOOD_STREAM[:1] + GOOD_STREAM[2:],
    "second block inside the first": [*GOOD_STREAM[:2], opened(1), *GOOD_STREAM[2:]],
    "index gap": [start(), opened(1), closed(1), finish(), STOP],
    "index from before": [start(), opened(), closed(), opened(), closed(), finish(), STOP],
    "wrong index of a delta": [start(), opened(), piece(1), closed(), finish(), STOP],
    "block after message_delta": [*GOOD_STREAM[:-1], opened(1), closed(1), STOP],
    "text at the start": [start(), opened(text="Hi"), closed(), finish(), STOP],
    "text of null": [start(), opened(text=None), closed(), finish(), STOP],
    "citations of null": [start(), opened(citations=None), closed(), finish(), STOP],
    "unknown block": [start(), opened(type="new"), closed(), finish(), STOP],
    "thinking without signature": [start(), opened(type="thinking", thinking=""), closed(), finish(), STOP],
    "other block's delta": [start(), opened(), piece(type="thinking_delta", thinking=""), closed(), finish(), STOP],
    "delta without text": [start(), opened(), piece(text=5), closed(), finish(), STOP],
    "input at the start": [start(), opened(**CALL | {"input": {"a": 1}}), closed(), finish(), STOP],
    "input is a list": [
        *CALL_STREAM[:4],
        {**CALL_STREAM[4], "delta": {"type": "input_json_delta", "partial_json": "[]"}},
        *CALL_STREAM[5:],
    ],
    "input is half": [
        *CALL_STREAM[:4],
        {**CALL_STREAM[4], "delta": {"type": "input_json_delta", "partial_json": "{"}},
        *CALL_STREAM[5:],
    ],
    "no usage": [start(usage=None), *GOOD_STREAM[1:]],
    "usage without input": [start(usage={"output_tokens": 1}), *GOOD_STREAM[1:]],
    "null count": [start(usage={**usage({}), "cache_read_input_tokens": None}), *GOOD_STREAM[1:]],
    "output_tokens go down": [start(usage={"input_tokens": 1, "output_tokens": 99}), *GOOD_STREAM[1:]],
    "content at the start": [start(content=[{"type": "text", "text": "Hi"}]), *GOOD_STREAM[1:]],
    "stop_reason at the start": [start(stop_reason="end_turn"), *GOOD_STREAM[1:]],
    "no model": [start(model=""), *GOOD_STREAM[1:]],
    "null key": [start(container=None), *GOOD_STREAM[1:]],
    "no stop_reason": [*GOOD_STREAM[:-2], finish(None), STOP],
    "sequence of another reason": [*GOOD_STREAM[:-2], finish(stop_sequence="END"), STOP],
}


@pytest.mark.parametrize("events", NOT_A_STREAM.values(), ids=NOT_A_STREAM.keys())
def test_the_grammar_refuses(events: list[Json]) -> None:
    with pytest.raises(AssertionError):
        check_stream(events)


def test_the_grammar_takes_pings_anywhere_and_an_error_as_the_end() -> None:
    ping = {"type": "ping"}
    assert (
        check_stream([event for pair in GOOD_STREAM for event in (ping, pair)])["message"]["stop_reason"] == "end_turn"
    )
    for length in range(len(GOOD_STREAM)):
        assert check_stream([*GOOD_STREAM[:length], ERROR_EVENT]) == {"message": None, "error": ERROR_EVENT}
    assert check_stream(CALL_STREAM)["message"]["content"][1]["input"] == {}


# ---------------------------------------------------------------- recordings

HELLO = ("end_turn", "hello'. History has ", ["text"])
CALLS = ("tool_use", "Let me use it.", ["text", "tool_use"])
# Scenario -> the end of each turn: (stop_reason, what is in the text, block types) or (status, type, words of the
# message).  Tools that are not the client's make one answer of several API messages.
ENDS: dict[str, list[tuple[Any, ...]]] = {
    "text": [HELLO],
    "two_turns": [HELLO, ("end_turn", "'and again'. History has ", ["text"])],
    "unicode": [("end_turn", "héllo ✓ 🎉 \u2028 \x00 日本語 ", ["text"])],
    "thinking": [("end_turn", "thought about it", ["thinking", "text"])],
    "turn_settings": [HELLO],
    "history_replay": [("end_turn", "'thanks'. History has 5 messages.", ["text"])],
    "retry_then_success": [("end_turn", "RETRYONCE'. History has ", ["text"])],
    "not_streamed": [("end_turn", "'NOSTREAM'. History has ", ["text"])],
    "empty": [("end_turn", "", [])],
    "max_tokens": [("max_tokens", "cut sho", ["text"])],
    "refusal": [("refusal", "", ["text"])],
    "client_tool": [CALLS],
    "client_tools_parallel": [("tool_use", "Let me use it.", ["text", "tool_use", "tool_use"])],
    "builtin_tool": [("end_turn", "Tool said: ", ["text", "text"])],
    "subagent": [("end_turn", "Tool said: ", ["text", "text"])],
    "error_400_prompt_too_long": [(400, "invalid_request_error", "Prompt is too long · the request is ~250000 tokens")],
    "error_401": [(401, "authentication_error", "Invalid API key")],
    "error_429": [(429, "rate_limit_error", "API Error: Request rejected (429) · slow down")],
    "error_529": [(529, "overloaded_error", "API Error: 529 Overloaded.")],
    "not_logged_in": [(401, "authentication_error", "Not logged in · Please run /login")],
    "2.1.197/mid_stream_error": [(529, "overloaded_error", "API Error: Overloaded")],
    "2.1.330/mid_stream_error": [(502, "api_error", "The API ended the answer before it was complete.")],
    "2.1.197/interrupt": [(502, "claude_cli_error", "[ede_diagnostic]")],
    "2.1.330/interrupt": [(502, "api_error", "The API ended the answer before it was complete.")],
    # No model was asked in these.
    "context_usage": [(502, "claude_cli_error", "the claude CLI closed its output")],
    "slash_command_unescaped": [(502, "claude_cli_error", "the claude CLI closed its output")],
}


@every_turn
def test_every_recorded_turn_is_a_stream_of_the_grammar(turn: list[Json]) -> None:
    played = play(turn)
    assert check_stream(played.sent)["message"] == (played.translator.message if played.translator.done else None)
    assert played.translator.done == (played.error is None)


@pytest.mark.parametrize("name", RECORDINGS)
def test_every_recorded_turn_ends_as_its_scenario_says(name: str) -> None:
    ends = ENDS.get(name) or ENDS[name.partition("/")[2]]
    assert len(RECORDINGS[name]) == len(ends)
    for turn, expected in zip(RECORDINGS[name], ends, strict=True):
        played = play(turn)
        if played.error:
            assert (played.error.status, played.error.kind) == expected[:2]
            assert played.error.message.startswith(expected[2])
            continue
        message = played.translator.message
        text = "".join(block.get("text", "") for block in message["content"])
        assert (message["stop_reason"], [block["type"] for block in message["content"]]) == (expected[0], expected[2])
        assert expected[1] in text
        assert bool(text) == bool(expected[1])
        counts = {
            "input_tokens": 10,
            "cache_creation_input_tokens": 3,
            "cache_read_input_tokens": 5,
            "output_tokens": 17,
        }
        rounds = 2 if expected[0] == "end_turn" and len(expected[2]) == 2 and "Tool said" in text else 1
        assert {key: message["usage"].get(key) for key in counts} == {k: rounds * v for k, v in counts.items()}


@every_turn
def test_the_json_answer_is_what_a_client_assembles(turn: list[Json]) -> None:
    played = play(turn)
    if played.translator.done:
        assert (
            bare(played.translator.message) == bare(assemble(played.sent)) == bare(check_stream(played.sent)["message"])
        )


@every_turn
def test_the_conversation_with_its_answer_has_the_fingerprint_of_the_clients_next_request(turn: list[Json]) -> None:
    played = play(turn)
    if not played.translator.rests:
        return
    question = {"role": "user", "content": [{"type": "text", "text": "hello"}]}
    answer = assemble(played.sent)
    calls = [block["id"] for block in answer["content"] if block["type"] == "tool_use"]
    results = [{"type": "tool_result", "tool_use_id": call, "content": "x"} for call in calls]
    last = {"role": "user", "content": results or "go on"}
    history = parsed(["hello", {"role": "assistant", "content": answer["content"]}, last]).messages[:-1]
    assert extend(b"", [question, played.translator.message]) == extend(b"", history)


@every_turn
def test_a_turn_rests_only_after_a_visible_text_that_the_model_ended_or_a_clients_tool(turn: list[Json]) -> None:
    played = play(turn)
    if played.translator.done:
        visible = any(block.get("text") for block in played.translator.message["content"])
        ended = played.translator.stop_reason == "end_turn"
        assert played.translator.rests == ((visible and ended) or played.translator.stop_reason == "tool_use")


def test_the_thinking_of_an_answer_comes_whole_with_its_signature() -> None:
    for version in ("2.1.197", "2.1.330"):
        message = play(TURNS[f"{version}/thinking/0"]).translator.message
        assert message["content"][0] == {"type": "thinking", "thinking": "hmm...", "signature": "c2ln"}


def test_client_tools_lose_the_prefix_of_their_server() -> None:
    for version in ("2.1.197", "2.1.330"):
        message = play(TURNS[f"{version}/client_tool/0"]).translator.message
        call = message["content"][1]
        assert (call["name"], call["input"]) == ("get_weather", {"city": "Paris"})


# ---------------------------------------------------------------- events

REST = {"end_turn": True, "stop_sequence": True, "max_tokens": False, "refusal": False, "new": False}


def test_calls_of_tools_that_are_not_the_clients_are_left_out_and_the_answer_goes_on() -> None:
    other = opened(1, type="tool_use", id="toolu_1", name="Bash", input={})
    first = [start(), opened(), piece(), closed(), other, closed(1), finish("tool_use"), {"type": "message_stop"}]
    translator = Translator(SERVED)
    events = [event for line in stream(*first) for event in translator.feed(line)]
    assert (translator.working, translator.done) == (True, False)
    second = [start(id="msg_2"), opened(), piece(text=" there"), closed(), finish(), {"type": "message_stop"}]
    events += [event for line in stream(*second) for event in translator.feed(line)]
    message = check_stream(events)["message"]
    assert [block["text"] for block in message["content"]] == ["Hi", " there"]
    assert (message["id"], message["stop_reason"], message["usage"]["input_tokens"]) == ("msg_1", "end_turn", 20)


def test_an_answer_that_calls_a_client_tool_rests() -> None:
    call = opened(0, type="tool_use", id="toolu_1", name="mcp__client__weather", input={})
    played = play(stream(start(), call, closed(), finish("tool_use"), {"type": "message_stop"}))
    assert (played.translator.rests, played.translator.done) == (True, True)


@pytest.mark.parametrize("reason", REST)
def test_the_answer_ends_at_its_stop_reason_unless_the_cli_rests_there(reason: str) -> None:
    translator = Translator()
    for event in stream(start(), opened(), piece(), closed()):
        translator.feed(event)
    kinds = [event["type"] for event in translator.feed(*stream(finish(reason)))]
    assert kinds == (["message_delta"] if REST[reason] else ["message_delta", "message_stop"])
    assert (translator.rests, translator.done) == (REST[reason], not REST[reason])


def block(kind: str, *deltas: Json, **fields: Any) -> list[Json]:
    events: list[Json] = [{"type": "content_block_start", "index": 0, "content_block": {"type": kind, **fields}}]
    events += [{"type": "content_block_delta", "index": 0, "delta": delta} for delta in deltas]
    return [*events, closed()]


WEATHER = {"id": "toolu_1", "name": "mcp__client__weather", "input": {}}
INPUT = [{"type": "input_json_delta", "partial_json": part} for part in ("", '{"city": "Pa', 'ris"}')]
TEXTS = [{"type": "text_delta", "text": part} for part in ("Hi", "", " there")]
CITED = {"type": "citations_delta", "citation": {"type": "char_location", "cited_text": "x"}}
THOUGHTS = [{"type": "thinking_delta", "thinking": "hm"}, {"type": "signature_delta", "signature": "c2ln"}]
TABLE: dict[str, list[Json]] = {
    "text": block("text", *TEXTS, text=""),
    "text with citations": block("text", *TEXTS, CITED, text=""),
    "thinking": block("thinking", *THOUGHTS, thinking="", signature=""),
    "empty thinking": block("thinking", thinking="", signature=""),
    "redacted_thinking": block("redacted_thinking", data="eHh4"),
    "tool_use": block("tool_use", *INPUT, **WEATHER),
    "tool_use without input": block("tool_use", **WEATHER),
    "nothing": [],
}
STOPS = ("end_turn", "max_tokens", "stop_sequence", "tool_use", "pause_turn", "refusal", "new")


@pytest.mark.parametrize("reason", STOPS)
@pytest.mark.parametrize("blocks", TABLE.values(), ids=TABLE.keys())
def test_streamed_and_not_are_the_same_for_every_block_and_stop_reason(blocks: list[Json], reason: str) -> None:
    calls = any(event.get("content_block", {}).get("type") == "tool_use" for event in blocks)
    if reason == "tool_use" and not calls:
        return  # no client tool was called: the answer goes on
    played = play(stream(start(), *blocks, finish(reason), {"type": "message_stop"}))
    message = check_stream(played.sent)["message"]
    assert message["stop_reason"] == reason
    assert len(message["content"]) == bool(blocks)
    assert bare(played.translator.message) == bare(assemble(played.sent)) == bare(message)


@pytest.mark.parametrize("events", [(), (opened(), closed()), (opened(type="thinking"), closed())])
def test_an_answer_without_a_visible_text_is_complete_and_does_not_rest(events: tuple[Json, ...]) -> None:
    played = play(stream(start(), *events, finish()))
    assert played.translator.done
    assert not played.translator.rests
    check_stream(played.sent)


def test_a_message_stop_that_got_lost_comes_with_the_result_even_if_that_is_an_error() -> None:
    for failed in (False, True):
        played = play([*stream(*TEXT[:-1]), {**DONE, "is_error": failed}])
        assert check_stream(played.sent)["message"] == played.translator.message


LATE: dict[str, Json] = {
    "result": DONE,
    "failed result": {**DONE, "is_error": True, "api_error_status": 500},
    "assistant": {"type": "assistant", "message": {**start(id="msg_2")["message"], "content": [{"type": "text"}]}},
    "message_start": stream(start(id="msg_2"))[0],
    "stream error": stream({"type": "error", "error": {"type": "api_error", "message": "no"}})[0],
    "refused control request": {"type": "control_response", "response": {"subtype": "error", "error": "no"}},
    "api_retry": {"type": "system", "subtype": "api_retry", "retry_delay_ms": 5},
    "rate limit": {"type": "rate_limit_event", "rate_limit_info": {"status": "rejected", "resetsAt": 5}},
}


@pytest.mark.parametrize("event", LATE.values(), ids=LATE.keys())
def test_nothing_follows_message_stop(event: Json) -> None:
    played = play([*stream(*TEXT), event])
    assert not played.error
    assert played.emitted == GOOD_STREAM


def test_the_result_that_follows_the_answer_is_kept() -> None:
    assert play([*stream(*TEXT), DONE]).translator.result == DONE
    assert not play(stream(*TEXT)).translator.result


def test_frames_of_subagents_are_left_out() -> None:
    inner = stream(start(id="msg_2"), opened(), piece(text="no"), closed(), finish(), STOP)
    inner.append({"type": "assistant", "message": {**start(id="msg_3")["message"], "content": [text("no")]}})
    inner = [{**event, "parent_tool_use_id": "toolu_1"} for event in inner]
    assert play([*inner, DONE]).emitted == []
    assert play([*inner, *stream(*TEXT[:3]), *inner, *stream(*TEXT[3:])]).emitted == GOOD_STREAM


def test_a_result_before_the_answer_is_not_the_turns() -> None:
    played = play([{**DONE, "num_turns": 0}, *stream(*TEXT), DONE])
    assert played.emitted == GOOD_STREAM
    assert played.translator.result == DONE


BROKEN = {
    "second message": (*TEXT[:4], start(id="msg_2")),
    "same message twice": (TEXT[0], *TEXT),
    "block in a block": (*TEXT[:2], opened(1)),
    "piece of no block": (TEXT[0], piece()),
    "piece of another block": (*TEXT[:2], piece(1)),
    "end of no block": (TEXT[0], closed()),
    "end inside a block": (*TEXT[:3], finish()),
    "block after the end": (*TEXT[:5], opened(1)),
    "no stop_reason": (*TEXT[:4], STOP),
    "no message": (start(id=None),),
    "piece without text": (*TEXT[:2], piece(text=None)),
    "input that is not JSON": (TEXT[0], opened(**CALL), piece(type="input_json_delta", partial_json="{"), closed()),
    "error": (*TEXT[:3], {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}),
}


@pytest.mark.parametrize("events", BROKEN.values(), ids=BROKEN.keys())
def test_an_answer_out_of_order_ends_in_an_error(events: tuple[Json, ...]) -> None:
    played = play([*stream(*events), *stream(STOP), DONE])
    assert played.error
    assert check_stream(played.sent)["error"]


def test_an_error_in_the_stream_keeps_its_type_and_text() -> None:
    error = play(stream(*BROKEN["error"])).error
    assert error
    assert (error.status, error.kind, error.message) == (502, "overloaded_error", "Overloaded")


def test_blocks_and_deltas_that_clients_do_not_know_are_left_out_and_the_rest_renumbered() -> None:
    unknown = (opened(0, type="server_tool_use", id="x"), piece(0), closed(0))
    known = (opened(1), piece(1, type="new_delta"), piece(1), closed(1))
    played = play(stream(start(), *unknown, *known, *TEXT[4:]))
    assert played.emitted == GOOD_STREAM


def test_null_keys_are_left_out() -> None:
    message = start(container=None, diagnostics=None, usage={"input_tokens": 10, "output_tokens": 1, "speed": None})
    played = play(stream(message, opened(citations=None), *TEXT[2:]))
    assert bare(played.sent) == bare(GOOD_STREAM)
    check_stream(played.sent)


@pytest.mark.parametrize("at_start", [{}, {"citations": []}])
def test_citations_come_once(at_start: Json) -> None:
    citation = {"type": "char_location", "cited_text": "x", "document_index": 0, "document_title": None}
    cited = {"type": "content_block_delta", "index": 0, "delta": {"type": "citations_delta", "citation": citation}}
    played = play(stream(start(), opened(**at_start), cited, piece(), cited, *TEXT[3:]))
    message = check_stream(played.sent)["message"]
    assert message["content"] == [{"type": "text", "text": "Hi", "citations": [citation, citation]}]
    assert played.translator.message == message


def test_counts_of_the_end_replace_those_of_the_start_and_never_go_down() -> None:
    final = {
        **finish(),
        "usage": {"input_tokens": 12, "output_tokens": 0, "cache_read_input_tokens": 7, "speed": "fast"},
    }
    first = {"input_tokens": 10, "output_tokens": 3, "cache_creation_input_tokens": 2}
    played = play(stream(start(usage=first), *TEXT[1:4], final, STOP))
    assert played.emitted[-2]["usage"] == {"input_tokens": 12, "output_tokens": 3, "cache_read_input_tokens": 7}
    merged = {**first, "input_tokens": 12, "cache_read_input_tokens": 7}
    assert check_stream(played.sent)["message"]["usage"] == played.translator.message["usage"] == merged


def test_counts_that_the_end_leaves_open_are_those_of_the_start() -> None:
    for final in ({"output_tokens": 17}, {"output_tokens": 17, "input_tokens": None}, {}, None):
        played = play(stream(*TEXT[:4], {**finish(), "usage": final}, STOP))
        counts = {"input_tokens": 10, "output_tokens": 17 if final else 1}
        assert check_stream(played.sent)["message"]["usage"] == played.translator.message["usage"] == counts


@pytest.mark.parametrize("version", ["2.1.197", "2.1.330"])
def test_stop_details_of_a_refusal_arrive(version: str) -> None:
    details = {"type": "refusal", "category": "cyber", "explanation": None}
    turn = copy.deepcopy(TURNS[f"{version}/refusal/0"])
    ends = [e["event"]["delta"] for e in turn if e["type"] == "stream_event" and "delta" in e["event"]]
    ends = [delta for delta in ends if "stop_reason" in delta]
    ends[0]["stop_details"] = details
    played = play(turn)
    assert played.emitted[-2]["delta"]["stop_details"] == details
    assert bare(played.translator.message) == bare(assemble(played.sent))


def test_a_stop_sequence_is_named_only_when_it_stopped_the_answer() -> None:
    for reason, named in (("stop_sequence", "END"), ("end_turn", None)):
        message = play(stream(*TEXT[:4], finish(reason, stop_sequence="END"), STOP)).translator.message
        assert message["stop_sequence"] == named


def test_a_refused_control_request_fails_the_turn() -> None:
    error = play([LATE["refused control request"]]).error
    assert error
    assert (error.status, error.kind) == (502, "claude_cli_error")


# What the CLI may print though no recording shows it: (name, events).  Each ends in a message or an ApiError.
ODD: dict[str, list[Json]] = {
    "block type is a list": stream(start(), opened(type=[]), closed(), finish(), STOP),
    "plain block type is an object": [
        {"type": "assistant", "message": {**start()["message"], "content": [{"type": {}}]}}
    ],
    "text at the start is a number": stream(start(), opened(text=5), closed(), finish(), STOP),
    "signature at the start is a number": stream(
        start(), opened(type="thinking", signature=5), closed(), finish(), STOP
    ),
    "citations are a text": stream(
        start(), opened(citations="x"), piece(type="citations_delta", citation={}), closed()
    ),
    "citation of null": stream(
        start(), opened(), piece(type="citations_delta", citation=None), closed(), finish(), STOP
    ),
    "delta of no block and no index": stream(*TEXT[:4], {**piece(), "index": None}, *TEXT[4:]),
    "delta after the end, no index": stream(*TEXT[:5], {**piece(), "index": None}, STOP),
    "input is a list": stream(start(), opened(**CALL), piece(type="input_json_delta", partial_json="[1]"), closed())
    + stream(finish("tool_use")),
    "plain input of null": [
        {"type": "assistant", "message": {**start()["message"], "content": [{**CALL, "input": None}]}},
        DONE,
    ],
    "plain input of 300 levels": [
        {
            "type": "assistant",
            "message": {
                **start()["message"],
                "content": [{**CALL, "input": json.loads('{"a":' * 300 + "1" + "}" * 300)}],
            },
        },
        DONE,
    ],
    "input of 300 levels": [
        *stream(start(), opened(**CALL), piece(type="input_json_delta", partial_json='{"a":' * 300 + "1" + "}" * 300)),
        *stream(closed(), finish("tool_use")),
    ],
    "tool without id": stream(start(), opened(**{**CALL, "id": None}), closed(), finish("tool_use")),
    "redacted thinking without data": stream(start(), opened(type="redacted_thinking"), closed(), finish()),
    "role of a user": stream(start(role="user"), *TEXT[1:]),
    "type of another": stream(start(type="x"), *TEXT[1:]),
    "model is a number": stream(start(model=5), *TEXT[1:]),
    "model of null": stream(start(model=None), *TEXT[1:]),
    "empty id": stream(start(id=""), *TEXT[1:]),
    "counts are texts": stream(start(usage={"input_tokens": "1", "cache_read_input_tokens": "1"}), *TEXT[1:]),
    "counts are negative": stream(start(usage={"input_tokens": -1, "output_tokens": -1}), *TEXT[1:]),
    "counts are booleans": stream(start(usage={"input_tokens": True}), *TEXT[1:]),
    "cache_creation of nulls": stream(start(usage={"cache_creation": {"ephemeral_5m_input_tokens": None}}), *TEXT[1:]),
    "empty stop_reason": stream(*TEXT[:4], finish(""), STOP),
    "stop_sequence is a number": stream(*TEXT[:4], finish("stop_sequence", stop_sequence=5), STOP),
    "error type is null": stream({"type": "error", "error": {"type": None, "message": ""}}),
    "error is null": stream({"type": "error", "error": None}),
    "half a surrogate pair": [*decode(json.dumps(stream(*TEXT)[2] | {"event": piece(text="\ud83d")}).encode())],
    "result of numbers": [{**DONE, "is_error": True, "result": 5, "errors": 5, "api_error_status": True}],
    "result of an empty text": [{**DONE, "is_error": True, "result": "", "errors": []}],
    "result of blank text": [{**DONE, "is_error": True, "result": None, "errors": [""]}],
}
ODD["half a surrogate pair"] = [*stream(*TEXT[:2]), *ODD["half a surrogate pair"], *stream(*TEXT[3:])]


@pytest.mark.parametrize("events", ODD.values(), ids=ODD.keys())
def test_whatever_the_cli_prints_a_client_gets_a_stream_of_the_grammar(events: list[Json]) -> None:
    played = play(events)
    message = check_stream(played.sent)["message"]
    assert message == (played.translator.message if played.translator.done else None)
    if message:
        assert bare(assemble(played.sent)) == bare(message)
        extend(b"", [played.translator.message])


# ---------------------------------------------------------------- answers that were not streamed


def plain(*blocks: Json, **fields: Any) -> Json:
    """An `assistant` event; without stream events the CLI prints one a block (it asked again without streaming)."""
    used = {"input_tokens": 10, "output_tokens": 17, "cache_creation_input_tokens": 3, "cache_read_input_tokens": 5}
    message = {**start()["message"], "usage": {**used, "service_tier": "standard"}, "context_management": None}
    return {"type": "assistant", "message": {**message, "content": list(blocks), **fields}, "parent_tool_use_id": None}


PLAIN_BLOCKS = [
    {"type": "thinking", "thinking": "hmm", "signature": "c2ln"},
    {"type": "redacted_thinking", "data": "xyz"},
    {"type": "text", "text": "Let me see.", "citations": None},
    {"type": "server_tool_use", "id": "x", "name": "y", "input": {}},
    {**CALL, "input": {"city": "Paris"}, "caller": None},
]


def test_an_answer_that_was_not_streamed_becomes_a_whole_stream() -> None:
    used = {"input_tokens": 10, "output_tokens": 17, "cache_creation_input_tokens": 3, "cache_read_input_tokens": 5}
    result = {**DONE, "stop_reason": "tool_use", "usage": {**used, "server_tool_use": {"web_search_requests": 0}}}
    played = play([*map(plain, PLAIN_BLOCKS), result])
    message = check_stream(played.sent)["message"]
    assert message["content"] == [
        *PLAIN_BLOCKS[:2],
        {"type": "text", "text": "Let me see."},
        {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Paris"}},
    ]
    assert (message["stop_reason"], message["usage"]) == ("tool_use", {**used, "service_tier": "standard"})
    assert bare(assemble(played.sent)) == bare(message) == bare(played.translator.message)


def test_the_counts_of_a_plain_answer_are_the_same_streamed_and_not() -> None:
    """result.usage of 2.1.330 has a cache_creation, which accumulators do not take over from message_delta."""
    creation = {"ephemeral_1h_input_tokens": 0, "ephemeral_5m_input_tokens": 3}
    result = {**DONE, "usage": {"input_tokens": 10, "output_tokens": 17, "cache_creation": creation}}
    played = play([plain({"type": "text", "text": "Hi"}), result])
    assert bare(assemble(played.sent)) == bare(played.translator.message)


def test_a_plain_answer_keeps_its_own_counts_and_stop_reason() -> None:
    """2.1.197 writes zeros into result.usage there (recording not_streamed); both add up what the CLI went on to do."""
    message = plain({"type": "text", "text": "Hi"}, stop_reason="max_tokens")
    for counts in ({"input_tokens": 0, "output_tokens": 0}, {"input_tokens": 99, "output_tokens": 99}):
        played = play([message, {**DONE, "stop_reason": "end_turn", "usage": counts}])
        assembled = check_stream(played.sent)["message"]
        assert (assembled["usage"]["input_tokens"], assembled["usage"]["output_tokens"]) == (10, 17)
        assert (assembled["stop_reason"], played.translator.rests) == ("max_tokens", False)


def test_a_plain_answer_ends_with_end_turn_when_the_result_names_no_reason() -> None:
    message = play([plain({"type": "text", "text": "Hi"}), DONE]).translator.message
    assert (message["stop_reason"], message["content"]) == ("end_turn", [{"type": "text", "text": "Hi"}])


def test_a_plain_answer_whose_turn_failed_is_an_error() -> None:
    failed = {**DONE, "is_error": True, "api_error_status": 529}
    error = play([plain({"type": "text", "text": "Hi"}), failed]).error
    assert error
    assert error.status == 529


def test_assistant_events_repeat_what_was_streamed_and_are_left_out() -> None:
    echo = plain({"type": "text", "text": "Hi"})
    assert play([*stream(*TEXT[:3]), echo, *stream(*TEXT[3:]), echo]).emitted == GOOD_STREAM


def test_a_plain_answer_of_another_message_does_not_mix_with_the_first() -> None:
    other = plain({"type": "text", "text": "no"}, id="msg_2")
    message = play([plain({"type": "text", "text": "Hi"}), other, DONE]).translator.message
    assert message["content"] == [{"type": "text", "text": "Hi"}]


def test_synthetic_assistant_events_never_become_an_answer() -> None:
    synthetic = plain({"type": "text", "text": "Not logged in"}, model="<synthetic>")
    for events in ([synthetic, DONE], [*stream(*TEXT[:4]), synthetic, *stream(*TEXT[4:]), synthetic, DONE]):
        assert "Not logged in" not in str(play(events).sent)
    assert play([synthetic, DONE]).emitted == []
    recorded = [e for turn in TURNS.values() for e in turn if e["type"] == "assistant"]
    recorded = [event for event in recorded if event["message"]["model"] == "<synthetic>"]
    assert recorded
    assert all(play([event, DONE]).emitted == [] for event in recorded)


# ---------------------------------------------------------------- property: any order of any lines

JUNK: list[Any] = [None, 0, -1, 7, 1.5, True, "", "x", "text_delta", [], {}, [None], {"type": None}, {"type": []}, [{}]]
JUNK += ["tool_use", "end_turn", "stop_sequence", 2**63, {"a": {"b": None}}, "\u2028\x00\ud83d"]
NOISE: list[Json] = [
    *LATE.values(),
    *stream(*TEXT, piece(1), opened(1), closed(1), finish("tool_use"), finish(None), {"type": "ping"}, {"type": "new"}),
    *stream(opened(**CALL), piece(type="input_json_delta", partial_json='{"a'), start(id="msg_2")),
    {"type": "keep_alive"},
    {"type": "stream_event", "event": None},
    {"type": None},
    {},
    plain(*PLAIN_BLOCKS),
    plain(*PLAIN_BLOCKS, id="msg_2"),
    plain({"type": "text", "text": "made up"}, model="<synthetic>"),
    {**DONE, "num_turns": 0},
    {**DONE, "stop_reason": "stop_sequence", "usage": None},
]
# Lists of the CLI's commands and models say nothing about a turn, and would draw most of the mutations.
SHORT_TURNS = [[event for event in turn if len(json.dumps(event)) < 3000] for turn in TURNS.values()]
SHORT_TURNS.append([*map(plain, PLAIN_BLOCKS), DONE])
OPERATIONS = st.sampled_from(["drop", "duplicate", "swap", "truncate", "cut off", "rename", "junk", "junk", "noise"])
STEPS = st.lists(st.tuples(OPERATIONS, st.integers(0, 10**6), st.integers(0, 10**6)), min_size=1, max_size=6)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    found: list[tuple[Any, Any]] = []
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        found += [(value, key), *places(value[key])]
    return found


def put(value: Any, number: int, junk: Any, name: str = "") -> None:
    """Replace one of the values in `value`, whichever `number` stands for; with `name`, one under that key."""
    found = [(container, key) for container, key in places(value) if not name or key == name]
    if found:
        container, key = found[number % len(found)]
        container[key] = copy.deepcopy(junk)


def mutate(turn: list[Json], steps: list[tuple[str, int, int]]) -> list[Json]:
    events = copy.deepcopy(turn)
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
    return [read for event in events for read in decode(json.dumps(event).encode())]


@settings(max_examples=1500, **QUICK)
@given(turn=st.sampled_from(SHORT_TURNS), steps=STEPS)
def test_a_mutated_turn_ends_in_a_message_or_an_error_by_the_grammar(turn: list[Json], steps: Any) -> None:
    played = play(mutate(turn, steps))
    message = check_stream(played.sent)["message"]
    assert message == (played.translator.message if played.translator.done else None)


# ---------------------------------------------------------------- lines

LINES = {
    b'{"type":"x"}': [{"type": "x"}],
    b'  {"type":"x"}\r': [{"type": "x"}],
    b'{"a":1}{"b":{"c":2}}{"d":3}': [{"a": 1}, {"b": {"c": 2}}, {"d": 3}],
    b'{"a":1}{"b":': [{"a": 1}],
    b'{"a":1}oops': [{"a": 1}],
    b"": [],
    b" ": [],
    b"Warning: something {odd}": [],
    b'{"type":"stream_ev': [],
    b'ent"}': [],
    b"[1,2]": [],
    b'"text"': [],
    b"17": [],
    b"null": [],
    b"{}": [{}],
    b"\xff\xfe{}": [],
    b'{"a":"\xff"}': [{"a": "\ufffd"}],
}


@pytest.mark.parametrize(("line", "events"), LINES.items(), ids=map(repr, LINES))
def test_a_line_holds_its_json_objects_and_nothing_else(line: bytes, events: list[Json]) -> None:
    assert decode(line) == events


def test_a_line_of_five_megabytes_is_one_event() -> None:
    event = {"type": "user", "data": "x" * (5 << 20)}
    assert decode(json.dumps(event).encode()) == [event]
    assert decode(json.dumps(event).encode() * 2) == [event, event]


@pytest.mark.parametrize("line", [b'{"a":' * 100_000, b"[" * 100_000, b'{"a":1}' + b'{"a":' * 100_000])
def test_a_line_that_is_nested_too_deeply_is_noise(line: bytes) -> None:
    assert decode(line) in ([], [{"a": 1}])


def test_objects_on_one_line_may_stand_apart() -> None:
    assert decode(b'{"a":1} {"b":2}\t{"c":3}') == [{"a": 1}, {"b": 2}, {"c": 3}]


@settings(max_examples=300, **QUICK)
@given(
    st.binary()
    | st.text().map(str.encode)
    | st.lists(st.dictionaries(st.text(), st.integers())).map(json.dumps).map(str.encode)
)
def test_any_bytes_are_a_list_of_objects(line: bytes) -> None:
    assert all(isinstance(event, dict) for event in decode(line))


texts = st.text(st.characters(codec="utf-8") | st.sampled_from("\u2028\u2029\u0085\n\r\x00"))
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
)


@settings(max_examples=300, **QUICK)
@given(JSON_VALUES, texts)
def test_a_frame_is_an_event_line_and_one_data_line_and_comes_back_equal(value: Any, key: str) -> None:
    event = {"type": "content_block_delta", key or "k": value}
    event["type"] = "content_block_delta"
    name, data, *rest = frame(event).decode().splitlines()
    assert (name, rest) == ("event: content_block_delta", [""])
    assert json.loads(data.removeprefix("data: ")) == event


def test_characters_that_split_lines_are_escaped_in_a_frame() -> None:
    text = "a\u2028b\u2029c\u0085d\u00c2é漢😀"
    data = frame({"type": "ping", "t": text})
    assert not any(raw in data.decode() for raw in "\u2028\u2029\u0085")
    assert b"\\u2028b\\u2029c\\u0085d" in data
    assert json.loads(data.split(b"\n")[1][6:])["t"] == text
    assert translate.PING == b'event: ping\ndata: {"type":"ping"}\n\n'


@settings(max_examples=200, **QUICK)
@given(
    st.dictionaries(
        st.sampled_from([*translate.TOKENS, "speed", "iterations", "server_tool_use"]), st.sampled_from(JUNK)
    )
    | st.sampled_from(JUNK)
)
def test_usage_holds_the_known_counts_and_no_null(value: Any) -> None:
    counts = usage(value)
    assert {"input_tokens", "output_tokens"} <= set(counts) <= set(translate.TOKENS)
    message = play(stream(start(usage=value), *TEXT[1:]))
    check_stream(message.sent)


# ---------------------------------------------------------------- failures


def failed(**fields: Any) -> Json:
    return {**DONE, "is_error": True, **fields}


RESULTS = [
    (failed(api_error_status=404, result="model: x"), 404, "not_found_error", "model: x"),
    (failed(api_error_status=500, result="no"), 500, "api_error", "no"),
    (failed(api_error_status=403, result="no"), 403, "permission_error", "no"),
    (failed(api_error_status=None, result="Prompt is too long"), 400, "invalid_request_error", "Prompt is too long"),
    (failed(api_error_status=None, result="other"), 502, "claude_cli_error", "other"),
    (failed(api_error_status=200, result="other"), 502, "claude_cli_error", "other"),
    (failed(api_error_status="429", result="other"), 502, "claude_cli_error", "other"),
    (failed(result=None, errors=["a", "b"]), 502, "claude_cli_error", "a; b"),
    ({"is_error": True}, 502, "claude_cli_error", "the claude CLI ended the turn with an error"),
]


@pytest.mark.parametrize(("result", "status", "kind", "text"), RESULTS)
def test_a_failed_result_keeps_its_status_and_text(result: Json, status: int, kind: str, text: str) -> None:
    error = result_error(result)
    assert (error.status, error.kind, error.message) == (status, kind, text)
    assert error.body("req_1") == {"type": "error", "error": {"type": kind, "message": text}, "request_id": "req_1"}


@pytest.mark.parametrize("version", ["2.1.197", "2.1.330"])
@pytest.mark.parametrize("scenario", ["not_logged_in", "error_401"])
def test_a_missing_login_says_how_to_mend_it_and_is_not_retried(version: str, scenario: str) -> None:
    error = play(TURNS[f"{version}/{scenario}/0"]).error
    assert error
    assert (error.status, error.retry) == (401, False)
    assert "/login" in error.message.partition("not logged in:")[2]


@pytest.mark.parametrize("version", ["2.1.197", "2.1.330"])
def test_a_rejected_rate_limit_says_when_it_ends(version: str) -> None:
    turn = TURNS[f"{version}/error_429/0"]
    infos: list[tuple[Any, float | None]] = [
        ({"status": "rejected", "resetsAt": 1800000000, "rateLimitType": "five_hour"}, 1800000000),
        ({"status": "allowed_warning", "resetsAt": 1800000000}, None),
        ({"status": "rejected", "resetsAt": None}, None),
        ({"status": "rejected"}, None),
        (None, None),
    ]
    for info, resets_at in infos:
        error = play([{"type": "rate_limit_event", "rate_limit_info": info}, *turn]).error
        assert error
        assert (error.status, error.resets_at, error.retry) == (429, resets_at, True)
    limit = {"type": "rate_limit_event", "rate_limit_info": infos[0][0]}
    other = play([limit, *TURNS[f"{version}/error_529/0"]]).error
    assert other
    assert other.resets_at is None


def test_what_a_retry_cannot_mend_is_not_retried() -> None:
    assert {status for status in range(400, 600) if not ApiError(status, "x").retry} == translate.FINAL_STATUSES
    assert all(400 <= status < 500 and status not in (408, 409, 429) for status in translate.FINAL_STATUSES)


# ---------------------------------------------------------------- requests

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
IMAGE: Json = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
USE: Json = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Paris"}}
RESULT: Json = {"type": "tool_result", "tool_use_id": "t1", "content": "sunny"}
UNANSWERED = (
    "`tool_use` ids were found without `tool_result` blocks immediately after: t1. "
    "Each `tool_use` block must have a corresponding `tool_result` block in the next message."
)
ORPHAN = (
    "unexpected `tool_use_id` found in `tool_result` blocks: t1. "
    "Each `tool_result` block must have a corresponding `tool_use` block in the previous message."
)
PREFILL = "This model does not support assistant message prefill. The conversation must end with a user message."
NO_CONTENT = "all messages must have non-empty content except for the optional final assistant message"


def parsed(messages: Any = "hello", /, **fields: Any) -> translate.Request:
    body = {**request_body(messages), **fields}
    return parse_request(json.dumps({name: value for name, value in body.items() if value is not ...}).encode())


def user(*blocks: Any) -> list[Any]:
    return [{"role": "user", "content": list(blocks)}]


def role(name: Any, content: Any = "x") -> Json:
    return {"role": name, "content": content}


# (messages, other fields, the message: exact when it ends with a full stop or a quote, else its beginning)
REFUSED: list[tuple[Any, Json, str]] = [
    ("x", {"model": ...}, "model: Field required"),
    ("x", {"max_tokens": ...}, "max_tokens: Field required"),
    ("x", {"messages": ...}, "messages: Field required"),
    ("x", {"model": None}, "model: Field required"),
    ("x", {"max_tokens": None}, "max_tokens: Field required"),
    ("x", {"messages": None}, "messages: Field required"),
    ("x", {"model": 5}, "model: Input should be a valid string"),
    ("x", {"model": ""}, "model: String should be a model name"),
    ("x", {"model": "--dangerously"}, "model: String should be a model name"),
    ("x", {"model": "claude-cli/-x"}, "model: String should be a model name"),
    ("x", {"model": "claude-cli/"}, "model: String should be a model name"),
    ("x", {"model": "a b"}, "model: String should be a model name"),
    ("x", {"model": "a\n"}, "model: String should be a model name"),
    ("x", {"model": "a" * 300}, "model: String should be a model name"),
    ("x", {"max_tokens": "5"}, "max_tokens: Input should be a valid integer"),
    ("x", {"max_tokens": 5.5}, "max_tokens: Input should be a valid integer"),
    ("x", {"max_tokens": True}, "max_tokens: Input should be a valid integer"),
    ("x", {"max_tokens": -1}, "max_tokens: Input should be greater than or equal to 1"),
    ("x", {"messages": "hello"}, "messages: Input should be a valid list"),
    ("x", {"messages": {}}, "messages: Input should be a valid list"),
    ([], {}, "messages: at least one message is required"),
    ([5], {}, "messages.0: Input should be a valid object"),
    ([{"content": "x"}], {}, "messages.0.role: Field required"),
    ([{"role": "user"}], {}, "messages.0.content: Field required"),
    ([role("tool")], {}, "messages.0.role: Input should be 'user' or 'assistant'"),
    ([role(None)], {}, "messages.0.role: Field required"),
    ([role(5)], {}, "messages.0.role: Input should be a valid string"),
    (["x", role("user", None)], {}, "messages.1.content: Field required"),
    ([role("system"), "x"], {}, 'messages: Unexpected role "system". The Messages API accepts a top-level `system`'),
    (["x", "y", role("system")], {}, "messages.2: role 'system' must follow a user turn, and precede an 'assistant'"),
    (
        [role("user"), role("system"), role("user")],
        {},
        "messages.1: role 'system' must follow a user turn, and precede",
    ),
    ([role("user", "")], {}, f"messages.0: {NO_CONTENT}"),
    (["x", role("assistant", []), role("user")], {}, f"messages.1: {NO_CONTENT}"),
    ([role("user", 5)], {}, "messages.0.content: Input should be a valid list"),
    ([role("user", {})], {}, "messages.0.content: Input should be a valid list"),
    (user({"type": "text", "text": ""}), {}, "messages: text content blocks must be non-empty"),
    (user({"type": "text", "text": " \n"}), {}, "messages: text content blocks must contain non-whitespace text"),
    ([role("user", "\t")], {}, "messages: text content blocks must contain non-whitespace text"),
    (user({"type": "text"}), {}, "messages.0.content.0.text.text: Field required"),
    (user({"type": "text", "text": 5}), {}, "messages.0.content.0.text.text: Input should be a valid string"),
    (user("x"), {}, "messages.0.content.0: Input should be a valid object"),
    (user({"text": "x"}), {}, "messages.0.content.0.type: Field required"),
    (user({"type": "new"}), {}, "messages.0.content.0: Input tag 'new' found using 'type' does not match any of the"),
    (user({"type": []}), {}, "messages.0.content.0: Input tag [] found"),
    (user(USE), {}, "messages.0.content.0: Input tag 'tool_use' found"),
    (
        user({"type": "container_upload", "file_id": "f"}),
        {},
        "messages.0.content.0: Input tag 'container_upload' found",
    ),
    ([role("assistant", [IMAGE]), "x"], {}, "messages.0.content.0: Input tag 'image' found"),
    (user(IMAGE | {"source": None}), {}, "messages.0.content.0.image.source: Field required"),
    (
        user(IMAGE | {"source": {"type": "url", "url": "http://x"}}),
        {},
        "messages.0.content.0.image.source: url sources are",
    ),
    (
        user(IMAGE | {"source": {"type": "file", "file_id": "f"}}),
        {},
        "messages.0.content.0.image.source: file sources are",
    ),
    (
        user(IMAGE | {"source": IMAGE["source"] | {"media_type": "image/bmp"}}),
        {},
        "messages.0.content.0.image.source.base64.media_type: Input should be 'image/jpeg'",
    ),
    (
        user(IMAGE | {"source": IMAGE["source"] | {"data": "?"}}),
        {},
        "messages.0.content.0.image.source.base64.data: Input should be valid base64",
    ),
    (
        user(IMAGE | {"source": IMAGE["source"] | {"data": ""}}),
        {},
        "messages.0.content.0.image.source.base64.data: Input should be valid base64",
    ),
    (
        user({"type": "document", "source": {"type": "url", "url": "x"}}),
        {},
        "messages.0.content.0.document.source: url sources are",
    ),
    (user(RESULT), {}, f"messages.0.content.0: {ORPHAN}"),
    (["x", "y", *user({"type": "text", "text": "a"}, RESULT)], {}, f"messages.2.content.1: {ORPHAN}"),
    (["x", role("assistant", [USE]), "y"], {}, f"messages.2: {UNANSWERED}"),
    (
        ["x", role("assistant", [USE]), *user(RESULT | {"tool_use_id": "t2"})],
        {},
        "messages.2.content.0: unexpected `tool_use_id`",
    ),
    (
        ["x", role("assistant", [USE]), *user(RESULT | {"tool_use_id": 5})],
        {},
        "messages.2.content.0.tool_result.tool_use_id: Input",
    ),
    (
        ["x", role("assistant", [USE]), *user(RESULT | {"is_error": "no"})],
        {},
        "messages.2.content.0.tool_result.is_error: Input",
    ),
    (
        ["x", role("assistant", [USE]), *user(RESULT | {"content": [USE]})],
        {},
        "messages.2.content.0.tool_result.content.0: Input tag",
    ),
    (
        ["x", role("assistant", [USE | {"input": "{}"}]), *user(RESULT)],
        {},
        "messages.1.content.0.tool_use.input: Input should be a valid object",
    ),
    (
        ["x", role("assistant", [{"type": "thinking", "thinking": "x"}]), "y"],
        {},
        "messages.1.content.0.thinking.signature: Field",
    ),
    (["x", "y"], {}, PREFILL),
    (["x", role("assistant", [USE])], {}, PREFILL),
    ("x", {"system": 5}, "system: Input should be a valid list"),
    ("x", {"system": 0}, "system: Input should be a valid list"),
    ("x", {"system": False}, "system: Input should be a valid list"),
    ("x", {"system": {}}, "system: Input should be a valid list"),
    ("x", {"system": [IMAGE]}, "system.0: Input tag 'image' found"),
    ("x", {"system": ["x"]}, "system.0: Input should be a valid object"),
    ("x", {"stream": "yes"}, "stream: Input should be a valid boolean"),
    ("x", {"stream": 1}, "stream: Input should be a valid boolean"),
    ("x", {"temperature": "hot"}, "temperature: Input should be a valid number"),
    ("x", {"temperature": 1.5}, "temperature: range: 0..1"),
    ("x", {"temperature": -0.1}, "temperature: range: 0..1"),
    ("x", {"top_p": 2}, "top_p: range: 0..1"),
    ("x", {"top_k": 1.5}, "top_k: Input should be a valid integer"),
    ("x", {"top_k": -1}, "top_k: Input should be greater than or equal to 0"),
    ("x", {"stop_sequences": "END"}, "stop_sequences: Input should be a valid list"),
    ("x", {"stop_sequences": [5]}, "stop_sequences.0: Input should be a valid string"),
    ("x", {"stop_sequences": [""]}, "stop_sequences: each stop sequence must be non-empty"),
    ("x", {"metadata": "me"}, "metadata: Input should be a valid object"),
    ("x", {"service_tier": "gold"}, "service_tier: Input should be 'auto' or 'standard_only'"),
    ("x", {"thinking": True}, "thinking: Input should be a valid object"),
    ("x", {"thinking": {"type": "on"}}, "thinking: Input tag 'on' found"),
    ("x", {"thinking": {"type": "enabled"}}, "thinking.enabled.budget_tokens: Field required"),
    (
        "x",
        {"thinking": {"type": "enabled", "budget_tokens": 5}},
        "thinking.enabled.budget_tokens: Input should be greater than or equal to 1024",
    ),
    (
        "x",
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        "`max_tokens` must be greater than `thinking.budget_tokens`",
    ),
    ("x", {"output_config": {"effort": "most"}}, "output_config.effort: Input should be 'low' or"),
    ("x", {"output_config": {"format": {"type": "xml"}}}, "output_config.format: Input tag 'xml' found"),
    (
        "x",
        {"output_config": {"format": {"type": "json_schema"}}},
        "output_config.format.json_schema.schema: Field required",
    ),
    ("x", {"tools": "x"}, "tools: Input should be a valid list"),
    ("x", {"tools": [5]}, "tools.0: Input should be a valid object"),
    ("x", {"tool_choice": "auto"}, "tool_choice: Input should be a valid object"),
    ("x", {"mcp_servers": [{"type": "url", "url": "x", "name": "x"}]}, "mcp_servers: "),
    ("x", {"container": {"skills": []}}, "container: "),
    ("x", {"container": "c1"}, "container: "),
    ("x", {"thread": {"type": "create"}}, "thread: "),
]


@pytest.mark.parametrize(("messages", "fields", "words"), REFUSED)
def test_a_request_that_the_api_would_refuse_is_refused_in_its_words(messages: Any, fields: Json, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        parsed(messages, **fields)
    assert (caught.value.status, caught.value.kind, caught.value.retry) == (400, "invalid_request_error", False)
    assert caught.value.message.startswith(words)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1",
        b"\xff",
        b'"\xff"',
        b"{'a': 1}",
        b'{"a": NaN}',
        b'{"a": "\\ud83d"}',
        b"[" * 200000,
    ],
)
def test_a_body_that_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError, match="The request body is not valid JSON: ") as caught:
        parse_request(body)
    assert caught.value.status == 400


def test_depth_and_messages_have_a_limit() -> None:
    def asked(levels: int) -> bytes:
        tool = {"name": "t", "input_schema": json.loads('{"type":"object","a":' * levels + "1" + "}" * levels)}
        return json.dumps(request_body("hi", tools=[tool])).encode()

    assert parse_request(asked(197)).tools  # body, tools, the tool: three levels around the schema
    with pytest.raises(ApiError, match="nested more than 200 levels"):
        parse_request(asked(198))
    with pytest.raises(ApiError, match="nested more than 7 levels"):
        parse_request(asked(5), max_depth=7)
    talk = json.dumps(request_body(["a", "b", "c"])).encode()
    assert len(parse_request(talk, max_messages=3).messages) == 3
    with pytest.raises(ApiError, match="messages: List should have at most 2 items"):
        parse_request(talk, max_messages=2)


@pytest.mark.parametrize("body", [b"[]", b"null", b'"x"', b"5"])
def test_a_body_that_is_not_an_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError, match="not a JSON object") as caught:
        parse_request(body)
    assert caught.value.status == 400


def test_threads_are_declined_with_the_code_that_makes_the_sdks_send_the_history() -> None:
    for thread in ({"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}, {}, False):
        with pytest.raises(ApiError) as caught:
            parsed(thread=thread)
        error = caught.value.body("r")["error"]
        assert error["details"] == {"error_code": "thread_unsupported_request"}


HELLO_MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
TOLERATED: dict[str, Json] = {
    "unknown fields": {"new_field": 1, "foo": {"bar": []}, "betas": ["x-2026"]},
    "what Claude Code sends": {
        **{"metadata": {"user_id": '{"device_id":"x"}'}, "max_tokens": 64000, "thinking": {"type": "adaptive"}},
        **{"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}, "tools": []},
        **{"output_config": {"effort": "xhigh"}, "diagnostics": {"previous_message_id": None}, "stream": False},
    },
    "nulls": dict.fromkeys(
        [
            "system",
            "stream",
            "temperature",
            "top_p",
            "top_k",
            "stop_sequences",
            "metadata",
            "service_tier",
            "thinking",
            "output_config",
            "tools",
            "tool_choice",
            "container",
            "mcp_servers",
            "thread",
            "cache_control",
            "speed",
        ]
    ),
    "nothing to decline": {"mcp_servers": [], "tools": [], "container": ""},
    "cache_control": {"cache_control": {"type": "ephemeral", "ttl": "1h"}},
    "sampling": {"temperature": 0, "top_p": 1, "top_k": 0, "stop_sequences": []},
    "thinking": {"thinking": {"type": "disabled"}, "output_config": {}},
    "a long answer": {"max_tokens": 10**9},
}


@pytest.mark.parametrize("fields", TOLERATED.values(), ids=TOLERATED.keys())
def test_what_clients_send_beside_the_conversation_is_tolerated(fields: Json) -> None:
    request = parsed(**fields)
    assert request.messages == HELLO_MESSAGES
    assert (request.model, request.system, request.stream) == ("sonnet", [], False)


MODELS = {
    "claude-cli/sonnet": "sonnet",
    "sonnet": "sonnet",
    "sonnet[1m]": "sonnet[1m]",
    "claude-haiku-4-5-20251001": "claude-haiku-4-5-20251001",
    "claude-opus-4@20250514": "claude-opus-4@20250514",
    "us.anthropic.claude-sonnet-4-20250514-v1:0": "us.anthropic.claude-sonnet-4-20250514-v1:0",
    "arn:aws:bedrock:us-east-1:1:inference-profile/x": "arn:aws:bedrock:us-east-1:1:inference-profile/x",
}


@pytest.mark.parametrize(("name", "model"), MODELS.items())
def test_a_model_name_loses_the_bridges_prefix_and_nothing_else(name: str, model: str) -> None:
    assert parsed(model=name).model == model


def text(value: str, **keys: Any) -> Json:
    return {"type": "text", "text": value, **keys}


CACHED = {"cache_control": {"type": "ephemeral"}}
PDF = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": PNG}}
PAGE = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x"}, "title": "T"}
FOUND = {"type": "search_result", "source": "s", "title": "t", "content": [text("x")]}
THOUGHT = {"type": "thinking", "thinking": "", "signature": "c2ln"}
REMINDER = "<system-reminder>\nx\n</system-reminder>"
# name -> (messages, their normal form as (role, blocks))
NORMAL: dict[str, tuple[Any, list[tuple[str, list[Json]]]]] = {
    "string": (["a"], [("user", [text("a")])]),
    "nulls and cache_control vanish": (user(text("a", citations=None, **CACHED)), [("user", [text("a")])]),
    "same role": ([role("user", "a"), role("user", [text("b")])], [("user", [text("a"), text("b")])]),
    "assistant first": (
        [role("assistant", "a"), role("user", "b")],
        [("assistant", [text("a")]), ("user", [text("b")])],
    ),
    "system role at the end": ([role("user", "a"), role("system")], [("user", [text("a"), text(REMINDER)])]),
    "system role of blocks": (
        [role("user", "a"), role("system", [text("x", **CACHED)])],
        [("user", [text("a"), text(REMINDER)])],
    ),
    "system role before an assistant": (
        [role("user", "a"), role("system"), role("assistant", "b"), role("user", "c")],
        [("user", [text("a"), text(REMINDER)]), ("assistant", [text("b")]), ("user", [text("c")])],
    ),
    "thinking": (
        ["a", role("assistant", [THOUGHT, {"type": "redacted_thinking", "data": "x"}, text("b")]), "c"],
        [
            ("user", [text("a")]),
            ("assistant", [THOUGHT, {"type": "redacted_thinking", "data": "x"}, text("b")]),
            ("user", [text("c")]),
        ],
    ),
    "documents": (user(PDF, PAGE, FOUND, IMAGE, text("a")), [("user", [PDF, PAGE, FOUND, IMAGE, text("a")])]),
    "tools": (
        [
            "a",
            role("assistant", [text("b"), {**USE, "caller": None, **CACHED}]),
            *user(RESULT | CACHED | {"is_error": None}),
        ],
        [("user", [text("a")]), ("assistant", [text("b"), USE]), ("user", [RESULT])],
    ),
    "parallel tools, other order, text after": (
        ["a", role("assistant", [USE, USE | {"id": "t2"}]), *user(RESULT | {"tool_use_id": "t2"}, RESULT, text("b"))],
        [
            ("user", [text("a")]),
            ("assistant", [USE, USE | {"id": "t2"}]),
            ("user", [RESULT | {"tool_use_id": "t2"}, RESULT, text("b")]),
        ],
    ),
    "results in two user messages": (
        ["a", role("assistant", [USE, USE | {"id": "t2"}]), *user(RESULT), *user(RESULT | {"tool_use_id": "t2"})],
        [
            ("user", [text("a")]),
            ("assistant", [USE, USE | {"id": "t2"}]),
            ("user", [RESULT, RESULT | {"tool_use_id": "t2"}]),
        ],
    ),
    "blocks in a result": (
        ["a", role("assistant", [USE]), *user(RESULT | {"content": [text("x", citations=None, **CACHED), IMAGE]})],
        [("user", [text("a")]), ("assistant", [USE]), ("user", [RESULT | {"content": [text("x"), IMAGE]}])],
    ),
    "empty result": (
        ["a", role("assistant", [USE]), *user({"type": "tool_result", "tool_use_id": "t1", "content": None})],
        [("user", [text("a")]), ("assistant", [USE]), ("user", [{"type": "tool_result", "tool_use_id": "t1"}])],
    ),
    "keys of the SDKs": (user(text("a", parsed_output=None, new_key=[1])), [("user", [text("a", new_key=[1])])]),
    "a content key of its own": (user(text("a", content=[1])), [("user", [text("a", content=[1])])]),
    "a tool_use_id of its own": (user(text("a", tool_use_id="t1")), [("user", [text("a", tool_use_id="t1")])]),
}


@pytest.mark.parametrize(("messages", "normal"), NORMAL.values(), ids=NORMAL.keys())
def test_messages_are_brought_into_one_form(messages: Any, normal: list[tuple[str, list[Json]]]) -> None:
    assert parsed(messages).messages == [{"role": name, "content": blocks} for name, blocks in normal]


SYSTEMS: list[tuple[Any, list[str]]] = [
    (None, []),
    ("", []),
    ([], []),
    ("Be terse.", ["Be terse."]),
    ([text("a", **CACHED), text("b"), text("")], ["a", "b"]),
    ([text("x-anthropic-billing-header: cc_version=2; cch=abc;"), text("a")], ["a"]),
]


@pytest.mark.parametrize(("system", "texts_of_it"), SYSTEMS)
def test_a_system_prompt_is_its_texts_without_the_billing_line(system: Any, texts_of_it: list[str]) -> None:
    assert parsed(system=system).system == texts_of_it


def test_parameters_reach_the_api_as_sent_and_absent_ones_are_taken_back() -> None:
    sent = {
        **{"temperature": 0, "top_p": 0.5, "top_k": 3, "stop_sequences": ["END"], "service_tier": "auto"},
        **{"thinking": {"type": "enabled", "budget_tokens": 1024}, "output_config": {"effort": "low"}},
    }
    given_ = parsed(max_tokens=2000, **sent).settings
    assert json.loads(given_["CLAUDE_CODE_EXTRA_BODY"]) == {"max_tokens": 2000, **sent}
    nothing = parsed(max_tokens=5, stop_sequences=[], temperature=None).settings
    assert nothing == {"CLAUDE_CODE_EXTRA_BODY": '{"max_tokens":5}'}
    assert given_.keys() == nothing.keys()


FULL_BODY = request_body(
    [
        *user(text("look", **CACHED), IMAGE, PAGE, PDF, FOUND),
        role("assistant", [THOUGHT, text("a"), USE, USE | {"id": "t2"}]),
        *user(RESULT, {"type": "tool_result", "tool_use_id": "t2", "content": [text("x"), IMAGE], "is_error": True}),
        role("system", [text("s")]),
        role("assistant", "b"),
        role("user", [{"type": "document", "source": {"type": "content", "content": [text("x")]}}]),
        role("system", "x"),
    ],
    system=[text("a", **CACHED)],
    tools=[],
    stream=True,
    thinking={"type": "adaptive"},
    output_config={"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
    stop_sequences=["END"],
    temperature=0.5,
    metadata={"user_id": "x"},
)
DEEP = json.loads("[" * 240 + "]" * 240)


def use_whole(body: bytes) -> None:
    """Parse a body; a valid one must survive all that the bridge does with it."""
    request, refusal = None, None
    try:
        request = parse_request(body)
    except ApiError as error:
        refusal = error
    if request is None:
        assert refusal
        assert (refusal.status, bool(refusal.message)) == (400, True)
        frame(refusal.body("r"))
        return
    assert request.messages[-1]["role"] == "user"
    assert all(a["role"] != b["role"] for a, b in zip(request.messages, request.messages[1:], strict=False))
    extend(b"", request.messages)
    translate.initialize_line("initialize", request.system)
    translate.control_line("s", "apply_flag_settings", settings={"env": request.settings})
    for message in request.messages:
        if message["role"] == "user":
            translate.user_line(message["content"])
        else:
            translate.assistant_line(message["content"], 0, request.model)


def test_the_body_that_is_mutated_below_is_valid() -> None:
    assert len(parse_request(json.dumps(FULL_BODY).encode()).messages) == 5


@settings(max_examples=1500, **QUICK)
@given(
    st.lists(
        st.tuples(st.integers(0, 10**6), st.sampled_from([*JUNK, DEEP, RESULT, USE, text("x"), [1]]), st.booleans()),
        min_size=1,
        max_size=4,
    )
)
def test_a_mutated_request_is_served_or_refused_with_400(steps: list[tuple[int, Any, bool]]) -> None:
    body = copy.deepcopy(FULL_BODY)
    for number, junk, extra in steps:
        objects = [container[key] for container, key in places(body) if isinstance(container[key], dict)]
        if extra and objects:
            names = ("content", "tool_use_id", "source", "type", "id", "cache_control", "new")
            objects[number % len(objects)][names[number % len(names)]] = copy.deepcopy(junk)
        else:
            put(body, number, junk)
    use_whole(json.dumps(body).encode())


@settings(max_examples=500, **QUICK)
@given(st.binary() | JSON_VALUES.map(json.dumps).map(str.encode) | st.integers(0, 3000))
def test_any_bytes_are_a_request_or_refused_with_400(body: bytes | int) -> None:
    use_whole(json.dumps(FULL_BODY).encode()[:body] if isinstance(body, int) else body)


# ---------------------------------------------------------------- fingerprints


def chain(messages: Any) -> bytes:
    """The fingerprint under which the conversation is filed or looked up."""
    messages = [*messages, role("user", "next")] if messages[-1]["role"] == "assistant" else messages
    return extend(b"", parsed(messages).messages)


TALK: list[Json] = [
    role("user", [text("look"), IMAGE]),
    role("assistant", [THOUGHT, text("I see a dog."), USE]),
    role("user", [RESULT, text("and?")]),
    role("assistant", [text("It rains.")]),
]


def talk(*path: Any, value: Any = None, **keys: Any) -> list[Json]:
    """TALK with something else at the path: (message, block); `keys` are put into the block."""
    changed = copy.deepcopy(TALK)
    message, number = path
    changed[message]["content"][number : number + 1] = (
        [{**changed[message]["content"][number], **keys}] if value is None else value
    )
    return changed


SAME: dict[str, list[Json]] = {
    "cache_control": talk(2, 1, **CACHED),
    "cache_control in a result": talk(2, 0, content=[text("sunny", **CACHED)]),
    "thinking dropped": talk(1, 0, value=[]),
    "thinking changed": talk(1, 0, thinking="x", signature=""),
    "string": [*TALK[:3], role("assistant", "It rains.")],
    "string of a result": talk(2, 0, content=[text("sunny")]),
    "key order": talk(1, 2, value=[dict(reversed(USE.items()))]),
    "key order of a source": talk(0, 1, source=dict(reversed(IMAGE["source"].items()))),
    "nulls": talk(1, 1, citations=None, parsed_output=None),
    "is_error of null": talk(2, 0, is_error=None),
    "is_error false": talk(2, 0, is_error=False),
    "trimmed": talk(3, 0, text="It rains.\n "),
    "split": talk(3, 0, value=[text("It r"), text("ains.")]),
    "new keys": talk(3, 0, annotations=[], id="x"),
    "caller of a call": talk(1, 2, caller={"type": "direct"}),
    "user turn in two": [role("user", [text("look")]), role("user", [IMAGE]), *TALK[1:]],
}
OTHER: dict[str, list[Json]] = {
    "edited question": talk(2, 1, text="and"),
    "white space of a question": talk(2, 1, text="and? "),
    "edited answer": talk(3, 0, text="It rained."),
    "white space inside an answer": talk(3, 0, text="It  rains."),
    "other image": talk(0, 1, source={**IMAGE["source"], "data": PNG[:-4]}),
    "other media type": talk(0, 1, source={**IMAGE["source"], "media_type": "image/gif"}),
    "no image": talk(0, 1, value=[]),
    "image first": [role("user", [IMAGE, text("look")]), *TALK[1:]],
    "other input": talk(1, 2, input={"city": "Rome"}),
    "other tool": talk(1, 2, name="time"),
    "text after the call": [TALK[0], role("assistant", [USE, text("I see a dog.")]), *TALK[2:]],
    "is_error": talk(2, 0, is_error=True),
    "other result": talk(2, 0, content="rain"),
    "no result": talk(2, 0, content=None),
    "image as result": talk(2, 0, content=[IMAGE]),
    "other id": [
        *(TALK[0], role("assistant", [THOUGHT, text("I see a dog."), USE | {"id": "t2"}])),
        *(role("user", [RESULT | {"tool_use_id": "t2"}, text("and?")]), TALK[3]),
    ],
    "shorter": TALK[:3],
    "longer": [*TALK, role("user", "x"), role("assistant", "y")],
    "without the beginning": [role("user", "x"), *TALK[1:]],
}


@pytest.mark.parametrize("messages", SAME.values(), ids=SAME.keys())
def test_a_fingerprint_does_not_see_what_clients_change_without_meaning_it(messages: list[Json]) -> None:
    assert json.dumps(messages) != json.dumps(TALK)
    assert chain(messages) == chain(TALK)


@pytest.mark.parametrize("messages", OTHER.values(), ids=OTHER.keys())
def test_a_fingerprint_sees_what_matters(messages: list[Json]) -> None:
    assert chain(messages) != chain(TALK)


def test_cache_control_inside_a_document_does_not_change_the_fingerprint() -> None:
    def document(**keys: Any) -> Json:
        return {"type": "document", "source": {"type": "content", "content": [text("x", **keys)]}}

    assert chain(user(document(**CACHED), text("a"))) == chain(user(document(), text("a")))


def test_the_texts_of_a_user_are_not_joined() -> None:
    assert chain(user(text("a"), text("b"))) != chain(user(text("ab")))


def test_the_role_is_part_of_the_fingerprint() -> None:
    content = [text("x")]
    assert extend(b"", [role("user", content)]) != extend(b"", [role("assistant", content)])


def test_a_fingerprint_is_extended_as_it_is_made() -> None:
    messages = parsed([*TALK, "x"]).messages
    for cut in range(len(messages) + 1):
        assert extend(extend(b"", messages[:cut]), messages[cut:]) == extend(b"", messages)
    assert extend(b"", []) == b""


def test_the_system_part_sees_the_prompt_and_nothing_else() -> None:
    def part(system: Any) -> bytes:
        return parsed(system=system).parts["system"]

    billing = [text(f"x-anthropic-billing-header: cch={number};") for number in (1, 2)]
    same = ["a", [text("a")], [text("a", citations=None, **CACHED)], [billing[0], text("a")], [billing[1], text("a")]]
    assert len({part(system) for system in same}) == 1
    assert part(None) == part("") == part([])
    assert len({part("a"), part("b"), part(None), part([text("a"), text("b")])}) == 4


def test_the_model_part_sees_the_name_without_the_prefix() -> None:
    assert parsed(model="claude-cli/opus").parts == parsed(model="opus").parts
    assert parsed(model="opus").parts != parsed(model="sonnet").parts


def test_only_the_parts_that_were_sent_are_sent_parts() -> None:
    assert set(parsed().sent_parts) == set(parsed(system=None).sent_parts) == {"model"}
    request = parsed(system="a")
    assert request.sent_parts == {"model": request.parts["model"], "system": request.parts["system"]}
    assert set(parsed(system="").sent_parts) == {"model", "system"}


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Z"]), min_size=1, max_size=8).filter(str.strip)


@st.composite
def conversations(draw: Callable[..., Any]) -> list[Json]:
    """Question and answer in turn; each block says something that no other says, so that any change shows."""
    number, called = 0, []  # type: tuple[int, list[str]]
    messages: list[Json] = []
    for turn in range(draw(st.integers(1, 4)) * 2):
        name = ("user", "assistant")[turn % 2]
        kinds = draw(
            st.lists(st.sampled_from(["text", "image"] if name == "user" else ["text", "call"]), min_size=1, max_size=3)
        )
        if turn and name == "user":
            blocks = [{**RESULT, "tool_use_id": tool_id, "content": draw(words)} for tool_id in called]
        else:
            blocks = []
        called = []
        for kind in kinds if turn < 7 else ["text"]:
            number += 1
            if kind == "text":
                blocks.append(text(f"{draw(words)}-{number}"))
            elif kind == "image":
                data = base64.b64encode(f"{number}".encode()).decode()
                blocks.append({"type": "image", "source": {**IMAGE["source"], "data": data}})
            else:
                called.append(f"t{number}")
                blocks.append({**USE, "id": called[-1], "input": {"q": draw(words)}})
        messages.append(role(name, blocks))
    if called:
        messages[-1]["content"] = [block for block in messages[-1]["content"] if block["type"] == "text"] or [
            text("end")
        ]
    return messages


ECHOES = ["cache", "null", "key", "order", "string", "result", "think", "trim", "split", "false"]


def echo(messages: list[Json], steps: list[tuple[str, int, int]]) -> list[Json]:
    """The conversation as another client might send it back."""
    messages = copy.deepcopy(messages)
    for kind, number, other in steps:
        message = messages[number % len(messages)]
        content = message["content"]
        if isinstance(content, str):
            continue
        at = other % len(content)
        block = content[at]
        if kind == "cache":
            block["cache_control"] = {"type": "ephemeral"}
        elif kind == "null":
            block["citations"] = None
        elif kind == "key":
            block["new_key"] = [{"x": 1}]
        elif kind == "order":
            content[at] = dict(reversed(block.items()))
        elif kind == "string" and len(content) == 1 and block["type"] == "text":
            message["content"] = block["text"]
        elif kind == "result" and isinstance(block.get("content"), str):
            block["content"] = [text(block["content"], **CACHED)]
        elif kind == "false" and block["type"] == "tool_result":
            block["is_error"] = False
        elif message["role"] == "assistant" and kind == "think":
            content.insert(0, THOUGHT)
        elif message["role"] == "assistant" and block["type"] == "text":
            value = block["text"]
            if kind == "trim" and at in (0, len(content) - 1):
                block["text"] = f"\n{value}" if at == 0 else f"{value}\n "
            elif kind == "split":
                cut = other % len(value)
                if value[:cut].strip() and value[cut:].strip():
                    content[at : at + 1] = [{**block, "text": value[:cut]}, {**block, "text": value[cut:]}]
    return messages


CHANGES = st.lists(st.tuples(st.sampled_from(ECHOES), st.integers(0, 10**4), st.integers(0, 10**4)), max_size=8)


@settings(max_examples=400, **QUICK)
@given(conversations(), CHANGES)
def test_a_conversation_that_clients_echo_keeps_its_fingerprint(messages: list[Json], steps: Any) -> None:
    assert chain(echo(messages, steps)) == chain(messages)


@settings(max_examples=400, **QUICK)
@given(
    conversations(), CHANGES, st.integers(0, 10**6), st.sampled_from(["edit", "drop", "swap", "role", "add", "error"])
)
def test_a_conversation_that_was_changed_has_another_fingerprint(
    messages: list[Json], steps: Any, number: int, change: str
) -> None:
    changed = copy.deepcopy(messages)
    message = changed[number % len(changed)]
    block = message["content"][number % len(message["content"])]
    results = [b for m in changed for b in m["content"] if b["type"] == "tool_result"]
    if change == "error" and results:
        results[number % len(results)]["is_error"] = True
    elif change == "drop":
        changed.remove(message)
    elif change == "swap":
        changed.reverse()
    elif change == "role":
        message["role"] = {"user": "assistant", "assistant": "user"}[message["role"]]
    elif change == "add":
        changed.append(role("user", [text("more")]))
    elif block["type"] == "text":
        block["text"] = f"{block['text']}+"
    elif block["type"] == "image":
        block["source"]["data"] += "AAAA"
    elif block["type"] == "tool_use":
        block["input"]["q"] += "+"
    else:
        block["content"] += "+"
    # Not through parse_request: most of these break the API's rules.
    assert extend(b"", changed) != extend(b"", messages)


# ---------------------------------------------------------------- lines to the CLI


def test_every_user_line_ends_with_the_guard() -> None:
    for content in ([text("/compact")], [IMAGE], [RESULT]):
        line = translate.user_line(content)
        assert line.endswith(b"\n")
        assert json.loads(line)["message"]["content"] == [*content, text("\n")]
    assert "shouldQuery" not in json.loads(translate.user_line([text("a")]))
    assert json.loads(translate.user_line([text("a")], query=False))["shouldQuery"] is False


def test_history_lines_have_ids_of_their_own_and_prefixed_tools() -> None:
    lines = [json.loads(translate.assistant_line([text("a"), USE], number, "m")) for number in (0, 2)]
    assert len({line["message"]["id"] for line in lines}) == 2
    assert lines[0]["message"]["content"] == [text("a"), USE | {"name": "mcp__client__weather"}]
    assert USE["name"] == "weather"


def test_no_line_to_the_cli_holds_a_line_break() -> None:
    content = [text("a\nb\r\u2028\u0085")]
    for line in (
        translate.user_line(content),
        translate.assistant_line(content, 0, "m"),
        translate.control_line("r", "x"),
    ):
        assert line.count(b"\n") == 1
        assert json.loads(line)


def test_the_system_prompt_goes_through_initialize() -> None:
    for system, sent in ((["a", "b"], ["a", "b"]), ([], [""])):
        request = json.loads(translate.initialize_line(system, []))
        assert request["request"] == {"subtype": "initialize", "hooks": None, "systemPrompt": sent}


def test_an_answer_belongs_to_its_control_request_alone() -> None:
    answer = {"type": "control_response", "response": {"request_id": "initialize", "response": {"models": []}}}
    assert translate.answered(answer, "initialize") == {"models": []}
    others: list[Json] = [{}, {"response": None}, {"response": {"request_id": "settings", "response": {"a": 1}}}]
    for event in [*others, {"response": {"request_id": "initialize"}}]:
        assert translate.answered(event, "initialize") == {}
