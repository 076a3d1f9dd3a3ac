// Attention of one new token of each sequence over the keys and values in its pages, with norm and RoPE of its query
// and key before, and the write of its key and value.
//
// Grid (kv_heads * runs, count, splits): a block takes one KV head of one row, a run of at most 16 of the query heads that
// share it, and an even share of the pages that the row sees. Only as many splits work as there are pages; the others
// leave at once. 128 threads compute: warp w takes tokens
// 16w.. of every page, with its own maximum and sums, so warps meet only at the end. On sm_90 a fifth warp fetches
// pages (two contiguous copies each) into a ring of `stages` pages; elsewhere each warp fetches its own tokens by
// cp.async, and never waits for another.
// The run's query heads ("group" below) are the 16 rows of mma.sync's A; S and the sums of P V stay in registers.
//
// Shared memory: ring [stages][K|V][kDim / 64][64][64] bf16, reused for sums of the warps [4][group][kDim + 8] f32;
// sums of the cluster's splits [cluster][group][kDim + 2] f32, query [kDim / 64][16][64], new key and value [K|V][kDim], barriers.
// Splits of a cluster send their sums into the first one's shared memory; otherwise they go through `partials` to the
// block that arrives last. Both add in the order of the splits.
//
// Moves 4 * kDim bytes per position and KV head, once per run. Expected: 90 % of the card's read bandwidth from some 100 MB on;
// below that the latency of about five dependent steps, 2 to 3 us.

#include "attention_decode.cuh"

namespace {

[[maybe_unused]] constexpr int kStagesForTwo = 4;
// Pages per block up to which a cluster's splits suffice; past it more splits are worth their slower merge.
[[maybe_unused]] constexpr int kPagesWithinCluster = 8;

#if __CUDA_ARCH__ >= 900
// Stores into the shared memory of another block of the cluster, counted by a barrier there.
__device__ __forceinline__ void send(uint32_t to, float4 x, uint32_t barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to), "f"(x.x), "f"(x.y),
                 "f"(x.z), "f"(x.w), "r"(barrier)
                 : "memory");
}
__device__ __forceinline__ void send(uint32_t to, float x, float y, uint32_t barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(to), "f"(x), "f"(y), "r"(barrier)
                 : "memory");
}
__device__ __forceinline__ int cluster_depth() {
    int blocks;
    asm volatile("mov.u32 %0, %%cluster_nctaid.z;" : "=r"(blocks));
    return blocks;
}
#endif

