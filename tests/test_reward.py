"""The judge: its loss by hand, scores that depend on the answer alone, a folder that opens and one that does not, and
that it learns a taste from choices."""

import json
import os
import re
import shutil
import signal
from random import Random

import numpy as np
import pytest
import torch
from fine_tuned import base_model, speaker, vocabulary
from safetensors.torch import load_file, save_file

import judge as judging
import preferences
import reward
import skills
import stage
from checkpoint import save_pretrained
from generate import chat_prompt
from merge import copy
from safefile import write_json
from train import make_optimizer


@pytest.fixture(scope="module")
def tokenizer():
    return vocabulary()


def judge_of(seed=0):
    """A judge with numbers in all its places."""
    judge = judging.RewardModel(copy.deepcopy(base_model()))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        judge.w.copy_(torch.randn(judge.w.shape, generator=generator))
        judge.shift.fill_(0.25), judge.scale.fill_(1.5)
    return judge.eval()


def answers(count, split="test", seed=0):
    """(prompts, answers) of different lengths."""
    rng = Random(seed)
    prompts = [preferences.draw_prompt(rng, split) for _ in range(count)]
    return prompts, [preferences.respond(rng, prompt) for prompt in prompts]


# ----------------------------------------------------------------------------------------------------------------------
# Loss, reading, scores


def test_the_loss_and_its_gradient_are_those_worked_out_by_hand():
    chosen = torch.tensor([1.0, -2.0, 0.3, 120.0, -120.0], requires_grad=True)
    rejected = torch.tensor([0.5, 1.0, 0.3, -1.0, 1.0], requires_grad=True)
    loss = reward.bradley_terry(chosen, rejected)
    loss.backward()
    gap = (chosen - rejected).detach().double().numpy()
    assert loss.item() == pytest.approx(np.logaddexp(0, -gap).sum(), rel=1e-6)
    other = np.exp(-np.logaddexp(0, gap))  # what the judge thought of the choice that was not made
    assert chosen.grad.double().numpy() == pytest.approx(-other, rel=1e-5, abs=1e-12)
    assert torch.equal(rejected.grad, -chosen.grad)
    assert reward.bradley_terry(rejected[2:3], chosen[2:3]).item() == pytest.approx(np.log(2))


def test_the_gradient_of_w_is_that_of_a_logistic_regression_on_the_features(tokenizer):
    judge, config = judge_of().double(), reward.RewardConfig(pairs=3)
    ((ids, last),) = reward.parts_of(reward.batch(tokenizer, config, 0), 10_000, "cpu")
    with torch.no_grad():
        x = judge.backbone.features(ids)[torch.arange(6), last].float().double().numpy()
    gap = (x[:3] - x[3:]) / judge.scale.item()
    weights = -1 / (1 + np.exp(gap @ judge.w.detach().numpy()))
    reward.bradley_terry(*judge(ids, last).chunk(2)).backward()
    assert judge.w.grad.numpy() == pytest.approx(weights @ gap, rel=1e-5, abs=1e-7)
    assert judge.backbone.lm_head.weight.grad is None
    assert all(p.grad is not None for name, p in judge.named_parameters() if "lm_head" not in name)


def test_what_is_read_is_the_prompt_without_thought_the_answer_and_the_end(tokenizer):
    prompt = preferences.Prompt((("animals", 2), ("colours", 1)), "Quick: ")
    sample = judging.read(tokenizer, prompt, "cat, owl, red.")
    asked = [{"role": "user", "content": prompt.text}]
    assert sample.prompt == chat_prompt(tokenizer, asked, thinking=False)
    assert tokenizer.decode(sample.prompt).endswith("<think></think>")
    assert tokenizer.decode(sample.said) == "cat, owl, red.\n<SPECIAL_12>"
    assert vars(judging.read(tokenizer, prompt.text, "cat, owl, red.")) == vars(sample)
    ids, last = judging.rows([sample, judging.read(tokenizer, prompt, "")], "cpu")
    assert [ids[i, at].item() for i, at in enumerate(last)] == [tokenizer.eos_id] * 2 and last[0] > last[1]


