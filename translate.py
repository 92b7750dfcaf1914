"""Pure rules between the Messages API and the claude CLI: no I/O, no clock.

After errors and JSON, the file follows the order of a turn: a request, its messages, their
fingerprint, what is written to the CLI, what is read from it, what it reports of itself,
the translation of its events into those of a Messages stream, frames, and the headers of
rate limits.  What only a count of tokens needs comes last.

"API" names a rule of the Messages API.  A name after "recording" is a file in
tests/fixtures that shows the rule.
"""

import binascii
import hashlib
import itertools
import json
import re
import uuid
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import orjson

__version__ = "0.2.0"

# Any JSON object.
Json = dict[str, Any]
# Digests of the parts of a request, by their names (`parse_request`).
Digests = dict[str, str]
# A content block (API).
Block = Json
# A message: its `role`, and its blocks as `content`.
Message = Json
# An event of a Messages stream (API: "Streaming").
StreamEvent = Json
# An event that the CLI prints; only its type has been checked (`decode`).
CliEvent = Json


# ------------------------------------------------------------ errors

# The error.type of an HTTP status, as the SDKs map it (API: "Errors"); 502 is the
# bridge's own.
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    502: "claude_cli_error",
    504: "timeout_error",
    529: "overloaded_error",
}
# The HTTP status of each error.type; of two with one type, the later one.
STATUS_OF_TYPE = {error_type: status for status, error_type in ERROR_TYPES.items()}
# A key or token, even with line breaks that were pasted into it; a long word after it may
# be hidden too.
SECRET = re.compile(r"(sk-ant-)[A-Za-z0-9_-]+(?:(?:\\[nr]|\s)+[A-Za-z0-9_-]{16,})*")
LOGIN_CURE = (
    "run `claude-cli-bridge login`, or log in with /login in the claude CLI itself"
)


@dataclass(eq=False)
class ApiError(Exception):
    """A failure as a Messages client sees it: an HTTP status and an error object."""

    status: int
    message: str
    # `error.type`; by default that of the status.
    error_type: str = ""
    # `error.details.error_code`.
    error_code: str = ""
    # Seconds after which a client may try again.
    retry_after: int | None = None
    # Epoch second from which a rate limit allows requests again.
    resets_at: float | None = None
    # The API gave it, not the CLI or the bridge.
    is_from_api: bool = False
    # What is logged in place of the message; None: the message; empty: nothing.  Set where
    # the message repeats words of a client, the API or the CLI, which can quote a prompt.
    log_reason: str | None = None

    def __post_init__(self) -> None:
        # Some messages quote what a client or the CLI sent.
        self.message = masked(self.message)
        super().__init__(self.message)
        other = "api_error" if self.status >= 500 else "invalid_request_error"
        self.error_type = self.error_type or ERROR_TYPES.get(self.status, other)

    @property
    def can_retry(self) -> bool:
        """Whether the same request may succeed later (header x-should-retry)."""
        return self.status >= 500 or self.status in (408, 409, 429)

    def body(self, request_id: str) -> Json:
        """The API's error envelope; as a stream event it is the `error` event."""
        error: Json = {"type": self.error_type, "message": self.message}
        if self.error_code:
            error["details"] = {"error_code": self.error_code}
        return {"type": "error", "error": error, "request_id": request_id}


def masked(text: str) -> str:
    """A text without keys, and with ? for what cannot be encoded as UTF-8."""
    return SECRET.sub(r"\1***", text.encode(errors="replace").decode())


def cli_error(message: str) -> ApiError:
    """A failure of the CLI itself, not of the API behind it."""
    return ApiError(502, message)


def bad_request(place: str, message: str) -> ApiError:
    """The API's error for a place in the body, a path such as messages.0.content.2.  It
    quotes nothing that a client wrote, as it is logged too."""
    return ApiError(400, f"{place}: {message}")


# What the CLI says before an error of the API, which it quotes as a text or as the whole
# error body, and what it says after the message of a 5xx.
AROUND_API_ERROR = re.compile(
    r"\A(?:Failed to authenticate\. )?API Error: (?:\d{3} |Request rejected \(429\) · )?"
    r"|\. This is a server-side issue, usually temporary.*",
    re.DOTALL,
)
TOO_LONG = "Prompt is too long"
# The statuses of failures that come without one, by the beginnings of their texts
# (recording mid_stream_error of 2.1.197).
STATUS_OF_TEXT = {
    TOO_LONG: 400,
    "API Error: Overloaded": 529,
    "API Error: Both output_format and output_config": 400,
    # The API did not answer, or something else answered in its place.
    "API Error": 500,
}


def result_error(
    result: CliEvent, synthetic: CliEvent | None, resets_at: float | None
) -> ApiError:
    """The error that a `result` event with `is_error` stands for.

    The CLI writes `subtype: success` on failures as well (recordings error_401, error_429,
    error_529, not_logged_in).  The status is the API's; if there is none, it follows from
    error.type, else from the text, and is 401 if `synthetic` says that no login works.
    `synthetic` is the `assistant` event before it that the CLI made up, if there is one;
    2.1.330 keeps the API's error.type and error_code in it.
    `resets_at` is the epoch second at which a rate limit is reset.
    """
    errors = "; ".join(map(str, as_list(result.get("errors"))))
    usual = "the claude CLI ended the turn with an error"
    text = str(result.get("result") or errors or usual)
    message = AROUND_API_ERROR.sub("", text) or text
    error = as_object(parsed(message)).get("error")
    message = get_str(error, "message") or message
    error_type = get_str(synthetic, "api_error_type") or get_str(error, "type")
    status: Any = result.get("api_error_status")
    is_from_api = status in range(400, 600)
    if not is_from_api:
        status = STATUS_OF_TYPE.get(error_type) or status_of(text)
    elif status == 502:
        error_type = error_type or "api_error"  # a proxy in front of the API
    # The API's spelling, by which clients know it.
    message = message.replace(TOO_LONG, "prompt is too long")
    if not is_from_api and get_str(synthetic, "error") == "authentication_failed":
        status = 401
        # In the CLI's own words; a cloud's login is renewed in another way.
        if "/login" in message or "OAuth" in message:
            message = f"{message} ({LOGIN_CURE})"
    return ApiError(
        status,
        message,
        error_type,
        get_str(synthetic, "api_error_code"),
        resets_at=resets_at if status == 429 else None,
        is_from_api=is_from_api,
        log_reason="",
    )


def status_of(text: str) -> int:
    """The HTTP status of a failure that has none; 502 when the CLI itself is at fault."""
    for start, status in STATUS_OF_TEXT.items():
        if text.startswith(start):
            return status
    return 502


# ------------------------------------------------------------ JSON


def json_line(value: Json) -> bytes:
    return orjson.dumps(value) + b"\n"


def parsed(text: str | bytes) -> Any:
    """The value of a JSON text; None if it is none."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return None


def get_str(value: Any, key: str) -> str:
    """The string under a key of an object; empty if there is none."""
    text = as_object(value).get(key)
    return text if isinstance(text, str) else ""


# White space inside a line as JavaScript has it (ECMA-262, "White Space" and "Line
# Terminators").  Python's has control characters too, and not the byte order mark.
BLANKS = (
    "\t\v\f \u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000\ufeff"
)
WHITE_SPACE = BLANKS + "\r\n"


def is_blank(text: str) -> bool:
    """Whether it is white space alone."""
    return not text.strip(WHITE_SPACE)


def js_length(text: str) -> int:
    """Its length as JavaScript counts it, in code units of UTF-16."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def text_block(text: str) -> Block:
    return {"type": "text", "text": text}


