"""`shoal models quantize`: a model made smaller, measured beside the original, and written or pushed."""

from __future__ import annotations

import math
import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli.output import AsJson, Gateway, connect, console, plain, show, show_json, size
from shoal.compress.method import Method
from shoal.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, ShoalError

if TYPE_CHECKING:
    from shoal.client import Client, ModelVersion
    from shoal.compress.compression import Compression, Rows
    from shoal.convert.original import Port, Tensors
    from shoal.convert.verdict import Bounds


_LOOKED_AT = 100_000
# Jobs, newest first, in search of requests that were kept: a hundred pages, some seconds.


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL_OR_PATH", help="A .onnx file, a model folder, or a model of the node.")
    ],
    method: Annotated[
        Method,
        typer.Option(
            help="dynamic: int8 weights. static: int8 weights and activations, by ranges seen on rows. float16. "
            "prune: only what nobody reads."
        ),
    ] = Method.DYNAMIC,
    version: Annotated[
        int | None, typer.Option(metavar="V", min=1, help="This version. Default: the newest.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Rows to calibrate and check on: .npz, .npy, .csv, or .jsonl with one input of `shoal infer` a line. "
            "Default: the inputs that the node kept of jobs (`--keep-request`), else random ones.",
            show_default=False,
        ),
    ] = None,
    recorded: Annotated[int, typer.Option(metavar="N", min=1, max=1000, help="Kept requests to use at most.")] = 256,
    max_drift: Annotated[
        float | None,
        typer.Option(metavar="X", min=0.0, help="Refuse more relative drift than this.", show_default=False),
    ] = None,
    max_flips: Annotated[
        str | None,
        typer.Option(
            metavar="N|P%", help="Refuse more changed labels than this: rows, or percent.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Default: MODEL.METHOD.onnx here.", show_default=False),
    ] = None,
    push: Annotated[
        bool, typer.Option("--push", help="Push it to the node as the next version; needs a bound to be held to.")
    ] = False,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Push it under this name. Default: the model's.", show_default=False),
    ] = None,
    threads: Annotated[int, typer.Option(metavar="N", min=0, help="Threads of the timed calls. 0: all cores.")] = 1,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of random rows.")] = 0,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Make a model smaller: int8, float16, or without what nobody reads. Says what it gives, and what it costs.

    [bold]Examples[/bold]

      shoal models quantize digits.onnx --method static --data rows.npz

      shoal models quantize digits --method static --max-flips 1% --push
    """
    if push and max_drift is None and max_flips is None and method is not Method.PRUNE:
        raise InvalidArgument(
            "--push needs --max-drift or --max-flips: how far may its answers be from the original's?"
        )
    if name is not None and not push:
        raise InvalidArgument("--name is the name to push under: it goes with --push")
    bounds = _bounds(max_drift, max_flips, method)
    from shoal.convert.extras import COMPRESS, needed

    needed("onnx", COMPRESS, "making a model smaller")
    from shoal.client.models import bundle
    from shoal.compress import compression
    from shoal.convert.onnx_model import OnnxModel

    if name is not None:
        bundle.checked(name)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shoal-")))
        source = _Source(model, version, gateway, folder, stack)
        target = _target(output, source.name, method, push=push, folder=folder)
        rows = _rows(source, OnnxModel(source.file), data, recorded, seed)
        made = compression.run(
            method,
            source.file,
            folder / "smaller.onnx",
            rows,
            name=source.title,
            bounds=bounds,
            threads=threads,
        )
        if not json or made.refused:
            show_compression(made, stderr=json)
        if made.refused:
            raise FailedPrecondition(f"{source.title} made smaller is refused: {made.refused}")
        pushed = []
        if push:
            laid = _laid_out(source, folder / "smaller.onnx", folder / "pushed" / (name or source.name))
            pushed = source.client().models.push(laid, renumber=True, labels=_labels(made))
        else:
            shutil.copyfile(folder / "smaller.onnx", target)
    if json:
        show_json({**plain(made), "target": None if push else str(target), "pushed": plain(pushed)})
        return
    for each in pushed:
        is_ready = {None: "", True: ", ready", False: ", not served (version policy)"}[each.ready]
        typer.echo(f"{each.model.name} version {each.model.version}: pushed{is_ready}")
    if not push:
        typer.echo(f"written to {target}")


class _Source:
    """The model that is made smaller: a file here, or a version of the node."""

    def __init__(self, given: str, version: int | None, gateway: str | None, folder: Path, stack: ExitStack) -> None:
        self._gateway, self._stack = gateway, stack
        self._client: Client | None = None
        self.registered: ModelVersion | None = None
        self.beside: Path | None = None
        path = Path(given)
        if path.is_file():
            if path.suffix != ".onnx":
                raise InvalidArgument(f"{path}: expected a .onnx file: `shoal models convert` makes one of others")
            self.file, self.name, self.title = path, path.stem, path.name
        elif path.is_dir():
            self._of_folder(path, version)
        else:
            self._of_node(given, version, folder)

    def _of_folder(self, path: Path, version: int | None) -> None:
        from shoal.client.models import bundle

        newest = bundle.read(path, version=version)[-1]
        self._take(path, newest.name, newest.version)

    def _of_node(self, given: str, version: int | None, folder: Path) -> None:
        if "/" in given or given.endswith(".onnx"):
            raise NotFound(f"{given}: no such file or folder")
        try:
            versions = {each.version: each for each in self.client().models.list(given)}
        except ShoalError as err:
            raise type(err)(
                f"no file {given!r} here, and no node to ask for a model of that name: {err.message}"
            ) from err
        if not versions or (version or max(versions)) not in versions:
            there = f": there are {', '.join(map(str, sorted(versions)))}" if versions else ""
            wanted = f"{given!r} version {version}" if version else repr(given)
            raise NotFound(f"no file {given!r} here, and no model {wanted} in the node{there}")
        self.registered = versions[version or max(versions)]
        pulled = self.client().models.pull(given, self.registered.version, into=folder / "pulled")
        self._take(pulled, given, self.registered.version)

    def _take(self, path: Path, name: str, version: int) -> None:
        self.file, self.name, self.title = path / str(version) / "model.onnx", name, f"{name} version {version}"
        self.beside = path
        if not self.file.is_file():
            raise FailedPrecondition(f"{self.title} has no model.onnx: only ONNX models are made smaller")

    def client(self) -> Client:
        """The node's client, connected once."""
        if self._client is None:
            self._client = self._stack.enter_context(connect(self._gateway))
        return self._client


