"""Lines of text on an image, read by Shoal or by the original package, and their comparison."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import shoal
from examples import originals

MODEL = "ocr"

LEAST_SCORE = 0.5
"""Lowest score of a line; equal to the package's limit. Below it the model guesses, and one grey level may matter."""

# Resized pixels differ by up to a grey level from OpenCV's. This may move a side of a box by about one pixel of the
# image, and both results are rounded to whole pixels.
LARGEST_OFF_PX = 2.0

# The same grey levels matter, and the package makes lines a pixel narrower: it rounds down, Shoal up.
LARGEST_OFF_SCORE = 0.02


@dataclass(frozen=True)
class Line:
    """A line of text."""

    text: str
    score: float
    box: NDArray[np.float32]
    """Corners [4, 2] in pixels (x, y), clockwise from the line's top left corner."""


def read(client: shoal.Client, image: bytes) -> list[Line]:
    """Return the lines on an image with a score of LEAST_SCORE or more, in reading order.

    Raises:
        shoal.errors.InvalidArgument: the bytes are not an image, or a damaged one.
    """
    answer = client.infer(MODEL, {"image": np.array([[image]], object)})
    texts, scores = answer["texts"][:, 0], answer["scores"][:, 0]
    lines = zip(texts, scores, answer["boxes"][0], strict=True)
    return [Line(text.decode(), float(score), box) for text, score, box in lines if score >= LEAST_SCORE]


def by_the_package(images: Sequence[bytes]) -> list[list[Line]]:
    """Return the lines that rapidocr-onnxruntime reads on the same files."""
    encoded = [base64.b64encode(image).decode() for image in images]
    answers = originals.ask(Path(__file__).with_name("original.py"), encoded)
    return [[Line(text, score, np.array(box, np.float32)) for box, text, score in lines] for lines in answers]


@dataclass(frozen=True)
class Comparison:
    """Differences between two readings of one image."""

    wrong: tuple[str, ...]
    """Descriptions of the differences that exceed the limits."""
    off_px: float = 0.0
    """Largest distance of two corners, along x or y."""
    off_score: float = 0.0


def compare(ours: Sequence[Line], theirs: Sequence[Line]) -> Comparison:
    """Compare two readings line by line."""
    if len(ours) != len(theirs):
        return Comparison((f"{len(ours)} lines, the package has {len(theirs)}: {[line.text for line in theirs]}",))
    pairs = [_compare(*pair) for pair in zip(ours, theirs, strict=True)]
    return Comparison(
        tuple(wrong for pair in pairs for wrong in pair.wrong),
        max((pair.off_px for pair in pairs), default=0.0),
        max((pair.off_score for pair in pairs), default=0.0),
    )


def _compare(our: Line, their: Line) -> Comparison:
    wrong = []
    off_px, off_score = float(np.abs(our.box - their.box).max()), abs(our.score - their.score)
    if our.text != their.text:
        wrong.append(f"{our.text!r}, the package has {their.text!r}")
    if not off_score <= LARGEST_OFF_SCORE:
        wrong.append(f"{our.text!r}: score {our.score:.3f}, the package has {their.score:.3f}")
    if not off_px <= LARGEST_OFF_PX:
        wrong.append(f"{our.text!r}: a corner is {off_px:.1f} pixels off")
    return Comparison(tuple(wrong), off_px, off_score)
