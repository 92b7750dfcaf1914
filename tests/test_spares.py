"""Processes that are started ahead of need: for whom, how many, and for how long."""

import asyncio
import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from client import Answer, prime, request_body
from host import STANDIN, wait_until
from processes import alive, in_pool, kill, open_gate, pid, pool_of, soon, take_turn
from servers import Launch, Serve, Server, plain_cli
from stand_in import Log

import sessions
from sessions import Cli, Kind, Pool, Session, State, identify_file
from translate import CliInfo, parse_request


def ready(server: Server) -> list[int]:
    """The spares, by process id, the oldest first; they wait at their gates and say nothing."""
    assert server.bridge
    return [spare.process.pid for spare in list(server.bridge.pool.starter.spares)]


def spare(server: Server, *but: int) -> int:
    """Wait for a spare that is none of `but`."""
    wait_until(lambda: [number for number in ready(server) if number not in but], "a spare")
    return next(number for number in ready(server) if number not in but)


def model(log: Log, number: int) -> str:
    """What a process was started with; empty: it takes any."""
    wait_until(lambda: number in log.started(), "its start")
    argv: list[str] = log.started()[number]["argv"]
    return argv[argv.index("--model") + 1] if "--model" in argv else ""


def started(server: Server) -> None:
    """Wait until the spares are there that were asked for, and unwanted processes are gone."""
    assert server.bridge
    pool = server.bridge.pool
    wait_until(lambda: not pool.starter.starting and not pool.room.ending, "the spares")


@pytest.fixture
def primed(serve: Serve) -> Serve:
    """Bridges that have been asked for a model, and have started all spares for it."""

    def start(**settings: Any) -> Server:
        server = serve(**settings)
        for _ in range(settings["spares"]):
            prime(server)
            started(server)
        return server

    return start


def test_spares_start_once_the_cli_has_listed_its_models_and_taking_one_starts_the_next(
    serve: Serve, log: Log
) -> None:
    server = serve(spares=1)
    assert not server.processes()  # one that started now would slow a first request down
    assert server.call("GET", "/v1/models").status == 200
    first = spare(server)
    answer = server.post(model="haiku", system="be brief")
    assert (pid(answer), answer.session, model(log, first)) == (first, "new", "")
    assert log.lines(first)[0]["request"]["systemPrompt"] == ["be brief"]
    second = spare(server, first)
    assert pid(server.post("another", model="haiku")) == second


def test_one_spare_serves_every_model_of_the_cli(primed: Serve, log: Log) -> None:
    server = primed(spares=1)
    used: list[int] = []
    for name in ("opus", "haiku", "claude-sonnet-5-5", "opus"):
        waiting = spare(server, *used)
        answer = server.post(f"hi {len(used)}", model=name)
        family = name.removeprefix("claude-").split("-")[0]
        assert (pid(answer), answer.message["model"]) == (waiting, f"claude-{family}-5-5")
        assert model(log, waiting) == ""
        used.append(waiting)


def test_a_model_that_the_cli_does_not_list_gets_spares_of_its_own(primed: Serve, log: Log) -> None:
    server = primed(spares=1)
    [first] = ready(server)
    answer = server.post(model="claude-old-1")
    assert (answer.status, pid(answer) == first) == (200, False)
    assert model(log, pid(answer)) == "claude-old-1"
    second = spare(server, first)
    assert model(log, second) == "claude-old-1"
    assert pid(server.post("another", model="claude-old-1")) == second


