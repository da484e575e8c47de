"""Choice of the tensors that stay on a GPU between two steps: all their consumers run on the producer's GPU. Pure.

step on GPU 0 ──> tensor ──> step on GPU 0, step on GPU 0        stays on the GPU
                        └──> condition, output, step elsewhere   is copied to the host
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from services.infer.ensembles.other_models import StepVersion
from services.infer.ensembles.plan import PlannedStep
from services.infer.runtimes.gpu_stream import GpuStream


def resident_slots(
    steps: Sequence[PlannedStep],
    consumers: Sequence[Sequence[int]],
    producers: Sequence[Sequence[int]],
    outputs: Collection[int],
) -> frozenset[int]:
    """Return the slots of the tensors that stay on a GPU.

    Args:
        consumers, producers: indices of steps, by slot.
        outputs: slots of the ensemble's outputs.
    """
    streams = [_stream(step) for step in steps]
    compared = {slot for step in steps for slot in step.condition_slots.values()}
    resident = []
    for slot, (users, makers) in enumerate(zip(consumers, producers, strict=True)):
        if len(makers) != 1 or not users or slot in outputs or slot in compared:
            continue
        stream = streams[makers[0]]
        same_gpu = stream is not None and all(streams[n] is stream for n in users)
        if same_gpu and _are_dense(steps, users, makers[0], slot):
            resident.append(slot)
    return frozenset(resident)


def _stream(step: PlannedStep) -> GpuStream | None:
    """Return the GPU stream of a step's tensors; None for a step on the host, with row calls, cache or sequences."""
    version: StepVersion = step.version
    if step.step.each or version.response_cache is not None or version.loaded.sequences is not None:
        return None
    session = version.loaded.session
    return session.gpu_stream if session is not None else None


def _are_dense(steps: Sequence[PlannedStep], users: Sequence[int], maker: int, slot: int) -> bool:
    """Return True when the tensor is neither ragged nor BYTES: only such tensors can stay."""
    specs = [feed.spec for n in users for feed in steps[n].feeds if feed.slot == slot]
    step = steps[maker]
    specs += [output.spec for output, at in zip(step.outputs, step.output_slots, strict=True) if at == slot]
    return not any(spec.is_ragged or spec.datatype.is_bytes for spec in specs)
