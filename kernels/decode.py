"""One token through one Mamba-2 layer, between in_proj and out_proj, in one launch.

Two numbers first. At h 128, p 80, n 128 the state of one row is 5.24 MB in float32, and it has to be read and written:
10.5 MB a row and layer; window, weights and activations together are 0.4 MB. The arithmetic is five operations a state
number, 7 MFLOP: less than one operation a byte, where a GPU can afford ten or more. So the floor is bytes over
bandwidth: at 4.3 TB/s 2.4 us for one row, 78 us for 32 rows.

The plain version (`Mamba2Mixer.forward` with l = 1) is a dozen launches and more, each at least as long as starting a
kernel takes; and its fade, its write and its read are a pass over the state each.

The plan. The rows p of the state are independent: channel p of a head is S[p] = fade S[p] + (dt x[p]) B, then
y[p] = S[p] . C. So a program takes SHARE channels of one head, holds their rows in registers, and reads and writes them
once:

- at one row the work is over before a kernel has properly begun. On Hopper a launch may start while the one before it
  still runs (programmatic dependent launch): each program first asks the L2 cache for its state and weights, which is
  right even if somebody still writes them, and only then waits for the launches before this one;
- the state is loaded first, so that its trip to memory hides all that does not need it: the convolution of the
  program's own x, and of the group's B and C, which all programs of a group repeat (a few KB from the L2; handing them
  over from another launch would cost more);
- then fade, write, read, skip, gate: v = (y + D x) SiLU(z), all in float32, goes to a scratch row in the L2;
- the norm needs all heads of a group, so the programs of a group count themselves off with an atomic. The last one
  finds every v written, norms the group and writes the result; it also moves the windows of B and C one step on,
  because nobody needs the old ones any more, and sets the count back to zero for the next launch.

The count is what makes this correct, so in full. Every thread stores its v and has used its window before the
program's barrier; after it one thread adds 1 with acquire-release order at the scope of the device. The adds to one
address form a chain, and each acquires what those before it released: so the last program's loads see every v (and go
past the L1, which might hold an old line), and everybody's reads of the windows of B and C come before its stores.
Every sum has a fixed order whoever is last: results are the same to the bit from run to run.

Nothing here is needed to understand the model: `ssd_step`, `causal_conv1d` and `GatedGroupRMSNorm` in mamba2.py say the
same, and the tests hold the two together.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

APART = 32  # int32 between two counts: each in a cache line of its own, or their atomics would queue up


@triton.jit
def _prefetch(at, BYTES: tl.constexpr):
    """Ask the L2 for BYTES from the pointer `at` on. A hint, right even while somebody still writes there."""
    if BYTES >= 16:
        tl.inline_asm_elementwise(
            """{
            .reg .pred one;
            .reg .b32 me;
            .reg .b64 from;
            mov.u32 me, %tid.x;
            setp.eq.u32 one, me, 0;
            and.b64 from, $1, -16;
            @one cp.async.bulk.prefetch.L2.global [from], $2;
            mov.u32 $0, 0;
            }""",
            "=r,l,r", [at.to(tl.int64), BYTES // 16 * 16], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _load_taps(new, window, weight, bias, inside, channels: tl.constexpr, k: tl.constexpr):
    """Pointers of some channels (c,) -> their last k inputs, oldest first, and weights, a tuple of (c,) each; bias."""
    inputs, weights = (), ()
    for tap in tl.static_range(k):
        at = window + tap * channels if tap < k - 1 else new
        inputs = inputs + (tl.load(at, mask=inside, other=0.0),)
        weights = weights + (tl.load(weight + tap, mask=inside, other=0.0),)
    offset = tl.zeros(new.shape, tl.float32)
    if bias is not None:
        offset = tl.load(bias, mask=inside, other=0.0)
    return inputs, weights, offset


@triton.jit
def _convolve(inputs, weights, offset, k: tl.constexpr):
    y = offset.to(tl.float32)  # sums in float32, whatever the model's dtype
    for tap in tl.static_range(k):
        y += inputs[tap].to(tl.float32) * weights[tap].to(tl.float32)
    return y * tl.sigmoid(y)


@triton.jit
def _shift(window, inputs, inside, channels: tl.constexpr, k: tl.constexpr):
    for tap in tl.static_range(k - 1):
        tl.store(window + tap * channels, inputs[tap + 1], mask=inside)


@triton.jit
def _mixer_step(
    zxbcdt, window, ssm, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, v_scratch, result, count,
    row_stride, eps, dt_low, dt_high,
    h: tl.constexpr, p: tl.constexpr, g: tl.constexpr, n: tl.constexpr, k: tl.constexpr,
    SHARE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, N: tl.constexpr, TAPS: tl.constexpr,
    GROUP: tl.constexpr, APART: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Grid (parts of p, h, b); a program has SHARE rows of one head. Powers of two that cover: FIRST and SECOND (or 0)
    together SHARE, N all of n, TAPS k, GROUP a group's channels. DEPENDENT: started before the launch before it has
    ended."""
    PIECES: tl.constexpr = 2 if SECOND else 1  # the rows in one tile or two
    part, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    inner: tl.constexpr = h * p
    channels: tl.constexpr = inner + 2 * g * n
    width: tl.constexpr = inner // g  # channels of one group
    group = head // (h // g)
    first = head * p + part * SHARE  # channel of the first row
    ssm += row * (inner * n)
    window += row * ((k - 1) * channels)
    at_B = inner + group * n

    # 1. What can be done before the launch before this one has ended: ask the L2 for what certainly comes from memory.
    if DEPENDENT:
        if (tl.program_id(2) * h + head) * tl.num_programs(0) + part < 1188:  # who starts later finds them there
            number: tl.constexpr = conv_weight.dtype.element_ty.primitive_bitwidth // 8
            if p % SHARE == 0:
                _prefetch(ssm + first * n, SHARE * n * 4)
                _prefetch(conv_weight + first * k, SHARE * k * number)
            _prefetch(conv_weight + at_B * k, n * k * number)
            _prefetch(conv_weight + (at_B + g * n) * k, n * k * number)
            for tap in tl.static_range(k - 1):
                _prefetch(window + tap * channels + at_B, n * (window.dtype.element_ty.primitive_bitwidth // 8))
                _prefetch(window + tap * channels + at_B + g * n, n * (window.dtype.element_ty.primitive_bitwidth // 8))
        gdc_wait()  # nothing that a launch writes is read, and nothing is written, before this
        gdc_launch_dependents()

    # 2. All loads, the state's first. A compiler likes to move loads to where they are used, and then they wait for
    #    each other, a trip to memory each time; across a barrier it does not move them.
    columns = tl.arange(0, N)
    in_n = columns < n
    S, states, insides, channel = (), (), (), ()
    for i in tl.static_range(PIECES):
        rows = i * FIRST + tl.arange(0, SECOND if i else FIRST)
        in_p = tl.full(rows.shape, True, tl.int1)
        if p % SHARE or SHARE < FIRST + SECOND:  # no mask where none is needed
            in_p = (rows < SHARE) & (part * SHARE + rows < p)
        own = first + rows
        states = states + (ssm + own[:, None] * n + columns[None, :],)
        insides, channel = insides + (in_p,), channel + (own,)
        S = S + (tl.load(states[i], mask=in_p[:, None] & in_n[None, :], other=0.0),)  # (rows, N)
    tl.debug_barrier()

    zxbcdt += row * row_stride  # z | x | B | C | dt
    new = zxbcdt + inner
    tap = tl.arange(0, TAPS)[:, None]  # a few channels, so x has its taps side by side
    z, x_in, x_weight, x_bias = (), (), (), ()
    for i in tl.static_range(PIECES):
        here, in_x = channel[i][None, :], insides[i][None, :] & (tap < k)
        z = z + (tl.load(zxbcdt + channel[i], mask=insides[i], other=0.0),)
        x_old = tl.load(window + tap * channels + here, mask=in_x & (tap < k - 1), other=0.0)  # (TAPS, rows)
        x_new = tl.load(new + here + 0 * tap, mask=in_x & (tap == k - 1), other=0.0)
        x_in = x_in + (tl.where(tap == k - 1, x_new, x_old),)
        x_weight = x_weight + (tl.load(conv_weight + here * k + tap, mask=in_x, other=0.0),)
        if conv_bias is not None:
            x_bias = x_bias + (tl.load(conv_bias + channel[i], mask=insides[i], other=0.0),)
        else:
            x_bias = x_bias + (tl.zeros(channel[i].shape, tl.float32),)

    new_B, window_B, weight_B = new + at_B + columns, window + at_B + columns, conv_weight + (at_B + columns) * k
    bias_B, bias_C = None, None
    if conv_bias is not None:
        bias_B = conv_bias + at_B + columns
        bias_C = bias_B + g * n
    B_in, B_weight, B_bias = _load_taps(new_B, window_B, weight_B, bias_B, in_n, channels, k)
    C_in, C_weight, C_bias = _load_taps(
        new_B + g * n, window_B + g * n, weight_B + g * n * k, bias_C, in_n, channels, k
    )
    raw, raw_bias = tl.load(new + channels + head), tl.load(dt_bias + head)
    log_A, skip = tl.load(A_log + head), tl.load(D + head).to(tl.float32)
    tl.debug_barrier()

    # 3. The convolutions of B and C, and the step size.
    B, C = _convolve(B_in, B_weight, B_bias, k), _convolve(C_in, C_weight, C_bias, k)  # (N,)
    raw = raw.to(tl.float32) + raw_bias.to(tl.float32)
    e = tl.exp(tl.minimum(raw, 20.0))
    u = 1.0 + e  # has rounded; what it lost is put back to first order
    dt = tl.where(raw > 20.0, raw, tl.log(u) + (e - (u - 1.0)) / u)
    dt = tl.where(dt < dt_low, dt_low, tl.where(dt > dt_high, dt_high, dt))
    fade = tl.exp(-dt * tl.exp(log_A.to(tl.float32)))

    # 4. A tile at a time: convolve x; fade, write, read, skip, gate.
    for i in tl.static_range(PIECES):
        x = tl.sum(x_in[i].to(tl.float32) * x_weight[i].to(tl.float32), 0) + x_bias[i].to(tl.float32)
        x = x * tl.sigmoid(x)  # (rows,)
        gate = z[i].to(tl.float32)
        gate = gate * tl.sigmoid(gate)
        T = S[i] * fade + (dt * x)[:, None] * B[None, :]
        v = (tl.sum(T * C[None, :], 1) + skip * x) * gate
        tl.store(v_scratch + row * inner + channel[i], v, mask=insides[i])
        tl.store(states[i], T, mask=insides[i][:, None] & in_n[None, :])

    tl.debug_barrier()  # every thread has stored its v, and read its window
    counter = count + (row * g + group) * APART
    before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    for i in tl.static_range(PIECES):
        in_x = insides[i][None, :] & (tap < k) & (tap > 0)
        tl.store(window + (tap - 1) * channels + channel[i][None, :], x_in[i], mask=in_x)
    if before == tl.num_programs(0) * (h // g) - 1:  # the last program of this row and group
        c = tl.arange(0, GROUP)
        out = row * inner + group * width + c
        all_v = tl.load(v_scratch + out, mask=c < width, other=0.0, cache_modifier=".cg")
        weight = tl.load(norm_weight + group * width + c, mask=c < width, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(all_v * all_v) / width + eps)
        tl.store(result + out, all_v * scale * weight, mask=c < width)
        _shift(window_B, B_in, in_n, channels, k)
        _shift(window_B + g * n, C_in, in_n, channels, k)
        tl.store(counter, 0)


@functools.cache
def _dependent(device):
    """Whether launches there may start before the one before has ended: Hopper and newer, and not the interpreter."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def _counts(device, rows):
    """Zeros to count on, for each row and group. A launch leaves zeros behind, so one buffer serves all layers."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"the {rows} counters of mixer_step on {device} would become part of the CUDA graph: call mixer_step once "
            f"with this batch size before capturing"
        )
    return torch.zeros(rows * APART, dtype=torch.int32, device=device)


def mixer_step(
    zxbcdt, window, ssm, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, n_groups, eps,
    time_step_limit=(0.0, math.inf),
):  # fmt: skip
    """One token of every row, from in_proj's output to out_proj's input; `window` and `ssm` are updated in place.

    zxbcdt (b, 2*i + 2*g*n + h): in_proj's output, z | x | B | C | dt; rows may lie apart, numbers of a row may not.
    window (b, k-1, i + 2*g*n): the convolution's last inputs. ssm (b, h, p, n): the state, float32.
    conv_weight (i + 2*g*n, 1, k), conv_bias (i + 2*g*n,) or None, dt_bias, A_log and D (h,), norm_weight (i,): the
    parameters of `Mamba2Mixer`, in any of float32, bfloat16 and float16; k from 2 to 4, p to 128, n to 256.
    Returns (b, i) in zxbcdt's dtype: what `Mamba2Mixer.norm` returns.

    Can be captured in a CUDA graph after one call outside with the same batch size. Calls on one device share their
    counters: give them one stream, or order the streams. Raises ValueError for a shape, dtype or layout other than
    these.
    """
    if ssm.dim() != 4:
        raise ValueError(f"ssm must be (b, h, p, n), four axes; got {ssm.dim()}, shape {tuple(ssm.shape)}")
    (b, h, p, n), g, k = ssm.shape, n_groups, conv_weight.shape[-1]
    inner = h * p
    channels = inner + 2 * g * n
    if not (1 <= p <= 128 and 1 <= n <= 256 and 2 <= k <= 4):
        raise ValueError(f"mixer_step holds p up to 128, n up to 256 and k from 2 to 4; got p {p}, n {n}, k {k}")
    if g < 1 or h % g:
        raise ValueError(f"{h} heads must be a multiple of n_groups {g}: every group serves the same number of heads")
    expected = dict(
        zxbcdt=(zxbcdt, (b, inner + channels + h)), window=(window, (b, k - 1, channels)), ssm=(ssm, (b, h, p, n)),
        conv_weight=(conv_weight, (channels, 1, k)), conv_bias=(conv_bias, (channels,)), dt_bias=(dt_bias, (h,)),
        A_log=(A_log, (h,)), D=(D, (h,)), norm_weight=(norm_weight, (inner,)),
    )  # fmt: skip
    for name, (tensor, shape) in expected.items():
        if tensor is None and name == "conv_bias":
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {shape} for b {b}, h {h}, p {p}, g {g}, n {n}; got {tuple(tensor.shape)}")
        if tensor.dtype not in ((torch.float32,) if name == "ssm" else (torch.float32, torch.bfloat16, torch.float16)):
            raise ValueError(f"{name} of shape {shape} is {tensor.dtype}: the state is float32, the rest 16 or 32 bits")
        if tensor.device != ssm.device:
            raise ValueError(f"{name} of shape {shape} is on {tensor.device}, the state on {ssm.device}: move one")
        if not (zxbcdt.stride(-1) == 1 if name == "zxbcdt" else tensor.is_contiguous()):
            raise ValueError(f"{name} of shape {shape} has strides {tensor.stride()}: make it contiguous")

    result = torch.empty(b, inner, dtype=zxbcdt.dtype, device=zxbcdt.device)
    if b == 0:
        return result
    v = torch.empty(b, inner, dtype=torch.float32, device=zxbcdt.device)
    # 4 warps hold 20 KB of state (40 numbers a thread): at h 128, p 80, n 128 half a head. With at most 96 registers
    # a thread 5 programs share a multiprocessor, and 100 KB are on their way. Whole heads leave fewer programs than a
    # card has room for; quarters repeat B and C more often.
    N = triton.next_power_of_2(n)
    share = triton.cdiv(p, triton.cdiv(p * N, 5120))
    first = triton.next_power_of_2(share + 1) // 2
    second = triton.next_power_of_2(share - first) if share > first else 0
    dependent = _dependent(zxbcdt.device)
    with torch.cuda.device_of(ssm):
        _mixer_step[triton.cdiv(p, share), h, b](
            zxbcdt, window, ssm, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, v, result,
            _counts(zxbcdt.device, b * g), zxbcdt.stride(0), float(eps), *map(float, time_step_limit),
            h=h, p=p, g=g, n=n, k=k, SHARE=share, FIRST=first, SECOND=second, N=N, TAPS=triton.next_power_of_2(k),
            GROUP=triton.next_power_of_2(inner // g), APART=APART, DEPENDENT=dependent, num_warps=4, maxnreg=96,
            **(dict(launch_pdl=True) if dependent else {}),
        )  # fmt: skip
    return result
