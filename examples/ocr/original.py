"""Runs where rapidocr-onnxruntime is installed: paths of images in (JSON, stdin), the original package's answers out.

For each image the lines that it is sure of: text, score, and the box as four corners.
"""

from __future__ import annotations

import json
import sys
import time

from rapidocr_onnxruntime import RapidOCR


def main() -> None:
    paths = json.load(sys.stdin)
    # Lines one by one: else each is padded to the longest of six, and what is read of it depends on the other five.
    ocr = RapidOCR(intra_op_num_threads=1, rec_batch_num=1)
    if paths:
        ocr(paths[0])  # Warm, as the server is.
    start, cpu = time.perf_counter(), time.process_time()
    answers = [ocr(path)[0] or [] for path in paths]
    seconds = {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    pages = [[{"text": text, "score": float(score), "box": box} for box, text, score in found] for found in answers]
    json.dump({"pages": pages, "seconds": seconds}, sys.stdout)


if __name__ == "__main__":
    main()
