"""The scan and the convolution for training on a CPU: same functions as in mamba2.py, backward written out.

Two numbers first. At the laptop shape (8 rows of 256 tokens, 4 heads of 64, 2 groups, state 64, chunk 32) the scan's
matmuls are 0.55 GFLOP forward and backward together: a few milliseconds on two cores. But a core moves only some 10 GB
a second, so a single pass over a (b, l, i) tensor costs as much as the largest matmul. What the plain form pays for is
passes: autograd stores and revisits every intermediate, and each elementwise operation is a pass of its own.

The plan, therefore, is to make as few passes as possible:

- heads before chunks, (b, h, c, q, .), so that the only copies are one on the way in and one on the way out;
- decays multiply B and C (n columns) instead of x (p columns); D sits on the diagonal of M, so the skip costs nothing;
- one exponential serves three gradients: L is an exponential, so dM * M summed over rows and columns gives the
  gradients of the log-decays and of dt;
- everything without a channel axis (decays, masks) is small, and stays with plain autograd in `_decays`;
- the convolution works on 128 tokens at a time, so that its four taps meet data still in the cache.

Nothing here is needed to understand the model: `ssd_chunked` and `causal_conv1d` in mamba2.py say the same, and the
tests hold the two together. Neither function supports a second derivative.
"""

import math

import torch
import torch.nn.functional as F

from mamba2 import in_segments, log_decays

SLAB = 128  # tokens the convolution takes at a time


def ssd(x, dt, A, B, C, D, initial_state=None, seq_idx=None, chunk_size=128):
    """Arguments and results as in `mamba2.ssd_chunked`."""
    return in_segments(_segment, x, dt, A, B, C, D, initial_state, seq_idx, chunk_size)


def _segment(x, dt, A, B, C, D, initial_state, seq_idx, q):
    b, l, h, p = x.shape
    q = min(q, l)
    pad = -l % q
    if pad:
        x, dt, B, C = (F.pad(t, (0, 0) * (t.dim() - 2) + (0, pad)) for t in (x, dt, B, C))
        if seq_idx is not None:
            seq_idx = torch.cat([seq_idx, seq_idx[:, -1:].expand(b, pad)], dim=1)
    wide = torch.promote_types(x.dtype, torch.float32)
    dt = dt.to(wide).view(b, -1, q, h).permute(0, 3, 1, 2).contiguous()  # (b, h, c, q)
    S0 = None if initial_state is None else initial_state.to(wide).contiguous()
    y, S = _Scan.apply(x, B, C, D.to(wide), S0, dt, *_decays(dt, A, seq_idx))
    return y[:, :l], S


def _decays(dt, A, seq_idx):
    """All that has no channel axis: log-decays a, to_end and since (b, h, c, q), visible (q, q), between (c+1, c+1)."""
    (b, _, c, q), device = dt.shape, dt.device
    a, between = log_decays(dt, A)  # (b, h, c, q), (b, h, c+1, c+1)
    to_end, since = dt * (a[..., -1:] - a).exp(), a.exp()
    visible = torch.ones(q, q, dtype=torch.bool, device=device).tril()
    carry = torch.ones(c + 1, c + 1, dtype=torch.bool, device=device).tril()
    if seq_idx is not None:
        ids = seq_idx.view(b, 1, c, q)
        last = torch.cat([ids[:, :, :1, 0], ids[..., -1]], dim=2)  # (b, 1, c+1): the document each state belongs to
        visible = visible & (ids[..., :, None] == ids[..., None, :])
        carry = carry & (last[..., :, None] == last[..., None, :])
        to_end = to_end * (ids == ids[..., -1:])
        since = since * (ids == last[..., :-1, None])
    return a, visible, to_end, since, between.masked_fill(~carry, -math.inf).exp()


