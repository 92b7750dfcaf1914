"""The CLI's protocol on a process: late results, faults, silence, and what it says unasked."""

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from host import wait_until
from processes import (
    DIED,
    PROBE,
    alive,
    check_failure,
    check_own,
    fall_silent,
    in_work,
    kill,
    pid,
    pool_of,
    read_all,
    reaped,
    send,
    session_of,
    talk,
)
from servers import Launch, Serve, Server, both, linux
from stand_in import UNASKED, Log
from test_metrics import measure
from test_spares import spare

import sessions
from sessions import Cli, Process, State

kinds = pytest.mark.parametrize("kind", UNASKED)


# ---------------------------------------------------------------- late results


def test_a_result_that_comes_late_is_waited_for_by_the_next_turn(
    serve: Serve, gate: Path, background: ThreadPoolExecutor
) -> None:
    server = serve()
    conversation, first = talk(server, "LATE")
    second = background.submit(server.post, conversation)
    in_work(server, 1)
    # Time in which a hasty line would be seen by the process.
    assert server.post("meanwhile").status == 200
    gate.touch()
    assert (second.result().session, pid(second.result())) == ("hot", pid(first))


def test_a_result_that_came_after_the_answer_in_the_same_read_is_the_end_of_the_turn(
    serve: Serve,
) -> None:
    server = serve()
    assert server.bridge
    conversation, _ = talk(server, "hello")
    (session,) = server.bridge.pool.room.sessions
    process = session.process
    wait_until(lambda: process._settled.is_set(), "its first result")
    process.begin_turn()
    process._events.append({"type": "result"})
    process.end_turn(None)
    assert process._settled.is_set()
    assert server.post(conversation).session == "hot"


def test_the_rest_of_a_turn_that_comes_late_and_in_one_read_is_no_fault(
    serve: Serve, gate: Path, log: Log
) -> None:
    server = serve()
    conversation, first = talk(server, "TAIL")
    gate.touch()
    answer = server.post(conversation)
    assert (answer.session, answer.text) == ("hot", "echo: and now; 3 messages")
    assert pid(answer) == pid(first)


