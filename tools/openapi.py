"""Make docs/openapi.json from the annotations and comments of proto/, or (--check) fail when it is stale."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc_tools import protoc

from mesh.xds.json_calls import JsonCall, json_calls
from services.coord.traffic import JSON_SERVICES
from tools.gen_proto import PROTO, ROOT, include_paths

DOCUMENT = ROOT / "docs" / "openapi.json"

_NO_JSON_NUMBERS = {"type": "string", "enum": ["NaN", "Infinity", "-Infinity"]}
_NUMBERS: Mapping[int, Mapping[str, Any]] = {
    FieldDescriptor.TYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.TYPE_BYTES: {"type": "string", "format": "byte"},
    FieldDescriptor.TYPE_STRING: {"type": "string"},
    FieldDescriptor.TYPE_FLOAT: {"anyOf": [{"type": "number", "format": "float"}, _NO_JSON_NUMBERS]},
    FieldDescriptor.TYPE_DOUBLE: {"anyOf": [{"type": "number", "format": "double"}, _NO_JSON_NUMBERS]},
    FieldDescriptor.TYPE_INT32: {"type": "integer", "format": "int32"},
    FieldDescriptor.TYPE_UINT32: {"type": "integer", "format": "uint32"},
    FieldDescriptor.TYPE_INT64: {"type": "string", "format": "int64"},
    FieldDescriptor.TYPE_UINT64: {"type": "string", "format": "uint64"},
}
_TEXTS = {
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    "google.protobuf.Duration": {"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]{1,9})?s$", "examples": ["1.5s"]},
}
_ERROR = {
    "type": "object",
    "required": ["code", "message", "details"],
    "properties": {
        "code": {"type": "integer", "description": "gRPC status code."},
        "message": {"type": "string"},
        "details": {"type": "array", "items": {"type": "object"}},
    },
}


class Comments:
    """Comments of the .proto files, by the full name of what they are about."""

    def __init__(self, found: FileDescriptorSet) -> None:
        self._by_name: dict[str, str] = {}
        for file in found.file:
            comments = {tuple(place.path): place.leading_comments for place in file.source_code_info.location}
            for name, path in _paths(file):
                if comment := comments.get(path):
                    self._by_name[f"{file.package}.{name}"] = " ".join(comment.split())

    def of(self, full_name: str) -> dict[str, str]:
        """Return the description of a method, a message or a field; empty without a comment."""
        return {"description": self._by_name[full_name]} if full_name in self._by_name else {}


def _paths(file: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names in a file with their paths, as descriptor.proto numbers them."""
    for number, service in enumerate(file.service):
        for at, method in enumerate(service.method):
            yield f"{service.name}.{method.name}", (6, number, 2, at)
    waiting = [(message.name, message, (4, number)) for number, message in enumerate(file.message_type)]
    while waiting:
        name, message, path = waiting.pop()
        yield name, path
        yield from ((f"{name}.{field.name}", (*path, 2, at)) for at, field in enumerate(message.field))
        waiting += [(f"{name}.{inner.name}", inner, (*path, 3, at)) for at, inner in enumerate(message.nested_type)]


