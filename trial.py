"""One candidate of the search: cut, distilled for a while, asked, timed.

A candidate is a shape until it is tried, and only trying says what it is worth: the order of models that were pruned
and not distilled says little about the order after it. So each gets the same teacher, tokens and steps, and then
answers the same held-out questions. Speed is measured, not counted: two shapes of equal bytes are not equally fast.

Everything lies in a folder of its own for each candidate, `pruned` and `distilled`; what is there is not made again,
and a distillation that was stopped goes on.
"""

import time
from pathlib import Path

from device import choose_impl  # isort: skip  (before torch)
import torch

import distill
from checkpoint import load_pretrained, save_pretrained
from engine import Engine

LENGTH = 256  # tokens in a calibration row


def make_smaller(model, rows, remove=None, target=None):
    """A smaller model from prune.py: without layers, or narrower.

    rows: a calibration set. remove: {letter: how many}, or (a number, attention layers among them), where one look at
    all layers says how many of the other kinds go. target: a ModelConfig whose widths are wanted.
    """
    from calibration import batches
    from importance import depth_order, importance, sweep
    from prune import cut, make_plan

    letters = model.config.hybrid_override_pattern
    batch = batches(rows, max(1, 4096 // rows[0].shape[1]))
    if target is not None:
        return cut(model, make_plan(model.config, target, [], importance(model, batch)))
    if not isinstance(remove, dict):
        total, attention = remove
        everything = list(range(len(letters)))
        scores = sweep(model, batch, everything, [i for i in everything if letters[i] != "*"])
        least = sorted(scores, key=scores.get)[: total - attention]
        remove = {"*": attention} | {x: sum(letters[i] == x for i in least) for x in "M-"}
    gone = [i for i, _ in depth_order(model, batch, remove).removed]
    return cut(model, make_plan(model.config, model.config, gone))


def calibration_rows(tokenizer, samples, seed):
    """What importance is measured on."""
    import calibration

    return calibration.make(tokenizer, tokenizer.vocab_size, samples, LENGTH, seed)[0]


def tokens_per_second(model, context, rows=8, steps=24):
    """Tokens spoken by `rows` rows together in a second, when each holds two thirds of min(context, 24,576) tokens:
    half way through an answer twice as long as its prompt, as the report measures with 8,192 and 16,384."""
    longest = min(context, 24576)
    engine = Engine(model, rows, longest)
    logits = torch.zeros(rows, 1, device=model.lm_head.weight.device)
    best = 0.0
    for _ in range(4):  # the first warms up
        engine.lengths = [max(1, longest * 2 // 3 - steps)] * rows
        if logits.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            logits = engine.step(logits.argmax(-1))
        logits.sum().item()  # waits for the device
        best = max(best, rows * steps / (time.perf_counter() - start))
    return best


class Trial:
    """Prune, distil, ask and time one candidate after another, each in a folder of its own under `out`."""

    def __init__(self, args, device):
        self.args, self.device, self.out = args, device, Path(args.out)
        self.tokenizer = load_pretrained(args.checkpoint)[1]
        if self.tokenizer is None:
            raise ValueError(f"{args.checkpoint} has no tokenizer.json, so its candidates cannot be asked anything")
        self.rows = None

    def run(self, name, parent, **how):
        """{"folder", "config", "accuracy", "tokens_per_second"} of the candidate that `make_smaller` makes of the model
        in the folder `parent`."""
        a, folder = self.args, self.out / name
        if not (folder / "pruned" / "config.json").exists():
            if self.rows is None:
                self.rows = calibration_rows(self.tokenizer, a.samples, a.seed)
            smaller = make_smaller(load_pretrained(parent, self.device)[0], self.rows, **how)
            save_pretrained(folder / "pruned", smaller, self.tokenizer)
        print(f"\n{name}: {folder / 'pruned'}", flush=True)
        asked = distill.DistillConfig(
            teacher=str(a.checkpoint), student=str(folder / "pruned"), out=str(folder / "distilled"), device=a.device,
            length=a.length, steps=a.steps, step_tokens=a.step_tokens, eval_count=a.eval_count, seed=a.seed, lr=a.lr,
            compile="off",  # every candidate has shapes of its own
        )  # fmt: skip
        done = distill.run(asked)
        if done is None:
            raise KeyboardInterrupt
        dtype = torch.bfloat16 if self.device.type == "cuda" else None  # as it would be served
        model = load_pretrained(folder / "distilled", self.device, dtype)[0]
        model.use(choose_impl("auto", self.device, model.config)[0])
        return {
            "folder": str(folder / "distilled"), "config": model.config, "accuracy": done["after"]["exact"]["all"],
            "bits": done["after"]["bits"], "tokens_per_second": tokens_per_second(model, a.context),
        }  # fmt: skip
