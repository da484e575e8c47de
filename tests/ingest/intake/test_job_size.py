"""The memory budget counts everything of a job whose size a caller chooses."""

from __future__ import annotations

import sys

import pytest

from services.ingest.dependencies.references import MOST, by_key
from services.ingest.intake.intake import _size
from services.ingest.limits import KEY_CHARS, LABEL_CHARS, LABELS
from tests.ingest.making import job


@pytest.mark.parametrize("character", ["x", "\N{LATIN SMALL LETTER Y WITH DIAERESIS}", "\N{FISH}"])
def test_labels_are_counted(character: str) -> None:
    labels = tuple(
        (f"{number:03}" + character * (LABEL_CHARS - 3), character * LABEL_CHARS) for number in range(LABELS)
    )
    in_memory = sum(sys.getsizeof(text) for label in labels for text in label)
    assert _size(job(labels=labels)) - _size(job()) >= in_memory


@pytest.mark.parametrize("character", ["x", "\N{LATIN SMALL LETTER Y WITH DIAERESIS}", "\N{FISH}"])
def test_dependencies_are_counted(character: str) -> None:
    references = tuple(by_key(f"{number:03}" + character * (KEY_CHARS - 3)) for number in range(MOST))
    in_memory = sum(map(sys.getsizeof, references)) + sys.getsizeof(references)
    assert _size(job(depends_on=references)) - _size(job()) >= in_memory
