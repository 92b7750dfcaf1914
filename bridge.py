"""The HTTP server of the bridge.

To embed it in an asyncio program: `async with serve(Config()) as bridge: ...`.

A request passes through these sections of the three files, in this order:

    bridge.py     a connection     bytes become an Exchange, by h11
                  access           who may ask
                  the server       its route; failures become answers
    translate.py  requests         a body becomes a Request
                  messages         what the API or the CLI would not take as it is
                  fingerprints     by which a process is found that holds the history
    sessions.py   all of them      such a process, or a fresh one
                  a conversation   what it is asked
    translate.py  to the CLI       as lines, and as rows of a transcript
    sessions.py   a child          which are written to it
                  a process        what it prints is read, and its requests answered
    translate.py  from the CLI     lines become events
                  translation      which become those of a Messages stream
    bridge.py     a connection     that go to the client
    sessions.py   all of them      and the process rests, or is ended

What is not on this way stands after it: models, `serve`, the program, and in each file
what is called an appendix.
"""

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import difflib
import email.utils
import errno
import hashlib
import hmac
import html
import http.client
import importlib
import importlib.util
import ipaddress
import logging
import math
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
from collections import deque
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
)
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import parse_qsl, unquote, urlsplit

import h11
import orjson

if sys.platform == "win32":
    sys.exit("claude-cli-bridge runs on Linux and macOS; on Windows use WSL")
if TYPE_CHECKING or not __package__:
    import translate
    from sessions import (
        PROBE_MODEL,
        Counter,
        Pool,
        PoolConfig,
        Turn,
        login_folder,
        setting,
        settings_file,
        update_cure,
        watch_without_threads,
    )
    from translate import ApiError, Json, check_type
else:  # copied into a package
    from . import translate
    from .sessions import (
        PROBE_MODEL,
        Counter,
        Pool,
        PoolConfig,
        Turn,
        login_folder,
        setting,
        settings_file,
        update_cure,
        watch_without_threads,
    )
    from .translate import ApiError, Json, check_type

__version__ = "0.2.0"
log = logging.getLogger("claude_cli_bridge")

# ------------------------------------------------------------ settings

ENVIRONMENT_PREFIX = "CLAUDE_CLI_"
MAX_PORT = 65_535
NOT_WRITABLE = "is not a folder that can be written"


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it."""


@dataclass(frozen=True, kw_only=True)
class Config(PoolConfig):
    """All settings.

    The environment variable CLAUDE_CLI_NAME, the flag --name and the field name are the
    same.
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
        "`debug` adds what was decided for each request, and what the CLI complains of",
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
        "bytes of a request's body; more get 413, unread; the API's own limit",
        "limits",
        least=1,
    )
    max_connections: int = setting(
        1000,
        "open connections, each with a file descriptor and a body; more get 503",
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
        "seconds after which a connection is closed that is unused, or whose client "
        "reads nothing",
        "limits",
        least=0.01,
    )

    @classmethod
    def read(cls, environ: Mapping[str, str], flags: Mapping[str, str]) -> "Config":
        """Settings from flags, else from the environment.  Raises ConfigError, which
        names one."""
        values: dict[str, Any] = {}
        for item in dataclasses.fields(cls):
            text = flags.get(item.name)
            if text is None:
                text = environ.get(variable(item.name), "")
            if text:
                values[item.name] = parse_setting(item.name, type(item.default), text)
        return cls(**values)

    def checked(self) -> "Config":
        """The same settings, with whole paths.  Raises ConfigError, which names one
        that cannot be used."""
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
        if self.trace_dir and not is_writable_folder(self.trace_dir):
            raise config_error("trace_dir", f"{self.trace_dir!r} {NOT_WRITABLE}")
        check_keep_env(self.keep_env)
        check_own_key(self.api_key)
        if "null" in self.allowed_origins:
            message = (
                "null is the origin of any page in a sandbox, and is never allowed"
            )
            raise config_error("allowed_origins", message)
        if not self.unix_path:
            host, _ = self.address
            if not is_loopback(host) and not self.api_key:
                message = f"{host} can be reached from other machines: set"
                raise config_error("listen_addr", f"{message} {variable('api_key')}")
        check_system(os.environ)
        self.check_api_address(os.environ)
        trace_dir = self.trace_dir and os.path.abspath(self.trace_dir)
        return dataclasses.replace(self, bin=find_cli(self.bin), trace_dir=trace_dir)

    def check_api_address(self, environ: Mapping[str, str]) -> None:
        """Refuse an address of the API that leads back to the bridge."""
        for name in API_ADDRESSES:
            if name in self.keep_env and self.is_own_url(environ.get(name, "")):
                words = f"{name} is the bridge's own address, where its clients ask;"
                raise config_error("keep_env", f"{words} leave the name out")

    def is_own_url(self, url: str) -> bool:
        """Whether a URL leads to an address that the bridge listens on."""
        if self.unix_path:
            return False
        try:
            parts = urlsplit(url)
            port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
        except ValueError:
            return False
        host, own_port = self.address
        name = parts.hostname or ""
        is_here = name == host or (is_loopback(name) and is_local(host))
        return port == own_port and is_here

    @property
    def unix_path(self) -> str:
        """The path of a Unix socket; empty: it is an address."""
        is_unix = self.listen_addr.startswith("unix:")
        return self.listen_addr.removeprefix("unix:") if is_unix else ""

    @property
    def address(self) -> tuple[str, int]:
        """Host and port.  Raises ConfigError."""
        if "://" in self.listen_addr:
            raise config_error(
                "listen_addr", f"leave out the scheme of {self.listen_addr!r}"
            )
        host, _, port = self.listen_addr.rpartition(":")
        if not host or not re.fullmatch("[0-9]{1,9}", port):
            message = "expected host:port or unix:/path, such as 127.0.0.1:8080"
            raise config_error("listen_addr", f"{message}; got {self.listen_addr!r}")
        if int(port) > MAX_PORT:
            message = f"a port is at most {MAX_PORT}; got {port}"
            raise config_error("listen_addr", message)
        return host.strip("[]").lower(), int(port)

    @property
    def base_url(self) -> str:
        """Where a gateway on this machine reaches the bridge."""
        if self.unix_path:
            return self.listen_addr
        host, port = self.address
        return local_url(host_and_port(host, port))

    def warnings(self, environ: Mapping[str, str]) -> list[str]:
        """Settings that are probably mistakes, and those that open something up."""
        found = []
        known = [variable(item.name) for item in dataclasses.fields(self)]
        known.append(variable("config"))
        for name in environ:
            if name.startswith(ENVIRONMENT_PREFIX) and name not in known:
                found.append(f"{name} is no setting{suggestion(name, known)}")
        for name in self.keep_env:
            if name not in environ:
                hint = suggestion(name, environ)
                found.append(f"{variable('keep_env')}: {name} is not set{hint}")
            elif environ[name] == KEY_OF_CLIENTS:
                words = f"{name} is {KEY_OF_CLIENTS!r}, a key for clients of the bridge"
                found.append(f"{variable('keep_env')}: {words}, and none of the API's")
        host = "" if self.unix_path else self.address[0]
        if host in ("0.0.0.0", "::") and not self.allowed_hosts:
            words = "clients that reach this machine by name or address get 403"
            found.append(
                f"{words} until {variable('allowed_hosts')} holds that name or address"
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
                if item.metadata["group"] == "agent"
                and getattr(self, item.name) != item.default
            ]
        who = "any program of this user" if self.unix_path else "any local program"
        if self.api_key:
            who = "any client with the key"
        where = f"as user {user_name()}, in {os.path.abspath(self.cwd)}"
        how = f"tools {self.tools}, permission mode {self.permission_mode}"
        return [f"agent mode: {who} can use the CLI's own tools {where} ({how})"]


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
    """What was probably meant by a flag, a command or a variable, as the end of a
    sentence."""
    words = {bare_word(item): item for item in known}
    word = bare_word(name)
    if word in SYNONYMS:
        return f"; use {SYNONYMS[word]}"
    nearest = difflib.get_close_matches(word, words, 1)
    return f"; did you mean {words[nearest[0]]}?" if nearest else ""


def bare_word(name: str) -> str:
    """A name without what makes it a flag or a variable."""
    word = name.removeprefix(ENVIRONMENT_PREFIX).lstrip("-")
    return word.replace("-", "_").lower()


def as_typed(message: str, flags: Iterable[str]) -> str:
    """A message that calls these settings by their flags, as their user does."""
    for name in flags:
        message = re.sub(rf"\b{variable(name)}\b", flag(name), message)
    return message


# What a number is given in, by the end of its setting's name.
UNITS = {
    "secs": " of seconds, without a unit",
    "bytes": " of bytes, without a unit",
}


