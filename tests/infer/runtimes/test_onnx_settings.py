"""Triton's words for ONNX Runtime: what they come to, what is refused by name, on which devices a model runs."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from services.infer.loading import model_config
from services.infer.runtimes.multi_device import MultiDeviceSession
from services.infer.runtimes.onnx_devices import CUDA, OPENVINO, TENSORRT, Device, resolve_devices
from services.infer.runtimes.onnx_settings import session_options
from services.infer.runtimes.runtime import ExecutionPlacement, Provider, Session, SessionOptions
from shoal.errors import FailedPrecondition
from shoal.inference.v2 import inference_pb2 as pb
from tests.infer import onnx_files
from tests.infer.conftest import Repository, floats, output, request

CPU = "CPUExecutionProvider"
ALL = (TENSORRT, CUDA, OPENVINO, CPU)


def options(text: str, threads: int = 2) -> SessionOptions:
    return session_options(model_config.parse(text), threads)


def parameter(key: str, value: str) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'


def devices(text: str, available=ALL, gpus: int = 2) -> list[tuple[int | None, tuple[str, ...], int]]:
    found = resolve_devices(options(text), available, lambda: gpus)
    return [(device.gpu, tuple(name for name, _ in device.providers), count) for device, count in found]


def test_the_defaults():
    assert options("") == SessionOptions(2, placements=(ExecutionPlacement("auto"),))


def test_all_settings_are_applied():
    said = options(
        parameter("intra_op_thread_count", "3")
        + parameter("inter_op_thread_count", "4")
        + parameter("execution_mode", "1")
        + parameter("enable_mem_arena", "0")
        + parameter("enable_mem_pattern", "false")
        + parameter("memory.enable_memory_arena_shrinkage", "cpu:0")
        + parameter("session.set_denormal_as_zero", "1")
        + parameter("mine", "x")
        + "optimization { graph { level: 1 } }"
    )
    assert (said.intra_op_threads, said.inter_op_threads, said.is_parallel) == (3, 4, True)
    assert (said.has_arena, said.has_pattern, said.graph_level) == (False, False, 1)
    assert said.entries == {"session.set_denormal_as_zero": "1"}
    assert said.run_entries == {"memory.enable_memory_arena_shrinkage": "cpu:0"}
    sequential = options(parameter("inter_op_thread_count", "4") + parameter("execution_mode", "0"))
    assert (sequential.is_parallel, sequential.inter_op_threads) == (False, 4)
    assert options(parameter("inter_op_thread_count", "4")).is_parallel
    assert options(parameter("execution_mode", "1")).inter_op_threads == 2


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (parameter("intra_op_thread_count", "-1"), "intra_op_thread_count"),
        (parameter("inter_op_thread_count", "x"), "inter_op_thread_count"),
        (parameter("execution_mode", "2"), "execution_mode '2'"),
        (parameter("enable_mem_arena", "maybe"), "enable_mem_arena 'maybe'"),
        (parameter("enable_mem_pattern", ""), "enable_mem_pattern"),
        ("optimization { graph { level: 3 } }", "graph.level 3"),
        ("instance_group [{ kind: KIND_MODEL }]", "KIND_MODEL is not supported"),
        ("instance_group [{ kind: KIND_CPU gpus: [0] }]", r"KIND_CPU with gpus \[0\]"),
        ('optimization { execution_accelerators { gpu_execution_accelerator { name: "x" } } }', "'x' is not supported"),
        ('optimization { execution_accelerators { cpu_execution_accelerator { name: "y" } } }', "'y' is not supported"),
        (
            'optimization { execution_accelerators { gpu_execution_accelerator { name: "tensorrt" '
            'parameters { key: "precision_mode" value: "FP1" } } } }',
            "precision_mode 'FP1'",
        ),
        (
            'optimization { execution_accelerators { gpu_execution_accelerator { name: "tensorrt" '
            'parameters { key: "nonsense" value: "1" } } } }',
            "parameter 'nonsense' is not supported",
        ),
    ],
)
def test_an_invalid_value_is_named(text, named):
    with pytest.raises(FailedPrecondition, match=named):
        options(text)


ACCELERATED = """
optimization { execution_accelerators { gpu_execution_accelerator [
  { name: "tensorrt" parameters { key: "precision_mode" value: "FP16" }
    parameters { key: "max_workspace_size_bytes" value: "1000" } parameters { key: "trt_dla_core" value: "1" } },
  { name: "cuda" parameters { key: "use_tf32" value: "0" } }
] } }
"""


def test_accelerators():
    asked = options(ACCELERATED + parameter("cudnn_conv_algo_search", "1") + parameter("gpu_mem_limit", "7"))
    trt = {"trt_fp16_enable": "1", "trt_max_workspace_size": "1000", "trt_dla_core": "1"}
    cuda = {"cudnn_conv_algo_search": "HEURISTIC", "gpu_mem_limit": "7", "use_tf32": "0"}
    assert asked.gpu_providers == (Provider("tensorrt", TENSORRT, trt), Provider("cuda", CUDA, cuda))
    found = resolve_devices(asked, ALL, lambda: 1)
    assert found == [
        (Device([(TENSORRT, {**trt, "device_id": "0"}), (CUDA, {**cuda, "device_id": "0"}), (CPU, {})], 0), 1)
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [(0, (CUDA, CPU), 1), (1, (CUDA, CPU), 1)]),
        ("instance_group [{ count: 3 }]", [(0, (CUDA, CPU), 3), (1, (CUDA, CPU), 3)]),
        ("instance_group [{ kind: KIND_CPU count: 2 }]", [(None, (CPU,), 2)]),
        ("instance_group [{ kind: KIND_GPU gpus: [1] count: 2 }]", [(1, (CUDA, CPU), 2)]),
        ("instance_group [{ gpus: [1] }]", [(1, (CUDA, CPU), 1)]),
        (
            "instance_group [{ kind: KIND_GPU gpus: [1] }, { kind: KIND_CPU }, { kind: KIND_GPU gpus: [1, 0] }]",
            [(1, (CUDA, CPU), 2), (None, (CPU,), 1), (0, (CUDA, CPU), 1)],
        ),
        (
            "instance_group [{ kind: KIND_CPU }] optimization { execution_accelerators { cpu_execution_accelerator "
            '{ name: "openvino" } } }',
            [(None, (OPENVINO, CPU), 1)],
        ),
    ],
)
def test_instance_groups_are_resolved_to_devices(text, expected):
    assert devices(text) == expected


def test_kind_auto_is_the_cpu_without_a_gpu():
    assert devices("", (CPU,)) == [(None, (CPU,), 1)]
    assert devices("", ALL, 0) == [(None, (CPU,), 1)]


@pytest.mark.parametrize(
    ("text", "available", "gpus", "named"),
    [
        ("instance_group [{ kind: KIND_GPU }]", (CPU,), 0, "KIND_GPU is not supported by this ONNX Runtime"),
        ("instance_group [{ kind: KIND_GPU }]", ALL, 0, "KIND_GPU needs a GPU"),
        ("instance_group [{ kind: KIND_GPU gpus: [2] }]", ALL, 2, "GPU 2 does not exist: this process may use 2"),
        ("instance_group [{ kind: KIND_GPU gpus: [-1] }]", ALL, 2, "GPU -1 does not exist"),
        (ACCELERATED, (CPU,), 0, "accelerator 'tensorrt' is not supported by this ONNX Runtime: it needs Tensorrt"),
        (ACCELERATED, (TENSORRT, CPU), 0, "accelerator 'cuda' is not supported"),
        (ACCELERATED + "instance_group [{ kind: KIND_CPU }]", ALL, 2, "'tensorrt' and 'cuda' is for GPUs"),
        (parameter("gpu_mem_limit", "1") + "instance_group [{ kind: KIND_CPU }]", ALL, 2, "'cuda' is for GPUs"),
        (
            'optimization { execution_accelerators { cpu_execution_accelerator { name: "openvino" } } }',
            (CPU,),
            0,
            "accelerator 'openvino' is not supported",
        ),
        (
            'optimization { execution_accelerators { cpu_execution_accelerator { name: "openvino" } } }',
            ALL,
            2,
            "no instance_group is on the CPU",
        ),
    ],
)
def test_a_missing_gpu_or_provider_is_rejected_by_name(text, available, gpus, named):
    with pytest.raises(FailedPrecondition, match=named):
        devices(text, available, gpus)


SETTINGS = {
    "arena": parameter("enable_mem_arena", "0"),
    "pattern": parameter("enable_mem_pattern", "0"),
    "parallel": parameter("execution_mode", "1"),
    "shrinking": parameter("memory.enable_memory_arena_shrinkage", "cpu:0"),
    "basic": "optimization { graph { level: -1 } }",
    "none": "optimization { graph { level: 2 } }",
    "two": "instance_group { count: 2 kind: KIND_CPU }",
}

REFUSED = {
    "gpu": ("instance_group { kind: KIND_GPU }", "KIND_GPU is not supported by this ONNX Runtime"),
    "tensorrt": (ACCELERATED, "accelerator 'tensorrt' is not supported by this ONNX Runtime: it needs Tensorrt"),
    "cuda": (parameter("gpu_mem_limit", "1000"), "accelerator 'cuda' is not supported"),
    "shrink": (parameter("memory.enable_memory_arena_shrinkage", "moon:0"), "moon"),
    "long": (parameter("session." + "x" * 5000, "1"), "ONNX Runtime cannot load model.onnx"),
    "threads": (parameter("intra_op_thread_count", "many"), "intra_op_thread_count 'many'"),
}


async def test_a_server_applies_the_settings_or_reports_why_not(serve, models_folder: Repository):
    for name, text in SETTINGS.items():
        models_folder.put(name, onnx_files.scale(2), config=text)
    for name, (text, _) in REFUSED.items():
        models_folder.put(name, onnx_files.scale(2), config=text)
    served = await serve(models_folder.root)
    reasons = {row.name: row.reason for row in served.models.index()}
    for name in SETTINGS:
        assert reasons[name] == ""
        response = await served.stub.ModelInfer(request(name, x=floats([1, 2, 3, 4])))
        assert output(response, "y").tolist() == [[2, 4, 6, 8]]
    for name, (_, named) in REFUSED.items():
        assert named in reasons[name]
    config = (await served.stub.ModelConfig(pb.ModelConfigRequest(name="two"))).config
    assert [(group.count, group.kind) for group in config.instance_group] == [(2, config.instance_group[0].KIND_CPU)]


class Counting(Session):
    """A session that says how many of its runs there are at the same time."""

    inputs = outputs = ()
    text = True

    def __init__(self) -> None:
        self.running = self.most = self.runs = 0
        self.is_closed = False
        self._lock = threading.Lock()

    def run(self, inputs, outputs):
        with self._lock:
            self.running, self.runs = self.running + 1, self.runs + 1
            self.most = max(self.most, self.running)
        time.sleep(0)
        with self._lock:
            self.running -= 1
        return [self]

    def close(self) -> None:
        self.is_closed = True


def test_runs_are_distributed_over_the_devices():
    first, second = Counting(), Counting()
    spread = MultiDeviceSession([(first, 1), (second, 3)])
    assert [spread.run({}, [])[0] for _ in range(4)] == [first, second, second, second]
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda _: spread.run({}, []), range(400)))
    assert first.most == 1
    assert second.most <= 3
    assert first.runs + second.runs == 404
    spread.close()
    assert first.is_closed
    assert second.is_closed
