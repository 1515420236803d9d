"""Tasks: answers against solvers that read the question alone, traces step by step, the split, difficulty, errors.

The solvers below share no code with tasks.py: they parse the question as a reader would and let Python compute.
"""

import re
import time
from collections import Counter
from functools import cache
from random import Random

import pytest

import tasks
from tasks import FAMILIES, bench_questions, blend, canonical, check, check_trace, draw, sample, split_of

PAIRS = [(f.name, level) for f in FAMILIES.values() for level in f.train_levels + f.beyond]
REASONING = [f.name for f in FAMILIES.values() if f.kind == "reasoning"]
RETRIEVAL = [f.name for f in FAMILIES.values() if f.kind == "retrieval"]
GAIN, LOSS = {"buys", "finds", "gets"}, {"loses", "sells", "drops"}


@cache
def drawn(name, level, split="train", n=400):
    rng = Random(f"{name} {level} {split}")
    return [sample(name, level, rng, split) for _ in range(n)]


# ------------------------------------------------------------------------------- independent solvers


def solve_arithmetic(question):
    a, op, b = re.fullmatch(r"(?:What is )?(\d+) ([-+*]) (\d+)(?: = )?\?", question).groups()
    return str({"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[op])


def solve_modchain(question):
    start, ops, m = re.fullmatch(r"From (\d): (.*), mod (\d+)\?", question).groups()
    expression = start
    for op in ops.split():
        expression = f"({expression}){op}"
    return str(eval(expression) % int(m))  # one reduction at the very end, unlike the trace


def solve_word(question):
    name, start, thing, rest, again = re.fullmatch(r"(\w+) has (\d+) (\w+), (.*)\. How many (\w+)\?", question).groups()
    assert thing == again
    total = int(start)
    for verb, k in (part.split() for part in rest.split(", ")):
        assert verb in GAIN | LOSS
        total += int(k) if verb in GAIN else -int(k)
        assert 0 <= total <= 99
    return str(total)


def solve_boolean(question):
    text = question.removeprefix("Evaluate: ")
    return "T" if eval(text, {"T": True, "F": False}) else "F"


def records_of(question):
    given, _, ask = question.removeprefix("Given ").partition(". ")
    return [tuple(re.split(" ?= ?", r)) for r in given.split("; ")], ask


def solve_records(question):
    records, ask = records_of(question)
    if ask.startswith("Follow "):
        names = dict(records)
        assert len(names) == len(records)
        at = ask[len("Follow ") : -1]
        while not at.isdigit():
            at = names[at]
        return at
    if ask.startswith("What are all "):
        return " ".join(v for k, v in records if k == ask[len("What are all ") : -1])
    names = dict(records)
    assert len(names) == len(records)
    asked = ask.removeprefix("What are ").removeprefix("What is ")[:-1].split(", ")
    return " ".join(names[k] for k in asked)


def solve_common(question):
    (first, a), (_, b) = Counter(question.removeprefix("Most common in: ").split()).most_common(2)
    assert a > b, "the winner must be unique"
    return first


SOLVERS = {
    "add": solve_arithmetic,
    "subtract": solve_arithmetic,
    "multiply": solve_arithmetic,
    "modchain": solve_modchain,
    "reverse": lambda q: " ".join(reversed(q.removeprefix("Reverse: ").split())),
    "sort": lambda q: " ".join(sorted(q.removeprefix("Sort: ").split())),
    "word": solve_word,
    "boolean": solve_boolean,
    "count": lambda q: str(q.partition(": ")[2].split().count(q[len("Count ")])),
    "common": solve_common,
    **dict.fromkeys(("needle", "multiquery", "multivalue", "vartrack", "lookup2"), solve_records),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_answer_equals_an_independent_solver(name):
    for level in FAMILIES[name].train_levels + FAMILIES[name].beyond:
        for split in ("train", "test"):
            for s in drawn(name, level, split, 400 if split == "train" else 60):
                assert (s.family, s.level) == (name, level)
                assert s.answer == SOLVERS[name](s.question), s


# ------------------------------------------------------------------------------- traces


def answer_from_trace(name, trace):
    """The answer read off the trace, without the question: the trace must carry the whole computation."""
    lines = trace.split("\n")
    last = lines[-1]
    if name in ("add", "multiply"):
        carry, done = re.search(r"=(\d)\d -> (\d+)$", last).groups()
        return str(int(carry + done))
    if name == "subtract":
        return str(int(last.partition(" -> ")[2]))
    if name in ("modchain", "word"):
        return last.partition(" -> ")[2]
    if name in ("reverse", "sort"):
        return last.strip("-| ")
    if name == "boolean":
        return last.removeprefix("= ")
    if name == "count":
        return last.split()[2]
    if name == "common":
        return max(lines, key=lambda line: int(line.split()[2])).split()[1]
    if name == "multivalue":
        return last.partition(" -> ")[2]
    if name == "multiquery":
        return " ".join(line.partition("=")[2].strip() for line in lines)
    return last.partition("=")[2].strip()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_answer_can_be_read_off_the_trace_alone(name):
    for level in FAMILIES[name].train_levels + FAMILIES[name].beyond:
        for s in drawn(name, level):
            assert answer_from_trace(name, s.trace) == s.answer, s
            assert s.trace == s.trace.strip() and "" not in s.trace.split("\n")


def value(expression):
    """Python's value of `08+1`, in which Python itself would refuse the leading zero."""
    return eval(re.sub(r"\b0+(?=\d)", "", expression))


@pytest.mark.parametrize("name", ["add", "subtract", "multiply", "modchain", "word"])
def test_every_equation_in_a_trace_is_true_and_chained_to_the_line_before(name):
    for level in FAMILIES[name].train_levels + FAMILIES[name].beyond:
        for s in drawn(name, level, n=400):
            before = None
            numbers = [int(n) for n in re.findall(r"\d+", s.question)]
            for i, line in enumerate(s.trace.split("\n")):
                left, result = line.split(" -> ")
                if name == "word":
                    whole, left = left.split(": ")
                    assert value(whole) == int(result)
                    assert whole.startswith(str(numbers[0]) if before is None else before)
                sides = left.split("=")
                assert len({value(side) for side in sides}) == 1, line
                if name in ("add", "subtract", "multiply"):
                    x, y = (n // 10**i % 10 for n in numbers)
                    y = numbers[1] if name == "multiply" else y
                    carry = 0 if before is None else before
                    op = {"add": "+", "subtract": "-", "multiply": "*"}[name]
                    tail = f"-{carry}" if name == "subtract" else f"+{carry}"
                    assert left.startswith(f"{x}{op}{y}{tail}"), (s, line)
                    done = value(sides[-1]) % 10
                    assert int(result[0]) == done and len(result) == i + 1
                    before = int("+10=" in left) if name == "subtract" else value(sides[-1]) // 10
                    so_far = value(f"{numbers[0]}{op}{numbers[1]}") % 10 ** (i + 1)
                    assert int(result) == so_far, (s, line)
                elif name == "modchain":
                    assert sides[0].startswith(str(numbers[0]) if before is None else before)
                    assert int(result) == value(sides[-1]) % numbers[-1]
                    before = result
                else:
                    before = result


@pytest.mark.parametrize("name", ["reverse", "sort", "boolean", "count", "common"])
def test_every_line_of_a_symbol_trace_is_a_valid_state(name):
    for level in FAMILIES[name].train_levels + FAMILIES[name].beyond:
        for s in drawn(name, level):
            lines = [line[2:] for line in s.trace.split("\n")]
            letters = s.question.partition(": ")[2].split()
            for i, line in enumerate(lines):
                if name == "reverse":
                    assert line.split() == letters[: i + 1][::-1]
                elif name == "sort":
                    done, left = (half.split() for half in (line + " ").split("|"))
                    assert done == sorted(letters)[: i + 1]
                    assert left == [x for x in letters if x not in done]
                elif name == "boolean":
                    assert solve_boolean(line) == s.answer
                    words = [len(re.findall("and|or|not", t)) for t in (([s.question] + lines)[i], line)]
                    assert words[0] == words[1] + 1, "one operator a line"
                else:
                    letter = s.question[len("Count ")] if name == "count" else letters[i]
                    left = " ".join(letters[i + 1 :])
                    assert line == f"{letters[i]} {letters[: i + 1].count(letter)} | {left}".strip()
            assert name == "boolean" or len(lines) == len(letters)


@pytest.mark.parametrize("name", ["needle", "multiquery", "multivalue", "vartrack", "lookup2"])
def test_every_line_of_a_retrieval_trace_is_a_record_and_hops_are_chained(name):
    for level in FAMILIES[name].train_levels + FAMILIES[name].beyond:
        for s in drawn(name, level):
            records, ask = records_of(s.question)
            lines = [line[2:].partition(" ->") for line in s.trace.split("\n")]
            steps = [tuple(re.split(" ?= ?", line)) for line, _, _ in lines]
            assert set(steps) <= set(records)
            if name == "multivalue":  # walks through all records and keeps the list of what was found
                assert steps == records
                asked = ask.removeprefix("What are all ").removesuffix("?")
                for i, (_, _, found) in enumerate(lines):
                    assert found.split() == [v for k, v in records[: i + 1] if k == asked]
            if ask.startswith("Follow "):
                assert steps[0][0] == ask[len("Follow ") : -1]
                assert all(a[1] == b[0] for a, b in zip(steps, steps[1:]))
                assert len(steps) == (2 if name == "lookup2" else level + 2)
            if name == "vartrack":  # assigned before it is used
                seen = set()
                for k, v in records:
                    assert v.isdigit() or v in seen
                    seen.add(k)


@pytest.mark.parametrize("name", FAMILIES)
def test_length_grows_with_the_level_and_stays_small(name):
    family = FAMILIES[name]
    levels = family.train_levels + family.beyond
    traces = [sum(len(s.trace) for s in drawn(name, level)) / 400 for level in levels]
    wholes = [sum(len(s.question + s.trace + s.answer) for s in drawn(name, level)) / 400 for level in levels]
    constant = name in ("needle", "lookup2")  # one record, two records: the difficulty is in the question
    for a, b in zip(traces, traces[1:]):
        assert b == a if constant else b > a * 1.05
    assert all(b > a * 1.05 for a, b in zip(wholes, wholes[1:]))
    longest = [max(len(s.question + s.trace + s.answer) for s in drawn(name, level)) for level in levels]
    assert longest[0] <= 130 and longest[2] <= 220 and longest[-1] <= 400


def test_form_is_kind_to_a_small_tokenizer():
    for name, level in PAIRS:
        for s in drawn(name, level):
            assert s.question.isascii() and s.trace.isascii() and s.answer.isascii()
            assert not re.search(r"(^|\n)\w*[a-z]", s.trace), "data letters always follow a space"
            assert not re.search(r"\b0\d", s.answer), "no leading zeros in an answer"
            assert "\n" not in s.question + s.answer and "  " not in s.question + s.trace + s.answer
            assert s.question == s.question.strip() and s.answer == s.answer.strip()


# ------------------------------------------------------------------------------- split


@pytest.mark.parametrize("name", FAMILIES)
def test_test_and_train_questions_are_disjoint_and_one_in_eight(name):
    family, rng = FAMILIES[name], Random(3)
    keys = {"train": set(), "test": set()}
    for level in family.train_levels:
        for split in keys:
            found = drawn(name, level, split, 400 if split == "train" else 60)
            assert all(split_of(name, s.question) == split for s in found)
            keys[split] |= {canonical(name, s.question) for s in found}
    assert not keys["train"] & keys["test"]
    distinct = {family.key(q): q for q in (family.make(rng, 3)[0] for _ in range(2000))}
    share = sum(split_of(name, q) == "test" for q in distinct.values()) / len(distinct)
    assert 0.09 < share < 0.16


def test_the_split_never_changes():
    """Fixed for ever: a checkpoint trained by an older version must not have seen the test questions of a newer one."""
    found = [split_of("add", f"{a} + 58 = ?") for a in range(10, 42)]
    assert [i for i, split in enumerate(found) if split == "test"] == [6, 9, 10, 15]
    assert canonical("add", "What is 85 + 47?") == "47 85"


@pytest.mark.parametrize(
    "name, one, other",
    [
        ("add", "47 + 85 = ?", "What is 85 + 47?"),
        ("multiply", "7 * 123 = ?", "What is 123 * 7?"),
        ("subtract", "85 - 47 = ?", "What is 85 - 47?"),
        ("reverse", "Reverse: d a k", "Reverse: k a d"),
        ("sort", "Sort: d a k", "Sort: k d a"),
        ("count", "Count a in: b a n a x", "Count a in: x n a b a"),
        ("common", "Most common in: b a n a x c", "Most common in: c a a x n b"),
        (
            "word",
            "Tom has 12 pens, buys 7, drops 4. How many pens?",
            "Mia has 12 eggs, gets 7, sells 4. How many eggs?",
        ),
        ("boolean", "Evaluate: (T and F) or not (F or T)", "Evaluate: not (T or F) or (F and T)"),
        ("needle", "Given a1=10; b2=20. What is a1?", "Given b2=20; a1=10. What is a1?"),
        ("vartrack", "Given a=10; b=20; c=a. Follow c.", "Given b=20; a=10; c=a. Follow c."),
    ],
)
def test_forms_of_one_problem_share_a_side_of_the_split(name, one, other):
    assert canonical(name, one) == canonical(name, other)
    assert split_of(name, one) == split_of(name, other)


@pytest.mark.parametrize(
    "name, one, other",
    [
        ("subtract", "85 - 47 = ?", "85 - 74 = ?"),
        ("word", "Tom has 12 pens, buys 7. How many pens?", "Tom has 12 pens, drops 7. How many pens?"),
        ("boolean", "Evaluate: not (T and F)", "Evaluate: not T and F"),
        ("count", "Count a in: b a n a x", "Count b in: b a n a x"),
        ("needle", "Given a1=10; b2=20. What is a1?", "Given a1=10; b2=20. What is b2?"),
    ],
)
def test_different_problems_differ(name, one, other):
    assert canonical(name, one) != canonical(name, other)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_canonical_form_has_one_answer(name):
    answers = {}
    for level in FAMILIES[name].train_levels:
        for s in drawn(name, level, n=400):
            answer = min(s.answer, s.answer[::-1]) if name == "reverse" else s.answer
            answer = " ".join(sorted(answer.split())) if name == "multivalue" else answer
            assert answers.setdefault(canonical(name, s.question), answer) == answer


@pytest.mark.parametrize("name, level", PAIRS)
def test_there_are_enough_questions(name, level):
    make, rng = FAMILIES[name].make, Random(5)
    assert len({make(rng, level)[0] for _ in range(4000)}) >= 2000
    rng = Random(6)
    assert len({canonical(name, sample(name, level, rng, "test").question) for _ in range(200)}) >= 100


# ------------------------------------------------------------------------------- no short-cuts


@pytest.mark.parametrize("name, level", PAIRS)
def test_the_answer_cannot_be_guessed(name, level):
    """The commonest answer is right seldom (a truth value: half of the time)."""
    found = drawn(name, level)
    share = Counter(s.answer for s in found).most_common(1)[0][1] / len(found)
    assert share < {"boolean": 0.6, "count": 0.36, "modchain": 0.25}.get(name, 0.12)


@pytest.mark.parametrize("name", ["needle", "multiquery", "vartrack", "lookup2"])
def test_the_place_of_a_record_tells_nothing(name):
    """Taking the number that stands first, or last, is right about as seldom as chance says."""
    for level in FAMILIES[name].train_levels:
        found = drawn(name, level)
        for pick in (0, -1):
            hits = 0
            for s in found:
                numbers = [v for _, v in records_of(s.question)[0] if v.isdigit()]
                hits += numbers[pick] == s.answer.split()[0]
            assert hits / len(found) < 1.5 / len(numbers) + 0.05, (level, pick)


def test_distractors_distract():
    """Row i of the second table is not row i of the first; chains are interleaved; other keys repeat too."""
    same = mixed = repeats = 0
    for s in drawn("lookup2", 3):
        records = records_of(s.question)[0]
        first, second = records[:7], records[7:]
        same += sum(a[1] == b[0] for a, b in zip(first, second))
    assert same / (7 * 400) < 0.2  # 1 in 7 by chance
    for s in drawn("vartrack", 3):
        records = records_of(s.question)[0]
        mixed += sum(a[0] != b[1] for a, b in zip(records, records[1:])) / (len(records) - 1)
    assert mixed / 400 > 0.6
    for s in drawn("multivalue", 3):
        target = s.trace[2:4]
        repeats += max(Counter(k for k, _ in records_of(s.question)[0] if k != target).values()) > 1
    assert repeats == 400


# ------------------------------------------------------------------------------- blend, checks, errors


def test_fifteen_families_in_a_fixed_order():
    assert list(FAMILIES) == REASONING + RETRIEVAL == list(SOLVERS)[:9] + RETRIEVAL
    assert len(REASONING) >= 8 and len(RETRIEVAL) >= 6
    for f in FAMILIES.values():
        assert f.summary and "\n" not in f.summary and max(f.train_levels) < min(f.beyond)


def test_a_seed_gives_the_same_samples_and_the_state_restores():
    rng = Random(7)
    stream = blend(rng)
    first = [next(stream) for _ in range(20)]
    state = rng.getstate()
    rest = [next(stream) for _ in range(20)]
    again = Random(7)
    assert [draw(again) for _ in range(20)] == first
    again.setstate(state)
    assert [draw(again) for _ in range(20)] == rest
    assert {s.family for s in first} != {first[0].family}


def test_blend_follows_weights_and_levels():
    stream = blend(Random(8), {"add": 3, "sort": 1, "word": 0, ("needle", 5): 4}, {"add": (1, 4)}, "test")
    found = Counter((s.family, s.level) for s in (next(stream) for _ in range(3000)))
    want = {("add", 1): 1.5, ("add", 4): 1.5, ("sort", 1): 1 / 3, ("sort", 2): 1 / 3, ("sort", 3): 1 / 3}
    want[("needle", 5)] = 4
    assert set(found) == set(want)
    for pair, weight in want.items():
        assert abs(found[pair] / 3000 - weight / 8) < 0.03
    assert draw(Random(9), levels=[5]).level == 5
    levels = Counter(s.level for s in (draw(Random(i)) for i in range(60)))
    assert set(levels) == {1, 2, 3}


def test_checks():
    s = sample("reverse", 1, Random(10))
    assert check(s, s.answer) and check(s, f"  {s.answer.replace(' ', '  ')}\n")
    assert not check(s, s.answer.replace(" ", "")) and not check(s, s.answer + " z") and not check(s, "")
    assert check_trace(s, s.trace) and check_trace(s, f"\n{s.trace}\n")
    assert not check_trace(s, s.trace.replace("\n", " ")) and not check_trace(s, s.trace[:-1])
    with pytest.raises(AttributeError):
        s.answer = "frozen"


def test_bench_questions_are_fixed_and_held_out():
    found = bench_questions()
    assert found == bench_questions() and len(found) >= 5
    assert all(split_of(s.family, s.question) == "test" for s in found)
    assert {FAMILIES[s.family].kind for s in found} == {"reasoning", "retrieval"}


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda r: sample("sums", 1, r), "unknown task family 'sums': choose one of add, "),
        (lambda r: sample(["add"], 1, r), "unknown task family"),
        (lambda r: sample("add", 0, r), "family 'add' has no level 0: choose one of 1, 2, 3, 4, 5"),
        (lambda r: sample("add", 6, r), "no level 6"),
        (lambda r: sample("add", "1", r), "no level '1'"),
        (lambda r: sample("add", 1.0, r), "no level 1.0"),
        (lambda r: sample("add", True, r), "no level True"),
        (lambda r: sample("add", 1, r, "valid"), "split must be"),
        (lambda r: split_of("sums", "1 + 1 = ?"), "unknown task family"),
        (lambda r: blend(r, {"sums": 1}), "unknown task family"),
        (lambda r: blend(r, {"add": -1}), "weight of 'add' is -1"),
        (lambda r: blend(r, {"add": float("nan")}), "weight of 'add' is nan"),
        (lambda r: blend(r, {"add": float("inf")}), "weight of 'add' is inf"),
        (lambda r: blend(r, {"add": "2"}), "weight of 'add' is '2'"),
        (lambda r: blend(r, {}), "blend is empty"),
        (lambda r: blend(r, {"add": 0}), "blend is empty"),
        (lambda r: blend(r, {"add": 1}, ()), "blend is empty"),
        (lambda r: blend(r, None, (1, 9)), "no level 9"),
        (lambda r: blend(r, None, 2), "levels must be a sequence"),
        (lambda r: blend(r, None, {"sums": (1,)}), "unknown task family"),
        (lambda r: blend(r, {("add", 7): 1}), "no level 7"),
        (lambda r: blend(r, None, None, "dev"), "split must be"),
        (lambda r: draw(r, {"add": 0}), "blend is empty"),
    ],
)
def test_bad_input_is_one_sentence(call, says):
    with pytest.raises(ValueError) as error:
        call(Random(0))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_fast_enough():
    """20,000 a second is what an idle core does three times over; the bound is loose, for shared machines."""
    stream = blend(Random(11))
    start = time.process_time()
    for _ in range(4000):
        next(stream)
    assert 4000 / (time.process_time() - start) > 5000


def test_text_only():
    assert not {"torch", "tokenizer", "model"} & set(vars(tasks))
