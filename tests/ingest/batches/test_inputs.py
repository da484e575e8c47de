"""Readers and the plan: every row of every file, once, in its order, wherever it is cut and wherever one goes on."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ingest.batches.batch import Batch, Chunk, Format
from services.ingest.batches.inputs import json_lines, npz_rows, parquet_pages, parquet_rows, ranged
from services.ingest.batches.inputs.arrow_cells import cells_of
from services.ingest.batches.inputs.json_lines import JsonLines
from services.ingest.batches.inputs.locations import Entry, InputLocations, is_within
from services.ingest.batches.inputs.npz_rows import NpzRows
from services.ingest.batches.inputs.object_rows import ObjectRows
from services.ingest.batches.inputs.parquet_rows import ParquetRows
from services.ingest.batches.inputs.piece import ROW_BYTES, Piece, Rows, Span
from services.ingest.batches.plan import plan
from services.ingest.batches.readers import ReaderCache, read_pinned, rows_of
from services.ingest.batches.rows.signature import Signature, TensorSpec
from shoal.errors import AlreadyExists, DataLoss, InvalidArgument, NotFound, PermissionDenied
from tests.ingest.batches.making import DOUBLE, batch, listing, locations, write_lines, write_npz, write_parquet

X = np.arange(28, dtype=np.float32).reshape(7, 4)


def all_of(rows: Rows, count: int, most: int = 3, name: str = "x") -> list[Any]:
    """The cells of the next `count` rows."""
    found: list[Any] = []
    while len(found) < count:
        piece = rows.read(min(most, count - len(found)))
        assert piece.first >= 0
        found += list(piece.columns[name])
    return found


def files_of_x(folder: Path) -> dict[str, str]:
    """X in every format."""
    return {
        "jsonl": write_lines(folder / "in.jsonl", [{"x": row.tolist(), "id": n} for n, row in enumerate(X)]),
        "parquet": write_parquet(folder / "in.parquet", {"x": list(X), "id": range(7)}, row_group_size=3),
        "npz": write_npz(folder / "in.npz", x=X, id=np.arange(7)),
        "packed": write_npz(folder / "packed.npz", packed=True, x=X, id=np.arange(7)),
    }


def open_rows(kind: str, url: str) -> Rows:
    file = locations().open(locations().stat(url))
    columns = frozenset({"x"})
    if kind == "jsonl":
        return JsonLines(file, columns)
    return ParquetRows(file, columns) if kind == "parquet" else NpzRows(file, columns)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "npz", "packed"])
def test_all_rows_come_in_their_order(kind: str, tmp_path: Path) -> None:
    rows = open_rows(kind, files_of_x(tmp_path)[kind])
    assert np.array_equal(np.array(all_of(rows, 7)), X)
    with pytest.raises(DataLoss):
        rows.read(1)
    rows.close()


@pytest.mark.parametrize("kind", ["parquet", "npz", "packed"])
@pytest.mark.parametrize("row", [0, 2, 3, 4, 6])
def test_a_reader_goes_to_any_row_forward_and_back(kind: str, row: int, tmp_path: Path) -> None:
    rows = open_rows(kind, files_of_x(tmp_path)[kind])
    all_of(rows, 4)
    rows.seek(row, 0)
    assert np.array_equal(np.array(all_of(rows, 7 - row)), X[row:])
    rows.close()


def test_lines_that_are_no_rows_fail_alone() -> None:
    lines = [
        b'{"x": 1}',
        b"nonsense",
        b"[1]",
        b"",
        b'{"x": {"b64": "aGk="}}',
        b'{"x": {"b64": "?"}}',
        b"\xff",
        b'{"x": 2}',
    ]
    piece = JsonLines(io.BytesIO(b"\n".join(lines)), frozenset({"x"})).read(100)
    assert piece.columns["x"] == [1, None, None, None, b"hi", None, None, 2]
    assert [*piece.errors] == [1, 2, 3, 5, 6]
    assert "expected an object" in piece.errors[2]
    assert "empty line" in piece.errors[3]


def test_a_line_beyond_the_limit_fails_and_the_next_is_read() -> None:
    data = b'{"x": "' + b"a" * (ROW_BYTES + 5_000_000) + b'"}\n{"x": 1}\n'
    rows = JsonLines(io.BytesIO(data), frozenset({"x"}))
    first, second = rows.read(1), rows.read(1)
    assert "longer than" in first.errors[0]
    assert second.columns["x"] == [1]


# The parser stops at a depth of about a thousand, and the search for bytes in its lists before that.
@pytest.mark.parametrize("depth", [600, 950, 90_000])
def test_deeply_nested_json_fails_its_row_only(depth: int) -> None:
    data = b'{"x": ' + b"[" * depth + b"]" * depth + b'}\n{"x": 1}\n'
    piece = JsonLines(io.BytesIO(data), frozenset({"x"})).read(10)
    assert [*piece.errors] == [0]
    assert piece.columns["x"][1] == 1


@given(
    lines=st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")), max_size=40),
    tail=st.booleans(),
    chunk_rows=st.integers(1, 7),
    chunk_bytes=st.integers(1, 60),
    cut=st.integers(0, 50),
)
def test_spans_hold_every_line_once_and_a_plan_goes_on_anywhere(
    lines: list[bytes], tail: bool, chunk_rows: int, chunk_bytes: int, cut: int
) -> None:
    data = b"\n".join(lines) + (b"\n" if tail and lines else b"")
    spans = list(json_lines.spans(io.BytesIO(data), chunk_rows, chunk_bytes))
    expected = data.splitlines(keepends=True) if b"\r" not in data else None
    at = row = 0
    for span in spans:
        assert (span.offset, span.row) == (at, row)
        text = data[span.offset : span.end]
        assert 1 <= span.rows <= chunk_rows
        assert span.rows == text.count(b"\n") + (not text.endswith(b"\n"))
        assert span.end == len(data) or text.endswith(b"\n")
        at, row = span.end, row + span.rows
    assert at == len(data)
    if expected is not None and b"\x0b" not in data:
        assert row == data.count(b"\n") + bool(data and not data.endswith(b"\n"))
    if cut < len(spans):
        last = spans[cut]
        again = json_lines.spans(io.BytesIO(data), chunk_rows, chunk_bytes, row=last.row + last.rows, offset=last.end)
        assert list(again) == spans[cut + 1 :]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not an NPZ"),
        (b"PK\x03\x04" + b"\0" * 100, "not an NPZ"),
        (b"\x93NUMPY nonsense", "not an NPZ"),
    ],
)
def test_what_is_no_npz_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        npz_rows.members(io.BytesIO(data))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array([{}, {}], dtype=object), "dtype object"),
        (np.array(3.0), "first dimension"),
        (np.asfortranarray(np.ones((2, 3))), "Fortran"),
        (np.zeros(2, dtype=[("a", "f4")]), "dtype"),
        (np.zeros((1, ROW_BYTES + 1), np.uint8), "a row has"),
    ],
    ids=["objects", "scalar", "fortran", "structured", "large"],
)
def test_an_array_that_cannot_be_read_by_rows_is_refused(array: Any, words: str) -> None:
    file = io.BytesIO()
    np.savez(file, x=array)
    with pytest.raises(InvalidArgument, match=words):
        npz_rows.members(file)


def test_an_array_whose_header_lies_is_refused() -> None:
    file = io.BytesIO()
    np.savez(file, x=np.zeros((2, 4), np.float32))
    lying = file.getvalue().replace(b"(2, 4)", b"(9, 4)")
    with pytest.raises(InvalidArgument):
        npz_rows.members(io.BytesIO(lying))


@pytest.mark.parametrize("keep", [0, 4, 40, 300])
def test_a_parquet_file_that_was_cut_is_named_as_such(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    write_parquet(path, {"x": list(range(10_000))})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InvalidArgument, match="not a Parquet file"):
        ParquetRows(path.open("rb"), frozenset({"x"}))


def test_parquet_pages_that_are_broken_are_data_loss(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    write_parquet(path, {"x": np.random.default_rng(0).random(10_000)}, compression="zstd")
    data = bytearray(path.read_bytes())
    data[4:2000] = b"\xff" * 1996
    path.write_bytes(data)
    with pytest.raises(DataLoss):
        all_of(ParquetRows(path.open("rb"), frozenset({"x"})), 10_000, most=500)


def test_a_row_group_of_texts_is_not_kept_in_memory(tmp_path: Path) -> None:
    texts = [f"{n:08d}" * 80 for n in range(100_000)]
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"x": texts}), path)
    grown, error = peak_mib(path, len(texts))
    assert not error
    # The texts have 61 MiB; the pages of a piece, and what Python and pyarrow take, some 30.
    assert grown < 100


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary()])
def test_pieces_of_short_texts_are_whole(kind: Any, tmp_path: Path) -> None:
    texts = pa.array([f"text {n}" for n in range(20_000)]).cast(kind)
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"x": texts}), path)
    rows = ParquetRows(path.open("rb"), frozenset({"x"}))
    pieces: list[Piece] = []
    while sum(piece.count for piece in pieces) < len(texts):
        pieces.append(rows.read(len(texts)))
    rows.close()
    assert pa.chunked_array([piece.arrow["x"] for piece in pieces]).to_pylist() == texts.to_pylist()
    assert len(pieces) <= 2 * len(texts) / 512


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd", "brotli"])
def test_short_texts_are_read_in_large_batches_whatever_the_size_of_their_dictionary(
    compression: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, begin = [], parquet_pages.GuardedPages.begin_piece
    monkeypatch.setattr(parquet_pages.GuardedPages, "begin_piece", lambda pages: (batches.append(1), begin(pages)))
    path, texts = tmp_path / "in.parquet", [f"text {n}" for n in range(30_000)]
    # The longest text is neither the first nor the last one.
    texts[100] = "x" * 1000
    pq.write_table(pa.table({"x": texts}), path, compression=compression)
    assert all_of(ParquetRows(path.open("rb"), frozenset({"x"})), len(texts), most=len(texts)) == texts
    # Two batches of 16,384 rows at the most, and the end.
    assert len(batches) == 3


def test_a_row_may_repeat_the_longest_text_of_a_dictionary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    joined = ParquetRows._joined

    def counted(batches: Iterator[Any]) -> Iterator[Any]:
        for each in batches:
            rows.append(each.num_rows)
            yield each

    monkeypatch.setattr(parquet_rows, "_REPEATED_BYTES", 1 << 20)
    monkeypatch.setattr(ParquetRows, "_joined", lambda reader, batches: joined(reader, counted(batches)))
    path, texts = tmp_path / "in.parquet", ["a", "x" * 10_000, "b"] * 200
    pq.write_table(pa.table({"x": texts}), path)
    assert all_of(ParquetRows(path.open("rb"), frozenset({"x"})), len(texts), most=len(texts)) == texts
    assert max(rows) == (1 << 20) // 10_000


# The most memory that a reader may take for a file of less than 1 MB: the bounds of pages, and what Python takes.
BOMB_MIB = 400


def peak_mib(path: Path, rows: int) -> tuple[int, str]:
    """Read a file in a process of its own; return the growth of its memory, and the last error."""
    code = f"""
