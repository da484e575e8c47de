"""Inference for the rows of a chunk: stacks of rows are sent to the model until each row has succeeded or failed.

    stack ──> succeeded
      │  model unavailable or shedding load: retried after a wait; after MODEL_WAIT_S the chunk is released
      │  a limit of the policy is reached: retried after the wait that the refusal names, as long as it takes
      │  permanent error: bisected; a row that is sent by itself fails
      │  any other error: bisected; a row by itself is retried, and fails when its attempts are used up
      └─ the model's instance died: bisected too, and sent exclusively, with no other request of this instance

A poison row fails no other row: only failures of a request with a single row count against that row.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from mesh.rpc.tenant_turns import TenantTurns
from services.ingest.batches.outputs.part_summary import RowError
from services.ingest.batches.rows.fitting import FittedInput
from services.ingest.batches.rows.stacking import Stack
from services.ingest.batches.rows.wire import ModelTarget, outputs_of, request_of
from services.ingest.job import PERMANENT, Failure, Policy, backoff_ms, name_of, refused_wait_ms
from shoal.errors import Code, DataLoss, Unavailable
from shoal.inference.v2 import inference_pb2
from shoal.oip.tensors import Array

# The model is not loaded, or has no capacity: no row is at fault, however long it lasts.
_MODEL_UNAVAILABLE = frozenset({Code.NOT_FOUND, Code.RESOURCE_EXHAUSTED})
_INSTANCE_LOST = frozenset({Code.UNAVAILABLE, Code.UNKNOWN})


MODEL_WAIT_S = 10.0
"""Time that a chunk waits for an unavailable model before it is released in favour of other models' chunks. A model
that restarts is ready again within this time, so succeeded rows are not discarded."""

LIMITED_WAIT_MS, LIMITED_MAX_WAIT_MS = 100, 5_000
"""Bounds of the wait after a refusal by a limit, which says how long. Doubled waits would leave a part of it unused."""


class InferenceClient(Protocol):
    """Interface to infer."""

    async def infer(
        self, request: bytes, timeout_s: float, tenant: str = "", caller: bytes = b""
    ) -> inference_pb2.ModelInferResponse | Failure:
        """Run one serialised ModelInferRequest, once. A failed call is returned as Failure, never raised."""


@dataclass(frozen=True, slots=True)
class SucceededRows:
    """Rows with outputs, from one response: arrays by output name, whose first dimension is the rows."""

    rows: tuple[int, ...]
    outputs: dict[str, Array]
    version: str


@dataclass(frozen=True, slots=True)
class FailedRow:
    """Row without outputs."""

    row: int
    error: RowError


@dataclass(frozen=True, slots=True)
class Wait:
    """Decision: retry the same stack after `ms`."""

    ms: float
    is_counted: bool


@dataclass(frozen=True, slots=True)
class Split:
    """Decision: send the two halves separately."""

    is_exclusive: bool


def decide(
    failure: Failure, *, rows: int, attempts: int, refusals: int, policy: Policy, drawn: float
) -> Wait | Split | RowError:
    """Decide about a failed stack; `attempts` counts the failures that are the stack's own, this one included."""
    if failure.is_limited:
        wait_ms = min(max(LIMITED_WAIT_MS, failure.retry_after_ms), LIMITED_MAX_WAIT_MS)
        return Wait(wait_ms * (1 + drawn), False)
    if not failure.is_reached or failure.code in _MODEL_UNAVAILABLE:
        return Wait(max(refused_wait_ms(refusals, drawn), failure.retry_after_ms), False)
    if rows > 1:
        return Split(failure.code in _INSTANCE_LOST)
    if failure.code in PERMANENT or attempts >= policy.max_attempts:
        return RowError(name_of(failure.code), failure.message, attempts)
    return Wait(max(backoff_ms(policy, attempts, drawn), failure.retry_after_ms), True)


