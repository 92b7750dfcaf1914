"""The stand-in writes nothing that the real CLI does not: each key of its lines, with the type of its
value, is in the lines of that kind that the real one writes.

What it writes on purpose that no CLI would (NOISE, STRANGE, GARBAGE, UNASKED) is left out.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import record
from client import Json
from host import STANDIN
from installed import bundled_cli
from record import TOOL, Recorder, turns
from stubs import Stub

from translate import decode, get_str, mcp_message


def paths(value: Any, at: str = "") -> Iterator[str]:
    """Where each value of a JSON value is, and its type."""
    if isinstance(value, dict):
        yield at + "{}"
        for key, inner in value.items():
            yield from paths(inner, f"{at}.{key}")
    elif isinstance(value, list):
        yield at + "[]"
        for inner in value:
            yield from paths(inner, at + "[]")
    else:
        is_number = type(value) in (int, float)
        yield f"{at}: {'number' if is_number else type(value).__name__}"


def kind(line: Any) -> str:
    """What a line is compared with."""
    inner = line.get("event") or {}
    part = inner.get("delta") or inner.get("content_block") or {}
    asked = line["response"] if line["type"] == "control_response" else {}
    method = get_str(mcp_message(line), "method")
    words = [line["type"], line.get("subtype"), method, asked.get("request_id")]
    words += [inner.get("type"), part.get("type")]
    if line["type"] == "assistant" and line["message"]["model"] == "<synthetic>":
        words.append("made up")
    return " ".join(word for word in words if word)


def shapes(rows: list[Json]) -> dict[str, set[str]]:
    """By kind of line, the paths of all values."""
    found: dict[str, set[str]] = {}
    for row in rows:
        if row["dir"] == "out":
            lines: list[Any] = [row["line"]] if "line" in row else decode(row["text"].encode())
            for line in lines:
                found.setdefault(kind(line), set()).update(paths(line))
    return found


# By scenario of record.py, what makes the stand-in do the same.
SAME: dict[str, Callable[[Recorder], None]] = {
    "text": turns("hello"),
    "client_tool": turns("TOOL 1", tools=[TOOL]),
    "retry_then_success": turns("RETRY 1"),
    "quota_rejected": turns("RATELIMIT 4000000000"),
    "not_logged_in": turns("hello"),
    "interrupt": lambda recorder: record.interrupt(recorder, "SLOW 100"),
    "context_usage": record.count,
    "refused_control": record.refused_control,
}


@pytest.mark.parametrize("name", SAME)
def test_the_stand_in_writes_no_shape_that_the_cli_does_not(
    cli: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name == "interrupt" and cli != bundled_cli():
        pytest.skip("an older one does not close what it has begun")
    wanted = shapes(record.record(str(cli), stub.url, name))
    if name == "not_logged_in":
        monkeypatch.setattr(record, "ALIAS", name.replace("_", "-"))
    found = shapes(record.record(str(STANDIN), stub.url, name, SAME[name]))
    made_up = {key: found[key] - wanted.get(key, set()) for key in found}
    assert {key: sorted(value) for key, value in made_up.items() if value} == {}
