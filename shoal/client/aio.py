"""The async client: `async with shoal.AsyncClient() as client: ...`. The blocking one is made from it (blocking.py)."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from types import TracebackType

from shoal.client.inference.arrays import ArrayLike
from shoal.client.inference.inference import InferRequest, InferResult, Parameter, of_response
from shoal.client.inference.requests import Asker, each
from shoal.client.jobs.batches import AsyncBatches
from shoal.client.jobs.jobs import AsyncJobs
from shoal.client.models.models import AsyncModels
from shoal.client.status import Status, look
from shoal.client.store.results import AsyncResults
from shoal.client.store.store import AsyncStore
from shoal.client.tenants import AsyncTenants
from shoal.client.transport import methods
from shoal.client.transport.calls import Caller, Headers
from shoal.client.transport.retry import RetryPolicy
from shoal.discovery import find_gateway
from shoal.errors import ShoalError
from shoal.inference.v2 import inference_pb2 as oip

INFER_S = 60.0
"""What a large model on a CPU may take; a minute ends what hangs."""

STREAM_S = 3_600.0
"""A stream of inferences ends with its requests; an hour ends one that was forgotten."""

STATUS_S = 5.0
"""All of it is in somebody's memory: who takes longer is part of what is wrong."""


class AsyncClient:
    """Talks to a node at `address`, `host:port`; without one, to $SHOAL_GATEWAY or the node that runs here.

    Use as `async with`, or close it with `await client.close()`. Safe to use from many tasks of one event loop.

    Every call has a deadline (`timeout`, in seconds), is tried again where that is safe (see RetryPolicy), and raises a
    class of `shoal.errors`: Unavailable when nobody answers, NotFound, InvalidArgument ...

    Raises (on making one):
        InvalidArgument: `address` is none.
        NotFound, FailedPrecondition: none was given, and not exactly one node runs here.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        retry: RetryPolicy | None = None,
        headers: Headers | None = None,
        tenant: str = "",
    ) -> None:
        self._caller = Caller(find_gateway(address, os.environ), retry=retry, headers=headers)
        self.models = AsyncModels(self._caller)
        self.jobs = AsyncJobs(self._caller, tenant)
        self.batches = AsyncBatches(self._caller, tenant)
        self.results = AsyncResults(self._caller, tenant)
        self.store = AsyncStore(self._caller)
        self.tenants = AsyncTenants(self._caller)

    @property
    def address(self) -> str:
        """The gateway that it talks to."""
        return self._caller.address

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection; calls in flight are cancelled."""
        await self._caller.close()

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, ArrayLike],
        *,
        outputs: Sequence[str] | None = None,
        version: int | str = "",
        parameters: Mapping[str, Parameter] | None = None,
        datatypes: Mapping[str, str] | None = None,
        request_id: str = "",
        headers: Headers | None = None,
        timeout: float = INFER_S,
    ) -> InferResult:
        """Asks a model.

        `inputs` are arrays by input name, whose dtype says what is sent. Lists and scalars become what the model asks
        for, at the price of one more call; `datatypes` says so without it: `{"x": "FP32"}`. `outputs` narrows the
        answer. With `parameters={"explain": True}` the answer's parameters say which replica answered, and how large
        the batch was.

        Raises:
            InvalidArgument: names the input, what was expected and what came.
            NotFound: no such model or version.
            ResourceExhausted: the model's queue is full.
            DeadlineExceeded: no answer within `timeout` seconds; what was not run by then will not be.
            Unavailable: nobody answers.
        """
        request = InferRequest(model, inputs, outputs, version, parameters, request_id, datatypes or {})
        message = await Asker(self._caller).message(request)
        answer = await self._caller.call(
            methods.MODEL_INFER,
            message,
            timeout_s=timeout,
            headers=headers,
            doing=f"infer with {model}",
            # A step of a sequence changes what the model remembers of it.
            idempotent="sequence_id" not in message.parameters,
        )
        return of_response(answer)

    async def infer_stream(
        self,
        requests: AsyncIterable[InferRequest] | Iterable[InferRequest],
        *,
        headers: Headers | None = None,
        timeout: float = STREAM_S,
    ) -> AsyncGenerator[InferResult, None]:
        """Asks models over one stream, and gives the answers as they come; `request_id` says which is whose.

        A request that fails is answered with an InferResult whose `error` says why, and the stream goes on. A stream
        that breaks is not opened again: only the caller knows what of a sequence or of many answers is missing.

        Raises:
            Unavailable: the stream broke.
            InvalidArgument: a request cannot be sent.
        """
        failed: list[Exception] = []
        messages = self._messages(requests, failed)
        with self._caller.bidi(methods.MODEL_STREAM_INFER, messages, timeout_s=timeout, headers=headers) as call:
            async for answer in call:
                yield _of_stream(answer)
        if failed:
            raise failed[0]

    async def _messages(
        self, requests: AsyncIterable[InferRequest] | Iterable[InferRequest], failed: list[Exception]
    ) -> AsyncIterator[oip.ModelInferRequest]:
        """The messages. grpc swallows what their source raises: it ends the stream, and is kept aside."""
        asker = Asker(self._caller)
        try:
            async for request in each(requests):
                yield await asker.message(request)
        except Exception as err:
            failed.append(err)

    async def status(self, *, timeout: float = STATUS_S) -> Status:
        """The node at one look: instances, leader, models, and what Envoy was told.

        Raises:
            Unavailable: nobody answers.
        """
        return await look(self._caller, timeout)


def _of_stream(answer: oip.ModelStreamInferResponse) -> InferResult:
    if not answer.error_message:
        return of_response(answer.infer_response)
    about = answer.infer_response
    return InferResult(about.model_name, about.model_version, id=about.id, error=ShoalError(answer.error_message))
