"""The stub of the Messages API, as the tests start it."""

import contextlib
import http.client
import json
import subprocess
import sys

from client import Json
from host import TESTS


class Stub:
    """The stub of the Messages API, as a process of its own."""

    def __init__(self, *arguments: str) -> None:
        self.arguments = arguments

    def __enter__(self) -> "Stub":
        command = [sys.executable, TESTS / "stub_api.py", *self.arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()

    def log(self, since: int = 0) -> list[Json]:
        """The requests to /v1/messages, from number `since` on: path, headers, body, end,
        seconds."""
        return [row for row in self.rows() if row["path"].startswith("/v1/messages")][since:]

    def last(self) -> Json:
        """The last request to /v1/messages."""
        return [row for row in self.rows("?since=-9") if row["path"].startswith("/v1/messages")][-1]

    def rows(self, query: str = "") -> list[Json]:
        """The requests to any path."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port)) as connection:
            connection.request("GET", "/_log" + query)
            rows: list[Json] = json.loads(connection.getresponse().read())
        return rows
