// Hopper only.
// Attention of one new token of each sequence where there are many sequences: what attention_decode.cu does, by
// blocks that stay.
//
// Grid: as many blocks as the card holds at once. An item is one KV head of one row, for a run of at most 16 of the query
// heads that share it. A block's first items follow from its number; each further one is the next that nobody has claimed,
// so that long rows and short ones even out, best where long ones come first. With `splits` 2 the long ones of a block's
// first run are taken in halves, which meet in `partials`. Who claims an item touches none of its bits. A fifth warp
// fetches pages into a ring of `stages` and runs ahead into the next item while the four that compute finish this one:
// device memory never waits for queries to be made ready or for sums to meet. Of a row's last page only the tokens that are
// there are fetched.
//
// Shared memory: ring [stages][K|V][kDim / 64][64][64] bf16, sums of the warps [4][group][kDim + 8] f32, their states,
// query [kDim / 64][16][64], new key and value [K|V][kDim], items, a flag, barriers.
//
// Moves 4 * kDim bytes per position and KV head, once per run. Expected: 90 % of the card's read bandwidth, also where
// a row is a few pages. Measured on an H100 (Llama 8B, 256 rows): 84 % at 128 tokens, 92 % at 190, 95 % at 1,024.

#include "attention_decode.cuh"

namespace {

#if __CUDA_ARCH__ >= 900

// Rows of more pages are taken in two halves, so that none holds a block long after the others are done.
constexpr int kPagesWhole = 16;

enum Part { kWhole, kFirstHalf, kSecondHalf };

// What a block does next, and what the warps that compute are told.
struct Item {
    int run;  // row * runs of a row + run of query heads; negative: there is none any more
    int slot;
    int position;
    Part part;
};

// `counters`, one for each run: bit 28 says that one half of the run is there, the bits below belong to the whole grid.
constexpr int kHalfArrived = 1 << 28;

// Items that a block may have begun to fetch.
constexpr int kQueue = 4;

// The query heads of a run.
struct Heads {
    int row, kv_head, of_row, first, count;

    __device__ __forceinline__ Heads(const AttentionArguments& a, int run, int runs) {
        const int sharing = a.heads / a.kv_heads, units = a.kv_heads * runs;
        row = a.first_row + run / units, kv_head = run % units / runs, of_row = run % runs;
        first = kv_head * sharing + of_row * kRows, count = min(sharing - of_row * kRows, kRows);
    }
};

struct Barriers {
    uint32_t queue_full, queue_free;  // [kQueue] each
    uint32_t full, free;              // [stages] each, 16 bytes apart
};

// The pages of an item.
struct Pages {
    int first, end;

    __device__ __forceinline__ Pages(const AttentionArguments& a, int position, Part part = kWhole) {
        first = a.window > 0 ? max(0, position + 1 - a.window) / kPageTokens : 0;
        end = position / kPageTokens + 1;
        const int middle = first + (end - first) / 2;
        if (part == kFirstHalf) end = middle;
        if (part == kSecondHalf) first = middle;
    }
};

// The tokens of a page that earlier steps wrote; asynchronous.
template <int kDim>
__device__ __forceinline__ void fetch_page(const AttentionArguments& a, int page, int kv_head, int tokens, uint32_t to, uint32_t barrier) {
    using L = Layout<kDim>;
    barrier_expect(barrier, 2 * (kDim / 64) * tokens * kPanelRowBytes);
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
        const bf16* from = head_of_page<kDim>(a, page, half, kv_head);
        if (tokens == kPageTokens) {
            bulk_copy(to + half * L::kHalfBytes, from, L::kHalfBytes, barrier);
        } else if (tokens > 0) {
#pragma unroll 1
            for (int panel = 0; panel < kDim / 64; ++panel) {
                const int place = panel * kPageTokens * kPanelRowBytes;
                bulk_copy(to + half * L::kHalfBytes + place, from + place / 2, tokens * kPanelRowBytes, barrier);
            }
        }
    }
}

