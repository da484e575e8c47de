"""Encoding of an image's lines as two tensors: the concatenated pixels, and the height and width of each line.

An ensemble has no tensor for images of several sizes. This file is copied to each step that imports it.
"""

from __future__ import annotations

import numpy as np


def packed(lines: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the two tensors of images [height, width, 3], as a batch of one."""
    pixels = np.concatenate([line.reshape(-1) for line in lines]) if lines else np.empty(0, np.uint8)
    return pixels[None], sizes(lines)


def sizes(lines: list[np.ndarray]) -> np.ndarray:
    return np.array([line.shape[:2] for line in lines], np.int32).reshape(1, -1, 2)


def unpacked(pixels: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """Return the images as views of `pixels`."""
    ends = np.cumsum(sizes[0].astype(np.int64).prod(1) * 3)
    parts = np.split(pixels[0], ends[:-1]) if len(ends) else []
    return [part.reshape(height, width, 3) for part, (height, width) in zip(parts, sizes[0], strict=True)]
