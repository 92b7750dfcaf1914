"""A stub of the Messages API on loopback, for driving the real CLI: `python stub_api.py --port 0`.

It prints the port it listens on, answers what the last text of the user asks for, and keeps every
request it gets: `GET /_log?since=N` gives those from index N on, each with its path, headers, body,
and how it ended (`done`, or `left` when the client went away first, with the seconds since the
request came in).

Words a user text may hold: THINK, MAXTOK, CUTTOOL (max_tokens inside a tool's input), REFUSE,
MIDFAIL (`MIDFAIL 400`: as an invalid request), SLOW (a word every 50 ms, `SLOW n` of them), HANG (no answer for a minute),
FAIL400/401/403/404/429/500/529 (`CODE x`: with this error_code), `QUOTA status` (headers of a
subscription's limits), BADSIGN (400 if the history holds thinking), BADIMAGE (400 if there is an image), RETRYONCE,
OUTDATED (the model wants a newer CLI), EMPTY, NOWORDS (the same, in the result of a tool), ONLYBLANKS,
NOSTREAM (streaming is refused, the plain call works), `USE_TOOL name INPUT={...}END COUNT=n`, `SAY text`, SEARCH (a server
tool, its result and a cited text), PAUSED (with it: the answer ends with pause_turn), TOMORROW
(blocks, deltas, events and keys that nobody knows yet), and alone: RECORD (the answer is "ok",
whatever the parameters say). With --judge it refuses what judge.py refuses; a login is renewed in
--renewal-secs. Parameters it obeys:
stop_sequences, max_tokens (one token is four characters), tool_choice, output_config.format.
"""

import argparse
import asyncio
import base64
import itertools
import json
import re
import struct
import time
import zlib
from typing import Any

from aiohttp import web
from judge import Refused, judge

Json = dict[str, Any]
ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "api_error",
    529: "overloaded_error",
}
ERROR_TEXTS = {
    400: "prompt is too long: 250000 tokens > 200000 maximum",
    401: "invalid x-api-key",
    429: "slow down",
    529: "Overloaded",
}
SEARCHED: list[Json] = [
    {
        "type": "server_tool_use",
        "id": "srvtoolu_1",
        "name": "web_search",
        "input": {"query": "herons"},
    },
    {
        "type": "web_search_tool_result",
        "tool_use_id": "srvtoolu_1",
        "content": [
            {
                "type": "web_search_result",
                "title": "Herons",
                "url": "https://example.com/herons",
                "encrypted_content": "ZW5j",
                "page_age": None,
            }
        ],
    },
    {
        "type": "text",
        "text": "Herons wade.",
        "citations": [
            {
                "type": "web_search_result_location",
                "url": "https://example.com/herons",
                "title": "Herons",
                "encrypted_index": "aW5k",
                "cited_text": "Herons wade in water.",
            }
        ],
    },
]
TOMORROW: list[Json] = [
    {"type": "tomorrow_block", "id": "t_1", "plan": "wade", "parts": [1, {"a": "b"}]},
    {"type": "text", "text": "as of tomorrow", "mood": "calm"},
]
LOG: list[Json] = []
IDS = itertools.count(1)
JUDGING = web.AppKey("judging", bool)
RENEWAL_SECS = web.AppKey("renewal_secs", float)
# A login that has ended, and what one can be renewed with.
ENDED = "sk-ant-oat01-ended"
VALID = {"sk-ant-ort01-good"}
RETRIED: set[str] = set()


def error(status: int, text: str = "", code: str = "") -> web.Response:
    told: Json = {"type": ERRORS[status], "message": text or ERROR_TEXTS.get(status, "no")}
    if code:
        told["details"] = {"error_code": code}
    body = {"type": "error", "error": told}
    return web.json_response(body, status=status, headers={"request-id": f"req_{next(IDS)}"})


