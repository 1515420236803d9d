"""Cutting: what must change nothing changes nothing, tensors are sliced where they should be, counts are the formula's.

Identities in float64, with two and three groups, heads of 20 and 12 channels and layers of one kind side by side.
"""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from disk import largest_file
from reference import THREE_GROUPS, TINY, neutralise_dt_floor, ours
from safetensors.torch import load_file
from scripted import ours_vocabulary, released_vocabulary

import calibration
import data
import prune
from checkpoint import load_pretrained, save_pretrained
from importance import RANKS, Importance, depth_order, importance
from model import PRESETS, ModelConfig, NemotronH, RMSNorm
from prune import CUT, Plan, compare_patterns, cut, make_plan, pick, target_config
from quantize import quantize_
from sizes import count_parameters

IDS = torch.randint(0, 263, (2, 37), generator=torch.Generator().manual_seed(5))
LONG = THREE_GROUPS | dict(hybrid_override_pattern="M-M*-MM-*-M", mamba_num_heads=12)
BIASED = LONG | dict(use_bias=True, mlp_bias=True, attention_bias=True)
KINDS = [{}, LONG, BIASED]


def model(dtype=torch.float64, **overrides):
    return ours(dtype, **overrides).eval()


def identity(m):
    """The plan that cuts nothing."""
    return make_plan(m.config, m.config, ())


def shuffled(n, seed=0):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def off(a, b):
    """How far apart the logits of two models are, in units of their spread."""
    with torch.no_grad():
        a, b = a(IDS), b(IDS)
    return ((a - b).abs().max() / a.std()).item()


def random_scores(config, removed=(), seed=0):
    g, pattern = torch.Generator().manual_seed(seed), config.hybrid_override_pattern
    kept = [(i, letter) for i, letter in enumerate(pattern) if i not in removed]
    draw = lambda *shape: torch.rand(shape, generator=g, dtype=torch.float64) + 0.1
    return Importance(
        draw(config.hidden_size),
        {i: draw(config.intermediate_size) for i, letter in kept if letter == "-"},
        {i: draw(config.mamba_num_heads, config.mamba_head_dim) for i, letter in kept if letter == "M"},
    )


