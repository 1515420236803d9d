"""Attention against its ten explicit lines: grouped heads, masks, and a cache that takes any number of tokens."""

import pytest
import torch

from attention import Attention, KVCache, attend_explicit

D, HEADS, KV, E = 20, 6, 2, 12


def attention(dtype=torch.float64, bias=False):
    torch.manual_seed(0)
    return Attention(D, HEADS, KV, E, bias=bias).to(dtype)


def stream(l, b=2):
    return torch.randn(b, l, D, generator=torch.Generator().manual_seed(l), dtype=torch.float64)


def explicit(m, u, mask):
    """The layer written with attend_explicit."""
    q, k, v = (
        proj(u).view(*u.shape[:2], -1, E).transpose(1, 2) for proj in (m.q_proj, m.k_proj, m.v_proj)
    )  # fmt: skip
    y = attend_explicit(q, k, v, mask)
    return m.o_proj(y.transpose(1, 2).reshape(*u.shape[:2], HEADS * E))


def causal(l):
    return torch.ones(l, l, dtype=torch.bool).tril()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("l", [1, 2, 7, 33])
def test_sdpa_equals_explicit(l, bias):
    m, u = attention(bias=bias), stream(l).requires_grad_()
    y = m(u)
    # the explicit form computes its softmax in float32, so that is how close the two can be
    torch.testing.assert_close(y, explicit(m, u, causal(l)), rtol=1e-5, atol=1e-6)
    (fast,) = torch.autograd.grad(y.square().sum(), u)
    (slow,) = torch.autograd.grad(explicit(m, u, causal(l)).square().sum(), u)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_explicit_is_a_loop_over_heads():
    """Query head j reads key/value head j // (heads / kv_heads): here 0 0 0 1 1 1, not 0 1 0 1 0 1."""
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 5, E, generator=gen) for n in (HEADS, KV, KV))
    y = attend_explicit(q, k, v, causal(5))
    for j in range(HEADS):
        for t in range(5):
            scores = k[:, j // 3, : t + 1] @ q[:, j, t, :, None] / E**0.5  # (b, t+1, 1)
            expected = (scores.softmax(1) * v[:, j // 3, : t + 1]).sum(1)
            torch.testing.assert_close(y[:, j, t], expected, rtol=1e-5, atol=1e-6)


def test_layer_shares_heads_in_runs():
    """Silence key/value head 1: only query heads 3, 4, 5 may change."""
    m, u = attention(), stream(6)
    m.o_proj = torch.nn.Identity()  # the heads side by side
    before = m(u)
    with torch.no_grad():
        m.v_proj.weight[E:] = 0
    after = m(u)
    assert torch.equal(before[..., : 3 * E], after[..., : 3 * E])
    assert not after[..., 3 * E :].any() and before[..., 3 * E :].any()


@pytest.mark.parametrize("sizes", [(5, 4), (1, 8), (8, 1), (3, 3, 3), (2, 1, 1, 5), (1,) * 9], ids=str)
@torch.no_grad()
def test_cache_continues_with_any_number_of_tokens(sizes):
    m, u = attention(), stream(9)
    cache, start, parts = KVCache(2, KV, 12, E, "cpu", torch.float64), 0, []
    for n in sizes:
        parts.append(m(u[:, start : start + n], cache, start))
        start += n
    torch.testing.assert_close(torch.cat(parts, dim=1), m(u), rtol=1e-10, atol=1e-10)
    assert cache.k.shape == (2, KV, 12, E) and not cache.k[:, :, 9:].any()  # unrepeated, and no further than written


@torch.no_grad()
def test_mask_separates_documents():
    m, u = attention(), stream(9)
    ids = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 2], [5, 5, 5, 5, 5, 5, 5, 5, 6]])
    mask = (ids[:, :, None] == ids[:, None, :]).unsqueeze(1) & causal(9)
    y = m(u, mask=mask)
    torch.testing.assert_close(y, explicit(m, u, mask), rtol=1e-5, atol=1e-6)
    for row, start, end in ((0, 0, 3), (0, 3, 4), (0, 4, 9), (1, 0, 8), (1, 8, 9)):
        torch.testing.assert_close(y[row, start:end], m(u[row : row + 1, start:end])[0], rtol=1e-10, atol=1e-10)
    # the same, in two calls on a cache
    cache = KVCache(2, KV, 9, E, "cpu", torch.float64)
    first = m(u[:, :4], cache, 0, mask[:, :, :4, :4])
    second = m(u[:, 4:], cache, 4, mask[:, :, 4:])
    torch.testing.assert_close(torch.cat([first, second], dim=1), y, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_causal():
    m, u = attention(), stream(9)
    moved = u.clone()
    moved[:, 5] += 1
    before, after = m(u), m(moved)
    assert torch.equal(before[:, :5], after[:, :5])
    assert ((before - after)[:, 5:].abs().amax(-1) > 1e-4).all()  # and every later token does see it


@torch.no_grad()
def test_no_positions():
    """Without Mamba layers the order of the past is invisible: the last token's output survives any shuffle of it."""
    m, u = attention(), stream(9)
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4, 8])
    torch.testing.assert_close(m(u)[:, -1], m(u[:, order])[:, -1], rtol=1e-10, atol=1e-10)


def test_bfloat16_stays_bfloat16():
    m, u = attention(torch.bfloat16), stream(9).bfloat16()
    y = m(u)
    assert y.dtype == torch.bfloat16
    exact = attention()  # the same weights, not yet rounded
    torch.testing.assert_close(y.double(), exact(stream(9)), rtol=0.05, atol=0.02)


def test_heads_must_divide():
    with pytest.raises(ValueError, match="num_attention_heads 5 must be a multiple of num_key_value_heads 2.* = 1"):
        Attention(8, 5, 2, 4)
