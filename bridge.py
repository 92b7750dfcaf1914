"""The HTTP server of the bridge.

To embed it in an asyncio program: `async with serve(Config()) as bridge: ...`.

What happens to a request, and in which section of which file:

    bridge.py     a connection     bytes become an Exchange, by h11
                  access           who may ask
                  the server       its route; failures become answers
    translate.py  requests         a body becomes a Request
                  messages         what the API or the CLI would not take as it is
                  fingerprints     by which the process that holds the history is found
    sessions.py   the pool         finds that process
                  a fresh process  starts one if there is none
                  a conversation   gives it the request
    translate.py  to the CLI       the request as lines, the history as rows of a transcript
    sessions.py   a child          they are written to its pipes, and what it prints is read
                  a process        control requests are answered, other events wait
    translate.py  from the CLI     lines become events
                  translation      events of the CLI become those of a Messages stream
    bridge.py     a request and its answer: those go to the client
    sessions.py   the pool         the process rests, or is ended

With the small ones between them (queue and threads, past conversations, room, frames) they
are about 3,700 of 6,950 lines.  The others can be skipped: errors and JSON, settings, the
command line and environment of a process, what is known of the CLI and what it reports, the
sweep, other routes, the log, `serve`, the program, and what is called an appendix.
"""

import asyncio
import base64
import contextlib
import ctypes
import dataclasses
import difflib
import email.utils
import errno
import hmac
import html
import http.client
import importlib
import ipaddress
import json
import logging
import os
import pwd
import queue
import re
import resource
import shlex
import shutil
import signal
import socket
import stat
import sys
import tempfile
import textwrap
import threading
import time
import tomllib
import traceback
import uuid
from collections import defaultdict, deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
)
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import h11
import orjson

if TYPE_CHECKING or not __package__:
    import sessions
    import translate
    from sessions import Pool, setting
    from translate import ApiError, CliInfo, Json
else:  # copied into a package
    from . import sessions, translate
    from .sessions import Pool, setting
    from .translate import ApiError, CliInfo, Json

__version__ = "0.2.0"
log = logging.getLogger("claude_cli_bridge")

# ------------------------------------------------------------ settings

ENVIRONMENT_PREFIX = "CLAUDE_CLI_"
MAX_PORT = 65_535
# To listen on one of these is to listen on all addresses of the machine.
WILDCARDS = ("0.0.0.0", "::")


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it."""


@dataclass(frozen=True, kw_only=True)
class Config(sessions.PoolConfig):
    """All settings.

    The environment variable CLAUDE_CLI_MAX_IDLE, the flag --max-idle and the field
    max_idle differ in their spelling alone.
    """

    listen_addr: str = setting(
        "127.0.0.1:14001",
        "where to listen: host:port or unix:/path",
        "everyday",
    )
    log_format: str = setting(
        "text",
        "`json`: one object for each request",
        "everyday",
        choices=("text", "json"),
    )
    log_level: str = setting(
        "info",
        "`debug` adds what was decided for each request, and the stderr of the CLI",
        "everyday",
        choices=("info", "debug"),
    )
    drain_secs: float = setting(
        10.0,
        "seconds that running answers get when the bridge shuts down",
        "everyday",
    )
    api_key: str = setting(
        "",
        "clients must send it; required when listening on anything but loopback "
        "(no flag: command lines are visible to other users)",
        "access",
        secret=True,
    )
    allowed_hosts: tuple[str, ...] = setting(
        (),
        "names besides the loopback ones that a request's Host may have",
        "access",
    )
    allowed_origins: tuple[str, ...] = setting(
        (),
        "origins of web pages that may use the bridge, such as `http://localhost:3000`",
        "access",
    )
    max_body_bytes: int = setting(
        32 << 20,
        "most bytes of a request's body, by default the API's limit; a larger one gets 413",
        "limits",
        least=1,
    )
    max_connections: int = setting(
        1000,
        "open connections, each with a file descriptor and up to one body; more get 503",
        "limits",
        least=1,
    )
    send_secs: float = setting(
        60.0,
        "seconds a client may take to send a request; then 408",
        "limits",
        least=0.01,
    )
    idle_secs: float = setting(
        75.0,
        "seconds until a connection is closed that is not used, or whose client reads nothing",
        "limits",
        least=0.01,
    )

    @classmethod
    def read(cls, environ: Mapping[str, str], flags: Mapping[str, str]) -> "Config":
        """Settings from flags, else from the environment.  Raises ConfigError, which
        names one."""
        values = {}
        for item in dataclasses.fields(cls):
            name = item.name
            if text := flags.get(name, environ.get(variable(name), "")):
                values[name] = parse_setting(name, type(item.default), text)
        return cls(**values)

    def checked(self) -> "Config":
        """The same settings, with the whole path of the CLI.  Raises ConfigError, which
        names one that cannot be used."""
        for item in dataclasses.fields(self):
            check_bounds(item, getattr(self, item.name))
        bypasses = self.tools and self.permission_mode == "bypassPermissions"
        if bypasses and os.geteuid() == 0:
            raise config_error(
                "permission_mode",
                "the CLI refuses bypassPermissions when it runs as root",
            )
        if self.tools and not os.path.isdir(self.cwd or "."):
            raise config_error("cwd", f"{self.cwd!r} is not a directory")
        if self.mcp_config:
            check_mcp_config(self.mcp_config)
        if not all(map(str.isidentifier, self.keep_env)):
            # It is not printed: it may be a secret.
            raise config_error(
                "keep_env",
                "takes names of variables, with commas between, and no values",
            )
        if not self.api_key.isprintable() or self.api_key != self.api_key.strip():
            raise config_error(
                "api_key", "must be one line of UTF-8 without spaces at its ends"
            )
        if "null" in self.allowed_origins:
            raise config_error(
                "allowed_origins",
                "null is the origin of any page in a sandbox, and is never allowed",
            )
        host, _ = self.address
        if not self.api_key and not is_loopback(host):
            raise config_error(
                "listen_addr",
                f"{host} can be reached from other machines: set {variable('api_key')}",
            )
        check_system(self.trace_dir)
        return dataclasses.replace(self, bin=find_cli(self.bin))

    @property
    def unix_path(self) -> str:
        """The path of a Unix socket; empty: it is an address."""
        scheme, _, path = self.listen_addr.partition(":")
        return os.path.expanduser(path) if scheme == "unix" else ""

    @property
    def address(self) -> tuple[str, int]:
        """Host and port.  A Unix socket counts as localhost, as only this machine can reach
        it.  Raises ConfigError."""
        if self.unix_path:
            return "localhost", 0
        match = re.fullmatch(r"\[?([^/\[\]]+)\]?:([0-9]{1,9})", self.listen_addr)
        if not match or int(match[2]) > MAX_PORT:
            message = f"expected host:port, with a port up to {MAX_PORT}, or unix:/path"
            raise config_error("listen_addr", f"{message}; got {self.listen_addr!r}")
        return match[1].lower(), int(match[2])

    @property
    def base_url(self) -> str:
        """Where a gateway on this machine reaches the bridge."""
        if self.unix_path:
            return f"unix:{self.unix_path}"
        return local_url(host_and_port(*self.address))

    def warnings(self, environ: Mapping[str, str]) -> list[str]:
        """Settings that are probably mistakes, and those that open something up."""
        known = [variable(item.name) for item in dataclasses.fields(self)]
        known.append(variable("config"))
        found = [
            f"{name} is not a setting{suggestion(name, known)}"
            for name in environ
            if name.startswith(ENVIRONMENT_PREFIX) and name not in known
        ]
        for name in self.keep_env:
            place = f"{variable('keep_env')}: {name}"
            if name not in environ:
                found.append(f"{place} is not set{did_you_mean(name, environ)}")
            elif environ[name] in PLACEHOLDERS:
                found.append(
                    f"{place} is {environ[name]!r}, a placeholder for clients of the bridge, "
                    "and not a key of the API"
                )
        if self.address[0] in WILDCARDS and not self.allowed_hosts:
            found.append(
                "clients that reach this machine by name or address get 403 "
                f"until {variable('allowed_hosts')} holds that name or address"
            )
        if self.trace_dir:
            found.append(f"prompts and answers are written to {self.trace_dir}")
        return found + self.agent_warnings()

    def agent_warnings(self) -> list[str]:
        """What agent mode opens up, or its settings that have no effect."""
        if not self.tools:
            return [
                f"{variable(item.name)} has no effect without {variable('tools')}"
                for item in dataclasses.fields(self)
                if item.metadata["group"] == "agent mode"
                and getattr(self, item.name) != item.default
            ]
        who = "any client with the key" if self.api_key else "any local program"
        return [
            f"agent mode: {who} can use the CLI's own tools "
            f"as user {user_name()}, in {os.path.abspath(self.cwd)} "
            f"(tools {self.tools}, permission mode {self.permission_mode})"
        ]


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return ENVIRONMENT_PREFIX + name.upper()


def flag(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")


def config_error(name: str, message: str) -> ConfigError:
    """The error of one setting, to be raised."""
    return ConfigError(f"{variable(name)}: {message}")


# Words that everybody tries, and what to use instead.
SYNONYMS = {
    "port": "CLAUDE_CLI_LISTEN_ADDR=127.0.0.1:PORT",
    "p": "CLAUDE_CLI_LISTEN_ADDR=127.0.0.1:PORT",
    "host": "CLAUDE_CLI_LISTEN_ADDR=HOST:14001",
    "verbose": "CLAUDE_CLI_LOG_LEVEL=debug",
    "debug": "CLAUDE_CLI_LOG_LEVEL=debug",
    "log_file": "2>FILE: the log goes to stderr",
    "api_key": "CLAUDE_CLI_API_KEY in the environment: all users can see a command line",
    "model": "`model` in each request",
    "serve": "`claude-cli-bridge` alone to start it",
    "start": "`claude-cli-bridge` alone to start it",
    "run": "`claude-cli-bridge` alone to start it",
    "help": "--help",
    "version": "--version",
}


def suggestion(name: str, known: Iterable[str]) -> str:
    """What was probably meant by a setting or a command, as the end of a sentence."""
    word = bare_word(name)
    if word in SYNONYMS:
        return f"; use {SYNONYMS[word]}"
    return did_you_mean(name, known)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest of the known names, as the end of a sentence."""
    words = {bare_word(item): item for item in known}
    nearest = difflib.get_close_matches(bare_word(name), words, 1)
    return f"; did you mean {words[nearest[0]]}?" if nearest else ""


