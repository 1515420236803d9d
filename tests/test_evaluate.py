"""Evaluation: what is asked, what counts as right, bits per byte against closed forms, and the script."""

import json
import math
import re

import pytest
import torch
from scripted import ours_vocabulary

import evaluate
import tasks
from budget import Completion
from checkpoint import save_pretrained
from evaluate import accuracy, bits_per_byte, format_table, token_bytes
from model import ModelConfig, build

FAMILIES = ["add", "sort", "needle"]


@pytest.fixture(scope="module")
def tokenizer():
    return ours_vocabulary()


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=16, hybrid_override_pattern="M*-", vocab_size=tokenizer.vocab_size + 3,
                         mamba_num_heads=2, mamba_head_dim=8, ssm_state_size=8, chunk_size=8, num_attention_heads=2,
                         head_dim=8, intermediate_size=24)  # fmt: skip
    return build(config)


def solve(question):
    """Trace and answer of a question, found by drawing from the test side of the split until it comes up."""
    return solve.known[question]


solve.known = {}


@pytest.fixture
def scripted(monkeypatch, tokenizer):
    """`generate` replaced by one that knows every answer; `spoil(sample)` decides what it says instead. Returns
    (questions asked, list of batch sizes)."""
    asked, sizes, real = [], [], tasks.sample

    def remember(name, level, rng, split="train"):
        s = real(name, level, rng, split)
        solve.known[s.question] = s
        return s

    def install(spoil=lambda s: (s.trace, s.answer)):
        def generate(model, tok, prompts, max_new_tokens, temperature):
            sizes.append(len(prompts))
            out = []
            for prompt in prompts:
                text = tok.decode(prompt)
                s = solve(re.search(r"User\n(.*)\n<SPECIAL_11>", text, re.S).group(1))
                asked.append(s)
                assert max_new_tokens >= len(tok.encode(f"{s.trace}\n</think>\n{s.answer}\n")) - 8  # tag: one token
                assert temperature == 0
                trace, answer = spoil(s)
                out.append(Completion("", trace, answer, 1, 1, "model", []))
            return out

        monkeypatch.setattr(tasks, "sample", remember)
        monkeypatch.setattr(evaluate, "generate", generate)
        return asked, sizes

    return install


def test_one_who_knows_gets_everything_and_only_test_questions_are_asked(scripted, model, tokenizer):
    asked, sizes = scripted()
    table = accuracy(model, tokenizer, count=3, batch_size=7)
    assert list(table) == list(tasks.FAMILIES)
    assert len(asked) == 3 * sum(len(f.train_levels + f.beyond) for f in tasks.FAMILIES.values()) == sum(sizes)
    assert set(sizes[:-1]) == {7}
    assert all(tasks.split_of(s.family, s.question) == "test" for s in asked)
    for name, levels in table.items():
        assert list(levels) == list(tasks.FAMILIES[name].train_levels + tasks.FAMILIES[name].beyond)
        assert all(cell == {"exact": 1.0, "answer": 1.0, "count": 3} for cell in map(rounded, levels.values()))


def rounded(cell):
    return {k: round(v, 9) for k, v in cell.items()}


def test_trace_and_answer_are_told_apart(scripted, model, tokenizer):
    wrong = {"add": lambda s: (s.trace, s.answer + "1"), "sort": lambda s: (s.trace[:-1], s.answer)}
    wrong["needle"] = lambda s: ("", "") if s.level == 2 else (f" {s.trace}\n", f" {s.answer} ")
    scripted(lambda s: wrong[s.family](s))
    table = accuracy(model, tokenizer, FAMILIES, levels=(1, 2), count=4)
    got = {name: [(c["exact"], c["answer"]) for c in levels.values()] for name, levels in table.items()}
    assert got == {"add": [(0, 0)] * 2, "sort": [(0, 1)] * 2, "needle": [(1, 1), (0, 0)]}


def test_shares_are_shares(scripted, model, tokenizer):
    seen = []
    scripted(lambda s: (s.trace, s.answer if seen.append(s) or len(seen) % 4 else "no"))
    cell = accuracy(model, tokenizer, ["add"], (1,), count=12)["add"][1]
    assert cell["exact"] == pytest.approx(9 / 12) == cell["answer"]


def test_the_seed_decides_what_is_asked(scripted, model, tokenizer):
    asked, _ = scripted()
    runs = []
    for seed, families in [(0, FAMILIES), (0, FAMILIES[::-1]), (1, FAMILIES)]:
        del asked[:]
        accuracy(model, tokenizer, families, (1,), count=5, seed=seed)
        runs.append({s.question for s in asked})
    assert runs[0] == runs[1] and not runs[0] & runs[2] and len(runs[0]) == 15


