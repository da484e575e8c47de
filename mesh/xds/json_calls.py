"""JSON form of unary gRPC methods at the gateway, from the google.api.http annotations of their .proto files.

    JSON ──> token ──> Lua: is it such a message? ──> grpc_json_transcoder ──> rules by RPC ──> routes as for gRPC
                        └── 400, 404, 415                     └── status and JSON error of a gRPC status

The transcoder ignores unknown fields and nulls in lists silently, and lets a query replace what is in the path; no
option refuses them. The script checks the form of a body, and the names of its fields and of a query's; the transcoder
checks their values. This module imports nothing of Envoy's classes.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from google.api import annotations_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor, ServiceDescriptor

CHECK_FILTER = "shoal.json-check"
TRANSCODER_FILTER = "shoal.json"

FILTERS = (CHECK_FILTER, TRANSCODER_FILTER)

BODY_BYTES = 1 << 20
"""Body of a JSON call: a larger one gets 413. Its check and its transcoding hold up one thread of Envoy."""
RESPONSE_BYTES = 16 << 20
"""Response of a JSON call, which Envoy holds as a whole: a result of 12 MB in base64. A larger one gets 500."""
# Values and keys of a body.
_TOKENS = 100_000
# Longest time without progress while Envoy waits for the whole body.
_BODY_IDLE = "30s"
# Objects and arrays within each other, as in protobuf.
_DEPTH = 100


@dataclass(frozen=True)
class JsonCall:
    """The HTTP form of a method."""

    method: MethodDescriptor
    verb: str
    template: str
    """Path, such as `/shoal/v1/jobs/{id}:cancel`. `{name=**}` matches several segments."""
    has_body: bool
    """True: the body is the method's request, without the fields in the path."""

    @property
    def rpc(self) -> str:
        """Path of the RPC, `/package.Service/Method`."""
        return f"/{self.method.containing_service.full_name}/{self.method.name}"

    @property
    def path_fields(self) -> list[str]:
        """Names of the fields in the path."""
        return re.findall(r"\{(\w+)[^}]*\}", self.template)


@dataclass(frozen=True)
class JsonRoutes:
    """JSON calls of a gateway."""

    prefix: str
    """Prefix of their paths."""
    cluster: str
    """Any cluster. The filters let no request pass to it: a JSON call has another route after them."""
    services: tuple[str, ...]
    """The gRPC services (`package.Service`)."""
    descriptors: bytes
    """A serialized FileDescriptorSet with these services."""
    script: str
    """Lua code of `check_script`."""


def json_calls(services: Iterable[ServiceDescriptor]) -> Iterator[JsonCall]:
    """Yield the HTTP forms of the methods that have an annotation."""
    for service in services:
        for method in service.methods:
            if method.GetOptions().HasExtension(annotations_pb2.http):
                rule = method.GetOptions().Extensions[annotations_pb2.http]
                verb = rule.WhichOneof("pattern")
                assert rule.body in ("", "*"), f"{method.full_name}: the check knows only whole bodies"
                yield JsonCall(method, verb.upper(), getattr(rule, verb), rule.body == "*")


def filters(routes: JsonRoutes) -> list[dict[str, Any]]:
    """Return the HTTP filters of JSON calls, which are disabled except on their route."""
    types = "type.googleapis.com/envoy.extensions.filters.http"
    transcoder = {
        "@type": f"{types}.grpc_json_transcoder.v3.GrpcJsonTranscoder",
        # Bytes in JSON.
        "proto_descriptor_bin": base64.b64encode(routes.descriptors).decode(),
        "services": list(routes.services),
        "convert_grpc_status": True,
        "max_request_body_size": BODY_BYTES,
        "max_response_body_size": RESPONSE_BYTES,
        "print_options": {"preserve_proto_field_names": True, "always_print_primitive_fields": True},
        "request_validation_options": {
            "reject_unknown_method": True,
            "reject_unknown_query_parameters": True,
            "reject_binding_body_field_collisions": True,
        },
    }
    check = {"@type": f"{types}.lua.v3.Lua", "default_source_code": {"inline_string": routes.script}}
    return [
        {"name": CHECK_FILTER, "typed_config": check, "disabled": True},
        {"name": TRANSCODER_FILTER, "typed_config": transcoder, "disabled": True},
    ]


