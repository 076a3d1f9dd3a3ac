// Hopper's warpgroup matrix product, m64nNk16 in bf16 with f32 sums: D[64, N] (+)= A[64, 16] * B[N, 16]^T.
//
// A and B lie in shared memory as panels (common.cuh): 64 columns of K in 128-byte rows, swizzled. A step along K
// of 16 elements within a panel adds 32 bytes to the start of the descriptor.
// D of a thread: warp w of the warpgroup holds rows 16w + lane/4 and + 8; d[4j + 0, 1] are columns
// 8j + 2(lane % 4) + {0, 1} of the first row, d[4j + 2, 3] those of the second.

#pragma once

#include <stdint.h>

#include "common.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Describes a panel in shared memory, 1,024-byte aligned: 128-byte swizzle, K-major. Rows lie 128 bytes apart,
// groups of eight of them 1,024.
__device__ __forceinline__ uint64_t panel_descriptor(uint32_t shared_address) {
    return (static_cast<uint64_t>(1) << 62) | (static_cast<uint64_t>(1024 >> 4) << 32) | (static_cast<uint64_t>(1) << 16) |
           ((shared_address & 0x3ffff) >> 4);
}

__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kInFlight>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kInFlight) : "memory");
}

// A thread's registers of D: their names in an instruction, and themselves.
#define WGMMA_NAMES_4 "%0, %1, %2, %3"
#define WGMMA_NAMES_8 WGMMA_NAMES_4 ", %4, %5, %6, %7"
#define WGMMA_NAMES_16 WGMMA_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_NAMES_32 WGMMA_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_NAMES_48 WGMMA_NAMES_32                                                                          \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_NAMES_64 WGMMA_NAMES_32                                                                          \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"                         \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_NAMES_80 WGMMA_NAMES_64                                                                          \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define WGMMA_NAMES_96 WGMMA_NAMES_64                                                                          \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"                         \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_NAMES_128 WGMMA_NAMES_96                                                                         \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"             \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_SUMS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_SUMS_8(d, i) WGMMA_SUMS_4(d, i), WGMMA_SUMS_4(d, i + 4)
#define WGMMA_SUMS_16(d, i) WGMMA_SUMS_8(d, i), WGMMA_SUMS_8(d, i + 8)
#define WGMMA_SUMS_32(d, i) WGMMA_SUMS_16(d, i), WGMMA_SUMS_16(d, i + 16)
#define WGMMA_SUMS_48(d, i) WGMMA_SUMS_32(d, i), WGMMA_SUMS_16(d, i + 32)
#define WGMMA_SUMS_64(d, i) WGMMA_SUMS_32(d, i), WGMMA_SUMS_32(d, i + 32)
#define WGMMA_SUMS_80(d, i) WGMMA_SUMS_64(d, i), WGMMA_SUMS_16(d, i + 64)
#define WGMMA_SUMS_96(d, i) WGMMA_SUMS_64(d, i), WGMMA_SUMS_32(d, i + 64)
#define WGMMA_SUMS_128(d, i) WGMMA_SUMS_64(d, i), WGMMA_SUMS_64(d, i + 64)

// `accumulate` 0 overwrites D, 1 adds to it. D has N / 2 registers. A lies in shared memory.
template <int N>
struct Wgmma;

// Width, registers of D, and the numbers of the operands behind them: A, B, accumulate.
#define WGMMA(width, registers, a_number, b_number, accumulate_number)                                        \
    template <>                                                                                               \
    struct Wgmma<width> {                                                                                     \
        __device__ __forceinline__ static void run(float (&d)[registers], uint64_t a, uint64_t b, int more) { \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #accumulate_number ", 0;\n"                     \
                         "wgmma.mma_async.sync.aligned.m64n" #width "k16.f32.bf16.bf16 "                      \
                         "{" WGMMA_NAMES_##registers "}, %" #a_number ", %" #b_number ", p, 1, 1, 0, 0;\n}\n" \
                         : WGMMA_SUMS_##registers(d, 0)                                                       \
                         : "l"(a), "l"(b), "r"(more));                                                        \
        }                                                                                                     \
    };

WGMMA(8, 4, 4, 5, 6)
WGMMA(16, 8, 8, 9, 10)
WGMMA(32, 16, 16, 17, 18)
WGMMA(64, 32, 32, 33, 34)
WGMMA(96, 48, 48, 49, 50)
WGMMA(128, 64, 64, 65, 66)
WGMMA(160, 80, 80, 81, 82)
WGMMA(192, 96, 96, 97, 98)
WGMMA(256, 128, 128, 129, 130)

#endif
