"""What npm, pip and uv fetch before the tests: the real CLIs, and the clients that people use."""

import contextlib
import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

from host import ROOT

NPM_VERSION = "2.1.197"
# The versions of the CLI that the user asks for (`CLIS=2.1.197,2.1.330`), the newest first; none:
# the bundled one and NPM_VERSION.
ASKED_FOR = sorted(
    {name.strip() for name in os.environ.get("CLIS", "all").split(",")} - {"all", ""},
    key=lambda version: [int(number) for number in re.findall(r"\d+", version)],
    reverse=True,
)
# With which the fixture `cli` runs a test.
CLI_PARAMS = ASKED_FOR or ["bundled", "npm"]
# What tests/test_clients.py and tests/test_plano.py drive: environments, because these packages do
# not go together.
PIP_CLIENTS = {
    "anthropic-0": ("anthropic==0.125.0",),
    "langchain": ("langchain-anthropic==1.7.7", "anthropic>=2.12,<3"),
    "llm": ("llm==0.36", "llm-anthropic==0.30", "openai==3.54.0"),
    "litellm": ("litellm[proxy]==1.106.2",),
    "hermes": ("hermes-agent[anthropic]==0.19.0",),
    "planoai": ("planoai==0.4.39",),
}
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))


def cached(name: str) -> Path:
    """A folder of the user's cache, kept between runs."""
    return CACHE / "claude-cli-bridge-tests" / name


def fetched(*command: str | Path, folder: Path | None = None) -> bool:
    """Run an installer; without a network it fails, at once or much later."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return not subprocess.run(
            command, cwd=folder, capture_output=True, timeout=300, check=False
        ).returncode
    return False


def from_npm(name: str, wanted: str, *packages: str) -> Path | None:
    """What npm installs: the path `wanted` in it, if it is there."""
    folder = cached(name)
    if not (folder / wanted).exists() and shutil.which("npm"):
        folder.mkdir(parents=True, exist_ok=True)
        options = ("--no-audit", "--no-fund", "--prefer-offline", "--fetch-retries=1")
        fetched("npm", "install", *options, *packages, folder=folder)
    return folder / wanted if (folder / wanted).exists() else None


def made(name: str, made_of: list[str], make: Callable[[Path], bool]) -> Path | None:
    """The folder that `make` fills, once for what it is made of."""
    folder, want = cached(name), "\n".join((sys.version, *made_of))
    record = folder.with_name(f"{name}.made-of")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{name}.lock").open("w") as lock:  # another run may be at it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if record.exists() and record.read_text() == want:
            return folder
        record.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        if not make(folder):
            return None
        record.write_text(want)
        return folder


def from_pip(name: str, *requirements: str, base: str = "") -> Path | None:
    """The Python of a virtual environment with these packages.  Filled by uv, because pip takes
    five times as long."""
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

    def make(folder: Path) -> bool:
        return (
            uv is not None
            and fetched(base or sys.executable, "-m", "venv", "--without-pip", folder)
            and fetched(uv, "pip", "install", "--python", folder / "bin/python", *requirements)
        )

    folder = made(name, [*filter(None, [base]), *requirements], make)
    return folder and folder / "bin/python"


def wheels() -> Path | None:
    """All that the README's first command installs, for a pip without a network."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    needed = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *extras["cli"],
        *(one for one in extras["test"] if one.startswith("editables")),
    ]
    return made(
        "wheels",
        needed,
        lambda folder: fetched(sys.executable, "-m", "pip", "download", "-d", folder, *needed),
    )


def other_python() -> Path | None:
    """A Python newer than this one, if there is one, with what the tests need that start nothing."""
    minors = range(sys.version_info.minor + 1, 20)
    of_pyenv = [
        path
        for minor in minors
        for path in (Path.home() / ".pyenv/versions").glob(f"3.{minor}.*/bin/python")
    ]
    on_path = [shutil.which(f"python3.{minor}") for minor in minors]
    for base in [*of_pyenv, *filter(None, on_path)]:
        if not subprocess.run([base, "-c", ""], capture_output=True, check=False).returncode:
            needed = (
                "pytest>=8.4,<10",
                "hypothesis>=6.130,<7",
                "anthropic>=2.12,<3",
                "psutil>=7,<8",
            )
            return from_pip(
                "other-python", *needed, "h11>=0.16,<1", "orjson>=3.10,<4", base=str(base)
            )
    return None


def npm_cli(version: str) -> Path | None:
    """A CLI from the npm registry."""
    wanted = "node_modules/@anthropic-ai/claude-code-linux-x64/claude"
    return from_npm(version, wanted, f"@anthropic-ai/claude-code@{version}")


def find_clis() -> dict[str, Path]:
    """The CLIs by version, the newest first.  Raises LookupError for one that was asked for."""
    found = {}
    if bundled := bundled_cli():
        found[version_of(bundled)] = bundled
    for version in ASKED_FOR or [NPM_VERSION]:
        path = found.get(version) or npm_cli(version)
        if path and version_of(path) == version:
            found[version] = path
        elif ASKED_FOR:
            raise LookupError(f"CLIS: npm cannot fetch version {version} of the claude CLI")
    return {version: found[version] for version in ASKED_FOR or found}


def version_of(cli: Path) -> str:
    done = subprocess.run([cli, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.split()[0]


def js_clients() -> Path | None:
    """The folder with the TypeScript clients that tests/drivers/ts_check.mjs drives, under `js`."""
    packages = ("@anthropic-ai/sdk@1.12.0", "ai@7.0.173", "@ai-sdk/anthropic@4.0.105", "zod@4")
    found = from_npm("ts-ai-7/js", "node_modules/zod", *packages)
    return found and found.parents[2]


def opencode() -> Path | None:
    """OpenCode; this package holds the program of `opencode-ai` for any Linux on x86-64."""
    package = "opencode-linux-x64-baseline"
    return from_npm(
        "opencode-1.18.33", f"node_modules/{package}/bin/opencode", f"{package}@1.18.33"
    )


def bundled_cli() -> Path | None:
    wheel = importlib.util.find_spec("claude_agent_sdk")
    binary = Path(wheel.origin).parent / "_bundled/claude" if wheel and wheel.origin else None
    return binary if binary and binary.exists() else None


CLIS: dict[str, Path] = {}
JS_CLIENTS: list[Path] = []
OPENCODE: list[Path] = []
WHEELS: list[Path] = []
PYTHONS: dict[str, Path] = {}  # of PIP_CLIENTS
OTHER_PYTHON: list[Path] = []
