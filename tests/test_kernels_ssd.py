"""kernels/ssd.py against the recurrence in float64: outputs, final state, every gradient."""

import math
import random

import pytest
import torch
import torch.nn.functional as F

from mamba2 import ssd_chunked, ssd_recurrent

pytest.importorskip("triton", reason="the Triton kernels need triton: pip install -r requirements-test.txt")
from kernels import ssd as fast  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ["x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state"]


def inputs(b, l, h, p, g, n, packed=False, initial=True, bias=True, views=False, dtype=torch.float32, seed=0):
    """Random float32 tensors, rounded to `dtype` where the kernels take that, and document numbers or None."""
    r = torch.Generator().manual_seed(seed)
    normal = lambda *size: torch.randn(*size, generator=r)
    wide = normal(b, l, h * p + 2 * g * n + 7) if views else None
    x = wide[..., 3 : 3 + h * p].unflatten(-1, (h, p)) if views else normal(b, l, h, p)
    B = wide[..., 3 + h * p : 3 + h * p + g * n].unflatten(-1, (g, n)) if views else normal(b, l, g, n)
    C, D = normal(b, l, g, n), normal(h)
    dt = normal(b, l, h) - 2 if bias else F.softplus(normal(b, l, h) - 2)
    A = -torch.exp(normal(h))
    given = [x, dt, A, B, C, D, normal(h) if bias else None, normal(b, h, p, n) if initial else None]
    given = [t.to(dtype).float() if i in (0, 1, 3, 4) else t for i, t in enumerate(given)]
    seq_idx = (torch.rand(b, l, generator=r) < 0.15).long().cumsum(1) - 1 if packed else None
    return given, seq_idx


def recurrent(given, seq_idx, limit):
    x, dt, A, B, C, D, bias, initial = given
    if bias is not None:
        dt = F.softplus(dt + bias)
    return ssd_recurrent(x, dt.clamp(*limit), A, B, C, D, initial, seq_idx)


def triton(given, seq_idx, limit):
    x, dt, A, B, C, D, bias, initial = given
    return fast.ssd(x, dt, A, B, C, D, initial, seq_idx, None, bias, limit)


def gradients(form, given, seq_idx, limit, which=("y", "S"), seed=1):
    """y, the final state, and the gradients of a random sum of those named in `which`."""
    given = [None if t is None else t.detach().requires_grad_() for t in given]
    y, S = form(given, seq_idx, limit)
    r = torch.Generator().manual_seed(seed)
    dy, dS = (torch.randn(t.shape, generator=r).bfloat16().to(t) for t in (y, S))  # the same in every dtype
    loss = sum((t * d).sum() for t, d, name in ((y, dy, "y"), (S, dS, "S")) if name in which)
    loss.backward()
    return [y.detach(), S.detach()] + [None if t is None else t.grad for t in given]


def compare(given, seq_idx=None, limit=(0.0, math.inf), tolerance=2e-5, which=("y", "S"), sums=1):
    """Relative errors of all results against float64, each below `tolerance`, or `sums` times that for the gradients
    of A and dt_bias, which are what is left of sums over the row."""
    want = gradients(recurrent, [None if t is None else t.double() for t in given], seq_idx, limit, which)
    ids = None if seq_idx is None else seq_idx.to(DEVICE)
    got = gradients(triton, [None if t is None else t.to(DEVICE) for t in given], ids, limit, which)
    for name, a, b in zip(["y", "final state"] + NAMES, got, want):
        if b is None:
            assert a is None or not a.any(), name
            continue
        error = (a.cpu().double() - b).norm() / b.norm().clamp_min(1e-3)
        assert error < tolerance * (sums if name in ("A", "dt_bias") else 1), f"{name}: relative error {error:.1e}"


@pytest.fixture
def small_tiles(monkeypatch):
    """Chunks of 32 in two blocks, so that a short row has many."""
    real = fast.tiles
    cut = lambda p, n, dtype, shared: real(p, n, dtype, shared)._replace(Q=32, WALK=16, BLOCK=16)
    monkeypatch.setattr(fast, "tiles", cut)


@pytest.mark.parametrize("l", [1, 15, 16, 17, 50])
@pytest.mark.parametrize("packed", [False, True])
def test_lengths(small_tiles, l, packed):
    compare(*inputs(2, l, 4, 20, 2, 24, packed))


@pytest.mark.parametrize("h, p, g, n", [(2, 16, 2, 16), (6, 80, 3, 20), (2, 128, 1, 40), (3, 24, 1, 256), (4, 1, 2, 3)])
def test_sizes(small_tiles, h, p, g, n):
    compare(*inputs(1, 37, h, p, g, n, packed=True))


