"""Three phases: their steps, their blends, rows of their own, and runs that stop at a boundary and go on."""

import json
import os
import shutil
import signal
from itertools import islice
from random import Random

import numpy as np
import pytest
from safetensors.torch import load_file

import curriculum
import curve
import data
import tasks
import train
from curriculum import boundaries, phase_of, starts
from data import Blend, Loader, PhasedLoader, prepare
from tokenizer import train_bpe

LENGTH, ROWS = 128, [290, 20, 12]
PROSE = [" ".join(f"{i} and {i * k}" for i in range(200)) for k in range(3, 9)]


# ----------------------------------------------------------------------------------------------------------------------
# Steps and blends


def test_where_phases_begin():
    assert boundaries("") == () and boundaries("0.6,0.9") == (0.6, 0.9)
    assert starts(1000, (0.6, 0.9)) == [0, 600, 900] and starts(7, ()) == [0]
    assert [phase_of(s, [0, 6, 9]) for s in range(11)] == [0] * 6 + [1] * 3 + [2] * 2
    for text in ("0.6", "0.9,0.6", "0,0.5", "0.5,1", "a,b", "0.6,0.9,0.95", "nan,nan", ","):
        with pytest.raises(ValueError, match="two rising shares"):
            boundaries(text)
    with pytest.raises(ValueError, match="3 steps are too few"):
        starts(3, (0.6, 0.9))


@pytest.mark.parametrize("text_share", [0, 0.05, 0.5, 0.8])
def test_the_blends_turn_from_text_to_steps_of_thought(text_share):
    parts = {"prose": 0.6, "code": 0.4}
    made = curriculum.blends(text_share, parts)
    text = [sources["prose"] + sources["code"] for sources, _ in made]
    assert all(sum(sources.values()) == pytest.approx(1) for sources, _ in made)
    assert np.dot(text, (0.6, 0.3, 0.1)) == pytest.approx(text_share)  # as much text as a single blend
    assert text == sorted(text, reverse=True)
    work = [sources["reasoning"] for sources, _ in made]
    assert work == sorted(work) and work[0] < work[2]
    for i, (_, families) in enumerate(made):
        blend = Blend({"reasoning": 1, "retrieval": 1}, families)
        for kind in ("reasoning", "retrieval"):
            weights = blend.family_weights(kind)
            by_family = {name: sum(w for (n, _), w in weights.items() if n == name) for name, _ in weights}
            assert by_family == pytest.approx(dict.fromkeys(by_family, 1.0))  # phases weight levels, not families
        first, last = families["add", 1], families["add", 3]
        assert [first > last, first == last, first < last][i] and families["needle", 1] == families["needle", 3]
    assert set(tasks.FAMILIES) == {name for name, _ in made[0][1]}


def test_a_share_of_text_that_leaves_no_room():
    with pytest.raises(ValueError, match="to 1.12 in its first phase: give at most 0.8"):
        curriculum.blends(0.9, {"prose": 1.0})


# ----------------------------------------------------------------------------------------------------------------------
# Rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    samples, said = islice(tasks.blend(Random(0)), 900), []
    tokenizer = train_bpe(PROSE + [f"{s.question}\n{s.trace}\n{s.answer}\n" for s in samples], 340)
    folder = tmp_path_factory.mktemp("phases") / "data"
    blends = [Blend({"prose": 1}), Blend({"reasoning": 1, "prose": 1}), Blend({"reasoning": 1}, {"reverse": 1})]
    given = blends, ROWS, LENGTH, {"prose": PROSE}, 7
    shares = prepare(folder, tokenizer, *given, 1, said.append)
    assert [set(part) for part in shares] == [{"prose"}, {"prose", "reasoning"}, {"reasoning"}]
    assert "4/4 shards" in said[-1] and abs(shares[1]["prose"] - 0.5) < 0.05
    before = (folder / "meta.json").stat().st_mtime_ns
    assert prepare(folder, tokenizer, *given, 2) == shares and (folder / "meta.json").stat().st_mtime_ns == before
    again = folder.parent / "again"
    prepare(again, tokenizer, *given, 2, lambda text: None)  # another number of workers, the same rows
    assert all((again / f"{n}.npy").read_bytes() == (folder / f"{n}.npy").read_bytes() for n in data.ARRAYS)
    return folder


def test_every_phase_has_rows_of_its_own_blend(folder):
    kind = np.load(folder / "kind.npy")
    assert kind.shape == (sum(ROWS), LENGTH)
    first, second, third = kind[:290], kind[290:310], kind[310:]
    assert not (first == data.TASK).any() and not (third == data.TEXT).any()
    assert (second == data.TASK).any() and (second == data.TEXT).any()
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["phase_rows"] == ROWS and [b["sources"] for b in meta["blend"]][2] == {"reasoning": 1.0}


