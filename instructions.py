"""Instructions that a program can verify: "use four words", "no letter e", "sort them", in the manner of IFEval.

The idea (Zhou et al. 2023, IFEval). Whether an answer is good needs a judge; whether it has four words needs one line.
So the model is asked for something simple, here a few animals, colours, fruits or things, under one to three conditions
that can each be checked on the text alone:

    Name animals. Use 3 words. Do not use the letter o. Put commas between the words.      ->  cat, hen, fox

That is training data, a skill to measure, and later a reward that cannot be argued with. Every condition has a sentence
(what the user reads) and a verifier (what is checked); a reference responder writes an answer that satisfies all of a
prompt's conditions, and prompts for which it finds none are not asked, so none contradicts itself.

Conditions that could exclude each other (two lengths, two orders) share a group, and a prompt takes at most one of a
group. Strict: one failed condition fails the prompt, and so does a word that is not of the kind asked for, or an
endless list; `follows` gives the conditions one by one. IFEval's loose variant forgives wrappings that models of this
size do not write.

A thought lists the words with numbers, one a line, which is what makes lengths easy. "Train" or "test" is decided by a
hash of the prompt with its conditions sorted. This file must not know tokens or models.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from random import Random

from tasks import TEST_SHARE

KINDS = {
    "animals": ("ant", "bat", "bee", "cat", "cow", "dog", "eel", "fox", "hen", "owl", "pig", "rat", "seal", "wolf"),
    "colours": ("red", "blue", "green", "gold", "pink", "gray", "white", "black", "brown", "teal", "tan", "lime"),
    "fruits": ("apple", "fig", "kiwi", "lemon", "lime", "mango", "melon", "pear", "plum", "peach", "date", "grape"),
    "things": ("bag", "bed", "book", "box", "coin", "cup", "desk", "door", "key", "lamp", "pen", "rope", "sock"),
}
MARKS = "!?."
LONGEST = 8  # words of an answer; without a limit "door door door ..." would follow most conditions


def words(text: str) -> list[str]:
    """The words of an answer, in small letters."""
    return re.findall(r"[a-z]+", text.lower())


# ----------------------------------------------------------------------------------------------------------------------
# The conditions


@dataclass(frozen=True)
class Rule:
    """One condition: `draw(rng, kind)` gives its argument, `say` is the sentence, `holds(text, argument)` checks."""

    name: str
    group: str
    say: str
    draw: Callable
    holds: Callable[[str, object], bool]


def _small(rng, kind):
    return rng.randint(2, 5)


def _letter(rng, kind):
    return rng.choice("abdegilnoprt")


def _word(rng, kind):
    return rng.choice(KINDS[kind])


def _nothing(rng, kind):
    return ""


def _lines(text, argument):
    """One word a line, each after a dash."""
    return all(re.fullmatch(r"- [A-Za-z]+[!?.]?", line) for line in text.strip().split("\n"))


def _commas(text, argument):
    """A comma between any two words, and nowhere else."""
    return re.fullmatch(r'"?[A-Za-z]+(, [A-Za-z]+)*[!?."]?', text.strip()) is not None


def _titled(text, argument):
    return all(re.fullmatch(r"[A-Z][a-z]*", word) for word in re.findall(r"[A-Za-z]+", text))


RULES: dict[str, Rule] = {
    r.name: r
    for r in (
        Rule("exactly", "amount", "Use {} words.", _small, lambda t, n: len(words(t)) == n),
        Rule("at least", "amount", "Use at least {} words.", _small, lambda t, n: len(words(t)) >= n),
        Rule("at most", "amount", "Use at most {} words.", _small, lambda t, n: len(words(t)) <= n),
        Rule("without letter", "letter", "Do not use the letter {}.", _letter, lambda t, c: c not in t.lower()),
        Rule("letter twice", "letter", "Use the letter {} twice or more.", _letter,
             lambda t, c: t.lower().count(c) >= 2),
        Rule("with word", "word", "Use the word {}.", _word, lambda t, w: w in words(t)),
        Rule("without word", "word", "Do not use the word {}.", _word, lambda t, w: w not in words(t)),
        Rule("no word twice", "word", "Use no word twice.", _nothing, lambda t, _: len(set(words(t))) == len(words(t))),
        Rule("first", "place", "Start with {}.", _word, lambda t, w: words(t)[:1] == [w]),
        Rule("last", "place", "Make {} the last word.", _word, lambda t, w: words(t)[-1:] == [w]),
        Rule("sorted", "order", "Sort the words.", _nothing, lambda t, _: all(a <= b for a, b in pairwise(words(t)))),
        Rule("sorted backwards", "order", "Sort the words backwards.", _nothing,
             lambda t, _: all(a >= b for a, b in pairwise(words(t)))),
        Rule("capitals", "case", "Use capitals only.", _nothing, lambda t, _: t == t.upper()),
        Rule("capital first", "case", "Start each word with a capital.", _nothing, _titled),
        Rule("commas", "form", "Put commas between the words.", _nothing, _commas),
        Rule("lines", "form", "Write a word a line, after a dash.", _nothing, _lines),
        Rule("mark", "close", "End with {}", lambda rng, kind: rng.choice(MARKS),
             lambda t, m: t.strip().endswith(m)),
        Rule("quotes", "close", "Put all of it in quotes.", _nothing,
             lambda t, _: len(t.strip()) > 2 and t.strip()[0] == t.strip()[-1] == '"' and t.count('"') == 2),
    )
}  # fmt: skip
GROUPS = tuple(dict.fromkeys(rule.group for rule in RULES.values()))


@dataclass(frozen=True)
class Prompt:
    """What to name, and the conditions: (name of a rule, its argument)."""

    kind: str
    rules: tuple[tuple[str, object], ...]

    @property
    def text(self):
        return " ".join([f"Name {self.kind}.", *(RULES[name].say.format(argument) for name, argument in self.rules)])


# ----------------------------------------------------------------------------------------------------------------------
# Checking


def follows(prompt: Prompt, text: str) -> list[bool]:
    """Which of the prompt's conditions hold for an answer, in their order. An answer without a word follows none."""
    return [bool(words(text)) and bool(RULES[name].holds(text, argument)) for name, argument in prompt.rules]


