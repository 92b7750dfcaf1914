"""Places for processes: how many, who waits, and who gives way."""

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from client import Answer
from host import wait_until
from processes import in_pool, in_work, open_gate, pool_of, soon, take_turn, talk
from servers import Serve
from stand_in import Log

import bridge
import sessions
from sessions import Kind, Metrics, Pool, PoolConfig, Room, Turn
from translate import CliInfo

# ---------------------------------------------------------------- places, and who waits


class Sampler:
    """Counts the children of this process, all the time, in whatever state they are."""

    def __enter__(self) -> "Sampler":
        self.most = 0
        self._known = self._children()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def _children(self) -> set[int]:
        ids = set()
        for name in filter(str.isdecimal, os.listdir("/proc")):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if (
                    int(Path(f"/proc/{name}/stat").read_bytes().rpartition(b")")[2].split()[1])
                    == os.getpid()
                ):
                    ids.add(int(name))
        return ids

    def _run(self) -> None:
        while not self._stop.is_set():
            self.most = max(self.most, len(self._children() - self._known))

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def test_max_sessions_holds_at_every_instant_and_all_waiting_requests_are_answered(
    serve: Serve, background: ThreadPoolExecutor
) -> None:
    server = serve(max_sessions=3)
    with Sampler() as sampler:
        # Every fifth answer fails, so that processes that fault give their room back as well.
        texts = [f"number {n}" if n % 5 else f"number {n} DIE 1" for n in range(20)]
        answers = list(background.map(server.post, texts))
    assert sampler.most == 3
    for text, answer in zip(texts, answers, strict=True):
        if "DIE" in text:
            assert answer.status == 502
        else:
            assert answer.text == f"echo: {text}; 1 messages"


def test_waiting_requests_are_served_in_order(
    serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor
) -> None:
    server = serve(max_sessions=1)
    texts = ["PAUSE", "one", "two", "three", "four"]
    turns: list[Future[Answer]] = []
    for text in texts:
        turns.append(background.submit(server.post, text))
        in_work(server, len(turns))
    gate.touch()
    assert [turn.result().text for turn in turns] == [f"echo: {text}; 1 messages" for text in texts]
    assert list(log.started()) == [log.got(text) for text in texts]


@pytest.mark.parametrize("end", ["answer", "fault", "pinned"])
def test_a_waiting_request_gets_the_room_of_a_turn_that_ends(
    serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor, end: str
) -> None:
    server = serve(max_sessions=2)
    text = "PAUSE DIE 1" if end == "fault" else "PAUSE"
    busy = [
        background.submit(server.post, text, session=f"s{n}" if end == "pinned" else None)
        for n in range(2)
    ]
    wait_until(lambda: len(log.started()) == 2, "two busy processes")
    waiting = [background.submit(server.post, f"waiting {n}") for n in range(3)]
    in_work(server, 5)
    gate.touch()
    assert [turn.result().status for turn in busy] == [502 if end == "fault" else 200] * 2
    assert [turn.result().text for turn in waiting] == [
        f"echo: waiting {n}; 1 messages" for n in range(3)
    ]


@pytest.mark.parametrize("session", [None, "pinned"])
def test_a_request_that_finds_no_room_in_time_gets_529(
    serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor, session: str | None
) -> None:
    # With one place the process ends after its turn.
    places = {"max_sessions": 9} if session else {"max_sessions": 1, "max_idle": 0}
    server = serve(**places, queue_secs=0.2)
    busy = background.submit(server.post, "PAUSE", session=session)
    wait_until(lambda: log.got("PAUSE"), "the turn that holds the room")
    answer = server.post("never", session=session)
    assert (answer.status, answer.json["error"]["type"]) == (529, "overloaded_error")
    assert answer.headers["retry-after"] == "1"
    gate.touch()
    assert busy.result().status == 200
    assert not log.got("never")
    # That may take longer than a request waits here.
    wait_until(lambda: not pool_of(server).room.is_full, "the room")
    assert server.post("next", session=session).status == 200


# ---------------------------------------------------------------- who gives way