def bare_word(name: str) -> str:
    """A name without what makes it a flag or a variable."""
    return name.removeprefix(ENVIRONMENT_PREFIX).lstrip("-").replace("-", "_").lower()


def as_typed(message: str, flags: Iterable[str]) -> str:
    """A message that calls these settings by their flags, as their user does."""
    for name in flags:
        message = re.sub(rf"\b{variable(name)}\b", flag(name), message)
    return message


def parse_setting(name: str, kind: type, text: str) -> Any:
    """A setting from its text.  Raises ConfigError."""
    if text[0] in "'\"":
        raise config_error(name, "leave out the quotes around the value")
    if kind is tuple:
        return tuple(text.replace(",", " ").split())
    if kind is str:
        return text if name == "api_key" else os.path.expanduser(text)
    try:
        return kind(text)
    except ValueError:
        message = "must be a number without a unit, whole unless it is of seconds"
        raise config_error(name, f"{message}; got {text!r}") from None


# More than any number of seconds, bytes or processes.
MAX_NUMBER = 1e12


def check_bounds(item: "dataclasses.Field[Any]", value: Any) -> None:
    """Raises ConfigError for a value that its field does not allow."""
    choices, least = item.metadata["choices"], item.metadata["least"]
    expected = ""
    if choices and value not in choices:
        expected = f"one of {', '.join(choices)}"
    is_number = type(item.default) in (int, float)
    if is_number and not least <= value <= MAX_NUMBER:
        expected = f"a number from {least} to {MAX_NUMBER:g}"
    if expected:
        raise config_error(item.name, f"must be {expected}, got {value!r}")


def check_mcp_config(path: str) -> None:
    """Refuse a file that the CLI would refuse at each request."""
    fault: object = "it does not"
    try:
        match orjson.loads(Path(path).read_bytes()):
            case {"mcpServers": dict()}:
                return
    except (OSError, ValueError) as error:
        fault = error
    raise config_error(
        "mcp_config", f"{path} must hold a JSON object with `mcpServers`: {fault}"
    )


def check_system(trace_dir: str) -> None:
    """Refuse to start where the CLI cannot start, or where no file can be written to TMPDIR or
    to the folder for traces."""
    if not os.path.isdir("/dev/fd"):
        raise ConfigError("there is no /dev/fd, which the CLI needs: is /proc mounted?")
    folders = {
        "TMPDIR": os.environ.get("TMPDIR", ""),
        variable("trace_dir"): trace_dir,
    }
    for name, folder in folders.items():
        try:
            # If none is named, in the first of the usual folders that can be written.
            tempfile.TemporaryFile(dir=folder or None).close()
        except OSError as error:
            raise ConfigError(f"{name}: no file can be written: {error}") from None


def as_url(address: str) -> str:
    return address if address.startswith("unix:") else f"http://{address}"


def local_url(address: str) -> str:
    """The URL by which this machine reaches an address that the bridge listens on."""
    url = as_url(address).replace("//0.0.0.0:", "//127.0.0.1:")
    return url.replace("//[::]:", "//[::1]:")


def host_and_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# Where Claude Code's own installers put it, if the folder is not on PATH.
INSTALLED = ("~/.local/bin/claude", "~/.claude/local/claude")


def find_cli(given: str) -> str:
    """The path of the CLI: `given`, or claude on PATH, or in the claude-agent-sdk wheel,
    or where an installer puts it.  Raises ConfigError."""
    bundled = [f"{folder}/claude_agent_sdk/_bundled/claude" for folder in sys.path]
    for place in [given] if given else ["claude", *bundled, *INSTALLED]:
        if path := shutil.which(os.path.expanduser(place)):
            check_interpreter(path)
            return os.path.abspath(path)  # children have another working directory
    reason = "the claude CLI was not found: install Claude Code, or `pip install"
    reason += " claude-agent-sdk`, or name the program here"
    if given:
        reason = f"{given!r} is not an executable file; for arguments write a script"
    raise config_error("bin", reason)


def check_interpreter(path: str) -> None:
    """Refuse a script whose interpreter is missing: execve(2) would report the script itself
    as missing."""
    with contextlib.suppress(OSError), open(path, "rb") as file:  # it may be unreadable
        match = re.match(rb"#!\s*(\S+)", file.readline(256))
        if match and not os.access(match[1], os.X_OK):
            name = os.fsdecode(match[1])
            raise config_error(
                "bin", f"{path!r} is a script for {name}, which is not there"
            )


# The key that the README gives to clients that insist on one, where the bridge has none.
KEY_OF_CLIENTS = "unused"
# Gateways want a key even where none is needed.
KEY_OF_GATEWAYS = "claude-cli-local"
PLACEHOLDERS = (KEY_OF_CLIENTS, KEY_OF_GATEWAYS)
# Variables that may hold a login; the CLI gets those that `keep_env` names.
LOGIN_VARIABLES = (
    "ANTHROPIC_API_KEY",
    "ANTHROPIC_AUTH_TOKEN",
    "CLAUDE_CODE_OAUTH_TOKEN",
)


def login_state(config: Config, info: CliInfo) -> str:
    """Who the CLI is logged in as; if nobody, where it looked and what to do.  For people
    to read."""
    place = f"user {user_name()} in {sessions.login_folder(os.environ)}"
    if info.login:
        return f"{info.login} ({place})"
    found = f"nobody is logged in: found no login of {place}"
    unpassed = os.environ.keys() - set(config.keep_env)
    # What is set for another address, or for clients of the bridge, is no login.
    if "ANTHROPIC_BASE_URL" in unpassed:
        unpassed = set()
    no_logins = ("", *PLACEHOLDERS, config.api_key)
    for name in LOGIN_VARIABLES:
        if name in unpassed and os.environ[name] not in no_logins:
            found = f"{found}; {name} is set, but not passed on to the CLI"
            return f"{found}: {variable('keep_env')}={name} passes it on"
    settings = sessions.settings_file(os.environ)
    if os.path.isfile(settings):
        hint = (
            f"{variable('setting_sources')}=user if the login is in its settings.json"
        )
        if config.setting_sources:
            hint = "`claude` says whether it can read its settings.json"
        found += f" ({hint})"
    return f"{found}; `{shlex.quote(config.bin)} auth login` logs in"