def smaller(config, heads=None):
    """Ugly sizes below the config's."""
    r = config.mamba_num_heads // config.n_groups
    return replace(
        config, hidden_size=config.hidden_size - 11, intermediate_size=config.intermediate_size - 31,
        mamba_num_heads=heads or (r - 1) * config.n_groups, mamba_head_dim=config.mamba_head_dim - 5,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What must change nothing
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", KINDS)
def test_cutting_nothing_is_a_copy(overrides):
    m = model(**overrides)
    copy = cut(m, identity(m))
    assert copy.config == m.config and off(m, copy) == 0 and not copy.training
    for (name, a), (other, b) in zip(m.named_parameters(), copy.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b) and a.data_ptr() != b.data_ptr() and b.requires_grad


@torch.no_grad()
@pytest.mark.parametrize("overrides", KINDS)
def test_removing_layers_is_skipping_them(overrides):
    m = model(**overrides)
    pattern = m.config.hybrid_override_pattern
    for removed in ((0,), (len(pattern) - 1,), (1, 3), tuple(range(1, len(pattern)))):
        small = cut(m, make_plan(m.config, m.config, removed))
        x = m.backbone.embeddings(IDS)
        for i, block in enumerate(m.backbone.layers):
            x = x if i in removed else block(x)
        assert torch.equal(small(IDS), m.lm_head(m.backbone.norm_f(x)).float())
        assert small.config.hybrid_override_pattern == "".join(c for i, c in enumerate(pattern) if i not in removed)


@pytest.mark.parametrize("overrides", KINDS)
def test_neurons_that_are_zero_go_without_a_trace(overrides):
    m = model(**overrides)
    plan, wanted = identity(m), m.config.intermediate_size - 9
    for seed, i in enumerate(plan.neurons):
        mlp, dead = m.backbone.layers[i].mixer, shuffled(m.config.intermediate_size, seed)[wanted:]
        mlp.up_proj.weight.data[dead] = 0
        if mlp.up_proj.bias is not None:
            mlp.up_proj.bias.data[dead] = 0
        alive = torch.ones(m.config.intermediate_size, dtype=torch.bool)
        alive[dead] = False
        plan.neurons[i] = alive.nonzero().flatten()
    plan.config = replace(m.config, intermediate_size=wanted)
    assert off(m, cut(m, plan)) < 1e-10
    scores = importance(m, [(IDS, None)])  # and the ranking finds them
    found = make_plan(m.config, plan.config, (), scores)
    assert all(torch.equal(found.neurons[i], kept) for i, kept in plan.neurons.items())


@pytest.mark.parametrize("overrides", KINDS)
@pytest.mark.parametrize("axis", ["neurons", "hidden", "channels"])
def test_channels_may_change_places(overrides, axis):
    m = model(**overrides)
    plan, c = identity(m), m.config
    if axis == "hidden":
        plan.hidden = shuffled(c.hidden_size)
    else:
        size = c.intermediate_size if axis == "neurons" else c.mamba_head_dim
        setattr(plan, axis, {i: shuffled(size, i) for i in getattr(plan, axis)})
    moved = cut(m, plan)
    assert off(m, moved) < 1e-10
    assert not torch.equal(
        moved.backbone.layers[0].mixer.in_proj.weight, m.backbone.layers[0].mixer.in_proj.weight
    ) or (axis == "neurons")


@pytest.mark.parametrize("overrides", KINDS)
def test_heads_may_change_places_inside_a_group_and_nowhere_else(overrides):
    m = model(**overrides)
    plan, h, g = identity(m), m.config.mamba_num_heads, m.config.n_groups
    r = h // g
    plan.heads = {i: torch.cat([j * r + shuffled(r, i + j + 1) for j in range(g)]) for i in plan.heads}
    assert not all(torch.equal(heads, torch.arange(h)) for heads in plan.heads.values())
    assert off(m, cut(m, plan)) < 1e-10
    plan.heads = {i: torch.arange(h).roll(r) for i in plan.heads}  # every head to the next group
    assert off(m, cut(m, plan)) > 0.5


@pytest.mark.parametrize("overrides", KINDS)
def test_channels_of_the_stream_that_are_zero_go_when_the_norms_are_told(overrides):
    m = model(**overrides)
    d = m.config.hidden_size
    dead = shuffled(d)[: d // 4]
    with torch.no_grad():
        m.backbone.embeddings.weight[:, dead] = 0
        m.backbone.embeddings.weight *= 0.01  # a stream small enough for epsilon to count
        for block in m.backbone.layers:
            write = {"M": "out_proj", "*": "o_proj", "-": "down_proj"}[block.letter]
            getattr(block.mixer, write).weight[dead] = 0
            if getattr(block.mixer, write).bias is not None:
                getattr(block.mixer, write).bias[dead] = 0
    plan = identity(m)
    plan.hidden = torch.tensor(sorted(set(range(d)) - set(dead.tolist())))
    plan.config = replace(m.config, hidden_size=len(plan.hidden))
    assert off(m, cut(m, plan, rescale=True)) < 1e-10
    assert off(m, cut(m, plan)) > 1e-3
    found = make_plan(m.config, plan.config, (), importance(m, [(IDS, None)]))
    assert torch.equal(found.hidden, plan.hidden)


def test_one_norm_by_its_weight_and_epsilon():
    """The other way to say it: weight times sqrt(d / d'), epsilon times d / d'. A model's epsilon is the gated norms',
    too, so `cut` scales the stream instead."""
    x = torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.003
    x[:, 30:] = 0
    wide, narrow = RMSNorm(40, 1e-5).double(), RMSNorm(30, 1e-5 * 40 / 30).double()
    wide.weight.data = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
    narrow.weight.data = wide.weight.data[:30] * (40 / 30) ** 0.5
    assert torch.allclose(wide(x)[:, :30], narrow(x[:, :30]), rtol=1e-12, atol=0)
    narrow.eps = 1e-5
    assert not torch.allclose(wide(x)[:, :30], narrow(x[:, :30]), rtol=1e-3, atol=0)


def test_a_head_that_writes_nothing_still_matters():
    """It is part of its group's RMS. Only a head whose gated output is zero, in a norm that is told, could go."""
    m = model(hybrid_override_pattern="M-")
    c, mixer = m.config, m.backbone.layers[0].mixer
    mixer.out_proj.weight.data.view(c.hidden_size, c.mamba_num_heads, -1)[:, [0, 4]] = 0  # one in each group
    plan = identity(m)
    plan.heads[0] = torch.tensor([1, 2, 3, 5, 6, 7])
    plan.config = replace(c, mamba_num_heads=6)
    assert off(m, cut(m, plan)) > 1e-3
    mixer.in_proj.weight.data[: c.mamba_inner].view(c.mamba_num_heads, -1)[[0, 4]] = 0  # z = 0: y * silu(z) = 0
    small = cut(m, plan)
    small.backbone.layers[0].mixer.norm.weight.data *= (8 / 6) ** 0.5
    small.backbone.layers[0].mixer.norm.eps *= 8 / 6
    assert off(m, small) < 1e-10


# ---------------------------------------------------------------------------------------------------------------------
# Which numbers stay
# ---------------------------------------------------------------------------------------------------------------------


def labelled(m):
    """Every number is its place in its tensor, so that a slice can be told from any other."""
    for p in m.parameters():
        p.data = torch.arange(p.numel(), dtype=p.dtype).view(p.shape)
    return m


@pytest.mark.parametrize("overrides", KINDS)
def test_every_tensor_is_sliced_where_it_should_be(overrides):
    m = labelled(model(**overrides))
    c, removed = m.config, (1, 2)
    plan = make_plan(c, smaller(c), removed, random_scores(c, removed))
    small, d = cut(m, plan), plan.hidden
    assert plan.layers == [i for i in range(c.num_hidden_layers) if i not in removed]
    assert torch.equal(small.backbone.embeddings.weight, m.backbone.embeddings.weight[:, d])
    assert torch.equal(small.lm_head.weight, m.lm_head.weight[:, d])
    assert torch.equal(small.backbone.norm_f.weight, m.backbone.norm_f.weight[d])
    seen = 3
    for number, new in zip(plan.layers, small.backbone.layers, strict=True):
        old = m.backbone.layers[number]
        assert new.letter == old.letter and torch.equal(new.norm.weight, old.norm.weight[d])
        a, b = old.mixer, new.mixer
        wanted = {}
        if old.letter == "-":
            n = plan.neurons[number]
            wanted = {"up_proj.weight": a.up_proj.weight[n][:, d], "down_proj.weight": a.down_proj.weight[d][:, n]}
            if a.up_proj.bias is not None:
                wanted |= {"up_proj.bias": a.up_proj.bias[n], "down_proj.bias": a.down_proj.bias[d]}
        elif old.letter == "*":
            wanted = {f"{x}_proj.weight": getattr(a, f"{x}_proj").weight[:, d] for x in "qkv"}
            wanted |= {"o_proj.weight": a.o_proj.weight[d]}
            if a.q_proj.bias is not None:
                wanted |= {f"{x}_proj.bias": getattr(a, f"{x}_proj").bias for x in "qkv"}
                wanted |= {"o_proj.bias": a.o_proj.bias[d]}
        else:
            wanted = mamba_wanted(a, plan, number)
        assert wanted.keys() == dict(b.named_parameters()).keys()
        for name, tensor in wanted.items():
            assert torch.equal(b.get_parameter(name), tensor), (number, name)
        seen += 1 + len(wanted)
    assert seen == len(list(small.parameters()))


def mamba_wanted(a, plan, number):
    """By taking the tensors apart into heads and channels, and putting what stays together again."""
    h, p, d = plan.heads[number], plan.channels[number], plan.hidden
    sizes = [a.inner, a.inner, a.g * a.n, a.g * a.n, a.h]

    def some(t):  # (heads * channels, ...) -> what stays of it
        return t.unflatten(0, (a.h, a.p))[h][:, p].flatten(0, 1)

    def projected(t):
        z, x, B, C, dt = t.split(sizes)
        return torch.cat([some(z), some(x), B, C, dt[h]])

    def convolved(t):
        x, B, C = t.split(sizes[1:4])
        return torch.cat([some(x), B, C])

    wanted = {"in_proj.weight": projected(a.in_proj.weight)[:, d], "conv1d.weight": convolved(a.conv1d.weight),
              "conv1d.bias": convolved(a.conv1d.bias), "A_log": a.A_log[h], "D": a.D[h], "dt_bias": a.dt_bias[h],
              "norm.weight": some(a.norm.weight), "out_proj.weight": some(a.out_proj.weight.t()).t()[d]}  # fmt: skip
    if a.in_proj.bias is not None:
        wanted |= {"in_proj.bias": projected(a.in_proj.bias), "out_proj.bias": a.out_proj.bias[d]}
    return wanted


def test_groups_stay_and_become_narrower():
    m = model(**LONG)
    small = cut(m, make_plan(m.config, smaller(m.config), (), random_scores(m.config)))
    mixer = small.backbone.layers[0].mixer
    assert (mixer.g, mixer.norm.n_groups, mixer.n) == (3, 3, m.config.ssm_state_size)
    assert mixer.h == 9 and mixer.p == 7 and mixer.norm.weight.numel() // mixer.norm.n_groups == 21


@pytest.mark.parametrize("overrides", KINDS)
@pytest.mark.parametrize("rank", RANKS)
def test_as_many_heads_of_every_group(overrides, rank):
    c = ModelConfig(**(TINY | overrides))
    plan = make_plan(c, smaller(c), (), random_scores(c), rank)
    r = c.mamba_num_heads // c.n_groups
    for heads in plan.heads.values():
        assert torch.equal(heads, heads.sort().values)
        assert (heads // r).bincount(minlength=c.n_groups).tolist() == [r - 1] * c.n_groups


def test_what_is_kept_is_what_scores_most():
    c = replace(ModelConfig(**THREE_GROUPS), hybrid_override_pattern="M-")
    scores = random_scores(c)
    scores.mamba[0] = torch.zeros(6, 12)
    scores.mamba[0][:, 3:8] = torch.tensor([[1.0], [2.0], [6.0], [5.0], [3.0], [4.0]])
    scores.mamba[0][0, 11] = 4.0  # loud where nobody else is: not among the five channels, and no help to its head
    sizes = replace(c, mamba_num_heads=3, mamba_head_dim=5, intermediate_size=2, hidden_size=3)
    plan = make_plan(c, sizes, (), scores)
    assert plan.channels[0].tolist() == [3, 4, 5, 6, 7] and plan.heads[0].tolist() == [1, 2, 5]
    assert set(plan.hidden.tolist()) == set(scores.hidden.topk(3).indices.tolist())
    assert set(plan.neurons[1].tolist()) == set(scores.neurons[1].topk(2).indices.tolist())
    worst = make_plan(c, sizes, (), scores, "reversed")
    assert set(worst.neurons[1].tolist()) == set((-scores.neurons[1]).topk(2).indices.tolist())
    assert 3 not in worst.channels[0] and worst.hidden.tolist() != plan.hidden.tolist()


def test_heads_and_channels_are_ranked_by_their_norm():
    """Not by a sum: one loud number outweighs two of two thirds."""
    c = replace(ModelConfig(), hybrid_override_pattern="M", mamba_head_dim=2)  # four heads, two groups
    table = torch.tensor([[2.0, 2.0], [3.0, 0.0], [0.0, 0.1], [0.1, 0.1]])
    plan = make_plan(c, replace(c, mamba_num_heads=2), (), Importance(torch.ones(128), {}, {0: table}))
    assert plan.heads[0].tolist() == [1, 3]
    table = torch.tensor([[2.0, 3.0], [2.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    plan = make_plan(c, replace(c, mamba_head_dim=1), (), Importance(torch.ones(128), {}, {0: table}))
    assert plan.channels[0].tolist() == [1]


def test_pick():
    scores = torch.tensor([3.0, 1.0, 2.0, 2.0, 5.0])
    assert pick(scores, 3).tolist() == [0, 2, 4]  # of equals the first stays
    assert pick(scores, 3, "reversed").tolist() == [1, 2, 3]
    assert pick(scores, 5).tolist() == [0, 1, 2, 3, 4]
    draws = [pick(scores, 3, "random", torch.Generator().manual_seed(i)).tolist() for i in range(9)]
    assert draws == [pick(scores, 3, "random", torch.Generator().manual_seed(i)).tolist() for i in range(9)]
    assert len(set(map(tuple, draws))) > 3 and all(d == sorted(set(d)) and len(d) == 3 for d in draws)


def test_random_needs_no_scores_and_the_rest_does():
    c = ModelConfig(**LONG)
    a, b = (make_plan(c, smaller(c), (), None, "random", seed) for seed in (0, 1))
    assert not torch.equal(a.hidden, b.hidden)
    with pytest.raises(ValueError, match="needs scores"):
        make_plan(c, smaller(c), ())
    with pytest.raises(ValueError, match="'best' is not one of"):
        make_plan(c, c, (), None, "best")


@torch.no_grad()
def test_importance_beats_chance_and_chance_its_opposite():
    """Half of the neurons, of the heads and of the channels of each layer whisper; which, is shuffled."""
    m = model(**LONG)
    c = m.config
    for i, block in enumerate(m.backbone.layers):
        if block.letter == "-":
            block.mixer.up_proj.weight[shuffled(c.intermediate_size, i)[:56]] *= 0.05
        elif block.letter == "M":
            quiet = torch.cat([j * 4 + shuffled(4, i + j)[:2] for j in range(3)])
            x = block.mixer.in_proj.weight[c.mamba_inner : 2 * c.mamba_inner].view(12, 12, -1)
            x[quiet] *= 0.05
            block.mixer.conv1d.bias[: c.mamba_inner] = 0
    scores = importance(m, [(IDS, None)])
    whole = m(IDS)
    for sizes in (dict(intermediate_size=56), dict(mamba_num_heads=6)):
        lost = {}
        for rank in RANKS:
            plans = [make_plan(c, replace(c, **sizes), (), scores, rank, seed) for seed in range(3)]
            lost[rank] = sum((cut(m, plan)(IDS) - whole).square().mean().item() for plan in plans) / 3
        assert lost["ranked"] < 0.5 * lost["random"] and lost["random"] < lost["reversed"], (sizes, lost)


# ---------------------------------------------------------------------------------------------------------------------
# Counts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_count_is_the_formulas(overrides, dtype):
    m = model(dtype, **overrides)
    for block in m.backbone.layers:
        if block.letter == "M":
            block.mixer.A_log.data = block.mixer.A_log.data.float()  # as load_pretrained leaves it
    plan = make_plan(m.config, smaller(m.config), (0,), random_scores(m.config, (0,)))
    small = cut(m.train(), plan, rescale=True)
    assert sum(p.numel() for p in small.parameters()) == count_parameters(small.config)["total"]
    assert small.lm_head.weight.dtype == dtype and small.backbone.layers[1].mixer.norm.weight.dtype == dtype
    assert all(b.mixer.A_log.dtype == torch.float32 for b in small.backbone.layers if b.letter == "M")
    assert small.training and torch.isfinite(small(IDS)).all()


def test_a_plan_with_mistakes_is_caught(monkeypatch):
    m = model()
    plan = make_plan(m.config, smaller(m.config), (), random_scores(m.config))
    for axis, layer in (("neurons", 1), ("heads", 2), ("channels", 0)):
        wrong = Plan(**vars(plan) | {axis: getattr(plan, axis) | {layer: getattr(plan, axis)[layer][:-1]}})
        with pytest.raises(RuntimeError, match=rf"layers\.{layer}\..* came out as \(\d+.*; the config asks for \(\d+"):
            cut(m, wrong)
    with pytest.raises(RuntimeError, match="came out as"):  # nothing cut, though the config says so
        cut(m, replace(identity(m), config=plan.config))
    count = count_parameters(plan.config)["total"]
    monkeypatch.setattr(prune, "count_parameters", lambda config: {"total": count + 1})
    with pytest.raises(RuntimeError, match=rf"has {count:,} parameters and its config's formula gives {count + 1:,}"):
        cut(m, plan)


@pytest.mark.parametrize("source, target", [("nano-12m", "nano-9m"), ("nano-12b", "nano-9b")])
def test_the_presets_become_each_other(source, target):
    """Down to the last parameter, at full size without memory."""
    config, wanted = PRESETS[source], PRESETS[target]
    sizes, remove = target_config(config, wanted)
    assert remove == ({"M": 1, "*": 2, "-": 3} if source == "nano-12b" else {"M": 1, "*": 0, "-": 1})
    with torch.device("meta"):
        m = NemotronH(config)
    depth = depth_order(m, None, remove, rank="random", seed=3)
    plan = make_plan(config, sizes, [i for i, _ in depth.removed], None, "random")
    small = cut(m, plan)
    assert sum(p.numel() for p in small.parameters()) == count_parameters(wanted)["total"]
    assert all(getattr(small.config, name) == getattr(wanted, name) for name in CUT)
    letters = iter(config.hybrid_override_pattern)
    assert all(letter in letters for letter in wanted.hybrid_override_pattern)  # its own order can be reached
    told = compare_patterns(config, replace(small.config, hybrid_override_pattern="M"), target)
    assert wanted.hybrid_override_pattern in told and "another choice would give it" in told
    assert compare_patterns(config, wanted, target) == f"pattern: {target}'s own"
    backwards = replace(config, hybrid_override_pattern=config.hybrid_override_pattern[::-1])
    assert "no removal from this model gives that" in compare_patterns(backwards, backwards, target)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(num_key_value_heads=4), "num_key_value_heads is 4 and the model's 2, which is never cut"),
        (dict(n_groups=4), "n_groups is 4 and the model's 2"),
        (dict(hidden_size=65), "hidden_size 65 is more than the model's 64"),
        (dict(mamba_num_heads=10), "mamba_num_heads 10 is more"),
        (dict(hybrid_override_pattern="M-M**-M-"), "the target has 2 attention layers, more than the model's 1"),
    ],
)
def test_targets_that_cannot_be_reached(change, says):
    config = ModelConfig(**TINY)
    with pytest.raises(ValueError, match=says):
        target_config(config, replace(config, **change))


def test_an_int8_model_is_not_cut():
    m = ours()
    plan = identity(m)
    with pytest.raises(ValueError, match="load it without int8"):
        cut(quantize_(m), plan)


# ---------------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", [False, True])
def test_transformers_opens_what_was_cut(tmp_path, rescale):
    transformers = pytest.importorskip("transformers", reason="the reference implementation is a test extra")
    m = ours(**LONG)
    plan = make_plan(m.config, smaller(m.config, heads=9), (3, 4), random_scores(m.config, (3, 4)))
    small = cut(m, plan, rescale)
    save_pretrained(tmp_path, small)
    hf, info = transformers.NemotronHForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        logits = small(IDS)
        assert (neutralise_dt_floor(hf.eval())(IDS).logits - logits).abs().max() < 2e-5
        assert torch.equal(load_pretrained(tmp_path)[0](IDS), logits)
        cache = small.new_cache(2, 37)
        steps = [small(IDS[:, :20], cache)] + [small(IDS[:, t : t + 1], cache) for t in range(20, 37)]
        assert torch.allclose(torch.cat(steps, 1), logits, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------------------------------

TEXT = "".join(f"{i} of the rows are read from left to right, and kept until the end\n" for i in range(400))
SMALL = "--samples 4 --length 512 --text text.txt"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path, tokenizer = tmp_path_factory.mktemp("folders"), ours_vocabulary()
    save_pretrained(path / "m", ours(**LONG | dict(vocab_size=tokenizer.vocab_size)), tokenizer)
    save_pretrained(path / "bare", ours())
    broken = ours(vocab_size=tokenizer.vocab_size)
    broken.backbone.layers[0].mixer.in_proj.weight.data[3] = float("nan")
    save_pretrained(path / "broken", broken, tokenizer)
    (path / "text.txt").write_text(TEXT)
    (path / "run").mkdir()
    (path / "run" / "training.safetensors").write_bytes(b"anything")
    return path


@pytest.fixture
def here(tmp_path, monkeypatch, folders):
    shutil.copytree(folders, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(calibration, "FRESH", 5)
    tiny = replace(ModelConfig(**LONG), hidden_size=16, intermediate_size=80, mamba_num_heads=9, vocab_size=9999)
    monkeypatch.setitem(PRESETS, "tiny", replace(tiny, hybrid_override_pattern="M*-*-M-MM"))
    return tmp_path / "here"


def contents(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_a_dry_run_prints_the_plan_and_writes_nothing(here, capsys):
    before = contents(here)
    assert prune.main(f"--checkpoint m --target tiny --dry-run --out new --depth-by one-shot {SMALL}".split()) == 0
    printed = capsys.readouterr().out
    assert contents(here) == before and "a dry run: nothing was written" in printed
    for line in ("hidden_size", "parameters, mamba", "MiB at 128k, kv", "removed, number 1", "removed, number 2"):
        assert line in printed
    rows = [line.split() for line in printed.splitlines() if line.split()[:1] and line.split()[0].isdigit()]
    assert [row[0] for row in rows] == [str(i) for i in range(11)]
    assert sum("removed," in row for row in rows) == 2
    config, wanted = load_pretrained("m")[0].config, PRESETS["tiny"]
    assert f"hidden_size {config.hidden_size} -> 16" in printed and "80 (" in printed
    total = [line.split() for line in printed.splitlines() if line.startswith("parameters, total")]
    after = replace(wanted, vocab_size=config.vocab_size)
    assert [row[2:] for row in total] == [[f"{count_parameters(c)['total']:,}" for c in (config, after)]]
    assert "in another order than its M*-*-M-MM" in printed
    assert "no removal from this model gives that" in printed


def test_the_script_cuts_what_it_says(here, capsys):
    before = contents(here)
    assert prune.main(f"--checkpoint m --target tiny --out new {SMALL}".split()) == 0
    printed = capsys.readouterr().out
    assert {p: b for p, b in contents(here).items() if p.parent != here / "new" and p != here / "new"} == before
    assert sorted(os.listdir("new")) == [
        "config.json", "model.safetensors", "prune.json", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip
    small, tokenizer = load_pretrained("new")
    config = load_pretrained("m")[0].config
    assert tokenizer.ranks == ours_vocabulary().ranks
    wanted = replace(PRESETS["tiny"], vocab_size=config.vocab_size)
    assert count_parameters(small.config) == count_parameters(wanted)
    assert sum(t.numel() for t in load_file("new/model.safetensors").values()) == count_parameters(wanted)["total"]
    record = json.loads(Path("new/prune.json").read_text())
    assert record["target"] == "tiny" and len(record["removed"]) == 2 and len(record["loss"]) == 2
    assert "{:.4f} -> {:.4f} nats a token".format(*record["loss"]) in printed
    # the same by hand
    m = load_pretrained("m")[0]
    rows, fresh, _ = calibration.make(tokenizer, config.vocab_size, 4, 512, 0, "text.txt")
    batches = calibration.batches(rows, 3)
    depth = depth_order(m, batches, {"M": 1, "-": 1})
    assert [i for i, _ in depth.removed] == [i for i, _ in record["removed"]]
    removed = [i for i, _ in depth.removed]
    again = cut(m, make_plan(config, wanted, removed, importance(m, batches, removed)))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), small.parameters(), strict=True))
    assert calibration.loss(again, fresh, 5) == pytest.approx(record["loss"][1], rel=1e-4)
    # an earlier result may be written over
    assert prune.main(f"--checkpoint m --layers-removed 2 --rank random --out new {SMALL}".split()) == 0
    printed = capsys.readouterr().out
    assert "removed, number 2\n" in printed and "nan" not in printed and "embedding channels" not in printed
    assert load_pretrained("new")[0].config.num_hidden_layers == 9
    assert [score for _, score in json.loads(Path("new/prune.json").read_text())["removed"]] == [None, None]


def test_a_folder_without_a_tokenizer(here, capsys):
    flags = "--checkpoint bare --out new --hidden 40 --heads 6 --head-dim 12 --ffn 99 --samples 2 --length 64"
    assert prune.main(flags.split()) == 0
    printed = capsys.readouterr().out
    assert "random ids, because the folder has no tokenizer" in printed and "fresh rows" not in printed
    assert load_pretrained("new")[0].config == replace(
        ours().config, hidden_size=40, mamba_num_heads=6, mamba_head_dim=12, intermediate_size=99
    )
    assert "loss" not in json.loads(Path("new/prune.json").read_text())


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--target nano-9", "choose one of nano-1m"),
        ("--target nano-9m", "n_groups is 4 and the model's 3, which is never cut"),
        ("--hidden 1000", "hidden_size 1000 is more than the model's 64"),
        ("--hidden 0", "--hidden must be at least 1; got 0"),
        ("--hidden many", "--hidden"),
        ("--heads 8", "mamba_num_heads 8 must be a multiple of n_groups 3"),
        ("--layers-removed 11", "cannot remove 11 of 11 layers"),
        ("--layers-removed 4 --keep-ends 4", "where 3 may go"),
        ("--layers-removed -1", "at least 0"),
        ("", "nothing would be cut"),
        ("--layers-removed 0", "nothing would be cut"),
        ("--hidden 40 --samples 0", "--samples must be at least 1"),
        ("--hidden 40 --length 10", "at least 64"),
        ("--hidden 40 --length 64 --samples 1", "too short"),
        ("--hidden 40 --seed 9223372036854775808", "--seed"),
        ("--hidden 40 --depth-by magic", "--depth-by 'magic' is not one of iterative"),
        ("--hidden 40 --rank best", "--rank 'best'"),
        ("--hidden 40 --tap mid", "--tap 'mid'"),
        ("--hidden 40 --aggregate max", "--aggregate 'max'"),
        ("--hidden 40 --text none.txt", "does not exist"),
        ("--hidden 40 --device cuda", "no CUDA device"),
        ("--hidden 40 --impl magic", "auto, torch, triton"),
        ("--hidden 40 --checkpoint nowhere", "nowhere does not exist"),
        ("--hidden 40 --checkpoint broken", "not finite"),
        ("--layers-removed 1 --rank random --seed 4 --checkpoint broken", "the loss of 5 rows is nan"),
        ("--hidden 40 --out m", "is the checkpoint itself"),
        ("--hidden 40 --out ./m/../m", "is the checkpoint itself"),
        ("--hidden 40 --out run", "holds a training run"),
        ("--hidden 40 --out text.txt/new", "is a file"),
        ("--hidden 40 --hiden 3", "--hiden"),
    ],
)
def test_bad_input_is_one_sentence(here, capsys, flags, says):
    before = contents(here)
    flags = f"--checkpoint m --out new --text text.txt --samples 2 --length 512 {flags}"
    assert prune.main(flags.split()) == 2
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("prune.py: ") and says in lines[0], printed.err
    assert contents(here) == before


def test_a_presets_name_is_noise_of_that_shape(here, capsys, monkeypatch):
    """Measured on random tokens, and cut for real: what its minutes and memory are, before anything is written."""
    monkeypatch.setitem(PRESETS, "noise", ModelConfig(**LONG))
    flags = "--checkpoint noise --hidden 40 --layers-removed 2 --samples 4 --length 64 --batch 2 --out new"
    assert prune.main(flags.split()) == 0
    printed = capsys.readouterr().out
    found = re.search(r"([\d.]+) min \(1,024 samples: ([\d.]+)\)", printed)
    assert abs(float(found[2]) - 256 * float(found[1])) <= 256 * 0.05 + 0.05  # the first is rounded
    assert re.search(r"measured  [\d.]+ min; peak memory [\d.]+ GiB, [\d.]+ of a plain forward", printed)
    assert "random ids" in printed and "bfloat16" in printed
    small, tokenizer = load_pretrained("new")
    assert tokenizer is None and small.lm_head.weight.dtype == torch.bfloat16
    assert (small.config.hidden_size, small.config.num_hidden_layers) == (40, 9)
    Path("noise").mkdir()  # a folder of that name comes first, and this one holds nothing
    assert prune.main(flags.replace("--out new", "--dry-run").split()) == 2
    assert "config.json" in capsys.readouterr().err


def test_it_needs_a_place_to_write_to(here, capsys):
    assert prune.main("--checkpoint m --hidden 40".split()) == 2
    assert "give --out, or --dry-run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, code, says",
    [(KeyboardInterrupt, 130, ""), (torch.OutOfMemoryError, 2, "lower --batch or --length")],
)
def test_what_comes_in_between(here, capsys, monkeypatch, error, code, says):
    def stop(*_):
        raise error

    monkeypatch.setattr(prune, "cut", stop)
    assert prune.main("--checkpoint bare --hidden 60 --out new --samples 2 --length 64".split()) == code
    assert says in capsys.readouterr().err and not Path("new").exists()


def test_a_disk_that_fills_leaves_nothing(here, capsys):
    with largest_file(20_000):
        assert prune.main("--checkpoint bare --hidden 60 --out new --samples 2 --length 64".split()) == 2
    assert "cannot write new" in capsys.readouterr().err and not Path("new").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The calibration set
# ---------------------------------------------------------------------------------------------------------------------


def test_calibration_rows(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    tokenizer = ours_vocabulary()
    make = lambda seed: calibration.make(tokenizer, 999, 6, 512, seed, tmp_path / "text.txt")
    rows, fresh, what = make(0)
    assert all(t.shape == (6, 512) for t in rows) and all(t.shape == (calibration.FRESH, 512) for t in fresh)
    assert "prose 15%" in what and rows[0].dtype == torch.int64 and (rows[1] >= 0).all()
    assert all(torch.equal(a, b) for a, b in zip(rows, make(0)[0])) and not torch.equal(rows[0], make(1)[0][0])
    assert all(torch.equal(a, b) for a, b in zip(fresh, make(1)[1]))  # so that losses compare
    assert not any((row == rows[0]).all(1).any() for row in fresh[0])
    batches = calibration.batches(rows, 4)
    assert [len(ids) for ids, _ in batches] == [4, 2] and torch.equal(torch.cat([doc for _, doc in batches]), rows[1])


def test_loss_is_that_of_what_is_learned(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    tokenizer, m = ours_vocabulary(), model(vocab_size=ours_vocabulary().vocab_size)
    rows = calibration.make(tokenizer, 999, 3, 512, 0, tmp_path / "text.txt")[0]
    ids, doc, kind = rows
    with torch.no_grad():
        log_p = m(ids, seq_idx=doc).double().log_softmax(-1)[:, :-1]
    nll = -log_p.gather(-1, ids[:, 1:, None])[..., 0]
    learned = kind[:, 1:] > 0
    assert 0 < learned.sum() < learned.numel()
    assert calibration.loss(m, rows, 2) == pytest.approx(nll[learned].mean().item(), rel=1e-6)


def test_ids_beyond_sixteen_bits(monkeypatch):
    """A released vocabulary has 131,072 ids."""
    tokenizer = released_vocabulary()
    encode = tokenizer.encode_examples
    monkeypatch.setattr(
        tokenizer, "encode_examples", lambda e: [([i + 70_000 for i in ids], start) for ids, start in encode(e)]
    )
    monkeypatch.setattr(type(tokenizer), "vocab_size", 131072, raising=False)
    blend = data.Blend({"reasoning": 1, "retrieval": 1})
    (ids, doc, _), _ = data.pack_shard(tokenizer, blend, {}, 2, 2048, 0)
    assert ids[doc >= 0].min() >= 70_000
