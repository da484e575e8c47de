"""Routes: a call's cluster follows from the gRPC service in its path and the model in its first message.

Fields: envoy.config.route.v3.RouteConfiguration. The caller passes the table; this module knows no service.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mesh.xds import access, json_calls
from mesh.xds.clusters import model_cluster
from mesh.xds.json_calls import JsonRoutes
from mesh.xds.messages import (
    FilterConfig,
    Packed,
    PreviousHostsPredicate,
    Route,
    RouteAction,
    RouteConfiguration,
    RouteMatch,
    VirtualHost,
)
from mesh.xds.resource import ROUTES, Resource, nested, pack_serialized, typed
from mesh.xds.web import TEXT_CALL, Web, foreign_page, virtual_hosts
from shoal.access.caller_header import CALLER_HEADER, SERVICE
from shoal.access.rest_paths import PREFIX as REST_PREFIX
from shoal.access.rest_paths import RestPath, model_path

NO_RETRY_HEADER = "x-shoal-no-retry"
"""Header with which a client forbids the nodes to repeat its call on another instance."""

NAME = "services"
"""Route configuration of the outbound listener."""
GATEWAY_NAME = "gateway"
"""Route configuration of the gateway: the same routes, for its host names and for web pages."""
MODEL_HEADER = "x-shoal-model"
SEQUENCE_HEADER = "x-shoal-sequence"
"""The sequence of a step, as the hexadecimal digits of the encoded parameter."""
EXTRACTION_FILTER = "envoy.filters.http.grpc_field_extraction"
"""Extracts the model that a message names."""
STEP_EXTRACTION_FILTER = "shoal.steps"
"""The same filter for models with sequences, in place of EXTRACTION_FILTER: extracts the parameters as well."""
LUA_FILTER = "envoy.filters.http.lua"
BODY_FILTER = "shoal.body"
"""Lua filter before the extraction: answers calls without a message, for which the extraction would wait for ever."""
REST_STEP_FILTER = "shoal.rest-steps"
"""Lua filter for models with sequences: reads the sequence of a step over REST, and sets SEQUENCE_HEADER."""
NO_SEQUENCE = "none"
"""Value of SEQUENCE_HEADER that REST_STEP_FILTER sets for a request of no sequence. Others are hexadecimal digits."""
_MODEL_FILTERS = (BODY_FILTER, EXTRACTION_FILTER, STEP_EXTRACTION_FILTER, LUA_FILTER)

MODEL_NAME = re.compile(r"[A-Za-z0-9._/-]{1,255}")
"""Names of models that get a cluster of their own. Calls of other models go to any instance of the service."""

_STREAM_BUFFER_BYTES = 64 << 10
# Longest time without progress while Envoy waits for the whole message of a unary call, to extract its model. The
# bodies of other calls go to the instance as they arrive, and the instance ends those that make no progress.
_MESSAGE_IDLE = "30s"
# Longest time without progress of other calls of clients: a year. When the heap of Envoy is full it is a second
# (shoal.node.envoy_overload), so that idle streams, at 25 kB each, cannot keep it full.
_UNTIL_FULL = "31536000s"
# Field numbers of RouteConfiguration.virtual_hosts, VirtualHost.routes, Route.match and Route.route.
_HOSTS, _ROUTE, _MATCH, _ACTION = 2, 3, 1, 2

# A filter that is disabled elsewhere is enabled by a configuration, also by an empty one.
_ENABLED = Packed.pack(FilterConfig(config=Packed()))

_ALWAYS = "connect-failure,refused-stream,reset-before-request"
_IDEMPOTENT = "connect-failure,refused-stream,reset,unavailable"


@dataclass(frozen=True)
class ServiceRoutes:
    """The routes of one gRPC package or service."""

    prefix: str
    """Prefix of the path: `/shoal.store.v1.`, or `/inference.GRPCInferenceService/`."""
    cluster: str
    idempotent: tuple[str, ...] = ()
    """Paths of methods that may run twice: their calls are also retried when an instance dies while it runs them."""
    all_idempotent: bool = False
    streaming: tuple[str, ...] = ()
    """Paths of methods with endless request streams: requests are not buffered for a retry."""
    apart: tuple[str, ...] = ()
    """Paths of methods whose calls use other connections to the instances than plain calls do, unless a filter has
    found their model."""
    internal: tuple[str, ...] = ()
    """Paths of methods that only services of the mesh may call. Other calls of them have no route."""
    traced: bool = True
    names_model_itself: bool = False
    """True when callers set the model in the header x-shoal-model. Only services of the mesh can: the gateway removes
    the header, and calls without it have no route."""


@dataclass(frozen=True)
class ModelRoutes:
    """Calls that name a model in their first message."""

    prefix: str
    """Prefix of the path, equal to the prefix of the ServiceRoutes that are the fallback."""
    fields: tuple[tuple[str, str], ...]
    """Pairs of a method (`package.Service.Method`) and its field that names the model."""
    descriptors: bytes
    """A serialized FileDescriptorSet with these methods."""
    steps: tuple[str, ...] = ()
    """Methods whose messages may be steps of a sequence."""
    streams: tuple[str, ...] = ()
    """Methods with endless request streams: their first message may take any time, and there may be none."""
    parameters: str = ""
    """Field of a step's message that holds the parameters. `descriptors` must declare the field as repeated bytes, one
    map entry with a string key each. The entry with the key `sequence_id` names the sequence."""
    parameters_number: int = 0
    """Number of that field."""
    model_number: int = 0
    """Number of the fields that name the model."""


@dataclass(frozen=True)
class RestRoutes:
    """Paths over REST that one cluster serves at the gateway, whichever model they name."""

    paths: tuple[RestPath, ...]
    cluster: str
    is_idempotent: bool = True
    headers: tuple[tuple[str, str], ...] = ()
    """Pairs of a header and the regular expression of RE2 that it must match."""


@dataclass(frozen=True)
class RouteTable:
    """All routes of a node in the order of matching, and the largest request."""

    services: tuple[ServiceRoutes, ...]
    models: ModelRoutes | None = None
    tried_unhealthy: frozenset[str] = frozenset()
    """Clusters whose calls go to any endpoint when none is healthy. The others reject a call then."""
    rest: str = ""
    """Service of the inference protocol over REST, whose paths name their model; empty: there is none."""
    json: JsonRoutes | None = None
    """JSON calls, at the gateway only."""
    rest_elsewhere: tuple[RestRoutes, ...] = ()
    """Routes before `json` and `rest`."""
    body_bytes: int = 192 << 20
    """Bytes of a request that Envoy buffers, to extract the model and for a retry. The limit exceeds the limit of every
    server, so a message that is too large gets the server's clear error instead of the filter's."""


@lru_cache(64)
def route_configuration(
    table: RouteTable,
    models: tuple[str, ...],
    sequenced: frozenset[str] = frozenset(),
    web: Web | None = None,
    *,
    has_access: bool = False,
    limit_filters: tuple[str, ...] = (),
) -> Resource:
    """Build the routes of `table`; calls that name one of `models` go to that model's cluster.

    `sequenced` is a subset of `models`: all steps of one sequence of such a model go to one endpoint. `web` is for the
    routes of a gateway; with `has_access`, it follows a policy. `limit_filters` are enabled.

    The routes of models come first. Envoy matches routes one after the other, in microseconds for hundreds. Without
    `models`, the model of a call is not extracted: extraction costs as much as all other routing of the call.
    """
    routes = [_no_path()]
    if web is not None:
        routes.append(_foreign_page(web))
    for service in table.services:
        names_model = table.models is not None and service.prefix == table.models.prefix
        if names_model and models and table.models is not None:
            routes += [_compressed(service)]
            routes += [
                _step(path, model) for model in models if model in sequenced for path in _step_paths(table.models)
            ]
            routes += [_model(service, model) for model in models]
        if service.names_model_itself:
            routes += [_named(service, model) for model in models]
        waiting = _unary_paths(table.models) if names_model and table.models is not None else ()
        routes += _service(
            service,
            is_searched=names_model and bool(models),
            has_steps=bool(sequenced),
            waiting=waiting,
            has_pages=web is not None,
        )
    # Paths of gRPC come first: the others are matched by regular expressions.
    if web is not None:
        routes += [route for routes in table.rest_elsewhere for route in _rest_elsewhere(routes)]
        if table.json is not None:
            routes.append(_json(table.json))
    if table.rest:
        for model in models:
            path, cluster = model_path(model), model_cluster(model)
            routes += _rest_steps(path, cluster) if model in sequenced else [_rest(path, cluster)]
        routes += [_rest(REST_PREFIX, table.rest), _not_found()]
    served: dict[str, Any] = {
        # With the attempt count, an instance that gets a retry can check if the first attempt killed an instance.
        "include_request_attempt_count": True,
        # Envoy buffers a request for retries up to this size, and extracts the model of messages up to this size.
        # Connection buffers are separate.
        "request_body_buffer_limit": table.body_bytes,
    }
    if has_access:
        served.update(access.TOKEN_REMOVAL)
    name = NAME if web is None else GATEWAY_NAME
    first, *others = virtual_hosts(web, served) if web is not None else [{**served, "name": "any", "domains": ["*"]}]
    # Snapshots check references to clusters. With validation by Envoy, one missing cluster would reject all routes.
    configuration = RouteConfiguration.from_dict(
        {"name": name, "validate_clusters": False, "ignore_port_in_host_matching": web is not None}
    )
    host = VirtualHost.from_dict(first)
    host.typed_per_filter_config.update(dict.fromkeys(limit_filters, _ENABLED))
    hosts = nested(_HOSTS, bytes(host) + b"".join(nested(_ROUTE, route) for route in routes))
    # A refused request is not searched for a model: without a message, the filters would answer before the host does.
    unsearched = {"typed_per_filter_config": _disabled(*_MODEL_FILTERS)} if table.models is not None else {}
    hosts += b"".join(nested(_HOSTS, bytes(VirtualHost.from_dict({**other, **unsearched}))) for other in others)
    needs = {service.cluster for service in table.services} | {model_cluster(model) for model in models}
    needs |= {table.rest} - {""}
    return pack_serialized(ROUTES, name, bytes(configuration) + hosts, frozenset(needs))


def _json(calls: JsonRoutes) -> bytes:
    route = Route.from_dict({**json_calls.route(calls), "typed_per_filter_config": _disabled(*_MODEL_FILTERS)})
    route.typed_per_filter_config.update(dict.fromkeys(json_calls.FILTERS, _ENABLED))
    return bytes(route)


def _foreign_page(web: Web) -> bytes:
    return bytes(Route.from_dict({**foreign_page(web), "typed_per_filter_config": _disabled(*_MODEL_FILTERS)}))


@lru_cache(64)
def _service(
    service: ServiceRoutes,
    *,
    is_searched: bool,
    has_steps: bool = False,
    waiting: tuple[str, ...] = (),
    has_pages: bool = False,
) -> tuple[bytes, ...]:
    """Return the serialized routes of a service: one for each listed method, and one for all other methods.

    Args:
        is_searched: filters extract the model of each call.
        has_steps: filters extract the sequence as well.
        waiting: paths of unary methods whose whole message Envoy waits for, to extract the model.
        has_pages: web pages may call.
    """
    to = service.cluster
    routes = []
    if service.streaming:
        # Endless request bodies cannot be replayed for a retry: Envoy buffers little and streams the rest.
        small = {"request_body_buffer_limit": _STREAM_BUFFER_BYTES}
        routes += [{**_apart(_route({"path": path}, to, _ALWAYS)), **small} for path in service.streaming]
    others = _IDEMPOTENT if service.all_idempotent else _ALWAYS
    routes += [_apart(_route({"path": path}, to, others)) for path in service.apart]
    # One route per method, because Envoy rejects a regular expression of a dozen paths as too large.
    routes += [_route({"path": path}, to, _IDEMPOTENT) for path in service.idempotent]
    routes.append(_route({"prefix": service.prefix}, to, others))
    text = (_text(service),) if has_pages and not service.names_model_itself else ()
    routes = [*_internal(service), *text, *routes]
    if has_pages:
        for route in routes:
            # Inferences take their time.
            if "route" in route and (not service.apart or route["match"].get("path") in service.apart):
                route["route"]["idle_timeout"] = _UNTIL_FULL
    if service.names_model_itself:
        has_model = [{"name": MODEL_HEADER, "present_match": True}]
        routes = [{**route, "match": {**route["match"], "headers": has_model}} for route in routes]
    if not service.traced:
        never = {"numerator": 0}
        sampling = {"client_sampling": never, "random_sampling": never, "overall_sampling": never}
        routes = [{**route, "tracing": sampling} for route in routes]
    unused = [EXTRACTION_FILTER if has_steps else STEP_EXTRACTION_FILTER]
    if not is_searched:
        unused = [*_MODEL_FILTERS]
    else:
        routes = [*_before_extraction(service, waiting), *routes]
    routes = [{"typed_per_filter_config": _disabled(*unused), **route} for route in routes]
    return tuple(bytes(Route.from_dict(route)) for route in routes)


def _internal(service: ServiceRoutes) -> list[dict[str, Any]]:
    """Return the routes of methods for services of the mesh only, and none for all other callers of them.

    A gateway removes the header of the caller. gRPC clients see UNIMPLEMENTED, as for a method that nobody serves.
    """
    routes = []
    is_service = [{"name": CALLER_HEADER, "string_match": {"exact": SERVICE.decode()}}]
    for path in service.internal:
        retry_on = _IDEMPOTENT if service.all_idempotent or path in service.idempotent else _ALWAYS
        routes.append(_route({"path": path, "headers": is_service}, service.cluster, retry_on))
        routes.append({"match": {"path": path}, "direct_response": {"status": 404}})
    return routes


def _text(service: ServiceRoutes) -> dict[str, Any]:
    """Return the route of calls in the text form of gRPC-Web."""
    return _route({"prefix": service.prefix, "headers": [TEXT_CALL]}, service.cluster, None)


def _before_extraction(service: ServiceRoutes, waiting: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return routes that apply until the model of a call is known; then Envoy selects the route anew.

    Methods other than POST have no message: the instance rejects them. A unary call that has no model yet must make
    progress.
    """
    retry_on = _IDEMPOTENT if service.all_idempotent else _ALWAYS
    no_post = {"name": ":method", "string_match": {"exact": "POST"}, "invert_match": True}
    other = _route({"prefix": service.prefix, "headers": [no_post]}, service.cluster, retry_on)
    no_model = [{"name": MODEL_HEADER, "present_match": True, "invert_match": True}]
    found = [_route({"path": path, "headers": no_model}, service.cluster, retry_on) for path in waiting]
    for route in found:
        route["route"]["idle_timeout"] = _MESSAGE_IDLE
    return [{**other, "typed_per_filter_config": _disabled(*_MODEL_FILTERS)}, *found]


