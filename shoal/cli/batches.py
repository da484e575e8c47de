"""`shoal jobs submit --batch` and `shoal jobs batch`: files of rows through one model, with a live progress bar."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli.output import AsJson, Gateway, connect, console, show, show_json, size, text

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from shoal.client import Batch, Client

app = typer.Typer(
    rich_markup_mode="rich",
    add_completion=False,
    no_args_is_help=True,
    help="Follow and control batches: files of rows through one model. `shoal jobs submit --batch` starts one.",
)

BatchId = Annotated[str, typer.Argument(metavar="BATCH", help="The batch's id, as `submit --batch` printed it.")]
Reason = Annotated[str, typer.Option(metavar="TEXT", help="Recorded with the batch.", show_default=False)]
_INTERRUPTED = 130
# Without a terminal: one line for each tenth of the rows.
_LINES = 10


@dataclass(frozen=True)
class BatchOptions:
    """Options of `submit --batch`."""

    inputs: Sequence[str]
    output: str
    model: str
    version: str = ""
    kind: str = ""
    columns: Mapping[str, str] | None = None
    keep: Sequence[str] = ()
    texts: Sequence[str] = ()
    key: str = ""
    labels: Mapping[str, str] | None = None
    attempts: int | None = None
    chunk_rows: int = 0


def submit(client: Client, options: BatchOptions, *, wait: bool, as_json: bool) -> None:
    """Submit a batch, and with `wait` follow it until its end. Exits 1 when it did not succeed."""
    batch = client.batches.submit(
        options.model,
        list(options.inputs),
        options.output,
        format=options.kind or None,
        columns=options.columns,
        keep=options.keep,
        text_outputs=options.texts,
        version=options.version,
        idempotency_key=options.key,
        labels=options.labels,
        chunk_rows=options.chunk_rows,
        max_attempts=options.attempts or 0,
    )
    if wait:
        _follow(client, batch, as_json=as_json)
    elif as_json:
        show_json(batch)
    else:
        typer.echo(batch.id)


@app.command()
def watch(batch_id: BatchId, gateway: Gateway = None, json: AsJson = False) -> None:
    """Follow a batch until it has ended; Ctrl-C leaves it running. With --json, print it once it has ended.

    Exits 0 when the batch succeeded, else 1.

    [bold]Example[/bold]

      shoal jobs batch watch 01JD8Y3V5M2Q4R6T8W0X2Z4B6D
    """
    with connect(gateway) as client:
        _follow(client, client.batches.get(batch_id), as_json=json)


@app.command("list")
def list_batches(
    state: Annotated[
        str | None, typer.Option(metavar="STATE", help="running, paused, succeeded, failed or cancelled.")
    ] = None,
    model: Annotated[str, typer.Option(metavar="NAME", help="Only batches of this model.", show_default=False)] = "",
    tenant: Annotated[str, typer.Option(metavar="NAME", help="Only batches of this tenant.", show_default=False)] = "",
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="Largest number of rows to list.")] = 20,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """List batches, newest first.

    [bold]Example[/bold]

      shoal jobs batch list --state running
    """
    with connect(gateway, tenant=tenant) as client:
        batches = client.batches.list(state=state, model=model, limit=limit)
    if json:
        show_json(batches)
        return
    rows = [
        (
            batch.id,
            batch.state,
            batch.model_name,
            f"{batch.rows_done:,} of {_total(batch)}",
            f"{batch.rows_failed:,}",
            f"{batch.rows_per_second:,.0f}",
            batch.submitted_at,
            batch.output,
        )
        for batch in batches
    ]
    show(("batch", "state", "model", "rows", "failed", "rows/s", "submitted", "output"), rows, empty="no such batches")


@app.command()
def get(batch_id: BatchId, gateway: Gateway = None, json: AsJson = False) -> None:
    """Show the state and progress of a batch.

    [bold]Example[/bold]

      shoal jobs batch get 01JD8Y3V5M2Q4R6T8W0X2Z4B6D
    """
    with connect(gateway) as client:
        batch = client.batches.get(batch_id)
    if json:
        show_json(batch)
    else:
        _show(batch)


@app.command()
def cancel(batch_id: BatchId, reason: Reason = "", gateway: Gateway = None, json: AsJson = False) -> None:
    """End a batch. Its written results stay, with a manifest and a summary.

    [bold]Example[/bold]

      shoal jobs batch cancel 01JD8Y3V5M2Q4R6T8W0X2Z4B6D --reason "wrong column"
    """
    with connect(gateway) as client:
        _say(client.batches.cancel(batch_id, reason), as_json=json)


@app.command()
def pause(batch_id: BatchId, reason: Reason = "", gateway: Gateway = None, json: AsJson = False) -> None:
    """Pause a batch until `resume`.

    [bold]Example[/bold]

      shoal jobs batch pause 01JD8Y3V5M2Q4R6T8W0X2Z4B6D
    """
    with connect(gateway) as client:
        _say(client.batches.pause(batch_id, reason), as_json=json)


@app.command()
def resume(batch_id: BatchId, reason: Reason = "", gateway: Gateway = None, json: AsJson = False) -> None:
    """Resume a paused batch.

    [bold]Example[/bold]

      shoal jobs batch resume 01JD8Y3V5M2Q4R6T8W0X2Z4B6D
    """
    with connect(gateway) as client:
        _say(client.batches.resume(batch_id, reason), as_json=json)


def _follow(client: Client, batch: Batch, *, as_json: bool) -> None:
    out = console(stderr=True)
    try:
        if as_json:
            batch = client.batches.wait(batch.id)
        elif out.is_terminal:
            batch = _bar(client, batch)
        else:
            batch = _lines(batch, client.batches.watch(batch.id))
    except KeyboardInterrupt:
        print(_left_running(batch.id), file=sys.stderr)
        raise typer.Exit(_INTERRUPTED) from None
    if as_json:
        show_json(batch)
    else:
        _summary(batch)
    if batch.state != "succeeded":
        raise typer.Exit(1)


def _left_running(batch_id: str) -> str:
    return (
        f"batch {batch_id} keeps running\n"
        f"  follow it:  shoal jobs batch watch {batch_id}\n"
        f"  end it:     shoal jobs batch cancel {batch_id}"
    )


def _bar(client: Client, batch: Batch) -> Batch:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.fields[state]}"),
        BarColumn(),
        TextColumn("{task.fields[rows]}"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="yellow"),
    )
    out = console(stderr=True)
    out.print(f"batch {batch.id}: {batch.model_name} on {', '.join(batch.inputs)}", markup=False, soft_wrap=True)
    out.print("Ctrl-C leaves it running", style="dim")
    with Progress(*columns, console=out) as progress:
        task = progress.add_task("", total=None, **_fields(batch))
        watching = client.batches.watch(batch.id)
        for batch in watching:
            _advance(progress, task, batch)
    return batch


def _advance(progress: Progress, task: TaskID, batch: Batch) -> None:
    total = batch.rows if batch.is_planned else None
    progress.update(task, total=total, completed=batch.rows_done, **_fields(batch))


def _fields(batch: Batch) -> dict[str, Any]:
    failed = f", {batch.rows_failed:,} failed" if batch.rows_failed else ""
    return {
        "state": str(batch.state if batch.ending is None else f"{batch.ending} ..."),
        "rows": f"{batch.rows_done:,} of {_total(batch)} rows{failed}",
        "rate": f"{batch.rows_per_second:,.0f} rows/s",
        "note": f"waits for: {batch.waits_for[:100]}" if batch.waits_for and not batch.ended else "",
    }


def _lines(batch: Batch, updates: Iterable[Batch]) -> Batch:
    """Print a line after each tenth of the rows, and when the batch waits for something else."""
    print(f"batch {batch.id}", file=sys.stderr)
    printed = (-1, "")
    for batch in updates:
        tenth = _LINES * batch.rows_done // max(batch.rows, 1) if batch.is_planned else 0
        if (tenth, batch.waits_for) != printed:
            printed = (tenth, batch.waits_for)
            fields = _fields(batch)
            print("  ".join(filter(None, fields.values())), file=sys.stderr)
    return batch


def _summary(batch: Batch) -> None:
    share = f" ({', '.join(f'{rows:,} {code}' for code, rows in batch.failures.items())})" if batch.failures else ""
    about: list[tuple[str, object]] = [
        ("batch", batch.id),
        ("state", batch.state),
        ("reason", batch.message),
        ("rows succeeded", f"{batch.rows_ok:,} of {_total(batch)}"),
        ("rows failed", f"{batch.rows_failed:,}{share}" if batch.rows_failed else ""),
        ("time", f"{batch.seconds:,.1f} s, {batch.rows_per_second:,.0f} rows/s"),
        ("results", f"{batch.output}/part-*.parquet, {size(batch.parts_bytes)}"),
        ("failed rows", f"{batch.output}/_dead/" if batch.rows_failed else ""),
    ]
    show(("", ""), [(name, value) for name, value in about if value != ""])


def _show(batch: Batch) -> None:
    about: list[tuple[str, object]] = [
        ("batch", batch.id),
        ("state", batch.state if batch.ending is None else f"{batch.state}, about to be {batch.ending}"),
        ("reason", batch.message),
        ("waits for", batch.waits_for),
        ("model", f"{batch.model_name} version {', '.join(batch.model_versions) or batch.model_version or '?'}"),
        ("inputs", "\n".join(batch.inputs)),
        ("format", batch.format),
        ("columns", [f"{name}={column}" for name, column in batch.columns.items()]),
        ("output", batch.output),
        ("tenant", batch.tenant),
        ("labels", [f"{key}={value}" for key, value in batch.labels.items()]),
        ("rows", f"{batch.rows_done:,} of {_total(batch)}: {batch.rows_ok:,} succeeded, {batch.rows_failed:,} failed"),
        ("failed by", [f"{code}: {rows:,}" for code, rows in batch.failures.items()]),
        ("chunks", f"{batch.chunks_done:,} of {batch.chunks:,}"),
        ("files", batch.files),
        ("parts", size(batch.parts_bytes)),
        ("time", f"{batch.seconds:,.1f} s, {batch.rows_per_second:,.0f} rows/s"),
    ]
    show(("", ""), [(name, value) for name, value in about if value not in (None, "", [])])
    steps = [(step.at, step.state, step.instance, step.reason) for step in batch.transitions]
    show(("at", "state", "by", "reason"), steps, empty="no transitions yet")


def _say(batch: Batch, *, as_json: bool) -> None:
    if as_json:
        show_json(batch)
    else:
        how = batch.state if batch.ending is None else f"about to be {batch.ending}"
        typer.echo(f"{batch.id} is {text(how)}: {batch.rows_done:,} of {_total(batch)} rows are done")


def _total(batch: Batch) -> str:
    return f"{batch.rows:,}" if batch.is_planned or batch.ended else f"{batch.rows:,}+"


def checked(batch: Sequence[str], out: str, model: str, written: str | None) -> None:
    """Check that the options of a batch fit together.

    Raises:
        InvalidArgument: an option is missing, or excludes another one.
    """
    from shoal.errors import InvalidArgument

    if written is not None:
        raise InvalidArgument(
            f"INPUT {written[:40]!r} and --batch: use one; a batch takes its rows from files, a job from INPUT"
        )
    if not out:
        raise InvalidArgument("--batch needs --out: a folder or prefix for the results")
    if not model:
        raise InvalidArgument("--batch needs a model: --model NAME")
    for place in batch:
        if "://" not in place and not Path(place).expanduser().exists():
            raise InvalidArgument(f"--batch {place}: no such file or folder; URLs begin with file://, s3:// ...")
