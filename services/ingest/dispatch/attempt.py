"""One attempt: a claimed job's request goes to a model, and what comes back is an answer or a decision.

It writes nothing: what it returns, the dispatcher has recorded.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Protocol

from opentelemetry import propagate, trace
from opentelemetry.trace import SpanKind, Status, StatusCode

from services.ingest.clock import Clock
from services.ingest.dispatch.gate import Gate
from services.ingest.dispatch.recorder import result_of
from services.ingest.intake.budget import Budget
from services.ingest.intake.payloads import Payloads
from services.ingest.intake.submission import EXPLAIN, REQUEST_BYTES
from services.ingest.job import Again, End, Failure, Job, Outcome, after_failure, ended_from_outside
from shoal.errors import Code, ShoalError
from shoal.inference.v2 import inference_pb2
from shoal.store.v1 import store_pb2

_EXPLAIN = inference_pb2.ModelInferRequest(
    parameters={EXPLAIN: inference_pb2.InferParameter(bool_param=True)}
).SerializeToString()
# Serialised messages that are put one after the other are merged by their reader: this asks who answered, without
# parsing the request. https://protobuf.dev/programming-guides/encoding/#last-one-wins
_NAME_CHARS = 256
_EXPLANATIONS = ("replica", "batch_size", "queue_us", "compute_us")


class Model(Protocol):
    """infer, as an attempt needs it."""

    async def infer(self, request: bytes, timeout_s: float) -> inference_pb2.ModelInferResponse | Failure:
        """Runs one serialised ModelInferRequest, once. Never raises for a call that failed."""


class Attempts:
    """Runs attempts."""

    def __init__(
        self,
        model: Model,
        payloads: Payloads,
        *,
        gate: Gate,
        memory: Budget,
        clock: Clock,
        timeout_ms: int,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._model = model
        self._payloads = payloads
        self._gate = gate
        self._memory = memory
        self._clock = clock
        self._timeout_s = timeout_ms / 1000
        self._draw = draw
        self._tracer = trace.get_tracer("shoal")

    async def run(self, job: Job) -> store_pb2.Result | Again | End:
        """Runs a claimed job once: its result when it was answered, else what becomes of it."""
        now = self._clock()
        if (ended := ended_from_outside(job, now)) is not None:
            return ended
        timeout_s = self._timeout_s
        if job.deadline is not None:
            timeout_s = min(timeout_s, (job.deadline - now).total_seconds())
        answer = await self._traced(job, timeout_s)
        if isinstance(answer, inference_pb2.ModelInferResponse):
            self._gate.passed(job.model_name)
            return answered(job, answer)
        now = self._clock()
        if answer.is_reached:
            self._gate.passed(job.model_name)
        else:
            self._gate.refused(job.model_name, now, answer.retry_after_ms)
        return after_failure(job, answer, now, self._draw)

    async def _traced(self, job: Job, timeout_s: float) -> inference_pb2.ModelInferResponse | Failure:
        parent = propagate.extract({"traceparent": job.traceparent}) if job.traceparent else None
        about: dict[str, str | int] = {
            "shoal.job": job.id,
            "shoal.attempt": job.attempts,
            "shoal.model": job.model_name,
        }
        with self._tracer.start_as_current_span("attempt", parent, SpanKind.CONSUMER, about) as span:
            answer = await self._call(job, timeout_s)
            if isinstance(answer, Failure):
                span.set_attribute("rpc.grpc.status_code", answer.code)
                span.set_status(Status(StatusCode.ERROR, answer.message))
            return answer

    async def _call(self, job: Job, timeout_s: float) -> inference_pb2.ModelInferResponse | Failure:
        async with AsyncExitStack() as stack:
            request = job.request
            if job.is_apart:
                # Its size is known only after reading it, so room for the largest is held.
                await stack.enter_async_context(self._memory.of(REQUEST_BYTES, waits=True))
                try:
                    request = await self._payloads.get(job.id)
                except ShoalError as err:
                    return Failure(int(err.code), err.message, is_reached=False)
            if request is None:
                return Failure(Code.DATA_LOSS, f"the request of job {job.id} is not in the database any more")
            return await self._model.infer(request + _EXPLAIN, timeout_s)


def answered(job: Job, answer: inference_pb2.ModelInferResponse) -> store_pb2.Result:
    """The result of an answered job. What only ingest asked to be explained is taken out of the answer."""
    instance = answer.parameters["replica"].string_param if "replica" in answer.parameters else ""
    if not job.explains:
        for name in _EXPLANATIONS:
            if name in answer.parameters:
                del answer.parameters[name]
    result = result_of(job, End(Outcome.SUCCEEDED))
    # Cut, because the store refuses longer ones, and a model may say anything.
    result.model_version = answer.model_version[:_NAME_CHARS]
    result.instance = instance[:_NAME_CHARS]
    result.response.CopyFrom(answer)
    return result
