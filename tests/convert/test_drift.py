"""Drift of made-up answers, whose drift is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from shoal.convert.drift import Mismatch, OutputPair, measure
from shoal.convert.verdict import Bounds, refusal


def of(want: object, got: object, **options: object) -> object:
    return measure([OutputPair({"y": np.asarray(want)}, {"y": np.asarray(got)})], **options).outputs[0]  # type: ignore[arg-type]


def test_numbers() -> None:
    drift = of([[3.0, -4.0, 0.0]], [[3.0, -4.5, 0.01]])
    assert drift.max_abs == pytest.approx(0.5)
    assert drift.mean_abs == pytest.approx(0.51 / 3)
    # 0.5 of 4; the 0.01 is measured against the root mean square, not against its own 0.
    assert drift.max_relative == pytest.approx(0.125)
    assert drift.flips is None


def test_calls_count_together() -> None:
    calls = [OutputPair({"y": np.full((n, 1), 2.0)}, {"y": np.full((n, 1), 2.0 + n / 100)}) for n in (1, 2, 7)]
    drift = measure(calls)
    assert drift.rows == 10
    assert drift.max_abs == pytest.approx(0.07)
    assert drift.max_relative == pytest.approx(0.035)


@pytest.mark.parametrize(
    ("want", "got", "apart"),
    [
        ([math.nan], [math.nan], 0),
        ([math.inf], [math.inf], 0),
        ([math.nan], [1.0], math.inf),
        ([1.0], [math.nan], math.inf),
        ([math.inf], [-math.inf], math.inf),
        ([0.0], [0.0], 0),
        ([], [], 0),
    ],
)
def test_what_is_no_number(want: list[float], got: list[float], apart: float) -> None:
    drift = of(np.array(want), np.array(got))
    assert drift.max_abs == apart
    assert (refusal(measure([OutputPair({"y": np.array(want)}, {"y": np.array(got)})]), Bounds()) == "") == (apart == 0)


def test_the_cosine() -> None:
    assert of([1.0, 0.0], [2.0, 0.0]).cosine == 1
    assert of([1.0, 0.0], [0.0, 1.0]).cosine == 0
    assert of([0.0], [0.0]).cosine == 1
    assert of([0.0], [1.0]).cosine == 0


def test_labels_flip_as_numbers_and_as_text() -> None:
    assert of([1, 2, 3], [1, 0, 3]).flips == 1
    assert of(np.array(["a", "b"], object), np.array([b"a", "c"], object).astype(str)).flips == 1
    assert of([True, False], [True, False]).flips == 0


def test_scores_flip_where_the_largest_is_another() -> None:
    want, got = [[0.9, 0.1], [0.4, 0.6]], [[0.8, 0.2], [0.6, 0.4]]
    assert of(want, got, scores={"y"}).flips == 1
    assert of(want, got).flips is None


def test_a_tie_is_no_flip() -> None:
    want = {"label": np.array([0, 0]), "p": np.array([[0.5, 0.5], [0.9, 0.1]])}
    got = {"label": np.array([1, 1]), "p": np.array([[0.4999999, 0.5000001], [0.1, 0.9]])}
    drift = measure([OutputPair(want, got)], scores={"p"}, tolerance=1e-4)
    assert [(output.flips, output.ties) for output in drift.outputs] == [(1, 1), (1, 1)]
    assert (drift.flips, drift.ties) == (1, 1)


@pytest.mark.parametrize(
    ("got", "says"),
    [
        ({"z": np.zeros(2)}, "the outputs are z instead of y"),
        ({"y": np.zeros((2, 1))}, r"output 'y' is \[2, 1\] where the original returns \[2\]"),
        ({"y": np.array(["a", "b"], object)}, "output 'y' is object where the original returns float64"),
    ],
)
def test_answers_that_cannot_be_compared(got: dict[str, np.ndarray], says: str) -> None:
    with pytest.raises(Mismatch, match=says):
        measure([OutputPair({"y": np.zeros(2)}, got)])


def test_verdicts() -> None:
    drift = measure([OutputPair({"y": np.array([1, 2, 3, 4])}, {"y": np.array([1, 2, 0, 0])})])
    assert refusal(drift, Bounds()) == "the label changes in 2 of 4 rows, allowed are 0"
    assert refusal(drift, Bounds(flips=2)) == ""
    assert refusal(drift, Bounds(share=0.5)) == ""
    assert refusal(drift, Bounds(share=0.49)) == "the label changes in 2 of 4 rows, allowed are 1"
    numbers = measure([OutputPair({"y": np.ones(3)}, {"y": np.full(3, 1.001)})])
    assert refusal(numbers, Bounds(relative=5e-4)) == "y drifts by 0.001 (relative), allowed is 0.0005"
    assert refusal(numbers, Bounds(relative=2e-3)) == ""
