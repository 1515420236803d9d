"""The curriculum: which blend of data is read when. Three phases, beginning at 0, 60 and 90 % of the steps.

The idea. What is read last is remembered best, and during the decay of the learning rate it is not overwritten any
more. So the report trains on a wide blend first and moves to a better one: phase 1 is for diversity, phases 2 and 3 for
quality. With the rate constant to 82 %, the fall begins inside phase 2 and phase 3 lies wholly inside the fall.

What is the report's and what is ours. The boundaries are the report's. Its weights are drawn in a figure and cannot be
read off, and its sources are not ours, so THE WEIGHTS BELOW ARE OURS. Nothing was tuned; they follow three rules:

    less plain text         1.25, 0.75 and 0.25 times --text-share: over the whole run exactly --text-share, so a
                            single blend is a control with as much text (0.6 * 1.25 + 0.3 * 0.75 + 0.1 * 0.25 = 1)
    more reasoning          53, 60 and 70 % of the tasks, the rest is retrieval (53 % is what a single blend has)
    more steps of thought   reasoning levels 1, 2, 3 weighted 3:2:1, then alike, then 1:2:3; a level more is a step more

What limits the first rule: tasks are packed whole and text fills what they leave of a row, so in short rows text has a
share below which it cannot fall, whatever the weights say. `nano-1m` (rows of 256, --text-share 0.05) realises 14, 14
and 16 % of text in a small data set where 6, 4 and 1 % are intended. The realised shares are printed and logged beside
the intended ones: compare those before comparing runs.

A phase is a step number (`starts`), a blend is a dict of shares; this file must not know texts, rows or models.
"""

from tasks import FAMILIES

TEXT = (1.25, 0.75, 0.25)  # times --text-share
REASONING = (0.53, 0.60, 0.70)  # of the tasks
LEVELS = ((3, 2, 1), (1, 1, 1), (1, 2, 3))  # weights of the reasoning levels 1, 2, 3


def boundaries(text):
    """`--phases` as shares of the run: "0.6,0.9" -> (0.6, 0.9), "" -> () for one blend. ValueError for all else."""
    if not text:
        return ()
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        shares = ()
    if len(shares) != len(TEXT) - 1 or not 0 < shares[0] < shares[1] < 1:
        raise ValueError(f"--phases {text!r} is not two rising shares of the run, such as 0.6,0.9 (empty: one blend)")
    return shares


def starts(steps, shares):
    """The first step of every phase: [0, ...]. ValueError if a phase would have no step."""
    found = [0] + [round(share * steps) for share in shares]
    if any(a >= b for a, b in zip(found, [*found[1:], steps])):
        raise ValueError(f"{steps} steps are too few for phases that begin at steps {found}: raise --steps")
    return found


def phase_of(step, starts):
    """The number of the phase, from 0, that `step` (from 0) belongs to."""
    return sum(start <= step for start in starts) - 1


def blends(text_share, text_parts):
    """[(sources, families)] of the three phases, as `data.Blend` takes them.

    text_share: of all tokens of a single blend. text_parts: how it is split, {"prose": 0.6, "code": 0.4}.
    """
    if text_share * max(TEXT) > 1:
        raise ValueError(
            f"--phases raises --text-share {text_share} to {text_share * max(TEXT):.3g} in its first phase: give at "
            f"most {1 / max(TEXT):g}, or no --phases"
        )
    made = []
    for times, reasoning, levels in zip(TEXT, REASONING, LEVELS):
        text = text_share * times
        sources = {"reasoning": reasoning * (1 - text), "retrieval": (1 - reasoning) * (1 - text)}
        sources |= {source: text * part for source, part in text_parts.items()}
        families = {}
        for name, family in FAMILIES.items():
            weights = levels if family.kind == "reasoning" else (1, 1, 1)
            families |= {(name, level): w / sum(weights) for level, w in zip(family.train_levels, weights)}
        made.append((sources, families))
    return made
