"""What is read on an image: through Shoal, or by the original package; and whether the two agree."""

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
"""The package's: what is read with less is no text. Below it the model guesses, and a grey level changes its guess."""

LARGEST_OFF_PX = 2.0
# Resized pixels differ by a grey level from OpenCV's, which may move a side by a pixel of the map: no larger than about
# one of the image. Then both round to whole pixels.

LARGEST_OFF_SCORE = 0.02
# The same grey levels, and lines that the package makes a pixel narrower (it rounds down, Shoal up).


@dataclass(frozen=True)
class Line:
    """A line of text."""

    text: str
    score: float
    box: NDArray[np.float32]
    """Corners [4, 2] in pixels (x, y), clockwise from the line's top left."""


def read(client: shoal.Client, image: bytes) -> list[Line]:
    """The lines on an image, in reading order, but for those that are hardly text.

    Raises:
        shoal.errors.InvalidArgument: it is no image, or a broken one.
    """
    answer = client.infer(MODEL, {"image": np.array([[image]], object)})
    texts, scores = answer["texts"][:, 0], answer["scores"][:, 0]
    lines = zip(texts, scores, answer["boxes"][0], strict=True)
    return [Line(text.decode(), float(score), box) for text, score, box in lines if score >= LEAST_SCORE]


def by_the_package(images: Sequence[bytes]) -> list[list[Line]]:
    """What rapidocr-onnxruntime reads on the same files."""
    asked = [base64.b64encode(image).decode() for image in images]
    answers = originals.ask(Path(__file__).with_name("original.py"), asked)
    return [[Line(text, score, np.array(box, np.float32)) for box, text, score in lines] for lines in answers]


@dataclass(frozen=True)
class Comparison:
    """How two readings of one image differ."""

    wrong: tuple[str, ...]
    """In words; none when they agree."""
    off_px: float = 0.0
    """The farthest corner, along x or y."""
    off_score: float = 0.0


def compare(ours: Sequence[Line], theirs: Sequence[Line]) -> Comparison:
    """Line by line."""
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
