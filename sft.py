"""Supervised fine-tuning in three stages: a base model learns to answer, to call tools, and to be cut short.

    python sft.py --stage 1 --checkpoint out --out out-sft1       all domains, packed, one prompt in ten with no thought
    python sft.py --stage 2 --checkpoint out-sft1 --out out-sft2  tool calls and a sample of the rest, not packed
    python sft.py --stage 3 --checkpoint out-sft2 --out out-sft3  long conversations, one thought in twenty cut off

What is learned where is in conversations.py, what is measured in skills.py, how a run is kept in stage.py. Here is the
step, and it is pretraining's with two differences: the loss counts what the assistant says and nothing else, and a
batch may come in parts of different shapes, since a row that is not packed is as long as its example. The loss is the
mean over all learned tokens of the step, however it is cut into parts and rows.

Why packing is a switch with a switch. `--pack on` fills rows with several examples; `--reset off` lets the state run on
from one into the next, as training code without document marks does. With `--reset on` a packed row is exactly its
examples alone (tests/test_sft.py), so whatever packing costs then is rounding; without, the model learns to begin in a
state that no prompt will ever begin in. All three ways see the same examples in the same steps.

To follow one step: `step_examples`, `encode`, `packed` (conversations.py), `train_step` (here). One process.
Source: report section 3. Learning rates, steps and shares are ours: the report names none.
"""

import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from random import Random

from stage import Stage, open_start, plot, take_step  # isort: skip  (before torch: with device.py)
import torch

import conversations
import instructions
import skills
import tools
import train
from generate import chat_prompt, generate
from loss import next_token_loss
from schedule import wsd
from settings import finish


@dataclass
class SftConfig:
    """Every field is a flag. None means: what suits the stage and the model's size (see RUNS)."""

    stage: int = 1  # 1, 2 or 3
    checkpoint: str = ""  # folder of the model to start from; empty: out, or what the stage before leaves by default
    out: str = ""  # folder for log, plot and checkpoint; empty: out-sft1, out-sft2, out-sft3; a run there is resumed
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # auto, float32, bfloat16 or float16: what the matrix products run in
    impl: str = "auto"  # auto, torch or triton: who computes the Mamba-2 layers
    steps: int | None = None  # optimizer steps
    batch_rows: int | None = None  # a step has about 0.9 times so many rows of tokens; lower it when memory runs out
    length: int | None = None  # tokens in a row, and the most in an example
    lr: float | None = None  # peak learning rate
    warmup: float = 0.05  # share of the steps in which the rate rises
    decay: float = 0.5  # share of the steps, at the end, in which it falls to a hundredth
    weight_decay: float = 0.1
    clip: float = 1.0  # the gradient's norm is cut to this
    pack: str = "auto"  # on, off or auto: several examples in a row; auto is on in stages 1 and 3
    reset: str = "on"  # on or off: whether a packed example starts from an empty state
    off: float = 0.1  # share of prompts whose thought is taken away, with "/no_think"
    cut: float | None = None  # share of thoughts that are cut off; 0.05 in stage 3, else 0
    cut_low: float = 0.0  # what stays of such a thought: at least this share of its tokens
    cut_high: float = 1.0  # and at most this share
    seed: int = 0
    log_every: int | None = None  # steps between lines
    skills_every: int | None = None  # steps between measurements of the skills; 0 for none on the way
    skills_count: int | None = None  # held-out prompts of each kind in such a measurement
    save_every: int | None = None  # steps between saves
    eval_count: int | None = None  # held-out prompts of each kind at the end; 0 for none


RUNS = {  # by size: below 3 M parameters, and from there on; steps by stage
    "small": dict(steps=(500, 250, 200), batch_rows=8, length=448, lr=1.5e-3, log_every=25, skills_every=100,
                  skills_count=13, save_every=100, eval_count=54),
    "large": dict(steps=(200, 80, 80), batch_rows=64, length=512, lr=8e-4, log_every=50, skills_every=150,
                  skills_count=39, save_every=300, eval_count=108),
}  # fmt: skip
NOT_THE_RUN = {
    "out",
    "device",
    "dtype",
    "impl",
    "log_every",
    "skills_every",
    "skills_count",
    "save_every",
    "eval_count",
}
FILL = 0.9  # of rows times length: how many tokens a step draws, so that packing rarely needs a row more


