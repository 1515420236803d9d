"""Reinforcement learning from rewards (GRPO): try an answer many times, and make what went better than usual likelier.

    python grpo.py --reward instructions --checkpoint out-sft3 --out out-ifrl     conditions that a program verifies
    python grpo.py --reward preferences --checkpoint out-dpo --out out-rlhf       what a reward model likes (reward.py)
    python grpo.py --reward gym --checkpoint out-sft3 --out out-gym               reasoning-gym: never shown a thought

The idea. Tuning needs somebody who writes the right answer; a reward only needs somebody who recognises it. A policy pi
answers a prompt G times. If reward r_i is what answer i got, the gradient of the expected reward is that of

    sum_i A_i log pi(answer i),     A_i = r_i - mean of the other r_j

(REINFORCE with a leave-one-out baseline): the mean of the *others* does not depend on answer i, so subtracting it
changes no expectation and removes most of the noise, and no second network has to learn what to expect. That is the
"group" in GRPO (Shao et al. 2024). Then A_i is divided by the group's standard deviation, where there is any: groups in
which all are right or all wrong teach nothing. Three more pieces:

    ratio   several updates are made with one batch of answers, so pi has moved since it spoke: each token is weighted
            with rho = pi / pi_old, and once rho has left [1 - eps, 1 + eps] in the direction in which A pulls, the
            token's gradient is cut (PPO's clip). Without it a batch could be squeezed until pi is somewhere else
    KL      a price for leaving the model that RL began from: beta times k3 = e^d - d - 1 with d = log ref - log pi,
            which is never negative and whose mean under pi is KL(pi || ref) (Schulman 2020)
    tokens  the mean is over all tokens of the step, not over answers first: a long answer counts by its length

A thought that is not closed exactly once, an answer that is empty or does not end, is malformed: whatever the reward
said, its tokens get a fixed negative advantage, and to the rest of its group it counts as the step's lowest reward (0
at most).

Prompts and rewards are in environments.py. Rollouts are by rollout.py, in bfloat16 on a GPU; pi_old is what the learner
itself says before its first update, and how far that is from what the rollout wrote down is logged.

To follow one step: `collect`, `advantages`, `learn` (here), `Roller.say` (rollout.py), `logprobs` (policy.py).

Source: report section 3 (IFEval RL with a rule verifier; RLHF by GRPO, with and without thinking); constants of
NVIDIA's NeMo RL: leave-one-out, clip 0.2, k3 with 0.01, token-level loss. Learning rates, steps, group sizes are ours.
"""

import copy
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from random import Random

from stage import Stage, open_start, plot  # isort: skip  (before torch: with device.py)
import torch

import environments
import policy
import skills
import train
from generate import chat_prompt
from rollout import Roller
from settings import finish

STAGES = {"instructions": "ifrl", "preferences": "rlhf", "gym": "gym"}
ENVIRONMENTS = {
    "instructions": environments.Instructions,
    "preferences": environments.Preferences,
    "gym": environments.Gym,
}
BEFORE = {"instructions": "out-sft3", "preferences": "out-dpo", "gym": "out-sft3"}


@dataclass
class GrpoConfig:
    """Every field is a flag. None means: what suits the reward and the model's size (see RUNS)."""

    reward: str = "instructions"  # instructions, preferences or gym
    checkpoint: str = ""  # folder of the model to start from; empty: what the stage before leaves by default
    out: str = ""  # folder for log, plot and checkpoint; empty: out-ifrl, out-rlhf, out-gym; a run there is resumed
    judge: str = "out-reward"  # with preferences: the folder that reward.py left
    families: str = "chain_sum,spell_backward,letter_counting"  # with gym: families of reasoning-gym
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # auto, float32 or bfloat16: what the matrix products run in
    impl: str = "auto"  # auto, torch or triton: who computes the Mamba-2 layers
    steps: int | None = None  # rollouts, each followed by its updates
    prompts: int | None = None  # a step
    group: int | None = None  # answers to each prompt
    updates: int = 2  # optimizer steps a rollout: its prompts are split so many ways
    room: int | None = None  # tokens an answer may have, its thought included
    temperature: float = 1.0
    lr: float | None = None  # learning rate, after the warm-up
    warmup: float = 0.1  # share of the steps in which the rate rises
    clip_ratio: float = 0.2  # eps: how far a token's probability may move on one batch
    kl: float = 0.01  # beta: the price of leaving the model that RL began from
    malformed: float = -1.0  # the advantage of an answer that is not well formed
    clip: float = 1.0  # the gradient's norm is cut to this
    part_tokens: int | None = None  # tokens in a forward; the first to lower when memory runs out
    seed: int = 0
    log_every: int | None = None  # steps between lines
    skills_every: int | None = None  # steps between measurements of all skills; 0 for none on the way
    skills_count: int | None = None  # held-out prompts of each kind in such a measurement
    save_every: int | None = None  # steps between saves
    eval_count: int | None = None  # held-out prompts of each kind at the end; 0 for none


