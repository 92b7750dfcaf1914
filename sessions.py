"""The processes of the CLI: spawn, speak, rebuild, keep warm, retire.

A process is a cache entry.  Each request brings its whole conversation; a process that already holds all of it but the
new user message is only faster than a fresh one.  So after an answer a session is filed under the fingerprint of the
conversation including that answer, and a request takes the session whose fingerprint is its own history, if there is
one.  A session in use is not on file, so two requests never share one; whatever goes wrong in it retires it alone.

    SPARE ──lines of the conversation──> BUSY ──answer complete──> IDLE ──hot turn──> BUSY
                                         BUSY ──client tools called──> PARKED ──their results──> BUSY
    any of them ──fault, disconnect, TTL, LRU, shutdown──> RETIRED, which ends in a reaped process group

`Pool._move` is the only place that changes a state, and TRANSITIONS is what it allows.
"""

import asyncio
import contextlib
import ctypes
import enum
import errno
import logging
import os
import shutil
import signal
import stat
import sys
import tempfile
import uuid
import weakref
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or not __package__:
    import translate
    from translate import ApiError, Json, Request, Translator, answered, cli_error
else:  # copied into a package
    from . import translate
    from .translate import ApiError, Json, Request, Translator, answered, cli_error

log = logging.getLogger("claude_cli_bridge")

Event = Json | bytes  # of a process: bytes are a line with a delta, not decoded

MAX_LINE = 64 << 20  # bytes; it can hold a whole tool result or screenshot: 1 MB was too small for the official SDK
MAX_UNREAD = 1 << 20  # bytes of events at which a pipe is no longer read: a slow client holds up its own child
STDERR_TAIL = 2048  # bytes of stderr kept to say why a process died
# How a process is ended, step by step: what is done, and the seconds it then gets.  The CLI leaves 0.1 s after its
# stdin closes when it is idle, and ends a running API call on SIGTERM.
ENDING = ((None, 0.5), (signal.SIGTERM, 1.0), (signal.SIGKILL, 5.0))
START_SECS = 5.0  # after which a process that has said nothing no longer holds up others; 0.5 were measured
SETTLE_SECS = 5.0  # that the `result` may come later than the answer it belongs to; 10 to 20 ms were measured
MAX_PAST = 4096  # fingerprints of lost sessions that are remembered, to say why a conversation was rebuilt
MAX_COUNTS = 256  # answers of count_tokens that are remembered: Claude Code's /context asks 15 questions, some again
TOOLS_PROMPT = (
    500  # tokens for the prompt that the API adds for tools: the CLI takes so many off what it counts for them
)
# Only these show that a turn is alive; status lines and keep-alives come from a half-open stream as well.
SIGNS_OF_LIFE = {"stream_event", "assistant", "user", "result", "control_request", "control_response"}
PRCTL: Any = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
# Names of the bridge's environment that change the CLI's behaviour or account: a child gets them only when kept.
SCRUBBED = ("ANTHROPIC_", "CLAUDE_CODE_", "CLAUDECODE", "CLAUDE_CLI_", "OTEL_")


class State(enum.Enum):
    SPARE = "spare"  # started, has got no conversation
    BUSY = "busy"  # answers a request
    IDLE = "idle"  # on file, waits for the next message of its conversation
    PARKED = "parked"  # on file, waits for the results of client tools inside the CLI's tools/call
    RETIRED = "retired"  # is being ended; counts until its process is reaped


TRANSITIONS = {
    State.SPARE: {State.BUSY, State.RETIRED},
    State.BUSY: {State.IDLE, State.PARKED, State.RETIRED},
    State.IDLE: {State.BUSY, State.RETIRED},
    State.PARKED: {State.BUSY, State.RETIRED},
    State.RETIRED: set(),
}


# What /metrics says, after claude_cli_bridge_: type and help.
METRICS = {
    "requests_total": ("counter", "HTTP requests by route and status; 499: the client left before there was one"),
    "errors_total": ("counter", "Requests that failed, by error.type; client_left: before the end of the answer"),
    "turns_total": ("counter", "Turns by conversation (hot, new, rebuilt) and the reason of a rebuild"),
    "first_byte_seconds": ("histogram", "From a request for a message to the first event of its answer"),
    "turn_seconds": ("histogram", "From a request for a message to the end of its answer"),
    "queue_seconds": ("histogram", "That requests waited for a process to be started, or for others of their session"),
    "tokens_total": ("counter", "Tokens by kind, as the API counted them in complete and broken answers"),
    "processes": ("gauge", "Processes of the CLI by state"),
    "processes_started_total": ("counter", "Processes of the CLI that were started"),
    "processes_ended_total": ("counter", "Processes of the CLI that were retired, by reason"),
    "process_restarts_total": ("counter", "Processes of the CLI that ended by themselves; the next turn starts one"),
    "watchdog_fires_total": ("counter", "Turns that failed as the CLI was silent"),
    "waiting_requests": ("gauge", "Requests that wait for a process, or for others of their session"),
    "connections": ("gauge", "Open connections of clients"),
}
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)  # a hot turn to a long answer

ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})  # of a label's value


def labelled(labels: Mapping[str, object]) -> str:
    text = ",".join(f'{name}="{str(value).translate(ESCAPES)}"' for name, value in labels.items())
    return f"{{{text}}}" if text else ""


