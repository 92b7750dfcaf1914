"""The README and tests/README.md: their tables against the code, their length, their links, and the
commands as a newcomer follows them.

The commands run as they stand, in a fresh clone and an empty HOME.
"""

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import readme
from client import Client, Json
from host import ROOT, wait_until
from installed import CACHE, CLIS, WHEELS
from servers import BRIDGE, Serve, kept_names
from stubs import Stub
from test_fidelity import DIFFERENCES, TOLD

from bridge import COMMANDS, Config, variable
from sessions import METRICS, NEWEST_TESTED, OLDEST

INSTALL = readme.block(".venv/bin/pip install '.[cli]'")
CHECK = readme.block("claude-cli-bridge check")
TESTS = readme.block("-m pytest")
CURL = readme.block("curl http://127.0.0.1:14001/v1/messages")
# As the README says: add "stream": true, and -N to curl.
CURL_STREAM = CURL.replace("curl", "curl -N").replace("200,", '200, "stream": true,')
SDK = readme.block("from anthropic import")
STANDIN = readme.block("CLAUDE_CLI_BIN=tests/standin.py")
[UVX] = re.findall("`(uvx --from .*?)`", readme.section("## Start"))
PROVIDERS = readme.block("model_providers: [{")
COMPLETED = readme.block('"provider_interface": "claude-cli"')
SETTINGS = dataclasses.fields(Config)
FILES = ("bridge.py", "sessions.py", "translate.py")
# The most words that a reader sees who opens no fold, and of all.
MAX_VISIBLE, MAX_WORDS = 1500, 3500
MODULES = ("test_clients", "test_library", "test_js_clients")


def test_the_readme_is_short() -> None:
    text = readme.README.read_text()
    assert readme.word_count(readme.unfolded(text)) <= MAX_VISIBLE
    assert readme.word_count(text) <= MAX_WORDS


def test_words_are_counted_without_addresses_and_what_is_folded() -> None:
    text = """
* [three words here](https://example.org/a-b) and `two more`

| a | `b c` |
<details>
<summary>The <code>title</code></summary>

folded
</details>
"""
    assert readme.word_count(text) == 13
    assert readme.word_count(readme.unfolded(text)) == 12


def test_every_code_block_is_run_by_a_test() -> None:
    for name in MODULES:
        import_module(name)
    assert [text for _, text in readme.blocks() if text not in readme.TAKEN] == []


@pytest.mark.parametrize("path", [readme.README, readme.EVIDENCE], ids=["README", "tests/README"])
def test_every_link_to_a_file_or_a_heading_leads_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    inner = [link.partition("#") for link in links if not link.startswith("https://")]
    assert inner
    for name, _, anchor in inner:
        target = path.parent / name if name else path
        assert target.exists(), name
        assert not anchor or anchor in readme.anchors(target), anchor


def setting_row(item: "dataclasses.Field[Any]") -> str:
    """The row of the README's table for a setting."""
    value = item.default
    number = f"{value:g}" if isinstance(value, float) else str(value)
    default = f"`{number}`" if value or isinstance(value, int | float) else "empty"
    return f"| `{variable(item.name)}` | {default} | {item.metadata['meaning']} |"


def difference_row(name: str) -> str:
    """The row of tests/README.md for a difference between what is sent and what arrives."""
    reason = DIFFERENCES[name].replace("<", "&lt;")
    return f"| {name} | {reason} | {'yes' if name in TOLD else ''} |"


