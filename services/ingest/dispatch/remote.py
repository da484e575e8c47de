"""The other services, as ingest sees them through the mesh: infer runs a request, store keeps results."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import grpc
from google.protobuf.message import DecodeError
from opentelemetry import propagate, trace
from opentelemetry.trace import Link, SpanKind

from mesh.rpc.channel import AnyChannel
from mesh.rpc.client.channel import Channel
from mesh.rpc.client.failures import CallFailed
from mesh.rpc.client.streams import StreamCall
from mesh.rpc.interceptors import translate
from services.ingest.job import End, Failure, Outcome
from services.ingest.store_calls import store_errors
from shoal.errors import Code, Internal, ShoalError
from shoal.inference.v2 import bulk_pb2, inference_pb2
from shoal.store.v1 import store_pb2, store_pb2_grpc

_INFER = "/inference.GRPCInferenceService/ModelInfer"
_INFER_BULK = "/shoal.inference.v2.BulkInference/InferBulk"

STORE_TIMEOUT_S = 10.0
"""Longest a call to the store may take. It is repeated until it succeeds: the limit only frees what hangs."""
LOOK_TIMEOUT_S = 2.0
"""Longest a question to the store may take: the jobs it is about are held under a lease that nobody renews yet."""
_QUERIED_AT_ONCE = 100
_LINKS = 64

# ingest does the retries, and must know of each attempt what became of it: that one died under a request is counted, so
# that a request which kills its instance is stopped, and is not handed on to the next instance by Envoy.
_NO_RETRIES = (("x-envoy-max-retries", "0"),)

_MODEL_HEADER = "x-shoal-model"
_TENANT_HEADER = "x-shoal-tenant"
# What the mesh routes bulks by: only a service's own Envoy takes it from anybody.
_BULK_MARGIN_S = 5.0
# A bulk's entries have their own deadlines; the call's is for an instance that is cut off.

_DOOR_S = 10.0
# How long an infer that knows no bulks is not asked again.

_NEVER_REACHED = (
    # What Envoy says when no instance has seen the request.
    "no healthy upstream",
    "reset reason: connection failure",
    "reset reason: remote connection failure",
    "reset reason: local connection failure",
    "reset reason: overflow",
)

_RETRIED = "retried and the latest"
# Of an attempt before the one that Envoy tells of, nothing is known.


@dataclass(frozen=True, slots=True)
class BulkEntry:
    """One job's part in a bulk."""

    job_id: str
    request: bytes
    """A serialised ModelInferRequest."""
    timeout_s: float
    tenant: str = ""
    is_retry: bool = False
    """An instance died while it had this one."""


@dataclass(frozen=True, slots=True)
class AttemptAnswer:
    """A model's answer to one entry."""

    response: bytes
    """A serialised ModelInferResponse."""
    instance: str


class BulkDoorClosed(Exception):
    """What answers takes no bulks for `for_s` seconds: an infer of an earlier version, a mesh without its route."""

    def __init__(self, for_s: float) -> None:
        super().__init__(for_s)
        self.for_s = for_s


class GivenUp:
    """Jobs of a bulk whose answers nobody wants any more: told to infer while the call is under way."""

    def __init__(self) -> None:
        self._job_ids: list[str] = []
        self._tell: Callable[[Sequence[str]], None] | None = None

    def add(self, job_id: str) -> None:
        if self._tell is None:
            self._job_ids.append(job_id)
        else:
            self._tell([job_id])

    @contextlib.contextmanager
    def told(self, tell: Callable[[Sequence[str]], None]) -> Iterator[None]:
        """Has `tell` hear of them while the block lasts; first of those that there are already."""
        if self._job_ids:
            tell(self._job_ids)
        self._tell = tell
        try:
            yield
        finally:
            self._tell = None


