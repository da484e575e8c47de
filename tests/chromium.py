"""A real headless Chromium that opens a page of a test: the page sends what it has found to its own server."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

UNPACKED = Path(__file__).resolve().parent.parent / ".chromium"
PAGE_S = 60.0
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--no-proxy-server",
    "--remote-debugging-port=0",
)


def command() -> tuple[list[str], dict[str, str]]:
    """Return the command and the variables of the installed Chromium, or of the one that tools/chromium.sh unpacked."""
    if (installed := shutil.which("chromium-headless-shell")) is not None:
        return [installed], {}
    binary = UNPACKED / "usr/lib/chromium/chromium-headless-shell"
    if not binary.exists():
        pytest.skip("needs a Chromium: run tools/chromium.sh")
    folders = sorted({str(path.parent) for path in UNPACKED.rglob("*.so*")})
    return [str(binary)], {"LD_LIBRARY_PATH": ":".join(folders)}


class Pages:
    """Serves one page, and `values` to its script, which calls `done(found)` at its end."""

    def __init__(self, script: str) -> None:
        found: Queue[Any] = Queue()
        self.values: dict[str, str] = {}
        pages = self
        page = f"""<!doctype html><meta charset=utf-8><link rel=icon href="data:,"><script type=module>
const done = found => fetch("/done", {{method: "POST", body: JSON.stringify(found)}});
{script}
</script>""".encode()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._respond(json.dumps(pages.values).encode() if self.path == "/values" else page)

            def do_POST(self) -> None:
                found.put(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                self._respond(b"")

            def _respond(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("content-type", "text/html")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self._found = found
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]

    @contextlib.contextmanager
    def served(self) -> Iterator[Pages]:
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def found_at(self, host: str, folder: Path) -> Any:
        """Return what the page finds when a browser opens it at `host`, its origin."""
        argv, env = command()
        url = f"http://{host}:{self.port}/"
        argv += [*_FLAGS, f"--user-data-dir={folder / host}", url]
        with (folder / f"{host}.log").open("w") as log:
            process = subprocess.Popen(argv, stdout=log, stderr=log, env={**os.environ, **env}, start_new_session=True)
        try:
            return self._found.get(timeout=PAGE_S)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
