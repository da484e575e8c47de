"""`shoal jobs schedule`: schedules of recurring jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli.output import AsJson, Gateway, connect, pairs, show, show_json

if TYPE_CHECKING:
    from shoal.client import Schedule

app = typer.Typer(
    rich_markup_mode="rich",
    add_completion=False,
    no_args_is_help=True,
    help="Recurring jobs, by cron expressions in a time zone.",
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The schedule's name.")]
Tenant = Annotated[
    str, typer.Option(metavar="NAME", help="Tenant of the schedule. Default: the default tenant.", show_default=False)
]


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="Name of the schedule: letters, digits, '.', '_' and '-'.")],
    cron: Annotated[str, typer.Argument(help="Minute, hour, day of month, month, day of week: '0 3 * * MON-FRI'.")],
    model: Annotated[str, typer.Argument(help="The model to run.")],
    written: Annotated[
        str, typer.Argument(metavar="INPUT", help="As `shoal infer` takes it: JSON, a file's name, or -.")
    ],
    zone: Annotated[str, typer.Option(metavar="ZONE", help="Time zone, such as Europe/Paris.")] = "UTC",
    misfire: Annotated[
        str, typer.Option(metavar="POLICY", help="For times at which the node was down: skip, latest or all.")
    ] = "skip",
    overlap: Annotated[
        str, typer.Option(metavar="POLICY", help="When the previous job has not ended: allow, skip or cancel.")
    ] = "allow",
    version: Annotated[str, typer.Option(metavar="V", help="Version to run.", show_default=False)] = "",
    deadline: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Time after which a job without an answer expires.")
    ] = None,
    attempts: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=100, help="Total attempts. Default: the node's.")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A label of each job. May be repeated.")
    ] = None,
    tenant: Tenant = "",
    replace: Annotated[bool, typer.Option("--replace", help="Change an existing schedule of that name.")] = False,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Create a schedule and print its next times. Each time creates one job, even after crashes.

    [bold]Examples[/bold]

      shoal jobs schedule add nightly '0 3 * * *' digits rows.npy --zone Europe/Paris

      shoal jobs schedule add often '*/5 * * * *' digits '{"x": [[1, 2, 3, 4]]}' --overlap skip --misfire latest
    """
    from shoal.cli import tensors
    from shoal.client import JobRequest, JobRetry

    request = tensors.read(written)
    labels = pairs(label or [], "--label")
    with connect(gateway, tenant=tenant) as client:
        ready = tensors.fit(request, client.models.metadata(model, version))
        job = JobRequest(
            model,
            ready.inputs,
            outputs=request.outputs,
            version=version,
            parameters=request.parameters,
            datatypes=ready.datatypes,
            deadline=deadline,
            retry=None if attempts is None else JobRetry(max_attempts=attempts),
            labels=labels,
        )
        schedule = client.jobs.schedules.put(
            name,
            cron,
            job,
            time_zone=zone,
            misfire=misfire,  # type: ignore[arg-type]  # The client checks the value.
            overlap=overlap,  # type: ignore[arg-type]
            replace=replace,
        )
    _show(schedule, json)


@app.command("list")
def list_schedules(
    tenant: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only this tenant's. Default: all.", show_default=False)
    ] = None,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """List schedules, by tenant and name.

    [bold]Example[/bold]

      shoal jobs schedule list
    """
    with connect(gateway) as client:
        schedules = client.jobs.schedules.list(tenant=tenant)
    if json:
        show_json(schedules)
        return
    rows = [
        (
            one.name,
            one.tenant,
            one.cron,
            one.time_zone,
            "paused" if one.paused else (one.upcoming[0] if one.upcoming else "never"),
            one.last_at,
            one.fired,
            one.skipped,
        )
        for one in schedules
    ]
    show(("name", "tenant", "cron", "zone", "next", "last", "jobs", "skipped"), rows, empty="no schedules")


@app.command("show")
def show_schedule(name: Name, tenant: Tenant = "", gateway: Gateway = None, json: AsJson = False) -> None:
    """Show a schedule: its policies, its next times, and its counts.

    [bold]Example[/bold]

      shoal jobs schedule show nightly
    """
    with connect(gateway, tenant=tenant) as client:
        _show(client.jobs.schedules.get(name), json)


@app.command()
def pause(name: Name, tenant: Tenant = "", gateway: Gateway = None, json: AsJson = False) -> None:
    """Pause a schedule. Times within the pause are skipped.

    [bold]Example[/bold]

      shoal jobs schedule pause nightly
    """
    with connect(gateway, tenant=tenant) as client:
        _show(client.jobs.schedules.pause(name), json)


@app.command()
def resume(name: Name, tenant: Tenant = "", gateway: Gateway = None, json: AsJson = False) -> None:
    """Resume a paused schedule, from now on.

    [bold]Example[/bold]

      shoal jobs schedule resume nightly
    """
    with connect(gateway, tenant=tenant) as client:
        _show(client.jobs.schedules.resume(name), json)


@app.command()
def remove(name: Name, tenant: Tenant = "", gateway: Gateway = None, json: AsJson = False) -> None:
    """Remove a schedule. Its jobs stay.

    [bold]Example[/bold]

      shoal jobs schedule remove nightly
    """
    with connect(gateway, tenant=tenant) as client:
        schedule = client.jobs.schedules.remove(name)
    if json:
        show_json(schedule)
    else:
        typer.echo(f"{schedule.name} is removed; it created {schedule.fired} jobs")


def _show(schedule: Schedule, as_json: bool) -> None:
    if as_json:
        show_json(schedule)
        return
    about = [
        ("schedule", schedule.name),
        ("tenant", schedule.tenant),
        ("model", schedule.model_name),
        ("cron", f"{schedule.cron}  ({schedule.time_zone})"),
        ("next", "paused" if schedule.paused else list(schedule.upcoming) or "never"),
        ("missed times", schedule.misfire),
        ("overlaps", schedule.overlap),
        ("jobs", schedule.fired),
        ("last", schedule.last_at),
        ("last job", schedule.last_job_id),
        ("skipped", schedule.skipped or None),
        ("last skip", schedule.last_skip),
    ]
    show(("", ""), [(name, value) for name, value in about if value not in (None, "")])
