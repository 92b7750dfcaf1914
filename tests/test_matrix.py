"""Every fault at every point of a turn: the right answer in time, nothing left behind, nobody else
disturbed.

One bridge serves all cells of a module, beside one other conversation that is in mid answer in each
of them and goes on in the same process from the first cell to the last.  The fault is in the
model's name (`Standin.fault`).
"""

import asyncio
import contextlib
import functools
import gc
import itertools
import json
import logging
import os
import socket
import struct
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from client import Answer, request_body, text
from host import STANDIN, wait_until
from processes import check_failure, read_all
from servers import Server
from stand_in import GARBAGE, Log

import sessions
from bridge import Config
from sessions import Session

POINTS = {
    "initialize": "before `initialize` is answered",
    "initialized": "after `initialize`",
    "past": "while a history line is put in",
    "asked": "after the user line, before any event",
    "settings": "while the answer to apply_flag_settings is due, in a hot turn",
    "midline": "inside the line of the second delta",
    "first": "after the first delta",
    "last": "after the last delta, before content_block_stop",
    "stopped": "after message_stop, before `result`",
    "parked": "while the CLI waits for a tool's result",
}
FAULTS = ("hang", "deaf", "exit", "kill", "closed", "endless", *GARBAGE, "close", "reset")
BEGUN = ("midline", "first", "last")  # the stream has begun, the answer is not complete
LEAVES = ("close", "reset")  # the client goes, the CLI waits
SILENT = ("hang", "deaf")
DEAD = ("exit", "kill", "closed")
DEADLINE = 20  # seconds for an answer, where the watchdog's are 1 or 120: a limit for failure

SAID = {
    **dict.fromkeys(SILENT, (504, "timeout_error", "silent for")),
    "exit": (502, "claude_cli_error", "exited with status 1: stand-in: told to exit"),
    "kill": (502, "claude_cli_error", "exited with status -9"),
    "closed": (502, "claude_cli_error", "closed its output"),
    "endless": (502, "claude_cli_error", "a line of more than 1 MiB"),
    "disorder": (502, "claude_cli_error", "out of place"),
}
TORN = (502, "claude_cli_error", "a damaged line")  # a line of the answer that cannot be read
TOOL = {"name": "probe", "input_schema": {"type": "object"}}
numbers = itertools.count(1)


def failure(point: str, fault: str) -> tuple[int, str, str] | None:
    """Status, type and words of the error that the request ends with; None: with the whole
    answer."""
    if point == "stopped":
        return None  # the client has it all
    if point == "parked":
        # What is known to be lost before the request is rebuilt.
        return SAID[fault] if fault in SILENT else None
    if fault in GARBAGE and point == "midline":
        return TORN  # a part of the answer is in the line that was spoilt
    if fault in GARBAGE and (fault != "disorder" or point not in BEGUN):
        return None  # what is no event, or none of an answer that has begun, is left out
    return SAID[fault]


@dataclass
class Bench:
    """A bridge with the stand-in, its other conversation, and what it held before the first
    cell."""

    server: Server
    log: Log
    gate: Path
    executor: ThreadPoolExecutor
    other: int = 0  # the process of the other conversation
    tasks: frozenset[asyncio.Task[Any]] = frozenset()

    def running(self) -> frozenset[asyncio.Task[Any]]:
        assert self.server.loop
        return frozenset(asyncio.all_tasks(self.server.loop))

    def in_cell(self) -> list[Session]:
        assert self.server.bridge
        return [
            session
            for session in list(self.server.bridge.pool.room.sessions)
            if session.process.pid != self.other
        ]

    def clear(self) -> None:
        """End what the cell keeps warm, and forget what its processes were given."""
        bridge, loop = self.server.bridge, self.server.loop
        assert bridge
        assert loop
        for session in self.in_cell():
            loop.call_soon_threadsafe(bridge.pool.room.retire, session, "cleared")
        wait_until(lambda: not self.in_cell(), "the end of the cell's processes")
        wait_until(
            lambda: self.running() <= self.tasks, f"the end of tasks: {self.running() - self.tasks}"
        )
        for name in os.listdir(self.log.folder):
            if name.partition(".")[0] != str(self.other):
                os.unlink(os.path.join(self.log.folder, name))


