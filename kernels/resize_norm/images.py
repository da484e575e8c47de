"""Ragged batch of images: one flat buffer of bytes and a table with 32 bytes per image.

    pixels  | image 0, rows of width x channels bytes | image 1 ... |  a multiple of 16 bytes
    table   | offset i64 | height, width i32 | y0, x0, sy, sx f32 |    one row per image

Output pixel (y, x) has its centre at (y0 + (y + 0.5) sy, x0 + (x + 0.5) sx) in the source. On a device the table is the
same bytes as uint8 [n, 32]: one copy, one kernel argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.backend import on_device

Array = npt.NDArray[Any]
Box = tuple[float, float, float, float]

IMAGE = np.dtype(
    [("offset", "<i8"), ("height", "<i4"), ("width", "<i4"), ("y0", "<f4"), ("x0", "<f4"), ("sy", "<f4"), ("sx", "<f4")]
)
ALIGNMENT = 16
"""Alignment in bytes of each image and of the buffer's end: the GPU reads 16 bytes at a time."""
CHANNELS_FIRST, CHANNELS_LAST = "CHW", "HWC"


@dataclass(frozen=True)
class Packed:
    """A ragged batch in one buffer, on the host (NumPy arrays) or on a device (CuPy arrays)."""

    pixels: Any
    """uint8 [bytes]."""
    table: Any
    """[n] of IMAGE on the host; uint8 [n, 32] on a device."""

    def table_bytes(self) -> Array:
        """Return a view of a host's table in the form for a device."""
        return np.asarray(self.table).view(np.uint8).reshape(-1, IMAGE.itemsize)

    def moved(self, move: Callable[[Array], Any]) -> Packed:
        """Return a copy of a host's batch; `move` copies bytes to a device, or to other memory of the host."""
        table = move(self.table_bytes())
        return Packed(move(self.pixels), table.view(IMAGE).reshape(-1) if isinstance(table, np.ndarray) else table)


@dataclass(frozen=True)
class Unpacked:
    """A ragged batch of separate host arrays."""

    arrays: Sequence[Array]
    """C-contiguous."""
    table: Array
    """Table with the offsets for `packed`."""

    def packed(self) -> Packed:
        return Packed(fill(self.arrays, self.table, np.empty(packed_bytes(self.arrays), np.uint8)), self.table)


@dataclass(frozen=True)
class Affine:
    """Affine map: output channel c is source channel order[c], times scale[order[c]], plus bias[order[c]]."""

    scale: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    order: tuple[int, ...]


def pack(
    images: Sequence[Array],
    size: tuple[int, int],
    boxes: Sequence[Box | None] | None = None,
    out: Array | None = None,
) -> Packed:
    """Copy images into one buffer, as input of `resize_norm` for outputs of one size.

    Args:
        images: uint8 [h, w, c] or [h, w], all of the same number of channels.
        size: height and width of every output.
        boxes: as in `resize_norm`.
        out: uint8 [bytes], for example pinned memory; allocated when None.

    Raises:
        TypeError, ValueError: an image, a box or `out` violates the description above; the message names it.
    """
    table = layout_table(images, size, boxes)
    end = packed_bytes(images)
    if out is None:
        out = np.empty(end, np.uint8)
    if out.dtype != np.uint8 or out.ndim != 1 or out.size < end:
        raise ValueError(f"pack: out must be uint8 [{end}] or longer, not {out.dtype}{list(out.shape)}")
    return Packed(fill(images, table, out)[:end], table)


def fill(images: Sequence[Array], table: Array, out: Array) -> Array:
    """Copy images into a buffer at the offsets of the table, with zeros between them."""
    for image, row in zip(images, table, strict=True):
        at = int(row["offset"])
        np.copyto(out[at : at + image.size].reshape(image.shape), image)
        out[at + image.size : _aligned(at + image.size)] = 0
    return out


def packed_bytes(images: Sequence[Array]) -> int:
    """Return the size of `pack`'s buffer, in bytes."""
    return sum(_aligned(image.size) for image in images)


