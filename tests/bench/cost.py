"""What the bridge itself costs: memory, CPU for one turn, and the time from start to listening."""

import subprocess
import sys
import time
import uuid
from pathlib import Path

from program import Program, request
from relay import FEEDER, ask


def pss(program: Program) -> float:
    """Megabytes of the program's own memory, shared pages counted in parts (proc(5))."""
    rows = Path(f"/proc/{program.process.pid}/smaps_rollup").read_text().splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith("Pss:")) / 1024


def turns(program: Program, count: int) -> None:
    """Conversations of ten turns, one after another."""
    for _ in range(count // 10):
        talk = [f"FEED 20 {uuid.uuid4()}"]
        for _ in range(10):
            ask(program, [request(talk)])
            talk += ["word " * 20, f"FEED 20 {uuid.uuid4()}"]


def measure(rounds: int) -> dict[str, list[float]]:
    measured: dict[str, list[float]] = {
        name: [] for name in ("python", "listen", "idle", "500", "1000", "turn")
    }
    for _ in range(rounds):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "pass"], check=True)
        measured["python"].append(time.perf_counter() - began)
        program = Program(CLAUDE_CLI_BIN=FEEDER)
        try:
            measured["listen"].append(program.seconds_to_listen)
            program.rest()
            measured["idle"].append(pss(program))
            cpu = program.cpu()
            turns(program, 500)
            measured["500"].append(pss(program))
            turns(program, 500)
            measured["1000"].append(pss(program))
            measured["turn"].append((program.cpu() - cpu) / 1000)
        finally:
            program.close()
    return measured
