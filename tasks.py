"""Reasoning and retrieval tasks, generated: a question, a trace (the chain of thought), an answer.

The idea. A model of a million parameters cannot learn to reason from the web, but it can learn to reason about
something: ten minutes of addition, sorting or word problems show every effect that the large models show (a thought
that carries the computation, a thinking budget, failure past the training length). Generated tasks also give what no
text collection gives: an exact answer to check, an exact trace to check, and a test set that cannot leak.

Two kinds. In the *reasoning* families the work is the trace: level n + 1 needs more steps than level n. In the
*retrieval* families the work is to find a few records among many: level n + 1 has more records. The retrieval
families follow RULER (Hsieh et al. 2024): needle in a haystack with its multi-query and multi-value forms, variable
tracking, common words. They are what separates attention from a fixed-size state.

How a trace is written, since this decides whether a small model learns it:
- One step a line, and a step is: copy what is needed, then do one small operation (one digit plus one digit, the
  least of a few letters). Nothing has to be computed in the head, nothing has to be looked up far behind.
- The state is written out (carry, partial result, letters that are left), so the answer is a copy of the last lines.
- A thinking budget cuts at a newline; every line is therefore a complete thought.
- Letters that are data always stand after a space: a byte-level BPE then gives `k` the same token everywhere, which
  is why lines of letters start with "- " and letters are assigned with " = ". Digits are one token each by the
  tokenizer's pattern.

The split. Whether a question is "train" or "test" is decided by a hash of its canonical form (`canonical`), so it is
a property of the question and not of a seed: no test question can be trained on, whatever the process, rank or day.
Forms that are the same problem (47 + 85 and 85 + 47; records in another order; other names in a word problem) have
the same canonical form, so the mirror image of a test question is not trained on either.

What this file must not know: tokens and models. It returns plain text.

Why by hand: libraries such as reasoning-gym have over a hundred verified families and are the better outside exam.
Few of them come with a step-by-step trace short enough for a very small model, and none with this split.
"""

import re
from bisect import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from random import Random

LETTERS = "abcdefghijklmnopqrstuvwxyz"
KEYS = [a + d for a in LETTERS for d in "0123456789"]  # record keys: a letter and a digit, 260 of them
NAMES = ("Tom", "Mia", "Ann", "Bob", "Kim", "Sam", "Eva", "Max")
THINGS = ("apples", "books", "coins", "cards", "pens", "eggs", "cups", "keys")
GAINS, LOSSES = ("buys", "finds", "gets"), ("loses", "sells", "drops")
TEST_SHARE = 8  # one question in 8 is a test question


@dataclass(frozen=True)
class Sample:
    """One solved question. All four texts are plain; the trace has one step a line and no newline at its ends."""

    family: str
    level: int
    question: str
    trace: str
    answer: str


@dataclass(frozen=True)
class Family:
    """How to make one kind of task. `make(rng, level)` returns (question, trace, answer); `key(question)` returns the
    canonical form that the split hashes. `beyond` are levels above training, for length generalisation only."""

    name: str
    kind: str  # "reasoning" or "retrieval"
    summary: str
    make: Callable[[Random, int], tuple[str, str, str]]
    key: Callable[[str], str]
    train_levels: tuple[int, ...] = (1, 2, 3)
    beyond: tuple[int, ...] = (4, 5)


# ------------------------------------------------------------------------------------------ canonical forms


def _same(question: str) -> str:
    """Nothing can be reordered: the question is its own canonical form."""
    return question


def _numbers(question: str) -> str:
    """The operands only, smaller first: `What is 85 + 47?` and `47 + 85 = ?` are one question."""
    return " ".join(sorted(re.findall(r"\d+", question)))


def _numbers_in_order(question: str) -> str:
    return " ".join(re.findall(r"\d+", question))


def _letters_in_any_order(question: str) -> str:
    head, _, letters = question.partition(": ")
    return head + " ".join(sorted(letters.split()))