def on_topic(prompt: Prompt, text: str) -> bool:
    """True if the answer has 1 to LONGEST words, and all of them are of the kind asked for."""
    return 0 < len(words(text)) <= LONGEST and set(words(text)) <= set(KINDS[prompt.kind])


def check(prompt: Prompt, text: str) -> bool:
    """Strict: on topic, and every condition holds."""
    return on_topic(prompt, text) and all(follows(prompt, text))


# ----------------------------------------------------------------------------------------------------------------------
# The reference responder


def respond(rng: Random, prompt: Prompt, tries=60) -> tuple[str, str] | None:
    """(thought, answer) that satisfies the prompt, or None if none was found in so many tries.

    It chooses words that may be used, puts them in the order asked for, writes them as asked, and checks.
    """
    rules = dict(prompt.rules)
    for _ in range(tries):
        count = rules.get("exactly") or rng.randint(rules.get("at least", 2), min(rules.get("at most", 5), 5))
        barred = rules.get("without letter", " ")
        allowed = [w for w in KINDS[prompt.kind] if barred not in w and w != rules.get("without word")]
        if len(allowed) < count:
            return None
        chosen = rng.sample(allowed, count)
        fixed = rules.get("with word") or rules.get("first") or rules.get("last")
        if fixed and fixed not in chosen:
            chosen[rng.randrange(count)] = fixed
        if "first" in rules:
            chosen = [rules["first"], *(w for w in chosen if w != rules["first"])][:count]
        if "last" in rules:
            chosen = [*(w for w in chosen if w != rules["last"]), rules["last"]][-count:]
        if "sorted" in rules or "sorted backwards" in rules:
            chosen.sort(reverse="sorted backwards" in rules)
        answer = write(chosen, rules)
        if check(prompt, answer):
            return "\n".join(f"{i} {word}" for i, word in enumerate(chosen, 1)), answer
    return None


def write(chosen: list[str], rules: dict) -> str:
    """Words as the conditions on case, form and close want them."""
    if "capitals" in rules:
        chosen = [word.upper() for word in chosen]
    if "capital first" in rules:
        chosen = [word.capitalize() for word in chosen]
    text = "\n".join(f"- {word}" for word in chosen) if "lines" in rules else None
    text = text or (", " if "commas" in rules else " ").join(chosen)
    return f'"{text}"' if "quotes" in rules else text + rules.get("mark", "")


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


def split_of(prompt: Prompt) -> str:
    """Returns "train" or "test", decided by the prompt alone, whatever the order of its conditions."""
    digest = blake2b(f"instructions\n{prompt.kind}\n{sorted(map(str, prompt.rules))}".encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") % TEST_SHARE == 0 else "train"


def sample(rng: Random, count: int, split: str = "train") -> tuple[Prompt, str, str]:
    """(prompt, thought, answer): a prompt of `count` conditions that can be satisfied, and a reference response.

    Raises ValueError for a count that is not 1 to the number of groups, or an unknown split.
    """
    if type(count) is not int or not 1 <= count <= len(GROUPS):
        raise ValueError(f"a prompt takes 1 to {len(GROUPS)} conditions, one of a group; got {count!r}")
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    while True:
        kind = rng.choice(list(KINDS))
        names = [rng.choice([r.name for r in RULES.values() if r.group == g]) for g in rng.sample(GROUPS, count)]
        prompt = Prompt(kind, tuple((name, RULES[name].draw(rng, kind)) for name in names))
        if split_of(prompt) == split and (response := respond(rng, prompt)):
            return prompt, *response


def draw(rng: Random, split: str = "train") -> tuple[Prompt, str, str]:
    """As `sample`, with one, two or three conditions, drawn alike."""
    return sample(rng, rng.randint(1, 3), split)