def user_name() -> str:
    """The user that the bridge runs as."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # in a container there may be none
        return str(os.getuid())


# ------------------------------------------------------------ a request and its answer

# RFC 9112, 3.2.2: a target in absolute form.
ABSOLUTE = re.compile("^https?://([^/?]*)", re.I)
# Seconds between two pings of a stream; proxies time out after 30 to 60.
PING_SECS = 10.0


@dataclass
class Reply:
    """A whole answer: its body, content type, status and other headers."""

    body: bytes
    content_type: str = "application/json"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Exchange:
    """One request and what was answered, for routes and for the log."""

    connection: "Connection"
    # From the client; empty if what came was no request.
    method: str = ""
    target: str = ""
    # The path without its query (clients add ?beta=true), and with one slash at its start.
    path: str = ""
    # The known route of the path (ROUTES); empty: there is none.
    route: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    # Written by `check_access`: its client has passed all checks, that of the key among them.
    is_allowed: bool = False
    # Set by `Connection.refuse`: the connection closes after this answer.
    closes: bool = False
    # Sent as request-id, and logged as request_id.
    id: str = field(default_factory=lambda: "req_" + uuid.uuid4().hex)
    # Monotonic time at which it began to come.
    began: float = field(default_factory=time.monotonic)
    # 0: nothing was answered.
    status: int = 0
    # error.type of a failure.
    failure: str = ""
    # Why it failed, or why its conversation was rebuilt, for the log.
    message: str = ""
    # Monotonic time at which the CLI began to answer.
    first_byte_at: float = 0
    # The methods of the route, for 405.
    allow: str = ""
    # The turn that answers it.
    turn: sessions.Turn | None = None

    def take(self, request: h11.Request) -> None:
        """Fill it from the head of a request.  Several headers of one name are joined by
        commas (RFC 9110, 5.3)."""
        self.method = request.method.decode()
        self.target = request.target.decode()
        path, *_ = ABSOLUTE.sub("", self.target).partition("?")
        self.path = "/" + path.lstrip("/")
        # SDKs append /v1/messages or /messages to a base URL with or without /v1.
        route = re.sub("^(/v1/v1)?(?=/messages)", "/v1", self.path)
        if route.startswith(MODELS + "/"):
            route = MODELS
        if route in ROUTES:
            self.route = route
        values = defaultdict(list)
        for name, value in request.headers:
            values[name.decode()].append(value.decode("latin-1"))
        for known, given in values.items():
            self.headers[known] = ", ".join(filter(None, given))

    @property
    def is_preflight(self) -> bool:
        """Whether a browser asks, without the key, what a page may send (Fetch Standard)."""
        return self.method == "OPTIONS" and "origin" in self.headers

    def header(self, name: str) -> str:
        """The value of a header; `name` in lower case.  Empty: there is none."""
        return self.headers.get(name, "")

    # The answer

    def begin(self, reply: Reply) -> None:
        """Write the head of an answer, with a Date (RFC 9110, 6.6.1) and a reason phrase
        (RFC 9112, 4)."""
        status = reply.status
        own = {
            "date": email.utils.formatdate(usegmt=True),
            "content-type": reply.content_type,
        }
        headers = own | self.connection.bridge.headers(self) | reply.headers
        reason = http.client.responses.get(status, "Overloaded")  # 529
        head = [(name, value) for name, value in headers.items() if value]
        response = h11.Response(status_code=status, headers=head, reason=reason)
        self.connection.write(response)
        self.status = status

    async def respond(self, reply: Reply) -> None:
        """Send a whole answer."""
        reply.headers["content-length"] = str(len(reply.body))
        self.begin(reply)
        if self.method != "HEAD":
            self.connection.write(h11.Data(data=reply.body))
        await self.connection.finish()

    def stream(self, frames: bytes) -> None:
        """Write a piece of a stream; the first call writes the head of the answer too."""
        if not self.status:
            # nginx must not hold the stream back.
            headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
            self.begin(Reply(b"", "text/event-stream", headers=headers))
        self.connection.write(h11.Data(data=frames))

    async def ping(self) -> None:
        """Send a ping every PING_SECS until it is cancelled, also between other events, as
        the API does."""
        while True:
            await asyncio.sleep(PING_SECS)
            self.stream(translate.PING)

    async def fail(self, error: ApiError) -> None:
        """Send an error as a whole answer, or as the last event of a stream that has
        begun."""
        self.failure = error.error_type
        reason = error.message if error.log_reason is None else error.log_reason
        self.message = reason[: sessions.MAX_LOGGED]
        body = error.body(self.id)
        if self.status:
            if self.connection.is_in_body:
                self.stream(translate.frame(body))
                await self.connection.finish()
            return
        after = error.retry_after or 0
        if error.resets_at:
            after = max(1, round(error.resets_at - time.time()))
        # SDKs sleep for as long as retry-after says; of more than a minute the user should
        # hear at once.
        can_retry = error.can_retry and after <= 60
        headers = {
            "retry-after": str(after or ""),
            "x-should-retry": "" if can_retry else "false",
        }
        if error.status == 401:
            basic = 'Basic realm="the password is the key"'
            headers["www-authenticate"] = basic if self.route == "/" else "Bearer"
        await self.respond(
            Reply(orjson.dumps(body), status=error.status, headers=headers)
        )


# ------------------------------------------------------------ access

# A Host (RFC 9110, 7.2): a name or address, and perhaps a port.  An IPv6 address without
# the brackets of RFC 3986 is taken too, and has no port.
HOST = re.compile(
    r"(\[[0-9a-f:.]+\]|[0-9a-f]*:[0-9a-f]*:[0-9a-f:]*|[a-z0-9_-]+(?:\.[a-z0-9_-]+)*)\.?"
    r"(?::[0-9]{1,5})?",
    re.I,
)


def check_access(exchange: Exchange, config: Config) -> None:
    """Who may talk to this port.  Raises ApiError 401 or 403.  Only /healthz is open to
    all, without a query and without a body."""
    # A body is read before its request is answered: without a key nobody may send one.
    has_length = int(exchange.header("content-length") or 0) > 0
    has_body = has_length or "transfer-encoding" in exchange.headers
    if exchange.target == "/healthz" and not has_body:
        return
    check_host(exchange, config)
    check_origin(exchange, config)
    if config.api_key and (has_body or not exchange.is_preflight):
        check_key(exchange, config.api_key)
    exchange.is_allowed = not exchange.is_preflight


def check_host(exchange: Exchange, config: Config) -> None:
    """Only a loopback name, the address listened on or an allowed host may lead here.

    A web page can make its own name lead to this port (DNS rebinding), but then its
    requests carry that name.  The host of a target in absolute form counts before the
    header (RFC 9112, 3.2.2).
    """
    absolute = ABSOLUTE.match(exchange.target)
    # HTTP/1.0 needs no Host, and is nothing that browsers speak.
    host = absolute[1] if absolute else exchange.headers.get("host", "localhost")
    match = HOST.fullmatch(host)
    name = match[1].lower().strip("[]") if match else ""
    allowed = [config.address[0], *config.allowed_hosts]
    known = {item.lower().strip("[]") for item in allowed}
    if not is_loopback(name) and name not in known:
        cure = f"{variable('allowed_hosts')}={name or 'NAME'} allows it (the name only, no port)"
        raise ApiError(403, f"Host {host[:100]!a} is not allowed; {cure}")


def check_origin(exchange: Exchange, config: Config) -> None:
    """No web page may talk to this port unless its origin is allowed (RFC 6454).

    Images, scripts, frames and links of a page send no Origin, but say that they come from
    another site (Fetch Metadata, Sec-Fetch-Site).  Browsers say so to loopback names and to
    https alone: under another allowed host only a key keeps such a GET out.
    """
    origin = exchange.headers.get("origin")
    site = exchange.header("sec-fetch-site")
    is_from_elsewhere = origin is None and site in ("cross-site", "same-site")
    if is_from_elsewhere or origin == "null":  # that of any page in a sandbox
        raise ApiError(
            403, "pages of other sites, or of no origin, may not use this bridge"
        )
    if origin is not None and origin not in config.allowed_origins:
        cure = f"{variable('allowed_origins')} allows it, set to exactly that"
        raise ApiError(403, f"Origin {origin[:100]!a} is not allowed; {cure}")


def check_key(exchange: Exchange, expected: str) -> None:
    """The bridge's key, as x-api-key, as a Bearer token (RFC 6750, 2.1), or, for the
    page, which a browser opens, as the password of HTTP Basic (RFC 7617)."""
    key, authorization = exchange.header("x-api-key"), exchange.header("authorization")
    if not key and not authorization:
        message = f"this bridge requires a key: send its {variable('api_key')}"
        raise ApiError(401, f"{message} as x-api-key or Authorization: Bearer")
    scheme, _, token = authorization.partition(" ")
    given = [key]
    if scheme.lower() == "bearer":
        given.append(token.strip(" "))
    elif scheme.lower() == "basic" and exchange.route == "/":
        with contextlib.suppress(ValueError):  # it is no Base64
            pair = base64.b64decode(token).decode("latin-1")
            given.append(pair.partition(":")[2])
    wanted = expected.encode()
    if not any(hmac.compare_digest(item.encode("latin-1"), wanted) for item in given):
        message = f"the key sent does not match this bridge's {variable('api_key')}"
        raise ApiError(401, f"{message}; Authorization takes the word Bearer before it")


def is_loopback(host: str) -> bool:
    """RFC 6761, 6.3: localhost and all names below it; RFC 1122 and 4291: 127.0.0.0/8
    and ::1."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# ------------------------------------------------------------ a connection

# Bytes of one read, of what is read ahead during an answer, and of a request's target and
# headers.  The last two are checked after a read, so up to twice as much is taken.  Node
# takes 16 KiB of headers, nginx 32.
READ_SIZE = 64 << 10
# How a client of TLS begins (RFC 8446, 5.1: a handshake record).
TLS_HELLO = b"\x16\x03"
# A body that comes in more than MAX_CHUNKS pieces, chunks or reads, is refused when they
# average fewer than MIN_CHUNK bytes: each costs 20 us.
MAX_CHUNKS = 10_000
MIN_CHUNK = 64
# Seconds to go on reading a refused body, and to flush a closing connection, so that
# the client gets the answer and not a reset.
LINGER_SECS = 5.0


class Disconnected(ConnectionError):
    """The connection ends without more answers: mostly, the client is gone."""


