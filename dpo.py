"""Direct preference optimization, again and again: the model plays with tools, and learns from where plays parted.

The idea. A verifier says which plays of an episode ended right (tools.py looks at the records). The plays of one
episode begin alike; somewhere the failed one said something else than the successful one. That turn is a preference:
same conversation, two answers, one of them better. No reward model, no value function, no sampling inside the loss. Why
a loss over pairs is reinforcement learning at all (Rafailov et al. 2023):

    wanted    max over pi of E[r(y)] - beta KL(pi || ref): reward, but stay close to where you started
    solved    pi*(y) = ref(y) exp(r(y) / beta) / Z for each prompt; Z sums over all answers, nobody can compute it
    turned    r(y) = beta log(pi*(y) / ref(y)) + beta log Z: every policy is the best one for some reward, which it
              implies
    compared  people's choices (Bradley and Terry, see preferences.py): P(chosen before rejected) = sigmoid(r_c - r_r),
              and in the difference Z is gone
    fitted    loss = -log sigmoid(margin), margin = beta [log(pi / ref)(chosen) - log(pi / ref)(rejected)]

log pi(y) is the *sum* over all tokens of the answer, thought included. The gradient is -beta sigmoid(-margin) times
(grad log pi(chosen) - grad log pi(rejected)): pairs that are already right hardly count.

Why in rounds. Pairs from an old policy teach about mistakes that the present one no longer makes. So each round the
present policy plays anew, its pairs are collected, and it is itself the reference while it learns from them.

    play       E episodes, K plays of each, all of them side by side, a turn at a time (plays.py)
    pairs_of   the plays of an episode -> pairs (plays.py)
    train_step a mini-batch of pairs -> one optimizer step

What to watch. The loss sees only the difference: the chosen answer's probability may fall too, as long as the rejected
one's falls faster; so both are printed. `--sft-weight` holds the chosen one up. And a play may have failed later than
where it first differed: a pair is evidence, not proof.

    python dpo.py --checkpoint out-ifrl --out out-dpo

A round depends on seed, number and weights only, so a run that was stopped goes on at a round's beginning, on a CPU to
the last bit. One process. Source: report section 3 (iterative DPO on WorkBench, on-policy pairs; beta 0.05, sums of
log-probabilities and SFT weight 0 as in NVIDIA's RL library). Rounds, plays and learning rates are ours.
"""

import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from random import Random

from stage import Stage, open_start, plot, take_step  # isort: skip  (before torch: with device.py)
import torch
import torch.nn.functional as F

import policy
import skills
import tools
import train
from plays import KINDS, check_length, pairs_of, play
from rollout import Roller
from settings import finish


@dataclass
class DpoConfig:
    """Every field is a flag. None means: what suits the model's size (see RUNS)."""

    checkpoint: str = "out-ifrl"  # folder of the model to start from
    out: str = "out-dpo"  # folder for log, plot and checkpoint; a run there is resumed
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # auto, float32, bfloat16 or float16: what the matrix products run in
    impl: str = "auto"  # auto, torch or triton: who computes the Mamba-2 layers
    rounds: int | None = None  # play, pair, learn: so many times
    episodes: int | None = None  # different episodes in a round
    plays: int | None = None  # of each episode
    temperature: float = 1.0  # of the plays
    room: int = 192  # most tokens in a turn; who needs more has failed
    length: int = 640  # most tokens in a turn and the conversation before it; a play that needs more has failed
    per_episode: int = 3  # most pairs of an episode, so that none dominates
    passes: int = 1  # over the pairs of a round
    batch: int | None = None  # pairs in an optimizer step
    beta: float = 0.05  # how dearly distance from the reference is paid for
    sft_weight: float = 0.0  # weight of the chosen answers' own loss, nats a token
    lr: float | None = None  # learning rate, constant after its rise
    warmup: float = 0.2  # share of a round's optimizer steps in which the rate rises
    weight_decay: float = 0.0
    clip: float = 1.0  # the gradient's norm is cut to this
    tokens: int = 32768  # padded tokens in one forward and backward; lower it when memory runs out
    seed: int = 0
    skills_every: int | None = None  # rounds between measurements of the skills; 0 for none on the way
    skills_count: int | None = None  # held-out prompts of each kind in such a measurement
    eval_count: int | None = None  # held-out prompts of each kind at the end; 0 for none


