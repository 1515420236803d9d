"""A judge: a model that scores answers, what its scores are worth, and how it is kept.

The idea. The score of an answer is w . features at the end of its turn, where a policy's own copy has read everything:
one vector w beside a model that can already read. How it learns is reward.py's subject; here is what it computes. The
judge reads prompt and answer without a thought, whatever the policy thought: what is liked is what was said.

Only differences within a prompt are ever learned, so what a score of 3 means for another prompt is nobody's business:
`rank in prompt` compares answers to one prompt, as reinforcement learning will, and `rank` all of them. And the size of
a score is an accident of training, so at its end scores are shifted and scaled until `preferences.respond`'s answers
have mean 0 and spread 1: reinforcement learning needs a scale that it can count on.

The folder is an ordinary checkpoint, and beside it `reward.safetensors` with w, shift and scale. Its lm_head is the
policy's, unused and untouched. This file must not know training.
"""

import math
import os
from pathlib import Path
from random import Random
from types import SimpleNamespace

from stage import stage_of  # isort: skip  (before torch: with device.py)
import torch

import policy
import preferences
from checkpoint import load_pretrained
from conversations import Example, encode
from safefile import CheckpointError, fsync_folder, open_safetensors, write_safetensors, writing

FILE = "reward.safetensors"
ANSWERS = 8  # to a prompt, when answers to one prompt are put in order
STANDARD = 1024  # answers whose mean and spread become 0 and 1


# ----------------------------------------------------------------------------------------------------------------------
# The model


class RewardModel(torch.nn.Module):
    """Scores of answers. backbone: a NemotronH, which is trained, not copied; w (d,): zero at first, so that every
    answer scores 0; shift and scale: see `standardise`. All three are float32, whatever the backbone is in."""

    def __init__(self, model):
        super().__init__()
        self.backbone, weight = model, model.lm_head.weight
        self.w = torch.nn.Parameter(torch.zeros(weight.shape[1], device=weight.device))
        self.register_buffer("shift", torch.zeros((), device=weight.device))
        self.register_buffer("scale", torch.ones((), device=weight.device))

    def forward(self, ids, last):
        """Scores (b,) float32 of rows ids (b, l) int64, padded on the right, whose last tokens are at last (b,)."""
        x = self.backbone.features(ids)  # (b, l, d)
        x = x[torch.arange(len(last), device=last.device), last].float()
        return ((x * self.w).sum(-1) - self.shift) / self.scale  # no matrix product: autocast would round it

    # What resume.py asks of a model

    @property
    def config(self):
        return self.backbone.config

    @property
    def lm_head(self):
        return self.backbone.lm_head


def read(tokenizer, prompt, answer):
    """What the judge reads, with `prompt` and `said` as in a rollout's Sample: the question (a text, or anything with
    one, as a preferences.Prompt), thinking off; the answer and the end of the turn."""
    asked = ({"role": "user", "content": getattr(prompt, "text", prompt)},)
    ids, start = encode(tokenizer, Example("preference", asked, None, answer))
    return SimpleNamespace(prompt=ids[:start], said=ids[start:])


def rows(samples, device):
    """(ids (b, l), last (b,)) int64 for `RewardModel.forward`."""
    ids, _ = policy.rows(samples, device, multiple_of(device))
    return ids, torch.tensor([len(s.prompt) + len(s.said) - 1 for s in samples], device=device)


def multiple_of(device):
    """Lengths of rows are multiples of this: on a GPU, so that kernels are not made anew for every length."""
    return 16 if torch.device(device).type == "cuda" else 1


@torch.no_grad()
def score_answers(judge, tokenizer, prompts, answers, tokens=16384):
    """The judge's score of every answer, a list of floats. prompts: preferences.Prompts or texts, one for each answer;
    tokens: padded tokens read at a time. ValueError if the lists differ in length."""
    if len(prompts) != len(answers):
        raise ValueError(f"{len(prompts)} prompts for {len(answers)} answers: give one for each")
    samples = [read(tokenizer, prompt, answer) for prompt, answer in zip(prompts, answers)]
    found = [0.0] * len(samples)
    device = judge.w.device
    for part in policy.bundles(samples, tokens, multiple_of(device)) if samples else ():
        scores = judge(*rows([samples[i] for i in part], device))
        for i, score in zip(part, scores.tolist()):
            found[i] = score
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Held against the rule


def ranks(values):
    """The places (n,) float64 of numbers in ascending order, from 0; equal ones share the mean of theirs."""
    values = torch.as_tensor(values, dtype=torch.float64)
    below, equal = (values[:, None] > values).sum(1), (values[:, None] == values).sum(1)
    return below.double() + (equal.double() - 1) / 2


