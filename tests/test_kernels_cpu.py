"""The CPU twins against the plain forms of mamba2.py: outputs, states and every gradient, on ugly sizes."""

import pytest
import torch

import mamba2
from kernels import cpu
from mamba2 import causal_conv1d, ssd_chunked, ssd_recurrent


def documents(b, l, seed):
    """Runs of random lengths, one token included; -1 first in row 0, as for left padding."""
    generator = torch.Generator().manual_seed(seed)
    edges = torch.rand(b, l, generator=generator) < 0.25
    ids = edges.int().cumsum(1)
    ids[0, : l // 3] = -1
    return ids


def scan_inputs(b, l, h, p, g, n, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(b, l, h, p, dtype=dtype)
    dt = torch.nn.functional.softplus(torch.randn(b, l, h, dtype=dtype) * 2 - 2)
    A = -torch.rand(h, dtype=dtype) * 4 - 0.1
    B, C = torch.randn(2, b, l, g, n, dtype=dtype)
    return [t.requires_grad_() for t in (x, dt, A, B, C, torch.randn(h, dtype=dtype))]


def compare(form, reference, inputs, tolerance, **options):
    """Outputs, final state and all gradients of two forms on the same inputs and the same upstream gradients."""
    results = []
    for f in (form, reference):
        y, S = f(*inputs, **options)
        torch.manual_seed(1)
        loss = (y * torch.randn(y.shape, dtype=y.dtype)).sum() + (S * torch.randn(S.shape, dtype=S.dtype)).sum()
        results.append([y, S, *torch.autograd.grad(loss, [t for t in inputs if t.requires_grad])])
    for ours, theirs in zip(*results):
        assert (ours - theirs).norm() <= tolerance * (1 + theirs.norm())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("l", [1, 7, 8, 9, 26])
@pytest.mark.parametrize("h, p, g, n", [(6, 20, 2, 7), (6, 5, 3, 16), (4, 24, 4, 9)])
def test_scan_equals_the_recurrence(l, h, p, g, n, packed):
    inputs = scan_inputs(2, l, h, p, g, n)
    options = dict(seq_idx=documents(2, l, 3) if packed else None, chunk_size=8)
    compare(cpu.ssd, ssd_recurrent, inputs, 1e-11, **options)


@pytest.mark.parametrize("packed", [False, True])
def test_scan_with_an_initial_state_and_across_segments(monkeypatch, packed):
    monkeypatch.setattr(mamba2, "CHUNKS_PER_SEGMENT", 2)
    inputs = scan_inputs(2, 61, 6, 12, 3, 10)
    S0 = torch.randn(2, 6, 12, 10, dtype=torch.float64, requires_grad=True)
    seq_idx = documents(2, 61, 5) if packed else None

    def with_state(form):
        return lambda *t, **options: form(*t[:6], t[6], **options)

    compare(with_state(cpu.ssd), with_state(ssd_recurrent), [*inputs, S0], 1e-11, seq_idx=seq_idx, chunk_size=8)


def test_scan_gradient_of_the_state_alone():
    inputs = scan_inputs(1, 19, 4, 6, 2, 5)
    for form in (cpu.ssd, ssd_chunked):
        grads = torch.autograd.grad(form(*inputs, chunk_size=8)[1].sum(), inputs[:4])
        reference = torch.autograd.grad(ssd_recurrent(*inputs)[1].sum(), inputs[:4])
        for ours, theirs in zip(grads, reference):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_head_that_forgets_early_keeps_its_digits():
    """dt 10 for half the row, then nearly 0: a float32 running sum over the row would lose three digits."""
    torch.manual_seed(0)
    x, B, C = torch.randn(1, 2048, 2, 4), torch.randn(1, 2048, 2, 8), torch.randn(1, 2048, 2, 8)
    dt = torch.full((1, 2048, 2), 10.0)
    dt[:, 1024:] = 1e-4
    args = x, dt, torch.tensor([-1.0, -3.0]), B, C, torch.ones(2)
    exact = ssd_recurrent(*(t.double() for t in args))[1]
    for form in (cpu.ssd, ssd_chunked):
        error = (form(*args, chunk_size=128)[1].double() - exact).norm() / exact.norm()
        assert error < 3e-6, form


def test_bfloat16_scan_is_as_close_as_the_plain_one():
    wide = scan_inputs(2, 70, 4, 16, 2, 16, torch.float32)
    narrow = [t.detach().bfloat16() if i in (0, 3, 4) else t.detach() for i, t in enumerate(wide)]
    exact = ssd_recurrent(*(t.double() for t in narrow))[0]
    errors = [(form(*narrow, chunk_size=16)[0].double() - exact).norm() for form in (cpu.ssd, ssd_chunked)]
    assert errors[0] < 1.5 * errors[1] and errors[0] < 0.02 * exact.norm()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("l, k", [(1, 4), (2, 4), (5, 2), (300, 4), (130, 3), (9, 1)])
def test_convolution_equals_the_plain_one(l, k, bias, packed):
    torch.manual_seed(l)
    x = torch.randn(2, l, 6, dtype=torch.float64, requires_grad=True)
    window = torch.randn(2, k - 1, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 1, k, dtype=torch.float64, requires_grad=True)
    offset = torch.randn(6, dtype=torch.float64, requires_grad=True) if bias else None
    seq_idx = documents(2, l, 4) if packed else None
    leaves = [t for t in (x, window, weight, offset) if t is not None and t.numel()]
    results = []
    for form in (cpu.causal_conv1d, causal_conv1d):
        y, new = form(x, weight, offset, window, seq_idx)
        torch.manual_seed(2)
        loss = (y * torch.randn(y.shape, dtype=y.dtype)).sum() + (new * torch.randn(new.shape, dtype=new.dtype)).sum()
        results.append([y, new, *torch.autograd.grad(loss, leaves)])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_training_on_a_cpu_takes_the_twins_and_inference_does_not():
    x = torch.zeros(1)
    assert mamba2.training_forms(x) == (cpu.ssd, cpu.causal_conv1d)
    with torch.no_grad():
        assert mamba2.training_forms(x) == (ssd_chunked, causal_conv1d)
