"""GRPO: advantages and loss against numbers by hand, a step that raises what is rewarded, environments that judge as
their sources do, a run that goes on to the bit, and refusals."""

import copy
import importlib.util
import json
import re
import signal
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fine_tuned import base_model, speaker, vocabulary
from safetensors.torch import load_file

import environments
import grpo
import instructions
import preferences
import stage
from checkpoint import save_pretrained
from judge import RewardModel, save_reward
from rollout import Roller, Sample
from safefile import write_json
from train import make_optimizer

quiet = torch.inference_mode


@pytest.fixture(scope="module")
def tokenizer():
    return vocabulary()


# ----------------------------------------------------------------------------------------------------------------------
# Advantages and loss


def test_an_advantage_is_the_reward_minus_the_mean_of_the_others_over_the_spread():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5], [2.0, -1.0, 0.0, 0.0]])
    found = grpo.advantages(rewards)
    for r, a in zip(rewards.double().numpy(), found.double().numpy()):
        by_hand = [x - np.delete(r, i).mean() for i, x in enumerate(r)]
        spread = r.std(ddof=1)
        assert a == pytest.approx(np.array(by_hand) / (spread if spread else 1), abs=1e-5)
    assert not found[1].any() and found[0].sum().abs() < 1e-5


def by_hand(pi, old, ref, A, eps, kl):
    """(loss, its derivative) of one token, in float64."""
    ratio, d = np.exp(pi - old), ref - pi
    clipped = (ratio > 1 + eps and A > 0) or (ratio < 1 - eps and A < 0)
    pull = min(ratio * A, np.clip(ratio, 1 - eps, 1 + eps) * A)
    return kl * (np.exp(d) - d - 1) - pull, (0 if clipped else -ratio * A) + kl * (1 - np.exp(d)), clipped


def test_the_loss_and_its_gradient_are_those_worked_out_by_hand():
    g = torch.Generator().manual_seed(0)
    pi, old, ref = (-3 * torch.rand(4, 9, generator=g, dtype=torch.float64) for _ in range(3))
    old = pi + 0.6 * (old + 1.5)  # near enough that some ratios are within the clip
    A = torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64)
    said = torch.rand(4, 9, generator=g) > 0.3
    pi.requires_grad_()
    total, seen = grpo.grpo_loss(pi, old, ref, A, said, 0.2, 0.05)
    total.backward()
    wanted, cut = 0.0, 0
    for i in range(4):
        for j in range(9):
            one, slope, clipped = by_hand(*(t[i, j].item() for t in (pi, old, ref)), A[i].item(), 0.2, 0.05)
            assert pi.grad[i, j].item() == pytest.approx(slope if said[i, j] else 0, abs=1e-9)
            wanted += one * said[i, j].item()
            cut += bool(clipped and said[i, j])
    assert total.item() == pytest.approx(wanted) and 0 < cut == seen["ratio clipped"].item() < said.sum()
    d = (ref - pi.detach())[said]
    assert seen["kl"].item() == pytest.approx((d.exp() - d - 1).sum().item()) and seen["kl"] > 0


def test_the_price_of_leaving_is_zero_where_nobody_left():
    pi = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    total, seen = grpo.grpo_loss(pi, pi.detach(), pi.detach(), torch.zeros(1), torch.ones(1, 2, dtype=torch.bool))
    total.backward()
    assert total.item() == 0 and seen["kl"].item() == 0 and not pi.grad.any()


# ----------------------------------------------------------------------------------------------------------------------
# One step


class Taste:
    """An environment for tests: answers with a letter are liked, the more the better."""

    room = 24

    def draw(self, rng):
        return environments.user(f"Name {rng.choice('abc')}."), rng.random() < 0.5, None

    def score(self, items, answers):
        return [float(a.count("e")) for a in answers]

    def measure(self, model, tokenizer, count, seed=0):
        return {"taste": 0.5}


def config(**changes):
    wanted = dict(prompts=4, group=4, room=24, lr=1e-2, steps=3, kl=0.0) | changes
    return grpo.fill_in(grpo.GrpoConfig(**wanted), 1e6)


