"""`shoal context`: gateways by name."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from shoal.cli import contexts
from shoal.cli.output import AsJson, show, show_json

app = typer.Typer(rich_markup_mode="rich", add_completion=False, no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the context.")]


_NONE_IN_USE = "no context is in use: commands find the node of this machine"


@app.callback()
def context() -> None:
    """Gateways by name: their address, CA and token. Tokens are never printed."""


@app.command()
def add(
    name: Name,
    url: Annotated[str, typer.Argument(metavar="URL", help="https://HOST:PORT, or HOST:PORT in plaintext.")],
    ca: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="CA that signed the gateway's certificate, from `shoal ca show`."),
    ] = None,
    token_file: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="File of the token, which each command reads. -: read the token from standard input now and keep it.",
            show_default=False,
        ),
    ] = "",
    replace: Annotated[bool, typer.Option("--replace", help="Replace a context of this name.")] = False,
) -> None:
    """Add a context. The first one is in use at once.

    [bold]Examples[/bold]

      shoal context add prod https://shoal.example.com:8443 --ca ca.pem --token-file ~/.shoal-token

      shoal context use prod
    """
    from shoal.discovery import parse_gateway
    from shoal.errors import InvalidArgument

    gateway = parse_gateway(url, "URL")
    if ca is not None:
        if not gateway.has_tls:
            raise InvalidArgument(f"--ca is for https: give https://{gateway.address}")
        from shoal.client.transport.security import security

        security(ca=ca)
    token = ""
    if token_file == "-":
        token, token_file = sys.stdin.read().strip(), ""
        if not token:
            raise InvalidArgument("--token-file -: standard input is empty")
        contexts.check_token(token, "--token-file -: standard input")
    elif token_file:
        token_file = str(Path(token_file).expanduser().absolute())
        contexts.read_token(Path(token_file))
    new = contexts.Context(gateway.url, "" if ca is None else str(ca.expanduser().absolute()), token_file, token)
    known = contexts.change(lambda known: known.adding(name, new, may_replace=replace), os.environ)
    typer.echo(f"context {name}: {new.url}" + (", in use" if known.current == name else ""))


@app.command()
def use(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Name of the context. Without it, no context is in use.")
    ] = "",
) -> None:
    """Make a context the one that commands use without --gateway.

    [bold]Examples[/bold]

      shoal context use prod

      shoal context use           # none: commands find the node of this machine
    """
    contexts.change(lambda known: known.using(name), os.environ)
    typer.echo(f"context {name} is in use" if name else _NONE_IN_USE)


@app.command("list")
def list_(json: AsJson = False) -> None:
    """List the contexts. A token is shown as set, never itself.

    [bold]Example[/bold]

      shoal context list
    """
    known = contexts.load(os.environ)
    rows = [
        {
            "name": name,
            "in_use": name == known.current,
            "url": each.url,
            "ca": each.ca,
            "token": each.token_file or ("set" if each.token else ""),
        }
        for name, each in sorted(known.contexts.items())
    ]
    if json:
        show_json(rows)
    else:
        columns = ("context", "in use", "url", "CA", "token")
        show(columns, [(r["name"], "*" if r["in_use"] else "", r["url"], r["ca"], r["token"]) for r in rows])


@app.command()
def remove(name: Name) -> None:
    """Remove a context.

    [bold]Example[/bold]

      shoal context remove stage
    """
    left = contexts.change(lambda known: known.removing(name), os.environ)
    typer.echo(f"context {name} is removed" + ("" if left.current else f"; {_NONE_IN_USE}"))
