// Hopper only.
// The matrix product for more than 64 tokens: D[n, t] = sum over k of weights[n, k] * input[t, k].
//
// Shapes and layout as in gemm.cuh. A block holds kTilesEach tiles of 64 stored rows in each of two consumer
// warpgroups, by kTokens tokens; the sums stay in registers (64 or 128 a thread). Both operands arrive as contiguous
// bulk copies of whole panels: 8 KB per tile of weights, 128 bytes per token.
//
//   (kTilesEach, kTokens)   rows x tokens   stage      stages   for
//   (1, 256)                128 x 256       16 + 32 KB   4      prefill
//   (2, 128)                256 x 128       32 + 16 KB   4      the same, where it divides better
//   (1, 192)                128 x 192       16 + 24 KB   4      whatever they divide so that all processors have as much to do
//   (1, 160)                128 x 160       16 + 20 KB   5
//   (1, 128)                128 x 128       16 + 16 KB   6
//   (1, 96)                 128 x 96        16 + 12 KB   6
//   (1, 64)                 128 x 64        16 + 8 KB    8
//
// What bounds it. The matrix units (under load: the card's power); and what a processor takes from the L2, some 95 GB/s,
// where a 128 x 256 tile needs 65 at 750 TFLOP/s and a 128 x 128 tile 87. So one thread asks for weights and another for
// tokens: one alone kept tiles of 128 tokens and fewer to 60 GB/s. (Clusters that multicast tokens to two blocks, tensor
// maps for both operands, and blocks that begin at different places of K changed nothing.) Where rows x tokens are too few
// blocks for all processors, `splits` blocks share a tile's K: each leaves its sums in the workspace, and when all have
// done so each adds up a part of the tokens, always in the same order. They wait for each other, so all of such a grid must
// fit the card at once.
// Bytes: weights once per band of token tiles, tokens once, outputs once. Expected: 90 % of the matrix peak for
// prefill; in decode 85 % of the larger of weights at the read bandwidth and operations at the peak. Measured on an
// H100 (Llama 8B, 2,048 tokens): gate and up 98 %, down 97 %, qkv 94 %, o 80 % of 750 TFLOP/s, the epilogues included;
// at 256 tokens 77, 76, 63 and 53 % of that floor: what a split leaves behind costs 4 to 6 us, the outputs 1 to 2.
//
// Without a split blocks are persistent: the producer runs ahead into the next tile while the sums of this one leave.
// Where the last round of tiles would leave many processors idle, its panels may be dealt out evenly (`whole`): a tile
// then has its first panels with one block, which finishes it, and the others with the blocks that come next.

#include "gemm.cuh"
#include "wgmma.cuh"

struct GemmTileArguments {
    GemmArguments g;   // `partials` [units][splits][rows of a block][kTokens], in the order of the kernel's own making;
                       // `counters` [units], zero before and after
    int token_tiles;   // of kTokens
    int row_blocks;    // of kTiles tiles of weights; a unit is one of them by one token tile
    int band;          // token tiles that are walked side by side
    int whole;         // units that one block does each; with `splits` 1 the others' panels are dealt out evenly
    int weights_once;  // each weight is read by one block only
    int tokens_stay;   // tokens leave the L2 last
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kTileBytes = 64 * kPanelRowBytes;
constexpr int kConsumers = 256;
// One thread that asks for weights, one that asks for tokens, each with a warp for itself: one for both would take longer
// to ask than the copies take. The other warps make scales.
constexpr int kWeightProducer = kConsumers;
constexpr int kTokenProducer = kConsumers + 32;
constexpr int kScalers = 64;
constexpr int kThreads = kTokenProducer + 32 + kScalers;
// Sums leave in chunks of 64 a thread: 64 rows by 128 tokens of a warpgroup, through 16 KB of shared memory.
constexpr int kChunkTokens = 128;
constexpr int kChunkBytes = kChunkTokens * kPanelRowBytes;

template <int kTilesEach_, int kTokens_>
struct Block {
    static constexpr int kTilesEach = kTilesEach_, kTokens = kTokens_;
    static constexpr int kTiles = 2 * kTilesEach;
    static constexpr int kWeightBytes = kTiles * kTileBytes;
    static constexpr int kStageBytes = kWeightBytes + kTokens * kPanelRowBytes;
    static constexpr int kStages = 196608 / kStageBytes;
    static constexpr int kStaging = kStages * kStageBytes;
    static constexpr int kScales = kStaging + 2 * kChunkBytes;
    static constexpr int kFull = kScales + 2 * kTokens * 4;
    static constexpr int kEmpty = kFull + 8 * kStages;
    static constexpr int kScalesFull = kEmpty + 8 * kStages;
    static constexpr int kScalesEmpty = kScalesFull + 16;
    static constexpr int kSharedBytes = kScalesEmpty + 16;
};

// What a block works on at a time.
struct Unit {
    int row;    // block of rows
    int first;  // token
    int width;  // tokens that are loaded, a multiple of eight: the products of those beyond are never looked at
};

template <int kTokens>
__device__ __forceinline__ Unit unit_of(const GemmTileArguments& a, int index) {
    const int of_band = a.band * a.row_blocks;
    const int band = index / of_band, within = index % of_band;
    const int tiles = min(a.band, a.token_tiles - band * a.band);
    const int token_tile = band * a.band + within % tiles;
    const int first = token_tile * kTokens;
    return {within / tiles, first, min(kTokens, (a.g.rows - first + 7) / 8 * 8)};
}

// Panels [panel, panel + count) of a unit.
struct Item {
    int unit, panel, count;
};

// What a block does, one item after the other: whole units, every gridDim.x-th from its own on; then its share of the
// panels of all other units, laid end to end. With `splits` these shares are equal parts of a unit's K. Without, a
// share may end within a unit and begin within another: blocks begin with what others wait for.
struct Walk {
    int unit, whole, panels, at, end;

