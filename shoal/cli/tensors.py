"""Inputs of models from a command line or a file, and outputs of models for a terminal or a file.

    '{"x": [[1, 2]]}'                           arrays by input name
    '[[1, 2]]'                                  the only input of a model that has one
    '{"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}'       the protocol's REST form
    file.json, file.npy (one input), file.npz (arrays by input name), - (any of them on standard input)

Datatypes and a missing batch dimension are taken from the model's metadata. In JSON, `{"b64": "..."}` means bytes.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shoal.cli import explanation
from shoal.cli.output import console, of_bytes, show, show_json, text
from shoal.client import BFloat16, InferResult, ModelMetadata, TensorMetadata
from shoal.client.inference.inference import Parameter
from shoal.errors import FailedPrecondition, InvalidArgument, NotFound


@dataclass(frozen=True)
class ParsedInput:
    """Parsed input. `alone` is a single input without a name."""

    inputs: Mapping[str, Any] = field(default_factory=dict)
    alone: Any = None
    outputs: Sequence[str] | None = None
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    request_id: str = ""
    datatypes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RequestInputs:
    """Arrays and datatypes by input name, complete for a request."""

    inputs: dict[str, Any]
    datatypes: dict[str, str]


def read(written: str) -> ParsedInput:
    """Parse `written`: JSON, a file's name, or `-` for standard input.

    Raises:
        InvalidArgument: `written` is malformed or in no known format; the message says where.
        NotFound: no such file.
    """
    if written == "-":
        return _of_data(sys.stdin.buffer.read(), "standard input")
    if written.lstrip()[:1] in ("{", "["):
        return _of_json(written, "INPUT")
    path = Path(written)
    try:
        return _of_data(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise NotFound(f"{written}: no such file; JSON starts with {{ or [") from None
    except OSError as err:
        raise InvalidArgument(f"cannot read {path}: {err.strerror}") from err


def of_line(line: str, source: str) -> ParsedInput:
    """Parse one line of JSON, in the forms that `read` accepts.

    Raises:
        InvalidArgument: the line is malformed; the message says where.
    """
    return _of_json(line, source)


def _of_data(data: bytes, source: str) -> ParsedInput:
    if data.startswith((b"\x93NUMPY", b"PK\x03\x04", b"PK\x05\x06")):
        return _of_numpy(data, source)
    try:
        return _of_json(data.decode(), source)
    except UnicodeDecodeError:
        raise InvalidArgument(f"{source}: neither JSON nor .npy nor .npz") from None


def _of_numpy(data: bytes, source: str) -> ParsedInput:
    try:
        loaded = np.load(io.BytesIO(data), allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return ParsedInput(alone=loaded)
        with loaded:
            return ParsedInput(inputs={name: loaded[name] for name in loaded.files})
    # NumPy raises zip, struct and syntax errors, among others, for invalid files.
    except Exception as err:
        raise InvalidArgument(f"{source}: NumPy cannot read it: {err}") from err


def _of_json(written: str, source: str) -> ParsedInput:
    try:
        document = _decoded(json.loads(written))
    except (ValueError, RecursionError) as err:
        raise InvalidArgument(f"{source} is not JSON: {err}") from err
    if isinstance(document, list):
        return ParsedInput(alone=document)
    if not isinstance(document, dict):
        raise InvalidArgument(f"{source}: expected an object of inputs by name, or one list")
    inputs = document.get("inputs")
    if isinstance(inputs, list) and inputs and all(isinstance(each, dict) and "name" in each for each in inputs):
        return _of_protocol(document, inputs, source)
    return ParsedInput(inputs=document)


def _decoded(value: Any) -> Any:
    """Return `value` with each `{"b64": ...}` replaced by its bytes."""
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {"b64"} and isinstance(value["b64"], str):
            try:
                return base64.b64decode(value["b64"], validate=True)
            except binascii.Error as err:
                raise ValueError(f"b64 {value['b64'][:20]!r}: {err}") from err
        return {key: _decoded(item) for key, item in value.items()}
    return value


def _of_protocol(document: dict[str, Any], tensors: list[dict[str, Any]], source: str) -> ParsedInput:
    inputs: dict[str, Any] = {}
    datatypes: dict[str, str] = {}
    for tensor in tensors:
        name = str(tensor["name"])
        if "data" not in tensor:
            raise InvalidArgument(f"{source}: input {name!r} has no `data`")
        inputs[name] = _shaped(name, tensor["data"], tensor.get("shape"))
        if tensor.get("datatype"):
            datatypes[name] = str(tensor["datatype"])
    outputs = document.get("outputs") or []
    try:
        output_names = [str(output["name"]) for output in outputs] or None
    except (TypeError, KeyError):
        raise InvalidArgument(f"{source}: expected `outputs` to be a list of objects with a `name`") from None
    parameters = document.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise InvalidArgument(f"{source}: expected `parameters` to be an object")
    return ParsedInput(inputs, None, output_names, parameters, str(document.get("id") or ""), datatypes)


def _shaped(name: str, data: Any, shape: Any) -> Any:
    array = as_array(name, data)
    if shape is None:
        return array
    try:
        return array.reshape([int(size) for size in shape])
    except (TypeError, ValueError):
        message = f"input {name!r}: {array.size} elements of data do not have the shape {shape}"
        raise InvalidArgument(message) from None


def as_array(name: str, data: Any) -> Any:
    """Return `data` as an array. Raises InvalidArgument when its rows have different lengths."""
    if isinstance(data, np.ndarray):
        return data
    try:
        # Bytes become objects: NumPy's own type for bytes drops trailing zeros.
        holds_bytes = _first(data)
        return np.array(data, dtype=object) if isinstance(holds_bytes, bytes | str) else np.asarray(data)
    except ValueError as err:
        raise InvalidArgument(f"input {name!r}: rows must have equal lengths") from err


def _first(data: Any) -> Any:
    while isinstance(data, list) and data:
        data = data[0]
    return data


def fit(parsed: ParsedInput, metadata: ModelMetadata) -> RequestInputs:
    """Return the inputs by name, with the model's datatypes and a batch dimension where it was left out.

    Raises:
        InvalidArgument: the model does not have an input, or an input needs a name; the message names it.
    """
    known = {tensor.name: tensor for tensor in metadata.inputs}
    expected = "; ".join(f"{each.name} {each.datatype} {list(each.shape)}" for each in metadata.inputs) or "nothing"
    inputs = dict(parsed.inputs)
    if parsed.alone is not None:
        if len(known) != 1:
            raise InvalidArgument(f"the input needs a name: {metadata.name} takes {expected}")
        inputs = {next(iter(known)): parsed.alone}
    datatypes: dict[str, str] = {}
    for name, value in inputs.items():
        if name not in known:
            raise InvalidArgument(f"{metadata.name} has no input {name!r}: it takes {expected}")
        inputs[name] = _batched(as_array(name, value), known[name])
        datatypes[name] = parsed.datatypes.get(name) or known[name].datatype
    return RequestInputs(inputs, datatypes)


def _batched(array: Any, expected: TensorMetadata) -> Any:
    """Return `array` with a batch dimension of 1 in front, when only that dimension is missing."""
    fits = len(expected.shape) == array.ndim + 1 and expected.shape[0] in (-1, 1)
    if fits and all(dim in (-1, size) for dim, size in zip(expected.shape[1:], array.shape, strict=True)):
        return array[np.newaxis]
    return array


def of_options(parsed: Sequence[str], option: str) -> dict[str, Parameter]:
    """Return `KEY=VALUE` options as parameters: booleans and numbers in JSON's form are parsed, all else is text.

    Raises:
        InvalidArgument: an option is not of that form.
    """
    from shoal.cli.output import pairs

    found: dict[str, Parameter] = {}
    for key, value in pairs(parsed, option).items():
        try:
            decoded = json.loads(value)
        except ValueError:
            decoded = value
        found[key] = decoded if isinstance(decoded, bool | int | float | str) else value
    return found


def show_result(result: InferResult, *, as_json: bool, output: Path | None) -> None:
    """Print a result, and write it to the file `output`, if any.

    Raises:
        InvalidArgument, FailedPrecondition: the file cannot be written.
    """
    if output is not None:
        write(result, output)
    if as_json:
        show_json(as_document(result))
        return
    rows = [
        (name, result.datatypes.get(name, ""), str(list(array.shape)), _values(result, name))
        for name, array in result.outputs.items()
    ]
    show(("output", "datatype", "shape", "values"), rows, empty="no outputs")
    about = [f"{result.model_name} version {result.model_version or '?'}"]
    about += [f"{key} {text(value)}" for key, value in explanation.others(result.parameters).items()]
    console().print(", ".join(about), markup=False)
    if explained := explanation.rows(result.parameters):
        show(("explained", ""), explained)
    if steps := explanation.steps(result.parameters):
        show(explanation.STEP_COLUMNS, steps)


def as_document(result: InferResult) -> dict[str, Any]:
    """Return a result in the protocol's REST form, with nested data."""
    return {
        "model_name": result.model_name,
        "model_version": result.model_version,
        "id": result.id,
        "parameters": dict(result.parameters),
        "outputs": [
            {
                "name": name,
                "datatype": result.datatypes.get(name, ""),
                "shape": list(array.shape),
                "data": _readable(result, name).tolist(),
            }
            for name, array in result.outputs.items()
        ],
    }


