// What the matrix products share: their parameter, and what happens to the sums.
//
//   D[n, t] = sum over k of weights[n, k] * input[t, k]
//
// Weights are the 64-row side of every product, tokens the other, so that one fragment layout (wgmma's and mma.sync's
// alike) and one epilogue serve all of them: in a warp's 16 rows of weights a thread holds the stored rows lane/4 and
// lane/4 + 8 for tokens 8j + 2(lane % 4) + {0, 1}. layout.rs stores the rows so that those two belong together.
//
// The norm before a product is folded into both its neighbours: whoever writes the residual stream also writes it
// times the next norm's gain (`normed`) and the sums of squares of each 64 features (`squares`); the product of such
// an input is multiplied by 1 / sqrt(mean of squares + eps) at its end, once per token.
//
// Rounding: sums in f32 over all of K, one rounding to bf16 where a value is stored. Every reduction has a fixed order.

#pragma once

#include "common.cuh"

struct GemmArguments {
    const bf16* weights;   // [tiles][panels][64][64], rows in the order of the epilogue
    const bf16* input;     // [panels][rows_max][64]
    int rows;              // tokens
    int rows_max;          // a multiple of 256
    int tiles;             // of 64 stored rows of weights
    int panels;            // of 64 columns of K
    int features;          // outputs per token: real ones, padding is not written
    int splits;            // blocks that share a tile's K, where the kernel splits it
    const float* squares;  // [square_tiles][rows_max] of the input before its norm; null: no norm
    int square_tiles;
    float width;           // elements of a normed row, without padding
    float eps;
    const bf16* bias;      // [features], for GateUp [2 * features]; null: none
    bf16* out;             // Store: [rows][out_stride]. Residual: the residual stream [rows][out_stride], read and written.
                           // GateUp: activations [features / 64][rows_max][64]
    int out_stride;
    float* logits;         // Logits: [rows][out_stride]; null: only `best` is wanted
    const bf16* gain;      // Residual: of the next norm [features]
    bf16* normed;          // Residual: activations [features / 64][rows_max][64], residual * gain
    float* squares_out;    // Residual: [tiles][rows_max]
    float2* best;          // Logits: [rows][tiles], each tile's largest logit and its feature (int bits); lowest id among equals
    float* partials;       // where splits meet: as large as the kernel's plan says, its layout is the kernel's own
    int* counters;         // as many as the plan says, zero before and after
};

enum Epilogue { kStore, kResidual, kGateUp, kLogits };

// 1 / sqrt(mean + eps) of `count` tokens from `first`, into shared memory, by `threads` threads (whole warps) that all
// call it and synchronise afterwards. 1 where there is no norm. Eight lanes share a token, each with every eighth tile
// in order; the order of the sum depends on neither the number of tokens nor that of threads. All loads of kPasses
// tokens of a lane are under way together: nothing hides their latency.
template <int kPasses>
__device__ __forceinline__ void load_scales_in_passes(const GemmArguments& g, int first, int count, float* scales, int thread, int threads) {
    constexpr int kLoads = kPasses > 1 ? 4 : 8;
    const int part = thread / 4 % 8;
    for (int base = thread / 32 * 4 + thread % 4; base - thread % 4 < count; base += kPasses * threads / 8) {
        float sums[kPasses];
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) sums[pass] = 0.0f;
        if (g.squares != nullptr) {
            for (int i = part; i < g.square_tiles; i += 8 * kLoads) {
                float values[kPasses][kLoads];
#pragma unroll
                for (int pass = 0; pass < kPasses; ++pass) {
                    const int token = first + base + pass * threads / 8;
                    const float* squares = g.squares + static_cast<int64_t>(i) * g.rows_max + token;
#pragma unroll
                    for (int load = 0; load < kLoads; ++load) {
                        values[pass][load] = token < g.rows && i + 8 * load < g.square_tiles ? squares[8 * load * g.rows_max] : 0.0f;
                    }
                }
#pragma unroll
                for (int pass = 0; pass < kPasses; ++pass) {
#pragma unroll
                    for (int load = 0; load < kLoads; ++load) sums[pass] += values[pass][load];
                }
            }
        }
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
#pragma unroll
            for (int distance = 4; distance < 32; distance *= 2) sums[pass] += __shfl_xor_sync(0xffffffffu, sums[pass], distance);
            const int t = base + pass * threads / 8;
            if (part == 0 && t < count) scales[t] = g.squares != nullptr ? rsqrtf(sums[pass] / g.width + g.eps) : 1.0f;
        }
    }
}

__device__ __forceinline__ void load_scales(const GemmArguments& g, int first, int count, float* scales, int thread, int threads) {
    if (count > threads / 8) {
        load_scales_in_passes<4>(g, first, count, scales, thread, threads);
    } else {
        load_scales_in_passes<1>(g, first, count, scales, thread, threads);
    }
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + __expf(-x)); }

// What the epilogue reads beside the sums, for a thread's two stored rows.
struct Addends {
    float bias0, bias1;
    uint32_t gain;  // Residual
    __device__ __forceinline__ uint32_t old(int, const uint32_t* at) const { return *at; }
};

