"""Inputs as people write them on a command line, outputs as they read them there.

    '{"x": [[1, 2]]}'                           arrays by input name
    '[[1, 2]]'                                  the one input of a model that has one
    '{"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}'       as the protocol's REST form
    file.json, file.npy (one input), file.npz (arrays by input name), - (any of them on standard input)

Datatypes and a missing batch dimension come from the model's metadata. In JSON `{"b64": "..."}` stands for bytes.
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
class Given:
    """What was written. `alone` is an input that was given without its name."""

    inputs: Mapping[str, Any] = field(default_factory=dict)
    alone: Any = None
    outputs: Sequence[str] | None = None
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    request_id: str = ""
    datatypes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ready:
    """What can be sent."""

    inputs: dict[str, Any]
    datatypes: dict[str, str]


def read(written: str) -> Given:
    """What `written` (JSON, a file's name, or `-`) holds.

    Raises:
        InvalidArgument: it is none of these, or malformed; the message says where.
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


def of_line(line: str, source: str) -> Given:
    """What one line of JSON holds, as `read` takes it.

    Raises:
        InvalidArgument: it is malformed; the message says where.
    """
    return _of_json(line, source)


def _of_data(data: bytes, source: str) -> Given:
    if data.startswith((b"\x93NUMPY", b"PK\x03\x04", b"PK\x05\x06")):
        return _of_numpy(data, source)
    try:
        return _of_json(data.decode(), source)
    except UnicodeDecodeError:
        raise InvalidArgument(f"{source}: neither JSON nor .npy nor .npz") from None


def _of_numpy(data: bytes, source: str) -> Given:
    try:
        loaded = np.load(io.BytesIO(data), allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return Given(alone=loaded)
        with loaded:
            return Given(inputs={name: loaded[name] for name in loaded.files})
    except Exception as err:  # A foreign file may raise anything: zip, struct and syntax errors among them.
        raise InvalidArgument(f"{source}: NumPy cannot read it: {err}") from err


def _of_json(written: str, source: str) -> Given:
    try:
        document = _decoded(json.loads(written))
    except (ValueError, RecursionError) as err:
        raise InvalidArgument(f"{source} is not JSON: {err}") from err
    if isinstance(document, list):
        return Given(alone=document)
    if not isinstance(document, dict):
        raise InvalidArgument(f"{source}: expected an object of inputs by name, or one list")
    inputs = document.get("inputs")
    if isinstance(inputs, list) and inputs and all(isinstance(each, dict) and "name" in each for each in inputs):
        return _of_protocol(document, inputs, source)
    return Given(inputs=document)


def _decoded(value: Any) -> Any:
    """`value` with `{"b64": ...}` replaced by its bytes."""
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


def _of_protocol(document: dict[str, Any], tensors: list[dict[str, Any]], source: str) -> Given:
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
        wanted = [str(output["name"]) for output in outputs] or None
    except (TypeError, KeyError):
        raise InvalidArgument(f"{source}: expected `outputs` to be a list of objects with a `name`") from None
    parameters = document.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise InvalidArgument(f"{source}: expected `parameters` to be an object")
    return Given(inputs, None, wanted, parameters, str(document.get("id") or ""), datatypes)


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
    """`data` as an array. Raises InvalidArgument when its rows have different lengths."""
    if isinstance(data, np.ndarray):
        return data
    try:
        # Bytes become objects: NumPy's own type for them drops zeros at the end.
        holds_bytes = _first(data)
        return np.array(data, dtype=object) if isinstance(holds_bytes, bytes | str) else np.asarray(data)
    except ValueError as err:
        raise InvalidArgument(f"input {name!r}: rows must have equal lengths") from err


def _first(data: Any) -> Any:
    while isinstance(data, list) and data:
        data = data[0]
    return data


def fit(given: Given, metadata: ModelMetadata) -> Ready:
    """The inputs by name, in the datatype that the model asks for, with the batch dimension that was left out.

    Raises:
        InvalidArgument: names the input that the model does not have, or that needs a name.
    """
    known = {tensor.name: tensor for tensor in metadata.inputs}
    takes = "; ".join(f"{each.name} {each.datatype} {list(each.shape)}" for each in metadata.inputs) or "nothing"
    inputs = dict(given.inputs)
    if given.alone is not None:
        if len(known) != 1:
            raise InvalidArgument(f"say which input that is: {metadata.name} takes {takes}")
        inputs = {next(iter(known)): given.alone}
    datatypes: dict[str, str] = {}
    for name, value in inputs.items():
        if name not in known:
            raise InvalidArgument(f"{metadata.name} has no input {name!r}: it takes {takes}")
        inputs[name] = _batched(as_array(name, value), known[name])
        datatypes[name] = given.datatypes.get(name) or known[name].datatype
    return Ready(inputs, datatypes)


def _batched(array: Any, asked: TensorMetadata) -> Any:
    """With a batch dimension of 1 in front, when that is all that is missing."""
    fits = len(asked.shape) == array.ndim + 1 and asked.shape[0] in (-1, 1)
    if fits and all(want in (-1, got) for want, got in zip(asked.shape[1:], array.shape, strict=True)):
        return array[np.newaxis]
    return array


def of_options(given: Sequence[str], option: str) -> dict[str, Parameter]:
    """`KEY=VALUE` options as parameters: true, false and numbers are what they look like, all else is text.

    Raises:
        InvalidArgument: one is not of that form.
    """
    from shoal.cli.output import pairs

    found: dict[str, Parameter] = {}
    for key, value in pairs(given, option).items():
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        found[key] = parsed if isinstance(parsed, bool | int | float | str) else value
    return found


def show_result(result: InferResult, *, as_json: bool, output: Path | None) -> None:
    """Prints an answer, and writes it to `output` when that is given.

    Raises:
        InvalidArgument, FailedPrecondition: it cannot be written there.
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
    if told := explanation.rows(result.parameters):
        show(("explained", ""), told)
    if steps := explanation.steps(result.parameters):
        show(explanation.STEP_COLUMNS, steps)


def as_document(result: InferResult) -> dict[str, Any]:
    """The answer in the protocol's REST form, its data nested as its shape is."""
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
    """Writes the outputs to an .npz, one output to an .npy, or the whole answer to a .json file."""
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
    # Object arrays would be pickled, and no careful reader loads a pickle.
    return array.astype(np.bytes_) if array.dtype == object else array