class RequestSlots(TenantTurns):
    """Slots for concurrent requests. Tenants take turns, and a tenant leaves a third of the slots to others.

    Its model may be slow, and would keep all slots for a minute. An exclusive request has no other one beside it.
    """

    def __init__(self, limit: int) -> None:
        super().__init__(limit, leaves_room=True)
        self._limit = limit

    def acquired(self, tenant: str, *, exclusive: bool) -> AbstractAsyncContextManager[None]:
        """Hold one slot for the block; with `exclusive` all slots."""
        return self.take(tenant, self._limit if exclusive else 1)


class RowInference:
    """Sends the rows of one chunk to a model."""

    def __init__(
        self,
        model: InferenceClient,
        target: ModelTarget,
        slots: RequestSlots,
        *,
        policy: Policy,
        timeout_s: float,
        on_wait: Callable[[str], None],
        model_wait_s: float = MODEL_WAIT_S,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._model = model
        self._target = target
        self._slots = slots
        self._policy = policy
        self._timeout_s = timeout_s
        self._on_wait = on_wait
        self._model_wait_s = model_wait_s
        self._draw = draw

    async def infer(
        self, inputs: Sequence[FittedInput], stack: Stack, *, is_exclusive: bool = False
    ) -> list[SucceededRows | FailedRow]:
        """Return the outcomes of the rows of a stack, in their order.

        Raises:
            Unavailable: the model was unavailable for longer than `model_wait_s`.
        """
        attempts = refusals = 0
        give_up_at = None
        while True:
            async with self._slots.acquired(self._target.tenant, exclusive=is_exclusive):
                outcome = await self._send(inputs, stack)
            if isinstance(outcome, SucceededRows):
                self._on_wait("")
                return [outcome]
            attempts += outcome.is_reached and outcome.code not in _MODEL_UNAVAILABLE
            decision = decide(
                outcome,
                rows=len(stack.rows),
                attempts=attempts,
                refusals=refusals,
                policy=self._policy,
                drawn=self._draw(),
            )
            if isinstance(decision, RowError):
                return [FailedRow(stack.rows[0], decision)]
            is_exclusive = is_exclusive or (outcome.code in _INSTANCE_LOST and outcome.is_reached)
            if isinstance(decision, Split):
                return await self._halves(inputs, stack, is_exclusive=decision.is_exclusive or is_exclusive)
            refusals += not decision.is_counted
            if decision.is_counted:
                give_up_at = None
            else:
                reason = f"{name_of(outcome.code)}: {outcome.message}"[:300]
                self._on_wait(reason)
                now = asyncio.get_running_loop().time()
                give_up_at = give_up_at or now + self._model_wait_s
                # A limit lets rows pass at its rate. A chunk that began anew would spend it on rows that have run.
                if now > give_up_at and not outcome.is_limited:
                    raise Unavailable(f"model {self._target.model_name!r} is unavailable: {reason}")
            await asyncio.sleep(decision.ms / 1000)

    async def _halves(
        self, inputs: Sequence[FittedInput], stack: Stack, *, is_exclusive: bool
    ) -> list[SucceededRows | FailedRow]:
        first, second = stack.halves()
        return [
            *await self.infer(inputs, first, is_exclusive=is_exclusive),
            *await self.infer(inputs, second, is_exclusive=is_exclusive),
        ]

    async def _send(self, inputs: Sequence[FittedInput], stack: Stack) -> SucceededRows | Failure:
        response = await self._model.infer(
            request_of(self._target, inputs, stack), self._timeout_s, self._target.tenant, self._target.caller
        )
        if isinstance(response, Failure):
            return response
        try:
            outputs = outputs_of(self._target.signature, response, len(stack.rows))
        except DataLoss as err:
            # The response contradicts the model's metadata: a retry would not help.
            return Failure(Code.FAILED_PRECONDITION, err.message)
        return SucceededRows(stack.rows, dict(outputs), response.model_version[:32])
