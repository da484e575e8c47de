"""Properties of a model file's graph that ONNX Runtime does not report, found in its bytes without package onnx.

An .onnx file is a message of protobuf, an .ort file a buffer of FlatBuffers: https://onnxruntime.ai/docs/reference/ort-format-models.html
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

# DynamicQuantizeLinear, DynamicQuantizeLSTM and DynamicQuantizeMatMul take one scale for their whole input.
_DYNAMIC_QUANTIZE = b"DynamicQuantize"
# Their values are numbers of iterations, sizes of outputs, or lengths of texts to be generated.
_BY_VALUES = (
    b"(AffineGrid|BeamSearch|BlackmanWindow|CenterCropPad|Col2Im|ConstantOfShape|DFT|Expand|GreedySearch|HammingWindow"
    b"|HannWindow|Loop|MaxUnpool|MelWeightMatrix|NonMaxSuppression|OneHot|Pad|Range|Resize|STFT|Sampling|Tile|Upsample"
    b"|WhisperBeamSearch)"
)
# Before the name are the tag and the length, in one byte each; in an .ort file the length, in four.
_LONGEST_NAME = 127
_LENGTH_BYTES = 4
# Bytes 4 to 8 of an .ort file.
_ORT = b"ORTM"
# The search of a piece holds the GIL for less than a millisecond.
_PIECE_BYTES = 256 << 10
# Tag of NodeProto.op_type (field 4, a string) in onnx.proto.
_OP_TYPE = 0x22
_BY_VALUES_IN_ONNX = re.compile(b'"([\x03-\x7f])' + _BY_VALUES)
_BY_VALUES_IN_ORT = re.compile(b"([\x03-\x7f])\0\0\0" + _BY_VALUES)


def dynamic_quantizer(file: Path) -> str:
    """Return the name of an operator in `file` that quantizes whole batches dynamically; empty when there is none."""
    size_of = _size_in_ort if _is_ort(file) else _size_in_onnx
    for data in _pieces(file):
        at = data.find(_DYNAMIC_QUANTIZE)
        while at >= 0:
            size = size_of(data, at)
            if len(_DYNAMIC_QUANTIZE) <= size <= min(_LONGEST_NAME, len(data) - at):
                return data[at : at + size].decode(errors="replace")
            at = data.find(_DYNAMIC_QUANTIZE, at + 1)
    return ""


def operator_by_values(file: Path) -> str:
    """Return the name of an operator in `file` whose time depends on values, not only on shapes; empty without any.

    A loop may run for ever, and a tensor may have any size.
    """
    pattern = _BY_VALUES_IN_ORT if _is_ort(file) else _BY_VALUES_IN_ONNX
    for data in _pieces(file):
        for size, name in pattern.findall(data):
            if size[0] == len(name):
                found: bytes = name
                return found.decode()
    return ""


def _is_ort(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(8)[4:] == _ORT


def _pieces(file: Path) -> Iterator[bytes]:
    """Yield the content of `file` in pieces. A name may begin in one and end in the next: they overlap."""
    data = b""
    with file.open("rb") as opened:
        while piece := opened.read(_PIECE_BYTES):
            data = data[-(_LONGEST_NAME + _LENGTH_BYTES) :] + piece
            yield data


def _size_in_onnx(data: bytes, at: int) -> int:
    # Names of nodes and tensors have other tags.
    return data[at - 1] if at >= 2 and data[at - 2] == _OP_TYPE else 0


def _size_in_ort(data: bytes, at: int) -> int:
    # Names of nodes and tensors are not told apart from those of operators.
    return int.from_bytes(data[at - _LENGTH_BYTES : at], "little") if at >= _LENGTH_BYTES else 0
