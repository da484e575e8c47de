"""Model of Triton's python backend that converts texts [n, 1] to tokens [n, length], padded per request."""

# ruff: noqa: I001
# Triton's module comes first: its import decides which NumPy is found.
import os

import triton_python_backend_utils as pb_utils
import numpy as np
from tokenizers import Tokenizer

LONGEST = 256


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        folder = os.path.join(args["model_repository"], args["model_version"])
        self._tokenizer = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
        self._tokenizer.enable_truncation(LONGEST)
        self._tokenizer.no_padding()

    def execute(self, requests: list) -> list:
        inputs = [pb_utils.get_input_tensor_by_name(request, "text").as_numpy().reshape(-1) for request in requests]
        encodings = iter(self._tokenizer.encode_batch([text.decode() for texts in inputs for text in texts]))
        return [self._answer([next(encodings).ids for _ in texts]) for texts in inputs]

    @staticmethod
    def _answer(rows: list[list[int]]) -> object:
        ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
        mask = np.zeros_like(ids)
        for n, row in enumerate(rows):
            ids[n, : len(row)], mask[n, : len(row)] = row, 1
        tensors = [pb_utils.Tensor("input_ids", ids), pb_utils.Tensor("attention_mask", mask)]
        return pb_utils.InferenceResponse(tensors)