def test_a_real_model_is_asked_too(model, tokenizer):
    table = accuracy(model, tokenizer, ["add"], (1,), count=2)
    assert table == {"add": {1: {"exact": 0.0, "answer": 0.0, "count": 2}}}


def test_unknown_families_are_an_error(model, tokenizer):
    with pytest.raises(ValueError, match="unknown task family 'chess': choose one of add"):
        accuracy(model, tokenizer, ["chess"], count=1)


# ----------------------------------------------------------------------------------------------------------------------
# Bits per byte

TEXT = "one step a line, two steps: 12 + 34 = 46, so the answer is 46.\n" * 40 + "Ünïcödé – nötig.\n" * 20


def test_a_uniform_model_needs_the_logarithm_of_its_vocabulary(model, tokenizer):
    """All logits 0: every token costs log2(vocab) bits, its bytes count, the first of each row is given."""
    length, state = 23, {k: v.clone() for k, v in model.state_dict().items()}
    torch.nn.init.zeros_(model.lm_head.weight)
    try:
        bits = bits_per_byte(model, tokenizer, [TEXT, TEXT[:100]], length)
    finally:
        model.load_state_dict(state)
    ids = tokenizer.encode(TEXT) + tokenizer.encode(TEXT[:100])
    rows = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    targets = [t for row in rows for t in row[1:]]
    size = sum(len(tokenizer.decode_bytes([t])) for t in targets)
    assert bits == pytest.approx(len(targets) * math.log2(model.config.vocab_size) / size, rel=1e-5)


def test_bits_are_the_models_own(model, tokenizer):
    """Against a plain loop over rows and places."""
    length, bits, size = 31, 0.0, 0
    ids = tokenizer.encode(TEXT)
    for i in range(0, len(ids) - length + 1, length):
        row = torch.tensor([ids[i : i + length]])
        p = model(row)[0].log_softmax(-1).double() / math.log(2)
        bits -= sum(p[t - 1, row[0, t]].item() for t in range(1, length))
        size += len(tokenizer.decode_bytes(row[0, 1:].tolist()))
    assert bits_per_byte(model, tokenizer, [TEXT], length, batch_size=3) == pytest.approx(bits / size, rel=1e-5)
    short = bits_per_byte(model, tokenizer, [TEXT], length, max_tokens=length)
    assert short != pytest.approx(bits / size, rel=1e-3)


def test_a_short_text_is_one_row_and_no_text_an_error(model, tokenizer):
    assert bits_per_byte(model, tokenizer, [TEXT[:300]], 512) > 0
    for nothing in ([""], ["x"]):
        with pytest.raises(ValueError, match="at least 2 tokens"):
            bits_per_byte(model, tokenizer, nothing, 64)


def test_token_bytes(tokenizer):
    sizes = token_bytes(tokenizer)
    ids = tokenizer.encode(TEXT)
    assert sizes.shape == (tokenizer.vocab_size,) and sizes[ids].sum() == len(TEXT.encode())
    assert all(sizes[i] == 0 for i in tokenizer.specials.values())


def test_the_table_for_people():
    cell = lambda share: {"exact": share, "answer": 1.0, "count": 8}
    table = {"add": {1: cell(1.0), 2: cell(0.875), 4: cell(0.0)}, "needle": {1: cell(0.5)}}
    head, add, needle = format_table(table).splitlines()
    assert re.fullmatch(r"level +1 +2 +3  \| beyond", head)
    assert re.fullmatch(r"add +reasoning +100% +88%  \| +0%", add) and re.fullmatch(
        r"needle +retrieval +50%  \| ", needle
    )


# ----------------------------------------------------------------------------------------------------------------------
# The script


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    save_pretrained(folder, model, tokenizer)
    return folder


def test_the_script_prints_a_table_or_json(folder, capsys, monkeypatch):
    flags = ["--checkpoint", str(folder), "--device", "cpu", "--count", "1", "--families", "add", "needle"]
    assert evaluate.main([*flags, "--no-text"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and re.search(r"^add +reasoning( +0%){3}  \|( +0%){2}$", out, re.M) and "bits per byte" not in out
    monkeypatch.setattr(evaluate.corpus, "read_text", lambda kind, size: (["train"], [f"{kind} {TEXT}"]))
    assert evaluate.main([*flags, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"checkpoint", "accuracy", "bits_per_byte", "seconds"}
    assert set(result["accuracy"]) == {"add", "needle"} and set(result["bits_per_byte"]) == {"prose", "code"}
    assert 3 < result["bits_per_byte"]["prose"] < 12


def test_the_mean_of_each_kind():
    cell = lambda share: {"exact": share, "answer": 1.0, "count": 4}
    table = {"add": {1: cell(1.0), 2: cell(0.5)}, "sort": {1: cell(0.0)}, "needle": {1: cell(0.25)}}
    assert evaluate.by_kind(table) == {"reasoning": 0.5, "retrieval": 0.25}