class Metrics:
    """Counts and times since the start, as Prometheus reads them (text-based exposition format, 0.0.4)."""

    def __init__(self) -> None:
        ends = [*(f'_bucket{{le="{bound}"}}' for bound in BUCKETS), '_bucket{le="+Inf"}', "_sum", "_count"]
        self._samples: dict[str, dict[str, float]] = {  # by name, then by the rest of the name and the labels
            name: dict.fromkeys(ends, 0) if kind == "histogram" else {} for name, (kind, _) in METRICS.items()
        }
        for name in ("processes_started_total", "process_restarts_total", "watchdog_fires_total"):
            self.add(name, 0)

    def add(self, name: str, amount: float = 1, **labels: object) -> None:
        samples, key = self._samples[name], labelled(labels)
        samples[key] = samples.get(key, 0) + amount

    def set(self, name: str, value: float, **labels: object) -> None:
        self._samples[name][labelled(labels)] = value

    def time(self, name: str, seconds: float) -> None:
        samples = self._samples[name]
        for bound in BUCKETS:
            samples[f'_bucket{{le="{bound}"}}'] += seconds <= bound
        samples['_bucket{le="+Inf"}'] += 1
        samples["_sum"] += seconds
        samples["_count"] += 1

    def text(self) -> str:
        lines = []
        for name, samples in self._samples.items():
            kind, words = METRICS[name]
            lines += [f"# HELP claude_cli_bridge_{name} {words}", f"# TYPE claude_cli_bridge_{name} {kind}"]
            lines += [f"claude_cli_bridge_{name}{rest} {value}" for rest, value in samples.items()]
        return "\n".join([*lines, ""])


@dataclass(kw_only=True)
class PoolConfig:
    """Settings of the processes."""

    bin: str = ""  # the CLI (default: claude on PATH, else the one in the claude-agent-sdk wheel)
    model: str = "sonnet"  # the model of the first spare
    session_ttl_secs: float = 600.0  # idle seconds before a process is retired; 0: never
    watchdog_secs: float = 120.0  # seconds of silence inside a turn before it fails with 504
    max_sessions: int = 64  # processes at most, about 200 MB each
    max_idle: int = 8  # processes kept warm after their answer
    spares: int = 1  # processes started ahead of need
    queue_secs: float = 30.0  # seconds that a request waits for room before it gets 529
    max_queue: int = 1000  # requests that wait for room; more get 529 at once
    retries: int = 2  # how often the CLI itself retries a failed API call
    tools: str = ""  # agent mode: `default` or a list of the CLI's built-in tools; empty: model mode
    permission_mode: str = "default"  # of agent mode
    cwd: str = ""  # working directory of agent mode
    keep_env: tuple[str, ...] = ()  # names that survive the scrub of ANTHROPIC_*, CLAUDE_CODE_*, OTEL_*
    setting_sources: str = ""  # `user` if your login is an apiKeyHelper or env block of your settings file


def arguments(config: PoolConfig, model: str, *, agent: bool = False) -> list[str]:
    """The command line of a process: no settings, nothing on disk; in model mode no tools but the client's."""
    mode = ("--tools", config.tools, "--permission-mode", config.permission_mode)
    if not agent:
        mode = ("--tools", "", "--permission-mode", "default")
    return [
        *(config.bin, "-p", "--input-format", "stream-json", "--output-format", "stream-json", "--verbose"),
        *("--include-partial-messages", "--no-session-persistence", "--setting-sources", config.setting_sources),
        *("--strict-mcp-config", "--disable-slash-commands", "--allowedTools", f"{translate.TOOL_PREFIX}*", *mode),
        # The API's own default: without it 2.1.330 asks for less effort than a client that names none expects.
        *("--effort", "high", "--model", model),
    ]


