"""The same small models for every runtime: as ONNX files, as Python, as operations, and on another server."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

import grpc
import numpy as np
import onnx
from onnx import TensorProto

from services.infer.operators.operation import Results
from services.infer.operators.parameters import Names, Parameters
from services.infer.operators.table import Entry
from services.infer.requests.ragged import Value
from services.infer.requests.signature import TensorSpec
from services.infer.runtimes.runtime import About
from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import model_config_pb2
from shoal.inference.v2.inference_pb2_grpc import GRPCInferenceServiceStub
from shoal.oip.datatypes import BY_NAME
from tests.infer import onnx_files
from tests.infer.conformance.instance import EXPLICIT, Instance

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

    def identities(self, datatypes: Sequence[str], dims: tuple[int | str, ...]) -> bytes:
        """Return a model of several identities: x_FP32 -> y_FP32 and so on."""
        nodes = [onnx.helper.make_node("Identity", [f"x_{name}"], [f"y_{name}"]) for name in datatypes]
        inputs, outputs = ([(f"{side}_{name}", ONNX_TYPES[name], dims) for name in datatypes] for side in "xy")
        return onnx_files.model(nodes, inputs, outputs).SerializeToString()

    def scale(self) -> bytes:
        return onnx_files.scale().SerializeToString()

    def lookup(self) -> bytes:
        return onnx_files.lookup().SerializeToString()

    def reshaping(self) -> bytes:
        return onnx_files.reshaping().SerializeToString()

    def of(self, model: onnx.ModelProto) -> bytes:
        return model.SerializeToString()


class ShoalModels:
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

    def identities(self, datatypes: Sequence[str], dims: tuple[int | str, ...]) -> bytes:
        """Return a model of several identities: x_FP32 -> y_FP32 and so on."""
        shape = [dim if isinstance(dim, int) else -1 for dim in dims]
        inputs, outputs = ({f"{side}_{name}": (name, shape) for name in datatypes} for side in "xy")
        return self._model(str(inputs), str(outputs), 'return {f"y{key[1:]}": value for key, value in batch.items()}')

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


class TritonModels(ShoalModels):
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


class OperationModels:
    """As configurations of operations, which are `OPERATIONS` below."""

    def add(self) -> bytes:
        return self._config("add")

    def identity(self, datatype: str = "FP32", dims: tuple[int | str, ...] = ("n", 4)) -> bytes:
        sizes = ",".join(str(dim if isinstance(dim, int) else -1) for dim in dims)
        return self._config("identity", datatype=datatype, dims=sizes)

    def scale(self) -> bytes:
        return self._config("scale")

    def lookup(self) -> bytes:
        return self._config("lookup")

    def reshaping(self) -> bytes:
        return self._config("reshaping")

    def _config(self, operation: str, **parameters: str) -> bytes:
        said = {"operation": operation, **parameters}
        parts = (f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}' for key, value in said.items())
        return "\n".join(parts).encode()


class OfAnyType(Parameters):
    """Of the operations here."""

    datatype: str = "FP32"
    dims: Names = ("-1", "4")


class Computed:
    """An operation that is a function of arrays."""

    is_batched = False
    only_computes = True

    def __init__(
        self,
        inputs: Mapping[str, tuple[str, tuple[int, ...]]],
        outputs: Mapping[str, tuple[str, tuple[int, ...]]],
        compute: Callable[..., tuple[np.ndarray, ...]],
    ) -> None:
        self.inputs = tuple(TensorSpec(name, BY_NAME[kind], shape) for name, (kind, shape) in inputs.items())
        self.outputs = tuple(TensorSpec(name, BY_NAME[kind], shape) for name, (kind, shape) in outputs.items())
        self._compute = compute

    def run(self, inputs: Mapping[str, Value]) -> Results:
        names = [spec.name for spec in self.outputs]
        try:
            return Results(dict(zip(names, self._compute(**inputs), strict=True)))
        except (IndexError, ValueError) as err:
            return Results(dict.fromkeys(names, np.empty(0)), {0: str(err)})

    def example(self) -> Mapping[str, Value]:
        # Nothing of each: then any shape is right.
        return {spec.name: np.zeros([max(dim, 0) for dim in spec.shape], spec.datatype.dtype) for spec in self.inputs}


_ANY = ("FP32", (-1, -1))
_ROW = ("FP32", (-1, 4))

OPERATIONS = {
    "add": Entry(
        Parameters,
        lambda asked, setting: Computed(
            {"a": _ANY, "b": _ANY}, {"sum": _ANY, "difference": _ANY}, lambda a, b: (a + b, a - b)
        ),
    ),
    "identity": Entry(
        OfAnyType,
        lambda asked, setting: Computed(
            {"x": (asked.datatype, tuple(map(int, asked.dims)))},
            {"y": (asked.datatype, tuple(map(int, asked.dims)))},
            lambda x: (x.copy(),),
        ),
    ),
    "scale": Entry(Parameters, lambda asked, setting: Computed({"x": _ROW}, {"y": _ROW}, lambda x: (2 * x,))),
    "lookup": Entry(
        Parameters,
        lambda asked, setting: Computed(
            {"i": ("INT64", (-1, 1))},
            {"y": ("FP32", (-1, 1))},
            lambda i: (np.array([10, 20, 30], np.float32)[i],),
        ),
    ),
    "reshaping": Entry(
        Parameters,
        lambda asked, setting: Computed(
            {"x": ("FP32", (-1,)), "shape": ("INT64", (2,))},
            {"y": ("FP32", (-1, -1))},
            lambda x, shape: (x.reshape(shape),),
        ),
    ),
}


class RemoteModels:
    """Serves models of Shoal's own interface from another process, which the first one starts."""

    def __init__(self, root: Path, stack: ExitStack) -> None:
        self._root, self._stack = root, stack
        self._models = 0

    @cached_property
    def _address(self) -> str:
        (self._root / "models").mkdir()
        far = Instance.serving(self._root / "models", self._root / "far.log", EXPLICIT)
        return self._stack.enter_context(far).address

    @cached_property
    def _stub(self) -> GRPCInferenceServiceStub:
        return GRPCInferenceServiceStub(self._stack.enter_context(grpc.insecure_channel(self._address)))

    def serve(self, model: bytes) -> About:
        """What a runtime must know to reach it."""
        address, self._models = self._address, self._models + 1
        folder = self._root / "models" / f"m{self._models}"
        (folder / "1").mkdir(parents=True)
        (folder / "1" / "model.py").write_bytes(model)
        (folder / "config.pbtxt").write_text(
            'max_batch_size: 0 parameters { key: "isolation" value { string_value: "none" } }'
        )
        self._stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name=folder.name), timeout=60)
        parameters = {"url": f"grpc://{address}", "remote_model": folder.name}
        config = {key: {"string_value": value} for key, value in parameters.items()}
        return About("m", config=model_config_pb2.ModelConfig(backend="remote", parameters=config))
