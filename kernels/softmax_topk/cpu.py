"""softmax_topk on the CPU: reads each row twice.

The first pass treats a row as a matrix of eight stretches, and computes the maximum of each column:

    stretch 0   x[0]     x[1]     x[2]     ...  x[L-1]
    stretch 1   x[L]     x[L+1]   x[L+2]   ...  x[2L-1]
    ...
    maxima      ^ of the column                          and one of the remaining logits, seven at most

The k-th largest of these maxima is a bound: at least k logits reach it. Only columns whose maximum reaches the bound
are read again, and of their logits that reach it the k best are sorted, by a heap: a quicksort is quadratic for some
orders of a caller's logits. The second pass sums the exponentials.

Both loops use vectors of 8 or 16 lanes. LLVM vectorises a maximum or a sum of floats only if NaN and infinities may be
ignored, which would be wrong here. Therefore maxima are computed on integers in the order of the floats, and only the
sum may be reordered (`reassoc`). `math.exp` would be a function call per logit; `exp` is a polynomial.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from kernels.arrays import frozen

Array = npt.NDArray[Any]

STRETCHES = 8
LOWEST = np.int32(-0x80000000)
MAGNITUDE = np.int32(0x7FFFFFFF)
INFINITY = np.int32(0x7F800000)
INDEX = np.uint64(0xFFFFFFFF)
# Largest number of candidates for an insertion sort, two to four times as fast as any other at this size.
FEW = 32

LOG2E = np.float32(1.44269504)
# ln 2 in two parts. The first has few bits, so that its product with a small integer is exact.
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
# exp(r) on [-ln 2 / 2, ln 2 / 2], minimax of degree 7: S. Moshier's Cephes, expf.
C5, C4, C3 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
C2, C1, C0 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
# exp(LEAST) is the smallest normal float32.
LEAST = np.float32(-87.33654)


@njit(nogil=True, cache=True)
def exp(x):
    """Return exp(x) for a float32 <= 0: within 1 ulp if the result is a normal float32, else 0."""
    inside = x if x > LEAST else LEAST
    # Truncation towards zero gives the nearest integer.
    n = np.int32(inside * LOG2E - np.float32(0.5))
    r = inside - np.float32(n) * LN2_HIGH - np.float32(n) * LN2_LOW
    p = ((((C5 * r + C4) * r + C3) * r + C2) * r + C1) * r + C0
    power = np.int32((n + np.int32(127)) << np.int32(23)).view(np.float32)
    return (p * (r * r) + r + np.float32(1)) * power if x > LEAST else np.float32(0)


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def sum_of_exp(row, top):
    total = np.float32(0)
    for j in range(row.size):
        total += exp(row[j] - top)
    return total


@njit(nogil=True, cache=True)
def key_of(bits):
    """Map a float's bits to an integer of the same order, equal for both zeros. NaN has no defined order."""
    sign = bits >> np.int32(31)
    return ((bits & MAGNITUDE) ^ sign) - sign


@njit(nogil=True, cache=True)
def larger_of(bits, a, b):
    return max(key_of(bits[a]), key_of(bits[b]))


@njit(nogil=True, cache=True)
def further_of(bits, a, b):
    return max(bits[a] & MAGNITUDE, bits[b] & MAGNITUDE)


