"""Linters, type checkers, and the fast part of the tests with all warnings and on another Python."""

import subprocess
import sys
from pathlib import Path

import pytest
from host import ROOT, TESTS
from installed import OTHER_PYTHON

FILES = ("bridge.py", "sessions.py", "translate.py")
# Some that start nothing: they need no fixture of conftest.py.
PURE = ("test_translation.py",)


def check(*command: str | Path) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def run(name: str, *arguments: str) -> None:
    """Run a module of this environment."""
    check(sys.executable, "-m", name, *arguments)


def test_ruff_has_nothing_to_say() -> None:
    run("ruff", "check", ".")
    run("ruff", "format", "--check", ".")


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_the_types_are_right_for_mypy(platform: str) -> None:
    run("mypy", "--strict", "--platform", platform, *FILES)


def test_the_types_are_right_for_pyright() -> None:
    run("basedpyright")


def test_the_fast_part_runs_without_a_warning_and_on_another_python() -> None:
    """Where there is no other Python, on this one."""
    python = OTHER_PYTHON[0] if OTHER_PYTHON else Path(sys.executable)
    command = [python, "-X", "dev", "-W", "error", "-m", "pytest", "--noconftest", "-q"]
    command += ["-o", "addopts=", "-o", "pythonpath=.", "-p", "no:cacheprovider"]
    check(*command, *(TESTS / name for name in PURE))
