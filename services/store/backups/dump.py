"""Documents as files and back: BSON, one after the other, compressed, in parts of bounded size."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import bson
from bson.errors import BSONError
from bson.raw_bson import RawBSONDocument

from shoal.errors import DataLoss

PART_BYTES = 16 << 20
"""Of documents in one file, before compression: one such is in memory, and a document of 16 MiB more."""

RAW: bson.CodecOptions[Any] = bson.CodecOptions(document_class=RawBSONDocument)
"""Documents as bytes: what is read is what is written, to the last type of a number."""


async def parts(docs: AsyncIterator[RawBSONDocument]) -> AsyncIterator[list[RawBSONDocument]]:
    """The documents, in parts."""
    part: list[RawBSONDocument] = []
    held = 0
    async for doc in docs:
        part.append(doc)
        held += len(doc.raw)
        if held >= PART_BYTES:
            yield part
            part, held = [], 0
    if part:
        yield part


def compressed(docs: Sequence[RawBSONDocument]) -> bytes:
    """A part, as it is written. The same bytes for the same documents."""
    return gzip.compress(b"".join([doc.raw for doc in docs]), compresslevel=1, mtime=0)


def documents(data: bytes, key: str) -> list[RawBSONDocument]:
    """The documents of a part as it was written.

    Raises:
        DataLoss: it is none.
    """
    try:
        return list(bson.decode_iter(gzip.decompress(data), codec_options=RAW))
    except (OSError, EOFError, zlib.error, BSONError) as err:
        raise DataLoss(f"{key}: these are no documents") from err