    __device__ __forceinline__ explicit Walk(const GemmTileArguments& a) {
        unit = blockIdx.x, whole = a.whole, panels = a.g.panels;
        at = begin_of(a, blockIdx.x), end = begin_of(a, blockIdx.x + 1);
    }
    // Where a block's share begins.
    __device__ __forceinline__ static int begin_of(const GemmTileArguments& a, int block) {
        if (a.g.splits > 1) return block / a.g.splits * a.g.panels + block % a.g.splits * a.g.panels / a.g.splits;
        const int64_t shared_out = static_cast<int64_t>(a.token_tiles * a.row_blocks - a.whole) * a.g.panels;
        return a.whole * a.g.panels + static_cast<int>(shared_out * block / gridDim.x);
    }
    __device__ __forceinline__ bool next(Item& item) {
        if (unit < whole) {
            item = {unit, 0, panels};
            unit += gridDim.x;
            return true;
        }
        if (at >= end) return false;
        item.unit = at / panels, item.panel = at % panels;
        item.count = min(panels - item.panel, end - at);
        at += item.count;
        return true;
    }
};

// Whether the block that does an item also finishes its unit, or a part of it.
__device__ __forceinline__ bool finishes(const GemmTileArguments& a, const Item& item) {
    return a.g.splits > 1 || item.panel == 0;
}

template <int kStages>
struct Ring {
    int stage = 0;
    uint32_t phase = 0;
    __device__ __forceinline__ void advance() {
        if (++stage == kStages) stage = 0, phase ^= 1;
    }
};

// When what is copied leaves the L2: before all else, or after it.
__device__ __forceinline__ uint64_t leaves_first() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ uint64_t leaves_last() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ void bulk_copy_as(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
        "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
        : "memory");
}
__device__ __forceinline__ uint32_t read_word(uint32_t address) {
    uint32_t word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
    return word;
}
__device__ __forceinline__ void write_word(uint32_t address, uint32_t word) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
}
__device__ __forceinline__ uint4 read_piece(uint32_t address) {
    uint4 piece;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(piece.x), "=r"(piece.y), "=r"(piece.z), "=r"(piece.w)
                 : "r"(address)
                 : "memory");
    return piece;
}
__device__ __forceinline__ void store_piece(bf16* to, const uint4& piece) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(piece.x), "r"(piece.y), "r"(piece.z), "r"(piece.w) : "memory");
}
// Four 8x8 matrices, transposed: lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices_transposed(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c),
                 "r"(d)
                 : "memory");
}
__device__ __forceinline__ void sync_group(int group) {
    if (group == 0) asm volatile("bar.sync 1, 128;" ::: "memory");
    else asm volatile("bar.sync 2, 128;" ::: "memory");
}
__device__ __forceinline__ void sync_consumers() { asm volatile("bar.sync 3, 256;" ::: "memory"); }

// The compiler may not compute what depends on `value` before this point: unrolled addresses that it would gladly keep
// in registers through all of the loop have no room beside the sums.
__device__ __forceinline__ void not_before(int& value) { asm volatile("" : "+r"(value)); }
__device__ __forceinline__ void not_before(uint32_t& value) { asm volatile("" : "+r"(value)); }

