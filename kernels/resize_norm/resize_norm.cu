// Resize of a ragged batch of uint8 images to one size, with scale, bias and layout, in one launch: triangle filter.
//
// A block computes 8 rows x 32 columns of one output, one row per warp:
//
//   vertical    source rows ──128-bit loads, 16 columns of bytes per lane──> 16 sums per lane ──> shared line of floats
//   horizontal  shared lines ──a pixel per thread, 8 rows x 4 columns per warp──> pixel ──> shared ──> coalesced stores
//
// Two warps with overlapping filters read the same source rows; the second read hits L1. Lines of different rows start
// 4 banks apart, and concurrent reads are from 8 rows, so there are no bank conflicts at any scale. A pixel of three
// channels occupies 4 words of a line and is read with one 128-bit load.
//
// Rows of a multiple of 16 bytes (widths of a multiple of 16 pixels: 640, 1280, 1920) have equal alignment. Other rows
// are assembled from two loads (Shifted). For 64 frames of 1920 x 1080 to 224 x 224, the estimate is 1400
// instructions per warp and row, 880 of them vertical: 64 byte-sums in 176. Never run on a GPU so far.
#include <cuda_fp16.h>

struct Image {  // 32 bytes, a row of the table.
    long long offset;
    int height, width;
    float y0, x0, sy, sx;
};


constexpr int kRows = 8, kColumns = 32;
constexpr int kSlots = 2;           // Loads per lane of one source row before the horizontal pass.
constexpr int kLineWords = 1380;    // 4 modulo 32, see above; 320 pixels of 4 words, and 4 words for every 16 pixels.

// Converts x, byte `at` of a word, to float. Exact: (2^23 + x) - 2^23. Fast: 2^15 + x, also exact; the caller subtracts
// 2^15 times the sum of weights once at the end, with a rounding error of at most 0.02 grey levels for 10 rows.
template <bool Exact> __device__ __forceinline__ float byte_as_float(unsigned word, int at) {
    if (Exact) return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 + at)) - 8388608.f;
    return __uint_as_float(__byte_perm(word, 0x47000000u, 0x7404 + (at << 4)));
}

template <bool Exact> __device__ __forceinline__ void add_bytes(float (&sums)[16], const uint4& v, float weight) {
    const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 16; ++i) sums[i] = fmaf(weight, byte_as_float<Exact>(words[i / 4], i % 4), sums[i]);
}

__device__ __forceinline__ float triangle(int at, float centre, float inverse_reach) {
    return fmaxf(1.f - fabsf((float)at + 0.5f - centre) * inverse_reach, 0.f);
}

__device__ __forceinline__ uint4 load(const unsigned char* at) { return __ldg(reinterpret_cast<const uint4*>(at)); }

// Loads 16 bytes from an unaligned address; at least the first byte is before `end`. A warp has one shift.
__device__ __forceinline__ uint4 load_shifted(const unsigned char* at, const unsigned char* end) {
    const int shift = (int)((size_t)at & 15);
    at -= shift;
    uint4 low = load(at), high = make_uint4(0, 0, 0, 0);
    if (shift && at + 16 < end) high = load(at + 16);
    if (shift & 8) {
        low.x = low.z, low.y = low.w, low.z = high.x, low.w = high.y;
        high.x = high.z, high.y = high.w;
    }
    if (shift & 4) {
        low.x = low.y, low.y = low.z, low.z = low.w, low.w = high.x;
        high.x = high.y;
    }
    const unsigned bits = (shift & 3) * 8;
    return make_uint4(__funnelshift_r(low.x, low.y, bits), __funnelshift_r(low.y, low.z, bits),
                      __funnelshift_r(low.z, low.w, bits), __funnelshift_r(low.w, high.x, bits));
}

// Adds the 16 bytes at `at` + row * `pitch`, for rows [first, last), to the sums, and returns the sum of weights.
template <bool Shifted, bool Exact>
__device__ __forceinline__ float vertical(float (&sums)[16], const unsigned char* at, const unsigned char* end, int pitch,
                                          int first, int last, float centre, float inverse_reach) {
    // Rows in flight per lane. Two shifted rows would spill registers on sm_80.
    constexpr int kAtOnce = Shifted ? 1 : 4;
    float total = 0.f;
    at += (long long)first * pitch;
    int y = first;
    for (; y + kAtOnce <= last; y += kAtOnce) {
        uint4 v[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i, at += pitch)
            v[i] = Shifted ? load_shifted(at, end) : load(at);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const float weight = triangle(y + i, centre, inverse_reach);
            total += weight;
            add_bytes<Exact>(sums, v[i], weight);
        }
    }
    for (; y < last; ++y, at += pitch) {
        const uint4 v = Shifted ? load_shifted(at, end) : load(at);
        const float weight = triangle(y, centre, inverse_reach);
        total += weight;
        add_bytes<Exact>(sums, v, weight);
    }
    return total;
}

