"""Clients of the other services through the mesh: infer runs requests, the store keeps results."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import grpc
from google.protobuf.message import DecodeError
from opentelemetry import propagate, trace
from opentelemetry.trace import Link, SpanKind

from mesh.rpc.channel import AnyChannel
from mesh.rpc.client.channel import Channel
from mesh.rpc.client.failures import CallFailed
from mesh.rpc.client.streams import StreamCall
from mesh.rpc.copied import copy_all
from mesh.rpc.interceptors import translate
from services.ingest.job import End, Failure, Outcome
from services.ingest.store_calls import store_errors
from shoal.access.caller_header import JOB_CALLER_HEADER, JOB_RETRY_HEADER
from shoal.errors import RATE_LIMIT_KEY, Code, Internal, ShoalError
from shoal.inference.v2 import bulk_pb2, inference_pb2
from shoal.store.v1 import store_pb2, store_pb2_grpc
from shoal.tenant_header import TENANT_HEADER, header_value

_INFER = "/inference.GRPCInferenceService/ModelInfer"
_INFER_BULK = "/shoal.inference.v2.BulkInference/InferBulk"

STORE_TIMEOUT_S = 10.0
"""Timeout of a write to the store. Writes are repeated until they succeed; the timeout only ends hanging calls."""
QUERY_TIMEOUT_S = 2.0
"""Timeout of a query to the store: the leases of the jobs in it are not renewed yet."""
_QUERIED_AT_ONCE = 100
_LINKS = 64

# ingest retries, and must know the outcome of each attempt: it counts instances that die during a request, so that a
# poison request ends. Envoy must not pass a poison request to the next instance.
_NO_RETRIES = (("x-envoy-max-retries", "0"),)

# The mesh routes bulk calls by the model header. Only a service's own Envoy accepts the headers.
_MODEL_HEADER = "x-shoal-model"
# The entries of a bulk have their own deadlines; the deadline of the call is for an instance that is cut off.
_BULK_MARGIN_S = 5.0
# Pause of bulk calls after an infer without support for them.
_NO_BULK_S = 10.0

# Messages of Envoy when no instance has received the request.
_NEVER_REACHED = (
    "no healthy upstream",
    "reset reason: connection failure",
    "reset reason: remote connection failure",
    "reset reason: local connection failure",
    "reset reason: overflow",
)

# After Envoy's own retries, the outcomes of the earlier attempts are unknown.
_RETRIED = "retried and the latest"


@dataclass(frozen=True, slots=True)
class BulkEntry:
    """Entry of one job in a bulk."""

    job_id: str
    request: bytes
    """A serialised ModelInferRequest."""
    timeout_s: float
    tenant: str = ""
    is_retry: bool = False
    """True: an instance may have died during an earlier attempt, so infer checks the request."""
    caller: bytes = b""
    """The caller in whose limits infer counts the entry; empty: in none."""


@dataclass(frozen=True, slots=True)
class AttemptResponse:
    """A model's response to one entry."""

    response: bytes
    """A serialised ModelInferResponse."""
    instance: str


AttemptOutcome: TypeAlias = AttemptResponse | Failure
"""Outcome of one attempt: the response, or the error."""


class BulkUnavailable(Exception):
    """Bulk calls are unavailable for `for_s` seconds: an infer of an earlier version, or a mesh without the route."""

    def __init__(self, for_s: float) -> None:
        super().__init__(for_s)
        self.for_s = for_s


class GivenUpJobs:
    """Jobs of a bulk whose results are no longer needed; sent to infer while the call runs."""

    def __init__(self) -> None:
        self._job_ids: list[str] = []
        self._send_given_up: Callable[[Sequence[str]], None] | None = None

    def add(self, job_id: str) -> None:
        if self._send_given_up is None:
            self._job_ids.append(job_id)
        else:
            self._send_given_up([job_id])

    @contextlib.contextmanager
    def forwarding(self, send: Callable[[Sequence[str]], None]) -> Iterator[None]:
        """Call `send` with the job ids given up so far, and with later ones while the block lasts."""
        if self._job_ids:
            send(self._job_ids)
        self._send_given_up = send
        try:
            yield
        finally:
            self._send_given_up = None


