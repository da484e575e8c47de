"""Texts of the responses that Envoy itself makes: each names its cause, and what to send.

    cause of Envoy (RESPONSE_CODE_DETAILS) ──> text ──> form of the call: a JSON call, the REST of inference, or gRPC
                                                 └────> reason in the audit log

Field: envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.local_reply_config. The first
mapper that matches counts. This module imports nothing of Envoy's classes, which take most of a second to import.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoal.access.rest_paths import PREFIX

_SAID = "%LOCAL_REPLY_BODY%"
# Envoy's own texts, which its details have without spaces, or not at all.
_SAID_IN = re.compile(r"jwt_authn_access_denied\{(.+)\}")
_RBAC, _RBAC_SAID = "rbac_access_denied", "RBAC: access denied"
_CEL = "type.googleapis.com/envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter"
# Codes of google.rpc.Status in the errors of JSON calls. Other statuses are UNKNOWN.
_CODES = {400: 3, 401: 16, 403: 7, 404: 5, 408: 4, 413: 8, 415: 3, 429: 8, 431: 8, 503: 14, 504: 4}
_UNKNOWN = 2


@dataclass(frozen=True)
class Cause:
    """One cause of a refusal, and the text for it."""

    status: int
    """HTTP status; over gRPC, its status follows from that."""
    details: str
    """Part of Envoy's RESPONSE_CODE_DETAILS; empty: any."""
    text: str
    without: str = ""
    """Name of a header that the request lacks; empty: any request."""


_NO_CALL = "there is no such call: check the path and the method"
_MAKES_ONE = "(`shoal keys create` makes one)"
_CAUSES = (
    Cause(
        401,
        "Jwt_is_missing",
        "no key: send 'authorization: Bearer shoal_...' (`shoal keys create` makes a key)",
        without="authorization",
    ),
    Cause(
        401,
        "Jwt_is_missing",
        f"the header 'authorization' has no key, or more than one: send one 'Bearer shoal_...' in it {_MAKES_ONE}",
    ),
    Cause(401, "Jwt_is_expired", f"{_SAID}: the key has expired: send another one {_MAKES_ONE}"),
    Cause(
        401, "Jwt_not_yet_valid", f"{_SAID}: the token begins later: compare the clocks of its issuer and the gateway"
    ),
    Cause(
        401,
        "Jwt_issuer_is_not_configured",
        f"{_SAID}: the key is of another cluster, of a signer that was replaced, or of an issuer that the policy does "
        f"not name, or whose keys could not be fetched yet (`shoal doctor`): send one of this cluster {_MAKES_ONE}",
    ),
    Cause(
        401,
        "Jwks_doesn't_have_key",
        f"{_SAID}: the token's signer is not among the keys of its issuer, or no longer: send a new token",
    ),
    Cause(
        401,
        "Jwt_verification_fails",
        f"{_SAID}: the signature is wrong, or the token has no expiry: send the whole key, unchanged",
    ),
    # A key 'shoal_...' under a policy without such keys, too: the operator who applied that has a whole key.
    Cause(
        401,
        "Jwt_header_is_an_invalid",
        f"{_SAID}: the key is not whole, or it is a key 'shoal_...' and no issuer of the policy in force has "
        "'token_prefix: shoal_'",
    ),
    Cause(401, "jwt_authn", f"{_SAID}: send a whole key as 'authorization: Bearer KEY' {_MAKES_ONE}"),
    Cause(403, "Audiences", f"{_SAID}: the token is for another audience than 'audiences' of its issuer in the policy"),
    Cause(403, "[no-key-id]", f"{_SAID}: the token has no id of its key: send one with a 'kid'"),
    Cause(403, "[revoked]", f"{_SAID}: the key is revoked: ask for another one"),
    Cause(403, "[closed]", f"{_SAID}: no policy is in force yet: retry; `shoal logs coord` says why"),
    Cause(
        403,
        _RBAC,
        f"{_SAID}: the policy allows this call to no caller of this role, or there is no such call: ask an admin "
        "(`shoal policy explain`)",
    ),
    Cause(404, "route_not_found", _NO_CALL),
    Cause(404, "direct_response", _NO_CALL),
    Cause(400, "missing_host_header", "the header 'host' is missing"),
    Cause(400, "path_normalization_failed", "malformed request: a path has no '#', and its dots do not lead out of it"),
    Cause(403, "upgrade_failed", "this server upgrades no connection: send the request without 'upgrade'"),
    Cause(400, "http1.", f"malformed request: {_SAID} (%RESPONSE_CODE_DETAILS%)"),
    Cause(408, "", f"{_SAID}: the request was not whole in time: send it faster"),
    Cause(413, "", f"{_SAID}: the body is too large for this call (docs/limits.md): send less at once"),
    Cause(431, "", f"{_SAID}: send fewer or shorter headers (docs/limits.md)"),
)


