"""Health and statistics of the inference protocol over REST, for all infer instances (services.coord.inference)."""

from __future__ import annotations

from mesh.rest.app import RestApp
from mesh.rest.call import Reply, RestCall, health_reply
from mesh.rest.handlers import unary
from mesh.rest.plain_json import list_json
from mesh.rpc.grpc_app import GrpcApp
from shoal.inference.v2 import inference_pb2 as pb


def rest_app(grpc: GrpcApp) -> RestApp:
    """Return the application of requests that are not gRPC."""
    return RestApp(grpc, {"live": _live, "ready": _ready, "statistics": _statistics})


async def _live(call: RestCall) -> Reply:
    return health_reply("live", is_it=(await unary(call, call.target.rpc, pb.ServerLiveRequest())).live)


async def _ready(call: RestCall) -> Reply:
    return health_reply("ready", is_it=(await unary(call, call.target.rpc, pb.ServerReadyRequest())).ready)


async def _statistics(call: RestCall) -> Reply:
    request = pb.ModelStatisticsRequest(name=call.target.model, version=call.target.version)
    response = await unary(call, call.target.rpc, request)
    return Reply(await call.in_turn(list_json("model_stats", response.model_stats)))
