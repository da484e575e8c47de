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
    assert header[:3] == (extension.replace("jpg", "jpeg"), 91, 37)


def test_other_headers_say_the_size_too():
    image = pixels(37, 91)
    lossless = cv2.imencode(".webp", image, [cv2.IMWRITE_WEBP_QUALITY, 101])[1].tobytes()
    assert image_header.read(lossless)[:3] == ("webp", 91, 37)
    stream = images.stream(b"")
    Image.fromarray(image).save(stream, "webp", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0")
    assert image_header.read(stream.getvalue())[:3] == ("webp", 91, 37)
    stream = images.stream(b"")
    Image.fromarray(image).save(stream, "jpeg", progressive=True)
    assert image_header.read(stream.getvalue()) == ("jpeg", 91, 37, 10)
    core = b"BM" + struct.pack("<IHHI", 38, 0, 0, 26) + struct.pack("<IHHHH", 12, 91, 37, 1, 24)
    assert image_header.read(core)[:3] == ("bmp", 91, 37)
    upside_down = b"BM" + bytes(12) + struct.pack("<Iii", 40, 91, -37)
    assert image_header.read(upside_down)[:3] == ("bmp", 91, 37)


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


def chunk(kind: bytes, body: bytes, length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    return struct.pack(">I", length) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *more: bytes) -> bytes:
    """A black PNG that claims to be this large and has data of 8 x 4, with `more` chunks before and after them."""
    data = chunk(b"IDAT", zlib.compress(bytes(100)))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + b"".join([*more, data, *more, chunk(b"IEND", b"")])
    )


def progressive(height: int, width: int) -> bytes:
    stream = images.stream(b"")
    Image.fromarray(pixels(height, width)).save(stream, "jpeg", progressive=True)
    return stream.getvalue()


def resized(jpeg: bytes, height: int, width: int) -> bytes:
    """The JPEG with another size in its header."""
    at = next(jpeg.index(marker) for marker in (b"\xff\xc0", b"\xff\xc2") if marker in jpeg) + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def scanned(jpeg: bytes, times: int) -> bytes:
    """A progressive JPEG with its last scan so many times more."""
    at = jpeg.rindex(b"\xff\xda")
    return jpeg[:-2] + jpeg[at:-2] * times + jpeg[-2:]


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
        (png(30_000, 30_000), "30000 x 30000 pixels, more than max_pixels, 40000000"),
        (png(2**31 - 1, 2**31 - 1), "more than max_pixels"),
        (png(0, 10), "has no pixels"),
        (png(100, 100), "truncated or damaged"),
        (resized(encoded(pixels(8, 8), "jpg"), 65535, 65535), "65535 x 65535 pixels"),
        (b"RIFF\xff\xff\xff\xffWEBPVP8X" + bytes(20), "damaged"),
        (b"BM" + bytes(12) + struct.pack("<Iii", 40, 2**31 - 1, -(2**31)), "more than max_pixels"),
    ],
)
def test_what_is_no_image_is_refused_with_what_is_wrong(decode, data, says):
    assert says in making.wrong(decode(), image=array(data))


@pytest.mark.parametrize("filler", [b"\xff\x00", b"\xff\xff\x00", b"\xff\x01", b"\xff\xd0", b"\xff\xd8"])
def test_a_jpeg_cannot_hide_its_size(filler):
    """libjpeg skips what is no marker. A reader that takes it for a segment skips the true size, and finds another."""
    true, other = resized(encoded(pixels(8, 8), "jpg"), 30_000, 20_000), encoded(pixels(8, 8), "jpg")
    hidden = true[:2] + filler + struct.pack(">H", len(true)) + true[2:] + other[2:]
    assert image_header.read(hidden)[:3] == ("jpeg", 20_000, 30_000)


def test_any_number_of_fill_bytes_precedes_a_marker(decode):
    data = encoded(pixels(20, 30), "jpg")
    filled = data[:2] + b"\xff" * 600_000 + data[2:]
    np.testing.assert_array_equal(*(making.run(decode(), image=array(each))["image"][0] for each in (data, filled)))
    for count in range((1 << 18) - 4, (1 << 18) + 4):  # Markers across the end of a search.
        assert image_header.read(data[:2] + b"\xff" * count + data[2:])[:3] == ("jpeg", 30, 20)


@pytest.mark.parametrize("kind", [b"IDAT", b"tEXt", b"iTXt", b"abCd"])
@pytest.mark.parametrize("length", [100_000, 2**31 - 1, 2**32 - 1])
def test_a_png_has_no_chunk_longer_than_the_file(decode, kind, length):
    """The decoder takes memory for what a chunk claims before it finds that the file ends."""
    data = png(8, 4, chunk(kind, b"k\0text", length))
    assert "truncated or damaged" in making.wrong(decode(), image=array(data))
    with pytest.raises(ValueError, match="ends before"):
        image_header.png_without_texts(data)


def test_the_texts_of_a_png_are_not_unpacked():
    """A text of 8 KB is unpacked to 8 MB, a thousand times in a file of 8 MB: half a minute for nobody."""
    unpacked = zlib.compress(bytes(7_900_000), 9)
    texts = chunk(b"zTXt", b"k\0\0" + unpacked), chunk(b"iTXt", b"k\0\1\0\0\0" + unpacked), chunk(b"tEXt", b"k\0v")
    depth = chunk(b"gAMA", struct.pack(">I", 45455))
    data = png(8, 4, *texts, depth, *texts)
    assert image_header.png_without_texts(data + b"what follows the end") == png(8, 4, depth)
    assert image_header.png_without_texts(png(8, 4)) == png(8, 4)


def test_an_image_with_texts_is_decoded(decode):
    data = png(8, 4, chunk(b"tEXt", b"Software\0Shoal"))
    assert making.run(decode(), image=array(data))["image"][0].tolist() == np.zeros((4, 8, 3)).tolist()


def test_a_png_has_a_bounded_number_of_chunks(decode):
    few, many = (png(8, 4, chunk(b"abCd", b"") * number) for number in (1_000, 40_000))
    assert making.run(decode(), image=array(few))["image"][0].shape == (4, 8, 3)
    assert "truncated or damaged" in making.wrong(decode(), image=array(many))


def test_a_jpeg_has_a_bounded_number_of_scans_for_its_size(decode):
    """A scan of ten bytes goes over the whole image, so a megabyte of them held an instance for minutes."""
    made, small = decode(max_pixels="10000"), progressive(20, 30)
    assert image_header.read(scanned(small, 500)).scans == 510
    assert making.run(made, image=array(scanned(small, 500)))["image"][0].shape == (20, 30, 3)
    assert "534 scans of 30 x 20 pixels, more than 32 times max_pixels" in making.wrong(
        made, image=array(scanned(small, 524))
    )
    full = progressive(100, 100)
    assert making.run(made, image=array(scanned(full, 22)))["image"][0].shape == (100, 100, 3)
    assert "33 scans of 100 x 100 pixels" in making.wrong(made, image=array(scanned(full, 23)))
    assert "damaged header" in making.wrong(decode(), image=array(scanned(small, 5_000)))


def test_what_follows_a_jpeg_counts_as_no_scan(decode):
    """A phone's moving photo is a JPEG and a film behind it, in which the two bytes of a scan occur by chance."""
    data = encoded(pixels(20, 30), "jpg")
    assert image_header.read(data + b"\xff\xda" * 10_000).scans == 1
    image = making.run(decode(max_pixels="600"), image=array(data + b"\xff\xda" * 10_000))["image"][0]
    np.testing.assert_array_equal(image, making.run(decode(), image=array(data))["image"][0])


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
