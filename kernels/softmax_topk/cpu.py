"""softmax_topk on the CPU: one row after the other, read twice.

First a row is cut into eight stretches, laid over each other:

    stretch 0   x[0]     x[1]     x[2]     ...  x[L-1]
    stretch 1   x[L]     x[L+1]   x[L+2]   ...  x[2L-1]
    ...
    maxima      ^ of the column                          and one of the up to seven logits that are left

The k-th largest of these maxima is a bound: at least k logits reach it. So only columns whose maximum reaches it are
looked at again, and what reaches it in them is sorted. Then the sum of exponentials.

Both loops are vectors of 8 or 16 lanes. LLVM makes vectors of a maximum or a sum of floats only where it may ignore NaN
and infinities, and those count here. So maxima are taken of integers in the floats' order, and the sum alone may be
reordered (`reassoc`). `math.exp` would be a call for each logit; `_exp` is a polynomial.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

Array = npt.NDArray[Any]

STRETCHES = 8
LOWEST = np.int32(-0x80000000)
MAGNITUDE = np.int32(0x7FFFFFFF)
INFINITY = np.int32(0x7F800000)
INDEX = np.uint64(0xFFFFFFFF)
# So many are sorted by insertion: two to four times as fast as a general sort of that few.
FEW = 32

LOG2E = np.float32(1.44269504)
# ln 2 in two parts: the first has few bits, so that its product with a small whole number is exact.
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
# exp(r) on [-ln 2 / 2, ln 2 / 2], minimax of degree 7: S. Moshier's Cephes, expf.
C5, C4, C3 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
C2, C1, C0 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
# exp of less is below the smallest normal float32.
LEAST = np.float32(-87.33654)


@njit(nogil=True, cache=True)
def exp(x: Any) -> Any:
    """exp(x) of a float32 <= 0: within 1 ulp where the result is a normal float32, else 0."""
    inside = x if x > LEAST else LEAST
    n = np.int32(inside * LOG2E - np.float32(0.5))  # Cut off towards zero: the nearest whole number.
    r = inside - np.float32(n) * LN2_HIGH - np.float32(n) * LN2_LOW
    p = ((((C5 * r + C4) * r + C3) * r + C2) * r + C1) * r + C0
    power = np.int32((n + np.int32(127)) << np.int32(23)).view(np.float32)
    return (p * (r * r) + r + np.float32(1)) * power if x > LEAST else np.float32(0)


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def _sum_of_exp(row: Any, top: Any) -> Any:
    total = np.float32(0)
    for j in range(row.size):
        total += exp(row[j] - top)
    return total


@njit(nogil=True, cache=True)
def _key(bits: Any) -> Any:
    """A float's bits as an integer of the same order, both zeros equal. NaN is not in order."""
    sign = bits >> np.int32(31)
    return ((bits & MAGNITUDE) ^ sign) - sign


@njit(nogil=True, cache=True)
def _larger(bits: Any, a: Any, b: Any) -> Any:
    return max(_key(bits[a]), _key(bits[b]))


@njit(nogil=True, cache=True)
def _further(bits: Any, a: Any, b: Any) -> Any:
    return max(bits[a] & MAGNITUDE, bits[b] & MAGNITUDE)


