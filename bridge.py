"""The HTTP face of the bridge: settings, the connection loop, routes, access control, the command line.

Embedding: `async with serve(Config()) as bridge: ...` runs the server inside another asyncio program.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import errno
import hashlib
import hmac
import importlib
import importlib.util
import ipaddress
import itertools
import logging
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import textwrap
import time
import tomllib
import traceback
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote

import h11
import orjson

if TYPE_CHECKING or not __package__:
    import translate
    from sessions import Pool, PoolConfig, Turn, watch_without_threads
    from translate import ApiError, Json
else:  # copied into a package
    from . import translate
    from .sessions import Pool, PoolConfig, Turn, watch_without_threads
    from .translate import ApiError, Json

__version__ = "0.1.0"
log = logging.getLogger("claude_cli_bridge")

MAX_PIPELINED = 64 << 10  # bytes read ahead of the answer that is being given
READ_SIZE = 64 << 10
LINGER_SECS = 5.0  # that a refused body is still read, and a closed connection flushed, so that clients see the answer
REHEARSAL_SECS = 30.0  # for `check`; 2 were measured
GRACE_SECS = 1.0  # for the last words of answers that shutdown cuts short
PING_SECS = 10.0  # of silence before a stream shows that it lives; proxies cut after 30 to 60
SESSION_HEADER = b"x-arch-claude-cli-session"
# Settings that are not just any number from 0 up.
LIMITS = {"max_sessions": (1, float("inf")), "watchdog_secs": (0.1, float("inf")), "max_depth": (10, 240)}
LIMITS |= {
    name: (1, float("inf")) for name in ("max_header_bytes", "max_body_bytes", "max_connections", "max_messages", "max_values", "max_turns")
}
# The keys of a claude-cli entry of a gateway's model_providers, and their types.
PROVIDER: dict[str, type] = {
    "model": str,
    "name": str,
    "provider_interface": str,
    "base_url": str,
    "access_key": str,
    "default": bool,
    "passthrough_auth": bool,
    "headers": dict,
    "routing_preferences": list,
}
PERMISSION_MODES = ("default", "acceptEdits", "auto", "bypassPermissions", "dontAsk", "plan")
MODELS = "/v1/models"
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"  # Prometheus' text-based exposition format
ABSOLUTE = re.compile("https?://([^/?]*)")  # of a target in absolute form (RFC 9112, 3.2.2)
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_-]+(?:\.[a-z0-9_-]+)*)\.?(?::([0-9]{1,5}))?", re.I)  # RFC 9110, 7.2
HINT = "the Messages API is at POST /v1/messages; give SDKs the base URL without /v1"


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it."""


@dataclass(kw_only=True)
class Config(PoolConfig):
    """All settings: the environment variable CLAUDE_CLI_NAME, the flag --name and the field name are the same."""

    listen_addr: str = "127.0.0.1:14001"  # host:port or unix:/path
    drain_secs: float = 10.0  # seconds that running answers get on shutdown
    api_key: str = ""  # demanded from clients; only as environment variable, as others can see flags
    allowed_hosts: tuple[str, ...] = ()  # names besides the loopback ones that Host may have
    allowed_origins: tuple[str, ...] = ()  # origins of web pages that may use the bridge
    log_format: str = "text"  # text, or json: one object a request
    max_header_bytes: int = 64 << 10  # 431 beyond; h11 and Node take 16 KiB, nginx 32
    max_body_bytes: int = 32 << 20  # 413 beyond, before it is read; the API's own limit
    max_connections: int = 1000  # 503 beyond; each can cost a file descriptor and max_body_bytes
    max_depth: int = 200  # levels of JSON, 400 beyond; what is written has a few more, and orjson ends at 254
    max_messages: int = 100_000  # of a request, 400 beyond; the API's own limit
    max_values: int = 300_000  # of JSON in a request, 400 beyond; each can take a hundred times its bytes of memory
    send_secs: float = 60.0  # for a client to send a request, then 408; as nginx's client_body_timeout
    idle_secs: float = 75.0  # of an unused connection; as nginx's keepalive_timeout, SDKs drop theirs after 5

    @classmethod
    def read(cls, environ: Mapping[str, str], flags: Mapping[str, str | None]) -> "Config":
        """Settings from the environment and, before it, from flags.  Raises ConfigError, which names the setting."""
        values: dict[str, Any] = {}
        for item in dataclasses.fields(cls):
            name = "CLAUDE_CLI_" + item.name.upper()
            text = flags.get(item.name)
            text = environ.get(name, "") if text is None else text
            if text == "":
                continue
            kind: Any = type(item.default)
            try:
                values[item.name] = tuple(filter(None, text.replace(",", " ").split())) if kind is tuple else kind(text)
            except ValueError:
                raise ConfigError(f"{name}: {text!r} is not a number") from None
        return cls(**values)

    def check(self) -> None:
        """Raise ConfigError for what cannot work, and find the CLI."""
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            least, most = LIMITS.get(item.name, (0, float("inf")))
            if isinstance(value, int | float) and not (least <= value <= most and value < float("inf")):
                raise ConfigError(f"CLAUDE_CLI_{item.name.upper()}: {value} is not a number from {least} to {most}")
        if not translate.MODEL_NAME.fullmatch(self.model):
            raise ConfigError(f"CLAUDE_CLI_MODEL: {self.model!r} is not a model name")
        if self.log_format not in ("text", "json"):
            raise ConfigError(f"CLAUDE_CLI_LOG_FORMAT: {self.log_format!r} is neither text nor json")
        if self.permission_mode not in PERMISSION_MODES:
            raise ConfigError(f"CLAUDE_CLI_PERMISSION_MODE: {self.permission_mode!r} is none of {PERMISSION_MODES}")
        if self.tools and self.permission_mode == "bypassPermissions" and os.geteuid() == 0:
            raise ConfigError("CLAUDE_CLI_PERMISSION_MODE: the CLI refuses bypassPermissions when it runs as root")
        if self.tools and not os.path.isdir(self.cwd or "."):
            raise ConfigError(f"CLAUDE_CLI_CWD: {self.cwd!r} is not a directory")
        if not self.unix_path and not is_loopback(self.address[0]) and not self.api_key:
            raise ConfigError(
                f"CLAUDE_CLI_LISTEN_ADDR: {self.listen_addr} can be reached from other machines: set CLAUDE_CLI_API_KEY"
            )
        self.bin = find_cli(self.bin)

    @property
    def unix_path(self) -> str:
        return self.listen_addr[5:] if self.listen_addr.startswith("unix:") else ""

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.listen_addr.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise ConfigError(f"CLAUDE_CLI_LISTEN_ADDR: {self.listen_addr!r} is neither host:port nor unix:/path")
        return host.strip("[]"), int(port)

    @property
    def base_url(self) -> str:
        """Where a gateway on this machine reaches the bridge."""
        if self.unix_path:
            return self.listen_addr
        host, port = self.address
        return f"http://{address({'0.0.0.0': '127.0.0.1', '::': '::1'}.get(host, host), port)}"


