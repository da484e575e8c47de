"""The Open Inference Protocol over gRPC: each method only translates."""

from __future__ import annotations

import math
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.message import DecodeError

from mesh.rpc.access import Access, caller_in
from mesh.rpc.call_context import CallMemory
from mesh.rpc.fast_call import FastHandler
from mesh.rpc.framing import MessageParts
from mesh.rpc.heavy_work import Steps
from mesh.rpc.held_shares import CallLimits
from mesh.rpc.interceptors import Context
from mesh.rpc.places import Places
from mesh.rpc.server import Rpc
from services.infer import model_stream_infer
from services.infer.core import InferenceServer
from services.infer.fast_path.bulk import Bulk
from services.infer.fast_path.infer_fast import FastInfer
from services.infer.fast_path.large_request import PARSER
from services.infer.models.trials import Trials
from services.infer.requests.request_memory import RequestPart
from services.infer.scheduling.crash_guard import ATTEMPT
from shoal.access import rpc_groups
from shoal.access.caller_header import JOB_CALLER_HEADER, JOB_RETRY_HEADER
from shoal.errors import InvalidArgument, ShoalError, Unimplemented
from shoal.inference.v2 import bulk_pb2, bulk_pb2_grpc, trial_pb2, trial_pb2_grpc
from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import inference_pb2_grpc as pb_grpc
from shoal.store.v1 import store_pb2
from shoal.tenant_header import TENANT_HEADER

R = TypeVar("R")

_SERVICE = "/inference.GRPCInferenceService/"

# Open ModelStreamInfer streams. An idle one takes 45 kB of a node's Envoy, which all services share.
_STREAMS = 4_096


