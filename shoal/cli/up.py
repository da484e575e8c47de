"""`shoal up`: run a whole node in the foreground."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli.tls import Insecure, TlsAuto, TlsCert, TlsKey, TlsName, tls_options

if TYPE_CHECKING:
    from shoal.cli.screen import NodeScreen

app = typer.Typer(rich_markup_mode="rich", add_completion=False)


class ModelControl(StrEnum):
    """Ways to change the models that are served."""

    none = "none"
    explicit = "explicit"


@app.command()
def up(
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder for all data of the node.", show_default="~/.local/share/shoal", metavar="DIR"),
    ] = None,
    gateway_port: Annotated[
        int | None,
        typer.Option(
            help="Port for clients, on 127.0.0.1. 0: any free one. [dim]default: 8080[/dim]",
            metavar="N",
            show_default=False,
        ),
    ] = None,
    listen: Annotated[
        str,
        typer.Option(
            help="Address for clients, in place of --gateway-port: 0.0.0.0:8443 opens the gateway to other machines.",
            metavar="HOST:PORT",
            show_default=False,
        ),
    ] = "",
    tls: TlsAuto = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_name: TlsName = None,
    insecure: Insecure = False,
    admin_port: Annotated[
        int, typer.Option(help="Port of the metrics and of Envoy's pages, on 127.0.0.1. 0: any free one.", metavar="N")
    ] = 9901,
    replicas: Annotated[
        str,
        typer.Option(
            help="Number of instances of a service, where not 1.", metavar="SERVICE=N,...", show_default=False
        ),
    ] = "",
    ready_file: Annotated[
        Path | None,
        typer.Option(help="Write the addresses (JSON) to this file while the node is ready.", metavar="PATH"),
    ] = None,
    etcd: Annotated[
        str | None, typer.Option(help="Use this etcd instead of starting one.", metavar="http://HOST:PORT,...")
    ] = None,
    mongo: Annotated[
        str | None, typer.Option(help="Use this MongoDB instead of starting one.", metavar="mongodb://...")
    ] = None,
    services: Annotated[
        str,
        typer.Option(
            help="Start only these of coord, store, infer and ingest. coord is always started: it configures Envoy.",
            metavar="SERVICE,...",
            show_default="all",
        ),
    ] = "",
    connectors: Annotated[
        Path | None,
        typer.Option(
            help="Run the connectors of this file: streams from Kafka and others (docs/streams.md).", metavar="FILE"
        ),
    ] = None,
    model_control: Annotated[
        ModelControl | None,
        typer.Option(
            help="none: models are pushed and removed. explicit: clients may also load and unload models at one "
            "instance. [dim]default: none[/dim]",
            show_default=False,
        ),
    ] = None,
    allow_code: Annotated[
        bool,
        typer.Option(
            "--allow-code",
            help="Where other machines can reach the gateway: allow models that run code or read files and variables "
            "of this machine (Python models, remote models with secrets). At 127.0.0.1 they are allowed.",
        ),
    ] = False,
    auth: Annotated[
        bool,
        typer.Option(
            "--auth",
            help="Every caller needs a key (`shoal keys create`) or a token, and the policy decides (`shoal policy`). "
            "A key for you is made in the data folder, where commands find it.",
        ),
    ] = False,
    node: Annotated[
        str, typer.Option(help="Name of this node; nodes that share an etcd need different names.", metavar="NAME")
    ] = "local",
    json: Annotated[
        bool, typer.Option("--json", help="When ready, print the ready document instead of a table.")
    ] = False,
) -> None:
    """Start a whole node on this machine: etcd, MongoDB, Envoy and every service, and keep it running.

    Ctrl-C stops everything in order; a second Ctrl-C stops immediately. Stored data stays in the data folder.

    [bold]Examples[/bold]

      shoal up

      shoal up --replicas infer=2,coord=3 --data-dir ./data

      shoal up --gateway-port 0 --admin-port 0 --ready-file ready.json

      shoal up --connectors streams.toml

      shoal up --listen 0.0.0.0:8443 --tls auto --auth

      shoal up --etcd http://10.0.0.5:2379 --mongo 'mongodb://10.0.0.6/?replicaSet=rs0' --node b --services infer
    """
    import asyncio
    import os

    from shoal.cli.screen import NodeScreen
    from shoal.node import node as launcher
    from shoal.node.connectors import check as check_connectors
    from shoal.node.options import checked

    options = checked(
        connectors=connectors,
        data_dir=data_dir or default_data_dir(os.environ.get("XDG_DATA_HOME")),
        gateway_port=gateway_port,
        listen=listen,
        tls=tls_options(tls, tls_cert, tls_key, tls_name),
        is_insecure=insecure,
        admin_port=admin_port,
        replicas=replicas,
        services=services,
        etcd=etcd,
        mongo=mongo,
        name=node,
        model_control=model_control.value if model_control else "",
        allow_code=allow_code,
        auth=auth,
    )
    if options.connectors is not None:
        check_connectors(options.connectors)
    screen = NodeScreen(options, as_json=json)
    files = [file for file in (ready_file and ready_file.expanduser().absolute(), _pointer(screen)) if file]
    with screen:
        asyncio.run(launcher.run(options, files, os.environ, screen))


def default_data_dir(xdg_data_home: str | None) -> Path:
    """Return the default folder for the node's data (XDG Base Directory Specification)."""
    home = Path(xdg_data_home) if xdg_data_home and Path(xdg_data_home).is_absolute() else Path("~/.local/share")
    return home / "shoal"


def _pointer(screen: NodeScreen) -> Path | None:
    """Return the path at which other commands find this node's addresses; None when no folder for it is safe."""
    import os

    from shoal.discovery import pointer_path

    try:
        return pointer_path(os.environ, os.getpid())
    except OSError as err:
        screen.trouble(f"other commands will not find this node without --gateway: {err}")
        return None
