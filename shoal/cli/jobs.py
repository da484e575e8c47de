"""`shoal jobs`: durable jobs."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from shoal.cli import batches, dead_letters, job_operations, job_retention, running, schedules
from shoal.cli.job_table import show_job
from shoal.cli.output import AsJson, Gateway, connect, pairs, show, show_json
from shoal.cli.watching import WatchOptions, follow_all, follow_one
from shoal.errors import InvalidArgument

app = typer.Typer(
    rich_markup_mode="rich",
    add_completion=False,
    no_args_is_help=True,
    help="Submit jobs, follow them, get their results.",
)

app.add_typer(dead_letters.app, name="dead")
app.add_typer(job_operations.app, name="bulk")
app.add_typer(batches.app, name="batch")
app.command()(running.run)
app.add_typer(schedules.app, name="schedule")
app.add_typer(job_retention.app, name="retention")

JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id, as `submit` printed it.")]
Tenant = Annotated[
    str, typer.Option(metavar="NAME", help="Tenant of the jobs. Default: the default tenant.", show_default=False)
]
OnlyTenant = Annotated[
    str, typer.Option(metavar="NAME", help="Only jobs of this tenant. Default: all.", show_default=False)
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the outputs to an .npz, .npy or .json.")
]

TIMES = ["%Y-%m-%dT%H:%M:%S%z", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M", "%Y-%m-%d"]


@app.command()
def submit(
    model: Annotated[str | None, typer.Argument(help="The model to run.", show_default=False)] = None,
    written: Annotated[
        str | None,
        typer.Argument(
            metavar="INPUT", help="As `shoal infer` takes it: JSON, a file's name, or -.", show_default=False
        ),
    ] = None,
    version: Annotated[str, typer.Option(metavar="V", help="Version to run.", show_default=False)] = "",
    key: Annotated[
        str,
        typer.Option(
            metavar="KEY",
            help="Idempotency key: a second submit with the same key returns the first job.",
            show_default=False,
        ),
    ] = "",
    tenant: Tenant = "",
    deadline: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Time after which a job without an answer expires.")
    ] = None,
    attempts: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=100, help="Total attempts. Default: the node's.")
    ] = None,
    priority: Annotated[
        int,
        typer.Option(
            metavar="P", min=-9, max=9, help="Order among the tenant's jobs; one level is worth a minute of waiting."
        ),
    ] = 0,
    label: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A label of the job. May be repeated.")
    ] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option("--parameter", "-p", metavar="KEY=VALUE", help="A parameter of the request. May be repeated."),
    ] = None,
    retry_on: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CODE",
            help="Retry only after this status, such as unavailable. May be repeated. "
            "Default: every status except those that put the request at fault.",
        ),
    ] = None,
    delay: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0, help="Time between acceptance and the earliest first attempt."),
    ] = None,
    not_before: Annotated[
        datetime | None,
        typer.Option(
            metavar="TIME", formats=TIMES, help="Earliest time of the first attempt: 2026-12-24T18:00, local time."
        ),
    ] = None,
    after: Annotated[
        list[str] | None, typer.Option(metavar="JOB", help="Run after this job has succeeded. May be repeated.")
    ] = None,
    after_key: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Run after the job with this idempotency key has succeeded. May be repeated."),
    ] = None,
    fail_with: Annotated[
        bool,
        typer.Option("--fail-with", help="Fail when a job of --after does not succeed; default: be cancelled."),
    ] = False,
    keep_request: Annotated[
        bool,
        typer.Option("--keep-request", help="Keep the inputs after the end, for `shoal models quantize`."),
    ] = False,
    batch: Annotated[
        list[str] | None,
        typer.Option(
            "--batch",
            metavar="URL",
            help="Submit a batch: all rows of this file (JSONL, Parquet, NPZ) or prefix. May be repeated.",
            rich_help_panel="Batches",
        ),
    ] = None,
    out: Annotated[
        str,
        typer.Option(
            metavar="URL",
            help="Folder or prefix for the batch's results, as Parquet; no other batch may use it.",
            show_default=False,
            rich_help_panel="Batches",
        ),
    ] = "",
    model_option: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="NAME",
            help="The model, in place of MODEL.",
            show_default=False,
            rich_help_panel="Batches",
        ),
    ] = "",
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="INPUT=COLUMN",
            help="The column for an input of the model. Default: the column of the same name. May be repeated.",
            rich_help_panel="Batches",
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN",
            help="Copy this column into the results. May be repeated.",
            rich_help_panel="Batches",
        ),
    ] = None,
    text_output: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OUTPUT",
            help="This BYTES output is UTF-8 text. May be repeated.",
            rich_help_panel="Batches",
        ),
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="jsonl, parquet, npz, or objects: each object of a prefix is a row. Default: from the file names.",
            show_default=False,
            rich_help_panel="Batches",
        ),
    ] = "",
    chunk_rows: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Rows that are run and written together. 0: the node's choice.",
            rich_help_panel="Batches",
        ),
    ] = 0,
    wait: Annotated[
        bool, typer.Option(help="Show a batch's progress until it has ended.", rich_help_panel="Batches")
    ] = True,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Submit one job and print its id. The job is then durable, and runs even after crashes.

    [bold]Examples[/bold]

      shoal jobs submit digits '{"x": [[1, 2, 3, 4]]}'

      shoal jobs submit digits rows.npy --key monday-7 --deadline 3600

      shoal jobs submit --batch s3://bucket/in.parquet --out s3://bucket/out/ --model digits

      shoal jobs submit digits rows.npy --delay 600 --attempts 10 --retry-on unavailable --retry-on internal
    """
    from shoal.cli import tensors
    from shoal.cli.traced import traced
    from shoal.client import JobRetry

    labels = pairs(label or [], "--label")
    if batch:
        batches.checked(batch, out, model_option or model or "", written)
        options = batches.BatchOptions(
            inputs=batch,
            output=out,
            model=model_option or model or "",
            version=version,
            kind=kind,
            columns=pairs(column or [], "--column"),
            keep=keep or [],
            texts=text_output or [],
            key=key,
            labels=labels,
            attempts=attempts,
            chunk_rows=chunk_rows,
        )
        with connect(gateway, tenant=tenant) as client:
            batches.submit(client, options, wait=wait, as_json=json)
        return
    model = model or model_option
    if not model or written is None:
        raise InvalidArgument("a job needs MODEL and INPUT; a batch needs --batch, --out and --model")
    request = tensors.read(written)
    parameters = {**request.parameters, **tensors.of_options(parameter or [], "--parameter")}
    with connect(gateway, tenant=tenant) as client, traced(gateway):
        ready = tensors.fit(request, client.models.metadata(model, version))
        job = client.jobs.submit(
            model,
            ready.inputs,
            outputs=request.outputs,
            version=version,
            parameters=parameters,
            datatypes=ready.datatypes,
            idempotency_key=key,
            deadline=deadline,
            retry=JobRetry(max_attempts=attempts or 5, codes=retry_on or ()) if attempts or retry_on else None,
            labels=labels,
            priority=priority,
            keep_request=keep_request,
            delay=delay,
            not_before=not_before,
            depends_on=after or (),
            depends_on_keys=after_key or (),
            fails_with_dependencies=fail_with,
        )
    if json:
        show_json(job)
    else:
        typer.echo(job.id)


