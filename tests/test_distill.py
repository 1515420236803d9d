"""Distillation: the losses against their definition, the lean optimizer against its formula, runs that go on."""

import gc
import json
import math
import signal
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import ours
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
import data
import distill
import lean
import teacher_cache
from distill import DistillConfig, distill_step, stages
from distill_loss import KINDS, distill_loss, plain_distill, top_logits
from lean import Lean, round_at_random, state_bytes
from model import PRESETS, NemotronH
from pair import needed_bytes, noise, one_language
from parallel import recompute_layers
from schedule import wsd
from train import make_optimizer, parameter_groups


@pytest.fixture(autouse=True)
def handlers():
    """A run takes over two signals: give them back."""
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


# ----------------------------------------------------------------------------------------------------------------------
# The losses


def pair(b=2, l=7, d=6, vocab=11, wider=3, seed=0, dtype=torch.float64):
    """x, weight, learned and what else a loss may need; the teacher is wider than the student."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)
    rest = dict(teacher=(normal(b, l, d + wider), normal(vocab, d + wider)), k=4)
    rest["targets"] = torch.randint(0, vocab, (b, l), generator=g)
    x, weight = normal(b, l, d).requires_grad_(), normal(vocab, d).requires_grad_()
    return x, weight, torch.rand(b, l, generator=g) < 0.6, rest


def results(form, x, weight, learned, kind, **options):
    total, losses = form(x, weight, learned, kind, **options)
    return total.detach(), losses, *torch.autograd.grad(3 * total, (x, weight))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("b, l, vocab, size", [
    (1, 1, 1, 1), (1, 1, 2, 1), (2, 7, 11, 1), (2, 7, 11, 33), (3, 5, 257, 257 * 4), (1, 19, 4097, 4097 * 8),
    (2, 3, 4097, None),
])  # fmt: skip
def test_equal_to_the_plain_form(kind, b, l, vocab, size, temperature):
    if kind == "ce" and temperature != 1:
        return
    x, weight, learned, rest = pair(b, l, vocab=vocab)
    plain = results(plain_distill, x, weight, learned, kind, temperature=temperature, **rest)
    sliced = results(distill_loss, x, weight, learned, kind, temperature=temperature, size=size, **rest)
    for name, a, s in zip(("total", "losses", "dx", "dweight"), plain, sliced):
        assert a.shape == s.shape and torch.allclose(a, s, rtol=1e-10, atol=1e-10), name


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_derivatives(kind):
    x, weight, learned, rest = pair(l=5)
    assert torch.autograd.gradcheck(lambda *a: distill_loss(*a, learned, kind, size=33, **rest)[0], (x, weight))


def test_the_gradient_is_student_minus_teacher():
    """With the identity as head the features are the logits."""
    s, eye = torch.randn(1, 3, 9, dtype=torch.float64, requires_grad=True), torch.eye(9, dtype=torch.float64)
    t = torch.randn(1, 3, 9, dtype=torch.float64)
    learned = torch.tensor([[True, False, True]])
    distill_loss(s, eye, learned, teacher=(t, eye))[0].backward()
    assert torch.allclose(s.grad, (s.softmax(-1) - t.softmax(-1)) * learned[..., None])


@pytest.mark.parametrize("kind", ["kl", "reverse", "topk"])
def test_a_copy_is_at_distance_zero(kind):
    x, weight, learned, rest = pair()
    total, losses, dx, dweight = results(
        distill_loss, x, weight, learned, kind, teacher=(x.detach(), weight.detach()), k=4
    )
    for t in (total, losses, dx, dweight):
        assert t.abs().max() < 1e-13


def test_top_k_of_everything_is_kl():
    x, weight, learned, rest = pair()
    whole = results(distill_loss, x, weight, learned, "kl", **rest)
    for a, b in zip(whole, results(distill_loss, x, weight, learned, "topk", **(rest | {"k": 11}))):
        assert torch.allclose(a, b)


def test_top_k_is_a_log_softmax_over_the_gathered_logits():
    """The same from a live teacher, from its written answers, and from renormalised probabilities."""
    x, weight, learned, rest = pair(dtype=torch.float32)
    teacher, k = rest["teacher"], 4
    live = results(distill_loss, x, weight, learned, "topk", size=33, **rest)
    values, places = top_logits(*teacher, k, size=33)
    assert values.shape == places.shape == (2, 7, k)
    kept = results(distill_loss, x, weight, learned, "topk", teacher=(values - 7.5, places), size=33)
    for a, b in zip(live, kept):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    p = F.linear(*teacher).softmax(-1).gather(-1, places)
    q = F.linear(x, weight).softmax(-1).gather(-1, places)
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    assert torch.allclose(live[1], (p * (p / q).log()).sum(-1), rtol=1e-4, atol=1e-5)


def test_no_tensor_is_larger_than_a_slice():
    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                if isinstance(t, torch.Tensor):
                    self.most = max(self.most, t.numel())
            return out

    tokens, vocab, d = 512, 1024, 8
    for kind in KINDS:
        x, weight, learned, rest = pair(1, tokens, d, vocab, dtype=torch.float32)
        sizes = []
        for form, options in ((plain_distill, {}), (distill_loss, {"size": 64 * vocab})):
            with Largest() as seen:
                form(x, weight, learned, kind, **rest, **options)[0].backward()
            sizes.append(seen.most)
        assert sizes == [tokens * vocab, 64 * vocab], kind


def test_autocast_takes_sixteen_bit_products():
    x, weight, learned, rest = pair(dtype=torch.float32, vocab=40)
    exact = results(distill_loss, x, weight, learned, "kl", **rest)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = results(distill_loss, x, weight, learned, "kl", size=80, **rest)
    for a, b in zip(exact, rounded):
        assert a.dtype == b.dtype == torch.float32 and 0 < (a - b).norm() < 0.03 * a.norm()


@pytest.mark.parametrize("change, sentence", [
    (dict(kind="l2"), "not one of"), (dict(teacher=None), "needs a teacher"),
    (dict(kind="ce", targets=None), "targets"), (dict(temperature=0), "above 0"),
    (dict(kind="ce", temperature=2), "1 without a teacher"), (dict(kind="topk", k=None), "needs k"),
    (dict(teacher=(torch.randn(2, 7, 9), torch.randn(12, 9))), "12 rows"),
])  # fmt: skip
def test_errors_are_sentences(change, sentence):
    x, weight, learned, rest = pair()
    with pytest.raises(ValueError, match=sentence):
        distill_loss(x, weight, learned, **(dict(kind="kl") | rest | change))


def test_no_more_top_logits_than_words():
    with pytest.raises(ValueError, match="vocabulary of 11"):
        top_logits(torch.randn(1, 2, 3), torch.randn(11, 3), 12)


# ----------------------------------------------------------------------------------------------------------------------
# The lean optimizer


def test_rounding_at_random_keeps_the_mean_and_stays_between_neighbours():
    torch.manual_seed(0)
    x = torch.tensor([1.001, -1.001, 3.14159, 1e-20, 0.0, 1.0, -7.25]).repeat(40_000, 1)
    got = round_at_random(x.clone()).float()
    low, high = got.min(0).values, got.max(0).values
    down, x = x.to(torch.bfloat16).float(), x[0]
    assert ((low <= x) & (x <= high)).all() and (high - low <= x.abs() * 2**-7).all()
    assert (low[4:] == x[4:]).all() and (high[4:] == x[4:]).all()  # what bfloat16 holds is not moved
    assert ((got.mean(0) - x).abs() <= 5 * (high - low) / 40_000**0.5).all()
    assert (down[0, 0] - 1.001).abs() > 5 * (got.mean(0)[0] - 1.001).abs()  # to nearest would be worse


def reference_update(w, grads, lr, beta, decay):
    """The docstring of lean.py, for a matrix in float64."""
    rows, columns = torch.zeros(len(w)), torch.zeros(w.shape[1])
    for t, g in enumerate(grads, 1):
        rows = beta * rows.double() + (1 - beta) * g.square().mean(1)
        columns = beta * columns.double() + (1 - beta) * g.square().mean(0)
        second = rows[:, None] * columns / rows.mean() / (1 - beta**t)
        u = g / second.sqrt()
        w = w * (1 - lr * decay) - lr * u / max(1, u.square().mean().sqrt())
    return w


@pytest.mark.parametrize("piece", [3, 10, 10**6])  # less than a row, a row or two, everything
@pytest.mark.parametrize("shape", [(5, 7), (4, 1, 3), (6,)])
def test_an_update_is_the_formula(shape, piece, monkeypatch):
    monkeypatch.setattr(lean, "PIECE", piece)
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(shape))
    grads = [torch.randn(shape) * scale for scale in (1, 30, 0.1)]
    expected = reference_update(
        p.detach().double().view(shape[0], -1), [g.double().view(shape[0], -1) for g in grads], 0.1, 0.9, 0.5
    )
    optimizer = Lean([p], 0.1, beta=0.9, weight_decay=0.5)
    for g in grads:
        p.grad = g
        optimizer.step()
    assert torch.allclose(p.detach().double().view(shape[0], -1), expected, atol=1e-5)
    assert math.isclose(optimizer.squares.item(), sum(g.square().sum().item() for g in grads), rel_tol=1e-5)


def test_a_weight_that_is_never_used_stays():
    p = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = Lean([p], 0.1)
    p.grad = torch.zeros(3, 4)
    optimizer.step()
    assert (p == 1).all()


def test_small_updates_add_up_in_bfloat16():
    """0.0002 a step on weights of 1, whose neighbours are 0.0078 away: to nearest nothing would ever happen."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = Lean([p], 2e-4)
    for _ in range(200):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert abs(p.float().mean().item() - (1 - 200 * 2e-4)) < 2e-3


