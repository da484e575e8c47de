"""`shoal top`: what the node does now, by model, tenant or process."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli import admin_page, endpoints
from shoal.cli.here import admin_here
from shoal.cli.output import AsJson, Gateway, console, plain, show_json
from shoal.errors import InvalidArgument, Unavailable

if TYPE_CHECKING:
    from rich.table import Table

    from shoal.cli.diagnosis.rates import Page, Row

app = typer.Typer(rich_markup_mode="rich", add_completion=False)

_VIEWS = ("model", "execution", "tenant", "instance")
_KEYS = {"m": "model", "e": "execution", "t": "tenant", "i": "instance"}
_SPARKS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 10
_READ_S = 10.0


@app.command()
def top(
    by: Annotated[str, typer.Option(metavar="VIEW", help="model, execution, tenant or instance.")] = "model",
    sort: Annotated[
        str,
        typer.Option(metavar="FIELD", help="rate, p99, errors, queue, age, batch, shed, cpu, memory, stalls or name."),
    ] = "rate",
    every: Annotated[float, typer.Option(metavar="SECONDS", min=0.2, max=60, help="Time between two readings.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print one table, and end.")] = False,
    admin: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Admin address of the node, or --metrics-port of `shoal serve`. Default: the one here.",
            show_default=False,
        ),
    ] = None,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Show rates, latencies, queues and memory, live. Keys: m, e, t, i choose the view, s the order, q ends.

    Figures are those between the last two readings of the metrics of one node, which only its own machine can read.

    [bold]Examples[/bold]

      shoal top

      shoal top --by tenant --sort memory --once

      ssh gpu-1 shoal top --once --json
    """  # fmt: skip
    from shoal.cli.diagnosis.rates import SORTS

    if by not in _VIEWS:
        raise InvalidArgument(f"--by {by!r}: expected {', '.join(_VIEWS)}")
    if sort not in SORTS:
        raise InvalidArgument(f"--sort {sort!r}: expected {', '.join(SORTS)}")
    address = admin or admin_here(gateway, "metrics")
    state = _State(address, by, sort)
    if once or json or not sys.stdout.isatty():
        state.read()
        time.sleep(every)
        state.read()
        if json:
            show_json({"by": state.by, "seconds": state.seconds, "rows": [_plain(row) for row in state.rows()]})
        else:
            console().print(state.table())
        return
    _live(state, every)


class _State:
    """The last two pages, the view and the order, and the rates of the past."""

    def __init__(self, admin: str, by: str, sort: str) -> None:
        self.admin = admin
        self.by = by
        self.sort = sort
        self._before: Page | None = None
        self._now: Page | None = None
        self._past: dict[tuple[str, str], deque[float]] = {}

    @property
    def seconds(self) -> float:
        """Seconds between the pages."""
        return 0.0 if self._before is None or self._now is None else self._now.at - self._before.at

    def read(self) -> None:
        """Read a page.

        Raises:
            Unavailable: the node does not answer.
        """
        self._before, self._now = self._now, self._fetch()
        known, self._past = self._past, {}
        for view in _VIEWS:
            for row in self._rows(view):
                key = (view, row.name)
                self._past[key] = known.get(key) or deque(maxlen=_SPARK_WIDTH)
                self._past[key].append(row.rate)

    def _fetch(self) -> Page:
        page = admin_page.metrics(self.admin, timeout_s=_READ_S)
        # `shoal serve` has no page of its Envoy.
        with contextlib.suppress(Unavailable):
            page.endpoints = endpoints.by_instance(endpoints.fetch(self.admin))
        return page

    def _rows(self, view: str) -> list[Row]:
        from shoal.cli.diagnosis import rates

        if self._before is None or self._now is None:
            return []
        of: dict[str, Callable[[Page, Page], list[Row]]] = {
            "model": rates.models,
            "execution": rates.executions,
            "tenant": rates.tenants,
            "instance": rates.instances,
        }
        return of[view](self._before, self._now)

    def rows(self) -> list[Row]:
        """Return the rows of the view, in its order."""
        from shoal.cli.diagnosis.rates import ordered

        rows = self._rows(self.by)
        for row in rows:
            row.rates = list(self._past.get((self.by, row.name), ()))
        return ordered(rows, self.sort)

    def table(self) -> Table:
        """Return the view as a table that fits into 80 columns."""
        from rich.table import Table
        from rich.text import Text

        columns = _COLUMNS[self.by]
        table = Table(box=None, header_style="bold", pad_edge=False, expand=False)
        table.add_column(self.by, no_wrap=True, overflow="ellipsis", max_width=24)
        for title, _ in columns:
            table.add_column(title, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for row in self.rows():
            cells = [Text(_printable(row.name)), *(Text(cell(row)) for _, cell in columns)]
            style = "red" if row.errors > _ERRORS_SHOWN else ""
            table.add_row(*cells, Text(spark(row.rates), "cyan"), style=style)
        return table


# A share of failures from which a row is red.
_ERRORS_SHOWN = 0.01


def _printable(name: str) -> str:
    from shoal.cli.output import printable

    return printable(name)


def _number(value: float | None, digits: int = 1) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value * 100:.1f}%"


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value / (1 << 20):.0f}M"