@dataclass(eq=False)
class Connection:
    """One client: its socket and its h11 state."""

    bridge: "Bridge"
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    # `max_connections` were open already: all it gets is a 503.
    is_surplus: bool
    # One of its requests is being answered; None: none has been yet, for which `Bridge.close`
    # waits on an inherited socket.  Written by `Bridge.handle`.
    answering: bool | None = None

    def __post_init__(self) -> None:
        self.config = self.bridge.config
        self.transport = self.writer.transport
        self.transport.set_write_buffer_limits(0)  # so that `drain` waits for all
        self.http = h11.Connection(h11.SERVER, max_incomplete_event_size=READ_SIZE)

    async def serve(self) -> None:
        """Requests in order until either side ends the connection."""
        try:
            if self.is_surplus:
                error = ApiError(503, "too many connections", retry_after=1)
                await self.refuse(Exchange(self), error)
                return
            while True:
                await self.next_request()
                # After an answer it is DONE, or MUST_CLOSE if either side wants to end.
                if self.http.our_state is not h11.DONE or self.bridge.closing:
                    return
                self.http.start_next_cycle()
        except OSError:
            pass  # the client is gone, or sent nothing in time
        finally:
            await self.close()

    async def next_request(self) -> None:
        """Read a request and answer it, unless the client closes instead.

        What is not HTTP, too large or not allowed is answered without reading on, and
        ends the connection.
        """
        async with asyncio.timeout(self.config.idle_secs):
            if not self.http.trailing_data[0]:
                self.http.receive_data(await self.reader.read(READ_SIZE))
        exchange = Exchange(self)
        try:
            async with asyncio.timeout(self.config.send_secs):
                await self.read_request(exchange)
        except TimeoutError:
            error = ApiError(408, "the request was not sent in time")
        except ConnectionError:
            if exchange.method:
                exchange.failure = "client_left"
                report(exchange)
            raise
        except h11.RemoteProtocolError as fault:
            # After the colon h11 quotes the line, which the log must not hold.
            reason = str(fault).partition(":")[0]
            message = f"The request is not valid HTTP: {reason}"
            if self.http.trailing_data[0].startswith(TLS_HELLO):
                message = "TLS: this port speaks plain HTTP; the URL begins with http:"
            status = 431 if fault.error_status_hint == 431 else 400
            error = ApiError(status, message)
        except ApiError as refusal:
            error = refusal.with_traceback(None)
        else:
            if exchange.method:
                await self.bridge.handle(exchange)
            return
        await self.refuse(exchange, error)

    async def read_request(self, exchange: Exchange) -> None:
        """Fill the exchange; it stays empty when the client closes instead."""
        body = bytearray()
        chunks = 0
        while True:
            event = self.http.next_event()
            if event is h11.NEED_DATA:
                if self.http.they_are_waiting_for_100_continue:
                    self.write(h11.InformationalResponse(status_code=100, headers=[]))
                data = await self.reader.read(READ_SIZE)
                if not data and exchange.method:
                    raise Disconnected
                self.http.receive_data(data)
            elif isinstance(event, h11.Request):
                exchange.take(event)
                self.check_head(exchange, event.http_version)
            elif isinstance(event, h11.Data):
                body += event.data
                chunks += 1
                self.check_size(len(body))
                if chunks > MAX_CHUNKS and len(body) < chunks * MIN_CHUNK:
                    raise ApiError(400, "the body comes in pieces that are too small")
                await asyncio.sleep(0)  # other connections have their turn
            else:
                exchange.body = bytes(body)
                return

    def check_head(self, exchange: Exchange, version: bytes) -> None:
        """Raises ApiError 401, 403, 413 or 505, or RemoteProtocolError."""
        length = exchange.header("content-length")
        if length and exchange.header("transfer-encoding"):
            # RFC 9112, 6.1: it could be a smuggled request.
            raise h11.RemoteProtocolError("both Content-Length and Transfer-Encoding")
        if not version.startswith(b"1."):
            raise ApiError(505, "this server speaks HTTP/1.1")  # RFC 9110, 15.6.6
        check_access(exchange, self.config)
        self.check_size(int(length or 0))

    def check_size(self, size: int) -> None:
        limit = self.config.max_body_bytes
        if size > limit:
            raise ApiError(413, f"Request exceeds the maximum size of {limit} bytes")

    # Answers

    @property
    def is_in_body(self) -> bool:
        """Whether an answer has begun, and not ended."""
        return self.http.our_state is h11.SEND_BODY

    def write(self, event: h11.Event) -> None:
        """Write an h11 event, unless the client is gone: uvloop would raise, and the next
        `drain` raises Disconnected."""
        data = self.http.send(event)
        if data and not self.writer.is_closing():
            self.writer.write(data)

    async def finish(self) -> None:
        """End an answer, and wait until the system has all of it."""
        self.write(h11.EndOfMessage())
        await self.drain()

    async def drain(self) -> None:
        """Wait until the system has taken all that was written.  Raises Disconnected when the
        client is gone, or reads so little that the system could take nothing more for
        `idle_secs`."""
        reads_on = True
        with contextlib.suppress(OSError):
            while reads_on:
                unread = self.transport.get_write_buffer_size()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.config.idle_secs):
                        await self.writer.drain()
                        return
                reads_on = self.transport.get_write_buffer_size() < unread
        raise Disconnected

    async def refuse(self, exchange: Exchange, error: ApiError) -> None:
        """Answer a request that is not read to its end, then read on for a moment:
        closing on unread bytes is a reset, which can overtake the answer."""
        exchange.closes = True
        try:
            await exchange.fail(error)
        finally:
            report(exchange)
        async with asyncio.timeout(LINGER_SECS):
            self.writer.write_eof()
            while await self.reader.read(READ_SIZE):
                pass

    async def wait_for_disconnect(self) -> None:
        """Return when the client closes its side.  One that would still read counts as gone
        too: until a write fails, nothing tells them apart.  Meanwhile keep what is sent ahead
        for the next request."""
        while len(self.http.trailing_data[0]) < READ_SIZE:
            data = await self.reader.read(READ_SIZE)
            self.http.receive_data(data)
            if not data:
                return
        # The buffer is full, so the end of the connection cannot be read: a write will fail.
        await asyncio.Event().wait()

    async def close(self) -> None:
        self.writer.close()
        try:
            async with asyncio.timeout(LINGER_SECS):
                await self.writer.wait_closed()
        except OSError as error:  # the client is gone, or does not read
            # asyncio keeps the error, and its traceback would keep the whole turn.
            error.__traceback__ = None
        finally:
            self.abort()

    def abort(self) -> None:
        """Drop what the client has not read."""
        # A transport that has sent all closes itself: asyncio fails to abort it then.
        if self.transport.get_write_buffer_size():
            self.transport.abort()


# ------------------------------------------------------------ the server

# Seconds at a shutdown: to send a 503 to requests that are cut short and, on an inherited
# socket, for new connections to send their request.
GRACE_SECS = 1.0
MODELS = "/v1/models"
# The header by which a client names its conversation.
SESSION_HEADER = "x-arch-claude-cli-session"
# What helps against an error of the API, by status.
HINTS = {
    401: "the API refused the CLI's login; `claude-cli-bridge check` says which one it is",
    404: f"GET {MODELS} lists the models that the CLI offers",
}
# Most places that a header or the log names, and characters of each, which are ASCII.
MAX_PLACES = 50
MAX_PLACE = 100


