"""Conversations to learn from: which skills a stage of fine-tuning teaches, and a conversation as tokens with a mask.

The idea. Fine-tuning is next-token prediction on conversations, with the loss on what the assistant says. Everything
else is a choice of conversations, and the report makes it in three stages:

    1  all domains, packed; one prompt in ten has its thought taken away (reasoning off)
    2  tool calls and a sample of the rest, not packed
    3  long conversations; one thought in twenty is cut off, and the answer stays

One `Example` is one turn of the assistant behind everything that came before it, exactly as `generate.py` will prompt
for that turn: the template leaves thoughts out of earlier turns, so a conversation of four turns is four prompts, and a
row that ran through it once would teach prompts that never occur. Of a conversation with several turns one is drawn.

*Reasoning off* is asked for with "/no_think", which the template turns into an empty thought behind which the answer
starts at once. *A cut thought* ends in the middle of anything, then comes the answer that the whole thought had. It
teaches what to do when a thinking budget (budget.py) closes the thought: answer, and do not go on thinking aloud.

*Packing* puts several examples into a row. With `reset` each stays alone (states, convolution and attention stop at its
edge, as in pretraining), without it the second begins in the state that the first left. The report found that packing
cost tool calls and does not say which it was, so it is a switch. The examples of a step depend on seed, stage and step
only, so that packed or not, with reset or not, the same step learns the same tokens, and a run needs no data position.

What is ours: all numbers in MIX; the report names domains and not their shares inside a stage.
Source: report section 3 (three stages of SFT; a tenth with stripped traces; about 5 % truncated).
This file must not know models.
"""

from dataclasses import dataclass, replace
from random import Random

import numpy as np

import instructions
import tasks
import tools
from generate import chat_prompt

MIX = {  # shares of the examples of a stage
    1: {"reasoning": 0.35, "retrieval": 0.15, "tools": 0.3, "instructions": 0.2},
    2: {"reasoning": 0.2, "retrieval": 0.05, "tools": 0.6, "instructions": 0.15},
    3: {"reasoning": 0.3, "retrieval": 0.05, "tools": 0.25, "instructions": 0.15, "long": 0.25},
}
PACKED = {1: True, 2: False, 3: True}
CUT = {1: 0.0, 2: 0.0, 3: 0.05}


@dataclass(frozen=True)
class Example:
    """What the assistant says (`trace`, or None with reasoning off, and `answer`) after `messages`."""

    skill: str
    messages: tuple
    trace: str | None
    answer: str
    cut: bool = False  # the trace was cut off


# ----------------------------------------------------------------------------------------------------------------------
# Skills: each draws an example with its whole thought


def _user(text):
    return ({"role": "user", "content": text},)


def _task(kind):
    weights = {name: 1.0 for name, family in tasks.FAMILIES.items() if family.kind == kind}

    def make(rng, split):
        s = tasks.draw(rng, weights, split=split)
        return Example(kind, _user(s.question), s.trace, s.answer)

    return make


def _tools(rng, split):
    """One turn of an episode, the earlier ones as the reference has them."""
    episode = tools.draw(rng, split)
    turn = rng.randrange(len(episode.turns))
    play = tools.replay(episode, turn)
    return Example("tools", tuple(play.messages), episode.turns[turn].trace, episode.turns[turn].text)


def _instructions(rng, split):
    prompt, trace, answer = instructions.draw(rng, split)
    return Example("instructions", _user(prompt.text), trace, answer)


def _long(rng, split):
    """Records that are told once, some other questions, then a question that refers back to the records. "Train" or
    "test" is decided by the task that the records come from (needle)."""
    told = tasks.sample("needle", rng.randint(1, 2), rng, split)
    records, _, ask = told.question.partition(". ")
    messages = [*_user(f"{records}. Keep them."), {"role": "assistant", "content": "ok"}]
    for _ in range(rng.randint(1, 4)):
        other = tasks.sample(rng.choice(("add", "reverse", "sort", "word", "subtract")), 1, rng, split)
        messages += [*_user(other.question), {"role": "assistant", "content": other.answer}]
    return Example("long", (*messages, *_user(f"Back to the records. {ask}")), told.trace, told.answer)


SKILLS = {
    "reasoning": _task("reasoning"),
    "retrieval": _task("retrieval"),
    "tools": _tools,
    "instructions": _instructions,
    "long": _long,
}


def draw(rng: Random, mix: dict, off: float, split: str = "train") -> Example:
    """One example of the mix {skill: share}; its thought is left out with probability `off`."""
    skill = rng.choices(list(mix), list(mix.values()))[0]
    example = SKILLS[skill](rng, split)
    return replace(example, trace=None) if rng.random() < off else example


