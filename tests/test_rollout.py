"""Rollouts: what is written down is what the model says, whoever shares the batch; draws have the probabilities that
stand beside them; a policy's log-probabilities agree with the rollout's and with the plain forward."""

import copy
from random import Random

import numpy as np
import pytest
import torch
from fine_tuned import base_model, vocabulary
from reference import ours

import conversations as C
import policy
import rollout
from generate import chat_prompt
from rollout import Roller, draw


@pytest.fixture(scope="module")
def model():
    return base_model()


@pytest.fixture(scope="module")
def tokenizer():
    return vocabulary()


@pytest.fixture(scope="module")
def brief(model, tokenizer):
    """A model that ends its turn after some 20 tokens: noise alone would hardly ever."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        x = model.features(torch.tensor(prompts_of(tokenizer, 1))).mean((0, 1))
        model.lm_head.weight[tokenizer.eos_id] = 4 * x / x.square().sum()
    return model


def prompts_of(tokenizer, count=6):
    """Of different lengths."""
    kinds = list(C.SKILLS)
    return [chat_prompt(tokenizer, C.SKILLS[kinds[i % 5]](Random(i), "train").messages) for i in range(count)]


def flat(groups):
    return [sample for group in groups for sample in group]


def plain(model, sample, temperature=1.0):
    """The log-probabilities of what a sample says, by one forward of it alone."""
    ids = torch.tensor([sample.prompt + sample.said])
    with torch.no_grad():
        logits = model(ids)[0, len(sample.prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(sample.said)[:, None])[:, 0].numpy()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_every_token_has_the_probability_that_the_full_forward_gives_it(brief, tokenizer, temperature):
    prompts = prompts_of(tokenizer)
    model = brief
    groups = Roller(model, tokenizer).say(prompts, 3, 12, temperature, seed=1)
    assert [s.prompt for s in flat(groups)] == [p for p in prompts for _ in range(3)]
    for sample in flat(groups):
        assert 0 < len(sample.said) <= 12 and len(sample.said) == len(sample.logprobs)
        assert sample.ended == (sample.said[-1] == tokenizer.eos_id) and tokenizer.eos_id not in sample.said[:-1]
        assert sample.ended or len(sample.said) == 12
        vocab = tokenizer.vocab_size == model.config.vocab_size
        assert vocab and np.abs(plain(model, sample, temperature) - sample.logprobs).max() < 1e-4
    assert any(s.ended for s in flat(groups)) and not all(s.ended for s in flat(groups))


def test_answers_that_move_to_a_smaller_engine_go_on_as_they_were(brief, tokenizer, monkeypatch):
    model, prompts, usual = brief, prompts_of(tokenizer), Roller(brief, tokenizer)
    whole = flat(usual.say(prompts, 4, 120, seed=3))
    assert list(usual.engines) == [24]  # too few to be worth it
    monkeypatch.setattr(rollout, "SMALLEST", 2)
    roller = Roller(model, tokenizer)
    moved = flat(roller.say(prompts, 4, 120, seed=3))
    assert len(roller.engines) > 1 and {24, 12} <= set(roller.engines)
    for a, b in zip(whole, moved):  # the draws after a move are others, their probabilities are still the forward's
        n = min(8, len(a.said))
        assert a.said[:n] == b.said[:n] and np.abs(plain(model, b) - b.logprobs).max() < 1e-4


def test_the_same_seed_says_the_same_and_another_does_not(model, tokenizer):
    prompts = prompts_of(tokenizer)
    one, two, other = (flat(Roller(model, tokenizer).say(prompts, 2, 30, seed=s)) for s in (5, 5, 6))
    assert [s.said for s in one] == [s.said for s in two] != [s.said for s in other]
    roller = Roller(model, tokenizer)
    first = roller.say(prompts, 2, 30, seed=5)
    assert [s.said for s in flat(roller.say(prompts, 2, 30, seed=5))] == [s.said for s in flat(first)]  # old engines


def test_a_few_rows_at_a_time(model, tokenizer):
    roller = Roller(model, tokenizer, rows=4)
    samples = flat(roller.say(prompts_of(tokenizer), 2, 20, seed=1))
    assert set(roller.engines) == {4} and len(samples) == 12
    assert roller.pace.samples == 12 and roller.pace.tokens == sum(len(s.said) for s in samples)
    assert roller.pace.prompt_tokens == sum(map(len, prompts_of(tokenizer)))  # once a group
    assert all(np.abs(plain(model, s) - s.logprobs).max() < 1e-4 for s in samples)


def test_a_prompt_of_one_token_stands_beside_longer_ones(model, tokenizer):
    for prompts in ([[5]], [[5], [5, 6, 7], [9]]):
        samples = flat(Roller(model, tokenizer).say(prompts, 2, 10, seed=1))
        assert all(np.abs(plain(model, s) - s.logprobs).max() < 1e-4 for s in samples)


def test_ids_that_the_tokenizer_does_not_have_are_never_said(tokenizer):
    n = tokenizer.vocab_size
    wide = ours(vocab_size=2 * n, hidden_size=32, intermediate_size=48)
    for sample in flat(Roller(wide, tokenizer).say(prompts_of(tokenizer, 3), 4, 12, seed=1)):
        assert max(sample.said) < n  # half of all would not be
        ids = torch.tensor([sample.prompt + sample.said])
        with torch.no_grad():
            logits = wide(ids)[0, len(sample.prompt) - 1 : -1, :n]
        own = torch.log_softmax(logits, -1).gather(1, torch.tensor(sample.said)[:, None])[:, 0].numpy()
        assert np.abs(own - sample.logprobs).max() < 1e-4


def test_one_roller_goes_from_few_short_prompts_to_many_long_ones_and_keeps_few_engines(model, tokenizer):
    roller, prompts = Roller(model, tokenizer), prompts_of(tokenizer, rollout.MOST + 2)
    for count in range(1, len(prompts) + 1):
        found = flat(roller.say(prompts[:count], 1, 4 + 20 * count, seed=count))
        assert 0 < len(roller.engines) <= rollout.MOST
    assert [s.said for s in found] == [s.said for s in flat(Roller(model, tokenizer).say(prompts, 1, 204, seed=10))]
    for count in range(1, len(prompts) + 1):  # of one length: no engine is given up for being short
        roller.say([prompts[0][:9]] * count, 1, 2)
        assert 0 < len(roller.engines) <= rollout.MOST


def test_the_model_is_left_in_the_mode_it_was_in(model, tokenizer):
    roller = Roller(model, tokenizer)
    for mode in (True, False):
        model.train(mode)
        roller.say([[5, 6]], 1, 2)
        assert model.training is mode


def test_draws_have_their_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0, -30.0]]).repeat(40_000, 1)
    ids, logprobs = draw(logits, 2.0, torch.Generator().manual_seed(0))
    p = torch.softmax(logits[0] / 2.0, -1)
    assert torch.allclose(ids.bincount(minlength=4) / 40_000, p, atol=0.01)
    assert torch.allclose(logprobs.exp(), p[ids])


def test_a_copy_follows_only_when_told(model, tokenizer):
    prompts, wide = prompts_of(tokenizer, 2), [p.clone() for p in model.parameters()]
    roller = Roller(model, tokenizer, torch.bfloat16)
    before = flat(roller.say(prompts, 2, 10, seed=1))
    try:
        with torch.no_grad():
            model.lm_head.weight.mul_(3.0)
        assert [s.said for s in flat(roller.say(prompts, 2, 10, seed=1))] == [s.said for s in before]
        roller.follow(model)
        assert torch.equal(roller.model.lm_head.weight, model.lm_head.weight.bfloat16())
        assert [s.said for s in flat(roller.say(prompts, 2, 10, seed=1))] != [s.said for s in before]
    finally:
        with torch.no_grad():
            for p, w in zip(model.parameters(), wide):
                p.copy_(w)
    assert model.lm_head.weight.dtype == torch.float32  # the learner's own stay as they are
    assert {p.dtype for p in roller.model.parameters() if p.dim() == 1} == {torch.float32}


@pytest.mark.parametrize(
    "bad", [dict(group=0), dict(room=0), dict(temperature=0.0), dict(prompts=[[]]), dict(prompts=[])]
)
def test_bad_wishes_get_a_sentence(model, tokenizer, bad):
    wish = dict(prompts=[[1, 2]], group=1, room=4, temperature=1.0) | bad
    with pytest.raises(ValueError, match="rollouts need prompts"):
        Roller(model, tokenizer).say(**wish)


def test_more_positions_than_the_model_has_are_refused_before_anything_is_made(model, tokenizer):
    roller = Roller(model, tokenizer)
    with pytest.raises(ValueError, match="a prompt of 2 tokens and an answer of 131071 would pass .* lower --room"):
        roller.say([[1, 2]], 1, 131_071)
    assert not roller.engines


# ----------------------------------------------------------------------------------------------------------------------
# The learner's side


def test_log_probabilities_agree_with_the_rollout_and_have_the_gradient_of_the_plain_form(model, tokenizer):
    samples = flat(Roller(model, tokenizer).say(prompts_of(tokenizer), 2, 25, seed=2))
    cooler = policy.frozen_logprobs(model, samples[:2], 300, torch.inference_mode, 0.7)
    assert all(np.abs(plain(model, s, 0.7) - own).max() < 1e-4 for s, own in zip(samples, cooler))
    found = policy.frozen_logprobs(model, samples, 300, torch.inference_mode)  # several bundles
    gaps = policy.mismatch(found, [s.logprobs for s in samples])
    assert gaps["logprob_gap_max"] < 1e-4 and 1 <= gaps["logprob_error"] < 1 + 1e-4
    apart = policy.mismatch([np.array([-1.0, -2.0]), np.array([-3.0])], [np.array([-1.0, -1.0]), np.array([-5.0])])
    assert apart == pytest.approx({"logprob_gap": 1, "logprob_gap_max": 2, "logprob_error": (1 + np.e + np.e**2) / 3})
    ids, said = policy.rows(samples, "cpu")
    assert said.sum() == sum(len(s.said) for s in samples) and ids.shape[1] % 16 == 0
    weights = torch.randn(said.shape, generator=torch.Generator().manual_seed(0))
    (policy.logprobs(model, ids, said) * weights).sum().backward()
    got = model.lm_head.weight.grad.clone()
    model.zero_grad()
    nll = torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    (-nll.view(len(ids), -1) * (weights * said)[:, 1:]).sum().backward()
    torch.testing.assert_close(got, model.lm_head.weight.grad, rtol=1e-3, atol=1e-4)
    model.zero_grad()


def test_numbers_of_tokens_stand_at_their_places(model, tokenizer):
    samples = flat(Roller(model, tokenizer).say(prompts_of(tokenizer), 1, 12, seed=4))
    ids, said = policy.rows(samples, "cpu")
    full = policy.spread([s.logprobs for s in samples], said)
    for row, of, sample in zip(full, ids, samples):
        start = len(sample.prompt)
        assert of[start : start + len(sample.said)].tolist() == sample.said
        assert np.array_equal(row[start : start + len(sample.said)], sample.logprobs)
        assert row.abs().sum() == pytest.approx(np.abs(sample.logprobs).sum(), rel=1e-5)


def test_bundles_hold_every_sample_once_and_no_more_than_asked(model, tokenizer):
    samples = flat(Roller(model, tokenizer).say(prompts_of(tokenizer, 9), 2, 30, seed=4))
    parts = list(policy.bundles(samples, 500))
    assert sorted(i for part in parts for i in part) == list(range(18)) and len(parts) > 2
    for part in parts:
        assert len(part) == 1 or policy.rows([samples[i] for i in part], "cpu")[0].numel() <= 500


@pytest.mark.gpu
def test_a_gpu_speaks_in_half_precision_close_to_its_learner():
    from device import choose_impl

    model, tokenizer = base_model().cuda(), vocabulary()
    model.use(choose_impl("auto", torch.device("cuda"), model.config)[0])
    try:
        for dtype, most in ((None, 0.02), (torch.bfloat16, 0.15)):
            roller = Roller(model, tokenizer, dtype)
            for seed in (1, 2):  # the second time from recordings
                samples = flat(roller.say(prompts_of(tokenizer, 40), 8, 64, seed=seed))
                found = policy.frozen_logprobs(model, samples, 8192, torch.inference_mode)
                assert policy.mismatch(found, [s.logprobs for s in samples])["logprob_gap_max"] < most
    finally:
        model.cpu().use("torch")
