// What every kernel shares: the panel layout, copies into shared memory, barriers, matrix fragments, early launch.
//
// Panel layout. A matrix [rows, K] in bf16 is cut into panels of 64 columns. A panel row is 128 bytes, and its eight
// 16-byte pieces are swizzled: piece c of row r lies at piece c ^ (r % 8), so that neither a column of pieces nor a
// row of them meets a shared-memory bank twice, and wgmma reads it as it is. Panels begin on 1,024 bytes.
//   activations  [K / 64][rows_max][64]      any run of rows, from a multiple of eight, is one contiguous copy per panel
//   weights      [N / 64][K / 64][64][64]    64 rows of weights are one contiguous stream along K
//   KV page      [K|V][kv_head][D / 64][64 tokens][64]

#pragma once

#include <cuda_bf16.h>
#include <stdint.h>

constexpr int kPanelColumns = 64;
constexpr int kPanelRowBytes = 128;
constexpr int kPageTokens = 64;

using bf16 = __nv_bfloat16;

// Where element (row, column) lies within a panel, in elements; column < 64.
__host__ __device__ __forceinline__ int in_panel(int row, int column) {
    return row * kPanelColumns + ((((column >> 3) ^ (row & 7)) << 3) | (column & 7));
}

// Element (row, column) of activations [K / 64][rows_max][64].
__device__ __forceinline__ int64_t in_activations(int row, int column, int rows_max) {
    return static_cast<int64_t>(column >> 6) * rows_max * kPanelColumns + in_panel(row, column & 63);
}

// Two bf16 in one word, the first in the low half; bf16 is the upper half of an f32.
__device__ __forceinline__ float low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ uint32_t pack(float first, float second) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&both);
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Philox 4x32-10 of (counter, key): chance as a pure function, the same as reference/random.rs.
__device__ __forceinline__ uint4 philox(uint64_t counter, uint64_t key) {
    uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * c0, b = static_cast<uint64_t>(0xCD9E8D57u) * c2;
        c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0, c1 = static_cast<uint32_t>(b);
        c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1, c3 = static_cast<uint32_t>(a);
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return make_uint4(c0, c1, c2, c3);
}

__device__ __forceinline__ float sum_over_warp(float value) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
    return value;
}

__device__ __forceinline__ float max_over_warp(float value) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, lane));
    return value;
}

// Programmatic dependent launch. Every kernel of a chain calls wait_for_predecessor before it reads what another kernel
// wrote or writes anything another may still read, in every thread that does so; what it reads before must never change
// (weights). let_successor_start only allows the next grid to be scheduled: it publishes nothing. Nothing on sm_80/89.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_successor_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Tensor cores everywhere from sm_80: D[16, 8] += A[16, 16] * B[8, 16]^T.
// A: a[0] row lane/4 k 2(lane%4)+{0,1}, a[1] row + 8, a[2] k + 8, a[3] both. B: b[0] column lane/4 k 2(lane%4)+{0,1}, b[1] k + 8.
// D: d[0, 1] row lane/4 columns 2(lane%4)+{0,1}, d[2, 3] row + 8.
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8x8 matrices; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&m)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(address)
                 : "memory");
}

// Sixteen bytes from global to shared memory without registers; `bytes` 0 writes zeros and reads nothing.
__device__ __forceinline__ void copy_16(uint32_t to, const void* from, int bytes = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kInFlight>
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kInFlight) : "memory");
}

#if __CUDA_ARCH__ >= 900

// Barriers in shared memory that count arrivals and bytes. `phase` is the parity of the phase waited for: 0 first.
__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After all barrier_init and before any other thread or the copy engine uses them (then a __syncthreads or cluster barrier).
__device__ __forceinline__ void barriers_are_ready() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t phase) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}\n" ::"r"(barrier),
        "r"(phase)
        : "memory");
}

// A contiguous copy by the copy engine, counted by a barrier. Addresses and bytes are multiples of 16.
__device__ __forceinline__ void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}
// The same for what is read once (weights at small batches): it leaves the L2 first.
__device__ __forceinline__ void bulk_copy_once(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
        "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
        : "memory");
}

// What ordinary stores wrote to shared memory becomes visible to wgmma and the copy engine.
__device__ __forceinline__ void publish_to_engines() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Clusters: blocks that run together and read each other's shared memory.
__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// The address of the same place in another block's shared memory.
__device__ __forceinline__ uint32_t shared_of(uint32_t address, uint32_t rank) {
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

#endif
