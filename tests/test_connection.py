"""A connection, byte by byte: connect, send bytes, look at the bytes that come back."""

import asyncio
import contextlib
import gc
import itertools
import json
import logging
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import h11
import pytest
from client import error_of, request_body
from host import open_files, wait_until
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from messages import DONE
from processes import FLOOD, is_held_up, read_all, reaped, send
from servers import Launch, Serve, Server, printed
from stand_in import Log
from test_metrics import measure
from wire import (
    GET,
    HOST,
    PROBE_BODY,
    Wire,
    assert_error,
    assert_whole,
    chunked,
    dial,
    pieces,
    post,
    said,
    stuck,
)

import bridge
from sessions import Turn

pytestmark = pytest.mark.usefixtures("quiet")


# ---------------------------------------------------------------- answers


def test_every_answer_has_a_date(wire: Wire) -> None:
    """RFC 9110, 6.6.1: an origin server with a clock MUST generate a Date header."""
    wire.send(GET, post("one"), post("two", stream=True), post(path="/nope"), b"bad\r\n\r\n")
    for _ in range(5):
        sent_at = parsedate_to_datetime(wire.answer().headers["date"])
        assert abs((datetime.now(UTC) - sent_at).total_seconds()) < 3600


@pytest.mark.parametrize(
    ("request_", "line"),
    [
        (GET, b"HTTP/1.1 200 OK"),
        (post("hello", stream=True), b"HTTP/1.1 200 OK"),
        (post(), b"HTTP/1.1 400 Bad Request"),
        (post(path="/nope"), b"HTTP/1.1 404 Not Found"),
        (b"X" * (1 << 20), b"HTTP/1.1 431 Request Header Fields Too Large"),
        (post("DIE-START"), b"HTTP/1.1 502 Bad Gateway"),
        (post("REPLAY 2.1.330/error_529"), b"HTTP/1.1 529 Overloaded"),
    ],
    ids=lambda value: value[:25].decode(),
)
def test_every_status_line_has_a_reason_phrase(wire: Wire, request_: bytes, line: bytes) -> None:
    wire.send(request_)
    assert wire.file.readline() == line + b"\r\n"


# ---------------------------------------------------------------- connections


def test_a_connection_serves_one_request_after_another(wire: Wire) -> None:
    for text in ("one", "two"):
        wire.send(GET)
        assert wire.answer().body == b"ok"
        wire.send(post())
        assert_whole(wire.answer())
        wire.send(post(text))
        assert f"echo: {text};" in wire.answer().text
        wire.send(post(text, stream=True))
        assert f"echo: {text};" in wire.answer().text


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_pipelined_requests_are_answered_in_order_however_they_are_cut(
    wire: Wire, size: int
) -> None:
    requests = [
        GET,
        post("first"),
        post(b"{", path="/nope"),
        post("second", stream=True),
        post(b"no JSON"),
        GET,
    ]
    wire.send(*pieces(b"".join(requests), size))
    assert wire.answer().body == b"ok"
    assert "echo: first;" in wire.answer().text
    assert_error(wire.answer(), 404, "not_found_error")
    assert "echo: second;" in wire.answer().text
    assert_error(wire.answer(), 400, "invalid_request_error")
    assert wire.answer().body == b"ok"


def test_many_pipelined_requests_in_one_segment_are_all_answered(wire: Wire) -> None:
    sender = threading.Thread(target=wire.send, args=(GET * 1000,))
    sender.start()
    assert len({wire.answer().headers["request-id"] for _ in range(1000)}) == 1000
    sender.join()


def test_requests_sent_while_a_stream_runs_are_answered_after_it(wire: Wire, gate: Path) -> None:
    wire.send(post("PAUSE", stream=True))
    stream = wire.head()
    stream.body = wire.chunk()
    wire.send(GET, post("next")[:-5])
    gate.touch()
    stream.body += b"".join(iter(wire.chunk, b""))
    assert stream.text.startswith("echo: PAUSE;")
    assert wire.answer().body == b"ok"
    wire.send(post("next")[-5:])
    assert "echo: next;" in wire.answer().text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_the_connection_ends_after_an_answer_when_the_client_asks_for_it(
    wire: Wire, version: bytes, stream: bool
) -> None:
    request = post("hello", b"Connection: close", stream=stream)
    wire.send(request.replace(b"HTTP/1.1", b"HTTP/" + version))
    answer = wire.answer()
    assert answer.text.startswith("echo: hello;")
    assert answer.headers["connection"] == "close"
    assert ("transfer-encoding" in answer.headers) == (stream and version == b"1.1")
    assert wire.ended()


@pytest.mark.parametrize("lines", [b"", HOST, b"Connection: keep-alive\r\n"])
def test_http_1_0_gets_one_answer(wire: Wire, lines: bytes) -> None:
    wire.send(b"GET /healthz HTTP/1.0\r\n" + lines + b"\r\n")
    assert wire.answer().body == b"ok"
    assert wire.ended()


