"""The prompt cache of the API: what a continued conversation, and one that is built anew, have in
common with the request before, byte for byte.  The stub refuses breakpoints as the API does."""

import asyncio
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import first_party
import pytest
from client import Answer, Client, Json, arrived, count, request_body, sent, text
from host import wait_until
from installed import CLIS
from judge import Refused, judge
from processes import in_pool, soon
from servers import Serve, Server
from stubs import Stub
from test_fidelity import betas_of
from test_logins import LOGINS, Login, log_in, login_headers

from sessions import ANNOUNCES, QUIET_IF_BARE, Cli, Kind, Pool
from translate import BILLING_LINE

MODEL = "claude-sonnet-5-5"
TOOL = {"name": "probe", "description": "d", "input_schema": {"type": "object"}}
RESULTS: list[Json] = [
    {"content": "ok"},
    {"content": [text("one"), text("two")], "is_error": False},
    {"content": "no", "is_error": True},
]


@dataclass
class Bridges:
    """Bridges with one login and one CLI, in front of an API that judges."""

    login: Login
    start: Serve
    stub: Stub
    has_bare_mode: bool  # nothing is added to what the client sent
    is_announced: bool  # the CLI adds what it announces
    seen: int

    def bodies(self) -> list[Json]:
        """The API's requests for a message since the last look."""
        rows = self.stub.log(self.seen)
        self.seen += len(rows)
        return [row["body"] for row in rows if "count_tokens" not in row["path"]]

    def body(self, answer: Answer, how: str) -> Json:
        """The one request that came of an answer, which was hot, new or rebuilt."""
        assert (answer.status, answer.headers.get("x-bridge-not-sent")) == (200, None), answer.body
        assert answer.session.partition(";")[0] == how
        [body] = self.bodies()
        return body


@pytest.fixture(scope="module")
def judging() -> Iterator[Stub]:
    with Stub("--judge") as running:
        yield running


@pytest.fixture(params=["key", "subscription-with-account"])
def bridges(
    request: pytest.FixtureRequest,
    serve: Serve,
    cli: Path,
    environment: Path,
    judging: Stub,
    monkeypatch: pytest.MonkeyPatch,
) -> Bridges:
    return make_bridges(request.param, serve, cli, environment, judging, monkeypatch)


def make_bridges(
    name: str,
    serve: Serve,
    cli: Path,
    home: Path,
    judging: Stub,
    monkeypatch: pytest.MonkeyPatch,
) -> Bridges:
    monkeypatch.setenv("ANTHROPIC_BASE_URL", judging.url)
    keep = log_in(LOGINS[name], home, monkeypatch)

    def start(**settings: Any) -> Server:
        return serve(bin=cli, keep_env=keep, setting_sources=LOGINS[name].sources, **settings)

    [version] = [version for version, path in CLIS.items() if path == cli]
    known = Cli(version=version)
    has_bare_mode = known.is_at_least(QUIET_IF_BARE) and "x-api-key" in LOGINS[name].headers
    is_announced = known.is_at_least(ANNOUNCES) and not has_bare_mode
    return Bridges(LOGINS[name], start, judging, has_bare_mode, is_announced, len(judging.log()))


# An API request as its prompt cache compares it.


