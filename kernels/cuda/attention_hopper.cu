// Hopper only.
// Causal attention of runs of tokens (prefill, chunks of it, and chunks behind a cached prefix) over the keys and values
// in pages, after rope_kv (attention_prefill.cu) has turned queries and keys and written the pages.
//
// Persistent blocks walk over pairs (block of kRows query rows, head), heaviest first, there and back. One warp fetches
// K and V of kPages pages at a time by contiguous copies into a ring; kGroups warpgroups take 64 rows each:
// S = Q K^T from shared memory, softmax in registers, O += P V with P from registers and V as a transposed operand.
// The product S of the next pages is queued before O's of the last ones, so softmax runs while O's is at work, and the
// warpgroups fill each other's gaps. Pages come in ascending order from a fixed boundary and masked ones change nothing,
// so a row's bits do not depend on how its prompt was cut into chunks.
//
// Shared memory: queries [kGroups][kDim / 64][64][64], keys and values [kStages][kDim / 64][64 * kPages][64] each, barriers.
// Moves: queries and output once, K and V once per kRows rows through the L2. Bound by matrix products and exponentials:
// expected 550 to 600 of 990 TFLOP/s at kDim 128, 400 at 64, of long prompts, where causal work counts half.

#include "attention.cuh"
#include "wgmma.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace {

// D[64, N] (+)= A[64, 16] * B[16, N], A in registers as mma_16x8x16's (each warp its 16 rows), B as it lies in a page of
// values: rows are the 16 of K, 64-column panels along N.
template <int N>
struct WgmmaOfRegisters;

// Width, registers of D, and the numbers of the operands behind them: A's four, B, accumulate.
#define WGMMA_OF_REGISTERS(width, registers, a0, a1, a2, a3, b_number, accumulate_number)                                    \
    template <>                                                                                                              \
    struct WgmmaOfRegisters<width> {                                                                                         \
        __device__ __forceinline__ static void run(float (&d)[registers], const uint32_t (&a)[4], uint64_t b, int more) {    \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #accumulate_number ", 0;\n"                                    \
                         "wgmma.mma_async.sync.aligned.m64n" #width "k16.f32.bf16.bf16 "                                     \
                         "{" WGMMA_NAMES_##registers "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b_number              \
                         ", p, 1, 1, 1;\n}\n"                                                                                \
                         : WGMMA_SUMS_##registers(d, 0)                                                                      \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(more));                                   \
        }                                                                                                                    \
    };

WGMMA_OF_REGISTERS(64, 32, 32, 33, 34, 35, 36, 37)
WGMMA_OF_REGISTERS(128, 64, 64, 65, 66, 67, 68, 69)

// The low word of a descriptor of panels (wgmma.cuh) in shared memory. `apart` bytes lie between panels of 64 columns,
// where columns are N ("MN-major", as values are); where they are K it is not used.
__device__ __forceinline__ uint32_t low_word(uint32_t shared_address, uint32_t apart) {
    // The same in all lanes: descriptors live in uniform registers, and the shuffle lets them be computed there.
    return __shfl_sync(0xffffffffu, (apart << 12) | ((shared_address & 0x3ffff) >> 4), 0);
}
// Groups of eight rows lie 1,024 bytes apart; 128-byte swizzle.
__device__ __forceinline__ uint64_t described(uint32_t low_word) {
    uint64_t descriptor;
    asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(low_word), "n"((1 << 30) | (1024 >> 4)));
    return descriptor;
}

