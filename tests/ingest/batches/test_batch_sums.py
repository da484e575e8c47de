"""Sums over a batch's chunks: what a large batch costs MongoDB does not grow with its watchers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast

from services.ingest.batches.batch import Totals
from services.ingest.batches.batch_control import BatchControl
from services.ingest.batches.batch_repository import BatchRepository
from services.ingest.batches.chunk_repository import ChunkRepository
from tests.ingest.batches.making import batch


class Chunks:
    """Chunks whose sum takes a second."""

    def __init__(self) -> None:
        self.now = 100.0
        self.reads = 0

    async def totals(self, batch_id: str) -> Totals:
        self.reads += 1
        await asyncio.sleep(0)
        self.now += 1
        return Totals(rows=self.reads)


async def test_a_slow_sum_is_made_once_for_all_watchers_and_rarely(tmp_path: Path) -> None:
    chunks, one = Chunks(), batch(tmp_path)
    control = BatchControl(
        cast(BatchRepository, None),
        cast(ChunkRepository, chunks),
        on_change=lambda: None,
        max_watches=1,
        monotonic=lambda: chunks.now,
    )
    views = await asyncio.gather(*(control._view(one) for _ in range(100)))
    assert ({view.totals.rows for view in views}, chunks.reads) == ({1}, 1)
    chunks.now += 19
    assert (await control._view(one)).totals.rows == 1
    chunks.now += 2
    assert (await control._view(one)).totals.rows == 2
