// The part of CUDA's half precision that kernels use: storage and conversion, IEEE, round to nearest even.
#pragma once
#include "cuda_on_cpu.h"

inline unsigned short shim_to_half(float value) {
    unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return (unsigned short)(0x7fffu);
    if (bits >= 0x477ff000u) return (unsigned short)(sign | 0x7c00u);  // 65520 and above round to infinity.
    if (bits < 0x38800000u) {  // Subnormal: the float adder rounds, 2^-24 being the last place of 0.5.
        float magnitude = __uint_as_float(bits) + 0.5f;
        return (unsigned short)(sign | (__float_as_uint(magnitude) - 0x3f000000u));
    }
    unsigned rounded = bits + 0xfffu + (bits >> 13 & 1u);
    return (unsigned short)(sign | ((rounded - 0x38000000u) >> 13));
}

inline float shim_from_half(unsigned short half) {
    unsigned sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31u, fraction = half & 0x3ffu;
    if (exponent == 31u) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
    if (exponent == 0u) {
        float magnitude = (float)fraction * 5.9604644775390625e-8f;  // 2^-24
        return sign ? -magnitude : magnitude;
    }
    return __uint_as_float(sign | (exponent + 112u) << 23 | fraction << 13);
}

struct alignas(2) __half {
    unsigned short bits;
    __half() = default;
    explicit __half(float value) : bits(shim_to_half(value)) {}
    operator float() const { return shim_from_half(bits); }
};
using half = __half;
struct alignas(4) __half2 { __half x, y; };
using half2 = __half2;

inline __half __float2half(float x) { return __half(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline float __half2float(__half x) { return (float)x; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float22half2_rn(float2 v) { return {__half(v.x), __half(v.y)}; }
inline float2 __half22float2(__half2 v) { return {(float)v.x, (float)v.y}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half __low2half(__half2 v) { return v.x; }
inline __half __high2half(__half2 v) { return v.y; }
inline float __low2float(__half2 v) { return v.x; }
inline float __high2float(__half2 v) { return v.y; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) { __half x; x.bits = bits; return x; }
