"""What people type and set by mistake: one cause, one message, in the words that were typed."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from client import Json, request_body
from host import ROOT, STANDIN, wait_until
from servers import Program, Server
from test_access import ask
from test_operating import run
from test_program import printed

import bridge
from bridge import Config, ConfigError, read_flags

Launch = Callable[..., Program]
ADDRESS = "CLAUDE_CLI_LISTEN_ADDR"


def refused(*words: str, **environ: str) -> str:
    """The one line of a program that does not start."""
    done = run(*words, CLAUDE_CLI_BIN=environ.pop("CLAUDE_CLI_BIN", str(STANDIN)), **environ)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    return line.removeprefix("claude-cli-bridge: ")


# ---------------------------------------------------------------- words

WORDS = {
    "--port 8080": "there is no --port; use --listen-addr=127.0.0.1:PORT",
    "-p 8080": "there is no -p; use --listen-addr=127.0.0.1:PORT",
    "--host=0.0.0.0": "there is no --host; use --listen-addr=HOST:14001",
    "serve": "there is no such command; use `claude-cli-bridge` alone to start it",
    "start": "there is no such command; use `claude-cli-bridge` alone to start it",
    "run": "there is no such command; use `claude-cli-bridge` alone to start it",
    "help": "there is no such command; use --help",
    "version": "there is no such command; use --version",
    "--verbose": "there is no --verbose; use --log-level=debug",
    "--debug": "there is no --debug; use --log-level=debug",
    "--log-file x": "there is no --log-file; use 2>FILE: the log goes to stderr",
    "--model opus": "there is no --model; use `model` in each request",
}


@pytest.mark.parametrize("typed", WORDS)
def test_a_word_that_everybody_tries_is_answered_with_what_to_type(typed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_flags(typed.split(), {})
    assert str(caught.value) == WORDS[typed]


def test_a_key_on_the_command_line_is_not_repeated() -> None:
    said = refused("--api-key", "sesame")
    assert "CLAUDE_CLI_API_KEY in the environment" in said
    assert "sesame" not in said


def test_a_value_in_two_words_is_told_of_quotes() -> None:
    assert refused("--tools", "Read", "Grep").endswith(
        "a value with spaces needs quotes; see --help"
    )


def test_what_is_typed_instead_works(launch: Launch) -> None:
    """The flags of the table are flags, and take these values."""
    flags = {word for said in WORDS.values() for word in re.findall(r"--[a-z-]+=\S+", said)}
    assert flags == {
        "--listen-addr=127.0.0.1:PORT",
        "--listen-addr=HOST:14001",
        "--log-level=debug",
    }
    program = launch("--log-level=debug")
    assert program.post().status == 200
    printed(program, " DEBUG request req_")


def test_a_variable_that_everybody_tries_is_answered_with_a_variable(launch: Launch) -> None:
    program = launch(CLAUDE_CLI_PORT="8080", CLAUDE_CLI_DEBUG="1")
    printed(program, f"CLAUDE_CLI_PORT is no setting; use {ADDRESS}=127.0.0.1:PORT")
    printed(program, "CLAUDE_CLI_DEBUG is no setting; use CLAUDE_CLI_LOG_LEVEL=debug")


@pytest.mark.parametrize("command", bridge.COMMANDS)
def test_each_command_has_a_help_of_its_own(command: str) -> None:
    done = run(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: claude-cli-bridge {command} ")
    assert len(done.stdout.splitlines()) < 10
    assert max(map(len, done.stdout.splitlines())) <= 80


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("watchdog_secs", "10s", "must be a number of seconds, without a unit, got '10s'"),
        ("max_body_bytes", "32MB", "must be a whole number of bytes, without a unit, got '32MB'"),
        ("max_idle", "many", "must be a whole number, got 'many'"),
        ("listen_addr", "127.0.0.1:99999", "a port is at most 65535; got 99999"),
        ("listen_addr", "'127.0.0.1:1'", "leave out the quotes around the value"),
        ("log_level", "verbose", "must be one of info, debug, got 'verbose'"),
        ("bin", "/tmp", "'/tmp' is a directory: name the program in it"),
        ("bin", "/etc/passwd", "'/etc/passwd' is not executable"),
        ("bin", "/no/such/claude", "'/no/such/claude' does not exist"),
        (
            "bin",
            "npx claude",
            "'npx claude' does not exist: name one program; for one with arguments, write a script",
        ),
        ("mcp_config", "/no/such.json", "/no/such.json: No such file or directory"),
        ("trace_dir", "/no/such", "'/no/such' is not a folder that can be written"),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_the_name_that_was_typed(
    name: str, value: str, said: str
) -> None:
    flag = "--" + name.replace("_", "-")
    assert refused(flag, value) == f"{flag}: {said}"
    variable = "CLAUDE_CLI_" + name.upper()
    assert refused(**{variable: value}) == f"{variable}: {said}"


def test_a_key_in_quotes_is_refused_and_not_shown() -> None:
    assert refused(CLAUDE_CLI_API_KEY='"sesame"') == (
        "CLAUDE_CLI_API_KEY: leave out the quotes around the value"
    )


def test_a_script_without_its_interpreter_is_refused_by_that(tmp_path: Path) -> None:
    script = tmp_path / "claude"
    script.write_text("#!/no/such/node\n")
    script.chmod(0o755)
    said = refused("--bin", str(script))
    assert said == f"--bin: '{script}' is a script for /no/such/node, which is not there"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"mcpServers": []}'])
def test_a_broken_mcp_file_is_refused_at_the_start(tmp_path: Path, content: str) -> None:
    file = tmp_path / "mcp.json"
    file.write_text(content)
    said = refused("--mcp-config", str(file), "--tools", "Read")
    assert said == f"--mcp-config: {file} must hold a JSON object with `mcpServers`"


def test_a_temporary_folder_that_is_not_there_is_refused() -> None:
    assert refused(TMPDIR="/no/such") == "TMPDIR: '/no/such' is not a folder that can be written"


def test_a_system_without_a_temporary_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: ["/no/such"])
    with pytest.raises(ConfigError, match=r"^TMPDIR: no folder"):
        Config(bin=str(STANDIN)).checked()


def test_a_tilde_is_the_home(launch: Launch, environment: Path) -> None:
    (environment / "claude").symlink_to(STANDIN)
    launch("--bin", "~/claude", CLAUDE_CLI_LISTEN_ADDR="unix:~/bridge.sock")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(environment / "bridge.sock"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_port_of_roots_is_refused_by_that() -> None:
    """The process has the rights of another user, and the test's environment."""
    lines = (
        "import os, sys",
        f"sys.path.insert(0, {str(ROOT)!r})",
        "import bridge",
        "os.setgid(65534); os.setuid(65534)",
        f"sys.argv[1:] = ['--listen-addr', '127.0.0.1:80', '--bin', {sys.executable!r}]",
        "bridge.find_cli = lambda given: given",  # its folder may be root's
        "bridge.main()",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "claude-cli-bridge: --listen-addr: cannot listen on 127.0.0.1:80: "
        "only root may listen on a port below 1024\n"
    )


