"""What a request has to be, what passes to the API as sent, and the form in which it goes on."""

import copy
import json
import typing
from typing import Any

import anthropic.types
import pytest
from client import request_body
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import (
    BASH,
    CACHED,
    DEFERRED,
    DOCUMENT,
    FOUND,
    IMAGE,
    JSON_VALUES,
    JUNK,
    PAGE,
    PDF,
    QUICK,
    REFERENCE,
    RESULT,
    RESULT_2,
    THOUGHT,
    TOOL,
    USE,
    USE_2,
    answered,
    check_refused,
    parsed,
    places,
    put,
    role,
    text,
    texts,
    user,
)

import translate
from translate import ApiError, parse_request

Json = dict[str, Any]


# ---------------------------------------------------------------- refused

NOT_A_MODEL = "model: String should be a model name"
# What the bridge reads itself: (messages, other fields, how the message begins).
REFUSED_FIELDS: list[tuple[Any, Json, str]] = [
    ("x", {"model": ...}, "model: Field required"),
    ("x", {"max_tokens": ...}, "max_tokens: Field required"),
    ("x", {"messages": ...}, "messages: Field required"),
    ("x", {"model": None}, "model: Field required"),
    ("x", {"max_tokens": None}, "max_tokens: Field required"),
    ("x", {"messages": None}, "messages: Field required"),
    ("x", {"model": 5}, "model: Input should be a valid string"),
    ("x", {"model": ""}, NOT_A_MODEL),
    ("x", {"model": "--dangerously"}, NOT_A_MODEL),
    ("x", {"model": "claude-cli/-x"}, NOT_A_MODEL),
    ("x", {"model": "claude-cli/"}, NOT_A_MODEL),
    ("x", {"model": "a b"}, NOT_A_MODEL),
    ("x", {"model": "a\n"}, NOT_A_MODEL),
    ("x", {"model": "a" * 300}, NOT_A_MODEL),
    ("x", {"stream": "yes"}, "stream: Input should be a valid boolean"),
    ("x", {"stream": 1}, "stream: Input should be a valid boolean"),
    ("x", {"stream": 0}, "stream: Input should be a valid boolean"),
    ("x", {"stream": []}, "stream: Input should be a valid boolean"),
    ("x", {"messages": "hello"}, "messages: Input should be a valid list"),
    ("x", {"messages": {}}, "messages: Input should be a valid list"),
    ("x", {"system": 5}, "system: Input should be a valid list"),
    ("x", {"system": 0}, "system: Input should be a valid list"),
    ("x", {"system": False}, "system: Input should be a valid list"),
    ("x", {"system": {}}, "system: Input should be a valid list"),
    ("x", {"system": [IMAGE]}, "system.0.type: Input should be 'text'"),
    ("x", {"system": [{"text": "x"}]}, "system.0.type: Input should be 'text'"),
    ("x", {"system": [text("x"), "x"]}, "system.1: Input should be a valid object"),
    ("x", {"system": [{"type": "text"}]}, "system.0.text: Input should be a valid string"),
    ("x", {"tools": "x"}, "tools: Input should be a valid list"),
    ("x", {"tools": {}}, "tools: Input should be a valid list"),
    ("x", {"tools": [TOOL, 5]}, "tools.1: Input should be a valid object"),
    ("x", {"tools": [{"name": 5}]}, "tools.0.name: Input should be a valid string"),
]


@pytest.mark.parametrize(
    ("messages", "fields", "words"),
    REFUSED_FIELDS,
    ids=[words[:50] for _, _, words in REFUSED_FIELDS],
)
def test_what_the_bridge_reads_of_the_fields_is_checked_in_the_apis_words(
    messages: Any, fields: Json, words: str
) -> None:
    check_refused(words, messages, **fields)


def test_a_count_needs_no_max_tokens() -> None:
    body = json.dumps(request_body("x", max_tokens=...)).encode()
    assert "max_tokens" not in parse_request(body, counting=True).fields
    with pytest.raises(ApiError, match="max_tokens: Field required"):
        parse_request(body)


@pytest.mark.parametrize("header", ["a b", "a;\x7f", "é", "a,b c"])
def test_a_header_of_betas_holds_visible_ascii(header: str) -> None:
    with pytest.raises(ApiError, match="anthropic-beta: names are visible ASCII") as caught:
        parsed(header=header)
    assert caught.value.status == 400


