"""Crash guard: rejects a poison request, one of which another process died, instead of executing it again.

Executions record the fingerprints of their requests in the crash journal (mesh.process.crash_journal), 8 bytes each.
When an instance dies, Envoy retries its requests elsewhere and counts the attempts in a header. Only retries are
checked.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping, Sequence
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
_ATTEMPT = ATTEMPT.encode()

# A fingerprint is computed for each run: of larger inputs and elements, 2 KiB that spread over all bytes are read. So
# padded and letterboxed inputs differ.
_BLOCKS, _BLOCK_BYTES = 128, 16
_WHOLE_BYTES = _BLOCKS * _BLOCK_BYTES
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
        self.may_not_end = execution.may_not_end
        self.give_up = execution.give_up

    def run(self, batch: Sequence[ExecutionItem]) -> list[Outcome]:
        model = self._model
        self._slot.begin([fingerprint(model, item.request) for item in batch])
        outcomes = self._execution.run(batch)
        self._slot.end()
        return outcomes


def is_retry(headers: Mapping[bytes, bytes]) -> bool:
    """Return True when the mesh has sent the request with these headers to another instance before."""
    return headers.get(_ATTEMPT, b"1") != b"1"


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
                log.error(
                    "model %(model)s: rejected a poison request: another instance died while it ran it",
                    {"event": "model.poison_request", "model": model},
                )
                raise Internal(
                    f"model '{model}': the instance that ran this request died, so no other instance runs it: "
                    "send another request"
                )
            case Verdict.AMBIGUOUS:
                return replace(request, key=(request.key, object()))
        return request


def fingerprint(model: int, request: InferenceRequest) -> int:
    """Return an 8-byte digest of a request, independent of the order in which it gives its inputs.

    `model` is a `digest_of`.
    """
    digest, size, inputs = model, 0, request.inputs
    for name in sorted(inputs) if len(inputs) > 1 else inputs:
        for array in ragged.arrays(inputs[name]):
            size += array.nbytes
            if array.dtype == object:
                elements = array.reshape(-1)[:: array.size // _SAMPLED_ELEMENTS or 1].tolist()
                size += sum(map(len, elements))
                digest = _crc(b"\0".join(map(_sampled, elements)), digest)
                continue
            whole = array if array.flags.c_contiguous else np.ascontiguousarray(array)
            if array.nbytes > _WHOLE_BYTES:
                step = (array.nbytes - _BLOCK_BYTES) // (_BLOCKS - 1)
                blocks: Any = np.ndarray((_BLOCKS, _BLOCK_BYTES), np.uint8, whole, strides=(step, 1))
                digest = _crc(blocks.tobytes(), digest)
            else:
                digest = _crc(whole, digest)
    return digest | (size & 0xFFFFFFFF) << 32


def _sampled(element: Any) -> bytes:
    """Return a BYTES element, `bytes` or `str`, or samples of a long one."""
    if len(element) > _WHOLE_BYTES:
        element = element[:: len(element) // _WHOLE_BYTES]
    return element.encode("utf-8", "surrogatepass") if isinstance(element, str) else bytes(element)


def digest_of(model: str) -> int:
    """Return the digest of a model's name, for `fingerprint`."""
    found: int = _crc(model.encode())
    return found


_crc: Any = zlib.crc32  # Takes any buffer; the types of numpy's arrays do not say that they are buffers.
