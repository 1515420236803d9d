"""The twins of the pretraining recipe: what differs between arms and what must not, and the record that is shown."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "notebooks"))

import recipe_twins as twins

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """20 steps of nano-1m, on text of a file."""
    folder = tmp_path_factory.mktemp("twins")
    (folder / "text.txt").write_text("".join(f"{i} times {i} is {i * i}, as anybody can see.\n" for i in range(600)))
    one = twins.settings("nano-1m", 20, 2, folder / "work")
    one = replace(one, text=str(folder / "text.txt"), length=64, vocab=384, text_share=0.3)
    twins.prepare(one, lambda text: None)
    return one


@pytest.fixture(scope="module")
def runs(config):
    found = {}
    for arm in ("bf16", "bf16 again", "fp8"):
        for record in twins.train_arm(arm, 0, config, CPU, torch.float32, 0, lambda *_, **__: None):
            found[record["arm"]] = record
    return found


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
        ("--source nowhere.json", "--source nowhere.json cannot be used: FileNotFoundError"),
        ("--arms fp9", "invalid choice: 'fp9'"),
    ],
)
def test_bad_input(flags, words, capsys):
    assert twins.main(flags.split()) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_record_of_other_runs_is_not_added_to(tmp_path, capsys, monkeypatch):
    record = {"preset": "nano-1m", "steps": 99, "rows": 2, "card": "CPU", "runs": []}
    (tmp_path / "r.json").write_text(json.dumps(record))
    monkeypatch.setattr(twins, "prepare", None)  # it is said before anything is made
    flags = f"--out {tmp_path / 'r.json'} --preset nano-1m --steps 20 --rows 2 --arms bf16 --seeds 1"
    assert twins.main(flags.split()) == 2
    assert "holds runs with other preset, steps, rows, card" in capsys.readouterr().err
    assert json.loads((tmp_path / "r.json").read_text()) == record
