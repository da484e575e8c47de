"""One model on several devices, as one session: a run takes a device that is free.

run ──> free ──> session on GPU 0 | session on GPU 1 | ... ──> free
"""

from __future__ import annotations

import queue
from collections.abc import Mapping, Sequence

from services.infer.calls.tensors import Tensor
from services.infer.runtimes.runtime import Session


class SpreadSession:
    """Has the sessions, all of the same model, and closes them."""

    def __init__(self, sessions: Sequence[tuple[Session, int]]) -> None:
        """Each session with the number of runs that it may have at the same time; a run beyond all of them waits."""
        first = sessions[0][0]
        self.inputs, self.outputs, self.text = first.inputs, first.outputs, first.text
        self.optional_inputs = getattr(first, "optional_inputs", ())
        self.gpus: tuple[int, ...] = tuple(gpu for session, _ in sessions for gpu in getattr(session, "gpus", ()))
        self.parts = tuple(session for session, _ in sessions)
        """What is warmed up one by one."""
        self._free: queue.SimpleQueue[Session] = queue.SimpleQueue()
        # One place on each device before a second one on any: the first runs go to different devices.
        for round_ in range(max(count for _, count in sessions)):
            for session, count in sessions:
                if round_ < count:
                    self._free.put(session)

    def run(self, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> list[Tensor]:
        session = self._free.get()
        try:
            return session.run(inputs, outputs)
        finally:
            self._free.put(session)

    def close(self) -> None:
        for session in self.parts:
            session.close()
