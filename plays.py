"""Plays: a policy calls tools until an episode ends, many times over, and where two plays parted is a preference.

The idea. A verifier says which plays of an episode ended right (tools.py looks at the records). The plays of one
episode begin alike; somewhere the failed one said something else than the successful one. That turn is a pair: the same
conversation, two answers, one of them better. Nobody had to judge it.

    play       E episodes, K plays of each, all of them side by side, a turn at a time
    pairs_of   the plays of an episode -> pairs

A play may have failed later than where it first differed: a pair is evidence, not proof. This file must not know
losses.
"""

from dataclasses import dataclass, field
from random import Random

import tools
from generate import chat_prompt
from rollout import Sample
from template import END_THINK

KINDS = (*tools.KINDS, *tools.SEVERAL, "lacking")  # twice: where a result decides, and where restraint is asked for


def check_length(tokenizer, room, length, count=60):
    """ValueError if more than a tenth of the reference's turns do not fit `room` tokens, or `length` with the
    conversation before them: such plays would fail however good they are."""
    rng, needs, wholes = Random("length dpo"), [], []
    for _ in range(count):
        episode = tools.draw(rng, "train", KINDS)
        for i, turn in enumerate(episode.turns):
            needs.append(len(tokenizer.encode(f"{turn.trace}\n\n{turn.text}\n")) + 2)
            wholes.append(len(chat_prompt(tokenizer, tools.replay(episode, i).messages)) + room)
    for name, limit, found in (("room", room, needs), ("length", length, wholes)):
        long = sum(n > limit for n in found)
        if long > len(found) / 10:
            raise ValueError(
                f"{limit} tokens are too few: {long} of {len(found)} turns that end right need more, the longest "
                f"{max(found)}; raise --{name}"
            )


# ----------------------------------------------------------------------------------------------------------------------
# Plays


@dataclass
class Turn:
    """One turn as it was drawn, and what it said after the thought, or None if that was no proper turn."""

    sample: Sample
    text: str | None


@dataclass
class Played:
    """An episode as a policy played it; over: it was given up, and has failed."""

    play: tools.Play
    turns: list = field(default_factory=list)
    over: bool = False

    @property
    def success(self):
        return not self.over and self.play.success()


def text_of(tokenizer, sample):
    """What a sample says after its thought; None unless it has one `</think>` and an end of the turn."""
    _, *after = tokenizer.decode(sample.said[:-1]).split(END_THINK)
    return after[0].strip() if sample.ended and len(after) == 1 else None


def play(roller, tokenizer, episodes, count, room, length, temperature, seed):
    """Play each episode `count` times, all plays at once, a turn at a time: a list of `count` `Played` an episode.

    seed: a text; the draws of turn t depend on it and on t. room, length: see DpoConfig.
    """
    groups = [[Played(tools.Play(episode)) for _ in range(count)] for episode in episodes]
    flat = [played for group in groups for played in group]
    for t in range(tools.MOST_TURNS):
        asked = [(p, chat_prompt(tokenizer, p.play.messages)) for p in flat if not (p.over or p.play.done)]
        for played, prompt in asked:
            played.over = len(prompt) + room > length
        asked = [(played, prompt) for played, prompt in asked if not played.over]
        if not asked:
            break
        prompts = [prompt for _, prompt in asked]
        more = filling(len(prompts), roller.rows) if roller.device.type == "cuda" else 0
        drawn = roller.say(prompts + prompts[:1] * more, 1, room, temperature, Random(f"{seed} {t}").getrandbits(60))
        for (played, _), (sample,) in zip(asked, drawn):
            played.turns.append(Turn(sample, text_of(tokenizer, sample)))
            if played.turns[-1].text is None:
                played.over = True
            else:
                played.play.say(played.turns[-1].text)
    return groups


def filling(count, rows):
    """How many prompts more make a power of two, or, above `rows`, a multiple of it: on a GPU each other number of rows
    would record a step of its own and hold caches for it."""
    return -count % min(rows, 1 << (count - 1).bit_length())


# ----------------------------------------------------------------------------------------------------------------------
# Pairs


@dataclass
class Pair:
    """Two turns drawn after the same prompt."""

    chosen: Sample
    rejected: Sample


def fork(good, bad):
    """The first turn at which two plays of an episode said something else, or None. Before it, conversations are equal:
    the database answers the same to the same, and thoughts are not in a prompt."""
    return next((i for i, (a, b) in enumerate(zip(good.turns, bad.turns)) if a.text != b.text), None)


def pairs_of(plays, most):
    """At most `most` pairs from the plays of one episode: none unless some succeeded and some failed.

    Each failed play is held against the successful one that went with it longest; of failed plays that went wrong at
    the same turn with the same words, the first is taken. The thoughts may differ, the words after them do.
    """
    good, found, known = [p for p in plays if p.success], [], set()
    for bad in plays:
        forks = [] if bad.success else [(at, other) for other in good if (at := fork(other, bad)) is not None]
        if not forks or len(found) == most:
            continue
        at, best = max(forks, key=lambda f: f[0])  # the first of the longest
        turn = bad.turns[at]
        wrong = (tuple(turn.sample.prompt), turn.text)
        if wrong not in known:
            known.add(wrong)
            found.append(Pair(best.turns[at].sample, turn.sample))
    return found
