"""Which tensors stay on a GPU between two steps: those that only steps on the same GPU take, and nobody looks at. Pure.

step on GPU 0 ──> tensor ──> step on GPU 0, step on GPU 0        stays
                        └──> condition, output, step elsewhere   comes to the host
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from services.infer.ensembles.other_models import StepVersion
from services.infer.ensembles.plan import PlannedStep
from services.infer.runtimes.gpu_stream import GpuStream


def staying(
    steps: Sequence[PlannedStep],
    takers: Sequence[Sequence[int]],
    givers: Sequence[Sequence[int]],
    outputs: Collection[int],
) -> frozenset[int]:
    """The places of the tensors that stay.

    Args:
        takers, givers: steps by place.
        outputs: places of what the ensemble answers.
    """
    lanes = [_lane(step) for step in steps]
    looked_at = {place for step in steps for place in step.looks_at.values()}
    found = []
    for place, (taking, giving) in enumerate(zip(takers, givers, strict=True)):
        if len(giving) != 1 or not taking or place in outputs or place in looked_at:
            continue
        there = lanes[giving[0]]
        if there is not None and all(lanes[n] is there for n in taking) and _are_dense(steps, taking, giving[0], place):
            found.append(place)
    return frozenset(found)


def _lane(step: PlannedStep) -> GpuStream | None:
    """Where a step takes tensors and leaves them: not where its model is called for each row, or answers are kept."""
    version: StepVersion = step.version
    if step.step.each or version.response_cache is not None or version.loaded.sequences is not None:
        return None
    session = version.loaded.session
    return session.gpu_stream if session is not None else None


def _are_dense(steps: Sequence[PlannedStep], taking: Sequence[int], giving: int, place: int) -> bool:
    """Only tensors stay: no rows of several shapes, and no BYTES."""
    specs = [feed.spec for n in taking for feed in steps[n].feeds if feed.place == place]
    step = steps[giving]
    specs += [wanted.spec for wanted, at in zip(step.wanted, step.places, strict=True) if at == place]
    return not any(spec.is_ragged or spec.datatype.is_bytes for spec in specs)
