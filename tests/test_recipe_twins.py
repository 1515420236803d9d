"""The twins of the pretraining recipe: what differs between arms and what must not, and the record that is shown."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "notebooks"))

import recipe_twins as twins

import schedule
from fp8 import Recipe

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


quiet = lambda *_, **__: None


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """20 steps of nano-1m on text of a file: one blend, and three."""
    folder = tmp_path_factory.mktemp("twins")
    (folder / "text.txt").write_text("".join(f"{i} times {i} is {i * i}, as anybody can see.\n" for i in range(600)))
    made = []
    for phases in ("", twins.PHASES):
        config = twins.settings("nano-1m", 20, 2, folder / "work", phases)
        config = replace(config, text=str(folder / "text.txt"), length=64, vocab=384, text_share=0.3)
        twins.prepare(config, quiet)
        made.append(config)
    return made


@pytest.fixture(scope="module")
def config(configs):
    return configs[0]


@pytest.fixture(scope="module")
def runs(config):
    found = {}
    for arm in ("bf16", "bf16 again", "fp8"):
        for record in twins.train_arm(arm, 0, config, CPU, torch.float32, 0, quiet):
            found[record["arm"]] = record
    return found


def test_what_an_arm_is():
    assert twins.ARMS == {
        "bf16": None, "phases": None, "bf16 again": None, "fp8": (Recipe(), 4), "fp8, every layer": (Recipe(), 0),
        "fp8, one scale": (Recipe("tensor"), 4), "fp8, real": (Recipe(impl="real"), 4),
    }  # fmt: skip


def test_how_many_layers_an_arm_converts(config, monkeypatch):
    counts, real = [], twins.fp8.convert_
    monkeypatch.setattr(twins.fp8, "convert_", lambda *a, **k: counts.append(real(*a, **k)))
    monkeypatch.setattr(twins, "ranges", lambda *_: [])
    short = replace(config, steps=2)
    for arm in ("fp8", "fp8, every layer", "fp8, one scale"):
        twins.train_arm(arm, 0, short, CPU, torch.float32, 0, quiet)
    assert counts[1] - counts[0] == 8 and counts[2] == counts[0]


def test_phases_and_seeds_read_other_rows(configs, runs):
    (phases,) = twins.train_arm("phases", 0, configs[1], CPU, torch.float32, 0, quiet)
    other = twins.train_arm("bf16 again", 1, configs[0], CPU, torch.float32, 0, quiet)[0]
    assert phases["losses"][0] != runs["bf16"]["losses"][0] != other["losses"][0]
    meta = json.loads((twins.folder_of(configs[1]) / "data" / "meta.json").read_text())
    assert len(meta["blend"]) == 3
    assert twins.folder_of(configs[0]) != twins.folder_of(configs[1])


def test_the_control_is_the_trunk_with_its_rate_kept(config, runs, monkeypatch):
    """Step for step what a run does whose rate never falls: weights, moments and rows come back as they were."""
    monkeypatch.setattr(twins, "wsd", lambda step, steps, warmup, decay: schedule.wsd(step, steps, warmup, 0.0))
    (constant,) = twins.train_arm("bf16 again", 0, config, CPU, torch.float32, 0, quiet)
    fall = twins.decay_start(20, twins.DECAY)
    assert runs["bf16, no fall"]["losses"] == constant["losses"][fall:]


def test_arms_differ_in_what_they_say(runs):
    trunk, again, eight, flat = (runs[arm] for arm in ("bf16", "bf16 again", "fp8", "bf16, no fall"))
    assert trunk["losses"] == again["losses"] and trunk["bits"] == again["bits"]  # a CPU adds in a fixed order
    assert eight["losses"] != trunk["losses"]
    assert eight["losses"][0] == pytest.approx(trunk["losses"][0], rel=1e-3)  # the same weights and rows
    fall = twins.decay_start(20, twins.DECAY)
    assert len(trunk["losses"]) == 20 and len(flat["losses"]) == 20 - fall
    assert flat["losses"][0] == pytest.approx(trunk["losses"][fall], abs=1e-5)  # goes on from where the trunk was
    assert flat["losses"][1:] != trunk["losses"][fall + 1 :]
    assert trunk["loss"] == pytest.approx(sum(trunk["losses"][-2:]) / 2, abs=1e-5)


def test_ranges_of_every_layer(runs):
    ranges = runs["fp8"]["ranges"]
    names = [there["layer"] for there in ranges]
    assert len(names) == len(set(names)) == 8 and names[0] == "2.mixer.in_proj" and "ranges" not in runs["bf16"]
    for there in ranges:
        assert 0 <= there["block"]["zero"] < there["tensor"]["zero"] < 1
        assert 0 <= there["block"]["lost"] <= there["tensor"]["lost"] < 1


def test_ranges_see_a_loud_token():
    """A gradient in which one token is 2^20 times the others: one scale loses these, tiles do not."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(8, 6)
    linear.__class__, linear.recipe = twins.fp8.Fp8Linear, twins.FP8
    objective = torch.nn.Module()
    objective.model = torch.nn.Module()
    objective.model.backbone = torch.nn.Module()
    objective.model.backbone.layers = torch.nn.ModuleList([linear.train()])
    weight = torch.ones(4, 1).scatter(0, torch.zeros(1, 1, dtype=torch.long), 2.0**20)
    objective.forward = lambda x: (linear(x) * weight).sum() * torch.tensor([1.0, 0.0])
    x = torch.randn(4, 8, requires_grad=True)
    (there,) = twins.ranges(objective, [x], lambda: torch.autocast("cpu", enabled=False))
    assert there["tensor"] == {"zero": 0.75, "lost": 0.75} and there["block"] == {"zero": 0.0, "lost": 0.0}


