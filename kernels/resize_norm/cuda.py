"""resize_norm on NVIDIA GPUs: one launch for the whole ragged batch (resize_norm.cu), without copies or waits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kernels.cuda_source import CudaSource
from kernels.resize_norm.images import ALIGNMENT, CHANNELS_FIRST, Affine, Packed, Unpacked

_ROWS, _COLUMNS = 8, 32
# Limit of a grid's third dimension.
_MOST_IMAGES = 65_535
_TYPES = {"float32": "float", "float16": "__half", "uint8": "unsigned char"}
SOURCE = CudaSource(
    Path(__file__).with_name("resize_norm.cu"),
    tuple(f"resize_norm<{name}, {channels}>" for name in _TYPES.values() for channels in (1, 3)),
    # Allows four blocks of 256 threads per multiprocessor.
    registers=64,
)


def run(
    images: Packed | Unpacked, out: Any, *, affine: Affine, antialias: bool, layout: str, stream: Any, **_: Any
) -> None:
    packed = images.packed() if isinstance(images, Unpacked) else images
    _check_alignment(packed.pixels)
    channels = affine.scale.size
    count = out.shape[0]
    if count > _MOST_IMAGES:
        raise ValueError(f"resize_norm: {count} images in one launch; a GPU takes {_MOST_IMAGES}")
    out_h, out_w = out.shape[2:] if layout == CHANNELS_FIRST else out.shape[1:3]
    scale, bias = np.zeros(3, np.float32), np.zeros(3, np.float32)
    scale[:channels], bias[:channels] = affine.scale, affine.bias
    args = (
        packed.pixels,
        packed.table,
        out,
        np.int64(packed.pixels.size),
        np.int32(out_h),
        np.int32(out_w),
        np.int32(antialias),
        np.int32(layout == CHANNELS_FIRST),
        np.int32(affine.order[0] != 0),
        *scale,
        *bias,
    )
    grid = (-(-out_w // _COLUMNS), -(-out_h // _ROWS), count)
    SOURCE.launch(f"resize_norm<{_TYPES[out.dtype.name]}, {channels}>", grid, (32, _ROWS, 1), args, 0, stream)


def _check_alignment(pixels: Any) -> None:
    if not isinstance(pixels, np.ndarray) and pixels.data.ptr % ALIGNMENT:
        raise ValueError(f"resize_norm: pixels on a GPU must begin at a multiple of {ALIGNMENT} bytes; this is a slice")