import sys
from services.ingest.batches.batch import Format
from services.ingest.batches.chunk_runner import prepare
from services.ingest.batches.mapping import RequestedColumns
from services.ingest.batches.readers import rows_of
from services.ingest.batches.rows.signature import TensorSpec
import pyarrow as pa
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) >> 10
before, left, last = peak(), {rows}, ""
requested = RequestedColumns(((TensorSpec("x", "BYTES", (-1,)), "x"),), pa.schema([]))
try:
    rows = rows_of(Format({path.suffix[1:]!r}), open({str(path)!r}, "rb"), frozenset(["x"]))
    while left > 0:
        piece = rows.read(left)
        left -= piece.count
        last = next(iter(piece.errors.values()), last)
        prepare(requested, piece, 8)
except Exception as err:
    last = str(err)
print(peak() - before, last[:300])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    grown, _, error = done.stdout.strip().partition(" ")
    return int(grown), error


def repeated(text: str, count: int) -> Any:
    """An array that holds `text` once, and refers to it `count` times."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([text]))


def write_bomb(path: Path, column: Any, **options: Any) -> Path:
    made = {"compression": "zstd", "store_schema": False, "write_statistics": False, **options}
    pq.write_table(pa.table({"x": column}), path, **made)
    assert path.stat().st_size < 10_000
    return path


def test_one_long_text_that_all_rows_refer_to_fails_them_one_by_one(tmp_path: Path) -> None:
    bomb = write_bomb(tmp_path / "in.parquet", repeated("a" * 13_500_000, 512))
    grown, error = peak_mib(bomb, 512)
    assert grown < BOMB_MIB
    assert "the row has 13500000 bytes: at most 12582912" in error


def test_lists_of_one_long_text_are_bounded(tmp_path: Path) -> None:
    lists = pa.ListArray.from_arrays(np.arange(0, 100_001, 1000, dtype=np.int32), repeated("a" * 1_000_000, 100_000))
    grown, error = peak_mib(write_bomb(tmp_path / "in.parquet", lists), 100)
    assert grown < BOMB_MIB
    assert "the row has 1000000000 bytes" in error


def test_a_row_that_is_far_longer_than_the_others_is_not_read_whole(tmp_path: Path) -> None:
    ends = np.cumsum([0, *[4] * 1000, 40_000_000])
    lists = pa.LargeListArray.from_arrays(ends, np.zeros(ends[-1], np.float32))
    grown, error = peak_mib(write_bomb(tmp_path / "in.parquet", lists), 1001)
    assert grown < BOMB_MIB
    assert "near row 0: column 'x.list.element': the pages of one row hold" in error


def test_texts_that_share_a_prefix_are_read_row_by_row(tmp_path: Path) -> None:
    texts = pa.array(["a" * 4_000_000 + str(n) for n in range(60)])
    options = {"use_dictionary": False, "column_encoding": {"x": "DELTA_BYTE_ARRAY"}}
    grown, error = peak_mib(write_bomb(tmp_path / "in.parquet", texts, **options), 60)
    assert grown < BOMB_MIB
    assert not error


def test_rows_that_are_larger_than_their_metadata_says_are_read_one_by_one(tmp_path: Path) -> None:
    sizes = [1] * 1000 + [5_000_000] * 60
    texts = pa.array(["a" * size for size in sizes])
    url = write_parquet(
        tmp_path / "in.parquet",
        {"x": texts},
        use_dictionary=False,
        data_page_size=1,
        write_batch_size=1,
        compression="zstd",
    )
    rows = open_rows("parquet", url)
    rows.seek(900, 0)
    assert [len(cell) for cell in all_of(rows, 160, most=200)] == sizes[900:]
    grown, error = peak_mib(tmp_path / "in.parquet", len(sizes))
    assert grown < BOMB_MIB
    assert not error


def test_an_encoding_that_the_metadata_does_not_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    options = {"use_dictionary": False, "column_encoding": {"x": "DELTA_BYTE_ARRAY"}, "compression": "none"}
    write_parquet(path, {"x": ["abc", "abcd"]}, **options)
    rows = ParquetRows(path.open("rb"), frozenset({"x"}))
    assert all_of(rows, 2) == ["abc", "abcd"]
    guard = parquet_pages.GuardedPages(path.open("rb"))
    guard.guard(
        [parquet_pages.ColumnPages("x", 4, path.stat().st_size, 0, is_nested=False, has_prefixes=False, compression="")]
    )
    guard.seek(4)
    with pytest.raises(parquet_pages.OversizedPages, match="an encoding that its metadata does not name"):
        guard.read(20)


@pytest.mark.parametrize("options", [{}, {"data_page_version": "2.0"}, {"use_dictionary": False}], ids=str)
def test_headers_of_pages_are_read_as_pyarrow_does(options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    write_parquet(path, {"x": list(range(5_000))}, data_page_size=1_000, **options)
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    data = path.read_bytes()
    at = column.dictionary_page_offset or column.data_page_offset
    end, values = at + column.total_compressed_size, 0
    while at < end:
        header = parquet_pages.page_header(data[at:end])
        at += header.header_bytes + header.packed_bytes
        values += header.values if header.kind != 2 else 0
    assert (at, values) == (end, 5_000)


def test_columns_that_share_bytes_are_refused() -> None:
    one, two = (
        parquet_pages.ColumnPages("x", at, at + 10, 4, is_nested=False, has_prefixes=False, compression="")
        for at in (4, 9)
    )
    with pytest.raises(parquet_pages.OversizedPages, match="overlaps"):
        parquet_pages.GuardedPages(io.BytesIO()).guard([one, two])


@pytest.mark.parametrize(
    "data", [b"", b"\x15", b"\x15\x00\x15\x01\x15\x00\x00", b"\x15\x00\x05\x02\x00\x00", b"\x19" * 99]
)
def test_a_broken_header_of_a_page_is_refused(data: bytes) -> None:
    with pytest.raises(parquet_pages.OversizedPages, match="broken"):
        parquet_pages.page_header(data)


def test_a_footer_that_claims_to_be_huge_is_refused() -> None:
    data = b"PAR1" + b"\0" * 100 + (parquet_rows.FOOTER_BYTES + 1).to_bytes(4, "little") + b"PAR1"
    with pytest.raises(InvalidArgument, match=r"its metadata has \d+ bytes, at most"):
        parquet_rows.open_parquet(io.BytesIO(data))


@pytest.mark.parametrize("kind", ["parquet", "npz"])
def test_a_file_without_a_reader_is_closed(kind: str) -> None:
    file = io.BytesIO(b"nonsense")
    with pytest.raises(InvalidArgument):
        rows_of(Format(kind), file, frozenset({"x"}))
    assert file.closed


def header_bomb(header: bytes, method: int = zipfile.ZIP_DEFLATED) -> io.BytesIO:
    """An archive of one array that begins with `header`."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("x.npy", header)
    return file


