"""Small draws for the corpus, and the line between training and held-out material.

Enters: a seed, and on which side of the line to draw. Leaves: names, codes, sentences, phrasings.
Never happens: a thing lies on both sides. `held_out` and `sides_of` decide by a hash of the thing itself, so nobody keeps a list.
"""

import functools
import random
import zlib

from phrasings import ACCENTED, CODAS, COMMON, FIRST, ONSETS, VOWELS, WIDE_CONSONANTS, WIDE_VOWELS


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


class Draws:
    """A source of small things. `held` asks for held-out ones where there are such, and for training ones otherwise."""

    def __init__(self, seed, held=False):
        self.rng, self.held = random.Random(seed), held

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

    def sample(self, family, turns, check, tools=None):
        return {"family": family, "messages": turns, "tools": tools, "check": check}
