"""Two bridges behind a real nginx, with deploy/nginx.conf."""

import contextlib
import http.client
import itertools
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from client import Answer, Client, arrived, request_body, sent
from host import TESTS, wait_until
from servers import Launch, Program
from stand_in import Log, digest
from stubs import Stub

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
pytestmark = pytest.mark.skipif(not NGINX, reason="nginx is not installed")

GATEWAY = (TESTS / "deploy/nginx.conf").read_text()
ROUND_ROBIN = GATEWAY.replace("    hash $conversation consistent;\n", "")
HOST = "llm.example"

# What a distribution's nginx.conf has around it, as far as it is needed.
AROUND = """
user root;
daemon off;
pid nginx.pid;
error_log error.log warn;
events {}
http {
access_log off;
client_body_temp_path temp;
proxy_temp_path temp;
fastcgi_temp_path temp;
uwsgi_temp_path temp;
scgi_temp_path temp;
%s
}
"""


@dataclass
class Gateway(Client):
    bridges: list[Program]
    errors: Path  # nginx's log

    def bridge(self, answer: Answer) -> int:
        """The number of the bridge that gave it, by its log."""
        line = f"request_id={answer.headers['request-id']} "

        def places() -> list[int]:
            return [
                n for n, one in enumerate(self.bridges) if any(line in row for row in one.lines)
            ]

        wait_until(places, "the line in a bridge's log")
        return places()[0]


@pytest.fixture
def gateway(launch: Launch, tmp_path: Path) -> Iterator[Callable[..., Gateway]]:
    """Start two bridges and nginx before them: gateway(GATEWAY, CLAUDE_CLI_API_KEY=...)."""
    with contextlib.ExitStack() as stack:

        def start(config: str, **variables: str) -> Gateway:
            variables = {"CLAUDE_CLI_MAX_IDLE": "16", "CLAUDE_CLI_ALLOWED_HOSTS": HOST, **variables}
            bridges = [launch(STANDIN_BRIDGE=str(number), **variables) for number in range(2)]
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            for ours, theirs in (
                ("14001", bridges[0].port),
                ("14002", bridges[1].port),
                ("8080", port),
            ):
                config = config.replace(f":{ours}", f":{theirs}")
            path = tmp_path / "nginx.conf"
            path.write_text(AROUND % config)
            process = subprocess.Popen([NGINX, "-p", tmp_path, "-c", path, "-e", "error.log"])
            stack.callback(process.wait)
            stack.callback(process.terminate)
            found = Gateway("127.0.0.1", port, bridges=bridges, errors=tmp_path / "error.log")

            def listens() -> bool:
                assert process.poll() is None, found.errors.read_text()
                with socket.socket() as client:
                    return not client.connect_ex(("127.0.0.1", port))

            wait_until(listens, "nginx")
            return found

        yield start


class Lost(Exception):
    """The answer broke off, or the gateway says that there is none."""


@dataclass
class Conversation:
    client: Client
    number: int
    pinned: bool
    messages: list[str] = field(default_factory=list)

    def ask(self, words: str) -> str:
        """One turn, whose answer must be that of the whole conversation; returns what was done for
        it."""
        asked = [*self.messages, f"{words} {self.number} DIGEST"]
        name = f"conversation-{self.number}" if self.pinned else None
        try:
            answer = self.client.post(asked, session=name, stream=bool(self.number % 2))
        except (OSError, http.client.HTTPException) as error:
            raise Lost from error
        if answer.status == 502:
            raise Lost
        wanted = (
            f"echo: {asked[-1]}; {len(asked)} messages {digest(request_body(asked)['messages'])}"
        )
        assert (answer.status, answer.text) == (200, wanted)
        self.messages = [*asked, answer.text]
        return answer.session

    def go_on(self, turns: range) -> list[str]:
        return [self.ask(f"turn {turn}") for turn in turns]


@pytest.mark.parametrize("way", ["hash", "round robin"])
def test_a_bridge_that_is_killed_takes_running_answers_visibly_and_no_conversation(
    gateway: Callable[..., Gateway], gate: Path, log: Log, background: ThreadPoolExecutor, way: str
) -> None:
    server = gateway(GATEWAY if way == "hash" else ROUND_ROBIN)
    talks = [Conversation(server, number, way == "hash" or number < 5) for number in range(10)]
    begun = list(background.map(Conversation.go_on, talks, itertools.repeat(range(3))))
    if way == "hash":
        assert begun == [["new", "hot", "hot"]] * 10
    else:
        assert {done for talk in begun for done in talk} >= {
            "new",
            "rebuilt; reason=unknown-history",
        }

    asked = [f"PAUSE {talk.number} DIGEST" for talk in talks]
    running = [background.submit(talk.ask, "PAUSE") for talk in talks]
    wait_until(lambda: all(map(log.got, asked)), "ten turns at once")
    places = [log.started()[log.got(text)]["env"]["STANDIN_BRIDGE"] for text in asked]
    server.bridges[int(places[0])].process.kill()
    moved = [place == places[0] for place in places]
    assert all(
        isinstance(turn.exception(), Lost)
        for turn, gone in zip(running, moved, strict=True)
        if gone
    )
    gate.touch()
    assert [turn.exception() is not None for turn in running] == moved
    assert [log.asked(text) for text in asked] == [1] * 10

    after = list(background.map(Conversation.go_on, talks, itertools.repeat(range(3, 6))))
    for done, gone in zip(after, moved, strict=True):
        assert done[1:] == ["hot", "hot"]
        if way == "hash":
            assert done[0] == ("rebuilt; reason=unknown-history" if gone else "hot")


