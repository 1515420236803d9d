"""What an aligned model can do, in one table: reasoning with and without a thought, tools, instructions, the budget.

The idea. Alignment trades one skill for another, so no stage is judged by its own skill alone: after each, all of them
are measured, by programs, on held-out prompts, greedily:

    on, off       share of reasoning questions answered right with a thought, and without
    obeyed        of the same questions with "/no_think": no thought is written after all, in one line, and it ends
    tools         episodes whose records and answer are right at the end (tools.py); chain: those where a result
                  decides the next call
    instructions  prompts with all conditions met (instructions.py, strict); conditions: one by one
    recall        long conversations whose last question refers back to their first turn, answered right
    liked         not a share of prompts: the points that answers get by the taste in preferences.py over the most there
                  are, none below 0; no stage of fine-tuning shows such prompts
    well formed   of the questions with a thought: exactly one `</think>`, then an answer, then the end of the turn

A control without empty thoughts in its training fails "obeyed": it thinks aloud behind the empty thought.

The *budget curve* asks the same questions with the thought closed after so many tokens (budget.py). Three things are
read off: accuracy, well-formedness, and the length of the answer. A model that never saw a cut thought compensates: it
goes on thinking in the answer, which gets long, and may close it a second time.

    python skills.py --checkpoint out-sft1                    the table
    python skills.py --checkpoint out-sft3 --curve --plot budget.png

This file must not know training. Source: report section 3.4 and its figure 5 for the curve.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from random import Random

from device import choose_device, choose_impl  # isort: skip  (before torch)

import conversations
import instructions
import preferences
import tasks
import tools
from checkpoint import load_pretrained
from evaluate import refuse
from generate import chat_prompt, generate
from settings import finish
from template import END_THINK, THINK

BUDGETS = (0, 8, 16, 24, 32, 48, 64, 96)
ROOM = 48  # tokens more than the reference needs, so that a response that goes wrong is seen to
REASONING = tuple(name for name, family in tasks.FAMILIES.items() if family.kind == "reasoning")


# ----------------------------------------------------------------------------------------------------------------------
# Reasoning


def questions(count, seed=0):
    """`count` held-out questions, the reasoning families in turn, levels 1 to 3."""
    pairs = [(name, level) for level in (1, 2, 3) for name in REASONING]
    return [tasks.sample(*pairs[i % len(pairs)], Random(f"{seed} {i}"), "test") for i in range(count)]


def ask(model, tokenizer, asked, thinking=True, budget=None):
    """A `Completion` for each task sample. budget: thinking tokens, see budget.py, or None for no limit."""
    prompts = [chat_prompt(tokenizer, [{"role": "user", "content": s.question}], thinking) for s in asked]
    room = ROOM + max(len(tokenizer.encode(f"{s.trace}\n\n{s.answer}\n")) for s in asked)
    return generate(model, tokenizer, prompts, room, thinking=thinking, thinking_budget=budget)


def ended(tokenizer, completion):
    """True if the response ended its turn by itself."""
    return completion.ids[-1] == tokenizer.eos_id


def obeyed(tokenizer, completion):
    """With reasoning off: no thought after all, one line, and the end of the turn."""
    said = tokenizer.decode(completion.ids)
    return (
        ended(tokenizer, completion) and THINK not in said and END_THINK not in said and "\n" not in completion.answer
    )


def well_formed(tokenizer, completion):
    """With reasoning on: exactly one `</think>` (ours or the model's), an answer behind it, and the end of the turn."""
    said = tokenizer.decode(completion.ids)
    return (
        ended(tokenizer, completion)
        and said.count(END_THINK) == 1
        and THINK not in said.replace(END_THINK, "")
        and bool(completion.answer)
    )


def share(flags):
    """The share of true ones."""
    flags = list(flags)
    return sum(flags) / len(flags)


def reasoning(model, tokenizer, count, seed=0):
    """{"on", "off", "obeyed", "well formed"}: shares of `count` held-out questions."""
    asked = questions(count, seed)
    on, off = ask(model, tokenizer, asked), ask(model, tokenizer, asked, thinking=False)
    return {
        "on": share(tasks.check(s, c.answer) for s, c in zip(asked, on)),
        "off": share(tasks.check(s, c.answer) for s, c in zip(asked, off)),
        "obeyed": share(obeyed(tokenizer, c) for c in off),
        "well formed": share(well_formed(tokenizer, c) for c in on),
    }


def budget_curve(model, tokenizer, budgets=BUDGETS, count=108, seed=0):
    """One dict a budget: budget, accuracy, well_formed (shares), thinking_tokens, answer_tokens (means), closed (share
    of the thoughts that the budget closed). The last line is without a budget (None)."""
    asked, lines = questions(count, seed), []
    for budget in (*budgets, None):
        done = ask(model, tokenizer, asked, budget=budget)
        lines.append({
            "budget": budget,
            "accuracy": share(tasks.check(s, c.answer) for s, c in zip(asked, done)),
            "well_formed": share(well_formed(tokenizer, c) for c in done),
            "thinking_tokens": sum(c.thinking_tokens for c in done) / count,
            "answer_tokens": sum(c.answer_tokens for c in done) / count,
            "closed": share(c.closed_by in ("newline", "forced") for c in done),
        })  # fmt: skip
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# Tools and instructions


def play(model, tokenizer, episodes, thinking=True):
    """Play episodes of tools.py to their ends, all of them a turn at a time; returns the finished `Play`s."""
    plays = [tools.Play(episode) for episode in episodes]
    longest = max(len(tokenizer.encode(f"{t.trace}\n\n{t.text}\n")) for e in episodes for t in e.turns)
    while waiting := [p for p in plays if not p.done]:
        prompts = [chat_prompt(tokenizer, p.messages, thinking) for p in waiting]
        for p, done in zip(waiting, generate(model, tokenizer, prompts, longest + ROOM, thinking=thinking)):
            p.say(done.answer)
    return plays


def tool_success(model, tokenizer, count, seed=0, thinking=True):
    """{"tools", "chain", "restraint"}: shares of held-out episodes that end right; of all, of those where a result
    decides the next call, and of those where no tool must be called. `count` episodes, the kinds in turn."""
    kinds = [tools.KINDS[i % len(tools.KINDS)] for i in range(max(count, len(tools.KINDS)))]
    episodes = [tools.sample(kind, Random(f"{seed} {i}"), "test") for i, kind in enumerate(kinds)]
    right = [p.success() for p in play(model, tokenizer, episodes, thinking)]
    of = lambda names: share(r for r, kind in zip(right, kinds) if kind in names)
    return {"tools": share(right), "chain": of(tools.SEVERAL), "restraint": of(("lacking", "unrelated"))}


def instruction_following(model, tokenizer, count, seed=0, thinking=True):
    """{"instructions", "conditions"}: shares of held-out prompts with all conditions met, and of conditions met."""
    drawn = [instructions.sample(Random(f"{seed} {i}"), 1 + i % 3, "test") for i in range(count)]
    prompts = [chat_prompt(tokenizer, [{"role": "user", "content": p.text}], thinking) for p, _, _ in drawn]
    room = ROOM + max(len(tokenizer.encode(f"{trace}\n\n{answer}\n")) for _, trace, answer in drawn)
    done = generate(model, tokenizer, prompts, room, thinking=thinking)
    met = [instructions.follows(p, c.answer) for (p, _, _), c in zip(drawn, done)]
    strict = [instructions.check(p, c.answer) for (p, _, _), c in zip(drawn, done)]
    return {"instructions": share(strict), "conditions": share(flag for flags in met for flag in flags)}


def recall(model, tokenizer, count, seed=0, thinking=True):
    """{"recall": share of `count` held-out long conversations that are answered right}."""
    asked = [conversations.SKILLS["long"](Random(f"{seed} {i}"), "test") for i in range(count)]
    prompts = [chat_prompt(tokenizer, example.messages, thinking) for example in asked]
    room = ROOM + max(len(tokenizer.encode(f"{e.trace}\n\n{e.answer}\n")) for e in asked)
    done = generate(model, tokenizer, prompts, room, thinking=thinking)
    return {"recall": share(e.answer == c.answer for e, c in zip(asked, done))}


def preference(model, tokenizer, count, seed=0, thinking=True):
    """{"liked": mean over `count` held-out prompts of the answer's points (preferences.score), none below 0, over those
    of the best answer}."""
    asked, best = [], []
    for i in range(count):
        rng = Random(f"{seed} {i}")
        asked.append(preferences.draw_prompt(rng, "test"))
        best.append(preferences.best(rng, asked[-1]))
    prompts = [chat_prompt(tokenizer, [{"role": "user", "content": p.text}], thinking) for p in asked]
    room = ROOM + 3 * max(len(tokenizer.encode(answer)) for answer in best)  # a thought that lists the words, and they
    done = generate(model, tokenizer, prompts, room, thinking=thinking)
    points = [(preferences.score(p, c.answer), preferences.score(p, b)) for p, c, b in zip(asked, done, best)]
    return {"liked": share(max(0.0, got) / most for got, most in points)}


def table(model, tokenizer, count, seed=0):
    """All skills of a model, {name: share}, from `count` held-out prompts each."""
    found = reasoning(model, tokenizer, count, seed)
    found |= tool_success(model, tokenizer, count, seed)
    found |= instruction_following(model, tokenizer, count, seed)
    found |= recall(model, tokenizer, count, seed)
    return found | preference(model, tokenizer, count, seed)


def format_line(found):
    """A table as one line for people."""
    return "  ".join(f"{name} {value:.0%}" for name, value in found.items())


# ----------------------------------------------------------------------------------------------------------------------
# The curve on paper


def format_curve(lines):
    head = f"{'budget':>7} {'accuracy':>9} {'well formed':>12} {'thought':>8} {'answer':>7} {'closed':>7}"
    rows = [
        f"{'none' if e['budget'] is None else e['budget']:>7} {e['accuracy']:>9.0%} {e['well_formed']:>12.0%} "
        f"{e['thinking_tokens']:>8.1f} {e['answer_tokens']:>7.1f} {e['closed']:>7.0%}"
        for e in lines
    ]
    return "\n".join([head, *rows])


def plot_curves(curves, path):
    """Accuracy, well-formedness and answer length over the budget; curves: {label: lines of `budget_curve`}."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.5))
    for axis, key, title in zip(
        axes, ("accuracy", "well_formed", "answer_tokens"), ("accuracy", "well formed", "tokens in the answer")
    ):
        for label, lines in curves.items():
            limited = [e for e in lines if e["budget"] is not None]
            (drawn,) = axis.plot([e["budget"] for e in limited], [e[key] for e in limited], "o-", label=label)
            axis.axhline(lines[-1][key], linestyle=":", linewidth=1, color=drawn.get_color())  # without a budget
        axis.set(xlabel="thinking budget, tokens", title=title, ylim=(0, None if key == "answer_tokens" else 1.05))
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def run(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("--checkpoint", nargs="+", default=["out-sft3"], help="one checkpoint folder, or several")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--impl", default="auto", help="auto, torch or triton: who computes the Mamba-2 layers")
    parser.add_argument("--count", type=int, default=108, help="held-out prompts of each kind; lower it for speed")
    parser.add_argument("--seed", type=int, default=0, help="which held-out prompts are drawn")
    parser.add_argument("--curve", action="store_true", help="also the budget curve")
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS), help="its budgets, in tokens")
    parser.add_argument("--plot", default="", help="draw the curve to this file")
    parser.add_argument("--json", action="store_true", help="print one JSON object a checkpoint instead of tables")
    args = parser.parse_args(argv)
    if args.count < 1 or min(args.budgets) < 0:
        raise ValueError(f"--count must be at least 1 and --budgets at least 0; got {args.count}, {args.budgets}")
    if args.plot and not Path(args.plot).absolute().parent.is_dir():
        raise ValueError(f"--plot {args.plot}: there is no folder {Path(args.plot).parent}, make it first")
    device, _ = choose_device(args.device)
    choose_impl(args.impl, device)
    curves = {}
    for folder in args.checkpoint:
        start = time.time()
        model, tokenizer = load_pretrained(folder, device)
        model.use(choose_impl(args.impl, device, model.config)[0])
        if tokenizer is None:
            raise ValueError(f"{folder} has no tokenizer.json, so no question can be put to the model")
        result = {
            "checkpoint": folder,
            "count": args.count,
            "skills": table(model, tokenizer, args.count, args.seed),
        }
        if args.curve or args.plot:
            result["curve"] = budget_curve(model, tokenizer, args.budgets, args.count, args.seed)
            curves[folder] = result["curve"]
        result["seconds"] = round(time.time() - start, 1)
        if args.json:
            print(json.dumps(result), flush=True)
            continue
        print(f"{shlex.quote(folder)}: {args.count} held-out prompts of each kind, greedy ({result['seconds']} s)")
        print(format_line(result["skills"]))
        if curves:
            print(format_curve(result["curve"]), flush=True)
    if args.plot:
        plot_curves(curves, args.plot)


def main(argv=None):
    return finish("skills", lambda: run(argv), "lower --count, or give --device cpu")


if __name__ == "__main__":
    sys.exit(main())
