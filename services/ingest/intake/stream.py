"""One SubmitStream: items are read ahead, written in groups with everyone's, and acknowledged in the stream's order.

    reader ──(window: items, bytes)──> submits under way ──> acknowledgements, in order ──> client

The window is the backpressure: while it is full the stream is not read, so HTTP/2's flow control stops its producer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

from services.ingest.intake.intake import Intake
from shoal.errors import Code, InvalidArgument, ShoalError
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
        self._under_way: asyncio.Queue[tuple[asyncio.Task[pb.SubmitStreamResponse], int] | None] = asyncio.Queue()

    async def acknowledge(
        self, requests: AsyncIterator[pb.SubmitStreamRequest]
    ) -> AsyncIterator[pb.SubmitStreamResponse]:
        """An answer for each request, in their order. What is refused is answered in-band, and the stream goes on."""
        reader = asyncio.create_task(self._read(requests), name="submit stream")
        current: asyncio.Task[pb.SubmitStreamResponse] | None = None
        try:
            while (entry := await self._under_way.get()) is not None:
                current, nbytes = entry
                yield await current
                self._window.leave(nbytes)
            await reader  # What ended the stream, if it was not its client.
        finally:
            # The client is gone, or the instance stops: what is not yet in a write is not wanted any more.
            reader.cancel()
            if current is not None:
                current.cancel()
            while not self._under_way.empty():
                if (entry := self._under_way.get_nowait()) is not None:
                    entry[0].cancel()

    async def _read(self, requests: AsyncIterator[pb.SubmitStreamRequest]) -> None:
        try:
            async for request in requests:
                nbytes = request.ByteSize()
                await self._window.enter(nbytes)
                self._under_way.put_nowait((asyncio.create_task(self._submit(request)), nbytes))
        finally:
            self._under_way.put_nowait(None)

    async def _submit(self, request: pb.SubmitStreamRequest) -> pb.SubmitStreamResponse:
        try:
            if not request.HasField("submit"):
                raise InvalidArgument("submit: required, and not set")
            accepted = await self._intake.submit(request.submit, waits=True)
        except ShoalError as err:
            return pb.SubmitStreamResponse(sequence=request.sequence, code=err.code, message=err.message)
        except Exception:
            log.exception("unexpected error with an item of a stream")
            message = "internal error: the log of the service has the cause"
            return pb.SubmitStreamResponse(sequence=request.sequence, code=Code.INTERNAL, message=message)
        return pb.SubmitStreamResponse(sequence=request.sequence, job_id=accepted.job.id, existed=accepted.existed)
