"""Preferences with a known taste: pairs of answers of which one is liked better, and the rule that decides.

The idea (Bradley and Terry 1952). People cannot give marks that mean the same to all of them, but they can say which of
two answers they like better. If every answer had a hidden score s, and the better one were named with probability

    P(a before b) = 1 / (1 + exp(-(s(a) - s(b))))

then scores could be learned from the choices alone: that is a reward model. Here the score is no secret of people's but
a rule in this file, so what a reward model learned can be held against the truth, and what a policy makes of the reward
model too (one that pleases the model and not the rule has found a hole).

    Name 2 animals and 1 colour.       "cat, owl, red."     a point each, and one for the full stop

The rule (`score`) knows the prompt; nothing in the prompt tells the rule:

    +1      each different word of a kind that was asked for, up to the number asked for
    -1      each word of any other kind
    -0.5    each word more than were asked for in all, or used again
    +1      a full stop at the end
    -1      shouting: all in capitals

`noise` is the temperature of the choice: 0 lets the rule decide every pair, 1 is Bradley and Terry's people. Pairs of
equal score are not asked. "Train" or "test" is decided by a hash of what the prompt asks for, so a reward model is
tested on combinations that it never saw. Kinds and words are those of instructions.py.

This file must not know tokens or models. Ours throughout; the report trains its reward model on HelpSteer3.
"""

import math
from dataclasses import dataclass
from hashlib import blake2b
from random import Random

from instructions import KINDS, words
from tasks import TEST_SHARE

OPENINGS = ("", "Please: ", "Quick: ", "For a game: ", "One more: ")
MOST = 4  # of a kind


@dataclass(frozen=True)
class Prompt:
    """What is asked for, ((kind, how many), ...), one or two kinds, and how the prompt begins."""

    wanted: tuple[tuple[str, int], ...]
    opening: str = ""

    @property
    def text(self):
        parts = [f"{n} {kind[:-1] if n == 1 else kind}" for kind, n in self.wanted]
        return f"{self.opening}Name {' and '.join(parts)}."


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt; `chosen` was liked better."""

    prompt: Prompt
    chosen: str
    rejected: str


def score(prompt: Prompt, answer: str) -> float:
    """The hidden rule; see the top of the file. Any text has a score, the empty one 0."""
    said, total, used = words(answer), 0.0, set()
    room = dict(prompt.wanted)
    for word in said:
        kind = next((kind for kind in room if word in KINDS[kind]), None)
        if word in used:
            total -= 0.5
        elif kind is None:
            total -= 1
        elif room[kind] > 0:
            total, room[kind] = total + 1, room[kind] - 1
        used.add(word)
    total -= 0.5 * max(0, len(said) - sum(n for _, n in prompt.wanted))
    if said:
        total += answer.strip().endswith(".")
        total -= answer == answer.upper()
    return total


def probability(prompt: Prompt, a: str, b: str, noise: float = 1.0) -> float:
    """That `a` is liked better than `b`."""
    difference = score(prompt, a) - score(prompt, b)
    if noise == 0:
        return 0.5 + 0.5 * (difference > 0) - 0.5 * (difference < 0)
    return 1 / (1 + math.exp(-max(-700.0, min(700.0, difference / noise))))


# ----------------------------------------------------------------------------------------------------------------------
# Prompts and answers


def split_of(prompt: Prompt) -> str:
    """Returns "train" or "test", decided by what is asked for, not by the opening or the order of the kinds."""
    digest = blake2b(f"preferences\n{sorted(prompt.wanted)}".encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") % TEST_SHARE == 0 else "train"


def draw_prompt(rng: Random, split: str = "train") -> Prompt:
    """A prompt of the split. ValueError for an unknown split."""
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    while True:
        kinds = rng.sample(list(KINDS), rng.randint(1, 2))
        prompt = Prompt(tuple((kind, rng.randint(1, MOST)) for kind in kinds), rng.choice(OPENINGS))
        if split_of(prompt) == split:
            return prompt


def best(rng: Random, prompt: Prompt) -> str:
    """An answer of the highest score there is for the prompt."""
    return ", ".join(word for kind, n in prompt.wanted for word in _different(rng, prompt, kind, n)) + "."


def _different(rng, prompt, kind, n):
    """n words of a kind that are in no other kind asked for (a lime is a fruit and a colour)."""
    others = {word for other, _ in prompt.wanted if other != kind for word in KINDS[other]}
    return rng.sample([word for word in KINDS[kind] if word not in others], n)


def respond(rng: Random, prompt: Prompt) -> str:
    """An answer as good as it happens to be: the best, with none to three faults."""
    said = words(best(rng, prompt))
    stop, shout = rng.random() < 0.5, rng.random() < 0.15
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        fault = rng.choice(("drop", "repeat", "strange", "more"))
        if fault == "drop" and len(said) > 1:
            said.pop(rng.randrange(len(said)))
        elif fault == "repeat":
            said.insert(rng.randrange(len(said) + 1), rng.choice(said))
        elif fault == "strange":
            said[rng.randrange(len(said))] = rng.choice(KINDS[rng.choice(list(KINDS))])
        elif fault == "more":
            said.append(rng.choice(KINDS[rng.choice(prompt.wanted)[0]]))
    text = ", ".join(said) + "." * stop
    return text.upper() if shout else text


def draw(rng: Random, split: str = "train", noise: float = 0.0) -> Pair:
    """A pair of answers of different score; which is `chosen` is drawn with `probability`. ValueError for a noise below
    0 or an unknown split."""
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be a finite number of at least 0 (0: the rule decides); got {noise!r}")
    prompt = draw_prompt(rng, split)
    while True:
        a, b = respond(rng, prompt), respond(rng, prompt)
        if score(prompt, a) != score(prompt, b):
            liked = rng.random() < probability(prompt, a, b, noise)
            return Pair(prompt, a, b) if liked else Pair(prompt, b, a)
