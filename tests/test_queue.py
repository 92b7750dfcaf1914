"""Who waits, for how long, and in which order large requests are read."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from client import error_of
from host import wait_until
from processes import in_pool, in_work, open_gate, soon, take_turn
from servers import Serve
from stand_in import Log

import sessions
from sessions import Pool, State
from translate import ApiError


def test_a_queue_that_is_full_gets_529_at_once(
    serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor
) -> None:
    server = serve(max_sessions=1, max_queue=2)
    requests = [background.submit(server.post, "PAUSE")]
    wait_until(lambda: log.got("PAUSE"), "the first")
    requests += [background.submit(server.post, f"{number}") for number in range(2)]
    in_work(server, 3)
    answer = server.post("one too many")
    assert error_of(answer) == (529, "overloaded_error")
    assert "2 requests wait for room already" in answer.json["error"]["message"]
    gate.touch()
    assert [request.result().status for request in requests] == [200] * 3


async def take_starts(pool: Pool) -> None:
    """Take all permits to start a process, as requests do that wait for room with them."""
    while not pool.starter._starts.locked():
        await pool.starter._starts.acquire()


def test_who_may_not_start_a_process_in_time_gets_529() -> None:
    """It waits for its start as long as for a place, and no longer."""

    async def use(pool: Pool) -> None:
        await take_starts(pool)
        turns = [asyncio.create_task(take_turn(pool, f"{n}")) for n in range(3)]
        async with asyncio.timeout(10):
            ended = await asyncio.gather(*turns, return_exceptions=True)
        for failed in ended:
            assert isinstance(failed, ApiError)
            assert (failed.status, "none got free" in failed.message) == (529, True)
        assert (pool.queue.length, pool.room.sessions) == (0, set())
        pool.starter._starts.release()
        assert (await take_turn(pool, "next"))[1] == "echo: next; 1 messages"

    in_pool(use, queue_secs=0.1)


def test_those_who_wait_for_their_start_are_in_the_line_that_can_be_full(gate: Path) -> None:
    async def use(pool: Pool) -> None:
        busy = asyncio.create_task(take_turn(pool, "PAUSE"))
        await soon(lambda: pool.room.in_states(State.BUSY))
        turns = [asyncio.create_task(take_turn(pool, f"{n}")) for n in range(2 * sessions.CORES)]
        await soon(pool.starter._starts.locked)  # each waits for the only place
        turns += [asyncio.create_task(take_turn(pool, f"more {n}")) for n in range(2)]
        await soon(lambda: pool.queue.length == len(turns))
        with pytest.raises(ApiError, match="requests wait for room already") as caught:
            await take_turn(pool, "one too many")
        assert caught.value.status == 529
        open_gate(gate)
        answers = await asyncio.gather(busy, *turns)
        assert len({answer for _, answer in answers}) == len(answers)

    in_pool(use, max_sessions=1, max_queue=2 * sessions.CORES + 2, queue_secs=60)


# ---------------------------------------------------------------- threads


def test_a_request_need_not_wait_for_larger_ones_which_are_read_one_after_another() -> None:
    may_end = threading.Event()

    async def use(pool: Pool) -> None:
        first = asyncio.create_task(pool.threads.run(sessions.LARGE_SIZE, may_end.wait))
        second = asyncio.create_task(pool.threads.run(sessions.LARGE_SIZE, may_end.is_set))
        try:
            assert await pool.threads.run(sessions.THREAD_SIZE, lambda: 7) == 7
            assert not first.done()
        finally:
            may_end.set()
        assert await second

    in_pool(use)


def test_a_session_whose_request_is_cancelled_before_it_is_read_is_on_file_again(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was written to its process."""
    may_end = threading.Event()

    async def use(pool: Pool) -> None:
        turn, first = await take_turn(pool, "one")
        lines = log.lines(turn.process.pid)
        monkeypatch.setattr(sessions, "THREAD_SIZE", 0)
        monkeypatch.setattr(sessions, "LARGE_SIZE", 0)
        other = asyncio.create_task(pool.threads.run(sessions.LARGE_SIZE, may_end.wait))
        second = asyncio.create_task(take_turn(pool, "one", first, "two"))
        await soon(lambda: not pool.room.on_file)
        second.cancel()
        await asyncio.wait({second})
        assert second.cancelled()
        assert pool.room.on_file == [turn.session]
        assert log.lines(turn.process.pid) == lines
        may_end.set()
        await other
        again, answer = await take_turn(pool, "one", first, "two")
        assert (again.origin, again.session) == ("hot", turn.session)
        assert answer == "echo: two; 3 messages"
        assert len(pool.room.sessions) == 1

    try:
        in_pool(use)
    finally:
        may_end.set()


def test_of_a_request_that_is_cancelled_before_it_is_read_nothing_is_read() -> None:
    may_end, was_read = threading.Event(), threading.Event()

    async def use(pool: Pool) -> None:
        other = asyncio.create_task(pool.threads.run(sessions.LARGE_SIZE, may_end.wait))
        left = asyncio.create_task(pool.threads.run(sessions.LARGE_SIZE, was_read.set))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.wait({left})
        await asyncio.sleep(0)  # the thread is told
        may_end.set()
        await other
        assert await pool.threads.run(sessions.LARGE_SIZE, lambda: 7) == 7

    in_pool(use)
    assert not was_read.is_set()
