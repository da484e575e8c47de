"""`shoal top`: what a node does now, or what its cluster has done in the last hour, by model, tenant or process."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli.figures import ClusterFigures, Figures, NodeFigures, parse_since
from shoal.cli.here import admin_here
from shoal.cli.output import AsJson, Gateway, connect, console, one_line, plain, show_json
from shoal.errors import InvalidArgument, NotFound, ShoalError

if TYPE_CHECKING:
    from rich.table import Table

    from shoal.rates import Row

app = typer.Typer(rich_markup_mode="rich", add_completion=False)

_VIEWS = ("model", "execution", "tenant", "instance")
_KEYS = {"m": "model", "e": "execution", "t": "tenant", "i": "instance"}
_SPARKS = "▁▂▃▄▅▆▇█"


@app.command()
def top(
    by: Annotated[str, typer.Option(metavar="VIEW", help="model, execution, tenant or instance.")] = "model",
    sort: Annotated[
        str,
        typer.Option(metavar="FIELD", help="rate, p99, errors, queue, age, batch, shed, cpu, memory, stalls or name."),
    ] = "rate",
    every: Annotated[float, typer.Option(metavar="SECONDS", min=0.2, max=60, help="Time between two readings.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print one table, and end.")] = False,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="AGE", help="Print figures of all nodes since then, such as 30m, and end.", show_default=False
        ),
    ] = None,
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

    On the node's own machine, figures are those between the last two readings of its metrics. Elsewhere, and with
    --since, they are those of all nodes: the leading coord reads each node every 5 s, and keeps an hour in memory.

    [bold]Examples[/bold]

      shoal top

      shoal top --by tenant --sort memory --once

      shoal top --since 30m --sort errors

      shoal top --gateway https://gpu-1:8080 --once --json
    """  # fmt: skip
    from shoal.rates import SORTS

    if by not in _VIEWS:
        raise InvalidArgument(f"--by {by!r}: expected {', '.join(_VIEWS)}")
    if sort not in SORTS:
        raise InvalidArgument(f"--sort {sort!r}: expected {', '.join(SORTS)}")
    since_s = 0.0 if since is None else parse_since(since)
    if since_s and admin is not None:
        raise InvalidArgument("--since reads the history of coord at a gateway, not at --admin: leave one of them out")
    with contextlib.ExitStack() as stack:
        figures = _figures(admin, gateway, by, since_s, stack)
        if by not in figures.views:
            raise InvalidArgument(f"--by {by}: the history has {', '.join(figures.views)}")
        state = _State(figures, by, sort)
        if once or json or since_s or not sys.stdout.isatty():
            _print(state, every, as_json=json)
        else:
            _live(state, max(every, figures.shortest_s))


def _figures(admin: str | None, gateway: str | None, by: str, since_s: float, stack: contextlib.ExitStack) -> Figures:
    """Return the figures of a node or server on this machine, else those of the history. `stack` closes the client."""
    if admin is not None:
        return NodeFigures(admin)
    if not since_s:
        try:
            here = admin_here(gateway, "metrics")
        except InvalidArgument:
            # The page of metrics is on another machine; only the page has executions.
            if by not in ClusterFigures.views:
                raise
        else:
            # A `shoal serve` that nobody names is no gateway for `connect`.
            with contextlib.suppress(NotFound):
                return NodeFigures(here, stack.enter_context(connect(gateway)))
            return NodeFigures(here)
    return ClusterFigures(stack.enter_context(connect(gateway)), since_s)


def _print(state: _State, every: float, *, as_json: bool) -> None:
    state.read()
    if isinstance(state.figures, NodeFigures):
        time.sleep(every)
        state.read()
    if not as_json:
        console().print(state.table())
        for note in state.figures.notes():
            console().print(one_line(note), style="dim", soft_wrap=True)
        return
    rows = [_plain(row) for row in state.rows()]
    past = state.figures.past(state.by)
    show_json({"by": state.by, "seconds": state.figures.seconds, "rows": rows, "past": past})


class _State:
    """The figures, the view and the order."""

    def __init__(self, figures: Figures, by: str, sort: str) -> None:
        self.figures = figures
        self.by = by
        self.sort = sort

    def read(self) -> None:
        """Read the figures of the view anew. Raises ShoalError when nothing answers."""
        self.figures.read(self.by)

    def rows(self) -> list[Row]:
        """Return the rows of the view, in its order."""
        from shoal.rates import ordered

        return ordered(self.figures.rows(self.by), self.sort)

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
            cells = [Text(one_line(row.name)), *(Text(cell(row)) for _, cell in columns)]
            style = "red" if row.errors > _ERRORS_SHOWN else ""
            table.add_row(*cells, Text(spark(row.rates), "cyan"), style=style)
        return table


# A share of failures from which a row is red.
_ERRORS_SHOWN = 0.01


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

    from shoal.rates import SORTS

    figures = state.figures

    def view() -> Group:
        keys = "m models  e executions  t tenants  i instances  s order  q end"
        head = f"{figures.where}   by {state.by}, sorted by {state.sort}, of {figures.seconds:.1f} s   {keys}"
        notes = [Text(one_line(note), "dim") for note in figures.notes()]
        return Group(Text(head, "dim", no_wrap=True, overflow="ellipsis"), state.table(), *notes, Text(trouble, "red"))

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
                    trouble = "" if figures.seconds else trouble
                except ShoalError as err:
                    trouble = one_line(err.message)
                live.update(view(), refresh=True)
            key = next_key(max(0.0, min(due - time.monotonic(), every)))
            if key == "q":
                return
            if _KEYS.get(key) in figures.views:
                state.by = _KEYS[key]
                # The history is read for one view.
                due = 0.0 if isinstance(figures, ClusterFigures) else due
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
