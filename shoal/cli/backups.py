"""`shoal store backup` and `restore`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli.output import AsJson, Gateway, connect, console, show_json, size
from shoal.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shoal.client import BackupProgress

Place = Annotated[
    str,
    typer.Argument(metavar="PLACE", help="A folder on the store's machine, or s3://bucket/prefix, gs://..., az://..."),
]


def backup(
    place: Place,
    trust_sizes: Annotated[
        bool,
        typer.Option(
            "--trust-sizes",
            help="Compare only the sizes of blobs of earlier backups, without reading them.",
            show_default=False,
        ),
    ] = False,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Back up everything that the store and ingest keep, as of one moment.

    The first backup at a place copies every blob, later ones only new blobs. An interrupted backup is no backup; the
    next one continues its work. Blobs of earlier backups are read and compared, and replaced when damaged.
    Exits 1 when a blob was damaged in the store.

    [bold]Examples[/bold]

      shoal store backup /mnt/backups

      shoal store backup s3://backups/shoal
    """
    with connect(gateway) as client:
        done = _shown("backing up", client.store.backup(_url(place), trust_sizes=trust_sizes), json)
    if json:
        show_json(done)
    else:
        new = f"{done.copied} of them new ({size(done.copied_bytes)})"
        typer.echo(f"backup {done.backup_id}: {done.documents} documents, {done.blobs} blobs, {new}, in {place}")
        if done.repaired:
            typer.echo(
                f"{done.repaired} of the new ones replaced damaged copies in the backup: check that disk", err=True
            )
        for sha256 in done.missing:
            typer.echo(f"damaged in the store, and not in the backup: {sha256} (see shoal store verify)", err=True)
    if done.missing:
        raise typer.Exit(1)


def restore(
    place: Place,
    backup_id: Annotated[
        str, typer.Option("--backup", metavar="ID", help="Backup to restore. Default: the newest.", show_default=False)
    ] = "",
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Restore a backup into this node, which must be empty.

    After an interruption, repeat the command; it continues. Jobs that had not ended at the backup run again.

    [bold]Examples[/bold]

      shoal store restore /mnt/backups

      shoal store restore s3://backups/shoal --backup 20261126T163000Z-1a2b3c4d
    """
    with connect(gateway) as client:
        done = _shown("restoring", client.store.restore(_url(place), backup_id=backup_id), json)
    if json:
        show_json(done)
        return
    typer.echo(f"restored {done.backup_id}: {done.documents} documents, {done.blobs} blobs")
    if done.missing:
        typer.echo(f"{len(done.missing)} blobs were damaged at the backup: see shoal store verify", err=True)


def _url(place: str) -> str:
    """Return the argument as a URL; a folder is relative to the working directory of the command."""
    if not place.strip():
        raise InvalidArgument("PLACE is empty: expected a folder, or s3://bucket/prefix, gs://..., az://...")
    return place if re.match(r"^[a-z0-9]+://", place) else Path(place).expanduser().absolute().as_uri()


def _shown(doing: str, steps: Iterable[BackupProgress], json: bool) -> BackupProgress:
    last = None
    with _bar(doing, json) as report:
        for last in steps:
            report(last)
    # The client raises unless the last step is the complete one.
    assert last is not None
    return last


@contextmanager
def _bar(doing: str, json: bool) -> Iterator[Any]:
    out = console(stderr=True)
    if json or not out.is_terminal:
        yield lambda step: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn(doing, markup=False), TextColumn("{task.fields[documents]} documents, blobs"), BarColumn(),
        MofNCompleteColumn(), TextColumn("{task.fields[copied]}"), TimeRemainingColumn(), console=out, transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=None, documents=0, copied="")
        yield lambda at: bar.update(
            task,
            completed=at.blobs,
            total=at.blobs_in_all or None,
            documents=at.documents,
            copied=size(at.copied_bytes),
        )
