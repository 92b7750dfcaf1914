"""Who may talk to the port: the names in Host, the origins of web pages, the API key."""

import re
from contextlib import closing
from pathlib import Path

import pytest
from client import request_body
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import Serve, Server
from wire import GET, Wire, ask, assert_refused, dial, let_in

import bridge

pytestmark = pytest.mark.usefixtures("quiet")

KEY = "sk-bridge-0123456789"


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
def test_loopback_names_and_allowed_hosts_are_served(serve: Serve, host: str) -> None:
    server = serve(allowed_hosts=("bridge.example", "192.0.2.7", "2001:db8::7"))
    assert let_in(ask(server, f"Host: {host}"))


def test_the_refusal_of_an_ipv6_address_names_a_value_that_allows_it(serve: Serve) -> None:
    host = "Host: [fd00::1]:14001"
    refused = ask(serve(), host)
    assert_refused(refused, 403, "permission_error")
    named = re.search("CLAUDE_CLI_ALLOWED_HOSTS=([^ ]+) ", refused.json["error"]["message"])
    assert named
    for value in (named[1], "[fd00::1]"):
        config = bridge.Config.read({"CLAUDE_CLI_ALLOWED_HOSTS": value}, {})
        assert let_in(ask(serve(allowed_hosts=config.allowed_hosts), host))


@pytest.mark.parametrize("name", ["db", "cafe", "a", "d0", "bad.face", "deadbeef"])
def test_a_name_of_hexadecimal_digits_is_no_address(serve: Serve, name: str) -> None:
    server = serve(allowed_hosts=(name,))
    assert let_in(ask(server, f"Host: {name}"))
    assert let_in(ask(server, f"Host: {name}:14001"))


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
def test_an_origin_that_browsers_send_can_be_allowed(serve: Serve, origin: str) -> None:
    assert let_in(ask(serve(allowed_origins=(origin,)), "Host: localhost", f"Origin: {origin}"))


def test_names_are_allowed_in_any_case(serve: Serve) -> None:
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
def test_other_names_get_403(serve: Serve, host: str) -> None:
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
            "localhost:999999",
            "localhost:-1",
        ),
    ],
)
def test_a_host_that_is_no_host_is_refused(serve: Serve, host: str) -> None:
    """RFC 9112, 3.2: a server MUST answer an invalid Host with 400; 403 is as good."""
    assert not let_in(ask(serve(), f"Host: {host}"))


@pytest.mark.parametrize(
    "hosts",
    [("localhost", "localhost"), ("localhost", "evil.example"), ("evil.example", "localhost")],
)
def test_two_hosts_are_refused(serve: Serve, hosts: tuple[str, str]) -> None:
    assert_refused(ask(serve(), *(f"Host: {host}" for host in hosts)), 400, "invalid_request_error")


@pytest.mark.parametrize(
    "target", ["http://evil.example/v1/messages", "//evil.example/v1/messages", "evil.example:80"]
)
def test_a_host_in_the_target_opens_nothing(serve: Serve, target: str) -> None:
    assert not let_in(ask(serve(), "Host: localhost", request=f"POST {target} HTTP/1.1"))


def test_the_address_listened_on_is_a_good_host(serve: Serve) -> None:
    server = serve(listen_addr="0.0.0.0:0", api_key=KEY)
    key = f"x-api-key: {KEY}"
    assert let_in(ask(server, "Host: 0.0.0.0", key))
    assert_refused(ask(server, "Host: evil.example", key), 403, "permission_error")


def test_a_fold_cannot_add_a_name(serve: Serve) -> None:
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


def test_no_host_is_too_strange_for_an_answer(serve: Serve) -> None:
    check_host(serve())


# ---------------------------------------------------------------- Origin


