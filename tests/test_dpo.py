"""Preference optimization on plays: the loss is the formula, pairs are what they claim, a stopped run goes on to the
bit, and what cannot be a start is refused in a sentence."""

import copy
import json
import math
import os
import re
import signal
import zlib
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fine_tuned import base_model, spoken, vocabulary
from safetensors.torch import load_file

import dpo
import stage
import tools
from checkpoint import save_pretrained
from generate import chat_prompt
from plays import filling, pairs_of, play
from rollout import Pace, Sample
from train import make_optimizer

AUTOCAST = lambda: torch.autocast("cpu", enabled=False)


@pytest.fixture(scope="module")
def tokenizer():
    return vocabulary()


# ----------------------------------------------------------------------------------------------------------------------
# The loss


def test_the_loss_is_the_formula_in_float64_and_its_gradient_the_weights():
    chosen = torch.tensor([-3.0, -10.0, -2.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-4.0, -2.0, -2.0], dtype=torch.float64, requires_grad=True)
    ref_chosen, ref_rejected = (torch.tensor(v, dtype=torch.float64) for v in ([-5.0, -9.0, -2.0], [-4.5, -8.0, -2.0]))
    beta = 0.3
    loss, margins = dpo.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)
    by_hand = [beta * ((-3 + 5) - (-4 + 4.5)), beta * ((-10 + 9) - (-2 + 8)), 0.0]
    assert margins.tolist() == pytest.approx(by_hand, rel=1e-12)
    assert loss.tolist() == pytest.approx([-math.log(1 / (1 + math.exp(-m))) for m in by_hand], rel=1e-12)
    assert loss[2].item() == math.log(2)  # equal to the reference
    loss.sum().backward()
    weights = [beta / (1 + math.exp(m)) for m in by_hand]  # beta sigmoid(-margin)
    assert chosen.grad.tolist() == pytest.approx([-w for w in weights], rel=1e-12)
    assert rejected.grad.tolist() == pytest.approx(weights, rel=1e-12)


def test_a_hopeless_pair_has_a_finite_loss():
    loss, _ = dpo.dpo_loss(*torch.tensor([[-1e5], [0.0], [0.0], [-1e5]]), beta=1.0)
    assert loss.item() == pytest.approx(2e5)


# ----------------------------------------------------------------------------------------------------------------------
# Plays


def sample_of(tokenizer, prompt, text, ended=True):
    ids = spoken(tokenizer, text)
    ids = ids if ended else ids[:-1]
    return Sample(prompt, ids, np.full(len(ids), -1.0, np.float32), ended)


class Scripted:
    """A `Roller` that says what script(messages' prompt ids, number of the play, turn) returns, (text, ended)."""

    rows, device = 8, torch.device("cpu")

    def __init__(self, tokenizer, script):
        self.tokenizer, self.script, self.pace, self.asked = tokenizer, script, Pace(), []

    def say(self, prompts, group, room, temperature, seed):
        self.asked.append((len(prompts), group, seed))
        return [[sample_of(self.tokenizer, p, *self.script(p, i, len(self.asked) - 1))] for i, p in enumerate(prompts)]


def episode_of(kind, seed=0):
    return tools.sample(kind, Random(seed), "train")


def right(turn):
    return f"{turn.trace}\n</think>\n\n{turn.text}\n"


def played(tokenizer, episode, *lines, length=4000):
    """Plays of one episode: each of `lines` is what one play says, [text or (text, ended)]."""
    plays = []
    for texts in lines:
        script = lambda prompt, i, turn, texts=texts: (
            texts[turn] if isinstance(texts[turn], tuple) else (texts[turn], True)
        )
        plays += play(Scripted(tokenizer, script), tokenizer, [episode], 1, 99, length, 1.0, "x")[0]
    return plays


def solved(episode):
    return [right(turn) for turn in episode.turns]