@pytest.mark.parametrize("place", [".local/bin", ".claude/local"])
def test_a_cli_is_found_where_its_installer_puts_it(
    environment: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    folder = environment / place
    folder.mkdir(parents=True)
    (folder / "claude").symlink_to(STANDIN)
    monkeypatch.setenv("PATH", "/no/such")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert bridge.find_cli("") == str(folder / "claude")


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("name", "content"),
    [("settings.json", '{"max_idle": 3}'), ("settings.toml", ""), ("settings.json", "null")],
)
def test_a_file_of_settings_is_not_what_config_is_for(
    tmp_path: Path, name: str, content: str
) -> None:
    file = tmp_path / name
    file.write_text(content)
    said = refused("--config", str(file))
    assert said.startswith(f"--config: {file} has no model_providers: this is for the file of")


# ---------------------------------------------------------------- agent mode


def test_agent_settings_without_tools_are_warned_of(launch: Launch, tmp_path: Path) -> None:
    file = tmp_path / "mcp.json"
    file.write_text('{"mcpServers": {}}')
    program = launch("--cwd", str(tmp_path), CLAUDE_CLI_MCP_CONFIG=str(file))
    printed(program, "--cwd has no effect without CLAUDE_CLI_TOOLS")
    printed(program, "CLAUDE_CLI_MCP_CONFIG has no effect without CLAUDE_CLI_TOOLS")


@pytest.mark.parametrize(
    ("settings", "who"),
    [
        ({}, "any local program"),
        ({"CLAUDE_CLI_API_KEY": "sesame"}, "any client with the key"),
        ({ADDRESS: "unix:~/bridge.sock"}, "any program of this user"),
    ],
)
def test_agent_mode_says_at_the_start_who_can_run_what_where(
    launch: Launch, tmp_path: Path, settings: dict[str, str], who: str
) -> None:
    program = launch("--tools", "Read", "--cwd", str(tmp_path), **settings)
    where = f"as user {bridge.user_name()}, in {tmp_path}"
    how = "(tools Read, permission mode default)"
    printed(program, f"agent mode: {who} can use the CLI's own tools {where} {how}")


def test_a_tool_that_the_cli_does_not_have_is_warned_of(
    launch: Launch, cli: Path, since: Callable[[], list[Json]]
) -> None:
    program = launch("--tools", "Raed, Grep,Agent", "--bin", str(cli))
    printed(program, "--tools: the CLI has no tool Raed; did you mean Read?")
    assert not [line for line in program.lines if "Grep;" in line or "no tool Agent" in line]
    assert since() == []


