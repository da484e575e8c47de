"""What a model on disk consists of."""

from pathlib import Path

import pytest

from shoal.client.models.bundle import read, renumbered
from shoal.errors import InvalidArgument, NotFound


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def shape(path: Path, **options: object) -> list[tuple[str, int, list[str]]]:
    return [(b.name, b.version, [inside for inside, _ in b.files]) for b in read(path, **options)]  # type: ignore[arg-type]


def test_a_bare_file_is_one_version(tmp_path: Path) -> None:
    path = touch(tmp_path, "digits.onnx") / "digits.onnx"
    assert shape(path) == [("digits", 0, ["model.onnx"])]
    assert shape(path, name="other", version=7) == [("other", 7, ["model.onnx"])]


def test_external_weights_of_a_bare_file_keep_their_name(tmp_path: Path) -> None:
    path = touch(tmp_path, "big.onnx", "big.onnx.data", "unrelated.txt") / "big.onnx"
    assert shape(path) == [("big", 0, ["big.onnx.data", "model.onnx"])]


def test_a_folder_has_all_versions_and_their_shared_files(tmp_path: Path) -> None:
    folder = touch(
        tmp_path / "m",
        "config.pbtxt",
        "labels.txt",
        "assets/a/b.txt",
        "1/model.onnx",
        "10/model.onnx",
        "10/sub/x.bin",
        "2/model.onnx",
        ".git/config",
        "__pycache__/x.pyc",
        "1/.DS_Store",
    )
    beside = ["../assets/a/b.txt", "../config.pbtxt", "../labels.txt"]
    assert shape(folder) == [
        ("m", 1, [*beside, "model.onnx"]),
        ("m", 2, [*beside, "model.onnx"]),
        ("m", 10, [*beside, "model.onnx", "sub/x.bin"]),
    ]
    assert shape(folder, version=2) == [("m", 2, [*beside, "model.onnx"])]
    assert shape(folder, name="n")[0][0] == "n"


def test_a_remote_model_consists_of_its_configuration(tmp_path: Path) -> None:
    folder = touch(tmp_path / "far", "ca.pem")
    (folder / "config.pbtxt").write_text('backend: "remote"')
    assert shape(folder) == [("far", 0, ["../ca.pem", "../config.pbtxt"])]
    assert shape(folder, version=3) == [("far", 3, ["../ca.pem", "../config.pbtxt"])]
    (folder / "config.pbtxt").write_text('backend: "python"')
    with pytest.raises(InvalidArgument, match="is not a model"):
        read(folder)
    (folder / "config.pbtxt").write_text("no configuration")
    with pytest.raises(InvalidArgument, match="is not a model"):
        read(folder)


def test_a_version_folder_may_be_empty(tmp_path: Path) -> None:
    folder = touch(tmp_path / "ensemble", "config.pbtxt")
    (folder / "1").mkdir()
    assert shape(folder) == [("ensemble", 1, ["../config.pbtxt"])]


def test_linked_files_are_followed_and_a_dangling_link_is_an_error(tmp_path: Path) -> None:
    folder = touch(tmp_path / "m", "1/model.onnx")
    (folder / "1/weights.bin").symlink_to(touch(tmp_path, "blob") / "blob")
    assert shape(folder) == [("m", 1, ["model.onnx", "weights.bin"])]
    (folder / "1/gone.bin").symlink_to(tmp_path / "nothing")
    with pytest.raises(InvalidArgument, match=r"gone\.bin is a link"):
        read(folder)


@pytest.mark.parametrize(
    ("files", "path", "words"),
    [
        (["r/a/1/model.onnx", "r/b/config.pbtxt"], "r", r"is a repository of models \(a, b\): push one of them"),
        (
            ["d/a.onnx", "d/b.onnx"],
            "d",
            r"d has 2 .onnx files.*: push each file, such as .*d/a\.onnx, or put each into",
        ),
        (["d/model.onnx"], "d", r"has no version folder: push the file itself: .*model\.onnx --name d"),
        (["d/x.txt"], "d", "is not a model: expected <version>/model.onnx"),
        (
            ["d/config.pbtxt"],
            "d",
            r"has no version: put the model into a folder named 1 \(an empty folder for an ensemble",
        ),
        (["d/0/model.onnx", "d/01/model.onnx"], "d", "is not a model"),
        (["x.pt"], "x.pt", r"expected a \.onnx file, or a model folder"),
        (["a b.onnx"], "a b.onnx", "model name 'a b'"),
    ],
)
def test_the_error_says_what_a_folder_looks_like(tmp_path: Path, files: list[str], path: str, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        read(touch(tmp_path, *files) / path)


def test_a_missing_path_or_version_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such file or folder"):
        read(tmp_path / "nothing.onnx")
    with pytest.raises(NotFound, match="no version 3; versions: 1, 2"):
        read(touch(tmp_path / "m", "1/model.onnx", "2/model.onnx"), version=3)
    with pytest.raises(InvalidArgument, match="count from 1"):
        read(tmp_path / "m", version=0)


def test_the_one_version_of_a_folder_gets_another_number(tmp_path: Path) -> None:
    folder = touch(tmp_path / "m", "config.pbtxt", "1/model.onnx")
    bundles = read(folder)
    assert renumbered(bundles, None) == bundles[0].__class__("m", 0, bundles[0].files)
    assert renumbered(bundles, 7).version == 7
    with pytest.raises(InvalidArgument, match="versions count from 1"):
        renumbered(bundles, 0)
    touch(folder, "2/model.onnx")
    with pytest.raises(InvalidArgument, match="m has 2 versions: only one can get another number"):
        renumbered(read(folder), None)
