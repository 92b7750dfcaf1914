"""This machine: where things are, a network with loopback alone, processes, open files."""

import contextlib
import ctypes
import fcntl
import glob
import os
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

TESTS = Path(__file__).parent
ROOT = TESTS.parent
sys.path[:0] = [str(ROOT)]
STANDIN = TESTS / "standin.py"
CLONE_NEWNET, CLONE_NEWUSER = 0x40000000, 0x10000000


def isolate() -> str:
    """Move this process into a network namespace with loopback alone; say how it went."""
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWNET if uid == 0 else CLONE_NEWNET | CLONE_NEWUSER):
        return f"not isolated: unshare: {os.strerror(ctypes.get_errno())}"
    if uid:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    with socket.socket() as probe:  # ip link set lo up
        fcntl.ioctl(probe, 0x8914, struct.pack("16sh", b"lo", 0x1 | 0x40))
    return "in a network namespace with loopback alone"


def wait_until(condition: Callable[[], object], what: str, seconds: float = 40) -> None:
    """Poll for something that another process does; the time is a limit for failure, not a
    measure."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"never came: {what}"
        time.sleep(0.01)


def children(pid: int | None = None) -> list[psutil.Process]:
    """The living ones of a process, and theirs."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in descendants(pid or os.getpid()):
            with contextlib.suppress(psutil.NoSuchProcess):  # this one alone
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
    return found


def descendants(pid: int) -> list[psutil.Process]:
    """Those of a process, zombies too.  psutil would look at all processes of the machine for them,
    and each test asks twice."""
    if not os.path.exists("/proc/thread-self/children"):  # not Linux
        return psutil.Process(pid).children(recursive=True)
    numbers: list[str] = []
    # Not Path.glob: it fails where the process ends meanwhile.
    for file in glob.glob(f"/proc/{pid}/task/*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            numbers += Path(file).read_text().split()
    found = []
    for child in map(int, numbers):
        with contextlib.suppress(psutil.NoSuchProcess):  # this one alone has
            found += [psutil.Process(child), *descendants(child)]
    return found


def open_files() -> dict[str, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found[name] = os.readlink(f"/proc/self/fd/{name}")
    return {name: target for name, target in found.items() if not target.startswith("/proc/")}