def look_for_garbage() -> None:
    """asyncio reports a failure that nobody looked at when its task is freed.  What is there now
    need not be looked at after the next cell."""
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def bench(folder: Path, watchdog_secs: float) -> Iterator[Bench]:
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("STANDIN_LOG", str(folder))
        patch.setenv("STANDIN_GATE", str(folder.parent / f"{folder.name}-gate"))
        patch.setattr(sessions, "MAX_LINE", 1 << 20)
        patch.setattr(sessions, "LATE_SECS", 2)
        patch.setattr(sessions, "ENDING", ((None, 0.3), *sessions.ENDING[1:]))
        names = ("STANDIN_LOG", "STANDIN_GATE", "PATH")
        settings: dict[str, Any] = {
            "listen_addr": "127.0.0.1:0",
            "bin": str(STANDIN),
            "spares": 0,
            "keep_env": names,
        }
        config = Config(watchdog_secs=watchdog_secs, session_ttl_secs=0, **settings)
        server = stack.enter_context(Server(config=config))
        executor = stack.enter_context(ThreadPoolExecutor(8))
        made = Bench(server, Log(str(folder)), folder.parent / f"{folder.name}-gate", executor)
        made.other = int(server.post("hello", session="other").message["id"].split("_")[2])
        wait_until(
            lambda: server.bridge and not server.bridge.connections,
            "the end of the first connection",
        )
        made.tasks = made.running()
        look_for_garbage()
        yield made


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A fault is seen by itself: the watchdog would come after the deadline."""
    with bench(tmp_path_factory.mktemp("patient"), 120) as made:
        yield made


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bench(tmp_path_factory.mktemp("hasty"), 1) as made:
        yield made


@pytest.fixture
def undisturbed(patient: Bench, hasty: Bench, fault: str) -> Iterator[Bench]:
    """The bridge, while its other conversation is in mid answer; in the end that goes on, and
    nothing is left."""
    made = hasty if fault in (*SILENT, "half-deaf") else patient
    words = f"PAUSE other {next(numbers)}"
    other = made.executor.submit(made.server.post, words, session="other")
    try:
        wait_until(lambda: made.log.asked(words), "the other conversation's turn")
        yield made
        assert not other.done()
    finally:
        made.gate.touch()
        answer = other.result(DEADLINE)
        made.gate.unlink()
        made.clear()
    assert (answer.session, answer.message["stop_reason"]) == ("hot", "end_turn")
    assert answer.text.startswith(f"echo: {words}; ")
    assert int(answer.message["id"].split("_")[2]) == made.other


def messages(point: str, fault: str, words: str) -> list[Any]:
    """A conversation whose last message is the cell's; a deaf process cannot even take it all."""
    last = [text("x" * 200_000), text(words)] if fault == "deaf" else [text(words)]
    past = {"past": ["hello", "yes"], "initialize": [], "parked": []}.get(point, [])
    return [*past, {"role": "user", "content": last}]


def hot(made: Bench, words: str, **fields: Any) -> list[Any]:
    """A first turn without a fault; the conversation with the next message."""
    answer = made.server.post("hello", **fields)
    assert answer.text == "echo: hello; 1 messages"
    return ["hello", answer.text, *messages("", "", words)]


def lost(session: Session) -> bool:
    return session.process.is_unusable or session.process._failure is not None


def parked(made: Bench, fault: str, words: str, **fields: Any) -> list[Any]:
    """A conversation whose last answer called a tool, in a process that meets its fault now; with
    the tool's result."""
    conversation = [*messages("parked", "", f"{words} PROBE")]
    with leaving(made.server, fault) as client:
        answer = post(client, conversation, **fields)
        assert answer.message["stop_reason"] == "tool_use"
        wait_until(lambda: made.log.reached(fields["model"]), "the fault of the parked process")
    if fault in (*DEAD, "endless"):
        mine = [session for session in made.in_cell() if session.model == fields["model"]]
        wait_until(lambda: all(map(lost, mine)), "a process that the bridge knows to be lost")
    (call,) = answer.message["content"]
    result = {
        "type": "tool_result",
        "tool_use_id": call["id"],
        "content": "18C" * (60_000 if fault == "deaf" else 1),
    }
    return [
        *conversation,
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result]},
    ]


