"""Every login that the real CLI knows: who the bridge says is logged in, and whose request arrives."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from client import Json, request_body
from host import wait_until
from servers import KEEP, Program, Server
from test_check import FEATURES, check

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
    asks: bool = True  # it asks the stub
    kept: dict[str, str] = field(default_factory=dict)  # variables that the CLI gets
    others: dict[str, str] = field(default_factory=dict)  # variables that it does not get
    files: dict[str, Json] = field(default_factory=dict)  # in HOME
    sources: str = ""  # setting_sources
    advice: str = ""  # what helps nobody


def settings(**values: object) -> dict[str, Json]:
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
        files=settings(apiKeyHelper="echo sk-helper"),
        sources="user",
    ),
    "key-in-settings": Login(
        source="ANTHROPIC_API_KEY",
        headers={"x-api-key": "sk-settings"},
        files=settings(env={"ANTHROPIC_API_KEY": "sk-settings"}),
        sources="user",
    ),
    "auth-token-in-settings": Login(
        source="ANTHROPIC_AUTH_TOKEN",
        headers={"authorization": "Bearer settings"},
        files=settings(env={"ANTHROPIC_AUTH_TOKEN": "settings"}),
        sources="user",
    ),
    "bedrock": Login(
        source="bedrock",
        kept={"CLAUDE_CODE_USE_BEDROCK": "1", "AWS_REGION": "us-east-1"},
        asks=False,
    ),
    "vertex": Login(
        source="vertex",
        kept={
            "CLAUDE_CODE_USE_VERTEX": "1",
            "CLOUD_ML_REGION": "us-east5",
            "ANTHROPIC_VERTEX_PROJECT_ID": "mine",
        },
        asks=False,
    ),
    "foundry": Login(
        source="foundry",
        kept={"CLAUDE_CODE_USE_FOUNDRY": "1", "ANTHROPIC_FOUNDRY_RESOURCE": "mine"},
        asks=False,
    ),
    "nobody": Login(advice="auth login` logs in"),
    "nobody-with-a-key-that-is-not-kept": Login(
        others={"ANTHROPIC_API_KEY": "sk-other"}, advice=PASSES_ON
    ),
    "nobody-with-a-key-for-clients": Login(
        others={"ANTHROPIC_API_KEY": "unused"}, advice="auth login` logs in"
    ),
    "nobody-with-unread-settings": Login(
        files=settings(apiKeyHelper="echo sk-helper"),
        advice="CLAUDE_CLI_SETTING_SOURCES=user if the login is in its settings.json",
    ),
}


def log_in(login: Login, home: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Write the files and set the variables of a login; what the CLI is to keep."""
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    for name, value in {**login.kept, **login.others}.items():
        monkeypatch.setenv(name, value)
    for name, content in login.files.items():
        path = home / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return (*(name for name in KEEP if name != "ANTHROPIC_API_KEY"), *login.kept)


def shown_login(server: Server) -> str:
    """What the page says of who is logged in."""
    lines = server.call("GET", "/").body.decode().splitlines()
    [line] = [line for line in lines if line.startswith("  logged in ")]
    return line.removeprefix("  logged in ").strip()


@pytest.mark.parametrize("name", LOGINS)
def test_the_login_that_the_bridge_names_is_the_one_that_asks_the_api(
    serve: Callable[..., Server],
    cli: Path,
    environment: Path,
    since: Callable[[], list[Json]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    login = LOGINS[name]
    keep = log_in(login, environment, monkeypatch)
    server = serve(bin=cli, keep_env=keep, setting_sources=login.sources)
    deep = server.call("GET", "/healthz?deep=1")
    said = deep.body.decode()
    shown = [shown_login(server)]
    answers = []
    if login.asks:
        counted = request_body("hi", max_tokens=...)
        answers = [
            server.post("SAY it is so"),
            server.call("POST", "/v1/messages/count_tokens", counted),
        ]
        shown.append(shown_login(server))
    rows = since()
    if login.source:
        assert (deep.status, said) == (200, "ok")
        assert set(shown) == {login.source}
        assert [answer.status for answer in answers] == [200] * len(answers)
        paths = {row["path"].partition("?")[0] for row in rows}
        assert paths == ({"/v1/messages", "/v1/messages/count_tokens"} if login.asks else set())
    else:
        whose = f"no login of user {user_name()} in {environment}/.claude"
        assert (deep.status, said[: said.index(whose)]) == (503, "nobody is logged in: ")
        assert all(f"nobody: {whose}" in words for words in shown)
        assert [answer.status for answer in answers] == [401, 401]
        assert all("log in with /login" in answer.body.decode() for answer in answers)
        assert rows == []
    for words in (said, *shown):
        assert login.advice in words
        assert (PASSES_ON in words) == (login.advice == PASSES_ON)
    for row in rows:
        found = {key.lower(): value for key, value in row["headers"].items()}
        of_login = {key: found[key] for key in ("x-api-key", "authorization") if key in found}
        assert of_login == login.headers
    # The login is the user's, and also another CLI's: nothing of it changes.
    for path, content in login.files.items():
        if path != ".claude.json":
            assert (environment / path).read_text() == json.dumps(content)


@pytest.mark.parametrize("name", ["subscription", "nobody"])
def test_the_start_and_check_say_who_is_logged_in(
    launch: Callable[..., Program],
    cli: Path,
    environment: Path,
    since: Callable[[], list[Json]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    login = LOGINS[name]
    keep = ",".join(log_in(login, environment, monkeypatch))
    program = launch(CLAUDE_CLI_BIN=str(cli), CLAUDE_CLI_KEEP_ENV=keep)
    status, said = check(cli, CLAUDE_CLI_KEEP_ENV=keep)
    nobody = f"nobody is logged in: no login of user {user_name()} in {environment}/.claude; "
    if login.source:
        assert (status, said["login"]) == (0, login.source)
    else:
        assert (status, said["login"][: len(nobody)]) == (1, nobody)
    assert {said[feature] for feature in FEATURES} == {"works"}
    wait_until(lambda: any("logged in" in line for line in program.lines), "the login")
    [line] = [line for line in program.lines if "logged in" in line]
    assert (f"INFO the claude CLI is logged in ({login.source})" in line) == bool(login.source)
    assert (f"WARNING {nobody}" in line) == (not login.source)
    assert since() == []
