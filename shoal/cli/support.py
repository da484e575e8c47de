"""`shoal support`: an archive for a maintainer."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli.here import or_stopped
from shoal.cli.output import Gateway, connect, one_line
from shoal.errors import InvalidArgument, ShoalError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shoal.discovery import RunningNode

app = typer.Typer(
    rich_markup_mode="rich",
    add_completion=False,
    no_args_is_help=True,
    help="Collect what a maintainer needs to help you.",
)


@app.callback()
def support() -> None:
    """Collect what a maintainer needs to help you."""


@app.command()
def bundle(
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The archive. Default: shoal-support-TIME.tar.gz here.",
            show_default=False,
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Data folder of a node that does not run.", show_default=False),
    ] = None,
    gateway: Gateway = None,
) -> None:
    """Write an archive of versions, findings, metrics, failed calls, Envoy's configuration and logs, without secrets.

    Names of models, tenants and callers are in it, and what the logs say; payloads are not. Its file left_out.txt says
    what is not in it.

    [bold]Example[/bold]

      shoal support bundle
    """  # fmt: skip
    from shoal.cli.diagnosis import bundle as bundles
    from shoal.cli.diagnosis import gather
    from shoal.discovery import running_nodes

    path = output or Path(f"shoal-support-{datetime.now().astimezone():%Y%m%d-%H%M%S}.tar.gz")
    if path.exists():
        raise InvalidArgument(f"--output {path}: exists already: give another file")
    if data_dir is not None and not (data_dir / "logs").is_dir():
        raise InvalidArgument(f"--data-dir {data_dir}: not the data folder of a node")
    nodes = running_nodes(os.environ)
    node: RunningNode | None = None
    unread: Mapping[str, str] = {}
    if data_dir is not None:
        node = next((one for one in nodes if one.data_dir.resolve() == data_dir.resolve()), None)
        gateway = gateway or (node.url if node is not None else None)
    try:
        if data_dir is not None and node is None:
            names = bundles.write(path, None, None, gather.of_folder(data_dir.absolute()), data_dir)
        else:
            with or_stopped("support bundle"):
                connection = connect(gateway)
            with connection as client:
                node = node or next((one for one in nodes if one.url == client.address), None)
                folder = data_dir or (node.data_dir if node is not None else None)
                facts = gather.of_node(client, node)
                unread = facts.unread
                names = bundles.write(path, client, node, facts, folder)
    except OSError as err:
        raise ShoalError(f"{path} cannot be written: {err.strerror or err}") from err
    for part, reason in unread.items():
        typer.echo(f"not in it: {part}: {one_line(reason)}", err=True)
    typer.echo(f"{path}: {len(names)} files, {path.stat().st_size / 1024:.0f} KiB; look into it before you send it")
