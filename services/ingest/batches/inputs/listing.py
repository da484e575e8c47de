"""Listing of a batch's pinned inputs: URL, size and version of each file or object, as JSON lines.

The listing is written once, before any chunk runs, beside the results (`_inputs.jsonl`). A file that is added later is
ignored, and a file that is changed later is detected.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from services.ingest.batches.inputs.locations import Entry
from shoal.errors import DataLoss

LINE_BYTES = 16 << 10
"""Longer than any URL with its version."""


@dataclass(frozen=True, slots=True)
class ListedEntry:
    """Line of the listing."""

    entry: Entry
    offset: int
    end: int
    """Offset of the next line."""


def line_of(entry: Entry) -> bytes:
    """Return the line of a file or object."""
    line = {"url": entry.url, "size": entry.size, "version": entry.version}
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


def listed(file: BinaryIO, offset: int = 0) -> Iterator[ListedEntry]:
    """Yield the lines from `offset` on.

    Raises:
        DataLoss: a line is damaged.
    """
    file.seek(offset)
    while line := file.readline(LINE_BYTES):
        try:
            found = json.loads(line)
            entry = Entry(str(found["url"]), int(found["size"]), str(found["version"]))
        except (ValueError, KeyError, TypeError) as err:
            raise DataLoss(f"_inputs.jsonl is broken near byte {offset}: {err}") from err
        yield ListedEntry(entry, offset, offset + len(line))
        offset += len(line)
