"""nms: every version takes exactly the reference's decisions.

Boxes with whole coordinates, so that scores tie and overlaps hit the threshold exactly.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.nms import nms, reference
from tests.kernels.conftest import Place
from tests.long_form import by_form

NAN, INF = float("nan"), float("inf")


def whole_boxes(rng: np.random.Generator, m: int, span: int = 12) -> tuple[np.ndarray, np.ndarray]:
    corner = rng.integers(0, span, (m, 2))
    boxes = np.concatenate([corner, corner + rng.integers(0, span, (m, 2))], axis=1).astype(np.float32)
    return boxes, (rng.integers(0, 9, m) / 8).astype(np.float32)


def expected(boxes: np.ndarray, scores: np.ndarray, threshold: float, groups: Any = None, **options: Any) -> list[int]:
    """Compared with the threshold in float64: the front rounds it, and no decision may change by that."""
    out = np.full(options.get("most", len(boxes)), -9, np.int64)
    least = np.float32(options.get("least_score", -INF))
    return reference.run(boxes, scores, groups, np.float64(threshold), least, out).tolist()


def run(
    place: Place, boxes: np.ndarray, scores: np.ndarray, threshold: float, groups: Any = None, **options: Any
) -> list[int]:
    """The kept boxes; what follows them in a device's answer must be -1."""
    out = np.full(options.pop("most", len(boxes)), -9, np.int64)
    if groups is not None:
        options["groups"] = place.put(groups)
    kept = nms(place.put(boxes), place.put(scores), threshold, out=place.put(out), **options)
    found = place.get(kept).tolist()
    if place.name in ("reference", "cpu"):
        return found
    end = found.index(-1) if -1 in found else len(found)
    assert set(found[end:]) <= {-1}
    return found[:end]


@pytest.mark.parametrize("m", [1, 2, 63, 64, 65, 270])
@pytest.mark.parametrize("threshold", [0.0, 0.25, 1.0])
def test_equals_the_reference(place: Place, m: int, threshold: float) -> None:
    boxes, scores = whole_boxes(np.random.default_rng(m), m)
    assert run(place, boxes, scores, threshold) == expected(boxes, scores, threshold)


def test_fractions_round_alike(place: Place) -> None:
    """Products that a GPU's compiler would join with a sum, and thresholds between two float32."""
    rng = np.random.default_rng(7)
    corner = rng.uniform(0, 40, (130, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0.1, 30, (130, 2))], axis=1).astype(np.float32)
    scores = rng.uniform(0, 1, 130).astype(np.float32)
    ratios = sorted({ratio for box in boxes[:9] for ratio in reference.overlaps(box, boxes[:9]).tolist()} - {0.0, 1.0})
    for threshold in ratios:  # Each is hit exactly by one pair at least.
        assert run(place, boxes, scores, threshold) == expected(boxes, scores, threshold)


def test_groups_leave_each_other_alone(place: Place) -> None:
    rng = np.random.default_rng(5)
    boxes, scores = whole_boxes(rng, 200, 6)
    groups = rng.choice(np.array([-(2**31), -1, 0, 2**31 - 1], np.int32), 200)
    kept = run(place, boxes, scores, 0.3, groups)
    assert kept == expected(boxes, scores, 0.3, groups)
    alone = [
        np.flatnonzero(groups == group)[run(place, boxes[groups == group], scores[groups == group], 0.3)]
        for group in set(groups.tolist())
    ]
    assert sorted(kept) == sorted(np.concatenate(alone).tolist())


def test_equal_scores_come_by_index(place: Place) -> None:
    boxes = np.array([[0, 0, 2, 2], [0, 0, 2, 2], [9, 9, 10, 10], [5, 5, 6, 6]], np.float32)
    assert run(place, boxes, np.array([0.0, -0.0, 0.0, 0.0], np.float32), 0.5) == [0, 2, 3]


def test_scores_below_the_least_and_nan_are_dropped(place: Place) -> None:
    boxes = np.array([[i * 10, 0, i * 10 + 5, 5] for i in range(6)], np.float32)
    scores = np.array([0.5, NAN, -INF, 0.25, INF, -NAN], np.float32)
    assert run(place, boxes, scores, 0.5) == [4, 0, 3, 2]
    assert run(place, boxes, scores, 0.5, least_score=0.25) == [4, 0, 3]
    assert run(place, boxes, scores, 0.5, least_score=0.25 + 1e-12) == [4, 0]  # Between two float32.
    assert run(place, boxes, scores, 0.5, least_score=INF) == [4]
    assert run(place, boxes, np.full(6, NAN, np.float32), 0.5) == []


