"""Models that run code or read the server's files need the operator's permission; others do not."""

from __future__ import annotations

import pytest

from services.infer.loading import model_config, privileges
from services.infer.model_process.python_runtime import IsolatedOnnxRuntime, PythonRuntime
from services.infer.operators.kernels_runtime import KernelsRuntime
from services.infer.remote.remote_runtime import RemoteRuntime
from services.infer.runtimes.onnx_runtime import OnnxRuntime
from shoal.errors import FailedPrecondition

ONNX, REMOTE = OnnxRuntime(), RemoteRuntime({})


def parameter(key: str, value: str) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'


def accelerator(kind: str, name: str, key: str, value: str) -> str:
    given = f'{{ name: "{name}" parameters {{ key: "{key}" value: "{value}" }} }}'
    return f"optimization {{ execution_accelerators {{ {kind}_execution_accelerator: {given} }} }}"


@pytest.mark.parametrize(
    ("runtime", "text", "named"),
    [
        (PythonRuntime(), "", "backend 'python' runs code"),
        (PythonRuntime(), parameter("isolation", "none"), "backend 'python' runs code"),
        (REMOTE, parameter("metadata.x", "Bearer ${env:AWS_SECRET}"), "'metadata.x' reads a variable or file"),
        (REMOTE, parameter("metadata.x", "${file:/etc/passwd}"), "'metadata.x' reads a variable or file"),
        (REMOTE, parameter("ca_file", "ca.pem"), "'ca_file' reads a file"),
        (REMOTE, parameter("client_key_file", "/run/key.pem"), "'client_key_file' reads a file"),
        (REMOTE, parameter("client_certificate_file", "c.pem"), "'client_certificate_file' reads a file"),
        (ONNX, parameter("session.collect_node_memory_stats_to_file", "/home/x"), "names a file of this server"),
        (IsolatedOnnxRuntime(), parameter("session.node_partition_config_file", "../x"), "names a file"),
        (ONNX, accelerator("gpu", "tensorrt", "trt_extra_plugin_lib_paths", "/tmp/x.so"), "names a file"),
        (ONNX, accelerator("cpu", "openvino", "cache_dir", "/home"), "names a file"),
        (ONNX, accelerator("gpu", "cuda", "gpu_external_alloc", "140737488355328"), "is an address"),
        (ONNX, accelerator("gpu", "cuda", "user_compute_stream", "140737488355328"), "is an address"),
    ],
)
def test_a_model_that_needs_permission_is_rejected_by_name(runtime, text, named):
    with pytest.raises(FailedPrecondition, match=named) as caught:
        privileges.check(model_config.parse(text), runtime)
    assert "--allow-code" in caught.value.message
    assert "passwd" not in caught.value.message


@pytest.mark.parametrize(
    ("runtime", "text"),
    [
        (ONNX, parameter("session.intra_op.allow_spinning", "0")),
        (ONNX, parameter("note", "see docs/models.md") + parameter("metadata.x", "${env:HOME}")),
        (ONNX, accelerator("gpu", "tensorrt", "trt_fp16_enable", "1")),
        (IsolatedOnnxRuntime(), parameter("isolation", "process")),
        (KernelsRuntime(), parameter("operation", "softmax_topk")),
        (REMOTE, parameter("url", "grpc://far:8001") + parameter("metadata.x", "constant") + parameter("ca_file", "")),
    ],
)
def test_a_model_that_only_computes_or_calls_needs_no_permission(runtime, text):
    privileges.check(model_config.parse(text), runtime)
