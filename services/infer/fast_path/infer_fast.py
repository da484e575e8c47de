"""ModelInfer on the fast path: from the bytes of a request to the bytes of its answer, with no task and little else.

body ──template?──> call ──scheduler──> outputs ──> answer
       └── none yet, or not so simple: parsed, answered by the core, and learnt from
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

from google.protobuf.message import DecodeError

from mesh.rpc.framing import PREFIX_BYTES
from mesh.rpc.interceptors import malformed
from services.infer.core import InferenceServer
from services.infer.fast_path import template
from services.infer.fast_path.template import ID, NAME, VERSION, ModelTemplates, Template
from services.infer.models.models import Models
from services.infer.models.version import Version
from services.infer.requests import request
from services.infer.requests.outcome import InferenceResult
from services.infer.requests.tensors import Tensor
from services.infer.scheduling.crash_guard import ATTEMPT
from shoal.inference.v2 import inference_pb2 as pb

log = logging.getLogger(__name__)

TENANT = "x-shoal-tenant"
"""The header that says whose request it is, as far as the caller says."""
_TENANT, _ATTEMPT = TENANT.encode(), ATTEMPT.encode()

_MOST_NAMED = 1024
# Names and versions as clients write them: hostile ones are never learnt, since they name no model.


class Exchange(Protocol):
    """Who asked: the exchange of a call, or an entry of a bulk (`bulk.Entry`)."""

    deadline: float
    """On the clock of the core; infinite when there is none."""
    on_end: Callable[[], None] | None
    """Called when nobody waits for the answer any more."""
    is_over: bool

    @property
    def headers(self) -> Mapping[bytes, bytes]: ...

    def reply(self, parts: Sequence[Any], size: int) -> None:
        """Ends it with a message: `parts` are bytes-like, `size` bytes together."""

    def refuse(self, error: BaseException) -> None:
        """Ends it with an error."""

    def age_ns(self) -> int:
        """How long ago it came."""


class FastInfer:
    """A mesh.rpc.fast_call.FastHandler for ModelInfer; also what a bulk does with each of its entries."""

    def __init__(self, server: InferenceServer, models: Models) -> None:
        self._server = server
        self._models = models
        self._named: dict[bytes, ModelTemplates] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __call__(self, body: bytes, exchange: Exchange) -> None:
        is_retry = exchange.headers.get(_ATTEMPT, b"1") != b"1"
        if is_retry or not self._quick(body, exchange):
            task = asyncio.create_task(self._long(body, exchange, is_retry))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            exchange.on_end = task.cancel  # type: ignore[assignment]

    def _quick(self, body: bytes, exchange: Exchange) -> bool:
        """Whether there is a template: then the call is on its way. Raises what the core would."""
        try:
            at = PREFIX_BYTES + 2 + body[PREFIX_BYTES + 1]
            if body[at] == VERSION:
                at += 2 + body[at + 1]
            named = self._named.get(body[PREFIX_BYTES:at])
            if named is None or body[PREFIX_BYTES] != NAME:
                return False
            id_at = at
            if body[at] == ID:
                at += 2 + body[at + 1]
                if body[id_at + 1] > 127:
                    return False
            id_field = body[id_at:at]
        except IndexError:
            return False
        templates = named.templates
        for length in named.lengths:
            found = templates.get(body[at : at + length])
            if found is not None:
                call = found.call(body, at + length)
                break
        else:
            return False
        if call is None or not id_field.isascii():
            return False
        version = self._models.find(named.name, named.number)
        if version is not named.version:
            return False
        _Flight(exchange, version, named.prefix, found, id_field).start(call)
        return True

    async def _long(self, body: bytes, exchange: Exchange, is_retry: bool) -> None:
        try:
            asked = _parsed(body)
            tenant = exchange.headers.get(_TENANT, b"").decode("latin-1")
            response = await self._server.infer(asked, exchange.deadline, tenant, is_retry=is_retry)
            data = response.SerializeToString()
            exchange.reply((data,), len(data))
            self._learn(body, asked)
        except asyncio.CancelledError:
            if not exchange.is_over:  # Not the caller's end, but ours.
                raise
        except BaseException as err:
            exchange.refuse(err)

    def _learn(self, body: bytes, asked: pb.ModelInferRequest) -> None:
        version = self._models.find(asked.model_name, asked.model_version)
        if not version.takes_numbers_only:
            return
        learnt = template.learn(body, asked, version.loaded.model.signature)
        if learnt is None:
            return
        before, head, found = learnt
        named = self._named.get(before)
        if named is None or named.version is not version:
            if len(self._named) >= _MOST_NAMED:
                self._named.clear()
            named = self._named[before] = template.model_templates(version, asked)
        named.add(head, found)


class _Flight:
    """One call on its way through the scheduler."""

    __slots__ = ("_exchange", "_id", "_pending", "_prefix", "_template", "_version")

    def __init__(self, exchange: Exchange, version: Version, prefix: bytes, found: Template, id_field: bytes) -> None:
        self._exchange = exchange
        self._version = version
        self._prefix = prefix
        self._template = found
        self._id = id_field

    def start(self, call: request.InferenceRequest) -> None:
        exchange, version = self._exchange, self._version
        tenant = exchange.headers.get(_TENANT)
        name = tenant.decode("latin-1") if tenant else ""
        version.__enter__()
        try:
            self._pending = version.scheduler.start(call, exchange.deadline, name, self)
        except BaseException:
            version.__exit__(None, None, None)
            version.statistics.failed(exchange.age_ns())
            raise
        exchange.on_end = self._abandon

    def _abandon(self) -> None:
        self._version.scheduler.abandon(self._pending)
        self._version.__exit__(None, None, None)

    def answered(self, answer: InferenceResult) -> None:
        """Called by the scheduler."""
        self._version.__exit__(None, None, None)
        outputs = cast("Sequence[Tensor]", answer.outputs)  # None of them is ragged: else it is not learnt.
        opening = self._template.opening(self._prefix, outputs)
        parts: list[Any] = [self._prefix, self._id, opening.outputs]
        for raw, output in zip(opening.raw, outputs, strict=True):
            parts.append(raw)
            parts.append(output if output.flags.c_contiguous else output.tobytes())
        self._exchange.reply(parts, opening.size + len(self._id))

    def failed(self, error: BaseException) -> None:
        """Called by the scheduler."""
        exchange, version = self._exchange, self._version
        version.__exit__(None, None, None)
        version.statistics.failed(exchange.age_ns())
        exchange.refuse(error)


def _parsed(body: bytes) -> pb.ModelInferRequest:
    try:
        return pb.ModelInferRequest.FromString(body[PREFIX_BYTES:])
    except DecodeError as err:
        raise malformed(len(body) - PREFIX_BYTES, err) from err
