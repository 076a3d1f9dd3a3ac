// Log-probability and rank of a token, and the likeliest ones.

#pragma once

#include "sampling_draw.cuh"

// Log-probability and rank of a token and the most likely ones, by the raw logits, whose maxima are in shared memory. Block
// 0 of the row writes them.
__device__ __forceinline__ void report(Block& b, float max, uint32_t token, int alternatives, SampleResult* result) {
    Shared& s = b.s;
    Row row{b, max, kLog2E};
    const uint32_t top = min(min(alternatives, kTopMax), b.a.vocabulary);
    float reach = INFINITY;
    if (top > 0) reach = reached_by(b, max, top);
    const bool listed = reach > -INFINITY;
    clear_list(s);
    if (top > 0 && listed) take_all(b, reach, s.own, &s.own_count, kListMax, [&](float logit, uint32_t) { return logit >= reach; });
    const float own = b.logits[token];
    uint64_t sum;
    uint32_t before = 0;
    {
        Parts parts{0, 0};
        visit<2>(b, fmaxf(fminf(own, row.reach(kOctaves)), -3.402823466e38f), [&](float logit, uint32_t id) {
            const Parts of_token = row.parts(logit);
            parts.high += of_token.high, parts.low += of_token.low;
            before += (logit > own) | ((logit == own) & (id < token));
        });
        const Two sums = sums_of_row(b, parts.whole(), before);
        sum = sums.first, before = static_cast<uint32_t>(sums.second);
    }
    uint32_t listed_count = 0;
    if (top > 0) {
        listed_count = listed ? collect(b) : kListMax + 1;
        if (listed_count > kListMax) {
            // Many equals, or fewer tiles than tokens to report.
            const Cut cut = row.reached_by_halving(keeps_all_numbers(), top, false);
            clear_list(s);
            take_all(b, cut.logit, s.own, &s.own_count, kListMax, [&](float logit, uint32_t id) { return cut.keeps(logit, id); });
            listed_count = collect(b);
        }
    }
    if (b.rank() != 0 || threadIdx.x >= 32) return;
    const double shift = static_cast<double>(max) + log(static_cast<double>(sum) * 0x1p-40);
    const uint32_t tops = min(listed_count, top);
    if (threadIdx.x < tops) {
        const uint64_t entry = s.list[threadIdx.x];
        result->top[threadIdx.x] = {token_in(entry), static_cast<float>(static_cast<double>(logit_in(entry)) - shift)};
    }
    if (threadIdx.x == 0) {
        result->logprob = static_cast<float>(static_cast<double>(own) - shift);
        result->rank = before + 1;
        result->tops = tops;
    }
    // The token and the epoch follow all this.
    __threadfence_system();
    __syncwarp();
}
