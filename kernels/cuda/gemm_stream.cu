// Hopper only.
//
// The product for 1 to 64 tokens: D[n, t] = sum over k of weights[n, k] * input[t, k], each weight read once.
//
//   weights [tiles][panels][64][64] bf16, input [panels][rows_max][64] bf16, sums f32, epilogues of gemm.cuh
//
// Bytes: tiles * panels * 8,192 of weights from device memory; the tokens, rows * 128 per panel and block, come from the
// L2. All the arithmetic hides behind the weights, so the time is theirs: expected are 90 % of the card's read bandwidth
// from 32 MB of weights on and 80 % from 8 MB, in a chain of such kernels.
//
// A block is a team of four warps for each tile (64 stored rows) it works on at once, a warp that asks for weights and
// one that fetches tokens. A ring of stages holds some panels of each tile's weights, contiguous in memory, and the same
// panels of the tokens, which the teams share. Weights do not depend on the predecessor, so the first round of the ring
// is asked for before anything waits. A block may take several runs of tiles in turn.
// The blocks of a cluster share a tile's K. Each sends its sums straight into the shared memory of the block that owns
// those tokens, and the owner adds them in the order of the ranks.
// When its last weights have arrived a block asks the L2 for the first weights of a later kernel, so that device memory
// goes on working while results travel from this kernel to the next.

#include "gemm.cuh"
#include "wgmma.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)

constexpr int kPanelBytes = 64 * kPanelRowBytes;
constexpr int kTeamThreads = 128;
__host__ __device__ constexpr int teams_max(int tokens) { return tokens < 64 ? 4 : 3; }
// Few tokens are fetched by the 32 threads of a warp, many by the copy engine.
constexpr int kTokensByThreads = 8;
// Sums of 64 stored rows for eight tokens.
constexpr int kGroupBytes = 64 * 8 * 4;

struct StreamArguments {
    GemmArguments gemm;
    int splits_log;  // the blocks of a cluster, a power of two
    int stages;
    int stage_panels;
    int ahead_chunks;  // runs of a later kernel's weights to bring into the L2: where they begin, how far apart, how long
    const uint8_t* ahead;
    int64_t ahead_stride;
    int ahead_bytes;
};

// Keeps the compiler from computing a value again and again in a loop instead of keeping it.
__device__ __forceinline__ uint32_t opaque(uint32_t value) {
    asm volatile("" : "+r"(value));
    return value;
}

// Which stage of which tiles comes next; all warps of a block walk the same way.
struct Walk {
    int tile, panel;  // the block's first tile, and the stage's first panel
    int first, last;  // panels of this block
    int step;         // tiles between one turn of the block and the next

    __device__ __forceinline__ Walk(const StreamArguments& a, int split, int teams) {
        const GemmArguments& g = a.gemm;
        first = opaque(split * g.panels >> a.splits_log);
        last = opaque((split + 1) * g.panels >> a.splits_log);
        tile = static_cast<int>(blockIdx.x >> a.splits_log) * teams;
        step = opaque((gridDim.x >> a.splits_log) * teams);
        panel = first;
    }
    __device__ __forceinline__ int width(int stage_panels) const { return min(stage_panels, last - panel); }
    __device__ __forceinline__ void advance(int stage_panels) {
        panel += stage_panels;
        if (panel >= last) panel = first, tile += step;
    }
};

struct Ring {
    uint32_t base, full, empty;
    uint32_t stage_bytes, weight_bytes;
    int stages;
    int at;
    uint32_t phase;

    __device__ __forceinline__ uint32_t weights() const { return base + at * stage_bytes; }
    __device__ __forceinline__ uint32_t tokens() const { return weights() + weight_bytes; }
    __device__ __forceinline__ uint32_t full_now() const { return full + at * 8; }
    __device__ __forceinline__ uint32_t empty_now() const { return empty + at * 8; }
    __device__ __forceinline__ void advance() {
        if (++at == stages) at = 0, phase ^= 1;
    }
};

template <int kValue>
struct Constant {
    static constexpr int value = kValue;
};

// One thread of a warp that is whole here.
__device__ __forceinline__ bool elected() {
    uint32_t is;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}\n" : "=r"(is));
    return is;
}

__device__ __forceinline__ void ask_for_weights(const StreamArguments& a, const Walk& walk, const Ring& ring, int teams) {
    const GemmArguments& g = a.gemm;
    const int bytes = walk.width(a.stage_panels) * kPanelBytes;
    // A team without a tile works on the last one again and throws it away.
    int tile = walk.tile;
    const bf16* from = g.weights + (static_cast<int64_t>(tile) * g.panels + walk.panel) * (64 * kPanelColumns);
    uint32_t to = ring.weights();
    if (elected()) {
        barrier_expect(ring.full_now(), teams * bytes);
        bulk_copy_once(to, from, bytes, ring.full_now());
    }
#pragma unroll 1
    for (int team = 1; team < teams; ++team) {
        if (++tile < g.tiles) from += static_cast<int64_t>(g.panels) * (64 * kPanelColumns);
        to += a.stage_panels * kPanelBytes;
        if (elected()) bulk_copy_once(to, from, bytes, ring.full_now());
    }
}

