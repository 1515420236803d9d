"""Merging: the ends to the bit, the line between them, and what cannot be merged."""

import json

import pytest
import torch
from fine_tuned import base_model, vocabulary
from reference import ours

import merge
import skills
from checkpoint import load_pretrained, save_pretrained
from stage import stage_of


def other(model, step=0.01):
    torch.manual_seed(7)
    moved = merge.copy.deepcopy(model)
    with torch.no_grad():
        for p in moved.parameters():
            p.add_(step * torch.randn_like(p))
    return moved


@pytest.fixture(scope="module")
def pair():
    a = base_model()
    return a, other(a)


@pytest.fixture
def folders(tmp_path, pair):
    for name, model in zip("ab", pair):
        save_pretrained(tmp_path / name, model, vocabulary())
    return tmp_path


def test_the_ends_are_the_parents_to_the_bit(pair):
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (merge.copy.deepcopy(m).to(dtype) for m in pair)
        before = [p.clone() for p in a.parameters()]
        for alpha, parent in ((0.0, a), (1.0, b)):
            merged = merge.merge(a, b, alpha)
            for x, y in zip(merged.parameters(), parent.parameters(), strict=True):
                assert x.dtype == dtype and torch.equal(x, y) and x.data_ptr() != y.data_ptr()
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), before))  # nobody's weights were moved


def test_between_the_ends(pair):
    a, b = pair
    for alpha in (0.1, 0.5, 0.7):
        for (name, w), x, y in zip(merge.merge(a, b, alpha).named_parameters(), a.parameters(), b.parameters()):
            assert torch.equal(w, ((1 - alpha) * x.double() + alpha * y.double()).float()), name
    ids = torch.arange(9)[None]
    far = (a(ids) - b(ids)).abs().max()
    near = (merge.merge(a, b, 0.25)(ids) - a(ids)).abs().max()
    assert 0 < near < far


def test_distance(pair):
    a, b = pair
    flat = [torch.cat([p.detach().flatten() for p in m.parameters()]).double() for m in pair]
    assert merge.distance(a, b) == pytest.approx(((flat[1] - flat[0]).norm() / flat[0].norm()).item())
    assert merge.distance(a, a) == 0


def test_what_a_merge_keeps_of_a_gain():
    lines = [
        {"alpha": alpha, "skills": {"tools": tools, "on": on, "off": 0.5}}
        for alpha, tools, on in ((0, 0.2, 0.9), (0.5, 0.65, 0.8), (1, 0.7, 0.4))
    ]
    found = merge.kept(lines)
    assert found.keys() == {"tools", "on"}  # off: nothing to keep
    assert found["tools"] == pytest.approx({0: 0.0, 0.5: 0.9, 1: 1.0})
    assert found["on"] == pytest.approx({0: 1.0, 0.5: 0.8, 1: 0.0})
    with pytest.raises(ValueError, match="needs both ends"):
        merge.kept(lines[:2])


def test_the_script(folders, pair, monkeypatch, capsys):
    a, b, out = folders / "a", folders / "b", folders / "m"
    asked = []

    def table(model, tokenizer, count, seed):
        asked.append((next(model.parameters()).detach().clone(), count, seed))
        return {"on": 0.5 + 0.1 * len(asked), "off": 0.25}

    monkeypatch.setattr(skills, "table", table)
    flags = [
        "--alpha",
        "0.25",
        "--sweep",
        "0,0.5,1",
        "--plot",
        str(folders / "s.png"),
        "--count",
        "3",
        "--device",
        "cpu",
    ]
    assert merge.main([str(a), str(b), "--out", str(out), *flags]) == 0
    printed = capsys.readouterr().out
    assert "gain kept on: 0 0%, 0.5 50%, 1 100%" in printed and (folders / "s.png").stat().st_size > 1000
    assert torch.equal(asked[0][0], next(pair[0].parameters())) and torch.equal(asked[2][0], next(pair[1].parameters()))
    assert [given[1:] for given in asked] == [(3, 0)] * 3
    merged, tokenizer = load_pretrained(out, "cpu", torch.float32)
    assert stage_of(out) == "merged" and tokenizer.ranks == vocabulary().ranks
    for x, y in zip(merged.parameters(), merge.merge(*pair, 0.25).parameters(), strict=True):
        assert torch.equal(x, y)
    assert merge.main([str(a), str(b), "--sweep", "1", "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["sweep"][0]["alpha"] == 1


@pytest.mark.parametrize(
    "flags, words",
    [
        ("", "nothing would be done"),
        ("--out {0}/m --alpha 1.5", "alpha must lie between 0 (the first model) and 1"),
        ("--sweep 0,x", "is no list of numbers"),
        ("--sweep 0,2", "alpha must lie between"),
        ("--out {0}/a", "is one of the two models"),
        ("--out {0}/m --plot x.png", "--plot draws a sweep"),
        ("--sweep 0 --count 0", "--count must be at least 1; got 0"),
    ],
)
def test_bad_flags(flags, words, folders, capsys):
    assert merge.main([str(folders / "a"), str(folders / "b"), *flags.format(folders).split()]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (folders / "m").exists()


def test_models_that_do_not_fit(folders, pair, capsys):
    torch.manual_seed(0)
    small = ours(vocab_size=vocabulary().vocab_size, hidden_size=32, intermediate_size=24)
    save_pretrained(folders / "c", small, vocabulary())
    assert merge.main([str(folders / "a"), str(folders / "c"), "--out", str(folders / "m"), "--device", "cpu"]) == 2
    assert "differ in intermediate_size 48 and 24" in capsys.readouterr().err and not (folders / "m").exists()
    assert merge.main([str(folders / "a"), str(folders / "none"), "--out", str(folders / "m")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ValueError, match="in one model and"):
        merge.merge(pair[0], small, 0.5)
