"""What the record of alignment_twins.py shows: tables and figures, from the record alone.

    python notebooks/alignment_twins.py --source assets/alignment_twins.json --figures assets/alignment

Numbers are means over seeds, in brackets the least and the most.
"""

import statistics

from compression_tables import several, table

CHAIN = ("sft1", "sft2", "sft3", "ifrl", "dpo", "rlhf")
SKILLS = (
    "on", "off", "obeyed", "well formed", "tools", "chain", "restraint",
    "instructions", "conditions", "recall", "liked",
)  # fmt: skip
MIDDLE = (0.3, 0.4, 0.5, 0.6, 0.7)  # where a merge is looked for


def points(values):
    return several([None if v is None else 100 * v for v in values], "+.1f")


def by_job(record):
    """{job: {seed: run}}."""
    found = {}
    for run in record["runs"]:
        found.setdefault(run["job"], {})[run["seed"]] = run
    return found


def end(runs, job, name, seed):
    return runs.get(job, {}).get(seed, {}).get("end", {}).get(name)


def ends(runs, job, name):
    return [end(runs, job, name, seed) for seed in sorted(runs.get(job, {}))]


def gains(runs, before, after, name):
    """after - before in the seeds that have both."""
    pairs = [(end(runs, before, name, s), end(runs, after, name, s)) for s in sorted(runs.get(after, {}))]
    return [b - a for a, b in pairs if None not in (a, b)]


def merged_means(runs, name):
    """{alpha: mean over seeds of a skill of the merged models}."""
    found = {}
    for run in runs["merge"].values():
        for line in run["sweep"]:
            found.setdefault(line["alpha"], []).append(line["skills"].get(name, 0.0))
    return {alpha: statistics.mean(values) for alpha, values in found.items()}


def share_kept(run, alpha):
    """The least share of a gain that a merge at `alpha` keeps, over the skills in which the ends differ by three
    points or more; with the name of the skill. None without such skills."""
    lines = {e["alpha"]: e["skills"] for e in run["sweep"]}
    found = []
    for name, a in lines[0.0].items():
        low, high = sorted((a, lines[1.0][name]))
        if high - low >= 0.03:
            found.append(((lines[alpha][name] - low) / (high - low), name))
    return min(found) if found else None


def skills_table(record, runs):
    stages = [job for job in CHAIN if job in runs]
    head = ["after", *SKILLS, "seconds"]
    rows = [
        [
            job,
            *(several(ends(runs, job, name)) for name in SKILLS),
            several([r["seconds"] for r in runs[job].values()], ".0f"),
        ]
        for job in stages
    ]
    if "merge" in runs:
        halves = [next(e["skills"] for e in r["sweep"] if e["alpha"] == 0.5) for r in runs["merge"].values()]
        rows.append(["merge, alpha 0.5", *(several([h.get(name) for h in halves]) for name in SKILLS), "-"])
    return f"All skills after every stage, {record['count']} held-out prompts each:\n\n{table(head, rows)}"


def packing_table(runs):
    rows = []
    for first, then, how in (
        ("sft1", "sft2", "packed, reset"), ("sft1, no reset", "sft2, after no reset", "packed, no reset"),
        ("sft1, alone", "sft2, after alone", "one a row"),
    ):  # fmt: skip
        if first in runs:
            row = [how]
            for job in (first, then):
                row += [several(ends(runs, job, name)) for name in ("tools", "chain", "restraint")]
            rows.append(row)
    head = ["stage 1", *(f"{name} after stage {n}" for n in (1, 2) for name in ("tools", "chain", "restraint"))]
    return "Packing: the same examples in the same steps (stage 2 is one a row for all):\n\n" + table(head, rows)


def budget_table(runs):
    names = [job for job in ("budget, sft2", "budget, no cut thoughts", "budget") if job in runs]
    rows = []
    for i, line in enumerate(next(iter(runs[names[0]].values()))["curve"]):
        row = ["none" if line["budget"] is None else line["budget"]]
        for job in names:
            lines = [run["curve"][i] for run in runs[job].values()]
            row += [several([e["accuracy"] for e in lines]), several([e["well_formed"] for e in lines]),
                    several([e["answer_tokens"] for e in lines], ".1f")]  # fmt: skip
        rows.append(row)
    label = {"budget, sft2": "sft2", "budget, no cut thoughts": "sft3 without cuts", "budget": "sft3"}
    head = ["budget, tokens"]
    head += [f"{label[job]}: {what}" for job in names for what in ("accuracy", "well formed", "answer tokens")]
    return "The thinking budget:\n\n" + table(head, rows)


