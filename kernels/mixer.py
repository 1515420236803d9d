"""What stands between a Mamba-2 layer's two projections, as one function: convolution, scan, gated norm.

Apart, these are three functions whose gradients autograd would have to put side by side again: z, x|B|C and dt are
slices of in_proj's one output, and its gradient is one tensor, too. At 8192 tokens of the 9B in bfloat16 that
concatenation alone reads and writes 742 MB (the convolution's own floor, forward and backward, is 1007). Here each
backward kernel writes into its slice of the one tensor.

This file starts no kernel of its own: it says in which order the others run, forward and backward.
"""

import torch
from torch.autograd.function import once_differentiable

from kernels import conv1d, decode, norm, ssd, ssd_backward


def forward(mixer, u, state=None, seq_idx=None):
    """`Mamba2Mixer.forward`, with Triton between the projections: u (b, l, d) -> (b, l, d)."""
    zxbcdt = mixer.in_proj(u)
    if state is not None and u.shape[1] == 1:
        with torch.no_grad():
            y = decode.mixer_step(
                zxbcdt[:, 0], state.window, state.ssm, mixer.conv1d.weight, mixer.conv1d.bias, mixer.dt_bias,
                mixer.A_log, mixer.D, mixer.norm.weight, mixer.g, mixer.norm.eps, mixer.time_step_limit,
            )  # fmt: skip
        return mixer.out_proj(y[:, None])
    return mixer.out_proj(_between(mixer, zxbcdt, state, seq_idx))


@torch.compiler.disable
def _between(mixer, zxbcdt, state, seq_idx):
    window, ssm = (None, None) if state is None else (state.window, state.ssm)
    seq_idx = None if seq_idx is None else seq_idx.contiguous()
    y, final = _Between.apply(
        zxbcdt, mixer.conv1d.weight, mixer.conv1d.bias, mixer.dt_bias, mixer.A_log, mixer.D, mixer.norm.weight, window,
        ssm, seq_idx, (mixer.h, mixer.p, mixer.g), mixer.norm.eps, mixer.time_step_limit,
    )  # fmt: skip
    if state is not None:
        xBC = zxbcdt[..., mixer.inner : mixer.inner + mixer.conv_channels]
        state.window.copy_(conv1d.last_inputs(xBC, window, seq_idx, mixer.conv1d.weight.shape[-1]))
        state.ssm.copy_(final)
    return y


def _slices(zxbcdt, h, p):
    """z, xBC and dt, in in_proj's order."""
    return zxbcdt.split([h * p, zxbcdt.shape[-1] - h * p - h, h], dim=-1)


def _heads(xBC, h, p, g):
    """x (b, l, h, p), B and C (b, l, g, n)."""
    width = (xBC.shape[-1] - h * p) // 2
    x, B, C = xBC.split([h * p, width, width], dim=-1)
    return x.unflatten(-1, (h, p)), B.unflatten(-1, (g, -1)), C.unflatten(-1, (g, -1))


class _Between(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, window, ssm, seq_idx, sizes, eps, limit
    ):
        h, p, g = sizes
        z, xBC, dt = _slices(zxbcdt, h, p)
        convolved = conv1d.forward(xBC, conv_weight, conv_bias, window, seq_idx)
        x, B, C = _heads(convolved, h, p, g)
        A = -torch.exp(A_log.float())
        y, final, scan = ssd.scan_forward(x, dt, A, B, C, D, ssm, seq_idx, dt_bias, limit)
        out, _, rstd = norm.forward("gate", y.flatten(-2), z, norm_weight, g, eps)
        ctx.save_for_backward(zxbcdt, conv_weight, conv_bias, norm_weight, window, seq_idx, y, rstd, A, A_log, *scan)
        ctx.sizes, ctx.limit = sizes, limit
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dfinal):
        zxbcdt, conv_weight, conv_bias, norm_weight, window, seq_idx, y, rstd, A, A_log, *scan = ctx.saved_tensors
        h, p, g = ctx.sizes
        dzxbcdt, dconvolved = torch.empty_like(zxbcdt), zxbcdt.new_empty(*zxbcdt.shape[:2], conv_weight.shape[0])
        (z, xBC, _), (dz, dxBC, ddt) = _slices(zxbcdt, h, p), _slices(dzxbcdt, h, p)
        dout = torch.zeros_like(z) if dout is None else dout
        dy, dnorm = norm.backward(dout, None, y.flatten(-2), z, norm_weight, rstd, g, dz)
        dx, dB, dC = _heads(dconvolved, h, p, g)
        dA, dD, dssm, dbias = ssd_backward.scan_backward(scan, ctx.limit, dy.view_as(y), dfinal, dx, ddt, dB, dC)
        _, dwindow, sums = conv1d.backward(dconvolved, xBC, conv_weight, conv_bias, window, seq_idx, dxBC)
        dweight = sums[:-1].t().unsqueeze(1).to(conv_weight.dtype)
        dconv_bias = None if conv_bias is None else sums[-1].to(conv_bias.dtype)
        dssm = None if scan[6] is None else dssm
        dA_log = (dA * A).to(A_log.dtype)
        return dzxbcdt, dweight, dconv_bias, dbias, dA_log, dD, dnorm, dwindow, dssm, None, None, None, None
