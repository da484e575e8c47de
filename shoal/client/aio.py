"""Async client: `async with shoal.AsyncClient() as client: ...`. The blocking client wraps it (blocking.py)."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from types import TracebackType

from shoal.client.access import AsyncAccess
from shoal.client.audit import AsyncAudit
from shoal.client.history import By, History, fetch_history
from shoal.client.inference.arrays import ArrayLike
from shoal.client.inference.inference import InferRequest, InferResult, Parameter, of_parameters, of_response
from shoal.client.inference.requests import RequestEncoder, as_async, encoded, is_fresh
from shoal.client.instances import AsyncInstances
from shoal.client.jobs.batches import AsyncBatches
from shoal.client.jobs.jobs import AsyncJobs
from shoal.client.models.models import AsyncModels
from shoal.client.spans import Spans, fetch_spans
from shoal.client.status import Status, fetch_status
from shoal.client.store.results import AsyncResults
from shoal.client.store.store import AsyncStore
from shoal.client.tenants import AsyncTenants
from shoal.client.transport import methods
from shoal.client.transport.calls import Caller, Headers
from shoal.client.transport.deadline import Deadline
from shoal.client.transport.retry import RetryPolicy
from shoal.client.transport.security import PathLike, Security, security
from shoal.discovery import CA_VARIABLE, TOKEN_VARIABLE, Gateway, find_gateway, key_of
from shoal.errors import ERROR_CODE_PARAMETER, RETRY_AFTER_PARAMETER, Code, InvalidArgument, from_status
from shoal.inference.v2 import inference_pb2 as oip

INFER_S = 60.0
"""Timeout of one inference: long enough for a large model on a CPU."""

STREAM_S = 3_600.0
"""Timeout of an inference stream, which normally ends with its requests; the limit ends a forgotten stream."""

SPANS_S = 10.0
"""Timeout of `spans`: coord waits 5 s for a process that does not answer."""
STATUS_S = 5.0
"""Timeout of `status`: the services respond from memory, so a slower response is itself a problem to report."""


class AsyncClient:
    """Async client of the node at `address`: `https://host:port`, or `host:port` in plaintext.

    Without an address: $SHOAL_GATEWAY, else the node that runs on this machine.

    `ca` is a PEM file of the authorities to trust: else the CA of this machine's node, else $SHOAL_CA, else those that
    the machine trusts. `cert` and `key` are the client's own certificate. `token`, else $SHOAL_TOKEN, else the key of
    this user's node (`shoal up --auth`), is sent with each call; in plaintext to another machine only with
    `plaintext_token`.

    Use `async with`, or close the client with `await client.close()`. Many tasks may share a client; each event loop,
    and each forked child, has its own connection.

    Every call has one deadline for everything that it does (`timeout`, in seconds; None: none), is retried where that
    is safe (see RetryPolicy), and raises a class of `shoal.errors`: Unavailable when no node responds, NotFound ...

    Every call names `tenant`, whose share of the models it counts for, and carries `headers`.

    The constructor raises:
        InvalidArgument: `address` is not an address, a file cannot be used, or the token would be sent in plaintext.
        NotFound, FailedPrecondition: no address was set, and no node or several nodes run on this machine.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        retry: RetryPolicy | None = None,
        headers: Headers | None = None,
        tenant: str = "",
        ca: PathLike | None = None,
        cert: PathLike | None = None,
        key: PathLike | None = None,
        token: str | None = None,
        plaintext_token: bool = False,
    ) -> None:
        if not isinstance(address, str | None):
            raise InvalidArgument(f"address: expected HOST:PORT or https://HOST:PORT, got {address!r}")
        gateway = find_gateway(address, os.environ)
        secured = _security(gateway, ca, cert, key)
        self._caller = Caller(
            gateway.address,
            retry=retry,
            headers=headers,
            tenant=tenant,
            token=_token(gateway) if token is None else token,
            plaintext_token=plaintext_token,
            security=secured,
            is_near=gateway.is_here,
        )
        self._encoder = RequestEncoder(self._caller)
        self.models = AsyncModels(self._caller)
        self.jobs = AsyncJobs(self._caller, tenant)
        self.batches = AsyncBatches(self._caller, tenant)
        self.results = AsyncResults(self._caller, tenant)
        self.store = AsyncStore(self._caller)
        self.tenants = AsyncTenants(self._caller)
        self.instances = AsyncInstances(self._caller)
        self.access = AsyncAccess(self._caller)
        self.audit = AsyncAudit(self._caller)

    @property
    def address(self) -> str:
        """Address of the gateway that the client calls; with `https://`, where it has TLS."""
        return self._caller.url

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections and cancel the calls in flight."""
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
        retries: int | None = None,
        timeout: float | None = INFER_S,
    ) -> InferResult:
        """Run one inference and return its result.

        `inputs` are arrays by input name; an array's dtype is the datatype sent. Lists and scalars take the datatype of
        the model's metadata, which costs one more call now and then; `datatypes={"x": "FP32"}` avoids it. `outputs`
        selects outputs. With `parameters={"explain": True}` the result's parameters name the replica and the size of
        the batch.

        `retries` is how often this client repeats the request after UNAVAILABLE or RESOURCE_EXHAUSTED; None follows the
        client's policy. Set 0 for a model that acts on the world, since a failed request may have run; the header
        `x-shoal-no-retry` forbids the node to repeat it. A step of a sequence is never repeated.

        Raises:
            InvalidArgument: the message names the input or argument, the expected value and the received one.
            NotFound: no such model or version.
            ResourceExhausted: the model's queue is full.
            DeadlineExceeded: no response within `timeout` seconds; a request that has not started by then never runs.
            Unavailable: no node responds.
        """
        begun = self._caller.clock()
        request = InferRequest(model, inputs, outputs, version, parameters, request_id, datatypes or {})
        deadline = self._caller.deadline(timeout)
        first, signature = await self._encoder.encode_signed(request, deadline)
        # A step of a sequence changes the model's state, so a retry would run the step twice.
        repeatable = "sequence_id" not in first.parameters

        async def send(message: oip.ModelInferRequest) -> InferResult:
            response = await self._caller.call(
                methods.MODEL_INFER,
                message,
                timeout_s=deadline,
                headers=headers,
                doing=f"infer with {model}",
                idempotent=repeatable,
                retries=retries,
            )
            return of_response(response)

        try:
            return await send(first)
        except InvalidArgument:
            if is_fresh(signature, begun):
                raise
            newer = await self._encoder.newer(request, signature, deadline)
            if newer is None or retries == 0 or not repeatable:
                raise
        return await send(encoded(request, newer))

    async def infer_stream(
        self,
        requests: AsyncIterable[InferRequest] | Iterable[InferRequest],
        *,
        headers: Headers | None = None,
        timeout: float | None = STREAM_S,
    ) -> AsyncGenerator[InferResult, None]:
        """Run inferences over one stream and yield the results in the order of arrival; match them by `request_id`.

        A failed request yields an InferResult whose `error` is the reason, and the stream continues. The error has the
        class that `infer` would raise; a ShoalError of other servers, which do not send the code. A broken stream is
        not reopened: only the caller knows which steps of a sequence, or which responses, are missing.

        Raises:
            Unavailable: the stream broke.
            InvalidArgument: a request cannot be encoded.
        """
        failed: list[Exception] = []
        deadline = self._caller.deadline(timeout)
        messages = self._messages(requests, deadline, failed)
        with self._caller.bidi(methods.MODEL_STREAM_INFER, messages, timeout_s=deadline, headers=headers) as call:
            async for response in call:
                result = _of_stream(response)
                if isinstance(result.error, InvalidArgument):
                    self._encoder.forget(result.model_name)
                yield result
        if failed:
            raise failed[0]

    async def _messages(
        self,
        requests: AsyncIterable[InferRequest] | Iterable[InferRequest],
        deadline: Deadline,
        failed: list[Exception],
    ) -> AsyncIterator[oip.ModelInferRequest]:
        """Yield the messages. An error of `requests` ends the stream and goes to `failed`: grpc would swallow it."""
        try:
            async for request in as_async(requests):
                yield await self._encoder.encode(request, deadline)
        except Exception as err:
            failed.append(err)

    async def live(self, *, timeout: float | None = STATUS_S) -> bool:
        """Return True when the inference server runs.

        Raises:
            Unavailable: no node responds.
        """
        return (await self._caller.call(methods.SERVER_LIVE, oip.ServerLiveRequest(), timeout_s=timeout)).live

    async def ready(self, *, timeout: float | None = STATUS_S) -> bool:
        """Return True when the inference server is ready: each model that can be loaded is ready on an instance.

        Raises:
            Unavailable: no node responds.
        """
        return (await self._caller.call(methods.SERVER_READY, oip.ServerReadyRequest(), timeout_s=timeout)).ready

    async def status(self, *, timeout: float | None = STATUS_S) -> Status:
        """Return an overview of the node: instances, leader, models, and the state of each Envoy's configuration.

        Raises:
            Unavailable: no node responds.
        """
        return await fetch_status(self._caller, timeout)

    async def spans(self, trace: str = "", *, job: str = "", timeout: float | None = SPANS_S) -> Spans:
        """Return the spans that the node's processes keep of a trace or of a job, as `shoal trace` shows them.

        Without both: the latest of calls that failed or were slow. Callers who may not operate the node get those of
        their tenant's calls.

        Args:
            trace: its id, or the first 8 digits or more.

        Raises:
            InvalidArgument: the id is not one.
        """
        return await fetch_spans(self._caller, trace, job, timeout)

    async def history(
        self, by: By = "model", *, seconds: float = 0, points: int = 0, timeout: float | None = STATUS_S
    ) -> History:
        """Return rates, latencies and queues of the last hour at most, as the leading coord keeps them in memory.

        Args:
            by: model, tenant or instance.
            seconds: time before now; 0: all that there is.
            points: most points of a series, 720 at most; 0: 60.

        Raises:
            Unavailable: no coord leads at present. PermissionDenied: the caller may not operate the cluster.
        """
        return await fetch_history(self._caller, by, seconds, points, timeout)


def _of_stream(response: oip.ModelStreamInferResponse) -> InferResult:
    if not response.error_message:
        return of_response(response.infer_response)
    about = response.infer_response
    found = of_parameters(about.parameters)
    # Servers other than Shoal send neither.
    code, after = (found.get(name) for name in (ERROR_CODE_PARAMETER, RETRY_AFTER_PARAMETER))
    error = from_status(
        code if isinstance(code, int) else Code.UNKNOWN,
        response.error_message,
        retry_after_ms=after if isinstance(after, int) else None,
    )
    return InferResult(about.model_name, about.model_version, id=about.id, error=error)


def _token(gateway: Gateway) -> str:
    """Return the token of the environment, else the key that a node of this user has made for it; empty: none."""
    return os.environ.get(TOKEN_VARIABLE, "") or key_of(gateway, os.environ)


def _security(gateway: Gateway, ca: PathLike | None, cert: PathLike | None, key: PathLike | None) -> Security | None:
    if not gateway.has_tls:
        if ca is not None or cert is not None or key is not None:
            raise InvalidArgument(f"ca, cert and key are for https: call https://{gateway.address}")
        return None
    ca = ca if ca is not None else gateway.ca or os.environ.get(CA_VARIABLE)
    return security(ca=ca, cert=cert, key=key, name=gateway.name)
