"""Image headers: format and size from the first bytes of a file, without decoding.

A few hundred bytes can claim a gigapixel, and a decoder allocates the memory before the size is known. So the size is
read here, from the headers of the four formats that are decoded.

Formats: JPEG (ITU-T T.81, B.1), PNG (W3C, 11.2.2), WebP (RFC 9649), BMP (BITMAPINFOHEADER and BITMAPCOREHEADER).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

FORMATS = ("jpeg", "png", "webp", "bmp")

# Markers of JPEG that begin a frame and carry its size.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Markers of JPEG that no segment follows.
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD9)})


class Header(NamedTuple):
    format: str
    width: int
    height: int


def read(data: bytes) -> Header | None:
    """Return the header; None for bytes of another format, or bytes that end before the size."""
    try:
        if data[:3] == b"\xff\xd8\xff":
            return _jpeg(data)
        if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR":
            return Header("png", *struct.unpack_from(">II", data, 16))
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(data)
        if data[:2] == b"BM":
            return _bmp(data)
    except (struct.error, IndexError, ValueError):
        pass
    return None


def _jpeg(data: bytes) -> Header | None:
    at = 2
    while True:
        # Any number of fill bytes may precede a marker.
        at = data.index(b"\xff", at) if data[at] != 0xFF else at
        while data[at] == 0xFF:
            at += 1
        marker = data[at]
        at += 1
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 3)
            return Header("jpeg", width, height)
        # Image data, or the end of the image, before any frame.
        if marker in (0xD9, 0xDA):
            return None
        if marker not in _STANDALONE:
            at += max(struct.unpack_from(">H", data, at)[0], 2)


def _webp(data: bytes) -> Header | None:
    kind = data[12:16]
    if kind == b"VP8X":
        return Header("webp", 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little"))
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = struct.unpack_from("<I", data, 21)[0]
        return Header("webp", 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return Header("webp", width & 0x3FFF, height & 0x3FFF)
    return None


def _bmp(data: bytes) -> Header | None:
    if struct.unpack_from("<I", data, 14)[0] == 12:
        return Header("bmp", *struct.unpack_from("<HH", data, 18))
    width, height = struct.unpack_from("<ii", data, 18)
    # A bitmap with rows from top to bottom has a negative height.
    return Header("bmp", abs(width), abs(height))
