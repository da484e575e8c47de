"""Weight of a result or a payload in a tenant's usage: its bytes, and a fixed amount for its documents.

The amount covers the document (of a result 300 to 390 bytes, a sixth of that on disk) and its index entries (170 to 280
bytes; 50,000 results, without and with two labels). So a weight follows from the size alone, when the thing is stored
and when it is removed. The amount is about right for payloads too: the documents of a reference and its artifact take
230 bytes on disk, their index entries 320 (50,000 of each).

A payload is an artifact with a reference for a tenant. Each reference counts for the whole artifact, however many
references it has: each is kept for its own job, and the last one keeps all of the bytes. A tenant's usage must not
depend on whether another tenant has sent the same bytes; storing them once is the store's gain.
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
    """Numbers of results and payloads, and the bytes that they count for."""

    results: int = 0
    bytes: int = 0
    """Bytes of all results and payloads."""
    payloads: int = 0
    payload_bytes: int = 0
    """Bytes of the payloads among them."""

    @classmethod
    def counted(cls, doc: Document) -> Weight:
        """Return the weight in a counter. A counter of an older version lacks payloads."""
        return cls(doc["results"], doc["bytes"], doc.get("payloads", 0), doc.get("payload_bytes", 0))

    @property
    def of_results(self) -> Weight:
        """Share of the results."""
        return Weight(self.results, self.bytes - self.payload_bytes)

    @property
    def of_payloads(self) -> Weight:
        """Share of the payloads."""
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
    """Return the weight that a newly recorded result adds.

    A result that `replaces` a failure, which had no answer, adds only its answer.
    """
    if replaces:
        return Weight(0, result_documents.response_bytes(doc))
    return Weight(1, RECORD_BYTES + result_documents.response_bytes(doc))


def weight_of_payloads(count: int, size: int) -> Weight:
    """Return the weight of `count` references to artifacts of `size` bytes in all."""
    nbytes = size + RECORD_BYTES * count
    return Weight(0, nbytes, count, nbytes)


def by_tenant(weights: Iterable[tuple[str, Weight]]) -> Mapping[str, Weight]:
    """Return the sum for each tenant."""
    sums: dict[str, Weight] = {}
    for tenant, weight in weights:
        sums[tenant] = sums.get(tenant, Weight()) + weight
    return sums


INLINE_BYTES: Mapping[str, Any] = {"$binarySize": {"$ifNull": ["$response", b""]}}
"""MongoDB expression: bytes of an answer inside its document."""
ANSWER_BYTES: Mapping[str, Any] = {"$add": [INLINE_BYTES, {"$ifNull": ["$blob.size", 0]}]}
"""MongoDB expression: bytes of an answer, inside its document or in a blob."""