def test_a_header_of_an_array_is_not_read_beyond_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "in.npz"
    size = 600_000_000
    path.write_bytes(header_bomb(b"\x93NUMPY\x02\x00" + size.to_bytes(4, "little") + b" " * size).getvalue())
    grown, error = peak_mib(path, 1)
    assert grown < BOMB_MIB
    assert "not an NPZ file" in error


@pytest.mark.parametrize("text", ["(" * 5_000, "{'descr': " + "[" * 4_000 + "]" * 4_000 + "}", "9" * 9_000], ids=len)
def test_a_header_of_an_array_that_is_nested_is_refused(text: str) -> None:
    header = b"\x93NUMPY\x01\x00" + (len(text) + 1).to_bytes(2, "little") + text.encode() + b"\n"
    with pytest.raises(InvalidArgument, match="not an NPZ file"):
        npz_rows.members(header_bomb(header))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_array_packed_by_another_method_is_refused(method: int) -> None:
    file = io.BytesIO()
    np.save(file, np.zeros(10))
    with pytest.raises(InvalidArgument, match="packed by another method"):
        npz_rows.members(header_bomb(file.getvalue(), method))


def test_a_directory_of_an_archive_is_bounded() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for n in range(npz_rows.DIRECTORY_BYTES // 50):
            archive.writestr(f"{n}.npy", b"")
    with pytest.raises(InvalidArgument, match="its directory has"):
        npz_rows.members(file)


def test_a_line_of_too_many_values_fails_and_the_next_is_read(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"x": [' + b"0.5," * 700_000 + b'0]}\n{"x": [' + b"[]," * 200_000 + b'0]}\n{"x": 1}\n')
    rows = JsonLines(path.open("rb"), frozenset({"x"}))
    found = [rows.read(3), rows.read(2), rows.read(1)]
    assert [piece.count for piece in found] == [1, 1, 1]
    assert "700000 values, at most 600000 are accepted: write such rows as Parquet or NPZ" in found[0].errors[0]
    assert "200003 lists, objects and names, at most 100000" in found[1].errors[0]
    assert found[2].columns["x"] == [1]


def test_a_long_text_among_numbers_takes_no_memory_for_each_of_them(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"x": [0] * 20_000 + ["a" * 50_000]}) + "\n")
    grown, _ = peak_mib(path, 1)
    assert grown < BOMB_MIB


