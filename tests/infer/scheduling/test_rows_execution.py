"""Rows of any shapes in one execution: what each call gets is what it would get alone, and bad rows fail alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.infer.requests import ragged
from services.infer.requests.outcome import InferenceResult
from services.infer.requests.parameters import NONE
from services.infer.requests.request import InferenceRequest, WantedOutput, key_of
from services.infer.requests.signature import Signature, TensorSpec
from services.infer.runtimes.runtime import ModelFailed, RowResults, Session
from services.infer.scheduling.rows_execution import RowsExecution
from shoal.errors import DeadlineExceeded, Internal, InvalidArgument
from shoal.oip.datatypes import BY_NAME
from tests.long_form import by_form

FP64 = BY_NAME["FP64"]
IMAGE = TensorSpec("image", FP64, (-1, -1, -1), is_ragged=True)
FACTOR = TensorSpec("factor", FP64, (-1, 1))
TIMES = TensorSpec("times", FP64, (-1, -1, -1), is_ragged=True)
TOTAL = TensorSpec("total", FP64, (-1, 1))
SIGNATURE = Signature((IMAGE, FACTOR), (TIMES, TOTAL), 64)
POISON, FATAL = -1.0, -2.0


class Model(Session):
    """times = image * factor, and its total. A row that holds -1 is unfit; one that holds -2 fails the model."""

    inputs, outputs, text = SIGNATURE.inputs, SIGNATURE.outputs, False

    def __init__(self) -> None:
        self.runs: list[int] = []

    def run_rows(self, inputs, outputs, stay=()):
        images, factors = inputs["image"], inputs["factor"]
        assert isinstance(images, list)
        self.runs.append(len(images))
        if any((image == FATAL).any() for image in images):
            raise ModelFailed("minus two")
        times = [image * factor for image, factor in zip(images, factors[:, 0], strict=True)]
        made = {"times": times, "total": np.array([[each.sum()] for each in times])}
        unfit = {n: "minus one" for n, image in enumerate(images) if (image == POISON).any()}
        return RowResults([made[name] for name in outputs], unfit)

    def run(self, inputs, outputs):
        raise NotImplementedError

    def close(self) -> None: ...


@dataclass
class Job:
    request: InferenceRequest
    expires: float = math.inf
    is_abandoned: bool = False


def call(images: ragged.Value, factor: float = 2.0) -> InferenceRequest:
    inputs = {"image": images, "factor": np.full((len(images), 1), factor)}
    outputs = tuple(WantedOutput(spec) for spec in SIGNATURE.outputs)
    return InferenceRequest(inputs, outputs, len(images), 0, key_of(inputs, outputs, SIGNATURE), NONE)


def images(rows: int, height: int, width: int, start: float = 0) -> np.ndarray:
    return np.arange(rows * height * width, dtype=np.float64).reshape(rows, height, width) + start


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def execution(model) -> RowsExecution:
    return RowsExecution("m", model, SIGNATURE, lambda: 0.0)


def test_ragged_requests_have_one_key_and_run_once(execution, model):
    calls = [call(images(2, 3, 4)), call(images(1, 7, 2)), call([images(1, 2, 2)[0], images(1, 5, 1)[0]])]
    assert len({each.key for each in calls}) == 1
    outcomes = execution.run([Job(each) for each in calls])
    assert model.runs == [5]
    for each, outcome in zip(calls, outcomes, strict=True):
        times, total = outcome.outputs
        assert total.shape == (each.rows, 1)
        for image, got in zip(ragged.rows(each.inputs["image"]), ragged.rows(times), strict=True):
            np.testing.assert_array_equal(got, image * 2)


def test_shapes_of_inputs_that_are_not_ragged_still_separate_requests():
    wide = Signature((TensorSpec("image", FP64, (-1, -1, -1)),), (TIMES,), 64)
    keys = {key_of({"image": images(1, *shape)}, (), wide) for shape in ((2, 2), (2, 3))}
    assert len(keys) == 2


KINDS = st.sampled_from(["fine"] * 6 + ["unfit", "fatal"])
SHAPES = st.tuples(st.integers(1, 3), st.integers(0, 4), st.integers(1, 4))


@settings(max_examples=by_form(60, 150), deadline=None)
@given(
    calls=st.lists(
        st.tuples(SHAPES, st.integers(-3, 3), st.sampled_from(["fine"] * 6 + ["unfit", "fatal"])), min_size=1
    )
)
def test_each_request_gets_the_result_it_would_get_alone(calls):
    model = Model()
    execution = RowsExecution("m", model, SIGNATURE, lambda: 0.0)
    jobs = []
    for shape, factor, kind in calls:
        given_images = images(*shape)
        if kind != "fine" and given_images.size:
            given_images[-1].flat[0] = POISON if kind == "unfit" else FATAL
        jobs.append(Job(call(given_images, float(factor))))
    together = execution.run(jobs)
    for job, outcome in zip(jobs, together, strict=True):
        (alone,) = execution.run([job])
        assert type(alone) is type(outcome)
        if isinstance(alone, InferenceResult):
            for one, other in zip(alone.outputs, outcome.outputs, strict=True):
                for row, same in zip(ragged.rows(one), ragged.rows(other), strict=True):
                    np.testing.assert_array_equal(row, same)
        else:
            assert str(alone) == str(outcome)


def test_bad_rows_fail_their_requests_and_nothing_runs_twice(execution, model):
    bad = images(3, 2, 2)
    bad[1, 0, 0] = POISON
    outcomes = execution.run([Job(call(images(2, 3, 3))), Job(call(bad)), Job(call(images(1, 1, 1)))])
    assert model.runs == [6]
    assert [type(outcome) for outcome in outcomes] == [InferenceResult, InvalidArgument, InferenceResult]
    assert str(outcomes[1]) == "model 'm', row 1: minus one"
    alone = execution.run([Job(call(bad[1:2]))])
    assert str(alone[0]) == "model 'm': minus one"


def test_a_failing_batch_of_rows_is_bisected(execution, model):
    bad = images(1, 2, 2)
    bad[0, 0, 0] = FATAL
    outcomes = execution.run([Job(call(images(2, 3, 3))), Job(call(bad)), Job(call(images(1, 1, 1)))])
    assert [type(outcome) for outcome in outcomes] == [InferenceResult, Internal, InferenceResult]


def test_abandoned_requests_are_left_out(execution, model):
    jobs = [
        Job(call(images(2, 3, 3)), is_abandoned=True),
        Job(call(images(1, 1, 1))),
        Job(call(images(1, 2, 1)), expires=0),
    ]
    outcomes = execution.run(jobs)
    assert [type(outcome) for outcome in outcomes] == [DeadlineExceeded, InferenceResult, DeadlineExceeded]
    assert model.runs == [1]


def test_a_missing_row_is_the_models_fault(execution, model):
    model.run_rows = lambda inputs, outputs, stay: RowResults([[], np.empty((0, 1))], {})
    (outcome,) = execution.run([Job(call(images(1, 1, 1)))])
    assert "output 'times' has 0 rows for 1" in str(outcome)