def test_the_tiles_it_would_choose():
    compare(*inputs(1, 150, 4, 20, 2, 24, packed=True))
    compare(*inputs(1, 70, 2, 80, 1, 128))


@pytest.mark.parametrize("shared", [fast.LARGE, 101376])
def test_sixteen_bit_tiles(monkeypatch, shared):
    """The blocking of bfloat16, on large cards and small ones, with float32 numbers."""
    real = fast.tiles
    monkeypatch.setattr(fast, "tiles", lambda p, n, dtype, _: real(p, n, torch.bfloat16, shared))
    compare(*inputs(1, 300, 2, 24, 1, 20, packed=True))
    compare(*inputs(1, 100, 2, 20, 1, 130))


@pytest.mark.parametrize("initial, bias, views", [(False, True, True), (True, False, False), (False, False, True)])
def test_arguments(small_tiles, initial, bias, views):
    compare(*inputs(2, 33, 4, 20, 2, 16, True, initial, bias, views))


@pytest.mark.parametrize("which", [("y",), ("S",)])
def test_one_of_two_results_used(small_tiles, which):
    compare(*inputs(1, 33, 2, 16, 1, 16), which=which)


def test_any_strides(small_tiles):
    """Inputs, and the gradients of both results, whose last axis is not the fast one in memory."""
    apart = lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2)
    given, seq_idx = inputs(2, 33, 4, 20, 2, 16, packed=True)
    given, seq_idx = [t if t.dim() == 1 else apart(t) for t in given], apart(seq_idx)
    turned = lambda form: lambda *arguments: [t.transpose(-1, -2) for t in form(*arguments)]
    want = gradients(turned(recurrent), [t.double() for t in given], seq_idx, (0.0, math.inf))
    got = gradients(turned(triton), [t.to(DEVICE) for t in given], seq_idx.to(DEVICE), (0.0, math.inf))
    for name, a, b in zip(["y", "final state"] + NAMES, got, want):
        assert (a.cpu().double() - b).norm() < 1e-4 * b.norm(), name


def test_parameters_that_are_views(small_tiles):
    given, _ = inputs(1, 5, 4, 16, 2, 16)
    for i in (2, 5, 6):  # A, D, dt_bias
        given[i] = torch.stack([given[i], torch.full_like(given[i], math.nan)], dim=1)[:, 0]
    compare(given)


def test_time_step_limit(small_tiles):
    given, _ = inputs(1, 40, 4, 16, 2, 16)
    compare(given, limit=(0.05, 0.3))


def test_softplus_keeps_its_digits(small_tiles):
    """Steps of 1e-9: log(1 + e^v) in float32 would be zero."""
    given, _ = inputs(1, 20, 2, 16, 1, 16, initial=False)
    given[1] = given[1] - 20
    compare(given)


def test_fast_decay_and_slow(small_tiles):
    """Decays beyond float32's range in a few tokens, beside a head that never forgets."""
    given, _ = inputs(1, 60, 4, 16, 2, 16)
    given[2] = torch.tensor([-400.0, -1e-6, -40.0, -1.0])
    compare(given)


def test_a_step_of_zero_hides_a_token(small_tiles):
    given, _ = inputs(1, 40, 2, 16, 1, 16, bias=False)
    given[1][:, 7:19] = 0
    compare(given)


def test_everything_is_written(small_tiles, monkeypatch):
    """All buffers start as NaN: what a kernel leaves out would show."""

    def poisoned(*size, **kwargs):
        return real(*size, **kwargs).fill_(math.nan)

    real = torch.empty
    monkeypatch.setattr(torch, "empty", poisoned)
    new_empty = torch.Tensor.new_empty

    def poisoned_like(t, *size, **kwargs):
        made = new_empty(t, *size, **kwargs)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned_like)
    compare(*inputs(2, 37, 4, 20, 2, 24, packed=True))


def fuzz(seeds):
    for seed in seeds:
        r = random.Random(seed)
        g, p, n, heads = r.choice([1, 2, 3]), r.randint(1, 40), r.randint(1, 40), r.choice([1, 2, 3])
        if DEVICE == "cuda":  # every new head or state size compiles nine kernels: a few of them, at full length
            p, n, heads = r.choice([(16, 16, 2), (20, 24, 1), (80, 128, 3), (64, 100, 2)])
        l = r.randint(1, 1000 if DEVICE == "cuda" else 20)
        given = inputs(r.choice([1, 1, 2]), l, g * heads, p, g, n, *[r.random() < 0.5 for _ in range(4)], seed=seed)
        compare(*given, sums=5 if l > 100 else 1)


def test_fuzz(small_tiles):
    fuzz(range(40))


@pytest.mark.slow
def test_fuzz_at_length(small_tiles):
    fuzz(range(1000, 1300))


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU: 16-bit numbers, real sizes
# ---------------------------------------------------------------------------------------------------------------------