@pytest.mark.parametrize(
    ("site", "status"),
    [("cross-site", 403), ("same-site", 403), ("same-origin", 404), ("none", 404)],
)
def test_what_a_page_embeds_has_no_origin_but_says_where_it_comes_from(
    serve: Serve, site: str, status: int
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
def test_pages_of_other_origins_get_403(serve: Serve, origin: str, path: str) -> None:
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
    serve: Serve,
) -> None:
    """Any page in a sandbox sends `null`."""
    answer = ask(serve(), "Host: localhost", "Origin: null")
    assert_refused(answer, 403, "permission_error")
    assert "CLAUDE_CLI_ALLOWED_ORIGINS" not in answer.json["error"]["message"]
    with pytest.raises(bridge.ConfigError, match="CLAUDE_CLI_ALLOWED_ORIGINS"):
        bridge.Config(allowed_origins=("null",)).checked()


@pytest.mark.parametrize("origins", [(), ("https://other.example",)])
def test_no_page_is_allowed_by_default(serve: Serve, origins: tuple[str, ...]) -> None:
    server = serve(allowed_origins=origins)
    assert_refused(ask(server, "Host: localhost", f"Origin: {PAGE}"), 403, "permission_error")


def test_an_allowed_page_may_read_its_answers(serve: Serve) -> None:
    server = serve(allowed_origins=("https://other.example", PAGE))
    for fields in ({}, {"stream": True}, {"messages": "wrong"}):
        answer = server.call(
            "POST", "/v1/messages", {**request_body("hello"), **fields}, {"Origin": PAGE}
        )
        assert answer.status == (400 if "messages" in fields else 200)
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert answer.headers["vary"].lower() == "origin"


def test_an_allowed_page_still_needs_a_good_host(serve: Serve) -> None:
    answer = ask(serve(allowed_origins=(PAGE,)), "Host: evil.example", f"Origin: {PAGE}")
    assert (answer.status, answer.json["error"]["type"]) == (403, "permission_error")


def test_one_allowed_origin_of_two_is_not_enough(serve: Serve) -> None:
    server = serve(allowed_origins=(PAGE,))
    origins = [f"Origin: {PAGE}", "Origin: https://evil.example"]
    for lines in (origins, origins[::-1]):
        assert not let_in(ask(server, "Host: localhost", *lines))


def test_without_an_origin_no_cors_header_is_sent(serve: Serve) -> None:
    answer = ask(serve(allowed_origins=(PAGE,)), "Host: localhost")
    assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("asked", [b"content-type, x-api-key", b"x-\xff\xfe", b"a\tb"])
def test_a_preflight_allows_all_headers(serve: Serve, asked: bytes) -> None:
    answer = ask(
        serve(allowed_origins=(PAGE,), api_key=KEY),
        "Host: localhost",
        f"Origin: {PAGE}",
        b"Access-Control-Request-Headers: " + asked,
        "Access-Control-Request-Method: POST",
        request="OPTIONS /v1/messages HTTP/1.1",
    )
    assert answer.status == 200
    assert answer.headers["access-control-allow-headers"] == "*, authorization"
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
def locked(serve: Serve) -> Server:
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
        ["authorization: word", f"x-api-key: {KEY}"],
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
    assert "does not match" in message
    assert answer.headers["www-authenticate"] == "Bearer"  # RFC 9110, 15.5.2
    assert KEY.encode() not in answer.body


@pytest.mark.parametrize("line", ["x-api-key:", "authorization:", "cookie: x-api-key=" + KEY])
def test_an_empty_key_is_a_missing_key(locked: Server, line: str) -> None:
    answer = ask(locked, "Host: localhost", line)
    assert "requires a key" in answer.json["error"]["message"]


def test_without_a_key_any_key_will_do(serve: Serve) -> None:
    server = serve()
    for line in (
        "x-api-key: any",
        "authorization: Bearer any",
        "authorization: Basic YTpi",
        "x-api-key:",
    ):
        assert let_in(ask(server, "Host: localhost", line))


@pytest.mark.parametrize("key", ["clé", "voilà", "Å"])
def test_a_key_beyond_ascii_works_in_either_header(serve: Serve, key: str) -> None:
    """The last byte of some, in UTF-8, is white space in Latin-1."""
    server = serve(api_key=key)
    for line in (f"x-api-key: {key}", f"Authorization: Bearer {key}"):
        assert let_in(ask(server, "Host: localhost", line))


