// A row as penalties and bias leave it.

#pragma once

#include "sampling_row.cuh"

__device__ __forceinline__ float penalise(const SlotParameters& slot, float logit, uint32_t seen) {
    if (seen == 0) return logit;
    logit = logit > 0.0f ? __fdiv_rn(logit, slot.repetition) : __fmul_rn(logit, slot.repetition);
    const uint32_t generated = seen & 0x7fffu;
    if (generated > 0) {
        logit = __fsub_rn(logit, __fadd_rn(slot.presence, __fmul_rn(slot.frequency, static_cast<float>(generated))));
    }
    return logit;
}

// Where each tile's biases begin in the slot's list; 0xffff: it has none.
__device__ __forceinline__ void find_first_biases(Shared& s, const Bias* biases, int tiles) {
    const int count = s.slot.biases;
    if (count == 0) return;
#pragma unroll 1
    for (int tile = threadIdx.x; tile < tiles; tile += kThreads) s.first_bias[tile] = 0xffff;
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += kThreads) {
        const uint32_t tile = biases[i].token / kTileTokens;
        if (i == 0 || biases[i - 1].token / kTileTokens != tile) s.first_bias[tile] = static_cast<uint16_t>(i);
    }
}

// Four neighbours of a tile, the first of which is token `id`, with what they owe for having been seen, and their biases.
__device__ __forceinline__ void adjust(const Shared& s, const Bias* biases, int tile, int id, uint2 counts, float4& x) {
    if ((counts.x | counts.y) != 0) {
        x.x = penalise(s.slot, x.x, counts.x & 0xffffu);
        x.y = penalise(s.slot, x.y, counts.x >> 16);
        x.z = penalise(s.slot, x.z, counts.y & 0xffffu);
        x.w = penalise(s.slot, x.w, counts.y >> 16);
    }
    if (s.slot.biases == 0) return;
#pragma unroll 1
    for (int i = s.first_bias[tile]; i < s.slot.biases; ++i) {
        const Bias bias = biases[i];
        const int at = static_cast<int>(bias.token) - id;
        if (at >= 4) break;
        if (at == 0) x.x = __fadd_rn(x.x, bias.bias);
        if (at == 1) x.y = __fadd_rn(x.y, bias.bias);
        if (at == 2) x.z = __fadd_rn(x.z, bias.bias);
        if (at == 3) x.w = __fadd_rn(x.w, bias.bias);
    }
}

// Writes the row as penalties and bias leave it, and reads it from there from now on, with the largest of each tile; the
// largest of all, ranked. The row's blocks have joined.
__device__ __forceinline__ uint64_t adjust_row(Block& b) {
    Shared& s = b.s;
    const uint16_t* seen = s.slot.penalised != 0 ? b.a.seen + static_cast<int64_t>(s.row.slot) * b.a.seen_stride : nullptr;
    const Bias* biases = b.a.biases + static_cast<int64_t>(s.row.slot) * kBiasesMax;
    find_first_biases(s, biases, b.a.tiles);
    __syncthreads();
    float* scratch = b.a.scratch + static_cast<int64_t>(blockIdx.y) * b.a.stride;
    const int lane = threadIdx.x % 32;
    const int2 tiles = s.tiles[threadIdx.x / 32];
    constexpr int kAtOnce = 4;
#pragma unroll 1
    for (int pair = tiles.x; pair < tiles.y; pair += 2 * kAtOnce) {
        float4 x[kAtOnce];
        uint2 counts[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int tile = pair + 2 * i + lane / 16, id = tile * kTileTokens + lane % 16 * 4;
            const bool on = tile < tiles.y && id < b.a.vocabulary;
            x[i] = load_logits(b.logits + id, on);
            counts[i] = make_uint2(0, 0);
            if (on && seen != nullptr) counts[i] = *reinterpret_cast<const uint2*>(seen + id);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int tile = pair + 2 * i + lane / 16, id = tile * kTileTokens + lane % 16 * 4;
            float largest = -INFINITY;
            if (tile < tiles.y && id < b.a.vocabulary) {
                cut_off(x[i], id, b.a.vocabulary);
                adjust(s, biases, tile, id, counts[i], x[i]);
                *reinterpret_cast<float4*>(scratch + id) = x[i];
                largest = fmaxf(fmaxf(fmaxf(x[i].x, -INFINITY), x[i].y), fmaxf(fmaxf(x[i].z, -INFINITY), x[i].w));
            }
#pragma unroll
            for (int distance = 8; distance > 0; distance /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
            if (tile < tiles.y && lane % 16 < b.ranks()) *in_block(&s.adjusted_maxima[tile], lane % 16) = largest;
        }
    }
    sync_row();
    b.logits = scratch;
    uint64_t best = 0;
#pragma unroll 1
    for (int tile = threadIdx.x; tile < b.a.tiles; tile += kThreads) {
        const float logit = s.adjusted_maxima[tile];
        s.maxima[tile] = logit;
        if (logit > -INFINITY) best = max(best, ranked(logit, tile));
    }
    best = max_of_block(s, best);
    if (best == 0) return 0;
    // The lowest id in the first of the tiles that hold it.
    const int id = token_in(best) * kTileTokens + threadIdx.x * 4;
    const float max = logit_in(best);
    uint64_t found = 0;
    if (threadIdx.x < 16 && id < b.a.vocabulary) {
        float4 x = load_logits(b.logits + id, true);
        cut_off(x, id, b.a.vocabulary);
        if (x.w == max) found = ranked(max, id + 3);
        if (x.z == max) found = ranked(max, id + 2);
        if (x.y == max) found = ranked(max, id + 1);
        if (x.x == max) found = ranked(max, id);
    }
    return max_of_block(s, found);
}
