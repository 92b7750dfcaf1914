"""The stub at https://api.anthropic.com, where users have the API: `FIRST_PARTY=1 python -m pytest ...`.

The CLI asks more of the API at that address, and other things of it; and it renews a login, at
another one.  So the run has a file of hosts
of its own, in which the addresses are this machine, and a server of TLS that leads to the stub that the
environment names.  None of the user's opt-outs is set either.  Only root on Linux can have all that.
"""

import asyncio
import contextlib
import ctypes
import os
import ssl
import subprocess
import tempfile
import threading
from pathlib import Path
from urllib.parse import urlsplit

import trustme

IS_ON = bool(os.environ.get("FIRST_PARTY"))
ADDRESSES = ("api.anthropic.com", "platform.claude.com")
CLONE_NEWNS = 0x20000


def lead_to_the_stub() -> None:
    """Make this process, and what it starts, find the stub at the API's address."""
    folder = Path(tempfile.mkdtemp())
    hosts = folder / "hosts"
    hosts.write_text(f"127.0.0.1 localhost {' '.join(ADDRESSES)}\n")
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "FIRST_PARTY=1 needs root on Linux")
    for command in ("mount --make-rprivate /", f"mount --bind {hosts} /etc/hosts"):
        subprocess.run(command.split(), check=True)
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    os.environ["NODE_EXTRA_CA_CERTS"] = str(folder / "ca.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*ADDRESSES).configure_cert(context)
    listening = threading.Event()
    threading.Thread(target=lambda: asyncio.run(forward(context, listening)), daemon=True).start()
    listening.wait()


async def forward(context: ssl.SSLContext, listening: threading.Event) -> None:
    server = await asyncio.start_server(connect, "127.0.0.1", 443, ssl=context)
    listening.set()
    await server.serve_forever()


async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Lead a client to the stub of now."""
    stub = urlsplit(os.environ["ANTHROPIC_BASE_URL"])
    back, forth = await asyncio.open_connection(stub.hostname, stub.port)
    await asyncio.gather(copy(reader, forth), copy(back, writer))


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):  # it leaves
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()
