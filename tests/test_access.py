"""Who may talk to the port: the names in Host, the origins of web pages, the API key, the addresses
to listen on."""

import asyncio
import http.client
import os
import socket
import stat
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from client import Answer, request_body
from host import STANDIN
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import Server
from test_http import quiet  # noqa: F401 - an autouse fixture

import bridge

KEY = "sk-bridge-0123456789"


def ask(
    server: Server,
    *lines: str | bytes,
    request: str = "POST /v1/messages HTTP/1.1",
    connection: socket.socket | None = None,
) -> Answer:
    """One request with exactly these header lines."""
    head = [
        line.encode() if isinstance(line, str) else line
        for line in (request, *lines, "Content-Length: 0")
    ]
    with closing(connection or server.connect()) as client:
        client.sendall(b"\r\n".join(head) + b"\r\n\r\n")
        method = request.partition(" ")[0]
        with closing(http.client.HTTPResponse(client, method=method)) as response:
            response.begin()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, found, response.read())


def assert_refused(answer: Answer, status: int, kind: str) -> None:
    assert (answer.status, answer.json["error"]["type"]) == (status, kind)
    assert answer.json["request_id"] == answer.headers["request-id"]
    assert answer.headers["x-should-retry"] == "false"
    assert not [name for name in answer.headers if name.startswith("access-control-")]


def let_in(answer: Answer) -> bool:
    """Whether a POST to /v1/messages got as far as its body, which is empty."""
    assert answer.status in (400, 401, 403, 404)
    return "JSON" in answer.json["error"]["message"]


# ---------------------------------------------------------------- Host


@pytest.mark.parametrize(
    "host",
    [
        *(
            "localhost",
            "localhost:14001",
            "localhost:80",
            "LocalHost",
            "LOCALHOST:1",
            "my.localhost",
            "a.b.LOCALHOST:9",
        ),
        *(
            "127.0.0.1",
            "127.0.0.1:14001",
            "127.0.0.2",
            "127.255.255.254",
            "[::1]",
            "[::1]:14001",
            "[0:0::0:1]",
        ),
        *(
            "bridge.example",
            "bridge.example:14001",
            "BRIDGE.example",
            "192.0.2.7",
            "192.0.2.7:80",
            "[2001:db8::7]:80",
        ),
    ],
)
def test_loopback_names_and_allowed_hosts_are_served(
    serve: Callable[..., Server], host: str
) -> None:
    server = serve(allowed_hosts=("bridge.example", "192.0.2.7", "2001:db8::7"))
    assert let_in(ask(server, f"Host: {host}"))


@pytest.mark.parametrize("name", ["db", "cafe", "a", "d0", "bad.face", "deadbeef"])
def test_a_name_of_hexadecimal_digits_is_no_address(
    serve: Callable[..., Server], name: str
) -> None:
    server = serve(allowed_hosts=(name,))
    assert let_in(ask(server, f"Host: {name}"))
    assert let_in(ask(server, f"Host: {name}:14001"))
    assert not let_in(ask(server, f"Host: {name}:99999"))


@pytest.mark.parametrize(
    "origin",
    [
        *("http://localhost:3000", "https://app.example", "https://app.example:80"),
        *(
            "http://[::1]:8080",
            "http://127.0.0.1",
            "chrome-extension://abcdef",
            "app://obsidian.md",
        ),
    ],
)
def test_an_origin_that_browsers_send_can_be_allowed(
    serve: Callable[..., Server], origin: str
) -> None:
    assert let_in(ask(serve(allowed_origins=(origin,)), "Host: localhost", f"Origin: {origin}"))


def test_names_are_allowed_in_any_case(serve: Callable[..., Server]) -> None:
    assert let_in(ask(serve(allowed_hosts=("Bridge.Example",)), "Host: bridge.example"))


