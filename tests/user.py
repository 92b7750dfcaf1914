"""A user of the CLI: an empty HOME, a login, and the stub as the API."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from servers import make_nobody
from stubs import Stub
from test_logins import LOGINS, log_in

import sessions

# How the benchmarks name these of LOGINS.
NAMES = {"key": "API key", "subscription-with-account": "subscription"}


@dataclass
class User:
    """Whoever runs the CLI, for as long as `logged_in` lasts."""

    name: str
    config: sessions.PoolConfig
    home: str
    stub: Stub


@contextlib.contextmanager
def logged_in(login: str, cli: Path, *arguments: str) -> Iterator[User]:
    """Set the environment of this process to that of a user with one of LOGINS; `arguments` are
    those of the stub."""
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory() as home,
        Stub(*arguments) as stub,
    ):
        make_nobody(patch, Path(home), stub.url)
        kept = log_in(LOGINS[login], Path(home), patch)
        keep = tuple(name for name in kept if name in os.environ)
        yield User(
            NAMES.get(login, login), sessions.PoolConfig(bin=str(cli), keep_env=keep), home, stub
        )
