"""`shoal store`: what is kept, how long, and how much room it takes."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal.cli import amounts
from shoal.cli.output import AsJson, Gateway, connect, show, show_json, size

app = typer.Typer(
    rich_markup_mode="rich",
    add_completion=False,
    no_args_is_help=True,
    help="How long results are kept, and how much room they take.",
)
retention = typer.Typer(
    rich_markup_mode="rich",
    no_args_is_help=True,
    help="How long results, their answers, and what is left of them are kept.",
)
quota = typer.Typer(rich_markup_mode="rich", no_args_is_help=True, help="How much room a tenant's results may take.")
app.add_typer(retention, name="retention")
app.add_typer(quota, name="quota")

What = Annotated[str, typer.Argument(metavar="WHAT", help="results, answers or tombstones.")]
Tenant = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Only of this tenant; '' is the default one. Without: of all that have no rule of their own.",
    ),
]


@retention.command("list")
def list_rules(gateway: Gateway = None, json: AsJson = False) -> None:
    """List the rules. What has none is kept for ever.

    [bold]Example[/bold]

      shoal store retention list
    """
    with connect(gateway) as client:
        rules = client.store.retention()
    if json:
        show_json(
            [{**vars(rule), "keep_s": None if rule.keep is None else int(rule.keep.total_seconds())} for rule in rules]
        )
        return
    rows = [
        (rule.kept, _whose(rule.tenant), "for ever" if rule.keep is None else amounts.span(rule.keep), rule.updated_at)
        for rule in rules
    ]
    show(("what", "tenant", "kept for", "since"), rows, empty="no rules: everything is kept")


@retention.command("set")
def set_rule(
    what: What,
    keep: Annotated[str, typer.Argument(metavar="AGE", help="90m, 24h, 30d, 8w; or forever.")],
    tenant: Tenant = None,
    gateway: Gateway = None,
) -> None:
    """Say how long something is kept. The leader removes what is older, within a minute or so.

    [bold]Examples[/bold]

      shoal store retention set answers 30d

      shoal store retention set results forever --tenant acme
    """
    until = None if keep == "forever" else amounts.age(keep, "AGE")
    with connect(gateway) as client:
        client.store.set_retention(what, until, tenant=tenant)
    typer.echo(f"{what} of {_whose(tenant)}: kept {'for ever' if until is None else f'for {keep}'}")


@retention.command("remove")
def remove_rule(what: What, tenant: Tenant = None, gateway: Gateway = None) -> None:
    """Remove a rule: the one for all tenants counts again, or none.

    [bold]Example[/bold]

      shoal store retention remove results --tenant acme
    """
    with connect(gateway) as client:
        client.store.remove_retention(what, tenant=tenant)
    typer.echo(f"{what} of {_whose(tenant)}: no rule")


@app.command()
def usage(
    recount: Annotated[
        bool, typer.Option("--recount", help="Count all results one by one first: about a minute for some million.")
    ] = False,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Show what each tenant's results take, and what they may take.

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
            _name(one.tenant),
            one.results,
            size(one.bytes),
            "none" if one.quota_bytes is None else size(one.quota_bytes),
            "" if one.quota_bytes is None else f"{one.bytes / max(one.quota_bytes, 1):.0%}",
            one.recounted_at,
        )
        for one in found.tenants
    ]
    show(("tenant", "results", "size", "quota", "used", "counted one by one"), rows, empty="no results")
    typer.echo(f"{found.artifacts} artifacts (models, payloads): {size(found.artifact_bytes)}")


@quota.command("set")
def set_quota(
    most: Annotated[str, typer.Argument(metavar="BYTES", help="1048576, 500MiB, 20GB.")],
    tenant: Tenant = None,
    gateway: Gateway = None,
) -> None:
    """Say how much room a tenant's results may take. Who has used it up cannot submit jobs until there is room again.

    [bold]Examples[/bold]

      shoal store quota set 20GiB

      shoal store quota set 500MiB --tenant acme
    """
    most_bytes = amounts.size(most, "BYTES")
    with connect(gateway) as client:
        client.store.set_quota(most_bytes, tenant=tenant)
    typer.echo(f"results of {_whose(tenant)}: {size(most_bytes)} at most")


@quota.command("remove")
def remove_quota(tenant: Tenant = None, gateway: Gateway = None) -> None:
    """Remove a quota: the one for all tenants counts again, or none.

    [bold]Example[/bold]

      shoal store quota remove --tenant acme
    """
    with connect(gateway) as client:
        client.store.remove_quota(tenant=tenant)
    typer.echo(f"results of {_whose(tenant)}: no quota")


def _name(tenant: str) -> str:
    return tenant or "(default)"


def _whose(tenant: str | None) -> str:
    return "all tenants without one of their own" if tenant is None else f"tenant {_name(tenant)}"
