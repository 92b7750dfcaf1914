"""`claude-cli-bridge check`: with the real CLI, and with the real CLI behind a filter that takes
one feature away."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from client import Json
from installed import CLIS
from servers import BRIDGE, kept_names, run

from bridge import user_name

FEATURES = ("history", "settings", "tools", "interrupt")


def check(bin: Path | str, *before: str, **environ: str) -> tuple[int, dict[str, str]]:
    """Exit status, and what was said of what."""
    command = [*before, *BRIDGE, "check", "--bin", str(bin)]
    environ = {**os.environ, "CLAUDE_CLI_KEEP_ENV": ",".join(kept_names()), **environ}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.returncode, dict(line.split(": ", 1) for line in done.stdout.splitlines())


def test_a_working_cli_passes_and_no_token_is_spent(
    cli: Path, environment: Path, since: Callable[[], list[Json]]
) -> None:
    status, said = check(cli)
    login = f"ANTHROPIC_API_KEY (user {user_name()} in {environment}/.claude)"
    [version] = [version for version, path in CLIS.items() if path == cli]
    works = dict.fromkeys(FEATURES, "works")
    assert said == {
        "CLI": str(cli),
        "time": "up to 60 seconds",
        "login": login,
        "version": version,
        **works,
    }
    assert status == 0
    assert since() == []


def test_nobody_logged_in_fails_and_says_how_to_log_in(cli: Path) -> None:
    status, said = check(
        cli, CLAUDE_CLI_KEEP_ENV="ANTHROPIC_BASE_URL,CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC"
    )
    assert status == 1
    assert said["login"].startswith("nobody is logged in: found no login of user ")
    assert "ANTHROPIC_API_KEY is set, but not passed on to the CLI" in said["login"]
    assert {said[name] for name in FEATURES} == {"works"}


# Calls "$CLI" without --resume and the name after it.
WITHOUT_GATE = """
for word; do
    shift
    [ "$before" = --resume ] || [ "$word" = --resume ] || set -- "$@" "$word"
    before=$word
done
exec "$CLI" "$@"
"""


@pytest.mark.parametrize(
    ("feature", "script"),
    [
        ("history", WITHOUT_GATE),
        ("settings", 'grep --line-buffered -v apply_flag_settings | "$CLI" "$@"'),
        ("tools", 'sed -u s/sdkMcpServers/others/ | "$CLI" "$@"'),
        ("interrupt", """grep --line-buffered -v '"subtype":"interrupt"' | "$CLI" "$@\""""),
    ],
)
def test_a_cli_without_a_feature_fails_and_names_it(
    tmp_path: Path, feature: str, script: str
) -> None:
    if not CLIS:
        pytest.skip("no CLI is installed")
    wrapper = tmp_path / "claude"
    wrapper.write_text(f"#!/bin/sh\nCLI={next(iter(CLIS.values()))}\n{script}\n")
    wrapper.chmod(0o755)
    status, said = check(wrapper, CLAUDE_CLI_WATCHDOG_SECS="15")
    assert status == 1
    assert [name for name in FEATURES if said[name].startswith("does not work")] == [feature]


def test_a_cli_that_is_not_there_fails_and_says_so() -> None:
    done = run("check", "--bin", "/no/such/claude")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--bin: '/no/such/claude' is not an executable file" in done.stderr


def test_a_cli_that_does_not_start_fails_and_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "claude"
    broken.write_text("#!/bin/sh\necho no library >&2\nexit 3\n")
    broken.chmod(0o755)
    status, said = check(broken)
    assert status == 1
    assert "the claude CLI exited with status 3: no library" in said["failure"]


@pytest.mark.parametrize(
    "behaviour", ["exec sleep 1000", """while echo '{"type":"user"}'; do sleep 0.1; done"""]
)
def test_a_cli_that_never_answers_fails_in_time(tmp_path: Path, behaviour: str) -> None:
    endless = tmp_path / "claude"
    endless.write_text(f"#!/bin/sh\n{behaviour}\n")
    endless.chmod(0o755)
    status, said = check(endless, CLAUDE_CLI_WATCHDOG_SECS="1")
    assert status == 1
    assert said["failure"]


def test_an_administrators_settings_may_lead_to_an_api_but_to_no_model(
    cli: Path, since: Callable[[], list[Json]], tmp_path: Path
) -> None:
    """What is asked of an API that the bridge did not choose must not be answered, and so not be
    paid."""
    if os.geteuid() or not shutil.which("unshare"):
        pytest.skip("only root can have an /etc of its own")
    etc = tmp_path / "etc"
    shutil.copytree("/etc", etc, symlinks=True, ignore_dangling_symlinks=True)
    (etc / "claude-code").mkdir(exist_ok=True)
    settings = {"env": {"ANTHROPIC_BASE_URL": os.environ["ANTHROPIC_BASE_URL"]}}
    (etc / "claude-code/managed-settings.json").write_text(json.dumps(settings))
    status, _ = check(
        cli, "unshare", "--mount", "sh", "-ec", f'mount --bind {etc} /etc; exec "$@"', "sh"
    )
    assert status == 1
    asked = [row for row in since() if row["path"] == "/v1/messages"]
    assert asked
    assert {row["body"]["model"] for row in asked} == {"no-such-model"}


@pytest.mark.parametrize("words", [["check", "--listen-addr", "nowhere"], ["chekc"]])
def test_a_mistake_is_said_in_one_line_by_check_and_before_it(words: list[str]) -> None:
    done = run(*words)
    said = (done.stdout + done.stderr).splitlines()
    assert len(said) == 1
    assert ": --listen-addr: " in said[0] or "did you mean check?" in said[0]