RUNS = {  # by size: below 3 M parameters, and from there on; steps by stage
    "small": dict(steps=dict(ifrl=40, rlhf=40, gym=60), prompts=8, group=8, lr=2e-4, part_tokens=4096, log_every=1,
                  skills_every=20, skills_count=13, save_every=20, eval_count=54),
    "large": dict(steps=dict(ifrl=40, rlhf=40, gym=60), prompts=128, group=16, lr=1e-4, part_tokens=65536,
                  log_every=5, skills_every=30, skills_count=39, save_every=30, eval_count=108),
}  # fmt: skip
NOT_THE_RUN = {
    "out", "device", "dtype", "impl", "part_tokens", "log_every", "skills_every", "skills_count", "save_every",
    "eval_count",
}  # fmt: skip


def fill_in(config, parameters):
    """The config with every None and "" replaced by what suits; ValueError for what makes no sense.

    parameters: of the model; None before it is loaded: then only reward and folders are filled in.
    """
    if config.reward not in STAGES:
        raise ValueError(f"--reward {config.reward!r} is not one of {', '.join(STAGES)}")
    name = STAGES[config.reward]
    config = replace(config, checkpoint=config.checkpoint or BEFORE[config.reward], out=config.out or f"out-{name}")
    if parameters is None:
        return config
    suits = RUNS["small" if parameters < 3e6 else "large"]
    suits = suits | {"steps": suits["steps"][name], "room": ENVIRONMENTS[config.reward].room}
    config = replace(config, **{k: v for k, v in suits.items() if getattr(config, k) is None})
    at_least = dict(steps=1, prompts=1, group=2, updates=1, room=2, part_tokens=64, seed=0, log_every=1,
                    skills_every=0, skills_count=1, save_every=1, eval_count=0, warmup=0, kl=0)  # fmt: skip
    for key, low in at_least.items():
        if not low <= getattr(config, key) < math.inf:
            raise ValueError(f"--{key.replace('_', '-')} must be at least {low}; got {getattr(config, key)}")
    for key in ("lr", "clip", "temperature", "clip_ratio"):
        if not 0 < getattr(config, key) < math.inf:
            raise ValueError(f"--{key.replace('_', '-')} must be a finite number above 0; got {getattr(config, key)}")
    if config.warmup > 1:
        raise ValueError(f"--warmup is a share between 0 and 1; got {config.warmup}")
    if not -math.inf < config.malformed <= 0:
        raise ValueError(f"--malformed is a penalty: a finite number of at most 0; got {config.malformed}")
    if config.prompts < config.updates:
        raise ValueError(f"--prompts {config.prompts} cannot be split for --updates {config.updates}: raise the first")
    return config


# ----------------------------------------------------------------------------------------------------------------------
# The loss


def advantages(rewards, epsilon=1e-6):
    """Rewards (p, g) of g answers to each of p prompts -> advantages (p, g): each minus the mean of the others, over
    the group's standard deviation, where there is any."""
    g = rewards.shape[1]
    rest = (rewards.sum(1, keepdim=True) - rewards) / (g - 1)
    spread = rewards.std(1, keepdim=True)
    return (rewards - rest) / torch.where(spread > 0, spread + epsilon, 1.0)


def grpo_loss(pi, old, ref, advantage, said, clip_ratio=0.2, kl=0.01):
    """The sum over tokens of what is minimised, and what to watch.

    pi, old, ref (b, l): log-probabilities of the tokens that were said, pi with a gradient; advantage (b,); said (b, l)
    bool. Returns (the sum, {"ratio clipped": tokens whose gradient is cut, "kl": the sum of k3}), to be divided by the
    number of tokens.
    """
    A = advantage[:, None]
    ratio = (pi - old).exp()
    pull = torch.minimum(ratio * A, ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * A)
    d = ref - pi
    k3 = d.exp() - d - 1
    total = ((kl * k3 - pull) * said).sum()
    cut = ((ratio - 1) * A.sign() > clip_ratio) & said
    return total, {"ratio clipped": cut.sum(), "kl": (k3 * said).sum().detach()}


