"""Where operations run: a GPU that is asked for is used, or its absence is said; never a silent CPU."""

from __future__ import annotations

import json

import numpy as np
import pytest

from services.infer.operators.table import OPERATIONS
from services.infer.requests.resident import Resident, fetched
from services.infer.runtimes.runtime import ExecutionPlacement
from shoal.errors import FailedPrecondition
from tests.infer.operators import making
from tests.infer.operators.images import pixels
from tests.infer.runtimes.simulated_gpu import SimulatedMemory, gpu_streams_of

RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


ON_GPUS = {
    "nms": ({}, {"boxes": [np.abs(floats(50, 4)).cumsum(1)], "scores": [floats(50)]}),
    "pad_tokens": ({}, {"input_ids": [np.arange(5), np.arange(19)]}),
    "pool_normalize": ({}, {"token_embeddings": floats(3, 7, 32), "attention_mask": RNG.integers(0, 2, (3, 7))}),
    "quantize_rows": ({}, {"values": floats(4, 33)}),
    "resize_norm": ({"fit": "letterbox", "size": "32, 48"}, {"image": [pixels(30, 90), pixels(64, 20), pixels(5, 5)]}),
    "softmax_topk": ({"k": "7"}, {"logits": floats(3, 100)}),
    "tabular": ({}, {"numbers": floats(3, 2), "codes": RNG.integers(0, 4, (3, 1))}),
}
"""Parameters and inputs."""
NEEDED = {"ctc_decode": {"characters": "keys.txt"}}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tabular.json").write_text(json.dumps({"mean": [1, 2], "std": [3, 4], "categories": [[0, 1, 2]]}))
    (tmp_path / "keys.txt").write_text("a\n")
    return tmp_path


def test_all_that_can_run_on_gpus_is_held_against_the_cpu():
    assert ON_GPUS.keys() == {name for name, entry in OPERATIONS.items() if entry.has_gpu}


@pytest.mark.gpu
@pytest.mark.parametrize("operation", ON_GPUS)
def test_a_gpu_gives_what_the_cpu_gives(folder, operation):
    parameters, inputs = ON_GPUS[operation]
    on_gpu = making.session(folder, operation, placements=(ExecutionPlacement("gpu", 0),), **parameters)
    assert on_gpu.gpus == (0,)
    there = making.run(on_gpu, **inputs)
    here = making.run(making.session(folder, operation, **parameters), **inputs)
    for name, value in here.items():
        for row, other in zip(value, there[name], strict=True):
            np.testing.assert_allclose(other, row, atol=1e-4)


@pytest.mark.parametrize("operation", ON_GPUS)
def test_tensors_are_taken_and_left_on_a_gpu(folder, operation):
    """On a simulated one: what is computed is the CPU's; what is copied, and who may read it, is the GPU's."""
    parameters, inputs = ON_GPUS[operation]
    memory = SimulatedMemory()
    session = making.session(
        folder, operation, placements=(ExecutionPlacement("gpu", 0),), lanes=gpu_streams_of(memory), **parameters
    )
    lane = session.gpu_stream
    assert (session.gpus, session.only_computes) == ((0,), False)
    there = {
        spec.name: Resident(lane.uploaded(inputs[spec.name]), lane) if not spec.is_ragged else inputs[spec.name]
        for spec in session.inputs
        if spec.name in inputs
    }
    dense = [spec.name for spec in session.outputs if not spec.is_ragged]
    names = [spec.name for spec in session.outputs]
    memory.forget()
    results = session.run_rows(there, names, dense)
    assert not results.unfit
    if not any(spec.is_ragged for spec in (*session.inputs, *session.outputs)):
        assert (memory.copies_in, memory.copies_out) == (0, 0)
        assert all(isinstance(value, Resident) for value in results.values)
    here = making.run(making.session(folder, operation, **parameters), **inputs)
    for name, value in zip(names, fetched(results.values), strict=True):
        for row, other in zip(here[name], value, strict=True):
            np.testing.assert_array_equal(other, row)


@pytest.mark.parametrize("operation", sorted(OPERATIONS.keys() - ON_GPUS))
def test_without_a_version_for_gpus_one_is_refused(folder, operation):
    with pytest.raises(FailedPrecondition, match=f"operation {operation} has no version for GPUs: use KIND_CPU"):
        making.session(folder, operation, placements=(ExecutionPlacement("gpu"),), **NEEDED.get(operation, {}))


@pytest.mark.parametrize("operation", sorted(ON_GPUS))
def test_a_gpu_that_is_not_there_is_refused(folder, operation):
    with pytest.raises(
        FailedPrecondition, match=r"instance_group: KIND_GPU: GPU 99 does not exist: this process may use \d+ GPUs"
    ):
        making.session(folder, operation, placements=(ExecutionPlacement("gpu", 99),), **ON_GPUS[operation][0])


def test_left_open_it_is_the_cpu(folder):
    assert making.session(folder, "nms", placements=(ExecutionPlacement("auto"),)).gpus == ()


def test_nms_on_a_gpu_says_at_its_load_how_many_boxes_the_gpu_takes(folder):
    lanes = gpu_streams_of(SimulatedMemory())
    on_gpu = (ExecutionPlacement("gpu", 0),)
    with pytest.raises(FailedPrecondition, match="'max_candidates' 393217: a GPU takes at most 393216"):
        making.session(folder, "nms", placements=on_gpu, lanes=lanes, max_candidates="393217")
    assert making.session(folder, "nms", placements=on_gpu, lanes=lanes, max_candidates="393216").gpus == (0,)
    assert making.session(folder, "nms", max_candidates="1000000").gpus == ()
