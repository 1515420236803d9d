"""generate.py: batches, caches, draws, the thinking budget in two vocabularies, and what the script says to bad input.

The budget tests use a scripted model: a tiny module behind the same interface that wants to say a given text, whatever
it is fed. It keeps the tokens it was fed in its cache, so a test also sees that forced tokens really reached the model.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import ours

import generate as G
from checkpoint import save_pretrained
from generate import ThinkState, generate
from model import ModelConfig, NemotronH
from tokenizer import SPECIALS, Tokenizer, train_bpe


@pytest.fixture(scope="module")
def ours_tokenizer():
    """`</think>` and `<think>` are one token each."""
    return train_bpe(["one step a line, two steps: 12 + 34 = 46\nso the answer is 46.\n" * 3], 290)


@pytest.fixture(scope="module")
def released_like():
    """`</think>` is ordinary text of several tokens, some with more than the tag in them, as in the released files."""
    specials = {k: v for k, v in SPECIALS.items() if k not in ("<think>", "</think>")}
    tokens = [bytes([b]) for b in range(256)]
    tokens += [
        b"</",
        b"th",
        b"in",
        b"k",
        b"thin",
        b"think",
        b">\n",
        b" </",
        b".\n",
        b"\n\n",
        b"ab",
        b"abc",
        b"a\n",
        b"e>",
    ]
    ranks = {}
    for token in tokens:
        ranks.setdefault(token, 16 + len(ranks))
    # "[^a-z]*" style pieces would never glue "a\n": this pattern cuts only before a blank
    return Tokenizer(ranks, specials, r" ?[^ ]+|\s+")


def id_of(tokenizer, data):
    return tokenizer.ranks[data]


class Scripted(torch.nn.Module):
    """Wants to say `wishes[i]` (token ids) in the row whose prompt is row i's; after a forced token it resumes where it
    was, or, if `after_tag` is given, says that after the first complete `</think>` it has been fed."""

    def __init__(self, tokenizer, wishes, after_tag=None):
        super().__init__()
        self.config = ModelConfig(vocab_size=tokenizer.vocab_size)
        self.lm_head = torch.nn.Linear(tokenizer.vocab_size, tokenizer.vocab_size, bias=False)
        self.lm_head.weight = torch.nn.Parameter(torch.eye(tokenizer.vocab_size))
        self.tokenizer, self.wishes, self.after_tag = tokenizer, wishes, after_tag
        self.fed = {}

    def new_cache(self, batch_size, max_length):
        class Layer:
            pass

        class Cache:
            pass

        cache, layer = Cache(), Layer()
        layer.history = torch.full((batch_size, max_length), -1)
        cache.layers, cache.batch_size, cache.length, cache.seq_idx = [None, layer], batch_size, 0, None
        return cache

    def features(self, ids, cache, seq_idx=None):
        l, history = ids.shape[1], cache.layers[1].history
        assert history.shape[0] == ids.shape[0] == cache.batch_size
        history[:, cache.length : cache.length + l] = ids if seq_idx is None else ids.where(seq_idx == 0, -1)
        cache.length += l
        out = torch.zeros(*ids.shape, self.tokenizer.vocab_size)
        for j, row in enumerate(history.tolist()):
            text = [t for t in row if t >= 0]
            i = text[0] - 16 - ord("A")  # prompts begin with the byte "A", "B", ... to name their row
            said = text[self.prompt_lengths[i] :]
            self.fed[i] = said
            tag = self.tokenizer.decode_bytes(said).find(b"</think>")
            wish = self.wishes[i]
            if self.after_tag is not None and tag >= 0:
                said = said[self._tokens_up_to(said, tag + 8) :]
                wish = self.after_tag
            out[j, -1, wish[len(said)] if len(said) < len(wish) else self.tokenizer.eos_id] = 1
        return out

    def _tokens_up_to(self, ids, end):
        return next(n for n in range(len(ids) + 1) if len(self.tokenizer.decode_bytes(ids[:n])) >= end)

    def run(self, **options):
        base = self.tokenizer.encode("<think>\n")
        prompts = [[16 + ord("A") + i] + [16 + ord("x")] * i + base for i in range(len(self.wishes))]
        self.prompt_lengths = [len(p) for p in prompts]
        return generate(self, self.tokenizer, prompts, thinking=options.pop("thinking", True), **options)


def words(tokenizer, n, each="a"):
    return [id_of(tokenizer, each.encode())] * n


# ----------------------------------------------------------------------------------------------------------------------
# The loop


@pytest.fixture(scope="module")
def model(ours_tokenizer):
    return ours(vocab_size=ours_tokenizer.vocab_size, seed=3).eval()


PROMPTS = [[17, 40, 200], [30] * 40 + [7], [99], [16 + i % 250 for i in range(33)], [70, 71, 72, 73, 74], [21, 22]]


def test_a_batch_of_different_lengths_equals_each_row_alone(model, ours_tokenizer):
    together = generate(model, ours_tokenizer, PROMPTS, 25)
    assert len({tuple(c.ids) for c in together}) == len(PROMPTS)  # else the test would see nothing
    for prompt, c in zip(PROMPTS, together):
        assert generate(model, ours_tokenizer, [prompt], 25)[0].ids == c.ids


@pytest.mark.parametrize("prefill", [1, 7, 1024])
def test_cached_steps_equal_recomputing_the_whole_row(model, ours_tokenizer, prefill, monkeypatch):
    monkeypatch.setattr(G, "PREFILL", prefill)
    for prompt, c in zip(PROMPTS, generate(model, ours_tokenizer, PROMPTS, 12)):
        ids = list(prompt)
        for token in c.ids:
            with torch.no_grad():
                assert model(torch.tensor([ids]))[0, -1].argmax() == token
            ids.append(token)


def test_rows_end_alone_are_dropped_and_keep_their_place(model, ours_tokenizer, monkeypatch):
    """The end of turn is redefined as a token that only some rows say, early: the others must not notice."""
    free = generate(model, ours_tokenizer, PROMPTS, 25)
    eos = free[1].ids[3]
    ends = [c.ids.index(eos) + 1 if eos in c.ids else 25 for c in free]
    assert min(ends) < 10 and max(ends) == 25
    monkeypatch.setattr(Tokenizer, "eos_id", eos)
    sizes, keep = [], G._keep_rows
    monkeypatch.setattr(G, "_keep_rows", lambda cache, rows: (sizes.append(len(rows)), keep(cache, rows)))
    for share in (0.0, 0.5, 0.99):
        monkeypatch.setattr(G, "SHRINK", share)
        assert [c.ids for c in generate(model, ours_tokenizer, PROMPTS, 25)] == [c.ids[:n] for c, n in zip(free, ends)]
    assert sizes and max(sizes) < len(PROMPTS)
    monkeypatch.setattr(G, "ROWS", {"cpu": 2})  # several batches, regrouped by length
    assert [c.ids for c in generate(model, ours_tokenizer, PROMPTS, 25)] == [c.ids[:n] for c, n in zip(free, ends)]


def test_it_stops_as_soon_as_all_rows_have(ours_tokenizer):
    fake = Scripted(ours_tokenizer, [words(ours_tokenizer, 3), words(ours_tokenizer, 5)])
    steps = []
    fake.run(max_new_tokens=50, on_token=lambda row, token, state: steps.append(row))
    assert (steps.count(0), steps.count(1)) == (4, 6)  # with the end of turn
    assert [len(fake.fed[i]) for i in (0, 1)] == [4, 5] or len(fake.fed[0]) <= 5  # nothing is fed after the last


def test_the_model_is_left_in_the_mode_it_was_in(model, ours_tokenizer):
    model.train()
    seen = []
    generate(model, ours_tokenizer, [[20]], 1, on_token=lambda *_: seen.append(model.training))
    assert model.training and seen == [False]
    model.eval()
    generate(model, ours_tokenizer, [[20]], 1)
    assert not model.training


def test_ids_beyond_the_tokenizer_are_never_said(ours_tokenizer):
    wide = ours(vocab_size=ours_tokenizer.vocab_size + 50, seed=1)
    with torch.no_grad():
        wide.lm_head.weight[-50:] *= 100
    for temperature in (0.0, 2.0):
        c = generate(wide, ours_tokenizer, PROMPTS, 10, temperature=temperature)
        assert max(t for row in c for t in row.ids) < ours_tokenizer.vocab_size


def test_logits_that_are_not_numbers_are_an_error(ours_tokenizer):
    broken = NemotronH(ModelConfig(vocab_size=ours_tokenizer.vocab_size))
    with torch.no_grad():
        broken.backbone.norm_f.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        generate(broken, ours_tokenizer, [[20]], 2)


def test_no_prompts_no_answers(model, ours_tokenizer):
    assert generate(model, ours_tokenizer, []) == []


# ----------------------------------------------------------------------------------------------------------------------
# Draws


def test_a_row_draws_the_same_in_any_batch(model, ours_tokenizer):
    options = dict(max_new_tokens=20, temperature=1.0, top_p=0.9)
    seeded = {s: [c.ids for c in generate(model, ours_tokenizer, PROMPTS, seed=s, **options)] for s in (0, 1)}
    again = [c.ids for c in generate(model, ours_tokenizer, PROMPTS[::-1], seed=0, **options)][::-1]
    alone = [generate(model, ours_tokenizer, [p], seed=0, **options)[0].ids for p in PROMPTS]
    assert seeded[0] == again == alone
    assert all(a != b for a, b in zip(seeded[0], seeded[1]))
    assert seeded[0] != [c.ids for c in generate(model, ours_tokenizer, PROMPTS, 20)]


def test_samples_of_one_prompt_differ_and_longer_runs_begin_the_same(model, ours_tokenizer):
    a, b = generate(model, ours_tokenizer, [PROMPTS[0]] * 2, 20, temperature=1.0)
    assert a.ids != b.ids
    longer = generate(model, ours_tokenizer, [PROMPTS[0]] * 2, 37, temperature=1.0)
    assert [c.ids[:20] for c in longer] == [a.ids, b.ids]
    u = G.row_uniforms([[1], [2], [1]], 500, seed=0)
    assert len(set(u[:, 0].tolist())) == 3 and 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.05


def test_top_p_keeps_the_right_mass():
    p = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    logits = p.log().expand(20_000, 5)
    u = (torch.arange(20_000) + 0.5) / 20_000  # every part of [0, 1) once: frequencies are exact, not statistics
    for top_p, kept in ((1.0, [0, 1, 2, 3, 4]), (0.8, [1, 3, 4]), (0.6, [1, 3]), (0.39, [1]), (1e-9, [1])):
        got = torch.bincount(G.sample(logits, 1.0, top_p, u), minlength=5) / 20_000
        want = torch.zeros(5).index_fill(0, torch.tensor(kept), 1) * p
        torch.testing.assert_close(got, want / want.sum(), atol=2e-4, rtol=0)
    cold = torch.bincount(G.sample(logits, 0.5, 1.0, u), minlength=5) / 20_000
    torch.testing.assert_close(cold, p**2 / (p**2).sum(), atol=2e-4, rtol=0)
    assert (G.sample(logits, 0, 1.0, None) == 1).all()


def test_the_ends_of_the_unit_interval():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]] * 2)
    assert G.sample(logits, 1.0, 1.0, torch.tensor([0.0, 1 - 2**-24])).tolist() == [1, 3]


# ----------------------------------------------------------------------------------------------------------------------
# The thinking budget


def both(test):
    return pytest.mark.parametrize("name", ["ours_tokenizer", "released_like"])(test)


def plain(tokenizer, text):
    """Byte tokens, except that "</think>" is the special token where there is one."""
    out = []
    for i, part in enumerate(text.split("</think>")):
        if i:
            out += tokenizer.encode("</think>") if tokenizer.end_think_id is None else [tokenizer.end_think_id]
        out += [id_of(tokenizer, bytes([b])) for b in part.encode()]
    return out


@both
def test_a_trace_that_ends_by_itself(name, request):
    tokenizer = request.getfixturevalue(name)
    fake = Scripted(tokenizer, [plain(tokenizer, "so 4\n</think>\n46\n"), plain(tokenizer, "x</think>y</think> z")])
    for budget in (None, 6, 400):
        a, b = fake.run(thinking_budget=budget)
        assert (a.thought, a.answer, a.closed_by, a.thinking_tokens, a.answer_tokens) == ("so 4", "46", "model", 5, 4)
        assert a.ids[-1] == tokenizer.eos_id
        assert (b.thought, b.closed_by, b.thinking_tokens) == ("x", "model", 1)
        assert b.answer == "y</think> z"  # a second one is text of the answer


@both
def test_no_end_at_all(name, request):
    tokenizer = request.getfixturevalue(name)
    (c,) = Scripted(tokenizer, [plain(tokenizer, "so 4")]).run(thinking_budget=5)  # end of turn inside the trace
    assert (c.thought, c.answer, c.closed_by, c.thinking_tokens, c.answer_tokens) == ("so 4", "", "none", 4, 0)
    (c,) = Scripted(tokenizer, [words(tokenizer, 99)]).run(max_new_tokens=7)
    assert (c.thought, c.answer, c.closed_by, c.thinking_tokens, len(c.ids)) == ("a" * 7, "", "none", 7, 7)


@both
def test_thinking_off(name, request):
    tokenizer = request.getfixturevalue(name)
    fake = Scripted(tokenizer, [plain(tokenizer, "46\n")])
    (c,) = fake.run(thinking=False, thinking_budget=0)
    assert (c.thought, c.answer, c.closed_by, c.thinking_tokens, c.answer_tokens) == ("", "46", "none", 0, 3)


@both
@pytest.mark.parametrize(
    "rule,text,thought,count,closed_by",
    [
        ("report", "a" * 12 + "\n" + "b" * 50, "a" * 12, 13, "newline"),  # the next newline after the budget
        ("report", "a\na\naaaaa\nbbb", "a\na\naaaaa", 10, "newline"),  # the budget is a line's end
        ("report", "a" * 900, "a" * 510, 510, "forced"),  # none within 500
        ("report", "a" * 509 + "\n" + "b" * 9, "a" * 509, 510, "newline"),  # the last moment
        ("client", "a" * 900, "a" * 10, 10, "forced"),
        ("client", "a" * 9 + "\n" + "b" * 50, "a" * 9, 10, "forced"),
        ("nim", "a" * 900, "a" * 11, 11, "forced"),  # a tenth of the budget
        ("nim", "a" * 10 + "\n" + "b" * 50, "a" * 10, 11, "newline"),
    ],
)
def test_the_rules_with_budget_10(name, request, rule, text, thought, count, closed_by):
    tokenizer = request.getfixturevalue(name)
    fake = Scripted(tokenizer, [plain(tokenizer, text)], after_tag=plain(tokenizer, "\n46\n"))
    (c,) = fake.run(max_new_tokens=1000, thinking_budget=10, budget_rule=rule)
    assert (c.thought, c.thinking_tokens, c.closed_by) == (thought, count, closed_by)
    assert c.answer.endswith("46")
    # what the model was fed is what the completion says, and the tag stands on a line of its own
    said = tokenizer.decode_bytes(c.ids)
    assert tokenizer.decode_bytes(fake.fed[0]) == said.removesuffix(b"<SPECIAL_12>")
    assert said.count(b"</think>") == 1
    before = {"client": b".\n"}.get(rule, b"" if closed_by == "newline" else b"\n")
    after = b"" if rule == "client" else b"\n"
    assert tokenizer.decode_bytes(c.ids[:count]) + before + b"</think>" + after in said
    if tokenizer.end_think_id is not None:
        assert c.ids.count(tokenizer.end_think_id) == 1


@pytest.mark.parametrize("budget,last", [(5, 505), (100, 600)])
def test_the_wait_of_the_report_is_500_whatever_the_budget(ours_tokenizer, budget, last):
    state = ThinkState(ours_tokenizer, budget)
    a, fed = id_of(ours_tokenizer, b"a"), 0
    while not state.feed(a):
        fed += 1
    assert fed + 1 == last == state.thinking_tokens


@pytest.mark.parametrize("budget,last", [(1, 1), (9, 9), (10, 11), (39, 42), (200, 220)])
def test_the_wait_of_nim_is_a_tenth(ours_tokenizer, budget, last):
    state = ThinkState(ours_tokenizer, budget, "nim")
    while not state.feed(id_of(ours_tokenizer, b"a")):
        pass
    assert state.thinking_tokens == last


@both
@pytest.mark.parametrize("rule,closed_by", [("report", "newline"), ("nim", "newline"), ("client", "forced")])
def test_budget_zero_closes_before_the_first_token(name, request, rule, closed_by):
    tokenizer = request.getfixturevalue(name)
    fake = Scripted(tokenizer, [plain(tokenizer, "never said")], after_tag=plain(tokenizer, "\n7\n"))
    (c,) = fake.run(thinking_budget=0, budget_rule=rule)
    assert (c.thought, c.thinking_tokens, c.closed_by) == ("", 0, closed_by)
    assert c.answer.endswith("7") and b"never" not in tokenizer.decode_bytes(c.ids)


def test_a_newline_inside_a_longer_token(released_like):
    t = released_like
    for piece in (b".\n", b"\n\n", b"a\n"):
        fake = Scripted(t, [words(t, 4) + [id_of(t, piece)] + words(t, 50, "b")], after_tag=plain(t, "\n46\n"))
        (c,) = fake.run(thinking_budget=3)
        assert (c.thought, c.thinking_tokens, c.closed_by) == (("aaaa" + piece.decode()).strip(), 5, "newline")


def test_a_tag_whose_tokens_hold_more_than_the_tag(released_like):
    t = released_like
    wish = words(t, 2) + [id_of(t, x) for x in (b" </", b"think", b">\n")] + plain(t, "46\n")
    (c,) = Scripted(t, [wish]).run(thinking_budget=50)
    # " </" begins before the tag, so it counts as thought; ">\n" begins before the tag's end, so it is not answer
    assert (c.thought, c.answer, c.thinking_tokens, c.answer_tokens) == ("aa", "46", 3, 3)


@pytest.mark.parametrize("pieces", [[b"</"], [b"</", b"thin"], [b"<"], [b" </", b"think"]])
@pytest.mark.parametrize("rule", ["nim", "client"])
def test_the_budget_ends_inside_a_tag_of_several_tokens(released_like, pieces, rule):
    """The forced close finishes the tag that the model has begun; the client's rule cuts and starts another."""
    t = released_like
    wish = words(t, 4) + [id_of(t, p) for p in pieces] + words(t, 50, "b")
    fake = Scripted(t, [wish], after_tag=plain(t, "46\n"))
    (c,) = fake.run(thinking_budget=4 + len(pieces), budget_rule=rule)
    assert (c.closed_by, c.answer) == ("forced", "46")
    said = t.decode_bytes(c.ids)
    begun = b"".join(pieces)
    if rule == "nim":
        tag_starts_in_token = begun.startswith(b" ")
        assert c.thinking_tokens == 4 + tag_starts_in_token and c.thought == "aaaa"
        assert said.startswith(b"aaaa" + begun[: begun.index(b"<")] + b"</think>\n46")
    else:
        assert c.thinking_tokens == 4 + len(pieces) and c.thought == ("aaaa" + begun.decode()).strip()
        assert said.startswith(b"aaaa" + begun + b".\n</think>46")


