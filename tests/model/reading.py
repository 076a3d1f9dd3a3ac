"""What the model reads off its prompt: texts and questions about them, quotes, JSON.

Enters: draws. Leaves: samples whose answers stand in the prompt, and JSON of the world.
Never happens: a question has two answers; the records of a text differ in their keys.
"""

import json
import re

from draws import Draws
from phrasings import ANIMALS, COLOURS, OBJECTS, RECORD_KINDS, SPOTS, THINGS, TRADES, UNITS, WEEKDAYS, WHERE, WINDS
from world import GOODS, HARBOURS, SHIPS


class Reading(Draws):
    """Samples about texts in the prompt."""

    # --- Texts in the prompt ---

    def record(self, kind=None):
        """One small matter of which a text can speak: sentence, key, and what can be asked of it."""
        kind = kind or self.one(RECORD_KINDS)
        if kind == "voyage":
            v = {"boat": self.name(), "from": self.name(), "to": self.name(), "master": self.name(), "count": self.number(),
                 "unit": self.one(UNITS), "goods": self.one(GOODS), "day": self.one(WEEKDAYS)}
            text = self.pick(
                "The {boat} left {from} on {day} with {count} {unit} of {goods}, bound for {to}. Her master is {master}.",
                "On {day} the {boat}, under {master}, sailed from {from} to {to} carrying {count} {unit} of {goods}.",
                "Bound for {to}, the {boat} left {from} on {day}. Her master {master} had loaded {count} {unit} of {goods}.")
            asks = {
                "master": (["Who is the master of the {boat}?", "Who commands the {boat}?"], "The master of the {boat} is {master}."),
                "from": (["Where did the {boat} leave from?", "From where did the {boat} sail?"], "The {boat} left {from}."),
                "to": (["Where is the {boat} bound?", "What is the destination of the {boat}?"], "The {boat} is bound for {to}."),
                "count": (["How many {unit} does the {boat} carry?", "How many {unit} are on the {boat}?"],
                          "The {boat} carries {count} {unit}."),
                "goods": (["What does the {boat} carry?", "What is the cargo of the {boat}?"], "The {boat} carries {goods}."),
                "day": (["When did the {boat} leave?", "On which day did the {boat} sail?"], "The {boat} left on {day}."),
            }
            return text, "boat", v, asks
        if kind == "person":
            v = {"person": self.name(), "trade": self.one(TRADES), "town": self.name(), "age": self.number(18, 80),
                 "animal": self.one(ANIMALS), "pet": self.name()}
            text = self.pick(
                "{person} is a {trade} from {town}, {age} years old, with a {animal} called {pet}.",
                "{person}, aged {age}, works as a {trade} in {town} and keeps a {animal} named {pet}.")
            asks = {
                "trade": (["What does {person} work as?", "What is the trade of {person}?"], "{person} is a {trade}."),
                "town": (["Where does {person} come from?", "Which town does {person} come from?"], "{person} comes from {town}."),
                "age": (["How old is {person}?", "What is the age of {person}?"], "{person} is {age} years old."),
                "pet": (["What is the {animal} of {person} called?", "What is the name of the {animal} of {person}?"],
                        "The {animal} of {person} is called {pet}."),
            }
            return text, "person", v, asks
        if kind == "store":
            v = {"shed": f"{self.one('ABCDEFGHJK')}{self.number(1, 99)}", "count": self.number(), "unit": self.one(UNITS),
                 "goods": self.one(GOODS), "keeper": self.name(), "code": self.code()}
            text = self.pick(
                "Shed {shed} holds {count} {unit} of {goods}; its keeper is {keeper} and its lock opens with {code}.",
                "In shed {shed} there are {count} {unit} of {goods}. {keeper} keeps it, and the code of the lock is {code}.")
            asks = {
                "count": (["How many {unit} are in shed {shed}?", "How many {unit} does shed {shed} hold?"],
                          "Shed {shed} holds {count} {unit}."),
                "goods": (["What is in shed {shed}?", "What does shed {shed} hold?"], "Shed {shed} holds {goods}."),
                "keeper": (["Who keeps shed {shed}?", "Who is the keeper of shed {shed}?"], "{keeper} keeps shed {shed}."),
                "code": (["What is the code of shed {shed}?", "Which code opens shed {shed}?"],
                         "The code of shed {shed} is {code}."),
            }
            return text, "shed", v, asks
        if kind == "price":
            v = {"goods": self.one(GOODS), "price": self.number(), "seller": self.name(), "town": self.name()}
            text = self.pick("In {town} {seller} sells {goods} for {price} crowns.",
                             "{seller} of {town} asks {price} crowns for {goods}.")
            asks = {
                "price": (["What does {seller} ask for {goods}?", "How much does {seller} want for {goods}?"],
                          "{seller} asks {price} crowns for {goods}."),
                "town": (["Where does {seller} sell {goods}?", "In which town is {seller}?"], "{seller} sells {goods} in {town}."),
                "goods": (["What does {seller} sell?", "Which goods does {seller} sell?"], "{seller} sells {goods}."),
            }
            return text, "seller", v, asks
        if kind == "ferry":
            v = {"ferry": self.name(), "time": f"{self.number(5, 22)}:{self.rng.randint(10, 59)}", "pier": self.number(1, 30),
                 "to": self.name()}
            text = self.pick("The ferry {ferry} goes to {to} at {time} from pier {pier}.",
                             "At {time} the ferry {ferry} leaves pier {pier} for {to}.")
            asks = {
                "time": (["When does the ferry {ferry} leave?", "At what time does the ferry {ferry} go?"],
                         "The ferry {ferry} leaves at {time}."),
                "pier": (["From which pier does the ferry {ferry} leave?", "Which pier does the ferry {ferry} use?"],
                         "The ferry {ferry} leaves from pier {pier}."),
                "to": (["Where does the ferry {ferry} go?", "What is the destination of the ferry {ferry}?"],
                       "The ferry {ferry} goes to {to}."),
            }
            return text, "ferry", v, asks
        if kind == "thing":
            v = {"owner": self.name(), "thing": self.one(THINGS),
                 "value": self.pick(self.name(), self.word(), self.code(), str(self.number()))}
            asks = {"value": (["What is the {thing} of {owner}?", "Tell me the {thing} of {owner}."], "The {thing} of {owner} is {value}.")}
            return self.pick("The {thing} of {owner} is {value}.", "{owner} has a {thing}: {value}."), "owner", v, asks
        if kind == "spot":
            v = {"object": self.one(OBJECTS), "where": self.one(WHERE), "spot": self.one(SPOTS), "owner": self.name()}
            asks = {"spot": (["Where is the {object}?", "Where can I find the {object}?"], "The {object} is {where} the {spot}."),
                    "owner": (["Who put down the {object}?", "Who left the {object}?"], "{owner} left the {object}.")}
            return self.pick("{owner} left the {object} {where} the {spot}.", "The {object} is {where} the {spot}; {owner} left it."), \
                "object", v, asks
        v = {"place": self.name(), "wind": self.one(WINDS), "knots": self.number(1, 60), "keeper": self.name()}
        text = self.pick("At {place} the wind was {wind} at {knots} knots, {keeper} reports.",
                         "{keeper} writes from {place}: wind {wind}, {knots} knots.")
        asks = {
            "wind": (["From where did the wind blow at {place}?", "What was the wind at {place}?"],
                     "At {place} the wind was {wind}."),
            "knots": (["How strong was the wind at {place}?", "How many knots did the wind reach at {place}?"],
                      "At {place} the wind reached {knots} knots."),
            "keeper": (["Who reports from {place}?", "Who wrote from {place}?"], "{keeper} reports from {place}."),
        }
        return text, "place", v, asks

    def records(self, count):
        """Records whose keys differ, so that every question has one answer."""
        kinds = [self.one(RECORD_KINDS) for _ in range(self.rng.randint(1, 3))]
        chosen, keys = [], set()
        for _ in range(10 * count):  # some kinds have few keys, and then give fewer records
            if len(chosen) == count:
                break
            text, key, v, asks = self.record(self.one(kinds))
            if v[key] not in keys:
                keys.add(v[key])
                chosen.append((text.format(**v), key, v, asks))
        return chosen

    def text_of(self, records):
        lines = [record[0] for record in records]
        if self.chance(0.4):
            mark = self.pick("- {}", "{}", "* {}")
            return "\n".join(mark.format(line) for line in lines)
        return " ".join(lines)

    def extraction(self, count=None):
        """A text, then one or more questions about it; sometimes the text is in the system message."""
        records = self.records(count or self.pick(1, 2, 3, 3, 4, 5, 6, 8))
        text, turns, check = self.text_of(records), [], None
        asked = []
        for _ in range(self.pick(1, 1, 2, 3) if count is None else self.rng.randint(4, 10)):
            _, _, v, asks = self.one(records)
            frame, reply = asks[self.one(sorted(asks))]
            field = next(f for f, pair in asks.items() if pair[1] == reply)
            asked.append((self.one(frame).format(**v), reply.format(**v), str(v[field])))
        for i, (question, answer, value) in enumerate(asked):
            if i == 0 and not self.chance(0.12):
                question = self.pick(
                    f"Read this text:\n{text}\n\n{question}", f"{text}\n\n{question}", f"{question}\n\n{text}",
                    f"Answer from the text.\n\nText: {text}\n\nQuestion: {question}", f"Here is a note: {text}\n{question}")
            elif i == 0:
                turns.append(("system", self.pick("You answer questions about this text:\n", "Notes:\n", "") + text))
            turns += [("user", question), ("assistant", answer)]
            check = value
        return self.sample("extraction", turns, {"kind": "contains", "answer": check})

    def quote(self):
        kind = self.rng.random()
        if kind < 0.35:
            records = self.records(self.rng.randint(1, 6))
            text = self.text_of(records)
            sentence, key, v, _ = self.one(records)
            ask = self.pick("Quote what the text says about {}.", "Quote the passage about {}.", "What exactly does the text say about {}?")
            ask = ask.format({"shed": "shed ", "object": "the "}.get(key, "") + str(v[key]))
            answer = f'"{sentence}"'
            return self.sample("quote", [("user", self.pick(f"{text}\n\n{ask}", f"{ask}\n\n{text}")), ("assistant", answer)],
                               {"kind": "exact", "answer": answer})
        if kind < 0.6:
            sentences = [self.sentence() for _ in range(self.rng.randint(1, 5))]
            at = self.rng.randrange(len(sentences))
            others = set(re.findall(r"\w+", " ".join(sentences[:at] + sentences[at + 1:])))
            alone = [word for word in re.findall(r"\w+", sentences[at]) if word not in others]
            ask, answer = ("Repeat the text.", " ".join(sentences)) if not alone or self.chance(0.5) else (
                f'Quote the sentence with the word "{self.one(alone)}".', f'"{sentences[at]}"')
            if self.chance(0.3):
                return self.sample("quote", [("user", "Repeat exactly: " + " ".join(sentences)), ("assistant", " ".join(sentences))],
                                   {"kind": "exact", "answer": " ".join(sentences)})
            return self.sample("quote", [("user", " ".join(sentences) + "\n\n" + ask), ("assistant", answer)],
                               {"kind": "exact", "answer": answer})
        if kind < 0.85:
            words = " ".join(self.pick(self.name(), self.word(), self.code(), str(self.number()), self.one(GOODS), self.one(COLOURS))
                             for _ in range(self.rng.randint(1, 14)))
            if self.chance(0.25):
                words += " " + chr(self.rng.choice((self.rng.randint(0x1F300, 0x1F5FF), self.rng.randint(0x1F600, 0x1F64F),
                                                   self.rng.randint(0x4E00, 0x9FA5), self.rng.randint(0x400, 0x44F), 0x1F6A2)))
            ask = self.pick("Repeat exactly: {}", "Repeat after me: {}", "Copy this text: {}", "Say this again, word for word: {}")
            return self.sample("quote", [("user", ask.format(words)), ("assistant", words)], {"kind": "exact", "answer": words})
        lines = [self.pick(self.name(), self.code(), f"{self.name()} {self.name()}") for _ in range(self.rng.randint(3, 8))]
        which = self.pick("first", "last", "second", "third")
        line = lines[{"first": 0, "last": -1, "second": 1, "third": 2}[which]]
        ask = self.pick("What is the {} line?", "Give me the {} line.").format(which)
        return self.sample("quote", [("user", "\n".join(lines) + f"\n\n{ask}"), ("assistant", line)],
                           {"kind": "exact", "answer": line})

    # --- JSON ---

    def json_answer(self):
        if self.chance(0.4):
            what = self.pick("ship", "harbour")
            name = self.one(list(SHIPS if what == "ship" else HARBOURS))
            facts = (SHIPS if what == "ship" else HARBOURS)[name]
            keys = self.rng.sample(sorted(facts), self.rng.randint(1, 4))
            value = {"name": name, **{key: facts[key] for key in keys}}
            named = "the " + name if what == "ship" else name
            listed = ", ".join(value)
            ask = self.pick(f"Describe {named} as JSON with the keys {listed}.", f"JSON with {listed} for {named}, please.",
                            f"Give me {listed} of {named} as a JSON object.")
        else:
            records = self.records(self.rng.randint(1, 4))
            _, key, v, _ = self.one(records)
            keys = [key] + self.rng.sample(sorted(k for k in v if k != key), self.rng.randint(1, min(4, len(v) - 1)))
            value = {k: v[k] for k in keys}
            listed, named = ", ".join(keys), {"shed": "shed ", "object": "the "}.get(key, "") + str(v[key])
            ask = self.pick(f"Extract {listed} for {named} as JSON.", f"Give me {listed} of {named} as a JSON object.",
                            f"JSON with {listed} for {named}, please.")
            text = self.text_of(records)
            ask = self.pick(f"{text}\n\n{ask}", f"{ask}\n\n{text}")
        return self.sample("json", [("user", ask), ("assistant", json.dumps(value, ensure_ascii=False))],
                           {"kind": "json", "answer": value})
