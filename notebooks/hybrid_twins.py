"""What is attention still for? Small twins of the hybrid, trained alike on one retrieval and one arithmetic task.

    python notebooks/hybrid_twins.py --seeds 3 --out assets/hybrid_twins.json

The twins are stacks of seven layers and a quarter of a million parameters. They differ in one thing, the mixer of four
of the layers:

    hybrid                  M-M*-M-     three Mamba-2 layers and one attention layer
    Mamba only              M-MM-M-     the attention layer replaced
    attention only          *-**-*-     the Mamba layers replaced; no positions, as in the hybrid
    attention + positions   *-**-*-     the same with learned positions added to the embeddings, as in a GPT

The last one is a control: nobody would train the third. All see the same rows in the same order (the data depend on
the task and the seed alone), with the same number of steps, learning rate and rule of initialisation. Because one
learning rate need not suit all, `VARIANTS` repeats the retrieval task for the others with a lower rate, a larger state,
and three times the steps.

Scored are held-out questions. A response counts when every token of its trace and answer is the model's first choice
after the right tokens before it. Greedy generation writes the right response in just that case, so one forward pass
tells what free generation would give; notebook 02_the_hybrid holds this against `evaluate.accuracy`, which generates.

`train_twin` trains one twin; the notebook calls it, too.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn as nn

import tasks
from data import Blend, pack_shard
from model import ModelConfig, build
from tokenizer import END_THINK, SPECIALS, SYSTEM_TURN, train_bpe
from train import Objective, TrainConfig, make_optimizer, train_step, wsd

TWINS = {
    "hybrid": "M-M*-M-",
    "Mamba only": "M-MM-M-",
    "attention only": "*-**-*-",
    "attention + positions": "*-**-*-",
}
RECORDS = (2, 4, 8, 16, 24)  # records of the retrieval task at levels 1 to 5
WIDTH, STATE, ROWS, LENGTH, LEARNING_RATE = 64, 16, 2, 256, 2e-3
STEPS = {"recall": 2000, "add": 2000}
LEVELS = {  # weights in training; easy questions more often, because retrieval is found there first
    "recall": {1: 3, 2: 3, 3: 2, 4: 1, 5: 1},
    "add": {1: 1, 2: 1},
}
VARIANTS = [  # retrieval again, one seed: what if the others had another rate, a larger state, or more time?
    dict(twin="Mamba only", lr=1e-3),
    dict(twin="Mamba only", state=64),
    dict(twin="Mamba only", steps=3 * STEPS["recall"]),
    dict(twin="attention only", lr=1e-3),
    dict(twin="attention + positions", lr=1e-3),
    dict(twin="attention + positions", steps=3 * STEPS["recall"]),
]


# ---------------------------------------------------------------------------------------------------------------------
# The retrieval task: a new family for tasks.py, which is how one adds a family of one's own
# ---------------------------------------------------------------------------------------------------------------------


def _recall(rng, level):
    """Records of one letter and one digit; four of them (two at level 1) are asked for. `multiquery` in its smallest
    form: every key and every value is one token, so that what costs is the looking up and not the spelling."""
    n = RECORDS[level - 1]
    records = [f"{key}{rng.randrange(10)}" for key in rng.sample(tasks.LETTERS, n)]
    asked = rng.sample(records, min(4, n))
    question = f"Given {'; '.join(records)}. What are {', '.join(r[0] for r in asked)}?"
    return question, "\n".join(f"- {r}" for r in asked), " ".join(r[1] for r in asked)


def _canonical(question):
    records, _, asked = question.partition(". ")
    return "; ".join(sorted(records[len("Given ") :].split("; "))) + ". " + asked


tasks.FAMILIES["recall"] = tasks.Family(
    "recall", "retrieval", "letters and digits among 2 to 24 records", _recall, _canonical, (1, 2, 3, 4, 5), ()
)


def make_tokenizer():
    """A byte-level BPE that knows " k" and a few words of the two tasks; the same at every call."""
    texts = []
    for task, levels in LEVELS.items():
        rng = Random(f"tokenizer {task}")
        for _ in range(1500):
            s = tasks.sample(task, max(levels), rng)
            texts.append(f"System\n\nUser\n{s.question}\nAssistant\n{s.trace}\n{s.answer}\n")
    return train_bpe(texts, 328)


# ---------------------------------------------------------------------------------------------------------------------
# One twin
# ---------------------------------------------------------------------------------------------------------------------


class TokenAndPosition(nn.Module):
    """The embedding of a GPT: token plus place in the document. A document begins where its first token stands, the
    one that opens a conversation. It knows no cache, so it is for training and scoring, not for generation."""

    def __init__(self, token, length, std):
        super().__init__()
        self.token, self.position = token, nn.Embedding(length, token.embedding_dim)
        nn.init.normal_(self.position.weight, 0, std)

    def forward(self, ids):
        place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)  # (b, l)
        start = torch.where(ids == SPECIALS[SYSTEM_TURN], place, 0).cummax(dim=1).values
        return self.token(ids) + self.position(place - start)


def make_twin(twin, vocab_size, state=STATE):
    """A fresh model: width 64, four mixers whose sizes are chosen to have about the same number of parameters."""
    if twin not in TWINS:
        raise ValueError(f"unknown twin {twin!r}: choose one of {', '.join(TWINS)}")
    std = WIDTH**-0.5
    model = build(
        ModelConfig(
            hybrid_override_pattern=TWINS[twin], hidden_size=WIDTH, vocab_size=vocab_size, initializer_range=std,
            mamba_num_heads=4, mamba_head_dim=32, n_groups=2, ssm_state_size=state, intermediate_size=4 * WIDTH,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        )
    )  # fmt: skip
    if twin == "attention + positions":
        model.backbone.embeddings = TokenAndPosition(model.backbone.embeddings, LENGTH, std)
    return model


def train_twin(twin, task, seed, steps=None, lr=LEARNING_RATE, state=STATE, tokenizer=None):
    """Train one twin. Returns (model, tokenizer, record); the record says what was done and how the loss fell."""
    if task not in STEPS:
        raise ValueError(f"unknown task {task!r}: choose one of {', '.join(STEPS)}")
    steps = steps or STEPS[task]
    tokenizer = tokenizer or make_tokenizer()
    weights = {(task, level): weight for level, weight in LEVELS[task].items()}
    blend = Blend({tasks.FAMILIES[task].kind: 1.0}, weights)
    arrays, _ = pack_shard(tokenizer, blend, {}, ROWS * steps, LENGTH, f"{task} {seed}")
    torch.manual_seed(seed)
    model = make_twin(twin, tokenizer.vocab_size, state)
    objective = Objective(model, torch.ones(tokenizer.vocab_size))
    optimizer = make_optimizer(model, lr, weight_decay=0.1)
    scaler, config = torch.amp.GradScaler("cpu", enabled=False), TrainConfig()
    losses, clock = [], time.process_time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * wsd(step, steps, 0.03, 0.3)
        batch = [torch.from_numpy(a[step * ROWS : (step + 1) * ROWS].astype(np.int64)) for a in arrays]
        sums, _ = train_step(objective, optimizer, scaler, batch, config, nullcontext, 1)
        losses.append((sums[0] / sums[2]).item())
    window = max(1, steps // 48)
    record = {
        "twin": twin, "pattern": TWINS[twin], "task": task, "seed": seed, "steps": steps, "lr": lr, "state": state,
        "tokens": steps * ROWS * LENGTH, "parameters": sum(p.numel() for p in model.parameters()),
        "loss": [round(sum(losses[i : i + window]) / window, 4) for i in range(0, steps - window + 1, window)],
        "cpu_seconds": round(time.process_time() - clock, 1),
    }  # fmt: skip
    return model.eval(), tokenizer, record


@torch.inference_mode()
def score(model, tokenizer, task, level, count=100, seed=0):
    """Held-out questions of one level: {"exact": share of whole responses right, "values": share of digits of the
    trace right, given the right text before them}. The questions are those of `evaluate.accuracy` with this seed."""
    rng = Random(f"{seed} {task} {level}")
    asked = [tasks.sample(task, level, rng, "test") for _ in range(count)]
    examples = tokenizer.encode_examples((s.question, s.trace, s.answer) for s in asked)
    digits = torch.tensor([tokenizer.decode([i]).isdigit() for i in range(tokenizer.vocab_size)])
    longest = max(len(ids) for ids, _ in examples)
    ids = torch.zeros(count, longest, dtype=torch.long)
    response, thought = (torch.zeros(count, longest, dtype=torch.bool) for _ in range(2))
    for row, (tokens, start) in enumerate(examples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        response[row, start : len(tokens)] = True
        thought[row, start : tokens.index(SPECIALS[END_THINK])] = True
    right = model(ids)[:, :-1].argmax(-1) == ids[:, 1:]  # padding on the right: nothing before it can see it
    response, thought = response[:, 1:], thought[:, 1:] & digits[ids[:, 1:]]
    return {
        "exact": (right | ~response).all(1).float().mean().item(),
        "values": (right & thought).sum().item() / thought.sum().item(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------------------------------


def run_one(job):
    """One row of the result: train, then score every level. job: the arguments of `train_twin` in a dict."""
    torch.set_num_threads(1)  # two processes of one thread are faster than one process of two
    model, tokenizer, record = train_twin(**job)
    levels = {str(level): score(model, tokenizer, job["task"], level) for level in LEVELS[job["task"]]}
    return record | {"levels": levels}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs of every twin on every task")
    parser.add_argument("--out", default="assets/hybrid_twins.json", help="where to write the results")
    parser.add_argument("--steps", type=int, default=None, help=f"steps a run, by default {STEPS}")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="runs at a time, a core each")
    args = parser.parse_args(argv)
    try:
        for name in ("seeds", "workers"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name} must be at least 1; got {getattr(args, name)}")
        if args.steps is not None and args.steps < 1:
            raise ValueError(f"--steps must be at least 1; got {args.steps}")
        out = Path(args.out)
        if not out.parent.is_dir():
            raise ValueError(f"--out {out}: there is no folder {out.parent}, make it first")
    except ValueError as e:
        print(f"hybrid_twins.py: {e}", file=sys.stderr)
        return 2
    plan = [dict(twin=w, task=t, seed=s, steps=args.steps) for t in STEPS for s in range(args.seeds) for w in TWINS]
    plan += [dict(task="recall", seed=0, steps=args.steps) | variant for variant in VARIANTS if not args.steps]
    runs = []
    with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(run_one, plan):
            runs.append(row)
            levels = " ".join(f"{r['exact']:4.0%}" for r in row["levels"].values())
            setting = f"seed {row['seed']}  steps {row['steps']}  lr {row['lr']:g}  state {row['state']:<3}"
            print(f"{row['task']:7}{row['twin']:22} {setting} exact {levels}  {row['cpu_seconds']:.0f} s", flush=True)
    n = args.seeds * len(TWINS) * len(STEPS)
    result = {
        "command": f"python notebooks/hybrid_twins.py --seeds {args.seeds} --out {out.as_posix()}"
        + (f" --steps {args.steps}" if args.steps else ""),
        "torch": torch.__version__, "cpu_minutes": round(sum(row["cpu_seconds"] for row in runs) / 60, 1),
        "questions": 100, "records": RECORDS, "runs": runs[:n], "variants": runs[n:],
    }  # fmt: skip
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(json.dumps(result, indent=1))
    os.replace(temporary, out)
    print(f"wrote {out}: {len(runs)} runs, {result['cpu_minutes']} minutes of one core")
    return 0


if __name__ == "__main__":
    sys.exit(main())
