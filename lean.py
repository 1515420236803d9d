"""An optimizer for a model that fills the memory: two bytes a parameter, and next to nothing besides.

What does not fit. Distilling the 12B into the 9B on one GPU of 80 GB (79.6 GiB) begins with 22.9 GiB for the teacher in
bfloat16. For the student, 8.888 B parameters, the usual AdamW takes 16 bytes a parameter in float32: 132.4 GiB. Even in
bfloat16, weights and gradient are 16.6 GiB each, which leaves 23.5 GiB for moments and activations, and two float32
moments are 66.2. So three things go:

    the gradient       a tensor's update is made the moment its gradient is complete, inside the backward, and the
                       gradient is freed at once: what exists at a time is one tensor's, at most 1.1 GiB (the head's)
    the second moment  is kept as its means over the rows and over the columns of a matrix, whose product over the
                       overall mean stands for it: n + m numbers for n * m weights, 14 MiB for all of the 9B
    the first moment   is left out: there is no momentum

What stays: 22.9 + 16.6 + 1.1 GiB, and 39 GiB for activations, the loss's slices and the pieces in which an update is
computed. With layers computed again these take 11.6 GiB for a step of 8,192 tokens by the formula (`needed_bytes` in
pair.py), 52.2 in all (measured 49.5, see RESULTS.md); for one of 32,768 tokens 67.8 in all. (Moments of eight bits
would fit too, 16.8 GiB with scales. But averages that move by a twentieth a step are lost between eight-bit numbers
that are a sixteenth apart, unless they are rounded at random as well: more code, and one more thing to doubt.)

What it costs. Without momentum a step follows one batch's gradient, noise and all, so the rate must be lower than
AdamW's; without a whole gradient its norm is not known before it is used, so it cannot be clipped. In its place an
update, whose elements have a root mean square near 1, is scaled down where that is above 1 (Shazeer and Stern 2018).
One backward is one step: gradients of several cannot be added up first.

Rounding. A weight of 1 in bfloat16 has its neighbour at 1.0078: an update of 0.0001, rounded to nearest, changes
nothing, now or in a thousand steps. So the new weight is rounded up or down *at random*, to each neighbour with the
probability that makes the mean right. In bits: bfloat16 is the upper half of a float32, so add a random number to the
lower half and cut it off; the carry is the decision. Float32 weights (A_log, D, dt_bias) are simply updated.

Measured against AdamW in tests/test_distill.py. Source: the factored second moment and the scaled update are
Adafactor's (arXiv 1804.04235); the averaging with its correction is Adam's. This file must not know models.
"""

import torch

PIECE = 2**26  # elements of an update that exist in float32 at a time: 256 MiB for each of a handful of tensors
TINY = 1e-30  # under the root: an element that never had a gradient stays where it is


class Lean(torch.optim.Optimizer):
    """Usable as any optimizer with `step()`, or inside the backward after `in_backward()`.

    params: parameters or groups, in bfloat16 or float32. beta: of the second moment's average. weight_decay: as in
    AdamW, a share of lr. squares: the sum of the gradients' squares since it was last set to 0, a float32 scalar.
    """

    def __init__(self, params, lr, beta=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, beta=beta, weight_decay=weight_decay))
        for group in self.param_groups:
            for p in group["params"]:
                if p.dtype not in (torch.bfloat16, torch.float32):
                    raise ValueError(f"weights must be bfloat16 or float32; got {p.dtype} of shape {tuple(p.shape)}")
        self.squares = torch.zeros((), device=self.param_groups[0]["params"][0].device)

    def in_backward(self):
        """From now on a backward updates every weight and leaves no gradient; `step` is not needed any more."""
        for group in self.param_groups:
            for p in group["params"]:

                def update(p, group=group):
                    self._update(p, group)
                    p.grad = None

                p.register_post_accumulate_grad_hook(update)
        return self

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    @torch.no_grad()
    def _update(self, p, group):
        weight, grad, state, beta = _matrix(p), _matrix(p.grad), self.state[p], group["beta"]
        if not state:
            state["step"] = torch.zeros(())
            state["rows"] = torch.zeros(len(weight), device=p.device)
            state["columns"] = torch.zeros(weight.shape[1], device=p.device)
        state["step"] += 1
        size = max(1, PIECE // weight.shape[1])
        pieces = [slice(start, start + size) for start in range(0, len(weight), size)]

        rows, columns = torch.empty_like(state["rows"]), torch.zeros_like(state["columns"])  # of the squared gradient
        for piece in pieces:
            square = grad[piece].float().square()
            rows[piece] = square.mean(1)
            columns += square.sum(0)
        self.squares += columns.sum()
        state["rows"].lerp_(rows + TINY, 1 - beta)
        state["columns"].lerp_(columns / len(weight) + TINY, 1 - beta)

        # an element's second moment is rows * columns / mean(rows): one over its root, in two factors
        correction = 1 - beta ** state["step"].item()  # averages begin at zero
        down = (state["rows"] / state["rows"].mean()).rsqrt()
        across = (state["columns"] / correction).rsqrt()
        # the mean square of the update, without making it: sum over rows of down^2 times (gradient^2 @ across^2)
        total = sum((down[piece].square() * (grad[piece].float().square() @ across.square())).sum() for piece in pieces)
        scale = group["lr"] / (total / weight.numel()).sqrt().clamp_min(1.0)
        for piece in pieces:
            change = (grad[piece].float() * across).mul_((down[piece] * scale)[:, None])
            new = (weight[piece].float() * (1 - group["lr"] * group["weight_decay"])).sub_(change)
            weight[piece] = new if p.dtype == torch.float32 else round_at_random(new)


def _matrix(t):
    """A view of two axes: rows of a matrix, taps of a channel, or a single column for a vector."""
    return t.view(len(t), -1)


def round_at_random(x):
    """Float32 to bfloat16, to either neighbour, so that the mean is x. `x` is overwritten."""
    bits = x.view(torch.int32)
    bits += torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device)
    return bits.bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)


def state_bytes(shapes):
    """Bytes that the state of tensors of these shapes takes: rows + columns of each, in float32."""
    return sum(4 * (shape[0] + shape.numel() // shape[0]) for shape in shapes)
