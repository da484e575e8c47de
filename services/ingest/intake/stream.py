"""One SubmitStream: items are read ahead, written in groups with everyone's, and acknowledged in the stream's order.

    reader ──(window: items, bytes)──> submits under way ──> acknowledgements, in order ──> client

No item has a task: each is a future in the group that is written next.

The window is the backpressure: while it is full the stream is not read, so HTTP/2's flow control stops its producer.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

from services.ingest.intake.intake import Accepted, Intake
from services.ingest.tracing import traceparent_of
from shoal.errors import Internal, InvalidArgument, ShoalError
from shoal.ingest.v1 import ingest_pb2 as pb

log = logging.getLogger(__name__)


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

    def leave(self, nbytes: int) -> None:
        """Gives one item's room back."""
        self._items -= 1
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
        """An answer for each request, in their order. What is refused is answered in-band, and the stream goes on."""
        reader = asyncio.create_task(self._read(requests), name="submit stream")
        try:
            while (item := await self._next()) is not None:
                response = await item.response()
                self._under_way.popleft()
                yield response
                self._window.leave(item.nbytes)
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

    async def _read(self, requests: AsyncIterator[pb.SubmitStreamRequest]) -> None:
        traceparent = traceparent_of()
        try:
            async for request in requests:
                nbytes = request.ByteSize()
                await self._window.enter(nbytes)
                self._put(_Item(request.sequence, nbytes, await self._begun(request, traceparent)))
        finally:
            self._put(None)

    def _put(self, item: _Item | None) -> None:
        self._under_way.append(item)
        self._came.set()

    async def _begun(self, request: pb.SubmitStreamRequest, traceparent: str) -> asyncio.Future[Accepted] | ShoalError:
        try:
            if not request.HasField("submit"):
                raise InvalidArgument("submit: required, and not set")
            return await self._intake.begin_when_there_is_room(request.submit, traceparent)
        except ShoalError as err:
            return err
        except Exception:
            log.exception("unexpected error with an item of a stream")
            return Internal("internal error: the log of the service has the cause")


@dataclass(slots=True, eq=False)
class _Item:
    """One request of a stream, and what becomes of it."""

    sequence: int
    nbytes: int
    outcome: asyncio.Future[Accepted] | ShoalError

    async def response(self) -> pb.SubmitStreamResponse:
        try:
            if isinstance(self.outcome, ShoalError):
                raise self.outcome
            accepted = self.outcome.result() if self.outcome.done() else await self.outcome
        except ShoalError as err:
            return pb.SubmitStreamResponse(sequence=self.sequence, code=err.code, message=err.message)
        return pb.SubmitStreamResponse(sequence=self.sequence, job_id=accepted.job.id, existed=accepted.existed)

    def give_up(self) -> None:
        if isinstance(self.outcome, asyncio.Future):
            self.outcome.cancel()