@pytest.mark.parametrize(
    ("column", "shape"),
    [
        (pa.array([1.5, 2.5]), (2,)),
        (pa.array([[1, 2], [3, 4]]), (2, 2)),
        (pa.array([[[1, 2]], [[3, 4]]]), (2, 1, 2)),
        (pa.array([[1, 2], [3, 4]], pa.list_(pa.int8(), 2)), (2, 2)),
        (pa.array([[1], [2, 3]]), None),
        (pa.array([1, None]), None),
        (pa.array([[1, None], [2, 3]]), None),
        (pa.array(["a", "b"]).dictionary_encode(), None),
        (pa.array([True, False]), (2,)),
        (pa.array([[0, 0], [1, 2], [3, 4]]).slice(1), (2, 2)),
        (pa.array([[0, 0], [1, 2], [3, 4]], pa.list_(pa.int8(), 2)).slice(1), (2, 2)),
    ],
    ids=str,
)
def test_arrow_columns_are_arrays_where_they_can_be(column: Any, shape: tuple[int, ...] | None) -> None:
    cells = cells_of(column)
    assert (cells.shape if isinstance(cells, np.ndarray) else None) == shape
    assert [
        cell.tolist() if isinstance(cell, np.ndarray | np.generic) else cell for cell in cells
    ] == column.to_pylist()


