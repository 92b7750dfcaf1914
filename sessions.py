"""The processes of the CLI: spawn, speak, keep warm, retire.

A process is a cache entry.  Each request brings its whole conversation; a process that already
holds the history gives the same answer as a fresh one, only sooner.  So after an answer a session
is filed under the fingerprint of the conversation including that answer, and a request takes the
session whose fingerprint is its own history, if there is one.  A session in use is not on file, so
two requests never share one; whatever goes wrong in it retires it alone.

    SPARE ──its conversation──> BUSY ──answer complete──> IDLE ──hot turn──> BUSY
                                BUSY ──client tools called──> PARKED ──their results──> BUSY
    any of them ──fault, disconnect, TTL, LRU, shutdown──> RETIRED, until its group is reaped

`Session.move` is the only place that changes a state, and TRANSITIONS is what it allows.

    model mode   the CLI has no tools but the client's: the default
    agent mode   the CLI runs tools of its own
    session      one process and the conversation in it
    process      a running CLI, with its pipes
    turn         one request in one session
    spare        a process that was started ahead of need, and waits at the gate
    gate         a pipe in place of the file that the CLI resumes from: it starts, and waits there
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
import enum
import errno
import logging
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import uuid
import weakref
from collections import OrderedDict, deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
)
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import orjson

if TYPE_CHECKING or not __package__:
    import translate
    from translate import (
        ApiError,
        CliEvent,
        Digests,
        Json,
        RateLimit,
        Request,
        Translator,
        cli_error,
        control_result,
    )
else:  # copied into a package
    from . import translate
    from .translate import (
        ApiError,
        CliEvent,
        Digests,
        Json,
        RateLimit,
        Request,
        Translator,
        cli_error,
        control_result,
    )

__version__ = "0.2.0"
log = logging.getLogger("claude_cli_bridge")

T = TypeVar("T")

# Bytes of one line of the CLI.  It can hold a whole tool result or screenshot: 1 MB was
# too small for the official SDK.
MAX_LINE = 64 << 20
# Bytes of events at which a pipe is no longer read: a slow client holds up its own
# child.
MAX_UNREAD = 1 << 20
# Bytes of stderr that are kept, to say why a process died.
STDERR_TAIL = 2048
# Characters of a line of it that are logged.
MAX_LOGGED = 300
# How a process is ended: each signal, and the seconds it then gets; None: only its stdin
# is closed.  An idle CLI exits 0.1 s after that; on SIGTERM it ends a running API call.
ENDING = (
    (None, 0.5),
    (signal.SIGTERM, 1.0),
    (signal.SIGKILL, 5.0),
)
# Seconds after which a process that has said nothing no longer holds up the start of
# others; 1.2 were measured.
START_SECS = 2.0
# Seconds by which the `result` may come later than the answer it belongs to; 0.02 were
# measured.
SETTLE_SECS = 5.0
# Seconds for a count of tokens; 0.5 were measured.
COUNT_SECS = 20.0
# Requests of this many bytes or more are read and written in a thread: a megabyte takes
# 10 to 100 ms.
THREAD_SIZE = 64 << 10
# Those of this many wait for each other, as others for a process.
LARGE_SIZE = 1 << 20
# Rounds of the event loop in which what is in a pipe comes in: one to look at it, one to
# read it, one in which what was read is taken in, and two more for the end of the pipe
# (asyncio's call_soon).
READ_ROUNDS = 5
# Fingerprints of lost sessions that are remembered, to say why a conversation was
# rebuilt.
MAX_PAST = 4096
# The model of a process that is asked about the CLI itself.
PROBE_MODEL = "sonnet"
# Seconds between two looks at the resting processes.
SWEEP_SECS = 5.0
# Answers of count_tokens that are remembered: Claude Code's /context asks for 24, some of
# them twice.
MAX_COUNTS = 256
# Names of models of which it is known whether a process can take them without --model.
MAX_MODELS = 256
# Tokens of the prompt that the API adds for tools: the CLI subtracts them, so they are
# added back.
TOOLS_PROMPT_TOKENS = 500
LOST_NAME = (
    "messages: the process that held the conversation of this name is gone; send the whole "
    "conversation, or start over with a new name"
)
# Only these show that a turn is alive; status lines and keep-alives come from a
# half-open stream as well.
SIGNS_OF_LIFE = {
    "stream_event",
    "assistant",
    "user",
    "result",
    "control_request",
    "control_response",
}
# Seconds in which a process must say something once it has its conversation; 0.5 were
# measured for 1,000 messages.
GATE_SECS = 30.0
CLOSED_GATE = (
    "the claude CLI said nothing after its start: it may not have the pipe that it was "
    "given, as when CLAUDE_CLI_BIN is a program that closes the descriptors that it inherits"
)
# What a process never says unless a turn asked for it.
ANSWERS = {"stream_event", "assistant", "user"}
CORES = os.cpu_count() or 1
PRCTL: Any = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


@dataclass(frozen=True)
class Kind:
    """What a process is started for."""

    # Its --model; empty: it takes that of the conversation it is given
    # (`translate.transcript`).
    model: str = ""
    # It has the CLI's own tools.
    agent: bool = False


class State(enum.Enum):
    """Of a session; the first four rest, and give way in this order to a request that
    needs room."""

    # It is asked for the bridge's own log.
    PROBE = "probe"
    # Started, no conversation yet.
    SPARE = "spare"
    # On file, waits for the next message of its conversation.
    IDLE = "idle"
    # On file, waits for the results of client tools inside the CLI's tools/call.
    PARKED = "parked"
    # Answers a request.
    BUSY = "busy"
    # Is being ended; counts until its process is reaped.
    RETIRED = "retired"


RESTING = [*State][:4]
TRANSITIONS = {
    State.PROBE: {State.RETIRED},
    State.SPARE: {State.BUSY, State.RETIRED},
    State.IDLE: {State.BUSY, State.RETIRED},
    State.PARKED: {State.BUSY, State.RETIRED},
    State.BUSY: {State.IDLE, State.PARKED, State.RETIRED},
    State.RETIRED: set(),
}


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
        "names of environment variables that the CLI may see although they change what it does, "
        "such as `ANTHROPIC_API_KEY`",
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
        64,
        "most CLI processes at a time; each takes about 200 MB",
        least=1,
    )
    max_idle: int = setting(
        8,
        "processes that are kept warm after their answer",
    )
    max_turns: int = setting(
        500,
        "turns after which a process ends, as a conversation may never pause",
        least=1,
    )
    spares: int = setting(
        2,
        "processes that are started ahead of need: agents ask for a title and an answer at once",
    )
    queue_secs: float = setting(
        30.0,
        "seconds that a request waits for room before it gets 529",
    )
    max_queue: int = setting(
        1000,
        "most requests that may wait for room; more get 529 at once",
    )
    retries: int = setting(
        0,
        "how often the CLI itself retries a failed API call; clients retry by themselves",
    )
    tools: str = setting(
        "",
        "agent mode: `default`, or a list of the CLI's own tools; empty: no tools but the client's",
        "agent",
    )
    permission_mode: str = setting(
        "default",
        "the CLI's permission mode in agent mode",
        "agent",
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
        "agent",
    )
    mcp_config: str = setting(
        "",
        "agent mode: a file with the MCP servers that the CLI may use, in the CLI's own format",
        "agent",
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


# An administrator's list of MCP servers, on Linux and on macOS.
MANAGED_MCP = (
    "/etc/claude-code/managed-mcp.json",
    "/Library/Application Support/ClaudeCode/managed-mcp.json",
)


def arguments(config: PoolConfig, kind: Kind) -> list[str]:
    """The command line of a process: no settings, nothing on disk; in model mode no
    tools but the client's."""
    argv = [config.bin, "-p", "--verbose"]
    argv += ["--input-format", "stream-json"]
    argv += ["--output-format", "stream-json", "--include-partial-messages"]
    argv += ["--no-session-persistence", "--setting-sources", config.setting_sources]
    argv += ["--disable-slash-commands"]
    # The CLI refuses the flag beside an administrator's list, which excludes others.
    if not any(map(os.path.exists, MANAGED_MCP)):
        argv += ["--strict-mcp-config"]
    argv += ["--allowedTools", f"mcp__{translate.MCP_SERVER}__*"]
    if kind.agent:
        argv += ["--tools", config.tools, "--permission-mode", config.permission_mode]
        # These go on after an answer, or promise to; CHILD_DEFAULTS do not stop them.
        argv += ["--disallowedTools", "Monitor,ScheduleWakeup"]
        if config.mcp_config:
            argv += ["--mcp-config", os.path.abspath(config.mcp_config)]
    else:
        argv += ["--tools", "", "--permission-mode", "default"]
    # The API's default; without the flag 2.1.330 asks for less.
    argv += ["--effort", "high"]
    if kind.model:
        argv += ["--model", kind.model]
    return argv


