"""The processes of the CLI: spawn, speak, keep warm, retire.

A process is a cache entry.  Each request brings its whole conversation; a process that already
holds the history gives the same answer as a fresh one, only sooner.  So after an answer a session
is filed under the fingerprint of the conversation including that answer, and a request takes the
session whose fingerprint is its own history, if there is one.  A session in use is not on file, so
two requests never share one; whatever goes wrong in it retires it alone.

    SPARE ──a conversation──> BUSY ──answer complete──> IDLE ──its next message──> BUSY
         (started for a request) ──> BUSY
                                BUSY ──request withdrawn, nothing written──> as before; a spare ends
                                BUSY ──client tools called──> PARKED ──their results──> BUSY
    any of them ──fault, disconnect, TTL, LRU, shutdown──> RETIRED, until its group is reaped

`Session.move` is the only place that changes a state.

    model mode   the CLI has no tools but the client's: the default
    agent mode   the CLI runs tools of its own
    session      one process and the conversation in it
    process      a running CLI, with its pipes
    turn         one request in one session
    spare        a process that was started ahead of need, and waits at the gate, or is set up
                 as an earlier conversation began
    new          the first turn of a conversation, in a fresh process or a spare
    gate         a pipe in place of the file that the CLI resumes from; the CLI starts, and waits
                 for the conversation
    on file      idle or parked: a later request can find it
    parked       waiting, inside the CLI, for the results of client tools
    pinned       named by the client's session header
    fingerprint  a digest of a conversation, or of what a process cannot change: model, system
                 prompt, names of tools, betas
    hot          answered by the process that holds the history
    rebuilt      answered by a fresh process that was given the history
    retire       end a process, and reap it
"""

import asyncio
import contextlib
import ctypes
import dataclasses
import enum
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
)
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import orjson

if TYPE_CHECKING or not __package__:
    import translate
    from translate import (
        ApiError,
        CliEvent,
        CliInfo,
        Digests,
        Json,
        RateLimit,
        Request,
        Translator,
        cli_error,
        control_outcome,
        control_result,
    )
else:  # copied into a package
    from . import translate
    from .translate import (
        ApiError,
        CliEvent,
        CliInfo,
        Digests,
        Json,
        RateLimit,
        Request,
        Translator,
        cli_error,
        control_outcome,
        control_result,
    )

__version__ = "0.2.0"
log = logging.getLogger("claude_cli_bridge")

T = TypeVar("T")

# Bytes of one line of the CLI.  It can hold a whole tool result or screenshot: 1 MB was
# too small for the official SDK.
MAX_LINE = 64 << 20
# Bytes of events at which a pipe is no longer read: a slow client stalls only its own
# child.
MAX_UNREAD = 1 << 20
# Characters of a line of stderr that are logged, or quoted in an error.
MAX_LOGGED = 300
# How a process is ended: each signal, and the seconds it then gets; None: its gate and its
# stdin are closed.  An idle CLI exits 0.1 s after that; on SIGTERM it ends a running API call.
ENDING = (
    (None, 0.5),
    (signal.SIGTERM, 1.0),
    (signal.SIGKILL, 5.0),
)
# Seconds to wait for the first output of a process that was given its conversation, in case
# it dies and another one must take its place; 0.1 was measured for a spare.
FIRST_OUTPUT_SECS = 2.0
# Seconds after which a turn fails if its process has printed nothing: the gate did not
# reach the CLI; 0.5 was measured for 1,000 messages.
GATE_SECS = 30.0
# Seconds within which the `result` must come after an answer (0.02 was measured), and for
# `claude --version` (0.1 was measured).
LATE_SECS = 5.0
# Seconds for a count of tokens, and to ask what the CLI announces; 0.5 was measured.
COUNT_SECS = 20.0
# While a CLI renews the login, it holds this lock beside it, and touches it every 5 seconds;
# one that was not touched for LOCK_SECS was left behind.
RENEWAL_LOCK = ".oauth_refresh.lock"
LOCK_SECS = 10.0
# Requests of this many bytes or more are read and written in a thread: a megabyte takes
# 10 to 100 ms.
THREAD_SIZE = 64 << 10
# Requests of this many bytes or more share another thread, so that smaller ones need not
# wait for them.
LARGE_SIZE = 1 << 20
# Iterations of the event loop until all that is in a pipe has been handled: one polls the
# pipe, one reads it, one handles what was read, and two more handle its end (asyncio's
# call_soon).
READ_ROUNDS = 5
# How many entries a cache has: fingerprints of past sessions, to explain why a conversation
# is rebuilt, counts of tokens, and announcements.
MAX_CACHED = 4096
# The model of a process that is asked about the CLI itself.
PROBE_MODEL = "sonnet"
# Seconds between two looks at all processes.
SWEEP_SECS = 1.0
# Seconds for which a spare is kept, once it is set up, for other conversations than the
# newest.
CALM_SECS = 5.0
# Tokens of the prompt that the API adds for tools: the CLI subtracts them, so they are
# added back.
TOOLS_PROMPT_TOKENS = 500
# Errors of a request that brings only what is new in a named conversation.
LOST_NAME = (
    "messages: the process that held the conversation of this name is gone; send the whole "
    "conversation, or start over with a new name"
)
NO_IMAGE = (
    "messages: an image cannot be added to a conversation that is known by its name alone; "
    "send the whole conversation"
)
NO_START = "the claude CLI did not start"
NO_ROOM = "all processes were busy or starting, none got free"
# Why a conversation is rebuilt that no session is known to have held.
UNKNOWN_HISTORY = "unknown-history"
# Events that a process prints only when a turn asked for them.
ANSWERS = {"stream_event", "assistant", "user", "result"}
# Only these show that a turn is alive; status lines and keep-alives come from a
# half-open stream as well.
SIGNS_OF_LIFE = ANSWERS | {"control_request", "control_response"}
CORES = os.cpu_count() or 1


# ------------------------------------------------------------ settings


def setting(
    default: Any,
    meaning: str,
    group: str = "processes",
    *,
    least: float = 0,
    choices: tuple[str, ...] = (),
    secret: bool = False,
) -> Any:
    """A field of the settings.

    All that is said of a setting comes from here: the environment variable and the
    flag, its bounds, --help and the README's table.
    """
    metadata = {
        "meaning": meaning,
        "group": group,
        "least": least,
        "choices": choices,
    }
    return field(default=default, metadata=metadata, repr=not secret)


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """Settings of the processes."""

    bin: str = setting(
        "",
        "the CLI; by default `claude` on PATH, else the one in the `claude-agent-sdk` wheel",
        "everyday",
    )
    keep_env: tuple[str, ...] = setting(
        (),
        "names of environment variables to hand to the CLI, such as `ANTHROPIC_API_KEY`",
        "everyday",
    )
    session_ttl_secs: float = setting(
        600.0,
        "idle seconds after which a process ends; 0: never",
    )
    watchdog_secs: float = setting(
        600.0,
        "seconds of silence inside a turn after which it fails with 504",
        least=0.1,
    )
    max_sessions: int = setting(
        32,
        "most CLI processes at a time; each takes about 120 MB of its own",
        least=1,
    )
    max_idle: int = setting(
        4,
        "processes that are kept warm after their answer",
    )
    max_turns: int = setting(
        500,
        "turns after which a process ends: without a pause it would never reach its TTL",
        least=1,
    )
    spares: int = setting(
        2,
        "processes that are started ahead of need: agents ask for a title and an answer at once",
    )
    queue_secs: float = setting(
        30.0,
        "seconds that a request waits, for its session or for room, before it gets 529",
    )
    max_queue: int = setting(
        1000,
        "most requests that may wait for room; more get 529 at once",
    )
    retries: int = setting(
        0,
        "how many times the CLI itself retries a failed API call; clients retry as well",
    )
    tools: str = setting(
        "",
        "agent mode: `default`, or a list of the CLI's own tools; empty: no tools but the client's",
        "agent mode",
    )
    permission_mode: str = setting(
        "default",
        "the CLI's permission mode in agent mode",
        "agent mode",
        choices=(
            "default",
            "acceptEdits",
            "auto",
            "bypassPermissions",
            "dontAsk",
            "plan",
        ),
    )
    cwd: str = setting(
        "",
        "working directory of agent mode; by default the bridge's own",
        "agent mode",
    )
    mcp_config: str = setting(
        "",
        "agent mode: a file with the MCP servers that the CLI may use, in the CLI's own format",
        "agent mode",
    )
    setting_sources: str = setting(
        "",
        "`user` if your login is an apiKeyHelper or an env block in the CLI's settings file",
        "access",
    )
    trace_dir: str = setting(
        "",
        "a folder for one file a request, with all that goes to the CLI and comes from it: "
        "prompts and answers",
        "everyday",
    )


# ------------------------------------------------------------ command line and environment


@dataclass(frozen=True)
class Kind:
    """What a process is started for."""

    # Its --model; empty: it takes the one of the conversation that it is given
    # (`CliInfo.takes_from_conversation`), so it will do for many models.
    model: str = ""
    # It has the CLI's own tools.
    agent: bool = False
    # It runs in the CLI's bare mode, in which the CLI adds nothing to a conversation, and
    # reads no subscription's login.
    bare: bool = False
    # To find out what the CLI announces: it saves its conversation in a file beside its gate,
    # and reaches no API.
    is_probe: bool = False


# Where an administrator's settings are, and a list of MCP servers, on Linux and on macOS.
MANAGED = (
    "/etc/claude-code",
    "/Library/Application Support/ClaudeCode",
)


def arguments(config: PoolConfig, kind: Kind, settings: str) -> list[str]:
    """The command line of a process; unless `config` or `kind` says otherwise, no settings of
    the user's (the file `settings`), nothing on disk, and no tools but the client's."""
    argv = [
        config.bin,
        "-p",
        "--verbose",
        "--input-format",
        "stream-json",
        "--output-format",
        "stream-json",
        "--include-partial-messages",
        "--setting-sources",
        config.setting_sources,
        "--disable-slash-commands",
        "--allowedTools",
        f"mcp__{translate.MCP_SERVER}__*",
        # The API's default; without the flag 2.1.330 asks for less.
        "--effort",
        "high",
    ]
    # The CLI reads variables from files too, such as ~/.claude.json: these stand over them.
    over = OVER_SETTINGS | {"env": translate.without(CHILD_DEFAULTS, config.keep_env)}
    if config.setting_sources and not kind.agent:
        over |= PLAIN_SETTINGS
    if kind.is_probe:
        over["env"] |= UNREACHABLE
    else:
        argv += ["--no-session-persistence"]
    chosen = orjson.dumps(over).decode()
    if kind.bare and config.setting_sources and os.path.isfile(settings):
        # Otherwise the bare mode reads no apiKeyHelper (the CLI's help on --bare).
        chosen = settings
    argv += ["--settings", chosen]
    # The CLI refuses the flag beside an administrator's list, which excludes others.
    if not any(os.path.exists(f"{folder}/managed-mcp.json") for folder in MANAGED):
        argv += ["--strict-mcp-config"]
    if kind.agent:
        argv += ["--tools", config.tools, "--permission-mode", config.permission_mode]
        # These go on after an answer, or promise to; CHILD_DEFAULTS do not stop them.
        argv += ["--disallowedTools", "Monitor,ScheduleWakeup"]
        if config.mcp_config:
            argv += ["--mcp-config", os.path.abspath(config.mcp_config)]
            # Whoever names the file allows its servers.
            argv += ["--allowedTools", ",".join(mcp_permissions(config.mcp_config))]
    else:
        argv += ["--tools", "", "--permission-mode", "default"]
    if kind.model:
        argv += ["--model", kind.model]
    return argv