@njit(nogil=True, cache=True)
def _maxima(bits: Any, maxima: Any) -> Any:
    """Writes the largest key of each column; returns the largest magnitude of the row: above INFINITY where NaN is.

    Written out because a loop over the stretches inside is not made a vector, and outside is half as fast. Unsigned:
    no index counts from the end, so none is compared on its way into memory.
    """
    most = np.int32(0)
    length = np.uint64(bits.size // STRETCHES)
    for i in range(length):
        a = np.uint64(i)
        b, c, d = a + length, a + np.uint64(2) * length, a + np.uint64(3) * length
        e, f, g, h = (
            a + np.uint64(4) * length,
            b + np.uint64(4) * length,
            c + np.uint64(4) * length,
            d + np.uint64(4) * length,
        )
        maxima[a] = max(max(_larger(bits, a, b), _larger(bits, c, d)), max(_larger(bits, e, f), _larger(bits, g, h)))
        far = max(max(_further(bits, a, b), _further(bits, c, d)), max(_further(bits, e, f), _further(bits, g, h)))
        most = max(most, far)
    maxima[length] = LOWEST
    for i in range(STRETCHES * (bits.size // STRETCHES), bits.size):
        maxima[length] = max(maxima[length], _key(bits[i]))
        most = max(most, bits[i] & MAGNITUDE)
    return most


@njit(nogil=True, cache=True)
def _kth_largest(keys: Any, best: Any) -> Any:
    """The best.size-th largest key, or LOWEST where there are fewer."""
    last = best.size - 1
    if best.size > keys.size:
        return LOWEST
    if best.size > FEW:
        return np.partition(keys, keys.size - best.size)[keys.size - best.size]
    best[:] = LOWEST
    for key in keys:
        if key > best[last]:
            at = last
            while at > 0 and best[at - 1] < key:
                best[at] = best[at - 1]
                at -= 1
            best[at] = key
    return best[last]


@njit(nogil=True, cache=True)
def _candidate(bits: Any, at: Any) -> Any:
    """A logit as one number that sorts larger logits first, NaN last, equals by index."""
    key = _key(bits[at]) if bits[at] & MAGNITUDE <= INFINITY else LOWEST
    return np.uint64(np.int64(MAGNITUDE) - np.int64(key)) << np.uint64(32) | np.uint64(at)


@njit(nogil=True, cache=True)
def _candidates(bits: Any, maxima: Any, bound: Any, found: Any) -> int:
    """Writes every logit that reaches the bound; returns how many."""
    count = 0
    worst = np.uint64(np.int64(MAGNITUDE) - np.int64(bound)) << np.uint64(32) | np.uint64(0xFFFFFFFF)
    length = bits.size // STRETCHES
    for i in range(length):
        if maxima[i] >= bound:
            for at in range(i, STRETCHES * length, length):
                candidate = _candidate(bits, at)
                if candidate <= worst:
                    found[count] = candidate
                    count += 1
    for at in range(STRETCHES * length, bits.size):
        candidate = _candidate(bits, at)
        if candidate <= worst:
            found[count] = candidate
            count += 1
    return count


@njit(nogil=True, cache=True)
def _sort(found: Any) -> None:
    if found.size > FEW:
        found.sort()
        return
    for i in range(1, found.size):
        candidate = found[i]
        at = i
        while at > 0 and found[at - 1] > candidate:
            found[at] = found[at - 1]
            at -= 1
        found[at] = candidate


@njit(nogil=True, cache=True)
def rows(logits: Any, bits: Any, probabilities: Any, indices: Any) -> None:
    """`bits` is `logits` seen as int32."""
    n, m = logits.shape
    k = indices.shape[1]
    if k == 0:
        return
    maxima, best = np.empty(m // STRETCHES + 1, np.int32), np.empty(k, np.int32)
    found = np.empty(m, np.uint64)
    for i in range(n):
        numbers = _maxima(bits[i], maxima) <= INFINITY
        if numbers:
            bound = _kth_largest(maxima, best)
        else:
            bound = LOWEST
            maxima[:] = MAGNITUDE
        chosen = found[: _candidates(bits[i], maxima, bound, found)]
        _sort(chosen)
        top = logits[i, chosen[0] & INDEX]
        # NaN where the formula is: a NaN or +inf in the row, or nothing but -inf.
        total = _sum_of_exp(logits[i], top) if numbers and abs(top) < np.inf else np.float32(np.nan)
        for j in range(k):
            at = chosen[j] & INDEX
            indices[i, j] = at
            probabilities[i, j] = exp(logits[i, at] - top) / total


def run(logits: Array, probabilities: Array, indices: Array, stream: None = None) -> None:
    logits = logits.astype(np.float32, copy=False)
    rows(logits, logits.view(np.int32), probabilities, indices)