// The stage counts as full only when these have arrived as well. Rows behind the last token keep whatever was there:
// they only reach sums that nobody reads.
template <int kTokens>
__device__ __forceinline__ void fetch_tokens(const StreamArguments& a, Walk& walk, Ring& ring, int lane) {
    const GemmArguments& g = a.gemm;
    const int64_t panel_bytes = static_cast<int64_t>(g.rows_max) * kPanelRowBytes;
    const int rows_bytes = g.rows * kPanelRowBytes;
    const uint8_t* const begin = reinterpret_cast<const uint8_t*>(g.input) + walk.first * panel_bytes;
    const uint8_t* from = begin;
    // A panel's pieces of 16 bytes, counted up to a power of two so that lanes find theirs by shifts.
    const int pieces_log = 35 - __clz(g.rows - 1);
#pragma unroll 1
    while (walk.tile < g.tiles) {
        // A round waits until the one before it is used up; before the first this holds already.
        barrier_wait(ring.empty_now(), ring.phase ^ 1);
        const uint32_t to = ring.tokens();
        const int width = walk.width(a.stage_panels);
        if constexpr (kTokens <= kTokensByThreads) {
#pragma unroll 1
            for (int piece = lane; piece < width << pieces_log; piece += 32) {
                const int i = piece >> pieces_log, at = (piece & ((1 << pieces_log) - 1)) * 16;
                if (at < rows_bytes) copy_16(to + i * kTokens * kPanelRowBytes + at, from + i * panel_bytes + at);
            }
            asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(ring.full_now()) : "memory");
        } else {
            if (elected()) barrier_expect(ring.full_now(), width * rows_bytes);
#pragma unroll 1
            for (int i = 0; i < width; ++i) {
                if (elected()) bulk_copy(to + i * kTokens * kPanelRowBytes, from + i * panel_bytes, rows_bytes, ring.full_now());
            }
        }
        from += width * panel_bytes;
        walk.advance(a.stage_panels), ring.advance();
        if (walk.panel == walk.first) from = begin;
    }
}

// Of the whole block's barriers only their init must be seen, which barriers_are_ready published.
__device__ __forceinline__ void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }

__device__ __forceinline__ void send(uint32_t to, const float* from, uint32_t barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to), "f"(from[0]),
                 "f"(from[1]), "f"(from[2]), "f"(from[3]), "r"(barrier)
                 : "memory");
}

__device__ __forceinline__ void bring_ahead(const StreamArguments& a) {
#pragma unroll 1
    for (int chunk = blockIdx.x; chunk < a.ahead_chunks; chunk += gridDim.x) {
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(a.ahead + chunk * a.ahead_stride), "r"(a.ahead_bytes) : "memory");
    }
}

// Where a block stands in its cluster, and where what lies in its shared memory.
template <int kTokens>
struct Block {
    static constexpr int kGroups = kTokens / 8;
    int warp, teams;
    int splits, split;
    // Each split owns as many groups of eight tokens, one after another; the last ones may own none. Of those groups
    // some are there at all.
    int own_log, groups, groups_own;
    // Behind the ring: sums of all splits [team][own group][split][2 KB], room to reduce in [team][8][kTokens], scales.
    int sums_bytes;
    const uint8_t* sums;
    float* reduce;
    float* scales;
    uint32_t summed;  // the barrier that counts sums
    Ring ring;

    __device__ __forceinline__ Block(const StreamArguments& a, uint8_t* shared) {
        // Every lane computes the same; the shuffle tells the compiler so.
        warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
        teams = (blockDim.x - 64) / kTeamThreads;
        splits = 1 << a.splits_log;
        split = cluster_rank();
        own_log = max((kGroups == 8 ? 3 : kGroups / 2) - a.splits_log, 0);
        groups = (a.gemm.rows + 7) / 8;
        groups_own = min(max(groups - (split << own_log), 0), 1 << own_log);

        ring.stages = a.stages;
        ring.weight_bytes = opaque(teams * a.stage_panels * kPanelBytes);
        ring.stage_bytes = opaque(ring.weight_bytes + a.stage_panels * kTokens * kPanelRowBytes);
        ring.at = 0;
        ring.phase = 0;
        ring.base = shared_address(shared);
        sums_bytes = splits > 1 ? splits * kGroupBytes << own_log : 0;
        sums = shared + a.stages * ring.stage_bytes;
        reduce = reinterpret_cast<float*>(shared + a.stages * ring.stage_bytes + teams * sums_bytes);
        scales = reduce + teams * 8 * kTokens;
        ring.full = opaque(shared_address(scales + kTokens));
        ring.empty = opaque(ring.full + 8 * a.stages);
        summed = ring.empty + 8 * a.stages;
    }
};

