"""Images: the pixels that Pillow and OpenCV give, and an error that says what is wrong with each that is none."""

from __future__ import annotations

import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from services.infer.operators import image_header
from shoal.errors import FailedPrecondition
from tests.infer.operators import images, making
from tests.infer.operators.images import array, encoded, pixels

FORMATS = ("jpg", "png", "webp", "bmp")


@pytest.fixture
def decode(tmp_path):
    return lambda **parameters: making.session(tmp_path, "decode_image", **parameters)


@pytest.mark.parametrize("extension", FORMATS)
@pytest.mark.parametrize("shape", [(48, 64), (1, 1), (1, 97), (131, 3)])
def test_the_pixels_are_pillows(decode, extension, shape):
    data = encoded(pixels(*shape), extension)
    outputs = making.run(decode(), image=array(data))
    expected = np.asarray(Image.open(images.stream(data)).convert("RGB"))
    if extension == "webp":  # libwebp of different versions, which upsample colours differently.
        assert np.abs(outputs["image"][0].astype(int) - expected).max() <= 8
    else:
        np.testing.assert_array_equal(outputs["image"][0], expected)
    assert outputs["size"].tolist() == [list(shape)]


@pytest.mark.parametrize("extension", FORMATS)
def test_every_header_says_the_size(extension):
    header = image_header.read(encoded(pixels(37, 91), extension))
    assert header == (extension.replace("jpg", "jpeg"), 91, 37)