def test_a_step_makes_what_was_rewarded_likelier_and_the_rest_less_likely(tokenizer):
    model = copy.deepcopy(base_model())
    reference, c = copy.deepcopy(model), config(updates=1, malformed=0.0)
    roller = Roller(model, tokenizer)
    batch = grpo.collect(roller, tokenizer, Taste(), c, 0)
    g = torch.Generator().manual_seed(3)  # a random model's answers are hardly ever well formed: rewards of our own
    batch.advantages = grpo.advantages(torch.rand(4, 4, generator=g)).flatten()
    before = grpo.policy.frozen_logprobs(model, batch.samples, 4096, quiet)
    optimizer = make_optimizer(model, 1e-3, 0.0)
    watched = grpo.learn(model, reference, optimizer, batch, c, torch.enable_grad)
    after = grpo.policy.frozen_logprobs(model, batch.samples, 4096, quiet)
    moved = torch.tensor([float(b.sum() - a.sum()) for a, b in zip(before, after)])
    assert (moved * batch.advantages).sum() > 0
    assert moved[batch.advantages > 0].mean() > moved[batch.advantages < 0].mean()
    assert watched["kl"] == pytest.approx(0, abs=1e-6) and watched["ratio clipped"] == 0 and watched["norm"] > 0
    assert watched["logprob_gap_max"] < 1e-4


def test_a_steps_answers_depend_on_seed_and_step(tokenizer):
    roller = Roller(base_model(), tokenizer)
    said = lambda seed, step: [
        (s.prompt, s.said) for s in grpo.collect(roller, tokenizer, Taste(), config(seed=seed), step).samples
    ]
    one = said(0, 0)
    assert one == said(0, 0) and one != said(1, 0) and one != said(0, 1)


def test_the_learner_measures_at_the_temperature_of_the_draws(tokenizer):
    model = copy.deepcopy(base_model())
    c = config(updates=1, temperature=0.7)
    batch = grpo.collect(Roller(model, tokenizer), tokenizer, Taste(), c, 0)
    watched = grpo.learn(model, base_model(), make_optimizer(model, 1e-4, 0.0), batch, c, torch.enable_grad)
    assert watched["logprob_gap_max"] < 1e-4


def test_updates_share_the_groups_and_the_second_is_off_policy(tokenizer):
    model = copy.deepcopy(base_model())
    seen, real = [], grpo.grpo_loss

    def watch(pi, old, *rest):
        seen.append(((pi - old).abs().max().item(), len(pi)))
        return real(pi, old, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "grpo_loss", watch)
        c = config(updates=2)
        batch = grpo.collect(Roller(model, tokenizer), tokenizer, Taste(), c, 0)
        batch.advantages = grpo.advantages(torch.rand(4, 4)).flatten()
        grpo.learn(model, copy.deepcopy(model), make_optimizer(model, 1e-2, 0.0), batch, c, torch.enable_grad)
    assert sum(n for _, n in seen) == 16 and seen[0][0] < 1e-5 < 1e-3 < seen[-1][0]


def test_the_gradient_does_not_depend_on_how_the_tokens_are_cut_into_parts(tokenizer):
    found = []
    for tokens in (64, 4096):
        model = copy.deepcopy(base_model())
        c = config(updates=1, part_tokens=tokens, kl=0.1)
        batch = grpo.collect(Roller(model, tokenizer), tokenizer, Taste(), c, 1)
        batch.advantages = torch.linspace(-1, 1, 16)
        optimizer = SimpleNamespace(step=lambda: None, zero_grad=lambda **_: None)
        grpo.learn(model, base_model(), optimizer, batch, replace_clip(c), torch.enable_grad)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-6)


