"""Scores against the plain way: all logits, all activations, every layer skipped on its own, in float64."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from reference import THREE_GROUPS, ours
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import importance as measured
from importance import Aggregate, cosines, depth_order, energy, gram, importance, sweep
from prune import cut, make_plan

LONG = THREE_GROUPS | dict(hybrid_override_pattern="M-M*-MM-*-M")
KINDS = [{}, THREE_GROUPS, dict(use_bias=True, mlp_bias=True, attention_bias=True)]


def model(**overrides):
    return ours(torch.float64, **overrides).eval()


def some_batches(docs=True, sizes=(3, 1, 2), l=29, seed=0):
    """Batches of unequal size; with documents of unequal length, some rows padded and one nothing but padding."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for n, b in enumerate(sizes):
        ids = torch.randint(0, 263, (b, l), generator=g)
        doc = (torch.arange(l) > torch.randint(3, l, (b, 1), generator=g)).long() + 5
        doc[0, l - 4 - n :] = -1
        if n == 2:
            doc[1] = -1
        found.append((ids, doc if docs else None))
    return found


def plain_features(model, ids, doc, layers, collect=None):
    """The stream before the head through the named layers only, by a model of its own; streams in `collect`."""
    x = model.backbone.embeddings(ids)
    mask = None
    if doc is not None:
        mask = torch.stack([(d[:, None] == d[None]) & torch.ones(len(d), len(d)).tril().bool() for d in doc])[:, None]
    for i in layers:
        if collect is not None:
            collect[i] = x
        x = model.backbone.layers[i](x, None, 0, doc, mask)
    return model.backbone.norm_f(x)


def real(doc, ids):
    return torch.ones_like(ids, dtype=torch.bool) if doc is None else doc >= 0


def close(a, b, rtol=1e-10):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key] == pytest.approx(b[key], rel=rtol), key


# ---------------------------------------------------------------------------------------------------------------------
# Layers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
def test_energy_by_the_gram_matrix_is_that_of_all_logits(monkeypatch, dtype, rtol):
    monkeypatch.setattr(measured, "SLICE", 5)  # several slices of tokens, and of the vocabulary, the last ones short
    g = torch.Generator().manual_seed(1)
    E, a, b = (torch.randn(n, 23, generator=g).to(dtype) for n in (211, 36, 36))
    plain = (E.double() @ (a.double() - b.double()).t()).square().sum()
    G = gram(E)
    assert G.shape == (23, 23) and G.dtype == torch.promote_types(dtype, torch.float32)
    assert energy(a, b, G).item() == pytest.approx(plain.item(), rel=rtol)
    assert energy(a, b).item() == pytest.approx((a.double() - b.double()).square().sum().item(), rel=rtol)


def plain_scores(m, batches, kept, candidates, method):
    """Every candidate skipped on its own; logits of all batches held at once."""
    found = {}
    for i in candidates:
        moved = []
        for ids, doc in batches:
            keep = real(doc, ids)
            whole = plain_features(m, ids, doc, range(len(m.backbone.layers)))[keep]
            rest = plain_features(m, ids, doc, [j for j in kept if j != i])[keep]
            moved.append(whole - rest if method == "mse" else m.lm_head(whole) - m.lm_head(rest))
        found[i] = torch.cat(moved).square().mean().item()
    return found


@torch.no_grad()
@pytest.mark.parametrize("overrides", [{}, LONG])
@pytest.mark.parametrize("docs", [False, True])
@pytest.mark.parametrize("method", ["one-shot", "mse"])
def test_sweep_is_every_layer_skipped_on_its_own(overrides, docs, method):
    m, batches = model(**overrides), some_batches(docs)
    everything = list(range(len(m.backbone.layers)))
    for kept, candidates in ((everything, everything), ([i for i in everything if i not in (1, 4)], [0, 3, 5])):
        found = sweep(m, batches, kept, candidates, method)
        close(found, plain_scores(m, batches, kept, candidates, method))


@torch.no_grad()
def test_cosines():
    m, batches = model(), some_batches()
    parts = {i: [] for i in range(7)}
    for ids, doc in batches:
        streams = {}
        plain_features(m, ids, doc, range(7), streams)
        streams[7] = m.backbone.layers[6](streams[6])  # an MLP: knows no documents
        for i in parts:
            a, b = (streams[j][doc >= 0] for j in (i, i + 1))
            parts[i].append(1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)))
    close(cosines(m, batches), {i: torch.cat(p).mean().item() for i, p in parts.items()})


