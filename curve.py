"""The picture of a run, drawn from its log: losses on the left, the learning rate on the right.

Lines are what was trained on; dots are held-out text, where it was measured on the way. This file must not know
training: a log is a list of dicts, one for each line of log.jsonl.
"""


def plot(log, path, marks):
    """Losses and rate over millions of tokens; marks: {million tokens: what happens there}, drawn as lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [e for e in log if "loss" in e]
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5))
    millions = [e["tokens"] / 1e6 for e in lines]
    left.plot(millions, [e["task_loss"] for e in lines], label="tasks: nats a token")
    if any(e["bits_per_byte"] for e in lines):
        left.plot(millions, [e["bits_per_byte"] for e in lines], label="text: bits a byte")
    exams = [(e["tokens"] / 1e6, bits) for e in log for bits in e.get("held_out_bits_per_byte", {}).values()]
    if exams:
        left.plot(*zip(*exams), "o", markersize=4, label="held-out text: bits a byte")
    for place, label in marks.items():
        left.axvline(place, linestyle=":", color="gray", linewidth=1)
        right.axvline(place, linestyle=":", color="gray", linewidth=1)
        right.text(place, 0, f"{label} ", rotation=90, ha="right", va="bottom", fontsize=7)
    left.set(xlabel="million tokens", yscale="log", title="training loss")
    left.legend()
    right.plot(millions, [e["lr"] for e in lines])
    right.set(xlabel="million tokens", ylim=(0, None), title="learning rate: warm-up, stable, decay")
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)
