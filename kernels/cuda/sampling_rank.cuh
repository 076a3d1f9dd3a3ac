// Ranking within a row: lists of the likeliest tokens, and bins of sums that tell where a running sum is reached.

#pragma once

#include "sampling_row.cuh"

// A logit that at least `count` tokens reach, and as few more as the largest of each tile tell; -inf if there are not so
// many tiles.
__device__ __forceinline__ float reached_by(Block& b, float max, uint32_t count) {
    Shared& s = b.s;
    uint32_t least = 0xffffffffu;
#pragma unroll 1
    for (int tile = threadIdx.x; tile < b.a.tiles; tile += kThreads) {
        if (s.maxima[tile] > -INFINITY) least = min(least, key_of(s.maxima[tile]));
    }
    s.coarse[threadIdx.x] = 0;
    if (threadIdx.x == 0) s.at = kCoarseBins;
    const float scale = (kCoarseBins - 1) / (max - logit_of(min_of_block(s, least)));
    auto bin = [&](float logit) { return static_cast<int>(fminf((max - logit) * scale, kCoarseBins - 1)); };
#pragma unroll 1
    for (int tile = threadIdx.x; tile < b.a.tiles; tile += kThreads) {
        if (s.maxima[tile] > -INFINITY) atomicAdd(&s.coarse[bin(s.maxima[tile])], 1u);
    }
    __syncthreads();
    const uint32_t own = s.coarse[threadIdx.x];
    const uint64_t sum = running_sum_of_block(s, own);
    if (sum >= count && sum - own < count) s.at = threadIdx.x;
    __syncthreads();
    const int last = s.at;
    if (last == kCoarseBins) return -INFINITY;
    // The smallest of the counted ones.
    uint32_t reach = 0xffffffffu;
#pragma unroll 1
    for (int tile = threadIdx.x; tile < b.a.tiles; tile += kThreads) {
        const float logit = s.maxima[tile];
        if (logit > -INFINITY && bin(logit) <= last) reach = min(reach, key_of(logit));
    }
    return logit_of(min_of_block(s, reach));
}

__device__ __forceinline__ void clear_list(Shared& s) {
    if (threadIdx.x == 0) s.own_count = 0, s.near_count = 0;
    __syncthreads();
}
__device__ __forceinline__ void take(Shared& s, float logit, uint32_t id) {
    const uint32_t place = atomicAdd(&s.own_count, 1u);
    if (place < kListMax) s.own[place] = ranked(logit, id);
}

// Takes what `wanted(logit, id)` wants of the tokens of at least `reach` into `list`, which has room for `most`, and counts
// all of them. A warp counts its finds once in sixteen tokens a lane: one by one they would queue up.
template <typename Wanted>
__device__ __forceinline__ void take_all(const Block& b, float reach, uint64_t* list, uint32_t* count, uint32_t most, Wanted wanted) {
    constexpr int kAtOnce = 4;
    const int lane = threadIdx.x % 32;
    const int2 tiles = b.s.tiles[threadIdx.x / 32];
#pragma unroll 1
    for (int pair = tiles.x; pair < tiles.y; pair += 2 * kAtOnce) {
        float4 x[kAtOnce];
        bool some = false;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int tile = pair + 2 * i + lane / 16;
            const int id = tile * kTileTokens + lane % 16 * 4;
            const bool on = (tile < tiles.y) & (b.s.maxima[min(tile, tiles.y - 1)] >= reach) & (id < b.a.vocabulary);
            x[i] = load_logits(b.logits + id, on);
            some |= on;
        }
        if (!__any_sync(0xffffffffu, some)) continue;
        uint32_t found = 0;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int id = (pair + 2 * i + lane / 16) * kTileTokens + lane % 16 * 4;
            cut_off(x[i], id, b.a.vocabulary);
            found |= wanted(x[i].x, id) ? 1u << (4 * i) : 0;
            found |= wanted(x[i].y, id + 1) ? 2u << (4 * i) : 0;
            found |= wanted(x[i].z, id + 2) ? 4u << (4 * i) : 0;
            found |= wanted(x[i].w, id + 3) ? 8u << (4 * i) : 0;
        }
        uint32_t upto = __popc(found);
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const uint32_t before = __shfl_up_sync(0xffffffffu, upto, distance);
            if (lane >= distance) upto += before;
        }
        uint32_t place = 0;
        if (lane == 31 && upto > 0) place = atomicAdd(count, upto);
        place = __shfl_sync(0xffffffffu, place, 31) + upto - __popc(found);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int id = (pair + 2 * i + lane / 16) * kTileTokens + lane % 16 * 4;
            const float logits[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if ((found >> (4 * i + j) & 1) == 0) continue;
                if (place < most) list[place] = ranked(logits[j], id + j);
                ++place;
            }
        }
    }
}

