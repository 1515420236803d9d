"""A reward model: what people like, learned from which of two answers they chose.

    python reward.py --checkpoint out-sft3 --out out-reward

The idea (Bradley and Terry 1952; Christiano et al. 2017). A policy is to be moved towards answers that are liked, and
nobody can be asked thousands of times a step. So a model is trained to be asked instead (judge.py): the policy's own
copy, with one vector beside it that turns what it has read into a score s. If the better one of two answers is chosen
with probability sigmoid(s(chosen) - s(rejected)), then the loss of a choice that was made is

    loss = -log sigmoid(s(chosen) - s(rejected))

Its gradient is the probability that was given to the other choice: pairs that are settled teach nothing more.

Here the chooser is the rule in preferences.py, so the judge can be held against it. `--noise` is how often the chooser
errs: at 1, Bradley and Terry's people, almost one choice in four is the wrong one; at the default 0.5 it is one in ten.
A judge with endless pairs would find the same order from either; raw scores grow as the noise falls (points / noise),
so at the end they are standardised.

To follow one step: `batch`, `RewardModel.forward`, `bradley_terry`. One process.
Source: report section 3 (a Bradley-Terry reward model, theirs trained on HelpSteer3). All numbers are ours.
"""

import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from random import Random

from stage import Stage, open_start, plot, take_step  # isort: skip  (before torch: with device.py)
import torch

import policy
import preferences
import train
from judge import RewardModel, held_out, multiple_of, read, rows, save_reward, score_answers, standardise
from schedule import wsd
from settings import finish


@dataclass
class RewardConfig:
    """Every field is a flag. None means: what suits the model's size (see RUNS)."""

    checkpoint: str = "out-sft3"  # folder of the model to start from, the end of sft3
    out: str = "out-reward"  # folder for log, plot and checkpoint; a run found there is resumed
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # auto, float32, bfloat16 or float16: what the matrix products run in
    impl: str = "auto"  # auto, torch or triton: who computes the Mamba-2 layers
    steps: int | None = None  # optimizer steps
    pairs: int | None = None  # pairs of answers in a step
    tokens: int | None = None  # padded tokens computed at a time; lower it when memory runs out
    lr: float | None = None  # peak learning rate
    warmup: float = 0.05  # share of the steps in which the rate rises
    decay: float = 0.5  # share of the steps, at the end, in which it falls to a hundredth
    weight_decay: float = 0.1
    clip: float = 1.0  # the gradient's norm is cut to this
    noise: float = 0.5  # how often the worse answer was chosen: 0 never, 1 as Bradley and Terry's people do
    seed: int = 0
    log_every: int | None = None  # steps between lines
    held_every: int | None = None  # steps between measurements on held-out prompts; 0 for none on the way
    held_count: int | None = None  # held-out pairs in such a measurement
    save_every: int | None = None  # steps between saves
    eval_count: int | None = None  # held-out pairs at the end; 0 for none


RUNS = {  # by size: below 3 M parameters, and from there on
    "small": dict(steps=200, pairs=32, tokens=2048, lr=1e-3, log_every=10, held_every=40, held_count=100,
                  save_every=100, eval_count=400),
    "large": dict(steps=600, pairs=128, tokens=32768, lr=5e-4, log_every=10, held_every=50, held_count=400,
                  save_every=150, eval_count=2000),
}  # fmt: skip
NOT_THE_RUN = {"out", "device", "dtype", "impl", "log_every", "held_every", "held_count", "save_every", "eval_count"}


