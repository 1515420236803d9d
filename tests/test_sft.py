"""Fine-tuning: what is learned is what the assistant says, packed or not; a run that is stopped goes on to the bit; a
stage refuses what it cannot start from."""

import json
import os
import re
import shutil
import signal
from random import Random

import numpy as np
import pytest
import torch
from fine_tuned import base_model, vocabulary
from safetensors.torch import load_file

import conversations as C
import instructions
import resume
import sft
import stage
import tasks
import tools
from checkpoint import load_pretrained, save_pretrained
from generate import chat_prompt
from train import make_optimizer

LENGTH = 448


@pytest.fixture(scope="module")
def tokenizer():
    return vocabulary()


def drawn(tokenizer, mix=None, tokens=4000, name="x", **how):
    return C.step_examples(tokenizer, mix or C.MIX[3], tokens, LENGTH, name, **how)


def only(skill):
    return {skill: 1.0}


# ----------------------------------------------------------------------------------------------------------------------
# Examples


@pytest.mark.parametrize("skill", C.SKILLS)
def test_the_prompt_is_the_one_at_generation_and_the_rest_is_what_is_said(tokenizer, skill):
    for off in (0.0, 1.0):
        for ids, start, example in drawn(tokenizer, only(skill), off=off):
            assert ids[:start] == chat_prompt(tokenizer, example.messages, thinking=not off)
            said = tokenizer.decode(ids[start:])
            thought = "" if off else f"{example.trace}\n</think>\n"
            assert said == f"{thought}{example.answer}\n<SPECIAL_12>" and example.skill == skill
            assert (example.trace is None) == bool(off)
            end = tokenizer.decode(ids[start - 2 : start])
            assert end.endswith("<think></think>" if off else "<think>\n")


def test_references_are_right_by_their_own_checkers(tokenizer):
    """A tool turn is the reference's, after what the reference did before; a long one asks for a record it told."""
    for seed in range(60):
        rng = Random(seed)
        example = C.SKILLS["tools"](rng, "train")
        episode = tools.draw(Random(seed), "train")
        at = sum(m["role"] == "assistant" for m in example.messages)
        assert example.answer == episode.turns[at].text and list(example.messages) == tools.replay(episode, at).messages
    for _, _, example in drawn(tokenizer, only("long"), off=0.0):
        told, asked = example.messages[0]["content"], example.messages[-1]["content"]
        key = re.search(r"What is (\w+)\?", asked)[1]
        assert f"{key}={example.answer}" in told and len(example.messages) >= 5


def test_all_turns_of_an_episode_are_drawn(tokenizer):
    at = {sum(m["role"] == "assistant" for m in e.messages) for _, _, e in drawn(tokenizer, only("tools"), 30_000)}
    assert at == {0, 1, 2, 3}


def test_a_share_has_no_thought_and_a_share_of_the_others_is_cut(tokenizer):
    examples = drawn(tokenizer, only("reasoning"), 60_000, off=0.1, cut=0.05)
    n, off, cut = len(examples), sum(e.trace is None for *_, e in examples), sum(e.cut for *_, e in examples)
    assert n > 700 and 0.06 < off / n < 0.14 and 0.02 < cut / (n - off) < 0.09
    assert not any(e.cut and e.trace is None for *_, e in examples)
    assert not any(e.cut for *_, e in drawn(tokenizer, cut=0.0))


def test_a_cut_keeps_the_beginning_of_the_thought_and_the_whole_answer(tokenizer):
    e = C.Example("reasoning", ({"role": "user", "content": "47 + 85 = ?"},), "7+5+0=12 -> 2\n4+8+1=13 -> 32", "132")
    whole, start = C.encode(tokenizer, e)
    tag, lengths = tokenizer.end_think_id, []
    for keep in (0.0, 0.3, 0.7, 1.0):
        ids, at = C.encode(tokenizer, e, keep)
        assert at == start and ids[:at] == whole[:at] and ids.count(tag) == 1
        thought, answer = tokenizer.decode(ids[at:]).split("</think>")
        assert e.trace.startswith(thought.removesuffix("\n")) and answer == "\n132\n<SPECIAL_12>"
        lengths.append(len(thought))
    assert lengths[0] == 0 and lengths == sorted(set(lengths)) and C.encode(tokenizer, e, 1.0) == (whole, start)


def test_a_cut_stays_in_its_range(tokenizer):
    for ids, start, e in drawn(tokenizer, only("reasoning"), off=0.0, cut=1.0, cut_range=(0.2, 0.4)):
        kept = ids[start:].index(tokenizer.end_think_id)
        n = len(tokenizer.encode(e.trace))
        assert int(0.2 * n) <= kept <= int(0.4 * n) + 1, (kept, n)  # and the newline before the tag


