"""What is said before anything is opened. The frameworks are not installed here, as with most users."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from shoal.cli import bringing
from shoal.convert import formats
from shoal.errors import FailedPrecondition, InvalidArgument, NotFound


class Bomb:
    """Runs code when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> object:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize(
    ("name", "extra", "package"),
    [
        ("a.pt2", "convert-torch", "torch"),
        ("a.joblib", "convert-sklearn", "skl2onnx"),
        ("a.skops", "convert-sklearn", "skl2onnx"),
        ("a.json", "convert-xgboost", "xgboost"),
        ("a.txt", "convert-lightgbm", "lightgbm"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, name: str, extra: str, package: str) -> None:
    (tmp_path / name).write_bytes(b"tree")
    with pytest.raises(FailedPrecondition, match=f"needs the package {package}: pip install 'shoal\\[{extra}\\]'"):
        formats.open_original(tmp_path / name, trusts=True)


@pytest.mark.parametrize("suffix", [".pkl", ".joblib", ".pickle", ".pt2"])
def test_files_that_may_run_code_need_consent(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(FailedPrecondition, match=r"may run any code when it is opened .* --trust-pickle"):
        formats.open_original(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a.pth", "torch.export.save"),
        ("a.keras", "tf2onnx"),
        ("a.model", "save_model"),
        ("a.zip", "expected one of .pt2"),
        ("a.onnx", "the file is ONNX already: push it with `shoal models push`"),
    ],
)
def test_other_formats_are_rejected_with_advice(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(InvalidArgument, match=says):
        formats.open_original(tmp_path / name)
    if not name.endswith((".zip", ".onnx")):
        with pytest.raises(InvalidArgument, match=says):
            bringing.check_path(tmp_path / name)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        formats.open_original(tmp_path / "a.json")
    assert not formats.is_brought(tmp_path)
    assert not formats.is_brought(tmp_path / "a.onnx")
