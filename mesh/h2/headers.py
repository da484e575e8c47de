"""Header blocks (HPACK, RFC 7541). Peers repeat the same fields: each is decoded once, then looked up.

The peer may use no dynamic table. Once it has acknowledged that, equal bytes mean equal fields, in every block. So each
distinct block and each distinct field is decoded once, by the package hpack. Until then hpack decodes every block.
"""

from __future__ import annotations

from collections.abc import Sequence

import hpack
from hpack.exceptions import HPACKError, OversizedHeaderListError

from mesh.h2.frames import ConnectionBroken, Reason

Fields = Sequence[tuple[bytes, bytes]]


class Block:
    """One decoded block, immutable: requests with equal headers share it."""

    __slots__ = ("by_name", "fields", "path")

    def __init__(self, fields: Fields) -> None:
        self.fields = fields
        self.by_name = dict(fields)
        self.path = self.by_name.get(b":path", b"").decode("latin-1")
        """The query string is a part of it. Empty in a response."""

    @property
    def method(self) -> str:
        """The method of a request, in capitals."""
        return self.by_name.get(b":method", b"").decode("latin-1")


LIST_BYTES = 64 << 10
"""Limit for all decoded fields of a block, the same as Envoy's."""

# Cached for each connection. Fields that never repeat (deadlines, trace ids) fill the caches, which are then cleared.
_MAX_BLOCKS = 512
_MAX_FIELDS = 4096


class Decoder:
    """Decodes the blocks of one connection, in their order."""

    def __init__(self) -> None:
        self._hpack = hpack.Decoder(max_header_list_size=LIST_BYTES)
        self._is_stateless = False
        self._blocks: dict[bytes, Block] = {}
        self._fields: dict[bytes, tuple[bytes, bytes]] = {}

    def forbid_table(self) -> None:
        """Reject dynamic tables from now on: the peer has acknowledged the setting.

        Its next block need not begin with a table size update.
        """
        self._hpack.max_allowed_table_size = self._hpack.header_table_size = 0
        self._is_stateless = True

    def decode(self, block: bytes) -> Block:
        """Return the decoded block. Raises ConnectionBroken for an invalid one: later blocks could not be decoded."""
        known = self._blocks.get(block)
        if known is not None:
            return known
        try:
            if not self._is_stateless:
                return Block(self._by_hpack(block))
            found = Block(self._by_field(block))
        except OversizedHeaderListError as err:
            raise ConnectionBroken(Reason.ENHANCE_YOUR_CALM, f"headers of more than {LIST_BYTES} bytes") from err
        except (HPACKError, IndexError, UnicodeError) as err:
            raise ConnectionBroken(Reason.COMPRESSION_ERROR, f"a header block that is none: {err}") from err
        if len(self._blocks) >= _MAX_BLOCKS:
            self._blocks.clear()
        self._blocks[block] = found
        return found

    def _by_hpack(self, block: bytes) -> Fields:
        return [(bytes(name), bytes(value)) for name, value in self._hpack.decode(block, raw=True)]

    def _by_field(self, block: bytes) -> Fields:
        fields, at, size = [], 0, 0
        while at < len(block):
            end = _field_end(block, at)
            piece = block[at:end]
            field = self._fields.get(piece)
            if field is None:
                decoded = self._by_hpack(piece)
                # A table size update, to 0: any other size is an error in hpack.
                if not decoded:
                    at = end
                    continue
                field = decoded[0]
                if len(self._fields) >= _MAX_FIELDS:
                    self._fields.clear()
                self._fields[piece] = field
            size += len(field[0]) + len(field[1]) + 32
            if size > LIST_BYTES:
                raise OversizedHeaderListError("the list is too long")
            fields.append(field)
            at = end
        return fields


def _field_end(block: bytes, at: int) -> int:
    """Return the end of the field that begins at `at` (RFC 7541, section 6)."""
    first = block[at]
    if first & 0x80:
        return _integer(block, at, 7)[1]
    if first & 0xE0 == 0x20:
        return _integer(block, at, 5)[1]
    index, at = _integer(block, at, 6 if first & 0x40 else 4)
    if not index:
        at = _string_end(block, at)
    return _string_end(block, at)


def _string_end(block: bytes, at: int) -> int:
    size, at = _integer(block, at, 7)
    if at + size > len(block):
        raise IndexError("a string is cut short")
    return at + size


def _integer(block: bytes, at: int, bits: int) -> tuple[int, int]:
    """Return an integer with a prefix of `bits` bits, and its end (RFC 7541, section 5.1)."""
    mask = (1 << bits) - 1
    value = block[at] & mask
    at += 1
    if value < mask:
        return value, at
    shift = 0
    while True:
        byte = block[at]
        at += 1
        value += (byte & 127) << shift
        shift += 7
        if not byte & 128:
            return value, at
        if shift > 28:
            raise IndexError("an integer is too long")


def response_head(status: int, fields: Fields = ()) -> bytes:
    """Encode the head of a response."""
    return encode([(b":status", b"%d" % status), *fields])


def encode(fields: Fields) -> bytes:
    """Encode a block of literals, neither indexed nor Huffman-coded: it needs no table on either side."""
    parts: list[bytes] = []
    for name, value in fields:
        parts += [b"\x00", _length(name), name, _length(value), value]
    return b"".join(parts)


def _length(text: bytes) -> bytes:
    size = len(text)
    if size < 127:
        return bytes([size])
    out, size = bytearray([127]), size - 127
    while size > 127:
        out.append(size & 127 | 128)
        size >>= 7
    out.append(size)
    return bytes(out)