def test_the_tables_are_those_of_the_record(capsys):
    file = ROOT / "assets" / "recipe_twins.json"
    assert twins.main(["--source", str(file)]) == 0
    printed = capsys.readouterr().out.strip()
    assert printed in (ROOT / "RESULTS.md").read_text("utf-8")
    record = json.loads(file.read_text("utf-8"))
    apart = twins.gaps(record, "fp8", lambda run: run["loss"])
    assert len(apart) == 6 and f"{sum(apart) / 6:+.2%}" in printed
    shares = [twins.exact(run, "reasoning", (1, 2, 3)) for run in record["runs"] if run["arm"] == "phases"]
    assert f"{sum(shares) / 3:.1%}" in printed


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--steps 3", "--steps must be at least 20; got 3"),
        ("--first-seed -1", "--first-seed must be at least 0"),
        ("--out nowhere/there.json", "there is no folder nowhere"),
        ("--source nowhere.json", "nowhere.json is no record of recipe_twins.py: FileNotFoundError"),
        ("--arms fp9", "invalid choice: 'fp9'"),
    ],
)
def test_bad_input(flags, words, capsys):
    assert twins.main(flags.split()) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_record_of_other_runs_is_not_added_to(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(twins, "prepare", None)  # it is said before anything is made
    flags = f"--out {tmp_path / 'r.json'} --preset nano-1m --steps 20 --rows 2 --arms bf16 --seeds 1"
    other = {"commands": [], "preset": "nano-1m", "steps": 99, "rows": 2, "card": "CPU", "runs": []}
    for text, words in (
        (json.dumps(other), "holds runs with other preset, steps"),
        ("[]", "no record"),
        ("{", "no record"),
    ):
        (tmp_path / "r.json").write_text(text)
        assert twins.main(flags.split()) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
        assert (tmp_path / "r.json").read_text() == text


@pytest.fixture
def plain(monkeypatch, tmp_path):
    """run(flags): main without training; a process writes its record at once. Broken arms fail."""
    monkeypatch.setattr(twins, "prepare", quiet)
    broken, seen = set(), []

    def process(words, env, **_):
        arm, seed, out = words[3], int(words[4]), Path(words[6])
        seen.append((arm, seed, env.get("CUDA_VISIBLE_DEVICES")))
        if arm in broken:
            return SimpleNamespace(returncode=2, stderr="no luck")
        loss = {"loss": 1.0 + seed, "seed": seed, "seconds": 0.1, "bits": {"prose": 2.0, "code": 1.0}}
        names = [arm, "bf16, no fall"] if arm == "bf16" else [arm]
        out.write_text(json.dumps([loss | {"arm": name} for name in names]))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(twins.subprocess, "run", process)

    def run(flags):
        common = ["--out", str(tmp_path / "r.json"), "--work", str(tmp_path), "--preset", "nano-1m"]
        return twins.main([*common, *flags.split()]), tmp_path / "r.json"

    run.broken, run.seen = broken, seen
    return run


def test_runs_that_end_at_the_same_moment_are_all_kept(plain):
    done, out = plain("--arms bf16 --seeds 40 --together 8")
    record = json.loads(out.read_text())
    assert done == 0 and len(record["runs"]) == 80
    done, out = plain("--arms fp8 bf16 --seeds 2 --first-seed 39")  # one is there already, and replaced
    record = json.loads(out.read_text())
    kept = [(run["arm"], run["seed"]) for run in record["runs"]]
    assert done == 0 and len(kept) == len(set(kept)) == 84 and ("bf16, no fall", 40) in kept and ("fp8", 40) in kept
    assert len(record["commands"]) == 2 and record["commands"][1].endswith("--arms fp8 bf16 --seeds 2 --first-seed 39")


def test_runs_that_fail_are_told(plain, capsys):
    plain.broken.add("bf16")
    done, out = plain("--arms bf16 fp8 --seeds 2")
    printed = capsys.readouterr()
    assert done == 1 and "2 of 4 runs failed" in printed.err and printed.out.count("no luck") == 2
    assert [run["arm"] for run in json.loads(out.read_text())["runs"]] == ["fp8", "fp8"]
    out.unlink()
    plain.broken.add("fp8")
    assert plain("--arms fp8 --seeds 1")[0] == 1 and not out.exists()
    assert "has" not in capsys.readouterr().out


def test_cards_of_others_are_left_alone(monkeypatch):
    for allowed, count, places in (("2,3", 2, ["2", "3"] * 2), ("", 2, ["0", "1"] * 2), ("", 0, ["", ""])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert twins.places_of(2) == places
