"""generate.py: batches, caches, draws, forced tokens, and what the script says to bad input."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reference import ours
from scripted import Scripted, id_of, plain, words

import engine
import generate as G
from budget import Completion, opens_thought
from chat import Printer
from checkpoint import save_pretrained
from generate import generate
from model import PRESETS, ModelConfig, NemotronH
from sizes import count_parameters, row_bytes, step_bytes, weights_bytes, work_bytes

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
    monkeypatch.setitem(engine.PREFILL, "cpu", prefill)
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
    monkeypatch.setattr(ours_tokenizer, "eos_id", eos)
    sizes, keep = [], engine.Engine.keep
    monkeypatch.setattr(engine.Engine, "keep", lambda self, slots: (sizes.append(len(slots)), keep(self, slots)))
    for share in (0.0, 0.5, 0.99):
        monkeypatch.setattr(G, "SHRINK", share)
        assert [c.ids for c in generate(model, ours_tokenizer, PROMPTS, 25)] == [c.ids[:n] for c, n in zip(free, ends)]
    assert sizes and max(sizes) < len(PROMPTS)
    monkeypatch.setattr(G, "ROWS", {"cpu": 2})  # two slots for six rows: who ends makes room
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
    said = []
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="not finite"):
            generate(broken, ours_tokenizer, [[20]], 2, temperature, on_token=lambda *token: said.append(token))
    assert not said


def test_speed_counts_what_was_read_said_and_moved(model, ours_tokenizer, monkeypatch):
    speed, began = G.Speed(), time.perf_counter()
    (c,) = generate(model, ours_tokenizer, PROMPTS[:1], 9, speed=speed)
    assert (speed.rows, speed.prompt_tokens, speed.tokens, speed.steps) == (1, 3, 9, 8)
    alone = sum(step_bytes(model.config, [3 + i], 4, 4) for i in range(8))  # float32 weights, one more key a step
    assert speed.moved == alone > 8 * 4 * count_parameters(model.config)["mamba"]
    monkeypatch.setattr(G, "ROWS", {"cpu": 2})
    found = generate(model, ours_tokenizer, PROMPTS, 9, speed=speed)
    assert (speed.rows, speed.prompt_tokens) == (7, 3 + sum(map(len, PROMPTS)))
    assert speed.tokens == len(c.ids) + sum(len(c.ids) for c in found) and speed.steps == 8 + 3 * 8
    rows = sorted(map(len, PROMPTS))  # two at a time, the shortest first
    pairs = [step_bytes(model.config, [n + i for n in rows[j : j + 2]], 4, 4) for j in (0, 2, 4) for i in range(8)]
    assert speed.moved == alone + sum(pairs)
    assert 0 < speed.prefill_seconds + speed.step_seconds < time.perf_counter() - began


def test_speed_knows_that_int8_weights_are_smaller(ours_tokenizer):
    small = ours(vocab_size=ours_tokenizer.vocab_size, seed=3)
    small.backbone.register_buffer("packed", torch.zeros(1, dtype=torch.int8))
    speed = G.Speed()
    generate(small, ours_tokenizer, PROMPTS[:1], 2, speed=speed)
    assert speed.moved == step_bytes(small.config, [3], 4, 4, int8=True) < step_bytes(small.config, [3], 4, 4)


def test_speed_in_words():
    speed = G.Speed(2, 1024, 0.2, 482, 240, 3.9, 10**11)
    assert str(speed) == (
        "482 tokens in 4.1 s: prefill 1,024 tokens 0.20 s; 240 steps of 16.2 ms, 123 tokens/s, 25.64 GB/s moved"
    )
    assert str(G.Speed(1, 7, 0.5, 1)) == "1 tokens in 0.5 s: prefill 7 tokens 0.50 s"


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


def test_every_token_is_drawn_with_its_own_number(model, ours_tokenizer, monkeypatch):
    """The row's, at the row's own step, though rows enter at different times."""
    drawn, real = [], G.sample
    monkeypatch.setattr(G, "sample", lambda logits, t, p, u: (drawn.extend(u.tolist()), real(logits, t, p, u))[1])
    monkeypatch.setattr(G, "ROWS", {"cpu": 2})
    found = generate(model, ours_tokenizer, PROMPTS, 9, temperature=1.0, seed=4)
    numbers = G.row_uniforms(PROMPTS, 9, 4)
    assert sorted(drawn) == sorted(n for row, c in zip(numbers.tolist(), found) for n in row[: len(c.ids)])


def test_who_has_ended_leaves_an_empty_slot(model, ours_tokenizer, monkeypatch):
    eos = generate(model, ours_tokenizer, PROMPTS[:1], 25)[0].ids[3]
    monkeypatch.setattr(ours_tokenizer, "eos_id", eos)
    monkeypatch.setattr(G, "SHRINK", 0.0)
    lengths, step = [], engine.Engine.step
    monkeypatch.setattr(
        engine.Engine, "step", lambda self, ids: (lengths.append(list(self.lengths)), step(self, ids))[1]
    )
    ends = [len(c.ids) for c in generate(model, ours_tokenizer, PROMPTS, 25)]
    assert min(ends) < 10 and max(ends) == 25
    expected = sorted((len(p), n) for p, n in zip(PROMPTS, ends))
    for i, found in enumerate(lengths):  # before step i every row has said i + 1 tokens, if it has not ended with fewer
        assert sorted(found) == sorted(n + i if said > i + 1 else 0 for n, said in expected)


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
        assert t.decode(on).endswith("User\nHi\n<SPECIAL_11>Assistant\n<think>\n") and opens_thought(t, on)
        assert t.decode(off).endswith("User\nHi\n<SPECIAL_11>Assistant\n<think></think>") and not opens_thought(t, off)
    earlier = [{"role": "user", "content": "a /think"}, {"role": "assistant", "content": "t</think>b"}, *user]
    assert not opens_thought(t, G.chat_prompt(t, earlier, thinking=False))
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
    assert G.main([*flags, "--device", "cpu"]) == 0
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
        (c,) = Scripted(t, [[id_of(t, bytes([b])) for b in text.encode()]]).run(on_token=Printer())
        shown = capsys.readouterr().out
        thought, _, answer = shown.removeprefix("[thought]\n").partition("[answer]\n")
        assert (thought.strip(), answer.strip()) == (c.thought, c.answer), text
    # a close that finishes a begun tag: the begun part is not shown
    fake = Scripted(t, [plain(t, "aaa</thi")], after_tag=plain(t, "46"))
    fake.run(on_token=Printer(), thinking_budget=7, budget_rule="nim")
    assert capsys.readouterr().out == "[thought]\naaa\n[answer]\n46"


@pytest.mark.parametrize("name", ["ours_tokenizer", "released_like"])
def test_a_response_is_shown_token_by_token(name, request, capsys):
    """Each token's own text, at once; of a character or a tag in several tokens nothing before the last."""
    t = request.getfixturevalue(name)
    pieces = [  # (what is said, what is then seen), token by token
        *[
            (b"4", "[thought]\n4"),
            (b" ", ""),
            (b"\xe2", ""),
            (b"\x82", ""),
            (b"\xac", " \u20ac"),
            (b"<", ""),
            (b"5", "<5"),
        ],
        *[(b"\xf0", ""), (b"\x9f", ""), (b"\x98", ""), (b"\x80", "\U0001f600"), (b"\xff", "\ufffd"), (b"\n", "")],
        *(
            [(b"</", ""), (b"thin", ""), (b"k", ""), (b">\n", "")]
            if name == "released_like"
            else [(None, ""), (b"\n", "")]
        ),
        *[(b"\xc3", ""), (b"\xbc", "\n[answer]\n\u00fc"), (b"<", "<"), (b"/", "/"), (b"\xc3", "")],
    ]
    printer, seen = Printer(), []

    def show(row, token, state):
        printer(row, token, state)
        seen.append(capsys.readouterr().out)

    wish = [t.end_think_id if piece is None else id_of(t, piece) for piece, _ in pieces]
    (c,) = Scripted(t, [wish]).run(on_token=show)
    assert seen == [shown for _, shown in pieces] + [""]  # and nothing at the end of turn
    assert "".join(seen) == f"[thought]\n{c.thought}\n[answer]\n{c.answer}"


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
        options["speed"].tokens += 9
        return [Completion("", f"thought {n}", f"answer {n}", 5, 3, "model", [20] * 9)]

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