def test_other_headers_say_the_size_too():
    image = pixels(37, 91)
    lossless = cv2.imencode(".webp", image, [cv2.IMWRITE_WEBP_QUALITY, 101])[1].tobytes()
    assert image_header.read(lossless) == ("webp", 91, 37)
    stream = images.stream(b"")
    Image.fromarray(image).save(stream, "webp", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0")
    assert image_header.read(stream.getvalue()) == ("webp", 91, 37)
    stream = images.stream(b"")
    Image.fromarray(image).save(stream, "jpeg", progressive=True)
    assert image_header.read(stream.getvalue()) == ("jpeg", 91, 37)
    core = b"BM" + struct.pack("<IHHI", 38, 0, 0, 26) + struct.pack("<IHHHH", 12, 91, 37, 1, 24)
    assert image_header.read(core) == ("bmp", 91, 37)
    upside_down = b"BM" + bytes(12) + struct.pack("<Iii", 40, 91, -37)
    assert image_header.read(upside_down) == ("bmp", 91, 37)


def test_grey_and_transparent_and_deep_images_have_three_channels_of_a_byte(decode):
    grey = pixels(20, 30)[..., 0]
    transparent = np.dstack([pixels(20, 30)[..., ::-1], np.full((20, 30), 7, np.uint8)])
    deep = grey.astype(np.uint16) * 257
    data = [cv2.imencode(".png", each)[1].tobytes() for each in (grey, transparent, deep)]
    got = making.run(decode(), image=array(*data))["image"]
    np.testing.assert_array_equal(got[0], np.repeat(grey[..., None], 3, -1))
    np.testing.assert_array_equal(got[1], pixels(20, 30))
    np.testing.assert_array_equal(got[2], np.repeat(grey[..., None], 3, -1))


def test_bgr_is_the_other_way_round(decode):
    data = array(encoded(pixels(9, 11), "png"))
    rgb, bgr = (making.run(decode(color=color), image=data)["image"][0] for color in ("rgb", "bgr"))
    np.testing.assert_array_equal(rgb[..., ::-1], bgr)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_camera_says(decode, orientation):
    data = images.turned(encoded(pixels(24, 40), "jpg"), orientation)
    turned = Image.open(images.stream(data))
    from PIL import ImageOps

    expected = np.asarray(ImageOps.exif_transpose(turned).convert("RGB"))
    np.testing.assert_array_equal(making.run(decode(), image=array(data))["image"][0], expected)
    as_stored = making.run(decode(orientation="ignore"), image=array(data))["image"][0]
    np.testing.assert_array_equal(as_stored, np.asarray(turned.convert("RGB")))


def test_rows_of_different_sizes_are_decoded_together(decode):
    shapes = [(10, 20), (33, 7), (64, 64), (1, 5)]
    made = decode()
    outputs = making.run(made, image=array(*[encoded(pixels(*shape), "png") for shape in shapes]))
    making.check(made, outputs, 4)
    for shape, image in zip(shapes, outputs["image"], strict=True):
        np.testing.assert_array_equal(image, pixels(*shape))


@pytest.mark.parametrize("extension", FORMATS)
@pytest.mark.parametrize("part", [0.02, 0.5, 0.9, 0.995])
def test_a_truncated_image_is_refused(decode, extension, part):
    data = encoded(pixels(120, 160), extension)
    message = making.wrong(decode(), image=array(data[: int(len(data) * part)]))
    assert "input 'image'" in message


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few dozen bytes that claims to be this large."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def huge_jpeg() -> bytes:
    data = bytearray(encoded(pixels(8, 8), "jpg"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = b"\xff\xff\xff\xff"
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty"),
        (b"\xff\xd8\xff", "damaged header"),
        (b"\xff\xd8\xff\xd9", "damaged header"),
        (b"\xff\xd8\xff\xe0\xff\xff" + bytes(9), "damaged header"),
        (b"GIF89a" + bytes(100), "expected jpeg, png, webp, bmp"),
        (b"II*\0" + bytes(100), "expected jpeg, png, webp, bmp"),
        (bytes(1000), "unknown format"),
        (b"no image at all", "it begins with 6e 6f 20 69"),
        (bomb(30_000, 30_000), "30000 x 30000 pixels, more than max_pixels, 40000000"),
        (bomb(2**31 - 1, 2**31 - 1), "more than max_pixels"),
        (bomb(0, 10), "has no pixels"),
        (bomb(100, 100), "truncated or damaged"),
        (huge_jpeg(), "65535 x 65535 pixels"),
        (b"RIFF\xff\xff\xff\xffWEBPVP8X" + bytes(20), "damaged"),
        (b"BM" + bytes(12) + struct.pack("<Iii", 40, 2**31 - 1, -(2**31)), "more than max_pixels"),
    ],
)
def test_what_is_no_image_is_refused_with_what_is_wrong(decode, data, says):
    assert says in making.wrong(decode(), image=array(data))


def test_one_bad_image_leaves_its_neighbours_alone(decode):
    good = encoded(pixels(8, 8), "png")
    results = making.rows(decode(), {"image": array(good, b"bad", good)})
    assert list(results.unfit) == [1]
    np.testing.assert_array_equal(results.values[0][0], results.values[0][2])


def test_formats_can_be_left_out(decode):
    made = decode(formats="png, bmp")
    assert making.run(made, image=array(encoded(pixels(3, 3), "png")))
    assert "expected png, bmp, got jpeg" in making.wrong(made, image=array(encoded(pixels(3, 3), "jpg")))


def test_any_bytes_have_an_outcome(decode):
    """Thousands of damaged images: each is decoded, or refused with a message."""
    made = decode(max_pixels="1000000")
    rng = np.random.default_rng(0)
    for extension in FORMATS:
        whole = encoded(pixels(24, 24), extension)
        damaged = []
        for _ in range(300):
            data = bytearray(whole)
            for at in rng.integers(0, len(data), rng.integers(1, 6)):
                data[at] = rng.integers(256)
            damaged.append(bytes(data))
        results = making.rows(made, {"image": array(*damaged)})
        assert all("input 'image'" in message for message in results.unfit.values())
        assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image in results.values[0])


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"color": "grey"}, "parameter 'color' 'grey'"),
        ({"max_pixels": "many"}, "parameter 'max_pixels' 'many'"),
        ({"max_pixels": "0"}, "parameter 'max_pixels' '0'"),
        ({"formats": "gif"}, "parameter 'formats' 'gif': expected some of jpeg"),
        ({"colour": "rgb"}, "parameter 'colour' is unknown: it has 'color'"),
    ],
)
def test_a_wrong_parameter_is_named(decode, parameters, says):
    with pytest.raises(FailedPrecondition) as err:
        decode(**parameters)
    assert says in str(err.value)
