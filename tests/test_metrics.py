"""/metrics, as Prometheus' own parser reads it."""

import json
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import readme
from client import Client, prime, request_body
from host import wait_until
from processes import fall_silent, pool_of, send
from prometheus_client.parser import text_string_to_metric_families
from servers import Launch, Serve, Server
from stand_in import Log

import sessions
from sessions import Metrics
from translate import RateLimit

PREFIX = "claude_cli_bridge_"


def measure(client: Client) -> Callable[..., float]:
    """What a series is at now: found("requests_total", status="200"); the sum of those with these
    labels."""
    answer = client.call("GET", "/metrics")
    assert (answer.status, answer.headers["content-type"]) == (
        200,
        "text/plain; version=0.0.4; charset=utf-8",
    )
    families = list(text_string_to_metric_families(answer.body.decode()))
    assert len({family.name for family in families}) == len(families)
    assert all(family.documentation and family.name.startswith(PREFIX) for family in families)
    samples = [sample for family in families for sample in family.samples]

    def found(name: str, **labels: str) -> float:
        fitting = [
            s.value
            for s in samples
            if s.name == PREFIX + name and s.labels.items() >= labels.items()
        ]
        assert fitting or labels, f"no {name}"
        return sum(fitting)

    return found


def test_requests_turns_and_tokens_are_counted(serve: Serve) -> None:
    server = serve()
    first = server.post("hello")
    server.post(["hello", first.text, "and now"], stream=True)
    server.post(["other", "yes", "and now"])
    server.call("POST", "/v1/messages", b"{")
    server.call("GET", "/sesame")
    found = measure(server)
    assert found("requests_total", route="/v1/messages", status="200") == 3
    assert found("requests_total", route="/v1/messages", status="400") == 1
    assert found("requests_total", route="none", status="404") == 1
    assert found("turns_total", conversation="new", reason="") == 1
    assert found("turns_total", conversation="hot", reason="") == 1
    assert found("turns_total", conversation="rebuilt", reason="unknown-history") == 1
    assert found("tokens_total", kind="input") == 30
    assert found("tokens_total", kind="output") == 4 + 5 + 5
    assert measure(server)("requests_total", route="/metrics", status="200") == 1


def test_times_are_histograms(serve: Serve) -> None:
    server = serve()
    for _ in range(3):
        server.post("hello")
    server.call("POST", "/v1/messages", b"{")
    found = measure(server)
    for name in ("turn_seconds", "first_byte_seconds", "queue_seconds"):
        assert found(name + "_count") == found(name + "_bucket", le="+Inf") == 3
        assert found(name + "_bucket", le="0.01") <= found(name + "_bucket", le="600") == 3
        assert 0 <= found(name + "_sum") <= 3 * 600
    assert found("first_byte_seconds_sum") <= found("turn_seconds_sum")


def test_processes_are_counted_by_state(
    serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor
) -> None:
    server = serve(spares=1)
    server.post("hello")
    running = background.submit(server.post, "PAUSE")
    wait_until(lambda: log.got("PAUSE"), "the turn")
    wait_until(lambda: measure(server)("processes", state="spare") == 1, "the next spare")
    found = measure(server)
    assert [found("processes", state=state) for state in ("busy", "idle", "parked", "retired")] == [
        1,
        1,
        0,
        0,
    ]
    assert found("processes_started_total") == 3
    assert found("connections") >= 2
    gate.touch()
    assert running.result().status == 200
    assert measure(server)("processes", state="idle") == 2


def test_deaths_watchdog_and_retirements_are_counted(
    serve: Serve, log: Log, background: ThreadPoolExecutor
) -> None:
    server = serve()
    before = measure(server)
    names = ("process_restarts_total", "watchdog_fires_total", "processes_started_total")
    assert [before(name) for name in names] == [0, 0, 0]
    assert server.post("DIE-START").status == 502
    silent = background.submit(server.post, "HANG-START")
    wait_until(lambda: log.got("HANG-START"), "the turn")
    fall_silent(server, log.got("HANG-START"))
    assert silent.result().status == 504
    found = measure(server)
    assert [found(name) for name in names] == [1, 1, 2]
    assert found("processes_ended_total", reason="died") == 1
    assert found("processes_ended_total", reason="failed") == 1


@pytest.mark.parametrize("name", ["error_401", "error_429", "error_529"])
def test_a_failure_of_the_api_is_not_the_death_of_a_process(serve: Serve, name: str) -> None:
    server = serve()
    kind = server.post(f"REPLAY 2.1.330/{name}").json["error"]["type"]
    found = measure(server)
    assert found("process_restarts_total") == 0
    assert found("processes_ended_total", reason="failed") == 1
    assert found("errors_total", type=kind) == 1


