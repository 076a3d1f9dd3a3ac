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
//   top-p             one pass for the sums of shares by half octaves; then the tiles of the half octave in which the sum is
//                     reached, ranked exactly; then the tiles of the survivors
//   penalties, bias   one pass more, which reads, changes and writes the row
// Expected: bound by the arithmetic of shares, 24 instructions per token: 3.5 us for 32 rows of 128,256 on 132 processors.

#include "common.cuh"

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kTileTokens = 64;
constexpr int kTilesMax = 4096;
constexpr int kRanksMax = 8;
constexpr int kBins = 64;
// Half octaves of shares, or octaves where tokens are counted, that have a bin; the last is for all the rest.
constexpr int kLastBin = kBins - 1;
constexpr int kCoarseBins = kThreads;
constexpr int kListMax = 2 * kThreads;
// Survivors up to which the draw happens within the ranked list.
constexpr int kDrawnFromList = 128;
constexpr int kTopMax = 20;
constexpr int kBiasesMax = 1024;
constexpr float kLog2E = 1.44269502f;
// What a share less than 2^-41 of the largest rounds to is nothing; one octave more is on the safe side.
constexpr float kOctaves = 42.0f;

struct SlotParameters {
    float scale;        // log2(e) / temperature, at most the largest number; 0: the most likely token
    float floor;        // temperature * ln(min_p), which the largest logit is added to; -inf: off
    float top_p;        // 1: off
    uint32_t top_k;     // 0: off
    float repetition;
    float presence;
    float frequency;
    int penalised;      // whether any penalty is on, and so `seen` is kept
    int biases;         // entries of the slot's list
    int alternatives;   // most likely tokens to report; -1: no log-probabilities at all
    uint64_t seed;
};

struct Bias {
    uint32_t token;  // ascending; equals in the order in which they are added
    float bias;
};

struct SampleRow {
    int slot;
    int position;  // of the token that is drawn; negative: padding
};

struct PromptRow {
    int row;           // of the logits; negative: padding
    int token;         // the one that follows it
    int alternatives;
    int unused;
};

struct Top {
    uint32_t token;
    float logprob;
};

// The second sixteen bytes are one store, which the host sees whole.
struct SampleResult {
    float logprob;   // with alternatives >= 0 alone, as rank, tops and top
    uint32_t rank;   // 1: the most likely
    uint32_t tops;
    uint32_t unused;
    uint32_t token;
    uint32_t failed; // 1: no finite logits
    uint32_t unused_too;
    uint32_t epoch;  // written last
    Top top[kTopMax];
};

struct SampleArguments {
    const float* logits;    // null: every row is greedy, without penalties, bias and log-probabilities
    float* scratch;         // [rows][stride], of rows with penalties or bias
    const float2* best;
    int stride;             // a multiple of 4, at least `vocabulary` rounded up to that
    int tiles;
    int vocabulary;
    int seen_stride;        // a multiple of 4
    const SampleRow* rows;
    const PromptRow* prompts;
    const SlotParameters* parameters;
    uint16_t* seen;         // bit 15: occurs in the prompt; the others: times generated
    const Bias* biases;     // [slots][1024]
    int* last_tokens;
    SampleResult* results;  // [ring][results_max], pinned host memory
    const uint32_t* epoch;  // of this step; results go to place epoch % ring
    int ring;
    int results_max;
};

struct SeenArguments {
    uint16_t* seen;
    const int* tokens;
    int64_t seen_stride;
    int slot;
    int count;
    int prompt_tokens;
    int vocabulary;
};

// The last token that survives: everything that ranks before it survives too.
struct Cut {
    float logit;
    uint32_t token;
    __device__ bool keeps(float other, uint32_t id) const { return other > logit || (other == logit && id <= token); }
};

__device__ __forceinline__ float next_below(float x) {
    const int bits = __float_as_int(x);
    return x > 0.0f ? __int_as_float(bits - 1) : x < 0.0f ? __int_as_float(bits + 1) : -1.401298464e-45f;
}

// The same for four neighbours with one comparison each: they survive if they are larger than what this returns. Where the
// cut parts four equals, those behind it become the smallest.
__device__ __forceinline__ float larger_survive(const Cut& cut, float below, float4& x, uint32_t id) {
    if (cut.token - id < 3) {
        if (x.y == cut.logit && cut.token < id + 1) x.y = -INFINITY;
        if (x.z == cut.logit && cut.token < id + 2) x.z = -INFINITY;
        if (x.w == cut.logit) x.w = -INFINITY;
        return below;
    }
    return id <= cut.token ? below : cut.logit;
}

__device__ __forceinline__ Cut keeps_all_numbers() { return {-3.402823466e38f, 0xffffffffu}; }

// Ascending integers for ascending logits; both zeros are one.
__device__ __forceinline__ uint32_t key_of(float logit) {
    const uint32_t bits = __float_as_uint(logit + 0.0f);
    return bits ^ (static_cast<uint32_t>(static_cast<int>(bits) >> 31) | 0x80000000u);
}
__device__ __forceinline__ float logit_of(uint32_t key) {
    return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}
// Descending by logit, then ascending by id, is descending in this.
__device__ __forceinline__ uint64_t ranked(float logit, uint32_t id) {
    return static_cast<uint64_t>(key_of(logit)) << 32 | static_cast<uint32_t>(~id);
}
__device__ __forceinline__ float logit_in(uint64_t entry) { return logit_of(static_cast<uint32_t>(entry >> 32)); }
__device__ __forceinline__ uint32_t token_in(uint64_t entry) { return ~static_cast<uint32_t>(entry); }

// 2^(40 + y) for y from -64 to 0, as reference/sampling.rs computes it: no fused multiply-add, every step rounded to nearest.
__device__ __forceinline__ float power_of(float y) {
    // 1.5 * 2^23 + 40: the sum's low bits are the rounded y + 40.
    constexpr float kShift = 12582952.0f;
    const float shifted = __fadd_rn(y, kShift);
    const float f = __fsub_rn(y, __fsub_rn(shifted, kShift));
    float p = 0.0013381302f;
    p = __fadd_rn(__fmul_rn(p, f), 0.0096663684f);
    p = __fadd_rn(__fmul_rn(p, f), 0.055503812f);
    p = __fadd_rn(__fmul_rn(p, f), 0.2402235f);
    p = __fadd_rn(__fmul_rn(p, f), 0.6931472f);
    p = __fadd_rn(__fmul_rn(p, f), 1.0f);
    return __uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23));
}

