"""The files of deploy/, as they are used: a real supervisord, a real systemd, what the Dockerfile
builds; and the commands of the README beside them.  nginx.conf: test_gateway.py."""

import configparser
import contextlib
import getpass
import itertools
import json
import plistlib
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import import_module
from pathlib import Path
from string import Template
from typing import Any
from xmlrpc.client import ServerProxy

import machine
import psutil
import pytest
import readme
from client import Client, Json, request_body
from host import ROOT, STANDIN, TESTS, children, wait_until
from installed import CLIS, WHEELS
from machine import Machine, Process, end, inside
from processes import alive, pid
from servers import activate, kept_names
from stand_in import Log
from stubs import Stub
from supervisor.xmlrpc import SupervisorTransport

import bridge
import sessions

DEPLOY = TESTS / "deploy"
INSTALLED = "/opt/claude-cli-bridge/.venv/bin/claude-cli-bridge"
# The longest that a shutdown takes: new connections, answers, their last words, the ends of the
# processes.
SHUTDOWN_SECS = (
    bridge.Config().drain_secs
    + 2 * bridge.GRACE_SECS
    + sum(seconds for _, seconds in sessions.ENDING)
)
HOME = "/var/lib/claude-cli-bridge"
OTHERS = '[[model_providers]]\nmodel = "openai/gpt-5"\n'


def installed(folder: Path) -> Path:
    """The program, where the files do not have it."""
    path = folder / "claude-cli-bridge"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT / "bridge.py"} "$@"\n')
    path.chmod(0o755)
    return path


# ---------------------------------------------------------------- supervisord

SECTION = (DEPLOY / "supervisord.conf").read_text()
# Beside it a program that ends as soon as it is started, which shows that supervisord had time to
# restart others.
MAIN = """
[unix_http_server]
file = {folder}/socket
[supervisord]
nodaemon = true
user = {user}
logfile = {folder}/supervisord.log
pidfile = {folder}/supervisord.pid
childlogdir = {folder}
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
[program:witness]
command = true
startsecs = 0
autorestart = true
"""


@dataclass
class Supervisor:
    folder: Path
    client: Client

    def call(self, method: str, *arguments: Any) -> Any:
        transport = SupervisorTransport(None, None, f"unix://{self.folder}/socket")
        with ServerProxy("http://localhost", transport) as proxy:
            return getattr(proxy.supervisor, method)(*arguments)

    @property
    def info(self) -> Json:
        found: Json = self.call("getProcessInfo", "claude-cli-bridge")
        return found

    @property
    def said(self) -> list[str]:
        """The bridge's lines in its log file."""
        return (self.folder / "bridge.log").read_text().splitlines()

    @property
    def listeners(self) -> int:
        return sum("listening on" in line for line in self.said)

    def starts(self, name: str) -> int:
        return (self.folder / "supervisord.log").read_text().count(f"spawned: '{name}'")


