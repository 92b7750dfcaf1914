"""The programs that people use, each connected as the README says, in front of the bridge and the
real CLI.

Each script in tests/clients has one conversation: a whole answer, a streamed one, and the round
trip of a tool.
"""

import json
import os
import re
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import readme
from client import Json, arrived, text
from host import TESTS, wait_until
from installed import CLIS, PIP_CLIENTS, PYTHONS
from servers import Server

Run = Callable[..., str]
# In the README, and in the scripts.
BRIDGE, PROXY = "http://127.0.0.1:14001", "http://127.0.0.1:4000"

PROXY_CONFIG = readme.block("model_list:")
EXPORT = readme.block("export ANTHROPIC_BASE_URL")
HERMES_CONFIG = readme.block("api_mode: anthropic_messages")


@pytest.fixture
def cli() -> Path:
    """The newest version that is there: what differs between versions is not the clients'
    affair."""
    if not CLIS:
        pytest.skip("no CLI is installed")
    return next(iter(CLIS.values()))


def environment_of_a_client() -> dict[str, str]:
    """Nothing in it leads past the bridge; LiteLLM looks for no list of prices on the network,
    which is not there."""
    environ = {
        name: value for name, value in os.environ.items() if not name.startswith("ANTHROPIC_")
    }
    return {**environ, "LITELLM_LOCAL_MODEL_COST_MAP": "true"}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a program to its end; what it printed."""

    def run(*command: str | Path, **variables: str) -> str:
        environ = {**environment_of_a_client(), **variables}
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=environ,
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def python(name: str) -> Path:
    """The interpreter of a client: its own environment's, or without a name that of the tests."""
    if name and name not in PYTHONS:
        pytest.skip(f"{name} is not installed, and could not be fetched: no network, or no uv")
    return PYTHONS[name] if name else Path(sys.executable)


def script(name: str, address: str, real: str) -> str:
    """A client's script, with another address than the README's."""
    return (TESTS / "clients" / name).read_text().replace(address, real)


def exported(server: Server) -> dict[str, str]:
    return dict(item.split("=") for item in EXPORT.replace(BRIDGE, server.url).split()[1:])


def check(printed: str, server: Server, rows: list[Json]) -> None:
    """The client got its answers, the API its conversation, and all of it went through one process
    for each list of betas."""
    found = json.loads(printed.splitlines()[-1])
    assert found["text"].strip() == "Once upon a time."
    assert "".join(found["pieces"]).strip() == "They lived happily ever after."
    assert len([piece for piece in found["pieces"] if piece.strip()]) > 1
    assert "18C in Paris" in found["tool"]
    assert [len(arrived(row["body"])) for row in rows] == [1, 3, 5, 7]
    *_, tool_use = arrived(rows[-1]["body"])[-2]["content"]
    (result,) = arrived(rows[-1]["body"])[-1]["content"]
    assert (tool_use["name"], tool_use["input"]) == ("get_weather", {"city": "Paris"})
    assert (result["tool_use_id"], result["content"]) == (tool_use["id"], [text("18C in Paris")])
    betas = {row["headers"].get("anthropic-beta") for row in rows}
    assert len(server.processes()) == len(betas) < 3


@pytest.mark.parametrize(
    ("name", "environment_name"),
    [
        ("anthropic_sdk.py", ""),
        ("anthropic_sdk.py", "anthropic-0"),
        ("langchain_chat.py", "langchain"),
        ("chat_completions.py", "litellm"),
    ],
)
def test_library_gets_text_stream_and_tools(
    real: Server, run: Run, since: Callable[[], list[Json]], name: str, environment_name: str
) -> None:
    check(
        run(python(environment_name), "-c", script(name, BRIDGE, real.url), environment_name),
        real,
        since(),
    )


# A client's own class for a prompt that is too long, and a script that prints what is raised.
OVERFLOWS = {
    "langchain": (
        "AnthropicContextOverflowError ContextOverflowError",
        """
from langchain_anthropic import ChatAnthropic
chat = ChatAnthropic(model="claude-sonnet-5-5", base_url="http://127.0.0.1:14001", api_key="unused")
def ask(stream):
    list(chat.stream("FAIL400")) if stream else chat.invoke("FAIL400")
""",
    ),
    "litellm": (
        "ContextWindowExceededError",
        """
import litellm
asked = [{"role": "user", "content": "FAIL400"}]
bridge = {"api_base": "http://127.0.0.1:14001", "api_key": "unused"}
def ask(stream):
    said = litellm.completion("anthropic/claude-sonnet-5-5", asked, stream=stream, **bridge)
    list(said)
""",
    ),
}
RAISED = """
for stream in (False, True):
    try:
        ask(stream)
    except Exception as error:
        print(*(kind.__name__ for kind in type(error).__mro__))
"""


@pytest.mark.parametrize("name", OVERFLOWS)
def test_library_raises_its_own_error_for_a_prompt_that_is_too_long(
    real: Server, run: Run, name: str
) -> None:
    wanted, lines = OVERFLOWS[name]
    lines = lines.replace(BRIDGE, real.url)
    raised = run(python(name), "-c", lines + RAISED, LITELLM_LOG="CRITICAL").splitlines()
    kinds = [line.split() for line in raised if "BaseException" in line]
    assert [set(wanted.split()) <= set(found) for found in kinds] == [True, True]


def test_llm_gets_text_stream_and_tools(
    real: Server, run: Run, since: Callable[[], list[Json]]
) -> None:
    check(run(python("llm"), TESTS / "clients/llm_commands.py", **exported(real)), real, since())


# LiteLLM as a proxy