@pytest.mark.parametrize("begun", [True, False])
def test_a_client_that_leaves_and_a_stream_that_breaks_off_are_errors_whatever_their_status(
    serve: Serve, gate: Path, log: Log, begun: bool
) -> None:
    server = serve()
    assert (
        "the claude CLI exited" in server.post("DIE 3", stream=True).events[-1]["error"]["message"]
    )
    word = "PAUSE" if begun else "PAUSE-START"
    body = json.dumps(request_body(word, stream=True)).encode()
    with server.connect() as client:
        client.sendall(
            b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
            % len(body)
            + body
        )
        wait_until(lambda: log.got(word), "the turn")
        while begun and b"content_block_delta" not in client.recv(4096):
            pass
    wait_until(
        lambda: measure(server)("errors_total", type="client_left") == 1, "the end of the request"
    )
    found = measure(server)
    assert found("requests_total", route="/v1/messages", status="499") == (not begun)
    assert found("errors_total", type="claude_cli_error") == 1
    assert found("errors_total") == 2


def test_a_client_that_leaves_while_a_process_is_given_its_conversation_interrupts_it(
    serve: Serve, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process did not fail."""
    monkeypatch.setattr(sessions, "FIRST_OUTPUT_SECS", 3600)
    server = serve()
    with send(server, "hello", model="hang-at-start"):
        wait_until(lambda: log.got("hello"), "the conversation")
    wait_until(lambda: not server.processes(), "the end of the process")
    found = measure(server)
    assert found("processes_ended_total", reason="interrupted") == 1
    assert found("processes_ended_total") == 1
    assert found("process_restarts_total") == 0


@pytest.mark.parametrize("reason", ['a"b', "a\\", "two\nlines"])
def test_no_stop_reason_breaks_a_header_or_the_metrics(serve: Serve, reason: str) -> None:
    server = serve()
    first = server.post(f"STOP-REASON {json.dumps(reason)}")
    assert first.message["stop_reason"] == reason
    again = server.post([f"STOP-REASON {json.dumps(reason)}", first.text, "and now"])
    assert (again.status, again.session) == (200, "rebuilt; reason=other")
    assert measure(server)("processes_ended_total", reason="other") == 1


def test_a_limit_of_another_account_is_measured_no_more(server: Server) -> None:
    pool = pool_of(server)
    pool.cli.rate_limits["five_hour"] = RateLimit("allowed", resets_at=None, utilization=0.5)
    assert measure(server)("quota_utilization_ratio", limit="five_hour") == 0.5
    pool.cli.rate_limits.clear()
    assert measure(server)("quota_utilization_ratio", limit="five_hour") == 0


def test_a_label_can_hold_anything() -> None:
    metrics = Metrics()
    metrics.add("errors_total", type='a"b\\c\nd')
    families = text_string_to_metric_families(metrics.text())
    samples = [
        sample
        for family in families
        for sample in family.samples
        if sample.name.endswith("errors_total")
    ]
    assert [sample.labels for sample in samples] == [{"type": 'a"b\\c\nd'}]


def test_nobody_waits_for_a_spare(serve: Serve) -> None:
    server = serve(spares=1)
    prime(server)
    waits = measure(server)("queue_seconds_count")
    wait_until(lambda: measure(server)("processes", state="spare") == 1, "the spare")
    assert measure(server)("queue_seconds_count") == waits


def test_who_waits_is_counted(
    serve: Serve, log: Log, background: ThreadPoolExecutor, gate: Path
) -> None:
    server = serve(max_sessions=1)
    running = background.submit(server.post, "PAUSE")
    wait_until(lambda: log.got("PAUSE"), "the turn")
    waiting = background.submit(server.post, "hello")
    wait_until(lambda: measure(server)("waiting_requests") == 1, "the request that waits")
    gate.touch()
    assert [running.result().status, waiting.result().status] == [200, 200]
    found = measure(server)
    assert found("waiting_requests") == 0
    assert found("queue_seconds_count") == 2


def test_the_readme_names_the_states_of_a_process() -> None:
    states = ", ".join(f"`{state.value}`" for state in sessions.State)
    assert f"| `processes` | `state` | {states} |" in readme.README.read_text()


def test_metrics_need_the_key_and_hold_no_name_of_a_client(serve: Serve) -> None:
    server = serve(api_key="sesame")
    assert server.call("GET", "/metrics").status == 401
    server.call("GET", "/sesame", None, {"x-api-key": "sesame"})
    server.call("POST", "/v1/messages", {"model": "sesame"}, {"x-api-key": "sesame"})
    answer = server.call("GET", "/metrics", None, {"authorization": "Bearer sesame"})
    assert answer.status == 200
    assert b"sesame" not in answer.body


def test_the_time_of_a_request_is_not_that_of_its_connection(
    launch: Launch,
) -> None:
    """It begins when the request does: as long as the client itself waited, at most."""
    program = launch("--log-format", "json")
    with program.connect() as connection:
        assert program.post().status == 200  # meanwhile
        began = time.monotonic()
        connection.sendall(b"HEAD / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        while connection.recv(1000):
            pass  # to the end, which comes after the line of the log
        waited = time.monotonic() - began
    program.process.send_signal(signal.SIGTERM)
    program.wait()
    wait_until(lambda: sum('"route":"/"' in line for line in program.lines) == 1, "the line")
    [line] = [line for line in program.lines if '"route":"/"' in line]
    assert float(line.split('"secs":')[1].split("}")[0].split(",")[0]) <= waited + 0.001
