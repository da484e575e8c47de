"""`shoal infer`: one inference from the command line."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.output import AsJson, Gateway, connect

app = typer.Typer(rich_markup_mode="rich", add_completion=False)


@app.command()
def infer(
    model: Annotated[str, typer.Argument(help="The model to run.")],
    written: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="JSON (arrays by input name, one array, or the protocol's `inputs` list), the name of a .json, .npy "
            "or .npz file, or - for standard input.",
        ),
    ],
    version: Annotated[
        str, typer.Option(metavar="V", help="Version to run. Default: the node's choice.", show_default=False)
    ] = "",
    want: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Return only this output. May be repeated.")
    ] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option("--parameter", "-p", metavar="KEY=VALUE", help="A parameter of the request. May be repeated."),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show the time of each stage, the batch, and why it ran then.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the outputs to an .npz, .npy or .json.")
    ] = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Longest wait for the response.")] = 60.0,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Run one inference and print the outputs.

    Datatypes, and a missing batch dimension, come from the model's metadata.

    [bold]Examples[/bold]

      shoal infer digits '{"x": [[1, 2, 3, 4]]}'

      shoal infer digits rows.npy --explain --output outputs.npz

      echo '{"x": [1, 2, 3, 4]}' | shoal infer digits - --json
    """
    from shoal.cli import tensors
    from shoal.cli.traced import traced

    started = time.monotonic()
    request = tensors.read(written)
    parameters = {**request.parameters, **tensors.of_options(parameter or [], "--parameter")}
    if explain:
        parameters["explain"] = True
    with connect(gateway) as client, traced(gateway) as trace_command:
        ready = tensors.fit(request, client.models.metadata(model, version, timeout=min(timeout, 10.0)))
        result = client.infer(
            model,
            ready.inputs,
            outputs=want or request.outputs,
            version=version,
            parameters=parameters,
            datatypes=ready.datatypes,
            request_id=request.request_id,
            timeout=max(timeout - (time.monotonic() - started), 0.0),
        )
    tensors.show_result(result, as_json=json, output=output)
    if explain:
        typer.echo(f"trace: {trace_command}", err=True)
