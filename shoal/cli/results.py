"""`shoal results`: results of jobs."""

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
    help="Find the results of jobs, and export them.",
)

Model = Annotated[str, typer.Option(metavar="NAME", help="Only results of this model.", show_default=False)]
Version = Annotated[str, typer.Option(metavar="V", help="Only results of this version.", show_default=False)]
Tenant = Annotated[str, typer.Option(metavar="NAME", help="Only results of this tenant.", show_default=False)]
Outcome = Annotated[
    str | None,
    typer.Option(metavar="OUTCOME", help="Only results with this outcome: succeeded, failed, cancelled or expired."),
]
Label = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="Only results of jobs with this label. May be repeated."),
]
Since = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="Recorded then or later: 2026-11-24, 2026-11-24T08:00, or an age: 90m, 24h, 7d."),
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
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="Largest number of rows to list.")] = 20,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """List results, newest first, without their answers.

    [bold]Examples[/bold]

      shoal results list --model digits --since 24h

      shoal results list --outcome failed --label team=vision --json
    """
    matching = _filter(model, version, tenant, outcome, label, since, until)
    with connect(gateway) as client:
        found = client.results.list(matching, limit=limit)
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
    """Show a result, with its answer. Exits 1 when the answer is damaged in the store.

    [bold]Example[/bold]

      shoal results show 01JD8Y3V5M2Q4R6T8W0X2Z4B6D
    """
    from shoal.cli import tensors

    with connect(gateway) as client:
        result = client.results.get(job_id)
    if json:
        answer = tensors.as_document(result.answer) if result.answer is not None else None
        show_json({**vars(result), "answer": answer})
        _exit_if_lost(result)
        return
    about = [
        ("job", result.job_id),
        ("outcome", result.outcome),
        ("model", _model(result)),
        ("tenant", result.tenant),
        ("labels", _labels(result)),
        ("attempt", result.attempt or ""),
        ("run by", result.instance),
        ("submitted", result.submitted_at),
        ("recorded", result.recorded_at),
        ("error", result.message),
        ("answer", _missing_answer(result)),
    ]
    show(("", ""), [(name, value) for name, value in about if value not in (None, "", [])])
    if result.answer is not None:
        tensors.show_result(result.answer, as_json=False, output=None)
    _exit_if_lost(result)


def _exit_if_lost(result: JobResult) -> None:
    """Exit with an error when the answer is damaged, which is different from a result without an answer."""
    if result.answer_lost:
        print(
            f"shoal: the answer of job {result.job_id} is damaged in the store: {result.answer_lost}", file=sys.stderr
        )
        raise typer.Exit(1)


@app.command()
def export(
    to: Annotated[
        str,
        typer.Argument(metavar="TO", help="A local folder, or a URL that the store writes to: s3://bucket/prefix."),
    ],
    model: Model = "",
    version: Version = "",
    tenant: Tenant = "",
    outcome: Outcome = None,
    label: Label = None,
    since: Since = None,
    until: Until = None,
    answers: Annotated[bool, typer.Option(help="Include the models' answers.")] = True,
    part_rows: Annotated[
        int, typer.Option(metavar="N", min=1, max=1_000_000, help="Largest number of rows in a part.")
    ] = 100_000,
    cursor: Annotated[
        str, typer.Option(metavar="CURSOR", help="Resume an interrupted export.", show_default=False)
    ] = "",
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Write results to Parquet files, oldest first: part-00000.parquet and so on, then _manifest.json.

    The export contains the results recorded at its start. An interrupted export prints how to resume it. Exits 1 when
    answers were damaged in the store: their results have no answer, and the column answer_lost has the reason.

    [bold]Examples[/bold]

      shoal results export ./out --model digits --since 24h

      shoal results export s3://reports/monday --label team=vision --no-answers
    """
    matching = _filter(model, version, tenant, outcome, label, since, until)
    last = None
    try:
        with connect(gateway) as client, _counting() as report:
            for last in client.results.export(to, matching, answers=answers, part_rows=part_rows, cursor=cursor):
                report(last)
    except (KeyboardInterrupt, ShoalError):
        if last is not None and not last.complete:
            print(f"{last.parts} parts are written: resume with --cursor {last.cursor}", file=sys.stderr)
        raise
    # An export yields a complete message at its end, or raises.
    assert last is not None
    if json:
        show_json(last)
    else:
        typer.echo(f"{last.rows} results in {last.parts} parts, {size(last.bytes)}, in {to}")
    if last.answers_lost:
        print(
            f"{last.answers_lost} of them have no answer, because it is damaged in the store: the column answer_lost "
            "has the reason",
            file=sys.stderr,
        )
        raise typer.Exit(1)


@contextmanager
def _counting() -> Iterator[Callable[[Exported], None]]:
    """Show a running count on standard error, if that is a terminal."""
    from rich.status import Status

    out = console(stderr=True)
    if not out.is_terminal:
        yield lambda _: None
        return
    with Status("searching", console=out) as status:
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


def _missing_answer(result: JobResult) -> str:
    """Return the reason why a succeeded job's answer is missing; empty for others."""
    if result.answer_removed_at:
        return "removed by retention"
    return "damaged in the store" if result.answer_lost else ""


def _model(result: JobResult) -> str:
    return f"{result.model_name} version {result.model_version}" if result.model_version else result.model_name


def _labels(result: JobResult) -> list[str]:
    return [f"{key}={value}" for key, value in sorted(result.labels.items())]
