"""Header blocks (HPACK, RFC 7541). Peers repeat the same fields: each is decoded once, then looked up.

The peer may use no dynamic table. Once it has acknowledged that, equal bytes mean equal fields, in every block. So each
distinct block and each distinct field is decoded once, and kept in a `HeaderCache`. Until then every block is decoded.

A server may decode new blocks later, when it is their request's turn: until then a block is LATER.

The number of the client's connection to Envoy (x-shoal-connection) is taken out of the fields: otherwise each caller
would have a block of its own for each connection.

Huffman-coded strings are decoded in C, by ls-qpack: HPACK and QPACK have the same code (RFC 9204, section 4.1.2). A
header of 55 kB costs 0.2 ms; tables of Python objects cost 2 to 4 ms.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Sequence

import pylsqpack

from mesh.h2.frames import ConnectionBroken, Reason
from mesh.h2.static_table import STATIC_TABLE
from shoal.tenant_header import CONNECTION_HEADER, CUT_HEADER

Fields = Sequence[tuple[bytes, bytes]]


class Block:
    """One decoded block, immutable: requests with equal headers share it."""

    __slots__ = (
        "body_bytes",
        "by_name",
        "connection_at",
        "fields",
        "has_repeated_names",
        "is_malformed",
        "list_bytes",
        "path",
    )

    def __init__(
        self, fields: Fields, list_bytes: int = 0, *, is_malformed: bool = False, connection_at: int = -1
    ) -> None:
        self.fields = fields
        self.connection_at = connection_at
        """Place in the encoded block from which the number of a connection was taken; -1: there was none."""
        self.is_malformed = is_malformed
        """True when a field breaks the rules of RFC 9113, section 8.1.1, 8.2 or 8.3, which ends its stream only."""
        self.list_bytes = list_bytes
        """Size of the fields, each with 32 bytes more (RFC 9113, section 6.5.2)."""
        self.by_name = dict(fields)
        """Fields by name; of several with one name the last."""
        self.has_repeated_names = len(self.by_name) != len(fields)
        self.body_bytes: int | None = None
        """Size of the body that a decoded block announces (Content-Length); None: it announces none."""
        self.path = self.by_name.get(b":path", b"").decode("latin-1")
        """The query string is a part of it. Empty in a response."""

    @property
    def method(self) -> str:
        """The method of a request, in capitals."""
        return self.by_name.get(b":method", b"").decode("latin-1")

    def values(self, name: bytes) -> list[bytes]:
        """Return the values of the fields with a name, in their order."""
        return [value for key, value in self.fields if key == name]


LIST_BYTES = 64 << 10
"""Limit for all decoded fields of a block, each with 32 bytes more (RFC 9113, section 6.5.2). The limit of an Envoy in
front is 60 KiB."""

LIST_FIELDS = 280
"""Limit for the fields of a block: each costs 2 us. An Envoy in front takes 256 of its client, and adds some."""

OVERSIZED = Block(())
"""Block in place of one beyond the limits, whose request is to be rejected."""

LATER = Block((), is_malformed=True)
"""Block in place of a new one, which is to be decoded later: `Decoder.latest`."""

_CONNECTION = CONNECTION_HEADER.encode()

_LENGTH, _CUT = b"content-length", CUT_HEADER.encode()
# More than 64 bits have.
_LENGTH_DIGITS = 20

# A value that is longer is a token or a list of its own request: it would displace what repeats.
_CACHED_BYTES = 1 << 10
# The headers of 1,000 callers and more. To decode those of one call takes 20 to 60 us, and a look-up 0.1 us.
_BLOCKS_BYTES = 6 << 20
_FIELDS_BYTES = 2 << 20

_TABLE_BYTES = 4096
_ENTRY_BYTES = 32
# Table size updates of a block: the smallest size since the last block, and the current one (RFC 7541, section 4.2).
# Each is one byte, so a block of 128 KiB of them would hold the event loop for 50 ms.
_MAX_UPDATES = 2
_MALFORMED = "a malformed header block: "


class _Oversized(Exception):
    """A block is beyond the limits."""


class HeaderCache:
    """Decoded blocks and fields of all connections of a server, bounded in bytes. Full, it is cleared.

    Fields that never repeat (deadlines, trace ids) fill it.
    """

    def __init__(self) -> None:
        self.blocks: dict[bytes, Block] = {}
        self.fields: dict[bytes, tuple[bytes, bytes]] = {}
        self.block_bytes = self.field_bytes = 0

    def add_block(self, encoded: bytes, block: Block, list_bytes: int) -> None:
        # With the memory of the objects: 700 bytes, and 150 for each field.
        size = 700 + len(encoded) + list_bytes + 150 * len(block.fields)
        if self.block_bytes + size > _BLOCKS_BYTES:
            self.blocks.clear()
            self.block_bytes = 0
        self.blocks[encoded] = block
        self.block_bytes += size

    def add_field(self, encoded: bytes, field: tuple[bytes, bytes]) -> None:
        size = 250 + len(encoded) + len(field[0]) + len(field[1])
        if self.field_bytes + size > _FIELDS_BYTES:
            self.fields.clear()
            self.field_bytes = 0
        self.fields[encoded] = field
        self.field_bytes += size


class Decoder:
    """Decodes the blocks of one connection, in their order."""

    def __init__(self, cache: HeaderCache) -> None:
        self._cache = cache
        self._blocks = cache.blocks
        self._is_stateless = False
        self.connection: bytes | None = None
        """Number of the client's connection to Envoy, of the latest block; None: the block has none."""
        self.new_blocks = math.inf
        """Blocks that are decoded at once, of those that are not known."""
        self.latest = b""
        """The last block that `decode` was called with."""
        # The encoded field of that number, without its value. Empty: no block had one.
        self._connection_name = b""
        self._table: deque[tuple[bytes, bytes]] = deque()
        self._table_bytes = 0
        # Limit of the peer, and ours.
        self._table_limit = self._max_table_limit = _TABLE_BYTES

    def forbid_table(self) -> None:
        """Reject dynamic tables from now on: the peer has acknowledged the setting.

        Its next block need not begin with a table size update.
        """
        self._max_table_limit = 0
        self._limit_table(0)
        self._is_stateless = True

    def decode(self, block: bytes) -> Block:
        """Return the decoded block, or OVERSIZED; LATER for a block that is not known, when there were enough of them.

        Raises:
            ConnectionBroken: the block is invalid, or oversized while a dynamic table is allowed. Later blocks could
                not be decoded.
        """
        self.connection, self.latest = None, block
        if self._is_stateless:
            at = block.find(self._connection_name) if self._connection_name else -1
            known = self._blocks.get(block) if at < 0 else self._known_without_connection(block, at)
            if known is not None:
                return known
            if self.new_blocks <= 0:
                return LATER
            self.new_blocks -= 1
        try:
            return self._decoded(block)
        except _Oversized as err:
            if self._is_stateless:
                return OVERSIZED
            raise ConnectionBroken(
                Reason.ENHANCE_YOUR_CALM, f"headers of more than {LIST_BYTES} bytes or {LIST_FIELDS} fields"
            ) from err
        except (IndexError, pylsqpack.DecompressionFailed) as err:
            raise ConnectionBroken(Reason.COMPRESSION_ERROR, _MALFORMED + str(err)) from err

    def decode_now(self, block: bytes) -> Block:
        """Return the decoded block, or OVERSIZED, as `decode` does; never LATER."""
        left, self.new_blocks = self.new_blocks, 1
        try:
            return self.decode(block)
        finally:
            self.new_blocks = left

    def connection_of(self, block: bytes) -> bytes:
        """Return the encoded field of the client's connection in a block that is not decoded; empty without one."""
        if not self._connection_name:
            return b""
        at = block.find(self._connection_name)
        if at >= 0 and block.find(self._connection_name, at + 1) >= 0:
            # A client has written the name into a value: only a field that begins there counts.
            at, field_at = -1, 0
            try:
                for _ in range(LIST_FIELDS):
                    if field_at >= len(block):
                        break
                    if block.startswith(self._connection_name, field_at):
                        at = field_at
                    field_at = _field_end(block, field_at)
            except IndexError:
                return b""
            if field_at < len(block):
                return b""
        return block[at : self._connection_end(block, at)] if at >= 0 else b""

    def _connection_end(self, block: bytes, at: int) -> int:
        length_at = at + len(self._connection_name)
        return length_at + 1 + (block[length_at] & 0x7F if length_at < len(block) else 0)

    def _known_without_connection(self, block: bytes, at: int) -> Block | None:
        """Return the known block without the number of a connection, whose field seems to begin at `at`."""
        end = self._connection_end(block, at)
        known = self._blocks.get(block[:at] + block[end:])
        # A field begins at `at`, and not a part of another one: the bytes before it are those of the known block.
        if known is None or known.connection_at != at:
            return None
        field = self._cache.fields.get(block[at:end])
        if field is None:
            # The first call of a client's connection.
            try:
                field = self._field(block, at)
            except (IndexError, pylsqpack.DecompressionFailed):
                return None
            if field[0] != _CONNECTION or _field_end(block, at) != end or not is_valid(*field):
                return None
            self._cache.add_field(block[at:end], field)
        self.connection = field[1]
        return known

    def _decoded(self, block: bytes) -> Block:
        fields: list[tuple[bytes, bytes]] = []
        connections: list[tuple[int, int]] = []
        at = size = pseudo = updates = 0
        is_malformed = False
        is_stateless, known = self._is_stateless, self._cache.fields
        is_cacheable = is_stateless and len(block) <= _CACHED_BYTES
        while at < len(block):
            first = block[at]
            if first & 0xE0 == 0x20:
                limit, at = _integer(block, at, 5)
                updates += 1
                if fields or limit > self._max_table_limit or updates > _MAX_UPDATES:
                    raise IndexError("a table size update that is not allowed")
                self._limit_table(limit)
                continue
            end = _field_end(block, at)
            if is_stateless and end - at <= _CACHED_BYTES:
                piece = block[at:end]
                field = known.get(piece)
                if field is None:
                    field = self._field(block, at)
                    if not is_valid(*field):
                        is_malformed = True
                    elif len(field[0]) + len(field[1]) <= _CACHED_BYTES:
                        self._cache.add_field(piece, field)
                    else:
                        is_cacheable = False
            else:
                field = self._field(block, at)
                is_malformed = is_malformed or not is_valid(*field)
                if not is_stateless and first & 0xC0 == 0x40:
                    self._add(field)
            if field[0] == _CONNECTION:
                connections.append((at, end))
            at = end
            size += len(field[0]) + len(field[1]) + _ENTRY_BYTES
            if size > LIST_BYTES or len(fields) >= LIST_FIELDS:
                raise _Oversized
            if field[0][:1] == b":":
                is_malformed = is_malformed or pseudo != len(fields)
                pseudo += 1
            fields.append(field)
        connection_at = -1
        if connections:
            connection_at, end = connections[-1]
            self.connection = dict(fields)[_CONNECTION]
            fields = [field for field in fields if field[0] != _CONNECTION]
            # Without a table the name is a literal, and its length follows the first byte.
            self._connection_name = (
                block[connection_at : _string_end(block, connection_at + 1)] if is_stateless else b""
            )
            # All connections share the block, so one with a fault is not kept: only its number may have the fault.
            is_cacheable = is_cacheable and len(connections) == 1 and not is_malformed
            block = block[:connection_at] + block[end:]
        found = Block(fields, size, is_malformed=is_malformed, connection_at=connection_at)
        if found.has_repeated_names:
            found.is_malformed = is_malformed or len(dict(fields[:pseudo])) != pseudo
        if _LENGTH in found.by_name and _CUT not in found.by_name:
            lengths = {*found.values(_LENGTH)}
            length = lengths.pop()
            if not lengths and length.isdigit() and len(length) <= _LENGTH_DIGITS:
                found.body_bytes = int(length)
            else:
                found.is_malformed = True
        if is_cacheable:
            self._cache.add_block(block, found, size)
        return found

    def _field(self, block: bytes, at: int) -> tuple[bytes, bytes]:
        """Return the field that begins at `at` (RFC 7541, section 6)."""
        first = block[at]
        if first & 0x80:
            return self._entry(_integer(block, at, 7)[0])
        index, at = _integer(block, at, 6 if first & 0x40 else 4)
        if index:
            name = self._entry(index)[0]
        else:
            name, at = _string(block, at)
        return name, _string(block, at)[0]

    # -- the dynamic table, newest entry first

    def _entry(self, index: int) -> tuple[bytes, bytes]:
        if 0 < index <= len(STATIC_TABLE):
            return STATIC_TABLE[index - 1]
        if not 0 < index <= len(STATIC_TABLE) + len(self._table):
            raise IndexError(f"index {index} is in no table")
        return self._table[index - len(STATIC_TABLE) - 1]

    def _add(self, field: tuple[bytes, bytes]) -> None:
        size = len(field[0]) + len(field[1]) + _ENTRY_BYTES
        self._evict(self._table_limit - size)
        if size <= self._table_limit:
            self._table.appendleft(field)
            self._table_bytes += size

    def _limit_table(self, limit: int) -> None:
        self._table_limit = limit
        self._evict(limit)

    def _evict(self, limit: int) -> None:
        while self._table and self._table_bytes > limit:
            name, value = self._table.pop()
            self._table_bytes -= len(name) + len(value) + _ENTRY_BYTES


