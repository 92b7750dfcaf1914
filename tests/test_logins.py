"""Every login that the real CLI knows: who the bridge says is logged in, and whose request arrives."""

import contextlib
import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import pytest
from client import Client, Json, count, request_body
from host import wait_until
from servers import KEEP, OPT_OUTS, Launch, Program, Serve, Server, linux
from stubs import Stub
from test_check import FEATURES, check

import bridge
import sessions
from bridge import user_name

SUBSCRIPTION = {
    "accessToken": "sk-ant-oat01-good",
    "refreshToken": "sk-ant-ort01-good",
    "expiresAt": 4102444800000,
    "scopes": ["user:inference", "user:profile"],
    "subscriptionType": "max",
}
CREDENTIALS = {".claude/.credentials.json": {"claudeAiOauth": SUBSCRIPTION}}
PAST = {".claude/.credentials.json": {"claudeAiOauth": {**SUBSCRIPTION, "expiresAt": 16e11}}}
ACCOUNT = {
    ".claude.json": {
        "oauthAccount": {
            "accountUuid": "11111111-1111-4111-8111-111111111111",
            "emailAddress": "me@example.com",
            "organizationUuid": "21111111-1111-4111-8111-111111111111",
            "organizationName": "mine",
        }
    }
}
OF_SUBSCRIPTION = {"authorization": "Bearer sk-ant-oat01-good"}
PASSES_ON = "CLAUDE_CLI_KEEP_ENV=ANTHROPIC_API_KEY passes it on"


@dataclass(frozen=True, kw_only=True)
class Login:
    source: str = ""  # who is logged in, as the bridge says it; empty: nobody
    headers: dict[str, str] = field(default_factory=dict)  # of a request at the API
    # How the paths end that a message and a count ask.  The stub plays no cloud.
    paths: tuple[str, ...] = ("/v1/messages", "/v1/messages/count_tokens")
    works: bool = True
    kept: dict[str, str] = field(default_factory=dict)  # variables that the CLI gets
    others: dict[str, str] = field(default_factory=dict)  # variables that it does not get
    files: dict[str, Json] = field(default_factory=dict)  # in HOME
    sources: str = ""  # setting_sources
    advice: str = ""  # what helps nobody


def in_settings(**values: object) -> dict[str, Json]:
    return {".claude/settings.json": values}


