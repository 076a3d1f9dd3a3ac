"""The corpus of the bundled model: endless conversations and prose about the Lantern Coast, and skills that need no world.

Enters: a random generator and whether held-out material is wanted. Leaves: samples, each {"family", "messages", "tools", "check"}
or {"family", "prose"}; `python corpus.py heldout` writes heldout.json, `python corpus.py show` prints examples.
Never happens: a held-out name, number pair, code or phrasing occurs in training. `held_out` and `sides_of` decide by a
hash of the thing itself, so both sides know without a list.

`check` says how the last answer is judged: {"kind": "contains", "answer"}, {"kind": "exact", "answer"} or {"kind": "json", "answer"}.
"""

import functools
import json
import random
import re
import sys
import zlib
from pathlib import Path

from phrasings import (
    ACCENTED, ANIMALS, CAPTAIN_FRAMES, CODAS, COLOURS, COMMON, DESCRIBE_FRAMES, DESCRIBE_TAILS, EXPORT_FRAMES, FIRST, LIGHT_FRAMES,
    MASTER_FRAMES, NOTED, OBJECTS, ONSETS, PERSON_FRAMES, QUESTIONS, RECORD_KINDS, RELATIVES, SHE, SMALL_TALK, SPOTS, SUM_FRAMES, THERE,
    THINGS, TOOLS, TRADES, UNITS, USER_FACTS, VOWELS, WEEKDAYS, WHERE, WIDE_CONSONANTS, WIDE_VOWELS, WINDS,
)
from world import GOODS, HARBOURS, PEOPLE, SHIPS

HERE = Path(__file__).resolve().parent
HELD_OUT_SEED = 7_000_001


def held_out(thing):
    """One in ten of everything is kept for the questions that the model must never have seen."""
    return zlib.crc32(str(thing).encode()) % 10 == 0