def test_only_training_questions_are_drawn(tokenizer):
    for _, _, e in drawn(tokenizer, C.MIX[1], 30_000):
        question = e.messages[-1]["content"]
        if e.skill in ("reasoning", "retrieval"):
            family = next(f for f in tasks.FAMILIES if asks(f, question))
            assert tasks.split_of(family, question) == "train"
        elif e.skill == "tools" and len(e.messages) > 2:
            assert tools.split_of(e.messages[1]["content"]) == "train"
    rng = Random(0)
    for _ in range(50):
        prompt, _, _ = instructions.draw(rng)
        assert instructions.split_of(prompt) == "train"


def asks(family, question):
    marks = {"add": r"\+.*= \?|is \d+ \+", "subtract": r"\d - ", "multiply": r"\*.*= \?|is \d+ \*", "modchain": "mod",
             "reverse": "Reverse", "sort": "Sort", "word": "How many", "boolean": "Evaluate", "count": "Count",
             "needle": r"What is \w\d\?", "multiquery": "What are (?!all)", "multivalue": "What are all",
             "vartrack": r"Follow \w\.", "lookup2": r"Follow \w\d\.", "common": "Most common"}  # fmt: skip
    return re.search(marks[family], question)


def test_a_step_depends_on_its_name_alone_and_fills_its_tokens(tokenizer):
    one, again, other = drawn(tokenizer), drawn(tokenizer), drawn(tokenizer, name="y")
    assert one == again != other
    total = sum(len(ids) for ids, *_ in one)
    assert 4000 <= total < 4000 + LENGTH and all(len(ids) <= LENGTH for ids, *_ in one)
    C.check_length(tokenizer, C.MIX[3], LENGTH)
    for length, skill in ((140, "tools"), (64, "reasoning")):
        with pytest.raises(
            ValueError, match=f"rows of {length} tokens are too short: .* of {skill} are longer, .* raise --length"
        ):
            C.check_length(tokenizer, C.MIX[1], length)


# ----------------------------------------------------------------------------------------------------------------------
# Rows


def pieces(parts):
    """{(tokens of a document, which are learned)} with how often, from arrays: what packing must not change."""
    found = []
    for ids, doc, learned in parts:
        for row in range(len(ids)):
            for number in range(doc[row].max() + 1):
                at = doc[row] == number
                found.append((tuple(ids[row, at]), tuple(learned[row, at])))
    return sorted(found)


def test_packed_or_alone_the_same_tokens_are_learned(tokenizer):
    examples = drawn(tokenizer)
    expected = sorted((tuple(ids), (False,) * s + (True,) * (len(ids) - s)) for ids, s, _ in examples)
    packed, alone = C.packed(examples, LENGTH), C.alone(examples, 8 * LENGTH)
    assert pieces([packed]) == expected == pieces(alone)
    assert len(packed[0]) < len(examples) == sum(len(ids) for ids, *_ in alone)
    assert all(ids.size <= 8 * LENGTH for ids, *_ in alone) and len(alone) > 1
    for ids, doc, learned in [packed, *alone]:
        assert not learned[doc < 0].any() and (ids[doc < 0] == 0).all()
        assert (np.diff(doc, axis=1)[doc[:, 1:] >= 0] >= 0).all()  # documents one after another, padding behind


def test_without_reset_a_row_is_one_document_of_the_same_tokens(tokenizer):
    examples = drawn(tokenizer)
    on, off = C.packed(examples, LENGTH, reset=True), C.packed(examples, LENGTH, reset=False)
    assert (on[0] == off[0]).all() and (on[2] == off[2]).all()
    assert set(np.unique(off[1])) == {-1, 0} and on[1].max() > 1 and ((on[1] < 0) == (off[1] < 0)).all()


def gradients(parts):
    model = base_model().double()
    tensors = [[torch.from_numpy(a) for a in part] for part in parts]
    count = sum(int(learned[:, 1:].sum()) for *_, learned in tensors)
    total = 0.0
    for ids, doc, learned in tensors:
        logits = model(ids, seq_idx=doc)[:, :-1].double().log_softmax(-1)
        nll = -logits.gather(-1, ids[:, 1:, None])[..., 0]
        total = total + (nll * learned[:, 1:]).sum() / count
    model.zero_grad()
    total.backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    model.float()
    return total.item(), found


def test_with_reset_packing_changes_nothing_and_without_it_does(tokenizer):
    examples = drawn(tokenizer, tokens=1500)
    alone = gradients(C.alone(examples, 4 * LENGTH))
    packed, leaking = (gradients([C.packed(examples, LENGTH, reset)]) for reset in (True, False))
    assert packed[0] == pytest.approx(alone[0], rel=1e-5) and torch.allclose(packed[1], alone[1], atol=1e-5)
    assert abs(leaking[0] - alone[0]) > 1e-3 and not torch.allclose(leaking[1], alone[1], atol=1e-3)


