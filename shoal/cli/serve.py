"""`shoal serve`: only the inference server, on a folder of models."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mesh.node.alone import ModelState

app = typer.Typer(rich_markup_mode="rich", add_completion=False)


class ModelControl(StrEnum):
    """Which models are served unasked."""

    none = "none"
    explicit = "explicit"
    poll = "poll"


@app.command()
def serve(
    repository: Annotated[
        Path,
        typer.Argument(
            metavar="REPO", help="Folder of models: MODEL/config.pbtxt + MODEL/1/model.onnx, or .onnx files."
        ),
    ],
    port: Annotated[int, typer.Option(help="Port for clients. 0: any free one.", metavar="N", min=0, max=65535)] = 8001,
    host: Annotated[str, typer.Option(help="Address to listen at. 0.0.0.0: every address.")] = "127.0.0.1",
    model_control: Annotated[
        ModelControl | None,
        typer.Option(
            help="What is served unasked. none: every model. explicit: those of --load-model. "
            "poll: every model, and what changes in the folder. [dim]default: none[/dim]",
            show_default=False,
        ),
    ] = None,
    load_model: Annotated[
        list[str] | None,
        typer.Option(help="With --model-control explicit: a model to load at start. May be repeated; '*': all."),
    ] = None,
    poll_ms: Annotated[
        int | None,
        typer.Option(
            help="With --model-control poll: how often to look. [dim]default: 15000[/dim]",
            min=100,
            max=86_400_000,
            metavar="MS",
            show_default=False,
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="When ready, print where it is and its models as JSON.")] = False,
) -> None:
    """Serve a folder of models over gRPC (Open Inference Protocol v2), without etcd, MongoDB or Envoy.

    For clients that speak to Triton, KServe or MLServer. Settings of the server: SHOAL_INFER_... variables.
    Ctrl-C stops it once the calls under way are answered.

    [bold]Examples[/bold]

      shoal serve ./models

      shoal serve ./models --port 9000 --host 0.0.0.0

      shoal serve ./models --model-control explicit --load-model double
    """
    import asyncio
    import os

    from mesh.node import alone

    screen = _Screen(as_json=json)
    if load_model and model_control is not ModelControl.explicit:
        raise typer.BadParameter(
            "it needs --model-control explicit: else every model is loaded", param_hint="--load-model"
        )
    given = {
        "MODEL_CONTROL": model_control.value if model_control else "",
        "LOAD_MODELS": ",".join(load_model or ()),
        "POLL_MS": "" if poll_ms is None else str(poll_ms),
    }
    settings = {name: value for name, value in given.items() if value}
    raise typer.Exit(asyncio.run(alone.serve(repository.expanduser(), host, port, os.environ, screen, settings)))


class _Screen:
    """A mesh.node.alone.Screen: what is asked for goes to standard output, the rest to standard error."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json

    def ready(self, address: str, pid: int, models: Sequence[ModelState]) -> None:
        if self._as_json:
            import dataclasses
            import json

            listed = [dataclasses.asdict(model) for model in models]
            typer.echo(json.dumps({"address": address, "pid": pid, "models": listed}, indent=2))
            return
        typer.echo(f"serving at {address} (pid {pid}); Ctrl-C stops it")
        if not models:
            typer.echo("no models in the folder", err=True)
        for model in models:
            version = f" version {model.version}" if model.version else ""
            typer.echo(f"  {model.name}{version}: {model.state}" + (f": {model.reason}" if model.reason else ""))

    def stopping(self) -> None:
        typer.echo("stopping: calls under way are answered first; once more to stop at once", err=True)
