"""Lines of rapidocr-onnxruntime, in an environment that has it: images on stdin (JSON, base64), lines on stdout."""

from __future__ import annotations

import base64
import json
import sys

from rapidocr_onnxruntime import RapidOCR


def main() -> None:
    # Recognise each line alone. By default a line is padded to the longest of six, which affects its score.
    engine = RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1)
    engine.text_rec.rec_batch_num = 1
    answers = [engine(base64.b64decode(image))[0] or [] for image in json.load(sys.stdin)]
    json.dump([[[box, text, float(score)] for box, text, score in lines] for lines in answers], sys.stdout)


if __name__ == "__main__":
    main()