def as_blocks(content: Any) -> list[Any]:
    """Content as blocks; what is neither text nor a list is none."""
    if isinstance(content, str):
        return [text_block(content)] if content else []
    return as_list(content)


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def as_object(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def without(value: Mapping[str, Any], keys: Collection[str]) -> Json:
    return {key: inner for key, inner in value.items() if key not in keys}


def without_nulls(value: Mapping[str, Any]) -> Json:
    """A copy without null values (the Vercel AI SDK fails on `caller: null`)."""
    return {key: inner for key, inner in value.items() if inner is not None}


def without_empties(value: Json) -> Json:
    """A copy without values that are null, {} or [] (the Vercel AI SDK fails on
    `context_management: {}`)."""
    return {key: inner for key, inner in value.items() if inner not in (None, {}, [])}


# Bounds of a request: its levels of JSON, as each is a recursive call, and its values, as
# each can take a hundred times the memory of its text.
MAX_DEPTH = 200
MAX_VALUES = 100_000
# A part of a JSON text, of at most a megabyte, that cuts no escape in two: one search
# through the whole would hold the interpreter's lock.
PIECE = re.compile(rb"(?:[^\\]{1,1000}+|\\.?){1,1000}+", re.DOTALL)


def has_too_many_values(body: bytes) -> bool:
    """Whether a JSON text holds more than about MAX_VALUES values."""
    if len(body) <= MAX_VALUES:
        return False
    # A comma or an opening bracket comes before each value but the first, or begins it.
    marks = 0
    is_in_string = False
    for match in PIECE.finditer(body):
        piece = match[0].replace(b"\\\\", b"").replace(b'\\"', b"")
        parts = piece.split(b'"')
        outside = b"".join(parts[is_in_string::2])
        marks += sum(map(outside.count, b",[{"))
        if marks > MAX_VALUES:
            return True
        has_odd_quotes = len(parts) % 2 == 0
        is_in_string = is_in_string != has_odd_quotes
    return False


def is_deeper(value: Any, levels: int) -> bool:
    """Whether a JSON value is nested more than so many levels deep."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return False
    return not levels or any(is_deeper(item, levels - 1) for item in value)


# ------------------------------------------------------------ requests

# A model name can end up in the CLI's argv, where a leading dash would make it a flag.
# Brackets, slashes, colons and @ occur in real names (sonnet[1m], Bedrock ARNs, Vertex
# versions).
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@\[\]-]{0,255}")
MODEL_PREFIX = "claude-cli/"
# What cannot stand in a header's list: commas, and all but visible ASCII.
NOT_IN_HEADER = re.compile(r"[^\x21-\x2b\x2d-\x7e]")
# Betas that 2.1.332 reserves for itself: it sends them for no client.
UNSENT_BETAS = {
    "afk-mode-2026-01-31",
    "inline-tools-2026-09-15",
    "mid-conversation-system-2026-04-07",
    "mid-conversation-tool-changes-2026-07-01",
    "tool-provenance-2026-10-26",
}
# Fields that the bridge passes on in another way, or leaves to the CLI.  All others go
# to the API as sent, and so do `tools` if there are any (`read_fields`).  `betas` would
# replace the CLI's own list, which an OAuth login needs; `metadata` identifies the CLI.
OWN_FIELDS = {"model", "messages", "system", "stream", "metadata", "betas", "tools"}
# Claude Code's first system block: a hash that changes with every request, and that the
# CLI writes itself.
BILLING_LINE = "x-anthropic-billing-header:"
TYPE_NAMES = {
    str: "string",
    bool: "boolean",
    list: "list",
    dict: "object",
}
# Tools whose entry in `tools` has no name of its own: how its type begins, and the names
# that the model calls (SDK: BetaComputerToolset*).
TOOLSETS = {
    "computer_toolset_": (
        "cursor_position double_click hold_key key left_click left_click_drag left_mouse_down "
        "left_mouse_up middle_click mouse_move right_click screenshot scroll triple_click "
        "type wait zoom"
    ),
    "browser_toolset_": (
        "close_tab double_click file_upload find form_input get_page_text hold_key hover "
        "javascript_exec key left_click left_click_drag left_mouse_down left_mouse_up "
        "list_tabs middle_click mouse_move navigate new_tab read_console read_network "
        "read_page right_click screenshot scroll scroll_to switch_tab triple_click type wait "
        "zoom"
    ),
}


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Digests of a request, by which the process is found that holds its history."""

    # Of what is fixed for the life of a process, by name.
    parts: Digests
    # Those of them that the client's request sets.
    sent_parts: Digests
    # Of all messages but the last one.
    past: str
    # The same without thinking.
    past_without_thinking: str
    # Of the last message.
    newest: str
    # The messages hold thinking that the client echoes.
    has_thinking: bool


@dataclass(frozen=True, slots=True)
class Request:
    """A valid Messages request, in the form that the rest of the bridge works with."""

    # As the CLI gets it: without a leading claude-cli/.
    model: str
    # The texts of the system prompt; empty: none.
    system: list[str]
    # Roles alternate.  If the last one is the assistant's, the answer continues it.
    messages: list[Message]
    stream: bool
    # The client's tools, as the model calls them.
    tool_names: list[str]
    # The fields that go to the API as sent.
    fields: Json
    # The client's anthropic-beta, sorted.
    betas: str
    # Who sets the cache breakpoints of the messages: "client", or else the CLI, with this
    # TTL: "5m", "1h", or "" (its choice).
    caching: str
    # Fields and places that cannot arrive as sent (header x-bridge-not-sent).  Whatever
    # reads a part of the body adds to it.
    not_sent: list[str]
    # The places of what follows a tool call, which versions before 2.1.266 put before it.
    misplaced: list[str]
    # Bytes of the request as it came.
    size: int
    # `metadata.user_id`, in which a CLI says which of its conversations asks.
    user_id: str
    # The CLI runs its own tools for this request.
    is_agent: bool
    # Its tokens are counted; there is no answer.
    is_count: bool
    fingerprint: Fingerprint

    @property
    def continues(self) -> bool:
        """Whether the answer continues the last message, which is the assistant's: a
        prefill, or an answer that ended with pause_turn (API)."""
        role: str = self.messages[-1]["role"]
        return role == "assistant"


def parse_request(
    body: bytes,
    betas: str = "",
    *,
    counting: bool = False,
    agent: bool = False,
) -> Request:
    """Read a body.  `betas` is the header anthropic-beta.  For `counting`, max_tokens may be
    missing.  With `agent`, the CLI has tools if the body has none.  Raises ApiError 400."""
    data = read_object(body)
    check_fields(data, counting)
    not_sent = [name for name in ("metadata", "betas") if data.get(name) is not None]
    tools = data.get("tools") or []
    system = read_system(data.get("system"), not_sent)
    is_agent = agent and not tools
    names = read_tool_names(tools)
    betas = read_betas(betas, is_agent, not_sent)
    placed = read_messages(data["messages"], not_sent)
    messages = [{"role": each.role, "content": each.blocks} for each in placed]
    caching = read_breakpoints(messages, tools, data, is_agent, not_sent)
    if caching != "client":
        remove_breakpoints(messages)
    not_sent += [place for message in placed for place in dropped_parts(message)]
    check_ending(placed[-1], is_agent, not_sent)
    fields = read_fields(data, is_agent, not_sent)
    parts: Json = {
        "model": read_model(data["model"]),
        "system": system,
        # All else about tools is said with each turn.
        "tools": None if is_agent else sorted(names),
        "betas": betas,
        "caching": caching == "client",
    }
    return Request(
        model=parts["model"],
        system=system,
        messages=messages,
        stream=data.get("stream") is True,
        tool_names=names,
        fields=fields,
        betas=betas,
        caching=caching,
        not_sent=list(dict.fromkeys(not_sent)),
        misplaced=blocks_after_calls(placed),
        size=len(body),
        user_id=get_str(data.get("metadata"), "user_id"),
        is_agent=is_agent,
        is_count=counting,
        fingerprint=fingerprint(parts, data, messages),
    )


def check_fields(data: Json, counting: bool) -> None:
    if data.get("thread") is not None:
        # The SDKs send the whole history after this error_code alone (anthropic
        # lib/threads/_thread_state.py).
        raise ApiError(
            400,
            "thread: not supported by this bridge",
            error_code="thread_unsupported_request",
        )
    for name in ("model", "messages", "max_tokens"):
        is_optional = counting and name == "max_tokens"
        if data.get(name) is None and not is_optional:
            raise bad_request(name, "Field required")
    for name, kind in (("stream", bool), ("tools", list), ("messages", list)):
        if data.get(name) is not None:
            check_type(data[name], kind, name)


def read_object(body: bytes) -> Json:
    if has_too_many_values(body):
        raise bad_request("body", f"more than {MAX_VALUES} JSON values")
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        message = f"The request body is not valid JSON: {error}"
        raise ApiError(400, message) from None
    if is_deeper(data, MAX_DEPTH):
        raise bad_request("body", f"JSON of more than {MAX_DEPTH} levels")
    if not isinstance(data, dict):
        raise ApiError(400, "The request body is not a JSON object.")
    return data


def check_type(value: Any, kind: type, place: str) -> Any:
    """The value.  Raises ApiError 400, in the API's wording, unless it is of that
    type."""
    if type(value) is not kind:
        raise bad_request(place, f"Input should be a valid {TYPE_NAMES[kind]}")
    return value


def read_model(value: Any) -> str:
    name: str = check_type(value, str, "model").removeprefix(MODEL_PREFIX)
    if not MODEL_NAME.fullmatch(name):
        message = "String should be a model name: letters, digits and . _ : / @ [ ] -"
        raise bad_request("model", message)
    return name


def header_safe(text: str) -> str:
    """A text with ? for each character that cannot stand in a header's list; ? if it is
    empty."""
    return NOT_IN_HEADER.sub("?", text) or "?"


def other_keys(value: Json, known: Collection[str], place: str) -> list[str]:
    """The places of an object's keys that are not among the known ones, and not null."""
    others = without(without_nulls(value), known)
    return [f"{place}.{header_safe(key)}" for key in others]


def read_betas(header: str, is_agent: bool, not_sent: list[str]) -> str:
    """The names in anthropic-beta, sorted.  Those that the CLI sends for no client, and
    all of an agent's, are added to `not_sent`."""
    names = sorted({name.strip() for name in header.split(",")} - {""})
    for name in names:
        if header_safe(name) != name:
            message = "names are visible ASCII characters, separated by commas"
            raise bad_request("anthropic-beta", message)
        if is_agent or name in UNSENT_BETAS:
            not_sent.append(f"anthropic-beta.{name}")
    return "" if is_agent else ",".join(names)


def read_system(system: Any, not_sent: list[str]) -> list[str]:
    """The texts of `system`: a string or text blocks (API).  The CLI joins them, and
    keeps no other key of theirs."""
    if isinstance(system, str | None):
        return [system] if system else []
    texts = []
    for number, block in enumerate(check_type(system, list, "system")):
        place = f"system.{number}"
        check_type(block, dict, place)
        if block.get("type") != "text":
            raise bad_request(f"{place}.type", "Input should be 'text'")
        text = check_type(block.get("text"), str, f"{place}.text")
        if text.startswith(BILLING_LINE):
            not_sent.append(place)
        elif text:
            texts.append(text)
    return texts


def read_tool_names(tools: list[Any]) -> list[str]:
    """The names in `tools`, and those of a toolset's members.

    The CLI has to know the names of client tools to hand a call over (MCP), and others
    do no harm; everything else about the tools goes to the API as sent.
    """
    names: list[str] = []
    for number, tool in enumerate(tools):
        check_type(tool, dict, f"tools.{number}")
        name = tool.get("name")
        if name is not None:
            names.append(check_type(name, str, f"tools.{number}.name"))
        for prefix, members in TOOLSETS.items():
            if str(tool.get("type")).startswith(prefix):
                names += members.split()
    return list(dict.fromkeys(names))


def blocks_of_types(messages: list[Message], kinds: Collection[str]) -> list[Block]:
    """The blocks of these types in a conversation, but for those inside others."""
    return [
        block
        for message in messages
        for block in message["content"]
        if block["type"] in kinds
    ]


def read_fields(data: Json, is_agent: bool, not_sent: list[str]) -> Json:
    """The fields that go to the API as sent; for an agent, `thinking` alone, of which only the
    type counts: fields are in the environment of the CLI, where the commands that an agent runs
    could read them.  What does not go is added to `not_sent`."""
    fields = without(data, OWN_FIELDS)
    if is_agent:
        thinking = as_object(fields.pop("thinking", None))
        not_sent += map(header_safe, without_nulls(fields))
        not_sent += other_keys(thinking, ("type",), "thinking")
        return {"thinking": thinking}
    if tools := data.get("tools"):
        undefer(tools, data["messages"], not_sent)
        fields["tools"] = tools
    return fields


def undefer(tools: list[Json], messages: list[Any], not_sent: list[str]) -> None:
    """Take `defer_loading` from each tool that a tool_reference in a tool result has
    loaded: the CLI drops the reference, so the API would not load the tool."""
    referenced = {
        get_str(block, "tool_name")
        for block in nested_blocks(messages)
        if get_str(block, "type") == "tool_reference"
    }
    for number, tool in enumerate(tools):
        if tool.get("defer_loading") and tool.get("name") in referenced:
            not_sent.append(f"tools.{number}.defer_loading")
            del tool["defer_loading"]


# ------------------------------------------------------------ messages

# Clients drop thinking, or echo a part of it: there is a second digest without it.
THINKING_BLOCKS = {"thinking", "redacted_thinking"}
# Blocks that are no answer if an assistant message holds nothing else.
NON_ANSWER_TYPES = THINKING_BLOCKS | {"fallback"}
CANNOT_CONTINUE = (
    "the claude CLI cannot continue a message with this part; an agent continues none"
)


@dataclass
class PlacedMessage:
    """A message while it is read."""

    role: str
    # Its blocks, by the place where the client has each.
    parts: dict[str, Block] = field(default_factory=dict)

    @property
    def blocks(self) -> list[Block]:
        return list(self.parts.values())


def read_messages(raw: list[Any], not_sent: list[str]) -> list[PlacedMessage]:
    """Messages as block lists of alternating roles.  The places of what the CLI leaves
    out are added to `not_sent`.

    Raises ApiError 400 in the API's wording, with the index of the message as the client
    numbered it.
    """
    messages: list[PlacedMessage] = []
    for number, message in enumerate(raw):
        place = f"messages.{number}"
        role, blocks = read_message(message, place)
        # API: an assistant message that ends a conversation may be empty.
        is_ending = role == "assistant" and number == len(raw) - 1
        if role == "system":
            # It may hold settings alone (beta per-turn-control).
            check_system_place(raw, number)
            role, blocks = "user", as_reminder(message, blocks, place, not_sent)
        elif not blocks and not is_ending:
            raise bad_request(
                place,
                "all messages must have non-empty content"
                " except for the optional final assistant message",
            )
        has_answer = any(block["type"] not in NON_ANSWER_TYPES for block in blocks)
        is_prefill = is_ending and bool(blocks)
        if role == "assistant" and not has_answer and not is_prefill:
            # The CLI would leave it out.
            not_sent.append(place)
            continue
        # API: consecutive messages of one role are one message.
        if blocks and (not messages or messages[-1].role != role):
            messages.append(PlacedMessage(role))
        for index, block in enumerate(blocks):
            where = f"{place}.content.{index}"
            if block["type"] == "tool_result":
                block = read_result(block, where, not_sent)
            messages[-1].parts[where] = block
    if not messages:
        raise bad_request("messages", "at least one message is required")
    check_pairs(messages)
    return messages


def check_ending(newest: PlacedMessage, is_agent: bool, not_sent: list[str]) -> None:
    """Raises ApiError 400 if the answer would continue a message that ends with thinking or
    has a part that the CLI leaves out, or any message of an agent, to which the CLI adds one
    of its own."""
    # Places of whole blocks: those of their keys are longer.
    lost = newest.parts.keys() & not_sent
    *_, (place, block) = newest.parts.items()
    if is_agent or block["type"] in THINKING_BLOCKS:
        lost.add(place)
    if newest.role == "assistant" and lost:
        raise bad_request(min(lost), CANNOT_CONTINUE)


def as_reminder(
    message: Json, blocks: list[Block], place: str, not_sent: list[str]
) -> list[Block]:
    """A system message as a text of the user's, written as the CLI's own reminders
    are: the CLI takes the user's and the assistant's messages only.  The rest of it is
    added to `not_sent`."""
    not_sent.append(f"{place}.role")
    # Such as the settings of a turn (beta per-turn-control).
    not_sent += other_keys(message, ("role", "content"), place)
    texts = []
    for index, block in enumerate(blocks):
        where = f"{place}.content.{index}"
        if block["type"] != "text":
            not_sent.append(where)
            continue
        texts.append(block["text"])
        if block.get("cache_control"):
            not_sent.append(f"{where}.cache_control")
    text = "\n".join(texts)
    reminder = f"<system-reminder>\n{text}\n</system-reminder>"
    return [text_block(reminder)] if texts else []


def read_result(block: Block, place: str, not_sent: list[str]) -> Block:
    """A tool_result without what the CLI drops, which is added to `not_sent`: tool
    references, in place of which a text says as much, and all but text in an error."""
    if not isinstance(block.get("content"), list):
        return block
    kept: list[Any] = []
    for index, inner in enumerate(block["content"]):
        kind = get_str(inner, "type")
        if kind == "tool_reference":
            name = get_str(inner, "tool_name")
            kept.append(text_block(f"Tool loaded: {name}"))
        elif kind == "text" or not block.get("is_error"):
            kept.append(inner)
            continue
        not_sent.append(f"{place}.content.{index}")
    return block | {"content": kept}


# The CLI's own text for an empty answer; it drops such a text from a history.
NO_CONTENT = "(no content)"
# All that the CLI keeps of a tool_use.
CALL_KEYS = {"type", "id", "name", "input"}


def dropped_parts(message: PlacedMessage) -> list[str]:
    """The places of what some version of the CLI leaves out of an assistant message:
    marks of a fallback, the advisor's words, NO_CONTENT, citations other than a web
    search's, keys of a tool call, an input that `cli_input` rewrites, and calls of server
    tools that wait for a client's tool, and so have no result in the same message."""
    if message.role == "user":
        return []
    answered = {get_str(block, "tool_use_id") for block in message.blocks}
    lost = []
    for place, block in message.parts.items():
        kind = block["type"]
        is_server_call = kind in ("server_tool_use", "mcp_tool_use")
        is_pending = is_server_call and get_str(block, "id") not in answered
        is_advisor = is_server_call and block.get("name") == "advisor"
        is_mark = kind in ("fallback", "advisor_tool_result")
        text = block["text"].strip(WHITE_SPACE) if kind == "text" else ""
        if is_pending or is_advisor or is_mark or text == NO_CONTENT:
            lost.append(place)
        elif kind == "tool_use":
            lost += other_keys(canonical(block), CALL_KEYS, place)
            if cli_input(block) != block["input"]:
                lost.append(f"{place}.input")
        elif kind == "text" and any(
            # 2.1.332 keeps those of a web search alone.
            get_str(citation, "type") != "web_search_result_location"
            for citation in as_list(block.get("citations"))
        ):
            lost.append(f"{place}.citations")
    return lost


def blocks_after_calls(messages: list[PlacedMessage]) -> list[str]:
    """The places of what follows a tool call in its message, but for other calls."""
    found = []
    for message in messages:
        has_call = False
        for place, block in message.parts.items():
            if block["type"] == "tool_use":
                has_call = True
            elif has_call:
                found.append(place)
    return found


def read_message(message: Any, place: str) -> tuple[str, list[Block]]:
    """The role of a message and its blocks, with all that is read of them checked."""
    check_type(message, dict, place)
    role = check_type(message.get("role"), str, f"{place}.role")
    if role not in ("user", "assistant", "system"):
        raise bad_request(f"{place}.role", "Input should be 'user' or 'assistant'")
    if "content" not in message:
        raise bad_request(f"{place}.content", "Field required")
    content = message["content"]
    if not isinstance(content, str):
        check_type(content, list, f"{place}.content")
    blocks: list[Block] = as_blocks(content)
    for index, block in enumerate(blocks):
        check_block(block, role, place, f"{place}.content.{index}")
    return role, blocks


# Characters of a tool's name (API); the CLI would cut a longer one.
MAX_TOOL_NAME = 200
# The role of the messages that may hold such a block (API).
ROLE_OF_TYPE = {"tool_use": "assistant", "tool_result": "user"}


def check_block(block: Any, role: str, message_place: str, place: str) -> None:
    """Check what is read of a block; all else in it is the API's to judge."""
    check_type(block, dict, place)
    kind = check_type(block.get("type"), str, f"{place}.type")
    wanted = ROLE_OF_TYPE.get(kind, role)
    if role != wanted:
        raise bad_request(place, f"`{kind}` blocks can only be in `{wanted}` messages")
    if kind == "text":
        # The CLI would drop a blank text, and its message if that has nothing else.
        text = check_type(block.get("text"), str, f"{place}.text.text")
        if is_blank(text):
            fault = "contain non-whitespace text" if text else "be non-empty"
            message = f"text content blocks must {fault} ({message_place})"
            raise bad_request("messages", message)
    elif kind == "image":
        check_image(block, place)
    elif kind == "tool_use":
        place = f"{place}.tool_use"
        check_type(block.get("id"), str, f"{place}.id")
        name = check_type(block.get("name"), str, f"{place}.name")
        if len(name) > MAX_TOOL_NAME:
            message = f"String should have at most {MAX_TOOL_NAME} characters"
            raise bad_request(f"{place}.name", message)
        check_type(block.get("input"), dict, f"{place}.input")
    elif kind == "tool_result":
        check_type(block.get("tool_use_id"), str, f"{place}.tool_result.tool_use_id")
        for number, inner in enumerate(as_list(block.get("content"))):
            if get_str(inner, "type") == "image":
                check_image(inner, f"{place}.tool_result.content.{number}")


# How the base64 of an image begins.
IMAGE_SIGNATURES = {
    "iVBORw0KGgo": "image/png",
    "/9j/": "image/jpeg",
    "R0lGOD": "image/gif",
    "UklGR": "image/webp",
}


# Bytes of an image's base64 (API).  The CLI refuses a larger one, or scales it.
MAX_IMAGE = 5 << 20


def check_image(block: Block, place: str) -> None:
    """API: an image by value is base64, and of the type that its media_type says.  The CLI
    would silently replace any other."""
    source = check_type(block.get("source"), dict, f"{place}.image.source")
    if source.get("type") != "base64":
        return
    place = f"{place}.image.source.base64"
    data = check_type(source.get("data"), str, f"{place}.data")
    declared = check_type(source.get("media_type"), str, f"{place}.media_type")
    if len(data) > MAX_IMAGE:
        message = f"image exceeds 5 MB maximum: {len(data)} bytes > {MAX_IMAGE} bytes"
        raise bad_request(place, message)
    try:
        # Empty base64 is valid, but no image.
        binascii.a2b_base64(data or "-", strict_mode=True)
    except ValueError:
        message = "Input should be valid base64, without what a data: URL has before it"
        raise bad_request(f"{place}.data", message) from None
    for signature, kind in IMAGE_SIGNATURES.items():
        if data.startswith(signature) and declared != kind:
            message = f"Input should be {kind}, as the image appears to be"
            raise bad_request(f"{place}.media_type", message)


def check_system_place(messages: list[Any], number: int) -> None:
    """API: a system message follows a user turn, and precedes an assistant turn or ends
    the array."""
    if number == 0:
        raise bad_request(
            "messages",
            'Unexpected role "system". The Messages API accepts a top-level `system`'
            ' parameter, not "system" as an input message role.',
        )
    before = messages[number - 1]["role"]
    is_last = number == len(messages) - 1
    is_before_answer = is_last or get_str(messages[number + 1], "role") == "assistant"
    if before != "user" or not is_before_answer:
        raise bad_request(
            f"messages.{number}",
            "role 'system' must follow a user turn,"
            " and precede an 'assistant' message or end the array",
        )


def check_pairs(messages: list[PlacedMessage]) -> None:
    """API: each tool_use is answered in the next message, each tool_result answers a
    tool_use of the previous one.  `check_block` has shown that calls are in the messages
    of one role, and results in those of the other."""
    # The ids of all calls, and of those without a result.
    seen: set[str] = set()
    waiting: set[str] = set()
    for message in messages:
        for place, block in message.parts.items():
            if block["type"] == "tool_use":
                call = block["id"]
                if call in seen:
                    raise bad_request("messages", "`tool_use` ids must be unique")
                seen.add(call)
                waiting.add(call)
            elif block["type"] == "tool_result":
                call = block["tool_use_id"]
                if call not in waiting:
                    raise ApiError(
                        400,
                        f"{place}: unexpected `tool_use_id` found in `tool_result` blocks:"
                        f" {call}. Each `tool_result` block must have a corresponding"
                        " `tool_use` block in the previous message, and be the only one"
                        " for it.",
                        log_reason=place,
                    )
                waiting.remove(call)
        is_last = message is messages[-1]
        if waiting and (message.role == "user" or is_last):
            raise unanswered(waiting, next(iter(message.parts)))


def unanswered(calls: Iterable[str], place: str) -> ApiError:
    """The error for calls without results, to be raised.  `place` is any in the message that
    should have held the results, or in the last one (API)."""
    place = place.partition(".content.")[0]
    return ApiError(
        400,
        f"{place}: `tool_use` ids were found without `tool_result` blocks immediately"
        f" after: {', '.join(sorted(calls))}. Each `tool_use` block must have"
        " a corresponding `tool_result` block in the next message.",
        log_reason=place,
    )


# The API takes four cache breakpoints.  The CLI sets three of its own: two on the
# system prompt and one at the end of the newest message, which is where most clients
# want theirs.
FREE_BREAKPOINTS = 1


def read_breakpoints(
    messages: list[Message],
    tools: list[Any],
    data: Json,
    is_agent: bool,
    not_sent: list[str],
) -> str:
    """Who sets the breakpoints of the messages, as in `Request.caching`.
    "cache_control" is added to `not_sent` if a client's is lost, or kept for a shorter time.

    The CLI sets its own at the end of the system prompt and of the newest message.  They
    replace a client's there, and those that the client has left at the ends of earlier
    messages.  A breakpoint inside a message, such as between a document and a question,
    or more on tools than the CLI leaves room for, makes them all the client's.
    """
    system = as_list(data.get("system"))
    # On tools, and that of the whole request: these arrive as sent.
    kept = breakpoints_on([*tools, data])
    # Where the CLI sets its own.
    at_ends = breakpoints_on(system[-1:])
    # Inside a message: only the client's own can be there.
    inside: list[str] = []
    # Where the CLI sets none; these alone do not make all of them the client's.
    elsewhere = breakpoints_on(system[:-1])
    for message in messages:
        blocks = message["content"]
        if message["role"] == "user":
            # Clients mark any of the tool results that end a message.
            are_results = [block["type"] == "tool_result" for block in reversed(blocks)]
            end = -sum(itertools.takewhile(bool, are_results)) or -1
            inside += breakpoints_on(blocks[:end])
            at_ends += breakpoints_on(blocks[end:])
        else:
            elsewhere += breakpoints_on(blocks)
        elsewhere += breakpoints_on(nested_blocks(blocks))
    needs_clients = bool(inside) or len(kept) > FREE_BREAKPOINTS
    if needs_clients and not is_agent:
        if breakpoints_on(system):
            not_sent.append("cache_control")
        return "client"
    ttls = {*kept, *at_ends, *elsewhere}
    ttl = ""
    if ttls and not is_agent:
        # API: none of an hour may follow one of five minutes.
        ttl = "5m" if "5m" in ttls else "1h"
    is_shorter = "1h" in at_ends and ttl != "1h"
    if elsewhere or is_shorter or needs_clients:
        not_sent.append("cache_control")
    return ttl


def breakpoints_on(values: list[Any]) -> list[str]:
    """The TTLs of the cache breakpoints on these values: "1h", or "5m", the default."""
    return [
        "1h" if get_str(value["cache_control"], "ttl") == "1h" else "5m"
        for value in values
        if as_object(value).get("cache_control") is not None
    ]


def nested_blocks(holders: list[Any]) -> list[Any]:
    """All blocks inside messages, tool results and documents, at any depth."""
    found: list[Any] = []
    for holder in map(as_object, holders):
        source = as_object(holder.get("source"))
        content = (source or holder).get("content")
        # A web_fetch_tool_result has an object, and that a document.
        found += [content] if isinstance(content, dict) else as_list(content)
    return found + nested_blocks(found) if found else []


def remove_breakpoints(messages: list[Message]) -> None:
    """Take `cache_control` out of all blocks, also of those in them."""
    for block in nested_blocks(messages):
        as_object(block).pop("cache_control", None)


# ------------------------------------------------------------ fingerprints

# Keys of a block that mean nothing to the model: SDKs add and drop them when they echo a
# block.
IGNORED_KEYS = ("parsed_output",)
# Values that mean the same as a key that is not there; as JSON, as in Python 0 is False.
DEFAULTS = {
    "is_error": (b"false",),
    "citations": (b"[]", b'{"enabled":false}'),
    "caller": (b'{"type":"direct"}',),
}


def digest(value: Any) -> str:
    """A 16-byte digest of a JSON value that does not depend on the order of keys."""
    text = orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def extend_chain(chain: str, message: str) -> str:
    """The digest of a conversation that goes on from `chain` ("": its start) with a
    message of that digest."""
    return digest([chain, message])


def message_digest(message: Message, *, thinking: bool = True) -> str:
    """The digest of a message, without what clients change when they echo it: what
    `canonical` drops and, in an assistant's message, how a text is cut into neighbouring
    blocks and the white space around it.  Without `thinking`, as if the client had dropped
    the thinking."""
    role = message["role"]
    blocks = [
        canonical(block)
        for block in message["content"]
        if thinking or block["type"] not in THINKING_BLOCKS
    ]
    if role == "user":
        return digest([role, blocks])
    joined: list[Block] = []
    for is_text, run in itertools.groupby(blocks, is_plain_text):
        if not is_text:
            joined += run
        elif text := "".join(block["text"] for block in run).strip(WHITE_SPACE):
            joined.append(text_block(text))
    return digest([role, joined])


def chain_of(messages: list[Message], *, thinking: bool = True) -> str:
    """The digest of a conversation (`message_digest`)."""
    chain = ""
    for message in messages:
        chain = extend_chain(chain, message_digest(message, thinking=thinking))
    return chain


def fingerprint(parts: Json, data: Json, messages: list[Message]) -> Fingerprint:
    """The fingerprint of a request: of its `parts`, and of its messages.  A client has
    not sent those of the parts whose field is not in `data`, the body."""
    digests = {name: digest(value) for name, value in parts.items()}
    unsent = {name for name in ("system", "tools") if data.get(name) is None}
    has_thinking = bool(blocks_of_types(messages, THINKING_BLOCKS))
    past = chain_of(messages[:-1])
    past_without_thinking = past
    if has_thinking:
        past_without_thinking = chain_of(messages[:-1], thinking=False)
    return Fingerprint(
        parts=digests,
        sent_parts=without(digests, unsent),
        past=past,
        past_without_thinking=past_without_thinking,
        newest=message_digest(messages[-1]),
        has_thinking=has_thinking,
    )


def request_digest(request: Request) -> str:
    """A digest of all that a count of tokens depends on."""
    return digest([request.fingerprint.parts, request.messages, request.fields])


def is_plain_text(block: Block) -> bool:
    return block == text_block(get_str(block, "text"))


# Types of what may hold a string in place of one text block: results of tools, and the
# source of a document (API).
STRING_HOLDERS = ("tool_result", "mcp_tool_result", "content")


def canonical(value: Any) -> Any:
    """A block, or a value inside one, without what clients change when they echo it:
    IGNORED_KEYS, nulls, DEFAULTS and empty content vanish, a string becomes a text block
    (STRING_HOLDERS), and the input of a call is as the CLI sends it."""
    if isinstance(value, list):
        return list(map(canonical, value))
    if not isinstance(value, dict):
        return value
    kept = without_nulls(without(value, IGNORED_KEYS))
    for key, defaults in DEFAULTS.items():
        if key in kept and orjson.dumps(kept[key]) in defaults:
            del kept[key]
    if "input" in kept:
        kept["input"] = with_plain_numbers(cli_input(value))
    if kept.get("type") in STRING_HOLDERS and isinstance(kept.get("content"), str):
        kept["content"] = as_blocks(kept["content"])
    for key in ("content", "citations", "source"):
        if key in kept:
            kept[key] = canonical(kept[key])
    if kept.get("content") in ("", []):
        del kept["content"]
    return kept


def with_plain_numbers(value: Any) -> Any:
    """A JSON value with 1 for 1.0, as JavaScript clients echo it."""
    text = orjson.dumps(value)
    return json.loads(text, parse_float=plain_number) if b".0" in text else value


def as_javascript(value: Any) -> Any:
    """The canonical form of a block, with numbers as JavaScript has them."""
    return json.loads(orjson.dumps(canonical(value)), parse_int=float)


def plain_number(text: str) -> float:
    number = float(text)
    is_exact = number.is_integer() and abs(number) < 1 << 53
    return int(number) if is_exact else number


# ------------------------------------------------------------ to the CLI

# A conversation reaches the CLI in three ways, and the CLI changes what is odd in each
# (tests/README.md has the table, tests/test_repairs.py the proof):
#
# * with the transcript, which it takes as it is, but for `dropped_parts`;
# * as a user line, in which it scales images (`has_images`) and searches the end for
#   commands (ENDING_GUARD);
# * as the result of a call that waits, which it scales, cuts and words anew
#   (`mcp_result`).
#
# So only what arrives the same goes by the second and the third way, what the API would
# refuse is refused (`check_block`), and the rest is reported (`Request.not_sent`).

# Ends every user line: a text that ends it would otherwise be searched for /commands
# and @files (recording slash_command_unescaped).  The CLI drops it before the API call.
ENDING_GUARD = text_block("\n")
# The name of the MCP server that the bridge plays on the pipes of a process.
MCP_SERVER = "client"
# The envelope of each past answer in a transcript.
PAST_ANSWER = {
    "type": "message",
    # The CLI drops the thinking of any model but its own and this one.
    "model": "<synthetic>",
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 0, "output_tokens": 0},
}


