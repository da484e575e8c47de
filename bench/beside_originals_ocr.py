"""beside_originals.py runs this beside the original package: a line of JSON images (base64) in, what they took out.

As beside_originals_embeddings.py, for rapidocr-onnxruntime, with the settings that it comes with but for the threads.
"""

from __future__ import annotations

import base64
import json
import sys
import time

from rapidocr_onnxruntime import RapidOCR


def main() -> None:
    threads = int(sys.argv[1])
    engine = RapidOCR(intra_op_num_threads=threads, inter_op_num_threads=1)
    for line in sys.stdin:
        images = [base64.b64decode(image) for image in json.loads(line)]
        start, processor = time.perf_counter(), time.process_time()
        for image in images:
            engine(image)
        print(json.dumps([time.perf_counter() - start, time.process_time() - processor]), flush=True)


if __name__ == "__main__":
    main()
