"""Rows out of files, and what is said of files that do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shoal.convert import sample
from shoal.convert.original import Port
from shoal.errors import InvalidArgument, NotFound

X = [Port("x", np.dtype("f4"), (None, 3))]
TWO = [Port("tokens", np.dtype("i8"), (None, None)), Port("mask", np.dtype("f4"), (None, None))]
FIXED = [Port("x", np.dtype("f4"), (1, 3))]


def test_csv_with_and_without_a_header(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("one,two,three\n1,2,3\n4,,6.5\n")
    rows = sample.read(tmp_path / "a.csv", X)["x"]
    np.testing.assert_array_equal(rows, [[1, 2, 3], [4, np.nan, 6.5]])
    (tmp_path / "b.csv").write_text("1,2,3\n")
    assert sample.read(tmp_path / "b.csv", X)["x"].shape == (1, 3)


def test_npy_and_npz_keep_float64(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((2, 3)))
    np.savez(tmp_path / "a.npz", whatever=np.ones((2, 3)))
    np.savez(tmp_path / "b.npz", tokens=np.ones((2, 5), int), mask=np.ones((2, 5)))
    assert sample.read(tmp_path / "a.npy", X)["x"].dtype == np.float64
    assert sample.read(tmp_path / "a.npz", X)["x"].shape == (2, 3)
    assert list(sample.read(tmp_path / "b.npz", TWO)) == ["tokens", "mask"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "1,2,3\n1,2\n", "line 2 has another number of cells"),
        ("a.csv", "1,2,3\n1,x,3\n", "line 2, cell 2: 'x' is no number"),
        ("a.csv", "1,2\n", r"'x' is \[1, 2\], the model takes float32 \[any, 3\]"),
        ("a.csv", "", r"'x' is \[0\], the model takes"),
        ("a.txt", "1,2,3", "expected .npz, .npy or .csv"),
        ("a.npy", "no", "NumPy cannot read it"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InvalidArgument, match=says):
        sample.read(tmp_path / name, X)


def test_names_that_do_not_fit(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((2, 3)))
    with pytest.raises(InvalidArgument, match=r"the inputs tokens, mask: use an \.npz file with these names"):
        sample.read(tmp_path / "a.npy", TWO)
    np.savez(tmp_path / "a.npz", tokens=np.ones((2, 3), int), other=np.ones(2))
    with pytest.raises(InvalidArgument, match="the model has no input other"):
        sample.read(tmp_path / "a.npz", TWO)
    np.savez(tmp_path / "b.npz", tokens=np.ones((2, 3), int))
    with pytest.raises(InvalidArgument, match="no array 'mask'"):
        sample.read(tmp_path / "b.npz", TWO)
    with pytest.raises(NotFound):
        sample.read(tmp_path / "none.npz", X)
    np.savez(tmp_path / "c.npz", x=np.array([["a", "b", "c"]]))
    with pytest.raises(InvalidArgument, match="the model takes float32"):
        sample.read(tmp_path / "c.npz", X)


def test_calls_are_of_1_2_7_and_many() -> None:
    def sizes(rows: int) -> list[int]:
        return [len(call["x"]) for call in sample.calls({"x": np.zeros((rows, 3))}, X, is_batched=True)]

    assert sizes(1) == [1]
    assert sizes(5) == [1, 2, 2]
    assert sizes(1100) == [1, 2, 7, 1024, 66]
    one = sample.calls({"x": np.zeros((1, 3))}, FIXED, is_batched=False)
    several = sample.calls({"x": np.zeros((4, 1, 3))}, FIXED, is_batched=False)
    assert [call["x"].shape for call in one + several] == [(1, 3)] * 5
    with pytest.raises(InvalidArgument, match="different numbers of rows: tokens 2, mask 3"):
        sample.calls({"tokens": np.zeros((2, 1)), "mask": np.zeros((3, 1))}, TWO, is_batched=True)
