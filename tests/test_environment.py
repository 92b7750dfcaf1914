"""What of the bridge's environment reaches a child: nothing that changes what the CLI does."""

import contextlib
import functools
import json
import mmap
import re
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from client import Json
from host import wait_until
from servers import KEEP, Program, Server
from stand_in import Log
from test_processes import alive
from test_tools import TOOL, result, start, user

from sessions import OPT_OUTS, Kind, PoolConfig, child_environment

Serve = Callable[..., Server]
Run = Callable[..., None]  # post in the background


@functools.cache
def names_read_by(program: Path) -> set[str]:
    """The names of environment variables in the text of a CLI: those that it reads from
    `process.env`, and those of the modules in which it lists them, `NAME:()=>reader`."""
    with program.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        read = re.findall(rb"""\benv(?:\.|\[["'])([A-Z][A-Z0-9_]+)""", text)
        end = 0
        for match in re.finditer(rb"(?:CLAUDE_CODE|ANTHROPIC|OTEL)_[A-Z0-9_]+:\(\)=>", text):
            if match.start() >= end:  # else it is in the list that was read last
                end = text.find(b"}", match.start())
                listed = text[text.rfind(b"{", 0, match.start()) : end]
                read += re.findall(rb"\b([A-Z][A-Z0-9_]+):\(\)=>", listed)
    return {name.decode() for name in read}


# What the CLI reads and any program may have: the machine, the network, the clouds.
ANYBODYS = re.compile(
    "(ALL|HTTPS?|NO)_PROXY|(AWS|AZURE|CLOUDSDK|GCE|GCLOUD|GOOGLE|SSL_CERT|VERTEX_REGION|XDG)_.*"
    "|CLOUD_ML_REGION|DBUS_SESSION_BUS_ADDRESS|HOME|LANG|LC_.*|LOGNAME|NODE_EXTRA_CA_CERTS"
    "|NODE_(TLS_REJECT_UNAUTHORIZED|USE_SYSTEM_CA)|METADATA_SERVER_DETECTION|KRB5.*|SSH_AUTH_SOCK"
    "|(IDENTITY|MSI|LD|DYLD)_.*"
    "|PATH(EXT)?|SHELL|TE(MP|RM.*)|TMP(DIR)?|TZ|USER(NAME|PROFILE)?"
)
# What a command of an agent may need, and the CLI reads as well.
OF_A_SHELL = {"EDITOR", "GH_TOKEN", "GIT_SSH_COMMAND", "JAVA_HOME", "NODE_OPTIONS", "PGPASSWORD"}


def given(config: PoolConfig, kind: Kind, names: set[str]) -> set[str]:
    """Those of the names whose values a child gets from the user's shell."""
    child = child_environment(config, dict.fromkeys(names, "/mine"), kind)
    return {name for name, value in child.items() if value == "/mine"}


def test_a_child_gets_what_any_program_may_have_and_nothing_that_is_the_clis_own(
    cli: Path,
) -> None:
    """Nor will it get what a new version brings, before a user's shell changes what it does."""
    names = names_read_by(cli)
    assert len(names) > 500
    assert {"HOME", "CLAUDE_CONFIG_DIR", "MCP_TOOL_TIMEOUT", "ENABLE_PROMPT_CACHING_1H"} <= names
    got = given(PoolConfig(), Kind(), names | {"HTTPS_PROXY", "https_proxy", "TMPDIR"})
    folders = {"CLAUDE_CONFIG_DIR", "CLAUDE_SECURESTORAGE_CONFIG_DIR"}
    asked_for = folders | set(OPT_OUTS)
    assert {name for name in got - asked_for if not ANYBODYS.fullmatch(name.upper())} == set()
    assert {"HOME", "PATH", "HTTPS_PROXY", "https_proxy", "TMPDIR", "AWS_REGION"} <= got


