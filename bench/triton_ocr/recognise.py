"""Model of Triton's python backend that recognises the text of each line.

The package gets the lines of all requests of a batch together. It sorts them by width and runs `together` lines (a
parameter) at a time, padded to the longest.
"""

# ruff: noqa: I001
# Triton's module comes first: its import decides which NumPy is found.
import json

import triton_python_backend_utils as pb_utils
import numpy as np
from rapidocr_onnxruntime import RapidOCR
from lines import unpacked


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        threads = int(parameters["threads"]["string_value"])
        self._engine = RapidOCR(intra_op_num_threads=threads, inter_op_num_threads=1)
        self._engine.text_rec.rec_batch_num = int(parameters["together"]["string_value"])

    def execute(self, requests: list) -> list:
        inputs = [
            unpacked(*(pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in ("upright", "sizes")))
            for request in requests
        ]
        together = [line for lines in inputs for line in lines]
        read = iter(self._engine.text_rec(together)[0] if together else [])
        return [self._answer([next(read) for _ in lines]) for lines in inputs]

    @staticmethod
    def _answer(read: list) -> object:
        texts = np.array([each[0].encode() for each in read], object)[None]
        scores = np.array([each[1] for each in read], np.float32)[None]
        return pb_utils.InferenceResponse([pb_utils.Tensor("texts", texts), pb_utils.Tensor("scores", scores)])