def _target(output: Path | None, name: str, method: Method, *, push: bool, folder: Path) -> Path:
    if push:
        if output is not None:
            raise InvalidArgument("--output and --push: one of them")
        return folder
    target = output or Path(f"{name}.{method.value}.onnx")
    if target.exists():
        raise AlreadyExists(f"{target} is there already: remove it, or give another --output")
    if not target.parent.is_dir():
        raise NotFound(f"{target.parent}: no such folder")
    return target


def _rows(source: _Source, model: Any, data: Path | None, recorded: int, seed: int) -> Rows:
    from shoal.compress import compression
    from shoal.convert import sample

    if data is not None:
        if data.suffix == ".jsonl":
            return compression.Rows(_of_lines(data, model.inputs), data.name)
        arrays = sample.read(data, model.inputs)
        calls = sample.calls(arrays, model.inputs, is_batched=model.is_batched)
        return compression.Rows(calls, data.name)
    kept = _kept(source, model.inputs, recorded)
    if kept:
        return compression.Rows(kept, f"{len(kept)} requests that the node kept")
    return compression.random_rows(model.inputs, is_batched=model.is_batched, seed=seed)


def _kept(source: _Source, inputs: Sequence[Port], most: int) -> list[Tensors]:
    """The inputs of the model's newest jobs that were kept, however many that were not came after them; none for a
    model that is not the node's."""
    from shoal.convert import sample

    if source.registered is None:
        return []
    jobs = source.client().jobs
    newest = jobs.each(state="succeeded", model=source.name, most=_LOOKED_AT)
    kept = islice((job for job in newest if job.keeps_request), most)
    return [sample.fit(jobs.inputs(job.id), inputs, f"job {job.id}") for job in kept]


def _of_lines(path: Path, inputs: Sequence[Port]) -> list[Tensors]:
    """Calls out of a .jsonl file."""
    from shoal.cli import tensors
    from shoal.convert import sample

    if not path.is_file():
        raise NotFound(f"{path}: no such file")
    calls = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip():
            given = tensors.read(line)
            where = f"{path}, line {number}"
            if given.alone is not None and len(inputs) != 1:
                raise InvalidArgument(f"{where}: name the inputs: {', '.join(port.name for port in inputs)}")
            named = given.inputs if given.alone is None else {inputs[0].name: given.alone}
            calls.append(sample.fit({key: tensors.as_array(key, value) for key, value in named.items()}, inputs, where))
    if not calls:
        raise InvalidArgument(f"{path}: no lines")
    return calls


