// What both kernels that decode share: a page's tokens join the sums of a run of query heads, the new key and value take
// their place, the queries are made ready, and the sums of the four warps meet.
//
// 128 threads compute; warp w takes tokens 16w.. of every page, with its own maximum and sums. The run's query heads
// ("group") are the 16 rows of mma.sync's A; S and the sums of P V stay in registers.

#pragma once

#include "attention.cuh"

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 16;

__device__ __forceinline__ void sync_computing() { asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory"); }

template <int kDim>
struct Layout {
    static constexpr int kHalfBytes = kPageTokens * kDim * 2;      // keys or values of a head in a page
    static constexpr int kStageBytes = 2 * kHalfBytes;
    static constexpr int kSumStride = kDim + 8;                    // floats; keeps eight rows apart in the banks
};

// A row's running softmax, for the two rows of a thread.
struct Running {
    float maximum[2] = {-INFINITY, -INFINITY};
    float sum[2] = {0.0f, 0.0f};  // of this thread's columns
};

// Sixteen tokens of each of kPages pages join the sums; their keys lie at `keys`, their values kDim * 128 bytes on. Of a
// single page, tokens outside [begin, end) (counted within the sixteen) weigh nothing; of two, all count, and their
// latencies overlap.
template <int kDim, int kPages>
__device__ __forceinline__ void attend(uint32_t queries, const uint32_t (&keys)[kPages], int lane, int begin, int end, float scale,
                                       Running& running, float (&sums)[kDim / 8][4]) {
    constexpr int kTiles = 2 * kPages;
    float s[kTiles][4] = {};
    {
        // Computed anew each time: kept, these addresses would crowd out sums.
        asm volatile("" : "+r"(queries));
        // Four chains of products, which hide each other's latency.
        constexpr int kChains = kPages == 1 ? 2 : 1;
        float odd[kTiles][4] = {};
        const uint32_t query_row = queries + (lane % 8 + lane / 8 % 2 * 8) * kPanelRowBytes;
        const int query_piece = (lane / 16) ^ (lane % 8);
        // ldmatrix: tokens lane % 8 + 8 * (lane / 16), dims 8 * (lane / 8 % 2) of the step's sixteen.
        const uint32_t row = (lane % 8 + lane / 16 * 8) * kPanelRowBytes;
        const int piece = (lane / 8 % 2) ^ (lane % 8);
#pragma unroll
        for (int step = 0; step < kDim / 16; ++step) {
            uint32_t query[4];
            load_matrices(query, query_row + step / 4 * (kRows * kPanelRowBytes) + ((query_piece ^ (step % 4 * 2)) << 4));
#pragma unroll
            for (int page = 0; page < kPages; ++page) {
                uint32_t k[4];
                load_matrices(k, keys[page] + row + step / 4 * (kPageTokens * kPanelRowBytes) + ((piece ^ (step % 4 * 2)) << 4));
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    mma_16x8x16(step % kChains == 0 ? s[2 * page + i] : odd[2 * page + i], query, k[2 * i], k[2 * i + 1]);
                }
            }
        }
        if constexpr (kChains > 1) {
#pragma unroll
            for (int i = 0; i < 4 * kTiles; ++i) s[i / 4][i % 4] += odd[i / 4][i % 4];
        }
    }
    // Values of tokens yet to come become zeros: their weight is zero, but a recycled page may hold NaN there.
    uint32_t kept[2] = {0xffffffffu, 0xffffffffu};
    if (kPages == 1 && (begin > 0 || end < 16)) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int token = 8 * i + 2 * (lane % 4);
            kept[i] = (token < end ? 0xffffu : 0u) | (token + 1 < end ? 0xffff0000u : 0u);
        }
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int token = 8 * tile + 2 * (lane % 4) + i % 2;
                if (token < begin || token >= end) s[tile][i] = -INFINITY;
            }
        }
    }
    float factor[2], maximum[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        maximum[half] = fmaxf(s[0][2 * half], s[0][2 * half + 1]);
#pragma unroll
        for (int tile = 1; tile < kTiles; ++tile) maximum[half] = fmaxf(maximum[half], fmaxf(s[tile][2 * half], s[tile][2 * half + 1]));
    }
