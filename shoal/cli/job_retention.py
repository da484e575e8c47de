"""`shoal jobs retention`: retention of ended jobs and batches."""

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
    help="Retention of ended jobs, by tenant and state, and of batches. (Of results: `shoal store retention`.)",
)

_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_SPAN = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")


@app.command("list")
def list_rules(gateway: Gateway = None, json: AsJson = False) -> None:
    """List the rules of all tenants (*), and of tenants with their own.

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
    show(("tenant", "state", "kept for", "set by"), rows)


@app.command("set")
def set_rule(
    state: Annotated[str, typer.Argument(help="succeeded, failed, dead, cancelled or expired; or batches.")],
    keep: Annotated[str, typer.Argument(help="Time from the end to the removal: 90m, 12h, 7d; `forever`; `inherit`.")],
    tenant: Annotated[str, typer.Option(metavar="NAME", help="Only this tenant; *: all without their own rule.")] = "*",
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Set how long ended jobs, or batches, are kept. Their idempotency keys are known for as long.

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
        whose = "of all tenants without their own rule" if rule.tenant == "*" else f"of tenant {rule.tenant!r}"
        what = rule.state if rule.state == "batches" else f"{rule.state} jobs"
        typer.echo(f"{what} {whose} are kept for {spelled(rule.keep)}")


def read(written: str) -> timedelta:
    """Parse a time span such as `12h`.

    Raises:
        InvalidArgument: `written` is not a time span.
    """
    found = _SPAN.fullmatch(written)
    if found is None:
        raise InvalidArgument(f"{written!r}: expected a number and one of s, m, h, d, w; or forever, or inherit")
    try:
        return timedelta(seconds=float(found[1]) * _UNITS[found[2]])
    except OverflowError:
        raise InvalidArgument(f"{written!r}: the span is too long: use forever") from None


def spelled(keep: timedelta | None) -> str:
    """Format a time span in its largest whole unit."""
    if keep is None:
        return "ever"
    seconds = keep.total_seconds()
    for unit, length in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= length and seconds % length == 0:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds:g}s"
