"""Properties of an .onnx file's graph that ONNX Runtime does not report, found in its bytes without package onnx."""

from __future__ import annotations

from pathlib import Path

# DynamicQuantizeLinear, DynamicQuantizeLSTM and DynamicQuantizeMatMul take one scale for their whole input.
_DYNAMIC_QUANTIZE = b"DynamicQuantize"
# Before the name are the tag and the length, in one byte each.
_LONGEST_NAME = 127
# The search of a piece holds the GIL for less than a millisecond.
_PIECE_BYTES = 1 << 20
# Tag of NodeProto.op_type (field 4, a string) in onnx.proto.
_OP_TYPE = 0x22


def dynamic_quantizer(file: Path) -> str:
    """Return the name of an operator in `file` that quantizes whole batches dynamically; empty when there is none."""
    data = b""
    with file.open("rb") as opened:
        while piece := opened.read(_PIECE_BYTES):
            # A name may begin in one piece and end in the next.
            data = data[-(_LONGEST_NAME + 2) :] + piece
            if name := _operator(data):
                return name
    return ""


def _operator(data: bytes) -> str:
    at = data.find(_DYNAMIC_QUANTIZE)
    while at >= 0:
        size = data[at - 1] if at >= 2 else 0
        # Names of nodes and tensors have other tags.
        if data[at - 2] == _OP_TYPE and len(_DYNAMIC_QUANTIZE) <= size <= min(_LONGEST_NAME, len(data) - at):
            return data[at : at + size].decode(errors="replace")
        at = data.find(_DYNAMIC_QUANTIZE, at + 1)
    return ""
