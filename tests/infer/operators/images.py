"""Images as they are stored, made on the spot: structured, so that a compressed one is not all noise."""

from __future__ import annotations

import io

import cv2
import numpy as np


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Waves and some noise, RGB."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = [127 + 100 * np.sin(x / 17 + y / 31), 127 + 100 * np.cos(x / 23 + seed), 127 + 80 * np.sin(y / 13)]
    noise = np.random.default_rng(seed).normal(0, 6, (height, width, 3))
    return (np.stack(waves, -1) + noise).clip(0, 255).astype(np.uint8)


def encoded(image: np.ndarray, extension: str) -> bytes:
    """`image`, RGB, as a file of this kind."""
    return cv2.imencode(f".{extension}", image[..., ::-1] if image.ndim == 3 else image)[1].tobytes()


def turned(jpeg: bytes, orientation: int) -> bytes:
    """The JPEG with EXIF data that say how to turn it."""
    tiff = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0" + orientation.to_bytes(2, "little") + b"\0\0\0\0\0\0"
    body = b"Exif\0\0" + tiff
    return jpeg[:2] + b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body + jpeg[2:]


def array(*elements: bytes) -> np.ndarray:
    """BYTES [n, 1]."""
    made = np.empty((len(elements), 1), object)
    made[:, 0] = elements
    return made


def stream(data: bytes) -> io.BytesIO:
    return io.BytesIO(data)
