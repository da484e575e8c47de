"""`shoal trace`: where the time of one request or job went."""

from __future__ import annotations

import json as json_format
import re
from typing import Annotated, Any

import typer

from shoal.cli import admin_page
from shoal.cli.here import ADMIN_OF_SERVE, node_here
from shoal.cli.output import Gateway, console, printable
from shoal.errors import InvalidArgument, NotFound, Unavailable

app = typer.Typer(rich_markup_mode="rich", add_completion=False)

_READ_S = 10.0
_TRACE = re.compile(r"[0-9a-fA-F]{8,32}")
_JOB = re.compile(r"[0-9A-HJKMNP-TV-Z]{26}")


@app.command()
def trace(
    id: Annotated[str, typer.Argument(metavar="ID|JOB", help="A trace, by 8 characters or more, or a job.")],
    admin: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Admin address of the node, or --metrics-port of `shoal serve`. Default: that of the node here.",
            show_default=False,
        ),
    ] = None,
    gateway: Gateway = None,
    json: Annotated[bool, typer.Option("--json", help="Print the spans as JSON.")] = False,
) -> None:
    """Show the spans of a request or job in all processes of the node, as a waterfall.

    Each process keeps the latest 2,000 spans of sampled calls in memory: those of `shoal infer`, `shoal jobs submit`
    and programs with a sampled trace. Envoy's own spans, and those of other nodes, are in the collector alone.

    [bold]Examples[/bold]

      shoal infer digits rows.npy --explain         its last line names the trace

      shoal trace 4bf92f3577b34da6a3ce929d0e0e4736

      shoal trace 01JD8Y3V5M2Q4R6T8W0X2Z4B6D        the attempts of a job

      shoal trace 4bf92f3577b34da6 --admin 127.0.0.1:8002
    """  # fmt: skip
    address = admin or node_here(gateway, "spans", ADMIN_OF_SERVE).admin
    if _JOB.fullmatch(id):
        found = _read(address, f"job={id}")
        traces = sorted({span["trace"] for span in found["spans"]})
        for each in traces:
            found["spans"] += _read(address, f"trace={each}")["spans"]
    elif _TRACE.fullmatch(id):
        found = _read(address, f"trace={id.lower()}")
    else:
        raise InvalidArgument(f"{id!r} is neither a trace (8 to 32 hexadecimal digits) nor a job")
    spans = list({(span["instance"], span["span"]): span for span in found["spans"]}.values())
    if json:
        typer.echo(json_format.dumps({"spans": spans, "silent": found["silent"]}))
    elif spans:
        _show(spans)
    if found["silent"]:
        typer.echo(f"no answer of {', '.join(found['silent'])}: their spans are missing", err=True)
    if not spans:
        raise NotFound(
            f"no process at {address} has a span of {id}: a process keeps the latest 2,000 of sampled calls, since its "
            f"start. Its log may have more: `shoal logs --contains {id}`"
        )


def _read(admin: str, query: str) -> dict[str, Any]:
    text = admin_page.read(admin, f"/spans?{query}", timeout_s=_READ_S)
    try:
        document = json_format.loads(text)
        return {"spans": list(document["spans"]), "silent": list(document["silent"])}
    except (ValueError, KeyError, TypeError) as err:
        raise Unavailable(f"the address {admin} has no spans: give the admin address of a node") from err


def _show(spans: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    from shoal.cli.diagnosis import waterfall

    lines = waterfall.lines(spans)
    instances = {line.instance for line in lines}
    length = max(line.offset_ms + line.duration_ms for line in lines)
    traces = sorted({span["trace"] for span in spans})
    counts = f"{_counted(len(lines), 'span', 'spans')} of {_counted(len(instances), 'process', 'processes')}"
    console().print(Text(f"trace {', '.join(traces)}: {counts}, {length:.1f} ms", "bold"), soft_wrap=True)
    table = Table(box=None, show_header=False, pad_edge=False)
    for justify in ("right", "left", "right", "left", "left"):
        table.add_column(justify=justify, no_wrap=True)
    for line in lines:
        about = Text(printable(f"{line.name}  {line.about}".rstrip()), "red" if line.has_failed else "")
        table.add_row(
            f"{line.offset_ms:.1f}", Text(line.bar, "cyan"), f"{line.duration_ms:.1f} ms", line.instance, about
        )
    console().print(table)


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"
