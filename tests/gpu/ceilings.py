"""What the card reads, copies and computes at most, as JSON on standard output: the floors of a bench run in the same hour.

Needs torch. Reading is a sum over 4 GiB of random bytes as 64-bit integers, computing a square product of random bf16.
"""

import json

import torch


def median_seconds(work, repeats=15):
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[repeats // 2]


figures = {"device": torch.cuda.get_device_name()}
block = torch.empty(4 << 30, dtype=torch.uint8, device="cuda").random_()
twin = torch.empty_like(block)
figures["copy_TBps_rw"] = 2 * block.numel() / median_seconds(lambda: twin.copy_(block)) / 1e12
numbers = block.view(torch.int64)
figures["read_TBps_sum"] = block.numel() / median_seconds(lambda: numbers.sum()) / 1e12
del block, twin, numbers
for size in (4096, 8192):
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    figures[f"bf16_TFLOPs_{size}"] = 2 * size**3 / median_seconds(lambda: a @ b) / 1e12
print(json.dumps(figures))
