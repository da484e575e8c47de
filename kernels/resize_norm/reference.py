"""Reference version of resize_norm: both filters as dense matrices in float64, one image after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.resize_norm.images import CHANNELS_LAST, Affine, Array, Packed, Unpacked


def run(images: Packed | Unpacked, out: Array, *, affine: Affine, antialias: bool, layout: str, **_: Any) -> None:
    packed = images.packed() if isinstance(images, Unpacked) else images
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
    """Return the weights [count, size] of a triangle filter, equal to Pillow's `resize(..., BILINEAR, box=...)`.

    The triangle extends one source pixel to each side, or with antialiasing one output pixel if that is larger. The
    filter is cut at the edge of the image, not of the box, and the remaining weights are scaled to the sum 1.
    """
    reach = max(scale, 1.0) if antialias else 1.0
    centre = start + (np.arange(count)[:, None] + 0.5) * scale
    weights = np.maximum(0.0, 1.0 - np.abs((np.arange(size) + 0.5 - centre) / reach))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))