RUNS = {  # by size: below 3 M parameters, and from there on
    "small": dict(rounds=6, episodes=64, plays=4, batch=8, lr=1e-4, skills_every=2, skills_count=13, eval_count=54),
    "large": dict(rounds=6, episodes=512, plays=8, batch=64, lr=1e-4, skills_every=2, skills_count=39, eval_count=108),
}
NOT_THE_RUN = {"out", "device", "dtype", "impl", "tokens", "skills_every", "skills_count", "eval_count"}


def fill_in(config, parameters):
    """The config with every None replaced by what suits; ValueError for what makes no sense.

    parameters: of the model; None before it is loaded: then only what was given is checked.
    """
    if parameters is not None:
        suits = RUNS["small" if parameters < 3e6 else "large"]
        config = replace(config, **{k: v for k, v in suits.items() if getattr(config, k) is None})
    at_least = dict(rounds=1, episodes=1, plays=2, room=8, length=64, per_episode=1, passes=1, batch=1, sft_weight=0,
                    warmup=0, weight_decay=0, tokens=1, seed=0, skills_every=0, skills_count=1,
                    eval_count=0)  # fmt: skip
    for name, low in at_least.items():
        value = getattr(config, name)
        if value is not None and not low <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {low}; got {value}")
    for name in ("lr", "clip", "beta", "temperature"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} must be a finite number above 0; got {value}")
    if config.warmup > 1:
        raise ValueError(f"--warmup is a share between 0 and 1; got {config.warmup}")
    return config


# ----------------------------------------------------------------------------------------------------------------------
# Loss and step


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """(loss of each pair in nats, margins), both (b,), from log-probabilities of whole answers, (b,) each.

    For each prompt the policy that maximises E[r] - beta KL(pi || ref) is
        pi*(y) = ref(y) exp(r(y) / beta) / Z.
    Solved for the reward, any policy is the best one for
        r(y) = beta log(pi(y) / ref(y)) + beta log Z,
    with the same Z for all answers to the prompt. Under Bradley and Terry
        P(chosen before rejected) = sigmoid(r(chosen) - r(rejected)) = sigmoid(margin),
        margin = beta [(log pi - log ref)(chosen) - (log pi - log ref)(rejected)],
    and the loss is -log of that: log 2 where pi = ref, with the gradient -beta sigmoid(-margin) for log pi(chosen)
    and the opposite for log pi(rejected). Source: Rafailov et al. 2023, equation 7.
    """
    margins = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -F.logsigmoid(margins), margins


def logprobs_of(model, pairs, tokens, autocast):
    """Without a gradient: the log-probabilities of the tokens of all chosen answers, then of all rejected ones, a list
    of 2 n arrays, and their sums, (2, n) float32."""
    found = policy.frozen_logprobs(model, _samples(pairs), tokens, autocast)
    return found, torch.tensor([float(each.sum(dtype="float64")) for each in found]).view(2, -1)


def _samples(pairs):
    return [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]


def train_step(model, optimizer, scaler, pairs, ref, config, autocast):
    """One optimizer step over pairs; ref (2, n) as from `logprobs_of`. Returns (loss, gradient norm), tensors.

    The loss is the mean over pairs, plus `sft_weight` times the mean over all tokens of the chosen answers, however
    they are cut into parts.
    """
    device, total = model.lm_head.weight.device, 0.0
    longer = [max(pair.chosen, pair.rejected, key=lambda s: len(s.said)) for pair in pairs]
    count = sum(len(pair.chosen.said) for pair in pairs)
    for part in policy.bundles(longer, config.tokens // 2):
        ids, said = policy.rows(_samples([pairs[i] for i in part]), device)
        with autocast():
            chosen, rejected = policy.logprobs(model, ids, said).sum(1).chunk(2)
        each, _ = dpo_loss(chosen, rejected, *ref[:, part].to(device), config.beta)
        loss = each.sum() / len(pairs) - config.sft_weight * chosen.sum() / count
        scaler.scale(loss).backward()
        total = total + loss.detach()
    norm = take_step(model, optimizer, scaler, config.clip)
    return total, norm


def learn(model, optimizer, scaler, pairs, ref, config, number, autocast):
    """All optimizer steps of round `number`; returns their mean loss and mean gradient norm."""
    order = []
    for i in range(config.passes):
        indices = list(range(len(pairs)))
        Random(f"{config.seed} dpo {number} pass {i}").shuffle(indices)
        order += [indices[s : s + config.batch] for s in range(0, len(pairs), config.batch)]
    losses = []
    for step, part in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, (step + 1) / max(1.0, config.warmup * len(order)))
        losses.append(train_step(model, optimizer, scaler, [pairs[i] for i in part], ref[:, part], config, autocast))
    loss, norm = torch.tensor(losses).mean(0).tolist()
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss} in round {number + 1}: lower --lr (now {config.lr:g})")
    return loss, norm


