"""The taste: the rule's points one by one, the best answer, noise, the split."""

import math
from random import Random

import pytest

import preferences as P

PROMPT = P.Prompt((("animals", 2), ("colours", 1)))


def test_the_prompt_reads_as_one():
    assert PROMPT.text == "Name 2 animals and 1 colour."
    assert P.Prompt((("things", 3),), "Quick: ").text == "Quick: Name 3 things."


@pytest.mark.parametrize(
    "answer, points",
    [
        ("cat, owl, red.", 4),
        ("cat, owl, red", 3),
        ("CAT, OWL, RED", 2),
        ("cat, owl", 2),
        ("cat, cat, red", 1.5),  # used again
        ("cat, owl, plum", 1),  # of another kind
        ("cat, owl, fox", 2),  # a third animal fills no place
        ("cat, owl, red, fox", 2.5),  # more than asked for
        ("cat, owl, red, red", 2),  # more, and used again
        ("", 0),
        (".", 0),
        ("42", 0),
    ],
)
def test_the_rule_gives_these_points(answer, points):
    assert P.score(PROMPT, answer) == points


def test_no_answer_beats_the_best():
    rng = Random(0)
    for _ in range(300):
        prompt = P.draw_prompt(rng)
        top = sum(n for _, n in prompt.wanted) + 1
        assert P.score(prompt, P.best(rng, prompt)) == top
        assert all(P.score(prompt, P.respond(rng, prompt)) <= top for _ in range(5))


def test_without_noise_the_rule_decides_and_with_it_bradley_and_terry_do():
    rng = Random(1)
    for _ in range(300):
        pair = P.draw(rng)
        assert P.score(pair.prompt, pair.chosen) > P.score(pair.prompt, pair.rejected)
    expected, agreed, n = 0.0, 0, 3000
    for _ in range(n):
        pair = P.draw(rng, noise=1.0)
        gap = P.score(pair.prompt, pair.chosen) - P.score(pair.prompt, pair.rejected)
        agreed += gap > 0
        expected += 1 / (1 + math.exp(-abs(gap)))
    assert agreed / n == pytest.approx(expected / n, abs=0.03) and 0.6 < agreed / n < 0.95


def test_the_probabilities_of_both_orders_are_one():
    for noise in (0, 0.5, 1, 3):
        a, b = "cat, owl, red.", "cat"
        assert P.probability(PROMPT, a, b, noise) + P.probability(PROMPT, b, a, noise) == pytest.approx(1)
    assert P.probability(PROMPT, "cat", "owl", 0) == 0.5
    assert P.probability(PROMPT, "cat, owl, red.", "", 1e-9) == 1


def test_train_and_test_ask_for_different_things():
    rng = Random(2)
    seen = {split: {tuple(sorted(P.draw_prompt(rng, split).wanted)) for _ in range(400)} for split in ("train", "test")}
    assert not seen["train"] & seen["test"] and len(seen["test"]) > 5
    mirrored = P.Prompt(PROMPT.wanted[::-1], "Please: ")
    assert P.split_of(mirrored) == P.split_of(PROMPT)


def test_pairs_depend_on_the_seed_alone_and_bad_values_are_refused():
    assert P.draw(Random(5), noise=1.0) == P.draw(Random(5), noise=1.0) != P.draw(Random(6), noise=1.0)
    with pytest.raises(ValueError, match="noise must be"):
        P.draw(Random(0), noise=-1)
    with pytest.raises(ValueError, match="split must be"):
        P.draw(Random(0), "dev")
