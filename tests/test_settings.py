"""Settings: what people set by mistake, one cause and one message, in the words that were typed."""

import asyncio
import socket
from pathlib import Path

import pytest
from host import STANDIN, wait_until
from servers import ADDRESS, Launch, Serve, printed, refusal, run
from test_access import KEY

import bridge
from bridge import Config, ConfigError

# ---------------------------------------------------------------- values

NUMBER = "must be a number without a unit, whole unless it is of seconds"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MAX_SESSIONS", "1.5"),
        ("MAX_SESSIONS", "0"),
        ("MAX_IDLE", "-1"),
        ("WATCHDOG_SECS", "-1"),
        ("WATCHDOG_SECS", "nan"),
        ("SESSION_TTL_SECS", "inf"),
        ("DRAIN_SECS", "1s"),
        ("LOG_FORMAT", "xml"),
        ("LISTEN_ADDR", "nonsense"),
        ("LISTEN_ADDR", "unix:/no/such/folder/socket"),
    ],
)
def test_a_setting_that_cannot_work_ends_the_start_with_one_line_that_names_it(
    launch: Launch, name: str, value: str
) -> None:
    program = launch(wait=False, **{f"CLAUDE_CLI_{name}": value})
    assert program.wait() == 2
    wait_until(lambda: program.lines, "the line")
    [line] = program.lines
    assert line.startswith(f"claude-cli-bridge: CLAUDE_CLI_{name}: ")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("watchdog_secs", "10s", f"{NUMBER}; got '10s'"),
        ("max_body_bytes", "32MB", f"{NUMBER}; got '32MB'"),
        ("max_idle", "many", f"{NUMBER}; got 'many'"),
        (
            "listen_addr",
            "127.0.0.1:99999",
            "expected host:port, with a port up to 65535, or unix:/path; got '127.0.0.1:99999'",
        ),
        ("listen_addr", "'127.0.0.1:1'", "leave out the quotes around the value"),
        ("log_level", "verbose", "must be one of info, debug, got 'verbose'"),
        ("bin", "/tmp", "'/tmp' is not an executable file; for arguments write a script"),
        (
            "bin",
            "/etc/passwd",
            "'/etc/passwd' is not an executable file; for arguments write a script",
        ),
        (
            "bin",
            "/no/such/claude",
            "'/no/such/claude' is not an executable file; for arguments write a script",
        ),
        (
            "bin",
            "npx claude",
            "'npx claude' is not an executable file; for arguments write a script",
        ),
        (
            "mcp_config",
            "/no/such.json",
            "/no/such.json must hold a JSON object with `mcpServers`: "
            "[Errno 2] No such file or directory: '/no/such.json'",
        ),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_the_name_that_was_typed(
    name: str, value: str, said: str
) -> None:
    flag = "--" + name.replace("_", "-")
    assert refusal(flag, value) == f"{flag}: {said}"
    variable = "CLAUDE_CLI_" + name.upper()
    assert refusal(**{variable: value}) == f"{variable}: {said}"


def test_a_key_in_quotes_is_refused_and_not_shown() -> None:
    assert refusal(CLAUDE_CLI_API_KEY='"sesame"') == (
        "CLAUDE_CLI_API_KEY: leave out the quotes around the value"
    )


def test_a_script_without_its_interpreter_is_refused_by_that(tmp_path: Path) -> None:
    script = tmp_path / "claude"
    script.write_text("#!/no/such/node\n")
    script.chmod(0o755)
    said = refusal("--bin", str(script))
    assert said == f"--bin: '{script}' is a script for /no/such/node, which is not there"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"mcpServers": []}'])
def test_a_broken_mcp_file_is_refused_at_the_start(tmp_path: Path, content: str) -> None:
    file = tmp_path / "mcp.json"
    file.write_text(content)
    said = refusal("--mcp-config", str(file), "--tools", "Read")
    assert said.startswith(f"--mcp-config: {file} must hold a JSON object with `mcpServers`: ")


@pytest.mark.parametrize("name", ["TMPDIR", "CLAUDE_CLI_TRACE_DIR"])
def test_a_folder_for_files_that_is_not_there_is_refused(name: str) -> None:
    said = refusal(**{name: "/no/such"})
    assert said.startswith(f"{name}: no file can be written: [Errno 2] No such file or directory: ")
    assert "'/no/such/" in said


