"""`shoal models convert`: as a user types it, or in the process of the tests."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from shoal.cli.main import main
from shoal.convert.onnx_model import OnnxModel
from tests.convert.originals import made


def shoal(*args: object) -> subprocess.CompletedProcess[str]:
    """Run `shoal models convert ARGS` in this process, which has the frameworks imported."""
    argv, out, err = ["shoal", "models", "convert", *map(str, args)], io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with pytest.raises(SystemExit) as ended:
            main()
    return subprocess.CompletedProcess(argv, int(ended.value.code or 0), out.getvalue(), err.getvalue())


def in_a_process(*args: object, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `shoal models convert ARGS` as a user does."""
    command = [sys.executable, "-m", "shoal.cli.main", "models", "convert", *map(str, args)]
    every = {**os.environ, **(environ or {})}
    return subprocess.run(command, env=every, capture_output=True, text=True, timeout=100, check=False)


def test_a_model_is_written_as_a_folder_with_its_class_names(saved: dict[str, Path], tmp_path: Path) -> None:
    np.savetxt(tmp_path / "rows.csv", made.IRIS.data, delimiter=",", header="a,b,c,d", comments="")
    path = saved["logistic"]
    refused = shoal(path, "-o", tmp_path / "models")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "may run any code when it is opened" in refused.stderr
    assert "--trust-pickle" in refused.stderr
    sample = ("--sample", tmp_path / "rows.csv")
    done = in_a_process(path, "-o", tmp_path / "models", "--trust-pickle", *sample, "--name", "iris")
    assert done.returncode == 0, done.stderr
    for said in (
        "logistic.joblib (scikit-learn) -> iris",
        "inputs  x float32 [any, 4]",
        "outputs label text [any]; probabilities float32 [any, 3]",
        "checked on 150 rows (rows.csv), in calls of 1, 2, 7, 140",
        "0 of 150",
        "float32 arithmetic: accepted",
        f"written to {tmp_path / 'models' / 'iris'}",
    ):
        assert said in done.stdout
    folder = tmp_path / "models/iris"
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    assert files == ["1/model.onnx", "config.pbtxt", "labels_probabilities.txt"]
    assert (folder / "labels_probabilities.txt").read_text() == "setosa\nversicolor\nvirginica\n"
    answer = OnnxModel(folder / "1/model.onnx").predict({"x": made.IRIS.data})
    assert (answer["label"] == made.NAMED).mean() > 0.95
    again = shoal(path, "-o", tmp_path / "models", "--trust-pickle", "--name", "iris")
    assert again.returncode == 1
    assert "exists: remove it" in again.stderr
    assert sorted(child.name for child in (tmp_path / "models").iterdir()) == ["iris"]


def test_another_process_makes_the_same_file(saved: dict[str, Path], tmp_path: Path) -> None:
    """Sets come in another order there, and an exporter's file may show it: then a second push were a new version."""
    files = []
    for seed in ("1", "2"):
        environ = {"PYTHONHASHSEED": seed}
        done = in_a_process(saved["perceptron"], "-o", tmp_path / seed, "--trust-pickle", environ=environ)
        assert done.returncode == 0, done.stderr
        files.append((tmp_path / seed / "perceptron/1/model.onnx").read_bytes())
    assert files[0] == files[1]


def test_too_much_drift_is_refused_and_leaves_nothing(saved: dict[str, Path], tmp_path: Path) -> None:
    done = shoal(saved["xgboost_gaps.json"], "-o", tmp_path, "--tolerance", "1e-12", "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert "gaps.json is refused: prediction drifts by" in done.stderr
    assert "allowed is 1e-12" in done.stderr
    assert "label changes" in done.stderr  # The report is printed all the same.
    assert list(tmp_path.iterdir()) == []


def test_json_has_the_whole_report(saved: dict[str, Path], tmp_path: Path) -> None:
    done = shoal(saved["torch_convolutions.pt2"], "-o", tmp_path, "--trust-pickle", "--json", "--seed", 3)
    said = json.loads(done.stdout)
    assert said["inputs"] == [{"name": "image", "dtype": "float32", "shape": [None, 1, 8, 8]}]
    assert said["outputs"] == [{"name": "output", "dtype": "float32", "shape": [None, 10]}]
    assert (said["rows"], said["batches"]) == ("random, seed 3", [1, 2, 7, 22])
    assert said["tried"][0]["refused"] == ""
    assert said["packages"].keys() == {"torch", "onnxscript", "onnx"}
    # A program that takes 32 rows at most says so to the server.
    assert "max_batch_size: 32" in (tmp_path / "convolutions/config.pbtxt").read_text()


@pytest.mark.parametrize(
    ("columns", "says"),
    [(5, r"'x' is [150, 5], the model takes float32 [any, 4]"), (None, "line 2, cell 2: 'red' is no number")],
)
def test_rows_that_do_not_fit(saved: dict[str, Path], tmp_path: Path, columns: int | None, says: str) -> None:
    if columns is None:
        (tmp_path / "rows.csv").write_text("1,2,3,4\n1,red,3,4\n")
    else:
        np.savetxt(tmp_path / "rows.csv", np.zeros((150, columns)), delimiter=",")
    done = shoal(saved["logistic"], "--trust-pickle", "-o", tmp_path / "m", "--sample", tmp_path / "rows.csv")
    assert done.returncode == 2
    assert says in done.stderr
