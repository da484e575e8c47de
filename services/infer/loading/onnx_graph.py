"""Properties of a model file's graph that ONNX Runtime does not report, found in its bytes without package onnx.

An .onnx file is a message of protobuf, an .ort file a buffer of FlatBuffers: https://onnxruntime.ai/docs/reference/ort-format-models.html
"""

from __future__ import annotations

from pathlib import Path

# DynamicQuantizeLinear, DynamicQuantizeLSTM and DynamicQuantizeMatMul take one scale for their whole input.
_DYNAMIC_QUANTIZE = b"DynamicQuantize"
# Before the name are the tag and the length, in one byte each; in an .ort file the length, in four.
_LONGEST_NAME = 127
_LENGTH_BYTES = 4
# Bytes 4 to 8 of an .ort file.
_ORT = b"ORTM"
# The search of a piece holds the GIL for less than a millisecond.
_PIECE_BYTES = 1 << 20
# Tag of NodeProto.op_type (field 4, a string) in onnx.proto.
_OP_TYPE = 0x22


def dynamic_quantizer(file: Path) -> str:
    """Return the name of an operator in `file` that quantizes whole batches dynamically; empty when there is none."""
    data = b""
    with file.open("rb") as opened:
        size_of = _size_in_ort if opened.read(8)[4:] == _ORT else _size_in_onnx
        opened.seek(0)
        while piece := opened.read(_PIECE_BYTES):
            # A name may begin in one piece and end in the next.
            data = data[-(_LONGEST_NAME + _LENGTH_BYTES) :] + piece
            at = data.find(_DYNAMIC_QUANTIZE)
            while at >= 0:
                size = size_of(data, at)
                if len(_DYNAMIC_QUANTIZE) <= size <= min(_LONGEST_NAME, len(data) - at):
                    return data[at : at + size].decode(errors="replace")
                at = data.find(_DYNAMIC_QUANTIZE, at + 1)
    return ""


def _size_in_onnx(data: bytes, at: int) -> int:
    # Names of nodes and tensors have other tags.
    return data[at - 1] if at >= 2 and data[at - 2] == _OP_TYPE else 0


def _size_in_ort(data: bytes, at: int) -> int:
    # Names of nodes and tensors are not told apart from those of operators.
    return int.from_bytes(data[at - _LENGTH_BYTES : at], "little") if at >= _LENGTH_BYTES else 0