def test_a_request_may_come_byte_by_byte(wire: Wire) -> None:
    wire.send(*pieces(post() + chunked(PROBE_BODY) + GET, 1))
    assert_whole(wire.answer())
    assert_whole(wire.answer())
    assert wire.answer().body == b"ok"


def test_a_client_that_ends_its_side_after_a_request_still_gets_the_answer(wire: Wire) -> None:
    wire.send(GET)
    wire.finish()
    assert wire.answer().body == b"ok"
    assert wire.ended()


def test_an_unused_connection_is_closed(server: Server, wire: Wire) -> None:
    wire.send(GET[:9])
    assert server.bridge
    connections = server.bridge.connections
    wait_until(lambda: connections, "the connection")
    (connection,) = connections.values()
    wait_until(lambda: connection.http.trailing_data[0], "the beginning of the request")
    # From its answer on: the test cannot be too late with the request itself.
    connection.config = replace(connection.config, idle_secs=0.05)
    wire.send(GET[9:])
    assert wire.answer().status == 200
    assert wire.ended()


@pytest.mark.parametrize("half", [b"GET /hea", GET[:-2], post()[:-5], chunked(PROBE_BODY)[:-9]])
def test_a_request_that_is_not_sent_in_time_gets_408(
    serve: Serve, connect: Callable[[Server], Wire], half: bytes
) -> None:
    wire = connect(serve(send_secs=0.05))
    wire.send(half)
    answer = wire.answer()
    assert (answer.status, answer.json["error"]["type"]) == (408, "timeout_error")
    assert wire.ended()


# ---------------------------------------------------------------- bodies


def test_a_chunked_body_may_be_cut_anywhere(wire: Wire) -> None:
    request = chunked(PROBE_BODY[:9], PROBE_BODY[9:], extension=b";a=1", trailers=b"X-Sum: 1\r\n")
    for at in range(1, len(request)):
        wire.send(request[:at], request[at:])
        assert_whole(wire.answer())


@pytest.mark.parametrize(
    "request_",
    [
        chunked(*pieces(PROBE_BODY, 1)),
        chunked(PROBE_BODY, extension=b';name="value;\\"x";flag'),
        chunked(PROBE_BODY, trailers=b"X-One: 1\r\nX-Two: 2\r\n"),
        chunked(PROBE_BODY).replace(b"\r\n39\r\n", b"\r\n00039\r\n"),
        chunked(PROBE_BODY).replace(b"chunked", b"CHUNKED"),
    ],
    ids=["one byte each", "extensions", "trailers", "leading zeros", "upper case"],
)
def test_every_form_of_chunked_bodies_is_read(wire: Wire, request_: bytes) -> None:
    wire.send(request_ + GET)
    assert_whole(wire.answer())
    assert wire.answer().body == b"ok"


def test_a_message_may_come_in_a_chunked_body(wire: Wire) -> None:
    wire.send(chunked(*pieces(json.dumps(request_body("in chunks")).encode(), 10)))
    assert wire.answer().text.startswith("echo: in chunks;")


@pytest.mark.parametrize(
    "request_",
    [
        post(PROBE_BODY, b"Expect: 100-continue"),
        chunked(PROBE_BODY, lines=b"Expect: 100-continue\r\n"),
    ],
)
def test_a_client_that_expects_100_gets_it_before_its_body_is_sent(
    wire: Wire, request_: bytes
) -> None:
    head, _, body = request_.partition(b"\r\n\r\n")
    for _ in range(2):
        wire.send(head + b"\r\n\r\n")
        interim = wire.head()
        assert (interim.status, interim.headers) == (100, {})
        wire.send(body)
        assert_whole(wire.answer())


@pytest.mark.parametrize(
    "request_",
    [
        post(b"", b"Expect: 100-continue").replace(
            b"Length: 0", b"Length: %d" % (bridge.Config.max_body_bytes + 1)
        ),
        post(b"", b"Expect: 100-continue").replace(b"Length: 0", b"Length: -1"),
    ],
)
def test_no_100_is_sent_for_a_body_that_is_refused(wire: Wire, request_: bytes) -> None:
    wire.send(request_)
    assert wire.answer().status in (400, 413)
    wire.finish()
    assert wire.ended()


def test_http_1_0_gets_no_100(wire: Wire) -> None:
    head, _, body = (
        post(PROBE_BODY, b"Expect: 100-continue")
        .replace(b"HTTP/1.1", b"HTTP/1.0")
        .partition(b"\r\n\r\n")
    )
    wire.send(head + b"\r\n\r\n", body)
    assert_whole(wire.answer())


@pytest.mark.parametrize("coding", [b"gzip", b"deflate", b"br", b"zstd", b"gzip, identity"])
def test_a_compressed_body_is_refused(wire: Wire, coding: bytes) -> None:
    wire.send(post(PROBE_BODY, b"Content-Encoding: " + coding) + GET)
    answer = wire.answer()
    assert answer.status in (400, 415)
    assert_error(answer, answer.status, "invalid_request_error")
    assert "compressed request bodies are not supported" in said(answer)
    assert wire.answer().body == b"ok"