@pytest.mark.parametrize("is_agent", [True, False])
def test_an_agents_commands_and_a_key_helper_get_what_the_users_shell_has(is_agent: bool) -> None:
    config = PoolConfig(setting_sources="" if is_agent else "user")
    names = OF_A_SHELL | {"ANTHROPIC_API_KEY", "CLAUDECODE", "MCP_TIMEOUT", "OTEL_LOGS_EXPORTER"}
    assert given(config, Kind(agent=is_agent), names) == OF_A_SHELL


@pytest.mark.parametrize("name", ["CLAUDE_CONFIG_DIR", "CLAUDE_SECURESTORAGE_CONFIG_DIR"])
def test_a_login_in_another_folder_is_found(
    serve: Serve,
    cli: Path,
    since: Callable[[], list[Json]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """These two say where a plain /login has left its tokens; the second moves the tokens alone."""
    folder = tmp_path / "login"
    folder.mkdir()
    oauth = {"accessToken": "sk-ant-oat01-mine", "refreshToken": "sk-ant-ort01-mine"}
    oauth |= {"expiresAt": 4102444800000, "scopes": ["user:inference", "user:profile"]}
    login = folder / ".credentials.json"
    login.write_text(json.dumps({"claudeAiOauth": {**oauth, "subscriptionType": "max"}}))
    login.chmod(0o600)
    monkeypatch.setenv(name, str(folder))
    server = serve(bin=cli, keep_env=[kept for kept in KEEP if kept != "ANTHROPIC_API_KEY"])
    answer = server.post("SAY x")
    assert (answer.status, answer.text if answer.status == 200 else answer.body) == (200, "x")
    headers = {key.lower(): value for key, value in since()[-1]["headers"].items()}
    assert headers["authorization"] == "Bearer sk-ant-oat01-mine"


# What a shell or a .env file may well hold.  With the first two, a result that comes later than the
# tools of other programs may take would be answered by the CLI itself; the others change what a
# user pays for.
MEANT_FOR_OTHERS = {
    "MCP_TOOL_TIMEOUT": "2000",
    "MCP_TIMEOUT": "1",
    "DISABLE_PROMPT_CACHING": "1",
    "ENABLE_PROMPT_CACHING_1H": "1",
}


def tool_round(server: Server, since: Callable[[], list[Json]]) -> list[Json]:
    """A tool call, and its result after more than two seconds; the bodies of the API's requests."""
    messages, (call,) = start(server)
    (parked,) = server.bridge.pool.sessions if server.bridge else ()
    loop = parked.process.loop
    called_at = loop.time()
    wait_until(lambda: loop.time() > called_at + 2.5, "more than the time for a tool")
    answer = server.post([*messages, user(result(call, "the client's own"))], tools=[TOOL])
    assert (answer.session, "the client's own" in answer.text) == ("hot", True)
    bodies = [row["body"] for row in since()]
    server.close()
    return bodies


def without_ids(bodies: list[Json]) -> Any:
    """Bodies without what no two calls share: ids of the account's session and of tool calls."""
    text = re.sub(r'"toolu_\d+"', '"toolu"', json.dumps(bodies))
    plain = re.sub(r"cch=[0-9a-f]+|cc_version=[0-9a-z.]+", "", text)
    return [{**body, "metadata": None} for body in json.loads(plain)]


def test_settings_that_were_meant_for_other_programs_change_nothing(
    serve: Serve, cli: Path, since: Callable[[], list[Json]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is the client's, however late, and the API gets what it gets without them."""
    plain = tool_round(serve(bin=cli), since)
    for name, value in MEANT_FOR_OTHERS.items():
        monkeypatch.setenv(name, value)
    bodies = tool_round(serve(bin=cli), since)[len(plain) :]
    assert len(bodies) == len(plain) == 2
    assert "cache_control" in json.dumps(plain)
    assert without_ids(bodies) == without_ids(plain)


# what a killed bridge leaves behind

SECRET = "a heron that nobody else is to read of"


def waiting_spare(program: Program, log: Log, run: Run) -> None:
    wait_until(log.started, "the spare")


def half_through_the_gate(program: Program, log: Log, run: Run) -> None:
    run(["x" * 5_000_000 + SECRET, SECRET, SECRET], model="gate.half-deaf")
    wait_until(lambda: log.reached("gate.half-deaf"), "the child at its gate")


def running_turn(program: Program, log: Log, run: Run) -> None:
    run([SECRET, SECRET, f"{SECRET} HANG-START"], model="ignore-sigterm")
    wait_until(lambda: log.asked("HANG-START"), "the turn")


def parked(program: Program, log: Log, run: Run) -> None:
    tool = {"name": "probe", "description": SECRET, "input_schema": {"type": "object"}}
    answer = program.post([SECRET, SECRET, f"{SECRET} PROBE"], tools=[tool], system=SECRET)
    assert answer.message["stop_reason"] == "tool_use"


def files_with(text: bytes, *folders: Path) -> list[Path]:
    """The files below these folders that hold a text; pipes and links are none."""
    found = [path for folder in folders for path in folder.rglob("*")]
    return [path for path in found if path.is_file() and text in path.read_bytes()]


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")
@pytest.mark.parametrize("state", [waiting_spare, half_through_the_gate, running_turn, parked])
def test_a_killed_bridge_leaves_no_child_and_no_word_of_a_conversation(
    launch: Callable[..., Program],
    log: Log,
    background: ThreadPoolExecutor,
    environment: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: Callable[[Program, Log, Run], None],
) -> None:
    """SIGKILL gives it no time to clear up: what was never written need not be cleared up."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    program = launch(CLAUDE_CLI_SPARES="1" if state is waiting_spare else "0")
    running: list[Future[Any]] = []

    def run(*arguments: Any, **fields: Any) -> None:
        running.append(background.submit(program.post, *arguments, **fields))

    state(program, log, run)
    children = program.children()
    assert children
    program.process.kill()
    program.wait()
    wait_until(lambda: not [child for child in children if alive(child.pid)], "their end")
    assert all(turn.exception() for turn in running)
    assert files_with(SECRET.encode(), temporary, environment) == []
    assert not files_with(b"x" * 1000, temporary, environment)


def is_waiting(program: Program) -> bool:
    """Whether a child waits at its gate; another one is asked for its version."""
    found = []
    for child in program.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            found += child.cmdline()
    return "--resume" in found


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")
@pytest.mark.parametrize("state", ["spare", "running", "parked"])
def test_a_killed_bridge_with_the_real_cli_leaves_no_word_of_a_conversation(
    launch: Callable[..., Program],
    cli: Path,
    since: Callable[[], list[Json]],
    background: ThreadPoolExecutor,
    environment: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: str,
) -> None:
    """The CLI is told to keep nothing, and its conversation comes through a pipe."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    program = launch(CLAUDE_CLI_BIN=str(cli), CLAUDE_CLI_SPARES="1" if state == "spare" else "0")
    past: list[Any] = [SECRET, SECRET]
    running = None
    if state == "spare":
        wait_until(lambda: is_waiting(program), "the spare")
    elif state == "running":
        running = background.submit(program.post, [*past, f"SLOW 200 {SECRET}"], stream=True)
        wait_until(since, "the API call")
    else:
        words = f'USE_TOOL probe INPUT={{"secret":"{SECRET}"}}END'
        tool = {"name": "probe", "description": SECRET, "input_schema": {"type": "object"}}
        answer = program.post([*past, words], tools=[tool], system=SECRET)
        assert answer.message["stop_reason"] == "tool_use"
    children = program.children()
    assert children
    program.process.kill()
    program.wait()
    wait_until(lambda: not [child for child in children if alive(child.pid)], "their end")
    assert running is None or running.exception()
    assert files_with(SECRET.encode(), temporary, environment) == []
