"""ONNX Runtime's arena keeps the memory of the largest run; it is returned while nothing runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from mesh.process.freed_memory import _resident_bytes, return_freed_memory
from services.infer.model_files.wanted_models import WantedModel
from services.infer.models.load_context import LoadContext
from services.infer.models.models import Models
from services.infer.runtimes.onnx_runtime import OnnxRuntime
from services.infer.runtimes.runtime import Session, SessionOptions
from services.infer.scheduling.queue import QueueLimits
from tests.infer import onnx_files
from tests.infer.models.test_models import Files
from tests.infer.runtimes.test_runtime_contract import Reshaping, Spreading

ROWS = 1 << 21
"""Their 4 numbers take 32 MiB."""


def run(session: Session, rows: int) -> None:
    (found,) = session.run({"x": np.ones((rows, 4), np.float32)}, ["y"])
    np.testing.assert_array_equal(found[-1], [3, 3, 3, 3])


def kept() -> int:
    return_freed_memory()
    return _resident_bytes()


@pytest.mark.parametrize("runtime", [OnnxRuntime, Reshaping, Spreading])
def test_memory_of_a_large_run_is_returned_and_the_model_goes_on(runtime: type[OnnxRuntime], tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    onnx.save(onnx_files.scale(3), file)
    session = runtime().load(file, SessionOptions(intra_op_threads=1))
    try:
        # As the warm-up does, on each device: an arena keeps its first region.
        run(session, 1)
        run(session, 1)
        before = kept()
        run(session, ROWS)
        large = kept()
        assert large > before + 2 * ROWS
        session.shrink()
        assert kept() < before + (large - before) / 4
        run(session, 2)
    finally:
        session.close()
    session.shrink()


async def test_all_models_of_an_instance_return_memory(tmp_path: Path) -> None:
    async with Models(LoadContext.of(OnnxRuntime(), QueueLimits())) as models:
        models.want([WantedModel("m", (Files(tmp_path).version(1, onnx_files.scale(3)),), frozenset({1}))])
        await models.settled()
        session = models.find("m", "").loaded.session
        assert session is not None
        before = kept()
        run(session, ROWS)
        large = kept()
        models.shrink()
        assert kept() < before + (large - before) / 4