template <int kDim>
__device__ __forceinline__ void decode(const AttentionArguments& a) {
    using L = Layout<kDim>;
    extern __shared__ __align__(1024) char shared[];
    // Of the query heads that share a KV head, this block's run.
    const int sharing = a.heads / a.kv_heads;
    int kv_head = blockIdx.x, run = 0;
    if (sharing > kRows) {
        const int runs = (sharing + kRows - 1) / kRows;
        run = kv_head % runs, kv_head /= runs;
    }
    const int group = min(sharing - run * kRows, kRows);
    char* ring = shared;
    float* merge = reinterpret_cast<float*>(ring);                              // [kWarps][group][kSumStride], after the pages
    float* warp_maximum = reinterpret_cast<float*>(ring + max(a.stages * L::kStageBytes, kWarps * group * L::kSumStride * 4));  // [kWarps][16]
    float* warp_sum = warp_maximum + kWarps * kRows;                            // [kWarps][16]
    bf16* queries = reinterpret_cast<bf16*>(warp_sum + kWarps * kRows);         // [kDim / 64][16][64]
    bf16* fresh = queries + kRows * kDim;                                       // [K|V][kDim]
    int* last_arrived = reinterpret_cast<int*>(fresh + 2 * kDim);               // and three unused
    [[maybe_unused]] const uint32_t barriers = shared_address(last_arrived + 4);  // merged, unused, [stages] keys, values, free
    // [cluster][group][kDim], then maximum and sum of exponentials [cluster][group][2]; only in a cluster.
    [[maybe_unused]] float* cluster_sums = reinterpret_cast<float*>(last_arrived + 8 + 8 * a.stages);

    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int row = a.first_row + blockIdx.y, split = blockIdx.z, first_head = kv_head * sharing + run * kRows;

#if __CUDA_ARCH__ >= 900
    const int depth = cluster_depth();
    const uint32_t ring_barriers = barriers + 16;
    if (thread == 0) {
        barrier_init(barriers, 1);
        for (int i = 0; i < a.stages; ++i) {
            barrier_init(ring_barriers + 32 * i, 1);
            barrier_init(ring_barriers + 32 * i + 8, 1);
            barrier_init(ring_barriers + 32 * i + 16, kWarps);
        }
        barriers_are_ready();
    }
    if (depth > 1) __syncwarp(), cluster_arrive();
#endif
    if (!a.settled) wait_for_predecessor();
    // Past the L1, which may still hold what a step before left there.
    const int4 here = __ldcg(reinterpret_cast<const int4*>(a.rows + row));
    const int slot = here.y, position = here.z;
    const int first = a.window > 0 ? max(0, position + 1 - a.window) : 0;
    const int first_page = first / kPageTokens;
    const int pages = position / kPageTokens - first_page + 1;
    int splits = min(a.splits, pages);
#if __CUDA_ARCH__ >= 900
    // Splits of one cluster merge faster than more splits through memory, while each has only a few pages.
    if (depth > 1 && pages <= kPagesWithinCluster * depth) splits = min(splits, depth);
#endif
    if (position < 0 || split >= splits) {
        // Padding, or too few pages for this many splits. The wait keeps completion transitive along the chain.
        wait_for_predecessor();
        let_successor_start();
        return;
    }
    const int page_begin = first_page + pages * split / splits;
    const int page_end = first_page + pages * (split + 1) / splits;
    const bool owns_new = split == splits - 1;
    const int* table = a.tables + static_cast<int64_t>(slot) * a.table_stride;
#if __CUDA_ARCH__ >= 900
    if (depth > 1) cluster_wait();  // every block's barriers are ready
    else __syncthreads();
    if (warp == kWarps) {
        int stage = 0, lap = 0;
        for (int base = page_begin; base < page_end; base += 32) {
            const int mine = base + lane < page_end ? __ldcg(table + base + lane) : 0;
            for (int i = 0; i < min(32, page_end - base); ++i) {
                const int page = __shfl_sync(0xffffffffu, mine, i);
                if (lane == 0) {
                    const uint32_t barrier = ring_barriers + 32 * stage;
                    if (lap > 0) barrier_wait(barrier + 16, (lap - 1) & 1);
                    const uint32_t to = shared_address(ring + stage * L::kStageBytes);
                    barrier_expect(barrier, L::kHalfBytes);
                    bulk_copy(to, head_of_page<kDim>(a, page, 0, kv_head), L::kHalfBytes, barrier);
                    barrier_expect(barrier + 8, L::kHalfBytes);
                    bulk_copy(to + L::kHalfBytes, head_of_page<kDim>(a, page, 1, kv_head), L::kHalfBytes, barrier + 8);
                }
                if (++stage == a.stages) stage = 0, ++lap;
            }
        }
        wait_for_predecessor();
        return;
    }
#else
    // A warp's own sixteen tokens of a page: 16 rows of each panel, of keys and of values.
    if (warp >= kWarps) return;
    const auto fetch = [&](int page_number, int stage) {
        if (page_number < page_end) {
            const int page = __ldcg(table + page_number);
            const uint32_t to = shared_address(ring + stage * L::kStageBytes) + warp * 16 * kPanelRowBytes;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const char* from = reinterpret_cast<const char*>(head_of_page<kDim>(a, page, half, kv_head)) + warp * 16 * kPanelRowBytes;
#pragma unroll
                for (int i = 0; i < kDim / 16; ++i) {
                    const int place = i / 4 * (kPageTokens * kPanelRowBytes) + (i % 4 * 32 + lane) * 16;
                    copy_16(to + half * L::kHalfBytes + place, from + place);
                }
            }
        }
        copies_commit();
    };
    for (int i = 0; i < a.stages - 1; ++i) fetch(page_begin + i, i);
