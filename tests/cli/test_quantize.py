"""`shoal models quantize` on files: once as a user types it, and else in the process of the tests."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import Shoal
from tests.compress import models

Quantize = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    models.perceptron(tmp_path / "m.onnx", wide=256)
    np.savez(tmp_path / "rows.npz", x=np.random.default_rng(1).standard_normal((60, 16)))
    return tmp_path


@pytest.fixture
def quantize(shoal: Shoal) -> Quantize:
    """Run `shoal models quantize ARGS` in this process, where it finds no node."""
    return lambda *args: shoal("models", "quantize", *args, SHOAL_GATEWAY="")


def in_a_process(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run `shoal models quantize ARGS` as a user does."""
    command = [sys.executable, "-m", "shoal.cli.main", "models", "quantize", *args]
    environ = {**os.environ, "XDG_RUNTIME_DIR": str(folder)}  # No node is found there.
    environ.pop("SHOAL_GATEWAY", None)
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=100, check=False)


def test_a_file_becomes_a_smaller_file(folder: Path, quantize: Quantize) -> None:
    done = in_a_process(folder, "m.onnx", "--method", "static", "--data", "rows.npz", "--max-flips", "20%")
    assert done.returncode == 0, done.stderr
    assert "m.onnx, static" in done.stdout
    assert "times smaller" in done.stdout
    assert re.search(r"measured on: \S.*", done.stdout)
    assert "drift from the original on 29 rows (rows.npz, calibrated on 31 other rows)" in done.stdout
    assert "accepted: allowed are any relative drift and 20% of the labels changed" in done.stdout
    assert (folder / "m.static.onnx").stat().st_size < (folder / "m.onnx").stat().st_size
    again = quantize("m.onnx", "--method", "static", "--data", "rows.npz")
    assert again.returncode == 1
    assert "m.static.onnx exists already" in again.stderr


def test_without_data_it_says_so(folder: Path, quantize: Quantize) -> None:
    done = quantize("m.onnx")
    assert done.returncode == 0, done.stderr
    assert "the rows are random, and drift on your data may differ: give --data" in done.stdout
    assert "not judged: no --max-drift or --max-flips" in done.stdout
    refused = quantize("m.onnx", "--method", "static")
    assert refused.returncode == 1
    assert "static int8 is calibrated on real rows" in refused.stderr


def test_lines_of_requests_and_json(folder: Path, quantize: Quantize) -> None:
    rows = [{"x": np.full((2, 16), n / 10).tolist()} for n in range(10)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    done = quantize("m.onnx", "--data", "rows.jsonl", "--json", "-o", "out.onnx")
    said = json.loads(done.stdout)
    assert (said["method"], said["rows"], said["drift"]["rows"]) == ("dynamic", "rows.jsonl", 20)
    assert said["processor"]["name"]
    assert isinstance(said["processor"]["instruction_sets"], list)
    assert (said["target"], said["pushed"]) == ("out.onnx", [])
    (folder / "rows.jsonl").write_text('{"x": [[1, 2]]}\n')
    done = quantize("m.onnx", "--data", "rows.jsonl", "-o", "other.onnx")
    assert done.returncode == 2
    assert "rows.jsonl, line 1: 'x' is [1, 2], the model takes float32 [any, 16]" in done.stderr


def test_a_folder_of_tritons_layout(folder: Path, quantize: Quantize) -> None:
    (folder / "named/2").mkdir(parents=True)
    (folder / "m.onnx").rename(folder / "named/2/model.onnx")
    done = quantize("named", "--method", "prune")
    assert done.returncode == 0, done.stderr
    assert "named version 2, prune" in done.stdout
    assert (folder / "named.prune.onnx").exists()


def test_too_much_drift_is_refused(folder: Path, quantize: Quantize) -> None:
    done = quantize("m.onnx", "--data", "rows.npz", "--max-drift", "1e-9")
    assert done.returncode == 1
    assert "the compressed m.onnx is rejected: scores drifts by" in done.stderr
    assert "max relative" in done.stdout
    assert not (folder / "m.dynamic.onnx").exists()


@pytest.mark.parametrize(
    ("args", "status", "says"),
    [
        (["m.onnx", "--push"], 2, "--push needs --max-drift or --max-flips"),
        (["m.onnx", "--name", "n"], 2, "use it with --push"),
        (["m.onnx", "--name", "../n", "--push", "--max-drift", "1"], 2, "model name '../n': use letters"),
        (["m.onnx", "--max-flips", "x"], 2, "--max-flips 'x': expected a number of rows (3) or percent of them (0.5%)"),
        (["m.onnx", "--max-flips", "101%"], 2, "--max-flips '101%'"),
        (["rows.npz"], 2, "rows.npz: expected a .onnx file"),
        (["gone.onnx"], 1, "gone.onnx: no such file or folder"),
        (["gone", "--gateway", "127.0.0.1:1"], 1, "no local file 'gone', and no node to read that model from"),
        (["m.onnx", "--data", "gone.jsonl"], 1, "gone.jsonl: no such file"),
        (["m.onnx", "-o", "no/such/out.onnx"], 1, "no such folder"),
        (["m.onnx", "--max-drift", "1", "--push", "-o", "x.onnx"], 2, "--output and --push exclude each other"),
    ],
)
def test_what_is_wrong_is_said(folder: Path, quantize: Quantize, args: list[str], status: int, says: str) -> None:
    done = quantize(*args)
    assert (done.returncode, done.stdout) == (status, "")
    assert says in done.stderr
