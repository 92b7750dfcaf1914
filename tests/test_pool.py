"""Which process a request gets, how long one stays, and who goes first.  The stand-in is
the CLI."""

import asyncio
import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from client import request_body
from host import wait_until
from processes import PROBE, alive, in_pool, in_work, kill, open_gate, pid, soon, take_turn, talk
from servers import Serve
from stand_in import Log

import sessions
from sessions import Kind, Pool, Session, State
from translate import parse_request

# ---------------------------------------------------------------- who gets which


def test_equal_conversations_never_share_a_process(
    serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor
) -> None:
    server = serve()
    conversation, first = talk(server, "hello")
    same, second = talk(server, "hello")
    assert same == conversation
    turns = [background.submit(server.post, [*conversation[:2], "PAUSE"]) for _ in range(3)]
    in_work(server, 3)
    gate.touch()
    answers = [turn.result() for turn in turns]
    assert [answer.text for answer in answers] == ["echo: PAUSE; 3 messages"] * 3
    found = sorted(answer.session for answer in answers)
    assert found == ["hot", "rebuilt; reason=busy", "rebuilt; reason=busy"]
    assert len({pid(answer) for answer in answers}) == 3
    # Of two that a request could find the newer one stays.
    assert pid(second) in {pid(answer) for answer in answers} - {pid(first)}


def test_of_two_conversations_that_are_alike_one_process_stays(serve: Serve, log: Log) -> None:
    server = serve()
    answers = [server.post("hello") for _ in range(2)]
    assert answers[0].text == answers[1].text
    wait_until(lambda: len(server.processes()) == 1, "the end of one")
    again = server.post(["hello", answers[0].text, "and now"])
    assert (again.session, pid(again)) == ("hot", pid(answers[1]))


def test_an_agents_conversation_that_could_be_anothers_is_never_hot(
    serve: Serve, tmp_path: Path
) -> None:
    """What its tools have seen does not follow from the messages."""
    server = serve(tools="default", cwd=str(tmp_path))
    first, second = server.post("hello"), server.post("hello")
    assert first.text == second.text
    wait_until(lambda: not server.processes(), "the end of both")
    for _ in range(2):
        assert server.post(["hello", first.text, "and now"]).session.startswith("rebuilt")


def test_agents_with_system_prompts_of_their_own_do_not_end_each_others_process(
    serve: Serve, tmp_path: Path
) -> None:
    """Their first exchange is the same, and yet no request could be meant for both."""
    server = serve(tools="default", cwd=str(tmp_path))
    answers = {system: server.post("hello", system=system) for system in ("one", "two")}
    assert len({answer.text for answer in answers.values()}) == 1
    for system, first in answers.items():
        again = server.post(["hello", first.text, "and now"], system=system)
        assert (again.session, pid(again)) == ("hot", pid(first))


def test_an_agents_conversation_that_another_has_had_before_is_not_hot(
    serve: Serve, tmp_path: Path
) -> None:
    """The first one's process is gone; its client would get the second one's."""
    server = serve(tools="default", cwd=str(tmp_path), max_idle=1)
    first = server.post("hello")
    server.post("something else")
    wait_until(lambda: len(server.processes()) == 1, "the eviction of the first")
    server.post("hello")
    again = server.post(["hello", first.text, "and now"])
    assert again.session.startswith("rebuilt")