def test_objects_are_rows_and_one_that_is_gone_fails_alone(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    urls = []
    for n in range(5):
        (folder / f"{n}.bin").write_bytes(bytes([n]) * 3)
        urls.append(f"file://{folder}/{n}.bin")
    entry = listing(tmp_path, urls)
    (folder / "2.bin").unlink()
    (folder / "3.bin").write_bytes(b"another")
    where = locations()
    rows = ObjectRows(where.open(entry), lambda one: read_pinned(where, one))
    rows.seek(0, 0)
    piece = rows.read(10)
    assert piece.columns["content"] == [b"\0\0\0", b"\1\1\1", None, None, b"\4\4\4"]
    assert piece.sources == urls
    assert [*piece.errors] == [2, 3]
    assert "has changed" in piece.errors[3]
    rows.close()


def chunks_of(one: Batch, where: InputLocations, tail: Chunk | None = None) -> list[Chunk]:
    return list(plan(where, one, tail))


def rows_read(one: Batch, chunks: list[Chunk]) -> Iterator[tuple[int, float]]:
    """The number of each row, and the first value of its x."""
    readers = ReaderCache(locations())
    for chunk in chunks:
        rows = readers.acquire(one, chunk)
        for n, cell in enumerate(all_of(rows, chunk.span.rows)):
            yield chunk.first + n, cell[0]
        readers.release(one, chunk, rows)
    readers.close()


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "npz", "packed"])
@pytest.mark.parametrize("chunk_rows", [1, 2, 5, 100])
def test_a_plan_goes_on_after_any_of_its_chunks(kind: str, chunk_rows: int, tmp_path: Path) -> None:
    url = files_of_x(tmp_path)[kind]
    form = Format.NPZ if kind == "packed" else Format(kind)
    pinned = listing(tmp_path, [url, url])
    one = batch(tmp_path, format=form, listing=pinned, chunk_rows=chunk_rows)
    chunks = chunks_of(one, locations())
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    for n, tail in enumerate(chunks):
        assert chunks_of(one, locations(), tail) == chunks[n + 1 :]
    expected = [(n, float(X[n % 7][0])) for n in range(14)]
    assert list(rows_read(one, chunks)) == expected
    assert sorted(rows_read(one, chunks[::-1])) == expected


