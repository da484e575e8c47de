"""`shoal ca`: the CA of `--tls auto`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from shoal.errors import InvalidArgument, NotFound

# In the data folder; shoal.node.tls.own_ca makes it. An import of that module takes 0.1 s.
_FILE = "ca/ca.pem"

app = typer.Typer(rich_markup_mode="rich", add_completion=False, no_args_is_help=True)


@app.callback()
def ca() -> None:
    """The CA whose certificates `--tls auto` uses."""


@app.command()
def show(
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Data folder of the node. Default: the one of the running node with --tls auto, else the usual "
            "one, which `shoal serve` uses.",
            metavar="DIR",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Print the CA's certificate (PEM) for clients, and its SHA-256 fingerprint on standard error.

    [bold]Examples[/bold]

      shoal ca show > ca.pem

      shoal infer digits rows.npy --gateway https://10.0.0.5:8443        (with SHOAL_CA=ca.pem)
    """
    import hashlib
    import ssl

    path = _file(data_dir)
    try:
        text = path.read_text()
        fingerprint = hashlib.sha256(ssl.PEM_cert_to_DER_cert(text.strip())).hexdigest().upper()
    except FileNotFoundError:
        raise NotFound(f"{path} does not exist: start with --tls auto once, or give --data-dir") from None
    except (OSError, ValueError) as err:
        raise InvalidArgument(f"{path}: no certificate can be read ({err})") from err
    typer.echo(text, nl=False)
    typer.echo("SHA-256 " + ":".join(fingerprint[at : at + 2] for at in range(0, len(fingerprint), 2)), err=True)


def _file(data_dir: Path | None) -> Path:
    from shoal.cli.up import default_data_dir
    from shoal.discovery import running_nodes

    if data_dir is None:
        found = [node for node in running_nodes(os.environ) if node.ca == node.data_dir / _FILE]
        data_dir = found[0].data_dir if len(found) == 1 else default_data_dir(os.environ.get("XDG_DATA_HOME"))
    return data_dir.expanduser() / _FILE
