"""Which process a request gets, why a conversation is rebuilt, spares, and who goes first.  The
stand-in is the CLI."""

import asyncio
import json
import logging
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from client import Answer, request_body
from host import STANDIN, wait_until
from processes import alive, in_pool, in_work, kill, open_gate, pid, soon, take_turn, talk
from servers import Launch, Serve, Server, plain_cli
from stand_in import Log

import sessions
from sessions import Cli, Kind, Pool, State
from translate import ApiError

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
    found = sorted(answer.session.partition(";")[0] for answer in answers)
    assert found == ["hot", "rebuilt", "rebuilt"]
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
        await soon(lambda: process._result_seen.done())
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
        settled = turn.process._result_seen
        assert not settled.done()
        second = asyncio.create_task(take_turn(pool, "LATE one", first, "two"))
        await soon(lambda: turn.session not in pool.on_file)
        settled.add_done_callback(lambda _: second.cancel())
        open_gate(gate)
        with pytest.raises(asyncio.CancelledError):
            await second

    in_pool(use)


def test_what_an_old_process_said_of_itself_does_not_replace_what_a_new_one_said() -> None:
    async def use(pool: Pool) -> None:
        _, first = await take_turn(pool, "one")
        newest = (await pool.hello(anew=True))["pid"]
        turn, _ = await take_turn(pool, "one", first, "two")
        assert turn.origin == "hot"
        assert pool.cli.hello["pid"] == newest != turn.process.pid

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


def test_a_request_need_not_wait_behind_large_ones_which_wait_in_a_line() -> None:
    async def use(pool: Pool) -> None:
        await pool._lanes[1].acquire()
        assert await pool.compute(sessions.THREAD_SIZE, lambda: 7) == 7
        with pytest.raises(ApiError, match="other large requests") as caught:
            await pool.compute(sessions.LARGE_SIZE, lambda: 7)
        assert caught.value.status == 529
        pool._lanes[1].release()
        assert await pool.compute(sessions.LARGE_SIZE, lambda: 7) == 7
        await soon(lambda: not pool._queued)

    in_pool(use, queue_secs=0.05)


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


# ---------------------------------------------------------------- why a conversation was rebuilt


def unknown(server: Server) -> Answer:
    return server.post(["hello", "yes", "and now"])


def expired(server: Server) -> Answer:
    conversation, answer = talk(server, "hello")
    wait_until(lambda: not alive(pid(answer)), "the end of the process")
    return server.post(conversation)


def evicted(server: Server) -> Answer:
    conversation, _ = talk(server, "hello")
    talk(server, "another")
    return server.post(conversation)


def died(server: Server) -> Answer:
    conversation, answer = talk(server, "hello")
    kill(pid(answer))
    return server.post(conversation)


def system_changed(server: Server) -> Answer:
    conversation, _ = talk(server, "hello")
    return server.post(conversation, system="be brief")


def model_changed(server: Server) -> Answer:
    conversation, _ = talk(server, "hello")
    return server.post(conversation, model="opus")


def pinned_system_changed(server: Server) -> Answer:
    conversation, _ = talk(server, "hello", session="s")
    return server.post(conversation, session="s", system="be brief")


def fault_in_a_turn(server: Server) -> Answer:
    conversation, _ = talk(server, "hello")
    assert server.post([*conversation[:2], "DIE 1"]).status == 502
    return server.post(conversation)


