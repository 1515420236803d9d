"""loss.py: the sliced loss is the plain one."""

import sys

import pytest
import torch

from loss import next_token_loss, plain_loss, sliced_loss


def both(b, l, d, vocab, size, dtype=torch.float64, seed=0, learned=None):
    """(total, nll, dx, dweight) of the plain form and of the sliced one."""
    torch.manual_seed(seed)
    x, weight = torch.randn(b, l, d, dtype=dtype), torch.randn(vocab, d, dtype=dtype)
    targets = torch.randint(0, vocab, (b, l))
    learned = torch.rand(b, l) < 0.6 if learned is None else torch.full((b, l), learned)
    results = []
    for form in (plain_loss, lambda *a: sliced_loss(*a, size=size)):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        total, nll = form(*leaves, targets, learned)
        (3 * total).backward()
        results.append((total.detach(), nll, *(t.grad for t in leaves)))
    return zip(("total", "nll", "dx", "dweight"), *results)


@pytest.mark.parametrize("size", [1, 11, 11 * 4, 11 * 7, 10**6])  # a slice of 1 token, 1, 4, 7 and all
@pytest.mark.parametrize("b, l", [(1, 1), (2, 7), (3, 5)])
def test_equal_to_the_plain_form(b, l, size):
    for name, plain, sliced in both(b, l, 6, 11, size):
        assert torch.allclose(plain.double(), sliced, rtol=1e-5, atol=1e-6), name  # the plain one sums in float32


def test_nothing_learned():
    for name, plain, sliced in both(2, 5, 6, 11, 22, learned=False):
        assert torch.allclose(plain.double(), sliced, rtol=1e-5, atol=1e-6), name


def test_autocast_takes_the_same_products():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 9, 16), torch.randn(40, 16)
    targets, learned = torch.randint(0, 40, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    grads = []
    for form in (plain_loss, lambda *a: sliced_loss(*a, size=40 * 4)):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        with torch.autocast("cpu", torch.bfloat16):
            total, nll = form(*leaves, targets, learned)
        total.backward()
        grads.append([nll] + [t.grad for t in leaves])
        assert all(t.dtype == torch.float32 for t in grads[-1])
    assert torch.allclose(grads[0][0], grads[1][0], rtol=1e-6)  # the same rounded logits
    for a, b in zip(grads[0][1:], grads[1][1:]):
        assert (a - b).norm() / a.norm() < 1e-2


def test_the_losses_carry_no_gradient_and_none_is_made_without_need():
    x, weight = torch.randn(1, 4, 8), torch.randn(16, 8)
    targets, learned = torch.randint(0, 16, (1, 4)), torch.ones(1, 4, dtype=torch.bool)
    total, nll = sliced_loss(x, weight, targets, learned)
    assert not total.requires_grad
    total, nll = sliced_loss(x.requires_grad_(), weight, targets, learned)
    assert total.requires_grad and not nll.requires_grad
    assert torch.allclose(total, nll.sum())


def test_the_choice_on_a_cpu_is_the_plain_form():
    x, weight = torch.randn(1, 4, 8), torch.randn(16, 8)
    targets, learned = torch.randint(0, 16, (1, 4)), torch.ones(1, 4, dtype=torch.bool)
    total, nll = next_token_loss(x, weight, targets, learned)
    assert torch.equal(total, plain_loss(x, weight, targets, learned)[0])


@pytest.mark.gpu
def test_memory_on_a_gpu():
    """The peak stays near one slice, where the plain form needs several times all logits."""
    x = torch.randn(1, 16384, 256, device="cuda", requires_grad=True)
    weight = torch.randn(32768, 256, device="cuda", requires_grad=True)
    targets = torch.randint(0, 32768, (1, 16384), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16):
        total, _ = next_token_loss(x, weight, targets, torch.ones_like(targets, dtype=torch.bool))
    total.backward()
    assert torch.cuda.max_memory_allocated() - before < 1.5e9  # all logits in float32 are 2.1e9


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("size", [None, 40, 40 * 4])  # all tokens at once, one, four
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_takes_the_same_slices(dtype, size):
    """Its slices hold logits and gradients in the products' dtype; the plain form rounds at the same places."""
    pytest.importorskip("triton")
    torch.manual_seed(0)
    x, weight = torch.randn(2, 9, 16, device=DEVICE).to(dtype), torch.randn(40, 16, device=DEVICE).to(dtype)
    targets, learned = torch.randint(0, 40, (2, 9), device=DEVICE), torch.rand(2, 9, device=DEVICE) < 0.6
    results = []
    for form in (plain_loss, lambda *a: sliced_loss(*a, impl="triton", size=size)):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        total, nll = form(*leaves, targets, learned)
        (3 * total).backward()
        results.append((total.detach(), nll, *(t.grad for t in leaves)))
    for name, a, b in zip(("total", "nll", "dx", "dweight"), *results):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        limit = 1e-5 if dtype == torch.float32 or name in ("total", "nll") else 2e-3
        assert (a - b).float().norm() <= limit * a.float().norm(), name


def test_torch_never_runs_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels.cross_entropy", None)  # importing it now is an ImportError
    monkeypatch.delattr("kernels.cross_entropy", raising=False)
    x, weight = torch.randn(1, 4, 8), torch.randn(16, 8)
    targets, learned = torch.randint(0, 16, (1, 4)), torch.ones(1, 4, dtype=torch.bool)
    total, _ = sliced_loss(x, weight, targets, learned)
    assert torch.allclose(total, plain_loss(x, weight, targets, learned)[0])
    with pytest.raises(ImportError):
        sliced_loss(x, weight, targets, learned, impl="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_gradients_of_bfloat16_products_on_a_gpu(impl):
    """Several slices, each added to the weight's gradient; against float64. bfloat16 rounds logits and gradients."""
    torch.manual_seed(0)
    x, weight = torch.randn(1, 4096, 512, device="cuda"), 0.05 * torch.randn(32768, 512, device="cuda")
    targets, learned = torch.randint(0, 32768, (1, 4096), device="cuda"), torch.rand(1, 4096, device="cuda") < 0.6
    grads = []
    for form, dtype in ((plain_loss, torch.float64), (lambda *a: sliced_loss(*a, impl=impl, size=2**25), None)):
        leaves = [t.to(dtype or t.dtype).requires_grad_() for t in (x, weight)]
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype is None):
            total, _ = form(*leaves, targets, learned)
        total.backward()
        grads.append([t.grad for t in leaves])
    for a, b in zip(*grads):
        assert (a - b).norm() < 2e-2 * a.norm()


@pytest.mark.gpu
def test_triton_needs_no_more_than_its_slice():
    x = torch.randn(1, 16384, 256, device="cuda", requires_grad=True)
    weight = torch.randn(32768, 256, device="cuda", requires_grad=True)
    targets = torch.randint(0, 32768, (1, 16384), device="cuda")
    learned = torch.ones_like(targets, dtype=torch.bool)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16):
        total, _ = next_token_loss(x, weight, targets, learned, impl="triton")
    total.backward()
    assert torch.cuda.max_memory_allocated() - before < 0.6e9  # a slice is 0.27e9, all logits in bfloat16 1.07e9