def route(routes: JsonRoutes) -> dict[str, Any]:
    """Return the route of JSON calls before the transcoder, which gives each the path of its RPC. It needs FILTERS."""
    return {
        "match": {"prefix": routes.prefix},
        # Without a cluster, Envoy does not apply the limit of the body.
        "route": {"cluster": routes.cluster, "timeout": "0s", "idle_timeout": _BODY_IDLE},
        "request_body_buffer_limit": BODY_BYTES,
    }


def condition(routes: JsonRoutes) -> dict[str, Any]:
    """Return the condition of Envoy's access log filters by which a request is a JSON call."""
    is_json = {"filter": CHECK_FILTER, "path": [{"key": "is_json"}], "value": {"bool_match": True}}
    # Before the transcoder a call has its own path, and after the check it is marked.
    marked = {"metadata_filter": {"matcher": is_json, "match_if_key_not_found": {"value": False}}}
    begins = {"header_filter": {"header": {"name": ":path", "string_match": {"prefix": routes.prefix}}}}
    return {"or_filter": {"filters": [begins, marked]}}


def check_script(calls: Sequence[JsonCall]) -> str:
    """Return the Lua code that checks the bodies and the queries of `calls`."""
    messages: dict[str, str] = {}
    for call in calls:
        _add(call.method.input_type, messages)
    lines = [
        f"  {{{_text(call.verb)}, {_text(_pattern(call.template))}, {_text(call.method.input_type.full_name)}, "
        f"{'true' if call.has_body else 'false'}, {{{', '.join(f'{name} = true' for name in call.path_fields)}}}}},"
        for call in _ordered(calls)
    ]
    types = [f"  [{_text(name)}] = {fields}," for name, fields in messages.items()]
    tables = "\n".join(["local CALLS = {", *lines, "}", "local TYPES = {", *types, "}"])
    return _SCRIPT % {"tables": tables, "tokens": _TOKENS, "depth": _DEPTH, "filter": CHECK_FILTER}


def rpcs_of_paths(calls: Sequence[JsonCall]) -> list[tuple[str, re.Pattern[str], str]]:
    """Return the method and the pattern of the path of each call, with its RPC; the first one that matches counts."""
    return [(call.verb, re.compile(_regex(call.template)), call.rpc) for call in _ordered(calls)]


def _ordered(calls: Sequence[JsonCall]) -> list[JsonCall]:
    # The most specific pattern is first: `{name=**}` matches a verb behind a colon, too.
    return sorted(calls, key=lambda call: ("**" in call.template, -len(call.template)))


def _regex(template: str) -> str:
    parts = re.split(r"(\{[^}]*\})", template)
    return "".join((".+" if "**" in part else "[^/]+") if part[:1] == "{" else re.escape(part) for part in parts)


def _text(text: str) -> str:
    assert '"' not in text
    return f'"{text}"'


def _pattern(template: str) -> str:
    """Return the Lua pattern of a path template."""
    parts = re.split(r"(\{[^}]*\})", template)
    found = [("[^/]+" if "**" not in part else ".+") if part.startswith("{") else _literal(part) for part in parts]
    return f"^{''.join(found)}$"


def _literal(text: str) -> str:
    return re.sub(r"([^A-Za-z0-9/:_])", r"%\1", text)


def _add(message: Descriptor, messages: dict[str, str]) -> None:
    """Add the fields of a message, and of those that it contains, as Lua tables by name and by JSON name.

    A table has the name, the kind, and true for a list. The kind is false for a scalar, a text for a message, and a
    table with the kind of the values for a map.
    """
    if message.full_name in messages:
        return
    messages[message.full_name] = ""
    entries = []
    for field in message.fields:
        is_list = "true" if field.is_repeated else "false"
        entry = f"{{{_text(field.name)}, {_kind(field, messages)}, {is_list}}}"
        entries += [f"[{_text(name)}] = {entry}" for name in dict.fromkeys((field.name, field.json_name))]
    messages[message.full_name] = f"{{{', '.join(entries)}}}"


