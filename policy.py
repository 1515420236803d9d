"""A policy's own words as training data: the rows they make, and the log-probability of every token in them.

The idea. All of alignment after supervised tuning moves the probability of whole answers: up where they were good, down
where they were not. So each loss there (grpo.py, dpo.py) needs one function: given a prompt and what was said after it,
log p(token) for each token that was said. It is the next-token loss with its sign turned, kept token by token, with a
gradient.

Where the answers come from a rollout, the same numbers were already computed when they were drawn, by other code: one
token at a time, from a cache, often in bfloat16. The two should agree and never quite do; `mismatch` says how far they
are apart. A loss that divides one by the other believes a policy has changed where only the rounding has.

This file must not know rewards. Names: pi is the model being trained, old the one that spoke, ref the frozen one.
"""

import numpy as np
import torch


def rows(samples, device, multiple=16):
    """(ids (b, l) int64, said (b, l) bool) of rollout.Samples, or anything with `prompt` and `said`.

    Padded on the right (who only looks back never sees padding), to a multiple, so that a GPU's kernels are not made
    anew each time."""
    longest = max(len(s.prompt) + len(s.said) for s in samples)
    longest = -(-longest // multiple) * multiple
    ids, said = np.zeros((len(samples), longest), np.int64), np.zeros((len(samples), longest), bool)
    for i, s in enumerate(samples):
        ids[i, : len(s.prompt) + len(s.said)] = [*s.prompt, *s.said]
        said[i, len(s.prompt) : len(s.prompt) + len(s.said)] = True
    return torch.from_numpy(ids).to(device), torch.from_numpy(said).to(device)


def spread(values, said):
    """Numbers of each token, a list of (len(said_i),) arrays, at their places: (b, l) float32, zero elsewhere."""
    found = torch.zeros(said.shape, dtype=torch.float32, device=said.device)
    found[said] = torch.from_numpy(np.concatenate([np.asarray(v, np.float32) for v in values])).to(said.device)
    return found


def bundles(samples, tokens, multiple=16):
    """Indices of the samples in parts of at most `tokens` padded tokens (or of one sample); alike lengths together."""
    room = lambda i: -(-(len(samples[i].prompt) + len(samples[i].said)) // multiple) * multiple
    part, longest = [], 0
    for i in sorted(range(len(samples)), key=room, reverse=True):
        longest = longest or room(i)
        if part and (len(part) + 1) * longest > tokens:
            yield part
            part, longest = [], room(i)
        part.append(i)
    yield part


def logprobs(model, ids, said, temperature=1.0):
    """log p(ids[t] | ids[:t]) at the tokens of `said`, (b, l) float32 with a gradient; zero elsewhere. said[:, 0] must
    be False: a first token has no prediction. Logits exist only where something was said, in float32."""
    x = model.features(ids)[:, :-1]
    learned = said[:, 1:]
    logits = model.lm_head(x[learned]).float() / temperature  # (n, vocab)
    found = torch.log_softmax(logits, -1).gather(1, ids[:, 1:][learned][:, None])[:, 0]
    full = found.new_zeros(said.shape)
    full[said] = found  # the order of `said` is that of `learned`: both run along rows
    return full


@torch.no_grad()
def frozen_logprobs(model, samples, tokens, autocast, temperature=1.0):
    """The same without a gradient, for many samples: a list of (len(said),) float32 arrays in their order."""
    found, device = [None] * len(samples), model.lm_head.weight.device
    for part in bundles(samples, tokens):
        ids, said = rows([samples[i] for i in part], device)
        with autocast():
            full = logprobs(model, ids, said, temperature)
        lengths = said.sum(1).tolist()
        for i, own in zip(part, full[said].cpu().split(lengths)):
            found[i] = own.numpy()
    return found


def mismatch(pi, old):
    """How far the learner's log-probabilities are from the rollout's, over all tokens of lists of arrays: the mean of
    |difference|, its largest, and the mean of exp|difference| (1 if they agree; what RL frameworks watch)."""
    gap = np.abs(np.concatenate(pi) - np.concatenate(old)).astype(np.float64)
    return {"logprob_gap": gap.mean(), "logprob_gap_max": gap.max(), "logprob_error": np.exp(gap).mean()}