# ----------------------------------------------------------------------------------------------------------------------
# The run


def run(config, say=print):
    """Train, or go on training; returns the closing entry of the log, or None if it was stopped."""
    config = fill_in(config, None)
    start = open_start("dpo", config)
    model, tokenizer, device = start.model, start.tokenizer, start.device
    parameters = start.parameters
    config = fill_in(config, parameters)
    settings = {k: v for k, v in asdict(config).items() if k not in NOT_THE_RUN}
    job = Stage("dpo", config.checkpoint, config.out, settings, say)
    check_length(tokenizer, config.room, config.length)

    say(f"stage     dpo from {config.checkpoint} ({parameters:,} parameters), into {config.out}")
    say(f"device    {start.why}")
    say(f"round     {config.episodes} episodes, {config.plays} plays of each at temperature {config.temperature:g}")
    say(
        f"step      {config.batch} pairs, {config.passes} pass(es) over a round's; beta {config.beta:g}, SFT weight "
        f"{config.sft_weight:g}; rate {config.lr:g}; {config.rounds} rounds"
    )
    optimizer = train.make_optimizer(model, config.lr, config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=start.dtype == torch.float16)
    autocast = start.autocast
    job.begin(model, optimizer, scaler)
    roller = Roller(model, tokenizer, start.dtype if device.type == "cuda" else None)
    roller.longest = -(-config.length // 64) * 64  # slots of one size from the first, whatever was said before
    if job.step == 0 and config.eval_count:  # all other skills are in the log of before
        found = drawn_success(model, roller, tokenizer, config)
        job.record({"step": 0} | found)
        say(f"before    of held-out plays right: {skills.format_line(found)}")
    model.train()
    for number in job.steps(config.rounds, 1):
        entry = one_round(job, roller, tokenizer, config, number, autocast)
        job.record(entry)
        done = number + 1
        if config.skills_every and done % config.skills_every == 0 and done < config.rounds:
            found = skills.table(model, tokenizer, config.skills_count)
            job.record(found)
            say(f"round {done:3d}  {skills.format_line(found)}")
    if job.stopped:
        return None
    return close(job, roller, tokenizer, config)


def drawn_success(model, roller, tokenizer, config):
    """{"drawn", "drawn chain"}: of held-out episodes, the kinds in turn, each played `plays` times at the temperature
    of training, the share that ends right; the second of those where a result decides the next call.

    `tools` in the table of skills is greedy. The two are not the same: a model can be right greedily and err in every
    third play that is drawn, and these are the plays it learns from."""
    kinds = [tools.KINDS[i % len(tools.KINDS)] for i in range(max(config.eval_count, len(tools.KINDS)))]
    episodes = [tools.sample(kind, Random(f"drawn {i}"), "test") for i, kind in enumerate(kinds)]
    roller.follow(model)
    how = config.plays, config.room, config.length, config.temperature, "drawn"
    plays = [played for group in play(roller, tokenizer, episodes, *how) for played in group]
    chain = (p.success for p in plays if p.play.episode.kind in tools.SEVERAL)
    return {"drawn": skills.share(p.success for p in plays), "drawn chain": skills.share(chain)}


def one_round(job, roller, tokenizer, config, number, autocast):
    """Play, pair, learn; returns the entry for the log. What is measured after learning is on the round's own pairs."""
    model, name, start = job.model, f"{config.seed} dpo {number}", time.time()
    roller.follow(model)
    episodes = [tools.draw(Random(f"{name} {i}"), "train", KINDS) for i in range(config.episodes)]
    spoken = roller.pace.tokens, roller.pace.seconds
    groups = play(roller, tokenizer, episodes, config.plays, config.room, config.length, config.temperature, name)
    spoken = roller.pace.tokens - spoken[0], roller.pace.seconds - spoken[1]
    plays = [played for group in groups for played in group]
    pairs = [pair for group in groups for pair in pairs_of(group, config.per_episode)]
    entry = {
        "episodes": len(episodes),
        "plays": len(plays),
        "success": sum(played.success for played in plays) / len(plays),
        "several": _share(played.success for played in plays if played.play.episode.kind in tools.SEVERAL),
        "broken": sum(played.over for played in plays) / len(plays),
        "mixed": sum(0 < sum(p.success for p in group) < len(group) for group in groups) / len(groups),
        "pairs": len(pairs),
        "rollout_tokens": spoken[0],
        "tokens_per_second": spoken[0] / max(1e-9, spoken[1]),
    }
    head = f"round {number + 1:3d}/{config.rounds}"
    told = "" if entry["several"] is None else f" ({entry['several']:.1%} where a result decides)"
    job.say(
        f"{head}  {len(plays):,} plays of {len(episodes):,} episodes: {entry['success']:.1%} right{told}, "
        f"{entry['broken']:.1%} broken; {entry['mixed']:.0%} of the episodes both ways: {len(pairs):,} pairs; "
        f"{entry['tokens_per_second']:,.0f} rollout tok/s"
    )
    if not pairs:
        job.say(f"{head}  nothing to learn: no episode was played right once and wrong once")
        return entry
    found, ref = logprobs_of(model, pairs, config.tokens, autocast)
    if config.temperature == 1:  # else the rollout's are those of another distribution
        entry |= policy.mismatch(found, [sample.logprobs for sample in _samples(pairs)])
    loss, norm = learn(model, job.optimizer, job.scaler, pairs, ref, config, number, autocast)
    _, now = logprobs_of(model, pairs, config.tokens, autocast)
    after, margins = dpo_loss(*now, *ref, config.beta)
    if not after.isfinite().all():  # before it is saved
        raise ValueError(f"the weights are of no use after round {number + 1}: lower --lr (now {config.lr:g})")
    chosen, rejected = (now - ref).mean(1).tolist()
    entry |= {
        "loss": loss, "norm": norm, "loss_after": after.mean().item(), "margin": margins.mean().item(),
        "accuracy": (margins > 0).float().mean().item(), "chosen": chosen, "rejected": rejected,
        "round_seconds": time.time() - start,
    }  # fmt: skip
    gap = f"; gap to the rollout {entry['logprob_gap']:.1e} nats a token" if "logprob_gap" in entry else ""
    job.say(
        f"{head}  loss {loss:.3f}, afterwards {entry['loss_after']:.3f}: accuracy {entry['accuracy']:.0%}, margin "
        f"{entry['margin']:+.3f}, chosen {chosen:+.2f}, rejected {rejected:+.2f} nats; norm {norm:.2f}{gap}"
    )
    show(tokenizer, pairs[number % len(pairs)], job.say)
    return entry


def _share(flags):
    flags = list(flags)
    return sum(flags) / len(flags) if flags else None


def show(tokenizer, pair, say):
    """A pair as text: the end of the conversation, then both answers."""
    say(f"    ... {_line(tokenizer.decode(pair.chosen.prompt))[-150:]}")
    for name in ("chosen", "rejected"):
        text = _line(tokenizer.decode(getattr(pair, name).said))
        say(f"    {name:8}  {text if len(text) < 220 else f'{text[:60]} ... {text[-150:]}'}")


def _line(text):
    return " / ".join(text.strip().split("\n"))


def close(job, roller, tokenizer, config):
    """The end of the stage: its checkpoint folder, the skills, the plot; returns the closing entry of the log."""
    job.finish(tokenizer)
    job.say(f"{config.rounds} rounds in {job.seconds():.0f} s; {config.out} is the end of stage dpo")
    found = {}
    if config.eval_count:
        found = skills.table(job.model, tokenizer, config.eval_count)
        found |= drawn_success(job.model, roller, tokenizer, config)
        job.say(f"on {config.eval_count} held-out prompts of each kind:\n  {skills.format_line(found)}")
    job.record(found)
    title = "stage dpo, by round: loss (nats), shares of plays and pairs"
    plot(job.log, job.out / "curve.png", ("loss_after", "success", "several", "accuracy"), tuple(found), title)
    return job.log[-1]


def main(argv=None):
    return finish("dpo", lambda: run(train.parse(argv, DpoConfig, __file__, __doc__)), "lower --tokens or --length")


if __name__ == "__main__":
    sys.exit(main())
