"""One test for each kind of fault that was found by reading: who is who, what the CLI repairs, what a
launcher hands down, what waits."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from base64 import b64encode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from struct import pack
from typing import Any

import psutil
import pytest
from client import Json, arrived, text
from host import ROOT, STANDIN, wait_until
from servers import Program, Server
from stand_in import Log
from test_pool import in_pool, soon
from test_processes import pid
from test_tools import TOOL, result, start, user

import bridge
import sessions
from bridge import Config
from sessions import Kind, Pool, PoolConfig, child_environment
from translate import ApiError, parse_request

Serve = Callable[..., Server]
linux = pytest.mark.skipif(sys.platform != "linux", reason="of Linux")


def script(path: Path, lines: str) -> Path:
    """A program in place of the CLI, whose version is a good one."""
    path.write_text(
        f'#!/bin/bash\n[ "$1" = --version ] && echo 2.1.260 && exit\nSTANDIN={STANDIN}\n{lines}\n'
    )
    path.chmod(0o755)
    return path


def large_image() -> Json:
    """3,000 by 2,500 pixels, in few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return pack(">I", len(data)) + kind + data + pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress((b"\0" + b"\0\0\0" * 3000) * 2500)
    header = pack(">IIBBBBB", 3000, 2500, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)
    data += chunk(b"IEND", b"")
    source = {"type": "base64", "media_type": "image/png", "data": b64encode(data).decode()}
    return {"type": "image", "source": source}


def answers(program: Program) -> bool:
    try:
        return program.call("GET", "/healthz").status == 200
    except OSError:
        return False


# who is who


def test_of_two_conversations_that_are_alike_one_process_stays(serve: Serve, log: Log) -> None:
    server = serve()
    answers = [server.post("hello") for _ in range(2)]
    assert answers[0].text == answers[1].text
    wait_until(lambda: len(server.processes()) == 1, "the end of one")
    again = server.post(["hello", answers[0].text, "and now"])
    assert (again.session, pid(again)) == ("hot", pid(answers[1]))


def test_an_agents_conversation_that_could_be_anothers_is_never_hot(
    serve: Serve, tmp_path: Path
) -> None:
    """What its tools have seen does not follow from the messages."""
    server = serve(tools="default", cwd=str(tmp_path))
    first, second = server.post("hello"), server.post("hello")
    assert first.text == second.text
    wait_until(lambda: not server.processes(), "the end of both")
    for _ in range(2):
        assert server.post(["hello", first.text, "and now"]).session.startswith("rebuilt")


def test_an_agents_conversation_that_another_has_had_before_is_not_hot(
    serve: Serve, tmp_path: Path
) -> None:
    """The first one's process is gone; its client would get the second one's."""
    server = serve(tools="default", cwd=str(tmp_path), max_idle=1)
    first = server.post("hello")
    server.post("something else")
    wait_until(lambda: len(server.processes()) == 1, "the eviction of the first")
    server.post("hello")
    again = server.post(["hello", first.text, "and now"])
    assert again.session.startswith("rebuilt")


def test_thinking_that_is_echoed_is_compared_and_what_is_left_out_is_told(
    real: Server, since: Callable[[], list[Json]]
) -> None:
    thinking = {"thinking": {"type": "adaptive"}}
    content = real.post("THINK", **thinking).message["content"]
    history: list[Any] = ["THINK", {"role": "assistant", "content": content}, "SAY on"]
    answer = real.post(history, **thinking)
    assert (answer.session, answer.headers.get("x-bridge-not-sent")) == ("hot", None)
    other = [{**content[0], "thinking": "another thought"}, *content[1:]]
    history[1] = {"role": "assistant", "content": other}
    answer = real.post(history, **thinking)
    assert answer.session.startswith("rebuilt")
    assert arrived(since()[-1]["body"])[1]["content"] == other


def test_a_client_that_leaves_out_thinking_is_told_that_the_process_keeps_it(real: Server) -> None:
    said = real.post("THINK").text
    answer = real.post(["THINK", said, "SAY on"])
    assert (answer.session, answer.headers["x-bridge-not-sent"]) == ("hot", "thinking")


def test_a_name_whose_process_is_gone_wants_the_whole_conversation(serve: Serve) -> None:
    server = serve(max_idle=0)
    first = server.post("My name is Ada.", session="s")
    assert first.status == 200
    answer = server.post("What is my name?", session="s")
    assert (answer.status, answer.json["error"]["type"]) == (400, "invalid_request_error")
    assert "send the whole conversation" in answer.json["error"]["message"]
    whole = ["My name is Ada.", first.text, "What is my name?"]
    assert server.post(whole, session="s").text == "echo: What is my name?; 3 messages"


