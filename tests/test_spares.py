"""Processes that are started ahead of need: for whom, how many, and for how long."""

import asyncio
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from client import Answer
from host import STANDIN, wait_until
from processes import alive, in_pool, kill, pid, soon, take_turn
from servers import Launch, Serve, Server, plain_cli
from stand_in import Log

from sessions import Cli, Kind, Pool, State, identify_file


def ready(server: Server) -> list[int]:
    """The spares, by process id, the oldest first; they wait at their gates and say nothing."""
    assert server.bridge
    return [spare.process.pid for spare in list(server.bridge.pool.spares.ready)]


def spare(server: Server, *but: int) -> int:
    """Wait for a spare that is none of `but`."""
    wait_until(lambda: [number for number in ready(server) if number not in but], "a spare")
    return next(number for number in ready(server) if number not in but)


def model(log: Log, number: int) -> str:
    """What a process was started with; empty: it takes any."""
    wait_until(lambda: number in log.started(), "its start")
    argv: list[str] = log.started()[number]["argv"]
    return argv[argv.index("--model") + 1] if "--model" in argv else ""


@pytest.fixture
def known(serve: Serve) -> Serve:
    """Bridges that know the models of their CLI."""

    def start(**settings: Any) -> Server:
        server = serve(**settings)
        assert server.call("GET", "/v1/models").status == 200
        wait_until(
            lambda: server.bridge and not server.bridge.pool.room.ending,
            "the end of the process that was asked",
        )
        return server

    return start


def test_the_first_spare_starts_with_the_bridge_and_taking_it_starts_the_next(
    known: Serve, log: Log
) -> None:
    server = known(spares=1)
    first = spare(server)
    answer = server.post(model="haiku", system="be brief")
    assert (pid(answer), answer.session, model(log, first)) == (first, "new", "")
    assert log.lines(first)[0]["request"]["systemPrompt"] == ["be brief"]
    second = spare(server, first)
    assert pid(server.post("another", model="haiku")) == second


def test_one_spare_serves_every_model_of_the_cli(known: Serve, log: Log) -> None:
    server = known(spares=1)
    used: list[int] = []
    for name in ("opus", "haiku", "claude-sonnet-5-5", "opus"):
        waiting = spare(server, *used)
        answer = server.post(f"hi {len(used)}", model=name)
        assert (pid(answer), answer.message["model"]) == (
            waiting,
            f"claude-{name.removeprefix('claude-').split('-')[0]}-5-5",
        )
        assert model(log, waiting) == ""
        used.append(waiting)


def test_a_model_that_the_cli_does_not_list_gets_spares_of_its_own(known: Serve, log: Log) -> None:
    server = known(spares=1)
    first = spare(server)
    answer = server.post(model="claude-old-1")
    assert (answer.status, pid(answer) == first, model(log, pid(answer))) == (
        200,
        False,
        "claude-old-1",
    )
    second = spare(server, first)
    assert model(log, second) == "claude-old-1"
    assert pid(server.post("another", model="claude-old-1")) == second