_COLUMNS: dict[str, tuple[tuple[str, Callable[[Row], str]], ...]] = {
    "model": (
        ("req/s", lambda row: _number(row.rate)),
        ("err", lambda row: _share(row.errors)),
        ("p50 ms", lambda row: _number(row.p50_ms)),
        ("p99 ms", lambda row: _number(row.p99_ms)),
        ("rows", lambda row: _number(row.batch)),
        ("queue", lambda row: _number(row.queue, 0)),
        ("age s", lambda row: _number(row.queue_age_s)),
        ("shed/s", lambda row: _number(row.shed)),
    ),
    "execution": (
        ("runs/s", lambda row: _number(row.rate)),
        ("rows", lambda row: _number(row.batch)),
        ("p50 ms", lambda row: _number(row.p50_ms)),
        ("p99 ms", lambda row: _number(row.p99_ms)),
        ("wait p50", lambda row: _number(row.queue_p50_ms)),
        ("wait p99", lambda row: _number(row.queue_p99_ms)),
        ("queue", lambda row: _number(row.queue, 0)),
    ),
    "tenant": (
        ("req/s", lambda row: _number(row.rate)),
        ("memory", lambda row: _mib(row.memory_bytes)),
        ("job age s", lambda row: _number(row.queue_age_s)),
    ),
    "instance": (
        ("req/s", lambda row: _number(row.rate)),
        ("err", lambda row: _share(row.errors)),
        ("cpu", lambda row: _share(row.cpu)),
        ("memory", lambda row: _mib(row.memory_bytes)),
        ("queue", lambda row: _number(row.queue, 0)),
        ("stalls", lambda row: _number(row.stalls, 0)),
    ),
}


def spark(values: list[float]) -> str:
    """Return values as a line of bars, the largest as the highest one."""
    most = max(values, default=0.0)
    if most <= 0:
        return _SPARKS[0] * len(values)
    return "".join(_SPARKS[min(len(_SPARKS) - 1, int(value / most * (len(_SPARKS) - 1) + 0.5))] for value in values)


def _plain(row: Row) -> dict[str, object]:
    return {name: value for name, value in plain(row).items() if name != "rates"}


def _live(state: _State, every: float) -> None:
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from shoal.cli.diagnosis.rates import SORTS

    def view() -> Group:
        keys = "m models  e executions  t tenants  i instances  s order  q end"
        head = f"{state.admin}   by {state.by}, sorted by {state.sort}, of {state.seconds:.1f} s   {keys}"
        return Group(Text(head, "dim", no_wrap=True, overflow="ellipsis"), state.table(), Text(trouble, "red"))

    trouble = "reading twice for the first figures"
    with (
        contextlib.suppress(KeyboardInterrupt),
        _keys() as next_key,
        Live(view(), screen=True, auto_refresh=False) as live,
    ):
        due = 0.0
        while True:
            if time.monotonic() >= due:
                due = time.monotonic() + every
                try:
                    state.read()
                    trouble = "" if state.seconds else trouble
                except Unavailable as err:
                    trouble = err.message
                live.update(view(), refresh=True)
            key = next_key(max(0.0, min(due - time.monotonic(), every)))
            if key == "q":
                return
            if key in _KEYS:
                state.by = _KEYS[key]
            elif key == "s":
                names = list(SORTS)
                state.sort = names[(names.index(state.sort) + 1) % len(names)]
            if key:
                live.update(view(), refresh=True)


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Read single keys of the terminal. The function waits for one, at most some seconds, and returns it, or ""."""
    descriptor = sys.stdin.fileno() if sys.stdin.isatty() else -1
    before = termios.tcgetattr(descriptor) if descriptor >= 0 else None

    def next_key(timeout_s: float) -> str:
        if descriptor < 0:
            time.sleep(timeout_s)
            return ""
        ready, _, _ = select.select([descriptor], [], [], timeout_s)
        return os.read(descriptor, 1).decode("latin-1").lower() if ready else ""

    try:
        if before is not None:
            tty.setcbreak(descriptor)
        yield next_key
    finally:
        if before is not None:
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
