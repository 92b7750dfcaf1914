"""What arrives: the same request once straight at the stub API and once through the bridge and the
real CLI.

The two are compared key by key, as a new, a hot and a rebuilt turn.  Each difference has a name and
a reason in DIFFERENCES; one that is not explained fails the test.  Requests are written
(WRITTEN_FIELDS) and generated from the types of the official SDK: `FIDELITY=500 python -m pytest
tests/test_fidelity.py` compares more of those.
"""

import contextlib
import itertools
import json
import os
import typing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Union

import anthropic
import first_party
import pytest
from anthropic.types import beta as sdk
from anthropic.types.beta import message_create_params
from client import IMAGE, Json, arrived, text
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from servers import Serve, Server
from stubs import Stub
from test_logins import LOGINS, log_in

import translate

EXAMPLES = int(os.environ.get("FIDELITY", "3"))
AT_ONCE = 16

# Why what arrives is not what was sent.  README.md here has a row for each (test_readme.py).
DIFFERENCES = {
    "streamed": "the CLI always asks for a stream",
    "identity": "metadata, and two lines before the system prompt, say who the CLI is",
    "model": "an alias becomes the full id",
    "system": "the texts of the system prompt are joined, and lose their cache_control",
    "effort": "an effort of high, the API's default, is written out, or left out for a model that has none",
    "betas": "the CLI adds the betas that it needs",
    "lost betas": "five betas of the CLI's own are not sent, whoever asks for them",
    "output format": "output_format, of an older beta, becomes output_config.format",
    "no tools": "an empty list of tools is written out",
    "content": "a string is written as a text block, or one text block as a string",
    "roles": "neighbouring messages of one role are joined",
    "breakpoints": "the CLI sets the cache breakpoints, unless the client sets one inside a message",
    "ends": "a breakpoint at the end of an earlier message gives way to the CLI's own, at the end of the newest",
    "context": "the CLI adds a message about its environment and the date, but not with an API key and 2.1.300 or newer",
    "system role": "a system message becomes a <system-reminder> in the user message beside it",
    "result": "a tool result of text is a list of blocks, or one text if it is an error; is_error of false is left out",
    "temperature": "a model without adaptive thinking is asked for a temperature of 1, the API's default",
    "order": "a CLI older than 2.1.266 puts the tool calls of an assistant message at its end",
    "inputs": "in a history, inputs of tools named Edit, Write and ExitPlanMode are written as the CLI writes its own",
    "caller": "a caller of direct, which is the same as none, is left out of a tool call",
    "call keys": "2.1.197 keeps only type, id, name and input of a tool call",
    "thinking alone": "an assistant message that has only thinking is left out",
    "left out": "marks of a fallback (but not at the API's own address), an advisor's words, calls of server tools without their result are left out",
    "citations": "of the citations of an assistant's text, 2.1.332 keeps only those of web searches",
    "own citations": "2.1.197 keeps no citations of an answer that the same process gave",
    "first message": "2.1.197 puts its reminder of the date before a conversation that the assistant begins",
    "references": "a tool_reference becomes a text that names the tool, and the tool loses its defer_loading",
    "error": "all but the text of a failed tool's result is left out",
    "numbers": "an integer of more than 53 bits is rounded",
}
# Those that x-bridge-not-sent tells of, and what is in it.
TOLD = {
    "lost betas": "anthropic-beta.",
    "breakpoints": "cache_control",
    "system role": ".role",
    "thinking alone": "messages.",
    "left out": ".content.",
    "call keys": ".content.",
    "order": ".content.",
    "inputs": ".input",
    "citations": ".citations",
    "references": ".content.",
    "error": ".content.",
}
# Blocks without which an assistant message says nothing.
UNSAID = ("thinking", "redacted_thinking", "fallback")
# The last text of a request whose answer is "ok", whatever its parameters say.
RECORD = "RECORD"


def post(url: str, body: Json, betas: list[str], session: str = "") -> Any:
    """Send a body with the official SDK, as it is; returns the response."""
    headers = {"X-Stainless-Raw-Response": "raw"}
    if betas:
        headers["anthropic-beta"] = ",".join(betas)
    if session:
        headers["x-arch-claude-cli-session"] = session
    with anthropic.Anthropic(base_url=url, api_key="k", max_retries=0, timeout=60) as client:
        return client.post("/v1/messages", cast_to=object, body=body, options={"headers": headers})


