"""From process start to the first token of an 8B model whose files lie in the page cache, and the memory of the process.

Enters: the engine's path, the folder that holds `model` (for its tokenizer), a folder with 17 GB of room.
Leaves: one line of JSON. Needs torch and safetensors, which make the files (random weights of Llama-3.1-8B's shape).
"""

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import torch
from safetensors.torch import save_file

ENGINE, DATA, FOLDER = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]) / "llama-3.1-8b"
PORT = 18403
HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY, KEYS = 4096, 14336, 32, 128256, 1024


def make():
    FOLDER.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 500000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    }
    (FOLDER / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (DATA / "model" / name).exists():
            (FOLDER / name).write_bytes((DATA / "model" / name).read_bytes())
    normal = lambda *shape: (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02).cpu()
    ones = lambda: torch.ones(HIDDEN, dtype=torch.bfloat16)
    index, shard = {}, 0

    def save(tensors):
        nonlocal shard
        shard += 1
        file = f"model-{shard:05}-of-00009.safetensors"
        save_file(tensors, FOLDER / file)
        index.update({name: file for name in tensors})

    for first in range(0, LAYERS, 4):
        tensors = {}
        for layer in range(first, first + 4):
            p = f"model.layers.{layer}."
            tensors |= {
                p + "input_layernorm.weight": ones(), p + "post_attention_layernorm.weight": ones(),
                p + "self_attn.q_proj.weight": normal(HIDDEN, HIDDEN), p + "self_attn.k_proj.weight": normal(KEYS, HIDDEN),
                p + "self_attn.v_proj.weight": normal(KEYS, HIDDEN), p + "self_attn.o_proj.weight": normal(HIDDEN, HIDDEN),
                p + "mlp.gate_proj.weight": normal(INTERMEDIATE, HIDDEN), p + "mlp.up_proj.weight": normal(INTERMEDIATE, HIDDEN),
                p + "mlp.down_proj.weight": normal(HIDDEN, INTERMEDIATE),
            }
        save(tensors)
    save({"model.embed_tokens.weight": normal(VOCABULARY, HIDDEN), "lm_head.weight": normal(VOCABULARY, HIDDEN),
          "model.norm.weight": ones()})
    (FOLDER / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def first_token():
    body = json.dumps({"model": "m", "prompt": list(range(10, 42)), "max_tokens": 1, "temperature": 0}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=5) as response:
        json.load(response)


def run():
    begun = time.time()
    command = [ENGINE, "serve", "--model", FOLDER, "--served-name", "m", "--listen", f"127.0.0.1:{PORT}", "--drain-grace", "0s",
               "--device", "cuda", "--context-tokens", "8192", "--kv-tokens", "131072"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                first_token()
                break
            except OSError:
                if process.poll() is not None or time.time() - begun > 90:
                    sys.exit(f"startup: the engine ended with {process.poll()}")
                time.sleep(0.01)
        seconds = time.time() - begun
        status = Path(f"/proc/{process.pid}/status").read_text()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in status.splitlines() if line.startswith(("VmRSS", "RssAnon", "VmHWM"))}
        return seconds, kib
    finally:
        process.terminate()
        process.wait(60)


make()
runs = [run() for _ in range(3)]
seconds = sorted(run[0] for run in runs)
print(json.dumps({"first_token_s": [round(s, 2) for s in seconds], "median_s": round(seconds[1], 2), **runs[-1][1]}))
