"""Budget control is exact: 2,700 random streams, each held against a slow reading of the three published rules.

A stream is what a model wants to say, token by token: letters, whole lines, halves of characters, pieces of `</think>`,
tool calls, an end of turn anywhere. `expect` says what must come of it by going over the bytes said so far again and
again; it shares nothing with budget.py. There are three vocabularies: in ours `</think>` is one token, in one like the
released it is spelt with several and the ">" may be glued to a newline, and in a hostile one tokens begin and end
wherever it hurts.

The rules, with N the budget: "report", the next line's end once N tokens are said, at the latest N + 500 (report
section 3.4); "nim", the same with N + N // 10; "client", at N, after a full stop (the model card's example client).
"""

from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from random import Random

import pytest
from scripted import Scripted, id_of, released_vocabulary

from budget import ThinkState
from generate import chat_prompt, generate
from tokenizer import Tokenizer

TAG = b"</think>"
STREAMS = 300  # for each of three rules and three vocabularies


# ----------------------------------------------------------------------------------------------------------------------
# The oracle


@dataclass
class Expected:
    cut: int | None  # how many tokens the model says before the close is put in; None: it is not
    put_in: bytes  # what is put in then
    closed_by: str
    thought: bytes
    thinking_tokens: int
    answer_start: int | None  # in the bytes said; None: there is no answer
    in_tag: bool  # the cut falls into a `</think>` that the model has begun
    in_character: bool  # the cut falls into a character


