// Weights as files have them (row-major, bf16, f16 or f32) into stored tiles, and tiles of random numbers.
//
// Shapes   source [rows][columns]; stored [tiles][panels][64][64] (layout.rs). Where rows or columns are heads of `width`
//          elements, each head is stored in `stored` of them: its first half at the start, its second in the middle, so
//          that RoPE's pairs stay half a head apart. What no source element reaches is zero beforehand.
// Moved    every element read and written once; 16 bytes a thread where columns stay together.
// Expected 80 % of a copy.

#include <cuda_fp16.h>

#include "common.cuh"

enum SourceType { kBf16, kF16, kF32 };

struct Heads {
    int width;   // 0: no heads
    int stored;
};

struct PackArguments {
    const void* source;
    int type;
    int rows;
    int columns;
    int first_row;    // of the source, within its tensor
    int row_offset;   // of the tensor, among stored heads or logical rows
    int features;     // 0: pairs; else gate and up of so many features
    bf16* to;
    int panels;
    Heads row_heads;
    Heads column_heads;
};

__device__ __forceinline__ int in_heads(int i, Heads heads) {
    if (heads.width == 0) return i;
    const int head = i / heads.width, j = i % heads.width, half = heads.width / 2;
    return head * heads.stored + (j < half ? j : heads.stored / 2 + j - half);
}

__device__ __forceinline__ float element(const void* source, int type, int64_t i) {
    if (type == kBf16) return __bfloat162float(static_cast<const bf16*>(source)[i]);
    if (type == kF16) return __half2float(static_cast<const __half*>(source)[i]);
    return static_cast<const float*>(source)[i];
}

// Eight elements from `i` on, as bf16; i is a multiple of eight where `aligned`.
__device__ __forceinline__ uint4 eight(const void* source, int type, int64_t i, bool aligned) {
    if (type == kBf16 && aligned) return *reinterpret_cast<const uint4*>(static_cast<const bf16*>(source) + i);
    float x[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] = element(source, type, i + j);
    return make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
}

// Grid: threads for every eight columns of every source row.
extern "C" __global__ void __launch_bounds__(256) pack_weights(const __grid_constant__ PackArguments p) {
    const int pieces = (p.columns + 7) / 8;
    const int64_t at = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
    if (at >= static_cast<int64_t>(p.rows) * pieces) return;
    const int source_row = static_cast<int>(at / pieces), column = static_cast<int>(at % pieces) * 8;
    const int row = p.row_offset + in_heads(p.first_row + source_row, p.row_heads);
    int stored = row / 16 * 16 + row % 2 * 8 + row % 16 / 2;
    if (p.features > 0) {
        const int half = row / p.features, feature = row % p.features;
        stored = feature / 8 * 16 + half * 8 + feature % 8;
    }
    bf16* to = p.to + static_cast<int64_t>(stored / 64) * p.panels * (64 * 64);
    const int64_t from = static_cast<int64_t>(source_row) * p.columns + column;
    const bool whole = column + 8 <= p.columns;
    if (whole && (p.column_heads.width == 0 || p.column_heads.width == p.column_heads.stored)) {
        *reinterpret_cast<uint4*>(to + column / 64 * (64 * 64) + in_panel(stored % 64, column % 64)) =
            eight(p.source, p.type, from, p.columns % 8 == 0);
        return;
    }
    for (int j = 0; j < 8 && column + j < p.columns; ++j) {
        const int c = in_heads(column + j, p.column_heads);
        to[c / 64 * (64 * 64) + in_panel(stored % 64, c % 64)] = __float2bfloat16_rn(element(p.source, p.type, from + j));
    }
}

struct PackVectorArguments {
    const void* source;
    int type;
    int elements;
    bf16* to;
    Heads heads;
};

extern "C" __global__ void __launch_bounds__(256) pack_vector(const __grid_constant__ PackVectorArguments p) {
    const int i = blockIdx.x * 256 + threadIdx.x;
    if (i < p.elements) p.to[in_heads(i, p.heads)] = __float2bfloat16_rn(element(p.source, p.type, i));
}

struct RandomArguments {
    bf16* to;
    int tiles;
    int panels;
    int rows;     // stored rows that are not padding
    int columns;
    float mean;
    float deviation;
    uint64_t seed;
};

// Box and Muller: two normal numbers of two words.
__device__ __forceinline__ float2 normals(uint32_t a, uint32_t b) {
    // (0, 1], so that the logarithm is finite.
    const float u = (static_cast<float>(a >> 8) + 1.0f) * 5.9604645e-8f;
    const float v = static_cast<float>(b >> 8) * 5.9604645e-8f;
    const float r = sqrtf(-2.0f * __logf(u));
    float sine, cosine;
    __sincosf(6.2831853f * v, &sine, &cosine);
    return make_float2(r * cosine, r * sine);
}

// Grid: threads for every eight stored elements.
extern "C" __global__ void __launch_bounds__(256) random_weights(const __grid_constant__ RandomArguments r) {
    const int64_t piece = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
    const int64_t pieces_of_tile = static_cast<int64_t>(r.panels) * 512;
    if (piece >= r.tiles * pieces_of_tile) return;
    const int row = static_cast<int>(piece / pieces_of_tile) * 64 + static_cast<int>(piece % 512) / 8;
    const int column = static_cast<int>(piece % pieces_of_tile / 512) * 64 + static_cast<int>(((piece % 8) ^ (row & 7)) * 8);
    float x[8];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint4 words = philox(static_cast<uint64_t>(piece) * 2 + half, r.seed);
        const float2 first = normals(words.x, words.y), second = normals(words.z, words.w);
        x[4 * half] = first.x, x[4 * half + 1] = first.y, x[4 * half + 2] = second.x, x[4 * half + 3] = second.y;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        x[j] = row < r.rows && column + j < r.columns ? r.mean + r.deviation * x[j] : 0.0f;
    }
    *reinterpret_cast<uint4*>(r.to + piece * 8) = make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
}
