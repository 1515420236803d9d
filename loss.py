"""The loss of the next token, without all logits at once.

Two numbers: 16,384 tokens against a vocabulary of 32,768 are 537 M logits. In float32 that is 2.1 GB, and the plain way
(head, cross-entropy, autograd) holds three or four tensors of that size at the very moment when all activations of the
model are still waiting for the backward: the peak of the whole step. The head's weight and the features are 0.15 GB.

The gradient of a token's loss is short, softmax(logits) minus one at the target, and it needs nothing from later. So a
slice of tokens can be finished on the spot: logits, loss, gradient, and what that means for the features and the
weight; then the slice's memory is free for the next. The work is the same. What must be known beforehand is which
tokens count, because the weight's gradient is summed over them; a common factor may come later.

`plain_loss` is the definition; `sliced_loss` is the same function, and `next_token_loss` chooses. `in_slices` is the
frame, for any loss of a token's logits (distill_loss.py has others). Source of the idea:
Liger Kernel's fused linear cross-entropy (Hsu et al. 2024, arXiv 2410.10989).
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

SLICE = 2**28  # bytes of logits at a time


def next_token_loss(x, weight, targets, learned, impl="torch"):
    """Features x (b, l, d), the head's weight (vocab, d), targets (b, l) int64, learned (b, l) bool: what counts.

    impl "torch" or "triton" (device.choose_impl says which can be had): who turns a slice's logits into their gradient.
    Returns the sum of the losses that count, in nats, and the loss of every token (b, l) without a gradient.
    """
    large = 4 * targets.numel() * weight.shape[0] > SLICE  # the plain form's logits are float32
    # float16 needs the loss scaled before the gradient is rounded, and here the factor comes after
    if x.is_cuda and (large or impl == "triton") and product_dtype(x) != torch.float16:
        return sliced_loss(x, weight, targets, learned, impl)
    return plain_loss(x, weight, targets, learned)


def plain_loss(x, weight, targets, learned):
    logits = F.linear(x, weight).float()
    nll = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view_as(targets)
    return (nll * learned).sum(), nll.detach()


def sliced_loss(x, weight, targets, learned, impl="torch", size=None):
    """As `next_token_loss`; `size`: logits at a time, by default as many as fit into SLICE bytes."""
    if impl == "triton":
        from kernels.cross_entropy import cross_entropy_ as finish_

        held = product_dtype(x)  # it reads and writes the products' own dtype: twice as many logits to a slice
    else:
        finish_, held = cross_entropy_, torch.promote_types(x.dtype, torch.float32)
    targets, learned = targets.flatten(), learned.flatten()
    finish = lambda logits, part, gradient: finish_(logits, targets[part], learned[part], gradient)
    return in_slices(x, weight, learned, finish, held, size)


def in_slices(x, weight, learned, finish, held, size=None):
    """The frame of every loss that is a sum over tokens, each a function of the token's logits alone.

    x (..., d), weight (vocab, d), learned bool, one for each token. finish(logits, part, gradient): `logits` (t, vocab)
    in dtype `held` are those of the tokens that the slice object `part` names, counted over all axes but the last;
    returns the losses (t,), and if `gradient`, leaves in `logits` the gradient of their sum over the learned tokens.
    Returns that sum, and the loss of every token, in x's shape without d and without a gradient.
    """
    flat = x.flatten(0, -2)
    size = size or SLICE // held.itemsize
    total, losses = _Slices.apply(flat, weight, learned.flatten(), finish, product_dtype(x), held, size)
    return total, losses.view(x.shape[:-1])


def product_dtype(x):
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def cross_entropy_(logits, targets, learned, gradient=True):
    """What kernels/cross_entropy.py does, for logits in float32 or wider: returns nll (t,), and with `gradient` the
    logits (t, vocab) become (softmax - onehot(target)) * learned."""
    total, target = logits.logsumexp(-1, keepdim=True), targets[:, None]
    nll = total - logits.gather(1, target)
    if gradient:
        logits.sub_(total).exp_().scatter_add_(1, target, torch.full_like(total, -1.0)).mul_(learned[:, None])
    return nll.squeeze(1)


class _Slices(torch.autograd.Function):
    """x (t, d), weight (vocab, d), learned (t,). The products are made in `dtype`, sums in float32."""

    @staticmethod
    def forward(ctx, x, weight, learned, finish, dtype, held, size):
        wide = torch.promote_types(x.dtype, torch.float32)
        losses = x.new_empty(len(x), dtype=wide)
        gradients = any(ctx.needs_input_grad)
        dx = torch.empty_like(x) if gradients else None
        dweight = torch.zeros_like(weight, dtype=wide) if gradients else None
        with torch.autocast(x.device.type, enabled=False):
            head = weight.to(dtype)
            step = max(1, size // len(weight))
            for start in range(0, len(x), step):
                part = slice(start, start + step)
                features = x[part].to(dtype)
                logits = (features @ head.t()).to(held)
                losses[part] = finish(logits, part, gradients)
                if gradients:
                    d = logits.to(dtype)
                    dx[part] = d @ head
                    _add_product(dweight, d.t(), features)
                    del logits, d  # before the next slice is made
        if gradients:
            ctx.save_for_backward(dx, dweight)
            ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return (losses * learned).sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal, _):
        dx, dweight = ctx.saved_tensors
        return dx * dtotal.to(dx.dtype), (dweight * dtotal).to(ctx.weight_dtype), None, None, None, None, None


def _add_product(total, a, b):
    """total += a @ b. On a GPU 16-bit matrices are multiplied onto the float32 total: no rounding, no second pass."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b
