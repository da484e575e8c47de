"""`shoal models`: what the node's registry has, and what goes in and out of it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli import bringing, quantizing
from shoal.cli.output import AsJson, Gateway, connect, console, pairs, plain, show, show_json, size, text
from shoal.convert import formats
from shoal.errors import InvalidArgument

if TYPE_CHECKING:
    from shoal.client import ModelVersion, Progress

app = typer.Typer(
    rich_markup_mode="rich",
    add_completion=False,
    no_args_is_help=True,
    help="Push, convert, compress, list and remove models.",
)


@app.command()
def push(
    path: Annotated[
        Path,
        typer.Argument(
            help="A .onnx file, a model folder in Triton's layout, a folder of such folders, or a model of PyTorch "
            "(.pt2), scikit-learn (.joblib, .pkl, .skops), XGBoost (.json, .ubj) or LightGBM (.txt), which is "
            "converted and checked first."
        ),
    ],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's name. Default: that of the file or folder.")
    ] = None,
    version: Annotated[
        int | None,
        typer.Option(
            metavar="V",
            help="A file: its version; default the next free one. A folder: only this version; default all of them.",
        ),
    ] = None,
    alias: Annotated[
        str | None,
        typer.Option(metavar="ALIAS", help="Point this alias (such as stable) at the newest version pushed."),
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A note that stays with the version. May be repeated.")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Wait until every infer instance has it ready.")] = True,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="How long to wait for that.")] = 120.0,
    sample: bringing.Sample = None,
    tolerance: bringing.Tolerance = 1e-4,
    max_flips: bringing.MaxFlips = 0,
    seed: bringing.Seed = 0,
    trust_pickle: bringing.TrustPickle = False,
    float64: bringing.Float64 = False,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Upload a model, register it, and wait until it can be asked.

    What the store has is not sent again; an upload that broke goes on where it was.

    [bold]Examples[/bold]

      shoal models push digits.onnx

      shoal models push ./my_repository/resnet --version 3 --alias stable

      shoal models push ./my_repository

      shoal models push forest.joblib --trust-pickle --sample rows.csv
    """
    bringing.check_path(path)
    labels = pairs(label or [], "--label")
    made = None
    with contextlib.ExitStack() as stack:
        if formats.is_brought(path):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shoal-")))
            wanted = bringing.Wanted(sample, tolerance, max_flips, seed, trust_pickle, float64)
            made = bringing.convert(path, folder, name, wanted, as_json=json)
            labels = bringing.provenance(made) | labels
        client = stack.enter_context(connect(gateway))
        with _bar() as progress:
            pushed = client.models.push(
                made.folder if made else path,
                name,
                version,
                alias=alias or "",
                labels=labels,
                renumber=made is not None,
                progress=progress,
                wait=wait,
                timeout=timeout,
            )
    if json:
        conversion = {} if made is None else {"conversion": bringing.as_document(made)}
        show_json([plain(each) | conversion for each in pushed])
        return
    for each in pushed:
        how = "was there" if each.existed else f"registered, {size(each.sent_bytes)} sent"
        served = {None: "", True: ", ready", False: ", not served (version policy)"}[each.ready]
        typer.echo(f"{each.model.name} version {each.model.version}: {how}{served}")


app.command("convert")(bringing.command)
app.command("quantize")(quantizing.command)


@app.command("list")
def list_models(
    name: Annotated[str, typer.Argument(help="Only this model.", show_default=False)] = "",
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """List the versions of every model in the registry.

    [bold]Examples[/bold]

      shoal models list

      shoal models list digits --json
    """
    with connect(gateway) as client:
        models = client.models.list(name)
    if json:
        show_json(models)
    else:
        show_models(models)


@app.command()
def remove(
    name: Annotated[str, typer.Argument(help="The model.")],
    version: Annotated[int | None, typer.Option(metavar="V", help="Only this version. Default: all of them.")] = None,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Take a model, or one version of it, out of the registry, and so out of service.

    [bold]Examples[/bold]

      shoal models remove digits --version 1

      shoal models remove digits
    """
    with connect(gateway) as client:
        removed = client.models.remove(name, version)
    if json:
        show_json(removed)
    else:
        typer.echo(f"removed {name} version {', '.join(str(model.version) for model in removed)}")


@app.command()
def alias(
    name: Annotated[str, typer.Argument(help="The model.")],
    alias: Annotated[str, typer.Argument(help="The alias, such as stable.")],
    version: Annotated[
        int | None, typer.Argument(help="The version that it shall point at.", show_default=False)
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take the alias away.")] = False,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Point an alias at a version of a model. `stable` is what is served to those who name no version.

    [bold]Examples[/bold]

      shoal models alias digits stable 2

      shoal models alias digits stable --remove
    """
    if (version is None) != remove:
        raise InvalidArgument("give the version that the alias shall point at, or --remove")
    with connect(gateway) as client:
        model = client.models.alias(name, alias, version)
    if json:
        show_json(model)
    else:
        typer.echo(f"{name}: {alias} is gone" if model is None else f"{name}: {alias} is version {model.version}")


def show_models(models: list[ModelVersion], title: str = "") -> None:
    """The registry as a table."""
    rows = [
        (
            model.name,
            model.version,
            model.aliases,
            size(model.size_bytes),
            len(model.files),
            model.created_at,
            text([f"{key}={value}" for key, value in sorted(model.labels.items())]),
        )
        for model in models
    ]
    hint = "no models: push one with `shoal models push PATH`"
    show(("model", "version", "aliases", "size", "files", "registered", "labels"), rows, title=title, empty=hint)


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    """A progress bar on standard error. Where that is no terminal, nothing."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    err = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns, console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task("upload", total=None)

        def told(progress: Progress) -> None:
            done = progress.done_bytes >= progress.total_bytes
            what = "stored; waiting until it is ready everywhere" if done else progress.path
            bar.update(task, description=what, completed=progress.done_bytes, total=max(progress.total_bytes, 1))

        yield told
