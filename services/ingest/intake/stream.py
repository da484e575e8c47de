"""One SubmitStream: items are read ahead, written in groups with everyone's, and acknowledged in the stream's order.

    reader ──(window: items, bytes)──> submits under way ──> acknowledgements, in order ──> client

A message carries one job, or several: those are acknowledged in messages of several, as soon as some are durable. No
item has a task: each is a future in the group that is written next.

The window is the backpressure: while it is full the stream is not read, so HTTP/2's flow control stops its producer.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from services.ingest.intake.intake import Accepted, Intake
from services.ingest.tracing import traceparent_of
from shoal.errors import Internal, InvalidArgument, ShoalError
from shoal.ingest.v1 import ingest_pb2 as pb

log = logging.getLogger(__name__)

A = TypeVar("A", pb.SubmitStreamResponse, pb.Acknowledgement)

Q = TypeVar("Q")

MOST_A_MESSAGE = 1_000
"""Jobs of one message of a stream: with 100 already, a message costs each next to nothing."""
_LAST_SEQUENCE = (1 << 63) - 1
_TURN = 50
# So many jobs of one message are taken in before others of this process have their turn: about a millisecond.


async def in_turns(field: str, requests: Sequence[Q]) -> AsyncIterator[Q]:
    """The requests of one message, in turns with what else this process has to do.

    Raises:
        InvalidArgument: there are too many in `field`.
    """
    if len(requests) > MOST_A_MESSAGE:
        raise InvalidArgument(f"{field}: at most {MOST_A_MESSAGE} in one message, got {len(requests)}")
    for at, request in enumerate(requests, 1):
        yield request
        if at % _TURN == 0:
            await asyncio.sleep(0)


class Window:
    """Room for so many items and bytes. A larger item passes alone. One reader waits at a time."""

    def __init__(self, items: int, nbytes: int) -> None:
        self._most_items = items
        self._most_bytes = nbytes
        self._items = 0
        self._bytes = 0
        self._left = asyncio.Event()

    async def enter(self, nbytes: int) -> None:
        """Waits until there is room for one item, and takes it."""
        while self._items and (self._items >= self._most_items or self._bytes + nbytes > self._most_bytes):
            self._left.clear()
            await self._left.wait()
        self._items += 1
        self._bytes += nbytes

    def leave(self, nbytes: int, items: int = 1) -> None:
        """Gives the room of items back that have `nbytes` together."""
        self._items -= items
        self._bytes -= nbytes
        self._left.set()


class Stream:
    """One client's stream of jobs."""

    def __init__(self, intake: Intake, *, items: int, nbytes: int) -> None:
        self._intake = intake
        self._window = Window(items, nbytes)
        # Bounded by the window: whatever is in here has entered it.
        self._under_way: deque[_Item | None] = deque()
        self._came = asyncio.Event()

    async def acknowledge(
        self, requests: AsyncIterator[pb.SubmitStreamRequest]
    ) -> AsyncIterator[pb.SubmitStreamResponse]:
        """An answer for each job, in their order. What is refused is answered in-band, and the stream goes on.

        Raises:
            InvalidArgument: a message has more than MOST_A_MESSAGE jobs. What came before it is acknowledged.
        """
        reader = asyncio.create_task(self._read(requests), name="submit stream")
        most_submits = MOST_A_MESSAGE  # Said once.
        try:
            while (item := await self._next()) is not None:
                await item.ended()
                items = self._ended_together()
                response = _response(items)
                response.most_submits, most_submits = most_submits, 0
                yield response
                self._window.leave(sum(item.nbytes for item in items), len(items))
            await reader  # What ended the stream, if it was not its client.
        finally:
            # The client is gone, or the instance stops: what is not yet in a write is not wanted any more.
            reader.cancel()
            for left in self._under_way:
                if left is not None:
                    left.give_up()

    async def _next(self) -> _Item | None:
        while not self._under_way:
            self._came.clear()
            await self._came.wait()
        return self._under_way[0]

    def _ended_together(self) -> list[_Item]:
        """Takes out the first, which has ended, and what may be acknowledged with it."""
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
                    await self._take_several(request, traceparent)
                else:
                    submit = request.submit if request.HasField("submit") else None
                    await self._take(request.sequence, submit, traceparent, is_of_several=False)
        finally:
            self._put(None)

    async def _take_several(self, request: pb.SubmitStreamRequest, traceparent: str) -> None:
        if request.HasField("submit"):
            raise InvalidArgument("submits: not together with submit")
        if request.sequence > _LAST_SEQUENCE - len(request.submits):
            raise InvalidArgument(f"sequence: {request.sequence} cannot be counted on from in 64 bits")
        sequence = request.sequence
        async for submit in in_turns("submits", request.submits):
            await self._take(sequence, submit, traceparent, is_of_several=True)
            sequence += 1

    async def _take(
        self, sequence: int, submit: pb.SubmitRequest | None, traceparent: str, *, is_of_several: bool
    ) -> None:
        nbytes = submit.ByteSize() if submit is not None else 0
        await self._window.enter(nbytes)
        self._put(_Item(sequence, nbytes, is_of_several, await self._begun(submit, traceparent)))

    def _put(self, item: _Item | None) -> None:
        self._under_way.append(item)
        self._came.set()

    async def _begun(self, submit: pb.SubmitRequest | None, traceparent: str) -> asyncio.Future[Accepted] | ShoalError:
        try:
            if submit is None:
                raise InvalidArgument("submit: required, and not set")
            return await self._intake.begin_when_there_is_room(submit, traceparent)
        except ShoalError as err:
            return err
        except Exception:
            log.exception("unexpected error with an item of a stream")
            return Internal("internal error: the log of the service has the cause")


@dataclass(slots=True, eq=False)
class _Item:
    """One job of a stream, and what becomes of it."""

    sequence: int
    nbytes: int
    is_of_several: bool
    """It came in a message of several, and is acknowledged so."""
    outcome: asyncio.Future[Accepted] | ShoalError

    def has_ended(self) -> bool:
        return isinstance(self.outcome, ShoalError) or self.outcome.done()

    async def ended(self) -> None:
        """Waits until it has."""
        if isinstance(self.outcome, asyncio.Future) and not self.outcome.done():
            with suppress(ShoalError):
                await self.outcome

    def accepted(self) -> Accepted:
        """Raises what it was refused with."""
        if isinstance(self.outcome, ShoalError):
            raise self.outcome
        return self.outcome.result()

    def give_up(self) -> None:
        if isinstance(self.outcome, asyncio.Future):
            self.outcome.cancel()


def _response(items: Sequence[_Item]) -> pb.SubmitStreamResponse:
    if items[0].is_of_several:
        return pb.SubmitStreamResponse(acknowledgements=[_acknowledged(item, pb.Acknowledgement) for item in items])
    return _acknowledged(items[0], pb.SubmitStreamResponse)


def _acknowledged(item: _Item, make: type[A]) -> A:
    try:
        accepted = item.accepted()
    except ShoalError as err:
        return make(sequence=item.sequence, code=err.code, message=err.message)
    return make(sequence=item.sequence, job_id=accepted.job.id, existed=accepted.existed)
