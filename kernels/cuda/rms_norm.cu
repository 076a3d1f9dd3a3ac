// Root-mean-square normalisation of rows: out = x / sqrt(mean(x^2) + eps) * weight.
//
// Shapes   x, out [rows, width] bf16, row-major; weight [width] bf16. `out` may be `x`.
// Numbers  squares summed and the row scaled in f32; one rounding to bf16, at the end.
// Layout   one CTA per row. A thread holds up to 4 vectors of 8 elements (16 bytes) in registers, so a
//          row is read once: width <= 32 * threads. Rows whose width is not a multiple of 8 do not
//          begin on 16 bytes and take the scalar path, which reads them twice (the second time from L1).
// Moved    4 bytes per element (2 read, 2 written); the weight comes from L2 after the first row.
// Expected at least 95 % of what a copy reaches on the card for 1 GB and more, 80 % from 64 MB on (an H200
//          gave 97 % and 81 %); below about one row per SM the launch itself is all there is.

#include <cuda_bf16.h>
#include <stdint.h>

namespace {

constexpr int kVectorElements = 8;
constexpr int kVectorsPerThread = 4;

// Eight bf16 as one 16-byte load or store: a struct of halves would be moved in pieces of 4 bytes.
using Vector = uint4;

// Two bf16, the first in the low half, as two f32: bf16 is the upper half of an f32.
__device__ float2 unpack(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

__device__ float squares_of(uint32_t pair) {
    const float2 f = unpack(pair);
    return f.x * f.x + f.y * f.y;
}

__device__ uint32_t scaled(uint32_t pair, uint32_t gain, float scale) {
    const float2 f = unpack(pair), g = unpack(gain);
    const __nv_bfloat162 rounded = __floats2bfloat162_rn(f.x * scale * g.x, f.y * scale * g.y);
    return *reinterpret_cast<const uint32_t*>(&rounded);
}

// The sum over all threads of the CTA, in every thread. The order of additions is fixed.
__device__ float sum_over_cta(float value) {
    __shared__ float warp_sums[32];
    for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
    __syncthreads();
    const int warps = blockDim.x / 32;
    value = threadIdx.x % 32 < warps ? warp_sums[threadIdx.x % 32] : 0.0f;
    for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
    return value;
}

__device__ void vector_row(const Vector* x, const Vector* weight, Vector* out, int vectors, float eps) {
    Vector held[kVectorsPerThread];
#pragma unroll
    for (int i = 0; i < kVectorsPerThread; ++i) {
        const int at = threadIdx.x + i * blockDim.x;
        held[i] = at < vectors ? x[at] : make_uint4(0, 0, 0, 0);
    }
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kVectorsPerThread; ++i) {
        const Vector v = held[i];
        squares += squares_of(v.x) + squares_of(v.y) + squares_of(v.z) + squares_of(v.w);
    }
    const float scale = rsqrtf(sum_over_cta(squares) / (vectors * kVectorElements) + eps);
#pragma unroll
    for (int i = 0; i < kVectorsPerThread; ++i) {
        const int at = threadIdx.x + i * blockDim.x;
        if (at >= vectors) break;
        const Vector v = held[i], gain = weight[at];
        out[at] = make_uint4(scaled(v.x, gain.x, scale), scaled(v.y, gain.y, scale),
                             scaled(v.z, gain.z, scale), scaled(v.w, gain.w, scale));
    }
}

__device__ void scalar_row(const __nv_bfloat16* x, const __nv_bfloat16* weight, __nv_bfloat16* out, int width,
                           float eps) {
    float squares = 0.0f;
    for (int at = threadIdx.x; at < width; at += blockDim.x) {
        const float f = __bfloat162float(x[at]);
        squares += f * f;
    }
    const float scale = rsqrtf(sum_over_cta(squares) / width + eps);
    for (int at = threadIdx.x; at < width; at += blockDim.x) {
        out[at] = __float2bfloat16_rn(__bfloat162float(x[at]) * scale * __bfloat162float(weight[at]));
    }
}

}  // namespace

// Grid: `rows` CTAs. Block: a multiple of 32 threads with width <= 32 * threads (see launch.rs).
extern "C" __global__ void __launch_bounds__(1024)
    rms_norm(const __nv_bfloat16* x, const __nv_bfloat16* weight, __nv_bfloat16* out, int width, float eps) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * width;
    if (width % kVectorElements == 0) {
        vector_row(reinterpret_cast<const Vector*>(x + row), reinterpret_cast<const Vector*>(weight),
                   reinterpret_cast<Vector*>(out + row), width / kVectorElements, eps);
    } else {
        scalar_row(x + row, weight, out + row, width, eps);
    }
}