def mcp_permissions(path: str) -> list[str]:
    """The permissions to use the MCP servers in a file; the CLI writes their names so.
    Raises OSError."""
    content = translate.parsed(Path(path).read_bytes())
    servers = translate.as_object(translate.as_object(content).get("mcpServers"))
    return ["mcp__" + re.sub("[^a-zA-Z0-9_-]", "_", name) for name in servers]


# Where a login is, and where its tokens are if they are elsewhere.
LOGIN_FOLDERS = ("CLAUDE_CONFIG_DIR", "CLAUDE_SECURESTORAGE_CONFIG_DIR")
# The beginnings of the names of variables that every process gets.  None of them changes
# what the CLI asks of the model.  It is a list of what is allowed, so that no variable that
# only a new version reads is passed on.
ALLOWED = (
    *LOGIN_FOLDERS,
    # What a user sets so that the CLI sends no reports.
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC",
    "DISABLE_ERROR_REPORTING",
    "DO_NOT_TRACK",
    # Where it runs, and as whom.
    "DBUS_SESSION_BUS_ADDRESS",
    "HOME",
    "KRB5",
    "LANG",
    "LC_",
    "LD_",
    "LOGNAME",
    "PATH",
    "SHELL",
    "TEMP",
    "TERM",
    "TMP",
    "TZ",
    "USER",
    "XDG_",
    # How a launcher finds it.
    "ASDF_",
    "DYLD_",
    "FNM_",
    "MISE_",
    "NIX_",
    "NODENV_",
    "NPM_CONFIG_",
    "NVM_",
    "PREFIX",
    "PROTO_",
    "VOLTA_",
    # How it reaches the network, and whom it trusts.
    "ALL_PROXY",
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "NODE_EXTRA_CA_CERTS",
    "NODE_TLS_REJECT_UNAUTHORIZED",
    "NODE_USE_SYSTEM_CA",
    "NO_PROXY",
    "PROXYCHAINS_",
    "SSH_AUTH_SOCK",
    "SSL_CERT_",
    "TORSOCKS_",
    # Which cloud it is logged in to.
    "AWS_",
    "AZURE_",
    "CLOUDSDK_",
    "CLOUD_ML_REGION",
    "GCE_",
    "GCLOUD_",
    "GOOGLE_",
    "IDENTITY_",
    "METADATA_SERVER_DETECTION",
    "MSI_",
    "VERTEX_REGION_",
)
# In agent mode commands need the variables of the user's shell, and so does an
# apiKeyHelper in the user's settings.  Such processes also get all variables that begin with
# none of these.
SCRUBBED = (
    "ANTHROPIC_",
    "API_",
    "BASH_",
    "CLAUDE",
    "DEBUG",
    "DISABLE_",
    "ENABLE_",
    "FORCE_",
    "MAX_",
    "MCP_",
    "OTEL_",
    "USE_",
)
CHILD_DEFAULTS = {
    # Tools keep the names that the client gave them, in the API's requests and in its
    # answers.
    "CLAUDE_AGENT_SDK_MCP_NO_PREFIX": "1",
    # Only the betas that the client asks for, and those that the CLI needs itself.  It
    # also keeps 2.1.330 from stating the effort a second time, in a message.
    "CLAUDE_CODE_DISABLE_EXPERIMENTAL_BETAS": "1",
    "DISABLE_INTERLEAVED_THINKING": "1",
    # 2.1.330 keeps the order of texts and tool calls in an assistant message of the
    # past.
    "CLAUDE_CODE_STELLAR_DRIFT": "1",
    # No @file of a user text is read.
    "CLAUDE_CODE_DISABLE_ATTACHMENTS": "1",
    # Thinking is what a request asks for.
    "CLAUDE_CODE_DISABLE_THINKING": "1",
    # The model asked for, or an error; and no newer one in place of an old one.
    "CLAUDE_CODE_NO_MODEL_FALLBACK": "1",
    "CLAUDE_CODE_DISABLE_LEGACY_MODEL_REMAP": "1",
    # A refusal is an answer: 2.1.330 would ask once more.
    "CLAUDE_CODE_DISABLE_REFUSAL_RETRY": "1",
    # A stream that broke off is a failure: the CLI would ask once more, without
    # streaming.
    "CLAUDE_CODE_DISABLE_NONSTREAMING_FALLBACK": "1",
    # Nothing goes on after an answer: a task in the background would make a turn of
    # its own.
    "CLAUDE_CODE_DISABLE_BACKGROUND_TASKS": "1",
    "CLAUDE_CODE_DISABLE_CRON": "1",
    "CLAUDE_CODE_DISABLE_WORKFLOWS": "1",
    # From 2.1.224 on it takes messages of other sessions on this machine, at a socket.
    "CLAUDE_CODE_HARBOR_KITE": "0",
    # With its reports of usage the CLI fixes the betas at its start, before it knows the
    # client's, and takes features that Anthropic's servers switch on for some accounts:
    # they add to what the model is told, and let an agent go on after its answer.
    "DISABLE_TELEMETRY": "1",
    # The API judges how long a conversation may be.
    "CLAUDE_CODE_BLOCKING_LIMIT_OVERRIDE": "100000000",
    # The conversation is the client's.
    "DISABLE_AUTO_COMPACT": "1",
    # No updates, and no tools but those of the request.
    "DISABLE_AUTOUPDATER": "1",
    "ENABLE_CLAUDEAI_MCP_SERVERS": "0",
    "ENABLE_TOOL_SEARCH": "false",
}
# Logins that the CLI also finds in its bare mode, by the variable that holds them or
# asks for them, unless its value means no.
BARE_LOGINS = (
    "ANTHROPIC_API_KEY",
    "CLAUDE_CODE_USE_BEDROCK",
    "CLAUDE_CODE_USE_FOUNDRY",
    "CLAUDE_CODE_USE_VERTEX",
)
FALSE_VALUES = ("", "0", "false", "no", "off")
# In model mode only.
MODEL_MODE = {
    # A client's tool named Bash or Agent must not bring Claude Code's own words about
    # commits and about its subagents into the request.
    "CLAUDE_AGENT_SDK_DISABLE_BUILTIN_AGENTS": "1",
    "CLAUDE_CODE_DISABLE_GIT_INSTRUCTIONS": "1",
    # No CLAUDE.md of the user's or an administrator's.
    "CLAUDE_CODE_DISABLE_CLAUDE_MDS": "1",
    # Each call of the API is logged: one that the API refused, and that the CLI repeats
    # in another form, gives no event.
    "ANTHROPIC_LOG": "info",
}
# What stands over the user's settings: no other session of the CLI may write into a
# conversation (its manual, "Cross-session messaging").
OVER_SETTINGS: Json = {"crossSessionInbound": "refuse"}
# In model mode only: what else the user's settings would add to a conversation.
PLAIN_SETTINGS: Json = {
    "disableAllHooks": True,
    "language": "",
    "outputStyle": "default",
}
# The beginnings of variables that say which models the CLI runs.
MODEL_VARIABLES = ("ANTHROPIC_MODEL", "ANTHROPIC_DEFAULT_")
# An address where nobody answers: RFC 863's port, on loopback.
NOWHERE = "http://127.0.0.1:9"
# For a process whose question must reach no API: it gets this as environment and as
# settings.
UNREACHABLE = {
    "ANTHROPIC_BASE_URL": NOWHERE,
    "CLAUDE_CODE_MAX_RETRIES": "0",
    "HTTP_PROXY": NOWHERE,
    "HTTPS_PROXY": NOWHERE,
    "NO_PROXY": "",
    "http_proxy": NOWHERE,
    "https_proxy": NOWHERE,
    "no_proxy": "",
}


def child_environment(
    config: PoolConfig, environ: Mapping[str, str], kind: Kind
) -> dict[str, str]:
    """The environment of a process: those variables of `environ` that it may have (ALLOWED,
    `keep_env`, the user's shell), and those that the bridge sets."""
    has_users_shell = kind.agent or config.setting_sources
    child = CHILD_DEFAULTS | {"CLAUDE_CODE_MAX_RETRIES": str(config.retries)}
    for name, value in environ.items():
        # Proxies are also set in lower case.
        is_allowed = name.upper().startswith(ALLOWED)
        is_of_shell = has_users_shell and not name.startswith(SCRUBBED)
        # Never the bridge's own, such as its key.
        is_wanted = name in config.keep_env and not name.startswith("CLAUDE_CLI_")
        if name in LOGIN_FOLDERS:
            # To the CLI an empty one is a folder; children have another working directory.
            if value:
                child[name] = os.path.abspath(os.path.expanduser(value))
        elif is_allowed or is_of_shell or is_wanted:
            child[name] = value
    if not has_users_shell:
        # The CLI would log the results of tools that fail in this folder.
        child["XDG_CACHE_HOME"] = os.devnull
    if not kind.agent:
        child |= MODEL_MODE
    if kind.bare:
        child["CLAUDE_CODE_SIMPLE"] = "1"
    if kind.is_probe:
        child |= UNREACHABLE
    return child


def login_folder(environment: Mapping[str, str]) -> str:
    """Where the CLI keeps the user's login and settings."""
    return environment.get("CLAUDE_CONFIG_DIR") or os.path.expanduser("~/.claude")


def token_folder(environment: Mapping[str, str]) -> str:
    """Where the CLI keeps the tokens of the login, and the lock of one that renews it."""
    folder = environment.get("CLAUDE_SECURESTORAGE_CONFIG_DIR")
    return folder or login_folder(environment)


def settings_file(environment: Mapping[str, str]) -> str:
    """The user's own settings of the CLI."""
    return f"{login_folder(environment)}/settings.json"


def session_id(token: str) -> str:
    """The id of a session header: a UUID as it is, any other token hashed to one
    (UUIDv5, OID namespace)."""
    try:
        return str(uuid.UUID(token))
    except ValueError:
        return str(uuid.uuid5(uuid.NAMESPACE_OID, token))


