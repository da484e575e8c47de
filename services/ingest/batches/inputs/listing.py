"""The inputs of a batch, pinned: which files or objects, how large, in which version; one JSON line for each.

It is written once, before anything runs, beside the results (`_inputs.jsonl`): a file that is changed or added later
changes nothing, or is found out.
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
class Listed:
    """A line of the listing."""

    entry: Entry
    offset: int
    """Where the line begins, and the next one."""
    end: int


def line_of(entry: Entry) -> bytes:
    """The line of a file or object."""
    line = {"url": entry.url, "size": entry.size, "version": entry.version}
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


def listed(file: BinaryIO, offset: int = 0) -> Iterator[Listed]:
    """The lines from `offset` on.

    Raises:
        DataLoss: one is not as it was written.
    """
    file.seek(offset)
    while line := file.readline(LINE_BYTES):
        try:
            found = json.loads(line)
            entry = Entry(str(found["url"]), int(found["size"]), str(found["version"]))
        except (ValueError, KeyError, TypeError) as err:
            raise DataLoss(f"_inputs.jsonl is broken near byte {offset}: {err}") from err
        yield Listed(entry, offset, offset + len(line))
        offset += len(line)
