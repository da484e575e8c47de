"""Table of a model's sequences: which of them hold a slot, and which steps may run. Pure: no clock and no event loop.

    add ──> known? ──> its slot, behind its own steps             free slot ──> next of the backlog, fair among tenants
              └── START: a new sequence ──> a free slot | backlog

A sequence begins when a step with START has run. It ends when a step with END has run, when it was idle for too long,
or when its instance lost it. Steps of one sequence run one at a time, in order of arrival. A START that fails begins
nothing, and the steps behind it are rejected: no step ever finds another state than its predecessor left.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Collection, Hashable, Iterator, Mapping

from mesh.h2.memory_account import MemoryAccount, Share, TenantShares
from services.infer.requests.request import InferenceRequest
from services.infer.requests.tensors import Tensor
from services.infer.scheduling.deadline_heap import DeadlineHeap
from services.infer.scheduling.senders import Senders
from services.infer.sequences.rows import SequenceId
from services.infer.sequences.step import Sequence, SequenceSlot, SequenceStep

STATE_BYTES = 512 << 20
"""Default limit for the states of all sequences of a process. One tenant gets two thirds."""


class UnknownSequence(Exception):
    """A step without START belongs to a sequence that is not (or no longer) known."""


class SequenceTable:
    """The sequences of one model version."""

    def __init__(
        self,
        instances: int,
        slots: int,
        idle_s: float,
        weights: Mapping[str, float] | None = None,
        first_shapes: Hashable = (),
        memory: TenantShares | None = None,
    ) -> None:
        """Start without sequences.

        Args:
            slots: sequences at a time in one instance.
            weights: shares by tenant, of sequences that wait for a slot.
            first_shapes: shapes of the initial states.
            memory: account of the states, by tenant; None: one of this table alone.
        """
        self.assigned: list[dict[Sequence, None]] = [{} for _ in range(instances)]
        """By instance: the sequences that hold a slot in it."""
        # The assigned sequences with a step that may run: thousands may hold a slot and wait for their clients.
        self._ready: list[dict[Sequence, None]] = [{} for _ in range(instances)]
        # Heaps of free slots: the lowest is assigned first, so that batches stay dense.
        self._free_slots = [list(range(slots)) for _ in range(instances)]
        self._idle_s = idle_s
        self._first_shapes = first_shapes
        self._weights = weights or {}
        self._memory = memory or TenantShares(MemoryAccount(STATE_BYTES))
        # By owner and id: a tenant that uses the id of another's sequence has one of its own.
        self._known: dict[tuple[str, SequenceId], Sequence] = {}
        # By tenant, because a free slot is given for each of thousands that wait: the sequences, with their order.
        self._backlog: dict[str, dict[Sequence, int]] = {}
        self._numbers = itertools.count()
        # In order of time, since all sequences may be idle for equally long.
        self._idle: dict[Sequence, float] = {}
        self._held_by_tenant: dict[str, int] = {}
        self._expiry: DeadlineHeap[SequenceStep] = DeadlineHeap()
        self.senders: Senders[SequenceStep] = Senders(self._weights)
        """Senders of the queued steps."""
        self.waiting = 0
        """Number of queued steps."""
        self.waiting_bytes = 0

    def __len__(self) -> int:
        return len(self._known)

    def add(self, step: SequenceStep, tenant: str) -> None:
        """Add a step behind those of its sequence. Raises UnknownSequence."""
        # A model that calls another one may run requests of several tenants at once: its sequences are no tenant's.
        owner = tenant if step.request.parameters.inner_call is None else ""
        sequence = self._known.get((owner, step.id))
        if not step.starts and (sequence is None or not sequence.is_open):
            raise UnknownSequence
        if sequence is None:
            sequence = self._known[owner, step.id] = Sequence(step.id, owner, tenant)
        step.sequence = sequence
        sequence.waiting.append(step)
        step.is_waiting = True
        self.waiting += 1
        self.waiting_bytes += step.request.size_bytes
        self.senders.add(step, tenant)
        self._idle.pop(sequence, None)
        if step.expires != math.inf:
            self._expiry.add(step.expires, step)
        if sequence.position is None:
            self._queue(sequence)
            self._assign_slots()
        else:
            self._update_ready(sequence)

    def holds(self, request: InferenceRequest) -> bool:
        """Return True when a step with exactly this request waits here."""
        return any(step.request is request for sequence in self._known.values() for step in sequence.waiting)

    def waiting_steps(self) -> list[SequenceStep]:
        """Return all queued steps."""
        return [step for sequence in self._known.values() for step in sequence.waiting if step.is_waiting]

    # Running

    def heads(self, instance: int) -> list[SequenceStep]:
        """Return the steps of an instance that may run now: the first of each sequence with queued steps."""
        return [sequence.waiting[0] for sequence in self._ready[instance]]

    def key(self, step: SequenceStep) -> Hashable:
        """Return the stack key of a head: heads with equal keys can be stacked."""
        return step.request.key, self._first_shapes if step.starts else step.sequence.shapes

    def take(self, steps: list[SequenceStep]) -> None:
        """Mark these heads as running."""
        for step in steps:
            sequence = step.sequence
            assert sequence.position is not None, "only heads are taken"
            self._dequeue(sequence.waiting.popleft())
            sequence.running = step
            self._update_ready(sequence)
            step.slot = sequence.position.slot
            if step.starts:
                sequence.has_begun = False
                self._set_states(sequence, {}, 0)

    def has_room(self, step: SequenceStep) -> bool:
        """Return True when the states after a step that has run may be kept, or are not kept at all."""
        sequence = step.sequence
        more = step.after_bytes - sequence.state_bytes
        return step.ends or more <= 0 or self._share(sequence).has_room(more)

    def ran(self, step: SequenceStep, now: float, *, is_success: bool) -> list[SequenceStep]:
        """Record the end of a step. Returns the steps behind it that are rejected: their sequence never began."""
        sequence = step.sequence
        sequence.running = None
        if is_success:
            sequence.has_begun = True
            self._set_states(sequence, step.after, step.after_bytes)
        if step.ends:
            self._close(sequence)
            return []
        if step.starts and not is_success:
            rejected = self._reject_followers(sequence)
            self._close(sequence)
            return rejected
        self._after_step(sequence, now)
        return []

    def lose_instance(self, instance: int, kept: Collection[Sequence] = ()) -> list[SequenceStep]:
        """Close the sequences of an instance that lost them, except `kept`; none is running.

        Returns the rejected steps.
        """
        rejected: list[SequenceStep] = []
        for sequence in [each for each in self.assigned[instance] if each not in kept]:
            rejected += self._reject_followers(sequence)
            self._close(sequence)
        return rejected

    # Ends without a run

    def drop(self, step: SequenceStep, now: float) -> list[SequenceStep]:
        """Remove a queued step. Returns the steps that are rejected with it: those behind a START."""
        if not step.is_waiting:
            return []
        sequence = step.sequence
        if not (step.starts or step.ends):
            sequence.waiting.remove(step)
            self._dequeue(step)
            self._after_step(sequence, now)
            return []
        self._dequeue(step)
        step.is_dropped = True
        rejected = [] if step.ends else self._reject_followers(sequence, behind=step)
        step.ends = True
        if sequence.running is None and sequence.waiting[0] is step:
            self._close(sequence)
        return rejected

    def expire(self, now: float) -> Iterator[SequenceStep]:
        """Yield the steps that have expired; the caller drops them."""
        yield from self._expiry.until(now)

    def next_expiry(self) -> float:
        """Return the next time at which a step expires or a sequence was idle for too long; infinite without one."""
        idle = next(iter(self._idle.values()), math.inf) + self._idle_s
        return min(self._expiry.next(), idle)

    def close_idle(self, now: float, *, all_idle: bool = False) -> list[Sequence]:
        """Close and return the sequences that have been idle for too long; `all_idle`: all that are idle."""
        idle = []
        for sequence, since in self._idle.items():
            if not all_idle and since + self._idle_s > now:
                break  # In order of time: the others were used later. Runs for every request, with thousands idle.
            idle.append(sequence)
        for sequence in idle:
            self._close(sequence)
        return idle

    def _reject_followers(self, sequence: Sequence, behind: SequenceStep | None = None) -> list[SequenceStep]:
        """Remove and return the steps behind `behind` (or all), up to the next START."""
        waiting = list(sequence.waiting)
        first = waiting.index(behind) + 1 if behind is not None else 0
        rejected = []
        for step in waiting[first:]:
            if step.starts:
                break
            rejected.append(step)
        for step in rejected:
            sequence.waiting.remove(step)
            if step.is_waiting:
                self._dequeue(step)
        return [step for step in rejected if not step.is_dropped]

    def _dequeue(self, step: SequenceStep) -> None:
        step.is_waiting = False
        self.waiting -= 1
        self.waiting_bytes -= step.request.size_bytes
        self.senders.remove(step)

    def drop_states(self) -> None:
        """Drop the states of all sequences: no step will run again."""
        for sequence in self._known.values():
            self._set_states(sequence, {}, 0)

    def _set_states(self, sequence: Sequence, states: Mapping[str, Tensor], size_bytes: int) -> None:
        self._share(sequence).add(size_bytes - sequence.state_bytes)
        sequence.states, sequence.state_bytes = states, size_bytes
        sequence.shapes = tuple(array.shape for array in states.values())

    def _share(self, sequence: Sequence) -> Share:
        return self._memory.of(sequence.tenant.encode("utf-8", "surrogatepass"))

    def _close(self, sequence: Sequence) -> None:
        """Close a sequence; a new one with its id may wait already. No step of it is running."""
        sequence.has_begun = False
        self._set_states(sequence, {}, 0)
        self._idle.pop(sequence, None)
        while sequence.waiting and sequence.waiting[0].is_dropped:
            sequence.waiting.popleft()
        self._free_slot(sequence)
        if sequence.waiting:
            # Behind the others, since it has just held a slot; one that waited keeps its place.
            self._queue(sequence)
        else:
            self._unqueue(sequence)
            del self._known[sequence.owner, sequence.id]
        self._assign_slots()

    def _after_step(self, sequence: Sequence, now: float) -> None:
        """Update a sequence after a step was removed: it may be idle, or at its end."""
        if sequence.running is not None:
            return
        if not sequence.waiting:
            self._idle[sequence] = now
        elif sequence.waiting[0].is_dropped:
            self._close(sequence)
        self._update_ready(sequence)

    def _update_ready(self, sequence: Sequence) -> None:
        """Add the sequence to those that are ready, or remove it, after its steps changed."""
        if sequence.position is None:
            return
        ready = self._ready[sequence.position.instance]
        if sequence.head is None:
            ready.pop(sequence, None)
        else:
            ready.setdefault(sequence)

    # Slots

    def _free_slot(self, sequence: Sequence) -> None:
        position = sequence.position
        if position is None:
            return
        del self.assigned[position.instance][sequence]
        self._ready[position.instance].pop(sequence, None)
        heapq.heappush(self._free_slots[position.instance], position.slot)
        sequence.position = None
        self._held_by_tenant[sequence.tenant] -= 1
        if not self._held_by_tenant[sequence.tenant]:
            del self._held_by_tenant[sequence.tenant]

    def _assign_slots(self) -> None:
        """Assign free slots to waiting sequences, in the instance with the most free slots, the lowest slot first."""
        while self._backlog:
            instance = max(range(len(self._free_slots)), key=lambda n: len(self._free_slots[n]))
            if not self._free_slots[instance]:
                return
            # Among equals, the first has waited longest.
            tenant = min(self._backlog, key=lambda name: (self._load(name), next(iter(self._backlog[name].values()))))
            sequence = next(iter(self._backlog[tenant]))
            self._unqueue(sequence)
            sequence.position = SequenceSlot(instance, heapq.heappop(self._free_slots[instance]))
            self.assigned[instance][sequence] = None
            self._update_ready(sequence)
            self._held_by_tenant[sequence.tenant] = self._held_by_tenant.get(sequence.tenant, 0) + 1

    def _queue(self, sequence: Sequence) -> None:
        """Add a sequence to the backlog; one that is there keeps its place."""
        backlog = self._backlog.setdefault(sequence.tenant, {})
        if sequence not in backlog:
            backlog[sequence] = next(self._numbers)

    def _unqueue(self, sequence: Sequence) -> None:
        """Remove a sequence from the backlog, if it is there."""
        backlog = self._backlog.get(sequence.tenant, {})
        if backlog.pop(sequence, None) is not None and not backlog:
            del self._backlog[sequence.tenant]

    def _load(self, tenant: str) -> float:
        """Return the load of a tenant if it got a slot, by its weight; the least goes first."""
        return (self._held_by_tenant.get(tenant, 0) + 1) / self._weights.get(tenant, 1.0)