# How the variables begin that the CLI's program text reads: they change what a child
# does, or its account, so it gets them only through keep_env
# (tests/test_environment.py).
SCRUBBED = (
    "AGENT_PROXY_",
    "AI_AGENT",
    "ALLOW_ANT_",
    "ANT_",
    "ANTHROPIC_",
    "API_",
    "AUTOMODE_",
    "BASH_",
    "BETA_",
    "BUGHUNTER_",
    "BUN_",
    "CCR_",
    "CLAUBBIT",
    "CLAUDE",
    "CLI_WIDTH",
    "COMPUTER_USE_",
    "DEBUG",
    "DEMO_",
    "DISABLE_",
    "EMBEDDED_",
    "ENABLE_",
    "ENVIRONMENT_SERVICE_",
    "FALLBACK_",
    "FORCE_",
    "INK_",
    "IS_DEMO",
    "LOCAL_BRIDGE",
    "MAX_",
    "MCP_",
    "OTEL_",
    "SANDBOX_OFFICE_",
    "SCREENSHOT_DIR",
    "SDK_NATIVE_BIN",
    "SELF_HOSTED_",
    "SESSION_INGRESS_",
    "SLASH_",
    "SRT_",
    "SWE_BENCH_",
    "SYSTEM_REMINDER_",
    "TASK_",
    "TEAM_MEMORY_",
    "TEST_ENABLE_",
    "TRACE",
    "ULTRAPLAN_",
    "USE_",
    "VCR_",
    "VITALS_",
    "VOICE_",
)
# Where a login is, and where its tokens are if they are elsewhere.
LOGIN_FOLDERS = ("CLAUDE_CONFIG_DIR", "CLAUDE_SECURESTORAGE_CONFIG_DIR")
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
    # Each call of the API is logged: one that the API refused, and that the CLI repeats
    # in another form, gives no event.
    "ANTHROPIC_LOG": "info",
    # The API judges how long a conversation may be.
    "CLAUDE_CODE_BLOCKING_LIMIT_OVERRIDE": "100000000",
    # The conversation is the client's.
    "DISABLE_AUTO_COMPACT": "1",
    # No updates, and no tools but those of the request.
    "DISABLE_AUTOUPDATER": "1",
    "ENABLE_CLAUDEAI_MCP_SERVERS": "0",
    "ENABLE_TOOL_SEARCH": "false",
}
# What a user sets so that the CLI reports nothing: it reaches the CLI as it is.
OPT_OUTS = (
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC",
    "DISABLE_ERROR_REPORTING",
    "DISABLE_TELEMETRY",
    "DO_NOT_TRACK",
)
# Logins that the CLI also finds in its bare mode (`Session.bare`), by the variable that
# holds them or asks for them.
BARE_LOGINS = (
    "ANTHROPIC_API_KEY",
    "CLAUDE_CODE_USE_BEDROCK",
    "CLAUDE_CODE_USE_FOUNDRY",
    "CLAUDE_CODE_USE_VERTEX",
)
# In model mode only: a client's tool named Bash or Agent must not bring Claude Code's
# own words about commits and about its subagents into the request.
MODEL_MODE = {
    "CLAUDE_AGENT_SDK_DISABLE_BUILTIN_AGENTS": "1",
    "CLAUDE_CODE_DISABLE_GIT_INSTRUCTIONS": "1",
}


