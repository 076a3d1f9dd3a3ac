// The matrix product for every card from sm_80 on, and any number of tokens: cp.async rings and mma.sync.
//
// A block owns some 64-row tiles of weights, a run of tokens, and a share of K. Shapes:
//   Stream<T>  T = 8, 16, 32 tokens against one tile, T = 64 against two; each warp 16 rows of every tile, all tokens.
//              Bound by memory: tiles * panels * 8 KiB of weights are read once, tokens come from the L2. Rings in several
//              blocks of a processor keep more than 64 KiB in flight there. Measured on an H100 at 8 tokens, of its read
//              bandwidth: 42 % of 8 MiB, 76 % of 32, 86 % of 112, 91 % of 224, 98 % of a head.
//   Square     128 tokens against two tiles; each warp 64 rows and 64 tokens, so that shared memory keeps up with the
//              matrix units: 8 loads of fragments feed 32 products, where a warp of Stream would need 18. Bound by
//              mma.sync: 380 to 440 TFLOP/s on an H100 from 512 tokens of an 8B model on, where wgmma has 750 and
//              mma.sync some 500.
// Where tiles are too few for the card, K is split: each block writes its sums in fragment order to g.partials, and the
// last one to arrive adds them up in the order of the splits, so that the result does not depend on who was last.
// Token rows beyond `rows` are computed and not written; the buffers have them (rows_max is a multiple of 256).

#include "gemm.cuh"

constexpr int kThreads = 128;
constexpr int kPanelBytes = 64 * kPanelRowBytes;

template <int kBlockTokens, int kBlockTiles, int kRing, int kBlocksOfProcessor, bool kIsSquare = false>
struct Shape {
    static constexpr int kTokens = kBlockTokens;
    static constexpr int kTiles = kBlockTiles;
    static constexpr int kStages = kRing;
    static constexpr int kBlocks = kBlocksOfProcessor;
    static constexpr bool kSquare = kIsSquare;
    // Of one warp: pieces of 16 rows, and tokens.
    static constexpr int kRowPieces = kSquare ? 4 : kTiles;
    static constexpr int kWarpTokens = kSquare ? kTokens / 2 : kTokens;
    static constexpr int kWeightBytes = kTiles * kPanelBytes;
    static constexpr int kStageBytes = kWeightBytes + kTokens * kPanelRowBytes;
    // Behind the ring lie the scales and, in 16 bytes, a counter's value. The epilogue reuses the ring.
    static constexpr int kSharedBytes = kStages * kStageBytes + kTokens * 4 + 16;
    // What the epilogue adds is asked for in the beginning where there are registers for it, else at the end by all
    // threads together, so that nobody waits for it token by token.
    static constexpr bool kEarly = kTokens <= 32;
    static constexpr int kReduceBytes = kSquare ? 4 * 8 * 32 * 4 : 8 * kTokens * 4;
    static constexpr int kOldRowBytes = kPanelRowBytes + 16;  // Not all rows in the same banks.
    static constexpr int kOldBytes = kEarly ? 0 : kTiles * kTokens * kOldRowBytes;
    // Token tiles that blocks running together go through before they take the next rows of weights.
    static constexpr int kGroup = 16;
    static_assert(kSharedBytes <= 99 * 1024, "a block of sm_89 has no more");
    static_assert(kReduceBytes + kOldBytes <= kStages * kStageBytes, "the epilogue fits into the ring");
    static_assert(!kSquare || kTiles * 2 * 32 == kThreads, "a warp for each tile and half of the tokens");
};

// Two 8x8 matrices; lanes 0 to 15 give the addresses.
__device__ __forceinline__ void load_two_matrices(uint32_t& first, uint32_t& second, uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(first), "=r"(second) : "r"(address) : "memory");
}

template <typename S>
struct Sums {
    float d[S::kRowPieces][S::kWarpTokens / 2];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < S::kRowPieces; ++i) {
#pragma unroll
            for (int j = 0; j < S::kWarpTokens / 2; ++j) d[i][j] = 0.0f;
        }
    }
};

