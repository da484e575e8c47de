#include <cuda_fp16.h>

__device__ __forceinline__ float number(float x) { return x; }
__device__ __forceinline__ float number(__half x) { return __half2float(x); }

const int COLUMNS = 64, SPLITS = 4;

// blockIdx.x is the text. A block computes COLUMNS columns; each of its SPLITS thread rows adds every SPLITS-th token.
template <class T, class M>
__global__ void mean_of_tokens(const T* __restrict__ tokens, const M* __restrict__ mask, float* __restrict__ out, int t,
                               int d) {
    __shared__ float sums[SPLITS][COLUMNS];
    __shared__ int counts[SPLITS];
    int column = blockIdx.y * COLUMNS + threadIdx.x;
    const T* text = tokens + (long long)blockIdx.x * t * d;
    const M* counts_here = mask + (long long)blockIdx.x * t;
    float sum = 0.f;
    int count = 0;
    for (int i = threadIdx.y; i < t; i += SPLITS) {
        if (counts_here[i] != 0) {
            ++count;
            if (column < d) sum += number(text[(long long)i * d + column]);
        }
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    if (threadIdx.x == 0) counts[threadIdx.y] = count;
    __syncthreads();
    if (threadIdx.y != 0 || column >= d) return;
    for (int s = 1; s < SPLITS; ++s) {
        sum += sums[s][threadIdx.x];
        count += counts[s];
    }
    out[(long long)blockIdx.x * d + column] = count ? sum / (float)count : 0.f;
}

// One block per row, of 32 to 1024 threads, a multiple of 32. `out` may be `x`: a thread writes only elements that no
// other thread reads.
template <class T> __global__ void l2_normalize(const T* x, float* out, int d, float eps) {
    __shared__ float sums[32];
    const T* row = x + (long long)blockIdx.x * d;
    float squares = 0.f;
    for (int j = threadIdx.x; j < d; j += blockDim.x) {
        float value = number(row[j]);
        squares += value * value;
    }
    for (int lanes = 16; lanes; lanes >>= 1) squares += __shfl_xor_sync(0xffffffffu, squares, lanes);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = squares;
    __syncthreads();
    squares = 0.f;
    for (int w = 0; w < (int)blockDim.x / 32; ++w) squares += sums[w];
    float length = sqrtf(squares);
    float factor = 1.f / (length < eps ? eps : length);  // A NaN length stays NaN.
    for (int j = threadIdx.x; j < d; j += blockDim.x) out[(long long)blockIdx.x * d + j] = number(row[j]) * factor;
}