class Bridge:
    """A running server; made by `serve`."""

    def __init__(self, config: Config, pool: Pool) -> None:
        self.config = config
        self.pool = pool
        self.closing = False
        # The last requests, when and as they were logged, for the page; the newest first.
        self.recent: deque[tuple[str, str]] = deque(maxlen=RECENT)
        # Written by `listening`.  As clients reach it: host:port or unix:/path.
        self.addresses: list[str] = []
        # Written by `listening`.  Seconds at shutdown for connections that have sent nothing
        # yet; only with an inherited listener, where no client may be refused.
        self.grace_secs = 0.0
        self.connections: dict[asyncio.Task[None], Connection] = {}
        # Requests that are being answered.
        self.answers: set[asyncio.Task[None]] = set()
        self.health = Health()

    # Connections

    @property
    def url(self) -> str:
        """The base URL for clients on this machine."""
        return local_url(self.addresses[0])

    def accept(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if self.closing and not self.grace_secs:
            writer.transport.abort()  # accepted while the server was being closed
            return
        served = sum(not item.is_surplus for item in self.connections.values())
        is_surplus = served >= self.config.max_connections
        connection = Connection(self, reader, writer, is_surplus)
        task = asyncio.create_task(connection.serve())
        self.connections[task] = connection
        task.add_done_callback(self.connections.pop)

    async def close(self) -> None:
        """End all connections: those without a running answer now, the others when it is
        done or after `drain_secs`."""
        self.closing = True
        new = [
            task
            for task, connection in self.connections.items()
            if connection.answering is None
        ]
        if new and self.grace_secs:
            await asyncio.wait(new, timeout=self.grace_secs)
        # A task that is cancelled before it has begun would not close its connection.
        await asyncio.sleep(0)
        for task, connection in list(self.connections.items()):
            if not connection.answering:
                task.cancel()
        # A first cancel becomes a 503; where that cannot be sent in time, the next one
        # ends it.
        for seconds in (self.config.drain_secs, GRACE_SECS):
            if self.answers:
                await asyncio.wait(self.answers, timeout=seconds)
            self.cancel_answers()
        for connection in self.connections.values():
            connection.abort()  # its client still has not read the answer
        if self.connections:
            await asyncio.wait(self.connections)

    def cancel_answers(self) -> None:
        """Cut running answers short: each ends as a 503 if that can still be sent, at a second
        call without it, and is the last of its connection."""
        self.closing = True
        for answer in self.answers:
            answer.cancel()

    async def handle(self, exchange: Exchange) -> None:
        """Answer one request.  Raises Disconnected when the answer could not be
        completed."""
        connection = exchange.connection
        answer = asyncio.create_task(self.answer(exchange))
        gone = asyncio.create_task(connection.wait_for_disconnect())
        self.answers.add(answer)
        connection.answering = True
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            answer.cancel()
            error, _ = await asyncio.gather(answer, gone, return_exceptions=True)
            self.answers.discard(answer)
            connection.answering = False
            # It is cancelled by its client that left, or by a shutdown that waits no longer.
            if isinstance(error, (asyncio.CancelledError, Disconnected)):
                exchange.failure = "client_left"
            report(exchange)
        if error:
            if exchange.failure != "client_left":
                log.error("bug in request %s: %s", exchange.id, type(error).__name__)
            # Raising `error` itself would keep this frame, and with it the turn, alive.
            raise Disconnected

    async def answer(self, exchange: Exchange) -> None:
        """Route a request, and turn every failure into an answer."""
        try:
            if reply := await self.dispatch(exchange):
                await exchange.respond(reply)
            return
        except asyncio.CancelledError:
            if not self.closing:
                raise
            error = ApiError(503, "the bridge is shutting down; send the request again")
        except ApiError as failure:
            # Its traceback would keep this frame, and with it the turn, alive.
            error = failure.with_traceback(None)
            self.add_advice(error, exchange)
        except Disconnected:
            raise
        except Exception as bug:  # noqa: BLE001 - it must end as a 500 of this request alone
            # Without the message, which can hold a prompt.
            where = "".join(traceback.format_tb(bug.__traceback__))
            kind = type(bug).__name__
            log.error("bug in request %s: %s\n%s", exchange.id, kind, where)
            error = ApiError(500, "internal error of the bridge")
        await exchange.fail(error)

    def add_advice(self, error: ApiError, exchange: Exchange) -> None:
        """Log what helps against an error of the API, and leave its words alone; where
        nobody is logged in, say in the message itself what to do.  After a 401, deep health
        asks anew."""
        advice = ""
        if error.status == 401:
            # What was last heard about the login is out of date, and so is any answer
            # that is still on its way.
            self.health = Health()
        if translate.LOGIN_CURE in error.message:
            cure = translate.masked(login_state(self.config, CliInfo()))
            error.message = error.message.replace(translate.LOGIN_CURE, cure)
        elif "or newer is required" in error.message:
            advice = sessions.update_cure(self.pool.cli.program)
        elif error.is_from_api:
            advice = HINTS.get(error.status, "")
        if advice:
            log.warning("request %s: %s", exchange.id, advice)

    def headers(self, exchange: Exchange) -> dict[str, str]:
        """The headers of any answer; those without a value are not sent."""
        found = {"request-id": exchange.id, "allow": exchange.allow}
        if turn := exchange.turn:
            calls = turn.translator.api_calls
            reason = f"; reason={turn.reason}" if turn.reason else ""
            found |= {
                SESSION_HEADER: turn.session.id,
                "x-bridge-session": turn.origin + reason,
                "x-bridge-not-sent": limited(turn.not_sent),
                "x-bridge-api-calls": str(calls) if calls > 1 else "",
            }
            found |= translate.quota_headers(self.pool.cli.rate_limits)
        origin = exchange.header("origin")
        if origin in self.config.allowed_origins:
            found |= {
                "access-control-allow-origin": origin,
                "access-control-expose-headers": "*",
                "vary": "origin",
            }
        if self.closing or exchange.closes:
            found["connection"] = "close"
        return found

    # Routes

    async def dispatch(self, exchange: Exchange) -> Reply | None:
        """The answer of a route; None: it was streamed."""
        if not exchange.route:
            path = ascii(exchange.path[:MAX_LOGGED_PATH])
            raise ApiError(
                404,
                f"no route for {path}: this is the Anthropic Messages API, not OpenAI's "
                f"(LiteLLM can translate); the base URL is {self.url}",
            )
        methods, handler = ROUTES[exchange.route]
        if exchange.is_preflight:
            allowed = {
                "access-control-allow-methods": methods,
                # All but this one, which must be named (Fetch Standard, 3.3.3).
                "access-control-allow-headers": "*, authorization",
            }
            return Reply(b"", "text/plain", headers=allowed)
        if exchange.method not in methods.split(", "):
            exchange.allow = methods
            raise ApiError(405, f"{exchange.route} takes {methods}")
        encoding = exchange.header("content-encoding") or "identity"
        if encoding.lower() != "identity":
            raise ApiError(415, "compressed request bodies are not supported")
        return await handler(self, exchange)

    async def messages(self, exchange: Exchange) -> Reply | None:
        request = await self.parse(exchange)
        token = exchange.headers.get(SESSION_HEADER)
        # Two clients may use one session name.
        key = exchange.header("x-api-key"), exchange.header("authorization")
        key_digest = translate.digest(key)
        async with self.pool.turn(request, token, key_digest, exchange.id) as turn:
            exchange.turn, exchange.message = turn, turn.reason
            ping = request.stream and asyncio.create_task(exchange.ping())
            try:
                async for frames in turn.relay():
                    exchange.first_byte_at = exchange.first_byte_at or time.monotonic()
                    if ping and turn.translator.done:
                        ping.cancel()  # nothing comes after message_stop
                    if frames:
                        exchange.stream(frames)
                    await exchange.connection.drain()
            finally:
                if ping:
                    ping.cancel()
        if request.stream:
            await exchange.connection.finish()
            return None
        return Reply(orjson.dumps(turn.translator.message))

    async def parse(
        self, exchange: Exchange, *, counting: bool = False
    ) -> translate.Request:
        body = exchange.body
        # So that it is freed once it is parsed.
        exchange.body = b""
        request = await self.pool.threads.run(
            len(body),
            lambda: translate.parse_request(
                body,
                exchange.header("anthropic-beta"),
                counting=counting,
                agent=bool(self.config.tools),
            ),
        )
        cli_session = exchange.header("x-claude-code-session-id")
        if self.pool.is_own_process(f"{cli_session} {request.user_id}"):
            raise ApiError(
                400,
                "this request comes from the claude CLI that this bridge runs: "
                "its ANTHROPIC_BASE_URL is the bridge's own",
            )
        replaced = [
            name
            for name, sent in REPLACED_HEADERS.items()
            if exchange.header(name) not in ("", sent)
        ]
        return dataclasses.replace(request, not_sent=replaced + request.not_sent)


# Headers that mean something to the API and do not reach it, and what the CLI sends in
# their place; empty: nothing.
REPLACED_HEADERS = {
    "anthropic-user-profile-id": "",
    "anthropic-workspace-id": "",
    "anthropic-version": "2023-06-01",  # from each CLI that was tested
}


def limited(places: list[str]) -> str:
    """The first of many places: clients take 16 KiB of headers (Node), 64 KiB a line
    (Python)."""
    more = len(places) - MAX_PLACES
    rest = [f"and-{more}-more"] if more > 0 else []
    return ", ".join([place[:MAX_PLACE] for place in places[:MAX_PLACES]] + rest)


# ------------------------------------------------------------ other routes

# For /healthz?deep=1, in seconds: how long the CLI may take to answer (1.2 were measured),
# and how long an `ok` and a problem are kept, as each question starts a CLI.
INFO_SECS = 10.0
HEALTHY_SECS = 60.0
PROBLEM_SECS = 5.0
# Prometheus' text-based exposition format.
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# The page shows what it can without a script; nothing comes from elsewhere.
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"


@dataclass
class Health:
    """Whether the bridge could answer.  To find out, it starts a CLI and asks who is logged
    in, or takes the last report where there is no room; no model is called."""

    # What was wrong when it was asked last, and the monotonic time until which that is kept.
    last: str = ""
    good_until: float = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def problem(self, bridge: Bridge) -> str:
        """Empty: there is none."""
        pool, config = bridge.pool, bridge.config
        # Asking takes a process itself: who asks while that is done gets the same answer.
        if not (pool.room.has_place or self.lock.locked()):
            return f"all {config.max_sessions} processes are busy"
        async with self.lock:
            if time.monotonic() < self.good_until:
                return self.last
            problem = ""
            try:
                async with asyncio.timeout(INFO_SECS):
                    info = await pool.inspector.info(anew=True)
                if not info.login:
                    problem = login_state(config, info)
            except (ApiError, TimeoutError) as error:
                fault = str(error) or "no answer in time"
                problem = f"the claude CLI does not work: {fault}"
            seconds = PROBLEM_SECS if problem else HEALTHY_SECS
            self.good_until = time.monotonic() + seconds
            self.last = problem
            return problem


async def health(bridge: Bridge, exchange: Exchange) -> Reply:
    """`ok`; with ?deep=1 what is wrong, or `ok`."""
    is_deep = "deep=1" in re.split("[?&]", exchange.target)
    problem = await bridge.health.problem(bridge) if is_deep else ""
    if problem:
        exchange.failure, exchange.message = "unhealthy", problem[: sessions.MAX_LOGGED]
    body = (problem or "ok").encode(errors="replace")
    return Reply(body, "text/plain", 503 if problem else 200)


async def metrics(bridge: Bridge, exchange: Exchange) -> Reply:
    metrics = bridge.pool.metrics
    metrics.set("connections", len(bridge.connections))
    metrics.set("log_lines_lost_total", LogWriter.lost)
    metrics.set_gauges(bridge.pool)
    return Reply(metrics.text().encode(), METRICS_TYPE)


async def root(bridge: Bridge, exchange: Exchange) -> Reply:
    """The page for people; Claude Code as a client asks HEAD / first."""
    kind, page = "plain", page_text(bridge)
    if "text/html" in exchange.header("accept"):
        kind, page = "html", PAGE.format(html.escape(page))
    headers = {"content-security-policy": PAGE_POLICY}
    body = page.encode(errors="replace")
    return Reply(body, f"text/{kind}; charset=utf-8", headers=headers)


async def count_tokens(bridge: Bridge, exchange: Exchange) -> Reply:
    request = await bridge.parse(exchange, counting=True)
    tokens = await sessions.count_tokens(bridge.pool, request, exchange.id)
    headers = {"x-bridge-not-counted": limited(translate.not_counted(request))}
    return Reply(orjson.dumps({"input_tokens": tokens}), headers=headers)


async def models(bridge: Bridge, exchange: Exchange) -> Reply:
    """One model, by id or alias, with or without claude-cli/, or all of them as one
    page (API: "List models")."""
    models = model_list(await bridge.pool.inspector.info())
    prefix = translate.MODEL_PREFIX
    name = unquote(exchange.path.removeprefix(MODELS)).lstrip("/")
    for wanted in (name, prefix + name, name.removeprefix(prefix)):
        if wanted in models:
            return Reply(orjson.dumps(models[wanted]))
    if name:
        raise ApiError(404, f"model: {name}", log_reason="no such model")
    names: list[Any] = list(models) or [None]
    page = {
        "data": list(models.values()),
        "has_more": False,
        "first_id": names[0],
        "last_id": names[-1],
    }
    return Reply(orjson.dumps(page))


def model_list(info: CliInfo) -> dict[str, Json]:
    """The CLI's own models by name, in the API's shape: each under its full name (all
    that Claude Code's discovery keeps) and as claude-cli/<alias>."""
    found: dict[str, Json] = {}
    for model in info.models:
        for name in (model.full_name, translate.MODEL_PREFIX + model.name):
            found.setdefault(
                name,
                {
                    "type": "model",
                    "id": name,
                    "display_name": model.title or name,
                    # API: the epoch when the release date is not known.
                    "created_at": "1970-01-01T00:00:00Z",
                    "lifecycle": "active",
                    # The API's `capabilities` need more than the CLI knows.
                    "claude_cli": model.support,
                },
            )
    return found


Handler = Callable[[Bridge, Exchange], Awaitable[Reply | None]]
# By route, its methods and what answers it.
ROUTES: dict[str, tuple[str, Handler]] = {
    "/": ("GET, HEAD", root),
    "/healthz": ("GET, HEAD", health),
    "/metrics": ("GET, HEAD", metrics),
    MODELS: ("GET, HEAD", models),
    "/v1/messages": ("POST", Bridge.messages),
    "/v1/messages/count_tokens": ("POST", count_tokens),
}


# ------------------------------------------------------------ the log of requests

# Characters of an unknown path in the log.
MAX_LOGGED_PATH = 100
# How many requests the page shows; of these routes, only those that failed.
RECENT = 20
QUIET_ROUTES = ("/", "/healthz", "/metrics")


def report(exchange: Exchange) -> None:
    """Log one line for one request, and count it; never a prompt or an answer."""
    bridge, turn = exchange.connection.bridge, exchange.turn
    row = log_row(exchange)
    text = " ".join(f"{name}={quoted(value)}" for name, value in row.items())
    log.info("%s", text, extra={"row": row})
    is_of_interest = exchange.failure or exchange.route not in QUIET_ROUTES
    # Those who may not ask do not push others off the page.
    if exchange.is_allowed and is_of_interest:
        bridge.recent.appendleft((time.strftime("%H:%M:%S"), text))
    metrics = bridge.pool.metrics
    route = exchange.route or "none"
    metrics.add("requests_total", route=route, status=row["status"])
    if exchange.failure:
        metrics.add("errors_total", type=exchange.failure)
    if "first_byte_secs" in row:
        metrics.observe("first_byte_seconds", row["first_byte_secs"])
    if turn:
        metrics.add("turns_total", conversation=turn.origin, reason=turn.reason)
        metrics.observe("turn_seconds", row["secs"])
    for kind in row.keys() & translate.TOKENS:
        metrics.add("tokens_total", row[kind], kind=kind.removesuffix("_tokens"))


def log_row(exchange: Exchange) -> Json:
    """What the log says of a request."""
    place = "route" if exchange.route else "path"
    path = exchange.route or translate.masked(exchange.path)[:MAX_LOGGED_PATH] or None
    row: Json = {"request_id": exchange.id, place: path}
    used: Json = {}
    if turn := exchange.turn:
        calls = turn.translator.api_calls
        used = turn.translator.message.get("usage", {})
        row |= {
            # Whoever reads the log cannot go on with the conversation.
            "session": translate.digest(turn.session.id)[:12],
            "conversation": turn.origin,
            "model": turn.request.model,
            "not_sent": limited(turn.not_sent) or None,
            "api_calls": calls if calls > 1 else None,
        }
    row |= {
        # nginx's number for a client that left before there was a status.
        "status": exchange.status or 499,
        "error": exchange.failure or None,
        "reason": exchange.message or None,
    }
    if exchange.first_byte_at:
        row["first_byte_secs"] = round(exchange.first_byte_at - exchange.began, 3)
    row["secs"] = round(time.monotonic() - exchange.began, 3)
    row |= {kind: used.get(kind) for kind in translate.TOKENS}
    return translate.without_nulls(row)


def quoted(value: object) -> str:
    """A value of the log: as it is if it is one word, else as JSON, in ASCII, so that
    it holds no escape sequences of a terminal."""
    text = str(value)
    is_word = escaped(text) == text and " " not in text
    return text if is_word else json.dumps(text)


def escaped(text: str) -> str:
    """A text in ASCII, with the escapes of JSON."""
    return json.dumps(text)[1:-1]


def shown(text: str) -> str:
    """A text for the page: escaped, unless it is plain ASCII, as a line of the log is."""
    return text if text.isascii() and text.isprintable() else escaped(text)


# ------------------------------------------------------------ serve


@contextlib.asynccontextmanager
async def serve(
    config: Config, sock: socket.socket | None = None
) -> AsyncIterator[Bridge]:
    """Run the bridge inside an asyncio program until the block ends.

    `sock` is a listening socket to use instead of `config.listen_addr`.  Raises
    ConfigError, which names the setting, for invalid settings and an address that
    cannot be bound.  At the end no new request is taken, running answers get
    `config.drain_secs`, and no child is left.
    """
    if sock:
        # Clients may name its address as their Host.
        config = dataclasses.replace(config, listen_addr=address_of(sock))
    config = config.checked()
    stack = contextlib.AsyncExitStack()
    bridge = Bridge(config, await stack.enter_async_context(Pool(config)))
    try:
        try:
            await stack.enter_async_context(listening(bridge, sock))
        except (OSError, ValueError) as error:
            message = f"cannot listen on {config.listen_addr}: {error}"
            raise config_error("listen_addr", message) from error
        yield bridge
    finally:
        # This ends even if it is cancelled: each cancel cuts running answers short, and is
        # raised at the end.
        ending = asyncio.create_task(stack.aclose())
        is_cancelled = False
        while not ending.done():
            try:
                await asyncio.wait({ending})
            except asyncio.CancelledError:
                is_cancelled = True
                bridge.cancel_answers()
        ending.result()
        if is_cancelled:
            raise asyncio.CancelledError


@contextlib.asynccontextmanager
async def listening(bridge: Bridge, sock: socket.socket | None) -> AsyncIterator[None]:
    """Let clients connect until the block ends; then accept nothing more, let the bridge
    end its answers and connections, and remove its Unix socket.

    Sets the addresses and `grace_secs` of the bridge.  Raises OSError when the address is
    taken, or cannot be had.
    """
    path = bridge.config.unix_path
    bridge.grace_secs = GRACE_SECS if sock else 0.0
    socket_file = None
    if not sock and path:
        sock = bind_unix(path)
        socket_file = sessions.identify_file(path)
    host, port = (None, None) if sock else bridge.config.address
    # `start_unix_server` would unlink a service manager's path at its end (3.13).
    server = await asyncio.start_server(
        bridge.accept, host, port, sock=sock, start_serving=False
    )
    bridge.addresses += map(address_of, server.sockets)
    try:
        await server.start_serving()
        yield
    finally:
        loop = asyncio.get_running_loop()
        for listener in server.sockets:
            loop.remove_reader(listener.fileno())
        for _ in range(3):
            # asyncio needs three loop iterations after accept(): closing sooner drops
            # the connection.
            await asyncio.sleep(0)
        server.close()
        await bridge.close()
        # Not the socket of another bridge that has taken the path meanwhile.
        if socket_file and sessions.identify_file(path) == socket_file:
            os.unlink(path)


def address_of(listener: socket.socket) -> str:
    """As clients reach it: host:port or unix:/path."""
    name = listener.getsockname()
    if listener.family != socket.AF_UNIX:
        return host_and_port(*name[:2])
    # Of an abstract name (unix(7)) the first byte is NUL; a socket may have no name.
    return "unix:" + (os.fsdecode(name).replace("\0", "@") or "@")


def bind_unix(path: str) -> socket.socket:
    """A socket at a path that only this user can connect to.  Raises OSError.

    Nobody can connect before it listens, so its mode is right by then.  It listens at once:
    one that does not listen is taken for what a killed bridge left, and is replaced.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise OSError("what is there is no socket")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            if probe.connect_ex(path) != errno.ECONNREFUSED:
                raise OSError("already in use (another bridge?); choose another")
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.bind(path)
        os.chmod(path, 0o600)
        sock.listen()
    except BaseException:
        sock.close()
        raise
    return sock


# ------------------------------------------------------------ the program

# Lines that wait for a slow reader of the log.
MAX_LOG_LINES = 1000


class LogWriter(logging.Handler):
    """Writes lines to stderr from a thread: when nobody reads it, lines are lost and
    answers go on."""

    # Lines that were lost, by all writers.
    lost = 0

    def __init__(self) -> None:
        super().__init__()
        self._lines: queue.Queue[bytes] = queue.Queue(MAX_LOG_LINES)
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record).encode(errors="replace")
            self._lines.put_nowait(line + b"\n")
        except queue.Full:
            LogWriter.lost += 1

    def close(self) -> None:
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(b"")
        self._thread.join(1)
        super().close()

    def _write(self) -> None:
        while line := self._lines.get():
            try:
                while line:
                    line = line[os.write(2, line) :]
            except OSError:
                LogWriter.lost += 1


class JsonFormatter(logging.Formatter):
    """One JSON object a line; a request's fields are its keys."""

    def format(self, record: logging.LogRecord) -> str:
        row = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname,
        }
        # Without keys, and as UTF-8: the path of a file can hold other bytes.
        message = translate.masked(record.getMessage())
        row |= getattr(record, "row", None) or {"message": message}
        return json.dumps(row, separators=(",", ":"))


