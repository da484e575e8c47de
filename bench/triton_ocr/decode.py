"""Model of Triton's python backend that decodes an image to the package's page, with the scale between the two."""

# ruff: noqa: I001
# Triton's module comes first: its import decides which NumPy is found.
import triton_python_backend_utils as pb_utils
import numpy as np
from rapidocr_onnxruntime import RapidOCR


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self._engine = RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1)

    def execute(self, requests: list) -> list:
        return [self._answer(request) for request in requests]

    def _answer(self, request: object) -> object:
        [image] = pb_utils.get_input_tensor_by_name(request, "image").as_numpy().reshape(-1)
        raw = self._engine.load_img(image)
        page, ratio_h, ratio_w = self._engine.preprocess(raw)
        page, record = self._engine.maybe_add_letterbox(page, {})
        frame = np.array([[*raw.shape[:2], ratio_h, ratio_w, record["padding_1"]["top"]]], np.float32)
        page = np.ascontiguousarray(page)
        return pb_utils.InferenceResponse([pb_utils.Tensor("page", page[None]), pb_utils.Tensor("frame", frame)])