// Keeps what reads or changes sums behind the wait for the product that makes them.
template <int N>
__device__ __forceinline__ void fence(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

template <int kDim, int kGroups, int kPages, int kStages>
struct Shape {
    static constexpr int kPanels = kDim / 64;
    static constexpr int kTokens = kPageTokens * kPages;
    static constexpr int kPanelBytes = kTokens * kPanelRowBytes;
    static constexpr int kHalfBytes = kPanels * kPanelBytes;       // keys or values of a stage
    static constexpr int kQueryBytes = 64 * kDim * 2;              // of a warpgroup
    static constexpr int kBarriers = kGroups * kQueryBytes + 2 * kStages * kHalfBytes;
    static constexpr int kProducerRegisters = kGroups == 2 ? 40 : 32;
    static constexpr int kConsumerRegisters = kGroups == 2 ? 232 : 160;
};

// A span of at most kRows rows with one head.
struct Work {
    int row;       // the first
    int rows;
    int slot;
    int position;  // of the first row
    int head;

    // Read anew wherever it is needed: from the L1 that is cheaper than registers held across the products.
    __device__ __forceinline__ static Work at(const AttentionArguments& a, int index) {
        asm volatile("" : "+r"(index));
        const int4 span = __ldg(reinterpret_cast<const int4*>(a.spans + index / a.heads));
        return {span.x, span.y, span.z, span.w, index % a.heads};
    }
    // Pages come kPages at a time: the first such tile, and the one past the last.
    template <int kTokens>
    __device__ __forceinline__ int tile_begin(int window) const {
        return window > 0 ? max(0, position + 1 - window) / kTokens : 0;
    }
    template <int kTokens>
    __device__ __forceinline__ int tile_end() const {
        return (position + rows - 1) / kTokens + 1;
    }
};

// The index of a block's work in a round; odd rounds go backwards, which evens out work that falls steadily.
__device__ __forceinline__ int index_in(int round) {
    return round * gridDim.x + (round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
}

__device__ __forceinline__ void sync_group(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }

struct Turn {
    int stage = 0, phase = 0;
    template <int kStages>
    __device__ __forceinline__ void next() {
        if (++stage == kStages) stage = 0, phase ^= 1;
    }
};

// Queries of a warpgroup on their way into shared memory; rows past the end repeat the last.
template <int kDim>
__device__ __forceinline__ void fetch_queries(const AttentionArguments& a, const Work& work, int group, uint32_t to, int thread) {
    constexpr int kPieces = kDim / 8;
    // Computed anew each time: kept, these addresses would crowd out sums.
    asm volatile("" : "+r"(thread));
    const bf16* from = a.qkv + work.head * kDim;
#pragma unroll 1
    for (int i = 0; i < 64 * kPieces / 128; ++i) {
        const int row = (i * 128 + thread) / kPieces, piece = thread % kPieces;
        const int source = work.row + min(64 * group + row, work.rows - 1);
        copy_16(to + piece / 8 * (64 * kPanelRowBytes) + row * kPanelRowBytes + ((piece % 8) ^ (row % 8)) * 16,
                from + static_cast<int64_t>(source) * a.qkv_stride + piece * 8);
    }
    copies_commit();
}

// The same queries on their way into the L2.
template <int kDim>
__device__ __forceinline__ void foresee_queries(const AttentionArguments& a, const Work& work, int group, int thread) {
    constexpr int kLines = kDim / 64;  // of 128 bytes
    if (thread >= 64 * kLines) return;
    const int source = work.row + min(64 * group + thread / kLines, work.rows - 1);
    const bf16* line = a.qkv + static_cast<int64_t>(source) * a.qkv_stride + work.head * kDim + thread % kLines * 64;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(line) : "memory");
}

// The four words of a quad's lanes trade places: lane i gets word i of all four.
__device__ __forceinline__ uint4 transpose_quad(uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3, int lane) {
    const bool upper = lane & 2, odd = lane & 1;
    uint32_t x = __shfl_xor_sync(0xffffffffu, upper ? w0 : w2, 2);
    uint32_t y = __shfl_xor_sync(0xffffffffu, upper ? w1 : w3, 2);
    // a: words of this half's first piece, b: of its second; [0] from the lower lanes' pair.
    const uint32_t a0 = upper ? x : w0, a1 = upper ? w2 : x, b0 = upper ? y : w1, b1 = upper ? w3 : y;
    x = __shfl_xor_sync(0xffffffffu, odd ? a0 : b0, 1);
    y = __shfl_xor_sync(0xffffffffu, odd ? a1 : b1, 1);
    return odd ? make_uint4(x, b0, y, b1) : make_uint4(a0, x, a1, y);
}

template <int kDim, int kGroups, int kPages, int kStages>
__device__ __forceinline__ void produce(const AttentionArguments& a, uint32_t shared, int total) {
    using S = Shape<kDim, kGroups, kPages, kStages>;
    const int lane = threadIdx.x % 32;
    Turn turn;
    for (int round = 0;; ++round) {
        const int index = index_in(round);
        if (index >= total) break;
        const Work work = Work::at(a, index);
        const int end = work.tile_end<S::kTokens>();
        // A tile's pages outside of what the rows see are masked, but must not be strangers': zero times NaN is NaN.
        const int first_page = (a.window > 0 ? max(0, work.position + 1 - a.window) : 0) / kPageTokens;
        const int last_page = (work.position + work.rows - 1) / kPageTokens;
        const int* table = a.tables + static_cast<int64_t>(work.slot) * a.table_stride;
        const bf16* head = head_of_page<kDim>(a, 0, 0, work.head / (a.heads / a.kv_heads));
        const int begin = work.tile_begin<S::kTokens>(a.window);
        int pages = 0, held = 0;
        for (int tile = begin; tile < end; ++tile) {
            if (held == 0) pages = table[max(first_page, min(tile * kPages + lane, last_page))], held = 32;
            held -= kPages;
            const uint32_t barrier = shared + S::kBarriers + 32 * turn.stage;
            uint32_t to = shared + kGroups * S::kQueryBytes + turn.stage * (2 * S::kHalfBytes);
#pragma unroll 1
            for (int half = 0; half < 2; ++half) {
                if (lane == 0) {
                    barrier_wait(barrier + 16 + 8 * half, turn.phase ^ 1);
                    barrier_expect(barrier + 8 * half, S::kHalfBytes);
                }
#pragma unroll
                for (int i = 0; i < kPages; ++i) {
                    const int page = __shfl_sync(0xffffffffu, pages, 32 - kPages - held + i);
                    const bf16* from = head + page * a.page_stride + half * a.kv_heads * (kPageTokens * kDim);
                    constexpr int kCopies = kPages == 1 ? 1 : S::kPanels, kBytes = kPageTokens * kDim * 2 / kCopies;
                    if (lane == 0) {
#pragma unroll
                        for (int j = 0; j < kCopies; ++j) {
                            bulk_copy(to + j * S::kPanelBytes + i * kBytes, from + j * (kBytes / 2), kBytes, barrier + 8 * half);
                        }
                    }
                }
                to += S::kHalfBytes;
            }
            turn.next<kStages>();
        }
    }
}

template <int kDim, int kGroups, int kPages, int kStages, bool kTurns>
struct Consumer {
    using S = Shape<kDim, kGroups, kPages, kStages>;
    static constexpr int kScores = S::kTokens / 2;

    const AttentionArguments& a;
    const uint32_t queries, keys, barriers, queries_word;
    const int group, thread, lane;
    const float scale;
    float o[kDim / 2];
    float s[kScores];
    uint32_t p[S::kTokens / 16][4];
    float maximum[2], sum[2], factor[2];

    __device__ __forceinline__ Consumer(const AttentionArguments& a, uint32_t shared, int group)
        : a(a), queries(shared + group * S::kQueryBytes), keys(shared + kGroups * S::kQueryBytes), barriers(shared + S::kBarriers),
          queries_word(low_word(queries, 16)), group(group),
          thread(threadIdx.x % 128), lane(threadIdx.x % 32), scale(a.scale * 1.4426950408889634f) {}

    __device__ __forceinline__ void wait(const Turn& turn, int half) { barrier_wait(barriers + 32 * turn.stage + 8 * half, turn.phase); }
    __device__ __forceinline__ void release(const Turn& turn, int half) {
        if (lane == 0) barrier_arrive(barriers + 32 * turn.stage + 16 + 8 * half);
    }

    // Warpgroups queue their products in turns, so that one's softmax falls into another's products.
    __device__ __forceinline__ void await_turn() {
        if constexpr (kTurns) asm volatile("bar.sync %0, 256;" ::"r"(8 + group) : "memory");
    }
    __device__ __forceinline__ void pass_turn() {
        if constexpr (kTurns) asm volatile("bar.arrive %0, 256;" ::"r"(8 + (group + 1) % kGroups) : "memory");
    }

    // Queues S = Q K^T.
    __device__ __forceinline__ void queue_scores(uint32_t keys_word) {
#pragma unroll
        for (int step = 0; step < kDim / 16; ++step) {
            const int inner = step % 4 * 32;
            Wgmma<S::kTokens>::run(s, described(queries_word + ((step / 4 * (64 * kPanelRowBytes) + inner) >> 4)),
                                   described(keys_word + ((step / 4 * S::kPanelBytes + inner) >> 4)), step > 0);
        }
        wgmma_commit();
    }
    // Queues O (+)= P V.
    __device__ __forceinline__ void queue_output(uint32_t values_word, bool more) {
#pragma unroll
        for (int step = 0; step < S::kTokens / 16; ++step) {
            WgmmaOfRegisters<kDim>::run(o, p[step], described(values_word + ((step * 16 * kPanelRowBytes) >> 4)), step > 0 || more);
        }
        wgmma_commit();
    }
    __device__ __forceinline__ uint32_t keys_of(const Turn& turn) const { return low_word(keys + turn.stage * (2 * S::kHalfBytes), 16); }
    __device__ __forceinline__ uint32_t values_of(const Turn& turn) const {
        return low_word(keys + turn.stage * (2 * S::kHalfBytes) + S::kHalfBytes, S::kPanelBytes);
    }

    // Scores become weights (in place, not yet rounded). `own_first`: the position of the warpgroup's first row, `token`
    // the first of the tile.
    template <bool kMasked>
    __device__ __forceinline__ void soften_tile(int own_first, int token) {
        if constexpr (kMasked) {
            const int column = token + 2 * (lane % 4), position = own_first + thread / 32 * 16 + lane / 4;
#pragma unroll
            for (int i = 0; i < kScores; ++i) {
                const int at = column + i / 4 * 8 + i % 2, row = position + i / 2 % 2 * 8;
                if (at > row || (a.window > 0 && at <= row - a.window)) s[i] = -INFINITY;
            }
        }
        float top[2][2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            top[half][0] = s[2 * half], top[half][1] = s[2 * half + 1];
#pragma unroll
            for (int i = 1; i < kScores / 4; ++i) {
#pragma unroll
                for (int j = 0; j < 2; ++j) top[half][j] = fmaxf(top[half][j], s[4 * i + 2 * half + j]);
            }
        }
        float from[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float all = fmaxf(top[half][0], top[half][1]);
            all = fmaxf(all, __shfl_xor_sync(0xffffffffu, all, 1));
            all = fmaxf(all, __shfl_xor_sync(0xffffffffu, all, 2)) * scale;
            // The reference point moves only when a weight would pass 2^8: sums stay exact enough, and O is rarely rescaled.
            const float before = maximum[half];
            maximum[half] = all > before + 8.0f ? all : before;
            factor[half] = all > before + 8.0f ? exp2_fast(before - all) : 1.0f;
            from[half] = maximum[half] == -INFINITY ? 0.0f : -maximum[half];
        }
#pragma unroll
        for (int i = 0; i < kScores; ++i) s[i] = exp2_fast(fmaf(s[i], scale, from[i / 2 % 2]));
    }
    __device__ __forceinline__ void soften(int own_first, int token) {
        if (token + S::kTokens - 1 > own_first || (a.window > 0 && token <= own_first + 63 - a.window)) {
            soften_tile<true>(own_first, token);
        } else {
            soften_tile<false>(own_first, token);
        }
    }
    // Apart from soften, so that no sum waits for the one exponential before it.
    __device__ __forceinline__ void round_weights() {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float total[4] = {};
#pragma unroll
            for (int i = 0; i < kScores / 4; ++i) {
#pragma unroll
                for (int j = 0; j < 2; ++j) total[i % 2 * 2 + j] += s[4 * i + 2 * half + j];
            }
            sum[half] = fmaf(sum[half], factor[half], (total[0] + total[1]) + (total[2] + total[3]));
        }
#pragma unroll
        for (int step = 0; step < S::kTokens / 16; ++step) {
#pragma unroll
            for (int i = 0; i < 4; ++i) p[step][i] = pack(s[8 * step + 2 * i], s[8 * step + 2 * i + 1]);
        }
    }
    __device__ __forceinline__ void rescale() {
        // A factor of 1 changes nothing, so that skipping it leaves a row's bits independent of its neighbours.
        if (__any_sync(0xffffffffu, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
            for (int i = 0; i < kDim / 8; ++i) {
                o[4 * i] *= factor[0], o[4 * i + 1] *= factor[0];
                o[4 * i + 2] *= factor[1], o[4 * i + 3] *= factor[1];
            }
        }
    }
    __device__ __forceinline__ void store(const Work& work) {
        float inverse[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float all = sum[half] + __shfl_xor_sync(0xffffffffu, sum[half], 1);
            all += __shfl_xor_sync(0xffffffffu, all, 2);
            inverse[half] = 1.0f / all;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int of_work = 64 * group + thread / 32 * 16 + lane / 4 + 8 * half, row = work.row + of_work;
#pragma unroll
            for (int i = 0; i < kDim / 32; ++i) {
                uint32_t w[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int at = 4 * (4 * i + j) + 2 * half;
                    w[j] = pack(o[at] * inverse[half], o[at + 1] * inverse[half]);
                }
                const uint4 piece = transpose_quad(w[0], w[1], w[2], w[3], lane);
                const int column = work.head * kDim + 32 * i + 8 * (lane % 4);
                if (of_work < work.rows) *reinterpret_cast<uint4*>(a.out + in_activations(row, column, a.rows_max)) = piece;
            }
        }
    }

    // Queues the last tile's output, which nothing follows, and stores.
    __device__ __forceinline__ void finish(const Turn& last, bool more, int index) {
        const uint32_t values_word = values_of(last);
        wait(last, 1);
        fence(o);
        wgmma_begin();
        queue_output(values_word, more);
        wgmma_wait<0>();
        fence(o);
        release(last, 1);
        store(Work::at(a, index));
    }

    // Once every warp has its last scores of a work, the place of its queries is free.
    __device__ __forceinline__ void fetch_next(int round, int total) {
        sync_group(group);
        const int index = index_in(round + 1);
        if (index < total) fetch_queries<kDim>(a, Work::at(a, index), group, queries, thread);
    }

    // All of this block's work. The last tile's output is queued behind the next work's first scores, so that neither
    // filling nor draining leaves the tensor cores idle.
    __device__ __forceinline__ void run(int total) {
        Turn turn, last;
        bool held = false;   // the last tile of the round before still waits for its output
        bool added = false;  // to the output of a tile before
        int round = 0;
        fetch_queries<kDim>(a, Work::at(a, index_in(0)), group, queries, thread);
        for (; index_in(round) < total; ++round) {
            int own_first, token, tiles = 0;
            {
                const Work work = Work::at(a, index_in(round));
                const int own_rows = min(64, work.rows - 64 * group);
                own_first = work.position + 64 * group;
                token = work.tile_begin<S::kTokens>(a.window);
                if (own_rows > 0) tiles = (own_first + own_rows - 1) / S::kTokens + 1 - token;
                token *= S::kTokens;
                tiles = __shfl_sync(0xffffffffu, tiles, 0);
            }
            copies_wait<0>();
            publish_to_engines();
            sync_group(group);
            if (index_in(round + 1) < total) foresee_queries<kDim>(a, Work::at(a, index_in(round + 1)), group, thread);
            // A block of rows that ends before this warpgroup's: what is held must not keep its stage from later pages.
            if (tiles == 0) {
                if (held) finish(last, added, index_in(round - 1));
                held = false;
                fetch_next(round, total);
            }
            bool first = true;
            if (tiles > 0 && !held) {
                const uint32_t keys_word = keys_of(turn);
                wait(turn, 0);
                await_turn();
                fence(s);
                wgmma_begin();
                queue_scores(keys_word);
                pass_turn();
                wgmma_wait<0>();
                fence(s);
                release(turn, 0);
                if (tiles == 1) fetch_next(round, total);
                maximum[0] = maximum[1] = -INFINITY;
                soften(own_first, token);
                sum[0] = sum[1] = 0.0f;
                round_weights();
                first = added = false;
                held = true;
                last = turn;
                turn.next<kStages>();
                token += S::kTokens;
                --tiles;
            }
            for (; tiles > 0; --tiles) {
                const uint32_t keys_word = keys_of(turn), values_word = values_of(last);
                wait(last, 1);
                wait(turn, 0);
                await_turn();
                fence(s), fence(o);
                wgmma_begin();
                queue_scores(keys_word);
                queue_output(values_word, added);
                pass_turn();
                wgmma_wait<1>();
                fence(s);
                release(turn, 0);
                if (tiles == 1) fetch_next(round, total);
                if (first) maximum[0] = maximum[1] = -INFINITY;
                soften(own_first, token);
                wgmma_wait<0>();
                fence(o);
                release(last, 1);
                if (first) {
                    store(Work::at(a, index_in(round - 1)));
                    sum[0] = sum[1] = 0.0f;
                } else {
                    rescale();
                }
                round_weights();
                added = !first;
                first = false;
                last = turn;
                turn.next<kStages>();
                token += S::kTokens;
            }
            // Pages that only later rows of the block see.
            const Work work = Work::at(a, index_in(round));
            int later = work.tile_end<S::kTokens>() - token / S::kTokens;
            later = __shfl_sync(0xffffffffu, later, 0);
            for (; later > 0; --later) {
                wait(turn, 0);
                await_turn();
                pass_turn();
                release(turn, 0);
                wait(turn, 1);
                release(turn, 1);
                turn.next<kStages>();
            }
        }
        if (held) finish(last, added, index_in(round - 1));
    }
};

template <int kDim, int kGroups, int kPages, int kStages, bool kTurns>
__device__ __forceinline__ void prefill(const AttentionArguments& a) {
    using S = Shape<kDim, kGroups, kPages, kStages>;
    extern __shared__ __align__(1024) char dynamic[];
    const uint32_t shared = shared_address(dynamic), barriers = shared + S::kBarriers;
    const int total = a.span_count * a.heads;
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            barrier_init(barriers + 32 * i, 1);
            barrier_init(barriers + 32 * i + 8, 1);
            barrier_init(barriers + 32 * i + 16, 4 * kGroups);
            barrier_init(barriers + 32 * i + 24, 4 * kGroups);
        }
        barriers_are_ready();
    }
    __syncthreads();
    wait_for_predecessor();
    let_successor_start();
    // The same in all lanes of a warp; the shuffle tells the compiler so.
    const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
    if (group == kGroups) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(S::kProducerRegisters));
        if (threadIdx.x % 128 < 32) produce<kDim, kGroups, kPages, kStages>(a, shared, total);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(S::kConsumerRegisters));
        if (index_in(0) >= total) return;
        // The first turn is the first warpgroup's.
        if (kTurns && group == kGroups - 1) asm volatile("bar.arrive 8, 256;" ::: "memory");
        Consumer<kDim, kGroups, kPages, kStages, kTurns> consumer(a, shared, group);
        consumer.run(total);
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(512, 1) attention_hopper_64(const __grid_constant__ AttentionArguments a) {
    prefill<64, 3, 2, 4, false>(a);
}
// 192 rows and one page at a time are 3 % faster at 8,192 tokens, 4 % slower where 2,048 follow a cached prefix.
extern "C" __global__ void __launch_bounds__(384, 1) attention_hopper_128(const __grid_constant__ AttentionArguments a) {
    prefill<128, 2, 2, 3, true>(a);
}

#endif