@pytest.mark.parametrize(
    "host",
    [
        *(
            "evil.example",
            "evil.example:14001",
            "localhost.evil.example",
            "localhostevil.example",
            "evil-localhost",
        ),
        *(
            "evillocalhost",
            "127.0.0.1.nip.io",
            "127.0.0.1.evil.example",
            "1.0.0.127.in-addr.arpa",
            "0.0.0.0",
            "0",
        ),
        *(
            "localhost.evil",
            "[::2]",
            "[::ffff:192.0.2.1]",
            "192.168.0.1",
            "10.0.0.1",
            "169.254.169.254",
            "[fe80::1]",
        ),
        *(
            "bridge.example",
            "evil.example.",
            "127.0.0.1.nip.io.",
            "evil.example:localhost",
            "localhost,evil.example",
        ),
        *(
            "localhost evil.example",
            "evil.example localhost",
            "evil.example/localhost",
            "evil.example#localhost",
        ),
        *(
            "evil.example?localhost",
            "evil.example\\localhost",
            "localhost@evil.example",
            "localhost:1@evil.example",
        ),
        *(
            "127.0.0.1:14001@evil.example:80",
            "evil.example#@localhost",
            "evil.example/@localhost",
            "%6cocalhost",
        ),
        *(
            "",
            ":14001",
            ".",
            "..localhost.",
            "[::1",
            "::1]",
            "[]",
            "[localhost",
            "[evil.example]",
            "[v1.localhost]",
        ),
        *(
            "127.0.0.1\xbd",
            "xn--localhost",
            "loc\xe4lhost",
            "null",
            "*",
            "http://localhost",
            "//localhost",
        ),
    ],
)
def test_other_names_get_403(serve: Callable[..., Server], host: str) -> None:
    answer = ask(serve(), f"Host: {host}".encode("latin-1"))
    assert_refused(answer, 403, "permission_error")
    assert "CLAUDE_CLI_ALLOWED_HOSTS" in answer.json["error"]["message"]


@pytest.mark.parametrize(
    "host",
    [
        *(
            "user@localhost",
            "evil.example@localhost",
            "evil.example:80@localhost:14001",
            "@localhost",
            "localhost:evil",
        ),
        *(
            "localhost/evil.example",
            "localhost?evil.example",
            "localhost#evil.example",
            "localhost:99999",
            "localhost:-1",
        ),
    ],
)
def test_a_host_that_is_no_host_is_refused(serve: Callable[..., Server], host: str) -> None:
    """RFC 9112, 3.2: a server MUST answer an invalid Host with 400; 403 is as good."""
    assert not let_in(ask(serve(), f"Host: {host}"))


@pytest.mark.parametrize(
    "hosts",
    [("localhost", "localhost"), ("localhost", "evil.example"), ("evil.example", "localhost")],
)
def test_two_hosts_are_refused(serve: Callable[..., Server], hosts: tuple[str, str]) -> None:
    assert_refused(ask(serve(), *(f"Host: {host}" for host in hosts)), 400, "invalid_request_error")


@pytest.mark.parametrize(
    "target", ["http://evil.example/v1/messages", "//evil.example/v1/messages", "evil.example:80"]
)
def test_a_host_in_the_target_opens_nothing(serve: Callable[..., Server], target: str) -> None:
    assert not let_in(ask(serve(), "Host: localhost", request=f"POST {target} HTTP/1.1"))


def test_the_address_listened_on_is_a_good_host(serve: Callable[..., Server]) -> None:
    server = serve(listen_addr="0.0.0.0:0", api_key=KEY)
    key = f"x-api-key: {KEY}"
    assert let_in(ask(server, "Host: 0.0.0.0", key))
    assert_refused(ask(server, "Host: evil.example", key), 403, "permission_error")


def test_a_fold_cannot_add_a_name(serve: Callable[..., Server]) -> None:
    assert not let_in(ask(serve(), "Host: evil.example\r\n localhost"))
    assert not let_in(ask(serve(), "Host: localhost\r\n evil.example"))