// Line in shared memory: lanes write 16 sums each, threads read pixels. 4 words of padding after every 16 pixels limit
// bank conflicts of concurrent writes to two-way.
template <int Channels> struct Pixel {};

__device__ __forceinline__ void put(float* line, int slot, int lane, const float (&sums)[16], Pixel<1>) {
    float4* to = reinterpret_cast<float4*>(line + (slot * 32 + lane) * 20);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
}

// Three lanes hold 16 pixels. Byte n of the 48 goes to word n + n / 3; lane % 3 determines which bytes begin a pixel.
__device__ __forceinline__ void put(float* line, int slot, int lane, const float (&sums)[16], Pixel<3>) {
    const int phase = lane % 3, byte = phase * 16;
    line += (slot * 10 + lane / 3) * 68 + byte + byte / 3;
    float* const to[3] = {line, line + (phase == 2), line + (phase >= 1)};
#pragma unroll
    for (int i = 0; i < 16; ++i) to[i % 3][i + i / 3] = sums[i];
}

__device__ __forceinline__ void add_pixel(float (&sum)[1], const float* line, int x, float weight) {
    sum[0] = fmaf(weight, line[x + (x >> 4) * 4], sum[0]);
}

__device__ __forceinline__ void add_pixel(float (&sum)[3], const float* line, int x, float weight) {
    const float4 pixel = reinterpret_cast<const float4*>(line)[x + (x >> 4)];
    sum[0] = fmaf(weight, pixel.x, sum[0]);
    sum[1] = fmaf(weight, pixel.y, sum[1]);
    sum[2] = fmaf(weight, pixel.z, sum[2]);
}

__device__ __forceinline__ float as(float value, float) { return value; }
__device__ __forceinline__ __half as(float value, __half) { return __float2half_rn(value); }
__device__ __forceinline__ unsigned char as(float value, unsigned char) {
    return (unsigned char)__float2int_rd(fminf(fmaxf(value + 0.5f, 0.f), 255.f));
}