def watch_without_threads() -> None:
    """Let asyncio wait for children by their pidfds, as Python 3.12 does by itself:
    3.11 has a thread for each, with a stack and an arena, 70 MB of address space.  To
    be called before a loop runs."""
    if sys.platform != "linux" or sys.version_info >= (3, 12):
        return
    with contextlib.suppress(OSError):  # Linux older than 5.3
        os.close(os.pidfd_open(os.getpid()))
        asyncio.set_child_watcher(asyncio.PidfdChildWatcher())


# Run in a new child: it is killed when the bridge dies, even by SIGKILL (prctl(2),
# PR_SET_PDEATHSIG).  A CLI that only sees its stdin close finishes a running turn
# first, and 2.1.330 calls the API once more for a parked tool call.
die_with_parent: Any = None
if sys.platform == "linux":
    die_with_parent = partial(ctypes.CDLL(None).prctl, 1, signal.SIGKILL)


# ------------------------------------------------------------ gates and traces


def gate_folder(descriptor: int) -> str:
    """A new folder in which `gate.jsonl` leads a child to the pipe that it inherits as
    `descriptor`.  Raises OSError.

    The CLI wants a name that ends in .jsonl.  One that saves its conversation does so in the
    same folder.
    """
    try:
        folder = tempfile.mkdtemp(prefix="claude-cli-bridge-")
    except FileNotFoundError:
        # The folder that Python chose at its start is gone.
        tempfile.tempdir = None
        folder = tempfile.mkdtemp(prefix="claude-cli-bridge-")
    os.symlink(f"/dev/fd/{descriptor}", f"{folder}/gate.jsonl")
    return folder


# The writing ends of all gates.  A program that embeds the bridge may fork.  The fork
# inherits them, and a pipe ends only when all its writers have closed it, so the fork
# closes its own.
GATES: weakref.WeakSet[IO[bytes]] = weakref.WeakSet()


def close_gates() -> None:
    for gate in GATES:
        gate.close()


os.register_at_fork(after_in_child=close_gates)


class Trace:
    """A file with the lines that go to the CLI and come from it for one request.

    Each is an object {"to": ...} or {"from": ...} that holds the line's JSON, or its
    text if it is not JSON.  When the file cannot be written, the request goes on.
    """

    def __init__(self, folder: str, request_id: str) -> None:
        # Empty: nothing is written, or no more.
        self._path = f"{folder}/{request_id}.jsonl" if folder and request_id else ""

    def add(self, direction: str, lines: Iterable[bytes]) -> None:
        if not self._path:
            return
        try:
            with open(self._path, "ab", opener=partial(os.open, mode=0o600)) as file:
                for line in lines:
                    value: object = line.decode(errors="replace")
                    if translate.parsed(line) is not None:
                        value = orjson.Fragment(line.strip())
                    file.write(translate.json_line({direction: value}))
        except OSError as error:
            log.warning("the trace of a request is incomplete: %s", error)
            self._path = ""


# ------------------------------------------------------------ a child


