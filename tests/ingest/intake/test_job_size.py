"""The memory budget counts everything of a job whose size a caller chooses."""

from __future__ import annotations

import sys

import pytest

from services.ingest.intake.intake import _size
from services.ingest.limits import LABEL_CHARS, LABELS
from tests.ingest.making import job


@pytest.mark.parametrize("character", ["x", "\N{LATIN SMALL LETTER Y WITH DIAERESIS}", "\N{FISH}"])
def test_labels_are_counted(character: str) -> None:
    labels = tuple(
        (f"{number:03}" + character * (LABEL_CHARS - 3), character * LABEL_CHARS) for number in range(LABELS)
    )
    in_memory = sum(sys.getsizeof(text) for label in labels for text in label)
    assert _size(job(labels=labels)) - _size(job()) >= in_memory
