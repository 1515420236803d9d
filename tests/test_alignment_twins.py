"""The twins of alignment: who waits for whom, what is made again and what is not, and what the record shows."""

import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "notebooks"))

import alignment_tables as shown
import alignment_twins as twins

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "assets" / "alignment_twins.json"
SKILL = dict.fromkeys(shown.SKILLS, 0.5)


def arguments(folder, **changes):
    base = folder / "base"
    base.mkdir(exist_ok=True)
    (base / "config.json").write_text("{}")
    flags = dict.fromkeys(("sft", "grpo", "dpo", "reward"), "")
    wanted = dict(
        seeds=2, first_seed=0, base=str(base), preset="nano-1m", base_flags="", flags=flags, count=13, together=2,
        jobs=list(twins.JOBS), threads=1, until=float("inf"), work=str(folder), commit="c", started=time.time(),
        words=["--seeds", "2"],
    )  # fmt: skip
    return SimpleNamespace(**(wanted | changes))


def curve(budgets=(0, 8, None), formed=1.0, longer=1.0):
    return [
        {"budget": b, "accuracy": 0.3 + 0.1 * i, "well_formed": formed if b == 0 else 1.0,
         "answer_tokens": 4 * (longer if b == 0 else 1.0), "thinking_tokens": 9, "closed": 0.5}
        for i, b in enumerate(budgets)
    ]  # fmt: skip


