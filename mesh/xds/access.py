"""Envoy's part of a policy: tokens, roles and RPCs. Plain data for files and for ADS.

    early removal of x-shoal-* ──> (mesh.xds.web) ──> callers: jwt_authn ──> rules: RBAC ──> router
                                                         │
                                                         └── x-shoal-caller, -issuer, -role, -key, -tenant, -signer

`callers` and `rules` are extension configurations (ECDS); host names and web pages are in the routes (RDS). A changed
listener would be in force late, and would close connections. A worker of Envoy takes up `callers` and `rules` one after
the other, so coord reports a policy as enforced when its Envoys have acknowledged both. Fields:
envoy.extensions.filters.http.jwt_authn.v3 and envoy.extensions.filters.http.rbac.v3. This module imports nothing of
Envoy's classes, which take most of a second.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shoal.access.caller_header import (
    CALLER_HEADER,
    ISSUER_HEADER,
    KEY_HEADER,
    ROLE_HEADER,
    SIGNER_HEADER,
    SUBJECT_HEADER,
    TRUSTED_PREFIX,
)
from shoal.access.cluster import signer_in
from shoal.access.gateway import groups_of_role, named_roles, rpcs_of
from shoal.access.policy import VERIFYING_FIELDS, Issuer, Policy
from shoal.access.rest_paths import patterns_of
from shoal.access.tokens import jose_header
from shoal.tenant_header import TENANT_HEADER

_API = "type.googleapis.com"
_FILTERS = f"{_API}/envoy.extensions.filters.http"
JWT = f"{_FILTERS}.jwt_authn.v3.JwtAuthentication"
RBAC = f"{_FILTERS}.rbac.v3.RBAC"

CALLERS, RULES = "shoal.callers", "shoal.rules"
"""Names of the filters that follow the policy."""

# Verified tokens that a worker thread of Envoy keeps for good: keys of all signers of the cluster together, tokens of
# all other issuers together, at least of each, and the size of one. It takes 15 times its size, or 45 times if it has
# many small claims: 2,048 of 4 kB for each issuer and thread were more than the heap. A key takes 6 kB. Verification
# costs 0.1 ms, a look-up 10 us.
_CACHED_KEYS, _CACHED_TOKENS, _LEAST_CACHED, _CACHED_BYTES = 2048, 1024, 64, 2048
# Metadata of jwt_authn with the header of a verified token.
_TOKEN_HEADER = "token"
# Set for tokens whose key id only that metadata has.
_UNSEEN_HEADER = f"{TRUSTED_PREFIX}unseen-key-id"
_OWN_HEADERS = (ISSUER_HEADER, KEY_HEADER, ROLE_HEADER, SUBJECT_HEADER, _UNSEEN_HEADER)
TOKEN_REMOVAL: Mapping[str, Any] = {
    "request_headers_to_remove": ["authorization", *_OWN_HEADERS],
    "request_headers_to_add": [
        {
            "header": {
                "key": SIGNER_HEADER,
                "value": f"%DYNAMIC_METADATA(envoy.filters.http.jwt_authn:{_TOKEN_HEADER}:kid)%",
            },
            "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
        }
    ],
}
"""Part of a virtual host: a service never sees a token, also where none is required, nor what only filters here read.
The service sees the signer's id, unless the issuer's name has it."""

# Provider for calls without a bearer token: it looks into a header that no caller can send.
_NOBODY, _NO_HEADER = "nobody", f"{TRUSTED_PREFIX}none"
_HAS_COMMA: Mapping[str, Any] = {"name": "authorization", "string_match": {"contains": ","}}
# An empty map is refused by Envoy. No header has this value.
_NOTHING = " "


def filters(source_of: Callable[[str], Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the filters of a gateway. `source_of` returns the config source of the extension of that name."""
    return [_discovered(CALLERS, JWT, source_of), _discovered(RULES, RBAC, source_of)]


def _discovered(name: str, type_url: str, source_of: Callable[[str], Mapping[str, Any]]) -> dict[str, Any]:
    return {"name": name, "config_discovery": {"config_source": source_of(name), "type_urls": [type_url]}}


