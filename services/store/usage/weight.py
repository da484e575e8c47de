"""What a result counts for: its answer, and a fixed amount for all the rest of it.

The amount stands for the document (300 to 390 bytes, a sixth of that on disk) and its place in the indexes (170 to 280
bytes; 50,000 results, without and with two labels). So what a result counts for is known from its answer's size alone,
when it comes and when it goes.
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
    """So many results, and the bytes that they count for."""

    results: int = 0
    bytes: int = 0

    def __add__(self, other: Weight) -> Weight:
        return Weight(self.results + other.results, self.bytes + other.bytes)

    def __sub__(self, other: Weight) -> Weight:
        return Weight(self.results - other.results, self.bytes - other.bytes)

    def __bool__(self) -> bool:
        return bool(self.results or self.bytes)


def weight_of(doc: Document) -> Weight:
    """What a result that was recorded now adds.

    One of a later generation takes the place of a failure, which had no answer: only its answer is added.
    """
    if "generation" in doc:
        return Weight(0, result_documents.response_bytes(doc))
    return Weight(1, RECORD_BYTES + result_documents.response_bytes(doc))


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
