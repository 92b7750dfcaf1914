"""A connection to a bridge, byte by byte."""

import asyncio
import http.client
import json
import re
import socket
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from client import Answer, Json, request_body
from servers import Server

HOST = b"Host: localhost\r\n"
GET = b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n"
# A body that shows by its error whether it arrived whole: cut short, it is not JSON.
PROBE_BODY = b'{"model": "m", "max_tokens": 1, "messages": "not a list"}'


class Wire:
    """One connection, and a strict reader of the answers on it."""

    def __init__(self, server: Server) -> None:
        self.socket = server.connect()
        self.socket.settimeout(10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.socket.makefile("rb")

    def send(self, *segments: bytes) -> None:
        for segment in segments:
            self.socket.sendall(segment)

    def head(self) -> Answer:
        """A status line and headers; nothing after them is read."""
        version, status, _ = self.file.readline().split(b" ", 2)
        assert version == b"HTTP/1.1"
        headers: dict[str, str] = {}
        while (line := self.file.readline()) != b"\r\n":
            name, _, value = line.decode("ascii").removesuffix("\r\n").partition(": ")
            assert name.lower() not in headers
            headers[name.lower()] = value
        return Answer(int(status), headers, b"")

    def chunk(self) -> bytes:
        """The next chunk of a chunked body; empty at its end."""
        size = int(self.file.readline(), 16)
        data = self.file.read(size)
        assert len(data) == size
        assert self.file.readline() == b"\r\n"
        return data

    def answer(self, method: str = "GET") -> Answer:
        answer = self.head()
        assert re.fullmatch(r"req_[0-9a-f]{32}", answer.headers["request-id"])
        chunked, length = (
            answer.headers.get("transfer-encoding"),
            answer.headers.get("content-length"),
        )
        assert not (chunked and length)
        if method == "HEAD":
            pass
        elif chunked:
            answer.body = b"".join(iter(self.chunk, b""))
        elif length:
            answer.body = self.file.read(int(length))
            assert len(answer.body) == int(length)
        else:
            answer.body = self.file.read()
        return answer

    def ended(self) -> bool:
        """Whether the server closed the connection after what was read so far."""
        return self.file.read() == b""

    def finish(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        self.file.close()
        self.socket.close()


def post(
    body: bytes | str = PROBE_BODY, *lines: bytes, path: str = "/v1/messages", stream: bool = False
) -> bytes:
    """A POST with its body; a text is what the user says."""
    if isinstance(body, str):
        body = json.dumps(request_body(body, stream=stream)).encode()
    head = [
        f"POST {path} HTTP/1.1".encode(),
        b"Host: localhost",
        b"Content-Length: %d" % len(body),
        *lines,
    ]
    return b"\r\n".join([*head, b"", body])


def chunked(
    *chunks: bytes, extension: bytes = b"", trailers: bytes = b"", lines: bytes = b""
) -> bytes:
    head = b"POST /v1/messages HTTP/1.1\r\n" + HOST + lines + b"Transfer-Encoding: chunked\r\n\r\n"
    data = b"".join(b"%x%b\r\n%b\r\n" % (len(chunk), extension, chunk) for chunk in chunks)
    return head + data + b"0" + extension + b"\r\n" + trailers + b"\r\n"


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


def said(answer: Answer) -> str:
    """The error message, after a look at its envelope."""
    error: Json = answer.json
    message = error["error"]["message"]
    assert error == {
        "type": "error",
        "error": {"type": error["error"]["type"], "message": message},
        "request_id": answer.headers["request-id"],
    }
    assert isinstance(message, str)
    assert message
    assert answer.headers["content-type"] == "application/json"
    return message


def assert_error(answer: Answer, status: int, kind: str) -> None:
    assert said(answer)
    assert (answer.status, answer.json["error"]["type"]) == (status, kind)
    assert answer.headers.get("x-should-retry") == (
        "false" if status < 500 and status != 429 else None
    )


def assert_whole(answer: Answer) -> None:
    """PROBE arrived as it was sent."""
    assert_error(answer, 400, "invalid_request_error")
    assert said(answer).startswith("messages: ")


def stuck(server: Server) -> bool:
    """Whether an answer of this server waits in StreamWriter.drain."""
    assert server.loop
    frames = [
        frame
        for task in asyncio.all_tasks(server.loop)
        for frame in coroutine_names(task.get_coro())
    ]
    return "_drain_helper" in frames


def coroutine_names(coroutine: object) -> Iterator[str]:
    """The names of a coroutine and of those it waits for."""
    while coroutine is not None:
        yield getattr(coroutine, "__name__", "")
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "ag_await", None)


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


def dial(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(10)
    client.connect(str(path))
    return client