@app.command()
def get(job_id: JobId, gateway: Gateway = None, json: AsJson = False) -> None:
    """Show a job and its transitions.

    [bold]Example[/bold]

      shoal jobs get 01JD8Y3V5M2Q4R6T8W0X2Z4B6D
    """
    with connect(gateway) as client:
        job = client.jobs.get(job_id)
    if json:
        show_json(job)
    else:
        show_job(job)


@app.command("list")
def list_jobs(
    state: Annotated[
        str | None,
        typer.Option(metavar="STATE", help="queued, running, succeeded, failed, dead, cancelled or expired."),
    ] = None,
    model: Annotated[str, typer.Option(metavar="NAME", help="Only jobs of this model.", show_default=False)] = "",
    tenant: OnlyTenant = "",
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="Largest number of rows to list.")] = 20,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """List jobs, newest first.

    [bold]Examples[/bold]

      shoal jobs list --state dead

      shoal jobs list --model digits --limit 100 --json
    """
    with connect(gateway) as client:
        jobs = client.jobs.list(state=state, model=model, tenant=tenant, limit=limit)
    if json:
        show_json(jobs)
        return
    rows = [
        (job.id, job.state, job.model_name, job.tenant, job.attempts, job.submitted_at, job.last_message)
        for job in jobs
    ]
    show(("job", "state", "model", "tenant", "attempts", "submitted", "last error"), rows, empty="no such jobs")


