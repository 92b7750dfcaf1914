"""How many processes there are, which of them a request gets, what they are given, and how they
end."""

import contextlib
import json
import os
import tempfile
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from client import IMAGE, Answer, request_body
from host import wait_until
from servers import Server
from stand_in import Log

import sessions

Serve = Callable[..., Server]
HEADER = "x-arch-claude-cli-session"
PROBE = {"name": "probe", "input_schema": {"type": "object"}}


def pid(answer: Answer) -> int:
    """The process that answered."""
    return int(answer.message["id"].split("_")[2])


def alive(number: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    return False


def kill(number: int) -> None:
    """End a process, and wait until the bridge has reaped it."""
    psutil.Process(number).kill()
    wait_until(lambda: not psutil.pid_exists(number), "its end")


def in_work(server: Server, count: int) -> None:
    """Wait until the bridge works on this many requests, those that wait for room included."""
    wait_until(
        lambda: server.bridge and len(server.bridge._answers) == count, f"{count} requests in work"
    )


def talk(
    server: Server, first: str, session: str | None = None, **fields: object
) -> tuple[list[str], Answer]:
    """A first turn.  Returns the conversation with its answer and with a next message."""
    answer = server.post(first, session=session, **fields)
    return [first, answer.text, "and now"], answer


# one conversation


def test_a_hot_turn_writes_only_the_new_message_to_the_same_process(serve: Serve, log: Log) -> None:
    server = serve()
    conversation, first = talk(server, "hello", system="be brief")
    for number in range(2):
        before = len(log.lines(pid(first)))
        answer = server.post(conversation, system="be brief")
        assert (answer.session, pid(answer)) == ("hot", pid(first))
        assert answer.text == f"echo: and now; {3 + 2 * number} messages"
        [line] = log.lines(pid(first))[before:]
        assert line["message"]["content"] == [
            {"type": "text", "text": "and now"},
            {"type": "text", "text": "\n"},
        ]
        conversation += [answer.text, "and now"]


def test_settings_are_sent_again_only_when_they_change(serve: Serve, log: Log) -> None:
    server = serve()
    conversation, first = talk(server, "hello", temperature=0.5)
    answer = server.post(conversation, temperature=0.5)
    server.post([*conversation, answer.text, "more"], temperature=0.7)
    assert log.requests(pid(first)) == ["initialize", "apply_flag_settings", "apply_flag_settings"]


def test_a_result_that_comes_late_is_waited_for_by_the_next_turn(
    serve: Serve, gate: Path, background: ThreadPoolExecutor
) -> None:
    server = serve()
    conversation, first = talk(server, "LATE")
    second = background.submit(server.post, conversation)
    in_work(server, 1)
    # Time in which a hasty line would be seen by the process.
    assert server.post("meanwhile").status == 200
    gate.touch()
    assert (second.result().session, pid(second.result())) == ("hot", pid(first))


def test_a_result_that_came_behind_the_answer_in_the_same_read_is_the_end_of_the_turn(
    serve: Serve,
) -> None:
    server = serve()
    assert server.bridge
    conversation, _ = talk(server, "hello")
    (session,) = server.bridge.pool.sessions
    process = session.process
    wait_until(lambda: process._ended_well.done(), "its first result")
    process.begin_turn()
    process._events.append({"type": "result"})
    process.end_turn(False)
    assert process._ended_well.done()
    assert server.post(conversation).session == "hot"


def test_the_rest_of_a_turn_that_comes_late_and_in_one_read_is_no_fault(
    serve: Serve, gate: Path, log: Log
) -> None:
    server = serve()
    conversation, first = talk(server, "TAIL")
    gate.touch()
    answer = server.post(conversation)
    assert (answer.session, answer.text) == ("hot", "echo: and now; 3 messages")
    assert pid(answer) == pid(first)


def test_equal_conversations_never_share_a_process(
    serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor
) -> None:
    server = serve()
    conversation, first = talk(server, "hello")
    same, second = talk(server, "hello")
    assert same == conversation
    turns = [background.submit(server.post, [*conversation[:2], "PAUSE"]) for _ in range(3)]
    in_work(server, 3)
    gate.touch()
    answers = [turn.result() for turn in turns]
    assert [answer.text for answer in answers] == ["echo: PAUSE; 3 messages"] * 3
    found = sorted(answer.session.partition(";")[0] for answer in answers)
    assert found == ["hot", "rebuilt", "rebuilt"]
    assert len({pid(answer) for answer in answers}) == 3
    # Of two that a request could find the newer one stays.
    assert pid(second) in {pid(answer) for answer in answers} - {pid(first)}


# why a conversation was rebuilt


def unknown(server: Server) -> Answer:
    return server.post(["hello", "yes", "and now"])


def expired(server: Server) -> Answer:
    conversation, answer = talk(server, "hello")
    wait_until(lambda: not alive(pid(answer)), "the end of the process")
    return server.post(conversation)


def evicted(server: Server) -> Answer:
    conversation, _ = talk(server, "hello")
    talk(server, "another")
    return server.post(conversation)


def died(server: Server) -> Answer:
    conversation, answer = talk(server, "hello")
    kill(pid(answer))
    return server.post(conversation)


def system_changed(server: Server) -> Answer:
    conversation, _ = talk(server, "hello")
    return server.post(conversation, system="be brief")


def model_changed(server: Server) -> Answer:
    conversation, _ = talk(server, "hello")
    return server.post(conversation, model="opus")


def pinned_system_changed(server: Server) -> Answer:
    conversation, _ = talk(server, "hello", session="s")
    return server.post(conversation, session="s", system="be brief")


def fault_in_a_turn(server: Server) -> Answer:
    conversation, _ = talk(server, "hello")
    assert server.post([*conversation[:2], "DIE 1"]).status == 502
    return server.post(conversation)


def client_left(server: Server) -> Answer:
    conversation, _ = talk(server, "hello")
    body = json.dumps(request_body([*conversation[:2], "PAUSE"], stream=True)).encode()
    with server.connect() as client:
        head = (
            f"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        client.sendall(head.encode() + body)
        assert client.recv(65536)
    wait_until(lambda: not server.processes(), "the end of the process")
    return server.post(conversation)


def continued(server: Server) -> Answer:
    conversation, _ = talk(server, "hello")
    assert server.post(conversation).session == "hot"
    return server.post(conversation)


def edited(server: Server) -> Answer:
    conversation, _ = talk(server, "hello")
    return server.post(["hallo", *conversation[1:]])


def edited_pinned(server: Server) -> Answer:
    conversation, _ = talk(server, "hello", session="s")
    return server.post(["hallo", *conversation[1:]], session="s")


def pinned(server: Server) -> Answer:
    conversation, _ = talk(server, "hello", session="s")
    return server.post(conversation)


def max_tokens(server: Server) -> Answer:
    conversation, _ = talk(server, "REPLAY 2.1.330/max_tokens")
    return server.post(conversation)


@pytest.mark.parametrize(
    ("reason", "lose", "settings"),
    [
        ("unknown-history", unknown, {}),
        ("unknown-history", edited, {}),
        ("unknown-history", edited_pinned, {}),
        ("expired", expired, {"session_ttl_secs": 0.1}),
        ("evicted", evicted, {"max_idle": 1}),
        ("evicted", evicted, {"max_sessions": 1}),
        ("died", died, {}),
        ("system-changed", system_changed, {}),
        ("system-changed", pinned_system_changed, {}),
        ("model-changed", model_changed, {}),
        ("died", fault_in_a_turn, {}),
        ("interrupted", client_left, {}),
        ("continued", continued, {}),
        ("pinned", pinned, {}),
        ("max_tokens", max_tokens, {}),
    ],
)
def test_a_lost_session_is_rebuilt_and_the_reason_is_said(
    serve: Serve,
    reason: str,
    lose: Callable[[Server], Answer],
    settings: dict[str, float],
    gate: Path,
) -> None:
    answer = lose(serve(**settings))
    assert answer.session == f"rebuilt; reason={reason}"
    assert answer.text == "echo: and now; 3 messages"


# how long and how many


def test_a_busy_process_does_not_expire(
    serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor
) -> None:
    server = serve(session_ttl_secs=0.1)
    running = background.submit(server.post, "PAUSE")
    wait_until(lambda: log.got("PAUSE"), "the turn")
    expired(server)
    gate.touch()
    assert running.result().text == "echo: PAUSE; 1 messages"


def test_with_a_time_to_live_of_zero_nothing_expires(serve: Serve) -> None:
    server = serve(session_ttl_secs=0)
    conversation, _ = talk(server, "hello")
    _, other = talk(server, "other")
    kill(pid(other))
    wait_until(
        lambda: server.bridge and len(server.bridge.pool.sessions) == 1,
        "a sweep that saw the dead process",
    )
    assert server.post(conversation).session == "hot"


def test_the_least_recently_used_process_goes_first(serve: Serve) -> None:
    server = serve(max_idle=2)
    first, one = talk(server, "first")
    second, two = talk(server, "second")
    answer = server.post(first)
    talk(server, "third")
    wait_until(
        lambda: not alive(pid(two)), "the end of the process that was not used for the longest"
    )
    assert server.post([*first, answer.text, "more"]).session == "hot"
    assert server.post(second).session == "rebuilt; reason=evicted"
    assert alive(pid(one))


def test_with_max_idle_of_zero_no_process_stays(serve: Serve) -> None:
    server = serve(max_idle=0)
    answer = server.post("hello")
    assert answer.status == 200
    wait_until(lambda: not server.processes(), "the end of the process")


class Sampler:
    """Counts the children of this process, all the time, in whatever state they are."""

    def __enter__(self) -> "Sampler":
        self.most = 0
        self._known = self._children()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def _children(self) -> set[int]:
        ids = set()
        for name in filter(str.isdecimal, os.listdir("/proc")):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if (
                    int(Path(f"/proc/{name}/stat").read_bytes().rpartition(b")")[2].split()[1])
                    == os.getpid()
                ):
                    ids.add(int(name))
        return ids

    def _run(self) -> None:
        while not self._stop.is_set():
            self.most = max(self.most, len(self._children() - self._known))

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def test_max_sessions_holds_at_every_instant_and_all_waiting_requests_are_answered(
    serve: Serve, background: ThreadPoolExecutor
) -> None:
    server = serve(max_sessions=3)
    with Sampler() as sampler:
        # Every fifth answer fails, so that processes that fault give their room back as well.
        texts = [f"number {n}" if n % 5 else f"number {n} DIE 1" for n in range(20)]
        answers = list(background.map(server.post, texts))
    assert sampler.most == 3
    for text, answer in zip(texts, answers, strict=True):
        if "DIE" in text:
            assert answer.status == 502
        else:
            assert answer.text == f"echo: {text}; 1 messages"


def test_waiting_requests_are_served_in_order(
    serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor
) -> None:
    server = serve(max_sessions=1)
    texts = ["PAUSE", "one", "two", "three", "four"]
    turns: list[Future[Answer]] = []
    for text in texts:
        turns.append(background.submit(server.post, text))
        in_work(server, len(turns))
    gate.touch()
    assert [turn.result().text for turn in turns] == [f"echo: {text}; 1 messages" for text in texts]
    assert list(log.started()) == [log.got(text) for text in texts]


@pytest.mark.parametrize("end", ["answer", "fault", "pinned"])
def test_a_waiting_request_gets_the_room_of_a_turn_that_ends(
    serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor, end: str
) -> None:
    server = serve(max_sessions=2)
    text = "PAUSE DIE 1" if end == "fault" else "PAUSE"
    busy = [
        background.submit(server.post, text, session=f"s{n}" if end == "pinned" else None)
        for n in range(2)
    ]
    wait_until(lambda: len(log.started()) == 2, "two busy processes")
    waiting = [background.submit(server.post, f"waiting {n}") for n in range(3)]
    in_work(server, 5)
    gate.touch()
    assert [turn.result().status for turn in busy] == [502 if end == "fault" else 200] * 2
    assert [turn.result().text for turn in waiting] == [
        f"echo: waiting {n}; 1 messages" for n in range(3)
    ]


@pytest.mark.parametrize("session", [None, "pinned"])
def test_a_request_that_finds_no_room_in_time_gets_529(
    serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor, session: str | None
) -> None:
    server = serve(max_sessions=1 if session is None else 9, queue_secs=0.2)
    busy = background.submit(server.post, "PAUSE", session=session)
    wait_until(lambda: log.got("PAUSE"), "the turn that holds the room")
    answer = server.post("never", session=session)
    assert (answer.status, answer.json["error"]["type"]) == (529, "overloaded_error")
    assert answer.headers["retry-after"] == "1"
    gate.touch()
    assert busy.result().status == 200
    assert not log.got("never")
    assert server.post("next", session=session).status == 200


# the session header


def test_a_request_that_gets_the_room_of_a_process_that_ends_costs_no_other_its_own(
    serve: Serve,
) -> None:
    server = serve(max_sessions=2)
    conversation, _ = talk(server, "keep this one")
    server.post("hello", session="s")
    edited = server.post(["hullo", "who?", "and now"], session="s")
    assert edited.session == "rebuilt; reason=unknown-history"
    assert server.post(conversation).session == "hot"


def test_a_question_who_is_logged_in_gives_way_to_no_request_that_came_later(
    serve: Serve,
    gate: Path,
    log: Log,
    background: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sessions, "PROBE_MODEL", "slow-start")
    server = serve(max_sessions=1)
    models = background.submit(server.call, "GET", "/v1/models")
    wait_until(lambda: log.started(), "the process that is asked")
    answer = background.submit(server.post, "hello")
    in_work(server, 2)
    gate.touch()
    assert models.result().status == 200
    assert answer.result().text == "echo: hello; 1 messages"


def test_requests_of_one_session_header_run_one_after_another(
    serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor
) -> None:
    server = serve()
    first = background.submit(server.post, "PAUSE", session="s")
    wait_until(lambda: log.got("PAUSE"), "the first turn")
    others = [background.submit(server.post, f"more {n}", session="s") for n in range(3)]
    in_work(server, 4)
    assert server.post("else", session="t").status == 200
    assert len(log.started()) == 2
    gate.touch()
    counts = sorted(turn.result().text.split("; ")[1] for turn in others)
    assert counts == ["3 messages", "5 messages", "7 messages"]
    assert {pid(turn.result()) for turn in others} == {pid(first.result())}


@pytest.mark.parametrize(
    ("token", "name", "stream"),
    [
        ("0f6c1d4e-0000-4000-8000-123456789abc", "0f6c1d4e-0000-4000-8000-123456789abc", True),
        ("my chat", str(uuid.uuid5(uuid.NAMESPACE_OID, "my chat")), False),
    ],
    ids=["a UUID", "another token"],
)
def test_the_answer_carries_the_id_of_the_pinned_session(
    serve: Serve, token: str, name: str, stream: bool
) -> None:
    server = serve()
    conversation, answer = talk(server, "hello", session=token, stream=stream)
    assert answer.headers[HEADER] == name
    # The answer's id names the same session.
    again = server.post(conversation, session=name, stream=stream)
    assert (again.headers[HEADER], again.session) == (name, "hot")
    rebuilt = server.post(["other", "yes", "and now"], session=token, stream=stream)
    assert (rebuilt.headers[HEADER], rebuilt.session) == (name, "rebuilt; reason=unknown-history")


def test_sessions_without_a_header_have_ids_of_their_own_that_last(serve: Serve) -> None:
    server = serve()
    conversation, first = talk(server, "hello")
    _, second = talk(server, "hello")
    assert str(uuid.UUID(first.headers[HEADER])) == first.headers[HEADER] != second.headers[HEADER]
    assert server.post(conversation).headers[HEADER] in (
        first.headers[HEADER],
        second.headers[HEADER],
    )


def test_user_messages_alone_continue_a_live_pinned_session(serve: Serve) -> None:
    server = serve()
    system = {"system": "be brief"}
    _, first = talk(server, "hello", session="s", **system)
    for sent, expected, how in (
        (system, "echo: more; 3 messages", "hot"),
        ({}, "echo: more; 5 messages", "hot"),  # the system prompt was said already
        ({"system": "be verbose"}, "echo: more; 1 messages", "rebuilt; reason=system-changed"),
    ):
        answer = server.post("more", session="s", **sent)
        assert (answer.text, answer.session) == (expected, how)
        assert answer.headers[HEADER] == first.headers[HEADER]


def test_user_messages_alone_after_the_pinned_session_is_gone_are_refused(
    serve: Serve,
) -> None:
    server = serve()
    _, first = talk(server, "hello", session="s")
    kill(pid(first))
    answer = server.post("more", session="s")
    assert answer.status == 400
    assert "is gone; send the whole conversation" in answer.json["error"]["message"]


def test_an_image_after_a_pinned_conversation_needs_the_whole_conversation(serve: Serve) -> None:
    """Only a fresh process takes it, and that does not know what was said before."""
    server = serve()
    talk(server, "hello", session="s")
    image = [{"role": "user", "content": [IMAGE]}]
    assert server.post(image, session="s").status == 400


# what a process is given


def test_a_child_gets_no_variable_that_changes_its_account_unless_it_is_kept(
    serve: Serve, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped = (
        "ANTHROPIC_AUTH_TOKEN",
        "CLAUDE_CODE_USE_BEDROCK",
        "CLAUDECODE",
        "OTEL_LOGS_EXPORTER",
        "CLAUDE_CLI_CWD",
    )
    kept = (
        "ANTHROPIC_MODEL",
        "CLAUDE_CODE_MAX_RETRIES",
        "CLAUDE_CLI_API_KEY",
        "OTEL_RESOURCE_ATTRIBUTES",
    )
    for name in (*dropped, *kept):
        monkeypatch.setenv(name, "mine")
    answer = serve(keep_env=kept, retries=7).post()
    found = log.started()[pid(answer)]["env"]
    assert not set(found) & set(dropped)
    assert {name for name, value in found.items() if value == "mine"} == set(kept) - {
        "CLAUDE_CLI_API_KEY"
    }
    assert found["PATH"] == os.environ["PATH"]
    assert found["HOME"] == os.environ["HOME"]
    assert found["DISABLE_AUTO_COMPACT"] == "1"
    assert found["ENABLE_TOOL_SEARCH"] == "false"


def test_retries_reach_the_child_in_its_environment(serve: Serve, log: Log) -> None:
    answer = serve(retries=7).post()
    assert log.started()[pid(answer)]["env"]["CLAUDE_CODE_MAX_RETRIES"] == "7"


def test_a_temporary_folder_that_cannot_be_written_fails_the_request_and_is_named(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    server = serve(spares=1)
    answer = server.post()
    assert (answer.status, answer.json["error"]["type"]) == (502, "claude_cli_error")
    assert f"cannot be started: Not a directory: {tmp_path}/file" in answer.json["error"]["message"]
    (tmp_path / "file").unlink()
    (tmp_path / "file").mkdir()
    assert server.post().status == 200


def test_a_temporary_folder_that_is_gone_is_replaced(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    assert serve().post().status == 200


def test_a_system_prompt_is_not_in_argv(serve: Serve, log: Log) -> None:
    system = "0123456789" * 30_000
    answer = serve().post(system=system)
    assert answer.text == "echo: hello; 1 messages"
    assert sum(map(len, log.started()[pid(answer)]["argv"])) < 2000
    assert log.lines(pid(answer))[0]["request"]["systemPrompt"] == [system]


# how a process ends


def test_a_process_that_ignores_the_end_of_its_input_and_sigterm_is_killed(serve: Serve) -> None:
    answer = serve(max_idle=0).post(model="ignore-sigterm")
    assert answer.status == 200
    wait_until(lambda: not psutil.pid_exists(pid(answer)), "the end of the process")


def test_a_process_whose_tool_call_is_yet_to_come_is_killed_at_once(serve: Serve, log: Log) -> None:
    """It would call the API once more when its stdin closes."""
    server = serve()
    answer = server.post("PROBE", tools=[PROBE], model="called.wait")
    assert answer.message["stop_reason"] == "tool_use"
    wait_until(lambda: log.reached("called.wait"), "the process")
    server.close()
    assert log.reached("eof") == []


def test_what_a_process_leaves_behind_is_killed_with_it(serve: Serve) -> None:
    answer = serve(max_idle=0).post("ORPHAN")
    wait_until(lambda: not psutil.pid_exists(pid(answer)), "the end of the process")
    wait_until(lambda: not alive(int(answer.text.split()[-1])), "the end of its child")


def test_a_shutdown_ends_every_process(
    serve: Serve, gate: Path, log: Log, background: ThreadPoolExecutor
) -> None:
    server = serve(drain_secs=0.1)
    talk(server, "hello")
    talk(server, "hello", model="ignore-sigterm")
    running = background.submit(server.post, "PAUSE")
    wait_until(lambda: log.got("PAUSE"), "the running turn")
    server.close()
    assert not [process for process in log.started() if alive(process)]
    assert running.result().status == 503
