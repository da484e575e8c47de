"""`shoal store usage` and `shoal store quota`: space of results and payloads."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal.cli import amounts
from shoal.cli.output import AsJson, Gateway, connect, show, show_json, size
from shoal.cli.retention import Tenant, named, whose

quota = typer.Typer(
    rich_markup_mode="rich", no_args_is_help=True, help="Limits on the space of a tenant's results and payloads."
)


def usage(
    recount: Annotated[
        bool, typer.Option("--recount", help="Count everything first: about a minute for some million results.")
    ] = False,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Show the space of each tenant's results and payloads (large requests of its jobs), and its quota.

    [bold]Example[/bold]

      shoal store usage
    """
    with connect(gateway) as client:
        found = client.store.usage(recount=recount)
    if json:
        show_json(found)
        return
    rows = [
        (
            named(one.tenant),
            one.results,
            one.payloads,
            size(one.bytes),
            size(one.payload_bytes),
            "none" if one.quota_bytes is None else size(one.quota_bytes),
            "" if one.quota_bytes is None else f"{one.bytes / max(one.quota_bytes, 1):.0%}",
            one.recounted_at,
        )
        for one in found.tenants
    ]
    columns = ("tenant", "results", "payloads", "size", "of payloads", "quota", "used", "recounted")
    show(columns, rows, empty="no results and no payloads")
    typer.echo(f"{found.artifacts} artifacts (models, payloads): {size(found.artifact_bytes)}")


@quota.command("set")
def set_quota(
    most: Annotated[str, typer.Argument(metavar="BYTES", help="1048576, 500MiB, 20GB.")],
    tenant: Tenant = None,
    gateway: Gateway = None,
) -> None:
    """Set the quota of a tenant's results and payloads. A tenant over its quota cannot submit jobs.

    [bold]Examples[/bold]

      shoal store quota set 20GiB

      shoal store quota set 500MiB --tenant acme
    """
    most_bytes = amounts.size(most, "BYTES")
    with connect(gateway) as client:
        client.store.set_quota(most_bytes, tenant=tenant)
    typer.echo(f"results and payloads of {whose(tenant)}: at most {size(most_bytes)}")


@quota.command("remove")
def remove_quota(tenant: Tenant = None, gateway: Gateway = None) -> None:
    """Remove a quota; the quota for all tenants, if any, applies again.

    [bold]Example[/bold]

      shoal store quota remove --tenant acme
    """
    with connect(gateway) as client:
        client.store.remove_quota(tenant=tenant)
    typer.echo(f"results and payloads of {whose(tenant)}: no quota")