# What the CLI says to the model of its own accord, as attachments of a conversation
# (from 2.1.285 on).  It says each again, after the newest message, unless it finds it in
# the conversation that it resumes.
ANNOUNCEMENTS = ("environment", "model", "session_context", "date")


def announcements(rows: bytes) -> list[Json]:
    """What the CLI announced in a conversation that it wrote to a file itself.  The
    text that names the model is emptied, and the CLI leaves out an empty one: the client's
    system prompt is alone in saying who the model is."""
    found = {}
    for text in rows.splitlines():
        for row in decode(text):
            attachment: Any = row.get("attachment")
            kind = get_str(attachment, "type")
            if kind in ANNOUNCEMENTS:
                if kind == "model":
                    attachment["text"] = ""
                found[kind] = attachment
    return list(found.values())


def transcript(
    messages: list[Message],
    model: str,
    announced: Iterable[Json] = (),
    session_id: str = "",
) -> list[bytes]:
    """A conversation as the CLI reads it with --resume: a chain of rows, one JSON
    object a line.

    The first row is one that the API does not see: without it the CLI refuses a
    conversation that has no message.  What the CLI has `announced` follows; to the API it
    sends that after the first message, in every request of a conversation.  The last row
    is an assistant message that the API does not see either (`isVirtual`), so that the
    CLI finds no turn that was interrupted; a process that was started without --model takes
    the `model` of the last assistant message.  The CLI takes over the `session_id`, a UUID,
    and names it in its requests to the API.
    """
    rows: list[Json] = [{"type": "system", "subtype": "informational", "content": ""}]
    rows += [{"type": "attachment", "attachment": item} for item in announced]
    last = {"role": "assistant", "content": [text_block("-")]}
    for message in [*messages, last]:
        role = message["role"]
        sent = {"role": role, "content": list(map(as_cli_sends, message["content"]))}
        row = {"type": role, "message": sent}
        if role == "assistant":
            # With apiBlockIndex, and CLAUDE_CODE_STELLAR_DRIFT, 2.1.330 keeps the order
            # of texts and tool calls.
            row["apiBlockIndex"] = 0
            # The CLI merges messages that share an id.
            sent |= PAST_ANSWER | {"id": f"msg_past_{len(rows)}"}
        rows.append(row)
    rows[-1]["isVirtual"] = True
    rows[-1]["message"]["model"] = model
    parent: str | None = None
    for number, row in enumerate(rows, start=1):
        own_id = str(uuid.UUID(int=number))
        row.update(
            uuid=own_id,
            parentUuid=parent,
            isSidechain=False,
            # 2.1.197 wants a time in every row; any will do.
            timestamp="2026-01-01T00:00:00.000Z",
        )
        if session_id:
            row["sessionId"] = session_id
        parent = own_id
    return list(map(json_line, rows))


