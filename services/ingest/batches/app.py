"""Wiring of the batch components, and the order in which they start and stop. Needs Arrow (`shoal[parquet]`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from types import TracebackType

from pymongo.asynchronous.database import AsyncDatabase

from mesh import mongo
from mesh.mongo import Document
from mesh.mongo_clock import Clock
from mesh.process.private_folder import PrivateFolder
from mesh.process.threads import Threads
from mesh.rpc.access import Access
from mesh.rpc.channel import AnyChannel
from services.ingest.batches.batch_control import BatchControl
from services.ingest.batches.batch_repository import BatchRepository
from services.ingest.batches.batcher import Batcher
from services.ingest.batches.chunk_repository import ChunkRepository
from services.ingest.batches.chunk_runner import ChunkRunner
from services.ingest.batches.documents import (
    BATCH_INDEXES,
    BATCH_VALIDATOR,
    BATCHES,
    CHUNK_INDEXES,
    CHUNK_VALIDATOR,
    CHUNKS,
)
from services.ingest.batches.duties import Duties
from services.ingest.batches.inputs.locations import InputLocations
from services.ingest.batches.model_metadata import ModelMetadata
from services.ingest.batches.readers import ReaderCache
from services.ingest.batches.row_inference import InferenceClient
from services.ingest.batches.submission import SUBMITS_AT_ONCE, Submissions
from services.ingest.config import IngestConfig
from services.ingest.retention.retention_repository import RetentionRepository

# Threads that read, pack and write the running chunks, and that plan.
_THREADS = 8


class Batches:
    """Batch processing of one instance. Use it as `async with`, once; work starts when `ready` is set."""

    def __init__(
        self,
        config: IngestConfig,
        database: AsyncDatabase[Document],
        channel: AnyChannel,
        model: InferenceClient,
        retention: RetentionRepository,
        *,
        clock: Clock,
        new_id: Callable[[], str],
        ready: asyncio.Event,
        access: Access | None = None,
    ) -> None:
        name = f"{config.node}/{config.instance}"
        self.clock = clock
        locations = InputLocations(config.batch_url_prefixes)
        self._database = database
        self._stack = AsyncExitStack()
        self._threads = Threads(_THREADS, "batch")
        # Of their own: an unavailable store blocks each for seconds, and chunks must not wait for it.
        self._submit_threads = Threads(SUBMITS_AT_ONCE, "batch-submit")
        self._readers = ReaderCache(locations)
        self._folder = PrivateFolder("shoal-tmp-batches-")
        folder = self._folder.path
        self._chunks = ChunkRepository(
            database[CHUNKS],
            clock=clock,
            new_id=new_id,
            owner=name,
            process=new_id(),
            lease_ms=config.lease_ms,
        )
        self._batches = BatchRepository(database[BATCHES], self._chunks, clock=clock, instance=name)
        self.runner = ChunkRunner(
            model,
            locations,
            self._readers,
            self._threads,
            folder=folder,
            max_requests=config.batch_calls,
            timeout_s=config.attempt_timeout_ms / 1000,
        )
        self._batcher = Batcher(
            self._batches,
            self._chunks,
            Duties(self._batches, self._chunks, locations, self._threads, folder=folder),
            self.runner,
            clock=clock,
            ready=ready,
            slots=config.batch_chunks,
            poll_ms=config.poll_ms,
            renew_ms=config.renew_ms,
            retention=retention,
            access=access,
        )
        self.submissions = Submissions(
            self._batches,
            ModelMetadata(channel),
            locations,
            self._submit_threads,
            clock=clock,
            new_id=new_id,
            instance=name,
            on_accepted=self._batcher.wake,
        )
        self.control = BatchControl(
            self._batches, self._chunks, on_change=self._batcher.wake, max_watches=config.max_watches
        )

    async def __aenter__(self) -> Batches:
        self._stack.enter_context(self._folder)
        self._stack.enter_context(self._threads)
        self._stack.enter_context(self._submit_threads)
        self._stack.callback(self._readers.close)
        await self._stack.enter_async_context(self._batcher)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, err, tb)

    def stop(self) -> None:
        """Claim no further chunk and no further duty."""
        self._batcher.stop()

    async def prepare(self) -> int:
        """Create the collections, and free the leases of earlier processes of this instance.

        Returns the number of chunks that were freed.

        Raises:
            Unavailable: MongoDB is unavailable.
        """
        await mongo.ensure_collection(self._database, BATCHES, validator=BATCH_VALIDATOR, indexes=BATCH_INDEXES)
        await mongo.ensure_collection(self._database, CHUNKS, validator=CHUNK_VALIDATOR, indexes=CHUNK_INDEXES)
        await self._batches.release_stale()
        return await self._chunks.release_stale()