def batch_of(rows=4, length=33, vocab=263, seed=0):
    rng = np.random.default_rng(seed)
    doc = np.sort(rng.integers(0, 3, (rows, length)), 1)
    kind = rng.choice([0, 1, 2], (rows, length)).astype(np.uint8)
    return [torch.from_numpy(a) for a in (rng.integers(0, vocab, (rows, length)), doc, kind)]


PLAIN = SimpleNamespace(loss="kl", temperature=1.0, topk=8, clip=1.0)


def test_updates_inside_the_backward_are_those_after_it():
    """With layers computed again, as at full size; and no gradient is left."""
    found, teacher = [], ours(seed=1).requires_grad_(False)
    for inside in (False, True):
        student = ours()
        optimizer = Lean(parameter_groups(student, 0.1), 1e-3)
        if inside:
            recompute_layers(student)
            optimizer.in_backward()
        for seed in range(3):
            total, count, norm = distill_step(teacher, student, optimizer, batch_of(seed=seed), PLAIN, nullcontext)
            if not inside:
                assert all(p.grad is not None for p in student.parameters())
                optimizer.step()
                norm, optimizer.squares = optimizer.squares.sqrt(), torch.zeros(())
                optimizer.zero_grad()
        assert all(p.grad is None for p in student.parameters()) and norm > 0
        found.append([total, norm, *student.parameters()])
    for a, b in zip(*found):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "lean"])
