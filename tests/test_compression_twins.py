"""The twins of compression: what runs share and where they differ, what is missing is made, and what is shown."""

import json
import shutil
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "notebooks"))

import compression_tables as shown
import compression_twins as twins
import recipe_twins

import calibration
from model import PRESETS
from prune import CUT
from search import shape
from sizes import count_parameters

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "assets" / "compression_twins.json"
MADE = ("pruned", "pruned, better cut", "kl", "ce", "kl, half the rows", "kl, layers first",
        "FFN + embedding", "heads + FFN", "depth 2", "axes")  # fmt: skip


def small(folder, monkeypatch):
    """Everything at a size for tests, with the text of a file; returns the arguments of a call."""
    text = folder / "text.txt"
    text.write_text("".join(f"{i} times {i} is {i * i}, as anybody can see.\n" for i in range(600)))

    def settings(*given):
        config = recipe_twins.settings(*given)
        return replace(config, text=str(text), length=64, vocab=384, text_share=0.3)

    monkeypatch.setattr(twins, "settings", settings)
    monkeypatch.setitem(twins.SAMPLES, "nano-1m", 6)
    monkeypatch.setattr(twins, "DRAWS", 2)
    monkeypatch.setattr(calibration, "FRESH", 6)
    monkeypatch.setitem(twins.ROWS, "nano-1m", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return SimpleNamespace(
        preset="nano-1m", steps=100, rows=2, length=0, count=0, work=str(folder / "work"), commit="c", together=1,
        impl="auto", seeds=1, first_seed=0, until=float("inf"), arms=list(MADE),
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(arguments, {arm: record}) of seed 0."""
    folder = tmp_path_factory.mktemp("compression")
    with pytest.MonkeyPatch.context() as monkeypatch:
        args = small(folder, monkeypatch)
        twins.prepare(twins.settings(args.preset, args.steps, args.rows, args.work), lambda text: None)
        twins.work(args, 0, ["parent", *MADE])
        runs = {name: json.loads(twins.part_of(args, name, 0).read_text()) for name in ("parent", *MADE)}
        yield args, runs


def test_the_shapes_are_what_is_said_of_them():
    for preset in twins.SHAPES:
        parent = PRESETS[preset]
        made = {name: twins.sizes_of(parent, preset, name) for name in twins.SHAPES[preset]}
        whole = {name: twins.shorter(*both) for name, both in made.items()}
        count = {name: count_parameters(c)["total"] for name, c in whole.items()}
        for name in ("width 1", "width 2"):
            assert abs(count[name] / count["width 0"] - 1) < 1e-3 and whole[name].mamba_num_heads < 16
            assert whole[name].mamba_num_heads < whole["width 0"].mamba_num_heads == parent.mamba_num_heads
            assert whole[name].num_hidden_layers == whole["width 0"].num_hidden_layers
        depths = [whole[f"depth {n}"] for n in (1, 2, 3)]
        assert all(shape(c) == shape(parent) for c in depths) and len({c.num_hidden_layers for c in depths}) == 3
        assert count["depth 1"] > count["depth 2"] > count["depth 3"] > count["target"] * 0.6
        assert len({c.hybrid_override_pattern.count("*") for c in [parent, *whole.values()]}) == 1
        assert all(getattr(c, name) <= getattr(parent, name) for c in whole.values() for name in CUT)
    target, nine = whole_target("nano-12m"), PRESETS["nano-9m"]
    assert [getattr(target, name) for name in CUT] == [getattr(nine, name) for name in CUT]
    assert sorted(target.hybrid_override_pattern) == sorted(nine.hybrid_override_pattern)


def whole_target(preset):
    return twins.shorter(*twins.sizes_of(PRESETS[preset], preset, "target"))


def test_no_run_reads_more_than_a_tenth_of_its_parent(made):
    args, runs = made
    assert max(arm.share for arm in twins.ARMS.values()) == 0.1
    assert all(run["tokens"] <= 0.1 * runs["parent"]["tokens"] for arm, run in runs.items() if arm in MADE[:-1])
    assert runs["kl"]["tokens"] == runs["ce"]["tokens"] == runs["kl, half the rows"]["tokens"] == 1280
    assert runs["kl"]["steps"] == 10 and runs["kl, half the rows"]["steps"] == 20
    assert runs["FFN + embedding"]["tokens"] == runs["heads + FFN"]["tokens"] == runs["depth 2"]["tokens"] == 640
    assert runs["pruned"]["steps"] == 0 and runs["pruned"]["loss"] == runs["pruned"]["before"]


def test_runs_start_from_one_cut_and_differ_in_what_they_say(made):
    args, runs = made
    for arm in ("kl", "ce", "kl, half the rows"):
        assert runs[arm]["before"] == runs["pruned"]["loss"] and runs[arm]["config"] == runs["pruned"]["config"]
    assert runs["pruned, better cut"]["loss"] != runs["pruned"]["loss"]
    losses = [runs[arm]["loss"] for arm in MADE[2:6]]
    assert len(set(losses)) == 4 and all(loss < runs["pruned"]["loss"] for loss in losses)
    first = {arm: runs[arm]["losses"][0] for arm in ("kl", "ce")}
    assert 0 < first["kl"] < first["ce"]
    apart = runs["kl, layers first"]
    assert apart["before"] < runs["pruned"]["loss"]  # only layers are gone by then
    assert [apart["config"][n] for n in CUT] == [runs["kl"]["config"][n] for n in CUT] and apart["steps"] == 10
    assert runs["depth 2"]["config"]["pattern"].count("M") == 2 and runs["depth 2"]["config"]["hidden_size"] == 128
    assert runs["heads + FFN"]["config"]["mamba_num_heads"] == 2


def test_a_run_is_the_same_again_on_a_cpu(made):
    args, runs = made
    again = twins.Lab(args, 0).run("kl, layers first")
    assert {k: v for k, v in again.items() if "seconds" not in k and k != "trained"} == {
        k: runs["kl, layers first"][k] for k in again if "seconds" not in k and k != "trained"
    }


def test_axes_measure_every_cut_every_way(made):
    cuts = made[1]["axes"]["cuts"]
    sizes = {axis: [c["size"] for c in cuts if c["axis"] == axis] for axis in (*twins.AXES.values(), "layers")}
    assert sizes == {"embedding channels": [112, 96], "FFN neurons": [384, 256], "Mamba heads": [2],
                     "head channels": [48, 32], "layers": [6, 5, 4]}  # fmt: skip
    for c in cuts:
        assert len(c["random"]) == 2 and c["ranked"] == c["by"]["iterative" if c["axis"] == "layers" else "pre, l2"]
        assert c["ranked"] != c["reversed"] and c["size"] < c["of"]
        if c["axis"] == "FFN neurons":
            assert c["by"]["post, l2"] != c["by"]["pre, l2"] and c["rescaled"] == c["ranked"]
        elif c["axis"] == "embedding channels":
            assert c["by"]["post, l2"] == c["by"]["pre, l2"] and c["rescaled"] != c["ranked"]
    layers = [c["removed"]["iterative"] for c in cuts if c["axis"] == "layers"]
    assert [len(gone) for gone in layers] == [1, 2, 3] and layers[2][:2] == layers[1] and layers[1][:1] == layers[0]


def test_a_second_call_makes_what_is_missing(made, tmp_path, monkeypatch, capsys):
    args = SimpleNamespace(**vars(made[0]) | {"work": str(tmp_path / "work"), "arms": ["pruned", "kl", "ce"]})
    shutil.copytree(made[0].work, args.work)
    for name in ("kl", "ce"):
        twins.part_of(args, name, 0).unlink()
    begun, out = [], tmp_path / "record.json"

    def begin(args, gpu, seed, names):
        begun.extend((seed, name) for name in names)
        twins.work(args, seed, names)

    run = twins.Lab.run
    monkeypatch.setattr(twins.Lab, "run", lambda lab, name: run(lab, name) if name != "kl" else 1 / 0)
    twins.collect(args, twins.start_record(args, out), out, print, begin)
    assert begun == [(0, "kl"), (0, "ce")] and "kl, seed 0 failed: " in capsys.readouterr().out
    record = json.loads(out.read_text())
    assert {r["arm"] for r in record["runs"]} == {"parent", *MADE} - {"kl"}  # the other did not go along
    monkeypatch.setattr(twins.Lab, "run", run)
    args.until = 0
    twins.collect(args, twins.start_record(args, out), out, print, begin)
    assert begun[2:] == [(0, "kl")] and "no time left for kl" in capsys.readouterr().out
    args.first_seed = 1
    assert len(twins.start_record(args, out)["runs"]) == len(MADE)  # of a seed that was not asked for
    args.first_seed = 0
    shutil.rmtree(tmp_path / "work" / "parent 0")
    assert twins.start_record(args, out)["runs"] == []  # what was made from a parent that is no more
    assert not twins.part_of(args, "ce", 0).exists()
    args.steps = 99
    with pytest.raises(ValueError, match="holds runs with other preset, steps"):
        twins.start_record(args, out)


def test_a_worker_is_told_all_that_counts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what is asked for here is not usual in any respect
    asked = dict(
        preset="nano-1m", steps=77, rows=3, length=128, count=5, work="w", commit="abc", impl="torch", until=9.5
    )
    told = []
    monkeypatch.setattr(twins.subprocess, "run", lambda words, env: told.append((words, env)))
    monkeypatch.setattr(twins, "work", lambda args, seed, names: told.append((args, seed, names)))
    twins.launch(SimpleNamespace(**asked), 3, 2, ["kl, half the rows", "axes"])
    (words, env), script = told.pop(), Path(twins.__file__)
    assert env["CUDA_VISIBLE_DEVICES"] == "3" and Path(words[1]) == script
    assert twins.main(words[2:]) == 0
    ((args, seed, names),) = told
    assert (seed, names) == (2, ["kl, half the rows", "axes"]) and {k: vars(args)[k] for k in asked} == asked


def exam(right):
    return {name: {"1": share} for name, share in right.items()}


def by_hand():
    """A record of two seeds with numbers that can be followed."""
    config = dict(zip(CUT, (112, 384, 4, 64))) | {"pattern": "M-M*M-", "vocab_size": 512}
    runs, right = [], {"parent": (0.9, 0.7), "pruned": (0.1, 0.1), "kl": (0.5, 0.4), "ce": (0.7, 0.1)}
    for seed in (0, 1):
        for arm, (add, needle) in right.items():
            part = "parent" if arm == "parent" else "recovery"
            runs.append({
                "arm": arm, "part": part, "seed": seed, "config": config, "parameters": 1234, "tokens": 2560,
                "loss": 1.0, "before": 2.0, "bits": {"text": 3.0 - add}, "seconds": 1.0,
                "exact": exam({"add": add + 0.1 * seed, "needle": needle}),
            })  # fmt: skip
        cut = dict(axis="FFN neurons", size=3, of=4, ranked=1.0, random=[2.0, 0.5 + seed], reversed=3.0, rescaled=1.0)
        gone = cut | dict(axis="layers", by={"iterative": 1.0, "one-shot": 1.0 - 0.1 * seed})
        cuts = [cut | {"by": {"pre, l2": 1.0, "post, l2": 1.1}}, gone]
        runs.append({"arm": "axes", "part": "axes", "seed": seed, "cuts": cuts})
    memory = [
        {"arm": "kl", "shape": [112, 384, 4, 64, 3, 1, 2], "tokens": 4096, "formula": 2**20, "held": 1.01 * 2**20}
    ]
    return {"command": "x", "date": "d", "card": "CPU", "torch": "t", "preset": "nano-1m", "steps": 100, "rows": 8,
            "length": 32, "count": 10, "runs": runs, "memory": memory}  # fmt: skip


def test_tables_are_sums_of_the_record(tmp_path, capsys):
    record = by_hand()
    (tmp_path / "r.json").write_text(json.dumps(record))
    flags = f"--source {tmp_path / 'r.json'} --figure {tmp_path / 'f.png'}"
    assert twins.main(flags.split()) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "f.png").stat().st_size > 10_000 and "= 0.03 M" in printed
    rows = {}
    for line in printed.splitlines():
        rows.setdefault(line.split(" | ")[0][2:], line.split(" | "))
    axis = rows["FFN neurons 4 -> 3"]
    assert axis[4:] == ["2 of 2", "3 of 4 |"] and axis[2].startswith("1.500 (0.500 to 2.000)")
    assert "than each: 4 -> 3 in 2 of 2 seeds and 3 of 4 cuts." in printed
    iterative = next(line for line in printed.splitlines() if line.startswith("| 4 -> 3 |"))
    assert iterative.split(" | ")[1:] == ["1.000 (1.000 to 1.000)", "0.950 (0.900 to 1.000)", "1 of 2 |"]
    kl = rows["kl"]
    assert kl[4] == "10.0%" and kl[6:] != rows["ce"][6:]
    assert kl[7].startswith("55.0% (50.0% to 60.0%)") and kl[8] == "40.0% (40.0% to 40.0%)"
    assert [cell.split()[0] for cell in kl[11:]] == ["50%", "50%", "50%", "50%"]
    assert [cell.split()[0] for cell in rows["ce"][11:]] == ["75%", "0%", "43%", "75%"]
    assert rows["add"][1:] == ["95% (90% to 100%)", "15% (10% to 20%)", "55% (50% to 60%) |"]  # kl is the best
    assert shown.best_arm(record) == "kl" and "+1.00%" in printed and "1.000 | 1.010" in printed
    both = [shown.closed(record, r, "exact all") for r in record["runs"] if r["arm"] == "ce"]
    assert statistics.mean(both) == pytest.approx(0.6 / 1.4)


def test_orders_are_counted_by_seed():
    def runs(*rows):
        return {name: [{"seed": i, "x": x} for i, x in enumerate(row)] for name, row in zip("abc", rows)}

    ways = [
        shown.holds(runs((1, 1, 2), (2, 3, 1), (3, 2, 3)), "abc", lambda r: r["x"], strict) for strict in (True, False)
    ]
    assert ways == ["1 of 3 seeds", "2 of 3 seeds"]
    assert shown.holds(runs((1, 1), (1, 2), (2,)), "abc", lambda r: r["x"], True) == "0 of 1 seeds"
    record = by_hand()
    for run, loss in zip([r for r in record["runs"] if r["arm"] == "ce"], (1.1, 0.9)):
        run["loss"] = loss
    for seed, losses in enumerate(((1.0, 1.1, 1.2), (1.0, 1.2, 1.1))):
        like = next(r for r in record["runs"] if r["arm"] == "kl" and r["seed"] == seed)
        for part, names in (
            ("depth", ("depth 1", "depth 2", "depth 3")),
            ("width", ("FFN + embedding", "heads + FFN")),
        ):
            for i, (arm, loss) in enumerate(zip(names, losses)):
                bits = {"text": 1.0 + 0.1 * i, "code": 1.0 - 0.1 * i * seed}
                record["runs"].append(like | {"arm": arm, "part": part, "loss": loss, "bits": bits})
    printed = shown.tables(record)
    assert "the loss rises in 1 of 2 seeds, and exact answers fall in 0 of 2 seeds" in printed
    assert "bits a byte rise in 2 of 2 seeds on text, 0 of 2 seeds on code." in printed
    assert "'FFN + embedding' has the lowest loss in 2 of 2 seeds, and the most exact answers in 0 of 2" in printed
    assert "the fewest bits a byte in 2 of 2 seeds on text, 0 of 2 seeds on code." in printed
    assert "'kl' has a lower loss than 'ce' in 1 of 2 seeds, and more exact answers in 2 of 2 seeds" in printed
    assert "fewer bits a byte in 0 of 2 seeds on text." in printed


def test_memory_of_every_shape_once(made):
    runs = list(made[1].values())
    found = twins.measure_memory({"preset": "nano-1m", "runs": runs}, torch.device("cpu"))
    assert [m["arm"] for m in found] == ["parent", "pruned", "FFN + embedding", "heads + FFN", "depth 2"]
    for m in found:
        assert abs(m["held"] / m["formula"] - 1) < 0.01


@pytest.mark.skipif(not RECORD.exists(), reason="no record was made yet")
def test_the_tables_are_those_of_the_record(capsys):
    assert twins.main(["--source", str(RECORD)]) == 0
    assert capsys.readouterr().out.strip() in (ROOT / "RESULTS.md").read_text("utf-8")


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--steps 3", "--steps must be at least 20; got 3"),
        ("--seconds -1", "--seconds must be at least 0"),
        ("--out nowhere/there.json", "there is no folder nowhere"),
        ("--source nowhere.json", "--source nowhere.json cannot be used: FileNotFoundError"),
        ("--impl magic", "--impl 'magic' is not one of auto, torch, triton"),
        ("--arms all", "invalid choice: 'all'"),
        ("--preset nano-12b", "invalid choice: 'nano-12b'"),
    ],
)
def test_bad_input(flags, words, capsys):
    assert twins.main(flags.split()) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