def parse_setting(name: str, kind: type, text: str) -> Any:
    """A setting from its text.  Raises ConfigError."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        raise config_error(name, "leave out the quotes around the value")
    if kind is tuple:
        return tuple(text.replace(",", " ").split())
    if kind is str:
        return text if name == "api_key" else expand_home(text)
    try:
        return kind(text)
    except ValueError:
        number = "a whole number" if kind is int else "a number"
        unit = UNITS.get(name.rpartition("_")[2], "")
        raise config_error(name, f"must be {number}{unit}, got {text!r}") from None


def expand_home(text: str) -> str:
    """A path, or unix: and a path, with the home in place of its ~."""
    scheme = "unix:" if text.startswith("unix:") else ""
    return scheme + os.path.expanduser(text.removeprefix(scheme))


def check_bounds(item: "dataclasses.Field[Any]", value: Any) -> None:
    """Raises ConfigError for a value that its field does not allow."""
    rules = item.metadata
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    kind = type(item.default)
    is_right = is_number if kind is float else isinstance(value, kind)
    if isinstance(value, list | tuple) and kind is tuple:
        is_right = all(isinstance(text, str) for text in value)
    if not is_right or isinstance(value, bool):
        words = f"must be of type {kind.__name__}, not {type(value).__name__}"
        raise config_error(item.name, words)  # without the value: it may be a secret
    if isinstance(value, int | float):
        if not math.isfinite(value):
            raise config_error(item.name, f"must be a number, got {value}")
        if value < rules["least"]:
            raise config_error(
                item.name, f"must be at least {rules['least']}, got {value}"
            )
    elif rules["choices"] and value not in rules["choices"]:
        raise config_error(
            item.name, f"must be one of {', '.join(rules['choices'])}, got {value!r}"
        )


# Where the CLI may be told to find the API.
API_ADDRESSES = (
    "ANTHROPIC_BASE_URL",
    "ANTHROPIC_BEDROCK_BASE_URL",
    "ANTHROPIC_FOUNDRY_BASE_URL",
    "ANTHROPIC_VERTEX_BASE_URL",
)


def check_keep_env(names: tuple[str, ...]) -> None:
    """Refuse what is no name of a variable, without printing it: it may be a secret."""
    for name in names:
        if "=" in name:
            raise config_error("keep_env", "give names only, without = and a value")
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
            raise config_error(
                "keep_env", "must be names of variables, with commas between"
            )


def is_writable_folder(path: str) -> bool:
    return os.path.isdir(path) and os.access(path, os.W_OK)


def check_mcp_config(path: str) -> None:
    """Refuse a file that the CLI would refuse at each request."""
    try:
        servers = orjson.loads(Path(path).read_bytes())["mcpServers"]
    except OSError as error:
        raise config_error("mcp_config", f"{path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError):
        servers = None
    if not isinstance(servers, dict):
        message = f"{path} must hold a JSON object with `mcpServers`"
        raise config_error("mcp_config", message)


def check_system(environ: Mapping[str, str]) -> None:
    """Refuse to start where the CLI cannot."""
    if not os.path.isdir("/dev/fd"):
        raise ConfigError("there is no /dev/fd, which the CLI needs: is /proc mounted?")
    given = environ.get("TMPDIR", "")
    if given and not is_writable_folder(given):
        raise ConfigError(f"TMPDIR: {given!r} {NOT_WRITABLE}")
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        message = "TMPDIR: no folder for temporary files can be written; name one"
        raise ConfigError(message) from None


def check_own_key(key: str) -> None:
    """Refuse what no header can hold."""
    if not key.isprintable() or key != key.strip():
        raise config_error(
            "api_key", "must be one line of UTF-8 without spaces at its ends"
        )


def curl_target(url: str) -> str:
    """The URL of the bridge as curl takes it."""
    path = url.removeprefix("unix:")
    return url if path == url else f"--unix-socket {shlex.quote(path)} http://localhost"


def as_url(address: str) -> str:
    return address if address.startswith("unix:") else f"http://{address}"


def local_url(address: str) -> str:
    """The URL by which this machine reaches an address that the bridge listens on."""
    url = as_url(address)
    url = url.replace("//0.0.0.0:", "//127.0.0.1:")
    return url.replace("//[::]:", "//[::1]:")


def host_and_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# Where Claude Code's own installers put it, if the folder is not on PATH.
INSTALLED = ("~/.local/bin/claude", "~/.claude/local/claude")


def find_cli(given: str) -> str:
    """The path of the CLI: `given`, or claude on PATH, or in the claude-agent-sdk wheel,
    or where an installer puts it."""
    places = [given] if given else ["claude", *INSTALLED]
    wheel = importlib.util.find_spec("claude_agent_sdk")
    if not given and wheel and wheel.origin:
        places.insert(1, str(Path(wheel.origin).parent / "_bundled" / "claude"))
    for place in places:
        if path := shutil.which(os.path.expanduser(place)):
            check_interpreter(path)
            return os.path.abspath(path)  # children have another working directory
    if not given:
        words = "the claude CLI was not found: install Claude Code, or `pip install"
        raise config_error(
            "bin", f"{words} claude-agent-sdk`, or name the program here"
        )
    reason = "does not exist"
    if os.path.isdir(given):
        reason = "is a directory: name the program in it"
    elif os.path.exists(given):
        reason = "is not executable"
    elif " " in given:
        reason += ": name one program; for one with arguments, write a script"
    raise config_error("bin", f"{given!r} {reason}")


def check_interpreter(path: str) -> None:
    """Refuse a script whose interpreter is missing: the system would say that the script
    itself is (execve(2))."""
    try:
        with open(path, "rb") as file:
            first = file.readline(256)
    except OSError:
        return  # it can be run, and not be read
    interpreter = first[2:].split()[:1] if first.startswith(b"#!") else []
    if interpreter and not os.access(interpreter[0], os.X_OK):
        name = os.fsdecode(interpreter[0])
        message = f"{path!r} is a script for {name}, which is not there"
        raise config_error("bin", message)


# What clients send that need a key where the bridge has none (README).
KEY_OF_CLIENTS = "unused"
# Where a login may be found that the CLI does not get.
LOGIN_VARIABLES = (
    "ANTHROPIC_API_KEY",
    "ANTHROPIC_AUTH_TOKEN",
    "CLAUDE_CODE_OAUTH_TOKEN",
)


def login_cure(config: Config, environ: Mapping[str, str]) -> str:
    """Whose login was looked for, and what to do when nobody is logged in."""
    settings = settings_file(environ)
    folder = login_folder(environ)
    found = f"no login of user {user_name()} in {folder}"
    for name in LOGIN_VARIABLES:
        is_kept = name in config.keep_env
        # Clients of the bridge need a key, and any will do: the README calls it so.
        value = environ.get(name, "")
        has_own_url = config.is_own_url(environ.get("ANTHROPIC_BASE_URL", ""))
        is_for_clients = value == KEY_OF_CLIENTS or has_own_url
        if value and not is_kept and not is_for_clients:
            words = f"{found}; {name} is set, but not passed on to the CLI"
            return f"{words}: {variable('keep_env')}={name} passes it on"
    if os.path.isfile(settings) and not config.setting_sources:
        cure = f"{variable('setting_sources')}=user"
        found += f" ({cure} if the login is in its settings.json)"
    return f"{found}; `{shlex.quote(config.bin)} auth login` logs in"


def user_name() -> str:
    """The user that the bridge runs as."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # in a container there may be none
        return str(os.getuid())


def is_local(host: str) -> bool:
    """Whether a listener there is reached by a loopback address."""
    return is_loopback(host) or host in ("0.0.0.0", "::")


# ------------------------------------------------------------ access

# RFC 9112, 3.2.2: a target in absolute form.
ABSOLUTE = re.compile("^https?://([^/?]*)", re.I)
# RFC 9110, 7.2: a name or address, an IPv6 one with brackets or without, and perhaps a
# port.
HOST = re.compile(
    r"(\[[0-9a-f:.]+\]|[0-9a-f]*:[0-9a-f]*:[0-9a-f:]*|[a-z0-9_-]+(?:\.[a-z0-9_-]+)*)\.?"
    r"(?::([0-9]{1,5}))?",
    re.I,
)
PRINTABLE = re.compile(r"[\x20-\x7e]*")


@dataclass
class Exchange:
    """One request and what was answered, for routes and for the log."""

    # None: what came was not a request.
    request: h11.Request | None = None
    body: bytes = b""
    # The connection ends with this answer.
    last: bool = False
    id: str = field(default_factory=lambda: "req_" + uuid.uuid4().hex)
    began: float = field(default_factory=time.monotonic)
    # 0: nothing was answered.
    status: int = 0
    # Monotonic time at which the answer began; unstreamed, it is sent later.
    first_byte: float | None = None
    # The status line of a stream went out.
    streaming: bool = False
    # The methods of the route, for 405.
    allow: str = ""
    turn: Turn | None = None
    # What a count of tokens leaves out.
    not_counted: list[str] = field(default_factory=list)
    # error.type of a failure, and its message if that quotes nothing of the request.
    failure: str = ""
    message: str = ""

    @property
    def key_digest(self) -> str:
        """A digest of the key that the client sent: two clients may use one session
        name."""
        given = f"{self.header(b'x-api-key')} {self.header(b'authorization')}"
        return hashlib.blake2b(given.encode("latin-1"), digest_size=16).hexdigest()

    @property
    def has_body(self) -> bool:
        length = self.header(b"content-length") or "0"
        return int(length) > 0 or self.header(b"transfer-encoding") is not None

    @property
    def method(self) -> str:
        return self.request.method.decode() if self.request else ""

    @property
    def target(self) -> str:
        return self.request.target.decode("ascii") if self.request else ""

    @property
    def path(self) -> str:
        """The path without its query (clients add ?beta=true), and with one slash at
        its start."""
        target = ABSOLUTE.sub("", self.target, 1)
        path = target.partition("?")[0]
        return "/" + path.lstrip("/")

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(self.target.partition("?")[2]))

    @property
    def route(self) -> str:
        """The known route of the path; empty: there is none."""
        path = MODELS if self.path.startswith(MODELS + "/") else self.path
        return path if path in ROUTES else ""

    @property
    def is_page(self) -> bool:
        """Whether it asks for the page for people."""
        return self.route == "/" and self.method in ("GET", "HEAD")

    def header(self, name: bytes) -> str | None:
        """The value of a header, several joined by commas (RFC 9110, 5.3); `name` in
        lower case."""
        headers = self.request.headers if self.request else ()
        values = [value.decode("latin-1") for key, value in headers if key == name]
        return ", ".join(values) if values else None


def check_access(exchange: Exchange, config: Config) -> None:
    """Who may talk to this port.  Raises ApiError 401 or 403.  Only /healthz is open to
    all, without a query and without a body."""
    is_open = exchange.path == "/healthz" and not exchange.query
    if is_open and not exchange.has_body:
        return
    check_host(exchange, config)
    check_origin(exchange, config)
    check_key(exchange, config)


def check_host(exchange: Exchange, config: Config) -> None:
    """Only a loopback name, the address listened on or an allowed host may lead here.

    A web page can make its own name lead to this port (DNS rebinding), but then its
    requests carry that name.  The host of a target in absolute form counts before the
    header (RFC 9112, 3.2.2).
    """
    absolute = ABSOLUTE.match(exchange.target)
    host = absolute[1] if absolute else exchange.header(b"host")
    if host is None:
        return  # not HTTP/1.1, where h11 requires one; browsers speak that
    match = HOST.fullmatch(host)
    name = ""
    if match and int(match[2] or 0) < 65536:
        name = match[1].lower()
    known = {item.lower() for item in config.allowed_hosts}
    if not config.unix_path:
        known.add(config.address[0])
    if not is_loopback(name) and name.strip("[]") not in known:
        cure = f"{variable('allowed_hosts')}={name or 'NAME'} allows it (the name only, no port)"
        raise ApiError(403, f"Host {host[:100]!a} is not allowed; {cure}")


def check_origin(exchange: Exchange, config: Config) -> None:
    """No web page may talk to this port unless its origin is allowed (RFC 6454).

    Images, scripts and frames of a page send no Origin, but say that they come from
    another site (Fetch Metadata, Sec-Fetch-Site).
    """
    origin = exchange.header(b"origin")
    if origin is None:
        if exchange.header(b"sec-fetch-site") in ("cross-site", "same-site"):
            raise ApiError(403, "pages of other sites may not use this bridge")
        return
    if origin == "null":  # of any page in a sandbox
        raise ApiError(
            403, "pages without an origin of their own may not use this bridge"
        )
    if origin not in config.allowed_origins:
        cure = f"{variable('allowed_origins')} allows it, set to exactly that"
        raise ApiError(403, f"Origin {origin[:100]!a} is not allowed; {cure}")