def pretend(args, gpu, name, seed, log):
    """A launcher that writes what the job would have."""
    log.append((name, seed))
    place = twins.folder(args, name, seed)
    if twins.JOBS[name].printed:
        ends = [dict(SKILL, tools=0.9, liked=0.2), dict(SKILL, tools=0.8, liked=0.7)]
        middle = dict(SKILL, tools=0.895, liked=0.66)
        at = (
            (0.0, ends[0]),
            (0.3, ends[0]),
            (0.4, middle),
            (0.5, middle),
            (0.6, ends[1]),
            (0.7, ends[1]),
            (1.0, ends[1]),
        )
        found = {"sweep": [{"alpha": a, "skills": s} for a, s in at]}
        if name != "merge":
            bad = name == "budget, no cut thoughts"
            found = {"skills": SKILL, "curve": curve(formed=0.6, longer=3.0) if bad else curve()}
        twins.beside(args, name, seed, ".txt").write_text(json.dumps(found) + "\n")
    else:
        place.mkdir()
        better = dict(
            SKILL, **{"ifrl": {"instructions": 0.8}, "dpo": {"tools": 0.6}, "rlhf": {"liked": 0.9}}.get(name, {})
        )
        extra = {"ifrl": "hard", "dpo": "drawn", "rlhf": "judged"}.get(name)
        lines = [
            {"step": 0} | ({extra: 0.1} if extra else {}),
            {"step": 1, "loss": 2.0, "reward": 0.1, "tokens_per_second": 5},
        ]
        if name == "gym":
            before = {"adding": 0.0, "adding off": 0.0, "adding thought": 5.0}
            lines[0] |= before
            better |= before | {"adding": 0.7, "adding thought": 25.0}
        lines.append({"step": 2} | better | ({extra: 0.6} if extra else {}))
        (place / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    half = twins.beside(args, name, seed, ".half")
    half.write_text("60.0")
    half.rename(twins.beside(args, name, seed, ".seconds"))
    return 60.0


def collect(args, begin):
    out = Path(args.work) / "record.json"
    record, said = twins.start_record(args, out), []
    twins.collect(args, record, out, said.append, begin)
    return json.loads(out.read_text()), said


def test_every_job_is_a_command_that_its_script_takes(tmp_path):
    import dpo
    import grpo
    import merge
    import reward
    import sft
    import skills  # noqa: F401
    import train

    args, kinds = arguments(tmp_path), {"sft": sft.SftConfig, "grpo": grpo.GrpoConfig, "dpo": dpo.DpoConfig,
                                        "reward": reward.RewardConfig}  # fmt: skip
    for name in twins.JOBS:
        script, *words = twins.command(args, name, 1)
        assert (ROOT / script).exists() and "{" not in "".join(words)
        stem = script.removesuffix(".py")
        if stem in kinds:
            config = train.parse(words, kinds[stem], str(ROOT / script), "x")
            assert config.seed == 1 and config.out == str(tmp_path / f"1 {name}")
            after = twins.JOBS[name].after
            assert config.checkpoint == (args.base if after == "base" else str(tmp_path / f"1 {after}"))
        elif stem == "merge":
            asked = merge.parse(words)
            assert (asked.a, asked.b) == (str(tmp_path / "1 dpo"), str(tmp_path / "1 rlhf")) and asked.json
    assert twins.command(args, "sft1, alone", 0)[1:5] == ["--stage", "1", "--pack", "off"]


def test_jobs_wait_for_what_they_start_from_and_all_are_done_once(tmp_path):
    log = []
    record, _ = collect(arguments(tmp_path), lambda *a: pretend(*a, log))
    assert sorted(log) == sorted((name, seed) for name in twins.JOBS for seed in (0, 1))
    for name, job in twins.JOBS.items():
        for before in (job.after, *job.needs):
            for seed in (0, 1):
                assert before == "base" or log.index((before, seed)) < log.index((name, seed))
    assert len(record["runs"]) == 2 * len(twins.JOBS) and record["one base"]
    log.clear()
    again, _ = collect(arguments(tmp_path), lambda *a: pretend(*a, log))
    assert log == [] and again["runs"] == record["runs"]


def test_what_failed_takes_only_its_followers_along_and_time_is_kept(tmp_path):
    log = []
    fails = lambda args, gpu, name, seed: None if name == "sft3" else pretend(args, gpu, name, seed, log)
    record, _ = collect(arguments(tmp_path, seeds=1), fails)
    made = {r["job"] for r in record["runs"]}
    assert "sft2" in made and "sft3, no cut thoughts" in made and not made & {"sft3", "ifrl", "rlhf", "merge", "budget"}
    late = tmp_path / "late"
    late.mkdir()
    record, said = collect(arguments(late, seeds=1, until=time.time() - 1), lambda *a: pretend(*a, log))
    assert record["runs"] == [] and any("no time left for sft1" in text for text in said)


def test_a_launched_job_leaves_its_words_and_seconds_and_a_failure_is_told(tmp_path, capsys, monkeypatch):
    args = arguments(tmp_path)
    monkeypatch.setattr(twins, "command", lambda *a: ["-c", "print('{\"curve\": []}')"])
    assert twins.launch(args, "", "budget", 0) > 0 and twins.finished(args, "budget", 0)
    assert twins.result(args, "budget", 0)["curve"] == []
    twins.folder(args, "gym", 0).mkdir()
    entries = [{"step": i, "reward": 0.1, "lr": 1} for i in range(301)] + [{"step": 302, "tools": 0.5}]
    (twins.folder(args, "gym", 0) / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    twins.beside(args, "gym", 0, ".seconds").write_text("3.0")
    told = twins.result(args, "gym", 0)
    assert told["end"] == entries[-1] and told["before"] == entries[0] and told["seconds"] == 3
    assert told["log"][0] == {"step": 0, "reward": 0.1} and 50 < len(told["log"]) < 90
    monkeypatch.setattr(twins, "command", lambda *a: ["-c", "pass"])  # a script that was asked to stop ends well, too
    assert twins.launch(args, "", "sft1", 0) is None and not twins.finished(args, "sft1", 0)
    assert "sft1, seed 0 was stopped; a second call goes on with it" in capsys.readouterr().out
    twins.folder(args, "sft1", 0).mkdir()
    (twins.folder(args, "sft1", 0) / "config.json").write_text("{}")
    assert twins.launch(args, "", "sft1", 0) > 0 and twins.finished(args, "sft1", 0)
    monkeypatch.setattr(twins, "command", lambda *a: ["-c", "raise SystemExit('no such thing')"])
    assert twins.launch(args, "", "budget", 1) is None and not twins.finished(args, "budget", 1)
    assert "budget, seed 1 failed (1): no such thing" in capsys.readouterr().out


def test_another_kind_of_record_is_refused(tmp_path):
    args = arguments(tmp_path)
    out = tmp_path / "record.json"
    out.write_text(json.dumps(twins.start_record(args, out)))
    args.count = 26
    with pytest.raises(ValueError, match="holds runs with other"):
        twins.start_record(args, out)
    for text in ("[]", "{}", "no JSON"):
        out.write_text(text)
        with pytest.raises(ValueError, match="record.json is there already and no record of runs"):
            twins.start_record(args, out)


def test_ctrl_c_is_an_exit_code(tmp_path, monkeypatch):
    def asked(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(twins, "collect", asked)
    (tmp_path / "config.json").touch()
    words = ["--base", tmp_path, "--out", tmp_path / "record.json", "--work", tmp_path / "work"]
    assert twins.main(list(map(str, words))) == 130


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--count", "5"], "--count must be at least 13"), (["--base", "nowhere"], "--base nowhere holds no"),
        (["--out", "no/such/folder/x.json"], "there is no folder"), (["--source", "no.json"], "--source no.json can"),
        (["--jobs", "dance"], "invalid choice"),
    ],
)  # fmt: skip
def test_bad_flags_are_one_sentence(flags, says, capsys):
    assert twins.main(flags) == 2
    printed = capsys.readouterr().err
    assert says in printed and printed.startswith("alignment_twins.py: ") and printed.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------------------
# What is shown


@pytest.fixture
def record(tmp_path):
    return collect(arguments(tmp_path), lambda *a: pretend(*a, []))[0]


def lines(text, of):
    return [line for line in text.splitlines() if of in line]


def test_verdicts_follow_from_the_record(record):
    runs = shown.by_job(record)
    text = shown.claims(record, runs)
    held = lambda of: lines(text, of)[0].startswith("| held")
    assert not held("reasoning-off obeyed") and held("without empty thoughts") and not held("more accurate")
    assert held("ifrl lifts") and "+38.0" in lines(text, "ifrl lifts")[0]  # 0.6 * 30 + 0.4 * 50
    assert (
        held("dpo lifts tools")
        and held("dpo lifts held-out plays")
        and held("rlhf lifts liked")
        and held("rlhf lifts the reward model's score: +0.50")
    )
    assert not held("packing costs tool success (sft1)") and held("stage 2 regains it")
    assert "the hidden rule" in text and "plays of dpo's first and last round" in text
    assert held("98 % well formed") and held("of the same length") and held("accuracy rises")
    assert held("without: longer answers (3.00") and held(
        "keeps 90 % of every gain of 3 points: 92% at 0.5; 92% at 0.5"
    )
    assert held("the whole chain in 20 minutes") and "7.0" in lines(text, "whole chain")[0]
    assert not held("rollouts at 300,000")
    for run in record["runs"]:
        if run["job"] == "budget":
            run["curve"][0]["well_formed"] = 0.9
            run["curve"][0]["answer_tokens"] = 9
            run["curve"][0]["accuracy"] = 0.99
        if run["job"] == "dpo":
            run["end"]["tools"] = 0.54
    text = shown.claims(record, shown.by_job(record))
    assert not any(held(of) for of in ("98 % well formed", "of the same length", "accuracy rises", "dpo lifts tools"))


def test_jobs_of_different_seeds_are_not_compared_and_no_gain_is_no_lift(record):
    runs = [r for r in record["runs"] if not (r["job"] == "sft1" and r["seed"] or r["job"] == "dpo" and not r["seed"])]
    apart = record | {"runs": [r for r in runs if r["job"] != "sft1, alone" or r["seed"]]}
    text = shown.tables(apart)
    assert "packing costs tool success (sft1)" not in text and "packing costs tool success (sft1, no reset)" in text
    assert "rlhf lifts liked: +40.0 |" in text  # of one seed
    for run in record["runs"]:
        if run["job"] == "rlhf":
            run["end"]["liked"] = SKILL["liked"]
    assert lines(shown.tables(record), "rlhf lifts liked: +0.0")[0].startswith("| MISSED")


def test_verdicts_look_at_the_worst_seed_and_compare_a_seed_with_itself(record):
    held = lambda of: lines(shown.claims(record, shown.by_job(record)), of)[0].startswith("| held")
    runs = shown.by_job(record)
    for seed, value in enumerate((0.99, 0.5)):
        runs["sft1"][seed]["end"]["obeyed"] = value
    assert not held("reasoning-off obeyed")
    runs["sft1"][1]["end"]["obeyed"] = 0.96
    assert held("reasoning-off obeyed")
    for seed, (before, after) in enumerate(((0.2, 0.3), (0.6, 0.7))):
        runs["ifrl"][seed]["end"]["tools"], runs["dpo"][seed]["end"]["tools"] = before, after
    assert "dpo lifts tools by 5 points or more: +10.0 (+10.0 to +10.0)" in shown.tables(record)
    assert held("of the same length")
    runs["budget"][0]["curve"][0]["answer_tokens"] = 3  # shorter is another length, too
    assert not held("of the same length")


@pytest.mark.parametrize("kept, holds", [(0.95, True), (0.5, False)])
def test_a_merge_is_asked_for_both_gains_at_one_alpha(record, kept, holds):
    for run in record["runs"]:
        if run["job"] == "merge":
            for line in run["sweep"]:
                a = line["alpha"]
                line["skills"] = SKILL | {
                    "instructions": {0.0: 1.0, 1.0: 0.0}.get(a, kept),
                    "liked": {0.0: 0.0, 1.0: 1.0}.get(a, 0.95 if a == 0.6 else 0.1),
                }
    (line,) = lines(shown.claims(record, shown.by_job(record)), "the same for what each end was trained for")
    assert line.startswith("| held") is holds and f"instructions {kept:.0%}, liked 95% at 0.6" in line


def test_a_gain_that_a_merge_keeps_is_counted_from_the_worse_end_to_the_better():
    sweep = [
        {"alpha": a, "skills": {"x": x, "y": y, "z": 0.5}}
        for a, x, y in ((0, 0.2, 0.9), (0.5, 0.6, 0.8), (1, 0.7, 0.5))
    ]
    assert shown.share_kept({"sweep": sweep}, 0.5) == (pytest.approx(0.75), "y")
    sweep[2]["skills"] = {"x": 0.21, "y": 0.89, "z": 0.5}
    assert shown.share_kept({"sweep": sweep}, 0.5) is None


def test_all_tables_and_figures_are_made_of_a_whole_record_and_some_of_a_part(record, tmp_path):
    text = shown.tables(record)
    for title in ("All skills after every stage", "Packing:", "The thinking budget", "reasoning-gym", "merged:"):
        assert title in text
    assert "| adding | 0% (0% to 0%) |" in text and "70%" in lines(text, "| adding")[0]
    assert f"| ifrl | {shown.several([0.5, 0.5])} |" in text
    shown.figures(record, tmp_path / "f")
    for name in ("f_skills.png", "f_budget.png", "f_rewards.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    part = record | {"runs": [r for r in record["runs"] if r["job"] in ("sft1", "sft2")]}
    text = shown.tables(part)
    assert "All skills" in text and "merged" not in text and "dpo lifts" not in text
    assert "no runs yet" in shown.tables(record | {"runs": []})


def test_the_means_are_means(record):
    for i, run in enumerate(r for r in record["runs"] if r["job"] == "sft1"):
        run["end"]["tools"] = 0.2 + 0.4 * i
    row = lines(shown.tables(record), "| sft1 |")[0]
    assert f"{statistics.mean((0.2, 0.6)):.0%} (20% to 60%)" in row


@pytest.mark.skipif(not RECORD.exists(), reason="no record has been made yet")
def test_the_record_in_the_repository_is_whole_and_its_tables_stand_in_results():
    record = json.loads(RECORD.read_text("utf-8"))
    assert {r["seed"] for r in record["runs"]} >= {0, 1, 2} and shlex.split(record["command"])[0] == "python"
    results = (ROOT / "RESULTS.md").read_text("utf-8")
    missing = [line for line in shown.tables(record).splitlines() if line.startswith("|") and line not in results]
    assert not missing, missing[:3]