@pytest.mark.parametrize("odd", [NAN, -NAN, INF, -INF])
@pytest.mark.parametrize("corner", range(4))
def test_boxes_that_are_none_suppress_nothing_wrongly(place: Place, odd: float, corner: int) -> None:
    boxes, scores = whole_boxes(np.random.default_rng(corner), 40, 5)
    boxes[::3, corner] = odd
    boxes[1::7, 2:] = boxes[1::7, :2]  # No area.
    boxes[2::11] = boxes[2::11, [2, 3, 0, 1]]  # Turned inside out.
    kept = run(place, boxes, scores, 0.1)
    assert kept == expected(boxes, scores, 0.1)
    if math.isnan(odd):
        assert set(range(0, 40, 3)) <= set(kept)


def test_areas_beyond_float32(place: Place) -> None:
    boxes = np.array(
        [[-3e38, -3e38, 3e38, 3e38], [0, 0, 2e19, 2e19], [0, 0, 1, 1], [0, 0, 1e-30, 1e-30]] * 2, np.float32
    )
    scores = np.linspace(1, 0, 8, dtype=np.float32)
    assert run(place, boxes, scores, 0.5) == expected(boxes, scores, 0.5)


@pytest.mark.parametrize("most", [0, 1, 5, 70, 1000])
def test_the_best_few(place: Place, most: int) -> None:
    boxes, scores = whole_boxes(np.random.default_rng(4), 200, 40)
    all_of_them = expected(boxes, scores, 0.4)
    assert 70 < len(all_of_them) < 1000
    assert run(place, boxes, scores, 0.4, most=most) == all_of_them[:most]


def test_no_boxes(place: Place) -> None:
    boxes, scores = np.empty((0, 4), np.float32), np.empty(0, np.float32)
    assert run(place, boxes, scores, 0.5) == []
    assert run(place, boxes, scores, 0.5, np.empty(0, np.int32), most=3) == []


def test_the_cpu_answers_with_a_view() -> None:
    boxes, scores = whole_boxes(np.random.default_rng(1), 30)
    out = np.empty(30, np.int64)
    kept = nms(boxes, scores, 0.3, out=out)
    assert np.shares_memory(kept, out)
    assert nms(boxes, scores, 0.3).tolist() == kept.tolist()


@given(st.data())
@settings(max_examples=by_form(60, 150))
def test_random_boxes_on_the_cpu(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    boxes, scores = whole_boxes(rng, data.draw(st.integers(0, 170)), data.draw(st.integers(2, 60)))
    groups = rng.integers(0, 3, len(boxes)).astype(np.int32) if data.draw(st.booleans()) else None
    threshold, most = data.draw(st.floats(0, 1)), data.draw(st.integers(0, 200))
    got = nms(boxes, scores, threshold, groups=groups, out=np.empty(most, np.int64)).tolist()
    assert got == expected(boxes, scores, threshold, groups, most=most)


BOXES, SCORES = np.zeros((2, 4), np.float32), np.zeros(2, np.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"threshold": -0.1}, ValueError, r"threshold must be in \[0, 1\], not -0.1"),
        ({"threshold": NAN}, ValueError, r"threshold must be in \[0, 1\], not nan"),
        ({"least_score": NAN}, ValueError, "least_score is NaN"),
        ({"boxes": np.zeros((2, 5), np.float32)}, ValueError, r"boxes must have shape \[m, 4\], not \[2, 5\]"),
        ({"boxes": BOXES.astype(np.float64)}, TypeError, "boxes must be float32, not float64"),
        ({"boxes": np.zeros((4, 2), np.float32).T}, ValueError, "boxes is not C-contiguous"),
        ({"scores": np.zeros(3, np.float32)}, ValueError, r"scores must have shape \[2\], not \[3\]"),
        ({"groups": np.zeros(2, np.int64)}, TypeError, "groups must be int32, not int64"),
        ({"groups": np.zeros(3, np.int32)}, ValueError, r"groups must have shape \[2\], not \[3\]"),
        ({"out": np.zeros(2, np.int32)}, TypeError, "out must be int64, not int32"),
    ],
)
def test_refuses(arguments: dict[str, Any], error: type[Exception], told: str) -> None:
    options = {"boxes": BOXES, "scores": SCORES, "threshold": 0.5, **arguments}
    with pytest.raises(error, match=told):
        nms(options.pop("boxes"), options.pop("scores"), options.pop("threshold"), **options)
