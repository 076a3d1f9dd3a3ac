// Which tokens survive min-p, top-k and top-p, and which of them is drawn.

#pragma once

#include "sampling_rank.cuh"

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
        const uint32_t at = s.at;
        const uint64_t entry = s.list[at];
        if (shares) {
            const int tokens_each = b.tiles_each() * kWarps * kTileTokens;
            auto survives = [&](uint32_t place) {
                const Parts own = parts(logit_in(s.list[place]));
                const int rank = token_in(s.list[place]) / tokens_each;
                atomicAdd(&s.listed_high[rank], own.high), atomicAdd(&s.listed_low[rank], own.low);
            };
            if (i < n && i <= at) survives(i);
            if (i + 1 < n && i + 1 <= at) survives(i + 1);
        }
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

    // What a search found, and whether `above` holds the survivors' weights of every block.
    struct Found {
        Cut cut;
        bool counted;
    };

    // The last of the `top_k` most likely, if that many have a share at all, or of those within `within` that reach
    // `top_p` of their shares. Depth below the largest logit is cut into steps, of which 63 have a bin at a time: the first
    // sixteen octaves decide nearly always. Those of the step that decides are then looked at more closely.
    __device__ __forceinline__ Found search(Cut within, bool shares) {
        Shared& s = b.s;
        within = with_a_share(within);
        const float lowest = within.logit, below = next_below(lowest);
        const float steps_per_octave = shares ? 4.0f : 1.5f;
        // A step's number, and where in it, from -1/2 at its likelier end. No more than monotonic.
        constexpr float kShift = 12582912.0f;
        auto shifted_of = [&](float octaves) { return __fmaf_rn(-octaves, steps_per_octave, kShift); };
        auto step_of = [&](float shifted) { return __float_as_int(shifted) - 0x4b400000; };
        auto part_of = [&](float octaves) {
            const float rest = __fmaf_rn(-octaves, steps_per_octave, -__fsub_rn(shifted_of(octaves), kShift));
            return static_cast<int>(__fmul_rn(__fadd_rn(rest, 0.5f), 61.9f));
        };
        auto weight_of = [&](float octaves) {
            const Parts parts = parts_of(power_of(octaves));
            return shares ? parts : Parts{0, octaves > -64.0f};
        };
        const int columns = s.columns;
        uint32_t* column = s.bins + threadIdx.x % columns;
        uint64_t wanted = s.slot.top_k, before = 0, sum = 0;
        int step = 0;
        if (threadIdx.x < kRanksMax) s.above[threadIdx.x] = 0, s.listed_high[threadIdx.x] = 0, s.listed_low[threadIdx.x] = 0;
#pragma unroll 1
        for (int first_step = 0;; first_step += kLastBin) {
            // Nobody has a share down there.
            if (first_step > kOctaves * steps_per_octave) return {within, false};
            clear_bins(b);
            Parts all{0, 0};
            visit_fours<2>(b, lowest, [&](float4 x, uint32_t id) {
                const float larger = larger_survive(within, below, x, id);
                const float logits[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    // What does not survive has neither a share nor a bin.
                    const float octaves_of = logits[i] > larger ? octaves(logits[i]) : -64.0f;
                    const uint32_t bin = step_of(shifted_of(octaves_of)) - first_step;
                    const Parts weight = weight_of(octaves_of);
                    all.high += weight.high, all.low += weight.low;
                    if (bin < kLastBin) add_to_bin(column, columns, bin, weight);
                }
            });
            if (first_step == 0) add_to_bin(column, columns, kLastBin, all);
            const Crossing c = cross(b, [&](uint64_t total) {
                if (first_step == 0 && shares) wanted = wanted_of(total, s.slot.top_p);
                return wanted - before;
            });
            step = first_step + c.bin, sum = c.sum;
            before += c.before;
            if (c.bin < kLastBin) break;
        }
        // At most so many are in it: the least of its shares is 2^(40 - (step + 1/2) / 4).
        auto most = [&](uint64_t sum) { return shares ? sum >> max(39 - step / 4, 0) : sum; };
        const float lower = fmaxf(lowest, reach((step + 1) / steps_per_octave));
        auto in_step = [&](float logit, uint32_t id) { return (step_of(shifted_of(octaves(logit))) == step) & within.keeps(logit, id); };
        const auto visit_step = [&](auto f) {
            visit<4>(b, lower, [&](float logit, uint32_t id) {
                if (in_step(logit, id)) f(logit, id, octaves(logit));
            });
        };
        bool counted = true;
        clear_list(s);
        if (most(sum) <= kListMax) {
            visit_step([&](float logit, uint32_t id, float) { take(s, logit, id); });
        } else {
            // Too many for a list: each block keeps its own, and the row decides between their parts. About so many there are.
            const float expected = shares ? __ull2float_rn(sum) / power_of(-step / steps_per_octave) : __ull2float_rn(sum);
            const bool roomy = expected < 0.9f * kNearMax * b.ranks();
            if (roomy) take_all(b, lower, s.near, &s.near_count, kNearMax, in_step);
            __syncthreads();
            const uint32_t near = min(s.near_count, static_cast<uint32_t>(kNearMax));
            const auto visit_near = [&](auto f) {
#pragma unroll 1
                for (uint32_t i = threadIdx.x; i < near; i += kThreads) f(logit_in(s.near[i]), token_in(s.near[i]), octaves(logit_in(s.near[i])));
            };
            const auto add = [&](float, uint32_t, float octaves_of) { add_to_bin(column, columns, part_of(octaves_of), weight_of(octaves_of)); };
            const auto within_step = [&](uint64_t) { return wanted - before; };
            Crossing c{};
            const auto take_part = [&](float logit, uint32_t id, float octaves_of) {
                if (part_of(octaves_of) == c.bin) take(s, logit, id);
            };
            counted = false;
            clear_bins(b);
            if (roomy) {
                visit_near(add);
                if (threadIdx.x == 0 && s.near_count > kNearMax) add_to_bin(column, columns, kLastBin, Parts{0, 1});
                c = cross(b, within_step);
                counted = c.last == 0;
                if (counted) visit_near(take_part);
                else clear_bins(b);
            }
            // A block has no room for its own: all read the row again.
            if (!counted) {
                visit_step(add);
                c = cross(b, within_step);
                visit_step(take_part);
            }
            before += c.before;
        }
        const uint32_t n = collect(b);
        if (n <= kListMax) return {reached_in_list(n, before, wanted, shares), counted};
        return {reached_by_halving(within, wanted, shares), false};
    }

    // Draws from the survivors, in order of ids. In the block that finds the token, found_valid becomes 1. `counted`: whether
    // every block knows from `above` which one that is.
    __device__ __forceinline__ void draw(Cut cut, uint64_t random, bool counted) {
        Shared& s = b.s;
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        cut = with_a_share(cut);
        const float below = next_below(cut.logit);
        auto parts_if = [&](float logit, float larger) { return parts_of(power_of(logit > larger ? octaves(logit) : -64.0f)); };
        auto point_of = [&](uint64_t total) { return __umul64hi(random, total); };
        uint64_t left = 0;
        if (counted) {
            // Others may still be reading this block's list.
            leave_row();
            const auto survivors_of = [&](int rank) { return s.above[rank] + Parts{s.listed_high[rank], s.listed_low[rank]}.whole(); };
            const int owner = place_of(b.ranks(), survivors_of, point_of, &left);
            if (owner != b.rank()) {
                join_row();
                return;
            }
        }
        int high = 0, low = 0;
        visit_fours<4>(b, cut.logit, [&](float4 x, uint32_t id) {
            const float larger = larger_survive(cut, below, x, id);
            const Parts p0 = parts_if(x.x, larger), p1 = parts_if(x.y, larger), p2 = parts_if(x.z, larger), p3 = parts_if(x.w, larger);
            high += (p0.high + p1.high) + (p2.high + p3.high), low += (p0.low + p1.low) + (p2.low + p3.low);
        });
        const uint64_t own_sum = Parts{high, low}.whole();
        int owner;
        if (counted) {
            const uint64_t sum = sum_of_warp(own_sum);
            if (lane == 0) s.sums[warp] = sum;
            join_row();
            __syncthreads();
            const uint64_t within_block = left;
            owner = b.rank() * kWarps + place_of(kWarps, [&](int at) { return s.sums[at]; }, [&](uint64_t) { return within_block; }, &left);
        } else {
            const uint64_t(*sums)[kBins] = exchange_warp_sums(b, own_sum);
            owner = place_of(b.ranks() * kWarps, [&](int at) { return sums[at / kWarps][at % kWarps]; }, point_of, &left);
            if (owner / kWarps != b.rank()) return;
        }
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
        bool counted = false;
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
                const Found last = search(shares ? cut : keeps_all_numbers(), shares != 0);
                if (cut.keeps(last.cut.logit, last.cut.token)) cut = last.cut;
                counted = shares != 0 && last.counted;
            }
        }
        draw(cut, random_bits(p.seed, s.row.position), counted);
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
