"""Mapping of a configuration's placements to the devices of this machine, as a pure function."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from services.infer.runtimes.runtime import ExecutionPlacement, Provider, SessionOptions
from shoal.errors import FailedPrecondition

CUDA, TENSORRT, OPENVINO = "CUDAExecutionProvider", "TensorrtExecutionProvider", "OpenVINOExecutionProvider"
_CPU = "CPUExecutionProvider"


@dataclass(frozen=True)
class Device:
    """Device of one session: the CPU or one GPU, with its execution providers."""

    providers: Sequence[tuple[str, Mapping[str, str]]]
    """In ONNX Runtime's form and order: the first is preferred, the CPU is last."""
    gpu: int | None = None
    """The GPU's number; None: the CPU."""

    def with_option(self, provider: str, key: str, value: str) -> Device:
        """Return the device with one more option of `provider`.

        Raises:
            FailedPrecondition: `provider` is not the preferred one.
        """
        (first, options), *others = self.providers
        if first != provider:
            raise FailedPrecondition(f"parameter gpu_stream 'shared' is for {provider}, not for {first}: use 'own'")
        return replace(self, providers=[(first, {**options, key: value}), *others])

    @property
    def names(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.providers)

    @property
    def is_cpu_alone(self) -> bool:
        """True without an accelerator."""
        return self.names == {_CPU}


def resolve_devices(
    options: SessionOptions, available: Collection[str], count_gpus: Callable[[], int]
) -> list[tuple[Device, int]]:
    """Return the devices, each once, with its number of concurrent executions.

    Args:
        available: the providers of this build of ONNX Runtime.
        count_gpus: returns the number of GPUs; called only for placements that may use one.

    Raises:
        FailedPrecondition: a requested provider or GPU is missing; the message names it.
    """
    for provider in (*options.gpu_providers, *options.cpu_providers):
        if provider.provider not in available:
            raise FailedPrecondition(
                f"accelerator '{provider.name}' is not supported by this ONNX Runtime: it needs {provider.provider}, "
                f"and it has {_listed(available)}"
            )
    counts: dict[int | None, int] = {}
    for placement in options.placements:
        for gpu in _gpus(placement, available, count_gpus):
            counts[gpu] = counts.get(gpu, 0) + placement.runs
    _check_use(options, counts)
    return [(_device(options, gpu), count) for gpu, count in counts.items()]


def _gpus(
    placement: ExecutionPlacement, available: Collection[str], count_gpus: Callable[[], int]
) -> Iterator[int | None]:
    """Yield the GPUs of a placement; None for the CPU."""
    if placement.kind == "cpu" or (placement.kind == "auto" and (CUDA not in available or not count_gpus())):
        yield None
        return
    if CUDA not in available:
        raise FailedPrecondition(
            f"instance_group: KIND_GPU is not supported by this ONNX Runtime: it needs {CUDA}, and it has "
            f"{_listed(available)}; use KIND_CPU, or a build for GPUs"
        )
    count = count_gpus()
    if not count or (placement.gpu is not None and not 0 <= placement.gpu < count):
        problem = "KIND_GPU needs a GPU" if placement.gpu is None else f"GPU {placement.gpu} does not exist"
        raise FailedPrecondition(f"instance_group: {problem}: this process may use {count} GPUs")
    yield from range(count) if placement.gpu is None else (placement.gpu,)


def _check_use(options: SessionOptions, counts: Collection[int | None]) -> None:
    if options.gpu_providers and all(gpu is None for gpu in counts):
        names = " and ".join(f"'{provider.name}'" for provider in options.gpu_providers)
        raise FailedPrecondition(f"{names} is for GPUs, and no instance_group has one: use KIND_GPU, or leave it out")
    if options.cpu_providers and None not in counts:
        raise FailedPrecondition("cpu_execution_accelerator: no instance_group is on the CPU: leave it out")


def _device(options: SessionOptions, gpu: int | None) -> Device:
    if gpu is None:
        return Device([*((p.provider, p.options) for p in options.cpu_providers), (_CPU, {})])
    providers = options.gpu_providers or (Provider("cuda", CUDA, {}),)
    return Device([*((p.provider, {**p.options, "device_id": str(gpu)}) for p in providers), (_CPU, {})], gpu)


def _listed(available: Collection[str]) -> str:
    return ", ".join(name.removesuffix("ExecutionProvider") for name in available)
