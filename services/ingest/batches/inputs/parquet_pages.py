"""Bounds of Parquet pages, checked when their bytes are read: a page of a few bytes can claim, and become, gigabytes.

    pyarrow ──read──> GuardedPages ──> file
                           └─> header of each page that begins in these bytes; OversizedPages before pyarrow has them

The metadata at the end of a file claims sizes that nothing has to hold to; pyarrow allocates what page headers say.

Format: https://github.com/apache/parquet-format, src/main/thrift/parquet.thrift (PageHeader), in Thrift's compact
protocol: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa

PIECE_VALUES_BYTES = 128 << 20
"""Texts, bytes and values in lists, of all pages that are begun for one piece."""
_OPEN_BYTES, _OPEN_COLUMN_BYTES = 256 << 20, 4 << 20
# Pages that are checked in one read, before the rest waits: pages that compress well are many in a read of 1 MiB.
_AHEAD_BYTES = 8 << 20
# Statistics in a header hold two values of the column; writers cut long ones.
_HEADER_BYTES = 64 << 10
_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = 0, 2, 3
_DETAIL_OF = {_DATA_PAGE: 5, _DICTIONARY_PAGE: 7, _DATA_PAGE_V2: 8}
_DELTA_BYTE_ARRAY = 7
_LENGTH = struct.Struct("<I")
# The texts of a larger dictionary are not measured: one of them may have all its bytes. Writers end dictionaries at
# 1 MiB; to measure takes Python 0.1 us a text.
_MEASURED_BYTES, _MEASURED_TEXTS = 2 << 20, 150_000
_CODECS = {"UNCOMPRESSED": None, "SNAPPY": "snappy", "GZIP": "gzip", "ZSTD": "zstd", "BROTLI": "brotli"}
# A level of nesting takes two bytes for each value, and a value in a list has two levels.
_LEVELS_BYTES = 4


class OversizedPages(ValueError):
    """Pages would take more memory than a reader may; the message says what to do."""


@dataclass(frozen=True, slots=True)
class PageHeader:
    """Sizes in the header of a page."""

    kind: int
    header_bytes: int
    unpacked_bytes: int
    packed_bytes: int
    values: int
    encoding: int


@dataclass(slots=True)
class ColumnPages:
    """Pages of one column in one row group, and how far they have been checked."""

    name: str
    begin: int
    end: int
    value_bytes: int
    """Size of one value; 0 for texts and bytes, whose page holds them."""
    is_nested: bool
    has_prefixes: bool
    """True when the metadata says that texts are encoded by the prefix that they share with the one before."""
    compression: str
    """Name of the codec in the metadata."""
    next_header: int = 0
    dictionary_bytes: int = 0
    is_measured: bool = False
    """True after `read_longest_text`: a dictionary must be where it was found."""
    page_bytes: int = 0

    @property
    def has_texts(self) -> bool:
        """True for texts and bytes outside of lists."""
        return not self.value_bytes and not self.is_nested

    @property
    def open_bytes(self) -> int:
        """Memory that the column's dictionary and current page take."""
        return self.dictionary_bytes + self.page_bytes


