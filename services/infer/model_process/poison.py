"""Requests that end their model's process, remembered by what they are, so that they do it no more.

    alone when its process died    ──> refused from now on, for a while that doubles each time it does it again
    one of several, or killed from outside (SIGKILL may be the kernel's for want of memory, or a person's): suspected;
    refused when that has happened several times

Memory is bounded; what has run out is forgotten.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.infer.requests.request import InferenceRequest
from services.infer.requests.tensors import Tensor
from shoal.oip.tensors import pack_bytes

FIRST_S, LONGEST_S = 60.0, 3600.0
SUSPICIONS = 3
_KEPT = 1024


@dataclass
class _Record:
    suspicions: int = 0
    deaths: int = 0
    until: float = 0.0
    """Refused before this."""
    forgotten: float = 0.0
    """From then on, nothing is known of it."""


class Poison:
    """Of one model. Any thread may use it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._records: dict[bytes, _Record] = {}

    def __bool__(self) -> bool:
        """Whether anything is remembered: if not, nobody needs to be looked at."""
        return bool(self._records)

    def blame(self, calls: Sequence[InferenceRequest], *, is_sure: bool) -> None:
        """These were executed together when their process died. `is_sure`: it was their doing, and nobody else's."""
        for call in calls:
            mark = fingerprint(call)
            with self._lock:
                record = self._records.pop(mark, None) or _Record()
                record.suspicions += 1
                if (is_sure and len(calls) == 1) or record.suspicions >= SUSPICIONS:
                    record.deaths += 1
                    record.until = self._clock() + min(FIRST_S * 2.0 ** (record.deaths - 1), LONGEST_S)
                record.forgotten = max(record.until, self._clock()) + LONGEST_S
                self._records[mark] = record
                while len(self._records) > _KEPT:
                    del self._records[next(iter(self._records))]

    def refused_for_s(self, call: InferenceRequest) -> float:
        """How long this call is still refused; 0: it may run."""
        now = self._clock()
        with self._lock:
            for mark in [mark for mark, record in self._records.items() if now >= record.forgotten]:
                del self._records[mark]
            if not self._records:
                return 0.0
        record = self._records.get(fingerprint(call))
        return max(record.until - now, 0.0) if record is not None else 0.0


def fingerprint(call: InferenceRequest) -> bytes:
    """What the model sees of a call: equal for equal inputs and wanted outputs."""
    digest = hashlib.blake2b(digest_size=16)
    for name, array in sorted(call.tensors.items()):
        digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(_content(array))
    digest.update("\0".join(output.spec.name for output in call.outputs).encode())
    return digest.digest()


def _content(array: Tensor) -> bytes:
    return pack_bytes(array.reshape(-1).tolist()) if array.dtype == object else array.tobytes()