def check_key(exchange: Exchange, config: Config) -> None:
    """The bridge's key, where it has one, as x-api-key or as a Bearer token (RFC 6750,
    2.1)."""
    is_preflight = exchange.method == "OPTIONS" and not exchange.has_body
    has_origin = exchange.header(b"origin") is not None
    # Browsers send a preflight without the key.
    if not config.api_key or (is_preflight and has_origin):
        return
    authorization = exchange.header(b"authorization") or ""
    if not exchange.header(b"x-api-key") and not authorization:
        message = f"this bridge requires a key: send its {variable('api_key')}"
        raise ApiError(401, f"{message} as x-api-key or Authorization: Bearer")
    expected = config.api_key.encode()
    matches = [hmac.compare_digest(key, expected) for key in given_keys(exchange)]
    if any(matches):
        return
    if authorization and " " not in authorization:
        raise ApiError(401, "Authorization takes the word Bearer before the key")
    message = "the key sent does not match this bridge's"
    raise ApiError(401, f"{message} {variable('api_key')}")


def given_keys(exchange: Exchange) -> list[bytes]:
    """The keys that a request holds; of the page, which a browser opens, also the
    password of HTTP Basic (RFC 7617)."""
    keys = [exchange.header(b"x-api-key") or ""]
    authorization = exchange.header(b"authorization") or ""
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() == "bearer":
        keys.append(token.strip())
    elif scheme.lower() == "basic" and exchange.is_page:
        with contextlib.suppress(ValueError):  # it is no Base64
            pair = base64.b64decode(token).decode("latin-1")
            keys.append(pair.partition(":")[2])
    return [key.encode("latin-1") for key in keys]