@both
def test_the_budget_ends_inside_a_character(name, request):
    tokenizer = request.getfixturevalue(name)
    fake = Scripted(tokenizer, [plain(tokenizer, "ab\u20ac" * 9)], after_tag=plain(tokenizer, "\n46\n"))
    (c,) = fake.run(thinking_budget=9, budget_rule="client")  # "ab€" is 5 bytes: 4 are left of the second
    assert (c.thought, c.answer, c.thinking_tokens) == ("ab\u20acab", "46", 9)


def test_every_row_has_its_own_budget(ours_tokenizer):
    t = ours_tokenizer
    fake = Scripted(t, [words(t, 40)] * 4, after_tag=plain(t, "\n46\n"))
    rows = fake.run(thinking_budget=[None, 0, 7, 20], budget_rule="client")
    assert [c.thinking_tokens for c in rows] == [40, 0, 7, 20]
    assert [c.closed_by for c in rows] == ["none", "forced", "forced", "forced"]
    assert [c.answer for c in rows] == ["", "46", "46", "46"]


def test_spelled_tag_closes_in_our_vocabulary_too(ours_tokenizer):
    t = ours_tokenizer
    (c,) = Scripted(t, [[id_of(t, bytes([b])) for b in b"aa</think>46"]]).run(thinking_budget=50)
    assert (c.thought, c.answer, c.thinking_tokens, c.closed_by) == ("aa", "46", 2, "model")


