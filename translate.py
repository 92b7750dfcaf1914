"""Pure rules between the Messages API and the claude CLI: no I/O, no clock.

The file follows the order of a turn: errors, validation of a request, fingerprints of a conversation, the lines that
go to the CLI, and the translation of the CLI's events into the events of a Messages stream.  "API" names a rule of
the Messages API; a name such as `max_tokens` after "recording" names a file in tests/fixtures that shows the rule.
"""

import binascii
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import orjson

Json = dict[str, Any]  # a JSON object whose keys are checked where they are used

# ---------------------------------------------------------------- errors

# HTTP status -> error.type, as the SDKs map it (API: "Errors"); others are by their hundred.
ERROR_TYPES = {401: "authentication_error", 402: "billing_error", 403: "permission_error", 404: "not_found_error"}
ERROR_TYPES |= {408: "timeout_error", 409: "conflict_error", 413: "request_too_large", 429: "rate_limit_error"}
ERROR_TYPES |= {502: "claude_cli_error", 504: "timeout_error", 529: "overloaded_error"}
# A status that a second try cannot mend: the SDKs retry 5xx twice unless told not to.
FINAL_STATUSES = {400, 401, 402, 403, 404, 405, 413, 415, 431}
LOGIN_CURE = "run the CLI that the bridge named at its start in a terminal, and log in with /login"


@dataclass(eq=False)
class ApiError(Exception):
    """A failure as a Messages client sees it: an HTTP status and an error object."""

    status: int
    message: str
    kind: str = ""  # error.type; by default the status's
    details: Json | None = None  # error.details
    retry_after: int | None = None  # seconds
    resets_at: float | None = None  # epoch second from which a rate limit allows requests again

    def __post_init__(self) -> None:
        super().__init__(self.message)
        general = "api_error" if self.status >= 500 else "invalid_request_error"
        self.kind = self.kind or ERROR_TYPES.get(self.status, general)
        self.retry = self.status not in FINAL_STATUSES

    def body(self, request_id: str) -> Json:
        """The API's error envelope; as a stream event it is the `error` event."""
        error: Json = {"type": self.kind, "message": self.message}
        if self.details:
            error["details"] = self.details
        return {"type": "error", "error": error, "request_id": request_id}


def cli_error(message: str) -> ApiError:  # a failure of the CLI itself, not of the API behind it
    return ApiError(502, message)


def result_error(result: Json, resets_at: float | None = None) -> ApiError:
    """The error that a `result` event with `is_error` stands for.

    The CLI writes `subtype: success` on failures as well, so only `is_error`, `api_error_status` and the text count
    (recordings error_401, error_429, error_529, not_logged_in).  The text is passed on as it is.
    """
    errors = result.get("errors")
    text = result.get("result") or ("; ".join(map(str, errors)) if isinstance(errors, list) else "")
    text = str(text) or "the claude CLI ended the turn with an error"
    status = result.get("api_error_status")
    if not isinstance(status, int) or not 400 <= status <= 599:
        # The CLI's own verdicts carry no status (recordings not_logged_in, mid_stream_error of 2.1.197).
        verdicts = (("Not logged in", 401), ("Prompt is too long", 400), ("API Error: Overloaded", 529))
        status = next((code for words, code in verdicts if text.startswith(words)), 502)
    if status == 401:
        return ApiError(401, f"{text} (the claude CLI is not logged in: {LOGIN_CURE})")
    return ApiError(status, text, resets_at=resets_at if status == 429 else None)


# ---------------------------------------------------------------- validation of a request

# A model name ends up in the CLI's argv: what begins with a dash would be a flag.  Brackets, slashes, colons and @
# occur in real names (sonnet[1m], Bedrock ARNs, Vertex versions).
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@\[\]-]{0,255}")
MODEL_PREFIX = "claude-cli/"
# Body fields that reach the API as sent, per request, merged over the CLI's own body (recording turn_settings).
BODY_FIELDS = {"max_tokens", "temperature", "top_p", "top_k", "stop_sequences", "thinking"}
BODY_FIELDS = {*BODY_FIELDS, "output_config", "service_tier"}
TOOL_PREFIX = "mcp__client__"
THREAD_UNSUPPORTED = "thread_unsupported_request"
BILLING_LINE = "x-anthropic-billing-header:"  # Claude Code's first system block: a hash that changes with every request


class Tagged(dict[str, Any]):
    """A shape chosen by the value's `type`."""


