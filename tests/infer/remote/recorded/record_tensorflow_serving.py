"""Writes exchanges as TensorFlow Serving has them into tensorflow_serving/: run once by hand, in its own environment.

    pip download --no-deps tensorflow-serving-api==2.21.0 tensorflow-cpu==2.21.0     (for their *_pb2.py files)
    pip install protobuf numpy
    PYTHONPATH=<a folder with those *_pb2.py files> python tests/infer/remote/recorded/record_tensorflow_serving.py

The server itself is not on PyPI. So the bytes of requests and responses are written by the official messages
(`tensorflow_serving.apis`), and not taken from a running server: responses are made in both forms that it has, values
one by one (its default) and `tensor_content`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tensorflow.core.framework import tensor_pb2, tensor_shape_pb2, types_pb2
from tensorflow.core.protobuf import meta_graph_pb2
from tensorflow_serving.apis import get_model_metadata_pb2, predict_pb2

OUT = Path(__file__).resolve().parent / "tensorflow_serving"
SERVICE = "/tensorflow.serving.PredictionService/"
METADATA, PREDICT = SERVICE + "GetModelMetadata", SERVICE + "Predict"

TYPES = {
    "f4": (types_pb2.DT_FLOAT, "float_val"),
    "f8": (types_pb2.DT_DOUBLE, "double_val"),
    "i4": (types_pb2.DT_INT32, "int_val"),
    "i2": (types_pb2.DT_INT16, "int_val"),
    "i1": (types_pb2.DT_INT8, "int_val"),
    "u1": (types_pb2.DT_UINT8, "int_val"),
    "u2": (types_pb2.DT_UINT16, "int_val"),
    "u4": (types_pb2.DT_UINT32, "uint32_val"),
    "u8": (types_pb2.DT_UINT64, "uint64_val"),
    "i8": (types_pb2.DT_INT64, "int64_val"),
    "b1": (types_pb2.DT_BOOL, "bool_val"),
    "f2": (types_pb2.DT_HALF, "half_val"),
}

ROWS = np.arange(8, dtype=np.float32).reshape(2, 4)
MIXED = np.concatenate([ROWS[:1] - 9, ROWS[:1]])
BRAINS = np.array([0x3FC0, 0xC000], np.int32)


def shape(*sizes: int) -> tensor_shape_pb2.TensorShapeProto:
    return tensor_shape_pb2.TensorShapeProto(dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=n) for n in sizes])


def content(array: np.ndarray) -> tensor_pb2.TensorProto:
    dtype, _ = TYPES[array.dtype.str[1:]]
    return tensor_pb2.TensorProto(dtype=dtype, tensor_shape=shape(*array.shape), tensor_content=array.tobytes())


def values(array: np.ndarray) -> tensor_pb2.TensorProto:
    dtype, field = TYPES[array.dtype.str[1:]]
    flat = array.reshape(-1).view(np.uint16) if field == "half_val" else array.reshape(-1)
    return tensor_pb2.TensorProto(dtype=dtype, tensor_shape=shape(*array.shape), **{field: flat.tolist()})


def strings(*parts: bytes, size: tuple[int, ...] = ()) -> tensor_pb2.TensorProto:
    sizes = size or (len(parts),)
    return tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, tensor_shape=shape(*sizes), string_val=parts)


def predict(
    name: str, outputs: list[str], version: int = 0, signature: str = "serving_default", **inputs: object
) -> bytes:
    asked = predict_pb2.PredictRequest(inputs=inputs, output_filter=outputs)
    asked.model_spec.name, asked.model_spec.signature_name = name, signature
    if version:
        asked.model_spec.version.value = version
    return asked.SerializeToString(deterministic=True)


def predicted(name: str, **outputs: object) -> bytes:
    said = predict_pb2.PredictResponse(outputs=outputs)
    said.model_spec.name, said.model_spec.signature_name = name, "serving_default"
    said.model_spec.version.value = 3
    return said.SerializeToString(deterministic=True)


def ask(name: str, version: int = 0) -> bytes:
    asked = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    asked.model_spec.name = name
    if version:
        asked.model_spec.version.value = version
    return asked.SerializeToString(deterministic=True)


def said(name: str, **signatures: meta_graph_pb2.SignatureDef) -> bytes:
    there = get_model_metadata_pb2.SignatureDefMap(signature_def=signatures)
    response = get_model_metadata_pb2.GetModelMetadataResponse()
    response.model_spec.name, response.model_spec.version.value = name, 3
    response.metadata["signature_def"].Pack(there)
    return response.SerializeToString(deterministic=True)


def info(dtype: int, *sizes: int, name: str = "t:0") -> meta_graph_pb2.TensorInfo:
    return meta_graph_pb2.TensorInfo(name=name, dtype=dtype, tensor_shape=shape(*sizes))


def signature(inputs: dict, outputs: dict) -> meta_graph_pb2.SignatureDef:
    return meta_graph_pb2.SignatureDef(inputs=inputs, outputs=outputs, method_name="tensorflow/serving/predict")


FLOATS = signature({"x": info(types_pb2.DT_FLOAT, -1, 4)}, {"y": info(types_pb2.DT_FLOAT, -1, 4)})
KINDS = ("b1", "f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
EVERY = signature(
    {"words": info(types_pb2.DT_STRING, -1)},
    {
        **{kind: info(TYPES[kind][0], -1, 2) for kind in KINDS},
        "bf16": info(types_pb2.DT_BFLOAT16, -1, 2),
        "words": info(types_pb2.DT_STRING, -1),
    },
)
SPARSE = signature({"x": meta_graph_pb2.TensorInfo(dtype=types_pb2.DT_FLOAT)}, {"y": info(types_pb2.DT_FLOAT, -1)})
COMPLEX = signature({"x": info(types_pb2.DT_COMPLEX64, -1)}, {"y": info(types_pb2.DT_FLOAT, -1)})


def every(form: object) -> dict[str, tensor_pb2.TensorProto]:
    made = {kind: form(np.array([[0, 1]], np.dtype(f"<{kind}" if kind[1] != "1" else kind))) for kind in KINDS}
    brain = tensor_pb2.TensorProto(dtype=types_pb2.DT_BFLOAT16, tensor_shape=shape(1, 2))
    if form is content:
        brain.tensor_content = BRAINS.astype("<u2").tobytes()
    else:
        brain.half_val.extend(BRAINS.tolist())
    return {**made, "bf16": brain, "words": strings(b"a\x00b")}


def exchanges() -> list[tuple[str, str, bytes, str, str, bytes]]:
    names = sorted([*KINDS, "bf16", "words"])
    repeated = tensor_pb2.TensorProto(dtype=types_pb2.DT_FLOAT, tensor_shape=shape(2, 4), float_val=[1.0, 2.0])
    wrong = values(np.zeros((2, 3), np.float32))
    return [
        ("scale-metadata", METADATA, ask("scale"), "OK", "", said("scale", serving_default=FLOATS, other=FLOATS)),
        (
            "scale-values",
            PREDICT,
            predict("scale", ["y"], x=content(ROWS)),
            "OK",
            "",
            predicted("scale", y=values(2 * ROWS)),
        ),
        (
            "scale-content",
            PREDICT,
            predict("scale", ["y"], x=content(ROWS + 1)),
            "OK",
            "",
            predicted("scale", y=content(2 * (ROWS + 1))),
        ),
        (
            "scale-repeated",
            PREDICT,
            predict("scale", ["y"], x=content(ROWS + 2)),
            "OK",
            "",
            predicted("scale", y=repeated),
        ),
        (
            "scale-wrong-shape",
            PREDICT,
            predict("scale", ["y"], x=content(ROWS + 3)),
            "OK",
            "",
            predicted("scale", y=wrong),
        ),
        (
            "scale-no-output",
            PREDICT,
            predict("scale", ["y"], x=content(ROWS + 4)),
            "OK",
            "",
            predicted("scale", z=wrong),
        ),
        (
            "scale-both-refused",
            PREDICT,
            predict("scale", ["y"], x=content(MIXED)),
            "INVALID_ARGUMENT",
            "x is below zero",
            b"",
        ),
        (
            "scale-refused",
            PREDICT,
            predict("scale", ["y"], x=content(ROWS[:1] - 9)),
            "INVALID_ARGUMENT",
            "x is below zero",
            b"",
        ),
        (
            "scale-mates",
            PREDICT,
            predict("scale", ["y"], x=content(ROWS[:1])),
            "OK",
            "",
            predicted("scale", y=values(2 * ROWS[:1])),
        ),
        (
            "scale-busy",
            PREDICT,
            predict("scale", ["y"], x=content(ROWS[:1] + 7)),
            "RESOURCE_EXHAUSTED",
            "too many",
            b"",
        ),
        ("pinned-metadata", METADATA, ask("scale", 3), "OK", "", said("scale", serving_default=FLOATS, other=FLOATS)),
        (
            "pinned",
            PREDICT,
            predict("scale", ["y"], 3, "other", x=content(ROWS)),
            "OK",
            "",
            predicted("scale", y=values(3 * ROWS)),
        ),
        ("every-metadata", METADATA, ask("every"), "OK", "", said("every", serving_default=EVERY)),
        (
            "every-values",
            PREDICT,
            predict("every", names, words=strings(b"values")),
            "OK",
            "",
            predicted("every", **every(values)),
        ),
        (
            "every-content",
            PREDICT,
            predict("every", names, words=strings(b"content")),
            "OK",
            "",
            predicted("every", **every(content)),
        ),
        ("sparse-metadata", METADATA, ask("sparse"), "OK", "", said("sparse", serving_default=SPARSE)),
        ("complex-metadata", METADATA, ask("complex"), "OK", "", said("complex", serving_default=COMPLEX)),
        (
            "nobody-metadata",
            METADATA,
            ask("nobody"),
            "NOT_FOUND",
            "Could not find any versions of model nobody",
            b"",
        ),
    ]


def main() -> None:
    OUT.mkdir(exist_ok=True)
    listed = []
    for name, method, request, code, message, response in exchanges():
        (OUT / f"{name}.request").write_bytes(request)
        if code == "OK":
            (OUT / f"{name}.response").write_bytes(response)
        listed.append({"name": name, "method": method, "code": code, "message": message})
    (OUT / "exchanges.json").write_text(json.dumps(listed, indent=2) + "\n")


if __name__ == "__main__":
    main()