def test_a_system_without_a_temporary_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: ["/no/such"])
    with pytest.raises(ConfigError, match=r"^TMPDIR: no file can be written: .* \['/no/such'\]"):
        Config(bin=str(STANDIN)).checked()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            "ANTHROPIC_API_KEY=SECRET",
            "takes names of variables, with commas between, and no values",
        ),
        (
            "HTTP_PROXY,ANTHROPIC_API_KEY=SECRET",
            "takes names of variables, with commas between, and no values",
        ),
        ("sk-ant-SECRET", "takes names of variables, with commas between, and no values"),
    ],
)
@pytest.mark.parametrize("command", [(), ("check",)], ids=["serve", "check"])
@pytest.mark.parametrize("way", ["variable", "flag"])
def test_a_secret_in_place_of_a_name_is_refused_and_not_printed(
    command: tuple[str, ...], given: str, words: str, way: str
) -> None:
    flags = ["--keep-env", given] if way == "flag" else []
    variables = {"CLAUDE_CLI_KEEP_ENV": given} if way == "variable" else {}
    done = run(*command, *flags, **{ADDRESS: "127.0.0.1:0", **variables})
    said = done.stdout + done.stderr
    assert done.returncode not in (0, -9)
    name = "--keep-env" if way == "flag" else "CLAUDE_CLI_KEEP_ENV"
    assert f"{name}: {words}" in said
    assert "SECRET" not in said


def test_a_config_is_not_changed() -> None:
    async def program() -> None:
        config = Config(bin="true", listen_addr="127.0.0.1:0", spares=0)
        async with bridge.serve(config):
            assert config.bin == "true"

    asyncio.run(program())


# ---------------------------------------------------------------- where they come from


def test_flags_go_before_the_environment(launch: Launch) -> None:
    flags = ("--bin", str(STANDIN), "--max-sessions", "2", "--log-format", "json")
    program = launch(
        *flags,
        CLAUDE_CLI_BIN="/no/such",
        CLAUDE_CLI_MAX_SESSIONS="many",
        CLAUDE_CLI_LOG_FORMAT="xml",
    )
    assert program.post().text == "echo: hello; 1 messages"


def test_a_variable_that_everybody_tries_is_answered_with_a_variable(launch: Launch) -> None:
    program = launch(CLAUDE_CLI_PORT="8080", CLAUDE_CLI_DEBUG="1")
    printed(program, f"CLAUDE_CLI_PORT is not a setting; use {ADDRESS}=127.0.0.1:PORT")
    printed(program, "CLAUDE_CLI_DEBUG is not a setting; use CLAUDE_CLI_LOG_LEVEL=debug")


def test_a_kept_variable_that_is_not_set_is_none_of_the_bridges_words() -> None:
    warnings = Config(keep_env=("DEBUG",)).warnings({})
    assert warnings == ["CLAUDE_CLI_KEEP_ENV: DEBUG is not set"]


@pytest.mark.parametrize("key", ["unused", "claude-cli-local", "sk-ant-x", ""])
def test_a_placeholder_that_is_kept_is_warned_of(key: str) -> None:
    """What the README and `providers` give to clients and gateways."""
    name = "ANTHROPIC_API_KEY"
    said = Config(keep_env=(name,)).warnings({name: key})
    expected = f"CLAUDE_CLI_KEEP_ENV: {name} is '{key}', a placeholder for clients of the bridge, "
    expected += "and not a key of the API"
    assert said == ([expected] if key in ("unused", "claude-cli-local") else [])


def test_mistyped_variables_are_warned_of_at_the_start(launch: Launch) -> None:
    program = launch(
        CLAUDE_CLI_MAX_SESSION="3",
        CLAUDE_CLI_XYZZY="sesame",
        CLAUDE_CLI_CONFIG="",
        CLAUDE_CLI_KEEP_ENV="ANTHROPIC_API_KEYS",
    )
    printed(
        program, "CLAUDE_CLI_MAX_SESSION is not a setting; did you mean CLAUDE_CLI_MAX_SESSIONS?"
    )
    printed(program, "CLAUDE_CLI_XYZZY is not a setting")
    printed(program, "ANTHROPIC_API_KEYS is not set; did you mean ANTHROPIC_API_KEY?")
    assert not [line for line in program.lines if "sesame" in line or "CONFIG is" in line]


def test_a_tilde_is_the_home(launch: Launch, environment: Path) -> None:
    (environment / "claude").symlink_to(STANDIN)
    launch("--bin", "~/claude", CLAUDE_CLI_LISTEN_ADDR="unix:~/bridge.sock")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(environment / "bridge.sock"))


