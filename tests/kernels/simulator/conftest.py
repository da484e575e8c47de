"""Operations called here run numba.cuda's version, in the simulator, on NumPy arrays."""

from __future__ import annotations

import pytest

from kernels import numba_launch
from kernels.backend import Operation


@pytest.fixture(autouse=True)
def _in_the_simulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Operation, "version", lambda self, stream=None, **arrays: self.load("cuda"))
    monkeypatch.setattr(numba_launch, "stream_of", lambda stream: 0)  # There are none, and no CuPy.
    monkeypatch.setattr(numba_launch, "MOST_BLOCKS_Y", 3)  # So that few rows are more than one launch has.
