"""Resizing, cropping, normalisation and layout of a batch of images of different sizes, in one call or one launch.

uint8 images, any sizes ──box──> triangle filter ──> (x / 255 - mean) / std ──> [n, 3, h, w] float16
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Executor
from functools import lru_cache
from typing import Any

import numpy as np

from kernels import arrays
from kernels.backend import Operation
from kernels.resize_norm.images import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    IMAGE,
    Affine,
    Array,
    Box,
    Packed,
    Unpacked,
    channels_of,
    check_packed,
    layout_table,
    pack,
    packed_bytes,
)

__all__ = ["IMAGE", "Packed", "pack", "packed_bytes", "resize_norm", "warm_up"]

_OPERATION = Operation(__name__, gpu="cuda")
_DTYPES = (np.float32, np.float16, np.uint8)


def resize_norm(
    images: Packed | Sequence[Array],
    out: Any = None,
    *,
    size: tuple[int, int] | None = None,
    boxes: Sequence[Box | None] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    antialias: bool = True,
    swap: bool = False,
    layout: str = CHANNELS_FIRST,
    dtype: Any = np.float32,
    channels: int = 3,
    stream: Any = None,
    pool: Executor | None = None,
) -> Any:
    """Resize every image to one size; with `out`, only scratch lines are allocated.

    out = (x / 255 - mean) / std with x the filtered pixel, 0 to 255. uint8 outputs are x itself, rounded to nearest.
    With antialias the result equals Pillow's `resize(size, BILINEAR, box=box)`, except that Pillow rounds between its
    two passes: at most one grey level. Without antialias the result is plain bilinear, as OpenCV's INTER_LINEAR.

    Args:
        images: uint8 arrays [h, w, 3], or all [h, w, 1] or [h, w], on the host, read in place (a view that is not
            C-contiguous is copied). Or `Packed`, on the host or the device; a device's table is not checked.
        out: [n, c, h, w] for layout "CHW", [n, h, w, c] for "HWC", C-contiguous, float32, float16 or uint8, on the
            device of the images. When None, a new array of `size` and `dtype`.
        size: height and width of the outputs. Only needed without `out`.
        boxes: for each image (y0, x0, y1, x1) in source pixels, fractions allowed, or None for the whole image. A crop
            costs nothing; the filter reads pixels beyond the box, as Pillow's does. `Packed` contains its boxes.
        mean, std: per source channel, of values between 0 and 1; None is 0 and 1.
        antialias: widen the filter when shrinking.
        swap: reverse the three channels: BGR to RGB.
        channels: number of channels of `Packed` images: 1 or 3.
        stream: CuPy stream for device arrays; the call does not wait for it. None is the current one.
        pool: threads that process host images while the call waits. Must not be the pool that runs the call.

    Returns:
        `out`.

    Raises:
        ValueError, TypeError: an argument violates the description above; the message names it.
        BackendError: see `kernels.backend`.
    """
    if layout not in (CHANNELS_FIRST, CHANNELS_LAST):
        raise ValueError(f"resize_norm: layout {layout!r} is neither CHW nor HWC")
    size = _size(out, size, layout)
    batch: Packed | Unpacked
    if isinstance(images, Packed):
        if boxes is not None:
            raise ValueError("resize_norm: packed images have their boxes in the table; give boxes to pack()")
        version = _OPERATION.version(stream=stream, pixels=images.pixels, table=images.table, out=out)
        check_packed(images, channels, size)
        batch, like = images, images.pixels
    else:
        table = layout_table(images, size, boxes)
        channels = channels_of(images)
        version = _OPERATION.version(stream=stream, images=images[0], out=out)
        batch, like = Unpacked([np.ascontiguousarray(image) for image in images], table), images[0]
    if pool is not None and not isinstance(like, np.ndarray):
        raise TypeError("resize_norm: pool= is for images on the host; these are on a GPU")
    shape = (batch.table.shape[0], *((channels, *size) if layout == CHANNELS_FIRST else (*size, channels)))
    if out is None:
        out = arrays.empty(like, shape, np.dtype(dtype), stream)
    _check_out(out, shape)
    affine = _affine(channels, _floats(mean), _floats(std), swap, out.dtype == np.uint8)
    if shape[0]:
        version.run(batch, out, affine=affine, antialias=antialias, layout=layout, stream=stream, pool=pool)
    return out


def warm_up() -> None:
    """Compile the version of the chosen backend, for every output dtype."""
    for channels in (1, 3):
        batch = pack([np.zeros((4, 4, channels), np.uint8)], (2, 2)).moved(arrays.at_choice)
        for dtype in _DTYPES:
            resize_norm(batch, size=(2, 2), dtype=dtype, channels=channels)


def _size(out: Any, size: tuple[int, int] | None, layout: str) -> tuple[int, int]:
    if out is not None:
        if not hasattr(out, "ndim") or out.ndim != 4:
            raise ValueError(f"resize_norm: out must have 4 dimensions, not {list(getattr(out, 'shape', []))}")
        found = tuple(out.shape[2:] if layout == CHANNELS_FIRST else out.shape[1:3])
        if size is not None and tuple(size) != found:
            raise ValueError(f"resize_norm: size {tuple(size)} is not that of out, {found}")
        return found[0], found[1]
    if size is None or len(size) != 2 or min(size) < 1:
        raise ValueError(f"resize_norm: without out, size must be (height, width) of 1 or more, not {size}")
    return size


def _check_out(out: Any, shape: tuple[int, ...]) -> None:
    if out.dtype.type not in _DTYPES or tuple(out.shape) != shape or not out.flags.c_contiguous:
        found = f"{out.dtype}{list(out.shape)}{'' if out.flags.c_contiguous else ', not contiguous'}"
        raise ValueError(f"resize_norm: out is {found}; expected float32, float16 or uint8 {list(shape)}, contiguous")
    arrays.expect_writable("resize_norm", "out", out)


def _floats(values: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(float(value) for value in values)


@lru_cache(maxsize=64)
def _affine(
    channels: int, mean: tuple[float, ...] | None, std: tuple[float, ...] | None, swap: bool, to_bytes: bool
) -> Affine:
    if channels not in (1, 3):
        raise ValueError(f"resize_norm: images have 1 or 3 channels, not {channels}")
    if to_bytes and (mean is not None or std is not None):
        raise ValueError("resize_norm: uint8 outputs are the pixels themselves; they take no mean and no std")
    if swap and channels != 3:
        raise ValueError("resize_norm: swap is for three channels")
    mean = mean or (0.0,) * channels
    std = std or (1 / 255 if to_bytes else 1.0,) * channels
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels or not all(map(math.isfinite, values)):
            raise ValueError(f"resize_norm: {name} must be {channels} finite numbers, not {values}")
    if 0.0 in std:
        raise ValueError("resize_norm: std must not be 0")
    spread, middle = np.array(std), np.array(mean)
    scale, bias = (1 / (255 * spread)).astype(np.float32), (-middle / spread).astype(np.float32)
    return Affine(scale, bias, (2, 1, 0) if swap else tuple(range(channels)))
