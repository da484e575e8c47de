"""The Open Inference Protocol v2 without a transport: parsed messages in, response messages out, shoal.errors raised.

Each method of `InferenceServer` is one method of the protocol. `fast_path` (for unary ModelInfer) and `rpc` (for the
others) pass messages and deadlines, and translate errors.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractContextManager, aclosing, nullcontext
from dataclasses import replace
from typing import Any

from mesh.rpc.call_context import RequestMemory
from mesh.rpc.heavy_work import HeavyWork, Steps
from mesh.rpc.held_shares import CallLimits
from mesh.rpc.interceptors import sampled_span
from services.infer import decoupled_responses
from services.infer.ensembles.loading import Composed
from services.infer.ensembles.other_models import StepVersion
from services.infer.error_text import quoted
from services.infer.models.control import Control
from services.infer.models.models import Models, version_number
from services.infer.models.version import State, Version
from services.infer.offload import in_turns
from services.infer.requests import parameters
from services.infer.requests.outcome import InferenceResult
from services.infer.requests.request import (
    InferenceRequest,
    asked_rows,
    check_counts,
    held_bytes,
    is_long_read,
    read,
    read_bytes,
    read_steps,
)
from services.infer.requests.request_memory import UNCOUNTED
from services.infer.requests.response import explain, is_large_write, write_response_async
from services.infer.response_cache.cache import CacheState
from services.infer.runtimes.runtime import Session
from services.infer.scheduling.crash_guard import CrashGuard
from services.infer.scheduling.submit import Waiter, outcome_of
from services.infer.sequences.arrival_order import ArrivalOrder
from shoal import __version__
from shoal.errors import InvalidArgument, ShoalError, Unimplemented
from shoal.inference.v2 import inference_pb2 as pb

EXTENSIONS = ("classification", "model_configuration", "schedule_policy", "statistics")
"""Protocol extensions that the server supports, under the names that clients look for."""

CONTROL_EXTENSIONS = ("model_repository", "model_repository(unload_dependents)")


def _everything(model: str) -> bool:
    return True


class InferenceServer:
    """Inference over the models of one instance; `replica` is its name, `<node>/<instance>`."""

    def __init__(
        self,
        models: Models,
        replica: str,
        clock: Callable[[], float] = time.monotonic,
        control: Control | None = None,
        crash_guard: CrashGuard | None = None,
        heavy: HeavyWork | None = None,
    ) -> None:
        """Serve `models`.

        Args:
            clock: seconds; deadlines are on this clock.
            control: loads and unloads models on request; without it, such requests are rejected.
            crash_guard: rejects retries of a poison request.
            heavy: the process's turns for heavy work, if others use them, too.
        """
        self.models = models
        """The served models, also for the fast path."""
        self._control = control
        self._crash_guard = crash_guard
        self.heavy = HeavyWork() if heavy is None else heavy
        """Turns for requests and responses that would hold the event loop."""
        self._replica = replica
        self._clock = clock

    @property
    def replica(self) -> str:
        """Name of the instance, `<node>/<instance>`."""
        return self._replica

    def live(self) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    def ready(self) -> pb.ServerReadyResponse:
        """Return ready when every desired model has a ready version and no failed one."""
        return pb.ServerReadyResponse(ready=self.models.is_ready())

    def metadata(self) -> pb.ServerMetadataResponse:
        extensions = EXTENSIONS if self._control is None else (*EXTENSIONS, *CONTROL_EXTENSIONS)
        return pb.ServerMetadataResponse(name="shoal", version=__version__, extensions=extensions)

    def model_ready(self, request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        """Return True when the version is ready; False also for an unknown model.

        Raises:
            InvalidArgument: the version is not a number.
        """
        number = version_number(request.version)
        ready = [version.number for version in self.models.versions(request.name)]
        return pb.ModelReadyResponse(ready=bool(ready) if number is None else number in ready)

    def model_metadata(self, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        """Return the model's inputs and outputs. Raises InvalidArgument, NotFound or Unavailable, as `Models.find`."""
        version = self.models.find(request.name, request.version)
        signature, config = version.loaded.model.signature, version.loaded.model.config
        tensor = pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name=version.name,
            versions=[str(other.number) for other in self.models.versions(request.name)],
            platform=config.platform,
            inputs=[tensor(name=s.name, datatype=s.datatype.name, shape=s.shape) for s in signature.inputs],
            outputs=[tensor(name=s.name, datatype=s.datatype.name, shape=s.shape) for s in signature.outputs],
        )

    def model_config(self, request: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
        """Return the completed configuration. Raises as `model_metadata` does."""
        return pb.ModelConfigResponse(config=self.models.find(request.name, request.version).loaded.model.config)

    def model_statistics(
        self, request: pb.ModelStatisticsRequest, may_see: Callable[[str], bool] = _everything
    ) -> Steps[pb.ModelStatisticsResponse]:
        """Return the statistics of every requested ready version; without a name, of the models that `may_see` allows.

        A model takes a step: those of hundreds would hold the event loop for tens of milliseconds.

        Raises:
            InvalidArgument: no such version is ready, or the version is not a number.
        """
        number = version_number(request.version)
        response = pb.ModelStatisticsResponse()
        for name in [request.name] if request.name else self.models.names():
            if request.name or may_see(name):
                for version in self.models.versions(name):
                    if number in (None, version.number):
                        response.model_stats.append((yield from version.statistics.message(name, version.number)))
            yield
        if request.name and not response.model_stats:
            which = quoted(request.name) + (f" version {number}" if number is not None else "")
            raise InvalidArgument(f"requested model {which} is not available")
        return response

    def index(
        self, request: pb.RepositoryIndexRequest, may_see: Callable[[str], bool] = _everything
    ) -> Steps[pb.RepositoryIndexResponse]:
        """Return the state of every version of every model that `may_see` allows; a model takes a step.

        Raises:
            Unimplemented: the request names a repository.
        """
        _only_repository(request.repository_name)
        response = pb.RepositoryIndexResponse()
        for rows in self.models.rows():
            for row in rows:
                if (row.state is State.READY or not request.ready) and may_see(row.name):
                    response.models.add(
                        name=row.name,
                        version="" if row.version is None else str(row.version),
                        state=row.state,
                        reason=row.reason,
                    )
            yield
        return response

    async def load_model(self, request: pb.RepositoryModelLoadRequest) -> pb.RepositoryModelLoadResponse:
        """Load or reload a model; return once it serves. Raises as `Control.load` does, and Unimplemented."""
        control = self._controlled()
        _only_repository(request.repository_name)
        await control.load(request)
        return pb.RepositoryModelLoadResponse()

    async def unload_model(
        self, request: pb.RepositoryModelUnloadRequest, check: Callable[[str], None] = lambda model: None
    ) -> pb.RepositoryModelUnloadResponse:
        """Stop serving a model until it is loaded again. `check` is as for `Control.unload`.

        Raises as `Control.unload` does, and Unimplemented.
        """
        control = self._controlled()
        _only_repository(request.repository_name)
        await control.unload(request, check)
        return pb.RepositoryModelUnloadResponse()

    def _controlled(self) -> Control:
        if self._control is None:
            raise Unimplemented(
                "models are not loaded or unloaded on request where several processes share a port: "
                "use one (--workers 1) with --model-control explicit, or let all of them follow the folder "
                "(--model-control poll)"
            )
        self._control.check_allowed()
        return self._control

    def sessions(self, name: str, version: str) -> list[Session]:
        """Return the sessions that every request to a model needs; empty for an unknown model."""
        try:
            return list(_sessions(self.models.find(name, version)))
        except ShoalError:
            return []

    async def infer(
        self,
        message: pb.ModelInferRequest,
        deadline: float = math.inf,
        tenant: str = "",
        *,
        is_retry: bool = False,
        inner_call: object = None,
        memory: RequestMemory = UNCOUNTED,
        message_bytes: int = 0,
        raw: list[Any] | None = None,
        limits: CallLimits | None = None,
    ) -> pb.ModelInferResponse:
        """Run one inference and return its response.

        Args:
            message: the request as the protocol has it.
            deadline: on this server's clock; the request never starts at or after the deadline.
            tenant: the caller's tenant, for its fair share of a busy model.
            is_retry: the mesh has sent the request to another instance before.
            inner_call: the call of a model that the request belongs to; None for a client's request.
            memory: memory of the request's call, which counts the message already.
            message_bytes: size of the message.
            raw: receives the raw contents of a large response of numbers, in place of the message; None: the message
                has all.
            limits: the shares of the policy's limits in which the request counts; None: in none.

        Raises:
            InvalidArgument: the request does not fit the model; the error names the tensor or parameter.
            NotFound, Unavailable: the model or version does not exist; or is not ready.
            ResourceExhausted: the queue or the memory is full. LimitReached: a limit of the policy is.
            DeadlineExceeded: the request could not be started in time.
            Internal: the model cannot process the request. Unimplemented: the request uses shared memory.
        """
        with (
            self.models.use(message.model_name, message.model_version) as version,
            _counted(limits, message, message_bytes, version),
        ):
            start = self._clock()
            try:
                check_counts(message)
                tensor_bytes = read_bytes(message, message_bytes)
                memory.hold(tensor_bytes)
                request, result, cache = await self._execute(
                    message, version, deadline, tenant, is_retry, inner_call, memory
                )
            except (Exception, asyncio.CancelledError):
                version.statistics.failed(int((self._clock() - start) * 1e9))
                raise
            # The inputs are not needed any more. The outputs are copied into the response.
            request.inputs = {}
            memory.release(tensor_bytes)
            outside = raw if raw is not None and is_large_write(result, request) else None
            memory.hold_response((2 if outside is None else 1) * held_bytes(result.outputs))
            began = time.perf_counter_ns()
            response = await write_response_async(
                result,
                request,
                self.heavy,
                tenant,
                model=version.name,
                version=version.number,
                id=message.id,
                batched=version.loaded.model.signature.max_batch_size > 0,
                raw=outside,
            )
            version.statistics.wrote(time.perf_counter_ns() - began, request.trace)
            if request.parameters.explain:
                explain(response, result, self._replica, cache)
            return response

    async def _execute(
        self,
        message: pb.ModelInferRequest,
        version: Version,
        deadline: float,
        tenant: str,
        is_retry: bool,
        inner_call: object,
        memory: RequestMemory,
    ) -> tuple[InferenceRequest, InferenceResult, CacheState]:
        if version.arrival_order is not None:
            request, result = await self._step(
                message, version, version.arrival_order, deadline, tenant, is_retry, inner_call
            )
            return request, result, CacheState.OFF
        request = await self._read(message, version, tenant, is_retry, inner_call)
        request.memory = memory
        if version.response_cache is None:
            return request, await version.scheduler.submit(request, deadline, tenant), CacheState.OFF
        result, cache = await version.response_cache.result(request, message.parameters, deadline, tenant)
        return request, result, cache

    async def _read(
        self, message: pb.ModelInferRequest, version: Version, tenant: str, is_retry: bool, inner_call: object
    ) -> InferenceRequest:
        request = await self._read_in_turns(message, version, tenant)
        if tenant and inner_call is None:
            self.models.tenants.add(tenant, request.rows)
        if inner_call is not None:
            request = replace(request, parameters=replace(request.parameters, inner_call=inner_call))
        if is_retry and self._crash_guard is not None:
            request = replace(await self._crash_guard.checked(version.name, request), check=self._crash_guard.checked)
        return request

    async def _read_in_turns(self, message: pb.ModelInferRequest, version: Version, tenant: str) -> InferenceRequest:
        steps = read_steps(message, version.loaded.model.signature)
        request = await in_turns(self.heavy, tenant, steps, is_long=is_long_read(message))
        request.trace = sampled_span()
        return request

    async def _step(
        self,
        message: pb.ModelInferRequest,
        version: Version,
        order: ArrivalOrder,
        deadline: float,
        tenant: str,
        is_retry: bool,
        inner_call: object,
    ) -> tuple[InferenceRequest, InferenceResult]:
        """Run one step of a sequence; steps start in the order of their arrival, even when one takes longer to read."""
        # Sequences of calling models belong to no tenant (`sequence_table.py`).
        id = "" if inner_call is not None else tenant, parameters.sequence_id(message.parameters)
        scheduler = version.scheduler
        if order.is_free(id) and not is_retry and inner_call is None and not is_long_read(message):
            request = read(message, version.loaded.model.signature)
            request.trace = sampled_span()
            if tenant:
                self.models.tenants.add(tenant, request.rows)
            return request, await scheduler.submit(request, deadline, tenant)
        async with order.in_order(id):
            request = await self._read(message, version, tenant, is_retry, inner_call)
            waiter = Waiter(asyncio.get_running_loop().create_future())
            ticket = scheduler.start(request, deadline, tenant, waiter)
        return request, await outcome_of(scheduler, ticket, waiter)

    def is_decoupled(self, message: pb.ModelInferRequest) -> bool:
        """Return True when the model is decoupled: a request has any number of responses. Raises as `Models.find`."""
        return self.models.find(message.model_name, message.model_version).decoupled is not None

    async def responses(
        self,
        message: pb.ModelInferRequest,
        deadline: float = math.inf,
        tenant: str = "",
        memory: RequestMemory = UNCOUNTED,
        message_bytes: int = 0,
        limits: CallLimits | None = None,
        raw: list[Any] | None = None,
    ) -> AsyncGenerator[pb.ModelInferResponse | ShoalError, None]:
        """Yield the responses of a decoupled model and the model's own errors. Raises other errors as `infer` does.

        Before a response of numbers is yielded, `raw`, if given, receives its raw contents in place of the message.
        """
        with (
            self.models.use(message.model_name, message.model_version) as version,
            _counted(limits, message, message_bytes, version),
        ):
            start = self._clock()
            try:
                check_counts(message)
                memory.hold(read_bytes(message, message_bytes))
                request = await self._read_in_turns(message, version, tenant)
                if tenant:
                    self.models.tenants.add(tenant, request.rows)
                request.memory = memory
                async with aclosing(
                    decoupled_responses.responses(version, request, message, self.heavy, deadline, tenant, raw)
                ) as responses:
                    async for response in responses:
                        yield response
            except (Exception, asyncio.CancelledError, GeneratorExit):
                version.statistics.failed(int((self._clock() - start) * 1e9))
                raise


def _counted(
    limits: CallLimits | None, message: pb.ModelInferRequest, message_bytes: int, version: Version
) -> AbstractContextManager[None]:
    """Return a block that counts a request in the limits of its caller."""
    if limits is None:
        return nullcontext()
    return limits.reserved(message_bytes, asked_rows(message, version.loaded.model.signature))


def _sessions(version: StepVersion) -> Iterator[Session]:
    loaded = version.loaded
    if loaded.session is not None:
        yield loaded.session
    elif isinstance(loaded, Composed):
        for planned in loaded.plan.steps:
            # The other steps may have nothing to do.
            if not planned.step.when and not planned.step.each:
                yield from _sessions(planned.version)


def _only_repository(name: str) -> None:
    if name:
        raise Unimplemented(f"'repository_name' is not supported: there is one, without a name; got {quoted(name)}")
