"""The shim runs right kernels rightly, and tells the faults that it promises to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kernels.cuda_source import CudaSource
from tests.kernels.shim.compiled import KernelFault, Shim

KERNELS = (
    "reverse",
    "reverse_without_barrier",
    "warp_sum<float>",
    "warp_sum<__half>",
    "half_way",
    "one_too_many",
    "one_before",
    "misaligned",
    "barrier_for_some",
    "reads_unwritten_shared",
    "votes",
)
SOURCE = CudaSource(Path(__file__).parent / "shim" / "faults.cu", KERNELS, 255)


@pytest.fixture(params=[False, True], ids=["forward", "backward"])
def shim(request: pytest.FixtureRequest, shims: Callable[[CudaSource, bool], Shim]) -> Shim:
    return shims(SOURCE, request.param)


def test_threads_meet_at_a_barrier(shim: Shim) -> None:
    given = np.arange(150, dtype=np.int32)
    out = np.full_like(given, -1)
    shim.launch("reverse", (3, 1, 1), (64, 1, 1), (given, out, np.int32(150)))
    assert np.array_equal(out, np.concatenate([given[:64][::-1], given[64:128][::-1], given[128:][::-1]]))


def test_lanes_of_a_warp_exchange_values(shim: Shim) -> None:
    given = np.random.default_rng(0).integers(-50, 50, 256).astype(np.float32)
    for kernel, dtype in (("warp_sum<float>", np.float32), ("warp_sum<__half>", np.float16)):
        out = np.full(2, np.nan, dtype)
        shim.launch(kernel, (2, 1, 1), (128, 1, 1), (given, out))
        assert np.array_equal(out, given.reshape(2, 128).sum(axis=1).astype(dtype))


def test_a_barrier_counts_votes(shim: Shim) -> None:
    given = np.array([1, 0, 3, -1, 5, 0, 0, 9], np.int32)
    out = np.zeros(8, np.int32)
    shim.launch("votes", (1, 1, 1), (8, 1, 1), (given, out))
    assert out.tolist() == [4] * 8


def test_half_precision_rounds_as_numpy(shim: Shim) -> None:
    bits = np.random.default_rng(1).integers(0, 2**32, 960, dtype=np.uint32)
    edges = np.array(
        [0, -0.0, 65504, 65519.9, 65520, 1e9, 6e-8, 2.9e-8, 6.1e-5, 2**-25, 1.5 * 2**-25, np.inf], np.float32
    )
    given = np.concatenate(
        [bits.view(np.float32), edges, -edges, np.float32(1) + np.arange(40, dtype=np.float32) / 4096]
    )
    out = np.zeros(given.size, np.float16)
    shim.launch("half_way", (1, 1, 1), (given.size, 1, 1), (given, out))
    with np.errstate(over="ignore"):
        expected = given.astype(np.float16)
    numbers = ~np.isnan(expected)
    assert np.array_equal(out.view(np.uint16)[numbers], expected.view(np.uint16)[numbers])
    assert np.isnan(out[~numbers]).all()


def test_a_missing_barrier_shows_in_one_order_at_least(shims: Callable[[CudaSource, bool], Shim]) -> None:
    given = np.arange(32, dtype=np.int32)
    results = []
    for backward in (False, True):
        out = np.zeros_like(given)
        args = (given, out, np.int32(32))
        shims(SOURCE, backward).launch("reverse_without_barrier", (1, 1, 1), (32, 1, 1), args, 128)
        results.append(np.array_equal(out, given[::-1]))
    assert not all(results)


def test_a_write_behind_an_array_is_told(shim: Shim) -> None:
    for size in (1024, 5):  # Up to the guard page, and into the bytes that alignment leaves over.
        out = np.zeros(size, np.int32)
        with pytest.raises(KernelFault, match=r"outside of every array|wrote outside of argument 0"):
            shim.launch("one_too_many", (1, 1, 1), (size, 1, 1), (out, np.int32(size)))


def test_a_read_before_an_array_is_told(shims: Callable[[CudaSource, bool], Shim]) -> None:
    given, out = np.arange(8, dtype=np.int32), np.zeros(8, np.int32)
    with pytest.raises(KernelFault, match=r"outside of every array.*argument 0, byte -4 of 32"):
        shims(SOURCE, True).launch("one_before", (1, 1, 1), (8, 1, 1), (given, out))


def test_a_misaligned_vector_load_is_told(shim: Shim) -> None:
    with pytest.raises(KernelFault, match="misaligned vector access"):
        shim.launch("misaligned", (1, 1, 1), (1, 1, 1), (np.zeros(64, np.uint8), np.zeros(1, np.uint32)))


def test_threads_that_wait_for_ever_are_told(shim: Shim) -> None:
    with pytest.raises(KernelFault, match="deadlock: 29 threads at a barrier, 3 at a warp operation"):
        shim.launch("barrier_for_some", (1, 1, 1), (32, 1, 1), (np.zeros(32, np.int32),))


def test_shared_memory_begins_as_nan(shim: Shim) -> None:
    out = np.zeros(8, np.float32)
    shim.launch("reads_unwritten_shared", (1, 1, 1), (8, 1, 1), (out,), 32)
    assert np.isnan(out).all()


def test_launches_that_no_device_takes(shim: Shim) -> None:
    args = (np.zeros(8, np.float32),)
    with pytest.raises(KernelFault, match="no device takes"):
        shim.launch("reads_unwritten_shared", (1, 1, 1), (2048, 1, 1), args)
    with pytest.raises(KernelFault, match="no device takes"):
        shim.launch("reads_unwritten_shared", (1, 1, 1), (8, 1, 1), args, 300 * 1024)


def test_arguments_of_the_wrong_type(shim: Shim) -> None:
    out = np.zeros(4, np.int32)
    with pytest.raises(KernelFault, match=r"parameters of \[8, 4\] bytes, given \[8, 8\]"):
        shim.launch("one_too_many", (1, 1, 1), (4, 1, 1), (out, np.int64(4)))
    with pytest.raises(KernelFault, match="NumPy scalar"):
        shim.launch("one_too_many", (1, 1, 1), (4, 1, 1), (out, 4))