def test_a_named_conversation_that_waits_for_results_refuses_a_text_and_goes_on(
    real: Server,
) -> None:
    messages, (call,) = start(real, session="s")
    refused = real.post("never mind", session="s")
    assert refused.status == 400
    assert "`tool_use` ids were found without `tool_result`" in refused.json["error"]["message"]
    answer = real.post([*messages, user(result(call, "18C"))], session="s", tools=[TOOL])
    assert (answer.status, answer.session) == (200, "hot")


@pytest.mark.parametrize("tools", [[], None])
def test_an_agent_keeps_its_own_tools_when_a_request_has_none(
    serve: Serve, cli: Path, since: Callable[[], list[Json]], tmp_path: Path, tools: Any
) -> None:
    server = serve(bin=cli, tools="Read,Grep", cwd=str(tmp_path))
    assert server.post("SAY x", tools=tools).text == "x"
    assert {tool["name"] for tool in since()[-1]["body"]["tools"]} >= {"Read"}


def test_a_toolset_without_a_name_is_a_clients_tool() -> None:
    body = {"model": "sonnet", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}]}
    for tools, is_agent in ([{"type": "new_toolset"}], False), ([], True):
        request = parse_request(json.dumps({**body, "tools": tools}).encode(), agent=True)
        assert request.is_agent == is_agent


# what the CLI repairs


def test_a_thinking_signature_that_the_api_refuses_is_the_apis_400(
    real: Server, since: Callable[[], list[Json]]
) -> None:
    """The CLI would take out all thinking, ask again, and answer as if nothing had been."""
    thought = {"type": "thinking", "thinking": "hm", "signature": "bad"}
    history = ["hi", {"role": "assistant", "content": [thought, text("a")]}, "BADSIGN"]
    answer = real.post(history, thinking={"type": "adaptive"})
    assert (answer.status, answer.json["error"]["type"]) == (400, "invalid_request_error")
    assert "sent it again with changes" in answer.json["error"]["message"]
    assert answer.headers["x-should-retry"] == "false"


def test_a_large_image_arrives_as_it_was_sent_in_every_place(
    real: Server, since: Callable[[], list[Json]]
) -> None:
    image = large_image()
    first = real.post([user(text("look"), image)])
    assert arrived(since()[-1]["body"])[-1]["content"] == [text("look"), image]
    history = [user(text("look"), image), {"role": "assistant", "content": first.text}]
    answer = real.post([*history, user(text("and"), image)])
    assert answer.session == "rebuilt; reason=images"
    assert arrived(since()[-1]["body"])[-1]["content"] == [text("and"), image]
    messages, (call,) = start(real)
    shown = user(result(call, [text("see"), image]))
    assert real.post([*messages, shown], tools=[TOOL]).status == 200
    (block,) = arrived(since()[-1]["body"])[-1]["content"]
    assert block["content"] == [text("see"), image]


def test_an_image_over_5_mb_is_the_clients_400_and_costs_no_process(serve: Serve) -> None:
    server = serve()
    source = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo" + "A" * 5_242_881}
    source["data"] += "A" * (-len(source["data"]) % 4)
    for block in (
        {"type": "image", "source": source},
        {
            "type": "tool_result",
            "tool_use_id": "x",
            "content": [{"type": "image", "source": source}],
        },
    ):
        answer = server.post([user(block)])
        assert answer.status == 400
        assert "image exceeds 5 MB maximum" in answer.json["error"]["message"]
    assert not server.processes()


def test_a_text_that_javascript_takes_for_white_space_is_refused(serve: Serve) -> None:
    answer = serve().post([user(text("\ufeff"))])
    assert answer.status == 400
    assert "non-whitespace" in answer.json["error"]["message"]


def test_a_system_message_of_settings_alone_is_left_out_and_told(
    real: Server, since: Callable[[], list[Json]]
) -> None:
    """Claude Code as a client sends it after /compact and /effort."""
    messages = [user(text("SAY x"))]
    messages.append({"role": "system", "content": [], "output_config": {"effort": "medium"}})
    answer = real.post(messages)
    assert answer.text == "x"
    assert "messages.1.output_config" in answer.headers["x-bridge-not-sent"]
    assert arrived(since()[-1]["body"]) == [user(text("SAY x"))]


@pytest.mark.parametrize("words", ["Authorization sk-ant-oat01-abc\\ndef0123456789012345x is no"])
def test_no_error_holds_a_token(words: str) -> None:
    message = ApiError(502, words).message
    assert message == "Authorization sk-ant-*** is no"