def test_threads_are_declined_with_the_code_that_makes_the_sdks_send_the_history() -> None:
    for thread in ({"type": "create"}, {"type": "continue", "previous_message_id": "x"}, {}, False):
        with pytest.raises(ApiError) as caught:
            parsed(thread=thread)
        error = caught.value.body("r")["error"]
        assert error["details"] == {"error_code": "thread_unsupported_request"}
        assert error["type"] == "invalid_request_error"


# ---------------------------------------------------------------- JSON and its limits


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
        b'{"a": 1e999}',
        b'{"a": "\\ud83d"}',
        b"[" * 20000,
        b"9" * 5000,
    ],
)
def test_a_body_that_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError, match="The request body is not valid JSON: ") as caught:
        parse_request(body)
    assert caught.value.status == 400


@pytest.mark.parametrize("body", [b"[]", b"null", b'"x"', b"5"])
def test_a_body_that_is_not_an_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError, match="not a JSON object") as caught:
        parse_request(body)
    assert caught.value.status == 400


def test_the_depth_of_a_body_has_a_limit() -> None:
    def asked(levels: int) -> bytes:
        schema = json.loads('{"type":"object","a":' * levels + "1" + "}" * levels)
        tool = {"name": "t", "input_schema": schema}
        return json.dumps(request_body("hi", tools=[tool])).encode()

    assert parse_request(asked(197)).tool_names  # three levels around the schema
    with pytest.raises(ApiError, match="body: JSON of more than 200 levels"):
        parse_request(asked(198))


def test_a_body_of_long_numbers_that_is_nested_too_deeply_is_refused() -> None:
    body = b'{"a":%d,"b":%b}' % (10**30, b"[" * 1000 + b"]" * 1000)
    with pytest.raises(ApiError, match="body: JSON of more than 200 levels"):
        parse_request(body)


def test_a_text_without_an_end_is_looked_at_once() -> None:
    """Or it would take hours."""
    body = b"[" + b"," * 100_001 + b'"' + b'\\"' * 1_000_000
    with pytest.raises(ApiError, match="body: more than 100000 JSON values"):
        parse_request(body)


def test_the_number_of_values_has_a_limit() -> None:
    for value in (
        [0] * 100_000,
        [[]] * 50_000,
        [{}] * 50_000,
        {str(n): 0 for n in range(100_000)},
    ):
        body = json.dumps(request_body("hi", new=value)).encode()
        with pytest.raises(ApiError, match="body: more than 100000 JSON values"):
            parse_request(body)


@settings(max_examples=60, **QUICK)
@given(st.lists(st.text('"\\\\[,x', max_size=5), max_size=4), st.integers(995, 1005))
def test_an_escape_at_the_end_of_a_piece_is_no_quote(texts: list[str], length: int) -> None:
    """A large body is looked at in pieces."""
    said = ["x" * length + text for text in texts]
    padding = [" " * 100_000, "[" * 200_000]
    assert not translate.has_too_many_values(json.dumps([*said, *padding]).encode())
    values = [0] * 100_001
    assert translate.has_too_many_values(json.dumps([*said, *padding, values]).encode())


@pytest.mark.parametrize("value", ["x,", "[{,", '",', '\\",', "\\\\,"], ids=repr)
def test_what_a_text_holds_is_no_value(value: str) -> None:
    message = value * 200_000
    body = json.dumps(request_body(message)).encode()
    assert parse_request(body).messages == user(text(message))


def test_integers_of_64_bits_keep_their_digits_and_longer_ones_are_floats_as_for_the_cli() -> None:
    for number, kept in ((2**64 - 1, 2**64 - 1), (-(2**63), -(2**63)), (10**30 + 7, 1e30)):
        use = USE | {"input": {"n": [number]}}
        request = parsed(answered(use, RESULT), new={"n": number})
        for found in (
            request.messages[1]["content"][0]["input"]["n"][0],
            request.fields["new"]["n"],
        ):
            assert (found, type(found)) == (kept, type(kept))


# ---------------------------------------------------------------- what the API judges