def layout_table(images: Sequence[Array], size: tuple[int, int], boxes: Sequence[Box | None] | None) -> Array:
    """Return the table for consecutive images, each at a multiple of ALIGNMENT."""
    channels_of(images)
    if min(size) < 1:
        raise ValueError(f"resize_norm: an output of {size[0]} x {size[1]} pixels")
    if boxes is not None and len(boxes) != len(images):
        raise ValueError(f"resize_norm: {len(boxes)} boxes for {len(images)} images")
    table = np.empty(len(images), IMAGE)
    offset = 0
    for n, image in enumerate(images):
        height, width = image.shape[:2]
        y0, x0, y1, x1 = _checked_box(n, boxes[n] if boxes is not None else None, height, width)
        table[n] = (offset, height, width, y0, x0, (y1 - y0) / size[0], (x1 - x0) / size[1])
        offset += _aligned(image.size)
    return table


def channels_of(images: Sequence[Array]) -> int:
    """Return the number of channels of all images: 1 or 3.

    Raises:
        TypeError, ValueError: no images, or an image that is not uint8 [h, w, c] or [h, w]; the message names it.
    """
    if not images:
        raise ValueError("resize_norm: no images")
    found = set()
    for n, image in enumerate(images):
        if on_device(image):
            raise TypeError(f"resize_norm: image {n} is on a GPU; pass images on a GPU as Packed, in one buffer")
        if not isinstance(image, np.ndarray):
            raise TypeError(f"resize_norm: image {n} must be a NumPy array, not {type(image).__name__}")
        channels = 1 if image.ndim == 2 else image.shape[2] if image.ndim == 3 else 0
        if image.dtype != np.uint8 or channels not in (1, 3) or image.size == 0:
            shown = f"{image.dtype}{list(image.shape)}"
            raise ValueError(f"resize_norm: image {n} is {shown}; expected uint8 [h, w, 3], [h, w, 1] or [h, w]")
        found.add(channels)
    if len(found) > 1:
        raise ValueError("resize_norm: images of 1 and of 3 channels in one call")
    return found.pop()


def check_packed(images: Packed, channels: int, size: tuple[int, int]) -> None:
    """Check the buffer and the table of a packed batch.

    The contents of a device's table are not checked, because reading them would wait for the device.

    Raises:
        TypeError, ValueError: buffer or table are not as described in `Packed`, or an image is outside the buffer.
    """
    pixels, table = images.pixels, images.table
    if pixels.dtype != np.uint8 or pixels.ndim != 1 or not pixels.flags.c_contiguous:
        raise ValueError(
            f"resize_norm: pixels must be uint8 [bytes], contiguous, not {pixels.dtype}{list(pixels.shape)}"
        )
    if pixels.size % ALIGNMENT:
        raise ValueError(f"resize_norm: {pixels.size} bytes of pixels are no multiple of {ALIGNMENT}; see pack()")
    if not isinstance(table, np.ndarray):
        if table.dtype != np.uint8 or table.shape[1:] != (IMAGE.itemsize,) or not table.flags.c_contiguous:
            raise ValueError(f"resize_norm: a device's table is uint8 [n, 32], not {table.dtype}{list(table.shape)}")
        return
    if table.dtype != IMAGE or table.ndim != 1 or not table.flags.c_contiguous:
        raise ValueError(f"resize_norm: the table must be [n] of IMAGE, not {table.dtype}{list(table.shape)}")
    height, width, offset = (table[name].astype(np.int64) for name in ("height", "width", "offset"))
    inside = (height > 0) & (width > 0) & (offset >= 0) & (offset <= pixels.size)
    # A product with `channels` could overflow, so divide instead.
    inside &= height * width <= (pixels.size - offset) // channels
    for start, step, length, count in (("y0", "sy", height, size[0]), ("x0", "sx", width, size[1])):
        end = table[start].astype(np.float64) + table[step].astype(np.float64) * count
        # The end of a box is computed from float32 values, with a rounding error.
        inside &= (table[start] >= 0) & (table[step] > 0) & (end <= length * (1 + 1e-6) + 1e-3)
    if not inside.all():
        n = int(np.argmin(inside))
        raise ValueError(
            f"resize_norm: row {n} of the table, {table[n]}, is no image and box within {pixels.size} bytes"
        )


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _checked_box(n: int, box: Box | None, height: int, width: int) -> Box:
    if box is None:
        return 0.0, 0.0, float(height), float(width)
    y0, x0, y1, x1 = box
    if not (0 <= y0 < y1 <= height and 0 <= x0 < x1 <= width):
        raise ValueError(
            f"resize_norm: box {n} {tuple(box)} is not (y0, x0, y1, x1) inside of {height} x {width} pixels"
        )
    return float(y0), float(x0), float(y1), float(x1)