# clients


@contextlib.contextmanager
def leaving(server: Server, fault: str) -> Iterator[socket.socket]:
    """A connection that ends with FIN, or with RST."""
    with server.connect() as client:
        yield client
        if fault == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def post(client: socket.socket, conversation: list[Any], **fields: Any) -> Answer:
    send(client, conversation, **fields)
    return read_all(client)


def send(client: socket.socket, conversation: list[Any], **fields: Any) -> None:
    body = json.dumps(request_body(conversation, **fields)).encode()
    client.sendall(
        b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n%b"
        % (len(body), body)
    )


# the matrix

CELLS = [pytest.param(point, fault, id=f"{point}-{fault}") for point in POINTS for fault in FAULTS]


@pytest.mark.parametrize(("point", "fault"), CELLS)
def test_a_fault_has_its_answer_and_stays_alone(
    undisturbed: Bench, caplog: pytest.LogCaptureFixture, point: str, fault: str
) -> None:
    """Streamed and whole, at the same time."""
    run = undisturbed.executor.submit
    both = {
        kind: run(
            check, undisturbed, f"cell {next(numbers)}", point, fault, stream=kind == "streamed"
        )
        for kind in ("streamed", "whole")
    }
    failures = {kind: cell.exception() for kind, cell in both.items()}
    look_for_garbage()
    assert not [row.getMessage() for row in caplog.records if row.levelno >= logging.WARNING]
    for kind, error in failures.items():
        if error:
            error.add_note(f"{kind}; of both: {failures}")
            raise error


def check(made: Bench, words: str, point: str, fault: str, *, stream: bool) -> None:
    model = f"{point}.{'wait' if fault in LEAVES else fault}.{'streamed' if stream else 'whole'}"
    fields: dict[str, Any] = {
        "model": model,
        "stream": stream,
        "tools": [TOOL] if point == "parked" else ...,
    }
    if point == "settings":
        conversation, fields["temperature"] = hot(made, words, **fields), 0.5
    elif point == "parked":
        conversation = parked(made, fault, words, **fields)
    else:
        conversation = messages(point, fault, words)

    if fault in LEAVES and point not in ("stopped", "parked"):
        check_leaving(made, fault, conversation, **fields)
    else:
        answer = made.executor.submit(made.server.post, conversation, **fields).result(DEADLINE)
        check_answer(made, answer, point, fault, words, **fields)
        if point == "stopped":
            check_next(made, [*conversation, answer.text, "and now"], fault, **fields)
    times = made.log.asked(f"'{words}'") + made.log.asked(f"'{words} PROBE'")
    assert times == 1 or (times == 0 and point in ("initialize", "initialized", "past", "settings"))


def check_answer(
    made: Bench, answer: Answer, point: str, fault: str, words: str, **fields: Any
) -> None:
    model, begun = fields["model"], fields["stream"] and point in BEGUN
    wait_until(lambda: made.log.reached(model), "the fault, which may come after a whole answer")
    (pid,) = made.log.reached(fields["model"])
    if said := failure(point, fault):
        status, kind, part = said
        check_failure(answer, begun=begun, status=status, kind=kind, words=part)
        wait_until(lambda: not psutil.pid_exists(pid), "the end of the process")
        return
    assert answer.status == 200
    if point == "parked":
        # What speaks while nobody listens is lost; in the read of the answer it still belongs to
        # that.
        spoke = fault == "disorder" and answer.session != "hot"
        rebuilt = fault in (*DEAD, "endless") or spoke
        reason = "died" if fault in DEAD else "unasked" if spoke else "failed"
        assert answer.session == (f"rebuilt; reason={reason}" if rebuilt else "hot")
        assert answer.text == ("echo: 18C; 3 messages" if rebuilt else "echo: 18C; 1 messages")
    else:
        past = 2 * (point in ("past", "settings"))
        assert answer.text == f"echo: {words}; {1 + past} messages"
    assert answer.message["stop_reason"] == "end_turn"
    assert not fields["stream"] or answer.events[-1] == {"type": "message_stop"}


