"""`shoal jobs dead`: dead letters, that is jobs that ended without an answer."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli.job_table import show_job
from shoal.cli.output import AsJson, Gateway, connect, plain, show, show_json
from shoal.errors import FailedPrecondition, InvalidArgument, ShoalError

if TYPE_CHECKING:
    from shoal.client import Handled

app = typer.Typer(
    rich_markup_mode="rich",
    add_completion=False,
    no_args_is_help=True,
    help="Dead letters: jobs out of attempts, or (--failed) jobs whose request was at fault.",
)

JobIds = Annotated[list[str] | None, typer.Argument(metavar="[JOB]...", help="Ids of the jobs.", show_default=False)]
All = Annotated[bool, typer.Option("--all", help="All that match the other options, in place of ids.")]
Failed = Annotated[bool, typer.Option("--failed", help="Jobs that failed, in place of dead ones.")]
Model = Annotated[str, typer.Option(metavar="NAME", help="Only jobs of this model.", show_default=False)]
Tenant = Annotated[str, typer.Option(metavar="NAME", help="Only jobs of this tenant.", show_default=False)]
Status = Annotated[
    str | None, typer.Option("--code", metavar="CODE", help="Only jobs that ended with this status, such as internal.")
]
OlderThan = Annotated[
    float | None, typer.Option("--older-than", metavar="HOURS", min=0, help="Only jobs that ended this long ago.")
]


@app.command("list")
def list_dead(
    failed: Failed = False,
    model: Model = "",
    tenant: Tenant = "",
    code: Status = None,
    older_than: OlderThan = None,
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="Largest number of rows to list.")] = 20,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """List dead letters, newest first.

    [bold]Example[/bold]

      shoal jobs dead list --model digits --code unavailable
    """
    with connect(gateway) as client:
        jobs = client.jobs.dead.list(limit=limit, **_filters(failed, model, tenant, code, older_than))
    if json:
        show_json(jobs)
        return
    rows = [
        (job.id, job.model_name, job.tenant, job.attempts, job.updated_at, _name(job.last_code), job.last_message)
        for job in jobs
    ]
    show(("job", "model", "tenant", "attempts", "ended", "code", "last error"), rows, empty="no dead letters")


@app.command("show")
def show_dead(
    job_id: Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")],
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Show a dead letter: its inputs, every transition, and the reason of its end.

    [bold]Example[/bold]

      shoal jobs dead show 01JD8Y3V5M2Q4R6T8W0X2Z4B6D
    """
    with connect(gateway) as client:
        job = client.jobs.get(job_id)
        if job.state not in ("dead", "failed"):
            raise FailedPrecondition(f"job {job_id} is {job.state}, not a dead letter: see `shoal jobs get {job_id}`")
        arrays = client.jobs.inputs(job_id)
    inputs = [{"name": name, "dtype": str(array.dtype), "shape": list(array.shape)} for name, array in arrays.items()]
    if json:
        show_json({**plain(job), "inputs": inputs})
        return
    show_job(job)
    show(("input", "dtype", "shape"), [(one["name"], one["dtype"], one["shape"]) for one in inputs])


@app.command()
def requeue(
    job_ids: JobIds = None,
    every: All = False,
    failed: Failed = False,
    model: Model = "",
    tenant: Tenant = "",
    code: Status = None,
    older_than: OlderThan = None,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Recorded with each job.", show_default=False)] = "",
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Requeue dead letters: each gets all its attempts and its whole deadline again.

    [bold]Examples[/bold]

      shoal jobs dead requeue 01JD8Y3V5M2Q4R6T8W0X2Z4B6D --reason "the model is repaired"

      shoal jobs dead requeue --all --model digits --code unavailable
    """
    with connect(gateway) as client:
        filters = _filters(failed, model, tenant, code, older_than)
        done = client.jobs.dead.requeue(_ids(job_ids, every), all=every, reason=reason, **filters)
    _say(done, "requeued", json)


@app.command()
def purge(
    job_ids: JobIds = None,
    every: All = False,
    failed: Failed = False,
    model: Model = "",
    tenant: Tenant = "",
    code: Status = None,
    older_than: OlderThan = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Remove dead letters and their inputs for good. Their results in the store stay.

    [bold]Example[/bold]

      shoal jobs dead purge --all --older-than 720
    """
    ids = _ids(job_ids, every)
    if not yes:
        what = f"{len(ids)} dead letters" if ids else "all dead letters that match"
        typer.confirm(f"Remove {what}, with their inputs?", abort=True, err=True)
    with connect(gateway) as client:
        done = client.jobs.dead.purge(ids, all=every, **_filters(failed, model, tenant, code, older_than))
    _say(done, "removed", json)


def _filters(failed: bool, model: str, tenant: str, code: str | None, older_than: float | None) -> dict[str, Any]:
    try:
        before = None if older_than is None else datetime.now().astimezone() - timedelta(hours=older_than)
    except OverflowError:
        raise InvalidArgument(f"--older-than {older_than}: that is before the year 1") from None
    return {
        "state": "failed" if failed else "dead",
        "model": model,
        "tenant": tenant,
        "code": code,
        "before": before,
    }


def _ids(job_ids: list[str] | None, every: bool) -> list[str]:
    if bool(job_ids) == every:
        raise InvalidArgument("name the jobs or use --all, not both")
    return job_ids or []


def _say(done: Handled, what: str, as_json: bool) -> None:
    refused: dict[str, ShoalError] = done.refused
    if as_json:
        show_json({what: done.ids, "refused": {job_id: error.message for job_id, error in refused.items()}})
    else:
        typer.echo(f"{len(done.ids)} {what}")
        for error in refused.values():
            typer.echo(f"not {what}: {error.message}", err=True)
    if refused:
        raise typer.Exit(1)


def _name(code: int) -> str:
    from shoal.errors import Code

    return Code(code).name.lower() if code in set(Code) else str(code)
