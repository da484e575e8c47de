"""`shoal models quantize`: compress a model, measure it beside the original, and write or push the result."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mesh.process.private_folder import PrivateFolder
from shoal.cli.output import AsJson, Gateway, connect, console, plain, show, show_json, size
from shoal.compress.method import Method
from shoal.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, ShoalError

if TYPE_CHECKING:
    from shoal.client import Client, ModelVersion
    from shoal.compress.compression import Compression, Rows
    from shoal.convert.original import Port, Tensors
    from shoal.convert.verdict import Bounds


# Limit of the search for kept requests, in jobs, newest first: a hundred pages, a few seconds.
_MAX_JOBS = 100_000


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL_OR_PATH", help="A .onnx file, a model folder, or a model of the node.")
    ],
    method: Annotated[
        Method,
        typer.Option(
            help="dynamic: int8 weights. static: int8 weights and activations, calibrated on rows. float16. "
            "prune: remove unused nodes and weights."
        ),
    ] = Method.DYNAMIC,
    version: Annotated[
        int | None,
        typer.Option(metavar="V", min=1, help="Version to quantize. Default: the newest.", show_default=False),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Rows to calibrate and check on: .npz, .npy, .csv, or .jsonl with one input of `shoal infer` a line. "
            "Default: inputs of jobs that the node kept (`--keep-request`), else random rows.",
            show_default=False,
        ),
    ] = None,
    recorded: Annotated[int, typer.Option(metavar="N", min=1, max=1000, help="Largest number of kept requests.")] = 256,
    max_drift: Annotated[
        float | None,
        typer.Option(metavar="X", min=0.0, help="Reject a larger relative drift.", show_default=False),
    ] = None,
    max_flips: Annotated[
        str | None,
        typer.Option(
            metavar="N|P%", help="Reject more changed labels: a number of rows, or percent.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="File to write. Default: MODEL.METHOD.onnx in the current folder.",
            show_default=False,
        ),
    ] = None,
    push: Annotated[
        bool,
        typer.Option(
            "--push", help="Push the result to the node as the next version; needs --max-drift or --max-flips."
        ),
    ] = False,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Name to push the result under. Default: the model's name.", show_default=False
        ),
    ] = None,
    threads: Annotated[int, typer.Option(metavar="N", min=0, help="Threads of the timed calls. 0: all cores.")] = 1,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of random rows.")] = 0,
    gateway: Gateway = None,
    json: AsJson = False,
) -> None:
    """Compress a model: int8, float16, or pruning. Reports the size, the latency and the drift of its outputs.

    [bold]Examples[/bold]

      shoal models quantize digits.onnx --method static --data rows.npz

      shoal models quantize digits --method static --max-flips 1% --push
    """
    if push and max_drift is None and max_flips is None and method is not Method.PRUNE:
        raise InvalidArgument("--push needs --max-drift or --max-flips, the limit of the drift from the original")
    if name is not None and not push:
        raise InvalidArgument("--name is the name to push under: use it with --push")
    bounds = _bounds(max_drift, max_flips, method)
    from shoal.convert.extras import COMPRESS, needed

    needed("onnx", COMPRESS, "compressing a model")
    from shoal.client.models import bundle
    from shoal.compress import compression
    from shoal.convert.onnx_model import OnnxModel

    if name is not None:
        bundle.checked(name)
    with ExitStack() as stack:
        folder = stack.enter_context(PrivateFolder("shoal-tmp-quantize-"))
        source = _Source(model, version, gateway, folder, stack)
        target = _target(output, source.name, method, push=push, folder=folder)
        rows = _rows(source, OnnxModel(source.file), data, recorded, seed)
        report = compression.run(
            method,
            source.file,
            folder / "smaller.onnx",
            rows,
            name=source.title,
            bounds=bounds,
            threads=threads,
        )
        if not json or report.refused:
            show_compression(report, stderr=json)
        if report.refused:
            raise FailedPrecondition(f"the compressed {source.title} is rejected: {report.refused}")
        pushed = []
        if push:
            bundle_folder = _write_bundle(source, folder / "smaller.onnx", folder / "pushed" / (name or source.name))
            pushed = source.client().models.push(bundle_folder, renumber=True, labels=_labels(report))
        else:
            shutil.copyfile(folder / "smaller.onnx", target)
    if json:
        show_json({**plain(report), "target": None if push else str(target), "pushed": plain(pushed)})
        return
    for each in pushed:
        is_ready = {None: "", True: ", ready", False: ", not served (version policy)"}[each.ready]
        typer.echo(f"{each.model.name} version {each.model.version}: pushed{is_ready}")
    if not push:
        typer.echo(f"written to {target}")


class _Source:
    """The model to compress: a local file or folder, or a version in the node."""

    def __init__(self, model: str, version: int | None, gateway: str | None, folder: Path, stack: ExitStack) -> None:
        self._gateway, self._stack = gateway, stack
        self._client: Client | None = None
        self.registered: ModelVersion | None = None
        self.model_folder: Path | None = None
        path = Path(model)
        if path.is_file():
            if path.suffix != ".onnx":
                raise InvalidArgument(f"{path}: expected a .onnx file; `shoal models convert` converts other formats")
            self.file, self.name, self.title = path, path.stem, path.name
        elif path.is_dir():
            self._use_folder(path, version)
        else:
            self._pull(model, version, folder)

    def _use_folder(self, path: Path, version: int | None) -> None:
        from shoal.client.models import bundle

        newest = bundle.read(path, version=version)[-1]
        self._use_version(path, newest.name, newest.version)

    def _pull(self, model: str, version: int | None, folder: Path) -> None:
        if "/" in model or model.endswith(".onnx"):
            raise NotFound(f"{model}: no such file or folder")
        try:
            versions = {each.version: each for each in self.client().models.list(model)}
        except ShoalError as err:
            raise type(err)(f"no local file {model!r}, and no node to read that model from: {err.message}") from err
        if not versions or (version or max(versions)) not in versions:
            existing = f": there are {', '.join(map(str, sorted(versions)))}" if versions else ""
            requested = f"{model!r} version {version}" if version else repr(model)
            raise NotFound(f"no local file {model!r}, and no model {requested} in the node{existing}")
        self.registered = versions[version or max(versions)]
        pulled = self.client().models.pull(model, self.registered.version, into=folder / "pulled")
        self._use_version(pulled, model, self.registered.version)

    def _use_version(self, path: Path, name: str, version: int) -> None:
        self.file, self.name, self.title = path / str(version) / "model.onnx", name, f"{name} version {version}"
        self.model_folder = path
        if not self.file.is_file():
            raise FailedPrecondition(f"{self.title} has no model.onnx: only ONNX models can be compressed")

    def client(self) -> Client:
        """Return the node's client, connected once."""
        if self._client is None:
            self._client = self._stack.enter_context(connect(self._gateway))
        return self._client


