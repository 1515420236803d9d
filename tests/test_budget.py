"""The thinking budget: the three published rules and their corner cases, in two vocabularies, on a scripted model."""

import pytest
from scripted import Scripted, id_of, plain, words

from budget import ThinkState


def both(test):
    return pytest.mark.parametrize("name", ["ours_tokenizer", "released_like"])(test)


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


@pytest.mark.parametrize("name", ["ours_tokenizer", "released_like"])
def test_what_is_shown_only_grows_and_ends_as_the_completion(name, request):
    tokenizer = request.getfixturevalue(name)
    for text in ("so <4\n</think>\n\u20ac46\n", "\n x</thi </think>y</think> z", " a</</think>b", "no end"):
        state, thought, answer = ThinkState(tokenizer), "", ""
        for byte in text.encode():
            state.feed(id_of(tokenizer, bytes([byte])))
            grown = state.so_far()
            assert grown[0].startswith(thought) and grown[1].startswith(answer)
            thought, answer = grown
        assert thought == state.completion("q", []).thought == text.partition("</think>")[0].strip()
        assert answer == state.completion("q", []).answer == text.partition("</think>")[2].strip()
