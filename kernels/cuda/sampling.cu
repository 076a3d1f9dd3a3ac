// From rows of logits to tokens: `sample_greedy`, `sample`, `prompt_logprobs` and, where a sequence begins, `seen_start`.
//
// logits [rows][stride] f32, of which `vocabulary` are real; best [rows][tiles] each 64 tokens' largest logit, as the head
// leaves them; seen [slots][seen_stride] u16. Token for token the meaning of reference/sampling.rs: shares of probability
// are rounded to integers by the same arithmetic there and here, and sums of integers do not depend on their order.
//
// `ranks` blocks share a row (a cluster from sm_90, one block before), each a run of its tiles. The logits never change: a
// pass reads the tiles whose largest logit can matter, out of the L2 where the head left them. Rows with penalties or bias
// are written as those leave them into `scratch`, and read from there.
//   greedy            best alone: 16 KB of a row of 128,256
//   temperature       one pass over the row, 513 KB: shares, then the draw within one warp's run
//   top-k             best, and the tiles that reach the k-th largest of them
//   top-p             one pass for the sums of shares by quarter octaves; one more for the tokens of the quarter octave in
//                     which the sum is reached: each block keeps its own, and the row decides among them; then, in the one
//                     block in whose share the draw's point lies, the tiles of the survivors
//   penalties, bias   one pass more, which reads, changes and writes the row
// Bound by the arithmetic of shares (35 instructions per token where they are added up, 54 where they go to bins, 33 where
// tokens are only looked at) and, of few rows, by what the row's blocks tell each other: 1.5 us each time.

#include "sampling_adjust.cuh"
#include "sampling_draw.cuh"
#include "sampling_report.cuh"

__device__ __forceinline__ SampleResult* result_of(const SampleArguments& a, uint32_t epoch, int row) {
    return a.results + static_cast<int64_t>(epoch % a.ring) * a.results_max + row;
}

// One store of sixteen bytes: the host sees the epoch with what it stands for.
__device__ __forceinline__ void publish(SampleResult* result, uint32_t token, bool failed, uint32_t epoch) {
    static_assert(sizeof(SampleResult) % 16 == 0, "results keep their halves aligned");
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(&result->token), "r"(token), "r"(static_cast<uint32_t>(failed)), "r"(0),
                 "r"(epoch)
                 : "memory");
}

// Before a barrier of the block.
__device__ __forceinline__ Block block_of(const SampleArguments& a, Shared& s, int row) {
    Block b{a, s, a.logits + static_cast<int64_t>(row) * a.stride, 0};
    if (threadIdx.x < kWarps) {
        const int first = min((b.rank() * kWarps + static_cast<int>(threadIdx.x)) * b.tiles_each(), a.tiles);
        s.tiles[threadIdx.x] = make_int2(first, min(first + b.tiles_each(), a.tiles));
    }
    return b;
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) sample(const __grid_constant__ SampleArguments a) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared& s = *reinterpret_cast<Shared*>(memory);
    begin_row(s);
    wait_for_predecessor();
    let_successor_start();
    const float2* of_tiles = a.best + static_cast<int64_t>(blockIdx.y) * a.tiles;
    Maxima maxima;
    maxima.begin(of_tiles, a.tiles);
    const SampleRow row = a.rows[blockIdx.y];
    if (row.position < 0) {
        join_row();
        return;
    }
    if (threadIdx.x < 12) reinterpret_cast<uint32_t*>(&s.slot)[threadIdx.x] = reinterpret_cast<const uint32_t*>(a.parameters + row.slot)[threadIdx.x];
    if (threadIdx.x == 0) s.row = row, s.found_valid = 0, s.epoch = *a.epoch;
    Block b = block_of(a, s, blockIdx.y);
    if (threadIdx.x == 0) s.columns = columns_of(b.tiles_each());
    uint64_t best = maxima.finish(s, of_tiles, a.tiles);
    const SlotParameters& p = s.slot;
    const bool adjusted = p.penalised != 0 || p.biases > 0;
    const bool reports = p.alternatives >= 0;
    const bool draws = p.scale != 0.0f;
    // The model's own distribution is reported, and one without a finite maximum has none.
    bool failed = best == 0 || (reports && logit_in(best) == INFINITY);
    if (threadIdx.x == 0) s.raw_max = logit_in(best);
    join_row();
    if (!draws && !adjusted && !reports && b.rank() != 0) return;
    if (adjusted) {
        best = adjust_row(b);
        failed = failed || best == 0;
    }
    bool everywhere = true;
    if (threadIdx.x == 0) s.found = token_in(best);
    if (!failed && draws && logit_in(best) < INFINITY) {
        Row drawn{b, logit_in(best), p.scale};
        everywhere = drawn.sample();
    }
    __syncthreads();
    if (reports && !failed) {
        if (!everywhere) {
            if (s.found_valid != 0 && threadIdx.x < b.ranks() && threadIdx.x != b.rank()) *in_block(&s.found, threadIdx.x) = s.found;
            everywhere = true;
        }
        sync_row();
        if (b.logits != a.logits + static_cast<int64_t>(blockIdx.y) * a.stride) {
            const float2* of_tiles_again = a.best + static_cast<int64_t>(blockIdx.y) * a.tiles;
            maxima.begin(of_tiles_again, a.tiles);
            maxima.finish(s, of_tiles_again, a.tiles);
            b.logits = a.logits + static_cast<int64_t>(blockIdx.y) * a.stride;
        }
        report(b, s.raw_max, s.found, p.alternatives, result_of(a, s.epoch, blockIdx.y));
    }
    if (threadIdx.x == 0 && (everywhere ? b.rank() == 0 : s.found_valid != 0)) {
        const uint32_t token = s.found;
        publish(result_of(a, s.epoch, blockIdx.y), token, failed, s.epoch);
        a.last_tokens[s.row.slot] = failed ? 0 : static_cast<int>(token);
        if (!failed && p.penalised != 0) {
            uint16_t* seen = a.seen + static_cast<int64_t>(s.row.slot) * a.seen_stride + token;
            const uint16_t old = *seen;
            if ((old & 0x7fffu) != 0x7fffu) *seen = old + 1;
        }
    }
    // After a list or a report others may still be reading this block's memory.
    if (everywhere && (draws || reports)) sync_row();
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) prompt_logprobs(const __grid_constant__ SampleArguments a) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared& s = *reinterpret_cast<Shared*>(memory);
    begin_row(s);
    wait_for_predecessor();
    let_successor_start();
    const PromptRow row = a.prompts[blockIdx.y];
    if (row.row < 0) {
        join_row();
        return;
    }
    const uint32_t epoch = *a.epoch;
    SampleResult* result = result_of(a, epoch, blockIdx.y);
    const float2* of_tiles = a.best + static_cast<int64_t>(row.row) * a.tiles;
    Maxima maxima;
    maxima.begin(of_tiles, a.tiles);
    Block b = block_of(a, s, row.row);
    const uint64_t best = maxima.finish(s, of_tiles, a.tiles);
    const bool failed = best == 0 || logit_in(best) == INFINITY;
    join_row();
    if (!failed) report(b, logit_in(best), row.token, row.alternatives, result);
    if (b.rank() == 0 && threadIdx.x == 0) publish(result, row.token, failed, epoch);
    sync_row();
}