@contextlib.contextmanager
def begun(server: Gateway) -> Iterator[http.client.HTTPResponse]:
    """An answer whose first words have come while the CLI holds back the rest."""
    with contextlib.closing(
        http.client.HTTPConnection(server.host, server.port, timeout=15)
    ) as connection:
        connection.request("POST", "/v1/messages", json.dumps(request_body("PAUSE", stream=True)))
        response, data = connection.getresponse(), b""
        while b"echo:" not in data:
            part = response.read1()
            assert part, data
            data += part
        assert b"message_stop" not in data
        yield response


def test_the_first_words_arrive_while_the_cli_holds_back_the_rest(
    gateway: Callable[..., Gateway], gate: Path
) -> None:
    with begun(gateway(GATEWAY)) as response:
        gate.touch()
        assert b"message_stop" in response.read()


def test_a_stream_whose_bridge_is_killed_breaks_off_instead_of_ending(
    gateway: Callable[..., Gateway], gate: Path
) -> None:
    server = gateway(GATEWAY)
    with begun(server) as response:
        for bridge in server.bridges:
            bridge.process.kill()
        with pytest.raises(http.client.IncompleteRead):
            response.read()


def test_a_client_that_leaves_ends_the_turn_behind_the_gateway(
    gateway: Callable[..., Gateway], gate: Path, log: Log
) -> None:
    server = gateway(GATEWAY)
    for stream in (True, False):
        text = f"PAUSE {stream}"
        with contextlib.closing(http.client.HTTPConnection(server.host, server.port)) as connection:
            connection.request(
                "POST", "/v1/messages", json.dumps(request_body(text, stream=stream))
            )
            wait_until(lambda text=text: log.got(text), "the turn")
        wait_until(lambda text=text: "interrupt" in log.requests(log.got(text)), "the interrupt")


def test_a_conversation_stays_on_one_bridge_by_the_name_that_its_client_gives_or_its_address(
    gateway: Callable[..., Gateway],
) -> None:
    server = gateway(GATEWAY)

    def place(address: str, headers: dict[str, str]) -> int:
        connection = http.client.HTTPConnection(
            server.host, server.port, source_address=(address, 0)
        )
        with contextlib.closing(connection):
            # 400, which costs no process.
            connection.request("POST", "/v1/messages", b"{}", headers)
            response = connection.getresponse()
            return server.bridge(Answer(response.status, dict(response.getheaders()), b""))

    for name in (
        "x-arch-claude-cli-session",
        "x-claude-code-session-id",
        "x-session-affinity",
        None,
    ):
        places = []
        for number in range(20):
            headers = {name: f"name-{number}"} if name else {}
            addresses = [
                f"127.0.0.{number + 2}" if name is None else f"127.0.0.{n + 2}" for n in range(2)
            ]
            places.append({place(address, headers) for address in addresses})
        assert [len(found) for found in places] == [1] * 20
        assert set.union(*places) == {0, 1}


def test_the_bridges_check_the_name_that_the_client_reached_the_gateway_by(
    gateway: Callable[..., Gateway],
) -> None:
    server = gateway(GATEWAY, CLAUDE_CLI_API_KEY="secret")
    for host, key, status in (
        (HOST, "secret", 200),
        (HOST, "other", 401),
        ("evil.example", "secret", 403),
    ):
        headers = {"host": host, "x-api-key": key}
        assert server.call("POST", "/v1/messages", request_body(), headers).status == status


def test_a_body_of_the_bridges_limit_passes_and_neither_prompt_nor_answer_touches_a_file(
    gateway: Callable[..., Gateway],
) -> None:
    server = gateway(GATEWAY)
    limit = 32 << 20
    assert (
        server.call("POST", "/v1/messages", b"x" * limit).json["error"]["type"]
        == "invalid_request_error"
    )
    assert server.call("POST", "/v1/messages", b"x" * (limit + 1)).status == 413
    with contextlib.closing(http.client.HTTPConnection(server.host, server.port)) as connection:
        connection.connect()
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
        connection.request("POST", "/v1/messages", json.dumps(request_body("BIGLINE 8000000")))
        response = connection.getresponse()
        assert sum(map(len, iter(lambda: response.read(1024), b""))) > 8_000_000
    assert "temporary file" not in server.errors.read_text()


def test_bridges_that_were_away_are_asked_again_at_once(
    gateway: Callable[..., Gateway], launch: Launch
) -> None:
    server = gateway(GATEWAY)
    for bridge in server.bridges:
        bridge.process.terminate()
        bridge.wait()
    assert server.post().status == 502
    for bridge in server.bridges:
        launch(CLAUDE_CLI_LISTEN_ADDR=f"127.0.0.1:{bridge.port}")
    assert server.post().status == 200


@pytest.mark.parametrize("cli", ["bundled"], indirect=True)
def test_the_api_sees_the_whole_conversation_after_it_moved(
    gateway: Callable[..., Gateway], cli: Path, stub: Stub
) -> None:
    server = gateway(GATEWAY, CLAUDE_CLI_BIN=str(cli))
    talk, done = ["SAY one"], []
    for text in ("SAY two", "SAY three", "SAY four"):
        answer = server.post(talk, session="moved")
        done.append(answer.session)
        talk += [answer.text, text]
        if len(done) == 2:
            place = server.bridges[server.bridge(answer)]
            place.process.kill()
            place.wait()  # until then its connections live, and what is sent over them is lost
    answer = server.post(talk, session="moved")
    assert [*done, answer.session] == ["new", "hot", "rebuilt; reason=unknown-history", "hot"]
    assert arrived(stub.log()[-1]["body"]) == sent(talk)
