"""Memory of SubmitStream: an acknowledgement that waits for its client does not keep the job."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from services.ingest.intake.stream import Stream
from shoal.ingest.v1 import ingest_pb2 as pb
from tests.breakable import until


class Job:
    def __init__(self, id: str) -> None:
        self.id = id


async def test_acknowledgements_that_are_not_read_keep_no_jobs():
    futures: list[asyncio.Future[Any]] = []

    async def begin(submit: Any, traceparent: str, scope: Any) -> asyncio.Future[Any]:
        futures.append(asyncio.get_running_loop().create_future())
        return futures[-1]

    async def requests() -> AsyncIterator[pb.SubmitStreamRequest]:
        for n in range(3):
            yield pb.SubmitStreamRequest(sequence=n, submit=pb.SubmitRequest())

    intake: Any = SimpleNamespace(begin_when_there_is_room=begin)
    acknowledgements = Stream(intake, items=10, nbytes=1 << 20).acknowledge(requests())
    first = asyncio.ensure_future(anext(acknowledgements))
    await until(lambda: len(futures) == 3, "all jobs are under way")
    jobs = [Job(f"job {n}") for n in range(3)]
    references = [weakref.ref(job) for job in jobs]
    for job, future in zip(jobs, futures, strict=True):
        future.set_result(SimpleNamespace(job=job, existed=False))
    assert (await first).job_id == "job 0"
    futures.clear()
    del job, jobs, future
    # The client reads no more.
    await until(lambda: all(reference() is None for reference in references), "the jobs are dropped")
    assert [response.job_id async for response in acknowledgements] == ["job 1", "job 2"]
