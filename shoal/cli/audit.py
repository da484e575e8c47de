"""`shoal audit`: the node's audit log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli import amounts
from shoal.cli.output import AsJson, Gateway, connect, show, show_json, show_json_line

if TYPE_CHECKING:
    from shoal.client import AuditEntry, AuditProblem

app = typer.Typer(
    rich_markup_mode="rich",
    add_completion=False,
    no_args_is_help=True,
    help="Who did what: administrative acts and refusals, in chains that show every change.",
)

Kind = Annotated[
    list[str] | None,
    typer.Option(metavar="KIND", help="act, outcome, refusal, read or chain. May be repeated.", show_default=False),
]
Tenant = Annotated[str, typer.Option(metavar="NAME", help="Only entries about callers of this tenant.")]
Subject = Annotated[str, typer.Option(metavar="NAME", help="Only entries about this caller.")]
Since = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="Then or later: 2026-11-24, 2026-11-24T08:00, or an age: 90m, 24h, 7d."),
]
Until = Annotated[str | None, typer.Option(metavar="TIME", help="Before then.")]


@app.command("list")
def list_entries(
    kind: Kind = None,
    tenant: Tenant = "",
    subject: Subject = "",
    since: Since = None,
    until: Until = None,
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="Largest number of rows to list.")] = 20,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """List entries, newest first.

    [bold]Examples[/bold]

      shoal audit list --since 24h

      shoal audit list --kind refusal --tenant acme
    """
    with connect(gateway) as client:
        found = list(client.audit.list(newest_first=True, limit=limit, **_filter(kind, tenant, subject, since, until)))
    if json:
        show_json(found)
        return
    columns = ("time", "kind", "who", "from", "what", "about", "status", "count")
    is_filtered = any((kind, tenant, subject, since, until))
    empty = "no such entries" if is_filtered else "no entries (a node writes them with `shoal up --auth`)"
    show(columns, map(_row, found), empty=empty)


@app.command()
def export(
    kind: Kind = None,
    tenant: Tenant = "",
    subject: Subject = "",
    since: Since = None,
    until: Until = None,
    gateway: Gateway = None,
) -> None:
    """Print all entries that match, oldest first, as one JSON object a line.

    [bold]Example[/bold]

      shoal audit export --since 7d > audit.ndjson
    """
    with connect(gateway) as client:
        for entry in client.audit.list(**_filter(kind, tenant, subject, since, until)):
            show_json_line(entry)


@app.command()
def verify(gateway: Gateway = None, json: AsJson = False) -> None:
    """Verify that no entry was changed, removed, exchanged or cut off. Exits 1 when one was.

    [bold]Example[/bold]

      shoal audit verify
    """
    problems: list[AuditProblem] = []
    entries, anchors, complete = 0, 0, False
    with connect(gateway) as client:
        for step in client.audit.verify():
            entries, anchors, complete = step.entries, step.anchors, step.complete
            problems.extend(step.problems)
    if json:
        show_json({"entries": entries, "anchors": anchors, "complete": complete, "problems": problems})
    else:
        if problems:
            show(("where", "problem"), [(problem.where, problem.message) for problem in problems])
        typer.echo(f"{entries} entries and {anchors} anchors verified: {len(problems) or 'no'} problems")
        if not complete:
            typer.echo("not all was verified: start again")
    if problems or not complete:
        raise typer.Exit(1)


def _filter(kind: list[str] | None, tenant: str, subject: str, since: str | None, until: str | None) -> dict[str, Any]:
    return {
        "kinds": kind or (),
        "tenant": tenant,
        "subject": subject,
        "since": amounts.time(since, "--since") if since is not None else None,
        "until": amounts.time(until, "--until") if until is not None else None,
    }


def _row(entry: AuditEntry) -> tuple[object, ...]:
    from shoal.errors import Code

    who = "/".join(filter(None, (entry.tenant, entry.subject)))
    has_status = entry.kind in ("outcome", "refusal")
    status = Code(entry.code).name if has_status else entry.reason if entry.kind == "chain" else ""
    # A refused call has no target: its reason names the model, or what was wrong with the key.
    about = entry.target or (entry.reason if entry.kind == "refusal" else "")
    if entry.kind in ("act", "outcome"):
        about = ": ".join(filter(None, (entry.target, entry.reason)))
    elif entry.kind == "sign-in":
        about = ": ".join(filter(None, (entry.key, entry.reason)))
    return entry.at, entry.kind, who, entry.address, entry.rpc.rpartition("/")[2], about, status, entry.count
