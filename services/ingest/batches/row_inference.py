"""Stacks of rows go to the model until each row has an answer, or is to blame for having none.

    stack ──> answered
      │  nobody there, shed, model not there yet: again after a wait; after PATIENCE_S the chunk is given back
      │  the request is at fault (a code that no retry can mend): its halves; a row by itself is dead
      │  anything else: its halves; a row by itself is tried again, and dead when it is out of attempts
      └─ an instance died under it: the same, but alone: nothing else of ours is under way meanwhile

So a row that kills whoever runs it takes no other row with it: only what happens to a row by itself is held against it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from services.ingest.batches.outputs.part_summary import RowError
from services.ingest.batches.rows.fitting import Fitted
from services.ingest.batches.rows.stacking import Stack
from services.ingest.batches.rows.wire import ModelTarget, outputs_of, request_of
from services.ingest.job import PERMANENT, Failure, Policy, backoff_ms, name_of, refused_wait_ms
from shoal.errors import Code, DataLoss, Unavailable
from shoal.inference.v2 import inference_pb2
from shoal.oip.tensors import Array

_AWAY = frozenset({Code.NOT_FOUND, Code.RESOURCE_EXHAUSTED})
# The model is not there (yet, or any more), or has no room: no row is to blame, however long it lasts.
_KILLED = frozenset({Code.UNAVAILABLE, Code.UNKNOWN})


MODEL_WAIT_S = 10.0
"""How long a chunk waits for a model that is not there; then it makes room for chunks of other models. A model that
restarts is back by then, and no row was run for nothing."""


class InferenceClient(Protocol):
    """infer, as a call needs it."""

    async def infer(
        self, request: bytes, timeout_s: float, tenant: str = ""
    ) -> inference_pb2.ModelInferResponse | Failure:
        """Runs one serialised ModelInferRequest, once. Never raises for a call that failed."""


@dataclass(frozen=True, slots=True)
class AnsweredRows:
    """Rows with one answer: arrays by output name, whose first dimension is the rows."""

    rows: tuple[int, ...]
    outputs: dict[str, Array]
    version: str


@dataclass(frozen=True, slots=True)
class FailedRow:
    """A row without an answer."""

    row: int
    dead: RowError


@dataclass(frozen=True, slots=True)
class Wait:
    """Decision: the same stack again, after a wait."""

    ms: float
    is_counted: bool


@dataclass(frozen=True, slots=True)
class Split:
    """Decision: its halves, each by itself."""

    is_exclusive: bool


def decide(
    failure: Failure, *, rows: int, attempts: int, refusals: int, policy: Policy, drawn: float
) -> Wait | Split | RowError:
    """What becomes of a stack that failed; `attempts` counts those that failed by themselves, this one included."""
    if not failure.is_reached or failure.code in _AWAY:
        return Wait(max(refused_wait_ms(refusals, drawn), failure.retry_after_ms), False)
    if rows > 1:
        return Split(failure.code in _KILLED)
    if failure.code in PERMANENT or attempts >= policy.max_attempts:
        return RowError(name_of(failure.code), failure.message, attempts)
    return Wait(max(backoff_ms(policy, attempts, drawn), failure.retry_after_ms), True)


class RequestSlots:
    """At most `most` calls at once, or one that is alone."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._locations = asyncio.Semaphore(most)
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def one(self, *, exclusive: bool) -> AsyncIterator[None]:
        """A place for one call; with `alone` all of them."""
        taken = 0
        try:
            async with self._turn:  # Two that want all would each hold a part for ever.
                for _ in range(self._most if exclusive else 1):
                    await self._locations.acquire()
                    taken += 1
            yield
        finally:
            for _ in range(taken):
                self._locations.release()


class RowInference:
    """Calls a model for the rows of one chunk."""

    def __init__(
        self,
        model: InferenceClient,
        asked: ModelTarget,
        slots: RequestSlots,
        *,
        policy: Policy,
        timeout_s: float,
        on_wait: Callable[[str], None],
        model_wait_s: float = MODEL_WAIT_S,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._model = model
        self._asked = asked
        self._slots = slots
        self._policy = policy
        self._timeout_s = timeout_s
        self._on_wait = on_wait
        self._model_wait_s = model_wait_s
        self._draw = draw

    async def answer(
        self, inputs: Sequence[Fitted], stack: Stack, *, is_exclusive: bool = False
    ) -> list[AnsweredRows | FailedRow]:
        """What came of the rows of a stack, in their order.

        Raises:
            Unavailable: nobody could be asked for too long.
        """
        attempts = refusals = 0
        give_up_at = None
        while True:
            async with self._slots.one(exclusive=is_exclusive):
                got = await self._once(inputs, stack)
            if isinstance(got, AnsweredRows):
                self._on_wait("")
                return [got]
            attempts += got.is_reached and got.code not in _AWAY
            how = decide(
                got,
                rows=len(stack.rows),
                attempts=attempts,
                refusals=refusals,
                policy=self._policy,
                drawn=self._draw(),
            )
            if isinstance(how, RowError):
                return [FailedRow(stack.rows[0], how)]
            is_exclusive = is_exclusive or (got.code in _KILLED and got.is_reached)
            if isinstance(how, Split):
                return await self._halves(inputs, stack, is_exclusive=how.is_exclusive or is_exclusive)
            refusals += not how.is_counted
            if how.is_counted:
                give_up_at = None
            else:
                why = f"{name_of(got.code)}: {got.message}"[:300]
                self._on_wait(why)
                now = asyncio.get_running_loop().time()
                give_up_at = give_up_at or now + self._model_wait_s
                if now > give_up_at:
                    raise Unavailable(f"model {self._asked.model_name!r} cannot be asked: {why}")
            await asyncio.sleep(how.ms / 1000)

    async def _halves(
        self, inputs: Sequence[Fitted], stack: Stack, *, is_exclusive: bool
    ) -> list[AnsweredRows | FailedRow]:
        first, second = stack.halves()
        return [
            *await self.answer(inputs, first, is_exclusive=is_exclusive),
            *await self.answer(inputs, second, is_exclusive=is_exclusive),
        ]

    async def _once(self, inputs: Sequence[Fitted], stack: Stack) -> AnsweredRows | Failure:
        got = await self._model.infer(request_of(self._asked, inputs, stack), self._timeout_s, self._asked.tenant)
        if isinstance(got, Failure):
            return got
        try:
            outputs = outputs_of(self._asked.signature, got, len(stack.rows))
        except DataLoss as err:
            # It promises one thing and answers another: a further attempt would not help.
            return Failure(Code.FAILED_PRECONDITION, err.message)
        return AnsweredRows(stack.rows, dict(outputs), got.model_version[:32])