class GuardedPages(io.RawIOBase):
    """File for pyarrow, which raises OversizedPages instead of returning a page beyond the bounds. Closes `file`."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self._columns: Sequence[ColumnPages] = ()
        self._piece_bytes = 0

    def guard(self, columns: Sequence[ColumnPages]) -> None:
        """Check the pages of `columns`, all of one row group, from now on.

        Raises:
            OversizedPages: the columns overlap, so that one byte would belong to two pages.
        """
        at = 0
        for column in sorted(columns, key=lambda each: each.begin):
            if not at <= column.begin <= column.end:
                raise OversizedPages(f"column {column.name!r} overlaps another one")
            at = column.end
        self._columns = columns

    def read_longest_text(self, column: ColumnPages) -> int:
        """Return the bytes of the longest text in the dictionary of a column, or a bound; 0 without a dictionary.

        Raises:
            OversizedPages: the column does not begin with the header of a page.
        """
        column.is_measured = True
        self._file.seek(column.begin)
        header = page_header(self._file.read(min(_HEADER_BYTES, column.end - column.begin)))
        if header.kind != _DICTIONARY_PAGE:
            return 0
        is_small = max(header.unpacked_bytes, header.packed_bytes) <= _MEASURED_BYTES
        if not is_small or header.values > _MEASURED_TEXTS or column.compression not in _CODECS:
            return header.unpacked_bytes
        self._file.seek(column.begin + header.header_bytes)
        return _longest_text(self._file.read(header.packed_bytes), header, _CODECS[column.compression])

    def begin_piece(self) -> None:
        """Count the values of the next piece from zero."""
        self._piece_bytes = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int | None = -1) -> bytes:
        at = self._file.tell()
        data = self._file.read(-1 if size is None else size)
        end = at + len(data)
        for column in self._columns:
            if at < column.end and end > column.begin:
                end = self._checked(column, at, end)
        self._file.seek(end)
        return data[: end - at]

    def close(self) -> None:
        self._file.close()
        super().close()

    def _checked(self, column: ColumnPages, start: int, end: int) -> int:
        """Check the pages that begin before `end`. Return `end`, or the end of a page before it.

        Pages behind large ones are left for the next read: pyarrow may need them for the next piece only.
        """
        if start <= column.begin:
            column.next_header, column.dictionary_bytes, column.page_bytes = column.begin, 0, 0
        ahead = 0
        while column.next_header < min(end, column.end):
            if ahead > _AHEAD_BYTES:
                return max(column.next_header, start)
            at = column.next_header
            self._file.seek(at)
            header = page_header(self._file.read(min(_HEADER_BYTES, column.end - column.next_header)))
            column.next_header += header.header_bytes + header.packed_bytes
            ahead += self._admit(column, header, is_first=at == column.begin)
        return end

    def _admit(self, column: ColumnPages, header: PageHeader, *, is_first: bool) -> int:
        """Count a page. Return the memory that it takes, with its values."""
        counted = self._piece_bytes
        if header.kind == _DICTIONARY_PAGE:
            # No value of a dictionary takes less than a byte.
            if header.values > header.unpacked_bytes:
                raise OversizedPages(f"the dictionary of column {column.name!r} claims {header.values} values")
            if column.is_measured and not is_first:
                raise OversizedPages(f"the dictionary of column {column.name!r} is not at its beginning")
            column.dictionary_bytes = header.unpacked_bytes
        else:
            column.page_bytes = header.unpacked_bytes
            self._count(column, header)
        limit = max(_OPEN_BYTES, _OPEN_COLUMN_BYTES * len(self._columns))
        if (size := sum(each.open_bytes for each in self._columns)) > limit:
            raise OversizedPages(
                f"the pages of column {column.name!r} take {size} bytes when they are decompressed, at most {limit} "
                "are accepted: write smaller pages, as with data_page_size of pyarrow"
            )
        return header.unpacked_bytes + self._piece_bytes - counted

    def _count(self, column: ColumnPages, header: PageHeader) -> None:
        # A batch holds the texts and bytes of all pages that it has rows of.
        size = 0 if column.value_bytes else header.unpacked_bytes
        if column.is_nested:
            size += header.values * (column.value_bytes + _LEVELS_BYTES)
        if column.has_prefixes:
            # Each value may repeat the whole page, or the whole dictionary.
            size += max(header.unpacked_bytes, column.dictionary_bytes) * (header.values if column.is_nested else 1)
        elif header.encoding == _DELTA_BYTE_ARRAY and not column.value_bytes:
            raise OversizedPages(f"column {column.name!r} has an encoding that its metadata does not name")
        self._piece_bytes += size
        if self._piece_bytes > PIECE_VALUES_BYTES:
            raise OversizedPages(
                f"column {column.name!r}: the pages of one row hold {self._piece_bytes} bytes or more, at most "
                f"{PIECE_VALUES_BYTES} are accepted: write shorter rows, or smaller pages"
            )


def _longest_text(page: bytes, header: PageHeader, codec: str | None) -> int:
    """Return the bytes of the longest text in a dictionary page: each has its length before it.

    Of a broken page, return all bytes: pyarrow raises the error.
    """
    longest = at = 0
    try:
        data: Any = pa.decompress(page, header.unpacked_bytes, codec) if codec else page
        for _ in range(header.values):
            (size,) = _LENGTH.unpack_from(data, at)
            at += _LENGTH.size + size
            if size > longest:
                longest = size
    except (pa.ArrowException, OSError, struct.error):
        return header.unpacked_bytes
    return longest


def page_header(data: bytes) -> PageHeader:
    """Return the sizes in the page header at the beginning of `data`.

    Raises:
        OversizedPages: there is none, or it is longer than `data`.
    """
    reader = _Compact(data)
    try:
        fields = reader.struct()
        kind = _whole(fields, 1)
        detail = fields.get(_DETAIL_OF.get(kind, 0), {})
        if not isinstance(detail, dict) or (kind in _DETAIL_OF and not detail):
            raise ValueError("no sizes of values")
        encoding = _whole(detail, 4 if kind == _DATA_PAGE_V2 else 2) if detail else 0
        values = _whole(detail, 1) if detail else 0
        return PageHeader(kind, reader.at, _whole(fields, 2), _whole(fields, 3), values, encoding)
    except (IndexError, ValueError, KeyError) as err:
        raise OversizedPages(f"the header of a page is broken, or longer than {_HEADER_BYTES} bytes: {err}") from err


def _whole(fields: dict[int, object], number: int) -> int:
    value = fields[number]
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"field {number} is {value!r}")
    return value


class _Compact:
    """Reader of Thrift's compact protocol: integers and structs; other fields are skipped.

    Raises (everywhere): IndexError at the end of the data, ValueError.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def struct(self, depth: int = 0) -> dict[int, object]:
        """Return the fields by number; a field that stands there twice is an error, as readers differ on it."""
        if depth > 8:
            raise ValueError("nested too deeply")
        fields: dict[int, object] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._zigzag()
            if number in fields:
                raise ValueError(f"field {number} stands there twice")
            fields[number] = self._value(head & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> object:
        if kind in (1, 2):
            return kind == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._zigzag()
        if kind == 7:
            self._skip(8)
        elif kind == 8:
            self._skip(self._varint())
        elif kind == 12:
            return self.struct(depth + 1)
        else:
            # The header of a page has no lists, sets or maps.
            raise ValueError(f"type {kind}")
        return None

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _skip(self, size: int) -> None:
        self.at += size
        if self.at > len(self._data):
            raise IndexError("cut off")

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 0x80:
            value |= (byte & 0x7F) << shift
            shift += 7
            if shift > 63:
                raise ValueError("a number of more than 64 bits")
        return value | byte << shift

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
