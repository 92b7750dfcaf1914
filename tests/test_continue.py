"""Answers that go on from an assistant message, an address of the API that leads back to the
bridge, and what a child and the API are given of what the user set."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from client import Answer, Json, request_body, text
from host import ROOT
from installed import ASKED_FOR, CLIS
from servers import KEEP, Server
from test_logins import LOGINS, log_in

from bridge import ConfigError
from sessions import CONTINUES, Cli, dotted

BEGUN = {"role": "assistant", "content": [text("It is")]}


@pytest.fixture(params=ASKED_FOR or ["bundled"])
def going_on(request: pytest.FixtureRequest) -> Path:
    """A CLI whose conversations can end with an assistant message."""
    if not CLIS:
        pytest.skip("no CLI is installed")
    version = request.param if ASKED_FOR else next(iter(CLIS))
    if not Cli(version=version).is_at_least(CONTINUES):
        pytest.skip("this version refuses it")
    return CLIS[version]


@pytest.fixture
def floor() -> tuple[str, Path]:
    """The oldest CLI that the tests have, and its version."""
    version, cli = list(CLIS.items() or [("", Path())])[-1]
    if Cli(version=version).is_at_least(CONTINUES):
        pytest.skip("there is no older CLI")
    return version, cli


def without_marks(message: Json) -> Json:
    content = message["content"]
    blocks = [text(content)] if isinstance(content, str) else content
    plain = [{k: v for k, v in block.items() if k != "cache_control"} for block in blocks]
    return {**message, "content": plain}


# an assistant message at the end


@pytest.mark.parametrize("name", ["key", "subscription"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_goes_on_from_the_assistant_message_at_the_end_as_it_was_sent(
    serve: Callable[..., Server],
    going_on: Path,
    environment: Path,
    since: Callable[[], list[Json]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    stream: bool,
) -> None:
    server = serve(bin=going_on, keep_env=log_in(LOGINS[name], environment, monkeypatch))
    history: list[Any] = ["SAY first", "first", "SAY so", BEGUN]
    begun = server.post(history, stream=stream)
    assert (begun.status, begun.session) == (200, "rebuilt; reason=prefill")
    assert begun.message["content"] == [text("so")]
    [row] = since()
    assert without_marks(row["body"]["messages"][-1]) == BEGUN
    roles = [one["role"] for one in row["body"]["messages"] if one["role"] != "system"]
    assert roles == ["user", "assistant", "user", "assistant"]
    # The client makes one message of both.
    history[-1:] = ["It is so", "SAY more"]
    more = server.post(history, stream=stream)
    assert (more.status, more.text) == (200, "more")
    assert more.session.startswith("rebuilt")
    assert without_marks(since()[-1]["body"]["messages"][-2])["content"] == [text("It is so")]


@pytest.mark.parametrize("name", ["key", "subscription"])
def test_an_answer_that_paused_goes_on_when_the_client_sends_it_back(
    serve: Callable[..., Server],
    going_on: Path,
    environment: Path,
    since: Callable[[], list[Json]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    server = serve(bin=going_on, keep_env=log_in(LOGINS[name], environment, monkeypatch))
    tools = [{"type": "web_search_20250305", "name": "web_search"}]
    asked = {"role": "user", "content": "SEARCH PAUSED herons"}
    paused = server.post([asked], tools=tools)
    assert (paused.status, paused.json["stop_reason"]) == (200, "pause_turn")
    answered = {"role": "assistant", "content": paused.json["content"]}
    resumed = server.post([asked, answered], tools=tools)
    assert resumed.status == 200
    first, second = since()
    assert without_marks(second["body"]["messages"][-1]) == answered
    kept = len(first["body"]["messages"])
    assert list(map(without_marks, second["body"]["messages"][:kept])) == list(
        map(without_marks, first["body"]["messages"])
    )


def test_an_older_cli_refuses_an_assistant_message_at_the_end_in_words_and_asks_nothing(
    serve: Callable[..., Server], floor: tuple[str, Path], since: Callable[[], list[Json]]
) -> None:
    version, cli = floor
    server = serve(bin=cli)
    asked = ["SAY so", BEGUN]
    counted = request_body(asked, max_tokens=...)
    refused = [
        server.post(asked),
        server.post(asked, stream=True),
        server.call("POST", "/v1/messages/count_tokens", counted),
    ]
    words = (
        "a conversation that ends with an assistant message needs Claude Code "
        f"{dotted(CONTINUES)} or newer; this is {version}"
    )
    for answer in refused:
        assert answer.status == 400
        assert answer.json["error"]["type"] == "invalid_request_error"
        place, said = answer.json["error"]["message"].split(": ", 1)
        assert (place.partition(".")[0], said) == ("messages", words)
    assert since() == []
    assert server.processes() == []


# an address of the API that leads back


class Forwarder:
    """A loopback listener whose connections lead to another port."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.port = 0
        self.threads = [threading.Thread(target=self._accept)]
        self.threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                far = socket.create_connection(("127.0.0.1", self.port))
                for pair in ((near, far), (far, near)):
                    self.threads.append(threading.Thread(target=self._copy, args=pair))
                    self.threads[-1].start()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for thread in self.threads:
            thread.join()


