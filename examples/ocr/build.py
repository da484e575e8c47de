"""Build of the model repository: configurations from models/, the three models from the wheel rapidocr-onnxruntime.

python -m examples.ocr.build FOLDER      then: shoal models push FOLDER, or shoal serve FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import onnxruntime

from examples import originals, repository


def build(into: Path) -> Path:
    """Write the repository to `into`, and return `into`."""
    wheel = originals.folder("rapidocr_onnxruntime") / "models"
    recogniser = wheel / "ch_PP-OCRv4_rec_infer.onnx"
    files = {
        "ocr_detect/1/model.onnx": wheel / "ch_PP-OCRv4_det_infer.onnx",
        "ocr_angle/1/model.onnx": wheel / "ch_ppocr_mobile_v2.0_cls_infer.onnx",
        "ocr_recognise/1/model.onnx": recogniser,
        "ocr_text/1/characters.txt": characters(recogniser).encode(),
    }
    return repository.build(Path(__file__).parent / "models", into, files)


def characters(model: Path) -> str:
    """Return the characters in the model's metadata, one per line, in the order of the classes."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    return session.get_modelmeta().custom_metadata_map["character"] + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(build(Path(sys.argv[1])))
