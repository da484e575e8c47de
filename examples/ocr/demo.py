"""`make ocr`: reads pages, each with one request: the bytes of an image in, lines of text and their boxes out.

    file ──> ocr: decode ──> detect ──> boxes ──> crops ─┬─ each: angle ──> turn ──> read ──> text
                                                         (models/: one ensemble of 11 models, in one process)

Every answer is compared with that of the original package, rapidocr-onnxruntime, about the same file. Exits 0 when all
lines agree, 1 when one does not.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import shoal
from examples import originals
from examples.node import with_node
from examples.ocr.build import build
from examples.ocr.pages import pages

MODEL = "ocr"
AT_ONCE = 4

SURE = 0.5
"""Lines that are read with less are left out, as the original package does."""

UNSURE = 0.08
# Pixels are resized by another resize than the package's, at most a level of grey apart: scores move by hundredths. A
# line this near to SURE may be in the one answer and not in the other, or be read otherwise: it is a guess.

BOX_PIXELS = 2.0
# Corners, for the same reason: the edge of what the detector is sure of moves by a pixel of its map.

MOST_EDITS = 0.1
# Of a text's characters: whether there is a blank between two words, or 0 or O, can hang on that level of grey.


@dataclass(frozen=True)
class Line:
    """One line of text on a page."""

    text: str
    score: float
    box: tuple[tuple[float, float], ...]
    """Its corners, clockwise from the top left."""


async def read(client: shoal.AsyncClient, file: bytes) -> list[Line]:
    """The lines on one page, in reading order; none for a page without text."""
    answer = await client.infer(MODEL, {"file": np.array([[file]], object)})
    texts, scores, boxes = answer["texts"][:, 0], answer["scores"][:, 0], answer["boxes"][0]
    found = zip(texts, scores, boxes, strict=True)
    return [_line(_text(text), float(score), box) for text, score, box in found if score >= SURE]


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _line(text: str, score: float, box: Any) -> Line:
    return Line(text, score, tuple((float(x), float(y)) for x, y in box))


async def read_all(client: shoal.AsyncClient, files: Sequence[bytes]) -> list[list[Line]]:
    """The lines on each page, `AT_ONCE` requests in flight."""
    places = asyncio.Semaphore(AT_ONCE)

    async def one(file: bytes) -> list[Line]:
        async with places:
            return await read(client, file)

    return await asyncio.gather(*map(one, files))


def differences(ours: Sequence[Line], theirs: Sequence[Line]) -> list[str]:
    """What the two do not agree on: a line that only one has, another text."""
    left, wrong = list(ours), []
    for line in theirs:
        is_sure = line.score > SURE + UNSURE
        same = next((other for other in left if _distance(line, other) <= BOX_PIXELS), None)
        if same is None:
            if is_sure:
                wrong.append(f"only the package reads {line.text!r} ({line.score:.2f}) at {line.box[0]}")
            continue
        left.remove(same)
        if is_sure and _edits(same.text, line.text) > MOST_EDITS * len(line.text):
            wrong.append(
                f"read as {same.text!r} ({same.score:.2f}), by the package as {line.text!r} ({line.score:.2f})"
            )
    wrong += [f"only we read {line.text!r} ({line.score:.2f})" for line in left if line.score > SURE + UNSURE]
    return wrong


def _distance(one: Line, other: Line) -> float:
    """Of the corners that are furthest apart, in pixels."""
    return float(np.abs(np.array(one.box) - np.array(other.box)).max())


def _edits(one: str, other: str) -> int:
    """Insertions, deletions and replacements between two texts (Levenshtein)."""
    costs = list(range(len(other) + 1))
    for n, a in enumerate(one, 1):
        before, costs[0] = costs[0], n
        for m, b in enumerate(other, 1):
            before, costs[m] = costs[m], min(costs[m] + 1, costs[m - 1] + 1, before + (a != b))
    return costs[-1]


def original(files: Sequence[Path]) -> list[list[Line]]:
    """What the original package reads on the pages."""
    answer = originals.ask(Path(__file__).with_name("original.py"), [str(file) for file in files])
    return [[_line(line["text"], line["score"], line["box"]) for line in page] for page in answer["pages"]]


def compare(names: Sequence[str], ours: Sequence[Sequence[Line]], theirs: Sequence[Sequence[Line]]) -> int:
    """Says how the answers agree; 0 when they do."""
    lines = same = wrong = 0
    for name, our, their in zip(names, ours, theirs, strict=True):
        for difference in (found := differences(our, their)):
            print(f"{name}: {difference}")
        wrong += len(found)
        lines += len(their)
        same += len({line.text for line in our} & {line.text for line in their})
    print(
        f"{lines} lines on {len(names)} pages: {same} to the letter as rapidocr-onnxruntime reads them, {wrong} differ"
    )
    return 1 if wrong else 0


def show(pages_read: Mapping[str, Sequence[Line]]) -> None:
    """The pages, and what is on them."""
    for name, lines in pages_read.items():
        print(f"\n{name}")
        for line in lines[:8]:
            print(f"  {line.score:.2f}  {line.text}")
        if len(lines) > 8:
            print(f"  ... and {len(lines) - 8} more")
        if not lines:
            print("  no text")


def main() -> int:
    """Runs the example; returns the exit status."""
    originals.folder("rapidocr_onnxruntime")
    return with_node(lambda gateway, folder: asyncio.run(_read(gateway, folder)))


async def _read(gateway: str, folder: Path) -> int:
    (folder / "pages").mkdir()
    files = pages(folder / "pages")
    async with shoal.AsyncClient(gateway) as client:
        pushed = await client.models.push(build(folder / "models"))
        print(f"pushed {', '.join(each.model.name for each in pushed)}")
        start = time.monotonic()
        ours = await read_all(client, [file.read_bytes() for file in files.values()])
        seconds = time.monotonic() - start
    show(dict(zip(files, ours, strict=True)))
    print(f"\n{len(files)} pages in {seconds:.1f} s, {AT_ONCE} in flight")
    return compare(list(files), ours, await asyncio.to_thread(original, list(files.values())))


if __name__ == "__main__":
    sys.exit(main())