LOGINS = {
    "subscription": Login(source="Claude Max", headers=OF_SUBSCRIPTION, files=CREDENTIALS),
    "subscription-with-account": Login(
        source="Claude Max", headers=OF_SUBSCRIPTION, files={**CREDENTIALS, **ACCOUNT}
    ),
    "subscription-past-its-date": Login(source="Claude Max", headers=OF_SUBSCRIPTION, files=PAST),
    "subscription-beside-a-key": Login(
        source="Claude Max",
        headers=OF_SUBSCRIPTION,
        files=CREDENTIALS,
        others={"ANTHROPIC_API_KEY": "sk-other"},
    ),
    "token-of-setup-token": Login(
        source="CLAUDE_CODE_OAUTH_TOKEN",
        headers={"authorization": "Bearer sk-ant-oat01-mine"},
        kept={"CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-oat01-mine"},
    ),
    "subscription-and-no-cloud": Login(
        source="Claude Max",
        headers=OF_SUBSCRIPTION,
        files=CREDENTIALS,
        kept={"CLAUDE_CODE_USE_BEDROCK": "0", "CLAUDE_CODE_USE_VERTEX": "False"},
    ),
    "key": Login(
        source="ANTHROPIC_API_KEY",
        headers={"x-api-key": "sk-mine"},
        kept={"ANTHROPIC_API_KEY": "sk-mine"},
    ),
    "auth-token": Login(
        source="ANTHROPIC_AUTH_TOKEN",
        headers={"authorization": "Bearer mine"},
        kept={"ANTHROPIC_AUTH_TOKEN": "mine"},
    ),
    "key-helper": Login(
        source="apiKeyHelper",
        headers={"x-api-key": "sk-helper", "authorization": "Bearer sk-helper"},
        files=in_settings(apiKeyHelper="echo sk-helper"),
        sources="user",
    ),
    "key-in-settings": Login(
        source="ANTHROPIC_API_KEY",
        headers={"x-api-key": "sk-settings"},
        files=in_settings(env={"ANTHROPIC_API_KEY": "sk-settings"}),
        sources="user",
    ),
    "auth-token-in-settings": Login(
        source="ANTHROPIC_AUTH_TOKEN",
        headers={"authorization": "Bearer settings"},
        files=in_settings(env={"ANTHROPIC_AUTH_TOKEN": "settings"}),
        sources="user",
    ),
    "bedrock": Login(
        source="bedrock",
        headers={"authorization": "Bearer mine"},
        kept={
            "CLAUDE_CODE_USE_BEDROCK": "1",
            "AWS_REGION": "us-east-1",
            "AWS_BEARER_TOKEN_BEDROCK": "mine",
            "ANTHROPIC_BEDROCK_BASE_URL": "STUB",
        },
        paths=("/invoke-with-response-stream",),
        works=False,
    ),
    "vertex": Login(
        source="vertex",
        kept={
            "CLAUDE_CODE_USE_VERTEX": "1",
            "CLOUD_ML_REGION": "us-east5",
            "ANTHROPIC_VERTEX_PROJECT_ID": "mine",
            "ANTHROPIC_VERTEX_BASE_URL": "STUB",
            "CLAUDE_CODE_SKIP_VERTEX_AUTH": "1",
        },
        paths=(":streamRawPredict",),
        works=False,
    ),
    "foundry": Login(
        source="foundry",
        headers={"x-api-key": "mine"},
        kept={
            "CLAUDE_CODE_USE_FOUNDRY": "1",
            "ANTHROPIC_FOUNDRY_API_KEY": "mine",
            "ANTHROPIC_FOUNDRY_BASE_URL": "STUB",
        },
    ),
    "nobody": Login(advice="auth login` logs in"),
    "nobody-with-a-key-that-is-not-kept": Login(
        others={"ANTHROPIC_API_KEY": "sk-other"}, advice=PASSES_ON
    ),
    "nobody-with-a-key-for-clients": Login(
        others={"ANTHROPIC_API_KEY": "unused"}, advice="auth login` logs in"
    ),
    "nobody-with-unread-settings": Login(
        files=in_settings(apiKeyHelper="echo sk-helper"),
        advice="CLAUDE_CLI_SETTING_SOURCES=user if the login is in its settings.json",
    ),
    "nobody-with-settings-that-the-cli-refuses": Login(
        files=in_settings(apiKeyHelper="echo sk-helper", cleanupPeriodDays=0),
        sources="user",
        advice="`claude` says whether it can read its settings.json",
    ),
}