// A power rounded to an integer, as two words that are added up apart: share = high * 2^20 + low, low from -2^19 to 2^19.
struct Parts {
    int high;
    int low;
    __device__ uint64_t whole() const { return (static_cast<uint64_t>(static_cast<uint32_t>(high)) << 20) + static_cast<int64_t>(low); }
};
__device__ __forceinline__ Parts parts_of(float value) {
    constexpr float kHigh = 13194139533312.0f;  // 1.5 * 2^43: the last place is 2^20
    constexpr float kLow = 12582912.0f;         // 1.5 * 2^23
    const float high = __fadd_rn(value, kHigh);
    const float low = __fadd_rn(__fsub_rn(value, __fsub_rn(high, kHigh)), kLow);
    return {__float_as_int(high) - 0x55400000, __float_as_int(low) - 0x4b400000};
}
__device__ __forceinline__ uint64_t random_bits(uint64_t seed, uint32_t position) {
    const uint4 words = philox(position, seed);
    return static_cast<uint64_t>(words.y) << 32 | words.x;
}

struct Shared {
    // Written by other blocks of the row.
    uint64_t exchange[2][kRanksMax][kBins];
    uint64_t arrived[2];  // barriers that count the bytes of an exchange
    float maxima[kTilesMax];
    uint32_t found;       // the drawn token
    uint32_t found_valid;
    // Read by them.
    uint32_t own_count;
    uint64_t own[kListMax];
    // This block's alone.
    uint32_t at;
    uint64_t wanted;
    uint64_t sums[kWarps];
    uint32_t words[kWarps];
    SlotParameters slot;
    SampleRow row;
    float raw_max;
    uint32_t epoch;
    int columns;          // of the bins
    int2 tiles[kWarps];   // each warp's first and what follows its last
    union {
        uint64_t list[kListMax];
        uint16_t first_bias[kTilesMax];  // of a tile in its slot's list
    };
    union {
        uint32_t coarse[kCoarseBins];
        uint64_t pairs[kTilesMax / kWarps / 2];
        struct {
            uint64_t share[kDrawnFromList];
            uint32_t token[kDrawnFromList];
        } drawn;
    };
    // [low|high][kBins][columns]; columns so many that no cell counts more than 3,072 tokens, and so none overflows.
    uint32_t bins[];
};
static_assert(sizeof(Shared) <= 44 * 1024, "ops/sampling.rs asks for so much, and bins");
static_assert(sizeof(uint64_t[kListMax]) >= sizeof(uint16_t[kTilesMax]), "a list's place holds the first biases");

// What a block knows of its row.
struct Block {
    const SampleArguments& a;
    Shared& s;
    const float* logits;
    uint32_t phase;  // exchanges so far

    __device__ int rank() const { return blockIdx.x; }
    __device__ int ranks() const { return gridDim.x; }
    __device__ int tiles_each() const { return (a.tiles + ranks() * kWarps - 1) / (ranks() * kWarps); }
};

// --- the row's blocks together -----------------------------------------------------------------------------------------

// Before another block's shared memory is touched, that block runs and its barriers are ready: begin_row early, join_row
// before the first such access. sync_row makes visible what all threads of the row wrote, to shared and global memory.
__device__ __forceinline__ void begin_row(Shared& s) {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) {
        barrier_init(shared_address(&s.arrived[0]), 1);
        barrier_init(shared_address(&s.arrived[1]), 1);
        barriers_are_ready();
    }
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void join_row() {
#if __CUDA_ARCH__ >= 900
    cluster_wait();
#endif
}
__device__ __forceinline__ void sync_row() {
#if __CUDA_ARCH__ >= 900
    cluster_arrive();
    cluster_wait();
#else
    __syncthreads();
#endif
}

template <typename T>
__device__ __forceinline__ T* in_block(T* here, int rank) {
#if __CUDA_ARCH__ >= 900
    T* there;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(here), "r"(rank));
    return there;
#else
    return here;
#endif
}

// An exchange: every block tells every block `words` words by tell, and all threads call complete. Two in turn have places
// of their own: who is told the next but one has read this one.
__device__ __forceinline__ void tell(Block& b, int rank, int place, uint64_t word) {
#if __CUDA_ARCH__ >= 900
    // A launch without clusters has no such stores.
    if (b.ranks() > 1) {
        const uint32_t to = shared_of(shared_address(&b.s.exchange[b.phase % 2][b.rank()][place]), rank);
        const uint32_t barrier = shared_of(shared_address(&b.s.arrived[b.phase % 2]), rank);
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(to), "l"(word), "r"(barrier)
                     : "memory");
        return;
    }
#endif
    b.s.exchange[b.phase % 2][0][place] = word;
}
__device__ __forceinline__ const uint64_t (*complete(Block& b, int words))[kBins] {
    const uint32_t place = b.phase % 2;
#if __CUDA_ARCH__ >= 900
    if (b.ranks() > 1) {
        const uint32_t barrier = shared_address(&b.s.arrived[place]);
        if (threadIdx.x == 0) barrier_expect(barrier, words * b.ranks() * 8);
        barrier_wait(barrier, b.phase / 2 % 2);
    } else {
        __syncthreads();
    }
#else
    __syncthreads();
#endif
    ++b.phase;
    return b.s.exchange[place];
}

__device__ __forceinline__ uint64_t sum_of_warp(uint64_t value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}
__device__ __forceinline__ uint64_t running_sum_of_warp(uint64_t value) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const uint64_t before = __shfl_up_sync(0xffffffffu, value, distance);
        if (threadIdx.x % 32 >= distance) value += before;
    }
    return value;
}

// The sum of all values up to and with this thread's.
__device__ __forceinline__ uint64_t running_sum_of_block(Shared& s, uint64_t value) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint64_t sum = running_sum_of_warp(value);
    if (lane == 31) s.sums[warp] = sum;
    __syncthreads();
    const uint64_t before = sum_of_warp(lane < warp ? s.sums[lane] : 0);
    __syncthreads();
    return sum + before;
}