def child_environment(config: PoolConfig, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process: `environ` without the variables that change what
    the CLI does, plus those that the bridge sets."""
    child = {
        name: value for name, value in environ.items() if not name.startswith(SCRUBBED)
    }
    child.update(CHILD_DEFAULTS)
    child["CLAUDE_CODE_MAX_RETRIES"] = str(config.retries)
    for name in (*LOGIN_FOLDERS, *OPT_OUTS, *config.keep_env):
        # Never the bridge's own, such as its key.
        if name in environ and not name.startswith("CLAUDE_CLI_"):
            child[name] = environ[name]
    for name in LOGIN_FOLDERS:
        if child.get(name):  # children have another working directory
            child[name] = os.path.abspath(os.path.expanduser(child[name]))
    return child


def gate_path(descriptor: int) -> str:
    """A path that leads a child to the pipe it inherits as `descriptor`; the CLI wants
    a name that ends in .jsonl.  Raises OSError.

    It is alone in a folder of its own, as the CLI writes beside it what it keeps.
    """
    try:
        own = tempfile.mkdtemp(prefix="claude-cli-bridge-")
    except FileNotFoundError:
        # The folder that Python chose at its start is gone.
        tempfile.tempdir = None
        own = tempfile.mkdtemp(prefix="claude-cli-bridge-")
    path = os.path.join(own, f"{descriptor}.jsonl")
    os.symlink(f"/dev/fd/{descriptor}", path)
    return path


def login_folder(environment: Mapping[str, str]) -> str:
    """Where the CLI keeps the user's login and settings."""
    return environment.get("CLAUDE_CONFIG_DIR") or os.path.expanduser("~/.claude")


def settings_file(environment: Mapping[str, str]) -> str:
    """The user's own settings of the CLI."""
    return os.path.join(login_folder(environment), "settings.json")


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


def die_with_parent() -> None:
    """Run in a new child: it is killed when the bridge dies, even by SIGKILL (prctl(2),
    PR_SET_PDEATHSIG).  A CLI that only sees its stdin close finishes a running turn
    first, and 2.1.330 calls the API once more for a parked tool call."""
    PRCTL(1, signal.SIGKILL)


def reap_orphans(own: set[int]) -> None:
    """Reap the children of others, which process 1 inherits (wait(2)); `own` are left to
    asyncio."""
    if sys.platform != "linux":
        return
    options = os.WEXITED | os.WNOHANG
    with contextlib.suppress(ChildProcessError):
        while found := os.waitid(os.P_ALL, 0, options | os.WNOWAIT):
            if found.si_pid in own:
                return
            os.waitid(os.P_PID, found.si_pid, options)


# The writing ends of all gates.  A fork of the program that embeds the bridge gets them
# too, and a gate with two ends never comes to its end.
OPEN_GATES: set[int] = set()


def close_gates() -> None:
    while OPEN_GATES:
        os.close(OPEN_GATES.pop())


os.register_at_fork(after_in_child=close_gates)


class Trace:
    """A file of the lines that go to the CLI and come from it for one request.

    Each is an object {"to": ...} or {"from": ...} that holds the line's JSON, or its
    text when it is none.  A file that cannot be written fails no request.
    """

    def __init__(self, folder: str, request_id: str) -> None:
        # -1: nothing is traced.
        self._file = -1
        if not folder or not request_id:
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            path = os.path.join(folder, f"{request_id}.jsonl")
            self._file = os.open(path, flags, 0o600)
        except OSError as error:
            self._give_up(error)

    def add(self, direction: str, lines: Iterable[bytes]) -> None:
        if self._file < 0:
            return
        try:
            for text in lines:
                row = b'{"%b": %b}\n' % (direction.encode(), as_json(text))
                while row:
                    row = row[os.write(self._file, row) :]
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        log.warning("the trace of a request is incomplete: %s", error)
        self.close()

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def as_json(text: bytes) -> bytes:
    """A line as a JSON value: itself, or a string when it is none."""
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return orjson.dumps(text.decode(errors="replace"))
    return text.strip()


# ------------------------------------------------------------ a child


class Child(asyncio.SubprocessProtocol):
    """A child process as bytes: its gate, its lines in and out, its end.

    A subclass takes the lines (`lines_received`, `output_ended`, `fail`).
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int] = self.loop.create_future()
        # Done when it has printed something, has ended, or START_SECS have passed.
        self.started: asyncio.Future[None] = self.loop.create_future()
        self.loop.call_later(START_SECS, self._set_started)
        # Its output has ended.
        self.eof = False
        self.has_spoken = False
        # That of the request that it answers.
        self.trace = Trace("", "")
        # When it was given its conversation; infinite: it waits at its gate.
        self.opened_at = math.inf
        # The beginning of a line whose end has not come.
        self._partial = bytearray()
        self._stderr = b""
        self._is_paused = False
        # The spawn failed: connection_made must kill and reap it.
        self._is_orphan = False
        # The writing end of the gate; -1: closed.
        self._gate = -1
        self._gate_path = ""
        # What of the conversation is still to be written.
        self._rows: deque[memoryview] = deque()

    def lines_received(self, lines: list[bytes], size: int) -> None:
        """Called with the whole lines of a read of `size` bytes."""
        raise NotImplementedError

    def output_ended(self) -> None:
        """Called at the end of its output."""
        raise NotImplementedError

    def fail(self, error: ApiError) -> None:
        """Called when it cannot be used any more."""
        raise NotImplementedError

    async def spawn(
        self, argv: list[str], environment: dict[str, str], cwd: str
    ) -> None:
        """Start it at its gate, in a process group of its own; without `cwd` it works
        in the folder of its gate.  Raises OSError when it cannot be started."""
        reading, self._gate = os.pipe()
        OPEN_GATES.add(self._gate)
        os.set_blocking(self._gate, False)
        try:
            self._gate_path = gate_path(reading)
            await self.loop.subprocess_exec(
                lambda: self,
                *argv,
                "--resume",
                self._gate_path,
                env=environment,
                cwd=cwd or os.path.dirname(self._gate_path),
                pass_fds=(reading,),
                start_new_session=True,
                preexec_fn=die_with_parent if PRCTL else None,
            )
        except BaseException as error:
            self._is_orphan = True
            self._close_gate()
            self._remove_gate()
            # There is no thread left that could wait for its end.
            if isinstance(error, RuntimeError):
                raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error
            raise
        finally:
            os.close(reading)

    # The gate

    def open_gate(self, rows: list[bytes]) -> None:
        """Give the waiting child its conversation (`translate.transcript`); it goes
        through as the child reads."""
        if self._gate < 0:
            return  # it has died; the end of its output reports it
        self.trace.add("to", rows)
        self._rows = deque(memoryview(row) for row in rows)
        self.opened_at = self.loop.time()
        self.loop.add_writer(self._gate, self._write_rows)

    def _write_rows(self) -> None:
        try:
            while self._rows:
                row = self._rows[0]
                written = os.write(self._gate, row)
                if written < len(row):
                    self._rows[0] = row[written:]
                    return
                self._rows.popleft()
        except BlockingIOError:
            return
        except OSError:  # it has died; the end of its output reports it
            self._rows.clear()
        self._close_gate()

    def _close_gate(self) -> None:
        if self._gate >= 0:
            self.loop.remove_writer(self._gate)
            OPEN_GATES.discard(self._gate)
            os.close(self._gate)
            self._gate = -1

    def _remove_gate(self) -> None:
        if self._gate_path:
            shutil.rmtree(os.path.dirname(self._gate_path), ignore_errors=True)

    async def kept_rows(self) -> bytes:
        """What it has written of its conversation, beside its gate, once it has ended
        by itself."""
        self._transport.get_pipe_transport(0).close()
        await asyncio.wait({self.exited}, timeout=SETTLE_SECS)
        folder = Path(self._gate_path).parent
        files = [path for path in folder.glob("*.jsonl") if not path.is_symlink()]
        return b"".join(path.read_bytes() for path in files)

    # Lines

    def write(self, *lines: bytes) -> None:
        self.trace.add("to", lines)
        stdin: Any = self._transport.get_pipe_transport(0)
        if stdin and not stdin.is_closing():
            stdin.writelines(lines)

    def pause(self) -> None:
        """Read nothing more until `resume`."""
        if not self._is_paused:
            self._is_paused = True
            self._transport.get_pipe_transport(1).pause_reading()

    def resume(self) -> bool:
        """Read on; whether it was paused."""
        was_paused, self._is_paused = self._is_paused, False
        stdout: Any = self._transport.get_pipe_transport(1)
        if was_paused and stdout and not self.eof:
            stdout.resume_reading()
        return was_paused

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        process: Any = transport
        self._transport = process
        self.pid: int = process.get_pid()
        if self._is_orphan:
            self._transport.close()  # kills it
            with contextlib.suppress(ChildProcessError):  # it had ended by itself
                os.waitpid(self.pid, 0)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd == 2:
            self._stderr = (self._stderr + data)[-STDERR_TAIL:]
            text = translate.SECRET.sub(r"\1***", data.decode(errors="replace"))
            for line in text.splitlines():
                log.debug("process %s prints: %s", self.pid, line[:MAX_LOGGED])
            return
        self._set_started()
        self.has_spoken = True
        *lines, rest = data.split(b"\n")
        if lines:
            lines[0] = bytes(self._partial) + lines[0]
            self._partial.clear()
            self.trace.add("from", lines)
        self._partial += rest
        self.lines_received(lines, len(data))
        if len(self._partial) > MAX_LINE:
            self._partial.clear()
            size = MAX_LINE >> 20
            self.fail(cli_error(f"the claude CLI wrote a line of more than {size} MiB"))

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if fd == 1:
            self.eof = True
            self._set_started()
            self.output_ended()

    def process_exited(self) -> None:
        self.kill(signal.SIGKILL)  # what it left behind in its group
        self._close_gate()
        if not self.exited.done():
            self.exited.set_result(self._transport.get_returncode() or 0)

    def _set_started(self) -> None:
        if not self.started.done():
            self.started.set_result(None)

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
        status = (
            f"exited with status {self.exited.result()}"
            if self.exited.done()
            else "closed its output"
        )
        lines = self._stderr.decode(errors="replace").strip()
        said = lines.rpartition("\n")[2][:300]
        return cli_error(f"the claude CLI {status}" + (f": {said}" if said else ""))

    async def end(self, *, at_once: bool = False) -> None:
        """End it and its group, and wait until it is reaped."""
        self._close_gate()
        stdin = self._transport.get_pipe_transport(0)
        if stdin and not at_once:
            stdin.close()
        steps = ENDING[-1:] if at_once else ENDING
        for number, seconds in steps:
            if number:
                self.kill(number)
            await asyncio.wait({self.exited}, timeout=seconds)
            if self.exited.done():
                break
        self._transport.close()
        self._remove_gate()


# ------------------------------------------------------------ a process


class Process(Child):
    """The CLI's protocol on a child: its control requests, tool calls, silence, faults.

    Lines are read whether or not a turn is running: control requests are answered at
    once, a turn's events wait for `read`, and what comes unasked is a fault.
    """

    def __init__(self, watchdog_secs: float) -> None:
        super().__init__()
        # The CLI's answer to `initialize`: models, account.
        self.hello: Json = {}
        # The client's tools, for the CLI to list.
        self.tools: list[Json] = []
        # The CLI has listed them.
        self.has_listed = False
        # The CLI runs a tool of its own: silence is no fault.
        self.working = False
        # The watchdog fired.
        self.timed_out = False
        # Called with the reason when it fails between turns.
        self.on_fault: Callable[[str], None] | None = None
        # Called with what it reports of the account's limits, mostly after an answer.
        self.on_limits: Callable[[dict[str, RateLimit]], None] | None = None
        # A turn is running: events are kept for it.
        self._is_in_turn = False
        # Set at the `result` of an answer that was complete before it.
        self._result_seen: asyncio.Future[bool] | None = None
        # By id, the tool calls that wait for a result.
        self._calls: dict[str, CliEvent] = {}
        # By id, the results that wait for their call: the CLI may ask one by one.
        self._results: dict[str, Json] = {}
        # Client tools that the last answer called: the calls themselves may come later.
        self._announced_calls: frozenset[str] = frozenset()
        self._watchdog_secs = watchdog_secs
        # When the last sign of life came, or is due after an announced retry.
        self._alive_at = self.loop.time()
        self._events: list[CliEvent] = []
        # Bytes of what was read since _events was empty.
        self._unread = 0
        self._waiter: asyncio.Future[None] | None = None
        # When it has been silent for too long, at the earliest.
        self._timer: asyncio.TimerHandle | None = None
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
        """The watchdog runs, events are kept, and lines are traced."""
        self.trace = trace or self.trace
        self._is_in_turn = True
        self._announced_calls = frozenset()
        self._alive_at = self.loop.time()

    def end_turn(self, seen: bool, calls: Iterable[str] = ()) -> bool:
        """End a turn whose answer called the client tools `calls`.  `seen`: its
        `result` has come.  Returns False when the process printed something after the
        `result`."""
        self._is_in_turn = False
        self._stop_timer()
        self._announced_calls = frozenset(calls)
        is_quiet = True
        for event in self._events:
            is_quiet = is_quiet and not (seen and self.is_unasked([event]))
            seen = seen or event["type"] == "result"
        self._events.clear()
        self.resume()
        is_over = seen or self._announced_calls or self._failure
        self._result_seen = None if is_over else self.loop.create_future()
        return is_quiet

    async def is_ready(self) -> bool:
        """Whether it is done with its last turn, and has not spoken or died since."""
        is_done = True
        if self._result_seen:
            try:
                async with asyncio.timeout(SETTLE_SECS):
                    is_done = await self._result_seen
            except TimeoutError:
                return False
        for _ in range(READ_ROUNDS):
            await asyncio.sleep(0)
        return is_done and not self.is_unusable

    def hand_over(self, results: dict[str, Json]) -> None:
        """Give the results of tool calls, by id, to those that wait and those that are
        yet to come."""
        self._results |= results
        for call in results.keys() & self._calls.keys():
            self._answer_call(self._calls.pop(call), call)

    def _answer_call(self, event: CliEvent, call: str) -> None:
        if call in self._results:
            result = self._results.pop(call)
            self.write(translate.control_answer(event, self.tools, result))
        else:
            self._calls[call] = event

    # Reading

    async def read(self) -> list[CliEvent]:
        """The events that have come since the last call, at least one.

        Raises ApiError: 504 after the watchdog's time without a sign of life, 502 when
        the process failed or ended.
        """
        while not self._events:
            if self._failure:
                raise self._failure
            if self.eof:
                raise await self.death()
            await self._wait()
        events, self._events = self._events, []
        self._resume_reading()
        return events

    async def _wait(self) -> None:
        """Wait for what `_wake` reports.  Raises as `read`, when it comes too late."""
        self._resume_reading()  # what is unread is the beginning of a line
        now = self.loop.time()
        silent_since = now if self.working else self._alive_at
        silent_at = silent_since + self._watchdog_secs
        mute_at = math.inf if self.has_spoken else self.opened_at + GATE_SECS
        if now >= mute_at:
            raise cli_error(CLOSED_GATE)
        if now >= silent_at:
            # The bridge itself may have been stopped: what came meanwhile is in the pipe.
            for _ in range(READ_ROUNDS):
                await asyncio.sleep(0)
            if self._events or self.is_unusable or self._alive_at > silent_since:
                return
            self.timed_out = True
            seconds = f"{self._watchdog_secs:g}"
            raise ApiError(504, f"the claude CLI was silent for {seconds} seconds")
        due = min(silent_at, mute_at)
        if self._timer and self._timer.when() > due:
            self._stop_timer()
        if not self._timer:
            # One for many waits: a new one for each delta costs as much as the delta.
            self._timer = self.loop.call_at(due, self._look)
        self._waiter = self.loop.create_future()
        await self._waiter

    def _look(self) -> None:
        """Look whether it has been silent for too long."""
        self._timer = None
        self._wake()

    def _stop_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    async def read_until(self, find: Callable[[CliEvent], Any]) -> Any:
        """Read until `find` returns something for an event, and return that.  Raises
        ApiError: as `read`, and that of a failed turn."""
        translator = Translator()  # it raises what fails
        found = None
        while not found:
            for event in await self.read():
                translator.feed(event)
                found = found or find(event)
        return found

    async def ask(self, name: str, subtype: str, **fields: Any) -> Json:
        """Send a control request under a name of its own; returns the CLI's response,
        good or bad.  Raises as `read_until`."""
        self.write(translate.control_line(name, subtype, **fields))
        answer: Json = await self.read_until(
            lambda event: translate.control_response(event, name)
        )
        return answer

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    def _resume_reading(self) -> None:
        self._unread = 0
        if self._is_paused and self.resume():
            self._alive_at = self.loop.time()  # the silence was the client's

    # What a child reports

    def lines_received(self, lines: list[bytes], size: int) -> None:
        if self._failure:
            return  # it is not used again
        events: list[CliEvent] = []
        failure: ApiError | None = None
        try:
            for line in lines:
                new = self._take_in(line)
                if not self._is_in_turn and self.is_unasked(new):
                    raise cli_error("the claude CLI spoke unasked")
                events += new
        except ApiError as error:
            failure = error
        if self._is_in_turn:
            self._buffer(events, size)
        if failure:
            self.fail(failure)  # after what came before it

    def fail(self, error: ApiError) -> None:
        self._failure = error
        self._expect_nothing()
        if self.on_fault and not self._is_in_turn:
            is_damaged = error.message == translate.DAMAGED_LINE
            self.on_fault("failed" if is_damaged else "unasked")

    def output_ended(self) -> None:
        self._expect_nothing()

    def _expect_nothing(self) -> None:
        """Let those go on who wait for its last `result`, or for events."""
        if self._result_seen and not self._result_seen.done():
            self._result_seen.set_result(False)
        self._wake()

    def _buffer(self, events: list[CliEvent], size: int) -> None:
        self._events += events
        self._unread += size
        if self._unread > MAX_UNREAD and self._events:
            self.pause()
        if events:
            self._wake()

    def is_unasked(self, events: list[CliEvent]) -> bool:
        """Whether events outside a turn show that the process goes on by itself.  Until
        the last turn's `result` has come they may still be that turn's, except another
        answer of the model and the call of a tool that was not announced."""
        is_over = self._result_seen is None or self._result_seen.done()
        unasked = ANSWERS if is_over else {"stream_event"}
        for event in events:
            call = translate.tool_call_id(event)
            if event["type"] in unasked or (call and call not in self._announced_calls):
                return True
        return False

    def _take_in(self, line: bytes) -> list[CliEvent]:
        """Decode a line, and act on it at once: answer control requests, note signs of
        life."""
        events = translate.decode(line)
        for event in events:
            kind = event["type"]
            if kind in SIGNS_OF_LIFE:
                self._alive_at = self.loop.time()
            if kind == "stream_event":
                continue  # most are
            if kind == "control_request":
                self._answer_control(event)
            elif kind == "control_response":
                self.hello = control_result(event, "initialize") or self.hello
            elif kind == "rate_limit_event" and self.on_limits:
                self.on_limits(translate.rate_limits(event))
            elif kind == "result" and not self._is_in_turn:
                self._take_late_result(event)
            elif event.get("subtype") == "api_retry":
                delay: Any = event.get("retry_delay_ms")
                is_known = isinstance(delay, int | float)
                seconds = delay / 1000 if is_known else 0
                self._alive_at = self.loop.time() + seconds
        return events

    def _take_late_result(self, event: CliEvent) -> None:
        if self._result_seen is None or self._result_seen.done():
            raise cli_error("the claude CLI ended a turn that nobody asked for")
        self._result_seen.set_result(not event.get("is_error"))

    def _answer_control(self, event: CliEvent) -> None:
        call = translate.tool_call_id(event)
        if call:
            self._answer_call(event, call)
            return
        self.write(translate.control_answer(event, self.tools))
        if translate.mcp_method(event) == "tools/list":
            self.has_listed = True

    async def stop(self) -> None:
        """End it.  One that waits for a tool result is killed: 2.1.330 calls the API
        once more when its stdin closes."""
        self._stop_timer()
        await self.end(at_once=bool(self._calls or self._announced_calls))


# ------------------------------------------------------------ the CLI

# Versions of the CLI (README, "Versions of the CLI"; tests/README.md has what was seen of
# each).  One older than this lists no full names of models, without which it keeps no
# thinking of the past; with still older ones the API gets another request than the
# client's.
OLDEST = (2, 1, 197)
NEWEST_TESTED = (2, 1, 332)
# From here on the CLI announces things to the model (`translate.ANNOUNCEMENTS`), and
# does not in its bare mode.
ANNOUNCES = (2, 1, 267)
HAS_BARE_MODE = (2, 1, 300)
# From here on it keeps a text after a tool call there.
KEEPS_ORDER = (2, 1, 266)
# From here on a conversation can end with an assistant message.
CONTINUES = (2, 1, 300)
# Seconds for `claude --version`; 0.1 were measured.
VERSION_SECS = 5.0
# An address where nobody answers: RFC 863's port, on loopback.
NOWHERE = "http://127.0.0.1:9"
# For a process whose question must not be answered, whoever's settings name an API.
UNREACHABLE = {
    "ANTHROPIC_BASE_URL": NOWHERE,
    "HTTP_PROXY": NOWHERE,
    "HTTPS_PROXY": NOWHERE,
    "NO_PROXY": "",
    "http_proxy": NOWHERE,
    "https_proxy": NOWHERE,
    "no_proxy": "",
}

# A file: its path without links, device, inode, and time of change.
FileIdentity = tuple[str, int, int, int]


@dataclass(eq=False)
class Cli:
    """The CLI that is installed, and what is known of it; another program in its place,
    or another login, is another Cli."""

    # The program, the user's settings, and the credentials.
    files: tuple[FileIdentity | None, ...] = ()
    # As `claude --version` prints it; empty: unknown.
    version: str = ""
    # Its last answer to `initialize`; empty: none yet.
    hello: Json = field(default_factory=dict)
    # By name, whether a process takes a model without --model.
    models: OrderedDict[str, bool] = field(default_factory=OrderedDict)
    # Answers of `Pool.count`.
    counts: OrderedDict[bytes, int] = field(default_factory=OrderedDict)
    # By model and account, what it announces (`Pool._announced`).
    announced: dict[tuple[str, bytes], list[Json]] = field(default_factory=dict)

    @property
    def program(self) -> str:
        """Its path without links; empty: unknown."""
        return self.files[0][0] if self.files and self.files[0] else ""

    @property
    def numbers(self) -> tuple[int, ...]:
        """The version, to be compared; empty: unknown."""
        match = re.match(r"(\d+)\.(\d+)\.(\d+)", self.version)
        return tuple(map(int, match.groups())) if match else ()

    def since(self, version: tuple[int, ...]) -> bool:
        """Whether it is of this version or newer; one that does not say is."""
        return not self.numbers or self.numbers >= version

    @property
    def problem(self) -> str:
        """Why it cannot be used; empty: it can."""
        if self.since(OLDEST):
            return ""
        words = (
            f"the claude CLI is version {self.version}, and {dotted(OLDEST)} or newer"
        )
        return f"{words} is needed: {update_cure(self.program)}"

    @property
    def warning(self) -> str:
        """What to try first; empty: nothing."""
        if self.numbers <= NEWEST_TESTED:
            return ""
        words = f"the claude CLI {self.version} is newer than {dotted(NEWEST_TESTED)}"
        return (
            f"{words}, the newest that was tested: `claude-cli-bridge check` tries it"
        )


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def update_cure(program: str) -> str:
    """How to update the CLI: that of the wheel comes with pip."""
    if "claude_agent_sdk" in program:
        return "run `pip install --upgrade claude-agent-sdk`"
    return "run `claude update`, or install Claude Code anew"


def identify_file(path: str) -> FileIdentity | None:
    """Which file is at a path; None: there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return os.path.realpath(path), found.st_dev, found.st_ino, found.st_mtime_ns


async def ask_version(program: str, environment: Mapping[str, str], secs: float) -> str:
    """What `claude --version` prints first, such as 2.1.332; empty: nothing, within
    this time."""
    try:
        process = await asyncio.create_subprocess_exec(
            program,
            "--version",
            env=environment,
            cwd="/",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
    except (OSError, RuntimeError):  # the first conversation will say it
        return ""
    text = b""
    try:
        async with asyncio.timeout(secs):
            text, _ = await process.communicate()
    except TimeoutError:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    words = text.decode(errors="replace").split()
    return words[0] if words and re.match(r"\d+\.\d", words[0]) else ""


# ------------------------------------------------------------ a conversation


@dataclass(eq=False)
class Session:
    """A process and the conversation in it; the only writer of its own fields."""

    process: Process
    kind: Kind
    # The CLI that it runs.
    cli: Cli
    # In the CLI's bare mode, in which it says nothing to the model of its own accord,
    # and reads no subscription's login.
    bare: bool
    state: State
    # The id under which the CLI asks the API, a UUID.
    own_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    # As clients see it.
    id: str = ""
    # The name that the client gave it by header, with its owner; empty: none.
    pin: str = ""
    # Digests of what it cannot change.
    parts: Digests = field(default_factory=dict)
    # Digest of the messages in it, its own answers included.
    chain: bytes = b""
    # The same for a client that drops the thinking.
    unthinking_chain: bytes = b""
    # The full name of the model that it was asked for; empty: unknown.
    model: str = ""
    # Digests of the settings that it was given last, by name.
    settings: Digests = field(default_factory=dict)
    # Ids of the client tools that its last answer called.
    calls: list[str] = field(default_factory=list)
    # Answers that it has given.
    turns: int = 0
    # The UUID of the user line that started its last turn.
    turn_id: str = ""
    # Monotonic time of its last change of state.
    since: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.id = self.own_id
        self.was_spare = self.state is State.SPARE

    @property
    def holds_thinking(self) -> bool:
        return self.chain != self.unthinking_chain

    def is_like(self, other: "Session") -> bool:
        """Whether a request could find either of the two; a client may leave out
        thinking."""
        mine = (self.unthinking_chain, self.parts)
        is_same = mine == (other.unthinking_chain, other.parts)
        return is_same and not self.pin and not other.pin

    def matches(self, request: Request) -> bool:
        """Whether it has the request's history, and all that cannot change."""
        wanted = request.fingerprint
        chain = self.chain if wanted.has_thinking else self.unthinking_chain
        return (chain, self.parts) == (wanted.past, wanted.parts)

    def move(self, state: State) -> None:
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"a session cannot go from {self.state} to {state}")
        self.state = state
        self.since = time.monotonic()

    def renew(self, cli: Cli) -> None:
        """Go on under another login, which a process looks for when it is asked."""
        self.cli = cli

    # A first turn

    def take_name(self, name: str, pin: str) -> None:
        """Be found by the name that the client gave it, and by nothing else."""
        self.id = name
        self.pin = pin

    def adopt(self, request: Request, tools: list[Json], trace: Trace | None) -> None:
        """Take on a request's conversation."""
        self.process.begin_turn(trace)
        self.process.tools = tools
        self.process.hello = self.process.hello or self.cli.hello
        wanted = request.fingerprint
        self.parts = wanted.parts
        self.chain = wanted.past
        self.unthinking_chain = wanted.past_without_thinking
        listed = translate.listed_model(self.cli.hello, request.model)
        self.model = listed or request.model

    def start(self, request: Request, rows: list[bytes], query: bool) -> list[bytes]:
        """Open its gate for the `rows` of the conversation, and give it what comes with
        it; returns the line that asks.  Without `query` it only counts."""
        self.turn_id = str(uuid.uuid4())
        settings = translate.turn_settings(request)
        self.settings = {
            name: translate.digest(value) for name, value in settings.items()
        }
        has_tools = bool(self.process.tools)
        self.process.open_gate(rows)
        self.process.write(
            translate.initialize_line(
                request.system, has_tools=has_tools, agent=self.kind.agent
            ),
            translate.settings_line(
                {name: value for name, value in settings.items() if value}
            ),
        )
        return [translate.user_line([], self.turn_id, query=query)]

    # Later turns

    def question(self, request: Request, with_message: bool) -> list[bytes]:
        """The lines that ask what is new in a request: changed settings, and the
        message, unless it holds the results that the process waits for."""
        has_tools = bool(self.process.tools)
        settings = translate.turn_settings(request, has_listed_tools=has_tools)
        changed = {}
        for name, value in settings.items():
            known = translate.digest(value)
            if self.settings.get(name) != known:
                self.settings[name] = known
                changed[name] = value
        lines = [translate.settings_line(changed)] if changed else []
        self.turn_id = ""
        if with_message:
            self.turn_id = str(uuid.uuid4())
            content = request.messages[-1]["content"]
            lines.append(translate.user_line(content, self.turn_id))
        return lines

    def extend(self, request: Request, answer: Json, calls: list[str]) -> None:
        """Add the question and the answer of a turn to what it holds."""
        message: Any = answer
        newest = request.fingerprint.newest
        asked = translate.extend_chain(self.chain, newest)
        self.chain = translate.extend_chain(asked, translate.message_digest(message))
        unthinking = translate.extend_chain(self.unthinking_chain, newest)
        self.unthinking_chain = translate.extend_chain(
            unthinking, translate.message_digest(message, thinking=False)
        )
        self.calls = calls
        self.turns += 1


@dataclass
class Turn:
    """One request in one session."""

    request: Request
    session: Session
    # Hot, new or rebuilt.
    origin: str
    # Why it was rebuilt; empty otherwise.
    reason: str
    # What is written to start it.
    lines: list[bytes]
    # By id the results of tool calls, when they are all that is new.
    results: dict[str, Json] | None = None
    # Called when the answer has begun.
    on_begin: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        session = self.session
        self.process = session.process
        self.translator = Translator(
            [tool["name"] for tool in self.process.tools],
            agent=session.kind.agent,
            turn_id=session.turn_id,
            # The API may answer from one of the client's own `fallbacks`.
            model="" if "fallbacks" in self.request.fields else session.model,
        )
        # The process went on by itself after the `result`.
        self.spoke_after_result = False
        # What it printed is no answer.
        self.has_failed = False

    @property
    def decision(self) -> str:
        """Which process answers, and why, for the log."""
        session = self.session
        was = "was a spare" if session.was_spare else "was started for a request"
        why = f" ({self.reason})" if self.reason else ""
        turn = f"turn {session.turns + 1} of process {self.process.pid}"
        return f"{self.origin}{why}, {turn}, which {was}"

    @property
    def not_sent(self) -> list[str]:
        """The fields and places of the request that cannot arrive as sent."""
        keeps_thinking = (
            self.origin == "hot"
            and not self.request.fingerprint.has_thinking
            and self.session.holds_thinking
        )
        lost = self.request.not_sent.copy()
        if keeps_thinking:
            lost.append("thinking")  # the process has what the client left out
        if not self.session.cli.since(KEEPS_ORDER):
            lost += self.request.misplaced
        return lost

    async def relay(
        self, send: Callable[[bytes], bool], drain: Callable[[], Awaitable[None]]
    ) -> None:
        """Start the turn, and pass its frames to `send`, one call for each read; b""
        unless the request streams.  When `send` returns False, `drain` is awaited, and
        the child is not read meanwhile.

        Raises ApiError when the turn fails; what was sent before stays a correct
        beginning.
        """
        self.process.write(*self.lines)
        self.lines = []
        if self.results is not None:
            self.process.hand_over(self.results)
        while not self.translator.done:
            events = await self.process.read()
            frames: list[bytes] = []
            is_ready = True
            try:
                self._translate(events, frames)
            except ApiError:
                self.has_failed = True
                raise
            finally:  # what came before a fault is sent
                if self.translator.message:
                    is_ready = send(b"".join(frames) if self.request.stream else b"")
                    self._begun()
            self.process.working = self.translator.working
            if not is_ready:
                await drain()
        if not self.rests:
            # The CLI goes on by itself here, and nothing more may be billed: it is
            # killed before it can ask.
            self.process.kill(signal.SIGKILL)

    def _translate(self, events: list[CliEvent], frames: list[bytes]) -> None:
        translator = self.translator
        for event in events:
            if translator.result:
                unasked = self.process.is_unasked([event])
                self.spoke_after_result = self.spoke_after_result or unasked
            for fed in translator.feed(event):
                frames.append(translate.frame(fed))

    def _begun(self) -> None:
        if self.on_begin:
            self.on_begin()
            self.on_begin = None

    @property
    def rests(self) -> bool:
        """Whether the process can take the next turn; one that calls tools must have
        listed them."""
        can_hand_over = self.process.has_listed or not self.translator.calls
        # The client gets half a message, and sends both halves as one.
        is_half = self.request.continues
        return self.translator.rests and can_hand_over and not is_half

    def interrupt(self) -> None:
        self.process.write(translate.control_line("interrupt", "interrupt"))


# ------------------------------------------------------------ room


class Room:
    """Places for processes.  A place is free again when its process is reaped."""

    def __init__(self, places: int) -> None:
        self._places = asyncio.Semaphore(places)
        # At most so many start at a time: more would slow each other down.
        self._starting = asyncio.Semaphore(2 * CORES)
        # Who waits for a place.
        self._waiting = 0
        # The ends of processes that still have one.
        self.ending: set[asyncio.Task[None]] = set()

    @property
    def is_full(self) -> bool:
        return self._places.locked()

    @property
    def has_next(self) -> bool:
        """Whether a place will be free for one who comes now."""
        return not self.is_full or len(self.ending) > self._waiting

    @property
    def is_short(self) -> bool:
        """Whether somebody waits for whom no process is being ended."""
        return self._waiting > len(self.ending)

    async def enter(self) -> None:
        """Take a place, and a turn to start."""
        self._waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._waiting -= 1
        try:
            await self._starting.acquire()
        except BaseException:
            self._places.release()
            raise

    def started(self) -> None:
        self._starting.release()

    def leave(self) -> None:
        self._places.release()

    def leave_after(
        self, end: Coroutine[Any, Any, None], then: Callable[[], None]
    ) -> None:
        """Give a place back at the end of its process."""
        task = asyncio.create_task(end)
        self.ending.add(task)

        def leave(task: asyncio.Task[None]) -> None:
            # All at once, or one who waits could count on an end whose place is taken.
            self.ending.discard(task)
            then()
            self.leave()

        task.add_done_callback(leave)


# ------------------------------------------------------------ all of them


def cache_put(
    cache: OrderedDict[Any, Any], key: object, value: object, most: int
) -> None:
    """Add an entry to a cache, and drop the oldest beyond `most`."""
    cache[key] = value
    cache.move_to_end(key)
    if len(cache) > most:
        cache.popitem(last=False)


@dataclass(frozen=True)
class Snapshot:
    """How a pool stands, for the page and the metrics."""

    # State, answers given and seconds in that state of each process.
    processes: list[tuple[State, int, float]]
    # Requests that wait.
    waiting: int
    # Limits of the account by type.
    limits: dict[str, RateLimit]


class Pool:
    """All sessions, at most `max_sessions` processes at any time."""

    def __init__(
        self, config: PoolConfig, environ: Mapping[str, str] = os.environ
    ) -> None:
        self.config = config
        self.metrics = Metrics()
        # Every process that is not reaped.
        self.sessions: set[Session] = set()
        self.room = Room(config.max_sessions)
        self.cli = Cli()
        # Limits of the account by type, the one reported last at the end.
        self.rate_limits: dict[str, RateLimit] = {}
        # What the last requests needed.
        self._kinds: deque[Kind] = deque(maxlen=2 * config.spares)
        # Spares that are being started.
        self._preparing: dict[asyncio.Task[None], Kind] = {}
        # One caller of `hello` at a time.
        self._hello_lock = asyncio.Lock()
        self._environment = child_environment(config, environ)
        self._agent_cwd = os.path.abspath(config.cwd)
        # Requests and spares in `_queue`: they wait for a lock, a count or a process.
        self._queued = 0
        # One looks at the CLI at a time, and one learns what it announces.
        self._cli_lock = asyncio.Lock()
        self._announcing = asyncio.Lock()
        # A lock for each session header in use: its requests run one after another.
        self._pins: weakref.WeakValueDictionary[str, asyncio.Lock] = (
            weakref.WeakValueDictionary()
        )
        # By fingerprint and by pin, the parts of the session that held a conversation
        # last, and why a request may not find it there.
        self._outcomes: OrderedDict[bytes | str, tuple[Digests, str]] = OrderedDict()
        # The process of each conversation of an agent that was filed last.
        self._agents: OrderedDict[bytes, str] = OrderedDict()
        # One large request is read or written at a time.
        self._large = asyncio.Semaphore(1)
        # A thread for large requests, and one for those that need not wait for them.
        self._executors: dict[bool, ThreadPoolExecutor] = {}

    async def __aenter__(self) -> "Pool":
        self._sweeper = asyncio.create_task(self._sweep())
        self._kinds.append(Kind())
        self.refill()
        self._kinds.clear()  # from here on it is what clients ask for
        return self

    async def __aexit__(self, *_: object) -> None:
        self._kinds.clear()
        for task in (self._sweeper, *self._preparing):
            task.cancel()
        await asyncio.wait({self._sweeper, *self._preparing})
        for session in list(self.sessions):
            self.retire(session, "shutdown")
        while self.room.ending:
            await asyncio.wait(self.room.ending)
        for executor in self._executors.values():
            executor.shutdown()

    def resting(self, *states: State) -> list[Session]:
        """The sessions in these states, in the order in which they give way."""
        found = [session for session in self.sessions if session.state in states]
        order = [*State]
        return sorted(found, key=lambda item: (order.index(item.state), item.since))

    @property
    def spares(self) -> list[Session]:
        return self.resting(State.SPARE)

    @property
    def on_file(self) -> list[Session]:
        return self.resting(State.IDLE, State.PARKED)

    def snapshot(self) -> Snapshot:
        now = time.monotonic()
        processes = [
            (session.state, session.turns, now - session.since)
            for session in self.resting(*State)
        ]
        return Snapshot(processes, self._queued, self.rate_limits.copy())

    async def compute(self, size: int, function: Callable[[], T]) -> T:
        """Run what takes time in proportion to a request of `size` bytes: a large one
        in a thread, one after another, so that others are served meanwhile.  Raises
        ApiError 529 when its turn does not come."""
        if size < THREAD_SIZE:
            return function()
        is_large = size >= LARGE_SIZE
        if is_large:
            await self.queue(self._large.acquire, "other large requests were not read")
        try:
            if is_large not in self._executors:
                self._executors[is_large] = ThreadPoolExecutor(1)
            executor = self._executors[is_large]
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(executor, function)
        finally:
            if is_large:
                self._large.release()

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
        async with self._pinned(token, key_digest) as pin:
            with contextlib.closing(Trace(self.config.trace_dir, request_id)) as trace:
                turn = await self._hot_turn(request, pin, trace)
                if not turn:
                    turn = await self._fresh_turn(request, pin, token, trace)
                log.debug("request %s: %s", request_id, turn.decision)
                try:
                    yield turn
                finally:
                    self._finish(turn)

    @property
    def has_room(self) -> bool:
        """Whether a request would get a process, at worst that of a resting
        conversation or the room of one that is being ended."""
        return self.room.has_next or bool(self.resting(*RESTING))

    async def hello(self, *, anew: bool = False, gives_way: bool = False) -> Json:
        """What the CLI says of itself, without a model call: `models`, `account`.

        The last answer of any process is good, unless it is asked `anew` and there is
        room; else one process is started for it, which `gives_way` to any request.
        Raises ApiError when the CLI does not work.
        """
        await self.queue(self._hello_lock.acquire, "the claude CLI did not start")
        try:
            await self.look_at_cli()
            if not self.cli.hello or (anew and not self.room.is_full):
                await self._probe(State.PROBE if gives_way else State.BUSY)
            return self.cli.hello
        finally:
            self._hello_lock.release()

    async def _probe(self, state: State) -> None:
        bare = self._is_bare(agent=False, by_environment=True)
        session = await self._spawn(Kind(PROBE_MODEL), bare, state)
        self._evict_for_waiter()
        try:
            session.process.begin_turn()
            session.process.open_gate(translate.transcript([], PROBE_MODEL))
            session.process.write(translate.initialize_line([], has_tools=False))
            session.cli.hello = await session.process.read_until(
                lambda event: control_result(event, "initialize")
            )
        except ApiError:
            if session.state is not State.RETIRED:
                raise
            message = "a request took the room of the process that was asked"
            raise ApiError(529, message) from None
        finally:
            self.retire(session, "probe")

    def is_own(self, session_id: str, user_id: str) -> bool:
        """Whether a request comes from a process of this pool, by the id in its header
        or in its `metadata.user_id`."""
        ids = [session.own_id for session in self.sessions]
        return session_id in ids or any(own_id in user_id for own_id in ids)

    # Finding a session

    @contextlib.asynccontextmanager
    async def _pinned(self, token: str | None, key_digest: str) -> AsyncIterator[str]:
        """The pin of a named conversation; no other request of it runs meanwhile."""
        if not token:
            yield ""
            return
        pin = f"{session_id(token)} {key_digest}"
        lock = self._pins.setdefault(pin, asyncio.Lock())
        await self.queue(lock.acquire, "the session's other requests did not end")
        try:
            yield pin
        finally:
            lock.release()

    async def queue(self, room: Callable[[], Awaitable[object]], what: str) -> None:
        """Wait for `room` in a line of at most `max_queue` requests, for at most
        `queue_secs`.  Raises ApiError 529."""
        timeout = self.config.queue_secs
        message = f"{what} within {timeout:g} seconds"
        if self._queued >= self.config.max_queue:
            timeout = 0  # it may still be had at once
            message = f"{self._queued} requests wait for room already"
        self._queued += 1
        began = time.monotonic()
        try:
            async with asyncio.timeout(timeout):
                await room()
        except TimeoutError:
            after = max(1, round(self.config.queue_secs))
            message += "; try again later"
            raise ApiError(529, message, retry_after=after) from None
        finally:
            self._queued -= 1
            is_for_spare = asyncio.current_task() in self._preparing
            if not is_for_spare:  # nobody waits for one
                self.metrics.time("queue_seconds", time.monotonic() - began)

    async def _hot_turn(self, request: Request, pin: str, trace: Trace) -> Turn | None:
        """A turn of the warm session that holds the request's history, if there is
        one."""
        session = self._find_pinned(request, pin) if pin else self._find(request)
        if not session:
            return None
        content = request.messages[-1]["content"]
        is_parked = session.state is State.PARKED
        results = translate.tool_results(content, session.calls) if is_parked else None
        reason = ""
        if session.bare and session.cli.files[1:] != self._identify_cli()[1:]:
            # It reads no subscription's login, and there may be one now.
            reason = "login"
        elif translate.has_images(content):
            reason = "images"  # only a transcript keeps them as they are
        elif is_parked and results is None:
            reason = "tool-results"
        if reason:
            self.retire(session, reason)
            return None
        session.move(State.BUSY)
        self._record_outcome(session, "busy")
        try:
            lines = await self.compute(
                request.size, lambda: session.question(request, results is None)
            )
            is_ready = await session.process.is_ready()
        except BaseException:
            self.retire(session, "interrupted")
            raise
        if not is_ready:
            self.retire(session, "failed")
            return None
        session.process.begin_turn(trace)
        return Turn(request, session, "hot", "", lines, results)

    def _find_pinned(self, request: Request, pin: str) -> Session | None:
        wanted = request.fingerprint
        session = next((item for item in self.on_file if item.pin == pin), None)
        if not session:
            if not wanted.past and pin in self._outcomes:
                raise ApiError(400, LOST_NAME)
            return None
        # A client that names its conversation may leave out what it said before.
        only_what_is_new = (
            not wanted.past and session.parts.items() >= wanted.sent_parts.items()
        )
        if not session.matches(request) and not only_what_is_new:
            self.retire(session, "changed")
            return None
        results = translate.blocks_of(request.messages[-1:], ["tool_result"])
        if session.state is State.PARKED and not results:
            raise translate.unanswered(session.calls, "messages.0")
        return session

    def _find(self, request: Request) -> Session | None:
        for session in self.on_file:
            if session.matches(request) and not session.pin:
                return session
        return None

    async def _fresh_turn(
        self, request: Request, pin: str, token: str | None, trace: Trace
    ) -> Turn:
        origin, reason = self._rebuild_reason(request, pin)
        tools = translate.listed_tools(request)
        session, lines = await self.open(request, tools, trace)
        if token:
            session.take_name(session_id(token), pin)
        return Turn(request, session, origin, reason, lines, on_begin=self.refill)

    def _rebuild_reason(self, request: Request, pin: str) -> tuple[str, str]:
        """Why a turn is not hot: `new`, or `rebuilt` with a reason that its user can
        act on."""
        wanted = request.fingerprint
        outcome = self._outcomes.get(wanted.past) or self._outcomes.get(pin)
        if request.continues:
            return "rebuilt", "prefill"
        if not outcome:
            return ("rebuilt", "unknown-history") if wanted.past else ("new", "")
        parts, reason = outcome
        changed = [
            name for name in wanted.parts if parts.get(name) != wanted.parts[name]
        ]
        if changed:
            reason = f"{changed[0]}-changed"
        elif reason == "changed":
            reason = "unknown-history"
        return "rebuilt", reason

    # Fresh processes

    async def open(
        self,
        request: Request,
        tools: list[Json],
        trace: Trace | None = None,
        *,
        query: bool = True,
    ) -> tuple[Session, list[bytes]]:
        """A process that holds the history of the request, and the lines that start its
        turn.  Without `query` the message is only added, to be counted."""
        cli = await self.look_at_cli()
        if request.continues and not cli.since(CONTINUES):
            message = "a conversation that ends with an assistant message needs Claude"
            message += f" Code {dotted(CONTINUES)} or newer; this is {cli.version}"
            raise translate.bad_request("messages", message)
        # Thinking is kept only beside the full name of the model, and only the CLI
        # knows what login is in its settings.
        needs_hello = request.fingerprint.has_thinking or self.config.setting_sources
        if needs_hello and not cli.hello:
            await self.hello()
        bare = self._is_bare(request.is_agent)
        announced: list[Json] = []
        if not request.is_agent and not bare:
            announced = await self._announced(request.model)
        while True:
            session = await self._take(request.model, request.is_agent, bare)
            try:
                session.adopt(request, tools, trace)
                make_rows = partial(
                    translate.transcript,
                    request.messages,
                    session.model,
                    announced,
                    session.own_id,
                )
                rows = await self.compute(request.size, make_rows)
                lines = session.start(request, rows, query)
                if await self._has_model(session, request.model):
                    return session, lines
            except BaseException as error:
                self.retire(session, "failed")
                # No prompt was asked: another process can take it.
                is_cli_error = isinstance(error, ApiError) and error.status == 502
                if session.was_spare and is_cli_error:
                    continue
                raise
            self.retire(session, "model")  # the next one is started with --model

    async def _has_model(self, session: Session, name: str) -> bool:
        """Whether a process that was started without --model runs the one that its
        conversation names.

        For a model that it cannot resume with, the CLI silently takes its default: each
        name is checked once.
        """
        models = session.cli.models
        if session.kind.model or models.get(name):
            return True
        answer = await session.process.ask("get_settings", "get_settings")
        wanted = translate.listed_model(session.process.hello, name) or name
        runs = translate.applied_model(answer) == wanted
        cache_put(models, name, runs, MAX_MODELS)
        return runs

    def _is_bare(self, agent: bool, *, by_environment: bool = False) -> bool:
        """Whether a process is started in the CLI's bare mode: where its login is found
        in it."""
        if agent or not self.cli.since(HAS_BARE_MODE):
            return False
        if any(self._environment.get(name) for name in BARE_LOGINS):
            return True
        # A key in the user's settings; the CLI has said so.
        is_in_settings = self.config.setting_sources and not by_environment
        return bool(is_in_settings) and translate.has_api_key(self.cli.hello)

    async def look_at_cli(self) -> Cli:
        """The CLI that is installed now.  Raises ApiError when it is too old."""
        async with self._cli_lock:
            files = self._identify_cli()
            if files != self.cli.files:
                secs = min(VERSION_SECS, self.config.watchdog_secs)
                version = await ask_version(self.config.bin, self._environment, secs)
                is_other_program = files[:1] != self.cli.files[:1]
                self.cli = Cli(files, version)
                for spare in self.spares:
                    if is_other_program:
                        self.retire(spare, "unwanted")
                    spare.renew(self.cli)
        if self.cli.problem:
            raise cli_error(self.cli.problem)
        return self.cli

    def _identify_cli(self) -> tuple[FileIdentity | None, ...]:
        settings = settings_file(self._environment)
        credentials = os.path.join(login_folder(self._environment), ".credentials.json")
        return tuple(map(identify_file, (self.config.bin, settings, credentials)))

    async def _announced(self, name: str) -> list[Json]:
        """What the CLI announces to a model, with today's date.

        It is asked once, by a process that keeps its conversation in a file beside its
        gate, and whose question reaches nobody.
        """
        cli = self.cli
        if not cli.since(ANNOUNCES):
            return []
        async with self._announcing:
            known = (name, translate.digest(cli.hello.get("account")))
            if known not in cli.announced:
                rows = await self._ask_announcements(name)
                known = (name, translate.digest(cli.hello.get("account")))
                cli.announced[known] = translate.announcements(rows)
        today = {"type": "date", "date": time.strftime("%Y-%m-%d")}
        return [
            today if attachment["type"] == "date" else attachment
            for attachment in cli.announced[known]
        ]

    async def _ask_announcements(self, name: str) -> bytes:
        """The rows that the CLI writes for a conversation of one word."""
        session = await self._spawn(Kind(name), False, State.BUSY, is_kept=True)
        process = session.process
        try:
            process.begin_turn()
            process.open_gate(translate.transcript([], name))
            process.write(
                translate.initialize_line([], has_tools=False),
                translate.user_line([translate.text_block("-")], str(uuid.uuid4())),
            )
            with contextlib.suppress(ApiError):  # as it should: nobody answers
                await process.read_until(lambda event: event["type"] == "result")
            session.cli.hello = process.hello or session.cli.hello
            return await process.kept_rows()
        finally:
            self.retire(session, "announcements")

    async def _take(self, model: str, agent: bool, bare: bool) -> Session:
        """A process without a conversation: a spare, even one that is still starting,
        or a new one.

        A full model name needs no --model, so any spare will do.  That of an alias is
        known once a CLI has listed its models.
        """
        hello = self.cli.hello
        full_name = translate.listed_model(hello, model) or model
        has_full_name = full_name.startswith(translate.FULL_NAME)
        is_needless = has_full_name and self.cli.models.get(model, True)
        kind = Kind("" if is_needless else model, agent)
        self._kinds.append(kind if hello else Kind("", agent))
        for spare in self.spares:
            if spare.process.is_unusable:
                self.retire(spare, "died")
            is_wanted = spare.kind == kind and spare.bare == bare
            if not is_wanted or spare.state is not State.SPARE:
                continue
            spare.move(State.BUSY)
            try:
                if await spare.process.is_ready():
                    return spare
            except BaseException:
                self.retire(spare, "interrupted")
                raise
            self.retire(spare, "failed")
        return await self._spawn(kind, bare, State.BUSY)

    async def _spawn(
        self, kind: Kind, bare: bool, state: State, *, is_kept: bool = False
    ) -> Session:
        """Start a process; one that `is_kept` writes its conversation down."""
        cli = await self.look_at_cli()
        if state is State.SPARE and self.room.is_full:
            raise ApiError(529, "nobody makes room for a spare")
        if not self.room.has_next:
            self._evict()
        message = f"all {self.config.max_sessions} processes were busy, none got free"
        await self.queue(self.room.enter, message)
        process = Process(self.config.watchdog_secs)
        # One that announces its folder to the model works in one that never changes; an
        # older one would list all files in it.
        cwd = "/" if cli.since(ANNOUNCES) else ""
        try:
            await process.spawn(
                self._arguments(kind, bare, is_kept),
                self._environment_of(kind, bare, is_kept),
                self._agent_cwd if kind.agent else cwd,
            )
        except BaseException as error:
            self.room.started()
            self.room.leave()
            if isinstance(error, OSError):
                message = f"the claude CLI cannot be started: {error.strerror}"
                where = f": {error.filename}" if error.filename else ""
                raise cli_error(message + where) from error
            raise
        process.started.add_done_callback(lambda _: self.room.started())
        session = Session(process, kind, cli, bare, state)
        process.on_fault = lambda reason: self.retire(session, reason)
        process.on_limits = self._record_limits
        self.sessions.add(session)
        self.metrics.add("processes_started_total")
        return session

    def _arguments(self, kind: Kind, bare: bool, is_kept: bool) -> list[str]:
        argv = arguments(self.config, kind)
        if is_kept:
            argv.remove("--no-session-persistence")
        if bare and self.config.setting_sources:
            # Otherwise the bare mode reads no apiKeyHelper (the CLI's help on --bare).
            argv += ["--settings", settings_file(self._environment)]
        return argv

    def _environment_of(self, kind: Kind, bare: bool, is_kept: bool) -> dict[str, str]:
        environment = self._environment.copy()
        if not kind.agent:
            environment.update(MODEL_MODE)
        if bare:
            environment["CLAUDE_CODE_SIMPLE"] = "1"
        if is_kept:
            environment.update(UNREACHABLE)
        return environment

    def refill(self) -> None:
        """Start the missing spares, each of the recently requested kind that has
        fewest."""
        if not self._kinds:
            return
        for spare in self.spares:
            is_bare = self._is_bare(spare.kind.agent)
            if spare.kind not in self._kinds or spare.bare != is_bare:
                self.retire(spare, "unwanted")
        have = [spare.kind for spare in self.spares]
        have += self._preparing.values()
        latest = list(reversed(self._kinds))
        for _ in range(self.config.spares - len(have)):
            kind = min(latest, key=have.count)
            task = asyncio.create_task(self._prepare(kind))
            self._preparing[task] = kind
            task.add_done_callback(self._preparing.pop)
            have.append(kind)

    async def _prepare(self, kind: Kind) -> None:
        with contextlib.suppress(ApiError):  # the next request will report it
            await self.look_at_cli()
            await self._spawn(kind, self._is_bare(kind.agent), State.SPARE)
            self._evict_for_waiter()

    # What becomes of a session

    def _finish(self, turn: Turn) -> None:
        """File the session of a turn, or retire it."""
        session, translator = turn.session, turn.translator
        if turn.origin != "hot":
            session.cli.hello = turn.process.hello or session.cli.hello
        if translator.is_wrong_model:
            session.cli.models.clear()
        self._record_version(turn)
        if turn.on_begin:
            self.refill()
        if session.state is not State.BUSY:
            return
        if not translator.done:
            turn.interrupt()
            process = turn.process
            is_broken = turn.has_failed or process.is_unusable or process.timed_out
            self.retire(session, "failed" if is_broken else "interrupted")
            return
        # Why a later request of the same history is not hot.
        self._record_outcome(session, "continued")
        session.extend(turn.request, translator.message, translator.calls)
        is_quiet = turn.process.end_turn(bool(translator.result), session.calls)
        reason = ""
        if not turn.rests:
            reason = translator.stop_reason
            is_word = reason.isascii() and reason.isidentifier()
            reason = reason if is_word else "other"
        elif session.turns >= self.config.max_turns and not session.calls:
            reason = "max_turns"
        elif turn.spoke_after_result or not is_quiet:
            reason = "unasked"
        if reason:
            self.retire(session, reason)
            return
        # Why a request may miss it while it is on file: one has a session header, the
        # other has not.
        self._record_outcome(session, "pinned")
        self._file(session)

    def _file(self, session: Session) -> None:
        same = [other for other in self.on_file if other.is_like(session)]
        is_ambiguous = session.kind.agent and not session.pin
        last = self._agents.get(session.unthinking_chain, session.own_id)
        if is_ambiguous and last != session.own_id:
            # What its tools have seen does not follow from the conversation, so a
            # request could go on with either.
            for other in [session, *same]:
                self.retire(other, "ambiguous")
            return
        for other in same:
            self.retire(other, "duplicate")
        if is_ambiguous:
            chain = session.unthinking_chain
            cache_put(self._agents, chain, session.own_id, MAX_PAST)
        session.move(State.PARKED if session.calls else State.IDLE)
        idle = self.resting(State.IDLE)
        if len(idle) > self.config.max_idle:
            self.retire(idle[0], "evicted")
        else:
            self._evict_for_waiter()

    def _evict_for_waiter(self) -> None:
        """Make room for a request that found none when it came."""
        if self.room.is_short:
            self._evict()

    def _evict(self) -> None:
        resting = self.resting(*RESTING)
        if resting:
            self.retire(resting[0], "evicted")

    def retire(self, session: Session, reason: str) -> None:
        """End a session's process in the background; its place is free once the process
        is reaped."""
        if session.state is State.RETIRED:
            return
        if reason == "failed" and session.process.ended:
            reason = "died"
        log.debug("process %s ends: %s", session.process.pid, reason)
        session.move(State.RETIRED)
        self._record_outcome(session, reason)
        self.metrics.add("processes_ended_total", reason=reason)
        if reason == "died":
            self.metrics.add("process_restarts_total")
        if session.process.timed_out:
            self.metrics.add("watchdog_fires_total")
        forget = partial(self.sessions.remove, session)
        self.room.leave_after(session.process.stop(), forget)

    def _record_outcome(self, session: Session, reason: str) -> None:
        if not session.turns:
            return
        for key in (session.chain, session.pin):
            if key:
                cache_put(self._outcomes, key, (session.parts, reason), MAX_PAST)

    def _record_limits(self, limits: dict[str, RateLimit]) -> None:
        for name, limit in limits.items():
            self.rate_limits.pop(name, None)
            self.rate_limits[name] = limit

    def _record_version(self, turn: Turn) -> None:
        """A script may start another CLI than before."""
        version = turn.translator.cli_version
        is_newest = turn.session.cli is self.cli
        if is_newest and version and version != self.cli.version:
            self.cli = Cli(self.cli.files, version)

    async def _sweep(self) -> None:
        """Retire the sessions not in use that died or whose time is up."""
        ttl = self.config.session_ttl_secs
        pause = SWEEP_SECS
        if ttl:
            pause = max(0.05, min(ttl / 4, SWEEP_SECS))
        while True:
            await asyncio.sleep(pause)
            if (
                os.getpid() == 1 and not self._cli_lock.locked()
            ):  # `ask_version` has one
                reap_orphans({session.process.pid for session in self.sessions})
            now = time.monotonic()
            for session in [*self.spares, *self.on_file]:
                if session.process.is_unusable:
                    self.retire(session, "failed")
                elif ttl and now - session.since >= ttl:
                    if session.state is State.SPARE:
                        self._kinds.clear()  # the next comes when it is needed
                    self.retire(session, "expired")


# ------------------------------------------------------------ appendix: counting


class Counter:
    """Counts the tokens of requests, each with a process of its own."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        # So many count at a time.
        self._lane = asyncio.Semaphore(CORES)

    async def count(self, request: Request, request_id: str = "") -> int:
        """The tokens of a request, as the API counts what a turn would send, without a
        model call.  By `request_id` it is traced.

        Raises ApiError: as `turn` does, 401 when nobody is logged in, and the API's own
        failures.  The CLI passes off an estimate as a count when the API does not
        count, so its log is watched for the API's answers.
        """
        key = await self._pool.compute(
            request.size, lambda: translate.request_digest(request)
        )
        counts = (await self._pool.look_at_cli()).counts
        if key in counts:
            return counts[key]
        await self._pool.queue(self._lane.acquire, "other counts did not end")
        trace = Trace(self._pool.config.trace_dir, request_id)
        try:
            tokens = await self._count(request, trace)
        except TimeoutError:
            words = f"the claude CLI did not count within {COUNT_SECS:g} seconds"
            raise ApiError(504, words) from None
        finally:
            trace.close()
            self._lane.release()
            self._pool.refill()
        cache_put(counts, key, tokens, MAX_COUNTS)
        return tokens

    async def _count(self, request: Request, trace: Trace) -> int:
        tools = translate.described_tools(request)
        session, lines = await self._pool.open(request, tools, trace, query=False)
        try:
            # The wait for a process is not the CLI's.
            async with asyncio.timeout(COUNT_SECS):
                usage, statuses = await self._ask_usage(session.process, lines)
        except BaseException:
            self._pool.retire(session, "failed")
            raise
        self._pool.retire(session, "counted")
        session.cli.hello = session.process.hello or session.cli.hello
        failed = next((status for status in statuses if status >= 400), None)
        if failed:
            raise ApiError(failed, f"the API did not count: status {failed}")
        if not statuses:
            if not translate.login_source(session.cli.hello):
                raise ApiError(
                    401, f"the claude CLI is not logged in: {translate.LOGIN_CURE}"
                )
            raise cli_error("the API did not answer the claude CLI's count")
        tokens = int(usage.get("totalTokens") or 0)
        return tokens + TOOLS_PROMPT_TOKENS if request.tool_names else tokens

    async def _ask_usage(
        self, process: Process, lines: list[bytes]
    ) -> tuple[Json, list[int]]:
        """What a process says of its context, and the API's statuses for the counts it
        asked."""
        statuses: list[int] = []

        def find(event: CliEvent) -> Json:
            if event["type"] == "api_call":
                statuses.append(event.get("response") or 0)
            return control_result(event, "usage")

        process.write(*lines)
        await process.read_until(lambda event: event["type"] == "result")
        process.write(translate.control_line("usage", "get_context_usage"))
        return await process.read_until(find), statuses


# ------------------------------------------------------------ appendix: metrics

# What /metrics says, after claude_cli_bridge_: type and help.
METRICS = {
    "requests_total": (
        "counter",
        "HTTP requests by route and status; 499: the client left before there was one",
    ),
    "errors_total": (
        "counter",
        "Requests that failed, by error.type; client_left: before the end of the answer",
    ),
    "turns_total": (
        "counter",
        "Turns by conversation (hot, new, rebuilt) and the reason of a rebuild",
    ),
    "first_byte_seconds": (
        "histogram",
        "From a request for a message to the first event of its answer",
    ),
    "turn_seconds": (
        "histogram",
        "From a request for a message to the end of its answer",
    ),
    "queue_seconds": (
        "histogram",
        "Time requests waited in a line: for a process, a count, or others of their session",
    ),
    "tokens_total": (
        "counter",
        "Tokens by kind, as the API counted them in complete and broken answers",
    ),
    "processes": ("gauge", "Processes of the CLI by state"),
    "processes_started_total": ("counter", "Processes of the CLI that were started"),
    "processes_ended_total": (
        "counter",
        "Processes of the CLI that were retired, by reason",
    ),
    "process_restarts_total": (
        "counter",
        "Processes of the CLI that ended by themselves; the next turn starts one",
    ),
    "watchdog_fires_total": ("counter", "Turns that failed as the CLI was silent"),
    "waiting_requests": (
        "gauge",
        "Requests that wait for a process, or for others of their session",
    ),
    "connections": ("gauge", "Open connections of clients"),
    "log_lines_lost_total": (
        "counter",
        "Log lines that were lost because nobody read them",
    ),
    "quota_utilization_ratio": (
        "gauge",
        "How much of a limit of the account is used, by the CLI",
    ),
    "quota_resets_at_seconds": (
        "gauge",
        "When a limit of the account is reset, in epoch seconds",
    ),
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
        self._samples: dict[str, dict[str, float]] = {name: {} for name in METRICS}
        for name, (kind, _) in METRICS.items():
            if kind == "histogram":
                bounds = [*map(str, BUCKETS), "+Inf"]
                self._samples[name] = dict.fromkeys(
                    [f'_bucket{{le="{bound}"}}' for bound in bounds], 0
                )
                self._samples[name].update({"_sum": 0, "_count": 0})
        for name in (
            "processes_started_total",
            "process_restarts_total",
            "watchdog_fires_total",
        ):
            self.add(name, 0)

    def add(self, name: str, amount: float = 1, **labels: object) -> None:
        samples = self._samples[name]
        key = labelled(labels)
        samples[key] = samples.get(key, 0) + amount

    def set(self, name: str, value: float, **labels: object) -> None:
        self._samples[name][labelled(labels)] = value

    def time(self, name: str, seconds: float) -> None:
        samples = self._samples[name]
        for bound in BUCKETS:
            if seconds <= bound:
                samples[f'_bucket{{le="{bound}"}}'] += 1
        samples['_bucket{le="+Inf"}'] += 1
        samples["_sum"] += seconds
        samples["_count"] += 1

    def rows(self, metric: str) -> list[tuple[str, str]]:
        """What each sample counts, by its labels, and its value: for people to read."""
        rows = []
        for labels, value in self._samples[metric].items():
            words = labels.split('"')[1::2]
            name = ", ".join(filter(None, words))
            rows.append((name, f"{value:g}"))
        return rows

    def observe(self, snapshot: Snapshot) -> None:
        """Set the gauges of a pool."""
        for name, limit in snapshot.limits.items():
            if limit.utilization is not None:
                self.set("quota_utilization_ratio", limit.utilization, limit=name)
            if limit.resets_at is not None:
                self.set("quota_resets_at_seconds", limit.resets_at, limit=name)
        states = [state for state, _, _ in snapshot.processes]
        for state in State:
            self.set("processes", states.count(state), state=state.value)
        self.set("waiting_requests", snapshot.waiting)

    def text(self) -> str:
        lines = []
        for name, samples in self._samples.items():
            kind, words = METRICS[name]
            lines.append(f"# HELP claude_cli_bridge_{name} {words}")
            lines.append(f"# TYPE claude_cli_bridge_{name} {kind}")
            lines += [
                f"claude_cli_bridge_{name}{rest} {value}"
                for rest, value in samples.items()
            ]
        return "\n".join([*lines, ""])


def labelled(labels: Mapping[str, object]) -> str:
    text = ",".join(
        f'{name}="{str(value).translate(ESCAPES)}"' for name, value in labels.items()
    )
    return f"{{{text}}}" if text else ""