# ----------------------------------------------------------------------------------------------------------------------
# One step


@dataclass
class Batch:
    """A step's answers: samples in groups, their rewards and advantages (p * g,), who is well formed."""

    samples: list
    rewards: torch.Tensor
    advantages: torch.Tensor
    formed: list
    shown: tuple  # (question, answer, reward) of one


def collect(roller, tokenizer, environment, config, step):
    """Ask, answer, judge. Depends on (seed, step) and the weights only."""
    rng = Random(f"{config.seed} grpo {config.reward} {step}")
    drawn = [environment.draw(rng) for _ in range(config.prompts)]
    prompts = [chat_prompt(tokenizer, messages, thinking) for messages, thinking, _ in drawn]
    groups = roller.say(prompts, config.group, config.room, config.temperature, seed=rng.getrandbits(48))
    samples = [sample for group in groups for sample in group]
    owner = [i for i, group in enumerate(groups) for _ in group]
    answers, formed = zip(*(environments.answer_of(tokenizer, s, drawn[i][1]) for s, i in zip(samples, owner)))
    rewards = torch.tensor(environment.score([drawn[i][2] for i in owner], answers), dtype=torch.float32)
    good = torch.tensor(formed)
    lowest = torch.minimum(rewards.min(), torch.zeros(()))
    rewards = torch.where(good, rewards, lowest)
    found = advantages(rewards.view(len(groups), config.group)).flatten()
    found = torch.where(good, found, torch.full_like(found, config.malformed))
    said = tokenizer.decode(samples[0].said).replace("\n", " / ")
    shown = (drawn[0][0][-1]["content"], said, rewards[0].item())
    return Batch(samples, rewards, found, formed, shown)


