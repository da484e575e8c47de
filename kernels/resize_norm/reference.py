"""The truth: both filters as dense matrices in float64, one image after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.resize_norm.images import CHANNELS_LAST, Affine, Array, Loose, Packed


def run(images: Packed | Loose, out: Array, *, affine: Affine, antialias: bool, layout: str, **_: Any) -> None:
    packed = images.packed() if isinstance(images, Loose) else images
    pixels = packed.pixels
    rows_at = 1 if layout == CHANNELS_LAST else 2
    out_h, out_w = out.shape[rows_at : rows_at + 2]
    channels = affine.scale.size
    for image, into in zip(packed.table, out, strict=True):
        offset, height, width = int(image["offset"]), int(image["height"]), int(image["width"])
        source = pixels[offset : offset + height * width * channels].reshape(height, width, channels).astype(np.float64)
        down = filter_matrix(height, float(image["y0"]), float(image["sy"]), out_h, antialias)
        across = filter_matrix(width, float(image["x0"]), float(image["sx"]), out_w, antialias)
        value = np.einsum("yh,hwc,xw->yxc", down, source, across, optimize=True)
        value = (value * affine.scale + affine.bias)[..., affine.order]
        if out.dtype == np.uint8:
            value = np.clip(np.floor(value + 0.5), 0, 255)
        into[...] = value if layout == CHANNELS_LAST else value.transpose(2, 0, 1)


def filter_matrix(size: int, start: float, scale: float, count: int, antialias: bool) -> npt.NDArray[np.float64]:
    """Weights [count, size] of a triangle filter, as Pillow's `resize(..., BILINEAR, box=...)` has them.

    The triangle reaches one source pixel to either side, and with antialiasing one output pixel where that is more. It
    is cut off at the edge of the image, not of the box, and what is left sums to one.
    """
    reach = max(scale, 1.0) if antialias else 1.0
    centre = start + (np.arange(count)[:, None] + 0.5) * scale
    weights = np.maximum(0.0, 1.0 - np.abs((np.arange(size) + 0.5 - centre) / reach))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))