def address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def find_cli(given: str) -> str:
    """The path of the CLI: `given`, or claude on PATH, or the one in the claude-agent-sdk wheel."""
    if given:
        path = shutil.which(given)
        if not path:
            raise ConfigError(f"CLAUDE_CLI_BIN: {given!r} is not a program")
        return os.path.abspath(path)  # children have another working directory
    wheel = importlib.util.find_spec("claude_agent_sdk")
    bundled = Path(wheel.origin).parent / "_bundled" / "claude" if wheel and wheel.origin else None
    path = shutil.which("claude") or (str(bundled) if bundled and bundled.exists() else None)
    if not path:
        raise ConfigError("CLAUDE_CLI_BIN: no claude on PATH and no claude-agent-sdk installed; name the program here")
    return os.path.abspath(path)


def read_providers(path: str, config: Config) -> list[Json]:
    """The `model_providers` of a gateway's configuration file (TOML, YAML where PyYAML is installed, or else JSON):
    those of claude-cli completed, others as they are.  Raises ConfigError, which names the place."""
    try:
        data, kind = Path(path).read_bytes(), Path(path).suffix.lower()
        if kind == ".toml":
            document: Any = tomllib.loads(data.decode())
        else:
            document = load_yaml(data) if kind in (".yaml", ".yml") else orjson.loads(data)
        document = translate.check_type({} if document is None else document, dict, "file")
        entries = document.get("model_providers")
        entries = [] if entries is None else translate.check_type(entries, list, "model_providers")
        for number, entry in enumerate(entries):
            translate.check_type(entry, dict, f"model_providers.{number}")
        providers = complete_providers(entries, config)
        orjson.dumps(providers)  # TOML and YAML have numbers, keys and depths that JSON has not
        return providers
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"CLAUDE_CLI_CONFIG: {path}: {error.strerror}") from error
    except ApiError as error:
        raise ConfigError(f"CLAUDE_CLI_CONFIG: {path}: {error.message.removeprefix('file.')}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"CLAUDE_CLI_CONFIG: {path} cannot be read: {error}") from None


def load_yaml(data: bytes) -> Any:
    """Raises ValueError, which holds no line of the file: there can be a key in it."""
    try:
        yaml = importlib.import_module("yaml")
    except ModuleNotFoundError:
        raise ValueError("YAML needs the package PyYAML; TOML and JSON need nothing") from None
    try:
        return yaml.safe_load(data)
    except Exception as error:  # noqa: BLE001 - PyYAML raises KeyError and others, with the value in it
        mark = getattr(error, "problem_mark", None)
        raise ValueError(f"not YAML, line {mark.line + 1}" if mark else "not YAML") from None


def is_own(entry: Json) -> bool:
    """Whether a provider is a claude-cli one."""
    named = [entry.get("provider_interface"), entry.get("name"), str(entry.get("model")).partition("/")[0]]
    return "claude-cli" in named


def check_entry(entry: Json, place: str) -> None:
    if entry.get("model") is None:
        raise translate.bad_request(f"{place}.model", "Field required")
    for name, value in entry.items():
        if name not in PROVIDER:
            raise translate.bad_request(f"{place}.{name}", "Extra inputs are not permitted")
        if value is not None:
            translate.check_type(value, PROVIDER[name], f"{place}.{name}")
    if entry.get("provider_interface") not in (None, "claude-cli"):
        raise translate.bad_request(f"{place}.provider_interface", "Input should be 'claude-cli'")


def complete_providers(entries: list[Json], config: Config) -> list[Json]:
    """Fill in what claude-cli entries leave out.  Raises ApiError, which names the place."""
    completed: list[Json] = []
    key = "$CLAUDE_CLI_API_KEY" if config.api_key else "unused"
    for number, entry in enumerate(entries):
        place, model = f"model_providers.{number}", str(entry.get("model"))
        completed.append(entry)
        if not is_own(entry):
            if "*" in model:
                raise translate.bad_request(f"{place}.model", "only claude-cli/* can be a wildcard")
            continue
        check_entry(entry, place)
        name = model.removeprefix(translate.MODEL_PREFIX)
        if name == model or not (name == "*" or translate.MODEL_NAME.fullmatch(name)):
            raise translate.bad_request(f"{place}.model", "Input should be claude-cli/* or claude-cli/ and the name of a model")
        defaults = {"name": "claude-cli", "provider_interface": "claude-cli", "access_key": key}
        entry = {"base_url": config.base_url, **defaults, **translate.without_nulls(entry)}
        completed[number] = entry
        for other, same in itertools.product(filter(is_own, completed[:number]), ("model", "name")):
            keys = entry.keys() | other.keys() if same == "model" else {"base_url", "access_key"}
            wrong = sorted(key for key in keys if entry.get(key) != other.get(key))
            if wrong and entry[same] == other[same]:
                where = f"model_providers.{completed.index(other)}"
                raise translate.bad_request(f"{place}.{wrong[0]}", f"contradicts {where}, of the same {same}")
    return completed


def is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass
class Exchange:
    """One request and what was answered, for routes and for the log."""

    request: h11.Request | None = None  # None: what came was not a request
    body: bytes = b""
    last: bool = False  # the connection ends with this answer
    id: str = field(default_factory=lambda: "req_" + uuid.uuid4().hex)
    began: float = field(default_factory=time.monotonic)
    status: int = 0  # 0: nothing was answered
    first_byte: float | None = None  # monotonic time at which the first event of an answer went out
    streaming: bool = False  # the status line of a stream went out
    allow: str = ""  # the methods of the route, for 405
    turn: Turn | None = None
    failure: str = ""  # error.type of a failure

    @property
    def owner(self) -> str:
        """A digest of the key that the client sent: session names are its own."""
        given = f"{self.header(b'x-api-key')} {self.header(b'authorization')}"
        return hashlib.blake2b(given.encode("latin-1"), digest_size=16).hexdigest()

    @property
    def method(self) -> str:
        return self.request.method.decode() if self.request else ""

    @property
    def target(self) -> str:
        return self.request.target.decode("ascii") if self.request else ""

    @property
    def path(self) -> str:
        """The path without its query (clients add ?beta=true)."""
        return ABSOLUTE.sub("", self.target, 1).partition("?")[0]

    @property
    def route(self) -> str:
        """The known route of the path; empty: there is none."""
        path = MODELS if self.path.startswith(MODELS + "/") else self.path
        return path if path in ROUTES else ""

    def header(self, name: bytes) -> str | None:
        """The value of a header, several joined by commas (RFC 9110, 5.3); `name` in lower case."""
        headers = self.request.headers if self.request else ()
        values = [value.decode("latin-1") for key, value in headers if key == name]
        return ", ".join(values) if values else None


class Disconnected(Exception):
    """The client closed its side of the connection."""


class Connection:
    """One client: socket and h11 state, and the four verbs next_request, send, respond, close."""

    def __init__(self, bridge: "Bridge", reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.bridge = bridge
        self.reader = reader
        self.writer = writer
        self.h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=bridge.config.max_header_bytes)
        self.answering = False  # a request is being answered
        self.answered = False  # it is not the first one

    async def serve(self) -> None:
        """Requests in order until either side ends the connection."""
        try:
            if self.bridge.is_full:
                await self.refuse(Exchange(), ApiError(503, "too many connections", retry_after=1))
                return
            while await self.next_request():
                self.answered = True
                if self.h11.our_state is not h11.DONE or self.h11.their_state is not h11.DONE or self.bridge.closing:
                    break
                self.h11.start_next_cycle()
        except (Disconnected, OSError):
            pass  # the client is gone, or sent nothing in time
        finally:
            await self.close()

    async def next_request(self) -> bool:
        """Read a request and answer it; False at the end of the connection.

        What is not HTTP, too large or not allowed is answered without reading on, and ends the connection.
        """
        async with asyncio.timeout(self.bridge.config.idle_secs):
            if not self.h11.trailing_data[0]:
                self.h11.receive_data(await self.reader.read(READ_SIZE))
        exchange = Exchange()
        try:
            async with asyncio.timeout(self.bridge.config.send_secs):
                whole = await self.read_request(exchange)
        except TimeoutError:
            await self.refuse(exchange, ApiError(408, "the request was not sent in time"))
        except h11.RemoteProtocolError as error:
            status = 431 if error.error_status_hint == 431 else 400
            await self.refuse(exchange, ApiError(status, f"The request is not valid HTTP: {error}"))
        except ApiError as error:
            await self.refuse(exchange, error)
        else:
            if whole:
                await self.bridge.handle(self, exchange)
                return True
        return False

    async def read_request(self, exchange: Exchange) -> bool:
        """Fill the exchange; False when the client closed instead."""
        body: list[bytes] = []
        size = 0
        while True:
            event = self.h11.next_event()
            if event is h11.NEED_DATA:
                if self.h11.they_are_waiting_for_100_continue:
                    await self.send(h11.InformationalResponse(status_code=100, headers=[]))
                data = await self.reader.read(READ_SIZE)
                if not data and exchange.request:
                    raise Disconnected
                self.h11.receive_data(data)
            elif isinstance(event, h11.Request):
                exchange.request = event
                if sum(len(name) + len(value) for name, value in event.headers) > self.bridge.config.max_header_bytes:
                    raise ApiError(431, "the headers are too large")  # h11 counts only what comes in several reads
                length = exchange.header(b"content-length")
                if length and exchange.header(b"transfer-encoding"):  # RFC 9112, 6.1: could be a smuggled request
                    raise h11.RemoteProtocolError("both Content-Length and Transfer-Encoding")
                self.bridge.check_access(exchange)
                if length and int(length) > self.bridge.config.max_body_bytes:
                    raise self.too_large()
            elif isinstance(event, h11.Data):
                size += len(event.data)
                if size > self.bridge.config.max_body_bytes:
                    raise self.too_large()
                body.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                exchange.body = b"".join(body)
                return True
            else:
                return False

    def too_large(self) -> ApiError:
        return ApiError(413, f"Request exceeds the maximum size of {self.bridge.config.max_body_bytes} bytes")

    async def send(self, event: h11.Event) -> None:
        """Write an h11 event; waits while the client is slow to read."""
        data = self.h11.send(event)
        if data:
            self.writer.write(data)
            await self.writer.drain()

    async def respond(self, exchange: Exchange, status: int, kind: str, body: bytes, **headers: str) -> None:
        """A whole answer; keyword names become header names with dashes."""
        exchange.status = status
        head = self.bridge.headers(exchange, kind, headers)
        if status != 204:
            head.append(("content-length", str(len(body))))
        await self.send(h11.Response(status_code=status, headers=head))
        if exchange.method != "HEAD":
            await self.send(h11.Data(data=body))
        await self.send(h11.EndOfMessage())

    async def fail(self, exchange: Exchange, error: ApiError) -> None:
        """An error as a whole answer, or as the last event of a stream that has begun."""
        exchange.failure = error.kind
        body = error.body(exchange.id)
        if self.h11.our_state is h11.SEND_BODY:
            if not exchange.streaming:
                return  # in the middle of a whole answer: closing is all that can be said
            await self.send(h11.Data(data=translate.frame(body)))
            await self.send(h11.EndOfMessage())
            return
        headers = {}
        after = error.retry_after
        if error.resets_at is not None:
            after = max(1, round(error.resets_at - time.time()))
        if after is not None:
            headers["retry_after"] = str(after)
        # SDKs sleep through any retry-after: a limit that resets in an hour is the user's to see.
        if not error.retry or (after or 0) > 60:
            headers["x_should_retry"] = "false"
        await self.respond(exchange, error.status, "application/json", orjson.dumps(body), **headers)

    async def refuse(self, exchange: Exchange, error: ApiError) -> None:
        """Answer a request that is not read to its end, then read on for a moment: closing on unread bytes is a reset,
        which can overtake the answer."""
        if self.h11.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        exchange.last = True
        try:
            await self.fail(exchange, error)
        finally:
            self.bridge.report(exchange)
        async with asyncio.timeout(LINGER_SECS):
            if self.writer.can_write_eof():
                self.writer.write_eof()
            while await self.reader.read(READ_SIZE):
                pass

    async def gone(self) -> None:
        """Return when the client closes its side; meanwhile keep what it sends ahead for the next request."""
        while len(self.h11.trailing_data[0]) < MAX_PIPELINED:
            data = await self.reader.read(READ_SIZE)
            self.h11.receive_data(data)
            if not data:
                return
        await asyncio.Event().wait()  # a write will fail when it leaves

    async def close(self) -> None:
        self.writer.close()
        try:
            async with asyncio.timeout(LINGER_SECS):
                await self.writer.wait_closed()
        except OSError as error:  # the client is gone, or does not read
            error.__traceback__ = None  # asyncio keeps the error, and the error the frames with the whole turn
        finally:
            self.writer.transport.abort()


class Stream:
    """The events of one answer on their way out: the status line is held back for the first of them, and pings fill the
    silence between them."""

    def __init__(self, connection: Connection, exchange: Exchange) -> None:
        self.connection = connection
        self.exchange = exchange
        self._loop = asyncio.get_running_loop()
        self._wrote_at = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> "Stream":
        if self.exchange.turn and self.exchange.turn.request.stream:
            self._timer = self._loop.call_later(PING_SECS, self._tick)
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer:
            self._timer.cancel()

    def _tick(self) -> None:
        silent = self._loop.time() - self._wrote_at
        if silent >= PING_SECS - 0.01:
            self._write(translate.PING)
            silent = 0
        self._timer = self._loop.call_later(PING_SECS - silent, self._tick)

    def _write(self, data: bytes) -> None:
        connection, head = self.connection, b""
        if connection.h11.our_state is h11.SEND_RESPONSE:
            self.exchange.status, self.exchange.streaming = 200, True
            headers = connection.bridge.headers(self.exchange, "text/event-stream", {"cache_control": "no-cache"})
            head = connection.h11.send(h11.Response(status_code=200, headers=headers)) or b""
        connection.writer.write(head + (connection.h11.send(h11.Data(data=data)) or b""))
        self._wrote_at = self._loop.time()

    def send(self, frames: bytes) -> bool:
        """Write frames in one write; False when the client is too slow to read them."""
        self.exchange.first_byte = self.exchange.first_byte or time.monotonic()
        if frames:
            self._write(frames)
        transport = self.connection.writer.transport
        slow = transport.get_write_buffer_size() > transport.get_write_buffer_limits()[1]
        return not (slow or transport.is_closing())  # draining tells of a client that is gone


class Bridge:
    """A running server; made by `serve`."""

    def __init__(self, config: Config, pool: Pool) -> None:
        self.config = config
        self.pool = pool
        self.json_limits = {
            "max_depth": config.max_depth,
            "max_messages": config.max_messages,
            "max_values": config.max_values,
        }
        self.closing = False
        self.addresses: list[str] = []  # as clients reach it: host:port or unix:/path
        self._patience = 0.0  # seconds at shutdown for new connections: where the listener stays none may be refused
        self._connections: dict[asyncio.Task[None], Connection] = {}
        self._answers: set[asyncio.Task[None]] = set()  # requests that are being answered

    # connections

    async def listen(self, sock: socket.socket | None) -> asyncio.Server:
        """Raises OSError when the address is taken, or cannot be had."""
        self._patience = GRACE_SECS if sock else 0.0
        if sock or not self.config.unix_path:
            where = {"sock": sock} if sock else dict(zip(("host", "port"), self.config.address, strict=True))
            server = await asyncio.start_server(self.accept, **where)
            names = [item.getsockname() for item in server.sockets]
            self.addresses = [f"unix:{n}" if isinstance(n, str) else address(*n[:2]) for n in names]
            return server
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(self.config.unix_path)  # what does not answer is a stale file, and is replaced
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        before = os.umask(0o177)
        try:
            self.addresses = [self.config.listen_addr]
            return await asyncio.start_unix_server(self.accept, self.config.unix_path)
        finally:
            os.umask(before)

    @property
    def is_full(self) -> bool:
        return len(self._connections) > self.config.max_connections

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(self, reader, writer)
        task = asyncio.get_running_loop().create_task(connection.serve())
        self._connections[task] = connection
        task.add_done_callback(self._connections.pop)

    async def close(self) -> None:
        """End all connections: idle ones now, running answers when they are done or after `drain_secs`."""
        self.closing = True
        new = [task for task, item in self._connections.items() if not (item.answering or item.answered)]
        if new and self._patience:
            await asyncio.wait(new, timeout=self._patience)
        for task, connection in list(self._connections.items()):
            if not connection.answering:
                task.cancel()
        for seconds in (self.config.drain_secs, GRACE_SECS):
            if self._answers:
                await asyncio.wait(self._answers, timeout=seconds)
            self.hurry()
        for connection in self._connections.values():
            connection.writer.transport.abort()  # whoever has not read his answer by now
        if self._connections:
            await asyncio.wait(self._connections)

    def hurry(self) -> None:
        """Cut running answers short; no new ones are begun."""
        self.closing = True
        for answer in self._answers:
            answer.cancel()

    async def handle(self, connection: Connection, exchange: Exchange) -> None:
        """Answer one request.  Raises Disconnected when the client leaves before the answer is complete."""
        answer = asyncio.create_task(self.answer(connection, exchange))
        gone = asyncio.create_task(connection.gone())
        self._answers.add(answer)
        connection.answering = True
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            left = not answer.done()
        finally:
            gone.cancel()
            answer.cancel()
            await asyncio.wait({answer, gone})
            self._answers.discard(answer)
            connection.answering = False
            error = None if answer.cancelled() else answer.exception()
            if answer.cancelled() or isinstance(error, Disconnected | OSError):
                exchange.failure = "client_left"
            self.report(exchange)
        if error and exchange.failure != "client_left":
            log.error("bug in request %s: %s", exchange.id, type(error).__name__)
        if left or answer.cancelled() or error:  # raised itself, it would keep this frame, and the frame the turn
            raise Disconnected

    async def answer(self, connection: Connection, exchange: Exchange) -> None:
        """Route a request, and turn every failure into an answer."""
        try:
            try:
                await self.route(connection, exchange)
            except asyncio.CancelledError:
                if not self.closing:
                    raise
                raise ApiError(503, "the bridge is shutting down; send the request again") from None
        except ApiError as error:
            await connection.fail(exchange, error)
        except OSError:
            raise Disconnected from None
        except Exception as error:  # noqa: BLE001 - a bug must end as a 500 of this request alone
            where = "".join(traceback.format_tb(error.__traceback__))  # without the message, which can hold a prompt
            log.error("bug in request %s: %s\n%s", exchange.id, type(error).__name__, where)
            await connection.fail(exchange, ApiError(500, "internal error of the bridge"))

    def headers(self, exchange: Exchange, kind: str, more: Mapping[str, str]) -> list[tuple[str, str]]:
        head = [("content-type", kind), ("request-id", exchange.id)]
        if exchange.turn:
            turn = exchange.turn
            head.append((SESSION_HEADER.decode(), turn.session.id))
            head.append(("x-bridge-session", turn.how + (f"; reason={turn.reason}" if turn.reason else "")))
            if turn.not_sent:
                head.append(("x-bridge-not-sent", ", ".join(turn.not_sent)))
        origin = exchange.header(b"origin")
        if origin in self.config.allowed_origins:
            head += [
                ("access-control-allow-origin", origin),
                ("vary", "origin"),
                ("access-control-expose-headers", "*"),
            ]
        if exchange.allow:
            head.append(("allow", exchange.allow))
        if self.closing or exchange.last:
            head.append(("connection", "close"))
        return head + [(name.replace("_", "-"), value) for name, value in more.items()]

    # routes

    async def route(self, connection: Connection, exchange: Exchange) -> None:
        methods = ROUTES.get(exchange.route)
        if methods is None:
            raise ApiError(404, f"Not found: {HINT}")
        if exchange.method == "OPTIONS" and exchange.header(b"origin"):
            asked = exchange.header(b"access-control-request-headers") or ""
            allowed = {"access_control_allow_methods": ", ".join(methods), "access_control_allow_headers": asked}
            await connection.respond(exchange, 204, "text/plain", b"", **allowed)
            return
        handler = methods.get("GET" if exchange.method == "HEAD" else exchange.method)
        if handler is None:
            exchange.allow = ", ".join(methods)
            raise ApiError(405, f"Method Not Allowed; {HINT}")
        if exchange.header(b"content-encoding") not in (None, "identity"):
            raise ApiError(415, "content-encoding: request bodies are taken without compression")
        await handler(self, connection, exchange)

    def check_access(self, exchange: Exchange) -> None:
        """No web page may talk to this port unless its origin is allowed, and no name but a loopback one may lead to it
        (DNS rebinding).  Raises ApiError 401 or 403."""
        if exchange.path == "/healthz":
            return
        config = self.config
        absolute, origin = ABSOLUTE.match(exchange.target), exchange.header(b"origin")
        host = absolute[1] if absolute else exchange.header(b"host")
        match = HOST.fullmatch(host or "")
        name = match[1].lower() if match and int(match[2] or 0) < 65536 else ""
        known = {item.lower() for item in config.allowed_hosts}
        if not config.unix_path:
            known.add(config.address[0])
        if host is not None and not is_loopback(name) and name.strip("[]") not in known:
            raise ApiError(403, "this Host is not allowed; add it to CLAUDE_CLI_ALLOWED_HOSTS")
        # Images, scripts and frames of a page send no Origin, but say where they come from (Fetch Metadata).
        foreign = origin is None and exchange.header(b"sec-fetch-site") in ("cross-site", "same-site")
        if foreign or (origin is not None and origin not in config.allowed_origins):
            raise ApiError(403, "this Origin is not allowed; add it to CLAUDE_CLI_ALLOWED_ORIGINS")
        preflight = exchange.method == "OPTIONS" and origin is not None  # browsers send it without the key
        if config.api_key and not preflight:
            header, authorization = exchange.header(b"x-api-key"), exchange.header(b"authorization")
            scheme, _, token = (authorization or "").partition(" ")
            if not header and not authorization:
                raise ApiError(401, "x-api-key header is required")
            given = [(header or "").encode("latin-1"), token.encode("latin-1") if scheme.lower() == "bearer" else b""]
            if not any(hmac.compare_digest(text, config.api_key.encode()) for text in given):
                raise ApiError(401, "invalid x-api-key")

    async def health(self, connection: Connection, exchange: Exchange) -> None:
        await connection.respond(exchange, 200, "text/plain", b"ok\n")

    async def metrics(self, connection: Connection, exchange: Exchange) -> None:
        self.pool.metrics.set("connections", len(self._connections))
        await connection.respond(exchange, 200, METRICS_TYPE, self.pool.measure().encode())

    async def root(self, connection: Connection, exchange: Exchange) -> None:
        if exchange.method != "HEAD":  # Claude Code as a client asks HEAD / first
            raise ApiError(404, f"Not found: {HINT}")
        await connection.respond(exchange, 200, "text/plain", b"")

    async def messages(self, connection: Connection, exchange: Exchange) -> None:
        request = await self.read(exchange)
        async with self.pool.turn(request, exchange.header(SESSION_HEADER), exchange.owner) as turn:
            exchange.turn = turn
            with Stream(connection, exchange) as stream:
                await turn.relay(stream.send, connection.writer.drain)
        if request.stream:
            await connection.send(h11.EndOfMessage())
        else:
            await connection.respond(exchange, 200, "application/json", translate.to_json(turn.translator.message))

    async def read(self, exchange: Exchange, *, counting: bool = False) -> translate.Request:
        betas, body = exchange.header(b"anthropic-beta") or "", exchange.body
        exchange.body = b""
        return await self.pool.compute(
            len(body), lambda: translate.parse_request(body, betas, **self.json_limits, counting=counting)
        )

    async def count_tokens(self, connection: Connection, exchange: Exchange) -> None:
        request = await self.read(exchange, counting=True)
        answer = {"input_tokens": await self.pool.count(request)}
        await connection.respond(exchange, 200, "application/json", orjson.dumps(answer))

    async def models(self, connection: Connection, exchange: Exchange) -> None:
        models = model_list(await self.pool.hello())
        name = unquote(exchange.path.removeprefix(MODELS).removeprefix("/"))
        query = dict(parse_qsl(exchange.target.partition("?")[2]))
        answer = find_model(models, name) if name else model_page(models, query)
        await connection.respond(exchange, 200, "application/json", orjson.dumps(answer))

    # the log

    def report(self, exchange: Exchange) -> None:
        """One line for one request, and its counts; nothing that a client or the model wrote."""
        now = time.monotonic()
        metrics = self.pool.metrics
        metrics.add("requests_total", route=exchange.route or "none", status=exchange.status or 499)
        row: Json = {"request_id": exchange.id, "route": exchange.route or None}
        turn = exchange.turn
        if turn:
            row |= {"session": turn.session.id, "conversation": turn.how, "reason": turn.reason or None}
            row["model"] = turn.request.model
            metrics.add("turns_total", conversation=turn.how, reason=turn.reason)
            metrics.time("turn_seconds", now - exchange.began)
            row["not_sent"] = ",".join(turn.not_sent) or None
        row["status"] = exchange.status or 499  # nginx's number for a client that left
        row["error"] = exchange.failure or None
        if exchange.failure:
            metrics.add("errors_total", type=exchange.failure)
        if exchange.first_byte:
            row["first_byte_secs"] = round(exchange.first_byte - exchange.began, 3)
            metrics.time("first_byte_seconds", exchange.first_byte - exchange.began)
        row["secs"] = round(now - exchange.began, 3)
        if turn and turn.translator.message:
            usage = turn.translator.message["usage"]
            counts = {kind: usage[kind] for kind in translate.TOKENS if kind in usage}
            row |= counts
            for kind, tokens in counts.items():
                metrics.add("tokens_total", tokens, kind=kind.removesuffix("_tokens"))
        row = {name: value for name, value in row.items() if value is not None and not isinstance(value, dict)}
        log.info("%s", " ".join(f"{name}={value}" for name, value in row.items()), extra={"row": row})


Handler = Callable[[Bridge, Connection, Exchange], Any]
ROUTES: dict[str, dict[str, Handler]] = {
    "/": {"GET": Bridge.root},
    "/healthz": {"GET": Bridge.health},
    "/metrics": {"GET": Bridge.metrics},
    MODELS: {"GET": Bridge.models},
    "/v1/messages": {"POST": Bridge.messages},
    # The two common wrong base URLs: with /v1 for SDKs that add it, without it for those that do not.
    "/v1/v1/messages": {"POST": Bridge.messages},
    "/messages": {"POST": Bridge.messages},
    "/v1/messages/count_tokens": {"POST": Bridge.count_tokens},
    "/v1/v1/messages/count_tokens": {"POST": Bridge.count_tokens},
    "/messages/count_tokens": {"POST": Bridge.count_tokens},
}


def model_list(hello: Json) -> list[Json]:
    """The CLI's own models in the API's shape: each under its full id (all that Claude Code's discovery keeps) and as
    claude-cli/<alias>."""
    found: dict[str, Json] = {}
    for model in hello.get("models") or []:
        for name in (model.get("resolvedModel"), f"claude-cli/{model['value']}" if model.get("value") else None):
            if name and name not in found:
                found[name] = {
                    "type": "model",
                    "id": name,
                    "display_name": model.get("displayName") or name,
                    "created_at": "1970-01-01T00:00:00Z",  # API: the epoch when the release date is not known
                    "lifecycle": "active",
                }
    return list(found.values())


def find_model(models: list[Json], name: str) -> Json:
    """The model of an id or alias, with or without claude-cli/.  Raises ApiError 404."""
    wanted = {name, "claude-cli/" + name, name.removeprefix("claude-cli/")}
    model = next((model for model in models if model["id"] in wanted), None)
    if not model:
        raise ApiError(404, f"model: {name}")
    return model


def model_page(models: list[Json], query: dict[str, str]) -> Json:
    """A page of models: `limit` (1 to 1000, default 20), `after_id`, `before_id` (API: "List models")."""
    limit = query.get("limit", "20")
    if not limit.isdecimal() or not 1 <= int(limit) <= 1000:
        raise translate.bad_request("limit", "Input should be a valid integer from 1 to 1000")
    ids = [model["id"] for model in models]
    for name in ("after_id", "before_id"):
        if query.get(name, ids[0] if ids else "") not in ids:
            raise translate.bad_request(name, f"no such model: {query.get(name)}")
    start = ids.index(query["after_id"]) + 1 if "after_id" in query else 0
    end = ids.index(query["before_id"]) if "before_id" in query else len(ids)
    if "before_id" in query and "after_id" not in query:
        data, more = models[max(0, end - int(limit)) : end], end > int(limit)
    else:
        data, more = models[start:end][: int(limit)], end - start > int(limit)
    edge = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"data": data, "has_more": more, "first_id": edge[0], "last_id": edge[1]}