def test_a_budget_given_later_makes_room_for_the_answer(folder, monkeypatch):
    rooms = []

    def reply(model, tokenizer, ids, max_new_tokens, **options):
        rooms.append(max_new_tokens)
        return [Completion("", "", "answer", 0, 3, "none", [20] * 9)]

    monkeypatch.setattr(G, "generate", reply)
    lines = ["one", "/think", "/budget 1000", "two", "/quit"]
    assert chat(monkeypatch, lines, "--checkpoint", folder, "--no-think") == 0
    assert rooms == [512, 1756]


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


def test_rows_at_once_follow_the_memory(monkeypatch):
    """The 9B in bfloat16 beside its weights: a row takes its cache and what choosing a token takes, a prefill its work
    and a cache of prompts that are read together."""
    head = SimpleNamespace(weight=torch.empty(1, dtype=torch.bfloat16, device="meta"))
    model = SimpleNamespace(lm_head=head, impl="triton", buffers=list, config=PRESETS["nano-9b"])
    monkeypatch.setattr(G, "PREFILL", {"cpu": 4096})
    monkeypatch.setattr(G, "ROWS", {"cpu": 512})
    free = lambda bytes_: lambda device: bytes_
    weights, less = weights_bytes(model.config), 2 * work_bytes(model.config, 256)
    for tokens in (552, 131072):
        work = 2 * work_bytes(model.config, 4096)
        each = row_bytes(model.config, tokens) + 60 * 131072
        for rows in (1, 7):
            monkeypatch.setattr(G, "free_bytes", free(weights + work + rows * each + 1))
            assert G._rows_at_once(model, tokens) == (rows, 4096)
        monkeypatch.setattr(G, "free_bytes", free(weights + less + each))
        assert G._rows_at_once(model, tokens)[1] == 256  # smaller pieces before nothing
    monkeypatch.setattr(G, "free_bytes", free(2**50))
    assert G._rows_at_once(model, 552) == (512, 4096)