#endif

    prepare<kDim>(a, {row, position, kv_head, first_head, group, owns_new, owns_new && run == 0}, table, queries, fresh, thread);
    sync_computing();

    const float scale = a.scale * 1.4426950408889634f;
    Running running;
    float sums[kDim / 8][4] = {};
    const uint32_t own_ring = shared_address(ring) + warp * 16 * kPanelRowBytes;
    int stage = 0;
    [[maybe_unused]] int lap = 0;
#if __CUDA_ARCH__ >= 900
    // Whether a ring of so many stages fits into a processor at all.
    constexpr bool kTakesTwo = kStagesForTwo * L::kStageBytes <= 227 * 1024;
    const auto wait_for_page = [&]() {
        barrier_wait(ring_barriers + 32 * stage, lap & 1);
        barrier_wait(ring_barriers + 32 * stage + 8, lap & 1);
    };
    const auto release = [&](int of_stage) {
        if (lane == 0) barrier_arrive(ring_barriers + 32 * of_stage + 16);
    };
#endif
    for (int page = page_begin; page < page_end; ++page) {
#if __CUDA_ARCH__ >= 900
        wait_for_page();
        const int stage_before = stage;
        // Two pages at once where the row sees all of both, and the ring is deep enough to go on filling meanwhile.
        if (kTakesTwo && page * kPageTokens >= first && page + 1 < min(page_end, position / kPageTokens) && a.stages >= kStagesForTwo) {
            if (++stage == a.stages) stage = 0, ++lap;
            wait_for_page();
            const uint32_t keys[2] = {own_ring + stage_before * L::kStageBytes, own_ring + stage * L::kStageBytes};
            attend<kDim, 2>(shared_address(queries), keys, lane, 0, 16, scale, running, sums);
            __syncwarp();
            release(stage_before);
            ++page;
        } else
#else
        {
            const int ahead = page + a.stages - 1;
            int to = stage + a.stages - 1;
            if (to >= a.stages) to -= a.stages;
            __syncwarp();
            fetch(ahead, to);
            if (a.stages == 1) copies_wait<0>();
            if (a.stages == 2) copies_wait<1>();
            if (a.stages >= 3) copies_wait<2>();
            __syncwarp();
        }
#endif
        {
            const int token = page * kPageTokens + warp * 16;  // the first of this warp
            if (token <= position && token + 16 > first) {
                char* at = ring + stage * L::kStageBytes + warp * 16 * kPanelRowBytes;
                if (token + 16 > position) place_new<kDim>(at, at + L::kHalfBytes, fresh, position - token, lane);
                const uint32_t keys[1] = {own_ring + stage * L::kStageBytes};
                attend<kDim, 1>(shared_address(queries), keys, lane, first - token, position + 1 - token, scale, running, sums);
            }
        }
#if __CUDA_ARCH__ >= 900
        __syncwarp();
        release(stage);
#endif
        if (++stage == a.stages) stage = 0, ++lap;
    }
#if __CUDA_ARCH__ < 900
    copies_wait<0>();
#endif

    // The four warps' sums meet in the ring, once nobody reads pages there.
    sync_computing();
    leave_sums<kDim>(running, sums, merge, warp_maximum, warp_sum, group, warp, lane);
    sync_computing();
    // What follows from the splits is worked out here, not held across the pages.
    asm volatile("" : "+r"(splits));
#if __CUDA_ARCH__ >= 900
    const bool in_cluster = splits > 1 && splits <= depth;
#else
    const bool in_cluster = false;