// The same with what the residual stream held, for a kernel that asks for it long before its sums are done.
template <int kTokens>
struct EarlyAddends : Addends {
    uint32_t stream[kTokens / 4];
    __device__ __forceinline__ uint32_t old(int i, const uint32_t*) const { return stream[i]; }
};

template <Epilogue kEpilogue>
__device__ __forceinline__ Addends load_addends(const GemmArguments& g, int tile, int warp) {
    const int lane = threadIdx.x % 32;
    Addends addends = {0.0f, 0.0f, 0};
    if constexpr (kEpilogue == kGateUp) {
        const int feature = tile * 32 + warp * 8 + lane / 4;
        if (g.bias != nullptr && feature < g.features) {
            addends.bias0 = __bfloat162float(g.bias[feature]);
            addends.bias1 = __bfloat162float(g.bias[g.features + feature]);
        }
    } else {
        // Features come in pairs; an odd last one does not occur (widths are even).
        const int feature = tile * 64 + warp * 16 + 2 * (lane / 4);
        if (feature < g.features) {
            if (g.bias != nullptr) {
                const uint32_t pair = *reinterpret_cast<const uint32_t*>(g.bias + feature);
                addends.bias0 = low(pair), addends.bias1 = high(pair);
            }
            if constexpr (kEpilogue == kResidual) addends.gain = *reinterpret_cast<const uint32_t*>(g.gain + feature);
        }
    }
    return addends;
}

template <Epilogue kEpilogue, int kTokens>
__device__ __forceinline__ EarlyAddends<kTokens> load_addends_early(const GemmArguments& g, int tile, int first, int warp) {
    const int lane = threadIdx.x % 32;
    EarlyAddends<kTokens> addends;
    static_cast<Addends&>(addends) = load_addends<kEpilogue>(g, tile, warp);
    if constexpr (kEpilogue == kResidual) {
        const int feature = tile * 64 + warp * 16 + 2 * (lane / 4);
#pragma unroll
        for (int i = 0; i < kTokens / 4; ++i) {
            const int token = first + 8 * (i / 2) + 2 * (lane % 4) + i % 2;
            addends.stream[i] = 0;
            if (feature < g.features && token < g.rows) {
                addends.stream[i] = *reinterpret_cast<const uint32_t*>(g.out + static_cast<int64_t>(token) * g.out_stride + feature);
            }
        }
    }
    return addends;
}

