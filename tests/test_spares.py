"""Processes that are started ahead of need: for whom, how many, and for how long."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Answer, Program, Server, wait_until
from standin import Log
from test_processes import alive, kill, pid

Serve = Callable[..., Server]
CORES = os.cpu_count() or 1


def ready(server: Server) -> list[int]:
    """The spares that have answered, by process id, the oldest first."""
    assert server.bridge
    spares = server.bridge.pool.spares
    return [spare.process.pid for spare in list(spares) if spare.process.started.done()]


def spare(server: Server, *but: int) -> int:
    """Wait for a spare that is none of `but`."""
    wait_until(lambda: [number for number in ready(server) if number not in but], "a spare")
    return next(number for number in ready(server) if number not in but)


def model(log: Log, number: int) -> str:
    argv: list[str] = log.started()[number]["argv"]
    return argv[argv.index("--model") + 1]


def test_the_first_spare_starts_with_the_bridge_and_taking_it_starts_the_next(serve: Serve, log: Log) -> None:
    server = serve(spares=1, model="haiku")
    first = spare(server)
    answer = server.post(model="haiku", system="be brief")
    assert (pid(answer), answer.session, model(log, first)) == (first, "new", "haiku")
    assert log.lines(first)[1]["request"]["systemPrompt"] == ["be brief"]
    second = spare(server, first)
    assert pid(server.post("another", model="haiku")) == second


def test_a_rebuilt_conversation_takes_the_spare(serve: Serve, log: Log) -> None:
    server = serve(spares=1)
    waiting = spare(server)
    answer = server.post(["one", "two", "three"])
    assert (pid(answer), answer.text) == (waiting, "echo: three; 3 messages")


def test_counting_and_agents_take_the_spare_of_their_mode(serve: Serve, log: Log, tmp_path: Path) -> None:
    server = serve(spares=1, tools="default", cwd=str(tmp_path))
    assert pid(server.post()) != spare(server)  # the first one was for a plain model
    agent = spare(server)
    tool = {"name": "t", "input_schema": {"type": "object"}}
    assert pid(server.post("tools", tools=[tool])) != agent  # a client that brings tools gets a plain model
    assert "default" in log.started()[agent]["argv"]
    assert pid(server.post("another")) == agent


def test_a_hot_turn_takes_no_spare(serve: Serve) -> None:
    server = serve(spares=1)
    first = server.post()
    waiting = spare(server)
    assert server.post(["hello", first.text, "more"]).session == "hot"
    assert ready(server) == [waiting]


def test_spares_follow_the_models_that_are_asked_for(serve: Serve, log: Log) -> None:
    server = serve(spares=1)
    default = spare(server)
    server.post(model="opus")
    other = spare(server, default)
    wait_until(lambda: not alive(default), "the end of the spare that nobody asked for")
    assert model(log, other) == "opus"
    # Two models in turn: the spare stays with one of them, instead of being thrown away at each request.
    assert pid(server.post("2", model="haiku")) != other
    assert pid(server.post("3", model="opus")) == other
    third = spare(server, other)
    assert model(log, third) == "opus"
    server.post("4", model="haiku")
    server.post("5", model="haiku")
    assert model(log, spare(server, third)) == "haiku"


def test_several_spares_are_shared_among_the_models(serve: Serve, log: Log) -> None:
    server = serve(spares=2)
    for number in range(2):
        for name in ("opus", "haiku"):
            server.post(f"{number}", model=name)
            wait_until(
                lambda: len(ready(server)) == 2 and server.bridge and not server.bridge.pool._ending, "the spares"
            )
    wait_until(lambda: sorted(model(log, number) for number in ready(server)) == ["haiku", "opus"], "one of each")


def test_a_spare_has_the_settings_of_the_last_conversation(serve: Serve, log: Log) -> None:
    server = serve(spares=1)
    first = spare(server)
    server.post(temperature=0.5)
    second = spare(server, first)
    assert log.requests(first) == ["apply_flag_settings", "initialize", "apply_flag_settings"]
    assert pid(server.post("another", temperature=0.5)) == second
    assert log.requests(second) == ["apply_flag_settings", "initialize"]
    third = spare(server, second)
    server.post("a third")  # without a temperature: what was set must not stay
    settings = [
        line["request"]["settings"]["env"] for line in log.lines(third) if "settings" in str(line.get("request"))
    ]
    assert [("temperature" in values["CLAUDE_CODE_EXTRA_BODY"]) for values in settings] == [True, False]


def test_a_spare_that_died_is_given_to_nobody(serve: Serve) -> None:
    server = serve(spares=1)
    dead = spare(server)
    kill(dead)
    answer = server.post()
    assert (answer.status, answer.session) == (200, "new")
    assert pid(answer) != dead
    assert spare(server, dead)


def test_a_cli_that_does_not_start_is_not_started_again_and_again(serve: Serve, log: Log) -> None:
    server = serve(spares=1, model="exit-at-start", session_ttl_secs=0.2)
    wait_until(lambda: log.started() and not server.processes(), "its end")
    server.post()  # of another model
    starts = [argv for argv in (row["argv"] for row in log.started().values()) if "exit-at-start" in argv]
    assert len(starts) == 1


def test_a_spare_that_aged_out_comes_back_only_for_a_new_conversation(
    serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor
) -> None:
    server = serve(spares=2, session_ttl_secs=2)
    wait_until(lambda: len(ready(server)) == 2, "the spares")
    running = background.submit(server.post, "PAUSE-START")
    wait_until(lambda: log.got("PAUSE-START"), "the turn")
    assert server.bridge
    pool = server.bridge.pool
    (left,) = pool.spares
    left.idle_since -= 2
    wait_until(lambda: not alive(left.process.pid), "its end")
    gate.touch()
    first = running.result()  # it began after that: the spares that it asked for are no longer wanted
    assert server.post(["PAUSE-START", first.text, "more"]).session == "hot"
    assert not [*pool.spares, *pool._preparing]
    server.post("another")
    assert spare(server)


def test_nobody_makes_room_for_a_spare(serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor) -> None:
    server = serve(spares=3, max_sessions=2)
    wait_until(lambda: len(ready(server)) == 2, "as many spares as there is room for")
    first = server.post("one")
    busy = background.submit(server.post, "PAUSE")
    wait_until(lambda: log.got("PAUSE"), "the second")
    assert len(server.processes()) == 2
    assert server.post(["one", first.text, "more"]).session == "hot"
    gate.touch()
    busy.result()


@pytest.mark.parametrize("asked", ["sonnet", "opus"])
def test_a_spare_makes_room_for_a_request(serve: Serve, asked: str) -> None:
    server = serve(spares=1, max_sessions=1)
    waiting = spare(server)
    answer = server.post(model=asked)
    assert (answer.status, answer.session, pid(answer) == waiting) == (200, "new", asked == "sonnet")


def test_a_spare_that_is_being_started_makes_room_for_a_request(
    serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor
) -> None:
    server = serve(spares=1, max_sessions=2, model="haiku")
    spare(server)
    assert server.bridge
    pool = server.bridge.pool
    busy = background.submit(server.post, "PAUSE", model="haiku", stream=True)
    wait_until(lambda: pool._preparing or (pool.spares and log.got("PAUSE")), "the start of the next")
    assert server.post(model="opus").status == 200
    gate.touch()
    assert busy.result().status == 200


def test_with_room_for_one_process_the_start_still_finds_out_who_is_logged_in(launch: Callable[..., Program]) -> None:
    program = launch(CLAUDE_CLI_SPARES="1", CLAUDE_CLI_MAX_SESSIONS="1")
    wait_until(lambda: any("logged in (stand-in)" in line for line in program.lines), "the login state")


def test_a_spare_goes_before_a_conversation(serve: Serve) -> None:
    server = serve(spares=1, max_sessions=2)
    first = server.post("one")
    spare(server)
    assert server.post("two", model="opus").status == 200
    assert server.post(["one", first.text, "more"]).session == "hot"


def test_spares_that_are_still_starting_end_with_the_bridge(serve: Serve, gate: Path, log: Log) -> None:
    server = serve(spares=3, model="slow-start")
    server.close()
    assert not server.processes()
    server = serve(spares=3, model="slow-start")
    wait_until(lambda: server.processes(), "a process")
    server.close()
    assert not server.processes()


def test_a_request_takes_a_spare_that_is_still_starting(
    serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor
) -> None:
    server = serve(spares=1, model="slow-start")
    wait_until(lambda: server.bridge and server.bridge.pool.spares, "the start of a spare")
    answer = background.submit(server.post, model="slow-start")
    wait_until(lambda: server.bridge and not server.bridge.pool.spares, "its use")
    gate.touch()
    assert pid(answer.result()) == min(log.started(), key=lambda number: log.started()[number]["at"])


def test_a_burst_starts_two_processes_a_core_at_a_time(
    serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor
) -> None:
    server = serve(spares=0)
    count = 2 * CORES + 3
    answers = [background.submit(server.post, f"{number}", model="slow-start") for number in range(count)]
    wait_until(lambda: len(log.started()) == 2 * CORES, "the first of them")
    assert server.bridge
    wait_until(lambda: len(server.bridge._answers) == count, "all requests")
    assert len(server.processes()) == 2 * CORES
    gate.touch()
    assert [answer.result().status for answer in answers] == [200] * count
    assert len({pid(answer.result()) for answer in answers}) == count


def test_processes_that_never_answer_do_not_hold_up_the_start_of_others(
    serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sessions.START_SECS", 0.3)
    server = serve()
    for number in range(2 * CORES):
        background.submit(server.post, f"{number}", model="slow-start")
    wait_until(lambda: len(log.started()) == 2 * CORES, "the slow ones")
    assert server.post("quick").status == 200
    gate.touch()


def test_the_program_has_one_spare_by_default(launch: Callable[..., Program], log: Log) -> None:
    program = launch(CLAUDE_CLI_SPARES="")
    wait_until(lambda: any("logged in" in line for line in program.lines), "the login state")
    wait_until(lambda: len(program.children()) == 1, "the end of the process that was asked")
    answer: Answer = program.post()
    assert pid(answer) in log.started()
    assert len(log.started()) <= 3  # the one asked, the first spare, the next
