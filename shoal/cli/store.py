"""`shoal store`: verification, garbage collection, retention, quotas and backups of the store."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli import backups, retention, usage
from shoal.cli.output import AsJson, Gateway, connect, console, show, show_json, show_json_line, size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shoal.client import Finding, Verified

app = typer.Typer(
    rich_markup_mode="rich",
    add_completion=False,
    no_args_is_help=True,
    help="Verify, back up and restore the store's contents; set retention and quotas.",
)
app.add_typer(retention.app, name="retention")
app.command()(usage.usage)
app.add_typer(usage.quota, name="quota")

app.command()(backups.backup)
app.command()(backups.restore)


@app.command()
def verify(
    quick: Annotated[bool, typer.Option("--quick", help="Check only that blobs exist with the right size.")] = False,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Read every blob and compare it with its digest. Lists damaged blobs, with the models and jobs that need them.

    Exits 1 when a blob is damaged. Push a damaged model again to repair it.

    [bold]Examples[/bold]

      shoal store verify

      shoal store verify --quick --json
    """
    findings: list[Finding] = []
    last: Verified | None = None
    with connect(gateway) as client:
        for last in _shown(client.store.verify(sizes_only=quick), json):
            if last.finding is not None:
                findings.append(last.finding)
                if json:
                    show_json_line(last.finding)
    blobs, nbytes = (last.blobs, last.bytes) if last else (0, 0)
    damaged = sum(finding.kind == "damaged" for finding in findings)
    if json:
        show_json_line({"blobs": blobs, "bytes": nbytes, "damaged": damaged})
    else:
        if findings:
            rows = [(found.kind, found.key, found.message, "\n".join(found.users)) for found in findings]
            show(("", "blob", "message", "needed by"), rows)
        checked = "checked" if quick else "read and compared"
        typer.echo(f"{blobs} blobs ({size(nbytes)}) {checked}: {damaged or 'none'} damaged")
    if damaged:
        raise typer.Exit(1)


@app.command()
def collect(
    strays: Annotated[
        bool, typer.Option("--strays", help="Also search all blobs for remains of interrupted uploads.")
    ] = False,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Collect unreferenced artifacts now. The store also does this by itself, by default every ten minutes.

    An artifact is collected in three steps, at least ten minutes apart: it is marked (`condemned` with --json), it is
    collected, and its bytes are removed.

    [bold]Example[/bold]

      shoal store collect --strays
    """
    with connect(gateway) as client:
        done = client.store.collect(strays=strays)
    if json:
        show_json(done)
        return
    typer.echo(f"{done.condemned} marked, {done.collected} collected, {done.removed} blobs removed")
    if strays:
        typer.echo(f"{done.strays} stray blobs found")


def _shown(steps: Iterable[Verified], json: bool) -> Iterator[Verified]:
    """Yield the steps, with a progress bar on a terminal."""
    with _bar(json) as report:
        for step in steps:
            report(step)
            yield step


@contextmanager
def _bar(json: bool) -> Iterator[Any]:
    out = console(stderr=True)
    if json or not out.is_terminal:
        yield lambda step: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("verifying"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[read]}"),
        TimeRemainingColumn(), console=out, transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=None, read="")
        yield lambda step: bar.update(task, completed=step.blobs, total=step.blobs_in_all, read=size(step.bytes))
