"""The Mamba-2 layer against its own definition: the loop, the plain convolution, the norm with a loop over groups.

The recurrence in float64 is the yardstick. Sizes are ugly on purpose: lengths around a chunk's edge, head sizes that
are not powers of two, two and three groups, documents of one token.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

import mamba2
from mamba2 import GatedGroupRMSNorm, Mamba2Mixer, causal_conv1d, ssd_chunked, ssd_recurrent, ssd_step

Q = 8
NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")
SHAPES = {  # h, g, p, n
    "6 heads, 2 groups": (6, 2, 20, 16),
    "6 heads, 3 groups": (6, 3, 24, 7),
    "4 heads, 4 groups": (4, 4, 5, 16),
}


def documents(b, l, lengths=(1, 5, 2, 8, 3, 1, 7), q=None):
    """(b, l) document numbers. Row j starts elsewhere in the list of lengths, so that the rows' edges differ; with q,
    the last row has its edges exactly at chunk edges."""
    rows = []
    for j in range(b):
        turn = itertools.cycle(lengths[j:] + lengths[:j])
        row = [i for i, length in zip(range(l), turn) for _ in range(length)][:l]
        rows.append(row)
    if q:
        rows[-1] = [t // q for t in range(l)]
    return torch.tensor(rows, dtype=torch.int32)


def runs(ids):
    """(start, end) of the documents of one row."""
    edges = [0] + [t for t in range(1, len(ids)) if ids[t] != ids[t - 1]] + [len(ids)]
    return list(zip(edges, edges[1:]))


def inputs(l, shape="6 heads, 2 groups", b=2, dtype=torch.float64, seed=0, state=True):
    h, g, p, n = SHAPES[shape]
    gen = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=gen, dtype=torch.float64)

    x, dt = randn(b, l, h, p), F.softplus(randn(b, l, h) * 2 - 1)  # dt from 0.001 to 5
    A, B, C, D = -randn(h).abs() - 0.05, randn(b, l, g, n), randn(b, l, g, n), randn(h)
    S = randn(b, h, p, n) if state else None
    wide = torch.promote_types(dtype, torch.float32)
    x, B, C = (t.to(dtype) for t in (x, B, C))
    return [x, dt.to(wide), A.to(wide), B, C, D.to(wide), S if S is None else S.to(wide)]


def run(ssd, args, **kwargs):
    """Outputs, final state, and the gradient of every input of a random function of both."""
    args = [a if a is None else a.detach().clone().requires_grad_() for a in args]
    y, S = ssd(*args, **kwargs)
    gen = torch.Generator().manual_seed(99)
    wy, wS = (torch.randn(t.shape, generator=gen, dtype=torch.float64) for t in (y, S))
    ((y.double() * wy).sum() + (S.double() * wS).sum()).backward()
    found = {"y": y, "final state": S}
    found |= {f"d{name}": a.grad for name, a in zip(NAMES, args) if a is not None}
    return {name: t.detach() for name, t in found.items()}


def assert_same(found, expected, tolerance):
    """Largest difference over the largest value, for each tensor by itself."""
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].shape == expected[name].shape, name
        assert found[name].isfinite().all(), name
        scale = max(1.0, expected[name].abs().max().item())
        off = (found[name].double() - expected[name].double()).abs().max().item() / scale
        assert off < tolerance, f"{name} is off by {off:.1e}"


# ---------------------------------------------------------------------------------------------------------------------
# The chunked form and the single step against the loop
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("state", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("l", [1, Q - 1, Q, Q + 1, 3 * Q + 2])
def test_chunked_equals_recurrent(l, shape, state, packed):
    args = inputs(l, shape, state=state)
    ids = documents(2, l, q=Q) if packed else None
    expected = run(ssd_recurrent, args, seq_idx=ids)
    assert_same(run(ssd_chunked, args, seq_idx=ids, chunk_size=Q), expected, 1e-11)


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("l", [2 * Q, 2 * Q + 1, 7 * Q + 3])
def test_segments_carry_the_state(l, packed, monkeypatch):
    """Rows longer than CHUNKS_PER_SEGMENT chunks are cut into segments; a document edge sits exactly on a cut."""
    monkeypatch.setattr(mamba2, "CHUNKS_PER_SEGMENT", 2)
    ids = None
    if packed:
        ids = documents(3, l)
        ids[1] = torch.tensor([t // (2 * Q) for t in range(l)])  # edges on every cut
        ids[2] = 5  # and a row with none
    args = inputs(l, b=3)
    assert_same(run(ssd_chunked, args, seq_idx=ids, chunk_size=Q), run(ssd_recurrent, args, seq_idx=ids), 1e-11)


def test_recurrent_is_the_sentence_in_the_docstring():
    """Written out with scalars for one head and channel, so that the yardstick itself is checked once."""
    x, dt, A, B, C, D, S = inputs(9, "6 heads, 3 groups", b=1)
    y, _ = ssd_recurrent(x, dt, A, B, C, D, S)
    for h, p in ((0, 0), (3, 5), (5, 23)):
        state = S[0, h, p].clone()
        for t in range(9):
            state = state * torch.exp(dt[0, t, h] * A[h]) + dt[0, t, h] * x[0, t, h, p] * B[0, t, h // 2]
            expected = state @ C[0, t, h // 2] + D[h] * x[0, t, h, p]
            torch.testing.assert_close(y[0, t, h, p], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ssd", [ssd_recurrent, ssd_chunked])
def test_packed_documents_are_alone(ssd):
    l, kwargs = 3 * Q + 2, {"chunk_size": Q}
    x, dt, A, B, C, D, S = inputs(l)
    ids = documents(2, l, q=Q)
    y, final = ssd(x, dt, A, B, C, D, S, ids, **kwargs)
    for row in range(2):
        for start, end in runs(ids[row]):
            part = [t[row : row + 1, start:end] for t in (x, dt, B, C)]
            S0 = S[row : row + 1] if start == 0 else None  # the incoming state belongs to the first document
            alone, S1 = ssd(part[0], part[1], A, part[2], part[3], D, S0, **kwargs)
            torch.testing.assert_close(y[row, start:end], alone[0], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(final[row], S1[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_chunk_size_does_not_matter(packed):
    l = 37
    args, ids = inputs(l), documents(2, l) if packed else None
    expected = run(ssd_chunked, args, seq_idx=ids, chunk_size=5)
    for q in (1, 2, 16, 37, 128):
        assert_same(run(ssd_chunked, args, seq_idx=ids, chunk_size=q), expected, 1e-11)


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (torch.bfloat16, 3e-2)], ids=str)
def test_low_precision(dtype, tolerance, packed):
    """Same numbers into both, rounded once: what remains is the arithmetic inside. float32 must stay float32-good."""
    l = 3 * Q + 2
    args = inputs(l, dtype=dtype)
    ids = documents(2, l, q=Q) if packed else None
    y, S = ssd_chunked(*args, seq_idx=ids, chunk_size=Q)
    assert y.dtype == dtype and S.dtype == torch.float32
    expected = run(ssd_recurrent, [a.double() for a in args], seq_idx=ids)
    found = run(ssd_chunked, args, seq_idx=ids, chunk_size=Q)
    # bfloat16 sums of many rounded products: judge each gradient by its own largest entry, loosely
    assert_same(found, expected, tolerance)


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_dt(dtype, packed):
    """Steps so large that every decay underflows, mixed with steps so small that nothing fades: finite everywhere."""
    l = 3 * Q + 2
    args = inputs(l, dtype=dtype)
    args[1] = torch.where(torch.arange(l).view(1, l, 1) % 3 == 0, 3e4, 1e-6).expand_as(args[1]).contiguous()
    args[2] = args[2] * 16
    ids = documents(2, l, q=Q) if packed else None
    found = run(ssd_chunked, args, seq_idx=ids, chunk_size=Q)
    for name, t in found.items():
        assert t.isfinite().all(), name
    if dtype == torch.float32:  # a step of 3e4 empties the state, so the outputs are still known
        expected = run(ssd_recurrent, [a.double() for a in args], seq_idx=ids)
        assert_same({k: found[k] for k in ("y", "final state")}, {k: expected[k] for k in ("y", "final state")}, 1e-4)


def test_dt_zero_changes_nothing():
    x, dt, A, B, C, D, S = inputs(Q + 3)
    _, final = ssd_chunked(x, dt * 0, A, B, C, D, S, chunk_size=Q)
    torch.testing.assert_close(final, S)


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_equal_recurrent(shape):
    x, dt, A, B, C, D, S = inputs(11, shape)
    y, final = ssd_recurrent(x, dt, A, B, C, D, S)
    for t in range(11):
        y_t, S = ssd_step(S, x[:, t], dt[:, t], A, B[:, t], C[:, t], D)
        torch.testing.assert_close(y_t, y[:, t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(S, final, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ssd", [ssd_recurrent, ssd_chunked])
def test_state_stays_float32(ssd):
    """A bfloat16 state would lose this: each of 600 increments is far below half a unit in the last place of 256."""
    h, g, p, n = 2, 2, 3, 4
    x, B = torch.full((1, 600, h, p), 0.25), torch.ones(1, 600, g, n)
    x, B = x.bfloat16(), B.bfloat16()
    dt, A, D, S = torch.ones(1, 600, h), torch.full((h,), -1e-30), torch.zeros(h), torch.full((1, h, p, n), 256.0)
    _, final = ssd(x, dt, A, B, B, D, S, chunk_size=64)
    assert final.dtype == torch.float32
    torch.testing.assert_close(final, torch.full_like(S, 256 + 150))
    for t in range(600):
        y, S = ssd_step(S, x[:, t], dt[:, t], A, B[:, t], B[:, t], D)
        assert S.dtype == torch.float32 and y.dtype == torch.bfloat16
    torch.testing.assert_close(S, final)


# ---------------------------------------------------------------------------------------------------------------------
# The convolution
# ---------------------------------------------------------------------------------------------------------------------


def conv_inputs(l, k, b=2, channels=5):
    gen = torch.Generator().manual_seed(l * 10 + k)
    sizes = [(b, l, channels), (channels, 1, k), (channels,), (b, k - 1, channels)]
    return [torch.randn(s, generator=gen, dtype=torch.float64) for s in sizes]


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("l", [1, 2, 3, 11])
def test_conv_is_the_padded_definition(l, k, with_bias):
    x, weight, bias, window = conv_inputs(l, k)
    bias = bias if with_bias else None
    y, new = causal_conv1d(x, weight, bias)
    expected = F.silu(F.conv1d(x.mT, weight, bias, padding=k - 1, groups=5)[..., :l].mT)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(new, F.pad(x, (0, 0, k - 1, 0))[:, l:])
    # with a window: the definition on the longer row
    y, new = causal_conv1d(x, weight, bias, window)
    long = torch.cat([window, x], dim=1)
    torch.testing.assert_close(y, F.silu(F.conv1d(long.mT, weight, bias, groups=5).mT))
    torch.testing.assert_close(new, long[:, l:])


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("split", range(1, 11))
def test_conv_continues_from_its_window(split, k):
    x, weight, bias, window = conv_inputs(11, k)
    ids = documents(2, 11)
    for seq_idx in (None, ids):
        full, last = causal_conv1d(x, weight, bias, window, seq_idx)
        cut = (slice(None), slice(None, split)), (slice(None), slice(split, None))
        first, carried = causal_conv1d(x[cut[0]], weight, bias, window, None if seq_idx is None else ids[cut[0]])
        if seq_idx is not None:  # the caller empties the window of a row that starts a new document at the cut
            carried = carried * (ids[:, split] == ids[:, split - 1]).view(2, 1, 1)
        second, new = causal_conv1d(x[cut[1]], weight, bias, carried, None if seq_idx is None else ids[cut[1]])
        torch.testing.assert_close(torch.cat([first, second], dim=1), full)
        torch.testing.assert_close(new, last)


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("l", [1, 2, 3, 4, 17])
def test_conv_stops_at_document_edges(l, k):
    x, weight, bias, window = conv_inputs(l, k)
    ids = documents(2, l, q=4)
    y, new = causal_conv1d(x, weight, bias, window, ids)
    for row in range(2):
        for start, end in runs(ids[row]):
            w = window[row : row + 1] if start == 0 else None
            alone, last = causal_conv1d(x[row : row + 1, start:end], weight, bias, w)
            torch.testing.assert_close(y[row, start:end], alone[0])
        torch.testing.assert_close(new[row], last[0])  # zeros where another document was


def test_conv_paths_agree_with_gradients():
    """One document through the packed path equals the plain path, gradients included."""
    grads = []
    for ids in (None, torch.full((2, 11), 7)):
        args = [t.requires_grad_() for t in conv_inputs(11, 4)]
        y, new = causal_conv1d(*args, ids)
        (y.square().sum() + new.pow(3).sum()).backward()
        grads.append([y.detach(), new.detach()] + [a.grad for a in args])
    for plain, packed in zip(*grads):
        torch.testing.assert_close(packed, plain)


# ---------------------------------------------------------------------------------------------------------------------
# The norm
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups, width", [(2, 40), (3, 36), (1, 7)])
def test_norm_is_gate_first_and_by_group(groups, width):
    gen = torch.Generator().manual_seed(0)
    y, z = torch.randn(2, 5, width, generator=gen) * 3, torch.randn(2, 5, width, generator=gen)
    norm = GatedGroupRMSNorm(width, groups, 1e-3)
    with torch.no_grad():
        norm.weight.normal_(1, 0.5, generator=gen)
    size, expected = width // groups, torch.empty_like(y)
    gated = y * z * torch.sigmoid(z)
    for j in range(groups):
        part = gated[..., j * size : (j + 1) * size]
        rms = torch.sqrt((part * part).sum(-1, keepdim=True) / size + 1e-3)
        expected[..., j * size : (j + 1) * size] = part / rms * norm.weight[j * size : (j + 1) * size]
    torch.testing.assert_close(norm(y, z), expected)
    # bfloat16 in, bfloat16 out, and only the last step rounds
    low = norm(y.bfloat16(), z.bfloat16())
    exact = norm(y.bfloat16().float(), z.bfloat16().float())
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, exact.bfloat16())


# ---------------------------------------------------------------------------------------------------------------------
# The mixer
# ---------------------------------------------------------------------------------------------------------------------

MIXERS = {
    "2 groups, head 20": dict(num_heads=6, head_dim=20, n_groups=2, state_size=16, conv_kernel=4),
    "3 groups, head 24": dict(num_heads=3, head_dim=24, n_groups=3, state_size=7, conv_kernel=2),
}


def mixer(name="2 groups, head 20", hidden=24, dtype=torch.float64, **kwargs):
    torch.manual_seed(1)
    m = Mamba2Mixer(hidden, **MIXERS[name], chunk_size=Q, **kwargs)
    with torch.no_grad():
        m.A_log.normal_(0, 1)
        m.dt_bias.normal_(-1, 2)
        m.D.normal_(1, 0.3)
        m.norm.weight.normal_(1, 0.3)
    return m.to(dtype)


def hidden_states(l, b=2, hidden=24):
    return torch.randn(b, l, hidden, generator=torch.Generator().manual_seed(l), dtype=torch.float64)


@pytest.mark.parametrize("name", MIXERS)
def test_mixer_packed_row_equals_documents_alone(name):
    m, l = mixer(name), 3 * Q + 2
    ids = documents(2, l, q=Q)
    u = hidden_states(l).requires_grad_()
    weight = hidden_states(l + 1)[:, 1:]
    y = m(u, seq_idx=ids)
    (y * weight).sum().backward()
    packed = [u.grad.clone()] + [p.grad.clone() for p in m.parameters()]
    u.grad = None
    m.zero_grad()
    for row in range(2):
        for start, end in runs(ids[row]):
            alone = m(u[row : row + 1, start:end])
            torch.testing.assert_close(alone[0], y[row, start:end], rtol=1e-10, atol=1e-10)
            (alone * weight[row : row + 1, start:end]).sum().backward()
    for a, b in zip(packed, [u.grad] + [p.grad for p in m.parameters()]):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("n", [1, 2, 3, Q - 1, Q, Q + 1, 3 * Q + 1])
@torch.no_grad()
def test_mixer_state_continues_from_any_split(n, name):
    m, l = mixer(name), 3 * Q + 2
    u = hidden_states(l)
    full = m.new_state(2, "cpu", torch.float64)
    y = m(u, full)
    torch.testing.assert_close(y, m(u), rtol=1e-10, atol=1e-10)
    split = m.new_state(2, "cpu", torch.float64)
    parts = torch.cat([m(u[:, :n], split), m(u[:, n:], split)], dim=1)
    torch.testing.assert_close(parts, y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(split.ssm, full.ssm, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(split.window, full.window, rtol=1e-10, atol=1e-10)
    steps = m.new_state(2, "cpu", torch.float64)
    one_by_one = torch.cat([m(u[:, t : t + 1], steps) for t in range(l)], dim=1)
    torch.testing.assert_close(one_by_one, y, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_mixer_left_padding_is_neutral():
    m = mixer()
    u, pads = hidden_states(Q + 3), (0, 5)
    junk = torch.full((5, 24), 1e3, dtype=torch.float64)
    state = m.new_state(2, "cpu", torch.float64)
    padded, ids = torch.zeros(2, Q + 3, 24, dtype=torch.float64), torch.zeros(2, Q + 3, dtype=torch.int32)
    for row, pad in enumerate(pads):
        padded[row] = torch.cat([junk[:pad], u[row, : Q + 3 - pad]])
        ids[row, :pad] = -1
    y = m(padded, state, ids)
    for row, pad in enumerate(pads):
        alone = m.new_state(1, "cpu", torch.float64)
        torch.testing.assert_close(y[row, pad:], m(u[row : row + 1, : Q + 3 - pad], alone)[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(state.ssm[row], alone.ssm[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(state.window[row], alone.window[0], rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_mixer_is_causal_and_documents_do_not_leak():
    m, l = mixer(), 3 * Q + 2
    u = hidden_states(l)
    for t in (0, 1, Q - 1, Q, 2 * Q + 3, l - 1):
        moved = u.clone()
        moved[:, t] += 1
        before, after = m(u), m(moved)
        assert torch.equal(before[:, :t], after[:, :t])  # to the bit: the matmuls multiply these by exact zeros
        assert (before[:, t] - after[:, t]).abs().max() > 1e-3
        if t + 1 < l:
            assert (before[:, t + 1] - after[:, t + 1]).abs().max() > 1e-6
    for edge in (1, Q - 1, Q, Q + 1, 2 * Q):  # document A ends at `edge`; its last token must not reach B
        ids = (torch.arange(l) >= edge).int().expand(2, l)
        moved = u.clone()
        moved[:, edge - 1] += 1
        before, after = m(u, seq_idx=ids), m(moved, seq_idx=ids)
        # not to the bit: the running sum of log-decays inside a chunk goes through A and rounds differently
        torch.testing.assert_close(before[:, edge:], after[:, edge:], rtol=0, atol=1e-13)
        assert (m(u)[:, edge:] - m(moved)[:, edge:]).abs().max() > 1e-3  # without ids it does


@torch.no_grad()
def test_forget_empties_the_named_rows_only():
    m = mixer()
    state = m.new_state(2, "cpu", torch.float64)
    m(hidden_states(5), state)
    window, ssm = state.window.clone(), state.ssm.clone()
    state.forget(torch.tensor([True, False]))
    assert not state.window[0].any() and not state.ssm[0].any()
    assert torch.equal(state.window[1], window[1]) and torch.equal(state.ssm[1], ssm[1])
    assert ssm[0].any() and window[0].any()


def test_time_step_limit_clamps_dt():
    u = hidden_states(9)
    free, limited = mixer(), mixer(time_step_limit=(0.1, 0.2))
    assert (free(u) - limited(u)).abs().max() > 1e-3
    limited.time_step_limit = (0.0, 1e9)
    torch.testing.assert_close(free(u), limited(u))


def test_heads_must_divide_into_groups():
    with pytest.raises(ValueError, match="mamba_num_heads 5 must be a multiple of n_groups 2.* = 1"):
        Mamba2Mixer(8, 5, 4, 2, 4, 4)


def test_mixer_state_dtype_for_bfloat16():
    m = mixer(dtype=torch.bfloat16)
    state = m.new_state(2, "cpu", torch.bfloat16)
    with torch.no_grad():
        for l in (Q + 3, 1):
            assert m(hidden_states(l).bfloat16(), state).dtype == torch.bfloat16
            assert state.ssm.dtype == torch.float32 and state.window.dtype == torch.bfloat16
