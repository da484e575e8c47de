"""Models that are operations: a client sends bytes as they are in a file, and gets what a tensor can carry."""

from __future__ import annotations

import struct

from tests.infer.conformance import wire
from tests.infer.conformance.wire import Given


def bitmap(height: int, width: int, value: int) -> bytes:
    """A BMP of one grey."""
    row = bytes([value] * 3 * width) + bytes(-3 * width % 4)
    body = row * height
    head = struct.pack("<2sIHHI", b"BM", 54 + len(body), 0, 0, 54)
    return head + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, len(body), 0, 0, 0, 0) + body


def images(*files: bytes) -> Given:
    return Given("image", "BYTES", (len(files), 1), wire.packed(files))


def test_bytes_come_in_and_pixels_go_out(infer):
    response = infer("decode", images(bitmap(3, 5, 77)))
    assert wire.raw_of(response, "image") == ("UINT8", [1, 3, 5, 3], bytes([77] * 45))
    assert wire.raw_of(response, "size") == ("INT32", [1, 2], struct.pack("<ii", 3, 5))


def test_typed_contents_mean_the_same(infer):
    response = infer("decode", Given("image", "BYTES", (2, 1), values=[bitmap(1, 1, 7), bitmap(1, 1, 8)]))
    assert wire.raw_of(response, "image") == ("UINT8", [2, 1, 1, 3], bytes([7] * 3 + [8] * 3))


def test_every_size_is_decoded(infer):
    """Again and again the same message but for its numbers: what was learnt of one must not be held of another."""
    for height, width in ((1, 1), (2, 3), (3, 2), (1, 1), (2, 3)):
        response = infer("decode", images(bitmap(height, width, height)))
        assert wire.raw_of(response, "image") == ("UINT8", [1, height, width, 3], bytes([height] * 3 * height * width))


def test_what_is_no_image_is_said(refused):
    message = refused("INVALID_ARGUMENT", wire.request("decode", images(bitmap(2, 2, 1), b"no image")))
    assert message.startswith("model 'decode', row 1: input 'image': expected jpeg, png, webp, bmp")


def test_rows_that_no_tensor_can_carry_are_said(refused):
    message = refused("INVALID_ARGUMENT", wire.request("decode", images(bitmap(2, 2, 1), bitmap(2, 3, 1))))
    assert "'image': its 2 rows have different shapes ([2,2,3], [2,3,3])" in message
