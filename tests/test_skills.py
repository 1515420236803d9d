"""The table of skills: who knows everything gets full marks, one with a single fault loses its own marks only."""

import json
import re
from random import Random

import pytest
from fine_tuned import base_model, speaker, vocabulary

import conversations
import instructions
import preferences
import skills
import tools
from checkpoint import save_pretrained
from generate import chat_prompt

COUNT = 27


@pytest.fixture(scope="module")
def tokenizer():
    return vocabulary()


@pytest.fixture(scope="module")
def references(tokenizer):
    """{prompt text: (skill, thought, answer)} of all that `table` asks, with a thought and without."""
    known = {}

    def learn(skill, messages, trace, answer):
        for thinking in (True, False):
            known[tokenizer.decode(chat_prompt(tokenizer, messages, thinking))] = skill, trace, answer

    for s in skills.questions(COUNT):
        learn("task", [{"role": "user", "content": s.question}], s.trace, s.answer)
    for i in range(COUNT):
        episode = tools.sample(tools.KINDS[i % len(tools.KINDS)], Random(f"0 {i}"), "test")
        for n, turn in enumerate(episode.turns):
            learn("tools", tools.replay(episode, n).messages, turn.trace, turn.text)
        prompt, trace, answer = instructions.sample(Random(f"0 {i}"), 1 + i % 3, "test")
        learn("words", [{"role": "user", "content": prompt.text}], trace, answer)
        e = conversations.SKILLS["long"](Random(f"0 {i}"), "test")
        learn("long", e.messages, e.trace, e.answer)
        rng = Random(f"0 {i}")
        prompt = preferences.draw_prompt(rng, "test")
        best = preferences.best(rng, prompt)
        learn("liked", [{"role": "user", "content": prompt.text}], best, best)
    return known


def knowing(references, change=None, stubborn=False):
    """A speaker of the references; change(skill, trace, answer, thinking) may give other words."""

    def reply(prompt, thinking):
        skill, trace, answer = references[prompt]
        other = change(skill, trace, answer, thinking) if change else None
        return other or (f"{trace}\n</think>\n{answer}\n" if thinking else f"{answer}\n")

    return speaker(reply, stubborn)


def table(monkeypatch, tokenizer, speak):
    monkeypatch.setattr(skills, "generate", speak)
    return skills.table(None, tokenizer, COUNT)


def test_who_knows_everything_gets_full_marks(monkeypatch, tokenizer, references):
    found = table(monkeypatch, tokenizer, knowing(references))
    names = [
        "on",
        "off",
        "obeyed",
        "well formed",
        "tools",
        "chain",
        "restraint",
        "instructions",
        "conditions",
        "recall",
        "liked",
    ]
    assert list(found) == names and set(found.values()) == {1.0}


