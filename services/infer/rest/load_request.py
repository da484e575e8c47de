"""The request of a load over REST: from JSON, whose files are base64, to a message.

    {"parameters": {"config": "{...}", "file:1/model.onnx": "BASE64"}}
       └── long texts are cut out ──> short JSON, parsed at once
                └── base64, in slices ──> bytes of files

A parse of 96 MiB would hold the event loop for a third of a second. A text with escapes is not cut out.
"""

from __future__ import annotations

import base64
import binascii
import secrets
from collections.abc import Mapping

from mesh.rest.call import RestCall
from mesh.rest.infer_request import set_parameters
from mesh.rest.json_text import as_object, member
from mesh.rpc.heavy_work import Steps
from shoal.access.rpc_groups import LOAD_WITH_CODE
from shoal.errors import InvalidArgument
from shoal.inference.v2 import inference_pb2 as pb

LOAD_BYTES = 96 << 20
"""Body of a request to load a model."""

MAX_QUOTES = 400_000
"""Quotes in the JSON: a walk over so many takes 0.2 s, in slices. A configuration as JSON in JSON has thousands."""

# Shorter texts are parsed with the JSON around them.
_LONG = 64 << 10
# A slice of base64: 1 ms.
_SLICE = 1 << 20
_SLICE_QUOTES = 1_024
_FILE = "file:"


async def read(call: RestCall) -> pb.RepositoryModelLoadRequest:
    """Return the request of a call. Raises InvalidArgument, or PermissionDenied for parameters without their grant."""
    request = pb.RepositoryModelLoadRequest(model_name=call.target.model)
    body = await call.body() or b"{}"
    size = len(body)
    if size > LOAD_BYTES:
        raise InvalidArgument(
            f"the request has {size} bytes, at most {LOAD_BYTES} are accepted: put the model into the repository"
        )
    text, texts = (body, {}) if size <= _LONG else await call.in_turn(_cut(body))
    async with call.parsed(text) as document:
        given = member(as_object(document, "the request"), "parameters", dict, {})
        # A configuration may name another backend, or another address. A file may be code.
        if given:
            call.check(LOAD_WITH_CODE, call.target.model)
        # Slices, what they are joined to, and the message.
        call.hold(3 * size)
        for name, value in given.items():
            found = texts.get(value) if type(value) is str else None
            if name.startswith(_FILE) and found is not None:
                request.parameters[name].bytes_param = await call.in_turn(_decoded(found, name))
            elif name.startswith(_FILE) and type(value) is str:
                request.parameters[name].bytes_param = _file(value.encode(errors="replace"), name)
            else:
                set_parameters(request.parameters, {name: value if found is None else _text(found, name)})
    return request


def _cut(body: bytes) -> Steps[tuple[bytes, Mapping[str, memoryview]]]:
    """Return the JSON with a name in place of each long text, and the texts by these names."""
    view, names = memoryview(body), secrets.token_hex(8)
    texts: dict[str, memoryview] = {}
    parts: list[bytes | memoryview] = []
    kept = at = quotes = 0
    while (start := body.find(b'"', at)) >= 0:
        end = start
        while True:
            end = body.find(b'"', end + 1)
            quotes += 1
            if not quotes % _SLICE_QUOTES:
                yield
            if quotes > MAX_QUOTES:
                raise InvalidArgument(f"the JSON of the request has more than {MAX_QUOTES} texts and quotes")
            if end < 0 or not _is_escaped(body, end):
                break
        if end < 0:
            # The parse reports the error.
            break
        if end - start > _LONG:
            yield
            if body.find(b"\\", start, end) < 0:
                name = f"{names}-{len(texts)}"
                texts[name] = view[start + 1 : end]
                parts += [view[kept : start + 1], name.encode()]
                kept = end
            yield
        at = end + 1
    return b"".join([*parts, view[kept:]]), texts


def _is_escaped(body: bytes, at: int) -> bool:
    """Return True when an odd number of backslashes is before `at`."""
    first = at
    while body[first - 1] == 0x5C:
        first -= 1
    return bool((at - first) % 2)


def _decoded(text: memoryview, name: str) -> Steps[bytes]:
    """Return the content of a file."""
    parts: list[bytes] = []
    for at in range(0, len(text), _SLICE):
        part = text[at : at + _SLICE]
        parts.append(_file(part, name))
        # Padding ends a file.
        if at + _SLICE < len(text) and len(parts[-1]) != _SLICE // 4 * 3:
            raise _no_base64(name)
        yield
    joined: list[bytes] = []
    # A long join releases the GIL.
    yield lambda: joined.append(b"".join(parts))
    return joined[0]


def _file(text: bytes | memoryview, name: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as err:
        raise _no_base64(name) from err


def _no_base64(name: str) -> InvalidArgument:
    return InvalidArgument(f"parameter '{name[:80]}': expected base64")


def _text(text: memoryview, name: str) -> str:
    try:
        return str(text, "utf-8")
    except UnicodeDecodeError as err:
        raise InvalidArgument(f"parameter '{name[:80]}': expected UTF-8") from err
