"""Fingerprints of requests: they tell requests apart by all of their bytes, at a bounded cost."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import pytest

from services.infer.scheduling import crash_guard
from services.infer.scheduling.crash_guard import digest_of, fingerprint
from tests.infer.scheduling import virtual_time

MODEL = digest_of("m")


def mark(**inputs: object) -> int:
    return fingerprint(MODEL, replace(virtual_time.call(1, 1), inputs=inputs))


def letterboxed(inside: int) -> np.ndarray:
    image = np.zeros((1, 224, 224, 3), np.uint8)
    image[:, 60:160] = inside
    return image


def test_padded_inputs_of_one_size_differ():
    assert mark(x=letterboxed(1)) != mark(x=letterboxed(2))
    assert mark(x=letterboxed(1)) == mark(x=letterboxed(1))
    tokens = np.zeros((1, 4096), np.int64)
    tokens[0, 2020:2060] = 7
    assert mark(ids=tokens) != mark(ids=np.zeros((1, 4096), np.int64))


def test_the_end_of_an_input_counts():
    for size in (2047, 2048, 2049, 2176, 100_000, 150_528):
        x = np.zeros(size, np.uint8)
        x[-160:] = 1
        assert mark(x=x) != mark(x=np.zeros(size, np.uint8)), size


def test_equal_inputs_do_not_cancel_out_and_their_names_count():
    a, b = np.float32([[1, 2]]), np.float32([[3, 4]])
    assert mark(x=a, y=a) != mark(x=b, y=b)
    assert mark(x=a, y=b) != mark(x=b, y=a)
    assert mark(x=a, y=b) == mark(y=b, x=a)


def test_views_and_ragged_rows_have_the_fingerprints_of_their_bytes():
    x = np.arange(10_000, dtype=np.float32).reshape(100, 100)
    assert mark(x=x.T) == mark(x=x.T.copy())
    assert mark(x=[x[0], x[1]]) != mark(x=[x[1], x[0]])


@pytest.mark.parametrize("kind", [bytes, str])
def test_elements_are_sampled_at_a_bounded_cost(kind, monkeypatch):
    seen: list[int] = []
    monkeypatch.setattr(
        crash_guard, "_crc", lambda data, start: (seen.append(memoryview(data).nbytes), zlib.crc32(data, start))[1]
    )

    def elements(*parts: bytes) -> np.ndarray:
        found = np.empty(len(parts), object)
        found[:] = [part if kind is bytes else part.decode("latin-1") for part in parts]
        return found

    large = bytes(5_000_000)
    assert mark(x=elements(large)) != mark(x=elements(large[:2_500_000] + b"1" * 400_000 + large[2_900_000:]))
    assert mark(x=elements(b"a", b"b")) != mark(x=elements(b"b", b"a"))
    assert mark(x=elements(*[b"a"] * 999, b"b")) != mark(x=elements(*[b"a"] * 1000, b"b"))
    assert mark(x=elements(*[large] * 100)) == mark(x=elements(*[large] * 100))
    assert max(seen) < 100_000