// The largest pair of words, by the first; of equal first ones the largest second.
__device__ __forceinline__ uint64_t max_of_warp(uint64_t value) {
    const uint32_t high = static_cast<uint32_t>(value >> 32);
    const uint32_t highest = __reduce_max_sync(0xffffffffu, high);
    const uint32_t lowest = __reduce_max_sync(0xffffffffu, high == highest ? static_cast<uint32_t>(value) : 0);
    return static_cast<uint64_t>(highest) << 32 | lowest;
}
__device__ __forceinline__ uint64_t max_of_block(Shared& s, uint64_t value) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    value = max_of_warp(value);
    if (lane == 0) s.sums[warp] = value;
    __syncthreads();
    value = max_of_warp(s.sums[lane % kWarps]);
    __syncthreads();
    return value;
}
__device__ __forceinline__ uint32_t min_of_block(Shared& s, uint32_t value) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    value = __reduce_min_sync(0xffffffffu, value);
    if (lane == 0) s.words[warp] = value;
    __syncthreads();
    value = __reduce_min_sync(0xffffffffu, s.words[lane % kWarps]);
    __syncthreads();
    return value;
}

// Every block learns every warp's sum.
__device__ __forceinline__ const uint64_t (*exchange_warp_sums(Block& b, uint64_t of_thread))[kBins] {
    const uint64_t sum = sum_of_warp(of_thread);
    const int lane = threadIdx.x % 32;
    if (lane < b.ranks()) tell(b, lane, threadIdx.x / 32, sum);
    return complete(b, kWarps);
}
__device__ __forceinline__ uint64_t sum_of_row(Block& b, uint64_t of_thread) {
    const uint64_t(*sums)[kBins] = exchange_warp_sums(b, of_thread);
    uint64_t sum = 0;
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < b.ranks() * kWarps; i += 32) sum += sums[i / kWarps][i % kWarps];
    return sum_of_warp(sum);
}

// Of up to 128 values in order, the one in which a point lies that their sum decides, and how far in it. By a warp.
template <typename Value, typename Point>
__device__ __forceinline__ int place_of(int count, Value value, Point point_of, uint64_t* within) {
    const int lane = threadIdx.x % 32;
    uint64_t mine[4];
    uint64_t own = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        mine[i] = 4 * lane + i < count ? value(4 * lane + i) : 0;
        own += mine[i];
    }
    const uint64_t sum = running_sum_of_warp(own);
    const uint64_t point = point_of(__shfl_sync(0xffffffffu, sum, 31));
    const int found = __ffs(__ballot_sync(0xffffffffu, sum > point)) - 1;
    uint64_t left = point - (sum - own);
    int at = 4 * lane;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        if (at == 4 * lane + i && left >= mine[i]) left -= mine[i], ++at;
    }
    *within = __shfl_sync(0xffffffffu, left, found);
    return __shfl_sync(0xffffffffu, at, found);
}

// --- reading -----------------------------------------------------------------------------------------------------------

// Four logits. Nothing waits for them yet, so that several can be on their way.
__device__ __forceinline__ float4 load_logits(const float* logits, bool on) {
    float4 x = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
    asm volatile("{\n.reg .pred on;\nsetp.ne.b32 on, %5, 0;\n@on ld.global.v4.f32 {%0, %1, %2, %3}, [%4];\n}\n"
                 : "+f"(x.x), "+f"(x.y), "+f"(x.z), "+f"(x.w)
                 : "l"(logits), "r"(static_cast<int>(on)));
    return x;
}
// Those beyond the vocabulary become the smallest.
__device__ __forceinline__ void cut_off(float4& x, int id, int vocabulary) {
    if (id + 4 > vocabulary) {
        if (id + 1 >= vocabulary) x.y = -INFINITY;
        if (id + 2 >= vocabulary) x.z = -INFINITY;
        x.w = -INFINITY;
    }
}

// Calls f(four logits, the first's id) for the tokens of this warp's tiles whose largest logit is at least `reach`, and so
// for every token of at least `reach`, with others among them. Half a warp reads a tile.
template <int kAtOnce, typename F>
__device__ __forceinline__ void visit_fours(const Block& b, float reach, F f) {
    const int lane = threadIdx.x % 32;
    const int2 tiles = b.s.tiles[threadIdx.x / 32];
#pragma unroll 1
    for (int pair = tiles.x; pair < tiles.y; pair += 2 * kAtOnce) {
        float4 x[kAtOnce];
        bool on[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int tile = pair + 2 * i + lane / 16;
            const int id = tile * kTileTokens + lane % 16 * 4;
            on[i] = (tile < tiles.y) & (b.s.maxima[min(tile, tiles.y - 1)] >= reach) & (id < b.a.vocabulary);
            x[i] = load_logits(b.logits + id, on[i]);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int id = (pair + 2 * i + lane / 16) * kTileTokens + lane % 16 * 4;
            if (!on[i]) continue;
            cut_off(x[i], id, b.a.vocabulary);
            f(x[i], id);
        }
    }
}
// The same, one by one.
template <int kAtOnce, typename F>
__device__ __forceinline__ void visit(const Block& b, float reach, F f) {
    visit_fours<kAtOnce>(b, reach, [&](float4 x, uint32_t id) { f(x.x, id), f(x.y, id + 1), f(x.z, id + 2), f(x.w, id + 3); });
}

// The largest logit of every tile, raw, as the head left them, into shared memory; the largest of all, ranked. Their loads
// begin early and wait for nothing else.
struct Maxima {
    static constexpr int kEarly = 4;
    float2 of_tiles[kEarly];

