"""What of the bridge's environment reaches a child: nothing that changes what the CLI does."""

import functools
import json
import mmap
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from client import Json
from host import ROOT, wait_until
from processes import pid
from servers import KEEP, Serve, Server, linux
from stand_in import Log
from stubs import Stub
from test_tools import TOOL, result, start, user

from sessions import Kind, PoolConfig, child_environment

# ---------------------------------------------------------------- variables


@functools.cache
def names_read_by(program: Path) -> set[str]:
    """The names of environment variables in the text of a CLI: those that it reads from
    `process.env`, and those of the modules in which it lists them, `NAME:()=>reader`."""
    with program.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        # Patterns that begin with plain text are found ten times as fast in 400 MB.
        read = re.findall(rb"""env(?<=\benv)(?:\.|\[["'])([A-Z][A-Z0-9_]+)""", text)
        end = 0
        for match in re.finditer(rb":\(\)=>", text):
            name = re.search(rb"\b[A-Z][A-Z0-9_]+$", text[match.start() - 99 : match.start()])
            is_own = name and name[0].startswith((b"CLAUDE_CODE_", b"ANTHROPIC_", b"OTEL_"))
            if is_own and match.start() >= end:  # else it is in the list that was read last
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
    got = given(PoolConfig(), Kind("sonnet"), names | {"HTTPS_PROXY", "https_proxy", "TMPDIR"})
    folders = {"CLAUDE_CONFIG_DIR", "CLAUDE_SECURESTORAGE_CONFIG_DIR"}
    opt_outs = {
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC",
        "DISABLE_ERROR_REPORTING",
        "DO_NOT_TRACK",
    }
    asked_for = folders | opt_outs
    assert {name for name in got - asked_for if not ANYBODYS.fullmatch(name.upper())} == set()
    assert {"HOME", "PATH", "HTTPS_PROXY", "https_proxy", "TMPDIR", "AWS_REGION"} <= got


# What a command of an agent may need, and the CLI reads as well.
OF_A_SHELL = {"EDITOR", "GH_TOKEN", "GIT_SSH_COMMAND", "JAVA_HOME", "NODE_OPTIONS", "PGPASSWORD"}


@pytest.mark.parametrize("is_agent", [True, False])
def test_an_agents_commands_and_a_key_helper_get_what_the_users_shell_has(is_agent: bool) -> None:
    config = PoolConfig(setting_sources="" if is_agent else "user")
    names = OF_A_SHELL | {"ANTHROPIC_API_KEY", "CLAUDECODE", "MCP_TIMEOUT", "OTEL_LOGS_EXPORTER"}
    assert given(config, Kind("sonnet", agent=is_agent), names) == OF_A_SHELL