async def add_quota(request: web.Request, response: web.StreamResponse) -> None:
    """The headers by which the API tells a subscription of its limits."""
    if wanted := re.search(r"QUOTA (\w+)", request.get("text", "")):
        prefix = "anthropic-ratelimit-unified-"
        resets_at = str(int(time.time()) + 7200)  # for which the CLI warns of 95 %, not of 50
        response.headers[prefix + "status"] = wanted[1]
        response.headers[prefix + "reset"] = resets_at
        response.headers[prefix + "representative-claim"] = "five_hour"
        used = "0.5" if wanted[1] == "allowed" else "0.95"
        for window in ("5h", "7d"):
            response.headers[f"{prefix}{window}-status"] = wanted[1]
            response.headers[f"{prefix}{window}-reset"] = resets_at
            response.headers[f"{prefix}{window}-utilization"] = used


def last_text(body: Json) -> str:
    """The last text of the last user message that the CLI did not put there itself."""
    for message in reversed(body["messages"]):
        if message["role"] == "user":
            content = message["content"]
            blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
            texts = [block["text"] for block in blocks if block["type"] == "text"]
            texts = [text for text in texts if not text.lstrip().startswith("<system-reminder>")]
            return texts[-1] if texts else ""
    return ""


def tool_results(body: Json) -> list[Any]:
    content = next((m["content"] for m in reversed(body["messages"]) if m["role"] == "user"), "")
    return (
        []
        if isinstance(content, str)
        else [b.get("content") for b in content if b["type"] == "tool_result"]
    )


def as_block(content: Any) -> Json:
    """A tool result's content as one text."""
    return {
        "text": content
        if isinstance(content, str)
        else json.dumps(content, ensure_ascii=False).replace('\\"', '"')
    }


def sample(schema: Json) -> Any:
    """A small value that meets a JSON schema of the everyday kind."""
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type", "object")
    if kind == "object":
        return {key: sample(value) for key, value in schema.get("properties", {}).items()}
    return {
        "string": "Paris",
        "integer": 1,
        "number": 1.5,
        "boolean": True,
        "array": [],
        "null": None,
    }[kind]


def tool_call(body: Json, name: str, value: Json, count: int) -> tuple[list[Json], str]:
    blocks: list[Json] = [{"type": "text", "text": "Let me use it."}]
    blocks += [
        {"type": "tool_use", "id": f"toolu_{next(IDS)}", "name": name, "input": value}
        for _ in range(count)
    ]
    return blocks, "tool_use"


def answer(body: Json, text: str) -> tuple[list[Json], str]:
    """The content blocks and the stop_reason for a request."""
    names = [tool.get("name") for tool in body.get("tools", [])]
    choice = body.get("tool_choice") or {"type": "auto"}
    results = tool_results(body)
    again = next(
        (block["text"] for block in map(as_block, results) if "USE_TOOL" in block["text"]), ""
    )
    if any("NOWORDS" in block["text"] for block in map(as_block, results)):
        return [], "end_turn"
    if results and not again:
        return [{"type": "text", "text": "Tool said: " + json.dumps(results)[:400]}], "end_turn"
    if wanted := re.search(r"USE_TOOL (\S+) INPUT=(.*?)END(?: COUNT=(\d+))?", again or text, re.S):
        return tool_call(body, wanted[1], json.loads(wanted[2]), int(wanted[3] or 1))
    if (
        names
        and choice["type"] != "none"
        and (choice["type"] in ("any", "tool") or "Use the tool" in text)
    ):
        tool = next(
            (t for t in body["tools"] if t.get("name") == choice.get("name")), body["tools"][0]
        )
        return tool_call(body, tool["name"], sample(tool.get("input_schema", {})), 1)
    output = (body.get("output_config") or {}).get("format")
    if output:
        return [{"type": "text", "text": json.dumps(sample(output["schema"]))}], "end_turn"
    if "THINK" in text:
        thought = {"type": "thinking", "thinking": "hmm...", "signature": "c2ln"}
        return [
            thought,
            {"type": "redacted_thinking", "data": "eHh4"},
            {"type": "text", "text": "thought"},
        ], "end_turn"
    if "EMPTY" in text:
        return [], "end_turn"
    if "ONLYBLANKS" in text:
        return [{"type": "text", "text": " \n"}], "end_turn"
    if "SEARCH" in text:
        return SEARCHED, "pause_turn" if "PAUSED" in text else "end_turn"
    if "TOMORROW" in text:
        return TOMORROW, "end_turn"
    if "CUTTOOL" in text:
        return tool_call(body, names[0], {}, 1)[0], "max_tokens"
    if "MAXTOK" in text:
        return [{"type": "text", "text": "cut sho"}], "max_tokens"
    if "REFUSE" in text:
        return [{"type": "text", "text": ""}], "refusal"
    if slow := re.search(r"SLOW ?(\d*)|300 word story", text):
        return [
            {"type": "text", "text": "".join(f"tick{n} " for n in range(int(slow[1] or 200)))}
        ], "end_turn"
    if said := re.search(r"SAY (.*)", text, re.S):
        return [{"type": "text", "text": said[1]}], "end_turn"
    return [
        {
            "type": "text",
            "text": f"You said: {text[:400]!r}. History has {len(body['messages'])} messages.",
        }
    ], "end_turn"