@torch.no_grad()
def test_iterative_removal_is_brute_force():
    m, batches = model(**LONG), some_batches(sizes=(2, 1))
    letters, quota = m.config.hybrid_override_pattern, {"M": 2, "-": 1, "*": 1}
    depth = depth_order(m, batches, quota)
    kept, left, wanted = list(range(len(letters))), dict(quota), []
    while sum(left.values()):
        scores = plain_scores(m, batches, kept, [i for i in kept if left[letters[i]]], "one-shot")
        worst = min(scores, key=scores.get)
        wanted.append((worst, scores[worst]))
        kept.remove(worst)
        left[letters[worst]] -= 1
    assert [i for i, _ in depth.removed] == [i for i, _ in wanted]
    assert [s for _, s in depth.removed] == pytest.approx([s for _, s in wanted], rel=1e-10)
    close(depth.scores, plain_scores(m, batches, list(range(len(letters))), range(len(letters)), "one-shot"))


@pytest.mark.parametrize("method", measured.METHODS)
def test_methods_take_the_smallest_and_reversed_the_largest(method):
    m, batches = model(**LONG), some_batches(sizes=(2,))
    ends = dict(keep_first=2, keep_last=1)
    depth = depth_order(m, batches, 3, method, **ends)
    may = range(2, 10)
    assert set(depth.scores) == (set(range(11)) if method == "cosine" else set(may))
    by_score = sorted(may, key=depth.scores.get)
    assert depth.removed[0] == (by_score[0], depth.scores[by_score[0]])
    assert depth_order(m, batches, 3, method, "reversed", **ends).removed[0][0] == by_score[-1]
    if method != "iterative":
        assert [i for i, _ in depth.removed] == by_score[:3]


def test_random_removal_measures_nothing_and_keeps_the_counts():
    m, quota = model(**LONG), {"M": 2, "*": 1, "-": 0}
    letters, seen = m.config.hybrid_override_pattern, set()
    for seed in range(8):
        depth = depth_order(m, None, quota, rank="random", seed=seed, keep_first=1)
        removed = [i for i, _ in depth.removed]
        assert removed == [i for i, _ in depth_order(m, None, quota, rank="random", seed=seed, keep_first=1).removed]
        assert sorted(letters[i] for i in removed) == ["*", "M", "M"] and 0 not in removed and not depth.scores
        assert all(math.isnan(score) for _, score in depth.removed)
        seen.add(tuple(sorted(removed)))
    assert len(seen) > 3


