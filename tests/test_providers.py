"""The `model_providers` of a gateway's configuration file."""

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from client import Json
from host import ROOT
from servers import Launch, refusal, run

import bridge

Write = Callable[..., str]
COMPLETE = {
    "base_url": "http://127.0.0.1:14001",
    "name": "claude-cli/*",
    "provider_interface": "claude-cli",
    "access_key": "claude-cli-local",
    "model": "claude-cli/*",
}
OTHER = {"model": "openai/gpt-5", "access_key": "$OPENAI_API_KEY", "anything": {"else": None}}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """The path of a file with these entries; or with this text."""

    def write(*entries: Json, text: str = "", name: str = "gateway.json") -> str:
        path = tmp_path / name
        path.write_text(
            text
            or json.dumps({"version": "v1", "listeners": [{"port": 1}], "model_providers": entries})
        )
        return str(path)

    return write


def run_here(*arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    """The command line, in this process: a Python of its own takes 300 ms."""
    out, err = io.StringIO(), io.StringIO()
    status: Any = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["bridge.py", *arguments])
        for name, value in environ.items():
            patch.setenv(name, value)
        try:
            bridge.main()
        except SystemExit as ended:
            status = ended.code
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def completed(path: str, *arguments: str, **environ: str) -> Any:
    done = run_here("providers", "--config", path, *arguments, **environ)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def refused(path: str, *arguments: str) -> str:
    done = run_here(*arguments, "--config", path)
    [line] = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert line.startswith(f"claude-cli-bridge: --config: {path}")
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
    mine = {
        "model": "claude-cli/opus",
        "base_url": "http://bridge:1",
        "access_key": "k",
        "default": True,
        "name": "o",
    }
    found = completed(write(OTHER, mine, {"model": "claude-cli/*", "name": None}))
    assert found == [OTHER, {**mine, "provider_interface": "claude-cli"}, COMPLETE]


@pytest.mark.parametrize(
    "other",
    [
        {"model": "openai/*", "default": True},
        {"model": "*"},
        {"model": "arch/*", "name": "claude-cli", "base-url": 7, "extra": [{"a": None}]},
        {"name": 5, "model": ["claude-cli/*"]},
        {},
    ],
)
def test_an_entry_of_another_provider_is_left_alone_whatever_it_holds(
    write: Write, other: Json
) -> None:
    assert completed(write(other, MINE, other)) == [other, COMPLETE, other]


@pytest.mark.parametrize(
    "entry",
    [
        {"model": "claude-cli/opus"},
        {"model": "claude-cli/opus", "name": "mine"},
        {"model": "claude-cli/opus", "provider_interface": "claude-cli"},
    ],
)
def test_an_entrys_own_name_stays_and_its_default_name_is_its_model(
    write: Write, entry: Json
) -> None:
    own = {**COMPLETE, "model": "claude-cli/opus", "name": "claude-cli/opus", **entry}
    assert completed(write(entry)) == [own]


def test_an_entry_with_a_host_of_its_own_gets_no_base_url(write: Write) -> None:
    own = {**COMPLETE, "http_host": "bridge.example"}
    del own["base_url"]
    assert completed(write({**MINE, "http_host": "bridge.example"})) == [own]


@pytest.mark.parametrize("key", ["", "sesame"])
def test_an_entry_that_passes_the_clients_key_on_gets_no_key(write: Write, key: str) -> None:
    own = {**COMPLETE, "passthrough_auth": True}
    del own["access_key"]
    entry = {**MINE, "passthrough_auth": True}
    assert completed(write(entry), CLAUDE_CLI_API_KEY=key) == [own]
    entry["passthrough_auth"] = False
    found = completed(write(entry), CLAUDE_CLI_API_KEY=key)
    assert found[0]["access_key"] == ("$CLAUDE_CLI_API_KEY" if key else "claude-cli-local")


def test_the_older_list_is_read_as_well(write: Write) -> None:
    both = {"llm_providers": [MINE], "model_providers": [OTHER]}
    assert completed(write(text=json.dumps(both))) == [OTHER, COMPLETE]


@pytest.mark.parametrize(
    "entry",
    [
        {"model": "openai/gpt", "provider_interface": "claude-cli"},
        {"model": "openai/gpt", "name": "claude-cli/a"},
        {"name": "claude-cli/a"},
        {"model": "claude-cli/*", "default": True, "base-url": "x"},
        {"model": "claude-cli/*", "access_key": 5},
    ],
)
def test_an_entry_is_filled_in_and_not_judged(write: Write, entry: Json) -> None:
    """Whether it is right is the gateway's matter."""
    name = entry.get("model", "claude-cli/*")
    filled = {**COMPLETE, "name": name, **entry}
    if "model" not in entry:
        del filled["model"]
    assert completed(write(entry)) == [filled]


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


