"""Files beside a converted model: labels of classes, for classification requests, and their config.pbtxt."""

from __future__ import annotations

from pathlib import Path

from shoal.convert.onnx_model import OnnxModel
from shoal.convert.original import Original, Port

MAX_BATCH_SIZE = 64
"""Largest batch size, equal to infer's default for a model without configuration."""

_TYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "uint16": "TYPE_UINT16",
    "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64",
    "int8": "TYPE_INT8",
    "int16": "TYPE_INT16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "object": "TYPE_STRING",
}


def write_beside(folder: Path, original: Original, converted: OnnxModel) -> None:
    """Write `labels_<output>.txt` for each output with classes, and a config.pbtxt that names these files.

    A config.pbtxt is also written to limit the batch size of a model that takes few rows. Otherwise no file is needed:
    infer reads the configuration from the .onnx file.
    """
    labelled = {name: names for name, names in original.classes.items() if names and _is_plain(names)}
    max_rows = min(original.max_rows, MAX_BATCH_SIZE)
    if not labelled and (max_rows == MAX_BATCH_SIZE or not original.is_batched):
        return
    for name, names in labelled.items():
        (folder / _file(name)).write_text("".join(f"{each}\n" for each in names))
    skip = 1 if original.is_batched else 0
    lines = [f"max_batch_size: {max_rows if original.is_batched else 0}"]
    lines += [_tensor("input", port, skip, "") for port in converted.inputs]
    lines += [
        _tensor("output", port, skip, _file(port.name) if port.name in labelled else "") for port in converted.outputs
    ]
    (folder / "config.pbtxt").write_text("\n".join(lines) + "\n")


def _is_plain(names: object) -> bool:
    return all("\n" not in name and name for name in names)  # type: ignore[attr-defined]


def _file(output: str) -> str:
    return f"labels_{output}.txt"


def _tensor(role: str, port: Port, skip: int, labels: str) -> str:
    dims = ", ".join(str(-1 if size is None else size) for size in port.shape[skip:])
    shape = f" dims: [ {dims} ]" if dims else ""
    label_file = f' label_filename: "{labels}"' if labels else ""
    return f'{role} [ {{ name: "{port.name}" data_type: {_TYPES[port.dtype.name]}{shape}{label_file} }} ]'