__device__ __forceinline__ float4 load_shared(uint32_t at) {
    float4 value;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w) : "r"(at) : "memory");
    return value;
}

// Four bytes, for what is not a multiple of sixteen.
__device__ __forceinline__ void copy_4(uint32_t to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

// The fragments of a step of 16 along K, and those of the next one on their way. Square has registers for twice the rows
// but not for twice the tokens: there the next step's tokens take the place of those just used.
template <typename S>
struct Fragments {
    static constexpr int kTokenPieces = S::kWarpTokens == 8 ? 1 : S::kWarpTokens / 16;
    uint32_t rows[2][S::kRowPieces][4];
    uint32_t tokens[S::kSquare ? 1 : 2][kTokenPieces][4];

    // `at` is this lane's address of step k: that of the stage's first step with k in bits 5 and 6.
    __device__ __forceinline__ void load_rows(int k, uint32_t at) {
        constexpr int kRowPieceBytes = S::kSquare ? 16 * kPanelRowBytes : kPanelBytes;
#pragma unroll
        for (int i = 0; i < S::kRowPieces; ++i) load_matrices(rows[k % 2][i], at + i * kRowPieceBytes);
    }
    __device__ __forceinline__ void load_tokens(int k, int piece, uint32_t at) {
        uint32_t(&m)[4] = tokens[S::kSquare ? 0 : k % 2][piece];
        if constexpr (S::kWarpTokens == 8) load_two_matrices(m[0], m[1], at);
        else load_matrices(m, at + piece * 16 * kPanelRowBytes);
    }
    __device__ __forceinline__ void load(int k, uint32_t weights, uint32_t input) {
        load_rows(k, weights);
#pragma unroll
        for (int piece = 0; piece < kTokenPieces; ++piece) load_tokens(k, piece, input);
    }
    // Step k, while the fragments of step k + 1 arrive from these addresses.
    __device__ __forceinline__ void multiply(Sums<S>& sums, int k, uint32_t next_weights, uint32_t next_input) {
        if constexpr (S::kSquare) load_rows(k + 1, next_weights);
        else load(k + 1, next_weights, next_input);
#pragma unroll
        for (int piece = 0; piece < kTokenPieces; ++piece) {
            const uint32_t(&m)[4] = tokens[S::kSquare ? 0 : k % 2][piece];
#pragma unroll
            for (int i = 0; i < S::kRowPieces; ++i) {
                mma_16x8x16(reinterpret_cast<float(&)[4]>(sums.d[i][8 * piece]), rows[k % 2][i], m[0], m[1]);
                if constexpr (S::kWarpTokens > 8) mma_16x8x16(reinterpret_cast<float(&)[4]>(sums.d[i][8 * piece + 4]), rows[k % 2][i], m[2], m[3]);
            }
            if constexpr (S::kSquare) load_tokens(k + 1, piece, next_input);
        }
    }
};

// Adds up the splits of K. True in the block that came last: it has the sums of all.
template <typename S>
__device__ __forceinline__ bool gather(const GemmArguments& g, Sums<S>& sums, int* arrived, uint32_t ring) {
    constexpr int kQuads = S::kRowPieces * S::kWarpTokens / 8;
    // What is brought at once: up to 32 KiB, and as often as the ring holds it.
    constexpr int kPartQuads = kQuads < 16 ? kQuads : 16, kParts = kQuads / kPartQuads;
    constexpr int kPart = kPartQuads * kThreads;
    constexpr int kFits = S::kStages * S::kStageBytes / (kPart * 16), kDepth = kFits < 8 ? kFits : 8;
    float4* partials = reinterpret_cast<float4*>(g.partials);
    // [blocks][splits][quads][threads]: whoever adds wants the fragments of the same thread.
    int at = (blockIdx.x * g.splits + blockIdx.y) * kParts * kPart + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
        const float* d = &sums.d[i / (S::kWarpTokens / 8)][i % (S::kWarpTokens / 8) * 4];
        __stcg(partials + at + i * kThreads, make_float4(d[0], d[1], d[2], d[3]));
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *arrived = atomicAdd(g.counters + blockIdx.x, 1);
    __syncthreads();
    if (*arrived + 1 != g.splits) return false;
    __threadfence();
    if (threadIdx.x == 0) g.counters[blockIdx.x] = 0;

    // Each thread reads back what it alone brought into the ring, so only its own copies need waiting for.
    const int count = g.splits * kParts;
    const uint32_t mine = ring + threadIdx.x * 16;
    at = blockIdx.x * g.splits * kParts * kPart + threadIdx.x;
    const auto bring = [&](int part, int slot) {
        if (part < count) {
#pragma unroll
            for (int i = 0; i < kPartQuads; ++i) copy_16(mine + (slot * kPart + i * kThreads) * 16, partials + at + part * kPart + i * kThreads);
        }
        copies_commit();
    };
#pragma unroll 1
    for (int part = 0; part < kDepth; ++part) bring(part, part);
    sums.clear();
    int slot = 0;
#pragma unroll 1
    for (int split = 0; split < g.splits; ++split) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            copies_wait<kDepth - 1>();
#pragma unroll
            for (int i = 0; i < kPartQuads; ++i) {
                const int quad = part * kPartQuads + i;
                float* d = &sums.d[quad / (S::kWarpTokens / 8)][quad % (S::kWarpTokens / 8) * 4];
                const float4 more = load_shared(mine + (slot * kPart + i * kThreads) * 16);
                d[0] += more.x, d[1] += more.y, d[2] += more.z, d[3] += more.w;
            }
            bring(split * kParts + part + kDepth, slot);
            slot = slot + 1 == kDepth ? 0 : slot + 1;
        }
    }
    return true;
}

