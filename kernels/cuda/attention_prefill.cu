// Runs of tokens (prefill, chunks of it, and chunks behind a cached prefix), in two steps.
//
// rope_kv_*: norm and RoPE of every row's queries, in place in `qkv`, and of its key; key and value go to their page.
// Grid (row_count), 128 threads for a row; a vector is the work of kDim / 16 lanes. Moves each row of qkv once, its
// queries and keys twice. Expected: 80 % of the card's copy bandwidth from some thousand rows on. The last row of a run
// also sets the values behind it in its page to zeros: weights there are zero, and a recycled page may hold NaN.
//
// attention_prefill_*: causal attention of spans of at most 128 rows (64 where heads are wider than 128) over the pages,
// on any card from sm_80 (attention_hopper.cu does the same for Hopper and heads of up to 128). Grid (heads, span_count),
// two threads a row: a warp takes 16 rows of one head; keys and values of a page come by cp.async. S and O by mma.sync,
// softmax in registers. Pages come in ascending order and masked ones change nothing, so a row's bits do not depend on
// how its prompt was cut. Bound by matrix products: expected 60 % of mma.sync's peak, of wide heads 40 %.
// Shared memory: [2 stages][K|V][kDim / 64][64][64] bf16, and the queries pass through the second stage into registers;
// of wide heads [K|V][kDim / 64][64][64] and the queries [kDim / 64][64][64], 96 KB, which every card from sm_80 grants.

#include "attention.cuh"

namespace {

template <int kDim>
__device__ __forceinline__ void rope_kv(const AttentionArguments& a) {
    constexpr int kLanes = HeadVector<kDim>::kLanes;
    constexpr int kAtOnce = 128 / kLanes;
    const int part = threadIdx.x % kLanes, of_block = threadIdx.x / kLanes;
    wait_for_predecessor();
    let_successor_start();
    const int index = blockIdx.x, row = a.first_row + index;
    const Row here = a.rows[row];
    if (here.position < 0) return;
    bf16* vectors = const_cast<bf16*>(a.qkv) + static_cast<int64_t>(row) * a.qkv_stride;
    const int page = a.tables[static_cast<int64_t>(here.slot) * a.table_stride + here.position / kPageTokens];
    const int token = here.position % kPageTokens;
    float2 turns[8];
    load_turns<kDim>(turns, a.rope, here.position, part);
    const bool normed = a.query_norm != nullptr || a.key_norm != nullptr;
    const int count = a.heads + 2 * a.kv_heads;
#pragma unroll 2
    for (int base = 0; base < count; base += kAtOnce) {
        const int vector = base + of_block;
        HeadVector<kDim> x;
        x.load(vectors + (vector < count ? vector : 0) * kDim, part);
        const bool is_query = vector < a.heads, is_value = vector >= a.heads + a.kv_heads;
        if (normed) {
            const bf16* norm = is_query ? a.query_norm : a.key_norm;
            HeadVector<kDim> scaled = x, gain;
            gain.load(norm != nullptr ? norm : vectors, part);
            scaled.normalise(gain, static_cast<float>(a.head_width), a.eps);
            if (norm != nullptr && !is_value) x = scaled;
        }
        if (vector >= count) continue;
        if (!is_value) x.rotate(turns);
        bf16* left = vectors + vector * kDim + 8 * part;
        bf16* right = left + kDim / 2;
        if (!is_query) {
            const int kv_head = vector - a.heads - (is_value ? a.kv_heads : 0);
            bf16* head = head_of_page<kDim>(a, page, is_value, kv_head);
            const int second = kDim / 2 + 8 * part;
            left = head + 8 * part / 64 * (kPageTokens * 64) + in_panel(token, 8 * part % 64);
            right = head + second / 64 * (kPageTokens * 64) + in_panel(token, second % 64);
        }
        *reinterpret_cast<uint4*>(left) = x.packed(0);
        *reinterpret_cast<uint4*>(right) = x.packed(1);
    }
    bool last = index + 1 == a.row_count;
    if (!last) {
        const Row next = a.rows[row + 1];
        last = next.slot != here.slot || next.position != here.position + 1;
    }
    if (!last) return;
    const int behind = kPageTokens - 1 - token;
    for (int i = threadIdx.x; i < behind * a.kv_heads * (kDim / 8); i += 128) {
        const int d = i % (kDim / 8) * 8, kv_head = i / (kDim / 8) % a.kv_heads, at = token + 1 + i / (kDim / 8) / a.kv_heads;
        *reinterpret_cast<uint4*>(head_of_page<kDim>(a, page, 1, kv_head) + d / 64 * (kPageTokens * 64) + in_panel(at, d % 64)) =
            make_uint4(0, 0, 0, 0);
    }
}

// How a block cuts its work. Heads of up to 128 leave room for a warp's queries in its registers and for two stages of
// pages in shared memory; of wider ones the queries stay in shared memory, behind a single stage.
template <int kDim>
struct Cut {
    static constexpr bool kQueriesHeld = kDim <= 128;
    static constexpr int kRows = kQueriesHeld ? 128 : 64;
    static constexpr int kThreads = 2 * kRows;
    static constexpr int kHalfBytes = kPageTokens * kDim * 2;  // keys or values of a page
    static constexpr int kStageBytes = 2 * kHalfBytes;
    static_assert(kRows * kDim * 2 <= kStageBytes, "the queries pass through a stage, or lie behind the only one");
};
constexpr int kPanelBytes = kPageTokens * kPanelRowBytes;

// Keys (half 0) or values of a page, by all threads.
template <int kDim>
__device__ __forceinline__ void fetch_half(const AttentionArguments& a, int page, int half, int kv_head, uint32_t to) {
    constexpr int kThreads = Cut<kDim>::kThreads;
    const bf16* from = head_of_page<kDim>(a, page, half, kv_head);
#pragma unroll
    for (int i = 0; i < kPageTokens * kDim / 8 / kThreads; ++i) {
        const int piece = i * kThreads + threadIdx.x;
        copy_16(to + piece * 16, from + piece * 8);
    }
}

// The queries of a span's rows with one head. Rows past the end repeat the last one; nothing of them is written.
template <int kDim>
__device__ __forceinline__ void fetch_queries(const AttentionArguments& a, const Span& span, int head, uint32_t to) {
    constexpr int kRows = Cut<kDim>::kRows;
    for (int i = threadIdx.x; i < kRows * kDim / 8; i += Cut<kDim>::kThreads) {
        const int row = i / (kDim / 8), d = i % (kDim / 8) * 8;
        const int source = span.first + min(row, span.rows - 1);
        copy_16(to + d / 64 * (kRows * kPanelRowBytes) + 2 * in_panel(row, d % 64),
                a.qkv + static_cast<int64_t>(source) * a.qkv_stride + head * kDim + d);
    }
}

// Sixteen rows of a warp with one head: a page's keys become scores, these weights, and those its values' share of O.
template <int kDim>
struct Sixteen {
    static constexpr int kTiles = kPageTokens / 8;

