"""Routes: which cluster a call goes to, by the gRPC service in its path and the model in its first message.

Fields: envoy.config.route.v3.RouteConfiguration. The table comes from the caller: this module knows no service.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from envoy_data_plane.envoy.config.route.v3 import (
    FilterConfig,
    Route,
    RouteAction,
    RouteConfiguration,
    RouteMatch,
    VirtualHost,
)
from envoy_data_plane.envoy.extensions.retry.host.previous_hosts.v3 import PreviousHostsPredicate

from mesh.xds.clusters import model_cluster
from mesh.xds.resource import ROUTES, Resource, nested, pack_serialized, typed

NAME = "services"
"""The one route configuration: gateway and outbound listener route alike."""
MODEL_HEADER = "x-shoal-model"
SEQUENCE_HEADER = "x-shoal-sequence"
"""The sequence that a message is a step of, as hexadecimal digits of what it says."""
EXTRACTION_FILTER = "envoy.filters.http.grpc_field_extraction"
"""Finds the model that a message names."""
STEP_EXTRACTION_FILTER = "shoal.steps"
"""The same filter in its place while a model has sequences: finds a message's parameters as well."""
LUA_FILTER = "envoy.filters.http.lua"

MODEL_NAME = re.compile(r"[A-Za-z0-9._/-]{1,255}")
"""Models that get a cluster of their own. Others are served too, by whichever instance of the fallback comes next."""

_STREAM_BUFFER_BYTES = 64 << 10
# Field numbers of RouteConfiguration.virtual_hosts, VirtualHost.routes, Route.match and Route.route.
_HOSTS, _ROUTE, _MATCH, _ACTION = 2, 3, 1, 2

_ALWAYS = "connect-failure,refused-stream,reset-before-request"
_IDEMPOTENT = "connect-failure,refused-stream,reset,unavailable"


@dataclass(frozen=True)
class ServiceRoutes:
    """The routes of one gRPC package or service."""

    prefix: str
    """Of the path: `/shoal.store.v1.`, or `/inference.GRPCInferenceService/`."""
    cluster: str
    idempotent: tuple[str, ...] = ()
    """Paths of methods that may run twice: they are retried also when an instance dies on them."""
    all_idempotent: bool = False
    streaming: tuple[str, ...] = ()
    """Paths of methods whose requests have no end: they are not held back for a retry."""
    traced: bool = True
    names_model_itself: bool = False
    """Its callers say in the header x-shoal-model which model their calls are for. Only services of the mesh can: the
    gateway takes the header away, and calls without it have no route."""


@dataclass(frozen=True)
class ModelRoutes:
    """Calls that name a model in their first message."""

    prefix: str
    """Of the path; also the prefix of the ServiceRoutes that calls fall back to."""
    fields: tuple[tuple[str, str], ...]
    """Method (`package.Service.Method`) and the name of the field that names the model."""
    descriptors: bytes
    """A serialized FileDescriptorSet with these methods."""
    steps: tuple[str, ...] = ()
    """Methods whose messages may be steps of a sequence."""
    parameters: str = ""
    """The field of their messages with the parameters, each as `descriptors` must have it: the bytes of a map's entry,
    whose key is a text. One with the key `sequence_id` names the sequence."""


@dataclass(frozen=True)
class Table:
    """All routes of a node, in the order of their matching, and how large a request may be."""

    services: tuple[ServiceRoutes, ...]
    models: ModelRoutes | None = None
    body_bytes: int = 192 << 20
    """What is held of a request, to find its model and for a retry. More than any server accepts: a message that is too
    large gets the server's own clear refusal, and not the filter's."""