@pytest.fixture
def proxy(real: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The proxy in front of the bridge: its address.  It demands a key."""
    monkeypatch.setenv("LITELLM_MASTER_KEY", "sk-" + secrets.token_hex())
    config, log = tmp_path / "litellm.yaml", tmp_path / "log"
    config.write_text(PROXY_CONFIG.replace(BRIDGE, real.url))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        python("litellm").with_name("litellm"),
        "--config",
        config,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment_of_a_client(), stdout=output, stderr=subprocess.STDOUT
        )

    def listens() -> bool:
        assert process.poll() is None, log.read_text()
        with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return True
        return False

    try:
        wait_until(listens, "the start of the proxy", 100)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def test_openai_client_of_a_litellm_proxy_gets_text_stream_and_tools(
    real: Server, proxy: str, run: Run, since: Callable[[], list[Json]]
) -> None:
    check(
        run(python("llm"), "-c", script("chat_completions.py", PROXY, proxy), "openai"),
        real,
        since(),
    )


def test_the_readmes_table_holds_the_lines_that_these_tests_use() -> None:
    scripts = [path.read_text() for path in (TESTS / "clients").glob("*.py")]
    ran = "".join(scripts + [text for _, text in readme.blocks()])
    for client, how in readme.rows(readme.section("## Connect")):
        lines = re.findall("`(.+?)`", how)
        assert lines or "below" in how or "two variables" in how, client
        assert all(line in ran for line in lines), client


def test_the_table_of_clients_holds_the_versions_that_are_tested() -> None:
    table = readme.section("## Clients", readme.EVIDENCE)
    pinned = [
        package.partition("==")
        for name, packages in PIP_CLIENTS.items()
        for package in packages
        if "==" in package and name != "planoai"
    ]
    assert all(version in table for _, _, version in pinned)


# Hermes


def test_hermes_uses_its_tools_and_goes_on_in_the_same_process(
    real: Server, run: Run, since: Callable[[], list[Json]], tmp_path: Path
) -> None:
    (tmp_path / ".hermes").mkdir()
    config = HERMES_CONFIG.replace(BRIDGE, real.url)
    (tmp_path / ".hermes/config.yaml").write_text(config)
    (tmp_path / "note.txt").write_text("The word is pomegranate.")
    program = python("hermes").with_name("hermes")
    # There is no network for the packages that it installs when it is started.
    quiet = {"HOME": str(tmp_path), "HERMES_DISABLE_LAZY_INSTALLS": "1"}

    def ask(*words: str) -> str:
        return run(program, "chat", "--quiet", *words, **quiet)

    assert "Once upon a time." in ask("--query", "SAY Once upon a time.")
    note = json.dumps({"path": str(tmp_path / "note.txt")})
    told = ask("--continue", "--query", f"USE_TOOL read_file INPUT={note}END")
    assert "The word is pomegranate." in told
    rows = [row for row in since() if row["path"].startswith("/v1/messages")]
    assert [len(arrived(row["body"])) for row in rows] == [1, 3, 5]
    assert len(real.processes()) == len({str(row["headers"]["anthropic-beta"]) for row in rows})


# Claude Code


@pytest.fixture
def claude(real: Server, cli: Path, run: Run) -> Run:
    """Claude Code with the bridge as its API: claude("--flag", "prompt")."""
    return lambda *words: run(cli, "-p", *words, **exported(real))


def test_claude_code_gets_its_answer_and_the_api_its_prompt(
    claude: Run, since: Callable[[], list[Json]]
) -> None:
    assert claude("SAY It is so.") == "It is so.\n"
    (row,) = since()
    assert text("SAY It is so.") in arrived(row["body"])[0]["content"]
    assert {"Bash", "Edit", "Read"} <= {t["name"] for t in row["body"]["tools"]}
    # A subject of Claude Code's own system prompt.
    assert "security testing" in json.dumps(row["body"]["system"])


def test_claude_code_uses_a_tool_of_its_own_in_one_process(
    real: Server, claude: Run, since: Callable[[], list[Json]], tmp_path: Path
) -> None:
    (tmp_path / "note.txt").write_text("the word is 42")
    asked = f'USE_TOOL Read INPUT={{"file_path": "{tmp_path / "note.txt"}"}}END'
    assert "the word is 42" in claude(asked)
    first, second = (arrived(row["body"]) for row in since())
    assert second[: len(first)] == first
    *_, tool_use = second[-2]["content"]
    assert (tool_use["name"], tool_use["input"]) == (
        "Read",
        {"file_path": str(tmp_path / "note.txt")},
    )
    assert "the word is 42" in json.dumps(second[-1]["content"])
    assert len(real.processes()) == 1


def test_claude_code_counts_its_context_at_the_api(
    claude: Run, since: Callable[[], list[Json]]
) -> None:
    # Without its other tools, which it counts one by one.
    table = claude("/context", "--tools=Bash,Read")
    figures = re.findall(r"^\| (\w[\w ]+?) \| ([\d.]+)(k?) \|", table, re.M)
    tokens = {
        name: float(figure) * (1000 if thousands else 1) for name, figure, thousands in figures
    }
    assert 1000 < tokens["System prompt"] < 10_000
    assert 500 < tokens["System tools"] < 10_000
    assert 0 < tokens["Messages"] < 1000
    counted = since()
    assert {row["path"] for row in counted} == {"/v1/messages/count_tokens"}
    assert ["Bash", "Read"] in [[t["name"] for t in row["body"]["tools"]] for row in counted]
    assert any("security testing" in json.dumps(row["body"]["messages"]) for row in counted)