# Shapes: a type, a tuple of allowed values, [shape of the items], {key: shape} with `?` after optional keys, Tagged, or
# `bytes` for base64 text.  Keys that are not named may hold anything (API: clients send betas and new fields).
STRING_OR_BLOCKS = object()
TEXT = {"text": str}
IMAGE = {"source": Tagged(base64={"media_type": ("image/jpeg", "image/png", "image/gif", "image/webp"), "data": bytes})}
PDF = {"media_type": ("application/pdf",), "data": bytes}
DOCUMENT = {"source": Tagged(base64=PDF, text={"data": str}, content={"content": STRING_OR_BLOCKS}), "title?": str}
SEARCH_RESULT = {"source": str, "title": str, "content": [Tagged(text=TEXT)]}
INNER_BLOCKS = Tagged(text=TEXT, image=IMAGE, document=DOCUMENT, search_result=SEARCH_RESULT)
THINKING = {"thinking": str, "signature": str}
TOOL_USE = {"id": str, "name": str, "input": dict}
TOOL_RESULT = {"tool_use_id": str, "content?": STRING_OR_BLOCKS, "is_error?": bool}
BLOCKS = {
    "user": Tagged(INNER_BLOCKS, tool_result=TOOL_RESULT),
    "assistant": Tagged(text=TEXT, thinking=THINKING, redacted_thinking={"data": str}, tool_use=TOOL_USE),
    "system": Tagged(text=TEXT),
}
EFFORTS = ("low", "medium", "high", "xhigh", "max")
REQUEST = {
    **{"model": str, "max_tokens": int, "messages": list, "stream?": bool, "metadata?": dict, "tools?": [dict]},
    **{"temperature?": float, "top_p?": float, "top_k?": int, "stop_sequences?": [str]},
    "service_tier?": ("auto", "standard_only"),
    "thinking?": Tagged(enabled={"budget_tokens": int}, adaptive={}, disabled={}, between_tools={}),
    "output_config?": {"effort?": EFFORTS, "format?": Tagged(json_schema={"schema": dict})},
    "tool_choice?": Tagged(auto={}, any={}, none={}, tool={"name": str}),
}
TYPE_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "list", dict: "object"}
TOOL = {"name": str, "description?": str, "input_schema": {"type": ("object",)}}  # the CLI lists no tool without a type
TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")
# Fields whose loss would change the answer and that the CLI cannot be made to honour.
DECLINED = {"mcp_servers": "not connected by this bridge", "container": "not available through this bridge"}


def bad(place: str, message: str) -> ApiError:
    return ApiError(400, f"{place}: {message}")


def check(value: Any, shape: Any, place: str) -> None:
    """Raise ApiError 400, in the API's wording and with the place, unless `value` has the shape."""
    if isinstance(shape, Tagged):
        check(value, dict, place)
        tag = value.get("type")
        if tag in ("url", "file") and place.endswith(".source"):
            raise bad(place, f"{tag} sources are not fetched by this bridge: send the data itself")
        if not isinstance(tag, str) or tag not in shape:
            tags = ", ".join(repr(name) for name in shape)
            wrong = f"Input tag {tag!r} found using 'type' does not match any of the expected tags: {tags}"
            raise bad(*((f"{place}.type", "Field required") if tag is None else (place, wrong)))
        check(value, shape[tag], f"{place}.{tag}")
    elif isinstance(shape, dict):
        check(value, dict, place)
        for name, inner in shape.items():
            key = name.removesuffix("?")
            where = f"{place}.{key}".lstrip(".")
            if value.get(key) is not None:
                check(value[key], inner, where)
            elif key == name:
                raise bad(where, "Field required")
    elif isinstance(shape, list):
        check(value, list, place)
        for number, item in enumerate(value):
            check(item, shape[0], f"{place}.{number}")
    elif isinstance(shape, tuple):
        if value not in shape:
            raise bad(place, f"Input should be {' or '.join(map(repr, shape))}")
    elif shape is STRING_OR_BLOCKS:
        if not isinstance(value, str):
            check(value, [INNER_BLOCKS], place)
    elif shape is bytes:
        check(value, str, place)
        try:
            valid = bool(binascii.a2b_base64(value, strict_mode=True))
        except ValueError:
            valid = False
        if not valid:
            raise bad(place, "Input should be valid base64")
    elif type(value) not in ((int, float) if shape is float else (shape,)):
        raise bad(place, f"Input should be a valid {TYPE_NAMES[shape]}")


@dataclass(slots=True)
class Request:
    """A valid Messages request, in the form that the rest of the bridge works with."""

    model: str  # as the CLI gets it: without a leading claude-cli/
    system: list[str]  # the texts of the system prompt; empty: none
    messages: list[Json]  # {"role", "content": [blocks]}; roles alternate, the last one is the user's
    stream: bool
    tools: list[Json]  # as the CLI lists them (MCP)
    settings: dict[str, str]  # environment settings of the CLI for this turn
    parts: dict[str, bytes]  # digests of model, system and tools: what cannot change without a new process
    sent_parts: dict[str, bytes]  # those of them that the client sent


def parse_request(body: bytes, *, max_depth: int = 200, max_messages: int = 100_000, **defaults: int) -> Request:
    """Check the body of POST /v1/messages and bring it into one form; `defaults` fill fields that are missing.

    Raises ApiError 400 in the API's wording for whatever the API would refuse, or what the CLI cannot be made to do.
    """
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"The request body is not valid JSON: {error}") from None
    if is_deeper(data, max_depth):
        raise ApiError(400, f"The request body is not valid JSON: it is nested more than {max_depth} levels deep")
    if not isinstance(data, dict):
        raise ApiError(400, "The request body is not a JSON object.")
    if data.get("thread") is not None:
        # SDKs fall back to the full history only on this error_code (anthropic lib/threads/_thread_state.py).
        raise ApiError(400, "thread: not supported by this bridge", details={"error_code": THREAD_UNSUPPORTED})
    data = {**defaults, **data}
    check(data, REQUEST, "")
    if len(data["messages"]) > max_messages:
        raise bad("messages", f"List should have at most {max_messages} items")
    for name, reason in DECLINED.items():
        if data.get(name):
            raise bad(name, reason)
    check_ranges(data)
    model = data["model"].removeprefix(MODEL_PREFIX)
    if not MODEL_NAME.fullmatch(model):
        raise bad("model", "String should be a model name: letters, digits and . _ : / @ [ ] -, not beginning with -")
    system = system_texts(data.get("system"))
    tools = listed_tools(data.get("tools") or [])
    parts = {"model": digest(model), "system": digest(system), "tools": digest(tools)}
    sent = {name: parts[name] for name in parts if data.get(name) is not None}
    messages = normal_messages(data["messages"])
    return Request(model, system, messages, bool(data.get("stream")), tools, turn_settings(data), parts, sent)


