"""`shoal jobs retention`: how long jobs stay that have ended, and batches."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Annotated

import typer

from shoal.cli.output import AsJson, Gateway, connect, show, show_json
from shoal.errors import InvalidArgument

app = typer.Typer(
    rich_markup_mode="rich",
    add_completion=False,
    no_args_is_help=True,
    help="How long jobs stay that have ended, by tenant and state, and batches. (Of results: `shoal store retention`.)",
)

_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_SPAN = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")


@app.command("list")
def list_rules(gateway: Gateway = None, json: AsJson = False) -> None:
    """List what holds for every tenant (*), and for those that have rules of their own.

    [bold]Example[/bold]

      shoal jobs retention list
    """
    with connect(gateway) as client:
        rules = client.jobs.retention.list()
    if json:
        show_json([{**vars(rule), "keep": None if rule.keep is None else rule.keep.total_seconds()} for rule in rules])
        return
    rows = [
        (rule.tenant, rule.state, spelled(rule.keep), "the node's setting" if rule.inherited else "set")
        for rule in rules
    ]
    show(("tenant", "state", "stay for", "by"), rows)


@app.command("set")
def set_rule(
    state: Annotated[str, typer.Argument(help="succeeded, failed, dead, cancelled or expired; or batches.")],
    keep: Annotated[str, typer.Argument(help="So long after their end: 90m, 12h, 7d; `forever`; or `inherit`.")],
    tenant: Annotated[str, typer.Option(metavar="NAME", help="Of this tenant; *: of all that say nothing else.")] = "*",
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Say how long jobs stay that ended so, or batches. Their idempotency keys are known for as long.

    [bold]Examples[/bold]

      shoal jobs retention set succeeded 2d

      shoal jobs retention set dead forever --tenant acme

      shoal jobs retention set batches 90d --tenant acme
    """
    span = None if keep in ("forever", "inherit") else read(keep)
    with connect(gateway) as client:
        if keep == "inherit":
            rule = client.jobs.retention.inherit(state, tenant=tenant)
        else:
            rule = client.jobs.retention.set(state, span, tenant=tenant)
    if json:
        show_json({**vars(rule), "keep": None if rule.keep is None else rule.keep.total_seconds()})
    else:
        whose = "of every tenant that says nothing else" if rule.tenant == "*" else f"of tenant {rule.tenant!r}"
        what = rule.state if rule.state == "batches" else f"{rule.state} jobs"
        typer.echo(f"{what} {whose} stay for {spelled(rule.keep)}")


def read(written: str) -> timedelta:
    """A span such as `12h`.

    Raises:
        InvalidArgument: it is none.
    """
    found = _SPAN.fullmatch(written)
    if found is None:
        raise InvalidArgument(f"{written!r}: expected a number and one of s, m, h, d, w; or forever, or inherit")
    try:
        return timedelta(seconds=float(found[1]) * _UNITS[found[2]])
    except OverflowError:
        raise InvalidArgument(f"{written!r}: longer than time can be; say forever") from None


def spelled(keep: timedelta | None) -> str:
    """A span as `read` takes it, in its largest whole unit."""
    if keep is None:
        return "ever"
    seconds = keep.total_seconds()
    for unit, length in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= length and seconds % length == 0:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds:g}s"
