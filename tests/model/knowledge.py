"""What the model knows by heart: questions about the world, conversations about it, descriptions, stories.

Enters: draws. Leaves: samples whose answers are facts of world.py. Never happens: an answer differs from world.py.
"""

from draws import Draws, lowered
from phrasings import (
    CAPTAIN_FRAMES, DESCRIBE_FRAMES, DESCRIBE_TAILS, EXPORT_FRAMES, LIGHT_FRAMES, MASTER_FRAMES, PERSON_FRAMES, QUESTIONS, SHE, THERE,
    WEEKDAYS,
)
from world import HARBOURS, PEOPLE, SHIPS


class Knowledge(Draws):
    """Samples about the Lantern Coast."""

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
