"""The Open Inference Protocol v2, without a transport: parsed requests in, answers out, shoal.errors raised.

Each method is one of the protocol's. A front (`rpc` for grpc.aio) gives it requests and deadlines, and translates
errors.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from services.infer import decoupled_responses
from services.infer.error_text import quoted
from services.infer.models.control import Control
from services.infer.models.models import Models, version_number
from services.infer.models.version import State, Version
from services.infer.requests import parameters
from services.infer.requests import response as answer
from services.infer.requests.outcome import InferenceResult
from services.infer.requests.request import InferenceRequest, is_long_read, read, read_async
from services.infer.response_cache.cache import CacheState
from services.infer.scheduling.crash_guard import CrashGuard
from services.infer.scheduling.submit import Waiter
from services.infer.sequences.arrival_order import ArrivalOrder
from shoal import __version__
from shoal.errors import InvalidArgument, ShoalError, Unimplemented
from shoal.inference.v2 import inference_pb2 as pb

EXTENSIONS = ("classification", "model_configuration", "schedule_policy", "statistics")
"""What the server does beyond the protocol's core, under the names that clients look for."""

CONTROL_EXTENSIONS = ("model_repository", "model_repository(unload_dependents)")


class InferenceServer:
    """Answers for the models of one instance; `replica` is its name, `<node>/<instance>`."""

    def __init__(
        self,
        models: Models,
        replica: str,
        clock: Callable[[], float] = time.monotonic,
        control: Control | None = None,
        crash_guard: CrashGuard | None = None,
    ) -> None:
        """`clock` is the one that deadlines are on. Without `control`, models are not loaded or unloaded on request.

        With `crash_guard`, retries of a poison request are rejected.
        """
        self.models = models
        """For fronts that take a shorter way than `infer`."""
        self._control = control
        self._crash_guard = crash_guard
        self._replica = replica
        self._clock = clock

    @property
    def replica(self) -> str:
        """Its name, `<node>/<instance>`."""
        return self._replica

    def live(self) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    def ready(self) -> pb.ServerReadyResponse:
        """True when every model that should be served is: it has a ready version, and none that failed."""
        return pb.ServerReadyResponse(ready=self.models.is_ready())

    def metadata(self) -> pb.ServerMetadataResponse:
        extensions = EXTENSIONS if self._control is None else (*EXTENSIONS, *CONTROL_EXTENSIONS)
        return pb.ServerMetadataResponse(name="shoal", version=__version__, extensions=extensions)

    def model_ready(self, request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        """An unknown model is not ready, which is no error. Raises InvalidArgument when the version is no number."""
        number = version_number(request.version)
        ready = [version.number for version in self.models.versions(request.name)]
        return pb.ModelReadyResponse(ready=bool(ready) if number is None else number in ready)

    def model_metadata(self, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        """Raises InvalidArgument, NotFound or Unavailable, as `Models.find` does."""
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
        """The completed configuration. Raises as `model_metadata` does."""
        return pb.ModelConfigResponse(config=self.models.find(request.name, request.version).loaded.model.config)

    def model_statistics(self, request: pb.ModelStatisticsRequest) -> pb.ModelStatisticsResponse:
        """Of every ready version that is asked for. Raises InvalidArgument when there is none, or a bad version."""
        number = version_number(request.version)
        names = [request.name] if request.name else self.models.names()
        versions = [v for name in names for v in self.models.versions(name) if number in (None, v.number)]
        if request.name and not versions:
            which = quoted(request.name) + (f" version {number}" if number is not None else "")
            raise InvalidArgument(f"requested model {which} is not available")
        return pb.ModelStatisticsResponse(model_stats=[v.statistics.message(v.name, v.number) for v in versions])

    def index(self, request: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
        """Every version of every model. Raises Unimplemented when one of several repositories is asked for."""
        _only_repository(request.repository_name)
        rows = [row for row in self.models.index() if row.state is State.READY or not request.ready]
        index = pb.RepositoryIndexResponse.ModelIndex
        return pb.RepositoryIndexResponse(
            models=[
                index(
                    name=row.name,
                    version="" if row.version is None else str(row.version),
                    state=row.state,
                    reason=row.reason,
                )
                for row in rows
            ]
        )

    async def load_model(self, request: pb.RepositoryModelLoadRequest) -> pb.RepositoryModelLoadResponse:
        """Loads a model, or loads it again; returns when it serves. Raises what `Control.load` does, Unimplemented."""
        _only_repository(request.repository_name)
        await self._controlled().load(request)
        return pb.RepositoryModelLoadResponse()

    async def unload_model(self, request: pb.RepositoryModelUnloadRequest) -> pb.RepositoryModelUnloadResponse:
        """Serves a model no more until it is loaded again. Raises as `Control.unload` does, and Unimplemented."""
        _only_repository(request.repository_name)
        await self._controlled().unload(request)
        return pb.RepositoryModelUnloadResponse()

    def _controlled(self) -> Control:
        if self._control is None:
            raise Unimplemented(
                "models are not loaded or unloaded on request where several processes share a port: "
                "use one (--workers 1), or let all of them follow the folder (--model-control poll)"
            )
        return self._control

    async def infer(
        self, request: pb.ModelInferRequest, deadline: float = math.inf, tenant: str = "", *, is_retry: bool = False
    ) -> pb.ModelInferResponse:
        """One inference.

        Args:
            deadline: on this server's clock. What has not been started by then never is.
            tenant: who asks, for a fair share of a busy model.
            is_retry: the mesh sent it to another instance before.

        Raises:
            InvalidArgument: the request does not fit the model; the message names tensor or parameter.
            NotFound, Unavailable: there is no such model or version; it is not ready.
            ResourceExhausted: the queue is full. DeadlineExceeded: it could not be started in time.
            Internal: the model cannot process it. Unimplemented: it asks for shared memory.
        """
        with self.models.use(request.model_name, request.model_version) as version:
            start = self._clock()
            try:
                return await self._infer(request, version, deadline, tenant, is_retry)
            except (Exception, asyncio.CancelledError):
                version.statistics.failed(int((self._clock() - start) * 1e9))
                raise

    async def _infer(
        self, request: pb.ModelInferRequest, version: Version, deadline: float, tenant: str, is_retry: bool
    ) -> pb.ModelInferResponse:
        cache = CacheState.OFF
        if version.line is not None:
            call, got = await self._step(request, version, version.line, deadline, tenant, is_retry)
        else:
            call = await self._read(request, version, is_retry)
            if version.response_cache is None:
                got = await version.scheduler.submit(call, deadline, tenant)
            else:
                got, cache = await version.response_cache.answer(call, request.parameters, deadline, tenant)
        response = await answer.write_async(
            got,
            call,
            model=version.name,
            version=version.number,
            id=request.id,
            batched=version.loaded.model.signature.max_batch_size > 0,
        )
        if call.parameters.explain:
            answer.explain(response, got, self._replica, cache)
        return response

    async def _read(self, request: pb.ModelInferRequest, version: Version, is_retry: bool) -> InferenceRequest:
        call = await read_async(request, version.loaded.model.signature)
        if is_retry and self._crash_guard is not None:
            call = replace(await self._crash_guard.checked(version.name, call), check=self._crash_guard.checked)
        return call

    async def _step(
        self,
        request: pb.ModelInferRequest,
        version: Version,
        line: ArrivalOrder,
        deadline: float,
        tenant: str,
        is_retry: bool,
    ) -> tuple[InferenceRequest, InferenceResult]:
        """One step of a sequence: it stands in line behind those that came before, though they take longer to read."""
        scheduler, id = version.scheduler, parameters.sequence_id(request.parameters)
        if line.is_free(id) and not is_retry and not is_long_read(request):
            call = read(request, version.loaded.model.signature)
            return call, await scheduler.submit(call, deadline, tenant)
        async with line.turn(id):
            call = await self._read(request, version, is_retry)
            waiter = Waiter(asyncio.get_running_loop().create_future())
            ticket = scheduler.start(call, deadline, tenant, waiter)
        try:
            return call, await waiter.future
        except asyncio.CancelledError:
            scheduler.abandon(ticket)
            raise

    def is_decoupled(self, request: pb.ModelInferRequest) -> bool:
        """Whether the request's model gives any number of responses. Raises what `Models.find` does."""
        return self.models.find(request.model_name, request.model_version).decoupled is not None

    async def responses(
        self, request: pb.ModelInferRequest, deadline: float = math.inf, tenant: str = ""
    ) -> AsyncGenerator[pb.ModelInferResponse | ShoalError, None]:
        """What a decoupled model responds, errors of its own among it. Raises what else goes wrong, as `infer` does."""
        with self.models.use(request.model_name, request.model_version) as version:
            start = self._clock()
            try:
                call = await read_async(request, version.loaded.model.signature)
                async with aclosing(
                    decoupled_responses.responses(version, call, request, deadline, tenant)
                ) as responses:
                    async for response in responses:
                        yield response
            except (Exception, asyncio.CancelledError, GeneratorExit):
                version.statistics.failed(int((self._clock() - start) * 1e9))
                raise


def _only_repository(name: str) -> None:
    if name:
        raise Unimplemented(f"'repository_name' is not supported: there is one, without a name; got {quoted(name)}")
