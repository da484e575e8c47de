"""From the places where a configuration wants its model run to the devices that this machine has: a pure function."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from services.infer.runtimes.runtime import Provider, SessionOptions, TensorPlacement
from shoal.errors import FailedPrecondition

CUDA, TENSORRT, OPENVINO = "CUDAExecutionProvider", "TensorrtExecutionProvider", "OpenVINOExecutionProvider"
_CPU = "CPUExecutionProvider"


@dataclass(frozen=True)
class Device:
    """Where one session runs, and with what."""

    providers: Sequence[tuple[str, Mapping[str, str]]]
    """As ONNX Runtime takes them: the first is preferred, the CPU is last."""
    gpu: int | None = None

    def with_option(self, provider: str, key: str, value: str) -> Device:
        """The same with one more option of one provider. Raises FailedPrecondition when that is not the preferred."""
        (first, options), *others = self.providers
        if first != provider:
            raise FailedPrecondition(f"parameter gpu_stream 'shared' is for {provider}, not for {first}: use 'own'")
        return replace(self, providers=[(first, {**options, key: value}), *others])

    @property
    def names(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.providers)


def resolved(
    options: SessionOptions, available: Collection[str], count_gpus: Callable[[], int]
) -> list[tuple[Device, int]]:
    """The devices, each once, with the number of executions that may run there at the same time.

    Args:
        available: the providers of this build of ONNX Runtime.
        count_gpus: asked only when it matters.

    Raises:
        FailedPrecondition: what is wanted is not there; the message names it.
    """
    for provider in (*options.gpu_providers, *options.cpu_providers):
        if provider.provider not in available:
            raise FailedPrecondition(
                f"accelerator '{provider.name}' is not supported by this ONNX Runtime: it needs {provider.provider}, "
                f"and it has {_listed(available)}"
            )
    counts: dict[int | None, int] = {}
    for place in options.places:
        for gpu in _gpus(place, available, count_gpus):
            counts[gpu] = counts.get(gpu, 0) + place.runs
    _check_use(options, counts)
    return [(_device(options, gpu), count) for gpu, count in counts.items()]


def _gpus(place: TensorPlacement, available: Collection[str], count_gpus: Callable[[], int]) -> Iterator[int | None]:
    """The GPUs of a place; None for the CPU."""
    if place.kind == "cpu" or (place.kind == "auto" and (CUDA not in available or not count_gpus())):
        yield None
        return
    if CUDA not in available:
        raise FailedPrecondition(
            f"instance_group: KIND_GPU is not supported by this ONNX Runtime: it needs {CUDA}, and it has "
            f"{_listed(available)}; use KIND_CPU, or a build for GPUs"
        )
    there = count_gpus()
    if not there or (place.gpu is not None and not 0 <= place.gpu < there):
        which = "KIND_GPU" if place.gpu is None else f"GPU {place.gpu}"
        raise FailedPrecondition(f"instance_group: {which} is not there: this process may use {there} GPUs")
    yield from range(there) if place.gpu is None else (place.gpu,)


def _check_use(options: SessionOptions, counts: Collection[int | None]) -> None:
    if options.gpu_providers and all(gpu is None for gpu in counts):
        names = " and ".join(f"'{provider.name}'" for provider in options.gpu_providers)
        raise FailedPrecondition(f"{names} is for GPUs, and no instance_group has one: use KIND_GPU, or leave it out")
    if options.cpu_providers and None not in counts:
        raise FailedPrecondition("cpu_execution_accelerator: no instance_group is on the CPU: leave it out")


def _device(options: SessionOptions, gpu: int | None) -> Device:
    if gpu is None:
        return Device([*((p.provider, p.options) for p in options.cpu_providers), (_CPU, {})])
    given = options.gpu_providers or (Provider("cuda", CUDA, {}),)
    return Device([*((p.provider, {**p.options, "device_id": str(gpu)}) for p in given), (_CPU, {})], gpu)


def _listed(available: Collection[str]) -> str:
    return ", ".join(name.removesuffix("ExecutionProvider") for name in available)