def test_a_file_that_changed_since_it_was_pinned_is_found_out(tmp_path: Path) -> None:
    url = files_of_x(tmp_path)["jsonl"]
    one = batch(tmp_path, listing=listing(tmp_path, [url]), chunk_rows=2)
    chunks = chunks_of(one, locations())
    write_lines(tmp_path / "in.jsonl", [{"x": [0, 0, 0, 0]}] * 9)
    with pytest.raises(DataLoss, match="has changed"):
        chunks_of(one, locations())
    with pytest.raises(DataLoss, match=r"in\.jsonl has changed"):
        list(rows_read(one, chunks))


def test_a_reader_that_is_kept_sees_no_change_without_a_word(tmp_path: Path) -> None:
    url = files_of_x(tmp_path)["jsonl"]
    one = batch(tmp_path, listing=listing(tmp_path, [url]), chunk_rows=2)
    chunks, readers = chunks_of(one, locations()), ReaderCache(locations())
    readers.release(one, chunks[0], readers.acquire(one, chunks[0]))
    rows = readers.acquire(one, chunks[1])
    write_lines(tmp_path / "in.jsonl", [{"x": [0, 0, 0, 0]}] * 9)
    with pytest.raises(DataLoss, match="has changed"):
        readers.release(one, chunks[1], rows)
    with pytest.raises(DataLoss, match="has changed"):
        readers.acquire(one, chunks[0])