# Seconds to wait before the CLI is asked who is logged in: a first request may make the
# question needless.
LOGIN_PROBE_SECS = 2.0
NO_VERSION = "unknown: `--version` prints none, so it may not be Claude Code"
# Tools of the CLI, to suggest one for a misspelt name.
TOOLS = (
    "Agent",
    "Bash",
    "Edit",
    "Glob",
    "Grep",
    "NotebookEdit",
    "Read",
    "Skill",
    "WebFetch",
    "WebSearch",
    "Write",
)
SMALLEST_REQUEST = (
    b'{"model": "sonnet", "messages": [{"role": "user", "content": "-"}]}'
)


async def announce(bridge: Bridge) -> None:
    """Say which CLI it is, who is logged in, and what of the agent's settings the CLI
    does not have.  Asks the CLI, which makes no model call for it."""
    config, pool = bridge.config, bridge.pool
    try:
        cli = await pool.inspector.look()
        version = cli.version or NO_VERSION
        log.info("the claude CLI is %s, version %s", config.bin, version)
        if cli.warning:
            log.warning("%s", cli.warning)
        if config.spares and pool.inspector.may_run_any:
            # A first request would wait for what the CLI announces.
            is_agent, is_bare = bool(config.tools), pool.inspector.is_bare()
            kind = sessions.Kind(agent=is_agent, bare=is_bare)
            await pool.inspector.announcements_for(sessions.PROBE_MODEL, kind)
        await asyncio.sleep(LOGIN_PROBE_SECS)
        info = await pool.inspector.info()
        state = login_state(config, info)
        if info.login:
            log.info("the claude CLI is logged in: %s", state)
        else:
            log.warning("%s", state)
        for message in await missing_from_agent(pool):
            log.warning("%s", message)
    except ApiError as error:
        if error.status == 529:
            return  # there is no room for a question of its own
        message = "the claude CLI (%s) cannot be used: %s"
        log.warning(message, config.bin, error.message)


async def missing_from_agent(pool: Pool) -> list[str]:
    """The agent's tools that the CLI does not have, and the MCP servers that it could
    not start, as it reports them at the start of a conversation.  Raises ApiError."""
    if not pool.config.tools:
        return []
    request = translate.parse_request(SMALLEST_REQUEST, counting=True, agent=True)
    session = await pool.starter.fresh_session(request)
    try:
        init = await session.process.read_until(
            lambda event: event.get("subtype") == "init" and event
        )
    finally:
        pool.room.retire(session, "probe")
    # `default` is all of them, and the CLI lists Agent as Task.
    known = ["default", "Agent", *init.get("tools", [])]
    found = [
        f"{variable('tools')}: the CLI has no tool {name}"
        + ("" if name in TOOLS else did_you_mean(name, TOOLS))
        for name in re.findall("[^, ]+", pool.config.tools)
        if name not in known
    ]
    for server in init.get("mcp_servers", []):
        name, status = server["name"], server["status"]
        if status not in ("connected", "pending"):
            found.append(f"the MCP server {name} is not there: {status}")
    return found


