"""JSON of requests and responses. A parse holds the interpreter: what it may cost is counted before.

body ──up to 128 KiB──────────────────────────────> turn ──> orjson, or json for NaN and Infinity
     ──up to 8 MiB──> values, names, containers ──in bounds──> turns (`long_lists`)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import orjson

from mesh.rpc.parsing import UNSCANNED_BYTES, Parser
from shoal.errors import InvalidArgument

JSON_BYTES = 8 << 20
"""JSON of a request, without its binary tensors: plain text takes 1 to 5 ns a byte to parse."""

MAX_VALUES = 600_000
"""Commas in the JSON of a request. As many numbers of 17 digits take 45 ms to parse, in pieces."""

MAX_CONTAINERS = 100_000
"""Lists, objects, and names in objects. As many take 25 ms, with Python's garbage collection."""

# Bytes of Python objects that a byte of JSON may become: an empty object in 3 bytes takes 72. In a text, characters
# take up to 4 bytes each.
_PARSED_RATIO, _TEXT_RATIO, _OBJECT_BYTES = 24, 4, 80

_NOT_FINITE = (b"NaN", b"Infinity")


class JsonParser(Parser[Any]):
    """Parses JSON, for `mesh.rpc.parsing.parse_in_turn`. NaN, Infinity and -Infinity are numbers, as in Triton."""

    def __init__(self) -> None:
        super().__init__(orjson.loads)

    def __call__(self, data: bytes, start: int = 0) -> Any:
        """Parse JSON. Raises InvalidArgument."""
        try:
            if not any(name in data for name in _NOT_FINITE):
                return orjson.loads(data)
            # Unlike orjson, `json` takes half of a surrogate pair, escaped or in bytes: no message can hold it.
            # Numbers are orjson's, too: `int` takes 0.1 ms for one of 4,300 digits, and a document has 1,900 of them;
            # `float` takes three times as long as orjson.
            document = json.loads(data.decode(), parse_int=orjson.loads, parse_float=orjson.loads)
            if b"\\u" in data:
                json.dumps(document, ensure_ascii=False).encode()
            return document
        except (ValueError, RecursionError) as err:
            raise InvalidArgument(f"failed to parse the request JSON buffer: {err}") from err


PARSER = JsonParser()


def parsed_bytes(data: bytes) -> int:
    """Return the most memory that the objects of JSON take.

    Raises:
        InvalidArgument: `data` has more than JSON_BYTES, or would take long to parse.
    """
    size = len(data)
    if size <= UNSCANNED_BYTES:
        return _PARSED_RATIO * size
    if size > JSON_BYTES:
        raise too_much(f"{size} bytes, at most {JSON_BYTES}")
    values, containers = counts(data)
    if problem := too_many(values, containers):
        raise too_much(problem)
    return _TEXT_RATIO * size + _OBJECT_BYTES * (values + containers)


def counts(data: bytes) -> tuple[int, int]:
    """Return the values of JSON, and its lists, objects and names; at least as many as it has."""
    return data.count(b","), data.count(b"[") + data.count(b"{") + data.count(b":")


def too_many(values: int, containers: int) -> str:
    """Return the count that is beyond its bound, and the bound; empty when none is."""
    if values > MAX_VALUES:
        return f"{values} values, at most {MAX_VALUES}"
    if containers > MAX_CONTAINERS:
        return f"{containers} lists, objects and names, at most {MAX_CONTAINERS}"
    return ""


def too_much(problem: str) -> InvalidArgument:
    """Return the error of JSON that is beyond a bound."""
    return InvalidArgument(
        f"the JSON of the request has {problem} are accepted: send large tensors in binary form "
        "(Inference-Header-Content-Length)"
    )


def member(document: Any, name: str, kind: type, default: Any = None) -> Any:
    """Return a member of a JSON object, `default` when it is not there. Raises InvalidArgument for another kind."""
    found = document.get(name, default)
    if found is not default and type(found) is not kind:
        raise InvalidArgument(f"Unable to parse '{name}': expected {_KINDS[kind]}")
    return found


_KINDS = {str: "text", list: "a list", dict: "an object", bool: "true or false", int: "a whole number"}


def as_object(value: Any, what: str) -> Mapping[str, Any]:
    """Return a JSON object. Raises InvalidArgument for another value."""
    if type(value) is not dict:
        raise InvalidArgument(f"{what}: expected a JSON object")
    return value
