"""Attempts: claimed jobs are sent to a model, singly or in bulk; each attempt gives a result or a decision.

    one job  ──ModelInfer──> response | Failure ─┐
    many     ──InferBulk───> as they complete ───┴──> result, BackToQueue or End of each

Attempts write nothing; the dispatcher has the decisions recorded.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Protocol, TypeAlias

from google.protobuf.message import DecodeError
from opentelemetry import propagate, trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from mesh.mongo_clock import Clock
from mesh.process.kept_spans import JOB, TENANT
from mesh.rpc.access import Access
from mesh.rpc.interceptors import FAILURES
from mesh.rpc.tail_spans import MODEL, SLOW_S, keep
from services.ingest.dispatch.bulk_calls import may_have_run
from services.ingest.dispatch.model_gate import ModelGate
from services.ingest.dispatch.recorder import result_of
from services.ingest.dispatch.remote import AttemptOutcome, BulkEntry, BulkUnavailable, GivenUpJobs
from services.ingest.intake.budget import Budget
from services.ingest.intake.payloads import Payloads
from services.ingest.job import BackToQueue, End, Failure, Job, Outcome, after_failure, imposed_end
from services.ingest.job_access import refusal
from services.ingest.limits import EXPLAIN, REQUEST_BYTES
from services.ingest.tracing import traceparent_of
from shoal.errors import Code, ShoalError
from shoal.inference.v2 import inference_pb2
from shoal.store.v1 import store_pb2

# A parser merges concatenated messages, so appending this requests the instance's name without parsing the request.
# https://protobuf.dev/programming-guides/encoding/#last-one-wins
_EXPLAIN = inference_pb2.ModelInferRequest(
    parameters={EXPLAIN: inference_pb2.InferParameter(bool_param=True)}
).SerializeToString()
_NAME_CHARS = 256
_ATTEMPT = "attempt"
"""Name of the span of an attempt."""
# Parameters that infer adds when it is asked to explain; of an ensemble, also some for each step.
_EXPLANATIONS = frozenset(
    {"replica", "version", "cache", "batch_size", "fired", "queue_us", "gather_us", "compute_us", "scatter_us"}
)
_STEP_EXPLANATION = re.compile(r"step_\d+_[a-z_]+")

Decision: TypeAlias = store_pb2.Result | BackToQueue | End
"""Decision about a job after an attempt: its result, another attempt, or its end."""


class ModelClient(Protocol):
    """Client of infer."""

    async def infer(
        self, request: bytes, timeout_s: float, tenant: str = "", caller: bytes = b"", *, is_retry: bool = False
    ) -> inference_pb2.ModelInferResponse | Failure:
        """Run one serialised ModelInferRequest once. A failed call returns a Failure."""

    def infer_bulk(
        self, model: str, entries: Sequence[BulkEntry], given_up: GivenUpJobs, traceparent: str
    ) -> AsyncGenerator[list[tuple[str, AttemptOutcome]], None]:
        """Run many requests of one model once each; yield results by job id, as they arrive.

        Raises:
            BulkUnavailable: bulk calls are not supported; no entry ran.
        """


class Attempts:
    """Runs claimed jobs on infer: sends each request, and turns its response into the outcome of the attempt."""

    def __init__(
        self,
        model: ModelClient,
        payloads: Payloads,
        *,
        gate: ModelGate,
        memory: Budget,
        clock: Clock,
        timeout_ms: int,
        draw: Callable[[], float] = random.random,
        access: Access | None = None,
    ) -> None:
        """`access` decides whether the callers of jobs may still run their models; None: they may."""
        self._model = model
        self._payloads = payloads
        self._gate = gate
        self._memory = memory
        self._clock = clock
        self._timeout_s = timeout_ms / 1000
        self._draw = draw
        self._access = access
        self._tracer = trace.get_tracer("shoal")
        self._no_bulks_until = 0.0

    async def run(self, jobs: Sequence[Job], given_up: GivenUpJobs) -> AsyncGenerator[list[tuple[Job, Decision]], None]:
        """Run one attempt of claimed jobs of one model; yield decisions, several at a time, as they are made."""
        now = self._clock()
        ended: list[tuple[Job, Decision]] = []
        for job in jobs:
            how: Decision | None = imposed_end(job, now)
            if how is None and self._access is not None:
                how = self._refused(job)
            if how is not None:
                ended.append((job, how))
        if ended:
            yield [*ended]
            ended_ids = {job.id for job, _ in ended}
            jobs = [job for job in jobs if job.id not in ended_ids]
        takes_bulks = asyncio.get_running_loop().time() >= self._no_bulks_until
        if takes_bulks and len(jobs) > 1:
            try:
                async with aclosing(self._run_bulk(jobs, given_up)) as decided:
                    async for some in decided:
                        yield some
                return
            except BulkUnavailable as err:
                self._no_bulks_until = asyncio.get_running_loop().time() + err.for_s
        async with aclosing(self._run_singly(jobs)) as decided:
            async for some in decided:
                yield some

    def _refused(self, job: Job) -> End | BackToQueue | None:
        """Return the decision about a job whose caller may not run its model now; None when it may."""
        try:
            refused = refusal(self._access, job.caller, job.model_name)
        except ShoalError as err:
            return self._failed(job, Failure(int(err.code), err.message, is_reached=False))
        return None if refused is None else End(Outcome.FAILED, int(refused.code), refused.message)

    async def _run_singly(self, jobs: Sequence[Job]) -> AsyncGenerator[list[tuple[Job, Decision]], None]:
        if len(jobs) == 1:
            yield [(jobs[0], await self._run_one(jobs[0]))]
            return
        running = {asyncio.ensure_future(self._run_one(job)): job for job in jobs}
        try:
            while running:
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                yield [(running.pop(task), task.result()) for task in done]
        finally:
            for task in running:
                task.cancel()

    async def _run_one(self, job: Job) -> Decision:
        outcome = await self._traced(job, self._remaining_s(job))
        if isinstance(outcome, Failure):
            return self._failed(job, outcome)
        self._gate.passed(job.model_name)
        instance = outcome.parameters["replica"].string_param if "replica" in outcome.parameters else ""
        if not job.explains:
            for name in [name for name in outcome.parameters if _is_explanation(name)]:
                del outcome.parameters[name]
        result = result_of(job, End(Outcome.SUCCEEDED))
        result.response.CopyFrom(outcome)
        return _succeeded(result, instance)

    async def _run_bulk(
        self, jobs: Sequence[Job], given_up: GivenUpJobs
    ) -> AsyncGenerator[list[tuple[Job, Decision]], None]:
        by_id = {job.id: job for job in jobs}
        spans = {job.id: self._span(job) for job in jobs if job.traceparent}
        entries = [
            BulkEntry(
                job.id,
                job.request or b"",
                self._remaining_s(job),
                job.tenant,
                may_have_run(job),
                self._counted_caller(job),
            )
            for job in jobs
        ]
        # The call belongs to the trace of the first job that has one.
        traceparent = traceparent_of(trace.set_span_in_context(next(iter(spans.values())))) if spans else ""
        began = time.monotonic()
        try:
            outcomes = self._model.infer_bulk(jobs[0].model_name, entries, given_up, traceparent)
            async with aclosing(outcomes):
                async for some in outcomes:
                    seconds = time.monotonic() - began
                    for job_id, outcome in some:
                        _keep(by_id[job_id], seconds, outcome)
                        if (span := spans.pop(job_id, None)) is not None:
                            _finish(span, outcome)
                    yield [(by_id[job_id], self._decided(by_id[job_id], outcome)) for job_id, outcome in some]
        finally:
            for span in spans.values():
                span.end()

    def _decided(self, job: Job, outcome: AttemptOutcome) -> Decision:
        if isinstance(outcome, Failure):
            return self._failed(job, outcome)
        result = result_of(job, End(Outcome.SUCCEEDED))
        result.response.SetInParent()
        try:
            result.response.MergeFromString(outcome.response)
        except DecodeError as err:
            return self._failed(job, Failure(Code.INTERNAL, f"infer's response is no ModelInferResponse: {err}"))
        self._gate.passed(job.model_name)
        return _succeeded(result, outcome.instance)

    def _failed(self, job: Job, failure: Failure) -> BackToQueue | End:
        now = self._clock()
        if failure.is_reached:
            self._gate.passed(job.model_name)
        elif failure.is_limited:
            self._gate.limited(job.tenant, job.model_name, now, failure.retry_after_ms)
        else:
            self._gate.refused(job.model_name, now, failure.retry_after_ms)
        return after_failure(job, failure, now, self._draw)

    def _remaining_s(self, job: Job) -> float:
        timeout_s = job.policy.attempt_timeout_ms / 1000 or self._timeout_s
        if job.deadline is None:
            return timeout_s
        return min(timeout_s, (job.deadline - self._clock()).total_seconds())

    def _span(self, job: Job) -> Span:
        parent = propagate.extract({"traceparent": job.traceparent}) if job.traceparent else None
        about = _attributes(job)
        if job.tenant:
            about[TENANT] = job.tenant
        return self._tracer.start_span(_ATTEMPT, parent, SpanKind.CONSUMER, about)

    async def _traced(self, job: Job, timeout_s: float) -> inference_pb2.ModelInferResponse | Failure:
        began = time.monotonic()
        with trace.use_span(self._span(job), end_on_exit=True) as span:
            outcome = await self._call(job, timeout_s)
            if isinstance(outcome, Failure):
                _mark(span, outcome)
        _keep(job, time.monotonic() - began, outcome)
        return outcome

    async def _call(self, job: Job, timeout_s: float) -> inference_pb2.ModelInferResponse | Failure:
        async with AsyncExitStack() as stack:
            request = job.request
            if job.is_apart:
                # The size is known only after the read, so memory for the largest request is reserved.
                await stack.enter_async_context(self._memory.of(REQUEST_BYTES))
                try:
                    request = await self._payloads.get(job.id)
                except ShoalError as err:
                    # A damaged request stays damaged, so the attempt counts.
                    return Failure(int(err.code), err.message, is_reached=err.code is Code.DATA_LOSS)
            if request is None:
                return Failure(Code.DATA_LOSS, f"the request of job {job.id} is no longer in the database")
            return await self._model.infer(
                request + _EXPLAIN, timeout_s, job.tenant, self._counted_caller(job), is_retry=may_have_run(job)
            )

    def _counted_caller(self, job: Job) -> bytes:
        """Return the caller in whose limits infer counts the job; empty without limits."""
        return job.caller if self._access is not None and self._access.is_limited else b""


def _is_explanation(name: str) -> bool:
    return name in _EXPLANATIONS or _STEP_EXPLANATION.fullmatch(name) is not None


def _succeeded(result: store_pb2.Result, instance: str) -> store_pb2.Result:
    # Truncated, because the store refuses longer names, and a model may return any.
    result.model_version = result.response.model_version[:_NAME_CHARS]
    result.instance = instance[:_NAME_CHARS]
    return result


def _attributes(job: Job) -> dict[str, str | int]:
    return {JOB: job.id, "shoal.attempt": job.attempts, MODEL: job.model_name}


def _keep(job: Job, seconds: float, outcome: object) -> None:
    """Keep the span of an attempt that was not sampled, when it failed or was slow."""
    if isinstance(outcome, Failure):
        if outcome.code not in FAILURES:
            return
        error, code, cause = outcome.message or "failed", {"rpc.grpc.status_code": outcome.code}, outcome.trace_id
    elif seconds > SLOW_S:
        error, code, cause = "", {}, ""
    else:
        return
    traceparent, about = job.traceparent.encode(), {**_attributes(job), **code}
    keep(_ATTEMPT, traceparent, job.tenant, seconds=seconds, error=error, attributes=about, cause=cause)


def _mark(span: Span, failure: Failure) -> None:
    span.set_attribute("rpc.grpc.status_code", failure.code)
    span.set_status(Status(StatusCode.ERROR, failure.message))


def _finish(span: Span, outcome: AttemptOutcome) -> None:
    if isinstance(outcome, Failure):
        _mark(span, outcome)
    span.end()
