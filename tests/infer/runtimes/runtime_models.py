"""The same small models for every runtime: as ONNX files, and as Python."""

from __future__ import annotations

import textwrap

import onnx
from onnx import TensorProto

from tests.infer import onnx_files

ONNX_TYPES = {
    "BOOL": TensorProto.BOOL,
    "INT8": TensorProto.INT8,
    "UINT8": TensorProto.UINT8,
    "INT16": TensorProto.INT16,
    "UINT16": TensorProto.UINT16,
    "INT32": TensorProto.INT32,
    "UINT32": TensorProto.UINT32,
    "INT64": TensorProto.INT64,
    "UINT64": TensorProto.UINT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BF16": TensorProto.BFLOAT16,
    "BYTES": TensorProto.STRING,
}


class OnnxModels:
    """As bytes of .onnx files."""

    def add(self) -> bytes:
        return onnx_files.add().SerializeToString()

    def identity(self, datatype: str = "FP32", dims: tuple[int | str, ...] = ("n", 4)) -> bytes:
        return onnx_files.identity(ONNX_TYPES[datatype], dims).SerializeToString()

    def scale(self) -> bytes:
        return onnx_files.scale().SerializeToString()

    def lookup(self) -> bytes:
        return onnx_files.lookup().SerializeToString()

    def reshaping(self) -> bytes:
        return onnx_files.reshaping().SerializeToString()

    def of(self, model: onnx.ModelProto) -> bytes:
        return model.SerializeToString()


class OwnModels:
    """As sources of `model.py`, in Shoal's own interface."""

    def add(self) -> bytes:
        shape = '("FP32", [-1, -1])'
        return self._model(
            f'{{"a": {shape}, "b": {shape}}}',
            f'{{"sum": {shape}, "difference": {shape}}}',
            'return {"sum": batch["a"] + batch["b"], "difference": batch["a"] - batch["b"]}',
        )

    def identity(self, datatype: str = "FP32", dims: tuple[int | str, ...] = ("n", 4)) -> bytes:
        spec = f'("{datatype}", {[dim if isinstance(dim, int) else -1 for dim in dims]})'
        return self._model(f'{{"x": {spec}}}', f'{{"y": {spec}}}', 'return {"y": batch["x"]}')

    def scale(self) -> bytes:
        spec = '("FP32", [-1, 4])'
        return self._model(f'{{"x": {spec}}}', f'{{"y": {spec}}}', 'return {"y": 2 * batch["x"]}')

    def lookup(self) -> bytes:
        return self._model(
            '{"i": ("INT64", [-1, 1])}',
            '{"y": ("FP32", [-1, 1])}',
            'return {"y": np.array([10, 20, 30], np.float32)[batch["i"]]}',
        )

    def reshaping(self) -> bytes:
        return self._model(
            '{"x": ("FP32", [-1]), "shape": ("INT64", [2])}',
            '{"y": ("FP32", [-1, -1])}',
            'return {"y": batch["x"].reshape(batch["shape"])}',
        )

    def _model(self, inputs: str, outputs: str, predict: str) -> bytes:
        source = f"""
            import numpy as np
            class Model:
                inputs = {inputs}
                outputs = {outputs}
                def predict(self, batch):
                    {predict}
        """
        return textwrap.dedent(source).encode()


class TritonModels(OwnModels):
    """As sources of `model.py`, in Triton's interface."""

    def _model(self, inputs: str, outputs: str, predict: str) -> bytes:
        source = f"""
            import numpy as np
            import triton_python_backend_utils as pb_utils
            INPUTS, OUTPUTS = {inputs}, {outputs}
            TYPES = {{"BYTES": "STRING"}}

            def predict(batch):
                {predict}

            class TritonPythonModel:
                @staticmethod
                def auto_complete_config(config):
                    for tensors, add in ((INPUTS, config.add_input), (OUTPUTS, config.add_output)):
                        for name, (datatype, dims) in tensors.items():
                            add({{"name": name, "data_type": "TYPE_" + TYPES.get(datatype, datatype), "dims": dims}})
                    config.set_max_batch_size(0)
                    return config

                def execute(self, requests):
                    responses = []
                    for request in requests:
                        given = predict({{tensor.name(): tensor.as_numpy() for tensor in request.inputs()}})
                        wanted = request.requested_output_names()
                        tensors = [pb_utils.Tensor(name, given[name]) for name in wanted]
                        responses.append(pb_utils.InferenceResponse(tensors))
                    return responses
        """
        return textwrap.dedent(source).encode()
