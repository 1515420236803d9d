"""The Mamba-2 layer: one recurrence, written three ways, and the small parts around it.

Everything in this project that is "Mamba" is in this file. It knows nothing of the rest of the model: no attention, no
stack, no text. Read it top to bottom; notebook 01_ssd walks the same road with pictures.

Glossary. These letters name tensor axes here, in the tests, in the kernels and in the notebooks:

    b  batch row            l  position in the row (time)        d  hidden size of the residual stream
    h  Mamba head           p  channel inside a head             i  inner width, h * p
    g  B/C group            r  heads per group, h / g            n  state size: numbers remembered per channel
    c  chunk index          q  position inside a chunk           k  convolution tap

and these name the tensors of one layer (the paper's letters; Dao & Gu 2024, arXiv 2405.21060):

    x   (b, l, h, p)  what is written into the state             S  (b, h, p, n)  the state, always float32 or wider
    B   (b, l, g, n)  where it is written ("the key")            C  (b, l, g, n)  where it is read ("the query")
    dt  (b, l, h)     step size > 0: how much this token counts  A  (h,) < 0      how fast head h forgets
    z   (b, l, i)     gate on the output                         D  (h,)          skip weight from x to y

The layer is one sentence: every head keeps a p-by-n table S; each token first fades the table by exp(dt*A), then adds
the outer product (dt*x) B^T to it, and reads y = S C + D x out of it. `ssd_recurrent` is that sentence as a loop: the
definition. `ssd_chunked` is the same function as matrix products: the default. `ssd_step` is one turn of the loop: what
decoding does. Source: report section 2.1; details and tensor layout as in the released checkpoints.

Why by hand: this is the subject. The fast library for it (mamba_ssm) is a set of CUDA/Triton kernels with the same
signature; it needs a GPU and a compiler, and it is much harder to read.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------------------
# 1. The state space model as a recurrence: the definition. Slow, exact, usable in float64.
# ---------------------------------------------------------------------------------------------------------------------


def ssd_recurrent(x, dt, A, B, C, D, initial_state=None, seq_idx=None, chunk_size=None):
    """The selective state space model as a loop over time.

    x (b, l, h, p), dt (b, l, h) after softplus, A (h,), B and C (b, l, g, n), D (h,).
    initial_state (b, h, p, n) or None for zeros; it belongs to the document of position 0.
    seq_idx (b, l) integers or None: positions with equal neighbouring values are one document; the state is emptied at
    each change. chunk_size is accepted and ignored so that all three forms share one signature.
    Returns y (b, l, h, p) in x's dtype and the final state (b, h, p, n) in float32 (float64 if x is float64).
    """
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    wide = torch.promote_types(x.dtype, torch.float32)
    x_, dt, A, B, C, D = (t.to(wide) for t in (x, dt, A, B, C, D))
    B, C = (t.repeat_interleave(h // g, dim=2) for t in (B, C))  # group j serves heads j*r .. j*r+r-1: (b, l, h, n)
    S = x_.new_zeros(b, h, p, n) if initial_state is None else initial_state.to(wide)
    ys = []
    for t in range(l):
        if seq_idx is not None and t > 0:
            S = S * (seq_idx[:, t] == seq_idx[:, t - 1]).view(b, 1, 1, 1)
        fade = torch.exp(dt[:, t] * A)[..., None, None]  # (b, h, 1, 1)
        S = S * fade + (dt[:, t, :, None] * x_[:, t])[..., None] * B[:, t, :, None, :]  # fade, write
        ys.append((S @ C[:, t, :, :, None]).squeeze(-1) + D[:, None] * x_[:, t])  # read
    y = torch.stack(ys, dim=1) if l else x_
    return y.to(x.dtype), S


def ssd_step(S, x, dt, A, B, C, D):
    """One decode step: one turn of the loop, with S (b, h, p, n) float32 updated in place.

    x (b, h, p); dt (b, h); B and C (b, g, n). Returns y (b, h, p) in x's dtype, and S.
    The state never leaves float32: a bfloat16 state would round the whole history once per token and lose every
    increment smaller than half a unit in the last place (the released model cards ask for a float32 state, too).
    """
    r, wide = x.shape[1] // B.shape[1], S.dtype
    x_, dt = x.to(wide), dt.to(wide)
    B, C = (t.to(wide).repeat_interleave(r, dim=1) for t in (B, C))  # (b, h, n)
    S.mul_(torch.exp(dt * A.to(wide))[..., None, None])
    S.addcmul_((dt[..., None] * x_)[..., None], B[..., None, :])
    y = (S @ C[..., None]).squeeze(-1) + D.to(wide)[:, None] * x_
    return y.to(x.dtype), S


# ---------------------------------------------------------------------------------------------------------------------
# 2. The same function as matrix products ("state space duality", SSD).
#
# Unroll the recurrence and y_t = sum over s <= t of  (C_t . B_s) * exp(dt_{s+1} A + ... + dt_t A) * dt_s x_s.
# That is a causal "attention" matrix M = (C B^T) o L, with the decays L in the place of the softmax: y = M x. It costs
# l^2, so cut the row into chunks of q tokens. Inside a chunk use M; between chunks only the state travels:
#
#     y_diag   = ((C B^T) o L) @ (dt x)              (q, q) @ (q, p)   tokens that see tokens of their own chunk
#     states   = B^T @ (decay to the chunk's end * dt x)   (n, q) @ (q, p)   what each chunk adds to the state
#     S_in     = decays between chunks @ states      (c, c) @ (c, n p) the recurrence again, c steps instead of l
#     y_off    = (C @ S_in) * decay since the chunk's start  (q, n) @ (n, p) what the past says
#
# All four are plain two-operand matmuls, which is the whole point: they run on tensor cores. B and C are shared by the
# r heads of a group, so products that involve only B or C are made once a group with the r heads side by side.
# ---------------------------------------------------------------------------------------------------------------------

CHUNKS_PER_SEGMENT = 64  # the (c, c) matrix of chunk-to-chunk decays grows with c^2: longer rows carry the state over


def ssd_chunked(x, dt, A, B, C, D, initial_state=None, seq_idx=None, chunk_size=128):
    """The selective state space model as chunked matrix products; arguments and results as in `ssd_recurrent`.

    chunk_size (q) only decides the blocking: the result does not depend on it in exact arithmetic. The matmuls run in
    x's dtype; decays, sums and states stay in float32 (float64 if x is float64).
    """
    return in_segments(_ssd_segment, x, dt, A, B, C, D, initial_state, seq_idx, chunk_size)


def in_segments(form, x, dt, A, B, C, D, initial_state, seq_idx, chunk_size):
    """Run `form` over the row, CHUNKS_PER_SEGMENT chunks at a time, carrying the state over."""
    l, segment = x.shape[1], chunk_size * CHUNKS_PER_SEGMENT
    if l <= segment:
        return form(x, dt, A, B, C, D, initial_state, seq_idx, chunk_size)
    ys, S = [], initial_state
    for s in range(0, l, segment):
        e = min(s + segment, l)
        ids = None
        if seq_idx is not None:
            ids = seq_idx[:, s:e]
            if s > 0:  # the carried state is void for rows that start a new document exactly here
                S = S * (seq_idx[:, s] == seq_idx[:, s - 1]).view(-1, 1, 1, 1)
        y, S = form(x[:, s:e], dt[:, s:e], A, B[:, s:e], C[:, s:e], D, S, ids, chunk_size)
        ys.append(y)
    return torch.cat(ys, dim=1), S


def log_decays(dt, A):
    """dt (b, h, c, q) -> the log-decay from the chunk's start up to and with each token, (b, h, c, q), and from the end
    of chunk j to the start of chunk i, (b, h, c+1, c+1), where column 0 stands for the initial state. The second is a
    difference of long sums: summed in float64, or a head that forgot fast early on has no digits left for later."""
    a = (dt * A.to(dt.dtype).view(-1, 1, 1)).cumsum(-1)
    total = F.pad(a[..., -1].double(), (1, 0)).cumsum(-1)  # (b, h, c+1)
    return a, (total[..., :, None] - total[..., None, :]).to(dt.dtype)


def _ssd_segment(x, dt, A, B, C, D, initial_state, seq_idx, q):
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    r, q = h // g, min(q, l)
    pad = -l % q
    if pad:  # dt = 0 makes a padded token invisible: it fades nothing and writes nothing
        x, dt, B, C = (F.pad(t, (0, 0) * (t.dim() - 2) + (0, pad)) for t in (x, dt, B, C))
        if seq_idx is not None:
            seq_idx = torch.cat([seq_idx, seq_idx[:, -1:].expand(b, pad)], dim=1)
    c = (l + pad) // q
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)

    dt = dt.to(wide).view(b, c, q, h)
    a, between = log_decays(dt.permute(0, 3, 1, 2), A)
    a = a.transpose(1, 2)  # (b, c, h, q)
    x = x.view(b, c, q, h, p)
    xdt = (x * dt[..., None]).to(dtype)  # (b, c, q, h, p)
    B, C = (t.view(b, c, q, g, n).transpose(2, 3) for t in (B, C))  # (b, c, g, q, n)

    # Which pairs may meet: causal inside the chunk and, in packed rows, of one document.
    visible = torch.ones(q, q, dtype=torch.bool, device=x.device).tril()
    if seq_idx is not None:
        ids = seq_idx.view(b, c, q)
        visible = visible & (ids[..., :, None] == ids[..., None, :]).unsqueeze(2)  # (b, c, 1, q, q)

    # y_diag: the block-diagonal part of M. -inf before the exp, because above the diagonal the difference is positive
    # and would overflow; exp(-inf) = 0 also has a clean gradient.
    L = (a[..., :, None] - a[..., None, :]).masked_fill(~visible, -math.inf).exp()  # (b, c, h, q, q)
    CB = (C @ B.transpose(-1, -2)).unsqueeze(3)  # (b, c, g, 1, q, q)
    M = (CB * L.view(b, c, g, r, q, q)).to(dtype).view(b, c, h, q, q)
    y = (M @ xdt.transpose(2, 3)).transpose(2, 3)  # (b, c, q, h, p)

    # states: what each chunk adds, seen from its last token.
    to_end = (a[..., -1:] - a).exp()  # (b, c, h, q)
    if seq_idx is not None:
        to_end = to_end * (ids == ids[..., -1:]).unsqueeze(2)
    weighted = (xdt * to_end.transpose(2, 3)[..., None]).to(dtype)
    states = B.transpose(-1, -2) @ weighted.view(b, c, q, g, r * p).transpose(2, 3)  # (b, c, g, n, r*p)

    # S_in: the recurrence over chunks as one (c+1, c+1) matrix, row j = state before chunk j, column 0 = initial state.
    carry = torch.ones(c + 1, c + 1, dtype=torch.bool, device=x.device).tril()
    if seq_idx is not None:
        last = torch.cat([ids[:, :1, 0], ids[..., -1]], dim=1)  # (b, c+1): the document each state belongs to
        carry = carry & (last[:, :, None] == last[:, None, :]).unsqueeze(1)
    between = between.masked_fill(~carry, -math.inf).exp()  # (b, h, c+1, c+1)
    S0 = (
        x.new_zeros(b, 1, h, p * n, dtype=wide)
        if initial_state is None
        else initial_state.to(wide).reshape(b, 1, h, -1)
    )
    states = states.to(wide).view(b, c, g, n, r, p).permute(0, 1, 2, 4, 5, 3).reshape(b, c, h, p * n)
    S = between @ torch.cat([S0, states], dim=1).transpose(1, 2)  # (b, h, c+1, p*n)
    final = S[:, :, -1].view(b, h, p, n)

    # y_off: read the incoming state; only tokens of the document that was running when the chunk began may.
    since = a.exp()
    if seq_idx is not None:
        since = since * (ids == last[:, :-1, None]).unsqueeze(2)
    S_in = S[:, :, :-1].to(dtype).view(b, g, r, c, p, n).permute(0, 3, 1, 5, 2, 4).reshape(b, c, g, n, r * p)
    y_off = (C @ S_in).view(b, c, g, q, h // g, p).transpose(2, 3).reshape(b, c, q, h, p)

    y = y + y_off * since.transpose(2, 3)[..., None] + x * D.to(wide)[:, None]
    return y.reshape(b, l + pad, h, p)[:, :l].to(dtype), final


# ---------------------------------------------------------------------------------------------------------------------
# 3. The causal convolution: every channel sees its own last k values, so a token knows its neighbours before the SSM.
# ---------------------------------------------------------------------------------------------------------------------


def causal_conv1d(x, weight, bias, window=None, seq_idx=None):
    """Depthwise causal convolution followed by SiLU.

    x (b, l, channels); weight (channels, 1, k), the last tap meets the current token; bias (channels,) or None.
    window (b, k-1, channels): the inputs just before x (zeros if None); it belongs to the document of position 0.
    seq_idx (b, l) or None: a tap that would reach into another document reads zero.
    Returns y (b, l, channels) in x's dtype, and the new window: the last k-1 inputs, before the convolution, with zeros
    where they are not of the last token's document.
    """
    b, l, channels = x.shape
    k = weight.shape[-1]
    if window is None:
        window = x.new_zeros(b, k - 1, channels)
    full = torch.cat([window.to(x.dtype), x], dim=1)  # (b, k-1+l, channels)
    new_window = full[:, l:]
    if l == 1:  # one sum of k rows; starting a convolution takes ten times as long
        wide = torch.promote_types(x.dtype, torch.float32)
        y = (full.to(wide) * weight[:, 0].t().to(wide)).sum(1, keepdim=True)
        y = y if bias is None else y + bias.to(wide)
        return F.silu(y.to(x.dtype)), new_window
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if seq_idx is None:
        y = F.conv1d(full.transpose(1, 2), weight, bias, groups=channels).transpose(1, 2)
    else:  # the same sum written out, because conv1d cannot stop at a document's edge
        ids = torch.cat([seq_idx[:, :1].expand(b, k - 1), seq_idx], dim=1)
        y = x * weight[:, 0, k - 1] if bias is None else torch.addcmul(bias, x, weight[:, 0, k - 1])
        for back in range(1, k):
            start = k - 1 - back
            same = (ids[:, start : start + l] == seq_idx).unsqueeze(-1).to(x.dtype)
            y = torch.addcmul(y, full[:, start : start + l] * same, weight[:, 0, start])
        new_window = new_window * (ids[:, l:] == ids[:, -1:]).unsqueeze(-1)
    return F.silu(y), new_window


# ---------------------------------------------------------------------------------------------------------------------
# 4. The output norm: gate first, then one RMS for each group of channels.
# ---------------------------------------------------------------------------------------------------------------------


class GatedGroupRMSNorm(nn.Module):
    """v = y * SiLU(z); then RMSNorm over each of `n_groups` runs of channels by itself; then a weight per channel.

    Both the order and the grouping matter: norming before gating, or over the whole width, changes logits by more than
    their own spread, and models with one group hide the second mistake. All in float32, one cast at the end.
    """

    def __init__(self, width, n_groups, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.n_groups, self.eps = n_groups, eps

    def forward(self, y, z):
        """y, z (b, l, i) -> (b, l, i) in z's dtype."""
        wide = torch.promote_types(z.dtype, torch.float32)
        v = y.to(wide) * F.silu(z.to(wide))
        v = v.unflatten(-1, (self.n_groups, -1))
        v = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + self.eps)
        return (v.flatten(-2) * self.weight).to(z.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# 5. The mixer: project, convolve, scan, gate, project back.
# ---------------------------------------------------------------------------------------------------------------------


def training_forms(x):
    """(scan, convolution) for x's device. Training on a CPU takes the twins with a written backward; everything else
    the ones above (on a GPU torch.compile fuses those). Same functions, other speed: `kernels/cpu.py` says why."""
    if x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        from kernels import cpu

        return cpu.ssd, cpu.causal_conv1d
    return ssd_chunked, causal_conv1d


class Mamba2State:
    """What one Mamba-2 layer remembers of a row: the same few numbers after ten tokens or after a million.

    window (b, k-1, channels): the last inputs of the convolution, in the model's dtype.
    ssm (b, h, p, n): the state, float32; another dtype only if it was asked for.
    """

    def __init__(self, window, ssm):
        self.window, self.ssm = window, ssm

    def put(self, row, other, other_row, skip):
        """Become, in one row, a row of another state. It is a whole's: there are no positions to skip."""
        self.window[row], self.ssm[row] = other.window[other_row], other.ssm[other_row]

    def forget(self, rows):
        """Empty the rows where `rows` (b,) is True: a new document starts there."""
        rows = rows.view(-1, 1, 1)
        self.window.masked_fill_(rows, 0)  # not a product: 0 times infinity is no zero
        self.ssm.masked_fill_(rows.unsqueeze(-1), 0)


class Mamba2Mixer(nn.Module):
    """One Mamba-2 layer without its pre-norm and residual: (b, l, d) -> (b, l, d).

    The inner width is num_heads * head_dim and nothing else: the released 9B has 128 * 80 = 10240 on a hidden size of
    4480, so any rule like "twice the hidden size" breaks there.
    """

    def __init__(
        self, hidden_size, num_heads, head_dim, n_groups, state_size, conv_kernel, chunk_size=128, eps=1e-5,
        use_bias=False, use_conv_bias=True, time_step_limit=(0.0, math.inf),
    ):  # fmt: skip
        super().__init__()
        if num_heads % n_groups:
            raise ValueError(
                f"mamba_num_heads {num_heads} must be a multiple of n_groups {n_groups}: every group of B and C serves "
                f"the same number of heads; got {num_heads} % {n_groups} = {num_heads % n_groups}"
            )
        self.h, self.p, self.g, self.n = num_heads, head_dim, n_groups, state_size
        self.inner, self.chunk_size, self.time_step_limit = num_heads * head_dim, chunk_size, time_step_limit
        self.conv_channels = self.inner + 2 * n_groups * state_size  # x | B | C
        self.in_proj = nn.Linear(hidden_size, self.inner + self.conv_channels + num_heads, bias=use_bias)
        self.conv1d = nn.Conv1d(  # holds the weights under the checkpoint's names; causal_conv1d does the work
            self.conv_channels, self.conv_channels, conv_kernel, groups=self.conv_channels, bias=use_conv_bias
        )
        self.dt_bias = nn.Parameter(torch.zeros(num_heads))
        self.A_log = nn.Parameter(torch.zeros(num_heads))
        self.D = nn.Parameter(torch.ones(num_heads))
        self.norm = GatedGroupRMSNorm(self.inner, n_groups, eps)
        self.impl = "torch"  # or "triton": kernels/mixer.py in the place of everything between the two projections
        self.out_proj = nn.Linear(self.inner, hidden_size, bias=use_bias)

    def new_state(self, batch_size, device, dtype, ssm_dtype=None):
        """An empty Mamba2State. ssm_dtype: what the SSM state is kept in between calls; None is float32 (float64 if
        dtype is). A narrower one is there to be measured: the arithmetic stays wide, but every call rounds the state
        (notebooks/ssm_cache_twin.py)."""
        ssm_dtype = torch.promote_types(dtype, torch.float32) if ssm_dtype is None else ssm_dtype
        if not ssm_dtype.is_floating_point:
            raise ValueError(f"ssm_dtype {ssm_dtype} cannot hold a state: use None (float32) or torch.bfloat16")
        k = self.conv1d.kernel_size[0]
        return Mamba2State(
            torch.zeros(batch_size, k - 1, self.conv_channels, device=device, dtype=dtype),
            torch.zeros(batch_size, self.h, self.p, self.n, device=device, dtype=ssm_dtype),
        )

    def forward(self, u, state=None, seq_idx=None):
        """u (b, l, d) -> (b, l, d). A `state` is read and updated in place; `seq_idx` (b, l) marks packed documents."""
        if self.impl == "triton" and (state is None or state.ssm.dtype == torch.float32):
            from kernels import mixer

            return mixer.forward(self, u, state, seq_idx)
        b, l, _ = u.shape
        # in_proj makes everything at once, in this order: z (i) | x (i) | B (g*n) | C (g*n) | dt (h)
        z, xBC, dt = self.in_proj(u).split([self.inner, self.conv_channels, self.h], dim=-1)
        scan, convolve = training_forms(u)
        xBC, window = convolve(
            xBC, self.conv1d.weight, self.conv1d.bias, None if state is None else state.window, seq_idx
        )
        x, B, C = xBC.split([self.inner, self.g * self.n, self.g * self.n], dim=-1)
        x = x.unflatten(-1, (self.h, self.p))  # (b, l, h, p)
        B, C = (t.unflatten(-1, (self.g, self.n)) for t in (B, C))  # (b, l, g, n)

        wide = torch.promote_types(u.dtype, torch.float32)
        A = -torch.exp(self.A_log.to(wide))
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        if self.time_step_limit != (0.0, math.inf):
            dt = dt.clamp(*self.time_step_limit)

        if x.dtype == torch.float16:  # float16 ends at 65504: too little for sums of states
            x, B, C = x.float(), B.float(), C.float()
        with torch.autocast(u.device.type, enabled=False):  # dtypes inside the scan are chosen there, by hand
            if state is None:
                y, _ = scan(x, dt, A, B, C, self.D, None, seq_idx, self.chunk_size)
            else:
                state.window.copy_(window)
                if l == 1:
                    ssm = state.ssm.to(torch.promote_types(state.ssm.dtype, torch.float32))  # itself, if not narrow
                    y, ssm = ssd_step(ssm, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], self.D)
                    y = y[:, None]
                else:
                    y, ssm = scan(x, dt, A, B, C, self.D, state.ssm, seq_idx, self.chunk_size)
                if ssm is not state.ssm:
                    state.ssm.copy_(ssm)
        return self.out_proj(self.norm(y.flatten(-2), z))
