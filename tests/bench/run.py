"""All benchmarks, as the table of the README: `python tests/bench/run.py [rounds]`.

Both sides of a ratio are measured in turn in one run; a cell shows the median of the rounds and the lowest and highest
value.  Everything runs in a network namespace with loopback alone, in front of the stub API or of a light stand-in.
"""

import datetime
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import conftest  # noqa: E402
import cost  # noqa: E402
import relay  # noqa: E402
import turns  # noqa: E402
from program import spread  # noqa: E402

Measured = dict[str, list[float]]


def ratio(measured: Measured, one: str, other: str) -> str:
    return spread([a / b for a, b in zip(measured[one], measured[other], strict=True)], 2)


def ms(values: list[float]) -> str:
    return spread([value * 1000 for value in values], 1) + " ms"


def turn_rows(found: Measured) -> list[tuple[str, str, str, str]]:
    more = [a - b for a, b in zip(found["bridge hot"], found["bare hot"], strict=True)]
    cold = "bare CLI, spawn to first delta"
    sdk = "claude-agent-sdk `query()` for each request"
    return [
        ("first content byte, new conversation", cold, ratio(found, "bridge new", "bare new"), "at most 0.30"),
        ("the same with 20 messages of history", cold, ratio(found, "bridge 20", "bare new"), "at most 0.45"),
        ("the same with 200 messages of history", cold, ratio(found, "bridge 200", "bare new"), "at most 2.0"),
        ("hot turn", "bare CLI, hot turn", ratio(found, "bridge hot", "bare hot"), "at most 1.10"),
        ("hot turn, in addition", "bare CLI, hot turn", ms(more), "at most 3 ms"),
        ("new conversation, times faster", sdk, ratio(found, "query new", "bridge new"), "at least 3"),
        ("20 messages, times faster", sdk, ratio(found, "query 20", "bridge 20"), "at least 1"),
        ("200 messages, times faster", sdk, ratio(found, "query 200", "bridge 200"), ""),
        (
            "hot turn, times faster",
            sdk,
            spread([statistics.median(found["query new"]) / hot for hot in found["bridge hot"]], 1),
            "at least 12",
        ),
        ("for scale: bare CLI, spawn to first delta", "", ms(found["bare new"]), ""),
        ("for scale: bare CLI, hot turn", "", ms(found["bare hot"]), ""),
    ]


def relay_rows(found: Measured) -> list[tuple[str, str, str, str]]:
    return [
        ("rate of 50,000 recorded deltas", "plain asyncio copy", ratio(found, "relay", "copy"), "at least 0.25"),
        ("CPU of the bridge for one event", "", spread(found["cpu"], 2) + " µs", "at most 8 µs"),
        ("rate to 100 clients of 100 children", "to one", ratio(found, "many", "relay"), "at least 0.8"),
        ("200 conversations, 100 deltas/s each: late", "", spread(found["late"], 0) + " ms", "at most 50 ms"),
        ("the same, 99th percentile", "", spread(found["late 99"], 0) + " ms", "at most 250 ms"),
    ]


def cost_rows(found: Measured) -> list[tuple[str, str, str, str]]:
    more = [a - b for a, b in zip(found["listen"], found["python"], strict=True)]
    return [
        ("memory (PSS), idle", "", spread(found["idle"], 1) + " MB", "at most 30 MB"),
        ("memory after 500 turns", "", spread(found["500"], 1) + " MB", ""),
        ("memory after 1,000 turns", "", spread(found["1000"], 1) + " MB", "at most 45 MB"),
        ("CPU for one turn, HTTP and log included", "", ms(found["turn"]), ""),
        ("start to listening, in addition", "`python -c pass`", ms(more), "at most 250 ms"),
    ]


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    cli = conftest.bundled_cli() or sys.exit("the extra `cli` is not installed")
    version = subprocess.run([cli, "--version"], capture_output=True, text=True, check=True).stdout.split()[0]
    conftest.isolate()
    with conftest.Stub() as stub, tempfile.TemporaryDirectory() as home:
        os.environ |= {"HOME": home, "ANTHROPIC_BASE_URL": stub.url, "ANTHROPIC_API_KEY": "sk-stub"}
        os.environ |= {"DISABLE_TELEMETRY": "1", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}
        rows = turn_rows(turns.measure(rounds, cli, home, conftest.KEEP))
    rows += relay_rows(relay.measure(rounds)) + cost_rows(cost.measure(rounds))
    python = sys.version.split()[0]
    print(f"{datetime.date.today()}, {os.cpu_count()} cores, CLI {version}, Python {python}, {rounds} rounds\n")
    print("| measure | against | median (lowest to highest) | goal |\n|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
