"""A steady stream of jobs from several tenants, and the comparison at its end.

A producer repeats a submit with its key until it is acknowledged, as a client that must not lose work does; half of the
producers submit one by one, half on a stream.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager

import grpc
import numpy as np

from mesh.rpc.channel import connect
from shoal.inference.v2 import inference_pb2 as oip
from shoal.ingest.v1 import ingest_pb2, ingest_pb2_grpc
from shoal.store.v1 import store_pb2, store_pb2_grpc
from tests.chaos.ledger import Found, Ledger, Verdict

TENANTS = ("ada", "bob", "cyd")
GROUP = 20
PAUSE_S = 1.5
CALL_S = 10.0
_IDS_AT_ONCE = 500
_WAITING = (ingest_pb2.JOB_STATE_QUEUED, ingest_pb2.JOB_STATE_RUNNING)


def question(number: float, model: str) -> oip.ModelInferRequest:
    """x = [number] * 4: the answer is its double."""
    request = oip.ModelInferRequest(model_name=model)
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    request.raw_input_contents.append(np.full(4, number, np.float32).tobytes())
    return request


class Workload:
    """Produces until it is told to stop, and writes every acknowledgement into `ledger`."""

    def __init__(self, gateway: str, models: Sequence[str]) -> None:
        self.ledger = Ledger()
        self._gateway = gateway
        self._models = models
        self._numbers: Iterator[int] = itertools.count(1)
        self._stop = asyncio.Event()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Workload]:
        """Produces for as long as the block lasts; leaving waits until each submit under way is acknowledged."""
        producers = [(tenant, streams) for tenant in TENANTS for streams in (False, True)]
        tasks = [asyncio.create_task(self._produce(tenant, streams)) for tenant, streams in producers]
        try:
            yield self
        finally:
            self._stop.set()
            await asyncio.gather(*tasks)

    async def _produce(self, tenant: str, streams: bool) -> None:
        while not self._stop.is_set():
            open_ = dict(self._submits(tenant))
            while open_:
                try:
                    # A channel of its own each time: also Envoy dies, and its successor has the same address.
                    async with connect(self._gateway) as channel:
                        stub = ingest_pb2_grpc.IngestServiceStub(channel)
                        await (self._stream(stub, open_) if streams else self._unary(stub, open_))
                except grpc.aio.AioRpcError as err:
                    self.ledger.refusals[_named(err)] += 1
                    await asyncio.sleep(0.2)
            await asyncio.sleep(PAUSE_S)

    def _submits(self, tenant: str) -> Iterator[tuple[int, ingest_pb2.SubmitRequest]]:
        for number in itertools.islice(self._numbers, GROUP):
            model = self._models[number % len(self._models)]
            yield (
                number,
                ingest_pb2.SubmitRequest(
                    request=question(number, model),
                    tenant=tenant,
                    idempotency_key=f"{tenant}-{number}",
                    # Attempts that die with infer count: a storm may kill more than five in a row under one job.
                    retry=ingest_pb2.RetryPolicy(max_attempts=100),
                ),
            )

    async def _unary(self, stub: ingest_pb2_grpc.IngestServiceStub, open_: dict[int, ingest_pb2.SubmitRequest]) -> None:
        for number in list(open_):
            answer = await stub.Submit(open_[number], timeout=CALL_S)
            self._acknowledged(answer.job.id, open_.pop(number), number)

    async def _stream(
        self, stub: ingest_pb2_grpc.IngestServiceStub, open_: dict[int, ingest_pb2.SubmitRequest]
    ) -> None:
        asked = [ingest_pb2.SubmitStreamRequest(sequence=number, submit=one) for number, one in open_.items()]
        async for answer in stub.SubmitStream(iter(asked), timeout=CALL_S):
            if answer.code:
                self.ledger.refusals[str(answer.code)] += 1
            else:
                number = answer.sequence
                self._acknowledged(answer.job_id, open_.pop(number), number)

    def _acknowledged(self, job_id: str, submit: ingest_pb2.SubmitRequest, number: int) -> None:
        self.ledger.acknowledged(job_id, submit.tenant, float(number))


def _named(error: grpc.aio.AioRpcError) -> str:
    """The code; where it says more than that somebody is away, its words too."""
    code = error.code()
    is_plain = code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
    return code.name if is_plain else f"{code.name}: {error.details()}"


async def are_ended(gateway: str) -> bool:
    """Whether no job waits or runs any more. A call that fails means no.

    Asked several times over: a job that goes from one state to the other between two questions is in neither answer.
    """
    try:
        async with connect(gateway) as channel:
            stub = ingest_pb2_grpc.IngestServiceStub(channel)
            for state in _WAITING * 4:
                page = await stub.ListJobs(ingest_pb2.ListJobsRequest(state=state, page_size=1), timeout=CALL_S)
                if page.jobs:
                    return False
    except grpc.aio.AioRpcError:
        return False
    return True


async def compared(gateway: str, ledger: Ledger) -> Verdict:
    """The ledger beside everything that the node has."""
    async with connect(gateway) as channel:
        ingest = ingest_pb2_grpc.IngestServiceStub(channel)
        store = store_pb2_grpc.StoreServiceStub(channel)
        jobs = [job async for job in _jobs(ingest)]
        results = [found async for found in _results(store, [job.id for job in jobs])]
    return ledger.compare(results, [(job.idempotency_key, job.id) for job in jobs])


async def _jobs(stub: ingest_pb2_grpc.IngestServiceStub) -> AsyncIterator[ingest_pb2.Job]:
    token = ""
    while True:
        page = await stub.ListJobs(ingest_pb2.ListJobsRequest(page_size=1000, page_token=token), timeout=30)
        for job in page.jobs:
            yield job
        if not (token := page.next_page_token):
            return


async def _results(stub: store_pb2_grpc.StoreServiceStub, job_ids: Sequence[str]) -> AsyncIterator[Found]:
    for first in range(0, len(job_ids), _IDS_AT_ONCE):
        some = job_ids[first : first + _IDS_AT_ONCE]
        answer = await stub.QueryResults(store_pb2.QueryResultsRequest(job_ids=some, page_size=1000), timeout=30)
        for result in answer.results:
            yield _found(result)


def _found(result: store_pb2.Result) -> Found:
    if result.outcome != store_pb2.Result.OUTCOME_SUCCEEDED:
        return Found(result.job_id, False, None)
    values = np.frombuffer(result.response.raw_output_contents[0], np.float32)
    is_one = bool((values == values[0]).all()) and len(values) == 4
    return Found(result.job_id, True, float(values[0]) / 2 if is_one else None)
