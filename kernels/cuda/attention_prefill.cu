// Runs of tokens (prefill, chunks of it, and chunks behind a cached prefix), in two steps.
//
// rope_kv_*: norm and RoPE of every row's queries, in place in `qkv`, and of its key; key and value go to their page.
// Grid (row_count), 128 threads for a row; a vector is the work of kDim / 16 lanes. Moves each row of qkv once, its
// queries and keys twice. Expected: 80 % of the card's copy bandwidth from some thousand rows on. The last row of a run
// also sets the values behind it in its page to zeros: weights there are zero, and a recycled page may hold NaN.
//
// attention_prefill_*: causal attention of spans of at most 128 rows over the pages, on any card from sm_80
// (attention_hopper.cu does the same for Hopper). Grid (heads, span_count), 256 threads: a warp takes 16 rows of one
// head, whose queries stay in registers; keys and values of a page come by cp.async into two stages. S and O by
// mma.sync, softmax in registers. Pages come in ascending order and masked ones change nothing, so a row's bits do not
// depend on how its prompt was cut. Bound by matrix products: expected 60 % of mma.sync's peak.
// Shared memory: [2 stages][K|V][kDim / 64][64][64] bf16; the queries pass through the second stage.

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

constexpr int kRows = 128;
constexpr int kThreads = 256;
constexpr int kPanelBytes = kPageTokens * kPanelRowBytes;

// Keys and values of a page, by all threads.
template <int kDim>
__device__ __forceinline__ void fetch_page(const AttentionArguments& a, int page, int kv_head, uint32_t to) {
    constexpr int kPieces = kPageTokens * kDim / 8;  // of 16 bytes
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const bf16* from = head_of_page<kDim>(a, page, half, kv_head);
#pragma unroll
        for (int i = 0; i < kPieces / kThreads; ++i) {
            const int piece = i * kThreads + threadIdx.x;
            copy_16(to + (half * kPieces + piece) * 16, from + piece * 8);
        }
    }
}

template <int kDim>
__device__ __forceinline__ void prefill(const AttentionArguments& a) {
    constexpr int kStageBytes = 2 * kPageTokens * kDim * 2;
    static_assert(kRows * kDim * 2 <= kStageBytes, "the queries pass through one stage");
    extern __shared__ __align__(1024) char dynamic[];
    const uint32_t shared = shared_address(dynamic);
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int head = blockIdx.x, kv_head = head / (a.heads / a.kv_heads);
    wait_for_predecessor();
    let_successor_start();
    const Span span = a.spans[blockIdx.y];
    const int last = span.position + span.rows - 1;
    const int first = a.window > 0 ? max(0, span.position + 1 - a.window) : 0;
    const int page_begin = first / kPageTokens, page_end = last / kPageTokens + 1;
    const int* table = a.tables + static_cast<int64_t>(span.slot) * a.table_stride;

    // Rows past the end repeat the last one; nothing of them is written.
    for (int i = thread; i < kRows * kDim / 8; i += kThreads) {
        const int row = i / (kDim / 8), d = i % (kDim / 8) * 8;
        const int source = span.first + min(row, span.rows - 1);
        copy_16(shared + kStageBytes + d / 64 * (kRows * kPanelRowBytes) + 2 * in_panel(row, d % 64),
                a.qkv + static_cast<int64_t>(source) * a.qkv_stride + head * kDim + d);
    }
    copies_commit();
    fetch_page<kDim>(a, table[page_begin], kv_head, shared);
    copies_commit();
    copies_wait<1>();
    __syncthreads();
    uint32_t query[kDim / 16][4];
    {
        const uint32_t at = shared + kStageBytes + (warp * 16 + lane % 8 + lane / 8 % 2 * 8) * kPanelRowBytes;
        const int piece = (lane / 16) ^ (lane % 8);
#pragma unroll
        for (int step = 0; step < kDim / 16; ++step) {
            load_matrices(query[step], at + step / 4 * (kRows * kPanelRowBytes) + ((piece ^ (step % 4 * 2)) << 4));
        }
    }

    const float scale = a.scale * 1.4426950408889634f;
    const int own_first = span.position + warp * 16;     // the positions of this warp's rows
    const int position = own_first + lane / 4;
    float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
    float o[kDim / 8][4] = {};
    for (int page = page_begin; page < page_end; ++page) {
        const uint32_t stage = shared + (page - page_begin) % 2 * kStageBytes;
        copies_wait<0>();
        __syncthreads();
        if (page + 1 < page_end) {
            fetch_page<kDim>(a, table[page + 1], kv_head, shared + (page + 1 - page_begin) % 2 * kStageBytes);
            copies_commit();
        }
        const int token = page * kPageTokens;
        if (token > own_first + 15) continue;  // only later rows see it
        float s[kPageTokens / 8][4] = {};
        {
            const uint32_t row = stage + (lane % 8 + lane / 16 * 8) * kPanelRowBytes;
            const int piece = (lane / 8 % 2) ^ (lane % 8);
#pragma unroll
            for (int step = 0; step < kDim / 16; ++step) {
#pragma unroll
                for (int tile = 0; tile < kPageTokens / 16; ++tile) {
                    uint32_t k[4];
                    load_matrices(k, row + step / 4 * kPanelBytes + tile * (16 * kPanelRowBytes) + ((piece ^ (step % 4 * 2)) << 4));
                    mma_16x8x16(s[2 * tile], query[step], k[0], k[1]);
                    mma_16x8x16(s[2 * tile + 1], query[step], k[2], k[3]);
                }
            }
        }
        if (token + kPageTokens - 1 > own_first || (a.window > 0 && token <= own_first + 15 - a.window)) {
#pragma unroll
            for (int tile = 0; tile < kPageTokens / 8; ++tile) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int at = token + 8 * tile + 2 * (lane % 4) + i % 2, row = position + i / 2 * 8;
                    if (at > row || (a.window > 0 && at <= row - a.window)) s[tile][i] = -INFINITY;
                }
            }
        }
        float factor[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float top = s[0][2 * half];
#pragma unroll
            for (int tile = 0; tile < kPageTokens / 8; ++tile) top = fmaxf(top, fmaxf(s[tile][2 * half], s[tile][2 * half + 1]));
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
            for (int tile = 0; tile < kPageTokens / 8; ++tile) {
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
        const uint32_t row = stage + kStageBytes / 2 + (lane % 8 + lane / 8 % 2 * 8) * kPanelRowBytes;
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

}  // namespace

extern "C" __global__ void __launch_bounds__(128) rope_kv_64(const __grid_constant__ AttentionArguments a) { rope_kv<64>(a); }
extern "C" __global__ void __launch_bounds__(128) rope_kv_128(const __grid_constant__ AttentionArguments a) { rope_kv<128>(a); }
extern "C" __global__ void __launch_bounds__(kThreads) attention_prefill_64(const __grid_constant__ AttentionArguments a) { prefill<64>(a); }
extern "C" __global__ void __launch_bounds__(kThreads) attention_prefill_128(const __grid_constant__ AttentionArguments a) { prefill<128>(a); }
