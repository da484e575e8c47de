"""Image headers: format and size from the structure of a file, without decoding.

A few hundred bytes can claim a gigapixel, and a decoder allocates the memory before the size is known. So the size is
read here, from the headers of the four formats that are decoded. Where a file can hide its size from one reader of two,
this one follows the decoder's: libjpeg skips what is no marker, and so does `_next_marker`.

Two more things cost a decoder far more than their bytes, and are found here: the scans of a JPEG, each of which goes
over the whole image, and the texts of a PNG, which are unpacked for nobody.

Formats: JPEG (ITU-T T.81, B.1), PNG (W3C, 11.2.2), WebP (RFC 9649), BMP (BITMAPINFOHEADER and BITMAPCOREHEADER).
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

FORMATS = ("jpeg", "png", "webp", "bmp")

# Markers of JPEG that begin a frame and carry its size.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_END_OF_IMAGE, _SCAN = 0xD9, 0xDA

# Markers of JPEG that a segment follows, and the end of the image. The others stand alone (TEM, RST, SOI), or are no
# markers: zeros stuffed into the data of a scan, and fill bytes, of which any number may precede a marker.
_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")

# A search holds the interpreter's lock: at most 2.5 ms for this many bytes.
_SEARCHED_BYTES = 1 << 18

# Photos have a dozen segments; metadata of 64 MiB take a thousand.
_MAX_SEGMENTS = 4_096

# libpng writes a chunk for 8 KiB of data.
_MAX_CHUNKS = 65_536
_TEXTS = frozenset({b"tEXt", b"zTXt", b"iTXt"})


class Header(NamedTuple):
    format: str
    width: int
    height: int
    scans: int = 1
    """Times that a decoder goes over the image: a progressive JPEG has several."""


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


def png_without_texts(data: bytes) -> bytes:
    """Return a PNG without its texts, and without what follows its end.

    Raises:
        ValueError: a chunk is longer than the file, the end is missing, or there are more than 65,536 chunks.
    """
    parts, kept, at = [], 0, 8
    for _ in range(_MAX_CHUNKS):
        if at + 12 > len(data):
            break
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):
            break
        if kind in _TEXTS:
            parts.append(data[kept:at])
            kept = end
        elif kind == b"IEND":
            return b"".join([*parts, data[kept:end]])
        at = end
    raise ValueError("the file ends before the image")


def _jpeg(data: bytes) -> Header | None:
    at, scans, size = 2, 0, None
    for _ in range(_MAX_SEGMENTS):
        at = _next_marker(data, at)
        # The end of the file, or of the image: what follows is not decoded.
        if not at or data[at - 1] == _END_OF_IMAGE:
            return size and Header("jpeg", *size, scans)
        marker = data[at - 1]
        if marker in _FRAMES and size is None:
            height, width = struct.unpack_from(">HH", data, at + 3)
            size = width, height
        elif marker == _SCAN:
            if size is None:
                return None
            scans += 1
        at += max(int.from_bytes(data[at : at + 2], "big"), 2)
    return None


def _next_marker(data: bytes, at: int) -> int:
    """Return the place behind the next marker of a JPEG from `at` on; 0 when none follows."""
    for begin in range(at, len(data), _SEARCHED_BYTES):
        found = _MARKER.search(data, begin, begin + _SEARCHED_BYTES + 1)
        if found is not None:
            return found.end()
    return 0


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
