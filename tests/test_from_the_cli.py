"""What is read from the CLI: the events of its lines, and its answers."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import FIXTURES, QUICK, Recorded, first_turns
from test_logins import LOGINS

import translate
from translate import ApiError, decode

Json = dict[str, Any]


# ---------------------------------------------------------------- lines from the CLI

EVENT = b'{"type":"x"}'
LINES: dict[bytes, list[Json]] = {
    EVENT: [{"type": "x"}],
    b'  {"type":"x"}\r': [{"type": "x"}],
    b'{"type":"a"}{"type":"b"}': [],
    b'{"type":"a"}oops': [],
    b"": [],
    b" ": [],
    b"Warning: something {odd}": [],
    b'{"type":"stream_ev': [],
    b'ent"}': [],
    b"[1,2]": [],
    b'[{"type":"x"}]': [],
    b'"text"': [],
    b"17": [],
    b"null": [],
    b"\xff\xfe{}": [],
    b'{"type":"\xff"}': [],
    # objects that are no events
    b"{}": [],
    b'{"a":1}': [],
    b'{"type":null}': [],
    b'{"type":["x"]}': [],
    b'{"type":5}': [],
    # numbers
    b'{"type":"x","n":123456789012345678901234567890}': [
        {"type": "x", "n": 123456789012345678901234567890.0}
    ],
    b'{"type":"x","n":NaN}': [],
    b'{"type":"x","n":Infinity}': [],
    b'{"type":"x","n":%b}' % (b"9" * 5000): [],
    # half a character, as JavaScript writes it
    b'{"type":"x","t":"a\\ud83d"}': [{"type": "x", "t": "a\ufffd"}],
    b'{"type":"x","t":"\\ud83d\\ude00 \\ude00"}': [{"type": "x", "t": "\U0001f600 \ufffd"}],
    b'{"type":"x","t":"\\\\ud83d \\uDE00"}': [{"type": "x", "t": "\\ud83d \ufffd"}],
}


@pytest.mark.parametrize(("line", "events"), LINES.items(), ids=lambda value: repr(value)[:40])
def test_a_line_holds_its_events_and_nothing_else(line: bytes, events: list[Json]) -> None:
    assert decode(line) == events


def test_a_line_of_five_megabytes_is_one_event() -> None:
    event = {"type": "user", "data": "x" * (5 << 20)}
    assert decode(json.dumps(event).encode()) == [event]


@pytest.mark.parametrize(
    "line",
    [
        b'{"type":' * 100_000,
        b"[" * 100_000,
        EVENT + b'{"a":' * 100_000,
        b'{"type":"x","a":%b}' % (b"[" * 2000 + b"]" * 2000),
    ],
    ids=["objects", "lists", "after an event", "closed"],
)
def test_a_line_that_is_nested_too_deeply_for_json_is_noise(line: bytes) -> None:
    assert [event["type"] for event in decode(line)] in ([], ["x"])


def test_a_line_of_more_levels_than_a_request_may_have_is_an_error() -> None:
    def line(levels: int) -> bytes:
        return b'{"type":"x","a":%b}' % (b"[" * levels + b"]" * levels)

    levels = translate.MAX_DEPTH - 1  # the object is one
    assert [event["type"] for event in decode(line(levels))] == ["x"]
    with pytest.raises(ApiError, match="nested too deeply") as caught:
        decode(line(levels + 1))
    assert (caught.value.status, caught.value.error_type) == (502, "claude_cli_error")


def test_a_damaged_part_of_the_answer_fails_the_turn() -> None:
    whole = b'{"type":"stream_event","event":{"type":"message_stop"}}'
    for line in (whole[:-1], whole[:-2] + b"\x00}}", whole[:40], whole + b"oops"):
        with pytest.raises(ApiError, match="the claude CLI wrote a damaged line") as caught:
            decode(line)
        assert caught.value.status == 502


@pytest.mark.parametrize(("path", "kind"), [("/count_tokens", "count"), ("", "message")])
def test_a_log_line_of_a_call_says_what_the_api_answered(path: str, kind: str) -> None:
    succeeded = f"[log_5b] post http://127.0.0.1:1/v1/messages{path}?beta=true succeeded"
    for line, status in (
        (f"{succeeded} with status 200 in 16ms", 200),
        (f"{succeeded} with status 400 in 1ms".replace("succeeded", "failed"), 400),
        (f"{succeeded.replace('succeeded', 'failed')} in 3ms", 502),
    ):
        call = {"type": "api_call", "subtype": kind, "response": status}
        assert decode(line.encode()) == [call]
    for line in (
        succeeded.replace("/messages", "/models") + " with status 200",
        "see " + succeeded,
        '[log_5b] sending request {"url": "http://x/v1/messages/count_tokens"}',
    ):
        assert decode(line.encode()) == []


def test_the_log_lines_of_a_recorded_count_are_read() -> None:
    for version, turn in first_turns("context_usage").items():
        calls = [event for event in turn.events if event["type"] == "api_call"]
        assert calls, version
        assert {event["response"] for event in calls} == {200}


@settings(max_examples=120, **QUICK)
@given(
    st.binary()
    | st.text().map(str.encode)
    | st.lists(st.dictionaries(st.sampled_from(["type", "a"]), st.integers() | st.text()))
    .map(json.dumps)
    .map(str.encode)
)
def test_any_bytes_are_a_list_of_events_or_a_damaged_line(line: bytes) -> None:
    with contextlib.suppress(ApiError):
        assert all(isinstance(event["type"], str) for event in decode(line))


# ---------------------------------------------------------------- answers of the CLI


def answer_to(request_id: Any, answer: Any = ..., **keys: Any) -> Any:
    response = {"subtype": "success", "request_id": request_id, "response": answer, **keys}
    return {
        "type": "control_response",
        "response": {key: value for key, value in response.items() if value is not ...},
    }


def test_an_answer_belongs_to_its_control_request_alone() -> None:
    assert translate.control_result(answer_to("a", {"models": []}), "a") == {"models": []}
    nothing: list[Any] = [
        {"type": "x"},
        {"type": "x", "response": None},
        {"type": "x", "response": 200},
        answer_to("b", {"x": 1}),
        answer_to("a"),
        answer_to("a", None),
        answer_to("a", [1]),
        answer_to(None, {"x": 1}),
    ]
    assert all(translate.control_result(event, "a") == {} for event in nothing)


def info(turn: Recorded) -> translate.CliInfo:
    """What the CLI reports of itself in a recording."""
    events: list[Any] = turn.events
    [found] = [
        found for event in events if (found := translate.control_result(event, "initialize"))
    ]
    return translate.read_info(found)


def test_the_recorded_answers_say_the_model_and_the_login() -> None:
    for version, turn in first_turns("text").items():
        model = info(turn).full_name("sonnet")
        assert model.startswith("claude-"), version
        assert info(turn).full_name(model) == model
        assert info(turn).login == "ANTHROPIC_API_KEY"
        messages = [e["event"] for e in turn.events if e["type"] == "stream_event"]
        assert messages[0]["message"]["model"] == model
    for turn in first_turns("not_logged_in").values():
        assert info(turn).login == ""


MODELS = [
    {"value": "default", "resolvedModel": "claude-opus-4-8"},
    {"value": "sonnet", "resolvedModel": "claude-sonnet-5-5"},
    {"value": "odd"},
    {"value": "null", "resolvedModel": None},
    5,
]


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("sonnet", "claude-sonnet-5-5"),
        ("claude-sonnet-5-5", "claude-sonnet-5-5"),
        ("default", "claude-opus-4-8"),
        ("odd", "odd"),
        ("null", "null"),
        ("haiku", "haiku"),
        ("", ""),
    ],
)
def test_a_model_is_listed_by_its_alias_and_its_id(name: str, model: str) -> None:
    assert translate.read_info({"models": MODELS}).full_name(name) == model
    for odd in ({}, {"models": None}, {"models": {}}, {"models": "x"}):
        assert translate.read_info(odd).models == ()


# What the CLI said of an account -> what it is called by.
ACCOUNTS: dict[str, tuple[Json, str]] = {
    f"{path.parent.name} {name}": (account, LOGINS[name].source)
    for path in sorted(FIXTURES.glob("*/accounts.json"))
    for name, account in json.loads(path.read_text()).items()
}
HAVE_KEYS = {"key", "key-helper", "key-in-settings"}


@pytest.mark.parametrize(("account", "source"), ACCOUNTS.values(), ids=ACCOUNTS.keys())
def test_an_account_is_called_by_its_source_its_plan_or_its_cloud(
    account: Json, source: str
) -> None:
    assert translate.read_info({"account": account}).login == source


def test_an_account_has_a_key_if_the_cli_names_its_source() -> None:
    found = {name.split()[1] for name, (account, _) in ACCOUNTS.items() if has_key(account)}
    assert found == HAVE_KEYS
    assert not any(map(has_key, (None, "x", {}, {"apiKeySource": "none"})))


def has_key(account: Any) -> bool:
    return translate.read_info({"account": account}).has_api_key


# What was asked, what answered, whether that may be the same model.
SAME_MODELS = [
    ("claude-opus-4-8", "claude-opus-4-8", True),
    ("claude-opus-4-8", "claude-opus-4-8-20260101", True),
    ("claude-opus-4-8-20260101", "claude-opus-4-8", True),
    ("claude-opus-4-8[1m]", "claude-opus-4-8", True),
    ("claude-opus-4-8[1m]", "claude-opus-4-8-20260101", True),
    # names of Vertex
    ("claude-opus-4-8@20260101", "claude-opus-4-8", True),
    ("claude-opus-4-8@default", "claude-opus-4-8", True),
    ("claude-opus-4-5@default", "claude-opus-4-8", False),
    # what is no full name of the API can be anything
    ("opus", "claude-opus-4-8", True),
    ("opus[1m]", "claude-opus-4-8", True),
    ("us.anthropic.claude-opus-4-8-v1:0", "claude-opus-4-8", True),
    ("claude-opus-4-8", "us.anthropic.claude-sonnet-5-5-v1:0", True),
    ("claude-opus-4-8", "", True),
    # aliases
    ("sonnet[1m]", "claude-sonnet-5-5", True),
    ("Opus", "claude-sonnet-5-5", False),
    ("best", "claude-opus-4-8", True),
    # others
    ("claude-opus-4-8", "claude-sonnet-5-5", False),
    ("claude-opus-4-8", "claude-opus-4-5", False),
    ("claude-opus-4-20250514", "claude-opus-4-5-20251101", False),
    ("claude-opus-4-8[1m]", "claude-opus-4-5[1m]", False),
]


@pytest.mark.parametrize(("asked", "answered", "is_same"), SAME_MODELS)
def test_a_model_is_the_same_but_for_a_date_or_the_size_of_its_context(
    asked: str, answered: str, is_same: bool
) -> None:
    assert translate.may_answer(answered, asked) == is_same