def learn(model, reference, optimizer, batch, config, autocast):
    """The updates of a step; returns what to watch: means over all tokens, and the mismatch with the rollout."""
    device, samples = model.lm_head.weight.device, batch.samples
    how = config.part_tokens, autocast, config.temperature  # pi is what was drawn from, at its temperature
    old, ref = (policy.frozen_logprobs(m, samples, *how) for m in (model, reference))
    watched = {"norm": 0.0, "ratio clipped": 0.0, "kl": 0.0}
    tokens = sum(len(s.said) for s in samples)
    for turn in range(config.updates):  # whole groups, every so many-th
        mine = [i for i in range(len(samples)) if i // config.group % config.updates == turn]
        count = sum(len(samples[i].said) for i in mine)
        for part in policy.bundles([samples[i] for i in mine], config.part_tokens):
            part = [mine[i] for i in part]
            ids, said = policy.rows([samples[i] for i in part], device)
            with autocast():
                pi = policy.logprobs(model, ids, said, config.temperature)
            here = [policy.spread([of[i] for i in part], said) for of in (old, ref)]
            advantage = batch.advantages[part].to(device)
            total, seen = grpo_loss(pi, *here, advantage, said, config.clip_ratio, config.kl)
            (total / count).backward()
            for name, value in seen.items():
                watched[name] += value.item() / tokens
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        watched["norm"] += norm.item() / config.updates
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return watched | policy.mismatch(old, [s.logprobs for s in samples])


# ----------------------------------------------------------------------------------------------------------------------
# The run


def make_environment(config, tokenizer, device, dtype):
    if config.reward == "instructions":
        return environments.Instructions()
    if config.reward == "gym":
        return environments.Gym(config.families, config.seed)
    return environments.Preferences(config.judge, tokenizer, device, dtype, config.impl)


def run(config, say=print):
    """Train, or go on; returns the closing entry of the log, or None if it was stopped."""
    config = fill_in(config, None)
    name = STAGES[config.reward]
    start = open_start(name, config)
    model, tokenizer, device = start.model, start.tokenizer, start.device
    if start.dtype == torch.float16:
        raise ValueError("float16 gradients would need scaling, which is not done here: give --dtype float32")
    parameters = start.parameters
    config = fill_in(config, parameters)
    settings = {k: v for k, v in asdict(config).items() if k not in NOT_THE_RUN}
    job = Stage(name, config.checkpoint, config.out, settings, say)
    environment = make_environment(config, tokenizer, device, start.dtype if device.type == "cuda" else None)

    say(f"stage     {name} from {config.checkpoint} ({parameters:,} parameters), into {config.out}")
    say(f"device    {start.why}")
    say(f"step      {config.prompts} prompts x {config.group} answers of at most {config.room} tokens, "
        f"{config.updates} updates; {config.steps} steps; rate {config.lr:g}; KL {config.kl:g}")  # fmt: skip

    reference = copy.deepcopy(model).eval().requires_grad_(False)  # before a resumed run's weights are loaded
    optimizer = train.make_optimizer(model, config.lr, 0.0)
    autocast = start.autocast
    job.begin(model, optimizer, torch.amp.GradScaler(device.type, enabled=False))
    roller = Roller(model, tokenizer, start.dtype if device.type == "cuda" else None)
    if job.step == 0 and config.eval_count:
        found = environment.measure(model, tokenizer, config.eval_count)  # all other skills are in the log of before
        job.record({"step": 0} | found)
        say(f"before    {told(found)}")
    for step in job.steps(config.steps, config.save_every):
        rate = config.lr * min(1.0, (step + 1) / max(1, round(config.warmup * config.steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        roller.follow(model)
        spoken = roller.pace.tokens, roller.pace.seconds
        batch = collect(roller, tokenizer, environment, config, step)
        tokens, seconds = roller.pace.tokens - spoken[0], roller.pace.seconds - spoken[1]
        model.train()
        began = time.time()
        watched = learn(model, reference, optimizer, batch, config, autocast)
        done = step + 1
        if not math.isfinite(watched["norm"]):
            raise ValueError(f"the gradient's norm is {watched['norm']} at step {done}: lower --lr ({config.lr:g})")
        lengths = [len(s.said) for s in batch.samples]
        entry = {
            "reward": batch.rewards.mean().item(), "well_formed": sum(batch.formed) / len(lengths),
            "length": sum(lengths) / len(lengths), "lr": rate, "tokens_per_second": tokens / seconds,
            "learning_seconds": round(time.time() - began, 3), **watched,
        }  # fmt: skip
        job.record(entry)
        line = ""
        if config.skills_every and done % config.skills_every == 0 and done < config.steps:
            found = skills.table(model, tokenizer, config.skills_count)
            job.record(found)
            line = "  " + skills.format_line(found)
        if done % config.log_every == 0 or done in (1, config.steps) or line:
            say(
                f"step {done:4d}/{config.steps}  reward {entry['reward']:.3f}  well formed {entry['well_formed']:.0%}"
                f"  {entry['length']:.0f} tokens  KL {entry['kl']:.4f}  clipped {entry['ratio clipped']:.1%}  norm "
                f"{entry['norm']:.2f}  gap {entry['logprob_gap']:.4f}  {entry['tokens_per_second']:,.0f} tok/s{line}"
            )
            question, said, reward = batch.shown
            say(f"    {question[:100]}  {said[:200]}  -> {reward:.2f}")
    if job.stopped:
        return None
    return close(job, environment, tokenizer, config, roller)


def told(found):
    """Measurements in words: shares as percentages."""
    return "  ".join(f"{k} {v:.0%}" if environments.is_share(k) else f"{k} {v:.2f}" for k, v in found.items())


def close(job, environment, tokenizer, config, roller):
    """The end of a stage: its checkpoint folder, the skills, the plot; returns the closing entry of the log."""
    job.finish(tokenizer)
    job.say(f"{config.steps} steps in {job.seconds():.0f} s (rollouts: {roller.pace})")
    job.say(f"{config.out} is the end of stage {job.name}")
    found = {}
    if config.eval_count:
        found = skills.table(job.model, tokenizer, config.eval_count)
        found |= environment.measure(job.model, tokenizer, config.eval_count)
        job.say(f"after, on {config.eval_count} held-out prompts of each kind:\n  {told(found)}")
    job.record(found)
    shown = [k for k in found if environments.is_share(k)]
    plot(job.log, job.out / "curve.png", ("reward", "well_formed"), shown, f"stage {job.name}: reward in training")
    return job.log[-1]


def main(argv=None):
    advice = "lower --part-tokens, --prompts or --group"
    return finish("grpo", lambda: run(train.parse(argv, GrpoConfig, __file__, __doc__)), advice)


if __name__ == "__main__":
    sys.exit(main())
