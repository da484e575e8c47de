"""`oldest` strategy: decides whether steps of an instance's sequences run now, the oldest first. Pure."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from collections.abc import Sequence as Several
from dataclasses import dataclass

from services.infer.scheduling import batcher
from services.infer.scheduling.batcher import NOTHING, Wait
from services.infer.scheduling.output_sizes import OutputSizes
from services.infer.sequences.settings import SequenceSettings
from services.infer.sequences.step import SequenceStep


@dataclass(frozen=True)
class Chosen:
    """Steps to run as one, now."""

    steps: list[SequenceStep]
    fired: str
    """Reason for running now, in one word."""


def decide(
    heads: Several[SequenceStep],
    now: float,
    settings: SequenceSettings,
    key: Callable[[SequenceStep], Hashable],
    outputs: OutputSizes,
) -> Chosen | Wait:
    """Decide about the steps that may run, as for a model's batches without sequences. `outputs` bound a batch, too."""
    if not heads:
        return NOTHING
    in_order = sorted(heads, key=lambda step: step.arrived)
    group_key = key(in_order[0])
    front = [step for step in in_order if key(step) == group_key]
    most = _most(front, settings, outputs)
    if not settings.policy.is_static:
        return Chosen(front[:most], "full" if len(front) >= most else "idle")
    oldest = in_order[0].arrived
    decision = batcher.decide(front[:most], oldest, now, settings.policy, is_full=len(front) >= most)
    return decision if isinstance(decision, Wait) else Chosen(front[: decision.count], decision.fired)


def choose_now(
    heads: Several[SequenceStep],
    settings: SequenceSettings,
    key: Callable[[SequenceStep], Hashable],
    outputs: OutputSizes,
) -> Chosen | Wait:
    """Return the same without waiting, when no further step will arrive."""
    if not heads:
        return NOTHING
    in_order = sorted(heads, key=lambda step: step.arrived)
    front = [step for step in in_order if key(step) == key(in_order[0])]
    return Chosen(front[: _most(front, settings, outputs)], "closing")


def _most(front: Several[SequenceStep], settings: SequenceSettings, outputs: OutputSizes) -> int:
    return min(settings.policy.max_rows, outputs.max_rows(front[0].request.key))
