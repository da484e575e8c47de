"""Calls from web pages: host names of a gateway, origins of pages (CORS), and gRPC-Web.

    browser ──> host name? 421 ──> origin? CORS, 403 ──> gRPC-Web ──> authentication ──> routes

A page that the user of this machine opens could call an address that only this machine reaches. Its requests have a
foreign Origin, or, after the page's name was pointed at this machine (DNS rebinding), a foreign Host. Names and origins
are in the routes, so a change closes no connection. This module imports nothing of Envoy's classes, which take most of
a second to import.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mesh.process.sockets import is_local

ANY = "*"

_FILTERS = "type.googleapis.com/envoy.extensions.filters.http"
_CORS = "envoy.filters.http.cors"
_GRPC_WEB = "envoy.filters.http.grpc_web"

TEXT_CALL: Mapping[str, Any] = {
    "name": "content-type",
    "string_match": {"prefix": "application/grpc-web-text", "ignore_case": True},
}
"""Match of the text form of gRPC-Web. Its route must repeat no call: while Envoy keeps a request for that, and a piece
of the text has less than four bytes, the instance gets what was kept a second time (Envoy 1.39.3)."""

# Request headers of gRPC-Web, of JSON calls and of Triton's clients, beside those that a browser always allows.
_ALLOWED_HEADERS = (
    "authorization,content-encoding,content-type,grpc-timeout,idempotency-key,inference-header-content-length,prefer,"
    "traceparent,tracestate,x-grpc-web,x-shoal-no-retry,x-shoal-tenant,x-user-agent"
)
# Without it, a page cannot read the status of a call.
_EXPOSED_HEADERS = (
    "grpc-status,grpc-message,inference-header-content-length,location,preference-applied,retry-after,retry-after-ms,"
    "shoal-trace,x-ratelimit-limit,x-ratelimit-remaining,x-ratelimit-reset"
)
_OTHER_NAME = "this server has another name: call it by its address, or add the name to 'hosts' of its policy"
# A browser asks again after so many seconds: the longest time for which it believes an origin that was removed.
_PREFLIGHT_S = 600


@dataclass(frozen=True)
class Web:
    """Names and pages that a gateway serves."""

    hosts: tuple[str, ...] = (ANY,)
    """Host names without ports; `*.` may begin one. Other names are refused with 421."""
    origins: tuple[str, ...] = ()
    """Origins of pages that may call, such as `https://app.example.com`. Other pages are refused with 403."""


def web_of(listen: str) -> Web:
    """Return what a gateway at `listen`, `host:port`, serves without a policy: no page, and on loopback local names."""
    if not is_local(listen):
        return Web()
    host = listen.rpartition(":")[0].lower()
    return Web(tuple(dict.fromkeys(("localhost", "127.0.0.1", "[::1]", host))))


def filters() -> list[dict[str, Any]]:
    """Return the HTTP filters before authentication."""
    return [
        {"name": _CORS, "typed_config": {"@type": f"{_FILTERS}.cors.v3.Cors"}},
        {"name": _GRPC_WEB, "typed_config": {"@type": f"{_FILTERS}.grpc_web.v3.GrpcWeb"}},
    ]


def virtual_hosts(web: Web, served: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the virtual hosts of a route configuration: `served`, without name and domains, and a refusal.

    The configuration must ignore ports in host names. The first route must be `foreign_page`; it is added to the routes
    of `served` if there are some.
    """
    host = {**served, "name": "served", "typed_per_filter_config": {_CORS: _cors(web)}}
    if "routes" in served:
        host["routes"] = [foreign_page(web), *served["routes"]]
    if ANY in web.hosts:
        return [{**host, "domains": [ANY]}]
    refusal = {"status": 421, "body": {"inline_string": _OTHER_NAME}}
    other = {"name": "other", "domains": [ANY], "routes": [{"match": {"prefix": "/"}, "direct_response": refusal}]}
    return [{**host, "domains": list(web.hosts)}, other]


def _cors(web: Web) -> dict[str, Any]:
    return {
        "@type": f"{_FILTERS}.cors.v3.CorsPolicy",
        "allow_origin_string_match": [{"exact": origin} for origin in web.origins],
        "allow_methods": "GET,POST,PUT,DELETE,OPTIONS",
        "allow_headers": _ALLOWED_HEADERS,
        "expose_headers": _EXPOSED_HEADERS,
        "max_age": str(_PREFLIGHT_S),
        # By default a service would get them, without authentication.
        "forward_not_matching_preflights": False,
    }


def foreign_page(web: Web) -> dict[str, Any]:
    """Return the first route, which refuses requests of pages with another origin: CORS only hides the response."""
    ours = [{"name": "origin", "string_match": {"exact": origin}, "invert_match": True} for origin in web.origins]
    headers = [{"name": "origin", "present_match": True}, *ours]
    text = "pages of this origin may not call: see 'cors' of the server's policy"
    return {
        "match": {"prefix": "/", "headers": headers},
        "direct_response": {"status": 403, "body": {"inline_string": text}},
    }