@settings(max_examples=400, derandomize=True, database=None, deadline=None)
@given(
    host=st.lists(
        st.sampled_from(
            [*"[]:@/.%#?\\-_~!'\xbd\xff 01v", "localhost", "127.0.0.1", "::1", "evil.example"]
        ),
        max_size=6,
    )
)
def check_host(server: Server, host: list[str]) -> None:
    let_in(ask(server, b"Host: " + "".join(host).encode("latin-1")))


def test_no_host_is_too_strange_for_an_answer(serve: Callable[..., Server]) -> None:
    check_host(serve())


# ---------------------------------------------------------------- Origin


@pytest.mark.parametrize(
    ("site", "status"),
    [("cross-site", 403), ("same-site", 403), ("same-origin", 404), ("none", 404)],
)
def test_what_a_page_embeds_has_no_origin_but_says_where_it_comes_from(
    serve: Callable[..., Server], site: str, status: int
) -> None:
    answer = serve().call(
        "GET", "/no/such", headers={"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors"}
    )
    assert answer.status == status


PAGE = "https://app.example"


@pytest.mark.parametrize(
    "origin",
    [
        *(
            "",
            "https://evil.example",
            "http://app.example",
            "https://app.example:8443",
            "https://app.example/",
        ),
        *(
            "https://app.example.evil.example",
            "https://evilapp.example",
            "https://app.example@evil.example",
            "app.example",
        ),
        *(
            "https://app.example https://evil.example",
            "http://localhost",
            "http://localhost:14001",
            "http://127.0.0.1:14001",
        ),
        *("file://", "chrome-extension://abc", "*", "\xe4"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/messages", "/messages", "/nope", "/"])
def test_pages_of_other_origins_get_403(
    serve: Callable[..., Server], origin: str, path: str
) -> None:
    server = serve(allowed_origins=(PAGE,))
    answer = ask(
        server,
        "Host: localhost",
        f"Origin: {origin}".encode("latin-1"),
        request=f"POST {path} HTTP/1.1",
    )
    assert_refused(answer, 403, "permission_error")
    assert "CLAUDE_CLI_ALLOWED_ORIGINS" in answer.json["error"]["message"]


def test_a_page_without_an_origin_is_refused_and_cannot_be_allowed(
    serve: Callable[..., Server],
) -> None:
    """Any page in a sandbox sends `null`."""
    answer = ask(serve(), "Host: localhost", "Origin: null")
    assert_refused(answer, 403, "permission_error")
    assert "CLAUDE_CLI_ALLOWED_ORIGINS" not in answer.json["error"]["message"]
    with pytest.raises(bridge.ConfigError, match="CLAUDE_CLI_ALLOWED_ORIGINS"):
        bridge.Config(allowed_origins=("null",)).checked()


@pytest.mark.parametrize("origins", [(), ("https://other.example",)])
def test_no_page_is_allowed_by_default(
    serve: Callable[..., Server], origins: tuple[str, ...]
) -> None:
    server = serve(allowed_origins=origins)
    assert_refused(ask(server, "Host: localhost", f"Origin: {PAGE}"), 403, "permission_error")


def test_an_allowed_page_may_read_its_answers(serve: Callable[..., Server]) -> None:
    server = serve(allowed_origins=("https://other.example", PAGE))
    for fields in ({}, {"stream": True}, {"messages": "wrong"}):
        answer = server.call(
            "POST", "/v1/messages", {**request_body("hello"), **fields}, {"Origin": PAGE}
        )
        assert answer.status == (400 if "messages" in fields else 200)
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert answer.headers["vary"].lower() == "origin"


def test_an_allowed_page_still_needs_a_good_host(serve: Callable[..., Server]) -> None:
    answer = ask(serve(allowed_origins=(PAGE,)), "Host: evil.example", f"Origin: {PAGE}")
    assert (answer.status, answer.json["error"]["type"]) == (403, "permission_error")


def test_one_allowed_origin_of_two_is_not_enough(serve: Callable[..., Server]) -> None:
    server = serve(allowed_origins=(PAGE,))
    origins = [f"Origin: {PAGE}", "Origin: https://evil.example"]
    for lines in (origins, origins[::-1]):
        assert not let_in(ask(server, "Host: localhost", *lines))


def test_without_an_origin_no_cors_header_is_sent(serve: Callable[..., Server]) -> None:
    answer = ask(serve(allowed_origins=(PAGE,)), "Host: localhost")
    assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize(
    ("asked", "allowed"),
    [
        (b"content-type, x-api-key", "content-type, x-api-key"),
        (b"x-\xff\xfe", ""),
        (b"\x80", ""),
        ("sch\xf6n".encode(), ""),
        (b"a\tb", ""),
    ],
)
def test_a_preflight_allows_the_headers_asked_for_if_they_can_be_names(
    serve: Callable[..., Server], asked: bytes, allowed: str
) -> None:
    answer = ask(
        serve(allowed_origins=(PAGE,), api_key=KEY),
        "Host: localhost",
        f"Origin: {PAGE}",
        b"Access-Control-Request-Headers: " + asked,
        "Access-Control-Request-Method: POST",
        request="OPTIONS /v1/messages HTTP/1.1",
    )
    assert answer.status == 204
    assert answer.headers.get("access-control-allow-headers", "") == allowed
    assert answer.headers["access-control-allow-methods"] == "POST"


# ---------------------------------------------------------------- API key

ROUTES = [
    "POST /v1/messages",
    "POST /messages",
    "POST /v1/v1/messages",
    "GET /v1/messages",
    "GET /nope",
    "HEAD /",
    "GET /",
]


@pytest.fixture
def locked(serve: Callable[..., Server]) -> Server:
    return serve(api_key=KEY)


@pytest.mark.parametrize(
    "lines",
    [
        [f"x-api-key: {KEY}"],
        [f"X-Api-Key: {KEY}"],
        [f"Authorization: Bearer {KEY}"],
        [f"Authorization: Bearer  {KEY}"],
        [f"authorization: Bearer {KEY}", f"x-api-key: {KEY}"],
        [f"authorization: Bearer {KEY}", "x-api-key: another"],
        ["authorization: Bearer another", f"x-api-key: {KEY}"],
    ],
)
def test_the_key_may_come_in_either_header(locked: Server, lines: list[str]) -> None:
    assert let_in(ask(locked, "Host: localhost", *lines))


@pytest.mark.parametrize("scheme", ["bearer", "BEARER"])
def test_the_scheme_is_read_in_any_case(locked: Server, scheme: str) -> None:
    """RFC 9110, 11.1: auth-scheme is a case-insensitive token."""
    assert let_in(ask(locked, "Host: localhost", f"Authorization: {scheme} {KEY}"))


@pytest.mark.parametrize("request_", ROUTES)
@pytest.mark.parametrize(
    "lines", [[f"x-api-key: {KEY}"], [f"authorization: Bearer {KEY}"]], ids=["x-api-key", "bearer"]
)
def test_every_route_opens_with_the_key(locked: Server, request_: str, lines: list[str]) -> None:
    assert ask(locked, "Host: localhost", *lines, request=f"{request_} HTTP/1.1").status not in (
        401,
        403,
        500,
    )


@pytest.mark.parametrize("request_", [route for route in ROUTES if not route.startswith("HEAD")])
def test_no_route_opens_without_the_key(locked: Server, request_: str) -> None:
    answer = ask(locked, "Host: localhost", request=f"{request_} HTTP/1.1")
    assert_refused(answer, 401, "authentication_error")
    assert "requires a key" in answer.json["error"]["message"]


@pytest.mark.parametrize(
    "line",
    [
        *(
            "x-api-key: another",
            f"x-api-key: {KEY}x",
            f"x-api-key: {KEY[:-1]}",
            f"x-api-key: {KEY.upper()}",
        ),
        *(
            f"x-api-key: Bearer {KEY}",
            "x-api-key: \xe9\xff",
            f"x-api-key: {KEY},{KEY}",
            f"x-api-keys: {KEY}\r\nx-api-key: 1",
        ),
        *(
            f"authorization: {KEY}",
            "authorization: Bearer",
            f"authorization: Basic {KEY}",
            f"authorization: Bearer{KEY}",
        ),
        *(
            f"authorization: Bearer {KEY} {KEY}",
            f"authorization: Bearer {KEY}\xff",
            "authorization: Bearer another",
        ),
    ],
)
def test_a_wrong_key_gets_401_that_does_not_tell_the_key(locked: Server, line: str) -> None:
    answer = ask(locked, "Host: localhost", line.encode("latin-1"))
    assert_refused(answer, 401, "authentication_error")
    message = answer.json["error"]["message"]
    assert "does not match" in message or "takes the word Bearer" in message
    assert answer.headers["www-authenticate"] == "Bearer"  # RFC 9110, 15.5.2
    assert KEY.encode() not in answer.body


@pytest.mark.parametrize("line", ["x-api-key:", "authorization:", "cookie: x-api-key=" + KEY])
def test_an_empty_key_is_a_missing_key(locked: Server, line: str) -> None:
    answer = ask(locked, "Host: localhost", line)
    assert "requires a key" in answer.json["error"]["message"]


def test_without_a_key_any_key_will_do(serve: Callable[..., Server]) -> None:
    server = serve()
    for line in (
        "x-api-key: any",
        "authorization: Bearer any",
        "authorization: Basic YTpi",
        "x-api-key:",
    ):
        assert let_in(ask(server, "Host: localhost", line))


@pytest.mark.parametrize("key", ["sesame\udcff", "sesame\n", " sesame", "ses\0ame", "sesame\r\n x"])
def test_a_key_that_no_header_can_hold_is_refused_at_the_start_and_not_shown(
    serve: Callable[..., Server], key: str
) -> None:
    with pytest.raises(bridge.ConfigError, match=r"^CLAUDE_CLI_API_KEY: must be") as caught:
        serve(api_key=key)
    assert "sesame" not in str(caught.value)


def test_a_key_beyond_ascii_works_or_is_refused_at_the_start(serve: Callable[..., Server]) -> None:
    try:
        server = serve(api_key="clé")
    except bridge.ConfigError:
        return
    assert let_in(ask(server, "Host: localhost", "x-api-key: clé"))


def test_the_key_does_not_replace_a_good_host_and_origin(locked: Server) -> None:
    key = f"x-api-key: {KEY}"
    assert_refused(ask(locked, "Host: evil.example", key), 403, "permission_error")
    assert_refused(ask(locked, "Host: localhost", "Origin: null", key), 403, "permission_error")


@pytest.mark.parametrize("method", ["POST", "OPTIONS"])
@pytest.mark.parametrize("path", ["/healthz", "/v1/messages"])
def test_no_body_is_read_without_the_key(
    serve: Callable[..., Server], method: str, path: str
) -> None:
    """Not even that of a preflight, which has none."""
    origin = "http://localhost:3000"
    server = serve(api_key=KEY, allowed_origins=(origin,))
    lines = ["Host: localhost", f"Origin: {origin}", "Content-Length: 30000000"]
    with closing(server.connect()) as client:
        client.sendall("\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode())
        assert client.recv(100).startswith(b"HTTP/1.1 401 ")


def test_a_config_does_not_show_the_key() -> None:
    assert KEY not in repr(bridge.Config(api_key=KEY))


def test_health_is_open_to_all(locked: Server) -> None:
    for lines in (
        ["Host: evil.example"],
        ["Host: localhost", "Origin: null"],
        ["Host: ["],
        ["Host: localhost", "x-api-key: no"],
    ):
        assert ask(locked, *lines, request="GET /healthz HTTP/1.1").body == b"ok"


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0:1",
        "[::]:1",
        "192.0.2.1:1",
        "example.com:1",
        "localhost.example.com:1",
        "[2001:db8::1]:1",
        "*:1",
        "0:1",
    ],
)
def test_to_listen_beyond_loopback_takes_a_key(address: str) -> None:
    with pytest.raises(bridge.ConfigError, match="CLAUDE_CLI_API_KEY"):
        bridge.Config(listen_addr=address, bin=str(STANDIN)).checked()
    bridge.Config(listen_addr=address, bin=str(STANDIN), api_key=KEY).checked()


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1:0", "127.0.0.9:1", "localhost:1", "LocalHost:1", "[::1]:65535"),
        *("unix:/tmp/x", "unix:x"),
    ],
)
def test_loopback_and_unix_sockets_take_no_key(address: str) -> None:
    bridge.Config(listen_addr=address, bin=str(STANDIN)).checked()