def _kind(field: FieldDescriptor, messages: dict[str, str]) -> str:
    inner = field.message_type
    # Timestamps and durations are texts.
    if inner is None or inner.full_name in ("google.protobuf.Timestamp", "google.protobuf.Duration"):
        return "false"
    assert inner.file.package != "google.protobuf", f"{field.full_name}: a JSON form of its own"
    if inner.GetOptions().map_entry:
        return f"{{{_kind(inner.fields_by_name['value'], messages)}}}"
    _add(inner, messages)
    return _text(inner.full_name)


_SCRIPT = r"""
%(tables)s
local find, sub, byte, format = string.find, string.sub, string.byte, string.format

-- The beginning of a text of the caller, without special characters.
local function shown(text)
  return (string.gsub(sub(text, 1, 64), "[^%%w _%%-%%./:]", "?"))
end

-- Raise an error unless `text` is a JSON object with the fields of `root`.
local function check(text, root)
  local at, tokens, value = 1, 0, nil
  local marks, control, keys = {}, 0, {}

  local function bad(message) error({message}, 0) end

  local function next_byte()
    -- Compiled by LuaJIT, unlike a search for a pattern: 100,000 values take 4 ms and not 30.
    local c = byte(text, at)
    while c == 32 or c == 9 or c == 10 or c == 13 do
      at = at + 1
      c = byte(text, at)
    end
    return c
  end

  local function unexpected(expected)
    bad(at > #text and "the JSON ends too early: expected " .. expected
      or format("no JSON at byte %%d: expected %%s", at, expected))
  end

  -- Where `mark` is next, from a place that never goes back. It is kept: finding it can mean reading the whole body.
  local function next_mark(mark, from)
    if (marks[mark] or 0) < from then marks[mark] = find(text, mark, from, true) or #text + 1 end
    return marks[mark]
  end

  -- The text at a quote, with its escapes.
  local function string_at()
    local from = at + 1
    local to = from
    while next_mark("\\", to) < next_mark('"', to) do to = next_mark("\\", to) + 2 end
    local quote = next_mark('"', to)
    if control < from then
      -- One match of all other bytes: a search would begin anew at each of them.
      local _, last = find(text, "^[^%%z\1-\31]*", from)
      control = last + 1
    end
    if quote > #text or control < quote then unexpected("the end of a text") end
    at = quote + 1
    return sub(text, from, quote - 1)
  end

  -- The name of the field whose object or list has this depth. Only errors need it.
  local function where(depth)
    local name = root
    for level = 1, depth - 1 do
      if keys[level] then name = name .. "." .. shown(keys[level]) end
    end
    return name
  end

  -- The transcoder would leave it out of a list, and make it empty in a map.
  local function no_null(depth)
    if next_byte() == 110 then bad(where(depth) .. " has null for an element, which must have a value") end
  end

  local function object(kind, depth)
    local fields = type(kind) == "string" and TYPES[kind]
    if not kind then bad(where(depth) .. " is no object") end
    local seen = {}
    at = at + 1
    if next_byte() == 125 then at = at + 1 return end
    while true do
      if next_byte() ~= 34 then unexpected("a key in quotes") end
      tokens = tokens + 1
      local key = string_at()
      local field = fields and fields[key]
      if fields and not field then bad(format("%%s has no field '%%s'", where(depth), shown(key))) end
      local name = field and field[1] or key
      if seen[name] then bad(format("%%s has the field '%%s' twice", where(depth), shown(key))) end
      seen[name] = true
      if next_byte() ~= 58 then unexpected("a colon") end
      at = at + 1
      local inner
      if field then inner = field[2] else inner = kind[1] end
      keys[depth] = key
      if next_byte() == 91 and not (field and field[3]) then bad(where(depth + 1) .. " is no list") end
      if not field then no_null(depth) end
      value(inner, depth + 1)
      local c = next_byte()
      at = at + 1
      if c == 125 then return end
      if c ~= 44 then at = at - 1 unexpected("a comma or }") end
    end
  end

  local function array(kind, depth)
    at = at + 1
    keys[depth] = false
    -- Numbers and literals have no names: the transcoder reads them. It takes '...' for a text, too.
    local stop = next_mark("]", at)
    if stop < next_mark("[", at) and stop < next_mark("{", at) and stop < next_mark("}", at)
      and stop < next_mark('"', at) and stop < next_mark("'", at) and stop < next_mark("null", at) then
      at = stop + 1
      return
    end
    while true do
      no_null(depth)
      value(kind, depth + 1)
      local c = next_byte()
      at = at + 1
      if c == 93 then return end
      if c ~= 44 then at = at - 1 unexpected("a comma or ]") end
    end
  end

  function value(kind, depth)
    tokens = tokens + 1
    if tokens > %(tokens)d then bad("the body has more than %(tokens)d values and keys: use gRPC") end
    if depth > %(depth)d then bad("the body has more than %(depth)d objects and arrays within each other") end
    local c = next_byte()
    if c == 34 then
      string_at()
    elseif c == 123 then
      object(kind, depth)
    elseif c == 91 then
      array(kind, depth)
    else
      local _, to = find(text, "^[%%w+%%-.]+", at)
      if not to then unexpected("a value") end
      at = to + 1
    end
  end

  if next_byte() ~= 123 then unexpected("an object") end
  value(root, 1)
  if next_byte() then unexpected("the end of the body") end
end

-- Raise an error unless a query has fields of `root`, once each, and none of those in the path.
local function check_query(query, root, in_path)
  local seen = {}

  local function bad(given, message) error({format("field '%%s' %%s", shown(given), message)}, 0) end

  for piece in string.gmatch(query, "[^&]+") do
    local given = string.match(piece, "^[^=]*")
    local fields, name, field = TYPES[root], nil, nil
    for part in string.gmatch(given .. ".", "([^.]*)%%.") do
      local is_map = field and type(field[2]) == "table"
      field = fields and fields[part]
      if is_map then break end
      if not field then bad(given, "of the query is no field of " .. root) end
      name = name and name .. "." .. field[1] or field[1]
      fields = type(field[2]) == "string" and not field[3] and TYPES[field[2]]
    end
    if not field or field[2] then bad(given, "is an object or in a map, which a query cannot have: use gRPC") end
    if in_path[name] then bad(given, "is in the path, and not in the query") end
    if seen[name] and not field[3] then bad(given, "is in the query twice") end
    seen[name] = true
  end
end

-- Mappers of local replies make it JSON.
local function refuse(handle, status, message)
  handle:respond({[":status"] = status}, message)
end

local function call_of(verb, path)
  for _, call in ipairs(CALLS) do
    if call[1] == verb and find(path, call[2]) then return call end
  end
end

function envoy_on_request(handle)
  handle:streamInfo():dynamicMetadata():set("%(filter)s", "is_json", true)
  local headers = handle:headers()
  local verb, target = headers:get(":method"), headers:get(":path")
  local path = string.match(target, "^[^?]*")
  local query = sub(target, #path + 2)
  local call = call_of(verb, path)
  if not call then return refuse(handle, "404", format("no call %%s %%s", shown(verb), shown(path))) end
  local root, has_body = call[3], call[4]
  if has_body and query ~= "" then
    return refuse(handle, "400", format("%%s %%s takes its fields from the body, and no query", verb, shown(path)))
  end
  local ok, err = pcall(check_query, query, root, call[5])
  if not ok then
    return refuse(handle, "400", type(err) == "table" and err[1] or "the query cannot be checked")
  end
  local kind, encoding = headers:get("content-type"), headers:get("content-encoding")
  -- The headers are not valid after it.
  local body = handle:body()
  local size = body and body:length() or 0
  if size == 0 then return end
  if not has_body then return refuse(handle, "400", format("%%s %%s takes no body", verb, shown(path))) end
  kind = kind and string.lower(kind)
  if not kind or not (find(kind, "^application/json *$") or find(kind, "^application/json *;")) then
    return refuse(handle, "415", "the body of this call is JSON: send content-type: application/json")
  end
  if encoding then
    return refuse(handle, "415", "the body of this call must not be compressed")
  end
  ok, err = pcall(check, body:getBytes(0, size), root)
  if not ok then
    return refuse(handle, "400", type(err) == "table" and err[1] or "the body cannot be checked")
  end
end
"""