def test_what_a_process_said_before_it_is_given_a_turn_is_not_the_turns_answer(
    monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    """It is read, although the event loop has not looked at the pipe yet."""
    monkeypatch.setenv("STANDIN_UNASKED", "answer")

    async def use(pool: Pool) -> None:
        turn, first = await take_turn(pool, "one")
        process = turn.process
        await soon(lambda: process._settled.is_set())
        os.kill(process.pid, signal.SIGUSR1)
        end = time.monotonic() + 10
        while process.pid not in log.reached("unasked"):  # the loop stands still
            assert time.monotonic() < end
        turn, answer = await take_turn(pool, "one", first, "two")
        assert (turn.origin, turn.reason) == ("rebuilt", "unasked")
        assert answer == "echo: two; 3 messages"

    in_pool(use)


def test_a_client_that_leaves_as_the_last_turn_ends_gets_no_turn(gate: Path) -> None:
    async def use(pool: Pool) -> None:
        turn, first = await take_turn(pool, "LATE one")
        settled = turn.process._settled
        assert not settled.is_set()
        second = asyncio.create_task(take_turn(pool, "LATE one", first, "two"))
        await soon(lambda: turn.session not in pool.room.on_file)
        settling = asyncio.create_task(settled.wait())
        settling.add_done_callback(lambda _: second.cancel())
        open_gate(gate)
        with pytest.raises(asyncio.CancelledError):
            await second

    in_pool(use)


def test_what_an_old_process_said_of_itself_does_not_replace_what_a_new_one_said() -> None:
    async def use(pool: Pool) -> None:
        _, first = await take_turn(pool, "one")
        newest = await pool.inspector.info(anew=True)
        turn, _ = await take_turn(pool, "one", first, "two")
        assert turn.origin == "hot"
        assert pool.cli.info is newest

    in_pool(use)


def test_a_shutdown_ends_every_process(
    serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor
) -> None:
    server = serve(drain_secs=0.1)
    talk(server, "hello")
    talk(server, "hello", model="ignore-sigterm")
    running = background.submit(server.post, "PAUSE")
    wait_until(lambda: log.got("PAUSE"), "the running turn")
    server.close()
    assert not [process for process in log.started() if alive(process)]
    assert running.result().status == 503


def test_the_log_says_which_process_was_chosen_and_what_it_printed_on_stderr(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve()
    with caplog.at_level(logging.DEBUG, "claude_cli_bridge"):
        conversation, first = talk(server, "secret")
        server.post(conversation)
        server.post([*conversation[:2], "other"], system="changed")
        failed = server.post("DIE-START 3")
    assert failed.status == 502
    words = [record.getMessage() for record in caplog.records if record.levelno == logging.DEBUG]
    began = f"request {first.headers['request-id']}: new, turn 1 of process {pid(first)}, "
    assert began + "which was started for a request" in words
    assert [line for line in words if ": hot, turn 2 of process" in line]
    assert [line for line in words if "rebuilt (system-changed), turn 1 of" in line]
    assert [line for line in words if " prints: " in line]
    assert [line for line in words if line.endswith("ends: died")]
    assert "secret" not in "".join(words)


# ---------------------------------------------------------------- how long and how many


def test_a_busy_process_does_not_expire(
    serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor
) -> None:
    server = serve(session_ttl_secs=0.1)
    running = background.submit(server.post, "PAUSE")
    wait_until(lambda: log.got("PAUSE"), "the turn")
    _, answer = talk(server, "hello")
    wait_until(lambda: not alive(pid(answer)), "the end of a process that rests")
    gate.touch()
    assert running.result().text == "echo: PAUSE; 1 messages"


def test_with_a_time_to_live_of_zero_nothing_expires(serve: Serve) -> None:
    server = serve(session_ttl_secs=0)
    conversation, _ = talk(server, "hello")
    _, other = talk(server, "other")
    kill(pid(other))
    wait_until(
        lambda: server.bridge and len(server.bridge.pool.room.sessions) == 1,
        "a sweep that saw the dead process",
    )
    assert server.post(conversation).session == "hot"


def test_after_max_turns_a_process_ends_once_it_waits_for_no_tool(serve: Serve) -> None:
    server = serve(max_turns=2)
    messages: list[Any]
    messages, first = talk(server, "hello", tools=[PROBE])
    messages[-1] = "PROBE"
    called = server.post(messages, tools=[PROBE])
    assert called.session == "hot"
    (call,) = called.message["content"]
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": "18C"}
    messages.append({"role": "assistant", "content": [call]})
    messages.append({"role": "user", "content": [result]})
    answer = server.post(messages, tools=[PROBE])
    assert answer.session == "hot"
    wait_until(lambda: not alive(pid(first)), "its end")
    messages += [answer.text, "more"]
    assert server.post(messages, tools=[PROBE]).session == "rebuilt; reason=max_turns"


def test_the_least_recently_used_process_goes_first(serve: Serve) -> None:
    server = serve(max_idle=2)
    first, one = talk(server, "first")
    second, two = talk(server, "second")
    answer = server.post(first)
    talk(server, "third")
    wait_until(
        lambda: not alive(pid(two)), "the end of the process that was not used for the longest"
    )
    assert server.post([*first, answer.text, "more"]).session == "hot"
    assert server.post(second).session == "rebuilt; reason=evicted"
    assert alive(pid(one))


def test_with_max_idle_of_zero_no_process_stays(serve: Serve) -> None:
    server = serve(max_idle=0)
    answer = server.post("hello")
    assert answer.status == 200
    wait_until(lambda: not server.processes(), "the end of the process")


def test_those_whose_next_request_was_taken_back_count_as_idle_again() -> None:
    """Their places have been taken meanwhile."""

    async def use(pool: Pool) -> None:
        # Its next request waits for the result, which never comes.
        _, text = await take_turn(pool, "NORESULT")
        asking = asyncio.create_task(take_turn(pool, "NORESULT", text, "and now"))
        await soon(lambda: pool.room.in_states(State.BUSY))
        for words in ("second", "third"):
            await take_turn(pool, words)
        assert len(pool.room.on_file) == 2
        asking.cancel()
        await asyncio.wait({asking})
        assert len(pool.room.on_file) == 2

    in_pool(use, max_idle=2)


# ---------------------------------------------------------------- the sweep


def test_a_bug_in_the_sweep_is_logged_and_it_goes_on(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    look_after = sessions.look_after
    raised: list[ZeroDivisionError] = []

    def fail_once(pool: Pool, session: Session) -> None:
        if not raised:
            raised.append(ZeroDivisionError("secret"))
            raise raised[0]
        look_after(pool, session)

    monkeypatch.setattr(sessions, "look_after", fail_once)
    answer = serve(watchdog_secs=1).post("HANG-START")
    assert (answer.status, answer.json["error"]["type"]) == (504, "timeout_error")
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert errors == ["bug in the sweep: ZeroDivisionError"]


@pytest.fixture
def renewal_lock(environment: Path) -> Iterator[Path]:
    """That of a CLI that renews the login."""
    lock = environment / ".claude" / sessions.RENEWAL_LOCK
    lock.mkdir(parents=True)
    yield lock
    if lock.exists():
        lock.rmdir()


def test_no_process_ends_while_the_login_is_renewed(renewal_lock: Path, serve: Serve) -> None:
    """What the real CLI loses then is in test_renewal.py."""
    server = serve(max_idle=0)
    one = pid(server.post("one"))
    two = pid(server.post("two"))
    assert alive(one)
    assert alive(two)
    renewal_lock.rmdir()
    wait_until(lambda: not alive(one) and not alive(two), "their end")


def test_the_lock_of_a_cli_that_has_died_holds_up_no_end(renewal_lock: Path, serve: Serve) -> None:
    server = serve(max_idle=0)
    one = pid(server.post("one"))
    long_ago = time.time() - sessions.LOCK_SECS
    os.utime(renewal_lock, (long_ago, long_ago))
    try:
        wait_until(lambda: not alive(one), "its end")
    finally:
        renewal_lock.rmdir()


def test_an_agents_conversation_is_anothers_also_if_a_third_has_begun_alike_meanwhile(
    serve: Serve, tmp_path: Path
) -> None:
    server = serve(tools="default", cwd=str(tmp_path))
    for system in ("one", "two", "one"):
        first = server.post("hello", system=system)
    again = server.post(["hello", first.text, "and now"], system="one")
    assert again.session == "rebuilt; reason=ambiguous"


def test_a_request_that_is_cancelled_as_it_waits_for_the_last_result_disturbs_no_other(
    gate: Path,
) -> None:
    async def use(pool: Pool) -> None:
        turn, first = await take_turn(pool, "LATE one")
        left = asyncio.create_task(take_turn(pool, "LATE one", first, "two"))
        await soon(lambda: turn.session not in pool.room.on_file)
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        assert turn.session in pool.room.on_file
        again = asyncio.create_task(take_turn(pool, "LATE one", first, "two"))
        await soon(lambda: turn.session not in pool.room.on_file)
        open_gate(gate)
        following, answer = await again
        assert (following.origin, answer) == ("hot", "echo: two; 3 messages")

    in_pool(use)


def test_a_process_that_would_go_on_is_killed_before_its_answer_is_taken() -> None:
    """A client may be slow, or gone by then."""

    async def use(pool: Pool) -> None:
        body = json.dumps(request_body('STOP-REASON "max_tokens"')).encode()
        async with pool.turn(parse_request(body), None) as turn:
            async for _ in turn.relay():
                if turn.translator.done:
                    await soon(turn.process.exited.done)

    in_pool(use)


def test_a_process_that_ends_with_its_pool_stays_ended_after_its_turn() -> None:
    async def use(pool: Pool) -> None:
        request = parse_request(json.dumps(request_body("hello")).encode())
        async with pool.turn(request, None) as turn:
            async for _ in turn.relay():
                pass
            pool.room.retire(turn.session, "shutdown")
        assert turn.session.state is State.RETIRED

    in_pool(use)


def test_a_spare_whose_request_was_taken_back_is_no_spare_again() -> None:
    """It may be of a CLI that was replaced meanwhile."""

    async def use(pool: Pool) -> None:
        await pool.inspector.look()
        spare = await pool.starter.spawn(Kind("sonnet"), State.SPARE)
        request = parse_request(json.dumps(request_body("hello")).encode())
        spare.adopt(request, "sonnet")
        spare.process._settled.clear()  # it is not ready yet
        asking = asyncio.create_task(take_turn(pool, "hello"))
        await soon(lambda: spare.state is State.BUSY)
        asking.cancel()
        await asyncio.wait({asking})
        assert spare.state is State.RETIRED

    in_pool(use)