def test_no_other_model_answers_than_the_one_that_was_asked(
    primed: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CLI that lists a model, and runs its default in place of it, in silence."""
    monkeypatch.setenv("STANDIN_DEAF_TO_MODELS", "1")
    answer = primed(spares=1).post(model="haiku")
    assert answer.status == 502
    assert answer.json["error"]["message"].endswith("instead of claude-haiku-5-5")


def test_a_rebuilt_conversation_takes_the_spare(primed: Serve, log: Log) -> None:
    server = primed(spares=1)
    [waiting] = ready(server)
    answer = server.post(["one", "two", "three"])
    assert (pid(answer), answer.text) == (waiting, "echo: three; 3 messages")


def test_agents_take_the_spare_of_their_mode(serve: Serve, log: Log, tmp_path: Path) -> None:
    server = serve(spares=2, tools="default", cwd=str(tmp_path))
    tool = {"name": "t", "input_schema": {"type": "object"}}
    prime(server, tools=[tool])  # a client that brings tools gets a plain model
    wait_until(lambda: len(ready(server)) == 2, "the first ones, which are for a plain model")
    first = ready(server)
    assert pid(server.post()) not in first
    agent = spare(server, *first)
    wait_until(lambda: agent in log.started(), "what the agent was started with")
    assert "default" in log.started()[agent]["argv"]
    assert pid(server.post("tools", tools=[tool])) in first
    assert pid(server.post("another")) == agent


def test_a_hot_turn_takes_no_spare(serve: Serve) -> None:
    server = serve(spares=1)
    first = server.post()
    waiting = spare(server)
    assert server.post(["hello", first.text, "more"]).session == "hot"
    assert ready(server) == [waiting]


def test_spares_follow_the_models_that_are_asked_for(primed: Serve, log: Log) -> None:
    server = primed(spares=1)
    [first] = ready(server)
    server.post(model="old-1")
    other = spare(server, first)
    wait_until(lambda: not alive(first), "the end of the spare that nobody asked for")
    assert model(log, other) == "old-1"
    assert pid(server.post("2", model="old-1")) == other


def test_several_spares_are_shared_among_the_models(serve: Serve, log: Log) -> None:
    server = serve(spares=2)
    for number in range(2):
        for name in ("old-1", "haiku"):
            server.post(f"{number}", model=name)
            started(server)
    assert sorted(model(log, number) for number in ready(server)) == ["", "old-1"]


def test_a_spare_that_died_is_given_to_nobody(primed: Serve) -> None:
    server = primed(spares=1)
    [dead] = ready(server)
    kill(dead)
    answer = server.post()
    assert (answer.status, answer.session) == (200, "new")
    assert pid(answer) != dead
    assert spare(server, dead)


def test_a_spare_that_ended_comes_back_only_for_a_request(primed: Serve, log: Log) -> None:
    server = primed(spares=1)
    kill(spare(server))
    started = set(log.started())
    wait_until(lambda: not ready(server), "the end of the spare")
    wait_until(lambda: server.bridge and not server.bridge.pool.room.sessions, "its reaping")
    assert set(log.started()) == started


def test_a_spare_that_aged_out_comes_back_only_for_a_new_conversation(
    primed: Serve, gate: Path, log: Log, background: ThreadPoolExecutor
) -> None:
    server = primed(spares=2, session_ttl_secs=60)
    running = background.submit(server.post, "PAUSE-START")
    wait_until(lambda: log.got("PAUSE-START"), "the turn")
    assert server.bridge
    pool = server.bridge.pool
    started(server)
    (left,) = pool.starter.spares
    left.state_since -= 60
    wait_until(lambda: not alive(left.process.pid), "its end")
    gate.touch()
    first = running.result()
    wait_until(lambda: len(ready(server)) == 2, "those that the new conversation asks for")
    for waiting in pool.starter.spares:
        waiting.state_since -= 60
    wait_until(lambda: not pool.starter.spares, "their end")
    assert server.post(["PAUSE-START", first.text, "more"]).session == "hot"
    assert not [*pool.starter.spares, *pool.starter.starting]


def test_nobody_makes_room_for_a_spare(
    serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor
) -> None:
    server = serve(spares=3, max_sessions=2)
    first = server.post("one")
    waiting = spare(server)
    busy = background.submit(server.post, "PAUSE")
    wait_until(lambda: log.got("PAUSE"), "the second")
    assert log.got("PAUSE") == waiting
    started(server)
    assert len(server.processes()) == 2
    assert server.post(["one", first.text, "more"]).session == "hot"
    gate.touch()
    busy.result()


@pytest.mark.parametrize("asked", ["sonnet", "old-1"])
def test_a_spare_makes_room_for_a_request_and_no_conversation_does(
    primed: Serve, asked: str
) -> None:
    server = primed(spares=2, max_sessions=3)
    first = server.post("one")
    started(server)
    waiting = ready(server)
    assert len(waiting) == 2
    answer = server.post("two", model=asked)
    assert (answer.status, answer.session) == (200, "new")
    assert (pid(answer) in waiting) == (asked == "sonnet")
    assert server.post(["one", first.text, "more"]).session == "hot"


def test_a_spare_that_is_being_started_makes_room_for_a_request(
    primed: Serve, gate: Path, log: Log, background: ThreadPoolExecutor
) -> None:
    server = primed(spares=1, max_sessions=2)
    assert server.bridge
    pool = server.bridge.pool
    busy = background.submit(server.post, "PAUSE", stream=True)
    wait_until(
        lambda: pool.starter.starting or (pool.starter.spares and log.got("PAUSE")),
        "the start of the next",
    )
    assert server.post(model="opus").status == 200
    gate.touch()
    assert busy.result().status == 200


def test_with_room_for_one_process_the_start_still_finds_out_who_is_logged_in(
    launch: Launch,
) -> None:
    program = launch(CLAUDE_CLI_SPARES="1", CLAUDE_CLI_MAX_SESSIONS="1")
    wait_until(
        lambda: any("logged in: stand-in" in line for line in program.lines), "the login state"
    )


def test_spares_that_are_still_starting_end_with_the_bridge(serve: Serve, gate: Path) -> None:
    server = serve(spares=3)
    prime(server)
    server.close()
    assert not server.processes()
    server = serve(spares=3)
    prime(server)
    spare(server)
    server.close()
    assert not server.processes()


def test_a_request_takes_a_spare_that_is_still_starting(primed: Serve) -> None:
    server = primed(spares=1)
    assert server.bridge
    [session] = server.bridge.pool.starter.spares
    # It has said nothing, and will not before it has its conversation.
    assert not session.process.has_spoken
    assert pid(server.post()) == session.process.pid


def test_processes_that_never_answer_do_not_hold_up_the_start_of_others(
    serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor
) -> None:
    server = serve()
    for number in range(4):
        background.submit(server.post, f"{number}", model="slow-start")
    wait_until(lambda: len(log.started()) == 4, "the slow ones")
    assert server.post("quick").status == 200
    gate.touch()


def test_the_program_has_two_spares_by_default(launch: Launch, log: Log) -> None:
    program = launch(CLAUDE_CLI_SPARES="")
    wait_until(lambda: any("logged in" in line for line in program.lines), "the login state")
    used = []
    for words in ("one", "two"):
        answer: Answer = program.post(words)
        used.append(pid(answer))
    wait_until(lambda: len(program.children()) == len({*used}) + 2, "two spares")


def test_a_spare_that_dies_while_it_is_set_up_costs_no_request(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first process with a gate is well, the second one dies at it."""
    monkeypatch.setattr("sessions.FIRST_OUTPUT_SECS", 30)
    dies = 'if [ "$1" != --version ] && ! mkdir "$0.first" 2>/dev/null && mkdir "$0.second" 2>/dev/null; '
    dies += 'then read line; exit 1; fi; exec "$STANDIN" "$@"'
    server = serve(bin=plain_cli(tmp_path / "claude", dies), spares=1)
    prime(server)
    spare(server)
    assert server.post("hello").text == "echo: hello; 1 messages"
    assert (tmp_path / "claude.second").exists()
    room = pool_of(server).room
    wait_until(lambda: not room.in_states(State.BUSY, State.RETIRED), "the end of that one")


@pytest.mark.parametrize("prints", ["", 'echo "[log_1] post http://x/v1/messages succeeded"'])
def test_a_spare_whose_end_nobody_has_seen_costs_no_request(tmp_path: Path, prints: str) -> None:
    """What it printed at its gate, as with Bedrock, is no answer."""

    async def use(pool: Pool) -> None:
        for words in ("one", "two"):  # now a spare is known to have the model
            await take_turn(pool, words)
            await soon(lambda: pool.starter.spares)
        [spare] = pool.starter.spares
        os.kill(spare.process.pid, signal.SIGKILL)
        end = time.monotonic() + 10
        while alive(spare.process.pid):
            assert time.monotonic() < end  # the loop stands still
        turn, answer = await take_turn(pool, "other")
        assert answer == "echo: other; 1 messages"
        assert turn.session is not spare

    program = plain_cli(tmp_path / "claude", f'{prints}\nexec "$STANDIN" "$@"')
    in_pool(use, bin=str(program), spares=1)


def test_spares_that_start_as_the_cli_is_looked_at_evict_no_conversation(tmp_path: Path) -> None:
    program = tmp_path / "claude"
    program.symlink_to(STANDIN)

    async def use(pool: Pool) -> None:
        turns = []
        for words in ("one", "two"):
            turns.append((await take_turn(pool, words))[0])
            # As long as spares start, the next one would get the place of a conversation.
            while pool.starter.starting:
                await asyncio.wait(pool.starter.starting)
        for spare in pool.starter.spares:
            pool.room.retire(spare, "unwanted")
        await soon(lambda: not pool.room.ending)
        pool.inspector.cli = Cli()
        for _ in range(2):
            pool.starter.refill(Kind("sonnet"))
        for task in list(pool.starter.starting):
            await task
        assert [turn.session.state for turn in turns] == [State.IDLE] * 2
        assert len(pool.starter.spares) == 1

    in_pool(use, bin=str(program), spares=2, max_sessions=3)


def test_a_spare_that_was_being_started_as_the_cli_was_replaced_is_given_to_nobody(
    tmp_path: Path,
) -> None:
    """It may be the old program."""
    program = tmp_path / "claude"
    shutil.copy(plain_cli(tmp_path / "old", 'exec "$STANDIN" "$@"'), program)

    async def use(pool: Pool) -> None:
        await pool.inspector.look()
        pool.starter.refill(Kind("sonnet"))
        await soon(lambda: pool.room.is_full)
        assert not pool.room.sessions  # not yet
        shutil.copy(program, tmp_path / "new")
        os.replace(tmp_path / "new", program)
        pool.inspector.cli = Cli(files=(identify_file(str(program)),))
        starting = list(pool.starter.starting)
        await asyncio.wait(starting)
        assert not pool.starter.spares
        assert [one.state for one in pool.room.sessions] == [State.RETIRED]
        turn, answer = await take_turn(pool, "hello")
        assert (answer, turn.session.was_spare) == ("echo: hello; 1 messages", False)

    in_pool(use, bin=str(program), spares=1, max_sessions=1)


@pytest.mark.parametrize("reason", ["settings", "names", "administrator", "cloud"])
def test_no_first_spares_start_where_each_process_is_started_for_its_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reason: str
) -> None:
    """No request could take one."""
    settings: dict[str, Any] = {"spares": 2}
    if reason == "settings":
        settings["setting_sources"] = "user"
    elif reason == "names":
        monkeypatch.setenv("ANTHROPIC_MODEL", "glm-4.6")
        settings["keep_env"] = ("ANTHROPIC_MODEL",)
    elif reason == "administrator":
        monkeypatch.setattr(sessions, "MANAGED", (str(tmp_path),))

    async def use(pool: Pool) -> None:
        await pool.inspector.look()
        old = await pool.starter.spawn(Kind("haiku"), State.SPARE)
        old.state_since = -1e9  # the next sweep ends it
        pool.cli.info = CliInfo(account={"a": 1}, is_cloud=reason == "cloud")
        await soon(lambda: old.state is State.RETIRED)
        assert not [*pool.starter.spares, *pool.starter.starting]

    in_pool(use, **settings)


