"""Makes the golden log-probabilities that the engine is judged by.

Enters: nothing but a seed and, for the bundled model, the checkpoint in ../model.
Leaves: one folder per case, shaped like a Hugging Face checkpoint (config.json and safetensors), with `golden.json` beside it:
    {"tokens": [...], "logprobs": [log p(tokens[i+1] | tokens[..=i]), ...], "top": [[position, [[id, logprob] x 5]], ...]}
where `top` holds every eighth position. For the bundled model the folder `bundled` holds one such file per prompt (with its
text) and `chat.json`, conversations with the text and the tokens that the checkpoint's own template makes of them.
Never happens: a golden is written that a wrong model would also meet. Every random case is run again with each mistake that an
engine is likely to make (no RoPE, swapped KV heads, a mask off by one, no window, ...), and each must move the log-probabilities
by at least MUTATION_MIN on average, twenty times the engine's tolerance.

Run: python tests/goldens/make.py [random] [bundled]     (torch 2.11, transformers 5.17, safetensors 0.8; CPU, under a minute)
"""

import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "model"
MUTATION_MIN = 0.02  # mean |change of log-probability| that every mistake must at least cause
SPREAD_MIN = 1.0  # nats, standard deviation of the log-probabilities along a sequence

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 384,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "torch_dtype": "bfloat16",
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 384,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 3,
}


def without(config, *keys):
    return {k: v for k, v in config.items() if k not in keys}


