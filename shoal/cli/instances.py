"""`shoal instances`: instances of the services, in and out of traffic."""

from __future__ import annotations

from typing import Annotated

import typer

from shoal.cli.output import AsJson, Gateway, connect, show, show_json

app = typer.Typer(
    rich_markup_mode="rich",
    add_completion=False,
    no_args_is_help=True,
    help="Instances of the services: list them, take one out of traffic, put it back.",
)

Name = Annotated[str, typer.Argument(metavar="INSTANCE", help="local/infer-0, or infer-0 where it is unambiguous.")]


@app.command("list")
def list_instances(gateway: Gateway = None, json: AsJson = False) -> None:
    """List the instances.

    [bold]Example[/bold]

      shoal instances list
    """
    with connect(gateway) as client:
        instances = client.status().instances
    if json:
        show_json(instances)
        return
    rows = [
        (one.service, one.name, f"{one.state} (by an operator)" if one.drained_by_operator else one.state, one.version)
        for one in instances
    ]
    show(("service", "instance", "state", "version"), rows, empty="no instances")


@app.command()
def drain(name: Name, gateway: Gateway = None) -> None:
    """Take an instance out of traffic: it gets no new calls, and its open calls finish.

    [bold]Example[/bold]

      shoal instances drain infer-1
    """
    with connect(gateway) as client:
        instance = client.instances.drain(name)
    typer.echo(f"{instance.name} is out of traffic: `shoal instances undrain {instance.name}` puts it back")


@app.command()
def undrain(name: Name, gateway: Gateway = None) -> None:
    """Put an instance back into traffic.

    [bold]Example[/bold]

      shoal instances undrain infer-1
    """
    with connect(gateway) as client:
        instance = client.instances.undrain(name)
    typer.echo(f"{instance.name} is {instance.state}")