@pytest.mark.parametrize(
    "address",
    [
        "",
        "1",
        ":1",
        "127.0.0.1",
        "127.0.0.1:",
        "127.0.0.1:x",
        "127.0.0.1:-1",
        "127.0.0.1:65536",
        "a..localhost:1",
        "unix:",
    ],
)
@pytest.mark.parametrize("key", ["", KEY])
def test_what_is_no_address_is_refused_by_name(
    serve: Callable[..., Server], address: str, key: str
) -> None:
    with pytest.raises(bridge.ConfigError, match="CLAUDE_CLI_LISTEN_ADDR"):
        serve(listen_addr=address, api_key=key)


def test_the_bridge_does_not_start_beyond_loopback_without_a_key(
    serve: Callable[..., Server],
) -> None:
    with pytest.raises(bridge.ConfigError, match="CLAUDE_CLI_API_KEY"):
        serve(listen_addr="0.0.0.0:0")


def test_an_ipv6_address_can_be_listened_on(serve: Callable[..., Server]) -> None:
    server = serve(listen_addr="[::1]:0")
    assert server.bridge
    assert server.bridge.addresses == [f"[::1]:{server.port}"]
    with closing(socket.create_connection(("::1", server.port), timeout=10)) as client:
        assert let_in(ask(server, f"Host: [::1]:{server.port}", connection=client))


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    return tmp_path / "bridge.sock"