// silu(gate) * up in two instructions of the unit for special functions, which bounds this epilogue, and five others;
// exact to a few units in the last place of an f32. Where exp(-gate) overflows the result is 0.
__device__ __forceinline__ float gated(float gate, float up) {
    float power, inverse;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(gate * -1.4426950408889634f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(power + 1.0f));
    return gate * up * inverse;
}

// The products of one warpgroup over `count` panels.
template <typename B, int kSums>
__device__ __forceinline__ void multiply(float (&d)[kSums], uint32_t base, int group, int count, Ring<B::kStages>& ring) {
    constexpr int kTilesEach = B::kTilesEach;
    const bool releases = threadIdx.x % 128 == 0;
    int last = 0;
#pragma unroll 1
    for (int k = 0; k < count; ++k) {
        barrier_wait(base + B::kFull + 8 * ring.stage, ring.phase);
        const uint32_t slot = base + ring.stage * B::kStageBytes;
        const uint64_t weights = panel_descriptor(slot + group * kTilesEach * kTileBytes);
        const uint64_t tokens = panel_descriptor(slot + B::kWeightBytes);
        wgmma_begin();
#pragma unroll
        for (int step = 0; step < 4; ++step) {
#pragma unroll
            for (int tile = 0; tile < kTilesEach; ++tile) {
                // A step of 16 columns is 32 bytes, a tile 8 KB; descriptors count 16 bytes.
                Wgmma<B::kTokens>::run(reinterpret_cast<float(&)[B::kTokens / 2]>(d[tile * 64]),
                                   weights + tile * (kTileBytes / 16) + 2 * step, tokens + 2 * step, k + step);
            }
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (k > 0 && releases) barrier_arrive(base + B::kEmpty + 8 * last);
        last = ring.stage;
        ring.advance();
    }
    wgmma_wait<0>();
    if (releases) barrier_arrive(base + B::kEmpty + 8 * last);
}

// Stores the quads outside [begin, end). (A plain loop would hold an address for each quad.)
template <int kQuad, int kQuads>
__device__ __forceinline__ void store_part(const float (&d)[(kQuads + 15) / 16 * 64], float4* part, int begin, int end) {
    if constexpr (kQuad < kQuads) {
        asm volatile(
            "{\n.reg .pred p;\nsetp.gt.s32 p, %6, %5;\nsetp.le.or.s32 p, %7, %5, p;\n"
            "@p st.global.cg.v4.f32 [%4 + %8], {%0, %1, %2, %3};\n}\n" ::"f"(d[4 * kQuad]),
            "f"(d[4 * kQuad + 1]), "f"(d[4 * kQuad + 2]), "f"(d[4 * kQuad + 3]), "l"(part), "n"(kQuad), "r"(begin), "r"(end),
            "n"(kQuad * kConsumers * 16)
            : "memory");
        store_part<kQuad + 1, kQuads>(d, part, begin, end);
    }
}

// Quads kFirst + [0, kBatch) of a part, zeros outside [begin, end).
template <int kQuad, int kBatch, int kFirst>
__device__ __forceinline__ void load_quads(float (&v)[4 * kBatch], const float4* part, int begin, int end) {
    if constexpr (kQuad < kBatch) {
        asm volatile(
            "{\n.reg .pred p;\nsetp.le.s32 p, %6, %5;\nsetp.lt.and.s32 p, %5, %7, p;\n"
            "mov.f32 %0, 0f00000000;\nmov.f32 %1, 0f00000000;\nmov.f32 %2, 0f00000000;\nmov.f32 %3, 0f00000000;\n"
            "@p ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4 + %8];\n}\n"
            : "=f"(v[4 * kQuad]), "=f"(v[4 * kQuad + 1]), "=f"(v[4 * kQuad + 2]), "=f"(v[4 * kQuad + 3])
            : "l"(part), "n"(kFirst + kQuad), "r"(begin), "r"(end), "n"((kFirst + kQuad) * kConsumers * 16));
        load_quads<kQuad + 1, kBatch, kFirst>(v, part, begin, end);
    }
}

// Adds quads [begin, end) of kParts parts of the workspace to the sums, kBatch quads at a time from kFirst on, so that all
// their loads are in flight before the first is used. All that is known when compiling stays there: the registers are
// full of sums. Parts from `parts` on are left out.
template <int kParts, int kBatch, int kFirst, int kQuads>
__device__ __forceinline__ void add_parts(float (&d)[(kQuads + 15) / 16 * 64], const float4* const (&part)[kParts], int parts, int begin, int end) {
    if constexpr (kFirst < kQuads) {
        if (kFirst + kBatch > begin && kFirst < end) {
            float v[kParts][4 * kBatch];
#pragma unroll
            for (int k = 0; k < kParts; ++k) load_quads<0, kBatch, kFirst>(v[k], part[k], begin, k < parts ? end : 0);
#pragma unroll
            for (int k = 0; k < kParts; ++k) {
#pragma unroll
                for (int i = 0; i < 4 * kBatch; ++i) d[4 * kFirst + i] += v[k][i];
            }
        }
        add_parts<kParts, kBatch, kFirst + kBatch, kQuads>(d, part, parts, begin, end);
    }
}

// Adds up the sums of the blocks that share a unit: each leaves in the workspace what it does not finish, and adds what
// others left of its quads [begin, end). With `splits` each finishes a part of the tokens; else the block with the first
// panels finishes all, after the others, which come next in order, have left theirs.
template <typename B, int kQuads>
__device__ __forceinline__ void add_up(float (&d)[(kQuads + 15) / 16 * 64], const GemmTileArguments& a, const Item& item, int begin, int end) {
    constexpr int64_t kPart = kQuads * kConsumers;
    const GemmArguments& g = a.g;
    int thread = threadIdx.x;
    not_before(thread);
    float4* parts = reinterpret_cast<float4*>(g.partials) + thread;
    store_part<0, kQuads>(d, parts + blockIdx.x * kPart, begin, end);
    sync_consumers();
    int first = blockIdx.x, last = blockIdx.x;
    if (g.splits > 1) {
        first = item.unit * g.splits, last = first + g.splits - 1;
        if (thread == 0) {
            // It releases what all threads stored before the barrier.
            int* counter = g.counters + item.unit;
            asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
            int arrived;
            do {
                asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(arrived) : "l"(counter) : "memory");
            } while (arrived < g.splits);
        }
    } else if (item.panel > 0) {
        if (thread == 0) asm volatile("st.release.gpu.global.s32 [%0], 1;" ::"l"(g.counters + blockIdx.x) : "memory");
        return;
    } else {
        while (Walk::begin_of(a, last + 1) < (item.unit + 1) * g.panels) ++last;
        if (thread < last - first) {
            int* counter = g.counters + first + 1 + thread;
            int arrived;
            do {
                asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(arrived) : "l"(counter) : "memory");
            } while (arrived == 0);
            *counter = 0;
        }
    }
    sync_consumers();
    if constexpr (kQuads > 16) {
#pragma unroll 1
        for (int from = first; from <= last; ++from) {
            const float4* const part[1] = {parts + from * kPart};
            if (from != blockIdx.x) add_parts<1, 8, 0, kQuads>(d, part, 1, begin, end);
        }
    } else {
#pragma unroll 1
        for (int from = first; from <= last;) {
            const float4* part[3];
            int found = 0;
#pragma unroll
            for (int k = 0; k < 3; ++k) {
                if (from == blockIdx.x) ++from;
                part[k] = parts + from * kPart;
                if (from <= last) ++found, ++from;
            }
            add_parts<3, 8, 0, kQuads>(d, part, found, begin, end);
        }
    }
    // Whoever is the last to know that all have arrived leaves the counter as it was.
    if (g.splits > 1 && thread == 0 && atomicAdd(g.counters + item.unit, 1) == 2 * g.splits - 1) g.counters[item.unit] = 0;
}

