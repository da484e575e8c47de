"""What exporters get wrong, and what is done about it: put right, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import joblib
import lightgbm
import numpy as np
import onnx
import onnxmltools
import pytest
import skl2onnx
import xgboost
from onnxmltools.convert.common.data_types import FloatTensorType
from sklearn import ensemble

from shoal.convert import conversion, formats
from shoal.convert.conversion import Conversion, Rows
from shoal.convert.onnx_model import OnnxModel
from shoal.convert.verdict import Bounds
from shoal.errors import FailedPrecondition, InvalidArgument
from tests.convert.originals import made


def converted(path: Path, into: Path, rows: Rows | None = None, **options: Any) -> Conversion:
    original = formats.open_original(path, trusts=True, **options)
    return conversion.convert(original, path, "m", into, rows or Rows(), Bounds())


def off(model: onnx.ModelProto, path: Path, original: Any) -> int:
    """Rows in which a bare export answers otherwise."""
    onnx.save_model(model, path)
    served = OnnxModel(path)
    rows = original.draw(1000, np.random.default_rng(0))
    want = next(reversed(original.predict(rows).values()))
    got = next(reversed(list(served.predict({served.inputs[0].name: rows["x"]}).values())))
    return int((np.abs(want - got.reshape(want.shape)) > 1e-3 * np.abs(want).max()).any(axis=1).sum())


def test_bare_exporters_fail_the_check_that_ours_pass(saved: dict[str, Path], tmp_path: Path) -> None:
    """Thresholds rounded up (LightGBM, histograms), and NaN sent the wrong way (forests): the rows find all of it."""
    booster = lightgbm.Booster(model_file=saved["lightgbm_gaps.txt"])
    bare = onnxmltools.convert_lightgbm(booster, initial_types=[("x", FloatTensorType([None, 10]))], target_opset=15)
    assert off(bare, tmp_path / "a.onnx", formats.open_original(saved["lightgbm_gaps.txt"])) > 50
    forest = joblib.load(saved["forest_regressor"])
    bare = skl2onnx.to_onnx(forest, initial_types=[("x", skl2onnx.common.data_types.FloatTensorType([None, 10]))])
    for node in bare.graph.node:  # Put right by now, if another test of this process converted a forest before.
        for attribute in node.attribute:
            if attribute.name == "nodes_missing_value_tracks_true":
                attribute.ints[:] = [0] * len(attribute.ints)
    assert off(bare, tmp_path / "b.onnx", formats.open_original(saved["forest_regressor"], trusts=True)) > 50


@pytest.mark.parametrize("name", ["scaled_tree", "scaled_lightgbm", "scaled_xgboost"])
def test_a_scaled_tree_is_right_only_with_float64_inside(saved: dict[str, Path], tmp_path: Path, name: str) -> None:
    made_of = converted(saved[name], tmp_path)
    first, second = made_of.tried
    assert (first.plan, second.plan) == ("float32 arithmetic", "float64 arithmetic inside")
    assert first.drift is not None
    assert (first.drift.flips or 0) > 0
    assert "the label changes in" in first.refused
    assert second.refused == ""
    assert [port.dtype for port in made_of.inputs] == [np.dtype("f4")]


@pytest.mark.parametrize(
    "name", ["tree", "histogram", "forest_regressor", "scaled_tree", "scaled_lightgbm", "perceptron"]
)
def test_float64_inputs(saved: dict[str, Path], tmp_path: Path, name: str) -> None:
    made_of = converted(saved[name], tmp_path, float64=True)
    assert made_of.inputs[0].dtype == np.dtype("f8")
    assert made_of.chosen.refused == ""


def test_large_integers_need_float64_and_the_report_says_so(tmp_path: Path) -> None:
    """An account number that float32 cannot tell from the next."""
    numbers = 2**24 + np.arange(400.0)[:, None]
    labels = (np.arange(400) % 2).astype(int)
    forest = ensemble.HistGradientBoostingClassifier(max_iter=60, min_samples_leaf=1, max_bins=255).fit(
        numbers[:200], labels[:200]
    )
    joblib.dump(forest, tmp_path / "accounts.joblib")
    np.save(tmp_path / "rows.npy", numbers[:200])
    rows = Rows(tmp_path / "rows.npy")
    narrow = converted(tmp_path / "accounts.joblib", tmp_path / "narrow", rows).chosen
    assert "the cause is the rounding of the rows to the model's float32 inputs: use --float64" in narrow.refused
    assert narrow.rounded is not None
    assert narrow.rounded.flips == 0
    assert converted(tmp_path / "accounts.joblib", tmp_path / "wide", rows, float64=True).chosen.refused == ""


def test_ties_are_reported_and_do_not_count(tmp_path: Path) -> None:
    forest = ensemble.RandomForestClassifier(30, random_state=0).fit(made.DIGITS.data, made.DIGITS.target)
    joblib.dump(forest, tmp_path / "votes.joblib")
    drift = converted(tmp_path / "votes.joblib", tmp_path / "made").chosen.drift
    assert drift is not None
    assert (drift.flips, drift.ties > 0) == (0, True)


def test_an_estimator_without_exporter_is_rejected(tmp_path: Path) -> None:
    cancer = made.CANCER
    zeros = lightgbm.train(
        {"verbose": -1, "zero_as_missing": True}, lightgbm.Dataset(made.DIGITS.data, made.DIGITS.target), 5
    )
    zeros.save_model(tmp_path / "zeros.txt")
    assert "prediction drifts by" in converted(tmp_path / "zeros.txt", tmp_path / "a").chosen.refused
    dart = xgboost.train({"booster": "dart", "rate_drop": 0.5}, xgboost.DMatrix(cancer.data, cancer.target), 4)
    dart.save_model(tmp_path / "dart.json")
    with pytest.raises(InvalidArgument, match="a booster of kind dart: onnxmltools converts gbtree only"):
        converted(tmp_path / "dart.json", tmp_path / "b")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", b'{"no": "model"}', "XGBoost cannot read it"),
        ("a.ubj", b"", "XGBoost cannot read it"),
        ("a.txt", b"some notes", "not a LightGBM model: the first line must be `tree`"),
        ("a.txt", b"tree\nversion=v4\n", "LightGBM cannot read it"),
        ("a.txt", b"\xff\xfe", "LightGBM cannot read it"),
        ("a.joblib", b"not a pickle", "cannot be opened as a pickle"),
        ("a.skops", b"not a zip", "skops cannot open it"),
        ("a.pt2", b"not a zip", "not a program of torch.export.save"),
    ],
)
def test_a_file_with_other_content_than_its_name_says(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidArgument, match=says):
        formats.open_original(tmp_path / name, trusts=True)


def test_pickles_of_other_things_are_named(saved: dict[str, Path], tmp_path: Path) -> None:
    joblib.dump({"weights": [1, 2]}, tmp_path / "a.pkl")
    with pytest.raises(InvalidArgument, match="a dict is not a fitted scikit-learn estimator"):
        formats.open_original(tmp_path / "a.pkl", trusts=True)
    joblib.dump(ensemble.RandomForestClassifier(), tmp_path / "b.pkl")
    with pytest.raises(InvalidArgument, match="a RandomForestClassifier is not a fitted"):
        formats.open_original(tmp_path / "b.pkl", trusts=True)
    booster = lightgbm.Booster(model_file=saved["lightgbm_gaps.txt"])
    joblib.dump(booster, tmp_path / "c.pkl")
    assert formats.open_original(tmp_path / "c.pkl", trusts=True).framework == "LightGBM"
    joblib.dump(xgboost.Booster(model_file=saved["xgboost_gaps.json"]), tmp_path / "d.pkl")
    assert formats.open_original(tmp_path / "d.pkl", trusts=True).framework == "XGBoost"


def test_skops_needs_consent_only_for_unknown_types(tmp_path: Path) -> None:
    from skops import io

    io.dump(made.linear_model.Ridge().fit(made.DIABETES.data, made.DIABETES.target), tmp_path / "ridge.skops")
    assert formats.open_original(tmp_path / "ridge.skops").framework == "scikit-learn"
    io.dump(
        made.scaled(made.neural_network.MLPClassifier((2,), max_iter=1)).fit(made.IRIS.data, made.IRIS.target),
        tmp_path / "odd.skops",
    )
    if io.get_untrusted_types(file=tmp_path / "odd.skops"):
        with pytest.raises(FailedPrecondition, match=r"does not know to be safe .*--trust-pickle"):
            formats.open_original(tmp_path / "odd.skops")
    assert formats.open_original(tmp_path / "odd.skops", trusts=True).framework == "scikit-learn"
