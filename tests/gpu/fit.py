"""Fits the efficiencies of the planner's roofline to a card's bench, and prints its row of operator/src/plan/calibration.rs.

Enters: docs/perf/<card>/llama-*.json and ceilings.json, as `run.sh bench` leaves them. Leaves: the row, and every figure beside the
prediction; eight of them are fitted to, the others judge. The formulae are those of docs/planner.md; the tests of the planner compute
them again in Rust.
Run: python3 tests/gpu/fit.py h100     (needs nothing but Python)
"""

import json
import math
import random
import sys
from pathlib import Path

PERF = Path(__file__).resolve().parents[2] / "docs" / "perf"
MODELS = {
    "llama-3.2-1b": dict(layers=16, hidden=2048, heads=32, kv_heads=8, head_dim=64, intermediate=8192, vocabulary=128256),
    "llama-3.1-8b": dict(layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, intermediate=14336, vocabulary=128256),
}
# Of the attention kernels alone, at their longest: docs/perf/<card>/kernels_*.md; of prefill by the width of heads.
ATTENTION_READ_SHARE = 1.0
# A stream of weights is a little faster than the sum that measures the card (docs/perf.md); no more than this is believed.
STREAM_SHARE_MAX = 1.10
ATTENTION_FLOP_SHARES = {64: 0.57, 128: 0.72}
FITTED = {
    ("llama-3.1-8b", "decode_bs1_ms_per_token"), ("llama-3.1-8b", "decode_bs256_tok_s"),
    ("llama-3.1-8b", "prefill_512_ms"), ("llama-3.1-8b", "prefill_8192_ms"),
    ("llama-3.2-1b", "decode_bs1_ms_per_token"), ("llama-3.2-1b", "decode_bs256_tok_s"),
    ("llama-3.2-1b", "prefill_512_ms"), ("llama-3.2-1b", "prefill_2048_ms"),
}


def points(folder):
    """(model, workload, rows, context or None for a prompt, milliseconds)"""
    for model in MODELS:
        figures = json.loads((PERF / folder / f"{model}.json").read_text())
        yield model, "decode_bs1_ms_per_token", 1, 256, figures["decode_bs1_ms_per_token"]
        yield model, "decode_bs1_ctx8k_ms_per_token", 1, 8256, figures["decode_bs1_ctx8k_ms_per_token"]
        for rows in (8, 32, 64, 128, 256):
            name = f"decode_bs{rows}_tok_s"
            yield model, name, rows, 192, rows / figures[name] * 1e3
        for rows in (512, 2048, 8192):
            name = f"prefill_{rows}_ms"
            yield model, name, rows, None, figures[name]


def predicted(values, read, flops, model, rows, context):
    stream_share, row_bytes, logit_bytes, stream_gap, tile_share, tile_gap = values
    m = MODELS[model]
    layers, hidden = m["layers"], m["hidden"]
    query, key = m["heads"] * m["head_dim"], m["kv_heads"] * m["head_dim"]
    matrices = layers * (hidden * (2 * query + 2 * key) + 3 * hidden * m["intermediate"])
    head = hidden * m["vocabulary"]
    head_rows = 1 if context is None else rows
    rows_bytes = rows * layers * hidden * row_bytes + head_rows * m["vocabulary"] * logit_bytes
    stream = 2 * (matrices + head) / (read * stream_share) + rows_bytes / read + layers * stream_gap
    tile = (2 * rows * matrices + 2 * head_rows * head) / (flops * tile_share) + layers * tile_gap
    if context is None:
        attention = 4 * query * rows * rows / 2 * layers / (flops * ATTENTION_FLOP_SHARES[m["head_dim"]])
    else:
        attention = rows * context * 4 * key * layers / (read * ATTENTION_READ_SHARE)
    return (max(stream, tile) + attention) * 1e3


def fit(all_points, read, flops):
    """Least squares of the logarithms, by a random walk that only goes down; the seed makes it repeatable."""
    fitted = [p for p in all_points if p[:2] in FITTED]

    def loss(logs):
        values = [math.exp(v) for v in logs]
        if values[0] > STREAM_SHARE_MAX or values[4] > 1:
            return math.inf
        return sum(math.log(predicted(values, read, flops, m, r, c) / ms) ** 2 for m, _, r, c, ms in fitted)

    chance = random.Random(1)
    best, step = [math.log(v) for v in (1.0, 240.0, 10.0, 3e-6, 0.8, 3e-5)], 0.2
    least = loss(best)
    for _ in range(60_000):
        trial = [v + chance.gauss(0, step) * (chance.random() < 0.5) for v in best]
        if (found := loss(trial)) < least:
            best, least, step = trial, found, min(0.3, step * 1.1)
        else:
            step = max(1e-4, step * 0.9995)
    return [math.exp(v) for v in best]


def main():
    folder = sys.argv[1]
    ceilings = json.loads((PERF / folder / "ceilings.json").read_text())
    read, flops = ceilings["read_TBps_sum"] * 1e12, ceilings["bf16_TFLOPs_8192"] * 1e12
    all_points = list(points(folder))
    values = fit(all_points, read, flops)
    stream_share, row_bytes, logit_bytes, stream_gap, tile_share, tile_gap = values
    print(f"""Calibration {{
    product: "{ceilings['device'].replace(' ', '-')}",
    source: "docs/perf/{folder}",
    read: {read:.4e},
    bf16: {flops:.4e},
    stream_share: {stream_share:.3f},
    row_bytes: {row_bytes:.1f},
    logit_bytes: {logit_bytes:.1f},
    stream_gap: {stream_gap * 1e6:.2f}e-6,
    tile_share: {tile_share:.3f},
    tile_gap: {tile_gap * 1e6:.1f}e-6,
    attention_read_share: {ATTENTION_READ_SHARE},
    attention_flop_shares: {list(ATTENTION_FLOP_SHARES.values())},
}}""")
    for model, name, rows, context, ms in all_points:
        guess = predicted(values, read, flops, model, rows, context)
        used = "fitted" if (model, name) in FITTED else ""
        print(f"{model} {name:32} {guess:9.3f} {ms:9.3f} {100 * (guess / ms - 1):+6.1f} % {used}")


main()