def test_forced_tokens_count_against_the_bound(ours_tokenizer):
    t = ours_tokenizer
    (c,) = Scripted(t, [words(t, 40)]).run(thinking_budget=5, budget_rule="client", max_new_tokens=7)
    assert len(c.ids) == 7 and c.closed_by == "none" and c.answer == "" and c.thought == "aaaaa"


def test_a_real_model_goes_on_as_if_it_had_closed_the_trace_itself(model, ours_tokenizer):
    """After the forced tokens the greedy continuation is that of the whole text fed as a prompt."""
    prompt = PROMPTS[0]
    (c,) = generate(model, ours_tokenizer, [prompt], 30, thinking=True, thinking_budget=6, budget_rule="client")
    end = c.ids.index(ours_tokenizer.end_think_id) + 1
    assert c.closed_by == "forced" and c.thinking_tokens == 6 and end < 12
    (rest,) = generate(model, ours_tokenizer, [prompt + c.ids[:end]], 30 - end, thinking=False)
    assert rest.ids == c.ids[end:]


# ----------------------------------------------------------------------------------------------------------------------
# Conversations


def test_chat_prompts_and_detection(ours_tokenizer, released_like):
    user = [{"role": "user", "content": "Hi"}]
    for t in (ours_tokenizer, released_like):
        on, off = G.chat_prompt(t, user), G.chat_prompt(t, user, thinking=False)
        assert t.decode(on).endswith("User\nHi\n<SPECIAL_11>Assistant\n<think>\n") and G.opens_thought(t, on)
        assert t.decode(off).endswith("User\nHi\n<SPECIAL_11>Assistant\n<think></think>") and not G.opens_thought(
            t, off
        )
    earlier = [{"role": "user", "content": "a /think"}, {"role": "assistant", "content": "t</think>b"}, *user]
    assert not G.opens_thought(t, G.chat_prompt(t, earlier, thinking=False))
    assert user == [{"role": "user", "content": "Hi"}]  # the caller's list is untouched
    # training and generation agree on the prompt
    ids, mask = ours_tokenizer.encode_example("Hi", None, "x")
    assert ids[: mask.index(1)] == G.chat_prompt(ours_tokenizer, user, thinking=False)


