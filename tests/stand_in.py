"""A stand-in for the claude CLI, for what the real one cannot be made to do, and for a first try
without an account.

It speaks stream-json as the recordings in tests/fixtures do, keeps the conversation it is given,
and answers "echo: <last user text>; N messages".  It takes any flags; `--model` and `--version`
matter.

Words in the last text of the user, alone or together:

    SLOW n, FLOOD n       n small deltas, one every 20 ms or as fast as they are read
    PAUSE, PAUSE-START    wait in mid answer, or before it, for the file $STANDIN_GATE; signs of life come meanwhile
    LATE, NORESULT        the `result` waits for that file, or never comes
    TWORESULTS            a result of something else before the answer, and the turn's own twice
    HANG, HANG-START      no more than status lines in mid answer, or no event at all
    DIE n, DIE-START      exit with status n in mid answer, or before any event, with a line on stderr
    HALF                  exit in the middle of a line
    NOISE, SPLIT          lines that are no events; writes that end inside lines and UTF-8 sequences
    TORN-DELTA, TORN-EVENT   a line that is cut off in one write with the end of the answer
    BIGLINE n, STDERR n   a line of n bytes and a text of n bytes; n bytes on stderr in mid answer
    NOSTDIN               nothing more is read from stdin after the answer, its end included
    ORPHAN                leaves a process behind, whose id ends the answer
    PAUSE-PAST, HANG-PAST, DIE-PAST   in a message of the past: when it is read
    RETRY ms              the API is asked again after that announced delay
    RATELIMIT epoch       the account's limit is used up until then
    REPLAY version/name   the last turn of that recording, ten times as fast
    TOOL n                n calls of the first of the client's tools, if it has any; their last result is answered then
    STOP-REASON "text"    the answer ends with that stop_reason
    DIGEST                a digest of all texts of the conversation ends the answer
    BEHIND                the end of the answer, its result and what $STANDIN_UNASKED says come in one write

Models: exit-at-start, hang-at-start (answers nothing), slow-start (not before $STANDIN_GATE),
ignore-sigterm (and the end of stdin), not-logged-in; $STANDIN_SONNET is the one that sonnet is.
The model POINT.FAULT... does FAULT whenever it gets to POINT (see `Standin.fault`). The word PROBE calls the client's tool `probe` before the
answer, which then echoes the result. With $STANDIN_UNASKED=kind it says on SIGUSR1, whatever it
does, what nobody asked for (a kind of UNASKED). With $STANDIN_LOG=dir every line of stdin goes to
dir/<pid>.ndjson, what it reads at its gate to dir/<pid>.rows, and argv, environment and working
directory to dir/<pid>.json; `Log` reads them.  dir/<pid>.at.<model> appears when a process gets to
its POINT.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import select
import signal
import sys
import time
import zlib

# It is started thousands of times, and `typing` takes a fifth of the time of a start.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Json = dict[str, Any]
FIXTURES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fixtures")
NOISE = (
    b"Warning: not an event",
    b"",
    b"[1, 2]",
    b"null",
    b'{"type": "stream_event", "ev',
    b"\xff\xfe",
    b"{}{",
    b"7 {}",
)
STRANGE: tuple[Json, ...] = (
    {"type": "brand_new"},
    {"no": "type"},
    {"type": "stream_event", "event": {"type": "ping"}, "parent_tool_use_id": None},
    {
        "type": "stream_event",
        "event": {"type": "message_start", "message": {"id": "sub"}},
        "parent_tool_use_id": "toolu",
    },
    {"type": "assistant", "message": None, "parent_tool_use_id": None},
)
TORN = b'{"type":"stream_event","event":{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","te'
CUT_OFF = {"TORN-DELTA": TORN, "TORN-EVENT": TORN[:45]}
GARBAGE = {
    "json": (b"Warning: not an event", b'{"type": "stream_event", "ev', b"{}{", b""),
    "utf8": (b"\xff\xfe\xc3", b'{"type":"brand_new","data":"\xc3"}'),
    "nonobject": (b"[1, 2]", b"null", b"7", b'"text"'),
    "long": (b'{"type":"brand_new","data":"%b"}' % (b"x" * (1 << 19)),),
    "disorder": tuple(
        b'{"type":"stream_event","event":{"type":"content_block_%b"index":7%b},"parent_tool_use_id":null}'
        % parts
        for parts in (
            (b'delta",', b',"delta":{"type":"text_delta","text":"stray"}'),
            (b'stop",', b""),
        )
    ),
}
# What a process can say that nobody asked for: part of an answer, one with its result, a call of a
# tool with the answer that calls it or alone, a message of its own, and the end of a turn.
UNASKED = ("delta", "answer", "calling", "call", "assistant", "user", "result")
USAGE = {
    "input_tokens": 10,
    "cache_creation_input_tokens": 3,
    "cache_read_input_tokens": 5,
    "output_tokens": 1,
}
SPOKEN = {"output_tokens": 1}
# A process that was started without --model, for a conversation whose model it does not know.
DEFAULT_MODEL = "claude-opus-5-5"
MODELS = [
    {
        "value": name,
        "resolvedModel": f"claude-{name}-5-5",
        "displayName": name.title(),
        "description": name.title(),
    }
    for name in ("opus", "sonnet", "haiku")
]


class Interrupted(Exception):
    """The bridge ended the running turn."""


class Output:
    """stdout, unbuffered: a signal's handler may write while something is being written."""

    def write(self, data: bytes) -> None:
        while data:
            data = data[os.write(1, data) :]

    def flush(self) -> None:
        pass


