"""The corpus of the bundled model: endless conversations and prose about the Lantern Coast, and skills that need no world.

Enters: a seed and whether held-out material is wanted. Leaves: samples, each {"family", "messages", "tools", "check"} or
{"family", "prose"}; `python corpus.py heldout` writes heldout.json, `python corpus.py show` prints examples.
Never happens: a held-out name, number pair, code or phrasing occurs in training (see draws.py).

`check` says how the last answer is judged: its "kind" is contains, exact, number, json or tool, its "answer" the expected one.
"""

import json
import sys
from pathlib import Path

from knowledge import Knowledge
from phrasings import NOTED
from reading import Reading
from talking import Talking

HERE = Path(__file__).resolve().parent
HELD_OUT_SEED = 7_000_001


class Maker(Knowledge, Reading, Talking):
    """Draws samples of every family."""

    def draw(self):
        return getattr(self, self.rng.choices(FAMILIES, WEIGHTS)[0])()

    def long(self):
        kind = self.rng.random()
        if kind < 0.6:
            return self.extraction(self.rng.randint(12, 62))
        turns, facts = [], {}
        while len(facts) < 6:
            kind_, says, asks, answer, value = self.user_fact()
            if kind_ not in facts:
                facts[kind_] = (asks, answer, value)
                turns += [("user", self.one(says)), ("assistant", self.one(NOTED))]
                for _ in range(self.rng.randint(0, 6)):
                    turns += self.side_turn()
        check = None
        for _ in range(6):
            turns, check = self.ask_back(turns, facts)
        return self.sample("recall", turns, {"kind": "contains", "answer": check})


# Share of samples (not of tokens) per family; `long` has about twenty times the tokens of the others.
MIX = {"world": 14, "conversation": 7, "describe": 5, "story": 1, "prose": 2, "recall": 12, "extraction": 25, "quote": 15,
       "arithmetic": 12, "json_answer": 9, "tool_call": 11, "manners": 2, "long": 3}
FAMILIES, WEIGHTS = list(MIX), list(MIX.values())
HELD_OUT_COUNTS = {"world": 80, "conversation": 30, "describe": 10, "recall": 50, "extraction": 60, "quote": 40, "arithmetic": 60,
                   "json_answer": 30, "tool_call": 40, "long": 20}


def make_held_out():
    """Items with a check; the assistant turns before the last stand as reference, the model answers each itself."""
    maker, items = Maker(HELD_OUT_SEED, held=True), []
    for family, count in HELD_OUT_COUNTS.items():
        made = 0
        while made < count:
            sample = getattr(maker, family)()
            if sample["check"] is None:
                continue
            made += 1
            items.append({"family": "long " + sample["family"] if family == "long" else sample["family"],
                          "messages": [{"role": role, "content": content} for role, content in sample["messages"]],
                          **({"tools": sample["tools"]} if sample["tools"] else {}), "check": sample["check"]})
    return items


def main():
    if sys.argv[1:] == ["heldout"]:
        lines = ",\n".join(json.dumps(item, ensure_ascii=False) for item in make_held_out())
        (HERE / "heldout.json").write_text(f"[\n{lines}\n]\n")
    else:
        for family in FAMILIES:
            print(f"=== {family}\n" + json.dumps(getattr(Maker(5), family)(), ensure_ascii=False, indent=1)[:2500])


if __name__ == "__main__":
    main()
