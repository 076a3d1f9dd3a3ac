// The blocks that share a row of logits: what each holds of it, how they exchange numbers, and how they read.

#pragma once

#include "sampling.cuh"

struct Shared {
    // Written by other blocks of the row.
    uint64_t exchange[2][kRanksMax][kBins];
    uint64_t arrived[2];  // barriers that count the bytes of an exchange
    float maxima[kTilesMax];
    uint32_t found;       // the drawn token
    uint32_t found_valid;
    // Read by them.
    uint32_t own_count;
    uint64_t own[kListMax];
    // This block's alone.
    uint32_t near_count;
    uint64_t above[kRanksMax];  // shares of the survivors that each block of the row reads
    int listed_high[kRanksMax];  // of those in the list, in parts
    int listed_low[kRanksMax];
    uint32_t at;
    uint64_t wanted;
    uint64_t sums[kWarps];
    uint32_t words[kWarps];
    SlotParameters slot;
    SampleRow row;
    float raw_max;
    uint32_t epoch;
    int columns;          // of the bins
    int2 tiles[kWarps];   // each warp's first and what follows its last
    union {
        alignas(16) uint64_t near[kNearMax];  // candidates, before the list is made
        struct {
            union {
                uint64_t list[kListMax];
                uint16_t first_bias[kTilesMax];  // of a tile in its slot's list
            };
            float adjusted_maxima[kTilesMax];  // which other blocks write
        };
    };
    union {
        uint32_t coarse[kCoarseBins];
        uint64_t pairs[kTilesMax / kWarps / 2];
        struct {
            uint64_t share[kDrawnFromList];
            uint32_t token[kDrawnFromList];
        } drawn;
    };
    // [low|high][kBins][columns]
    uint32_t bins[];
};
static_assert(sizeof(Shared) <= 59 * 1024, "ops/sampling.rs asks for so much, and bins");
static_assert(sizeof(uint64_t[kListMax]) >= sizeof(uint16_t[kTilesMax]), "a list's place holds the first biases");

// So many columns of the bins that no cell counts 4,096 tokens, whose parts would overflow it; a warp visits so many tiles.
__host__ __device__ constexpr int columns_of(int tiles_each) {
    const int of_thread = (tiles_each + 1) / 2 * 4;
    return 16 * of_thread < 4096 ? 32 : 8 * of_thread < 4096 ? 64 : 80;
}

// What a block knows of its row.
struct Block {
    const SampleArguments& a;
    Shared& s;
    const float* logits;
    uint32_t phase;  // exchanges so far

    __device__ int rank() const { return blockIdx.x; }
    __device__ int ranks() const { return gridDim.x; }
    __device__ int tiles_each() const { return (a.tiles + ranks() * kWarps - 1) / (ranks() * kWarps); }
};

// Before another block's shared memory is touched, that block runs and its barriers are ready: begin_row early, join_row
// before the first such access, and again after leave_row. sync_row makes visible what all threads of the row wrote, to shared and global memory.
__device__ __forceinline__ void begin_row(Shared& s) {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) {
        barrier_init(shared_address(&s.arrived[0]), 1);
        barrier_init(shared_address(&s.arrived[1]), 1);
        barriers_are_ready();
    }
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void join_row() {
#if __CUDA_ARCH__ >= 900
    cluster_wait();
#endif
}
// Where this block's memory is read no longer, and it may end once it has joined the row again.
__device__ __forceinline__ void leave_row() {
#if __CUDA_ARCH__ >= 900
    cluster_arrive();
#endif
}
__device__ __forceinline__ void sync_row() {
#if __CUDA_ARCH__ >= 900
    cluster_arrive();
    cluster_wait();
#else
    __syncthreads();
#endif
}

template <typename T>
__device__ __forceinline__ T* in_block(T* here, int rank) {
#if __CUDA_ARCH__ >= 900
    T* there;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(here), "r"(rank));
    return there;
#else
    return here;
#endif
}

// An exchange: every block tells every block `words` words by tell, and all threads call complete. Two in turn have places
// of their own: who is told the next but one has read this one.
__device__ __forceinline__ void tell(Block& b, int rank, int place, uint64_t word) {
#if __CUDA_ARCH__ >= 900
    // A launch without clusters has no such stores.
    if (b.ranks() > 1) {
        const uint32_t to = shared_of(shared_address(&b.s.exchange[b.phase % 2][b.rank()][place]), rank);
        const uint32_t barrier = shared_of(shared_address(&b.s.arrived[b.phase % 2]), rank);
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(to), "l"(word), "r"(barrier)
                     : "memory");
        return;
    }