class InferenceServicer(pb_grpc.GRPCInferenceServiceServicer):
    """gRPC servicer of an InferenceServer."""

    def __init__(self, server: InferenceServer, access: Access | None = None) -> None:
        """Serve `server`; `access` decides about each model that a message names."""
        self._server = server
        self._access = access
        self._streams = Places(_STREAMS, "streams")

    def _check(self, context: Context, method: str, model: str) -> None:
        if self._access is not None:
            self._access.check(_SERVICE + method, caller_in(context), model)

    def _may_see(self, context: Context, method: str) -> Callable[[str], bool]:
        """Return a function that returns True for the models that the caller may see in a list."""
        access = self._access
        if access is None:
            return lambda model: True
        caller = caller_in(context)
        return lambda model: access.allows(_SERVICE + method, caller, model)

    async def _in_turns(self, context: Context, steps: Steps[R]) -> R:
        """Return the result of `steps`, in the turns of the caller's tenant."""
        tenant = _header(context, TENANT_HEADER) or ""
        return await self._server.heavy.run(tenant.encode("latin-1", "replace"), steps)

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        return self._server.live()

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        return self._server.ready()

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        self._check(context, "ModelReady", request.name)
        return self._server.model_ready(request)

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context) -> pb.ServerMetadataResponse:
        return self._server.metadata()

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:
        self._check(context, "ModelMetadata", request.name)
        return self._server.model_metadata(request)

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Context) -> pb.ModelConfigResponse:
        self._check(context, "ModelConfig", request.name)
        return self._server.model_config(request)

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, context: Context) -> pb.ModelStatisticsResponse:
        if request.name:
            self._check(context, "ModelStatistics", request.name)
        steps = self._server.model_statistics(request, self._may_see(context, "ModelStatistics"))
        return await self._in_turns(context, steps)

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Context) -> pb.RepositoryIndexResponse:
        return await self._in_turns(context, self._server.index(request, self._may_see(context, "RepositoryIndex")))

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        memory = _memory(context)
        tenant, limits = _admission(context, self._access, rpc_groups.MODEL_INFER)(request.model_name)
        return await self._server.infer(
            request,
            _deadline(context),
            tenant,
            is_retry=_is_retry(context),
            memory=memory,
            message_bytes=memory.message_bytes,
            limits=limits,
        )

    async def ModelStreamInfer(
        self, request_iterator: AsyncIterator[pb.ModelInferRequest], context: Context
    ) -> AsyncIterator[MessageParts]:
        server, deadline, is_retry = self._server, _deadline(context), _is_retry(context)
        admit = _admission(context, self._access, rpc_groups.MODEL_STREAM_INFER)

        async def infer(message: pb.ModelInferRequest, part: RequestPart, raw: list[Any]) -> pb.ModelInferResponse:
            tenant, limits = admit(message.model_name)
            size = part.message_bytes
            return await server.infer(
                message, deadline, tenant, is_retry=is_retry, memory=part, message_bytes=size, raw=raw, limits=limits
            )

        def respond(
            message: pb.ModelInferRequest, part: RequestPart, raw: list[Any]
        ) -> AsyncGenerator[pb.ModelInferResponse | ShoalError, None] | None:
            if not server.is_decoupled(message):
                return None
            tenant, limits = admit(message.model_name)
            return server.responses(message, deadline, tenant, part, part.message_bytes, limits, raw)

        responses = model_stream_infer.stream_responses(request_iterator, infer, respond, _memory(context))
        with self._streams.take(_header(context, TENANT_HEADER)):
            async with aclosing(responses):
                async for response in responses:
                    yield response
                    del response

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: Context
    ) -> pb.RepositoryModelLoadResponse:
        self._check(context, "RepositoryModelLoad", request.model_name)
        # A configuration may name another backend, or another address. A file may be code.
        if request.parameters:
            self._check(context, "RepositoryModelLoad#code", request.model_name)
        return await self._server.load_model(request)

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Context
    ) -> pb.RepositoryModelUnloadResponse:
        check = partial(self._check, context, "RepositoryModelUnload")
        check(request.model_name)
        return await self._server.unload_model(request, check)

    async def SystemSharedMemoryStatus(self, request: pb.SystemSharedMemoryStatusRequest, context: Context) -> NoReturn:
        _no_shared_memory("SystemSharedMemoryStatus")

    async def SystemSharedMemoryRegister(
        self, request: pb.SystemSharedMemoryRegisterRequest, context: Context
    ) -> NoReturn:
        _no_shared_memory("SystemSharedMemoryRegister")

    async def SystemSharedMemoryUnregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest, context: Context
    ) -> NoReturn:
        _no_shared_memory("SystemSharedMemoryUnregister")

    async def CudaSharedMemoryStatus(self, request: pb.CudaSharedMemoryStatusRequest, context: Context) -> NoReturn:
        _no_shared_memory("CudaSharedMemoryStatus")

    async def CudaSharedMemoryRegister(self, request: pb.CudaSharedMemoryRegisterRequest, context: Context) -> NoReturn:
        _no_shared_memory("CudaSharedMemoryRegister")

    async def CudaSharedMemoryUnregister(
        self, request: pb.CudaSharedMemoryUnregisterRequest, context: Context
    ) -> NoReturn:
        _no_shared_memory("CudaSharedMemoryUnregister")

    async def TraceSetting(self, request: pb.TraceSettingRequest, context: Context) -> NoReturn:
        _unsupported("TraceSetting", "tracing is set by the OTEL_* variables of the process")

    async def LogSettings(self, request: pb.LogSettingsRequest, context: Context) -> NoReturn:
        _unsupported("LogSettings", "the log level is set by SHOAL_INFER_LOG_LEVEL")


def inference_rpc(server: InferenceServer, access: Access | None = None) -> Rpc:
    """Return the gRPC service of `server`. `access` decides about models, `mesh.rpc.server` about methods."""

    def add(to: grpc.aio.Server) -> None:
        pb_grpc.add_GRPCInferenceServiceServicer_to_server(InferenceServicer(server, access), to)

    parsers = {rpc_groups.MODEL_INFER: PARSER, rpc_groups.MODEL_STREAM_INFER: PARSER}
    return Rpc(pb.DESCRIPTOR.services_by_name["GRPCInferenceService"], add, parsers)


class BulkServicer(bulk_pb2_grpc.BulkInferenceServicer):
    """gRPC servicer of bulks, on the fast path of an InferenceServer."""

    def __init__(self, server: InferenceServer, access: Access | None = None) -> None:
        self._replica = server.replica
        self._access = access
        self._infer = FastInfer(server, server.models, access)

    async def InferBulk(
        self, request_iterator: AsyncIterator[bulk_pb2.InferBulkRequest], context: Context
    ) -> AsyncIterator[bulk_pb2.InferBulkResponse]:
        caller = None if self._access is None else caller_in(context)
        bulk = Bulk(self._infer, self._replica, memory=_memory(context), caller=caller)
        async with aclosing(bulk.responses(request_iterator)) as responses:
            async for response in responses:
                yield response
                del response