// Brings tokens [begin, end) of a chunk of the residual stream into the staging. Each thread loads the pieces that it
// alone reads in `leave`.
__device__ __forceinline__ void load_residual(const GemmArguments& g, uint32_t staging, int tile, int first, int begin, int end, int thread) {
    not_before(thread);
    const int piece = thread % 8;
    if (tile * 64 + 8 * piece < g.features) {
#pragma unroll 2
        for (int token = thread / 8; token < kChunkTokens; token += 16) {
            if (token < begin || token >= end || first + token >= g.rows) continue;
            copy_16(staging + token * kPanelRowBytes + ((piece ^ (token & 7)) * 16),
                    g.out + static_cast<int64_t>(first + token) * g.out_stride + tile * 64 + 8 * piece);
        }
    }
    copies_commit();
}

// What a warpgroup does with a chunk: 64 stored rows of tile `tile` by the chunk's tokens [begin, end), the first of
// which is token `first` of the step. Sums become outputs in the staging, where rows of tokens can be read and leave
// in pieces of 16 bytes. For Residual the staging holds the residual stream. `scales` begins at the chunk; for Residual,
// which has none, it is the gain of the tile's features. Loads go ahead of their uses in batches: the compiler keeps
// them in the order in which they stand here.
template <Epilogue kEpilogue, int kTokens>
__device__ __forceinline__ void leave(const GemmArguments& g, const float (&d)[64], int group, uint32_t staging, const float* scales, float* reduce,
                                      int tile, int first, int begin, int end) {
    int thread = threadIdx.x % 128;
    not_before(thread);
    not_before(staging);
    const int warp = thread / 32, lane = thread % 32;
    const int column = 2 * (lane % 4);
    end = min(end, g.rows - first);
    if constexpr (kEpilogue == kGateUp) {
        // Rows of 32 features: four pieces, one of each warp.
        const int feature = tile * 32 + warp * 8 + lane / 4;
        const bool real = feature < g.features;
        const float gate_bias = g.bias != nullptr && real ? __bfloat162float(g.bias[feature]) : 0.0f;
        const float up_bias = g.bias != nullptr && real ? __bfloat162float(g.bias[g.features + feature]) : 0.0f;
        const uint32_t to = staging + lane * 64 + ((warp ^ ((lane >> 1) & 3)) * 16);
#pragma unroll
        for (int q = 0; q < kTokens / 32; ++q) {
            if (g.splits > 1 && (32 * q + 32 <= begin || 32 * q >= end)) continue;
            uint32_t pairs[4];
#pragma unroll
            for (int m = 0; m < 4; ++m) {
                const int j = 4 * q + m;
                const float2 scale = *reinterpret_cast<const float2*>(scales + 8 * j + column);
                const float one = gated(d[4 * j] * scale.x + gate_bias, d[4 * j + 2] * scale.x + up_bias);
                const float two = gated(d[4 * j + 1] * scale.y + gate_bias, d[4 * j + 3] * scale.y + up_bias);
                // Padded features of the last panel must be zeros: the next product reads them.
                pairs[m] = real ? pack(one, two) : 0;
            }
            store_matrices_transposed(to + q * 32 * 64, pairs[0], pairs[1], pairs[2], pairs[3]);
        }
        sync_group(group);
        not_before(thread);
        const int piece = thread % 4, place = tile % 2 * 4 + piece;
        bf16* out = g.out + (static_cast<int64_t>(tile / 2) * g.rows_max + first) * kPanelColumns;
        uint4 outputs[kTokens / 32];
#pragma unroll
        for (int i = 0; i < kTokens / 32; ++i) {
            const int token = thread / 4 + 32 * i;
            outputs[i] = read_piece(staging + token * 64 + ((piece ^ ((token >> 1) & 3)) * 16));
        }
#pragma unroll
        for (int i = 0; i < kTokens / 32; ++i) {
            const int token = thread / 4 + 32 * i;
            if (token < begin || token >= end) continue;
            store_piece(out + token * kPanelColumns + ((place ^ (token & 7)) * 8), outputs[i]);
        }
        sync_group(group);
    }
    if constexpr (kEpilogue == kStore || kEpilogue == kResidual) {
        const int pair = warp * 16 + 2 * (lane / 4);
        float bias0 = 0.0f, bias1 = 0.0f;
        if (g.bias != nullptr && tile * 64 + pair < g.features) {
            const uint32_t both = *reinterpret_cast<const uint32_t*>(g.bias + tile * 64 + pair);
            bias0 = low(both), bias1 = high(both);
        }
        const bool real = tile * 64 + pair < g.features;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t to = staging + (column + i) * kPanelRowBytes + (((pair / 8) ^ (column + i)) * 16) + pair % 8 * 2;
#pragma unroll
            for (int batch = 0; batch < kTokens / 8; batch += 4) {
                if (g.splits > 1 && (8 * batch + 32 <= begin || 8 * batch >= end)) continue;
                uint32_t old[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    old[j] = kEpilogue == kResidual ? read_word(to + (batch + j) * 8 * kPanelRowBytes) : 0;
                }
#pragma unroll
                for (int j = batch; j < batch + 4; ++j) {
                    uint32_t sum;
                    if constexpr (kEpilogue == kStore) {
                        const float scale = scales[8 * j + column + i];
                        sum = pack(d[4 * j + i] * scale + bias0, d[4 * j + 2 + i] * scale + bias1);
                    } else {
                        sum = pack(low(old[j - batch]) + d[4 * j + i] + bias0, high(old[j - batch]) + d[4 * j + 2 + i] + bias1);
                        if (!real) sum = 0;
                    }
                    write_word(to + j * 8 * kPanelRowBytes, sum);
                }
            }
        }
        sync_group(group);
        not_before(thread);
        const int piece = thread % 8, feature = tile * 64 + 8 * piece;
        bf16* out = g.out + static_cast<int64_t>(first) * g.out_stride + feature;
        uint4 gain = make_uint4(0, 0, 0, 0);
        if (kEpilogue == kResidual) gain = read_piece(shared_address(scales) + 16 * piece);
        bf16* normed = g.normed + (static_cast<int64_t>(tile) * g.rows_max + first) * kPanelColumns;
#pragma unroll
        for (int batch = 0; batch < kTokens; batch += 64) {
            if (g.splits > 1 && (batch + 64 <= begin || batch >= end)) continue;
            uint4 v[4];
            float squares[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int token = batch + 16 * i + thread / 8;
                v[i] = read_piece(staging + token * kPanelRowBytes + ((piece ^ (token & 7)) * 16));
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int token = batch + 16 * i + thread / 8;
                if (token >= begin && token < end && feature < g.features) {
                    store_piece(out + static_cast<int64_t>(token) * g.out_stride, v[i]);
                }
            }
            if constexpr (kEpilogue == kResidual) {
                // What was stored is what the norm sees.
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    squares[i] = low(v[i].x) * low(v[i].x) + high(v[i].x) * high(v[i].x);
                    squares[i] += low(v[i].y) * low(v[i].y) + high(v[i].y) * high(v[i].y);
                    squares[i] += low(v[i].z) * low(v[i].z) + high(v[i].z) * high(v[i].z);
                    squares[i] += low(v[i].w) * low(v[i].w) + high(v[i].w) * high(v[i].w);
                }
#pragma unroll
                for (int distance = 1; distance < 8; distance *= 2) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) squares[i] += __shfl_xor_sync(0xffffffffu, squares[i], distance);
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int token = batch + 16 * i + thread / 8;
                    if (token < begin || token >= end) continue;
                    store_piece(normed + token * kPanelColumns + (piece ^ (token & 7)) * 8,
                                make_uint4(pack(low(v[i].x) * low(gain.x), high(v[i].x) * high(gain.x)),
                                           pack(low(v[i].y) * low(gain.y), high(v[i].y) * high(gain.y)),
                                           pack(low(v[i].z) * low(gain.z), high(v[i].z) * high(gain.z)),
                                           pack(low(v[i].w) * low(gain.w), high(v[i].w) * high(gain.w))));
                    if (piece == 0) g.squares_out[static_cast<int64_t>(tile) * g.rows_max + first + token] = squares[i];
                }
            }
        }
        // Residual: the next chunk's pieces are loaded by the threads that read these.
        if constexpr (kEpilogue == kStore) sync_group(group);
    }
    if constexpr (kEpilogue == kLogits) {
        GemmArguments within = g;
        within.rows = first + end;
        finish<kLogits, kTokens>(within, reinterpret_cast<const float(&)[kTokens / 2]>(d), tile, first, warp, scales, reduce,
                                 [&] { sync_group(group); });
    }
}