REAL = [(1, 4096, 32, 80, 8, 128), (2, 2048, 16, 64, 1, 64), (1, 3000, 8, 128, 2, 256), (3, 1111, 6, 24, 3, 100)]


def on_gpu(shape, dtype, packed):
    """Inputs as a trained layer has them: steps of 0.001 to 0.1, A of 1 to 16. What the kernel takes is in `dtype`."""
    b, l, h, p, g, n = shape
    given, seq_idx = inputs(b, l, h, p, g, n, packed, dtype=dtype)
    r = torch.Generator().manual_seed(2)
    step = torch.empty(h).uniform_(math.log(1e-3), math.log(1e-1), generator=r).exp()
    given[1] = (given[1] + 2) / 2
    given[2] = -torch.empty(h).uniform_(1, 16, generator=r)
    given[6] = step + torch.log(-torch.expm1(-step))
    given = [t.cuda() for t in given]
    return given, None if seq_idx is None else seq_idx.cuda()


def in_16_bits(given, dtype):
    return [t.to(dtype) if i in (0, 1, 3, 4) else t for i, t in enumerate(given)]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", REAL, ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-4)])
@pytest.mark.parametrize("packed", [False, True])
def test_real_sizes(shape, dtype, tolerance, packed):
    """Against the chunked form in float64, which the recurrence vouches for."""

    def chunked(given, seq_idx, limit):
        x, dt, A, B, C, D, bias, initial = given
        return ssd_chunked(x, F.softplus(dt + bias).clamp(*limit), A, B, C, D, initial, seq_idx, 64)

    given, seq_idx = on_gpu(shape, dtype, packed)
    limit = (0.0, math.inf)
    want = gradients(chunked, [t.double() for t in given], seq_idx, limit)
    got = gradients(triton, in_16_bits(given, dtype), seq_idx, limit)
    for name, a, b in zip(["y", "final state"] + NAMES, got, want):
        error = ((a.double() - b).norm() / b.norm()).item()
        assert error < (5 * tolerance if name in ("A", "dt_bias") else tolerance), f"{name}: {error:.1e}"


@pytest.mark.gpu
def test_two_runs_agree_to_the_bit():
    given, seq_idx = on_gpu(REAL[0], torch.bfloat16, True)
    given = in_16_bits(given, torch.bfloat16)
    first, second = (gradients(triton, given, seq_idx, (0.0, math.inf)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    """131,072 tokens inside rows of 22,656: the end of the row is the same as when it stands alone after its state."""
    l, h, p, g, n = 131072, 128, 80, 8, 128
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    torch.manual_seed(0)
    wide = torch.randn(1, l, 22656, device="cuda", dtype=torch.bfloat16)
    _, x, B, C, dt = wide.split([h * p, h * p, g * n, g * n, h], dim=-1)
    x, B, C = x.unflatten(-1, (h, p)), B.unflatten(-1, (g, n)), C.unflatten(-1, (g, n))
    A, D, bias = -torch.rand(h, device="cuda") - 0.5, torch.randn(h, device="cuda"), torch.randn(h, device="cuda") - 4
    scan = lambda s, S: fast.ssd(x[:, s], dt[:, s], A, B[:, s], C[:, s], D, S, None, None, bias)
    with torch.no_grad():
        y, final = scan(slice(None), None)
        _, state = scan(slice(0, l - 1024), None)
        end, end_state = scan(slice(l - 1024, l), state)
    assert torch.allclose(y[:, -1024:].float(), end.float(), atol=0.1, rtol=0.02)
    assert torch.allclose(final, end_state, atol=1e-2, rtol=1e-3)


def bad(**changes):
    names = ["x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state"]
    given = dict(zip(names, inputs(1, 5, 4, 16, 2, 16)[0]))
    given.update(changes)
    fast.ssd(**given)


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(x=torch.zeros(1, 5, 4, 129)), "head_dim 129"),
        (dict(B=torch.zeros(1, 5, 2, 257), C=torch.zeros(1, 5, 2, 257)), "state size 257"),
        (dict(x=torch.zeros(1, 5, 4, 16).double()), "float64"),
        (dict(B=torch.zeros(1, 5, 3, 16), C=torch.zeros(1, 5, 3, 16)), "4 heads in 3 groups"),
        (dict(dt=torch.zeros(1, 4, 4)), "dt must have shape"),
        (dict(initial_state=torch.zeros(1, 4, 16, 17)), "initial_state must have shape"),
        (dict(x=torch.zeros(1, 0, 4, 16)), "at least 1 token"),
    ],
)
def test_bad_input(changes, says):
    with pytest.raises(ValueError, match=says) as caught:
        bad(**changes)
    assert "\n" not in str(caught.value)