def limited(body: Json, blocks: list[Json], stop_reason: str) -> tuple[list[Json], str, str | None]:
    """Apply stop_sequences and max_tokens as the API does."""
    for number, block in enumerate(blocks):
        if block["type"] != "text":
            continue
        cuts = [
            (block["text"].find(stop), stop)
            for stop in body.get("stop_sequences") or []
            if stop in block["text"]
        ]
        if cuts:
            at, stop = min(cuts)
            return (
                [*blocks[:number], {"type": "text", "text": block["text"][:at]}],
                "stop_sequence",
                stop,
            )
        if type(body["max_tokens"]) is int and len(block["text"]) > 4 * body["max_tokens"]:
            return (
                [
                    *blocks[:number],
                    {"type": "text", "text": block["text"][: 4 * body["max_tokens"]]},
                ],
                "max_tokens",
                None,
            )
    return blocks, stop_reason, None


def deltas(block: Json, slow: bool) -> list[Json]:
    if block["type"] == "thinking":
        return [
            {"type": "thinking_delta", "thinking": block["thinking"]},
            {"type": "signature_delta", "signature": block["signature"]},
        ]
    if block["type"] == "tomorrow_block":
        return [{"type": "tomorrow_delta", "plan": "wade"}]
    if block["type"] in ("tool_use", "server_tool_use"):
        text = json.dumps(block["input"])
        return [
            {"type": "input_json_delta", "partial_json": text[at : at + 10]}
            for at in range(0, len(text), 10)
        ]
    if block["type"] != "text":
        return []
    size = 6 if slow else 4096 if len(block["text"]) > 20000 else 12
    cited = [
        {"type": "citations_delta", "citation": citation} for citation in block.get("citations", [])
    ]
    texts = range(0, len(block["text"]), size)
    return [
        *cited,
        *({"type": "text_delta", "text": block["text"][at : at + size]} for at in texts),
    ]


EMPTY_BLOCKS: dict[str, Json] = {
    "text": {"text": ""},
    "thinking": {"thinking": "", "signature": ""},
    "tool_use": {"input": {}},
    "server_tool_use": {"input": {}},
    "tomorrow_block": {"plan": ""},
}


async def stream(request: web.Request, message: Json, text: str) -> web.StreamResponse:
    response = web.StreamResponse(
        headers={"content-type": "text/event-stream", "request-id": "req_" + message["id"]}
    )
    await response.prepare(request)

    async def send(kind: str, **data: Any) -> None:
        await response.write(
            f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode()
        )

    slow = "SLOW" in text or "300 word story" in text
    started = {**message, "content": [], "stop_reason": None, "stop_sequence": None}
    await send(
        "message_start", message={**started, "usage": {**message["usage"], "output_tokens": 1}}
    )
    for index, block in enumerate(message["content"]):
        begun = {**block, **EMPTY_BLOCKS.get(block["type"], {})}
        begun.pop("citations", None)
        await send("content_block_start", index=index, content_block=begun)
        if block["type"] == "tomorrow_block":
            await send("tomorrow_event", weather={"sky": "clear"})
        cut = [{"type": "input_json_delta", "partial_json": '{"city": "Par'}]
        is_cut = "CUTTOOL" in text and block["type"] == "tool_use"
        for delta in cut if is_cut else deltas(block, slow):
            await send("content_block_delta", index=index, delta=delta)
            await asyncio.sleep(0.05 if slow else 0)
        if "MIDFAIL" in text:
            fault = {"type": "overloaded_error", "message": "Overloaded"}
            if "MIDFAIL 400" in text:
                fault = {"type": ERRORS[400], "message": "no"}
            await send("error", error=fault)
            return response
        await send("content_block_stop", index=index)
    ends = {"stop_reason": message["stop_reason"], "stop_sequence": message["stop_sequence"]}
    used = {"output_tokens": message["usage"]["output_tokens"]}
    more: Json = {}
    if "SEARCH" in text:
        used["server_tool_use"] = {"web_search_requests": 1}
    if "TOMORROW" in text:
        ends["container"] = {"id": "container_1", "expires_at": "2026-12-01T00:00:00Z"}
        more = {"context_management": {"applied_edits": []}, "novelty": [1]}
    await send("message_delta", delta=ends, usage=used, **more)
    goes_on = any(block.get("name") == "unknown" for block in message["content"])
    is_cut = ends["stop_reason"] == "max_tokens" or not message["content"]
    if goes_on or is_cut or re.search("Nope|ONLYBLANKS", text):
        # The CLI would ask again within 4 ms of the end, faster than it is killed now and then.
        await asyncio.sleep(0.05)
    await send("message_stop")
    return response