def test_a_step_reads_rows_of_its_phase(folder):
    loader, rows = PhasedLoader(folder, [0, 58, 63], 5, seed=3), np.load(folder / "ids.npy").astype(np.int64)
    seen = [[row.tobytes() for row in loader.next()[0]] for _ in range(66)]
    of = lambda a, b: sorted(row.tobytes() for row in rows[a:b])
    assert sorted(sum(seen[:58], [])) == of(0, 290)  # 58 batches of 5: every row once
    assert sorted(sum(seen[58:62], [])) == of(290, 310) and set(seen[62]) <= set(of(290, 310))
    assert set(sum(seen[63:], [])) <= set(of(310, 322)) and len(set(sum(seen[63:65], []))) == 10


def test_ranks_share_the_batches_of_a_curriculum(folder):
    whole, parts = PhasedLoader(folder, [0, 2, 4], 6), [PhasedLoader(folder, [0, 2, 4], 6, r, 3) for r in range(3)]
    for _ in range(6):
        joined = np.concatenate([part.next()[0] for part in parts])
        assert sorted(joined.tolist()) == sorted(whole.next()[0].tolist())


@pytest.mark.parametrize("before", range(9))
def test_the_loader_resumes_on_both_sides_of_a_boundary(folder, before):
    loader, again = (PhasedLoader(folder, [0, 3, 6], 11, seed=1) for _ in range(2))
    for _ in range(before):
        loader.next()
    state = json.loads(json.dumps(loader.state()))
    again.next()
    again.restore(state)
    for _ in range(9 - before):
        assert all(np.array_equal(a, b) for a, b in zip(loader.next(), again.next()))
    assert again.state() == loader.state()


def test_what_does_not_fit_the_phases_is_refused(folder):
    with pytest.raises(ValueError, match="prepared for 3 phases, this run has 2"):
        PhasedLoader(folder, [0, 3], 2)
    with pytest.raises(ValueError, match="a batch of 13 rows is larger than the data set of 12 rows"):
        PhasedLoader(folder, [0, 3, 6], 13)
    assert Loader(folder, 5, part=(310, 12)).rows == 12


# ----------------------------------------------------------------------------------------------------------------------
# Runs

FLAGS = (
    "--device cpu --preset nano-1m --length 64 --batch-rows 2 --vocab 384 --data-rows 100 --text-share 0.3 --steps 50 "
    "--decay 0.18 --phases 0.6,0.9 --log-every 5 --sample-every 0 --eval-count 0 --phase-eval 0 --save-every 1000"
).split()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A text and the data of a run."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("".join(f"{i} {i * i} all that is read is kept to the end\n" for i in range(300)))
    config = train.parse([*FLAGS, "--out", str(folder), "--text", str(folder / "text.txt")])
    data.make(train.fill_in(config, train.torch.device("cpu")), 1, lambda text: None)
    return folder


@pytest.fixture
def start(home, tmp_path, capsys):
    """start("name", *flags) runs `train.py`; returns (out folder, what was printed). stop: after how many steps."""
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}

    def go(name, *flags, code=0, stop=None):
        out, real, calls = tmp_path / name, train.train_step, []
        if not out.exists():
            shutil.copytree(home / "data", out / "data")

        def step(*args):
            calls.append(1)
            if len(calls) == stop:
                os.kill(os.getpid(), signal.SIGINT)
            return real(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "train_step", step)
            got = train.main([*FLAGS, "--out", str(out), "--text", str(home / "text.txt"), *flags])
        printed = "".join(capsys.readouterr())
        assert got == code, printed
        return out, printed

    yield go
    for name, handler in handlers.items():
        signal.signal(name, handler)


