"""`direct` strategy: decides whether the steps that wait in an instance's slots run now. Pure.

slot   0: step   1: -   2: step   3: free       utilization 2 of 4: enough, or wait for 1 and 3
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from collections.abc import Sequence as Several

from services.infer.scheduling.batcher import NOTHING, Wait
from services.infer.sequences.oldest import Chosen
from services.infer.sequences.settings import SequenceSettings
from services.infer.sequences.step import SequenceStep


def decide(
    heads: Several[SequenceStep], now: float, settings: SequenceSettings, key: Callable[[SequenceStep], Hashable]
) -> Chosen | Wait:
    """Decide about the steps that may run.

    Steps that cannot be stacked with the first to arrive wait for the next batch.
    """
    if not heads:
        return NOTHING
    first = min(heads, key=lambda step: step.arrived)
    fired = "slots"
    if settings.policy.delay_s and settings.utilization and len(heads) < settings.utilization * settings.slots:
        due = first.arrived + settings.policy.delay_s
        if now < due:
            return Wait(due)
        fired = "delay"
    group_key = key(first)
    return Chosen([step for step in heads if key(step) == group_key], fired)
