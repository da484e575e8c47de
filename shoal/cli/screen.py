"""Output of `shoal up`: progress during the start, a table when the node is ready, then a line for each event."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from mesh.process.sockets import is_local
from shoal.node.options import Options
from shoal.node.process import ending
from shoal.node.ready import Ready
from shoal.node.supervisor import CrashLoop, Ended, Event, Killed, Recovered, Started

# Columns without a terminal: wide enough that no path is split.
_WIDTH = 160


class _Console(Console):
    """Console that goes silent when its output is a closed pipe; Rich would end the program."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


def _callers(ready: Ready) -> str:
    if ready.key_file is not None:
        return f"callers need a key; yours: {ready.key_file}"
    is_private = is_local(ready.listen or ready.gateway)
    callers = "every user of this machine" if is_private else "everyone who can reach the address"
    return f"not authenticated: {callers} may call every method"


class NodeScreen:
    """Implementation of shoal.node.node.Screen.

    The ready table or document goes to standard output, all else to standard error. A closed pipe or terminal does not
    end the node.
    """

    def __init__(self, options: Options, *, as_json: bool) -> None:
        self._options = options
        self._as_json = as_json
        self._said_starting = False
        # Paths and fingerprints may look like markup: `:CD:` is a picture there.
        self._out, self._err = (_Console(stderr=stderr, markup=False, emoji=False) for stderr in (False, True))
        for console in (self._out, self._err):
            if not console.is_terminal:
                console.width = _WIDTH
        self._status = Status("", console=self._err) if self._err.is_terminal else None

    def waiting(self, names: Sequence[str]) -> None:
        if self._status:
            with contextlib.suppress(OSError):
                text = f"starting: waiting for {', '.join(names)}" if names else "starting: last checks"
                self._status.update(Text(text))
                self._status.start()
        elif not self._said_starting:
            self._say(f"starting {', '.join(names)}")
        self._said_starting = True

    def still_waiting(self, names: Sequence[str], waited_s: float, why: str) -> None:
        reason = f" ({why})" if why else ""
        self._say(f"still waiting for {', '.join(names)} after {waited_s:.0f} s{reason}; logs: {self._logs}", "yellow")

    def event(self, event: Event) -> None:
        match event:
            case Started(name, pid, again=True, in_loop=False):
                self._say(f"{name} restarted (pid {pid})")
            case Ended(name, status, lived_s, again_in_s):
                self._say(f"{name} {ending(status)} after {lived_s:.1f} s; restart in {again_in_s:.1f} s", "yellow")
            case CrashLoop(name, status, deaths, log, lines):
                self._say(f"{name} keeps ending: {deaths} times so far; the last time it {ending(status)}", "bold red")
                self._say(f"  it is restarted again and again; the rest of the node runs. The end of {log}:", "red")
                for line in lines or ("(the log is empty)",):
                    self._say(f"  | {line}")
            case Recovered(name):
                self._say(f"{name} is stable again", "green")
            case Killed(name, grace_s):
                self._say(f"{name} did not stop within {grace_s:.0f} s and was killed", "yellow")

    def trouble(self, text: str) -> None:
        self._say(text, "yellow")

    def ready(self, ready: Ready, took_s: float) -> None:
        self._stop_status()
        with contextlib.suppress(OSError):
            if self._as_json:
                self._out.file.write(ready.as_json() + "\n")
                self._out.file.flush()
            else:
                self._out.print(self._table(ready))
        self._say(f"ready after {took_s:.1f} s; Ctrl-C stops the node", "green")

    def stopping(self, number: int) -> None:
        self._stop_status()
        self._say("stopping: calls in flight are finished first; press Ctrl-C again to stop immediately")

    def __enter__(self) -> NodeScreen:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self._stop_status()
        if kind is None:
            self._say("stopped")

    @property
    def _logs(self) -> str:
        return str(self._options.data_dir / "logs")

    def _table(self, ready: Ready) -> Table:
        table = Table(title=f"node {self._options.name}", title_justify="left", show_header=False)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        scheme = "" if ready.trust is None else "https://"
        table.add_row("gateway", f"{scheme}{ready.listen or ready.gateway}   gRPC and REST, {_callers(ready)}")
        if (trust := ready.trust) is not None:
            issuer = "own CA, for clients: `shoal ca show`" if trust.has_own_ca else trust.ca
            table.add_row("TLS", f"{issuer}\nSHA-256 {trust.fingerprint}")
        table.add_row("admin", f"http://{ready.admin}   metrics for Prometheus: /metrics; Envoy's pages, read only")
        table.add_row("data", str(ready.data_dir))
        table.add_row("logs", self._logs, end_section=True)
        for name, pid in ready.pids.items():
            table.add_row(name, f"pid {pid}")
        external = (
            ("etcd", self._options.etcd),
            ("mongod", self._options.mongo and self._options.mongo.rpartition("@")[2]),
        )
        for name, url in external:
            if url:
                table.add_row(name, f"{url}   not started here")
        return table

    def _say(self, text: str, style: str = "") -> None:
        with contextlib.suppress(OSError):
            self._err.print(Text(text, style), soft_wrap=True)

    def _stop_status(self) -> None:
        if self._status:
            with contextlib.suppress(OSError):
                self._status.stop()
