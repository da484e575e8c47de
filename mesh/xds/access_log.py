"""Calls that a gateway or a service refused, as Envoy's access log service reports them.

    Envoy ──refused calls, each second──> RefusedCalls ──one event for equal ones each second──> the audit log

Equal are calls of one subject and address, of one RPC, with one status and reason. A caller who tries a thousand tokens
a second is one entry a second. Nobody waits for these entries: what cannot be written is counted and written later.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

import grpc

from mesh.rpc.access import Access
from mesh.rpc.audit_log import AuditLog, CountedEvents
from mesh.rpc.interceptors import Context
from mesh.xds.json_calls import JsonCall, rpcs_of_paths
from mesh.xds.messages import (
    HttpAccessLogEntry,
    HttpGrpcAccessLogConfig,
    RequestMethod,
    StreamAccessLogsMessage,
    StreamAccessLogsResponse,
)
from mesh.xds.refusals import text_of
from mesh.xds.resource import typed
from shoal.access import rest_paths
from shoal.access.audit import REFUSAL, Event
from shoal.access.caller_header import CALLER_HEADER, SERVICE
from shoal.access.decision import Caller
from shoal.access.rpc_groups import GROUP_OF
from shoal.errors import Code, ShoalError

LOG_SERVICE = "envoy.service.accesslog.v3.AccessLogService"
_OTHERS = Event(kind=REFUSAL, reason="further callers, more than are told apart")
_STATUS = "grpc-status"
_MESSAGE = "grpc-message"
_TRACE = "traceparent"
_UNKNOWN_PATH = "another path"
# Envoy's word for a response of a service. Over REST its text, which names the model, is in its body, which is not
# logged.
_BY_SERVICE = "via_upstream"
_REASONS = {_BY_SERVICE: "refused by the service"}
# W3C Trace Context, version 00.
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-")
_REFUSED_HTTP = {401: Code.UNAUTHENTICATED, 403: Code.PERMISSION_DENIED}


def access_log(cluster: str) -> dict[str, Any]:
    """Return the access log of a listener: refused calls, to the service of the cluster."""
    refused: dict[str, Any] = {
        "or_filter": {
            "filters": [
                {"grpc_status_filter": {"statuses": ["UNAUTHENTICATED", "PERMISSION_DENIED"]}},
                *({"status_code_filter": {"comparison": _equals(code)}} for code in _REFUSED_HTTP),
            ]
        }
    }
    common = {
        "log_name": "refused",
        "transport_api_version": "V3",
        "grpc_service": {
            "envoy_grpc": {"cluster_name": cluster},
            "initial_metadata": [{"key": CALLER_HEADER, "value": SERVICE.decode()}],
        },
        "buffer_flush_interval": "1s",
    }
    config = {
        "common_config": common,
        "additional_request_headers_to_log": [CALLER_HEADER, _TRACE],
        "additional_response_headers_to_log": [_STATUS, _MESSAGE],
        "additional_response_trailers_to_log": [_STATUS, _MESSAGE],
    }
    name = "envoy.access_loggers.http_grpc"
    return {"name": name, "filter": refused, "typed_config": typed(HttpGrpcAccessLogConfig, config)}


def _equals(code: int) -> dict[str, Any]:
    return {"op": "EQ", "value": {"default_value": code, "runtime_key": f"audit.{code}"}}


class RefusedCalls(CountedEvents):
    """Server of the access log service, and writer of the events that it hears of.

    Args:
        access: knows who the verified callers are.
        origin: this instance.
        json: the JSON calls of the gateway.
    """

    def __init__(self, audit_log: AuditLog, access: Access, origin: str, json: Sequence[JsonCall] = ()) -> None:
        super().__init__(audit_log, replace(_OTHERS, origin=origin), "refusals")
        self._json = rpcs_of_paths(json)
        self._access = access
        self._origin = origin

    def methods(self) -> dict[str, Any]:
        """Return the methods for a server, by path."""
        # A server that drains ends idle streams of responses, and this one is as good as one.
        method = grpc.stream_stream_rpc_method_handler(
            self._stream, request_deserializer=StreamAccessLogsMessage.parse, response_serializer=bytes
        )
        return {f"/{LOG_SERVICE}/StreamAccessLogs": method}

    async def _stream(
        self, messages: AsyncIterator[StreamAccessLogsMessage], ctx: Context
    ) -> AsyncIterator[StreamAccessLogsResponse]:
        async for message in messages:
            for entry in message.http_logs.log_entry if message.http_logs is not None else ():
                self.count(entry)
            # Thousands of entries must not hold the loop.
            await asyncio.sleep(0)
        yield StreamAccessLogsResponse()

    def count(self, entry: HttpAccessLogEntry) -> None:
        """Count a refused call."""
        self.add(self._event(entry))

    def _event(self, entry: HttpAccessLogEntry) -> Event:
        common, request, response = entry.common_properties, entry.request, entry.response
        headers = dict(request.request_headers) if request is not None else {}
        answer: dict[str, str] = {}
        http = 0
        if response is not None:
            answer = {**response.response_headers, **response.response_trailers}
            http = int(response.response_code or 0)
        status = answer.get(_STATUS, "")
        code = int(status) if status.isdigit() and int(status) <= max(Code) else _REFUSED_HTTP.get(http, Code.UNKNOWN)
        path = (request.path if request is not None else "").partition("?")[0]
        method = RequestMethod(request.request_method).name or "" if request is not None else ""
        caller: Caller | None = None
        if CALLER_HEADER in headers:
            with suppress(ShoalError):
                caller = self._access.identify(headers[CALLER_HEADER].encode("latin-1", "replace"))
        details = response.response_code_details if response is not None else ""
        rpc, model = self._call(method, path)
        event = Event(
            kind=REFUSAL,
            address=_address(common),
            rpc=rpc,
            # Callers whom the gateway refuses may name any.
            target=model if details == _BY_SERVICE else "",
            code=int(code),
            # By the cause, which is the same over REST, where the text is in the body, and gRPC.
            reason=text_of(details) or unquote(answer.get(_MESSAGE, "")) or _REASONS.get(details, details),
            trace_id=_trace_id(headers.get(_TRACE, "")),
            origin=self._origin,
        )
        if caller is not None:
            event = replace(event, tenant=caller.tenant, subject=caller.subject, role=caller.role, key=caller.key)
        return event.checked()

    def _call(self, method: str, path: str) -> tuple[str, str]:
        """Return the RPC of a path of gRPC, REST or JSON, and the model that a path of REST names.

        Callers choose other paths, which are one for all.
        """
        if path in GROUP_OF:
            return path, ""
        for one, values in rest_paths.found(tuple(path.split("/")[1:])):
            if method in one.methods:
                return one.rpc, unquote(values.get("model", ""))
        rpcs = (rpc for verb, form, rpc in self._json if verb == method and form.fullmatch(path))
        return next(rpcs, _UNKNOWN_PATH), ""


def _trace_id(traceparent: str) -> str:
    found = _TRACEPARENT.match(traceparent)
    return found[1] if found else ""


def _address(common: Any) -> str:
    remote = common.downstream_remote_address if common is not None else None
    socket = remote.socket_address if remote is not None else None
    return socket.address if socket is not None else ""
