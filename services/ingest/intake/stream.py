"""SubmitStream: items are read ahead, written in the groups of all callers, and acknowledged in the stream's order.

    reader ──(window: items, bytes)──> submits in flight ──> acknowledgements, in order ──> client

A message has one job or several. Jobs of a message with several are acknowledged in messages of several, as soon as
some are durable. Items have no tasks: each is a future in the group that is written next.

The window is the backpressure: while it is full the stream is not read, and HTTP/2 flow control stops the client.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from mesh.rpc.tenant_scope import EVERY_TENANT, TenantScope
from services.ingest.intake.intake import Accepted, Intake
from services.ingest.tracing import traceparent_of
from shoal.errors import Internal, InvalidArgument, ShoalError
from shoal.ingest.v1 import ingest_pb2 as pb

log = logging.getLogger(__name__)

A = TypeVar("A", pb.SubmitStreamResponse, pb.Acknowledgement)

Q = TypeVar("Q")

MOST_A_MESSAGE = 1_000
"""Maximum jobs of one message of a stream: with 100 already, the cost of the message is negligible."""
_LAST_SEQUENCE = (1 << 63) - 1
# Number of jobs of a message between yields to the event loop: about a millisecond.
_YIELD_EVERY = 50


async def in_turns(field: str, requests: Sequence[Q]) -> AsyncIterator[Q]:
    """Yield the requests of one message, with regular yields to the event loop.

    Raises:
        InvalidArgument: there are too many requests in `field`.
    """
    if len(requests) > MOST_A_MESSAGE:
        raise InvalidArgument(f"{field}: at most {MOST_A_MESSAGE} in one message, got {len(requests)}")
    for at, request in enumerate(requests, 1):
        yield request
        if at % _YIELD_EVERY == 0:
            await asyncio.sleep(0)


class Window:
    """Window of items and bytes in flight. A larger item passes alone. One reader waits at a time."""

    def __init__(self, items: int, nbytes: int) -> None:
        self._most_items = items
        self._most_bytes = nbytes
        self._items = 0
        self._bytes = 0
        self._left = asyncio.Event()

    async def enter(self, nbytes: int) -> None:
        """Wait until the window has capacity for one item, and reserve it."""
        while self._items and (self._items >= self._most_items or self._bytes + nbytes > self._most_bytes):
            self._left.clear()
            await self._left.wait()
        self._items += 1
        self._bytes += nbytes

    def leave(self, nbytes: int, items: int = 1) -> None:
        """Release the capacity of `items` that have `nbytes` together."""
        self._items -= items
        self._bytes -= nbytes
        self._left.set()


class Stream:
    """SubmitStream of one client."""

    def __init__(self, intake: Intake, *, items: int, nbytes: int, scope: TenantScope = EVERY_TENANT) -> None:
        self._intake = intake
        self._scope = scope
        self._window = Window(items, nbytes)
        # Bounded by the window, which every item enters first.
        self._under_way: deque[_Item | None] = deque()
        self._arrived = asyncio.Event()

    async def acknowledge(
        self, requests: AsyncIterator[pb.SubmitStreamRequest]
    ) -> AsyncIterator[pb.SubmitStreamResponse]:
        """Yield acknowledgements of all jobs, in order. A rejected job is reported in-band, and the stream continues.

        Raises:
            InvalidArgument: a message has more than MOST_A_MESSAGE jobs. The jobs before it are acknowledged.
        """
        reader = asyncio.create_task(self._read(requests), name="submit stream")
        # Sent in the first response only.
        most_submits = MOST_A_MESSAGE
        try:
            while (item := await self._next()) is not None:
                await item.ended()
                items = self._pop_completed()
                response = _response(items)
                response.most_submits, most_submits = most_submits, 0
                yield response
                self._window.leave(sum(item.nbytes for item in items), len(items))
            # Raises the error that ended the stream, unless the client ended it.
            await reader
        finally:
            # When the client has disconnected or the instance stops, items that are not in a write yet are dropped.
            reader.cancel()
            for left in self._under_way:
                if left is not None:
                    left.give_up()

    async def _next(self) -> _Item | None:
        while not self._under_way:
            self._arrived.clear()
            await self._arrived.wait()
        return self._under_way[0]

    def _pop_completed(self) -> list[_Item]:
        """Remove the first item, which is completed, and the items that may be acknowledged with it."""
        first = self._under_way.popleft()
        assert first is not None
        items = [first]
        while first.is_of_several and len(items) < MOST_A_MESSAGE and self._under_way:
            following = self._under_way[0]
            if following is None or not following.is_of_several or not following.has_ended():
                break
            items.append(following)
            self._under_way.popleft()
        return items

    async def _read(self, requests: AsyncIterator[pb.SubmitStreamRequest]) -> None:
        traceparent = traceparent_of()
        try:
            async for request in requests:
                if request.submits:
                    await self._submit_several(request, traceparent)
                else:
                    submit = request.submit if request.HasField("submit") else None
                    await self._submit_one(request.sequence, submit, traceparent, is_of_several=False)
                    del submit
                # An idle stream keeps no request.
                del request
        finally:
            self._put(None)

    async def _submit_several(self, request: pb.SubmitStreamRequest, traceparent: str) -> None:
        if request.HasField("submit"):
            raise InvalidArgument("submits: not together with submit")
        if request.sequence > _LAST_SEQUENCE - len(request.submits):
            raise InvalidArgument(f"sequence: {request.sequence} plus the number of jobs exceeds 63 bits")
        sequence = request.sequence
        async for submit in in_turns("submits", request.submits):
            await self._submit_one(sequence, submit, traceparent, is_of_several=True)
            sequence += 1

    async def _submit_one(
        self, sequence: int, submit: pb.SubmitRequest | None, traceparent: str, *, is_of_several: bool
    ) -> None:
        nbytes = submit.ByteSize() if submit is not None else 0
        await self._window.enter(nbytes)
        self._put(_Item(sequence, nbytes, is_of_several, await self._begin(submit, traceparent)))

    def _put(self, item: _Item | None) -> None:
        self._under_way.append(item)
        self._arrived.set()

    async def _begin(self, submit: pb.SubmitRequest | None, traceparent: str) -> asyncio.Future[Accepted] | ShoalError:
        try:
            if submit is None:
                raise InvalidArgument("submit: required, and not set")
            return await self._intake.begin_when_there_is_room(submit, traceparent, self._scope)
        except ShoalError as err:
            return err
        except Exception:
            log.exception("unexpected error with an item of a stream", {"event": "submit.item_failed"})
            return Internal("internal error: the log of the service has the cause")


@dataclass(frozen=True, slots=True)
class _Written:
    """An accepted job, as its acknowledgement names it."""

    job_id: str
    existed: bool


@dataclass(slots=True, eq=False)
class _Item:
    """One job of a stream, and its outcome."""

    sequence: int
    nbytes: int
    is_of_several: bool
    """True: received in a message of several, and acknowledged in one."""
    outcome: asyncio.Future[Accepted] | ShoalError | _Written

    def __post_init__(self) -> None:
        if isinstance(self.outcome, asyncio.Future):
            self.outcome.add_done_callback(self._on_written)

    def _on_written(self, outcome: asyncio.Future[Accepted]) -> None:
        """Drop the job with its request: the acknowledgement may wait for a client that does not read."""
        if not outcome.cancelled() and outcome.exception() is None:
            accepted = outcome.result()
            self.outcome = _Written(accepted.job.id, accepted.existed)

    def has_ended(self) -> bool:
        return not isinstance(self.outcome, asyncio.Future) or self.outcome.done()

    async def ended(self) -> None:
        """Wait until the outcome is known."""
        if isinstance(self.outcome, asyncio.Future) and not self.outcome.done():
            with suppress(ShoalError):
                await self.outcome

    def written(self) -> _Written:
        """Return the accepted job, or raise the error of a rejected one."""
        if isinstance(self.outcome, ShoalError):
            raise self.outcome
        if isinstance(self.outcome, _Written):
            return self.outcome
        accepted = self.outcome.result()
        return _Written(accepted.job.id, accepted.existed)

    def give_up(self) -> None:
        if isinstance(self.outcome, asyncio.Future):
            self.outcome.cancel()


def _response(items: Sequence[_Item]) -> pb.SubmitStreamResponse:
    if items[0].is_of_several:
        return pb.SubmitStreamResponse(acknowledgements=[_acknowledged(item, pb.Acknowledgement) for item in items])
    return _acknowledged(items[0], pb.SubmitStreamResponse)


def _acknowledged(item: _Item, make: type[A]) -> A:
    try:
        written = item.written()
    except ShoalError as err:
        return make(sequence=item.sequence, code=err.code, message=err.message)
    return make(sequence=item.sequence, job_id=written.job_id, existed=written.existed)
