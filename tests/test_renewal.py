"""A subscription's login that ends.  The CLI renews it at the API's own address alone, so
test_first_party.py runs this file.  A refresh token is good for one use: a process that ends before it
has written the next one into its file logs its user out."""

import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import first_party
import pytest
from client import Json
from host import wait_until
from servers import Launch, Serve
from stubs import Stub
from test_logins import CREDENTIALS, LOGINS, SUBSCRIPTION, log_in
from wire import post

import sessions

pytestmark = pytest.mark.skipif(
    not first_party.IS_ON, reason="the CLI renews no login elsewhere (FIRST_PARTY=1)"
)
[PATH] = CREDENTIALS


@dataclass
class Login:
    """The user's, in a file, and the stub that renews it."""

    path: Path
    keep: tuple[str, ...]
    stub: Stub

    def write(self, *, secs: float, **others: str) -> None:
        """One that ends in so many seconds."""
        ends = {"expiresAt": int((time.time() + secs) * 1000)}
        content = json.dumps({"claudeAiOauth": SUBSCRIPTION | ends | others})
        new = self.path.with_suffix(".new")
        new.write_text(content)
        new.replace(self.path)

    def read(self) -> Json:
        content: Json = json.loads(self.path.read_text())["claudeAiOauth"]
        return content

    @property
    def is_new(self) -> bool:
        return self.read()["refreshToken"] not in ("", SUBSCRIPTION["refreshToken"])

    def renewals(self) -> list[Json]:
        return [row for row in self.stub.rows() if row["path"].endswith("/oauth/token")]

    def bearers(self) -> set[str]:
        """The logins of the requests for a message."""
        rows = [row for row in self.stub.log() if not row["path"].endswith("/count_tokens")]
        return {row["headers"]["Authorization"] for row in rows}


@pytest.fixture
def login(environment: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Login]:
    """One that has ended; to renew it takes longer than a process is given to end."""
    secs = 1 + sum(seconds for _, seconds in sessions.ENDING[:-1])
    with Stub("--renewal-secs", str(secs)) as stub:
        monkeypatch.setenv("ANTHROPIC_BASE_URL", stub.url)
        keep = log_in(LOGINS["subscription"], environment, monkeypatch)
        login = Login(environment / PATH, keep, stub)
        login.write(secs=-60)
        yield login


@pytest.mark.parametrize("cli", ["bundled"], indirect=True)
def test_a_client_that_leaves_after_the_api_refused_the_login_does_not_log_its_user_out(
    serve: Serve, cli: Path, login: Login
) -> None:
    """A newer CLI also renews a login that the API no longer takes, before its time."""
    login.write(secs=9000)
    server = serve(bin=cli, keep_env=login.keep)
    with server.connect() as client:
        client.sendall(post("FAIL401"))
        wait_until(login.renewals, "a renewal")
    wait_until(lambda: login.is_new, "the new login")
    assert server.post("SAY y").text == "y"


@pytest.mark.parametrize("variable", ["CLAUDE_CONFIG_DIR", "CLAUDE_SECURESTORAGE_CONFIG_DIR"])
def test_a_bridge_that_stops_does_not_log_its_user_out(
    launch: Launch,
    cli: Path,
    login: Login,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
) -> None:
    """As it starts it asks a process who is logged in.  The login may be in another folder."""
    monkeypatch.setenv(variable, str(tmp_path))
    login.path = login.path.replace(tmp_path / login.path.name)
    program = launch(CLAUDE_CLI_BIN=str(cli), CLAUDE_CLI_KEEP_ENV=",".join(login.keep))
    wait_until(login.renewals, "a renewal")
    program.process.send_signal(signal.SIGTERM)
    program.wait()
    assert login.is_new


def test_requests_at_once_have_the_login_renewed_once(
    serve: Serve, cli: Path, login: Login, background: ThreadPoolExecutor
) -> None:
    server = serve(bin=cli, keep_env=login.keep, spares=2)
    posted = [background.submit(server.post, f"SAY {name}") for name in "abc"]
    assert [answer.result().text for answer in posted] == list("abc")
    assert login.bearers() == {f"Bearer {login.read()['accessToken']}"}
    assert len(login.renewals()) == 1


def test_a_hot_conversation_goes_on_with_a_new_login(serve: Serve, cli: Path, login: Login) -> None:
    login.write(secs=9000)
    server = serve(bin=cli, keep_env=login.keep)
    assert server.post("SAY x").text == "x"
    login.write(secs=60)
    answer = server.post(["SAY x", "x", "SAY y"])
    assert (answer.text, answer.session) == ("y", "hot")
    before, after = f"Bearer {SUBSCRIPTION['accessToken']}", f"Bearer {login.read()['accessToken']}"
    assert login.is_new
    assert login.bearers() == {before, after}


def test_a_login_that_cannot_be_renewed_is_none(serve: Serve, cli: Path, login: Login) -> None:
    login.write(secs=-60, accessToken="sk-ant-oat01-ended", refreshToken="sk-ant-ort01-void")
    server = serve(bin=cli, keep_env=login.keep)
    for _ in range(2):
        answer = server.post("SAY x")
        assert (answer.status, answer.json["error"]["type"]) == (401, "authentication_error")
    assert "auth login` logs in" in answer.json["error"]["message"]