// One warpgroup's part of an item.
template <Epilogue kEpilogue, typename B>
__device__ __forceinline__ void work(const GemmTileArguments& a, unsigned char* shared, const Item& item, int group,
                                     Ring<B::kStages>& ring, Ring<2>& scales_ring) {
    const GemmArguments& g = a.g;
    const Unit unit = unit_of<B::kTokens>(a, item.unit);
    const int tile = unit.row * B::kTiles + group * B::kTilesEach;
    const int thread = threadIdx.x % 128;
    const uint32_t base = shared_address(shared);
    const uint32_t staging = base + B::kStaging + group * kChunkBytes;
    // Quads of sums: 16 in a chunk, 8 tokens each. This block finishes [begin, end) of them.
    constexpr int kQuads = B::kTilesEach * B::kTokens / 8, kChunks = (kQuads + 15) / 16;
    int begin = 0, end = finishes(a, item) ? kQuads : 0;
    if (g.splits > 1) {
        const int slice = (kQuads + g.splits - 1) / g.splits;
        begin = min(slice * static_cast<int>(blockIdx.x % g.splits), kQuads), end = min(begin + slice, kQuads);
    }
    const auto tile_of = [&](int chunk) { return tile + (B::kTilesEach == 1 ? 0 : chunk); };
    const auto token_of = [&](int chunk) { return B::kTilesEach == 1 ? chunk * kChunkTokens : 0; };
    const auto load_chunk = [&](int chunk) {
        if (tile_of(chunk) >= g.tiles) return;
        load_residual(g, staging, tile_of(chunk), unit.first + token_of(chunk), 8 * (begin - 16 * chunk), 8 * (end - 16 * chunk), thread);
    };
    if (kEpilogue == kResidual && end > begin) load_chunk(begin / 16);

    float d[kChunks * 64];
    multiply<B>(d, base, group, item.count, ring);
    if (kEpilogue != kLogits && item.count < g.panels) {
        add_up<B, kQuads>(d, a, item, begin, end);
        if (!finishes(a, item)) return;
    }

    const float* scales = reinterpret_cast<const float*>(shared + B::kScales) + scales_ring.stage * B::kTokens;
    barrier_wait(base + B::kScalesFull + 8 * scales_ring.stage, scales_ring.phase);
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
        const int from = max(8 * (begin - 16 * chunk), 0), until = min(8 * (end - 16 * chunk), kChunkTokens);
        if (from >= until || tile_of(chunk) >= g.tiles) continue;
        if (kEpilogue == kResidual) {
            if (chunk != begin / 16) load_chunk(chunk);
            copies_wait<0>();
            sync_group(group);
        }
        // 32 floats are the gain of 64 features.
        leave<kEpilogue, (B::kTokens < kChunkTokens ? B::kTokens : kChunkTokens)>(
            g, reinterpret_cast<const float(&)[64]>(d[64 * chunk]), group, staging,
            scales + (kEpilogue == kResidual ? 32 * (tile_of(chunk) % B::kTiles) : token_of(chunk)),
                         reinterpret_cast<float*>(shared + B::kStaging + group * kChunkBytes), tile_of(chunk), unit.first + token_of(chunk),
                         from, until);
    }
    barrier_arrive(base + B::kScalesEmpty + 8 * scales_ring.stage);
    scales_ring.advance();
}