def test_a_student_comes_closer(name):
    """A damaged copy, with either optimizer; the lean one in bfloat16 throughout."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if name == "lean" else torch.float32
    teacher, student = ours(dtype=dtype).requires_grad_(False), ours(dtype=dtype)
    with torch.no_grad():
        for p in student.parameters():
            if p.dim() > 1:
                p.add_(0.3 * p.float().std() * torch.randn(p.shape))
    if name == "lean":
        optimizer = Lean(parameter_groups(student, 0.0), 2e-3).in_backward()
    else:
        optimizer = make_optimizer(student, 2e-3, 0.0)
    losses = []
    for seed in range(40):
        total, count, _ = distill_step(teacher, student, optimizer, batch_of(seed=seed), PLAIN, nullcontext)
        losses.append((total / count).item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5]), losses


def test_full_size_fits_one_gpu_of_80_gb():
    big, small = PRESETS["nano-12b"], PRESETS["nano-9b"]
    need = needed_bytes(big, small, 8192, 8192, lean=True, recompute=True)
    gib = {name: size / 2**30 for name, size in need.items()}
    assert (round(gib["teacher"], 1), round(gib["weights"], 1), round(gib["gradients"], 1)) == (22.9, 16.6, 1.1)
    assert gib["total"] < 60 < 79.6 < needed_bytes(big, small, 8192, 8192)["total"] / 2**30
    with torch.device("meta"):
        shapes = [p.shape for p in NemotronH(small).parameters()]
    assert round(state_bytes(shapes) / 2**20) == 14


# ----------------------------------------------------------------------------------------------------------------------
# The step and the run


def test_a_step_is_the_mean_over_what_is_learned():
    """Against whole logits, for every loss; the last position of a row has no target, unlearned ones no say."""
    teacher, (ids, doc, kind) = ours(seed=1).requires_grad_(False), batch_of()
    learned = kind[:, 1:] != data.NOT_LEARNED
    with torch.no_grad():
        t = teacher(ids, seq_idx=doc)[:, :-1]
    for name in KINDS:
        student = ours()
        s = student(ids, seq_idx=doc)[:, :-1]
        if name == "ce":
            losses = F.cross_entropy(s.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(learned.shape)
        else:
            a, b = t.topk(8) if name == "topk" else (t, None)
            q, p = (s if b is None else s.gather(-1, b)).log_softmax(-1), a.log_softmax(-1)
            losses = (p.exp() * (p - q)).sum(-1) if name != "reverse" else (q.exp() * (q - p)).sum(-1)
        expected = torch.autograd.grad((losses * learned).sum() / learned.sum(), list(student.parameters()))
        optimizer = torch.optim.SGD(student.parameters(), 0.0)
        optimizer.zero_grad = lambda set_to_none=True: None
        config = SimpleNamespace(**(vars(PLAIN) | {"loss": name, "clip": 1e9}))
        total, count, _ = distill_step(teacher, student, optimizer, (ids, doc, kind), config, nullcontext)
        assert count == learned.sum() and torch.allclose(total, (losses * learned).sum(), rtol=1e-4)
        for p, g in zip(student.parameters(), expected):
            assert torch.allclose(p.grad, g, rtol=1e-3, atol=1e-5)


def test_a_batch_with_nothing_to_learn_changes_nothing():
    student, (ids, doc, kind) = ours(), batch_of()
    before = [p.clone() for p in student.parameters()]
    total, count, norm = distill_step(
        ours(seed=1), student, Lean(parameter_groups(student, 0.0), 1.0).in_backward(), (ids, doc, 0 * kind), PLAIN,
        nullcontext,
    )  # fmt: skip
    assert total == count == norm == 0
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters()))


def test_stages():
    assert stages("256") == [(256, 400)] and stages("512", 30) == [(512, 30)]
    assert stages("256:300,1024:60") == [(256, 300), (1024, 60)]
    for length, steps in (("", None), ("a", None), ("256:3:4", None), ("256,512", None), ("256:3", 5), ("32", 5),
                          ("256:0", None), ("256", 0)):  # fmt: skip
        with pytest.raises(ValueError):
            stages(length, steps)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, ours_tokenizer):
    """A teacher, a narrower student, and a text to read, all tiny."""
    folder = tmp_path_factory.mktemp("models")
    vocab = ours_tokenizer.vocab_size
    checkpoint.save_pretrained(folder / "teacher", ours(vocab_size=vocab, seed=1), ours_tokenizer)
    checkpoint.save_pretrained(folder / "student", ours(vocab_size=vocab, intermediate_size=24), ours_tokenizer)
    (folder / "text.txt").write_text("\n\n".join(f"Once {i} sheep and {i * 7} goats met. " * 8 for i in range(400)))
    return folder


def asked(folders, out, **changes):
    flags = dict(
        teacher=str(folders / "teacher"), student=str(folders / "student"), out=str(out), device="cpu", dtype="float32",
        length="64:3,128:3", step_tokens=256, text=str(folders / "text.txt"), text_share=1.0, eval_count=0, log_every=1,
        save_every=2,
    )  # fmt: skip
    return DistillConfig(**(flags | changes))


def stop_at(monkeypatch, step):
    """Ctrl-C while `step` is being made."""
    made = []

    def noticed(*args):
        made.append(1)
        if len(made) == step:
            signal.raise_signal(signal.SIGINT)
        return distill_step(*args)

    monkeypatch.setattr(distill, "distill_step", noticed)


@pytest.mark.parametrize("changes", [
    {}, {"optimizer": "lean"}, {"loss": "topk", "cache": "on", "topk": 5}, {"loss": "ce"},
], ids=["kl", "lean", "topk", "ce"])  # fmt: skip
def test_a_run_that_is_stopped_goes_on_to_the_bit(folders, tmp_path, monkeypatch, capsys, changes):
    whole = distill.run(asked(folders, tmp_path / "a", **changes))
    with monkeypatch.context() as patch:
        stop_at(patch, 4)  # in the second stage
        assert distill.run(asked(folders, tmp_path / "b", **changes)) is None
    assert "The same command goes on" in capsys.readouterr().out
    assert distill.run(asked(folders, tmp_path / "b", **changes))["step"] == whole["step"] == 6
    a, b = (load_file(tmp_path / x / "training.safetensors") for x in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    logs = [[json.loads(line) for line in (tmp_path / x / "log.jsonl").read_text().splitlines()] for x in "ab"]
    peak = distill.LR[changes.get("optimizer", "adamw")]
    for e in logs[0][:-1]:
        assert math.isclose(e["lr"], peak * wsd(e["step"] - 1, 6, 0.05, 0.95))
    a, b = ([(e["step"], e["loss"], e["length"], e["tokens"]) for e in log if "loss" in e] for log in logs)
    assert a == b and [e[2] for e in a] == [64] * 3 + [128] * 3 and a[-1][3] == 6 * 256
    assert (tmp_path / "b" / "distillation.png").stat().st_size > 0
    assert checkpoint.load_pretrained(tmp_path / "b")[0].config.intermediate_size == 24


def test_the_teachers_answers_are_written_once(folders, tmp_path, monkeypatch):
    """From the file or alive, the same steps; another run on the same rows makes no second teacher pass."""
    changes = {"loss": "topk", "topk": 5, "length": "64:4"}
    live = distill.run(asked(folders, tmp_path / "a", **changes))
    run = distill.Run(asked(folders, tmp_path / "b", cache="on", **changes))
    assert run.teacher is None
    run.train(), run.finish()
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / x / "log.jsonl").read_text().splitlines() if '"loss"' in line]
        for x in "ab"
    ]
    assert live["step"] == 4 and np.allclose(*losses, rtol=2e-2)  # float16 answers
    monkeypatch.setattr(teacher_cache, "top_logits", lambda *a: pytest.fail("asked again"))
    teacher = checkpoint.load_pretrained(folders / "teacher")[0]
    folder = tmp_path / "b" / "stage1" / "data"
    assert teacher_cache.write(folder, teacher, 5) == teacher_cache.ARRAYS
    monkeypatch.undo()
    before = np.load(folder / "topk_logits.npy").copy()
    with torch.no_grad():
        teacher.lm_head.weight.mul_(1.5)
    teacher_cache.write(folder, teacher, 5)
    assert not np.array_equal(before, np.load(folder / "topk_logits.npy"))


def test_the_gap_that_is_closed(folders, tmp_path):
    result = distill.run(asked(folders, tmp_path, eval_count=1, length="64:2"))
    t, b, a = (result[k]["bits"]["text"] for k in ("teacher", "before", "after"))
    assert math.isclose(result["recovered"]["bits text"], (a - b) / (t - b))
    assert result["recovered"]["exact all"] is None  # nobody here answers anything


def test_noise_measures_a_step(tmp_path, capsys):
    flags = ["--teacher", "nano-1m", "--student", "nano-1m", "--out", str(tmp_path), "--steps", "2", "--device", "cpu"]
    assert distill.main([*flags, "--length", "64", "--step-tokens", "64", "--optimizer", "lean"]) == 0
    assert "random tokens" in capsys.readouterr().out
    assert not (tmp_path / "training.safetensors").exists()


def test_what_cannot_be_compared_is_refused(ours_tokenizer, released_like):
    with pytest.raises(ValueError, match="263 words and the student 264"):
        one_language(ours(), ours(vocab_size=264), (None, None))
    with pytest.raises(ValueError, match="differ in"):
        one_language(ours(), ours(), (ours_tokenizer, released_like))
    assert one_language(ours(), ours(), (None, ours_tokenizer)) is ours_tokenizer


@pytest.mark.parametrize("flags, sentence", [
    (["--student", ""], "--student is empty"), (["--loss", "mse"], "not one of"), (["--length", "x"], "--length"),
    (["--loss", "ce", "--temperature", "2"], "--temperature"), (["--cache", "on"], "topk"),
    (["--text-share", "2"], "--text-share"), (["--step-tokens", "100", "--length", "128"], "--step-tokens"),
    (["--warmup", "0.5"], "together at most 1"), (["--lr", "nan"], "--lr"),
    (["--student", "nowhere"], "does not exist"),
    (["--optimizer", "sgd"], "--optimizer"), (["--nonsense"], "--help"), (["--seed", "-1"], "--seed"),
])  # fmt: skip
def test_bad_flags_are_one_sentence(folders, tmp_path, capsys, flags, sentence):
    given = ["--teacher", str(folders / "teacher"), "--student", str(folders / "student"), "--out", str(tmp_path / "o")]
    assert distill.main([*given, "--device", "cpu", *flags]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1 and not (tmp_path / "o").exists()


def test_another_run_in_the_folder_is_refused(folders, tmp_path):
    config = asked(folders, tmp_path, length="64:1")
    distill.run(config)
    with pytest.raises(ValueError, match="loss 'kl' -> 'ce'"):
        distill.run(replace(config, loss="ce"))


@pytest.mark.gpu
def test_a_lean_step_holds_what_the_formula_says():
    """A wide, shallow pair in bfloat16, Triton beside PyTorch: the same loss and norm; teacher and weights stay in
    memory, and there is never more than the formula's total."""
    c, found = replace(PRESETS["nano-9b"], hybrid_override_pattern="M-M*-M-"), []
    parts, cuda = needed_bytes(c, c, 2048, 2048, lean=True, recompute=True), torch.device("cuda")
    batch = [t.cuda() for t in batch_of(1, 2048, c.vocab_size)]
    for impl in ("torch", "triton"):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.manual_seed(0)
        teacher, student = (noise(c, cuda, torch.bfloat16).use(impl) for _ in range(2))
        teacher.requires_grad_(False)
        recompute_layers(student)
        optimizer = Lean(parameter_groups(student, 0.0), 1e-4).in_backward()
        for _ in range(2):
            total, count, norm = distill_step(teacher, student, optimizer, batch, PLAIN, nullcontext)
        found.append(((total / count).item(), norm.item()))
        held, most = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
        del teacher, student, optimizer
    assert np.allclose(*found, rtol=0.03)
    assert abs(held / (parts["teacher"] + parts["weights"]) - 1) < 0.02 and most < parts["total"]
