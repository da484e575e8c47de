"""`shoal tenants`: shares and limits of tenants."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli.output import AsJson, Gateway, connect, show, show_json

if TYPE_CHECKING:
    from shoal.client import Tenant

app = typer.Typer(
    rich_markup_mode="rich",
    add_completion=False,
    no_args_is_help=True,
    help="Shares and limits of tenants: weights, quotas, rates.",
)

Name = Annotated[
    str, typer.Argument(metavar="TENANT", help="The tenant. '*' holds the settings of tenants without their own.")
]


@app.command("list")
def list_tenants(
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="Largest number of rows to list.")] = 1_000,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """List the tenants that have settings or waiting jobs.

    [bold]Example[/bold]

      shoal tenants list
    """
    with connect(gateway) as client:
        tenants = client.tenants.list(limit=limit)
    if json:
        show_json(tenants)
        return
    rows = [
        (
            _name(tenant),
            _pending(tenant),
            _number(tenant.in_force.weight),
            _limit(tenant.in_force.max_pending),
            _limit(tenant.in_force.rate),
            _limit(tenant.in_force.burst),
        )
        for tenant in tenants
    ]
    columns = ("tenant", "waiting", "weight", "may wait", "jobs/s", "at once")
    show(columns, rows, empty="no tenant has settings or waiting jobs")


@app.command("set")
def set_tenant(
    name: Name,
    weight: Annotated[
        float | None, typer.Option(metavar="W", help="Share relative to other waiting tenants: 0.01 to 100.")
    ] = None,
    max_pending: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Largest number of waiting jobs; further submits are rejected. 0: no limit.",
            min=0,
            max=(1 << 63) - 1,
        ),
    ] = None,
    rate: Annotated[float | None, typer.Option(metavar="R", help="Submits per second. 0: no limit.")] = None,
    burst: Annotated[
        float | None, typer.Option(metavar="B", help="Submits at once after a pause. 0: one second's worth.")
    ] = None,
    inherit: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD", help="Follow '*' in weight, max_pending, rate or burst. May be repeated."),
    ] = None,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Change a tenant's settings; others stay. Takes effect within about a second, also for waiting jobs.

    [bold]Examples[/bold]

      shoal tenants set acme --weight 4

      shoal tenants set '*' --max-pending 10000 --rate 100

      shoal tenants set acme --inherit weight
    """
    with connect(gateway) as client:
        tenant = client.tenants.set(
            name, weight=weight, max_pending=max_pending, rate=rate, burst=burst, inherit=inherit or []
        )
    _show(tenant, json)


@app.command("show")
def show_tenant(name: Name, gateway: Gateway = None, json: AsJson = False) -> None:
    """Show the effective settings of a tenant, their origin, and its number of waiting jobs.

    [bold]Example[/bold]

      shoal tenants show acme
    """
    with connect(gateway) as client:
        tenant = client.tenants.get(name)
    _show(tenant, json)


def _show(tenant: Tenant, as_json: bool) -> None:
    if as_json:
        show_json(tenant)
        return
    own, now = tenant.settings, tenant.in_force
    rows = [
        ("tenant", _name(tenant), ""),
        ("waiting", _pending(tenant), ""),
        ("weight", _number(now.weight), _whose(own.weight, tenant)),
        ("may wait", _limit(now.max_pending), _whose(own.max_pending, tenant)),
        ("jobs/s", _limit(now.rate), _whose(own.rate, tenant)),
        ("at once", _limit(now.burst), _whose(own.burst, tenant)),
        ("changed", tenant.updated_at or "never", ""),
    ]
    show(("", "in force", "set by"), rows)


def _name(tenant: Tenant) -> str:
    return tenant.name or "(default)"


def _pending(tenant: Tenant) -> str:
    return f"{tenant.pending}+" if tenant.pending_is_more else str(tenant.pending)


def _number(value: float | None) -> str:
    return f"{value or 0:,.10g}"


def _limit(value: float | None) -> str:
    return _number(value) if value else "any"


def _whose(own: float | None, tenant: Tenant) -> str:
    if own is not None:
        return "itself"
    return "default" if tenant.name == "*" else "'*', or default"