class RemoteModel:
    """Client of infer."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        # Requests are stored serialised, and sent without being parsed.
        self._infer = channel.unary_unary(_INFER, None, inference_pb2.ModelInferResponse.FromString)

    async def infer(
        self, request: bytes, timeout_s: float, tenant: str = "", caller: bytes = b"", *, is_retry: bool = False
    ) -> inference_pb2.ModelInferResponse | Failure:
        """Run one serialised ModelInferRequest once, for the fair share of `tenant`, and in the limits of `caller`.

        With `is_retry`, infer checks the request first, as an entry of a bulk (`BulkEntry`).
        """
        metadata = (*_NO_RETRIES, (TENANT_HEADER, header_value(tenant))) if tenant else _NO_RETRIES
        if caller:
            metadata = (*metadata, (JOB_CALLER_HEADER, caller.decode("latin-1")))
        if is_retry:
            metadata = (*metadata, (JOB_RETRY_HEADER, "1"))
        try:
            response: inference_pb2.ModelInferResponse = await self._infer(
                request, timeout=timeout_s, metadata=metadata
            )
        except grpc.RpcError as err:
            return failure_of(err)
        return response

    async def infer_bulk(
        self, model: str, entries: Sequence[BulkEntry], given_up: GivenUpJobs, traceparent: str = ""
    ) -> AsyncGenerator[list[tuple[str, AttemptOutcome]], None]:
        """Run serialised ModelInferRequests of one model once each; yield results by job id, as they arrive.

        Entries without a result at the end of the call fail as the call did. Entries that are given up may have none.

        Raises:
            BulkUnavailable: bulk calls are not supported; no entry ran.
        """
        metadata = [*_NO_RETRIES, (_MODEL_HEADER, header_value(model))]
        if traceparent:
            metadata.append(("traceparent", traceparent))
        timeout_s = max(entry.timeout_s for entry in entries) + _BULK_MARGIN_S
        left, instance = set(range(len(entries))), ""
        try:
            async with self._channel.stream(_INFER_BULK, timeout_s=timeout_s, metadata=metadata) as call:
                call.write(_first_request(entries))
                with given_up.forwarding(
                    partial(_send_given_up, call, {entry.job_id: n for n, entry in enumerate(entries)})
                ):
                    async for message in call:
                        response = bulk_pb2.InferBulkResponse.FromString(message)
                        instance = instance or response.instance
                        fresh = [entry for entry in response.answers if entry.number in left]
                        left.difference_update(entry.number for entry in fresh)
                        yield [(entries[entry.number].job_id, _bulk_outcome(entry, instance)) for entry in fresh]
            failure = Failure(Code.INTERNAL, "infer ended a bulk without results for all of its entries")
        except DecodeError as err:
            failure = Failure(Code.INTERNAL, f"infer's response to a bulk is no InferBulkResponse: {err}")
        except grpc.RpcError as err:
            failure = failure_of(err)
            if len(left) == len(entries) and failure.code == Code.UNIMPLEMENTED:
                raise BulkUnavailable(_NO_BULK_S) from err
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
                caller=entry.caller,
            )
            for number, entry in enumerate(entries)
        ]
    ).SerializeToString()


def _send_given_up(call: StreamCall, numbers: Mapping[str, int], job_ids: Sequence[str]) -> None:
    # A job that was given up before the call began may not be in the call.
    if given_up := [numbers[job_id] for job_id in job_ids if job_id in numbers]:
        call.write(bulk_pb2.InferBulkRequest(given_up=given_up).SerializeToString())


def _bulk_outcome(entry: bulk_pb2.InferBulkResponse.Answer, instance: str) -> AttemptOutcome:
    if entry.HasField("response"):
        return AttemptResponse(entry.response, instance)
    is_shed = entry.HasField("retry_after_ms") and entry.code in (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE)
    return Failure(entry.code, entry.message, not is_shed, entry.retry_after_ms, entry.is_limited)


def failure_of(error: grpc.RpcError) -> Failure:
    """Return the failure of an attempt whose call failed."""
    known = translate(error)
    is_reached = not _is_unreached(error, known)
    retry_after_ms, is_limited = known.retry_after_ms or 0, _is_limited(error)
    return Failure(int(known.code), known.message, is_reached, retry_after_ms, is_limited, known.trace_id)


def _is_limited(error: grpc.RpcError) -> bool:
    """Return True when a limit of the policy refused the request."""
    trailing = error.trailing_metadata() if isinstance(error, grpc.aio.AioRpcError) else None
    return any(key == RATE_LIMIT_KEY for key, _ in trailing or ())


def _is_unreached(error: grpc.RpcError, known: ShoalError) -> bool:
    """Return True when it is certain that no model ran the request."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return False
    details = error.details() or ""
    if known.code is Code.UNAVAILABLE and isinstance(error, CallFailed) and error.is_unprocessed:
        return True
    # Shed before it ran, with a retry-after.
    if known.code in (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE) and known.retry_after_ms is not None:
        return True
    if known.code is Code.UNIMPLEMENTED:
        return _is_of_the_mesh(details)
    if known.code is not Code.UNAVAILABLE or _RETRIED in details:
        return False
    return not details or any(text in details for text in _NEVER_REACHED)


def _is_of_the_mesh(details: str) -> bool:
    # Without a route (yet), Envoy responds 404, which gRPC reads as UNIMPLEMENTED. A service's own error has a text.
    return not details or "http2 header with status: 404" in details


class RemoteResults:
    """Client of the store's results."""

    def __init__(self, channel: AnyChannel) -> None:
        self._stub = store_pb2_grpc.StoreServiceStub(channel)
        self._tracer = trace.get_tracer("shoal")

    async def put(self, results: Sequence[store_pb2.Result], traceparents: Sequence[str]) -> list[End | None]:
        """Record results; return for each the earlier result that the store keeps, or None.

        The call belongs to the trace of the first result, with links to the others.

        Raises:
            ShoalError: some results may not be recorded; repeating the call is safe.
        """
        request = store_pb2.PutResultsRequest()
        copy_all(results, request.results)
        with self._span(traceparents), store_errors("recording results"):
            response = await self._stub.PutResults(request, timeout=STORE_TIMEOUT_S)
        if [entry.job_id for entry in response.entries] != [result.job_id for result in results]:
            raise Internal("the store's response does not match the results that were sent")
        return [None if entry.recorded else _end_of(entry.standing) for entry in response.entries]

    async def recorded_ends(self, job_ids: Sequence[str]) -> dict[str, End]:
        """Return the recorded outcomes of these jobs, by job id; jobs without a result are left out.

        Raises:
            ShoalError: the store did not respond.
        """
        found: dict[str, End] = {}
        for first in range(0, len(job_ids), _QUERIED_AT_ONCE):
            some = job_ids[first : first + _QUERIED_AT_ONCE]
            # A result that retention has removed counts too: its job must not run again.
            request = store_pb2.QueryResultsRequest(
                job_ids=some, omit_response=True, page_size=len(some), include_removed=True
            )
            with store_errors("querying results"):
                response = await self._stub.QueryResults(request, timeout=QUERY_TIMEOUT_S)
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