// One block to a row, which reads its tiles' largest logits and nothing else.
extern "C" __global__ void __launch_bounds__(256) sample_greedy(const __grid_constant__ SampleArguments a) {
    __shared__ uint64_t of_warps[8];
    wait_for_predecessor();
    let_successor_start();
    const float2* best = a.best + static_cast<int64_t>(blockIdx.x) * a.tiles;
    uint64_t largest = 0;
    auto take = [&](float2 of_tile) {
        if (of_tile.x > -INFINITY) largest = max(largest, ranked(of_tile.x, __float_as_uint(of_tile.y)));
    };
    // All of 2,048 tiles at once.
    float2 early[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int tile = threadIdx.x + i * 256;
        if (tile < a.tiles) early[i] = best[tile];
    }
    const SampleRow row = a.rows[blockIdx.x];
    if (row.position < 0) return;
    const uint32_t epoch = *a.epoch;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (static_cast<int>(threadIdx.x) + i * 256 < a.tiles) take(early[i]);
    }
#pragma unroll 4
    for (int tile = threadIdx.x + 2048; tile < a.tiles; tile += 256) take(best[tile]);
    largest = max_of_warp(largest);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = largest;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    largest = max_of_warp(of_warps[threadIdx.x % 8]);
    if (threadIdx.x != 0) return;
    const bool failed = largest == 0;
    publish(result_of(a, epoch, blockIdx.x), token_in(largest), failed, epoch);
    a.last_tokens[row.slot] = failed ? 0 : static_cast<int>(token_in(largest));
}

// What a slot has seen when its sequence begins: the prompt, and what was generated before a preemption. A block counts a run
// of the vocabulary and reads all tokens.
constexpr int kCounted = 4096;
extern "C" __global__ void __launch_bounds__(kThreads) seen_start(const __grid_constant__ SeenArguments a) {
    __shared__ uint32_t counts[kCounted];
    wait_for_predecessor();
    let_successor_start();
    const int first = blockIdx.x * kCounted;
    for (int i = threadIdx.x; i < kCounted; i += kThreads) counts[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < a.count; i += kThreads) {
        const int at = a.tokens[i] - first;
        if (at < 0 || at >= kCounted) continue;
        if (i < a.prompt_tokens) {
            atomicOr(&counts[at], 0x80000000u);
        } else {
            atomicAdd(&counts[at], 1u);
        }
    }
    __syncthreads();
    uint16_t* seen = a.seen + a.slot * a.seen_stride + first;
    for (int i = threadIdx.x; i < kCounted && first + i < a.seen_stride; i += kThreads) {
        const uint32_t count = counts[i];
        seen[i] = static_cast<uint16_t>((count >> 31) << 15 | min(count & 0x7fffffffu, 0x7fffu));
    }
}
