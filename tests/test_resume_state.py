"""Training state: resumed to the bit, whole after any kill, and refused in a sentence where it does not fit."""

import errno
import os
import random
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from disk import Calls, Killed, halve, kill_points, killed_while_saving, largest_file, same, sentence
from reference import ours
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import resume
import safefile
from checkpoint import save_pretrained
from resume import load_training, peek_training, save_training


def make_optimizer(model, **options):
    """Two groups, as the trainer has: matrices decay, vectors do not."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), **options)


def steps(model, optimizer, n, first=0):
    """n steps on data drawn from all three generators, so that a forgotten one shows."""
    model.train()
    for i in range(first, first + n):
        lr = torch.tensor(3e-3 / (1 + i)).item()
        for group in optimizer.param_groups:
            group["lr"].fill_(lr) if isinstance(group["lr"], torch.Tensor) else group.update(lr=lr)
        shift = random.randrange(50) + int(np.random.randint(50))
        ids = (torch.randint(0, 200, (2, 19)) + shift) % 263
        loss = torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def seed(n):
    torch.manual_seed(n), random.seed(n), np.random.seed(n)


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}, {"amsgrad": True}])
def test_resume_to_the_bit(tmp_path, options):
    path = tmp_path / "training.safetensors"
    seed(1)
    model = ours()
    optimizer = make_optimizer(model, **options)
    steps(model, optimizer, 3)
    loop = {
        "step": 3,
        "data": {"file": "a", "at": [1, 2**60]},
        "ema": 0.1 + 0.2,
        "scaler": None,
        "t": (1, "x"),
        "b": True,
    }
    torch.randn(3), random.gauss(0, 1), np.random.standard_normal()  # generators caught with half a pair in hand
    save_training(path, model, optimizer, loop)
    for_all_to_see = dict(loop, t=[1, "x"])
    assert peek_training(path) == for_all_to_see
    loss = steps(model, optimizer, 3, first=3)

    seed(2)
    resumed = ours(seed=7)
    optimizer2 = make_optimizer(resumed, **options)
    for group in optimizer2.param_groups:
        group["lr"], group["weight_decay"] = 9.0, 9.0
    steps(resumed, optimizer2, 1)  # it has a state of its own, to be replaced
    assert load_training(str(path), resumed, optimizer2) == for_all_to_see
    assert [g["weight_decay"] for g in optimizer2.param_groups] == [0.1, 0.0]
    assert optimizer2.param_groups[0]["betas"] == (0.9, 0.95)
    assert steps(resumed, optimizer2, 3, first=3) == loss
    assert same(model, resumed)
    for p, q in zip(model.parameters(), resumed.parameters()):
        assert optimizer.state[p].keys() == optimizer2.state[q].keys() and "exp_avg" in optimizer.state[p]
        assert all(torch.equal(optimizer.state[p][k], optimizer2.state[q][k]) for k in optimizer.state[p])
    assert torch.equal(torch.rand(3), torch.rand(3)) is False  # the generator runs on


def test_generators_are_restored(tmp_path):
    seed(3)
    draw = lambda: (torch.rand(2).tolist(), random.gauss(0, 1), np.random.standard_normal(3).tolist(), random.random())
    draw()
    save_training(tmp_path / "t", ours(), None, {})
    first = draw()
    assert draw() != first
    load_training(tmp_path / "t", ours())
    assert draw() == first


def test_file_can_be_read_by_names(tmp_path):
    model = ours()
    optimizer = make_optimizer(model)
    steps(model, optimizer, 1)
    save_training(tmp_path / "t", model, optimizer, {})
    stored = load_file(tmp_path / "t")
    name = "backbone.layers.3.mixer.q_proj.weight"
    parameter = dict(model.named_parameters())[name]
    assert torch.equal(stored[f"model.{name}"], parameter)
    assert torch.equal(stored[f"exp_avg.{name}"], optimizer.state[parameter]["exp_avg"])
    assert torch.equal(stored[f"exp_avg_sq.{name}"], optimizer.state[parameter]["exp_avg_sq"])
    assert stored[f"step.{name}"].item() == 1
    assert struct.unpack("<Q", (tmp_path / "t").read_bytes()[:8])[0] % 8 == 0  # the format's alignment


def test_order_of_parameters_does_not_matter(tmp_path):
    model, other = ours(), ours(seed=1)
    optimizer = torch.optim.AdamW(model.parameters())
    steps(model, optimizer, 1)
    save_training(tmp_path / "t", model, optimizer, {})
    backwards = torch.optim.AdamW(list(other.parameters())[::-1])
    load_training(tmp_path / "t", other, backwards)
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        assert torch.equal(optimizer.state[p]["exp_avg"], backwards.state[q]["exp_avg"]), name


def test_optimizer_without_state_and_frozen_parameters(tmp_path):
    model = ours()
    save_training(tmp_path / "t", model, make_optimizer(model), {"step": 0})
    other = ours(seed=1)
    optimizer = make_optimizer(other)
    steps(other, optimizer, 1)
    load_training(tmp_path / "t", other, optimizer)
    assert same(model, other) and not optimizer.state
    model.lm_head.weight.requires_grad_(False)
    optimizer = make_optimizer(model)
    steps(model, optimizer, 1)
    save_training(tmp_path / "t", model, optimizer, {})
    load_training(tmp_path / "t", other, optimizer2 := make_optimizer(other))
    assert other.lm_head.weight not in optimizer2.state and len(optimizer2.state) == len(optimizer.state) > 40


def test_optimizer_state_is_restored_in_place_and_steps_where_they_belong(tmp_path):
    model = ours()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.25), capturable=True, foreach=False)
    optimizer.state[model.lm_head.weight] = {
        "step": torch.tensor(5.0), "exp_avg": torch.full((263, 64), 2.0), "exp_avg_sq": torch.full((263, 64), 3.0)
    }  # fmt: skip
    save_training(tmp_path / "t", model, optimizer, {})
    lr, state = optimizer.param_groups[0]["lr"], dict(optimizer.state[model.lm_head.weight])
    weights = model.lm_head.weight.data_ptr()
    lr.fill_(1.0)
    for tensor in state.values():
        tensor.zero_()
    load_training(tmp_path / "t", model, optimizer)
    assert optimizer.param_groups[0]["lr"] is lr and lr.item() == 0.25 and model.lm_head.weight.data_ptr() == weights
    assert all(optimizer.state[model.lm_head.weight][k] is tensor for k, tensor in state.items())
    assert [t.max().item() for t in state.values()] == [5, 2, 3]
    assert optimizer.param_groups[0]["capturable"] is True
    plain = torch.optim.AdamW(model.parameters())
    load_training(tmp_path / "t", model, plain)
    assert plain.param_groups[0]["lr"] == 0.25 and plain.param_groups[0]["capturable"] is False


def test_training_mismatch(tmp_path):
    path, model = tmp_path / "t", ours()
    optimizer = make_optimizer(model)
    steps(model, optimizer, 1)
    save_training(path, model, optimizer, {"step": 1})
    wide, deep = ours(vocab_size=264), ours(hybrid_override_pattern="M-M*-M")
    sentence(lambda: load_training(path, wide), "vocab_size 263 (now 264)")
    sentence(lambda: load_training(path, deep), "hybrid_override_pattern 'M-M*-M-' (now 'M-M*-M')")
    sentence(lambda: load_training(path, ours(torch.bfloat16)), "torch_dtype 'float32' (now 'bfloat16')")
    other = ours(seed=4)
    sentence(lambda: load_training(path, other, torch.optim.SGD(other.parameters())), "AdamW", "SGD")
    sentence(lambda: load_training(path, other, torch.optim.AdamW(other.parameters())), "2 optimizer groups", "in 1")
    sentence(lambda: load_training(path, other, torch.optim.AdamW([other.lm_head.weight])), "groups")
    sentence(lambda: load_training(path, other, make_optimizer(ours())), "not this model's")
    sentence(lambda: save_training(path, other, optimizer, {}), "not this model's")
    assert same(other, ours(seed=4))  # nothing is half loaded
    save_training(path, model, None, {})
    sentence(lambda: load_training(path, other, make_optimizer(other)), "without an optimizer")


def test_training_file_of_another_version(tmp_path):
    path, model = tmp_path / "t", ours()
    optimizer = make_optimizer(model)
    steps(model, optimizer, 1)
    save_training(path, model, optimizer, {"step": 1})
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for change in (
        {"model.lm_head.weight": None},
        {"model.extra": torch.ones(2)},
        {"model.lm_head.weight": torch.ones(3, 4)},
        {"exp_avg.lm_head.weight": torch.ones(3, 4)},
    ):
        changed = {k: v for k, v in (tensors | change).items() if v is not None}
        save_file(changed, path, metadata)
        other = ours(seed=4)
        call = lambda other=other: load_training(path, other, make_optimizer(other))
        text = sentence(call, "another version")
        assert next(iter(change)) in text and same(other, ours(seed=4))


@pytest.mark.parametrize("read", [peek_training, lambda path: load_training(path, ours())], ids=["peek", "load"])
def test_not_a_training_file(tmp_path, read):
    folder = tmp_path / "m"
    save_pretrained(folder, ours())
    sentence(lambda: read(tmp_path / "no"), "does not exist")
    sentence(lambda: read(tmp_path), "not a file")
    sentence(lambda: read(folder / "model.safetensors"), "load_pretrained")
    sentence(lambda: read(folder / "config.json"), "safetensors")
    save_training(tmp_path / "t", ours(), None, {})
    halve(tmp_path / "t")
    sentence(lambda: read(tmp_path / "t"), "cut short")


@pytest.mark.parametrize(
    "loop, words",
    [
        ({"loss": torch.tensor(1.0)}, ["loop['loss']", "Tensor"]),
        ({"a": [0, {"b": {1, 2}}]}, ["loop['a'][1]['b']", "set"]),
        ({"a": {3: "x"}}, ["loop['a']", "key 3"]),
        ({"a": np.float64(1.0)}, ["float64"]),
        ({"a": np.int64(1)}, ["int64"]),
        ({"a": b"x"}, ["bytes"]),
    ],
)
def test_loops_that_json_would_change(tmp_path, loop, words):
    sentence(lambda: save_training(tmp_path / "t", ours(), None, loop), *words)
    assert not os.listdir(tmp_path)


def test_header_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(safefile, "HEADER_LIMIT", 30_000)
    save_training(tmp_path / "t", ours(), None, {"x": "y"})
    sentence(lambda: save_training(tmp_path / "t", ours(), None, {"x": "y" * 30_000}), "30,000", "loop")
    assert os.listdir(tmp_path) == ["t"] and peek_training(tmp_path / "t") == {"x": "y"}


# ---------------------------------------------------------------------------------------------------------------------
# Writing that fails, or is cut short
# ---------------------------------------------------------------------------------------------------------------------


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    sentence(lambda: save_training(tmp_path / "file" / "t", ours(), None, {}), "file is where a folder should be")
    (tmp_path / "t").mkdir()
    sentence(lambda: save_training(tmp_path / "t", ours(), None, {}), "reverse")
    assert sorted(os.listdir(tmp_path)) == ["file", "t"]

    def refuse(path, mode="r", **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    sentence(lambda: save_training(tmp_path / "n", ours(), None, {}), "Permission denied", "permissions")
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["file", "t"]


@pytest.mark.skipif(os.name == "nt" or os.getuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    sentence(lambda: save_training(tmp_path / "t", ours(), None, {}), "permissions")


def test_disk_full(tmp_path):
    """A real limit in the middle of a file: what was there stays whole, and nothing half-written is left."""
    save_training(tmp_path / "t", ours(), None, {"step": 3})
    before = os.listdir(tmp_path)
    with largest_file(200_000):
        sentence(lambda: save_training(tmp_path / "t", ours(seed=1), None, {"step": 4}), "free some space")
    assert os.listdir(tmp_path) == before
    assert load_training(tmp_path / "t", restored := ours(seed=2)) == {"step": 3} and same(restored, ours())


def test_kill_at_every_call_leaves_old_or_new_training_file(tmp_path):
    path, (old, new) = tmp_path / "out" / "training.safetensors", (ours(seed=0), ours(seed=1))
    seen = set()
    save_training(path, old, None, {"step": 1})
    for k, after in kill_points(lambda: save_training(path, new, None, {"step": 2})):
        save_training(path, old, None, {"step": 1})
        with pytest.MonkeyPatch.context() as patch:
            Calls(patch, k, after)
            with pytest.raises(Killed):
                save_training(path, new, None, {"step": 2})
        restored = ours(seed=2)
        step = load_training(path, restored)["step"]
        assert same(restored, [old, new][step - 1])
        seen.add(step)
        save_training(path, new, None, {"step": 2})
        assert os.listdir(path.parent) == [path.name]
    assert seen == {1, 2}


def test_the_file_reaches_the_disk_before_its_name_does(tmp_path, monkeypatch):
    """A rename that overtakes the data would survive a power cut without it."""
    events, real_fsync, real_replace = [], os.fsync, os.replace
    inode = lambda x: os.stat(x).st_ino
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(("fsync", os.fstat(fd).st_ino)), real_fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("name", inode(a))), real_replace(a, b))[1])
    save_training(tmp_path / "t", ours(), None, {})
    file = inode(tmp_path / "t")
    assert events == [("fsync", file), ("name", file), ("fsync", inode(tmp_path))]


def test_real_kills(tmp_path):
    """SIGKILL at random moments of a process that does nothing but save."""
    script = (
        "from reference import ours\nfrom resume import *\n"
        "step = 0\n"
        "models = [ours(seed=i) for i in range(2)]\n"
        "while True:\n"
        "    step += 1\n"
        "    save_training(sys.argv[1] + '/t', models[step % 2], None, {'step': step})\n"
        "    if step == 1: print('go', flush=True)\n"
    )
    models = [ours(seed=i) for i in range(2)]
    for _ in killed_while_saving(tmp_path, script):
        step = load_training(tmp_path / "t", restored := ours(seed=5))["step"]
        assert step >= 1 and same(restored, models[step % 2])


def test_nothing_unpickles():
    """No import of pickle, no torch.load or torch.save, in the source of the module."""
    source = Path(resume.__file__).read_text()
    assert not re.search(r"torch\.(load|save)\b|^\s*(import|from) (pickle|shelve|joblib)|allow_pickle", source, re.M)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": True}])
def test_gpu_resume(tmp_path, options):
    seed(1)
    model = ours().cuda()
    optimizer = make_optimizer(model, **options)

    def one():
        ids = torch.randint(0, 263, (2, 19), device="cuda")
        model(ids).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    one()
    save_training(tmp_path / "t", model, optimizer, {})
    after_save = torch.rand(3, device="cuda")
    saved = {n: p.clone() for n, p in model.state_dict().items()}
    one()
    load_training(tmp_path / "t", model, optimizer)
    assert torch.equal(torch.rand(3, device="cuda"), after_save)
    assert all(torch.equal(saved[n], p) for n, p in model.state_dict().items())
    fresh = ours(seed=3).cuda()
    optimizer2 = make_optimizer(fresh, **options)
    load_training(tmp_path / "t", fresh, optimizer2)
    for p, q in zip(model.parameters(), fresh.parameters()):
        for kind, value in optimizer.state[p].items():
            assert optimizer2.state[q][kind].device == value.device and torch.equal(optimizer2.state[q][kind], value)
    load_training(tmp_path / "t", on_cpu := ours(seed=3), make_optimizer(on_cpu))
    assert all(torch.equal(saved[n].cpu(), p) for n, p in on_cpu.state_dict().items())