FAULTS = {  # what is changed: (marks that fall to nothing, by a speaker that ...)
    "thinks aloud when told not to": (
        {"off", "obeyed"}, lambda k, t, a, on: None if on or k != "task" else f"{t}\n</think>\n{a}\n"),
    "adds a line to its answer": (
        {"off", "obeyed"}, lambda k, t, a, on: None if on or k != "task" else f"{a}\nor so\n"),
    "closes its thought twice": (
        {"on", "well formed"}, lambda k, t, a, on: f"{t}\n</think>\n</think>\n{a}\n" if on and k == "task" else None),
    "never answers": (
        {"on", "well formed"}, lambda k, t, a, on: f"{t}\n" if on and k == "task" else None),
    "does not end": (
        {"on", "off", "obeyed", "well formed"},
        lambda k, t, a, on: (f"{t}\n</think>\n" * on + "1 " * 400) if k == "task" else None),
    "forgets": (
        {"recall"}, lambda k, t, a, on: f"{t}\n</think>\nno\n" if k == "long" else None),
    "says what nobody asked for": (
        {"liked"}, lambda k, t, a, on: f"{t}\n</think>\nno, no\n" if k == "liked" else None),
    "forgets the full stop": (
        {"liked"}, lambda k, t, a, on: f"{t}\n</think>\n{a[:-1]}\n" if k == "liked" else None),
    "is wrong with a thought": (
        {"on"}, lambda k, t, a, on: f"{t}\n</think>\nno\n" if on and k == "task" else None),
    "calls nothing": (
        {"tools", "chain"}, lambda k, t, a, on: f"{t}\n</think>\ndone\n" if k == "tools" and tools.OPEN in a else None),
    "says nothing of what was asked for": (
        {"instructions", "conditions"}, lambda k, t, a, on: f"{t}\n</think>\n42\n" if k == "words" else None),
    "is right but for the topic": (
        {"instructions"}, lambda k, t, a, on: f"{t}\n</think>\nzebra {a}\n" if k == "words" else None),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_costs_its_own_marks(monkeypatch, tokenizer, references, fault):
    marks, change = FAULTS[fault]
    found = table(monkeypatch, tokenizer, knowing(references, change))
    partly = {"tools"} if fault == "calls nothing" else set()
    partly |= {"conditions"} if "topic" in fault else set()
    partly |= {"liked"} if "stop" in fault else set()
    assert all(found[name] == 0 for name in marks - partly), found
    assert all(0 < found[name] < 1 for name in partly), found
    assert all(value == 1 for name, value in found.items() if name not in marks | partly), found


def test_questions_are_held_out_and_of_all_reasoning_families(tokenizer):
    asked = skills.questions(COUNT)
    assert {s.family for s in asked} == set(skills.REASONING) and {s.level for s in asked} == {1, 2, 3}
    assert all(skills.tasks.split_of(s.family, s.question) == "test" for s in asked)
    assert skills.questions(5) == asked[:5] != skills.questions(5, seed=1)


def test_the_curve_of_one_that_answers_when_cut_and_of_one_that_goes_on(monkeypatch, tokenizer, references):
    monkeypatch.setattr(skills, "generate", knowing(references))
    good = skills.budget_curve(None, tokenizer, (0, 10, 1000), COUNT)
    monkeypatch.setattr(skills, "generate", knowing(references, stubborn=True))
    bad = skills.budget_curve(None, tokenizer, (0, 10, 1000), COUNT)
    assert [e["budget"] for e in good] == [0, 10, 1000, None]
    assert all(e["well_formed"] == e["accuracy"] == 1 for e in good)
    assert len({round(e["answer_tokens"], 6) for e in good}) == 1
    assert [e["thinking_tokens"] for e in good] == sorted(e["thinking_tokens"] for e in good)
    assert good[0]["thinking_tokens"] == 0 and good[0]["closed"] == 1 and good[2]["closed"] == good[3]["closed"] == 0
    assert bad[0]["well_formed"] == 0 and bad[0]["answer_tokens"] > 3 * good[0]["answer_tokens"]
    assert bad[2:] == good[2:]
    lines = skills.format_curve(good).splitlines()
    assert len(lines) == 5 and re.match(r" +none +100% +100%", lines[-1])


def test_the_plot_is_drawn(monkeypatch, tokenizer, references, tmp_path):
    monkeypatch.setattr(skills, "generate", knowing(references))
    lines = skills.budget_curve(None, tokenizer, (0, 10), 9)
    skills.plot_curves({"one": lines, "two": lines}, tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_the_script_asks_a_real_model(tmp_path, tokenizer, capsys):
    save_pretrained(tmp_path, base_model(), tokenizer)
    flags = ["--checkpoint", str(tmp_path), "--device", "cpu", "--count", "2"]
    assert skills.main([*flags, "--json", "--curve", "--budgets", "0", "4"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["skills"]) == 11 and [e["budget"] for e in result["curve"]] == [0, 4, None]
    assert skills.main(flags) == 0 and "on 0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, says",
    [(["--count", "0"], "--count must be at least 1"), (["--budgets", "-1"], "--budgets at least 0"),
     (["--checkpoint", "nowhere"], "nowhere does not exist"), (["--nope"], "unrecognized"),
     (["--plot", "no/such/x.png"], "there is no folder no/such")],
)  # fmt: skip
def test_bad_flags_are_one_sentence(flags, says, capsys):
    assert skills.main(flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and err.count("\n") == 1