// The next norm's gain of features from `first`, eight by each of the first `pieces` threads; zeros past the last.
__device__ __forceinline__ void load_gain(const GemmArguments& g, unsigned char* to, int first, int pieces, int thread) {
    if (thread >= pieces) return;
    const int feature = first + 8 * thread;
    uint4 gain = make_uint4(0, 0, 0, 0);
    if (feature < g.features) gain = *reinterpret_cast<const uint4*>(g.gain + feature);
    reinterpret_cast<uint4*>(to)[thread] = gain;
}

template <Epilogue kEpilogue, typename B>
__device__ __forceinline__ void product(const GemmTileArguments& a) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const GemmArguments& g = a.g;
    const uint32_t base = shared_address(shared);
    Walk walk(a);
    Item item;

    if (threadIdx.x == kConsumers) {
        for (int stage = 0; stage < B::kStages; ++stage) {
            barrier_init(base + B::kFull + 8 * stage, 1);
            barrier_init(base + B::kEmpty + 8 * stage, 2);
        }
        for (int buffer = 0; buffer < 2; ++buffer) {
            barrier_init(base + B::kScalesFull + 8 * buffer, kScalers);
            barrier_init(base + B::kScalesEmpty + 8 * buffer, kConsumers);
        }
        barriers_are_ready();
    }
    __syncthreads();
    let_successor_start();

    if (threadIdx.x >= kConsumers) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(56));
        if (threadIdx.x == kWeightProducer) {
            const uint64_t policy = leaves_first();
            // Weights do not wait for the predecessor: nobody writes them. Tiles past the last are clamped: what comes of them is not
            // written.
            Ring<B::kStages> ring;
            while (walk.next(item)) {
                const Unit unit = unit_of<B::kTokens>(a, item.unit);
                for (int panel = item.panel; panel < item.panel + item.count; ++panel) {
                    const uint32_t full = base + B::kFull + 8 * ring.stage;
                    barrier_wait(base + B::kEmpty + 8 * ring.stage, ring.phase ^ 1);
#pragma unroll
                    for (int i = 0; i < B::kTiles; ++i) {
                        const int tile = min(unit.row * B::kTiles + i, g.tiles - 1);
                        const bf16* from = g.weights + (static_cast<int64_t>(tile) * g.panels + panel) * (kTileBytes / 2);
                        const uint32_t to = base + ring.stage * B::kStageBytes + i * kTileBytes;
                        if (a.weights_once) bulk_copy_as(to, from, kTileBytes, full, policy);
                        else bulk_copy(to, from, kTileBytes, full);
                    }
                    ring.advance();
                }
            }
        } else if (threadIdx.x == kTokenProducer) {
            const uint64_t policy = leaves_last();
            wait_for_predecessor();
            Ring<B::kStages> ring;
            while (walk.next(item)) {
                const Unit unit = unit_of<B::kTokens>(a, item.unit);
                const int bytes = unit.width * kPanelRowBytes;
                for (int panel = item.panel; panel < item.panel + item.count; ++panel) {
                    const uint32_t full = base + B::kFull + 8 * ring.stage;
                    const uint32_t to = base + ring.stage * B::kStageBytes + B::kWeightBytes;
                    const bf16* from = g.input + (static_cast<int64_t>(panel) * g.rows_max + unit.first) * kPanelColumns;
                    barrier_wait(base + B::kEmpty + 8 * ring.stage, ring.phase ^ 1);
                    // For the weights too, which may have come before.
                    barrier_expect(full, B::kWeightBytes + bytes);
                    if (a.tokens_stay) bulk_copy_as(to, from, bytes, full, policy);
                    else bulk_copy(to, from, bytes, full);
                    ring.advance();
                }
            }
        } else if (threadIdx.x >= kTokenProducer + 32) {
            wait_for_predecessor();
            const int thread = threadIdx.x - kTokenProducer - 32;
            Ring<2> ring;
            while (walk.next(item)) {
                if (!finishes(a, item)) continue;
                const Unit unit = unit_of<B::kTokens>(a, item.unit);
                if constexpr (kEpilogue == kResidual) {
                    barrier_wait(base + B::kScalesEmpty + 8 * ring.stage, ring.phase ^ 1);
                    load_gain(g, shared + B::kScales + ring.stage * B::kTokens * 4, unit.row * B::kTiles * 64, B::kTiles * 8, thread);
                    barrier_arrive(base + B::kScalesFull + 8 * ring.stage);
                    ring.advance();
                } else {
                    float* scales = reinterpret_cast<float*>(shared + B::kScales) + ring.stage * B::kTokens;
                    barrier_wait(base + B::kScalesEmpty + 8 * ring.stage, ring.phase ^ 1);
                    for (int token = thread; token < unit.width; token += kScalers) {
                        float scale = 1.0f;
                        if (g.squares != nullptr && unit.first + token < g.rows) {
                            float sum = 0.0f;
                            const float* squares = g.squares + unit.first + token;
#pragma unroll 8
                            for (int i = 0; i < g.square_tiles; ++i, squares += g.rows_max) sum += *squares;
                            scale = rsqrtf(sum / g.width + g.eps);
                        }
                        scales[token] = scale;
                    }
                    barrier_arrive(base + B::kScalesFull + 8 * ring.stage);
                    ring.advance();
                }
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(224));
        const int group = threadIdx.x / 128;
        wait_for_predecessor();
        Ring<B::kStages> ring;
        Ring<2> scales;
        while (walk.next(item)) work<kEpilogue, B>(a, shared, item, group, ring, scales);
    }
}

