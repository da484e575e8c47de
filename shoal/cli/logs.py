"""`shoal logs`: the logs of all processes of a node, as one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli import amounts
from shoal.cli.here import node_here, or_stopped
from shoal.cli.output import Gateway, printable, show_json_line, text
from shoal.errors import InvalidArgument, NotFound

if TYPE_CHECKING:
    from collections.abc import Callable

    from shoal.node.logs import Follower, LogEntry

app = typer.Typer(rich_markup_mode="rich", add_completion=False)

# The delay of a line with --follow.
_POLL_S = 0.2
# mongod logs each connection. Unless it is named, its warnings and errors are printed.
_CHATTY = frozenset({"mongod"})
_STYLES = {"DEBUG": "dim", "INFO": "", "WARNING": "yellow", "ERROR": "bold red"}


@app.command()
def logs(
    process: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROCESS]...",
            help="Only these: a service (infer) or a process (infer-0, envoy, etcd, mongod). Default: all.",
            show_default=False,
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print new entries until interrupted.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", metavar="N", min=0, help="Number of entries to print.")] = 100,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="Then or later: 2026-11-24T08:00, or an age: 90s, 15m, 24h.", show_default=False
        ),
    ] = None,
    level: Annotated[
        str, typer.Option(metavar="LEVEL", help="Only this level and more severe ones: debug, info, warning, error.")
    ] = "",
    trace: Annotated[str, typer.Option(metavar="ID", help="Only entries of this trace.")] = "",
    contains: Annotated[str, typer.Option("--contains", metavar="TEXT", help="Only entries with this text.")] = "",
    data_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Data folder of the node, also of one that has stopped. Default: the node that runs on this machine.",
            show_default=False,
        ),
    ] = None,
    gateway: Gateway = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
    set_level: Annotated[
        str,
        typer.Option(
            metavar="LEVEL",
            help="Log from this level on, for a time: debug, info, warning, error; `default` ends it. "
            "Prints entries only with --follow.",
        ),
    ] = "",
    lasting: Annotated[str, typer.Option("--for", metavar="AGE", help="Time of --set-level: 90s, 10m, 2h.")] = "10m",
    logger: Annotated[
        str,
        typer.Option(metavar="NAME", help="With --set-level: only this logger and those below it, such as mesh.xds."),
    ] = "",
) -> None:
    """Print the logs of a node's processes, merged by time: the last entries, and new ones with --follow.

    The logs are files of the node's own machine; those of other nodes, and of `shoal serve`, are not in them.
    Of mongod, only warnings and errors are printed, unless it is named.

    With --set-level, it waits until the level is in force, and exits 1 when it is not in every process: they are named.

    [bold]Examples[/bold]

      shoal logs --level warning --since 1h

      shoal logs infer ingest --follow

      shoal logs --trace 4bf92f3577b34da6a3ce929d0e0e4736

      shoal logs infer --set-level debug --for 10m --follow
    """
    from shoal.cli import log_levels
    from shoal.node.logs import LEVELS, Follower, LogFilter, latest, processes

    if level and level.upper() not in LEVELS:
        raise InvalidArgument(f"--level {level!r}: expected one of {', '.join(LEVELS).lower()}")
    if set_level and set_level.upper() not in (*LEVELS, log_levels.DEFAULT):
        expected = ", ".join((*LEVELS, log_levels.DEFAULT)).lower()
        raise InvalidArgument(f"--set-level {set_level!r}: expected one of {expected}")
    if logger and not set_level:
        raise InvalidArgument("--logger is for --set-level; --contains prints the entries that have a text")
    folder = _folder(data_dir, gateway)
    known = processes(folder)
    wanted = [name for name in known if _includes(process, name)]
    if unknown := [part for part in process or () if not any(_includes([part], name) for name in known)]:
        raise NotFound(f"no log of {', '.join(unknown)} in {folder}: there are those of {', '.join(known) or 'nobody'}")
    chosen = LogFilter(
        since=amounts.time(since, "--since") if since else None,
        level=level.upper(),
        trace_id=trace.lower(),
        contains=contains,
        warnings_only=frozenset() if process else _CHATTY,
    )
    show = _JsonLines() if json else _Lines(max((len(name) for name in wanted), default=0))
    follower = Follower(folder, lambda name: _includes(process, name), chosen) if follow else None
    is_in_force = True
    if set_level:
        levels = log_levels.set_levels(folder, process, wanted, set_level.upper(), logger, lasting)
        is_in_force = not levels.not_in_force
        if json and not follow:
            show_json_line(levels)
        else:
            # The output of --json --follow has entries only.
            typer.echo(levels.summary, err=json)
    else:
        for entry in latest(folder, wanted, lines, chosen):
            show(entry)
    if follower is not None:
        _follow(follower, show)
    if not is_in_force:
        raise typer.Exit(1)


def _follow(follower: Follower, show: Callable[[LogEntry], None]) -> None:
    """Print new entries until interrupted."""
    try:
        while True:
            time.sleep(_POLL_S)
            for entry in follower.poll():
                show(entry)
    except KeyboardInterrupt:
        pass
    finally:
        follower.close()


def _includes(wanted: list[str] | None, name: str) -> bool:
    return not wanted or any(name == part or name.rpartition("-")[0] == part for part in wanted)


def _folder(data_dir: Path | None, gateway: str | None) -> Path:
    if data_dir is None:
        with or_stopped("logs"):
            data_dir = node_here(gateway, "logs", "`shoal serve` logs to its own terminal.").data_dir
    folder = data_dir / "logs"
    if not folder.is_dir():
        raise NotFound(f"{data_dir} has no folder of logs: give the data folder of a node with --data-dir")
    return folder


class _JsonLines:
    """Prints each entry as one line of JSON, in the same form for each process."""

    def __call__(self, entry: LogEntry) -> None:
        own = {"time": entry.at, "level": entry.level, "process": entry.process}
        show_json_line({**own, "logger": entry.logger, "message": entry.message, **_others(entry)})


def _others(entry: LogEntry) -> dict[str, object]:
    taken = ("time", "level", "process", "logger", "message")
    return {key: value for key, value in entry.fields.items() if key not in taken}


class _Lines:
    """Prints each entry as one line for a person; an exception below it."""

    def __init__(self, width: int) -> None:
        from rich.console import Console

        self._width = width
        self._console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)

    def __call__(self, entry: LogEntry) -> None:
        from rich.text import Text

        local = entry.at.astimezone()
        moment = f"{local:%Y-%m-%d %H:%M:%S}.{local.microsecond // 1000:03d}"
        head = f"{moment}  {entry.process:<{self._width}}  {entry.level:<7}  "
        line = Text(head, "dim").append(text(printable(entry.summary)), _STYLES[entry.level])
        if exception := entry.fields.get("exception"):
            indented = "\n".join(f"    {part}" for part in str(exception).splitlines())
            line.append(f"\n{printable(indented)}", "dim")
        self._console.print(line)
