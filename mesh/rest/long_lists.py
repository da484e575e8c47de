"""Parse of large JSON in steps: long lists of numbers are cut out, and read piece by piece.

    {"inputs": [{"name": "x", "data": [0.5, 1.5, ...]}]}
       ├── stretches without quotes ──lists in them──> pieces of 64 KiB ──> one list
       └── a text in place of each list ──> short JSON, parsed at once, with the lists put back

A parse of 600,000 numbers holds the event loop for 40 ms. Pieces end at a comma. Lists that are open there are closed
in one piece and opened in the next, and their halves are joined. What cannot be read so is parsed with the rest.
"""

from __future__ import annotations

import secrets
from typing import Any

from mesh.rest.json_text import MAX_VALUES, PARSER, too_much
from mesh.rpc.heavy_work import Steps
from shoal.errors import InvalidArgument
from shoal.oip.limits import MAX_DIMS

# Bytes of a piece: 6,000 numbers of 8 digits take 0.1 ms. Shorter lists are parsed with the JSON around them.
_LONG = 64 << 10

MAX_UNCUT = MAX_VALUES // 2
"""Values of the JSON without the long lists: as many short texts take 12 ms to parse."""


def parse(text: bytes) -> Steps[Any]:
    """Return the document in `text`, which is within the bounds of `parsed_bytes`.

    Raises:
        InvalidArgument: `text` is not JSON, or has too many values outside of long lists, or a long list that is
            neither a member of the document nor the data of an input.
    """
    short, lists = yield from _cut(text)
    if (values := short.count(b",")) > MAX_UNCUT:
        raise too_much(f"{values} values beside its long lists of numbers, at most {MAX_UNCUT}")
    yield
    document = PARSER(short)
    if lists:
        _put_back(document, lists)
    return document


def _cut(text: bytes) -> Steps[tuple[bytes, dict[str, list[Any]]]]:
    """Return the JSON with a text in place of each long list, and the lists by these texts."""
    name, lists = secrets.token_hex(8), dict[str, list[Any]]()
    parts: list[bytes] = []
    kept = at = 0
    is_in_text = False
    while at < len(text):
        end = text.rfind(b'"', at, at + _LONG)
        if end < 0:
            end = text.find(b'"', at + _LONG)
            end = len(text) if end < 0 else end
            start = -1 if is_in_text else text.find(b"[", at, end)
            if start >= 0 and end - start > _LONG:
                try:
                    found = yield from _long_list(text, start, end)
                # The parse of the rest reports the error, if it is one.
                except InvalidArgument:
                    found = None
                if found is not None:
                    key = f"{name}-{len(lists)}"
                    lists[key], after = found
                    parts += [text[kept:start], b'"%b"' % key.encode()]
                    kept = after
        is_in_text ^= _has_odd_quotes(text[at : end + 1])
        at = end + 1
        yield
    return b"".join([*parts, text[kept:]]), lists


def _has_odd_quotes(piece: bytes) -> bool:
    """Return True for an odd number of quotes that are not escaped. A piece begins behind a quote."""
    if b"\\" in piece:
        piece = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
    return bool(piece.count(b'"') % 2)


def _long_list(text: bytes, start: int, end: int) -> Steps[tuple[list[Any], int] | None]:
    """Return the list that begins at `start`, and the place behind it. There are no quotes before `end`.

    None for a list that is not whole there, or nested deeper than a tensor. Raises InvalidArgument for what is no list.
    """
    found: list[Any] = []
    at, depth = start, 0
    while True:
        cut = text.find(b",", at + _LONG, end)
        opened = depth + text.count(b"[", at, cut) - text.count(b"]", at, cut) if cut >= 0 else 0
        if opened < 1:
            after = _end_of_list(text, at, end, depth)
            if after < 0:
                return None
            _join(found, PARSER(b"[" * depth + text[at:after]), depth)
            return found, after
        if opened > MAX_DIMS:
            return None
        _join(found, PARSER(b"[" * depth + text[at:cut] + b"]" * opened), depth)
        at, depth = cut + 1, opened
        yield


def _end_of_list(text: bytes, at: int, end: int, depth: int) -> int:
    """Return the place behind the outermost list, of which `depth` are open at `at`.

    -1 when it is not before `end`, or for lists nested deeper than a tensor.
    """
    while (bracket := text.find(b"]", at, end)) >= 0:
        depth += text.count(b"[", at, bracket) - 1
        at = bracket + 1
        if depth < 1:
            return at
        if depth > MAX_DIMS:
            break
    return -1


def _join(found: list[Any], piece: list[Any], depth: int) -> None:
    """Add a piece, whose first `depth` lists go on with those that are open at the end of `found`."""
    for _ in range(depth - 1):
        inner, more = found[-1], piece.pop(0)
        found += piece
        found, piece = inner, more
    # JSON has a value on both sides of a comma.
    if depth and not (found and piece):
        raise InvalidArgument("a value is missing beside a comma of a list")
    found += piece


def _put_back(document: Any, lists: dict[str, list[Any]]) -> None:
    members = document if type(document) is dict else {}
    inputs = members.get("inputs")
    tensors = [each for each in inputs if type(each) is dict] if type(inputs) is list else []
    for holder, names in ((members, list(members)), *((tensor, ["data"]) for tensor in tensors)):
        for name in names:
            value = holder.get(name)
            if type(value) is str and value in lists:
                holder[name] = lists.pop(value)
    if lists:
        raise InvalidArgument(
            f"the JSON of the request has a list of more than {_LONG} bytes that is neither the data of an input nor a "
            "member of the request"
        )
