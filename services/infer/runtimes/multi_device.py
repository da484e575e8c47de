"""One model on several devices, as one session: a run takes a device that is free.

run ──> free ──> session on GPU 0 | session on GPU 1 | ... ──> free
"""

from __future__ import annotations

import queue
from collections.abc import Mapping, Sequence

from services.infer.requests.tensors import Tensor
from services.infer.runtimes.runtime import Session


class SpreadSession(Session):
    """Has the sessions, all of the same model, and closes them. A run may wait: it is none for the event loop."""

    def __init__(self, sessions: Sequence[tuple[Session, int]]) -> None:
        """Each session with the number of runs that it may have at the same time; a run beyond all of them waits."""
        first = sessions[0][0]
        self.inputs, self.outputs, self.text = first.inputs, first.outputs, first.text
        self.optional_inputs = first.optional_inputs
        self.gpus = tuple(gpu for session, _ in sessions for gpu in session.gpus)
        self._parts = tuple(session for session, _ in sessions)
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

    def parts(self) -> Sequence[Session]:
        return self._parts

    def close(self) -> None:
        for session in self._parts:
            session.close()
