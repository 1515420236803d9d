"""The loss of distillation: how far the student's next-token distribution is from the teacher's.

A text says of each token what it was. A teacher says what it could have been: a distribution over the vocabulary, which
is why a student learns more from a token of the same text. With teacher probabilities p and student probabilities q,

    kl        sum_v p_v (log p_v - log q_v)      dl/ds = q - p                                 forward KL
    reverse   sum_v q_v (log q_v - log p_v)      dl/ds = q (log q - log p - the loss)          reverse KL
    topk      forward KL of p and q, both        dl/ds = q - p on the k tokens, 0 elsewhere
              restricted to the teacher's k most likely tokens and renormalised there
    ce        -log q_target                      dl/ds = q - onehot                            no teacher: the control

(s: the student's logits.) The report's recovery is forward KL alone, without cross-entropy. It asks the student for
some probability wherever the teacher has some; reverse KL asks for none where the teacher has none, and lets modes go.
All are zero for a copy of the teacher, in value and in gradient, except `ce`. Both logits are divided by a temperature
before softmax (the report's Nemotron-H predecessor has 1, and so has the default); the formulas then hold for s / T, so
dl/ds is 1/T times the above, and no factor T^2 makes up for it.

Restricting to k tokens and renormalising is a log-softmax over the k gathered logits: the other logits cancel, and the
teacher need not be asked for its normaliser. So k numbers and k places a token are a teacher that can be kept on a disk
(teacher_cache.py). The price: what the student gives to all other tokens is not seen, so nothing pushes it down.

Two numbers: 8,192 tokens of 131,072 logits in float32 are 4.0 GiB, and the plain form holds seven or so such tensors:
teacher, student, their log-softmaxes, products, a gradient. None is needed twice. So, as in loss.py, a slice of tokens
is finished on the spot: both heads' logits, loss, gradient, and what that means for the student's features and head;
at most four tensors of a slice (256 MiB, 512 such tokens) exist at a time. Work in softmaxes is a dozen passes over the
slices, some 50 GB for those 8,192 tokens: a hundredth of a second at 4.8 TB/s, where the two models' matrices take
above half a second. So there is nothing here for a kernel to win.

`plain_distill` is the definition, in PyTorch's own words; `distill_loss` is the same function in slices.

Source: report section 4 (logit distillation with forward KL); the restriction to k tokens is that of NVIDIA's
ModelOpt. This file must not know models or training.
"""

import torch
import torch.nn.functional as F

from loss import SLICE, cross_entropy_, in_slices, product_dtype

KINDS = ("kl", "reverse", "topk", "ce")


