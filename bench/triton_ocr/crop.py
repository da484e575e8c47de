"""Model of Triton's python backend that crops each line of a page, and returns its corners on the original image."""

# ruff: noqa: I001
# Triton's module comes first: its import decides which NumPy is found.
import triton_python_backend_utils as pb_utils
import numpy as np
from rapidocr_onnxruntime import RapidOCR
from lines import packed


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self._engine = RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1)

    def execute(self, requests: list) -> list:
        return [self._answer(request) for request in requests]

    def _answer(self, request: object) -> object:
        page, frame, corners = (
            pb_utils.get_input_tensor_by_name(request, name).as_numpy()[0] for name in ("page", "frame", "corners")
        )
        pixels, sizes = packed(self._engine.get_crop_img_list(page, list(corners)))
        boxes = self._boxes(corners, frame) if len(corners) else corners
        tensors = {"pixels": pixels, "sizes": sizes, "boxes": boxes[None]}
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in tensors.items()])

    def _boxes(self, corners: np.ndarray, frame: np.ndarray) -> np.ndarray:
        height, width, ratio_h, ratio_w, top = frame.tolist()
        record = {"preprocess": {"ratio_h": ratio_h, "ratio_w": ratio_w}, "padding_1": {"top": top, "left": 0}}
        return self._engine._get_origin_points(corners, record, height, width).astype(np.float32)