def test_a_step_is_the_mean_over_all_learned_tokens_whatever_the_parts(tokenizer):
    examples = drawn(tokenizer, tokens=1500)
    expected, model = gradients(C.alone(examples, 4 * LENGTH))[0], base_model()
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    losses = []
    for parts in (C.alone(examples, 4 * LENGTH), C.alone(examples, LENGTH), [C.packed(examples, LENGTH)]):
        optimizer, scaler = make_optimizer(model, 0.0, 0.0), torch.amp.GradScaler("cpu", enabled=False)
        tensors = [[torch.from_numpy(a) for a in part] for part in parts]
        loss, norm = sft.train_step(
            model, optimizer, scaler, tensors, 1.0, lambda: torch.autocast("cpu", enabled=False)
        )
        losses.append((loss.item(), norm.item()))
    assert all(loss == pytest.approx(expected, rel=1e-4) for loss, _ in losses)
    assert all(norm == pytest.approx(losses[0][1], rel=1e-3) for _, norm in losses)
    assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())  # the rate was 0


# ----------------------------------------------------------------------------------------------------------------------
# Runs

FLAGS = (
    "--device cpu --dtype float32 --steps 6 --batch-rows 1 --log-every 1 --skills-every 0 --eval-count 0 "
    "--save-every 100"
).split()


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("base")
    save_pretrained(folder, base_model(), tokenizer)
    return folder


@pytest.fixture
def go(base, tmp_path, capsys):
    """go("name", *flags) runs sft.py from the base model; returns (folder, what was printed). stop: Ctrl-C in that
    step of this life."""

    def run(name, *flags, code=0, stop=None, start=base):
        real, calls = sft.train_step, []

        def step(*args):
            calls.append(1)
            if len(calls) == stop:
                os.kill(os.getpid(), signal.SIGINT)
            return real(*args)

        before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sft, "train_step", step)
            got = sft.main([*FLAGS, "--checkpoint", str(start), "--out", str(tmp_path / name), *map(str, flags)])
        printed = "".join(capsys.readouterr())
        assert got == code, printed
        assert before == {n: signal.getsignal(n) for n in before}
        return tmp_path / name, printed

    return run


def losses(folder):
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return {e["step"]: e["loss"] for e in entries if "loss" in e}