def is_deeper(value: Any, levels: int) -> bool:
    inner = [value]
    while inner and levels >= 0:
        levels -= 1
        nested = [item for item in inner if isinstance(item, dict | list)]
        inner = [child for item in nested for child in (item.values() if isinstance(item, dict) else item)]
    return bool(inner)


def check_ranges(data: Json) -> None:
    for name, least in (("max_tokens", 1), ("top_k", 0)):
        if (data.get(name) or 0) < least:
            raise bad(name, f"Input should be greater than or equal to {least}")
    for name in ("temperature", "top_p"):
        if not 0 <= (data.get(name) or 0) <= 1:
            raise bad(name, "range: 0..1")
    if "" in (data.get("stop_sequences") or []):
        raise bad("stop_sequences", "each stop sequence must be non-empty")
    thinking = data.get("thinking")
    if thinking and thinking["type"] == "enabled":
        budget = thinking["budget_tokens"]
        if budget < 1024:
            raise bad("thinking.enabled.budget_tokens", "Input should be greater than or equal to 1024")
        if budget >= data["max_tokens"]:
            raise ApiError(400, "`max_tokens` must be greater than `thinking.budget_tokens`.")


def listed_tools(tools: list[Json]) -> list[Json]:
    """The request's client tools as an MCP server lists them: schemas verbatim, in their order (API: "tools").

    `_meta` lifts the CLI's limit on results from 50,000 to 500,000 characters, and keeps the tool from being deferred.
    """
    listed: dict[str, Json] = {}
    for number, tool in enumerate(tools):
        if tool.get("type") not in (None, "custom"):
            raise bad(f"tools.{number}", f"{tool['type']!r} tools are not available through this bridge")
        check(tool, TOOL, f"tools.{number}")
        if not TOOL_NAME.fullmatch(tool["name"]):
            raise bad(f"tools.{number}.name", f"String should match pattern '^{TOOL_NAME.pattern}$'")
        if tool["name"] in listed:
            raise bad("tools", "Tool names must be unique.")
        listed[tool["name"]] = {
            "name": tool["name"],
            "description": tool.get("description") or "",
            "inputSchema": tool["input_schema"],
            "_meta": {"anthropic/maxResultSizeChars": 1_000_000_000, "anthropic/alwaysLoad": True},
        }
    return list(listed.values())


def system_texts(system: Any) -> list[str]:
    """The texts of `system`: a string or text blocks (API)."""
    blocks = [{"type": "text", "text": system}] if isinstance(system, str) else [] if system is None else system
    check(blocks, [BLOCKS["system"]], "system")
    return [block["text"] for block in blocks if block["text"] and not block["text"].startswith(BILLING_LINE)]


def normal_messages(messages: list[Any]) -> list[Json]:
    """The messages as block lists of alternating roles, without keys that carry nothing (null; `cache_control`: the CLI
    sets its own cache breakpoints and the API allows four).

    Raises ApiError 400 in the API's wording, with the index of the message as the client numbered it.
    """
    if not messages:
        raise bad("messages", "at least one message is required")
    merged: list[Json] = []
    places: list[list[str]] = []  # of each block
    for number, message in enumerate(messages):
        place = f"messages.{number}"
        blocks = message_blocks(message, place)
        role = message["role"]
        if role == "system":
            check_system_place(messages, number)
            # Claude Code ends its requests with one; the CLI's input knows the user's and the assistant's only.
            text = "\n".join(block["text"] for block in blocks)
            role, blocks = "user", [{"type": "text", "text": f"<system-reminder>\n{text}\n</system-reminder>"}]
        homes = [f"{place}.content.{n}" for n in range(len(blocks))]
        if merged and merged[-1]["role"] == role:  # API: consecutive turns of one role are one turn
            merged[-1]["content"] += blocks
            places[-1] += homes
        else:
            merged.append({"role": role, "content": blocks})
            places.append(homes)
    check_pairs(merged, places)
    if merged[-1]["role"] == "assistant":
        words = "This model does not support assistant message prefill. The conversation must end with a user message."
        raise ApiError(400, words)
    return merged


def message_blocks(message: Any, place: str) -> list[Json]:
    check(message, {"role": str}, place)
    role, content = message["role"], message.get("content")
    if role not in BLOCKS:
        raise bad(f"{place}.role", "Input should be 'user' or 'assistant'")
    if content is None:
        raise bad(f"{place}.content", "Field required")
    if content in ("", []):
        words = "all messages must have non-empty content except for the optional final assistant message"
        raise bad(place, words)
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    check(blocks, [BLOCKS[role]], f"{place}.content")
    for block in blocks:
        if block["type"] == "text" and not block["text"].strip():
            words = "contain non-whitespace text" if block["text"] else "be non-empty"
            raise bad("messages", f"text content blocks must {words} ({place})")
    return [bare(block) for block in blocks]


