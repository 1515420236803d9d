"""The tokenizer against Hugging Face's: same merges, same ids; and nothing a user types becomes control."""

import argparse
import ast
import inspect
import json
import os
import random
import textwrap
import typing

import pytest

import tokenizer as T
from template import render_chat
from tokenizer import SPECIALS, Tokenizer, train_bpe

# What the released vocabulary splits by (the Tekken pattern): case-aware words, digits alone, newline runs.
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RESERVED = {"<unk>": 0, "<s>": 1, "</s>": 2, "[INST]": 3}  # then <SPECIAL_4>, <SPECIAL_5>, ...

UGLY = [
    "",
    " ",
    "\n",
    "\n\n\n",
    "a\n",
    "a\r\nb\rc\r\n\r\n",
    " \n \n\t\n",
    "    def f(x):\n        return x  # ok\n\n\n",
    "\t\ttabs\tand  two   three    blanks ",
    "314159265358979 + 007 = 1e-10, 3.14; ½ ² Ⅷ ٣٤",
    "don't WON'T HTMLParser camelCaseWord snake_case_word __init__",
    "naïve café e\u0301 Ångström Straße ǅ ŉ",
    "日本語のテキスト。中文文本，한국어 텍스트",
    "العربية עברית हिन्दी ไทย",
    "emoji 😀👩‍👩‍👧‍👦🇩🇪 and\u00a0no-break\u2003em\u2028line\u0085nel\u200bzero",
    "<SPECIAL_12>\n<SPECIAL_11>Assistant\n<think></think><s></s><unk>",
    "\x00\x01\x1c\x1f\x7f control bytes \ufffd\ufeff \U0010ffff",
    "$\\frac{a}{b} \\le \\sum_{i=0}^{n} x_i^{2}$ !!!??? ...---***/// //\n/",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "x" * 3000 + " " * 3000 + "=" * 3000,
]


def docstrings(*modules):
    out = []
    for module in modules:
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                out.append(ast.get_docstring(node) or "")
    return [text for text in out if text]


TRAIN = docstrings(argparse, inspect, typing, textwrap) + [inspect.getsource(argparse)]
HELD_OUT = docstrings(random, ast, json) + [inspect.getsource(textwrap)]
USER = {"role": "user", "content": "Hi"}


def said(role, content, **more):
    return {"role": role, "content": content} | more


@pytest.fixture(scope="module")
def tok():
    return train_bpe(TRAIN, 700)


def hf_train(pattern, specials, vocab_size, texts=TRAIN):
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HF

    hf = HF(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    hf.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])
    hf.decoder = decoders.ByteLevel()
    hf.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(specials),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return hf