def test_each_entry_is_filled_in_by_itself(write: Write) -> None:
    two = {"model": "claude-cli/opus", "base_url": "http://b", "name": "b"}
    assert len(completed(write(MINE, MINE, {"model": "claude-cli/opus"}))) == 3
    assert len(completed(write(MINE, two))) == 2


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", '{"model_providers": [sesame]}', "line 1 column"),
        ("a.toml", "a = sesame", "line 1, column"),
        ("a.yaml", "a: [\nsesame: ]{", "not YAML, line 2"),
        ("a.json", "[]", "has no model_providers"),
        (
            "a.json",
            '{"model_providers": {"sesame": 1}}',
            "model_providers must be a list of tables",
        ),
        (
            "a.json",
            '{"model_providers": ["claude-cli/*"]}',
            "model_providers must be a list of tables",
        ),
    ],
)
def test_a_file_that_cannot_be_read_says_where_without_its_text(
    write: Write, name: str, text: str, words: str
) -> None:
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


def test_the_ending_of_the_name_says_what_a_file_is(write: Write) -> None:
    assert completed(write(name="A.YAML", text="model_providers: [{ model: claude-cli/* }]")) == [
        COMPLETE
    ]


def test_a_wrong_listen_address_is_not_the_files_fault(write: Write) -> None:
    done = run_here(
        "providers", "--config", write({"model": "claude-cli/*"}), "--listen-addr", "foo"
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("claude-cli-bridge: --listen-addr: expected host:port")
    assert done.stderr.endswith("got 'foo'\n")


@pytest.mark.parametrize(
    "words", [("--api-key", "sesame"), ("--api-key=sesame",), ("sesame",), ("check", "sesame")]
)
def test_what_is_no_option_is_not_repeated(words: tuple[str, ...]) -> None:
    done = run_here(*words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "sesame" not in done.stderr
    assert ("there is no --api-key" in done.stderr) == (
        words[0] != "check" and words[0].startswith("-")
    )


def test_a_reader_that_left_is_no_crash(write: Write) -> None:
    path = write(*({"model": f"claude-cli/{number}"} for number in range(500)))
    command = f"{sys.executable} {ROOT / 'bridge.py'} providers --config {path} | head -1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[\n", "")


def test_a_missing_file_and_a_missing_option_are_errors(tmp_path: Path) -> None:
    assert "No such file" in refused(str(tmp_path / "nowhere.json"))
    done = run_here("providers")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "CLAUDE_CLI_CONFIG" in done.stderr


def test_without_pyyaml_yaml_is_an_error_that_names_it(write: Write, tmp_path: Path) -> None:
    (tmp_path / "yaml.py").write_text("raise ModuleNotFoundError")
    path = write(name="a.yaml", text="model_providers: []")
    done = run("providers", "--config", path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert "PyYAML" in done.stderr


@pytest.mark.parametrize("entries", [[], [OTHER]])
def test_without_a_claude_cli_provider_nothing_starts_and_one_line_says_so(
    write: Write, entries: list[Json]
) -> None:
    """Not even with a CLI that is not there: a launcher can always start the bridge."""
    done = run("--config", write(*entries), CLAUDE_CLI_BIN="/no/such/claude")
    assert (done.returncode, done.stdout) == (0, "")
    [line] = done.stderr.splitlines()
    assert "no claude-cli provider" in line


def test_with_a_claude_cli_provider_the_listener_starts(launch: Launch, write: Write) -> None:
    path = write(OTHER, MINE)
    assert launch("--config", path).post().text == "echo: hello; 1 messages"
    assert launch(CLAUDE_CLI_CONFIG=path).post().text == "echo: hello; 1 messages"


@pytest.mark.parametrize(
    ("name", "content"),
    [("settings.json", '{"max_idle": 3}'), ("settings.toml", ""), ("settings.json", "null")],
)
def test_a_file_of_settings_is_not_what_config_is_for(
    tmp_path: Path, name: str, content: str
) -> None:
    file = tmp_path / name
    file.write_text(content)
    said = refusal("--config", str(file))
    assert said.startswith(f"--config: {file} has no model_providers: this is for the file of")
