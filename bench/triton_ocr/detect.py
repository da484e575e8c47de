"""Model of Triton's python backend that detects the corners of a page's lines, in reading order."""

# ruff: noqa: I001
# Triton's module comes first: its import decides which NumPy is found.
import json

import triton_python_backend_utils as pb_utils
import numpy as np
from rapidocr_onnxruntime import RapidOCR


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        threads = int(json.loads(args["model_config"])["parameters"]["threads"]["string_value"])
        self._engine = RapidOCR(intra_op_num_threads=threads, inter_op_num_threads=1)

    def execute(self, requests: list) -> list:
        return [self._answer(request) for request in requests]

    def _answer(self, request: object) -> object:
        page = pb_utils.get_input_tensor_by_name(request, "page").as_numpy()[0]
        found, _ = self._engine.auto_text_det(page)
        corners = np.array(found if found is not None else [], np.float32).reshape(1, -1, 4, 2)
        return pb_utils.InferenceResponse([pb_utils.Tensor("corners", corners)])
