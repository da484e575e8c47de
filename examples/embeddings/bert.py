"""Conversion of a BERT encoder to an ONNX graph, from the tensors of its safetensors file, without a framework.

    ids, mask ── embeddings ── layers: attention + feed-forward, each added and normalised ── token_embeddings

Tensor names are those of Hugging Face's BertModel. One product computes query, key and value. The weights of the query
include the scale of the scores, 1 / sqrt(size of a head).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Weights = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Shape:
    """Dimensions of the encoder, from its config.json."""

    layers: int
    heads: int
    width: int
    epsilon: float

    @classmethod
    def read(cls, config: Path) -> Shape:
        values = json.loads(config.read_text())
        model, activation = values["model_type"], values["hidden_act"]
        if (model, activation) != ("bert", "gelu"):
            raise ValueError(f"{config}: expected a BERT with gelu, got {model} with {activation}")
        names = "num_hidden_layers", "num_attention_heads", "hidden_size", "layer_norm_eps"
        return cls(*(values[name] for name in names))


def read_safetensors(path: Path) -> Weights:
    """Read the float32 tensors of a file: the length of a JSON header (uint64), the header, the data."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    weights: Weights = {}
    for name, about in json.loads(data[8:end]).items():
        if about.get("dtype") == "F32":
            start, stop = (end + offset for offset in about["data_offsets"])
            weights[name] = np.frombuffer(data[start:stop], "<f4").reshape(about["shape"])
    return weights


class Graph:
    """Builder of the ONNX graph, with its nodes and weights."""

    def __init__(self, shape: Shape, weights: Weights) -> None:
        self._shape, self._weights = shape, weights
        self._nodes: list[onnx.NodeProto] = []
        self._kept: dict[str, onnx.TensorProto] = {}

    def model(self) -> onnx.ModelProto:
        """Build the encoder: `input_ids`, `attention_mask` INT64 [batch, length] to `token_embeddings` FP32."""
        x = self._embeddings()
        masked = self._add("Cast", ["attention_mask"], to=TensorProto.FLOAT)
        masked = self._add("Sub", [masked, self._keep("one", np.float32(1))])
        masked = self._add("Mul", [masked, self._keep("far", np.float32(1e9))])
        masked = self._add("Unsqueeze", [masked, self._keep("axes", np.array([1, 2]))])
        for number in range(self._shape.layers):
            layer = f"encoder.layer.{number}"
            x = self._added(x, self._attention(x, masked, f"{layer}.attention.self"), f"{layer}.attention.output")
            inner = self._add("Gelu", [self._dense(x, f"{layer}.intermediate.dense")])
            x = self._added(x, inner, f"{layer}.output")
        self._nodes.append(helper.make_node("Identity", [x], ["token_embeddings"]))
        size = ["batch", "length"]
        inputs = [
            helper.make_tensor_value_info(name, TensorProto.INT64, size) for name in ("input_ids", "attention_mask")
        ]
        output = helper.make_tensor_value_info("token_embeddings", TensorProto.FLOAT, [*size, self._shape.width])
        graph = helper.make_graph(self._nodes, "bert", inputs, [output], list(self._kept.values()))
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)

    def _embeddings(self) -> str:
        words = self._add("Gather", [self._weight("embeddings.word_embeddings.weight"), "input_ids"])
        # An input is one text, so every token has type 0. Its embedding is added to the position embeddings here.
        positions = self._weights["embeddings.position_embeddings.weight"]
        types = self._weights["embeddings.token_type_embeddings.weight"]
        length = self._add("Shape", ["input_ids"], start=1, end=2)
        zero = self._keep("zero", np.array([0]))
        used = self._add("Slice", [self._keep("positions", positions + types[0]), zero, length, zero])
        return self._normalised(self._add("Add", [words, used]), "embeddings.LayerNorm")

    def _attention(self, x: str, masked: str, name: str) -> str:
        heads, size = self._shape.heads, self._shape.width // self._shape.heads
        scale = np.float32(1 / math.sqrt(size))
        parts = [(f"{name}.{part}", scale if part == "query" else np.float32(1)) for part in ("query", "key", "value")]
        weight = np.concatenate([self._weights[f"{part}.weight"].T * by for part, by in parts], 1)
        bias = np.concatenate([self._weights[f"{part}.bias"] * by for part, by in parts])
        joined = self._add("MatMul", [x, self._keep(f"{name}.weight", weight)])
        joined = self._add("Add", [joined, self._keep(f"{name}.bias", bias)])
        apart = self._keep("apart", np.array([0, 0, 3, heads, size]))
        turned = self._add("Transpose", [self._add("Reshape", [joined, apart])], perm=[2, 0, 3, 1, 4])
        query, key, value = (
            self._add("Gather", [turned, self._keep(f"part{n}", np.int64(n))], axis=0) for n in range(3)
        )
        scores = self._add("MatMul", [query, self._add("Transpose", [key], perm=[0, 1, 3, 2])])
        shares = self._add("Softmax", [self._add("Add", [scores, masked])], axis=-1)
        seen = self._add("Transpose", [self._add("MatMul", [shares, value])], perm=[0, 2, 1, 3])
        return self._add("Reshape", [seen, self._keep("together", np.array([0, 0, self._shape.width]))])

    def _added(self, x: str, y: str, name: str) -> str:
        return self._normalised(self._add("Add", [x, self._dense(y, f"{name}.dense")]), f"{name}.LayerNorm")

    def _dense(self, x: str, name: str) -> str:
        product = self._add("MatMul", [x, self._keep(f"{name}.weight", self._weights[f"{name}.weight"].T)])
        return self._add("Add", [product, self._weight(f"{name}.bias")])

    def _normalised(self, x: str, name: str) -> str:
        inputs = [x, self._weight(f"{name}.weight"), self._weight(f"{name}.bias")]
        return self._add("LayerNormalization", inputs, axis=-1, epsilon=self._shape.epsilon)

    def _weight(self, name: str) -> str:
        return self._keep(name, self._weights[name])

    def _keep(self, name: str, value: Any) -> str:
        if name not in self._kept:
            self._kept[name] = numpy_helper.from_array(np.ascontiguousarray(value).reshape(np.shape(value)), name)
        return name

    def _add(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        output = f"{kind}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output