def bare(block: Json) -> Json:
    """A content block, and those in its content, without null keys and `cache_control`."""
    kept = {key: value for key, value in block.items() if value is not None and key != "cache_control"}
    if kept["type"] == "tool_result" and isinstance(kept.get("content"), list):
        kept["content"] = [bare(inner) for inner in kept["content"]]
    if kept["type"] == "document" and isinstance(kept["source"].get("content"), list):
        kept["source"] = {**kept["source"], "content": [bare(inner) for inner in kept["source"]["content"]]}
    return kept


def check_system_place(messages: list[Any], number: int) -> None:
    """API: a system message follows a user turn, and precedes an assistant turn or ends the array."""
    if number == 0:
        words = 'The Messages API accepts a top-level `system` parameter, not "system" as an input message role.'
        raise bad("messages", f'Unexpected role "system". {words}')
    after = messages[number + 1] if number + 1 < len(messages) else {"role": "assistant"}
    if messages[number - 1]["role"] != "user" or not isinstance(after, dict) or after.get("role") != "assistant":
        words = "role 'system' must follow a user turn, and precede an 'assistant' message or end the array"
        raise bad(f"messages.{number}", words)


def check_pairs(messages: list[Json], places: list[list[str]]) -> None:
    """API: each tool_use is answered in the next message, each tool_result answers a tool_use of the previous one."""
    called: list[str] = []
    seen: list[str] = []
    for message, homes in zip(messages, places, strict=True):
        blocks = enumerate(message["content"])
        results = {n: block["tool_use_id"] for n, block in blocks if block["type"] == "tool_result"}
        for number, tool_id in results.items():
            if tool_id not in called:
                words = f"unexpected `tool_use_id` found in `tool_result` blocks: {tool_id}. Each `tool_result` block "
                words += "must have a corresponding `tool_use` block in the previous message."
                raise bad(homes[number], words)
        missing = [tool_id for tool_id in called if tool_id not in results.values()]
        if missing:
            words = f"`tool_use` ids were found without `tool_result` blocks immediately after: {', '.join(missing)}. "
            words += "Each `tool_use` block must have a corresponding `tool_result` block in the next message."
            raise bad(homes[0].partition(".content.")[0], words)
        called = [block["id"] for block in message["content"] if block["type"] == "tool_use"]
        seen += called
    if len(seen) > len(set(seen)):
        raise bad("messages", "`tool_use` ids must be unique")


def turn_settings(data: Json) -> dict[str, str]:
    """The request's parameters as an environment setting of the CLI, which merges them over the body of its API calls
    (recording turn_settings): from the next call on, and gone with the next value."""
    body = {name: data[name] for name in data if name in BODY_FIELDS and data[name] not in (None, [])}
    choice = data.get("tool_choice")
    if choice and data.get("tools"):
        body["tool_choice"] = {**choice, "name": TOOL_PREFIX + choice["name"]} if choice["type"] == "tool" else choice
    return {"CLAUDE_CODE_EXTRA_BODY": orjson.dumps(body).decode()}


# ---------------------------------------------------------------- fingerprints

# Block type -> the keys that say something.  Clients add, drop and reorder the others when they echo a block.
MEANING = {
    "text": ("text",),
    "image": ("source",),
    "document": ("source", "title", "context"),
    "search_result": ("source", "title", "content"),
    "tool_use": ("id", "name", "input"),
    "tool_result": ("tool_use_id", "content", "is_error"),
}


def digest(value: Any) -> bytes:
    """A 16-byte digest of a JSON value that does not depend on the order of keys."""
    return hashlib.blake2b(orjson.dumps(value, option=orjson.OPT_SORT_KEYS), digest_size=16).digest()


def extend(chain: bytes, messages: Iterable[Json]) -> bytes:
    """The digest of a conversation that goes on from `chain` (b"": its start) with `messages`."""
    for message in messages:
        canonical = [message["role"], canonical_blocks(message["role"], message["content"])]
        chain = hashlib.blake2b(chain + digest(canonical), digest_size=16).digest()
    return chain


def canonical_blocks(role: str, blocks: list[Json]) -> list[list[Any]]:
    """Blocks without what clients change when they echo them: thinking is dropped, unknown and null keys vanish, and an
    assistant's neighbouring texts are one text without white space at its ends."""
    canonical: list[list[Any]] = []
    for block in blocks:
        kind = block["type"]
        if kind not in MEANING:  # thinking, redacted_thinking
            continue
        if role == "assistant" and kind == "text":
            if canonical and canonical[-1][0] == "text":
                canonical[-1][1] += block["text"]
            else:
                canonical.append(["text", block["text"]])
            continue
        canonical.append([kind, *(canonical_value(key, block.get(key)) for key in MEANING[kind])])
    if role == "assistant":
        stripped = [[part[0], part[1].strip()] if part[0] == "text" else part for part in canonical]
        canonical = [part for part in stripped if part != ["text", ""]]
    return canonical


