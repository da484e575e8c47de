"""Readers and the plan: every row of every file, once, in its order, wherever it is cut and wherever one goes on."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ingest.batches.batch import Batch, Chunk, Format
from services.ingest.batches.inputs import json_lines, npz_rows, ranged
from services.ingest.batches.inputs.arrow_cells import cells_of
from services.ingest.batches.inputs.json_lines import JsonLines
from services.ingest.batches.inputs.locations import Entry, InputLocations, is_within
from services.ingest.batches.inputs.npz_rows import NpzRows
from services.ingest.batches.inputs.object_rows import ObjectRows
from services.ingest.batches.inputs.parquet_rows import ParquetRows
from services.ingest.batches.inputs.piece import ROW_BYTES, Rows, Span
from services.ingest.batches.plan import plan
from services.ingest.batches.readers import ReaderCache, read_pinned
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


def test_deeply_nested_json_fails_its_row_only() -> None:
    data = b"[" * 100_000 + b'\n{"x": 1}\n'
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
