"""Boxes of probability maps that the recorded pages do not have: nothing, everything, odd sizes, hostile ones."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from services.infer.operators.db_boxes import contours_at_most
from services.infer.operators.offset_polygon import offset_polygon
from shoal.errors import FailedPrecondition
from tests.infer.operators import making


@pytest.fixture
def boxes(tmp_path):
    return lambda **parameters: making.session(tmp_path, "db_boxes", **parameters)


def blob(height: int = 64, width: int = 96) -> np.ndarray:
    probability = np.zeros((1, height, width), np.float32)
    probability[0, 20:40, 10:80] = 0.9
    return probability


def test_one_blob_is_one_box_around_it(boxes):
    made = boxes()
    outputs = making.run(made, probability=[blob()])
    making.check(made, outputs, 1)
    (box,) = outputs["boxes"][0]
    assert box[0][0] < 10
    assert box[2][1] > 40
    assert 0.7 < outputs["scores"][0][0] <= 0.9


def test_boxes_are_in_the_image_that_size_says(boxes):
    alone = making.run(boxes(), probability=[blob()])["boxes"][0]
    scaled = making.run(boxes(), probability=[blob()], size=np.array([[128, 288]], np.int32))["boxes"][0]
    np.testing.assert_allclose(scaled, alone * np.array([3, 2]), atol=3)  # Rounded in the image, not in the map.


@pytest.mark.parametrize("probability", [np.zeros((1, 1, 1)), np.zeros((1, 1, 500)), np.full((1, 32, 32), np.nan)])
def test_maps_without_text_have_no_boxes(boxes, probability):
    made = boxes()
    outputs = making.run(made, probability=[probability.astype(np.float32)])
    making.check(made, outputs, 1)
    assert outputs["boxes"][0].shape == (0, 4, 2)


def test_maps_of_different_sizes_and_none_at_all(boxes):
    made = boxes()
    assert [len(found) for found in making.run(made, probability=[blob(), blob(50, 200)])["boxes"]] == [1, 1]
    assert making.run(made, probability=[])["boxes"] == []


def test_any_noise_has_a_result(boxes):
    rng = np.random.default_rng(0)
    made = boxes(box_threshold="0", threshold="0.5", max_candidates="50")
    outputs = making.run(made, probability=[rng.random((1, *rng.integers(1, 90, 2)), np.float32) for _ in range(40)])
    making.check(made, outputs, 40)
    assert all(len(found) <= 50 for found in outputs["boxes"])


@given(arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 1)))
def test_contours_are_never_more_than_they_are_counted(mask):
    contours = cv2.findContours(mask * np.uint8(255), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)[-2]
    assert len(contours) <= contours_at_most(mask) <= 2 * mask.size


def test_a_map_of_dots_is_refused_before_their_contours_are_made(boxes):
    dots, fewer = np.zeros((1, 1000, 1000), np.float32), np.zeros((1, 1000, 1000), np.float32)
    dots[0, ::3, ::3] = 0.9
    fewer[0, ::4, ::4] = 0.9
    results = making.rows(boxes(), {"probability": [dots, fewer]})
    assert list(results.unfit) == [0]
    assert "about 111556 blobs and holes, more than 100000" in results.unfit[0]


def test_rings_that_cover_the_map_hundreds_of_times_are_refused(boxes):
    rings = np.zeros((1, 1000, 1000), np.float32)
    for n in range(0, 500, 4):
        rings[0, n : 1000 - n, n : 1000 - n] = 0.9
        rings[0, n + 2 : 998 - n, n + 2 : 998 - n] = 0
    assert "cover it 64 times over" in making.wrong(boxes(dilate="false"), probability=[rings])


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"probability": [np.zeros((1, 0, 5), np.float32)]}, "expected 1 to 32768"),
        ({"probability": [blob()], "size": np.array([[0, 5]], np.int32)}, "input 'size' is [0,5]"),
    ],
)
def test_what_cannot_be_is_named(boxes, inputs, says):
    assert says in making.wrong(boxes(), **inputs)


@pytest.mark.parametrize(
    "parameters", [{"threshold": "0"}, {"unclip_ratio": "-1"}, {"score": "mean"}, {"order": "up"}, {"dilate": "2x"}]
)
def test_wrong_parameters_are_named(boxes, parameters):
    with pytest.raises(FailedPrecondition, match=f"parameter '{next(iter(parameters))}'"):
        boxes(**parameters)


def test_a_grown_square_is_as_large_as_it_should_be():
    """Area of a grown convex polygon: area + perimeter * d + pi * d^2 (Steiner's formula)."""
    square = np.array([[100, 100], [200, 100], [200, 200], [100, 200]], np.float32)
    for corners in (square, square[::-1]):  # Whatever the direction.
        grown = offset_polygon(corners, 20.0)
        area = cv2.contourArea(grown.reshape(-1, 1, 2))
        assert area == pytest.approx(100 * 100 + 400 * 20 + np.pi * 400, rel=0.01)


@pytest.mark.parametrize("corners", [[[1, 1], [1.4, 1.2], [1.9, 1.9]], [[0, 0], [0, 0], [5, 5]]])
def test_what_is_no_polygon_in_whole_numbers_grows_to_nothing(corners):
    assert offset_polygon(np.array(corners, np.float32), 3.0).shape == (0, 2)