    const int lane, window;
    const float scale;
    const int own_first;  // the position of the first row
    float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
    float o[kDim / 8][4] = {};

    // Where this lane's address for a step's queries begins, and its piece there.
    __device__ __forceinline__ uint32_t query_row(uint32_t queries, int warp) const {
        return queries + (warp * 16 + lane % 8 + lane / 8 % 2 * 8) * kPanelRowBytes;
    }
    __device__ __forceinline__ void load_query(uint32_t (&query)[4], uint32_t row, int step) const {
        const int piece = (lane / 16) ^ (lane % 8);
        load_matrices(query, row + step / 4 * (Cut<kDim>::kRows * kPanelRowBytes) + ((piece ^ (step % 4 * 2)) << 4));
    }

    // S = Q K^T of one step of sixteen dimensions.
    __device__ __forceinline__ void add_scores(float (&s)[kTiles][4], const uint32_t (&query)[4], uint32_t keys, int step) const {
        const uint32_t row = keys + (lane % 8 + lane / 16 * 8) * kPanelRowBytes;
        const int piece = (lane / 8 % 2) ^ (lane % 8);
#pragma unroll
        for (int tile = 0; tile < kPageTokens / 16; ++tile) {
            uint32_t k[4];
            load_matrices(k, row + step / 4 * kPanelBytes + tile * (16 * kPanelRowBytes) + ((piece ^ (step % 4 * 2)) << 4));
            mma_16x8x16(s[2 * tile], query, k[0], k[1]);
            mma_16x8x16(s[2 * tile + 1], query, k[2], k[3]);
        }
    }

