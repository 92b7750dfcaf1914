"""All benchmarks, as the table of tests/README.md: `python tests/bench/run.py [rounds [part...]]`.

Both sides of a ratio are measured in turn in one run; a cell shows the median of the rounds and the
lowest and highest value.  Everything runs in a network namespace with loopback alone, in front of
the stub API or of a light stand-in.  Parts: turns (with an API key), subscription, cache, memory,
relay, cost; by default all of them.
"""

import datetime
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import cost  # noqa: E402
import host  # noqa: E402
import installed  # noqa: E402
import memory  # noqa: E402
import prompt_cache  # noqa: E402
import relay  # noqa: E402
import turns  # noqa: E402
import user  # noqa: E402
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
    words = "first content byte, new conversation that begins as the last one"
    rows = [cold(found, words, "alike", "at most 0.30")]
    rows.append(cold(found, "new conversation of another kind, spare ready", "new"))
    goals = {20: "at most 0.45", 200: "at most 2.0"}
    for length in turns.LENGTHS:
        words = f"rebuild with {length:,} messages, spare ready"
        rows.append(cold(found, words, str(length), goals.get(length, "")))
    rows.append(cold(found, "new conversation, no spare", "new, no spare"))
    for length in turns.LENGTHS:
        words = f"rebuild with {length:,} messages, no spare"
        rows.append(cold(found, words, f"{length}, no spare"))
    for model in turns.MODELS:
        rows.append(cold(found, f"three models in turn: {model}", f"new {model}"))
    return [*rows, *first_second_rows(found)]


def first_second_rows(found: Measured) -> list[Row]:
    rows = []
    for delay in turns.DELAYS:
        cell = ratio(found, f"first after {delay:g}", f"bare after {delay:g}")
        words = f"first request of a bridge, {delay:g} s after its start"
        rows.append((words, "bare CLI, started when it is sent", cell, "at most 1"))
    return rows


def subscription_rows(found: Measured) -> list[Row]:
    words = "first content byte, new conversation that begins as the last one"
    rows = [
        cold(found, words, "alike"),
        cold(found, "new conversation of another kind, spare ready", "new"),
        ("hot turn", "bare CLI, hot turn", ratio(found, "hot", "bare hot"), ""),
        *first_second_rows(found),
        ("for scale: bare CLI, spawn to first delta", "", ms(found["bare new"]), ""),
    ]
    return [named(row, user.NAMES["subscription-with-account"]) for row in rows]


def named(row: Row, login: str) -> Row:
    return f"{row[0]} ({login})", *row[1:]


def cache_rows(found: dict[str, float], login: str) -> list[Row]:
    words = {
        "hot": "hot turn",
        "new": "new conversation, same system prompt and tools",
        "rebuilt": "after a restart",
        "forked": "another continuation of one history",
    }
    rows = []
    for kind, name in words.items():
        cell = f"{found[kind]:.1%} against {found['query ' + kind]:.1%}"
        what = f"share that the prompt cache can read again: {name}"
        rows.append((what, "`query()` with the history as prose", cell, ""))
    return [named(row, login) for row in rows]


def memory_rows(found: Measured, login: str) -> list[Row]:
    more = [a - b for a, b in zip(found["rebuilt"], found["hot"], strict=True)]
    work = [a - b for a, b in zip(found["rebuilt cpu"], found["hot cpu"], strict=True)]
    rows = [
        ("private memory of the bridge", "", mb(found["bridge"]), ""),
        ("private memory of a spare", "", mb(found["spare"]), ""),
        ("private memory of a warm process", "", mb(found["warm"]), ""),
        (f"{memory.WARM} warm ones (CLAUDE_CLI_MAX_IDLE)", "", mb(found["all warm"]), ""),
        ("rebuild with 20 messages, in addition", "hot turn", ms(more), ""),
        ("the same, CPU, with a new spare", "hot turn", ms(work), ""),
    ]
    return [named(row, login) for row in rows]