# The blanks at the end of a line, which the CLI takes out of what is written to a file.
# The lookbehind is for speed: without it each blank of a run would be tried in turn.
TRAILING_BLANKS = re.compile(f"(?<![{BLANKS}])[{BLANKS}]++(?=[\r\n]|\\Z)")
# What an Edit holds, in the CLI's order.
EDIT_KEYS = ("replace_all", "file_path", "old_string", "new_string")


def cli_input(call: Block) -> Any:
    """The input of a tool call as the CLI itself sends it to the API, so that a rebuilt
    conversation has the bytes of the continued one.  It rewrites calls of tools that are
    named like its own; Claude Code does so as a client as well, and finds its process."""
    given = call.get("input")
    name = call.get("name") if call.get("type") == "tool_use" else ""
    match name, given:
        case "ExitPlanMode", dict():
            return without(given, {"plan", "planFilePath"})
        case "Edit", dict():
            whole = dict.fromkeys(EDIT_KEYS, False) | given
            # It leaves an Edit alone that has other keys, or lacks a text.
            if list(map(type, whole.values())) == [bool, str, str, str]:
                return whole
        case "Write", {"file_path": str(path), "content": str(content), **rest} if (
            not rest and not path.lower().endswith((".md", ".mdx"))
        ):
            return {"file_path": path, "content": TRAILING_BLANKS.sub("", content)}
    return given