def canonical_value(key: str, value: Any) -> Any:
    if key == "content":
        return canonical_blocks("user", as_blocks(value)) or None
    return value or None if key == "is_error" else value


# ---------------------------------------------------------------- lines to the CLI

# Ends every user content: a text that ends it would otherwise be searched for /commands and @files (recording
# slash_command_unescaped).  The CLI drops it before the API call.
GUARD: Json = {"type": "text", "text": "\n"}


def line(value: Json) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)


def user_line(content: list[Json], *, query: bool = True) -> bytes:
    """A user message; without `query` it is added to the conversation and answered by a `result` of no turns."""
    more = {} if query else {"shouldQuery": False}
    return message_line("user", {"role": "user", "content": [*content, GUARD]}, **more)


def message_line(kind: str, message: Json, **more: Any) -> bytes:
    return line({"type": kind, "message": message, "session_id": "", "parent_tool_use_id": None, **more})


def assistant_line(content: list[Json], number: int, model: str) -> bytes:
    """An assistant message of the past.  Messages that share an id are merged by the CLI, so `number` must differ."""
    message: Json = {"id": f"msg_history_{number}", "type": "message", "role": "assistant", "model": model}
    prefixed = [{**b, "name": TOOL_PREFIX + b["name"]} if b["type"] == "tool_use" else b for b in content]
    message |= {"content": prefixed, "stop_reason": None, "stop_sequence": None}
    return message_line("assistant", message | {"usage": {"input_tokens": 0, "output_tokens": 0}})


def control_line(request_id: str, subtype: str, **fields: Any) -> bytes:
    return line({"type": "control_request", "request_id": request_id, "request": {"subtype": subtype, **fields}})


def initialize_line(system: list[str], tools: list[Json], *, agent: bool = False) -> bytes:
    """Gives a process its system prompt (an agent keeps its own before it) and, if there are tools, the name of the MCP
    server that the bridge plays on its pipes.  Never through argv: a single argument may hold 128 KiB at most."""
    fields: Json = {"appendSystemPrompt": "\n\n".join(system)} if agent else {"systemPrompt": system or [""]}
    fields |= {"sdkMcpServers": ["client"]} if tools else {}
    return control_line("initialize", "initialize", hooks=None, **fields)


def tool_call_id(event: Json) -> str:
    """The tool_use id of a control request that calls a client tool; empty: the event is something else."""
    match event.get("request"):
        case {"message": {"method": "tools/call", "params": {"_meta": {"claudecode/toolUseId": str(call)}}}}:
            return call
    return ""


