"""What the model does in a talk: remembering what it was told, sums, tools, manners.

Enters: draws, and the side talk that Maker lends from the other families. Leaves: samples.
Never happens: a tool's result is asked of the model before the tool has answered.
"""

import json

from draws import Draws, lowered
from phrasings import (
    ANIMALS, COLOURS, COMMON, NOTED, RELATIVES, SMALL_TALK, SUM_FRAMES, THINGS, TOOLS, TRADES, UNITS, USER_FACTS, WEEKDAYS, WINDS,
)
from world import GOODS, HARBOURS, SHIPS


class Talking(Draws):
    """Samples of talk; used with Knowledge and Reading beside it."""

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

    # --- Tools ---

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