async def messages(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    row: Json = {"path": request.path, "headers": dict(request.headers), "body": body, "end": None}
    LOG.append(row)
    began = time.monotonic()
    try:
        response = await reply(request, body)
        row["end"] = "done"
        return response
    finally:
        row["end"] = row["end"] or "left"
        row["seconds"] = time.monotonic() - began


async def reply(request: web.Request, body: Json) -> web.StreamResponse:
    if request.app[JUDGING]:
        try:
            judge(body)
        except Refused as refused:
            return error(400, str(refused))
    if request.headers.get("authorization") == f"Bearer {ENDED}":
        return error(401, "OAuth token has expired")
    text = request["text"] = last_text(body)
    if text == "RECORD":
        return await plain_answer(request, body)
    if not body["model"].startswith(("claude-", "glm-")) or "no-such" in body["model"]:
        return error(404, f"model: {body['model']}")
    if failing := re.search(r"FAIL(\d{3})", text):
        coded = re.search(r"CODE (\w+)", text)
        return error(int(failing[1]), code=coded[1] if coded else "")
    if "BADSIGN" in text and '"thinking"' in json.dumps(body["messages"]):
        return error(400, "messages.1.content.0: Invalid `signature` in `thinking` block")
    if "BADIMAGE" in text and '"image"' in json.dumps(body["messages"]):
        return error(400, "messages.0.content.0: Could not process image")
    if "OUTDATED" in text:
        # As it was reported of the real API.
        fault = "Claude Code 2.1.211 does not support this model; version 2.1.280 (Opus 5.5)"
        return error(400, f"{fault} or newer is required. Run 'claude update' to continue.")
    if "RETRYONCE" in text and text not in RETRIED:
        RETRIED.add(text)
        return error(529)
    if "HANG" in text:
        await asyncio.sleep(60)
    if "NOSTREAM" in text and body.get("stream"):
        return error(404, "streaming is not supported")
    blocks, stop_reason, stop_sequence = limited(body, *answer(body, text))
    usage = {
        "input_tokens": 10,
        "cache_creation_input_tokens": 3,
        "cache_read_input_tokens": 5,
        "output_tokens": 17,
    }
    message = {
        "id": f"msg_{next(IDS):04}",
        "type": "message",
        "role": "assistant",
        "model": body["model"],
        "content": blocks,
        "stop_reason": stop_reason,
        "stop_sequence": stop_sequence,
        "usage": usage,
    }
    if body.get("stream"):
        return await stream(request, message, text)
    return web.json_response(message, headers={"request-id": "req_" + message["id"]})


async def plain_answer(request: web.Request, body: Json) -> web.StreamResponse:
    """The answer "ok", whatever the parameters say."""
    message = {
        "id": f"msg_{next(IDS):04}",
        "type": "message",
        "role": "assistant",
        "model": body["model"],
        "content": [{"type": "text", "text": "ok"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 10, "output_tokens": 1},
    }
    if body.get("stream"):
        return await stream(request, message, "")
    return web.json_response(message)


async def count_tokens(request: web.Request) -> web.Response:
    body = await request.json()
    LOG.append(
        {"path": request.path, "headers": dict(request.headers), "body": body, "end": "done"}
    )
    # The API adds a prompt of about 500 tokens when there are tools; the CLI takes as much off what
    # it counts for them.
    tokens = len(json.dumps(body)) // 4 + (500 if body.get("tools") else 0)
    return web.json_response({"input_tokens": max(1, tokens)})


async def renew(request: web.Request) -> web.Response:
    """A new login for an old one, which counts no more: also if nobody gets the answer."""
    body = await request.json()
    LOG.append(
        {"path": request.path, "headers": dict(request.headers), "body": body, "end": "done"}
    )
    is_known = body["refresh_token"] in VALID
    if is_known:
        number = next(IDS)
        VALID.clear()
        VALID.add(f"sk-ant-ort01-{number}")
    await asyncio.sleep(request.app[RENEWAL_SECS])
    if not is_known:
        return web.json_response({"error": "invalid_grant"}, status=400)
    return web.json_response(
        {
            "token_type": "Bearer",
            "access_token": f"sk-ant-oat01-{number}",
            "refresh_token": f"sk-ant-ort01-{number}",
            "expires_in": 28800,
            "scope": "user:inference user:profile",
        }
    )


async def log(request: web.Request) -> web.Response:
    return web.json_response(LOG[int(request.query.get("since", 0)) :])


def bedrock_frame(event: Json) -> bytes:
    """An event of a stream of Bedrock (AWS: "Event stream encoding")."""
    headers = b""
    names = {":event-type": "chunk", ":content-type": "application/json", ":message-type": "event"}
    for name, value in names.items():
        headers += struct.pack(">B", len(name)) + name.encode()
        headers += struct.pack(">BH", 7, len(value)) + value.encode()
    payload = json.dumps({"bytes": base64.b64encode(json.dumps(event).encode()).decode()}).encode()
    frame = struct.pack(">II", 16 + len(headers) + len(payload), len(headers))
    frame += struct.pack(">I", zlib.crc32(frame)) + headers + payload
    return frame + struct.pack(">I", zlib.crc32(frame))


async def bedrock(request: web.Request) -> web.Response:
    """The answer "ok" of Bedrock; what the CLI tries of a model at its start gets `other`."""
    model = request.match_info["model"].partition("anthropic.")[2]
    body = await request.json()
    LOG.append(
        {"path": request.path, "headers": dict(request.headers), "body": body, "end": "done"}
    )
    message = {
        "id": f"msg_{next(IDS):04}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 10, "output_tokens": 1},
    }
    ended = {"stop_reason": "end_turn", "stop_sequence": None}
    events: list[Json] = [
        {"type": "message_start", "message": message},
        {
            "type": "content_block_start",
            "index": 0,
            "content_block": {"type": "text", "text": ""},
        },
        {
            "type": "content_block_delta",
            "index": 0,
            "delta": {"type": "text_delta", "text": "ok"},
        },
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": ended, "usage": {"output_tokens": 1}},
        {"type": "message_stop"},
    ]
    return web.Response(
        body=b"".join(map(bedrock_frame, events)),
        content_type="application/vnd.amazon.eventstream",
    )


async def other(request: web.Request) -> web.Response:
    LOG.append(
        {"path": request.path, "headers": dict(request.headers), "body": None, "end": "done"}
    )
    return error(404)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--judge", action="store_true")
    parser.add_argument("--renewal-secs", type=float, default=0)
    arguments = parser.parse_args()
    app = web.Application(client_max_size=1 << 28)
    app[JUDGING] = arguments.judge
    app[RENEWAL_SECS] = arguments.renewal_secs
    app.on_response_prepare.append(add_quota)
    app.router.add_post("/v1/messages", messages)
    app.router.add_post("/v1/messages/count_tokens", count_tokens)
    app.router.add_post("/bedrock/model/{model}/invoke-with-response-stream", bedrock)
    app.router.add_post("/v1/oauth/token", renew)
    app.router.add_get("/_log", log)
    app.router.add_route("*", "/{path:.*}", other)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", arguments.port).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