def test_a_file_that_is_gone_is_said(tmp_path: Path) -> None:
    url = files_of_x(tmp_path)["jsonl"]
    one = batch(tmp_path, listing=listing(tmp_path, [url]), chunk_rows=2)
    chunks = chunks_of(one, locations())
    (tmp_path / "in.jsonl").unlink()
    with pytest.raises(NotFound):
        list(rows_read(one, chunks))


def test_a_second_file_that_is_unfit_is_named(tmp_path: Path) -> None:
    good = files_of_x(tmp_path)["parquet"]
    bad = write_parquet(tmp_path / "bad.parquet", {"x": ["a", "b"]})
    one = batch(tmp_path, format=Format.PARQUET, listing=listing(tmp_path, [good, bad]))
    with pytest.raises(InvalidArgument, match=r"bad\.parquet: column 'x' holds string, and the model takes x FP32"):
        chunks_of(one, locations())


def test_a_file_that_says_it_has_rows_without_end_is_refused(tmp_path: Path) -> None:
    url = write_npz(tmp_path / "endless.npz", x=np.zeros((10**18, 0), np.float32))
    assert (tmp_path / "endless.npz").stat().st_size < 1_000
    rows = Signature((TensorSpec("x", "FP32", (-1,)),), DOUBLE.outputs, 8)
    one = batch(tmp_path, format=Format.NPZ, listing=listing(tmp_path, [url]), signature=rows)
    with pytest.raises(InvalidArgument, match=r"endless\.npz: the file claims 10{18} rows"):
        next(plan(locations(), one, None))


