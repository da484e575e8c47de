"""Model of Triton's python backend that averages a text's tokens and scales the mean to length 1."""

# ruff: noqa: I001
# Triton's module comes first: its import decides which NumPy is found.
import triton_python_backend_utils as pb_utils
import numpy as np


class TritonPythonModel:
    def execute(self, requests: list) -> list:
        return [self._answer(request) for request in requests]

    @staticmethod
    def _answer(request: object) -> object:
        tokens = pb_utils.get_input_tensor_by_name(request, "token_embeddings").as_numpy()
        mask = pb_utils.get_input_tensor_by_name(request, "attention_mask").as_numpy().astype(np.float32)
        # The sum suffices: the normalization cancels the divisor of a mean.
        sums = np.matmul(mask[:, None, :], tokens)[:, 0]
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        return pb_utils.InferenceResponse([pb_utils.Tensor("embedding", sums / np.maximum(norms, 1e-12))])