def plain_distill(x, weight, learned, kind="kl", teacher=None, targets=None, temperature=1.0, k=None):
    """What `distill_loss` computes, from whole logits and left to autograd."""
    widen = lambda t: t.to(torch.promote_types(t.dtype, torch.float32))
    s = widen(F.linear(x, weight))
    if kind == "ce":
        losses = F.cross_entropy(s.flatten(0, -2), targets.flatten(), reduction="none").view_as(targets)
    else:
        t = widen(F.linear(*teacher))
        if kind == "topk":
            t, places = t.topk(min(k, t.shape[-1]))
            s = s.gather(-1, places)
        q, p = (s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
        if kind == "reverse":
            q, p = p, q
        losses = F.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    return (losses * learned).sum(), losses.detach()


def distill_loss(x, weight, learned, kind="kl", teacher=None, targets=None, temperature=1.0, k=None, size=None):
    """The student's features x (b, l, d) and head weight (vocab, d); learned (b, l) bool: the tokens that count.

    kind: one of KINDS. teacher: its features (b, l, d') and head (vocab, d'), another width is welcome; for "topk" it
    may be its likeliest logits and their places, both (b, l, k), as `top_logits` returns them, up to a constant a
    token. targets (b, l) int64: for "ce". k: how many logits "topk" takes of a teacher that is given by its head.
    size: logits in a slice, by default as many as fit into SLICE bytes.
    Returns the sum of the losses that count, in nats, and the loss of every token (b, l) without a gradient; gradients
    go to x and weight. ValueError if what `kind` needs is missing or the vocabularies differ.
    """
    if kind not in KINDS:
        raise ValueError(f"the loss {kind!r} is not one of {', '.join(KINDS)}")
    if targets is None if kind == "ce" else teacher is None:
        raise ValueError(f"the loss {kind!r} needs {'targets' if kind == 'ce' else 'a teacher'}")
    if temperature <= 0 or (kind == "ce" and temperature != 1):
        raise ValueError(f"the temperature must be above 0, and 1 without a teacher (ce); got {temperature}")
    held = torch.promote_types(x.dtype, torch.float32)
    counts = learned.flatten()
    if kind == "ce":
        wanted = targets.flatten()
        finish = lambda logits, part, gradient: cross_entropy_(logits, wanted[part], counts[part], gradient)
        return in_slices(x, weight, learned, finish, held, size)

    dtype, (first, second) = product_dtype(x), teacher
    kept = kind == "topk" and not second.is_floating_point()  # logits and places, not features and a head
    if not kept and len(second) != len(weight):
        raise ValueError(f"the teacher's head has {len(second)} rows, the student's {len(weight)}: not one vocabulary")
    if kind == "topk" and not kept and not k:
        raise ValueError("the loss 'topk' of a teacher that is given by its head needs k")
    first, places = first.flatten(0, -2), second.flatten(0, -2) if kept else None
    head = None if kept else second.to(dtype)

    def finish(logits, part, gradient):
        if kept:
            t, where = first[part].to(held), places[part].long()
        else:
            t, where = (first[part].to(dtype) @ head.t()).to(held), None
            if kind == "topk":
                t, where = t.topk(min(k, len(head)))
        s = logits if where is None else logits.gather(1, where)
        losses, d = (_reverse if kind == "reverse" else _forward)(s.div_(temperature), t.div_(temperature), gradient)
        if gradient:
            d.mul_(counts[part, None]).div_(temperature)
            if where is not None:
                logits.zero_().scatter_(1, where, d)
        return losses

    return in_slices(x, weight, learned, finish, held, size)


def _forward(s, t, gradient):
    """KL(t || s) of logits (t, vocab), both overwritten; returns the losses and, in s, their gradient."""
    s.sub_(s.logsumexp(-1, keepdim=True))  # log q
    t.sub_(t.logsumexp(-1, keepdim=True))  # log p
    p = t.exp()
    losses = torch.linalg.vecdot(p, t.sub_(s))
    return losses, s.exp_().sub_(p) if gradient else None


def _reverse(s, t, gradient):
    """KL(s || t), as `_forward`."""
    s.sub_(s.logsumexp(-1, keepdim=True))
    t.sub_(t.logsumexp(-1, keepdim=True)).neg_().add_(s)  # log q - log p
    q = s.exp_()
    losses = torch.linalg.vecdot(q, t)
    return losses, q.mul_(t.sub_(losses[:, None])) if gradient else None


@torch.no_grad()
def top_logits(x, weight, k, size=None):
    """The k largest logits of each token, largest first, and their places, for features x (b, l, d) and head (vocab,
    d): float32 and int64, both (b, l, k), in slices of `size` logits. k may not exceed the vocabulary."""
    if not 1 <= k <= len(weight):
        raise ValueError(f"k must be at least 1 and at most the vocabulary of {len(weight)}; got {k}")
    dtype, flat = product_dtype(x), x.flatten(0, -2)
    step = max(1, (size or SLICE // 4) // len(weight))
    head, found = weight.to(dtype), []
    for part in flat.split(step):
        found.append((part.to(dtype) @ head.t()).float().topk(k))
    return tuple(torch.cat(parts).view(*x.shape[:-1], k) for parts in zip(*found))