// Collects what all blocks took into every block's list, in order of rank. More than kListMax: that number, and no list.
// Blocks then read each other's memory until the next exchange.
__device__ __forceinline__ uint32_t collect(Block& b) {
    Shared& s = b.s;
    sync_row();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t of_lane = lane < b.ranks() ? *in_block(&s.own_count, lane) : 0;
    uint32_t upto = of_lane;
#pragma unroll
    for (int distance = 1; distance < kRanksMax; distance *= 2) {
        const uint32_t before = __shfl_up_sync(0xffffffffu, upto, distance);
        if (lane >= distance) upto += before;
    }
    const uint32_t n = __shfl_sync(0xffffffffu, upto, kRanksMax - 1);
    if (n > kListMax) return n;
    {
        // Warps share the blocks.
        const int from = warp % b.ranks();
        const uint32_t count = __shfl_sync(0xffffffffu, of_lane, from);
        const uint32_t before = __shfl_sync(0xffffffffu, upto, from) - count;
        const uint64_t* entries = in_block(s.own, from);
        const int sharing = (kWarps - from + b.ranks() - 1) / b.ranks();
#pragma unroll 1
        for (uint32_t i = warp / b.ranks() * 32 + lane; i < count; i += sharing * 32) s.list[before + i] = entries[i];
    }
    __syncthreads();
    if (n <= 256) {
        // Each entry's place is the number of larger ones; two threads count for one entry, four entries at a time.
        if (threadIdx.x < 8) s.list[n + threadIdx.x] = 0;
        __syncthreads();
        const uint32_t i = threadIdx.x / 2;
        const uint64_t own = i < n ? s.list[i] : 0;
        uint32_t place = 0;
        if (i < n) {
#pragma unroll 2
            for (uint32_t j = threadIdx.x % 2 * 4; j < n; j += 8) {
                const ulonglong2 first = *reinterpret_cast<const ulonglong2*>(s.list + j), second = *reinterpret_cast<const ulonglong2*>(s.list + j + 2);
                place += (first.x > own) + (first.y > own) + (second.x > own) + (second.y > own);
            }
        }
        place += __shfl_xor_sync(0xffffffffu, place, 1);
        __syncthreads();
        if (i < n && threadIdx.x % 2 == 0) s.list[place] = own;
        __syncthreads();
        return n;
    }
    const uint32_t padded = n <= kListMax / 2 ? kListMax / 2 : kListMax;
#pragma unroll 1
    for (uint32_t i = n + threadIdx.x; i < padded; i += kThreads) s.list[i] = 0;
    __syncthreads();
#pragma unroll 1
    for (uint32_t size = 2; size <= padded; size *= 2) {
#pragma unroll 1
        for (uint32_t distance = size / 2; distance > 0; distance /= 2) {
            const uint32_t i = 2 * threadIdx.x - (threadIdx.x & (distance - 1));
            if (i + distance < padded) {
                const uint64_t a = s.list[i], c = s.list[i + distance];
                if ((a < c) == ((i & size) == 0)) s.list[i] = c, s.list[i + distance] = a;
            }
            __syncthreads();
        }
    }
    return n;
}

// Bins hold sums of parts, of which every lane has its own column: no two lanes of a warp meet. `column` is this thread's.
__device__ __forceinline__ void add_to_bin(uint32_t* column, int columns, int bin, Parts parts) {
    uint32_t* cell = column + bin * columns;
    atomicAdd(cell, static_cast<uint32_t>(parts.low));
    if (parts.high != 0) atomicAdd(cell + kBins * columns, static_cast<uint32_t>(parts.high));
}
__device__ __forceinline__ void clear_bins(Block& b) {
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * kBins * b.s.columns; i += kThreads) b.s.bins[i] = 0;
    __syncthreads();
}

// The row's sums of the bins but the last, and the first at which the running sum reaches what is wanted, which is told
// the last one's; in every thread. What lies before it joins `above`.
struct Crossing {
    uint64_t before;
    uint64_t sum;
    uint64_t last;
    int bin;  // kLastBin: never
};
template <typename Wanted>
__device__ __forceinline__ Crossing cross(Block& b, Wanted wanted) {
    static_assert(kThreads == 8 * kBins && kRanksMax == 8, "eight threads add up a bin, and each may tell one block");
    __syncthreads();
    {
        const int bin = threadIdx.x / 8, part = threadIdx.x % 8;
        const int columns = b.s.columns;
        uint64_t sum = 0;
#pragma unroll 4
        for (int i = part; i < columns; i += 8) {
            const uint32_t* cell = b.s.bins + bin * columns + i;
            sum += Parts{static_cast<int>(cell[kBins * columns]), static_cast<int>(cell[0])}.whole();
        }
#pragma unroll
        for (int distance = 4; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        if (part < b.ranks()) tell(b, part, bin, sum);
    }
    // The bins may be cleared as soon as the exchange is complete.
    __syncthreads();
    const uint64_t(*sums)[kBins] = complete(b, kBins);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint64_t first = 0, second = 0;
#pragma unroll
    for (int rank = 0; rank < kRanksMax; ++rank) {
        if (rank >= b.ranks()) continue;
        const ulonglong2 two = *reinterpret_cast<const ulonglong2*>(&sums[rank][2 * lane]);
        first += two.x, second += two.y;
    }
    Crossing c;
    c.last = __shfl_sync(0xffffffffu, second, 31);
    if (lane == 31) second = 0;
    const uint64_t sum = running_sum_of_warp(first + second);
    const uint64_t target = wanted(c.last);
    const uint32_t reached = __ballot_sync(0xffffffffu, sum >= target);
    const int at = reached == 0 ? 31 : __ffs(reached) - 1;
    const uint64_t before = sum - first - second;
    const bool in_first = before + first >= target;
    c.bin = reached == 0 ? kLastBin : __shfl_sync(0xffffffffu, 2 * lane + (in_first ? 0 : 1), at);
    c.before = __shfl_sync(0xffffffffu, reached == 0 ? sum : in_first ? before : before + first, at);
    c.sum = __shfl_sync(0xffffffffu, in_first ? first : second, at);
    if (warp < b.ranks()) {
        const uint64_t own = (2 * lane < c.bin ? sums[warp][2 * lane] : 0) + (2 * lane + 1 < c.bin ? sums[warp][2 * lane + 1] : 0);
        const uint64_t of_rank = sum_of_warp(own);
        if (lane == 0) b.s.above[warp] += of_rank;
    }
    return c;
}