def test_the_key_does_not_replace_a_good_host_and_origin(locked: Server) -> None:
    key = f"x-api-key: {KEY}"
    assert_refused(ask(locked, "Host: evil.example", key), 403, "permission_error")
    assert_refused(ask(locked, "Host: localhost", "Origin: null", key), 403, "permission_error")


@pytest.mark.parametrize("method", ["POST", "OPTIONS"])
@pytest.mark.parametrize("path", ["/healthz", "/v1/messages"])
def test_no_body_is_read_without_the_key(serve: Serve, method: str, path: str) -> None:
    """Not even that of a preflight, which has none."""
    origin = "http://localhost:3000"
    server = serve(api_key=KEY, allowed_origins=(origin,))
    lines = ["Host: localhost", f"Origin: {origin}", "Content-Length: 30000000"]
    with closing(server.connect()) as client:
        client.sendall("\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode())
        assert client.recv(100).startswith(b"HTTP/1.1 401 ")


def test_health_is_open_to_all(locked: Server) -> None:
    for lines in (
        ["Host: evil.example"],
        ["Host: localhost", "Origin: null"],
        ["Host: ["],
        ["Host: localhost", "x-api-key: no"],
    ):
        assert ask(locked, *lines, request="GET /healthz HTTP/1.1").body == b"ok"


# ---------------------------------------------------------------- addresses


def test_a_unix_socket_asks_for_the_key_if_there_is_one(serve: Serve, socket_path: Path) -> None:
    server = serve(listen_addr=f"unix:{socket_path}", api_key=KEY)
    assert_refused(
        ask(server, "Host: localhost", connection=dial(socket_path)), 401, "authentication_error"
    )
    assert let_in(ask(server, "Host: localhost", f"x-api-key: {KEY}", connection=dial(socket_path)))


# ---------------------------------------------------------------- requests


@pytest.mark.parametrize("line", ["Authorization: sesame", "Authorization: Bearersesame"])
def test_a_key_without_its_scheme_is_told_so(serve: Serve, line: str) -> None:
    answer = ask(serve(api_key="sesame"), "Host: localhost", line)
    assert answer.status == 401
    assert "Authorization takes the word Bearer before it" in answer.json["error"]["message"]


def test_a_wrong_key_beside_a_key_without_its_scheme_is_told_of_the_scheme(locked: Server) -> None:
    answer = ask(locked, "Host: localhost", "Authorization: word", "x-api-key: another")
    assert_refused(answer, 401, "authentication_error")
    assert "Authorization takes the word Bearer before it" in answer.json["error"]["message"]


@pytest.mark.parametrize("count", [2, 1000])
def test_headers_of_one_name_are_joined_and_empty_ones_are_left_out(
    serve: Serve, count: int
) -> None:
    """RFC 9110, 5.3.  The key shows what became of them."""
    server = serve(api_key=", ".join(["a", *["b"] * count]))
    lines = ["x-api-key: a", *["x-api-key:", "x-api-key: b"] * count, "x-api-key:"]
    assert let_in(ask(server, "Host: localhost", *lines))
    assert not let_in(ask(server, "Host: localhost", *lines, "x-api-key: b"))


def test_an_empty_host_is_refused_where_none_is_needed(serve: Serve) -> None:
    """A client of HTTP/1.0 need not send one."""
    server = serve()
    old = "POST /v1/messages HTTP/1.0"
    assert let_in(ask(server, request=old))
    answer = ask(server, "Host:", request=old)
    assert_refused(answer, 403, "permission_error")
    assert "Host '' is not allowed" in answer.json["error"]["message"]


# ---------------------------------------------------------------- routes


def test_a_target_may_be_absolute_and_only_at_its_beginning(wire: Wire) -> None:
    """RFC 9112, 3.2.2; a scheme is the same in any case (RFC 3986, 3.1)."""
    wire.send(GET.replace(b"/healthz", b"HTTP://localhost/healthz"))
    assert wire.answer().body == b"ok"
    wire.send(GET.replace(b"/healthz", b"/healthzhttp://localhost"))
    assert wire.answer().status == 404
