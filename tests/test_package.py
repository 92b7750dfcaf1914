"""What is installed: one package, made of the checkout's three files; and what may be in them.

Everything is built and installed without a network, from what git has of the project.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import readme
from client import Client, request_body
from host import ROOT, STANDIN, TESTS
from installed import WHEELS
from test_library import FILES, TURN

import bridge

PACKAGE = "claude_cli_bridge"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOP_LEVEL = {*FILES, "tests", "pyproject.toml", "README.md", "LICENSE", ".ci", ".gitignore"}
# What of each file is imported, besides the standard library.
ARROWS = {
    "bridge.py": {"sessions", "translate", "h11", "orjson"},
    "sessions.py": {"orjson", "translate"},
    "translate.py": {"orjson"},
}
# The standard library that translate.py uses: nothing that reads, writes, waits or knows the time.
PURE = {
    "itertools",
    "binascii",
    "collections",
    "dataclasses",
    "enum",
    "hashlib",
    "json",
    "re",
    "typing",
    "uuid",
}
BOUNDED = re.compile(r"[\w-]+>=[\d.]+,<[\d.]+(; .+)?")

# ---------------------------------------------------------------- the checkout


def listed() -> list[str]:
    """What git has, or would take, of the project and is on the disk."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in names.split("\0") if (ROOT / name).is_file()]


def imported(path: Path) -> set[str]:
    """The modules that a file names in its imports, wherever they are, by their first part."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} if node.module else {alias.name for alias in node.names}
    return {name.partition(".")[0] for name in found}


def test_the_checkout_has_three_modules_and_nothing_else_at_its_top() -> None:
    assert {name.partition("/")[0] for name in listed()} == TOP_LEVEL


@pytest.mark.parametrize("name", FILES)
def test_imports_go_one_way_and_leave_the_standard_library_for_h11_and_orjson(name: str) -> None:
    assert imported(ROOT / name) - sys.stdlib_module_names == ARROWS[name]


def test_the_translation_does_no_input_or_output() -> None:
    assert imported(ROOT / "translate.py") - ARROWS["translate.py"] <= PURE
    tree = ast.parse((ROOT / "translate.py").read_text())
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {function.id for function in calls if isinstance(function, ast.Name)}
    assert names.isdisjoint({"open", "print", "input", "__import__", "exec", "eval"})


def test_each_section_has_files_of_tests() -> None:
    titles = {
        title
        for name in FILES
        for title in re.findall(r"^# -{20,} (.*)$", (ROOT / name).read_text(), re.M)
    }
    files = dict(readme.rows(readme.section("## What each file proves", readme.EVIDENCE)))
    assert files.keys() == titles
    for name in ", ".join(files.values()).split(", "):
        assert (TESTS / f"{name}.py").is_file(), name


def test_each_file_states_the_version() -> None:
    for name in FILES:
        stated = re.findall(r'^__version__ = "(.*)"$', (ROOT / name).read_text(), re.M)
        assert stated == [bridge.__version__], name


def test_the_dependencies_are_two_and_all_requirements_have_bounds() -> None:
    project = PROJECT["project"]
    needed = project["dependencies"]
    assert [re.split(r"\W", one)[0] for one in needed] == ["h11", "orjson"]
    lists = [*project["optional-dependencies"].values(), PROJECT["build-system"]["requires"]]
    every = needed + [one for some in lists for one in some]
    assert [one for one in every if not BOUNDED.fullmatch(one)] == []
    assert project["requires-python"] == ">=3.11"


# ---------------------------------------------------------------- built


BUILD = """
import sys
from hatchling.build import build_editable, build_sdist, build_wheel
print({what}(sys.argv[1]))
"""


def pip(environment: Path, *arguments: str | Path) -> None:
    """Install into an environment, without a network."""
    python = environment / "bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    command = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index"]
    command += ["--disable-pip-version-check", "--find-links", WHEELS[0], *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@dataclass
class Builder:
    folder: Path

    def build(self, what: str, source: Path) -> Path:
        """The path of what a function of the backend makes of these sources."""
        made = self.folder / f"{what}-{source.name}"
        made.mkdir()
        python = self.folder / "env/bin/python"
        command = [python, "-c", BUILD.format(what=what), made]
        done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return made / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of the project, and what an earlier build with setuptools left behind."""
    folder = tmp_path_factory.mktemp("package") / "source"
    for name in [*listed(), *(f"build/lib/{name}" for name in FILES)]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name.removeprefix("build/lib/"), folder / name)
    return folder


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    if not WHEELS:
        pytest.skip("the packages could not be downloaded")
    folder = tmp_path_factory.mktemp("builder")
    pip(folder / "env", *PROJECT["build-system"]["requires"], "editables")
    return Builder(folder)


