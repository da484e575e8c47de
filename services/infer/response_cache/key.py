"""What makes two requests the same for a response cache: a SHA-256 over everything that the answer may depend on.

    seed (the model)  |  inputs: name, datatype, shape  |  outputs: name, classes  |  parameters  |  the inputs' bytes

The header says how long the rest is, and the header's own length comes before it: no two different requests give the
same bytes to the digest. SHA-256 because processors compute it (1.5 GB/s here; BLAKE2 0.6), and because callers choose
the inputs: with a weaker digest one could make another's answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from services.infer.requests import ragged
from services.infer.requests.ragged import Value
from services.infer.requests.request import InferenceRequest
from services.infer.requests.signature import Signature
from shoal.inference.v2.inference_pb2 import InferParameter
from shoal.inference.v2.model_config_pb2 import ModelConfig
from shoal.oip.tensors import pack_bytes

_OF_SERVING = ("timeout", "priority", "explain")
_OF_SERVING_PREFIXES = ("triton_", "binary_data")
# Parameters that say how to serve, and not what to compute: requests that differ only in them have one answer.


class ResponseKeys:
    """Makes the keys of one loaded model version."""

    def __init__(self, model: str, version: int, digest: str, config: ModelConfig, signature: Signature) -> None:
        """`digest` says what the version is made of."""
        about = (model, version, digest, config.SerializeToString(deterministic=True))
        self._seeded = hashlib.sha256(repr(about).encode("utf-8", "surrogatepass"))
        self._datatypes = {spec.name: spec.datatype.name for spec in signature.inputs}

    def key(self, call: InferenceRequest, parameters: Mapping[str, InferParameter]) -> bytes:
        """The key of `call`; `parameters` are those of its request, as they came."""
        inputs = sorted(call.inputs.items())
        header = repr(
            (
                [(name, self._datatypes.get(name), isinstance(value, list), _form(value)) for name, value in inputs],
                [(output.spec.name, output.classes) for output in call.outputs],
                _seen_by_model(parameters) if parameters else [],
            )
        ).encode("utf-8", "surrogatepass")
        digest = self._seeded.copy()
        digest.update(len(header).to_bytes(8, "little"))
        digest.update(header)
        for tensor in (tensor for _, value in inputs for tensor in ragged.arrays(value)):
            if tensor.dtype == object:
                # Every element with its length.
                digest.update(pack_bytes(tensor.reshape(-1).tolist()))
            else:
                digest.update(np.ascontiguousarray(tensor).data)
        return digest.digest()


def _form(value: Value) -> list[tuple[str, tuple[int, ...]]]:
    """The dtype and shape of each of its arrays; of a ragged value's rows, one by one."""
    return [(tensor.dtype.str, tensor.shape) for tensor in ragged.arrays(value)]


def _seen_by_model(parameters: Mapping[str, InferParameter]) -> list[tuple[str, bytes]]:
    return [
        (name, parameters[name].SerializeToString())
        for name in sorted(parameters)
        if name not in _OF_SERVING and not name.startswith(_OF_SERVING_PREFIXES)
    ]
