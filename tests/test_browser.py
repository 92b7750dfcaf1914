"""A real browser: what pages of other origins can do to an agent on this machine (nothing), and
that allowed ones work.

Chromium loads each page from the test's own site.  The page waits until the site's port, or
another, belongs to the bridge: that is how DNS rebinding looks to a browser, whose name for the
attacker's server now leads to the bridge.
"""

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import SimpleQueue
from urllib.parse import urlencode

import psutil
import pytest
from host import wait_until
from PIL import Image, ImageChops
from servers import Serve
from stand_in import Log

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed"),
    pytest.mark.usefixtures("quiet"),
]
KEY = "sk-bridge-0123456789"
SECONDS = 60  # a limit for failure, not a measure
Json = dict[str, object]

PAGE = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><body><script type="module">
const {bridge, site, kind} = Object.fromEntries(new URLSearchParams(location.search));
const messages = bridge + '/v1/messages', models = bridge + '/v1/models';
const request = (content, more) => JSON.stringify(
  {model: 'sonnet', max_tokens: 100, messages: [{role: 'user', content}], ...more});
const post = async (type, more) => (await fetch(
  messages, {method: 'POST', headers: {'content-type': type}, body: request('attack'), ...more})).text();
const opened = (thing, events) => new Promise(done => events.forEach(name => thing['on' + name] = done));
const element = (tag, fields) => Object.assign(document.createElement(tag), fields);
const embedded = async (tag, fields) => {
  const item = element(tag, fields), event = opened(item, ['load', 'error']);
  document.body.append(item);
  await event;
  return item.contentDocument?.body?.textContent ?? '';
};

const kinds = {
  write: {
    'fetch, a simple request': () => post('text/plain'),
    'fetch without CORS': () => post('text/plain', {mode: 'no-cors'}),
    'fetch with a preflight': () => post('application/json'),
    'a form': async () => {
      const frame = element('iframe', {name: 'frame'});
      const form = element('form', {action: messages, method: 'post', enctype: 'text/plain', target: 'frame'});
      form.append(element('input', {name: request('attack').slice(0, -1) + ',"metadata":{"user_id":"', value: '"}}'}));
      document.body.append(frame, form);
      const loaded = opened(frame, ['load']);
      form.submit();
      await loaded;
      return frame.contentDocument?.body?.textContent ?? '';
    },
    'a sandboxed frame': async () => {
      const fields = `{method: "POST", mode: "no-cors", body: ${JSON.stringify(request('attack'))}}`;
      const told = opened(window, ['message']);
      const script = `fetch("${messages}", ${fields}).finally(() => parent.postMessage("", "*"))`;
      embedded('iframe', {sandbox: 'allow-scripts', srcdoc: `<script>${script}<` + '/script>'});
      await told;
    },
    'EventSource': async () => {
      const source = new EventSource(messages), event = await opened(source, ['message', 'error']);
      source.close();
      return event.data;
    },
    'WebSocket': async () => {
      const url = messages.replace('http', 'ws');
      return (await opened(new WebSocket(url), ['open', 'message', 'error'])).data;
    },
    'a beacon': async () => { navigator.sendBeacon(messages, new Blob([request('attack')], {type: 'text/plain'})) },
  },
  read: {
    'fetch': async () => (await fetch(models + '?1')).text(),
    'fetch without CORS': async () => (await fetch(models + '?2', {mode: 'no-cors'})).text(),
    'an image': () => embedded('img', {src: models + '?3'}),
    'a script': () => embedded('script', {src: models + '?4'}),
    'a frame': () => embedded('iframe', {src: models + '?5'}),
  },
  use: {
    'a stream': async () => {
      const headers = {'content-type': 'application/json', 'x-api-key': 'KEY', 'anthropic-version': '2023-06-01',
        'anthropic-dangerous-direct-browser-access': 'true'};
      const answer = await fetch(messages, {method: 'POST', headers, body: request('PAUSE', {stream: true})});
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let text = '', told = false;
      for (let part = await reader.read(); !part.done; part = await reader.read()) {
        text += part.value;
        if (text.includes('content_block_delta') && !told) report('the first delta');
        told ||= text.includes('content_block_delta');
      }
      return text;
    },
    'a refusal': () => post('application/json', {headers: {'content-type': 'application/json', 'x-api-key': 'no'}}),
  },
};

