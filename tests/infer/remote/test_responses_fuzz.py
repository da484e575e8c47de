"""Responses that no honest server sends: whatever the bytes are, they are outputs, or the remote server's fault."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.infer.remote.address import Address
from services.infer.remote.credentials import Headers
from services.infer.remote.dialect import Dialect
from services.infer.remote.oip import Oip
from services.infer.remote.settings import RemoteSettings
from services.infer.remote.tensorflow_serving import TensorFlowServing
from services.infer.remote.torchserve import TorchServe
from services.infer.requests.signature import TensorSpec
from services.infer.runtimes.runtime import ModelFailed
from shoal.inference.v2 import inference_pb2 as pb
from shoal.oip.datatypes import BY_NAME
from shoal.remote.v1 import tensorflow_serving_pb2 as tf
from tests.long_form import by_form

RECORDED = Path(__file__).resolve().parent / "recorded"
SETTINGS = RemoteSettings(Address("grpc://a:1", "dns:///a:1"), Headers(), model="m", signature_name="serving_default")

Y = TensorSpec("y", BY_NAME["FP32"], (-1, 4))
PREDICTION = TensorSpec("prediction", BY_NAME["BYTES"], (1,))
SPECS = {
    name: TensorSpec(name, BY_NAME[name], (-1, -1)) for name in ("FP16", "INT8", "BOOL", "BYTES", "BF16", "UINT64")
}


def oip(spec: TensorSpec, shape: tuple[int, ...], raw: bytes) -> bytes:
    made = pb.ModelInferResponse(raw_output_contents=[raw])
    made.outputs.add(name=spec.name, datatype=spec.datatype.name, shape=shape)
    return made.SerializeToString()


HONEST: list[tuple[Dialect, TensorSpec, bytes]] = [
    (Oip(SETTINGS), Y, oip(Y, (2, 4), np.ones(8, np.float32).tobytes())),
    (Oip(SETTINGS), SPECS["BYTES"], oip(SPECS["BYTES"], (1, 2), b"\x01\0\0\0a\0\0\0\0")),
    (Oip(SETTINGS), SPECS["BOOL"], oip(SPECS["BOOL"], (1, 2), b"\x01\0")),
    (TensorFlowServing(SETTINGS), Y, (RECORDED / "tensorflow_serving/scale-values.response").read_bytes()),
    (TensorFlowServing(SETTINGS), Y, (RECORDED / "tensorflow_serving/scale-content.response").read_bytes()),
    (TorchServe(SETTINGS), PREDICTION, (RECORDED / "torchserve/one.response").read_bytes()),
]


@pytest.mark.parametrize("honest", HONEST, ids=lambda honest: f"{type(honest[0]).__name__}-{honest[1].name}")
def test_what_is_honest_is_read(honest):
    dialect, spec, data = honest
    (array,) = dialect.parse_response(data, [spec])
    assert array.dtype == spec.datatype.dtype


@settings(max_examples=by_form(100, 400), deadline=None)
@given(data=st.data())
def test_bytes_that_are_changed(data):
    dialect, spec, honest = data.draw(st.sampled_from(HONEST))
    changed = bytearray(honest)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed)))
        changed[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=6))
    read(dialect, bytes(changed), spec)


@settings(max_examples=by_form(100, 300), deadline=None)
@given(
    shape=st.lists(st.one_of(st.integers(-3, 4), st.integers(-(1 << 63), (1 << 63) - 1)), max_size=80),
    name=st.sampled_from(sorted(SPECS)),
    raw=st.binary(max_size=40),
)
def test_shapes_that_are_lies(shape, name, raw):
    spec = SPECS[name]
    read(Oip(SETTINGS), oip(spec, tuple(shape), raw), spec)
    sizes = tf.TensorFlowShape(dim=[tf.TensorFlowShape.Dim(size=size) for size in shape])
    kinds = {"FP16": 19, "INT8": 6, "BOOL": 10, "BYTES": 7, "BF16": 14, "UINT64": 23}
    tensor = tf.TensorFlowTensor(dtype=kinds[name], tensor_shape=sizes, tensor_content=raw, half_val=list(raw))
    response = tf.TensorFlowPredictResponse(outputs={spec.name: tensor})
    read(TensorFlowServing(SETTINGS), response.SerializeToString(), spec)
    response.outputs[spec.name].ClearField("tensor_content")
    read(TensorFlowServing(SETTINGS), response.SerializeToString(), spec)


def test_more_dimensions_than_an_array_can_have():
    with pytest.raises(ModelFailed, match=r"output 'INT8': expected \[-1,-1\], got \[1,1,1"):
        Oip(SETTINGS).parse_response(oip(SPECS["INT8"], (1,) * 100, b"\1"), [SPECS["INT8"]])
    sizes = tf.TensorFlowShape(dim=[tf.TensorFlowShape.Dim(size=1)] * 100)
    response = tf.TensorFlowPredictResponse(outputs={"INT8": tf.TensorFlowTensor(dtype=6, tensor_shape=sizes)})
    with pytest.raises(ModelFailed, match=r"output 'INT8': expected \[-1,-1\], got \[1,1,1"):
        TensorFlowServing(SETTINGS).parse_response(response.SerializeToString(), [SPECS["INT8"]])


def read(dialect: Dialect, data: bytes, spec: TensorSpec) -> None:
    try:
        (array,) = dialect.parse_response(data, [spec])
    except ModelFailed:
        return
    assert array.dtype == spec.datatype.dtype