def entries(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def same_state(one, two):
    a, b = (load_file(out / "training.safetensors") for out in (one, two))
    return a.keys() == b.keys() and all(train.torch.equal(a[k], b[k]) for k in a)


def test_a_run_stopped_at_every_boundary_equals_one_that_was_not(start):
    whole, printed = start("whole")
    assert "2 from step 30 (60%), 3 from step 45 (90%): the fall begins in blend 2" in printed
    assert "blend 1, realised / intended: reasoning" in printed and "blend 3, realised" in printed
    at = 0
    for stop in (29, 30, 31, 40, 41, 42, 44, 45, 46):
        cut, printed = start("cut", stop=stop - at)
        at = stop
        assert f"stopped at step {at};" in printed
    cut, printed = start("cut")
    assert "resume    at step 46 of 50" in printed and same_state(whole, cut)
    lines = [[(e["step"], e["phase"], e["lr"]) for e in entries(out) if "loss" in e] for out in (whole, cut)]
    assert lines[0] == lines[1] and [phase for _, phase, _ in lines[0]] == [1] * 7 + [2] * 3 + [3]
    exams = [[e for e in entries(out) if "boundary" in e] for out in (whole, cut)]
    assert exams[0] == exams[1] and [(e["step"], e["phase"]) for e in exams[0]] == [(30, 1), (41, 2), (45, 2)]


def test_the_exam_at_a_boundary(start):
    out, printed = start("exam", "--phase-eval", "1", "--steps", "10", "--eval-count", "1")
    at = [e for e in entries(out) if "boundary" in e]
    assert [e["boundary"] for e in at] == ["blend 2 begins", "blend 3 begins, the rate begins to fall"]
    for e, phase in zip(at, (1, 2)):
        meta = json.loads((out / "data" / "meta.json").read_text())
        assert e["intended"] == meta["blend"][phase - 1]["sources"] and e["realised"] == meta["shares"][phase - 1]
        assert e["intended"].keys() == e["realised"].keys() and sum(e["realised"].values()) == pytest.approx(1)
        assert 0 < e["held_out_bits_per_byte"]["text"] < 20 and len(e["accuracy"]) == len(tasks.FAMILIES)
        assert all(list(levels) == ["1", "2", "3"] for levels in e["accuracy"].values())
    assert (
        "step     6: blend 2 begins; before it:" in printed
        and "\nreasoning 0.0% exact, retrieval 0.0% exact\n" in printed
    )
    untested, printed = start("untested", "--phase-eval", "0", "--steps", "10")
    assert same_state(out, untested)  # an exam changes nothing
    assert all("accuracy" not in e for e in entries(untested)) and " exact" not in printed


def test_the_plot_marks_the_boundaries(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    line = {"loss": 1.0, "task_loss": 1.0, "bits_per_byte": 2.0, "lr": 1e-3}
    log = [line | {"tokens": n * 1_000_000} for n in range(1, 11)]
    log.insert(6, {"boundary": "blend 2 begins", "tokens": 6_000_000, "held_out_bits_per_byte": {"text": 3.0}})
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    curve.plot(log, tmp_path / "curve.png", {6.0: "blend 2 begins", 8.2: "the rate begins to fall"})
    left, right = drawn[0].axes
    dotted = [[line.get_xdata()[0] for line in axis.lines if line.get_linestyle() == ":"] for axis in (left, right)]
    assert dotted == [[6.0, 8.2]] * 2 and [t.get_text() for t in right.texts][0] == "blend 2 begins "
    assert any(line.get_marker() == "o" and list(line.get_xydata()[0]) == [6.0, 3.0] for line in left.lines)


def test_phases_are_part_of_the_run(start):
    out, _ = start("phased", stop=2)
    _, printed = start("phased", "--phases", "", code=2)
    assert "holds a run with other settings (phases '0.6,0.9' -> '')" in printed
    _, printed = start("phased", "--phases", "0.9,0.6", "--steps", "9", code=2)
    assert "two rising shares" in printed
    _, printed = start("new", "--text-share", "0.9", code=2)
    assert "give at most 0.8" in printed


def test_a_folder_made_before_there_were_phases(start, monkeypatch):
    one_blend = "--phases", "", "--steps", "9"
    with monkeypatch.context() as patch:
        patch.setattr(train, "NOT_THE_RUN", train.NOT_THE_RUN | {"phases", "decay_shape"})
        old, _ = start("old", *one_blend, stop=4)
    loop = train.resume.peek_training(old / "training.safetensors")
    assert "phases" not in loop["config"] and loop["loader"] == {"epoch": 0, "position": 8}
    _, printed = start("old", "--steps", "9", code=2)
    assert "(phases '' -> '0.6,0.9')" in printed
    start("old", *one_blend)
    whole, _ = start("whole", *one_blend)
    assert same_state(whole, old)


def test_a_run_is_not_resumed_on_other_data(start, home, monkeypatch):
    out, _ = start("moved", stop=3)
    before = (out / "training.safetensors").read_bytes()
    monkeypatch.setattr(curriculum, "LEVELS", curriculum.LEVELS[::-1])
    _, printed = start("moved", code=2)
    assert "the data of" in printed and "cannot be made again" in printed and printed.count("train.py:") == 1
    assert (out / "training.safetensors").read_bytes() == before
