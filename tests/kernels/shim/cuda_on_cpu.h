// CUDA C++ on the CPU, for tests: the kernel's own source, every thread of a block a fiber.
//
//   block:  fiber 0 | fiber 1 | ... one OS thread runs them in turn; one that waits at a barrier yields
//
// What it catches: a barrier that not every thread reaches, arrays overrun by a byte (guard pages), misaligned vector
// loads (UBSan traps), shared memory read before it is written (poisoned before each block), and, by running the fibers
// in either order, most missing barriers. What it cannot: true races, memory order, speed.
#pragma once
#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <sys/mman.h>
#include <tuple>
#include <type_traits>
#include <ucontext.h>
#include <unistd.h>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __CUDA_ON_CPU__ 1

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct alignas(4) uchar4 { unsigned char x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

static dim3 threadIdx, blockIdx, blockDim, gridDim;
static const int warpSize = 32;

namespace shim {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kMostSharedBytes = 227 * 1024;  // of an H100; sm_80 has 163 KB.
constexpr int kMostThreads = 1024;
enum Wait { kRuns, kAtBarrier, kAtWarp, kEnded };

struct Warp {
    unsigned char slots[2][32][16];
    unsigned arrived = 0, generation = 0;
};

struct Fiber {
    ucontext_t context;
    Wait wait = kEnded;
    unsigned waits_for = 0;
    dim3 index;
};

static ucontext_t scheduler;
static Fiber fibers[kMostThreads];
static Warp warps[kMostThreads / 32];
static char* stacks = nullptr;
static int current = 0, threads = 0;
static unsigned long long block_number = 0;
alignas(256) static unsigned char dynamic_memory[kMostSharedBytes];
static size_t dynamic_bytes = 0, static_bytes = 0;
static char message[512];
static sigjmp_buf on_fault;
static volatile uintptr_t fault_address = 0;
static void (*body)(void*) = nullptr;
static void* body_data = nullptr;
// Barriers that vote: what the threads said so far, and what the last barrier found.
static int votes = 0, vote_result = 0;

inline void yield() {
    int self = current;
    swapcontext(&fibers[self].context, &scheduler);
}

[[noreturn]] inline void fail(const char* what) {
    std::snprintf(message, sizeof message, "block (%u, %u, %u), thread (%u, %u, %u): %s", blockIdx.x, blockIdx.y,
                  blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z, what);
    siglongjmp(on_fault, 1);
}

inline int barrier(int vote) {
    votes += vote != 0;
    fibers[current].wait = kAtBarrier;
    yield();
    return vote_result;
}

// The lanes of a warp hand each other 16 bytes at most. Two sets of slots: a lane that runs ahead fills the other one.
template <class T> T exchange(unsigned mask, T value, int lane_to_read) {
    static_assert(sizeof(T) <= 16, "at most 16 bytes");
    Warp& warp = warps[current / 32];
    int lanes = std::min(32, threads - current / 32 * 32);
    unsigned full = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1u;
    if ((mask & full) != full) fail("a warp operation of a part of the warp is not supported here");
    unsigned generation = warp.generation;
    std::memcpy(warp.slots[generation & 1][current % 32], &value, sizeof(T));
    if (++warp.arrived == (unsigned)lanes) {
        warp.arrived = 0;
        ++warp.generation;
    }
    while (warp.generation == generation) {
        fibers[current].wait = kAtWarp;
        fibers[current].waits_for = generation;
        yield();
    }
    T got = value;
    if (lane_to_read >= 0 && lane_to_read < lanes) std::memcpy(&got, warp.slots[generation & 1][lane_to_read], sizeof(T));
    return got;
}

template <class T> T* dynamic_shared() { return reinterpret_cast<T*>(dynamic_memory); }

// A static __shared__ array: one storage for each place in the source, poisoned by the first thread of a block.
template <class T, int Place> T& block_static() {
    alignas(16) static unsigned char storage[sizeof(T)];
    static unsigned long long seen = 0;
    if (seen != block_number) {
        std::memset(storage, 0xff, sizeof(T));
        seen = block_number;
        static_bytes += sizeof(T);
        if (static_bytes > 48 * 1024) fail("more than 48 KB of static shared memory");
    }
    return *reinterpret_cast<T*>(storage);
}

inline void enter() {
    threadIdx = fibers[current].index;
    body(body_data);
    fibers[current].wait = kEnded;
    yield();
}

inline void start(int n) {
    Fiber& fiber = fibers[n];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks + n * kStackBytes;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
    fiber.wait = kRuns;
}

inline bool can_run(int n) {
    const Fiber& fiber = fibers[n];
    return fiber.wait == kRuns || (fiber.wait == kAtWarp && warps[n / 32].generation != fiber.waits_for);
}

inline void run_block(bool backward) {
    ++block_number;
    static_bytes = 0;
    votes = 0;
    std::memset(dynamic_memory, 0xff, dynamic_bytes);
    for (Warp& warp : warps) warp.arrived = 0, warp.generation = 0;
    for (int n = 0; n < threads; ++n) {
        unsigned x = n % blockDim.x, y = n / blockDim.x % blockDim.y, z = n / (blockDim.x * blockDim.y);
        fibers[n].index = {x, y, z};
        start(n);
    }
    for (;;) {
        int ran = 0, ended = 0, at_barrier = 0;
        for (int i = 0; i < threads; ++i) {
            int n = backward ? threads - 1 - i : i;
            if (can_run(n)) {
                fibers[n].wait = kRuns;
                current = n;
                threadIdx = fibers[n].index;
                swapcontext(&scheduler, &fibers[n].context);
                ++ran;
            }
        }
        for (int n = 0; n < threads; ++n) {
            ended += fibers[n].wait == kEnded;
            at_barrier += fibers[n].wait == kAtBarrier;
        }
        if (ended == threads) return;
        if (at_barrier + ended == threads) {
            vote_result = votes;
            votes = 0;
            for (int n = 0; n < threads; ++n)
                if (fibers[n].wait == kAtBarrier) fibers[n].wait = kRuns;
        } else if (!ran) {
            char told[160];
            std::snprintf(told, sizeof told, "deadlock: %d threads at a barrier, %d at a warp operation, %d ended",
                          at_barrier, threads - at_barrier - ended, ended);
            fail(told);
        }
    }
}

inline void caught(int signal, siginfo_t* info, void*) {
    fault_address = reinterpret_cast<uintptr_t>(info->si_addr);
    const char* what = signal == SIGSEGV || signal == SIGBUS
                           ? "memory outside of every array, or stack overflow"
                           : "undefined behaviour: a misaligned vector access, a bad index, shift, division or overflow";
    fail(what);
}

inline int launch(dim3 grid, dim3 block, size_t shared, bool backward, void (*kernel)(void*), void* data) {
    threads = block.x * block.y * block.z;
    message[0] = 0;
    fault_address = 0;
    if (threads < 1 || threads > kMostThreads || block.z > 64 || grid.x < 1 || grid.y < 1 || grid.z < 1 ||
        grid.y > 65535 || grid.z > 65535 || grid.x > 2147483647u || shared > kMostSharedBytes) {
        std::snprintf(message, sizeof message, "no device takes grid (%u, %u, %u), block (%u, %u, %u), %zu B shared",
                      grid.x, grid.y, grid.z, block.x, block.y, block.z, shared);
        return 1;
    }
    if (!stacks)
        stacks = static_cast<char*>(mmap(nullptr, kMostThreads * kStackBytes, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    static char handler_stack[64 * 1024];
    stack_t alternative{}, previous{};
    alternative.ss_sp = handler_stack;
    alternative.ss_size = sizeof handler_stack;
    sigaltstack(&alternative, &previous);
    const int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
    struct sigaction before[4], action{};
    action.sa_sigaction = caught;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 4; ++i) sigaction(signals[i], &action, &before[i]);
    gridDim = grid;
    blockDim = block;
    dynamic_bytes = shared;
    body = kernel;
    body_data = data;
    int failed = sigsetjmp(on_fault, 1);
    if (!failed)
        for (unsigned z = 0; z < grid.z; ++z)
            for (unsigned y = 0; y < grid.y; ++y)
                for (unsigned x = 0; x < grid.x; ++x) {
                    blockIdx = {x, y, z};
                    run_block(backward);
                }
    for (int i = 0; i < 4; ++i) sigaction(signals[i], &before[i], nullptr);
    sigaltstack(&previous, nullptr);
    return failed;
}

// As cuLaunchKernel: a pointer to the value of each parameter.
template <class... A> struct Call {
    void (*kernel)(A...);
    void** args;
    template <size_t... I> void unpack(std::index_sequence<I...>) { kernel(*static_cast<std::decay_t<A>*>(args[I])...); }
    static void run(void* self) { static_cast<Call*>(self)->unpack(std::index_sequence_for<A...>{}); }
};

template <class... A>
int launch_kernel(void (*kernel)(A...), dim3 grid, dim3 block, size_t shared, bool backward, void** args) {
    Call<A...> call{kernel, args};
    return launch(grid, block, shared, backward, Call<A...>::run, &call);
}

// So that a caller is told when it passes too few arguments, or one of the wrong size.
template <class... A> int parameter_sizes(void (*)(A...), int* sizes) {
    int n = 0;
    ((sizes[n++] = sizeof(std::decay_t<A>)), ...);
    return n;
}

}  // namespace shim

inline void __syncthreads() { shim::barrier(0); }
inline int __syncthreads_count(int vote) { return shim::barrier(vote); }
inline int __syncthreads_or(int vote) { return shim::barrier(vote) != 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { shim::exchange(mask, 0, -1); }
inline void __threadfence() {}
inline void __threadfence_block() {}

inline int shim_lane() { return shim::current % 32; }
template <class T> T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
    return shim::exchange(mask, value, shim_lane() / width * width + (from & (width - 1)));
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    int lane = shim_lane() ^ bits;
    return shim::exchange(mask, value, lane / width > shim_lane() / width ? -1 : lane);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
    int lane = shim_lane() + (int)by;
    return shim::exchange(mask, value, lane / width != shim_lane() / width ? -1 : lane);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
    int lane = shim_lane() - (int)by;
    return shim::exchange(mask, value, lane < shim_lane() / width * width ? -1 : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    unsigned word = 0;
    int lanes = std::min(32, shim::threads - shim::current / 32 * 32);
    for (int lane = 0; lane < lanes; ++lane) word |= (shim::exchange(mask, predicate, lane) != 0) << lane;
    return word;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
inline unsigned __activemask() { return 0xffffffffu; }

// Fibers take turns, so a plain read and write is atomic.
template <class T, class U> T atomicAdd(T* at, U value) { T old = *at; *at = old + T(value); return old; }
template <class T, class U> T atomicMax(T* at, U value) { T old = *at; *at = std::max(old, T(value)); return old; }
template <class T, class U> T atomicMin(T* at, U value) { T old = *at; *at = std::min(old, T(value)); return old; }
template <class T, class U> T atomicOr(T* at, U value) { T old = *at; *at = old | T(value); return old; }
template <class T, class U> T atomicAnd(T* at, U value) { T old = *at; *at = old & T(value); return old; }
template <class T, class U> T atomicExch(T* at, U value) { T old = *at; *at = T(value); return old; }
template <class T, class U, class V> T atomicCAS(T* at, U was, V value) { T old = *at; if (old == T(was)) *at = T(value); return old; }

using std::max;
using std::min;
template <class T> T __ldg(const T* at) { return *at; }
template <class T> T __ldcs(const T* at) { return *at; }
template <class T> T __ldcg(const T* at) { return *at; }
template <class T> void __stcs(T* at, T value) { *at = value; }
template <class T> void __stcg(T* at, T value) { *at = value; }
inline float __saturatef(float x) { return x != x ? 0.f : std::min(std::max(x, 0.f), 1.f); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline float __int_as_float(int bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline unsigned __float_as_uint(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }
inline int __float_as_int(float x) { int bits; std::memcpy(&bits, &x, 4); return bits; }
// Conversions saturate on a GPU, and NaN becomes 0.
inline int shim_to_int(float x) { return x != x ? 0 : x >= 2147483648.f ? 2147483647 : x <= -2147483648.f ? -2147483647 - 1 : (int)x; }
inline int __float2int_rn(float x) { return shim_to_int(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return shim_to_int(std::trunc(x)); }
inline int __float2int_rd(float x) { return shim_to_int(std::floor(x)); }
inline int __float2int_ru(float x) { return shim_to_int(std::ceil(x)); }
inline unsigned __float2uint_rn(float x) { return x > 0.f ? (x >= 4294967296.f ? 4294967295u : (unsigned)std::nearbyint(x)) : 0u; }
inline float __int2float_rn(int x) { return (float)x; }
inline float __uint2float_rn(unsigned x) { return (float)x; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz((unsigned)bits) : 32; }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    unsigned long long both = (unsigned long long)y << 32 | x;
    unsigned out = 0;
    for (int i = 0; i < 4; ++i) {
        unsigned pick = selector >> (4 * i) & 0xf, byte = both >> (8 * (pick & 7)) & 0xff;
        out |= (pick & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << (8 * i);
    }
    return out;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)(((unsigned long long)high << 32 | low) >> (shift & 31));
}
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; ++i) c += (int)(signed char)(a >> (8 * i)) * (int)(signed char)(b >> (8 * i));
    return c;
}