#pragma unroll
    for (int distance = 1; distance <= 2; distance *= 2) {
#pragma unroll
        for (int half = 0; half < 2; ++half) maximum[half] = fmaxf(maximum[half], __shfl_xor_sync(0xffffffffu, maximum[half], distance));
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        maximum[half] = fmaxf(maximum[half] * scale, running.maximum[half]);
        // There is nothing yet to be rescaled the first time.
        factor[half] = running.maximum[half] == -INFINITY ? 1.0f : exp2_fast(running.maximum[half] - maximum[half]);
        running.maximum[half] = maximum[half];
        float sum = 0.0f;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float p = exp2_fast(fmaf(s[tile][2 * half + i], scale, -maximum[half]));
                s[tile][2 * half + i] = p;
                sum += p;
            }
        }
        running.sum[half] = running.sum[half] * factor[half] + sum;
    }
    // A factor of 1 changes nothing, so that skipping it leaves a row's bits independent of its neighbours.
    if (__any_sync(0xffffffffu, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
        for (int i = 0; i < kDim / 8; ++i) {
            sums[i][0] *= factor[0], sums[i][1] *= factor[0];
            sums[i][2] *= factor[1], sums[i][3] *= factor[1];
        }
    }
    // Transposed ldmatrix: tokens lane % 8 + 8 * (lane / 8 % 2), dims 8 * (lane / 16) of the step's sixteen.
    const uint32_t row = Layout<kDim>::kHalfBytes + (lane % 8 + lane / 8 % 2 * 8) * kPanelRowBytes;
    const int piece = (lane / 16) ^ (lane % 8);
#pragma unroll
    for (int page = 0; page < kPages; ++page) {
        const float(&t)[4] = s[2 * page], (&u)[4] = s[2 * page + 1];
        const uint32_t p[4] = {pack(t[0], t[1]), pack(t[2], t[3]), pack(u[0], u[1]), pack(u[2], u[3])};
#pragma unroll
        for (int step = 0; step < kDim / 16; ++step) {
            uint32_t v[4];
            load_matrices_transposed(v, keys[page] + row + step / 4 * (kPageTokens * kPanelRowBytes) + ((piece ^ (step % 4 * 2)) << 4));
            if constexpr (kPages == 1) v[0] &= kept[0], v[1] &= kept[1], v[2] &= kept[0], v[3] &= kept[1];
            mma_16x8x16(sums[2 * step], p, v[0], v[1]);
            mma_16x8x16(sums[2 * step + 1], p, v[2], v[3]);
        }
    }
}

// The new key and value, `fresh` [K|V][kDim], take their place as token `at` of the sixteen. One warp, for itself.
template <int kDim>
__device__ __forceinline__ void place_new(char* keys, char* values, const bf16* fresh, int at, int lane) {
    constexpr int kPieces = kDim / 8;
#pragma unroll
    for (int piece = lane; piece < 2 * kPieces; piece += 32) {
        const int column = piece % kPieces * 8;
        const int place = column / 64 * (kPageTokens * kPanelRowBytes) + 2 * in_panel(at, column % 64);
        *reinterpret_cast<uint4*>((piece < kPieces ? keys : values) + place) = *reinterpret_cast<const uint4*>(fresh + piece * 8);
    }
    __syncwarp();
}

// Four neighbouring results leave.
__device__ __forceinline__ void store_out(const AttentionArguments& a, int row, int column, float4 x, float factor) {
    *reinterpret_cast<uint2*>(a.out + in_activations(row, column, a.rows_max)) =
        make_uint2(pack(x.x * factor, x.y * factor), pack(x.z * factor, x.w * factor));
}

__device__ __forceinline__ void add(float4& sum, float weight, float4 x) {
    sum.x += weight * x.x, sum.y += weight * x.y, sum.z += weight * x.z, sum.w += weight * x.w;
}

// Of a row, the query heads that a block takes.
struct Run {
    int row, position;
    int kv_head, first_head, group;
    bool owns_new;  // the block that has the new key and value among its tokens
    bool writes;    // and one of the blocks that do writes them
};