SCHEMA = {"type": "json_schema", "schema": {"type": "object"}}
# Fields that go to the API as sent, right or wrong.
FIELDS: dict[str, Json] = {
    "new fields": {"new_field": 1, "foo": {"bar": []}},
    "nulls": dict.fromkeys(
        [
            "temperature",
            "top_p",
            "top_k",
            "stop_sequences",
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
    "sampling": {"temperature": 0, "top_p": 1, "top_k": 0, "stop_sequences": []},
    "ranges": {"temperature": 9, "top_p": -1, "top_k": -1, "stop_sequences": [""]},
    "types": {"temperature": "hot", "top_k": 1.5, "stop_sequences": 5, "service_tier": "gold"},
    "a long answer": {"max_tokens": 10**9},
    "less than nothing": {"max_tokens": -1},
    "not even a number": {"max_tokens": "5"},
    "thinking": {"thinking": {"type": "enabled", "budget_tokens": 5}},
    "new thinking": {"thinking": {"type": "new"}, "output_config": {"effort": "most"}},
    "no thinking": {"thinking": True},
    "format": {"output_config": {"format": SCHEMA}, "output_format": SCHEMA},
    "tool_choice": {"tool_choice": {"type": "tool", "name": "nobody"}},
    "no tool_choice": {"tool_choice": "auto"},
    "MCP": {"mcp_servers": [{"type": "url", "url": "http://x", "name": "x"}]},
    "container": {"container": {"skills": []}},
    "cache_control": {"cache_control": {"type": "ephemeral", "ttl": "1h"}},
    "context_management": {"context_management": {"edits": [{"type": "clear_thinking_20251015"}]}},
    "diagnostics": {"diagnostics": {"previous_message_id": None}},
    "tools": {"tools": [TOOL | CACHED, {"type": "web_search_20250305", "name": "web_search"}]},
    "odd tools": {"tools": [{}, {"type": "new", "name": None}, TOOL, TOOL | {"input_schema": 5}]},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS.keys())
def test_fields_that_the_bridge_does_not_read_go_to_the_api_as_sent(fields: Json) -> None:
    request = parsed(**fields)
    sent = {name: value for name, value in fields.items() if name != "tools" or value}
    assert request.fields == {"max_tokens": 1024, **sent}
    assert request.messages == user(text("hello"))
    assert (request.model, request.system, request.stream) == ("sonnet", [], False)
    assert request.not_sent == []


def test_what_the_bridge_says_to_the_cli_in_other_ways_is_no_part_of_the_body() -> None:
    request = parsed(system="a", stream=True, metadata={"user_id": "x"}, betas=["b"])
    assert request.fields == {"max_tokens": 1024}
    assert (request.system, request.stream) == (["a"], True)


# ---------------------------------------------------------------- the form in which it goes on

MODELS = {
    "claude-cli/sonnet": "sonnet",
    "sonnet": "sonnet",
    "sonnet[1m]": "sonnet[1m]",
    "claude-haiku-4-5-20251001": "claude-haiku-4-5-20251001",
    "claude-opus-4@20250514": "claude-opus-4@20250514",
    "us.anthropic.claude-sonnet-4-20250514-v1:0": "us.anthropic.claude-sonnet-4-20250514-v1:0",
    "arn:aws:bedrock:us-east-1:1:inference-profile/x": (
        "arn:aws:bedrock:us-east-1:1:inference-profile/x"
    ),
    "claude-cli/claude-cli/x": "claude-cli/x",
}


@pytest.mark.parametrize(("name", "model"), MODELS.items())
def test_a_model_name_loses_the_bridges_prefix_and_nothing_else(name: str, model: str) -> None:
    assert parsed(model=name).model == model


SYSTEMS: list[tuple[Any, list[str]]] = [
    (None, []),
    ("", []),
    ([], []),
    ("Be terse.", ["Be terse."]),
    ([text("a", **CACHED), text("b"), text("")], ["a", "b"]),
    ([text("x-anthropic-billing-header: cc_version=2; cch=abc;"), text("a")], ["a"]),
]


@pytest.mark.parametrize(("system", "texts"), SYSTEMS)
def test_a_system_prompt_is_its_texts_without_the_billing_line(
    system: Any, texts: list[str]
) -> None:
    assert parsed(system=system).system == texts


def test_betas_are_the_header_in_one_order_and_each_once() -> None:
    for header in ("b-2,a-1", "a-1, b-2", " b-2 ,,a-1,b-2,"):
        assert parsed(header=header).betas == "a-1,b-2"
    assert parsed().betas == ""


def test_the_id_of_the_user_is_that_of_the_metadata() -> None:
    assert parsed(metadata={"user_id": "x"}).user_id == "x"
    for odd in (..., None, {}, {"user_id": None}, {"user_id": 5}, "x"):
        assert parsed(metadata=odd).user_id == ""


def test_the_size_is_that_of_the_body() -> None:
    body = json.dumps(request_body("hi")).encode()
    assert parse_request(body).size == len(body)


# ---------------------------------------------------------------- tools


def test_tools_keep_their_names_and_their_order() -> None:
    tools = [TOOL, BASH, TOOL | {"name": "mcp__client__x"}, TOOL]
    assert parsed(tools=tools).tool_names == ["weather", "bash", "mcp__client__x"]
    assert parsed(tools=None).tool_names == parsed(tools=[]).tool_names == parsed().tool_names == []


def test_a_tool_without_a_name_is_called_by_those_of_its_members() -> None:
    computer = parsed(tools=[{"type": "computer_toolset_20260801"}]).tool_names
    assert {"screenshot", "left_click", "type"} < set(computer)
    browser = parsed(tools=[{"type": "browser_toolset_20260801"}, TOOL]).tool_names
    assert {"navigate", "screenshot", "weather"} < set(browser)
    assert parsed(tools=[{"type": "mcp_toolset", "mcp_server_name": "x"}]).tool_names == []


@pytest.mark.parametrize("kind", ["computer", "browser"])
def test_the_members_of_a_toolset_are_those_that_the_sdk_knows(kind: str) -> None:
    members = getattr(anthropic.types, f"{kind}_member_name")
    known = typing.get_args(getattr(members, f"{kind.title()}MemberName"))
    assert set(translate.TOOLSETS[f"{kind}_toolset_"].split()) == set(known)


def test_a_toolset_without_a_name_is_a_clients_tool() -> None:
    body = {"model": "sonnet", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}]}
    for tools, is_agent in ([{"type": "new_toolset"}], False), ([], True):
        request = parse_request(json.dumps({**body, "tools": tools}).encode(), agent=True)
        assert request.is_agent == is_agent


