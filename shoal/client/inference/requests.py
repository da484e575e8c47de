"""Encoding of inference requests, with datatypes from the model's metadata; iteration over blocking iterables."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import TypeVar

from shoal.client.inference.inference import InferRequest, to_request
from shoal.client.transport import methods
from shoal.client.transport.calls import Caller
from shoal.errors import Unimplemented
from shoal.inference.v2 import inference_pb2 as oip

T = TypeVar("T")

AHEAD = 16
"""Items read ahead from an iterable that may block, while earlier ones are sent."""

METADATA_S = 10.0
"""Timeout of a metadata call, which a server serves from memory."""

_END = object()


class RequestEncoder:
    """Encoder of requests. It fetches the datatypes of a model once, when a request leaves them open.

    Use one encoder for one call or stream: the datatypes may change with the model's versions.
    """

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._datatypes: dict[tuple[str, str], Mapping[str, str]] = {}

    async def encode(self, request: InferRequest) -> oip.ModelInferRequest:
        """Return the message of `request`.

        Raises:
            InvalidArgument: the message names the input that cannot be sent.
            NotFound: an input is a list, and the model whose metadata has its datatype does not exist.
        """
        return to_request(request, await self._datatypes_of(request) if request.inexact else {})

    async def _datatypes_of(self, request: InferRequest) -> Mapping[str, str]:
        key = (request.model, str(request.version))
        if key not in self._datatypes:
            query = oip.ModelMetadataRequest(name=key[0], version=key[1])
            doing = f"read the inputs of {request.model}"
            try:
                response = await self._caller.call(methods.MODEL_METADATA, query, timeout_s=METADATA_S, doing=doing)
                self._datatypes[key] = {tensor.name: tensor.datatype for tensor in response.inputs}
            except Unimplemented:
                # A server without metadata: NumPy's choice of datatype is sent.
                self._datatypes[key] = {}
        return self._datatypes[key]


async def as_async(items: AsyncIterable[T] | Iterable[T]) -> AsyncGenerator[T, None]:
    """Yield the items of an iterable of either kind. One that may block is read in a thread, to keep the loop free."""
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    elif isinstance(items, Sequence):
        for item in items:
            yield item
    else:
        async with aclosing(_read_in_thread(iter(items))) as read_items:
            async for item in read_items:
                yield item


async def _read_in_thread(iterator: Iterator[T]) -> AsyncGenerator[T, None]:
    """Yield the items of `iterator` as soon as the thread has read them.

    The thread reads ahead meanwhile: a switch to a thread for each item would cost more than reading most items.
    """
    loop, ahead, changed = asyncio.get_running_loop(), deque[T](), asyncio.Event()

    def read() -> bool:
        """Fill `ahead`. Return False when the iterator has ended."""
        while len(ahead) < AHEAD:
            item = next(iterator, _END)
            if item is _END:
                return False
            ahead.append(item)  # type: ignore[arg-type]
            if len(ahead) == 1:
                loop.call_soon_threadsafe(changed.set)
        return True

    def read_ended(done: asyncio.Task[bool]) -> None:
        changed.set()
        if not done.cancelled():
            # Mark the error as retrieved: it is raised below, unless the caller has stopped iterating.
            done.exception()

    more = True
    while more:
        reading = asyncio.create_task(asyncio.to_thread(read))
        reading.add_done_callback(read_ended)
        while not reading.done() or ahead:
            changed.clear()
            while ahead:
                yield ahead.popleft()
            if not reading.done():
                await changed.wait()
        more = await reading