# what a launcher hands down


def test_a_program_that_closes_descriptors_is_named(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "GATE_SECS", 1.0)
    closing = 'for n in /proc/self/fd/*; do n=${n##*/}; [ $n -gt 2 ] && eval "exec $n>&-"; done'
    server = serve(bin=script(tmp_path / "claude", f"{closing}\nexec sleep 1000"))
    answer = server.post("hello")
    assert (answer.status, answer.json["error"]["type"]) == (502, "claude_cli_error")
    assert "closes the descriptors that it inherits" in answer.json["error"]["message"]


def test_a_spare_that_dies_while_it_is_set_up_costs_no_request(
    serve: Serve, tmp_path: Path
) -> None:
    first = 'if mkdir "$0.first" 2>/dev/null; then read line; exit 1; fi; exec "$STANDIN" "$@"'
    server = serve(bin=script(tmp_path / "claude", first), spares=1)
    assert server.bridge
    pool = server.bridge.pool
    wait_until(lambda: pool.spares.ready, "the spare")
    assert server.post("hello", model="claude-sonnet-5-5").text == "echo: hello; 1 messages"


@linux
def test_a_fork_of_the_host_program_does_not_hold_a_gate(serve: Serve) -> None:
    server = serve(spares=1, watchdog_secs=10)
    assert server.bridge
    pool = server.bridge.pool
    wait_until(lambda: pool.spares.ready, "the spare")
    child = os.fork()
    if not child:
        signal.pause()
        os._exit(0)
    try:
        assert server.post("hello", model="claude-sonnet-5-5").status == 200
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_the_folder_of_a_login_is_absolute_for_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    for given, wanted in (("~/x", "/home/somebody/x"), ("x", f"{os.getcwd()}/x"), ("/x", "/x")):
        child = child_environment(PoolConfig(), {"CLAUDE_CONFIG_DIR": given}, Kind())
        assert child["CLAUDE_CONFIG_DIR"] == wanted


@linux
def test_signals_and_limits_that_a_launcher_has_set_do_no_harm(
    launch: Callable[..., Program],
) -> None:
    lines = "import os, resource, signal, sys\n"
    lines += "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
    lines += "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGCHLD])\n"
    lines += "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
    lines += "resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))\n"
    lines += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {"CLAUDE_CLI_BIN": str(STANDIN), "CLAUDE_CLI_LISTEN_ADDR": f"127.0.0.1:{port}"}
    command = [sys.executable, "-c", lines, str(ROOT / "bridge.py")]
    with subprocess.Popen(
        command, env={**os.environ, **settings}, stderr=subprocess.DEVNULL
    ) as process:
        program = Program("127.0.0.1", port, process=process)  # type: ignore[arg-type]
        wait_until(lambda: answers(program), "the bridge")
        first = program.post("hello")
        assert program.post(["hello", first.text, "more"]).session == "hot"
        limit = psutil.Process(process.pid).rlimit(psutil.RLIMIT_NOFILE)
        assert limit[0] == min(limit[1], 65_536)
        process.terminate()
        assert process.wait(30) == 0


@linux
def test_a_bridge_that_is_process_1_reaps_what_its_children_leave_and_sees_how_they_end() -> None:
    """As in a container without an init."""
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if not shutil.which("unshare") or subprocess.run([*command, "true"], check=False).returncode:
        pytest.skip("only root can have a pid namespace")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {"CLAUDE_CLI_BIN": str(STANDIN), "CLAUDE_CLI_LISTEN_ADDR": f"127.0.0.1:{port}"}
    # It looks for orphans four times in this time.
    settings |= {"CLAUDE_CLI_SESSION_TTL_SECS": "0.4", "CLAUDE_CLI_SPARES": "0"}
    command += [sys.executable, str(ROOT / "bridge.py")]
    with subprocess.Popen(
        command, env={**os.environ, **settings}, stderr=subprocess.DEVNULL
    ) as process:
        program = Program("127.0.0.1", port, process=process)  # type: ignore[arg-type]
        try:
            wait_until(lambda: answers(program), "the bridge")
            [one] = psutil.Process(process.pid).children()
            assert program.post("ORPHAN").status == 200
            for _ in range(3):
                died = program.post("DIE 3").json
                assert "exited with status 3" in died["error"]["message"]
            # With those that ended and that nobody has reaped.
            wait_until(lambda: not one.children(recursive=True), "no child, not even a dead one")
            first = program.post("hello")
            assert program.post(["hello", first.text, "more"]).status == 200
            one.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()