// The residual stream under a block, [tiles][tokens][64] in rows of kOldRowBytes.
template <typename S>
__device__ __forceinline__ void load_old(const GemmArguments& g, int first_tile, int first, uint32_t to) {
    for (uint32_t piece = threadIdx.x; piece < S::kTiles * S::kTokens * 8; piece += kThreads) {
        const int row = piece / 8, token = first + row % S::kTokens;
        const int feature = (first_tile + row / S::kTokens) * 64 + piece % 8 * 8;
        if (token >= g.rows || feature >= g.features) continue;
        const uint32_t at = to + row * S::kOldRowBytes + piece % 8 * 16;
        const bf16* old = g.out + static_cast<int64_t>(token) * g.out_stride + feature;
        if (feature + 8 <= g.features && g.out_stride % 8 == 0) {
            copy_16(at, old);
        } else {
            for (int i = 0; i < 8 && feature + i < g.features; i += 2) copy_4(at + 2 * i, old + i);
        }
    }
    copies_commit();
}

// Addends whose residual stream load_old has brought: `old_at` is where this lane's first token and rows lie.
template <typename S>
struct OldAddends : Addends {
    const unsigned char* old_at;
    __device__ __forceinline__ uint32_t old(int i, const uint32_t*) const {
        return *reinterpret_cast<const uint32_t*>(old_at + (i / 2 * 8 + i % 2) * S::kOldRowBytes);
    }
};

