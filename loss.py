"""The loss of the next token, without all logits at once.

Two numbers: 16,384 tokens against a vocabulary of 32,768 are 537 M logits. In float32 that is 2.1 GB, and the plain way
(head, cross-entropy, autograd) holds three or four tensors of that size at the very moment when all activations of the
model are still waiting for the backward: the peak of the whole step. The head's weight and the features are 0.15 GB.

The gradient of a token's loss is short, softmax(logits) minus one at the target, and it needs nothing from later. So a
slice of tokens can be finished on the spot: logits, loss, gradient, and what that means for the features and the
weight; then the slice's memory is free for the next. The work is the same. What must be known beforehand is which
tokens count, because the weight's gradient is summed over them; a common factor may come later.

`plain_loss` is the definition; `sliced_loss` is the same function, and `next_token_loss` chooses. Source of the idea:
Liger Kernel's fused linear cross-entropy (Hsu et al. 2024, arXiv 2410.10989).
"""

import torch
import torch.nn.functional as F

SLICE = 2**26  # logits at a time: 256 MB in float32


def next_token_loss(x, weight, targets, learned):
    """Features x (b, l, d), the head's weight (vocab, d), targets (b, l) int64, learned (b, l) bool: what counts.

    Returns the sum of the losses that count, in nats, and the loss of every token (b, l) without a gradient.
    """
    large = targets.numel() * weight.shape[0] > SLICE
    # float16 needs the loss scaled before the gradient is rounded, and here the factor comes after
    if x.is_cuda and large and torch.get_autocast_dtype("cuda") != torch.float16:
        return sliced_loss(x, weight, targets, learned)
    return plain_loss(x, weight, targets, learned)


def plain_loss(x, weight, targets, learned):
    logits = F.linear(x, weight).float()
    nll = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view_as(targets)
    return (nll * learned).sum(), nll.detach()


def sliced_loss(x, weight, targets, learned, size=SLICE):
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    total, nll = _Slices.apply(x.flatten(0, -2), weight, targets.flatten(), learned.flatten(), dtype, size)
    return total, nll.view_as(targets)


class _Slices(torch.autograd.Function):
    """x (t, d), weight (vocab, d), targets and learned (t,). The products are made in `dtype`, sums in float32."""

    @staticmethod
    def forward(ctx, x, weight, targets, learned, dtype, size):
        wide = torch.promote_types(x.dtype, torch.float32)
        nll = x.new_empty(len(x), dtype=wide)
        gradients = any(ctx.needs_input_grad)
        dx = torch.empty_like(x) if gradients else None
        dweight = torch.zeros_like(weight, dtype=wide) if gradients else None
        with torch.autocast(x.device.type, enabled=False):
            head = weight.to(dtype)
            for rows in torch.arange(len(x), device="cpu").split(max(1, size // len(weight))):
                part = slice(int(rows[0]), int(rows[-1]) + 1)
                features, target = x[part].to(dtype), targets[part, None]
                logits = (features @ head.t()).to(wide)
                total = logits.logsumexp(-1, keepdim=True)
                nll[part] = (total - logits.gather(1, target)).squeeze(1)
                if gradients:
                    d = logits.sub_(total).exp_()  # softmax
                    d.scatter_add_(1, target, torch.full_like(total, -1.0))
                    d = d.mul_(learned[part, None]).to(dtype)
                    dx[part] = d @ head
                    dweight += d.t() @ features
        if gradients:
            ctx.save_for_backward(dx, dweight)
            ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(nll)
        return (nll * learned).sum(), nll

    @staticmethod
    def backward(ctx, dtotal, _):
        dx, dweight = ctx.saved_tensors
        return dx * dtotal.to(dx.dtype), (dweight * dtotal).to(ctx.weight_dtype), None, None, None, None
