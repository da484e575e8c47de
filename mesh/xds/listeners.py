"""Listeners: the gateway for clients, and the outbound socket through which services call each other.

Fields: envoy.config.listener.v3.Listener. Both listeners get their routes over RDS, and extract the model of a call:

    (gateway: drop x-shoal-model ──> CORS, gRPC-Web) ──> Lua: calls without a message ──> grpc_field_extraction
        ──> Lua: metadata to headers, route again ──> router

Where callers are authenticated, the filters of mesh.xds.access follow those for web pages.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from mesh.xds import ADS_CLUSTER, access, json_calls, limits, refusals, senders, tls, web
from mesh.xds.access_log import access_log
from mesh.xds.clusters import CONNECTION_WINDOW, STREAM_WINDOW, address
from mesh.xds.messages import (
    FieldExtractions,
    GrpcFieldExtractionConfig,
    HeaderMutation,
    HttpConnectionManager,
    HttpFilter,
    Listener,
    Lua,
    Packed,
    RequestFieldValueDisposition,
    Router,
)
from mesh.xds.resource import LISTENER, Resource, pack, typed
from mesh.xds.routes import (
    BODY_FILTER,
    EXTRACTION_FILTER,
    GATEWAY_NAME,
    LUA_FILTER,
    MODEL_HEADER,
    NAME,
    NO_RETRY_HEADER,
    NO_SEQUENCE,
    REST_STEP_FILTER,
    SEQUENCE_HEADER,
    STEP_EXTRACTION_FILTER,
    ModelRoutes,
    RouteTable,
    path_of,
)
from mesh.xds.tracing import OTEL, Tracing, connection_manager_tracing
from shoal.access.caller_header import CALLER_HEADER, JOB_RETRY_HEADER, SERVICE
from shoal.tenant_header import CUT_HEADER

GATEWAY = "gateway"
OUTBOUND = "outbound"

# Concurrent calls of one connection; a client waits with more. Services share one connection with all their callers:
# theirs has the limit of an instance's connection.
_STREAMS = {GATEWAY: 1024, OUTBOUND: 4096}
# Bytes that a client may send before Envoy takes them. Calls of services share one connection: see CONNECTION_WINDOW.
_WINDOWS = {GATEWAY: 16 << 20, OUTBOUND: CONNECTION_WINDOW}
# Request headers of one call. A larger block, or one more header, costs its own call only. Real clients send a few kB,
# and gRPC's own servers take 16 at most. HTTP/2 has no flow control for headers: blocks that an instance has not read
# wait in Envoy before those of all other clients, and 512 calls with 50 kB each delayed these by a second.
_HEADERS_KB = {GATEWAY: 16, OUTBOUND: 60}
_HEADERS = 256
# Longest time for a header block to arrive whole.
_HEADERS_TIMEOUT = "10s"
# Longest time for a client to take the rest of a response after the instance has sent all of it.
_FLUSH_TIMEOUT = "300s"
# Resources from coord. 0 s: the listener waits for them as long as it takes.
_FROM_ADS: dict[str, Any] = {"ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": "0s"}

# The extraction holds a call until its message is whole, and rejects a body without a message. The script answers calls
# that end with their headers. It marks streams whose body ends without a byte: `respond` fails there, as the headers
# have passed, and the local reply of the extraction becomes OK. Calls that are not gRPC pass the extraction, too: the
# status of gRPC within a 200 would tell them that all is well.
#
# The extraction also holds a thread of Envoy for 40 ns a field of the message and 10 ns a byte of what it extracts. It
# keeps that, and 150 bytes more of each parameter: 16 MB of empty parameters took 13 s and the whole heap. The script
# counts them as the message arrives, by the heads of its fields. Beyond the limit, or at what is no field, it marks the
# call, and takes the rest of the message away: the extraction, which has the headers, rejects what is no message at
# once, and half of one when the body ends.
_BODY_LUA = """
local byte, sub, floor, min, max = string.byte, string.sub, math.floor, math.min, math.max
local STREAMS = {%(streams)s}