def as_cli_sends(block: Block) -> Block:
    """A tool call, and the result of one, as the CLI itself sends them to the API when it
    made the call: the prompt cache compares bytes.  Other blocks stay as they are."""
    if block["type"] == "tool_use":
        return block | {"input": cli_input(block)}
    result = mcp_result(block)
    if not result:
        return block
    call, content = block["tool_use_id"], result["content"]
    if not result["isError"]:
        return {"tool_use_id": call, "type": "tool_result", "content": content}
    return {
        "type": "tool_result",
        "content": content[0]["text"],
        "is_error": True,
        "tool_use_id": call,
    }


def user_line(content: list[Block], turn_id: str, *, query: bool = True) -> bytes:
    """A user message, which starts a turn; without `query` it is only added to the
    conversation.  One without content starts a turn on what the process holds, and adds
    nothing.  `turn_id` is a UUID by which 2.1.330 says what its events answer."""
    event: Json = {
        "type": "user",
        "message": {
            "role": "user",
            "content": [*content, ENDING_GUARD] if content else [],
        },
        "uuid": turn_id,
        "session_id": "",
        "parent_tool_use_id": None,
    }
    if not query:
        event["shouldQuery"] = False
    return json_line(event)


def has_images(blocks: list[Block]) -> bool:
    """Whether there is an image by value among blocks, at any depth.  The CLI scales those
    that come in a line or as a tool's result, and keeps those of a transcript as they
    are."""
    return any(
        get_str(block, "type") == "image"
        and get_str(block.get("source"), "type") == "base64"
        for block in [*blocks, *nested_blocks(blocks)]
    )


def control_line(subtype: str, **fields: Any) -> bytes:
    """A request to the CLI itself.  At most one of each subtype is pending, so that is its
    id as well."""
    request = {"subtype": subtype} | fields
    return json_line(
        {"type": "control_request", "request_id": subtype, "request": request}
    )


def initialize_line(
    system: list[str], *, has_tools: bool, agent: bool = False
) -> bytes:
    """Gives a process its system prompt (an agent keeps its own before it) and, if
    there are tools, the name of their MCP server.  Never through argv: a single
    argument may hold 128 KiB at most."""
    fields: Json = {"hooks": None}
    if agent:
        fields["appendSystemPrompt"] = "\n\n".join(system)
    else:
        fields["systemPrompt"] = system or [""]
    if has_tools:
        fields["sdkMcpServers"] = [MCP_SERVER]
    return control_line("initialize", **fields)


