"""`shoal jobs bulk`: cancel, requeue or purge every job that matches a filter."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli import amounts
from shoal.cli.output import AsJson, Gateway, connect, console, pairs, show, show_json

if TYPE_CHECKING:
    from shoal.client import Client, JobOperation, JobSelection

app = typer.Typer(
    rich_markup_mode="rich",
    add_completion=False,
    no_args_is_help=True,
    help="Cancel, requeue or purge all jobs that match a filter, as an operation of the node.",
)

State = Annotated[
    list[str] | None,
    typer.Option(metavar="STATE", help="Only jobs in this state. May be repeated.", show_default=False),
]
Model = Annotated[str, typer.Option(metavar="NAME", help="Only jobs of this model.", show_default=False)]
Tenant = Annotated[str, typer.Option(metavar="NAME", help="Only jobs of this tenant.", show_default=False)]
Label = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="Only jobs with this label. May be repeated.", show_default=False),
]
Status = Annotated[
    str | None,
    typer.Option("--code", metavar="CODE", help="Only jobs whose last attempt ended with this status: internal."),
]
Before = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="Only jobs that have not changed since: 2026-11-24T08:00, or an age: 90m, 7d."),
]
Reason = Annotated[str, typer.Option(metavar="TEXT", help="Recorded with each job.", show_default=False)]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Count the jobs; change nothing.")]
Detach = Annotated[bool, typer.Option("--detach", help="Do not wait for the end.")]
OperationId = Annotated[str, typer.Argument(metavar="OPERATION", help="The operation's id.")]

# Interval at which a waiting command asks for the progress.
_POLL_S = 0.5


@app.command()
def cancel(
    state: State = None,
    model: Model = "",
    tenant: Tenant = "",
    label: Label = None,
    code: Status = None,
    before: Before = None,
    reason: Reason = "",
    yes: Yes = False,
    dry_run: DryRun = False,
    detach: Detach = False,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Cancel the queued and running jobs that match.

    [bold]Examples[/bold]

      shoal jobs bulk cancel --model digits --label run=7 --reason "wrong files"

      shoal jobs bulk cancel --state queued --before 1d --dry-run
    """
    selection = _selection(state, model, tenant, label, code, before)
    _run("cancel", selection, reason, yes=yes, dry_run=dry_run, detach=detach, gateway=gateway, as_json=json)


