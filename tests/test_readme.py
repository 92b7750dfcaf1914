"""The README: its tables against the code, and its commands as a newcomer follows them.

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
from servers import KEEP, Server
from stubs import Stub
from test_fidelity import DIFFERENCES, TOLD

from bridge import COMMANDS, GROUPS, Config, variable
from sessions import METRICS

INSTALL = readme.block(".venv/bin/pip install '.[cli]'")
CHECK = readme.block("claude-cli-bridge check")
TESTS = readme.block("-m pytest")
CURL = readme.block("curl http://127.0.0.1:14001/v1/messages")
CURL_STREAM = readme.block("curl -N")
SDK = readme.block("from anthropic import")
STANDIN = readme.block("CLAUDE_CLI_BIN=tests/standin.py")
PROVIDERS = readme.block("model_providers: [{")
COMPLETED = readme.block('"provider_interface": "claude-cli"')
SETTINGS = dataclasses.fields(Config)
MODULES = ("test_clients", "test_gateway", "test_library", "test_js_clients")


def test_every_code_block_is_run_by_a_test() -> None:
    for name in MODULES:
        import_module(name)
    # The same is in deploy/, and run by test_deploy.py.
    deploying = readme.README.read_text().partition("\n## Deploying\n")[2]
    left = [text for _, text in readme.blocks() if text not in readme.TAKEN]
    assert [text for text in left if text not in deploying] == []


def setting_row(item: "dataclasses.Field[Any]") -> str:
    """The row of the README's table for a setting."""
    value = item.default
    number = f"{value:g}" if isinstance(value, float) else str(value)
    default = f"`{number}`" if value or isinstance(value, int | float) else "empty"
    return f"| `{variable(item.name)}` | {default} | {item.metadata['meaning']} |"


def difference_row(name: str) -> str:
    """The row of the README's table for a difference between what is sent and what arrives."""
    reason = DIFFERENCES[name].replace("<", "&lt;")
    return f"| {name} | {reason} | {'yes' if name in TOLD else ''} |"


@pytest.mark.parametrize("group", GROUPS)
def test_the_readme_has_a_row_for_each_setting_in_its_group(group: str) -> None:
    found = re.findall(r"^\| `CLAUDE_CLI_.*", readme.section(f"### {GROUPS[group]}"), re.M)
    fields = [item for item in SETTINGS if item.metadata["group"] == group]
    assert found == [setting_row(item) for item in fields]


def test_each_group_of_settings_is_in_the_readme() -> None:
    assert {item.metadata["group"] for item in SETTINGS} == set(GROUPS)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_the_readme_tells_of_each_difference_and_its_reason(name: str) -> None:
    assert difference_row(name) in readme.lines()


def test_the_readme_tells_of_no_difference_that_there_is_not() -> None:
    table = readme.section("### Every difference").partition("|---|---|---|\n")[2]
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert rows == [difference_row(name) for name in DIFFERENCES]


def test_the_readme_names_each_metric_and_command() -> None:
    operating = readme.section("### Metrics")
    assert set(re.findall(r"`([a-z_]+_[a-z]+|processes|connections)`", operating)) >= set(METRICS)
    words = readme.README.read_text()
    for command in COMMANDS:
        assert f"claude-cli-bridge {command}" in words


def test_the_log_line_of_the_readme_has_the_fields_of_one(
    serve: Callable[..., Server], caplog: pytest.LogCaptureFixture
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

    pip finds packages in a folder, as there is no network.
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
    monkeypatch.setenv("CLAUDE_CLI_KEEP_ENV", ",".join(KEEP))
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
            110,
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


def test_the_second_command_is_the_one_that_ci_runs() -> None:
    last_line = (ROOT / ".ci/run").read_text().splitlines()[-1]
    assert last_line == TESTS.rstrip()


def test_the_one_line_of_a_gateway_becomes_the_list_that_the_readme_shows(
    tmp_path: Path, stub: Stub
) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text(PROVIDERS)
    command = [sys.executable, str(ROOT / "bridge.py"), "providers", "--config", str(path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == COMPLETED