@app.command()
def watch(
    job_id: Annotated[
        str | None, typer.Argument(metavar="[JOB]", help="Id of one job. Default: all jobs that match the options.")
    ] = None,
    state: Annotated[
        list[str] | None, typer.Option(metavar="STATE", help="Only transitions into this state. May be repeated.")
    ] = None,
    model: Annotated[str, typer.Option(metavar="NAME", help="Only jobs of this model.", show_default=False)] = "",
    tenant: OnlyTenant = "",
    label: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Only jobs with this label. May be repeated.")
    ] = None,
    existing: Annotated[bool, typer.Option("--existing", help="Show the existing jobs first.")] = False,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep the position in this file, and resume there.", dir_okay=False),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Time limit. Default: an hour for one job.")
    ] = None,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Follow a job until it has ended: a line for each transition (with --json, the job as a line of JSON).

    Exits 0 when the job succeeded, else 1. Without a JOB, follow all that match, until interrupted.

    [bold]Examples[/bold]

      shoal jobs watch 01JD8Y3V5M2Q4R6T8W0X2Z4B6D

      shoal jobs watch --model digits --state dead --state failed --resume watched
    """
    options = WatchOptions(state or [], model, tenant, pairs(label or [], "--label"), existing, resume)
    with connect(gateway) as client:
        if job_id is None:
            follow_all(client, options, timeout=timeout, as_json=json)
        else:
            if options.is_set:
                raise InvalidArgument("use either a job's id or the options that select jobs, not both")
            follow_one(client, job_id, timeout=3600.0 if timeout is None else timeout, as_json=json)


@app.command()
def cancel(
    job_id: JobId,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Recorded with the job.", show_default=False)] = "",
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Prevent a job's run, or the recording of its answer. A job that has ended is not changed.

    [bold]Example[/bold]

      shoal jobs cancel 01JD8Y3V5M2Q4R6T8W0X2Z4B6D --reason "wrong file"
    """
    with connect(gateway) as client:
        job = client.jobs.cancel(job_id, reason)
    if json:
        show_json(job)
    else:
        typer.echo(f"{job.id} is {job.state}")


@app.command()
def result(
    job_id: JobId,
    wait: Annotated[bool, typer.Option(help="Wait until the job has ended.")] = True,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Time limit of the wait.")] = 300.0,
    output: Output = None,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Print a job's answer, from the store. For a failed job, print the error of its last attempt.

    [bold]Examples[/bold]

      shoal jobs result 01JD8Y3V5M2Q4R6T8W0X2Z4B6D

      shoal jobs result 01JD8Y3V5M2Q4R6T8W0X2Z4B6D --output answer.npz
    """
    from shoal.cli import tensors

    with connect(gateway) as client:
        answer = client.jobs.result(job_id, wait=wait, timeout=timeout)
    tensors.show_result(answer, as_json=json, output=output)