def test_a_body_in_identity_coding_is_taken(wire: Wire) -> None:
    for coding in (b"identity", b"Identity"):
        wire.send(post(PROBE_BODY, b"Content-Encoding: " + coding))
        assert_whole(wire.answer())


@pytest.mark.parametrize(
    "value", ["", "application/x-www-form-urlencoded", "text/plain; charset=utf-8"]
)
def test_any_content_type_is_taken(wire: Wire, value: str) -> None:
    wire.send(post(PROBE_BODY, f"Content-Type: {value}".encode()))
    assert_whole(wire.answer())


# ---------------------------------------------------------------- not HTTP


def lines(*given: bytes) -> bytes:
    return b"\r\n".join([b"POST /v1/messages HTTP/1.1", b"Host: localhost", *given, b"", b""])


NOT_HTTP = {
    "no request line": b"hello\r\n\r\n",
    "HTTP/0.9": b"GET /healthz\r\n\r\n",
    "a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32),
    "two spaces": GET.replace(b" /", b"  /"),
    "a tab for a space": GET.replace(b" /", b"\t/"),
    "a space in the target": GET.replace(b"/healthz", b"/health z"),
    "a control character in the target": GET.replace(b"/healthz", b"/\x01"),
    "bytes beyond ASCII in the target": GET.replace(b"/healthz", b"/\xc3\xa4"),
    "no method": GET.removeprefix(b"GET"),
    "a bad method": b"G{T" + GET[3:],
    "a bad version": GET.replace(b"HTTP/1.1", b"HTTP/1.x"),
    "a version in lower case": GET.replace(b"HTTP/1.1", b"http/1.1"),
    "no Host": b"GET /healthz HTTP/1.1\r\n\r\n",
    "two Hosts": b"GET /healthz HTTP/1.1\r\n" + HOST * 2 + b"\r\n",
    "no colon": lines(b"X-Header"),
    "a space before the colon": lines(b"Content-Length : 0"),
    "no name": lines(b": value"),
    "a bad name": lines(b"X(: value"),
    "a zero byte": lines(b"X: a\0b"),
    "a bare CR": lines(b"X: a\rY: b"),
    "a fold of no header": GET.replace(HOST, b" folded: 1\r\n" + HOST),
    "a negative length": lines(b"Content-Length: -1"),
    "a length with a sign": lines(b"Content-Length: +1"),
    "a hexadecimal length": lines(b"Content-Length: 0x1"),
    "a length with an underscore": lines(b"Content-Length: 1_0"),
    "an empty length": lines(b"Content-Length:"),
    "a length of 100 digits": lines(b"Content-Length: " + b"9" * 100),
    "two lengths": lines(b"Content-Length: 1", b"Content-Length: 2"),
    "a list of lengths": lines(b"Content-Length: 1, 2"),
    "another coding": lines(b"Transfer-Encoding: gzip"),
    "a coding after chunked": lines(b"Transfer-Encoding: chunked, gzip"),
    "a coding before chunked": lines(b"Transfer-Encoding: gzip, chunked"),
    "chunked twice": lines(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"),
    "almost chunked": lines(b"Transfer-Encoding: xchunked"),
    "identity": lines(b"Transfer-Encoding: identity"),
    "a size that is no number": lines(b"Transfer-Encoding: chunked") + b"zz\r\n",
    "a negative size": lines(b"Transfer-Encoding: chunked") + b"-1\r\n",
    "a size with a prefix": lines(b"Transfer-Encoding: chunked") + b"0x1\r\nx\r\n",
    "a size of 100 digits": lines(b"Transfer-Encoding: chunked") + b"f" * 100 + b"\r\n",
    "a chunk longer than its size": lines(b"Transfer-Encoding: chunked") + b"1\r\nxyz\r\n",
    "a bad trailer": lines(b"Transfer-Encoding: chunked") + b"0\r\nno colon\r\n\r\n",
}


@pytest.mark.parametrize("data", NOT_HTTP.values(), ids=NOT_HTTP)
def test_what_is_not_http_gets_400_and_nothing_after_it_is_served(wire: Wire, data: bytes) -> None:
    wire.send(GET + data + GET)
    assert wire.answer().body == b"ok"
    answer = wire.answer()
    assert_error(answer, 400, "invalid_request_error")
    assert answer.headers["connection"] == "close"
    assert wire.ended()


@pytest.mark.parametrize(
    "request_",
    [
        chunked(PROBE_BODY, lines=b"Content-Length: 5\r\n"),
        chunked(PROBE_BODY, lines=b"Content-Length: 5\r\n").replace(b"HTTP/1.1", b"HTTP/1.0"),
        chunked(PROBE_BODY).replace(b"HTTP/1.1", b"HTTP/1.0"),
    ],
    ids=["beside a length", "beside a length, 1.0", "1.0"],
)
def test_doubtful_framing_ends_the_connection(wire: Wire, request_: bytes) -> None:
    """RFC 9112, 6.1: such a request may be smuggled; the server MUST close the connection after its
    answer."""
    wire.send(request_)
    assert_error(wire.answer(), 400, "invalid_request_error")
    # The system resets the connection if it is closed before this comes.
    with contextlib.suppress(ConnectionError):
        wire.send(GET)
        assert wire.ended()


def test_equal_lengths_are_one_length(wire: Wire) -> None:
    wire.send(post(PROBE_BODY, b"Content-Length: %d" % len(PROBE_BODY)))
    assert_whole(wire.answer())


def test_a_folded_header_is_one_header(wire: Wire) -> None:
    """RFC 9112, 5.2: each fold is a space, so nothing after it can pass for a header."""
    wire.send(
        GET.replace(HOST, HOST + b"X: a\r\n Content-Length: 9\r\n\tTransfer-Encoding: chunked\r\n")
        + GET
    )
    assert [wire.answer().body, wire.answer().body] == [b"ok", b"ok"]


@pytest.mark.parametrize("data", [b"GET /healthz HT", GET[:-2], b"POST / HTTP/1.1\r\nHost"])
def test_a_client_that_ends_its_side_inside_the_headers_gets_400(wire: Wire, data: bytes) -> None:
    wire.send(data)
    wire.finish()
    assert_error(wire.answer(), 400, "invalid_request_error")
    assert wire.ended()


def test_another_version_of_http_is_505(serve: Serve) -> None:
    with serve().connect() as client:
        client.sendall(b"GET / HTTP/9.9\r\nhost: localhost\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 505 ")


def test_a_client_of_tls_is_called_so_in_the_log(launch: Launch) -> None:
    program = launch()
    with program.connect() as client:
        client.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
        assert client.recv(100).startswith(b"HTTP/1.1 400 ")
    printed(program, 'status=400 error=invalid_request_error reason="TLS: this port speaks plain')


# ---------------------------------------------------------------- limits


MIB = 1 << 20


@pytest.mark.parametrize(
    "data",
    [
        b"GET /healthz HTTP/1.1\r\n" + HOST + b"X: " + b"x" * MIB + b"\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n" + HOST + b"X: 1\r\n" * (MIB // 6) + b"\r\n",
        b"GET /" + b"x" * MIB + b" HTTP/1.1\r\n" + HOST + b"\r\n",
        b"X" * MIB,
        chunked(PROBE_BODY, trailers=b"X: " + b"x" * MIB + b"\r\n"),
        chunked(PROBE_BODY, extension=b";" + b"x" * MIB),
    ],
    ids=["a header", "many headers", "a target", "no line end", "a trailer", "a chunk extension"],
)
def test_headers_beyond_the_limit_get_431_and_no_reset(wire: Wire, data: bytes) -> None:
    wire.send(data)
    answer = wire.answer()
    assert_error(answer, 431, "invalid_request_error")
    assert answer.headers["connection"] == "close"
    assert wire.ended()


def test_headers_up_to_the_limit_are_taken(wire: Wire) -> None:
    size = bridge.READ_SIZE - 200
    wire.send(GET.replace(HOST, HOST + b"X: " + b"x" * size + b"\r\n") + GET)
    assert [wire.answer().body, wire.answer().body] == [b"ok", b"ok"]


def test_a_length_beyond_the_limit_gets_413_before_the_body_is_read(wire: Wire) -> None:
    wire.send(lines(b"Content-Length: %d" % (bridge.Config.max_body_bytes + 1)))
    answer = wire.answer()
    assert_error(answer, 413, "request_too_large")
    assert answer.headers["connection"] == "close"
    wire.send(b"x" * MIB + GET)
    assert wire.ended()


@pytest.mark.parametrize(
    "request_",
    [
        post(b" " * (bridge.Config.max_body_bytes + 1)),
        chunked(*pieces(b" " * (bridge.Config.max_body_bytes + 1), 1 << 18)),
    ],
    ids=["by length", "by counting"],
)
def test_a_body_beyond_the_limit_gets_413_and_no_reset(wire: Wire, request_: bytes) -> None:
    wire.send(request_)
    assert_error(wire.answer(), 413, "request_too_large")
    assert wire.ended()


def test_a_body_up_to_the_limit_is_read(wire: Wire) -> None:
    wire.send(post(PROBE_BODY + b" " * (bridge.Config.max_body_bytes - len(PROBE_BODY))))
    assert_whole(wire.answer())


def test_a_body_in_tiny_chunks_gets_400_before_its_end(wire: Wire) -> None:
    request = chunked(*pieces(b" " * (bridge.MAX_CHUNKS + 1), 1))
    wire.send(request.removesuffix(b"0\r\n\r\n"))
    answer = wire.answer()
    assert_error(answer, 400, "invalid_request_error")
    assert "pieces that are too small" in said(answer)
    wire.finish()
    assert wire.ended()


def test_a_body_in_many_chunks_that_are_large_enough_is_taken(wire: Wire) -> None:
    count = bridge.MAX_CHUNKS + 50
    size = 2 * bridge.MIN_CHUNK
    wire.send(chunked(PROBE_BODY, *pieces(b" " * count * size, size)))
    assert_whole(wire.answer())


def test_others_are_answered_while_a_body_comes_in_tiny_chunks(
    server: Server, connect: Callable[[Server], Wire]
) -> None:
    tiny, other = connect(server), connect(server)
    request = chunked(*pieces(PROBE_BODY + b" " * 9000, 1))
    for piece in pieces(request[:-5], 1000):
        tiny.send(piece)
        other.send(GET)
        assert other.answer().body == b"ok"
    tiny.send(request[-5:])
    assert_whole(tiny.answer())


def test_what_is_beyond_a_limit_is_refused(serve: Serve) -> None:
    server = serve(max_body_bytes=1000)
    assert error_of(server.post("x" * 1000)) == (413, "request_too_large")
    large = "y" * 3 * bridge.READ_SIZE
    for path, headers in (("/healthz", {"x": large}), ("/healthz?" + large, {})):
        answer = server.call("GET", path, headers=headers)
        assert error_of(answer) == (431, "invalid_request_error")
    deep = json.loads("[" * 202 + "]" * 202)
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        answer = server.call("POST", path, request_body("x", metadata=deep))
        assert "200 levels" in answer.json["error"]["message"]
    assert server.post().status == 200


# ---------------------------------------------------------------- streams


def test_a_stream_is_chunked_server_sent_events(wire: Wire) -> None:
    wire.send(post("hello", stream=True))
    answer = wire.answer()
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["transfer-encoding"] == "chunked"
    assert "content-length" not in answer.headers
    assert "content-encoding" not in answer.headers
    assert re.fullmatch(rb"(event: [a-z_]+\ndata: \{[^\n\r]*\}\n\n)+", answer.body)
    assert [answer.events[0]["type"], answer.events[-1]["type"]] == [
        "message_start",
        "message_stop",
    ]


def test_line_ends_of_unicode_are_escaped_in_a_stream(wire: Wire) -> None:
    strange = "a\u2028b\u2029c\u0085d\U0001f600\x7f\v\f\x1ce"
    wire.send(post(strange, stream=True))
    answer = wire.answer()
    assert not set(answer.body.decode()) & set("\u2028\u2029\u0085\v\f\x1c")
    assert "\\u2028" in answer.body.decode()
    assert answer.text.startswith(f"echo: {strange};")


def test_a_failure_before_the_first_event_is_a_status(wire: Wire) -> None:
    wire.send(post("DIE-START", stream=True) + GET)
    assert_error(wire.answer(), 502, "claude_cli_error")
    assert wire.answer().body == b"ok"


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_an_error_event_before_the_first_byte_is_a_status(
    wire: Wire, tmp_path: Path, stream: bool
) -> None:
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    lines = [{"type": "stream_event", "event": error, "parent_tool_use_id": None}, DONE]
    rows = [json.dumps({"t": 0, "dir": "out", "line": line}) for line in lines]
    (tmp_path / "error.ndjson").write_text("\n".join(rows))
    wire.send(post(f"REPLAY {tmp_path}/error", stream=stream))
    answer = wire.answer()
    assert_error(answer, 529, "overloaded_error")
    assert said(answer) == "Overloaded"


def test_a_failure_in_mid_stream_is_an_error_event_and_the_connection_stays(wire: Wire) -> None:
    wire.send(post("DIE 3", stream=True) + GET)
    answer = wire.answer()
    assert answer.status == 200
    last = answer.events[-1]
    assert (last["type"], last["request_id"]) == ("error", answer.headers["request-id"])
    assert b"message_stop" not in answer.body
    assert wire.answer().body == b"ok"


def test_silence_in_a_stream_is_filled_with_pings(
    wire: Wire, gate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge, "PING_SECS", 0.02)
    wire.send(post("PAUSE-START", stream=True))
    answer = wire.head()
    assert answer.status == 200
    assert [wire.chunk(), wire.chunk()] == [b'event: ping\ndata: {"type":"ping"}\n\n'] * 2
    gate.touch()
    answer.body = b"".join(iter(wire.chunk, b""))
    assert answer.text.startswith("echo: PAUSE-START;")


def test_a_retry_is_not_forbidden_where_it_may_help(
    serve: Serve, connect: Callable[[Server], Wire], gate: Path
) -> None:
    server = serve(max_sessions=1, queue_secs=0)
    busy, other = connect(server), connect(server)
    busy.send(post("PAUSE", stream=True))
    busy.head()
    other.send(post("no room"))
    answer = other.answer()
    assert_error(answer, 529, "overloaded_error")
    assert answer.headers["retry-after"] == "1"
    gate.touch()
    assert b"".join(iter(busy.chunk, b"")).endswith(b'data: {"type":"message_stop"}\n\n')


# ---------------------------------------------------------------- clients that do not read


@pytest.fixture
def narrow(serve: Serve, tmp_path: Path) -> Iterator[tuple[Server, socket.socket]]:
    """A bridge and a connection that hold 200 KB of what was not read."""
    path = tmp_path / "bridge.sock"
    server = serve(listen_addr=f"unix:{path}", drain_secs=0.1)
    with dial(path) as client:
        yield server, client


def test_a_last_answer_that_was_read_late_ends_the_connection_quietly(
    narrow: tuple[Server, socket.socket],
) -> None:
    server, client = narrow
    page = GET.replace(b"/healthz", b"/")
    client.sendall(page * 999 + page.replace(HOST, HOST + b"Connection: close\r\n"))
    wait_until(lambda: stuck(server), "a writer that waits for its client")
    with client.makefile("rb") as file:
        assert file.read().count(b"HTTP/1.1 200 OK\r\n") == 1000


def read_slowly(client: socket.socket) -> tuple[bytes, float]:
    """All that comes, and the longest time in which nothing was read."""
    client.sendall(post("BIGLINE 8000000", b"Connection: close"))
    got = client.recv(1)
    longest, read_at = 0.0, time.monotonic()
    while part := client.recv(64 << 10):
        got += part
        time.sleep(0.01)
        longest, read_at = max(longest, time.monotonic() - read_at), time.monotonic()
    return got, longest


def test_a_client_that_reads_slowly_but_steadily_gets_the_whole_answer(
    serve: Serve, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes several times as long as one may read nothing, and the end is not cut off either."""
    monkeypatch.setattr(bridge, "LINGER_SECS", 0.01)
    serve(listen_addr=f"unix:{socket_path}", idle_secs=0.5)
    longest = 1.0
    while longest > 0.4:  # a busy machine made a pause: that was not steadily
        with dial(socket_path) as client:
            got, longest = read_slowly(client)
    assert got.count(b"x") > 8_000_000
    assert got.endswith(b"}")


def test_a_shutdown_while_the_last_of_an_answer_is_not_read_is_no_bug(
    narrow: tuple[Server, socket.socket],
) -> None:
    server, client = narrow
    client.sendall(GET.replace(b"/healthz", b"/") * 1000)
    wait_until(lambda: stuck(server), "a writer that waits for its client")
    server.close()


def test_the_silence_of_a_slow_client_is_not_the_clis(serve: Serve, log: Log) -> None:
    server = serve(watchdog_secs=3)
    assert server.bridge
    with send(server, FLOOD, stream=True) as slow:
        wait_until(lambda: is_held_up(log, FLOOD), "a process that can write no more")
        (session,) = server.bridge.pool.room.sessions
        wait_until(
            lambda: time.monotonic() > session.process._alive_at + 3.1,
            "more than the watchdog's time",
        )
        answer = read_all(slow)
    assert answer.events[-1] == {"type": "message_stop"}


def test_a_client_that_never_reads_on_loses_its_connection_and_frees_its_process(
    serve: Serve, log: Log
) -> None:
    server = serve(max_sessions=1, idle_secs=1)
    with send(server, FLOOD, stream=True):
        wait_until(lambda: log.got(FLOOD), "the turn that has the room")
        assert server.post("next").text == "echo: next; 1 messages"


# ---------------------------------------------------------------- clients that leave


PHASES = {
    "connected": b"",
    "in the request line": b"GET /hea",
    "in the headers": post()[:40],
    "in the body": post()[:-9],
    "in a chunk": chunked(PROBE_BODY)[:-20],
    "asked to continue": post(PROBE_BODY, b"Expect: 100-continue")[: -len(PROBE_BODY)],
    "after an answer": GET,
    "after a refusal": b"bad\r\n\r\n",
    "in a refused body": lines(b"Content-Length: 99999999") + b"x" * 9999,
    "answer awaited": post("PAUSE"),
    "answer not begun": post("PAUSE-START", stream=True),
    "in a stream": post("PAUSE", stream=True),
    "in a stream, the next request sent": post("PAUSE", stream=True) + post("next"),
    "in a stream nobody reads": post("FLOOD 100000", stream=True),
}


@pytest.mark.parametrize("way", ["close", "reset", "finish"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_client_that_leaves_at_any_point_leaves_nothing_behind(
    server: Server, phase: str, way: str
) -> None:
    assert server.loop
    tasks, files = asyncio.all_tasks(server.loop), open_files()
    wire = Wire(server)
    with contextlib.closing(wire):
        wire.send(PHASES[phase])
        if phase.startswith("ans"):
            wait_until(server.processes, "the start of the answer")
        elif phase == "asked to continue" or phase.startswith(
            ("in a stream", "after", "in a refused")
        ):
            wire.head()
        getattr(wire, way)()
        if way == "finish":
            wire.file.read()  # the server closes as well
    wait_until(lambda: asyncio.all_tasks(server.loop) <= tasks, "the end of all tasks")
    wait_until(lambda: not server.processes(), "the end of all processes")
    wait_until(lambda: open_files() == files, "closed descriptors")
    assert server.call("GET", "/healthz").status == 200


@pytest.mark.parametrize("way", ["close", "reset", "finish"])
@pytest.mark.parametrize("half", [post()[:-9], chunked(PROBE_BODY)[:-20]], ids=["length", "chunks"])
def test_an_upload_that_breaks_off_is_logged_and_counted(
    serve: Serve, caplog: pytest.LogCaptureFixture, half: bytes, way: str
) -> None:
    caplog.set_level(logging.INFO, "claude_cli_bridge")
    server = serve()
    with contextlib.closing(Wire(server)) as wire:
        wire.send(half)
        assert server.bridge
        connections = server.bridge.connections
        is_read = {h11.SEND_BODY}
        wait_until(
            lambda: {item.http.their_state for item in connections.values()} == is_read, "the head"
        )
        getattr(wire, way)()
        wait_until(lambda: not connections, "the end of the connection")
    assert "route=/v1/messages status=499 error=client_left " in caplog.text
    assert measure(server)("errors_total", type="client_left") == 1


@pytest.mark.parametrize(
    "data", [b"bad\r\n\r\n", lines(b"Content-Length: 99999999"), GET], ids=["bad", "large", "good"]
)
def test_a_reset_that_crosses_an_answer_is_no_bug(server: Server, data: bytes) -> None:
    for _ in range(300):
        wire = Wire(server)
        wire.send(data)
        wire.socket.recv(1)
        wire.reset()
    assert server.call("GET", "/healthz").status == 200


@pytest.mark.parametrize(
    ("messages", "stream", "read"),
    [
        ("PAUSE", True, True),
        ("PAUSE-START", True, False),
        ("PAUSE", False, False),
        (["PAUSE-PAST", "yes", "go on"], True, False),
        (["PAUSE-PAST", "yes", "go on"], False, False),
    ],
    ids=[
        "in mid stream",
        "before the first byte",
        "whole answer",
        "rebuilding, stream",
        "rebuilding, whole",
    ],
)
def test_when_the_client_leaves_the_turn_is_interrupted_and_its_process_ends(
    serve: Serve, gate: Path, log: Log, messages: str | list[str], stream: bool, read: bool
) -> None:
    server = serve()
    first = messages if isinstance(messages, str) else messages[0]
    with send(server, messages, stream=stream) as client:
        wait_until(lambda: log.got(first), "the turn")
        pid = log.got(first)
        data = b""
        while read and b"content_block_delta" not in data:
            data += client.recv(65536)
    wait_until(lambda: reaped(pid), "the end of the process")
    assert log.requests(pid)[-1] == "interrupt"
    assert not gate.exists()
    assert server.post("next").text == "echo: next; 1 messages"


def test_a_client_that_leaves_without_reading_frees_its_process(serve: Serve, log: Log) -> None:
    server = serve(max_sessions=1)
    with send(server, FLOOD, stream=True):
        wait_until(lambda: is_held_up(log, FLOOD), "a process that can write no more")
    wait_until(lambda: reaped(log.got(FLOOD)), "the end of the process")
    assert server.post("next").text == "echo: next; 1 messages"


@pytest.mark.parametrize("session", [None, "pinned"])
def test_a_client_that_leaves_while_its_request_waits_takes_no_room(
    serve: Serve,
    gate: Path,
    log: Log,
    background: ThreadPoolExecutor,
    caplog: pytest.LogCaptureFixture,
    session: str | None,
) -> None:
    caplog.set_level(logging.INFO, "claude_cli_bridge")
    server = serve(max_sessions=1)
    first = background.submit(server.post, "PAUSE", session=session)
    wait_until(lambda: log.got("PAUSE"), "the turn that holds the room")
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(server.connect())
        body = json.dumps(request_body("never")).encode()
        header = f"x-arch-claude-cli-session: {session}\r\n" if session else ""
        head = f"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\n{header}content-length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        wait_until(lambda: server.bridge and len(server.bridge.answers) == 2, "a second request")
    wait_until(lambda: "status=499" in caplog.text, "the log line of a client that left")
    gate.touch()
    assert first.result().text == "echo: PAUSE; 1 messages"
    assert server.post("next", session=session).status == 200
    assert not log.got("never")


@pytest.mark.parametrize("ahead", [10, 100_000])
def test_a_client_that_leaves_is_noticed_however_much_it_sent_ahead(
    serve: Serve, gate: Path, log: Log, ahead: int
) -> None:
    server = serve()
    body = json.dumps(request_body("SLOW 1000", stream=True)).encode()
    head = f"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with server.connect() as client:
        client.sendall(head.encode() + body)
        assert client.recv(100)
        client.sendall(b"x" * ahead)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_until(
        lambda: log.got("SLOW 1000") and "interrupt" in log.requests(log.got("SLOW 1000")),
        "the interrupt",
        10,
    )


def test_what_a_turn_held_is_freed_when_its_client_leaves_and_not_by_the_garbage_collector(
    serve: Serve,
) -> None:
    server = serve()
    assert server.bridge
    connections = server.bridge.connections
    body = json.dumps(request_body("SLOW 1000", stream=True)).encode()
    head = f"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    gc.collect()
    gc.disable()
    try:
        with server.connect() as client:
            client.sendall(head.encode() + body)
            assert client.recv(100)
            client.sendall(
                b"x" * 300_000
            )  # so much that it is no longer read: a write finds out that it left
            wait_until(
                lambda: not any(c.writer.transport.is_reading() for c in connections.values()),
                "its end",
            )
        wait_until(
            lambda: not any(isinstance(item, Turn) for item in gc.get_objects()),
            "the end of the turn",
        )
    finally:
        gc.enable()


# ---------------------------------------------------------------- anything


FRAGMENTS = [
    *(
        b"GET ",
        b"POST ",
        b"PUT ",
        b"OPTIONS ",
        b"CONNECT ",
        b"/healthz",
        b"/v1/messages",
        b"/nope",
        b"*",
        b"?a=b",
    ),
    *(
        b" HTTP/1.1\r\n",
        b" HTTP/1.0\r\n",
        b" HTTP/2.0\r\n",
        HOST,
        b"Host: [\r\n",
        b"Host: \r\n",
        b"\r\n",
        b"\n",
        b"\r",
    ),
    *(
        b"Content-Length: ",
        b"0",
        b"5",
        b"\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"0\r\n\r\n",
        b"5\r\nhello\r\n",
    ),
    *(
        b"Expect: 100-continue\r\n",
        b"Connection: close\r\n",
        b"Connection: upgrade\r\nUpgrade: h2c\r\n",
    ),
    *(
        b"x-api-key: \xff\r\n",
        b"Origin: null\r\n",
        b"X-Arch-Claude-Cli-Session: \xe9\r\n",
        b"Content-Encoding: \xa0\r\n",
    ),
    *(
        b"{}",
        b"null",
        b"[[",
        PROBE_BODY,
        b"\0",
        b"\xff",
        b" ",
        b"\t",
        b":",
        GET,
        post(),
        chunked(PROBE_BODY),
        post(b""),
    ),
]


def statuses(data: bytes) -> Iterator[int]:
    """The statuses of answers that follow one another, each of them whole."""
    while data:
        head, end, data = data.partition(b"\r\n\r\n")
        match = re.fullmatch(rb"HTTP/1\.1 (\d{3}) [A-Za-z -]*((?:\r\n[a-z-]+: [^\r\n]+)*)", head)
        assert match, head
        assert end
        length = re.search(rb"content-length: (\d+)", match[2])
        assert length or match[1] == b"100"
        size = int(length[1]) if length else 0
        assert len(data) >= size
        data = data[size:]
        yield int(match[1])


def test_any_bytes_are_answered_in_http_or_the_connection_is_closed(server: Server) -> None:
    assert server.loop
    tasks = asyncio.all_tasks(server.loop)
    strange = st.lists(st.sampled_from(FRAGMENTS) | st.binary(max_size=9), max_size=25).map(
        b"".join
    )

    @settings(
        max_examples=500,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(data=strange | st.binary(max_size=99), at=st.integers(0, 99))
    @example(data=b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", at=9)
    @example(data=b"GET / HTTP/1.1\r\nHost: [\r\n\r\n", at=0)
    @example(data=b"GET http://localhost/ HTTP/1.1\r\nHost: localhost\r\n\r\n", at=0)
    @example(
        data=GET.replace(HOST, HOST + b"Connection: upgrade\r\nUpgrade: websocket\r\n") * 2, at=50
    )
    def check(data: bytes, at: int) -> None:
        got, whole = b"", False
        with server.connect() as client, contextlib.suppress(ConnectionError):
            client.sendall(data[:at])
            client.sendall(data[at:])
            client.shutdown(socket.SHUT_WR)
            while piece := client.recv(1 << 16):
                got += piece
            whole = True
        if whole:
            assert set(statuses(got)) <= {100, 200, 400, 401, 403, 404, 405, 413, 415, 431, 505}
        assert b"HTTP/1.1 500" not in got

    check()
    wait_until(lambda: asyncio.all_tasks(server.loop) <= tasks, "the end of all tasks")
    assert server.call("GET", "/healthz").status == 200


def test_a_request_cut_at_any_two_places_is_the_same_request(server: Server) -> None:
    request = post(PROBE_BODY, b"Expect: 100-continue") + chunked(PROBE_BODY, extension=b";x") + GET
    with contextlib.closing(Wire(server)) as wire:
        for first, second in itertools.combinations(range(0, len(request), 23), 2):
            wire.send(request[:first], request[first:second], request[second:])
            answer = wire.head()
            while answer.status == 100:
                answer = wire.head()
            assert wire.file.read(int(answer.headers["content-length"])).startswith(
                b'{"type":"error"'
            )
            assert_whole(wire.answer())
            assert wire.answer().body == b"ok"
