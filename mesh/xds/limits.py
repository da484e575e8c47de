"""Envoy's part of the limits of a policy: requests a second, in filters after those of mesh.xds.access. Plain data.

    rules: RBAC ──> limits-0 ──> ... ──> limits-3 ──> router         a filter for each layer; unused ones are disabled
                       └── issuer? tenant? role? subject? ──> bucket {limit, tenant[, key]} ──> share of coord

The buckets are named by headers that the filter of callers has set. A filter is an extension configuration (ECDS), and
enabled by the routes (RDS), so that a change closes no connection. Fields:
envoy.extensions.filters.http.rate_limit_quota.v3.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shoal.access.caller_header import (
    CALLER_HEADER,
    ISSUER_HEADER,
    KEY_HEADER,
    ROLE_HEADER,
    SERVICE,
    SUBJECT_HEADER,
)
from shoal.access.limits import LAYERS, Bucket, Case, Kind, Split, amount_of, case_of, layers, rate_limit_field
from shoal.access.policy import ANY, Limit, Policy
from shoal.errors import RATE_LIMIT_KEY, RETRY_AFTER_KEY
from shoal.tenant_header import TENANT_HEADER

_API = "type.googleapis.com"
QUOTA = f"{_API}/envoy.extensions.filters.http.rate_limit_quota.v3.RateLimitQuotaFilterConfig"
_SETTINGS = f"{_API}/envoy.extensions.filters.http.rate_limit_quota.v3.RateLimitQuotaBucketSettings"

NAMES = tuple(f"shoal.limits-{number}" for number in range(LAYERS))
"""Names of the filters."""
DOMAIN = "shoal"
LIMIT, _TENANT, _KEY = "limit", "tenant", "key"

# Longest part of a bucket's name that coord takes: that of a name, with some room for tokens of foreign issuers.
_PART = 512
_HEADERS = {"tenant": TENANT_HEADER, "role": ROLE_HEADER, "subject": SUBJECT_HEADER}
# Time that an expired share is replaced: as long as nobody renews it.
_EXPIRED_S = "315360000s"
_REPORTS_S = "5s"

# An empty map is refused by Envoy. No header has this value.
_NOTHING = " "
# Tenants of a policy whose buckets have fixed ids, and these buckets: limits of many subjects have one of each tenant
# for each subject. A bucket takes 0.3 ms of coord for a change, and 3 kB of Envoy.
_FIXED_TENANTS, _FIXED_BUCKETS = 128, 512
# Without the builder of an id, a call counts nowhere.
_NO_LIMIT: Mapping[str, Any] = {
    "action": {
        "name": "no limit",
        "typed_config": {
            "@type": _SETTINGS,
            "reporting_interval": _REPORTS_S,
            "no_assignment_behavior": {"fallback_rate_limit": {"blanket_rule": "ALLOW_ALL"}},
        },
    }
}


def bucket_of_id(found: Mapping[str, str]) -> Bucket | None:
    """Return the bucket with the id of Envoy; None when Shoal has made no such id."""
    if LIMIT not in found or not found.keys() <= {LIMIT, _TENANT, _KEY} or any(len(v) > _PART for v in found.values()):
        return None
    return Bucket(found[LIMIT], Kind.REQUESTS, found.get(_TENANT, ""), found.get(_KEY, ""))


def id_of_bucket(bucket: Bucket) -> dict[str, str]:
    """Return Envoy's id of a bucket. Tokens without an id have a bucket without the key."""
    parts = {LIMIT: bucket.limit, _TENANT: bucket.tenant, _KEY: bucket.key}
    return {name: value for name, value in parts.items() if value}


