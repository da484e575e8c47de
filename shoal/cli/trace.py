"""`shoal trace`: where the time of one request or job went."""

from __future__ import annotations

import json as json_format
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli import admin_page
from shoal.cli.here import SERVE, admin_here
from shoal.cli.output import Gateway, connect, console, printable, text
from shoal.errors import InvalidArgument, NotFound, Unavailable, Unimplemented

if TYPE_CHECKING:
    from shoal.client import Client

app = typer.Typer(rich_markup_mode="rich", add_completion=False)

_READ_S = 10.0
_LATEST = 20
# A job's attempts have a trace each when its submit had none.
_TRACES = 32
_TRACE = re.compile(r"[0-9a-fA-F]{8,32}")
_JOB = re.compile(r"[0-9A-HJKMNP-TV-Z]{26}")


@app.command()
def trace(
    id: Annotated[
        str, typer.Argument(metavar="[ID|JOB]", help="A trace, by 8 characters or more, or a job.", show_default=False)
    ] = "",
    admin: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Admin address of the node, or --metrics-port of `shoal serve`. Default: the one here.",
            show_default=False,
        ),
    ] = None,
    gateway: Gateway = None,
    json: Annotated[bool, typer.Option("--json", help="Print the spans as JSON.")] = False,
) -> None:
    """Show the spans of a request or job in all processes of the node, as a waterfall.

    Without an id: the latest calls that failed or were slow. Each process keeps the latest 2,000 spans of sampled
    calls in memory, those of `shoal infer`, `shoal jobs submit` and programs with a sampled trace; and of other calls
    those that failed by the node's doing, or took longer than 1 s or the model's slo_ms. Envoy's own spans are in the
    collector alone.

    [bold]Examples[/bold]

      shoal trace                                   the latest calls that failed or were slow

      shoal infer digits rows.npy --explain         its last line names the trace

      shoal trace 4bf92f3577b34da6a3ce929d0e0e4736

      shoal trace 01JD8Y3V5M2Q4R6T8W0X2Z4B6D        the attempts of a job
    """  # fmt: skip
    if id and not _JOB.fullmatch(id) and not _TRACE.fullmatch(id):
        raise InvalidArgument(f"{id!r} is neither a trace (8 to 32 hexadecimal digits) nor a job")
    with ExitStack() as stack:
        read, where = _reader(admin, gateway, stack)
        if _JOB.fullmatch(id):
            found = read("", id)
            for each in sorted({span["trace"] for span in found["spans"]})[:_TRACES]:
                found["spans"] += read(each, "")["spans"]
        else:
            found = read(id.lower(), "")
    spans = list({(span["instance"], span["span"]): span for span in found["spans"]}.values())
    if json:
        typer.echo(json_format.dumps({"spans": spans, "silent": found["silent"]}))
    elif spans and id:
        _show(spans)
    elif spans:
        _show_latest(spans)
    if found["silent"]:
        typer.echo(f"{', '.join(found['silent'])} did not answer: spans are missing", err=True)
    if found.get("truncated"):
        typer.echo("there are more spans: these are the latest", err=True)
    if id and not spans:
        raise NotFound(
            f"no process at {where} has a span of {id}: a process keeps the latest of sampled, failed and slow calls, "
            f"since its start. Its log may have more: `shoal logs --contains {id}`"
        )
    if not spans and not json:
        typer.echo(f"no process at {where} has the span of a call that failed or was slow")


def _reader(
    admin: str | None, gateway: str | None, stack: ExitStack
) -> tuple[Callable[[str, str], dict[str, Any]], str]:
    """Return a function that reads the spans of a trace or a job, and the address that it asks.

    That is the admin address of a node or server on this machine, else the gateway.
    """
    if admin is None:
        try:
            admin = admin_here(gateway, "spans")
        except InvalidArgument:  # The node is of another machine or user.
            client = stack.enter_context(connect(gateway))
            return partial(_of_gateway, client), client.address
    return partial(_of_page, admin), admin


def _of_gateway(client: Client, trace: str, job: str) -> dict[str, Any]:
    try:
        found = client.spans(trace, job=job)
    except Unimplemented as err:
        raise InvalidArgument(f"{client.address} keeps no spans for others. {SERVE}") from err
    spans = [asdict(span) for span in found.spans]
    return {"spans": spans, "silent": list(found.silent), "truncated": found.truncated}


def _of_page(admin: str, trace: str, job: str) -> dict[str, Any]:
    query = f"?trace={trace}" if trace else f"?job={job}" if job else ""
    page = admin_page.read(admin, f"/spans{query}", timeout_s=_READ_S)
    try:
        document = json_format.loads(page)
        return {"spans": list(document["spans"]), "silent": list(document["silent"])}
    except (ValueError, KeyError, TypeError) as err:
        raise Unavailable(f"the address {admin} has no spans: give the admin address of a node") from err


def _show_latest(spans: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    # In 80 columns, the reason wraps: a trace is copied, and fits into a line.
    for title in ("ended", "ms", "at", "call"):
        table.add_column(title, no_wrap=True)
    for title in ("model", "tenant"):
        table.add_column(title, no_wrap=True, max_width=16)
    table.add_column("trace", no_wrap=True, min_width=16)
    table.add_column("why", overflow="fold", min_width=10)
    for span in sorted(spans, key=lambda span: span["end_ns"], reverse=True)[:_LATEST]:
        ended = datetime.fromtimestamp(span["end_ns"] / 1e9).astimezone()
        about = span["attributes"]
        cells = (
            f"{ended:%H:%M:%S}",
            f"{(span['end_ns'] - span['start_ns']) / 1e6:.0f}",
            span["instance"].rpartition("/")[2],
            # The method alone.
            re.split("[./]", span["name"])[-1],
            about.get("shoal.model", ""),
            about.get("shoal.tenant", ""),
            span["trace"][:16],
            span["error"][:60] or "slow",
        )
        table.add_row(*(Text(text(cell)) for cell in cells))
    console().print(table)


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
    # A long error wraps, and takes no room from the others.
    table.add_column(justify="right", no_wrap=True, min_width=6)
    table.add_column(no_wrap=True, min_width=waterfall.BAR)
    table.add_column(justify="right", no_wrap=True, min_width=10)
    table.add_column(no_wrap=True, min_width=9)
    table.add_column(overflow="fold")
    for line in lines:
        about = Text(printable(f"{line.name}  {line.about}".rstrip()), "red" if line.has_failed else "")
        table.add_row(
            f"{line.offset_ms:.1f}", Text(line.bar, "cyan"), f"{line.duration_ms:.1f} ms", line.instance, about
        )
    console().print(table)


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"