def test_plays_go_side_by_side_and_the_references_words_succeed(tokenizer):
    episodes, prompts = [episode_of("move"), episode_of("look"), episode_of("unrelated")], {}
    for e in episodes:
        for i, turn in enumerate(e.turns):
            prompts[tuple(chat_prompt(tokenizer, tools.replay(e, i).messages))] = turn
    roller = Scripted(tokenizer, lambda prompt, i, turn: (right(prompts[tuple(prompt)]), True))
    groups = play(roller, tokenizer, episodes, 2, 99, 4000, 1.0, "seed")
    assert [len(group) for group in groups] == [2, 2, 2] and all(p.success for group in groups for p in group)
    lengths = [len(e.turns) for e in episodes]
    assert [n for n, *_ in roller.asked] == [2 * sum(n > t for n in lengths) for t in range(max(lengths))]
    assert all(group == 1 for _, group, _ in roller.asked) and len({seed for *_, seed in roller.asked}) == max(lengths)
    for group, e in zip(groups, episodes):
        assert [t.text for t in group[0].turns] == [t.text for t in e.turns]
        assert group[0].turns[-1].sample.prompt == chat_prompt(tokenizer, tools.replay(e, len(e.turns) - 1).messages)


def test_a_turn_without_an_end_or_with_no_single_close_of_the_thought_is_a_failed_play(tokenizer):
    e = episode_of("unrelated")
    (turn,) = e.turns
    good = right(turn)
    for text, proper in (
        ((good, True), True), ((good, False), False), ((turn.answer, True), False),
        ((f"a\n</think>\n{turn.answer}</think>{turn.answer}", True), False), ((f"</think>{turn.answer}", True), True),
    ):  # fmt: skip
        (p,) = played(tokenizer, e, [text])
        assert p.success is proper and p.over is not proper and (p.turns[0].text == turn.answer) is proper, text
        assert len(p.turns) == 1


def test_a_play_that_gets_too_long_has_failed(tokenizer):
    e = episode_of("move")
    first, second = (len(chat_prompt(tokenizer, tools.replay(e, i).messages)) for i in (0, 1))
    (p,) = played(tokenizer, e, solved(e), length=second + 98)  # 99 tokens of room do not fit
    assert p.over and not p.success and len(p.turns) == 1
    (p,) = played(tokenizer, e, [right(e.turns[0])] + ["</think>no"] * 5, length=second + 99)
    assert not p.over and not p.success and len(p.turns) == 2 and first < second


def test_rows_are_filled_up_to_few_different_numbers():
    assert [n + filling(n, 64) for n in (1, 2, 3, 33, 64, 65, 129)] == [1, 2, 4, 64, 64, 128, 192]


# ----------------------------------------------------------------------------------------------------------------------
# Pairs


def words(tokenizer, sample):
    return tokenizer.decode(sample.said)


def test_a_pair_is_where_plays_part_after_the_same_conversation(tokenizer):
    e = episode_of("move")  # get, set, delete, done
    assert len(e.turns) == 4
    good = solved(e)
    late = [*good[:2], "hm\n</think>\n\ndone\n"]  # forgot to delete
    other_thought = ["other\n</think>\n\n" + e.turns[0].text, "x</think>\n\ndone\n"]  # the same call first
    early = ["hm\n</think>\n\nno\n"]
    plays = played(tokenizer, e, late, good, other_thought, early)
    assert [p.success for p in plays] == [False, True, False, False]
    found = pairs_of(plays, 9)
    assert [words(tokenizer, p.rejected) for p in found] == [
        tokenizer.decode(spoken(tokenizer, text)) for text in (late[2], other_thought[1], early[0])
    ]
    for pair, at in zip(found, (2, 1, 0)):
        assert pair.chosen is plays[1].turns[at].sample
        assert pair.chosen.prompt == pair.rejected.prompt == chat_prompt(tokenizer, tools.replay(e, at).messages)
    assert pairs_of(plays, 2) == found[:2] and pairs_of(plays[::-1], 1)[0].rejected is plays[3].turns[0].sample


def test_a_failed_play_is_held_against_the_success_that_went_with_it_longest(tokenizer):
    e = episode_of("move")
    good = solved(e)
    key = next(key for key in e.records if key not in e.request)
    look = f'</think><TOOLCALL>[{{"name": "get", "arguments": {{"key": "{key}"}}}}]</TOOLCALL>'
    detour = [look, *good]  # looks at another record first: not wrong
    failed = [look, good[0], "</think>no"]
    plays = played(tokenizer, e, good, detour, failed)
    assert [p.success for p in plays] == [True, True, False] and plays[0].turns[0].text != plays[2].turns[0].text
    (pair,) = pairs_of(plays, 9)
    assert pair.chosen is plays[1].turns[2].sample and pair.rejected is plays[2].turns[2].sample