@pytest.fixture(scope="module")
def wheel(builder: Builder, source: Path) -> Path:
    return builder.build("build_wheel", source)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """An environment with the wheel and what it needs, installed twice."""
    folder = tmp_path_factory.mktemp("installed") / "env"
    for again in ((), ("--force-reinstall",)):
        pip(folder, *again, wheel)
    return folder


def test_a_wheel_holds_one_package_with_the_three_files_line_by_line(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        texts = {name: archive.read(name).decode() for name in archive.namelist()}
    metadata = f"{PACKAGE}-{bridge.__version__}.dist-info"
    parts = {name: text for name, text in texts.items() if not name.startswith(metadata + "/")}
    own = {"__init__.py", "__main__.py", "py.typed"}
    assert parts.keys() == {f"{PACKAGE}/{name}" for name in {*FILES, *own}}
    for name in FILES:
        lines = (ROOT / name).read_text().splitlines()
        pairs = list(zip(lines, parts[f"{PACKAGE}/{name}"].splitlines(), strict=True))
        changed = [pair for pair in pairs if pair[0] != pair[1]]
        choice = (
            "if TYPE_CHECKING or not __package__:",
            "if not TYPE_CHECKING and not __package__:",
        )
        assert changed == [choice] * (name != "translate.py")


def test_an_sdist_makes_the_same_wheel_and_holds_no_tests(
    builder: Builder, source: Path, wheel: Path
) -> None:
    sdist = builder.build("build_sdist", source)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(builder.folder, filter="data")
    top = {name.partition("/")[0] for name in names}
    assert top == TOP_LEVEL - {"tests"} | {"PKG-INFO"}
    again = builder.build("build_wheel", builder.folder / sdist.name.removesuffix(".tar.gz"))
    assert again.read_bytes() == wheel.read_bytes()


def test_files_that_choose_their_imports_in_another_way_are_refused(
    builder: Builder, source: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(source, other)
    text = (other / "sessions.py").read_text()
    (other / "sessions.py").write_text(text.replace("if TYPE_CHECKING or not ", "if not "))
    with pytest.raises(AssertionError, match=r"see \.ci/wheel\.py: not 1 times"):
        builder.build("build_wheel", other)


# ---------------------------------------------------------------- installed


@pytest.fixture
def crowded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the user's own modules, which Python looks into first."""
    folder = tmp_path / "crowded"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text("raise SystemExit('a module of the user was imported')\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def output(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


WAYS = {"program": ["bin/claude-cli-bridge"], "module": ["bin/python", "-m", PACKAGE]}


@pytest.mark.parametrize("way", WAYS)
def test_beside_modules_of_the_same_names_the_program_starts_and_answers(
    installed: Path, crowded: Path, way: str
) -> None:
    command = [str(installed / WAYS[way][0]), *WAYS[way][1:]]
    assert output(*command, "--version", cwd=crowded) == f"claude-cli-bridge {bridge.__version__}\n"
    command += ["--listen-addr", "127.0.0.1:0", "--bin", str(STANDIN)]
    with subprocess.Popen(command, cwd=crowded, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr
            line = r"listening on (?:http://)?127.0.0.1:(\d+)"
            port = next(found[1] for text in process.stderr if (found := re.search(line, text)))
            answer = Client("127.0.0.1", int(port)).post()
        finally:
            process.terminate()
        assert process.wait(30) == 0
    assert answer.text == "echo: hello; 1 messages"


def test_beside_modules_of_the_same_names_another_program_can_embed_it(
    installed: Path, crowded: Path
) -> None:
    turn = TURN.format(module=PACKAGE)
    arguments = ["-c", turn, str(STANDIN), json.dumps(request_body())]
    found = json.loads(output(installed / "bin/python", *arguments, cwd=crowded))
    assert found["text"] == "echo: hello; 1 messages"
    assert Path(found["file"]).parent.name == PACKAGE
    modules = {name.partition(".")[0] for name in found["modules"]}
    assert modules - sys.stdlib_module_names == {"h11", "orjson", PACKAGE}


def test_the_package_exports_what_a_host_program_needs(installed: Path, tmp_path: Path) -> None:
    program = (
        "import importlib.metadata, json\n"
        "from claude_cli_bridge import *\n"
        "assert issubclass(ConfigError, ValueError) and callable(serve)\n"
        "Bridge, Config\n"
        "print(__version__, importlib.metadata.version('claude-cli-bridge'))"
    )
    said = output(installed / "bin/python", "-W", "error", "-c", program, cwd=tmp_path)
    assert said.split() == [bridge.__version__] * 2


RIGHT = """
from claude_cli_bridge import Bridge, Config, ConfigError, __version__, serve


def settings() -> Config:
    try:
        return Config(listen_addr="127.0.0.1:0", api_key="key", spares=2, max_idle=4, bin="claude")
    except ConfigError as error:
        raise SystemExit(f"{__version__}: {error}") from error


def first(bridge: Bridge) -> str:
    return bridge.addresses[0]


async def main() -> list[str]:
    async with serve(settings()) as bridge:
        return [first(bridge), *bridge.addresses]
"""
# Each wrong line, and what mypy calls the fault.
WRONG = {
    "Config(max_idel=4)": "call-arg",  # a field of PoolConfig
    "Config(listen_adr='')": "call-arg",
    "Config(spares='two')": "arg-type",
    "serve(4)": "arg-type",
    "Config().no_such_setting": "attr-defined",
    "len(Config().spares)": "arg-type",
    "from claude_cli_bridge import no_such_name": "attr-defined",
}


@pytest.fixture
def checked(installed: Path, tmp_path: Path) -> Callable[[str], list[str]]:
    """What mypy finds in a program of a user: its lines."""

    def check(program: str) -> list[str]:
        (tmp_path / "program.py").write_text(program)
        command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "program.py"]
        command += ["--python-executable", str(installed / "bin/python")]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.stderr == ""
        return done.stdout.splitlines()

    return check


def test_mypy_knows_the_settings_and_refuses_wrong_ones(
    checked: Callable[[str], list[str]],
) -> None:
    assert checked(RIGHT) == []
    found = checked("\n".join(["from claude_cli_bridge import Config, serve", *WRONG]))
    faults = [re.search(r"^program.py:(\d+): error: .*\[([\w-]+)\]$", line) for line in found]
    assert [(int(fault[1]), fault[2]) for fault in faults if fault] == [
        *enumerate(WRONG.values(), 2)
    ], found


def test_installed_in_place_the_package_reads_the_three_files_of_the_checkout(
    builder: Builder, source: Path, crowded: Path, tmp_path: Path
) -> None:
    pip(tmp_path / "env", builder.build("build_editable", source))
    python = tmp_path / "env/bin/python"
    said = output(python, "-m", PACKAGE, "--version", cwd=crowded)
    assert said == f"claude-cli-bridge {bridge.__version__}\n"
    program = f"import {PACKAGE}.sessions, sys; print({PACKAGE}.sessions.__file__, *sys.path)"
    file, *path = output(python, "-c", program, cwd=crowded).split()
    assert Path(file) == source / "sessions.py"
    assert str(source) not in path