def removal(kept: str = "") -> dict[str, Any]:
    """Return the removal of all headers that services trust from a client's request. Clients may set only `kept`."""
    mutation = f"{_API}/envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation"
    trusted: dict[str, Any] = {"prefix": TRUSTED_PREFIX, "ignore_case": True}
    if kept:
        trusted = {"safe_regex": {"regex": _other_than(TRUSTED_PREFIX, kept)}}
    # A header with underscores could be taken for the same one.
    matchers = (trusted, {"prefix": TRUSTED_PREFIX.replace("-", "_"), "ignore_case": True})
    mutations = [{"remove_on_match": {"key_matcher": matcher}} for matcher in matchers]
    return {"name": "trusted", "typed_config": {"@type": mutation, "mutations": mutations}}


def _other_than(prefix: str, name: str) -> str:
    """Return a regular expression for all texts with `prefix` but `name`. Envoy's have no negation."""
    rest = name.removeprefix(prefix)
    ends = [f"{re.escape(rest[:at])}([^{char}].*)?" for at, char in enumerate(rest)]
    # With the first character, RE2 looks for the prefix before anything else: most headers do not have it.
    return f"^{re.escape(prefix)}({'|'.join([*ends, re.escape(rest) + '.+'])})"


def _has_no_key_id() -> dict[str, Any]:
    """Return a predicate of tokens without a key id, or with an empty one. Envoy tries each key for them.

    A rule of `callers` has seen the ids of the cluster's own keys.
    """
    metadata_input = f"{_API}/envoy.extensions.matching.common_inputs.network.v3.DynamicMetadataInput"
    metadata = f"{_API}/envoy.extensions.matching.input_matchers.metadata.v3.Metadata"
    path = [{"key": _TOKEN_HEADER}, {"key": "kid"}]
    kid = {"@type": metadata_input, "filter": "envoy.filters.http.jwt_authn", "path": path}
    text = {"@type": metadata, "value": {"string_match": {"safe_regex": {"regex": ".+"}}}, "invert": True}
    unseen = {"input": _input(_UNSEEN_HEADER), "value_match": {"safe_regex": {"google_re2": {}, "regex": ".+"}}}
    no_id = {"input": {"name": "kid", "typed_config": kid}, "custom_match": {"name": "text", "typed_config": text}}
    return {"and_matcher": {"predicate": [{"single_predicate": unseen}, {"single_predicate": no_id}]}}


