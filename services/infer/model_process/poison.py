"""Poison requests: requests that crash their model's process, recorded by content and rejected afterwards.

    confirmed: alone in a process that crashed by itself
        ──> rejected for a time that doubles with each further crash
    ambiguous: one of several that cannot run alone, or the process was killed (out-of-memory killer, a person)
        ──> rejected after MAX_AMBIGUOUS_CRASHES, with no success in between

The table has a bounded size, and its records expire.
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
MAX_AMBIGUOUS_CRASHES = 3
_MAX_RECORDS = 1024


@dataclass
class _Record:
    crashes: int = 0
    rejections: int = 0
    """Number of rejection periods so far."""
    rejected_until: float = 0.0
    expires_at: float = 0.0


class PoisonTable:
    """Poison requests of one model. Any thread may use it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._records: dict[bytes, _Record] = {}

    def __bool__(self) -> bool:
        """Return True when the table has records: without any, no request needs a fingerprint."""
        return bool(self._records)

    def record_crash(self, requests: Sequence[InferenceRequest], *, is_confirmed: bool) -> None:
        """Record that a process died while it executed `requests`.

        Args:
            is_confirmed: the process crashed by itself, and executed no other requests.
        """
        for request in requests:
            key = fingerprint(request)
            with self._lock:
                record = self._records.pop(key, None) or _Record()
                record.crashes += 1
                if (is_confirmed and len(requests) == 1) or record.crashes >= MAX_AMBIGUOUS_CRASHES:
                    record.rejections += 1
                    record.rejected_until = self._clock() + min(FIRST_S * 2.0 ** (record.rejections - 1), LONGEST_S)
                record.expires_at = max(record.rejected_until, self._clock()) + LONGEST_S
                self._records[key] = record
                while len(self._records) > _MAX_RECORDS:
                    del self._records[next(iter(self._records))]

    def record_success(self, requests: Sequence[InferenceRequest]) -> None:
        """Forget the crashes of `requests`, which have succeeded now: others, with which they ran, were to blame."""
        if self._records:
            with self._lock:
                for request in requests:
                    self._records.pop(fingerprint(request), None)

    def rejected_for_s(self, request: InferenceRequest) -> float:
        """Return for how many seconds `request` is still rejected; 0: it may run."""
        now = self._clock()
        with self._lock:
            for key in [key for key, record in self._records.items() if now >= record.expires_at]:
                del self._records[key]
            if not self._records:
                return 0.0
        record = self._records.get(fingerprint(request))
        return max(record.rejected_until - now, 0.0) if record is not None else 0.0


def fingerprint(request: InferenceRequest) -> bytes:
    """Return a digest of the inputs and the names of the requested outputs: all that the model sees of a request."""
    digest = hashlib.blake2b(digest_size=16)
    for name, array in sorted(request.tensors.items()):
        digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(_content(array))
    digest.update("\0".join(output.spec.name for output in request.outputs).encode())
    return digest.digest()


def _content(array: Tensor) -> bytes:
    return pack_bytes(array.reshape(-1).tolist()) if array.dtype == object else array.tobytes()
