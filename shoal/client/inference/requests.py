"""Requests on their way out: what only the model knows of them is asked for, what comes as an iterable is iterated."""

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
"""Requests of an iterable that may block: so many are asked for before they are needed, while others are sent."""

ASK_S = 10.0
"""Metadata is answered from memory."""

_END = object()


class Asker:
    """Makes messages of requests. Asks the node for a model's datatypes where a request leaves them open: once a model.

    Short-lived, one for a call or a stream: what a model asks for may change with its versions.
    """

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._known: dict[tuple[str, str], Mapping[str, str]] = {}

    async def message(self, request: InferRequest) -> oip.ModelInferRequest:
        """The message of `request`.

        Raises:
            InvalidArgument: names the input that cannot be sent.
            NotFound: a list was given, and the model that knows its datatype is not there.
        """
        return to_request(request, await self._asked(request) if request.inexact else {})

    async def _asked(self, request: InferRequest) -> Mapping[str, str]:
        key = (request.model, str(request.version))
        if key not in self._known:
            ask = oip.ModelMetadataRequest(name=key[0], version=key[1])
            doing = f"ask {request.model} for its inputs"
            try:
                answer = await self._caller.call(methods.MODEL_METADATA, ask, timeout_s=ASK_S, doing=doing)
                self._known[key] = {tensor.name: tensor.datatype for tensor in answer.inputs}
            except Unimplemented:  # A server that cannot say: NumPy's own choice has to do.
                self._known[key] = {}
        return self._known[key]


async def each(items: AsyncIterable[T] | Iterable[T]) -> AsyncGenerator[T, None]:
    """The items of either kind of iterable. One that may block is asked in a thread, so that the loop goes on."""
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    elif isinstance(items, Sequence):
        for item in items:
            yield item
    else:
        async with aclosing(_asked_in_a_thread(iter(items))) as asked:
            async for item in asked:
                yield item


async def _asked_in_a_thread(iterator: Iterator[T]) -> AsyncGenerator[T, None]:
    """Its items, each as soon as it is there. The thread asks on while they are taken: a trip to one for each of them
    costs more than most do."""
    loop, ahead, came = asyncio.get_running_loop(), deque[T](), asyncio.Event()

    def ask() -> bool:
        """Whether there may be more."""
        while len(ahead) < AHEAD:
            item = next(iterator, _END)
            if item is _END:
                return False
            ahead.append(item)  # type: ignore[arg-type]
            if len(ahead) == 1:
                loop.call_soon_threadsafe(came.set)
        return True

    def asked(done: asyncio.Task[bool]) -> None:
        came.set()
        if not done.cancelled():
            done.exception()  # Raised below, or of no interest to whoever has left.

    more = True
    while more:
        asking = asyncio.create_task(asyncio.to_thread(ask))
        asking.add_done_callback(asked)
        while not asking.done() or ahead:
            came.clear()
            while ahead:
                yield ahead.popleft()
            if not asking.done():
                await came.wait()
        more = await asking