#endif
    b.s.exchange[b.phase % 2][0][place] = word;
}
__device__ __forceinline__ const uint64_t (*complete(Block& b, int words))[kBins] {
    const uint32_t place = b.phase % 2;
#if __CUDA_ARCH__ >= 900
    if (b.ranks() > 1) {
        const uint32_t barrier = shared_address(&b.s.arrived[place]);
        if (threadIdx.x == 0) barrier_expect(barrier, words * b.ranks() * 8);
        barrier_wait(barrier, b.phase / 2 % 2);
    } else {
        __syncthreads();
    }
#else
    __syncthreads();
#endif
    ++b.phase;
    return b.s.exchange[place];
}

__device__ __forceinline__ uint64_t sum_of_warp(uint64_t value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}
__device__ __forceinline__ uint64_t running_sum_of_warp(uint64_t value) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const uint64_t before = __shfl_up_sync(0xffffffffu, value, distance);
        if (threadIdx.x % 32 >= distance) value += before;
    }
    return value;
}

// The sum of all values up to and with this thread's.
__device__ __forceinline__ uint64_t running_sum_of_block(Shared& s, uint64_t value) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint64_t sum = running_sum_of_warp(value);
    if (lane == 31) s.sums[warp] = sum;
    __syncthreads();
    const uint64_t before = sum_of_warp(lane < warp ? s.sums[lane] : 0);
    __syncthreads();
    return sum + before;
}

// The largest pair of words, by the first; of equal first ones the largest second.
__device__ __forceinline__ uint64_t max_of_warp(uint64_t value) {
    const uint32_t high = static_cast<uint32_t>(value >> 32);
    const uint32_t highest = __reduce_max_sync(0xffffffffu, high);
    const uint32_t lowest = __reduce_max_sync(0xffffffffu, high == highest ? static_cast<uint32_t>(value) : 0);
    return static_cast<uint64_t>(highest) << 32 | lowest;
}
__device__ __forceinline__ uint64_t max_of_block(Shared& s, uint64_t value) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    value = max_of_warp(value);
    if (lane == 0) s.sums[warp] = value;
    __syncthreads();
    value = max_of_warp(s.sums[lane % kWarps]);
    __syncthreads();
    return value;
}
__device__ __forceinline__ uint32_t min_of_block(Shared& s, uint32_t value) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    value = __reduce_min_sync(0xffffffffu, value);
    if (lane == 0) s.words[warp] = value;
    __syncthreads();
    value = __reduce_min_sync(0xffffffffu, s.words[lane % kWarps]);
    __syncthreads();
    return value;
}

// Every block learns every warp's sum.
__device__ __forceinline__ const uint64_t (*exchange_warp_sums(Block& b, uint64_t of_thread))[kBins] {
    const uint64_t sum = sum_of_warp(of_thread);
    const int lane = threadIdx.x % 32;
    if (lane < b.ranks()) tell(b, lane, threadIdx.x / 32, sum);
    return complete(b, kWarps);
}
__device__ __forceinline__ uint64_t sum_of_row(Block& b, uint64_t of_thread) {
    const uint64_t(*sums)[kBins] = exchange_warp_sums(b, of_thread);
    uint64_t sum = 0;
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < b.ranks() * kWarps; i += 32) sum += sums[i / kWarps][i % kWarps];
    return sum_of_warp(sum);
}

// The row's sums of two values.
struct Two {
    uint64_t first, second;
};
__device__ __forceinline__ Two sums_of_row(Block& b, uint64_t first, uint64_t second) {
    static_assert(2 * kWarps <= kBins, "an exchange holds two words of every warp");
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    first = sum_of_warp(first), second = sum_of_warp(second);
    if (lane < b.ranks()) tell(b, lane, warp, first), tell(b, lane, kWarps + warp, second);
    const uint64_t(*sums)[kBins] = complete(b, 2 * kWarps);
    Two all{0, 0};
#pragma unroll 1
    for (int i = lane; i < b.ranks() * kWarps; i += 32) all.first += sums[i / kWarps][i % kWarps], all.second += sums[i / kWarps][kWarps + i % kWarps];
    return {sum_of_warp(all.first), sum_of_warp(all.second)};
}