def log_in(login: Login, home: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Write the files and set the variables of a login; what the CLI is to keep."""
    stub = os.environ["ANTHROPIC_BASE_URL"]
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    for name, value in {**login.kept, **login.others}.items():
        monkeypatch.setenv(name, value.replace("STUB", stub))
    for name, content in login.files.items():
        path = home / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return (*(name for name in KEEP if name != "ANTHROPIC_API_KEY"), *login.kept)


def shown_login(server: Client) -> str:
    """What the page says of who is logged in."""
    lines = server.call("GET", "/").body.decode().splitlines()
    [line] = [line for line in lines if line.startswith("  login ")]
    return line.removeprefix("  login ").strip()


def start_line(program: Program) -> str:
    """What the log says at the start of who is logged in: level and words."""
    wait_until(lambda: any("logged in" in line for line in program.lines), "the login")
    [line] = [line for line in program.lines if "logged in" in line]
    return line[line.index(next(level for level in ("INFO", "WARNING") if level in line)) :].strip()


def login_headers(row: Json) -> dict[str, str]:
    """The login of a request at the API."""
    found = {key.lower(): value for key, value in row["headers"].items()}
    return {key: found[key] for key in ("x-api-key", "authorization") if key in found}


# Those with which `check`, health and a count are tried too, unless the user asks for versions of
# the CLI.
MAIN = ("subscription", "key", "key-helper", "nobody")


@pytest.mark.parametrize("name", LOGINS)
def test_a_login_is_one_at_the_start_for_check_on_the_page_for_health_and_at_the_api(
    launch: Launch,
    cli: Path,
    environment: Path,
    stub: Stub,
    since: Callable[[], list[Json]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    login = LOGINS[name]
    before = len(stub.rows())
    variables = {
        "CLAUDE_CLI_KEEP_ENV": ",".join(log_in(login, environment, monkeypatch)),
        "CLAUDE_CLI_SETTING_SOURCES": login.sources,
    }
    program = launch(CLAUDE_CLI_BIN=str(cli), **variables)
    is_checked = name in MAIN or bool(os.environ.get("CLIS"))
    status, checked = check(cli, **variables) if is_checked else (1 - bool(login.source), {})
    begun = start_line(program)
    shown = [shown_login(program)]
    healthy = (200, "ok") if login.source else (503, begun.removeprefix("WARNING "))
    if is_checked:
        assert {checked.pop(feature) for feature in FEATURES} == {"works"}
        deep = program.call("GET", "/healthz?deep=1")
        assert (deep.status, deep.body.decode()) == healthy
    assert since() == []  # nothing was spent so far
    answers = [program.post("SAY it is so")]
    if is_checked:
        counted = request_body("hi", max_tokens=...)
        answers.append(program.call("POST", "/v1/messages/count_tokens", counted))
    shown.append(shown_login(program))
    rows = [row for row in stub.rows()[before:] if row["path"].endswith(login.paths)]
    if login.source:
        state = f"{login.source} (user {user_name()} in {environment}/.claude)"
        assert (status, checked.get("login", state)) == (0, state)
        assert begun == f"INFO the claude CLI is logged in: {state}"
        assert set(shown) == {state}
        statuses = {answer.status for answer in answers}
        assert statuses == {200} if login.works else not {200, 401} & statuses
        for path in login.paths[: len(answers)]:
            assert any(row["path"].endswith(path) for row in rows)
    else:
        whose = f"found no login of user {user_name()} in {environment}/.claude"
        nobody = f"nobody is logged in: {whose}"
        assert (status, checked.get("login", nobody)[: len(nobody)]) == (1, nobody)
        assert begun.startswith(f"WARNING {nobody}")
        assert all(words.startswith(nobody) for words in shown)
        assert {answer.status for answer in answers} == {401}
        assert all(nobody in answer.body.decode() for answer in answers)
        assert rows == []
    for words in (checked.get("login", begun), begun, *shown):
        assert login.advice in words
        assert (PASSES_ON in words) == (login.advice == PASSES_ON)
    assert all(login_headers(row) == login.headers for row in rows)
    # The login is the user's, and also another CLI's: nothing of it changes.
    for path, content in login.files.items():
        if path != ".claude.json":
            assert (environment / path).read_text() == json.dumps(content)


@pytest.mark.parametrize("spares", [0, 1])
def test_what_bedrock_says_of_the_models_that_the_cli_tries_is_no_answer_to_a_request(
    serve: Serve,
    cli: Path,
    environment: Path,
    stub: Stub,
    monkeypatch: pytest.MonkeyPatch,
    spares: int,
) -> None:
    """The CLI asks Bedrock at its start which models it may use; here it may use none of them."""
    login = LOGINS["bedrock"]
    kept = {**login.kept, "ANTHROPIC_BEDROCK_BASE_URL": f"{stub.url}/bedrock"}
    keep = log_in(replace(login, kept=kept), environment, monkeypatch)
    server = serve(bin=cli, keep_env=keep, spares=spares)
    assert server.bridge
    pool = server.bridge.pool
    for words in ("one", "two"):
        answer = server.post(words)
        assert (answer.status, answer.text, answer.session) == (200, "ok", "new")
        assert "x-bridge-api-calls" not in answer.headers
        # The sweep may have started one without a model before.
        wait_until(
            lambda: sum(bool(item.kind.model) for item in pool.starter.spares) == spares,
            "the spare",
        )


# a login that changes while the bridge runs


def put(home: Path, name: str, content: Json) -> None:
    """Write a file of the CLI as `auth login` and an editor do."""
    path = home / ".claude" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def log_in_with(home: Path, token: str) -> None:
    put(home, ".credentials.json", {"claudeAiOauth": {**SUBSCRIPTION, "accessToken": token}})


def tokens(rows: list[Json]) -> list[str]:
    return [login_headers(row)["authorization"].removeprefix("Bearer ") for row in rows]


def test_a_login_that_is_made_while_a_spare_waits_counts_at_once(
    serve: Serve,
    cli: Path,
    environment: Path,
    since: Callable[[], list[Json]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bridge, "PROBLEM_SECS", 0.5)
    keep = log_in(LOGINS["nobody"], environment, monkeypatch)
    server = serve(bin=cli, keep_env=keep, spares=1)
    assert server.bridge
    pool = server.bridge.pool
    assert server.call("GET", "/healthz?deep=1").status == 503
    assert server.post("SAY x").status == 401
    wait_until(lambda: pool.starter.spares, "a spare")
    log_in_with(environment, "made-now")
    answer = server.post("SAY x")
    assert (answer.status, answer.text) == (200, "x")
    assert tokens(since()) == ["made-now"]
    wait_until(lambda: server.call("GET", "/healthz?deep=1").body == b"ok", "health")
    assert shown_login(server).startswith("Claude Max (user ")


def test_a_hot_conversation_goes_on_with_the_login_of_now(
    serve: Serve,
    cli: Path,
    environment: Path,
    since: Callable[[], list[Json]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keep = log_in(LOGINS["nobody"], environment, monkeypatch)
    server = serve(bin=cli, keep_env=keep)
    history: list[str] = []

    def ask(words: str) -> tuple[int, str]:
        answer = server.post([*history, f"SAY {words}"])
        if answer.status == 200:
            history.extend([f"SAY {words}", words])
        return answer.status, answer.session

    log_in_with(environment, "first")
    assert ask("a") == (200, "new")
    log_in_with(environment, "second")
    assert ask("b") == (200, "hot")
    assert tokens(since()) == ["first", "second"]

    # One that the API refuses, and one that is gone.
    refused = server.post([*history, "FAIL401"])
    assert (refused.status, refused.session) == (401, "hot")
    seen = len(since())
    log_in_with(environment, "third")
    assert ask("c") == (200, "rebuilt; reason=failed")
    (environment / ".claude/.credentials.json").unlink()
    assert ask("d") == (401, "hot")
    log_in_with(environment, "fourth")
    assert ask("d") == (200, "rebuilt; reason=failed")
    assert tokens(since()[seen:]) == ["third", "fourth"]


@pytest.mark.parametrize("cli", ["bundled"], indirect=True)
def test_a_subscription_in_place_of_a_key_in_the_settings_counts_at_once(
    serve: Serve,
    cli: Path,
    environment: Path,
    since: Callable[[], list[Json]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keep = log_in(LOGINS["key-helper"], environment, monkeypatch)
    server = serve(bin=cli, keep_env=keep, setting_sources="user")
    assert server.post("SAY x").status == 200
    put(environment, "settings.json", {})
    log_in_with(environment, "made-now")
    assert server.post("SAY y").status == 200
    assert tokens(since())[-1] == "made-now"


@pytest.mark.parametrize("cli", ["bundled"], indirect=True)
def test_a_token_in_the_settings_that_is_replaced_is_not_used_again(
    serve: Serve,
    cli: Path,
    environment: Path,
    since: Callable[[], list[Json]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keep = log_in(LOGINS["auth-token-in-settings"], environment, monkeypatch)
    server = serve(bin=cli, keep_env=keep, setting_sources="user")
    assert server.post("SAY x").status == 200
    put(environment, "settings.json", {"env": {"ANTHROPIC_AUTH_TOKEN": "new"}})
    answer = server.post(["SAY x", "x", "SAY y"])
    assert (answer.text, answer.session) == ("y", "rebuilt; reason=login")
    assert tokens(since()) == ["settings", "new"]


@pytest.mark.parametrize("cli", ["bundled"], indirect=True)
def test_a_cloud_in_the_settings_gets_no_more_than_one_in_the_environment(
    serve: Serve, cli: Path, environment: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is an estimate taken for its count, of which the CLI says nothing."""
    kept = LOGINS["bedrock"].kept | {"ANTHROPIC_BEDROCK_BASE_URL": f"{stub.url}/bedrock"}
    login = Login(files=in_settings(env=kept), sources="user")
    keep = log_in(login, environment, monkeypatch)
    server = serve(bin=cli, keep_env=keep, setting_sources="user")
    before = len(stub.rows())
    assert server.post("SAY x").status == 200
    [row] = [row for row in stub.rows()[before:] if row["path"].endswith("-response-stream")]
    assert "# Environment" not in json.dumps(row["body"])
    answer = count(server)
    assert (answer.status, answer.json["error"]["type"]) == (400, "invalid_request_error")
    assert answer.headers["x-should-retry"] == "false"


def test_a_user_without_a_settings_file_may_say_that_the_login_is_in_it(
    serve: Serve, cli: Path
) -> None:
    server = serve(bin=cli, setting_sources="user")
    assert [server.post(words).status for words in ("SAY one", "SAY two")] == [200, 200]


# other sessions of the user's CLI


def sockets(server: Server) -> set[str]:
    """Where the processes of a bridge listen.  What has connected to a UNIX socket is listed under the
    same path."""
    found = set()
    for child in server.processes():
        with contextlib.suppress(psutil.NoSuchProcess):  # one that is not wanted any more
            connections = child.net_connections("all")
            found |= {str(item.laddr) for item in connections if item.laddr and not item.raddr}
    return found


def inboxes(server: Server) -> list[str]:
    """The UNIX sockets among them."""
    return [address for address in sockets(server) if address.startswith("/")]


@pytest.mark.parametrize("settings", [{}, {"tools": "default"}], ids=["model", "agent"])
@pytest.mark.parametrize("name", ["subscription", "key"])
def test_no_process_listens_to_anybody_but_the_bridge(
    serve: Serve,
    cli: Path,
    environment: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    settings: dict[str, str],
) -> None:
    """A CLI takes messages of the user's other sessions into its conversation (recording
    builtin_tool: messaging_socket_path), and a spare into the next one."""
    keep = log_in(LOGINS[name], environment, monkeypatch)
    server = serve(bin=cli, keep_env=keep, spares=1, cwd=str(environment), **settings)
    assert server.bridge
    assert server.post("SAY x").text == "x"
    spares = server.bridge.pool.starter
    wait_until(lambda: spares.spares and not spares.starting, "a spare")
    # A connection to the API that is being made has no other end yet.
    wait_until(lambda: not sockets(server), "no socket")


@pytest.mark.parametrize("cli", ["bundled"], indirect=True)
def test_a_message_of_another_session_does_not_reach_a_conversation(
    serve: Serve,
    cli: Path,
    environment: Path,
    since: Callable[[], list[Json]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Even where a process listens, as a CLI may that has another name for the variable."""
    keep = log_in(LOGINS["subscription"], environment, monkeypatch)
    monkeypatch.delitem(sessions.CHILD_DEFAULTS, "CLAUDE_CODE_HARBOR_KITE")
    server = serve(bin=cli, keep_env=keep)
    assert server.post("SAY x").text == "x"
    wait_until(lambda: len(server.processes()) == 1, "the end of the one that was asked")
    wait_until(lambda: inboxes(server), "the socket")
    [path] = inboxes(server)
    message = {"to": f"uds:{path}", "summary": "s", "message": "from outside"}
    asked = f"USE_TOOL SendMessage INPUT={json.dumps(message)}END"
    sent = subprocess.run([cli, "-p", asked], capture_output=True, text=True, check=True)
    assert "in that session's inbox" in sent.stdout
    answer = server.post(["SAY x", "x", "SAY y"])
    assert (answer.text, answer.session) == ("y", "hot")
    server.close()
    assert not any("<cross-session-message" in json.dumps(row["body"]) for row in since())


# what Anthropic's servers switch on for an account


@linux  # elsewhere the CLI could reach them
@pytest.mark.parametrize("name", ["subscription", "key", "key-helper"])
def test_what_a_user_sets_so_that_nothing_is_reported_is_not_needed(
    serve: Serve,
    cli: Path,
    environment: Path,
    since: Callable[[], list[Json]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Other tests set both opt-outs.  Without them the CLI would not send a client's betas, and tell
    the model what its servers have switched on (which it keeps in its state)."""
    keep = log_in(LOGINS[name], environment, monkeypatch)
    for opt_out in OPT_OUTS:
        monkeypatch.delenv(opt_out)
    features = {"tengu_scratch": True}
    state = {"cachedGrowthBookFeatures": features, "cachedFeatureFlags": features}
    (environment / ".claude.json").write_text(json.dumps(state))
    server = serve(bin=cli, keep_env=keep, setting_sources=LOGINS[name].sources)
    headers = {"anthropic-beta": "files-api-2025-04-14"}
    assert server.call("POST", "/v1/messages", request_body("SAY x"), headers).status == 200
    [row] = since()
    assert "scratchpad" not in json.dumps(row["body"]).lower()
    sent = {key.lower(): value for key, value in row["headers"].items()}
    assert "files-api-2025-04-14" in sent["anthropic-beta"]
