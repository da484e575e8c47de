"""Conversion of models of PyTorch, scikit-learn, XGBoost and LightGBM to ONNX on the command line, with a report."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli.output import console, plain, show, show_json, size
from shoal.convert import formats
from shoal.errors import AlreadyExists, FailedPrecondition, InvalidArgument

if TYPE_CHECKING:
    from shoal.convert.conversion import Conversion
    from shoal.convert.drift import Drift

_PANEL = "Models of PyTorch, scikit-learn, XGBoost, LightGBM"

Sample = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Check it on these rows (.npz, .npy, .csv). Default: random rows near the model's decision thresholds.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
Tolerance = Annotated[
    float,
    typer.Option(
        metavar="X", min=0.0, help="Largest accepted relative drift from the original.", rich_help_panel=_PANEL
    ),
]
MaxFlips = Annotated[
    int, typer.Option(metavar="N", min=0, help="Rows whose label may change, without ties.", rich_help_panel=_PANEL)
]
Seed = Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the random rows.", rich_help_panel=_PANEL)]
TrustPickle = Annotated[
    bool,
    typer.Option(
        "--trust-pickle",
        help="Open a file that can run code when it is opened (.pt2, .joblib, .pkl): I trust its source.",
        rich_help_panel=_PANEL,
    ),
]
Float64 = Annotated[
    bool,
    typer.Option("--float64", help="Serve float64 inputs (scikit-learn only).", rich_help_panel=_PANEL),
]


@dataclass(frozen=True)
class ConversionOptions:
    """Options of a conversion and of its check."""

    sample: Path | None
    tolerance: float
    max_flips: int
    seed: int
    trusts: bool
    float64: bool


def command(
    path: Annotated[
        Path,
        typer.Argument(help="A .pt2, .joblib, .pkl, .skops (scikit-learn), .json, .ubj (XGBoost) or .txt (LightGBM)."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder in which to write the model's folder.")
    ] = Path(),
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the model. Default: the file's name.")
    ] = None,
    sample: Sample = None,
    tolerance: Tolerance = 1e-4,
    max_flips: MaxFlips = 0,
    seed: Seed = 0,
    trust_pickle: TrustPickle = False,
    float64: Float64 = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Convert a model to ONNX, check it against the original, and write a model folder that `shoal serve` serves.

    `shoal models push` does the same, and pushes the result to a node.

    [bold]Examples[/bold]

      shoal models convert forest.joblib --trust-pickle --sample rows.csv -o ./models

      shoal models convert booster.json
    """
    options = ConversionOptions(sample, tolerance, max_flips, seed, trust_pickle, float64)
    conversion = convert(path, output, name, options, as_json=json)
    if json:
        show_json(as_document(conversion))
    else:
        typer.echo(f"written to {conversion.folder}")


def convert(path: Path, into: Path, name: str | None, options: ConversionOptions, *, as_json: bool) -> Conversion:
    """Convert `path` to `into`/<name> and print the report, unless `as_json`. A refused model is not left there.

    Raises:
        AlreadyExists: the folder exists.
        FailedPrecondition: the drift is too large; the report is printed also with `as_json`, to standard error.
    """
    from shoal.client.models import bundle

    name = bundle.checked(name or path.stem)
    original = formats.open_original(path, trusts=options.trusts, float64=options.float64)
    # Imported after open_original, which has checked that onnx is installed.
    from shoal.convert import conversion as converting
    from shoal.convert.verdict import Bounds

    if (into / name).exists():
        raise AlreadyExists(f"{into / name} exists: remove it, or choose another --output or --name")
    rows, bounds = converting.Rows(options.sample, options.seed), Bounds(options.tolerance, options.max_flips)
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into, prefix=".converting-") as folder:
        conversion = converting.convert(original, path, name, Path(folder), rows, bounds)
        refused = conversion.chosen.refused
        if not as_json or refused:
            show_conversion(conversion, stderr=as_json)
        if refused:
            raise FailedPrecondition(f"{path.name} is refused: {refused}")
        shutil.move(conversion.folder, into / name)
    return dataclasses.replace(conversion, folder=into / name)


def show_conversion(conversion: Conversion, *, stderr: bool = False) -> None:
    """Print the model's inputs and outputs, and its drift from the original."""
    from rich.text import Text

    from shoal.convert.sample import written

    out = console(stderr=stderr)
    packages = ", ".join(f"{package} {version}" for package, version in conversion.packages.items())
    rest = f" ({conversion.framework}) -> {conversion.name}, {size(conversion.size_bytes)}; {packages}"
    out.print(Text.assemble((conversion.source.name, "bold"), rest))
    for role, ports in (("inputs ", conversion.inputs), ("outputs", conversion.outputs)):
        out.print(f"  {role} " + "; ".join(f"{port.name} {written(port)}" for port in ports), markup=False)
    calls = ", ".join(map(str, conversion.batches[:6])) + (", ..." if len(conversion.batches) > 6 else "")
    out.print(f"  checked on {sum(conversion.batches)} rows ({conversion.rows}), in calls of {calls}:", markup=False)
    drift_rows = []
    for tried in conversion.tried:
        for what, drift in (("", tried.drift), (", inputs rounded for both", tried.rounded)):
            if drift is not None:
                drift_rows += [(tried.plan + what, *row) for row in _rows(drift)]
    show(("conversion", "output", "max abs", "max relative", "label changes", "ties"), drift_rows, stderr=stderr)
    for tried in conversion.tried:
        verdict = f"refused: {tried.refused}" if tried.refused else f"accepted: {conversion.bounds}"
        out.print(f"  {tried.plan}: {verdict}", markup=False)
    for note in conversion.notes:
        out.print(f"  note: {note}", markup=False)


def _rows(drift: Drift) -> list[tuple[object, ...]]:
    return [
        (
            output.name,
            f"{output.max_abs:.2g}" if output.is_number else None,
            f"{output.max_relative:.2g}" if output.is_number else None,
            None if output.flips is None else f"{output.flips} of {drift.rows}",
            output.ties or None,
        )
        for output in drift.outputs
    ]


def as_document(conversion: Conversion) -> dict[str, Any]:
    """Return the report as JSON data."""
    document: dict[str, Any] = plain(conversion)
    for key in ("inputs", "outputs"):
        document[key] = [
            {
                "name": port.name,
                "dtype": "text" if port.dtype.kind == "O" else port.dtype.name,
                "shape": list(port.shape),
            }
            for port in getattr(conversion, key)
        ]
    return document


def provenance(conversion: Conversion) -> dict[str, str]:
    """Return the labels of the version's origin."""
    from shoal.convert import provenance

    return provenance.of_conversion(conversion)


def check_path(path: Path) -> None:
    """Reject a model file of an unsupported kind, with advice.

    Raises:
        InvalidArgument: the file is one.
    """
    if path.is_file() and (what := formats.advice(path)):
        raise InvalidArgument(f"{path}: {what}")