def comments() -> Comments:
    """Compile the .proto files for their comments."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set"
        names = sorted(str(path) for path in PROTO.rglob("*.proto"))
        arguments = ["protoc", *include_paths(), "--include_source_info", f"--descriptor_set_out={out}", *names]
        if protoc.main(arguments) != 0:
            sys.exit("protoc failed: its messages are above")
        return Comments(FileDescriptorSet.FromString(out.read_bytes()))


class Document:
    """An OpenAPI document in the making."""

    def __init__(self, found: Comments) -> None:
        self._comments = found
        self._schemas: dict[str, Any] = {"Error": _ERROR}
        self._paths: dict[str, dict[str, Any]] = {}

    def add(self, call: JsonCall) -> None:
        """Add a call, and the messages that it has."""
        method, path = call.method, call.template.replace("=**}", "}")
        request = method.input_type
        operation: dict[str, Any] = {
            "operationId": method.name,
            "tags": [method.containing_service.name],
            **self._comments.of(method.full_name),
            "parameters": [self._parameter(request.fields_by_name[name], "path", name) for name in call.path_fields],
            "responses": {
                "200": {"description": "OK", **_json(self._reference(method.output_type))},
                "default": {"description": "An error", **_json({"$ref": "#/components/schemas/Error"})},
            },
        }
        others = [field for field in request.fields if field.name not in call.path_fields]
        if call.has_body:
            schema = self._object(request, others) if call.path_fields else self._reference(request)
            operation["requestBody"] = {"required": not call.path_fields, **_json(schema)}
        else:
            operation["parameters"] += [parameter for field in others for parameter in self._query(field, "")]
        self._paths.setdefault(path, {})[call.verb.lower()] = operation

    def _query(self, field: FieldDescriptor, prefix: str) -> Iterator[dict[str, Any]]:
        inner = field.message_type
        if inner is None or inner.full_name in _TEXTS:
            yield self._parameter(field, "query", prefix + field.name)
            return
        # The query of a call has no maps.
        if inner.GetOptions().map_entry:
            return
        for each in inner.fields:
            yield from self._query(each, f"{prefix}{field.name}.")

    def _parameter(self, field: FieldDescriptor, place: str, name: str) -> dict[str, Any]:
        required = {"required": True} if place == "path" else {}
        schema = self._schema(field)
        return {"name": name, "in": place, **required, **self._comments.of(field.full_name), "schema": schema}

    def _reference(self, message: Descriptor) -> dict[str, Any]:
        if message.full_name not in self._schemas:
            self._schemas[message.full_name] = {}
            self._schemas[message.full_name] = self._object(message, [*message.fields])
        return {"$ref": f"#/components/schemas/{message.full_name}"}

    def _object(self, message: Descriptor, fields: list[FieldDescriptor]) -> dict[str, Any]:
        properties = {field.name: {**self._schema(field), **self._comments.of(field.full_name)} for field in fields}
        described = self._comments.of(message.full_name)
        return {"type": "object", **described, "additionalProperties": False, "properties": properties}

    def _schema(self, field: FieldDescriptor) -> dict[str, Any]:
        inner = field.message_type
        if inner is not None and inner.GetOptions().map_entry:
            return {"type": "object", "additionalProperties": self._schema(inner.fields_by_name["value"])}
        if inner is not None:
            one = _TEXTS.get(inner.full_name) or self._reference(inner)
        elif field.enum_type is not None:
            one = _enum(field.enum_type)
        else:
            one = _NUMBERS[field.type]
        return {"type": "array", "items": one} if field.is_repeated else dict(one)

    def finished(self) -> dict[str, Any]:
        """Return the whole document."""
        about = "For streams, large tensors and inference itself: gRPC, and the REST form of the inference protocol."
        return {
            "openapi": "3.1.0",
            "info": {"title": "Shoal: jobs, results, models and operation", "version": "v1", "description": about},
            "servers": [{"url": "http://127.0.0.1:8080"}],
            "security": [{}, {"key": []}],
            "paths": dict(sorted(self._paths.items())),
            "components": {
                "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
                "schemas": dict(sorted(self._schemas.items())),
            },
        }


def _enum(enum: EnumDescriptor) -> dict[str, Any]:
    return {"type": "string", "enum": [value.name for value in enum.values]}


def _json(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schema}}}


def fresh() -> str:
    """Return the text of the document."""
    document = Document(comments())
    for call in json_calls(JSON_SERVICES):
        document.add(call)
    return json.dumps(document.finished(), indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Write the document, or check it."""
    text = fresh()
    if "--check" not in sys.argv[1:]:
        DOCUMENT.write_text(text)
    elif not DOCUMENT.exists() or DOCUMENT.read_text() != text:
        sys.exit(f"stale {DOCUMENT.relative_to(ROOT)}: run `make proto`")


if __name__ == "__main__":
    main()
