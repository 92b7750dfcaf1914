#!/usr/bin/env python3
"""A light stand-in for the CLI that answers as fast as it can, or at a pace; for benchmarks only.

The user text `FEED n` gets n recorded deltas in as few writes as possible, `PACE n rate` n deltas
at that many a second, each with the moment of its writing (time.monotonic_ns) as its text.
With `--resume path` it waits at that path until it has read all of it, as the CLI does.
"""

import json
import os
import sys
import time

DELTA = (
    '{"type":"stream_event","event":{"type":"content_block_delta","index":0,'
    '"delta":{"type":"text_delta","text":"%s"}},'
    '"session_id":"1b9cbcc6-57d3-4dcd-bd31-2b0ddf3d2a05","parent_tool_use_id":null,'
    '"uuid":"9959dac0-a8cc-4463-861f-a0e94dbca07d","api_message_id":"msg_0017"}\n'
)


def event(kind: str, **fields: object) -> str:
    inner = {"type": kind, **fields}
    whole = {"type": "stream_event", "event": inner, "parent_tool_use_id": None}
    return json.dumps(whole, separators=(",", ":")) + "\n"


def put(text: str) -> None:
    data = memoryview(text.encode())
    while data:
        data = data[os.write(1, data) :]


USAGE = {"input_tokens": 1, "output_tokens": 1}
MODEL = "claude-sonnet-5-5"
MESSAGE = {
    "id": "msg_0017",
    "type": "message",
    "role": "assistant",
    "model": MODEL,
    "content": [],
    "usage": USAGE,
}
# What it answers to control requests.
ANSWERS = {
    "initialize": {"models": [{"value": "sonnet", "resolvedModel": MODEL}]},
}
BEGIN = event("message_start", message={**MESSAGE, "stop_reason": None, "stop_sequence": None})
BEGIN += event("content_block_start", index=0, content_block={"type": "text", "text": ""})
END = event("content_block_stop", index=0)
END += event("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage=USAGE)
END += event("message_stop") + '{"type":"result","is_error":false,"num_turns":1}\n'


def answer(words: list[str]) -> None:
    if words[0] == "FEED":
        put(BEGIN + (DELTA % "word ") * int(words[1]) + END)
        return
    put(BEGIN)
    due, step, head = time.monotonic(), 1 / float(words[2]), DELTA.encode()
    for _ in range(int(words[1])):
        due += step
        time.sleep(max(0.0, due - time.monotonic()))
        os.write(1, head % str(time.monotonic_ns()).encode())
    put(END)


def main() -> None:
    if "--version" in sys.argv:
        print("2.1.197")  # one that announces nothing to the model
        return
    asked: list[str] = []
    if "--resume" in sys.argv:
        with open(sys.argv[sys.argv.index("--resume") + 1], "rb") as conversation:
            rows = [json.loads(row) for row in conversation]
        said = [row["message"]["content"] for row in rows if row["type"] == "user"]
        asked = [content[-1]["text"] for content in said]
    for line in sys.stdin.buffer:
        row = json.loads(line)
        if row["type"] == "control_request":
            response = ANSWERS.get(row["request"]["subtype"], {})
            answered = {"subtype": "success", "request_id": row["request_id"]}
            answered["response"] = response
            put(json.dumps({"type": "control_response", "response": answered}) + "\n")
        elif row["type"] == "user" and row.get("shouldQuery", True):
            content = row["message"]["content"]  # empty: the conversation asks
            answer((content[0]["text"] if content else asked[-1]).split())


if __name__ == "__main__":
    main()
