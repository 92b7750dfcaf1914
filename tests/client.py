"""A plain HTTP client of a bridge, and requests and answers as the tests write them."""

import base64
import contextlib
import http.client
import json
import socket
import struct
import uuid
import zlib
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Json:
        value: Json = json.loads(self.body)
        return value

    @property
    def events(self) -> list[Json]:
        """The events of a stream; asserts that each event's name is its type."""
        events = []
        for block in self.body.decode().split("\n\n")[:-1]:
            name, data = block.split("\n")
            event = json.loads(data.removeprefix("data: "))
            assert name == "event: " + event["type"]
            events.append(event)
        return events

    @property
    def message(self) -> Json:
        """The message, assembled by the SDK's own accumulator if it was streamed."""
        if self.headers["content-type"] == "application/json":
            return self.json
        return assemble(self.events)

    @property
    def text(self) -> str:
        return "".join(block.get("text", "") for block in self.message["content"])

    @property
    def session(self) -> str:
        return self.headers["x-bridge-session"]


def assemble(events: list[Json]) -> Json:
    """What a client makes of a stream, by the accumulator of the `anthropic` SDK."""
    from anthropic.lib.streaming._messages import accumulate_event

    snapshot: Any = None
    buffers: dict[int, bytes] = {}
    for event in events:
        if event["type"] not in ("ping", "error"):
            raw: Any = event
            snapshot = accumulate_event(event=raw, current_snapshot=snapshot, json_bufs=buffers)
    value: Json = snapshot.model_dump(mode="json", exclude_none=True)
    return {"stop_reason": None, "stop_sequence": None, **value}


@dataclass
class Client:
    """A plain HTTP client of one bridge."""

    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Answer:
        with contextlib.closing(
            http.client.HTTPConnection(self.host, self.port, timeout=60)
        ) as connection:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(
                method, path, data, {"content-type": "application/json", **(headers or {})}
            )
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, found, response.read())

    def post(self, messages: Any = "hello", *, session: str | None = None, **fields: Any) -> Answer:
        """POST /v1/messages; a string is one user message, a list of strings is user and assistant
        in turn."""
        headers = {"x-arch-claude-cli-session": session} if session else {}
        return self.call("POST", "/v1/messages", request_body(messages, **fields), headers)

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=30)


def request_body(messages: Any = "hello", **fields: Any) -> Json:
    if isinstance(messages, str):
        messages = [messages]
    messages = [
        {"role": ("user", "assistant")[number % 2], "content": message}
        if isinstance(message, str)
        else message
        for number, message in enumerate(messages)
    ]
    body = {"model": "sonnet", "max_tokens": 1024, "messages": messages, **fields}
    return {name: value for name, value in body.items() if value is not ...}


def text(value: str) -> Json:
    return {"type": "text", "text": value}


def sent(messages: list[Any]) -> list[Json]:
    """A client's messages in the form that `arrived` gives."""
    plain = request_body(messages)["messages"]
    return [
        {**m, "content": [text(m["content"])] if isinstance(m["content"], str) else m["content"]}
        for m in plain
    ]


def arrived(body: Json) -> list[Json]:
    """The conversation of an API request without what the CLI adds: its date and environment lines
    (a system-reminder of 2.1.197, system messages of 2.1.330) and its cache breakpoints."""
    messages = []
    for message in body["messages"]:
        blocks = (
            [text(message["content"])]
            if isinstance(message["content"], str)
            else message["content"]
        )
        blocks = [
            {key: value for key, value in block.items() if key != "cache_control"}
            for block in blocks
        ]
        blocks = [
            b
            for b in blocks
            if not b.get("text", "").startswith("<system-reminder>\nAs you answer the user's")
        ]
        if blocks and message["role"] != "system":
            messages.append({"role": message["role"], "content": blocks})
    return messages


def png() -> str:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + b"\xff\0\0" * 8) * 8))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")).decode()


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": png()}}


def count(server: Client, messages: Any = "hello", **fields: Any) -> Answer:
    body = request_body(messages, **{"max_tokens": ..., **fields})
    return server.call("POST", "/v1/messages/count_tokens?beta=true", body)


def prime(server: Client, model: str = "sonnet", **fields: Any) -> None:
    """Ask for a model, so that a spare is started for it; no conversation stays behind."""
    words = uuid.uuid4().hex  # what was counted once is not counted again
    assert count(server, words, model=model, **fields).status == 200


def error_of(answer: Answer) -> tuple[int, str]:
    return answer.status, answer.json["error"]["type"]
