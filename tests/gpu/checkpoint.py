"""Checkpoints of published Llama shapes with random weights, made on the card with torch and safetensors.

Enters: a folder, the folder that holds `model` (for its tokenizer), a shape's name.
Leaves: config.json, tokenizer files and shards in bf16, as a download has them.
"""

import json

import torch
from safetensors.torch import save_file

VOCABULARY = 128256
# hidden, intermediate, layers, query heads, KV heads, width of a head, whether the head is the embedding
SHAPES = {
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 64, True),
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128, False),
}
LAYERS_PER_SHARD = 4


def config(shape):
    hidden, intermediate, layers, heads, kv_heads, width, tied = shape
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": width, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 500000.0,
        "tie_word_embeddings": tied, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    }


def tokenizer(folder, data, whole):
    """The bundled one; `whole` gives every id of the vocabulary some text, so that each random token is seen."""
    text = (data / "model" / "tokenizer.json").read_text()
    if whole:
        tokenizer = json.loads(text)
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary |= {f"Ġw{number}": number for number in range(len(vocabulary), VOCABULARY)}
        text = json.dumps(tokenizer)
    (folder / "tokenizer.json").write_text(text)
    (folder / "tokenizer_config.json").write_bytes((data / "model" / "tokenizer_config.json").read_bytes())


def layer(number, shape):
    hidden, intermediate, _, heads, kv_heads, width, _ = shape
    p = f"model.layers.{number}."
    return {
        p + "input_layernorm.weight": ones(hidden), p + "post_attention_layernorm.weight": ones(hidden),
        p + "self_attn.q_proj.weight": normal(heads * width, hidden), p + "self_attn.k_proj.weight": normal(kv_heads * width, hidden),
        p + "self_attn.v_proj.weight": normal(kv_heads * width, hidden), p + "self_attn.o_proj.weight": normal(hidden, heads * width),
        p + "mlp.gate_proj.weight": normal(intermediate, hidden), p + "mlp.up_proj.weight": normal(intermediate, hidden),
        p + "mlp.down_proj.weight": normal(hidden, intermediate),
    }


def normal(*size):
    return (torch.randn(*size, device="cuda", dtype=torch.bfloat16) * 0.02).cpu()


def ones(size):
    return torch.ones(size, dtype=torch.bfloat16)


def make(folder, data, name, whole_tokenizer):
    shape = SHAPES[name]
    hidden, layers, tied = shape[0], shape[2], shape[6]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(shape)))
    tokenizer(folder, data, whole_tokenizer)
    shards = layers // LAYERS_PER_SHARD + 1
    index = {}

    def save(number, tensors):
        file = f"model-{number:05}-of-{shards:05}.safetensors"
        save_file(tensors, folder / file)
        index.update({tensor: file for tensor in tensors})

    for shard in range(shards - 1):
        tensors = {}
        for number in range(shard * LAYERS_PER_SHARD, (shard + 1) * LAYERS_PER_SHARD):
            tensors |= layer(number, shape)
        save(shard + 1, tensors)
    ends = {"model.embed_tokens.weight": normal(VOCABULARY, hidden), "model.norm.weight": ones(hidden)}
    if not tied:
        ends["lm_head.weight"] = normal(VOCABULARY, hidden)
    save(shards, ends)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