def test_a_child_gets_no_variable_that_changes_its_account_unless_it_is_kept(
    serve: Serve, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped = (
        "ANTHROPIC_AUTH_TOKEN",
        "CLAUDE_CODE_USE_BEDROCK",
        "CLAUDECODE",
        "OTEL_LOGS_EXPORTER",
        "CLAUDE_CLI_CWD",
    )
    kept = (
        "ANTHROPIC_MODEL",
        "CLAUDE_CODE_MAX_RETRIES",
        "CLAUDE_CLI_API_KEY",
        "OTEL_RESOURCE_ATTRIBUTES",
    )
    for name in (*dropped, *kept):
        monkeypatch.setenv(name, "mine")
    answer = serve(keep_env=kept, retries=7).post()
    found = log.started()[pid(answer)]["env"]
    assert not set(found) & set(dropped)
    assert {name for name, value in found.items() if value == "mine"} == set(kept) - {
        "CLAUDE_CLI_API_KEY"
    }
    assert found["PATH"] == os.environ["PATH"]
    assert found["HOME"] == os.environ["HOME"]
    assert found["DISABLE_AUTO_COMPACT"] == "1"
    assert found["ENABLE_TOOL_SEARCH"] == "false"


def test_retries_reach_the_child_in_its_environment(serve: Serve, log: Log) -> None:
    answer = serve(retries=7).post()
    assert log.started()[pid(answer)]["env"]["CLAUDE_CODE_MAX_RETRIES"] == "7"


@pytest.mark.parametrize("value", ["1", "true", None])
def test_a_users_wish_that_nothing_is_reported_reaches_the_cli_as_it_is(
    serve: Serve, cli: Path, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    names = ("DO_NOT_TRACK", "DISABLE_ERROR_REPORTING")
    for name in names:
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("DISABLE_COST_WARNINGS", "1")
    server = serve(bin=cli)
    assert server.post("SAY x").text == "x"
    [process] = server.processes()
    child = process.environ()
    assert [child.get(name) for name in names] == [value] * 2
    assert "DISABLE_COST_WARNINGS" not in child


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
    assert server.bridge
    before = server.bridge.pool.cli
    login.write_text("{}")
    server.post(["SAY x", "x", "SAY y"])
    assert server.bridge.pool.cli is not before  # what was learnt of the login is forgotten


def test_the_folder_of_a_login_is_absolute_for_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    for given, wanted in (("~/x", "/home/somebody/x"), ("x", f"{os.getcwd()}/x"), ("/x", "/x")):
        child = child_environment(PoolConfig(), {"CLAUDE_CONFIG_DIR": given}, Kind("sonnet"))
        assert child["CLAUDE_CONFIG_DIR"] == wanted
    assert "CLAUDE_CONFIG_DIR" not in child_environment(
        PoolConfig(), {"CLAUDE_CONFIG_DIR": ""}, Kind("sonnet")
    )


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
    (parked,) = server.bridge.pool.room.sessions if server.bridge else ()
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


# ---------------------------------------------------------------- arguments


def test_a_system_prompt_is_not_in_argv(serve: Serve, log: Log) -> None:
    system = "0123456789" * 30_000
    answer = serve().post(system=system)
    assert answer.text == "echo: hello; 1 messages"
    assert sum(map(len, log.started()[pid(answer)]["argv"])) < 2000
    assert log.lines(pid(answer))[0]["request"]["systemPrompt"] == [system]


HOOK = [{"hooks": [{"type": "command", "command": "echo CANARY"}]}]
OF_THE_USER: Json = {
    "hooks": {"UserPromptSubmit": HOOK, "SessionStart": HOOK},
    "outputStyle": "Explanatory",
    "language": "CANARY",
}


@pytest.mark.parametrize("cli", ["bundled"], indirect=True)
def test_of_the_users_settings_nothing_but_the_login_gets_into_a_conversation(
    serve: Serve,
    cli: Path,
    environment: Path,
    stub: Stub,
    since: Callable[[], list[Json]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    login = {"ANTHROPIC_BASE_URL": stub.url, "ANTHROPIC_AUTH_TOKEN": "mine"}
    folder = environment / ".claude"
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps({"env": login, **OF_THE_USER}))
    (folder / "CLAUDE.md").write_text("CANARY")
    keep = [name for name in KEEP if not name.startswith("ANTHROPIC_")]
    server = serve(bin=cli, keep_env=tuple(keep), setting_sources="user")
    for words in (["SAY x"], ["SAY x", "x", "SAY y"], ["SAY x", "z", "SAY y"]):
        assert server.post(words).status == 200
        arrived = json.dumps(since()[-1]["body"])
        assert "CANARY" not in arrived
        assert "xplanatory" not in arrived


def test_variables_in_a_file_of_the_users_do_not_undo_what_the_bridge_sets(
    real: Server, environment: Path, since: Callable[[], list[Json]]
) -> None:
    """The CLI reads ~/.claude.json, whatever the sources of its settings are."""
    wanted = {"CLAUDE_CODE_DISABLE_THINKING": "0", "CLAUDE_CODE_DISABLE_EXPERIMENTAL_BETAS": "0"}
    (environment / ".claude.json").write_text(json.dumps({"env": wanted}))
    assert real.post("SAY x").text == "x"
    body = since()[-1]["body"]
    assert body.get("thinking", {"type": "disabled"}) == {"type": "disabled"}
    assert "context_management" not in body


@linux
def test_an_administrators_list_of_mcp_servers_does_no_harm(cli: Path, tmp_path: Path) -> None:
    if os.geteuid() or not shutil.which("unshare"):
        pytest.skip("only root can have an /etc of its own")
    etc = tmp_path / "etc"
    shutil.copytree("/etc", etc, symlinks=True, ignore_dangling_symlinks=True)
    (etc / "claude-code").mkdir(exist_ok=True)
    (etc / "claude-code/managed-mcp.json").write_text('{"mcpServers": {}}')
    check = (
        f'mount --bind {etc} /etc; exec "{sys.executable}" "{ROOT}/bridge.py" check --bin "{cli}"'
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-ec", check], capture_output=True, text=True, check=False
    )
    words = {line.split(": ")[0]: line.split(": ")[1] for line in done.stdout.splitlines()}
    features = ("history", "settings", "tools", "interrupt")
    assert {name: words[name] for name in features} == dict.fromkeys(features, "works")