def filters(source_of: Callable[[str], Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the filters of a gateway, disabled. `source_of` returns the config source of an extension."""
    return [
        {"name": name, "config_discovery": {"config_source": source_of(name), "type_urls": [QUOTA]}, "disabled": True}
        for name in NAMES
    ]


def needs_subject(policy: Policy) -> bool:
    """Return True when the limits of a gateway depend on the subjects of callers."""
    return any(_reads_subject(case_of(layer)) for layer in layers(policy.limits))


def _reads_subject(case: Case) -> bool:
    if not isinstance(case, Split):
        return False
    return case.field == "subject" or any(map(_reads_subject, (*case.entries.values(), case.otherwise)))


def quotas(policy: Policy | None, cluster: str) -> list[dict[str, Any]]:
    """Return the configuration of each filter. Those after the layers of the policy count nothing."""
    found = [] if policy is None else layers(policy.limits)
    named = [] if policy is None else _named_tenants(policy, found)
    matchers = [_matcher(policy, layer, named) for layer in found] if policy is not None else []
    return [_quota(matcher, cluster) for matcher in (*matchers, *[None] * (LAYERS - len(matchers)))]


def layers_of(policy: Policy | None) -> int:
    """Return the number of filters that a policy needs."""
    return 0 if policy is None else len(layers(policy.limits))


def _quota(matcher: Mapping[str, Any] | None, cluster: str) -> dict[str, Any]:
    return {
        "@type": QUOTA,
        "rlqs_server": {
            "envoy_grpc": {"cluster_name": cluster},
            "initial_metadata": [{"key": CALLER_HEADER, "value": SERVICE.decode()}],
        },
        "domain": DOMAIN,
        "bucket_matchers": matcher or _tree(ISSUER_HEADER, {}),
    }


def _matcher(policy: Policy, layer: Sequence[Limit], named: Sequence[str]) -> dict[str, Any]:
    """Return the matcher of a layer. An issuer of the policy may give all its callers one tenant or role."""
    by_header = _on_match(case_of(layer), None, named)
    fixed = {
        issuer.issuer: _on_match(case_of(layer, tenant=issuer.tenant, role=issuer.role), issuer.tenant, named)
        for issuer in policy.issuers
        if issuer.tenant or issuer.role
    }
    return _tree(ISSUER_HEADER, fixed, by_header)


def _named_tenants(policy: Policy, found: Sequence[Sequence[Limit]]) -> list[str]:
    """Return tenants that grants name, _FIXED_TENANTS at most, with _FIXED_BUCKETS at most in the layers `found`."""
    readers = sum(_tenant_readers(case_of(layer)) for layer in found)
    readers *= 1 + sum(issuer.role is not None and issuer.tenant is None for issuer in policy.issuers)
    most = min(_FIXED_TENANTS, _FIXED_BUCKETS // max(1, readers))
    return sorted({tenant for grant in policy.grants for tenant in grant.tenants} - {ANY})[:most]


def _tenant_readers(case: Case) -> int:
    """Return the number of buckets of a case whose id has the tenant of a header."""
    if not isinstance(case, Split):
        return int(case is not None and case.per != "key")
    others = _tenant_readers(case.otherwise)
    return others if case.field == "tenant" else others + sum(map(_tenant_readers, case.entries.values()))


def _on_match(case: Case, tenant: str | None, named: Sequence[str]) -> dict[str, Any] | None:
    """Return the match of a case; None when it has no limit. `tenant` is the callers', if it is known.

    Envoy makes the reader of a header anew for each call and each part of an id that a header has: 15 of the 45
    thousand instructions that a limit costs. So the ids of `named` tenants are fixed, and a look-up finds them.
    """
    if case is None:
        return None
    if isinstance(case, Split):
        is_tenant = case.field == "tenant"
        entries = {
            value: _on_match(entry, value if is_tenant else tenant, named) for value, entry in case.entries.items()
        }
        # A tenant that the split has does not get to its rest.
        others = [name for name in named if name not in case.entries] if is_tenant else named
        return {"matcher": _tree(_HEADERS[case.field], entries, _on_match(case.otherwise, tenant, others))}
    if case.per != "key":
        if tenant or not named:
            return _bucket(case, tenant)
        return {"matcher": _tree(TENANT_HEADER, {name: _bucket(case, name) for name in named}, _bucket(case))}
    has_key = {"input": _input(KEY_HEADER), "value_match": {"safe_regex": {"google_re2": {}, "regex": ".+"}}}
    matchers = [{"predicate": {"single_predicate": has_key}, "on_match": _bucket(case, tenant, has_key=True)}]
    return {"matcher": {"matcher_list": {"matchers": matchers}, "on_no_match": _bucket(case, tenant)}}


def _tree(
    header: str, entries: Mapping[str, Mapping[str, Any] | None], otherwise: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return a matcher by a header. None is no limit: without an action, a call would go on with an outer matcher."""
    there = {value: _NO_LIMIT if entry is None else entry for value, entry in entries.items()}
    return {
        "matcher_tree": {"input": _input(header), "exact_match_map": {"map": there or {_NOTHING: _NO_LIMIT}}},
        "on_no_match": _NO_LIMIT if otherwise is None else otherwise,
    }


def _input(header: str) -> dict[str, Any]:
    typed = {"@type": f"{_API}/envoy.type.matcher.v3.HttpRequestHeaderMatchInput", "header_name": header}
    return {"name": header, "typed_config": typed}


def _bucket(limit: Limit, tenant: str | None = None, *, has_key: bool = False) -> dict[str, Any]:
    """Return the action that counts a request in the bucket of a limit."""
    amount = amount_of(limit, Kind.REQUESTS)
    assert amount is not None
    parts: dict[str, Any] = {
        LIMIT: {"string_value": limit.name},
        _TENANT: {"string_value": tenant} if tenant else {"custom_value": _input(TENANT_HEADER)},
    }
    if has_key:
        parts[_KEY] = {"custom_value": _input(KEY_HEADER)}
    # Envoy 1.39 crashes when a token bucket stands here. Its first share comes within milliseconds.
    no_share = {"blanket_rule": "DENY_ALL" if limit.unrenewed == "deny" else "ALLOW_ALL"}
    wait_s = max(1.0 / amount.amount, 0.1)
    wait_ms = round(wait_s * 1000)
    text = (
        f"limit {limit.name!r} of the policy: a {limit.per} has {limit.requests_per_second:g} requests a second: "
        f"retry in {wait_ms} ms, or ask the operator for a higher requests_per_second"
    )
    headers = {
        RETRY_AFTER_KEY: str(wait_ms),
        # Clients of HTTP know this one only, in whole seconds.
        "retry-after": str(math.ceil(wait_s)),
        RATE_LIMIT_KEY: rate_limit_field(limit.name, Kind.REQUESTS, amount.amount),
        "x-ratelimit-remaining": "0",
        "x-ratelimit-reset": str(math.ceil(wait_s)),
        # For gRPC-Web, whose calls are plain HTTP to this filter.
        "grpc-status": "8",
        "grpc-message": text,
    }
    settings: dict[str, Any] = {
        "@type": _SETTINGS,
        "bucket_id_builder": {"bucket_id_builder": parts},
        "reporting_interval": _REPORTS_S,
        "no_assignment_behavior": {"fallback_rate_limit": no_share},
        "deny_response_settings": {
            "http_status": {"code": "TooManyRequests"},
            "http_body": {"value": base64.b64encode(text.encode()).decode()},
            "grpc_status": {"code": 8, "message": text},
            "response_headers_to_add": [{"header": {"key": key, "value": value}} for key, value in headers.items()],
        },
    }
    if limit.unrenewed != "keep":
        settings["expired_assignment_behavior"] = {
            "expired_assignment_behavior_timeout": _EXPIRED_S,
            "fallback_rate_limit": no_share,
        }
    return {"action": {"name": limit.name, "typed_config": settings}}
