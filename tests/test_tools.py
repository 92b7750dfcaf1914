"""Client tools through the real CLI: what arrives at the stub API counts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from client import IMAGE, Json, arrived, text
from host import wait_until
from servers import Serve, Server

SCHEMA = {
    "type": "object",
    "$defs": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "properties": {
        "city": {"$ref": "#/$defs/city"},
        "when": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "unit": {"const": "C"},
    },
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"name": "get_weather", "description": "The weather.", "input_schema": SCHEMA}
CALL = 'USE_TOOL get_weather INPUT={"city":"Paris"}END'


def user(*blocks: Json) -> Json:
    return {"role": "user", "content": list(blocks)}


def result(call: Json, content: Any = "18C", **fields: Any) -> Json:
    return {"type": "tool_result", "tool_use_id": call["id"], "content": content, **fields}


def calls(message: Json) -> list[Json]:
    return [block for block in message["content"] if block["type"] == "tool_use"]


def start(server: Server, words: str = CALL, **fields: Any) -> tuple[list[Any], list[Json]]:
    """A conversation whose last answer calls the tool; the conversation and the calls."""
    messages: list[Any] = [user(text(words))]
    answer = server.post(messages, tools=[TOOL], **fields).message
    assert answer["stop_reason"] == "tool_use"
    messages.append({"role": "assistant", "content": answer["content"]})
    return messages, calls(answer)


@pytest.mark.parametrize("stream", [False, True])
def test_five_rounds_of_a_tool_loop_stay_in_one_process(
    real: Server, since: Callable[[], list[Json]], stream: bool
) -> None:
    messages: list[Any] = [user(text(CALL))]
    for number in range(5):
        answer = real.post(messages, tools=[TOOL], stream=stream)
        assert answer.session == ("hot" if number else "new")
        (call,) = calls(answer.message)
        assert (call["name"], call["input"]) == ("get_weather", {"city": "Paris"})
        messages += [
            {"role": "assistant", "content": answer.message["content"]},
            user(result(call, f"go on: {CALL}")),
        ]
    assert len(real.processes()) == 1
    assert len(since()) == 5


def answered(stub_rows: list[Json]) -> list[Json]:
    """The tool results of the last API request, by call."""
    return [
        block
        for block in arrived(stub_rows[-1]["body"])[-1]["content"]
        if block["type"] == "tool_result"
    ]


def test_parallel_calls_take_results_in_any_order_by_id(
    real: Server, since: Callable[[], list[Json]]
) -> None:
    messages, asked = start(real, CALL + " COUNT=3")
    assert len({call["id"] for call in asked}) == 3
    results = [
        result(call, f"result {number}", is_error=number == 1) for number, call in enumerate(asked)
    ]
    answer = real.post([*messages, user(*reversed(results))], tools=[TOOL])
    assert answer.session == "hot"
    found = {block["tool_use_id"]: block for block in answered(since())}
    for number, call in enumerate(asked):
        assert found[call["id"]]["content"] in (f"result {number}", [text(f"result {number}")])
        assert found[call["id"]].get("is_error", False) == (number == 1)
    assert len(since()) == 2


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("plain", [text("plain")]),
        ([text("one"), text("two")], [text("one"), text("two")]),
    ],
)
def test_a_result_arrives_as_it_was_sent(
    real: Server, since: Callable[[], list[Json]], content: Any, wanted: list[Json]
) -> None:
    messages, (call,) = start(real)
    assert real.post([*messages, user(result(call, content))], tools=[TOOL]).session == "hot"
    (block,) = answered(since())
    assert block["content"] == wanted


@pytest.mark.parametrize(
    ("content", "is_error"),
    [
        ("", False),
        ([], False),
        (..., False),
        ([text("see"), IMAGE], False),
        ([text("one"), text("two")], True),
        ("no such file\n", True),
        ("x" * 12_000, True),
    ],
)
def test_a_result_that_the_cli_would_change_goes_to_a_fresh_process_and_arrives_as_sent(
    real: Server, since: Callable[[], list[Json]], content: Any, is_error: bool
) -> None:
    """In place the CLI says in its own words that a result is empty, scales images, and joins the
    texts of an error, trims them and cuts them in the middle."""
    messages, (call,) = start(real)
    sent = {**result(call, content), **({"is_error": True} if is_error else {})}
    sent = {key: value for key, value in sent.items() if value is not ...}
    answer = real.post([*messages, user(sent)], tools=[TOOL])
    assert answer.session in ("rebuilt; reason=tool-results", "rebuilt; reason=images")
    (block,) = answered(since())
    assert {key: value for key, value in block.items() if key != "cache_control"} == sent


def test_an_error_of_some_length_arrives_in_place(
    real: Server, since: Callable[[], list[Json]]
) -> None:
    messages, (call,) = start(real)
    sent = result(call, "x" * 10_000, is_error=True)
    assert real.post([*messages, user(sent)], tools=[TOOL]).session == "hot"
    (block,) = answered(since())
    assert (block["content"], block["is_error"]) == ("x" * 10_000, True)


@pytest.mark.parametrize("size", [100_000, 390_000, 450_000, 700_000])
def test_a_long_result_arrives_whole(
    real: Server, since: Callable[[], list[Json]], size: int
) -> None:
    messages, (call,) = start(real)
    long = "x" * (size - 3) + "end"
    answer = real.post([*messages, user(result(call, long))], tools=[TOOL])
    if size > 500_000 and answer.status == 400 and "too long" in answer.json["error"]["message"]:
        pytest.skip("this CLI gives the model a window that is smaller than the result")
    assert answer.session == ("hot" if size < 400_000 else "rebuilt; reason=tool-results")
    (block,) = answered(since())
    assert block["content"] in (long, [text(long)])


def as_list(block: Json) -> Json:
    """A tool result whose content is a list: a string is one text (API)."""
    content = block.get("content")
    return {**block, "content": [text(content)]} if isinstance(content, str) else block


DOCUMENT = {
    "type": "document",
    "source": {"type": "text", "media_type": "text/plain", "data": "an apple"},
}


def test_what_cannot_be_handed_over_is_rebuilt_whole(
    real: Server, since: Callable[[], list[Json]]
) -> None:
    for content in ([result], [text("wait, do this")]):
        messages, (call,) = start(real)
        blocks = [result(call, [DOCUMENT])] if content == [result] else [result(call), *content]
        answer = real.post([*messages, user(*blocks)], tools=[TOOL])
        assert answer.session == "rebuilt; reason=tool-results"
        found = arrived(since()[-1]["body"])[-1]["content"]
        assert [as_list(block) for block in found] == [as_list(block) for block in blocks]
    wait_until(lambda: len(real.processes()) == 2, "the end of the parked processes")


def test_a_text_that_names_the_call_of_a_result_arrives(
    real: Server, since: Callable[[], list[Json]]
) -> None:
    messages, (call,) = start(real)
    also = {"type": "text", "text": "STOP", "tool_use_id": call["id"]}
    answer = real.post([*messages, user(also, result(call))], tools=[TOOL])
    assert answer.status == 200
    assert "STOP" in [block.get("text") for block in since()[-1]["body"]["messages"][-1]["content"]]


def test_results_for_a_conversation_that_no_process_holds(
    real: Server, since: Callable[[], list[Json]]
) -> None:
    call = {"type": "tool_use", "id": "toolu_old", "name": "get_weather", "input": {"city": "Rome"}}
    history = [
        user(text("hi")),
        {"role": "assistant", "content": [call]},
        user(result(call, "rain")),
    ]
    answer = real.post(history, tools=[TOOL])
    assert answer.session == "rebuilt; reason=unknown-history"
    assert answer.text.startswith("Tool said: ")
    assert [block["content"] for block in answered(since())] == [[text("rain")]]


def test_results_that_do_not_fit_are_refused_and_the_call_stays_answerable(real: Server) -> None:
    messages, (call,) = start(real)
    for wrong in (user(result({"id": "toolu_other"})), user(text("never mind"))):
        refused = real.post([*messages, wrong], tools=[TOOL])
        assert refused.status == 400
        assert "`tool_use" in refused.json["error"]["message"]
    assert real.post([*messages, user(result(call))], tools=[TOOL]).session == "hot"


def test_a_call_that_is_never_answered_costs_no_further_api_call(
    serve: Serve, cli: Any, since: Callable[[], list[Json]]
) -> None:
    server = serve(bin=cli, session_ttl_secs=0.5)
    start(server)
    wait_until(lambda: not server.processes(), "the end of the parked process")
    assert len(since()) == 1


def test_the_time_of_a_tool_is_not_the_watchdogs(serve: Serve, cli: Any) -> None:
    server = serve(bin=cli, watchdog_secs=60)
    messages, (call,) = start(server)
    parked = server.bridge and next(iter(server.bridge.pool.room.sessions)).process
    assert parked
    parked._alive_at -= 61
    assert not parked.check_silence(60)
    assert server.post([*messages, user(result(call))], tools=[TOOL]).session == "hot"


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_of_a_tool_that_was_not_offered_is_the_clients_to_refuse(
    real: Server, since: Callable[[], list[Json]], stream: bool
) -> None:
    """As at the API.  The CLI would answer it by itself and ask the model again, so its process
    ends."""
    messages: list[Any] = [user(text("USE_TOOL Nope INPUT={}END"))]
    answer = real.post(messages, tools=[TOOL], stream=stream)
    (call,) = calls(answer.message)
    assert (call["name"], answer.message["stop_reason"]) == ("Nope", "tool_use")
    messages += [
        {"role": "assistant", "content": answer.message["content"]},
        user(result(call, "no such tool")),
    ]
    again = real.post(messages, tools=[TOOL])
    assert again.session == "rebuilt; reason=tool_use"
    assert [block["content"] for block in answered(since())] == [[text("no such tool")]]


def test_tools_arrive_as_they_were_sent(real: Server, since: Callable[[], list[Json]]) -> None:
    """In their order, with every key and the whole description: the CLI by itself sorts, cuts and
    drops."""
    tools: list[Json] = [
        {
            "name": "zeta",
            "description": "z" * 9000,
            "input_schema": SCHEMA,
            "strict": True,
            "input_examples": [{"city": "Paris"}],
            "cache_control": {"type": "ephemeral"},
        },
        {
            "name": "alpha",
            "input_schema": {"type": "object"},
            "eager_input_streaming": True,
            "new_key": [1, None],
        },
        {
            "name": "deferred",
            "input_schema": {"type": "object"},
            "defer_loading": True,
            "allowed_callers": ["direct"],
        },
        {
            "type": "custom",
            "name": "m",
            "description": "",
            "input_schema": {"type": "object", "properties": {}},
        },
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 3},
        {"type": "tool_search_tool_bm25_20251119", "name": "tool_search_tool_bm25"},
        {"type": "mcp_toolset", "mcp_server_name": "remote"},
        {"type": "tool_of_tomorrow", "name": "tomorrow", "depth": {"a": 1}},
    ]
    servers = [{"type": "url", "url": "https://example.com/mcp", "name": "remote"}]
    answer = real.post("SAY x", tools=tools, mcp_servers=servers, container="container_1")
    assert answer.text == "x"
    body = since()[0]["body"]
    assert body["tools"] == tools
    assert (body["mcp_servers"], body["container"]) == (servers, "container_1")
    assert "x-bridge-not-sent" not in answer.headers


# Legal names, and those of the CLI's own tools among them.
NAMES = [
    *[
        "Agent",
        "AskUserQuestion",
        "Bash",
        "BashOutput",
        "Edit",
        "EnterPlanMode",
        "ExitPlanMode",
        "Glob",
        "Grep",
    ],
    *[
        "KillShell",
        "ListMcpResourcesTool",
        "Monitor",
        "NotebookEdit",
        "Read",
        "ReadMcpResourceTool",
        "SendMessage",
    ],
    *[
        "Skill",
        "SlashCommand",
        "StructuredOutput",
        "Task",
        "TaskCreate",
        "TaskOutput",
        "TaskStop",
        "TodoWrite",
    ],
    *[
        "ToolSearch",
        "WebFetch",
        "WebSearch",
        "Write",
        "mcp__client__z",
        "mcp__other__y",
        "x__y",
        "a-b",
        "_",
    ],
    *["a" * 64, "A" * 128],
]


def test_any_name_is_the_clients_alone(
    real: Server, since: Callable[[], list[Json]], tmp_path: Path
) -> None:
    tools = [
        {"name": name, "description": name + "." * 9000, "input_schema": {"type": "object"}}
        for name in NAMES
    ]
    made = tmp_path / "made"
    given = {
        "command": f"touch {made}",
        "file_path": str(made),
        "content": "x",
        "prompt": "SAY no",
        "query": "x",
    }
    words = json.dumps(given)
    messages: list[Any] = [user(text("SAY hello")), {"role": "assistant", "content": "hello"}]
    messages.append(user(text(f"USE_TOOL {NAMES[0]} INPUT={words}END")))
    assert len(NAMES) == 35
    for number, name in enumerate(NAMES):
        answer = real.post(messages, tools=tools)
        known = ["hot" if number else "rebuilt; reason=unknown-history"]
        if NAMES[number - 1] == "TaskOutput":  # 2.1.197 changes its input
            known.append("rebuilt; reason=tool_use")
        assert answer.session in known, name
        (call,) = calls(answer.message)
        assert (call["name"], call["input"]) == (name, given)
        following = NAMES[(number + 1) % len(NAMES)]
        messages.append({"role": "assistant", "content": answer.message["content"]})
        messages.append(user(result(call, f"USE_TOOL {following} INPUT={words}END")))
    assert not made.exists()
    assert len(since()) == len(NAMES)
    assert since()[-1]["body"]["tools"] == tools
    history = [block for message in arrived(since()[-1]["body"]) for block in message["content"]]
    assert [block["name"] for block in history if block["type"] == "tool_use"] == NAMES[:-1]


@pytest.mark.parametrize(
    ("tool", "name"),
    [
        ({"type": "bash_20250124", "name": "bash"}, "bash"),
        (
            {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"},
            "str_replace_based_edit_tool",
        ),
        ({"type": "memory_20250818", "name": "memory"}, "memory"),
        (
            {"type": "computer_toolset_20260801", "configs": {"zoom": {"enabled": False}}},
            "left_click",
        ),
    ],
)
def test_the_apis_own_client_tools_are_served_in_place(
    real: Server, since: Callable[[], list[Json]], tool: Json, name: str
) -> None:
    messages: list[Any] = [user(text(f'USE_TOOL {name} INPUT={{"command":"ls"}}END'))]
    answer = real.post(messages, tools=[tool])
    (call,) = calls(answer.message)
    assert (call["name"], call["input"]) == (name, {"command": "ls"})
    assert since()[0]["body"]["tools"] == [tool]
    messages += [
        {"role": "assistant", "content": answer.message["content"]},
        user(result(call, "note.txt")),
    ]
    second = real.post(messages, tools=[tool])
    assert (second.session, "note.txt" in second.text) == ("hot", True)


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "auto"},
        {"type": "any", "disable_parallel_tool_use": True},
        {"type": "tool", "name": "get_weather"},
        {"type": "none"},
    ],
)
def test_tool_choice_reaches_the_api(
    real: Server, since: Callable[[], list[Json]], choice: Json
) -> None:
    answer = real.post("SAY x", tools=[TOOL], tool_choice=choice)
    assert since()[0]["body"]["tool_choice"] == choice
    assert answer.message["stop_reason"] == (
        "end_turn" if choice["type"] in ("auto", "none") else "tool_use"
    )


def test_parameters_of_the_round_with_the_results_reach_the_api(
    real: Server, since: Callable[[], list[Json]]
) -> None:
    messages, (call,) = start(real, max_tokens=500, temperature=0.3)
    assert (
        real.post([*messages, user(result(call))], tools=[TOOL], max_tokens=600, top_k=3).session
        == "hot"
    )
    first, second = (row["body"] for row in since())
    assert (first["max_tokens"], first.get("temperature"), first.get("top_k")) == (500, 0.3, None)
    assert (second["max_tokens"], second.get("temperature"), second.get("top_k")) == (600, None, 3)


def test_other_names_of_tools_are_another_conversation(real: Server) -> None:
    """All else about them is said with each turn, and may change."""
    answer = real.post("SAY x", tools=[TOOL])
    changed = {**TOOL, "description": "Another."}
    assert real.post(["SAY x", answer.text, "SAY y"], tools=[changed]).session == "hot"
    renamed = {**TOOL, "name": "another"}
    answer = real.post(["SAY x", "x", "SAY y", "y", "SAY z"], tools=[renamed])
    assert answer.session == "rebuilt; reason=tools-changed"


def test_no_tools_are_no_tools(real: Server, since: Callable[[], list[Json]]) -> None:
    assert real.post("SAY x", tools=[], tool_choice={"type": "auto"}).text == "x"
    assert since()[0]["body"]["tools"] == []


def test_a_pinned_turn_without_tools_has_none(
    real: Server, since: Callable[[], list[Json]]
) -> None:
    """The process has them listed: the model must not call one that nobody would serve."""
    assert real.post("SAY one", session="s", tools=[TOOL]).text == "one"
    second = real.post("Use the tool", session="s")
    assert (second.session, second.message["stop_reason"]) == ("hot", "end_turn")
    assert since()[-1]["body"]["tools"] == []
    third = real.post(CALL, session="s", tools=[TOOL])
    assert (third.session, third.message["stop_reason"]) == ("hot", "tool_use")


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ("x", "tools: Input should be a valid list"),
        ([TOOL, 5], "tools.1: Input should be a valid object"),
        ([{"name": 5}], "tools.0.name: Input should be a valid string"),
    ],
)
def test_tools_that_are_none_are_refused(serve: Serve, tools: Any, words: str) -> None:
    server = serve()
    answer = server.post("hi", tools=tools)
    assert (answer.status, answer.json["error"]["type"]) == (400, "invalid_request_error")
    assert words in answer.json["error"]["message"]
    assert server.processes() == []


@pytest.mark.parametrize("stream", [False, True])
def test_the_sdks_tool_runner_works_in_one_process(real: Server, stream: bool) -> None:
    import anthropic

    asked: list[str] = []

    def get_weather(city: str) -> str:
        """The weather of a city.

        Args:
            city: its name
        """
        asked.append(city)
        return f"go on: {CALL}" if len(asked) < 5 else "done"

    with anthropic.Anthropic(base_url=real.url, api_key="k", max_retries=0) as client:
        runner = client.beta.messages.tool_runner(
            model="sonnet",
            max_tokens=500,
            tools=[anthropic.beta_tool(get_weather)],
            messages=[{"role": "user", "content": CALL}],
            stream=stream,
        )
        reasons = [(item.get_final_message() if stream else item).stop_reason for item in runner]
    assert reasons == ["tool_use"] * 5 + ["end_turn"]
    assert asked == ["Paris"] * 5
    assert len(real.processes()) == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_call_that_max_tokens_cut_off_ends_as_the_api_ended_it(
    real: Server, stream: bool
) -> None:
    """Its input is no JSON then (API: "Fine-grained tool streaming")."""
    answer = real.post("CUTTOOL", tools=[TOOL], stream=stream)
    assert (answer.status, answer.message["stop_reason"]) == (200, "max_tokens")
    call = answer.message["content"][-1]
    assert (call["type"], call["name"]) == ("tool_use", TOOL["name"])
    if stream:
        deltas = [event["delta"] for event in answer.events if "delta" in event]
        pieces = [delta.get("partial_json", "") for delta in deltas]
        assert "".join(pieces) == '{"city": "Par'
        assert answer.events[-1] == {"type": "message_stop"}