def _letters_or_mirror(question: str) -> str:
    letters = question.partition(": ")[2]
    return min(letters, letters[::-1])


def _story(question: str) -> str:
    """`Tom has 12 apples, buys 7, drops 4. How many apples?` is `12 +7 -4`, whoever it is about."""
    words = re.findall(r"(\w+) (\d+)", question)
    return " ".join(("" if w == "has" else "+" if w in GAINS else "-") + n for w, n in words)


def _records_in_any_order(question: str) -> str:
    records, _, asked = question.partition(". ")
    return "; ".join(sorted(records[len("Given ") :].split("; "))) + ". " + asked


def _expression(question: str) -> str:
    """Operands of `and` and `or` in sorted order, all the way down."""
    words = re.findall(r"\w+|[()]", question.partition(": ")[2])

    def operand(i):
        if words[i] == "not":
            text, i = operand(i + 1)
            return "!" + text, i
        if words[i] == "(":
            text, i = binary(i + 1)
            return text, i + 1
        return words[i], i + 1

    def binary(i):
        left, i = operand(i)
        if i == len(words) or words[i] == ")":
            return left, i
        op = words[i]
        right, i = operand(i + 1)
        return f"({op} {min(left, right)} {max(left, right)})", i

    return binary(0)[0]


# ------------------------------------------------------------------------------------------ reasoning: arithmetic


def _digits(rng: Random, n: int) -> int:
    """A number of exactly n digits (n = 1 includes 0)."""
    return rng.randrange(10 ** (n - 1) if n > 1 else 0, 10**n)


def _operands(rng: Random, level: int) -> tuple[int, int]:
    """Two numbers of level + 1 digits. One in four times the second is shorter; level 1 also has sums of one digit."""
    n = level + 1
    if rng.random() < 0.75:
        return _digits(rng, n), _digits(rng, n)
    if level == 1:
        n = rng.randint(1, 2)
    return _digits(rng, n), _digits(rng, rng.randint(1, n))


def _ask(rng: Random, a: int, op: str, b: int) -> str:
    return f"{a} {op} {b} = ?" if rng.random() < 0.5 else f"What is {a} {op} {b}?"


def _add(rng: Random, level: int) -> tuple[str, str, str]:
    """A column a line, from the right: digit + digit + carry = two digits -> the result so far."""
    a, b = _operands(rng, level)
    if rng.random() < 0.5:
        a, b = b, a
    lines, carry, done, x, y = [], 0, "", a, b
    while x or y or not lines:
        total = x % 10 + y % 10 + carry
        done = str(total % 10) + done
        lines.append(f"{x % 10}+{y % 10}+{carry}={total:02d} -> {done}")
        carry, x, y = total // 10, x // 10, y // 10
    return _ask(rng, a, "+", b), "\n".join(lines), str(a + b)


def _subtract(rng: Random, level: int) -> tuple[str, str, str]:
    """A column a line: digit - digit - borrow + (10 if that is negative, else 0) = one digit -> the result so far."""
    a, b = _operands(rng, level)
    a, b = max(a, b), min(a, b)
    lines, borrow, done, x, y = [], 0, "", a, b
    while x or y or not lines:
        digit = x % 10 - y % 10 - borrow
        lend = 10 if digit < 0 else 0
        done = str(digit + lend) + done
        lines.append(f"{x % 10}-{y % 10}-{borrow}+{lend}={digit + lend} -> {done}")
        borrow, x, y = lend // 10, x // 10, y // 10
    return _ask(rng, a, "-", b), "\n".join(lines), str(a - b)


def _multiply(rng: Random, level: int) -> tuple[str, str, str]:
    """level + 2 digits (at level 1 also 2) times one: digit * factor + carry = product + carry -> the result so far."""
    a, b = _digits(rng, 2 if level == 1 and rng.random() < 0.25 else level + 2), rng.randint(2, 9)
    lines, carry, done, x = [], 0, "", a
    while x:
        product = x % 10 * b
        total = product + carry
        done = str(total % 10) + done
        lines.append(f"{x % 10}*{b}+{carry}={product:02d}+{carry}={total:02d} -> {done}")
        carry, x = total // 10, x // 10
    return _ask(rng, a, "*", b), "\n".join(lines), str(a * b)