def turn_environment(
    request: Request, *, has_listed_tools: bool = False
) -> dict[str, str]:
    """The environment that `apply_flag_settings` sets for a request; it counts from the
    next API call on (recording turn_settings).

    The CLI merges CLAUDE_CODE_EXTRA_BODY into the body of each API call, so the
    client's fields arrive as sent; the next value replaces them.  It adds
    ANTHROPIC_BETAS to its own betas, but keeps to those of a process's first call.  If
    the process has tools listed and the request has none, the body must say so.  An
    agent thinks as Claude Code does, if the request asks for thinking.
    """
    body = request.fields
    if request.is_agent:
        kind = get_str(body.get("thinking"), "type")
        return {
            "CLAUDE_CODE_DISABLE_THINKING": "1" if kind in ("", "disabled") else "0",
            # Only for a count, as the commands that an agent runs would log their calls too.
            "ANTHROPIC_LOG": "info" if request.is_count else "",
        }
    if has_listed_tools and not body.get("tools"):
        body = body | {"tools": []}
    return {
        "CLAUDE_CODE_EXTRA_BODY": orjson.dumps(body).decode(),
        "ANTHROPIC_BETAS": request.betas,
        "DISABLE_PROMPT_CACHING": "1" if request.caching == "client" else "",
        "FORCE_PROMPT_CACHING_5M": "1" if request.caching == "5m" else "",
        "ENABLE_PROMPT_CACHING_1H": "1" if request.caching == "1h" else "",
    }


def mcp_message(event: CliEvent) -> Json:
    """The message of a control request for the MCP server; else empty."""
    return as_object(as_object(event.get("request")).get("message"))


def tool_call_id(event: CliEvent) -> str:
    """The tool_use id of a control request that calls a client tool; else ""."""
    match mcp_message(event):
        case {
            "method": "tools/call",
            "params": {"_meta": {"claudecode/toolUseId": str(call)}},
        }:
            return call
    return ""


def control_answer(
    event: CliEvent, tools: list[Json], result: Json | None = None
) -> bytes:
    """The answer to a control request of the CLI.  An MCP request gets the tool's
    `result`, or what a server of `tools` says of itself (recording client_tool), or an
    empty result; any other request is refused."""
    message = mcp_message(event)
    match message:
        case {"method": "initialize", "params": {"protocolVersion": version}}:
            result = {
                "protocolVersion": version,
                "capabilities": {"tools": {}},
                "serverInfo": {"name": MCP_SERVER, "version": "1"},
            }
        case {"method": "tools/list"}:
            result = {"tools": tools}
    outcome: Json = {"subtype": "error", "error": "not supported"}
    if message:
        number = message.get("id", 0)
        answer = {"jsonrpc": "2.0", "id": number, "result": result or {}}
        outcome = {"subtype": "success", "response": {"mcp_response": answer}}
    response = {"request_id": event.get("request_id")} | outcome
    return json_line({"type": "control_response", "response": response})


def listed_tool(name: str) -> Json:
    """A tool as the CLI lists it for a turn: its name alone, since the API gets all of
    it as the client sent it."""
    return {
        "name": name,
        "inputSchema": {"type": "object"},
        "_meta": {
            # It cuts results at 50,000 characters; a large value here makes that 500,000.
            "anthropic/maxResultSizeChars": 1_000_000_000,
            # Else it would defer the tool.
            "anthropic/alwaysLoad": True,
        },
    }


def tools_for_turn(request: Request) -> list[Json]:
    """The tools of a request as the CLI lists them for a turn, with all that the
    conversation has called: a toolset that is newer than TOOLSETS has members that only
    the conversation names."""
    if not request.tool_names:
        return []
    called = [call["name"] for call in blocks_of_types(request.messages, ("tool_use",))]
    names = [*request.tool_names, *called]
    return [listed_tool(name) for name in dict.fromkeys(names)]


# Characters of a tool result that the CLI passes on whole with room to spare: its limit
# is 500,000.
MAX_RESULT = 400_000
# The same of an error, of which it cuts out the middle.
MAX_ERROR_RESULT = 10_000


def tool_results(content: list[Block]) -> dict[str, Json] | None:
    """The results in a user message, by call id, as MCP has them; None if only a fresh
    process can carry it (text beside the results, a document, a result that is too long).
    `check_pairs` and the digests have shown that they answer the calls of the process."""
    results = [(get_str(block, "tool_use_id"), mcp_result(block)) for block in content]
    return dict(results) if all(result for _, result in results) else None


def mcp_result(block: Block) -> Json:
    """A tool_result as MCP has it; empty: MCP has no place for all that it holds."""
    given = canonical(block)
    is_error = given.pop("is_error", False)
    texts = [get_str(part, "text") for part in as_list(given.get("content"))]
    parts = list(map(text_block, texts))
    call = given.get("tool_use_id")
    plain = {"type": "tool_result", "tool_use_id": call, "content": parts}
    # MCP has no place for other keys, and the CLI would scale other blocks.  It says in its
    # own words that a result is empty; by now that has no content.
    has_more = given != plain or type(is_error) is not bool
    # So it does with a blank text.
    is_reworded = any(map(is_blank, texts))
    limit = MAX_RESULT
    if is_error:
        # It joins the texts, and trims them.
        is_reworded |= texts != [text.strip(WHITE_SPACE) for text in texts[:1]]
        limit = MAX_ERROR_RESULT
    is_cut = sum(map(js_length, texts)) > limit
    if has_more or is_reworded or is_cut:
        return {}
    return {"content": parts, "isError": is_error}


# ------------------------------------------------------------ from the CLI

# How a line with an event of the stream begins.
STREAM_EVENT = b'{"type":"stream_event","event":'
# How the SDK inside the CLI logs a call of the API (ANTHROPIC_LOG=info).
API_CALL = re.compile(
    rb"\[log_[^]]*\] post \S+/v1/messages(/count_tokens)?\S* \w+(?: with status (\d{3}))?"
)


def decode(text: bytes) -> list[CliEvent]:
    """The event of one line of the CLI's output; empty: it is none.  A logged call
    of the API becomes an event `api_call`, whose `response` is the HTTP status (502: there
    was none); its subtype is `count` for one of count_tokens, else `message`.

    Raises ApiError when a part of the answer is lost.
    """
    value = parsed(text)
    if value is None:
        if call := API_CALL.match(text):
            kind = "count" if call[1] else "message"
            status = int(call[2] or 502)
            return [{"type": "api_call", "subtype": kind, "response": status}]
        value = parsed_with_lone_surrogates(text)
        if not value and text.startswith(STREAM_EVENT):
            raise cli_error("the claude CLI wrote a damaged line")
    # A shorter text has no room for so many pairs of brackets.
    if len(text) > 2 * MAX_DEPTH and is_deeper(value, MAX_DEPTH):
        raise cli_error("the claude CLI wrote JSON that is nested too deeply")
    return [value] if get_str(value, "type") else []


def parsed_with_lone_surrogates(text: bytes) -> Any:
    """The value of a JSON text with lone surrogates, as JavaScript leaves them where it
    cuts a text, with U+FFFD for each; None if it is no JSON."""
    try:
        value = json.dumps(json.loads(text), ensure_ascii=False)
        return orjson.loads(
            value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        )
    except (ValueError, RecursionError):
        return None


def control_outcome(event: CliEvent) -> str:
    """Of the answer to a control request: "success" or "error"; empty if it is none."""
    return get_str(event.get("response"), "subtype")


def control_result(event: CliEvent, subtype: str) -> Json:
    """What the CLI answered to a control request (`control_line`), if the event is that
    answer; else empty."""
    match event.get("response"):
        case {"request_id": given, "response": dict(answer)} if given == subtype:
            return answer
    return {}


# ------------------------------------------------------------ what the CLI reports of itself


@dataclass(frozen=True)
class Model:
    """A model that the CLI lists."""

    # Its alias, or its full name if it has none.
    name: str
    full_name: str
    title: str
    # What it supports, in the CLI's words.
    support: Json


@dataclass(frozen=True)
class CliInfo:
    """The CLI's answer to `initialize` (recordings accounts)."""

    # How it is logged in: where an API key or a token comes from, the plan of a
    # subscription, the name of a cloud; empty: nobody is.
    login: str = ""
    # It has an API key, of whatever source.
    has_api_key: bool = False
    # The API that it asks is a cloud's.
    is_cloud: bool = False
    # All that it reports of the account.
    account: Json = field(default_factory=dict)
    models: tuple[Model, ...] = ()

    @property
    def is_known(self) -> bool:
        """Whether the CLI has reported anything yet."""
        return bool(self.account)

    def full_name(self, name: str) -> str:
        """The full name of a model; a name that is not listed stays as it is."""
        for model in self.models:
            if name in (model.name, model.full_name):
                return model.full_name
        return name

    def takes_from_conversation(self, name: str) -> bool:
        """Whether a process that was started without --model takes this model from the
        conversation that it resumes.  Otherwise it silently runs its default.

        The CLI takes all models that it lists under an alias, except with a cloud's login
        (2.1.197, .285, .330 and .332).  It lists a model that the user has named under its
        full name alone.
        """
        listed = [item for item in self.models if item.name != item.full_name]
        is_listed = any(name in (item.name, item.full_name) for item in listed)
        return is_listed and not self.is_cloud


def read_info(answer: Json) -> CliInfo:
    account = as_object(answer.get("account"))
    key = get_str(account, "apiKeySource")
    token = get_str(account, "tokenSource")
    provider = get_str(account, "apiProvider")
    plan = get_str(account, "subscriptionType")
    has_api_key = key not in ("", "none")
    is_cloud = provider not in ("", "firstParty")
    login = plan or token or "claude.ai"
    if has_api_key:
        login = key
    elif is_cloud:
        login = provider
    elif not account or login == "none":
        login = ""
    models = tuple(
        Model(
            name=get_str(model, "value"),
            full_name=get_str(model, "resolvedModel"),
            title=get_str(model, "displayName"),
            support={key: model[key] for key in model if key.startswith("support")},
        )
        for model in as_list(answer.get("models"))
        if get_str(model, "value") and get_str(model, "resolvedModel")
    )
    return CliInfo(login, has_api_key, is_cloud, account, models)


# ------------------------------------------------------------ translation


