"""Reader of objects: each object (an image, a text) is a row with the columns `content` (bytes) and `url`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

from services.ingest.batches.inputs.listing import ListedEntry, listed
from services.ingest.batches.inputs.locations import Entry
from services.ingest.batches.inputs.piece import PIECE_BYTES, ROW_BYTES, Piece
from shoal.errors import DataLoss, NotFound

COLUMNS = ("content", "url")
_AT_ONCE = 8
_ROWS = 64


class ObjectRows:
    """Reader of the objects of a listing. `fetch` reads one object."""

    def __init__(self, listing: BinaryIO, fetch: Callable[[Entry], bytes]) -> None:
        self._listing = listing
        self._fetch = fetch
        self._row = 0
        self._lines: Iterator[ListedEntry] = iter(())
        self._held: ListedEntry | None = None
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="batch-objects")

    def seek(self, row: int, offset: int) -> None:
        """Go to row `row`, whose line begins at `offset`."""
        self._lines = listed(self._listing, offset)
        self._held = None
        self._row = row

    def read(self, limit: int) -> Piece:
        """Return the next objects, fetched concurrently. An object that cannot be read is a failed row.

        Raises:
            Unavailable: the object store is unavailable.
        """
        input_entries = [line.entry for line in self._next(min(limit, _ROWS))]
        if not input_entries:
            raise DataLoss(f"the listing ends before row {self._row}")
        first, self._row = self._row, self._row + len(input_entries)
        errors: dict[int, str] = {}
        contents: list[bytes | None] = []
        for index, content in enumerate(self._pool.map(self._content, input_entries)):
            contents.append(content if isinstance(content, bytes) else None)
            if isinstance(content, str):
                errors[index] = content
        urls = [entry.url for entry in input_entries]
        return Piece(first, len(input_entries), {"content": contents, "url": urls}, errors, sources=urls)

    def _next(self, limit: int) -> list[ListedEntry]:
        found: list[ListedEntry] = []
        nbytes = 0
        while len(found) < limit:
            line = self._held or next(self._lines, None)
            self._held = None
            if line is None:
                break
            nbytes += min(line.entry.size, ROW_BYTES)
            if found and nbytes > PIECE_BYTES:
                self._held = line
                break
            found.append(line)
        return found

    def _content(self, entry: Entry) -> bytes | str:
        """Return the content, or the reason (str) for which it cannot be read."""
        if entry.size > ROW_BYTES:
            return f"the object has {entry.size} bytes: at most {ROW_BYTES} are accepted"
        try:
            return self._fetch(entry)
        except NotFound:
            return "the object was removed since the batch was planned"
        except DataLoss as err:
            return err.message

    def close(self) -> None:
        self._pool.shutdown()
        self._listing.close()
