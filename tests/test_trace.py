"""What an auditor can have written down: all that goes to the CLI and comes from it, by request."""

import json
import logging
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from processes import pid, talk
from servers import Serve
from stand_in import Log

from sessions import Trace


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    folder = tmp_path / "traces"
    folder.mkdir()
    return folder


def read(folder: Path, request_id: str, direction: str) -> list[Any]:
    rows = map(json.loads, (folder / f"{request_id}.jsonl").read_text().splitlines())
    return [row[direction] for row in rows if direction in row]


def event_types(printed: list[Any]) -> list[str]:
    lines = [line for line in printed if isinstance(line, dict)]
    return [line["event"]["type"] for line in lines if "event" in line]


def test_a_trace_holds_each_line_from_the_gate_to_the_answer(
    serve: Serve, log: Log, traces: Path
) -> None:
    server = serve(trace_dir=str(traces))
    conversation, first = talk(server, "NOISE one", system="be brief")
    second = server.post(conversation, system="be brief")
    assert second.session == "hot"
    number = pid(first)
    given = log.rows(number) + log.lines(number)
    written = [
        line
        for answer in (first, second)
        for line in read(traces, answer.headers["request-id"], "to")
    ]
    assert written == given
    printed = read(traces, first.headers["request-id"], "from")
    assert "Warning: not an event" in printed  # what is no JSON, as text
    assert event_types(printed)[-1] == "message_stop"


def test_each_request_has_a_file_that_only_its_user_may_read(serve: Serve, traces: Path) -> None:
    server = serve(trace_dir=str(traces))
    answers = [server.post("one"), server.post("DIE-START 3")]
    body = {"model": "sonnet", "messages": [{"role": "user", "content": "two"}]}
    answers.append(server.call("POST", "/v1/messages/count_tokens", body))
    assert [answer.status for answer in answers] == [200, 502, 200]
    files = {path.stem: path for path in traces.iterdir()}
    assert set(files) == {answer.headers["request-id"] for answer in answers}
    for path in files.values():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.stat().st_size


def test_a_folder_that_is_gone_costs_a_warning_and_no_request(
    serve: Serve, traces: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(trace_dir=str(traces))
    traces.rmdir()
    answer = server.post("one")
    assert answer.status == 200
    [warning] = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert answer.headers["request-id"] in warning.getMessage()


def test_a_disk_that_is_full_costs_a_warning_and_no_request(
    serve: Serve, traces: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = os.open

    def open_full(path: str, flags: int, mode: int = 0o777) -> int:
        is_trace = Path(path).parent == traces
        return create("/dev/full", os.O_WRONLY) if is_trace else create(path, flags, mode)

    monkeypatch.setattr("sessions.os.open", open_full)
    answer = serve(trace_dir=str(traces)).post("one")
    assert answer.status == 200
    [warning] = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert "No space left" in warning.getMessage()


def test_the_real_cli_is_traced_from_its_gate_on(serve: Serve, cli: Path, traces: Path) -> None:
    server = serve(bin=cli, trace_dir=str(traces))
    answer = server.post(["one", "SAY two", "SAY three"], system="be brief")
    assert answer.text == "three"
    sent = read(traces, answer.headers["request-id"], "to")
    roles = [row["message"]["role"] for row in sent if "message" in row]
    assert roles[:3] == ["user", "assistant", "user"]
    asked = [line["request"]["subtype"] for line in sent if line["type"] == "control_request"]
    assert asked[:2] == ["initialize", "apply_flag_settings"]
    assert "be brief" in json.dumps(sent)
    printed = read(traces, answer.headers["request-id"], "from")
    assert [line for line in printed if "succeeded with status 200" in line]  # its log, as text
    assert event_types(printed)[-1] == "message_stop"


def test_a_trace_holds_lines_as_json_or_as_text(traces: Path) -> None:
    trace = Trace(str(traces), "req_1")
    trace.add("to", [b'{"a": 1}\n', b"no JSON", b"\xff"])
    trace.add("from", [b" {} "])
    assert read(traces, "req_1", "to") == [{"a": 1}, "no JSON", "\ufffd"]
    assert read(traces, "req_1", "from") == [{}]


def test_without_a_folder_or_a_request_nothing_is_written(
    traces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(traces)
    for folder, request_id in (("", "req_1"), (str(traces), "")):
        trace = Trace(folder, request_id)
        trace.add("to", [b"{}"])
    assert list(traces.iterdir()) == []


def test_the_trace_of_another_request_is_not_written_over(traces: Path) -> None:
    (traces / "req_1.jsonl").write_text('{"to":4}\n')
    trace = Trace(str(traces), "req_1")
    trace.add("to", [b"5"])
    assert read(traces, "req_1", "to") == [4, 5]
