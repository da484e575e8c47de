"""A real Prometheus and a real Alertmanager with the configurations as shipped, sixty times as fast, and a webhook.

node ──/metrics──> Prometheus ──alerts.yml──> Alertmanager ──alertmanager.yml──> webhook of the test
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

from tests.breakable import Process, until
from tests.free_ports import free_port
from tests.prometheus_binaries import find_binary

SHIPPED = Path("deploy/observability")
PROGRAMS = ("prometheus", "prometheus-alertmanager")
FIRES_S = 90.0
_FASTER = {"s": "ms", "m": "s", "h": "m"}
# Thresholds in seconds: of the answer of an Envoy, of the age of a job, and of a connector's lag.
_SECONDS = re.compile(r"(_seconds\)?) > (30|300)\b")


def can_alert() -> bool:
    """Return True where Prometheus and Alertmanager are installed."""
    return all(find_binary(name) for name in PROGRAMS)


def faster(text: str) -> str:
    """Return rules or routes with each time and window divided by 60."""

    def sixtieth(found: re.Match[str]) -> str:
        number = int(found[2]) * 1000 // 60 if found[3] == "s" else int(found[2])
        return f"{found[1]}{number}{_FASTER[found[3]]}"

    text = re.sub(r"(for: |group_wait: |_interval: |offset |\[)(\d+)([smh])\b", sixtieth, text)
    return _SECONDS.sub(lambda found: f"{found[1]} > {int(found[2]) / 60}", text)


@dataclass(frozen=True)
class Notified:
    """An alert as the webhook got it."""

    receiver: str
    status: str
    """`firing` or `resolved`."""
    name: str
    severity: str
    model: str
    """Empty: the alert is about no model."""


class Alerting:
    """Prometheus, Alertmanager and the webhook, which run while the `with` block lasts.

    Args:
        file_sd: the file with which the node names itself.
        every_s: time between two scrapes, and for one: twice the 5 s for which a page waits for a process that stands
            still.
    """

    def __init__(self, folder: Path, file_sd: Path, *, every_s: float = 10.0) -> None:
        self._folder = folder
        self._file_sd = file_sd
        self._every_s = every_s
        self.notified: list[Notified] = []
        """All notifications, in their order."""

    def __enter__(self) -> Alerting:
        with ExitStack() as stack:
            webhook = stack.enter_context(self._webhook())
            self._start_alertmanager(stack, f"http://127.0.0.1:{webhook.server_address[1]}")
            self._start_prometheus(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def until_notified(
        self, alert: str, status: str = "firing", *, model: str = "", doing: Callable[[], object] = lambda: None
    ) -> None:
        """Wait until the webhook of its severity gets an alert, of `model` or any; call `doing` again and again."""
        found: list[Notified] = []

        def is_there() -> bool:
            doing()
            found[:] = [
                each
                for each in self.notified
                if (each.name, each.status) == (alert, status) and model in ("", each.model)
            ]
            return bool(found)

        asyncio.run(until(is_there, f"the webhook gets {alert}, {status}", FIRES_S, every_s=0.1))
        assert found[0].receiver == {"critical": "/pager", "warning": "/chat"}[found[0].severity]

    def _webhook(self) -> ThreadingHTTPServer:
        notified = self.notified

        class Webhook(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                document = json.loads(self.rfile.read(int(self.headers["content-length"])))
                for each in document["alerts"]:
                    labels = each["labels"]
                    about = labels["alertname"], labels["severity"], labels.get("model", "")
                    notified.append(Notified(self.path, each["status"], *about))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = _Server(("127.0.0.1", 0), Webhook)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    def _start_alertmanager(self, stack: ExitStack, webhook: str) -> None:
        config = (SHIPPED / "alertmanager.yml").read_text().replace("http://127.0.0.1:9095", webhook)
        (self._folder / "alertmanager.yml").write_text(faster(config))
        self._alertmanager = f"127.0.0.1:{free_port()}"
        argv = [_program("prometheus-alertmanager"), f"--config.file={self._folder}/alertmanager.yml"]
        argv += [f"--storage.path={self._folder}/alertmanager", f"--web.listen-address={self._alertmanager}"]
        stack.enter_context(Process([*argv, "--cluster.listen-address="], self._folder / "alertmanager.log"))

    def _start_prometheus(self, stack: ExitStack) -> None:
        (self._folder / "alerts.yml").write_text(faster((SHIPPED / "alerts.yml").read_text()))
        config = (SHIPPED / "prometheus.yml").read_text()
        times = f"{{scrape_interval: {self._every_s:g}s, scrape_timeout: {self._every_s:g}s, evaluation_interval: 1s}}"
        for shipped, own in (
            ("{scrape_interval: 15s, evaluation_interval: 15s}", times),
            ("DATA_DIR/prometheus.json", str(self._file_sd)),
            ("127.0.0.1:9093", self._alertmanager),
        ):
            assert config.count(shipped) == 1, shipped
            config = config.replace(shipped, own)
        (self._folder / "prometheus.yml").write_text(config)
        address = f"127.0.0.1:{free_port()}"
        argv = [_program("prometheus"), f"--config.file={self._folder}/prometheus.yml"]
        argv += [f"--storage.tsdb.path={self._folder}/prometheus", f"--web.listen-address={address}"]
        stack.enter_context(Process(argv, self._folder / "prometheus.log"))


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __exit__(self, *args: object) -> None:
        self.shutdown()
        super().__exit__(*args)


def _program(name: str) -> str:
    found = find_binary(name)
    assert found is not None, f"{name} is not installed"
    return found