def _disabled(*filters: str) -> dict[str, Any]:
    """Return the per-route configuration that disables `filters`."""
    return dict.fromkeys(filters, typed(FilterConfig, {"disabled": True}))


@lru_cache(8192)
def _model(service: ServiceRoutes, model: str) -> bytes:
    """Return the serialized route of calls that name `model`. The parts without names are serialized once."""
    match = {"prefix": service.prefix, "headers": [{"name": MODEL_HEADER, "string_match": {"exact": model}}]}
    action = bytes(RouteAction(cluster=model_cluster(model))) + _action(service.all_idempotent)
    return nested(_MATCH, bytes(RouteMatch.from_dict(match))) + nested(_ACTION, action)


@lru_cache(8192)
def _named(service: ServiceRoutes, model: str) -> bytes:
    """Return the serialized route of calls whose header names `model`."""
    match = {"prefix": service.prefix, "headers": [{"name": MODEL_HEADER, "string_match": {"exact": model}}]}
    route = _apart(_route(match, model_cluster(model), _ALWAYS))
    disabled = _disabled(*_MODEL_FILTERS)
    small = {"request_body_buffer_limit": _STREAM_BUFFER_BYTES}
    return bytes(Route.from_dict({**route, **small, "typed_per_filter_config": disabled}))