@njit(nogil=True, cache=True)
def maxima_of(bits, maxima):
    """Write the largest key of each column; return the largest magnitude of the row, above INFINITY if it contains NaN.

    The stretches are unrolled by hand: an inner loop over them is not vectorised, and an outer loop is half as fast.
    Unsigned indices need no check for negative values.
    """
    most = np.int32(0)
    length = np.uint64(bits.size // STRETCHES)
    half = np.uint64(STRETCHES // 2) * length
    for i in range(length):
        a = np.uint64(i)
        b, c, d = a + length, a + np.uint64(2) * length, a + np.uint64(3) * length
        e, f, g, h = a + half, b + half, c + half, d + half
        maxima[a] = max(
            max(larger_of(bits, a, b), larger_of(bits, c, d)), max(larger_of(bits, e, f), larger_of(bits, g, h))
        )
        far = max(
            max(further_of(bits, a, b), further_of(bits, c, d)), max(further_of(bits, e, f), further_of(bits, g, h))
        )
        most = max(most, far)
    maxima[length] = LOWEST
    for i in range(STRETCHES * (bits.size // STRETCHES), bits.size):
        maxima[length] = max(maxima[length], key_of(bits[i]))
        most = max(most, bits[i] & MAGNITUDE)
    return most


@njit(nogil=True, cache=True)
def sink(heap, size):
    """Restore a heap of `size` elements, the largest first, of which only the first may be too small."""
    value = heap[0]
    at, child = 0, 1
    while child < size:
        if child + 1 < size and heap[child + 1] > heap[child]:
            child += 1
        if heap[child] <= value:
            break
        heap[at] = heap[child]
        at, child = child, 2 * child + 1
    heap[at] = value


@njit(nogil=True, cache=True)
def keep_least(values, count):
    """Make the first `count` elements a heap, the largest first, of the smallest of all."""
    for end in range(1, count):
        value, at = values[end], end
        while at > 0 and values[(at - 1) // 2] < value:
            values[at] = values[(at - 1) // 2]
            at = (at - 1) // 2
        values[at] = value
    for end in range(count, values.size):
        if values[end] < values[0]:
            values[0] = values[end]
            sink(values, count)


@njit(nogil=True, cache=True)
def kth_largest(keys, best):
    """Return the best.size-th largest key, or LOWEST if there are fewer keys."""
    last = best.size - 1
    if best.size > keys.size:
        return LOWEST
    if best.size > FEW:
        # Ascending in the order of `candidate_of`.
        least = (np.int64(MAGNITUDE) - keys).astype(np.uint64)
        keep_least(least, best.size)
        return np.int32(np.int64(MAGNITUDE) - np.int64(least[0]))
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
def candidate_of(bits, at):
    """Return a sort key for a logit: ascending keys order larger logits first, NaN last, equal logits by index."""
    key = key_of(bits[at]) if bits[at] & MAGNITUDE <= INFINITY else LOWEST
    return np.uint64(np.int64(MAGNITUDE) - np.int64(key)) << np.uint64(32) | np.uint64(at)


@njit(nogil=True, cache=True)
def candidates_of(bits, maxima, bound, found):
    """Write the sort key of every logit that reaches the bound, and return their number."""
    count = 0
    worst = np.uint64(np.int64(MAGNITUDE) - np.int64(bound)) << np.uint64(32) | np.uint64(0xFFFFFFFF)
    length = bits.size // STRETCHES
    for i in range(length):
        if maxima[i] >= bound:
            for at in range(i, STRETCHES * length, length):
                candidate = candidate_of(bits, at)
                if candidate <= worst:
                    found[count] = candidate
                    count += 1
    for at in range(STRETCHES * length, bits.size):
        candidate = candidate_of(bits, at)
        if candidate <= worst:
            found[count] = candidate
            count += 1
    return count


@njit(nogil=True, cache=True)
def sort_least(found, count):
    """Sort the `count` smallest to the front."""
    if found.size > FEW:
        keep_least(found, count)
        for last in range(count - 1, 0, -1):
            found[0], found[last] = found[last], found[0]
            sink(found, last)
        return
    for i in range(1, found.size):
        candidate = found[i]
        at = i
        while at > 0 and found[at - 1] > candidate:
            found[at] = found[at - 1]
            at -= 1
        found[at] = candidate


@njit(nogil=True, cache=True)
def rows(logits, bits, probabilities, indices):
    """Compute all rows; `bits` is a view of `logits` as int32."""
    n, m = logits.shape
    k = indices.shape[1]
    maxima, best = np.empty(m // STRETCHES + 1, np.int32), np.empty(k, np.int32)
    found = np.empty(m, np.uint64)
    for i in range(n):
        numbers = maxima_of(bits[i], maxima) <= INFINITY
        if numbers:
            bound = kth_largest(maxima, best)
        else:
            bound = LOWEST
            maxima[:] = MAGNITUDE
        chosen = found[: candidates_of(bits[i], maxima, bound, found)]
        sort_least(chosen, k)
        top = logits[i, chosen[0] & INDEX]
        # The formula gives NaN for a row with NaN or +inf, and for a row of only -inf.
        total = sum_of_exp(logits[i], top) if numbers and abs(top) < np.inf else np.float32(np.nan)
        for j in range(k):
            at = chosen[j] & INDEX
            indices[i, j] = at
            probabilities[i, j] = exp(logits[i, at] - top) / total


def run(logits: Array, probabilities: Array, indices: Array, stream: None = None) -> None:
    logits = frozen(logits.astype(np.float32, copy=False))
    rows(logits, logits.view(np.int32), probabilities, indices)
