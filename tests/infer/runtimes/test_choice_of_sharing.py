"""Which models several infer processes share: those that ask for it, and those on a GPU. (No GPU is needed here.)"""

from __future__ import annotations

from pathlib import Path

import pytest

from services.infer.model_process.python_runtime import IsolatedOnnxRuntime
from services.infer.runtimes import choice
from services.infer.runtimes.choice import Runtimes
from services.infer.runtimes.onnx_devices import CUDA, resolve_devices
from services.infer.runtimes.onnx_runtime import OnnxRuntime
from shoal.errors import FailedPrecondition
from shoal.inference.v2 import model_config_pb2 as pb

PLAIN, APART, ON_GPUS = OnnxRuntime(), IsolatedOnnxRuntime(), IsolatedOnnxRuntime(isolation="shared")
AUTO, CPU, GPU = (pb.ModelInstanceGroup.Kind.Value(f"KIND_{kind}") for kind in ("AUTO", "CPU", "GPU"))


def chosen(kind: int, isolation: str = "", *, several: bool = True) -> object:
    config = pb.ModelConfig(instance_group=[{"kind": kind}])
    if isolation:
        config.parameters["isolation"].string_value = isolation
    return Runtimes([PLAIN], APART, ON_GPUS if several else None).of(config, Path("nowhere"))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ONNX Runtime with CUDA sees a machine with two GPUs."""
    providers = [CUDA, "CPUExecutionProvider"]
    monkeypatch.setattr(choice, "devices", lambda options: resolve_devices(options, providers, lambda: 2))


def test_a_gpu_model_is_shared_by_several_infer_processes(gpus):
    assert (chosen(GPU), chosen(AUTO), chosen(CPU)) == (ON_GPUS, ON_GPUS, PLAIN)


def test_a_single_infer_process_does_not_share_a_gpu_model(gpus):
    assert (chosen(GPU, several=False), chosen(AUTO, several=False)) == (PLAIN, PLAIN)


def test_the_isolation_parameter_has_precedence(gpus):
    assert (chosen(GPU, "none"), chosen(CPU, "shared"), chosen(CPU, "process")) == (PLAIN, APART, APART)


def test_without_a_gpu_models_are_not_shared_by_default():
    assert (chosen(AUTO), chosen(CPU)) == (PLAIN, PLAIN)
    assert chosen(GPU) is PLAIN  # Which refuses it, and says why.


def test_a_parameter_of_model_processes_is_rejected_without_isolation(gpus):
    config = pb.ModelConfig(instance_group=[{"kind": GPU}], parameters={"load_timeout_ms": {"string_value": "5"}})
    with pytest.raises(FailedPrecondition, match="needs parameter isolation 'process' or 'shared'"):
        Runtimes([PLAIN], APART, ON_GPUS).of(config, Path("nowhere"))
