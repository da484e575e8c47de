"""ModelInfer on the fast path: from the bytes of a message to the bytes of its response, without a task.

body ──template?──> request ──scheduler──> outputs ──> response
       └── no template matches: slow path (parsed, executed by the core); a template is learnt from it
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast

import numpy as np
from opentelemetry.trace import SpanContext

from mesh.rpc.access import Access
from mesh.rpc.call_context import RequestMemory
from mesh.rpc.fast_call import UNJOINED_BYTES
from mesh.rpc.framing import PREFIX_BYTES
from mesh.rpc.held_shares import CallLimits, Reservation
from mesh.rpc.parsing import parse_in_turn
from mesh.rpc.tail_spans import COMPUTE_MS, MODEL, MODEL_VERSION, NO_ATTRIBUTES, QUEUE_MS, Attributes
from services.infer.core import InferenceServer
from services.infer.fast_path import template
from services.infer.fast_path.large_request import PARSER, shared_bytes
from services.infer.fast_path.template import ID, NAME, VERSION, ModelTemplates, Template
from services.infer.models.models import Models
from services.infer.models.version import Version
from services.infer.requests.outcome import InferenceResult
from services.infer.requests.request import InferenceRequest
from services.infer.requests.response import kept, with_raw
from services.infer.requests.tensors import Tensor
from services.infer.scheduling.crash_guard import ATTEMPT
from shoal.access.caller_header import CALLER_HEADER, JOB_CALLER_HEADER, JOB_RETRY_HEADER
from shoal.errors import Unavailable
from shoal.inference.v2 import inference_pb2 as pb
from shoal.tenant_header import TENANT_HEADER

log = logging.getLogger(__name__)

# Without a sampled span, a task keeps the context of its call: none.
_NO_SPAN = nullcontext()

_TENANT, _ATTEMPT = TENANT_HEADER.encode(), ATTEMPT.encode()
_CALLER, _JOB_CALLER = CALLER_HEADER.encode(), JOB_CALLER_HEADER.encode()
_JOB_RETRY = JOB_RETRY_HEADER.encode()

# Names and versions as clients write them. Invented ones are never learnt, since no model has them.
_MAX_NAMES = 1024

# Heads that are learnt before all templates are dropped: callers may invent parameters and shapes.
_MAX_LEARNT_BYTES = 32 << 20


class SampledSpan(Protocol):
    """Span of a call in a sampled trace."""

    @property
    def context(self) -> SpanContext: ...

    def current(self) -> AbstractContextManager[object]:
        """Return a block in which the span is the current one."""


class Pending(RequestMemory, Protocol):
    """A caller that waits for the outcome of one request."""

    @property
    def span(self) -> SampledSpan | None: ...

    deadline: float
    """On the clock of the core; infinite when there is none."""
    on_end: Callable[[], None] | None
    """Called when the caller has left."""
    is_over: bool

    def refuse(self, error: BaseException, seconds: float = 0.0, about: Attributes = NO_ATTRIBUTES) -> None:
        """End the request with an error; `seconds`, its time, and `about` are for its span."""


class Exchange(Pending, Protocol):
    """Exchange with the caller of one request: that of a gRPC call, or an entry of a bulk (`bulk.Entry`)."""

    is_task: bool
    """True when a task replies."""

    @property
    def headers(self) -> Mapping[bytes, bytes]: ...

    def reply(self, parts: Sequence[Any], size: int) -> None:
        """End the exchange with a message: `parts` are bytes-like, `size` bytes together."""

    def reply_slow(self, parts: Sequence[Any], size: int, seconds: float, about: Attributes) -> None:
        """End the exchange as `reply` does, and keep its span: it took `seconds`, longer than its model may."""


class FastInfer:
    """Handler of ModelInfer on the fast path (a mesh.rpc.fast_call.FastHandler), also of each entry of a bulk."""

    def __init__(self, server: InferenceServer, models: Models, access: Access | None = None) -> None:
        """Serve `models` of `server`; `access` decides about each request by its caller and its model."""
        self._access = access
        self._server = server
        self._models = models
        self._by_name: dict[bytes, ModelTemplates] = {}
        self._learnt_bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def __call__(self, body: bytes, exchange: Exchange) -> None:
        is_retry = exchange.headers.get(_ATTEMPT, b"1") != b"1" or _JOB_RETRY in exchange.headers
        if is_retry or not self._try_fast(body, exchange):
            with exchange.span.current() if exchange.span is not None else _NO_SPAN:
                task = asyncio.create_task(self._run_slow(body, exchange, is_retry))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            exchange.on_end = task.cancel  # type: ignore[assignment]
            exchange.is_task = True

    def _try_fast(self, body: bytes, exchange: Exchange) -> bool:
        """Start the request and return True when a template matches. Raises as `InferenceServer.infer` does."""
        try:
            at = PREFIX_BYTES + 2 + body[PREFIX_BYTES + 1]
            if body[at] == VERSION:
                at += 2 + body[at + 1]
            model_templates = self._by_name.get(body[PREFIX_BYTES:at])
            if model_templates is None or body[PREFIX_BYTES] != NAME:
                return False
            id_at = at
            if body[at] == ID:
                at += 2 + body[at + 1]
                if body[id_at + 1] > 127:
                    return False
            id_field = body[id_at:at]
        except IndexError:
            return False
        templates = model_templates.templates
        for length in model_templates.lengths:
            found = templates.get(body[at : at + length])
            if found is not None:
                request = found.request(body, at + length)
                break
        else:
            return False
        if request is None or not id_field.isascii():
            return False
        caller = limits = None
        if self._access is not None:
            caller = self._access.check_infer(exchange.headers, model_templates.name)
            if self._access.is_limited:
                limits = self._limits_of(exchange, model_templates.name)
        if caller is None:
            header = exchange.headers.get(_TENANT)
            tenant = header.decode("latin-1") if header else ""
        else:
            tenant = caller.tenant
        version = self._models.find(model_templates.name, model_templates.number)
        if version is not model_templates.version:
            return False
        if tenant:
            self._models.tenants.add(tenant, request.rows)
        starting = _FastRequest(exchange, version, model_templates.prefix, found, id_field)
        starting.start(request, tenant, limits, len(body) - PREFIX_BYTES)
        return True

    def _limits_of(self, exchange: Exchange, model: str) -> CallLimits | None:
        assert self._access is not None
        headers = exchange.headers
        return self._access.limits_of(headers.get(_CALLER), model, headers.get(_JOB_CALLER))

    async def _run_slow(self, body: bytes, exchange: Exchange, is_retry: bool) -> None:
        began = time.monotonic()
        try:
            # The message is a copy.
            exchange.hold(len(body))
            named = exchange.headers.get(_TENANT, b"")
            message = await parse_in_turn(self._server.heavy, named, PARSER, body, PREFIX_BYTES)
            if shared := shared_bytes(message):
                exchange.release(shared)
            caller = limits = None
            if self._access is not None:
                caller = self._access.check_infer(exchange.headers, message.model_name)
                limits = self._limits_of(exchange, message.model_name)
            tenant = named.decode("latin-1") if caller is None else caller.tenant
            slow_ns = self._models.find(message.model_name, message.model_version).slow_ns
            raw: list[Any] = []
            response = await self._server.infer(
                message,
                exchange.deadline,
                tenant,
                is_retry=is_retry,
                memory=exchange,
                message_bytes=len(body),
                raw=raw,
                limits=limits,
            )
            parts, size = with_raw(response.SerializeToString(), raw)
            seconds = time.monotonic() - began
            if seconds * 1e9 > slow_ns:
                about = {MODEL: response.model_name, MODEL_VERSION: response.model_version}
                exchange.reply_slow(parts, size, seconds, about)
            else:
                exchange.reply(parts, size)
            self._learn(body, message)
        except asyncio.CancelledError:
            # When the exchange is over, its caller has left. Else this process stops.
            if not exchange.is_over:
                exchange.refuse(Unavailable("this instance is stopping"))
                raise
        except BaseException as err:
            exchange.refuse(err, time.monotonic() - began)

    def _learn(self, body: bytes, message: pb.ModelInferRequest) -> None:
        version = self._models.find(message.model_name, message.model_version)
        if not version.needs_tensors_only:
            return
        learnt = template.learn(body, message, version.loaded.model.signature)
        if learnt is None:
            return
        name_bytes, head, found = learnt
        self._learnt_bytes += len(head)
        if self._learnt_bytes > _MAX_LEARNT_BYTES:
            self._by_name.clear()
            self._learnt_bytes = len(head)
        model_templates = self._by_name.get(name_bytes)
        if model_templates is None or model_templates.version is not version:
            if len(self._by_name) >= _MAX_NAMES:
                self._by_name.clear()
            model_templates = self._by_name[name_bytes] = template.model_templates(version, message)
        model_templates.add(head, found)


class FastRequest:
    """One request in the scheduler; its receiver. A subclass writes the response: `succeeded`."""

    __slots__ = ("_exchange", "_queued", "_reservation", "_version")

    # A response is written, and starts no other request: its delivery need not wait for the next iteration of the loop.
    is_direct = True
    writes = True

    _exchange: Pending
    _version: Version

    def start(
        self, request: InferenceRequest, tenant: str, limits: CallLimits | None = None, message_bytes: int = 0
    ) -> None:
        """Start the request, counted in `limits`. Raises LimitReached, and as the scheduler does."""
        exchange, version = self._exchange, self._version
        request.memory = exchange
        if exchange.span is not None:
            request.trace = exchange.span.context
        self._reservation: Reservation | None = None
        if limits is not None:
            self._reservation = limits.reserve(message_bytes, request.rows)
        version.__enter__()
        try:
            self._queued = version.scheduler.start(request, exchange.deadline, tenant, self)
        except BaseException as err:
            version.__exit__(None, None, None)
            version.statistics.failed(0)
            if self._reservation is not None:
                self._reservation.end(err)
            raise
        # A scheduler may deliver at once. Set after the end, the callback would keep the body in a reference cycle.
        if not exchange.is_over:
            exchange.on_end = self._abandon

    def _abandon(self) -> None:
        version, queued = self._version, self._queued
        if version.scheduler.abandon(queued):
            version.__exit__(None, None, None)
            if self._reservation is not None:
                self._reservation.end()
            # A result that was not delivered yet is counted as a success already.
            if not isinstance(queued.outcome, InferenceResult):
                version.statistics.failed(version.scheduler.age_ns(queued))

    def succeeded(self, result: InferenceResult) -> None:
        """Called by the scheduler. Ends the reservation."""
        raise NotImplementedError

    def failed(self, error: BaseException) -> None:
        """Called by the scheduler."""
        exchange, version = self._exchange, self._version
        version.__exit__(None, None, None)
        if self._reservation is not None:
            self._reservation.end(error)
        age_ns = version.scheduler.age_ns(self._queued)
        version.statistics.failed(age_ns)
        exchange.refuse(error, age_ns / 1e9, {MODEL: version.name, MODEL_VERSION: version.number})


def slow_request(version: Version, result: InferenceResult) -> tuple[float, Attributes]:
    """Return the seconds of a request that was slow, from its arrival to its outputs, and attributes for its span."""
    compute_ns = result.times.compute_ns
    about: Attributes = {
        MODEL: version.name,
        MODEL_VERSION: version.number,
        QUEUE_MS: round(result.queue_ns / 1e6, 1),
        COMPUTE_MS: round(compute_ns / 1e6, 1),
    }
    return (result.queue_ns + compute_ns) / 1e9, about


class _FastRequest(FastRequest):
    """A request in a message."""

    __slots__ = ("_id", "_prefix", "_template")

    _exchange: Exchange

    def __init__(self, exchange: Exchange, version: Version, prefix: bytes, found: Template, id_field: bytes) -> None:
        self._exchange = exchange
        self._version = version
        self._prefix = prefix
        self._template = found
        self._id = id_field

    def succeeded(self, result: InferenceResult) -> None:
        """Called by the scheduler."""
        self._version.__exit__(None, None, None)
        if self._reservation is not None:
            self._reservation.end()
        try:
            # A template has no ragged outputs.
            outputs = cast("Sequence[Tensor]", result.outputs)
            template = self._template.response_template(self._prefix, outputs)
            parts: list[Any] = [self._prefix, self._id, template.outputs]
            for raw, output in zip(template.raw, outputs, strict=True):
                parts.append(raw)
                parts.append(output if output.flags.c_contiguous else output.tobytes())
        # For example without memory for a copy: the caller needs an outcome.
        except Exception as err:
            self._exchange.refuse(err)
            return
        size = template.size + len(self._id)
        if size > UNJOINED_BYTES:
            parts = [kept(part) if isinstance(part, np.ndarray) else part for part in parts]
        if result.queue_ns + result.times.compute_ns > self._version.slow_ns:
            self._exchange.reply_slow(parts, size, *slow_request(self._version, result))
        else:
            self._exchange.reply(parts, size)
