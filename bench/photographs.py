"""Pictures for benchmarks: real photographs from the sample data of packages, and synthetic ones."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from side_by_side import peer

_SAMPLES = {
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
    "skimage": (
        "data",
        (
            "astronaut.png",
            "chelsea.png",
            "coffee.png",
            "hubble_deep_field.jpg",
            "ihc.png",
            "motorcycle_left.png",
            "motorcycle_right.png",
            "retina.jpg",
            "rocket.jpg",
        ),
    ),
}


def photographs() -> list[np.ndarray]:
    """Return up to eleven photographs, uint8 [h, w, 3], 451 x 300 to 1411 x 1411.

    They are from the wheels of scikit-learn and scikit-image.
    """
    pillow = peer("PIL.Image")
    found = []
    for package, (folder, names) in _SAMPLES.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None or pillow is None:
            peer(package)
            continue
        for name in names:
            path = Path(spec.origin).parent / folder / name
            if path.exists():
                found.append(np.asarray(pillow.open(path).convert("RGB")).copy())
    return found


def enlarged(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Enlarge a photograph to the size of a camera's frame, as a substitute for large photographs."""
    pillow = peer("PIL.Image")
    made = pillow.fromarray(picture).resize((width, height), pillow.Resampling.LANCZOS)
    return np.asarray(made).copy()


def synthetic(count: int, low: int = 400, high: int = 1200, seed: int = 0) -> list[np.ndarray]:
    """Return pictures of random sizes with waves, noise and hard-edged rectangles."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        height, width = (int(side) for side in rng.integers(low, high + 1, 2))
        y = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
        x = np.linspace(0, 1, width, dtype=np.float32)[None, :, None]
        waves = 60 * np.sin(rng.uniform(10, 180, 3) * y) + 50 * np.cos(rng.uniform(10, 180, 3) * x)
        picture = 127 + waves + rng.normal(0, 18, (height, width, 3))
        for _ in range(12):
            top, left = int(rng.integers(0, height - 20)), int(rng.integers(0, width - 20))
            picture[top : top + int(rng.integers(5, 120)), left : left + int(rng.integers(5, 120))] = rng.integers(
                0, 256
            )
        made.append(np.clip(picture, 0, 255).astype(np.uint8))
    return made