def _step_paths(models: ModelRoutes) -> tuple[str, ...]:
    """Return the paths of the methods whose messages may be steps of a sequence."""
    return tuple(path_of(method) for method in models.steps)


def _unary_paths(models: ModelRoutes) -> tuple[str, ...]:
    """Return the paths of the unary methods that name a model."""
    return tuple(path_of(method) for method, _ in models.fields if method not in models.streams)


def path_of(method: str) -> str:
    """Return the path of `package.Service.Method`."""
    return "/{}/{}".format(*method.rpartition(".")[::2])


@lru_cache(8192)
def _step(path: str, model: str) -> bytes:
    """Return the serialized route of steps of `model`, which hashes their sequence.

    When the endpoint of a sequence is unavailable, Envoy may retry a step at another endpoint, if the step certainly
    did not reach the first. The other endpoint rejects the step unless the step starts the sequence.
    """
    match = {"path": path, "headers": [{"name": MODEL_HEADER, "string_match": {"exact": model}}]}
    route = _route(match, model_cluster(model), _ALWAYS)
    route["route"]["hash_policy"] = [{"header": {"header_name": SEQUENCE_HEADER}}]
    return bytes(Route.from_dict(route))


@lru_cache(1)
def _not_found() -> bytes:
    """Return the last route, which rejects all other paths: without a route, the filters for gRPC would answer."""
    route = {"match": {"prefix": "/"}, "direct_response": {"status": 404}}
    return bytes(Route.from_dict({**route, "typed_per_filter_config": _disabled(*_MODEL_FILTERS)}))


