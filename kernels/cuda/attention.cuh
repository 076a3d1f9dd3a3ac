// What the attention kernels share: their parameter, and where keys and values lie.
//
// A layer's pages: [page][K|V][kv_head][head_dim / 64][64 tokens][64], each panel swizzled by token % 8 (common.cuh).
// head_dim is 64, 128 or 256 as stored; a narrower head is padded with zeros (its pairs for RoPE stay half of the stored
// width apart), and `head_width` is its real width, which only the query and key norm need.
//
// qkv: [rows][(heads + 2 kv_heads) * head_dim] in bf16: a product's output, biases added, before norm and RoPE.

#pragma once

#include "common.cuh"

// One token of a step.
struct Row {
    int token;     // its id; -1: the one its slot sampled last; -2 - e: row e of the step's embeddings
    int slot;      // whose block table it uses
    int position;  // in its sequence; negative: the row is padding and writes nothing
    int sample;    // unused by attention
};

// Consecutive rows of one sequence.
struct Span {
    int first;     // its first row in the step
    int rows;
    int slot;
    int position;  // of the first row
};

struct AttentionArguments {
    const bf16* qkv;
    int qkv_stride;
    int rows_max;
    const Row* rows;
    int first_row;          // decode and rope_kv: they take rows [first_row, first_row + count), count from the grid
    int row_count;
    const Span* spans;      // prefill only: cut into at most as many rows as its blocks take, heaviest first
    int span_count;
    bf16* pages;            // of this layer
    int64_t page_stride;    // elements from one page to the next
    const int* tables;      // [slots][table_stride], page of positions 64i..
    int table_stride;
    int heads;
    int kv_heads;
    int head_width;         // without padding
    int window;             // positions a query sees, its own included; 0: all
    float scale;            // multiplies query * key
    const float2* rope;     // [positions][head_dim / 2] cos, sin
    const bf16* query_norm; // [head_dim]; null: none
    const bf16* key_norm;
    float eps;
    bf16* out;              // activations [heads * head_dim / 64][rows_max][64]
    int splits;             // decode: blocks that share one sequence's keys
    int stages;             // decode: pages that a block keeps in flight
    int settled;            // decode: 1 if `rows`, `tables` and what earlier steps wrote to pages are complete before this
                            // kernel can start, as in every layer of a chain but its first: attention starts its successor
                            // only after its own wait, so what came before one attention is complete at the next
    float* partials;        // decode: [count][kv_heads * runs of at most 16 query heads] of sums [splits][16 or
                            // fewer][head_dim], then maximum and sum of exponentials [splits][16 or fewer][2], in whole quads
    int* counters;          // decode: [count * kv_heads * runs], zero before and after
};

// 2^x; minus infinity gives 0.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// A vector of a head in the hands of kDim / 16 neighbouring lanes: lane i holds elements 8i.. and kDim/2 + 8i.., so
// that RoPE's pairs meet in one thread.
template <int kDim>
struct HeadVector {
    static constexpr int kLanes = kDim / 16;
    float x[16];  // eight of the first half, eight of the second

    __device__ __forceinline__ void load(const bf16* from, int lane) {
        take(*reinterpret_cast<const uint4*>(from + 8 * lane), *reinterpret_cast<const uint4*>(from + kDim / 2 + 8 * lane));
    }
    __device__ __forceinline__ void take(uint4 first, uint4 second) {
        const uint32_t words[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) x[2 * i] = low(words[i]), x[2 * i + 1] = high(words[i]);
    }
    __device__ __forceinline__ uint4 packed(int half) const {
        const float* v = x + 8 * half;
        return make_uint4(pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7]));
    }
    // x / sqrt(mean of squares + eps) * gain. All lanes of the warp call it.
    __device__ __forceinline__ void normalise(const HeadVector& gain, float width, float eps) {
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < 16; ++i) squares += x[i] * x[i];
#pragma unroll
        for (int distance = kLanes / 2; distance > 0; distance /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, distance);
        const float scale = rsqrtf(squares / width + eps);
#pragma unroll
        for (int i = 0; i < 16; ++i) x[i] *= scale * gain.x[i];
    }
    // `turn`: eight (cos, sin) of the lane's pairs.
    __device__ __forceinline__ void rotate(const float2 (&turn)[8]) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float a = x[i], b = x[8 + i];
            x[i] = a * turn[i].x - b * turn[i].y;
            x[8 + i] = b * turn[i].x + a * turn[i].y;
        }
    }
};

// The eight turns of a lane at a position.
template <int kDim>
__device__ __forceinline__ void load_turns(float2 (&turn)[8], const float2* rope, int position, int lane) {
    const float4* from = reinterpret_cast<const float4*>(rope + static_cast<int64_t>(position) * (kDim / 2) + 8 * lane);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float4 two = from[i];
        turn[2 * i] = make_float2(two.x, two.y), turn[2 * i + 1] = make_float2(two.z, two.w);
    }
}

// The first element of a head's block [kDim / 64][64 tokens][64] in a page; half 0: keys, 1: values.
template <int kDim>
__device__ __forceinline__ bf16* head_of_page(const AttentionArguments& a, int page, int half, int kv_head) {
    return a.pages + page * a.page_stride + static_cast<int64_t>(half * a.kv_heads + kv_head) * (kPageTokens * kDim);
}