def callers(policy: Policy, services: Sequence[str], *, has_subject: bool = False) -> dict[str, Any]:
    """Return the filter that verifies tokens, and passes their claims on as headers, with `has_subject` the subject.

    Keys of the cluster are known by their first part, which has the signer's id: their metadata is not needed, and
    costs Envoy ten thousand instructions a call.
    """
    providers = {f"issuer-{number}": issuer for number, issuer in enumerate(policy.issuers)}
    prefixed = {issuer.token_prefix for issuer in policy.issuers} - {""}
    open_rpcs = rpcs_of(policy.open, services)
    open_paths: list[dict[str, Any]] = [{"match": {"path": path}} for path in open_rpcs]
    open_paths += [{"match": {"safe_regex": {"regex": pattern}}} for pattern in patterns_of(open_rpcs)]
    signers = {f"signer-{number}": issuer for number, issuer in enumerate(policy.issuers) if _own_signer(issuer)}
    by_signer = [
        {"match": {"prefix": "/", "headers": [_is_of(issuer)]}, "requires": {"provider_name": name}}
        for name, issuer in signers.items()
    ]
    by_prefix = [
        {
            "match": {
                "prefix": "/",
                "headers": [_begins_with(f"Bearer {prefix}")],
            },
            "requires": _one_of([name for name, issuer in providers.items() if issuer.token_prefix == prefix]),
        }
        for prefix in sorted(prefixed)
    ]
    foreign = [name for name, issuer in providers.items() if not issuer.token_prefix]
    bearer = {
        "match": {"prefix": "/", "headers": [_begins_with("Bearer ")]},
        "requires": _one_of(foreign or list(providers)),
    }
    # Envoy joins several headers with commas, which no token has. It would take the first or the last that it can read.
    several = {"match": {"prefix": "/", "headers": [_HAS_COMMA]}, "requires": {"provider_name": _NOBODY}}
    rest = {"match": {"prefix": "/"}, "requires": {"provider_name": _NOBODY}}
    if not providers:
        return {"@type": JWT}
    own = len(providers) - len(foreign)
    verifying = {}
    for name, issuer in providers.items():
        cached = _CACHED_KEYS // own if issuer.token_prefix else _CACHED_TOKENS // len(foreign)
        verifying[name] = _provider(issuer, max(cached, _LEAST_CACHED), has_subject=has_subject)
    for name, issuer in signers.items():
        cached = max(_CACHED_KEYS // own, _LEAST_CACHED)
        verifying[name] = _provider(issuer, cached, has_subject=has_subject, is_seen=True)
    # A call must not pass because no rule is for it.
    verifying[_NOBODY] = {**next(iter(verifying.values())), "from_headers": [{"name": _NO_HEADER}]}
    return {
        "@type": JWT,
        "providers": verifying,
        "rules": [*open_paths, several, *by_signer, *by_prefix, bearer, rest],
    }


def _own_signer(issuer: Issuer) -> str:
    """Return the signer's id for an issuer that is one signer of a cluster, with its only key; else an empty text."""
    ids = [key.get("kid") for key in (issuer.jwks or {}).get("keys", ())]
    named = signer_in(issuer.issuer)
    return named if issuer.token_prefix and ids == [named] else ""


def _is_of(issuer: Issuer) -> dict[str, Any]:
    """Return a match of the keys of a cluster's signer, as its clients write them. Other spellings take other rules."""
    prefix = f"Bearer {issuer.token_prefix}{jose_header(_own_signer(issuer))}."
    return {"name": "authorization", "string_match": {"prefix": prefix}}


def _begins_with(prefix: str) -> dict[str, Any]:
    """Return a match of the header 'authorization'. The scheme has any case (RFC 9110)."""
    return {"name": "authorization", "string_match": {"prefix": prefix, "ignore_case": True}}


def _one_of(providers: Sequence[str]) -> dict[str, Any]:
    requirements = [{"provider_name": name} for name in providers]
    return requirements[0] if len(requirements) == 1 else {"requires_any": {"requirements": requirements}}


def _provider(issuer: Issuer, cached: int, *, has_subject: bool, is_seen: bool = False) -> dict[str, Any]:
    """Return the verification of an issuer's tokens; with `is_seen`, of those whose key id a rule has seen.

    `cached`: verified tokens that are kept.
    """
    claims = issuer.claim_names
    keys = (issuer.jwks or {}).get("keys", ())
    public = [{name: key[name] for name in VERIFYING_FIELDS if name in key} for key in keys]
    named = {
        ISSUER_HEADER: "iss",
        KEY_HEADER: claims.key,
        ROLE_HEADER: None if issuer.role else claims.role,
        # No claim names a fixed tenant, which services take from the policy. Shares of time and memory go by the
        # header, before the caller is known, and so by the issuer.
        TENANT_HEADER: "iss" if issuer.tenant else claims.tenant,
        SUBJECT_HEADER: claims.subject if has_subject else None,
        _UNSEEN_HEADER: None if is_seen else "iss",
    }
    return {
        "issuer": issuer.issuer,
        "audiences": list(issuer.audiences),
        "local_jwks": {"inline_string": json.dumps({"keys": public})},
        "forward": False,
        "clock_skew_seconds": issuer.clock_skew_s,
        # Without it, a token without an expiry is valid for ever.
        "require_expiration": True,
        # Envoy looks for the prefix anywhere in the header, and minds its case. The rules have matched the scheme.
        "from_headers": [{"name": "authorization", "value_prefix": f" {issuer.token_prefix}"}],
        "forward_payload_header": CALLER_HEADER,
        "claim_to_headers": [{"header_name": header, "claim_name": claim} for header, claim in named.items() if claim],
        **({} if is_seen else {"header_in_metadata": _TOKEN_HEADER}),
        "jwt_cache_config": {"jwt_cache_size": cached, "jwt_max_token_size": _CACHED_BYTES},
    }


def rules(policy: Policy, services: Sequence[str]) -> dict[str, Any]:
    """Return the filter that refuses tokens without a key id, revoked keys, and RPCs that no grant allows to the role.

    A further filter for the key ids would cost each call 8 thousand instructions.
    """
    by_role = _tree(
        ROLE_HEADER,
        {role: _paths(policy, role, services) for role in sorted(named_roles(policy))},
        otherwise=_paths(policy, "", services),
    )
    by_issuer = {
        issuer.issuer: _paths(policy, issuer.role, services) if issuer.role else by_role for issuer in policy.issuers
    }
    open_paths = _rpcs(rpcs_of(policy.open, services), "open", _action("default", "DENY"))
    revoked = {key: _action("revoked", "DENY") for key in policy.revoked}
    decided = _tree(KEY_HEADER, revoked, _tree(ISSUER_HEADER, by_issuer, open_paths))
    no_id = {"predicate": _has_no_key_id(), "on_match": _action("no-key-id", "DENY")}
    return {"@type": RBAC, "matcher": {"matcher_list": {"matchers": [no_id]}, "on_no_match": decided}}


def _paths(policy: Policy, role: str, services: Sequence[str]) -> dict[str, Any] | None:
    """Return a matcher of the RPCs that `role` may call; None when there are none."""
    paths = rpcs_of(groups_of_role(policy, role), services)
    return _rpcs(paths, "granted") if paths else None


def _rpcs(paths: Sequence[str], name: str, otherwise: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return a matcher that allows RPCs, and their paths over REST."""
    allowed = _action(name, "ALLOW")
    rest = [{"predicate": _path_is(pattern), "on_match": allowed} for pattern in patterns_of(paths)]
    if rest:
        found: dict[str, Any] = {"matcher_list": {"matchers": rest}}
        otherwise = {"matcher": found if otherwise is None else {**found, "on_no_match": otherwise}}
    return _tree(":path", dict.fromkeys(paths, allowed), otherwise)


def _path_is(pattern: str) -> dict[str, Any]:
    value = {"safe_regex": {"google_re2": {}, "regex": pattern}}
    return {"single_predicate": {"input": _input(":path"), "value_match": value}}


def _tree(header: str, entries: Mapping[str, Any], otherwise: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return a matcher that looks `header` up. A value without an entry, or that its entry does not match, goes on with
    `otherwise`."""
    there = {value: entry for value, entry in entries.items() if entry is not None}
    matcher: dict[str, Any] = {
        "matcher_tree": {
            "input": _input(header),
            "exact_match_map": {"map": there or {_NOTHING: _action("nothing", "DENY")}},
        }
    }
    if otherwise is not None:
        matcher["on_no_match"] = otherwise
    return {"matcher": matcher}


def _input(header: str) -> dict[str, Any]:
    header_input = f"{_API}/envoy.type.matcher.v3.HttpRequestHeaderMatchInput"
    return {"name": "header", "typed_config": {"@type": header_input, "header_name": header}}


def _action(name: str, action: str) -> dict[str, Any]:
    typed = {"@type": f"{_API}/envoy.config.rbac.v3.Action", "name": name, "action": action}
    return {"action": {"name": name, "typed_config": typed}}


def closed_rules() -> dict[str, Any]:
    """Return the filter that refuses every call, for as long as no policy is known."""
    return {"@type": RBAC, "matcher": {"on_no_match": _action("closed", "DENY")}}


def extension(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the envoy.config.core.v3.TypedExtensionConfig of a filter."""
    return {"@type": f"{_API}/envoy.config.core.v3.TypedExtensionConfig", "name": name, "typed_config": config}