def pieces(body: Json, *, marks: bool = False) -> list[str]:
    """Tools, system prompt and each message, without the breakpoints unless these count too."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: plain(inner) for key, inner in value.items() if marks or key != "cache_control"
            }
        return [plain(inner) for inner in value] if isinstance(value, list) else value

    system = body["system"]
    if first_party.IS_ON:
        # The first text has an id of each request; the API reads it, and no model.
        billing, *system = system
        assert billing["text"].startswith(BILLING_LINE)
    return [json.dumps(plain(part)) for part in (body.get("tools"), system, *body["messages"])]


def share(earlier: Json, later: Json) -> float:
    """The share of the earlier request that the later one begins with: it can be read again."""
    old, new = "\n".join(pieces(earlier)), "\n".join(pieces(later))
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(old, new, strict=False))
    return len(list(same)) / len(old)


def controls(body: Json) -> list[tuple[str, Json]]:
    """Each breakpoint with the text, or name, that it stands on."""
    found = []
    blocks = [*(body.get("tools") or []), *body["system"]]
    for message in body["messages"]:
        blocks += message["content"] if isinstance(message["content"], list) else []
    for block in blocks:
        if "cache_control" in block:
            found.append((block.get("text") or block.get("name"), block["cache_control"]))
    return found


def added(body: Json) -> list[tuple[int, str]]:
    """The messages that the CLI adds, and their places."""
    return [
        (number, message["content"])
        for number, message in enumerate(body["messages"])
        if message["role"] == "system"
    ]


def check_added(bridges: Bridges, bodies: list[Json], conversations: list[list[Any]]) -> None:
    """With a key a new CLI adds nothing; else it says the same once, after the first message."""
    if bridges.has_bare_mode:
        for body, messages in zip(bodies, conversations, strict=True):
            assert as_blocks(body) == sent(messages)
        return
    firsts = {json.dumps(added(body)) for body in bodies}
    assert len(firsts) == 1
    if not bridges.is_announced:
        assert added(bodies[0]) == []
        return
    [(place, said)] = added(bodies[0])
    words = said if isinstance(said, str) else said[0]["text"]
    assert (place, words.splitlines()[0]) == (1, "# Environment")


def as_blocks(body: Json) -> list[Json]:
    """The messages of a request, all of them, without breakpoints."""
    found = []
    for piece in pieces(body)[2:]:
        message = json.loads(piece)
        content = message["content"]
        found.append(
            {**message, "content": [text(content)] if isinstance(content, str) else content}
        )
    return found


# conversations


def talk(client: Client, turns: int, **fields: Any) -> tuple[list[Any], list[Answer]]:
    """A conversation whose last message is an answer."""
    history: list[Any] = []
    answers = []
    for number in range(turns):
        history.append(f"SAY {number} " + "x" * 100)
        answers.append(client.post(history, model=MODEL, **fields))
        history.append({"role": "assistant", "content": answers[-1].json["content"]})
    return history, answers


@pytest.mark.parametrize("bridges", ["subscription-with-account"], indirect=True)
def test_a_spare_that_is_set_up_as_the_last_conversation_began_asks_what_a_fresh_one_asks(
    bridges: Bridges,
) -> None:
    fields: Json = {"system": "Be terse.", "tools": [TOOL], "model": MODEL}
    server = bridges.start(spares=2)
    assert server.bridge
    pool = server.bridge.pool
    for number in range(2):
        bridges.body(server.post(f"SAY {number}", **fields), "new")
        wait_until(lambda: pool.starter.spares and not pool.starter.starting, "the spares")
    wait_until(lambda: any(spare.parts for spare in pool.starter.spares), "a spare that is set up")
    [ahead] = [spare for spare in pool.starter.spares if spare.parts]
    alike = bridges.body(server.post("SAY this", **fields), "new")
    assert ahead.turns == 1
    fresh = bridges.body(bridges.start().post("SAY this", **fields), "new")
    assert pieces(alike, marks=True) == pieces(fresh, marks=True)


@pytest.mark.parametrize("bridges", ["subscription-with-account"], indirect=True)
def test_one_process_says_of_each_listed_model_what_a_process_that_runs_it_says(
    bridges: Bridges,
) -> None:
    """So that a first request for a model need not wait, after one for another model."""
    config = bridges.start().bridge.config
    found: list[Json] = []

    def ask(model: str) -> None:
        async def use(pool: Pool) -> None:
            await pool.inspector.look()
            assert await pool.inspector.announcements_for(model, Kind()) or not bridges.is_announced
            found.append({name: said for (name, *_), said in pool.cli.announcements.items()})

        in_pool(use, bin=config.bin, keep_env=config.keep_env)

    ask("sonnet")
    models = list(found[0])
    assert len(models) > 1 or not bridges.is_announced
    for number, model in enumerate(models[1:], start=1):
        ask(model)
        assert found[number][model] == found[0][model]
    assert bridges.bodies() == []


@pytest.mark.parametrize("bridges", ["subscription-with-account"], indirect=True)
@pytest.mark.parametrize("change", ["account", "login"])
def test_what_changes_while_the_cli_is_asked_what_it_announces_puts_nothing_in_another_place(
    bridges: Bridges, environment: Path, change: str
) -> None:
    """Another process may report another account; another login is another Cli."""
    config = bridges.start().bridge.config

    async def use(pool: Pool) -> None:
        cli = await pool.inspector.look()
        if change == "account":
            asked = asyncio.create_task(pool.inspector.announcements_for("sonnet", Kind()))
            await soon(lambda: cli.announcements or asked.done())
            cli.info = replace(cli.info, account={"email": "other"})
        else:
            async with pool.inspector.announcing:
                asked = asyncio.create_task(
                    pool.inspector.announcements_for("claude-opus-4-8", Kind())
                )
                await asyncio.sleep(0)
                os.utime(environment / ".claude/.credentials.json")
                assert await pool.inspector.look() is not cli
        assert await asked or not bridges.is_announced
        for (name, *_), said in pool.cli.announcements.items():
            [model] = [item["identity"]["modelId"] for item in said if item["type"] == "model"]
            assert model == name
        assert len({tuple(now) for _, *now in pool.cli.announcements}) <= 1

    in_pool(use, bin=config.bin, keep_env=config.keep_env)


def test_the_question_for_announcements_does_not_reach_an_api_of_the_users_settings(
    serve: Serve,
    cli: Path,
    environment: Path,
    judging: Stub,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A gateway on loopback, as people set it for the CLI itself: each call of it may be billed."""
    for name in ("ANTHROPIC_BASE_URL", "ANTHROPIC_API_KEY"):
        monkeypatch.delenv(name)
    env = {
        "ANTHROPIC_BASE_URL": judging.url,
        "ANTHROPIC_AUTH_TOKEN": "sk-gateway",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    settings = environment / ".claude" / "settings.json"
    settings.parent.mkdir(exist_ok=True)
    settings.write_text(json.dumps({"env": env}))
    seen = len(judging.log())
    assert serve(bin=cli, keep_env=(), setting_sources="user").post("SAY hi", model=MODEL).text
    [asked] = [row["body"] for row in judging.log(seen) if "count" not in row["path"]]
    assert "SAY hi" in json.dumps(asked["messages"])


def check_conversation(bridges: Bridges) -> None:
    fields: Json = {"system": "Be terse.", "tools": [TOOL], "model": MODEL}
    server = bridges.start()
    history, answers = talk(server, 3, system="Be terse.", tools=[TOOL])
    assert [answer.session for answer in answers] == ["new", "hot", "hot"]
    hot = bridges.bodies()
    conversations = [history[:1], history[:3], history[:5]]
    assert [share(*pair) for pair in itertools.pairwise(hot)] == [1.0, 1.0]

    # A restart: the same request, and the next one.
    restarted = bridges.start()
    again = bridges.body(restarted.post(history[:5], **fields), "rebuilt")
    assert pieces(again, marks=True) == pieces(hot[2], marks=True)
    following = [*history, "SAY what follows"]
    after = bridges.body(bridges.start().post(following, **fields), "rebuilt")
    assert share(hot[2], after) == 1.0

    # A fork: one branch is continued, the other one is built anew.
    other = [*history, "SAY another branch"]
    continued = bridges.body(server.post(following, **fields), "hot")
    assert pieces(continued, marks=True) == pieces(after, marks=True)
    branch = bridges.body(server.post(other, **fields), "rebuilt")
    assert share(hot[2], branch) == 1.0

    # An edit: all that is before it.
    edited = [*history[:2], "SAY edited", *history[3:4], "SAY go on"]
    rewritten = bridges.body(server.post(edited, **fields), "rebuilt")
    before = len(pieces(hot[0])) + 1
    assert pieces(rewritten)[:before] == pieces(hot[2])[:before]
    assert share(hot[0], rewritten) == 1.0

    check_added(
        bridges,
        [*hot, again, after, continued, branch, rewritten],
        [*conversations, history[:5], following, following, other, edited],
    )


def test_whether_continued_rebuilt_forked_or_edited_the_cache_reads_all_that_was_there(
    bridges: Bridges,
) -> None:
    check_conversation(bridges)


def test_with_a_key_from_a_helper_the_cache_reads_all_that_was_there(
    serve: Serve,
    environment: Path,
    judging: Stub,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not CLIS:
        pytest.skip("no CLI is installed")
    cli = next(iter(CLIS.values()))
    check_conversation(make_bridges("key-helper", serve, cli, environment, judging, monkeypatch))


def test_a_conversation_whose_process_is_evicted_after_each_answer_is_read_from_the_cache(
    bridges: Bridges,
) -> None:
    history, answers = talk(bridges.start(max_idle=0), 3, system="Be terse.")
    assert [answer.session for answer in answers] == ["new", *["rebuilt; reason=evicted"] * 2]
    evicted = bridges.bodies()
    assert [share(*pair) for pair in itertools.pairwise(evicted)] == [1.0, 1.0]
    check_added(bridges, evicted, [history[:1], history[:3], history[:5]])


def test_tool_results_have_the_same_bytes_in_place_and_in_a_fresh_process(
    bridges: Bridges,
) -> None:
    fields: Json = {"tools": [TOOL], "model": MODEL}
    messages: list[Any] = ['USE_TOOL probe INPUT={"a":1}END COUNT=3']
    server = bridges.start()
    answer = server.post(messages, **fields)
    called = bridges.body(answer, "new")
    content = answer.json["content"]
    calls = [block["id"] for block in content if block["type"] == "tool_use"]
    results = [
        {"type": "tool_result", "tool_use_id": call, **more}
        for call, more in zip(calls, RESULTS, strict=True)
    ]
    messages += [{"role": "assistant", "content": content}, {"role": "user", "content": results}]
    in_place = bridges.body(server.post(messages, **fields), "hot")
    rebuilt = bridges.body(bridges.start().post(messages, **fields), "rebuilt")
    assert share(called, in_place) == 1.0
    assert pieces(in_place, marks=True) == pieces(rebuilt, marks=True)
    assert len({json.dumps(added(body)) for body in (called, in_place, rebuilt)}) == 1


# breakpoints


def marked(value: str, ttl: str) -> Json:
    control = {"type": "ephemeral", **({"ttl": ttl} if ttl else {})}
    return {**text(value), "cache_control": control}


def marks_sent(messages: list[Json]) -> list[tuple[str, Json]]:
    blocks = [block for message in messages for block in message["content"]]
    return [(block["text"], block["cache_control"]) for block in blocks if "cache_control" in block]


@pytest.mark.parametrize("ttl", ["", "1h"])
def test_a_marked_document_in_the_first_message_is_the_only_mark_over_five_hot_turns(
    bridges: Bridges, ttl: str
) -> None:
    server = bridges.start()
    document = marked("a document " * 50, ttl)
    history: list[Json] = [{"role": "user", "content": [document, text("SAY 0")]}]
    bodies: list[Json] = []
    for number in range(5):
        answer = server.post(history, model=MODEL, system="Be terse.")
        bodies.append(bridges.body(answer, "hot" if number else "new"))
        assert controls(bodies[-1]) == marks_sent(history)
        history.append({"role": "assistant", "content": answer.json["content"]})
        history.append({"role": "user", "content": [text(f"SAY {number + 1}")]})
    assert [share(*pair) for pair in itertools.pairwise(bodies)] == [1.0] * 4


def test_marks_that_a_client_moves_on_arrive_where_it_put_them_over_five_turns(
    bridges: Bridges,
) -> None:
    """Two documents in the first message, and the last two messages of the user: a process holds
    the marks it was given, so where one is taken away the conversation is built anew."""
    server = bridges.start()
    documents = [marked("a document " * 50, "1h"), marked("another one " * 50, "1h")]
    history: list[Json] = [{"role": "user", "content": [*documents, text("SAY 0")]}]
    bodies: list[Json] = []
    for number, how in enumerate(["new", "hot", "hot", "rebuilt", "rebuilt"]):
        answer = server.post(history, model=MODEL)
        bodies.append(bridges.body(answer, how))
        assert controls(bodies[-1]) == marks_sent(history)
        assert len(controls(bodies[-1])) == min(number + 2, 4)
        if number > 1:
            history[-3] = {"role": "user", "content": [text(f"SAY {number - 1}")]}
        history.append({"role": "assistant", "content": answer.json["content"]})
        history.append({"role": "user", "content": [marked(f"SAY {number + 1}", "5m")]})
    assert [share(*pair) for pair in itertools.pairwise(bodies)] == [1.0] * 4


@pytest.mark.parametrize(("number", "ttl"), [(1, "5m"), (1, "1h"), (2, ""), (4, "5m")])
def test_marks_on_tools_arrive_and_with_the_clis_own_the_api_takes_them(
    bridges: Bridges, number: int, ttl: str
) -> None:
    """The CLI of a subscription marks for an hour, which must not come after five minutes."""
    names = [f"probe{index}" for index in range(number)]
    control = marked("", ttl)["cache_control"]
    fields: Json = {
        "tools": [{**TOOL, "name": name, "cache_control": control} for name in names],
        "system": "Be terse.",
        "model": MODEL,
    }
    server = bridges.start()
    first = server.post("SAY one", **fields)
    bodies = [bridges.body(first, "new")]
    bodies.append(bridges.body(server.post(["SAY one", first.text, "SAY two"], **fields), "hot"))
    for body in bodies:
        found = controls(body)
        assert found[:number] == [(name, control) for name in names]
        assert len(found) <= 4


# each login

BETAS = ["files-api-2025-04-14", "no-such-beta-2026-01-01"]
SYSTEM = [text("Be  terse.\n"), {**text("And kind."), "cache_control": {"type": "ephemeral"}}]


@pytest.mark.parametrize(
    "name", ["subscription-with-account", "key", "key-helper", "token-of-setup-token", "foundry"]
)
def test_with_each_login_the_same_arrives(
    serve: Serve,
    cli: Path,
    environment: Path,
    judging: Stub,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    bridges = make_bridges(name, serve, cli, environment, judging, monkeypatch)
    before = bridges.seen
    fields: Json = {"system": SYSTEM, "tools": [TOOL], "model": MODEL}

    def ask(server: Server, messages: list[Any], how: str) -> tuple[list[Json], Json]:
        """What is answered, and what arrived."""
        headers = {"anthropic-beta": ",".join(BETAS)}
        request = request_body(messages, **fields)
        answer = server.call("POST", "/v1/messages", request, headers)
        return answer.json["content"], bridges.body(answer, how)

    server = bridges.start()
    messages: list[Any] = ['USE_TOOL probe INPUT={"a":1}END']
    content, called = ask(server, messages, "new")
    result = {"type": "tool_result", "tool_use_id": content[-1]["id"], "content": [text("ok")]}
    messages += [{"role": "assistant", "content": content}, {"role": "user", "content": [result]}]
    content, in_place = ask(server, messages, "hot")
    longer = [*messages, {"role": "assistant", "content": content}, "SAY more"]
    _, hot = ask(server, longer, "hot")
    restarted = bridges.start()
    _, rebuilt = ask(restarted, longer, "rebuilt")
    _, result_rebuilt = ask(restarted, messages, "rebuilt")
    assert pieces(rebuilt, marks=True) == pieces(hot, marks=True)
    assert pieces(result_rebuilt, marks=True) == pieces(in_place, marks=True)
    assert (share(called, in_place), share(in_place, hot)) == (1.0, 1.0)
    bodies = [called, in_place, hot, rebuilt, result_rebuilt]
    conversations = [messages[:1], messages, longer, longer, messages]
    check_added(bridges, bodies, conversations)
    for body, sent_ones in zip(bodies, conversations, strict=True):
        assert arrived(body) == sent(sent_ones)
        assert [block["text"] for block in body["system"][2:]] == ["Be  terse.\n\n\nAnd kind."]
        assert len(controls(body)) <= 4
        [tool] = body["tools"]
        assert {key: tool[key] for key in TOOL} == TOOL

    rows = judging.log(before)
    assert all(login_headers(row) == LOGINS[name].headers for row in rows)
    for row in rows:
        if row["path"] == "/v1/messages":
            assert [beta for beta in betas_of(row) if beta in BETAS] == BETAS


def test_a_count_is_also_of_the_system_prompt_and_the_tools(bridges: Bridges) -> None:
    server, stub = bridges.start(), bridges.stub
    asked: list[Json] = [{}, {"system": SYSTEM}, {"tools": [TOOL]}]
    counts, texts = [], []
    for more in asked:
        seen = len(stub.log())
        counts.append(count(server, "hi", model=MODEL, **more).json["input_tokens"])
        texts.append(json.dumps([row["body"] for row in stub.log(seen)]))
    assert counts[0] < min(counts[1:])
    assert ["kind." in arrived_ones for arrived_ones in texts] == [False, True, False]
    assert ['"probe"' in arrived_ones for arrived_ones in texts] == [False, False, True]
    assert all(login_headers(row) == bridges.login.headers for row in stub.log(bridges.seen))


# the judge


def judged(*messages: Json, **fields: Any) -> str:
    """What the API says against a request; empty: nothing."""
    try:
        judge({"model": MODEL, "max_tokens": 9, "messages": list(messages), **fields})
    except Refused as refused:
        return str(refused)
    return ""


def test_the_judge_refuses_breakpoints_and_empty_messages_as_the_api_does() -> None:
    user = {"role": "user", "content": [marked("a", "5m"), marked("b", "")]}
    hour, two = marked("", "1h")["cache_control"], [marked("s", "1h"), marked("t", "1h")]
    tool = {**TOOL, "cache_control": hour}
    assert judged(user, system=two) == ""
    assert judged(user, system=two, tools=[tool]).endswith("may be provided. Found 5.")
    assert judged(user, system=two, cache_control={"type": "ephemeral"}).endswith("Found 5.")
    inner = {"type": "tool_result", "tool_use_id": "t", "content": two}
    assert "must not come after" in judged(user, {"role": "user", "content": [inner]})
    assert "must not come after" in judged(user, cache_control=hour)
    tool["cache_control"] = {"type": "ephemeral"}
    assert "must not come after" in judged(user, system=two[:1], tools=[tool])
    for empty in ("", []):
        words = "messages.0: all messages must have non-empty content"
        assert judged({"role": "user", "content": empty}).startswith(words)
        assert judged({"role": "assistant", "content": empty}, user).startswith(words)
        assert judged(user, {"role": "assistant", "content": empty}) == ""
