"""Model of Triton's python backend that runs the tokens of a batch's requests in ONNX Runtime.

Parameter `padded`: `batch` pads all requests of a batch to the longest and runs them together. `own` pads each request
to its own length, rounded up to a multiple of 4, and runs requests of equal length together, as Shoal does.
"""

# ruff: noqa: I001
# Triton's module comes first: its import decides which NumPy is found.
import json
import os

import triton_python_backend_utils as pb_utils
import numpy as np
import onnxruntime

MULTIPLE_OF = 4


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(parameters["threads"]["string_value"])
        options.inter_op_num_threads = 1
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._own = parameters["padded"]["string_value"] == "own"

    def execute(self, requests: list) -> list:
        inputs = [
            [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in ("input_ids", "attention_mask")]
            for request in requests
        ]
        groups: dict[int, list[int]] = {}
        longest = max(ids.shape[1] for ids, _ in inputs)
        for n, (ids, _) in enumerate(inputs):
            groups.setdefault(-(-ids.shape[1] // MULTIPLE_OF) * MULTIPLE_OF if self._own else longest, []).append(n)
        answers: list[object] = [None] * len(inputs)
        for length, group in groups.items():
            tokens = self._run([inputs[n] for n in group], length)
            for n, answer in zip(group, tokens, strict=True):
                answers[n] = pb_utils.InferenceResponse([pb_utils.Tensor("token_embeddings", answer)])
        return answers

    def _run(self, inputs: list[list[np.ndarray]], length: int) -> list[np.ndarray]:
        rows = [len(ids) for ids, _ in inputs]
        padded = np.zeros((2, sum(rows), length), np.int64)
        ends = np.cumsum(rows)
        for end, (ids, mask) in zip(ends, inputs, strict=True):
            where = slice(end - len(ids), end), slice(ids.shape[1])
            padded[0][where], padded[1][where] = ids, mask
        [tokens] = self._session.run(["token_embeddings"], {"input_ids": padded[0], "attention_mask": padded[1]})
        return [
            np.ascontiguousarray(part[:, : ids.shape[1]])
            for part, (ids, _) in zip(np.split(tokens, ends[:-1]), inputs, strict=True)
        ]