template <typename T, int Channels>
__global__ void __launch_bounds__(256, 4)
    resize_norm(const unsigned char* __restrict__ pixels, const Image* __restrict__ table, T* __restrict__ out,
                long long bytes, int out_h, int out_w, int antialias, int channels_first, int swap, float scale0,
                float scale1, float scale2, float bias0, float bias1, float bias2) {
    constexpr bool kExact = sizeof(T) == 4;  // Half precision has a resolution of 0.06 grey levels at best.
    // 30 lanes of 16 bytes are exactly 160 pixels of three channels.
    constexpr int kLanes = Channels == 3 ? 30 : 32;
    constexpr int kSlotPixels = kLanes * 16 / Channels;
    constexpr int kStripPixels = kSlots * kSlotPixels;
    __shared__ __align__(16) float lines[kRows * kLineWords];
    __shared__ __align__(16) float made[kRows * kColumns * 4];  // Per pixel: up to three channels, and the weight sum.
    __shared__ Image shared_image;

    const int lane = threadIdx.x, warp = threadIdx.y;
    const int column0 = blockIdx.x * kColumns, row0 = blockIdx.y * kRows;
    // In shared memory, so that values of the horizontal pass occupy no registers during the vertical pass.
    if (lane == 0 && warp == 0) shared_image = table[blockIdx.z];
    __syncthreads();
    const Image image = shared_image;
    const int pitch = image.width * Channels;
    const bool aligned = pitch % 16 == 0;

    const int row = row0 + warp;
    const float reach_y = antialias ? fmaxf(image.sy, 1.f) : 1.f, inverse_y = 1.f / reach_y;
    const float centre_y = fmaf((float)row + 0.5f, image.sy, image.y0);
    const int top = max(__float2int_rz(centre_y - reach_y + 0.5f), 0);
    const int bottom = row < out_h ? min(__float2int_rz(centre_y + reach_y + 0.5f), image.height) : top;

    // Range of source columns under this block's filters.
    const float reach_x = antialias ? fmaxf(image.sx, 1.f) : 1.f;
    const int last_column = min(column0 + kColumns, out_w) - 1;
    int left = max(__float2int_rz(fmaf((float)column0 + 0.5f, image.sx, image.x0) - reach_x + 0.5f), 0);
    const int right =
        min(__float2int_rz(fmaf((float)last_column + 0.5f, image.sx, image.x0) + reach_x + 0.5f), image.width);
    // Move `left` to a pixel that begins at a multiple of 16 bytes. 11 is the inverse of 3 modulo 16.
    if (aligned) {
        const int shift = (int)((image.offset + (long long)left * Channels) & 15);
        left -= Channels == 3 ? (shift * 11) & 15 : shift;
    }

    // Pixel that this thread computes in the horizontal pass.
    const int my_row = lane & 7, my_column = warp * 4 + (lane >> 3);
    float* const mine = made + (my_row * kColumns + my_column) * 4;
#pragma unroll
    for (int c = 0; c < 4; ++c) mine[c] = 0.f;

    for (int strip = left; strip < right; strip += kStripPixels) {
        for (int slot = 0; slot < kSlots; ++slot) {
            const int from = strip + slot * kSlotPixels;
            if (from >= right) break;
            // Lanes without a byte of [0, right) skip the load, so that all loads stay inside the buffer.
            if (lane < kLanes && lane * 16 < (right - from) * Channels && lane * 16 + 16 > -from * Channels && row < out_h) {
                float sums[16];
#pragma unroll
                for (int i = 0; i < 16; ++i) sums[i] = 0.f;
                const unsigned char* at = pixels + image.offset + (long long)from * Channels + lane * 16;
                const float total =
                    aligned
                        ? vertical<false, kExact>(sums, at, pixels + bytes, pitch, top, bottom, centre_y, inverse_y)
                        : vertical<true, kExact>(sums, at, pixels + bytes, pitch, top, bottom, centre_y, inverse_y);
                const float inverse = 1.f / total, offset = kExact ? 0.f : -32768.f * total;
#pragma unroll
                for (int i = 0; i < 16; ++i) sums[i] = (sums[i] + offset) * inverse;
                put(lines + warp * kLineWords, slot, lane, sums, Pixel<Channels>());
            }
        }
        __syncthreads();
        if (row0 + my_row < out_h && column0 + my_column < out_w) {
            const float* line = lines + my_row * kLineWords;
            const float sx = shared_image.sx, reach_x = antialias ? fmaxf(sx, 1.f) : 1.f, inverse_x = 1.f / reach_x;
            const float centre_x = fmaf((float)(column0 + my_column) + 0.5f, sx, shared_image.x0);
            const int begin = max(max(__float2int_rz(centre_x - reach_x + 0.5f), 0), strip);
            const int end =
                min(min(__float2int_rz(centre_x + reach_x + 0.5f), shared_image.width), strip + kStripPixels);
            float sum[Channels], total = mine[3];
#pragma unroll
            for (int c = 0; c < Channels; ++c) sum[c] = mine[c];
            float from_centre = (float)begin + 0.5f - centre_x;
            for (int x = begin - strip; x < end - strip; ++x, from_centre += 1.f) {
                const float weight = fmaxf(1.f - fabsf(from_centre) * inverse_x, 0.f);
                total += weight;
                add_pixel(sum, line, x, weight);
            }
#pragma unroll
            for (int c = 0; c < Channels; ++c) mine[c] = sum[c];
            mine[3] = total;
        }
        __syncthreads();
    }

    const float scales[3] = {scale0, scale1, scale2}, biases[3] = {bias0, bias1, bias2};
    const float inverse = 1.f / mine[3];
#pragma unroll
    for (int c = 0; c < Channels; ++c) mine[c] = fmaf(mine[c] * inverse, scales[c], biases[c]);
    __syncthreads();

    // Coalesced stores: neighbouring threads write neighbouring values.
    const long long plane = (long long)out_h * out_w;
    T* const result = out + (long long)blockIdx.z * plane * Channels;
    for (unsigned i = warp * 32 + lane; i < kRows * kColumns * Channels; i += 256) {
        unsigned r, column, c;
        if (channels_first) {
            column = i % kColumns, r = i / kColumns % kRows, c = i / (kColumns * kRows);
        } else {
            c = i % Channels, column = i / Channels % kColumns, r = i / (Channels * kColumns);
        }
        if ((int)(row0 + r) >= out_h || (int)(column0 + column) >= out_w) continue;
        const unsigned source = swap ? Channels - 1 - c : c;
        const T value = as(made[(r * kColumns + column) * 4 + source], T());
        const long long pixel = (long long)(row0 + r) * out_w + column0 + column;
        result[channels_first ? c * plane + pixel : pixel * Channels + c] = value;
    }
}
