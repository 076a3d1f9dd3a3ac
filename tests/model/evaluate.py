"""Asks the bundled model every held-out question, greedily in bf16, and counts right answers per family.

Enters: a checkpoint folder and heldout.json. Leaves: scores on standard output and, with --scores, as JSON; exit status 1 below
--least. Never happens: the model is shown the answer that is asked of it. In a conversation it reads what it itself said before;
only in the very long ones (above ROUNDS_MAX rounds) do the earlier answers stand as given, to keep the time in bounds.

Run: python tests/model/evaluate.py [--model tests/model] [--scores tests/model/scores.json]   (torch 2.11, transformers 5.17)
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from checks import right

HERE = Path(__file__).resolve().parent
ANSWER_TOKENS_MAX = 160
ROUNDS_MAX = 8


def generate(model, tokenizer, prompts, batch):
    """Greedy answers to rendered prompts; those of like length together, padded on the left."""
    answers, order = [None] * len(prompts), sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for at in range(0, len(order), batch):
        chosen = order[at:at + batch]
        inputs = tokenizer([prompts[i] for i in chosen], return_tensors="pt", padding=True, add_special_tokens=False,
                           return_token_type_ids=False).to(model.device)
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS_MAX, do_sample=False)
        for i, row in zip(chosen, out[:, inputs["input_ids"].shape[1]:]):
            answers[i] = tokenizer.decode(row, skip_special_tokens=True)
    return answers


def rounds_of(item):
    return sum(message["role"] == "assistant" for message in item["messages"])


def answer_all(model, tokenizer, items, batch):
    """Every item round by round: all items whose next turn is the assistant's are answered together."""
    talks = [[] if rounds_of(item) <= ROUNDS_MAX else item["messages"][:-1] for item in items]
    rounds = min(ROUNDS_MAX, max(map(rounds_of, items)))
    for _ in range(rounds):
        waiting = []
        for i, item in enumerate(items):
            while len(talks[i]) < len(item["messages"]) and item["messages"][len(talks[i])]["role"] != "assistant":
                talks[i].append(item["messages"][len(talks[i])])
            if len(talks[i]) < len(item["messages"]):
                waiting.append(i)
        prompts = [tokenizer.apply_chat_template(talks[i], tools=items[i].get("tools"), tokenize=False, add_generation_prompt=True)
                   for i in waiting]
        for i, answer in zip(waiting, generate(model, tokenizer, prompts, batch)):
            talks[i].append({"role": "assistant", "content": answer})
    return talks


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=HERE)
    parser.add_argument("--scores", type=Path)
    parser.add_argument("--least", type=float, default=0.95)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--wrong", type=int, default=20, help="wrong answers to print")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(given.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16).to(device).eval()
    items = json.loads((HERE / "heldout.json").read_text())
    scores, wrong = {}, []
    for item, talk in zip(items, answer_all(model, tokenizer, items, given.batch)):
        good = right(item["check"], talk[-1]["content"])
        score = scores.setdefault(item["family"], {"right": 0, "of": 0})
        score["right"] += good
        score["of"] += 1
        if not good:
            wrong.append((item, talk))
    total = {key: sum(score[key] for score in scores.values()) for key in ("right", "of")}
    for family, score in [*scores.items(), ("all", total)]:
        print(f"{family:16} {score['right']:4} of {score['of']:4}  {score['right'] / score['of']:.1%}")
    for item, talk in wrong[:given.wrong]:
        print(f"\nwrong ({item['family']}): {talk[-2]['content'][-300:]!r}\n  said     {talk[-1]['content']!r}\n  expected {item['check']}")
    if given.scores:
        given.scores.write_text(json.dumps({"families": scores, "all": total}, indent=1) + "\n")
    sys.exit(total["right"] < given.least * total["of"])


if __name__ == "__main__":
    main()
