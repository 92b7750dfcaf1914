"""What warm processes hold: memory of theirs alone (private pages, proc(5)), in MB; and what it
takes instead to build a conversation anew, in seconds."""

import contextlib
import time
import uuid

import psutil
from program import Program, request
from user import User

import sessions

SPARES = sessions.PoolConfig().spares
WARM = sessions.PoolConfig().max_idle
PAIRS = 10  # questions and answers before a process has the conversation
TURNS = 3


def start(user: User, **settings: str) -> Program:
    settings |= {"CLAUDE_CLI_BIN": user.config.bin}
    return Program(CLAUDE_CLI_KEEP_ENV=",".join(user.config.keep_env), **settings)


def private(process: psutil.Process) -> float:
    return float(process.memory_full_info().uss) / 1e6


def processes(program: Program, count: int) -> list[psutil.Process]:
    """The processes of the CLI, once there are so many and they rest."""
    found: list[psutil.Process] = []
    # One that is asked who is logged in ends again.
    while len(found) != count or found != program.psutil.children():
        found = list(program.psutil.children())
        program.rest()
    return found


def cpu(program: Program) -> float:
    """Seconds of CPU of the program and of all its children, those that have ended too."""
    own = program.psutil.cpu_times()
    children = [child.cpu_times() for child in program.psutil.children()]
    ended = float(own.children_user + own.children_system)
    return program.cpu() + ended + sum(times.user + times.system for times in children)


def ask(program: Program, talk: list[str], expected: bytes) -> float:
    """The seconds to the first delta of an answer, which is read to its end."""
    with program.connect() as connection:
        began, took = time.perf_counter(), 0.0
        connection.sendall(request(talk))
        data = b""
        while b'"message_stop"' not in data:
            part = connection.recv(65536)
            assert part, data[-500:]
            data += part
            if not took and b'"content_block_delta"' in data:
                took = time.perf_counter() - began
    assert b"x-bridge-session: " + expected in data, data[:500]
    return took


def history() -> list[str]:
    """A conversation that no process holds."""
    mark = uuid.uuid4().hex
    return [f"message {number} of {mark}" for number in range(2 * PAIRS)]


def converse(program: Program) -> list[str]:
    """A conversation that goes on for some turns."""
    talk = history()
    for number in range(TURNS):
        ask(program, [*talk, f"SAY {number}"], b"hot" if number else b"rebuilt")
        talk += [f"SAY {number}", f"{number}"]
    return talk


def measure(rounds: int, user: User) -> dict[str, list[float]]:
    measured: dict[str, list[float]] = {}

    def add(name: str, *values: float) -> None:
        measured.setdefault(name, []).extend(values)

    with contextlib.closing(start(user)) as program:
        add("spare", *map(private, processes(program, SPARES)))
        talk = converse(program)
        for number in range(min(rounds, WARM - 1)):  # none is evicted
            processes(program, SPARES + 1 + number)
            before = cpu(program)
            add("hot", ask(program, [*talk, f"SAY {number}"], b"hot"))
            talk += [f"SAY {number}", f"{number}"]
            processes(program, SPARES + 1 + number)
            between = cpu(program)
            add("hot cpu", between - before)
            add("rebuilt", ask(program, [*history(), "SAY on"], b"rebuilt"))
            processes(program, SPARES + 2 + number)
            add("rebuilt cpu", cpu(program) - between)
        add("bridge", private(program.psutil))
    with contextlib.closing(start(user, CLAUDE_CLI_SPARES="0")) as program:
        for _ in range(WARM):
            converse(program)
        add("warm", *map(private, processes(program, WARM)))
        add("all warm", sum(measured["warm"]))
    return measured