def inherited_socket() -> socket.socket | None:
    """The socket of a service manager (sd_listen_fds(3)): it goes on listening while
    the bridge restarts."""
    if os.environ.pop("LISTEN_PID", "") != str(os.getpid()):
        return None
    if os.environ.get("LISTEN_FDS") != "1":
        raise ConfigError("LISTEN_FDS: expected one socket")
    try:
        os.set_inheritable(3, False)
        return socket.socket(fileno=3)
    except OSError as error:
        message = f"LISTEN_FDS: descriptor 3 is no socket: {error.strerror}"
        raise ConfigError(message) from error


async def run(config: Config) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP; a second one cuts running answers
    short."""
    stopping = asyncio.Event()
    bridge: Bridge | None = None

    def signalled() -> None:
        if stopping.is_set() and bridge:
            bridge.cancel_answers()
        stopping.set()

    # First of all: a signal without a handler would leave processes behind.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            asyncio.get_running_loop().add_signal_handler(number, signalled)
    async with serve(config, inherited_socket()) as started:
        bridge = started
        for address in bridge.addresses:
            log.info("listening on %s", as_url(address))
        for message in bridge.config.warnings(os.environ):
            log.warning("%s", message)
        announcing = asyncio.create_task(announce(bridge))
        await stopping.wait()
        log.info(
            "shutting down; running answers: %d, which get %g s (Ctrl-C again stops them)",
            len(bridge.answers),
            config.drain_secs,
        )
        announcing.cancel()
        await asyncio.wait({announcing})


# What each command does, for its own --help.
COMMANDS = {
    "check": """\
usage: claude-cli-bridge check [--SETTING VALUE]...

Says whether the CLI is there, logged in, and does what is needed.  It asks the
CLI two questions in front of a fake API on loopback, which costs nothing, and
takes the settings of the bridge.  Exit status 0: all of it works.
""",
    "login": """\
usage: claude-cli-bridge login [--bin CLI]

Logs the CLI in, in this terminal: it runs `claude auth login` with the CLI that
the bridge runs, for the user who runs it.
""",
    "providers": """\
usage: claude-cli-bridge providers --config FILE [--SETTING VALUE]...

Prints the model_providers of a gateway's file (TOML, JSON or YAML) as JSON,
those of claude-cli with the address and key of a bridge with these settings.
""",
}
HELP = """\
usage: claude-cli-bridge [check | login | providers] [--SETTING VALUE]...

Answers the Anthropic Messages API with the claude CLI.

commands, each with a --help of its own (without one it serves):
  check       say whether the CLI is there, logged in, and does what is needed
  login       log the CLI in, in this terminal
  providers   print the model_providers of a gateway's file, completed

options:
  --config    a gateway's file: start only if it has a claude-cli provider
  --help, -h  print this
  --version   print the version

Each setting is also an environment variable: --max-idle is CLAUDE_CLI_MAX_IDLE.
CLAUDE_CLI_API_KEY has no flag: all users can see a command line.
"""
VALUE_HINT = "; a value with spaces needs quotes; see --help"
GROUPS = ("everyday", "access", "processes", "agent mode", "limits")


def help_text() -> str:
    lines = [HELP]
    for group in GROUPS:
        lines.append(f"{group.capitalize()}:")
        for item in dataclasses.fields(Config):
            if item.metadata["group"] == group and item.repr:
                default = f" [{item.default}]" if item.default else ""
                meaning = item.metadata["meaning"].replace("`", "") + default
                start = f"  {flag(item.name):20} "
                lines += textwrap.wrap(
                    meaning, 80, initial_indent=start, subsequent_indent=" " * 23
                )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """The command line.

    Exit status 2 and one line on stderr for settings that cannot work, 1 for a failed
    check, 130 after Ctrl-C in a command, 141 if nobody reads what is printed; 0 otherwise,
    also for a bridge that Ctrl-C ends.
    """
    open_standard_files()
    flags: dict[str, str] = {}
    try:
        try:
            read_flags(sys.argv[1:], flags)
            execute(flags)
        finally:
            if sys.stdout:  # None: it was closed at the start
                sys.stdout.flush()
    except ConfigError as error:
        print(f"claude-cli-bridge: {as_typed(str(error), flags)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Python would write the rest at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)


def open_standard_files() -> None:
    """Open /dev/null in place of those that a launcher closed: the next file opened
    would be one of them, and get the log."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


# Enough descriptors for all processes, with three pipes and a gate each, and for all
# connections.
WANTED_FILES = 65_536


def reset_inherited_state() -> None:
    """Undo what a launcher may have set for its children: blocked signals, an ignored
    SIGCHLD, with which the end of a child is not noticed, and a low limit of open files.
    From now on children are watched without threads."""
    sessions.watch_without_threads()
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(hard, WANTED_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError):  # macOS may have a lower one for all
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# mallopt(3): M_MMAP_THRESHOLD, and the bytes of a block that is large.
MMAP_THRESHOLD = (-3, 256 << 10)


def give_back_memory() -> None:
    """Let the C library give each large block back to the system when it is freed.  It
    would keep up to 32 MB of them for later (tests/soak.py)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it
    if mallopt:
        mallopt(*MMAP_THRESHOLD)


def read_flags(words: list[str], flags: dict[str, str]) -> None:
    """Read the command, if there is one, and the flags that are given, by setting.
    Raises ConfigError, which repeats no unknown word but the name of a flag: it may be a
    key."""
    settings = [item.name for item in dataclasses.fields(Config) if item.repr]
    names = {flag(name): name for name in [*settings, "config"]}
    rest = iter(words)
    for word in rest:
        name, is_joined, value = word.partition("=")
        command = flags.get("command", "")
        if name in ("--help", "-h"):
            print(COMMANDS.get(command) or help_text(), end="")
            sys.exit()
        if name == "--version":
            print(f"claude-cli-bridge {__version__}")
            sys.exit()
        if name in names:
            if not is_joined:
                value = next(rest, "--")
            if value.startswith("--"):
                raise ConfigError(f"{name} takes a value; see --help")
            flags[names[name]] = value
        elif name.startswith("-"):
            hint = suggestion(name, [*names, "--help", "--version"]) or "; see --help"
            raise ConfigError(as_typed(f"there is no {name}{hint}", names.values()))
        elif command:
            raise ConfigError(f"{command} takes nothing but flags; see --help")
        elif word in COMMANDS:
            flags["command"] = word
        else:
            hint = suggestion(word, COMMANDS) or VALUE_HINT
            raise ConfigError(f"there is no such command{hint}")


def execute(flags: Mapping[str, str]) -> None:
    """Do what a command line asks for.  Raises ConfigError."""
    config = Config.read(os.environ, flags)
    command = flags.get("command")
    path = flags.get("config", os.environ.get(variable("config"), ""))
    if command == "check":
        reset_inherited_state()
        sys.exit(0 if asyncio.run(check(config)) else 1)
    if command == "login":
        program = find_cli(config.bin)
        try:
            os.execv(program, [program, "auth", "login"])
        except OSError as error:  # such as a script without #!
            raise config_error("bin", f"{program!r} cannot be run: {error}") from None
    providers = read_providers(path, config) if path else []
    if command == "providers":
        if not path:
            message = "providers needs a gateway's file: --config FILE"
            raise config_error("config", message)
        print(orjson.dumps(providers, option=orjson.OPT_INDENT_2).decode())
        return
    writer = LogWriter()
    if config.log_format == "json":
        writer.setFormatter(JsonFormatter())
    text = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(level=logging.INFO, format=text, handlers=[writer])
    if config.log_level == "debug":
        log.setLevel(logging.DEBUG)  # and not that of libraries
    if path and not any(map(is_claude_cli, providers)):
        log.info("there is no claude-cli provider in %s: nothing to do", path)
        return
    reset_inherited_state()
    # A thread that reads a large request gives way to the event loop sooner (5 ms by
    # default): tests/bench/hostile.py.
    sys.setswitchinterval(0.001)
    give_back_memory()
    asyncio.run(run(config))


# ------------------------------------------------------------ appendix: the page

PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="refresh" content="10">
<title>claude-cli-bridge</title>
<style>
  :root {{ color-scheme: light dark }}
  pre {{ font-size: 15px; white-space: pre-wrap; overflow-wrap: anywhere }}
</style>
<pre>{}</pre>
</html>
"""
EXPORTS = """\
export ANTHROPIC_BASE_URL={url}
export ANTHROPIC_API_KEY={key}

"""
CURL = """\
curl {url}/v1/messages \\
  -H 'content-type: application/json' -H "x-api-key: {key}" \\
  -d '{{"model": "sonnet", "max_tokens": 100,
       "messages": [{{"role": "user", "content": "Say hello."}}]}}'
"""


def connect_lines(bridge: Bridge) -> str:
    """What a shell takes to reach the bridge: two variables for most clients, and a
    first request."""
    key = f"${variable('api_key')}" if bridge.config.api_key else KEY_OF_CLIENTS
    if path := bridge.config.unix_path:
        url = f"--unix-socket {shlex.quote(path)} http://localhost"
        return CURL.format(url=url, key=key)
    return (EXPORTS + CURL).format(url=bridge.url, key=key)