class Standin:
    def __init__(self, model: str) -> None:
        self.model = model
        self.out: Any = Output()
        self.log: int | None = None  # a file descriptor
        self.numbers = itertools.count(1)
        self.messages: list[Json] = []  # the conversation
        self.waiting: list[Json] = []  # user and assistant lines that were not taken up yet
        self.partial = b""  # of a line of stdin
        self.reading = True
        self.turning = False  # an interrupt ends something
        self.mode = ""  # NOISE, SPLIT or of CUT_OFF
        self.said: list[str] = []  # deltas of the running answer
        self.results: list[Json] = []  # answers to tools/call
        self.point, self.kind = [*model.split("."), ""][:2]
        self.served = False  # the client has tools
        self.answers: dict[str, Json] = {}  # to control requests, by id
        self.ids: list[str] = []  # of the assistant messages of the past
        self.signals: list[int] = []  # a pipe that gets a byte for each signal

    def speak_on_signal(self) -> None:
        """Speak on SIGUSR1.  One that came just before a wait would not end it, but for the pipe."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing)
        signal.signal(signal.SIGUSR1, lambda *_: self.speak())
        self.signals.append(reading)

    # stdin

    def forget(self, signals: list[int]) -> None:
        """The signals have been acted on."""
        for number in signals:
            os.read(number, 100)

    def pump(self, seconds: float | None = 0) -> None:
        """Take in what comes on stdin within this time, at most one read; answer control requests
        at once."""
        if not self.reading:
            seconds = 60 if seconds is None else seconds
            self.forget(select.select(self.signals, [], [], seconds)[0])
            return
        ready, _, _ = select.select([0, *self.signals], [], [], seconds)
        if 0 not in ready:
            self.forget(ready)
            return
        data = os.read(0, 1 << 16)
        self.reading = bool(data)
        *lines, self.partial = (self.partial + data).split(b"\n")
        if self.log is not None and lines:
            os.write(self.log, b"\n".join([*lines, b""]))
        for line in lines:
            event = json.loads(line)
            if event["type"] == "control_request":
                self.control(event["request_id"], event["request"])
            elif event["type"] == "control_response":
                response = event["response"]
                if str(response["request_id"]).startswith("standin-"):
                    self.answers[response["request_id"]] = response
                else:
                    self.results.append(response["response"]["mcp_response"]["result"])
            elif event["type"] in ("user", "assistant"):
                self.waiting.append(event)

    def control(self, request_id: str, request: Json) -> None:
        subtype = request["subtype"]
        response: Json = {"subtype": "success", "request_id": request_id}
        if subtype == "initialize":
            self.served = "sdkMcpServers" in request
            account = {
                "tokenSource": "none" if self.model == "not-logged-in" else "stand-in",
                "apiProvider": "firstParty",
            }
            response["response"] = {
                "commands": [],
                "models": MODELS,
                "account": account,
            }
        elif subtype == "get_context_usage":
            log = "[log_5ad1n1] post http://127.0.0.1/v1/messages/count_tokens?beta=true succeeded with status 200 in 1ms"
            self.put(log.encode())
            response["response"] = {"totalTokens": 10 * len(self.messages)}
        elif subtype not in ("interrupt", "apply_flag_settings"):
            response |= {"subtype": "error", "error": f"the stand-in knows no {subtype}"}
        if subtype == "initialize":
            self.fault("initialize")
        elif subtype == "apply_flag_settings" and self.messages[:-1]:
            self.fault("settings")
        if self.model != "hang-at-start":
            self.emit({"type": "control_response", "response": response})
        if subtype == "initialize":
            self.fault("initialized")
        if subtype == "interrupt" and self.turning:
            raise Interrupted

    def gate(self) -> None:
        """Wait for the gate's file, with a sign of life that is no part of an answer."""
        while not os.path.exists(os.environ["STANDIN_GATE"]):
            self.emit(
                {"type": "user", "message": {"role": "user", "content": []}, "isSynthetic": True}
            )
            self.pump(0.02)

    def hang(self) -> None:
        while True:
            self.emit({"type": "system", "subtype": "status", "status": "requesting"})
            self.pump(0.1)

    def mark(self, what: str) -> None:
        """Leave a file in $STANDIN_LOG that says what this process has come to."""
        if folder := os.environ.get("STANDIN_LOG"):
            open(os.path.join(folder, f"{os.getpid()}.at.{what}"), "w").close()

    def fault(self, point: str) -> None:
        """At the point that the model names: exit, kill, hang (reads on), deaf (does not), closed
        (stdout), endless (a line), wait (for what the bridge does), or lines of GARBAGE."""
        if point != self.point:
            return
        self.mark(self.model)
        if self.kind == "exit":
            sys.exit("stand-in: told to exit")
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "closed":
            os.close(1)
        if self.kind == "endless":
            self.out.write(b"x" * (3 << 20))
            self.out.flush()
        while self.kind in ("deaf", "closed"):
            signal.pause()
        while self.kind == "hang":
            with contextlib.suppress(Interrupted):
                self.pump(None)
        while self.kind in ("endless", "wait") and self.reading and not self.results:
            self.pump(None)
        if not self.reading:
            self.mark("eof")
        for line in GARBAGE.get(self.kind, ()):
            self.put(line)

    # stdout

    def emit(self, event: Json) -> None:
        if not str(event.get("type")).startswith("control_"):
            event |= {
                "session_id": f"standin-{os.getpid()}",
                "uuid": f"00000000-0000-4000-8000-{next(self.numbers):012x}",
            }
        self.put(json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode())

    def put(self, line: bytes) -> None:
        if b'"message_stop"' in line and self.mode in CUT_OFF:
            line += b"\n" + CUT_OFF[self.mode]
        line += b"\n"
        # SPLIT: pieces that end inside UTF-8 sequences, and before the line's end.
        for piece in (
            re.split(rb"(?<=[\xc0-\xff])|(?=\n)|(?<=,)", line) if self.mode == "SPLIT" else [line]
        ):
            self.out.write(piece)
            self.out.flush()
            if self.mode == "SPLIT":
                time.sleep(0.0005)  # so that they are read one by one

    def stream(self, kind: str, **fields: Any) -> None:
        self.emit(
            {"type": "stream_event", "event": {"type": kind, **fields}, "parent_tool_use_id": None}
        )

    def speak(self) -> None:
        """Say what nobody asked for, in one write, and leave a mark of that in $STANDIN_LOG."""
        kind, out = os.environ["STANDIN_UNASKED"], self.out
        self.out = self.out if isinstance(out, io.BytesIO) else io.BytesIO()
        message = {
            "id": f"msg_unasked_{os.getpid()}",
            "type": "message",
            "role": "assistant",
            "model": self.model,
        }
        message |= {"content": [], "stop_reason": None, "stop_sequence": None, "usage": USAGE}
        block: Json = {"type": "text", "text": ""}
        delta = {"type": "text_delta", "text": "said unasked"}
        call = {
            "type": "tool_use",
            "id": f"toolu_unasked_{os.getpid()}",
            "name": "probe",
            "input": {},
        }
        calls = kind == "calling"
        if kind in ("answer", "calling"):
            self.stream("message_start", message=message)
            self.stream("content_block_start", index=0, content_block=call if calls else block)
        if kind in ("delta", "answer"):
            self.stream("content_block_delta", index=0, delta=delta)
        if kind in ("answer", "calling"):
            self.stream("content_block_stop", index=0)
            ends = {"stop_reason": "tool_use" if calls else "end_turn", "stop_sequence": None}
            self.stream("message_delta", delta=ends, usage=SPOKEN)
            self.stream("message_stop")
        if kind in ("answer", "assistant"):
            said = {
                **message,
                "content": [{"type": "text", "text": "said unasked"}],
                "stop_reason": "end_turn",
            }
            self.emit({"type": "assistant", "message": said, "parent_tool_use_id": None})
        if kind == "user":
            said = {"role": "user", "content": [{"type": "text", "text": "said unasked"}]}
            self.emit({"type": "user", "message": said, "parent_tool_use_id": None})
        if kind in ("calling", "call"):
            params = {
                "name": "probe",
                "arguments": {},
                "_meta": {"claudecode/toolUseId": call["id"]},
            }
            asked: Json = {"subtype": "mcp_message", "server_name": "client"}
            asked["message"] = {"jsonrpc": "2.0", "id": 9, "method": "tools/call", "params": params}
            self.emit({"type": "control_request", "request_id": "unasked", "request": asked})
        if kind in ("answer", "result"):
            self.result(result="said unasked", stop_reason="end_turn")
        if self.out is not out:
            self.out, said = out, self.out.getvalue()
            self.out.write(said)
            self.out.flush()
        self.mark("unasked")

    def result(self, **fields: Any) -> None:
        # "type" is not the first key, as with 2.1.330.
        usual = {
            "is_error": False,
            "num_turns": 1,
            "subtype": "success",
            "stop_reason": None,
            "usage": USAGE,
        }
        self.emit({**usual, "permission_denials": [], **fields, "type": "result"})

    # turns

    def resume(self, path: str) -> None:
        """Take in the conversation of a file; it may be a pipe, at which this waits."""
        self.fault("gate")
        text = self.read_gate(path, self.kind if self.point == "gate" else "").decode()
        if folder := os.environ.get("STANDIN_LOG"):
            with open(os.path.join(folder, f"{os.getpid()}.rows"), "w", encoding="utf-8") as copy:
                copy.write(text)
        rows = [json.loads(row) for row in text.split("\n")[:-1]]
        if not rows:
            sys.exit("No conversation found with session ID: stand-in")
        parent, model = None, ""
        for row in rows:
            if row["parentUuid"] != parent or not row["timestamp"]:
                sys.exit("stand-in: a row of the conversation does not follow the one before it")
            parent = row["uuid"]
            if row["type"] in ("user", "assistant") and not row.get("isVirtual"):
                self.messages.append(row["message"])
            if row["type"] == "assistant":
                self.ids.append(row["message"]["id"])
                model = row["message"]["model"]
        if self.ids and len(set(self.ids)) != len(self.ids):
            sys.exit("stand-in: two assistant messages have one id")
        if not self.model:
            takes = (
                []
                if "STANDIN_DEAF_TO_MODELS" in os.environ
                else [entry["resolvedModel"] for entry in MODELS]
            )
            self.model = model if model in takes else DEFAULT_MODEL
        # The newest message asks, once a line starts the turn.
        past = str(self.messages[:-1])
        if "DIE-PAST" in past:
            sys.exit("stand-in: told to die while the past is put in")
        if "HANG-PAST" in past:
            self.hang()
        if "PAUSE-PAST" in past:
            self.gate()
        if self.messages[:-1]:
            self.fault("past")

    def read_gate(self, path: str, kind: str) -> bytes:
        """What is in the file: late, after $STANDIN_GATE-late is there; reopened, after it was
        opened and closed; twice, with nothing in it the second time; half of it, and then half-exit
        or half-deaf."""
        while kind == "late" and not os.path.exists(os.environ["STANDIN_GATE"] + "-late"):
            time.sleep(0.01)
        if kind == "reopened":
            open(path, "rb").close()
        with open(path, "rb") as file:
            if kind.startswith("half"):
                file.read(2 << 20)
                if kind == "half-exit":
                    sys.exit("stand-in: told to exit")
                signal.pause()
            while self.signals and file not in (
                ready := select.select([file, *self.signals], [], [])[0]
            ):
                self.forget(ready)
            rows = file.read()
        if kind == "twice":
            with open(path, "rb") as file:
                rows += file.read()
        return rows

    def run(self, conversation: str | None) -> None:
        while self.model == "slow-start" and not os.path.exists(os.environ["STANDIN_GATE"]):
            time.sleep(0.01)
        if self.model == "exit-at-start":
            sys.exit("stand-in: told to exit at the start")
        if conversation:
            self.resume(conversation)
        while self.reading or self.waiting:
            if not self.waiting:
                self.pump(None)
            elif self.model == "hang-at-start":
                self.waiting.clear()
            else:
                self.take(self.waiting.pop(0))

    def take(self, line: Json) -> None:
        message = line["message"]
        if line["type"] == "user" and line.get("shouldQuery") is False:
            if self.waiting:
                sys.exit("stand-in: lines came before the result of the one before them")
            if message["content"]:
                self.messages.append(message)
            self.emit({"type": "system", "subtype": "init", "model": self.model})
            self.result(num_turns=0, result="")
        elif line["type"] == "user":
            # An empty one starts a turn on what is there.
            if message["content"]:
                self.messages.append(message)
            self.turn(self.messages[-1]["content"])
        elif message["id"] in self.ids:
            sys.exit("stand-in: two assistant messages have one id")
        else:
            self.messages.append(message)

    def turn(self, content: list[Json]) -> None:
        texts = [
            block["text"] for block in content if block["type"] == "text" and block["text"].strip()
        ]
        texts = [text for text in texts if not text.startswith("<system-reminder>")]
        text = (texts or results_of(content) or [""])[-1]
        self.said, self.turning = [], True
        try:
            self.answer(text, text.split())
        except Interrupted:
            self.interrupted()
        self.turning, self.mode = False, ""
        self.messages.append({"role": "assistant", "id": self.id, "content": "".join(self.said)})

    def answer(self, text: str, words: list[str]) -> None:
        def number(word: str, otherwise: int = 0) -> int:
            after = words[words.index(word) + 1 : words.index(word) + 2]
            return int(after[0]) if after and after[0].isdecimal() else otherwise

        self.id = f"msg_standin_{os.getpid()}_{next(self.numbers)}"
        self.fault("asked")
        if "DIE-START" in words:
            sys.exit("stand-in: told to die before any event")
        if "PAUSE-START" in words:
            self.gate()
        while "HANG-START" in words:
            self.pump(1)
        if "REPLAY" in words:
            return self.replay(words[words.index("REPLAY") + 1])
        self.mode = next((mode for mode in ("NOISE", "SPLIT", *CUT_OFF) if mode in words), "")
        self.emit(
            {
                "type": "system",
                "subtype": "init",
                "model": self.model,
                "tools": [],
                "apiKeySource": "none",
            }
        )
        self.emit({"type": "system", "subtype": "status", "status": "requesting"})
        if self.model == "not-logged-in":
            text = "Not logged in · Please run /login"
            return self.failed(text, None, error="authentication_failed")
        if "RATELIMIT" in words:
            info = {
                "status": "rejected",
                "resetsAt": number("RATELIMIT"),
                "rateLimitType": "five_hour",
            }
            self.emit({"type": "rate_limit_event", "rate_limit_info": info})
            text = "You've hit your 5-hour limit \u00b7 resets 11:46am (UTC)"
            return self.failed(text, 429, error="rate_limit")
        if "TOOL" in words and self.served:
            return self.call(number("TOOL", 1))
        if "RETRY" in words:
            delay = number("RETRY")
            self.emit(
                {
                    "type": "system",
                    "subtype": "api_retry",
                    "attempt": 1,
                    "retry_delay_ms": delay,
                    "error_status": 529,
                }
            )
            self.pump(delay / 1000)
        if "TWORESULTS" in words:
            self.result(result="of a background task")
        if "BIGLINE" in words:
            self.emit({"type": "system", "subtype": "brand_new", "data": "x" * number("BIGLINE")})

        if "PROBE" in words:
            text = self.tool()
        message = self.start()
        self.stream("content_block_start", index=0, content_block={"type": "text", "text": ""})
        paced = next((word for word in ("SLOW", "FLOOD") if word in words), None)
        deltas = re.findall(r"\S+\s*", f"echo: {text}; {len(self.messages)} messages")
        if paced:
            deltas = [f"{n} " for n in range(number(paced))]
        elif "BIGLINE" in words:
            deltas.append("x" * number("BIGLINE"))
        elif "DIGEST" in words:
            deltas.append(f" {digest(self.messages)}")
        elif "ORPHAN" in words:
            deltas.append(f" {self.orphan()}")
        for n, delta in enumerate(deltas):
            self.pump(0.02 if n and paced == "SLOW" else 0)
            if n == 1 and self.point == "midline":
                self.out.write(TORN)
                self.out.flush()
                self.fault("midline")
                continue  # the rest of the line never comes
            self.stream("content_block_delta", index=0, delta={"type": "text_delta", "text": delta})
            self.said.append(delta)
            if n == 0:
                self.fault("first")
                self.middle(words, number)
            if self.mode == "NOISE":
                for line in NOISE:
                    self.put(line)
                for event in STRANGE:
                    self.emit(dict(event))

        said = {
            "type": "assistant",
            "message": {**message, "content": self.blocks()},
            "parent_tool_use_id": None,
        }
        self.emit(said.copy())
        self.fault("last")
        self.stream("content_block_stop", index=0)
        reason = json.loads(text.partition("STOP-REASON ")[2] or '"end_turn"')
        ends = {"stop_reason": reason, "stop_sequence": None}
        out = self.out
        if "BEHIND" in words:
            self.out = io.BytesIO()
        self.stream("message_delta", delta=ends, usage={"output_tokens": len(deltas)})
        self.stream("message_stop")
        self.fault("stopped")
        if "LATE" in words:
            self.gate()
            if self.waiting:
                sys.exit("stand-in: a line came before the result of the turn before it")
        if "TAIL" in words:  # the rest of the turn is late, and comes in one write
            self.gate()
            self.out = io.BytesIO()
            self.emit(said)
        if "NORESULT" not in words:
            self.result(result="".join(self.said), stop_reason="end_turn")
        if "TWORESULTS" in words:
            self.result(result="".join(self.said), stop_reason="end_turn")
        if "BEHIND" in words:
            self.speak()
        if isinstance(self.out, io.BytesIO):
            self.out, rest = out, self.out.getvalue()
            self.out.write(rest)
            self.out.flush()
        if "NOSTDIN" in words:
            signal.pause()

    def start(self) -> Json:
        message = {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [],
        }
        self.stream(
            "message_start",
            message={**message, "stop_reason": None, "stop_sequence": None, "usage": USAGE},
        )
        return message

    def tool(self) -> str:
        """Call the client's tool, as in the recording client_tool; returns the text of its
        result."""
        self.ask({"method": "tools/list"})
        self.start()
        call, name = f"toolu_{self.id}", "probe"
        block = {"type": "tool_use", "id": call, "name": name, "input": {}}
        self.stream("content_block_start", index=0, content_block=block)
        self.stream(
            "content_block_delta", index=0, delta={"type": "input_json_delta", "partial_json": "{}"}
        )
        self.stream("content_block_stop", index=0)
        self.stream(
            "message_delta", delta={"stop_reason": "tool_use", "stop_sequence": None}, usage=SPOKEN
        )
        self.stream("message_stop")
        self.fault("called")
        params = {"name": name, "arguments": {}, "_meta": {"claudecode/toolUseId": call}}
        asked = {"subtype": "mcp_message", "server_name": "client"}
        asked["message"] = {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": params}
        self.emit({"type": "control_request", "request_id": call, "request": asked})
        self.fault("parked")
        while not self.results:
            if not self.reading:
                sys.exit("stand-in: the result of its tool call never came")
            self.pump(None)
        self.id += "_2"
        return str(self.results.pop()["content"][0]["text"])

    def call(self, count: int) -> None:
        """An answer that calls a tool, then what comes of the results."""
        (listed,) = self.ask({"method": "tools/list"})
        self.start()
        ids = [f"toolu_{os.getpid()}_{next(self.numbers)}" for _ in range(count)]
        name = listed["tools"][0]["name"]
        blocks: list[Json] = [
            {"type": "tool_use", "id": one, "name": name, "input": {}} for one in ids
        ]
        for number, block in enumerate(blocks):
            self.stream("content_block_start", index=number, content_block=block)
            self.stream("content_block_stop", index=number)
        self.stream(
            "message_delta", delta={"stop_reason": "tool_use", "stop_sequence": None}, usage=SPOKEN
        )
        self.stream("message_stop")
        meta = [
            {"_meta": {"claudecode/toolUseId": one}, "name": name, "arguments": {}} for one in ids
        ]
        results = self.ask(*({"method": "tools/call", "params": params} for params in meta))
        content = [
            {"type": "tool_result", "tool_use_id": i, **r}
            for i, r in zip(ids, results, strict=True)
        ]
        self.messages += [
            {"role": "assistant", "content": blocks},
            {"role": "user", "content": content},
        ]
        text = (results_of(content) or [""])[-1]
        self.answer(text, text.split())

    def ask(self, *messages: Json) -> list[Json]:
        """Messages to the client's MCP server; its answers."""
        ids = [f"standin-{next(self.numbers)}" for _ in messages]
        for one, message in zip(ids, messages, strict=True):
            request = {
                "subtype": "mcp_message",
                "server_name": "client",
                "message": {"id": 1, **message},
            }
            self.emit({"type": "control_request", "request_id": one, "request": request})
        while self.answers.keys() & set(ids) != set(ids):
            if not self.reading:
                sys.exit(0)
            self.pump(None)
        return [self.answers.pop(one)["response"]["mcp_response"]["result"] for one in ids]

    def middle(self, words: list[str], number: Any) -> None:
        if "STDERR" in words:
            sys.stderr.write("e" * number("STDERR") + "\n")
        if "PAUSE" in words:
            self.gate()
        if "DIE" in words:
            sys.stderr.write("stand-in: told to die\n")
            sys.exit(number("DIE", 1))
        if "HALF" in words:
            self.out.write(b'{"type":"stream_event","event":{"type":"content_bl')
            self.out.flush()
            sys.exit(0)
        if "HANG" in words:
            self.hang()

    def orphan(self) -> int:
        child = os.fork()
        while not child:
            signal.pause()
        return child

    def blocks(self) -> list[Json]:
        return [{"type": "text", "text": "".join(self.said)}]

    def failed(self, text: str, status: int | None, error: str) -> None:
        message = {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": "<synthetic>",
            "usage": USAGE,
        }
        message |= {
            "content": [{"type": "text", "text": text}],
            "stop_reason": "stop_sequence",
            "stop_sequence": "",
        }
        event = {"type": "assistant", "message": message, "parent_tool_use_id": None}
        self.emit({**event, "error": error})
        self.result(
            is_error=True, api_error_status=status, result=text, stop_reason="stop_sequence"
        )

    def interrupted(self) -> None:
        """The end of a turn as in the recording interrupt of 2.1.330."""
        if self.said:
            message = {
                "id": self.id,
                "type": "message",
                "role": "assistant",
                "model": self.model,
                "usage": USAGE,
            }
            message |= {"content": self.blocks(), "stop_reason": None, "stop_sequence": None}
            self.emit({"type": "assistant", "message": message, "parent_tool_use_id": None})
        note = [{"type": "text", "text": "[Request interrupted by user]"}]
        self.emit(
            {
                "type": "user",
                "message": {"role": "user", "content": note},
                "parent_tool_use_id": None,
            }
        )
        if self.said:
            self.stream("content_block_stop", index=0)
            self.stream(
                "message_delta", delta={"stop_reason": None, "stop_sequence": None}, usage=USAGE
            )
            self.stream("message_stop")
        self.result(
            subtype="error_during_execution", is_error=True, num_turns=2, errors=["interrupted"]
        )

    def replay(self, name: str) -> None:
        with open(os.path.join(FIXTURES, name + ".ndjson"), encoding="utf-8") as file:
            rows = [row for row in map(json.loads, file) if row["dir"] == "out" and "line" in row]
        rows = [
            row
            for row in rows
            if row["line"]["type"] in ("stream_event", "assistant", "user", "system", "result")
        ]
        ends = [n for n, row in enumerate(rows) if row["line"]["type"] == "result"]
        rows = rows[ends[-2] + 1 if len(ends) > 1 else 0 :]
        at = rows[0]["t"]
        for row in rows:
            self.pump((row["t"] - at) / 10)
            at = row["t"]
            row["line"].pop("user_message_uuids", None)  # of another turn than this one
            self.put(json.dumps(row["line"], ensure_ascii=False).encode())


def results_of(content: list[Json]) -> list[str]:
    """The texts of tool results, as the client sent them or as its MCP server did."""
    inner = [
        block["content"]
        for block in content
        if block["type"] == "tool_result" and block.get("content")
    ]
    blocks = [[{"type": "text", "text": one}] if isinstance(one, str) else one for one in inner]
    return [block["text"] for block in itertools.chain(*blocks) if block["type"] == "text"]


def digest(messages: list[Json]) -> str:
    """Of the roles and texts of a conversation."""
    said = []
    for message in messages:
        content = message["content"]
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        found = [
            block["text"] for block in blocks if block["type"] == "text" and block["text"].strip()
        ]
        said.append([message["role"], *found, *results_of(blocks)])
    return f"{zlib.crc32(json.dumps(said).encode()):08x}"


def read_lines(path: str) -> list[Json]:
    """The whole lines of a file that grows: of a long one a part is there first."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


class Log:
    """What the stand-ins wrote to $STANDIN_LOG, for tests."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def started(self) -> dict[int, Json]:
        """By process id, in the order of their starts: argv, env, cwd, at."""
        found = {}
        for name in os.listdir(self.folder):
            if name.endswith(".json"):
                with open(os.path.join(self.folder, name), encoding="utf-8") as file:
                    found[int(name.removesuffix(".json"))] = json.load(file)
        return dict(sorted(found.items(), key=lambda item: item[1]["at"]))

    def lines(self, pid: int) -> list[Json]:
        return read_lines(os.path.join(self.folder, f"{pid}.ndjson"))

    def rows(self, pid: int) -> list[Json]:
        """The conversation that it was given at its gate; empty: none yet."""
        with contextlib.suppress(FileNotFoundError):
            return read_lines(os.path.join(self.folder, f"{pid}.rows"))
        return []

    def requests(self, pid: int) -> list[str]:
        """The subtypes of the control requests that it got."""
        return [
            line["request"]["subtype"]
            for line in self.lines(pid)
            if line["type"] == "control_request"
        ]

    def reached(self, model: str) -> list[int]:
        """The processes of this model that got to the point of their fault."""
        names = [name.split(".", 2) for name in os.listdir(self.folder)]
        return [int(name[0]) for name in names if name[1:] == ["at", model]]

    def asked(self, text: str) -> int:
        """How often this text was put as a question: in a user line, or as the newest message of a
        conversation that an empty line asks about."""
        return sum(
            text in str(content) for pid in self.started() for content in self.questions(pid)
        )

    def questions(self, pid: int) -> list[list[Json]]:
        """The user messages that a process was asked to answer."""
        found = []
        for line in self.lines(pid):
            if line["type"] == "user" and line.get("shouldQuery") is not False:
                rows = [row for row in self.rows(pid) if row["type"] in ("user", "assistant")]
                newest = [row["message"]["content"] for row in rows if not row.get("isVirtual")]
                found.append(line["message"]["content"] or newest[-1])
        return found

    def got(self, text: str) -> int:
        """The process that was given a user message with this text; 0: none yet."""
        message = {"type": "text", "text": text}
        lines = (
            (pid, line) for pid in self.started() for line in [*self.rows(pid), *self.lines(pid)]
        )
        users = ((pid, line) for pid, line in lines if line["type"] == "user")
        return next((pid for pid, line in users if message in line["message"]["content"]), 0)


def main() -> None:
    flags = dict(itertools.pairwise(sys.argv))
    conversation = flags.get("--resume")
    model = flags.get("--model", "" if conversation else "sonnet")
    if model == "sonnet":
        model = os.environ.get("STANDIN_SONNET", model)
    if model == "ignore-sigterm":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    standin = Standin(model)
    if "STANDIN_UNASKED" in os.environ:
        standin.speak_on_signal()
    if folder := os.environ.get("STANDIN_LOG"):
        path = os.path.join(folder, str(os.getpid()))
        standin.log = os.open(path + ".ndjson", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with open(path + ".new", "w", encoding="utf-8") as file:
            json.dump(
                {
                    "argv": sys.argv,
                    "env": dict(os.environ),
                    "cwd": os.getcwd(),
                    "at": time.monotonic_ns(),
                },
                file,
            )
        os.rename(path + ".new", path + ".json")
    try:
        standin.run(conversation)
    except BrokenPipeError:
        os._exit(1)
    while model == "ignore-sigterm":
        standin.forget(select.select(standin.signals, [], [])[0])