def is_loopback(host: str) -> bool:
    """RFC 6761, 6.3: localhost and all names below it; RFC 1122 and 4291: 127.0.0.0/8
    and ::1."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


# ------------------------------------------------------------ a connection

READ_SIZE = 64 << 10
# How a client of TLS begins (RFC 8446, 5.1: a handshake record).
TLS_HELLO = b"\x16\x03"
# Bytes of a request's target and headers; Node takes 16 KiB, nginx 32.
MAX_HEADER_BYTES = 64 << 10
# Bytes that are read ahead while an answer is given.
MAX_PIPELINED = 64 << 10
# A body that comes in more than MAX_CHUNKS pieces, chunks or reads, is refused when they
# average fewer than MIN_CHUNK bytes: each costs 20 us.
MAX_CHUNKS = 10_000
MIN_CHUNK = 64
# Chunks after which other connections have their turn.
CHUNKS_AT_ONCE = 50
# Seconds to go on reading a refused body, and to flush a closing connection, so that
# the client gets the answer and not a reset.
LINGER_SECS = 5.0
# Seconds of silence before a ping is sent; proxies time out after 30 to 60.
PING_SECS = 10.0
SESSION_HEADER = b"x-arch-claude-cli-session"


class Disconnected(Exception):
    """The connection ends without more answers: mostly, the client is gone."""


class Connection:
    """One client: its socket and its h11 state."""

    def __init__(
        self,
        bridge: "Bridge",
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.bridge = bridge
        self.config = bridge.config
        self.reader = reader
        self.writer = writer
        self.http = h11.Connection(
            h11.SERVER, max_incomplete_event_size=MAX_HEADER_BYTES
        )
        # A request is being answered.
        self.answering = False
        # One has been answered.
        self.answered = False

    async def serve(self) -> None:
        """Requests in order until either side ends the connection."""
        try:
            if self.bridge.is_full:
                await self.refuse(
                    Exchange(), ApiError(503, "too many connections", retry_after=1)
                )
                return
            while await self.next_request():
                self.answered = True
                is_done = (
                    self.http.our_state is h11.DONE
                    and self.http.their_state is h11.DONE
                )
                if not is_done or self.bridge.closing:
                    break
                self.http.start_next_cycle()
        except (Disconnected, OSError):
            pass  # the client is gone, or sent nothing in time
        finally:
            await self.close()

    async def next_request(self) -> bool:
        """Read a request and answer it; False at the end of the connection.

        What is not HTTP, too large or not allowed is answered without reading on, and
        ends the connection.
        """
        async with asyncio.timeout(self.config.idle_secs):
            if not self.http.trailing_data[0]:
                self.http.receive_data(await self.reader.read(READ_SIZE))
        exchange = Exchange()
        try:
            async with asyncio.timeout(self.config.send_secs):
                is_whole = await self.read_request(exchange)
        except TimeoutError:
            await self.refuse(
                exchange, ApiError(408, "the request was not sent in time")
            )
        except h11.RemoteProtocolError as error:
            status = 431 if error.error_status_hint == 431 else 400
            message = f"The request is not valid HTTP: {error}"
            if self.http.trailing_data[0].startswith(TLS_HELLO):
                message = "TLS: this port speaks plain HTTP; the URL begins with http:"
            await self.refuse(exchange, ApiError(status, message))
        except ApiError as error:
            await self.refuse(exchange, error)
        else:
            if is_whole:
                await self.bridge.handle(self, exchange)
                return True
        return False

    async def read_request(self, exchange: Exchange) -> bool:
        """Fill the exchange; False when the client closed instead."""
        body = bytearray()
        chunks = 0
        while True:
            event = self.http.next_event()
            if event is h11.NEED_DATA:
                if self.http.they_are_waiting_for_100_continue:
                    await self.send(
                        h11.InformationalResponse(status_code=100, headers=[])
                    )
                data = await self.reader.read(READ_SIZE)
                if not data and exchange.request:
                    raise Disconnected
                self.http.receive_data(data)
            elif isinstance(event, h11.Request):
                exchange.request = event
                self.check_head(exchange, event)
            elif isinstance(event, h11.Data):
                body += event.data
                chunks += 1
                self.check_size(len(body))
                if chunks > MAX_CHUNKS and len(body) < chunks * MIN_CHUNK:
                    raise ApiError(400, "the body comes in pieces that are too small")
                if chunks % CHUNKS_AT_ONCE == 0:
                    await asyncio.sleep(0)
            elif isinstance(event, h11.EndOfMessage):
                exchange.body = bytes(body)
                return True
            else:
                return False

    def check_head(self, exchange: Exchange, request: h11.Request) -> None:
        """Raises ApiError 401, 403, 413 or 431, or RemoteProtocolError."""
        size = len(request.target)
        for name, value in request.headers:
            size += len(name) + len(value)
        # h11 counts only a head that comes in several reads.
        if size > MAX_HEADER_BYTES:
            raise ApiError(431, "the headers are too large")
        length = exchange.header(b"content-length")
        if length and exchange.header(b"transfer-encoding"):
            # RFC 9112, 6.1: it could be a smuggled request.
            raise h11.RemoteProtocolError("both Content-Length and Transfer-Encoding")
        if not request.http_version.startswith(b"1."):
            raise ApiError(505, "this server speaks HTTP/1.1")  # RFC 9110, 15.6.6
        check_access(exchange, self.config)
        if length:
            self.check_size(int(length))

    def check_size(self, size: int) -> None:
        limit = self.config.max_body_bytes
        if size > limit:
            raise ApiError(413, f"Request exceeds the maximum size of {limit} bytes")

    async def send(self, event: h11.Event) -> None:
        """Write an h11 event.  An answer has ended when the system has all of it."""
        is_end = isinstance(event, h11.EndOfMessage)
        self.writer.transport.set_write_buffer_limits(0 if is_end else None)
        self.write(self.http.send(event) or b"")
        await self.drain()

    def write_events(self, exchange: Exchange, data: bytes) -> None:
        """Write a piece of a stream, the first one with the head of the answer."""
        head = b""
        if self.http.our_state is h11.SEND_RESPONSE:
            exchange.status = 200
            exchange.streaming = True
            # nginx must not hold the stream back.
            more = {
                "cache_control": "no-cache",
                "x_accel_buffering": "no",
            }
            headers = self.bridge.headers(exchange, "text/event-stream", more)
            head = self.http.send(response(200, headers)) or b""
        self.write(head + (self.http.send(h11.Data(data=data)) or b""))

    async def finish(self) -> None:
        """End an answer."""
        await self.send(h11.EndOfMessage())

    def write(self, data: bytes) -> None:
        """Write, unless the client is gone: uvloop would raise, and `drain` says so."""
        if data and not self.writer.is_closing():
            self.writer.write(data)

    async def drain(self) -> None:
        """Wait while the client is slow to read.  Raises Disconnected when it is gone, or
        reads nothing at all."""
        transport = self.writer.transport
        unread = math.inf
        with contextlib.suppress(OSError):
            while transport.get_write_buffer_size() < unread:
                unread = transport.get_write_buffer_size()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.config.idle_secs):
                        await self.writer.drain()
                        return
        raise Disconnected

    async def respond(
        self,
        exchange: Exchange,
        body: bytes,
        kind: str = "application/json",
        status: int = 200,
        **headers: str,
    ) -> None:
        """Send a whole answer; `kind` is its content type, keyword names become header
        names with dashes."""
        exchange.status = status
        head = self.bridge.headers(exchange, kind, headers)
        if status != 204:
            head.append(("content-length", str(len(body))))
        await self.send(response(status, head))
        if exchange.method != "HEAD":
            await self.send(h11.Data(data=body))
        await self.finish()

    async def fail(self, exchange: Exchange, error: ApiError) -> None:
        """Send an error as a whole answer, or as the last event of a stream that has
        begun."""
        exchange.failure = error.kind
        exchange.message = "" if error.is_quoted else error.message
        body = error.body(exchange.id)
        if self.http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            if exchange.streaming and self.http.our_state is h11.SEND_BODY:
                await self.send(h11.Data(data=translate.frame(body)))
                await self.finish()
            return  # a whole answer has begun: closing is all that can be said
        headers = {}
        if error.status == 401:
            basic = 'Basic realm="the password is the key"'
            headers["www_authenticate"] = basic if exchange.is_page else "Bearer"
        after = error.retry_after
        if error.resets_at is not None:
            after = max(1, round(error.resets_at - time.time()))
        if after is not None:
            headers["retry_after"] = str(after)
        # SDKs sleep through any retry-after: a limit that resets in an hour is the
        # user's to see.
        if not error.retry or (after or 0) > 60:
            headers["x_should_retry"] = "false"
        await self.respond(exchange, orjson.dumps(body), status=error.status, **headers)

    async def refuse(self, exchange: Exchange, error: ApiError) -> None:
        """Answer a request that is not read to its end, then read on for a moment:
        closing on unread bytes is a reset, which can overtake the answer."""
        if self.http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
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
        """Return when the client closes its side; meanwhile keep what it sends ahead
        for the next request."""
        while len(self.http.trailing_data[0]) < MAX_PIPELINED:
            data = await self.reader.read(READ_SIZE)
            self.http.receive_data(data)
            if not data:
                return
        await asyncio.Event().wait()  # whether it has left, only a write can tell now

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
        if self.writer.transport.get_write_buffer_size():
            self.writer.transport.abort()


def response(status: int, headers: list[tuple[str, str]]) -> h11.Response:
    """The head of an answer, with a Date (RFC 9110, 6.6.1) and a reason phrase (RFC
    9112, 4)."""
    unknown = "Overloaded" if status == 529 else ""
    reason = http.client.responses.get(status, unknown)
    date = ("date", email.utils.formatdate(usegmt=True))
    return h11.Response(status_code=status, headers=[date, *headers], reason=reason)


class Stream:
    """The events of one answer on their way out.

    The status line goes out with the first of them, or with the first ping; pings fill
    silences.
    """

    def __init__(
        self, connection: Connection, exchange: Exchange, *, pings: bool
    ) -> None:
        self.connection = connection
        self.exchange = exchange
        self._pings = pings
        self._loop = asyncio.get_running_loop()
        self._wrote_at = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> "Stream":
        if self._pings:
            self._timer = self._loop.call_later(PING_SECS, self._tick)
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer:
            self._timer.cancel()

    def _tick(self) -> None:
        silent = self._loop.time() - self._wrote_at
        if silent >= PING_SECS - 0.01:  # a timer may be a little early
            self._write(translate.PING)
            silent = 0
        self._timer = self._loop.call_later(PING_SECS - silent, self._tick)

    def _write(self, data: bytes) -> None:
        self.connection.write_events(self.exchange, data)
        self._wrote_at = self._loop.time()

    def send(self, frames: bytes) -> bool:
        """Write frames in one write; False when the client is too slow to read them."""
        self.exchange.first_byte = self.exchange.first_byte or time.monotonic()
        if frames:
            self._write(frames)
        transport = self.connection.writer.transport
        is_slow = (
            transport.get_write_buffer_size() > transport.get_write_buffer_limits()[1]
        )
        # drain() raises when the client has disconnected.
        return not is_slow and not transport.is_closing()


# ------------------------------------------------------------ the server

# Seconds to send the error of answers that a shutdown cuts short, and for new
# connections to send their request.
GRACE_SECS = 1.0
# /healthz?deep=1, in seconds: it waits for the CLI (1.2 were measured), and repeats an
# `ok` or a problem, as asking costs the start of a CLI.
HELLO_SECS = 10.0
HEALTHY_SECS = 60.0
PROBLEM_SECS = 5.0
MODELS = "/v1/models"
# Bytes of an unknown path in the log.
MAX_LOGGED_PATH = 100
# Requests that the page shows, but for good ones of these routes.
RECENT = 20
QUIET_ROUTES = ("/", "/healthz", "/metrics")
LOGIN_ADVICE = "`claude-cli-bridge check` says which one that is"
# Prometheus' text-based exposition format.
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# How paths of the OpenAI API begin.
OPENAI = (
    "/v1/chat/",
    "/v1/responses",
    "/v1/completions",
    "/v1/embeddings",
    "/chat/completions",
)
# Places that x-bridge-not-sent names, and bytes of each.
MAX_PLACES = 50
MAX_PLACE = 100
# The page shows what it can without a script; nothing comes from elsewhere.
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


class Bridge:
    """A running server; made by `serve`."""

    def __init__(self, config: Config, pool: Pool) -> None:
        self.config = config
        self.pool = pool
        self.counter = Counter(pool)
        self.started = time.time()
        self.closing = False
        # The last requests: when, path, and what was logged; the newest first.
        self.recent: deque[tuple[float, str, Json]] = deque(maxlen=RECENT)
        # As clients reach it: host:port or unix:/path.
        self.addresses: list[str] = []
        # Seconds at shutdown for connections that have sent nothing yet; only with an
        # inherited listener, where no client may be refused.
        self._patience = 0.0
        self._connections: dict[asyncio.Task[None], Connection] = {}
        # Requests that are being answered.
        self._answers: set[asyncio.Task[None]] = set()
        # What was wrong when /healthz?deep=1 was asked last, and until when that is
        # good.
        self._problem = ""
        self._problem_until = 0.0
        self._asking = asyncio.Lock()

    # Connections

    async def listen(self, sock: socket.socket | None) -> asyncio.Server:
        """Raises OSError when the address is taken, or cannot be had."""
        self._patience = GRACE_SECS if sock else 0.0
        if not sock and self.config.unix_path:
            sock = bind_unix(self.config.unix_path)
        if sock and sock.family == socket.AF_UNIX:
            # Since 3.13 asyncio would unlink the path of a service manager's socket.
            options: Any = (
                {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
            )
            server = await asyncio.start_unix_server(self.accept, sock=sock, **options)
        elif sock:
            server = await asyncio.start_server(self.accept, sock=sock)
        else:
            host, port = self.config.address
            server = await asyncio.start_server(self.accept, host, port)
        for listener in server.sockets:
            name = listener.getsockname()
            if listener.family == socket.AF_UNIX:
                # Of an abstract name (unix(7)) the first byte is NUL.
                path = os.fsencode(name).decode(errors="replace")
                self.addresses.append("unix:" + path.replace("\0", "@"))
            else:
                self.addresses.append(host_and_port(*name[:2]))
        return server

    @property
    def is_full(self) -> bool:
        return len(self._connections) > self.config.max_connections

    @property
    def url(self) -> str:
        """The base URL for clients on this machine."""
        return local_url(self.addresses[0])

    @property
    def running(self) -> int:
        """How many requests are being answered."""
        return len(self._answers)

    def accept(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if self.closing and not self._patience:
            writer.transport.abort()  # accepted while the server was being closed
            return
        connection = Connection(self, reader, writer)
        task = asyncio.get_running_loop().create_task(connection.serve())
        self._connections[task] = connection
        task.add_done_callback(self._connections.pop)

    async def close(self) -> None:
        """End all connections: idle ones now, running answers when they are done or
        after `drain_secs`."""
        self.closing = True
        new = [
            task
            for task, connection in self._connections.items()
            if not connection.answering and not connection.answered
        ]
        if new and self._patience:
            await asyncio.wait(new, timeout=self._patience)
        for task, connection in list(self._connections.items()):
            if not connection.answering:
                task.cancel()
        # A first cancel becomes a 503; where that cannot be sent in time, the next one
        # ends it.
        for seconds in (self.config.drain_secs, GRACE_SECS):
            if self._answers:
                await asyncio.wait(self._answers, timeout=seconds)
            self.cancel_answers()
        for connection in self._connections.values():
            connection.abort()  # its client still has not read the answer
        if self._connections:
            await asyncio.wait(self._connections)

    def cancel_answers(self) -> None:
        """Cut running answers short; no new ones are begun."""
        self.closing = True
        for answer in self._answers:
            answer.cancel()

    async def handle(self, connection: Connection, exchange: Exchange) -> None:
        """Answer one request.  Raises Disconnected when the answer could not be
        completed."""
        answer = asyncio.create_task(self.answer(connection, exchange))
        gone = asyncio.create_task(connection.gone())
        self._answers.add(answer)
        connection.answering = True
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            has_left = not answer.done()
        finally:
            gone.cancel()
            answer.cancel()
            await asyncio.wait({answer, gone})
            self._answers.discard(answer)
            connection.answering = False
            error = None if answer.cancelled() else answer.exception()
            if answer.cancelled() or isinstance(error, Disconnected):
                exchange.failure = "client_left"
            self.report(exchange)
        if error and exchange.failure != "client_left":
            log.error("bug in request %s: %s", exchange.id, type(error).__name__)
        if has_left or answer.cancelled() or error:
            # Raising `error` itself would keep this frame, and with it the turn, alive.
            raise Disconnected

    async def answer(self, connection: Connection, exchange: Exchange) -> None:
        """Route a request, and turn every failure into an answer."""
        try:
            try:
                await self.dispatch(connection, exchange)
            except asyncio.CancelledError:
                if not self.closing:
                    raise
                words = "the bridge is shutting down; send the request again"
                raise ApiError(503, words) from None
        except ApiError as error:
            if error.status == 401:
                self._problem_until = 0  # the last word on the login is no longer good
            if translate.LOGIN_CURE in error.message:
                cure = f"nobody is logged in: {login_cure(self.config, os.environ)}"
                error.message = error.message.replace(translate.LOGIN_CURE, cure)
            if advice := self.advice(error):
                log.warning("request %s: %s", exchange.id, advice)
            await connection.fail(exchange, error)
        except Disconnected:
            raise
        except Exception as error:  # noqa: BLE001 - a bug must end as a 500 of this request alone
            # Without the message, which can hold a prompt.
            where = "".join(traceback.format_tb(error.__traceback__))
            log.error(
                "bug in request %s: %s\n%s", exchange.id, type(error).__name__, where
            )
            await connection.fail(
                exchange, ApiError(500, "internal error of the bridge")
            )

    def advice(self, error: ApiError) -> str:
        """What helps against an error of the API, whose words stay as they are; empty:
        nothing that is known."""
        if error.status == 401 and error.is_from_api:
            return f"the API refused the CLI's login; {LOGIN_ADVICE}"
        if "or newer is required" in error.message:
            return update_cure(self.pool.cli.program)
        if error.status == 404 and error.is_from_api:
            return f"GET {MODELS} lists the models that the CLI offers"
        return ""

    def headers(
        self, exchange: Exchange, kind: str, more: Mapping[str, str]
    ) -> list[tuple[str, str]]:
        head = [("content-type", kind), ("request-id", exchange.id)]
        turn = exchange.turn
        if turn:
            reason = f"; reason={turn.reason}" if turn.reason else ""
            head.append((SESSION_HEADER.decode(), turn.session.id))
            head.append(("x-bridge-session", turn.origin + reason))
            if turn.not_sent:
                head.append(("x-bridge-not-sent", join_limited(turn.not_sent)))
            if turn.translator.api_calls > 1:
                head.append(("x-bridge-api-calls", str(turn.translator.api_calls)))
            head += translate.quota_headers(self.pool.rate_limits)
        if exchange.not_counted:
            head.append(("x-bridge-not-counted", join_limited(exchange.not_counted)))
        origin = exchange.header(b"origin")
        if origin in self.config.allowed_origins:
            head.append(("access-control-allow-origin", origin))
            head.append(("access-control-expose-headers", "*"))
            head.append(("vary", "origin"))
        if exchange.allow:
            head.append(("allow", exchange.allow))
        if self.closing or exchange.last:
            head.append(("connection", "close"))
        for name, value in more.items():
            head.append((name.replace("_", "-"), value))
        return head

    # Routes

    async def dispatch(self, connection: Connection, exchange: Exchange) -> None:
        methods = ROUTES.get(exchange.route)
        if methods is None:
            raise self.not_found(exchange)
        if exchange.method == "OPTIONS" and exchange.header(b"origin"):
            asked = exchange.header(b"access-control-request-headers") or ""
            allowed = {
                "access_control_allow_methods": ", ".join(methods),
                "access_control_allow_headers": asked
                if PRINTABLE.fullmatch(asked)
                else "",
            }
            await connection.respond(exchange, b"", "text/plain", 204, **allowed)
            return
        handler = methods.get("GET" if exchange.method == "HEAD" else exchange.method)
        if handler is None:
            exchange.allow = ", ".join(methods).replace("GET", "GET, HEAD")
            raise ApiError(405, f"{exchange.route} takes {exchange.allow}")
        encoding = exchange.header(b"content-encoding") or "identity"
        if encoding.lower() != "identity":
            raise ApiError(
                415, "compressed request bodies are not supported; send it uncompressed"
            )
        await handler(self, connection, exchange)

    def not_found(self, exchange: Exchange) -> ApiError:
        if exchange.path.startswith(OPENAI):
            words = "this is the Anthropic Messages API, not OpenAI's"
            return ApiError(404, f"{words}; LiteLLM can translate, as the README shows")
        words = (
            "this is the Anthropic Messages API (POST /v1/messages); the base URL is"
        )
        return ApiError(
            404, f"no route for {exchange.path[:100]!a}: {words} {self.url}"
        )

    async def health(self, connection: Connection, exchange: Exchange) -> None:
        """`ok`; with ?deep=1 what is wrong, or `ok`."""
        problem = ""
        if exchange.query.get("deep") == "1":
            problem = await self.problem()
        status = 503 if problem else 200
        said = (problem or "ok").encode(errors="replace")
        await connection.respond(exchange, said, "text/plain", status)

    async def problem(self) -> str:
        """What keeps the bridge from answering; empty: nothing.  Makes no model
        call."""
        if not self.pool.has_room:  # asking takes a process itself
            return f"all {self.config.max_sessions} processes are busy"
        async with self._asking:
            if time.monotonic() >= self._problem_until:
                self._problem = await self._ask_what_is_wrong()
                seconds = PROBLEM_SECS if self._problem else HEALTHY_SECS
                self._problem_until = time.monotonic() + seconds
            return self._problem

    async def _ask_what_is_wrong(self) -> str:
        """Ask the CLI what is wrong."""
        try:
            async with asyncio.timeout(HELLO_SECS):
                hello = await self.pool.hello(anew=True)
        except ApiError as error:
            return f"the claude CLI does not work: {error.message}"
        except TimeoutError:
            return f"the claude CLI did not answer within {HELLO_SECS:g} seconds"
        if not translate.login_source(hello):
            return f"nobody is logged in: {login_cure(self.config, os.environ)}"
        return ""

    async def metrics(self, connection: Connection, exchange: Exchange) -> None:
        metrics = self.pool.metrics
        metrics.set("connections", len(self._connections))
        handlers = logging.getLogger().handlers
        lost = sum(item.lost for item in handlers if isinstance(item, LogWriter))
        metrics.set("log_lines_lost_total", lost)
        metrics.observe(self.pool.snapshot())
        await connection.respond(exchange, metrics.text().encode(), METRICS_TYPE)

    async def root(self, connection: Connection, exchange: Exchange) -> None:
        """The page for people; Claude Code as a client asks HEAD / first."""
        if "text/html" in (exchange.header(b"accept") or ""):
            page = page_html(self).encode(errors="replace")
            kind = "text/html; charset=utf-8"
        else:
            page = page_text(self).encode(errors="replace")
            kind = "text/plain; charset=utf-8"
        await connection.respond(
            exchange, page, kind, content_security_policy=PAGE_POLICY
        )

    async def messages(self, connection: Connection, exchange: Exchange) -> None:
        request = await self.parse(exchange)
        token = exchange.header(SESSION_HEADER)
        async with self.pool.turn(
            request, token, exchange.key_digest, exchange.id
        ) as turn:
            exchange.turn = turn
            with Stream(connection, exchange, pings=request.stream) as stream:
                await turn.relay(stream.send, connection.drain)
        if request.stream:
            await connection.finish()
            return
        await connection.respond(exchange, translate.to_json(turn.translator.message))

    async def parse(
        self, exchange: Exchange, *, counting: bool = False
    ) -> translate.Request:
        body = exchange.body
        # So that it is freed once it is parsed.
        exchange.body = b""
        betas = exchange.header(b"anthropic-beta") or ""
        parse = partial(
            translate.parse_request,
            body,
            betas,
            counting=counting,
            agent=bool(self.config.tools),
        )
        request = await self.pool.compute(len(body), parse)
        asking = exchange.header(b"x-claude-code-session-id") or ""
        if self.pool.is_own(asking, request.user_id):
            words = "this request comes from the claude CLI that this bridge runs: the"
            raise ApiError(400, f"{words} CLI's address of the API leads to the bridge")
        not_sent = dropped_headers(exchange) + request.not_sent
        return dataclasses.replace(request, not_sent=not_sent)

    async def count_tokens(self, connection: Connection, exchange: Exchange) -> None:
        request = await self.parse(exchange, counting=True)
        found = {"input_tokens": await self.counter.count(request, exchange.id)}
        exchange.not_counted = translate.not_counted(request)
        await connection.respond(exchange, orjson.dumps(found))

    async def models(self, connection: Connection, exchange: Exchange) -> None:
        models = model_list(await self.pool.hello())
        name = unquote(exchange.path.removeprefix(MODELS).removeprefix("/"))
        found = find_model(models, name) if name else model_page(models)
        await connection.respond(exchange, orjson.dumps(found))

    # The log

    def report(self, exchange: Exchange) -> None:
        """Log one line for one request, and count it; never a prompt or an answer."""
        now = time.monotonic()
        self.measure(exchange, now)
        turn = exchange.turn
        row: Json = {
            "request_id": exchange.id,
            "route": exchange.route or None,
        }
        if not exchange.route and exchange.request:
            row["path"] = exchange.path[:MAX_LOGGED_PATH]
        if turn:
            # Whoever reads the log cannot go on with the conversation.
            row["session"] = translate.digest(turn.session.id).hex()[:12]
            row["conversation"] = turn.origin
            row["reason"] = turn.reason or None
            row["model"] = turn.request.model
            row["not_sent"] = join_limited(turn.not_sent).replace(" ", "") or None
            calls = turn.translator.api_calls
            row["api_calls"] = calls if calls > 1 else None
        # nginx's number for a client that left before there was a status.
        row["status"] = exchange.status or 499
        row["error"] = exchange.failure or None
        row["reason"] = exchange.message or row.get("reason")
        if exchange.first_byte:
            row["first_byte_secs"] = round(exchange.first_byte - exchange.began, 3)
        row["secs"] = round(now - exchange.began, 3)
        row.update(tokens(turn))
        row = translate.without_nulls(row)
        text = " ".join(f"{name}={quoted(value)}" for name, value in row.items())
        log.info("%s", text, extra={"row": row})
        if exchange.failure or exchange.route not in QUIET_ROUTES:
            self.recent.appendleft((time.time(), exchange.path, row))

    def measure(self, exchange: Exchange, now: float) -> None:
        """Add a request to the metrics."""
        metrics = self.pool.metrics
        route, status = exchange.route or "none", exchange.status or 499
        metrics.add("requests_total", route=route, status=status)
        if exchange.failure:
            metrics.add("errors_total", type=exchange.failure)
        if exchange.first_byte:
            metrics.time("first_byte_seconds", exchange.first_byte - exchange.began)
        turn = exchange.turn
        if turn:
            metrics.add("turns_total", conversation=turn.origin, reason=turn.reason)
            metrics.time("turn_seconds", now - exchange.began)
        for kind, number in tokens(turn).items():
            metrics.add("tokens_total", number, kind=kind.removesuffix("_tokens"))


Handler = Callable[[Bridge, Connection, Exchange], Any]
ROUTES: dict[str, dict[str, Handler]] = {
    "/": {"GET": Bridge.root},
    "/healthz": {"GET": Bridge.health},
    "/metrics": {"GET": Bridge.metrics},
    MODELS: {"GET": Bridge.models},
    "/v1/messages": {"POST": Bridge.messages},
    # The two common wrong base URLs: with /v1 for SDKs that add it, without it for the
    # others.
    "/v1/v1/messages": {"POST": Bridge.messages},
    "/messages": {"POST": Bridge.messages},
    "/v1/messages/count_tokens": {"POST": Bridge.count_tokens},
    "/v1/v1/messages/count_tokens": {"POST": Bridge.count_tokens},
    "/messages/count_tokens": {"POST": Bridge.count_tokens},
}


# Headers of the API that the CLI sets itself, or not at all.
DROPPED_HEADERS = ("anthropic-user-profile-id", "anthropic-workspace-id")
# The version of the API that the CLI asks for (all versions that were tested).
API_VERSION = "2023-06-01"


def dropped_headers(exchange: Exchange) -> list[str]:
    """The headers of a request that mean something to the API, and do not reach it."""
    lost = [name for name in DROPPED_HEADERS if exchange.header(name.encode())]
    if (exchange.header(b"anthropic-version") or API_VERSION) != API_VERSION:
        lost.append("anthropic-version")
    return lost


def join_limited(places: list[str]) -> str:
    """The first of many places: clients take 16 KiB of headers (Node), 64 KiB a line
    (Python)."""
    more = len(places) - MAX_PLACES
    rest = [f"and-{more}-more"] if more > 0 else []
    first = [place[:MAX_PLACE] for place in places[:MAX_PLACES]]
    return ", ".join(first + rest)


def quoted(value: object) -> str:
    """A value of the log in one word."""
    text = str(value)
    is_word = text.isprintable() and not set(text) & {" ", '"'}
    return text if is_word else orjson.dumps(text).decode()


def tokens(turn: Turn | None) -> dict[str, int]:
    """The tokens of a turn, by kind."""
    usage = turn.translator.message.get("usage", {}) if turn else {}
    return {kind: usage[kind] for kind in translate.TOKENS if kind in usage}


def bind_unix(path: str) -> socket.socket:
    """A socket at a path that only this user can connect to.  Raises OSError.

    Nobody can connect before it listens, so its mode is right by then.  What does not
    answer at the path is a socket that a killed bridge left, and is replaced.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise OSError(errno.EEXIST, "what is there is no socket")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            if probe.connect_ex(path) != errno.ECONNREFUSED:
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.bind(path)
        os.chmod(path, 0o600)
    except BaseException:
        sock.close()
        raise
    return sock


