"""Records what `rapidocr-onnxruntime` makes of some pages: maps of its detector, boxes, crops and texts.

Run where that package is installed, which brings its own OpenCV and cannot live beside the headless one:

    python tests/infer/operators/originals/record_ocr.py

`ocr.npz` beside this file is what it wrote (rapidocr-onnxruntime 1.4.4, OpenCV 5.0.0). All of it is the package's own
code and its own models, on pages drawn here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rapidocr_onnxruntime import RapidOCR

LINES = ("Shoal: many requests", "moving as one 12345", "a(b) [c] {d} #%&", "INVOICE 2026-11-24", "Total 98.76 EUR")
STEPS_KEPT = 4
# Classes of a step that are recorded; the others count as 0, for both sides.


def page(seed: int, height: int, width: int) -> np.ndarray:
    """Black text on white: several lines, one of them tilted, one running down."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), 255, np.uint8)
    for n, line in enumerate(rng.permutation(LINES)[:4]):
        at = (int(rng.integers(5, 60)), 50 + n * height // 6)
        cv2.putText(image, str(line), at, int(rng.integers(0, 4)), float(rng.uniform(0.7, 1.2)), (0, 0, 0), 2)
    tilted = np.full_like(image, 255)
    cv2.putText(tilted, "tilted text", (width // 5, height * 4 // 5), 0, 1.0, (0, 0, 0), 2)
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), float(rng.uniform(-25, 25)), 1)
    image = np.minimum(image, cv2.warpAffine(tilted, turn, (width, height), borderValue=(255, 255, 255)))
    down = np.full((60, height // 2, 3), 255, np.uint8)
    cv2.putText(down, "down", (5, 40), 0, 1.0, (0, 0, 0), 2)
    down = np.rot90(down, 3)
    image[: down.shape[0], width - 60 :] = np.minimum(image[: down.shape[0], width - 60 :], down)
    return image


def main() -> None:
    ocr = RapidOCR()
    recorded: dict[str, Any] = {}
    for n, (height, width) in enumerate([(320, 480), (480, 320), (400, 600)]):
        image = page(n, height, width)
        detector = ocr.text_det
        # The map as it is kept: both sides start from the same numbers.
        raw = detector.infer(detector.get_preprocess(max(height, width))(image))[0]
        kept = np.round(raw[0, 0] * 255).astype(np.uint8)
        pred = (kept.astype(np.float32) / np.float32(255))[None, None]
        recorded |= {f"image{n}": image, f"map{n}": kept}
        for mode in ("fast", "slow"):
            detector.postprocess_op.score_mode = mode
            found, scores = detector.postprocess_op(pred, (height, width))
            boxes = detector.filter_tag_det_res(found, (height, width))
            recorded |= {f"boxes{n}_{mode}": np.array(ocr.sorted_boxes(boxes), np.float32).reshape(-1, 4, 2)}
            recorded |= {f"all{n}_{mode}": found, f"scores{n}_{mode}": np.array(scores, np.float32)}
        crops = ocr.get_crop_img_list(image, recorded[f"boxes{n}_fast"])
        recorded |= {f"crop{n}_{k}": crop for k, crop in enumerate(crops)}
        record_texts(ocr.text_rec, crops, n, recorded)
    recorded["characters"] = np.array("\n".join(ocr.text_rec.postprocess_op.character[1:-1]))
    np.savez_compressed(Path(__file__).with_name("ocr.npz"), **recorded)


def record_texts(recogniser: Any, crops: list[np.ndarray], page: int, recorded: dict[str, Any]) -> None:
    for k, crop in enumerate(crops):
        ratio = max(320 / 48, crop.shape[1] / crop.shape[0])
        preds = recogniser.session(recogniser.resize_norm_img(crop, ratio)[None])[0]
        best = np.argsort(-preds[0], axis=1, kind="stable")[:, :STEPS_KEPT]
        values = np.take_along_axis(preds[0], best, axis=1)
        sparse = np.zeros_like(preds[0])
        np.put_along_axis(sparse, best, values, axis=1)
        text, score = recogniser.postprocess_op(sparse[None])[0]
        recorded |= {f"classes{page}_{k}": best.astype(np.int16), f"values{page}_{k}": values}
        recorded |= {f"text{page}_{k}": np.array(text), f"score{page}_{k}": np.float32(score)}
    recorded[f"count{page}"] = np.int32(len(crops))


if __name__ == "__main__":
    main()
