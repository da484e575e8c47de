// Softmax and top k with one block per row. A logit and its index are packed into one rank, larger for a better logit:
//
//     63                 32 31                 0
//     |  order of the logit | 2^32 - 1 - index |     larger logits first, equal ones by index, NaN (order 0) last
//
// Each thread keeps the best rank of its logits (every blockDim.x-th). The maximum over the threads is the row's next
// result; only the thread that held it searches its logits again. Rank 0 means no logit.
#include <cuda_fp16.h>

typedef unsigned long long Rank;

__device__ __forceinline__ float number(float x) { return x; }
__device__ __forceinline__ float number(__half x) { return __half2float(x); }

__device__ __forceinline__ Rank rank_of(float x, unsigned index) {
    unsigned bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
    // Both zeros map to 2^31. -inf maps to 0x00800000, above NaN.
    unsigned order = magnitude > 0x7f800000u ? 0u : bits >> 31 ? 0x80000000u - magnitude : 0x80000000u + magnitude;
    return (Rank)order << 32 | (0xffffffffu - index);
}

__device__ __forceinline__ int index_of(Rank rank) { return (int)(0xffffffffu - (unsigned)rank); }

// Returns the best rank of this thread's logits below `last`.
template <class T> __device__ __forceinline__ Rank best_after(Rank last, const T* row, int m) {
    Rank best = 0;
    for (int i = threadIdx.x; i < m; i += blockDim.x) {
        Rank rank = rank_of(number(row[i]), (unsigned)i);
        if (rank < last && rank > best) best = rank;
    }
    return best;
}

__device__ __forceinline__ Rank block_max(Rank value, Rank* warps) {
    for (int lanes = 16; lanes; lanes >>= 1) value = max(value, __shfl_xor_sync(0xffffffffu, value, lanes));
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
    __syncthreads();
    for (int w = 0; w < (int)blockDim.x / 32; ++w) value = max(value, warps[w]);
    // The next call must not write `warps` before all threads have read it.
    __syncthreads();
    return value;
}

__device__ __forceinline__ float block_sum(float value, float* warps) {
    for (int lanes = 16; lanes; lanes >>= 1) value += __shfl_xor_sync(0xffffffffu, value, lanes);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
    __syncthreads();
    value = 0.f;
    for (int w = 0; w < (int)blockDim.x / 32; ++w) value += warps[w];
    return value;
}

// blockDim.x must be a multiple of 32, at most 1024.
template <class T>
__global__ void softmax_topk(const T* __restrict__ logits, float* __restrict__ probabilities,
                             long long* __restrict__ indices, int m, int k) {
    __shared__ Rank best_of_warps[32];
    __shared__ float sum_of_warps[32];
    const T* row = logits + (long long)blockIdx.x * m;
    float* p = probabilities + (long long)blockIdx.x * k;
    long long* at = indices + (long long)blockIdx.x * k;

    Rank mine = best_after(~0ull, row, m);
    Rank next = block_max(mine, best_of_warps);
    float top = number(row[index_of(next)]);
    // NaN and infinities propagate: inf - inf is NaN, and a NaN makes the sum NaN.
    float sum = 0.f;
    for (int i = threadIdx.x; i < m; i += blockDim.x) sum += expf(number(row[i]) - top);
    sum = block_sum(sum, sum_of_warps);

    for (int j = 0; j < k; ++j) {
        if (threadIdx.x == 0) {
            int index = index_of(next);
            at[j] = index;
            p[j] = expf(number(row[index]) - top) / sum;
        }
        if (mine == next) mine = best_after(next, row, m);
        if (j + 1 < k) next = block_max(mine, best_of_warps);
    }
}
