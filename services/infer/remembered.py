"""Requests that a process died of are refused by the next: executions say what they are at, and retries are looked up.

The mesh's Envoy sends a call again when the instance that had it dies, and says so in a header. Only then anything is
looked up; what an execution writes are 8 bytes for each of its calls (mesh.flights).
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mesh.flights import Crashes, Flights, Seat, Verdict
from services.infer.calls import ragged
from services.infer.calls.request import Call
from services.infer.scheduling.execution import Execution, Job, Outcome, Runs
from shoal.errors import Internal

log = logging.getLogger(__name__)

ATTEMPT = "x-envoy-attempt-count"
"""Envoy's: 1 for the first."""

_LOOKED_AT = 1024
# Bytes at the beginning and at the end of an input that count for its mark: enough to tell requests apart, and cheap.
_ELEMENTS = 16


class Remembered:
    """Stands around an execution, and says what it is at: an `execution.Runs`. Free again, its seat is another's."""

    def __init__(self, execution: Execution, seat: Seat, model: int) -> None:
        """`model` is a `digest_of` its name."""
        self._execution = execution
        self._seat = seat
        self._model = model
        self.tally = execution.tally
        self.may_run_on_loop = execution.may_run_on_loop

    def run(self, batch: Sequence[Job]) -> list[Outcome]:
        model = self._model
        self._seat.begin([mark(model, job.call) for job in batch])
        outcomes = self._execution.run(batch)
        self._seat.end()
        return outcomes


def remembered(flights: Flights, model: str, execution: Execution) -> Runs:
    """The execution of `model`, remembered; or as it is, when all seats are taken."""
    seat = flights.seat()
    return execution if seat is None else Remembered(execution, seat, digest_of(model))


class Memory:
    """What is known of requests that come again."""

    def __init__(self, folder: Path) -> None:
        self._crashes = Crashes(folder)

    async def checked(self, model: str, call: Call) -> Call:
        """A retry as it may be executed: what is suspected runs alone.

        Raises:
            Internal: an instance died of it.
        """
        match await self._crashes.verdict(mark(digest_of(model), call)):
            case Verdict.GUILTY:
                log.error("model %s: a request is refused, because another instance ended while it ran it", model)
                raise Internal(
                    f"model '{model}': the instance that ran this request ended, so no other runs it: send another"
                )
            case Verdict.SUSPECT:
                return replace(call, key=(call.key, object()))
        return call


def mark(model: int, call: Call) -> int:
    """Eight bytes that tell a request from others, equal for equal inputs in whatever order; `model` is a digest."""
    digest, size = model, 0
    for array in (array for value in call.inputs.values() for array in ragged.arrays(value)):
        size += array.nbytes
        if array.dtype == object:
            digest ^= _crc(b"\0".join([e.encode() if isinstance(e, str) else bytes(e) for e in array.flat[:_ELEMENTS]]))
        elif array.nbytes <= 2 * _LOOKED_AT and array.flags.c_contiguous:
            digest ^= _crc(array)
        else:
            flat = array.reshape(-1).view(np.uint8)
            digest ^= _crc(flat[:_LOOKED_AT]) ^ _crc(flat[-_LOOKED_AT:], 1)
    return digest | (size & 0xFFFFFFFF) << 32


def digest_of(model: str) -> int:
    """For `mark`."""
    found: int = _crc(model.encode())
    return found


_crc: Any = zlib.crc32  # Of anything that has bytes: arrays say so in no type.