def test_an_empty_file_has_no_chunks(tmp_path: Path) -> None:
    for form, url in (
        (Format.JSONL, write_lines(tmp_path / "a.jsonl", [])),
        (Format.PARQUET, write_parquet(tmp_path / "a.parquet", {"x": pa.array([], pa.list_(pa.float32()))})),
        (Format.NPZ, write_npz(tmp_path / "a.npz", x=np.zeros((0, 4), np.float32))),
    ):
        assert chunks_of(batch(tmp_path, format=form, listing=listing(tmp_path, [url])), locations()) == []


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("", InvalidArgument),
        ("rows.jsonl", InvalidArgument),
        ("ftp://host/x", InvalidArgument),
        ("file://host/x", InvalidArgument),
        ("file:///etc/passwd", PermissionDenied),
        ("file:///data/../etc/passwd", PermissionDenied),
        ("s3://other/x", PermissionDenied),
        ("s3://bucket/../x", InvalidArgument),
        ("s3://bucket//x", InvalidArgument),
        ("s3:///x", InvalidArgument),
        ("s3://bucket/" + "x" * 3000, InvalidArgument),
        ("file:///data/\0", InvalidArgument),
        ("file:///data/%00", InvalidArgument),
    ],
)
def test_places_that_may_not_be_used(url: str, error: type[Exception]) -> None:
    with pytest.raises(error, match="inputs"):
        InputLocations(["file:///data", "s3://bucket"]).check("inputs", url)


def test_a_link_out_of_what_is_allowed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "allowed").mkdir()
    (tmp_path / "secret").write_text("s")
    (tmp_path / "allowed" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(PermissionDenied):
        InputLocations([f"file://{tmp_path}/allowed"]).check("inputs", f"file://{tmp_path}/allowed/link")


@pytest.mark.parametrize(
    ("url", "root", "answer"),
    [
        ("s3://a/b/c", "s3://a/b", True),
        ("s3://a/bc", "s3://a/b", False),
        ("s3://a/b", "s3://a/b/", True),
        ("s3://a/b", "s3://", True),
        ("file:///x", "file:///", True),
        ("file:///x", "s3://", False),
    ],
)
def test_within(url: str, root: str, answer: bool) -> None:
    assert is_within(url, root) is answer


def test_files_are_listed_in_the_order_of_their_paths_without_hidden_ones(tmp_path: Path) -> None:
    for name in ("b/2", "a", "b/1", ".hidden", "c/.git/x", "d"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found = [entry.url.removeprefix(f"file://{tmp_path}/") for entry in locations().list(f"file://{tmp_path}/")]
    assert found == ["a", "b/1", "b/2", "d"]


def test_what_is_put_is_whole_and_may_be_new_only(tmp_path: Path) -> None:
    where, url = locations(), f"file://{tmp_path}/deep/er/x"
    where.put(url, b"1", only_new=True)
    with pytest.raises(AlreadyExists):
        where.put(url, b"2", only_new=True)
    assert where.read(url, 10) == b"1"
    where.put(url, b"3")
    assert where.read(url, 10) == b"3"
    assert os.listdir(tmp_path / "deep/er") == ["x"]
    with pytest.raises(InvalidArgument, match="at most"):
        where.read(url, 0)


def test_publishing_twice_is_publishing_once(tmp_path: Path) -> None:
    where = locations()
    staged, final = f"file://{tmp_path}/_staging/p", f"file://{tmp_path}/p"
    where.put(staged, b"part")
    where.publish(staged, final)
    where.publish(staged, final)
    assert where.read(final, 10) == b"part"
    with pytest.raises(NotFound):
        where.publish(staged, f"file://{tmp_path}/never")


@given(size=st.integers(0, 200), steps=st.lists(st.tuples(st.integers(0, 210), st.integers(0, 90)), max_size=10))
def test_a_ranged_file_reads_as_one_in_memory_does(size: int, steps: list[tuple[int, int]]) -> None:
    data = bytes(range(256))[:size]
    file, memory = ranged.Ranged(lambda start, end: data[start:end], size), io.BytesIO(data)
    for offset, count in steps:
        assert file.seek(offset) == memory.seek(offset)
        assert file.read(count) == memory.read(count)
        assert file.readline() == memory.readline()


def test_an_entry_of_another_version_is_another_entry(tmp_path: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=tmp_path) as file:
        url = f"file://{file.name}"
        before = locations().stat(url)
        Path(file.name).write_text(json.dumps([1]))
        assert locations().stat(url) != before
        assert isinstance(before, Entry)
    assert replace(Span(0, 1), end=2).end == 2