def dial(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(10)
    client.connect(str(path))
    return client


def test_a_unix_socket_can_be_listened_on(serve: Callable[..., Server], socket_path: Path) -> None:
    server = serve(listen_addr=f"unix:{socket_path}")
    assert server.bridge
    assert server.bridge.addresses == [f"unix:{socket_path}"]
    assert stat.S_ISSOCK(socket_path.stat().st_mode)
    assert let_in(ask(server, "Host: localhost", connection=dial(socket_path)))
    assert_refused(
        ask(server, "Host: evil.example", connection=dial(socket_path)), 403, "permission_error"
    )
    assert_refused(ask(server, "Host: ", connection=dial(socket_path)), 403, "permission_error")


def test_the_umask_stays_as_it_is_and_a_unix_socket_is_its_owners_alone(
    serve: Callable[..., Server], socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It belongs to the whole program: a file that another thread makes meanwhile would get it."""
    masks: list[int] = []
    before = os.umask(0)
    monkeypatch.setattr(os, "umask", masks.append)
    try:
        serve(listen_addr=f"unix:{socket_path}")
        assert stat.S_IMODE(socket_path.stat().st_mode) == 0o600
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert masks == []


def test_a_bridge_that_ends_leaves_the_socket_of_another_that_took_its_path(
    serve: Callable[..., Server], socket_path: Path
) -> None:
    first = serve(listen_addr=f"unix:{socket_path}")
    socket_path.unlink()
    second = serve(listen_addr=f"unix:{socket_path}")
    first.close()
    assert let_in(ask(second, "Host: localhost", connection=dial(socket_path)))
    second.close()
    assert not socket_path.exists()


def test_a_bridge_that_ends_leaves_a_file_that_took_the_place_of_its_socket(
    serve: Callable[..., Server], socket_path: Path
) -> None:
    server = serve(listen_addr=f"unix:{socket_path}")
    socket_path.unlink()
    socket_path.write_text("mine")
    server.close()
    assert socket_path.read_text() == "mine"
    with pytest.raises(bridge.ConfigError, match="what is there is no socket"):
        serve(listen_addr=f"unix:{socket_path}")
    assert socket_path.read_text() == "mine"


def test_a_unix_socket_asks_for_the_key_if_there_is_one(
    serve: Callable[..., Server], socket_path: Path
) -> None:
    server = serve(listen_addr=f"unix:{socket_path}", api_key=KEY)
    assert_refused(
        ask(server, "Host: localhost", connection=dial(socket_path)), 401, "authentication_error"
    )
    assert let_in(ask(server, "Host: localhost", f"x-api-key: {KEY}", connection=dial(socket_path)))


def test_a_unix_socket_left_by_a_killed_bridge_is_no_obstacle(
    serve: Callable[..., Server], socket_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(socket_path))
    server = serve(listen_addr=f"unix:{socket_path}")
    assert let_in(ask(server, "Host: localhost", connection=dial(socket_path)))


async def ask_through(sock: socket.socket, family: int, host: str) -> tuple[str, bytes]:
    """The bridge's own URL behind a socket that it was given, and how it answers to a Host."""
    config = bridge.Config(bin=str(STANDIN), spares=0, api_key=KEY)
    async with bridge.serve(config, sock) as running:
        with socket.socket(family) as client:
            client.setblocking(False)
            await asyncio.get_running_loop().sock_connect(client, sock.getsockname())
            reader, writer = await asyncio.open_connection(sock=client)
            writer.write(f"GET / HTTP/1.0\r\nHost: {host}\r\nx-api-key: {KEY}\r\n\r\n".encode())
            said = await reader.readline()
            writer.close()
            await writer.wait_closed()
        return running.url, said


def test_the_address_of_a_socket_that_it_was_given_is_a_good_host() -> None:
    with socket.create_server(("0.0.0.0", 0)) as sock:
        port = sock.getsockname()[1]
        url, said = asyncio.run(ask_through(sock, socket.AF_INET, "0.0.0.0"))
    assert url == f"http://127.0.0.1:{port}"
    assert said == b"HTTP/1.1 200 OK\r\n"


@pytest.mark.skipif(sys.platform != "linux", reason="unix(7): abstract names are Linux's")
def test_a_socket_of_an_abstract_name_can_be_listened_on() -> None:
    name = f"claude-cli-bridge-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("\0" + name)
        sock.listen()
        url, said = asyncio.run(ask_through(sock, socket.AF_UNIX, "localhost"))
    assert (url, said) == (f"unix:@{name}", b"HTTP/1.1 200 OK\r\n")


def test_a_socket_of_another_kind_is_not_replaced(
    serve: Callable[..., Server], socket_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(socket_path))
        with pytest.raises(bridge.ConfigError, match="already in use"):
            serve(listen_addr=f"unix:{socket_path}")
        assert socket_path.exists()


def test_a_path_that_is_not_utf_8_can_be_listened_on_and_shown(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.sock"))
    serve(listen_addr=f"unix:{path}")
    for target, status in (("/", 200), ("/nothing", 404)):
        with closing(dial(path)) as client:
            client.sendall(f"GET {target} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
            with client.makefile("rb") as file:
                said = file.read()
        assert said.startswith(b"HTTP/1.1 %d " % status)
        assert "?.sock" in said.decode() or "\ufffd.sock" in said.decode()
        assert status == 404 or b"curl --unix-socket" in said