def breakpoints_in(value: Any) -> int:
    """How many there are in messages: that of a tool's definition is none of theirs."""
    if isinstance(value, list):
        return sum(map(breakpoints_in, value))
    if not isinstance(value, dict):
        return 0
    inner = [each for key, each in value.items() if key != "definition"]
    return ("cache_control" in value) + breakpoints_in(inner)


class Comparison:
    """One request that was sent straight, and what arrived of it through the bridge."""

    def __init__(self, sent: Json, arrived: Json, how: str, not_sent: str) -> None:
        self.sent_betas = betas_of(sent)
        self.betas = betas_of(arrived)
        self.sent: Json = json.loads(json.dumps(sent["body"]))
        self.arrived: Json = json.loads(json.dumps(arrived["body"]))
        self.how = how
        self.keeps_breakpoints = (
            breakpoints_in(self.sent["messages"]) > 0 and "cache_control" not in not_sent
        )
        self.found: set[str] = set()  # of DIFFERENCES

    def explain(self, is_different: bool, name: str) -> bool:
        assert name in DIFFERENCES
        if is_different:
            self.found.add(name)
        return is_different

    def check(self) -> set[str]:
        """Assert that each difference is a known one; returns those that there are."""
        sent, arrived = self.sent, self.arrived
        lost = set(self.sent_betas) - set(self.betas)
        assert lost <= translate.UNSENT_BETAS
        self.explain(bool(lost), "lost betas")
        self.explain(self.sent_betas != self.betas, "betas")
        assert arrived.pop("stream") is True
        self.explain(sent.pop("stream", False) is not True, "streamed")
        assert json.loads(arrived.pop("metadata")["user_id"])["session_id"]
        sent.pop("metadata", None)
        sent.pop("betas", None)
        self.explain(True, "identity")
        if sent["model"] != arrived["model"]:
            assert sent.pop("model") in arrived.pop("model")
            self.explain(True, "model")
        self.check_system(sent.pop("system", None), arrived.pop("system"))
        self.check_output_format()
        self.check_effort()
        if "tools" not in sent:
            assert arrived.pop("tools") == []
            self.explain(True, "no tools")
        if "temperature" in arrived and "temperature" not in sent:
            assert arrived.pop("temperature") == 1
            self.explain(True, "temperature")
        self.check_messages(sent.pop("messages"), arrived.pop("messages"))
        for tool, other in zip(sent.get("tools", []), arrived.get("tools", []), strict=False):
            if "references" in self.found and "defer_loading" not in other:
                tool.pop("defer_loading", None)
        self.same(sent, arrived, "")
        return self.found

    def check_system(self, sent: Any, arrived: list[Json]) -> None:
        blocks = [text(sent)] if isinstance(sent, str) else sent or []
        texts = [block["text"] for block in blocks if block["text"]]
        own = [block["text"] for block in arrived[:2]]
        assert own[0].startswith("x-anthropic-billing-header: ")
        assert len(own[1]) < 100
        assert [block["text"] for block in arrived[2:]] == (["\n\n".join(texts)] if texts else [])
        self.explain(True, "identity")
        self.explain(blocks != arrived[2:], "system")

    def check_output_format(self) -> None:
        older = self.sent.pop("output_format", None)
        if self.explain(older is not None, "output format"):
            self.sent["output_config"] = {"format": older, **(self.sent.get("output_config") or {})}

    def check_effort(self) -> None:
        sent = self.sent.get("output_config")
        arrived = self.arrived.get("output_config")
        if sent == arrived:
            return
        sent_effort = sent.pop("effort", None) if isinstance(sent, dict) else None
        effort = arrived.pop("effort", None) if isinstance(arrived, dict) else None
        assert effort in (sent_effort, "high", None)
        self.explain(effort != sent_effort, "effort")
        for body in (self.sent, self.arrived):
            if body.get("output_config") in ({}, None):
                body.pop("output_config", None)

    def check_messages(self, sent: list[Json], arrived: list[Json]) -> None:
        sent = self.one_form(sent)
        arrived = self.without_context(arrived)
        others = [self.sent, *(self.sent.get("tools") or [])]
        # With two beside the messages, all of them are the client's.
        are_clients = sum(each.get("cache_control") is not None for each in others) > 1
        if self.keeps_breakpoints and self.are_at_ends(sent) and not are_clients:
            # The CLI's own is alone in its place.
            marked = [block for block in arrived[-1]["content"] if "cache_control" in block]
            assert marked == arrived[-1]["content"][-1:]
            assert breakpoints_in(arrived) == 1
            self.explain(True, "ends")
            sent, arrived = map(without_breakpoints, (sent, arrived))
        roles = [message["role"] for message in sent]
        assert roles == [message["role"] for message in arrived], arrived[0]
        for number, (ours, theirs) in enumerate(zip(sent, arrived, strict=True)):
            place = f"messages.{number}"
            assert ours.keys() == theirs.keys() == {"role", "content"}
            left = self.blocks(ours["content"])
            right = self.blocks(theirs["content"])
            if ours["role"] == "assistant":
                left = self.ordered(self.without_left_out(left, right), right)
            assert len(left) == len(right), f"{place}: {left} {right}"
            for index, (one, other) in enumerate(zip(left, right, strict=True)):
                self.check_block(one, other, f"{place}.{index}")

    def are_at_ends(self, messages: list[Json]) -> bool:
        """Whether all breakpoints stand where the CLI sets its own: at the ends of the user's
        messages, on the last block or on any of the tool results there."""
        ends = 0
        for message in messages:
            if message["role"] == "user":
                blocks = message["content"]
                results = [block["type"] == "tool_result" for block in blocks]
                ends += sum(
                    "cache_control" in block
                    for number, block in enumerate(blocks)
                    if number == len(blocks) - 1 or all(results[number:])
                )
        return breakpoints_in(messages) == ends

    def one_form(self, messages: list[Json]) -> list[Json]:
        """The messages as they are documented to be changed."""
        merged: list[Json] = []
        for message in messages:
            role, content = message["role"], message["content"]
            if role == "system":
                self.explain(True, "system role")
                texts = (
                    [content] if isinstance(content, str) else [block["text"] for block in content]
                )
                role = "user"
                content = "<system-reminder>\n" + "\n".join(texts) + "\n</system-reminder>"
            content = [text(content)] if isinstance(content, str) else content
            thoughts = [block for block in content if block["type"] in UNSAID]
            if self.explain(role == "assistant" and thoughts == content, "thinking alone"):
                continue
            if merged and merged[-1]["role"] == role:
                self.explain(True, "roles")
                merged[-1]["content"] = [*merged[-1]["content"], *content]
            else:
                merged.append({"role": role, "content": content})
        return merged

    def without_context(self, messages: list[Json]) -> list[Json]:
        kept = []
        for message in messages:
            content = message["content"]
            if message["role"] == "system":
                self.explain(True, "context")
                assert not message.keys() - {"role", "content"}, message
                continue
            if isinstance(content, str) and is_context(text(content)):
                self.explain(True, "first message")
                continue
            if isinstance(content, list):
                rest = [block for block in content if not is_context(block)]
                self.explain(rest != content, "context")
                if not rest:
                    continue
                message = {**message, "content": rest}
            kept.append(message)
        return kept

    def blocks(self, content: Any) -> list[Json]:
        if isinstance(content, str):
            self.explain(True, "content")
            return [text(content)]
        return list(content)

    def ordered(self, sent: list[Json], arrived: list[Json]) -> list[Json]:
        calls = [block for block in sent if block["type"] == "tool_use"]
        others = [block for block in sent if block["type"] != "tool_use"]
        types = [block["type"] for block in arrived]
        if [block["type"] for block in sent] != types and [
            b["type"] for b in [*others, *calls]
        ] == types:
            self.explain(True, "order")
            return [*others, *calls]
        return sent

    def without_left_out(self, sent: list[Json], arrived: list[Json]) -> list[Json]:
        answered = {block.get("tool_use_id") for block in sent}
        kept = []
        for block in sent:
            is_call = block["type"] in ("server_tool_use", "mcp_tool_use")
            is_pending = is_call and block["id"] not in answered
            is_advice = block["type"] == "advisor_tool_result" or (
                is_call and block["name"] == "advisor"
            )
            # At the API's own address they arrive.
            is_mark = block["type"] == "fallback" and not first_party.IS_ON
            if not (is_pending or is_advice or is_mark):
                kept.append(block)
        self.explain(kept != sent, "left out")
        says_nothing = all(block["type"] in UNSAID for block in kept)
        if says_nothing and len(arrived) > len(kept):  # the CLI says so
            assert arrived[-1]["type"] == "text"
            assert arrived[-1]["text"] in (
                "[Tool use interrupted]",
                "(no content)",
                "[Advisor response]",
            )
            return [*kept, arrived[-1]]
        return kept

    def check_block(self, sent: Json, arrived: Json, place: str) -> None:
        if not self.keeps_breakpoints:
            bare = without_breakpoints(sent)
            self.explain(bare != sent, "breakpoints")
            sent, arrived = bare, without_breakpoints(arrived)
        if "caller" not in arrived and sent.get("caller") == {"type": "direct"}:
            self.explain(True, "caller")
            sent = {key: value for key, value in sent.items() if key != "caller"}
        if sent["type"] == "tool_use" and sent.keys() != arrived.keys():
            assert arrived.keys() == {"type", "id", "name", "input"}
            self.explain(True, "call keys")
            sent = {key: sent[key] for key in arrived}
        if sent["type"] == "tool_use":
            written = translate.as_cli_sends(sent)
            self.explain(written != sent, "inputs")
            sent = written
        is_uncited = "citations" in sent and "citations" not in arrived
        if self.how == "hot" and is_uncited and sent["citations"][0]["type"].startswith("web_"):
            self.explain(True, "own citations")
            sent = {key: value for key, value in sent.items() if key != "citations"}
        if sent["type"] == "text" and sent.get("citations") != arrived.get("citations"):
            kept = [
                item for item in sent["citations"] if item["type"] == "web_search_result_location"
            ]
            self.explain(True, "citations")
            sent = {**sent, "citations": kept}
        if sent["type"] == "tool_result" and isinstance(sent.get("content"), list):
            sent = self.result_without(sent)
        if sent["type"] == "tool_result":
            sent = self.result_as_written(sent, arrived)
        self.same(sent, arrived, place)

    def result_without(self, sent: Json) -> Json:
        kept = []
        for block in sent["content"]:
            if self.explain(block["type"] == "tool_reference", "references"):
                block = text(f"Tool loaded: {block['tool_name']}")
            if not self.explain(bool(sent.get("is_error")) and block["type"] != "text", "error"):
                kept.append(block)
        return {**sent, "content": kept}

    def result_as_written(self, sent: Json, arrived: Json) -> Json:
        if not sent.get("content") or sent == arrived:
            return sent
        written = {**sent}
        content, found = sent["content"], arrived["content"]
        if isinstance(content, str) and isinstance(found, list):
            written["content"] = [text(content)]
        elif isinstance(found, str) and content == [text(found)]:
            written["content"] = found
        if "is_error" not in arrived and sent.get("is_error") is False:
            del written["is_error"]
        self.explain(written != sent, "result")
        return written

    def same(self, sent: Any, arrived: Any, place: str) -> None:
        """Equal, but for the digits that a double does not hold."""
        if isinstance(sent, dict) and isinstance(arrived, dict):
            assert sent.keys() == arrived.keys(), f"{place}: {sorted(sent.keys() ^ arrived.keys())}"
            for key in sent:
                self.same(sent[key], arrived[key], f"{place}.{key}")
        elif isinstance(sent, list) and isinstance(arrived, list):
            assert len(sent) == len(arrived), place
            for number, (one, other) in enumerate(zip(sent, arrived, strict=True)):
                self.same(one, other, f"{place}.{number}")
        elif isinstance(sent, int) and not isinstance(sent, bool) and abs(sent) > 2**53:
            assert float(sent) == float(arrived), place
            self.explain(sent != arrived, "numbers")
        else:
            assert sent == arrived, place
            assert isinstance(sent, bool) == isinstance(arrived, bool), place