def test_no_spare_stays_when_another_version_of_the_cli_has_answered() -> None:
    """A script that has not changed may start a newer one; it may announce something else."""

    async def use(pool: Pool) -> None:
        turn, _ = await take_turn(pool, "hello")
        spare = await pool.starter.spawn(Kind(), State.SPARE)
        turn.translator.cli_version = "2.1.999"
        pool.inspector.record_version(turn)
        assert pool.cli.version == "2.1.999"
        assert spare.state is State.RETIRED

    in_pool(use)


def test_a_spare_that_has_just_started_is_counted_once() -> None:
    async def use(pool: Pool) -> None:
        pool.starter.start_spare(Kind())
        [task] = pool.starter.starting
        # Before the callback that takes it out.
        seen: list[State] = []

        def refill(_: object) -> None:
            pool.starter.refill(Kind())
            seen.extend(spare.state for spare in pool.room.sessions)

        task.remove_done_callback(pool.starter.starting.pop)
        task.add_done_callback(refill)
        task.add_done_callback(pool.starter.starting.pop)
        await soon(lambda: seen)
        assert seen == [State.SPARE]

    in_pool(use, spares=1)


def test_no_first_spares_start_beside_a_request_that_they_would_slow_down(gate: Path) -> None:
    async def use(pool: Pool) -> None:
        await pool.inspector.look()
        old = await pool.starter.spawn(Kind("haiku"), State.SPARE)
        answering = asyncio.create_task(take_turn(pool, "hello", model="slow-start"))
        await soon(lambda: pool.room.in_states(State.BUSY))
        old.state_since = -1e9  # the next sweep ends it
        pool.cli.info = CliInfo(account={"a": 1})
        await soon(lambda: old.state is State.RETIRED)
        found = [*pool.starter.spares, *pool.starter.starting]
        open_gate(gate)
        await answering
        assert not found

    in_pool(use, spares=2)