@lru_cache(8192)
def _rest(path: str, cluster: str) -> bytes:
    """Return the serialized route of calls over REST. They may run twice, and are retried as those over gRPC are."""
    route = _apart(_route({"path_separated_prefix": path}, cluster, f"{_IDEMPOTENT},retriable-status-codes"))
    # UNAVAILABLE over REST.
    route["route"]["retry_policy"]["retriable_status_codes"] = [503]
    return bytes(Route.from_dict({**route, "typed_per_filter_config": _disabled(*_MODEL_FILTERS)}))


@lru_cache(8192)
def _rest_steps(path: str, cluster: str) -> tuple[bytes, ...]:
    """Return the serialized routes of a model with sequences: a filter reads the sequence, and Envoy selects anew.

    A step may not run twice. The other endpoint of a retry rejects it unless it starts the sequence.
    """

    def route(method: str | None, sequence: dict[str, Any]) -> dict[str, Any]:
        headers: list[dict[str, Any]] = [{"name": SEQUENCE_HEADER, **sequence}]
        if method is not None:
            headers.append({"name": ":method", "string_match": {"exact": method}})
        match = {"path_separated_prefix": path, "headers": headers}
        return {**_apart(_route(match, cluster, _ALWAYS)), "typed_per_filter_config": _disabled(*_MODEL_FILTERS)}

    unread = route("POST", {"present_match": True, "invert_match": True})
    unread["route"]["idle_timeout"] = _MESSAGE_IDLE
    unread = Route.from_dict(unread)
    unread.typed_per_filter_config[REST_STEP_FILTER] = _ENABLED
    step = route(None, {"string_match": {"exact": NO_SEQUENCE}, "invert_match": True})
    step["route"]["hash_policy"] = [{"header": {"header_name": SEQUENCE_HEADER}}]
    return bytes(unread), bytes(Route.from_dict(step)), _rest(path, cluster)