@contextlib.asynccontextmanager
async def serve(config: Config, sock: socket.socket | None = None) -> AsyncIterator[Bridge]:
    """Run the bridge inside an asyncio program until the block ends; `sock` is a listening socket to use instead of
    `config.listen_addr`.

    Raises ConfigError, which names the setting, for settings that cannot work and an address that cannot be had.
    At the end no new request is taken, running answers get `config.drain_secs`, and no child is left.
    """
    config.check()
    if sock and sock.family != socket.AF_UNIX and not is_loopback(sock.getsockname()[0]) and not config.api_key:
        where = address(*sock.getsockname()[:2])
        raise ConfigError(f"the socket {where} can be reached from other machines: set CLAUDE_CLI_API_KEY")
    async with Pool(config) as pool:
        bridge = Bridge(config, pool)
        try:
            server = await bridge.listen(sock)
        except OSError as error:
            where = f"cannot listen on {config.listen_addr}: {error.strerror or error}"
            raise ConfigError(f"CLAUDE_CLI_LISTEN_ADDR: {where}") from error
        try:
            yield bridge
        finally:
            for listener in server.sockets:
                asyncio.get_running_loop().remove_reader(listener.fileno())
            for _ in range(3):
                await asyncio.sleep(0)  # asyncio loses the connections that it is accepting when its listener closes
            server.close()
            await bridge.close()
            if config.unix_path and not sock:
                with contextlib.suppress(FileNotFoundError):  # Python 3.13 removes it by itself
                    os.unlink(config.unix_path)


