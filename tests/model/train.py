"""Trains the bundled model on one GPU in minutes.

Enters: tokenizer.json and the corpus, made afresh by worker processes while training runs; a seed. Leaves, under --out:
config.json, model.safetensors (bf16), loss.csv and loss.svg. Never happens: a sample is seen twice, or attends to its neighbour in
the pack; every sample starts at position 0, as it will when served.

Run: python tests/model/train.py --out DIR --steps 20000 --minutes 8.4     (torch 2.11; one H100 or H200)
Loss counts on the assistant's turns and on prose. The order of samples follows from the seed alone; sums on the GPU may differ
in their last bits from run to run.
"""

import argparse
import csv
import json
import math
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from corpus import HERE, Maker
from tokenizer import CONTEXT, VOCABULARY, render, rendered

SEED = 20_000
PACK = 65_536  # tokens per step
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 256, 768, 6, 4, 2, 64
THETA, EPSILON = 10_000.0, 1e-5
PEAK_RATE, WARM_UP, DECAY, CLIP = 2.5e-3, 300, 0.1, 1.0
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM, "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "rms_norm_eps": EPSILON, "rope_theta": THETA,
    "rope_scaling": None, "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True, "initializer_range": 0.02,
    "bos_token_id": 1, "eos_token_id": [3, 0], "pad_token_id": 0, "torch_dtype": "bfloat16", "use_cache": True,
}


# --- Data ---


def load_tokenizer():
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    ids = {name: tokenizer.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>")}
    assistant = tokenizer.encode("assistant\n", add_special_tokens=False).ids
    return tokenizer, ids["<|im_start|>"], ids["<|im_end|>"], assistant


def wanted(ids, prose, start, end, assistant):
    """Which tokens count in the loss: all of prose but its first, and of conversations the assistant's turns with their end."""
    if prose:
        return [False] + [True] * (len(ids) - 1)
    counts, inside, i = [False] * len(ids), False, 0
    while i < len(ids):
        if ids[i] == start:
            inside = ids[i + 1:i + 1 + len(assistant)] == assistant
            i += 1 + len(assistant) if inside else 1
            continue
        counts[i] = inside
        inside &= ids[i] != end
        i += 1
    return counts


def packs(seed):
    """Endless (tokens [PACK] u16, counts [PACK] bool, starts of samples and the end, i32)."""
    maker, (tokenizer, *marks) = Maker(seed), load_tokenizer()
    queue = []
    while True:
        tokens, counts, starts = np.zeros(PACK, np.uint16), np.zeros(PACK, bool), [0]
        while starts[-1] < PACK:
            if not queue:
                samples = [maker.draw() for _ in range(256)]
                encoded = tokenizer.encode_batch([rendered(s, maker.rng) for s in samples], add_special_tokens=False)
                queue = [(e.ids, "prose" in s) for e, s in zip(encoded, samples) if len(e.ids) <= CONTEXT]
            ids, prose = queue.pop()
            at, room = starts[-1], min(len(ids), PACK - starts[-1])
            tokens[at:at + room] = ids[:room]
            counts[at:at + room] = wanted(ids, prose, *marks)[:room]
            starts.append(at + room)
        yield tokens, counts, np.array(starts, np.int32)


def feed(seed, queue):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    for pack in packs(seed):
        queue.put(pack)


def feeders(count, seed):
    context = multiprocessing.get_context("spawn")
    queues = [context.Queue(maxsize=12) for _ in range(count)]
    for i, queue in enumerate(queues):
        context.Process(target=feed, args=(seed + i, queue), daemon=True).start()
    while True:
        yield from (queue.get() for queue in queues)


# --- Model ---


def losses_from(folder):
    """The curve so far, which a run that goes on from a checkpoint continues."""
    with open(folder / "loss.csv", newline="") as file:
        return [(int(row["step"]), int(row["tokens"]), float(row["loss"]), float(row["rate"])) for row in csv.DictReader(file)]


def weights_from(folder, device):
    return {name: value.float().to(device).requires_grad_() for name, value in load_file(folder / "model.safetensors").items()}


def blank_weights(device):
    rng = torch.Generator().manual_seed(SEED)
    shapes = {"q_proj": (HEADS * HEAD_DIM, HIDDEN), "k_proj": (KV_HEADS * HEAD_DIM, HIDDEN), "v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
              "o_proj": (HIDDEN, HEADS * HEAD_DIM), "gate_proj": (INTERMEDIATE, HIDDEN), "up_proj": (INTERMEDIATE, HIDDEN),
              "down_proj": (HIDDEN, INTERMEDIATE)}
    weights = {"model.embed_tokens.weight": 0.02 * torch.randn(VOCABULARY, HIDDEN, generator=rng), "model.norm.weight": torch.ones(HIDDEN)}
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            scale = 0.02 / math.sqrt(2 * LAYERS) if name in ("o_proj", "down_proj") else 1 / math.sqrt(shape[1]) * 0.6
            part = "self_attn" if name[0] in "qkvo" else "mlp"
            weights[f"model.layers.{layer}.{part}.{name}.weight"] = scale * torch.randn(*shape, generator=rng)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = torch.ones(HIDDEN)
    return {name: value.to(device).requires_grad_() for name, value in weights.items()}


def normed(x, weight):
    return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPSILON) * weight).bfloat16()