def text_of(details: str) -> str:
    """Return the text of a refusal by Envoy, by its RESPONSE_CODE_DETAILS; empty for an unknown cause.

    The headers of the request are not known: a cause that a header tells from the next one counts for both.
    """
    text = next((one.text for one in _CAUSES if one.details and one.details in details), "")
    if found := _SAID_IN.match(details):
        return text.replace(_SAID, found[1].replace("_", " "))
    if details.startswith(_RBAC):
        return text.replace(_SAID, _RBAC_SAID)
    return "" if _SAID in text else text


def mappers(json_call: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Return the mappers of a gateway's local replies.

    `json_call` is the condition by which a request is a JSON call; None: the gateway takes no JSON calls.
    """
    found = []
    for cause in _CAUSES:
        if json_call is not None:
            found.append(_json(cause.text, _CODES[cause.status], [*_conditions(cause), json_call]))
        found.append(_rest(cause.text, [*_conditions(cause), _REST]))
        found.append(_text(cause.text, _conditions(cause)))
    if json_call is not None:
        found += [_json(_SAID, code, [_status(status), json_call]) for status, code in _CODES.items()]
        found.append(_json(_SAID, _UNKNOWN, [json_call]))
    return [*found, rest(), _limited_rpc()]


def rest() -> dict[str, Any]:
    """Return the mapper of other local replies to the REST of inference."""
    return _rest(_SAID, [_REST])


def _limited_rpc() -> dict[str, Any]:
    """Return the mapper of a call over gRPC-Web, or gRPC, that is over a limit: its headers have its status and text.

    Envoy takes gRPC-Web for plain HTTP here. Its status would be 429, which gRPC-Web's clients, and Envoy's own filter,
    read as UNAVAILABLE. A body would make that filter set the status once more. It has given the request the content
    type of gRPC.
    """
    is_rpc = {"header": {"name": "content-type", "string_match": {"prefix": "application/grpc"}}}
    mapper = _text(_SAID, [_status(429), {"header_filter": is_rpc}])
    return {**mapper, "status_code": 200, "body": {"inline_string": ""}}


_REST = {"header_filter": {"header": {"name": ":path", "string_match": {"prefix": PREFIX}}}}


def _conditions(cause: Cause) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = [_status(cause.status)]
    if cause.details:
        expression = f"response.code_details.contains({_quoted(cause.details)})"
        typed = {"@type": _CEL, "expression": expression}
        name = "envoy.access_loggers.extension_filters.cel"
        found.append({"extension_filter": {"name": name, "typed_config": typed}})
    if cause.without:
        absent = {"name": cause.without, "present_match": True, "invert_match": True}
        found.append({"header_filter": {"header": absent}})
    return found


def _quoted(text: str) -> str:
    assert not set('"\\') & set(text)
    return f'"{text}"'


def _status(code: int) -> dict[str, Any]:
    comparison = {"op": "EQ", "value": {"default_value": code, "runtime_key": f"shoal.status_{code}"}}
    return {"status_code_filter": {"comparison": comparison}}


def _all(conditions: list[Mapping[str, Any]]) -> Mapping[str, Any]:
    return conditions[0] if len(conditions) == 1 else {"and_filter": {"filters": conditions}}


def _json(text: str, code: int, conditions: list[Mapping[str, Any]]) -> dict[str, Any]:
    error = {"code": code, "message": text, "details": []}
    return {"filter": _all(conditions), "body_format_override": {"json_format": error}}


def _rest(text: str, conditions: list[Mapping[str, Any]]) -> dict[str, Any]:
    body = {"json_format": {"error": text}, "content_type": "application/json"}
    return {"filter": _all(conditions), "body_format_override": body}


def _text(text: str, conditions: list[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "filter": _all(conditions),
        "body_format_override": {"text_format_source": {"inline_string": text}},
    }