class Child(asyncio.SubprocessProtocol):
    """A child process as bytes: its gate, its lines in and out, its end.

    A subclass takes the lines.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int] = self.loop.create_future()
        # It has printed something; once it has its conversation, something since then.
        self.has_spoken = False
        # Where its lines are traced.
        self.trace = Trace("", "")
        # When it was given its conversation; infinite: not yet.
        self.opened_at = math.inf
        # The beginnings of lines of stdout and of stderr whose ends have not come.
        self._partials = {1: bytearray(), 2: bytearray()}
        # The last line that it wrote to stderr.
        self._complaint = ""
        # The folder of its gate; empty: there is none to remove.
        self._folder = ""

    def lines_received(self, lines: list[bytes], size: int) -> None:
        """Called with the whole lines of a read of `size` bytes."""
        raise NotImplementedError

    async def spawn(
        self, argv: list[str], environment: dict[str, str], cwd: str
    ) -> None:
        """Start it at its gate, in a process group of its own; without `cwd` it works
        in the folder of its gate.  Raises OSError when it cannot be started."""
        reading, writing = os.pipe()
        with os.fdopen(reading):
            end = os.fdopen(writing, "wb", 0)
            GATES.add(end)
            self._gate, _ = await self.loop.connect_write_pipe(
                asyncio.BaseProtocol, end
            )
            try:
                self._folder = gate_folder(reading)
                await self.loop.subprocess_exec(
                    lambda: self,
                    *argv,
                    "--resume",
                    f"{self._folder}/gate.jsonl",
                    env=environment,
                    cwd=cwd or self._folder,
                    pass_fds=(reading,),
                    start_new_session=True,
                    preexec_fn=die_with_parent,
                )
            except BaseException:
                self._gate.close()
                self._remove_folder()
                raise

    # The gate

    def open_gate(self, rows: list[bytes]) -> None:
        """Give the waiting child its conversation (`translate.transcript`); it goes
        through as the child reads."""
        self.trace.add("to", rows)
        self.opened_at = time.monotonic()
        # With Bedrock it has logged calls of the API at its start.
        self.has_spoken = False
        if not self._gate.is_closing():
            self._gate.writelines(rows)
            self._gate.close()

    def _remove_folder(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def saved_rows(self) -> bytes:
        """What it has saved of its conversation.  When it prints the `result` of a turn, all
        of that turn is in it."""
        # The CLI names the file by a UUID.
        files = Path(self._folder).glob("*-*.jsonl")
        return b"".join(path.read_bytes() for path in files)

    # Lines

    def write(self, *lines: bytes) -> None:
        self.trace.add("to", lines)
        if not self._stdin.is_closing():
            self._stdin.writelines(lines)

    # asyncio's callbacks

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._stdin = transport.get_pipe_transport(0)
        self._stdout = transport.get_pipe_transport(1)
        self.pid: int = transport.get_pid()
        if self._gate.is_closing():  # its spawn has failed meanwhile (uvloop)
            transport.close()  # kills it, and reaps it

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        partial_line = self._partials[fd]
        *lines, rest = data.split(b"\n")
        if lines:
            lines[0] = bytes(partial_line) + lines[0]
            partial_line.clear()
        partial_line += rest
        if fd == 2:
            # Twice what is logged, so that a key that the log cuts is still known as one.
            del partial_line[2 * MAX_LOGGED :]
            for complaint in filter(None, map(bytes.strip, lines)):
                text = translate.masked(complaint.decode(errors="replace"))
                self._complaint = text[:MAX_LOGGED]
                # What follows a brace can be a line that it was sent.
                words = self._complaint.partition("{")[0]
                log.debug("process %s prints: %s", self.pid, words)
            return
        self.has_spoken = True
        if lines:
            self.trace.add("from", lines)
        self.lines_received(lines, len(data))

    def process_exited(self) -> None:
        # What it left behind in its group; `kill` does nothing after `exited`.
        self.kill(signal.SIGKILL)
        self._gate.close()
        self.exited.set_result(self._transport.get_returncode())

    # The end

    def kill(self, number: signal.Signals) -> None:
        """Send a signal to its process group."""
        if self.exited.done():
            return  # its number may be another's
        # EPERM on macOS, for a group of zombies.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    async def death(self) -> ApiError:
        """The error of a child whose output has ended."""
        # Its status follows the end of its output.
        await asyncio.wait({self.exited}, timeout=1)
        reason = "the claude CLI closed its output"
        if self.exited.done():
            reason = f"the claude CLI exited with status {self.exited.result()}"
        self.pipe_data_received(2, b"\n")  # its last line may have no end
        # What it printed can quote a prompt.
        message = f"{reason}: {self._complaint}" if self._complaint else reason
        return ApiError(502, message, log_reason=reason)

    async def end(self, wait_until_safe: Callable[[], Awaitable[None]]) -> None:
        """End it and its group, and wait until it is reaped.  Before each step
        `wait_until_safe` is awaited (`Inspector.wait_for_renewal`)."""
        for number, seconds in ENDING:
            if self.exited.done():
                break
            await wait_until_safe()
            if number:
                self.kill(number)
            else:
                self._gate.close()
                self._stdin.close()
            await asyncio.wait({self.exited}, timeout=seconds)
        self._transport.close()
        self._remove_folder()


# ------------------------------------------------------------ the CLI

# Versions of the CLI (README, "Versions of the CLI"; tests/README.md has what was seen of
# each).  One older than this lists no full names of models; with still older ones the API
# gets another request than the client's.
OLDEST = "2.1.197"
NEWEST_TESTED = "2.1.332"
# 2.1.266 announces nothing to the model (`translate.ANNOUNCEMENTS`), 2.1.285 does; those
# between were not tried.
ANNOUNCES = "2.1.267"
# From here on it announces nothing in its bare mode; 2.1.285 does.
QUIET_IF_BARE = "2.1.300"
# From here on it keeps a text that follows a tool call in its place.
KEEPS_ORDER = "2.1.266"
# From here on a conversation can end with an assistant message.
CONTINUES = "2.1.300"


@dataclass(eq=False)
class Cli:
    """The CLI that is installed, and what is known about it.  Another program in its
    place, or another login, is another Cli."""

    # The path of the program.
    program: str = ""
    # The program, the user's settings, and the credentials.
    files: tuple[object, ...] = ()
    # As `claude --version` prints it; empty: unknown.
    version: str = ""
    # What it reported of itself last.
    info: CliInfo = field(default_factory=CliInfo)
    # Limits of the account by type, the one reported last at the end.
    rate_limits: dict[str, RateLimit] = field(default_factory=dict)
    # Answers of `count_tokens`.
    counts: OrderedDict[str, int] = field(default_factory=OrderedDict)
    # By `announcement_key`, what it announces to a model (`Inspector.announcements_for`).
    announcements: OrderedDict[Any, list[Json]] = field(default_factory=OrderedDict)

    def take_in(self, info: CliInfo) -> None:
        """Remember what a process reports.  The list of models is not replaced: a process
        may list the model that it runs in another way."""
        models = self.info.models or info.models
        self.info = dataclasses.replace(info, models=models)

    def announcement_key(self, model: str) -> tuple[str, str, str]:
        """What its announcements depend on: the model, the account and the day."""
        account = translate.digest(self.info.account)
        return self.info.full_name(model), account, time.strftime("%Y-%m-%d")

    def is_at_least(self, version: str) -> bool:
        """Whether it is this version or newer; an unknown version counts as newer."""
        known = numbers(self.version)
        return not known or known >= numbers(version)

    @property
    def problem(self) -> str:
        """Why it cannot be used; empty: it can."""
        if self.is_at_least(OLDEST):
            return ""
        return (
            f"the claude CLI is version {self.version}, and {OLDEST} or newer is needed: "
            f"{update_cure(self.program)}"
        )

    @property
    def warning(self) -> str:
        """What to do about a version that was not tested; empty: nothing."""
        if numbers(self.version) <= numbers(NEWEST_TESTED):
            return ""
        return (
            f"the claude CLI {self.version} is newer than {NEWEST_TESTED}, the newest that "
            "was tested: `claude-cli-bridge check` tries it"
        )


def numbers(version: str) -> tuple[int, ...]:
    """A version, to be compared; empty: unknown."""
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def update_cure(program: str) -> str:
    """How to update the CLI; the one in the wheel is updated by pip."""
    if "claude_agent_sdk" in os.path.realpath(program):
        return "run `pip install --upgrade claude-agent-sdk`"
    return "run `claude update`, or install Claude Code anew"


def identify_file(path: str) -> object:
    """Which file is at a path, to be compared; None: there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def ask_version(program: str, environment: Mapping[str, str]) -> str:
    """What `claude --version` prints first, such as 2.1.332; empty: it printed none within
    LATE_SECS.  It waits for that."""
    try:
        done = subprocess.run(
            [program, "--version"],
            env=environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            errors="replace",
            timeout=LATE_SECS,
            start_new_session=True,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""  # the first conversation reports a CLI that does not start
    match = re.match(r"\d+\.\d\S*", done.stdout)
    return match[0] if match else ""


# ------------------------------------------------------------ a process


class Process(Child):
    """The CLI's protocol on a child: its control requests, tool calls, silence, faults.

    Lines are read whether or not a turn is running: control requests are answered at
    once, a turn's events wait for `read`, and what comes unasked is a fault.
    """

    def __init__(self, cli: Cli) -> None:
        super().__init__()
        # Its output has ended.
        self.eof = False
        # The CLI that it runs.
        self.cli = cli
        # The client's tools, for the CLI to list; set by `Session.adopt`.
        self.tools: list[Json] = []
        # The CLI has listed them.
        self.has_listed = False
        # The CLI runs a tool of its own, and silence is no fault; set by `Turn.relay`.
        self.working = False
        # Called with the reason when it fails between turns; set by `Starter.spawn`.
        self.on_fault: Callable[[str], None] | None = None
        # A turn is running: events are kept for it.
        self._is_in_turn = False
        # Set unless the last turn's `result` is still to come.
        self._settled = asyncio.Event()
        self._settled.set()
        # By id, the tool calls that wait for a result.
        self._calls: dict[str, CliEvent] = {}
        # By id, the results that wait for their call: the CLI may call one by one.
        self._results: dict[str, Json] = {}
        # Ids of the client tools that the last answer called: the CLI's calls of them may
        # come later.
        self.expected_calls: frozenset[str] = frozenset()
        # When the last sign of life came, or will come after an announced retry.
        self._alive_at = time.monotonic()
        self._events: deque[CliEvent] = deque()
        # Bytes that have come since the last `read`; beyond MAX_UNREAD no more are read.
        self._unread = 0
        # Not set while somebody waits for an event.
        self._news = asyncio.Event()
        self._news.set()
        self._failure: ApiError | None = None

    @property
    def ended(self) -> bool:
        """Its output has ended, or it is dead."""
        return self.eof or self.exited.done()

    @property
    def is_unusable(self) -> bool:
        """It cannot take another turn: it failed or ended."""
        return self._failure is not None or self.ended

    # Turns

    def begin_turn(self, trace: Trace | None = None) -> None:
        """Keep events from now on, and trace all lines."""
        self.trace = trace or self.trace
        self._is_in_turn = True
        self.expected_calls = frozenset()
        self._alive_at = time.monotonic()

    def end_turn(self, result: CliEvent | None, calls: Iterable[str] = ()) -> str:
        """End a turn whose answer called the client tools `calls`.

        The turn's `result` was read, or is among the events that were not, or is still to
        come, or the calls wait.  Returns why the process cannot go on: "failed" if the result
        is an error, "unasked" if something followed the result, else "".
        """
        self._is_in_turn = False
        self.expected_calls = frozenset(calls)
        reason = ""
        for event in self._events:
            if result and self.is_unasked(event):
                reason = "unasked"
            if event["type"] == "result":
                result = event
        self._events.clear()
        self._resume_reading()
        if not (result or self.expected_calls or self.is_unusable):
            self._settled.clear()
        if result and result.get("is_error"):
            reason = "failed"
        return reason

    async def is_ready(self) -> bool:
        """Whether it is done with its last turn, and has printed nothing since."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LATE_SECS):
                await self._settled.wait()
        await read_pipes()
        return self._settled.is_set() and not self.is_unusable

    def hand_over(self, results: dict[str, Json]) -> None:
        """Answer tool calls with their results, by id: calls that have come are answered
        now, the others when they come."""
        self._results |= results
        self._answer_calls()

    def _answer_calls(self) -> None:
        for call in self._calls.keys() & self._results.keys():
            event, result = self._calls.pop(call), self._results.pop(call)
            self.write(translate.control_answer(event, self.tools, result))

    # Reading

    async def read(self) -> deque[CliEvent]:
        """Wait for events, and return all that have come.  The caller takes out those that
        it handles; the others are there at the next call.

        Raises ApiError: 504 when it was silent for too long (`check_silence`), 502 when
        it failed or ended.
        """
        while not self._events:
            if self._failure:
                raise self._failure
            if self.eof:
                raise await self.death()
            self._news.clear()
            try:
                await self._news.wait()
            finally:  # also for one who waits no longer
                self._news.set()
        self._resume_reading()
        return self._events

    def check_silence(self, watchdog_secs: float) -> bool:
        """Fail a turn that has waited for too long, or for a dead process.  Returns whether
        the watchdog failed it."""
        if not self._is_in_turn or self._news.is_set():
            return False  # nobody waits: the client may be slow
        if self.exited.done():  # another program that it started keeps its output open
            self.eof = True
            self.wake_all()
            return False
        now = time.monotonic()
        if not self.has_spoken and now >= self.opened_at + GATE_SECS:
            self.fail(
                cli_error(
                    "the claude CLI said nothing after its start: CLAUDE_CLI_BIN may be a "
                    "program that closes the descriptors that it inherits"
                )
            )
        elif not self.working and now >= self._alive_at + watchdog_secs:
            message = f"the claude CLI was silent for {watchdog_secs:g} seconds"
            self.fail(ApiError(504, message))
            return True
        return False

    async def read_until(self, find: Callable[[CliEvent], Any]) -> Any:
        """Read until `find` returns something for an event, and return that.  Raises
        ApiError: as `read`, and that of a turn that failed before."""
        translator = Translator()  # it raises failures
        while True:
            event = (await self.read()).popleft()
            if found := find(event):
                return found
            translator.feed(event)

    async def ask_announcements(self, *, query: bool) -> list[Json]:
        """What it has announced by the end of one more question, for a process that writes
        its conversation to a file.  Without `query` it does not ask the API.  Raises
        ApiError."""
        question = [translate.text_block("-")]
        self.write(translate.user_line(question, str(uuid.uuid4()), query=query))
        await self.read_until(lambda event: event["type"] == "result")
        return translate.announcements(self.saved_rows())

    def _resume_reading(self) -> None:
        if self._unread > MAX_UNREAD:
            self._alive_at = time.monotonic()  # the silence was the client's
            if not self.eof:
                self._stdout.resume_reading()
        self._unread = 0

    # What a child reports

    def lines_received(self, lines: list[bytes], size: int) -> None:
        beginning = self._partials[1]
        if self._failure:  # it is not used again
            beginning.clear()
            return
        try:
            for line in lines:
                for event in translate.decode(line):
                    if self._is_in_turn:
                        self._events.append(event)
                    elif self.is_unasked(event):
                        self.fail(cli_error("the claude CLI spoke unasked"), "unasked")
                        return
                    self._act_on(event)
            if len(beginning) > MAX_LINE:
                limit = f"{MAX_LINE >> 20} MiB"
                raise cli_error(f"the claude CLI wrote a line of more than {limit}")
        except ApiError as error:
            self.fail(error)
        if self._events:
            self._unread += size
            self._news.set()
        if self._unread > MAX_UNREAD:
            self._stdout.pause_reading()

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if fd == 1:
            self.eof = True
            self.wake_all()

    def fail(self, error: ApiError, reason: str = "failed") -> None:
        self._failure = error
        self.wake_all()
        if self.on_fault and not self._is_in_turn:
            self.on_fault(reason)

    def wake_all(self) -> None:
        """Wake those who wait for its last `result`, or for events."""
        self._settled.set()
        self._news.set()

    def is_unasked(self, event: CliEvent) -> bool:
        """Whether an event outside a turn shows that the process goes on by itself.  Until
        the last turn's `result` has come, it may belong to that turn, unless it is of
        another answer of the model, or calls a tool that was not expected."""
        # A stream event begins another answer.
        unasked = ANSWERS if self._settled.is_set() else {"stream_event"}
        # An event that calls no tool has an empty id.
        expected = {"", *self.expected_calls}
        return event["type"] in unasked or translate.tool_call_id(event) not in expected

    def _act_on(self, event: CliEvent) -> None:
        """Act on an event at once: answer control requests, note signs of life."""
        kind = event["type"]
        if kind in SIGNS_OF_LIFE:
            self._alive_at = time.monotonic()
        if kind == "control_request":
            self._answer_control(event)
        elif kind == "control_response":
            if answer := control_result(event, "initialize"):
                self.cli.take_in(translate.read_info(answer))
        elif kind == "rate_limit_event":
            for name, limit in translate.rate_limits(event).items():
                # What is new moves to the end.
                self.cli.rate_limits.pop(name, None)
                self.cli.rate_limits[name] = limit
        elif kind == "result" and not self._is_in_turn:
            self._settled.set()
            if event.get("is_error"):
                raise cli_error("the claude CLI ended its last turn with an error")
        elif event.get("subtype") == "api_retry":
            delay = translate.get_number(event, "retry_delay_ms") or 0
            self._alive_at = time.monotonic() + delay / 1000

    def _answer_control(self, event: CliEvent) -> None:
        if call := translate.tool_call_id(event):
            self._calls[call] = event
            self._answer_calls()
            return
        self.write(translate.control_answer(event, self.tools))
        self.has_listed |= translate.mcp_message(event).get("method") == "tools/list"

    def interrupt(self) -> None:
        """End its turn: nothing more may be billed."""
        self.write(translate.control_line("interrupt"))

    async def stop(self, wait_until_safe: Callable[[], Awaitable[None]]) -> None:
        """As `end`.  One that waits for a tool result is killed at once: 2.1.330 calls the
        API once more when its stdin closes.  It renews no login meanwhile."""
        if self._calls or self.expected_calls:
            self.kill(signal.SIGKILL)
        await self.end(wait_until_safe)


async def read_pipes() -> None:
    """Let the event loop handle all that is in the pipes already."""
    for _ in range(READ_ROUNDS):
        await asyncio.sleep(0)


# ------------------------------------------------------------ a conversation


class State(enum.Enum):
    """The state of a session.  In the first three it rests, and gives way to a request
    that needs room, in this order."""

    # Started, without a conversation yet.
    SPARE = "spare"
    # On file: it waits for the next message of its conversation.
    IDLE = "idle"
    # On file: the CLI waits inside tools/call for the results of client tools.
    PARKED = "parked"
    # It answers a request.
    BUSY = "busy"
    # It is being ended, and keeps its place until its process is reaped.
    RETIRED = "retired"


RESTING = (State.SPARE, State.IDLE, State.PARKED)


@dataclass(eq=False)
class Session:
    """A process and the conversation in it; the only writer of its own fields."""

    process: Process
    kind: Kind
    state: State
    # It was started ahead of need.
    was_spare: bool = False
    # The id under which the CLI asks the API, a UUID.
    own_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    # The name that the client gave it by header, with its owner; empty: none.  Only requests
    # of that name find it.
    pin: str = ""
    # Digests of what it cannot change.
    parts: Digests = field(default_factory=dict)
    # Digest of the messages in it, its own answers included.
    chain: str = ""
    # The same for a client that drops the thinking.
    unthinking_chain: str = ""
    # The full name of the model that it was asked for; empty: unknown.
    model: str = ""
    # Digest of the settings that it was given last.
    settings_digest: str = ""
    # Answers that it has given.
    turns: int = 0
    # The UUID of the user line that started its last turn; empty: results of tools did.
    turn_id: str = ""
    # Monotonic time of its last change of state.
    state_since: float = field(default_factory=time.monotonic)

    @property
    def id(self) -> str:
        """As clients see it: that of their session header, or its own."""
        return self.pin.partition(" ")[0] or self.own_id

    @property
    def state_secs(self) -> float:
        """Seconds since its last change of state."""
        return time.monotonic() - self.state_since

    @property
    def identity(self) -> str:
        """What a request may find it by.  A client may leave out thinking."""
        return "".join([self.unthinking_chain, *self.parts.values(), self.pin])

    def matches(self, request: Request) -> bool:
        """Whether it has the request's history, and all that cannot change."""
        wanted = request.fingerprint
        chain = self.chain if wanted.has_thinking else self.unthinking_chain
        return (chain, self.parts) == (wanted.past, wanted.parts)

    def move(self, state: State) -> None:
        self.state = state
        self.state_since = time.monotonic()

    # A first turn

    def take_name(self, pin: str) -> None:
        self.pin = pin

    def adopt(self, request: Request, model: str) -> None:
        """Take on a request's conversation, for the model of that name."""
        list_tools = translate.tools_for_turn
        if request.is_count:
            list_tools = translate.tools_for_count
        self.process.tools = list_tools(request)
        wanted = request.fingerprint
        self.parts = wanted.parts
        self.chain = wanted.past
        self.unthinking_chain = wanted.past_without_thinking
        self.model = model

    def set_up(self, request: Request, rows: list[bytes]) -> None:
        """Write the `rows` of the conversation to its gate, and what it begins with."""
        self.process.open_gate(rows)
        self.process.write(
            translate.initialize_line(
                request.system,
                has_tools=bool(self.process.tools),
                agent=self.kind.agent,
            )
        )

    # Turns

    def ask(self, request: Request, turn_id: str, lines: list[bytes]) -> None:
        """Start a turn: write the settings of the request unless the last one had the
        same, and the `lines` with what is new in it, the user's under the UUID `turn_id`."""
        self.turn_id = turn_id
        has_tools = bool(self.process.tools)
        settings = translate.turn_environment(request, has_listed_tools=has_tools)
        before, self.settings_digest = self.settings_digest, translate.digest(settings)
        if not before:  # later an empty value takes back that of the last request
            settings = {name: value for name, value in settings.items() if value}
        if before != self.settings_digest:
            change = {"env": settings}
            line = translate.control_line("apply_flag_settings", settings=change)
            lines = [line, *lines]
        self.process.write(*lines)

    def extend(self, request: Request, answer: Json) -> None:
        """Add the question and the answer of a turn to what it holds."""
        extend, newest = translate.extend_chain, request.fingerprint.newest
        whole = translate.message_digest(answer)
        self.chain = extend(extend(self.chain, newest), whole)
        spoken = translate.message_digest(answer, thinking=False)
        self.unthinking_chain = extend(extend(self.unthinking_chain, newest), spoken)
        self.turns += 1


@dataclass
class Turn:
    """One request in one session."""

    request: Request
    session: Session
    # Hot, new or rebuilt.
    origin: str
    # Why it was rebuilt; empty otherwise.
    reason: str = ""
    # Callbacks for when the answer has begun, or never will; to close it runs them.
    on_begun: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __post_init__(self) -> None:
        session = self.session
        self.process = session.process
        # By now the process has listed its models.
        model = self.process.cli.info.full_name(session.model)
        self.translator = Translator(
            [tool["name"] for tool in self.process.tools],
            agent=session.kind.agent,
            turn_id=session.turn_id,
            # The API may answer from one of the client's own `fallbacks`.
            model="" if "fallbacks" in self.request.fields else model,
        )

    @property
    def decision(self) -> str:
        """For the log: which process answers, and why that one."""
        session = self.session
        was = "was a spare" if session.was_spare else "was started for a request"
        why = f" ({self.reason})" if self.reason else ""
        turn = f"turn {session.turns + 1} of process {self.process.pid}"
        return f"{self.origin}{why}, {turn}, which {was}"

    @property
    def not_sent(self) -> list[str]:
        """The fields and places of the request that cannot arrive as sent."""
        session = self.session
        keeps_thinking = (
            self.origin == "hot"
            and not self.request.fingerprint.has_thinking
            and session.chain != session.unthinking_chain
        )
        lost = self.request.not_sent.copy()
        if keeps_thinking:
            lost.append("thinking")  # the process has what the client left out
        if not self.process.cli.is_at_least(KEEPS_ORDER):
            lost += self.request.misplaced
        return lost

    async def relay(self) -> AsyncIterator[bytes]:
        """The frames of the answer, joined read by read; b"" if the request does not
        stream.  What the child prints meanwhile waits until the next ones are asked for.

        Raises ApiError when the turn fails; what came before stays a correct beginning.
        """
        while not self.translator.done:
            events = await self.process.read()
            frames: list[bytes] = []
            try:
                while events and not self.translator.done:
                    event = events.popleft()
                    frames += map(translate.frame, self.translator.feed(event))
            except ApiError as error:
                self.process.fail(error)
                raise
            finally:  # what came before a fault is sent
                self.process.working = self.translator.state == "working"
                if self.translator.done and not self.rests:
                    # The CLI would go on by itself here, and nothing more may be billed:
                    # it is killed before it can ask.
                    self.process.kill(signal.SIGKILL)
                if self.translator.message:
                    self.on_begun.close()
                    yield b"".join(frames) if self.request.stream else b""

    @property
    def rests(self) -> bool:
        """Whether the process can take the next turn; one that calls tools must have
        listed them."""
        can_hand_over = self.process.has_listed or not self.translator.calls
        # After a prefill the client joins both halves of the message, and sends it as one.
        is_half = self.request.continues
        return self.translator.process_waits and can_hand_over and not is_half

    def finish(self, max_turns: int) -> str:
        """Add a complete answer to the session.  Returns why its process must end, such as
        after `max_turns`; empty: it can take another turn."""
        session, translator = self.session, self.translator
        session.extend(self.request, translator.message)
        calls = [call["id"] for call in translator.calls]
        reason = self.process.end_turn(translator.result, calls)
        if not self.rests:
            reason = "half" if self.request.continues else translator.stop_reason
            # It comes from the API, and becomes the label of a metric.
            if not re.fullmatch("[A-Za-z_]+", reason):
                reason = "other"
        elif self.process.is_unusable:
            reason = "failed"
        elif session.turns >= max_turns and not translator.calls:
            reason = "max_turns"
        return reason


# ------------------------------------------------------------ queue and threads


class Queue:
    """The queue in which requests wait: for a lock, a count, a process or its start."""

    def __init__(self, config: PoolConfig, metrics: "Metrics") -> None:
        self._config = config
        self._metrics = metrics
        # How many requests wait.
        self.length = 0

    async def wait(
        self,
        acquire: Callable[[], Awaitable[object]],
        problem: str,
        *,
        is_timed: bool = True,
    ) -> None:
        """Call `acquire` and wait for it, in a queue of at most `max_queue` requests and for
        at most `queue_secs`.  Raises ApiError 529, which names the `problem`."""
        secs = self._config.queue_secs
        message = f"{problem} within {secs:g} seconds"
        if self.length >= self._config.max_queue:
            secs = 0  # it may still be had at once
            message = f"{self.length} requests wait for room already"
        self.length += 1
        began = time.monotonic()
        try:
            async with asyncio.timeout(secs):
                await acquire()
        except TimeoutError:
            after = max(1, round(self._config.queue_secs))
            message += "; try again later"
            raise ApiError(529, message, retry_after=after) from None
        finally:
            self.length -= 1
            if is_timed:
                self._metrics.observe("queue_seconds", time.monotonic() - began)

    @contextlib.asynccontextmanager
    async def held(
        self,
        lock: asyncio.Lock | asyncio.Semaphore,
        problem: str,
        *,
        is_timed: bool = True,
    ) -> AsyncIterator[None]:
        """Hold a lock, after the wait for it in the queue.  Raises ApiError 529."""
        await self.wait(lock.acquire, problem, is_timed=is_timed)
        try:
            yield
        finally:
            lock.release()


class Threads:
    """Two threads for large requests, and for what else takes its time.  One takes only the
    largest requests, so the others need not wait for them."""

    def __init__(self) -> None:
        self._threads = (ThreadPoolExecutor(1), ThreadPoolExecutor(1))

    async def close(self) -> None:
        for thread in self._threads:
            # What still runs in it, such as a `--version` that hangs, ends first.
            await asyncio.get_running_loop().run_in_executor(thread, int)
            thread.shutdown()

    async def run(self, size: int, function: Callable[[], T]) -> T:
        """Run what takes time in proportion to a request of `size` bytes: a large one
        in a thread, one after another, so that others are served meanwhile."""
        if size < THREAD_SIZE:
            return function()
        thread = self._threads[size >= LARGE_SIZE]
        return await asyncio.get_running_loop().run_in_executor(thread, function)


# ------------------------------------------------------------ past conversations


def cache_put(cache: OrderedDict[Any, Any], key: object, value: object) -> None:
    """Add an entry to a cache, and drop the oldest beyond MAX_CACHED."""
    cache[key] = value
    cache.move_to_end(key)
    if len(cache) > MAX_CACHED:
        cache.popitem(last=False)


class Outcomes(OrderedDict[str, tuple[Digests, str]]):
    """What became of the conversations of the past, to say why one is rebuilt: by
    fingerprint and by pin, the parts of the session that held the conversation last, and
    why a request may miss it."""

    def record(self, session: Session, reason: str) -> None:
        """Why a request will not find the session, from now on."""
        if not session.turns:
            return
        keys = [session.chain, session.unthinking_chain, session.pin]
        if session.kind.agent:
            keys.append(session.identity)
        for key in keys:
            if key:
                cache_put(self, key, (session.parts, reason))

    def rebuild_reason(self, request: Request, pin: str) -> str:
        """Why a conversation is rebuilt, such that its user can act on it; empty: it is
        new."""
        wanted = request.fingerprint
        outcome = self.get(wanted.past) or self.get(pin)
        if request.continues:
            return "prefill"
        if not outcome:
            return UNKNOWN_HISTORY if wanted.past else ""
        parts, reason = outcome
        for name, digest in wanted.parts.items():
            if parts.get(name) != digest:
                return f"{name}-changed"
        return reason


# ------------------------------------------------------------ room


class Room:
    """The processes of a pool, their places, and who gives way.  A place is free again when
    its process is reaped."""

    def __init__(
        self,
        config: PoolConfig,
        metrics: "Metrics",
        wait_until_safe: Callable[[], Awaitable[None]],
    ) -> None:
        """`wait_until_safe` is that of `Child.end`."""
        self._config = config
        self._metrics = metrics
        self._wait_until_safe = wait_until_safe
        self.outcomes = Outcomes()
        # Every process that is not reaped.
        self.sessions: set[Session] = set()
        self._places = asyncio.Semaphore(config.max_sessions)
        # How many wait for a place; the first one gets the next.
        self._waiting = 0
        # The tasks that end processes, which keep their places until then.
        self.ending: set[asyncio.Task[None]] = set()

    def in_states(self, *states: State) -> list[Session]:
        """The sessions in these states: state by state, the longest in it first."""
        by_age = sorted(self.sessions, key=lambda item: item.state_since)
        return [item for state in states for item in by_age if item.state is state]

    @property
    def on_file(self) -> list[Session]:
        return self.in_states(State.IDLE, State.PARKED)

    @property
    def is_full(self) -> bool:
        return self._places.locked()

    @property
    def shortfall(self) -> int:
        """How many places are still to be freed for those who wait; negative: more places
        are on their way than anyone waits for."""
        return self._waiting - len(self.ending)

    @property
    def has_place(self) -> bool:
        """Whether a request would get a process, if need be the place of a resting one
        or of one that is being ended."""
        is_free = not self.is_full or self.shortfall < 0
        return is_free or bool(self.in_states(*RESTING))

    # To enter

    async def enter(self) -> None:
        """Take a place, if need be that of a resting session."""
        self._waiting += 1
        try:
            if self.is_full:
                self.make_room()
            await self._places.acquire()
        finally:
            self._waiting -= 1

    def add(self, session: Session) -> None:
        """Note the session that has the place."""
        self.sessions.add(session)
        self.make_room()  # somebody may wait for a place by now

    # To leave

    def leave(self) -> None:
        self._places.release()

    # Who gives way

    def make_room(self) -> None:
        """End idle processes beyond `max_idle`, and one resting process for each request that
        waits for a place while none is on its way."""
        idle = self.in_states(State.IDLE)
        for session in idle[: max(0, len(idle) - self._config.max_idle)]:
            self.retire(session, "evicted")
        resting = self.in_states(*RESTING)
        for session in resting[: max(0, self.shortfall)]:
            self.retire(session, "evicted")

    def cut_short(self, session: Session) -> None:
        """End a session in the middle of a turn."""
        process = session.process
        process.interrupt()
        self.retire(session, "failed" if process.is_unusable else "interrupted")

    def retire(self, session: Session, reason: str) -> None:
        """End a session's process in the background; its place is free once the process
        is reaped."""
        if session.state is State.RETIRED:
            return
        if reason == "failed" and session.process.ended:
            reason = "died"
            self._metrics.add("process_restarts_total")
        log.debug("process %s ends: %s", session.process.pid, reason)
        session.move(State.RETIRED)
        self.outcomes.record(session, reason)
        self._metrics.add("processes_ended_total", reason=reason)
        task = asyncio.create_task(self._end(session))
        self.ending.add(task)
        # By then whoever got the place has stopped counting as one who waits, so
        # `shortfall` counts both or neither.
        task.add_done_callback(self.ending.discard)

    async def _end(self, session: Session) -> None:
        try:
            await session.process.stop(self._wait_until_safe)
        finally:
            self.sessions.remove(session)
            self.leave()


# ------------------------------------------------------------ the pool


class Pool:
    """Finds a session for a request, or opens one, and files it after the answer."""

    def __init__(
        self, config: PoolConfig, environ: Mapping[str, str] = os.environ
    ) -> None:
        self.config = config
        self.environ = dict(environ)
        self.metrics = Metrics()
        self.queue = Queue(config, self.metrics)
        self.threads = Threads()
        self.starter = Starter(self)
        self.inspector = Inspector(self)
        self.room = Room(config, self.metrics, self.inspector.wait_for_renewal)
        # At most this many requests have their tokens counted at a time.
        self.counting = asyncio.Semaphore(CORES)
        # A lock for each session header in use: its requests run one after another.
        self._pins: weakref.WeakValueDictionary[str, asyncio.Lock] = (
            weakref.WeakValueDictionary()
        )

    async def __aenter__(self) -> "Pool":
        self._sweeper = asyncio.create_task(sweep(self))
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = {self._sweeper, *self.starter.starting}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for session in self.room.in_states(*State):
            self.room.retire(session, "shutdown")
        while self.room.ending:
            await asyncio.wait(self.room.ending)
        await self.threads.close()

    @property
    def cli(self) -> Cli:
        """The CLI that is installed, as far as it is known."""
        return self.inspector.cli

    def is_own_process(self, names: str) -> bool:
        """Whether a request comes from a process of this pool, by the id that is in its
        header or in its `metadata.user_id`."""
        return any(session.own_id in names for session in self.room.sessions)

    # A turn

    @contextlib.asynccontextmanager
    async def turn(
        self,
        request: Request,
        token: str | None,
        key_digest: str = "",
        request_id: str = "",
    ) -> AsyncIterator[Turn]:
        """A session for the request: a warm one, or a fresh process that was given the
        history.  `token` is the session header; it names a conversation of the client
        with the key of that digest.  By `request_id` the turn is traced and logged.

        Raises ApiError: 529 when there is no room in time, 502 when the CLI cannot be
        started. On exit the session is filed if the answer is complete, and retired
        otherwise.
        """
        await self.inspector.look()
        trace = Trace(self.config.trace_dir, request_id)
        async with contextlib.AsyncExitStack() as stack:
            pin = ""
            if token:
                pin = f"{session_id(token)} {key_digest}"
                lock = self._pins.setdefault(pin, asyncio.Lock())
                problem = "the session's other requests did not end"
                await stack.enter_async_context(self.queue.held(lock, problem))
            turn = await self._warm_turn(request, pin, trace)
            if not turn:
                reason = self.room.outcomes.rebuild_reason(request, pin)
                session = await self.starter.fresh_session(request, trace)
                session.take_name(pin)
                turn = Turn(request, session, "rebuilt" if reason else "new", reason)
            stack.callback(self._finish, turn)
            if turn.origin != "hot":
                # One with a name finds no spare that is set up.
                like = request if turn.origin == "new" and not pin else None
                turn.on_begun.callback(
                    lambda: self.starter.refill(self.inspector.kind(request), like)
                )
            log.debug("request %s: %s", request_id, turn.decision)
            yield turn

    # Hot

    async def _warm_turn(self, request: Request, pin: str, trace: Trace) -> Turn | None:
        """A turn of the warm session that holds the request's history, if there is one
        and it can take the request."""
        session = self._find(request, pin)
        if not session:
            return None
        process, before = session.process, session.state
        content = request.messages[-1]["content"]
        is_parked = before is State.PARKED
        results = translate.tool_results(content) if is_parked else {}
        reason = turn_id = ""
        lines = []
        session.move(State.BUSY)
        self.room.outcomes.record(session, "busy")
        try:
            # Such a process keeps to the login that it was started with.
            keeps_login = session.kind.bare or self.config.setting_sources
            if keeps_login and process.cli.files[1:] != self.cli.files[1:]:
                reason = "login"
            elif translate.has_images(content):
                reason = "images"  # only a transcript keeps them as they are
            elif results is None:
                reason = "tool-results"
            else:
                if not is_parked:
                    turn_id = str(uuid.uuid4())
                    make_line = partial(translate.user_line, content, turn_id)
                    lines.append(await self.threads.run(request.size, make_line))
                if not await process.is_ready():
                    reason = "failed"
            if reason:
                # Only this session may know what was said before.
                is_whole = session.matches(request)
                if not is_whole and reason == "images":
                    raise ApiError(400, NO_IMAGE)
                self.room.retire(session, reason)
                if not is_whole:
                    raise ApiError(400, LOST_NAME)
                return None
        except BaseException:
            self._put_back(session, before)
            raise
        process.begin_turn(trace)
        session.ask(request, turn_id, lines)
        process.hand_over(results or {})
        return Turn(request, session, "hot" if session.turns else "new")

    def _put_back(self, session: Session, state: State) -> None:
        """Put a session back as it was: nothing was written to its process."""
        if state is State.SPARE:
            # The CLI may have been replaced meanwhile, which ended all other spares.
            self.room.retire(session, "unwanted")
        elif session.state is State.BUSY:
            session.move(state)
            self.room.make_room()

    def _find(self, request: Request, pin: str) -> Session | None:
        """The resting session that can take a request: that of its name, or one that has no
        name either.  Another one of its name is ended: a name has one conversation."""
        wanted = request.fingerprint
        # A client that names its conversation may leave out what it said before.
        is_by_name = pin and not wanted.past
        found = [item for item in self.room.in_states(*RESTING) if item.pin == pin]
        for session in found:
            fits = is_by_name and session.parts.items() >= wanted.sent_parts.items()
            if fits and session.state is State.PARKED:
                raise translate.unanswered(session.process.expected_calls, "messages.0")
            if fits or session.matches(request):
                return session
            if pin:
                self.room.retire(session, UNKNOWN_HISTORY)
        if is_by_name and not found and pin in self.room.outcomes:
            raise ApiError(400, LOST_NAME)
        return None

    # What becomes of a session

    def _finish(self, turn: Turn) -> None:
        """File the session of a turn, or retire it."""
        session = turn.session
        self.inspector.record_version(turn)
        turn.on_begun.close()
        if session.state is not State.BUSY:
            return  # the pool has ended
        if not turn.translator.done:
            self.room.cut_short(session)
            return
        # The history that it had is found no more.
        self.room.outcomes.record(session, "continued")
        if reason := turn.finish(self.config.max_turns):
            self.room.retire(session, reason)
        else:
            self._file(session)

    def _file(self, session: Session) -> None:
        # An agent's tools may have seen what does not follow from the conversation, so none
        # may answer for another one.
        is_unnamed_agent = session.kind.agent and not session.pin
        reason = "ambiguous" if is_unnamed_agent else "duplicate"
        for other in self.room.on_file:
            if other.identity == session.identity:  # a request could find either
                self.room.retire(other, reason)
        if is_unnamed_agent and session.identity in self.room.outcomes:
            self.room.retire(session, "ambiguous")
            return
        # Recorded in case a request misses it because only one of the two has a session
        # header.
        self.room.outcomes.record(session, "pinned")
        is_parked = bool(session.process.expected_calls)
        session.move(State.PARKED if is_parked else State.IDLE)
        self.room.make_room()


# ------------------------------------------------------------ a fresh process


class Starter:
    """Starts the processes of a pool, for requests and ahead of need, and gives them
    conversations."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        # Fresh processes that start for a request.
        self._starts = asyncio.Semaphore(2 * CORES)
        # The kinds of the last requests: there is a spare for each.
        self._kinds: deque[Kind] = deque(maxlen=pool.config.spares)
        # The spares that are being started.
        self.starting: dict[asyncio.Task[None], Kind] = {}

    async def fresh_session(
        self, request: Request, trace: Trace | None = None
    ) -> Session:
        """A process that was given the conversation of the request, and has begun to
        answer it."""
        pool = self._pool
        cli = pool.cli
        if request.continues and not cli.is_at_least(CONTINUES):
            message = "a conversation that ends with an assistant message needs Claude"
            message += f" Code {CONTINUES} or newer; this is {cli.version}"
            raise translate.bad_request("messages", message)
        inspector = pool.inspector
        announced = await inspector.announcements_for(
            request.model, inspector.kind(request)
        )
        # By now the CLI may have listed its models.
        kind, model = inspector.needs(request)
        begin = partial(self._begin, request, model, announced, trace)
        while spare := await self._take(kind):
            await begin(spare)
            if spare.process.has_spoken or not spare.process.is_unusable:
                return spare
            # It asked nothing, so another one can.
            pool.room.retire(spare, "failed")
        # Many starts at once would slow each other down.
        async with pool.queue.held(self._starts, NO_ROOM, is_timed=False):
            session = await self.spawn(kind)
            await begin(session)
        return session

    async def _begin(
        self,
        request: Request,
        model: str,
        announced: list[Json],
        trace: Trace | None,
        session: Session,
    ) -> None:
        """Give a process its conversation, start a turn on it, and wait for its first
        output."""
        session.adopt(request, model)
        session.process.begin_turn(trace)
        make_rows = partial(
            translate.transcript,
            request.messages,
            model,
            announced,
            session.own_id,
        )
        turn_id = str(uuid.uuid4())
        try:
            rows = await self._pool.threads.run(request.size, make_rows)
            session.set_up(request, rows)
            question = translate.user_line([], turn_id, query=not request.is_count)
            session.ask(request, turn_id, [question])
            with contextlib.suppress(ApiError, TimeoutError):
                async with asyncio.timeout(FIRST_OUTPUT_SECS):
                    await session.process.read()
        except BaseException:
            self._pool.room.cut_short(session)
            raise

    async def spawn(self, kind: Kind, state: State = State.BUSY) -> Session:
        """Start a process, which waits at its gate."""
        pool, config = self._pool, self._pool.config
        is_spare = state is State.SPARE
        await pool.queue.wait(pool.room.enter, NO_ROOM, is_timed=not is_spare)
        process = Process(pool.cli)
        # One that announces its folder to the model works in one that never changes; an
        # older one would list all files in it.
        cwd = "/" if pool.cli.is_at_least(ANNOUNCES) else ""
        if kind.agent:
            cwd = config.cwd or "."
        try:
            await process.spawn(
                arguments(config, kind, settings_file(pool.inspector.environment)),
                child_environment(config, pool.environ, kind),
                cwd,
            )
        except BaseException as error:
            pool.room.leave()
            if isinstance(error, OSError):
                raise cli_error(f"the claude CLI cannot be started: {error}") from error
            raise
        session = Session(process, kind, state, is_spare)
        process.on_fault = partial(pool.room.retire, session)
        pool.metrics.add("processes_started_total")
        pool.room.add(session)
        return session

    # Spares

    @property
    def spares(self) -> list[Session]:
        return self._pool.room.in_states(State.SPARE)

    async def _take(self, kind: Kind) -> Session | None:
        """A spare of this kind that is not set up; it need not be at its gate yet."""
        # So that a spare that has printed something unasked is retired before.
        await read_pipes()
        for spare in self.spares:
            if spare.kind == kind and not spare.parts:
                spare.move(State.BUSY)
                return spare
        return None

    @property
    def is_short(self) -> bool:
        """Whether the first spares are still to be started: fewer kinds were noted than there
        may be spares."""
        return len(self._kinds) < self._pool.config.spares

    def refill(self, kind: Kind, like: Request | None = None) -> None:
        """Note the kind of the newest request; start the spares that the last requests
        want, and end the others.  If the request began a conversation, one may be set up
        `like` it."""
        if self._pool.inspector.announcing.locked():
            return  # a request may wait, and has a spare of its own; it will call this
        self._kinds.append(kind)
        missing = list(self._kinds)
        for task, preparing in self.starting.items():
            # One that is done is among the spares.
            if preparing in missing and not task.done():
                missing.remove(preparing)
        for spare in self.spares:
            is_calm = time.monotonic() >= spare.process.opened_at + CALM_SECS
            is_stale = is_calm and like and not spare.matches(like)
            if spare.kind in missing and not is_stale:
                missing.remove(spare.kind)
            else:
                self._pool.room.retire(spare, "unwanted")
        for wanted in missing:
            self.start_spare(wanted, like)

    def start_spare(self, kind: Kind, like: Request | None = None) -> None:
        """Start a spare in the background."""
        task = asyncio.create_task(self._prepare(kind, like))
        self.starting[task] = kind
        task.add_done_callback(self.starting.pop)

    async def _prepare(self, kind: Kind, like: Request | None) -> None:
        """Start a spare.  If that makes two of a kind, one is set up as for a request
        without messages: the next conversation that begins alike finds it as good as hot
        (tests/bench)."""
        pool = self._pool
        if pool.room.is_full:
            return  # nobody makes room for a spare
        with contextlib.suppress(ApiError):  # the next request will report it
            spare = await self.spawn(kind, State.SPARE)
            if spare.process.cli is not pool.cli:
                pool.room.retire(spare, "unwanted")  # it may be the old program
            if not like:
                return
            kind, model = pool.inspector.needs(like)
            announced = await pool.inspector.announcements_for(like.model, kind)
            same = [
                item for item in self.spares if item.kind == kind and not item.parts
            ]
            if len(same) > 1:
                spare = same[0]
                spare.adopt(like, model)
                rows = translate.transcript([], model, announced, spare.own_id)
                spare.set_up(like, rows)


# ------------------------------------------------------------ what is known of the CLI


class Inspector:
    """Finds out what a pool has to know of the CLI that is installed."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.cli = Cli()
        self.environment = child_environment(pool.config, pool.environ, Kind())
        # One task at a time looks at the files, one asks for the models and the account,
        # and one for the announcements.
        self._looking = asyncio.Lock()
        self._asking = asyncio.Lock()
        self.announcing = asyncio.Lock()

    async def look(self) -> Cli:
        """The CLI that is installed now.  Raises ApiError when it is too old."""
        program, environment = self._pool.config.bin, self.environment
        credentials = os.path.join(token_folder(environment), ".credentials.json")
        paths = (program, settings_file(environment), credentials)
        async with self._looking:
            files = tuple(map(identify_file, paths))
            if files != self.cli.files:
                ask = partial(ask_version, program, environment)
                # In a thread, as it blocks.
                version = await self._pool.threads.run(THREAD_SIZE, ask)
                self._replace_cli(files, version)
        if self.cli.problem:
            raise cli_error(self.cli.problem)
        return self.cli

    async def wait_for_renewal(self) -> None:
        """Wait while a process renews the login.  By then the old one is void, so if that
        process ended before it has written the new one, its user would be logged out
        (tests/test_renewal.py)."""
        lock = os.path.join(token_folder(self.environment), RENEWAL_LOCK)
        with contextlib.suppress(OSError):  # there is none
            while abs(time.time() - os.stat(lock).st_mtime) < LOCK_SECS:  # noqa: ASYNC110 - a file
                await asyncio.sleep(0.1)

    async def info(self, *, anew: bool = False) -> CliInfo:
        """What the CLI reports of itself, without a model call.

        A process is started for it if none has reported yet, or to ask `anew` while there
        is room; else the last report of any process will do.  Raises ApiError when the CLI
        does not work.
        """
        cli = await self.look()
        if cli.info.is_known and not anew:
            return cli.info
        async with self._pool.queue.held(self._asking, NO_START):
            # A process that is asked what the CLI announces reports this as well.
            async with self.announcing:
                cli = await self.look()
            if not cli.info.is_known or (anew and not self._pool.room.is_full):
                kind = Kind(PROBE_MODEL, bare=self.is_bare())
                async with self._asked(kind) as process:
                    cli = process.cli
            return cli.info

    @contextlib.asynccontextmanager
    async def _asked(self, kind: Kind) -> AsyncIterator[Process]:
        """A process without a conversation that has reported its models and account."""
        session = await self._pool.starter.spawn(kind)
        process = session.process
        try:
            process.begin_turn()
            process.open_gate(translate.transcript([], kind.model))
            process.write(translate.initialize_line([], has_tools=False))
            await process.read_until(lambda event: control_result(event, "initialize"))
            yield process
        finally:
            self._pool.room.retire(session, "probe")

    async def announcements_for(self, model: str, kind: Kind) -> list[Json]:
        """What the CLI announces to a model today; nothing if it does not say so in time.
        Raises ApiError when it cannot be asked."""
        cli = self.cli
        if kind.agent or kind.bare or not cli.is_at_least(ANNOUNCES):
            return []
        known = cli.announcements.get(cli.announcement_key(model))
        if known is not None:
            return known
        if self.may_run_any and not cli.info.is_known:
            # By then the CLI has most likely listed the model.
            kind = dataclasses.replace(kind, model="")
        # What will answer starts meanwhile, once: clients may leave before they take it.
        starter = self._pool.starter
        ready = [spare.kind for spare in starter.spares if not spare.parts]
        if kind not in [*ready, *starter.starting.values()]:
            starter.start_spare(kind)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(COUNT_SECS), self.announcing:
                # Another request may have asked meanwhile, perhaps another CLI.
                cli = self.cli
                if cli.announcement_key(model) not in cli.announcements:
                    return await self._ask_announcements(model)
        return cli.announcements.get(cli.announcement_key(model), [])

    async def _ask_announcements(self, model: str) -> list[Json]:
        """Ask a process that writes its conversation to a file what it announces to a model,
        and then to all others that the CLI lists.  No question reaches an API."""
        found: list[Json] = []
        async with self._asked(Kind(model, is_probe=True)) as process:
            cli = process.cli
            # Of when it was asked: the account and the day may change meanwhile.
            name, *now = cli.announcement_key(model)
            with contextlib.suppress(ApiError):
                # Nobody answers; by then the CLI has said all that it announces.
                found = await process.ask_announcements(query=True)
                cache_put(cli.announcements, (name, *now), found)
                for other in cli.info.models:
                    key = (other.full_name, *now)
                    if key in cli.announcements:
                        continue
                    process.write(translate.control_line("set_model", model=other.name))
                    outcome = await process.read_until(control_outcome)
                    # It refuses what may not be used.
                    if outcome == "success":
                        # Only who the model is has changed.
                        said = await process.ask_announcements(query=False)
                        cache_put(cli.announcements, key, said)
        return found

    def kind(self, request: Request) -> Kind:
        """The kind of process that a request needs: until the CLI has listed its models,
        or where it may keep to others, one that is started for the model."""
        is_listed = self.cli.info.takes_from_conversation(request.model)
        takes_it = is_listed and self.may_run_any
        is_bare = not request.is_agent and self.is_bare()
        return Kind("" if takes_it else request.model, request.is_agent, is_bare)

    @property
    def may_run_any(self) -> bool:
        """Whether one process may run any model that the CLI lists: not with a cloud's login,
        nor where the user or an administrator may have named models."""
        has_settings = self._pool.config.setting_sources or any(
            map(os.path.isdir, MANAGED)
        )
        has_names = any(name.startswith(MODEL_VARIABLES) for name in self.environment)
        return not (self.cli.info.is_cloud or has_settings or has_names)

    def needs(self, request: Request) -> tuple[Kind, str]:
        """The kind, and the full name of the model as far as it is known.  Both are of one
        moment: a process without --model runs the default if it is given an alias."""
        return self.kind(request), self.cli.info.full_name(request.model)

    def is_bare(self) -> bool:
        """Whether the CLI finds its login in its bare mode."""
        info = self.cli.info
        given = [self.environment.get(name, "") for name in BARE_LOGINS]
        has_login = any(value.lower() not in FALSE_VALUES for value in given)
        if self._pool.config.setting_sources:
            # One in the user's settings, as the CLI reported.
            has_login |= info.has_api_key or info.is_cloud
        return has_login and self.cli.is_at_least(QUIET_IF_BARE)

    def record_version(self, turn: Turn) -> None:
        """Note the version that the CLI itself reports: a script may start another one than
        before."""
        version = turn.translator.cli_version
        is_newest = turn.process.cli is self.cli
        if is_newest and version and version != self.cli.version:
            self._replace_cli(self.cli.files, version)

    def _replace_cli(self, files: tuple[object, ...], version: str) -> None:
        # The same dict goes on: processes of the Cli before still report into it.  After a
        # change of login it may hold another account's.
        limits = self.cli.rate_limits
        if files[1:] != self.cli.files[1:]:
            limits.clear()
        self.cli = Cli(self._pool.config.bin, files, version, rate_limits=limits)
        for spare in self._pool.starter.spares:
            self._pool.room.retire(spare, "unwanted")


# ------------------------------------------------------------ the sweep


async def sweep(pool: Pool) -> None:
    """Start the first spares, one at a time, as soon as the CLI has listed its models, and
    look after all processes, again and again."""
    while True:
        try:
            await asyncio.sleep(SWEEP_SECS)
            is_wanted = pool.starter.is_short and pool.inspector.may_run_any
            busy = pool.room.in_states(State.BUSY)
            # Spares would slow down a process that starts for a request.
            is_starting = not all(session.process.has_spoken for session in busy)
            if pool.cli.info.is_known and is_wanted and not is_starting:
                pool.starter.refill(Kind(bare=pool.inspector.is_bare()))
            # If the bridge was stopped, what came in that time is still in the pipes.
            await read_pipes()
            for session in pool.room.in_states(*State):
                look_after(pool, session)
        except Exception as bug:  # noqa: BLE001 - without the sweep no turn would time out
            log.error("bug in the sweep: %s", type(bug).__name__)


def look_after(pool: Pool, session: Session) -> None:
    """Retire a resting session that died or whose time is up, and fail a turn that is
    silent for too long."""
    ttl = pool.config.session_ttl_secs
    if session.process.check_silence(pool.config.watchdog_secs):
        pool.metrics.add("watchdog_fires_total")
    elif session.state not in RESTING:
        return
    elif session.process.is_unusable:
        pool.room.retire(session, "failed")
    elif ttl and session.state_secs >= ttl:
        pool.room.retire(session, "expired")


# ------------------------------------------------------------ appendix: counting


async def count_tokens(pool: Pool, request: Request, request_id: str = "") -> int:
    """The tokens of a request, as the API counts what a turn would send, without a model
    call, by a process of its own.  By `request_id` it is traced.

    Raises ApiError: as `turn` does, 401 when nobody is logged in, and the API's own
    failures.  The CLI passes off an estimate as a count when the API does not
    count, so its log is watched for the API's answers.
    """
    make_key = partial(translate.request_digest, request)
    key = await pool.threads.run(request.size, make_key)
    counts = (await pool.inspector.look()).counts
    if key in counts:
        return counts[key]
    async with pool.queue.held(pool.counting, "other counts did not end"):
        try:
            trace = Trace(pool.config.trace_dir, request_id)
            tokens = await ask_count(pool, request, trace)
        finally:
            pool.starter.refill(pool.inspector.kind(request))
    cache_put(counts, key, tokens)
    return tokens


async def ask_count(pool: Pool, request: Request, trace: Trace) -> int:
    """Ask a process that was given the request.  Raises ApiError."""
    session = await pool.starter.fresh_session(request, trace)
    process = session.process
    # Those with which the API answers its counts.
    statuses: list[int] = []

    def is_good_result(event: CliEvent) -> bool:
        return event["type"] == "result" and not event.get("is_error")

    def find(event: CliEvent) -> Json:
        if event["type"] == "api_call":
            statuses.append(event["response"])
        return control_result(event, "get_context_usage")

    try:
        # The wait for a process is not the CLI's.
        async with asyncio.timeout(COUNT_SECS):
            await process.read_until(is_good_result)
            process.write(translate.control_line("get_context_usage"))
            usage = await process.read_until(find)
    except TimeoutError:
        message = f"the claude CLI did not count within {COUNT_SECS:g} seconds"
        raise ApiError(504, message) from None
    finally:
        pool.room.retire(session, "failed" if process.is_unusable else "counted")
    worst = max(statuses, default=0)
    if worst >= 400:
        raise ApiError(worst, f"the API did not count: status {worst}")
    if not statuses:
        if process.cli.info.is_cloud:
            # Such as Bedrock: an estimate would look the same.
            raise ApiError(
                400, "the claude CLI does not say whether this cloud counted"
            )
        if process.cli.info.login:
            raise cli_error("the API did not answer the claude CLI's count")
        message = f"the claude CLI is not logged in: {translate.LOGIN_CURE}"
        raise ApiError(401, message)
    tokens = int(usage.get("totalTokens") or 0)
    return tokens + TOOLS_PROMPT_TOKENS if request.tool_names else tokens


# ------------------------------------------------------------ appendix: metrics

# The metrics by type: their names after claude_cli_bridge_, and their help.
METRICS = {
    "counter": {
        "requests_total": "HTTP requests by route and status; 499: the client left before it",
        "errors_total": "Failed requests by error.type; client_left: before the answer's end",
        "turns_total": "Turns by conversation (hot, new, rebuilt) and the reason of a rebuild",
        "tokens_total": "Tokens by kind, as the API counted them, also in broken answers",
        "processes_started_total": "Processes of the CLI that were started",
        "processes_ended_total": "Processes of the CLI that were retired, by reason",
        "process_restarts_total": "Processes that ended by themselves; the next turn starts one",
        "watchdog_fires_total": "Turns that failed as the CLI was silent",
        "log_lines_lost_total": "Log lines that were lost because nobody read them",
    },
    "histogram": {
        "first_byte_seconds": "From a request for a message to the first event of its answer",
        "turn_seconds": "From a request for a message to the end of its answer",
        "queue_seconds": "Waits for a process, for a count, or for others of a session",
    },
    "gauge": {
        "processes": "Processes of the CLI by state",
        "waiting_requests": "Requests that wait for a process, or for others of their session",
        "connections": "Open connections of clients",
        "quota_utilization_ratio": "How much of a limit of the account is used, by the CLI",
        "quota_resets_at_seconds": "When a limit of the account is reset, in epoch seconds",
    },
}
# Seconds: a hot turn to a long answer.
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
# Characters of a label's value that must be escaped.
ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


class Metrics:
    """Counts and times since the start, as Prometheus reads them (text-based exposition
    format, 0.0.4)."""

    def __init__(self) -> None:
        # By name, then by the rest of the name and the labels.
        self._samples: defaultdict[str, dict[str, float]] = defaultdict(dict)
        for name in METRICS["histogram"]:
            self.observe(name, 0, count=0)
        for name in (
            "processes_started_total",
            "process_restarts_total",
            "watchdog_fires_total",
        ):
            self.add(name, 0)

    def add(
        self, name: str, amount: float = 1, suffix: str = "", **labels: object
    ) -> None:
        samples = self._samples[name]
        key = suffix + labelled(labels)
        samples[key] = samples.get(key, 0) + amount

    def set(self, name: str, value: float | None, **labels: object) -> None:
        if value is not None:  # it is known
            self._samples[name][labelled(labels)] = value

    def observe(self, name: str, seconds: float, count: int = 1) -> None:
        for bound in (*BUCKETS, "+Inf"):
            is_within = seconds <= float(bound)
            self.add(name, count if is_within else 0, "_bucket", le=bound)
        self.add(name, seconds, "_sum")
        self.add(name, count, "_count")

    def set_gauges(self, pool: Pool) -> None:
        """Set the gauges of a pool.  Those of limits may be of another account than before."""
        for name in ("quota_utilization_ratio", "quota_resets_at_seconds"):
            self._samples[name].clear()
        for name, limit in pool.cli.rate_limits.items():
            self.set("quota_utilization_ratio", limit.utilization, limit=name)
            self.set("quota_resets_at_seconds", limit.resets_at, limit=name)
        for state in State:
            number = len(pool.room.in_states(state))
            self.set("processes", number, state=state.value)
        self.set("waiting_requests", pool.queue.length)

    def text(self) -> str:
        lines = []
        for kind, metrics in METRICS.items():
            for name, words in metrics.items():
                lines.append(f"# HELP claude_cli_bridge_{name} {words}")
                lines.append(f"# TYPE claude_cli_bridge_{name} {kind}")
                for rest, value in self._samples[name].items():
                    lines.append(f"claude_cli_bridge_{name}{rest} {value}")
        return "\n".join([*lines, ""])


def labelled(labels: Mapping[str, object]) -> str:
    text = ",".join(
        f'{name}="{str(value).translate(ESCAPES)}"' for name, value in labels.items()
    )
    return f"{{{text}}}" if text else ""