@lru_cache(64)
def _rest_elsewhere(routes: RestRoutes) -> tuple[bytes, ...]:
    """Return the serialized routes of paths that one cluster serves."""
    headers = [{"name": name, "string_match": {"safe_regex": {"regex": regex}}} for name, regex in routes.headers]
    found = []
    for path in routes.paths:
        # Envoy looks at the headers first, for each call: comparing is cheaper than a regular expression.
        for method in path.methods:
            named = {"name": ":method", "string_match": {"exact": method}}
            match = {"safe_regex": {"regex": path.pattern}, "headers": [named, *headers]}
            route = _route(match, routes.cluster, _IDEMPOTENT if routes.is_idempotent else _ALWAYS)
            route["route"]["idle_timeout"] = _UNTIL_FULL
            found.append(bytes(Route.from_dict({**route, "typed_per_filter_config": _disabled(*_MODEL_FILTERS)})))
    return tuple(found)


@lru_cache(2)
def _action(all_idempotent: bool) -> bytes:
    """Return the serialized action of a route, without its cluster."""
    action = _route({}, "", _IDEMPOTENT if all_idempotent else _ALWAYS)["route"]
    del action["cluster"]
    return bytes(RouteAction.from_dict(action))


@lru_cache(1)
def _no_path() -> bytes:
    """Return the first route, which rejects paths that are not ASCII.

    A path that is not UTF-8 would end a grpc.aio server.
    """
    ascii_only = {"string_match": {"safe_regex": {"regex": "[!-~]*"}}, "invert_match": True}
    match = {"prefix": "/", "headers": [{"name": ":path", **ascii_only}]}
    return bytes(Route.from_dict({"match": match, "direct_response": {"status": 404}}))


