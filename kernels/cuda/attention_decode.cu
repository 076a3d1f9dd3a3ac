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

#include "attention.cuh"

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 16;
[[maybe_unused]] constexpr int kStagesForTwo = 4;
// Pages per block up to which a cluster's splits suffice; past it more splits are worth their slower merge.
[[maybe_unused]] constexpr int kPagesWithinCluster = 8;

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

    // Norm and RoPE of the group's queries, and of the new key where it belongs; a vector is a few lanes' work. What
    // can be fetched or computed before the products of the predecessor are there is.
    {
        constexpr int kLanes = HeadVector<kDim>::kLanes;
        constexpr int kAtOnce = kThreads / kLanes;
        const int part = thread % kLanes, of_block = thread / kLanes;
        const int vectors = owns_new ? group + 2 : group;  // the group's queries, then the key, then the value
        const int new_page = owns_new ? __ldcg(table + position / kPageTokens) : 0;
        float2 turns[8];
        load_turns<kDim>(turns, a.rope, position, part);
        // Rows that no head fills are zeros: they cost nothing and stay finite.
        for (int i = thread; i < (kRows - group) * (kDim / 8); i += kThreads) {
            const int unused = group + i / (kDim / 8), d = i % (kDim / 8) * 8;
            *reinterpret_cast<uint4*>(queries + d / 64 * (kRows * 64) + in_panel(unused, d % 64)) = make_uint4(0, 0, 0, 0);
        }
        const bf16* products = a.qkv + static_cast<int64_t>(row) * a.qkv_stride;
        const bool normed = a.query_norm != nullptr || a.key_norm != nullptr;
        wait_for_predecessor();
        let_successor_start();
        for (int base = 0; base < vectors; base += kAtOnce) {
            const int vector = base + of_block;
            if (base + warp * (32 / kLanes) >= vectors) break;  // nothing for this warp
            int column = first_head;
            if (vector < group) column += vector;
            else if (vector < vectors) column = a.heads + kv_head + (vector - group) * a.kv_heads;
            HeadVector<kDim> x;
            x.load(products + column * kDim, part);
            if (normed) {
                const bf16* norm = vector < group ? a.query_norm : a.key_norm;
                HeadVector<kDim> scaled = x, gain;
                gain.load(norm != nullptr ? norm : products, part);
                scaled.normalise(gain, static_cast<float>(a.head_width), a.eps);
                if (norm != nullptr && vector <= group) x = scaled;
            }
            if (vector <= group) x.rotate(turns);
            if (vector >= vectors) continue;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int d = half * (kDim / 2) + 8 * part;
                if (vector < group) {
                    *reinterpret_cast<uint4*>(queries + d / 64 * (kRows * 64) + in_panel(vector, d % 64)) = x.packed(half);
                } else {
                    const int which = vector - group;
                    bf16* page = head_of_page<kDim>(a, new_page, which, kv_head);
                    *reinterpret_cast<uint4*>(fresh + which * kDim + d) = x.packed(half);
                    // One run writes for all.
                    if (run > 0) continue;
                    *reinterpret_cast<uint4*>(page + d / 64 * (kPageTokens * 64) + in_panel(position % kPageTokens, d % 64)) = x.packed(half);
                }
            }
        }
        sync_computing();
    }

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
        float maximum = warp_maximum[head];
#pragma unroll
        for (int w = 1; w < kWarps; ++w) maximum = fmaxf(maximum, warp_maximum[w * kRows + head]);
        float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            const float weight = exp2_fast(warp_maximum[w * kRows + head] - maximum);
            add(x, weight, *reinterpret_cast<const float4*>(merge + (w * group + head) * L::kSumStride + d));
            sum += weight * warp_sum[w * kRows + head];
        }
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
