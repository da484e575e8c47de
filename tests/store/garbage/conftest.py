"""The parts of the store that collect, over a real MongoDB, with a clock that moves when it is told to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pymongo.asynchronous.database import AsyncDatabase

from mesh import mongo
from mesh.mongo import Document
from mesh.process.threads import Threads
from services.store.artifacts.artifacts import Artifacts
from services.store.artifacts.blobs import BlobStore
from services.store.artifacts.opening import open_blobs
from services.store.artifacts.staging import Staging
from services.store.artifacts.stored import Stored
from services.store.documents import Collections
from services.store.garbage.collector import Collector
from services.store.garbage.references import References
from services.store.garbage.verification import Verification
from services.store.registry.model_rules import File
from services.store.registry.registry import Draft, Registry
from services.store.results.large_responses import LargeResponses
from tests.store.artifacts.conftest import uploaded
from tests.store.conftest import sha256


class Clock:
    """The time of the test."""

    def __init__(self) -> None:
        # Blobs have the time of this machine: the two begin together.
        self.now = datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **by: float) -> None:
        self.now += timedelta(**by)


@dataclass
class Parts:
    """A store without its front."""

    clock: Clock
    collections: Collections
    blobs: BlobStore
    root: Path
    artifacts: Artifacts
    registry: Registry
    references: References
    responses: LargeResponses
    collector: Collector
    verification: Verification

    async def put(self, data: bytes, **header: object) -> Stored:
        return (await self.artifacts.put(await uploaded(data, **header)))[0]

    async def refer(self, name: str, data: bytes, tenant: str | None = None) -> None:
        await self.references.make(name, Stored(sha256(data), len(data), self.clock.now, ""), tenant)

    async def read(self, data: bytes) -> bytes:
        _, chunks = await self.artifacts.reader.read(sha256(data), 0)
        return b"".join([chunk async for chunk in chunks])

    async def register(self, name: str, *contents: bytes) -> None:
        files = [File(f"f{n}", sha256(content), len(content)) for n, content in enumerate(contents)]
        await self.registry.register([Draft(name, 0, tuple(files), {})])

    async def collect_all(self, **ages: float) -> None:
        """Rounds enough for everything that nobody refers to, when nothing else goes on."""
        for _ in range(4):
            self.clock.advance(**(ages or {"days": 2}))
            await self.collector.collect(strays=True)

    async def keys(self) -> list[str]:
        """Every blob that there is."""
        return sorted(
            [b.key async for b in self.blobs.list("artifacts")] + [b.key async for b in self.blobs.list("responses")]
        )

    async def known(self) -> set[str]:
        return {doc["_id"] async for doc in self.collections.artifacts.find({}, {"_id": 1})}


def make_parts(database: AsyncDatabase[Document], folder: Path, threads: Threads, clock: Clock) -> Parts:
    collections = Collections(database)
    blobs, staged = open_blobs(f"file://{folder}", None, threads)
    staging = Staging(staged, 64, 3_600)
    artifacts = Artifacts(collections, blobs, staging, threads, max_bytes=1 << 30, clock=clock)
    responses = LargeResponses(blobs, threads)
    return Parts(
        clock,
        collections,
        blobs,
        folder,
        artifacts,
        Registry(collections, artifacts, clock, 8 << 20),
        References(collections, artifacts, clock),
        responses,
        Collector(collections, blobs, clock),
        Verification(collections, blobs, artifacts.reader, responses),
    )


@pytest.fixture
def threads() -> Iterator[Threads]:
    with ExitStack() as stack:
        yield stack.enter_context(Threads(4))


@pytest.fixture
async def parts(mongo_uri: str, mongo_database: str, tmp_path: Path, threads: Threads) -> AsyncIterator[Parts]:
    async with mongo.connect(mongo_uri) as client:
        parts = make_parts(client[mongo_database], tmp_path / "blobs", threads, Clock())
        await parts.collections.prepare()
        yield parts
