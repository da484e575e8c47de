"""Images to what a model takes: the pixels of Pillow, torchvision and OpenCV, each way to fit, and the way back."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from services.infer.operators.image_fit import FitParameters, fit
from shoal.errors import FailedPrecondition
from tests.infer.operators import making
from tests.infer.operators.images import pixels
from tests.long_form import by_form

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET = {"mean": ", ".join(map(str, MEAN)), "std": str(list(STD))}
LEVEL = 1.0
# Pillow rounds between its two passes: results differ from its by one level of grey at most.


@pytest.fixture
def resize(tmp_path):
    return lambda **parameters: making.session(tmp_path, "resize_norm", **parameters)


def levels(image: np.ndarray) -> np.ndarray:
    """A normalised image, [3, h, w], as pixels again."""
    return (image.transpose(1, 2, 0) * STD + MEAN) * 255


def test_images_of_any_sizes_become_one_batch_with_pillows_pixels(resize):
    images = [pixels(90, 70), pixels(31, 200, 1), pixels(64, 64, 2), pixels(1, 1, 3)]
    made = resize(size="48, 64", **IMAGENET)
    outputs = making.run(made, image=images)
    making.check(made, outputs, 4)
    assert outputs["image"].shape == (4, 3, 48, 64)
    for image, got in zip(images, outputs["image"], strict=True):
        expected = np.asarray(Image.fromarray(image).resize((64, 48), Image.Resampling.BILINEAR), np.float64)
        assert np.abs(levels(got) - expected).max() <= LEVEL


def test_without_antialias_the_pixels_are_opencvs(resize):
    image = pixels(90, 70)
    got = making.run(resize(size="48,64", antialias="false", **IMAGENET), image=[image])["image"][0]
    assert np.abs(levels(got) - cv2.resize(image, (64, 48))).max() <= LEVEL


@pytest.mark.parametrize("shape", [(90, 70), (70, 90), (64, 64), (65, 301)])
def test_a_crop_is_torchvisions(resize, shape):
    """Resize(64) and CenterCrop(56), by torchvision's arithmetic and with Pillow's pixels."""
    image = pixels(*shape)
    got = making.run(resize(fit="crop", size="56", shorter="64", **IMAGENET), image=[image])["image"][0]
    height, width = shape
    size = (64, int(64 * width / height)) if height <= width else (int(64 * height / width), 64)
    resized = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR), np.float64)
    top, left = round((size[0] - 56) / 2), round((size[1] - 56) / 2)
    assert np.abs(levels(got) - resized[top : top + 56, left : left + 56]).max() <= LEVEL


@pytest.mark.parametrize("align", ["center", "start"])
@pytest.mark.parametrize("layout", ["chw", "hwc"])
def test_a_letterbox_keeps_the_ratio_and_pads(resize, align, layout):
    image = pixels(40, 80)
    made = resize(fit="letterbox", size="64", align=align, layout=layout, datatype="UINT8", pad="114")
    got = making.run(made, image=[image])["image"][0]
    got = got if layout == "hwc" else got.transpose(1, 2, 0)
    top = 16 if align == "center" else 0
    expected = np.asarray(Image.fromarray(image).resize((64, 32), Image.Resampling.BILINEAR), int)
    assert np.abs(got[top : top + 32].astype(int) - expected).max() <= LEVEL
    assert (np.delete(got, range(top, top + 32), axis=0) == 114).all()


def test_padding_is_what_the_pixel_would_have_become(resize):
    image = np.full((10, 40, 3), 114, np.uint8)
    got = making.run(resize(fit="letterbox", size="32", pad="114", swap="true", **IMAGENET), image=[image])["image"][0]
    np.testing.assert_allclose(got, np.broadcast_to(got[:, 16:17, 16:17], got.shape), atol=1e-5)
    zero = making.run(resize(fit="letterbox", size="32", **IMAGENET), image=[image])["image"][0]
    assert (zero[:, :5] == 0).all()


def test_text_keeps_its_height_and_is_padded_to_the_right(resize):
    """As recognisers of text want it: 48 high, at least 320 wide, (x / 255 - 0.5) / 0.5, zeros behind."""
    made = resize(fit="height", size="48, 320", antialias="false", mean="0.5", std="0.5")
    images = [pixels(30, 100), pixels(20, 300, 1), pixels(96, 640, 2)]
    outputs = making.run(made, image=images)
    making.check(made, outputs, 3)
    assert [image.shape for image in outputs["image"]] == [(3, 48, 320), (3, 48, 736), (3, 48, 320)]
    for image, got in zip(images, outputs["image"], strict=True):
        width = int(np.ceil(48 * image.shape[1] / image.shape[0]))
        expected = cv2.resize(image, (width, 48)).astype(np.float64).transpose(2, 0, 1) / 127.5 - 1
        assert np.abs(got[:, :, :width] - expected).max() * 127.5 <= LEVEL
        assert (got[:, :, width:] == 0).all()


@pytest.mark.parametrize(
    ("shape", "side", "expected"),
    [
        ((320, 480), "min", (736, 1088)),
        ((800, 900), "min", (800, 896)),
        ((2000, 500), "max", (736, 192)),
        ((100, 130), "max", (96, 128)),
        ((3, 5), "max", (32, 32)),
    ],
)
def test_detectors_get_multiples_of_32(resize, shape, side, expected):
    made = resize(fit="multiple", limit="736", limit_side=side, **IMAGENET)
    outputs = making.run(made, image=[pixels(*shape)])
    assert outputs["image"].shape == (1, 3, *expected)
    sx, sy, dx, dy = outputs["transform"][0]
    assert (sx, sy, dx, dy) == pytest.approx((expected[1] / shape[1], expected[0] / shape[0], 0, 0))


def test_long_thin_images_do_not_become_huge(resize):
    thin = np.zeros((1, 30_000, 3), np.uint8)
    assert making.run(resize(fit="height", size="48,320"), image=[thin])["image"].shape == (1, 3, 48, 4096)
    made = resize(fit="multiple", limit="736", limit_side="min", max_side="1024")
    assert making.run(made, image=[thin])["image"].shape == (1, 3, 32, 1024)


def test_pixels_can_be_scaled_another_way(resize):
    image = pixels(20, 20)
    ours = making.run(
        resize(size="20", scale="1", mean="123.675,116.28,103.53", std="58.395,57.12,57.375"), image=[image]
    )
    theirs = making.run(resize(size="20", **IMAGENET), image=[image])
    np.testing.assert_allclose(ours["image"], theirs["image"], atol=1e-4)
    half = making.run(resize(size="20", datatype="FP16", **IMAGENET), image=[image])["image"]
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, theirs["image"], atol=2e-3)


def test_channels_in_reverse(resize):
    image = pixels(9, 9)
    plain, swapped = (
        making.run(resize(size="9", datatype="UINT8", swap=s), image=[image])["image"] for s in ("0", "1")
    )
    np.testing.assert_array_equal(plain[:, ::-1], swapped)


def test_no_rows_and_no_pixels(resize):
    assert making.run(resize(size="8"), image=[])["image"].shape == (0, 3, 8, 8)
    assert making.run(resize(fit="multiple"), image=[])["image"] == []
    results = making.rows(resize(size="8"), {"image": [pixels(4, 4), np.zeros((0, 7, 3), np.uint8)]})
    assert results.unfit == {1: "input 'image' has no pixels: it is 0 high and 7 wide"}


def test_an_image_with_too_long_a_side_is_refused_alone(resize):
    made = resize(size="8")
    for shape in ((1, 65_537), (65_537, 1)):
        results = making.rows(made, {"image": [pixels(4, 4), np.zeros((*shape, 3), np.uint8)]})
        assert list(results.unfit) == [1]
        assert "expected at most 65536 pixels in a side" in results.unfit[1]
    assert making.run(made, image=[np.zeros((1, 65_536, 3), np.uint8)])["image"].shape == (1, 3, 8, 8)


FITS = (
    {"fit": "stretch", "size": "37, 23"},
    {"fit": "letterbox", "size": "37, 23"},
    {"fit": "letterbox", "size": "37, 23", "align": "start"},
    {"fit": "crop", "size": "37, 23"},
    {"fit": "crop", "size": "30", "shorter": "41"},
    {"fit": "height", "size": "48, 100"},
    {"fit": "multiple", "limit": "99", "limit_side": "min"},
    {"fit": "multiple", "limit": "99", "limit_side": "max"},
)


@settings(max_examples=by_form(60, 200), deadline=None)
@given(asked=st.sampled_from(FITS), height=st.integers(1, 5000), width=st.integers(1, 5000))
def test_every_fit_lies_in_its_output_and_in_its_image(asked, height, width):
    made = FitParameters.model_validate(asked)
    where = fit(made, height, width)
    assert all(side >= 1 for side in where.inner)
    assert 0 <= where.top <= where.outer[0] - where.inner[0]
    assert 0 <= where.left <= where.outer[1] - where.inner[1]
    y0, x0, y1, x1 = where.box or (0, 0, height, width)
    assert 0 <= y0 < y1 <= height
    assert 0 <= x0 < x1 <= width
    if made.is_fixed:
        assert where.outer == made.size
    # The corners of what is taken are the corners of what is made.
    sx, sy, dx, dy = where.transform(height, width)
    assert x0 * sx + dx == pytest.approx(where.left, abs=1e-6)
    assert y1 * sy + dy == pytest.approx(where.top + where.inner[0], abs=1e-6)


@pytest.mark.parametrize("asked", FITS)
def test_rows_together_are_what_they_are_alone(resize, asked):
    images = [pixels(*np.random.default_rng(n).integers(1, 120, 2), n) for n in range(7)]
    made = resize(**asked, **IMAGENET)
    together = making.run(made, image=images)
    making.check(made, together, 7)
    for n, image in enumerate(images):
        alone = making.run(made, image=[image])
        np.testing.assert_array_equal(together["image"][n], alone["image"][0])
        np.testing.assert_array_equal(together["transform"][n], alone["transform"][0])


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({}, "parameter 'size' is missing: fit 'stretch' needs it"),
        ({"size": "12x"}, "parameter 'size' '12x'"),
        ({"size": "1,2,3"}, "parameter 'size' '1,2,3'"),
        ({"size": "0"}, "parameter 'size' [0, 0]"),
        ({"size": "99999"}, "expected 1 to 8192"),
        ({"size": "8", "fit": "squeeze"}, "parameter 'fit' 'squeeze'"),
        ({"size": "8", "fit": "multiple"}, "give 'limit'"),
        ({"size": "8", "fit": "crop", "shorter": "7"}, "parameter 'shorter' 7"),
        ({"size": "8", "mean": "1,2"}, "parameter 'mean' [1.0, 2.0]"),
        ({"size": "8", "mean": "a"}, "parameter 'mean' 'a'"),
        ({"size": "8", "std": "0"}, "parameter 'std' [0.0]"),
        ({"size": "8", "std": "nan"}, "parameter 'std' [nan]"),
        ({"size": "8", "datatype": "UINT8", "mean": "0.5"}, "UINT8 is the pixels themselves"),
        ({"size": "8", "pad": "300"}, "parameter 'pad' '300'"),
        ({"size": "8", "layout": "nchw"}, "parameter 'layout' 'nchw'"),
        ({"size": "8", "sise": "8"}, "parameter 'sise' is unknown"),
    ],
)
def test_wrong_parameters_are_named(resize, parameters, says):
    with pytest.raises(FailedPrecondition) as err:
        resize(**parameters)
    assert says in str(err.value)
