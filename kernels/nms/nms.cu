typedef unsigned long long Word;

// Rank sort: each thread counts the boxes with a higher score, or an equal score and a lower index. The count is the
// position of its own box. `count` receives the number of boxes with a score >= `least` (never NaN).
__global__ void nms_order(const float* __restrict__ boxes, const float* __restrict__ scores,
                          const int* __restrict__ groups, int grouped, float least, int m, float4* __restrict__ corners,
                          int* __restrict__ group_of, int* __restrict__ index, int* __restrict__ count) {
    __shared__ float tile[256];  // Uses blockDim.x elements.
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    float mine = i < m ? scores[i] : 0.f;
    int before = 0, all = 0;
    for (int base = 0; base < m; base += blockDim.x) {
        int here = min((int)blockDim.x, m - base);
        __syncthreads();
        if ((int)threadIdx.x < here) tile[threadIdx.x] = scores[base + threadIdx.x];
        __syncthreads();
        for (int j = 0; j < here; ++j) {
            float other = tile[j];
            bool counts = other >= least;
            all += counts;
            before += counts && (other > mine || (other == mine && base + j < i));
        }
    }
    if (i == 0) *count = all;
    if (i >= m || !(mine >= least)) return;
    const float* box = boxes + 4ll * i;
    corners[before] = make_float4(box[0], box[1], box[2], box[3]);
    group_of[before] = grouped ? groups[i] : 0;
    index[before] = i;
}

__device__ __forceinline__ float side(float low, float high) {
    float side = high - low;
    return side > 0.f ? side : 0.f;
}

// NaN when a coordinate is NaN: then every IoU is NaN, and suppresses nothing. __fmul_rn, here and below, prevents a
// fused multiply-add, whose different rounding would sometimes keep other boxes than the CPU.
__device__ __forceinline__ float area_of(float4 b) {
    if (b.x != b.x || b.y != b.y || b.z != b.z || b.w != b.w) return __int_as_float(0x7fffffff);
    return __fmul_rn(side(b.x, b.z), side(b.y, b.w));
}

__device__ __forceinline__ bool overlaps(float4 a, float area_a, float4 b, float area_b, float threshold) {
    float w = side(fmaxf(a.x, b.x), fminf(a.z, b.z)), h = side(fmaxf(a.y, b.y), fminf(a.w, b.w));
    float both = __fmul_rn(w, h);
    return both / (area_a + area_b - both) > threshold;
}

// Bit c of matrix[r][b] is set when box r suppresses the later box 64 b + c. A block of 64 threads computes 64 x 64
// pairs. Words before the diagonal are neither written nor read.
__global__ void nms_matrix(const float4* __restrict__ corners, const int* __restrict__ group_of,
                           const int* __restrict__ count, float threshold, int m, Word* __restrict__ matrix) {
    __shared__ float4 box[64];
    __shared__ float area[64];
    __shared__ int group[64];
    int boxes = *count, first = blockIdx.x * 64, row = blockIdx.y * 64 + threadIdx.x;
    // The whole block returns, so that no thread waits at the barrier below.
    if (blockIdx.x < blockIdx.y || first >= boxes) return;
    int here = min(64, boxes - first);
    if ((int)threadIdx.x < here) {
        box[threadIdx.x] = corners[first + threadIdx.x];
        area[threadIdx.x] = area_of(box[threadIdx.x]);
        group[threadIdx.x] = group_of[first + threadIdx.x];
    }
    __syncthreads();
    if (row >= boxes) return;
    float4 mine = corners[row];
    float my_area = area_of(mine);
    int my_group = group_of[row];
    Word word = 0;
    for (int c = 0; c < here; ++c)
        if (first + c > row && group[c] == my_group && overlaps(mine, my_area, box[c], area[c], threshold))
            word |= 1ull << c;
    matrix[(long long)row * ((m + 63) / 64) + blockIdx.x] = word;
}

// One block, 64 boxes per step: one thread selects the kept boxes by the words on the diagonal, then all threads mark
// the later boxes that these suppress. Shared memory: one word for each 64 boxes.
__global__ void nms_sweep(const Word* __restrict__ matrix, const int* __restrict__ index, const int* __restrict__ count,
                          int m, long long* __restrict__ out, int most) {
    extern __shared__ Word suppressed[];
    __shared__ Word diagonal[64];
    __shared__ Word decided;
    int boxes = m ? *count : 0, words = (boxes + 63) / 64, stride = (m + 63) / 64, total = 0;
    for (int w = threadIdx.x; w < words; w += blockDim.x) suppressed[w] = 0;
    for (int b = 0; b < words && total < most; ++b) {
        int here = min(64, boxes - 64 * b);
        const Word* rows = matrix + 64ll * b * stride;
        if ((int)threadIdx.x < here) diagonal[threadIdx.x] = rows[(long long)threadIdx.x * stride + b];
        __syncthreads();
        if (threadIdx.x == 0) {
            Word dropped = suppressed[b], kept = 0;
            for (int r = 0; r < here; ++r)
                if (!(dropped >> r & 1)) {
                    kept |= 1ull << r;
                    dropped |= diagonal[r];
                }
            decided = kept;
        }
        __syncthreads();
        Word kept = decided;
        if ((int)threadIdx.x < here && kept >> threadIdx.x & 1) {
            int at = total + __popcll(kept & ((1ull << threadIdx.x) - 1));
            if (at < most) out[at] = index[64 * b + threadIdx.x];
        }
        for (int w = b + 1 + threadIdx.x; w < words; w += blockDim.x) {
            Word word = suppressed[w];
            for (Word left = kept; left; left &= left - 1)
                word |= rows[(long long)(__ffsll((long long)left) - 1) * stride + w];
            suppressed[w] = word;
        }
        // No barrier here: the next barrier precedes every read of `suppressed` and every write of `decided`.
        total += __popcll(kept);
    }
    for (int i = min(total, most) + threadIdx.x; i < most; i += blockDim.x) out[i] = -1;
}