def fill_in(config, parameters):
    """The config with every None replaced by what suits; ValueError for what makes no sense. parameters: of the
    model."""
    suits = RUNS["small" if parameters < 3e6 else "large"]
    config = replace(config, **{k: v for k, v in suits.items() if getattr(config, k) is None})
    at_least = dict(steps=1, pairs=1, tokens=1, seed=0, log_every=1, held_every=0, held_count=1, save_every=1,
                    eval_count=0, warmup=0, decay=0, weight_decay=0, noise=0)  # fmt: skip
    for name, low in at_least.items():
        if not low <= getattr(config, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {low}; got {getattr(config, name)}")
    for name in ("lr", "clip"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"--{name} must be a finite number above 0; got {getattr(config, name)}")
    if config.warmup + config.decay > 1:
        raise ValueError(f"--warmup {config.warmup} and --decay {config.decay} are shares: together at most 1")
    return config


# ----------------------------------------------------------------------------------------------------------------------
# One step


def bradley_terry(chosen, rejected):
    """-log sigmoid(chosen - rejected) of scores (b,), the sum over pairs, in nats; ln 2 a pair for one that knows
    nothing."""
    return -torch.nn.functional.logsigmoid(chosen - rejected).sum()


def batch(tokenizer, config, step):
    """A step's pairs of samples, [(chosen, rejected)]. They depend on seed, noise and step only, so a run needs no data
    position."""
    rng = Random(f"{config.seed} reward {step}")
    pairs = [preferences.draw(rng, "train", config.noise) for _ in range(config.pairs)]
    return [(read(tokenizer, p.prompt, p.chosen), read(tokenizer, p.prompt, p.rejected)) for p in pairs]


def parts_of(pairs, tokens, device):
    """The pairs in parts of at most `tokens` padded tokens (or of one pair), those of like length together: a list of
    (ids, last), the chosen ones in the first half of the rows, the rejected ones in the same order in the second."""
    longer = [max(pair, key=lambda s: len(s.said)) for pair in pairs]
    parts = policy.bundles(longer, tokens // 2, multiple_of(device))
    return [rows([pairs[i][side] for side in (0, 1) for i in part], device) for part in parts]


def train_step(judge, optimizer, scaler, parts, clip, autocast):
    """One optimizer step; returns (loss in nats a pair, share of the pairs in which the chosen one scored higher,
    gradient norm), tensors."""
    count, total, agreed = sum(len(last) for _, last in parts) / 2, 0.0, 0.0
    for ids, last in parts:
        with autocast():
            chosen, rejected = judge(ids, last).chunk(2)
            loss = bradley_terry(chosen, rejected) / count
        scaler.scale(loss).backward()
        total, agreed = total + loss.detach(), agreed + (chosen > rejected).sum() / count
    norm = take_step(judge, optimizer, scaler, clip)
    return total, agreed, norm


# ----------------------------------------------------------------------------------------------------------------------
# The run


def run(config, say=print):
    """Train, or go on training; returns the closing entry of the log, or None if it was stopped."""
    start = open_start("reward", config)
    model, tokenizer, device = start.model, start.tokenizer, start.device
    judge = RewardModel(model).train()
    parameters = start.parameters
    config = fill_in(config, parameters)
    settings = {k: v for k, v in asdict(config).items() if k not in NOT_THE_RUN}
    job = Stage("reward", config.checkpoint, config.out, settings, say)
    first = batch(tokenizer, config, 0)

    say(f"stage     reward from {config.checkpoint} ({parameters:,} parameters and w), into {config.out}")
    say(f"device    {start.why}")
    tokens = sum(len(s.prompt) + len(s.said) for pair in first for s in pair)
    places = sum(ids.numel() for ids, _ in parts_of(first, config.tokens, device))
    say(
        f"step      {config.pairs} pairs, noise {config.noise:g}: about {tokens:,} tokens in {places:,} places; "
        f"{config.steps} steps; rate {config.lr:g}"
    )

    optimizer = train.make_optimizer(judge, config.lr, config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=start.dtype == torch.float16)
    autocast = start.autocast
    job.begin(judge, optimizer, scaler)
    since, seen = time.time(), 0
    for step in job.steps(config.steps, config.save_every):
        rate = config.lr * wsd(step, config.steps, config.warmup, config.decay)
        for group in optimizer.param_groups:
            group["lr"] = rate
        parts = parts_of(batch(tokenizer, config, step), config.tokens, device)
        loss, accuracy, norm = train_step(judge, optimizer, scaler, parts, config.clip, autocast)
        seen, done = seen + config.pairs, step + 1
        if done % config.log_every == 0 or done in (1, config.steps):
            entry = {"loss": loss.item(), "train pairs": accuracy.item(), "norm": norm.item(), "lr": rate}
            if not math.isfinite(entry["loss"]):
                raise ValueError(f"the loss is {entry['loss']} at step {done}: lower --lr (now {config.lr:g})")
            job.record(entry)
            say(
                f"step {done:5d}/{config.steps}  loss {entry['loss']:.3f}  pairs {entry['train pairs']:.0%}  norm "
                f"{entry['norm']:.2f}  lr {rate:.1e}  {seen / (time.time() - since):,.0f} pairs/s"
            )
            since, seen = time.time(), 0
        if config.held_every and done % config.held_every == 0 and done < config.steps:
            found = held_out(judge, tokenizer, config.held_count)
            job.record(found)
            say(f"step {done:5d}  {format_line(found)}")
            show(judge, tokenizer, done, say)
            since = time.time()
    if job.stopped:
        return None
    return close(job, judge, tokenizer, config)


def close(job, judge, tokenizer, config):
    """The end of the stage: the scale, the folder, the judge beside the rule, the plot; returns the closing entry."""
    standardise(judge, tokenizer, config.seed)
    save_reward(job.out, judge)
    job.model = judge.backbone  # a checkpoint folder like any other
    job.finish(tokenizer)
    job.say(f"trained {config.steps} steps in {job.seconds():.0f} s; {config.out} is the end of stage reward")
    job.say(f"scores are (raw - {judge.shift.item():.3f}) / {judge.scale.item():.3f}")
    found = held_out(judge, tokenizer, config.eval_count) if config.eval_count else {}
    if found:
        job.say(f"on held-out prompts, {config.eval_count} pairs:\n  {format_line(found)}")
        show(judge, tokenizer, config.steps, job.say)
    job.record(found)
    plot(job.log, job.out / "curve.png", ("loss",), ("train pairs", *found), "stage reward: nats a pair")
    return job.log[-1]


def format_line(found):
    return (
        f"right in {found['pairs']:.1%} of the pairs, rank correlation {found['rank']:.3f}, in a prompt "
        f"{found['rank in prompt']:.3f}"
    )


def show(judge, tokenizer, step, say):
    """Four answers to a held-out prompt, the judge's favourite first, with its score and the rule's points."""
    rng = Random(f"show {step}")
    prompt = preferences.draw_prompt(rng, "test")
    answers = [preferences.respond(rng, prompt) for _ in range(4)]
    scored = sorted(zip(score_answers(judge, tokenizer, [prompt] * 4, answers), answers), reverse=True)
    told = "  ".join(f"{score:+.2f} ({preferences.score(prompt, a):g}) {a!r}" for score, a in scored)
    say(f"    {prompt.text}  {told}")


def main(argv=None):
    return finish("reward", lambda: run(train.parse(argv, RewardConfig, __file__, __doc__)), "lower --tokens")


if __name__ == "__main__":
    sys.exit(main())