def identity(path: str) -> tuple[int, int] | None:
    """Which file is at a path; None: there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


# ------------------------------------------------------------ models


def model_list(hello: Json) -> list[Json]:
    """The CLI's own models in the API's shape: each under its full id (all that Claude
    Code's discovery keeps) and as claude-cli/<alias>."""
    found: dict[str, Json] = {}
    for model in hello.get("models") or []:
        alias, full = model.get("value"), model.get("resolvedModel")
        names = [full, translate.MODEL_PREFIX + alias if alias else None]
        for name in names:
            if not name or name in found:
                continue
            found[name] = {
                "type": "model",
                "id": name,
                "display_name": model.get("displayName") or name,
                # API: the epoch when the release date is not known.
                "created_at": "1970-01-01T00:00:00Z",
                "lifecycle": "active",
                "capabilities": capabilities(model),
            }
    return list(found.values())


# The API's levels of effort.
EFFORTS = ("low", "medium", "high", "xhigh", "max")


def capabilities(model: Json) -> Json | None:
    """What the CLI's list says of a model's abilities, in the API's shape, which has
    more keys; None: nothing."""
    found: Json = {}
    levels = model.get("supportedEffortLevels")
    if model.get("supportsEffort") and levels:
        found["effort"] = {name: {"supported": name in levels} for name in EFFORTS}
        found["effort"]["supported"] = True
    if model.get("supportsAdaptiveThinking"):
        types = {"adaptive": {"supported": True}}
        found["thinking"] = {"supported": True, "types": types}
    return found or None


def find_model(models: list[Json], name: str) -> Json:
    """The model of an id or alias, with or without claude-cli/.  Raises ApiError
    404."""
    prefix = translate.MODEL_PREFIX
    wanted = {name, prefix + name, name.removeprefix(prefix)}
    for model in models:
        if model["id"] in wanted:
            return model
    raise ApiError(404, f"model: {name}")


def model_page(models: list[Json]) -> Json:
    """All models, as one page (API: "List models")."""
    return {
        "data": models,
        "has_more": False,
        "first_id": models[0]["id"] if models else None,
        "last_id": models[-1]["id"] if models else None,
    }


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
    if sock and sock.family != socket.AF_UNIX:
        # Its address is the one that a Host may have.
        where = host_and_port(*sock.getsockname()[:2])
        config = dataclasses.replace(config, listen_addr=where)
    config = config.checked()
    stack = contextlib.AsyncExitStack()
    bridge = Bridge(config, await stack.enter_async_context(Pool(config)))
    try:
        listening = asyncio.create_task(bridge.listen(sock))
        try:
            server = await asyncio.shield(listening)
        except asyncio.CancelledError:
            # Half a server would go on answering.
            await asyncio.wait({listening})
            if not listening.cancelled() and not listening.exception():
                listening.result().close()
            raise
        except (OSError, UnicodeError) as error:
            raise config_error("listen_addr", cannot_listen(config, error)) from error
        own = None if sock else identity(config.unix_path)
        stack.push_async_callback(stop, bridge, server, own)
        yield bridge
    finally:
        await finish_despite_cancel(stack.aclose(), bridge.cancel_answers)


async def stop(
    bridge: Bridge, server: asyncio.Server, own: tuple[int, int] | None
) -> None:
    """Stop listening, and end all connections; `own` is the bridge's own Unix
    socket."""
    loop = asyncio.get_running_loop()
    for listener in server.sockets:
        loop.remove_reader(listener.fileno())
    for _ in range(3):
        # From accept() asyncio takes so many rounds to a connection: closing earlier
        # loses it.
        await asyncio.sleep(0)
    server.close()
    await bridge.close()
    # Not the socket of another bridge that has taken the path meanwhile.
    if own and identity(bridge.config.unix_path) == own:
        os.unlink(bridge.config.unix_path)


async def finish_despite_cancel(
    work: Coroutine[Any, Any, None], on_cancel: Callable[[], None]
) -> None:
    """Finish `work` even if this task is cancelled; each cancel calls `on_cancel`, and
    is raised at the end."""
    task = asyncio.create_task(work)
    is_cancelled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            is_cancelled = True
            on_cancel()
    task.result()
    if is_cancelled:
        raise asyncio.CancelledError


def cannot_listen(config: Config, error: OSError | UnicodeError) -> str:
    if isinstance(error, UnicodeError):
        return f"{config.listen_addr!r} is no name of a host"
    if error.errno == errno.EADDRINUSE:
        return (
            f"{config.listen_addr} is already in use (another bridge?); choose another"
        )
    if error.errno == errno.EACCES and not config.unix_path:
        return f"{config.listen_addr}: only root may listen on a port below 1024"
    return f"cannot listen on {config.listen_addr}: {error.strerror or error}"


# ------------------------------------------------------------ the program

# Lines that wait for a slow reader of the log.
MAX_LOG_LINES = 1000


class LogWriter(logging.Handler):
    """Writes lines to stderr from a thread: when nobody reads it, lines are lost and
    answers go on."""

    def __init__(self) -> None:
        super().__init__()
        self.lost = 0
        self._lines: queue.Queue[bytes] = queue.Queue(MAX_LOG_LINES)
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record).encode(errors="replace")
            self._lines.put_nowait(line + b"\n")
        except queue.Full:
            self.lost += 1

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
                self.lost += 1