def fill_in(config, parameters):
    """The config with every None and "" replaced by what suits; ValueError for what makes no sense.

    parameters: of the model; None before it is loaded: then only stage and folders are filled in.
    """
    if config.stage not in (1, 2, 3):
        raise ValueError(f"--stage {config.stage} is not one of 1, 2, 3")
    before = "out" if config.stage == 1 else f"out-sft{config.stage - 1}"
    config = replace(config, checkpoint=config.checkpoint or before, out=config.out or f"out-sft{config.stage}")
    if parameters is None:
        return config
    suits = RUNS["small" if parameters < 3e6 else "large"]
    suits = suits | {"steps": suits["steps"][config.stage - 1], "cut": conversations.CUT[config.stage]}
    config = replace(config, **{k: v for k, v in suits.items() if getattr(config, k) is None})
    at_least = dict(steps=1, batch_rows=1, length=64, seed=0, log_every=1, skills_every=0, skills_count=1, save_every=1,
                    eval_count=0, warmup=0, decay=0, weight_decay=0)  # fmt: skip
    for name, low in at_least.items():
        if not low <= getattr(config, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {low}; got {getattr(config, name)}")
    for name in ("lr", "clip"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"--{name} must be a finite number above 0; got {getattr(config, name)}")
    for name in ("off", "cut", "cut_low", "cut_high"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} is a share between 0 and 1; got {getattr(config, name)}")
    if config.cut_low > config.cut_high:
        raise ValueError(f"--cut-low {config.cut_low} is above --cut-high {config.cut_high}")
    if config.warmup + config.decay > 1:
        raise ValueError(f"--warmup {config.warmup} and --decay {config.decay} are shares: together at most 1")
    for name, values in (("pack", ("auto", "on", "off")), ("reset", ("on", "off"))):
        if getattr(config, name) not in values:
            raise ValueError(f"--{name} {getattr(config, name)!r} is not one of {', '.join(values)}")
    if config.pack == "auto":
        config = replace(config, pack="on" if conversations.PACKED[config.stage] else "off")
    return config


# ----------------------------------------------------------------------------------------------------------------------
# One step


def batch(tokenizer, config, step):
    """The parts of a step, [(ids, doc, learned)] as in conversations.py, and how many tokens they hold."""
    tokens = round(FILL * config.batch_rows * config.length)
    examples = conversations.step_examples(
        tokenizer, conversations.MIX[config.stage], tokens, config.length, f"{config.seed} sft{config.stage} {step}",
        config.off, config.cut, (config.cut_low, config.cut_high),
    )  # fmt: skip
    if config.pack == "on":
        parts = [conversations.packed(examples, config.length, config.reset == "on")]
    else:
        parts = conversations.alone(examples, config.batch_rows * config.length)
    return parts, sum(len(ids) for ids, *_ in examples)


def train_step(model, optimizer, scaler, parts, clip, autocast):
    """One optimizer step over parts of any shapes; returns (loss in nats a learned token, gradient norm), tensors."""
    count = sum(int(learned[:, 1:].sum()) for _, _, learned in parts)
    total = 0.0
    for ids, doc, learned in parts:
        with autocast():
            x = model.features(ids, seq_idx=doc)[:, :-1]  # (b, l - 1, d)
            nll, _ = next_token_loss(x, model.lm_head.weight, ids[:, 1:], learned[:, 1:], model.impl)
        scaler.scale(nll / count).backward()
        total = total + nll.detach() / count
    norm = take_step(model, optimizer, scaler, clip)
    return total, norm


# ----------------------------------------------------------------------------------------------------------------------
# The run


def run(config, say=print):
    """Train, or go on training; returns the closing entry of the log, or None if it was stopped."""
    config = fill_in(config, None)
    name = f"sft{config.stage}"
    start = open_start(name, config)
    model, tokenizer, device = start.model, start.tokenizer, start.device
    model.train()
    parameters = start.parameters
    config = fill_in(config, parameters)
    settings = {k: v for k, v in asdict(config).items() if k not in NOT_THE_RUN}
    job = Stage(name, config.checkpoint, config.out, settings, say)
    conversations.check_length(tokenizer, conversations.MIX[config.stage], config.length)
    first, tokens = batch(tokenizer, config, 0)

    say(f"stage     {name} from {config.checkpoint} ({parameters:,} parameters), into {config.out}")
    say(f"device    {start.why}")
    mix = ", ".join(f"{skill} {share:.0%}" for skill, share in conversations.MIX[config.stage].items())
    say(f"examples  {mix}; {config.off:.0%} without a thought, {config.cut:.0%} of the thoughts cut off")
    kept = "each from an empty state" if config.reset == "on" else "the state runs on from one into the next"
    shape = f"packed into rows of {config.length}, {kept}" if config.pack == "on" else "one a row"
    padded = sum(ids.size for ids, *_ in first)
    say(f"step      {shape}: about {tokens:,} tokens in {padded:,} places; {config.steps} steps; rate {config.lr:g}")

    optimizer = train.make_optimizer(model, config.lr, config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=start.dtype == torch.float16)
    autocast = start.autocast
    job.begin(model, optimizer, scaler)
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(batch, tokenizer, config, job.step)
        since, seen = time.time(), 0
        for step in job.steps(config.steps, config.save_every):
            parts, tokens = ahead.result()
            ahead = reader.submit(batch, tokenizer, config, step + 1)
            rate = config.lr * wsd(step, config.steps, config.warmup, config.decay)
            for group in optimizer.param_groups:
                group["lr"] = rate
            parts = [[torch.from_numpy(array).to(device) for array in part] for part in parts]
            loss, norm = train_step(model, optimizer, scaler, parts, config.clip, autocast)
            seen, done = seen + tokens, step + 1
            if done % config.log_every == 0 or done in (1, config.steps):
                entry = {"loss": loss.item(), "norm": norm.item(), "lr": rate, "tokens": tokens}
                if not math.isfinite(entry["loss"]):
                    raise ValueError(f"the loss is {entry['loss']} at step {done}: lower --lr (now {config.lr:g})")
                job.record(entry)
                say(
                    f"step {done:5d}/{config.steps}  loss {entry['loss']:.3f}  norm {entry['norm']:.2f}  lr {rate:.1e}"
                    f"  {seen / (time.time() - since):,.0f} tok/s"
                )
                since, seen = time.time(), 0
            if config.skills_every and done % config.skills_every == 0 and done < config.steps:
                found = skills.table(model, tokenizer, config.skills_count)
                job.record(found)
                say(f"step {done:5d}  {skills.format_line(found)}")
                show(model, tokenizer, done, say)
                since = time.time()
    if job.stopped:
        return None
    return close(job, tokenizer, config)


def close(job, tokenizer, config):
    """The end of a stage: its checkpoint folder, the skills, the plot; returns the closing entry of the log."""
    job.finish(tokenizer)
    job.say(f"trained {config.steps} steps in {job.seconds():.0f} s; {config.out} is the end of stage {job.name}")
    found = skills.table(job.model, tokenizer, config.eval_count) if config.eval_count else {}
    if found:
        job.say(f"on {config.eval_count} held-out prompts of each kind:\n  {skills.format_line(found)}")
    job.record(found)
    plot(job.log, job.out / "curve.png", ("loss",), tuple(found), f"stage {job.name}: nats a learned token")
    return job.log[-1]


def show(model, tokenizer, step, say):
    """What it says now to a few held-out prompts: with a thought, without, about words, and with tools."""
    s = skills.questions(9)[step % 9]
    on, off = (skills.ask(model, tokenizer, [s], thinking)[0] for thinking in (True, False))
    say(f"    {s.question}  <think> {_line(on.thought)} </think> {on.answer!r}  off: {_line(off.answer)!r}")
    prompt, _, _ = instructions.draw(Random(step), "test")
    ids = chat_prompt(tokenizer, [{"role": "user", "content": prompt.text}])
    said = generate(model, tokenizer, [ids], 96)[0].answer
    say(f"    {prompt.text}  {_line(said)!r} {'(all met)' if instructions.check(prompt, said) else ''}")
    play = skills.play(model, tokenizer, [tools.draw(Random(step), "test", tools.SEVERAL)])[0]
    turns = [_line(m["content"]) for m in play.messages[2:]]
    say(f"    {play.episode.request}  {' | '.join(turns)[:300]} {'(right)' if play.success() else ''}")


def _line(text):
    return " / ".join(text.split("\n"))[:110]


def main(argv=None):
    advice = "lower --batch-rows or --length"
    return finish("sft", lambda: run(train.parse(argv, SftConfig, __file__, __doc__)), advice)


if __name__ == "__main__":
    sys.exit(main())