async def announce(bridge: Bridge) -> None:
    """Say who is logged in.  Asks the CLI, which makes no model call for it."""
    try:
        hello = await bridge.pool.hello()
    except ApiError as error:
        log.warning("the claude CLI does not work: %s", error.message)
        return
    if source := translate.login_source(hello):
        log.info("the claude CLI is logged in (%s)", source)
    else:
        log.warning("nobody is logged in: %s", translate.LOGIN_CURE)


def inherited_socket() -> socket.socket | None:
    """The socket of a service manager (sd_listen_fds(3)): it goes on listening while the bridge restarts."""
    if os.environ.pop("LISTEN_PID", "") != str(os.getpid()) or os.environ.pop("LISTEN_FDS", "0") == "0":
        return None
    os.set_inheritable(3, False)
    return socket.socket(fileno=3)


async def run(config: Config) -> None:
    """Serve until SIGTERM or SIGINT; a second one cuts running answers short."""
    stop = asyncio.Event()
    running: list[Bridge] = []

    def signalled() -> None:
        for bridge in running if stop.is_set() else ():
            bridge.hurry()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, signalled)
    async with serve(config, inherited_socket()) as bridge:
        running.append(bridge)
        log.info("listening on %s, the claude CLI is %s", ", ".join(bridge.addresses), config.bin)
        login = asyncio.create_task(announce(bridge))
        await stop.wait()
        log.info("shutting down")
        login.cancel()
        await asyncio.wait({login})


