"""Segments of speech from the probability of each chunk, by the rule of silero-vad with its default settings.

A segment begins with a chunk of probability 0.5 or more. It ends where the probability fell below 0.35 and did not
reach 0.5 again for 100 ms. Segments of up to 250 ms are dropped. 30 ms are added at both ends, or half of the pause
between two segments if that is shorter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from examples.speech.build import CHUNK, RATE

BEGINS, ENDS = 0.5, 0.35
LEAST_PAUSE = RATE // 10
LEAST_SPEECH = RATE // 4
MARGIN = RATE * 30 // 1000


@dataclass(frozen=True)
class Segment:
    """Segment of speech from `start` to `end`, in samples."""

    start: int
    end: int


def segments(probabilities: Iterable[float], samples: int) -> list[Segment]:
    """Return the segments of a recording with this number of samples."""
    found = [each for each in _spoken(probabilities, samples) if each.end - each.start > LEAST_SPEECH]
    ends = [0, *(at for each in found for at in (each.start, each.end)), samples]
    margins = [_margin(ends[n + 1] - ends[n], n in (0, len(ends) - 2)) for n in range(0, len(ends), 2)]
    return [Segment(each.start - margins[n], each.end + margins[n + 1]) for n, each in enumerate(found)]


def _spoken(probabilities: Iterable[float], samples: int) -> Iterator[Segment]:
    start = fell = None
    for number, probability in enumerate(probabilities):
        at = number * CHUNK
        if probability >= BEGINS:
            start, fell = at if start is None else start, None
        elif probability < ENDS and start is not None:
            fell = at if fell is None else fell
            if at - fell >= LEAST_PAUSE:
                yield Segment(start, fell)
                start = fell = None
    if start is not None:
        yield Segment(start, samples)


def _margin(pause: int, is_outer: bool) -> int:
    """Return the part of a pause that is added to a segment; an inner pause is shared by two segments."""
    return min(MARGIN, pause if is_outer else pause // 2)