class _Scan(torch.autograd.Function):
    """y and the final state of one segment, in chunks.

    x (b, l, h, p), B and C (b, l, g, n), D (h,), S0 (b, h, p, n) or None; dt, a, to_end, since (b, h, c, q);
    visible (q, q) or (b, 1, c, q, q); between (b, h, c+1, c+1), column 0 for the initial state.
    """

    @staticmethod
    def forward(ctx, x, B, C, D, S0, dt, a, visible, to_end, since, between):
        ctx.set_materialize_grads(False)
        (b, l, h, p), (g, n), (c, q) = x.shape, B.shape[2:], a.shape[2:]
        heads, dtype = (b, g, h // g, c, q), x.dtype
        X = x.transpose(1, 2).contiguous().view(-1, q, p)  # (b h c, q, p)
        B, C = (t.transpose(1, 2).contiguous().view(b, g, 1, c, q, n) for t in (B, C))
        CB = C @ B.mT  # (b, g, 1, c, q, q)
        L = (a[..., :, None] - a[..., None, :]).masked_fill_(~visible, -math.inf).exp_()
        L = L.mul_(dt[..., None, :]).view(*heads, q)  # exp(a_i - a_j) dt_j: what token j counts for token i
        M = (CB * L).to(dtype).view(b, h, c, q, q)
        M.diagonal(dim1=-2, dim2=-1).add_(D.view(-1, 1, 1))  # the skip: y = M x
        M = M.view(-1, q, q)
        Bw = (B * to_end.view(*heads, 1).to(dtype)).view(-1, q, n)
        Cw = (C * since.view(*heads, 1).to(dtype)).view(-1, q, n)
        added = torch.bmm(X.mT, Bw).view(b, h, c, p * n).to(a.dtype)  # what each chunk adds to the state
        S = between[..., :-1, 1:] @ added  # the state before each chunk
        final = between[..., -1:, 1:] @ added
        if S0 is not None:
            S0 = S0.view(b, h, 1, p * n)
            S, final = S.addcmul_(between[..., :-1, :1], S0), final.addcmul_(between[..., -1:, :1], S0)
        S = S.to(dtype).view(-1, p, n)
        y = torch.bmm(M, X).baddbmm_(Cw, S.mT)
        ctx.save_for_backward(X, B, C, CB, L, M, Bw, Cw, added, S, S0, dt, to_end, since, between)
        return y.view(b, h, l, p).transpose(1, 2).contiguous(), final.view(b, h, p, n)

    @staticmethod
    def backward(ctx, dy, dfinal):
        X, B, C, CB, L, M, Bw, Cw, added, S, S0, dt, to_end, since, between = ctx.saved_tensors
        b, h, c, q = to_end.shape
        g, p, n, dtype, wide = B.shape[1], X.shape[2], B.shape[-1], X.dtype, L.dtype
        heads = (b, g, h // g, c, q)
        dy = X.new_zeros(b, c * q, h, p) if dy is None else dy
        dY = dy.transpose(1, 2).contiguous().view(-1, q, p)
        # the past: y += Cw S^T, S = between added, added = X^T Bw
        dS = torch.bmm(dY.mT, Cw).view(b, h, c, p * n).to(wide)
        dadded = between[..., :-1, 1:].mT @ dS
        dbetween = torch.zeros_like(between)
        dbetween[..., :-1, 1:] = dS @ added.mT
        if dfinal is not None:
            dfinal = dfinal.reshape(b, h, 1, p * n)
            dadded.addcmul_(between[..., -1:, 1:].mT, dfinal)
            dbetween[..., -1:, 1:] = dfinal @ added.mT
        dS0 = None
        if S0 is not None:
            dS0 = between[..., :-1, :1].mT @ dS
            dbetween[..., :-1, :1] = dS @ S0.mT
            if dfinal is not None:
                dS0 = dS0 + between[..., -1:, :1] * dfinal
                dbetween[..., -1:, :1] = dfinal @ S0.mT
            dS0 = dS0.view(b, h, p, n)
        dadded = dadded.to(dtype).view(-1, p, n)
        dBw, dCw = torch.bmm(X, dadded).view(*heads, n), torch.bmm(dY, S).view(*heads, n)
        # the chunk itself: y += M x
        dX = torch.bmm(M.mT, dY).baddbmm_(Bw, dadded.mT)
        dM = torch.bmm(dY, X.mT).view(*heads, q)
        dD = dM.diagonal(dim1=-2, dim2=-1).sum((0, 3, 4), dtype=wide).view(h)
        dM = dM.mul_(L) if dtype == wide else dM * L
        dCB = dM.sum(2, keepdim=True).to(dtype)
        G = dM.mul_(CB).view(b, h, c, q, q)
        rows, columns = G.sum(-1), G.sum(-2)  # columns / dt below: where dt is 0 (padding) its column is 0, too
        # B and C: through the scores, and with their decays through the states
        dto_end, dsince = ((d * t).sum(-1, dtype=wide).view(b, h, c, q) for d, t in ((dBw, B), (dCw, C)))
        dB = dBw.mul_(to_end.view(*heads, 1)).sum(2, keepdim=True) + dCB.mT @ C
        dC = dCw.mul_(since.view(*heads, 1)).sum(2, keepdim=True) + dCB @ B
        dx, dB, dC = (t.view(b, k, c * q, -1).transpose(1, 2) for t, k in ((dX, h), (dB, g), (dC, g)))
        return dx, dB, dC, dD, dS0, columns / dt.clamp_min(1e-38), rows - columns, None, dto_end, dsince, dbetween


def causal_conv1d(x, weight, bias, window=None, seq_idx=None):
    """Arguments and results as in `mamba2.causal_conv1d`."""
    (b, l, channels), k = x.shape, weight.shape[-1]
    window = x.new_zeros(b, k - 1, channels) if window is None else window.to(x.dtype)
    tail = torch.cat([window, x[:, max(l - k + 1, 0) :]], dim=1)
    new_window = tail[:, tail.shape[1] - (k - 1) :]
    same = None
    if seq_idx is not None:
        ids = torch.cat([seq_idx[:, :1].expand(b, k - 1), seq_idx], dim=1)
        if k > 1:
            same = torch.stack([ids[:, k - 1 - back : k - 1 - back + l] == seq_idx for back in range(1, k)])
            same = same.unsqueeze(-1).to(x.dtype)
        new_window = new_window * (ids[:, l:] == ids[:, -1:]).unsqueeze(-1)
    weight = weight[:, 0].t().contiguous().to(x.dtype)
    return _ConvSiLU.apply(x, window, weight, None if bias is None else bias.to(x.dtype), same), new_window


class _ConvSiLU(torch.autograd.Function):
    """x (b, l, channels), window (b, k-1, channels), weight (k, channels), bias (channels,) or None; same
    (k-1, b, l, 1) or None: same[back - 1] is 1 where the value `back` positions ago is of this document."""

    @staticmethod
    def slabs(x):
        b, l = x.shape[:2]
        return [(slice(i, i + 1), s, min(s + SLAB, l)) for i in range(b) for s in range(0, l, SLAB)]

    @staticmethod
    def forward(ctx, x, window, weight, bias, same):
        k = weight.shape[0]
        pre, y = x.new_empty(x.shape), x.new_empty(x.shape)
        for i, s, e in _ConvSiLU.slabs(x):
            past = torch.cat([window[i], x[i, s:e]], dim=1) if s == 0 else x[i, s - k + 1 : e]  # (1, k-1+e-s, channels)
            out = torch.mul(past[:, k - 1 :], weight[k - 1], out=pre[i, s:e])
            if bias is not None:
                out += bias
            for back in range(1, k):
                w = weight[k - 1 - back]
                out.addcmul_(past[:, k - 1 - back : -back], w if same is None else w * same[back - 1, i, s:e])
            y[i, s:e] = F.silu(out)
        ctx.save_for_backward(x, window, weight, bias, same, pre)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, window, weight, bias, same, pre = ctx.saved_tensors
        k, wide = weight.shape[0], torch.promote_types(x.dtype, torch.float32)
        dx, dwindow = x.new_empty(x.shape), torch.zeros_like(window)
        dweight, dbias = torch.zeros_like(weight, dtype=wide), torch.zeros_like(weight[0], dtype=wide)
        for i, s, e in _ConvSiLU.slabs(x):
            past = torch.cat([window[i], x[i, s:e]], dim=1) if s == 0 else x[i, s - k + 1 : e]
            d = torch.ops.aten.silu_backward(dy[i, s:e], pre[i, s:e])
            dpast = x.new_zeros(past.shape)
            for back in range(k):
                tap = slice(k - 1 - back, past.shape[1] - back)
                part = d if same is None or not back else d * same[back - 1, i, s:e]
                dpast[:, tap].addcmul_(part, weight[k - 1 - back])
                dweight[k - 1 - back] += (part * past[:, tap]).sum((0, 1), dtype=wide)
            dbias += d.sum((0, 1), dtype=wide)
            dx[i, s:e] = dpast[:, k - 1 :]
            (dwindow[i] if s == 0 else dx[i, s - k + 1 : s]).add_(dpast[:, : k - 1])
        return dx, dwindow, dweight.to(weight.dtype), None if bias is None else dbias.to(bias.dtype), None
