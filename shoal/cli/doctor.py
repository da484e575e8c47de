"""`shoal doctor`: what is wrong with a node, how bad it is, and the command that mends it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli.here import or_stopped
from shoal.cli.output import AsJson, Gateway, connect, console, one_line, show_json

if TYPE_CHECKING:
    from shoal.cli.diagnosis.facts import Facts, Finding

app = typer.Typer(rich_markup_mode="rich", add_completion=False)


@app.command()
def doctor(
    gateway: Gateway = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Data folder of a node that does not run.", show_default=False),
    ] = None,
    json: AsJson = False,
) -> None:
    """Look at a node, and say what is wrong, how bad it is, and the command that mends it.

    Exits 0 when nothing is wrong, 1 with warnings, 2 with errors. The last lines say what could not be checked: the
    processes, disk, metrics and logs of a node are only seen on its own machine, by its user.

    [bold]Examples[/bold]

      shoal doctor

      shoal doctor --data-dir /srv/shoal
    """
    from shoal.cli.diagnosis import checks

    facts = _facts(gateway, data_dir)
    findings = checks.diagnose(facts)
    if json:
        found = [_plain(finding) for finding in findings]
        show_json({"findings": found, "unread": facts.unread, "not_checked": checks.skipped(facts)})
    else:
        _show(facts, findings)
    if findings:
        raise typer.Exit(int(findings[0].severity))


def _facts(gateway: str | None, data_dir: Path | None) -> Facts:
    from shoal.cli.diagnosis import gather
    from shoal.discovery import running_nodes
    from shoal.errors import InvalidArgument

    nodes = running_nodes(os.environ)
    if data_dir is not None:
        if not (data_dir / "logs").is_dir():
            raise InvalidArgument(f"--data-dir {data_dir}: not the data folder of a node")
        node = next((node for node in nodes if node.data_dir.resolve() == data_dir.resolve()), None)
        if node is None:
            return gather.of_folder(data_dir.absolute())
        gateway = gateway or node.url
    with or_stopped("doctor"):
        connection = connect(gateway)
    with connection as client:
        node = next((node for node in nodes if node.url == client.address), None)
        return gather.of_node(client, node, gateway or (client.address if len(nodes) > 1 else ""))


def _plain(finding: Finding) -> dict[str, str]:
    return {
        "check": finding.check,
        "severity": finding.severity.name.lower(),
        "what": finding.what,
        "command": finding.command,
    }


def _show(facts: Facts, findings: list[Finding]) -> None:
    from rich.text import Text

    from shoal.cli.diagnosis import checks

    out = console()
    for finding in findings:
        style = "bold red" if finding.severity > 1 else "yellow"
        line = Text(f"{finding.severity.name.lower():<8}", style).append(one_line(finding.what), "")
        out.print(line.append(f"  [{finding.check}]", "dim"), soft_wrap=True)
        out.print(Text(f"        {one_line(finding.command)}", "cyan"), soft_wrap=True)
    where = facts.gateway or (facts.local.data_dir if facts.local else "")
    skipped, every = checks.skipped(facts), len(checks.names())
    counted = f"{every - len(skipped)} of {every} checks" if skipped else f"{every} checks"
    ends = "" if len(findings) == 1 else "s"
    out.print(f"{where}: {counted}, {len(findings) or 'no'} finding{ends}", markup=False, soft_wrap=True)
    for part, reason in facts.unread.items():
        if part == "status":  # A finding has the reason.
            continue
        out.print(f"not read: {part}: {one_line(reason)}", style="dim", markup=False, soft_wrap=True)
    if skipped:
        out.print(f"not checked: {', '.join(skipped)}", style="yellow", markup=False, soft_wrap=True)
    if facts.local is None:
        here = "no node of this user at this address runs here: run `shoal doctor` and `shoal logs` on its own machine"
        out.print(here, style="yellow", markup=False, soft_wrap=True)
    elif facts.status is None and not facts.unread:
        out.print("the node does not run: only its folder and this machine were checked", style="yellow", markup=False)