    __device__ __forceinline__ void begin(const float2* best, int tiles) {
#pragma unroll
        for (int i = 0; i < kEarly; ++i) {
            const int tile = threadIdx.x + i * kThreads;
            of_tiles[i] = tile < tiles ? best[tile] : make_float2(-INFINITY, 0.0f);
        }
    }
    __device__ __forceinline__ uint64_t finish(Shared& s, const float2* best, int tiles) {
        uint64_t largest = 0;
        auto take = [&](int tile, float2 of_tile) {
            // Not a number becomes the smallest.
            const float logit = fmaxf(of_tile.x, -INFINITY);
            s.maxima[tile] = logit;
            if (logit > -INFINITY) largest = max(largest, ranked(logit, __float_as_uint(of_tile.y)));
        };
#pragma unroll
        for (int i = 0; i < kEarly; ++i) {
            const int tile = threadIdx.x + i * kThreads;
            if (tile < tiles) take(tile, of_tiles[i]);
        }
#pragma unroll 1
        for (int tile = threadIdx.x + kEarly * kThreads; tile < tiles; tile += kThreads) take(tile, best[tile]);
        return max_of_block(s, largest);
    }
};

__device__ __forceinline__ float penalise(const SlotParameters& slot, float logit, uint32_t seen) {
    if (seen == 0) return logit;
    logit = logit > 0.0f ? __fdiv_rn(logit, slot.repetition) : __fmul_rn(logit, slot.repetition);
    const uint32_t generated = seen & 0x7fffu;
    if (generated > 0) {
        logit = __fsub_rn(logit, __fadd_rn(slot.presence, __fmul_rn(slot.frequency, static_cast<float>(generated))));
    }
    return logit;
}

// Writes the row as penalties and bias leave it, and reads it from there from now on, with the largest of each tile; the
// largest of all, ranked. The row's blocks have joined.
__device__ __forceinline__ uint64_t adjust_row(Block& b) {
    Shared& s = b.s;
    const uint16_t* seen = s.slot.penalised != 0 ? b.a.seen + static_cast<int64_t>(s.row.slot) * b.a.seen_stride : nullptr;
    const Bias* biases = b.a.biases + static_cast<int64_t>(s.row.slot) * kBiasesMax;
    const int bias_count = s.slot.biases;
    if (bias_count > 0) {
#pragma unroll 1
        for (int tile = threadIdx.x; tile < b.a.tiles; tile += kThreads) s.first_bias[tile] = 0xffff;
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < bias_count; i += kThreads) {
            const uint32_t tile = biases[i].token / kTileTokens;
            if (i == 0 || biases[i - 1].token / kTileTokens != tile) s.first_bias[tile] = static_cast<uint16_t>(i);
        }
    }
    // Nobody reads the raw maxima any more.
    sync_row();
    float* scratch = b.a.scratch + static_cast<int64_t>(blockIdx.y) * b.a.stride;
    const int lane = threadIdx.x % 32;
    const int2 tiles = s.tiles[threadIdx.x / 32];
#pragma unroll 2
    for (int pair = tiles.x; pair < tiles.y; pair += 2) {
        const int tile = pair + lane / 16;
        const int id = tile * kTileTokens + lane % 16 * 4;
        float largest = -INFINITY;
        const bool on = tile < tiles.y && id < b.a.vocabulary;
        float4 x = load_logits(b.logits + id, on);
        uint2 counts = make_uint2(0, 0);
        if (on && seen != nullptr) counts = *reinterpret_cast<const uint2*>(seen + id);
        if (on) {
            cut_off(x, id, b.a.vocabulary);
            if ((counts.x | counts.y) != 0) {
                x.x = penalise(s.slot, x.x, counts.x & 0xffffu);
                x.y = penalise(s.slot, x.y, counts.x >> 16);
                x.z = penalise(s.slot, x.z, counts.y & 0xffffu);
                x.w = penalise(s.slot, x.w, counts.y >> 16);
            }
            if (bias_count > 0) {
#pragma unroll 1
                for (int i = s.first_bias[tile]; i < bias_count; ++i) {
                    const Bias bias = biases[i];
                    const int at = static_cast<int>(bias.token) - id;
                    if (at >= 4) break;
                    if (at == 0) x.x = __fadd_rn(x.x, bias.bias);
                    if (at == 1) x.y = __fadd_rn(x.y, bias.bias);
                    if (at == 2) x.z = __fadd_rn(x.z, bias.bias);
                    if (at == 3) x.w = __fadd_rn(x.w, bias.bias);
                }
            }
            *reinterpret_cast<float4*>(scratch + id) = x;
            largest = fmaxf(fmaxf(fmaxf(x.x, -INFINITY), x.y), fmaxf(fmaxf(x.z, -INFINITY), x.w));
        }
#pragma unroll
        for (int distance = 8; distance > 0; distance /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
        if (tile < tiles.y && lane % 16 < b.ranks()) *in_block(&s.maxima[tile], lane % 16) = largest;
    }
    sync_row();
    b.logits = scratch;
    uint64_t best = 0;
#pragma unroll 1
    for (int tile = threadIdx.x; tile < b.a.tiles; tile += kThreads) {
        const float logit = s.maxima[tile];
        if (logit > -INFINITY) best = max(best, ranked(logit, tile));
    }
    best = max_of_block(s, best);
    if (best == 0) return 0;
    // The lowest id in the first of the tiles that hold it.
    const int id = token_in(best) * kTileTokens + threadIdx.x * 4;
    const float max = logit_in(best);
    uint64_t found = 0;
    if (threadIdx.x < 16 && id < b.a.vocabulary) {
        float4 x = load_logits(b.logits + id, true);
        cut_off(x, id, b.a.vocabulary);
        if (x.w == max) found = ranked(max, id + 3);
        if (x.z == max) found = ranked(max, id + 2);
        if (x.y == max) found = ranked(max, id + 1);
        if (x.x == max) found = ranked(max, id);
    }
    return max_of_block(s, found);
}

// --- ranking -----------------------------------------------------------------------------------------------------------