// Norm and RoPE of the group's queries, and of the new key where it belongs; a vector is a few lanes' work. What
// can be fetched or computed before the products of the predecessor are there is. Everyone synchronises afterwards.
template <int kDim>
__device__ __forceinline__ void prepare(const AttentionArguments& a, const Run& run, const int* table, bf16* queries, bf16* fresh, int thread) {
    const int warp = thread / 32;
    constexpr int kLanes = HeadVector<kDim>::kLanes;
    constexpr int kAtOnce = kThreads / kLanes;
    const int part = thread % kLanes, of_block = thread / kLanes;
    const int vectors = run.owns_new ? run.group + 2 : run.group;  // the group's queries, then the key, then the value
    const int new_page = run.owns_new ? __ldcg(table + run.position / kPageTokens) : 0;
    float2 turns[8];
    load_turns<kDim>(turns, a.rope, run.position, part);
    // Rows that no head fills are zeros: they cost nothing and stay finite.
    for (int i = thread; i < (kRows - run.group) * (kDim / 8); i += kThreads) {
        const int unused = run.group + i / (kDim / 8), d = i % (kDim / 8) * 8;
        *reinterpret_cast<uint4*>(queries + d / 64 * (kRows * 64) + in_panel(unused, d % 64)) = make_uint4(0, 0, 0, 0);
    }
    const bf16* products = a.qkv + static_cast<int64_t>(run.row) * a.qkv_stride;
    const bool normed = a.query_norm != nullptr || a.key_norm != nullptr;
    wait_for_predecessor();
    let_successor_start();
    for (int base = 0; base < vectors; base += kAtOnce) {
        const int vector = base + of_block;
        if (base + warp * (32 / kLanes) >= vectors) break;  // nothing for this warp
        int column = run.first_head;
        if (vector < run.group) column += vector;
        else if (vector < vectors) column = a.heads + run.kv_head + (vector - run.group) * a.kv_heads;
        HeadVector<kDim> x;
        x.load(products + column * kDim, part);
        if (normed) {
            const bf16* norm = vector < run.group ? a.query_norm : a.key_norm;
            HeadVector<kDim> scaled = x, gain;
            gain.load(norm != nullptr ? norm : products, part);
            scaled.normalise(gain, static_cast<float>(a.head_width), a.eps);
            if (norm != nullptr && vector <= run.group) x = scaled;
        }
        if (vector <= run.group) x.rotate(turns);
        if (vector >= vectors) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int d = half * (kDim / 2) + 8 * part;
            if (vector < run.group) {
                *reinterpret_cast<uint4*>(queries + d / 64 * (kRows * 64) + in_panel(vector, d % 64)) = x.packed(half);
            } else {
                const int which = vector - run.group;
                bf16* page = head_of_page<kDim>(a, new_page, which, run.kv_head);
                *reinterpret_cast<uint4*>(fresh + which * kDim + d) = x.packed(half);
                // One run writes for all.
                if (!run.writes) continue;
                *reinterpret_cast<uint4*>(page + d / 64 * (kPageTokens * 64) + in_panel(run.position % kPageTokens, d % 64)) = x.packed(half);
            }
        }
    }
}

// A warp's sums and states, for all to read.
template <int kDim>
__device__ __forceinline__ void leave_sums(const Running& running, const float (&sums)[kDim / 8][4], float* merge, float* warp_maximum,
                                           float* warp_sum, int group, int warp, int lane) {
    using L = Layout<kDim>;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float sum = running.sum[half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const int query_row = lane / 4 + 8 * half;
        if (query_row < group) {
            if (lane % 4 == 0) {
                warp_maximum[warp * kRows + query_row] = running.maximum[half];
                warp_sum[warp * kRows + query_row] = sum;
            }
            float* to = merge + (warp * group + query_row) * L::kSumStride + 2 * (lane % 4);
#pragma unroll
            for (int i = 0; i < kDim / 8; ++i) *reinterpret_cast<float2*>(to + 8 * i) = make_float2(sums[i][2 * half], sums[i][2 * half + 1]);
        }
    }
}

// Four neighbouring sums of a head over all warps, in their order.
template <int kDim>
__device__ __forceinline__ float4 sum_of_warps(const float* merge, const float* warp_maximum, const float* warp_sum, int group, int head,
                                               int d, float& maximum, float& sum) {
    using L = Layout<kDim>;
    maximum = warp_maximum[head];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) maximum = fmaxf(maximum, warp_maximum[w * kRows + head]);
    float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        const float weight = exp2_fast(warp_maximum[w * kRows + head] - maximum);
        add(x, weight, *reinterpret_cast<const float4*>(merge + (w * group + head) * L::kSumStride + d));
        sum += weight * warp_sum[w * kRows + head];
    }
    return x;
}