class JsonFormatter(logging.Formatter):
    """One JSON object a line; a request's fields are its keys."""

    def format(self, record: logging.LogRecord) -> str:
        row = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname,
        }
        # A path can hold bytes that are not UTF-8.
        words = record.getMessage().encode(errors="replace").decode()
        row.update(getattr(record, "row", None) or {"message": words})
        return orjson.dumps(row).decode()


# Seconds after the start at which the CLI is asked who is logged in: the first spare
# starts undisturbed, and a first request may make the question needless.
LOGIN_PROBE_SECS = 2.0
NO_VERSION = "unknown: `--version` prints none, so it may not be Claude Code"
# Tools of the CLI that people name, and those that it lists by another name.
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
TOOL_NAMES = {"Agent": "Task"}


async def announce(bridge: Bridge) -> None:
    """Say which CLI it is, who is logged in, and what of the agent's settings the CLI
    does not have.  Asks the CLI, which makes no model call for it."""
    config, pool = bridge.config, bridge.pool
    try:
        cli = await pool.look_at_cli()
        version = cli.version or NO_VERSION
        log.info("the claude CLI is %s, version %s", config.bin, version)
        if cli.warning:
            log.warning("%s", cli.warning)
        await asyncio.sleep(LOGIN_PROBE_SECS)
        hello = await pool.hello(gives_way=True)
        if source := translate.login_source(hello):
            where = f"user {user_name()}, {login_folder(os.environ)}"
            log.info("the claude CLI is logged in: %s (%s)", source, where)
        else:
            log.warning("nobody is logged in: %s", login_cure(config, os.environ))
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
    tools = re.split("[, ]+", pool.config.tools.strip())
    if tools == [""]:
        return []
    message = {"role": "user", "content": "-"}
    body = orjson.dumps({"model": PROBE_MODEL, "messages": [message]})
    request = translate.parse_request(body, counting=True, agent=True)
    session, lines = await pool.open(request, [], query=False)
    try:
        session.process.write(*lines)
        init = await session.process.read_until(
            lambda event: event if event.get("subtype") == "init" else None
        )
    finally:
        pool.retire(session, "probe")
    listed = translate.as_list(init.get("tools"))
    found = [
        f"{variable('tools')}: the CLI has no tool {name}{suggestion(name, TOOLS)}"
        for name in tools
        if TOOL_NAMES.get(name, name) not in ["default", *listed]
    ]
    for server in translate.as_list(init.get("mcp_servers")):
        status = server.get("status")
        if status not in ("connected", "pending"):
            found.append(f"the MCP server {server.get('name')} is not there: {status}")
    return found


def inherited_socket() -> socket.socket | None:
    """The socket of a service manager (sd_listen_fds(3)): it goes on listening while
    the bridge restarts."""
    is_ours = os.environ.pop("LISTEN_PID", "") == str(os.getpid())
    if os.environ.pop("LISTEN_FDS", "0") == "0" or not is_ours:
        return None
    try:
        os.set_inheritable(3, False)
        return socket.socket(fileno=3)
    except OSError as error:
        words = f"LISTEN_FDS names descriptor 3, which is no socket: {error.strerror}"
        raise ConfigError(words) from error


async def run(config: Config, flags: Iterable[str]) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP; a second one cuts running answers
    short."""
    stopping = asyncio.Event()
    bridge: Bridge | None = None

    def signalled() -> None:
        if stopping.is_set() and bridge:
            bridge.cancel_answers()
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            asyncio.get_running_loop().add_signal_handler(number, signalled)
    async with serve(config, inherited_socket()) as started:
        bridge = started
        for address in bridge.addresses:
            log.info("listening on %s", as_url(address))
        for message in bridge.config.warnings(os.environ):
            log.warning("%s", as_typed(message, flags))
        login = asyncio.create_task(announce(bridge))
        await stopping.wait()
        words = "shutting down"
        if bridge.running:
            words += f"; waiting up to {config.drain_secs:g} s for {bridge.running} running answers"
            words += " (Ctrl-C again to stop now)"
        log.info("%s", words)
        login.cancel()
        await asyncio.wait({login})


# What each command does, and what its own --help says.
COMMANDS = {
    "check": (
        "say whether the CLI is there, logged in, and does what is needed",
        "It starts the CLI, asks it who is logged in, and asks it two questions in front\n"
        "of a fake API on loopback, which costs nothing.  It takes the settings of the\n"
        "bridge.  Exit status 0: all of it works.",
    ),
    "login": (
        "log the CLI in, in this terminal",
        "It runs `claude auth login` with the CLI that the bridge runs (--bin), for the\n"
        "user who runs it.",
    ),
    "providers": (
        "print the model_providers of a gateway's file, completed",
        "It reads --config FILE (TOML, JSON or YAML), and prints its providers as JSON:\n"
        "those of claude-cli with the address and key of a bridge that has the same\n"
        "settings.",
    ),
}
GROUPS = {
    "everyday": "Everyday",
    "access": "Access",
    "processes": "Processes",
    "agent": "Agent mode",
    "limits": "Limits",
}


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, without quoting words that it does not know: one
    may be a key."""

    def error(self, message: str) -> NoReturn:
        flag = re.search(r"--[a-z-]+", message)
        where = flag[0] if flag else "the command line"
        words = re.sub(" '.*", "", message.rpartition(": ")[2])
        raise ConfigError(f"{where}: {words}; see --help")