def _target(output: Path | None, name: str, method: Method, *, push: bool, folder: Path) -> Path:
    if push:
        if output is not None:
            raise InvalidArgument("--output and --push exclude each other: use one of them")
        return folder
    target = output or Path(f"{name}.{method.value}.onnx")
    if target.exists():
        raise AlreadyExists(f"{target} exists already: remove it, or give another --output")
    if not target.parent.is_dir():
        raise NotFound(f"{target.parent}: no such folder")
    return target


def _rows(source: _Source, model: Any, data: Path | None, recorded: int, seed: int) -> Rows:
    from shoal.compress import compression
    from shoal.convert import sample

    if data is not None:
        if data.suffix == ".jsonl":
            return compression.Rows(_read_lines(data, model.inputs), data.name)
        arrays = sample.read(data, model.inputs)
        calls = sample.calls(arrays, model.inputs, is_batched=model.is_batched)
        return compression.Rows(calls, data.name)
    kept = _kept_requests(source, model.inputs, recorded)
    if kept:
        return compression.Rows(kept, f"{len(kept)} requests that the node kept")
    return compression.random_rows(model.inputs, is_batched=model.is_batched, seed=seed)


def _kept_requests(source: _Source, inputs: Sequence[Port], most: int) -> list[Tensors]:
    """Return the inputs of the model's newest jobs with a kept request; none for a model outside the node."""
    from shoal.convert import sample

    if source.registered is None:
        return []
    jobs = source.client().jobs
    newest = jobs.each(state="succeeded", model=source.name, most=_MAX_JOBS)
    kept = islice((job for job in newest if job.keeps_request), most)
    return [sample.fit(jobs.inputs(job.id), inputs, f"job {job.id}") for job in kept]


