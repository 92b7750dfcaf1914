"""How long `GET /healthz` takes while others send the worst bodies that the limits allow:
`python tests/bench/hostile.py [seconds for each]`.

Each sender is a process of its own, so that what it costs to send is not taken for what it costs to
receive; on a machine of few cores they still compete with the bridge for them.
"""

import itertools
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from program import Program, request
from relay import FEEDER

SENDERS = (1, 20)
SECS = 20
PING = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"
HEAD = b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\n"


def post(messages: bytes) -> bytes:
    body = b'{"model":"sonnet","max_tokens":1,"messages":[%b]}' % messages
    return HEAD + b"content-length: %d\r\n\r\n%b" % (len(body), body)


def user(blocks: bytes) -> bytes:
    return b'{"role":"user","content":[%b]}' % blocks


def tool_pairs() -> bytes:
    """20,000 calls and their results, 2 MB."""
    call = b'{"type":"tool_use","id":"t%d","name":"x","input":{}}'
    result = b'{"type":"tool_result","tool_use_id":"t%d"}'
    calls = b",".join(call % number for number in range(20_000))
    results = b",".join(result % number for number in range(20_000))
    assistant = b'{"role":"assistant","content":[%b]}' % calls
    return post(b",".join([user(b'{"type":"text","text":"a"}'), assistant, user(results)]))


def blocks() -> bytes:
    """100,000 text blocks in one message, 3 MB."""
    return post(user(b",".join([b'{"type":"text","text":"a"}'] * 100_000)))


def brackets() -> bytes:
    """31 MB of empty lists."""
    return post(user(b'{"type":"text","text":"a","x":[%b]}' % b",".join([b"[]"] * 10_000_000)))


def chunks() -> bytes:
    """A body in chunks of two bytes."""
    pieces = b"2\r\n[[\r\n" * 200_000
    return HEAD + b"transfer-encoding: chunked\r\n\r\n" + pieces + b"0\r\n\r\n"


def escapes() -> bytes:
    """One text of 31 MB, of escaped quotes and commas."""
    return post(user(b'{"type":"text","text":"%b"}' % (b'\\",' * 10_000_000)))


def keys() -> bytes:
    """An object of 299,000 keys, 29 MB."""
    members = b",".join(b'"%b%d":1' % (b"k" * 85, number) for number in range(299_000))
    return post(user(b'{"type":"text","text":"a","x":{%b}}' % members))


def wide() -> bytes:
    """One text of 31 MB, which takes 124 MB in Python for its one emoji."""
    return post(user(b'{"type":"text","text":"\xf0\x9f\x98\x80%b"}' % (b"a" * 31_000_000)))


BODIES: dict[str, Callable[[], bytes]] = {
    "20,000 tool pairs": tool_pairs,
    "100,000 blocks": blocks,
    "31 MB of []": brackets,
    "chunks of 2 bytes": chunks,
    "31 MB of escapes": escapes,
    "299,000 keys": keys,
    "31 MB with an emoji": wide,
}


def send(port: int, name: str) -> None:
    """Once told until when, send one body over and over, each on a new connection, and read what
    comes."""
    data = BODIES[name]()
    print("ready", flush=True)
    until = float(sys.stdin.readline())
    while time.monotonic() < until:
        with socket.create_connection(("127.0.0.1", port)) as client:
            try:
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
                while client.recv(1 << 16):
                    pass
            except OSError:
                continue  # refused before all of it was sent


def start_sender(port: int, name: str) -> subprocess.Popen[str]:
    """One that has built its body."""
    command = [sys.executable, Path(__file__), str(port), name]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    sender = subprocess.Popen(command, text=True, **pipes)
    assert sender.stdout
    sender.stdout.readline()
    return sender


def ask(program: Program, until: float) -> Iterator[float]:
    """The seconds that each request took, one after another."""
    with program.connect() as client:
        while time.monotonic() < until:
            began = time.perf_counter()
            client.sendall(PING)
            answer = b""
            while not answer.endswith(b"ok"):
                part = client.recv(4096)
                assert part, answer
                answer += part
            yield time.perf_counter() - began
            time.sleep(0.005)


def highest(process: psutil.Process, done: threading.Event, found: list[int]) -> None:
    """Sample the resident memory until `done`."""
    while not done.wait(0.02):
        found.append(process.memory_info().rss)


def measure_one(name: str, senders: int, secs: float) -> dict[str, float]:
    """Latencies in seconds, memory in MB over what it was before."""
    program = Program(CLAUDE_CLI_BIN=FEEDER)
    try:
        program.rest()
        before = program.psutil.memory_info().rss
        running = [start_sender(program.port, name) for _ in range(senders)]
        until = time.monotonic() + secs
        for sender in running:
            assert sender.stdin
            sender.stdin.write(f"{until}\n")
            sender.stdin.flush()
        done = threading.Event()
        memory: list[int] = [before]
        sampler = threading.Thread(target=highest, args=(program.psutil, done, memory))
        sampler.start()
        took = sorted(ask(program, until))
        for sender in running:
            sender.communicate()
        done.set()
        sampler.join()
        program.rest()
        time.sleep(6)  # turns and bodies are gone by then
        with program.connect() as client:  # it still serves
            client.sendall(request(["FEED 1"]))
            assert client.recv(100).startswith(b"HTTP/1.1 200")
        return {
            "median": statistics.median(took),
            "p99": took[len(took) * 99 // 100],
            "longest": took[-1],
            "peak": (max(memory) - before) / 1e6,
            "kept": (program.psutil.memory_info().rss - before) / 1e6,
        }
    finally:
        program.close()


def main(secs: float) -> None:
    print(f"load before it {os.getloadavg()[0]:.1f}\n")
    print("| body | senders | median | p99 | longest | memory, peak | kept |")
    print("|---|---|---|---|---|---|---|")
    for name, senders in [("", 0), *itertools.product(BODIES, SENDERS)]:
        found = measure_one(name, senders, secs)
        times = " | ".join(f"{found[key] * 1000:.1f} ms" for key in ("median", "p99", "longest"))
        print(f"| {name} | {senders} | {times} | {found['peak']:.0f} MB | {found['kept']:.0f} MB |")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        send(int(sys.argv[1]), sys.argv[2])
    else:
        main(float(sys.argv[1]) if len(sys.argv) > 1 else SECS)