@pytest.fixture
def forwarder() -> Iterator[Forwarder]:
    running = Forwarder()
    yield running
    running.close()


@pytest.mark.parametrize("name", ["key", "subscription"])
def test_a_request_of_an_own_child_is_refused_before_it_starts_another_child(
    serve: Callable[..., Server],
    cli: Path,
    environment: Path,
    monkeypatch: pytest.MonkeyPatch,
    forwarder: Forwarder,
    name: str,
) -> None:
    monkeypatch.setenv("ANTHROPIC_BASE_URL", forwarder.url)
    server = serve(bin=cli, keep_env=log_in(LOGINS[name], environment, monkeypatch))
    forwarder.port = server.port
    answer = server.post("SAY x", model="claude-sonnet-5-5")
    words = "this request comes from the claude CLI that this bridge runs"
    assert (answer.status, answer.json["error"]["type"]) == (400, "invalid_request_error")
    assert words in answer.json["error"]["message"]
    assert "its address of the API leads to the bridge" in answer.json["error"]["message"]
    assert 1 <= started(server) <= 2
    counted = request_body("hi", model="claude-sonnet-5-5", max_tokens=...)
    answer = server.call("POST", "/v1/messages/count_tokens", counted)
    assert answer.status == 400
    assert started(server) <= 3


def started(server: Server) -> int:
    """How many processes of the CLI the bridge has started."""
    lines = server.call("GET", "/metrics").body.decode().splitlines()
    [line] = [
        line for line in lines if line.startswith("claude_cli_bridge_processes_started_total")
    ]
    return int(line.split()[-1])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_an_address_of_the_api_that_is_the_bridges_own_is_refused_at_the_start(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("ANTHROPIC_BASE_URL", f"http://{host}:{port}/")
    with pytest.raises(ConfigError, match="ANTHROPIC_BASE_URL is the bridge's own address"):
        serve(listen_addr=f"127.0.0.1:{port}")
    # What the CLI does not get does no harm.
    kept = [name for name in KEEP if name != "ANTHROPIC_BASE_URL"]
    assert serve(listen_addr=f"127.0.0.1:{port}", keep_env=kept).post().status == 200


# what the user set


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            "ANTHROPIC_API_KEY=SECRET",
            "takes names of variables, with commas between, and no values",
        ),
        (
            "HTTP_PROXY,ANTHROPIC_API_KEY=SECRET",
            "takes names of variables, with commas between, and no values",
        ),
        ("sk-ant-SECRET", "takes names of variables, with commas between, and no values"),
    ],
)
@pytest.mark.parametrize("command", [(), ("check",)], ids=["serve", "check"])
@pytest.mark.parametrize("way", ["variable", "flag"])
def test_a_secret_in_place_of_a_name_is_refused_and_not_printed(
    command: tuple[str, ...], given: str, words: str, way: str
) -> None:
    flags = ["--keep-env", given] if way == "flag" else []
    variables = {"CLAUDE_CLI_KEEP_ENV": given} if way == "variable" else {}
    done = subprocess.run(
        [sys.executable, str(ROOT / "bridge.py"), *command, *flags],
        env={**os.environ, "CLAUDE_CLI_LISTEN_ADDR": "127.0.0.1:0", **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    said = done.stdout + done.stderr
    assert done.returncode not in (0, -9)
    name = "--keep-env" if way == "flag" else "CLAUDE_CLI_KEEP_ENV"
    assert f"{name}: {words}" in said
    assert "SECRET" not in said


@pytest.mark.parametrize("value", ["1", "true", None])
def test_a_users_wish_that_nothing_is_reported_reaches_the_cli_as_it_is(
    serve: Callable[..., Server], cli: Path, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    names = ("DISABLE_TELEMETRY", "DO_NOT_TRACK", "DISABLE_ERROR_REPORTING")
    for name in names:
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("DISABLE_COST_WARNINGS", "1")
    server = serve(bin=cli)
    assert server.post("SAY x").text == "x"
    [process] = server.processes()
    child = process.environ()
    assert [child.get(name) for name in names] == [value] * 3
    assert "DISABLE_COST_WARNINGS" not in child


def ask(server: Server, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return server.call("POST", "/v1/messages", request_body("SAY x"), named)


def test_headers_of_the_api_that_the_cli_sets_itself_are_named_as_not_sent(
    real: Server, since: Callable[[], list[Json]]
) -> None:
    told = [
        ask(real, anthropic_version="2026-10-21"),
        ask(real, anthropic_version="2026-10-21", anthropic_workspace_id="wrkspc_1"),
        ask(real, anthropic_workspace_id="wrkspc_1"),
        ask(real, anthropic_version="2023-06-01"),
        ask(real),
    ]
    assert [answer.status for answer in told] == [200] * 5
    names = [(answer.headers.get("x-bridge-not-sent") or "").split(", ") for answer in told]
    assert [sorted(listed) for listed in names] == [
        ["anthropic-version"],
        ["anthropic-version", "anthropic-workspace-id"],
        ["anthropic-workspace-id"],
        [""],
        [""],
    ]
    rows = [json.dumps(row["headers"]).lower() for row in since()]
    assert len(rows) == 5
    for row in rows:
        assert '"anthropic-version": "2023-06-01"' in row
        assert "wrkspc_1" not in row
