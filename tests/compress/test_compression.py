"""Each method on real models, by ONNX Runtime's real tools."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from shoal.compress import compression
from shoal.compress.compression import Rows, random_rows, split
from shoal.compress.latency import compare
from shoal.compress.method import Method
from shoal.convert.onnx_model import OnnxModel
from shoal.convert.verdict import Bounds
from shoal.errors import FailedPrecondition
from tests.compress import models

REAL = Rows([{"x": np.random.default_rng(1).standard_normal((300, 16)).astype("f4")}], "rows.npz")


def run(method: Method, source: Path, rows: Rows = REAL, bounds: Bounds | None = None) -> compression.Compression:
    return compression.run(method, source, source.parent / "out.onnx", rows, name="m", bounds=bounds, threads=1)


@pytest.mark.parametrize(
    ("method", "smaller", "drift", "rows"),
    [
        (Method.DYNAMIC, 2.5, 0.6, 300),
        (Method.STATIC, 2.5, 0.6, 150),
        (Method.FLOAT16, 1.8, 0.01, 300),
    ],
)
def test_it_becomes_smaller_and_stays_near(
    tmp_path: Path, method: Method, smaller: float, drift: float, rows: int
) -> None:
    made = run(method, models.perceptron(tmp_path / "m.onnx", wide=512))
    assert made.original_bytes == (tmp_path / "m.onnx").stat().st_size
    assert made.compressed_bytes == (tmp_path / "out.onnx").stat().st_size
    assert made.original_bytes / made.compressed_bytes > smaller
    assert 0 < made.drift.max_relative < drift
    assert made.drift.rows == rows
    assert made.drift.cosine > 0.99
    assert made.calibrated_on == (150 if method is Method.STATIC else 0)
    assert [each.rows for each in made.latencies] == [1, 16]
    assert all(each.rounds >= 15 and each.original_ms > 0 and each.compressed_ms > 0 for each in made.latencies)
    assert made.refused == ""


def test_the_report_says_when_rows_of_a_batch_influence_each_other(tmp_path: Path) -> None:
    source = models.perceptron(tmp_path / "m.onnx", wide=512)
    assert any("does not batch this model" in note for note in run(Method.DYNAMIC, source).notes)
    assert not any("does not batch this model" in note for note in run(Method.FLOAT16, source).notes)


def test_pruning_leaves_out_what_nobody_reads_and_no_bit_changes(tmp_path: Path) -> None:
    made = run(Method.PRUNE, models.perceptron(tmp_path / "m.onnx", dead=True), bounds=Bounds(0.0, 0))
    assert made.refused == ""
    assert (made.drift.max_abs, made.drift.flips) == (0.0, 0)
    assert made.notes == ["removed: 2 unused nodes, 1 unused initializers, 2 copies of other initializers"]
    names = {tensor.name for tensor in onnx.load(tmp_path / "out.onnx").graph.initializer}
    assert names == {"first", "last", "bias"}


def test_what_a_branch_reads_is_not_pruned(tmp_path: Path) -> None:
    make = onnx.helper
    inner = make.make_graph(
        [make.make_node("Add", ["x", "w"], ["a"])], "then", [], [make.make_tensor_value_info("a", 1, None)]
    )
    other = make.make_graph(
        [make.make_node("Add", ["x", "v"], ["b"])], "else", [], [make.make_tensor_value_info("b", 1, None)]
    )
    nodes = [
        make.make_node("ReduceSum", ["x", "axes"], ["sum"], keepdims=0),
        make.make_node("Greater", ["sum", "zero"], ["is"]),
        make.make_node("If", ["is"], ["y"], then_branch=inner, else_branch=other),
    ]
    weights = {"axes": np.array([0, 1]), "zero": np.float32(0), "w": np.ones(4, "f4"), "v": np.ones(4, "f4")}
    source = models.save(tmp_path / "m.onnx", nodes, weights, ("x", [4]), ("y", [4]))
    made = run(Method.PRUNE, source, Rows([{"x": np.ones((2, 4), "f4")}, {"x": -np.ones((2, 4), "f4")}], "two"))
    assert made.drift.max_abs == 0
    assert "1 copies" in made.notes[0]


def test_convolutions_become_int8_only_the_static_way(tmp_path: Path) -> None:
    source = models.convolutions(tmp_path / "m.onnx")
    rows = Rows([{"image": np.random.default_rng(1).standard_normal((8, 3, 16, 16)).astype("f4")}], "images")
    with pytest.raises(FailedPrecondition, match=r"nothing of m\.onnx was quantized: it has no MatMul.*try static"):
        run(Method.DYNAMIC, source, rows)
    assert 0 < run(Method.STATIC, source, rows).drift.max_relative < 0.2


def test_static_wants_real_rows_and_two_of_them(tmp_path: Path) -> None:
    source = models.perceptron(tmp_path / "m.onnx")
    model = OnnxModel(source)
    with pytest.raises(FailedPrecondition, match=r"is calibrated on real rows.*--data.*--keep-request"):
        run(Method.STATIC, source, random_rows(model.inputs, is_batched=True, seed=0))
    with pytest.raises(FailedPrecondition, match="at least 2 rows"):
        run(Method.STATIC, source, Rows([{"x": np.ones((1, 16), "f4")}], "one"))


def test_calibration_and_check_share_no_row() -> None:
    calls = [{"x": np.arange(start, stop)} for start, stop in ((0, 1), (1, 3), (3, 10), (10, 5000), (5000, 5001))]
    taken, rest = ({int(row) for call in part for row in call["x"]} for part in split(calls))
    assert not taken & rest
    assert len(taken) <= compression.CALIBRATION_ROWS
    assert taken | rest == set(range(5001))


def test_too_much_is_refused(tmp_path: Path) -> None:
    source = models.perceptron(tmp_path / "m.onnx")
    made = run(Method.DYNAMIC, source, bounds=Bounds(1e-9, share=1.0))
    assert made.refused.startswith("scores drifts by")
    assert "allowed is 1e-09" in made.refused
    assert run(Method.DYNAMIC, source, bounds=Bounds(1.0, share=1.0)).refused == ""


def test_a_model_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(FailedPrecondition, match=r"ONNX Runtime cannot load m\.onnx"):
        run(Method.DYNAMIC, tmp_path / "m.onnx")


def test_random_rows_only_where_the_sizes_are_known(tmp_path: Path) -> None:
    model = OnnxModel(models.perceptron(tmp_path / "m.onnx"))
    rows = random_rows(model.inputs, is_batched=True, seed=0)
    assert [len(call["x"]) for call in rows.calls] == [1, 2, 7, 54]
    assert not rows.is_real
    text = onnx.helper.make_tensor_value_info("t", onnx.TensorProto.STRING, ["N"])
    node = onnx.helper.make_node("Identity", ["t"], ["y"])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.STRING, ["N"])
    graph = onnx.helper.make_graph([node], "g", [text], [out])
    onnx.save_model(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9),
        tmp_path / "t.onnx",
    )
    with pytest.raises(FailedPrecondition, match=r"no random rows for the input t, text \[any\]: give --data"):
        random_rows(OnnxModel(tmp_path / "t.onnx").inputs, is_batched=True, seed=0)


def test_both_models_are_timed_equally_often(tmp_path: Path) -> None:
    asked: list[str] = []

    class Counting:
        def __init__(self, name: str) -> None:
            self.name = name

        def predict(self, call: object) -> None:
            asked.append(self.name)

    compare(Counting("a"), Counting("b"), {}, 1)  # type: ignore[arg-type]
    assert asked.count("a") == asked.count("b")
    assert asked[:4] == ["a", "b", "b", "a"]
