"""Clients from npm: the TypeScript SDK, the Vercel AI SDK, OpenCode."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import readme
from client import Json, arrived
from host import TESTS
from installed import JS_CLIENTS, OPENCODE
from servers import Launch, Serve

SDK = readme.block("import Anthropic from")
AI_SDK = readme.block("createAnthropic({")
OPENCODE_JSON = readme.block("opencode.ai/config.json")


@pytest.fixture
def packages() -> Path:
    """The folder of ts_check.mjs, with the packages under `js`."""
    if not JS_CLIENTS:
        pytest.skip("node and npm are not installed")
    return JS_CLIENTS[0]


@pytest.mark.timeout(240)
def test_typescript_clients(serve: Serve, cli: Path, packages: Path) -> None:
    shutil.copy(TESTS / "drivers/ts_check.mjs", packages)
    command = ["node", str(packages / "ts_check.mjs"), serve(bin=cli).url, "--timeout", "30"]
    required = "tools,images,json,sampling,thinking"
    done = subprocess.run(
        [*command, "--require", required], capture_output=True, text=True, timeout=200, check=False
    )
    assert "31 passed, 0 failed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("example", [SDK, AI_SDK], ids=["SDK", "AI SDK"])
def test_the_examples_of_the_readme_get_an_answer(
    serve: Serve, packages: Path, tmp_path: Path, example: str
) -> None:
    program = tmp_path / "example.mjs"
    program.write_text(example.replace("http://127.0.0.1:14001", serve().url))
    (tmp_path / "node_modules").symlink_to(packages / "js/node_modules")
    done = subprocess.run(
        ["node", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "echo: Say hello.; 1 messages\n", done.stderr


@pytest.mark.skipif(
    not OPENCODE, reason="npm is not installed, or has no OpenCode for this machine"
)
@pytest.mark.parametrize("cli", ["bundled"], indirect=True)
def test_opencode_uses_its_tools_and_goes_on_in_the_same_process(
    launch: Launch,
    cli: Path,
    environment: Path,
    tmp_path: Path,
    since: Callable[[], list[Json]],
) -> None:
    program = launch(CLAUDE_CLI_BIN=str(cli))
    (tmp_path / "opencode.json").write_text(
        OPENCODE_JSON.replace("http://127.0.0.1:14001", program.url)
    )
    note = tmp_path / "note.txt"
    note.write_text("The word is pomegranate.")
    quiet = {"OPENCODE_DISABLE_MODELS_FETCH": "1", "OPENCODE_DISABLE_AUTOUPDATE": "1"}
    environ = {"HOME": str(environment), "PATH": os.environ["PATH"], **quiet}

    def run(*words: str) -> list[Json]:
        """What `opencode run` says was done."""
        command = [*OPENCODE, "run", "--format", "json", *words]
        pipes = {"stdin": subprocess.DEVNULL, "capture_output": True}
        done = subprocess.run(
            command, cwd=tmp_path, env=environ, **pipes, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return [json.loads(line)["part"] for line in done.stdout.splitlines()]

    # With --title it does not ask a second model for one.
    parts = run("--title", "t", "USE_TOOL", "read", f'INPUT={{"filePath":"{note}"}}END')
    first, last = [part["text"] for part in parts if part["type"] == "text"]
    [call] = [part["state"] for part in parts if part["type"] == "tool"]
    assert (call["status"], call["input"]) == ("completed", {"filePath": str(note)})
    assert first == "Let me use it."
    assert last.startswith("Tool said: ")
    assert "pomegranate" in last
    assert [part["reason"] for part in parts if part["type"] == "step-finish"] == [
        "tool-calls",
        "stop",
    ]

    assert [
        part["text"] for part in run("--continue", "SAY", "more") if part["type"] == "text"
    ] == ["more"]
    history = arrived(since()[-1]["body"])
    assert [message["role"] for message in history] == ["user", "assistant"] * 2 + ["user"]
    assert "pomegranate" in json.dumps(history[2])
    lines = [line for line in program.lines if "route=/v1/messages" in line]
    assert [line.partition("conversation=")[2].split()[0] for line in lines] == [
        "new",
        "hot",
        "hot",
    ]