def test_a_prefix_is_shared():
    m, calls = model(**LONG), []
    for block in m.backbone.layers:
        block.register_forward_hook(lambda *_: calls.append(1))
    n, batches = 11, some_batches(sizes=(1, 1))
    sweep(m, batches, list(range(n)), range(n))
    assert len(calls) == len(batches) * (n + n + n * (n - 1) // 2)


@pytest.mark.parametrize(
    "remove, options, says",
    [
        ({"*": 2}, {}, "cannot remove 2 of the 1 attention layers"),
        ({"M": 2, "-": 3}, dict(keep_last=1), "cannot remove 3 of the 2 MLP layers"),
        (7, {}, "cannot remove 7 of 7 layers"),
        (4, dict(keep_first=2, keep_last=2), "where 3 may go"),
        (1, dict(method="magic"), "method 'magic' is not one of iterative"),
        (1, dict(rank="best"), "rank 'best' is not one of ranked"),
    ],
)
def test_removals_that_are_refused(remove, options, says):
    with pytest.raises(ValueError, match=says):
        depth_order(model(), some_batches(), remove, **options)


def test_nothing_to_remove():
    depth = depth_order(model(), None, {"M": 0})
    assert depth.removed == [] and depth.scores == {}


# ---------------------------------------------------------------------------------------------------------------------
# Channels
# ---------------------------------------------------------------------------------------------------------------------

PLAIN = {
    "mean": lambda rows: torch.cat(rows).abs().mean(0),
    "l2": lambda rows: torch.cat(rows).square().mean(0).sqrt(),
    "mean-l2": lambda rows: torch.stack([row.abs().mean(0) for row in rows if len(row)]).square().mean(0).sqrt(),
}


@pytest.mark.parametrize("kind", measured.AGGREGATES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_aggregates(kind, dtype):
    rows = [torch.randn(4, 9, 6, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]
    keep = [torch.rand(4, 9, generator=torch.Generator().manual_seed(i)) > 0.4 for i in range(3)]
    keep[1][2] = False
    found, part = Aggregate(kind), Aggregate(kind)
    for a, real in zip(rows, keep):
        found.add(a)
        part.add(a, real)
    everything = [row.double() for a in rows for row in a]
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    assert torch.allclose(found.score(), PLAIN[kind](everything), rtol=rtol, atol=0)
    chosen = [row[r].double() for a, real in zip(rows, keep) for row, r in zip(a, real)]
    assert torch.allclose(part.score(), PLAIN[kind](chosen), rtol=rtol, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", measured.AGGREGATES)
@pytest.mark.parametrize("tap", measured.TAPS)
@pytest.mark.parametrize("overrides", KINDS)
def test_importance_is_that_of_the_activations(kind, tap, overrides):
    m, batches, removed = model(**overrides), some_batches(), (1,)
    c = m.config
    letters, kept = c.hybrid_override_pattern, [i for i in range(len(c.hybrid_override_pattern)) if i not in (1,)]
    found = importance(m, batches, removed, kind, tap)
    rows = {i: ([], []) for i in kept}
    for ids, doc in batches:
        streams = {}
        plain_features(m, ids, doc, kept, streams)
        for i, x in streams.items():
            block = m.backbone.layers[i]
            for row, keep in zip(block.norm(x), doc >= 0):
                u = row[keep]
                rows[i][0].append(u)
                if letters[i] == "-":
                    h = block.mixer.up_proj(u)
                    rows[i][1].append(F.relu(h) ** 2 if tap == "post" else h)
                elif letters[i] == "M":  # z | x | B | C | dt
                    rows[i][1].append(block.mixer.in_proj(u)[:, c.mamba_inner : 2 * c.mamba_inner])
    hidden = sum(PLAIN[kind](u) for u, _ in rows.values())
    assert torch.allclose(found.hidden, hidden, rtol=1e-10, atol=0)
    assert set(found.neurons) == {i for i in kept if letters[i] == "-"}
    assert set(found.mamba) == {i for i in kept if letters[i] == "M"}
    for i, score in found.neurons.items():
        assert torch.allclose(score, PLAIN[kind](rows[i][1]), rtol=1e-10, atol=0)
    for i, score in found.mamba.items():
        assert score.shape == (c.mamba_num_heads, c.mamba_head_dim)
        assert torch.allclose(score.flatten(), PLAIN[kind](rows[i][1]), rtol=1e-10, atol=0)


def hooks(m):
    return sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in m.modules())


def test_measuring_leaves_the_model_alone():
    m, batches = model(), some_batches()
    before = {name: p.clone() for name, p in m.named_parameters()}
    for tap in measured.TAPS:
        importance(m, batches, tap=tap)
    with pytest.raises(IndexError):
        importance(m, [(torch.full((1, 5), 263), None)])  # beyond the vocabulary
    assert hooks(m) == 0
    depth_order(m, batches, 1)
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in m.named_parameters())


def test_batches_may_be_cut_anywhere():
    m = model()
    one, other = [(ids, doc) for ids, doc in some_batches(sizes=(3,))], []
    for ids, doc in one:
        other += [(i[None], d[None]) for i, d in zip(ids, doc)]
    a, b = importance(m, one), importance(m, other)
    assert torch.allclose(a.hidden, b.hidden, rtol=1e-12)
    close(sweep(m, one, range(7), range(7)), sweep(m, other, range(7), range(7)))


@pytest.mark.parametrize("batches", [[], [(torch.ones(2, 5, dtype=torch.long), torch.full((2, 5), -1))]])
def test_no_token_is_refused(batches):
    m = model()
    for measure in (importance, cosines, lambda m, b: sweep(m, b, range(7), [1]), lambda m, b: depth_order(m, b, 1)):
        with pytest.raises(ValueError, match="holds no token"):
            measure(m, batches)


def test_a_model_that_diverged_is_refused():
    m = model()
    m.backbone.layers[1].mixer.up_proj.weight.data[0] = math.nan
    for measure in (importance, cosines, lambda m, b: sweep(m, b, range(7), [1])):
        with pytest.raises(ValueError, match="not finite"):
            measure(m, some_batches())


@pytest.mark.parametrize("options", [dict(aggregate="max"), dict(tap="mid")])
def test_unknown_switches(options):
    with pytest.raises(ValueError, match="is not one of"):
        importance(model(), some_batches(), **options)


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


class Made(TorchDispatchMode):
    """What operations make, in bytes: the largest tensor, all that is alive now, and the most that ever was."""

    def __init__(self):
        super().__init__()
        self.largest, self.most, self.storages = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in args if torch.is_tensor(t)}
        for t in out if isinstance(out, tuple | list) else [out]:
            if torch.is_tensor(t):
                storage = t.untyped_storage()
                self.largest = max(self.largest, t.numel() * t.element_size())
                if storage._cdata not in given:  # a view makes nothing
                    self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, self.alive())
        return out

    def alive(self):
        self.storages = {key: kept for key, kept in self.storages.items() if not kept[0].expired()}
        return sum(size for _, size in self.storages.values())


