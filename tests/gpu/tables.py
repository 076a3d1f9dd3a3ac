"""Writes docs/perf/cuda.md and its plots from the figures in docs/perf: ours of one card, the peers' of theirs.

Enters: docs/perf/<card>/llama-*.json and ceilings.json, as `run.sh bench` leaves them, lmdeploy_*.json of `run.sh peers` where it
ran, and docs/perf/peers/*.json, which an H200 gave.
Leaves: a table per model with floors and shares, one SVG per model of tokens per second against batch, and the README's table.
Run: python3 tests/gpu/tables.py h100 [--check]     (needs nothing but Python; --check writes nothing, and fails where something differs)
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PERF = ROOT / "docs" / "perf"
README_MARKS = ("<!-- table of tests/gpu/tables.py -->\n", "<!-- end of the table -->")
PEERS_CARD = "H200"
PEERS = {f"vLLM 0.26, {PEERS_CARD}": "vllm", f"SGLang 0.5.17, {PEERS_CARD}": "sglang", f"LMDeploy 0.18, {PEERS_CARD}": "lmdeploy"}
MODELS = {"llama-3.2-1b": "1b", "llama-3.1-8b": "8b"}
ORDER = [
    "decode_bs1_ms_per_token", "decode_bs1_ctx8k_ms_per_token", "decode_bs8_tok_s", "decode_bs32_tok_s", "decode_bs64_tok_s",
    "decode_bs128_tok_s", "decode_bs256_tok_s", "prefill_512_ms", "prefill_2048_ms", "prefill_8192_ms", "mixed600_out_tok_s",
]


def read(path):
    return json.loads(path.read_text())


def shown(value):
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def table(ours, peers):
    names = list(peers)
    lines = ["| workload | Plimsoll | floor | share | " + " | ".join(names) + " |", "|---" * (4 + len(names)) + "|"]
    for key in ORDER:
        if key not in ours:
            continue
        value, floor = ours[key], ours["floors"].get(key)
        share = "" if floor is None else f"{(value / floor if key.endswith('tok_s') else floor / value) * 100:.0f} %"
        cells = [shown(peers[name][key]) if key in peers[name] else "" for name in names]
        lines.append(f"| {key} | {shown(value)} | {'' if floor is None else shown(floor)} | {share} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(model, ours, card, peers):
    """Tokens per second against batch, both axes logarithmic."""
    import math

    batches = [8, 32, 64, 128, 256]
    series = {f"Plimsoll, {card}": ours, **peers}
    colours = ["#c0392b", "#27ae60", "#2c3e50", "#2980b9", "#7f8c8d"]
    values = [data[f"decode_bs{b}_tok_s"] for data in series.values() for b in batches if f"decode_bs{b}_tok_s" in data]
    low, high = math.log10(min(values) * 0.8), math.log10(max(values) * 1.2)
    x = lambda b: 80 + 480 * (math.log2(b) - 3) / 5
    y = lambda v: 340 - 300 * (math.log10(v) - low) / (high - low)
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 400" font-family="sans-serif" font-size="13">',
             '<rect width="760" height="400" fill="white"/>',
             f'<text x="80" y="24" font-size="15">{model}, bf16: output tokens per second against requests at once</text>']
    for b in batches:
        parts.append(f'<line x1="{x(b):.0f}" y1="40" x2="{x(b):.0f}" y2="340" stroke="#ddd"/>'
                     f'<text x="{x(b):.0f}" y="360" text-anchor="middle">{b}</text>')
    for exponent in range(math.floor(low), math.ceil(high) + 1):
        for factor in (1, 2, 5):
            v = factor * 10**exponent
            if low <= math.log10(v) <= high:
                parts.append(f'<line x1="80" y1="{y(v):.0f}" x2="560" y2="{y(v):.0f}" stroke="#ddd"/>'
                             f'<text x="72" y="{y(v) + 4:.0f}" text-anchor="end">{v:,.0f}</text>')
    for index, (name, data) in enumerate(series.items()):
        points = [(x(b), y(data[f"decode_bs{b}_tok_s"])) for b in batches if f"decode_bs{b}_tok_s" in data]
        path = " ".join(f"{a:.1f},{c:.1f}" for a, c in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colours[index]}" stroke-width="{3 if index == 0 else 1.5}"/>')
        parts.append(f'<rect x="575" y="{52 + 24 * index}" width="14" height="4" fill="{colours[index]}"/>'
                     f'<text x="595" y="{59 + 24 * index}">{name}</text>')
    parts.append('<text x="320" y="385" text-anchor="middle">requests at once</text></svg>')
    return "\n".join(parts) + "\n"


def readme_table(card, beside):
    """What ran on one card: ours, the peer's and how many times as fast, by model."""
    heads = " | ".join(f"{model}: Plimsoll | LMDeploy 0.18 | times as fast" for model in beside)
    lines = [f"| one {card}, bf16 | {heads} |", "|---" * (1 + 3 * len(beside)) + "|"]
    for key in ORDER:
        cells = []
        for ours, peer in beside.values():
            ratio = ours[key] / peer[key] if key.endswith("tok_s") else peer[key] / ours[key]
            cells += [shown(ours[key]), shown(peer[key]), f"{ratio:.2f}"]
        lines.append(f"| `{key}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    folder, check = sys.argv[1], "--check" in sys.argv[2:]
    made, beside = {}, {}
    ceilings = read(PERF / folder / "ceilings.json")
    card = ceilings["device"].replace("NVIDIA ", "").split(" ")[0]
    text = [
        "# The CUDA engine beside its peers", "",
        "Generated by `python3 tests/gpu/tables.py " + folder + "` from the files beside it; how each was made: docs/perf.md.", "",
        f"Plimsoll ran on an {ceilings['device']}: reading {ceilings['read_TBps_sum']:.2f} TB/s, copying "
        f"{ceilings['copy_TBps_rw']:.2f} TB/s, dense bf16 {ceilings['bf16_TFLOPs_8192']:.0f} TFLOP/s, measured in the same run. "
        f"A peer's column names its card. An NVIDIA {PEERS_CARD} reads 4.42 TB/s and computes 750 TFLOP/s: where memory decides, that card is "
        f"{4.42 / ceilings['read_TBps_sum']:.2f} times as fast, so a row that is level here is a lead.", "",
    ]
    for model, short in MODELS.items():
        path = PERF / folder / f"{model}.json"
        if not path.exists():
            continue
        ours = read(path)
        peers = {name: read(PERF / "peers" / f"{file}_{short}_bf16.json") for name, file in PEERS.items()}
        path = PERF / folder / f"lmdeploy_{model}.json"
        if path.exists():
            beside[model] = ours, read(path)
            peers = {f"LMDeploy 0.18, {card}": beside[model][1], **peers}
        made[PERF / f"throughput_{short}.svg"] = plot(model, ours, card, peers)
        steps = ours["steps"]["decode_bs256_tok_s"]
        text += [f"## {model}", "", table(ours, peers), "",
                 f"One row: `plimsoll-engine bench --random-weights {model} --only ROW`, where ROW may be the beginning of a row's name.", "",
                 f"![throughput](throughput_{short}.svg)", "",
                 f"Device idle between steps at 256 requests: {steps['idle_p50']:.1f} µs p50. Memory planned "
                 f"{ours['planned_bytes'] / 2**30:.2f} GiB, used {ours['used_bytes'] / 2**30:.2f} GiB. Host RSS "
                 f"{ours['rss_bytes'] / 2**20:.0f} MiB.", ""]
    made[PERF / "cuda.md"] = "\n".join(text)
    readme = (ROOT / "README.md").read_text()
    before, rest = readme.split(README_MARKS[0])
    _, after = rest.split(README_MARKS[1])
    made[ROOT / "README.md"] = before + README_MARKS[0] + readme_table(card, beside) + README_MARKS[1] + after
    differing = [path for path, text in made.items() if path.read_text() != text]
    if not check:
        for path, text in made.items():
            path.write_text(text)
    elif differing:
        sys.exit(f"tables: not what {' '.join(sys.argv[:2])} gives: {', '.join(str(path.relative_to(ROOT)) for path in differing)}")


main()