// The fifth warp. What a block does: the run of its number, or the first half of it where the row is long; the second half of
// the run of the block opposite, if that one is in halves; the run of its number among those that are left; then whatever
// nobody has claimed.
template <int kDim>
__device__ __forceinline__ void fetch_items(const AttentionArguments& a, int runs, uint32_t ring, Item* queue, const Barriers& barriers, int lane) {
    const int units = a.kv_heads * runs, items = a.row_count * units, blocks = gridDim.x;
    int* const claimed = a.counters;
    int* const done = a.counters + 1;
    int stage = 0, lap = 0, told = 0;
    const auto tell = [&](const Item& item) {
        const int place = told % kQueue;
        if (told >= kQueue) barrier_wait(barriers.queue_free + 8 * place, (told / kQueue - 1) & 1);
        if (lane == 0) {
            queue[place] = item;
            barrier_arrive(barriers.queue_full + 8 * place);
        }
        ++told;
    };
    const auto item_of = [&](int run) -> Item {
        if (run >= items) return {-1, 0, 0, kWhole};
        // Past the L1, which may still hold what a step before left there.
        const int4 here = __ldcg(reinterpret_cast<const int4*>(a.rows + a.first_row + run / units));
        return {run, here.y, here.z, kWhole};
    };
    const auto is_long = [&](const Item& item) {
        const Pages pages(a, item.position);
        return a.splits == 2 && item.position >= 0 && pages.end - pages.first > kPagesWhole;
    };
    if (!a.settled) wait_for_predecessor();
    Item item = item_of(blockIdx.x), opposite = item_of((blockIdx.x + blocks / 2) % blocks);
    if (is_long(item)) item.part = kFirstHalf;
    if (is_long(opposite)) opposite.part = kSecondHalf;
    bool is_first = true, follows_number = true;
    while (item.run >= 0) {
        Item next = opposite;
        bool known = opposite.part == kSecondHalf;
        int run = blocks + blockIdx.x;
        if (known) {
            opposite.part = kWhole;
        } else if (follows_number) {
            follows_number = false;
        } else {
            // A chain may start this kernel while the one that used the counter before still runs.
            wait_for_predecessor();
            if (lane == 0) run = 2 * blocks + (atomicAdd(claimed, 1) & (kHalfArrived - 1));
        }
        const auto learn = [&] {
            next = item_of(__shfl_sync(0xffffffffu, run, 0));
            known = true;
        };
        if (item.position >= 0) {
            tell(item);
            const int* table = a.tables + static_cast<int64_t>(item.slot) * a.table_stride;
            const int kv_head = item.run % units / runs;
            const Pages pages(a, item.position, item.part);
            for (int base = pages.first; base < pages.end; base += 32) {
                const int mine = base + lane < pages.end ? __ldcg(table + base + lane) : 0;
                for (int i = 0; i < min(32, pages.end - base); ++i) {
                    const int page = __shfl_sync(0xffffffffu, mine, i);
                    if (lane == 0) {
                        if (lap > 0) barrier_wait(barriers.free + 16 * stage, (lap - 1) & 1);
                        fetch_page<kDim>(a, page, kv_head, min(kPageTokens, item.position - (base + i) * kPageTokens),
                                         ring + stage * Layout<kDim>::kStageBytes, barriers.full + 16 * stage);
                    }
                    __syncwarp();
                    if (++stage == a.stages) stage = 0, ++lap;
                    // The first time there are other pages to ask for before.
                    if (!known && (!is_first || lap > 0)) learn();
                }
            }
        }
        if (!known) learn();
        item = next;
        is_first = false;
    }
    tell({-1, 0, 0, kWhole});
    wait_for_predecessor();
    if (lane == 0) {
        // The last to claim leaves the counters as they were.
        asm volatile("fence.acq_rel.gpu;" ::: "memory");
        if ((atomicAdd(done, 1) & (kHalfArrived - 1)) == blocks - 1) {
            asm volatile("fence.acq_rel.gpu;" ::: "memory");
            atomicAnd(claimed, kHalfArrived), atomicAnd(done, kHalfArrived);
        }
    }
}

