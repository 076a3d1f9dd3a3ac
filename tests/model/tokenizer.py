"""The bundled model's tokenizer and chat: trains the byte-level BPE, writes its files, and renders conversations for training.

Enters: the corpus. Leaves: tokenizer.json, tokenizer_config.json, generation_config.json; `render`, the chat template in plain
Python, which is asserted to agree with chat_template.jinja on every family of the corpus.
Never happens: two digits share a token, so that sums can be learnt.

Run: python tests/model/tokenizer.py     (tokenizers 0.23, jinja2; a minute on one core)
"""

import json
from pathlib import Path

import jinja2
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from corpus import Maker

HERE = Path(__file__).resolve().parent
VOCABULARY = 4096
SAMPLES = 60_000
TOKENIZER_SEED = 90_001
CONTEXT = 2048
END_OF_TEXT, BEGIN, TURN_START, TURN_END = "<|endoftext|>", "<|begin|>", "<|im_start|>", "<|im_end|>"
SPECIAL = [END_OF_TEXT, BEGIN, TURN_START, TURN_END]  # ids 0, 1, 2, 3
MARKS = ["<tool_call>", "</tool_call>"]  # ids 4, 5: whole tokens, but text that a client shall see


def json_text(value, rng=None):
    """As the template's `tojson` writes it; with `rng`, now and then as other implementations do (compact, sorted keys)."""
    compact, ordered = (rng.random() < 0.3, rng.random() < 0.3) if rng else (False, False)
    return json.dumps(value, ensure_ascii=False, sort_keys=ordered, separators=(",", ":") if compact else (", ", ": "))


def render(turns, tools=None, rng=None):
    """The chat template for a whole conversation, [(role, content)]."""
    system, turns = (turns[0][1], turns[1:]) if turns[0][0] == "system" else ("", turns)
    text = BEGIN
    if system or tools:
        text += TURN_START + "system\n" + system
        if tools:
            text += ("\n\n" if system else "") + "You may call these tools:"
            text += "".join("\n" + json_text(tool, rng) for tool in tools)
            text += '\nTo call one, answer with <tool_call>{"name": NAME, "arguments": {...}}</tool_call>'
        text += TURN_END + "\n"
    return text + "".join(f"{TURN_START}{role}\n{content}{TURN_END}\n" for role, content in turns)


def rendered(sample, rng=None):
    """A sample as the model reads it. A conversation's last newline is left away: the turn's end comes before it."""
    if "prose" in sample:
        return BEGIN + sample["prose"] + END_OF_TEXT
    return render(sample["messages"], sample["tools"], rng)[:-1]


def train(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL]
        + [AddedToken(text, special=False, normalized=False) for text in MARKS])
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKS])
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, 1)])])
    assert tokenizer.get_vocab_size() == VOCABULARY
    return tokenizer


def write_configs(tokenizer):
    added = {str(tokenizer.token_to_id(text)): {"content": text, "lstrip": False, "normalized": False, "rstrip": False,
                                                "single_word": False, "special": text in SPECIAL} for text in SPECIAL + MARKS}
    config = {
        "add_bos_token": True, "added_tokens_decoder": added, "bos_token": BEGIN, "eos_token": TURN_END, "pad_token": END_OF_TEXT,
        "chat_template": (HERE / "chat_template.jinja").read_text(), "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT, "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (HERE / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    generation = {"bos_token_id": 1, "eos_token_id": [3, 0], "pad_token_id": 0}
    (HERE / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def check_template():
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = environment.from_string((HERE / "chat_template.jinja").read_text())
    maker, seen = Maker(TOKENIZER_SEED + 1), 0
    while seen < 500:
        sample = maker.draw()
        if "prose" in sample:
            continue
        seen += 1
        messages = [{"role": role, "content": content} for role, content in sample["messages"]]
        text = template.render(messages=messages, tools=sample["tools"], bos_token=BEGIN)
        assert text == render(sample["messages"], sample["tools"]), (text, render(sample["messages"], sample["tools"]))


def main():
    check_template()
    maker = Maker(TOKENIZER_SEED)
    tokenizer = train(rendered(maker.draw(), maker.rng) for _ in range(SAMPLES))
    tokenizer.save(str(HERE / "tokenizer.json"))
    write_configs(tokenizer)
    lengths = [len(tokenizer.encode(rendered(maker.draw(), maker.rng), add_special_tokens=False).ids) for _ in range(20_000)]
    print(f"tokens per sample: mean {sum(lengths) / len(lengths):.0f}, longest {max(lengths)}, "
          f"above {CONTEXT}: {sum(length > CONTEXT for length in lengths)}")


if __name__ == "__main__":
    main()
