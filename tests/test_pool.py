"""Moments between two steps of the event loop, with the pool alone: who gets which process, and
who gives way.  The stand-in is the CLI."""

import asyncio
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from client import request_body
from host import STANDIN
from stand_in import Log
from test_processes import alive

import bridge
import sessions
from sessions import Cli, Kind, Pool, PoolConfig, State, Turn
from translate import ApiError, CliInfo, parse_request

PROBE = {"name": "probe", "input_schema": {"type": "object"}}


def in_pool(use: Callable[[Pool], Coroutine[Any, Any, None]], **settings: Any) -> None:
    """Run a program of one pool."""

    async def program() -> None:
        config = PoolConfig(**{"bin": str(STANDIN), "spares": 0, "queue_secs": 3, **settings})
        async with Pool(config, dict(os.environ)) as pool:
            await use(pool)

    asyncio.run(program())


async def ask(pool: Pool, *texts: str) -> tuple[Turn, str]:
    """A turn, and its answer."""

    async def drain() -> None:
        pass

    request = parse_request(json.dumps(request_body(list(texts))).encode())
    async with pool.turn(request, None) as turn:
        await turn.relay(lambda _: True, drain)
    return turn, "".join(block["text"] for block in turn.translator.message["content"])


def open_gate(gate: Path) -> None:
    gate.touch()


async def count(pool: Pool, text: str, **fields: Any) -> int:
    return await pool.count(parse_request(json.dumps(request_body(text, **fields)).encode()))


async def soon(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - it has no event of its own
            await asyncio.sleep(0)


def test_what_a_process_said_before_it_is_given_a_turn_is_not_the_turns_answer(
    monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    """It is read, although the event loop has not looked at the pipe yet."""
    monkeypatch.setenv("STANDIN_UNASKED", "answer")

    async def use(pool: Pool) -> None:
        turn, first = await ask(pool, "one")
        process = turn.process
        await soon(lambda: process._ended_well.done())
        os.kill(process.pid, signal.SIGUSR1)
        end = time.monotonic() + 10
        while process.pid not in log.reached("unasked"):  # the loop stands still
            assert time.monotonic() < end
        turn, answer = await ask(pool, "one", first, "two")
        assert (turn.origin, turn.reason) == ("rebuilt", "unasked")
        assert answer == "echo: two; 3 messages"

    in_pool(use)


def test_a_client_that_leaves_as_the_last_turn_ends_gets_no_turn(gate: Path) -> None:
    async def use(pool: Pool) -> None:
        turn, first = await ask(pool, "LATE one")
        settled = turn.process._ended_well
        assert not settled.done()
        second = asyncio.create_task(ask(pool, "LATE one", first, "two"))
        await soon(lambda: turn.session not in pool.on_file)
        settled.add_done_callback(lambda _: second.cancel())
        open_gate(gate)
        with pytest.raises(asyncio.CancelledError):
            await second

    in_pool(use)


def test_of_two_requests_one_takes_the_curious_process_and_one_a_resting_one(
    gate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "PROBE_MODEL", "hang-at-start")

    async def use(pool: Pool) -> None:
        await ask(pool, "idle")
        pool.cli.info = CliInfo()
        curious = asyncio.create_task(pool.inspector.info(gives_way=True))
        await soon(lambda: pool.in_states(State.PROBE))
        answers = [asyncio.create_task(ask(pool, f"PAUSE {number}")) for number in range(2)]
        await soon(lambda: [one.state for one in pool.sessions] == [State.BUSY] * 2)
        open_gate(gate)
        for number, (_, answer) in enumerate(await asyncio.gather(*answers)):
            assert answer == f"echo: PAUSE {number}; 1 messages"
        with pytest.raises(ApiError, match="a request took the room"):
            await curious

    in_pool(use, max_sessions=2)


def test_a_curious_process_that_is_being_started_gives_way_to_a_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sessions, "PROBE_MODEL", "hang-at-start")

    async def use(pool: Pool) -> None:
        curious = asyncio.create_task(pool.inspector.info(gives_way=True))
        await soon(lambda: pool.room.is_full)
        _, answer = await ask(pool, "hello")
        assert answer == "echo: hello; 1 messages"
        with pytest.raises(ApiError, match="a request took the room"):
            await curious

    in_pool(use, max_sessions=1)


def test_a_spare_that_is_being_started_gives_way_to_a_request_of_another_kind() -> None:
    async def use(pool: Pool) -> None:
        await soon(lambda: pool.room.is_full)
        assert not pool.spares.ready
        _, answer = await ask(pool, "hello")
        assert answer == "echo: hello; 1 messages"

    in_pool(use, max_sessions=1, spares=1, queue_secs=5)


def test_of_two_requests_one_gets_the_room_of_a_process_that_ended_and_one_that_of_a_resting_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both ask in the step in which it is reaped."""

    async def use(pool: Pool) -> None:
        await ask(pool, "one")
        turn, _ = await ask(pool, "two")
        asked: list[asyncio.Task[tuple[Turn, str]]] = []
        release = pool.room.leave

        def release_and_ask() -> None:
            release()
            if not asked:
                asked.extend(asyncio.create_task(ask(pool, f"new {n}")) for n in range(2))

        monkeypatch.setattr(pool.room, "leave", release_and_ask)
        pool.retire(turn.session, "expired")
        await soon(lambda: asked)
        assert [answer for _, answer in await asyncio.gather(*asked)] == [
            f"echo: new {n}; 1 messages" for n in range(2)
        ]

    in_pool(use, max_sessions=2)


def test_what_an_old_process_said_of_itself_does_not_replace_what_a_new_one_said() -> None:
    async def use(pool: Pool) -> None:
        _, first = await ask(pool, "one")
        newest = await pool.inspector.info(anew=True)
        turn, _ = await ask(pool, "one", first, "two")
        assert turn.origin == "hot"
        assert pool.cli.info is newest

    in_pool(use)


def test_no_room_for_the_bridges_own_question_is_no_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bridge, "LOGIN_PROBE_SECS", 0)
    monkeypatch.setattr(sessions, "PROBE_MODEL", "hang-at-start")

    async def use(pool: Pool) -> None:
        running: Any = SimpleNamespace(config=pool.config, pool=pool)
        curious = asyncio.create_task(bridge.announce(running, ()))
        await soon(lambda: pool.in_states(State.PROBE))
        await ask(pool, "hello")
        await curious

    with caplog.at_level(logging.WARNING):
        in_pool(use, max_sessions=1)
    assert caplog.records == []


def test_a_spare_whose_end_nobody_has_seen_costs_no_request() -> None:
    async def use(pool: Pool) -> None:
        for words in ("one", "two"):  # now a spare is known to have the model
            await ask(pool, words)
            await soon(lambda: pool.spares.ready)
        [spare] = pool.spares.ready
        os.kill(spare.process.pid, signal.SIGKILL)
        end = time.monotonic() + 10
        while alive(spare.process.pid):
            assert time.monotonic() < end  # the loop stands still
        turn, answer = await ask(pool, "other")
        assert answer == "echo: other; 1 messages"
        assert turn.session is not spare

    in_pool(use, spares=1)


def test_spares_that_start_as_the_cli_is_looked_at_evict_no_conversation(tmp_path: Path) -> None:
    program = tmp_path / "claude"
    program.symlink_to(STANDIN)

    async def use(pool: Pool) -> None:
        turns = [(await ask(pool, words))[0] for words in ("one", "two")]
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
