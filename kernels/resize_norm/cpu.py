"""resize_norm on the CPU: a vertical filter along source rows, then a horizontal filter with a constant tap count.

Where the output is twice as high as its source or higher, the horizontal filter comes first, once for each source row:
a low image that is very wide would be filtered once for each row of the output.

The vertical pass reads four source rows at a time in order, so the line of sums is loaded and stored a quarter as
often. LLVM vectorises its loop. The horizontal pass has the same number of taps for every pixel, padded with zero
weights, and sums the three channels in one vector.

A call is one thread that does not hold the GIL. With a pool, each image, or each band of rows when there are few
images, is one task. numba's own threading is not used: its threading layers abort or hang when several threads or a
forked child use them.
"""

from __future__ import annotations

from concurrent.futures import Executor
from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.resize_norm.images import CHANNELS_FIRST, Affine, Array, Packed, Unpacked

# Sums may be reordered; NaN and infinity keep their meaning.
_FAST = {"contract", "reassoc", "nsz", "arcp"}
# Number of tasks per image when a pool gets few images.
_BANDS = 4


def run(
    images: Packed | Unpacked,
    out: Array,
    *,
    affine: Affine,
    antialias: bool,
    layout: str,
    pool: Executor | None,
    **_: Any,
) -> None:
    table = images.table
    # A read-only or unaligned array has another numba type, which would be compiled during the request.
    if not (table.flags.writeable and table.flags.aligned):
        table = table.copy()
    if isinstance(images, Unpacked):
        addresses = np.array([array.ctypes.data for array in images.arrays], np.int64)
    else:
        addresses = images.pixels.ctypes.data + table["offset"]
    channels_first = layout == CHANNELS_FIRST
    out_h, out_w = out.shape[2:] if channels_first else out.shape[1:3]
    # numba does not support float16 on CPUs: the kernel computes its bits as uint16.
    flat = (out.view(np.uint16) if out.dtype == np.float16 else out).reshape(len(table), -1)
    order = np.array(affine.order, np.int64)
    arguments = (addresses, table, affine.scale, affine.bias, order, antialias, channels_first, out_h, out_w, flat)
    if pool is None:
        resize_images(*arguments, 0, len(table), 0, out_h)
        return
    bands = 1 if len(table) >= 2 * _BANDS else min(_BANDS, out_h)
    tasks = [
        pool.submit(partial(resize_images, *arguments, n, n + 1, out_h * band // bands, out_h * (band + 1) // bands))
        for n in range(len(table))
        for band in range(bands)
    ]
    for task in tasks:
        task.result()


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    """Convert an address to a pointer to bytes, for `carray`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.CPointer(types.uint8)(types.int64), generate


@njit(nogil=True, cache=True)
def taps_of(size, start, scale, count, antialias, first, weights):
    """Compute the taps of the triangle filter: output i sums weights[i] * source[first[i]:first[i] + taps].

    Returns the number of taps, equal for all outputs. `first` is chosen so that all taps are inside the source.
    """
    reach = max(scale, 1.0) if antialias else 1.0
    most = 0
    for i in range(count):
        centre = start + (i + 0.5) * scale
        low = max(int(centre - reach + 0.5), 0)
        high = min(int(centre + reach + 0.5), size)
        first[i] = low
        most = max(most, high - low)
    for i in range(count):
        centre = start + (i + 0.5) * scale
        first[i] = min(first[i], size - most)
        total = 0.0
        for k in range(most):
            total += max(0.0, 1.0 - abs((first[i] + k + 0.5 - centre) / reach))
        for k in range(most):
            weights[i, k] = max(0.0, 1.0 - abs((first[i] + k + 0.5 - centre) / reach)) / total
    return most


@njit(nogil=True, cache=True, fastmath=_FAST)
def blend_rows(source, start, pitch, weights, count, line):
    """Compute line = the weighted sum of `count` source rows; the first begins at `start`."""
    size = line.size
    k = 0
    while k < count:
        # With slices that begin at 0, the compiler can prove that no index is negative.
        a = source[start + k * pitch :][:size]
        b = source[start + min(k + 1, count - 1) * pitch :][:size]
        wa = weights[k]
        left = count - k
        if left >= 4:
            c = source[start + (k + 2) * pitch :][:size]
            d = source[start + (k + 3) * pitch :][:size]
            wb, wc, wd = weights[k + 1], weights[k + 2], weights[k + 3]
            if k:
                for x in range(size):
                    line[x] += (
                        wa * np.float32(a[x]) + wb * np.float32(b[x]) + wc * np.float32(c[x]) + wd * np.float32(d[x])
                    )
            else:
                for x in range(size):
                    line[x] = (
                        wa * np.float32(a[x]) + wb * np.float32(b[x]) + wc * np.float32(c[x]) + wd * np.float32(d[x])
                    )
            k += 4
        else:
            # Two rows per step; after a single last row, the second weight is 0.
            wb = weights[k + 1] if left >= 2 else np.float32(0)
            if k:
                for x in range(size):
                    line[x] += wa * np.float32(a[x]) + wb * np.float32(b[x])
            else:
                for x in range(size):
                    line[x] = wa * np.float32(a[x]) + wb * np.float32(b[x])
            k += 2


@intrinsic
def _blend_pixels(typing_context: Any, line: Any, at: Any, weights: Any, z: Any, taps: Any, sums: Any, x: Any) -> Any:
    """Compute sums[x : x + 4] = the weighted sum of `taps` vectors of four floats, at a distance of three floats.

    A vector holds three channels of a pixel. Its fourth float belongs to the next pixel, and its sum is not used. LLVM
    does not find this vectorisation. A row of 224 pixels with 8 taps takes 0.95 us, and 1.9 us as a loop over three
    sums.
    """
    vector = ir.VectorType(ir.FloatType(), 4)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def pointer(n: int, index: Any) -> Any:
            data = context.make_array(signature.args[n])(context, builder, args[n]).data
            return builder.gep(data, [index])

        def as_vector(address: Any) -> Any:
            return builder.bitcast(address, vector.as_pointer())

        three = ir.Constant(args[1].type, 3)
        total = cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * 4))
        position = cgutils.alloca_once_value(builder, args[1])
        with cgutils.for_range(builder, args[4]) as loop:
            index = builder.load(position)
            pixel = builder.load(as_vector(pointer(0, index)), align=4)
            weight = builder.load(pointer(2, builder.add(args[3], loop.index)))
            spread = builder.insert_element(ir.Constant(vector, ir.Undefined), weight, ir.Constant(ir.IntType(32), 0))
            spread = builder.shuffle_vector(
                spread, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), 4), [0] * 4)
            )
            product = builder.fmul(spread, pixel, flags=("contract",))
            builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
            builder.store(builder.add(index, three), position)
        builder.store(builder.load(total), as_vector(pointer(5, args[6])), align=4)
        return context.get_dummy_value()

    return types.void(line, types.int64, weights, types.int64, types.int64, sums, types.int64), generate


@njit(nogil=True, cache=True, fastmath=_FAST)
def blend_columns(line, begin, weights, taps, channels, sums):
    """Compute sums[4 x + c] = the weighted sum of `taps` pixels of the line; the first begins at begin[x]."""
    if channels == 3:
        for x in range(begin.size):
            _blend_pixels(line, begin[x], weights, x * taps, taps, sums, 4 * x)
    else:
        one, many = np.uint32(1), np.uint32(taps)
        z = np.uint32(0)
        for x in range(begin.size):
            total = np.float32(0)
            p = np.uint32(begin[x])
            for _ in range(many):
                total += weights[z] * line[p]
                z += one
                p += one
            sums[4 * x] = total


@njit(nogil=True, cache=True, fastmath=_FAST)
def round_line(values, scratch, out):
    """Convert finite float32 to out's dtype: float32, uint8 (nearest, 0 to 255), or float16 as its bits in uint16."""
    if isinstance(out[0], np.uint8):
        for x in range(values.size):
            out[x] = np.uint8(min(max(values[x] + np.float32(0.5), np.float32(0)), np.float32(255)))
    elif isinstance(out[0], np.uint16):
        # For subnormal halves, below 2^-14, this addition rounds: the last place of 0.5 is 2^-24.
        for x in range(values.size):
            scratch[x] = abs(values[x]) + np.float32(0.5)
        bits = values.view(np.uint32)
        small = scratch.view(np.uint32)
        for x in range(values.size):
            size = np.int32(bits[x] & np.uint32(0x7FFFFFFF))
            half = (size + np.int32(0xFFF) + ((size >> 13) & 1) - np.int32(0x38000000)) >> 13
            half = min(half, 0x7C00)
            if size < 0x38800000:
                half = np.int32(small[x]) - 0x3F000000
            out[x] = np.uint16(half | ((bits[x] >> 16) & 0x8000))
    else:
        for x in range(values.size):
            out[x] = values[x]


@njit(nogil=True, cache=True, fastmath=_FAST)
def resize_images(
    addresses,
    table,
    scale,
    bias,
    order,
    antialias,
    channels_first,
    out_h,
    out_w,
    out,
    first_image,
    end_image,
    first_row,
    end_row,
):
    """Write rows [first_row, end_row) of images [first_image, end_image) to out [n, pixels of an output]."""
    channels = scale.size
    sums = np.empty(4 * out_w, np.float32)
    line_out = np.empty(channels * out_w, np.float32)
    scratch = np.empty(channels * out_w, np.float32)
    whole = np.ones(1, np.float32)
    for n in range(first_image, end_image):
        height, width = table[n]["height"], table[n]["width"]
        sy, sx = float(table[n]["sy"]), float(table[n]["sx"])
        pitch = width * channels
        source = carray(_pointer(addresses[n]), (height * pitch,), np.uint8)

        across = np.empty((out_w, 2 * int(max(sx, 1.0) + 1) + 2), np.float32)
        first = np.empty(out_w, np.int64)
        taps = taps_of(width, float(table[n]["x0"]), sx, out_w, antialias, first, across)
        weights = np.empty(out_w * taps, np.float32)
        begin = np.empty(out_w, np.int64)
        for x in range(out_w):
            begin[x] = (first[x] - first[0]) * channels
            for k in range(taps):
                weights[x * taps + k] = across[x, k]
        low = first[0] * channels
        high = (first[out_w - 1] + taps) * channels

        down = np.empty((out_h, 2 * int(max(sy, 1.0) + 1) + 2), np.float32)
        top = np.empty(out_h, np.int64)
        rows = taps_of(height, float(table[n]["y0"]), sy, out_h, antialias, top, down)
        # One extra float for the vector of four at the last pixel.
        line = np.zeros(high - low + 1, np.float32)
        is_upscaled = sy < 0.5
        # Source rows as wide as the output. Row r is in line r % rows: outputs need `rows` of them, in order.
        resized = np.empty((rows if is_upscaled else 0, 4 * out_w), np.float32)
        held = np.full(rows, -1)
        for y in range(first_row, end_row):
            # Skip the zero weights at both ends, which pad the number of taps.
            begin_k, end_k = 0, rows
            while begin_k < end_k - 1 and down[y, begin_k] == 0:
                begin_k += 1
            while end_k > begin_k + 1 and down[y, end_k - 1] == 0:
                end_k -= 1
            if is_upscaled:
                sums[:] = 0
                for k in range(begin_k, end_k):
                    row = top[y] + k
                    at = row % rows
                    if held[at] != row:
                        blend_rows(source, row * pitch + low, pitch, whole, 1, line[: high - low])
                        blend_columns(line, begin, weights, taps, channels, resized[at])
                        held[at] = row
                    for x in range(sums.size):
                        sums[x] += down[y, k] * resized[at, x]
            else:
                start = (top[y] + begin_k) * pitch + low
                blend_rows(source, start, pitch, down[y, begin_k:end_k], end_k - begin_k, line[: high - low])
                blend_columns(line, begin, weights, taps, channels, sums)
            for c in range(channels):
                s = order[c]
                if channels_first:
                    for x in range(out_w):
                        line_out[x] = sums[4 * x + s] * scale[s] + bias[s]
                    at = (c * out_h + y) * out_w
                    round_line(line_out[:out_w], scratch, out[n, at : at + out_w])
                else:
                    for x in range(out_w):
                        line_out[x * channels + c] = sums[4 * x + s] * scale[s] + bias[s]
            if not channels_first:
                at = y * out_w * channels
                round_line(line_out, scratch, out[n, at : at + out_w * channels])
