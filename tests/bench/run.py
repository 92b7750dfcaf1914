"""All benchmarks, as the table of tests/README.md: `python tests/bench/run.py [rounds]`.

Both sides of a ratio are measured in turn in one run; a cell shows the median of the rounds and the
lowest and highest value.  Everything runs in a network namespace with loopback alone, in front of
the stub API or of a light stand-in.
"""

import datetime
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import cost  # noqa: E402
import host  # noqa: E402
import installed  # noqa: E402
import relay  # noqa: E402
import servers  # noqa: E402
import stubs  # noqa: E402
import turns  # noqa: E402
from program import spread  # noqa: E402

Measured = dict[str, list[float]]
Row = tuple[str, str, str, str]
BARE = "bare CLI, spawn to first delta"
SDK = "claude-agent-sdk `query()` for each request"


def ratio(measured: Measured, one: str, other: str) -> str:
    return spread([a / b for a, b in zip(measured[one], measured[other], strict=True)], 2)


def ms(values: list[float]) -> str:
    return spread([value * 1000 for value in values], 1) + " ms"


def cold(found: Measured, words: str, name: str, goal: str = "") -> Row:
    """A first delta in proportion to that of the bare CLI in the same round."""
    return words, BARE, ratio(found, name, "bare new"), goal


def turn_rows(found: Measured) -> list[Row]:
    return [*fresh_rows(found), *hot_rows(found), *sdk_rows(found), *other_rows(found)]


def fresh_rows(found: Measured) -> list[Row]:
    """Conversations that no process holds."""
    rows = [cold(found, "first content byte, new conversation", "new", "at most 0.30")]
    goals = {20: "at most 0.45", 200: "at most 2.0"}
    for length in turns.LENGTHS:
        words = f"the same with {length:,} messages of history"
        rows.append(cold(found, words, str(length), goals.get(length, "")))
    rows.append(cold(found, "new conversation, without a spare", "new, no spare"))
    for length in turns.LENGTHS:
        words = f"the same with {length:,} messages of history"
        rows.append(cold(found, words, f"{length}, no spare"))
    for model in turns.MODELS:
        rows.append(cold(found, f"models in turn: new conversation of {model}", f"new {model}"))
    for name in found:
        if delay := name.partition("first after ")[2]:
            rows.append(cold(found, f"first request of a bridge, {delay} s after it listens", name))
    return rows


def hot_rows(found: Measured) -> list[Row]:
    bare = "bare CLI, hot turn"
    more = [a - b for a, b in zip(found["hot"], found["bare hot"], strict=True)]
    # The median of a round's title calls to its start of the bare CLI.
    medians = [
        statistics.median(found["title"][at : at + turns.TITLES])
        for at in range(0, len(found["title"]), turns.TITLES)
    ]
    titles = ratio({"title": medians, "bare new": found["bare new"]}, "title", "bare new")
    kept = f"{spread(found['titles hot'], 0)} of {turns.TITLES}"
    words = f"title calls of {turns.SMALL} between turns of {turns.LARGE}"
    return [
        ("hot turn", bare, ratio(found, "hot", "bare hot"), "at most 1.10"),
        ("hot turn, in addition", bare, ms(more), "at most 3 ms"),
        (words, BARE, titles, ""),
        (f"the same: hot turns of {turns.LARGE}", "", kept, f"{turns.TITLES} of {turns.TITLES}"),
    ]


def sdk_rows(found: Measured) -> list[Row]:
    hot = spread([statistics.median(found["query new"]) / one for one in found["hot"]], 1)
    words = "{} messages, history as prose, times faster"
    return [
        ("new conversation, times faster", SDK, ratio(found, "query new", "new"), "at least 3"),
        (words.format(20), SDK, ratio(found, "query 20", "20"), "at least 1"),
        (words.format(200), SDK, ratio(found, "query 200", "200"), ""),
        ("hot turn, times faster", SDK, hot, "at least 12"),
    ]


def other_rows(found: Measured) -> list[Row]:
    words = f"{turns.COUNTS} counts of tokens at once"
    return [
        (words, "straight at the stub API", ratio(found, "counts", "stub counts"), ""),
        (words, BARE, ratio(found, "counts", "bare new"), ""),
        ("for scale: the counts straight at the stub API", "", ms(found["stub counts"]), ""),
        ("for scale: bare CLI, spawn to first delta", "", ms(found["bare new"]), ""),
        ("for scale: bare CLI, hot turn", "", ms(found["bare hot"]), ""),
    ]


def relay_rows(found: Measured) -> list[Row]:
    return [
        (
            "rate of 50,000 recorded deltas",
            "plain asyncio copy",
            ratio(found, "relay", "copy"),
            "at least 0.25",
        ),
        ("CPU of the bridge for one event", "", spread(found["cpu"], 2) + " µs", "at most 8 µs"),
        (
            "rate to 100 clients of 100 children",
            "to one",
            ratio(found, "many", "relay"),
            "at least 0.8",
        ),
        (
            "200 conversations, 100 deltas/s each: late",
            "",
            spread(found["late"], 0) + " ms",
            "at most 50 ms",
        ),
        ("the same, 99th percentile", "", spread(found["late 99"], 0) + " ms", "at most 250 ms"),
    ]


def cost_rows(found: Measured) -> list[Row]:
    more = [a - b for a, b in zip(found["listen"], found["python"], strict=True)]
    return [
        ("memory (PSS), idle", "", spread(found["idle"], 1) + " MB", "at most 30 MB"),
        ("memory after 500 turns", "", spread(found["500"], 1) + " MB", ""),
        ("memory after 1,000 turns", "", spread(found["1000"], 1) + " MB", "at most 45 MB"),
        ("CPU for one turn, HTTP and log included", "", ms(found["turn"]), ""),
        ("start to listening, in addition", "`python -c pass`", ms(more), "at most 250 ms"),
    ]


def measured_rows(rounds: int, cli: Path) -> Iterator[Row]:
    """The rows of the table, those of a part as soon as it is measured."""
    with stubs.Stub() as stub, tempfile.TemporaryDirectory() as home:
        os.environ |= {"HOME": home, "ANTHROPIC_BASE_URL": stub.url, "ANTHROPIC_API_KEY": "sk-stub"}
        os.environ |= {"DISABLE_TELEMETRY": "1", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}
        yield from turn_rows(turns.measure(rounds, cli, home, servers.KEEP))
    yield from relay_rows(relay.measure(rounds))
    yield from cost_rows(cost.measure(rounds))


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    cli = installed.bundled_cli() or sys.exit("the extra `cli` is not installed")
    said = subprocess.run([cli, "--version"], capture_output=True, text=True, check=True).stdout
    version = said.split()[0]
    host.isolate()
    machine = f"{os.cpu_count()} cores, CLI {version}, Python {sys.version.split()[0]}"
    print(f"{datetime.date.today()}, {machine}, {rounds} rounds\n")
    print("| measure | against | median (lowest to highest) | goal |\n|---|---|---|---|")
    for row in measured_rows(rounds, cli):
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