def test_a_score_depends_neither_on_padding_nor_on_the_others(tokenizer):
    judge = judge_of()
    prompts, said = answers(24)
    said[3], said[7] = "", "cat " * 90
    together = judging.score_answers(judge, tokenizer, prompts, said)
    alone = [judging.score_answers(judge, tokenizer, [p], [a])[0] for p, a in zip(prompts, said)]
    assert np.std(alone) > 0.1 and together == pytest.approx(alone, abs=2e-5)
    assert judging.score_answers(judge, tokenizer, prompts, said, tokens=200) == pytest.approx(alone, abs=2e-5)
    back = judging.score_answers(judge, tokenizer, prompts[::-1], said[::-1])
    assert back[::-1] == pytest.approx(alone, abs=2e-5)
    ids, last = judging.rows([judging.read(tokenizer, prompts[0], said[0])], "cpu")
    noise = torch.randint(0, tokenizer.vocab_size, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert judge(torch.cat([ids[:, : last[0] + 1], noise], 1), last).item() == pytest.approx(alone[0], abs=2e-5)


def test_lists_of_different_length_are_refused_and_empty_ones_are_not(tokenizer):
    with pytest.raises(ValueError, match="2 prompts for 1 answers"):
        judging.score_answers(judge_of(), tokenizer, ["a", "b"], ["c"])
    assert judging.score_answers(judge_of(), tokenizer, [], []) == []


def test_a_batch_depends_on_seed_noise_and_step_and_holds_what_was_chosen(tokenizer):
    config = reward.RewardConfig(pairs=8, noise=0.0)
    said = lambda c, step: [
        [tokenizer.decode(s.prompt + s.said) for s in pair] for pair in reward.batch(tokenizer, c, step)
    ]
    one = said(config, 3)
    assert one == said(config, 3) and one != said(config, 4) != said(reward.replace(config, seed=1), 4)
    rng = Random("0 reward 3")
    for texts in one:
        pair = preferences.draw(rng, "train", 0.0)
        assert all(pair.prompt.text in text for text in texts)
        assert [text.split("</think>")[1].split("\n")[0] for text in texts] == [pair.chosen, pair.rejected]


def test_a_step_is_the_mean_over_all_pairs_whatever_the_parts(tokenizer):
    pairs, results = reward.batch(tokenizer, reward.RewardConfig(pairs=9), 0), []
    for tokens in (100_000, 500, 1):
        parts, judge = reward.parts_of(pairs, tokens, "cpu"), judge_of()
        assert len(parts) == {100_000: 1, 1: 9}.get(tokens, len(parts)) and sum(len(last) for _, last in parts) == 18
        assert tokens != 500 or (1 < len(parts) < 9 and all(ids.numel() <= 500 for ids, _ in parts))
        optimizer, scaler = make_optimizer(judge, 0.0, 0.0), torch.amp.GradScaler("cpu", enabled=False)
        step = reward.train_step(judge, optimizer, scaler, parts, 1.0, lambda: torch.autocast("cpu", enabled=False))
        results.append([value.item() for value in step])
    assert results[1] == pytest.approx(results[0], rel=1e-4) and results[2] == pytest.approx(results[0], rel=1e-4)
    short, long = judging.read(tokenizer, "a", "b"), judging.read(tokenizer, "a", "b " * 99)
    tokens = 3 * (len(long.prompt) + len(long.said))  # room for three such rows: one pair
    for pair in ((short, long), (long, short)):
        assert [ids.numel() for ids, _ in reward.parts_of([pair] * 2, tokens, "cpu")] == [tokens * 2 // 3] * 2
    judge = judge_of()
    flat = [sample for side in zip(*pairs) for sample in side]
    with torch.no_grad():
        chosen, rejected = judge(*judging.rows(flat, "cpu")).double().chunk(2)
    gap = (chosen - rejected).numpy()
    assert results[0][:2] == pytest.approx([np.logaddexp(0, -gap).mean(), (gap > 0).mean()], rel=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Held against the rule


def test_the_rank_correlation_of_lists_with_ties():
    assert judging.ranks([3.0, 1.0, 3.0, 9.0]).tolist() == [1.5, 0.0, 1.5, 3.0]
    assert judging.rank_correlation([1, 2, 3, 4], [0.1, 5, 6, 1e9]) == pytest.approx(1)
    assert judging.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert judging.rank_correlation([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(1 - 6 * 4 / (5 * 24))  # no ties
    assert judging.rank_correlation([1, 1, 2], [1, 2, 3]) == pytest.approx(1.5 / np.sqrt(1.5 * 2))
    assert judging.rank_correlation([1, 1], [1, 2]) == 0


def test_held_out_figures_of_judges_that_know_know_the_reverse_and_know_nothing(tokenizer, monkeypatch):
    def judged(by):
        monkeypatch.setattr(judging, "score_answers", lambda j, t, prompts, said: list(map(by, prompts, said)))
        return judging.held_out(None, tokenizer, 60)

    def asked(prompt, answer):
        assert preferences.split_of(prompt) == "test"
        return 7 * preferences.score(prompt, answer) - 3

    assert judged(asked) == {"pairs": 1.0, "rank": pytest.approx(1), "rank in prompt": pytest.approx(1)}
    assert judged(lambda p, a: -preferences.score(p, a))["pairs"] == 0
    monkeypatch.setattr(judging, "ANSWERS", 2)  # often of equal points: then there is no order to find
    assert judged(asked)["rank in prompt"] == pytest.approx(1)
    nothing = judged(lambda p, a: 0.0)
    assert nothing == {"pairs": 0.5, "rank": 0.0, "rank in prompt": 0.0}
    shifted = judged(lambda p, a: preferences.score(p, a) - 40 * sum(n for _, n in p.wanted))  # apart
    assert shifted["rank in prompt"] == pytest.approx(1) and shifted["rank"] < 0


def test_scores_are_standardised_on_fresh_answers_of_the_train_split(tokenizer, monkeypatch):
    judge, seen, real = judge_of(), [], judging.score_answers
    monkeypatch.setattr(judging, "STANDARD", 150)
    monkeypatch.setattr(judging, "score_answers", lambda j, t, p, a: seen.append((p, a)) or real(j, t, p, a))
    judging.standardise(judge, tokenizer)
    prompts, said = seen[0]
    assert len(said) == 150 and all(preferences.split_of(p) == "train" for p in prompts)
    scores = np.array(real(judge, tokenizer, prompts, said))
    assert abs(scores.mean()) < 1e-3 and scores.std() == pytest.approx(1, abs=1e-3)
    shift, scale = judge.shift.item(), judge.scale.item()
    judging.standardise(judge, tokenizer)  # again: nothing is added to what stood there
    assert (judge.shift.item(), judge.scale.item()) == pytest.approx((shift, scale), rel=1e-5)
    with torch.no_grad():
        judge.w.zero_()
    with pytest.raises(ValueError, match="spread 0.0: train more steps"):
        judging.standardise(judge, tokenizer)


# ----------------------------------------------------------------------------------------------------------------------
# Runs

FLAGS = (
    "--device cpu --dtype float32 --steps 6 --pairs 3 --log-every 1 --held-every 0 --eval-count 0 --save-every 100"
).split()


@pytest.fixture(scope="module")
def sft3(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("sft3")
    write_json(folder / "stage.json", [{"stage": s, "settings": {}} for s in ("base", "sft1", "sft2", "sft3")])
    save_pretrained(folder, base_model(), tokenizer)
    return folder


@pytest.fixture
def go(sft3, tmp_path, capsys, monkeypatch):
    """go("name", *flags) runs reward.py; returns (folder, what was printed). stop: Ctrl-C in that step of this life."""
    monkeypatch.setattr(judging, "STANDARD", 64)

    def run(name, *flags, code=0, stop=None, start=sft3):
        real, calls = reward.train_step, []

        def step(*args):
            calls.append(1)
            if len(calls) == stop:
                os.kill(os.getpid(), signal.SIGINT)
            return real(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reward, "train_step", step)
            got = reward.main([*FLAGS, "--checkpoint", str(start), "--out", str(tmp_path / name), *map(str, flags)])
        printed = "".join(capsys.readouterr())
        assert got == code, printed
        return tmp_path / name, printed

    return run


def entries(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_stopped_run_goes_on_to_the_bit(go):
    whole, _ = go("whole")
    out, printed = go("parts", "--held-every", 1, "--held-count", 2, stop=2)
    assert "stopped at step 2; the same command goes on" in printed
    assert sorted(p.name for p in out.iterdir()) == ["log.jsonl", "training.safetensors"]
    _, printed = go("parts")
    assert "resume    at step 2" in printed and "the end of stage reward" in printed
    for file in ("training.safetensors", "model.safetensors", "reward.safetensors"):
        a, b = load_file(whole / file), load_file(out / file)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), file
    steps = [[(e["step"], e["loss"]) for e in entries(folder) if "loss" in e] for folder in (whole, out)]
    assert steps[0] == steps[1] and len(steps[0]) == 6


def test_a_folder_opens_with_the_scores_that_were_saved(go, sft3, tokenizer, monkeypatch):
    kept, real = [], reward.close
    monkeypatch.setattr(reward, "close", lambda job, judge, *rest: kept.append(judge) or real(job, judge, *rest))
    out, printed = go("judge", "--eval-count", 8)
    judge, found = judging.load_reward(out)
    prompts, said = answers(12)
    scores = judging.score_answers(judge, found, prompts, said)
    assert scores == judging.score_answers(kept[0], tokenizer, prompts, said) and np.std(scores) > 0.1
    assert judge.scale != 1 and stage.stage_of(out) == "reward"
    half, _ = judging.load_reward(out, dtype="bfloat16")
    assert half.backbone.lm_head.weight.dtype == torch.bfloat16 and half.w.dtype == torch.float32
    assert judging.score_answers(half, found, prompts, said) == pytest.approx(scores, abs=0.5)
    before, after = (load_file(folder / "model.safetensors") for folder in (sft3, out))
    assert before.keys() == after.keys() and torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert not torch.equal(before["backbone.embeddings.weight"], after["backbone.embeddings.weight"])
    assert re.search(r"right in [\d.]+% of the pairs, rank correlation -?[\d.]+, in a prompt -?[\d.]+", printed)
    assert entries(out)[-1].keys() >= {"pairs", "rank", "rank in prompt"}
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_folders_that_are_no_judge_or_a_damaged_one_are_refused(go, sft3, tmp_path):
    with pytest.raises(ValueError, match="is the end of stage sft3 and no reward model: give one"):
        judging.load_reward(sft3)
    with pytest.raises(ValueError, match="nowhere holds no finished reward model"):
        judging.load_reward(tmp_path / "nowhere")
    out, _ = go("judge", "--steps", 1)
    whole = load_file(out / "reward.safetensors")
    for change in ({"w": torch.zeros(3)}, {"scale": torch.tensor(0.0)}, {"shift": torch.tensor(float("nan"))}):
        save_file(whole | change, out / "reward.safetensors")
        with pytest.raises(ValueError, match="reward.safetensors holds .* in finite numbers: copy the folder"):
            judging.load_reward(out)
    (out / "reward.safetensors").write_bytes(b"\0" * 9)
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        judging.load_reward(out)
    (out / "reward.safetensors").unlink()
    with pytest.raises(ValueError, match="reward.safetensors does not exist"):
        judging.load_reward(out)


def test_a_kill_while_the_folder_is_written_leaves_no_folder_that_opens(go, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(stage.folders, "save_pretrained", killed)
    out, _ = go("killed", "--steps", 1, code=130)
    monkeypatch.undo()
    assert (out / "reward.safetensors").exists()  # before the weights
    with pytest.raises(ValueError, match="holds no finished reward model"):
        judging.load_reward(out)
    _, printed = go("killed", "--steps", 1)
    assert "resume    at step 1" in printed and judging.load_reward(out)


@pytest.mark.parametrize(
    "flags, says",
    [(["--noise", "-1"], "--noise must be at least 0"), (["--noise", "nan"], "--noise must be at least 0"),
     (["--pairs", "0"], "--pairs must be at least 1"), (["--lr", "0"], "--lr must be a finite number above 0"),
     (["--warmup", "0.9"], "together at most 1"), (["--nope"], "unrecognized"),
     (["--checkpoint", "nowhere"], "nowhere holds no finished checkpoint"),
     (["--impl", "triton"], "--impl triton cannot be had")],
)  # fmt: skip
def test_bad_flags_are_one_sentence_and_write_nothing(go, flags, says, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    out, printed = go("none", *flags, code=2)
    assert says in printed and printed.startswith("reward.py: ") and printed.count("\n") == 1 and not out.exists()


def test_it_starts_from_the_end_of_fine_tuning_only(go, sft3, tmp_path, tokenizer):
    save_pretrained(tmp_path / "base", base_model(), tokenizer)
    out, printed = go("none", start=tmp_path / "base", code=2)
    assert "is the end of stage base, and reward begins after sft3: give --checkpoint" in printed
    assert printed.count("\n") == 1 and not out.exists()
    shutil.copytree(sft3, tmp_path / "taken")
    _, printed = go("taken", code=2)
    assert "already holds a model" in printed and not (tmp_path / "taken" / "reward.safetensors").exists()


def test_a_tiny_judge_learns_an_easy_taste_from_choices(go, monkeypatch):
    """The taste: a full stop at the end. Held-out pairs without noise; the chooser errs in one choice of eight."""
    monkeypatch.setattr(preferences, "score", lambda prompt, answer: float(answer.endswith(".")))
    out, _ = go("taste", "--steps", 16, "--pairs", 12, "--lr", 3e-3, "--eval-count", 60)
    found = entries(out)[-1]
    assert found["pairs"] > 0.85 and found["rank in prompt"] > 0.7, found
    judge, tokenizer = judging.load_reward(out)
    with torch.no_grad():
        judge.w.neg_()
    assert judging.held_out(judge, tokenizer, 60)["pairs"] < 0.15


# ----------------------------------------------------------------------------------------------------------------------
# Liked, in the table of skills


def test_liked_is_one_for_the_best_answers_and_nothing_for_empty_ones(tokenizer, monkeypatch):
    known, points = {}, []
    for i in range(9):
        rng = Random(f"0 {i}")
        prompt = preferences.draw_prompt(rng, "test")
        for thinking in (True, False):
            text = tokenizer.decode(chat_prompt(tokenizer, [{"role": "user", "content": prompt.text}], thinking))
            known[text] = preferences.best(rng, prompt)
        points.append(sum(n for _, n in prompt.wanted) + 1)

    def liked(change, thinking=True):
        reply = lambda p, on: f"1\n</think>\n{change(known[p])}\n" if on else f"{change(known[p])}\n"
        monkeypatch.setattr(skills, "generate", speaker(reply))
        return skills.preference(None, tokenizer, 9, 0, thinking)["liked"]

    assert liked(lambda best: best) == liked(lambda best: best, thinking=False) == 1
    assert liked(lambda best: "") == 0
    assert liked(lambda best: "no no no no no no no no") == 0  # far below 0, and it costs the others nothing
    assert liked(lambda best: best[:-1]) == pytest.approx(sum(1 - 1 / n for n in points) / 9)