// What one warp does with its 16 stored rows of tile `tile` for kTokens tokens from `first`, a multiple of eight. `warp` is 0..3 within the
// tile; `scales` [kTokens] in shared memory. `reduce` [4][kTokens] floats of shared memory, used by Residual and (twice
// as much) by Logits; `sync` synchronises the tile's 128 threads. All four warps call it.
template <Epilogue kEpilogue, int kTokens, typename AnyAddends, typename Sync>
__device__ __forceinline__ void finish(const GemmArguments& g, const float (&d)[kTokens / 2], const AnyAddends& addends, int tile,
                                       int first, int warp, const float* scales, float* reduce, Sync sync) {
    const int lane = threadIdx.x % 32;
    const int column = 2 * (lane % 4);
    if constexpr (kEpilogue == kGateUp) {
        const int feature = tile * 32 + warp * 8 + lane / 4;
        const bool real = feature < g.features;
        // Lanes of neighbouring features trade: one leaves with both features of a token, the other with the next token's.
        const int odd = lane / 4 % 2;
        const int token = first + column + odd;
        bf16* at = g.out + in_activations(token, feature - odd, g.rows_max);
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j) {
            float values[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float scale = scales[8 * j + column + i];
                const float gate = d[4 * j + i] * scale + addends.bias0;
                const float up = d[4 * j + 2 + i] * scale + addends.bias1;
                // Padded features of the last panel must be zeros: the next product reads them.
                values[i] = real ? silu(gate) * up : 0.0f;
            }
            const float traded = __shfl_xor_sync(0xffffffffu, odd ? values[0] : values[1], 4);
            // Eight tokens further on lies the same place of the swizzle.
            if (token + 8 * j < g.rows) {
                *reinterpret_cast<uint32_t*>(at + 8 * j * kPanelColumns) = odd ? pack(traded, values[1]) : pack(values[0], traded);
            }
        }
        return;
    }
    const int feature = tile * 64 + warp * 16 + 2 * (lane / 4);
    // Features come in pairs; an odd last one does not occur (widths are even).
    const bool real = feature < g.features;
    const float bias0 = addends.bias0, bias1 = addends.bias1;
    if constexpr (kEpilogue == kStore) {
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int token = 8 * j + column + i;
                if (!real || first + token >= g.rows) continue;
                const float scale = scales[token];
                *reinterpret_cast<uint32_t*>(g.out + static_cast<int64_t>(first + token) * g.out_stride + feature) =
                    pack(d[4 * j + i] * scale + bias0, d[4 * j + 2 + i] * scale + bias1);
            }
        }
    }
    if constexpr (kEpilogue == kResidual) {
        const float gain0 = low(addends.gain), gain1 = high(addends.gain);
        // Eight tokens further on lies the same place of the swizzle.
        uint32_t* stream = reinterpret_cast<uint32_t*>(g.out + static_cast<int64_t>(first + column) * g.out_stride + feature);
        bf16* normed[2] = {g.normed + in_activations(first + column, feature, g.rows_max),
                           g.normed + in_activations(first + column + 1, feature, g.rows_max)};
        const int stride = g.out_stride / 2;
        // Several tokens are asked for before the first is written: behind a store, a load waits for its turn.
        constexpr int kAhead = kTokens < 32 ? kTokens / 4 : 8;
#pragma unroll
        for (int k0 = 0; k0 < kTokens / 4; k0 += kAhead) {
            uint32_t old[kAhead];
            float squares[kAhead];
#pragma unroll
            for (int k = 0; k < kAhead; ++k) {
                const int j = (k0 + k) / 2, i = k % 2;
                const bool there = real && first + 8 * j + column + i < g.rows;
                old[k] = there ? addends.old(k0 + k, stream + (8 * j + i) * stride) : 0;
            }
#pragma unroll
            for (int k = 0; k < kAhead; ++k) {
                const int j = (k0 + k) / 2, i = k % 2;
                const uint32_t sum = pack(low(old[k]) + d[4 * j + i] + bias0, high(old[k]) + d[4 * j + 2 + i] + bias1);
                // What was stored is what the norm sees.
                const uint32_t stored = real ? sum : 0;
                squares[k] = low(stored) * low(stored) + high(stored) * high(stored);
                if (first + 8 * j + column + i < g.rows) {
                    if (real) stream[(8 * j + i) * stride] = stored;
                    *reinterpret_cast<uint32_t*>(normed[i] + 8 * j * kPanelColumns) = pack(low(stored) * gain0, high(stored) * gain1);
                }
            }
#pragma unroll
            for (int distance = 4; distance < 32; distance *= 2) {
#pragma unroll
                for (int k = 0; k < kAhead; ++k) squares[k] += __shfl_xor_sync(0xffffffffu, squares[k], distance);
            }
#pragma unroll
            for (int k = 0; k < kAhead; ++k) {
                if (lane < 4) reduce[warp * kTokens + 8 * ((k0 + k) / 2) + column + k % 2] = squares[k];
            }
        }
        sync();
        for (int token = warp * 32 + lane; token < kTokens; token += 128) {
            const float sum = (reduce[token] + reduce[kTokens + token]) + (reduce[2 * kTokens + token] + reduce[3 * kTokens + token]);
            if (first + token < g.rows) g.squares_out[static_cast<int64_t>(tile) * g.rows_max + first + token] = sum;
        }
        sync();
    }
    if constexpr (kEpilogue == kLogits) {
        int* features = reinterpret_cast<int*>(reduce + 4 * kTokens);
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int token = 8 * j + column + i;
                const float scale = scales[token];
                const float first_logit = d[4 * j + i] * scale + bias0, second_logit = d[4 * j + 2 + i] * scale + bias1;
                if (g.logits != nullptr && real && first + token < g.rows) {
                    *reinterpret_cast<float2*>(g.logits + static_cast<int64_t>(first + token) * g.out_stride + feature) =
                        make_float2(first_logit, second_logit);
                }
                // A NaN becomes -inf here and is never larger below, so it never wins.
                float best = real ? fmaxf(first_logit, -INFINITY) : -INFINITY;
                int at = feature;
                if (real && feature + 1 < g.features && second_logit > best) best = second_logit, at = feature + 1;
#pragma unroll
                for (int distance = 4; distance < 32; distance *= 2) {
                    const float other = __shfl_xor_sync(0xffffffffu, best, distance);
                    const int other_at = __shfl_xor_sync(0xffffffffu, at, distance);
                    if (other > best || (other == best && other_at < at)) best = other, at = other_at;
                }
                if (lane < 4) reduce[warp * kTokens + token] = best, features[warp * kTokens + token] = at;
            }
        }
        sync();
        for (int token = warp * 32 + lane; token < kTokens; token += 128) {
            float best = reduce[token];
            int at = features[token];
            for (int other = 1; other < 4; ++other) {
                if (reduce[other * kTokens + token] > best) best = reduce[other * kTokens + token], at = features[other * kTokens + token];
            }
            if (first + token < g.rows) g.best[static_cast<int64_t>(first + token) * g.tiles + tile] = make_float2(best, __int_as_float(at));
        }
        sync();
    }
}

// The same for a kernel that reads the addends only now.
template <Epilogue kEpilogue, int kTokens, typename Sync>
__device__ __forceinline__ void finish(const GemmArguments& g, const float (&d)[kTokens / 2], int tile, int first, int warp,
                                       const float* scales, float* reduce, Sync sync) {
    finish<kEpilogue, kTokens>(g, d, load_addends<kEpilogue>(g, tile, warp), tile, first, warp, scales, reduce, sync);
}