def test_no_other_model_answers_than_the_one_that_was_asked(
    known: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CLI that lists a model, and runs its default in place of it, in silence."""
    monkeypatch.setenv("STANDIN_DEAF_TO_MODELS", "1")
    answer = known(spares=1).post(model="haiku")
    assert answer.status == 502
    assert answer.json["error"]["message"].endswith("instead of claude-haiku-5-5")


def test_a_rebuilt_conversation_takes_the_spare(known: Serve, log: Log) -> None:
    server = known(spares=1)
    waiting = spare(server)
    answer = server.post(["one", "two", "three"])
    assert (pid(answer), answer.text) == (waiting, "echo: three; 3 messages")


def test_counting_and_agents_take_the_spare_of_their_mode(
    serve: Serve, log: Log, tmp_path: Path
) -> None:
    server = serve(spares=2, tools="default", cwd=str(tmp_path))
    wait_until(lambda: len(ready(server)) == 2, "the first ones, which are for a plain model")
    first = ready(server)
    assert pid(server.post()) not in first
    agent = spare(server, *first)
    tool = {"name": "t", "input_schema": {"type": "object"}}
    # A client that brings tools gets a plain model.
    assert pid(server.post("tools", tools=[tool])) in first
    wait_until(lambda: agent in log.started(), "what the agent was started with")
    assert "default" in log.started()[agent]["argv"]
    assert pid(server.post("another")) == agent


def test_a_hot_turn_takes_no_spare(serve: Serve) -> None:
    server = serve(spares=1)
    first = server.post()
    waiting = spare(server)
    assert server.post(["hello", first.text, "more"]).session == "hot"
    assert ready(server) == [waiting]


def test_spares_follow_the_models_that_are_asked_for(known: Serve, log: Log) -> None:
    server = known(spares=1)
    default = spare(server)
    server.post(model="old-1")
    other = spare(server, default)
    wait_until(lambda: not alive(default), "the end of the spare that nobody asked for")
    assert model(log, other) == "old-1"
    assert pid(server.post("2", model="old-1")) == other


def test_several_spares_are_shared_among_the_models(known: Serve, log: Log) -> None:
    server = known(spares=2)
    for number in range(2):
        for name in ("old-1", "haiku"):
            server.post(f"{number}", model=name)
            wait_until(
                lambda: (
                    len(ready(server)) == 2 and server.bridge and not server.bridge.pool.room.ending
                ),
                "the spares",
            )
    wait_until(
        lambda: sorted(model(log, number) for number in ready(server)) == ["", "old-1"],
        "one of each",
    )


def test_a_spare_that_died_is_given_to_nobody(serve: Serve) -> None:
    server = serve(spares=1)
    dead = spare(server)
    kill(dead)
    answer = server.post()
    assert (answer.status, answer.session) == (200, "new")
    assert pid(answer) != dead
    assert spare(server, dead)


def test_a_cli_that_does_not_start_is_not_started_again_and_again(serve: Serve, log: Log) -> None:
    server = serve(spares=1, session_ttl_secs=0.2)
    first = spare(server)
    kill(first)
    wait_until(lambda: not ready(server), "the end of the spare")
    wait_until(lambda: server.bridge and not server.bridge.pool.sessions, "its reaping")
    assert set(log.started()) <= {first}


def test_a_spare_that_aged_out_comes_back_only_for_a_new_conversation(
    serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor
) -> None:
    server = serve(spares=2, session_ttl_secs=2)
    assert server.call("GET", "/v1/models").status == 200
    wait_until(lambda: len(ready(server)) == 2, "the spares")
    running = background.submit(server.post, "PAUSE-START")
    wait_until(lambda: log.got("PAUSE-START"), "the turn")
    assert server.bridge
    pool = server.bridge.pool
    (left,) = pool.spares.ready
    left.state_since -= 2
    wait_until(lambda: not alive(left.process.pid), "its end")
    gate.touch()
    first = running.result()
    wait_until(lambda: len(ready(server)) == 2, "those that the new conversation asks for")
    for waiting in pool.spares.ready:
        waiting.state_since -= 2
    wait_until(lambda: not pool.spares.ready, "their end")
    assert server.post(["PAUSE-START", first.text, "more"]).session == "hot"
    assert not [*pool.spares.ready, *pool.spares.starting]


def test_nobody_makes_room_for_a_spare(
    serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor
) -> None:
    server = serve(spares=3, max_sessions=2)
    wait_until(lambda: len(ready(server)) == 2, "as many spares as there is room for")
    first = server.post("one")
    busy = background.submit(server.post, "PAUSE")
    wait_until(lambda: log.got("PAUSE"), "the second")
    assert len(server.processes()) == 2
    assert server.post(["one", first.text, "more"]).session == "hot"
    gate.touch()
    busy.result()


@pytest.mark.parametrize("asked", ["sonnet", "old-1"])
def test_a_spare_makes_room_for_a_request(serve: Serve, asked: str) -> None:
    server = serve(spares=1, max_sessions=2)
    assert server.call("GET", "/v1/models").status == 200
    waiting = spare(server)
    answer = server.post(model=asked)
    assert (answer.status, answer.session, pid(answer) == waiting) == (
        200,
        "new",
        asked == "sonnet",
    )


def test_a_spare_that_is_being_started_makes_room_for_a_request(
    serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor
) -> None:
    server = serve(spares=1, max_sessions=2)
    spare(server)
    assert server.bridge
    pool = server.bridge.pool
    busy = background.submit(server.post, "PAUSE", stream=True)
    wait_until(
        lambda: pool.spares.starting or (pool.spares.ready and log.got("PAUSE")),
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


def test_a_spare_goes_before_a_conversation(serve: Serve) -> None:
    server = serve(spares=1, max_sessions=2)
    first = server.post("one")
    spare(server)
    assert server.post("two", model="opus").status == 200
    assert server.post(["one", first.text, "more"]).session == "hot"


def test_spares_that_are_still_starting_end_with_the_bridge(
    serve: Serve, gate: Path, log: Log
) -> None:
    server = serve(spares=3)
    server.close()
    assert not server.processes()
    server = serve(spares=3)
    wait_until(lambda: server.processes(), "a process")
    server.close()
    assert not server.processes()


def test_a_request_takes_a_spare_that_is_still_starting(
    serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor
) -> None:
    server = serve(spares=1)
    assert server.call("GET", "/v1/models").status == 200
    waiting = spare(server)
    assert server.bridge
    (session,) = server.bridge.pool.spares.ready
    # It has said nothing, and will not before it has its conversation.
    assert not session.process.has_spoken
    assert pid(server.post()) == waiting


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
    wait_until(lambda: len(program.children()) == 2, "the end of the process that was asked")
    answer: Answer = program.post()
    assert pid(answer) in log.started()
    assert len(log.started()) <= 4  # the one asked, the first spares, the next


def test_a_spare_that_dies_while_it_is_set_up_costs_no_request(
    serve: Serve, tmp_path: Path
) -> None:
    first = 'if mkdir "$0.first" 2>/dev/null; then read line; exit 1; fi; exec "$STANDIN" "$@"'
    server = serve(bin=plain_cli(tmp_path / "claude", first), spares=1)
    assert server.bridge
    pool = server.bridge.pool
    wait_until(lambda: pool.spares.ready, "the spare")
    assert server.post("hello", model="claude-sonnet-5-5").text == "echo: hello; 1 messages"


def test_a_spare_whose_end_nobody_has_seen_costs_no_request() -> None:
    async def use(pool: Pool) -> None:
        for words in ("one", "two"):  # now a spare is known to have the model
            await take_turn(pool, words)
            await soon(lambda: pool.spares.ready)
        [spare] = pool.spares.ready
        os.kill(spare.process.pid, signal.SIGKILL)
        end = time.monotonic() + 10
        while alive(spare.process.pid):
            assert time.monotonic() < end  # the loop stands still
        turn, answer = await take_turn(pool, "other")
        assert answer == "echo: other; 1 messages"
        assert turn.session is not spare

    in_pool(use, spares=1)


def test_spares_that_start_as_the_cli_is_looked_at_evict_no_conversation(tmp_path: Path) -> None:
    program = tmp_path / "claude"
    program.symlink_to(STANDIN)

    async def use(pool: Pool) -> None:
        turns = [(await take_turn(pool, words))[0] for words in ("one", "two")]
        for task in list(pool.spares.starting):
            await task
        for spare in pool.spares.ready:
            pool.retire(spare, "unwanted")
        await soon(lambda: not pool.room.ending)
        pool.inspector.cli = Cli()
        for _ in range(2):
            pool.spares.refill(Kind())
        for task in list(pool.spares.starting):
            await task
        assert [turn.session.state for turn in turns] == [State.IDLE] * 2
        assert len(pool.spares.ready) == 1

    in_pool(use, bin=str(program), spares=2, max_sessions=3)


def test_a_spare_that_was_being_started_as_the_cli_was_replaced_is_given_to_nobody(
    tmp_path: Path,
) -> None:
    """It may be the old program."""
    program = tmp_path / "claude"
    shutil.copy(plain_cli(tmp_path / "old", 'exec "$STANDIN" "$@"'), program)

    async def use(pool: Pool) -> None:
        await soon(lambda: pool.room.is_full)
        assert not pool.sessions  # not yet
        shutil.copy(program, tmp_path / "new")
        os.replace(tmp_path / "new", program)
        pool.inspector.cli = Cli(files=(identify_file(str(program)),))
        starting = list(pool.spares.starting)
        await asyncio.wait(starting)
        assert not pool.spares.ready
        assert [one.state for one in pool.sessions] == [State.RETIRED]
        turn, answer = await take_turn(pool, "hello")
        assert (answer, turn.session.was_spare) == ("echo: hello; 1 messages", False)

    in_pool(use, bin=str(program), spares=1, max_sessions=1)