def gym_table(runs):
    rows, of = [], list(runs["gym"].values())
    families = [k for k in of[0]["before"] if k.endswith(" thought")]
    for family in (name.removesuffix(" thought") for name in families):
        row = [family]
        for when in ("before", "end"):
            row += [several([r[when].get(family) for r in of]), several([r[when].get(f"{family} off") for r in of]),
                    several([r[when].get(f"{family} thought") for r in of], ".1f")]  # fmt: skip
        rows.append(row)
    head = ["family", *(f"{when}: {what}" for when in ("before", "after") for what in ("on", "off", "thought, tokens"))]
    rewards = [[e["reward"] for e in r["log"] if "reward" in e] for r in of]
    curve = [several([r[min(len(r) - 1, i * len(r) // 6)] for r in rewards], ".2f") for i in range(7)]
    return (
        "reasoning-gym, rewards only:\n\n"
        + table(head, rows)
        + "\n\nreward at each sixth of the run: "
        + ", ".join(curve)
    )


def merge_table(runs):
    of = list(runs["merge"].values())
    rows = []
    for line in of[0]["sweep"]:
        alpha = line["alpha"]
        every = [next(e["skills"] for e in r["sweep"] if e["alpha"] == alpha) for r in of]
        worst = [share_kept(r, alpha) for r in of]
        names = sorted({w[1] for w in worst if w})
        row = [alpha, *(several([e.get(name) for e in every]) for name in SKILLS)]
        rows.append([*row, several([w[0] for w in worst if w]), ", ".join(names)])
    head = ["alpha", *SKILLS, "least gain kept", "of"]
    return "dpo (alpha 0) and rlhf (alpha 1), merged:\n\n" + table(head, rows)


def verdict(holds, text):
    return f"| {'held' if holds else 'MISSED'} | {text} |"


def claims(record, runs):
    """The pass criteria that were written down beforehand, and what came out."""
    mean, rows = statistics.mean, []
    have = lambda *jobs: sorted(set.intersection(*(set(runs.get(job, ())) for job in jobs)))  # the seeds that have all
    if have("sft1"):
        obeyed, thinking = ends(runs, "sft1", "obeyed"), gains_of(runs, "sft1", "off", "on")
        rows.append(verdict(min(obeyed) >= 0.95, f"reasoning-off obeyed by 95 % after stage 1: {several(obeyed)}"))
        rows.append(verdict(min(thinking) > 0, f"reasoning-on more accurate: by {points(thinking)} points"))
    if have("sft1, no empty thoughts"):
        control = ends(runs, "sft1, no empty thoughts", "obeyed")
        rows.append(verdict(max(control) < 0.95, f"without empty thoughts it is not obeyed: {several(control)}"))
    for job in ("sft1", "sft1, no reset"):
        if have(job, "sft1, alone"):
            cost = gains(runs, job, "sft1, alone", "tools")
            rows.append(verdict(mean(cost) >= 0.03, f"packing costs tool success ({job}): {points(cost)} points"))
    for first, then in (("sft1", "sft2"), ("sft1, no reset", "sft2, after no reset")):
        if have(first, then, "sft2, after alone"):
            lost = gains(runs, then, "sft2, after alone", "tools")
            rows.append(verdict(mean(lost) < 0.03, f"stage 2 regains it ({then}): {points(lost)} points are left"))
    if have("sft3", "ifrl"):
        few = gains(runs, "sft3", "ifrl", "instructions")
        many = [r["end"]["hard"] - r["before"]["hard"] for r in runs["ifrl"].values() if "hard" in r["before"]]
        won = [0.6 * a + 0.4 * b for a, b in zip(few, many)]
        told = f"{points(won)} (one to three {points(few)}, four and five {points(many)})"
        rows.append(verdict(mean(won) >= 0.1, f"ifrl lifts prompts of one to five conditions by 10 points: {told}"))
    for before, after, name, least in (("ifrl", "dpo", "tools", 0.05), ("dpo", "rlhf", "liked", 0.0)):
        if have(before, after):
            won = gains(runs, before, after, name)
            bar = f" by {100 * least:.0f} points or more" if least else ""
            rows.append(
                verdict(
                    mean(won) >= least - 1e-9 if least else mean(won) > 0, f"{after} lifts {name}{bar}: {points(won)}"
                )
            )
    if have("dpo"):
        won = [r["end"]["drawn"] - r["before"]["drawn"] for r in runs["dpo"].values() if "drawn" in r["before"]]
        if won:
            rows.append(
                verdict(mean(won) >= 0.05, f"dpo lifts held-out plays that are drawn by 5 points: {points(won)}")
            )
        success = [[e["success"] for e in r["log"] if "success" in e] for r in runs["dpo"].values()]
        told = [several([s[at] for s in success if s]) for at in (0, -1)]
        rows.append(f"| - | plays of dpo's first and last round, at temperature 1: {told[0]} and {told[1]} right |")
    if have("rlhf"):
        for name, what in (("judged", "the reward model's score"), ("ruled", "the hidden rule's points")):
            won = [r["end"][name] - r["before"][name] for r in runs["rlhf"].values() if name in r["before"]]
            rows.append(verdict(bool(won) and min(won) > 0, f"rlhf lifts {what}: {several(won, '+.2f')}"))
        cost = {n: mean(gains(runs, "dpo", "rlhf", n) or [0]) for n in SKILLS if n != "liked"}
        told = ", ".join(f"{n} {100 * v:+.1f}" for n, v in cost.items() if abs(v) >= 0.01)
        rows.append(f"| - | what rlhf does elsewhere, points: {told or 'nothing of 1 or more'} |")
    if have("budget"):
        curves = [r["curve"] for r in runs["budget"].values()]
        formed = min(e["well_formed"] for c in curves for e in c)
        rows.append(verdict(formed >= 0.98, f"with cut thoughts 98 % well formed at every budget: least {formed:.1%}"))
        ratio = [e["answer_tokens"] / c[-1]["answer_tokens"] for c in curves for e in c]
        flat, told = 0.8 <= min(ratio) and max(ratio) <= 1.2, f"{min(ratio):.0%} to {max(ratio):.0%}"
        rows.append(verdict(flat, f"answers of the same length, within 20 %: {told}"))
        means = [mean(e["accuracy"] for e in lines) for lines in zip(*curves)]
        rows.append(
            verdict(means == sorted(means), "accuracy rises with the budget: " + ", ".join(f"{m:.0%}" for m in means))
        )
    if have("budget, no cut thoughts"):
        curves = [r["curve"] for r in runs["budget, no cut thoughts"].values()]
        formed = [min(e["well_formed"] for e in c) for c in curves]
        ratio = [max(e["answer_tokens"] for e in c) / c[-1]["answer_tokens"] for c in curves]
        text = f"without: longer answers ({several(ratio, '.2f')} times at most), well formed down to {several(formed)}"
        rows.append(verdict(max(formed) < 0.98 and min(ratio) > 1.2, text))
    if have("merge"):
        best = []
        for run in runs["merge"].values():
            kept = [(share_kept(run, a), a) for a in MIDDLE]
            best.append(max((k[0], a) for k, a in kept if k) if all(k for k, _ in kept) else None)
        told = "; ".join("no gain of 3 points" if b is None else f"{b[0]:.0%} at {b[1]}" for b in best)
        every = all(b and b[0] >= 0.9 for b in best)
        rows.append(verdict(every, f"an alpha of 0.3 to 0.7 keeps 90 % of every gain of 3 points: {told}"))
        curve = {name: merged_means(runs, name) for name in ("instructions", "liked")}
        part = {n: [(c[a] - min(c[0.0], c[1.0])) / abs(c[1.0] - c[0.0]) for a in MIDDLE] for n, c in curve.items()
                if c[0.0] != c[1.0]}  # fmt: skip
        if len(part) == 2:
            least = [min(values) for values in zip(*part.values())]
            at = least.index(max(least))
            told = ", ".join(f"{n} {values[at]:.0%}" for n, values in part.items())
            text = f"the same for what each end was trained for, means over seeds: {told} at {MIDDLE[at]}"
            rows.append(verdict(max(least) >= 0.9, text))
    if seeds := have(*CHAIN, "reward"):
        took = [sum(runs[job][s]["seconds"] for job in (*CHAIN, "reward")) / 60 for s in seeds]
        rows.append(
            verdict(max(took) <= 20, f"the whole chain in 20 minutes on one GPU: {several(took, '.1f')}, shared")
        )
    speeds = [max(e["tokens_per_second"] for e in r["log"] if "tokens_per_second" in e)
              for job in ("ifrl", "rlhf", "gym") for r in runs.get(job, {}).values()]  # fmt: skip
    if speeds:
        rows.append(verdict(max(speeds) >= 300_000, f"rollouts at 300,000 tokens/s: {several(speeds, ',.0f')}, shared"))
    return "What was to be shown:\n\n| | |\n|---|---|\n" + "\n".join(rows)


def gains_of(runs, job, low, high):
    """The difference of two skills of the same run."""
    return [end(runs, job, high, s) - end(runs, job, low, s) for s in sorted(runs[job])]


def tables(record):
    """The record as text."""
    runs = by_job(record)
    base = "one base for all seeds" if record["one base"] else "a base for each seed"
    where = f"{record['date']}, {record['card']}, torch {record['torch']}; {record['preset']}, {base}."
    text = [f"`{record['command']}`, {where}"]
    if not runs:
        return text[0] + "\n\nno runs yet"
    text.append(claims(record, runs))
    if any(job in runs for job in CHAIN):
        text.append(skills_table(record, runs))
    for job, make in (
        ("sft1, alone", packing_table),
        ("budget", budget_table),
        ("gym", gym_table),
        ("merge", merge_table),
    ):
        if job in runs:
            text.append(make(runs))
    return "\n\n".join(text)


def figures(record, prefix):
    """PREFIX_skills.png (skills after every stage, and the merge), PREFIX_budget.png (the report's figure 5),
    PREFIX_rewards.png (rewards while they are learned from)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = by_job(record)
    stages = [job for job in CHAIN if job in runs]
    fig, axes = plt.subplots(1, 2, figsize=(12, 4))
    for name in ("on", "tools", "instructions", "recall", "liked"):
        every = [[v for v in ends(runs, job, name) if v is not None] for job in stages]
        at = [i for i, values in enumerate(every) if values]
        (line,) = axes[0].plot(at, [statistics.mean(every[i]) for i in at], "o-", label=name)
        axes[0].fill_between(at, [min(every[i]) for i in at], [max(every[i]) for i in at], alpha=0.15)
        if "merge" in runs:
            alphas = [e["alpha"] for e in next(iter(runs["merge"].values()))["sweep"]]
            means = [statistics.mean(e["skills"][name] for r in runs["merge"].values() for e in r["sweep"]
                                     if e["alpha"] == a and name in e["skills"]) for a in alphas]  # fmt: skip
            axes[1].plot(alphas, means, "o-", color=line.get_color(), label=name)
    axes[0].set_xticks(range(len(stages)), stages)
    axes[0].set(ylim=(-0.12, 1.03), ylabel="share of held-out prompts", title="after each stage")
    axes[1].set(ylim=(0, 1.03), xlabel="alpha: 0 is dpo, 1 is rlhf", title="merged")
    axes[0].legend(fontsize=8, loc="lower center", ncol=5, columnspacing=1.0)
    fig.tight_layout()
    fig.savefig(f"{prefix}_skills.png", dpi=100)
    plt.close(fig)

    fig, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    for job, label in (("budget, no cut thoughts", "without cut thoughts"), ("budget", "with cut thoughts")):
        if job not in runs:
            continue
        curves = [[e for e in r["curve"] if e["budget"] is not None] for r in runs[job].values()]
        for axis, key in zip(axes, ("accuracy", "well_formed", "answer_tokens")):
            budgets = [e["budget"] for e in curves[0]]
            lines = list(zip(*([e[key] for e in c] for c in curves)))
            axis.plot(budgets, [statistics.mean(v) for v in lines], "o-", label=label)
            axis.fill_between(budgets, [min(v) for v in lines], [max(v) for v in lines], alpha=0.15)
            axis.set(xlabel="thinking budget, tokens", title=key.replace("_", " "), ylim=(0, None))
    axes[0].legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(f"{prefix}_budget.png", dpi=100)
    plt.close(fig)

    fig, axes = plt.subplots(1, 3, figsize=(12, 3.2))
    for axis, job in zip(axes, ("ifrl", "rlhf", "gym")):
        for seed, run in runs.get(job, {}).items():
            spots = [(e["step"], e["reward"]) for e in run["log"] if "reward" in e]
            axis.plot(*zip(*spots), linewidth=1, label=f"seed {seed}")
        axis.set(xlabel="step", ylabel="mean reward", title=job)
    axes[0].legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(f"{prefix}_rewards.png", dpi=100)
    plt.close(fig)
