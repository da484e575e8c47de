"""The operations of REST: each only translates, as `rpc` does for gRPC."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import orjson

from mesh.rest.call import Reply, RestCall, health_reply, json_reply
from mesh.rest.json_text import as_object, member
from mesh.rest.plain_json import as_json, list_json
from mesh.rpc.heavy_work import Steps
from services.infer.core import InferenceServer
from services.infer.rest import load_request
from services.infer.rest.fast_infer import FastRestInfer
from services.infer.rest.generation import generate, generate_stream
from services.infer.rest.inference import infer
from shoal.errors import InvalidArgument, Unimplemented
from shoal.inference.v2 import inference_pb2 as pb

# The extensions that REST has, and gRPC does not need.
_EXTENSIONS = ("binary_tensor_data", "parameters")
_PLAIN = b"text/plain"
_NOT_READY = 400


class Operations:
    """The operations on an InferenceServer, by the names in `shoal.access.rest_paths`."""

    def __init__(self, server: InferenceServer, fast: FastRestInfer) -> None:
        self._server = server
        self.by_name: dict[str, Callable[[RestCall], Any]] = {
            "live": self._live,
            "ready": self._ready,
            "metadata": self._metadata,
            "model metadata": self._model_metadata,
            "model ready": self._model_ready,
            "model config": self._model_config,
            "statistics": self._statistics,
            "index": self._index,
            "load": self._load,
            "unload": self._unload,
            "infer": partial(infer, server, fast),
            "generate": partial(generate, server),
            "generate stream": partial(generate_stream, server),
            "shared memory": _unsupported("shared memory", "send tensors in the request"),
            "trace setting": _unsupported("TraceSetting", "tracing is set by the OTEL_* variables of the process"),
            "log settings": _unsupported("LogSettings", "the log level is set by SHOAL_INFER_LOG_LEVEL"),
        }

    async def _live(self, call: RestCall) -> Reply:
        return health_reply("live", is_it=True)

    async def _ready(self, call: RestCall) -> Reply:
        return health_reply("ready", is_it=self._server.ready().ready)

    async def _metadata(self, call: RestCall) -> Reply:
        found = self._server.metadata()
        return json_reply(
            {"name": found.name, "version": found.version, "extensions": [*found.extensions, *_EXTENSIONS]}
        )

    async def _model_metadata(self, call: RestCall) -> Reply:
        target = call.target
        found = as_json(self._server.model_metadata(pb.ModelMetadataRequest(name=target.model, version=target.version)))
        found.pop("properties", None)
        return json_reply(found)

    async def _model_ready(self, call: RestCall) -> Reply:
        target = call.target
        if self._server.model_ready(pb.ModelReadyRequest(name=target.model, version=target.version)).ready:
            return Reply(content_type=_PLAIN)
        return json_reply({"error": "Model version not ready"}, _NOT_READY)

    async def _model_config(self, call: RestCall) -> Reply:
        target = call.target
        return json_reply(
            as_json(self._server.model_config(pb.ModelConfigRequest(name=target.model, version=target.version)).config)
        )

    async def _statistics(self, call: RestCall) -> Reply:
        target = call.target
        request = pb.ModelStatisticsRequest(name=target.model, version=target.version)
        return Reply(await call.in_turn(self._statistics_json(request, call)))

    def _statistics_json(self, request: pb.ModelStatisticsRequest, call: RestCall) -> Steps[bytes]:
        found = yield from self._server.model_statistics(request, call.may_see)
        return (yield from list_json("model_stats", found.model_stats))

    async def _index(self, call: RestCall) -> Reply:
        async with call.parsed(await call.body() or b"{}") as document:
            is_ready = member(as_object(document, "the request"), "ready", bool, False)
        return Reply(await call.in_turn(self._index_json(pb.RepositoryIndexRequest(ready=is_ready), call)))

    def _index_json(self, request: pb.RepositoryIndexRequest, call: RestCall) -> Steps[bytes]:
        found = yield from self._server.index(request, call.may_see)
        rows = []
        for row in found.models:
            rows.append(orjson.dumps({name: value for name, value in as_json(row).items() if value}))
            yield
        return b"[%b]" % b",".join(rows)

    async def _load(self, call: RestCall) -> Reply:
        await self._server.load_model(await load_request.read(call))
        return Reply()

    async def _unload(self, call: RestCall) -> Reply:
        request = pb.RepositoryModelUnloadRequest(model_name=call.target.model)
        async with call.parsed(await call.body() or b"{}") as document:
            given = member(as_object(document, "the request"), "parameters", dict, {})
            for name, value in given.items():
                if type(value) is not bool:
                    raise InvalidArgument(f"parameter '{name[:40]}': expected true or false")
                request.parameters[name].bool_param = value
        await self._server.unload_model(request, partial(call.check, call.target.rpc))
        return Reply()


def _unsupported(what: str, instead: str) -> Callable[[RestCall], Any]:
    async def refuse(call: RestCall) -> Reply:
        raise Unimplemented(f"{what} is not supported: {instead}")

    return refuse