def without_breakpoints(block: Any) -> Any:
    if isinstance(block, list):
        return [without_breakpoints(item) for item in block]
    if not isinstance(block, dict):
        return block
    kept = {key: value for key, value in block.items() if key != "cache_control"}
    for key in ("content", "source"):
        if key in kept and block.get("type") != "tool_use":
            kept[key] = without_breakpoints(kept[key])
    return kept


def betas_of(row: Json) -> list[str]:
    headers = {name.lower(): value for name, value in row["headers"].items()}
    return [name for name in headers.get("anthropic-beta", "").split(",") if name]


def is_context(block: Json) -> bool:
    """Whether a block is what the CLI adds by itself: the date of 2.1.197, the environment for
    older models."""
    words = str(block.get("text"))
    ours = (
        "As you answer the user's questions",
        "# Environment",
        "You are powered by the model",
        "Today's date is",
    )
    return any(words.startswith(f"<system-reminder>\n{beginning}") for beginning in ours)


# ------------------------------------------------------------------------------------- generated requests

ODD = 'a é漢😀\u2028\u0085\u202e\x1b\\"/@<>\n\t'
STRINGS = st.text(ODD, min_size=1, max_size=6).filter(lambda value: value.strip() != "")
PLAIN_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | STRINGS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(STRINGS, inner, max_size=2),
    max_leaves=4,
)
OBJECTS = st.dictionaries(STRINGS, PLAIN_JSON, max_size=3)
# Types of the SDK whose values need more than their types say.
SPECIAL: dict[str, st.SearchStrategy[Any]] = {
    "BetaBase64ImageSourceParam": st.just(IMAGE["source"]),
    "BetaBase64PDFSourceParam": st.just(
        {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0="}
    ),
}
HEADERS = {"betas", "user_profile_id", "workspace_id"}
OWN = {"model", "messages", "system", "stream", "metadata", "thread"}


def values(hint: Any, depth: int = 4) -> st.SearchStrategy[Any]:
    """Values of a type of the SDK."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Annotated, typing.Required, typing.NotRequired):
        return values(arguments[0], depth)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is Union:
        fitting = [inner for inner in arguments if inner is not type(None) and is_json(inner)]
        return st.one_of([values(inner, depth) for inner in fitting])
    if isinstance(hint, type) and issubclass(hint, dict) and hasattr(hint, "__required_keys__"):
        return objects(hint, depth)
    if origin is not None and issubclass(origin, dict):
        return OBJECTS
    if origin is not None and issubclass(origin, Iterable):
        return st.lists(values(arguments[0], depth - 1), min_size=1, max_size=2)
    simple = {
        str: STRINGS,
        int: st.integers(0, 2**40),
        float: st.sampled_from([0, 0.5, 1]),
        bool: st.booleans(),
    }
    return simple.get(hint, PLAIN_JSON)


def is_json(hint: Any) -> bool:
    return "IO" not in str(hint) and "PathLike" not in str(hint)


def objects(shape: Any, depth: int) -> st.SearchStrategy[Any]:
    """Objects of a TypedDict; deep ones hold only what is required."""
    if shape.__name__ in SPECIAL:
        return SPECIAL[shape.__name__]
    hints = typing.get_type_hints(shape, include_extras=True)
    required, optional = {}, {}
    for name, inner in hints.items():
        is_required = typing.get_origin(inner) is typing.Required
        (required if is_required else optional)[name] = values(inner, depth - 1)
    return st.fixed_dictionaries(required, optional=optional if depth > 0 else None)


def blocks_of(union: Any, *names: str) -> st.SearchStrategy[Json]:
    """Blocks of a union of the SDK, by their types: those of `names`, or all others with a leading
    minus."""
    without = {name.removeprefix("-") for name in names if name.startswith("-")}
    chosen = []
    for member in typing.get_args(union):
        if not hasattr(member, "__required_keys__"):
            continue  # a type of answers
        (kind,) = typing.get_args(typing.get_type_hints(member)["type"])
        if kind in names or (without and kind not in without):
            chosen.append(objects(member, 3))
    return st.one_of(chosen)


USER = ("text", "image", "document", "search_result", "container_upload")
USER_BLOCKS = blocks_of(sdk.BetaContentBlockParam, *USER)
ASSISTANT_BLOCKS = blocks_of(
    sdk.BetaContentBlockParam, *[f"-{kind}" for kind in (*USER, "tool_use", "tool_result")]
)
ASSISTANT_BLOCKS |= blocks_of(sdk.BetaContentBlockParam, "text")
CALLS = blocks_of(sdk.BetaContentBlockParam, "tool_use")
RESULTS = blocks_of(sdk.BetaContentBlockParam, "tool_result")
FIELDS = {
    name: values(hint)
    for name, hint in typing.get_type_hints(
        message_create_params.MessageCreateParamsNonStreaming, include_extras=True
    ).items()
    if name not in HEADERS | OWN
}


@st.composite
def conversations(draw: st.DrawFn) -> list[Json]:
    """A conversation that is well paired, ends with a user message, and may hold anything else."""
    messages: list[Json] = []
    results: list[Json] = []
    for number in range(draw(st.integers(0, 2))):
        blocks = [*results, *draw(st.lists(USER_BLOCKS, min_size=not results, max_size=2))]
        messages.append({"role": "user", "content": blocks})
        answer = draw(st.lists(ASSISTANT_BLOCKS, min_size=1, max_size=2))
        calls = draw(st.lists(CALLS, max_size=2))
        results = []
        for index, call in enumerate(calls):
            call["id"] = f"toolu_{number}_{index}"
            results.append({**draw(RESULTS), "tool_use_id": call["id"]})
        answer[1:1] = calls
        messages.append({"role": "assistant", "content": answer})
    blocks = [*results, *draw(st.lists(USER_BLOCKS, max_size=2))]
    messages.append({"role": "user", "content": [*blocks, text(RECORD)]})
    return messages


@st.composite
def requests(draw: st.DrawFn) -> tuple[Json, list[str]]:
    names = draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=4, unique=True))
    body = {name: draw(FIELDS[name]) for name in names}
    body["max_tokens"] = draw(st.integers(1, 64000))
    body["model"] = draw(st.sampled_from(["sonnet", "haiku", "claude-opus-4-1"]))
    body["messages"] = draw(conversations())
    system = draw(st.none() | STRINGS | st.lists(STRINGS.map(text), min_size=1, max_size=2))
    if system is not None:
        body["system"] = system
    for tool, number in zip(body.get("tools", []), range(9), strict=False):
        if "name" in tool:
            tool["name"] = f"tool_{number}"
    betas = draw(st.lists(st.sampled_from(["one-2026-01-01", "two-2026-02-02"]), unique=True))
    return body, betas


# ------------------------------------------------------------------------------------- the comparison


class Lab:
    """Two bridges in front of one stub: what one has warm, the other has to rebuild."""

    def __init__(self, stub: Stub, first: Server, second: Server) -> None:
        self.stub = stub
        self.bridges = (first, second)

    def compare(self, body: Json, betas: list[str]) -> set[str]:
        """Send a request straight, as a fresh turn, and one that continues it as a hot and as a
        rebuilt one."""
        found = self.compare_turn(body, betas, self.bridges[0], "new")
        answer = {"role": "assistant", "content": [text("ok")]}
        following = {"role": "user", "content": [text("and now"), text(RECORD)]}
        longer = {**body, "messages": [*body["messages"], answer, following]}
        found |= self.compare_turn(longer, betas, self.bridges[0], "hot")
        found |= self.compare_turn(longer, betas, self.bridges[1], "rebuilt")
        return found

    def compare_turn(self, body: Json, betas: list[str], bridge: Server, how: str) -> set[str]:
        assert post(self.stub.url, body, betas).status_code == 200
        sent = self.stub.last()
        response = post(bridge.url, body, betas)
        assert response.status_code == 200
        turn = response.headers["x-bridge-session"]
        assert turn.startswith("hot") == (how in ("hot", "in place")), turn
        told = response.headers.get("x-bridge-not-sent", "")
        found = Comparison(sent, self.stub.last(), how, told).check()
        for name in found & TOLD.keys():
            assert TOLD[name] in told, f"{name}: {told}"
        return found


# Of LOGINS; with more examples, those of a subscription are compared as well.
TRIED = ("key", "subscription-with-account")[: 1 + ("FIDELITY" in os.environ)]


@pytest.fixture(params=TRIED)
def lab(
    request: pytest.FixtureRequest,
    serve: Serve,
    cli: Path,
    stub: Stub,
    environment: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Lab:
    keep = log_in(LOGINS[request.param], environment, monkeypatch)
    return Lab(stub, *(serve(bin=cli, keep_env=keep) for _ in range(2)))


@pytest.mark.timeout(100_000)
def test_generated_requests_arrive_as_they_were_sent(lab: Lab) -> None:
    compared: set[str] = set()

    @settings(
        max_examples=EXAMPLES,
        derandomize="FIDELITY" not in os.environ,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(requests())
    def run(request: tuple[Json, list[str]]) -> None:
        compared.update(lab.compare(*request))

    run()
    assert compared


# ------------------------------------------------------------------------------------- written requests

TOOL = {"name": "look", "description": "Looks.", "input_schema": {"type": "object"}}
CACHED = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
# Each is in one request with one of WRITTEN_MESSAGES, as long as there are any.
WRITTEN_FIELDS: dict[str, Json] = {
    "tools of names that Claude Code has words about": {
        "tools": [
            {**TOOL, "name": name} for name in ("Bash", "Agent", "Task", "Skill", "ToolSearch")
        ]
    },
    "an output format of the older beta": {
        "output_format": {"type": "json_schema", "schema": {"type": "object"}}
    },
    "every effort": {"output_config": {"effort": "low"}},
    "no effort that the CLI knows": {"output_config": {"effort": "enormous"}},
    "fields of today": {
        "speed": "fast",
        "inference_geo": "us",
        "service_tier": "auto",
        "context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]},
        "thinking": {"type": "enabled", "budget_tokens": 9000, "display": "omitted"},
        "temperature": 1,
        "top_k": 4,
        "stop_sequences": ["END"],
    },
    "fields of tomorrow": {
        "tomorrow": {"deep": [1, None, {"a": "\u2028"}]},
        "null": None,
        "zero": 0,
    },
}
WRITTEN_MESSAGES: dict[str, list[Json]] = {
    "breakpoints inside a message": [
        {
            "role": "user",
            "content": [{**text("long"), **CACHED}, text("question"), text(RECORD)],
        }
    ],
    "a breakpoint at the end of an earlier message": [
        {"role": "user", "content": [{**text("long"), **CACHED}]},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": RECORD},
    ],
    "a system message": [
        {"role": "user", "content": "one"},
        {"role": "system", "content": [text("Be kind."), text("Be brief.")]},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": RECORD},
    ],
    "a history that begins with the assistant": [
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": [text(RECORD)]},
    ],
}


def test_written_requests_arrive_as_they_were_sent(lab: Lab) -> None:
    """In one test: each process that is started would cost more than the comparison."""
    plain = ("a plain message", [{"role": "user", "content": RECORD}])
    pairs = itertools.zip_longest(WRITTEN_FIELDS.items(), WRITTEN_MESSAGES.items(), fillvalue=plain)
    for (name, fields), (what, messages) in pairs:
        body = {"model": "sonnet", "max_tokens": 100, **fields, "messages": messages}
        with named(f"{name}, {what}"):
            lab.compare(body, ["one-2026-01-01", "inline-tools-2026-09-15"])


@contextlib.contextmanager
def named(what: object) -> Iterator[None]:
    """Say of a failure what it was about."""
    try:
        yield
    except AssertionError as error:
        error.add_note(f"in: {what}")
        raise


RESULTS_IN_PLACE: list[Json] = [
    {"content": "18C"},
    {"content": "no", "is_error": True},
    {"content": "yes", "is_error": False},
]
# These go by a transcript, which keeps them as they are.
RESULTS_REBUILT: list[Json] = [
    {"content": [text("18C"), IMAGE]},
    {"content": []},
    {},
]


def test_results_arrive_as_they_were_sent_in_place_and_rebuilt(lab: Lab) -> None:
    compare_results(lab, RESULTS_IN_PLACE, "in place")
    compare_results(lab, RESULTS_REBUILT, "rebuilt")


def compare_results(lab: Lab, given: list[Json], how: str) -> None:
    # Enough tokens for the stub's answer: after one that was cut off the CLI would ask again.
    body: Json = {"model": "claude-opus-4-1", "max_tokens": 10_000, "tools": [TOOL]}
    question = {"role": "user", "content": [text("USE_TOOL look INPUT={}END COUNT=3")]}
    answer = json.loads(post(lab.bridges[0].url, {**body, "messages": [question]}, []).read())
    calls = [block["id"] for block in answer["content"] if block["type"] == "tool_use"]
    results = [
        {"type": "tool_result", "tool_use_id": call, **result}
        for call, result in zip(calls, given, strict=True)
    ]
    said = {"role": "assistant", "content": answer["content"]}
    body["messages"] = [question, said, {"role": "user", "content": results}]
    lab.compare_turn(body, [], lab.bridges[0], how)
    lab.compare_turn(body, [], lab.bridges[1], "rebuilt")


def test_conversations_that_run_at_once_never_mix(
    lab: Lab, since: Callable[[], list[Json]]
) -> None:
    """Each with fields, betas, effort and tools of its own, two turns each, eight at a time."""
    efforts = ["low", "medium", "high"]

    def converse(number: int) -> None:
        betas = [f"beta-{number}"] if number % 2 else []
        body: Json = {
            "model": ["sonnet", "haiku"][number % 2],
            "max_tokens": 1000 + number,
            "system": f"System {number}.",
            "number": number,
            "messages": [{"role": "user", "content": f"SAY first of {number}"}],
        }
        if number % 3:
            body["output_config"] = {"effort": efforts[number % 3]}
            body["tools"] = [
                {"name": f"tool_{number}", "input_schema": {"type": "object", "title": f"{number}"}}
            ]
        for turn in range(2):
            answer = json.loads(post(lab.bridges[0].url, {**body, "turn": turn}, betas).read())
            assert answer["content"] == [text(f"{['first', 'second'][turn]} of {number}")]
            body["messages"] += [
                {"role": "assistant", "content": answer["content"]},
                {"role": "user", "content": f"SAY second of {number}"},
            ]

    with ThreadPoolExecutor(8) as executor:
        list(executor.map(converse, range(AT_ONCE)))
    rows = since()
    assert len(rows) == 2 * AT_ONCE
    for row in rows:
        body = row["body"]
        number = body["number"]
        own = [name for name in betas_of(row) if name.startswith("beta-")]
        assert own == ([f"beta-{number}"] if number % 2 else [])
        assert body["max_tokens"] == 1000 + number
        assert body["system"][-1]["text"].endswith(f"System {number}.")
        effort = body.get("output_config", {}).get("effort")
        if number % 3:
            assert effort == efforts[number % 3] or (effort is None and "haiku" in body["model"])
            assert [tool["name"] for tool in body["tools"]] == [f"tool_{number}"]
        else:
            assert (effort or "high", body["tools"]) == ("high", [])
        texts = [block["text"] for message in arrived(body) for block in message["content"]]
        mine = [words for words in texts if " of " in words and "<system-reminder>" not in words]
        assert len(mine) == 1 + 2 * body["turn"]
        assert all(words.endswith(f" of {number}") for words in mine)


def test_a_beta_is_of_its_own_request_alone(lab: Lab, since: Callable[[], list[Json]]) -> None:
    """The CLI keeps the list of its first call, so another list is another process."""
    messages: list[Json] = [{"role": "user", "content": "SAY x"}]
    turns = []
    for betas in (["one-2026-01-01"], ["one-2026-01-01"], ["two-2026-02-02"], []):
        body = {"model": "sonnet", "max_tokens": 100, "messages": messages}
        response = post(lab.bridges[0].url, body, betas)
        turns.append(response.headers["x-bridge-session"])
        answer = {"role": "assistant", "content": json.loads(response.read())["content"]}
        messages = [*messages, answer, {"role": "user", "content": "SAY x"}]
    arrived_betas = [
        [name for name in betas_of(row) if name.endswith(("-01-01", "-02-02"))] for row in since()
    ]
    assert turns == ["new", "hot", "rebuilt; reason=betas-changed", "rebuilt; reason=betas-changed"]
    wanted = [["one-2026-01-01"], ["one-2026-01-01"], ["two-2026-02-02"], []]
    assert [
        [name for name in betas if name.startswith(("one", "two"))] for betas in arrived_betas
    ] == wanted


@pytest.mark.parametrize("words", ["SEARCH", "SEARCH PAUSED", "TOMORROW"])
def test_blocks_that_the_cli_does_not_know_arrive_as_the_api_sent_them(
    lab: Lab, words: str
) -> None:
    """Streamed and whole alike; in the next turn the API gets them back unchanged.

    That turn is hot unless a delta was new: the CLI may not know how to add it to its block.
    """
    body: Json = {"model": "claude-opus-4-1", "max_tokens": 100}
    body["messages"] = [{"role": "user", "content": words}]
    straight = json.loads(post(lab.stub.url, body, []).read())
    whole = json.loads(post(lab.bridges[0].url, body, []).read())
    response = post(lab.bridges[1].url, {**body, "stream": True}, [])
    streamed = assembled(response.read().decode())
    for answer in (whole, streamed):
        assert answer["content"] == straight["content"]
        assert answer["stop_reason"] == straight["stop_reason"]
    for key in whole.keys() - {"id"}:
        assert whole[key] == streamed[key], key
    question = {"role": "user", "content": [text(RECORD)]}
    said = {"role": "assistant", "content": whole["content"]}
    longer = {**body, "messages": [*body["messages"], said, question]}
    lab.compare_turn(longer, [], lab.bridges[0], "rebuilt" if words == "TOMORROW" else "hot")


def assembled(stream: str) -> Json:
    """The message of a stream, by the API's grammar alone: the SDK drops what it does not know."""
    message: Json = {}
    pieces: list[str] = []
    for row in stream.splitlines():
        if not row.startswith("data: "):
            continue
        event = json.loads(row.removeprefix("data: "))
        if event["type"] == "message_start":
            message = event["message"]
        elif event["type"] == "content_block_start":
            message["content"].append(event["content_block"])
            pieces = []
        elif event["type"] == "content_block_delta":
            add_delta(message["content"][-1], event["delta"], pieces)
        elif event["type"] == "message_delta":
            message.update(event["delta"])
            message["usage"].update(event["usage"])
            message.update({key: event[key] for key in event.keys() - {"type", "delta", "usage"}})
    return message


def add_delta(block: Json, delta: Json, pieces: list[str]) -> None:
    if delta["type"] == "text_delta":
        block["text"] += delta["text"]
    elif delta["type"] == "citations_delta":
        block.setdefault("citations", []).append(delta["citation"])
    elif delta["type"] == "input_json_delta":
        pieces.append(delta["partial_json"])
        with contextlib.suppress(json.JSONDecodeError):
            block["input"] = json.loads("".join(pieces))
    else:
        block.update((key, value) for key, value in delta.items() if key != "type")