def help_text() -> str:
    command = [sys.executable, ROOT / "bridge.py", "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_readme_shows_eight_settings_as_they_are_and_help_has_all() -> None:
    shown = re.findall(r"^\| `CLAUDE_CLI_.*", readme.section("## Settings"), re.M)
    assert len(shown) == 8
    assert set(shown) <= {setting_row(item) for item in SETTINGS}
    words = " ".join(help_text().split())
    for item in SETTINGS:
        assert item.name == "api_key" or "--" + item.name.replace("_", "-") in words
        assert item.name == "api_key" or item.metadata["meaning"].replace("`", "") in words


@pytest.mark.parametrize("path", [readme.README, readme.EVIDENCE], ids=["README", "tests/README"])
def test_every_setting_that_is_named_is_one(path: Path) -> None:
    known = {variable(item.name) for item in SETTINGS}
    assert set(re.findall(r"CLAUDE_CLI_[A-Z_]+", path.read_text())) <= known


def test_every_flag_that_the_readme_names_is_one() -> None:
    code = re.findall(r"`([^`\n]+)`", readme.README.read_text())
    own = [text for text in code if text.startswith(("--", "claude-cli-bridge "))]
    flags = set(re.findall(r"(?<!\S)--[a-z-]+", " ".join(own)))
    assert "--trace-dir" in flags
    assert flags <= set(re.findall("--[a-z-]+", help_text()))


def test_what_the_table_of_troubles_shows_is_what_the_program_says() -> None:
    table = readme.rows(readme.section("## Trouble"))
    assert len(table) == 12
    program = "".join((ROOT / name).read_text() for name in FILES)
    # Messages go over lines: as neighbouring strings, or by a name for their first half.
    said = re.sub(r'"\s+f?"', "", program)
    for shown, _ in table:
        for words in re.findall("`(.+?)`", shown):
            for part in words.split("..."):
                assert part.strip() in said, part


def test_the_readme_tells_of_each_difference_and_its_reason_and_of_no_other() -> None:
    table = readme.section("### Every difference", readme.EVIDENCE).partition("|---|---|---|\n")[2]
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert rows == [difference_row(name) for name in DIFFERENCES]


def test_each_file_of_tests_is_in_a_table_of_what_they_prove() -> None:
    titles = ("## What each file proves", "### Files of the whole")
    tables = "".join(readme.section(title, readme.EVIDENCE) for title in titles)
    assert {path.stem for path in Path(__file__).parent.glob("test_*.py")} == set(
        re.findall(r"test_\w+", tables)
    )


@pytest.mark.parametrize("path", [readme.README, readme.EVIDENCE], ids=["README", "tests/README"])
def test_the_versions_of_the_cli_are_those_that_the_code_takes_as_tested(path: Path) -> None:
    assert f"{OLDEST} to {NEWEST_TESTED}" in path.read_text()


def test_the_readme_names_ten_differences() -> None:
    assert len(readme.rows(readme.section("## What differs from the API"))) == 10


def test_the_readme_names_each_metric_and_command() -> None:
    metrics = readme.fold("Metrics")
    known = set().union(*METRICS.values())
    assert set(re.findall(r"`([a-z_]+_[a-z]+|processes|connections)`", metrics)) >= known
    words = readme.README.read_text()
    for command in COMMANDS:
        assert f"claude-cli-bridge {command}" in words


def test_the_log_line_of_the_readme_has_the_fields_of_one(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "claude_cli_bridge")
    server = serve()
    answer = server.post("hello")
    caplog.clear()
    server.post(["hello", answer.text, "and now"])
    wait_until(lambda: "conversation=hot" in caplog.text, "the log line")
    [logged] = [item.message for item in caplog.records if "conversation=hot" in item.message]
    [shown] = [line for line in readme.lines() if "INFO request_id=" in line]
    fields = [part.partition("=")[0] for part in shown.partition("INFO ")[2].split()]
    assert fields == [part.partition("=")[0] for part in logged.split()]


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: Path) -> Path:
    """What git has of the project, as it is on the disk.

    pip and uv find packages in a folder, as there is no network.
    """
    if not WHEELS or not CLIS:
        pytest.skip("the packages could not be downloaded")
    folder = tmp_path / "clone"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(
        listed, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(CACHE))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(WHEELS[0]))
    monkeypatch.setenv("PIP_CACHE_DIR", str(tmp_path / "pip"))
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("UV_FIND_LINKS", str(WHEELS[0]))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    monkeypatch.setenv("CLAUDE_CLI_KEEP_ENV", ",".join(kept_names()))
    return folder


@contextlib.contextmanager
def started(command: str, clone: Path) -> Iterator[Client]:
    """The bridge, by a command of the README; what it prints is in clone/log."""
    with (clone / "log").open("w") as log:
        process = subprocess.Popen(
            ["sh", "-ec", command], cwd=clone, stderr=log, stdout=log, start_new_session=True
        )
    try:
        wait_until(
            lambda: "listening on http://127.0.0.1:14001" in (clone / "log").read_text(),
            "the start",
            250,
        )
        yield Client("127.0.0.1", 14001)
    finally:
        os.killpg(process.pid, 15)
        process.wait()


def run(command: str, cwd: Path) -> str:
    done = subprocess.run(
        ["sh", "-ec", command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(300)
def test_a_newcomer_installs_and_asks(clone: Path, since: Callable[[], list[Json]]) -> None:
    with started(INSTALL, clone):
        message = json.loads(run(CURL, clone))
        assert (message["role"], message["stop_reason"]) == ("assistant", "end_turn")
        assert "Say hello." in message["content"][0]["text"]
        assert run(CURL_STREAM, clone).rstrip().endswith('data: {"type":"message_stop"}')
        script = [sys.executable, "-c", SDK]
        assert (
            "Say hello."
            in subprocess.run(script, capture_output=True, text=True, check=True).stdout
        )
        assert len(since()) == 3
    assert "interrupt: works" in run(CHECK, clone)
    with started(STANDIN, clone) as bridge:
        assert bridge.post("hello").text == "echo: hello; 1 messages"


@pytest.mark.timeout(120)
def test_uvx_needs_no_installation(clone: Path) -> None:
    command = UVX.replace("[cli]", "")  # which takes 450 MB
    assert re.match(r"claude-cli-bridge \d", run(f"{command} --version", clone))


def test_the_second_command_is_the_one_that_ci_runs() -> None:
    last_line = (ROOT / ".ci/run").read_text().splitlines()[-1]
    assert last_line == TESTS.rstrip()


def test_the_one_line_of_a_gateway_becomes_the_list_that_the_readme_shows(
    tmp_path: Path, stub: Stub
) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text(PROVIDERS)
    command = [*BRIDGE, "providers", "--config", str(path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == COMPLETED