def _read_lines(path: Path, inputs: Sequence[Port]) -> list[Tensors]:
    """Return the calls in a .jsonl file."""
    from shoal.cli import tensors
    from shoal.convert import sample

    if not path.is_file():
        raise NotFound(f"{path}: no such file")
    calls = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip():
            parsed = tensors.read(line)
            position = f"{path}, line {number}"
            if parsed.alone is not None and len(inputs) != 1:
                raise InvalidArgument(f"{position}: name the inputs: {', '.join(port.name for port in inputs)}")
            named = parsed.inputs if parsed.alone is None else {inputs[0].name: parsed.alone}
            arrays = {key: tensors.as_array(key, value) for key, value in named.items()}
            calls.append(sample.fit(arrays, inputs, position))
    if not calls:
        raise InvalidArgument(f"{path}: the file has no lines")
    return calls


def _bounds(max_drift: float | None, max_flips: str | None, method: Method) -> Bounds | None:
    from shoal.convert.verdict import Bounds

    # Pruning promises bit-identical outputs.
    if method is Method.PRUNE:
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


def _write_bundle(source: _Source, smaller: Path, into: Path) -> Path:
    """Copy the model's folder to `into`, with the compressed file as its only version, and return `into`."""
    into.mkdir(parents=True)
    for child in source.model_folder.iterdir() if source.model_folder is not None else ():
        if not child.name.isdecimal():
            (shutil.copytree if child.is_dir() else shutil.copyfile)(child, into / child.name)
    if source.model_folder is not None:
        shutil.copytree(
            source.file.parent, into / "1", ignore=lambda _, names: [n for n in names if n.startswith("model.onnx")]
        )
    (into / "1").mkdir(exist_ok=True)
    shutil.copyfile(smaller, into / "1" / "model.onnx")
    return into


def _labels(report: Compression) -> dict[str, str]:
    from shoal.convert import provenance

    return {
        "compressed_from": report.source[:256],
        "compression": str(report.method),
        "compressed_with": ", ".join(f"{package} {version}" for package, version in report.packages.items()),
        "checked_on": report.rows[:256],
        "measured_on": str(report.processor)[:256],
        "original_bytes": str(report.original_bytes),
        **provenance.of_drift(report.drift),
    }


def show_compression(report: Compression, *, stderr: bool = False) -> None:
    """Print a report: the source, the method, the size, the latency and the drift."""
    from rich.text import Text

    out = console(stderr=stderr)
    ratio = report.original_bytes / max(report.compressed_bytes, 1)
    gain = f"{ratio:.2f} times smaller" if ratio >= 1 else f"{1 / ratio:.2f} times larger"
    packages = ", ".join(f"{package} {version}" for package, version in report.packages.items())
    out.print(Text.assemble((str(report.source), "bold"), f", {report.method.value} ({packages})"))
    out.print(f"  size: {size(report.original_bytes)} -> {size(report.compressed_bytes)} ({gain})")
    out.print(f"  measured on: {report.processor}", markup=False, highlight=False)
    times = [
        (each.rows, f"{each.original_ms:.3g} ms", f"{each.compressed_ms:.3g} ms", f"{each.speedup:.2f}", each.rounds)
        for each in report.latencies
    ]
    threads = "all cores" if report.threads == 0 else f"{report.threads} thread" + "s" * (report.threads > 1)
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
            None if each.flips is None else f"{each.flips} ({each.flips / max(report.drift.rows, 1):.2%})",
        )
        for each in report.drift.outputs
    ]
    calibrated = f", calibrated on {report.calibrated_on} other rows" if report.calibrated_on else ""
    out.print(f"  drift from the original on {report.drift.rows} rows ({report.rows}{calibrated}):", markup=False)
    columns = ("output", "max abs", "mean abs", "max relative", "cosine", "label (or top score) changes")
    show(columns, drift, stderr=stderr)
    if not report.is_real:
        out.print("  the rows are random, and drift on your data may differ: give --data, or name a model of a node")
        out.print("  that kept requests of it (`shoal jobs submit --keep-request`)")
    for note in report.notes:
        out.print(f"  note: {note}", markup=False)
    if report.refused:
        verdict = f"rejected: {report.refused}"
    else:
        verdict = "not judged: no --max-drift or --max-flips" if report.bounds is None else f"accepted: {report.bounds}"
    out.print(f"  {verdict}", markup=False)