# Old checkpoints say `rope_theta` and `rope_scaling`, those saved by transformers 5 say `rope_parameters`; both occur below.
CASES = {
    "llama2-mha": dict(
        seed=11, length=200,
        # No num_key_value_heads and no rope_theta: the first Llama checkpoints have neither.
        config={**without(LLAMA, "num_key_value_heads"), "rms_norm_eps": 1e-6, "vocab_size": 320},
    ),
    "llama3-rope": dict(
        seed=12, length=300, shards=3,
        config={**LLAMA, "tie_word_embeddings": True, "head_dim": 32, "vocab_size": 512, "rope_theta": 500000.0,
                "eos_token_id": [2, 3, 4],
                "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                 "original_max_position_embeddings": 128}},
    ),
    "mistral-window": dict(
        seed=13, length=260,
        config={**without(LLAMA, "attention_bias", "mlp_bias"), "architectures": ["MistralForCausalLM"],
                "model_type": "mistral", "sliding_window": 50, "rope_theta": 10000.0, "num_hidden_layers": 2},
    ),
    "qwen2-bias": dict(seed=14, length=180, config={**QWEN2, "rope_theta": 1000000.0, "torch_dtype": "bfloat16"}),
    "qwen2-window": dict(
        seed=15, length=250,
        config={**QWEN2, "dtype": "bfloat16", "use_sliding_window": True, "sliding_window": 70, "max_window_layers": 1,
                "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "qwen3-qknorm": dict(
        seed=16, length=220,
        config={**without(QWEN2, "sliding_window"), "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3",
                "head_dim": 32, "attention_bias": False, "tie_word_embeddings": True, "sliding_window": None,
                "rope_theta": 1000000, "rope_scaling": None, "torch_dtype": "bfloat16"},
    ),
    "llama-linear": dict(
        seed=17, length=190, stored=torch.float16,
        config={**LLAMA, "torch_dtype": "float16", "rope_theta": 10000.0, "num_hidden_layers": 2,
                "rope_scaling": {"type": "linear", "factor": 4.0}},
    ),
    "llama-yarn": dict(
        seed=18, length=320,
        config={**without(LLAMA, "torch_dtype"), "dtype": "bfloat16",
                "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0,
                                    "original_max_position_embeddings": 128}},
    ),
    "qwen3-yarn": dict(
        seed=19, length=200,
        config={**without(QWEN2, "sliding_window"), "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3",
                "num_hidden_layers": 2, "head_dim": 16, "attention_bias": False, "sliding_window": None,
                "torch_dtype": "bfloat16", "rope_theta": 10000.0, "max_position_embeddings": 256,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    ),
}


def random_weights(model, seed):
    """Weights under which the position, the heads and the mask all matter, unlike the usual initialisation (std 0.02),
    whose attention is flat and whose log-probabilities are all alike."""
    rng = torch.Generator().manual_seed(seed)
    tied = model.config.tie_word_embeddings
    weights = {}
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=rng)
        if name == "lm_head.weight" and tied:
            continue
        if name.endswith("norm.weight"):
            value = (1.5 if "q_norm" in name or "k_norm" in name else 1.0) + 0.3 * noise
        elif name.endswith("bias"):
            value = 0.7 * noise
        elif "embed_tokens" in name:
            value = (0.3 if tied else 1.0) * noise
        else:
            gain = {"q_proj": 1.6, "k_proj": 1.6, "v_proj": 1.4, "o_proj": 1.8, "lm_head": 2.5}.get(name.split(".")[-2], 1.0)
            value = gain * noise / math.sqrt(tensor.shape[1])
        weights[name] = value
    return weights


def store(folder, config, weights, dtype, shards):
    """Writes a checkpoint folder, whole or in shards with an index, as transformers would."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {name: value.to(dtype).contiguous() for name, value in weights.items()}
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names, where = sorted(weights), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        mine = names[shard * len(names) // shards:(shard + 1) * len(names) // shards]
        save_file({name: weights[name] for name in mine}, folder / file, metadata={"format": "pt"})
        where.update({name: file for name in mine})
    total = sum(value.numel() * value.element_size() for value in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def teacher_forced(logits, tokens):
    """log p(tokens[i+1] | tokens[..=i]) for every i; logits [tokens, vocab]."""
    every = torch.log_softmax(logits.double(), dim=-1)
    return every, every[:-1].gather(1, tokens[1:, None])[:, 0]


def rounded(x):
    return round(float(x), 6)


def golden(model, tokens):
    with torch.no_grad():
        every, chosen = teacher_forced(model(tokens[None]).logits[0], tokens)
    top = []
    for position in range(0, len(tokens), 8):
        best = every[position].topk(5)
        top.append([position, [[int(i), rounded(p)] for i, p in zip(best.indices, best.values)]])
    return chosen, {"tokens": tokens.tolist(), "logprobs": [rounded(p) for p in chosen], "top": top}


def write_golden(path, value):
    """One line per field: small, and a change shows in a diff as what it is."""
    fields = ",\n".join(f'"{key}": {json.dumps(field, separators=(",", ":"))}' for key, field in value.items())
    path.write_text("{\n" + fields + "\n}\n")


# --- The same forward pass written out, so that single mistakes can be made in it. ---


def rotate(x, cos, sin, interleaved):
    if interleaved:  # pairs (0,1), (2,3), ... as Meta's own weights have them: wrong for checkpoints in this format
        half = cos.shape[-1] // 2
        a, b = x[..., 0::2], x[..., 1::2]
        c, s = cos[..., :half], sin[..., :half]
        return torch.stack((a * c - b * s, b * c + a * s), dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def window_of(config, layer):
    if getattr(config, "layer_types", None):
        return config.sliding_window if config.layer_types[layer] == "sliding_attention" else None
    return getattr(config, "sliding_window", None)


def mask_of(count, window, mistake):
    query, key = torch.arange(count)[:, None], torch.arange(count)[None]
    shift = {"mask sees one ahead": 1, "mask misses itself": -1}.get(mistake, 0)
    seen = key <= query + shift
    if window is not None and mistake != "no window":
        seen &= key > query - window - {"window one longer": 1, "window one shorter": -1}.get(mistake, 0)
    seen[:, 0] |= ~seen.any(dim=1)  # a row must see something
    return torch.zeros(count, count).masked_fill(~seen, float("-inf"))


def attention(block, x, cos, sin, mask, mistake):
    count, width = x.shape[0], block.head_dim
    project = {}
    for part in "qkv":
        linear = getattr(block, f"{part}_proj")
        bias = None if mistake == "no biases" else linear.bias
        project[part] = torch.nn.functional.linear(x, linear.weight, bias).view(count, -1, width).transpose(0, 1)
    q, k, v = project["q"], project["k"], project["v"]
    if hasattr(block, "q_norm") and mistake != "no qk-norm":
        q, k = block.q_norm(q), block.k_norm(k)
    if mistake == "swapped KV heads":
        k, v = k.roll(1, dims=0), v.roll(1, dims=0)
    if mistake != "no RoPE":
        q, k = (rotate(t, cos, sin, mistake == "interleaved RoPE") for t in (q, k))
    groups = q.shape[0] // k.shape[0]
    if mistake == "KV heads dealt in turn":
        k, v = k.repeat(groups, 1, 1), v.repeat(groups, 1, 1)
    else:
        k, v = k.repeat_interleave(groups, dim=0), v.repeat_interleave(groups, dim=0)
    weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(width) + mask, dim=-1)
    return block.o_proj((weights @ v).transpose(0, 1).reshape(count, -1))


def forward(model, tokens, mistake=None):
    config, decoder, count = model.config, model.model, len(tokens)
    x = decoder.embed_tokens(tokens)
    positions = torch.arange(count)[None] + (1 if mistake == "positions from one" else 0)
    cos, sin = (t[0] for t in decoder.rotary_emb(x[None], positions))
    if mistake == "RoPE unscaled":
        width = cos.shape[-1]
        theta = config.rope_parameters["rope_theta"]
        angle = torch.outer(positions[0].float(), theta ** -(torch.arange(0, width, 2).float() / width))
        cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
    if mistake == "no yarn attention factor":
        factor = decoder.rotary_emb.attention_scaling
        cos, sin = cos / factor, sin / factor
    for layer, block in enumerate(decoder.layers):
        mask = mask_of(count, window_of(config, layer), mistake)
        x = x + attention(block.self_attn, block.input_layernorm(x), cos, sin, mask, mistake)
        x = x + block.mlp(block.post_attention_layernorm(x))
    return model.lm_head(decoder.norm(x))


def mistakes_of(config, model):
    yield from ("no RoPE", "interleaved RoPE", "swapped KV heads", "mask sees one ahead", "mask misses itself")
    if config.num_key_value_heads != config.num_attention_heads:
        yield "KV heads dealt in turn"
    if any(window_of(config, layer) for layer in range(config.num_hidden_layers)):
        yield from ("no window", "window one longer", "window one shorter")
    kind = config.rope_parameters["rope_type"]
    if kind != "default":
        yield "RoPE unscaled"
    if kind == "yarn":
        yield "no yarn attention factor"
    if hasattr(model.model.layers[0].self_attn, "q_norm"):
        yield "no qk-norm"
    if model.model.layers[0].self_attn.q_proj.bias is not None:
        yield "no biases"


def random_case(name, case):
    folder = HERE / name
    config = case["config"]
    store(folder, config, {}, torch.bfloat16, 1)  # config first: transformers itself says which weights there are
    blank = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    weights = random_weights(blank, case["seed"])
    store(folder, config, weights, case.get("stored", torch.bfloat16), case.get("shards", 1))
    model = load(folder)
    rng = torch.Generator().manual_seed(case["seed"] + 1000)
    tokens = torch.randint(0, config["vocab_size"], (case["length"],), generator=rng)
    chosen, value = golden(model, tokens)
    write_golden(folder / "golden.json", value)
    assert chosen.std() >= SPREAD_MIN, f"{name}: spread {chosen.std():.3f} nats"
    with torch.no_grad():
        apart = (teacher_forced(forward(model, tokens), tokens)[1] - chosen).abs().mean()
        assert apart < 1e-4, f"{name}: the written-out forward pass differs from transformers by {apart}"
        print(f"{name}: {len(tokens)} tokens, spread {chosen.std():.2f} nats, written out again within {apart:.1e}")
        for mistake in mistakes_of(model.config, model):
            moved = (teacher_forced(forward(model, tokens, mistake), tokens)[1] - chosen).abs().mean()
            print(f"    {mistake:26} moves {moved:.3f}")
            assert moved >= MUTATION_MIN, f"{name}: '{mistake}' moves only {moved:.4f} nats"


def bundled_cases():
    model, tokenizer = load(MODEL), AutoTokenizer.from_pretrained(MODEL)
    prompts = json.loads((HERE / "prompts.json").read_text())
    folder = HERE / "bundled"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for name, prompt in prompts["completions"].items():
        tokens = torch.tensor(tokenizer(prompt["text"], add_special_tokens=prompt["add_special_tokens"])["input_ids"])
        _, value = golden(model, tokens)
        write_golden(folder / f"{name}.json", {**prompt, **value})
        print(f"bundled/{name}: {len(tokens)} tokens")
    chats = []
    for chat in prompts["chats"]:
        text = tokenizer.apply_chat_template(
            chat["messages"], tools=chat.get("tools"), add_generation_prompt=chat["add_generation_prompt"], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            every = model.generate(torch.tensor([ids]), max_new_tokens=120, do_sample=False)[0, len(ids):]
        answer = tokenizer.decode(every, skip_special_tokens=True)
        chats.append({**chat, "text": text, "tokens": ids, "greedy_tokens": every.tolist(), "greedy_text": answer})
        print(f"bundled/chat.json: {answer}")
    lines = ",\n".join(json.dumps(chat, ensure_ascii=False) for chat in chats)
    (folder / "chat.json").write_text(f"[\n{lines}\n]\n")


def main():
    torch.set_num_threads(1)  # one order of summation
    logging.disable_progress_bar()
    wanted = sys.argv[1:] or ["random", "bundled"]
    if "random" in wanted:
        for name, case in CASES.items():
            random_case(name, case)
    if "bundled" in wanted:
        bundled_cases()


if __name__ == "__main__":
    main()
