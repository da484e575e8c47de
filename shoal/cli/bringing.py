"""Models of PyTorch, scikit-learn, XGBoost and LightGBM on the command line: converted, checked, and told of."""

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
        help="Check it on these rows (.npz, .npy, .csv). Default: random rows around what the model tells apart.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
Tolerance = Annotated[
    float,
    typer.Option(
        metavar="X", min=0.0, help="Largest relative drift from the original that is accepted.", rich_help_panel=_PANEL
    ),
]
MaxFlips = Annotated[
    int, typer.Option(metavar="N", min=0, help="Rows whose label may change, ties aside.", rich_help_panel=_PANEL)
]
Seed = Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the random rows.", rich_help_panel=_PANEL)]
TrustPickle = Annotated[
    bool,
    typer.Option(
        "--trust-pickle",
        help="Open a file that may run code as it is opened (.pt2, .joblib, .pkl): I know where it is from.",
        rich_help_panel=_PANEL,
    ),
]
Float64 = Annotated[
    bool,
    typer.Option("--float64", help="Serve float64 inputs (scikit-learn only).", rich_help_panel=_PANEL),
]


@dataclass(frozen=True)
class Wanted:
    """How a model is to be converted and checked."""

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
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the model's folder is written.")
    ] = Path(),
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's name. Default: that of the file.")
    ] = None,
    sample: Sample = None,
    tolerance: Tolerance = 1e-4,
    max_flips: MaxFlips = 0,
    seed: Seed = 0,
    trust_pickle: TrustPickle = False,
    float64: Float64 = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Convert a model to ONNX, check it against the original, and write it as a folder that `shoal serve` serves.

    `shoal models push` does the same, and pushes the result to a node.

    [bold]Examples[/bold]

      shoal models convert forest.joblib --trust-pickle --sample rows.csv -o ./models

      shoal models convert booster.json
    """
    wanted = Wanted(sample, tolerance, max_flips, seed, trust_pickle, float64)
    made = convert(path, output, name, wanted, as_json=json)
    if json:
        show_json(as_document(made))
    else:
        typer.echo(f"written to {made.folder}")


def convert(path: Path, into: Path, name: str | None, wanted: Wanted, *, as_json: bool) -> Conversion:
    """Converts `path` to `into`/<name> and prints the report, unless JSON is wanted. What is refused is not left there.

    Raises:
        AlreadyExists: there is such a folder.
        FailedPrecondition: it drifts too far; the report is printed then too, with JSON to standard error.
    """
    from shoal.client.models import bundle

    name = bundle.checked(name or path.stem)
    original = formats.open_original(path, trusts=wanted.trusts, float64=wanted.float64)
    # Now it is known that onnx is there, which this imports.
    from shoal.convert import conversion
    from shoal.convert.verdict import Bounds

    if (into / name).exists():
        raise AlreadyExists(f"{into / name} is there already: remove it, or give another --output or --name")
    rows, bounds = conversion.Rows(wanted.sample, wanted.seed), Bounds(wanted.tolerance, wanted.max_flips)
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into, prefix=".converting-") as folder:
        made = conversion.convert(original, path, name, Path(folder), rows, bounds)
        refused = made.stands.refused
        if not as_json or refused:
            show_conversion(made, stderr=as_json)
        if refused:
            raise FailedPrecondition(f"{path.name} is refused: {refused}")
        shutil.move(made.folder, into / name)
    return dataclasses.replace(made, folder=into / name)


def show_conversion(made: Conversion, *, stderr: bool = False) -> None:
    """Prints what was made and how near it is."""
    from shoal.convert.sample import written

    out = console(stderr=stderr)
    packages = ", ".join(f"{package} {version}" for package, version in made.packages.items())
    out.print(f"[bold]{made.source.name}[/bold] ({made.framework}) -> {made.name}, {size(made.size_bytes)}; {packages}")
    for role, ports in (("takes", made.inputs), ("answers", made.outputs)):
        out.print(f"  {role} " + "; ".join(f"{port.name} {written(port)}" for port in ports), markup=False)
    calls = ", ".join(map(str, made.batches[:6])) + (", ..." if len(made.batches) > 6 else "")
    out.print(f"  checked on {sum(made.batches)} rows ({made.rows}), in calls of {calls}:", markup=False)
    drift_rows = []
    for tried in made.tried:
        for what, drift in (("", tried.drift), (", inputs rounded for both", tried.rounded)):
            if drift is not None:
                drift_rows += [(tried.plan + what, *row) for row in _rows(drift)]
    show(("conversion", "output", "max abs", "max relative", "label changes", "ties"), drift_rows, stderr=stderr)
    for tried in made.tried:
        verdict = f"refused: {tried.refused}" if tried.refused else f"accepted: {made.bounds}"
        out.print(f"  {tried.plan}: {verdict}", markup=False)
    for note in made.notes:
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


def as_document(made: Conversion) -> dict[str, Any]:
    """The report for programs."""
    document: dict[str, Any] = plain(made)
    for key in ("inputs", "outputs"):
        document[key] = [
            {
                "name": port.name,
                "dtype": "text" if port.dtype.kind == "O" else port.dtype.name,
                "shape": list(port.shape),
            }
            for port in getattr(made, key)
        ]
    return document


def provenance(made: Conversion) -> dict[str, str]:
    """The labels that its version gets."""
    from shoal.convert import provenance

    return provenance.of_conversion(made)


def check_path(path: Path) -> None:
    """Says what to do with a file that is a model of no kind that is taken.

    Raises:
        InvalidArgument: it is such a file.
    """
    if path.is_file() and (what := formats.advice(path)):
        raise InvalidArgument(f"{path}: {what}")
