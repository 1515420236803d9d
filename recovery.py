"""What distillation gave back: the same exam for teacher, student before and student after, and the picture of the run.

The figure that counts is the share of the gap: 0 is the student as it was cut, 1 is the teacher. It is taken for every
measure apart (exact answers by kind, bits a byte by text), because they do not come back alike. Where the gap is narrow
the share is mostly noise: look at the figures themselves. This file must not know losses or training.
"""

import torch

import evaluate


def exam(model, tokenizer, held_out, levels, count, tokens=50_000):
    """{"exact": {"reasoning", "retrieval", "all": share}, "bits": {kind: bits a byte}}.

    held_out: {kind: [text]}, of each `tokens` tokens are read. levels, count: of questions, see `evaluate.accuracy`."""
    with torch.compiler.set_stance("force_eager"):  # answers have all lengths: nothing to compile for
        model.eval()
        bits = {k: evaluate.bits_per_byte(model, tokenizer, t, max_tokens=tokens) for k, t in held_out.items() if t}
        table = evaluate.accuracy(model, tokenizer, levels=levels, count=count)
    cells = [cell["exact"] for row in table.values() for cell in row.values()]
    return {"exact": evaluate.by_kind(table) | {"all": sum(cells) / len(cells)}, "bits": bits}


def recovered(teacher, before, after):
    """Of each figure the share of the way from `before` to `teacher` that `after` has gone; None if there is no way."""
    share = lambda t, b, a: None if t == b else (a - b) / (t - b)
    found = {f"exact {k}": share(teacher["exact"][k], before["exact"][k], after["exact"][k]) for k in after["exact"]}
    return found | {f"bits {k}": share(teacher["bits"][k], before["bits"][k], after["bits"][k]) for k in after["bits"]}


def plot(log, path, marks, kind):
    """The loss over millions of tokens, and the rate; dotted lines where a stage begins."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [e for e in log if "loss" in e]
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5))
    for axis, key in ((left, "loss"), (right, "lr")):
        axis.plot([e["step"] for e in lines], [e[key] for e in lines])
        axis.set(xlabel=f"step of {lines[-1]['tokens'] / lines[-1]['step']:,.0f} tokens")
        for step, label in marks.items():
            axis.axvline(step, linestyle=":", color="gray", linewidth=1)
            axis.text(step, axis.get_ylim()[0], f" {label}", rotation=90, va="bottom", fontsize=7)
    left.set(yscale="log", title=f"distance to the teacher ({kind}), nats a token" if kind != "ce" else "loss (ce)")
    right.set(title="learning rate")
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)
