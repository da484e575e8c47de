"""Writes the model repository: configurations from models/, the three models from the wheel rapidocr-onnxruntime.

python -m examples.ocr.build FOLDER      then: shoal models push FOLDER, or shoal serve FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import onnxruntime

from examples import originals, repository

FILES = {
    "ocr_detect": "ch_PP-OCRv4_det_infer.onnx",
    "ocr_angle": "ch_ppocr_mobile_v2.0_cls_infer.onnx",
    "ocr_read": "ch_PP-OCRv4_rec_infer.onnx",
}


def build(into: Path) -> Path:
    """The repository in `into`; returns it."""
    models = originals.folder("rapidocr_onnxruntime") / "models"
    files: dict[str, Path | bytes] = {f"{model}/1/model.onnx": models / name for model, name in FILES.items()}
    files["ocr_text/1/characters.txt"] = _characters(models / FILES["ocr_read"]).encode()
    return repository.build(Path(__file__).parent / "models", into, files)


def _characters(recogniser: Path) -> str:
    """One character on each line, as the model's file has them with it."""
    read = onnxruntime.InferenceSession(recogniser, providers=["CPUExecutionProvider"])
    characters: str = read.get_modelmeta().custom_metadata_map["character"]
    return characters


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(build(Path(sys.argv[1])))