#endif
    const int quads = group * (kDim / 4);
    const int of_launch = blockIdx.y * gridDim.x + blockIdx.x;
    const int quads_of_block = (a.splits * min(sharing, kRows) * (kDim + 2) + 3) / 4;  // so that all begin on 16 bytes
    float* partial = a.partials + static_cast<int64_t>(of_launch) * quads_of_block * 4;  // [splits][group][kDim]
    float* partial_states = partial + a.splits * group * kDim;                           // [splits][group][2]
    for (int i = thread; i < quads; i += kThreads) {
        const int head = i / (kDim / 4), d = i % (kDim / 4) * 4;
        float maximum, sum;
        const float4 x = sum_of_warps<kDim>(merge, warp_maximum, warp_sum, group, head, d, maximum, sum);
        if (splits == 1) {
            store_out(a, row, (first_head + head) * kDim + d, x, 1.0f / sum);
        } else if (in_cluster) {
#if __CUDA_ARCH__ >= 900
            const uint32_t merged = shared_of(barriers, 0), to = shared_of(shared_address(cluster_sums), 0);
            send(to + ((split * group + head) * kDim + d) * 4, x, merged);
            if (d == 0) send(to + (depth * group * kDim + (split * group + head) * 2) * 4, maximum, sum, merged);
#endif
        } else {
            *reinterpret_cast<float4*>(partial + (split * group + head) * kDim + d) = x;
            if (d == 0) *reinterpret_cast<float2*>(partial_states + 2 * (split * group + head)) = make_float2(maximum, sum);
        }
    }
    if (splits == 1) return;
#if __CUDA_ARCH__ >= 900
    if (in_cluster) {
        if (split > 0) return;
        if (thread == 0) barrier_expect(barriers, splits * group * (kDim + 2) * 4);
        barrier_wait(barriers, 0);
        const float2* states = reinterpret_cast<const float2*>(cluster_sums + depth * group * kDim);
        for (int i = thread; i < quads; i += kThreads) {
            const int head = i / (kDim / 4), d = i % (kDim / 4) * 4;
            const float2* state = states + head;
            const float4* theirs = reinterpret_cast<const float4*>(cluster_sums + head * kDim + d);
            float maximum = state[0].x;
            for (int s = 1; s < splits; ++s) maximum = fmaxf(maximum, state[s * group].x);
            float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            float sum = 0.0f;
#pragma unroll 4
            for (int s = 0; s < splits; ++s) {
                const float weight = exp2_fast(state[s * group].x - maximum);
                sum += weight * state[s * group].y;
                add(x, weight, theirs[s * group * (kDim / 4)]);
            }
            store_out(a, row, (first_head + head) * kDim + d, x, 1.0f / sum);
        }
        return;
    }
#endif
    // One thread's fences stand for all: what the others wrote came before the barrier, what they read comes after one.
    sync_computing();
    if (thread == 0) {
        asm volatile("fence.acq_rel.gpu;" ::: "memory");
        const bool last = atomicAdd(a.counters + of_launch, 1) == splits - 1;
        asm volatile("fence.acq_rel.gpu;" ::: "memory");
        if (last) a.counters[of_launch] = 0;
        *last_arrived = last;
    }
    sync_computing();
    if (*last_arrived == 0) return;
    // A split per lane: its weight in the whole, for each head.
    float* weights = merge;  // [16][32]
    for (int head = warp; head < group; head += kWarps) {
        float2 state = make_float2(-INFINITY, 0.0f);
        if (lane < splits) state = __ldcg(reinterpret_cast<const float2*>(partial_states) + lane * group + head);
        const float weight = exp2_fast(state.x - max_over_warp(state.x));
        weights[head * 32 + lane] = weight / sum_over_warp(weight * state.y);
    }
    sync_computing();
    for (int i = thread; i < quads; i += kThreads) {
        const int head = i / (kDim / 4), d = i % (kDim / 4) * 4;
        const float* from = partial + head * kDim + d;
        float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (int base = 0; base < splits; base += 8) {
            float4 theirs[8];
#pragma unroll
            for (int s = 0; s < 8; ++s) {
                theirs[s] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                if (base + s < splits) theirs[s] = __ldcg(reinterpret_cast<const float4*>(from + (base + s) * group * kDim));
            }
#pragma unroll
            for (int s = 0; s < 8; ++s) add(x, weights[head * 32 + base + s], theirs[s]);
        }
        store_out(a, row, (first_head + head) * kDim + d, x, 1.0f);
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(160, 3) attention_decode_64(const __grid_constant__ AttentionArguments a) { decode<64>(a); }
extern "C" __global__ void __launch_bounds__(160, 2) attention_decode_128(const __grid_constant__ AttentionArguments a) { decode<128>(a); }
extern "C" __global__ void __launch_bounds__(160, 1) attention_decode_256(const __grid_constant__ AttentionArguments a) { decode<256>(a); }