_NAME = re.compile(rb"[!-9;-@\[-~]+")
_FORBIDDEN = re.compile(rb"[\0\r\n]")
_PSEUDO = frozenset({b":method", b":scheme", b":path", b":authority", b":status"})
_OF_CONNECTIONS = frozenset({b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"})


def is_valid(name: bytes, value: bytes) -> bool:
    """Return True for a field that HTTP/2 allows (RFC 9113, sections 8.2.1, 8.2.2 and 8.3)."""
    if _FORBIDDEN.search(value) or name in _OF_CONNECTIONS:
        return False
    return name in _PSEUDO or _NAME.fullmatch(name) is not None


def _field_end(block: bytes, at: int) -> int:
    """Return the end of the field that begins at `at` (RFC 7541, section 6)."""
    first = block[at]
    if first & 0x80:
        return _integer(block, at, 7)[1]
    index, at = _integer(block, at, 6 if first & 0x40 else 4)
    if not index:
        at = _string_end(block, at)
    return _string_end(block, at)


def _string_end(block: bytes, at: int) -> int:
    size, at = _integer(block, at, 7)
    if at + size > len(block):
        raise IndexError("a string is cut short")
    return at + size


def _string(block: bytes, at: int) -> tuple[bytes, int]:
    """Return a string, and its end (RFC 7541, section 5.2)."""
    is_huffman = block[at] & 0x80
    size, at = _integer(block, at, 7)
    end = at + size
    if end > len(block):
        raise IndexError("a string is cut short")
    return (_huffman(block[at:end]) if is_huffman else block[at:end]), end


_qpack = pylsqpack.Decoder(0, 0)
# A field section of QPACK without a table: one literal field with the name "x" (RFC 9204, section 4.5).
_SECTION = b"\x00\x00\x21x"
# ls-qpack decodes strings of up to 65,534 bytes. The shortest code has 5 bits, the longest 30.
_QPACK_BYTES = 65_534 * 5 // 8
_HUFFMAN_BYTES = LIST_BYTES * 30 // 8


def _huffman(text: bytes) -> bytes:
    """Decode a Huffman-coded string (RFC 7541, appendix B)."""
    size = len(text)
    if size > _HUFFMAN_BYTES:
        raise _Oversized
    try:
        value: bytes = _qpack.feed_header(0, _SECTION + _length(size, 0x80) + text)[1][0][1]
    except pylsqpack.DecompressionFailed as err:
        if size > _QPACK_BYTES:
            raise _Oversized from err
        raise IndexError("a string that is not Huffman-coded") from err
    return value


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


TABLE_UPDATE = b"\x20"
"""Table size update to 0, for a peer that has lowered the size: its next block begins with it (RFC 7541, section 4.2).
"""


def encode(fields: Fields) -> bytes:
    """Encode a block of literals, neither indexed nor Huffman-coded: it needs no table on either side."""
    parts: list[bytes] = []
    for name, value in fields:
        parts += [b"\x00", _length(len(name)), name, _length(len(value)), value]
    return b"".join(parts)


def _length(size: int, flags: int = 0) -> bytes:
    """Encode the length of a string; `flags` is 0x80 for a Huffman-coded one."""
    if size < 127:
        return bytes([flags | size])
    out, size = bytearray([flags | 127]), size - 127
    while size > 127:
        out.append(size & 127 | 128)
        size >>= 7
    out.append(size)
    return bytes(out)