def test_answer_and_complete_chat(model, ours_tokenizer):
    a = G.answer(model, ours_tokenizer, "12 + 34", system="be brief", max_new_tokens=9, thinking_budget=2)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "12 + 34"}]
    b = G.complete_chat(model, ours_tokenizer, messages, max_new_tokens=9, thinking_budget=2)
    assert a.ids == b.ids and a.prompt == "12 + 34" and b.prompt.startswith("<SPECIAL_10>System\nbe brief\n")
    record = json.loads(a.to_json())
    assert set(record) == {"prompt", "thought", "answer", "thinking_tokens", "answer_tokens", "closed_by"}
    for empty in ("", "  \n", "/no_think"):
        with pytest.raises(ValueError, match="empty"):
            G.answer(model, ours_tokenizer, empty)


@pytest.mark.parametrize(
    "prompts,options,match",
    [
        ([[20], []], {}, "prompt 1 is empty"),
        ([[20, 290]], {}, "token id 290"),
        ([[-1]], {}, "token id -1"),
        ([[20]], dict(max_new_tokens=0), "max_new_tokens"),
        ([[20]], dict(max_new_tokens=2.5), "max_new_tokens"),
        ([[20]], dict(max_new_tokens=131072), "131072"),
        ([[20]], dict(temperature=-0.1), "temperature"),
        ([[20]], dict(temperature=float("nan")), "temperature"),
        ([[20]], dict(top_p=0.0), "top_p"),
        ([[20]], dict(top_p=1.1), "top_p"),
        ([[20]], dict(thinking_budget=-1), "thinking_budget"),
        ([[20]], dict(thinking_budget=True), "thinking_budget"),
        ([[20]], dict(thinking_budget=[1, 2]), "2 entries for 1"),
        ([[20]], dict(thinking=[True, False]), "2 entries for 1"),
        ([[20]], dict(budget_rule="soon"), "report, nim, client"),
    ],
)
def test_bad_arguments(model, ours_tokenizer, prompts, options, match):
    with pytest.raises(ValueError, match=match) as error:
        generate(model, ours_tokenizer, prompts, **options)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# The script


