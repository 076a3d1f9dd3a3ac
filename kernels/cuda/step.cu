// What a step does beside products and attention: tokens become the residual stream, pages are copied before they are
// written, and the rows whose logits are wanted are gathered.
//
// Shapes   embedding as weights [vocabulary / 64][panels][64][64] in the order of pairs (layout.rs); residual
//          [rows][residual_stride]; normed, normed_out activations [panels][rows_max][64]; squares [panels][rows_max].
// Moved    embed: 6 bytes per element of the residual stream. gather: 4. copy_pages: a page of every layer, twice.
// Expected 80 % of a copy from a few hundred rows on; one row costs its launch.

#include "attention.cuh"
#include "common.cuh"

struct EmbedArguments {
    const Row* rows;
    int count;
    int rows_max;
    const bf16* embedding;
    int panels;
    int hidden;               // real columns
    const float* embeddings;  // [..][hidden], for rows that bring their own
    const int* last_tokens;   // [slots]
    const bf16* gain;         // of the first norm [hidden]
    bf16* residual;
    int residual_stride;
    bf16* normed;
    float* squares;
};

// Grid: a block per row. Block: 128 threads, each takes 8 columns at a time; eight neighbours share a panel.
extern "C" __global__ void __launch_bounds__(128) embed(const __grid_constant__ EmbedArguments e) {
    wait_for_predecessor();
    let_successor_start();
    const int at = blockIdx.x;
    const Row row = e.rows[at];
    const bool real = row.position >= 0;
    int token = row.token;
    if (real && token == -1) token = e.last_tokens[row.slot];
    // The order of pairs: neighbouring tokens are eight rows apart.
    const int stored = token / 16 * 16 + token % 2 * 8 + token % 16 / 2;
    const bf16* from = e.embedding + static_cast<int64_t>(stored / 64) * e.panels * (64 * 64);
    for (int piece = threadIdx.x; piece < e.panels * 8; piece += 128) {
        const int panel = piece / 8, column = piece * 8;
        uint4 value = make_uint4(0, 0, 0, 0);
        if (real && column < e.hidden) {
            if (token >= 0) {
                value = *reinterpret_cast<const uint4*>(from + panel * (64 * 64) + in_panel(stored % 64, column % 64));
            } else {
                const float* own = e.embeddings + static_cast<int64_t>(-2 - token) * e.hidden + column;
                value = make_uint4(pack(own[0], own[1]), pack(own[2], own[3]), pack(own[4], own[5]), pack(own[6], own[7]));
            }
        }
        uint4 gain = make_uint4(0, 0, 0, 0);
        if (column < e.hidden) gain = *reinterpret_cast<const uint4*>(e.gain + column);
        const uint32_t x[4] = {value.x, value.y, value.z, value.w}, g[4] = {gain.x, gain.y, gain.z, gain.w};
        uint32_t normed[4];
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            squares += low(x[i]) * low(x[i]) + high(x[i]) * high(x[i]);
            normed[i] = pack(low(x[i]) * low(g[i]), high(x[i]) * high(g[i]));
        }
#pragma unroll
        for (int lane = 1; lane < 8; lane *= 2) squares += __shfl_xor_sync(__activemask(), squares, lane);
        *reinterpret_cast<uint4*>(e.residual + static_cast<int64_t>(at) * e.residual_stride + column) = value;
        *reinterpret_cast<uint4*>(e.normed + in_activations(at, column, e.rows_max)) =
            make_uint4(normed[0], normed[1], normed[2], normed[3]);
        if (piece % 8 == 0) e.squares[static_cast<int64_t>(panel) * e.rows_max + at] = squares;
    }
}

struct GatherArguments {
    const int* rows;  // [count]
    int count;
    int panels;
    const bf16* normed;
    const float* squares;
    int rows_max;
    bf16* normed_out;
    float* squares_out;
    int rows_max_out;
};

// Grid: a block per wanted row. Block: 128 threads, one 16-byte piece at a time.
extern "C" __global__ void __launch_bounds__(128) gather(const __grid_constant__ GatherArguments g) {
    wait_for_predecessor();
    let_successor_start();
    const int to = blockIdx.x, from = g.rows[to];
    for (int piece = threadIdx.x; piece < g.panels * 8; piece += 128) {
        const int panel = piece / 8, column = piece * 8;
        *reinterpret_cast<uint4*>(g.normed_out + in_activations(to, column, g.rows_max_out)) =
            *reinterpret_cast<const uint4*>(g.normed + in_activations(from, column, g.rows_max));
        if (piece % 8 == 0) {
            g.squares_out[static_cast<int64_t>(panel) * g.rows_max_out + to] = g.squares[static_cast<int64_t>(panel) * g.rows_max + from];
        }
    }
}

constexpr int kCopies = 64;

struct CopyArguments {
    uint4* pages;           // of all layers
    int64_t layer_stride;   // 16-byte pieces from one layer's pages to the next
    int page_pieces;        // 16-byte pieces of a page of a layer
    int count;
    int2 pairs[kCopies];    // from, to; no page occurs twice
};

constexpr int kCopiedAtOnce = 8;

// Grid: (pairs, layers, runs of 2,048 pieces of a page). Block: 256 threads, whose eight pieces are in flight together.
extern "C" __global__ void __launch_bounds__(256) copy_pages(const __grid_constant__ CopyArguments c) {
    wait_for_predecessor();
    let_successor_start();
    const int2 pair = c.pairs[blockIdx.x];
    uint4* layer = c.pages + blockIdx.y * c.layer_stride;
    const uint4* from = layer + static_cast<int64_t>(pair.x) * c.page_pieces;
    uint4* to = layer + static_cast<int64_t>(pair.y) * c.page_pieces;
    const int first = blockIdx.z * (256 * kCopiedAtOnce) + threadIdx.x;
    uint4 pieces[kCopiedAtOnce];
#pragma unroll
    for (int i = 0; i < kCopiedAtOnce; ++i) {
        if (first + i * 256 < c.page_pieces) pieces[i] = from[first + i * 256];
    }
#pragma unroll
    for (int i = 0; i < kCopiedAtOnce; ++i) {
        if (first + i * 256 < c.page_pieces) to[first + i * 256] = pieces[i];
    }
}