const report = value => fetch(site + '/report', {method: 'POST', mode: 'no-cors', body: JSON.stringify(value)});
await fetch(site + '/go', {mode: 'no-cors'});
const found = {};
for (const [name, attempt] of Object.entries(kinds[kind])) {
  try { found[name] = (await attempt()) ?? '' } catch (error) { found[name] = '' }
}
report(found);
</script>""".replace("KEY", KEY)
WRITES, READS = 8, 5  # requests that these attempts send

# The page's origin, and the bridge as the page calls it.
PAGES = {
    "of another port": ("http://127.0.0.1:{site}", "http://127.0.0.1:{bridge}"),
    "of another name": ("http://evil.example:{site}", "http://127.0.0.1:{bridge}"),
    "whose name leads here": ("http://evil.example:{site}", "http://evil.example:{bridge}"),
    "whose name and port lead here": (
        "http://evil.example:{bridge}",
        "http://evil.example:{bridge}",
    ),
}


FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-proxy-server",
)


class Site:
    """Serves PAGE at any path; takes what the page finds."""

    def __enter__(self) -> "Site":
        self.reports: SimpleQueue[object] = SimpleQueue()
        self.loaded, self.go = threading.Event(), threading.Event()
        self.connections: list[socket.socket] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def setup(self) -> None:
                super().setup()
                site.connections.append(self.connection)

            def answer(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("content-type", "text/html")
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                if self.path == "/go":
                    site.loaded.set()
                    site.go.wait()
                self.answer(PAGE.encode())

            def do_POST(self) -> None:
                site.reports.put(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                self.answer(b"")

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
        for connection in self.connections:  # browsers open some ahead of need
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def running(profile: Path) -> list[psutil.Process]:
    """The browser's processes; its crash handlers leave its process group and end by themselves."""
    found = psutil.process_iter(["cmdline", "status"])
    used = [p for p in found if any(str(profile) in word for word in p.info["cmdline"] or ())]
    return [p for p in used if p.info["status"] != psutil.STATUS_ZOMBIE]


