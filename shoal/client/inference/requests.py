"""Encoding of inference requests, with datatypes from the model's metadata; iteration over blocking iterables."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from shoal.client.inference.inference import InferRequest, check_types, to_request
from shoal.client.transport import methods
from shoal.client.transport.calls import Caller
from shoal.client.transport.deadline import Deadline
from shoal.errors import InvalidArgument, ShoalError, Unimplemented
from shoal.inference.v2 import inference_pb2 as oip

T = TypeVar("T")

AHEAD = 16
"""Items read ahead from an iterable that may block, while earlier ones are sent."""

METADATA_S = 10.0
"""Timeout of a metadata call, which a server serves from memory. The call that needs it may end earlier."""

SIGNATURE_S = 5.0
"""Time for which signatures are kept. A new version of a model rarely has other datatypes, and then its server rejects
the old ones, upon which the signature is read again."""

SIGNATURES = 256
"""Number of signatures kept, the newest ones. One takes about a kilobyte."""

_END = object()


@dataclass(frozen=True)
class Signature:
    """Datatypes of a model's inputs, by input name."""

    datatypes: Mapping[str, str]
    read_at: float
    """Time on the caller's clock, before the read."""


class RequestEncoder:
    """Encoder of requests. Datatypes that a request leaves open are read from the model's metadata, and kept."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._signatures: dict[tuple[str, str], Signature] = {}

    async def encode(self, request: InferRequest, deadline: Deadline | None = None) -> oip.ModelInferRequest:
        """Return the message of `request`. `deadline` is that of the call or stream, None without one.

        Raises:
            InvalidArgument: the message names the input that cannot be sent.
            NotFound: an input is a list, and the model whose metadata has its datatype does not exist.
            DeadlineExceeded: the metadata was not read in time.
        """
        return (await self.encode_signed(request, deadline))[0]

    async def encode_signed(
        self, request: InferRequest, deadline: Deadline | None = None
    ) -> tuple[oip.ModelInferRequest, Signature | None]:
        """Return the message of `request`, and the signature it was made with. Raises as `encode` does."""
        begun = self._caller.clock()
        signature = await self._signature(request, deadline)
        try:
            return encoded(request, signature), signature
        except InvalidArgument:
            newer = None if is_fresh(signature, begun) else await self.newer(request, signature, deadline)
            if newer is None:
                raise
            return encoded(request, newer), newer

    async def _signature(self, request: InferRequest, deadline: Deadline | None) -> Signature | None:
        """Return the signature that `request` needs; None when all inputs are arrays."""
        check_types(request)
        if not request.inexact:
            return None
        key, now = (request.model, str(request.version)), self._caller.clock()
        known = self._signatures.get(key)
        if known is None or now - known.read_at >= SIGNATURE_S:
            known = Signature(await self._datatypes(*key, deadline), now)
            # Taken out first, so that the order is that of the reads.
            self._signatures.pop(key, None)
            self._signatures[key] = known
            for oldest in list(self._signatures)[:-SIGNATURES]:
                self._signatures.pop(oldest, None)
        return known

    async def newer(
        self, request: InferRequest, rejected: Signature | None, deadline: Deadline | None
    ) -> Signature | None:
        """Return the model's signature if it has other datatypes than the one that led to a rejection; else None."""
        self.forget(request.model)
        try:
            newer = await self._signature(request, deadline)
        except ShoalError:
            # The rejection says more.
            return None
        return None if rejected is None or newer is None or newer.datatypes == rejected.datatypes else newer

    def forget(self, model: str) -> None:
        """Drop the signatures of a model, whose server has rejected a request."""
        for key in [key for key in list(self._signatures) if key[0] == model]:
            self._signatures.pop(key, None)

    async def _datatypes(self, model: str, version: str, deadline: Deadline | None) -> Mapping[str, str]:
        try:
            response = await self._caller.call(
                methods.MODEL_METADATA,
                oip.ModelMetadataRequest(name=model, version=version),
                timeout_s=METADATA_S if deadline is None else deadline.capped(METADATA_S, self._caller.clock()),
                doing=f"read the inputs of {model}",
            )
        except Unimplemented:
            # A server without metadata: NumPy's choice of datatype is sent.
            return {}
        return {tensor.name: tensor.datatype for tensor in response.inputs}


def is_fresh(signature: Signature | None, begun: float) -> bool:
    """Return True when a signature cannot be out of date: there is none, or it was read since `begun`."""
    return signature is None or signature.read_at >= begun


def encoded(request: InferRequest, signature: Signature | None) -> oip.ModelInferRequest:
    """Return the message of `request` with the datatypes of `signature`. Raises InvalidArgument."""
    return to_request(request, {} if signature is None else signature.datatypes)


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
