"""Properties of an .onnx file's graph that ONNX Runtime does not report, found in its bytes without package onnx."""

from __future__ import annotations

import mmap
from pathlib import Path

# DynamicQuantizeLinear, DynamicQuantizeLSTM and DynamicQuantizeMatMul take one scale for their whole input.
_DYNAMIC_QUANTIZE = b"DynamicQuantize"
# Tag of NodeProto.op_type (field 4, a string) in onnx.proto.
_OP_TYPE = 0x22


def dynamic_quantizer(file: Path) -> str:
    """Return the name of an operator in `file` that quantizes whole batches dynamically; empty when there is none."""
    with file.open("rb") as opened:
        # An empty file cannot be mapped.
        if not file.stat().st_size:
            return ""
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            at = data.find(_DYNAMIC_QUANTIZE)
            while at >= 0:
                # Before the name: the tag and the length in one byte each. Names of nodes and tensors have other tags.
                if at >= 2 and data[at - 2] == _OP_TYPE and len(_DYNAMIC_QUANTIZE) <= data[at - 1] < 128:
                    return data[at : at + data[at - 1]].decode(errors="replace")
                at = data.find(_DYNAMIC_QUANTIZE, at + 1)
    return ""
