"""Grouped-query attention without positions, and its key/value cache.

A hybrid keeps a few attention layers for the one thing a fixed-size state cannot do: look back at any earlier token,
exactly, however long ago. There is no rotary embedding and no position of any kind (the Mamba layers tell tokens apart
by order), no bias, no normalisation of queries and keys, no window. In the released models 40 query heads share 8
key/value heads, and the query width (40 * 128 = 5120) is independent of the hidden size (4480 in the 9B).
Source: report section 2.1; tensor layout as in the released checkpoints. This file must not know Mamba.

The arithmetic is PyTorch's `scaled_dot_product_attention`, which picks the fastest kernel at hand; `attend_explicit`
below is the same thing in ten lines, for reading and for the tests.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right


def attend_explicit(q, k, v, mask):
    """What scaled_dot_product_attention(enable_gqa=True) computes, spelled out.

    q (b, heads, l, e); k, v (b, kv_heads, m, e); mask broadcastable to (b, 1, l, m), True where a query may look.
    Returns (b, heads, l, e). Query head j reads key/value head j // (heads / kv_heads).
    """
    repeat = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(repeat, dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (b, heads, l, m)
    scores = scores.float().masked_fill(~mask, -math.inf)
    return (scores.softmax(-1) @ v.float()).to(q.dtype)


class KVCache:
    """Keys and values of one layer for `max_length` positions: (b, kv_heads, max_length, e), in the model's dtype."""

    def __init__(self, batch_size, kv_heads, max_length, head_dim, device, dtype):
        shape = (batch_size, kv_heads, max_length, head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)

    def append(self, start, k, v):
        """Write k, v (b, kv_heads, l, e) at `start`; return everything up to and including them."""
        end = start + k.shape[2]
        self.k[:, :, start:end] = k
        self.v[:, :, start:end] = v
        return self.k[:, :, :end], self.v[:, :, :end]

    def put(self, row, other, other_row, skip):
        """Become, in one row, a row of another cache without its first `skip` positions."""
        length = other.k.shape[2] - skip
        self.k[row, :, :length] = other.k[other_row, :, skip:]
        self.v[row, :, :length] = other.v[other_row, :, skip:]


class Attention(nn.Module):
    """One attention layer without its pre-norm and residual: (b, l, d) -> (b, l, d)."""

    def __init__(self, hidden_size, num_heads, num_kv_heads, head_dim, bias=False):
        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_attention_heads {num_heads} must be a multiple of num_key_value_heads {num_kv_heads}; "
                f"got {num_heads} % {num_kv_heads} = {num_heads % num_kv_heads}"
            )
        self.head_dim, self.kv_heads = head_dim, num_kv_heads
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)

    def _heads(self, u):
        """q (b, heads, l, e); k, v (b, kv_heads, l, e) of u (b, l, d)."""
        return (
            proj(u).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )

    def step(self, u, cache, lengths, mask):
        """One token a row, at position lengths[i] of row i: u (b, 1, d), lengths (b,) -> (b, 1, d). mask (b, 1, 1, m)
        says which of the first m cached positions are the row's own, the new one among them."""
        q, k, v = self._heads(u)
        rows, m = torch.arange(len(u), device=u.device), mask.shape[-1]
        cache.k[rows, :, lengths] = k[:, :, 0]
        cache.v[rows, :, lengths] = v[:, :, 0]
        k, v = cache.k[:, :, :m], cache.v[:, :, :m]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(-2))

    def forward(self, u, cache=None, start=0, mask=None):
        """u (b, l, d) -> (b, l, d).

        With a `cache`, u holds positions start .. start+l-1 and looks back at all cached ones. mask (b, 1, l, m) says
        who may look where; None means plain causal.
        """
        q, k, v = self._heads(u)
        if cache is not None:
            k, v = cache.append(start, k, v)
        l, m = q.shape[2], k.shape[2]
        causal = mask is None and l > 1
        if causal and l != m:  # several new tokens on a warm cache: token j sees m - l + j + 1 positions
            causal = False
            if u.device.type == "cuda" and not torch.is_grad_enabled():  # said in words, so that no mask need be made
                mask = causal_lower_right(l, m)
            else:
                mask = torch.ones(l, m, dtype=torch.bool, device=u.device).tril(m - l)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(-2))