def _compressed(service: ServiceRoutes) -> bytes:
    """Return the route of compressed messages to any instance: the extraction filter would reject these messages."""
    encoding = {"name": "grpc-encoding"}
    match = {
        "prefix": service.prefix,
        "headers": [
            {**encoding, "present_match": True},
            {**encoding, "string_match": {"exact": "identity"}, "invert_match": True},
        ],
    }
    route = _route(match, service.cluster, _IDEMPOTENT if service.all_idempotent else _ALWAYS)
    disabled = _disabled(BODY_FILTER, EXTRACTION_FILTER, STEP_EXTRACTION_FILTER)
    return bytes(Route.from_dict({**route, "typed_per_filter_config": disabled}))


def _route(match: dict[str, Any], cluster: str, retry_on: str | None) -> dict[str, Any]:
    """Return a route to `cluster`. `retry_on`: failures after which Envoy repeats a call; None: it repeats none."""
    route = {
        "cluster": cluster,
        # The default of 15 s would end long inferences and watches. No max_stream_duration: the instance ends a
        # call at its deadline, with a status. Envoy would be as early, and reset a stream whose response has begun.
        "timeout": "0s",
        "idle_timeout": "0s",
    }
    return {"match": match, "route": route if retry_on is None else {**route, "retry_policy": _retries(retry_on)}}


def _apart(route: dict[str, Any]) -> dict[str, Any]:
    """Let the calls of a route use other connections to the instances: Envoy has some for each of its two priorities.

    Calls on one connection reach an instance in the order in which Envoy wrote them. Thousands of streams that begin,
    or large texts over REST, would delay plain calls.
    """
    route["route"]["priority"] = "HIGH"
    return route


def _retries(retry_on: str) -> dict[str, Any]:
    return {
        "retry_on": retry_on,
        # A call with the header is not retried at all. Envoy removes its own headers for retries from the calls of
        # clients, since they can ask for more retries, too.
        "retriable_request_headers": [{"name": NO_RETRY_HEADER, "present_match": True, "invert_match": True}],
        # The bound also limits the damage of a poison request, which kills each instance that runs it.
        "num_retries": 2,
        "retry_back_off": {"base_interval": "0.01s", "max_interval": "0.1s"},
        # Avoid the instance that just failed. Otherwise half of the retries between two replicas go there.
        "retry_host_predicate": [
            {"name": "envoy.retry_host_predicates.previous_hosts", "typed_config": typed(PreviousHostsPredicate)}
        ],
        # The hash of a sequence gives the same order of instances at each retry: enough of them to find one.
        "host_selection_retry_max_attempts": 50,
    }