SAID = [("user", "red"), ("assistant", "green"), ("user", "blue")]  # the past and the question of the rehearsal
CALL: Json = {"type": "tool_use", "id": "toolu_probe", "name": "probe", "input": {}}


class Rehearsal:
    """The API of `check`, on loopback, which costs nothing: its first answer calls a tool, the second one is held back.

    It sets in `found` what the CLI does of all that the bridge relies on.
    """

    def __init__(self, found: dict[str, str | bool]) -> None:
        self.found = found
        self.held, self.left = asyncio.Event(), asyncio.Event()  # the second answer has begun; its client is gone

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = (OSError, asyncio.IncompleteReadError, asyncio.CancelledError)  # asyncio would log the last one
        with contextlib.closing(writer), contextlib.suppress(*ends):
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: *(\d+)", head)
            body = await reader.readexactly(int(length[1]) if length else 0)
            writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-type: text/event-stream\r\n\r\n")
            if not re.match(rb"POST /v1/messages[? ]", head):
                return
            agent = re.search(rb"(?i)user-agent: claude-cli/([\w.-]+)", head)
            self.found["version"] = agent[1].decode() if agent else "unknown"
            writer.writelines(map(translate.frame, self.answer(orjson.loads(body))))
            if self.held.is_set():
                try:
                    await reader.read()
                finally:
                    self.left.set()

    def answer(self, asked: Json) -> list[Json]:
        message = {"id": "msg_1", "type": "message", "role": "assistant", "content": [], "model": asked["model"]}
        message["usage"] = {"input_tokens": 1, "output_tokens": 1}
        begin = {"type": "message_start", "message": message}
        if CALL["id"] in str(asked["messages"]):
            self.found["tools"] = "found" in str(asked["messages"])
            self.held.set()
            return [begin]
        words = [word for _, word in SAID]
        said = [(m["role"], word) for m in asked["messages"] for word in words if f"'{word}'" in str(m["content"])]
        self.found["history"] = said == SAID
        self.found["settings"] = asked.get("temperature") == 0.5 and "white" in str(asked["system"])
        block = CALL
        return [
            begin,
            {"type": "content_block_start", "index": 0, "content_block": block},
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 1}},
            {"type": "message_stop"},
        ]

    async def rehearse(self, pool: Pool) -> None:
        """Raises ApiError when the CLI does not play along to the end."""
        messages: list[Json] = [{"role": role, "content": word} for role, word in SAID]
        async with self.turn(pool, messages) as first:
            await first.relay(lambda _: True, self.drain)
        result = {"type": "tool_result", "tool_use_id": CALL["id"], "content": "found"}
        messages += [{"role": "assistant", "content": [CALL]}, {"role": "user", "content": [result]}]
        async with self.turn(pool, messages) as second:
            relay = asyncio.create_task(second.relay(lambda _: True, self.drain))
            try:
                await self.held.wait()
                second.interrupt()
                await self.left.wait()
                self.found["interrupt"] = not second.process.ended
            finally:
                relay.cancel()
                await asyncio.gather(relay, return_exceptions=True)

    def turn(self, pool: Pool, messages: list[Json]) -> contextlib.AbstractAsyncContextManager[Turn]:
        tools = [{"name": "probe", "input_schema": {"type": "object"}}]
        # An administrator's settings can name another API than this one: none has this model, so it costs nothing.
        body = {"model": "no-such-model", "max_tokens": 99, "messages": messages, "tools": tools}
        return pool.turn(translate.parse_request(orjson.dumps(body | {"temperature": 0.5, "system": "white"})), None)

    async def drain(self) -> None:
        """Nothing holds this client up."""


