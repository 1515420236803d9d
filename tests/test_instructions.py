"""Conditions: each verifier tells what follows it from what does not; references satisfy all of theirs."""

from random import Random

import pytest

import instructions as I
from instructions import RULES, Prompt, check, follows, on_topic, respond, sample

CASES = [  # rule, argument, an answer that follows, one that does not
    ("exactly", 3, "cat dog owl", "cat dog"),
    ("at least", 3, "cat dog owl", "cat dog"),
    ("at least", 3, "cat dog owl fox", "cat"),
    ("at most", 2, "cat dog", "cat dog owl"),
    ("at most", 2, "cat", "cat dog owl fox"),
    ("without letter", "o", "cat hen", "cat owl"),
    ("letter twice", "a", "cat bat", "cat dog"),
    ("with word", "dog", "cat dog", "cat owl"),
    ("without word", "dog", "cat owl", "CAT DOG"),
    ("no word twice", "", "cat owl", "cat owl cat"),
    ("first", "cat", "cat owl", "owl cat"),
    ("last", "cat", "owl cat!", "cat owl"),
    ("sorted", "", "cat dog owl", "dog cat"),
    ("sorted backwards", "", "owl dog cat", "cat dog"),
    ("capitals", "", "CAT DOG", "CAT Dog"),
    ("capital first", "", "Cat Dog", "Cat dog"),
    ("capital first", "", "Cat Dog", "CAT DOG"),
    ("commas", "", "cat, dog, owl", "cat, dog owl"),
    ("lines", "", "- cat\n- dog", "cat\ndog"),
    ("lines", "", "- cat\n- dog", "- cat dog"),
    ("mark", "!", "cat dog!", "cat! dog"),
    ("quotes", "", '"cat dog"', '"cat" dog'),
]


@pytest.mark.parametrize("name, argument, good, bad", CASES)
def test_a_verifier_tells_them_apart(name, argument, good, bad):
    prompt = Prompt("animals", ((name, argument),))
    assert follows(prompt, good) == [True] and check(prompt, good)
    assert follows(prompt, bad) == [False] and not check(prompt, bad)


def test_every_rule_has_a_case_and_there_are_enough():
    assert {name for name, *_ in CASES} == set(RULES) and len(RULES) >= 10


def test_references_satisfy_their_prompts_and_use_every_rule():
    rng, used = Random(0), set()
    for i in range(600):
        prompt, trace, answer = sample(rng, 1 + i % 5)
        assert all(follows(prompt, answer)) and check(prompt, answer), (prompt, answer)
        assert [line.split()[1] for line in trace.split("\n")] == I.words(answer)
        assert len({RULES[name].group for name, _ in prompt.rules}) == len(prompt.rules) == 1 + i % 5
        assert all(RULES[name].say.format(argument) in prompt.text for name, argument in prompt.rules)
        used |= {name for name, _ in prompt.rules}
    assert used == set(RULES)


def test_a_reference_for_another_prompt_mostly_fails():
    rng = Random(1)
    drawn = [sample(rng, 3) for _ in range(300)]
    passed = sum(check(p, answer) for (p, _, _), (_, _, answer) in zip(drawn, drawn[1:]))
    assert passed < 0.05 * len(drawn)


def test_several_at_once_are_told_apart():
    prompt = Prompt("fruits", (("exactly", 2), ("commas", ""), ("mark", "!")))
    assert follows(prompt, "fig, pear!") == [True, True, True]
    assert follows(prompt, "fig pear!") == [True, False, True] and not check(prompt, "fig pear!")


def test_other_words_are_off_topic_even_if_all_conditions_hold():
    prompt = Prompt("animals", (("exactly", 2),))
    assert follows(prompt, "red blue") == [True] and not on_topic(prompt, "red blue") and not check(prompt, "red blue")
    assert on_topic(prompt, "cat " * I.LONGEST) and not on_topic(prompt, "cat " * (I.LONGEST + 1))


@pytest.mark.parametrize("text", ["", " ", "\n", "!", "42", "- "])
def test_an_answer_without_words_follows_nothing(text):
    for name, argument, *_ in CASES:
        assert follows(Prompt("animals", ((name, argument),)), text) == [False]


def test_prompts_that_cannot_be_satisfied_have_no_reference():
    assert respond(Random(0), Prompt("animals", (("exactly", 99),))) is None
    assert respond(Random(0), Prompt("animals", (("first", "wolf"), ("sorted", ""), ("at least", 3)))) is None


def test_train_and_test_share_no_prompt_whatever_the_order():
    rng = Random(2)
    key = lambda p: (p.kind, tuple(sorted(map(str, p.rules))))
    seen = {split: {key(sample(rng, 1 + i % 3, split)[0]) for i in range(400)} for split in ("train", "test")}
    assert not seen["train"] & seen["test"] and len(seen["test"]) > 50
    prompt = Prompt("animals", (("exactly", 2), ("commas", "")))
    assert I.split_of(prompt) == I.split_of(Prompt("animals", prompt.rules[::-1]))


def test_bad_values_are_refused():
    for count in (0, 99, True, 1.0):
        with pytest.raises(ValueError, match="conditions, one of a group"):
            sample(Random(0), count)
    with pytest.raises(ValueError, match="split must be"):
        sample(Random(0), 1, "dev")