async def both_spares(pool: Pool) -> list[Session]:
    await soon(lambda: len(pool.starter.spares) == 2 and not pool.starter.starting)
    return pool.starter.spares


def test_a_spare_that_was_just_set_up_stays_for_conversations_that_take_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sessions, "CALM_SECS", 60)

    async def use(pool: Pool) -> None:
        for _ in range(2):
            await take_turn(pool, "hello", system="red")
        spares = await both_spares(pool)
        [ahead] = [spare for spare in spares if spare.parts]
        for spare in spares:  # both have waited for long
            spare.state_since -= 100
        await take_turn(pool, "hello", system="blue")
        assert ahead in await both_spares(pool)
        ahead.process.opened_at -= 100
        await take_turn(pool, "hello", system="blue")
        assert ahead not in await both_spares(pool)

    in_pool(use, spares=2)


def test_no_spare_is_set_up_for_conversations_that_have_names() -> None:
    """It has none, so they would not find it."""

    async def use(pool: Pool) -> None:
        request = parse_request(json.dumps(request_body("hello")).encode())
        for name in "abc":
            async with pool.turn(request, name) as turn:
                async for _ in turn.relay():
                    pass
            assert turn.origin == "new"
        assert not [spare for spare in await both_spares(pool) if spare.parts]
        await take_turn(pool, "hello")
        assert [spare for spare in await both_spares(pool) if spare.parts]

    in_pool(use, spares=2)