@app.command()
def requeue(
    state: State = None,
    model: Model = "",
    tenant: Tenant = "",
    label: Label = None,
    code: Status = None,
    before: Before = None,
    reason: Reason = "",
    yes: Yes = False,
    dry_run: DryRun = False,
    detach: Detach = False,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Requeue the dead and failed jobs that match: each gets all its attempts and its whole deadline again.

    [bold]Example[/bold]

      shoal jobs bulk requeue --model digits --code unavailable --reason "the model is repaired"
    """
    selection = _selection(state, model, tenant, label, code, before)
    _run("requeue", selection, reason, yes=yes, dry_run=dry_run, detach=detach, gateway=gateway, as_json=json)


@app.command()
def purge(
    state: State = None,
    model: Model = "",
    tenant: Tenant = "",
    label: Label = None,
    code: Status = None,
    before: Before = None,
    yes: Yes = False,
    dry_run: DryRun = False,
    detach: Detach = False,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Remove the dead and failed jobs that match, with their inputs, for good. Their results in the store stay.

    [bold]Example[/bold]

      shoal jobs bulk purge --state dead --before 30d
    """
    selection = _selection(state, model, tenant, label, code, before)
    _run("purge", selection, "", yes=yes, dry_run=dry_run, detach=detach, gateway=gateway, as_json=json)


@app.command("list")
def list_operations(tenant: Tenant = "", gateway: Gateway = None, json: AsJson = False) -> None:
    """List the operations that run, and those of the last 7 days, newest first.

    [bold]Example[/bold]

      shoal jobs bulk list
    """
    with connect(gateway) as client:
        found = client.jobs.operations.list(tenant=tenant)
    if json:
        show_json(found)
        return
    columns = ("operation", "action", "jobs", "state", "matched", "changed", "skipped", "started")
    rows = [
        (
            one.id,
            one.action,
            _described(one.selection),
            one.state,
            _matched(one),
            one.changed,
            one.skipped,
            one.started_at,
        )
        for one in found
    ]
    show(columns, rows, empty="no operations")


@app.command("show")
def show_operation(operation_id: OperationId, gateway: Gateway = None, json: AsJson = False) -> None:
    """Show an operation and its progress.

    [bold]Example[/bold]

      shoal jobs bulk show 01JD8Y3V5M2Q4R6T8W0X2Z4B6D
    """
    with connect(gateway) as client:
        _say(client.jobs.operations.get(operation_id), as_json=json)


@app.command()
def abort(operation_id: OperationId, gateway: Gateway = None, json: AsJson = False) -> None:
    """Abort an operation. Jobs that it has changed stay changed.

    [bold]Example[/bold]

      shoal jobs bulk abort 01JD8Y3V5M2Q4R6T8W0X2Z4B6D
    """
    with connect(gateway) as client:
        _say(client.jobs.operations.abort(operation_id), as_json=json)


def _selection(
    state: list[str] | None, model: str, tenant: str, label: list[str] | None, code: str | None, before: str | None
) -> JobSelection:
    from shoal.client import JobSelection

    moment = amounts.time(before, "--before").astimezone() if before is not None else None
    return JobSelection(tuple(state or ()), model, tenant, pairs(label or [], "--label"), code, moment)


def _run(
    action: str,
    selection: JobSelection,
    reason: str,
    *,
    yes: bool,
    dry_run: bool,
    detach: bool,
    gateway: str | None,
    as_json: bool,
) -> None:
    with connect(gateway) as client:
        if dry_run or not yes:
            preview = client.jobs.operations.preview(action, selection)
            if dry_run:
                if as_json:
                    show_json(preview)
                else:
                    typer.echo(f"{_matched(preview)} jobs match: {_described(preview.selection)}")
                return
            question = f"{action.capitalize()} {_matched(preview)} jobs ({_described(preview.selection)})?"
            typer.confirm(question, abort=True, err=True)
        operation = client.jobs.operations.start(action, selection, reason=reason)
        if not detach:
            operation = _follow(client, operation, quiet=as_json)
        _say(operation, as_json=as_json)


def _follow(client: Client, operation: JobOperation, *, quiet: bool) -> JobOperation:
    """Wait for the end of an operation. An interrupt ends the wait and not the operation."""
    from rich.status import Status
    from rich.text import Text

    out = console(stderr=True)
    try:
        with Status("", console=out) as status:
            while not operation.state.ended:
                if out.is_terminal and not quiet:
                    progress = f"operation {operation.id}: {operation.changed} of {_matched(operation)} jobs"
                    status.update(Text(progress))
                time.sleep(_POLL_S)
                operation = client.jobs.operations.get(operation.id)
    except KeyboardInterrupt:
        typer.echo(f"the operation goes on: `shoal jobs bulk abort {operation.id}` ends it", err=True)
    return operation


_CHANGED = {"cancel": "cancelled", "requeue": "requeued", "purge": "removed"}


def _say(operation: JobOperation, *, as_json: bool) -> None:
    if as_json:
        show_json(operation)
        return
    skipped = f", {operation.skipped} had changed by themselves" if operation.skipped else ""
    typer.echo(
        f"operation {operation.id} {operation.state}: {operation.changed} of {_matched(operation)} jobs "
        f"{_CHANGED[operation.action]}{skipped}"
    )


def _matched(operation: JobOperation) -> str:
    return f"at least {operation.matched}" if operation.matched_at_least else str(operation.matched)


def _described(selection: JobSelection) -> str:
    """Return the selection in words."""
    parts = [
        " or ".join(selection.states),
        selection.model and f"model {selection.model}",
        selection.tenant and f"tenant {selection.tenant}",
        *(f"label {key}={value}" for key, value in selection.labels.items()),
        "" if selection.code is None else f"code {getattr(selection.code, 'name', selection.code)}".lower(),
        "" if selection.updated_before is None else f"unchanged since {selection.updated_before:%Y-%m-%d %H:%M}",
    ]
    return ", ".join(part for part in parts if part)