def test_a_process_that_ends_after_its_answer_is_not_waited_for(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its result can come no more."""
    monkeypatch.setattr(sessions, "LATE_SECS", 3600)
    server = serve()
    conversation, first = talk(server, "hello", model="stopped.exit")
    assert first.text == "echo: hello; 1 messages"
    again = server.post(conversation, model="stopped.exit")
    assert (again.session, again.text) == ("rebuilt; reason=died", "echo: and now; 3 messages")


def in_process(use: Callable[[Process], Coroutine[Any, Any, None]]) -> None:
    """With a process that is only told what it has printed."""

    async def program() -> None:
        async with asyncio.timeout(10):
            await use(Process(Cli()))

    asyncio.run(program())


def line_of(**fields: object) -> bytes:
    return json.dumps(fields).encode()


RESULT = line_of(type="result", is_error=False)
ERROR = line_of(type="result", is_error=True)


@pytest.mark.parametrize(("line", "is_good"), [(RESULT, True), (ERROR, False)])
@pytest.mark.parametrize("when", ["read", "unread", "late"])
def test_an_error_as_the_result_of_an_answer_ends_the_process_whenever_it_comes(
    line: bytes, is_good: bool, when: str
) -> None:
    async def use(process: Process) -> None:
        process.begin_turn()
        if when != "late":
            process.lines_received([line], len(line))
        result = (await process.read()).popleft() if when == "read" else None
        is_quiet = not process.end_turn(result)
        if when == "late":
            process.lines_received([line], len(line))
            is_quiet = await process.is_ready()
        assert is_quiet == is_good

    in_process(use)


# ---------------------------------------------------------------- faults, and what is none


MID, START = True, False
SILENT = {"status": 504, "kind": "timeout_error", "words": "silent for 600 seconds"}
FAULTS = {
    "DIE 3": (MID, {**DIED, "words": "exited with status 3: stand-in: told to die"}),
    "HALF": (MID, {**DIED, "words": "exited with status 0"}),
    "STDERR 300000 DIE 4": (MID, {**DIED, "words": "exited with status 4: stand-in: told to die"}),
    "DIE-START": (
        START,
        {**DIED, "words": "exited with status 1: stand-in: told to die before any event"},
    ),
    "HANG": (MID, SILENT),
    "HANG-START": (START, SILENT),
    "RETRY 100 HANG-START": (START, SILENT),
    "RATELIMIT 1": (
        START,
        {"status": 429, "kind": "rate_limit_error", "words": "You've hit your 5-hour limit"},
    ),
}


@both
@pytest.mark.parametrize("text", FAULTS)
def test_a_fault_fails_its_request_alone_and_retires_its_process(
    serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor, text: str, stream: bool
) -> None:
    server = serve()
    other = background.submit(server.post, "PAUSE other", stream=True)
    wait_until(lambda: log.got("PAUSE other"), "the other conversation's turn")
    begun, failure = FAULTS[text]
    with send(server, text, stream=stream) as client:
        if failure is SILENT:
            wait_until(lambda: log.got(text), "the turn")
            while begun and stream and b"_delta" not in client.recv(1 << 16, socket.MSG_PEEK):
                pass
            fall_silent(server, log.got(text))
        check_failure(read_all(client), begun=begun and stream, **failure)
    wait_until(lambda: reaped(log.got(text)), "the end of the process")
    gate.touch()
    assert other.result().text == "echo: PAUSE other; 1 messages"
    assert server.post("next", stream=stream).text == "echo: next; 1 messages"
    assert other.result().events[-1] == {"type": "message_stop"}


@both
@pytest.mark.parametrize(
    ("model", "status", "kind", "words"),
    [
        (
            "exit-at-start",
            502,
            "claude_cli_error",
            "exited with status 1: stand-in: told to exit at the start",
        ),
        ("hang-at-start", *SILENT.values()),
        (
            "not-logged-in",
            401,
            "authentication_error",
            "nobody is logged in: found no login of user ",
        ),
    ],
)
def test_a_process_that_does_not_come_up_is_an_error_status(
    serve: Serve, log: Log, stream: bool, model: str, status: int, kind: str, words: str
) -> None:
    server = serve()
    with send(server, "hello", model=model, stream=stream) as client:
        if model == "hang-at-start":
            wait_until(lambda: log.got("hello"), "the turn")
            fall_silent(server, log.got("hello"))
        answer = read_all(client)
    check_failure(answer, begun=False, status=status, kind=kind, words=words)
    assert answer.headers.get("x-should-retry") == ("false" if status == 401 else None)


@both
@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("DIE-PAST", {**DIED, "words": "told to die while the past is put in"}),
        ("HANG-PAST", SILENT),
    ],
)
def test_a_fault_while_a_history_is_rebuilt_is_an_error_status(
    serve: Serve, log: Log, text: str, failure: dict[str, object], stream: bool
) -> None:
    server = serve()
    with send(server, [text, "yes", "go on"], stream=stream) as client:
        if failure is SILENT:
            wait_until(lambda: log.got(text), "the turn")
            fall_silent(server, log.got(text))
        check_failure(read_all(client), begun=False, **failure)
    wait_until(lambda: reaped(log.got(text)), "the end of the process")


@both
@pytest.mark.parametrize(
    "text",
    [
        "NOISE é漢😀",
        "SPLIT é漢😀",
        "SPLIT NOISE",
        "STDERR 2000000",
        "TWORESULTS",
        "SLOW 130",
        "RETRY 2600",
        "BIGLINE 5000000",
    ],
)
def test_strange_output_does_not_fail_an_answer(serve: Serve, text: str, stream: bool) -> None:
    takes_long = text.startswith(("SLOW", "RETRY"))
    server = serve(watchdog_secs=2 if takes_long else 60)
    expected = {
        "SLOW": "".join(f"{n} " for n in range(130)),
        "BIGLINE": f"echo: {text}; 1 messages" + "x" * 5_000_000,
    }.get(text.split()[0], f"echo: {text}; 1 messages")
    answer = server.post(text, stream=stream)
    assert answer.text == expected
    assert answer.message["stop_reason"] == "end_turn"
    again = server.post([text, answer.text, "and now"], stream=stream)
    # A second result that comes in a read of its own is one that nobody asked for.
    spoke = text == "TWORESULTS" and again.session == "rebuilt; reason=unasked"
    assert again.session == "hot" or spoke
    assert again.text == "echo: and now; 3 messages"


def test_an_answer_is_complete_without_a_result_and_its_process_is_not_used_again(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "LATE_SECS", 0.2)
    server = serve()
    answer = server.post("NORESULT")
    assert answer.text == "echo: NORESULT; 1 messages"
    again = server.post(["NORESULT", answer.text, "and now"])
    assert (again.session, again.text) == ("rebuilt; reason=failed", "echo: and now; 3 messages")


@pytest.mark.parametrize("text", ["TORN-DELTA", "TORN-EVENT"])
def test_a_line_that_is_cut_off_after_a_complete_answer_does_not_fail_it(
    serve: Serve, text: str
) -> None:
    server = serve()
    streamed, whole = server.post(text, stream=True), server.post(text)
    assert (whole.status, whole.text) == (200, f"echo: {text}; 1 messages")
    assert (streamed.events[-1], streamed.text) == ({"type": "message_stop"}, whole.text)
    again = server.post([text, whole.text, "and now"])
    assert (again.session, again.text) == ("rebuilt; reason=failed", "echo: and now; 3 messages")


def test_a_conversation_that_rested_for_longer_than_the_watchdog_waits_was_not_silent(
    serve: Serve, log: Log, background: ThreadPoolExecutor
) -> None:
    server = serve(watchdog_secs=60)
    conversation, answer = talk(server, "hello")
    _, other = talk(server, "other")
    session_of(server, pid(answer)).process._alive_at -= 100
    turn = background.submit(server.post, [*conversation[:2], "HANG-START"])
    wait_until(lambda: log.got("HANG-START"), "the turn")
    kill(pid(other))
    wait_until(lambda: len(pool_of(server).room.sessions) == 1, "a sweep that saw the dead process")
    kill(pid(answer))
    assert turn.result().status == 502  # and not 504


def test_a_process_that_no_longer_reads_fails_its_next_turn_and_is_ended(
    serve: Serve, log: Log
) -> None:
    server = serve(watchdog_secs=3)
    answer = server.post("NOSTDIN")
    check_failure(
        server.post(["NOSTDIN", answer.text, "and now"]),
        begun=False,
        status=504,
        kind="timeout_error",
        words="silent",
    )
    wait_until(lambda: reaped(log.got("NOSTDIN")), "the end of the process")
    assert server.post(["NOSTDIN", answer.text, "and now"]).text == "echo: and now; 3 messages"


# ---------------------------------------------------------------- silence


@linux
def test_a_bridge_that_was_stopped_looks_at_the_pipe_before_it_gives_up(
    launch: Launch, gate: Path, log: Log, background: ThreadPoolExecutor
) -> None:
    program = launch(CLAUDE_CLI_WATCHDOG_SECS="2")
    answer = background.submit(program.post, "PAUSE")
    wait_until(lambda: log.asked("PAUSE"), "the turn")
    program.process.send_signal(signal.SIGSTOP)
    gate.touch()
    stopped_at = time.monotonic()
    wait_until(lambda: time.monotonic() > stopped_at + 2.5, "more than the watchdog's time")
    program.process.send_signal(signal.SIGCONT)
    assert answer.result().text == "echo: PAUSE; 1 messages"


# ---------------------------------------------------------------- what it says unasked


@pytest.fixture
def speaking(monkeypatch: pytest.MonkeyPatch, kind: str, log: Log) -> Callable[[int], None]:
    """Have a process say what nobody asked for."""
    monkeypatch.setenv("STANDIN_UNASKED", kind)
    monkeypatch.setattr(sessions, "ENDING", ((None, 0.1), *sessions.ENDING[1:]))

    def speak(number: int) -> None:
        os.kill(number, signal.SIGUSR1)
        # It may be ended for what it said before it leaves its mark.
        wait_until(
            lambda: number in log.reached("unasked") or not alive(number), "what nobody asked for"
        )

    return speak


@both
@kinds
def test_a_spare_that_speaks_is_given_to_nobody(
    serve: Serve, log: Log, speaking: Callable[[int], None], kind: str, stream: bool
) -> None:
    """It has no conversation yet, so all that it can say is wrong."""
    server = serve(spares=1)
    server.post("hello")  # so that the spare is for the model of the next request as well
    waiting = spare(server)
    wait_until(lambda: waiting in log.started(), "its start")
    speaking(waiting)
    wait_until(lambda: not alive(waiting), "its end")
    answer = server.post("next", stream=stream)
    check_own(answer, "echo: next; 1 messages", stream=stream)
    assert (answer.session, pid(answer) == waiting) == ("new", False)


def settled(server: Server, number: int) -> None:
    """Wait for the end of a turn: until then a process may still say the rest of it."""
    process = session_of(server, number).process
    wait_until(lambda: process._settled.is_set(), "the result")


@both
@kinds
def test_a_resting_process_that_speaks_ends_and_its_conversation_is_rebuilt(
    serve: Serve, speaking: Callable[[int], None], kind: str, stream: bool
) -> None:
    """Its next turn would begin with an answer to something else, and so would all that follow."""
    server = serve()
    first = server.post("hello", stream=stream)
    settled(server, pid(first))
    speaking(pid(first))
    wait_until(lambda: not alive(pid(first)), "its end")
    conversation = ["hello", first.text, "and now"]
    answer = server.post(conversation, stream=stream)
    check_own(answer, "echo: and now; 3 messages", stream=stream)
    assert answer.session == "rebuilt; reason=unasked"
    again = server.post([*conversation, answer.text, "more"], stream=stream)
    check_own(again, "echo: more; 5 messages", stream=stream)
    assert again.session == "hot"


@both
@kinds
def test_a_pinned_process_that_speaks_ends_as_well(
    serve: Serve, speaking: Callable[[int], None], kind: str, stream: bool
) -> None:
    """A client that sends only what is new is told that the past is lost, and nothing is asked."""
    server = serve()
    first = server.post("hello", session="s")
    settled(server, pid(first))
    speaking(pid(first))
    wait_until(lambda: not alive(pid(first)), "its end")
    answer = server.post("and now", session="s", stream=stream)
    assert answer.status == 400
    assert "send the whole conversation" in answer.json["error"]["message"]
    whole = server.post(["hello", first.text, "and now"], session="s", stream=stream)
    check_own(whole, "echo: and now; 3 messages", stream=stream)


@both
@kinds
def test_a_parked_process_that_speaks_ends_and_the_tools_result_is_not_lost(
    serve: Serve, speaking: Callable[[int], None], kind: str, stream: bool
) -> None:
    """It waits inside a tool call, where it has nothing to say but another call of this answer."""
    server = serve()
    asked = server.post("PROBE", tools=[PROBE], stream=stream)
    number = pid(asked)
    (call,) = asked.message["content"]
    assert session_of(server, number).state is State.PARKED
    speaking(number)
    wait_until(lambda: not alive(number), "its end")
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": "18C"}
    answer = server.post(
        [
            "PROBE",
            {"role": "assistant", "content": [call]},
            {"role": "user", "content": [result]},
        ],
        tools=[PROBE],
        stream=stream,
    )
    check_own(answer, "echo: 18C; 3 messages", stream=stream)
    assert answer.session == "rebuilt; reason=unasked"


@both
@kinds
def test_a_process_that_speaks_while_it_is_ended_disturbs_nobody(
    serve: Serve,
    speaking: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    stream: bool,
) -> None:
    """Its pipes are read until it is gone."""
    monkeypatch.setattr(sessions, "ENDING", ((None, 0.1), (None, 60.0)))
    server = serve(max_idle=0)
    first = server.post("hello", model="ignore-sigterm", stream=stream)
    ending = session_of(server, pid(first))
    wait_until(lambda: ending.state is State.RETIRED, "its retirement")
    speaking(pid(first))
    assert alive(pid(first))
    conversation: list[Any] = ["hello", first.text, "and now"]
    answer = server.post(conversation, model="ignore-sigterm", stream=stream)
    check_own(answer, "echo: and now; 3 messages", stream=stream)
    assert answer.session == "rebuilt; reason=evicted"
    assert pid(answer) != pid(first)
    for number in (pid(first), pid(answer)):
        os.kill(number, signal.SIGKILL)


@both
@pytest.mark.parametrize("kind", [kind for kind in UNASKED if kind != "result"])
def test_what_comes_with_the_end_of_an_answer_is_no_part_of_it_and_of_no_other(
    serve: Serve,
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    stream: bool,
) -> None:
    """In the same read, after the result: the turn still listens, and must not hide it."""
    monkeypatch.setenv("STANDIN_UNASKED", kind)
    server = serve()
    first = server.post("BEHIND", stream=stream)
    check_own(first, "echo: BEHIND; 1 messages", stream=stream)
    wait_until(lambda: pid(first) in log.reached("unasked"), "what nobody asked for")
    answer = server.post(["BEHIND", first.text, "and now"], stream=stream)
    check_own(answer, "echo: and now; 3 messages", stream=stream)
    assert answer.session == "rebuilt; reason=unasked"
    assert pid(answer) != pid(first)


DEEP = b'{"type":"brand_new","data":' + b"[" * 400 + b"]" * 400 + b"}"


@pytest.mark.parametrize(
    ("printed", "reason"),
    [
        (RESULT + b"\n", "unasked"),
        (DEEP + b"\n", "failed"),
        (b"x" * 2000, "failed"),
        (b'{"type":"stream_event","event":{"type":\n', "failed"),
    ],
    ids=["result", "deep", "long", "damaged"],
)
def test_what_a_resting_process_prints_is_unasked_or_a_failure(
    monkeypatch: pytest.MonkeyPatch, printed: bytes, reason: str
) -> None:
    monkeypatch.setattr(sessions, "MAX_LINE", 1000)
    reasons: list[str] = []

    async def use(process: Process) -> None:
        process.on_fault = reasons.append
        process.begin_turn()
        process.end_turn(None)
        process.lines_received([RESULT], len(RESULT))
        assert (await process.is_ready(), reasons) == (True, [])
        process.pipe_data_received(1, printed)
        assert (process.is_unusable, reasons) == (True, [reason])

    in_process(use)


def test_a_second_result_of_a_turn_is_counted_as_unasked(serve: Serve) -> None:
    server = serve()
    assert server.post("TWORESULTS").status == 200
    wait_until(
        lambda: measure(server)("processes_ended_total", reason="unasked") == 1,
        "the end of the process",
    )


def test_a_line_without_an_end_after_an_answer_is_counted_as_a_failure(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "MAX_LINE", 1 << 20)
    server = serve()
    assert server.post(model="stopped.endless").text == "echo: hello; 1 messages"
    wait_until(
        lambda: measure(server)("processes_ended_total", reason="failed") == 1,
        "the end of the process",
    )
    assert measure(server)("processes_ended_total", reason="unasked") == 0