#define PRODUCT(name, epilogue, tiles_each, tokens)                                                                      \
    extern "C" __global__ void __launch_bounds__(kThreads, 1) name(const __grid_constant__ GemmTileArguments arguments) { \
        product<epilogue, Block<tiles_each, tokens>>(arguments);                                                         \
    }
#define PRODUCTS(epilogue_name, epilogue)                               \
    PRODUCT(gemm_tile_##epilogue_name##_128x256, epilogue, 1, 256)      \
    PRODUCT(gemm_tile_##epilogue_name##_256x128, epilogue, 2, 128)      \
    PRODUCT(gemm_tile_##epilogue_name##_128x192, epilogue, 1, 192)      \
    PRODUCT(gemm_tile_##epilogue_name##_128x160, epilogue, 1, 160)      \
    PRODUCT(gemm_tile_##epilogue_name##_128x128, epilogue, 1, 128)      \
    PRODUCT(gemm_tile_##epilogue_name##_128x96, epilogue, 1, 96)        \
    PRODUCT(gemm_tile_##epilogue_name##_128x64, epilogue, 1, 64)

PRODUCTS(store, kStore)
PRODUCTS(residual, kResidual)
PRODUCTS(gate_up, kGateUp)
PRODUCTS(logits, kLogits)

#endif