def test_a_request_that_gets_the_room_of_a_process_that_ends_costs_no_other_its_own(
    serve: Serve,
) -> None:
    server = serve(max_sessions=2)
    conversation, _ = talk(server, "keep this one")
    server.post("hello", session="s")
    edited = server.post(["hullo", "who?", "and now"], session="s")
    assert edited.session == "rebuilt; reason=unknown-history"
    assert server.post(conversation).session == "hot"


def test_a_question_who_is_logged_in_gives_way_to_no_request_that_came_later(
    serve: Serve,
    gate: Path,
    log: Log,
    background: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sessions, "PROBE_MODEL", "slow-start")
    server = serve(max_sessions=1)
    models = background.submit(server.call, "GET", "/v1/models")
    wait_until(lambda: log.started(), "the process that is asked")
    answer = background.submit(server.post, "hello")
    in_work(server, 2)
    gate.touch()
    assert models.result().status == 200
    assert answer.result().text == "echo: hello; 1 messages"


def test_a_spare_that_is_being_started_gives_way_to_a_request_of_another_kind() -> None:
    async def use(pool: Pool) -> None:
        await pool.inspector.look()
        pool.starter.refill(Kind("opus"))
        await soon(lambda: pool.room.is_full)
        assert not pool.starter.spares
        _, answer = await take_turn(pool, "hello")
        assert answer == "echo: hello; 1 messages"

    in_pool(use, max_sessions=1, spares=1, queue_secs=5)