@linux
def test_of_the_dead_process_1_leaves_its_own_children_to_asyncio() -> None:
    lines = "import os, subprocess, sessions\n"
    lines += "def ended(status):\n"
    lines += "    child = subprocess.Popen(['sh', '-c', f'exit {status}'])\n"
    lines += "    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)\n"
    lines += "    return child\n"
    lines += "others, own = ended(3), ended(4)\n"
    lines += "sessions.reap_orphans({own.pid})\n"
    lines += "sessions.reap_orphans({own.pid})\n"
    # Python has 0 for a child that somebody else has reaped.
    lines += "print(others.wait(), own.wait())"
    done = subprocess.run(
        [sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "0 4\n"


def test_a_socket_of_a_service_manager_that_is_none_is_one_line_and_status_2() -> None:
    command = f'LISTEN_PID=$$ LISTEN_FDS=1 exec "{sys.executable}" "{ROOT}/bridge.py" 3</dev/null'
    environ = {**os.environ, "CLAUDE_CLI_BIN": str(STANDIN)}
    done = subprocess.run(
        ["sh", "-c", command], env=environ, capture_output=True, text=True, check=False
    )
    said = [line for line in done.stderr.splitlines() if "LISTEN_FDS" in line]
    assert (done.returncode, len(said)) == (2, 1)
    assert "Traceback" not in done.stderr


@linux
def test_an_administrators_list_of_mcp_servers_does_no_harm(cli: Path, tmp_path: Path) -> None:
    if os.geteuid() or not shutil.which("unshare"):
        pytest.skip("only root can have an /etc of its own")
    etc = tmp_path / "etc"
    shutil.copytree("/etc", etc, symlinks=True, ignore_dangling_symlinks=True)
    (etc / "claude-code").mkdir(exist_ok=True)
    (etc / "claude-code/managed-mcp.json").write_text('{"mcpServers": {}}')
    check = (
        f'mount --bind {etc} /etc; exec "{sys.executable}" "{ROOT}/bridge.py" check --bin "{cli}"'
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-ec", check], capture_output=True, text=True, check=False
    )
    words = {line.split(": ")[0]: line.split(": ")[1] for line in done.stdout.splitlines()}
    features = ("history", "settings", "tools", "interrupt")
    assert {name: words[name] for name in features} == dict.fromkeys(features, "works")


# an embedding program


def test_a_config_is_not_changed_and_its_types_are_checked() -> None:
    async def program() -> None:
        config = Config(bin="true", listen_addr="127.0.0.1:0", spares=0)
        async with bridge.serve(config):
            assert config.bin == "true"
        wrong: Any = "4"
        with pytest.raises(bridge.ConfigError, match="CLAUDE_CLI_MAX_IDLE"):
            async with bridge.serve(Config(bin="true", max_idle=wrong)):
                pass

    asyncio.run(program())


# waiting


def test_a_request_need_not_wait_behind_large_ones_which_wait_in_a_line() -> None:
    async def use(pool: Pool) -> None:
        await pool._lanes[1].acquire()
        assert await pool.compute(sessions.THREAD_SIZE, lambda: 7) == 7
        with pytest.raises(ApiError, match="other large requests") as caught:
            await pool.compute(sessions.LARGE_SIZE, lambda: 7)
        assert caught.value.status == 529
        pool._lanes[1].release()
        assert await pool.compute(sessions.LARGE_SIZE, lambda: 7) == 7
        await soon(lambda: not pool.queued)

    in_pool(use, queue_secs=0.05)


@linux
def test_a_bridge_that_was_stopped_looks_at_the_pipe_before_it_gives_up(
    launch: Callable[..., Program], gate: Path, log: Log, background: ThreadPoolExecutor
) -> None:
    program = launch(CLAUDE_CLI_WATCHDOG_SECS="2")
    answer = background.submit(program.post, "PAUSE")
    wait_until(lambda: log.asked("PAUSE"), "the turn")
    program.process.send_signal(signal.SIGSTOP)
    gate.touch()
    stopped_at = time.monotonic()
    wait_until(lambda: time.monotonic() > stopped_at + 2.5, "more than the watchdog's time")
    program.process.send_signal(signal.SIGCONT)
    assert answer.result().text == "echo: PAUSE; 1 messages"


def test_another_version_of_http_is_505(serve: Serve) -> None:
    with serve().connect() as client:
        client.sendall(b"GET / HTTP/9.9\r\nhost: localhost\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 505 ")
