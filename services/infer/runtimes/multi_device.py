"""Session of one model on several devices: each run uses a free device.

run ──> free queue ──> session on GPU 0 | session on GPU 1 | ... ──> free queue
"""

from __future__ import annotations

import queue
from collections.abc import Mapping, Sequence

from services.infer.requests.tensors import Tensor
from services.infer.runtimes.given_up import GivenUp
from services.infer.runtimes.runtime import Session


class MultiDeviceSession(Session):
    """Sessions of the same model as one session, which owns them. `run` may wait: not for an event loop."""

    def __init__(self, sessions: Sequence[tuple[Session, int]]) -> None:
        """`sessions`: each with its number of concurrent runs. A run waits while all are in use."""
        first = sessions[0][0]
        self.inputs, self.outputs, self.text = first.inputs, first.outputs, first.text
        self.optional_inputs = first.optional_inputs
        self.may_not_end = first.may_not_end
        self.gpus = tuple(gpu for session, _ in sessions for gpu in session.gpus)
        self._sessions = tuple(session for session, _ in sessions)
        self._free: queue.SimpleQueue[Session] = queue.SimpleQueue()
        # One entry for each device before a second one for any: the first runs go to different devices.
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

    def run_until(self, inputs: Mapping[str, Tensor], outputs: Sequence[str], given_up: GivenUp) -> list[Tensor]:
        session = self._free.get()
        try:
            return session.run_until(inputs, outputs, given_up)
        finally:
            self._free.put(session)

    def device_sessions(self) -> Sequence[Session]:
        return self._sessions

    def interrupt(self) -> None:
        for session in self._sessions:
            session.interrupt()

    def shrink(self) -> None:
        for session in self._sessions:
            session.shrink()

    def close(self) -> None:
        for session in self._sessions:
            session.close()