@lru_cache(64)
def route_configuration(table: Table, models: tuple[str, ...], sequenced: frozenset[str] = frozenset()) -> Resource:
    """The routes of `table`; calls that name one of `models` go to that model's cluster.

    Those of `sequenced`, which are models too, always take one sequence to one endpoint.

    The routes of models come first. They are tried one after the other: a matter of microseconds for hundreds. Where
    there are none, no call is searched for its model, which would cost as much as all the rest of its routing.
    """
    routes = [_no_path()]
    for service in table.services:
        names_model = table.models is not None and service.prefix == table.models.prefix
        if names_model and models and table.models is not None:
            routes += [_compressed(service)]
            routes += [_step(path, model) for model in models if model in sequenced for path in _paths(table.models)]
            routes += [_model(service, model) for model in models]
        if service.names_model_itself:
            routes += [_named(service, model) for model in models]
        routes += _service(service, is_searched=names_model and bool(models), has_steps=bool(sequenced))
    host = VirtualHost.from_dict(
        {
            "name": "any",
            "domains": ["*"],
            # Who gets a retry can look whether the first attempt ended its instance.
            "include_request_attempt_count": True,
            # What a retry sends again must be held until then. Also the largest message that is searched for its model.
            # Connection buffers do not count here.
            "request_body_buffer_limit": table.body_bytes,
        }
    )
    # References are checked where snapshots are made: Envoy would refuse all routes for one missing cluster.
    configuration = RouteConfiguration.from_dict({"name": NAME, "validate_clusters": False})
    hosts = nested(_HOSTS, bytes(host) + b"".join(nested(_ROUTE, route) for route in routes))
    needs = {service.cluster for service in table.services} | {model_cluster(model) for model in models}
    return pack_serialized(ROUTES, NAME, bytes(configuration) + hosts, frozenset(needs))


@lru_cache(64)
def _service(service: ServiceRoutes, *, is_searched: bool, has_steps: bool = False) -> tuple[bytes, ...]:
    """A route for each method that is named, and one for all others, which may not run twice. Serialized.

    Args:
        is_searched: calls go through the filters that find their model.
        has_steps: and through those that find their sequence.
    """
    to = service.cluster
    routes = []
    if service.streaming:
        # Bodies without an end are never held for a retry of ours: a small buffer, then it flows.
        small = {"request_body_buffer_limit": _STREAM_BUFFER_BYTES}
        routes += [{**_route({"path": path}, to, _ALWAYS), **small} for path in service.streaming]
    # A route for each: Envoy refuses a regular expression as large as a dozen of them.
    routes += [_route({"path": path}, to, _IDEMPOTENT) for path in service.idempotent]
    routes.append(_route({"prefix": service.prefix}, to, _IDEMPOTENT if service.all_idempotent else _ALWAYS))
    if service.names_model_itself:
        there = [{"name": MODEL_HEADER, "present_match": True}]
        routes = [{**route, "match": {**route["match"], "headers": there}} for route in routes]
    if not service.traced:
        never = {"numerator": 0}
        sampling = {"client_sampling": never, "random_sampling": never, "overall_sampling": never}
        routes = [{**route, "tracing": sampling} for route in routes]
    finders = [EXTRACTION_FILTER if has_steps else STEP_EXTRACTION_FILTER]
    if not is_searched:
        finders = [EXTRACTION_FILTER, STEP_EXTRACTION_FILTER, LUA_FILTER]
    routes = [{**route, "typed_per_filter_config": _off(*finders)} for route in routes]
    return tuple(bytes(Route.from_dict(route)) for route in routes)


def _off(*filters: str) -> dict[str, Any]:
    """These filters do nothing for a route's calls."""
    return dict.fromkeys(filters, typed(FilterConfig, {"disabled": True}))


@lru_cache(8192)
def _model(service: ServiceRoutes, model: str) -> bytes:
    """The route of calls that name `model`. Serialized, and all but the names is done once."""
    match = {"prefix": service.prefix, "headers": [{"name": MODEL_HEADER, "string_match": {"exact": model}}]}
    action = bytes(RouteAction(cluster=model_cluster(model))) + _action(service.all_idempotent)
    return nested(_MATCH, bytes(RouteMatch.from_dict(match))) + nested(_ACTION, action)