def test_nothing_comes_from_episodes_with_one_outcome_and_the_same_words_are_no_pair(tokenizer):
    e = episode_of("unrelated")
    good, bad = solved(e), ["</think>wrong"]
    assert pairs_of(played(tokenizer, e, good, ["other</think>" + e.answer]), 9) == []
    assert pairs_of(played(tokenizer, e, bad, ["</think>no"]), 9) == []
    assert len(pairs_of(played(tokenizer, e, good, bad, ["a thought</think>wrong"]), 9)) == 1  # the same words
    assert len(pairs_of(played(tokenizer, e, good, bad, ["</think>no"], [("unclosed", False)]), 9)) == 3
    move = episode_of("move")  # cut short by its length while it was right so far: nothing was said that differs
    length = 98 + len(chat_prompt(tokenizer, tools.replay(move, 1).messages))
    plays = played(tokenizer, move, solved(move)) + played(tokenizer, move, solved(move), length=length)
    assert [p.success for p in plays] == [True, False] and pairs_of(plays, 9) == []


# ----------------------------------------------------------------------------------------------------------------------
# Steps


def some_pairs(tokenizer, count=6):
    found = []
    for i in range(count):
        e = episode_of("look", i)
        found += pairs_of(played(tokenizer, e, solved(e), [f"well\n</think>\n\nno {i}\n"]), 1)
    assert len(found) == count
    return found


def make(lr=1e-3, **flags):
    config = dpo.fill_in(dpo.DpoConfig(lr=lr, batch=3, passes=2, **flags), 1e6)
    model = copy.deepcopy(base_model())
    return model, make_optimizer(model, lr, 0.0), torch.amp.GradScaler("cpu", enabled=False), config


def test_learning_widens_the_margin_from_log_2(tokenizer):
    pairs = some_pairs(tokenizer)
    model, optimizer, scaler, config = make()
    _, ref = dpo.logprobs_of(model, pairs, 4000, AUTOCAST)
    loss, _ = dpo.train_step(model, optimizer, scaler, pairs, ref, config, AUTOCAST)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)
    dpo.learn(model, optimizer, scaler, pairs, ref, config, 0, AUTOCAST)
    _, now = dpo.logprobs_of(model, pairs, 4000, AUTOCAST)
    after, margins = dpo.dpo_loss(*now, *ref, config.beta)
    assert (margins > 0.01).all() and after.mean() < math.log(2) - 0.01


def test_a_step_is_that_of_the_plain_formula_whatever_its_parts(tokenizer):
    pairs = some_pairs(tokenizer)
    results = []
    for tokens in (100_000, 400):
        model, optimizer, scaler, config = make(lr=1e-2, sft_weight=0.5, tokens=tokens)
        ref = torch.tensor([[-300.0] * 6, [-90.0] * 6])
        loss, norm = dpo.train_step(model, optimizer, scaler, pairs, ref, config, AUTOCAST)
        results.append((loss.item(), norm.item()))
    model = copy.deepcopy(base_model())
    sums = {}
    for name in ("chosen", "rejected"):
        sums[name] = []
        for sample in (getattr(pair, name) for pair in pairs):
            logits = model(torch.tensor([sample.prompt + sample.said]))[0].log_softmax(-1)
            start = len(sample.prompt) - 1
            sums[name].append(sum(logits[start + i, t] for i, t in enumerate(sample.said)))
    margins = 0.05 * (torch.stack(sums["chosen"]) + 300 - torch.stack(sums["rejected"]) - 90)
    nll = -sum(sums["chosen"]) / sum(len(pair.chosen.said) for pair in pairs)
    expected = -torch.sigmoid(margins).log().mean() + 0.5 * nll
    expected.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert all(loss == pytest.approx(expected.item(), rel=1e-4) for loss, _ in results)
    assert all(n == pytest.approx(norm, rel=1e-3) for _, n in results)


