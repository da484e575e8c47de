"""Connection to the node, and output of responses: tables for people, JSON for programs, errors to standard error."""

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
"""Columns without a terminal: wide enough that no name is split."""

# Control characters except tab and newline, the marks that reverse the direction of text, and halves of surrogate
# pairs, which no terminal takes.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

Gateway = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Gateway of the node: https://HOST:PORT, HOST:PORT, or the name of a context. Default: $SHOAL_GATEWAY, "
        "else the context in use, else the node that runs on this machine.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def connect(gateway: str | None, *, tenant: str = "") -> Client:
    """Return a client of the command's node. Use the client with `with`."""
    # grpc's C core logs to standard error; its errors reach the caller as exceptions.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from shoal.cli.contexts import chosen
    from shoal.client import Client, RetryPolicy

    # An interactive user waits: an unreachable node must be reported within 2 s.
    retry = RetryPolicy(attempts=5)
    context = chosen(gateway, os.environ)
    if context is None:
        return Client(gateway, tenant=tenant, retry=retry)
    # The variables have priority, as in a program.
    ca = os.environ.get("SHOAL_CA") or context.ca or None
    token = os.environ.get("SHOAL_TOKEN") or context.read_token()
    return Client(
        context.url, tenant=tenant, retry=retry, ca=ca if context.url.startswith("https") else None, token=token
    )


def console(*, stderr: bool = False) -> Console:
    """Return the console for tables and progress. A text is printed as it is: names and ids may look like markup."""
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
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
    """Print a table, or `empty` when there are no rows."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", header_style="bold")
    for column in columns:
        # Ids are copied by users, so a narrow terminal shrinks the other columns.
        table.add_column(column, overflow="fold", no_wrap=column in ("job", "batch"))
    for row in rows:
        table.add_row(*(Text(text(cell)) for cell in row))
    out = console(stderr=stderr)
    if table.row_count:
        out.print(table)
    else:
        out.print(f"{title}: {empty}" if title else empty)


def show_json(value: object) -> None:
    """Print `value` as JSON: dataclasses become objects, times ISO 8601 in UTC, enumerations their value."""
    typer.echo(_json(value, indent=2))


def show_json_line(value: object) -> None:
    """Print `value` as one line of JSON, for commands that print many values."""
    typer.echo(_json(value))


def _json(value: object, indent: int | None = None) -> str:
    # A half of a surrogate pair, which no output takes, is written as its escape in JSON.
    return json.dumps(plain(value), indent=indent, ensure_ascii=False).encode(errors="backslashreplace").decode()


def plain(value: object) -> Any:
    """Return `value` as JSON data."""
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
    """Return valid UTF-8 as text, other bytes as `{"b64": ...}`."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"b64": base64.b64encode(value).decode()}


def text(value: object) -> str:
    """Return `value` as the text of a table cell."""
    if value is None or value == "":
        return "-"
    if isinstance(value, datetime):
        return value.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, tuple | list):
        return ", ".join(text(item) for item in value) or "-"
    return printable(str(value))


def printable(value: str) -> str:
    """Return text of other origin with its control characters escaped.

    Clients and models choose names, labels, reasons and messages, which could otherwise change colours or titles of the
    terminal, or clear it.
    """
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), value)


def one_line(value: str) -> str:
    """Return text as `printable` does, with its newlines escaped: a line of it could pass for one of the command's."""
    return printable(value).replace("\n", "\\n")


def size(count: int) -> str:
    """Return a number of bytes with a unit."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    raise AssertionError  # pragma: no cover


def pairs(written: Sequence[str], option: str) -> dict[str, str]:
    """Return `KEY=VALUE` options as a mapping.

    Raises:
        InvalidArgument: an item has no `=` or no key.
    """
    found: dict[str, str] = {}
    for item in written:
        key, equals, value = item.partition("=")
        if not key or not equals:
            raise InvalidArgument(f"{option} {item!r}: expected KEY=VALUE")
        found[key] = value
    return found