def test_an_mcp_server_that_cannot_start_is_warned_of(
    launch: Launch, cli: Path, tmp_path: Path, since: Callable[[], list[Json]]
) -> None:
    file = tmp_path / "mcp.json"
    file.write_text(json.dumps({"mcpServers": {"broken": {"command": "/no/such/program"}}}))
    program = launch("--tools", "default", "--mcp-config", str(file), "--bin", str(cli))
    printed(program, "the MCP server broken is not there: failed")
    assert not [line for line in program.lines if "has no tool" in line]
    assert since() == []


# ---------------------------------------------------------------- the login


def test_the_start_says_whose_login_it_is(launch: Launch, environment: Path) -> None:
    program = launch()
    where = f"(user {bridge.user_name()} in {environment}/.claude)"
    printed(program, f"logged in: stand-in {where}")


def test_a_client_gets_the_cure_that_the_log_has(launch: Launch) -> None:
    program = launch(
        STANDIN_SONNET="not-logged-in",
        CLAUDE_CLI_KEEP_ENV="STANDIN_SONNET",
        ANTHROPIC_API_KEY="sk-x",
    )
    cure = "CLAUDE_CLI_KEEP_ENV=ANTHROPIC_API_KEY passes it on"
    printed(program, cure)
    answer = program.post(model="not-logged-in")
    assert answer.status == 401
    assert cure in answer.json["error"]["message"]


def test_a_program_that_is_not_claude_code_is_called_so(launch: Launch) -> None:
    program = launch(CLAUDE_CLI_BIN="/bin/true")
    printed(program, "`--version` prints none, so it may not be Claude Code")


# ---------------------------------------------------------------- requests


@pytest.mark.parametrize("line", ["Authorization: sesame", "Authorization: Bearersesame"])
def test_a_key_without_its_scheme_is_told_so(serve: Callable[..., Server], line: str) -> None:
    answer = ask(serve(api_key="sesame"), "Host: localhost", line)
    assert answer.status == 401
    assert answer.json["error"]["message"] == "Authorization takes the word Bearer before the key"


def test_a_client_of_tls_is_called_so_in_the_log(launch: Launch) -> None:
    program = launch()
    with program.connect() as client:
        client.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
        assert client.recv(100).startswith(b"HTTP/1.1 400 ")
    printed(program, 'status=400 error=invalid_request_error reason="TLS: this port speaks plain')


@pytest.mark.parametrize("text", ["FAIL400", "MIDFAIL"])
def test_what_the_api_worded_is_not_in_the_log(
    real: Server, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    """It can quote the prompt."""
    caplog.set_level("INFO", "claude_cli_bridge")
    answer = real.post(text)
    assert answer.status >= 400
    message = answer.json["error"]["message"]
    assert message
    wait_until(lambda: "route=/v1/messages" in caplog.text, "the line")
    assert f"status={answer.status} error={answer.json['error']['type']} " in caplog.text
    assert message not in caplog.text


def test_each_refusal_of_the_bridge_has_its_reason_in_the_log(
    serve: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "claude_cli_bridge")
    server = serve(api_key="sesame")
    key = {"x-api-key": "sesame"}
    answers = [
        server.call("POST", "/v1/messages", b"{"),
        server.call("POST", "/v1/messages", b"{", key),
        server.call("GET", "/v1/messages", None, key),
        server.call("GET", "/nowhere?x", None, key),
        server.call("POST", "/v1/messages", request_body("DIE-START"), key),
    ]
    assert [answer.status for answer in answers] == [401, 400, 405, 404, 502]
    wait_until(lambda: caplog.text.count("request_id=") == len(answers), "the lines")
    rows = [record.row for record in caplog.records if hasattr(record, "row")]
    reasons = [answer.json["error"]["message"] for answer in answers]
    reasons[-1] = "the claude CLI exited with status 1"  # what it printed can quote a prompt
    assert [row["reason"] for row in rows] == reasons
    assert (rows[2]["route"], rows[3]["path"]) == ("/v1/messages", "/nowhere")


def test_nothing_that_a_client_wrote_in_a_body_is_a_reason_in_the_log(
    serve: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "claude_cli_bridge")
    server = serve()
    result = {"type": "tool_result", "tool_use_id": "SECRET \x9b" * 100, "content": "x"}
    call = {"type": "tool_use", "id": "SECRET", "name": "t", "input": {}}
    image = {"type": "base64", "media_type": "SECRET", "data": "iVBORw0KGgoAAAAA"}
    for content in (
        [[result]],
        ["hi", [call], "go on"],
        [[{"type": "image", "source": image}]],
    ):
        messages = [
            {"role": ("user", "assistant")[number % 2], "content": blocks}
            for number, blocks in enumerate(content)
        ]
        assert server.post(messages).status == 400
    assert server.call("GET", "/v1/models/SECRET%9b").status == 404
    assert server.call("GET", "/sk-ant-api03-SECRETSECRET/x%9b").status == 404
    wait_until(lambda: caplog.text.count("request_id=") == 5, "the lines")
    assert "SECRET" not in caplog.text
    assert b"SECRET" not in server.call("GET", "/").body
    assert caplog.text.isascii()
