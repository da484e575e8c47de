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

from services.infer import streaming
from services.infer.aside import aside
from services.infer.calls import answer, parameters, ragged, request
from services.infer.calls.request import Call
from services.infer.models.control import Control
from services.infer.models.models import Models, version_number
from services.infer.models.version import State, Version
from services.infer.remembered import CrashGuard
from services.infer.responses.cache import CacheState
from services.infer.scheduling.scheduler import Answer
from services.infer.scheduling.submitted import Waiter
from services.infer.sequences.line import Line
from services.infer.wording import quoted
from shoal import __version__
from shoal.errors import InvalidArgument, ShoalError, Unimplemented
from shoal.inference.v2 import inference_pb2 as pb

EXTENSIONS = ("classification", "model_configuration", "schedule_policy", "statistics")
"""What the server does beyond the protocol's core, under the names that clients look for."""

CONTROL_EXTENSIONS = ("model_repository", "model_repository(unload_dependents)")

# Beyond these, reading a request or writing an answer takes about a millisecond: then it is done beside the event loop.
_LARGE_BYTES = 4 << 20
_MANY_ELEMENTS = 1 << 20  # Raw numbers: one copy of memory.
_FEW_ELEMENTS = 1 << 13  # Typed contents and BYTES: Python objects, one by one.
_MANY_INPUTS = 256
_MOST_DIMS = 32


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

    def model_ready(self, asked: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        """An unknown model is not ready, which is no error. Raises InvalidArgument when the version is no number."""
        number = version_number(asked.version)
        ready = [version.number for version in self.models.versions(asked.name)]
        return pb.ModelReadyResponse(ready=bool(ready) if number is None else number in ready)

    def model_metadata(self, asked: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        """Raises InvalidArgument, NotFound or Unavailable, as `Models.find` does."""
        version = self.models.find(asked.name, asked.version)
        signature, config = version.loaded.model.signature, version.loaded.model.config
        tensor = pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name=version.name,
            versions=[str(other.number) for other in self.models.versions(asked.name)],
            platform=config.platform,
            inputs=[tensor(name=s.name, datatype=s.datatype.name, shape=s.shape) for s in signature.inputs],
            outputs=[tensor(name=s.name, datatype=s.datatype.name, shape=s.shape) for s in signature.outputs],
        )

    def model_config(self, asked: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
        """The completed configuration. Raises as `model_metadata` does."""
        return pb.ModelConfigResponse(config=self.models.find(asked.name, asked.version).loaded.model.config)

    def model_statistics(self, asked: pb.ModelStatisticsRequest) -> pb.ModelStatisticsResponse:
        """Of every ready version that is asked for. Raises InvalidArgument when there is none, or a bad version."""
        number = version_number(asked.version)
        names = [asked.name] if asked.name else self.models.names()
        versions = [v for name in names for v in self.models.versions(name) if number in (None, v.number)]
        if asked.name and not versions:
            which = quoted(asked.name) + (f" version {number}" if number is not None else "")
            raise InvalidArgument(f"requested model {which} is not available")
        return pb.ModelStatisticsResponse(model_stats=[v.statistics.message(v.name, v.number) for v in versions])

    def index(self, asked: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
        """Every version of every model. Raises Unimplemented when one of several repositories is asked for."""
        _only_repository(asked.repository_name)
        rows = [row for row in self.models.index() if row.state is State.READY or not asked.ready]
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

    async def load_model(self, asked: pb.RepositoryModelLoadRequest) -> pb.RepositoryModelLoadResponse:
        """Loads a model, or loads it again; returns when it serves. Raises what `Control.load` does, Unimplemented."""
        _only_repository(asked.repository_name)
        await self._controlled().load(asked)
        return pb.RepositoryModelLoadResponse()

    async def unload_model(self, asked: pb.RepositoryModelUnloadRequest) -> pb.RepositoryModelUnloadResponse:
        """Serves a model no more until it is loaded again. Raises as `Control.unload` does, and Unimplemented."""
        _only_repository(asked.repository_name)
        await self._controlled().unload(asked)
        return pb.RepositoryModelUnloadResponse()

    def _controlled(self) -> Control:
        if self._control is None:
            raise Unimplemented(
                "models are not loaded or unloaded on request where several processes share a port: "
                "use one (--workers 1), or let all of them follow the folder (--model-control poll)"
            )
        return self._control

    async def infer(
        self, asked: pb.ModelInferRequest, deadline: float = math.inf, tenant: str = "", *, is_retry: bool = False
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
        with self.models.use(asked.model_name, asked.model_version) as version:
            start = self._clock()
            try:
                return await self._infer(asked, version, deadline, tenant, is_retry)
            except (Exception, asyncio.CancelledError):
                version.statistics.failed(int((self._clock() - start) * 1e9))
                raise

    async def _infer(
        self, asked: pb.ModelInferRequest, version: Version, deadline: float, tenant: str, is_retry: bool
    ) -> pb.ModelInferResponse:
        cache = CacheState.OFF
        if version.line is not None:
            call, got = await self._step(asked, version, version.line, deadline, tenant, is_retry)
        else:
            call = await self._read(asked, version, is_retry)
            if version.response_cache is None:
                got = await version.scheduler.submit(call, deadline, tenant)
            else:
                got, cache = await version.response_cache.answer(call, asked.parameters, deadline, tenant)
        response = await aside(lambda: self._written(got, call, version, asked.id), _is_long_write(got, call))
        if call.parameters.explain:
            answer.explain(response, got, self._replica, cache)
        return response

    async def _read(self, asked: pb.ModelInferRequest, version: Version, is_retry: bool) -> Call:
        signature = version.loaded.model.signature
        call = await aside(lambda: request.read(asked, signature), _is_long_read(asked))
        if is_retry and self._crash_guard is not None:
            call = replace(await self._crash_guard.checked(version.name, call), check=self._crash_guard.checked)
        return call

    async def _step(
        self, asked: pb.ModelInferRequest, version: Version, line: Line, deadline: float, tenant: str, is_retry: bool
    ) -> tuple[Call, Answer]:
        """One step of a sequence: it stands in line behind those that came before, though they take longer to read."""
        scheduler, id = version.scheduler, parameters.sequence_id(asked.parameters)
        if line.is_free(id) and not is_retry and not _is_long_read(asked):
            call = request.read(asked, version.loaded.model.signature)
            return call, await scheduler.submit(call, deadline, tenant)
        async with line.turn(id):
            call = await self._read(asked, version, is_retry)
            waiter = Waiter(asyncio.get_running_loop().create_future())
            ticket = scheduler.start(call, deadline, tenant, waiter)
        try:
            return call, await waiter.future
        except asyncio.CancelledError:
            scheduler.abandon(ticket)
            raise

    def is_decoupled(self, asked: pb.ModelInferRequest) -> bool:
        """Whether the request's model gives any number of responses. Raises what `Models.find` does."""
        return self.models.find(asked.model_name, asked.model_version).decoupled is not None

    async def responses(
        self, asked: pb.ModelInferRequest, deadline: float = math.inf, tenant: str = ""
    ) -> AsyncGenerator[pb.ModelInferResponse | ShoalError, None]:
        """What a decoupled model responds, errors of its own among it. Raises what else goes wrong, as `infer` does."""
        with self.models.use(asked.model_name, asked.model_version) as version:
            start = self._clock()
            try:
                signature = version.loaded.model.signature
                call = await aside(lambda: request.read(asked, signature), _is_long_read(asked))
                async with aclosing(streaming.responses(version, call, asked, deadline, tenant)) as responses:
                    async for response in responses:
                        yield response
            except (Exception, asyncio.CancelledError, GeneratorExit):
                version.statistics.failed(int((self._clock() - start) * 1e9))
                raise

    def _written(self, got: Answer, call: Call, version: Version, id: str) -> pb.ModelInferResponse:
        batched = version.loaded.model.signature.max_batch_size > 0
        return answer.write(got, call, model=version.name, version=version.number, id=id, batched=batched)


def _only_repository(name: str) -> None:
    if name:
        raise Unimplemented(f"'repository_name' is not supported: there is one, without a name; got {quoted(name)}")


def _is_long_read(asked: pb.ModelInferRequest) -> bool:
    """Whether reading it would hold up the event loop; from the shapes, which are cheap to see."""
    if len(asked.inputs) > _MANY_INPUTS:
        return True
    by_element = not asked.raw_input_contents
    for tensor in asked.inputs:
        limit = _FEW_ELEMENTS if by_element or tensor.datatype == "BYTES" else _MANY_ELEMENTS
        # No tensor has so many dimensions, and their product would be a number of any length.
        if len(tensor.shape) <= _MOST_DIMS and math.prod(tensor.shape) > limit:
            return True
    return False


def _is_long_write(got: Answer, call: Call) -> bool:
    arrays = [array for output in got.outputs for array in ragged.arrays(output)]
    by_element = sum(array.size for array in arrays if array.dtype == object) > _FEW_ELEMENTS
    classes = sum(wanted.classes for wanted in call.outputs) * call.rows
    return by_element or classes > _FEW_ELEMENTS or sum(array.nbytes for array in arrays) > _LARGE_BYTES