# ----------------------------------------------------------------------------------------------------------------------
# Tokens


def encode(tokenizer, example: Example, cut: float | None = None) -> tuple[list[int], int]:
    """(ids, start): the whole example; `ids[start:]` is what the assistant says, the rest is its prompt.

    cut: keep only this share of the thought's tokens, from none (0) to all (1); None for no cut.
    """
    prompt = chat_prompt(tokenizer, example.messages, example.trace is not None)
    trace = example.trace
    if trace is not None and cut is not None:
        ids = tokenizer.encode(trace)
        trace = tokenizer.decode(ids[: int(len(ids) * cut)])
    ids, start = tokenizer.encode_examples([("", trace, example.answer)])[0]
    said = ids[start:]
    if trace == "":  # nothing is left: the tag follows the newline of "<think>\n"
        said = said[len(tokenizer.encode("\n")) :]
    return prompt + said, len(prompt)


def check_length(tokenizer, mix, length, count=60):
    """ValueError if more than a tenth of a skill's examples are longer than a row: the rest would not stand for it."""
    for skill in mix:
        rng = Random(f"length {skill}")
        lengths = sorted(len(encode(tokenizer, SKILLS[skill](rng, "train"))[0]) for _ in range(count))
        long = sum(n > length for n in lengths)
        if long > count / 10:
            raise ValueError(
                f"rows of {length} tokens are too short: {long} of {count} examples of {skill} are longer, the longest "
                f"has {lengths[-1]}; raise --length"
            )


def step_examples(tokenizer, mix, tokens, length, name, off=0.1, cut=0.0, cut_range=(0.0, 1.0), split="train"):
    """The examples of one step, [(ids, start, Example)], at least `tokens` tokens in all; `name` seeds the draw.

    Those longer than `length` are drawn anew (see `check_length`). cut: share of the thoughts that are cut; cut_range:
    from which to which share of such a thought stays, less rather than more: the square of an even draw.
    """
    rng, drawn, total, (low, high) = Random(name), [], 0, cut_range
    while total < tokens:
        example = draw(rng, mix, off, split)
        chosen = example.trace is not None and rng.random() < cut
        share = low + (high - low) * rng.random() ** 2 if chosen else None
        ids, start = encode(tokenizer, example, share)
        if len(ids) <= length:
            drawn.append((ids, start, replace(example, cut=share is not None)))
            total += len(ids)
    return drawn


# ----------------------------------------------------------------------------------------------------------------------
# Rows


def packed(examples, length, reset=True):
    """Rows of `length` tokens with several examples each: (ids, doc, learned), (rows, length) int64, int64 and bool.

    Longest first, each into the first row with room; so rows are full and nothing is cut or lost. doc: the number of an
    example in its row, 0 for all without `reset`; -1 is padding. learned marks what the assistants say.
    """
    rows = []
    for ids, start, *_ in sorted(examples, key=lambda e: -len(e[0])):
        row = next((row for row in rows if sum(len(i) for i, _ in row) + len(ids) <= length), None)
        if row is None:
            rows.append(row := [])
        row.append((ids, start))
    for i, row in enumerate(rows):  # else a row's first example would always be its longest
        Random(i).shuffle(row)
    return _rows(rows, length, reset)


def alone(examples, tokens):
    """The same, one example a row, as parts of at most `tokens` tokens with padding: a list of (ids, doc, learned).

    Examples of like length share a part, so little is padding; a part is a multiple of 16 long, so that a GPU's kernels
    are not made anew for every length.
    """
    room = lambda ids: -(-len(ids) // 16) * 16
    parts, part = [], []
    for ids, start, *_ in sorted(examples, key=lambda e: -len(e[0])):
        if part and (len(part) + 1) * room(part[0][0][0]) > tokens:
            parts.append(part)
            part = []
        part.append([(ids, start)])
    return [_rows(part, room(part[0][0][0]), True) for part in [*parts, part]]


def _rows(rows, length, reset):
    ids, doc = np.zeros((len(rows), length), np.int64), np.full((len(rows), length), -1, np.int64)
    learned = np.zeros((len(rows), length), bool)
    for r, row in enumerate(rows):
        at = 0
        for number, (tokens, start) in enumerate(row):
            end = at + len(tokens)
            ids[r, at:end], doc[r, at:end] = tokens, number if reset else 0
            learned[r, at + start : end] = True
            at = end
    return ids, doc, learned