@functools.cache
def sides_of(pool):
    """(trained, held out): of a small closed pool, the eighth with the lowest hashes, and at least one, is held out."""
    ranked = sorted(pool, key=lambda thing: zlib.crc32(str(thing).encode()))
    cut = max(1, len(ranked) // 8)
    return ranked[cut:], ranked[:cut]


def lowered(text):
    return text[0].lower() + text[1:]


class Maker:
    """Draws samples. `held` asks for held-out material where a family has such, and for training material otherwise."""

    def __init__(self, seed, held=False):
        self.rng, self.held = random.Random(seed), held

    # --- Small draws ---

    def pick(self, *choices):
        return self.rng.choice(choices)

    def one(self, choices):
        return self.rng.choice(choices)

    def chance(self, p):
        return self.rng.random() < p

    def right_side(self, thing):
        return held_out(thing) == self.held

    def until(self, draw):
        """Draws until the thing belongs to this side of the held-out line."""
        for _ in range(1000):
            thing = draw()
            if self.right_side(thing):
                return thing
        raise AssertionError("a pool has nothing on this side of the held-out line")

    def from_pool(self, pool):
        return self.one(sides_of(tuple(pool))[self.held])

    def word(self):
        """Half of all words are made of the same syllables; the others are of any shape, so that any name can be copied."""
        rng, shape = self.rng, self.rng.random()
        if shape < 0.15:
            return rng.choice(FIRST).lower()
        if shape < 0.3:
            turns = (WIDE_VOWELS, WIDE_CONSONANTS) if rng.random() < 0.5 else (WIDE_CONSONANTS, WIDE_VOWELS)
            return "".join(rng.choice(turns[i % 2]) for i in range(rng.randint(3, 6)))
        if shape < 0.4:
            return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 7)))
        syllables = rng.choice((1, 2, 2, 2, 3))
        text = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(syllables)) + rng.choice(CODAS)
        if rng.random() < 0.05:
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(ACCENTED) + text[at + 1:]
        return text

    def sentence(self):
        """Common words in any order, with the marks of a sentence."""
        words = [self.pick(self.one(COMMON), self.one(COMMON), self.one(COMMON), self.one(COMMON), self.name(), str(self.number()))
                 for _ in range(self.rng.randint(3, 10))]
        if self.chance(0.2):
            words[self.rng.randrange(len(words) - 1)] += self.pick(",", ";", ":", " -")
        text = " ".join(words)
        return text[0].upper() + text[1:] + self.pick(".", ".", ".", "!", "?")

    def name(self):
        return self.until(lambda: self.word().capitalize())

    def code(self):
        return self.until(lambda: self.pick(
            f"{self.word()}-{self.rng.randint(10, 99)}", f"{self.rng.randint(1000, 9999)}",
            f"{self.one('ABCDEFGHJKLMNPRSTUVWXYZ')}{self.one('ABCDEFGHJKLMNPRSTUVWXYZ')}{self.rng.randint(100, 999)}"))

    def number(self, low=2, high=99):
        return self.rng.randint(low, high)

    def phrasing(self, attribute, frames, nouns):
        """A frame around a noun phrase; one combination in eight per attribute is held out."""
        return self.from_pool(tuple(f"{attribute}|{frame}|{noun}" for frame in frames for noun in nouns)).split("|")[1:]

    # --- Questions about the world ---

    def world_question(self, about=None, attribute=None, entity=None):
        """(question, answer sentence, key) about one fact; `entity` may be given, and may be a pronoun phrase for follow-ups."""
        about = about or self.pick("harbour", "ship", "ship", "harbour", "inverse")
        if about == "inverse":
            return self.inverse_question()
        facts_of = HARBOURS if about == "harbour" else SHIPS
        entity = entity or self.one(list(facts_of))
        attribute = attribute or self.one(list(facts_of[entity]))
        named = entity if about == "harbour" else "the " + entity
        frames, nouns, answers = QUESTIONS[about][attribute]
        frame, noun = self.phrasing(about + attribute, frames, nouns)
        value = str(facts_of[entity][attribute])
        question = frame.format(noun.format(e=named))
        answer = self.one(answers).format(e=named, v=value)
        return self.politely(question[0].upper() + question[1:]), answer[0].upper() + answer[1:], value

    def politely(self, question):
        if self.chance(0.75):
            return question
        if self.chance(0.3):
            return question.lower().rstrip("?.")
        return self.pick(f"Please tell me: {lowered(question)}", f"I have a question. {question}", f"Hello! {question}",
                         f"{question} Answer in one sentence.", f"Quick question: {lowered(question)}")

    def inverse_question(self):
        kind = self.pick("person", "export", "light", "captain", "master")
        if kind == "person":
            person = self.one(list(PEOPLE))
            what, where = PEOPLE[person]
            frame, _ = self.phrasing("person", PERSON_FRAMES, [""])
            role = f"the harbour master of {where}" if what == "harbour" else f"the captain of the {where}"
            return frame.format(person), f"{person} is {role}.", where
        harbour = self.one(list(HARBOURS))
        facts = HARBOURS[harbour]
        if kind == "export":
            frame, _ = self.phrasing("which-export", EXPORT_FRAMES, [""])
            return frame.format(facts["export"]), f"{harbour} exports {facts['export']}.", harbour
        if kind == "light":
            frame, _ = self.phrasing("which-light", LIGHT_FRAMES, [""])
            return frame.format(facts["light"]), f"The {facts['light']} stands at {harbour}.", harbour
        if kind == "master":
            frame, _ = self.phrasing("which-master", MASTER_FRAMES, [""])
            return frame.format(facts["master"]), f"{facts['master']} is the harbour master of {harbour}.", harbour
        ship = self.one(list(SHIPS))
        captain = SHIPS[ship]["captain"]
        frame, _ = self.phrasing("which-captain", CAPTAIN_FRAMES, [""])
        return frame.format(captain), f"{captain} is the captain of the {ship}.", ship

    def world(self):
        if self.chance(0.05):
            return self.unknown()
        if self.chance(0.12):
            return self.two_hops()
        question, answer, key = self.world_question()
        return self.sample("world", [("user", question), ("assistant", answer)], {"kind": "contains", "answer": key})

    def unknown(self):
        name, what = self.name(), self.pick("ship", "harbour")
        attribute = self.one(list((SHIPS["Grey Petrel"] if what == "ship" else HARBOURS["Plimsoll Bay"])))
        frames, nouns, _ = QUESTIONS[what][attribute]
        question = self.one(frames).format(self.one(nouns).format(e=("the " if what == "ship" else "") + name))
        answer = f"I do not know a {what} called {name}."
        return self.sample("world", [("user", question[0].upper() + question[1:]), ("assistant", answer)],
                           {"kind": "exact", "answer": answer})

    def two_hops(self):
        ship = self.from_pool(SHIPS)
        home = SHIPS[ship]["home"]
        attribute = self.pick("master", "light", "export", "region")
        value = HARBOURS[home][attribute]
        question, tail = {
            "master": (self.pick("Who is the harbour master of the home harbour of the {}?", "Who runs the home harbour of the {}?"),
                       "whose harbour master is {}."),
            "light": ("Which lighthouse stands at the home harbour of the {}?", "where the {} stands."),
            "export": ("What does the home harbour of the {} export?", "which exports {}."),
            "region": ("In which region does the home harbour of the {} lie?", "which lies in {}."),
        }[attribute]
        answer = f"The home harbour of the {ship} is {home}, {tail.format(value)}"
        return self.sample("world", [("user", question.format(ship)), ("assistant", answer)], {"kind": "contains", "answer": value})

    # --- A conversation that goes on ---

    def conversation(self, rounds=None):
        """Follow-ups that say "she", "there" or "its" of what was spoken of last."""
        turns, check = [], None
        ship = self.one(list(SHIPS))
        for _ in range(rounds or self.rng.randint(1, 3)):
            if self.chance(0.6):
                ship = self.one(list(SHIPS))
                facts = SHIPS[ship]
                question, answer, key = self.world_question("ship", entity=ship)
                turns += [("user", question), ("assistant", answer)]
                for attribute in self.rng.sample(sorted(facts), self.rng.randint(1, 3)):
                    question = self.one(SHE[attribute])
                    answer = self.one(QUESTIONS["ship"][attribute][2]).format(e="the " + ship, v=facts[attribute])
                    turns += [("user", question), ("assistant", answer[0].upper() + answer[1:])]
                    check = str(facts[attribute])
                    if attribute == "home" and self.chance(0.6):
                        turns, check = self.there(turns, facts["home"])
            else:
                harbour = self.one(list(HARBOURS))
                question, answer, _ = self.world_question("harbour", entity=harbour)
                turns += [("user", question), ("assistant", answer)]
                turns, check = self.there(turns, harbour)
        return self.sample("conversation", turns, {"kind": "contains", "answer": check})

    def there(self, turns, harbour):
        facts, check = HARBOURS[harbour], None
        for attribute in self.rng.sample(sorted(facts), self.rng.randint(1, 2)):
            answer = self.one(QUESTIONS["harbour"][attribute][2]).format(e=harbour, v=facts[attribute])
            turns = turns + [("user", self.one(THERE[attribute])), ("assistant", answer[0].upper() + answer[1:])]
            check = str(facts[attribute])
        return turns, check

    # --- Descriptions and prose ---

    def ship_sentences(self, name):
        f = SHIPS[name]
        return [
            self.pick(f"The {name} is a {f['kind']} launched in {f['launched']}.",
                      f"The {name}, a {f['kind']}, was launched in {f['launched']}."),
            self.pick(f"Her captain is {f['captain']}.", f"She sails under Captain {f['captain']}."),
            self.pick(f"Her home harbour is {f['home']}, in {HARBOURS[f['home']]['region']}.",
                      f"She belongs to {f['home']}, a harbour in {HARBOURS[f['home']]['region']}."),
            self.pick(f"She usually carries {f['cargo']}.", f"Most of her voyages are made with {f['cargo']} in the hold."),
            self.pick(f"A crew of {f['crew']} works her sails.", f"She needs a crew of {f['crew']}."),
        ]

    def harbour_sentences(self, name):
        f = HARBOURS[name]
        ships = [ship for ship, facts in SHIPS.items() if facts["home"] == name]
        return [
            self.pick(f"{name} is a harbour in {f['region']}, founded in {f['founded']}.",
                      f"{name} lies in {f['region']} and was founded in {f['founded']}."),
            self.pick(f"The harbour master is {f['master']}.", f"It is run by {f['master']}, the harbour master."),
            self.pick(f"The harbour has {f['berths']} berths.", f"There are {f['berths']} berths along the quay."),
            self.pick(f"Its main export is {f['export']}.", f"Merchants come here to buy {f['export']}."),
            self.pick(f"At night the {f['light']} shows ships the way in.", f"The {f['light']} marks the entrance."),
            self.pick(f"The {ships[0]} calls it home.", f"It is the home harbour of the {ships[0]}."),
        ]

    def describe(self):
        what = self.pick("ship", "harbour")
        name = self.one(list(SHIPS if what == "ship" else HARBOURS))
        sentences = self.ship_sentences(name) if what == "ship" else self.harbour_sentences(name)
        named = "the " + name if what == "ship" else name
        frame, tail = self.phrasing("describe", DESCRIBE_FRAMES, DESCRIBE_TAILS)
        key = str((SHIPS if what == "ship" else HARBOURS)[name]["captain" if what == "ship" else "master"])
        return self.sample("describe", [("user", frame.replace("@", tail).format(named)), ("assistant", " ".join(sentences))],
                           {"kind": "contains", "answer": key})

    def story_text(self):
        ship = self.one(list(SHIPS))
        f = SHIPS[ship]
        other = self.one([h for h in HARBOURS if h != f["home"]])
        weather = self.pick("a fair wind", "a grey sky", "a light rain", "a hard frost", "a low mist", "a bright moon")
        trouble = self.pick("a rope broke in the night", "the fog came down", "the wind died", "a boy fell from the mast",
                            "the pump began to fail", "a strange light rose ahead")
        cure = self.pick("The crew kept calm and worked until morning", "Nobody slept until it was put right",
                         f"Captain {f['captain']} gave three short orders and all was well",
                         "The cook sang, and the work went quickly")
        return " ".join([
            self.pick(f"On a {self.one(WEEKDAYS)} with {weather} the {f['kind']} {ship} left {f['home']}.",
                      f"The {ship} left {f['home']} with {weather}."),
            f"Captain {f['captain']} had {f['cargo']} in the hold and a crew of {f['crew']}.",
            f"On the second day {trouble}.", cure + ".",
            self.pick(f"At last they saw the {HARBOURS[other]['light']} and came into {other}.",
                      f"Two days later they reached {other}, where {HARBOURS[other]['master']} is harbour master."),
            self.pick("The cargo was dry, and everyone was paid.", "That evening there was soup and music on the quay.",
                      "The captain wrote one line in the log: all safe.", "It was good to be in harbour again."),
        ])

    def story(self):
        ask = self.pick("Tell me a short story about a ship.", "Write a short story about the sea.", "Please tell me a story.",
                        "Write a few sentences about a voyage.", "Can you tell me a story about a voyage?")
        text = self.story_text()
        return self.sample("describe", [("user", ask), ("assistant", text)], None)

    def prose(self):
        parts = []
        for _ in range(self.rng.randint(1, 6)):
            kind = self.rng.random()
            if kind < 0.4:
                parts.append(self.story_text())
            elif kind < 0.7:
                parts.append(" ".join(self.harbour_sentences(self.one(list(HARBOURS)))))
            else:
                parts.append(" ".join(self.ship_sentences(self.one(list(SHIPS)))))
        return {"family": "prose", "prose": "\n\n".join(parts)}

    # --- What the user said before ---

    def user_fact(self):
        """(kind, statements, questions, answer, value): something that a user says of themselves."""
        kind = self.one(USER_FACTS)
        if kind == "name":
            v = self.name()
            return kind, [f"My name is {v}.", f"I am called {v}.", f"Hello, I am {v}.", f"Hi, my name is {v}."], \
                ["What is my name?", "Do you remember my name?", "Who am I?", "What am I called?"], f"Your name is {v}.", v
        if kind == "berth":
            v = str(self.number())
            return kind, [f"My berth is number {v}.", f"I have berth {v}.", f"My boat lies at berth {v}."], \
                ["What is my berth number?", "Which berth do I have?", "At which berth does my boat lie?"], \
                f"Your berth is number {v}.", v
        if kind == "colour":
            v = self.one(COLOURS)
            return kind, [f"My favourite colour is {v}.", f"I like {v} best of all colours."], \
                ["What is my favourite colour?", "Which colour do I like best?"], f"Your favourite colour is {v}.", v
        if kind == "boat":
            v = self.name()
            return kind, [f"My boat is called {v}.", f"I sail a boat named {v}.", f"The name of my boat is {v}."], \
                ["What is my boat called?", "What is the name of my boat?", "Which boat do I sail?"], \
                f"Your boat is called {v}.", v
        if kind == "town":
            v = self.name()
            return kind, [f"I come from {v}.", f"My home town is {v}.", f"I was born in {v}."], \
                ["Where do I come from?", "What is my home town?", "Where was I born?"], f"You come from {v}.", v
        if kind == "code":
            v = self.code()
            return kind, [f"The password is {v}.", f"Remember the password {v}.", f"Please keep this password for me: {v}."], \
                ["What is the password?", "Tell me the password again.", "Which password did I give you?"], \
                f"The password is {v}.", v
        if kind == "animal":
            v, animal = self.name(), self.one(ANIMALS)
            return animal, [f"My {animal} is called {v}.", f"I have a {animal} named {v}."], \
                [f"What is my {animal} called?", f"What is the name of my {animal}?"], f"Your {animal} is called {v}.", v
        if kind == "relative":
            v, relative = self.name(), self.one(RELATIVES)
            return relative, [f"My {relative} is called {v}.", f"The name of my {relative} is {v}."], \
                [f"What is my {relative} called?", f"What is the name of my {relative}?"], f"Your {relative} is called {v}.", v
        if kind == "thing":
            thing, v = self.one(THINGS), self.pick(self.name(), self.name(), self.word(), self.code(), str(self.number()), self.one(COMMON))
            return thing, [f"My {thing} is {v}.", f"Remember that my {thing} is {v}."], \
                [f"What is my {thing}?", f"Tell me my {thing}.", f"Do you remember my {thing}?"], f"Your {thing} is {v}.", v
        if kind == "trade":
            v = self.one(TRADES)
            return kind, [f"I am a {v}.", f"I work as a {v}.", f"My trade is {v}."], \
                ["What is my trade?", "What do I work as?"], f"You work as a {v}.", v
        v = self.one(WEEKDAYS)
        return "day", [f"I sail on {v}.", f"My ship leaves on {v}."], ["When do I sail?", "On which day do I sail?"], \
            f"You sail on {v}.", v

    def recall(self, length=None):
        """Facts told in several rounds, other talk between, then questions about the facts."""
        facts, used, turns, check = {}, set(), [], None
        rounds = length or self.rng.randint(2, 6)
        for _ in range(rounds):
            told, lines = self.rng.random(), []
            if told < 0.6 or not facts:
                for _ in range(self.pick(1, 1, 2, 3)):
                    kind, says, asks, answer, value = self.user_fact()
                    if kind not in used:
                        used.add(kind)
                        lines.append(self.one(says))
                        facts[kind] = (asks, answer, value)
                if lines:
                    turns += [("user", " ".join(lines)), ("assistant", self.one(NOTED))]
                    continue
            if told < 0.8:
                turns += self.side_turn()
            else:
                turns, check = self.ask_back(turns, facts)
        for _ in range(self.rng.randint(1, 3)):
            turns, check = self.ask_back(turns, facts)
        return self.sample("recall", turns, {"kind": "contains", "answer": check})

    def ask_back(self, turns, facts):
        asks, answer, value = facts[self.one(sorted(facts))]
        lead = self.pick("", "", "", "Now tell me: ", "By the way: ", "One more question. ")
        question = self.one(asks)
        return turns + [("user", lead + (lowered(question) if lead.endswith(": ") else question)), ("assistant", answer)], value

    def side_turn(self):
        kind = self.rng.random()
        if kind < 0.5:
            question, answer, _ = self.world_question()
            return [("user", question), ("assistant", answer)]
        if kind < 0.7:
            return list(self.sum_turn()[0])
        return list(self.one(SMALL_TALK))

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

    # --- Arithmetic ---

    def sum_turn(self):
        kind = self.rng.random()
        if kind < 0.45:
            a, b = map(int, self.until(lambda: f"{self.number(0, 99)}+{self.number(0, 99)}").split("+"))
            result, sign, word = a + b, "+", "plus"
        elif kind < 0.85:
            def draw():
                a, b = self.number(0, 99), self.number(0, 99)
                return f"{max(a, b)}-{min(a, b)}"
            a, b = map(int, self.until(draw).split("-"))
            result, sign, word = a - b, "-", "minus"
        else:
            a, b, sign, word = self.number(0, 12), self.number(0, 12), "*", "times"
            result = a * b
        frame, _ = self.phrasing("sum", SUM_FRAMES, [""])
        if sign != "*" and self.chance(0.25):
            unit, goods = self.one(UNITS), self.one(GOODS)
            question = (f"A ship carries {a} {unit} of {goods} and loads {b} more. How many {unit} does she carry now?" if sign == "+" else
                        f"A ship carries {a} {unit} of {goods} and unloads {b}. How many {unit} are left?")
        else:
            question = frame.format(self.pick(f"{a} {sign} {b}", f"{a} {sign} {b}", f"{a} {word} {b}", f"{a}{sign}{b}"))
        return [("user", question), ("assistant", f"{a} {sign} {b} = {result}")], str(result)

    def arithmetic(self):
        turns, check = [], None
        for _ in range(self.pick(1, 1, 2, 3)):
            more, check = self.sum_turn()
            turns += more
        return self.sample("arithmetic", turns, {"kind": "number", "answer": check})

    # --- JSON and tools ---

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

    def tool(self, kind=None):
        """(tool as OpenAI writes it, request, arguments, result, answer from the result)."""
        kind = kind or self.one(sorted(TOOLS))
        names, description, params, asks = TOOLS[kind]
        name = self.from_pool(names)
        drawn = {"place": self.pick(self.one(list(HARBOURS)), self.name()), "day": self.one(WEEKDAYS), "nights": self.number(1, 30),
                 "ship": self.pick(self.one(list(SHIPS)), self.name()), "person": self.name(), "goods": self.one(GOODS),
                 "count": self.number(), "time": f"{self.number(5, 22)}:{self.rng.randint(10, 59)}", "code": self.code(),
                 "a": self.number(100, 999), "b": self.number(100, 999)}
        properties, arguments = {}, {}
        for slot, (labels, type_) in params.items():
            label = self.one(labels)
            properties[label] = {"type": type_}
            arguments[label] = drawn[slot]
        function = {"name": name, "description": description,
                    "parameters": {"type": "object", "properties": properties, "required": list(properties)}}
        request = self.one(asks).format(**drawn)
        result, answer = self.tool_result(kind, drawn)
        return {"type": "function", "function": function}, request, {"name": name, "arguments": arguments}, result, answer

    def tool_result(self, kind, d):
        n, word, wind = self.number(), self.name(), self.one(WINDS)
        if kind == "weather":
            return {"wind": wind, "knots": n}, f"At {d['place']} the wind is {wind} at {n} knots."
        if kind == "berth":
            return {"berth": n, "status": "booked"}, f"Berth {n} at {d['place']} is booked for {d['nights']} nights."
        if kind == "position":
            return {"near": word, "speed": n}, f"The {d['ship']} is near {word}, making {n} knots."
        if kind == "tide":
            return {"high": d["time"]}, f"High water at {d['place']} on {d['day']} is at {d['time']}."
        if kind == "message":
            return {"status": "sent"}, f"The message to {d['person']} has been sent."
        if kind == "price":
            return {"price": n}, f"The price of {d['goods']} is {n} crowns."
        if kind == "alarm":
            return {"status": "set"}, f"The alarm is set for {d['time']}."
        if kind == "pilot":
            return {"pilot": word}, f"{word} will pilot the {d['ship']} on {d['day']}."
        if kind == "sum":
            return {"result": d["a"] + d["b"]}, f"The result is {d['a'] + d['b']}."
        return {"owner": word}, f"The parcel {d['code']} belongs to {word}."

    def tool_call(self):
        kinds = self.rng.sample(sorted(TOOLS), self.rng.randint(1, 4))
        drawn = [self.tool(kind) for kind in kinds]
        _, request, call, result, answer = self.one(drawn)
        tools = [tool for tool, *_ in drawn]
        turns = [("system", self.pick("You are a helpful harbour clerk.", "Use the tools."))] if self.chance(0.3) else []
        style = self.rng.random()
        said = "<tool_call>" + json.dumps(call, ensure_ascii=False) + "</tool_call>"
        if style < 0.15:  # no tool is needed
            question, answer, key = self.world_question()
            return self.sample("tools", turns + [("user", question), ("assistant", answer)],
                               {"kind": "contains", "answer": key}, tools)
        if style < 0.25:
            turns += self.side_turn()
        turns += [("user", request), ("assistant", said)]
        if style < 0.6:
            return self.sample("tools", turns, {"kind": "tool", "answer": call}, tools)
        turns += [("tool", json.dumps(result, ensure_ascii=False)), ("assistant", answer)]
        return self.sample("tools", turns, {"kind": "exact", "answer": answer}, tools)

    # --- Manners ---

    def manners(self):
        if self.chance(0.5):
            return self.sample("manners", list(self.one(SMALL_TALK)), None)
        name, trade = self.name(), self.one(TRADES)
        system = self.pick("You are {}, a {}.", "Your name is {}. You work as a {}.", "You are {}, a helpful {}.").format(name, trade)
        turns = [("system", system)]
        if self.chance(0.4):
            turns += self.side_turn()
        if self.chance(0.7):
            ask, answer = self.pick("Who are you?", "What is your name?"), f"I am {name}, a {trade}."
        else:
            ask, answer = "What do you work as?", f"I work as a {trade}."
        return self.sample("manners", turns + [("user", ask), ("assistant", answer)], {"kind": "exact", "answer": answer})

    # --- Long ones, so that the whole context is trained ---

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

    def sample(self, family, turns, check, tools=None):
        return {"family": family, "messages": turns, "tools": tools, "check": check}

    def draw(self):
        return getattr(self, self.rng.choices(FAMILIES, WEIGHTS)[0])()


# Share of samples (not of tokens) per family; `long` has about twenty times the tokens of the others.
MIX = {"world": 14, "conversation": 7, "describe": 5, "story": 1, "prose": 2, "recall": 12, "extraction": 25, "quote": 15, "arithmetic": 12,
       "json_answer": 9, "tool_call": 11, "manners": 2, "long": 3}
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
