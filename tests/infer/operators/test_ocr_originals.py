"""Text detection and recognition: the same boxes, crops and texts as the package `rapidocr-onnxruntime`.

`originals/ocr.npz` is what that package made of pages with real text, with its own models (`originals/record_ocr.py`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.infer.operators import making

PAGES = range(3)


@pytest.fixture(scope="module")
def recorded():
    with np.load(Path(__file__).with_name("originals") / "ocr.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def probability(recorded, n: int) -> np.ndarray:
    return (recorded[f"map{n}"].astype(np.float32) / np.float32(255))[np.newaxis]


@pytest.mark.parametrize("score", ["fast", "slow"])
def test_the_boxes_are_the_same(recorded, tmp_path, score):
    made = making.session(tmp_path, "db_boxes", score=score)
    sizes = np.array([recorded[f"image{n}"].shape[:2] for n in PAGES], np.int32)
    outputs = making.run(made, probability=[probability(recorded, n) for n in PAGES], size=sizes)
    making.check(made, outputs, len(PAGES))
    for n in PAGES:
        np.testing.assert_array_equal(outputs["boxes"][n], recorded[f"boxes{n}_{score}"])
        # The package keeps the scores of boxes that its last filter drops, in the order in which it found them.
        assert set(outputs["scores"][n].tolist()) <= set(recorded[f"scores{n}_{score}"].tolist())
        assert len(outputs["boxes"][n]) >= 6


@pytest.mark.parametrize("n", PAGES)
def test_the_crops_are_the_same(recorded, tmp_path, n):
    made = making.session(tmp_path, "crop_boxes")
    boxes = recorded[f"boxes{n}_fast"]
    outputs = making.run(made, image=[recorded[f"image{n}"]], boxes=[boxes])
    making.check(made, outputs, len(boxes))
    assert outputs["row"].tolist() == [0] * len(boxes)
    for k, crop in enumerate(outputs["crops"]):
        np.testing.assert_array_equal(crop, recorded[f"crop{n}_{k}"])
    assert any(crop.shape[0] < crop.shape[1] / 3 for crop in outputs["crops"])


@pytest.mark.parametrize("n", PAGES)
def test_the_texts_are_the_same(recorded, tmp_path, n):
    (tmp_path / "keys.txt").write_text(str(recorded["characters"]) + "\n", encoding="utf-8")
    made = making.session(tmp_path, "ctc_decode", characters="keys.txt")
    count = int(recorded[f"count{n}"])
    rows = []
    for k in range(count):
        classes, values = recorded[f"classes{n}_{k}"], recorded[f"values{n}_{k}"]
        dense = np.zeros((len(classes), str(recorded["characters"]).count("\n") + 3), np.float32)
        np.put_along_axis(dense, classes.astype(np.int64), values, axis=1)
        rows.append(dense)
    outputs = making.run(made, probabilities=rows)
    making.check(made, outputs, count)
    assert [text.decode() for text in outputs["text"][:, 0]] == [str(recorded[f"text{n}_{k}"]) for k in range(count)]
    np.testing.assert_allclose(outputs["score"][:, 0], [recorded[f"score{n}_{k}"] for k in range(count)], rtol=1e-6)


def test_the_detector_is_given_the_same_size(recorded, tmp_path):
    made = making.session(tmp_path, "resize_norm", fit="multiple", limit="736", limit_side="min", mean="0.5", std="0.5")
    outputs = making.run(made, image=[recorded[f"image{n}"] for n in PAGES])
    assert [image.shape[1:] for image in outputs["image"]] == [recorded[f"map{n}"].shape for n in PAGES]
