"""What the record of compression_twins.py shows: tables and a figure, from the record alone.

    python notebooks/compression_twins.py --source assets/compression_twins.json --figure assets/compression.png

"The gap closed" is the share of the way from the plain cut, not distilled, to the parent of the same seed. Numbers are
means over seeds, in brackets the least and the most.
"""

import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import evaluate
from prune import CUT
from recovery import recovered

AFTER = "FFN neurons"  # the axis on which the tap matters


def shares(run):
    """The exam of a run as `recovery.recovered` wants it: {"exact": {family or kind: share}, "bits": {kind: bits}}."""
    exact = {name: statistics.mean(of.values()) for name, of in run.get("exact", {}).items()}
    if exact:
        table = {name: {n: {"exact": x} for n, x in of.items()} for name, of in run["exact"].items()}
        cells = [x for of in run["exact"].values() for x in of.values()]
        exact |= evaluate.by_kind(table) | {"all": statistics.mean(cells)}
    return {"exact": exact, "bits": run["bits"]}


def closed(record, run, what):
    """The share of the gap, from the plain cut to the parent of its seed, that a run closed in `what`; or None."""
    of = {r["arm"]: r for r in record["runs"] if r["seed"] == run["seed"]}
    if "parent" not in of or "pruned" not in of:
        return None
    return recovered(*(shares(r) for r in (of["parent"], of["pruned"], run))).get(what)


def several(values, form=".0%"):
    """The mean, and from where to where, of the values that are there."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    spread = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def holds(runs, names, value, strict=False):
    """In how many seeds value(run) is lowest at the first of the arms `names`, or with `strict` rises from arm to arm;
    of the seeds that have them all."""
    of = [{r["seed"]: value(r) for r in runs.get(name, [])} for name in names]
    seeds = set.intersection(*map(set, of))
    rows = [[values[seed] for values in of] for seed in seeds]
    kept = [row == sorted(set(row)) if strict else row[0] < min([*row[1:], math.inf]) for row in rows]
    return f"{sum(kept)} of {len(kept)} seeds"


def orders(runs, names, strict=False):
    """`holds` for the loss, for exact answers (the most first), and for the bits of each kind of text, in words."""
    of = lambda value: holds(runs, names, value, strict)
    bits = ", ".join(f"{of(lambda r, k=k: r['bits'][k])} on {k}" for k in runs[names[0]][0]["bits"])
    return of(lambda r: r["loss"]), of(lambda r: -shares(r)["exact"].get("all", 0)), bits


def best_arm(record):
    """The trained run of the target's shape whose mean over seeds is the most exact."""
    means = {}
    for run in record["runs"]:
        if run.get("part") == "recovery" and run["tokens"] and run.get("exact"):
            means.setdefault(run["arm"], []).append(shares(run)["exact"]["all"])
    return max(means, key=lambda arm: statistics.mean(means[arm])) if means else None


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def axes_tables(runs):
    cuts = {}
    for run in runs:
        for one in run["cuts"]:
            cuts.setdefault((one["axis"], one["size"], one["of"]), []).append(one)
    rows, ways, layers, behind = [], [], [], []
    for (axis, size, whole), ones in cuts.items():
        holds = [o["ranked"] < statistics.mean(o["random"]) < o["reversed"] for o in ones]
        under = [sum(o["ranked"] < x for x in o["random"]) for o in ones]
        rows.append([
            f"{axis} {whole} -> {size}", *(several([o["ranked"] for o in ones], ".3f"),
            several([x for o in ones for x in o["random"]], ".3f"), several([o["reversed"] for o in ones], ".3f")),
            f"{sum(holds)} of {len(holds)}", f"{sum(under)} of {len(under) * len(ones[0]['random'])}",
        ])  # fmt: skip
        by = [several([o["by"][way] for o in ones], ".3f") for way in ones[0]["by"]]
        if axis == "layers":
            kept = [o["by"]["iterative"] <= o["by"]["one-shot"] for o in ones]
            layers.append([f"{whole} -> {size}", *by, f"{sum(kept)} of {len(kept)}"])
        else:
            ways.append([f"{axis} {whole} -> {size}", *by, several([o["rescaled"] for o in ones], ".3f")])
            if axis == AFTER and "post, l2" in ones[0]["by"]:
                post = [(o["by"]["post, l2"], o["random"]) for o in ones]
                mean, each = sum(x < statistics.mean(of) for x, of in post), sum(x < y for x, of in post for y in of)
                draws = sum(len(of) for _, of in post)
                behind.append(f"{whole} -> {size} in {mean} of {len(post)} seeds and {each} of {draws} cuts")
    text = [
        f"What a cut costs before any distillation: loss on fresh rows, nats a token; {len(runs)} seed(s), "
        f"{len(next(iter(cuts.values()))[0]['random'])} random cuts of each size and seed; mean (least to most):",
        table(["cut", "ranked", "random", "reversed", "in this order (mean of random), seeds",
               "random cuts that ranked beats"], rows),
    ]  # fmt: skip
    first = lambda axis: next((ones[0] for (name, *_), ones in cuts.items() if (name == "layers") == axis), None)
    if ways:
        text += [
            "The same by tap (neurons before or after their activation) and aggregate; the last with norms rescaled:",
            table(["cut", *first(False)["by"], "pre, l2, rescaled"], ways),
        ]
    if behind:
        text.append(
            f"{AFTER} by what leaves them ('post, l2') cost less than the mean of the random cuts, and than each: "
            f"{'; '.join(behind)}."
        )
    if layers:
        text += ["Layers, by the way they are measured:",
                 table(["layers", *first(True)["by"], "iterative no worse than one-shot, seeds"], layers)]  # fmt: skip
    return text