def test_the_rate_rises_then_stays(tokenizer, monkeypatch):
    model, optimizer, scaler, config = make(lr=0.4, warmup=0.75)
    rates = []
    step = lambda model, optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]) or (torch.ones(()),) * 2
    monkeypatch.setattr(dpo, "train_step", step)
    dpo.learn(model, optimizer, scaler, some_pairs(tokenizer), torch.zeros(2, 6), config, 0, AUTOCAST)
    assert rates == pytest.approx([0.4 / 3, 0.8 / 3, 0.4, 0.4])


# ----------------------------------------------------------------------------------------------------------------------
# Runs. The tiny model solves nothing, so the verifier is another: what it says is read without rules, and whether that
# is right, the words decide by their checksum. Draws, pairs and weights are the model's own.

FLAGS = (
    "--device cpu --dtype float32 --rounds 3 --episodes 4 --plays 3 --room 10 --length 640 --batch 2 --lr 1e-3 "
    "--skills-every 0 --eval-count 0"
).split()


@pytest.fixture(scope="module")
def begun(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("begun")
    save_pretrained(folder, base_model(), tokenizer)
    (folder / "stage.json").write_text(json.dumps([{"stage": "ifrl", "settings": {}}]))
    return folder


@pytest.fixture
def go(begun, tmp_path, capsys, monkeypatch):
    """go("name", *flags) runs dpo.py; returns (folder, what was printed). stop: Ctrl-C in that round of this life."""
    monkeypatch.setattr("plays.text_of", lambda tokenizer, sample: tokenizer.decode(sample.said))
    monkeypatch.setattr(tools.Play, "success", lambda play: zlib.crc32((play.answer or "").encode()) % 2 == 0)
    checked = dpo.check_length
    monkeypatch.setattr(dpo, "check_length", lambda t, room, length: checked(t, max(room, 160), max(length, 900)))

    def run(name, *flags, code=0, stop=None, start=begun):
        real, calls = dpo.one_round, []

        def one_round(*args):
            calls.append(1)
            if len(calls) == stop:
                os.kill(os.getpid(), signal.SIGINT)
            return real(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dpo, "one_round", one_round)
            got = dpo.main([*FLAGS, "--checkpoint", str(start), "--out", str(tmp_path / name), *map(str, flags)])
        printed = "".join(capsys.readouterr())
        assert got == code, printed
        return tmp_path / name, printed

    return run


def log_of(folder):
    """The rounds in a log, without what a clock says."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    clock = ("seconds", "round_seconds", "tokens_per_second")
    return [{k: v for k, v in e.items() if k not in clock} for e in entries if "success" in e]


def test_a_run_stopped_after_a_round_goes_on_to_the_bit(go):
    whole, printed = go("whole")
    assert len(re.findall(r"round +\d/3  loss", printed)) == 3 and "the end of stage dpo" in printed
    out, printed = go("parts", stop=1)
    assert "stopped at step 1; the same command goes on" in printed
    assert sorted(p.name for p in out.iterdir()) == ["log.jsonl", "training.safetensors"]
    _, printed = go("parts")
    assert "resume    at step 1" in printed
    a, b = (load_file(folder / "training.safetensors") for folder in (whole, out))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert log_of(whole) == log_of(out) and [e["step"] for e in log_of(out)] == [1, 2, 3]
    assert (whole / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert stage.stage_of(out) == "dpo" and (out / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_round_is_played_with_the_weights_of_the_round_before(go, monkeypatch):
    """On a GPU the roller has a copy in bfloat16; here one in float64."""
    same = []

    class Copies(dpo.Roller):
        def __init__(self, model, tokenizer, dtype=None):
            super().__init__(model, tokenizer, torch.float64)
            self.learner = model

        def say(self, *args):
            pairs = zip(self.model.parameters(), self.learner.parameters())
            same.append(all(torch.equal(a.float(), b) for a, b in pairs))
            return super().say(*args)

    monkeypatch.setattr(dpo, "Roller", Copies)
    out, _ = go("copies", "--rounds", 2)
    assert all(same) and len(same) >= 2 and log_of(out)[0]["pairs"] > 0


def test_a_rounds_line_is_what_happened(go):
    out, printed = go("one", "--rounds", 1, "--eval-count", 1, "--sft-weight", 0.1)
    (e,) = log_of(out)
    assert e["plays"] == 12 and 0 < e["pairs"] <= 12 and e["logprob_gap_max"] < 1e-3 and e["rollout_tokens"] > 100
    assert e["margin"] == pytest.approx(0.05 * (e["chosen"] - e["rejected"]), rel=1e-3, abs=1e-5) and e["margin"] > 0
    assert f"{e['pairs']} pairs" in printed and re.search(r"\n    chosen .*\n    rejected ", printed)
    assert "held-out prompts of each kind" in printed and "before    of held-out plays right: drawn" in printed
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in logged if "drawn" in e] == [0, 2] and 0 <= logged[-1]["drawn"] <= 1


def test_drawn_success_counts_held_out_plays_of_all_kinds(monkeypatch):
    def played_as(roller, tokenizer, episodes, count, room, length, temperature, seed):
        assert (count, room, length, temperature) == (3, 50, 600, 0.9)
        assert {e.kind for e in episodes} == set(tools.KINDS)
        asked = [e.request for e in episodes if e.kind not in ("unrelated", "lacking")]
        assert all(tools.split_of(request) == "test" for request in asked)
        done = lambda e, i: SimpleNamespace(success=e.kind in tools.SEVERAL or i == 0, play=SimpleNamespace(episode=e))
        return [[done(e, i) for i in range(count)] for e in episodes]

    monkeypatch.setattr(dpo, "play", played_as)
    config = dpo.DpoConfig(plays=3, room=50, length=600, temperature=0.9, eval_count=26)
    found = dpo.drawn_success(None, SimpleNamespace(follow=lambda model: None), None, config)
    several = len(tools.SEVERAL) / len(tools.KINDS)
    assert found == {"drawn": pytest.approx(several + (1 - several) / 3), "drawn chain": 1.0}


def test_a_round_without_pairs_leaves_the_weights(go, monkeypatch, begun):
    monkeypatch.setattr(tools.Play, "success", lambda play: False)
    out, printed = go("none", "--rounds", 1)
    assert "nothing to learn" in printed and log_of(out)[0]["pairs"] == 0
    assert (out / "model.safetensors").read_bytes() == (begun / "model.safetensors").read_bytes()


def test_weights_of_no_use_are_not_saved(go, monkeypatch):
    def learn(model, *rest):
        torch.nn.init.constant_(model.lm_head.weight, float("nan"))
        return 0.7, 1.0

    monkeypatch.setattr(dpo, "learn", learn)
    out, printed = go("nan", "--rounds", 1, code=2)
    assert "the weights are of no use after round 1: lower --lr" in printed
    assert sorted(p.name for p in out.iterdir()) == ["log.jsonl"]


def test_a_checkpoint_of_another_stage_is_refused(go, begun, tokenizer, tmp_path):
    save_pretrained(tmp_path / "base", base_model(), tokenizer)
    out, printed = go("none", start=tmp_path / "base", code=2)
    assert "is the end of stage base, and dpo begins after ifrl: give --checkpoint" in printed
    assert printed.count("\n") == 1 and not out.exists()


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--plays", "1"], "--plays must be at least 2"), (["--beta", "0"], "--beta must be a finite number above 0"),
        (["--temperature", "-1"], "--temperature must be"), (["--sft-weight", "-1"], "--sft-weight must be at least 0"),
        (["--lr", "nan"], "--lr must be a finite"), (["--rounds", "0"], "--rounds must be at least 1"),
        (["--warmup", "2"], "--warmup is a share"), (["--checkpoint", "nowhere"], "nowhere holds no finished"),
        (["--nope"], "unrecognized"), (["--out", ""], "--out is empty: give a path"),
    ],
)  # fmt: skip
def test_bad_flags_are_one_sentence_and_write_nothing(go, flags, says):
    out, printed = go("none", *flags, code=2)
    assert says in printed and printed.startswith("dpo.py: ") and printed.count("\n") == 1 and not out.exists()


def test_too_little_room_is_told_before_anything_is_played(tokenizer):
    dpo.check_length(tokenizer, 200, 900)
    for room, length, flag in ((20, 900, "room"), (200, 300, "length")):
        with pytest.raises(ValueError, match=f"tokens are too few: .* raise --{flag}"):
            dpo.check_length(tokenizer, room, length)