@lru_cache(8192)
def _named(service: ServiceRoutes, model: str) -> bytes:
    """The route of calls whose header says `model`. Serialized."""
    match = {"prefix": service.prefix, "headers": [{"name": MODEL_HEADER, "string_match": {"exact": model}}]}
    route = _route(match, model_cluster(model), _ALWAYS)
    off = _off(EXTRACTION_FILTER, STEP_EXTRACTION_FILTER, LUA_FILTER)
    small = {"request_body_buffer_limit": _STREAM_BUFFER_BYTES}
    return bytes(Route.from_dict({**route, **small, "typed_per_filter_config": off}))


def _paths(models: ModelRoutes) -> tuple[str, ...]:
    """Of the methods whose messages may be steps."""
    return tuple("/{}/{}".format(*method.rpartition(".")[::2]) for method in models.steps)


@lru_cache(8192)
def _step(path: str, model: str) -> bytes:
    """The route of steps of `model`: by the hash of their sequence. Serialized.

    Where the endpoint of a sequence is not to be had, a step may be tried at another one, but only when it certainly
    did not reach the first: it is refused there, unless it starts the sequence.
    """
    match = {"path": path, "headers": [{"name": MODEL_HEADER, "string_match": {"exact": model}}]}
    route = _route(match, model_cluster(model), _ALWAYS)
    route["route"]["hash_policy"] = [{"header": {"header_name": SEQUENCE_HEADER}}]
    return bytes(Route.from_dict(route))


@lru_cache(2)
def _action(all_idempotent: bool) -> bytes:
    """All of a route's action but the cluster, serialized."""
    action = _route({}, "", _IDEMPOTENT if all_idempotent else _ALWAYS)["route"]
    del action["cluster"]
    return bytes(RouteAction.from_dict(action))


@lru_cache(1)
def _no_path() -> bytes:
    """Refuses paths that are not ASCII, first of all: one that is not UTF-8 ends grpc.aio's whole server."""
    ascii_only = {"string_match": {"safe_regex": {"regex": "[!-~]*"}}, "invert_match": True}
    match = {"prefix": "/", "headers": [{"name": ":path", **ascii_only}]}
    return bytes(Route.from_dict({"match": match, "direct_response": {"status": 404}}))


def _compressed(service: ServiceRoutes) -> bytes:
    """Compressed messages cannot be searched for their model (the filter would refuse them): any instance may do."""
    encoding = {"name": "grpc-encoding"}
    match = {
        "prefix": service.prefix,
        "headers": [
            {**encoding, "present_match": True},
            {**encoding, "string_match": {"exact": "identity"}, "invert_match": True},
        ],
    }
    route = _route(match, service.cluster, _IDEMPOTENT if service.all_idempotent else _ALWAYS)
    off = _off(EXTRACTION_FILTER, STEP_EXTRACTION_FILTER)
    return bytes(Route.from_dict({**route, "typed_per_filter_config": off}))


def _route(match: dict[str, Any], cluster: str, retry_on: str) -> dict[str, Any]:
    return {
        "match": match,
        "route": {
            "cluster": cluster,
            # The default of 15 s would end long inferences and watches; the caller's own deadline is enforced instead.
            "timeout": "0s",
            "max_stream_duration": {"grpc_timeout_header_max": "0s"},
            "idle_timeout": "0s",
            "retry_policy": {
                "retry_on": retry_on,
                # Bounded, also for the sake of a request that kills whoever runs it.
                "num_retries": 2,
                "retry_back_off": {"base_interval": "0.01s", "max_interval": "0.1s"},
                # Not the one that just failed. Without this, one in two retries of two replicas would.
                "retry_host_predicate": [
                    {
                        "name": "envoy.retry_host_predicates.previous_hosts",
                        "typed_config": typed(PreviousHostsPredicate),
                    }
                ],
                "host_selection_retry_max_attempts": 5,
            },
        },
    }