// A half's sums and states leave for the block that comes second, which adds both in their order. Whether it is this one.
template <int kDim>
__device__ __forceinline__ bool meet(const AttentionArguments& a, const Item& item, int group, int heads_max, const float* merge,
                                     const float* warp_maximum, const float* warp_sum, int* arrived, int thread) {
    const int half = item.part - kFirstHalf;
    float* partial = a.partials + static_cast<int64_t>(item.run) * ((2 * heads_max * (kDim + 2) + 3) / 4 * 4);  // [2][group][kDim]
    float* states = partial + 2 * group * kDim;                                                                // [2][group][2]
    for (int i = thread; i < group * (kDim / 4); i += kThreads) {
        const int head = i / (kDim / 4), d = i % (kDim / 4) * 4;
        float maximum, sum;
        const float4 x = sum_of_warps<kDim>(merge, warp_maximum, warp_sum, group, head, d, maximum, sum);
        *reinterpret_cast<float4*>(partial + (half * group + head) * kDim + d) = x;
        if (d == 0) *reinterpret_cast<float2*>(states + 2 * (half * group + head)) = make_float2(maximum, sum);
    }
    // One thread's fences stand for all: what the others wrote came before the barrier, what they read comes after one.
    sync_computing();
    if (thread == 0) {
        asm volatile("fence.acq_rel.gpu;" ::: "memory");
        int* counter = a.counters + item.run;
        const bool second = atomicXor(counter, kHalfArrived) & kHalfArrived;
        asm volatile("fence.acq_rel.gpu;" ::: "memory");
        *arrived = second;
    }
    sync_computing();
    return *arrived;
}

