// Kernels with one fault each, and right ones: tests of the shim itself.
#include <cuda_fp16.h>

__global__ void reverse(const int* in, int* out, int n) {
    __shared__ int tile[64];
    int t = threadIdx.x, at = blockIdx.x * 64;
    if (at + t < n) tile[t] = in[at + t];
    __syncthreads();
    int last = min(64, n - at) - 1;
    if (at + t < n) out[at + t] = tile[last - t];
}

__global__ void reverse_without_barrier(const int* in, int* out, int n) {
    extern __shared__ int tile[];
    int t = threadIdx.x;
    tile[t] = in[t];
    out[t] = tile[n - 1 - t];
}

template <typename T> __global__ void warp_sum(const float* in, T* out) {
    float sum = in[blockIdx.x * blockDim.x + threadIdx.x];
    for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    __shared__ float parts[32];
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        sum = 0;
        for (unsigned i = 0; i < blockDim.x / 32; ++i) sum += parts[i];
        out[blockIdx.x] = (T)sum;
    }
}

__global__ void half_way(const float* in, __half* out) { out[threadIdx.x] = __float2half_rn(in[threadIdx.x]); }
__global__ void one_too_many(int* out, int n) { out[threadIdx.x + (threadIdx.x == n - 1)] = 7; }
__global__ void one_before(const int* in, int* out) { out[threadIdx.x] = in[(int)threadIdx.x - 1]; }
__global__ void misaligned(const unsigned char* in, unsigned* out) { out[0] = reinterpret_cast<const uint4*>(in + 1)->x; }
__global__ void barrier_for_some(int* out) {
    int tile = threadIdx.x;
    if (threadIdx.x < 3) tile += __shfl_xor_sync(0xffffffffu, tile, 1);
    __syncthreads();
    out[threadIdx.x] = tile;
}
__global__ void reads_unwritten_shared(float* out) {
    extern __shared__ float shared[];
    out[threadIdx.x] = shared[threadIdx.x];
}
__global__ void votes(const int* in, int* out) { out[threadIdx.x] = __syncthreads_count(in[threadIdx.x] > 0); }
