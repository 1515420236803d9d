"""kernels/mixer.py against the plain mixer, and the whole model with one and the other."""

import math
from dataclasses import replace

import pytest
import torch

import device
from mamba2 import Mamba2Mixer
from model import PRESETS, ModelConfig, build

pytest.importorskip("triton", reason="the Triton kernels need triton: pip install -r requirements-test.txt")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def mixers(seed=0, **changes):
    """The same random layer twice: plain in float64, and with Triton in float32. No parameter is left at 0 or 1."""
    torch.manual_seed(seed)
    sizes = dict(hidden_size=24, num_heads=4, head_dim=20, n_groups=2, state_size=16, conv_kernel=4) | changes
    plain = Mamba2Mixer(**sizes)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name in ("dt_bias", "A_log", "D", "norm.weight"):
                parameter.normal_(0 if name == "dt_bias" else 0.5, 0.5)
    fast = Mamba2Mixer(**sizes)
    fast.load_state_dict(plain.state_dict())
    fast.impl = "triton"
    return plain.double(), fast.to(DEVICE)


def close(a, b, tolerance=2e-5):
    error = (a.double().cpu() - b).norm() / b.norm().clamp_min(1e-6)
    assert error < tolerance, f"relative error {error:.1e}"


@pytest.mark.parametrize(
    "changes", [{}, dict(use_conv_bias=False), dict(time_step_limit=(0.1, 0.9)), dict(use_bias=True, n_groups=1)]
)
@pytest.mark.parametrize("packed", [False, True])
def test_forward_and_gradients(changes, packed):
    plain, fast = mixers(**changes)
    u, dy = torch.randn(2, 2, 19, 24)
    seq_idx = (torch.rand(2, 19) < 0.2).long().cumsum(1) if packed else None
    want_u, got_u = u.double().requires_grad_(), u.to(DEVICE).requires_grad_()
    want, got = plain(want_u, seq_idx=seq_idx), fast(got_u, seq_idx=None if seq_idx is None else seq_idx.to(DEVICE))
    close(got, want)
    want.backward(dy.double())
    got.backward(dy.to(DEVICE))
    close(got_u.grad, want_u.grad)
    for (name, a), b in zip(fast.named_parameters(), plain.parameters()):
        assert (a.grad is None) == (b.grad is None), name
        close(a.grad, b.grad, 1e-4)


@pytest.mark.parametrize("cuts", [[7, 1, 1, 10], [1, 1, 2, 15], [19]])
def test_state(cuts):
    """Any way to cut a row into calls gives the same outputs and leaves the same state."""
    plain, fast = mixers()
    u = torch.randn(2, 19, 24)
    state, plain_state = fast.new_state(2, DEVICE, torch.float32), plain.new_state(2, "cpu", torch.float64)
    with torch.no_grad():
        want = plain(u.double(), plain_state)
        got = torch.cat([fast(part.to(DEVICE), state) for part in u.split(cuts, dim=1)], dim=1)
    close(got, want)
    close(state.ssm, plain_state.ssm)
    close(state.window, plain_state.window)


def test_state_meets_a_document_edge():
    plain, fast = mixers()
    u = torch.randn(1, 12, 24)
    seq_idx = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2]])
    state, plain_state = fast.new_state(1, DEVICE, torch.float32), plain.new_state(1, "cpu", torch.float64)
    with torch.no_grad():
        want, got = plain(u.double(), plain_state, seq_idx), fast(u.to(DEVICE), state, seq_idx.to(DEVICE))
    close(got, want)
    close(state.ssm, plain_state.ssm)
    close(state.window, plain_state.window)


def test_whole_model():
    """Logits, left padding, prefill and steps with a cache: triton and torch agree."""
    config = ModelConfig(
        hidden_size=32, hybrid_override_pattern="M-M*M-", vocab_size=64, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, intermediate_size=64, mamba_num_heads=4, mamba_head_dim=20, n_groups=2, ssm_state_size=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = build(config, DEVICE)
    ids = torch.randint(0, 64, (2, 11), device=DEVICE)
    seq_idx = torch.tensor([[0] * 11, [-1] * 4 + [0] * 7], device=DEVICE)
    results = {}
    for impl in ("torch", "triton"):
        model.use(impl)
        with torch.no_grad():
            cache = model.new_cache(2, 20)
            logits = [model(ids, cache, seq_idx)] + [model(ids[:, i : i + 1], cache) for i in range(3)]
            results[impl] = torch.cat(logits + [model(ids, seq_idx=seq_idx)], dim=1)
    error = (results["triton"] - results["torch"]).abs().max()
    assert 0 < error < 1e-4, error  # not the same code, but the same function


def test_impl_is_chosen_with_a_reason(monkeypatch):
    cpu, why = torch.device("cpu"), "Triton needs a GPU"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert device.choose_impl("torch", cpu) == ("torch", "asked for")
    impl, reason = device.choose_impl("auto", cpu)
    assert impl == "torch" and why in reason
    with pytest.raises(ValueError, match=f"{why}.*use --impl torch"):
        device.choose_impl("triton", cpu)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert device.choose_impl("triton", cpu) == ("triton", "asked for")
    assert device.choose_impl("auto", cpu)[0] == "torch"  # the interpreter is for looking, not for working
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    assert device.choose_impl("auto", cpu) == ("torch", "the package triton is not installed")
    gpu = torch.device("cuda")
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert device.choose_impl("auto", gpu)[0] == "torch"
    with pytest.raises(ValueError, match="8.0 or newer"):
        device.choose_impl("triton", gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert device.choose_impl("auto", gpu)[0] == "triton" and device.choose_impl("torch", gpu)[0] == "torch"
    assert device.choose_impl("auto", gpu, PRESETS["nano-9b"], compiled=True)[0] == "triton"
    assert device.choose_impl("auto", gpu, PRESETS["nano-12m"], compiled=True)[0] == "torch"  # measured: RESULTS.md
    assert device.choose_impl("auto", gpu, PRESETS["nano-12m"])[0] == "triton"
    too_large = dict(mamba_head_dim=129, ssm_state_size=257, conv_kernel=5, head_dim=257, num_attention_heads=136)
    for change in ({name: size} for name, size in too_large.items()):
        config = replace(PRESETS["nano-9b"], **change)
        assert device.choose_impl("auto", gpu, config)[0] == "torch"
        with pytest.raises(ValueError, match=f"{list(change.values())[0]}.*use --impl torch"):
            device.choose_impl("triton", gpu, config)


def test_loss_of_a_step_is_finite_in_bfloat16():
    if DEVICE == "cpu":
        pytest.skip("bfloat16 arithmetic is wrong in Triton's interpreter")
    _, fast = mixers(head_dim=64, num_heads=8, state_size=128)
    with torch.autocast("cuda", torch.bfloat16):
        y = fast(torch.randn(2, 300, 24, device="cuda", requires_grad=True))
    y.float().square().mean().backward()
    assert all(math.isfinite(p.grad.norm()) for p in fast.parameters())