template <Epilogue kEpilogue, typename S>
__device__ __forceinline__ void product(const GemmArguments& g) {
    extern __shared__ __align__(1024) unsigned char ring[];
    float* scales = reinterpret_cast<float*>(ring + S::kStages * S::kStageBytes);
    const uint32_t thread = threadIdx.x, lane = thread % 32, warp = thread / 32;

    const int tile_blocks = (g.tiles + S::kTiles - 1) / S::kTiles;
    const int token_tiles = (g.rows + S::kTokens - 1) / S::kTokens;
    const int group = static_cast<int>(blockIdx.x) / (S::kGroup * tile_blocks) * S::kGroup;
    const int within = static_cast<int>(blockIdx.x) % (S::kGroup * tile_blocks);
    const int width = min(S::kGroup, token_tiles - group);
    const int first = (group + within % width) * S::kTokens;
    const int first_tile = within / width * S::kTiles;

    const int split = blockIdx.y;
    const int first_panel = split * g.panels / g.splits;
    const int count = (split + 1) * g.panels / g.splits - first_panel;

    let_successor_start();

    // Each thread copies the pieces from `mine` on, 2,048 bytes apart, in both places.
    const uint32_t mine = thread * 16;
    const char* weights[S::kTiles];
#pragma unroll
    for (int i = 0; i < S::kTiles; ++i) {
        // Where tiles are odd the last block computes its last tile twice and stores it once.
        const int tile = min(first_tile + i, g.tiles - 1);
        weights[i] = reinterpret_cast<const char*>(g.weights) + (static_cast<int64_t>(tile) * g.panels + first_panel) * kPanelBytes;
    }
    const int64_t input_step = static_cast<int64_t>(g.rows_max) * kPanelRowBytes;
    const char* input = reinterpret_cast<const char*>(g.input) + first_panel * input_step + static_cast<int64_t>(first) * kPanelRowBytes;
    const uint32_t ring_at = shared_address(ring);

    const auto copy_weights = [&](uint32_t stage) {
#pragma unroll
        for (int i = 0; i < S::kTiles; ++i) {
#pragma unroll
            for (int j = 0; j < kPanelBytes; j += kThreads * 16) copy_16(stage + i * kPanelBytes + mine + j, weights[i] + (mine + j));
            weights[i] += kPanelBytes;
        }
    };
    const auto copy_input = [&](uint32_t stage) {
        constexpr int kBytes = S::kTokens * kPanelRowBytes;
#pragma unroll
        for (int j = 0; j < kBytes; j += kThreads * 16) {
            if (j + kThreads * 16 <= kBytes || mine < kBytes - j) copy_16(stage + S::kWeightBytes + mine + j, input + (mine + j));
        }
        input += input_step;
    };

#pragma unroll
    for (int i = 0; i < S::kStages; ++i) {
        if (i < count) copy_weights(ring_at + i * S::kStageBytes);
    }
    wait_for_predecessor();
#pragma unroll
    for (int i = 0; i < S::kStages; ++i) {
        if (i < count) copy_input(ring_at + i * S::kStageBytes);
        copies_commit();
    }
    load_scales_in_passes<(S::kTokens > 16 ? S::kTokens / 16 : 1)>(g, first, S::kTokens, scales, thread, kThreads);
    EarlyAddends<S::kTokens> early;
    if constexpr (S::kEarly) early = load_addends_early<kEpilogue, S::kTokens>(g, first_tile, first, warp);

    // This lane's rows for ldmatrix, and the first of its pieces: step k along K reads piece (2k + half) ^ (row % 8).
    const uint32_t row = S::kSquare ? warp / 2 * 64 : warp * 16, token = S::kSquare ? warp % 2 * 64 : 0;
    const uint32_t weights_lane = (row + lane % 16) * kPanelRowBytes + ((lane / 16) ^ (lane % 8)) * 16;
    const uint32_t input_lane =
        S::kWeightBytes + (token + lane / 16 * 8 + lane % 8) * kPanelRowBytes + ((lane / 8 % 2) ^ (lane % 8)) * 16;

    Sums<S> sums;
    sums.clear();
    Fragments<S> fragments;
    uint32_t stage = ring_at;
    copies_wait<S::kStages - 1>();
    __syncthreads();
    fragments.load(0, stage + weights_lane, stage + input_lane);
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
#pragma unroll
        for (int k = 0; k < 3; ++k) {
            fragments.multiply(sums, k, (stage + weights_lane) ^ ((k + 1) * 32), (stage + input_lane) ^ ((k + 1) * 32));
        }
        // All of this stage is in registers, so its place takes the next but kStages - 1. After the last stage the
        // fragments are of what the ring held before, and nobody uses them.
        copies_wait<S::kStages - 2>();
        __syncthreads();
        if (i + S::kStages < count) {
            copy_weights(stage);
            copy_input(stage);
        }
        copies_commit();
        stage += S::kStageBytes;
        if (stage == ring_at + S::kStages * S::kStageBytes) stage = ring_at;
        fragments.multiply(sums, 3, stage + weights_lane, stage + input_lane);
    }
    if (g.splits > 1 && !gather(g, sums, reinterpret_cast<int*>(scales + S::kTokens), ring_at)) return;
    // The epilogue reuses the ring, which others may still be reading.
    __syncthreads();

    float* reduce = reinterpret_cast<float*>(ring);
    if constexpr (S::kEarly) {
        finish<kEpilogue, S::kTokens>(g, sums.d[0], early, first_tile, first, warp, scales, reduce, [] { __syncthreads(); });
        return;
    }
    unsigned char* old = ring + S::kReduceBytes;
    if constexpr (kEpilogue == kResidual) load_old<S>(g, first_tile, first, shared_address(old));
    old += lane % 4 * 2 * S::kOldRowBytes + lane / 4 * 4;
    OldAddends<S> addends[S::kRowPieces];