def client_left(server: Server) -> Answer:
    conversation, _ = talk(server, "hello")
    body = json.dumps(request_body([*conversation[:2], "PAUSE"], stream=True)).encode()
    with server.connect() as client:
        head = (
            f"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        client.sendall(head.encode() + body)
        assert client.recv(65536)
    wait_until(lambda: not server.processes(), "the end of the process")
    return server.post(conversation)


def continued(server: Server) -> Answer:
    conversation, _ = talk(server, "hello")
    assert server.post(conversation).session == "hot"
    return server.post(conversation)


def edited(server: Server) -> Answer:
    conversation, _ = talk(server, "hello")
    return server.post(["hallo", *conversation[1:]])


def edited_pinned(server: Server) -> Answer:
    conversation, _ = talk(server, "hello", session="s")
    return server.post(["hallo", *conversation[1:]], session="s")


def pinned(server: Server) -> Answer:
    conversation, _ = talk(server, "hello", session="s")
    return server.post(conversation)


def max_tokens(server: Server) -> Answer:
    conversation, _ = talk(server, "REPLAY 2.1.330/max_tokens")
    return server.post(conversation)


@pytest.mark.parametrize(
    ("reason", "lose", "settings"),
    [
        ("unknown-history", unknown, {}),
        ("unknown-history", edited, {}),
        ("unknown-history", edited_pinned, {}),
        ("expired", expired, {"session_ttl_secs": 0.1}),
        ("evicted", evicted, {"max_idle": 1}),
        ("evicted", evicted, {"max_sessions": 1}),
        ("died", died, {}),
        ("system-changed", system_changed, {}),
        ("system-changed", pinned_system_changed, {}),
        ("model-changed", model_changed, {}),
        ("died", fault_in_a_turn, {}),
        ("interrupted", client_left, {}),
        ("continued", continued, {}),
        ("pinned", pinned, {}),
        ("max_tokens", max_tokens, {}),
    ],
)
def test_a_lost_session_is_rebuilt_and_the_reason_is_said(
    serve: Serve,
    reason: str,
    lose: Callable[[Server], Answer],
    settings: dict[str, float],
    gate: Path,
) -> None:
    answer = lose(serve(**settings))
    assert answer.session == f"rebuilt; reason={reason}"
    assert answer.text == "echo: and now; 3 messages"


# ---------------------------------------------------------------- how long and how many


def test_a_busy_process_does_not_expire(
    serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor
) -> None:
    server = serve(session_ttl_secs=0.1)
    running = background.submit(server.post, "PAUSE")
    wait_until(lambda: log.got("PAUSE"), "the turn")
    expired(server)
    gate.touch()
    assert running.result().text == "echo: PAUSE; 1 messages"


def test_with_a_time_to_live_of_zero_nothing_expires(serve: Serve) -> None:
    server = serve(session_ttl_secs=0)
    conversation, _ = talk(server, "hello")
    _, other = talk(server, "other")
    kill(pid(other))
    wait_until(
        lambda: server.bridge and len(server.bridge.pool.sessions) == 1,
        "a sweep that saw the dead process",
    )
    assert server.post(conversation).session == "hot"


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


# ---------------------------------------------------------------- spares


def ready(server: Server) -> list[int]:
    """The spares, by process id, the oldest first; they wait at their gates and say nothing."""
    assert server.bridge
    return [spare.process.pid for spare in list(server.bridge.pool.spares)]


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
    (left,) = pool.spares
    left.since -= 2
    wait_until(lambda: not alive(left.process.pid), "its end")
    gate.touch()
    first = running.result()
    wait_until(lambda: len(ready(server)) == 2, "those that the new conversation asks for")
    for waiting in pool.spares:
        waiting.since -= 2
    wait_until(lambda: not pool.spares, "their end")
    assert server.post(["PAUSE-START", first.text, "more"]).session == "hot"
    assert not [*pool.spares, *pool._preparing]


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
        lambda: pool._preparing or (pool.spares and log.got("PAUSE")), "the start of the next"
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
    (session,) = server.bridge.pool.spares
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
    wait_until(lambda: pool.spares, "the spare")
    assert server.post("hello", model="claude-sonnet-5-5").text == "echo: hello; 1 messages"


def test_a_spare_whose_end_nobody_has_seen_costs_no_request() -> None:
    async def use(pool: Pool) -> None:
        for words in ("one", "two"):  # now a spare is known to have the model
            await take_turn(pool, words)
            await soon(lambda: pool.spares)
        [spare] = pool.spares
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
        for task in list(pool._preparing):
            await task
        for spare in pool.spares:
            pool.retire(spare, "unwanted")
        await soon(lambda: not pool.room.ending)
        pool.cli = Cli()
        for _ in range(2):
            pool.refill(Kind())
        for task in list(pool._preparing):
            await task
        assert [turn.session.state for turn in turns] == [State.IDLE] * 2
        assert len(pool.spares) == 1

    in_pool(use, bin=str(program), spares=2, max_sessions=3)
