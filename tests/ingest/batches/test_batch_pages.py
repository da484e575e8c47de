"""Pages of batches: together they have each batch once, and one ends before its URLs need too much memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from mesh.mongo import Document
from services.ingest.batches.batch import Totals
from services.ingest.batches.batch_control import BatchControl
from services.ingest.batches.batch_repository import BatchRepository
from services.ingest.batches.documents import batch_document
from services.ingest.job_scan import PAGE_BYTES
from services.ingest.queries.jobs import Filter
from tests.ingest.batches.making import START, batch

IDS = [f"01JDG3W6ZKQ1N8X9T4B7R2M5P{n}" for n in range(9)]


class Collection:
    """The batches of a collection, as MongoDB's driver reads them."""

    def __init__(self, documents: list[Document]) -> None:
        self._documents = documents
        self.read = 0

    def find(self, query: Document) -> Collection:
        self._found = [each for each in self._documents if each["_id"] < query.get("_id", {}).get("$lt", "~")]
        return self

    def sort(self, key: str, order: int) -> Collection:
        self._found.sort(key=lambda each: each[key], reverse=order < 0)
        return self

    def limit(self, most: int) -> Collection:
        del self._found[most:]
        return self

    async def __aenter__(self) -> Collection:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def __aiter__(self) -> AsyncIterator[Document]:
        for document in self._found:
            self.read += 1
            yield document


@pytest.mark.parametrize(
    ("url_chars", "size", "pages"),
    [(10, 100, [9]), (10, 4, [4, 4, 1]), (10, 3, [3, 3, 3]), (PAGE_BYTES // 2, 100, [2, 2, 2, 2, 1])],
)
async def test_pages_have_each_batch_once_and_end_early_with_many_urls(
    url_chars: int, size: int, pages: list[int], tmp_path: Path
) -> None:
    # The driver's documents share the text of the URLs here.
    urls = ("x" * url_chars,)
    kept = Collection([{**batch_document(batch(tmp_path, id=each, totals=Totals())), "inputs": urls} for each in IDS])
    repository = BatchRepository(cast(Any, kept), cast(Any, None), clock=lambda: START, instance="i")
    control = BatchControl(repository, cast(Any, None), on_change=lambda: None, max_watches=1)
    found: list[list[str]] = []
    token = ""
    while token or not found:
        views, token = await control.page(Filter(), size, token)
        found.append([view.batch.id for view in views])
    assert [len(each) for each in found] == pages
    assert [each for page in found for each in page] == sorted(IDS, reverse=True)
    # Of each page but the last, one more: nothing of the rest is read.
    assert kept.read == len(IDS) + len(pages) - 1