def check_next(made: Bench, conversation: list[Any], fault: str, **fields: Any) -> None:
    """A conversation goes on after a fault that followed its answer, in the same process if that is
    sound."""
    (pid,) = made.log.reached(fields["model"])
    answer = made.server.post(conversation, **fields)
    reason = "died" if fault in DEAD else "failed"
    # What speaks when the turn is over is lost; in the read of its end it still belongs to that.
    spoke = fault == "disorder" and answer.session == "rebuilt; reason=unasked"
    sound = fault in GARBAGE and not spoke
    assert spoke or answer.session == ("hot" if sound else f"rebuilt; reason={reason}")
    assert answer.text == "echo: and now; 3 messages"
    if not sound:
        wait_until(lambda: not psutil.pid_exists(pid), "the end of the process")


def check_leaving(made: Bench, fault: str, conversation: list[Any], **fields: Any) -> None:
    """When the client leaves, its turn is interrupted and its process ends."""
    with leaving(made.server, fault) as client:
        send(client, conversation, **fields)
        wait_until(lambda: made.log.reached(fields["model"]), "the point of the turn")
    (pid,) = made.log.reached(fields["model"])
    wait_until(lambda: not psutil.pid_exists(pid), "the end of the process")
    assert made.log.requests(pid)[-1] == "interrupt"


# the gate

# What a child does where it is to read its conversation, of which a pipe holds a small part; and
# what the request ends with, None: with its answer.
AT_THE_GATE = {
    "exit": SAID["exit"],
    "kill": SAID["kill"],
    "hang": SAID["hang"],
    "deaf": SAID["deaf"],
    "half-exit": SAID["exit"],
    "half-deaf": SAID["deaf"],
    "late": None,
    "reopened": None,
    "twice": None,
}


@pytest.mark.parametrize("fault", AT_THE_GATE)
def test_a_fault_at_the_gate_has_its_answer_and_holds_up_nobody(
    undisturbed: Bench, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    """Streamed and whole, at the same time, with a conversation of 5 MB."""
    run = undisturbed.executor.submit
    late = undisturbed.gate.with_name(f"{undisturbed.gate.name}-late")
    words = f"gate {next(numbers)}"
    try:
        cells = [
            run(check_gate, undisturbed, f"{words} {stream}", fault, stream=stream)
            for stream in (True, False)
        ]
        for stream in ("streamed", "whole"):
            reached = functools.partial(undisturbed.log.reached, f"gate.{fault}.{stream}")
            wait_until(reached, "the child at its gate")
        meanwhile = undisturbed.server.post(f"meanwhile {words}")
        assert meanwhile.text == f"echo: meanwhile {words}; 1 messages"
        assert not (fault == "late" and any(cell.done() for cell in cells))
    finally:
        late.touch()
    failures = [cell.exception(DEADLINE) for cell in cells]
    late.unlink()
    look_for_garbage()
    assert not [row.getMessage() for row in caplog.records if row.levelno >= logging.WARNING]
    assert failures == [None, None]


def check_gate(made: Bench, words: str, fault: str, *, stream: bool) -> None:
    model = f"gate.{fault}.{'streamed' if stream else 'whole'}"
    answer = made.server.post(["x" * 5_000_000, "yes", words], model=model, stream=stream)
    (pid,) = made.log.reached(model)
    if said := AT_THE_GATE[fault]:
        status, kind, part = said
        check_failure(answer, begun=False, status=status, kind=kind, words=part)
        wait_until(lambda: not psutil.pid_exists(pid), "the end of the child")
        return
    assert (answer.status, answer.text) == (200, f"echo: {words}; 3 messages")
    assert int(answer.message["id"].split("_")[2]) == pid
    assert len(made.log.rows(pid)[1]["message"]["content"][0]["text"]) == 5_000_000
    assert made.log.asked(f"'{words}'") == 1
