"""`shoal models`: the models of a node's registry."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mesh.process.private_folder import PrivateFolder
from shoal.cli import bringing, quantizing
from shoal.cli.output import (
    AsJson,
    Gateway,
    connect,
    console,
    pairs,
    plain,
    printable,
    show,
    show_json,
    size,
    text,
)
from shoal.convert import formats
from shoal.errors import InvalidArgument

if TYPE_CHECKING:
    from shoal.client import ModelPush, ModelVersion, Progress, Pushed

_MOST_LINES = 20
"""Models of a repository that are listed one by one; of more, only the number and the failures."""

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
            help="A .onnx file, a model folder in Triton's layout, a folder of model folders, or a model of PyTorch "
            "(.pt2), scikit-learn (.joblib, .pkl, .skops), XGBoost (.json, .ubj) or LightGBM (.txt), which is "
            "converted and checked first."
        ),
    ],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the model. Default: the file's or folder's name.")
    ] = None,
    version: Annotated[
        int | None,
        typer.Option(
            metavar="V",
            help="File: its version; default: the next free one. Folder: push only this version; default: all.",
        ),
    ] = None,
    alias: Annotated[
        str | None,
        typer.Option(metavar="ALIAS", help="Point this alias (such as stable) at the newest pushed version."),
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A label of the version. May be repeated.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            help="Load the model on one infer instance first, and register it only if that works. --no-check registers "
            "it untried, such as for GPUs that are added later."
        ),
    ] = True,
    wait: Annotated[bool, typer.Option(help="Wait until the model is ready on every infer instance.")] = True,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="Time limit of a model's trial, and then of the wait.")
    ] = 120.0,
    sample: bringing.Sample = None,
    tolerance: bringing.Tolerance = 1e-4,
    max_flips: bringing.MaxFlips = 0,
    seed: bringing.Seed = 0,
    trust_pickle: bringing.TrustPickle = False,
    float64: bringing.Float64 = False,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Upload a model, try it on one instance, register it, and wait until it is ready everywhere.

    A model that cannot be loaded is not registered. Files that the store has are not sent again; an interrupted upload
    is resumed. Of a folder of models, several are pushed at a time, and a bad one does not stop the others.

    [bold]Examples[/bold]

      shoal models push digits.onnx

      shoal models push ./my_repository/resnet --version 3 --alias stable

      shoal models push ./my_repository

      shoal models push forest.joblib --trust-pickle --sample rows.csv
    """
    bringing.check_path(path)
    labels = pairs(label or [], "--label")
    conversion = None
    with contextlib.ExitStack() as stack:
        if formats.is_brought(path):
            folder = stack.enter_context(PrivateFolder("shoal-tmp-push-"))
            options = bringing.ConversionOptions(sample, tolerance, max_flips, seed, trust_pickle, float64)
            conversion = bringing.convert(path, folder, name, options, as_json=json)
            labels = bringing.provenance(conversion) | labels
        client = stack.enter_context(connect(gateway))
        from shoal.client.models import repository

        if name is None and version is None and (count := len(repository.models_in(path))):
            with _count(count) as settled:
                outcomes = client.models.push_all(
                    path, alias=alias or "", labels=labels, check=check, settled=settled, wait=wait, timeout=timeout
                )
            _show_outcomes(outcomes, as_json=json)
            return
        with _bar() as progress:
            pushed = client.models.push(
                conversion.folder if conversion else path,
                name,
                version,
                alias=alias or "",
                labels=labels,
                renumber=conversion is not None,
                check=check,
                progress=progress,
                wait=wait,
                timeout=timeout,
            )
    if json:
        report = {} if conversion is None else {"conversion": bringing.as_document(conversion)}
        show_json([plain(each) | report for each in pushed])
        return
    for each in pushed:
        _show_pushed(each)


def _show_pushed(each: Pushed) -> None:
    how = "already registered" if each.existed else f"registered, {size(each.sent_bytes)} sent"
    served = {None: "", True: ", ready", False: ", not served (version policy)"}[each.ready]
    typer.echo(f"{each.model.name} version {each.model.version}: {how}{served}")


def _show_outcomes(outcomes: list[ModelPush], *, as_json: bool) -> None:
    """Print what was pushed of a repository and what was not. Exits with 1 when a model failed."""
    failed = {each.name: each.error for each in outcomes if each.error is not None}
    versions = [pushed for each in outcomes for pushed in each.pushed]
    if as_json:
        errors = [{"name": name, "error": err.message, "code": err.code.name} for name, err in failed.items()]
        show_json([*plain(versions), *errors])
    else:
        if len(outcomes) <= _MOST_LINES:
            for each in versions:
                _show_pushed(each)
        for name, err in failed.items():
            typer.echo(f"{name}: not pushed: {printable(err.message)}", err=True)
        sent = size(sum(each.sent_bytes for each in versions))
        known = sum(each.existed for each in versions)
        before = f", {known} of them registered before" if known else ""
        done = f"{len(outcomes) - len(failed)} of {len(outcomes)} models pushed"
        typer.echo(f"{done}: {len(versions)} versions{before}; {sent} sent")
    if failed:
        raise typer.Exit(1)


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
    version: Annotated[int | None, typer.Option(metavar="V", help="Only this version. Default: all versions.")] = None,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Remove a model, or one version of it, from the registry and from service.

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
        int | None, typer.Argument(help="The version to point the alias at.", show_default=False)
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the alias.")] = False,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Point an alias at a version of a model. `stable` is the version for clients that name none.

    [bold]Examples[/bold]

      shoal models alias digits stable 2

      shoal models alias digits stable --remove
    """
    if (version is None) != remove:
        raise InvalidArgument("set either the version to point the alias at, or --remove")
    with connect(gateway) as client:
        model = client.models.alias(name, alias, version)
    if json:
        show_json(model)
    else:
        typer.echo(f"{name}: {alias} is removed" if model is None else f"{name}: {alias} is version {model.version}")


def show_models(models: list[ModelVersion], title: str = "") -> None:
    """Print registry entries as a table."""
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
def _count(total: int) -> Iterator[Callable[[ModelPush], None]]:
    """Count the settled models of a repository on standard error, if that is a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    err = console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task("models pushed", total=total)
        failed = 0

        def settled(outcome: ModelPush) -> None:
            nonlocal failed
            failed += outcome.error is not None
            bar.update(task, advance=1, description="models pushed" + (f", {failed} failed" if failed else ""))

        yield settled


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    """Show a progress bar on standard error, if that is a terminal."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    err = console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns, console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task("upload", total=None)

        def report(progress: Progress) -> None:
            done = progress.done_bytes >= progress.total_bytes
            what = "stored; waiting until it is ready everywhere" if done else progress.path
            bar.update(task, description=what, completed=progress.done_bytes, total=max(progress.total_bytes, 1))

        yield report
