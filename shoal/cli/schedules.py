"""`shoal jobs schedule`: jobs that recur."""

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
    help="Jobs that recur, by cron expressions in a time zone.",
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The schedule's name.")]
Tenant = Annotated[
    str, typer.Option(metavar="NAME", help="Whose schedule. Default: the default tenant.", show_default=False)
]


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="A name of its own: letters, digits, '.', '_' and '-'.")],
    cron: Annotated[str, typer.Argument(help="Minute, hour, day of month, month, day of week: '0 3 * * MON-FRI'.")],
    model: Annotated[str, typer.Argument(help="The model to ask.")],
    written: Annotated[
        str, typer.Argument(metavar="INPUT", help="As `shoal infer` takes it: JSON, a file's name, or -.")
    ],
    zone: Annotated[str, typer.Option(metavar="ZONE", help="Time zone, such as Europe/Paris.")] = "UTC",
    misfire: Annotated[
        str, typer.Option(metavar="POLICY", help="Times at which the node was away: skip, latest or all.")
    ] = "skip",
    overlap: Annotated[
        str, typer.Option(metavar="POLICY", help="When the job before has not ended: allow, skip or cancel.")
    ] = "allow",
    version: Annotated[str, typer.Option(metavar="V", help="Ask this version.", show_default=False)] = "",
    deadline: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Each job expires without an answer by then.")
    ] = None,
    attempts: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=100, help="Attempts in all. Default: the node's.")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A note that stays with each job. May be repeated.")
    ] = None,
    tenant: Tenant = "",
    replace: Annotated[bool, typer.Option("--replace", help="Change the schedule of that name.")] = False,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Have a job run again and again; prints when it does next. Each time is one job, whoever is killed when.

    [bold]Examples[/bold]

      shoal jobs schedule add nightly '0 3 * * *' digits rows.npy --zone Europe/Paris

      shoal jobs schedule add often '*/5 * * * *' digits '{"x": [[1, 2, 3, 4]]}' --overlap skip --misfire latest
    """
    from shoal.cli import tensors
    from shoal.client import JobRequest, JobRetry

    given = tensors.read(written)
    labels = pairs(label or [], "--label")
    with connect(gateway, tenant=tenant) as client:
        ready = tensors.fit(given, client.models.metadata(model, version))
        job = JobRequest(
            model,
            ready.inputs,
            outputs=given.outputs,
            version=version,
            parameters=given.parameters,
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
            misfire=misfire,  # type: ignore[arg-type]  # The client says which there are.
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
    """Show a schedule: its next times, and what it has done.

    [bold]Example[/bold]

      shoal jobs schedule show nightly
    """
    with connect(gateway, tenant=tenant) as client:
        _show(client.jobs.schedules.get(name), json)


@app.command()
def pause(name: Name, tenant: Tenant = "", gateway: Gateway = None, json: AsJson = False) -> None:
    """Pause a schedule. What falls into the pause is skipped.

    [bold]Example[/bold]

      shoal jobs schedule pause nightly
    """
    with connect(gateway, tenant=tenant) as client:
        _show(client.jobs.schedules.pause(name), json)


@app.command()
def resume(name: Name, tenant: Tenant = "", gateway: Gateway = None, json: AsJson = False) -> None:
    """Have a paused schedule go on, from now.

    [bold]Example[/bold]

      shoal jobs schedule resume nightly
    """
    with connect(gateway, tenant=tenant) as client:
        _show(client.jobs.schedules.resume(name), json)


@app.command()
def remove(name: Name, tenant: Tenant = "", gateway: Gateway = None, json: AsJson = False) -> None:
    """Remove a schedule. Jobs that it has made stay.

    [bold]Example[/bold]

      shoal jobs schedule remove nightly
    """
    with connect(gateway, tenant=tenant) as client:
        schedule = client.jobs.schedules.remove(name)
    if json:
        show_json(schedule)
    else:
        typer.echo(f"{schedule.name} is removed; it has made {schedule.fired} jobs")


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
