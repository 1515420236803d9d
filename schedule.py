"""The learning rate over a run: warm-up, stable, decay.

The idea. A cosine schedule has to know its last step before its first: stop early and the rate never fell, go on and it
has nowhere to fall from. Warmup-stable-decay keeps the rate constant for most of the run and lets it fall only at the
end. The constant part belongs to runs of every length, so one expensive trunk can be given several short ends
(branch.py), each with another data blend, length or shape.

    rate(step) = floor + c (1 - floor)   in units of the peak;   c = shape(r),   r = 0 ... 1 over the decay

The report: peak 4.5e-4, floor 4.5e-6 (a hundredth), constant to 82 % of the tokens, no shape named. The four shapes are
those of NVIDIA's training library; all fall from 1 to 0 and differ in where they are steep:

    linear       1 - r
    cosine       (1 + cos(pi r)) / 2     flat at both ends
    exponential  2 * 0.5^r - 1           a little steeper first, so a little below linear
    minus_sqrt   1 - sqrt(r)             most of the fall at once, then a long slow end

At r = 1/2 they have 0.5, 0.5, 0.414 and 0.293 of the way left. The control for "is the constant part any good?" needs
no code of its own: a cosine over the whole run is `--decay-shape cosine --decay 0.98` (with the warm-up of 0.02).

The rate is computed from the step alone, so a resumed run cannot be stuck with an old one. This file must not know
models or data.
"""

import math

SHAPES = {
    "linear": lambda r: 1 - r,
    "cosine": lambda r: (1 + math.cos(math.pi * r)) / 2,
    "exponential": lambda r: 2 * 0.5**r - 1,
    "minus_sqrt": lambda r: 1 - math.sqrt(r),
}


def wsd(step, steps, warmup, decay, floor=0.01, shape="linear"):
    """Warmup-stable-decay: the share of the peak learning rate at `step` (0 to steps - 1).

    warmup, decay: shares of the steps, together at most 1. Linear up (never below `floor`), flat, then down along
    `shape` so that the step after the last would be at `floor`.
    """
    up = (step + 1) / max(1.0, warmup * steps)
    left = (steps - step) / max(1.0, decay * steps)
    if left >= 1:
        return max(floor, min(1.0, up))
    return floor + (1 - floor) * SHAPES[shape](1 - left)


def decay_start(steps, decay):
    """The step from which the rate falls: as many steps make up the trunk; None if it never falls."""
    falling = decay * steps
    return math.ceil(steps - falling - 1e-9) if falling > 1 else None


def describe(steps, warmup, decay, shape="linear", phases=()):
    """One line for people: where the rate rises, stays and falls, and where data phases begin.

    phases: the first step of every phase, [0, ...]; empty for one blend.
    """
    share = lambda step: f"step {step} ({step / steps:.0%})"
    rise, fall = math.ceil(warmup * steps - 1e-9), decay_start(steps, decay)
    parts = [f"rises to {share(rise)}"] if rise > 1 else []
    if fall is None:
        parts.append(f"stays to the end, {share(steps)}")
    else:
        parts += [f"stays to {share(fall)}"] if fall > max(rise, 1) else []
        parts.append(f"falls to {share(steps)}, {shape}, to a hundredth")
    line = "rate " + ", ".join(parts)
    if len(phases) > 1:
        line += "; blend 1 from step 0, " + ", ".join(f"{i} from {share(s)}" for i, s in enumerate(phases[1:], 2))
        if fall is not None:
            line += f": the fall begins in blend {sum(s <= fall for s in phases)}"
    return line


def draw(axis, steps, warmup, decay, shapes=tuple(SHAPES), floor=0.01, phases=()):
    """Draw the rate of each shape, and a cosine over the whole run as the control, into a matplotlib axis.

    phases: the first step of every data phase; a dotted line at each but the first.
    """
    times = range(steps)
    for shape in shapes:
        axis.plot(times, [wsd(t, steps, warmup, decay, floor, shape) for t in times], label=shape)
    whole = [wsd(t, steps, warmup, 1 - warmup, floor, "cosine") for t in times]
    axis.plot(times, whole, "--", color="gray", label="cosine over the whole run")
    for start in phases[1:]:
        axis.axvline(start, linestyle=":", color="black", linewidth=1)
    axis.set(xlabel="step", ylabel="share of the peak rate", ylim=(0, 1.05))
    axis.legend()
