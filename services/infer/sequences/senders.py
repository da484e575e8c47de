"""Queued steps by tenant and sender: at a bound, the newest steps of the one with the most give way. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

from services.infer.requests.request import InferenceRequest
from services.infer.sequences.step import SequenceStep


@dataclass(slots=True)
class _Load:
    """The queued steps of one sender, in order of arrival."""

    steps: dict[SequenceStep, None] = field(default_factory=dict)
    size_bytes: int = 0


class Senders:
    """The senders of the steps that wait for one model version."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        """`weights`: shares by tenant; 1 for tenants without an entry."""
        self._weights = weights
        self._loads: dict[tuple[str, Hashable], _Load] = {}

    def add(self, step: SequenceStep, tenant: str) -> None:
        step.sender = tenant, step.request.memory.sender
        load = self._loads.setdefault(step.sender, _Load())
        load.steps[step] = None
        load.size_bytes += step.request.size_bytes

    def remove(self, step: SequenceStep) -> None:
        load = self._loads[step.sender]
        del load.steps[step]
        load.size_bytes -= step.request.size_bytes
        if not load.steps:
            del self._loads[step.sender]

    def victims(self, request: InferenceRequest, tenant: str, *, calls: int, size_bytes: int) -> list[SequenceStep]:
        """Return the steps that give way to `request`: `calls` of them, with `size_bytes`. None: it is rejected itself.

        All are of one sender. It is of the tenant with the most, or of the request's own tenant when none has more.
        """
        in_bytes = size_bytes > 0
        by_sender = {sender: load.size_bytes if in_bytes else len(load.steps) for sender, load in self._loads.items()}
        by_tenant: dict[str, float] = {}
        for (name, _), units in by_sender.items():
            by_tenant[name] = by_tenant.get(name, 0.0) + units / self._weight(name)
        own = request.size_bytes if in_bytes else 1
        heaviest = max(by_tenant, key=by_tenant.__getitem__, default=tenant)
        after = by_tenant.get(tenant, 0.0) + own / self._weight(tenant)
        if by_tenant.get(heaviest, 0.0) <= after:
            heaviest = tenant
        sender = max((each for each in by_sender if each[0] == heaviest), key=by_sender.__getitem__, default=None)
        if sender is None:
            return []
        if heaviest == tenant:
            spare = float(by_sender[sender] - by_sender.get((tenant, request.memory.sender), 0) - own)
        else:
            spare = (by_tenant[heaviest] - after) * self._weight(heaviest)
        victims: list[SequenceStep] = []
        for step in reversed(self._loads[sender].steps):
            # Only while the sender holds more: else two would evict each other for ever.
            if spare <= 0 or (calls <= 0 and size_bytes <= 0):
                break
            victims.append(step)
            spare -= step.request.size_bytes if in_bytes else 1
            calls -= 1
            size_bytes -= step.request.size_bytes
        return victims if calls <= 0 and size_bytes <= 0 else []

    def _weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)