// A logit that at least `count` tokens reach, and as few more as the largest of each tile tell; -inf if there are not so
// many tiles.
__device__ __forceinline__ float reached_by(Block& b, float max, uint32_t count) {
    Shared& s = b.s;
    uint32_t least = 0xffffffffu;
#pragma unroll 1
    for (int tile = threadIdx.x; tile < b.a.tiles; tile += kThreads) {
        if (s.maxima[tile] > -INFINITY) least = min(least, key_of(s.maxima[tile]));
    }
    s.coarse[threadIdx.x] = 0;
    if (threadIdx.x == 0) s.at = kCoarseBins;
    const float scale = (kCoarseBins - 1) / (max - logit_of(min_of_block(s, least)));
    auto bin = [&](float logit) { return static_cast<int>(fminf((max - logit) * scale, kCoarseBins - 1)); };
#pragma unroll 1
    for (int tile = threadIdx.x; tile < b.a.tiles; tile += kThreads) {
        if (s.maxima[tile] > -INFINITY) atomicAdd(&s.coarse[bin(s.maxima[tile])], 1u);
    }
    __syncthreads();
    const uint32_t own = s.coarse[threadIdx.x];
    const uint64_t sum = running_sum_of_block(s, own);
    if (sum >= count && sum - own < count) s.at = threadIdx.x;
    __syncthreads();
    const int last = s.at;
    if (last == kCoarseBins) return -INFINITY;
    // The smallest of the counted ones.
    uint32_t reach = 0xffffffffu;
#pragma unroll 1
    for (int tile = threadIdx.x; tile < b.a.tiles; tile += kThreads) {
        const float logit = s.maxima[tile];
        if (logit > -INFINITY && bin(logit) <= last) reach = min(reach, key_of(logit));
    }
    return logit_of(min_of_block(s, reach));
}

__device__ __forceinline__ void clear_list(Shared& s) {
    if (threadIdx.x == 0) s.own_count = 0;
    __syncthreads();
}
__device__ __forceinline__ void take(Shared& s, float logit, uint32_t id) {
    const uint32_t place = atomicAdd(&s.own_count, 1u);
    if (place < kListMax) s.own[place] = ranked(logit, id);
}

// Collects what all blocks took into every block's list, in order of rank. More than kListMax: that number, and no list.
// Blocks then read each other's memory until the next exchange.
__device__ __forceinline__ uint32_t collect(Block& b) {
    Shared& s = b.s;
    sync_row();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t of_lane = lane < b.ranks() ? *in_block(&s.own_count, lane) : 0;
    uint32_t upto = of_lane;
#pragma unroll
    for (int distance = 1; distance < kRanksMax; distance *= 2) {
        const uint32_t before = __shfl_up_sync(0xffffffffu, upto, distance);
        if (lane >= distance) upto += before;
    }
    const uint32_t n = __shfl_sync(0xffffffffu, upto, kRanksMax - 1);
    if (n > kListMax) return n;
    {
        // Warps share the blocks.
        const int from = warp % b.ranks();
        const uint32_t count = __shfl_sync(0xffffffffu, of_lane, from);
        const uint32_t before = __shfl_sync(0xffffffffu, upto, from) - count;
        const uint64_t* entries = in_block(s.own, from);
        const int sharing = (kWarps - from + b.ranks() - 1) / b.ranks();
#pragma unroll 1
        for (uint32_t i = warp / b.ranks() * 32 + lane; i < count; i += sharing * 32) s.list[before + i] = entries[i];
    }
    __syncthreads();
    if (n <= 256) {
        // Each entry's place is the number of larger ones; two threads count for one entry.
        const uint32_t i = threadIdx.x / 2;
        const uint64_t own = i < n ? s.list[i] : 0;
        uint32_t place = 0;
        if (i < n) {
#pragma unroll 4
            for (uint32_t j = threadIdx.x % 2; j < n; j += 2) place += s.list[j] > own;
        }
        place += __shfl_xor_sync(0xffffffffu, place, 1);
        __syncthreads();
        if (i < n && threadIdx.x % 2 == 0) s.list[place] = own;
        __syncthreads();
        return n;
    }
    const uint32_t padded = n <= kListMax / 2 ? kListMax / 2 : kListMax;
#pragma unroll 1
    for (uint32_t i = n + threadIdx.x; i < padded; i += kThreads) s.list[i] = 0;
    __syncthreads();
#pragma unroll 1
    for (uint32_t size = 2; size <= padded; size *= 2) {
#pragma unroll 1
        for (uint32_t distance = size / 2; distance > 0; distance /= 2) {
            const uint32_t i = 2 * threadIdx.x - (threadIdx.x & (distance - 1));
            if (i + distance < padded) {
                const uint64_t a = s.list[i], c = s.list[i + distance];
                if ((a < c) == ((i & size) == 0)) s.list[i] = c, s.list[i + distance] = a;
            }
            __syncthreads();
        }
    }
    return n;
}

// Bins hold sums of parts, of which every lane has its own column: no two lanes of a warp meet. `column` is this thread's.
__device__ __forceinline__ void add_to_bin(uint32_t* column, int columns, int bin, Parts parts) {
    uint32_t* cell = column + bin * columns;
    atomicAdd(cell, static_cast<uint32_t>(parts.low));
    if (parts.high != 0) atomicAdd(cell + kBins * columns, static_cast<uint32_t>(parts.high));
}
__device__ __forceinline__ void clear_bins(Block& b) {
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * kBins * b.s.columns; i += kThreads) b.s.bins[i] = 0;
    __syncthreads();
}

