"""The `model_providers` of a gateway's configuration file."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Json, Program

Write = Callable[..., str]
COMPLETE = {
    "base_url": "http://127.0.0.1:14001",
    "name": "claude-cli",
    "provider_interface": "claude-cli",
    "access_key": "unused",
    "model": "claude-cli/*",
}
OTHER = {"model": "openai/gpt-5", "access_key": "$OPENAI_API_KEY", "anything": {"else": None}}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """The path of a file with these entries; or with this text."""

    def write(*entries: Json, text: str = "", name: str = "gateway.json") -> str:
        path = tmp_path / name
        path.write_text(text or json.dumps({"version": "v1", "listeners": [{"port": 1}], "model_providers": entries}))
        return str(path)

    return write


def run(*arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "bridge.py"), *arguments]
    return subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True, check=False)


def completed(path: str, *arguments: str, **environ: str) -> Any:
    done = run("providers", "--config", path, *arguments, **environ)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def refused(path: str, *arguments: str) -> str:
    done = run(*arguments, "--config", path)
    [line] = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert line.startswith(f"claude-cli-bridge: CLAUDE_CLI_CONFIG: {path}")
    return line


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gateway.yaml", "model_providers: [{ model: claude-cli/* }]"),
        ("gateway.yml", "model_providers:\n  - model: claude-cli/*\n"),
        ("gateway.toml", '[[model_providers]]\nmodel = "claude-cli/*"\n'),
        ("gateway.json", '{"model_providers": [{"model": "claude-cli/*"}]}'),
    ],
)
def test_one_line_is_completed_whatever_the_format(write: Write, name: str, text: str) -> None:
    assert completed(write(name=name, text=text)) == [COMPLETE]


def test_what_the_file_sets_stays_and_other_providers_are_left_alone(write: Write) -> None:
    mine = {"model": "claude-cli/opus", "base_url": "http://bridge:1", "access_key": "k", "default": True, "name": "o"}
    found = completed(write(OTHER, mine, {"model": "claude-cli/*", "name": None}))
    assert found == [OTHER, {**mine, "provider_interface": "claude-cli"}, COMPLETE]


@pytest.mark.parametrize(
    ("listen", "base_url"),
    [
        ("localhost:99", "http://localhost:99"),
        ("[::1]:99", "http://[::1]:99"),
        ("0.0.0.0:99", "http://127.0.0.1:99"),
        ("[::]:99", "http://[::1]:99"),
        ("unix:/run/bridge", "unix:/run/bridge"),
    ],
)
def test_the_base_url_is_the_listen_address(write: Write, listen: str, base_url: str) -> None:
    path = write({"model": "claude-cli/*"})
    assert completed(path, "--listen-addr", listen) == [{**COMPLETE, "base_url": base_url}]
    assert completed(path, CLAUDE_CLI_LISTEN_ADDR=listen) == [{**COMPLETE, "base_url": base_url}]


def test_a_key_is_named_and_not_shown(write: Write) -> None:
    found = completed(write({"model": "claude-cli/*"}), CLAUDE_CLI_API_KEY="sesame")
    assert found == [{**COMPLETE, "access_key": "$CLAUDE_CLI_API_KEY"}]


MINE = {"model": "claude-cli/*"}


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([{"model": "openai/*"}], "model_providers.0.model: only claude-cli/* can be a wildcard"),
        ([MINE, {"model": "*"}], "model_providers.1.model: only claude-cli/* can be a wildcard"),
        (
            [{"model": "openai/*", "provider_interface": "claude-cli"}],
            "model_providers.0.model: Input should be claude",
        ),
        ([{"model": "openai/gpt", "name": "claude-cli"}], "model_providers.0.model: Input should be claude-cli/*"),
        ([{"name": "claude-cli"}], "model_providers.0.model: Field required"),
        ([{"model": "claude-cli"}], "model_providers.0.model: Input should be claude-cli/*"),
        ([{"model": "claude-cli/son*"}], "model_providers.0.model: Input should be claude-cli/*"),
        ([{"model": "claude-cli/--bare"}], "model_providers.0.model: Input should be claude-cli/*"),
        ([OTHER, {**MINE, "base-url": "x"}], "model_providers.1.base-url: Extra inputs are not permitted"),
        ([{**MINE, "access_key": 5}], "model_providers.0.access_key: Input should be a valid string"),
        ([{**MINE, "provider_interface": "openai"}], "model_providers.0.provider_interface: Input should be 'claude-"),
        ([MINE, {**MINE, "base_url": "http://x"}], "model_providers.1.base_url: contradicts model_providers.0"),
        (
            [MINE, OTHER, {**MINE, "name": "b"}],
            "model_providers.2.name: contradicts model_providers.0, of the same model",
        ),
        (
            [{"model": "claude-cli/a", "access_key": "x"}, {"model": "claude-cli/b", "access_key": "y"}],
            "model_providers.1.access_key: contradicts model_providers.0, of the same name",
        ),
    ],
)
def test_a_wrong_entry_is_an_error_with_its_place(write: Write, entries: list[Json], words: str) -> None:
    path = write(*entries)
    assert words in refused(path, "providers")
    assert words in refused(path)


def test_entries_that_agree_do_not_contradict_each_other(write: Write) -> None:
    two = {"model": "claude-cli/opus", "base_url": "http://b", "name": "b"}
    assert len(completed(write(MINE, MINE, {"model": "claude-cli/opus"}))) == 3
    assert len(completed(write(MINE, two))) == 2


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", '{"model_providers": [sesame]}', "line 1 column"),
        ("a.toml", "a = sesame", "line 1, column"),
        ("a.yaml", "a: [\nsesame: ]{", "not YAML, line 2"),
        ("a.json", "[]", "Input should be a valid object"),
        ("a.json", '{"model_providers": {}}', "model_providers: Input should be a valid list"),
        ("a.json", '{"model_providers": ["claude-cli/*"]}', "model_providers.0: Input should be a valid object"),
    ],
)
def test_a_file_that_cannot_be_read_says_where_without_its_text(write: Write, name: str, text: str, words: str) -> None:
    line = refused(write(name=name, text=text))
    assert words in line
    assert "sesame" not in line


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "model_providers: [{model: a/b, 5: x}]"),
        ("a.yaml", "model_providers: [{model: a/b, access_key: !!binary aGk=}]"),
        ("a.yaml", "model_providers: [{model: a/b, access_key: !!bool sesame}]"),
        ("a.yaml", "model_providers: [{model: a/b, access_key: !!int sesame}]"),
        ("a.yaml", "model_providers: &a [{model: a/b, loop: *a}]"),
        ("a.yaml", "a: " + "[" * 2000),
        ("a.toml", "a = " + "[" * 2000),
        ("a.json", '{"model_providers": ' + "[" * 2000),
        ("a.yaml", f"model_providers: [{{model: a/b, big: {2**70}}}]"),
    ],
)
def test_what_json_cannot_hold_is_an_error_of_one_line(write: Write, name: str, text: str) -> None:
    line = refused(write(name=name, text=text), "providers")
    assert "cannot be read" in line
    assert "sesame" not in line


@pytest.mark.parametrize("name", ["a.yaml", "a.toml"])
def test_an_empty_file_has_no_provider(write: Write, name: str) -> None:
    assert completed(write(name=name, text="\n")) == []


def test_the_ending_of_the_name_says_what_a_file_is(write: Write) -> None:
    assert completed(write(name="A.YAML", text="model_providers: [{ model: claude-cli/* }]")) == [COMPLETE]


def test_a_wrong_listen_address_is_not_the_files_fault(write: Write) -> None:
    done = run("providers", "--config", write({"model": "claude-cli/*"}), "--listen-addr", "foo")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("claude-cli-bridge: CLAUDE_CLI_LISTEN_ADDR: 'foo' is neither")


@pytest.mark.parametrize("words", [("--api-key", "sesame"), ("--api-key=sesame",), ("sesame",), ("check", "sesame")])
def test_what_is_no_option_is_not_repeated(words: tuple[str, ...]) -> None:
    done = run(*words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "sesame" not in done.stderr
    assert ("there is no --api-key" in done.stderr) == (words[0] != "check" and words[0].startswith("-"))


def test_a_reader_that_left_is_no_crash(write: Write) -> None:
    path = write(*({"model": f"claude-cli/{number}"} for number in range(500)))
    command = f"{sys.executable} {ROOT / 'bridge.py'} providers --config {path} | head -1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[\n", "")


def test_a_missing_file_and_a_missing_option_are_errors(tmp_path: Path) -> None:
    assert "No such file" in refused(str(tmp_path / "nowhere.json"))
    done = run("providers")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "CLAUDE_CLI_CONFIG" in done.stderr


def test_without_pyyaml_yaml_is_an_error_that_names_it(write: Write, tmp_path: Path) -> None:
    (tmp_path / "yaml.py").write_text("raise ModuleNotFoundError")
    path = write(name="a.yaml", text="model_providers: []")
    done = run("providers", "--config", path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert "PyYAML" in done.stderr


@pytest.mark.parametrize("entries", [[], [OTHER]])
def test_without_a_claude_cli_provider_nothing_starts_and_one_line_says_so(write: Write, entries: list[Json]) -> None:
    """Not even with a CLI that is not there: a launcher can always start the bridge."""
    done = run("--config", write(*entries), CLAUDE_CLI_BIN="/no/such/claude")
    assert (done.returncode, done.stdout) == (0, "")
    [line] = done.stderr.splitlines()
    assert "no claude-cli provider" in line


def test_with_a_claude_cli_provider_the_listener_starts(launch: Callable[..., Program], write: Write) -> None:
    path = write(OTHER, MINE)
    assert launch("--config", path).post().text == "echo: hello; 1 messages"
    assert launch(CLAUDE_CLI_CONFIG=path).post().text == "echo: hello; 1 messages"


def test_version_and_help() -> None:
    assert run("--version").stdout.startswith("claude-cli-bridge 0.")
    lines = run("--help", COLUMNS="80").stdout.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 81
    assert "--max-idle 8" in " ".join(lines)