def latest(budget, rule):
    """The most tokens that a thought may have."""
    return budget + {"report": 500, "nim": budget // 10, "client": 0}[rule]


def text_of(data):
    """Bytes as text: without a character cut off by the end, and stripped."""
    return (data[:-cut_off] if (cut_off := incomplete(data)) else data).decode("utf-8", "replace").strip()


def incomplete(data):
    """How many bytes at the end are the beginning of a character."""
    for n in (1, 2, 3):
        try:
            data[-n:].decode()
        except UnicodeDecodeError as error:
            if error.start == 0 and error.reason == "unexpected end of data":
                return n
    return 0


def begun(data):
    """How many bytes of `</think>` the data ends with, without being all of it."""
    return max(n for n in range(len(TAG)) if data.endswith(TAG[:n]))


def expect(tokenizer, wish, budget, rule):
    """What must come of a model that thinks and wants to say wish[k] as its k-th token, then its end of turn."""
    pieces = [tokenizer.decode_bytes([t]) for t in wish]
    n, said, cut, closed_by = 0, b"", None, "none"  # the trace so far: n tokens, these bytes
    while TAG not in said:
        if budget is not None and n >= budget:
            line_ends = n == 0 or b"\n" in pieces[n - 1]  # `<think>\n` ends a line too
            if rule != "client" and line_ends or n >= latest(budget, rule):
                cut, closed_by = n, "newline" if rule != "client" and line_ends else "forced"
                break
        if n == len(wish):
            break
        said, n = said + pieces[n], n + 1

    put_in, thought, half = b"", said, 0
    if TAG in said:
        closed_by, thought = "model", said[: said.find(TAG)]
    elif cut is not None and rule == "client":
        put_in = b".\n" + TAG
    elif cut is not None:
        half = begun(said) if tokenizer.end_think_id is None else 0  # begun: it is finished, not said again
        line = b"" if said[-1:] in (b"", b"\n") or half else b"\n"
        put_in, thought = line + TAG[half:] + b"\n", said[: len(said) - half]
    at = (said + put_in).find(TAG)
    count = sum(start < len(thought) for start in list(accumulate(map(len, pieces[:n]), initial=0))[:n])
    end = None if at < 0 else at + len(TAG)
    return Expected(cut, put_in, closed_by, thought, count, end, begun(said) > 0, incomplete(said) > 0)


def check(tokenizer, wish, budget, rule, limit, thinking, c):
    """Hold a Completion of at most `limit` tokens against the oracle; returns the corner cases that it was."""
    eos = tokenizer.eos_id
    own = (wish + [eos] * 32)[: len(c.ids)]
    spoken = c.ids[:-1] if c.ids[-1] == eos else c.ids  # without the end of turn
    pieces = [tokenizer.decode_bytes([t]) for t in spoken]
    data, starts = b"".join(pieces), list(accumulate(map(len, pieces), initial=0))[: len(pieces)]
    assert len(c.ids) <= limit and (len(c.ids) == limit or c.ids[-1] == eos) and eos not in spoken
    if not thinking:
        assert c.ids == own and (c.thought, c.thinking_tokens, c.closed_by) == ("", 0, "none")
        assert (c.answer, c.answer_tokens) == (text_of(data), len(spoken))
        return ["off"]

    # token by token: the model's own up to the cut, the close, the model's own again, nothing lost or doubled
    e = expect(tokenizer, wish, budget, rule)
    first = after = len(c.ids) if e.cut is None else min(e.cut, len(c.ids))
    while after < len(c.ids) and len(b"".join(pieces[first:after])) < len(e.put_in):
        after += 1
    put_in = b"".join(pieces[first:after])
    assert put_in == e.put_in if after < limit else e.put_in.startswith(put_in)
    assert c.ids[:first] == own[:first] and c.ids[after:] == own[after:]

    assert budget is None or c.thinking_tokens <= latest(budget, rule)
    if e.answer_start is None or e.answer_start > len(data):  # no close, or the bound came before its end
        assert (c.closed_by, c.answer, c.answer_tokens) == ("none", "", 0)
        assert c.thinking_tokens == min(first, len(spoken))
        return ["end of turn inside the thought" if c.ids[-1] == eos else "bound inside the thought"]
    assert (c.closed_by, c.thought, c.thinking_tokens) == (e.closed_by, text_of(e.thought), e.thinking_tokens)
    assert (c.answer, c.answer_tokens) == (text_of(data[e.answer_start :]), sum(s >= e.answer_start for s in starts))
    # exactly one close: every other `</think>` is what the model said after it, and that is answer
    assert data[: e.answer_start].count(TAG) == 1 and data[: e.answer_start].endswith(TAG)
    if e.cut is not None and tokenizer.end_think_id is not None:
        assert c.ids[first:after].count(tokenizer.end_think_id) == 1
    elif e.cut is not None and after < limit:  # spelt as in training: what belongs together is glued
        assert c.ids[first:after] == tokenizer.encode(put_in.decode())
    cases = {"second tag": "</think>" in c.answer, "tool call": "<TOOLCALL>[" in c.thought + c.answer}
    cases |= {"in a tag": e.cut and e.in_tag, "in a character": e.cut and e.in_character}
    return [e.closed_by, *(case for case, found in cases.items() if found)]


# ----------------------------------------------------------------------------------------------------------------------
# The streams


@pytest.fixture(scope="module")
def hostile():
    """Tokens with a line's end in the middle, a whole tag or two, a tag's end and more, half a character and a line."""
    base = released_vocabulary()
    more = [
        b".\n b",
        b"\n</",
        b"\n</think",
        b"x</think>y",
        b"</think>\n</think>",
        b"k>\n4",
        b"a<",
        b"\xac\n",
        b"\xe2\x82",
    ]
    more += [b"/think>\xe2", b">\n\n", b"\n\xf0\x9f", b"\x98\x80<"]
    return Tokenizer(base.ranks | {t: base.vocab_size + i for i, t in enumerate(more)}, base.specials, base.pattern)


def pieces_of(tokenizer):
    """Names of what may be said -> the ways to say it, each a list of ids."""
    spell = lambda data: [id_of(tokenizer, bytes([b])) for b in data]
    plain = [spell(x) for x in (b"a", b"b", b" ", b".", b"7", b"a b", b"<", b">", b"/")]
    lines = [spell(x) for x in (b"\n", b"\n\n", b"a\n", b"\n b", b"\r\n")]
    halves = [spell(x.encode()) for x in ("\u20ac", "\U0001f600", "\u00e9")]
    halves += [x[:k] for x in halves for k in range(1, len(x))] + [spell(b"\x80"), spell(b"\xff")]
    partial = [spell(TAG[:k]) for k in range(1, 8)] + [spell(TAG[k:]) for k in range(1, 8)] + [spell(b"<think>")]
    tags = [spell(TAG), spell(TAG + b"\n"), tokenizer.encode("</think>"), tokenizer.encode("a</think>\n")]
    tools = [spell(b'<TOOLCALL>[{"name": "f"}]</TOOLCALL>'), tokenizer.encode("<TOOLCALL>[]</TOOLCALL>")]
    special = [[i] for i in tokenizer.specials.values() if i not in (tokenizer.eos_id, tokenizer.end_think_id)]
    several = [(token, [i]) for token, i in tokenizer.ranks.items() if len(token) > 1]
    longer = [ids for token, ids in several if b"\n" not in token and TAG not in token]
    lines += [ids for token, ids in several if b"\n" in token and TAG not in token]
    tags += [ids for token, ids in several if TAG in token]
    if tokenizer.end_think_id is not None:
        tags += [[tokenizer.end_think_id]] * 4
    else:
        glued = [(b"</", b"think", b">\n"), (b" </", b"thin", b"k", b">\n"), (b"</", b"th", b"in", b"k", b">")]
        tags += [[id_of(tokenizer, x) for x in way] for way in glued]
        partial += [[id_of(tokenizer, x) for x in way[:k]] for way in glued for k in range(1, len(way))]
    return dict(
        plain=plain, lines=lines, halves=halves, partial=partial, tags=tags, tools=tools, special=special, longer=longer
    )


def stream(rng, parts):
    """(what the model wants to say, its budget): short or long, tame or wild, full of lines or a single one."""
    budget = rng.choice([None, 0, 0, 1, 2, 3, rng.randrange(40), rng.randrange(40), rng.randrange(200)])
    length = rng.choice([rng.randrange(12), rng.randrange(80), rng.randrange(300)])
    weights = dict(plain=10, longer=4, lines=rng.choice([0, 0.02, 0.5, 3]), halves=rng.choice([0, 2, 8]))
    weights |= dict(partial=rng.choice([0, 0.5, 6, 20]), tags=rng.choice([0, 0, 0.1, 1]), tools=0.1, special=0.05)
    if rng.random() < 0.4:  # a thought that does not end, longer than any rule waits
        length = (budget or 0) + 480 + rng.randrange(200)
        weights |= dict(lines=0, tags=0, partial=rng.choice([0, 3, 6]))
    kinds, weights, wish = list(weights), list(weights.values()), []
    while len(wish) < length:
        wish += rng.choice(parts[rng.choices(kinds, weights)[0]])
    if rng.random() < 0.15:  # an end of turn anywhere
        length = rng.randrange(length + 1)
    return wish[:length], budget


def through_the_state(tokenizer, wish, budget, rule, limit, thinking, show):
    """Feed a ThinkState as `generate` does, and see on the way that it never thinks longer than its rule allows, closes
    only once, asks for tokens only once, and (if `show`) that what can be shown of it only grows."""
    state, ids, asked, flips = ThinkState(tokenizer, budget, rule, thinking), [], 0, 0
    forced = state.start() or []
    asked += bool(forced)
    shown = "", ""
    for token in [*wish, tokenizer.eos_id] + [tokenizer.eos_id] * 16:
        was_open = state.open
        token = forced.pop(0) if forced else token
        ids.append(token)
        if token == tokenizer.eos_id:
            break
        dictated = state.feed(token)
        assert dictated is None or not forced
        asked += dictated is not None
        forced += dictated or []
        flips += was_open != state.open
        assert budget is None or state.thinking_tokens <= latest(budget, rule)
        if show:
            new = state.so_far()
            assert all(b.startswith(a) for a, b in zip(shown, new))
            shown = new
        if len(ids) == limit:
            break
    assert asked <= 1 and flips <= 1
    c = state.completion("", ids)
    if show:
        assert all(whole.startswith(part) for part, whole in zip(shown, (c.thought, c.answer)))
    return c


VOCABULARIES = pytest.mark.parametrize("name", ["ours_tokenizer", "released_like", "hostile"])
CASES = ["model", "forced", "newline", "second tag", "tool call", "in a tag", "in a character", "off"]
CASES += ["end of turn inside the thought", "bound inside the thought"]


@VOCABULARIES
@pytest.mark.parametrize("rule", ["report", "client", "nim"])
def test_random_streams(name, rule, request):
    tokenizer = request.getfixturevalue(name)
    parts, rng, seen = pieces_of(tokenizer), Random(f"{name} {rule}"), Counter()
    for i in range(STREAMS):
        wish, budget = stream(rng, parts)
        limit = rng.choice([2000, 2000, 2000, 1 + rng.randrange(120)])
        options = (budget, rule, limit, rng.random() < 0.95)
        c = through_the_state(tokenizer, wish, *options, show=i % 5 == 0)
        seen.update(check(tokenizer, wish, *options, c))
    assert all(seen[case] > 1 for case in CASES if (case, rule) != ("newline", "client")), seen  # else it is too tame


# ----------------------------------------------------------------------------------------------------------------------
# Through `generate`


@VOCABULARIES
@pytest.mark.parametrize("rule", ["report", "client", "nim"])
def test_random_streams_in_batches(name, rule, request):
    """Rows with budgets of their own, in one batch, by a model that is fed what was put in; the user has typed a
    `</think>`, which closes nothing."""
    tokenizer = request.getfixturevalue(name)
    parts, rng, seen = pieces_of(tokenizer), Random(f"{name} {rule} in batches"), Counter()
    for _ in range(3):
        rows = [stream(rng, parts) for _ in range(6)]
        wishes, budgets = [wish[:90] for wish, _ in rows], [budget for _, budget in rows]
        fake = Scripted(tokenizer, wishes)
        asked = tokenizer.encode("what does </think> mean?\n<think>\n")
        prompts = [[id_of(tokenizer, bytes([ord("A") + i])), *asked] for i in range(len(rows))]
        fake.prompt_lengths = [len(prompt) for prompt in prompts]
        found = generate(fake, tokenizer, prompts, max_new_tokens=80, thinking_budget=budgets, budget_rule=rule)
        for i, (wish, budget, c) in enumerate(zip(wishes, budgets, found)):
            seen.update(check(tokenizer, wish, budget, rule, 80, True, c))
            assert fake.fed.get(i, []) == c.ids[: len(fake.fed.get(i, []))] and len(fake.fed[i]) >= len(c.ids) - 1
    assert len(seen) >= 4, seen


@VOCABULARIES
def test_a_tag_that_the_user_types_closes_nothing(name, request):
    tokenizer = request.getfixturevalue(name)
    question = [{"role": "user", "content": "what is </think>, and \n</think>\n? <think>\n"}]
    name_of_row = [id_of(tokenizer, b"A")]
    wish = [id_of(tokenizer, bytes([b])) for b in b"hm\n</think>\n a tag"]
    for typed in (chat_prompt(tokenizer, question), tokenizer.encode(question[0]["content"])):
        fake = Scripted(tokenizer, [wish])
        fake.prompt_lengths = [1 + len(typed)]
        (c,) = generate(fake, tokenizer, [name_of_row + typed], thinking_budget=50)
        assert (c.thought, c.answer, c.closed_by, c.thinking_tokens) == ("hm", "a tag", "model", 3)
        (c,) = generate(fake, tokenizer, [name_of_row + typed], thinking_budget=1, budget_rule="client")
        assert (c.thought, c.closed_by, c.thinking_tokens) == ("h", "forced", 1)