def _readable(result: InferResult, name: str) -> Any:
    array = result.outputs[name]
    return BFloat16(array).float32() if result.datatypes.get(name) == "BF16" else array


def _values(result: InferResult, name: str) -> str:
    array = _readable(result, name)
    if array.dtype == object:
        cells = [str(of_bytes(element)) for element in array.reshape(-1)[:9]]
        array = np.array(cells, dtype=object) if array.size > 8 else np.array(cells, dtype=object).reshape(array.shape)
    return np.array2string(array, threshold=24, edgeitems=3, precision=6, suppress_small=True)


def write(result: InferResult, path: Path) -> None:
    """Write all outputs to an .npz file, a single output to an .npy file, or the whole result to a .json file."""
    try:
        if path.suffix == ".json":
            from shoal.cli.output import plain

            path.write_text(json.dumps(plain(as_document(result))))
        elif path.suffix == ".npz":
            np.savez(path, **{name: _storable(array) for name, array in result.outputs.items()})
        elif path.suffix == ".npy":
            if len(result.outputs) != 1:
                raise InvalidArgument(f"{path}: {len(result.outputs)} outputs need an .npz or .json file")
            np.save(path, _storable(next(iter(result.outputs.values()))))
        else:
            raise InvalidArgument(f"{path}: expected a name that ends in .npz, .npy or .json")
    except OSError as err:
        raise FailedPrecondition(f"cannot write {path}: {err.strerror}") from err


def _storable(array: Any) -> Any:
    # NumPy would pickle an object array, and loading a pickle is unsafe.
    return array.astype(np.bytes_) if array.dtype == object else array