class RemoteModel:
    """infer, behind the mesh."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        # Requests are stored serialised and sent as they are.
        self._infer = channel.unary_unary(_INFER, None, inference_pb2.ModelInferResponse.FromString)

    async def infer(
        self, request: bytes, timeout_s: float, tenant: str = ""
    ) -> inference_pb2.ModelInferResponse | Failure:
        """Runs one serialised ModelInferRequest, once; `tenant` gets its share of a busy model."""
        metadata = (*_NO_RETRIES, (_TENANT_HEADER, _printable(tenant))) if tenant else _NO_RETRIES
        try:
            response: inference_pb2.ModelInferResponse = await self._infer(
                request, timeout=timeout_s, metadata=metadata
            )
        except grpc.RpcError as err:
            return failure_of(err)
        return response

    async def infer_bulk(
        self, model: str, entries: Sequence[BulkEntry], given_up: GivenUp, traceparent: str = ""
    ) -> AsyncGenerator[list[tuple[str, AttemptAnswer | Failure]], None]:
        """Runs serialised ModelInferRequests of one model, each once: what becomes of them, by their jobs.

        What the call ends without an answer to, failed as the call did. Entries that are given up may have none.

        Raises:
            BulkDoorClosed: it takes no bulks; none of them ran.
        """
        metadata = [*_NO_RETRIES, (_MODEL_HEADER, _printable(model))]
        if traceparent:
            metadata.append(("traceparent", traceparent))
        timeout_s = max(entry.timeout_s for entry in entries) + _BULK_MARGIN_S
        left, instance = set(range(len(entries))), ""
        try:
            async with self._channel.stream(_INFER_BULK, timeout_s=timeout_s, metadata=metadata) as call:
                call.write(_first_request(entries))
                with given_up.told(partial(_tell, call, {entry.job_id: n for n, entry in enumerate(entries)})):
                    async for message in call:
                        response = bulk_pb2.InferBulkResponse.FromString(message)
                        instance = instance or response.instance
                        fresh = [answer for answer in response.answers if answer.number in left]
                        left.difference_update(answer.number for answer in fresh)
                        yield [(entries[answer.number].job_id, _bulk_answer(answer, instance)) for answer in fresh]
            failure = Failure(Code.INTERNAL, "infer ended a bulk without answers to all of its entries")
        except DecodeError as err:
            failure = Failure(Code.INTERNAL, f"infer's answer to a bulk is no InferBulkResponse: {err}")
        except grpc.RpcError as err:
            failure = failure_of(err)
            if len(left) == len(entries) and failure.code == Code.UNIMPLEMENTED:
                raise BulkDoorClosed(_DOOR_S) from err
        if left:
            yield [(entries[number].job_id, failure) for number in sorted(left)]


def _first_request(entries: Sequence[BulkEntry]) -> bytes:
    make = bulk_pb2.InferBulkRequest.Entry
    return bulk_pb2.InferBulkRequest(
        entries=[
            make(
                number=number,
                request=entry.request,
                timeout_ms=max(1, int(entry.timeout_s * 1000)),
                tenant=entry.tenant,
                is_retry=entry.is_retry,
            )
            for number, entry in enumerate(entries)
        ]
    ).SerializeToString()


def _tell(call: StreamCall, numbers: Mapping[str, int], job_ids: Sequence[str]) -> None:
    # What was given up before the call began may not be in it.
    if given_up := [numbers[job_id] for job_id in job_ids if job_id in numbers]:
        call.write(bulk_pb2.InferBulkRequest(given_up=given_up).SerializeToString())


def _bulk_answer(answer: bulk_pb2.InferBulkResponse.Answer, instance: str) -> AttemptAnswer | Failure:
    if answer.HasField("response"):
        return AttemptAnswer(answer.response, instance)
    is_shed = answer.HasField("retry_after_ms") and answer.code in (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE)
    return Failure(answer.code, answer.message, not is_shed, answer.retry_after_ms)


def _printable(name: str) -> str:
    """The name as a header may carry it. A model that cannot be is no cluster's, and any instance may say so; such
    tenants share a share."""
    return name if name.isascii() and name.isprintable() else "?"


def failure_of(error: grpc.RpcError) -> Failure:
    """What a failed call to a model means for its job."""
    known = translate(error)
    return Failure(int(known.code), known.message, not _is_unreached(error, known), known.retry_after_ms or 0)


def _is_unreached(error: grpc.RpcError, known: ShoalError) -> bool:
    """Whether it is certain that no model ran the request."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return False
    details = error.details() or ""
    if known.code is Code.UNAVAILABLE and isinstance(error, CallFailed) and error.is_unprocessed:
        return True
    if known.code in (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE) and known.retry_after_ms is not None:
        return True  # Shed before it ran: "come back then".
    if known.code is Code.UNIMPLEMENTED:
        return _is_of_the_mesh(details)
    if known.code is not Code.UNAVAILABLE or _RETRIED in details:
        return False
    return not details or any(text in details for text in _NEVER_REACHED)


def _is_of_the_mesh(details: str) -> bool:
    # Envoy has no route (yet): it answers 404, which gRPC reads as UNIMPLEMENTED. A service's own word has a text.
    return not details or "http2 header with status: 404" in details


class RemoteResults:
    """The store's results, behind the mesh."""

    def __init__(self, channel: AnyChannel) -> None:
        self._stub = store_pb2_grpc.StoreServiceStub(channel)
        self._tracer = trace.get_tracer("shoal")

    async def put(self, results: Sequence[store_pb2.Result], traceparents: Sequence[str]) -> list[End | None]:
        """Records results and says of each what stands instead of it, if not itself. The call belongs to the trace of
        the first, linked to the rest.

        Raises:
            ShoalError: none is known to be recorded; to repeat it is safe.
        """
        request = store_pb2.PutResultsRequest(results=results)
        with self._span(traceparents), store_errors("recording results"):
            response = await self._stub.PutResults(request, timeout=STORE_TIMEOUT_S)
        if [entry.job_id for entry in response.entries] != [result.job_id for result in results]:
            raise Internal("the store's answer does not fit the results that were sent")
        return [None if entry.recorded else _end_of(entry.standing) for entry in response.entries]

    async def standing(self, job_ids: Sequence[str]) -> dict[str, End]:
        """The results that stand for these jobs, without their answers.

        Raises:
            ShoalError: they are not known.
        """
        found: dict[str, End] = {}
        for first in range(0, len(job_ids), _QUERIED_AT_ONCE):
            some = job_ids[first : first + _QUERIED_AT_ONCE]
            # A result that retention has removed stands all the same: its job must not run again.
            request = store_pb2.QueryResultsRequest(
                job_ids=some, omit_response=True, page_size=len(some), include_removed=True
            )
            with store_errors("looking for results"):
                response = await self._stub.QueryResults(request, timeout=LOOK_TIMEOUT_S)
            found.update({result.job_id: _end_of(result) for result in response.results})
        return found

    @contextlib.contextmanager
    def _span(self, traceparents: Sequence[str]) -> Iterator[None]:
        contexts = [propagate.extract({"traceparent": parent}) for parent in traceparents[:_LINKS] if parent]
        links = [Link(trace.get_current_span(context).get_span_context()) for context in contexts[1:]]
        parent = contexts[0] if contexts else None
        with self._tracer.start_as_current_span("record results", parent, SpanKind.PRODUCER, links=links) as span:
            span.set_attribute("shoal.results", len(traceparents))
            yield


def _end_of(result: store_pb2.Result) -> End:
    try:
        return End(Outcome(result.outcome), result.code, result.message, result.generation or 1)
    except ValueError:
        raise Internal(f"the store has a result of job {result.job_id} with the outcome {result.outcome}") from None