// Of up to 128 values in order, the one in which a point lies that their sum decides, and how far in it. By a warp.
template <typename Value, typename Point>
__device__ __forceinline__ int place_of(int count, Value value, Point point_of, uint64_t* within) {
    const int lane = threadIdx.x % 32;
    uint64_t mine[4];
    uint64_t own = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        mine[i] = 4 * lane + i < count ? value(4 * lane + i) : 0;
        own += mine[i];
    }
    const uint64_t sum = running_sum_of_warp(own);
    const uint64_t point = point_of(__shfl_sync(0xffffffffu, sum, 31));
    const int found = __ffs(__ballot_sync(0xffffffffu, sum > point)) - 1;
    uint64_t left = point - (sum - own);
    int at = 4 * lane;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        if (at == 4 * lane + i && left >= mine[i]) left -= mine[i], ++at;
    }
    *within = __shfl_sync(0xffffffffu, left, found);
    return __shfl_sync(0xffffffffu, at, found);
}

// Four logits. Nothing waits for them yet, so that several can be on their way.
__device__ __forceinline__ float4 load_logits(const float* logits, bool on) {
    float4 x = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
    asm volatile("{\n.reg .pred on;\nsetp.ne.b32 on, %5, 0;\n@on ld.global.v4.f32 {%0, %1, %2, %3}, [%4];\n}\n"
                 : "+f"(x.x), "+f"(x.y), "+f"(x.z), "+f"(x.w)
                 : "l"(logits), "r"(static_cast<int>(on)));
    return x;
}
// Those beyond the vocabulary become the smallest.
__device__ __forceinline__ void cut_off(float4& x, int id, int vocabulary) {
    if (id + 4 > vocabulary) {
        if (id + 1 >= vocabulary) x.y = -INFINITY;
        if (id + 2 >= vocabulary) x.z = -INFINITY;
        x.w = -INFINITY;
    }
}

// Calls f(four logits, the first's id) for the tokens of this warp's tiles whose largest logit is at least `reach`, and so
// for every token of at least `reach`, with others among them. Half a warp reads a tile.
template <int kAtOnce, typename F>
__device__ __forceinline__ void visit_fours(const Block& b, float reach, F f) {
    const int lane = threadIdx.x % 32;
    const int2 tiles = b.s.tiles[threadIdx.x / 32];
#pragma unroll 1
    for (int pair = tiles.x; pair < tiles.y; pair += 2 * kAtOnce) {
        float4 x[kAtOnce];
        bool on[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int tile = pair + 2 * i + lane / 16;
            const int id = tile * kTileTokens + lane % 16 * 4;
            on[i] = (tile < tiles.y) & (b.s.maxima[min(tile, tiles.y - 1)] >= reach) & (id < b.a.vocabulary);
            x[i] = load_logits(b.logits + id, on[i]);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int id = (pair + 2 * i + lane / 16) * kTileTokens + lane % 16 * 4;
            if (!on[i]) continue;
            cut_off(x[i], id, b.a.vocabulary);
            f(x[i], id);
        }
    }
}
// The same, one by one.
template <int kAtOnce, typename F>
__device__ __forceinline__ void visit(const Block& b, float reach, F f) {
    visit_fours<kAtOnce>(b, reach, [&](float4 x, uint32_t id) { f(x.x, id), f(x.y, id + 1), f(x.z, id + 2), f(x.w, id + 3); });
}

// The largest logit of every tile, raw, as the head left them, into shared memory; the largest of all, ranked. Their loads
// begin early and wait for nothing else.
struct Maxima {
    static constexpr int kEarly = 4;
    float2 of_tiles[kEarly];

    __device__ __forceinline__ void begin(const float2* best, int tiles) {
#pragma unroll
        for (int i = 0; i < kEarly; ++i) {
            const int tile = threadIdx.x + i * kThreads;
            of_tiles[i] = tile < tiles ? best[tile] : make_float2(-INFINITY, 0.0f);
        }
    }
    __device__ __forceinline__ uint64_t finish(Shared& s, const float2* best, int tiles) {
        uint64_t largest = 0;
        auto take = [&](int tile, float2 of_tile) {
            // Not a number becomes the smallest.
            const float logit = fmaxf(of_tile.x, -INFINITY);
            s.maxima[tile] = logit;
            if (logit > -INFINITY) largest = max(largest, ranked(logit, __float_as_uint(of_tile.y)));
        };
#pragma unroll
        for (int i = 0; i < kEarly; ++i) {
            const int tile = threadIdx.x + i * kThreads;
            if (tile < tiles) take(tile, of_tiles[i]);
        }
#pragma unroll 1
        for (int tile = threadIdx.x + kEarly * kThreads; tile < tiles; tile += kThreads) take(tile, best[tile]);
        return max_of_block(s, largest);
    }
};