def rank_correlation(a, b):
    """Spearman's: the correlation of the ranks, from -1 (reversed) to 1 (the same order); 0 if a list is constant."""
    a, b = (r - r.mean() for r in (ranks(a), ranks(b)))
    size = (a.norm() * b.norm()).item()
    return (a @ b).item() / size if size else 0.0


def held_out(judge, tokenizer, count, seed=0):
    """{"pairs", "rank", "rank in prompt"} on held-out prompts: the share of `count` pairs without noise in which the
    judge agrees with the rule (a tie is half), and the rank correlation of its scores with the rule's points over
    fresh answers: of all prompts together, and the mean over prompts of that among the answers to one.

    To read them: one that sees full stops and capitals and no word is right in 0.73 of the pairs, with 0.24 and 0.51;
    one that knows the rule has 1.0, 0.995 and 0.94 if it orders answers of equal points at random.
    """
    rng = Random(f"{seed} held out")
    pairs = [preferences.draw(rng, "test", 0.0) for _ in range(count)]
    groups = [preferences.draw_prompt(rng, "test") for _ in range(-(-count // 4))]
    asked = [prompt for prompt in groups for _ in range(ANSWERS)]
    said = [preferences.respond(rng, prompt) for prompt in asked]
    points = [preferences.score(prompt, answer) for prompt, answer in zip(asked, said)]
    prompts = [p.prompt for p in pairs]
    scores = score_answers(judge, tokenizer, [*prompts, *prompts, *asked],
                           [p.chosen for p in pairs] + [p.rejected for p in pairs] + said)  # fmt: skip
    chosen, rejected, scores = scores[:count], scores[count : 2 * count], scores[2 * count :]
    agree = sum((c > r) + (c == r) / 2 for c, r in zip(chosen, rejected))
    within = [
        rank_correlation(scores[i : i + ANSWERS], points[i : i + ANSWERS])
        for i in range(0, len(asked), ANSWERS)
        if len(set(points[i : i + ANSWERS])) > 1  # else there is no order to find
    ]
    inside = sum(within) / len(within) if within else 0.0
    return {"pairs": agree / count, "rank": rank_correlation(scores, points), "rank in prompt": inside}


@torch.no_grad()
def standardise(judge, tokenizer, seed=0):
    """Set shift and scale so that `STANDARD` answers of preferences.respond, to prompts of the train split that the
    training did not draw, have mean 0 and spread (standard deviation) 1. ValueError if all score the same."""
    rng = Random(f"{seed} standard")
    prompts = [preferences.draw_prompt(rng, "train") for _ in range(STANDARD)]
    judge.shift.zero_(), judge.scale.fill_(1.0)
    raw = torch.tensor(
        score_answers(judge, tokenizer, prompts, [preferences.respond(rng, prompt) for prompt in prompts])
    )
    mean, spread = raw.double().mean().item(), raw.double().std(correction=0).item()
    if not (math.isfinite(spread) and spread > 0):
        raise ValueError(f"the scores of {STANDARD} answers have mean {mean} and spread {spread}: train more steps")
    judge.shift.fill_(mean), judge.scale.fill_(spread)


# ----------------------------------------------------------------------------------------------------------------------
# The folder


def save_reward(folder, judge):
    """Write the judge's own numbers into a folder, all of them or none; the backbone is written by Stage.finish,
    afterwards: a folder that opens has both."""
    path = Path(folder) / FILE
    temporary = path.with_name(f".{FILE}.tmp")
    with writing(path):
        try:
            write_safetensors(temporary, {"w": judge.w, "shift": judge.shift, "scale": judge.scale}, {"format": "pt"})
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


def load_reward(folder, device="cpu", dtype=None):
    """(RewardModel in eval mode, tokenizer) of a folder that reward.py wrote. dtype: of the backbone, as in
    checkpoint.load_pretrained. ValueError, in one sentence, for a folder of another stage or a damaged one."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no finished reward model (no config.json): make one with python reward.py")
    if stage_of(folder) != "reward":
        raise ValueError(
            f"{folder} is the end of stage {stage_of(folder)} and no reward model: give one that python reward.py made"
        )
    wanted = {"w": None, "shift": (), "scale": ()}
    with open_safetensors(folder / FILE) as file:
        found = {name: file.get_tensor(name) for name in file.keys()}
    model, tokenizer = load_pretrained(folder, device, dtype)
    if tokenizer is None:
        raise CheckpointError(f"{folder} has no tokenizer.json, so no answer can be read: copy the folder again")
    judge = RewardModel(model)
    wanted["w"] = tuple(judge.w.shape)
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if shapes != wanted or not all(tensor.isfinite().all() for tensor in found.values()) or found["scale"] <= 0:
        raise CheckpointError(
            f"{folder / FILE} holds {shapes} and not {wanted} in finite numbers: copy the folder again"
        )
    with torch.no_grad():
        for name, tensor in found.items():
            getattr(judge, name).copy_(tensor)
    return judge.eval(), tokenizer
