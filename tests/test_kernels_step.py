"""A decode step made of kernels against the plain one: block by block, then the whole model, over several tokens.

Without a CUDA device Triton's interpreter runs the kernels (tests/conftest.py).
"""

import copy
from dataclasses import replace

import pytest
import torch
from reference import THREE_GROUPS, ours

pytest.importorskip("triton")

from model import PRESETS, build
from quantize import Int8Linear, quantize_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BIASES = dict(use_bias=True, mlp_bias=True, attention_bias=True)
LONGEST = 19
LENGTHS = [0, 16, 3]  # of the rows, before the first step
SHAPES = {
    "two groups": dict(hybrid_override_pattern="M*-"),
    "three groups": THREE_GROUPS | dict(hybrid_override_pattern="*-M"),
    "biases": dict(hybrid_override_pattern="-M*", **BIASES),
}


def twins(int8=False, **overrides):
    """The same model twice: torch, and triton."""
    plain = ours(**overrides).eval().to(DEVICE)
    plain = quantize_(plain) if int8 else plain
    return plain.use("torch"), copy.deepcopy(plain).use("triton")


def caches(model):
    """Two equal caches for rows of LENGTHS; keys and values from there on are large, so that nobody overlooks them."""
    torch.manual_seed(1)
    cache = model.new_cache(len(LENGTHS), LONGEST)
    for layer in filter(None, cache.layers):
        for tensor in vars(layer).values():
            tensor.normal_()
        if hasattr(layer, "k"):
            for row, length in enumerate(LENGTHS):
                layer.k[row, :, length:] = layer.v[row, :, length:] = 1e4
    return cache, copy.deepcopy(cache)


def error(ours, theirs):
    """The worst row's |ours - theirs| / |theirs|; NaN is never close."""
    off, size = (t.double().flatten(1).norm(dim=1) for t in (ours - theirs, theirs))
    assert off.isfinite().all()
    return (off / size).max().item()


def same(ours, theirs):
    """Two layers' caches; where nobody has written, to the bit."""
    for name in vars(theirs):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert torch.equal(a == 1e4, b == 1e4), name
        assert error(a.masked_fill(a == 1e4, 0), b.masked_fill(b == 1e4, 0)) < 5e-6, name


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_every_block_is_its_plain_twin(shape, int8):
    """Each by itself, on streams of its own."""
    plain, fast = twins(int8, **SHAPES[shape])
    assert int8 == any(isinstance(module, Int8Linear) for module in fast.modules())
    lengths = torch.tensor(LENGTHS, device=DEVICE)
    mask = (torch.arange(LONGEST, device=DEVICE) <= lengths[:, None])[:, None, None]
    theirs, ours_ = caches(plain)
    for a, b, cache_a, cache_b in zip(plain.backbone.layers, fast.backbone.layers, theirs.layers, ours_.layers):
        x = torch.randn(len(LENGTHS), plain.config.hidden_size, device=DEVICE)
        y, expected = b.step(x, cache_b, lengths, None), a.step(x, cache_a, lengths, mask)
        assert y.dtype == x.dtype and error(y - x, expected - x) < 1e-5, a.letter
        if cache_a is not None:
            same(cache_b, cache_a)


@pytest.mark.parametrize("shape, int8", [("two groups", False), ("three groups", True), ("biases", True)])
@torch.inference_mode()
def test_steps_of_the_model(shape, int8):
    plain, fast = twins(int8, **SHAPES[shape])
    theirs, ours_ = caches(plain)
    for i in range(3):  # the longest row's last token fills the cache
        tokens = torch.randint(0, 263, (len(LENGTHS),), device=DEVICE)
        lengths = torch.tensor(LENGTHS, device=DEVICE) + i
        logits, expected = (
            fast.step(tokens, ours_, lengths, LONGEST - 1),
            plain.step(tokens, theirs, lengths, LONGEST - 1),
        )
        assert logits.dtype == torch.float32 and logits.shape == (len(LENGTHS), 263)
        assert error(logits, expected) < 2e-5, i
    for a, b in zip(ours_.layers, theirs.layers):
        if a is not None:
            same(a, b)


@torch.inference_mode()
def test_biases_make_a_difference():
    """Else the tests above could not see one that is forgotten."""
    plain, _ = twins(**SHAPES["biases"])
    tokens, lengths = torch.tensor([1, 2, 3], device=DEVICE), torch.tensor(LENGTHS, device=DEVICE)
    logits = lambda: plain.step(tokens, caches(plain)[0], lengths, LONGEST - 1)
    before, names = logits(), [f"{name}_proj.bias" for name in "in out up down q k v o".split()]
    for name, parameter in plain.named_parameters():
        if name.endswith(tuple(names)):
            names = [n for n in names if not name.endswith(n)]
            kept = parameter.clone()
            parameter.zero_()
            assert error(logits(), before) > 1e-3, name
            parameter.copy_(kept)
    assert not names


@torch.inference_mode()
def test_plain_prefill_then_fast_steps_equal_the_full_forward():
    plain, fast = twins()
    ids = torch.randint(0, 263, (1, 15), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    full, cache = plain(ids), plain.new_cache(1, 15)
    plain(ids[:, :13], cache)
    for i in (13, 14):
        logits = fast.step(ids[:, i], cache, torch.tensor([i], device=DEVICE), 14)
        assert error(logits, full[:, i]) < 2e-5


@torch.inference_mode()
def test_more_rows_than_a_kernel_takes():
    """65 rows: the products are the plain ones, the rest still the kernels."""
    plain, fast = twins(hybrid_override_pattern="-")
    tokens = torch.arange(65, device=DEVICE)
    expected = plain.step(tokens, plain.new_cache(65, 4), 0 * tokens, 3)
    assert error(fast.step(tokens, plain.new_cache(65, 4), 0 * tokens, 3), expected) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("b", [1, 16, 64])
@torch.inference_mode()
def test_bfloat16_at_the_width_of_the_9b_is_as_good_as_the_plain_step(b, int8):
    torch.manual_seed(0)
    plain = build(replace(PRESETS["nano-9b"], hybrid_override_pattern="M*-", vocab_size=70000), "cuda", torch.bfloat16)
    plain = quantize_(plain) if int8 else plain
    fast, exact = copy.deepcopy(plain).use("triton"), copy.deepcopy(plain).float()
    cache = plain.new_cache(b, 300)
    for layer in filter(None, cache.layers):
        for tensor in vars(layer).values():
            tensor.normal_()
    wide = copy.deepcopy(cache)
    for layer in filter(None, wide.layers):
        for name, tensor in vars(layer).items():
            setattr(layer, name, tensor.float())
    tokens, lengths = torch.randint(0, 70000, (2, b), device=DEVICE)
    lengths %= 300
    expected = exact.step(tokens, wide, lengths, 299)
    plain_error = error(plain.step(tokens, copy.deepcopy(cache), lengths, 299), expected)
    assert error(fast.step(tokens, cache, lengths, 299), expected) < min(3e-2, 1.3 * plain_error)