// The row's sums of the bins, and the first at which the running sum reaches what is wanted; in every thread.
struct Crossing {
    uint64_t before;
    uint64_t sum;
    int bin;  // kBins: never
};
template <typename Wanted>
__device__ __forceinline__ Crossing cross(Block& b, Wanted wanted) {
    static_assert(kThreads == 8 * kBins && kRanksMax == 8, "eight threads add up a bin, and each may tell one block");
    __syncthreads();
    {
        const int bin = threadIdx.x / 8, part = threadIdx.x % 8;
        const int columns = b.s.columns;
        uint64_t sum = 0;
#pragma unroll 4
        for (int i = part; i < columns; i += 8) {
            const uint32_t* cell = b.s.bins + bin * columns + i;
            sum += Parts{static_cast<int>(cell[kBins * columns]), static_cast<int>(cell[0])}.whole();
        }
#pragma unroll
        for (int distance = 4; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
        if (part < b.ranks()) tell(b, part, bin, sum);
    }
    const uint64_t(*sums)[kBins] = complete(b, kBins);
    const int lane = threadIdx.x % 32;
    uint64_t first = 0, second = 0;
#pragma unroll 1
    for (int rank = 0; rank < b.ranks(); ++rank) first += sums[rank][2 * lane], second += sums[rank][2 * lane + 1];
    const uint64_t sum = running_sum_of_warp(first + second);
    const uint64_t target = wanted(__shfl_sync(0xffffffffu, sum, 31));
    const uint32_t reached = __ballot_sync(0xffffffffu, sum >= target);
    if (reached == 0) return {__shfl_sync(0xffffffffu, sum, 31), 0, kBins};
    const int at = __ffs(reached) - 1;
    const uint64_t before = sum - first - second;
    const bool in_first = before + first >= target;
    Crossing c;
    c.bin = __shfl_sync(0xffffffffu, 2 * lane + (in_first ? 0 : 1), at);
    c.before = __shfl_sync(0xffffffffu, in_first ? before : before + first, at);
    c.sum = __shfl_sync(0xffffffffu, in_first ? first : second, at);
    return c;
}

// --- what is drawn from --------------------------------------------------------------------------------------------------

// `top_p` of the survivors' shares; at least one, which the first of them has.
__device__ __forceinline__ uint64_t wanted_of(uint64_t total, float top_p) {
    return max(__double2ull_rz(__dmul_rn(static_cast<double>(top_p), __ull2double_rn(total))), 1ull);
}

struct Row {
    Block& b;
    float peak;  // the largest logit
    float scale;

    __device__ __forceinline__ float octaves(float logit) const { return __fmul_rn(__fsub_rn(logit, peak), scale); }
    __device__ __forceinline__ Parts parts(float logit) const { return parts_of(power_of(fmaxf(octaves(logit), -64.0f))); }
    __device__ __forceinline__ uint64_t share(float logit) const { return parts(logit).whole(); }
    // Whatever is `octaves` below the largest or nearer reaches it.
    __device__ __forceinline__ float reach(float octaves) const { return peak - octaves / scale; }

    // A cut that drops no token with a share, and keeps none that is deeper than -64 octaves.
    __device__ __forceinline__ Cut with_a_share(Cut cut) const {
        const float least = reach(kOctaves);
        return cut.logit >= least ? cut : Cut{least, 0xffffffffu};
    }

    // The first of the list at which the running sum of weights, from `base` on, reaches what is wanted.
    __device__ __forceinline__ Cut reached_in_list(uint32_t n, uint64_t base, uint64_t wanted, bool shares) {
        Shared& s = b.s;
        const uint32_t i = 2 * threadIdx.x;
        const uint64_t first = i < n ? (shares ? share(logit_in(s.list[i])) : 1) : 0;
        const uint64_t second = i + 1 < n ? (shares ? share(logit_in(s.list[i + 1])) : 1) : 0;
        if (threadIdx.x == 0) s.at = n - 1;
        const uint64_t sum = base + running_sum_of_block(s, first + second);
        const uint64_t before = sum - first - second;
        if (before < wanted && wanted <= sum) s.at = before + first >= wanted ? i : i + 1;
        __syncthreads();
        const uint64_t entry = s.list[s.at];
        __syncthreads();
        return {logit_in(entry), token_in(entry)};
    }

    // The same over the whole row by halving, for rows of so many equals that no list holds them.
    __device__ __forceinline__ Cut reached_by_halving(Cut within, uint64_t wanted, bool shares) {
        uint32_t key = 0, token = 0;
        uint64_t before = 0;
        // 32 bits of the key, then what is before it, then 19 bits of the id: of the equals of that key, those below it.
#pragma unroll 1
        for (int step = 0; step < 52; ++step) {
            const bool ids = step > 32;
            const uint32_t higher = step < 32 ? key | 1u << (31 - step) : ids ? token | 1u << (51 - step) : key + 1;
            uint64_t sum = 0;
            visit<1>(b, within.logit, [&](float logit, uint32_t id) {
                const uint32_t own = key_of(logit);
                const bool counts = ids ? own == key && id < higher : own >= higher;
                if (counts && within.keeps(logit, id)) sum += shares ? share(logit) : 1;
            });
            sum = sum_of_row(b, sum);
            if (step < 32) {
                if (sum >= wanted) key = higher;
            } else if (!ids) {
                before = sum;
            } else if (before + sum < wanted) {
                token = higher;
            }
        }
        // There are not so many: all of them.
        if (key == 0) return within;
        return {logit_of(key), token};
    }

    // The last of the `top_k` most likely, if that many have a share at all, or of those within `within` that reach
    // `top_p` of their shares. Depth below the largest logit is cut into steps, of which 63 have a bin at a time: the first
    // twenty octaves decide nearly always, and what lies beyond is added up in registers.
    __device__ __forceinline__ Cut search(Cut within, bool shares) {
        Shared& s = b.s;
        within = with_a_share(within);
        const float lowest = within.logit, below = next_below(lowest);
        const float steps_per_octave = shares ? 3.0f : 1.5f;
        // A step's number, and where in it, from -1/2 at its likelier end.
        auto step_of = [&](float octaves, float* rest) {
            constexpr float kShift = 12582912.0f;
            const float depth = __fmul_rn(-octaves, steps_per_octave);
            const float rounded = __fadd_rn(depth, kShift);
            *rest = __fsub_rn(depth, __fsub_rn(rounded, kShift));
            return __float_as_int(rounded) - 0x4b400000;
        };
        auto part_of = [](float rest) { return static_cast<int>(__fmul_rn(__fadd_rn(rest, 0.5f), 62.0f)); };
        auto weight_of = [&](float octaves) {
            const Parts parts = parts_of(power_of(octaves));
            return shares ? parts : Parts{0, octaves > -64.0f};
        };
        const int columns = s.columns;
        uint32_t* column = s.bins + threadIdx.x % columns;
        uint64_t wanted = s.slot.top_k, before = 0, sum = 0;
        int step = 0;
#pragma unroll 1
        for (int first_step = 0;; first_step += kLastBin) {
            // Nobody has a share down there.
            if (first_step > kOctaves * steps_per_octave) return within;
            clear_bins(b);
            Parts far{0, 0};
            visit_fours<2>(b, lowest, [&](float4 x, uint32_t id) {
                const float larger = larger_survive(within, below, x, id);
                const float logits[4] = {x.x, x.y, x.z, x.w};
                uint32_t bins[4];
                Parts weights[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    // What does not survive has neither a share nor a bin.
                    const float octaves_of = logits[i] > larger ? octaves(logits[i]) : -64.0f;
                    float rest;
                    bins[i] = step_of(octaves_of, &rest) - first_step;
                    weights[i] = weight_of(octaves_of);
                    far.high += bins[i] < kLastBin ? 0 : weights[i].high, far.low += bins[i] < kLastBin ? 0 : weights[i].low;
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (bins[i] < kLastBin) add_to_bin(column, columns, bins[i], weights[i]);
                }
            });
            if (first_step == 0) add_to_bin(column, columns, kLastBin, far);
            const Crossing c = cross(b, [&](uint64_t total) {
                if (first_step == 0 && shares) wanted = wanted_of(total, s.slot.top_p);
                return wanted - before;
            });
            step = first_step + c.bin, sum = c.sum;
            before += c.before;
            if (c.bin < kLastBin) break;
        }
        // At most so many are in it: the least of its shares is 2^(40 - (step + 1/2) / 3).
        auto most = [&](uint64_t sum) { return shares ? sum >> max(39 - step / 3, 0) : sum; };
        const float lower = fmaxf(lowest, reach((step + 1) / steps_per_octave));
        int part = -1;
        if (most(sum) > kListMax) {
            clear_bins(b);
            visit<4>(b, lower, [&](float logit, uint32_t id) {
                float rest;
                const float octaves_of = octaves(logit);
                if (step_of(octaves_of, &rest) == step && within.keeps(logit, id)) {
                    add_to_bin(column, columns, part_of(rest), weight_of(octaves_of));
                }
            });
            const Crossing c = cross(b, [&](uint64_t) { return wanted - before; });
            before += c.before, sum = c.sum, part = c.bin;
        }
        if (most(sum) <= 2 * kListMax) {
            clear_list(s);
            visit<4>(b, lower, [&](float logit, uint32_t id) {
                float rest;
                if (step_of(octaves(logit), &rest) == step && (part < 0 || part_of(rest) == part) && within.keeps(logit, id)) {
                    take(s, logit, id);
                }
            });
            const uint32_t n = collect(b);
            if (n <= kListMax) return reached_in_list(n, before, wanted, shares);
        }
        return reached_by_halving(within, wanted, shares);
    }

    // Draws from the survivors, in order of ids. In the block that finds the token, found_valid becomes 1.
    __device__ __forceinline__ void draw(Cut cut, uint64_t random) {
        Shared& s = b.s;
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        cut = with_a_share(cut);
        const float below = next_below(cut.logit);
        auto parts_if = [&](float logit, float larger) { return parts_of(power_of(logit > larger ? octaves(logit) : -64.0f)); };
        uint64_t left;
        int owner;
        {
            int high = 0, low = 0;
            visit_fours<4>(b, cut.logit, [&](float4 x, uint32_t id) {
                const float larger = larger_survive(cut, below, x, id);
                const Parts p0 = parts_if(x.x, larger), p1 = parts_if(x.y, larger), p2 = parts_if(x.z, larger), p3 = parts_if(x.w, larger);
                high += (p0.high + p1.high) + (p2.high + p3.high), low += (p0.low + p1.low) + (p2.low + p3.low);
            });
            const uint64_t(*sums)[kBins] = exchange_warp_sums(b, Parts{high, low}.whole());
            owner = place_of(
                b.ranks() * kWarps, [&](int at) { return sums[at / kWarps][at % kWarps]; },
                [&](uint64_t total) { return __umul64hi(random, total); }, &left);
        }
        if (owner / kWarps != b.rank()) return;
        // The block's warps share the pairs of tiles of the one that owns the point.
        const int first = owner * b.tiles_each(), end = min(first + b.tiles_each(), b.a.tiles);
        const int pairs = (end - first + 1) / 2;
        uint64_t shares[4];
        int id = 0;
        auto load = [&](int pair) {
            const int tile = first + 2 * pair + lane / 16;
            id = tile * kTileTokens + lane % 16 * 4;
            shares[0] = shares[1] = shares[2] = shares[3] = 0;
            if (tile < end && s.maxima[tile] >= cut.logit && id < b.a.vocabulary) {
                float4 x = load_logits(b.logits + id, true);
                cut_off(x, id, b.a.vocabulary);
                const float larger = larger_survive(cut, below, x, id);
                shares[0] = parts_if(x.x, larger).whole(), shares[1] = parts_if(x.y, larger).whole();
                shares[2] = parts_if(x.z, larger).whole(), shares[3] = parts_if(x.w, larger).whole();
            }
            return (shares[0] + shares[1]) + (shares[2] + shares[3]);
        };
        uint64_t own = 0;
#pragma unroll 1
        for (int pair = warp; pair < pairs; pair += kWarps) {
            own = load(pair);
            const uint64_t sum = sum_of_warp(own);
            if (lane == 0) s.pairs[pair] = sum;
        }
        __syncthreads();
        const int pair = place_of(
            pairs, [&](int at) { return s.pairs[at]; }, [&](uint64_t) { return left; }, &left);
        if (pair % kWarps != warp) return;
        if (pair + kWarps < pairs) own = load(pair);
        const uint64_t upto = running_sum_of_warp(own);
        if (lane == __ffs(__ballot_sync(0xffffffffu, upto > left)) - 1) {
            uint64_t rest = left - (upto - own);
            int offset = 0;
#pragma unroll
            for (int i = 0; i < 3; ++i) {
                if (offset == i && rest >= shares[i]) rest -= shares[i], ++offset;
            }
            s.found = id + offset, s.found_valid = 1;
        }
    }

    // Draws from the first `n` of the ranked list, in every block.
    __device__ __forceinline__ void draw_from_list(uint32_t n, uint64_t total, uint64_t random) {
        Shared& s = b.s;
        const uint32_t i = threadIdx.x;
        __syncthreads();
        if (i < n) s.drawn.share[i] = share(logit_in(s.list[i])), s.drawn.token[i] = token_in(s.list[i]);
        __syncthreads();
        if (i < n) {
            const uint64_t point = __umul64hi(random, total);
            const uint32_t token = s.drawn.token[i];
            uint64_t before = 0;
#pragma unroll 4
            for (uint32_t j = 0; j < n; ++j) {
                if (s.drawn.token[j] < token) before += s.drawn.share[j];
            }
            if (before <= point && point < before + s.drawn.share[i]) s.found = token, s.found_valid = 1;
        }
    }

    // Cuts and draws. True: every block knows the token, otherwise one does.
    __device__ __forceinline__ bool sample() {
        Shared& s = b.s;
        const SlotParameters& p = s.slot;
        Cut cut = keeps_all_numbers();
        // peak + floor, and not below the least number.
        if (p.floor > -INFINITY) cut.logit = fmaxf(cut.logit, __fadd_rn(peak, p.floor));
        const bool counts = p.top_k > 0 && p.top_k < static_cast<uint32_t>(b.a.vocabulary);
        uint32_t n = kListMax + 1;
        if (counts && p.top_k <= kListMax) {
            const float reach = reached_by(b, peak, p.top_k);
            if (reach > -INFINITY) {
                clear_list(s);
                visit<1>(b, reach, [&](float logit, uint32_t id) {
                    if (logit >= reach) take(s, logit, id);
                });
                n = collect(b);
            }
        }
        if (n <= kListMax) {
            uint64_t total;
            n = survivors_in_list(cut, &total);
            if (n <= kDrawnFromList) {
                draw_from_list(n, total, random_bits(p.seed, s.row.position));
                return true;
            }
            cut = {logit_in(s.list[n - 1]), token_in(s.list[n - 1])};
        } else {
            // First by count, then by shares: one piece of code for both.
#pragma unroll 1
            for (int shares = 0; shares < 2; ++shares) {
                if (shares == 0 ? !counts : !(p.top_p < 1.0f)) continue;
                const Cut last = search(shares ? cut : keeps_all_numbers(), shares != 0);
                if (cut.keeps(last.logit, last.token)) cut = last;
            }
        }
        draw(cut, random_bits(p.seed, s.row.position));
        return false;
    }

    // How many of the ranked list, which begins with the `top_k` most likely, survive all cuts, and their shares' sum.
    __device__ __forceinline__ uint32_t survivors_in_list(Cut cut, uint64_t* sum_of_shares) {
        Shared& s = b.s;
        const SlotParameters& p = s.slot;
        const uint32_t i = 2 * threadIdx.x;
        auto survives = [&](uint32_t at) { return at < p.top_k && cut.keeps(logit_in(s.list[at]), token_in(s.list[at])); };
        const bool first = survives(i), second = survives(i + 1);
        const uint64_t first_share = first ? share(logit_in(s.list[i])) : 0, second_share = second ? share(logit_in(s.list[i + 1])) : 0;
        const uint64_t sum = running_sum_of_block(s, first_share + second_share);
        uint32_t n = __syncthreads_count(first) + __syncthreads_count(second);
        if (i == ((n - 1) & ~1u)) s.wanted = sum;
        __syncthreads();
        uint64_t total = s.wanted;
        if (p.top_p < 1.0f) {
            const uint64_t wanted = wanted_of(total, p.top_p);
            const uint64_t before = sum - first_share - second_share;
            __syncthreads();
            if (before < wanted && wanted <= sum) {
                const bool in_first = before + first_share >= wanted;
                s.at = in_first ? i : i + 1, s.wanted = in_first ? before + first_share : sum;
            }
            __syncthreads();
            n = s.at + 1, total = s.wanted;
        }
        *sum_of_shares = total;
        return n;
    }
};

// --- what is reported ----------------------------------------------------------------------------------------------------

// Log-probability and rank of a token and the most likely ones, by the raw logits, whose maxima are in shared memory. Block
// 0 of the row writes them.
__device__ __forceinline__ void report(Block& b, float max, uint32_t token, int alternatives, SampleResult* result) {
    Shared& s = b.s;
    Row row{b, max, kLog2E};
    const uint32_t top = min(min(alternatives, kTopMax), b.a.vocabulary);
    float reach = INFINITY;
    if (top > 0) reach = reached_by(b, max, top);
    const bool listed = reach > -INFINITY;
    clear_list(s);
    const float own = b.logits[token];
    uint64_t sum;
    uint32_t before = 0;
    {
        Parts parts{0, 0};
        visit<2>(b, fmaxf(fminf(fminf(own, reach), row.reach(kOctaves)), -3.402823466e38f), [&](float logit, uint32_t id) {
            const Parts of_token = row.parts(logit);
            parts.high += of_token.high, parts.low += of_token.low;
            before += logit > own || (logit == own && id < token);
            if (listed && logit >= reach) take(s, logit, id);
        });
        sum = sum_of_row(b, parts.whole());
    }
    before = static_cast<uint32_t>(sum_of_row(b, before));
    uint32_t listed_count = 0;
    if (top > 0) {
        listed_count = listed ? collect(b) : kListMax + 1;
        if (listed_count > kListMax) {
            // Many equals, or fewer tiles than tokens to report.
            const Cut cut = row.reached_by_halving(keeps_all_numbers(), top, false);
            clear_list(s);
            visit<1>(b, cut.logit, [&](float logit, uint32_t id) {
                if (cut.keeps(logit, id)) take(s, logit, id);
            });
            listed_count = collect(b);
        }
    }
    if (b.rank() != 0 || threadIdx.x >= 32) return;
    const double shift = static_cast<double>(max) + log(static_cast<double>(sum) * 0x1p-40);
    const uint32_t tops = min(listed_count, top);
    if (threadIdx.x < tops) {
        const uint64_t entry = s.list[threadIdx.x];
        result->top[threadIdx.x] = {token_in(entry), static_cast<float>(static_cast<double>(logit_in(entry)) - shift)};
    }
    if (threadIdx.x == 0) {
        result->logprob = static_cast<float>(static_cast<double>(own) - shift);
        result->rank = before + 1;
        result->tops = tops;
    }
    // The token and the epoch follow all this.
    __threadfence_system();
    __syncwarp();
}

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
    if (threadIdx.x == 0) s.row = row, s.found_valid = 0, s.epoch = *a.epoch, s.columns = gridDim.x >= 3 ? 32 : gridDim.x == 2 ? 64 : 96;
    Block b = block_of(a, s, blockIdx.y);
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