#pragma unroll
    for (int i = 0; i < S::kRowPieces; ++i) {
        const int tile = S::kSquare ? warp / 2 : i, piece = S::kSquare ? i : warp;
        static_cast<Addends&>(addends[i]) = load_addends<kEpilogue>(g, first_tile + tile, piece);
        addends[i].old_at = old + (tile * S::kTokens + token) * S::kOldRowBytes + piece * 32;
    }
    if constexpr (kEpilogue == kResidual) {
        copies_wait<0>();
        __syncthreads();
    }
    if constexpr (S::kSquare) {
        // The warp has all four sixteens of its tile, and goes through them as four warps would, 32 tokens at a time.
        // `finish` reduces over the sixteens in its warp 0 when there are no more than 32 tokens, so that one comes last.
        const int tile = first_tile + warp / 2;
        if (tile >= g.tiles) return;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int piece = 3; piece >= 0; --piece) {
                finish<kEpilogue, 32>(g, reinterpret_cast<const float(&)[16]>(sums.d[piece][16 * half]), addends[piece], tile,
                                      first + token + 32 * half, piece, scales + token + 32 * half, reduce + warp * 256,
                                      [] { __syncwarp(); });
                addends[piece].old_at += 32 * S::kOldRowBytes;
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < S::kTiles; ++i) {
            const int tile = first_tile + i;
            if (tile < g.tiles) finish<kEpilogue, S::kTokens>(g, sums.d[i], addends[i], tile, first, warp, scales, reduce, [] { __syncthreads(); });
        }
    }
}

// ops/gemm_portable.rs knows these shapes too.
using Stream8 = Shape<8, 1, 5, 4>;
using Stream16 = Shape<16, 1, 4, 4>;
using Stream32 = Shape<32, 1, 4, 4>;
using Stream64 = Shape<64, 2, 4, 2>;
using Square = Shape<128, 2, 3, 2, true>;

#define PRODUCT(name, epilogue, shape)                                                                                         \
    extern "C" __global__ void __launch_bounds__(kThreads, shape::kBlocks) name(const __grid_constant__ GemmArguments g) { \
        product<epilogue, shape>(g);                                                                                           \
    }
#define PRODUCTS(tokens, shape)                                    \
    PRODUCT(gemm_portable_store_##tokens, kStore, shape)       \
    PRODUCT(gemm_portable_residual_##tokens, kResidual, shape) \
    PRODUCT(gemm_portable_gate_up_##tokens, kGateUp, shape)    \
    PRODUCT(gemm_portable_logits_##tokens, kLogits, shape)
PRODUCTS(8, Stream8)
PRODUCTS(16, Stream16)
PRODUCTS(32, Stream32)
PRODUCTS(64, Stream64)
PRODUCTS(128, Square)