def _modchain(rng: Random, level: int) -> tuple[str, str, str]:
    """level + 1 additions and multiplications, from left to right, each reduced modulo 7 or 10. A zero is only added
    to: multiplied on, it would make the rest of the chain, and the answer, too easy to guess."""
    m = rng.choice((7, 10))
    value, ops, lines = rng.randrange(m), [], []
    start = value
    for _ in range(level + 1):
        op, k = "+" if value == 0 else rng.choice("+*"), rng.randrange(1, m)
        full = value + k if op == "+" else value * k
        lines.append(f"{value}{op}{k}={full} -> {full % m}")
        ops.append(f"{op}{k}")
        value = full % m
    return f"From {start}: {' '.join(ops)}, mod {m}?", "\n".join(lines), str(value)


def _word(rng: Random, level: int) -> tuple[str, str, str]:
    """`level` gains and losses of 1 to 9 things; totals stay in 0..99. Only the unit digits are computed with."""
    thing, total = rng.choice(THINGS), rng.randint(1, 99)
    parts, lines = [f"{rng.choice(NAMES)} has {total} {thing}"], []
    for _ in range(level):
        k = rng.randint(1, 9)
        unit = total % 10
        gain = rng.random() < 0.5 if k <= total <= 99 - k else total < k
        if gain:
            step, new = f"{unit}+{k}={unit + k:02d}", total + k
        else:
            lend = 10 if unit < k else 0
            step, new = f"{unit}-{k}+{lend}={unit - k + lend}", total - k
        parts.append(f"{rng.choice(GAINS if gain else LOSSES)} {k}")
        lines.append(f"{total}{'+' if gain else '-'}{k}: {step} -> {new}")
        total = new
    return f"{', '.join(parts)}. How many {thing}?", "\n".join(lines), str(total)


# ------------------------------------------------------------------------------------------ reasoning: symbols


def _reverse(rng: Random, level: int) -> tuple[str, str, str]:
    """Each line puts the next letter in front; the first letter of a line points at where we are."""
    letters = rng.sample(LETTERS, level + 2)
    lines = [f"- {' '.join(letters[i::-1])}" for i in range(len(letters))]
    return f"Reverse: {' '.join(letters)}", "\n".join(lines), " ".join(letters[::-1])


def _sort(rng: Random, level: int) -> tuple[str, str, str]:
    """Selection sort: each line moves the least letter that is left across the bar."""
    letters = rng.sample(LETTERS, level + 2)
    left, done, lines = list(letters), [], []
    while left:
        done.append(min(left))
        left.remove(done[-1])
        lines.append(" ".join(["-", *done, "|", *left]))
    return f"Sort: {' '.join(letters)}", "\n".join(lines), " ".join(done)