def make_parser() -> Parser:
    """The command line: a command, and a flag for each setting that is no secret."""
    lines = ["Answer the Anthropic Messages API with the claude CLI.", "", "commands:"]
    lines += [f"  {name:10} {meaning}" for name, (meaning, _) in COMMANDS.items()]
    lines.append("Without a command it serves.  A command's own --help says more.")
    parser = Parser(
        prog="claude-cli-bridge",
        usage="claude-cli-bridge [check | login | providers] [--SETTING VALUE]...",
        description="\n".join(lines),
        epilog="Each setting is also an environment variable: --max-idle is\n"
        f"CLAUDE_CLI_MAX_IDLE.  {variable('api_key')} has no flag.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    version = f"claude-cli-bridge {__version__}"
    parser.add_argument("--version", action="version", version=version)
    meaning = "a gateway's file: start only if it has a claude-cli provider"
    parser.add_argument("--config", metavar="FILE", help=meaning)
    groups = {name: parser.add_argument_group(GROUPS[name]) for name in GROUPS}
    for item in dataclasses.fields(Config):
        if item.name != "api_key":
            default = f" [{item.default}]" if item.default else ""
            groups[item.metadata["group"]].add_argument(
                flag(item.name),
                metavar="VALUE",
                help=item.metadata["meaning"].replace("`", "") + default,
            )
    return parser


def main() -> None:
    """The command line.

    Exit status 2 and one line on stderr for settings that cannot work, 1 for a failed
    check.
    """
    open_standard_files()
    flags: dict[str, str] = {}
    try:
        try:
            flags = read_flags(sys.argv[1:])
            path = flags.get("config", os.environ.get(variable("config"), ""))
            execute(Config.read(os.environ, flags), flags, path)
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


# File descriptors that a client, its process and its gate take, times MAX_SESSIONS and
# connections, with room to spare.
WANTED_FILES = 65_536


def reset_inherited_state() -> None:
    """Undo what a launcher may have set for its children: blocked or ignored signals,
    without which no child is waited for, and a low limit of open files."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(hard, WANTED_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def read_flags(words: list[str]) -> dict[str, str]:
    """The command, if there is one, and the flags that are given, by setting.  Raises
    ConfigError."""
    parser = make_parser()
    asked = [word for word in words if word in COMMANDS]
    if asked and not {"-h", "--help"}.isdisjoint(words):
        print(f"usage: claude-cli-bridge {asked[0]} [--SETTING VALUE]...\n")
        print(COMMANDS[asked[0]][1])
        sys.exit(0)
    known, others = parser.parse_known_args(words)
    flags = vars(known)
    unknown = [name.partition("=")[0] for name in others if name.startswith("-")]
    if unknown:
        hint = suggestion(unknown[0], re.findall("--[a-z-]+", parser.format_help()))
        settings = [item.name for item in dataclasses.fields(Config)]
        settings.remove("api_key")
        message = f"there is no {unknown[0]}{hint or '; see --help'}"
        raise ConfigError(as_typed(message, settings))
    command = flags.get("command")
    if command and command not in COMMANDS:
        hint = suggestion(command, COMMANDS)
        names = "check, login, providers, or none to start the bridge"
        value = "a value with spaces needs quotes"
        raise ConfigError(f"there is no such command{hint or f': {names}; {value}'}")
    if others:
        raise ConfigError(f"{command} takes nothing but flags; see --help")
    return flags


def execute(config: Config, flags: Mapping[str, str], path: str) -> None:
    """Run a command of the command line; `path` is the configuration file's."""
    command = flags.get("command")
    if command == "check":
        sys.exit(0 if asyncio.run(check(config, flags)) else 1)
    if command == "login":
        program = find_cli(config.bin)
        os.execv(program, [program, "auth", "login"])
    if command == "providers" and not path:
        raise config_error("config", "providers needs a configuration file")
    providers = read_providers(path, config) if path else []
    if command == "providers":
        print(orjson.dumps(providers, option=orjson.OPT_INDENT_2).decode())
        return
    writer = LogWriter()
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    writer.setFormatter(JsonFormatter() if config.log_format == "json" else text)
    level = logging.DEBUG if config.log_level == "debug" else logging.INFO
    logging.basicConfig(level=level, handlers=[writer])
    if path and not any(map(is_own, providers)):
        log.info("there is no claude-cli provider in %s: nothing to do", path)
        return
    reset_inherited_state()
    # A thread that reads a large request gives way to the event loop sooner (5 ms by
    # default): tests/bench/hostile.py.
    sys.setswitchinterval(0.001)
    watch_without_threads()
    asyncio.run(run(config, flags))


# ------------------------------------------------------------ appendix: the page

PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="refresh" content="10">
<title>claude-cli-bridge</title>
<style>
  :root { color-scheme: light dark }
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem }
  body { margin: 2rem auto; padding: 0 1rem }
  h2 { font-size: 1.1rem; margin: 1.5rem 0 .3rem }
  table { border-collapse: collapse; width: 100% }
  td { border-top: 1px solid #8884; padding: .2rem .8rem .2rem 0 }
  td { overflow-wrap: anywhere; vertical-align: top }
  td:first-child { width: 40% }
  pre { background: #8882; padding: .8rem; font-size: .85rem }
  pre { white-space: pre-wrap; overflow-wrap: anywhere }
</style>
<h1>claude-cli-bridge</h1>
"""
EXPORTS = """\
export ANTHROPIC_BASE_URL={url}
export ANTHROPIC_API_KEY={key}
"""
CURL = """\
curl {target}/v1/messages \\
  -H 'content-type: application/json' -H "x-api-key: {key}" \\
  -d '{{"model": "sonnet", "max_tokens": 100,
       "messages": [{{"role": "user", "content": "Say hello."}}]}}'