@pytest.fixture
def browse(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Open a page in a browser that resolves one name, and sends nothing elsewhere."""
    profile = tmp_path / "chromium"
    with ExitStack() as stack:

        def start(url: str) -> None:
            rules = "MAP evil.example 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
            command = [
                str(CHROMIUM),
                *FLAGS,
                f"--host-resolver-rules={rules}",
                f"--user-data-dir={profile}",
                url,
            ]
            process = subprocess.Popen(
                command,
                env={**os.environ, "HOME": str(profile)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

            def end() -> None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                wait_until(lambda: not running(profile), "the end of the browser")

            stack.callback(end)

        yield start


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as running_site:
        yield running_site


@pytest.fixture
def visit(
    browse: Callable[[str], None],
    site: Site,
    serve: Serve,
    log: Log,
    tmp_path: Path,
) -> Callable[..., None]:
    """Load a page, then start an agent for it to talk to, and let it go: visit(page, kind,
    **settings)."""

    def start(page: str, kind: str, **settings: object) -> None:
        with Site() as before:  # has the bridge's port until the page is there
            origin, target = (url.format(site=site.port, bridge=before.port) for url in PAGES[page])
            query = urlencode(
                {"bridge": target, "site": f"http://127.0.0.1:{site.port}", "kind": kind}
            )
            browse(f"{origin}/?{query}")
            assert site.loaded.wait(SECONDS)
        serve(
            listen_addr=f"127.0.0.1:{before.port}", tools="default", cwd=str(tmp_path), **settings
        )
        site.go.set()

    return start


@pytest.fixture
def rows(caplog: pytest.LogCaptureFixture) -> Callable[[], list[Json]]:
    """The bridge's log lines of requests to a route."""
    caplog.set_level(logging.INFO, "claude_cli_bridge")
    # Type: ignore[attr-defined].
    return lambda: [r.row for r in list(caplog.records) if getattr(r, "row", {}).get("route")]


def assert_nothing_came_through(
    page: str, site: Site, log: Log, rows: Callable[[], list[Json]], number: int
) -> None:
    """That all requests arrived, and were refused before the CLI; the page read no answer, or the
    refusal."""
    found = site.reports.get(timeout=SECONDS)
    assert isinstance(found, dict)
    assert len(found) == number
    wait_until(lambda: len(rows()) >= number, f"{number} requests at the bridge: {rows()}")
    assert {(row["status"], row.get("error")) for row in rows()} == {(403, "permission_error")}
    read = [text for text in found.values() if text]
    if page == "whose name and port lead here":  # the browser takes it for the page's own server
        assert all("Host 'evil.example:" in text and "is not allowed" in text for text in read)
    else:
        assert read == []
    assert log.started() == {}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_of_another_origin_cannot_make_the_agent_do_anything(
    visit: Callable[..., None], site: Site, log: Log, rows: Callable[[], list[Json]], page: str
) -> None:
    visit(page, "write")
    assert_nothing_came_through(page, site, log, rows, WRITES)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_of_another_origin_cannot_embed_what_the_cli_says(
    visit: Callable[..., None], site: Site, log: Log, rows: Callable[[], list[Json]], page: str
) -> None:
    """Requests of images, scripts and frames carry no Origin."""
    visit(page, "read")
    assert_nothing_came_through(page, site, log, rows, READS)


def test_the_same_requests_of_an_allowed_page_are_answered(
    visit: Callable[..., None], site: Site, log: Log
) -> None:
    visit("of another name", "write", allowed_origins=(f"http://evil.example:{site.port}",))
    found = site.reports.get(timeout=SECONDS)
    assert isinstance(found, dict)
    assert {name for name, text in found.items() if "echo: attack" in text} == {
        "fetch, a simple request",
        "fetch with a preflight",
    }
    wait_until(
        lambda: len(log.started()) == 5,
        "those that cannot be read: without CORS, the form, the beacon",
    )


def test_a_page_of_an_allowed_origin_streams_with_a_key(
    visit: Callable[..., None], site: Site, log: Log, gate: Path
) -> None:
    visit("of another port", "use", allowed_origins=(f"http://127.0.0.1:{site.port}",), api_key=KEY)
    assert site.reports.get(timeout=SECONDS) == "the first delta"
    gate.touch()
    found = site.reports.get(timeout=SECONDS)
    assert isinstance(found, dict)
    events = [
        json.loads(line[6:]) for line in found["a stream"].splitlines() if line.startswith("data: ")
    ]
    assert (events[0]["type"], events[-1]["type"]) == ("message_start", "message_stop")
    assert (
        "".join(e["delta"].get("text", "") for e in events if "delta" in e)
        == "echo: PAUSE; 1 messages"
    )
    assert "the key sent does not match" in json.loads(found["a refusal"])["error"]["message"]
    assert len(log.started()) == 1


@pytest.mark.parametrize("width", [400, 1200])
def test_the_page_for_people_fits_a_window(serve: Serve, tmp_path: Path, width: int) -> None:
    """Nothing of it reaches the right edge, where it would be cut off."""
    server = serve()
    server.post()
    profile, picture = tmp_path / "chromium", tmp_path / "page.png"
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "--hide-scrollbars"]
    command += [f"--window-size={width},1600", f"--screenshot={picture}", server.url]
    environ = {**os.environ, "HOME": str(profile)}
    subprocess.run(command, env=environ, capture_output=True, timeout=SECONDS, check=True)
    wait_until(lambda: not running(profile), "the end of the browser")
    image = Image.open(picture).convert("L")
    background = Image.new("L", image.size, image.getpixel((0, 0)))
    written = ImageChops.difference(image, background).getbbox()
    assert image.width == width
    assert written
    left, _, right, bottom = written
    assert left >= 4
    assert right <= width - 4
    assert bottom > 400