    // Scores of the page whose first token is `token` become weights.
    __device__ __forceinline__ void soften(float (&s)[kTiles][4], int token) {
        if (token + kPageTokens - 1 > own_first || (window > 0 && token <= own_first + 15 - window)) {
            const int position = own_first + lane / 4;
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int at = token + 8 * tile + 2 * (lane % 4) + i % 2, row = position + i / 2 * 8;
                    if (at > row || (window > 0 && at <= row - window)) s[tile][i] = -INFINITY;
                }
            }
        }
        float factor[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float top = s[0][2 * half];
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) top = fmaxf(top, fmaxf(s[tile][2 * half], s[tile][2 * half + 1]));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2)) * scale;
            factor[half] = 1.0f;
            if (top > maximum[half]) {
                factor[half] = exp2_fast(maximum[half] - top);
                maximum[half] = top;
            }
            const float from = maximum[half] == -INFINITY ? 0.0f : -maximum[half];
            float total = 0.0f;
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& x = s[tile][2 * half + i];
                    x = exp2_fast(fmaf(x, scale, from));
                    total += x;
                }
            }
            sum[half] = sum[half] * factor[half] + total;
        }
        // A factor of 1 changes nothing, so that skipping it leaves a row's bits independent of its neighbours.
        if (__any_sync(0xffffffffu, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
            for (int i = 0; i < kDim / 8; ++i) {
                o[i][0] *= factor[0], o[i][1] *= factor[0];
                o[i][2] *= factor[1], o[i][3] *= factor[1];
            }
        }
    }

    // O += P V.
    __device__ __forceinline__ void add_values(const float (&s)[kTiles][4], uint32_t values) {
        const uint32_t row = values + (lane % 8 + lane / 8 % 2 * 8) * kPanelRowBytes;
        const int piece = (lane / 16) ^ (lane % 8);
#pragma unroll
        for (int tile = 0; tile < kPageTokens / 16; ++tile) {
            const uint32_t p[4] = {pack(s[2 * tile][0], s[2 * tile][1]), pack(s[2 * tile][2], s[2 * tile][3]),
                                   pack(s[2 * tile + 1][0], s[2 * tile + 1][1]), pack(s[2 * tile + 1][2], s[2 * tile + 1][3])};
#pragma unroll
            for (int step = 0; step < kDim / 16; ++step) {
                uint32_t v[4];
                load_matrices_transposed(v, row + step / 4 * kPanelBytes + tile * (16 * kPanelRowBytes) + ((piece ^ (step % 4 * 2)) << 4));
                mma_16x8x16(o[2 * step], p, v[0], v[1]);
                mma_16x8x16(o[2 * step + 1], p, v[2], v[3]);
            }
        }
    }

    __device__ __forceinline__ void store(const AttentionArguments& a, const Span& span, int head, int warp) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float all = sum[half] + __shfl_xor_sync(0xffffffffu, sum[half], 1);
            all += __shfl_xor_sync(0xffffffffu, all, 2);
            const float inverse = 1.0f / all;
            const int of_span = warp * 16 + lane / 4 + 8 * half;
            if (of_span >= span.rows) continue;
#pragma unroll
            for (int i = 0; i < kDim / 8; ++i) {
                const int column = head * kDim + 8 * i + 2 * (lane % 4);
                *reinterpret_cast<uint32_t*>(a.out + in_activations(span.first + of_span, column, a.rows_max)) =
                    pack(o[i][2 * half] * inverse, o[i][2 * half + 1] * inverse);
            }
        }
    }
};

// A block's share: a span's rows with one head, and the pages that they see.
struct Share {
    Span span;
    int head, kv_head;
    int page_begin, page_end;
    const int* table;

    __device__ __forceinline__ explicit Share(const AttentionArguments& a)
        : span(a.spans[blockIdx.y]), head(blockIdx.x), kv_head(head / (a.heads / a.kv_heads)) {
        const int last = span.position + span.rows - 1;
        const int first = a.window > 0 ? max(0, span.position + 1 - a.window) : 0;
        page_begin = first / kPageTokens, page_end = last / kPageTokens + 1;
        table = a.tables + static_cast<int64_t>(span.slot) * a.table_stride;
    }
};