"""


def connect_lines(bridge: Bridge) -> str:
    """What a shell takes to reach the bridge: two variables for most clients, and a
    first request."""
    key = f"${variable('api_key')}" if bridge.config.api_key else KEY_OF_CLIENTS
    curl = CURL.format(target=curl_target(bridge.url), key=key)
    if bridge.config.unix_path:
        return curl  # clients take no such address
    return EXPORTS.format(url=bridge.url, key=key) + "\n" + curl


def page_sections(bridge: Bridge) -> dict[str, list[tuple[str, str]]]:
    """What the page says, by section: names and values.  Nothing that was asked or
    answered."""
    pool, config = bridge.pool, bridge.config
    login = "not known yet"
    if pool.cli.hello:
        source = translate.login_source(pool.cli.hello)
        where = f"user {user_name()}, {login_folder(os.environ)}"
        login = f"{source} ({where})"
        if not source:
            login = f"nobody: {login_cure(config, os.environ)}"
    snapshot = pool.snapshot()
    sessions = []
    for state, turns, seconds in snapshot.processes:
        words = f"for {seconds:.0f} s; turns: {turns}"
        sessions.append((state.value, words))
    quota = []
    for name, info in snapshot.limits.items():
        used = info.get("utilization")
        share = f", {used:.0%} used" if isinstance(used, int | float) else ""
        quota.append((name, translate.get_str(info, "status") + share))
    date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(bridge.started))
    return {
        "State": [
            ("version", __version__),
            ("running since", date),
            ("listening on", ", ".join(map(as_url, bridge.addresses))),
            ("claude CLI", config.bin),
            ("its version", cli_version(pool)),
            ("logged in", login),
        ],
        "Last requests": list(map(request_row, bridge.recent)) or [("none", "")],
        "Processes": sessions or [("none", "")],
        "Quota of the account": quota or [("none reported", "")],
    }


def cli_version(pool: Pool) -> str:
    """The version of the CLI, and what is to be said of it."""
    cli = pool.cli
    remark = cli.problem or cli.warning
    return (cli.version or "not known yet") + (f" ({remark})" if remark else "")


def request_row(entry: tuple[float, str, Json]) -> tuple[str, str]:
    """When and where a request came, and what became of it."""
    at, path, row = entry
    clock = time.strftime("%H:%M:%S", time.localtime(at))
    result = [row["status"], f"{row['secs']:.2f} s"]
    result += [row.get(name) for name in ("model", "conversation", "reason")]
    words = ", ".join(str(value) for value in result if value)
    return f"{clock} {path[:MAX_LOGGED_PATH]}", words


def page_text(bridge: Bridge) -> str:
    connect = textwrap.indent(connect_lines(bridge), "  ")
    lines = ["claude-cli-bridge", "", "Connect", connect.rstrip()]
    for title, rows in page_sections(bridge).items():
        lines += ["", title]
        lines += [f"  {name:30} {value}".rstrip() for name, value in rows]
    return "\n".join([*lines, ""])


def page_html(bridge: Bridge) -> str:
    connect = html.escape(connect_lines(bridge))
    parts = [PAGE, f"<h2>Connect</h2>\n<pre>{connect}</pre>\n"]
    for title, rows in page_sections(bridge).items():
        parts.append(f"<h2>{title}</h2>\n<table>\n")
        for name, value in rows:
            cells = f"<td>{html.escape(name)}</td><td>{html.escape(value)}</td>"
            parts.append(f"<tr>{cells}</tr>\n")
        parts.append("</table>\n")
    return "".join([*parts, "</html>\n"])


# ------------------------------------------------------------ appendix: providers

# The lists of a gateway's file that hold providers; the second one is older.
PROVIDER_LISTS = ("model_providers", "llm_providers")
NO_PROVIDERS = (
    "model_providers: this is for the file of a gateway that the bridge serves; settings "
    "are flags, or variables of the environment"
)
INTERFACE = "claude-cli"
# Gateways want a key even where none is needed.
PLACEHOLDER_KEY = "claude-cli-local"


def read_providers(path: str, config: Config) -> list[Json]:
    """The `model_providers` of a gateway's configuration file: those of claude-cli
    completed, others as they are.

    TOML, YAML where PyYAML is installed, or else JSON.  Raises ConfigError, which names
    the place.
    """
    try:
        entries = read_entries(Path(path))
        providers = [
            complete_entry(entry, config) if is_own(entry) else entry
            for entry in entries
        ]
        # TOML and YAML have numbers, keys and depths that JSON has not.
        orjson.dumps(providers)
        return providers
    except ConfigError:
        raise
    except OSError as error:
        raise config_error("config", f"{path}: {error.strerror}") from error
    except ApiError as error:
        words = error.message.removeprefix("file.")
        raise config_error("config", f"{path}: {words}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise config_error("config", f"{path} cannot be read: {error}") from None


def read_entries(path: Path) -> list[Json]:
    """The providers of a file.  Raises OSError, ValueError or ApiError."""
    data = path.read_bytes()
    kind = path.suffix.lower()
    document: Any
    if kind == ".toml":
        document = tomllib.loads(data.decode())
    elif kind in (".yaml", ".yml"):
        document = load_yaml(data)
    else:
        document = orjson.loads(data)
    if document is not None:
        check_type(document, dict, "file")
    if not document or document.keys().isdisjoint(PROVIDER_LISTS):
        raise config_error("config", f"{path} has no {NO_PROVIDERS}")
    found: list[Json] = []
    for name in PROVIDER_LISTS:
        if document.get(name) is not None:
            found += check_type(document[name], list, name)
    return [check_type(entry, dict, "a provider") for entry in found]


def load_yaml(data: bytes) -> Any:
    """Raises ValueError, which holds no line of the file: there can be a key in it."""
    try:
        yaml = importlib.import_module("yaml")
    except ModuleNotFoundError:
        raise ValueError(
            "YAML needs a package: `pip install PyYAML`; TOML and JSON need none"
        ) from None
    try:
        return yaml.safe_load(data)
    except Exception as error:  # noqa: BLE001 - PyYAML raises KeyError and others, with the value in it
        mark = getattr(error, "problem_mark", None)
        raise ValueError(
            f"not YAML, line {mark.line + 1}" if mark else "not YAML"
        ) from None


def is_own(entry: Json) -> bool:
    """Whether a provider is a claude-cli one: by its model or name, or by its
    interface."""
    if entry.get("provider_interface") == INTERFACE:
        return True
    named = [str(entry.get("model")), str(entry.get("name"))]
    return any(name.startswith(translate.MODEL_PREFIX) for name in named)


def complete_entry(entry: Json, config: Config) -> Json:
    given = translate.without_nulls(entry)
    completed: Json = {}
    if "http_host" not in given:
        completed["base_url"] = config.base_url
    completed["name"] = given.get("model", translate.MODEL_PREFIX + "*")
    completed["provider_interface"] = INTERFACE
    if not given.get("passthrough_auth"):
        key = f"${variable('api_key')}" if config.api_key else PLACEHOLDER_KEY
        completed["access_key"] = key
    return completed | given


# ------------------------------------------------------------ appendix: check

# Seconds for `check`; 2 were measured.
REHEARSAL_SECS = 30.0
# ECMA-48, 8.3.41: EL.
ERASE_LINE = "\x1b[2K"
# The history and the question of the rehearsal.
SAID = [
    ("user", "red"),
    ("assistant", "green"),
    ("user", "blue"),
]
CALL: Json = {
    "type": "tool_use",
    "id": "toolu_probe",
    "name": "probe",
    "input": {},
}
# What the rehearsal looks at, and what does not work without it.
FEATURES = {
    "history": "takes a conversation at the gate",
    "settings": "takes parameters and a system prompt for one request",
    "tools": "hands over calls of a client's tools",
    "interrupt": "stops when the client leaves",
}


class FakeApi:
    """The fake API that `check` starts on loopback; it costs nothing.

    Its first answer calls a tool, the second one is held back.  It notes in `found`
    which FEATURES the CLI has.
    """

    def __init__(self, found: dict[str, bool]) -> None:
        self.found = found
        self.version = ""
        # The second answer has begun; its client is gone.
        self.held = asyncio.Event()
        self.left = asyncio.Event()

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        # asyncio would log them.
        ends = (OSError, asyncio.IncompleteReadError, asyncio.CancelledError)
        with contextlib.closing(writer), contextlib.suppress(*ends):
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: *(\d+)", head)
            body = await reader.readexactly(int(length[1]) if length else 0)
            writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n")
            writer.write(b"content-type: text/event-stream\r\n\r\n")
            if not re.match(rb"POST /v1/messages[? ]", head):
                return
            agent = re.search(rb"(?i)user-agent: claude-cli/([\w.-]+)", head)
            self.version = agent[1].decode() if agent else ""
            events = self.answer(orjson.loads(body))
            writer.writelines(map(translate.frame, events))
            if self.held.is_set():
                try:
                    await reader.read()
                finally:
                    self.left.set()

    def answer(self, asked: Json) -> list[Json]:
        """The events that answer a request."""
        message = {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "content": [],
            "model": asked["model"],
            "usage": {
                "input_tokens": 1,
                "output_tokens": 1,
            },
        }
        begin = {"type": "message_start", "message": message}
        if CALL["id"] in str(asked["messages"]):
            self.found["tools"] = "violet" in str(asked["messages"])
            self.held.set()
            return [begin]
        said = []
        for item in asked["messages"]:
            said += [
                (item["role"], word)
                for _, word in SAID
                if f"'{word}'" in str(item["content"])
            ]
        self.found["history"] = said == SAID
        has_system = "white" in str(asked["system"])
        self.found["settings"] = has_system and asked.get("temperature") == 0.5
        delta = {"stop_reason": "tool_use"}
        return [
            begin,
            {
                "type": "content_block_start",
                "index": 0,
                "content_block": CALL,
            },
            {"type": "content_block_stop", "index": 0},
            {
                "type": "message_delta",
                "delta": delta,
                "usage": {"output_tokens": 1},
            },
            {"type": "message_stop"},
        ]

    async def play(self, pool: Pool) -> None:
        """Raises ApiError when a turn fails."""
        messages: list[Json] = [{"role": role, "content": word} for role, word in SAID]
        async with self.turn(pool, messages) as first:
            await first.relay(lambda _: True, self.drain)
        result = {
            "type": "tool_result",
            "tool_use_id": CALL["id"],
            "content": "violet",
        }
        messages.append({"role": "assistant", "content": [CALL]})
        messages.append({"role": "user", "content": [result]})
        async with self.turn(pool, messages) as second:
            answer = second.relay(lambda _: True, self.drain)
            relay = asyncio.create_task(answer)
            relay.add_done_callback(lambda _: self.held.set())  # it failed
            try:
                await self.held.wait()
                if relay.done():
                    relay.result()
                # Otherwise it got the result as part of a new conversation.
                self.found["tools"] &= second.origin == "hot"
                second.interrupt()
                await self.left.wait()
                self.found["interrupt"] = not second.process.ended
            finally:
                relay.cancel()
                await asyncio.gather(relay, return_exceptions=True)

    def turn(
        self, pool: Pool, messages: list[Json]
    ) -> contextlib.AbstractAsyncContextManager[Turn]:
        body = {
            # An administrator's settings can name another API than this one: none has
            # this model, so it costs nothing.
            "model": "no-such-model",
            "max_tokens": 99,
            "temperature": 0.5,
            "system": "white",
            "messages": messages,
            "tools": [{"name": "probe", "input_schema": {"type": "object"}}],
        }
        return pool.turn(translate.parse_request(orjson.dumps(body)), None)

    async def drain(self) -> None:
        """Nothing holds this client up."""


async def rehearse(config: Config, api: FakeApi) -> None:
    """Play the scenario of a FakeApi, with an empty home: the user's files must supply
    neither a login nor another address."""
    server = await asyncio.start_server(api.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    kept = {
        "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{port}",
        "ANTHROPIC_API_KEY": "unused",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    with tempfile.TemporaryDirectory() as home:
        environ = dict(os.environ)
        environ.update(kept)
        for name in ("HOME", "CLAUDE_CONFIG_DIR"):
            environ[name] = home
        for name in ("NO_PROXY", "no_proxy"):
            environ[name] = "127.0.0.1"
        names = tuple(kept)
        config = dataclasses.replace(
            config, keep_env=names, setting_sources="", tools=""
        )
        async with server, Pool(config, environ) as pool:
            await api.play(pool)


async def check(config: Config, flags: Iterable[str]) -> bool:
    """Print in plain words whether the CLI is there, is logged in and does what is
    needed; True if all is well.  It costs no token."""
    try:
        config = config.checked()
    except ConfigError as error:
        print(f"settings: {as_typed(str(error), flags)}")
        return False
    for warning in config.warnings(os.environ):
        print(f"warning: {as_typed(warning, flags)}")
    print(f"CLI: {config.bin}")
    config = dataclasses.replace(config, spares=0)
    limit = min(REHEARSAL_SECS, config.watchdog_secs)
    try:
        with progress_line("starting it ..."):
            async with Pool(config) as pool, asyncio.timeout(limit):
                cli = await pool.look_at_cli()
                source = translate.login_source(await pool.hello())
                missing = await missing_from_agent(pool)
    except (ApiError, OSError) as error:  # TimeoutError among them
        print(f"start: does not work ({str(error) or 'no answer in time'})")
        return False
    for warning in missing:
        print(f"warning: {as_typed(warning, flags)}")
    cure = login_cure(config, os.environ)
    print(f"login: {source or 'nobody is logged in: ' + cure}")
    found = dict.fromkeys(FEATURES, False)
    api = FakeApi(found)
    failure = ""
    try:
        with progress_line("asking it two questions in front of a fake API ..."):
            async with asyncio.timeout(limit):
                await rehearse(config, api)
    except (ApiError, OSError) as error:
        failure = f" ({str(error) or 'no answer in time'})"
    version = cli.version or api.version or NO_VERSION
    print(f"version: {version}" + (f" ({cli.warning})" if cli.warning else ""))
    for name, meaning in FEATURES.items():
        fault = f"does not work: there is no sign that this CLI {meaning}{failure}"
        print(f"{name}: {'works' if found[name] else fault}")
    return bool(source) and all(found.values())


@contextlib.contextmanager
def progress_line(words: str) -> Iterator[None]:
    """On a terminal, say what is being done while it is."""
    terminal = sys.stdout if sys.stdout and sys.stdout.isatty() else None
    if terminal:
        print(words, end="\r", file=terminal, flush=True)
    try:
        yield
    finally:
        if terminal:
            print(ERASE_LINE, end="\r", file=terminal, flush=True)


if __name__ == "__main__":
    main()