@pytest.fixture(scope="module")
def folder(tmp_path_factory, ours_tokenizer):
    path = tmp_path_factory.mktemp("model")
    save_pretrained(path, ours(vocab_size=ours_tokenizer.vocab_size, seed=3), ours_tokenizer)
    return path


def test_json_has_one_object_a_prompt(folder, tmp_path, capsys):
    (tmp_path / "q.txt").write_text("two\n\n  three \n", encoding="utf-8")
    flags = ["--checkpoint", str(folder), "--json", "--file", str(tmp_path / "q.txt"), "--max-new-tokens", "9", "one"]
    assert G.main(flags) == 0
    out, err = capsys.readouterr()
    records = [json.loads(line) for line in out.splitlines()]
    assert [r["prompt"] for r in records] == ["one", "two", "three"]
    assert all(r["closed_by"] == "none" and r["thinking_tokens"] <= 9 for r in records)
    assert "device cpu" in err and "float32" in err and "tokens/s" in err and "parameters" in err


def test_budget_and_no_think_reach_the_model(folder, capsys):
    base = ["--checkpoint", str(folder), "--json", "one", "--max-new-tokens", "30"]
    assert G.main([*base, "--thinking-budget", "3", "--budget-rule", "client"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["thinking_tokens"], record["closed_by"]) == (3, "forced")
    assert G.main([*base, "--no-think"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["thought"], record["thinking_tokens"], record["closed_by"]) == ("", 0, "none")
    assert record["answer_tokens"] > 0


def test_shown_text_is_the_completion_without_colours(folder, capsys):
    base = ["--checkpoint", str(folder), "one", "--thinking-budget", "6", "--budget-rule", "client"]
    assert G.main([*base, "--max-new-tokens", "40", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert G.main([*base, "--max-new-tokens", "40"]) == 0
    shown = capsys.readouterr().out
    assert "\033" not in shown.replace(record["thought"], "").replace(record["answer"], "")
    head, _, tail = shown.partition("[answer]\n")
    assert head.removeprefix("[thought]\n").strip() == record["thought"]
    assert tail.rpartition("(6 tokens thought")[0].strip() == record["answer"] != ""


def test_printer_streams_exactly_the_two_parts(released_like, capsys):
    t = released_like
    for text in ("so <4\n</think>\n\u20ac46\n", "\n x</thi </think>y</think> z", "a</think>", "no end"):
        (c,) = Scripted(t, [[id_of(t, bytes([b])) for b in text.encode()]]).run(on_token=G._Printer())
        shown = capsys.readouterr().out
        thought, _, answer = shown.removeprefix("[thought]\n").partition("[answer]\n")
        assert (thought.strip(), answer.strip()) == (c.thought, c.answer), text
    # a close that finishes a begun tag: the begun part is not shown
    fake = Scripted(t, [plain(t, "aaa</thi")], after_tag=plain(t, "46"))
    fake.run(on_token=G._Printer(), thinking_budget=7, budget_rule="nim")
    assert capsys.readouterr().out == "[thought]\naaa\n[answer]\n46"


def test_colours_only_on_a_terminal(folder, monkeypatch, capsys):
    flags = ["--checkpoint", str(folder), "one", "--max-new-tokens", "9"]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert G.main(flags) == 0 and capsys.readouterr().out.startswith("\033[2m[thought]\n")
    monkeypatch.setenv("NO_COLOR", "1")
    assert G.main(flags) == 0 and capsys.readouterr().out.startswith("[thought]\n")


def chat(monkeypatch, lines, *flags):
    lines = iter(lines)

    def read(prompt):
        line = next(lines, EOFError)
        if isinstance(line, type):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    return G.main([*map(str, flags)])


def test_chat_keeps_the_conversation_and_drops_old_thoughts(folder, monkeypatch, capsys):
    prompts = []

    def reply(model, tokenizer, ids, **options):
        prompts.append((tokenizer.decode(ids[0]), options))
        n = len(prompts)
        return [G.Completion("", f"thought {n}", f"answer {n}", 5, 3, "model", [20] * 9)]

    monkeypatch.setattr(G, "generate", reply)
    lines = ["one", "", "/budget 2", "/budget -1", "two", "/no_think", "three", "/think", "/budget off", "/new", "four"]
    assert chat(monkeypatch, [*lines, "/quit", "never"], "--checkpoint", folder, "--system", "short") == 0
    first, second, third, fourth = (p for p, _ in prompts)
    system, open_turn = "<SPECIAL_10>System\nshort\n", "<SPECIAL_11>Assistant\n<think>\n"
    assert first == system + "<SPECIAL_11>User\none\n" + open_turn
    earlier = "<SPECIAL_11>User\none\n<SPECIAL_11>Assistant\nanswer 1\n<SPECIAL_12>\n"
    assert second == system + earlier + "<SPECIAL_11>User\ntwo\n" + open_turn
    assert third.endswith("answer 2\n<SPECIAL_12>\n<SPECIAL_11>User\nthree\n<SPECIAL_11>Assistant\n<think></think>")
    assert fourth == system + "<SPECIAL_11>User\nfour\n" + open_turn
    assert [o["thinking_budget"] for _, o in prompts] == [None, 2, 2, None]
    assert [o["max_new_tokens"] for _, o in prompts] == [512, 758, 758, 512]
    out, err = capsys.readouterr()
    assert out.count("(5 tokens thought (closed by the model), 3 tokens answer)") == 4 and "/budget wants" in err
    assert "36 tokens in" in err


@pytest.mark.parametrize("leave", [EOFError, KeyboardInterrupt])
def test_leaving_the_chat_is_not_an_error(folder, monkeypatch, capsys, leave):
    assert chat(monkeypatch, [leave], "--checkpoint", folder) == 0
    assert "Traceback" not in capsys.readouterr().err


BAD = [
    ([""], "empty"),
    (["  "], "empty"),
    (["/no_think"], "empty"),
    (["x", "--thinking-budget", "-1"], "-1"),
    (["x", "--thinking-budget", "many"], "many"),
    (["x", "--max-new-tokens", "0"], "got 0"),
    (["x", "--max-new-tokens", "131072"], "131072"),
    (["x", "--temperature", "-1"], "temperature"),
    (["x", "--temperature", "nan"], "temperature"),
    (["x", "--top-p", "0"], "top_p"),
    (["x", "--top-p", "1.5"], "top_p"),
    (["x", "--budget-rule", "soon"], "soon"),
    (["x", "--device", "tpu"], "tpu"),
    (["x", "--dtype", "int8"], "int8"),
    (["x", "--colour"], "--colour"),
    (["x", "--checkpoint", "no/such/folder"], "no/such/folder"),
    (["--json"], "--json"),
    (["--file", "no-such-file.txt"], "no-such-file.txt"),
    (["bad \udcff byte"], "UTF-8"),
]


@pytest.mark.parametrize("flags,says", BAD, ids=[" ".join(f).encode("ascii", "replace").decode() for f, _ in BAD])
def test_bad_input_is_one_sentence_and_code_2(folder, capsys, flags, says):
    assert G.main(["--checkpoint", str(folder), *flags]) == 2
    out, err = capsys.readouterr()
    last = err.rstrip("\n").splitlines()[-1]
    assert out == "" and last.startswith("generate.py: ") and says in last
    assert len([line for line in err.splitlines() if line.startswith("generate.py")]) == 1 and "Traceback" not in err


@pytest.mark.parametrize("content,says", [(b"", "is empty"), (b"\n \n", "is empty"), (b"\xff\xfe\x00a", "UTF-8")])
def test_bad_question_files(folder, tmp_path, capsys, content, says):
    (tmp_path / "q").write_bytes(content)
    assert G.main(["--checkpoint", str(folder), "--file", str(tmp_path / "q")]) == 2
    assert says in capsys.readouterr().err
    assert G.main(["--checkpoint", str(folder), "--file", str(tmp_path)]) == 2  # a folder


def test_folders_that_are_no_models(folder, tmp_path, capsys):
    assert G.main(["--checkpoint", str(tmp_path), "x"]) == 2
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert G.main(["--checkpoint", str(tmp_path), "x"]) == 2
    assert "has no tokenizer" in capsys.readouterr().err


def test_the_script_itself(folder):
    script = Path(G.__file__)
    run = [sys.executable, str(script), "--checkpoint", str(folder)]
    done = subprocess.run([*run, ""], capture_output=True, text=True, cwd=script.parent, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_cuda_where_there_is_none(folder, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert G.main(["--checkpoint", str(folder), "x", "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
