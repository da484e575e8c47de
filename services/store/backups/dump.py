"""Files of documents: concatenated BSON, compressed, in parts of bounded size."""

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
"""Size of a part before compression. One part is in memory, and one document of up to 16 MiB more."""

RAW: bson.CodecOptions[Any] = bson.CodecOptions(document_class=RawBSONDocument)
"""Documents as raw bytes: a restored document equals the original, including the type of each number."""


async def parts(docs: AsyncIterator[RawBSONDocument]) -> AsyncIterator[list[RawBSONDocument]]:
    """Yield the documents in parts."""
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
    """Return the file of a part. Equal documents give equal bytes."""
    return gzip.compress(b"".join([doc.raw for doc in docs]), compresslevel=1, mtime=0)


def documents(data: bytes, key: str) -> list[RawBSONDocument]:
    """Return the documents of a part's file.

    Raises:
        DataLoss: the file is damaged.
    """
    try:
        return list(bson.decode_iter(gzip.decompress(data), codec_options=RAW))
    except (OSError, EOFError, zlib.error, BSONError) as err:
        raise DataLoss(f"{key}: not a file of documents") from err


def without_field(doc: RawBSONDocument, field: str) -> RawBSONDocument:
    """Return the document without `field`."""
    return RawBSONDocument(
        bson.encode({name: value for name, value in doc.items() if name != field}, codec_options=RAW)
    )


def with_field(doc: RawBSONDocument, field: str, value: Any) -> RawBSONDocument:
    """Return the document with another value in `field`; a document without that field stays as it is."""
    return RawBSONDocument(bson.encode({**doc, field: value}, codec_options=RAW)) if field in doc else doc