def control_answer(event: Json, tools: list[Json], result: Json | None = None) -> bytes:
    """The answer to a control request of the CLI: a tool's `result`, or what an MCP server of `tools` says of itself
    (recordings client_tool); refused is what the bridge has no use for."""
    request = event.get("request")
    message = request.get("message") if isinstance(request, dict) else None
    response: Json = {"subtype": "error", "request_id": event.get("request_id"), "error": "not supported"}
    if isinstance(message, dict):
        match message:
            case {"method": "initialize", "params": {"protocolVersion": version}}:
                server = {"name": "client", "version": "1"}
                result = {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": server}
            case {"method": "tools/list"}:
                result = {"tools": tools}
        answer = {"jsonrpc": "2.0", "id": message.get("id", 0), "result": result or {}}
        response = {**response, "subtype": "success", "response": {"mcp_response": answer}}
    return line({"type": "control_response", "response": response})


# Characters of a tool result that the CLI passes on whole with room to spare: its limit is 500,000.
MAX_RESULT = 400_000


def tool_results(content: list[Json], calls: list[str]) -> dict[str, Json] | None:
    """The results that answer `calls` in their process, by id, as MCP gives them; None: only a rebuild can carry what
    the user message holds (text beside the results, a document, a result that is too long)."""
    results = {}
    for block in content:
        if block["type"] != "tool_result":
            return None
        parts = [mcp_part(part) for part in as_blocks(block.get("content"))]
        if None in parts or sum(len(part.get("text", "")) for part in parts if part) > MAX_RESULT:
            return None
        results[block["tool_use_id"]] = {"content": parts, "isError": bool(block.get("is_error"))}
    return results if len(content) == len(results) and results.keys() == set(calls) else None


def as_blocks(content: Any) -> list[Json]:
    return [{"type": "text", "text": content}] if isinstance(content, str) and content else content or []


def mcp_part(block: Json) -> Json | None:
    if block["type"] == "text":
        return {"type": "text", "text": block["text"]}
    if block["type"] == "image":
        return {"type": "image", "data": block["source"]["data"], "mimeType": block["source"]["media_type"]}
    return None


# Half a character: JavaScript writes it as an escape, orjson does not read it.
LONE_SURROGATE = re.compile(r"(?<!\\)((?:\\\\)*)\\u[dD][89a-fA-F][0-9a-fA-F]{2}")


def decode(text: bytes) -> list[Json]:
    """The events of one line of the CLI's output: one as a rule, several when it glued them, none when it is noise.
    Raises ApiError when a part of the answer is lost."""
    try:
        values = [orjson.loads(text)]
    except orjson.JSONDecodeError:
        values = glued(text.decode(errors="replace").strip())
        if not values and text.startswith(STREAM_EVENT):
            raise cli_error("the claude CLI wrote a damaged line") from None
    return [value for value in values if isinstance(value, dict)]


def glued(text: str) -> list[Any]:
    values: list[Any] = []
    text = LONE_SURROGATE.sub(r"\1\\ufffd", text)
    while text.startswith("{"):
        try:
            end = json.JSONDecoder().raw_decode(text)[1]
            values.append(orjson.loads(text[:end]))  # json takes what orjson cannot write: NaN
        except (ValueError, RecursionError):
            break
        text = text[end:].lstrip()
    return values


def answered(event: Json, request_id: str) -> Json:
    """What the CLI answered to a control request, if the event is that answer; else empty."""
    match event.get("response"):
        case {"request_id": str(given), "response": dict(answer)} if given == request_id:
            return answer
    return {}


def resolved_model(hello: Json, name: str) -> str:
    """The full id of a model.  The CLI drops the thinking of a history line that names another model than its own."""
    known = {model.get("value"): model.get("resolvedModel") for model in hello.get("models") or []}
    return str(known.get(name) or name)


# ---------------------------------------------------------------- translation of events

TOKENS = ("input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
CREATION = ("ephemeral_5m_input_tokens", "ephemeral_1h_input_tokens")
# Block type -> delta type -> key of its piece.  Other blocks and deltas break strict clients, so they are left out.
DELTAS = {
    "text": {"text_delta": "text", "citations_delta": "citation"},
    "thinking": {"thinking_delta": "thinking", "signature_delta": "signature"},
    "redacted_thinking": {},
    "tool_use": {"input_json_delta": "partial_json"},
}
# Block type -> keys that are empty strings in its content_block_start, the one that deltas add to first.
EMPTY = {"text": ("text",), "thinking": ("thinking", "signature"), "redacted_thinking": (), "tool_use": ()}
# How the lines with deltas begin, and what they say when they are not a subagent's.
STREAM_EVENT = b'{"type":"stream_event","event":'
DELTA_START = STREAM_EVENT + b'{"type":"content_block_delta","index":'
MAIN = b'"parent_tool_use_id":null'
# After these the CLI waits for the next user message; after any other it would go on by itself (recordings max_tokens,
# refusal), as it does after an answer without a visible text.
RESTING = ("end_turn", "stop_sequence")


class Translator:
    """The events of one turn of the CLI in, the events of one Messages stream out.

    `feed` raises ApiError when the turn failed.  What it returned until then obeys the grammar of the API's stream
    (message_start, blocks one after another, message_delta, message_stop), whatever the CLI printed.
    """

    def __init__(self, served: Iterable[str] = ()) -> None:
        self.message: Json = {}  # what a client has assembled so far; filled by the first message_start
        self.stop_reason = ""  # set by the message_delta that ends the answer
        self.done = False  # message_stop was returned
        self.working = False  # the CLI answers a tool call that is none of the client's, and will go on by itself
        self.result: Json = {}  # the turn's `result`, once it came
        self._served = {TOOL_PREFIX + name for name in served}  # the client's tools
        self._calls = False  # the API message that is being received calls one of them
        self._usage: Json = {}  # of that API message
        self._spent: Json = {}  # tokens of the API messages before it
        self._resets_at: float | None = None  # of a rejected rate limit
        self._open: int | None = None  # the CLI's index of the open block
        self._relayed = False  # the open block is one that clients know
        self._raw = b""  # how a line begins that holds a delta of the open block and may keep its bytes
        self._plain: Json = {}  # a message that came without stream events, in its last form
        self._pieces: list[str] = []  # of the open block's text, thinking or input

    def feed(self, event: Json) -> list[Json]:
        """Translate one event of the CLI; the list may be empty."""
        mine = event.get("parent_tool_use_id") is None and not self.done  # not a subagent's
        match event:
            case {"type": "stream_event", "event": dict(inner)} if mine:
                return self._stream(inner)
            case {"type": "assistant", "message": {"id": str(name), "content": list()} as message} if mine and name:
                return list(self._whole(message))
            case {"type": "result"}:
                return self._end(event)
            case {"type": "control_request"} if self._plain and not self.done and tool_call_id(event):
                return self._plain_end({})
            case {"rate_limit_info": {"status": "rejected", "resetsAt": int() | float() as resets_at}}:
                self._resets_at = resets_at
            case {"type": "control_response", "response": {"subtype": "error", "error": error}} if not self.done:
                raise cli_error(f"the claude CLI refused a control request: {error}")
        return []

    def relay(self, lines: list[bytes]) -> Iterator[bytes]:
        """Translate lines of the CLI that begin with DELTA_START, into frames.  Deltas of the open block keep their
        bytes: decoding them took ten times as long."""
        start, texts, rests = self._raw, [], []
        for text in lines:
            inner, _, rest = text.partition(b'"}},')
            if not start or not inner.startswith(start):
                break
            texts.append(inner[len(start) :])
            rests.append(rest)
        # One event a line, and not a subagent's: strings hold no bare quotes, so these bytes mean what they say.
        rest = b"\n".join([*rests, b""])
        if 0 < len(lines) == rest.count(MAIN) == rest.count(b"}\n") and b"{" not in rest:
            try:
                orjson.loads(b'"%b"' % b" ".join(texts))  # no text may end inside an escape
                orjson.loads(b"[{%b]" % b",{".join(rests))  # and no line be cut or torn behind it
            except orjson.JSONDecodeError:
                pass
            else:
                self._pieces.append(orjson.loads(b'"%b"' % b"".join(texts)))
                head = b"event: content_block_delta\ndata: " + start.removeprefix(STREAM_EVENT)
                yield ascii_lines(head + (b'"}}\n\n' + head).join(texts) + b'"}}\n\n')
                return
        for text in lines if not self.done else ():
            for event in decode(text):
                yield from map(frame, self.feed(event))

    def _stream(self, event: Json) -> list[Json]:
        match event:
            case {"type": "message_start", "message": {"id": str(identity)} as message} if identity and (
                not self.message or self.working
            ):
                return self._start(message)
            case {"type": "error", "error": {"type": str(kind), "message": str(text)}}:
                raise ApiError(502, text, kind=kind)
            case _ if (not self.message and event.get("type") != "message_start") or self._plain:
                return []
            case {"type": "content_block_start", "index": int(index), "content_block": {"type": str()} as new} if (
                self._open is None and not self.stop_reason and not self.working
            ):
                self._open, self._relayed = index, self._is_relayed(new)
                return [self._block_start(new)] if self._relayed else []
            case {"type": "content_block_delta", "index": int(index), "delta": {"type": str(kind)} as delta} if (
                index == self._open
            ):
                return self._block_delta(kind, delta) if self._relayed else []
            case {"type": "content_block_stop", "index": int(index)} if index == self._open:
                self._open = None
                return [self._block_stop()] if self._relayed else []
            case {"type": "message_delta", "delta": {"stop_reason": None}}:
                return []  # an interrupted answer ends so (recording interrupt of 2.1.330)
            case {"type": "message_delta", "delta": {"stop_reason": str(reason)} as delta} if (
                reason and self._open is None and not self.stop_reason
            ):
                return self._delta(reason, delta, event.get("usage"))
            case {"type": "message_stop"} if self.working:
                return []
            case {"type": "message_stop"} if self.stop_reason:
                return self._stop()
            case {"type": "message_stop"}:
                # The API broke off in mid-stream and the CLI closed the message (recording mid_stream_error).
                raise ApiError(502, "The API ended the answer before it was complete.", kind="api_error")
            case {"type": str(kind)} if kind.startswith(("message_", "content_block_")):
                raise cli_error(f"the claude CLI sent a {kind} out of place")
        return []

    def _start(self, message: Json) -> list[Json]:
        self._usage, self._calls = usage(message.get("usage")), False
        if self.working:  # the answer goes on in another API message
            self.working = False
            return []
        model = message.get("model")
        started = {**without_nulls(message), "type": "message", "role": "assistant"}
        started["model"] = model if isinstance(model, str) and model else "unknown"
        started |= {"content": [], "stop_reason": None, "stop_sequence": None, "usage": usage(message.get("usage"))}
        self.message = {**started, "content": [], "usage": dict(started["usage"])}
        return [{"type": "message_start", "message": started}]

    def _is_relayed(self, block: Json) -> bool:
        """Whether clients may see a block: of a kind they know, and no tool call but to one of their own tools."""
        if block.get("type") != "tool_use":
            return block.get("type") in DELTAS
        served = str(block.get("name")) in self._served
        self._calls = self._calls or served
        return served

    def _block(self, kind: str, **fields: Any) -> Json:
        """An event about the newest block of the message."""
        return {"type": "content_block_" + kind, "index": len(self.message["content"]) - 1, **fields}

    def _block_start(self, block: Json) -> Json:
        block = {"type": block["type"], **dict.fromkeys(EMPTY[block["type"]], ""), **without_nulls(block)}
        block.pop("citations", None)  # they come as deltas
        if block["type"] == "tool_use":
            block |= {"name": str(block.get("name") or "").removeprefix(TOOL_PREFIX), "input": {}}
        try:
            check(block, BLOCKS["assistant"], "block")
        except ApiError as error:
            raise cli_error(f"the claude CLI opened a malformed content block: {error.message}") from None
        self.message["content"].append(dict(block))
        self._pieces = []
        start = self._block("start", content_block=block)
        if self._open == start["index"]:
            kind, key = next(iter(DELTAS[block["type"]].items()), ("", ""))
            self._raw = DELTA_START + f'{self._open},"delta":{{"type":"{kind}","{key}":"'.encode()
        return start

    def _block_delta(self, kind: str, delta: Json) -> list[Json]:
        block = self.message["content"][-1]
        if kind not in DELTAS[block["type"]]:
            return []
        piece = delta.get(DELTAS[block["type"]][kind])
        if not isinstance(piece, dict if kind == "citations_delta" else str):
            raise cli_error(f"the claude CLI sent a {kind} without its content")
        if kind == "citations_delta":
            block.setdefault("citations", []).append(piece)
        elif kind == "signature_delta":
            block["signature"] = piece
        else:
            self._pieces.append(str(piece))
        return [self._block("delta", delta=delta)]

    def _block_stop(self) -> Json:
        block = self.message["content"][-1]
        text, self._raw = "".join(self._pieces), b""
        if block["type"] == "tool_use":
            try:
                block["input"] = orjson.loads(text or "{}")
                check(block["input"], dict, "input")
                orjson.dumps(block["input"])  # it will be written again
            except (orjson.JSONDecodeError, ApiError, TypeError):
                raise cli_error("the model's tool input is not a JSON object") from None
        for key in EMPTY[block["type"]][:1]:
            block[key] += text
        return self._block("stop")

    def _delta(self, reason: str, delta: Json, used: Any) -> list[Json]:
        self.working = reason == "tool_use" and not self._calls
        sequence = delta.get("stop_sequence") if reason == "stop_sequence" else None
        ends: Json = {"stop_reason": reason, "stop_sequence": sequence if isinstance(sequence, str) else None}
        if isinstance(delta.get("stop_details"), dict) and delta["stop_details"].get("type"):
            ends["stop_details"] = delta["stop_details"]
        counts = {"output_tokens": 0, **token_counts(used)}
        counts["output_tokens"] = max(counts["output_tokens"], self._usage["output_tokens"])
        if self._spent or self.working:
            counts = {**token_counts(self._usage), **counts}
            counts = {key: counts.get(key, 0) + self._spent.get(key, 0) for key in counts | self._spent}
        if self.working:
            self._spent = counts
            return []
        self.stop_reason = reason
        self.message |= ends
        self.message["usage"] |= counts
        event: Json = {"type": "message_delta", "delta": ends, "usage": counts}
        # Where the CLI goes on by itself nothing more is waited for: the answer is complete.
        return [event] if self.rests else [event, *self._stop()]

    @property
    def rests(self) -> bool:
        """Whether the process now waits for tool results or the next user message, and holds the client's own
        conversation."""
        if self.stop_reason == "tool_use":
            return self._calls
        return self.stop_reason in RESTING and any(block.get("text") for block in self.message["content"])

    def _stop(self) -> list[Json]:
        self.done = True
        return [{"type": "message_stop"}]

    def _whole(self, message: Json) -> Iterator[Json]:
        """An `assistant` event: the same content once more, except when the API refused to stream and the CLI asked
        again without (recording not_streamed); then it is all there is.  Texts that the CLI made up are not answers."""
        if message.get("model") == "<synthetic>" or (self.message and not self._plain):
            return
        if self._plain and message["id"] != self._plain["id"]:  # the CLI went on by itself
            yield from self._plain_end({})
            if not self.working:
                return
        if not self.message or self.working:
            yield from self._start(message)
        self._plain = message
        for block in message["content"]:
            kind = block.get("type") if isinstance(block, dict) else None
            if not isinstance(kind, str) or not self._is_relayed(block):
                continue
            yield self._block_start({**block, **dict.fromkeys(EMPTY[kind], "")})
            pieces = {f"{key}_delta": block.get(key) for key in EMPTY[kind]}
            if kind == "tool_use":
                pieces = {"input_json_delta": json.dumps(block.get("input"))}
            for name, piece in pieces.items():
                if piece:
                    yield from self._block_delta(name, {"type": name, DELTAS[kind][name]: piece})
            yield self._block_stop()

    def _plain_end(self, result: Json) -> list[Json]:
        reason = self._plain.get("stop_reason") or result.get("stop_reason")
        reason = reason if isinstance(reason, str) and reason else "end_turn"
        events = self._delta(reason, self._plain, self._plain.get("usage"))
        return events if self.done or self.working else [*events, *self._stop()]

    def _end(self, result: Json) -> list[Json]:
        if self.done or self.stop_reason:
            self.result = self.result or result
            return [] if self.done else self._stop()  # the answer is complete, only its message_stop got lost
        if result.get("is_error"):
            raise result_error(result, self._resets_at)
        if not self.message:
            return []  # not this turn's: of a background task, or of a line that asked nothing
        events = self._plain_end(result) if self._plain else []
        if not events:
            raise cli_error("the claude CLI ended the turn before the answer was complete")
        self.result = result
        return events


def without_nulls(value: Json) -> Json:
    return {key: inner for key, inner in value.items() if inner is not None}


def token_counts(value: Any, names: Iterable[str] = TOKENS) -> Json:
    known = value if isinstance(value, dict) else {}
    return {key: known[key] for key in names if type(known.get(key)) is int and known[key] >= 0}


def usage(value: Any) -> Json:
    """The counts that clients know, never null; both required ones are always there."""
    counts = {"input_tokens": 0, "output_tokens": 0, **token_counts(value)}
    match value:
        case {"cache_creation": creation} if len(known := token_counts(creation, CREATION)) == len(CREATION):
            counts["cache_creation"] = known
    match value:
        case {"service_tier": "standard" | "priority" | "batch" as tier}:
            counts["service_tier"] = tier
    return counts


def frame(event: Json) -> bytes:
    """One server-sent event."""
    return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), ascii_lines(orjson.dumps(event)))


def ascii_lines(data: bytes) -> bytes:
    """U+2028, U+2029 and U+0085 escaped: some clients split lines at them."""
    if data.isascii():
        return data
    data = data.replace(b"\xe2\x80\xa8", b"\\u2028").replace(b"\xe2\x80\xa9", b"\\u2029")
    return data.replace(b"\xc2\x85", b"\\u0085")


PING = frame({"type": "ping"})