def test_each_update_is_the_mean_over_its_own_tokens(tokenizer):
    c = replace_clip(config(updates=2, kl=0.1))
    batch = grpo.collect(Roller(base_model(), tokenizer), tokenizer, Taste(), c, 1)
    batch.advantages = torch.linspace(-1, 1, 16)

    def gradients(of, c):
        model, found = copy.deepcopy(base_model()), []
        step = lambda: found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        clear = lambda **_: model.zero_grad()
        optimizer = SimpleNamespace(step=step, zero_grad=clear)
        grpo.learn(model, base_model(), optimizer, of, c, torch.enable_grad)
        return found

    both = gradients(batch, c)
    for turn, got in enumerate(both):  # four groups of four: the first and the third, then the others
        mine = [i for i in range(16) if i // 4 % 2 == turn]
        half = grpo.Batch([batch.samples[i] for i in mine], None, batch.advantages[mine], None, None)
        torch.testing.assert_close(got, *gradients(half, replace_clip(config(updates=1, kl=0.1))), rtol=1e-3, atol=1e-6)
    assert len(both) == 2


def test_the_gradient_is_cut_to_its_norm(tokenizer):
    model, c, norms = copy.deepcopy(base_model()), config(updates=1, clip=1e-3), []
    batch = grpo.collect(Roller(model, tokenizer), tokenizer, Taste(), c, 1)
    step = lambda: norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
    optimizer = SimpleNamespace(step=step, zero_grad=lambda **_: None)
    watched = grpo.learn(model, base_model(), optimizer, batch, c, torch.enable_grad)
    assert norms == [pytest.approx(1e-3, rel=1e-3)] and watched["norm"] > 2e-3  # told as it was


def replace_clip(c):
    c.clip = 1e9
    return c


def test_malformed_answers_get_the_fixed_advantage_and_no_reward(tokenizer, monkeypatch):
    texts = ["1 cat\n</think>\neel e", "no end", "a</think>b</think>e", "1\n</think>\nbee eel"] * 4

    class Speaks:
        def say(self, prompts, group, room, temperature, seed):
            made = []
            for text in texts:
                ids = []
                for i, part in enumerate(text.split("</think>")):
                    ids += ([tokenizer.end_think_id] if i else []) + tokenizer.encode(part)
                ended = text != "no end"
                made.append(Sample([1], ids + [tokenizer.eos_id] * ended, np.zeros(len(ids) + ended), ended))
            return [made[i : i + 4] for i in range(0, 16, 4)]

    env = Taste()
    env.draw = lambda rng: (environments.user("x"), True, None)
    batch = grpo.collect(Speaks(), tokenizer, env, config(malformed=-2.0), 0)
    assert batch.formed == (True, False, False, True) * 4
    assert batch.rewards.view(4, 4)[0].tolist() == [3.0, 0.0, 0.0, 4.0]
    a = batch.advantages.view(4, 4)[0]
    assert a[1] == a[2] == -2.0 and 0 < a[0] < a[3]
    assert batch.shown[2] == 3.0
    env.score = lambda items, answers: [float(a.count("e")) - 9 for a in answers]  # below 0: as the worst of the step
    batch = grpo.collect(Speaks(), tokenizer, env, config(malformed=-2.0), 0)
    assert batch.rewards.view(4, 4)[0].tolist() == [-6.0, -9.0, -9.0, -5.0]


# ----------------------------------------------------------------------------------------------------------------------
# Environments


def test_answers_are_taken_apart(tokenizer):
    def sample(text, ended=True):
        ids = []
        for i, part in enumerate(re.split("(</think>|<think>)", text)):
            ids += (
                [{"</think>": tokenizer.end_think_id, "<think>": tokenizer.think_id}[part]]
                if i % 2
                else (tokenizer.encode(part))
            )
        return Sample([1], ids + [tokenizer.eos_id] * ended, None, ended)

    take = lambda text, thinking=True, ended=True: environments.answer_of(tokenizer, sample(text, ended), thinking)
    assert take("5\n</think>\n12\n") == ("12", True)
    assert take("5\n</think>\n12\n", ended=False) == ("12", False)
    assert take("5 12") == ("", False) and take("5</think>  ") == ("", False)
    assert take("5</think>1</think>2")[1] is False and take("5<think></think>1")[1] is False
    assert take("12\n", thinking=False) == ("12", True)
    assert take("12</think>3", thinking=False)[1] is False and take("", thinking=False) == ("", False)


def test_instructions_are_rewarded_by_their_verifier():
    env, rng, seen = environments.Instructions(), Random(0), set()
    for _ in range(200):
        messages, thinking, prompt = env.draw(rng)
        assert thinking and messages[0]["content"] == prompt.text and instructions.split_of(prompt) == "train"
        seen.add(len(prompt.rules))
        _, good = instructions.respond(Random(1), prompt) or (None, None)
        if good:
            assert env.score([prompt], [good]) == [1.0]
        assert env.score([prompt], ["nothing of the kind"]) == [0.0]
    assert seen == {1, 2, 3, 4, 5}
    prompt = instructions.Prompt("animals", (("exactly", 2), ("capitals", "")))
    assert env.score([prompt] * 3, ["CAT DOG", "cat dog", "cat"]) == [1.0, 0.25, 0.0]


def test_what_instructions_measure_is_strict_and_held_out(tokenizer, monkeypatch):
    answers = {}

    def reply(prompt, thinking):
        text = re.search(r"User\n(.*)\n", prompt)[1]
        return f"1\n</think>\n{answers.get(text, 'cat')}"

    for i in range(8):
        prompt, _, answer = instructions.sample(Random(f"hard 0 {i}"), 4 + i % 2, "test")
        answers[prompt.text] = answer if i % 2 else ""
    monkeypatch.setattr(environments, "generate", speaker(reply))
    assert environments.Instructions().measure(None, tokenizer, 8) == {"hard": 0.5}


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("judge")
    judge = RewardModel(copy.deepcopy(base_model()))
    with torch.no_grad():
        judge.w.normal_(generator=torch.Generator().manual_seed(0))
    save_reward(folder, judge)
    write_json(folder / "stage.json", [{"stage": "base", "settings": {}}, {"stage": "reward", "settings": {}}])
    save_pretrained(folder, judge.backbone, tokenizer)
    return folder


def test_preferences_are_what_the_judge_says(judge_folder, tokenizer):
    env, rng = environments.Preferences(judge_folder, tokenizer, torch.device("cpu")), Random(0)
    drawn = [env.draw(rng) for _ in range(40)]
    assert {thinking for _, thinking, _ in drawn} == {True, False}
    assert all(preferences.split_of(p) == "train" and m[0]["content"] == p.text for m, _, p in drawn)
    items, answers = [p for _, _, p in drawn[:3]], ["cat, hen.", "red", "apple fig"]
    assert env.score(items, answers) == pytest.approx(
        environments.score_answers(env.judge, tokenizer, items, answers), abs=1e-5
    )
    asked, real = [], env.score
    env.score = lambda items, answers: asked.extend(items) or real(items, answers)
    found = env.measure(base_model(), tokenizer, 2)
    assert {preferences.split_of(p) for p in asked} == {"test"}
    assert set(found) == {"judged", "ruled"} and np.isfinite(list(found.values())).all()


def test_a_judge_of_another_language_is_refused(judge_folder):
    from scripted import ours_vocabulary

    with pytest.raises(ValueError, match="has another tokenizer than the policy"):
        environments.Preferences(judge_folder, ours_vocabulary(), torch.device("cpu"))


THERE = importlib.util.find_spec("reasoning_gym") is not None
gym = pytest.mark.skipif(not THERE, reason="an optional extra")


@gym
def test_a_gym_scores_as_its_package_does_and_keeps_its_held_out_questions_apart():
    env, rng = environments.Gym("chain_sum, spell_backward", seed=1), Random(0)
    trained = {e["question"] for of in env.sets.values() for e in of}
    assert all(len(of) > 100 for of in env.held_out.values())
    assert not any(e["question"] in trained for of in env.held_out.values() for e in of)
    for _ in range(20):
        messages, thinking, item = env.draw(rng)
        name, entry = item
        assert thinking and messages[0]["content"] == entry["question"]
        right, wrong = env.score([item, item], [entry["answer"], "no"])
        assert right == 1.0 and 0 <= wrong < 0.5  # one of the families gives points for a part


@gym
def test_what_a_gym_measures_is_what_is_wholly_right_with_a_thought_and_without(tokenizer, monkeypatch):
    env = environments.Gym("spell_backward")
    answers = {e["question"]: e["answer"] for e in env.held_out["spell_backward"]}

    def reply(prompt, thinking):
        word = answers[next(q for q in answers if q in prompt)]
        return f"1\n</think>\n{word}" if thinking else f"{word}x"  # almost right

    entry = env.held_out["spell_backward"][0]
    assert 0 < env.score([("spell_backward", entry)], [entry["answer"] + "x"])[0] < 1
    monkeypatch.setattr(environments, "generate", speaker(reply))
    found = env.measure(None, tokenizer, 3)
    assert found["spell_backward"] == 1 and found["spell_backward off"] == 0 < found["spell_backward thought"] < 9


@gym
def test_a_family_of_too_few_questions_is_refused(monkeypatch):
    import reasoning_gym

    few = lambda name, size, seed, **_: [{"question": f"{i % 3}?", "answer": "1"} for i in range(size)]
    monkeypatch.setattr(reasoning_gym, "create_dataset", few)
    with pytest.raises(ValueError, match="chain_sum has no question left that training does not ask"):
        environments.Gym("chain_sum")


@gym
def test_an_unknown_family_is_told():
    with pytest.raises(ValueError, match="'nonsense'.* is not a family of reasoning-gym"):
        environments.Gym("chain_sum,nonsense")


def test_a_missing_gym_is_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install reasoning-gym"):
        environments.Gym("chain_sum")


# ----------------------------------------------------------------------------------------------------------------------
# The script


def test_scores_and_lengths_are_not_told_as_shares():
    found = {"judged": 0.42, "ruled": 1.0, "adding thought": 0.5, "adding": 0.5, "hard": 1.0}
    assert grpo.told(found) == "judged 0.42  ruled 1.00  adding thought 0.50  adding 50%  hard 100%"


@pytest.fixture(scope="module")
def sft3(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("sft3")
    write_json(folder / "stage.json", [{"stage": s, "settings": {}} for s in ("base", "sft1", "sft2", "sft3")])
    save_pretrained(folder, base_model(), tokenizer)
    return folder


@pytest.fixture
def go(tmp_path, sft3, capsys):
    """Run the script in a folder of its own; stop: when Ctrl-C comes, in steps. Returns (folder, what it said)."""
    flags = ["--steps", 4, "--prompts", 2, "--group", 3, "--room", 8, "--eval-count", 0, "--skills-every", 0,
             "--save-every", 100, "--dtype", "float32", "--warmup", 0.5]  # fmt: skip

    def run(name, *more, start=sft3, code=0, stop=None):
        steps, real = iter(range(1, 100)), grpo.learn

        def learn(*args):
            if next(steps) == stop:
                signal.raise_signal(signal.SIGINT)
            return real(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(grpo, "learn", learn)
            words = [*flags, "--checkpoint", start, "--out", tmp_path / name, *more]
            got = grpo.main([str(word) for word in words])
        printed = "".join(capsys.readouterr())
        assert got == code, printed
        return tmp_path / name, printed

    return run


def test_a_stopped_run_goes_on_to_the_bit_and_its_end_is_a_stage(go):
    whole, printed = go("whole")
    assert re.search(r"step +4/4  reward .*  gap .* tok/s", printed) and stage.stage_of(whole) == "ifrl"
    out, printed = go("parts", stop=2)
    assert "stopped at step 2" in printed and not (out / "config.json").exists()
    _, printed = go("parts")
    assert "resume    at step 2" in printed
    a, b = (load_file(f / "model.safetensors") for f in (whole, out))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    rewards = [
        [json.loads(line).get("reward") for line in (f / "log.jsonl").read_text().splitlines()] for f in (whole, out)
    ]
    assert rewards[0] == rewards[1] and len(rewards[0]) == 5
    rates = [json.loads(line).get("lr") for line in (out / "log.jsonl").read_text().splitlines()]
    assert rates[:4] == pytest.approx([1e-4, 2e-4, 2e-4, 2e-4])  # half of four steps rise
    assert (whole / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_step_speaks_with_the_weights_of_the_step_before(go, monkeypatch):
    """On a GPU the roller has a copy in bfloat16; here one in float64."""
    same = []

    class Copies(Roller):
        def __init__(self, model, tokenizer, dtype=None):
            super().__init__(model, tokenizer, torch.float64)
            self.learner = model

        def say(self, *args, **options):
            pairs = zip(self.model.parameters(), self.learner.parameters())
            same.append(all(torch.equal(a.float(), b) for a, b in pairs))
            return super().say(*args, **options)

    monkeypatch.setattr(grpo, "Roller", Copies)
    go("copies", "--steps", 2)
    assert same == [True, True]


def test_a_gradient_of_no_use_ends_the_run_before_it_is_saved(go, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(grpo, "grpo_loss", lambda pi, *rest: (pi.sum() * float("nan"), {}))
        out, printed = go("nan", "--save-every", 1, code=2)
    assert "the gradient's norm is nan at step 1: lower --lr" in printed and not (out / "training.safetensors").exists()


def test_the_wrong_stage_is_refused_and_nothing_is_written(go, judge_folder):
    for reward, start, says in (
        ("preferences", None, "is the end of stage sft3, and rlhf begins after dpo"),
        ("instructions", judge_folder, "is the end of stage reward, and ifrl begins after sft3"),
    ):
        more = dict(start=start) if start else {}
        out, printed = go("none", "--reward", reward, code=2, **more)
        assert says in printed and printed.count("\n") == 1 and not out.exists()


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--reward", "money"], "--reward 'money' is not one of"), (["--group", "1"], "--group must be at least 2"),
        (["--lr", "nan"], "--lr must be a finite"), (["--malformed", "1"], "--malformed is a penalty"),
        (["--warmup", "2"], "--warmup is a share"),
        (["--updates", "9"], "cannot be split"), (["--clip-ratio", "0"], "--clip-ratio must be a finite"),
        (["--reward", "gym", "--families", ","], "not a family" if THERE else "pip"),
        (["--checkpoint", "nowhere"], "nowhere holds no finished checkpoint"), (["--nope"], "unrecognized"),
    ],
)  # fmt: skip
def test_bad_flags_are_one_sentence_and_write_nothing(go, flags, says):
    out, printed = go("none", *flags, code=2)
    assert says in printed and printed.startswith("grpo.py: ") and printed.count("\n") == 1 and not out.exists()