def same(one, two):
    a, b = (load_file(folder / "training.safetensors") for folder in (one, two))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_stopped_run_goes_on_to_the_bit(go):
    whole, _ = go("whole")
    out, printed = go("parts", stop=2)
    assert "stopped at step 2; the same command goes on" in printed
    assert sorted(p.name for p in out.iterdir()) == ["log.jsonl", "training.safetensors"]
    _, printed = go("parts", stop=3)
    assert "resume    at step 2" in printed and "stopped at step 5" in printed
    _, printed = go("parts")
    assert "resume    at step 5" in printed and "the end of stage sft1" in printed
    assert same(whole, out) and losses(whole) == losses(out) and len(losses(out)) == 6
    assert (whole / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_after_a_crash_the_steps_since_the_last_save_are_made_again_and_logged_once(go, monkeypatch):
    whole, _ = go("whole")

    def crash(*args):
        raise KeyboardInterrupt

    real = stage.Stage.record
    monkeypatch.setattr(stage.Stage, "record", lambda job, e: crash() if job.step == 4 else real(job, e))
    out, _ = go("crashed", "--save-every", 3, code=130)
    monkeypatch.undo()
    assert max(losses(out)) == 4
    _, printed = go("crashed", "--save-every", 3)
    assert "resume    at step 3" in printed and same(whole, out)
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert [s for s in steps if s <= 6] == [1, 2, 3, 4, 5, 6] and losses(out) == losses(whole)


def test_looking_at_the_skills_on_the_way_changes_nothing(go):
    one, _ = go("quiet", "--steps", 3)
    two, printed = go("watched", "--steps", 3, "--skills-every", 2, "--skills-count", 1, "--eval-count", 1)
    assert (
        same(one, two) and re.search(r"step +2  on 0%  off 0%", printed) and "held-out prompts of each kind" in printed
    )
    logged = [json.loads(line) for line in (two / "log.jsonl").read_text().splitlines()]
    assert sum("tools" in e for e in logged) == 2 and (two / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_stages_follow_each_other_and_every_checkpoint_says_what_it_is(go, base):
    assert stage.stage_of(base) == "base"
    one, _ = go("one", "--steps", 2)
    assert stage.stage_of(one) == "sft1"
    two, printed = go("two", "--stage", 2, "--steps", 2, start=one)
    assert "one a row" in printed and stage.stage_of(two) == "sft2"
    three, printed = go("three", "--stage", 3, "--steps", 2, start=two)
    assert "packed into rows" in printed and "5% of the thoughts cut off" in printed
    told = json.loads((three / "stage.json").read_text())
    assert [e["stage"] for e in told] == ["base", "sft1", "sft2", "sft3"] and told[2]["settings"]["pack"] == "off"
    model, tokenizer = load_pretrained(three)
    assert tokenizer.vocab_size == model.config.vocab_size
    start, end = load_file(base / "model.safetensors"), load_file(three / "model.safetensors")
    assert start.keys() == end.keys() and any(not torch.equal(start[k], end[k]) for k in start)


def test_a_stage_opens_in_transformers(go):
    transformers = pytest.importorskip("transformers", reason="the reference implementation is a test extra")
    out, _ = go("one", "--steps", 1)
    _, info = transformers.NemotronHForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_the_wrong_stage_is_refused_and_nothing_is_written(go, base, tmp_path):
    one, _ = go("one", "--steps", 1)
    for flags, start, says in (
        (["--stage", 2], base, "is the end of stage base, and sft2 begins after sft1: give --checkpoint"),
        (["--stage", 3], one, "is the end of stage sft1, and sft3 begins after sft2"),
        (["--stage", 1], one, "is the end of stage sft1, and sft1 begins after base"),
    ):
        out, printed = go("none", *flags, start=start, code=2)
        assert says in printed and printed.count("\n") == 1 and not out.exists()


def test_an_unfinished_stage_is_no_checkpoint(go):
    half, _ = go("half", stop=2)
    out, printed = go("next", "--stage", 2, start=half, code=2)
    assert "holds no finished checkpoint" in printed and not out.exists()


def test_a_kill_while_the_folder_is_written_leaves_no_base_model(go, monkeypatch, base, tmp_path):
    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(stage.folders, "save_pretrained", killed)
    out, _ = go("killed", "--steps", 1, code=130)
    assert not (out / "config.json").exists() and stage.stage_of(out) == "sft1"
    monkeypatch.undo()
    out, printed = go("killed", "--steps", 1)
    assert "resume    at step 1" in printed and (out / "config.json").exists()


def test_other_settings_or_another_run_in_the_folder_are_refused(go, base):
    out, _ = go("one", stop=1)
    state = (out / "training.safetensors").read_bytes()
    _, printed = go("one", "--lr", 1e-4, code=2)
    assert "other settings (lr 0.0015 -> 0.0001): use the same flags" in printed
    finished, _ = go("done", "--steps", 1)
    shutil.copy(finished / "training.safetensors", out / "training.safetensors")
    _, printed = go("one", "--stage", 2, start=finished, code=2)
    assert "holds a run of sft1, this is sft2" in printed
    _, printed = go("done/../done", "--stage", 2, start=finished, code=2)
    assert "is --checkpoint itself" in printed
    assert state and resume.peek_training(finished / "training.safetensors")["step"] == 1


def test_a_folder_with_a_model_is_not_written_over(go, base, tmp_path):
    shutil.copytree(base, tmp_path / "model")
    _, printed = go("model", code=2)
    assert "already holds a model" in printed and not (tmp_path / "model" / "log.jsonl").exists()


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--stage", "4"], "--stage 4 is not one of 1, 2, 3"), (["--off", "1.5"], "--off is a share"),
        (["--cut-low", "0.9", "--cut-high", "0.1"], "--cut-low 0.9 is above"), (["--pack", "yes"], "--pack 'yes'"),
        (["--reset", "maybe"], "--reset 'maybe' is not one of on, off"), (["--lr", "nan"], "--lr must be a finite"),
        (["--steps", "0"], "--steps must be at least 1"), (["--warmup", "0.9"], "together at most 1"),
        (["--checkpoint", "nowhere"], "nowhere holds no finished checkpoint"), (["--length", "64"], "raise --length"),
        (["--impl", "triton"], "--impl triton cannot be had"), (["--nope"], "unrecognized"),
    ],
)  # fmt: skip
def test_bad_flags_are_one_sentence_and_write_nothing(go, flags, says, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    out, printed = go("none", *flags, code=2)
    assert says in printed and printed.startswith("sft.py: ") and printed.count("\n") == 1 and not out.exists()


def test_a_damaged_stage_file_is_told(go, base, tmp_path):
    shutil.copytree(base, tmp_path / "bad")
    for text in ("[]", "{}", "[1]", "nonsense"):
        (tmp_path / "bad" / "stage.json").write_text(text)
        _, printed = go("none", start=tmp_path / "bad", code=2)
        assert "stage.json" in printed and "damaged" in printed