def child_environment(config: PoolConfig, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process: `environ` without the names that would change what it does, and what it needs."""
    inherited = {name: value for name, value in environ.items() if not name.startswith(SCRUBBED)}
    kept = {name: environ[name] for name in config.keep_env if name in environ and not name.startswith("CLAUDE_CLI_")}
    defaults = {
        "CLAUDE_CODE_MAX_RETRIES": str(config.retries),
        "CLAUDE_CODE_DISABLE_ATTACHMENTS": "1",  # no @file of a user text is read
        "CLAUDE_CODE_DISABLE_THINKING": "1",  # thinking is what a request asks for
        "CLAUDE_CODE_NO_MODEL_FALLBACK": "1",  # the model asked for, or an error
        "CLAUDE_CODE_DISABLE_LEGACY_MODEL_REMAP": "1",  # and no newer one in place of an old one
        "CLAUDE_CODE_DISABLE_REFUSAL_RETRY": "1",  # a refusal is an answer: 2.1.330 would ask once more
        "DISABLE_AUTO_COMPACT": "1",  # the conversation is the client's
        "DISABLE_AUTOUPDATER": "1",
        "ENABLE_CLAUDEAI_MCP_SERVERS": "0",
        "ENABLE_TOOL_SEARCH": "false",
    }
    return inherited | defaults | kept


def empty_folder(last: str = "") -> str:
    """The working directory of model mode, the `last` one as long as it is there.  2.1.330 states it to the API, whose
    prompt cache compares bytes: it is the same for all bridges of a user, unless others can or did write to it."""
    if os.path.isdir(last):
        return last
    path = os.path.join(tempfile.gettempdir(), f"claude-cli-bridge-{os.getuid()}")
    with contextlib.suppress(OSError):
        os.mkdir(path, 0o700)
    with contextlib.suppress(OSError):
        found = os.lstat(path)
        if (found.st_uid, found.st_mode) == (os.getuid(), stat.S_IFDIR | 0o700) and not os.listdir(path):
            return path
    return tempfile.mkdtemp(prefix="claude-cli-bridge-private-")


def session_id(token: str) -> str:
    """The id of a session header: a UUID as it is, any other token hashed to one (UUIDv5, OID namespace)."""
    try:
        return str(uuid.UUID(token))
    except ValueError:
        return str(uuid.uuid5(uuid.NAMESPACE_OID, token))


def watch_without_threads() -> None:
    """Let asyncio wait for children by their pidfds, as Python 3.12 does by itself: 3.11 has a thread for each, with a
    stack and an arena, 70 MB of address space.  To be called before a loop runs."""
    with contextlib.suppress(AttributeError, OSError):  # not Linux, or older than 5.3
        os.close(os.pidfd_open(os.getpid()))
        if sys.version_info < (3, 12):
            asyncio.set_child_watcher(asyncio.PidfdChildWatcher())


def die_with_parent() -> None:
    """In a new child: be killed when the bridge dies, even by SIGKILL (prctl(2), PR_SET_PDEATHSIG).  A CLI that only
    sees its stdin close finishes a running turn first, and 2.1.330 calls the API once more for a parked tool call."""
    PRCTL(1, signal.SIGKILL)


def exiting(pid: int) -> bool:
    """Whether the kernel is ending a process.  A killed CLI frees its memory first and closes its pipes 10 ms later: a
    request that comes in between must not be given to it.  proc(5): the state, and PF_EXITING in the flags."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
    except OSError:  # no /proc: the end of its output will tell
        return False
    return fields[0] in b"ZX" or bool(int(fields[6]) & 4)


class Process(asyncio.SubprocessProtocol):
    """One child: its lines in and out, its silence, its end.

    Lines are read whether or not a turn is running: the CLI's control requests are answered at once, a turn's events
    wait for it, and the rest is dropped.
    """

    def __init__(self, watchdog_secs: float) -> None:
        self.loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int] = self.loop.create_future()
        self.started: asyncio.Future[None] = self.loop.create_future()  # it has said something, or never will
        self.loop.call_later(START_SECS, self._start)
        self.listening = False  # a turn is running: events are kept for it
        self.hello: Json = {}  # the CLI's answer to `initialize`: models, account
        self.tools: list[Json] = []  # the client's tools, for the CLI to list
        self.working = False  # the CLI runs a tool of its own: silence is no fault
        self.silent = False  # the watchdog fired
        self._calls: dict[str, Json] = {}  # by id, the tool calls that wait for a result
        self._results: dict[str, Json] = {}  # by id, the results that wait for their call: the CLI may ask one by one
        self.settled: asyncio.Future[bool] | None = None  # set at the `result` of an answer that was complete before it
        self._watchdog_secs = watchdog_secs
        self._alive_at = self.loop.time()  # when the last sign of life came, or is due after an announced retry
        self._events: list[Event] = []
        self._unread = 0  # bytes of what was read since _events was empty
        self._sink: Callable[[list[Event]], bool] | None = None  # takes the events instead
        self._partial: list[bytes] = []  # pieces of a line whose end has not come
        self._partial_size = 0
        self._stderr = b""
        self._eof = False
        self._paused = False
        self._waiter: asyncio.Future[None] | None = None
        self._failure: Exception | None = None
        self.unwatched = False  # nothing will tell of its end

    @classmethod
    async def spawn(cls, argv: list[str], environment: dict[str, str], cwd: str, watchdog_secs: float) -> "Process":
        """Start a child in a process group of its own.  Raises OSError when it cannot be started."""
        process = cls(watchdog_secs)
        try:
            await process.loop.subprocess_exec(
                lambda: process,
                *argv,
                env=environment,
                cwd=cwd,
                start_new_session=True,
                preexec_fn=die_with_parent if PRCTL else None,
            )
        except OSError:  # it cannot be started, or nothing can wait for its end
            process.unwatched = True
            raise
        except RuntimeError as error:  # there is no thread left that could wait for its end
            process.unwatched = True
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error
        return process

    @property
    def ended(self) -> bool:
        return self._eof or self.exited.done() or exiting(self.pid)

    @property
    def gone(self) -> bool:
        return self._failure is not None or self.ended

    def listen(self) -> None:
        """Begin a turn: the watchdog runs, events are kept."""
        self.listening = True
        self._alive_at = self.loop.time()

    def settle(self, seen: bool) -> None:
        """End a turn.  Unless its `result` was `seen`, or came behind the answer, the next turn waits for it."""
        self.listening = False
        seen = seen or any(isinstance(event, dict) and event.get("type") == "result" for event in self._events)
        self._events.clear()
        self._resume()
        self.settled = None if seen or self._failure else self.loop.create_future()

    def write(self, *lines: bytes) -> None:
        stdin = self._transport.get_pipe_transport(0)
        if stdin and not stdin.is_closing():
            stdin.write(b"".join(lines))  # type: ignore[attr-defined]

    def hand_over(self, results: dict[str, Json]) -> None:
        """Give the results of tool calls, by id, to those that wait and those that are yet to come."""
        self._results |= results
        for call in results.keys() & self._calls.keys():
            self._call(self._calls.pop(call), call)

    def _call(self, event: Json, call: str) -> None:
        if call in self._results:
            self.write(translate.control_answer(event, self.tools, self._results.pop(call)))
        else:
            self._calls[call] = event

    async def until(self, translator: Translator, find: Callable[[Json], Any]) -> Any:
        """Read on to what `find` finds in an event that is no delta, and return it.

        Raises ApiError: what `feed` raises, 504 after the watchdog's time without a sign of life, 502 when the process
        is gone.
        """
        found = None
        while not found:
            await self._more()
            for event in self._taken():
                if isinstance(event, dict):
                    translator.feed(event)
                    found = found or find(event)
        return found

    async def relay(self, sink: Callable[[list[Event]], bool]) -> None:
        """Hand the events of each read to `sink`, within that read, until it returns False.  Raises as `until`, and
        what `sink` raises."""
        self._sink = sink
        try:
            self._pour(self._taken())
            while self._sink is not None:
                await self._more()
        finally:
            self._sink = None
        if self._failure:
            raise self._failure

    def _pour(self, events: list[Event]) -> None:
        try:
            if events and self._sink is not None and not self._sink(events):
                self._sink = None
                self._wake()
        except Exception as error:  # noqa: BLE001 - raised again in the task of the turn
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._failure, self._sink = error, None
        self._wake()

    def _taken(self) -> list[Event]:
        events, self._events = self._events, []
        self._resume()
        return events

    async def _more(self) -> None:
        """Wait for events, or for what `relay` waits for."""
        if self._events:
            return
        if self._failure:
            raise self._failure
        if self._eof:
            raise await self._died()
        silent_at = (self.loop.time() if self.working else self._alive_at) + self._watchdog_secs
        if self.loop.time() >= silent_at:
            self.silent = True
            raise ApiError(504, f"the claude CLI was silent for {self._watchdog_secs:g} seconds")
        self._waiter = self.loop.create_future()
        timer = self.loop.call_at(silent_at, self._wake)
        try:
            await self._waiter
        finally:
            timer.cancel()
            self._waiter = None

    async def _died(self) -> ApiError:
        await asyncio.wait({self.exited}, timeout=1)  # its status follows the end of its output
        status = f"exited with status {self.exited.result()}" if self.exited.done() else "closed its output"
        said = self._stderr.decode(errors="replace").strip().rpartition("\n")[2][:300]
        return cli_error(f"the claude CLI {status}" + (f": {said}" if said else ""))

    def _start(self) -> None:
        if not self.started.done():
            self.started.set_result(None)

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    def _resume(self) -> None:
        self._unread = 0
        stdout = self._transport.get_pipe_transport(1)
        if self._paused and stdout and not self._eof:
            stdout.resume_reading()  # type: ignore[attr-defined]
            self._alive_at = self.loop.time()  # the silence was the client's
        self._paused = False

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.SubprocessTransport)
        self._transport = transport
        self.pid = transport.get_pid()
        if self.unwatched:
            transport.close()  # kills it
            with contextlib.suppress(ChildProcessError):  # it had ended by itself
                os.waitpid(self.pid, 0)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd == 2:
            self._stderr = (self._stderr + data)[-STDERR_TAIL:]
            return
        self._start()
        *lines, rest = data.split(b"\n")
        if lines:
            lines[0] = b"".join([*self._partial, lines[0]])
            self._partial, self._partial_size = [], 0
        if rest:
            self._partial.append(rest)
            self._partial_size += len(rest)
        events: list[Event] = []
        failure: ApiError | None = None
        now = self.loop.time()
        try:
            for line in lines:
                if line.startswith(translate.DELTA_START):
                    self._alive_at = now
                    events.append(line)
                else:
                    events += self._read(line)
        except ApiError as error:
            failure = error
        if self._partial_size > MAX_LINE:
            failure = cli_error(f"the claude CLI wrote a line of more than {MAX_LINE >> 20} MiB")
            self._partial, self._partial_size = [], 0
        if self.listening:
            self._keep(events, len(data))
        if failure:
            self._fail(failure)  # after what came before it

    def _keep(self, events: list[Event], size: int) -> None:
        if self._sink is not None:
            self._pour(events)
            return
        self._events += events
        self._unread += size
        if self._unread > MAX_UNREAD and not self._paused:
            self._paused = True
            self._transport.get_pipe_transport(1).pause_reading()  # type: ignore[union-attr]
        self._wake()

    def _read(self, line: bytes) -> list[Json]:
        """The events of a line, after what is to be done at once: control requests are answered."""
        events = translate.decode(line)
        for event in events:
            kind = event.get("type")
            if kind in SIGNS_OF_LIFE:
                self._alive_at = self.loop.time()
            elif event.get("subtype") == "api_retry":
                delay = event.get("retry_delay_ms")
                self._alive_at = self.loop.time() + (delay / 1000 if isinstance(delay, int | float) else 0)
            if kind == "control_request":
                call = translate.tool_call_id(event)
                if call:
                    self._call(event, call)
                else:
                    self.write(translate.control_answer(event, self.tools))
            elif kind == "control_response":
                self.hello = answered(event, "initialize") or self.hello
            elif kind == "result" and not self.listening and self.settled and not self.settled.done():
                self.settled.set_result(not event.get("is_error"))
        return events

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if fd == 1:
            self._eof = True
            self._start()
            if self.settled and not self.settled.done():
                self.settled.set_result(False)
            self._wake()

    def process_exited(self) -> None:
        self._kill(signal.SIGKILL)  # what it left behind in its group
        if not self.exited.done():
            self.exited.set_result(self._transport.get_returncode() or 0)

    def _kill(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: EPERM for a group of zombies
            os.killpg(self.pid, number)

    async def end(self) -> None:
        """End the process and its group, and wait until it is reaped.

        One that waits for a tool result is killed: 2.1.330 calls the API once more when its stdin closes.
        """
        stdin = self._transport.get_pipe_transport(0)
        if stdin and not self._calls:
            stdin.close()
        for number, seconds in ENDING[-1:] if self._calls else ENDING:
            if number:
                self._kill(number)
            await asyncio.wait({self.exited}, timeout=seconds)
            if self.exited.done():
                break
        self._transport.close()


@dataclass(eq=False)
class Session:
    """A process and the conversation in it."""

    id: str
    process: Process
    model: str
    agent: bool  # it has tools of its own
    state: State = State.SPARE
    pinned: bool = False  # the client names it by header
    parts: dict[str, bytes] = field(default_factory=dict)  # digests of model and system
    chain: bytes = b""  # digest of the messages in it, its own answers included
    settings: dict[str, str] = field(default_factory=dict)  # what apply_flag_settings set last
    calls: list[str] = field(default_factory=list)  # ids of the client tools that its last answer called
    idle_since: float = 0.0  # in the loop's time; of a spare: when it was started


@dataclass
class Turn:
    """One request in one session."""

    request: Request
    session: Session
    how: str  # hot, new or rebuilt
    reason: str  # why it was rebuilt; empty otherwise
    messages: list[Json]  # what the process has not seen
    results: dict[str, Json] | None = None  # of tool calls, when they are all that is new
    begun: Callable[[], None] | None = None  # called when the answer has begun

    def __post_init__(self) -> None:
        self.process = self.session.process
        self.translator = Translator(tool["name"] for tool in self.request.tools)

    async def relay(self, send: Callable[[bytes], bool], drain: Callable[[], Awaitable[None]]) -> None:
        """Bring the conversation into the process, and its answer to `send`: the frames of each read, within that read;
        empty unless the request streams.  While `send` returns False, `drain` is awaited and the child held up.

        Raises ApiError when the turn fails; what was sent before stays a correct beginning.
        """
        await self._tell()
        translator, stream = self.translator, self.request.stream
        ready = True

        def take(events: list[Event]) -> bool:
            nonlocal ready
            frames: list[bytes] = []
            try:
                raw: list[bytes] = []
                for event in events:
                    if isinstance(event, bytes):
                        raw.append(event)
                        continue
                    frames.extend(translator.relay(raw))  # each is kept though the next one raises
                    frames.extend(map(translate.frame, translator.feed(event)))
                    raw = []
                frames.extend(translator.relay(raw))
            finally:
                if translator.message:
                    ready = send(b"".join(frames) if stream else b"")
                    if self.begun:
                        self.begun()
                        self.begun = None
            self.process.working = translator.working
            return ready and not translator.done

        while not translator.done:
            if not ready:
                await drain()
            try:
                await self.process.relay(take)
            except ApiError:
                if not translator.done:  # what fails behind a complete answer is the next turn's matter
                    raise
        if not translator.rests:
            self.interrupt()  # the CLI goes on by itself here; nothing more may be billed

    def interrupt(self) -> None:
        self.process.write(translate.control_line("interrupt", "interrupt"))

    async def _tell(self) -> None:
        """Write what is new.  A history line is answered by a `result`, and the next one must wait for it: lines sent
        in a burst are merged and reordered by the CLI."""
        lines = [] if self.how == "hot" else [self._initialize()]
        changed = {
            name: text for name, text in self.request.settings.items() if self.session.settings.get(name) != text
        }
        if changed:
            lines.append(translate.control_line("settings", "apply_flag_settings", settings={"env": changed}))
            self.session.settings |= changed
        if self.results is not None:
            self.process.write(*lines)
            self.process.hand_over(self.results)
            return
        lines = await self._put(lines, self.messages[:-1])
        self.process.write(*lines, translate.user_line(self.messages[-1]["content"]))

    async def count(self) -> int:
        """The tokens of the conversation, without a model turn."""
        lines = await self._put([self._initialize()], self.messages)
        self.process.write(*lines, translate.control_line("usage", "get_context_usage"))
        tokens = await self.process.until(self.translator, lambda event: answered(event, "usage").get("totalTokens"))
        return int(tokens) + (TOOLS_PROMPT if self.request.tools else 0)

    def _initialize(self) -> bytes:
        self.process.tools = self.request.tools
        return translate.initialize_line(self.request.system, self.request.tools, agent=self.session.agent)

    async def _put(self, lines: list[bytes], messages: list[Json]) -> list[bytes]:
        """Write messages of the past, after `lines`; returns the lines that are still to be written."""
        for number, message in enumerate(messages):
            if message["role"] == "user":
                self.process.write(*lines, translate.user_line(message["content"], query=False))
                lines = []
                await self.process.until(self.translator, lambda event: event.get("type") == "result")
                continue
            if not self.process.hello:
                self.process.write(*lines)
                lines = []
                await self.process.until(self.translator, lambda event: answered(event, "initialize"))
            model = translate.resolved_model(self.process.hello, self.request.model)
            lines.append(translate.assistant_line(message["content"], number, model))
        return lines


class Pool:
    """All sessions, at most `max_sessions` processes at any time."""

    def __init__(self, config: PoolConfig, environ: Mapping[str, str] = os.environ) -> None:
        self.config = config
        self.metrics = Metrics()
        self.sessions: set[Session] = set()  # every process that is not reaped
        self.idle: OrderedDict[str, Session] = OrderedDict()  # by id, the least recently used first
        self.spares: list[Session] = []  # the oldest first
        # Model, mode and settings of the last new conversations: what spares are for.
        self._asked: deque[tuple[str, bool, dict[str, str]]] = deque(maxlen=2 * config.spares)
        self._preparing: dict[asyncio.Task[None], tuple[str, bool]] = {}  # spares that are being started
        self._starting = asyncio.Semaphore(2 * (os.cpu_count() or 1))  # more at once start later, each of them
        self._slots = asyncio.Semaphore(config.max_sessions)
        self._environment = child_environment(config, environ)
        self._agent_cwd = os.path.abspath(config.cwd)
        self._cwd = ""  # of model mode, once it is needed
        self._queued = 0  # requests that wait for something
        self._waiting = 0  # those of them that wait for a slot
        self._ending: set[asyncio.Task[None]] = set()
        self._asking = asyncio.Lock()  # one process at a time is started for `hello`
        self._hello: Json = {}
        self._counting = asyncio.Lock()  # one process at a time counts
        self._counts: OrderedDict[bytes, int] = OrderedDict()  # answers of `count`
        # By id, while a request of that session header runs or waits: they run one after another.
        self._pins: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        # Where a lost conversation was last seen: by fingerprint and by id, its parts and why it cannot go on.
        self._past: OrderedDict[bytes | str, tuple[dict[str, bytes], str]] = OrderedDict()

    async def __aenter__(self) -> "Pool":
        self._sweeper = asyncio.create_task(self._sweep())
        self._asked.append((self.config.model, False, translate.turn_settings({})))
        self._refill()
        self._asked.clear()  # from here on it is what clients ask for
        return self

    def measure(self) -> str:
        """All metrics, as text."""
        for state in State:
            self.metrics.set("processes", sum(session.state is state for session in self.sessions), state=state.value)
        self.metrics.set("waiting_requests", self._queued)
        return self.metrics.text()

    async def __aexit__(self, *_: object) -> None:
        self._asked.clear()
        for task in (self._sweeper, *self._preparing):
            task.cancel()
        await asyncio.wait({self._sweeper, *self._preparing})
        for session in list(self.sessions):
            self.retire(session, "shutdown")
        while self._ending:
            await asyncio.wait(self._ending)
        if "-private-" in self._cwd:
            shutil.rmtree(self._cwd, ignore_errors=True)

    @contextlib.asynccontextmanager
    async def turn(self, request: Request, token: str | None) -> AsyncIterator[Turn]:
        """A session for the request: a warm one, or room for a fresh process.  `token` is the session header.

        Raises ApiError: 529 when there is no room in time, 502 when the CLI cannot be started.
        On exit the session is filed if the answer is complete, and retired otherwise.
        """
        async with self._pin(token) as pinned_id:
            turn = await self._find(request, pinned_id) or await self._fresh(request, pinned_id)
            try:
                turn.process.listen()
                yield turn
            finally:
                self._finish(turn)

    async def hello(self) -> Json:
        """What the CLI says of itself, without a model call: `models`, `account`.  The last answer of any process is
        good; with none yet one process is started for it.  Raises ApiError when the CLI does not work."""
        async with self._asking:
            if self._hello:
                return self._hello
            session = await self._spawn(self.config.model, False)
            try:
                session.process.listen()
                session.process.write(translate.initialize_line([], []))
                await session.process.until(Translator(), lambda event: answered(event, "initialize"))
                self._hello = session.process.hello
                return self._hello
            finally:
                self.retire(session, "probe")

    async def count(self, request: Request) -> int:
        """The tokens of a request's conversation.  One process at a time is started for it, and equal questions are
        answered from memory.  Raises ApiError as `turn` does."""
        key = translate.extend(b"".join(request.parts.values()), request.messages)
        async with self._counting:
            if key not in self._counts:
                session = await self._take(request)
                try:
                    session.process.listen()
                    self._counts[key] = await Turn(request, session, "new", "", request.messages).count()
                finally:
                    self.retire(session, "counted")
                    self._refill()
                while len(self._counts) > MAX_COUNTS:
                    self._counts.popitem(last=False)
            return self._counts[key]

    # finding a session

    @contextlib.asynccontextmanager
    async def _pin(self, token: str | None) -> AsyncIterator[str]:
        if not token:
            yield ""
            return
        name = session_id(token)
        pin = self._pins.setdefault(name, asyncio.Lock())
        await self._queue(pin.acquire, "the session's other requests did not end")
        try:
            yield name
        finally:
            pin.release()

    async def _queue(self, room: Callable[[], Awaitable[object]], what: str) -> None:
        """Wait for `room` in a line of at most `max_queue` requests, for at most `queue_secs`.  Raises ApiError 529."""
        words = f"{what} within {self.config.queue_secs:g} seconds"
        if self._queued >= self.config.max_queue:
            words = f"{self._queued} requests wait for room already"
        self._queued += 1
        began = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self.config.queue_secs if self._queued <= self.config.max_queue else 0):
                await room()
        except TimeoutError:
            after = max(1, round(self.config.queue_secs))
            raise ApiError(529, f"{words}; try again later", retry_after=after) from None
        finally:
            self._queued -= 1
            if asyncio.current_task() not in self._preparing:  # nobody waits for a spare
                self.metrics.time("queue_seconds", asyncio.get_running_loop().time() - began)

    async def _find(self, request: Request, pinned_id: str) -> Turn | None:
        """The warm session that holds the request's history, taken off the file."""
        history = request.messages[:-1]
        chain = translate.extend(b"", history)
        session, new = None, request.messages[-1:]
        if pinned_id:
            session = self.idle.get(pinned_id)
            if session and not history and session.parts.items() >= request.sent_parts.items():
                pass  # only what is new was sent
            elif session and (session.chain, session.parts) != (chain, request.parts):
                self.retire(session, "changed")
                session = None
        elif history:
            fits = (s for s in self.idle.values() if not s.pinned and (s.chain, s.parts) == (chain, request.parts))
            session = next(fits, None)
        if not session:
            return None
        results = translate.tool_results(new[0]["content"], session.calls) if session.state is State.PARKED else None
        if session.state is State.PARKED and results is None:
            self.retire(session, "tool-results")
            return None
        self._move(session, State.BUSY)
        try:
            alive = session.process.settled is None or await asyncio.wait_for(session.process.settled, SETTLE_SECS)
        except TimeoutError:
            alive = False
        except BaseException:
            self.retire(session, "interrupted")
            raise
        if not alive or session.process.gone:
            self.retire(session, "died" if session.process.ended else "failed")
            return None
        self._remember(session, "busy")
        session.pinned = bool(pinned_id)
        return Turn(request, session, "hot", "", new, results)

    async def _fresh(self, request: Request, pinned_id: str) -> Turn:
        how, reason = self._why(request, pinned_id)
        session = await self._take(request)
        session.id, session.pinned, session.parts = pinned_id or session.id, bool(pinned_id), request.parts
        session.process.hello = session.process.hello or self._hello  # every process knows the same models
        self._move(session, State.BUSY)
        return Turn(request, session, how, reason, request.messages, begun=self._refill)

    def _why(self, request: Request, pinned_id: str) -> tuple[str, str]:
        """hot's alternative: `new`, or `rebuilt` and the reason that its user can act on."""
        history = request.messages[:-1]
        past = self._past.get(translate.extend(b"", history)) if history else None
        past = past or self._past.get(pinned_id)
        if not past:
            return ("rebuilt", "unknown-history") if history else ("new", "")
        parts, reason = past
        changed = [name for name, value in request.parts.items() if parts.get(name) != value]
        if reason == "changed" and not changed:
            reason = "unknown-history"
        return "rebuilt", f"{changed[0]}-changed" if changed else reason

    async def _take(self, request: Request) -> Session:
        """A process without a conversation: a spare, even one that is still starting, or else a fresh one."""
        agent = bool(self.config.tools and not request.tools)  # a client that brings tools runs them itself
        self._asked.append((request.model, agent, request.settings))
        for spare in list(self.spares):
            if spare.process.gone:
                self.retire(spare, "died")
            elif (spare.model, spare.agent) == (request.model, agent):
                self.spares.remove(spare)
                return spare
        return await self._spawn(request.model, agent)

    async def _spawn(self, model: str, agent: bool) -> Session:
        if self._slots.locked():
            self._evict([*self.spares, *self.idle.values()])
        await self._queue(self._room, f"all {self.config.max_sessions} processes were busy, none got free")
        try:
            argv = arguments(self.config, model, agent=agent)
            self._cwd = empty_folder(self._cwd)
            cwd = self._agent_cwd if agent else self._cwd
            process = await Process.spawn(argv, self._environment, cwd, self.config.watchdog_secs)
        except BaseException as error:
            self._starting.release()
            self._slots.release()
            if isinstance(error, OSError):
                raise cli_error(f"the claude CLI cannot be started: {error.strerror}") from error
            raise
        process.started.add_done_callback(lambda _: self._starting.release())
        session = Session(str(uuid.uuid4()), process, model, agent)
        self.sessions.add(session)
        self.metrics.add("processes_started_total")
        return session

    async def _room(self) -> None:
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
        try:
            await self._starting.acquire()
        except BaseException:
            self._slots.release()
            raise

    # spares

    def _refill(self) -> None:
        """Start the spares that are missing: of what was asked for lately, that which has the fewest."""
        if not self._asked:
            return
        kinds = {(model, agent): settings for model, agent, settings in self._asked}  # the latest settings of each
        have = [(spare.model, spare.agent) for spare in self.spares]
        for spare, kind in zip(list(self.spares), have, strict=True):
            if kind not in kinds:
                self.retire(spare, "unwanted")
        have = [*filter(kinds.__contains__, have), *self._preparing.values()]
        latest = [(model, agent) for model, agent, _ in reversed(self._asked)]
        for _ in range(self.config.spares - len(have)):
            if latest:
                kind = min(latest, key=have.count)
                task = asyncio.create_task(self._prepare(*kind, kinds[kind]))
                self._preparing[task] = kind
                task.add_done_callback(self._preparing.pop)
                have.append(kind)

    async def _prepare(self, model: str, agent: bool, settings: dict[str, str]) -> None:
        if self._slots.locked():
            return  # nobody makes room for a spare
        try:
            session = await self._spawn(model, agent)
        except ApiError:
            return  # the next request will say it
        # A process that has answered one of these starts its turn 20 ms sooner, also when the next one differs.
        session.process.write(translate.control_line("settings", "apply_flag_settings", settings={"env": settings}))
        session.settings = dict(settings)
        session.idle_since = asyncio.get_running_loop().time()
        self.spares.append(session)
        if self._waiting > len(self._ending):  # who came while it was being started found nothing to evict
            self._evict(self.spares)

    # what becomes of a session

    def _move(self, session: Session, state: State) -> None:
        """Change a session's state.  IDLE and PARKED sessions are on file."""
        assert state in TRANSITIONS[session.state], f"{session.state} -> {state}"
        session.state = state
        if state in (State.IDLE, State.PARKED):
            self.idle[session.id] = session
        elif self.idle.get(session.id) is session:
            del self.idle[session.id]
        elif session in self.spares:
            self.spares.remove(session)

    def _finish(self, turn: Turn) -> None:
        session, translator = turn.session, turn.translator
        self._hello = turn.process.hello or self._hello
        if turn.begun:
            self._refill()
        if session.state is not State.BUSY:
            return
        if not translator.done:
            turn.interrupt()
            failed = turn.process.gone or turn.process.silent
            self.retire(session, "died" if turn.process.ended else "failed" if failed else "interrupted")
            return
        self._remember(session, "continued")
        start = session.chain if turn.how == "hot" else b""
        session.chain = translate.extend(start, [*turn.messages, translator.message])
        if not translator.rests:
            reason = translator.stop_reason
            self.retire(session, reason if reason.isascii() and reason.isidentifier() else "other")
            return
        content = translator.message["content"]
        session.calls = [block["id"] for block in content if block["type"] == "tool_use"]
        turn.process.settle(bool(translator.result or session.calls))
        if session.id in self.idle:
            self.retire(self.idle[session.id], "changed")
        session.idle_since = asyncio.get_running_loop().time()
        self._move(session, State.PARKED if session.calls else State.IDLE)
        self._remember(session, "pinned")  # the only reason not to find it while it is on file
        crowd = len(self.idle) > self.config.max_idle and sum(s.state is State.IDLE for s in self.idle.values())
        if self._waiting > len(self._ending) or crowd > self.config.max_idle:
            self._evict([*self.idle.values()])

    def _evict(self, sessions: list[Session]) -> None:
        """Retire the first of the sessions that is not PARKED, or else the first."""
        for session in sorted(sessions, key=lambda session: session.state is State.PARKED)[:1]:
            self.retire(session, "evicted")

    def retire(self, session: Session, reason: str) -> None:
        """End a session's process in the background; its slot is free once the process is reaped."""
        if session.state is State.RETIRED:
            return
        self._move(session, State.RETIRED)
        self._remember(session, reason)
        self.metrics.add("processes_ended_total", reason=reason)
        self.metrics.add("process_restarts_total", reason == "died")
        self.metrics.add("watchdog_fires_total", session.process.silent)
        task = asyncio.create_task(self._end(session))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _end(self, session: Session) -> None:
        await session.process.end()
        self.sessions.remove(session)
        self._slots.release()

    def _remember(self, session: Session, reason: str) -> None:
        for key in (session.chain, session.id if session.pinned else b""):
            if key:
                self._past[key] = (session.parts, reason)
                self._past.move_to_end(key)
        while len(self._past) > MAX_PAST:
            self._past.popitem(last=False)

    async def _sweep(self) -> None:
        """Retire the idle sessions that died or whose time is up."""
        ttl = self.config.session_ttl_secs
        while True:
            await asyncio.sleep(max(0.05, min(ttl / 4, 5)) if ttl else 5)
            now = asyncio.get_running_loop().time()
            for session in [*self.spares, *self.idle.values()]:
                if session.process.gone:
                    self.retire(session, "died")
                elif ttl and now - session.idle_since >= ttl:
                    if session.state is State.SPARE:
                        self._asked.clear()  # the next comes when it is needed
                    self.retire(session, "expired")
