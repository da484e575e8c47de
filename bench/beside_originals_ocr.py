"""Timer of rapidocr-onnxruntime for beside_originals.py: reads lines of JSON images (base64), writes wall and CPU
seconds.

Works as beside_originals_embeddings.py. All settings except the threads are the package's defaults.
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