def test_of_two_requests_one_gets_the_room_of_a_process_that_ended_and_one_that_of_a_resting_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both ask in the step in which it is reaped."""

    async def use(pool: Pool) -> None:
        await take_turn(pool, "one")
        turn, _ = await take_turn(pool, "two")
        asked: list[asyncio.Task[tuple[Turn, str]]] = []
        release = pool.room.leave

        def release_and_ask() -> None:
            release()
            if not asked:
                asked.extend(asyncio.create_task(take_turn(pool, f"new {n}")) for n in range(2))

        monkeypatch.setattr(pool.room, "leave", release_and_ask)
        pool.room.retire(turn.session, "expired")
        await soon(lambda: asked)
        assert [answer for _, answer in await asyncio.gather(*asked)] == [
            f"echo: new {n}; 1 messages" for n in range(2)
        ]

    in_pool(use, max_sessions=2)


def test_no_room_for_the_bridges_own_question_is_no_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, gate: Path
) -> None:
    monkeypatch.setattr(bridge, "LOGIN_PROBE_SECS", 0)

    async def use(pool: Pool) -> None:
        running: Any = SimpleNamespace(config=pool.config, pool=pool)
        busy = asyncio.create_task(take_turn(pool, "PAUSE"))
        await soon(lambda: pool.room.is_full)
        pool.cli.info = CliInfo()
        await bridge.announce(running)
        open_gate(gate)
        await busy

    with caplog.at_level(logging.WARNING):
        in_pool(use, max_sessions=1, queue_secs=0.05)
    assert caplog.records == []


# ---------------------------------------------------------------- room by itself


async def at_once() -> None:
    """What a process waits for before it is ended: nothing."""


def in_room(use: Callable[[Room], Coroutine[Any, Any, None]], places: int = 1) -> None:
    async def program() -> None:
        async with asyncio.timeout(10):
            await use(Room(PoolConfig(max_sessions=places), Metrics(), at_once))

    asyncio.run(program())


def test_a_place_is_taken_at_once_and_waited_for_when_there_is_none() -> None:
    async def use(room: Room) -> None:
        await room.enter()
        assert (room.is_full, room.shortfall) == (True, 0)
        second = asyncio.create_task(room.enter())
        await soon(lambda: room.shortfall)
        assert (room.shortfall, second.done()) == (1, False)
        room.leave()
        await second
        assert (room.is_full, room.shortfall) == (True, 0)

    in_room(use)


def test_who_waits_no_more_is_not_counted_and_takes_no_place() -> None:
    async def use(room: Room) -> None:
        await room.enter()
        waiting = asyncio.create_task(room.enter())
        await soon(lambda: room.shortfall == 1)
        waiting.cancel()
        await asyncio.wait({waiting})
        assert room.shortfall == 0
        room.leave()
        assert not room.is_full

    in_room(use)


def test_a_place_is_free_again_when_its_process_is_reaped_and_no_sooner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def use(pool: Pool) -> None:
        room, may_end = pool.room, asyncio.Event()
        monkeypatch.setattr(room, "_wait_until_safe", may_end.wait)
        room.retire(await pool.starter.spawn(Kind()), "expired")
        assert (room.is_full, room.shortfall, len(room.ending)) == (True, -1, 1)
        next_one = asyncio.create_task(room.enter())
        await soon(lambda: room.shortfall == 0)
        assert not next_one.done()
        assert len(room.sessions) == 1
        may_end.set()
        await next_one
        assert (room.is_full, room.ending, room.sessions) == (True, set(), set())
        room.leave()

    in_pool(use, max_sessions=1)


async def waiting_tasks(room: Room, count: int) -> list[asyncio.Task[None]]:
    """Tasks that wait, one after another, for the only place, which is taken."""
    await room.enter()
    tasks = [asyncio.create_task(room.enter()) for _ in range(count)]
    await soon(lambda: room.shortfall == count)
    return tasks


def test_a_place_that_is_freed_is_the_first_waiting_ones() -> None:
    async def use(room: Room) -> None:
        first, second = await waiting_tasks(room, 2)
        room.leave()
        assert room.is_full
        await first
        assert (room.shortfall, room.is_full, second.done()) == (1, True, False)
        room.leave()
        await second
        assert (room.shortfall, room.is_full) == (0, True)
        room.leave()
        assert not room.is_full

    in_room(use)


def test_of_a_place_that_is_given_on_either_both_are_counted_or_neither() -> None:
    """Otherwise one warm process more than is needed would be ended for it."""
    seen: set[int] = set()

    async def use(pool: Pool) -> None:
        room = pool.room
        session = await pool.starter.spawn(Kind())
        first, second = (asyncio.create_task(room.enter()) for _ in range(2))
        await soon(lambda: room.shortfall == 2)
        room.retire(session, "expired")
        while room.ending:
            seen.add(room.shortfall)
            await asyncio.sleep(0)
        assert (room.shortfall, first.done(), second.done()) == (1, True, False)
        second.cancel()
        await asyncio.wait({second})
        room.leave()

    in_pool(use, max_sessions=1)
    assert seen == {1}


def test_who_is_cancelled_after_it_was_given_a_place_gives_it_to_the_next() -> None:
    async def use(room: Room) -> None:
        first, second = await waiting_tasks(room, 2)
        room.leave()
        first.cancel()
        await second
        assert (first.cancelled(), room.is_full, room.shortfall) == (True, True, 0)

    in_room(use)


def test_who_is_cancelled_after_it_was_given_a_place_frees_it_if_nobody_waits() -> None:
    async def use(room: Room) -> None:
        [only] = await waiting_tasks(room, 1)
        room.leave()
        only.cancel()
        await asyncio.wait({only})
        assert (only.cancelled(), room.is_full, room.shortfall) == (True, False, 0)

    in_room(use)


def test_who_is_cancelled_before_it_was_given_a_place_is_skipped_and_frees_none() -> None:
    async def use(room: Room) -> None:
        first, second = await waiting_tasks(room, 2)
        first.cancel()
        room.leave()  # before the first one has run
        await second
        assert (first.cancelled(), room.is_full, room.shortfall) == (True, True, 0)
        room.leave()
        assert not room.is_full

    in_room(use)


def test_thousands_who_are_cancelled_at_once_are_skipped() -> None:
    async def use(room: Room) -> None:
        *cancelled, last = await waiting_tasks(room, 2001)
        for task in cancelled:
            task.cancel()
        room.leave()
        await last
        assert (room.is_full, room.shortfall) == (True, 0)
        assert all(task.cancelled() for task in cancelled)

    in_room(use)