def test_what_an_agent_does_not_take_is_named() -> None:
    hour = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    body = {
        "model": "sonnet",
        "max_tokens": 9,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "x", **hour}]}],
        "thinking": {"type": "enabled", "budget_tokens": 2000, "display": None},
    }
    request = parse_request(json.dumps(body).encode(), agent=True)
    assert request.not_sent == ["cache_control", "max_tokens", "thinking.budget_tokens"]
    assert not parse_request(json.dumps(body).encode()).not_sent


def test_a_tool_that_a_reference_has_loaded_is_deferred_no_more() -> None:
    """The CLI leaves the references out, and the model would never see the tool."""
    tools = [DEFERRED, DEFERRED | {"name": "other"}, BASH]
    loaded = parsed(answered(USE, RESULT | {"content": [REFERENCE, text("a")]}), tools=tools)
    assert loaded.fields["tools"] == [TOOL, *tools[1:]]
    assert loaded.messages[-1]["content"] == [
        RESULT | {"content": [text("Tool loaded: weather"), text("a")]}
    ]
    assert parsed(answered(USE, RESULT), tools=tools).fields["tools"] == tools


# ---------------------------------------------------------------- what cannot arrive as sent

LOST_FIELDS: dict[str, tuple[Json, list[str]]] = {
    "metadata": ({"metadata": {"user_id": "x"}}, ["metadata"]),
    "betas": ({"betas": ["x-2026"]}, ["betas"]),
    "nothing": ({"metadata": None, "betas": None, "system": "a"}, []),
    "billing line": (
        {"system": [text("x-anthropic-billing-header: cch=1;"), text("a")]},
        ["system.0"],
    ),
}


@pytest.mark.parametrize(("fields", "not_sent"), LOST_FIELDS.values(), ids=LOST_FIELDS.keys())
def test_a_field_that_cannot_arrive_as_sent_is_named_once(
    fields: Json, not_sent: list[str]
) -> None:
    assert parsed(**fields).not_sent == not_sent


# ---------------------------------------------------------------- mutations