def mb(values: list[float]) -> str:
    return spread(values, 0) + " MB"


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
    words = f"title of {turns.SMALL} between turns of {turns.LARGE}"
    return [
        ("hot turn", bare, ratio(found, "hot", "bare hot"), "at most 1.10"),
        ("hot turn, in addition", bare, ms(more), "at most 3 ms"),
        (words, BARE, titles, ""),
        (f"the same: hot turns of {turns.LARGE}", "", kept, f"{turns.TITLES} of {turns.TITLES}"),
    ]


def sdk_rows(found: Measured) -> list[Row]:
    hot = spread([statistics.median(found["query new"]) / one for one in found["hot"]], 1)
    prose = "`query()` with the history as prose"
    return [
        ("new conversation, times faster", SDK, ratio(found, "query new", "new"), "at least 3"),
        ("20 messages, times faster", prose, ratio(found, "query 20", "20"), "at least 1"),
        ("200 messages, times faster", prose, ratio(found, "query 200", "200"), ""),
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
    rate = ratio(found, "relay", "copy")
    late = f"{relay.AT_PACE} conversations, {relay.PACE} deltas/s each: late"
    return [
        (f"rate of {relay.EVENTS:,} recorded deltas", "plain asyncio copy", rate, ""),
        (
            "CPU of the bridge for one event of a flood",
            "",
            spread(found["cpu"], 1) + " µs",
            "at most 8 µs",
        ),
        (
            f"rate to {relay.MANY} clients of {relay.MANY} children",
            "to one",
            ratio(found, "many", "relay"),
            "",
        ),
        (late, "", spread(found["late"], 0) + " ms", "at most 50 ms"),
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


KEY, SUBSCRIPTION = user.NAMES


def key_part(rounds: int, cli: Path) -> Iterator[Row]:
    with user.logged_in(KEY, cli) as one:
        yield from turn_rows(turns.measure(rounds, one))


def subscription_part(rounds: int, cli: Path) -> Iterator[Row]:
    parts = (turns.hot_turns, turns.first_second)
    with user.logged_in(SUBSCRIPTION, cli) as one:
        yield from subscription_rows(turns.measure(rounds, one, parts))


def cache_part(rounds: int, cli: Path) -> Iterator[Row]:
    """Bytes are the same in each round."""
    for login in user.NAMES:
        with user.logged_in(login, cli) as one:
            yield from cache_rows(prompt_cache.measure(one), one.name)


def memory_part(rounds: int, cli: Path) -> Iterator[Row]:
    for login in user.NAMES:
        with user.logged_in(login, cli) as one:
            yield from memory_rows(memory.measure(rounds, one), one.name)


def relay_part(rounds: int, cli: Path) -> Iterator[Row]:
    yield from relay_rows(relay.measure(rounds))


def cost_part(rounds: int, cli: Path) -> Iterator[Row]:
    yield from cost_rows(cost.measure(rounds))


PARTS = {
    "turns": key_part,
    "subscription": subscription_part,
    "cache": cache_part,
    "memory": memory_part,
    "relay": relay_part,
    "cost": cost_part,
}


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    parts = sys.argv[2:] or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        sys.exit(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    cli = installed.bundled_cli() or sys.exit("the extra `cli` is not installed")
    said = subprocess.run([cli, "--version"], capture_output=True, text=True, check=True).stdout
    version = said.split()[0]
    host.isolate()
    machine = f"{os.cpu_count()} cores, CLI {version}, Python {sys.version.split()[0]}"
    busy = f"load before it {os.getloadavg()[0]:.1f}"
    print(f"{datetime.date.today()}, {machine}, {rounds} rounds, {busy}\n")
    print("| measure | against | median (lowest to highest) | goal |\n|---|---|---|---|")
    for part in parts:
        for row in PARTS[part](rounds, cli):
            print(f"| {' | '.join(row)} |", flush=True)
    print(f"\nload after it {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