@pytest.fixture
def supervise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Supervisor]]:
    """Start a supervisord with the file, and the bridge with these words."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("CLAUDE_CLI_LISTEN_ADDR", f"127.0.0.1:{port}")
    monkeypatch.setenv("CLAUDE_CLI_BIN", str(STANDIN))
    monkeypatch.setenv("CLAUDE_CLI_KEEP_ENV", ",".join(kept_names()))
    program = str(installed(tmp_path))
    places = {
        "/var/log/claude-cli-bridge.log": tmp_path / "bridge.log",
        HOME: tmp_path / "home",
        "user = claude": f"user = {getpass.getuser()}",
    }
    started: list[subprocess.Popen[bytes]] = []

    def start(*words: str) -> Supervisor:
        section = SECTION
        for place, here in {INSTALLED: shlex.join((program, *words)), **places}.items():
            assert place in section
            section = section.replace(place, str(here))
        path = tmp_path / "supervisord.conf"
        path.write_text(MAIN.format(folder=tmp_path, user=getpass.getuser()) + section)
        command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(path)]
        started.append(
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )
        wait_until((tmp_path / "bridge.log").exists, "a start", 30)
        return Supervisor(tmp_path, Client("127.0.0.1", port))

    yield start
    for process in started:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("way", ["restart", "kill"])
def test_supervisord_restarts_the_bridge_without_an_orphan(
    gate: Path,
    log: Log,
    supervise: Callable[..., Supervisor],
    background: ThreadPoolExecutor,
    way: str,
) -> None:
    supervisor = supervise()
    wait_until(lambda: supervisor.listeners, "the listener", 30)
    assert supervisor.info["statename"] == "RUNNING"
    first = supervisor.client.post()
    asked = background.submit(supervisor.client.post, "PAUSE") if way == "kill" else None
    if asked:
        wait_until(lambda: log.got("PAUSE"), "a turn")
    old = psutil.Process(supervisor.info["pid"])
    before = {child.pid for child in children(old.pid)}
    assert pid(first) in before
    if asked:
        old.kill()
        assert isinstance(asked.exception(), OSError | HTTPException)
    else:
        assert supervisor.call("stopProcess", "claude-cli-bridge")
        assert supervisor.call("startProcess", "claude-cli-bridge")
    wait_until(lambda: not any(map(alive, before)), "the end of all children")
    wait_until(lambda: supervisor.listeners == 2, "the new listener", 30)
    assert supervisor.info["pid"] != old.pid
    assert supervisor.info["statename"] == "RUNNING"
    answer = supervisor.client.post(["hello", first.text, "and now"])
    assert (answer.status, answer.session) == (200, "rebuilt; reason=unknown-history")


@pytest.mark.parametrize(
    ("providers", "status", "words"),
    [(OTHERS, 0, "claude-cli"), ("model_providers = 1\n", 2, "cannot be read")],
    ids=["nothing to serve", "settings that cannot work"],
)
def test_supervisord_leaves_a_bridge_alone_that_ended_on_purpose(
    supervise: Callable[..., Supervisor], tmp_path: Path, providers: str, status: int, words: str
) -> None:
    (tmp_path / "bridge.toml").write_text(providers)
    supervisor = supervise("--config", str(tmp_path / "bridge.toml"))
    wait_until(lambda: supervisor.info["statename"] == "EXITED", "its end", 30)
    assert supervisor.info["exitstatus"] == status
    others = supervisor.starts("witness")
    wait_until(lambda: supervisor.starts("witness") > others + 1, "restarts of another program")
    assert supervisor.starts("claude-cli-bridge") == 1
    assert supervisor.info["statename"] == "EXITED"
    [line] = supervisor.said
    assert words in line


# ---------------------------------------------------------------- systemd

SOCKET = (DEPLOY / "claude-cli-bridge.socket").read_text()
SERVICE = (DEPLOY / "claude-cli-bridge.service").read_text()


def settings_of(unit: str) -> dict[str, str]:
    lines = [line for line in unit.splitlines() if not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_systemd_finds_no_fault_in_the_units_and_little_that_they_expose(tmp_path: Path) -> None:
    units = {"claude-cli-bridge.socket": SOCKET, "claude-cli-bridge.service": SERVICE}
    for name, text in units.items():
        (tmp_path / name).write_text(text.replace(INSTALLED, str(installed(tmp_path))))

    def analyze(*words: str) -> str:
        command = ["systemd-analyze", *words]
        done = subprocess.run(command, cwd=tmp_path, text=True, check=False, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stderr

    assert analyze("verify", *(f"./{name}" for name in units)) == ""
    if (
        "--threshold"
        in subprocess.run(["systemd-analyze", "--help"], capture_output=True, text=True).stdout
    ):
        analyze(
            "security", "--offline=yes", "--threshold=20", "./claude-cli-bridge.service"
        )  # 2.0 of 10


def test_systemd_can_start_ask_and_stop_the_bridge_by_its_units(tmp_path: Path) -> None:
    unit = settings_of(SERVICE)
    host, _, _ = settings_of(SOCKET)["ListenStream"].rpartition(":")
    command = shlex.split(unit["ExecStart"].replace(INSTALLED, str(installed(tmp_path))))
    with socket.create_server((host, 0)) as listener:
        process = activate(listener, *command)
        answer = Client(*listener.getsockname()).post()
        assert answer.text == "echo: hello; 1 messages"
        process.terminate()
        assert process.stderr
        assert f"listening on http://{host}:{listener.getsockname()[1]}" in process.stderr.read()
        assert process.wait(30) == 0
        process.stderr.close()


# ---------------------------------------------------------------- a machine to install on


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Machine]:
    """A machine on which nothing is installed yet.  pip finds packages in a folder."""
    if not WHEELS or not CLIS:
        pytest.skip("the packages could not be downloaded")
    if not machine.is_possible(tmp_path):
        pytest.skip("this needs root, namespaces and overlayfs")
    (tmp_path / "machine").mkdir()
    found = Machine(tmp_path / "machine")
    yield found
    found.remove()


@pytest.fixture
def started() -> Iterator[Callable[..., Process]]:
    """Start machines which end with the test: started(machine, "command", "word", NAME="value")."""
    processes: list[Process] = []

    def start(found: Machine, *command: str, **environ: str) -> Process:
        processes.append(found.start(*command, **environ))
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            end(process)
        assert process.stdout
        process.stdout.close()


def offline() -> dict[str, str]:
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(WHEELS[0])}


def answers(client: Client, path: str = "/healthz") -> bool:
    try:
        return client.call("GET", path).status == 200
    except (OSError, HTTPException):
        return False


INSTALL = readme.block("-m venv /opt", readme.DEPLOY)
PUT_UNITS = readme.block("systemctl enable", readme.DEPLOY)
RESET = readme.block("systemctl reset-failed", readme.DEPLOY)
PUT_SECTION = readme.block("supervisorctl update", readme.DEPLOY)
PUT_GATEWAY = readme.block("nginx -s reload", readme.DEPLOY)
PUT_JOB = readme.block("launchctl bootstrap", readme.DEPLOY)
DOCKER = readme.block("docker build", readme.DEPLOY)
HERE = Client("127.0.0.1", 14001)

# No unit of this machine but those that every unit needs.
SYSTEMD = """
rm -rf /etc/systemd/system
mkdir /etc/systemd/system
for name in default sysinit basic sockets multi-user shutdown; do
    printf '[Unit]\\nDefaultDependencies=no\\n' > /etc/systemd/system/$name.target
