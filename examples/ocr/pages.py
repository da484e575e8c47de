"""Pages to read: scans and photographs of scikit-image, and pages drawn here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from examples import originals

Image = npt.NDArray[np.uint8]

LINES = (
    "Shoal: many requests, moving as one",
    "INVOICE 2026-11-24",
    "Total 98.76 EUR",
    "Order 4711 / Customer 0815",
    "One queue for each model",
    "Nothing acknowledged is lost",
)


def pages(into: Path) -> dict[str, Path]:
    """Files in `into` by what is on them."""
    data = originals.folder("skimage") / "data"
    found = {
        "a scan of a book": cv2.imread(str(data / "page.png")),
        "handwriting": cv2.imread(str(data / "text.png")),
        "a photograph of coins": cv2.imread(str(data / "coins.png")),
        "a cat, and no text": cv2.imread(str(data / "chelsea.png")),
        "an empty page": np.full((300, 400, 3), 255, np.uint8),
    }
    found |= {f"a letter, {height} by {width}": _letter(n, height, width) for n, (height, width) in enumerate(_SIZES)}
    found["a letter upside down"] = np.ascontiguousarray(np.rot90(_letter(7, 400, 640), 2))
    found["white on black"] = 255 - _letter(8, 300, 640)
    return {name: _written(into / f"{n:02}{_SUFFIXES[n % 3]}", image) for n, (name, image) in enumerate(found.items())}


_SIZES = ((400, 640), (700, 640), (500, 900), (900, 700))
_SUFFIXES = (".png", ".jpg", ".webp")


def _letter(seed: int, height: int, width: int) -> Image:
    """Dark text on paper, one line a little tilted."""
    rng: Any = np.random.default_rng(seed)
    image = np.full((height, width, 3), 245, np.uint8)
    for n, line in enumerate(rng.permutation(LINES)):
        at = (int(rng.integers(10, 40)), 60 + n * (height - 80) // len(LINES))
        scale = float(rng.uniform(0.7, 0.9))
        cv2.putText(image, str(line), at, cv2.FONT_HERSHEY_DUPLEX, scale, (30, 20, 20), 1, cv2.LINE_AA)
    return image


def _written(path: Path, image: Image) -> Path:
    if not cv2.imwrite(str(path), image):
        raise OSError(f"{path} could not be written")
    return path
