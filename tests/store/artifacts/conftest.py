"""Artifacts without the service around them, over any blob store."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from mesh import mongo
from mesh.process.threads import Threads
from services.store.artifacts.artifacts import Artifacts
from services.store.artifacts.blobs import BlobStore
from services.store.artifacts.staging import Staging
from services.store.artifacts.uploads import Upload
from services.store.documents import Collections
from tests.store.conftest import upload

MakeArtifacts = Callable[[BlobStore], Artifacts]


@pytest.fixture
def threads() -> Iterator[Threads]:
    with Threads(4) as threads:
        yield threads


@pytest.fixture
async def collections(mongo_uri: str, mongo_database: str) -> AsyncIterator[Collections]:
    async with mongo.connect(mongo_uri) as client:
        collections = Collections(client[mongo_database])
        await collections.prepare()
        yield collections


@pytest.fixture
def make_artifacts(collections: Collections, tmp_path: Path, threads: Threads) -> MakeArtifacts:
    folder = tmp_path / "staging"
    folder.mkdir()

    def make(blobs: BlobStore) -> Artifacts:
        staging = Staging(folder, 4, 60)
        return Artifacts(collections, blobs, staging, threads, max_bytes=1 << 30, clock=lambda: datetime.now(UTC))

    return make


async def uploaded(data: bytes, **fields: object) -> Upload:
    async def messages():
        for message in upload(data, **fields):
            yield message

    return await Upload.opened(messages(), 60)


async def read(artifacts: Artifacts, digest: str, offset: int = 0) -> bytes:
    _, chunks = await artifacts.reader.read(digest, offset)
    return b"".join([chunk async for chunk in chunks])
