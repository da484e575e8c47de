"""How commands find the node and show what it says: tables for people, JSON for programs, errors to standard error."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.errors import InvalidArgument

if TYPE_CHECKING:
    from rich.console import Console

    from shoal.client import Client

WIDTH = 160
"""Columns where there is no terminal: wide enough that no name is broken in two."""

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
# All but tab and newline; with them the marks that turn the direction of text round.

Gateway = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="The node to talk to. Default: $SHOAL_GATEWAY, else the node that runs here.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def connect(gateway: str | None, *, tenant: str = "") -> Client:
    """A client of the node that the command is meant for. Use as `with`."""
    # grpc's C core has its own log on standard error; what matters of it comes as an error of ours.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from shoal.client import Client, RetryPolicy

    # Somebody waits: that no node answers must be said within 2 s.
    return Client(gateway, tenant=tenant, retry=RetryPolicy(attempts=5))


def console(*, stderr: bool = False) -> Console:
    """Where tables and progress go."""
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False)
    if not made.is_terminal:
        made.width = WIDTH
    return made


def show(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    title: str = "",
    empty: str = "none",
    stderr: bool = False,
) -> None:
    """Prints a table, or `empty` when it would have no rows."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", header_style="bold")
    for column in columns:
        # An id is for copying: in a narrow terminal the other columns give way.
        table.add_column(column, overflow="fold", no_wrap=column in ("job", "batch"))
    for row in rows:
        table.add_row(*(Text(text(cell)) for cell in row))
    out = console(stderr=stderr)
    if table.row_count:
        out.print(table)
    else:
        out.print(f"{title}: {empty}" if title else empty)


def show_json(value: object) -> None:
    """Prints `value` as JSON: dataclasses become objects, times ISO 8601 in UTC, enumerations their value."""
    typer.echo(json.dumps(plain(value), indent=2, ensure_ascii=False))


def show_json_line(value: object) -> None:
    """The same on one line: for commands that print many."""
    typer.echo(json.dumps(plain(value), ensure_ascii=False))


def plain(value: object) -> Any:
    """`value` as JSON knows it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return of_bytes(value)
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def of_bytes(value: bytes) -> str | dict[str, str]:
    """Text where it is text, else `{"b64": ...}`."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"b64": base64.b64encode(value).decode()}


def text(value: object) -> str:
    """`value` in a cell."""
    if value is None or value == "":
        return "-"
    if isinstance(value, datetime):
        return value.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, tuple | list):
        return ", ".join(text(item) for item in value) or "-"
    return printable(str(value))


def printable(words: str) -> str:
    """Words of others, for a terminal: what would steer it (colours, titles, clearing it) is shown and not done.

    Names, labels, reasons and messages of models are whatever a client or a model put there.
    """
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), words)


def size(count: int) -> str:
    """Bytes as people read them."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    raise AssertionError  # pragma: no cover


def pairs(given: Sequence[str], option: str) -> dict[str, str]:
    """`KEY=VALUE` options as a mapping.

    Raises:
        InvalidArgument: one has no `=` or no key.
    """
    found: dict[str, str] = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not key or not equals:
            raise InvalidArgument(f"{option} {item!r}: expected KEY=VALUE")
        found[key] = value
    return found