def reserved(n):
    return list(RESERVED) + [f"<SPECIAL_{i}>" for i in range(len(RESERVED), n)]


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A file like the released one: Tekken pattern, reserved specials, an `<s>` post-processor; and its library."""
    from tokenizers import processors

    hf = hf_train(TEKKEN, reserved(24), 900)
    hf.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    path = tmp_path_factory.mktemp("released") / "tokenizer.json"
    hf.save(str(path))
    hf.encode_special_tokens = True  # the library's name for "specials in the text are text"
    return hf, path


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("vocab_size", [272, 273, 300, 1500])
def test_merges_are_those_of_the_library(vocab_size):
    ours, hf = train_bpe(TRAIN, vocab_size), hf_train(T.PATTERN, SPECIALS, vocab_size)
    theirs = sorted(hf.get_vocab().items(), key=lambda kv: kv[1])[272:]
    mine = ["".join(map(T.BYTE_TO_CHAR.get, token)) for token, i in ours.ranks.items() if i >= 272]
    assert mine == [text for text, _ in theirs]  # the same merges, ties included, in the same order
    assert ours.vocab_size == vocab_size


def test_ids_are_those_of_the_library_on_held_out_text():
    ours, hf = train_bpe(TRAIN, 1200), hf_train(T.PATTERN, SPECIALS, 1200)
    hf.encode_special_tokens = True
    for text in HELD_OUT + UGLY:
        spelled = ["".join(map(T.BYTE_TO_CHAR.get, ours.decode_bytes([i]))) for i in ours.encode(text)]
        assert spelled == hf.encode(text, add_special_tokens=False).tokens, text


def test_merges_by_hand():
    """ "abab" three times: (a, b) occurs 6 times, then (ab, ab) 3 times."""
    tok = train_bpe(["abab abab abab"], 272 + 2)
    assert [t for t, i in tok.ranks.items() if i >= 272] == [b"ab", b"abab"]
    assert tok.encode("abab") == [273] and tok.encode("aba") == [272, 16 + ord("a")]


def test_a_pair_that_is_its_own_neighbour():
    hf = hf_train(T.PATTERN, SPECIALS, 287, ["aaaa aaaaaaa aaa b aa", "aaaaa ababab aaaaaaaaa abaaba"])
    ours = train_bpe(["aaaa aaaaaaa aaa b aa", "aaaaa ababab aaaaaaaaa abaaba"], 287)
    theirs = [text for text, _ in sorted(hf.get_vocab().items(), key=lambda kv: kv[1])[272:]]
    assert ["".join(map(T.BYTE_TO_CHAR.get, t)) for t, i in ours.ranks.items() if i >= 272] == theirs


def test_training_does_not_depend_on_the_order_of_the_texts(tok):
    assert train_bpe(reversed(TRAIN), 700).ranks == tok.ranks
    assert train_bpe(iter(TRAIN), 700).ranks == tok.ranks


@pytest.mark.parametrize(
    "texts, size, words",
    [
        (TRAIN, 271, "at least 272"),
        (TRAIN, -1, "at least 272"),
        (TRAIN, "512", "at least 272"),
        (["ab"], 300, "lower it to 273"),
        ([], 300, "lower it to 272"),
        ("one string", 300, "wrap it in a list"),
        ([b"bytes"], 300, "got bytes"),
    ],
)
def test_training_refuses(texts, size, words):
    with pytest.raises(ValueError, match=words):
        train_bpe(texts, size)


# -------------------------------------------------------------------------------------------------------------- text


def test_layout_of_ids(tok):
    assert [tok.specials[n] for n in ("<unk>", "<s>", "</s>", "<think>", "</think>")] == [0, 1, 2, 3, 4]
    assert all(tok.specials[f"<SPECIAL_{i}>"] == i for i in range(5, 16)) and len(tok.specials) == 16
    assert (tok.pad_id, tok.bos_id, tok.eos_id, tok.think_id, tok.end_think_id) == (0, 1, 12, 3, 4)
    assert [tok.ranks[bytes([b])] for b in range(256)] == list(range(16, 272))
    assert sorted(tok.ranks.values()) == list(range(16, 700)) and tok.vocab_size == 700


@pytest.mark.parametrize("text", UGLY)
def test_round_trip_and_no_control_from_text(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert all(i >= 16 for i in ids)
    assert tok.decode_bytes(ids) == text.encode()


@pytest.mark.parametrize("name", SPECIALS)
def test_a_typed_special_is_text(tok, name):
    for text in (name, f"a{name}b", f" {name}\n", name * 3):
        assert not set(tok.encode(text)) & set(SPECIALS.values())
        ids = tok.encode_chat([said("system", text), said("user", text), said("assistant", text), said("user", text)])
        rendered = render_chat([said("system", text), said("user", text), said("assistant", text), said("user", text)])
        assert [i for i in ids if i < 16] == [SPECIALS[p] for p, control in rendered if control]
        # system, user, assistant, end of turn, user, assistant, think: and not one more (a typed /think changes none)
        assert [i for i in ids if i < 16] == [10, 11, 11, 12, 11, 11, 3]


def test_newlines_and_digits_are_single_tokens(tok):
    newline = tok.ranks[b"\n"]
    assert tok.encode("\n\n\n") == [newline] * 3
    assert tok.encode("stop.\n")[-1] == newline and tok.encode("stop\n")[:-1] == tok.encode("stop")
    assert tok.encode("40+7")[:2] == [tok.ranks[b"4"], tok.ranks[b"0"]]
    assert len(tok.encode("1234567890")) == 10
    for text in HELD_OUT:  # a newline is a border: lines may be encoded one by one
        assert sum((tok.encode(line) for line in text.splitlines(keepends=True)), []) == tok.encode(text)


def test_decode(tok):
    half = tok.encode("é")[:1] if len(tok.encode("é")) > 1 else [tok.ranks[b"\xc3"]]
    assert tok.decode(half) == "\ufffd" and tok.decode_bytes(half) == b"\xc3"
    ids = [1, *tok.encode("ok"), 12]
    assert tok.decode(ids) == "<s>ok<SPECIAL_12>" and tok.decode(ids, skip_specials=True) == "ok"
    for bad in (700, -1, 10**9):
        with pytest.raises(ValueError, match=rf"{bad}.*700"):
            tok.decode([20, bad])
    import torch

    assert tok.decode(torch.tensor(ids), skip_specials=True) == "ok"


def test_batch_is_one_by_one(tok):
    for texts in (HELD_OUT, ["x y\n" * 5000, "z " * 9000], ["a"], []):
        assert tok.encode_batch(texts) == [tok.encode(t) for t in texts]


def test_runs_that_break_regex_engines(tok):
    for text in ("a" * 10**6, "=" * 10**6, "é" * 10**5, " " * 400_000):
        assert tok.decode(tok.encode(text)) == text
    for call in (tok.encode, lambda t: tok.encode_batch([t, t])):
        with pytest.raises(ValueError, match="blanks in a row"):
            call("a" + " " * 1_500_000 + "b")
        with pytest.raises(ValueError, match="got NoneType"):
            call(None)


# -------------------------------------------------------------------------------------------------------------- chat


@pytest.fixture(scope="module")
def in_transformers(tok, tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("ours")
    tok.save(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_chat_ids_as_in_transformers_when_nobody_types_control(tok, in_transformers):
    chat = [
        said("system", "Be 12% brief\n\n  now"),
        said("user", "What is 40 + 2?\n日本"),
        said("assistant", "42"),
        USER,
    ]
    for options in ({}, {"add_generation_prompt": False}):
        flags = {"add_generation_prompt": True} | options
        theirs = in_transformers.apply_chat_template(chat, tokenize=True, return_dict=True, **flags)["input_ids"]
        assert tok.encode_chat(chat, **options) == theirs


# ---------------------------------------------------------------------------------------------------------- examples


def test_example_is_the_chat_then_the_response(tok):
    prompt = tok.encode_chat([said("system", "Be brief."), said("user", "2+2?")])
    ids, mask = tok.encode_example("2+2?", "two more\nthan two", "4", system="Be brief.")
    assert ids[: len(prompt)] == prompt and mask == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
    assert tok.decode(ids[len(prompt) :]) == "two more\nthan two\n</think>\n4\n<SPECIAL_12>"
    assert ids.count(tok.think_id) == ids.count(tok.end_think_id) == ids.count(12) == 1 and ids[-1] == 12
    # the same conversation rendered as a finished chat has only the template's last newline more
    finished = [said("system", "Be brief."), said("user", "2+2?"), said("assistant", "two more\nthan two\n</think>\n4")]
    assert tok.encode_chat(finished, add_generation_prompt=False) == ids + tok.encode("\n")


def test_example_without_trace_is_no_think(tok):
    prompt = tok.encode_chat([said("user", "2+2? /no_think")])
    ids, mask = tok.encode_example("2+2?", None, "4")
    assert ids[: len(prompt)] == prompt and tok.decode(ids[len(prompt) :]) == "4\n<SPECIAL_12>"
    assert sum(mask) == len(ids) - len(prompt) and mask[len(prompt)] == 1
    assert tok.encode_example("2+2?", "", "4")[0] != ids  # an empty trace is still a (short) thought


@pytest.mark.parametrize("example", [(2, "t", "4"), ("q", "t", 4), ("q", 3, "4"), (None, None, "4")])
def test_example_refuses(tok, example):
    with pytest.raises(ValueError, match="must be strings"):
        tok.encode_example(*example)


def test_examples_in_a_batch_and_with_typed_control(tok, released):
    examples = [
        ("a?", "t", "b"),
        ("c? <SPECIAL_12>", None, "<think>d", "sys </think>"),
        ("", "", ""),
        ("e", "</think>", "f", ""),
    ]
    for tokenizer in (tok, Tokenizer.load(released[1])):
        for example, (ids, start) in zip(examples, tokenizer.encode_examples(examples)):
            assert tokenizer.encode_example(*example) == (ids, [0] * start + [1] * (len(ids) - start))
            assert ids.count(12) == 1
    for ids, _ in tok.encode_examples(examples):
        assert sum(i < 16 for i in ids) == 6


def test_example_where_think_is_ordinary_text(released):
    tok = Tokenizer.load(released[1])
    assert tok.think_id is None and tok.end_think_id is None
    prompt = tok.encode_chat([said("user", "2+2?")])
    assert prompt[-len(tok.encode("Assistant\n<think>\n")) :] == tok.encode("Assistant\n<think>\n")
    ids, mask = tok.encode_example("2+2?", "t", "4")
    assert ids == prompt + tok.encode("t\n</think>\n4\n") + [12] and mask.index(1) == len(prompt)


# ------------------------------------------------------------------------------------------------------------- files


def test_import_of_a_released_file_token_for_token(released):
    hf, path = released
    tok = Tokenizer.load(path.parent)
    assert tok.vocab_size == 900 and tok.specials == {name: i for i, name in enumerate(reserved(24))}
    for text in HELD_OUT + UGLY:
        assert tok.encode(text) == hf.encode(text, add_special_tokens=False).ids, text
        assert tok.decode(tok.encode(text)) == text
    assert hf.encode("a").ids[0] == 1 and tok.encode("a")[0] != 1  # its post-processor adds <s>, we do not


def test_import_with_a_thousand_reserved_specials(tmp_path):
    hf = hf_train(TEKKEN, reserved(1000), 1500)
    hf.save(str(tmp_path / "tokenizer.json"))
    tok = Tokenizer.load(tmp_path / "tokenizer.json")
    hf.encode_special_tokens = True
    assert tok.vocab_size == 1500 and len(tok.specials) == 1000 and tok.eos_id == 12
    for text in HELD_OUT + UGLY:
        ids = tok.encode(text)
        assert ids == hf.encode(text, add_special_tokens=False).ids and all(i >= 1000 for i in ids)


def test_import_of_merges_as_strings_and_in_another_order_than_ids(released, tmp_path):
    hf, path = released
    data = json.loads(path.read_text())
    plain = Tokenizer.load(path)
    data["model"]["merges"] = [" ".join(m) for m in data["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert Tokenizer.load(tmp_path).ranks == plain.ranks

    # shuffle the ids of the merged tokens: the order of the merges must still decide
    ids = list(range(280, 900))
    random.Random(1).shuffle(ids)
    to = {i: i for i in range(280)} | dict(zip(range(280, 900), ids))
    data["model"]["vocab"] = {text: to[i] for text, i in data["model"]["vocab"].items()}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    shuffled = Tokenizer.load(tmp_path)
    shuffled.save(tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    for text in HELD_OUT + UGLY:
        expected = [to[i] for i in plain.encode(text)]
        assert shuffled.encode(text) == again.encode(text) == expected
        assert shuffled.decode(expected) == text
    assert shuffled.encode_batch(["ab c " * 4000] * 2) == [shuffled.encode("ab c " * 4000)] * 2


def test_what_we_save_opens_in_transformers(tok, in_transformers):
    assert (in_transformers.bos_token_id, in_transformers.eos_token_id, in_transformers.pad_token_id) == (1, 12, 0)
    assert len(in_transformers) == tok.vocab_size
    for text in HELD_OUT + [text for text in UGLY if "<SPECIAL" not in text]:
        ids = tok.encode(text)
        assert in_transformers.encode(text, add_special_tokens=False) == ids
        assert in_transformers.encode(text) == ids  # and nothing is added by default either
        assert in_transformers.decode(ids) == text
    assert in_transformers.encode("<think>\n<SPECIAL_12>") == [3, tok.ranks[b"\n"], 12]  # specials are known there


def test_save_and_load_again(tok, released, tmp_path):
    for i, one in enumerate([tok, Tokenizer.load(released[1])]):
        one.save(tmp_path / "deep" / str(i))
        one.save(tmp_path / "deep" / str(i))  # over itself
        assert sorted(os.listdir(tmp_path / "deep" / str(i))) == ["tokenizer.json", "tokenizer_config.json"]
        two = Tokenizer.load(tmp_path / "deep" / str(i))
        assert (two.ranks, two.specials, two.pattern) == (one.ranks, one.specials, one.pattern)
        assert all(one.encode(t) == two.encode(t) for t in HELD_OUT + UGLY)


def test_a_folders_own_chat_template_is_kept(tok, tmp_path):
    tok.save(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "its own"}))
    Tokenizer.load(tmp_path / "a").save(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())["chat_template"] == "its own"


def test_a_failed_save_leaves_the_old_file(tok, tmp_path, monkeypatch):
    tok.save(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="cannot write .*No space left"):
        train_bpe(TRAIN, 300).save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["tokenizer.json", "tokenizer_config.json"]
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        tok.save(tmp_path / "file")


def change(data, *keys, to):
    *path, last = keys
    for key in path:
        data = data[key]
    if to is None:
        del data[last]
    else:
        data[last] = to


SPLIT = ("pre_tokenizer", "pretokenizers", 0)
BROKEN = {
    "Unigram": (lambda d: change(d, "model", "type", to="Unigram"), "holds a Unigram"),
    "WordPiece": (lambda d: change(d, "model", "type", to="WordPiece"), "holds a WordPiece"),
    "byte_fallback": (lambda d: change(d, "model", "byte_fallback", to=True), "byte_fallback"),
    "normalizer": (lambda d: change(d, "normalizer", to={"type": "NFC"}), "normalizer"),
    "no model": (lambda d: change(d, "model", to=None), "not a complete tokenizer.json"),
    "no vocab": (lambda d: change(d, "model", "vocab", to=None), "not a complete"),
    "vocab a list": (lambda d: change(d, "model", "vocab", to=[["a", 1]]), "."),
    "no merges": (lambda d: change(d, "model", "merges", to=[]), "merges cut short"),
    "merges cut": (lambda d: change(d, "model", "merges", to=d["model"]["merges"][:50]), "merges cut short"),
    "a strange merge": (lambda d: d["model"]["merges"].append(["zq", "qz"]), "does not join"),
    "a merge of three": (lambda d: d["model"]["merges"].append("a b c"), "does not join"),
    "no byte": (lambda d: d["model"]["vocab"].pop("Ā"), "of the 256 single bytes|does not join"),
    "not byte-level": (lambda d: d["model"]["vocab"].update({"▁": 900}), "not byte-level"),
    "id twice": (lambda d: d["model"]["vocab"].update({"Ā": 30, "!": 30}), "not distinct"),
    "negative id": (lambda d: d["model"]["vocab"].update({"Ā": -3}), "not distinct|from 0 up"),
    "id a string": (lambda d: d["model"]["vocab"].update({"Ā": "x"}), "."),
    "special with two ids": (lambda d: change(d, "added_tokens", 0, "id", to=5), "two ids"),
    "no pre_tokenizer": (lambda d: change(d, "pre_tokenizer", to={}), "only a Split"),
    "GPT-2 pre_tokenizer": (lambda d: change(d, "pre_tokenizer", to={"type": "ByteLevel"}), "only a Split"),
    "prefix space": (lambda d: d["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "only a Split"),
    "split removed": (lambda d: change(d, *SPLIT, "behavior", to="Removed"), "Isolated"),
    "split by a string": (lambda d: change(d, *SPLIT, "pattern", to={"String": " "}), "Isolated"),
    "bad regex": (lambda d: change(d, *SPLIT, "pattern", to={"Regex": "(["}), "regular expression"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_load_refuses(name, released, tmp_path):
    damage, words = BROKEN[name]
    data = json.loads(released[1].read_text())
    damage(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=words) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[]", "list, not an obj"),
    ],
)
def test_load_refuses_damaged_files(content, words, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="cannot read"):
        Tokenizer.load(tmp_path / "nowhere")


def test_constructor_refuses(tok):
    with pytest.raises(ValueError, match="1 of the 256 single bytes .*first: 65"):
        Tokenizer({k: v for k, v in tok.ranks.items() if k != b"A"}, SPECIALS, T.PATTERN)
    with pytest.raises(ValueError, match="not distinct"):
        Tokenizer(tok.ranks, {"<x>": 20}, T.PATTERN)
    bare = Tokenizer(tok.ranks, {}, T.PATTERN)
    assert bare.eos_id is None and bare.encode("ab") == tok.encode("ab")
    with pytest.raises(ValueError, match="needs the token <SPECIAL_10>"):
        bare.encode_chat([USER])
    with pytest.raises(ValueError, match="id 3 is not in"):
        bare.decode([3])  # a gap in the ids