def test_a_relative_path_of_the_cli_is_found(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(STANDIN.parent.parent)
    program = launch(CLAUDE_CLI_BIN="tests/standin.py")
    assert program.post("hello").text == "echo: hello; 1 messages"


@pytest.mark.parametrize("place", [".local/bin", ".claude/local"])
def test_a_cli_is_found_where_its_installer_puts_it(
    environment: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    folder = environment / place
    folder.mkdir(parents=True)
    (folder / "claude").symlink_to(STANDIN)
    monkeypatch.setenv("PATH", "/no/such")
    monkeypatch.setattr("sys.path", [])
    assert bridge.find_cli("") == str(folder / "claude")


def test_agent_settings_without_tools_are_warned_of(launch: Launch, tmp_path: Path) -> None:
    file = tmp_path / "mcp.json"
    file.write_text('{"mcpServers": {}}')
    program = launch("--cwd", str(tmp_path), CLAUDE_CLI_MCP_CONFIG=str(file))
    printed(program, "CLAUDE_CLI_CWD has no effect without CLAUDE_CLI_TOOLS")
    printed(program, "CLAUDE_CLI_MCP_CONFIG has no effect without CLAUDE_CLI_TOOLS")


# ---------------------------------------------------------------- API key


def test_a_key_that_is_not_utf8_ends_the_start_and_is_not_printed(launch: Launch) -> None:
    program = launch(wait=False, CLAUDE_CLI_API_KEY="sesame\udcff")
    assert program.wait() == 2
    wait_until(lambda: program.lines, "the line")
    [line] = program.lines
    assert line.startswith("claude-cli-bridge: CLAUDE_CLI_API_KEY: must be one line of UTF-8")
    assert "sesame" not in line


@pytest.mark.parametrize("key", ["sesame\udcff", "sesame\n", " sesame", "ses\0ame", "sesame\r\n x"])
def test_a_key_that_no_header_can_hold_is_refused_at_the_start_and_not_shown(
    serve: Serve, key: str
) -> None:
    with pytest.raises(bridge.ConfigError, match=r"^CLAUDE_CLI_API_KEY: must be") as caught:
        serve(api_key=key)
    assert "sesame" not in str(caught.value)


def test_a_config_does_not_show_the_key() -> None:
    assert KEY not in repr(bridge.Config(api_key=KEY))


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0:1",
        "[::]:1",
        "192.0.2.1:1",
        "example.com:1",
        "localhost.example.com:1",
        "[2001:db8::1]:1",
        "*:1",
        "0:1",
    ],
)
def test_to_listen_beyond_loopback_takes_a_key(address: str) -> None:
    with pytest.raises(bridge.ConfigError, match="CLAUDE_CLI_API_KEY"):
        bridge.Config(listen_addr=address, bin=str(STANDIN)).checked()
    bridge.Config(listen_addr=address, bin=str(STANDIN), api_key=KEY).checked()


@pytest.mark.parametrize("address", [":::1", "[::]:1", "0.0.0.0:1"])
def test_who_listens_on_all_addresses_is_told_of_allowed_hosts(address: str) -> None:
    [said] = Config(listen_addr=address).warnings({})
    assert "get 403 until CLAUDE_CLI_ALLOWED_HOSTS holds that name or address" in said
    assert Config(listen_addr=address, allowed_hosts=("bridge.example",)).warnings({}) == []


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1:0", "127.0.0.9:1", "localhost:1", "LocalHost:1", "[::1]:65535"),
        *("unix:/tmp/x", "unix:x"),
    ],
)
def test_loopback_and_unix_sockets_take_no_key(address: str) -> None:
    bridge.Config(listen_addr=address, bin=str(STANDIN)).checked()


@pytest.mark.parametrize(
    "address",
    [
        "",
        "1",
        ":1",
        "127.0.0.1",
        "127.0.0.1:",
        "127.0.0.1:x",
        "127.0.0.1:-1",
        "127.0.0.1:65536",
        "a..localhost:1",
        "unix:",
    ],
)
@pytest.mark.parametrize("key", ["", KEY])
def test_what_is_no_address_is_refused_by_name(serve: Serve, address: str, key: str) -> None:
    with pytest.raises(bridge.ConfigError, match="CLAUDE_CLI_LISTEN_ADDR"):
        serve(listen_addr=address, api_key=key)


def test_the_bridge_does_not_start_beyond_loopback_without_a_key(
    serve: Serve,
) -> None:
    with pytest.raises(bridge.ConfigError, match="CLAUDE_CLI_API_KEY"):
        serve(listen_addr="0.0.0.0:0")


@pytest.mark.parametrize("value", [10**20, 10**400])
def test_a_number_that_is_too_large_for_anything_is_refused_with_its_bound(value: int) -> None:
    with pytest.raises(bridge.ConfigError, match="a number from 0 to 1e"):
        Config(bin="true", spares=value).checked()