// Two stages: a page's keys and values arrive while the page before is at work.
template <int kDim>
__device__ __forceinline__ void prefill(const AttentionArguments& a) {
    using C = Cut<kDim>;
    extern __shared__ __align__(1024) char dynamic[];
    const uint32_t shared = shared_address(dynamic);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    wait_for_predecessor();
    let_successor_start();
    const Share share(a);
    const auto fetch_page = [&](int page, uint32_t to) {
        for (int half = 0; half < 2; ++half) fetch_half<kDim>(a, share.table[page], half, share.kv_head, to + half * C::kHalfBytes);
        copies_commit();
    };
    Sixteen<kDim> rows{lane, a.window, a.scale * 1.4426950408889634f, share.span.position + warp * 16};
    fetch_queries<kDim>(a, share.span, share.head, shared + C::kStageBytes);
    copies_commit();
    fetch_page(share.page_begin, shared);
    copies_wait<1>();
    __syncthreads();
    uint32_t query[kDim / 16][4];
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) rows.load_query(query[step], rows.query_row(shared + C::kStageBytes, warp), step);
    for (int page = share.page_begin; page < share.page_end; ++page) {
        const uint32_t stage = shared + (page - share.page_begin) % 2 * C::kStageBytes;
        copies_wait<0>();
        __syncthreads();
        if (page + 1 < share.page_end) fetch_page(page + 1, shared + (page + 1 - share.page_begin) % 2 * C::kStageBytes);
        const int token = page * kPageTokens;
        if (token > rows.own_first + 15) continue;  // only later rows see it
        float s[Sixteen<kDim>::kTiles][4] = {};
#pragma unroll
        for (int step = 0; step < kDim / 16; ++step) rows.add_scores(s, query[step], stage, step);
        rows.soften(s, token);
        rows.add_values(s, stage + C::kHalfBytes);
    }
    rows.store(a, share.span, share.head, warp);
}

// One stage: the next page's keys arrive while this one's values are at work, and the other way round.
template <int kDim>
__device__ __forceinline__ void prefill_wide(const AttentionArguments& a) {
    using C = Cut<kDim>;
    extern __shared__ __align__(1024) char dynamic[];
    const uint32_t keys = shared_address(dynamic), values = keys + C::kHalfBytes, queries = keys + C::kStageBytes;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    wait_for_predecessor();
    let_successor_start();
    const Share share(a);
    // A group of copies is committed even where there is no such page: waits count them.
    const auto fetch = [&](int page, int half) {
        if (page < share.page_end) fetch_half<kDim>(a, share.table[page], half, share.kv_head, half == 0 ? keys : values);
        copies_commit();
    };
    Sixteen<kDim> rows{lane, a.window, a.scale * 1.4426950408889634f, share.span.position + warp * 16};
    fetch_queries<kDim>(a, share.span, share.head, queries);
    fetch(share.page_begin, 0);
    fetch(share.page_begin, 1);
    for (int page = share.page_begin; page < share.page_end; ++page) {
        const int token = page * kPageTokens;
        const bool seen = token <= rows.own_first + 15;
        float s[Sixteen<kDim>::kTiles][4] = {};
        copies_wait<1>();
        __syncthreads();
        if (seen) {
#pragma unroll
            for (int step = 0; step < kDim / 16; ++step) {
                uint32_t query[4];
                rows.load_query(query, rows.query_row(queries, warp), step);
                rows.add_scores(s, query, keys, step);
            }
        }
        __syncthreads();
        fetch(page + 1, 0);
        if (seen) rows.soften(s, token);
        copies_wait<1>();
        __syncthreads();
        if (seen) rows.add_values(s, values);
        __syncthreads();
        fetch(page + 1, 1);
    }
    rows.store(a, share.span, share.head, warp);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(128) rope_kv_64(const __grid_constant__ AttentionArguments a) { rope_kv<64>(a); }
extern "C" __global__ void __launch_bounds__(128) rope_kv_128(const __grid_constant__ AttentionArguments a) { rope_kv<128>(a); }
extern "C" __global__ void __launch_bounds__(128) rope_kv_256(const __grid_constant__ AttentionArguments a) { rope_kv<256>(a); }
extern "C" __global__ void __launch_bounds__(256) attention_prefill_64(const __grid_constant__ AttentionArguments a) { prefill<64>(a); }
extern "C" __global__ void __launch_bounds__(256) attention_prefill_128(const __grid_constant__ AttentionArguments a) { prefill<128>(a); }
extern "C" __global__ void __launch_bounds__(128) attention_prefill_256(const __grid_constant__ AttentionArguments a) { prefill_wide<256>(a); }