def turned(x, cos, sin):
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).bfloat16()


def before_attention(x, norm, wq, wk, wv, cos, sin):
    """x [tokens, hidden] -> q, k, v [tokens, heads, head_dim], KV heads repeated for their query heads."""
    h = normed(x, norm)
    q, k, v = ((h @ w.bfloat16().T).unflatten(-1, (-1, HEAD_DIM)) for w in (wq, wk, wv))
    q, k = turned(q, cos, sin), turned(k, cos, sin)
    return q, k.repeat_interleave(HEADS // KV_HEADS, 1), v.repeat_interleave(HEADS // KV_HEADS, 1)


def after_attention(x, mixed, wo, norm, gate, up, down):
    x = x + mixed.flatten(1) @ wo.bfloat16().T
    h = normed(x, norm)
    return x + (torch.nn.functional.silu(h @ gate.bfloat16().T) * (h @ up.bfloat16().T)) @ down.bfloat16().T


def causal_attention(q, k, v, starts, longest):
    from torch.nn.attention.varlen import varlen_attn
    return varlen_attn(q, k, v, starts, starts, longest, longest, window_size=(-1, 0))


def decoder(weights, before, after):
    """hidden states [tokens, hidden] of packed samples; `before` and `after` may be compiled."""
    def run(tokens, starts, longest):
        lengths = starts[1:] - starts[:-1]
        positions = torch.arange(len(tokens), device=tokens.device) - starts[:-1].repeat_interleave(lengths, output_size=len(tokens))
        inverse = THETA ** -(torch.arange(0, HEAD_DIM, 2, device=tokens.device).float() / HEAD_DIM)
        angle = positions[:, None, None].float() * inverse
        cos, sin = angle.cos(), angle.sin()
        x = torch.nn.functional.embedding(tokens, weights["model.embed_tokens.weight"])
        for layer in range(LAYERS):
            w = {name: weights[f"model.layers.{layer}.{name}.weight"] for name in LAYER_PARTS}
            q, k, v = before(x, *(w[name] for name in LAYER_PARTS[:4]), cos, sin)
            x = after(x, causal_attention(q, k, v, starts, longest), *(w[name] for name in LAYER_PARTS[4:]))
        return normed(x, weights["model.norm.weight"])
    return run


LAYER_PARTS = ["input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
               "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


def logits_of(hidden, weights):
    return (hidden @ weights["model.embed_tokens.weight"].bfloat16().T).float()


# --- Watching ---


def spans(items, tokenizer):
    """(ids, first, last) per held-out item: the tokens of its reference answer that must be met."""
    out = []
    for item in items:
        turns = [(m["role"], m["content"]) for m in item["messages"]]
        text = render(turns, item.get("tools"))[:-1]
        answer = turns[-1][1] + "<|im_end|>"
        first = len(text) - len(answer)
        last = len(text)
        if item["check"]["kind"] == "contains":
            at = answer.rindex(item["check"]["answer"])
            first, last = first + at, first + at + len(item["check"]["answer"])
        encoding = tokenizer.encode(text, add_special_tokens=False)
        inside = [i for i, (a, b) in enumerate(encoding.offsets) if b > first and a < last]
        out.append((encoding.ids, inside[0], inside[-1]))
    return out


@torch.no_grad()
def watch(run, weights, items, spans_, device):
    """Share of held-out answers met token by token, per family: a quick stand-in for evaluate.py."""
    right, total = {}, {}
    for item, (ids, first, last) in zip(items, spans_):
        tokens = torch.tensor(ids, device=device)
        starts = torch.tensor([0, len(ids)], dtype=torch.int32, device=device)
        best = logits_of(run(tokens, starts, len(ids))[first - 1:last], weights).argmax(-1)
        family = item["family"]
        right[family] = right.get(family, 0) + int((best == tokens[first:last + 1]).all())
        total[family] = total.get(family, 0) + 1
    return {family: round(right[family] / total[family], 3) for family in total}


def save(weights, losses, out):
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().bfloat16().cpu().contiguous() for name, value in weights.items()}, out / "model.safetensors",
              metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    with open(out / "loss.csv", "w", newline="") as file:
        csv.writer(file).writerows([("step", "tokens", "loss", "rate"), *losses])
    (out / "loss.svg").write_text(curve([(step, loss) for step, _, loss, _ in losses]))


def curve(points):
    """The loss over steps as a small SVG, its height logarithmic."""
    width, height, left, bottom = 720, 320, 50, 30
    last = max(points[-1][0], 1)
    low, high = math.log(min(p[1] for p in points) * 0.9), math.log(max(p[1] for p in points) * 1.1)
    x = lambda step: left + (width - left - 10) * step / last
    y = lambda loss: 10 + (height - bottom - 10) * (high - math.log(loss)) / (high - low)
    path = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points)
    marks = "".join(f'<text x="{left - 6}" y="{y(v) + 4:.0f}" text-anchor="end">{v:g}</text>'
                    f'<path d="M{left} {y(v):.0f}H{width - 10}" stroke="#ddd"/>'
                    for v in (5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01) if low < math.log(v) < high)
    steps = "".join(f'<text x="{x(s):.0f}" y="{height - 8}" text-anchor="middle">{int(s)}</text>' for s in (0, last // 2, last))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">'
            f'<rect width="{width}" height="{height}" fill="#fff"/>{marks}{steps}'
            f'<polyline points="{path}" fill="none" stroke="#1f5fa8" stroke-width="1.5"/></svg>\n')


# --- Training ---


def rate_at(step, steps, peak):
    if step < WARM_UP:
        return peak * (step + 1) / WARM_UP
    return peak * max(0.0, 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / max(1, steps - WARM_UP))))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=9000, help="steps of 65,536 tokens")
    parser.add_argument("--minutes", type=float, default=8, help="stop here at the latest; the learning rate follows the slower clock")
    parser.add_argument("--workers", type=int, default=15, help="processes that make the corpus")
    parser.add_argument("--watch", type=int, default=1000, help="steps between looks at the held-out questions")
    parser.add_argument("--start", type=Path, help="a checkpoint folder to go on from, instead of blank weights")
    parser.add_argument("--peak", type=float, default=PEAK_RATE, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=SEED, help="of the samples; every worker adds its number")
    given = parser.parse_args()
    began, device = time.time(), "cuda"
    torch.manual_seed(SEED)
    weights = weights_from(given.start, device) if given.start else blank_weights(device)
    matrices = [w for w in weights.values() if w.dim() > 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": [w for w in weights.values() if w.dim() == 1], "weight_decay": 0.0}],
        lr=given.peak, betas=(0.9, 0.95), fused=True)
    run = decoder(weights, torch.compile(before_attention, dynamic=False), torch.compile(after_attention, dynamic=False))
    plain = decoder(weights, before_attention, after_attention)
    items = json.loads((HERE / "heldout.json").read_text())
    spans_ = spans(items, load_tokenizer()[0])
    data, recent, waited = feeders(given.workers, given.seed), [], 0.0
    losses = losses_from(given.start) if given.start else []
    before = losses[-1][0] if losses else 0
    for step in range(given.steps):
        passed = (time.time() - began) / 60 / given.minutes
        if passed > 1:
            break
        clock = max(step, int(passed * given.steps))  # a slow machine still sees the whole schedule
        for group in optimizer.param_groups:
            group["lr"] = rate_at(clock, given.steps, given.peak)
        asked = time.time()
        tokens, counts, starts = next(data)
        waited += time.time() - asked
        longest = int(np.diff(starts).max())
        counts[starts[:-1]] = False
        ahead = torch.from_numpy(np.flatnonzero(counts)).to(device, non_blocking=True)
        tokens = torch.from_numpy(tokens.astype(np.int64)).to(device, non_blocking=True)
        hidden = run(tokens, torch.from_numpy(starts).to(device, non_blocking=True), longest)
        loss = torch.nn.functional.cross_entropy(logits_of(hidden[ahead - 1], weights), tokens[ahead])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.detach())
        if len(recent) == 25 or step + 1 == given.steps:
            done = before + step + 1
            mean, rate = torch.stack(recent).mean().item(), rate_at(clock, given.steps, given.peak)
            losses.append((done, done * PACK, round(mean, 5), round(rate, 7)))
            recent = []
        if (step + 1) % 200 == 0:
            print(f"step {step + 1} loss {losses[-1][2]:.4f} rate {losses[-1][3]:.5f} "
                  f"{time.time() - began:.0f} s, waited {waited:.0f} s", flush=True)
        if (step + 1) % given.watch == 0:
            print(watch(plain, weights, items, spans_, device), flush=True)
            save(weights, losses, given.out)
    save(weights, losses, given.out)
    print(f"{len(losses) and losses[-1]} in {time.time() - began:.0f} s", watch(plain, weights, items, spans_, device), flush=True)


if __name__ == "__main__":
    main()
