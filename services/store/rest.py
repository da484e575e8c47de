"""Streams of results as JSON."""

from __future__ import annotations

from mesh.h2.stream import SMALL_BODY
from mesh.rest.app import RestApp
from mesh.rpc.grpc_app import GrpcApp
from shoal.store.v1 import store_pb2 as pb


def rest_app(grpc: GrpcApp) -> RestApp:
    """Return the application of requests that are not gRPC."""
    # The requests have no body.
    return RestApp(grpc, {}, streams={"stream results": pb.StreamResultsRequest}, message_bytes=SMALL_BODY)
