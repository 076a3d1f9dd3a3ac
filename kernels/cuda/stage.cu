// A step's input from pinned host memory into the device's fixed buffers, in one launch: whole segments, and single
// entries of block tables. The host is read over its bus, once, in 16-byte pieces.
//
// Shapes   up to kSegments runs of 16-byte pieces; `deltas` entries (slot, index, page, 0).
// Moved    a few KB in a decode step (16 bytes a row), 16 bytes a row of prefill; latency of the bus is all there is.

#include "common.cuh"

constexpr int kSegments = 8;

struct Segment {
    uint4* to;
    int first;  // piece of `from`
    int count;  // pieces
};

struct StageArguments {
    const uint4* from;  // mapped host memory
    Segment segments[kSegments];
    int deltas_first;   // piece of `from`
    int deltas;
    int* tables;        // [slots][table_stride]
    int table_stride;
};

// Grid: enough threads for the longest segment; every thread takes one piece of each segment.
extern "C" __global__ void __launch_bounds__(256) stage(const __grid_constant__ StageArguments s) {
    const int piece = blockIdx.x * blockDim.x + threadIdx.x;
    // All reads first: the bus answers them together.
    uint4 read[kSegments];
#pragma unroll
    for (int i = 0; i < kSegments; ++i) {
        if (piece < s.segments[i].count) read[i] = s.from[s.segments[i].first + piece];
    }
    uint4 delta;
    if (piece < s.deltas) delta = s.from[s.deltas_first + piece];
    wait_for_predecessor();
    let_successor_start();
#pragma unroll
    for (int i = 0; i < kSegments; ++i) {
        if (piece < s.segments[i].count) s.segments[i].to[piece] = read[i];
    }
    if (piece < s.deltas) s.tables[static_cast<int64_t>(delta.x) * s.table_stride + delta.y] = static_cast<int>(delta.z);
}