def _count(rng: Random, level: int) -> tuple[str, str, str]:
    """One letter a line: the letter, the count so far, the letters left. Without the rest a repeated letter would leave
    it open where in the row we are."""
    n = 2 * level + 3
    hits = rng.randint(0, (n + 1) // 2)
    target, *rest = rng.sample(LETTERS, n - hits + 1)
    letters = rest + [target] * hits
    rng.shuffle(letters)
    lines, seen = [], 0
    for i, letter in enumerate(letters):
        seen += letter == target
        lines.append(f"- {letter} {seen} | {' '.join(letters[i + 1 :])}".strip())
    return f"Count {target} in: {' '.join(letters)}", "\n".join(lines), str(hits)


def _tree(rng: Random, ops: int, after_not: bool = False):
    """A random expression with exactly `ops` operators: "T", "F", ("not", x) or (op, x, y); never not not."""
    if ops == 0:
        return rng.choice("TF")
    if not after_not and rng.random() < 0.3:
        return ("not", _tree(rng, ops - 1, True))
    left = rng.randrange(ops)
    return (rng.choice(("and", "or")), _tree(rng, left), _tree(rng, ops - 1 - left))


def _show(tree, inner: bool = False) -> str:
    if isinstance(tree, str):
        return tree
    if tree[0] == "not":
        return "not " + _show(tree[1], True)
    text = f"{_show(tree[1], True)} {tree[0]} {_show(tree[2], True)}"
    return f"({text})" if inner else text


def _rewrite(tree):
    """The tree after its leftmost innermost operator is replaced by its value."""
    op, *args = tree
    for i, arg in enumerate(args):
        if not isinstance(arg, str):
            args[i] = _rewrite(arg)
            return (op, *args)
    if op == "not":
        return "F" if args[0] == "T" else "T"
    return "T" if (all if op == "and" else any)(a == "T" for a in args) else "F"


def _boolean(rng: Random, level: int) -> tuple[str, str, str]:
    """level + 3 operators; each line is the whole expression after one of them is worked out. A guess is right half
    of the time, so score the trace as well."""
    tree = _tree(rng, level + 3)
    question, lines = f"Evaluate: {_show(tree)}", []
    while not isinstance(tree, str):
        tree = _rewrite(tree)
        lines.append(f"= {_show(tree)}")
    return question, "\n".join(lines), tree


# ------------------------------------------------------------------------------------------ retrieval


def _given(records: list[str], ask: str) -> str:
    return f"Given {'; '.join(records)}. {ask}"


def _table(rng: Random, n: int) -> tuple[list[str], list[int], list[str]]:
    """n different keys, n different values of two digits, and the records `key=value`."""
    keys, values = rng.sample(KEYS, n), rng.sample(range(10, 100), n)
    return keys, values, [f"{k}={v}" for k, v in zip(keys, values)]


def _needle(rng: Random, level: int) -> tuple[str, str, str]:
    """One key among 4, 8, 12, 20, 32 records."""
    keys, values, records = _table(rng, (4, 8, 12, 20, 32)[level - 1])
    i = rng.randrange(len(keys))
    return _given(records, f"What is {keys[i]}?"), f"- {records[i]}", str(values[i])


def _multiquery(rng: Random, level: int) -> tuple[str, str, str]:
    """level + 1 keys, in any order, among 4, 6, 8, 12, 16 records."""
    keys, values, records = _table(rng, (4, 6, 8, 12, 16)[level - 1])
    asked = rng.sample(range(len(keys)), level + 1)
    question = _given(records, f"What are {', '.join(keys[i] for i in asked)}?")
    return question, "\n".join(f"- {records[i]}" for i in asked), " ".join(str(values[i]) for i in asked)


def _multivalue(rng: Random, level: int) -> tuple[str, str, str]:
    """Every value of one key, in order, `level` or level + 1 of them; the other keys repeat as well. The trace walks
    through all records and keeps the list of values found: "the next one with this key" is no local step."""
    n = (4, 5, 6, 8, 10)[level - 1]
    hits = min(level, 3) + rng.randrange(2)
    target, *others = rng.sample(KEYS, 1 + (n - hits + 1) // 2)
    keys = [target] * hits + (others * 2)[: n - hits]
    rng.shuffle(keys)
    pairs = list(zip(keys, rng.sample(range(10, 100), n)))
    found, lines = [], []
    for k, v in pairs:
        found += [str(v)] if k == target else []
        lines.append(f"- {k}={v} -> {' '.join(found)}".strip())
    question = _given([f"{k}={v}" for k, v in pairs], f"What are all {target}?")
    return question, "\n".join(lines), " ".join(found)


def _vartrack(rng: Random, level: int) -> tuple[str, str, str]:
    """Three chains of assignments, interleaved; one is followed back over level + 1 hops to its number."""
    hops = level + 1
    lengths = [hops, rng.randint(1, hops + 1), rng.randint(1, hops + 1)]
    names, values = rng.sample(LETTERS, sum(lengths) + 3), rng.sample(range(10, 100), 3)
    chains = []
    for value, length in zip(values, lengths):
        chain = [names.pop() for _ in range(length + 1)]
        chains.append([f"{a} = {b}" for a, b in zip(chain, [value, *chain])])
    order = [i for i, chain in enumerate(chains) for _ in chain]
    rng.shuffle(order)  # a variable is always assigned before it is used, as in a program
    feeds = [iter(chain) for chain in chains]
    question = _given([next(feeds[i]) for i in order], f"Follow {chains[0][-1][0]}.")
    return question, "\n".join(f"- {step}" for step in reversed(chains[0])), str(values[0])


def _lookup2(rng: Random, level: int) -> tuple[str, str, str]:
    """Two tables, key to letter and letter to number, of 3, 5, 7, 10, 14 rows each: the second in another order."""
    n = (3, 5, 7, 10, 14)[level - 1]
    keys, values, _ = _table(rng, n)
    letters = rng.sample(LETTERS, n)
    first = [f"{k} = {x}" for k, x in zip(keys, letters)]
    second = [f"{x} = {v}" for x, v in zip(letters, values)]
    i = rng.randrange(n)
    question = _given(first + rng.sample(second, n), f"Follow {keys[i]}.")
    return question, f"- {first[i]}\n- {second[i]}", str(values[i])


def _common(rng: Random, level: int) -> tuple[str, str, str]:
    """The most frequent letter of 6, 8, 10, 12, 14: a letter a line, how often it has come so far, what is left."""
    n = (6, 8, 10, 12, 14)[level - 1]
    top = rng.randint(2, 2 + n // 5)
    winner, *others = rng.sample(LETTERS, n)
    letters = [winner] * top
    for other in others:  # every other letter comes at least once and less often than the winner
        if len(letters) < n:
            letters += [other] * min(rng.randint(1, top - 1), n - len(letters))
    rng.shuffle(letters)
    lines, seen = [], {}
    for i, letter in enumerate(letters):
        seen[letter] = seen.get(letter, 0) + 1
        lines.append(f"- {letter} {seen[letter]} | {' '.join(letters[i + 1 :])}".strip())
    return f"Most common in: {' '.join(letters)}", "\n".join(lines), winner


FAMILIES: dict[str, Family] = {
    f.name: f
    for f in (
        Family("add", "reasoning", "addition with carry, level + 1 digits", _add, _numbers),
        Family("subtract", "reasoning", "subtraction with borrow, level + 1 digits", _subtract, _numbers_in_order),
        Family("multiply", "reasoning", "level + 2 digits times one digit", _multiply, _numbers),
        Family("modchain", "reasoning", "a chain of level + 1 operations modulo 7 or 10", _modchain, _same),
        Family("reverse", "reasoning", "level + 2 letters backwards", _reverse, _letters_or_mirror),
        Family("sort", "reasoning", "level + 2 letters by selection", _sort, _letters_in_any_order),
        Family("word", "reasoning", "a story with `level` gains and losses", _word, _story),
        Family("boolean", "reasoning", "an expression of level + 3 operators, rewritten", _boolean, _expression),
        Family("count", "reasoning", "a letter counted in 2 level + 3 letters", _count, _letters_in_any_order),
        Family("needle", "retrieval", "one key among 4 to 12 records", _needle, _records_in_any_order),
        Family("multiquery", "retrieval", "level + 1 keys among 4 to 8 records", _multiquery, _records_in_any_order),
        Family("multivalue", "retrieval", "all values of one key, 4 to 6 records", _multivalue, _records_in_any_order),
        Family("vartrack", "retrieval", "a variable over level + 1 hops, 3 chains", _vartrack, _records_in_any_order),
        Family("lookup2", "retrieval", "two tables of 3 to 7 rows, two hops", _lookup2, _records_in_any_order),
        Family("common", "retrieval", "the most frequent of 6 to 10 letters", _common, _letters_in_any_order),
    )
}


# ------------------------------------------------------------------------------------------ split and sampling


def canonical(family: str, question: str) -> str:
    """The form of the question that the split hashes; equal for two questions that are the same problem."""
    return _family(family).key(question)


def split_of(family: str, question: str) -> str:
    """Returns "train" or "test", decided by the question alone; one in TEST_SHARE is "test"."""
    digest = blake2b(f"{family}\n{canonical(family, question)}".encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") % TEST_SHARE == 0 else "train"


def _family(name: str) -> Family:
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"unknown task family {name!r}: choose one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _check(name: str, level: int, split: str) -> None:
    family = _family(name)
    levels = family.train_levels + family.beyond
    if type(level) is not int or level not in levels:
        raise ValueError(f"family {name!r} has no level {level!r}: choose one of {', '.join(map(str, levels))}")
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}')


def sample(family: str, level: int, rng: Random, split: str = "train") -> Sample:
    """One sample of one family and level, drawn until its question falls in the split that was asked for.

    Raises ValueError for an unknown family, level or split.
    """
    _check(family, level, split)
    make = FAMILIES[family].make
    while True:
        question, trace, answer = make(rng, level)
        if split_of(family, question) == split:
            return Sample(family, level, question, trace, answer)


def blend(rng: Random, weights: dict | None = None, levels=None, split: str = "train") -> Iterator[Sample]:
    """An endless stream of samples from a weighted mix of families and levels; restorable through the state of `rng`.

    weights: None (all families alike), or a dict from family name, or from (family name, level), to a weight of at
    least 0; what is not named is not drawn. levels: None (each family's training levels), one sequence of levels for
    all, or a dict from family name to a sequence of levels. A family's weight is shared by its levels.
    Raises ValueError at the call, before the first sample.
    """
    pairs, sums = [], []
    for name in levels if isinstance(levels, dict) else ():
        _family(name)
    for name, weight in (dict.fromkeys(FAMILIES, 1.0) if weights is None else weights).items():
        name, *chosen = name if isinstance(name, tuple) else (name,)
        _family(name)
        if not chosen:
            chosen = levels.get(name) if isinstance(levels, dict) else levels
            chosen = FAMILIES[name].train_levels if chosen is None else chosen
        if isinstance(chosen, (int, str)):
            raise ValueError(f"levels must be a sequence of whole numbers such as (1, 2), got {chosen!r}")
        if not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
            raise ValueError(f"the weight of {name!r} is {weight!r}: give a finite number of at least 0")
        for level in chosen:
            _check(name, level, split)
            pairs.append((name, level))
            sums.append(weight / len(chosen))
    sums = list(accumulate(sums))
    if not sums or sums[-1] <= 0:
        raise ValueError("the task blend is empty: give at least one family a level and a weight above 0")

    def stream():
        while True:
            name, level = pairs[bisect(sums, rng.random() * sums[-1], hi=len(sums) - 1)]
            yield sample(name, level, rng, split)

    return stream()


def draw(rng: Random, weights: dict | None = None, levels=None, split: str = "train") -> Sample:
    """One sample of the blend; see `blend`, which is faster for many."""
    return next(blend(rng, weights, levels, split))


def bench_questions() -> list[Sample]:
    """A few test questions, the same in every run: a training job answers them as it goes, for people to watch."""
    names = ("add", "reverse", "sort", "word", "boolean", "needle", "vartrack")
    return [sample(name, 1, Random(f"bench {name}"), "test") for name in names]


def check(sample: Sample, answer: str) -> bool:
    """True when the answer is the right one, white space aside."""
    return answer.split() == sample.answer.split()


def check_trace(sample: Sample, trace: str) -> bool:
    """True when the trace is the expected one to the character (white space around it aside)."""
    return trace.strip() == sample.trace
