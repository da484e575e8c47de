"""The first and last bytes of files, as numbers: what classifiers of file types look at.

    data  ──first `block` bytes──strip on the left ──> first `begin` of them, padded at the end
          ──last `block` bytes ──strip on the right──> last `end` of them, padded at the front

With the parameters of magika's models this gives what the package `magika` gives its own (a test holds it).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import Field, model_validator

from services.infer.operators.operation import Results, Setting, spec
from services.infer.operators.parameters import Parameters
from services.infer.requests.ragged import Value, rows

_MOST = 1 << 20


class ByteWindowsParameters(Parameters):
    """Of `byte_windows`."""

    begin: int = Field(1024, ge=0, le=_MOST)
    end: int = Field(1024, ge=0, le=_MOST)
    block: int = Field(4096, ge=1, le=_MOST)
    """How far is looked, at either end."""
    strip: bool = True
    """White space at the outer ends does not count."""
    padding: int = 256
    """In place of bytes that are not there: no byte is 256."""

    @model_validator(mode="after")
    def _fits(self) -> ByteWindowsParameters:
        if not self.begin + self.end > 0:
            raise ValueError("'begin' and 'end' are both 0: expected one of them to be 1 or more")
        if max(self.begin, self.end) > self.block:
            raise ValueError(f"'block' {self.block} is less than 'begin' or 'end': nothing could fill the window")
        return self


class ByteWindows:
    """BYTES to INT32 [begin + end]; and how many of the first window are bytes."""

    is_batched = True
    only_computes = True
    inputs = (spec("data", "BYTES", 1),)

    def __init__(self, parameters: ByteWindowsParameters, setting: Setting) -> None:
        self._parameters = parameters
        self.outputs = (spec("bytes", "INT32", parameters.begin + parameters.end), spec("length", "INT32", 1))

    def run(self, inputs: Mapping[str, Value]) -> Results:
        asked = self._parameters
        data = [row.item() for row in rows(inputs["data"])]
        windows = np.full((len(data), asked.begin + asked.end), asked.padding, np.int32)
        lengths = np.zeros((len(data), 1), np.int32)
        for number, each in enumerate(data):
            first, last = self._windows(each)
            windows[number, : len(first)] = np.frombuffer(first, np.uint8)
            windows[number, windows.shape[1] - len(last) :] = np.frombuffer(last, np.uint8)
            lengths[number] = len(first)
        return Results({"bytes": windows, "length": lengths})

    def example(self) -> Mapping[str, Value]:
        return {"data": np.array([[b"\0"]], object)}

    def _windows(self, data: bytes) -> tuple[bytes, bytes]:
        asked = self._parameters
        first, last = data[: asked.block], data[-asked.block :]
        if asked.strip:
            first, last = first.lstrip(), last.rstrip()
        return first[: asked.begin], last[len(last) - min(asked.end, len(last)) :]