def test_logits_never_appear():
    """A vocabulary wider than any layer: nothing is as large as the logits of one batch, or of a small part of it."""
    m = model(vocab_size=20_000)
    ids = torch.randint(0, 20_000, (2, 100), generator=torch.Generator().manual_seed(0))
    logits = ids.numel() * 20_000 * 8
    with Made() as made:
        sweep(m, [(ids, None)], range(7), range(7))
        importance(m, [(ids, None)])
    assert 0 < made.largest < logits / 2
    with Made() as made, torch.no_grad():
        m(ids)
    assert made.largest == logits  # it sees what it should


def test_nothing_is_kept_from_batch_to_batch():
    m, batches = model(), some_batches(docs=False, sizes=(2,) * 5)

    def watched():
        for batch in batches:
            held.append(made.alive())
            yield batch

    for measure in (importance, cosines, lambda m, b: sweep(m, b, range(7), range(7))):
        held = []
        with Made() as made, torch.no_grad():
            measure(m, watched())
        assert len(held) == 5 and 0 < held[2] == held[3] == held[4] < made.most, held
    kept = []
    with Made() as made, torch.no_grad():
        for ids, _ in batches:
            kept.append(m.features(ids))
    assert made.alive() == sum(t.numel() * 8 for t in kept)  # it sees what is kept


@pytest.mark.parametrize("docs", [False, True])
def test_measuring_holds_little_more_than_inference(docs):
    """Of the activations alone; at full size the weights, which both hold, are most of the memory."""
    m, batches = ours(**LONG), some_batches(docs, sizes=(2, 2), l=300)
    peaks = []
    for measure in (
        lambda m, b: [m.features(ids, seq_idx=doc) for ids, doc in b[:1]],
        importance,
        cosines,
        lambda m, b: sweep(m, b, range(11), range(11)),
    ):
        with Made() as made, torch.no_grad():
            measure(m, batches)
        peaks.append(made.most)
    assert max(peaks) < 1.2 * peaks[0], peaks


def measured_on(device, impl, plan=None):
    """Scores of a float32 model on a device, the plan they make or that is given, and the logits of what is cut."""
    m = ours(hybrid_override_pattern="M-*M-").eval().to(device).use(impl)
    batches, c = some_batches(), m.config
    scores, skipped = importance(m, batches, (1,)), sweep(m, batches, range(5), range(5))
    sizes = replace(c, hidden_size=c.hidden_size // 2, mamba_head_dim=c.mamba_head_dim // 2)
    with torch.no_grad():
        plan = plan or make_plan(c, sizes, [1], scores)  # of near equals a rounding decides which stays
        logits = cut(m, plan)(batches[0][0].to(device)).cpu()
    return scores, skipped, logits, plan


@pytest.mark.gpu
def test_a_gpu_measures_and_cuts_what_a_cpu_does():
    """Torch on the CPU, torch on the GPU, and the Triton kernels, which must let the hooks see the same."""
    plain = measured_on("cpu", "torch")
    for impl in ("torch", "triton"):
        scores, skipped, logits, _ = measured_on("cuda", impl, plain[3])
        torch.testing.assert_close(scores.hidden, plain[0].hidden, rtol=5e-3, atol=1e-4)
        for i, own in (plain[0].mamba | plain[0].neurons).items():
            torch.testing.assert_close((scores.mamba | scores.neurons)[i], own, rtol=1e-2, atol=1e-3)
        assert skipped == pytest.approx(plain[1], rel=2e-2)
        torch.testing.assert_close(logits, plain[2], rtol=2e-2, atol=2e-2)
