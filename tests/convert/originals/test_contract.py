"""What every Original promises, held to by every format: real models, real exporters, real answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from shoal.convert import conversion, formats
from shoal.convert.drift import OutputPair, measure
from shoal.convert.onnx_model import OnnxModel
from shoal.convert.original import Original
from shoal.convert.verdict import Bounds, refusal
from shoal.errors import InvalidArgument

SKLEARN = [
    "logistic",
    "ridge",
    "tree",
    "forest",
    "forest_regressor",
    "boosting",
    "histogram",
    "histogram_regressor",
    "svc",
    "linear_svc",
    "perceptron",
    "kmeans",
    "scaler",
    "scaled_tree",
    "scaled_lightgbm",
    "scaled_xgboost",
    "xgboost_wrapped",
    "lightgbm_wrapped",
]
XGBOOST = [f"xgboost_{name}" for name in ("binary.json", "several.ubj", "softmax.json", "gaps.json", "counts.json")]
LIGHTGBM = [f"lightgbm_{name}.txt" for name in ("binary", "several", "gaps", "counts", "categories")]
TORCH = [f"torch_{name}.pt2" for name in ("convolutions", "fixed", "words", "plain")]
EVERY = [*SKLEARN, *XGBOOST, *LIGHTGBM, *TORCH]
ONE_OF_EACH = ["tree", "xgboost_gaps.json", "lightgbm_gaps.txt", "torch_words.pt2"]


@pytest.fixture(scope="session")
def opened(saved: dict[str, Path]) -> dict[str, Original]:
    return {name: formats.open_original(saved[name], trusts=True) for name in EVERY}


@pytest.mark.parametrize("name", EVERY)
def test_it_is_converted_and_accepted(
    saved: dict[str, Path], opened: dict[str, Original], name: str, tmp_path: Path
) -> None:
    made = conversion.convert(opened[name], saved[name], "m", tmp_path, conversion.Rows(), Bounds())
    assert made.chosen.refused == ""
    assert made.chosen.drift is not None
    assert made.chosen.drift.rows == sum(made.batches)
    assert made.chosen.drift.max_relative < 1e-5
    if opened[name].is_batched:
        assert list(made.batches)[:3] == [1, 2, 7]
    # What it took to get there: those that scale and then split need float64 inside, the rest does not.
    assert len(made.tried) == (2 if name.startswith("scaled_") else 1)


@pytest.mark.parametrize("name", EVERY)
def test_ports_say_what_draw_gives_and_what_is_served(opened: dict[str, Original], name: str, tmp_path: Path) -> None:
    original = opened[name]
    rows = original.batches[-1]
    drawn = original.draw(rows, np.random.default_rng(1))
    assert list(drawn) == [port.name for port in original.inputs]
    for port in original.inputs:
        assert drawn[port.name].dtype == port.dtype
        assert len(drawn[port.name].shape) == len(port.shape)
    onnx.save_model(original.export(original.plans[0]), tmp_path / "m.onnx")
    served = OnnxModel(tmp_path / "m.onnx")
    assert [(port.name, port.dtype) for port in served.inputs] == [(port.name, port.dtype) for port in original.inputs]
    answer = original.predict(drawn)
    assert [port.name for port in served.outputs] == list(answer)
    assert served.is_batched == original.is_batched
    assert original.scores <= answer.keys()
    for output, names in original.classes.items():
        assert answer[output].shape == (rows, len(names))


@pytest.mark.parametrize("name", ["tree", "logistic", "xgboost_binary.json", "lightgbm_several.txt", "torch_plain.pt2"])
def test_the_same_model_makes_the_same_file(saved: dict[str, Path], name: str) -> None:
    """So that pushing it again is no new version."""
    files = []
    for _ in range(2):
        original = formats.open_original(saved[name], trusts=True)
        files.append(original.export(original.plans[0]).SerializeToString(deterministic=True))
    assert files[0] == files[1]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_same_seed_draws_the_same_rows(opened: dict[str, Original], name: str) -> None:
    first, second = (opened[name].draw(5, np.random.default_rng(7)) for _ in range(2))
    assert all(np.array_equal(first[key], second[key], equal_nan=True) for key in first)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_rows_that_do_not_fit_are_refused(opened: dict[str, Original], name: str) -> None:
    wrong = {port.name: np.zeros((2, 3, 999), port.dtype) for port in opened[name].inputs}
    with pytest.raises(InvalidArgument):
        opened[name].predict(wrong)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_converted_model_with_a_fault_is_refused(opened: dict[str, Original], name: str, tmp_path: Path) -> None:
    """A weight, or a leaf, that is a little off is seen."""
    original = opened[name]
    model = original.export(original.plans[0])
    for tensor in [each for each in model.graph.initializer if each.data_type == onnx.TensorProto.FLOAT][-1:]:
        values = onnx.numpy_helper.to_array(tensor).copy()
        tensor.CopyFrom(onnx.numpy_helper.from_array(values + np.float32(0.01), tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("class_weights", "target_weights"):
                attribute.floats[:] = [value + 0.01 for value in attribute.floats]
    onnx.save_model(model, tmp_path / "m.onnx")
    drawn = original.draw(7, np.random.default_rng(0))
    pair = OutputPair(original.predict(drawn), OnnxModel(tmp_path / "m.onnx").predict(drawn))
    assert "drifts by" in refusal(measure([pair], scores=original.scores, tolerance=1e-4), Bounds())
