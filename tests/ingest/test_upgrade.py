"""An upgrade whose new indexes are not there yet: ingest serves without the ones that only make lists faster."""

from __future__ import annotations

from pymongo import AsyncMongoClient, IndexModel

from mesh.mongo import Document
from services.ingest.documents import JOBS, NEEDED_INDEXES
from shoal.ingest.v1 import ingest_pb2 as pb
from tests.ingest.conftest import StartIngest
from tests.ingest.faults import Client, FakeMesh


async def test_ingest_serves_while_an_index_of_lists_is_missing(
    own_mesh: FakeMesh, start_ingest: StartIngest, mongo_uri: str, mongo_database: str
) -> None:
    async with AsyncMongoClient[Document](mongo_uri) as mongo:
        jobs = mongo[mongo_database][JOBS]
        # An index of this name with other keys: ours cannot be built.
        await jobs.create_indexes([IndexModel("x", name="by_tenant_state"), IndexModel("tenant", name="by_tenant")])
        ingest = start_ingest()
        await ingest.until_ready()
        client = Client(ingest.address)
        done = await client.ended((await client.submit(tenant="t")).job.id)
        listed = await client.stub.ListJobs(pb.ListJobsRequest(tenant="t", state=done.state), timeout=20)
        assert [job.id for job in listed.jobs] == [done.id]
        names = set(await jobs.index_information())
        assert {index.document["name"] for index in NEEDED_INDEXES} <= names
        # Until the new one is there.
        assert "by_tenant" in names
        await client.channel.close()