template <Epilogue kEpilogue, int kTokens>
__device__ __forceinline__ void multiply(const StreamArguments& a, const Block<kTokens>& block, Walk& walk, Ring& ring) {
    constexpr int kGroups = kTokens / 8;
    const GemmArguments& g = a.gemm;
    const int lane = threadIdx.x % 32, thread = threadIdx.x % kTeamThreads;
    const int team = block.warp / 4, warp = block.warp % 4;
    const int splits = block.splits;
    const int first_own = 8 * block.split << block.own_log;
    float* const reduce = block.reduce + team * 8 * kTokens;
    const int sums = team * block.sums_bytes + thread * 16;
    const uint32_t team_offset = opaque(team * a.stage_panels * kPanelBytes);
    // What all descriptors share; the sums below stay within the field of the address.
    const uint64_t panels = panel_descriptor(0);
    const auto sync_team = [team] { asm volatile("bar.sync %0, 128;" ::"r"(team + 2) : "memory"); };
    if constexpr (kEpilogue != kResidual) {
        load_scales(g, 0, kTokens, block.scales, threadIdx.x, block.teams * kTeamThreads);
        asm volatile("bar.sync 1, %0;" ::"r"(block.teams * kTeamThreads) : "memory");
    }
    while (walk.tile < g.tiles) {
        const int tile = walk.tile + team;
        const bool has_tile = tile < g.tiles;
        // For all of the most tokens the registers do not suffice.
        constexpr bool kEarly = kTokens <= 32;
        constexpr int kEarlyTokens = kEarly ? kTokens : kTokens / 2;
        EarlyAddends<kEarlyTokens> addends = {};
        if (has_tile && (splits == 1 ? kEarly : block.groups_own > 0)) {
            addends = load_addends_early<kEpilogue, kEarlyTokens>(g, tile, splits == 1 ? 0 : first_own, warp);
        }
        // Two sums in turn: a product on the sums of the one before it would wait for them.
        float d[kTokens / 2], odd[kTokens / 2];
#pragma unroll
        for (int i = 0; i < kTokens / 2; ++i) d[i] = odd[i] = 0.0f;
        const int turn = walk.tile;
        for (; walk.tile == turn; walk.advance(a.stage_panels), ring.advance()) {
            const int width = walk.width(a.stage_panels);
            // From one lane, so that the compiler keeps descriptors in uniform registers.
            uint32_t rows = __shfl_sync(0xffffffffu, ((ring.weights() + team_offset) & 0x3ffff) >> 4, 0);
            uint32_t tokens = __shfl_sync(0xffffffffu, (ring.tokens() & 0x3ffff) >> 4, 0);
            barrier_wait(ring.full_now(), ring.phase);
            // Tokens that threads copied must be seen by the matrix product.
            if constexpr (kTokens <= kTokensByThreads) publish_to_engines();
            int i = 0;
#pragma unroll 1
            do {
                wgmma_begin();
#pragma unroll
                for (int k = 0; k < 4; ++k) Wgmma<kTokens>::run(k % 2 ? odd : d, panels | (rows + 2 * k), panels | (tokens + 2 * k), 1);
                wgmma_commit();
                rows += kPanelBytes >> 4;
                tokens += kTokens * kPanelRowBytes >> 4;
            } while (++i < width);
            wgmma_wait<0>();
            if (lane == 0) barrier_arrive(ring.empty_now());
        }
#pragma unroll
        for (int i = 0; i < kTokens / 2; ++i) d[i] += odd[i];
        if (splits == 1) {
            if constexpr (kEarly) {
                if (has_tile) finish<kEpilogue, kTokens>(g, d, addends, tile, 0, warp, block.scales, reduce, sync_team);
            } else {
                if (has_tile) finish<kEpilogue, kTokens>(g, d, tile, 0, warp, block.scales, reduce, sync_team);
            }
            continue;
        }
        // Where K is split there is one turn only.
        const uint32_t sums_here = shared_address(block.sums) + sums;
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            if (group >= block.groups) break;
            const int owner = group >> block.own_log, of_owner = group - (owner << block.own_log);
            const uint32_t to = sums_here + (of_owner * splits + block.split) * kGroupBytes;
            send(shared_of(to, owner), &d[4 * group], shared_of(block.summed, owner));
        }
        if (block.groups_own == 0) return;
        barrier_wait(block.summed, 0);
        if (!has_tile) return;
        const uint8_t* const from = block.sums + sums;
        const auto finish_own = [&](auto groups_constant) {
            constexpr int kOwn = decltype(groups_constant)::value;
            float total[4 * kOwn];
#pragma unroll
            for (int group = 0; group < kOwn; ++group) {
                const auto part = [&](int other) { return *reinterpret_cast<const float4*>(from + (group * splits + other) * kGroupBytes); };
                // In the order of their ranks.
                const float4 p0 = part(0), p1 = part(1);
                float4 sum = make_float4(p0.x + p1.x, p0.y + p1.y, p0.z + p1.z, p0.w + p1.w);
#pragma unroll 1
                for (int other = 2; other < splits; other += 2) {
                    const float4 p = part(other), q = part(other + 1);
                    sum = make_float4((sum.x + p.x) + q.x, (sum.y + p.y) + q.y, (sum.z + p.z) + q.z, (sum.w + p.w) + q.w);
                }
                total[4 * group] = sum.x, total[4 * group + 1] = sum.y, total[4 * group + 2] = sum.z, total[4 * group + 3] = sum.w;
            }
            finish<kEpilogue, 8 * kOwn>(g, total, addends, tile, first_own, warp, block.scales + first_own, reduce, sync_team);
        };
        if constexpr (kGroups == 8) {
            if (block.own_log == 2) finish_own(Constant<4>());
        }
        if constexpr (kGroups >= 4) {
            if (block.own_log == 1) finish_own(Constant<2>());
        }
        if (block.own_log == 0) finish_own(Constant<1>());
        return;
    }
}