async def rehearse(config: Config, found: dict[str, str | bool]) -> None:
    """Run a Rehearsal.  Nothing of the user's own: neither the login nor another address may come from their files."""
    rehearsal = Rehearsal(found)
    server = await asyncio.start_server(rehearsal.serve, "127.0.0.1", 0)
    with tempfile.TemporaryDirectory() as home:
        environ = {"HOME": home, "CLAUDE_CONFIG_DIR": home, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        kept = {"ANTHROPIC_BASE_URL": f"http://{address(*server.sockets[0].getsockname())}"}
        kept |= {"ANTHROPIC_API_KEY": "unused", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}
        config = dataclasses.replace(config, keep_env=tuple(kept), setting_sources="", tools="")
        async with server, Pool(config, {**os.environ, **environ, **kept}) as pool:
            await rehearsal.rehearse(pool)


async def check(config: Config) -> bool:
    """Print in plain words whether the CLI is there, is logged in and does what is needed; True if all is well.

    It costs no token.
    """
    try:
        config.check()
    except ConfigError as error:
        print(f"settings: {error}")
        return False
    config = dataclasses.replace(config, spares=0)
    limit = min(REHEARSAL_SECS, config.watchdog_secs)
    found: dict[str, str | bool] = {"version": "unknown"}
    found |= dict.fromkeys(("history", "settings", "tools", "interrupt"), False)
    failure = ""
    print(f"CLI: {config.bin}")
    try:
        async with Pool(config) as pool, asyncio.timeout(limit):
            source = translate.login_source(await pool.hello())
    except (ApiError, OSError) as error:  # TimeoutError among them
        print(f"start: does not work ({str(error) or 'no answer in time'})")
        return False
    print(f"login: {source or 'nobody is logged in: ' + translate.LOGIN_CURE}")
    try:
        async with asyncio.timeout(limit):
            await rehearse(config, found)
    except (ApiError, OSError) as error:
        failure = f" ({str(error) or 'no answer in time'})"
    for name, value in found.items():
        works = "works" if value else f"does not work{failure}"
        print(f"{name}: {value if isinstance(value, str) else works}")
    return bool(source) and all(found.values())


class JsonFormatter(logging.Formatter):
    """One JSON object a line; a request's fields are its keys."""

    def format(self, record: logging.LogRecord) -> str:
        row = getattr(record, "row", None) or {"message": record.getMessage()}
        head = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)), "level": record.levelname}
        return orjson.dumps(head | row).decode()