def _bounds(max_drift: float | None, max_flips: str | None, method: Method) -> Bounds | None:
    from shoal.convert.verdict import Bounds

    if method is Method.PRUNE:  # It promises the same bits.
        return Bounds(0.0, 0)
    if max_drift is None and max_flips is None:
        return None
    relative = math.inf if max_drift is None else max_drift
    if max_flips is None:
        return Bounds(relative, share=1.0)
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", max_flips.strip())
    if found is None or (not found[2] and "." in found[1]) or (found[2] and float(found[1]) > 100):
        raise InvalidArgument(f"--max-flips {max_flips!r}: expected a number of rows (3) or percent of them (0.5%)")
    return Bounds(relative, share=float(found[1]) / 100) if found[2] else Bounds(relative, int(found[1]))


def _laid_out(source: _Source, smaller: Path, into: Path) -> Path:
    """The model's folder, with the smaller file as its one version."""
    into.mkdir(parents=True)
    for child in source.beside.iterdir() if source.beside is not None else ():
        if not child.name.isdecimal():
            (shutil.copytree if child.is_dir() else shutil.copyfile)(child, into / child.name)
    if source.beside is not None:
        shutil.copytree(
            source.file.parent, into / "1", ignore=lambda _, names: [n for n in names if n.startswith("model.onnx")]
        )
    (into / "1").mkdir(exist_ok=True)
    shutil.copyfile(smaller, into / "1" / "model.onnx")
    return into


def _labels(made: Compression) -> dict[str, str]:
    from shoal.convert import provenance

    return {
        "compressed_from": made.source[:256],
        "compression": str(made.method),
        "compressed_with": ", ".join(f"{package} {version}" for package, version in made.packages.items()),
        "checked_on": made.rows[:256],
        "measured_on": str(made.processor)[:256],
        "original_bytes": str(made.original_bytes),
        **provenance.of_drift(made.drift),
    }


def show_compression(made: Compression, *, stderr: bool = False) -> None:
    """Prints what was made, what it gives, and what it costs."""
    out = console(stderr=stderr)
    ratio = made.original_bytes / max(made.compressed_bytes, 1)
    gain = f"{ratio:.2f} times smaller" if ratio >= 1 else f"{1 / ratio:.2f} times larger"
    packages = ", ".join(f"{package} {version}" for package, version in made.packages.items())
    out.print(f"[bold]{made.source}[/bold], {made.method.value} ({packages})")
    out.print(f"  size: {size(made.original_bytes)} -> {size(made.compressed_bytes)} ({gain})")
    out.print(f"  measured on: {made.processor}", markup=False, highlight=False)
    times = [
        (each.rows, f"{each.original_ms:.3g} ms", f"{each.compressed_ms:.3g} ms", f"{each.speedup:.2f}", each.rounds)
        for each in made.latencies
    ]
    threads = "all cores" if made.threads == 0 else f"{made.threads} thread" + "s" * (made.threads > 1)
    out.print(f"  time of one call on this machine, {threads}, medians of interleaved rounds:")
    show(("rows", "original", "compressed", "times faster", "rounds"), times, stderr=stderr)
    drift = [
        (
            each.name,
            *(
                (f"{each.max_abs:.2g}", f"{each.mean_abs:.2g}", f"{each.max_relative:.2g}", f"{each.cosine:.6f}")
                if each.is_number
                else (None, None, None, None)
            ),
            None if each.flips is None else f"{each.flips} ({each.flips / max(made.drift.rows, 1):.2%})",
        )
        for each in made.drift.outputs
    ]
    calibrated = f", ranges from {made.calibrated_on} others" if made.calibrated_on else ""
    out.print(f"  drift from the original on {made.drift.rows} rows ({made.rows}{calibrated}):", markup=False)
    columns = ("output", "max abs", "mean abs", "max relative", "cosine", "label (or top score) changes")
    show(columns, drift, stderr=stderr)
    if not made.is_real:
        out.print(
            "  the rows are random, and drift on your data may be another: give --data, or name a model of a node"
        )
        out.print("  that kept requests of it (`shoal jobs submit --keep-request`)")
    for note in made.notes:
        out.print(f"  note: {note}", markup=False)
    if made.refused:
        verdict = f"refused: {made.refused}"
    else:
        verdict = "not judged: no --max-drift or --max-flips" if made.bounds is None else f"accepted: {made.bounds}"
    out.print(f"  {verdict}", markup=False)
