"""Crops: straight and warped ones, of several images, and boxes that are none."""

from __future__ import annotations

import numpy as np
import pytest

from tests.infer.operators import making
from tests.infer.operators.images import pixels


@pytest.fixture
def crops(tmp_path):
    return lambda **parameters: making.session(tmp_path, "crop_boxes", **parameters)


def corners(*boxes: tuple[float, float, float, float]) -> np.ndarray:
    """Axis-aligned boxes as corners."""
    return np.array([[[x0, y0], [x1, y0], [x1, y1], [x0, y1]] for x0, y0, x1, y1 in boxes], np.float32).reshape(
        -1, 4, 2
    )


def test_an_upright_quadrilateral_is_cut_out_as_it_is(crops):
    image = pixels(60, 80)
    outputs = making.run(crops(), image=[image], boxes=[corners((10, 5, 50, 25))])
    np.testing.assert_array_equal(outputs["crops"][0], image[5:25, 10:50])


def test_axis_aligned_boxes_are_cut_at_the_edges(crops):
    image = pixels(60, 80)
    boxes = np.array([[10.4, 5.6, 49.2, 24.1], [-9, -9, 500, 20], [70, 50, 1e30, 1e30]], np.float32)
    got = making.run(crops(corners="false"), image=[image], boxes=[boxes])["crops"]
    np.testing.assert_array_equal(got[0], image[5:25, 10:50])
    np.testing.assert_array_equal(got[1], image[0:20])
    np.testing.assert_array_equal(got[2], image[50:, 70:])


def test_what_is_high_is_turned_unless_it_should_not_be(crops):
    image, box = pixels(60, 80), corners((10, 5, 30, 50))
    turned = making.run(crops(), image=[image], boxes=[box])["crops"][0]
    upright = making.run(crops(turn_from="0"), image=[image], boxes=[box])["crops"][0]
    np.testing.assert_array_equal(turned, np.rot90(upright))


def test_crops_of_several_images_follow_each_other_and_say_whose_they_are(crops):
    images = [pixels(60, 80), pixels(20, 90, 1), pixels(30, 30, 2)]
    boxes = [corners((0, 0, 9, 9), (5, 5, 25, 15)), corners(), corners((1, 1, 4, 3))]
    made = crops()
    outputs = making.run(made, image=images, boxes=boxes)
    making.check(made, outputs, 3)
    assert outputs["row"].tolist() == [0, 0, 2]
    assert [crop.shape for crop in outputs["crops"]] == [(9, 9, 3), (10, 20, 3), (2, 3, 3)]


def test_no_boxes_are_no_crops(crops):
    outputs = making.run(crops(), image=[pixels(9, 9)], boxes=[corners()])
    assert (outputs["crops"], outputs["row"].tolist()) == ([], [])


@pytest.mark.parametrize(
    ("boxes", "says"),
    [
        (corners((3, 3, 3, 9)), "has no area"),
        (corners((0, 0, 1e5, 1e5)), "more than max_pixels"),
        (corners((0, 0, 3e38, 3e38)), "more than max_pixels"),
        (
            corners((0, 0, 1_250_001, 1)),
            "crops of 40000032 pixels (a side counts as 32 at least), more than max_pixels",
        ),
        (corners((np.nan, 0, 3, 3)), "NaN"),
        (corners((0, 0, np.inf, 3)), "infinite"),
        (corners(*[(0, 0, 2, 2)] * 1001), "1001 boxes, more than max_boxes, 1000"),
    ],
)
def test_boxes_that_are_none_are_refused(crops, boxes, says):
    assert says in making.wrong(crops(), image=[pixels(9, 9)], boxes=[boxes])


def test_images_and_boxes_must_be_as_many(crops):
    assert "expected one for each image" in making.wrong(crops(), image=[pixels(9, 9)], boxes=[corners(), corners()])
    nothing = np.zeros((0, 5, 3), np.uint8)
    assert "no pixels" in making.wrong(crops(), image=[nothing], boxes=[corners((0, 0, 2, 2))])


def test_an_image_wider_than_a_short_is_warped(crops):
    wide = np.zeros((3, 40_000, 3), np.uint8)
    outputs = making.run(crops(), image=[wide], boxes=[corners((39_000, 0, 39_009, 2))])
    assert outputs["crops"][0].shape == (2, 9, 3)
