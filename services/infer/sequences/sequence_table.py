"""Which sequences there are, who has a place, and what may run: pure, told the time, and of no event loop.

    add ──> known? ──> its place, behind its own steps            free place ──> backlog's next, fairly among tenants
              └── START: a new one ──> a free place | backlog

A sequence has begun when a step with START was run, and it lives until a step with END was taken up, until it was idle
for too long, or until its instance lost it. Steps of one sequence run one at a time, in the order of their arrival. A
START that does not come to an answer begins nothing, and what was sent behind it is refused: no step ever finds
another state than the one before it left.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Hashable, Iterator, Mapping

from services.infer.requests.request import InferenceRequest
from services.infer.scheduling.deadline_heap import DeadlineHeap
from services.infer.sequences.rows import SequenceId
from services.infer.sequences.step import Sequence, SequenceSlot, SequenceStep


class UnknownSequence(Exception):
    """A step without START, of a sequence that is not known (any more)."""


class SequenceTable:
    """The sequences of one model version."""

    def __init__(
        self,
        instances: int,
        places: int,
        idle_s: float,
        weights: Mapping[str, float] | None = None,
        first_shapes: Hashable = (),
    ) -> None:
        """`places` in each of the instances; `weights`: shares by tenant, of those that wait for one; `first_shapes`:
        of the states that a sequence begins with."""
        self.placed: list[dict[Sequence, None]] = [{} for _ in range(instances)]
        """By instance: the sequences that have a place in it."""
        self._ready: list[dict[Sequence, None]] = [{} for _ in range(instances)]
        # Those of them with a step that may run: thousands may have a place and wait for their clients.
        self._free_slots = [list(range(places)) for _ in range(instances)]  # Heaps: batches stay dense.
        self._idle_s = idle_s
        self._first_shapes = first_shapes
        self._weights = weights or {}
        self._known: dict[SequenceId, Sequence] = {}
        self._backlog: dict[Sequence, None] = {}
        self._idle: dict[Sequence, float] = {}  # In the order of their times: all may be idle for equally long.
        self._held: dict[str, int] = {}
        self._expiry: DeadlineHeap[SequenceStep] = DeadlineHeap()
        self.waiting = 0
        """Steps that wait."""
        self.waiting_bytes = 0

    def __len__(self) -> int:
        return len(self._known)

    def add(self, step: SequenceStep, tenant: str) -> None:
        """Puts a step behind those of its sequence. Raises Unknown."""
        sequence = self._known.get(step.id)
        if not step.starts and (sequence is None or not sequence.is_open):
            raise UnknownSequence
        if sequence is None:
            sequence = self._known[step.id] = Sequence(step.id, tenant)
        step.sequence = sequence
        sequence.waiting.append(step)
        step.is_waiting = True
        self.waiting += 1
        self.waiting_bytes += step.call.size_bytes
        self._idle.pop(sequence, None)
        if step.expires != math.inf:
            self._expiry.add(step.expires, step)
        if sequence.place is None:
            self._backlog.setdefault(sequence)
            self._assign()
        else:
            self._look(sequence)

    def holds(self, call: InferenceRequest) -> bool:
        """Whether a step with this very call waits here."""
        return any(step.call is call for sequence in self._known.values() for step in sequence.waiting)

    def left(self) -> list[SequenceStep]:
        """All steps that wait."""
        return [step for sequence in self._known.values() for step in sequence.waiting if step.is_waiting]

    # Running

    def heads(self, instance: int) -> list[SequenceStep]:
        """The steps of an instance that may run now: of each sequence with a step that waits, the first."""
        return [sequence.waiting[0] for sequence in self._ready[instance]]

    def key(self, step: SequenceStep) -> Hashable:
        """Heads with equal keys can be stacked."""
        return step.call.key, self._first_shapes if step.starts else step.sequence.shapes

    def take(self, steps: list[SequenceStep]) -> None:
        """These heads are being run."""
        for step in steps:
            sequence = step.sequence
            assert sequence.place is not None, "only heads are taken"
            self._leave_line(sequence.waiting.popleft())
            sequence.running = step
            self._look(sequence)
            step.slot = sequence.place.slot
            if step.starts:
                sequence.has_begun = False
                sequence.states, sequence.shapes = {}, ()

    def ran(self, step: SequenceStep, now: float, *, is_success: bool) -> list[SequenceStep]:
        """A step came to its end. Returns those behind it that are refused, because their sequence never began."""
        sequence = step.sequence
        sequence.running = None
        if is_success:
            sequence.has_begun = True
            sequence.states = step.after
            sequence.shapes = tuple(array.shape for array in step.after.values())
        if step.ends:
            self._end(sequence)
            return []
        if step.starts and not is_success:
            refused = self._refuse_followers(sequence)
            self._end(sequence)
            return refused
        self._rest(sequence, now)
        return []

    def lose(self, instance: int, but: Collection[Sequence] = ()) -> list[SequenceStep]:
        """An instance forgot its sequences, `but` these; none of their steps is running. Returns those refused."""
        refused: list[SequenceStep] = []
        for sequence in [each for each in self.placed[instance] if each not in but]:
            refused += self._refuse_followers(sequence)
            self._end(sequence)
        return refused

    # Ends without a run

    def drop(self, step: SequenceStep, now: float) -> list[SequenceStep]:
        """Takes a waiting step out of the line. Returns those that are refused with it: they were behind a START."""
        if not step.is_waiting:
            return []
        sequence = step.sequence
        if not (step.starts or step.ends):
            sequence.waiting.remove(step)
            self._leave_line(step)
            self._rest(sequence, now)
            return []
        self._leave_line(step)
        step.is_dropped = True
        refused = [] if step.ends else self._refuse_followers(sequence, behind=step)
        step.ends = True
        if sequence.running is None and sequence.waiting[0] is step:
            self._end(sequence)
        return refused

    def expire(self, now: float) -> Iterator[SequenceStep]:
        """The steps whose time is over. Whoever asks drops them."""
        yield from self._expiry.until(now)

    def next_expiry(self) -> float:
        """When a step runs out, or a sequence has been idle for too long; infinite when none does."""
        idle = next(iter(self._idle.values()), math.inf) + self._idle_s
        return min(self._expiry.next(), idle)

    def forget_idle(self, now: float, *, at_once: bool = False) -> list[Sequence]:
        """Ends the sequences that have been idle for too long, and returns them; `at_once`: all that are idle."""
        over = []
        for sequence, since in self._idle.items():
            if not at_once and since + self._idle_s > now:
                break  # The others were heard of later. Every call asks: there may be thousands.
            over.append(sequence)
        for sequence in over:
            self._end(sequence)
        return over

    def _refuse_followers(self, sequence: Sequence, behind: SequenceStep | None = None) -> list[SequenceStep]:
        """Takes out what follows `behind` (or all), up to the next START."""
        line = list(sequence.waiting)
        first = line.index(behind) + 1 if behind is not None else 0
        refused = []
        for step in line[first:]:
            if step.starts:
                break
            refused.append(step)
        for step in refused:
            sequence.waiting.remove(step)
            if step.is_waiting:
                self._leave_line(step)
        return [step for step in refused if not step.is_dropped]

    def _leave_line(self, step: SequenceStep) -> None:
        step.is_waiting = False
        self.waiting -= 1
        self.waiting_bytes -= step.call.size_bytes

    def _end(self, sequence: Sequence) -> None:
        """The sequence is over; a next one with its id may wait already. No step of it is running."""
        sequence.has_begun = False
        sequence.states, sequence.shapes = {}, ()
        self._idle.pop(sequence, None)
        while sequence.waiting and sequence.waiting[0].is_dropped:
            sequence.waiting.popleft()
        self._free(sequence)
        if sequence.waiting:
            self._backlog[sequence] = None  # Behind the others: it had its turn.
        else:
            self._backlog.pop(sequence, None)
            del self._known[sequence.id]
        self._assign()

    def _rest(self, sequence: Sequence, now: float) -> None:
        """A step is gone: what is next may be an end, or nothing."""
        if sequence.running is not None:
            return
        if not sequence.waiting:
            self._idle[sequence] = now
        elif sequence.waiting[0].is_dropped:
            self._end(sequence)
        self._look(sequence)

    def _look(self, sequence: Sequence) -> None:
        """Something has become of a sequence's steps: it is among those that are ready, or not."""
        if sequence.place is None:
            return
        ready = self._ready[sequence.place.instance]
        if sequence.head is None:
            ready.pop(sequence, None)
        else:
            ready.setdefault(sequence)

    # Places

    def _free(self, sequence: Sequence) -> None:
        place = sequence.place
        if place is None:
            return
        del self.placed[place.instance][sequence]
        self._ready[place.instance].pop(sequence, None)
        heapq.heappush(self._free_slots[place.instance], place.slot)
        sequence.place = None
        self._held[sequence.tenant] -= 1
        if not self._held[sequence.tenant]:
            del self._held[sequence.tenant]

    def _assign(self) -> None:
        """Gives free places to those that wait for one: in the instance with the most of them, the first there."""
        while self._backlog:
            instance = max(range(len(self._free_slots)), key=lambda n: len(self._free_slots[n]))
            if not self._free_slots[instance]:
                return
            sequence = min(self._backlog, key=self._behind)  # Among equals the first: it has waited longest.
            del self._backlog[sequence]
            sequence.place = SequenceSlot(instance, heapq.heappop(self._free_slots[instance]))
            self.placed[instance][sequence] = None
            self._look(sequence)
            self._held[sequence.tenant] = self._held.get(sequence.tenant, 0) + 1

    def _behind(self, sequence: Sequence) -> float:
        """How much of its share its tenant would have with it: who has least goes first."""
        return (self._held.get(sequence.tenant, 0) + 1) / self._weights.get(sequence.tenant, 1.0)
