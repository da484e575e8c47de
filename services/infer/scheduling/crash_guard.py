"""Crash guard: rejects a poison request, one of which another process died, instead of executing it again.

Executions record the fingerprints of their requests in the crash journal (mesh.process.crash_journal), 8 bytes each.
When an instance dies, Envoy retries its requests elsewhere and counts the attempts in a header. Only retries are
checked.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mesh.process.crash_journal import Crashes, CrashJournal, Slot, Verdict
from services.infer.requests import ragged
from services.infer.requests.outcome import Outcome
from services.infer.requests.request import InferenceRequest
from services.infer.scheduling.execution import Execution, ExecutionItem, Executor
from shoal.errors import Internal

log = logging.getLogger(__name__)

ATTEMPT = "x-envoy-attempt-count"
"""Header in which Envoy counts the attempts of a request, from 1."""

# Bytes at the beginning and at the end of an input that enter its fingerprint: they tell requests apart at little cost.
_SAMPLED_BYTES = 1024
_SAMPLED_ELEMENTS = 16


class JournaledExecution:
    """An Executor that records the requests of `execution` in a slot of the crash journal while they run."""

    def __init__(self, execution: Execution, slot: Slot, model: int) -> None:
        """Wrap `execution`; `model` is the `digest_of` the model's name."""
        self._execution = execution
        self._slot = slot
        self._model = model
        self.tally = execution.tally
        self.may_run_on_loop = execution.may_run_on_loop

    def run(self, batch: Sequence[ExecutionItem]) -> list[Outcome]:
        model = self._model
        self._slot.begin([fingerprint(model, item.request) for item in batch])
        outcomes = self._execution.run(batch)
        self._slot.end()
        return outcomes


def journaled(journal: CrashJournal, model: str, execution: Execution) -> Executor:
    """Return the execution of `model` with a crash journal, or unchanged when the journal has no free slot."""
    slot = journal.slot()
    return execution if slot is None else JournaledExecution(execution, slot, digest_of(model))


class CrashGuard:
    """Checks retried requests against the crash journals of other processes."""

    def __init__(self, folder: Path) -> None:
        self._crashes = Crashes(folder)

    async def checked(self, model: str, request: InferenceRequest) -> InferenceRequest:
        """Return the retried request as it may be executed; a suspect is given a batch of its own.

        Raises:
            Internal: an instance died of this request.
        """
        match await self._crashes.verdict(fingerprint(digest_of(model), request)):
            case Verdict.CONFIRMED:
                log.error("model %s: rejected a poison request: another instance died while it ran it", model)
                raise Internal(
                    f"model '{model}': the instance that ran this request died, so no other instance runs it: "
                    "send another request"
                )
            case Verdict.AMBIGUOUS:
                return replace(request, key=(request.key, object()))
        return request


def fingerprint(model: int, request: InferenceRequest) -> int:
    """Return an 8-byte digest of a request, independent of the order of its inputs; `model` is a `digest_of`."""
    digest, size = model, 0
    for array in (array for value in request.inputs.values() for array in ragged.arrays(value)):
        size += array.nbytes
        if array.dtype == object:
            digest ^= _crc(
                b"\0".join([e.encode() if isinstance(e, str) else bytes(e) for e in array.flat[:_SAMPLED_ELEMENTS]])
            )
        elif array.nbytes <= 2 * _SAMPLED_BYTES and array.flags.c_contiguous:
            digest ^= _crc(array)
        else:
            flat = array.reshape(-1).view(np.uint8)
            digest ^= _crc(flat[:_SAMPLED_BYTES]) ^ _crc(flat[-_SAMPLED_BYTES:], 1)
    return digest | (size & 0xFFFFFFFF) << 32


def digest_of(model: str) -> int:
    """Return the digest of a model's name, for `fingerprint`."""
    found: int = _crc(model.encode())
    return found


_crc: Any = zlib.crc32  # Takes any buffer; the types of numpy's arrays do not say that they are buffers.
