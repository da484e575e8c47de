"""Operation `byte_windows`: the first and last bytes of files as numbers, the input of file type classifiers.

    data  ──first `block` bytes──strip on the left ──> first `begin` of them, padded at the end
          ──last `block` bytes ──strip on the right──> last `end` of them, padded at the front

With the parameters of magika's models the result equals the features of the package `magika` (a test compares them).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import Field, model_validator

from services.infer.operators.operation import OperationContext, Results, spec
from services.infer.operators.parameters import Parameters
from services.infer.requests.ragged import Value, rows

_MAX = 1 << 20


class ByteWindowsParameters(Parameters):
    """Parameters of `byte_windows`."""

    begin: int = Field(1024, ge=0, le=_MAX)
    end: int = Field(1024, ge=0, le=_MAX)
    block: int = Field(4096, ge=1, le=_MAX)
    """Bytes that are read at each end."""
    strip: bool = True
    """White space at the outer ends is skipped."""
    padding: int = 256
    """Number for missing bytes: no byte is 256."""

    @model_validator(mode="after")
    def _fits(self) -> ByteWindowsParameters:
        if not self.begin + self.end > 0:
            raise ValueError("'begin' and 'end' are both 0: expected one of them to be 1 or more")
        if max(self.begin, self.end) > self.block:
            raise ValueError(f"'block' {self.block} is less than 'begin' or 'end': nothing could fill the window")
        return self


class ByteWindows:
    """BYTES to INT32 [begin + end], and the number of bytes in the first window."""

    is_batched = True
    only_computes = True
    inputs = (spec("data", "BYTES", 1),)

    def __init__(self, parameters: ByteWindowsParameters, context: OperationContext) -> None:
        self._parameters = parameters
        self.outputs = (spec("bytes", "INT32", parameters.begin + parameters.end), spec("length", "INT32", 1))

    def run(self, inputs: Mapping[str, Value]) -> Results:
        parameters = self._parameters
        data = [row.item() for row in rows(inputs["data"])]
        windows = np.full((len(data), parameters.begin + parameters.end), parameters.padding, np.int32)
        lengths = np.zeros((len(data), 1), np.int32)
        for n, content in enumerate(data):
            first, last = self._windows(content)
            windows[n, : len(first)] = np.frombuffer(first, np.uint8)
            windows[n, windows.shape[1] - len(last) :] = np.frombuffer(last, np.uint8)
            lengths[n] = len(first)
        return Results({"bytes": windows, "length": lengths})

    def example(self) -> Mapping[str, Value]:
        return {"data": np.array([[b"\0"]], object)}

    def _windows(self, data: bytes) -> tuple[bytes, bytes]:
        parameters = self._parameters
        first, last = data[: parameters.block], data[-parameters.block :]
        if parameters.strip:
            first, last = first.lstrip(), last.rstrip()
        return first[: parameters.begin], last[len(last) - min(parameters.end, len(last)) :]