template <int kDim>
__device__ __forceinline__ void decode_many(const AttentionArguments& a) {
    using L = Layout<kDim>;
    extern __shared__ __align__(1024) char shared[];
    const int sharing = a.heads / a.kv_heads, runs = (sharing + kRows - 1) / kRows;
    char* ring = shared;
    float* merge = reinterpret_cast<float*>(ring + a.stages * L::kStageBytes);  // [kWarps][group][kSumStride]
    float* warp_maximum = merge + kWarps * min(sharing, kRows) * L::kSumStride;  // [kWarps][16]
    float* warp_sum = warp_maximum + kWarps * kRows;                            // [kWarps][16]
    bf16* queries = reinterpret_cast<bf16*>(warp_sum + kWarps * kRows);         // [kDim / 64][16][64]
    bf16* fresh = queries + kRows * kDim;                                       // [K|V][kDim]
    Item* queue = reinterpret_cast<Item*>(fresh + 2 * kDim);                    // [kQueue]
    int* arrived = reinterpret_cast<int*>(queue + kQueue);                      // and three unused
    const uint32_t at = shared_address(arrived + 4);
    const Barriers barriers = {at, at + 8 * kQueue, at + 16 * kQueue, at + 16 * kQueue + 8};

    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    if (thread == 0) {
        for (int i = 0; i < kQueue; ++i) {
            barrier_init(barriers.queue_full + 8 * i, 1);
            barrier_init(barriers.queue_free + 8 * i, kThreads);
        }
        for (int i = 0; i < a.stages; ++i) {
            barrier_init(barriers.full + 16 * i, 1);
            barrier_init(barriers.free + 16 * i, kThreads);
        }
        barriers_are_ready();
    }
    __syncthreads();
    if (warp == kWarps) return fetch_items<kDim>(a, runs, shared_address(ring), queue, barriers, lane);

    const float scale = a.scale * 1.4426950408889634f;
    const uint32_t own_ring = shared_address(ring) + warp * 16 * kPanelRowBytes;
    int stage = 0, lap = 0;
    for (int turn = 0;; ++turn) {
        const int place = turn % kQueue;
        barrier_wait(barriers.queue_full + 8 * place, (turn / kQueue) & 1);
        if (queue[place].run < 0) break;
        {
            const Item item = queue[place];
            const Heads heads(a, item.run, runs);
            const int* table = a.tables + static_cast<int64_t>(item.slot) * a.table_stride;
            const bool owns_new = item.part != kFirstHalf;
            prepare<kDim>(a, {heads.row, item.position, heads.kv_head, heads.first, heads.count, owns_new, owns_new && heads.of_row == 0}, table,
                          queries, fresh, thread);
        }
        sync_computing();

        Running running;
        float sums[kDim / 8][4] = {};
        const int position = queue[place].position;
        const Pages pages(a, position, queue[place].part);
        const int first = a.window > 0 ? max(0, position + 1 - a.window) : 0;
        for (int page = pages.first; page < pages.end; ++page) {
            barrier_wait(barriers.full + 16 * stage, lap & 1);
            const int token = page * kPageTokens + warp * 16;  // the first of this warp
            if (token <= position && token + 16 > first) {
                char* to = ring + stage * L::kStageBytes + warp * 16 * kPanelRowBytes;
                if (token + 16 > position) {
                    place_new<kDim>(to, to + L::kHalfBytes, fresh, position - token, lane);
                    // The copy engine writes here next.
                    publish_to_engines();
                }
                const uint32_t keys[1] = {own_ring + stage * L::kStageBytes};
                attend<kDim, 1>(shared_address(queries), keys, lane, first - token, position + 1 - token, scale, running, sums);
            }
            // Every thread, so that a checker of races can follow it.
            barrier_arrive(barriers.free + 16 * stage);
            if (++stage == a.stages) stage = 0, ++lap;
        }
        // What was needed before the pages is read again, not held across them.
        asm volatile("" ::: "memory");
        const Item item = queue[place];
        barrier_arrive(barriers.queue_free + 8 * place);
        const Heads heads(a, item.run, runs);
        leave_sums<kDim>(running, sums, merge, warp_maximum, warp_sum, heads.count, warp, lane);
        sync_computing();
        const int heads_max = min(a.heads / a.kv_heads, kRows), group = heads.count;
        if (item.part != kWhole && !meet<kDim>(a, item, group, heads_max, merge, warp_maximum, warp_sum, arrived, thread)) continue;
        for (int i = thread; i < group * (kDim / 4); i += kThreads) {
            const int head = i / (kDim / 4), d = i % (kDim / 4) * 4;
            float maximum, sum;
            float4 x;
            if (item.part == kWhole) {
                x = sum_of_warps<kDim>(merge, warp_maximum, warp_sum, group, head, d, maximum, sum);
            } else {
                const float* partial = a.partials + static_cast<int64_t>(item.run) * ((2 * heads_max * (kDim + 2) + 3) / 4 * 4);
                const float2* states = reinterpret_cast<const float2*>(partial + 2 * group * kDim) + head;
                const float2 one = __ldcg(states), two = __ldcg(states + group);
                maximum = fmaxf(one.x, two.x);
                const float weights[2] = {exp2_fast(one.x - maximum), exp2_fast(two.x - maximum)};
                x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                add(x, weights[0], __ldcg(reinterpret_cast<const float4*>(partial + head * kDim + d)));
                add(x, weights[1], __ldcg(reinterpret_cast<const float4*>(partial + (group + head) * kDim + d)));
                sum = weights[0] * one.y + weights[1] * two.y;
            }
            store_out(a, heads.row, (heads.first + head) * kDim + d, x, 1.0f / sum);
        }
    }
    wait_for_predecessor();
    let_successor_start();
}

#endif

}  // namespace

#if __CUDA_ARCH__ >= 900
#define MANY(width, blocks)                                                                                             \
    extern "C" __global__ void __launch_bounds__(160, blocks) attention_many_##width(const __grid_constant__ AttentionArguments a) { \
        decode_many<width>(a);                                                                                          \
    }
MANY(64, 3)
MANY(128, 2)
MANY(256, 1)
#endif
