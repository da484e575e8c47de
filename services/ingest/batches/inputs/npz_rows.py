"""Reader of NPZ files: arrays by column name, whose first dimension is the rows.

Arrays of `numpy.savez` are read at their offsets. Arrays of `savez_compressed` are decompressed from their beginning; a
cached reader continues from its position.

Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import io
import math
import struct
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from services.ingest.batches.inputs.piece import ROW_BYTES, Piece, piece_rows
from shoal.errors import DataLoss, InvalidArgument

# https://pkware.cachefly.net/webdocs/APPNOTE/APPNOTE-6.3.9.TXT, 4.3.7: the lengths of name and extra field at 26.
_LOCAL_HEADER = 30
_BROKEN = (
    OSError,
    ValueError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    RuntimeError,
    KeyError,
    MemoryError,
    # numpy reads a header that is no Python with its tokenizer.
    tokenize.TokenError,
)
DIRECTORY_BYTES = 512 << 10
"""Directory of an archive: some 60 bytes for each array, which become a Python object of 1 KB."""
# numpy reads as many bytes as the header says that it has, and then refuses more than 10,000.
_HEADER_BYTES = 16 << 10
# Deflate is unpacked by as much as is read; zipfile unpacks all of what it has read of other methods.
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


@dataclass(frozen=True)
class Member:
    """Array of an NPZ file."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    info: zipfile.ZipInfo
    header_bytes: int

    @property
    def row_bytes(self) -> int:
        """Size of a row."""
        return self.dtype.itemsize * math.prod(self.shape[1:])


class NpzRows:
    """Reader of some columns. Closes `file`.

    Raises (in the constructor):
        InvalidArgument: as `members` does.
    """

    def __init__(self, file: BinaryIO, columns: frozenset[str]) -> None:
        self._file = file
        found = [member for member in members(file) if member.name in columns]
        self._zip = _archive(file)
        self._streams = [(member, _Stream(file, self._zip, member)) for member in found]
        self._total = found[0].shape[0] if found else 0
        self._piece_rows = piece_rows(1 << 30, sum(member.row_bytes for member in found))
        self._row = 0

    def seek(self, row: int, offset: int) -> None:
        """Go to row `row`."""
        self._row = row

    def read(self, limit: int) -> Piece:
        """Return the next rows."""
        count = min(limit, self._piece_rows, self._total - self._row)
        if count < 1:
            raise DataLoss(f"the arrays end before row {self._row}")
        first, self._row = self._row, self._row + count
        try:
            return Piece(first, count, {member.name: stream.rows(first, count) for member, stream in self._streams})
        except _BROKEN as err:
            raise DataLoss(f"broken near row {first}: {err}") from err

    def close(self) -> None:
        self._zip.close()
        self._file.close()


def members(file: BinaryIO) -> list[Member]:
    """Return the arrays of a file.

    Raises:
        InvalidArgument: the file is no NPZ file, or one of its arrays cannot be read row by row.
    """
    try:
        with _archive(file) as archive:
            return [_member(archive, info) for info in archive.infolist() if info.filename.endswith(".npy")]
    except InvalidArgument:
        raise
    except _BROKEN as err:
        raise InvalidArgument(f"not an NPZ file: {err}") from err


def _archive(file: BinaryIO) -> zipfile.ZipFile:
    """Return the archive in `file`. Raises as zipfile.ZipFile does."""
    # ZipFile reads the directory whole, with the size that the end of the file claims.
    end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    if end is not None and end[zipfile._ECD_SIZE] > DIRECTORY_BYTES:  # type: ignore[attr-defined]
        raise ValueError(f"its directory has {end[5]} bytes: at most {DIRECTORY_BYTES} are accepted")
    return zipfile.ZipFile(file)


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
    name = info.filename.removesuffix(".npy")
    if info.compress_type not in _METHODS:
        raise InvalidArgument(f"array {name!r} is packed by another method than those of numpy.savez_compressed")
    with archive.open(info) as opened:
        start = io.BytesIO(opened.read(_HEADER_BYTES))
    version = npy.read_magic(start)
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, is_fortran, dtype = read_header(start)
    header_bytes = start.tell()
    if dtype.hasobject or dtype.names or dtype.subdtype:
        raise InvalidArgument(
            f"array {name!r}: dtype {dtype} cannot be read: save numbers, or text as dtype str or bytes"
        )
    if not shape:
        raise InvalidArgument(f"array {name!r} is a single value: the first dimension must be the rows")
    if is_fortran and len(shape) > 1:
        raise InvalidArgument(f"array {name!r} is in Fortran order: save numpy.ascontiguousarray of it")
    found = Member(name, dtype, shape, info, header_bytes)
    if min(shape) < 0 or info.file_size - header_bytes != shape[0] * found.row_bytes:
        raise InvalidArgument(f"array {name!r}: its header says {dtype} {list(shape)}, but its size is another")
    if found.row_bytes > ROW_BYTES:
        raise InvalidArgument(f"array {name!r}: a row has {found.row_bytes} bytes: at most {ROW_BYTES} are accepted")
    return found


class _Stream:
    """Stream of one array's rows."""

    def __init__(self, file: BinaryIO, archive: zipfile.ZipFile, member: Member) -> None:
        self._member = member
        is_plain = member.info.compress_type == zipfile.ZIP_STORED and not member.info.flag_bits & 1
        self._raw = file if is_plain else None
        self._begin = _data_offset(file, member.info) if is_plain else 0
        self._packed: Any = None if is_plain else io.BufferedReader(cast(Any, archive.open(member.info)))

    def rows(self, first: int, count: int) -> NDArray[Any]:
        member = self._member
        size = count * member.row_bytes
        source = self._packed if self._raw is None else self._raw
        source.seek(self._begin + member.header_bytes + first * member.row_bytes)
        data = source.read(size)
        if len(data) < size:
            raise EOFError(f"array {member.name!r} ends early")
        return np.frombuffer(data, member.dtype).reshape(count, *member.shape[1:])


def _data_offset(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
        raise InvalidArgument(f"not an NPZ file: {info.filename!r} has no header")
    name, extra = struct.unpack("<HH", header[26:30])
    return int(info.header_offset + _LOCAL_HEADER + name + extra)
