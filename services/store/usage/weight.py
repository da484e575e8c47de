"""What a result or a payload counts for: its bytes, and a fixed amount for all the rest of it.

The amount stands for the document (of a result 300 to 390 bytes, a sixth of that on disk) and its place in the indexes
(170 to 280 bytes; 50,000 results, without and with two labels). So what something counts for is known from its size
alone, when it comes and when it goes. It is about right for payloads too: the documents of a reference and its artifact
take 230 bytes on disk, their places in the indexes 320 (50,000 of each).

A payload is an artifact that is referred to for a tenant. Each reference counts for the whole artifact, however many
there are to it: each is kept for its own job, and the last one that stands keeps all of the bytes. What a tenant has
must not depend on whether somebody else has sent the same; that it is kept only once is the store's gain.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mesh.mongo import Document
from services.store.results import result_documents

RECORD_BYTES = 512


@dataclass(frozen=True)
class Weight:
    """So many results and payloads, and the bytes that they count for."""

    results: int = 0
    bytes: int = 0
    """Of all of them."""
    payloads: int = 0
    payload_bytes: int = 0
    """Of the payloads among them."""

    @classmethod
    def counted(cls, doc: Document) -> Weight:
        """What a counter says. One of an older version knows of no payloads."""
        return cls(doc["results"], doc["bytes"], doc.get("payloads", 0), doc.get("payload_bytes", 0))

    @property
    def of_results(self) -> Weight:
        """The results' part of it."""
        return Weight(self.results, self.bytes - self.payload_bytes)

    @property
    def of_payloads(self) -> Weight:
        """The payloads' part of it."""
        return Weight(0, self.payload_bytes, self.payloads, self.payload_bytes)

    def __add__(self, other: Weight) -> Weight:
        return Weight(*(one + more for one, more in zip(_numbers(self), _numbers(other), strict=True)))

    def __sub__(self, other: Weight) -> Weight:
        return Weight(*(one - less for one, less in zip(_numbers(self), _numbers(other), strict=True)))

    def __bool__(self) -> bool:
        return any(_numbers(self))


def _numbers(weight: Weight) -> tuple[int, ...]:
    return (weight.results, weight.bytes, weight.payloads, weight.payload_bytes)


def weight_of(doc: Document, *, replaces: bool = False) -> Weight:
    """What a result that was recorded now adds.

    One that `replaces` another takes the place of a failure, which had no answer: only its answer is added.
    """
    if replaces:
        return Weight(0, result_documents.response_bytes(doc))
    return Weight(1, RECORD_BYTES + result_documents.response_bytes(doc))


def weight_of_payloads(count: int, size: int) -> Weight:
    """What so many references count for, to artifacts of `size` bytes in all."""
    nbytes = size + RECORD_BYTES * count
    return Weight(0, nbytes, count, nbytes)


def by_tenant(weights: Iterable[tuple[str, Weight]]) -> Mapping[str, Weight]:
    """The sums."""
    sums: dict[str, Weight] = {}
    for tenant, weight in weights:
        sums[tenant] = sums.get(tenant, Weight()) + weight
    return sums


INLINE_BYTES: Mapping[str, Any] = {"$binarySize": {"$ifNull": ["$response", b""]}}
"""How much of an answer lies in the document, for MongoDB to work out."""
ANSWER_BYTES: Mapping[str, Any] = {"$add": [INLINE_BYTES, {"$ifNull": ["$blob.size", 0]}]}
"""How large an answer is, wherever it lies."""
