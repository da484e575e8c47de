"""Model of Triton's python backend that turns upside-down lines, for all requests of a batch together."""

# ruff: noqa: I001
# Triton's module comes first: its import decides which NumPy is found.
import json

import triton_python_backend_utils as pb_utils
from rapidocr_onnxruntime import RapidOCR
from lines import packed, unpacked


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        threads = int(json.loads(args["model_config"])["parameters"]["threads"]["string_value"])
        self._engine = RapidOCR(intra_op_num_threads=threads, inter_op_num_threads=1)

    def execute(self, requests: list) -> list:
        inputs = [
            unpacked(*(pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in ("pixels", "sizes")))
            for request in requests
        ]
        together = [line for lines in inputs for line in lines]
        turned = iter(self._engine.text_cls(together)[0] if together else [])
        return [self._answer([next(turned) for _ in lines]) for lines in inputs]

    @staticmethod
    def _answer(lines: list) -> object:
        return pb_utils.InferenceResponse([pb_utils.Tensor("upright", packed(lines)[0])])