# Where an answer stands, and what may follow by the grammar of the API's stream
# ("Streaming").  Once it has begun, one of these events that its state does not list fails
# the turn: the client gets a correct stream, or an error.  Events of other types pass.
# Handlers of the Translator put "hidden" in place of "block", and "working" or "done" in
# place of "ended".
NEXT = {
    # Nothing of it has come.
    "waiting": {"message_start": "open"},
    # Between the blocks of a message.
    "open": {
        "content_block_start": "block",
        "message_delta": "ended",
    },
    # Inside a block.
    "block": {
        "content_block_delta": "block",
        "content_block_stop": "open",
    },
    # Inside a block that is the CLI's own business.
    "hidden": {
        "content_block_delta": "hidden",
        "content_block_stop": "open",
    },
    # The message has its stop_reason, but not its message_stop.
    "ended": {"message_stop": "done"},
    # The CLI runs a tool of its own, and goes on in another message.
    "working": {
        "message_stop": "working",
        "message_start": "open",
    },
    "done": {},
}

# Counts of tokens that add up over the API calls of an agent's turn.
TOKENS = (
    "input_tokens",
    "output_tokens",
    "cache_creation_input_tokens",
    "cache_read_input_tokens",
)
# Delta type -> its key with a piece of a string.
PIECES = {
    "text_delta": "text",
    "thinking_delta": "thinking",
    "input_json_delta": "partial_json",
}
# Statuses after which the CLI may ask again with a changed request (2.1.332); after others
# it repeats the request as it is, or gives up.
CHANGED_RETRY_STATUSES = (400, 404, 413, 422)
# After these the CLI waits for the next user message, if the answer has a visible text.
# Otherwise it goes on by itself (recordings max_tokens, refusal).
WAITING_REASONS = ("end_turn", "stop_sequence", "pause_turn")
# What the CLI says after the API's message when it tries once more, without a part of the
# conversation that the API refused.
REMOVED = " and was removed"


# Endings of a model's name that do not change which model is meant: a date, a version at
# Vertex (@default), -latest or -0 for the newest one, the size of the context.
NAME_ENDING = re.compile(r"(@\w+|-\d{8}|-latest|-0)?(\[.*\])?$")
# How full names begin; aliases (sonnet, opus[1m]) do not.
FULL_NAME_PREFIX = "claude-"
# Aliases that are a part of the full names of their models.
FAMILIES = ("fable", "haiku", "opus", "sonnet")


def may_answer(answered: str, asked: str) -> bool:
    """Whether an answer may come from the model that was asked for.  An alias that the CLI
    does not list is compared by its family.  Names in a cloud's own form are not
    compared."""
    family = asked.partition("[")[0].lower()
    if family in FAMILIES and answered.startswith(FULL_NAME_PREFIX):
        return family in answered
    names = {NAME_ENDING.sub("", name) for name in (asked, answered)}
    return len(names) == 1 or not all(
        name.startswith(FULL_NAME_PREFIX) for name in names
    )


@dataclass
class Translator:
    """The events of one turn of the CLI in, the events of one Messages stream out.

    `feed` raises ApiError when the turn failed.  What it returned until then is in the order
    of the API's stream, whatever the CLI printed.
    """

    # The client's tools.
    tool_names: Collection[str] = ()
    # The CLI runs its own tools instead; their calls are left out of the answer.
    agent: bool = False
    turn_id: str = ""
    # The model that must answer; empty: any.
    model: str = ""

    # What follows is filled while the events come.
    state: str = "waiting"
    # What a client has assembled so far; filled by the first message_start.
    message: Json = field(default_factory=dict)
    # Set by the message_delta that ends the answer.
    stop_reason: str = ""
    # The turn's `result`, once it came.
    result: CliEvent | None = None
    # Calls of the API that the turn has taken.
    api_calls: int = 0
    # The version of the CLI, once it has reported it.
    cli_version: str = ""
    # By name, when the limits that refuse requests are reset, in epoch seconds; 0: not
    # known.
    _resets: dict[str, float] = field(default_factory=dict)
    # The failure of a turn that goes on after one of CHANGED_RETRY_STATUSES.
    _refusal: ApiError | None = None
    # Whether the events that come now are of this turn: from 2.1.330 on they name the
    # user lines that they answer; older versions name none.
    _is_ours: bool = True
    # The process may hold another answer than the client: a delta of a new type came, or it
    # has changed the input of a call.
    _differs: bool = False
    # The API message that is being received: its id and its usage.
    _message_id: str = ""
    _usage: Json = field(default_factory=dict)
    # That message has a visible text.
    _has_text: bool = False
    # By id, the inputs of tool calls as the process holds them.
    _held_inputs: Json = field(default_factory=dict)
    # Tokens of the API messages before it.
    _spent: Json = field(default_factory=dict)
    # The strings of the open block, in pieces, by the key of the delta (PIECES).
    _pieces: dict[str, list[str]] = field(default_factory=dict)
    # The fault of a tool input that is no JSON object.  The next block raises it, or the end
    # of the message, unless a stop_reason such as max_tokens explains it.
    _input_error: ApiError | None = None
    # The `assistant` event by which the CLI reports a failure.
    _synthetic: CliEvent | None = None

    @property
    def done(self) -> bool:
        return self.state == "done"

    @property
    def calls(self) -> list[Block]:
        """The calls of client tools in the answer."""
        return blocks_of_types([self.message], {"tool_use"})

    @property
    def process_waits(self) -> bool:
        """Whether the process now waits for tool results or the next user message, and
        holds the same answer as the client."""
        if self._differs or not self.message:
            return False
        names = {call["name"] for call in self.calls}
        if self.stop_reason == "tool_use":
            return bool(names) and names <= set(self.tool_names)
        return self.stop_reason in WAITING_REASONS and self._has_text and not names

    def feed(self, event: CliEvent) -> list[StreamEvent]:
        """Translate one event of the CLI; the list may be empty."""
        try:
            if self._is_next_delta(event):
                return self._block_delta(event["event"])
            return self._dispatch(event)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            message = "the claude CLI printed an event of an unknown shape"
            raise cli_error(f"{message} ({type(error).__name__})") from error

    def _is_next_delta(self, event: CliEvent) -> bool:
        """Whether it is the usual event, another piece of the open block.  `_dispatch`
        would do the same with it, in twice the time (tests/bench/relay.py)."""
        return (
            self.state == "block"
            and self._is_ours
            and event["type"] == "stream_event"
            and event["event"]["type"] == "content_block_delta"
            and event.get("parent_tool_use_id") is None
            and "user_message_uuids" not in event
        )

    def _dispatch(self, event: CliEvent) -> list[StreamEvent]:
        kind = event["type"]
        answers_to = event.get("user_message_uuids")
        if self.turn_id and isinstance(answers_to, list):
            self._is_ours = self.turn_id in answers_to
        if control_result(event, "initialize"):
            # With Bedrock the CLI has probed its models before: no calls of this turn.
            self.api_calls = 0
            self._refusal = None
        is_call = kind == "api_call" and event["subtype"] == "message"
        if is_call and not self.done:
            self.api_calls += 1
            status = event["response"]
            # A later status does not clear it: the next call may be logged before its
            # answer begins.  Calls of an agent's own tools say nothing of the answer.
            if status in CHANGED_RETRY_STATUSES and not self.agent:
                self._refusal = ApiError(
                    status,
                    "the API refused the request, and the claude CLI sent it again with"
                    " changes, as it does for thinking signatures and efforts",
                )
        for name, limit in rate_limits(event).items():
            self._resets.pop(name, None)
            if limit.status == "rejected":
                self._resets[name] = limit.resets_at or 0
        if event.get("subtype") == "init":
            self.cli_version = get_str(event, "claude_code_version")
        if not self._is_ours:
            return []  # of a turn that the CLI made by itself
        if kind == "result":
            return self._end_turn(event)
        if self.done or event.get("parent_tool_use_id") is not None:
            return []  # after the answer, or a subagent's
        if kind == "stream_event":
            return self._stream_event(event["event"])
        if kind == "assistant":
            self._assistant(event)
        if control_outcome(event) == "error":
            message = "the claude CLI refused a control request"
            reason = f"{message}: {event['response'].get('error')}"
            raise ApiError(502, reason, log_reason=message)
        return []

    # The events of a stream

    def _stream_event(self, event: Json) -> list[StreamEvent]:
        kind = event["type"]
        if kind == "message_delta" and not get_str(event.get("delta"), "stop_reason"):
            return []  # an interrupted answer ends so (recording interrupt of 2.1.330)
        following = NEXT[self.state].get(kind)
        if following is None:
            if kind == "error":
                raise stream_error(event.get("error"))
            if self.state == "waiting":
                return []  # of a message that began before the turn
            if kind in self.HANDLERS:
                raise cli_error(f"the claude CLI sent a {kind} out of place")
            if kind == "message_stop":
                if self._synthetic:
                    return []  # the `result` has the API's message (mid_stream_error)
                message = "The API ended the answer before it was complete."
                raise ApiError(502, message, "api_error")
            # Passed on unread, if its type can stand in a line of the stream.
            is_seen = self.state not in ("hidden", "working")
            return [event] if is_seen and kind and kind.isprintable() else []
        before, self.state = self.state, following
        if before == "hidden":
            return []
        if kind == "message_stop":
            return [event] if self.done else []
        return self.HANDLERS[kind](self, event)

    def _message_start(self, event: Json) -> list[StreamEvent]:
        given = event["message"]
        self._message_id = given["id"]
        self._has_text = False
        # SDKs add up its two main counts, so both are there.
        self._usage = {"input_tokens": 0, "output_tokens": 0}
        self._usage |= without_empties(given.get("usage") or {})
        if self.agent:
            # Its calls are not logged (`turn_environment`).
            self.api_calls += 1
            # Only these can be added up.
            self._usage = {name: self._usage.get(name, 0) for name in TOKENS}
        if self._refusal:
            raise self._refusal
        if self.message:  # an agent's answer goes on in another API message
            return []
        if not may_answer(given["model"], self.model):
            message = f"the claude CLI used {given['model']} instead of {self.model}"
            raise cli_error(message)
        started = without_empties(given) | {
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage,
        }
        # A copy: what was returned does not change while the answer grows.
        self.message = started | {"content": []}
        return [event | {"message": started}]

    def _block_start(self, event: Json) -> list[StreamEvent]:
        if self._input_error:
            raise self._input_error
        given = event["content_block"]
        if given["type"] == "tool_use" and self.agent:
            self.state = "hidden"
            return []
        block = without_nulls(given)
        self.message["content"].append(block.copy())
        index = len(self.message["content"]) - 1
        self._pieces = {}
        return [event | {"index": index, "content_block": block}]

    def _block_delta(self, event: Json) -> list[StreamEvent]:
        delta = event["delta"]
        block = self.message["content"][-1]
        kind = delta["type"]
        if name := PIECES.get(kind):
            self._pieces.setdefault(name, []).append(delta[name])
        elif kind == "citations_delta":
            block["citations"] = [*block.get("citations", ()), delta["citation"]]
        else:  # its keys are those of the block, as in a signature: the last counts (SDK)
            block |= without(delta, {"type"})
            self._differs |= kind != "signature_delta"
        return [event | {"index": len(self.message["content"]) - 1}]

    def _block_stop(self, event: Json) -> list[StreamEvent]:
        block = self.message["content"][-1]
        for name, pieces in self._pieces.items():
            text = "".join(pieces)
            if name != "partial_json":
                block[name] = block.get(name, "") + text
            elif text:
                given = parsed(text)
                # It stands some levels deeper in the request that echoes it.
                if isinstance(given, dict) and not is_deeper(given, MAX_DEPTH // 2):
                    block["input"] = given
                else:
                    self._input_error = cli_error(
                        "the model's tool input is not a JSON object, or is nested too deeply"
                    )
        self._has_text |= not is_blank(get_str(block, "text"))
        return [event | {"index": len(self.message["content"]) - 1}]

    def _message_delta(self, event: Json) -> list[StreamEvent]:
        ends: Json = {"stop_sequence": None} | without_empties(event["delta"])
        reason = ends["stop_reason"]
        if self._input_error and reason in ("tool_use", *WAITING_REASONS):
            raise self._input_error
        # Cumulative over its message (API).
        counts: Json = {"output_tokens": self._usage["output_tokens"]}
        counts |= without_empties(event.get("usage") or {})
        if self.agent:
            total = self._usage | counts
            counts = {name: total[name] + self._spent.get(name, 0) for name in TOKENS}
            self._spent = counts
        if reason == "tool_use" and self.agent:
            self.state = "working"
            return []
        last = without_empties(event) | {"delta": ends, "usage": counts}
        self.stop_reason = reason
        self.message |= ends | without(last, {"type", "delta"})
        self.message["usage"] = self._usage | counts
        self._differs |= not all(map(self._is_held, self.calls))
        if self.process_waits:
            return [last]
        # The CLI would call the API once more: the answer ends here.
        self.state = "done"
        return [last, {"type": "message_stop"}]

    def _assistant(self, event: CliEvent) -> None:
        """An `assistant` event repeats content that was streamed, as the process holds it.
        One that does not is a failure: a text that the CLI made up, or an answer that the API
        refused to stream.  An event of another shape says nothing."""
        message: Any = event.get("message")
        identity = get_str(message, "id")
        if get_str(message, "model") == "<synthetic>":
            self._synthetic = event
            blocks = as_blocks(message.get("content"))
            text = "".join(get_str(block, "text") for block in blocks)
            has_removal = f"could not be processed{REMOVED}" in text
            if has_removal or get_str(event, "api_error") == "media_removed":
                message = text.removeprefix("API Error: ").partition(REMOVED)[0]
                raise ApiError(400, message, log_reason="")
        elif self.state in ("waiting", "working") and identity != self._message_id:
            message = "The API refused to stream its answer."
            raise self._refusal or ApiError(502, message, "api_error")
        for block in as_list(as_object(message).get("content")):
            if get_str(block, "type") == "tool_use":
                self._held_inputs[get_str(block, "id")] = block.get("input")

    def _is_held(self, call: Block) -> bool:
        """Whether the process holds the same input of a call as the client.  The CLI changes
        some, most of them of tools that are named like its own."""
        given = call.get("input")
        held = self._held_inputs.get(call["id"], given)
        if orjson.dumps(held) == orjson.dumps(given):
            return True
        return digest(as_javascript(call | {"input": held})) == digest(
            as_javascript(call)
        )

    HANDLERS: ClassVar = {
        "message_start": _message_start,
        "content_block_start": _block_start,
        "content_block_delta": _block_delta,
        "content_block_stop": _block_stop,
        "message_delta": _message_delta,
    }

    # The end of a turn

    def _end_turn(self, result: CliEvent) -> list[StreamEvent]:
        if self.done:
            self.result = self.result or result
            return []
        if self.state == "ended":  # only the message_stop got lost
            self.result = result
            self.state = "done"
            return [{"type": "message_stop"}]
        if result.get("is_error"):
            resets_at = max(self._resets.values(), default=0) or None
            raise result_error(result, self._synthetic, resets_at)
        if not self.message:
            return []  # not this turn's: of a background task, or of a line that asked nothing
        raise cli_error("the claude CLI ended the turn before the answer was complete")


def stream_error(error: Any) -> ApiError:
    """The failure that an `error` event in a stream reports."""
    message = get_str(error, "message") or "The API ended the answer with an error."
    error_type = get_str(error, "type")
    return ApiError(
        STATUS_OF_TYPE.get(error_type, 502),
        message,
        error_type or "api_error",
        is_from_api=True,
        log_reason="",
    )


# ------------------------------------------------------------ frames


def frame(event: StreamEvent) -> bytes:
    """One server-sent event."""
    data = orjson.dumps(event)
    # Some clients split lines at U+2028, U+2029 and U+0085 (LiteLLM).
    data = data.replace(b"\xe2\x80\xa8", b"\\u2028")
    data = data.replace(b"\xe2\x80\xa9", b"\\u2029")
    data = data.replace(b"\xc2\x85", b"\\u0085")
    return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), data)


