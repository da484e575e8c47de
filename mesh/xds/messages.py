"""Envoy's messages that this package reads and writes, as dataclasses of the standard library.

envoy-data-plane declares them as dataclasses of pydantic, of which betterproto2 compiles a validator for each class at
import, and for each message that is parsed or serialized. That was half of the processor time of a coord's start, and
nearly all of the time of a message. betterproto2 takes either kind. Envoy rejects what a validator would.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pydantic.dataclasses
from betterproto2 import Message


@contextmanager
def _of_the_standard_library() -> Iterator[None]:
    """Modules that are imported in the block declare their dataclasses with `dataclasses.dataclass`."""
    of_pydantic = pydantic.dataclasses.dataclass

    def declare(*, config: Any = None, **options: Any) -> Any:
        return dataclasses.dataclass(**options)

    pydantic.dataclasses.dataclass = declare  # type: ignore[assignment]
    try:
        yield
    finally:
        pydantic.dataclasses.dataclass = of_pydantic


# betterproto2 evaluates all annotations of a class again for each of its fields: two thirds of the processor time of a
# first snapshot. The method is private: another release may do without it.
if hasattr(Message, "_type_hints"):
    hints: Any = cache(Message._type_hints.__func__)
    Message._type_hints = classmethod(hints)

# `from_dict` finds the types of nested messages among the imported ones, so some are used by no other module.
with _of_the_standard_library():
    from envoy_data_plane.envoy.config.cluster.v3 import Cluster, OutlierDetection
    from envoy_data_plane.envoy.config.core.v3 import RequestMethod, TypedExtensionConfig
    from envoy_data_plane.envoy.config.endpoint.v3 import ClusterLoadAssignment
    from envoy_data_plane.envoy.config.listener.v3 import Listener
    from envoy_data_plane.envoy.config.rbac.v3 import Action
    from envoy_data_plane.envoy.config.route.v3 import (
        FilterConfig,
        Route,
        RouteAction,
        RouteConfiguration,
        RouteMatch,
        VirtualHost,
    )
    from envoy_data_plane.envoy.config.trace.v3 import OpenTelemetryConfig
    from envoy_data_plane.envoy.data.accesslog.v3 import HttpAccessLogEntry
    from envoy_data_plane.envoy.extensions.access_loggers.filters.cel.v3 import ExpressionFilter
    from envoy_data_plane.envoy.extensions.access_loggers.grpc.v3 import HttpGrpcAccessLogConfig
    from envoy_data_plane.envoy.extensions.filters.http.cors.v3 import Cors, CorsPolicy
    from envoy_data_plane.envoy.extensions.filters.http.grpc_field_extraction.v3 import (
        FieldExtractions,
        GrpcFieldExtractionConfig,
        RequestFieldValueDisposition,
    )
    from envoy_data_plane.envoy.extensions.filters.http.grpc_json_transcoder.v3 import GrpcJsonTranscoder
    from envoy_data_plane.envoy.extensions.filters.http.grpc_web.v3 import GrpcWeb
    from envoy_data_plane.envoy.extensions.filters.http.jwt_authn.v3 import JwtAuthentication
    from envoy_data_plane.envoy.extensions.filters.http.lua.v3 import Lua
    from envoy_data_plane.envoy.extensions.filters.http.rate_limit_quota.v3 import (
        RateLimitQuotaBucketSettings,
        RateLimitQuotaFilterConfig,
    )
    from envoy_data_plane.envoy.extensions.filters.http.rbac.v3 import Rbac
    from envoy_data_plane.envoy.extensions.filters.http.router.v3 import Router
    from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import (
        HttpConnectionManager,
        HttpFilter,
    )
    from envoy_data_plane.envoy.extensions.http.early_header_mutation.header_mutation.v3 import HeaderMutation
    from envoy_data_plane.envoy.extensions.matching.common_inputs.network.v3 import DynamicMetadataInput
    from envoy_data_plane.envoy.extensions.matching.input_matchers.metadata.v3 import Metadata
    from envoy_data_plane.envoy.extensions.retry.host.previous_hosts.v3 import PreviousHostsPredicate
    from envoy_data_plane.envoy.extensions.transport_sockets.tls.v3 import DownstreamTlsContext, UpstreamTlsContext
    from envoy_data_plane.envoy.extensions.upstreams.http.v3 import HttpProtocolOptions
    from envoy_data_plane.envoy.service.accesslog.v3 import StreamAccessLogsMessage, StreamAccessLogsResponse
    from envoy_data_plane.envoy.service.discovery.v3 import (
        DeltaDiscoveryRequest,
        DeltaDiscoveryResponse,
    )
    from envoy_data_plane.envoy.service.discovery.v3 import (
        Resource as Sent,
    )
    from envoy_data_plane.envoy.type.matcher.v3 import HttpRequestHeaderMatchInput
    from envoy_data_plane.google.protobuf import Any as Packed
    from envoy_data_plane.message_pool import default_message_pool