done
mount -t cgroup2 cgroup2 /sys/fs/cgroup
exec /lib/systemd/systemd --system
"""
UNITS = {"SYSTEMD_UNIT_PATH": "/etc/systemd/system", "container": "test"}
# As Debian's package has it.
SUPERVISOR = """
mkdir -p /etc/supervisor/conf.d
cat > /etc/supervisor/supervisord.conf << 'end'
[unix_http_server]
file = /run/supervisor.sock
[supervisord]
nodaemon = true
user = root
logfile = /run/supervisord.log
pidfile = /run/supervisord.pid
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
[supervisorctl]
serverurl = unix:///run/supervisor.sock
[include]
files = /etc/supervisor/conf.d/*.conf
end
exec supervisord
"""


def settings_for(stub: Stub) -> dict[str, str]:
    return {
        "CLAUDE_CLI_KEEP_ENV": ",".join(kept_names()),
        "ANTHROPIC_BASE_URL": stub.url,
        "ANTHROPIC_API_KEY": "sk-stub",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }


def run(process: Process, script: str, **environ: str) -> str:
    """Run a script in a machine that was started."""
    cd = f"cd {shlex.quote(str(ROOT))}\n"
    status, printed = inside(process, "sh", "-ec", cd + script, **environ)
    assert status == 0, printed
    return printed


@pytest.mark.timeout(300)
def test_put_in_place_by_the_readme_each_launcher_serves(
    fresh: Machine,
    started: Callable[..., Process],
    stub: Stub,
    background: ThreadPoolExecutor,
) -> None:
    fresh.run(INSTALL, **offline())
    environ = {**settings_for(stub), "PATH": f"{Path(sys.executable).parent}:{machine.PATH}"}
    running = started(fresh, "sh", "-ec", SUPERVISOR, **environ)
    supervisord_serves(running)
    end(running)
    if Path("/lib/systemd/systemd").exists():
        running = started(fresh, "sh", "-ec", SYSTEMD, **UNITS)
        systemd_serves(running, stub, background)
        end(running)


def users_of_the_program(running: Process) -> list[str]:
    """Who runs it, and the CLI that was installed with it."""
    listed = run(running, "ps -e -o user:20=,args=").splitlines()
    return [line.split()[0] for line in listed if "/opt/claude-cli-bridge" in line]


def supervisord_serves(running: Process) -> None:
    wait_until(
        lambda: inside(running, "test", "-S", "/run/supervisor.sock")[0] == 0, "supervisord", 60
    )
    run(running, PUT_SECTION, PATH=f"{Path(sys.executable).parent}:{machine.PATH}")
    wait_until(lambda: answers(HERE), "the bridge", 60)
    assert HERE.post("hello").status == 200
    users = users_of_the_program(running)
    assert len(users) >= 2
    assert set(users) == {"claude"}
    assert "listening on" in run(running, "cat /var/log/claude-cli-bridge.log")


def systemd_serves(running: Process, stub: Stub, background: ThreadPoolExecutor) -> None:
    def state(name: str, unit: str = "service") -> str:
        return run(running, f"systemctl show --value -p {name} claude-cli-bridge.{unit}").strip()

    wait_until(
        lambda: inside(running, "systemctl", "is-active", "default.target")[0] == 0, "boot", 60
    )
    run(running, PUT_UNITS, **UNITS)
    lines = [f"{name}={value}" for name, value in settings_for(stub).items()]
    run(running, f"echo {shlex.quote(chr(10).join(lines))} >> /etc/claude-cli-bridge.env")
    assert run(running, "stat -c '%a %U' /etc/claude-cli-bridge.env") == "600 root\n"

    # The first request starts it, with all that the unit forbids.
    assert (state("ActiveState"), state("ActiveState", "socket")) == ("inactive", "active")
    assert HERE.post("hello").status == 200
    users = users_of_the_program(running)
    assert len(users) >= 2
    assert set(users) == {"claude"}

    # A restart completes the running answer, and refuses no connection.
    asked = background.submit(HERE.post, "SLOW 60")
    wait_until(lambda: "SLOW 60" in json.dumps(stub.log()[-1]["body"]), "the turn")
    restart = background.submit(run, running, "systemctl restart claude-cli-bridge")
    assert asked.result().status == 200
    restart.result()
    assert HERE.post("hello").status == 200

    # An invalid setting ends it, and with the next request the socket.
    run(running, "echo CLAUDE_CLI_MAX_IDLE=many >> /etc/claude-cli-bridge.env")
    inside(running, "systemctl", "restart", "claude-cli-bridge")
    wait_until(lambda: state("ActiveState") == "failed", "the end")
    assert (state("ExecMainStatus"), state("NRestarts")) == ("2", "0")
    assert not answers(HERE)
    wait_until(lambda: state("ActiveState", "socket") == "failed", "the end of the socket")
    run(running, "sed -i /MAX_IDLE/d /etc/claude-cli-bridge.env")
    run(running, RESET)
    assert HERE.post("hello").status == 200

    if shutil.which("nginx", path=machine.PATH):
        run(running, "nginx")
        run(running, PUT_GATEWAY)
        gateway = Client("127.0.0.1", 8080)
        wait_until(lambda: answers(gateway), "nginx")
        assert gateway.post("hello").status == 200
    run(running, "systemctl stop claude-cli-bridge.socket claude-cli-bridge.service")
    assert (state("Result"), state("ExecMainStatus")) == ("success", "0")


# ---------------------------------------------------------------- Docker

DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def instructions(text: str) -> list[list[str]]:
    """Each instruction of a Dockerfile, and what follows it."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", "")
    return [line.split(maxsplit=1) for line in joined.splitlines() if line]


@dataclass
class Image:
    """What a Dockerfile has built, for `docker run`."""

    build: list[str] = field(default_factory=list)
    environ: dict[str, str] = field(default_factory=lambda: {"PATH": machine.PATH})
    other: dict[str, str] = field(default_factory=dict)

    def command(self, name: str, *words: str, **environ: str) -> list[str]:
        """An instruction's command, as the image's user."""
        user = self.other["USER"]
        variables = {**self.environ, "HOME": HOME, **environ}
        listed = [f"{name}={value}" for name, value in variables.items()]
        # Another user's process forgets whose end is its own, too.
        as_user = ["setpriv", "--reuid", user, "--regid", user, "--clear-groups"]
        as_user += ["--pdeathsig", "KILL"]
        after = json.loads(self.other[name][self.other[name].index("[") :])
        return ["env", "-i", "-C", self.other["WORKDIR"], *listed, *as_user, *after, *words]


def image() -> Image:
    """The image, and the script that builds it from the clone.  What apt-get installs is there."""
    found = Image()
    for name, words in instructions(DOCKERFILE):
        if name == "RUN" and not words.startswith("apt-get "):
            found.build.append(words)
        elif name == "COPY":
            *files, folder = words.split()
            found.build.append(f"mkdir -p {folder} && cp {shlex.join(files)} {folder}")
        elif name == "ENV":
            variable, _, value = words.partition("=")
            found.environ[variable] = Template(value).substitute(found.environ)
        else:
            found.other[name] = words
    return found


@pytest.mark.timeout(300)
def test_what_the_dockerfile_builds_serves_with_a_key_and_is_healthy(
    fresh: Machine,
    started: Callable[..., Process],
    stub: Stub,
    background: ThreadPoolExecutor,
) -> None:
    if not shutil.which("tini"):
        pytest.skip("tini is not installed")
    found = image()
    fresh.run("\n".join(found.build), **offline())

    def container(**environ: str) -> Process:
        words = json.loads(found.other["CMD"])
        return started(fresh, *found.command("ENTRYPOINT", *words, **environ))

    # Without a key it does not start; and what is not there, or answers otherwise, is not healthy.
    without = container()
    wait_until(lambda: without.poll() is not None, "its end", 60)
    printed, _ = without.communicate()
    assert without.returncode == 2
    assert b"CLAUDE_CLI_API_KEY" in printed
    check = started(fresh, *found.command("HEALTHCHECK"))
    check.communicate()
    assert check.returncode == 1
    with HTTPServer((HERE.host, HERE.port), BaseHTTPRequestHandler) as other:
        other.timeout = 30
        answer = background.submit(other.handle_request)  # with 501
        check = started(fresh, *found.command("HEALTHCHECK"))
        check.communicate()
        answer.result()
    assert check.returncode == 1

    running = container(**settings_for(stub), CLAUDE_CLI_API_KEY="sesame")
    wait_until(lambda: answers(HERE), "the bridge", 60)
    assert inside(running, *found.command("HEALTHCHECK")) == (0, "")
    assert HERE.post("hello").status == 401
    key = {"x-api-key": "sesame"}
    assert HERE.call("POST", "/v1/messages", request_body(), key).status == 200

    # Nobody but the image's user runs anything, and what is left behind does not stay.
    [init] = psutil.Process(running.pid).children()
    assert init.name() == "tini"
    users = set()
    for process in [init, *children(init.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # what the CLI runs at its start
            users.add(process.uids().real)
    assert users == {10001}
    orphan = run(running, "sleep 0 > /dev/null & echo $!").strip()
    wait_until(lambda: inside(running, "test", "-e", f"/proc/{orphan}")[0] == 1, "no zombie")
    # `docker stop`.
    init.terminate()
    printed, _ = running.communicate()
    assert running.returncode == 0
    assert b"shutting down" in printed


def test_the_dockerfile_passes_a_linter() -> None:
    hadolint = shutil.which("hadolint")  # on PATH, as the tests' Python is
    if not hadolint:
        pytest.skip("hadolint is not installed")
    command = [hadolint, "--no-color", DEPLOY / "Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_the_image_holds_what_makes_the_wheel_and_nothing_else_of_the_clone() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    sources = project["tool"]["hatch"]["build"]["targets"]["sdist"]["only-include"]
    named = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    for source in sources:
        path = ROOT / source
        files = path.glob("*.py") if path.is_dir() else [path]
        named |= {str(file.relative_to(ROOT)) for file in files}
    copied = [words.split()[:-1] for name, words in instructions(DOCKERFILE) if name == "COPY"]
    assert set(itertools.chain(*copied)) == named


# ---------------------------------------------------------------- launchd

JOB = plistlib.loads((DEPLOY / "launchd.plist").read_bytes())
# man launchd.plist
KEYS_OF_LAUNCHD = {
    "Label": str,
    "ProgramArguments": list,
    "EnvironmentVariables": dict,
    "RunAtLoad": bool,
    "KeepAlive": dict,
    "ExitTimeOut": int,
    "SoftResourceLimits": dict,
    "HardResourceLimits": dict,
    "Umask": int,
    "StandardErrorPath": str,
}


def test_the_file_for_launchd_is_a_property_list_of_a_job() -> None:
    assert {name: type(value) for name, value in JOB.items()} == KEYS_OF_LAUNCHD
    assert JOB["KeepAlive"] == {"SuccessfulExit": False}
    assert all(isinstance(value, str) for value in JOB["EnvironmentVariables"].values())
    # The file's name, as the README copies it.
    assert f"{JOB['Label']}.plist\n" in PUT_JOB


# ---------------------------------------------------------------- all files

PROGRAM = configparser.ConfigParser(comment_prefixes=(";",), interpolation=None)
PROGRAM.read_string(SECTION)
SUPERVISED = PROGRAM["program:claude-cli-bridge"]
UNIT = settings_of(SERVICE)
IMAGE = image()
NGINX = (DEPLOY / "nginx.conf").read_text()
README = readme.DEPLOY.read_text()


def number(pattern: str, text: str) -> float:
    """The one number that the pattern finds."""
    [found] = re.findall(pattern, text)
    return float(found)


@pytest.mark.parametrize("path", sorted(DEPLOY.iterdir()), ids=lambda path: path.name)
def test_a_file_names_only_settings_that_there_are(path: Path) -> None:
    named = set(re.findall(r"\bCLAUDE_CLI_[A-Z_]+", path.read_text()))
    assert named <= {bridge.variable(item.name) for item in fields(bridge.Config)}


def test_the_files_agree_on_the_program_the_user_and_the_home() -> None:
    in_image = f"{IMAGE.environ['PATH'].split(':')[0]}/{json.loads(IMAGE.other['CMD'])[0]}"
    programs = [UNIT["ExecStart"], SUPERVISED["command"], *JOB["ProgramArguments"], in_image]
    assert programs == [INSTALLED] * 4
    venv = str(Path(INSTALLED).parents[1])
    for text in (DOCKERFILE, INSTALL):
        assert f"-m venv {venv}\n" in text.replace(" \\\n", "\n")
        assert f"{venv}/bin/pip install" in text
        assert f"--home-dir {HOME}" in text
        assert re.search("useradd .* claude$", text, re.M)
    assert [UNIT["User"], SUPERVISED["user"]] == ["claude"] * 2
    state = f"/var/lib/{UNIT['StateDirectory']}"
    homes = [state, UNIT["WorkingDirectory"].replace("%S", "/var/lib")]
    homes += [SUPERVISED["directory"], SUPERVISED["environment"].split('"')[1]]
    assert [*homes, IMAGE.other["WORKDIR"]] == [HOME] * 5
    for place in (venv, HOME, UNIT["EnvironmentFile"].removeprefix("-")):
        assert f"`{place}`" in README


def test_the_files_agree_on_the_address() -> None:
    address = bridge.Config().listen_addr
    port = address.rpartition(":")[2]
    assert settings_of(SOCKET)["ListenStream"] == address
    assert f"server {address} " in NGINX
    assert f"--publish {address}:{port} " in DOCKER
    assert IMAGE.environ["CLAUDE_CLI_LISTEN_ADDR"] == f"0.0.0.0:{port}"
    assert IMAGE.other["EXPOSE"] == port
    assert f"HTTPConnection('127.0.0.1', {port}," in IMAGE.other["HEALTHCHECK"]


def test_each_file_gives_a_shutdown_the_time_it_may_take_and_has_no_lower_limit_than_another() -> (
    None
):
    given = [float(UNIT["TimeoutStopSec"]), float(SUPERVISED["stopwaitsecs"])]
    given += [JOB["ExitTimeOut"], number(r"--stop-timeout (\d+)", DOCKER)]
    assert min(given) > SHUTDOWN_SECS
    files = [JOB[f"{kind}ResourceLimits"]["NumberOfFiles"] for kind in ("Soft", "Hard")]
    assert [*files, int(UNIT["LimitNOFILE"])] == [8192] * 3
    limit = bridge.Config().max_body_bytes >> 20
    assert number(r"client_max_body_size (\d+)m;", NGINX) == limit
    assert number(r"client_body_buffer_size (\d+)m;", NGINX) == limit


def test_the_commands_copy_each_file_and_each_is_run_by_a_test() -> None:
    import_module("test_library")
    assert [text for _, text in readme.blocks(readme.DEPLOY) if text not in readme.TAKEN] == []
    named = {Path(name).name for name in re.findall(r"tests/deploy/\S+", README)}
    assert named == {path.name for path in DEPLOY.iterdir()} - {"README.md"}
    # The words that `docker run` is given are settings of the image or of the CLI.
    words = shlex.split(DOCKER.splitlines()[1])
    passed = [words[place + 1] for place, word in enumerate(words) if word == "--env"]
    kept = IMAGE.environ["CLAUDE_CLI_KEEP_ENV"].split(",")
    assert passed == [bridge.variable("api_key"), *kept]