HELP = """\
Answer the Messages API with the claude CLI.

  check          say whether the CLI is there, logged in, and does what is needed
  providers      print the model_providers of the configuration file, completed
  --config FILE  start only if there is a claude-cli provider in FILE
  --version      print the version
  --help         print this

Settings, with their defaults; each is also an environment variable: --max-idle
is CLAUDE_CLI_MAX_IDLE.  The README has a table of them.

"""


def main() -> None:
    """The command line.  Exit status 2 and one line on stderr for settings that cannot work, 1 for a failed check."""
    names = {item.name.replace("_", "-"): item.default for item in dataclasses.fields(Config) if item.name != "api_key"}
    settings = " ".join(f"--{name}\u00a0{value}" if value else f"--{name}" for name, value in names.items())
    lines = textwrap.wrap(settings, 78, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    parser = argparse.ArgumentParser(
        "claude-cli-bridge",
        usage="%(prog)s [check | providers] [--config FILE] [--SETTING X]...",
        description=HELP + "\n".join(lines).replace("\u00a0", " "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--help", action="help", help=argparse.SUPPRESS)
    version = f"claude-cli-bridge {__version__}"
    parser.add_argument("--version", action="version", version=version, help=argparse.SUPPRESS)
    for name in ("config", *names):
        parser.add_argument("--" + name, help=argparse.SUPPRESS)
    known, others = parser.parse_known_args()  # argparse would repeat what follows an unknown flag: a key, perhaps
    flags = vars(known)
    try:
        if others or flags["command"] not in (None, "check", "providers"):
            flag = next((name.partition("=")[0] for name in others if name.startswith("-")), "")
            raise ConfigError(f"there is no {flag or 'such command'}; see --help")
        path = os.environ.get("CLAUDE_CLI_CONFIG", "") if flags["config"] is None else flags["config"]
        act(Config.read(os.environ, flags), flags["command"], path)
        sys.stdout.flush()
    except ConfigError as error:
        print(f"claude-cli-bridge: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would write the rest at its end
        sys.exit(141)


def act(config: Config, command: str | None, path: str) -> None:
    """Run a command of the command line; `path` is the configuration file's."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    if config.log_format == "json":
        logging.getLogger().handlers[0].setFormatter(JsonFormatter())
    if command == "check":
        sys.exit(0 if asyncio.run(check(config)) else 1)
    if command == "providers" and not path:
        raise ConfigError("CLAUDE_CLI_CONFIG: providers needs a configuration file")
    providers = read_providers(path, config) if path else []
    if command == "providers":
        sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
        print(orjson.dumps(providers, option=orjson.OPT_INDENT_2).decode())
    elif path and not any(map(is_own, providers)):
        log.info("there is no claude-cli provider in %s: nothing to do", path)
    else:
        watch_without_threads()
        asyncio.run(run(config))


if __name__ == "__main__":
    main()