def bulk_rpc(server: InferenceServer, access: Access | None = None) -> Rpc:
    """Return the gRPC service of bulks, an endpoint of `server` for the services of its mesh.

    `access` decides about each entry by its model, and by the caller of the bulk.
    """

    def add(to: grpc.aio.Server) -> None:
        bulk_pb2_grpc.add_BulkInferenceServicer_to_server(BulkServicer(server, access), to)

    return Rpc(bulk_pb2.DESCRIPTOR.services_by_name["BulkInference"], add)


class TrialServicer(trial_pb2_grpc.ModelTrialsServicer):
    """gRPC servicer of trial loads."""

    def __init__(self, trials: Trials, replica: str, access: Access | None = None) -> None:
        self._trials = trials
        self._replica = replica
        self._access = access

    async def TryModel(
        self, request: trial_pb2.TryModelRequest, context: Context
    ) -> AsyncIterator[trial_pb2.TryModelResponse]:
        try:
            model = store_pb2.ModelVersion.FromString(request.model)
        except DecodeError as err:
            raise InvalidArgument(f"model: it is no serialised shoal.store.v1.ModelVersion: {err}") from err
        allow_code, behalf, tenant = True, b"", _header(context, TENANT_HEADER) or ""
        if self._access is not None:
            caller = caller_in(context)
            if (found := self._access.check(rpc_groups.TRY_MODEL, caller, model.name)) is not None:
                behalf, tenant = caller or b"", found.tenant
            allow_code = self._access.allows(rpc_groups.TRY_MODEL_WITH_CODE, caller, model.name)
        running = self._trials.run(model, allow_code=allow_code, caller=behalf, tenant=tenant)
        async with aclosing(running) as begun:
            async for _ in begun:
                yield trial_pb2.TryModelResponse(instance=self._replica, pid=os.getpid())
        yield trial_pb2.TryModelResponse(instance=self._replica, pid=os.getpid(), passed=True)


def trials_rpc(trials: Trials, replica: str, access: Access | None = None) -> Rpc:
    """Return the gRPC service of trial loads on the instance `replica`."""

    def add(to: grpc.aio.Server) -> None:
        trial_pb2_grpc.add_ModelTrialsServicer_to_server(TrialServicer(trials, replica, access), to)

    return Rpc(trial_pb2.DESCRIPTOR.services_by_name["ModelTrials"], add)


def _memory(context: Any) -> CallMemory:
    memory: CallMemory = context.memory
    return memory


def _deadline(context: Context) -> float:
    remaining_s = context.time_remaining()
    return math.inf if remaining_s is None else time.monotonic() + remaining_s


def _is_retry(context: Context) -> bool:
    """Return True when another instance may have run the request: the mesh repeats it, or a job does."""
    given = context.invocation_metadata() or ()
    return any((key == ATTEMPT and value != "1") or key == JOB_RETRY_HEADER for key, value in given)


def _header(context: Context, name: str) -> str | None:
    for key, value in context.invocation_metadata() or ():
        if key == name:
            return value if isinstance(value, str) else None
    return None


def _admission(context: Context, access: Access | None, rpc: str) -> Callable[[str], tuple[str, CallLimits | None]]:
    """Return a function that returns the tenant of a request to a model, and the limits in which the request counts.

    The tenant is the verified caller's.

    Without `access`, every request has the tenant that the caller names. With it, so have those of the mesh's services
    alone. The function raises PermissionDenied or Unauthenticated when the caller may not call `rpc` for the model.
    """
    named = _header(context, TENANT_HEADER) or ""
    if access is None:
        return lambda model: (named, None)
    value = caller_in(context)
    job_caller = _header(context, JOB_CALLER_HEADER)
    for_job = None if job_caller is None else job_caller.encode("latin-1", "replace")

    def admit(model: str) -> tuple[str, CallLimits | None]:
        caller = access.check(rpc, value, model)
        return named if caller is None else caller.tenant, access.limits_of(value, model, for_job)

    return admit


def _unsupported(method: str, instead: str) -> NoReturn:
    raise Unimplemented(f"{method} is not supported: {instead}")


def _no_shared_memory(method: str) -> NoReturn:
    _unsupported(method, "send tensors in the request")


def fast_methods(server: InferenceServer, access: Access | None = None) -> dict[str, FastHandler]:
    """Return the handlers of the methods that a server serves on its fast path."""
    return {rpc_groups.MODEL_INFER: FastInfer(server, server.models, access)}
