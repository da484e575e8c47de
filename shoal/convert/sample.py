"""Rows from a file: .npz (arrays by input name), .npy (the only input) or .csv (numbers, optionally with a header).

The rows are run in calls of 1, 2, 7 and then many rows, because a converted model may be wrong for some batch sizes
only.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from shoal.convert.original import Array, Port, Tensors
from shoal.errors import InvalidArgument, NotFound

FIRST_BATCHES = (1, 2, 7)
BATCH = 1024


def read(path: Path, inputs: Sequence[Port]) -> Tensors:
    """Return an array for each of `inputs`, with the file's types: float64 stays float64.

    Raises:
        NotFound: no such file.
        InvalidArgument: the file cannot be read, or does not fit the inputs; the message names the location.
    """
    if not path.is_file():
        raise NotFound(f"{path}: no such file")
    if path.suffix == ".csv":
        arrays: Tensors = {_only(path, inputs).name: _of_csv(path)}
    elif path.suffix in (".npz", ".npy"):
        arrays = _of_numpy(path, inputs)
    else:
        raise InvalidArgument(f"{path}: expected .npz, .npy or .csv")
    return fit(arrays, inputs, str(path))


def _only(path: Path, inputs: Sequence[Port]) -> Port:
    if len(inputs) != 1:
        names = ", ".join(port.name for port in inputs)
        raise InvalidArgument(f"{path}: the model has the inputs {names}: use an .npz file with these names")
    return inputs[0]


def _of_numpy(path: Path, inputs: Sequence[Port]) -> Tensors:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {_only(path, inputs).name: loaded}
        with loaded:
            arrays = {name: loaded[name] for name in loaded.files}
    except InvalidArgument:
        raise
    except Exception as err:
        # An invalid file may raise any error, such as zip, struct and syntax errors.
        raise InvalidArgument(f"{path}: NumPy cannot read it: {err}") from err
    # A single array needs no name.
    if len(arrays) == len(inputs) == 1:
        return {inputs[0].name: next(iter(arrays.values()))}
    return arrays


def _of_csv(path: Path) -> Array:
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = [(number, line) for number, line in enumerate(csv.reader(file), 1) if line]
    if lines and not _is_numbers(lines[0][1]):
        del lines[0]
    rows = [[_number(path, number, column, cell) for column, cell in enumerate(line, 1)] for number, line in lines]
    widths = {len(row) for row in rows}
    if len(widths) > 1:
        odd = next(number for (number, _), row in zip(lines, rows, strict=True) if len(row) != len(rows[0]))
        raise InvalidArgument(f"{path}: line {odd} has another number of cells than the first line")
    return np.array(rows, dtype=np.float64)


def _is_numbers(cells: Sequence[str]) -> bool:
    try:
        [float(cell or "nan") for cell in cells]
    except ValueError:
        return False
    return True


def _number(path: Path, line: int, column: int, cell: str) -> float:
    if not cell.strip():
        return math.nan
    try:
        return float(cell)
    except ValueError:
        raise InvalidArgument(f"{path}: line {line}, cell {column}: {cell!r} is no number") from None


def fit(arrays: Mapping[str, Array], inputs: Sequence[Port], where: str) -> Tensors:
    """Return those of `arrays` that `inputs` name, after a check of their shapes and types.

    Raises:
        InvalidArgument: an array is missing or unknown, or has another shape or type.
    """
    takes = "; ".join(f"{port.name} {written(port)}" for port in inputs)
    if unknown := arrays.keys() - {port.name for port in inputs}:
        raise InvalidArgument(f"{where}: the model has no input {', '.join(sorted(unknown))}: it takes {takes}")
    for port in inputs:
        if port.name not in arrays:
            raise InvalidArgument(f"{where}: no array {port.name!r}: the model takes {takes}")
        _check(arrays[port.name], port, where)
    return {port.name: arrays[port.name] for port in inputs}


def _check(array: Array, port: Port, where: str) -> None:
    text = array.dtype.kind in "OSU"
    if text != (port.dtype.kind == "O") or array.dtype.kind not in "OSUbiuf":
        raise InvalidArgument(f"{where}: {port.name!r} is {array.dtype}, the model takes {written(port)}")
    # A model of fixed shape takes one call from the file, or one from each element of the first dimension.
    shapes = (array.shape, array.shape[1:])
    if not any(fits(shape, port) for shape in (shapes if None not in port.shape[:1] else shapes[:1])):
        raise InvalidArgument(f"{where}: {port.name!r} is {list(array.shape)}, the model takes {written(port)}")
    if not array.size:
        raise InvalidArgument(f"{where}: {port.name!r} is empty")


def fits(shape: Sequence[int], port: Port) -> bool:
    """Return True when an array of `shape` fits `port`."""
    return len(shape) == len(port.shape) and all(
        want in (None, size) for size, want in zip(shape, port.shape, strict=True)
    )


def written(port: Port) -> str:
    """Return the type and shape of a port, such as `float32 [any, 30]`."""
    kind = "text" if port.dtype.kind == "O" else port.dtype.name
    return f"{kind} [{', '.join('any' if size is None else str(size) for size in port.shape)}]"


def calls(arrays: Mapping[str, Array], inputs: Sequence[Port], *, is_batched: bool) -> list[Tensors]:
    """Split `arrays` into the inputs of calls.

    Raises:
        InvalidArgument: the arrays have different numbers of rows.
    """
    if not is_batched and all(fits(arrays[port.name].shape, port) for port in inputs):
        return [dict(arrays)]
    counts = {name: len(array) for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        raise InvalidArgument(
            "the inputs have different numbers of rows: " + ", ".join(f"{n} {c}" for n, c in counts.items())
        )
    count = next(iter(counts.values()))
    if not is_batched:
        return [{name: array[n] for name, array in arrays.items()} for n in range(count)]
    return [{name: array[start:end] for name, array in arrays.items()} for start, end in _spans(count)]


def _spans(count: int) -> Iterator[tuple[int, int]]:
    start = 0
    for size in FIRST_BATCHES:
        if start < count:
            yield start, min(start + size, count)
            start += size
    while start < count:
        yield start, min(start + BATCH, count)
        start += BATCH
