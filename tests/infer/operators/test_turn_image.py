"""Images that are turned as a classifier of angles says, and when they are not."""

from __future__ import annotations

import numpy as np
import pytest

from shoal.errors import FailedPrecondition
from tests.infer.operators import making
from tests.infer.operators.images import pixels


def probabilities(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float32)


def test_each_image_is_turned_by_its_own_class(tmp_path):
    images = [pixels(5, 7), pixels(3, 11), pixels(4, 4), pixels(9, 2)]
    made = making.session(tmp_path, "turn_image", degrees="0, 90, 180, 270")
    outputs = making.run(made, image=images, probabilities=np.eye(4, dtype=np.float32))
    assert outputs["degrees"].tolist() == [[0], [90], [180], [270]]
    for n, (image, turned) in enumerate(zip(images, outputs["image"], strict=True)):
        np.testing.assert_array_equal(turned, np.rot90(image, -n))


def test_a_class_that_is_not_above_the_threshold_turns_nothing(tmp_path):
    made = making.session(tmp_path, "turn_image", threshold="0.75")
    sure = probabilities([0.25, 0.75], [0.2, 0.8])
    outputs = making.run(made, image=[pixels(5, 7), pixels(5, 7)], probabilities=sure)
    np.testing.assert_array_equal(outputs["image"][0], pixels(5, 7))
    np.testing.assert_array_equal(outputs["image"][1], pixels(5, 7)[::-1, ::-1])


def test_a_row_without_numbers_is_unfit_and_its_neighbour_is_not(tmp_path):
    made = making.session(tmp_path, "turn_image")
    given = {"image": [pixels(5, 7), pixels(3, 2)], "probabilities": probabilities([np.nan, 1], [0, 1])}
    results = making.rows(made, given)
    assert list(results.unfit) == [0]
    assert "NaN" in results.unfit[0]


@pytest.mark.parametrize(
    ("parameters", "why"),
    [
        ({"degrees": "0, 45"}, "expected 0, 90, 180 or 270 for each class"),
        ({"degrees": "0, up"}, "degrees"),
        ({"threshold": "2"}, "threshold"),
    ],
)
def test_wrong_parameters_are_named(tmp_path, parameters, why):
    with pytest.raises(FailedPrecondition, match=why):
        making.session(tmp_path, "turn_image", **parameters)