def page_text(bridge: Bridge) -> str:
    """What the page says.  Nothing that was asked or answered."""
    pool, config = bridge.pool, bridge.config
    cli = pool.cli
    login = login_state(config, cli.info) if cli.info.is_known else "not known yet"
    quota = []
    for limit_name, limit in cli.rate_limits.items():
        used = "not known" if limit.utilization is None else limit.utilization
        quota.append((limit_name, f"{limit.status}, used: {used}"))
    sections = {
        "State": [
            ("version", __version__),
            ("claude CLI", config.bin),
            (
                "its version",
                cli.problem or cli.warning or cli.version or "not known yet",
            ),
            ("login", login),
        ],
        "Last requests": list(bridge.recent),
        "Processes": [
            (item.state.value, f"for {item.state_secs:.0f} s; turns: {item.turns}")
            for item in pool.room.in_states(*sessions.State)
        ],
        "Quota of the account": quota,
    }
    connect = textwrap.indent(connect_lines(bridge), "  ")
    parts = [f"claude-cli-bridge\n\nConnect\n{connect}"]
    for title, rows in sections.items():
        parts.append(f"\n{title}\n")
        for name, value in rows or [("none", "")]:
            parts.append(f"  {shown(name):36} {shown(value)}\n")
    return "".join(parts)


# ------------------------------------------------------------ appendix: providers

# The lists of a gateway's file that hold providers; the second one is older.
PROVIDER_LISTS = ("model_providers", "llm_providers")
NO_PROVIDERS = (
    "model_providers: this is for the file of a gateway that the bridge serves; settings "
    "are flags, or variables of the environment"
)
INTERFACE = "claude-cli"


def read_providers(path: str, config: Config) -> list[Json]:
    """The `model_providers` of a gateway's configuration file: those of claude-cli
    completed, others as they are.

    TOML, YAML where PyYAML is installed, or else JSON.  Raises ConfigError, which names
    the place.
    """
    try:
        document = read_document(Path(path))
        lists = [document[name] for name in PROVIDER_LISTS if name in document]
        entries = [entry for found in lists for entry in found or ()]
        # TOML and YAML have numbers, keys and depths that JSON has not.
        orjson.dumps(entries)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise config_error("config", f"{path} cannot be read: {error}") from None
    if not lists:
        raise config_error("config", f"{path} has no {NO_PROVIDERS}")
    if not all(isinstance(entry, dict) for entry in entries):
        message = f"{path}: model_providers must be a list of tables"
        raise config_error("config", message)
    return [
        complete_entry(entry, config) if is_claude_cli(entry) else entry
        for entry in entries
    ]


def read_document(path: Path) -> Json:
    """The content of a file.  Raises OSError, or ValueError."""
    data = path.read_bytes()
    kind = path.suffix.lower()
    document: Any
    if kind == ".toml":
        document = tomllib.loads(data.decode())
    elif kind in (".yaml", ".yml"):
        document = load_yaml(data)
    else:
        document = orjson.loads(data)
    return document or {}


def load_yaml(data: bytes) -> Any:
    """Raises ValueError, which holds no line of the file: there can be a key in it."""
    try:
        yaml = importlib.import_module("yaml")
        return yaml.safe_load(data)
    except ModuleNotFoundError:
        fault = "YAML needs a package: `pip install PyYAML`; TOML and JSON need none"
    except Exception as error:  # noqa: BLE001 - PyYAML raises KeyError and others, with the value in it
        mark = getattr(error, "problem_mark", None)
        fault = f"not YAML, line {mark.line + 1}" if mark else "not YAML"
    raise ValueError(fault)


def is_claude_cli(entry: Json) -> bool:
    """Whether a provider is a claude-cli one: by its model or name, or by its
    interface."""
    is_named = any(
        str(entry.get(name)).startswith(translate.MODEL_PREFIX)
        for name in ("model", "name")
    )
    return is_named or entry.get("provider_interface") == INTERFACE


def complete_entry(entry: Json, config: Config) -> Json:
    """A provider with what it leaves out; what it has stays."""
    given = translate.without_nulls(entry)
    completed = {
        "base_url": config.base_url,
        "name": given.get("model", translate.MODEL_PREFIX + "*"),
        "provider_interface": INTERFACE,
        "access_key": KEY_OF_GATEWAYS,
    }
    if config.api_key:
        completed["access_key"] = f"${variable('api_key')}"
    if given.get("passthrough_auth"):
        del completed["access_key"]
    if "http_host" in given:
        del completed["base_url"]
    return completed | given


# ------------------------------------------------------------ appendix: check

# Most seconds of a `check`; 2 were measured for its rehearsal.
CHECK_SECS = 60.0
# What the rehearsal looks at, and what does not work without it.
FEATURES = {
    "history": "goes on with a conversation that it is given",
    "settings": "takes parameters and a system prompt for one request",
    "tools": "hands over calls of a client's tools",
    "interrupt": "stops when the client leaves",
}
# The two questions of the rehearsal; the second one adds RESULT.  An administrator's
# settings can name another API: none has this model, so it costs nothing.
REQUEST = b"""{
    "model": "no-such-model", "max_tokens": 99, "temperature": 0.5, "system": "white",
    "tools": [{"name": "probe", "input_schema": {"type": "object"}}],
    "messages": [%b]
}"""
HISTORY = b"""
    {"role": "user", "content": "red"},
    {"role": "assistant", "content": "green"},
    {"role": "user", "content": "blue"}
"""
RESULT = b""",
    {"role": "assistant", "content": [
        {"type": "tool_use", "id": "toolu_1", "name": "probe", "input": {}}]},
    {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "toolu_1", "content": "violet"}]}
"""
# The answers: the first one is BEGIN and CALL, the second one BEGIN, and then nothing.
BEGIN = b"""\
event: message_start
data: {"type": "message_start", "message": {"id": "msg_1", "type": "message",
data: "role": "assistant", "content": [], "model": "no-such-model",
data: "usage": {"input_tokens": 1, "output_tokens": 1}}}

"""
CALL = b"""\
event: content_block_start
data: {"type": "content_block_start", "index": 0, "content_block":
data: {"type": "tool_use", "id": "toolu_1", "name": "probe", "input": {}}}

event: content_block_stop
data: {"type": "content_block_stop", "index": 0}

event: message_delta
data: {"type": "message_delta", "delta": {"stop_reason": "tool_use"},
data: "usage": {"output_tokens": 1}}

event: message_stop
data: {"type": "message_stop"}

"""


class FakeApi(Bridge):
    """The fake API that `check` starts on loopback; it costs nothing.  It notes which
    FEATURES the CLI has.  The CLI that calls it belongs to another pool; its own pool
    starts no process."""

    def __init__(self) -> None:
        config = Config(listen_addr="127.0.0.1:0", api_key=uuid.uuid4().hex)
        super().__init__(config, Pool(config))
        self.found = dict.fromkeys(FEATURES, False)
        # The client of the second answer is gone.
        self.left = asyncio.Event()

    async def dispatch(self, exchange: Exchange) -> Reply | None:
        if exchange.route != "/v1/messages":
            return Reply(b"{}")
        asked = orjson.loads(exchange.body)
        messages = str(asked["messages"])
        if "toolu_1" in messages:
            self.found["tools"] = "violet" in messages
            exchange.stream(BEGIN)
            try:
                # This never returns: its client leaves, which cancels it.
                await asyncio.Event().wait()
            finally:
                self.left.set()
        # `str` has each text in quotes.
        words = re.findall("'(red|green|blue)'", messages)
        self.found["history"] = words == ["red", "green", "blue"]
        has_system = "white" in str(asked.get("system"))
        self.found["settings"] = has_system and asked.get("temperature") == 0.5
        exchange.stream(BEGIN + CALL)
        await exchange.connection.finish()
        return None

    async def run_scenario(self, pool: Pool) -> None:
        """Raises ApiError when a turn fails."""
        request = translate.parse_request(REQUEST % HISTORY)
        async with pool.turn(request, None) as turn:
            async for _ in turn.relay():
                pass
        request = translate.parse_request(REQUEST % (HISTORY + RESULT))
        async with pool.turn(request, None) as turn:
            await anext(turn.relay(), None)  # the second answer has begun
            # A turn that is not hot got the result as part of a new conversation.
            self.found["tools"] &= turn.origin == "hot"
            turn.process.interrupt()
            await self.left.wait()
            self.found["interrupt"] = not turn.process.ended


async def rehearse(config: Config, api: FakeApi) -> None:
    """Play the scenario of a FakeApi, with an empty home: the user's files must supply
    neither a login nor another address."""
    with tempfile.TemporaryDirectory() as home:
        async with listening(api, None):
            kept = {
                "ANTHROPIC_BASE_URL": api.url,
                "ANTHROPIC_API_KEY": api.config.api_key,
                "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            }
            others = {
                "HOME": home,
                "CLAUDE_CONFIG_DIR": home,
                "NO_PROXY": "127.0.0.1",
                "no_proxy": "127.0.0.1",
            }
            config = dataclasses.replace(
                config, keep_env=tuple(kept), setting_sources="", tools=""
            )
            async with Pool(config, os.environ | kept | others) as pool:
                await api.run_scenario(pool)


async def check(config: Config) -> bool:
    """Print in plain words whether the CLI is there, is logged in and does what is
    needed; True if all is well.  It costs no token.  Raises ConfigError."""
    config = dataclasses.replace(config.checked(), spares=0)
    for warning in config.warnings(os.environ):
        print(f"warning: {warning}")
    limit = min(CHECK_SECS, 2 * config.watchdog_secs)  # of its two turns
    print(f"CLI: {config.bin}")
    print(f"time: up to {limit:g} seconds", flush=True)
    info = CliInfo()
    api = FakeApi()
    try:
        async with asyncio.timeout(limit):
            async with Pool(config) as pool:
                cli = await pool.inspector.look()
                info = await pool.inspector.info()
                for warning in await missing_from_agent(pool):
                    print(f"warning: {warning}")
            print(f"login: {login_state(config, info)}")
            print(f"version: {cli.warning or cli.version or NO_VERSION}", flush=True)
            await rehearse(config, api)
    except (ApiError, OSError) as error:  # TimeoutError among them
        print(f"failure: {str(error) or 'no answer in time'}")
    for name, meaning in FEATURES.items():
        fault = f"does not work: there is no sign that this CLI {meaning}"
        print(f"{name}: {'works' if api.found[name] else fault}")
    return all([info.login, *api.found.values()])


if __name__ == "__main__":
    main()