-- The byte after the varint at a byte, and its value. nil: the text ends before; without a value: it is none.
local function varint(text, at)
  local value, factor = 0, 1
  for place = at, at + 9 do
    local c = byte(text, place)
    if not c then return nil end
    value = value + c %% 128 * factor
    if c < 128 then return place + 1, value end
    factor = factor * 128
  end
  return at
end

-- The byte after the field at a byte, and its number. nil: its head is not whole; without a number: there is no field.
-- The extraction would take the lower 32 bits of a tag or a length, and read on after what is none.
local function field(text, at)
  local next, tag = varint(text, at)
  if not next or not tag or tag == 0 or tag >= 2^32 then return next end
  local kind, value = tag %% 8, nil
  if kind == 0 or kind == 2 then
    next, value = varint(text, next)
    if not value then return next end
    if kind == 2 then
      if value >= 2^31 then return next end
      next = next + value
    end
  elseif kind == 1 then
    next = next + 8
  elseif kind == 5 then
    next = next + 4
  elseif kind > 5 then
    return next
  end
  return next, floor(tag / 8)
end

-- Count the fields whose heads are in `text`, which begins at a field. Return why the message is refused, if it is. The
-- place of the next field is `scan.head`, and `scan.kept` is the beginning of its head.
local function count(scan, text)
  local at, size = 1, min(#text, scan.stop - scan.head)
  local base = scan.head - 1
  while at <= size do
    local next, number = field(text, at)
    if not next then break end
    if not number then return "%(broken)s" end
    scan.fields = scan.fields + 1
    if number == %(parameters)d then scan.parameters = scan.parameters + 1 end
    if number == %(parameters)d or number == %(model)d then scan.copied = scan.copied + next - at end
    if scan.fields > %(most_fields)d or scan.parameters > %(most_parameters)d or scan.copied > %(most_copied)d then
      return "%(many)s"
    end
    at = next
  end
  scan.head = base + at
  scan.kept = at <= size and sub(text, at) or ""
end

-- Keep the begin of a message at the end of a piece, `at` bytes of which are of the first message. The extraction would
-- lose it: it gives on what is whole, and later pieces as they are.
local function cut(scan, chunk, size, at, handle)
  while size - at >= 5 do
    local _, a, b, c, d = byte(chunk:getBytes(at, 5), 1, 5)
    local stop = at + 5 + ((a * 256 + b) * 256 + c) * 256 + d
    if stop > size then break end
    at = stop
  end
  if at < size then
    scan.tail = chunk:getBytes(at, size - at)
    -- It makes the length of a piece the length of the request, also of one that is sent again.
    chunk:setBytes(chunk:getBytes(0, at))
    handle:streamInfo():dynamicMetadata():set("%(filter)s", "cut", true)
  end
end

-- Read the next piece of a body. Return true when the message, the first one of a stream, has arrived.
local function read(scan, chunk, handle)
  if scan.is_refused then
    chunk:setBytes("")
    return false
  end
  local size, from = chunk:length(), scan.seen
  scan.seen = from + size
  local text = ""
  if scan.head < scan.seen then
    local skipped = max(scan.head - from, 0)
    text = scan.kept .. chunk:getBytes(skipped, size - skipped)
  end
  if not scan.stop then
    -- Compressed messages are rejected by the extraction.
    if byte(text) ~= 0 then return true end
    scan.kept = text
    if #text < 5 then return false end
    local _, a, b, c, d = byte(text, 1, 5)
    scan.stop = 5 + ((a * 256 + b) * 256 + c) * 256 + d
    scan.head, scan.kept, text = 5, "", sub(text, 6)
  end
  local refused = text ~= "" and count(scan, text)
  if refused then
    scan.is_refused = true
    handle:streamInfo():dynamicMetadata():set("%(filter)s", refused, true)
    -- A message must begin with 0 or 1. After its begin, the end of the body is needed for an error.
    chunk:setBytes(from == 0 and "\\255\\0\\0\\0\\0" or "")
    return false
  end
  if scan.seen < scan.stop then return false end
  cut(scan, chunk, size, scan.stop - from, handle)
  return true
end

function envoy_on_request(handle)
  if sub(handle:headers():get("content-type") or "", 1, 16) ~= "application/grpc" then return end
  local scan = {seen = 0, head = 0, kept = "", fields = 0, parameters = 0, copied = 0}
  for chunk in handle:bodyChunks() do
    local size = chunk:length()
    if scan.tail then
      chunk:setBytes(scan.tail .. chunk:getBytes(0, size))
      return
    end
    if size > 0 and read(scan, chunk, handle) and not scan.tail then return end
  end
  if scan.seen > 0 then return end
  local status, message = "3", "the request has no message"
  if STREAMS[handle:headers():get(":path")] then
    status, message = "0", ""
    handle:streamInfo():dynamicMetadata():set("%(filter)s", "empty", true)
  end
  local headers = {[":status"] = "200", ["grpc-status"] = status, ["grpc-message"] = message}
  pcall(handle.respond, handle, headers, "")
end
"""
# Fields of a message, as in the scan of a service (mesh.rpc.parsing), and parameters of a request.
_FIELDS, _PARAMETERS = 100_000, 1_024
# Bytes of the parameters and the name of the model.
_COPIED = 4 << 20
# Marks of the script, and the texts for these calls.
_MANY, _BROKEN = "many", "broken"
_REFUSED = {
    _MANY: (
        f"the request has more than {_PARAMETERS} parameters, {_COPIED} bytes in them and the model's name, or "
        f"{_FIELDS} fields: send less at a time"
    ),
    _BROKEN: "the request is not a message of the expected type: it has a field of an unknown kind",
}

# The script accepts only names that are valid in a header and as a cluster name: see routes.MODEL_NAME. The sequence of
# a step is the parameter `sequence_id`, an InferParameter. A number has one form, whichever field carries it.
_LUA = """
local KEY = "\\10\\11sequence_id\\18"

local function sequence_of(entry)
  if type(entry) ~= "string" or #entry > 300 or string.sub(entry, 1, #KEY) ~= KEY then return nil end
  local kind = string.byte(entry, #KEY + 2)
  local value = string.sub(entry, #KEY + ((kind == 16 or kind == 40) and 3 or 2))
  return (string.gsub(value, ".", function(c) return string.format("%%02x", string.byte(c)) end))
end

function envoy_on_request(handle)
  if handle:streamInfo():dynamicMetadata():get("%(body_filter)s") then handle:headers():replace("%(cut)s", "1") end
  local found = handle:streamInfo():dynamicMetadata():get("%(filter)s")
  if found == nil then return end
  for field, values in pairs(found) do
    if field == "%(parameters)s" then
      for _, entry in ipairs(values) do
        local sequence = sequence_of(entry)
        if sequence ~= nil then handle:headers():replace("%(sequence)s", sequence) end
      end
    else
      local name = values[1]
      if type(name) == "string" and #name > 0 and #name <= 255 and not string.find(name, "[^%%w%%._/-]") then
        handle:headers():replace("%(model)s", name)
        handle:clearRouteCache()
      end
    end
    -- Kept until the call ends, and no limit of Envoy counts it: 100 kB of 1,000 parameters, or a name of 4 MB, of each
    -- idle stream.
    if #values ~= 1 or type(values[1]) ~= "string" or #values[1] > 255 then
      handle:streamInfo():dynamicMetadata():set("%(filter)s", field, "")
    end
  end
end
"""


# The sequence of a step over REST, in the form of the script above: both forms of a step go to one instance. A text
# within a text has a backslash before its quotes, so the name in quotes and a colon are a member of an object. Numbers
# beyond 15 digits are not exact in Lua. The headers are not valid after the body is read.
_REST_STEP_LUA = """
local find, match, byte, format, floor = string.find, string.match, string.byte, string.format, math.floor

local function varint(number)
  local text = ""
  while number >= 128 do
    text = text .. format("%%02x", number %% 128 + 128)
    number = floor(number / 128)
  end
  return text .. format("%%02x", number)
end

-- The next byte that is no space, and its place.
local function beyond_space(text, at)
  local c = byte(text, at)
  while c == 32 or c and c >= 9 and c <= 13 do
    at = at + 1
    c = byte(text, at)
  end
  return c, at
end

local function sequence_in(text)
  local at, _, last, c = 1, nil, nil, nil
  repeat
    -- A search for a pattern holds a thread of Envoy for 0.1 s when the text has 8 MB; this one is 100 times as fast.
    _, last = find(text, '"sequence_id"', at, true)
    if not last then return nil end
    c, at = beyond_space(text, last + 1)
  until c == 58
  _, at = beyond_space(text, at + 1)
  local digits = match(text, "^%%d+", at)
  if digits then
    -- No number of 64 bits has more: a header of a longer one would end the connection of all callers of the model.
    if #digits > 20 then return nil end
    if #digits > 15 then return digits end
    return varint(tonumber(digits))
  end
  -- Of a text with escapes, the text as it is written.
  local name = match(text, '^"([^"]*)"', at)
  if not name or #name > 255 then return nil end
  local size = varint(#name)
  -- The script above takes the second byte of an entry's length for a part of the value.
  local more = string.sub(varint(1 + #size / 2 + #name), 3)
  return more .. "1a" .. size .. string.gsub(name, ".", function(c) return format("%%02x", string.byte(c)) end)
end

function envoy_on_request(handle)
  local headers = handle:headers()
  local json = tonumber(headers:get("inference-header-content-length") or "")
  local is_plain = (headers:get("content-encoding") or "identity") == "identity"
  local body = handle:body()
  local size = body and body:length() or 0
  if json and json < size then size = json end
  local sequence
  if is_plain and size > 0 and size <= %(json_bytes)d then sequence = sequence_in(body:getBytes(0, size)) end
  handle:headers():replace("%(sequence)s", sequence or "%(none)s")
  handle:clearRouteCache()
end
"""

# JSON of a request, as in infer: a larger one is refused there.
_JSON_BYTES = 8 << 20

# Envoy reads at most so much, and one piece of 16 KiB more, of a connection in one iteration of its event loop. Frames
# of ten bytes cost 2 us each: with the default of 1 MiB, other callers wait for 0.2 s. A lower value changes nothing.
_READ_BYTES = 16 << 10


@lru_cache(64)
def listener(
    name: str, listen: str, table: RouteTable, tracing: Tracing | None, sds: str = "", *, has_access: bool = False
) -> Resource:
    """Build the listener `name` at the address `listen`, `unix:/path` or `host:port`.

    With `sds`, clients must speak TLS; the file of that name on Envoy's machine has the certificate. With `has_access`,
    the listener follows a policy: it opens when it has the extensions of mesh.xds.extensions.
    """
    listen_address = address(listen)
    if "pipe" in listen_address:
        listen_address["pipe"]["mode"] = 0o600
    manager = HttpConnectionManager.from_dict(_connection_manager(name, table, tracing, has_access=has_access))
    if table.models is not None:
        extractions = [_extraction(table.models, has_steps=has_steps) for has_steps in (False, True)]
        after = [each.name for each in manager.http_filters].index(BODY_FILTER) + 1
        manager.http_filters[after:after] = extractions
    filter_chain: dict[str, Any] = {"filters": [{"name": "envoy.filters.network.http_connection_manager"}]}
    if sds:
        filter_chain["transport_socket"] = tls.transport_socket(sds)
        filter_chain["transport_socket_connect_timeout"] = tls.HANDSHAKE_TIMEOUT
    message = Listener.from_dict(
        {
            "name": name,
            "address": listen_address,
            "filter_chains": [filter_chain],
            # With SO_REUSEPORT a second Envoy on the port would start and accept half of the connections.
            "enable_reuse_port": False,
            "per_connection_buffer_limit_bytes": _READ_BYTES,
        }
    )
    message.filter_chains[0].filters[0].typed_config = Packed.pack(manager)
    return pack(LISTENER, name, message, frozenset({OTEL} if tracing is not None else ()))


def _connection_manager(
    name: str, table: RouteTable, tracing: Tracing | None, *, has_access: bool = False
) -> dict[str, Any]:
    has_json = name == GATEWAY and table.json is not None
    guards = access.filters(lambda name: _FROM_ADS) if has_access else []
    verification, rules = guards[:-1], guards[-1:]
    document: dict[str, Any] = {
        "stat_prefix": name,
        "codec_type": "AUTO",
        "rds": {
            "route_config_name": GATEWAY_NAME if name == GATEWAY else NAME,
            "config_source": _FROM_ADS,
        },
        # Watches may be idle for days. Pings detect a client that has disappeared without closing its connection.
        "stream_idle_timeout": "0s",
        "stream_flush_timeout": _FLUSH_TIMEOUT,
        "request_headers_timeout": _HEADERS_TIMEOUT,
        "max_request_headers_kb": _HEADERS_KB[name],
        "common_http_protocol_options": {"max_headers_count": _HEADERS},
        "http2_protocol_options": {
            # A malformed request costs its own call, and not the others of its connection.
            "override_stream_error_on_invalid_http_message": True,
            "max_concurrent_streams": _STREAMS[name],
            "initial_stream_window_size": STREAM_WINDOW,
            "initial_connection_window_size": _WINDOWS[name],
            "connection_keepalive": {"interval": "30s", "timeout": "10s"},
        },
        "use_remote_address": True,
        # Clients of the outbound socket are services of this node, which may forbid Envoy to retry a call. No client of
        # the gateway is internal. Without a range, Envoy treats private addresses as internal; no client has this one.
        "internal_address_config": {
            "unix_sockets": name == OUTBOUND,
            "cidr_ranges": [{"address_prefix": "0.0.0.0", "prefix_len": {"value": 32}}],
        },
        "skip_xff_append": name == OUTBOUND,
        # Only traces use a request id. Without it, repeated calls have equal headers, which servers parse from a cache.
        "generate_request_id": tracing is not None,
        "early_header_mutation_extensions": [
            access.removal(NO_RETRY_HEADER) if has_access else _mutation(name),
            *([senders.connection_number()] if name == GATEWAY else ()),
        ],
        "http_filters": [
            *(web.filters() if name == GATEWAY else ()),
            # No body of an unknown caller is read. Rules decide by the path of the RPC, which the transcoder sets.
            *verification,
            *(json_calls.filters(table.json) if has_json and table.json is not None else ()),
            *rules,
            *(limits.filters(lambda name: _FROM_ADS) if has_access else ()),
            *_lua(table),
            _router(),
        ],
    }
    if has_access:
        document["access_log"] = [access_log(ADS_CLUSTER)]
    if table.models is not None:
        json_call = json_calls.condition(table.json) if has_json and table.json is not None else None
        # Services read Envoy's own texts.
        refused = refusals.mappers(json_call) if name == GATEWAY else [refusals.rest()]
        document["local_reply_config"] = {"mappers": [_empty_stream(), *_refused_messages(), *refused]}
    if tracing is not None:
        document["tracing"] = connection_manager_tracing(tracing)
    return document


def _mutation(name: str) -> dict[str, Any]:
    """Return the changes to the headers of each request, before Envoy selects its route.

    Clients must not set the model, the sequence or the caller of a call, nor say that it is a job's retry, which infer
    checks against its crash journals. Services of the mesh may set the model and the retry. All processes that can
    connect to the outbound socket are services of this node.
    """
    mutations: list[dict[str, Any]] = [{"remove": SEQUENCE_HEADER}]
    if name == GATEWAY:
        mutations += [{"remove": header} for header in (MODEL_HEADER, CALLER_HEADER, JOB_RETRY_HEADER)]
    else:
        caller = {"header": {"key": CALLER_HEADER, "value": SERVICE.decode()}}
        mutations.append({"append": {**caller, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}})
    return {
        "name": "envoy.http.early_header_mutation.header_mutation",
        "typed_config": typed(HeaderMutation, {"mutations": mutations}),
    }


def _empty_stream() -> dict[str, Any]:
    """Return the mapper that makes the local reply OK for a stream that ended without a message."""
    status = {"header": {"key": "grpc-status", "value": "0"}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
    return {"filter": _is_marked("empty"), "headers_to_add": [status]}


def _refused_messages() -> list[dict[str, Any]]:
    """Return the mappers of the extraction's local replies to messages that the script of BODY_FILTER refuses."""
    return [
        {"filter": _is_marked(mark), "body_format_override": {"text_format_source": {"inline_string": text}}}
        for mark, text in _REFUSED.items()
    ]


def _is_marked(key: str) -> dict[str, Any]:
    """Return the condition that the script of BODY_FILTER has marked a call."""
    matcher = {"filter": BODY_FILTER, "path": [{"key": key}], "value": {"bool_match": True}}
    return {"metadata_filter": {"matcher": matcher, "match_if_key_not_found": {"value": False}}}


def _router() -> dict[str, Any]:
    return {"name": "envoy.filters.http.router", "typed_config": typed(Router, {"suppress_envoy_headers": True})}


def _lua(table: RouteTable) -> list[dict[str, Any]]:
    """Return the filters before and after the extraction."""
    if table.models is None:
        return []
    streams = ", ".join(f'["{path_of(method)}"] = true' for method in table.models.streams)
    before = _BODY_LUA % {
        "filter": BODY_FILTER,
        "streams": streams,
        "parameters": table.models.parameters_number,
        "model": table.models.model_number,
        "most_copied": _COPIED,
        "many": _MANY,
        "broken": _BROKEN,
        "most_fields": _FIELDS,
        "most_parameters": _PARAMETERS,
    }
    code = _LUA % {
        "filter": EXTRACTION_FILTER,
        "body_filter": BODY_FILTER,
        "cut": CUT_HEADER,
        "model": MODEL_HEADER,
        "sequence": SEQUENCE_HEADER,
        "parameters": table.models.parameters,
    }
    of_rest = _REST_STEP_LUA % {"json_bytes": _JSON_BYTES, "sequence": SEQUENCE_HEADER, "none": NO_SEQUENCE}
    scripts = ((BODY_FILTER, before), (LUA_FILTER, code), (REST_STEP_FILTER, of_rest))
    return [
        {
            "name": name,
            "typed_config": typed(Lua, {"default_source_code": {"inline_string": script}}),
            "disabled": name == REST_STEP_FILTER,
        }
        for name, script in scripts
    ]


def _extraction(models: ModelRoutes, *, has_steps: bool) -> HttpFilter:
    """Return the extraction filter, with or without sequences. Each route enables one of the two.

    Calls pay for the extraction of sequences only while a model has sequences. The message is not built with
    `from_dict`: the descriptors are bytes, and the keys of its maps are not field names.
    """
    config = GrpcFieldExtractionConfig.from_dict({"descriptor_set": {}})
    assert config.descriptor_set is not None
    config.descriptor_set.inline_bytes = models.descriptors
    config.extractions_by_method = {
        method: FieldExtractions(
            request_field_extractions={
                name: RequestFieldValueDisposition()
                for name in (field, *([models.parameters] if has_steps and method in models.steps else ()))
            }
        )
        for method, field in models.fields
    }
    name = STEP_EXTRACTION_FILTER if has_steps else EXTRACTION_FILTER
    return HttpFilter(name=name, typed_config=Packed.pack(config))