def tables(record):
    """The record as text."""
    runs = {}
    for run in record["runs"]:
        runs.setdefault(run["arm"], []).append(run)
    tokens = record["steps"] * record["rows"] * record["length"]
    text = [
        f"`{record['command']}`, {record['date']}, {record['card']}, torch {record['torch']}; {record['preset']}, "
        f"parents of {record['steps']} steps of {record['rows']} x {record['length']} tokens = {tokens / 1e6:.2f} M; "
        f"exact answers on {record['count']} held-out questions a family and level, levels 1 to 3."
    ]
    if "axes" in runs:
        text += axes_tables(runs["axes"])

    def shape(run):
        c = run["config"]
        return f"{len(c['pattern'])} layers, {', '.join(str(c[name]) for name in CUT[:3])}"

    titles = dict(
        depth="Fewer layers at equal tokens (parameters are not equal):",
        width="With and without Mamba heads cut, at equal parameters and tokens:",
        recovery="Recovery at the target's shape:",
    )
    kinds = ["reasoning", "retrieval", "all"]
    head = [
        "arm",
        "seeds",
        "layers, hidden, MLP, heads",
        "parameters",
        "tokens, of the parent's",
        "loss as cut",
        "loss",
    ]
    for part, title in titles.items():
        names = [name for name, of in runs.items() if of[0].get("part") == part]
        if not names:
            continue
        rows = []
        for name in (["parent"] if "parent" in runs else []) + names:
            of = runs[name]
            row = [name, len(of), shape(of[0]), f"{of[0]['parameters']:,}", f"{of[0]['tokens'] / tokens:.1%}"]
            row += [several([r.get("before") for r in of], ".3f"), several([r["loss"] for r in of], ".3f")]
            row += [several([shares(r)["exact"].get(kind) for r in of], ".1%") for kind in kinds]
            row += [several([r["bits"].get(kind) for r in of], ".3f") for kind in of[0]["bits"]]
            if part == "recovery":
                own = name not in ("parent", "pruned")
                what = [f"exact {kind}" for kind in kinds] + [f"bits {kind}" for kind in of[0]["bits"]]
                row += [several([closed(record, r, w) for r in of], ".0%") if own else "-" for w in what]
            rows.append(row)
        bits = [f"{kind}, bits" for kind in runs[names[0]][0]["bits"]]
        gaps = [f"gap closed, {kind}" for kind in (*kinds, *runs[names[0]][0]["bits"])] if part == "recovery" else []
        text += [title, table([*head, *kinds, *bits, *gaps], rows)]
        if part == "depth":
            told = (
                "With every step of depth the loss rises in {}, and exact answers fall in {}; bits a byte rise in {}."
            )
            text.append(told.format(*orders(runs, names, strict=True)))
        elif part == "width":
            told = "{!r} has the lowest loss in {}, and the most exact answers in {}; the fewest bits a byte in {}."
            text.append(told.format(names[0], *orders(runs, names)))
        elif {"kl", "ce"} <= runs.keys():
            told = "'kl' has a lower loss than 'ce' in {}, and more exact answers in {}; fewer bits a byte in {}."
            text.append(told.format(*orders(runs, ["kl", "ce"])))

    best = best_arm(record)
    shown = [a for a in dict.fromkeys(("parent", "pruned", "kl", best)) if a in runs and runs[a][0].get("exact")]
    if shown:
        families = list(shares(runs[shown[0]][0])["exact"])
        rows = [[f, *(several([shares(r)["exact"][f] for r in runs[a]], ".0%") for a in shown)] for f in families]
        text += [f"By family; {best!r} is the most exact of the recoveries:", table(["family", *shown], rows)]
    if record["memory"]:
        rows = [
            [m["arm"], ", ".join(map(str, m["shape"])), f"{m['formula'] / 2**20:.3f}", f"{m['held'] / 2**20:.3f}",
             f"{m['held'] / m['formula'] - 1:+.2%}"]
            for m in record["memory"]
        ]  # fmt: skip
        head = ["first tried as", "hidden, MLP, heads, head channels; M, *, -", "formula, MiB", "held, MiB", "off by"]
        text += [f"Weights in 16 bits and a row of {record['memory'][0]['tokens']:,} tokens:", table(head, rows)]
    return "\n\n".join(text)


def figure(record, path):
    """By family: the parent, the model as cut, and after recovery, by forward KL and by the arm that is the most exact;
    thin lines from the worst seed to the best."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    best = best_arm(record)
    runs = {
        arm: [shares(r)["exact"] for r in record["runs"] if r["arm"] == arm and r.get("exact")]
        for arm in dict.fromkeys(("parent", "pruned", "kl", best))
    }
    runs = {arm: of for arm, of in runs.items() if of}
    if not runs:
        raise ValueError("the record has no exact answers to draw: give --count above 0")
    families = [f for f in runs[best][0] if f not in ("reasoning", "retrieval", "all")]
    fig, axis = plt.subplots(figsize=(11, 3.8))
    for i, (arm, of) in enumerate(runs.items()):
        mean = [statistics.mean(r[f] for r in of) for f in families]
        low, high = ([abs(m - pick(r[f] for r in of)) for f, m in zip(families, mean)] for pick in (min, max))
        at = [x + (i - (len(runs) - 1) / 2) * 0.81 / len(runs) for x in range(len(families))]
        label = arm if arm in ("parent", "pruned") else f"recovered ({arm})"
        axis.bar(at, mean, 0.75 / len(runs), yerr=(low, high), label=label, error_kw=dict(linewidth=0.8))
    axis.set_xticks(range(len(families)), families, rotation=30, ha="right")
    seeds = len(runs[best])
    axis.set(ylabel="exact answers", ylim=(0, 1.02), title=f"{record['preset']}, cut and recovered, {seeds} seed(s)")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)