PING = frame({"type": "ping"})


# ------------------------------------------------------------ rate limits

# The names of limits in the API's headers, by their names in the CLI's events (its
# program text).
LIMIT_NAMES = {
    "five_hour": "5h",
    "seven_day": "7d",
    "seven_day_opus": "7d_opus",
    "seven_day_sonnet": "7d_sonnet",
    "seven_day_overage_included": "7d_oi",
    "overage": "overage",
}


@dataclass(frozen=True)
class RateLimit:
    """What the CLI reported last of a limit of the account."""

    # "allowed", "allowed_warning" or "rejected".
    status: str
    # The epoch second at which it is reset; None: not known.
    resets_at: float | None
    # How much of it is used: 1.0 is all.
    utilization: float | None


def rate_limits(event: CliEvent) -> dict[str, RateLimit]:
    """The limits that a `rate_limit_event` reports, by name; the one that it is about
    comes last (recordings quota_allowed, quota_warning, quota_rejected)."""
    info = as_object(event.get("rate_limit_info"))
    if event["type"] != "rate_limit_event" or not info:
        return {}
    windows = as_object(info.get("unifiedWindows"))
    limits = {key: value for key, value in windows.items() if isinstance(value, dict)}
    name = get_str(info, "rateLimitType") or "unknown"
    limits[name] = limits.pop(name, {}) | info
    return {
        key: RateLimit(
            status=get_str(window, "status"),
            resets_at=get_number(window, "resetsAt"),
            utilization=get_number(window, "utilization"),
        )
        for key, window in limits.items()
    }


def get_number(value: Json, key: str) -> float | None:
    number = value.get(key)
    return number if isinstance(number, int | float) else None


def quota_headers(limits: Mapping[str, RateLimit]) -> list[tuple[str, str]]:
    """The API's `anthropic-ratelimit-unified-*` headers.

    The limit that was reported last of all is the one that `-status`, `-reset` and
    `-representative-claim` speak of.
    """
    headers: dict[str, str] = {}
    for name, limit in limits.items():
        short = LIMIT_NAMES.get(name)
        reset = "" if limit.resets_at is None else f"{limit.resets_at:.0f}"
        used = "" if limit.utilization is None else f"{limit.utilization:g}"
        headers["status"] = limit.status
        headers["reset"] = reset
        headers["representative-claim"] = name if short else ""
        if short:
            headers[f"{short}-status"] = limit.status
            headers[f"{short}-reset"] = reset
            headers[f"{short}-utilization"] = used
    # A value that is empty, or cannot stand in a header, is not sent: `header_safe` would
    # change both.
    return [
        (f"anthropic-ratelimit-unified-{name}", value)
        for name, value in headers.items()
        if header_safe(value) == value
    ]


# ------------------------------------------------------------ appendix: counting


def is_custom(tool: Json) -> bool:
    """Whether a client defines the tool itself."""
    return tool.get("type") in (None, "custom")


def tools_for_count(request: Request) -> list[Json]:
    """The tools of a request as the CLI lists them for a count of tokens, which counts
    exactly what is listed."""
    return [
        listed_tool(get_str(tool, "name"))
        | {
            "description": get_str(tool, "description"),
            "inputSchema": as_object(tool.get("input_schema")) or {"type": "object"},
        }
        for tool in filter(is_custom, request.fields.get("tools") or [])
    ]


# Characters of a tool's description that every CLI counts: 2.1.197 so many, 2.1.332 twice
# as many.
MAX_COUNTED_DESCRIPTION = 2048


def not_counted(request: Request) -> list[str]:
    """The fields and places of a request that a count leaves out: the CLI counts
    messages, the system prompt, and tools that a client defines."""
    names = ("container", "mcp_servers", "output_config", "tool_choice")
    left_out = [name for name in names if request.fields.get(name)]
    for number, tool in enumerate(request.fields.get("tools") or []):
        if not is_custom(tool):
            left_out.append(f"tools.{number}")
        elif js_length(get_str(tool, "description")) > MAX_COUNTED_DESCRIPTION:
            left_out.append(f"tools.{number}.description")
    return left_out
