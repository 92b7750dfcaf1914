"""A copy of this machine, in which a test may install and start what it likes, as root.

Its files are this machine's under an overlay, which keeps what is changed in a folder; its mounts
and processes are its own.  The network is shared: a server in it can be asked from outside.
"""

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
from host import ROOT

# This Python, where users besides root can run it, too.
PYTHON = "/usr/local/python"
PATH = f"{PYTHON}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NAMESPACES = ("--mount", "--pid", "--ipc", "--uts", "--cgroup", "--fork", "--kill-child")
# It ends with the test, whatever ends the test.
UNSHARE = ("setpriv", "--pdeathsig", "KILL", "unshare", *NAMESPACES)
Process = subprocess.Popen[bytes]
READY = "the machine is there"
OVERLAY = 'mount -t overlay overlay -o "lowerdir=/,upperdir=$PWD/up,workdir=$PWD/work" root\n'
# As a container's: of the kernel's files none can be written, of the devices there are but those
# that any program needs.
MOUNT = f"""
{OVERLAY}
cd root
mkdir -p .{PYTHON}
mount --bind {shlex.quote(sys.base_prefix)} .{PYTHON}
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs dev
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
for name in null zero full random urandom tty; do
    touch dev/$name
    mount --bind /dev/$name dev/$name
done
mkdir -p old
pivot_root . old
umount -l /old
cd {shlex.quote(str(ROOT))}
echo {READY}
exec "$@"
"""


def is_possible(folder: Path) -> bool:
    """Whether this machine lets a test make such copies."""
    if os.geteuid() or not all(map(shutil.which, ("setpriv", "unshare", "nsenter"))):
        return False
    script = f"mkdir probe; cd probe; mkdir up work root\n{OVERLAY}"
    done = subprocess.run([*UNSHARE, "sh", "-ec", script], cwd=folder, check=False)
    return done.returncode == 0


@dataclass
class Machine:
    folder: Path

    def __post_init__(self) -> None:
        for name in ("up", "work", "root"):
            (self.folder / name).mkdir()

    def start(self, *command: str, **environ: str) -> Process:
        """Start it with this command as its process 1."""
        process = subprocess.Popen(
            [*UNSHARE, "sh", "-ec", MOUNT, "sh", *command],
            cwd=self.folder,
            env={"PATH": PATH, **environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
        )
        assert process.stdout
        assert process.stdout.readline() == f"{READY}\n".encode(), end(process)
        return process

    def run(self, script: str, **environ: str) -> None:
        """Start it for this script alone.  The files that it writes stay."""
        process = self.start("sh", "-ec", script, **environ)
        printed, _ = process.communicate()
        assert process.returncode == 0, printed

    def remove(self) -> None:
        shutil.rmtree(self.folder)


def end(process: Process) -> bytes:
    """End a machine that was started, with all that runs in it; returns what it printed."""
    for first in psutil.Process(process.pid).children():
        first.kill()
    process.kill()
    return process.communicate()[0]


def inside(process: Process, *command: str, **environ: str) -> tuple[int, str]:
    """Run a command in a machine that was started; returns its status and what it prints."""
    [first] = psutil.Process(process.pid).children()
    done = subprocess.run(
        ["nsenter", "--target", str(first.pid), "--mount", "--pid", *command],
        env={"PATH": PATH, **environ},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout
