// What the sampling kernels are given and give back, and the arithmetic of shares: token for token what
// reference/sampling.rs computes.

#pragma once

#include "common.cuh"

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kTileTokens = 64;
constexpr int kTilesMax = 4096;
constexpr int kRanksMax = 8;
constexpr int kBins = 64;
// Steps of depth below the largest logit that have a bin; the last bin is for the sum of all.
constexpr int kLastBin = kBins - 1;
constexpr int kCoarseBins = kThreads;
constexpr int kListMax = 2 * kThreads;
// Candidates of a block, among which a cut is then looked for.
constexpr int kNearMax = 3072;
// Survivors up to which the draw happens within the ranked list.
constexpr int kDrawnFromList = 128;
constexpr int kTopMax = 20;
constexpr int kBiasesMax = 1024;
constexpr float kLog2E = 1.44269502f;
// What a share less than 2^-41 of the largest rounds to is nothing; one octave more is on the safe side.
constexpr float kOctaves = 42.0f;

struct SlotParameters {
    float scale;        // log2(e) / temperature, at most the largest number; 0: the most likely token
    float floor;        // temperature * ln(min_p), which the largest logit is added to; -inf: off
    float top_p;        // 1: off
    uint32_t top_k;     // 0: off
    float repetition;
    float presence;
    float frequency;
    int penalised;      // whether any penalty is on, and so `seen` is kept
    int biases;         // entries of the slot's list
    int alternatives;   // most likely tokens to report; -1: no log-probabilities at all
    uint64_t seed;
};

struct Bias {
    uint32_t token;  // ascending; equals in the order in which they are added
    float bias;
};

struct SampleRow {
    int slot;
    int position;  // of the token that is drawn; negative: padding
};

struct PromptRow {
    int row;           // of the logits; negative: padding
    int token;         // the one that follows it
    int alternatives;
    int unused;
};

struct Top {
    uint32_t token;
    float logprob;
};

// The second sixteen bytes are one store, which the host sees whole.
struct SampleResult {
    float logprob;   // with alternatives >= 0 alone, as rank, tops and top
    uint32_t rank;   // 1: the most likely
    uint32_t tops;
    uint32_t unused;
    uint32_t token;
    uint32_t failed; // 1: no finite logits
    uint32_t unused_too;
    uint32_t epoch;  // written last
    Top top[kTopMax];
};

struct SampleArguments {
    const float* logits;    // null: every row is greedy, without penalties, bias and log-probabilities
    float* scratch;         // [rows][stride], of rows with penalties or bias
    const float2* best;
    int stride;             // a multiple of 4, at least `vocabulary` rounded up to that
    int tiles;
    int vocabulary;
    int seen_stride;        // a multiple of 4
    const SampleRow* rows;
    const PromptRow* prompts;
    const SlotParameters* parameters;
    uint16_t* seen;         // bit 15: occurs in the prompt; the others: times generated
    const Bias* biases;     // [slots][1024]
    int* last_tokens;
    SampleResult* results;  // [ring][results_max], pinned host memory
    const uint32_t* epoch;  // of this step; results go to place epoch % ring
    int ring;
    int results_max;
};

struct SeenArguments {
    uint16_t* seen;
    const int* tokens;
    int64_t seen_stride;
    int slot;
    int count;
    int prompt_tokens;
    int vocabulary;
};

// The last token that survives: everything that ranks before it survives too.
struct Cut {
    float logit;
    uint32_t token;
    // Without branches, which would part a warp.
    __device__ bool keeps(float other, uint32_t id) const { return (other > logit) | ((other == logit) & (id <= token)); }
};

__device__ __forceinline__ float next_below(float x) {
    const int bits = __float_as_int(x);
    return x > 0.0f ? __int_as_float(bits - 1) : x < 0.0f ? __int_as_float(bits + 1) : -1.401298464e-45f;
}

// The same for four neighbours with one comparison each: they survive if they are larger than what this returns. Where the
// cut parts four equals, those behind it become the smallest.
__device__ __forceinline__ float larger_survive(const Cut& cut, float below, float4& x, uint32_t id) {
    if (cut.token - id < 3) {
        if (x.y == cut.logit && cut.token < id + 1) x.y = -INFINITY;
        if (x.z == cut.logit && cut.token < id + 2) x.z = -INFINITY;
        if (x.w == cut.logit) x.w = -INFINITY;
        return below;
    }
    return id <= cut.token ? below : cut.logit;
}

__device__ __forceinline__ Cut keeps_all_numbers() { return {-3.402823466e38f, 0xffffffffu}; }

// Ascending integers for ascending logits; both zeros are one.
__device__ __forceinline__ uint32_t key_of(float logit) {
    const uint32_t bits = __float_as_uint(logit + 0.0f);
    return bits ^ (static_cast<uint32_t>(static_cast<int>(bits) >> 31) | 0x80000000u);
}
__device__ __forceinline__ float logit_of(uint32_t key) {
    return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}
// Descending by logit, then ascending by id, is descending in this.
__device__ __forceinline__ uint64_t ranked(float logit, uint32_t id) {
    return static_cast<uint64_t>(key_of(logit)) << 32 | static_cast<uint32_t>(~id);
}
__device__ __forceinline__ float logit_in(uint64_t entry) { return logit_of(static_cast<uint32_t>(entry >> 32)); }
__device__ __forceinline__ uint32_t token_in(uint64_t entry) { return ~static_cast<uint32_t>(entry); }

// 2^(40 + y) for y from -64 to 0, as reference/sampling.rs computes it: no fused multiply-add, every step rounded to nearest.
__device__ __forceinline__ float power_of(float y) {
    // 1.5 * 2^23 + 40: the sum's low bits are the rounded y + 40.
    constexpr float kShift = 12582952.0f;
    const float shifted = __fadd_rn(y, kShift);
    const float f = __fsub_rn(y, __fsub_rn(shifted, kShift));
    float p = 0.0013381302f;
    p = __fadd_rn(__fmul_rn(p, f), 0.0096663684f);
    p = __fadd_rn(__fmul_rn(p, f), 0.055503812f);
    p = __fadd_rn(__fmul_rn(p, f), 0.2402235f);
    p = __fadd_rn(__fmul_rn(p, f), 0.6931472f);
    p = __fadd_rn(__fmul_rn(p, f), 1.0f);
    return __uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23));
}

// A power rounded to an integer, as two words that are added up apart: share = high * 2^20 + low, low from -2^19 to 2^19.
struct Parts {
    int high;
    int low;
    __device__ uint64_t whole() const { return (static_cast<uint64_t>(static_cast<uint32_t>(high)) << 20) + static_cast<int64_t>(low); }
};
__device__ __forceinline__ Parts parts_of(float value) {
    constexpr float kHigh = 13194139533312.0f;  // 1.5 * 2^43: the last place is 2^20
    constexpr float kLow = 12582912.0f;         // 1.5 * 2^23
    const float high = __fadd_rn(value, kHigh);
    const float low = __fadd_rn(__fsub_rn(value, __fsub_rn(high, kHigh)), kLow);
    return {__float_as_int(high) - 0x55400000, __float_as_int(low) - 0x4b400000};
}
__device__ __forceinline__ uint64_t random_bits(uint64_t seed, uint32_t position) {
    const uint4 words = philox(position, seed);
    return static_cast<uint64_t>(words.y) << 32 | words.x;
}