template <Epilogue kEpilogue, int kTokens>
__device__ __forceinline__ void stream(const StreamArguments& a) {
    extern __shared__ __align__(1024) uint8_t shared[];
    const GemmArguments& g = a.gemm;
    const int lane = threadIdx.x % 32;
    const Block<kTokens> block(a, shared);
    Ring ring = block.ring;
    Walk walk(a, block.split, block.teams);

    const bool asks = block.warp == block.teams * 4;
    if (asks) {
        if (lane == 0) {
#pragma unroll 1
            for (int stage = 0; stage < a.stages; ++stage) {
                barrier_init(ring.full + 8 * stage, kTokens <= kTokensByThreads ? 1 + 32 : 1 + 1);
                barrier_init(ring.empty + 8 * stage, block.teams * 4);
            }
            barrier_init(block.summed, 1);
            barriers_are_ready();
            if (block.splits > 1) barrier_expect(block.summed, block.teams * block.groups_own * block.splits * kGroupBytes);
        }
        __syncwarp();
#pragma unroll 1
        for (; ring.phase == 0 && walk.tile < g.tiles; walk.advance(a.stage_panels), ring.advance()) {
            ask_for_weights(a, walk, ring, block.teams);
        }
        if (lane == 0) let_successor_start();
    }
    __syncthreads();
    if (block.splits > 1) cluster_arrive_relaxed();

    if (asks) {
#pragma unroll 1
        for (; walk.tile < g.tiles; walk.advance(a.stage_panels), ring.advance()) {
            barrier_wait(ring.empty_now(), ring.phase ^ 1);
            ask_for_weights(a, walk, ring, block.teams);
        }
        // Not before the stage asked for last has arrived: until then device memory is busy.
        const int last = (ring.at == 0 ? ring.stages : ring.at) - 1;
        barrier_wait(ring.full + 8 * last, ring.at == 0 ? ring.phase ^ 1 : ring.phase);
        if (lane == 0) bring_ahead(a);
        __syncwarp();
        if (block.splits > 1) cluster_wait();
    } else {
        wait_for_predecessor();
        // From here on the barriers of the whole cluster are there. Nobody sends to a block that may be gone: owners wait for all
        // that is sent to them.
        if (block.splits > 1) cluster_wait();
        if (block.warp > block.teams * 4) {
            fetch_tokens<kTokens>(a, walk, ring, lane);
        } else {
            multiply<kEpilogue, kTokens>(a, block, walk, ring);
        }
    }
}

#endif

#define STREAM(epilogue, name, tokens)                                                  \
    extern "C" __global__ void __launch_bounds__(64 + teams_max(tokens) * kTeamThreads) \
        gemm_stream_##name##_##tokens(const __grid_constant__ StreamArguments a) {      \
        stream<epilogue, tokens>(a);                                                    \
    }
#define STREAMS(tokens)                 \
    STREAM(kStore, store, tokens)       \
    STREAM(kResidual, residual, tokens) \
    STREAM(kGateUp, gate_up, tokens)    \
    STREAM(kLogits, logits, tokens)

STREAMS(8)
STREAMS(16)
STREAMS(32)
STREAMS(64)
