"""`shoal store retention`: how long results are kept."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal.cli import amounts
from shoal.cli.output import AsJson, Gateway, connect, show, show_json

app = typer.Typer(
    rich_markup_mode="rich",
    no_args_is_help=True,
    help="How long results, their answers, and what is left of them are kept.",
)

What = Annotated[str, typer.Argument(metavar="WHAT", help="results, answers or tombstones.")]
Tenant = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Only of this tenant; '' is the default one. Without: of all that have no rule of their own.",
    ),
]


@app.command("list")
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
    """Say how long something is kept. The leader removes what is older, within a minute or so.

    [bold]Examples[/bold]

      shoal store retention set answers 30d

      shoal store retention set results forever --tenant acme
    """
    until = None if keep == "forever" else amounts.age(keep, "AGE")
    with connect(gateway) as client:
        client.store.set_retention(what, until, tenant=tenant)
    typer.echo(f"{what} of {whose(tenant)}: kept {'for ever' if until is None else f'for {keep}'}")


@app.command("remove")
def remove_rule(what: What, tenant: Tenant = None, gateway: Gateway = None) -> None:
    """Remove a rule: the one for all tenants counts again, or none.

    [bold]Example[/bold]

      shoal store retention remove results --tenant acme
    """
    with connect(gateway) as client:
        client.store.remove_retention(what, tenant=tenant)
    typer.echo(f"{what} of {whose(tenant)}: no rule")


def named(tenant: str) -> str:
    """A tenant in a table."""
    return tenant or "(default)"


def whose(tenant: str | None) -> str:
    """Whom a rule is for, in words."""
    return "all tenants without one of their own" if tenant is None else f"tenant {named(tenant)}"
