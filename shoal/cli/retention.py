"""`shoal store retention`: retention of results."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal.cli import amounts
from shoal.cli.output import AsJson, Gateway, connect, show, show_json

app = typer.Typer(
    rich_markup_mode="rich",
    no_args_is_help=True,
    help="Retention of results, of their answers, and of tombstones (remains of removed results).",
)

What = Annotated[str, typer.Argument(metavar="WHAT", help="results, answers or tombstones.")]
Tenant = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Only this tenant; '' is the default tenant. Default: all tenants without their own.",
    ),
]


@app.command("list")
def list_rules(gateway: Gateway = None, json: AsJson = False) -> None:
    """List the rules. Without a rule, everything is kept for ever.

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
        (rule.kept, whose(rule.tenant), "for ever" if rule.keep is None else amounts.span(rule.keep), rule.updated_at)
        for rule in rules
    ]
    show(("what", "tenant", "kept for", "since"), rows, empty="no rules: everything is kept")


@app.command("set")
def set_rule(
    what: What,
    keep: Annotated[str, typer.Argument(metavar="AGE", help="90m, 24h, 30d, 8w; or forever.")],
    tenant: Tenant = None,
    gateway: Gateway = None,
) -> None:
    """Set how long something is kept. The leader removes what is older, within about a minute.

    [bold]Examples[/bold]

      shoal store retention set answers 30d

      shoal store retention set results forever --tenant acme
    """
    age = None if keep == "forever" else amounts.age(keep, "AGE")
    with connect(gateway) as client:
        client.store.set_retention(what, age, tenant=tenant)
    typer.echo(f"{what} of {whose(tenant)}: kept {'for ever' if age is None else f'for {keep}'}")


@app.command("remove")
def remove_rule(what: What, tenant: Tenant = None, gateway: Gateway = None) -> None:
    """Remove a rule; the rule for all tenants, if any, applies again.

    [bold]Example[/bold]

      shoal store retention remove results --tenant acme
    """
    with connect(gateway) as client:
        client.store.remove_retention(what, tenant=tenant)
    typer.echo(f"{what} of {whose(tenant)}: no rule")


def named(tenant: str) -> str:
    """Return a tenant's name for a table."""
    return tenant or "(default)"


def whose(tenant: str | None) -> str:
    """Return the tenants of a rule, in words."""
    return "all tenants without their own" if tenant is None else f"tenant {named(tenant)}"
