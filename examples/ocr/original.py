"""Runs where rapidocr-onnxruntime is installed: images (base64 in JSON, stdin) in, what the package reads out."""

from __future__ import annotations

import base64
import json
import sys

from rapidocr_onnxruntime import RapidOCR


def main() -> None:
    # A line alone: by default it is padded to the longest of six, and its score depends on its neighbours.
    engine = RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1)
    engine.text_rec.rec_batch_num = 1
    answers = [engine(base64.b64decode(image))[0] or [] for image in json.load(sys.stdin)]
    json.dump([[[box, text, float(score)] for box, text, score in lines] for lines in answers], sys.stdout)


if __name__ == "__main__":
    main()