FULL_BODY = request_body(
    [
        *user(text("look", **CACHED), IMAGE, PAGE, PDF, FOUND),
        role("assistant", [THOUGHT, text("a"), USE, USE_2]),
        *user(RESULT, RESULT_2 | {"content": [text("x"), IMAGE], "is_error": True}),
        role("system", [text("s")]),
        role("assistant", "b"),
        role("user", [DOCUMENT]),
        role("system", "x"),
    ],
    system=[text("a", **CACHED)],
    tools=[TOOL | CACHED, BASH, {"type": "computer_toolset_20260801"}],
    stream=True,
    thinking={"type": "adaptive"},
    output_config={"effort": "low", "format": SCHEMA},
    stop_sequences=["END"],
    temperature=0.5,
    metadata={"user_id": "x"},
)
DEEP = json.loads("[" * 240 + "]" * 240)


def use_whole(body: bytes, betas: str = "") -> None:
    """Parse a body; a valid one must survive all that the bridge does with it."""
    request, refusal = None, None
    try:
        request = parse_request(body, betas)
    except ApiError as error:
        refusal = error
    if request is None:
        assert refusal
        assert (refusal.status, bool(refusal.message)) == (400, True)
        translate.frame(refusal.body("r"))
        return
    assert request.continues == (request.messages[-1]["role"] == "assistant")
    pairs = zip(request.messages, request.messages[1:], strict=False)
    assert all(before["role"] != after["role"] for before, after in pairs)
    settings = translate.turn_environment(request, has_listed_tools=True)
    assert json.loads(settings["CLAUDE_CODE_EXTRA_BODY"])["tools"] is not None
    translate.initialize_line(request.system, has_tools=bool(request.tool_names))
    list(map(translate.listed_tool, request.tool_names))
    translate.tools_for_count(request)
    translate.transcript(request.messages, request.model)
    newest = request.messages[-1]["content"]
    translate.user_line(newest, "id")
    translate.has_images(newest)
    translate.tool_results(newest)


def test_the_body_that_is_mutated_is_valid() -> None:
    request = parse_request(json.dumps(FULL_BODY).encode())
    assert (len(request.messages), request.caching) == (5, "client")


EXTRA = ("content", "tool_use_id", "source", "type", "id", "cache_control", "name", "new")
MUTATIONS = st.lists(
    st.tuples(
        st.integers(0, 10**6),
        st.sampled_from([*JUNK, DEEP, RESULT, USE, IMAGE, text("x"), [1]]),
        st.booleans(),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=120, **QUICK)
@given(MUTATIONS)
def test_a_mutated_request_is_served_or_refused_with_400(
    steps: list[tuple[int, Any, bool]],
) -> None:
    body = copy.deepcopy(FULL_BODY)
    for number, junk, extra in steps:
        values = [container[key] for container, key in places(body)]
        objects = [value for value in values if isinstance(value, dict)]
        if extra and objects:
            name = EXTRA[number % len(EXTRA)]
            objects[number % len(objects)][name] = copy.deepcopy(junk)
        else:
            put(body, number, junk)
    use_whole(json.dumps(body).encode())


@settings(max_examples=150, **QUICK)
@given(
    st.binary() | JSON_VALUES.map(json.dumps).map(str.encode) | st.integers(0, 3000),
    st.text(max_size=8),
)
def test_any_bytes_are_a_request_or_refused_with_400(body: bytes | int, betas: str) -> None:
    whole = json.dumps(FULL_BODY).encode()
    use_whole(whole[:body] if isinstance(body, int) else body, betas)


READ = translate.OWN_FIELDS | {"max_tokens", "tools", "thread"}


@settings(max_examples=120, **QUICK)
@given(st.dictionaries(texts.filter(lambda name: name not in READ), JSON_VALUES, max_size=4))
def test_any_field_that_the_bridge_does_not_know_goes_to_the_api_as_sent(fields: Json) -> None:
    request = parsed(**{"max_tokens": 5, **fields})
    env = translate.turn_environment(request)
    assert json.loads(env["CLAUDE_CODE_EXTRA_BODY"]) == {"max_tokens": 5, **fields}


# ---------------------------------------------------------------- blocks of a type


def test_the_blocks_of_a_type_are_found_in_a_conversation() -> None:
    said = [role("user", "x"), role("assistant", [THOUGHT, text("a")]), role("user", "y")]
    messages = parsed(said).messages
    assert translate.blocks_of_types(messages, translate.THINKING_BLOCKS) == [THOUGHT]
    assert translate.blocks_of_types(messages[:1], translate.THINKING_BLOCKS) == []
