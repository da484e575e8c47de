"""`shoal results`: what jobs left behind."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli import amounts
from shoal.cli.output import AsJson, Gateway, connect, console, pairs, show, show_json, size
from shoal.errors import ShoalError

if TYPE_CHECKING:
    from shoal.client import Exported, JobResult, ResultFilter

app = typer.Typer(
    rich_markup_mode="rich",
    add_completion=False,
    no_args_is_help=True,
    help="Find the results of jobs, and take them elsewhere.",
)

Model = Annotated[str, typer.Option(metavar="NAME", help="Only results of this model.", show_default=False)]
Version = Annotated[str, typer.Option(metavar="V", help="Only of this version.", show_default=False)]
Tenant = Annotated[str, typer.Option(metavar="NAME", help="Only of this tenant.", show_default=False)]
Outcome = Annotated[
    str | None, typer.Option(metavar="OUTCOME", help="Only succeeded, failed, cancelled or expired ones.")
]
Label = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="Only those whose job has this label. May be repeated.")
]
Since = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="Recorded then or later: 2026-11-24, 2026-11-24T08:00, or 90m, 24h, 7d."),
]
Until = Annotated[str | None, typer.Option(metavar="TIME", help="Recorded before then.")]


@app.command("list")
def list_results(
    model: Model = "",
    version: Version = "",
    tenant: Tenant = "",
    outcome: Outcome = None,
    label: Label = None,
    since: Since = None,
    until: Until = None,
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="How many at most.")] = 20,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """List results, newest first, without their answers.

    [bold]Examples[/bold]

      shoal results list --model digits --since 24h

      shoal results list --outcome failed --label team=vision --json
    """
    wanted = _filter(model, version, tenant, outcome, label, since, until)
    with connect(gateway) as client:
        found = client.results.list(wanted, limit=limit)
    if json:
        show_json(found)
        return
    show(
        ("job", "outcome", "model", "tenant", "labels", "recorded", "error"), map(_row, found), empty="no such results"
    )


@app.command("show")
def show_result(
    job_id: Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")],
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Show all that is known of a result, and what the answer holds. Exits 1 when that is damaged in the store.

    [bold]Example[/bold]

      shoal results show 01JD8Y3V5M2Q4R6T8W0X2Z4B6D
    """
    from shoal.cli import tensors

    with connect(gateway) as client:
        result = client.results.get(job_id)
    if json:
        answer = tensors.as_document(result.answer) if result.answer is not None else None
        show_json({**vars(result), "answer": answer})
        _exit_without(result)
        return
    about = [
        ("job", result.job_id),
        ("outcome", result.outcome),
        ("model", _model(result)),
        ("tenant", result.tenant),
        ("labels", _labels(result)),
        ("attempt", result.attempt or ""),
        ("answered by", result.instance),
        ("submitted", result.submitted_at),
        ("recorded", result.recorded_at),
        ("error", result.message),
        ("answer", _without_answer(result)),
    ]
    show(("", ""), [(name, value) for name, value in about if value not in (None, "", [])])
    if result.answer is not None:
        tensors.show_result(result.answer, as_json=False, output=None)
    _exit_without(result)


def _exit_without(result: JobResult) -> None:
    """Ends the command when the answer that was asked for is lost: whoever takes it for none is told otherwise."""
    if result.answer_lost:
        print(
            f"shoal: the answer of job {result.job_id} is damaged in the store: {result.answer_lost}", file=sys.stderr
        )
        raise typer.Exit(1)


@app.command()
def export(
    to: Annotated[
        str, typer.Argument(metavar="TO", help="A folder here, or a URL that the store writes to: s3://bucket/prefix.")
    ],
    model: Model = "",
    version: Version = "",
    tenant: Tenant = "",
    outcome: Outcome = None,
    label: Label = None,
    since: Since = None,
    until: Until = None,
    answers: Annotated[bool, typer.Option(help="With the models' answers.")] = True,
    part_rows: Annotated[
        int, typer.Option(metavar="N", min=1, max=1_000_000, help="Rows of one part at most.")
    ] = 100_000,
    cursor: Annotated[
        str, typer.Option(metavar="CURSOR", help="Go on with an export that was interrupted.", show_default=False)
    ] = "",
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Write results to Parquet files, oldest first: part-00000.parquet and so on, then _manifest.json.

    Those that are recorded now. Interrupted, it says how to go on. Exits 1 when answers were damaged in the store:
    their results are written without them, and the column answer_lost says why.

    [bold]Examples[/bold]

      shoal results export ./out --model digits --since 24h

      shoal results export s3://reports/monday --label team=vision --no-answers
    """
    wanted = _filter(model, version, tenant, outcome, label, since, until)
    last = None
    try:
        with connect(gateway) as client, _counting() as told:
            for last in client.results.export(to, wanted, answers=answers, part_rows=part_rows, cursor=cursor):
                told(last)
    except (KeyboardInterrupt, ShoalError):
        if last is not None and not last.complete:
            print(f"{last.parts} parts are written: go on with --cursor {last.cursor}", file=sys.stderr)
        raise
    assert last is not None  # The last message says that it is complete.
    if json:
        show_json(last)
    else:
        typer.echo(f"{last.rows} results in {last.parts} parts, {size(last.bytes)}, in {to}")
    if last.answers_lost:
        print(
            f"{last.answers_lost} of them without their answer, which is damaged in the store: column answer_lost of "
            "each says why",
            file=sys.stderr,
        )
        raise typer.Exit(1)


@contextmanager
def _counting() -> Iterator[Callable[[Exported], None]]:
    """A line on standard error that counts. Where that is no terminal, nothing."""
    from rich.status import Status

    out = console(stderr=True)
    if not out.is_terminal:
        yield lambda _: None
        return
    with Status("looking", console=out) as status:
        yield lambda at: status.update(f"{at.rows} results, {at.parts} parts written, {size(at.bytes)}")


def _filter(
    model: str,
    version: str,
    tenant: str,
    outcome: str | None,
    label: list[str] | None,
    since: str | None,
    until: str | None,
) -> ResultFilter:
    from shoal.client import ResultFilter

    return ResultFilter(
        model=model,
        version=version,
        tenant=tenant,
        outcome=outcome,
        labels=pairs(label or [], "--label"),
        since=amounts.time(since, "--since") if since is not None else None,
        until=amounts.time(until, "--until") if until is not None else None,
    )


def _row(result: JobResult) -> tuple[object, ...]:
    return (
        result.job_id,
        result.outcome,
        _model(result),
        result.tenant,
        _labels(result),
        result.recorded_at,
        result.message,
    )


def _without_answer(result: JobResult) -> str:
    """Why there is none, of a result that has had one."""
    if result.answer_removed_at:
        return "removed by retention"
    return "damaged in the store" if result.answer_lost else ""


def _model(result: JobResult) -> str:
    return f"{result.model_name} version {result.model_version}" if result.model_version else result.model_name


def _labels(result: JobResult) -> list[str]:
    return [f"{key}={value}" for key, value in sorted(result.labels.items())]
