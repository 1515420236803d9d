"""Data: packing, masks and shares, the same data from any number of workers, and a loader that resumes and splits."""

import json
from itertools import islice
from random import Random

import numpy as np
import pytest

import corpus
import data
import tasks
from data import NOT_LEARNED, TASK, TEXT, Blend, Loader, prepare
from tokenizer import Tokenizer, train_bpe

LENGTH = 256
WORDS = ("every value that is given here must be the sum of all parts in the list, and what is left of it after a "
         "step is kept in the next line of the same row\n")  # fmt: skip


def prose(seed, size):
    rng = Random(seed)
    return " ".join(rng.choice(WORDS.split(" ")) for _ in range(size))


@pytest.fixture(scope="module")
def tokenizer():
    samples = islice(tasks.blend(Random(0)), 1500)
    return train_bpe([f"User\n{s.question}\nAssistant\n{s.trace}\n{s.answer}\n" for s in samples] + [WORDS] * 3, 340)


@pytest.fixture(scope="module")
def texts():
    return {"prose": [prose(i, 90 + 37 * i) for i in range(9)], "code": [prose(-1 - i, 200 + i) for i in range(5)]}


@pytest.fixture(scope="module")
def packed(tokenizer, texts):
    """(ids, doc, kind) of 119 rows, the shares realised and the blend asked for."""
    blend = Blend({"reasoning": 3, "retrieval": 3, "prose": 2, "code": 1})
    flat = {k: data.flatten(tokenizer, v) for k, v in texts.items()}
    arrays, placed = data.pack_shard(tokenizer, blend, flat, 119, LENGTH, "seed")
    return arrays, placed, blend


def documents(ids, doc, kind):
    """(ids, kind) of every document in every row."""
    for row in range(len(ids)):
        for number in range(doc[row].max() + 1):
            here = doc[row] == number
            yield ids[row][here].tolist(), kind[row][here].tolist()


def question_of(text):
    return text.partition("User\n")[2].partition("\n<SPECIAL_11>")[0]


# ----------------------------------------------------------------------------------------------------------------------
# Packing


def test_rows_are_full_and_documents_are_numbered_in_order(packed, tokenizer):
    (ids, doc, kind), placed, _ = packed
    assert ids.shape == doc.shape == kind.shape == (119, LENGTH)
    assert (ids.dtype, doc.dtype, kind.dtype) == (np.uint16, np.int16, np.uint8)
    assert ids.max() < tokenizer.vocab_size and sum(placed.values()) == ids.size
    for row in doc:
        steps = np.diff(row)
        assert row[0] == 0 and set(steps.tolist()) <= {0, 1}  # no padding, and never back to an earlier document
        assert row[-1] >= 1


def test_tasks_are_whole_and_only_the_response_is_learned(packed, tokenizer):
    (ids, doc, kind), _, _ = packed
    found = 0
    for tokens, marks in documents(ids, doc, kind):
        if TASK not in marks:
            continue
        found += 1
        text = tokenizer.decode(tokens)
        question = question_of(text)
        begin = text.index("<think>\n") + len("<think>\n")
        trace, _, answer = text[begin:].partition("\n</think>\n")
        answer, end = answer.split("\n")
        assert (
            tokens[0] == tokenizer.specials["<SPECIAL_10>"] and tokens[-1] == tokenizer.eos_id and end == "<SPECIAL_12>"
        )
        expected, mask = tokenizer.encode_example(question, trace, answer)
        assert tokens == expected
        assert marks == [TASK * m for m in mask]
    assert found > 60


def test_text_is_learned_except_its_first_token(packed, tokenizer, texts):
    (ids, doc, kind), placed, _ = packed
    originals, sizes = {k: [tokenizer.encode(t) for t in v] for k, v in texts.items()}, []
    haystacks = [" ".join(map(str, t)) for v in originals.values() for t in v]
    for tokens, marks in documents(ids, doc, kind):
        if TEXT not in marks and TASK in marks:
            continue
        assert marks[0] == NOT_LEARNED and set(marks[1:]) <= {TEXT}
        assert any(f" {' '.join(map(str, tokens))} " in f" {h} " for h in haystacks)  # a piece of one document only
        sizes.append(len(tokens))
    assert sum(sizes) == placed["prose"] + placed["code"] and max(sizes) <= LENGTH // 2


def test_the_blend_is_kept(packed):
    _, placed, blend = packed
    total = sum(placed.values())
    for source, share in blend.sources.items():
        assert abs(placed[source] / total - share) < 0.03, source


def test_without_text_the_rest_is_padding(tokenizer):
    (ids, doc, kind), placed = data.pack_shard(tokenizer, Blend({"reasoning": 1}), {}, 9, LENGTH, 4)
    assert set(placed) == {"reasoning"} and placed["reasoning"] == (doc >= 0).sum() < ids.size
    assert not kind[doc < 0].any() and not ids[doc < 0].any()
    assert (doc[:, 0] == 0).all()


def test_family_weights_choose_the_families(tokenizer):
    blend = Blend({"reasoning": 1, "retrieval": 1}, families={"reverse": 1, ("needle", 2): 3})
    arrays, _ = data.pack_shard(tokenizer, blend, {}, 12, LENGTH, 0)
    questions = [question_of(tokenizer.decode(tokens)) for tokens, _ in documents(*arrays)]
    needles = [q for q in questions if q.startswith("Given")]
    assert len(needles) > 5 and all(q.count("=") == 8 and "What is" in q for q in needles)
    assert all(q.startswith("Reverse: ") for q in questions if q not in needles) and len(questions) > len(needles)


def family_of(question):
    """The family whose generator can have asked it, by its wording; those worded alike are all returned."""
    starts = {"From": "modchain", "Reverse": "reverse", "Sort": "sort", "Evaluate": "boolean", "Count": "count"}
    starts["Most common"] = "common"
    for start, name in starts.items():
        if question.startswith(start):
            return [name]
    if question.startswith("Given"):
        if "What are all" in question:
            return ["multivalue"]
        if "What are" in question:
            return ["multiquery"]
        return ["needle"] if "What is" in question else ["vartrack", "lookup2"]
    if "How many" in question:
        return ["word"]
    return [{"+": "add", "-": "subtract", "*": "multiply"}[next(c for c in question if c in "+-*")]]


def test_no_test_question_is_in_the_data(packed, tokenizer):
    (ids, doc, kind), _, _ = packed
    seen = {}
    for tokens, marks in documents(ids, doc, kind):
        if TASK in marks:
            question = question_of(tokenizer.decode(tokens))
            names = family_of(question)
            assert "train" in [tasks.split_of(name, question) for name in names], question
            if len(names) == 1:
                seen[names[0]] = seen.get(names[0], 0) + 1
    assert len(seen) >= 11 and sum(seen.values()) > 60  # with one in 8 a test question, none in 60 is no accident
    rng = Random(3)
    held = [tasks.sample(name, 1, rng, "test") for name in tasks.FAMILIES]
    assert all(tasks.split_of(family_of(s.question)[0], s.question) == "test" for s in held if s.family != "lookup2")


def test_rows_too_short_for_any_task_are_an_error(tokenizer):
    with pytest.raises(ValueError, match="rows of 64 tokens are too short: of 256 tasks the shortest has [0-9]+"):
        data.pack_shard(tokenizer, Blend({"retrieval": 1}, {("needle", 5): 1}), {}, 2, 64, 0)


@pytest.mark.parametrize("sources", [{"poems": 1}, {}, {"prose": 0}, {"prose": -1}, {"prose": float("nan")}])
def test_blends_that_make_no_sense(sources):
    with pytest.raises(ValueError):
        Blend(sources)


# ----------------------------------------------------------------------------------------------------------------------
# Preparing


def read(folder):
    return [np.load(folder / f"{name}.npy") for name in data.ARRAYS]


def settings(tokenizer, all_texts, **changes):
    blend = Blend({"reasoning": 2, "retrieval": 2, "prose": 1})
    known = dict(tokenizer=tokenizer, blend=blend, rows=300, length=LENGTH, texts={"prose": all_texts["prose"]}, seed=5)
    return known | dict(workers=1, say=lambda text: None) | changes


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, texts):
    folder = tmp_path_factory.mktemp("prepared") / "data"
    said = []
    shares = prepare(folder, **settings(tokenizer, texts, say=said.append))
    assert sum(shares.values()) == pytest.approx(1) and abs(shares["prose"] - 0.2) < 0.03
    assert "2/2 shards" in said[-1]
    return folder


def test_the_data_do_not_depend_on_the_number_of_workers(folder, tmp_path, tokenizer, texts):
    prepare(tmp_path / "two", **settings(tokenizer, texts, workers=2))
    for one, two in zip(read(folder), read(tmp_path / "two")):
        np.testing.assert_array_equal(one, two)
    ids = read(folder)[0]
    assert not (ids[:44] == ids[256:]).all()  # shards differ
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(p.name for p in folder.iterdir())
    assert Tokenizer.load(tmp_path / "two").ranks == tokenizer.ranks


def test_prepared_data_are_found_again_and_stale_data_made_anew(tmp_path, tokenizer, texts, monkeypatch):
    made, folder, known = [], tmp_path / "data", settings(tokenizer, texts, rows=5)
    real = data.pack_shard
    monkeypatch.setattr(data, "pack_shard", lambda *a: made.append(a) or real(*a))
    first = prepare(folder, **known)
    assert prepare(folder, **known) == first and len(made) == 1
    other = train_bpe([prose(3, 4000)], 340 - 1)
    same_size = train_bpe([t[::-1] for t in texts["prose"]] * 9, 340)
    changes = [dict(rows=6), dict(length=257), dict(seed=6), dict(blend=Blend({"reasoning": 1, "prose": 2}))]
    changes += [dict(texts={"prose": texts["code"]}), dict(tokenizer=other), dict(tokenizer=same_size)]
    for n, change in enumerate(changes, 2):
        prepare(folder, **known | change)
        assert len(made) == n, change
    np.testing.assert_array_equal(read(folder)[0], real(*made[-1])[0][0])


def test_an_unfinished_folder_is_made_anew_and_other_files_are_left_alone(folder, tmp_path, tokenizer, texts):
    broken = tmp_path / "data"
    broken.mkdir()
    for name in ("ids.npy", "tokenizer.json", "meta.json.tmp"):  # as a kill in the middle leaves it
        (broken / name).write_bytes((folder / name).read_bytes()[:99] if (folder / name).exists() else b"{")
    (broken / "notes.txt").write_text("the user's own")
    prepare(broken, **settings(tokenizer, texts))
    for one, two in zip(read(folder), read(broken)):
        np.testing.assert_array_equal(one, two)
    assert (broken / "notes.txt").read_text() == "the user's own"
    for bad in ("", "[]", "{}", '{"shares": 1'):
        (broken / "meta.json").write_text(bad)
        prepare(broken, **settings(tokenizer, texts, rows=2))
        assert json.loads((broken / "meta.json").read_text())["rows"] == 2


@pytest.mark.parametrize(
    "change,words",
    [
        (dict(rows=0), "at least 1 row"),
        (dict(length=63), "rows of 63"),
        (dict(texts={}), "no such text"),
        (dict(blend=Blend({"code": 1})), "no such text"),
        (dict(rows=10**15), "free some space"),
    ],
)
def test_what_cannot_be_prepared_leaves_nothing(tmp_path, tokenizer, texts, change, words):
    with pytest.raises(ValueError, match=words):
        prepare(tmp_path / "a" / "data", **(settings(tokenizer, texts) | change))
    assert not (tmp_path / "a").exists()


def test_a_vocabulary_above_16_bits(tmp_path, tokenizer, texts):
    """The same rows, each id 70,000 higher; padding aside."""
    higher = lambda ids: {k: i + 70_000 for k, i in ids.items()}
    wide = Tokenizer(higher(tokenizer.ranks), higher(tokenizer.specials), tokenizer.pattern)
    for name, used in (("a", tokenizer), ("b", wide)):
        prepare(tmp_path / name, **settings(used, texts))
    (ids, doc, kind), (wide_ids, *rest) = read(tmp_path / "a"), read(tmp_path / "b")
    assert all(np.array_equal(x, y) for x, y in zip((doc, kind), rest))
    assert ids.dtype == np.uint16 and wide_ids.max() > 65536
    assert np.array_equal(np.where(doc >= 0, ids.astype(np.int64) + 70_000, 0), wide_ids)


def test_the_tokenizer_of_another_text_is_not_used(tmp_path):
    """A folder may hold data that another text made, with as large a vocabulary."""

    class Settings:
        out, text, text_share, data_rows, length, vocab, seed = tmp_path, tmp_path / "a.txt", 0.5, 3, 160, 400, 0
        phases, batch_rows = "", 1

    def made():
        return data.make(Settings, 1, lambda text: None)[1].ranks

    Settings.text.write_text(prose(1, 4000))
    first = made()
    Settings.text.write_text("zxqj " * 40_000)
    second = made()
    assert first != second and b" zxqj" in second and made() == second


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def batches(loader, n):
    return [loader.next() for _ in range(n)]


def equal(a, b):
    return all(np.array_equal(x, y) for one, two in zip(a, b, strict=True) for x, y in zip(one, two, strict=True))


def test_an_epoch_reads_every_row_once_and_the_next_in_another_order(folder):
    loader = Loader(folder, 50, seed=1)
    rows = [r.tobytes() for r in read(folder)[0].astype(np.int64)]
    first, second = ([r.tobytes() for b in batches(loader, 6) for r in b[0]] for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(rows) and first != second and first != rows
    assert loader.state() == {"epoch": 1, "position": 300}
    other = [r.tobytes() for b in batches(Loader(folder, 50, seed=2), 6) for r in b[0]]
    assert sorted(other) == sorted(rows) and other != first


def test_ranks_share_the_global_batch(folder):
    whole = Loader(folder, 12, seed=3)
    parts = [Loader(folder, 12, rank, 3, seed=3) for rank in range(3)]
    for _ in range(30):  # across the end of an epoch
        ids, doc, kind = whole.next()
        pieces = [part.next() for part in parts]
        assert all(p[0].shape == (4, LENGTH) for p in pieces)
        joined = sorted(zip(*(np.concatenate([p[i] for p in pieces]).tolist() for i in range(3))))
        assert joined == sorted(zip(ids.tolist(), doc.tolist(), kind.tolist()))
        assert all(part.state() == whole.state() for part in parts)
    assert (ids.dtype, doc.dtype, kind.dtype) == (np.int64, np.int64, np.uint8)


@pytest.mark.parametrize("before", [0, 3, 6, 7])
def test_restore_goes_on_where_the_state_was_taken(folder, before):
    loader = Loader(folder, 47, seed=4)  # six batches an epoch and 18 rows over
    batches(loader, before)
    state = json.loads(json.dumps(loader.state()))
    rest = batches(loader, 8)
    again = Loader(folder, 47, seed=4)
    batches(again, 2)
    again.restore(state)
    assert again.state() == state and equal(batches(again, 8), rest) and again.state() == loader.state()


@pytest.mark.parametrize("batch,world,words", [(301, 1, "larger than the data set of 300"), (10, 3, "evenly over 3")])
def test_batches_that_cannot_be_made(folder, batch, world, words):
    with pytest.raises(ValueError, match=words):
        Loader(folder, batch, 0, world)


# ----------------------------------------------------------------------------------------------------------------------
# The corpus


def test_installed_text_is_there_and_its_held_out_files_are_others():
    training, held = corpus.read_text("code", 3_000_000)
    assert len(held) >= 1 and 2_500_000 < sum(map(len, training + held)) < 6_000_000
    assert not set(training) & set(held) and all(isinstance(t, str) and len(t) > 200 for t in training + held)
    assert corpus.read_text("code", 300_000)[0] == corpus.read_text("code", 300_000)[0]


def test_docstrings_are_read_without_the_source(tmp_path):
    long = "This is what the function does, in a sentence that is long enough to count as prose for a reader of it."
    (tmp_path / "a.py").write_text(f'"""{long}"""\ndef f():\n    """{long} Twice."""\n    return 12345\n')
    (tmp_path / "b.py").write_text("def broken(:")
    assert corpus._docstrings(tmp_path / "a.py") == f"{long}\n\n{long} Twice."
    assert corpus._docstrings(tmp_path / "b.py") == corpus._docstrings(tmp_path / "c.py") == ""


@pytest.mark.parametrize("sizes", [[10_000], [12_345], [900_000], [700] * 45, [4] * 4000, [20_001, 1]])
def test_held_out_text_is_not_trained_on(tmp_path, sizes):
    letters = "".join(chr(0x4E00 + i) for i in range(20_000))  # every place of the corpus is another character
    for n, size in enumerate(sizes):
        text = "".join(
            chr(0x4E00 + (n * 997 + i) % 20_000) + chr(0x10000 + n * 7 + i // 20_000) for i in range(size // 2)
        )
        (tmp_path / f"{n:05d}.txt").write_text(text + "." * (size % 2), "utf-8")
    training, held = corpus.read_folder(tmp_path)
    count, total = sum(map(len, held)), sum(sizes)
    assert sum(map(len, training)) + count == total and all(training)
    assert total / 25 <= count <= total / 3 and count >= 900 and len(letters) == 20_000
    if len(sizes) == 1:  # cut where they meet, and nothing twice
        window = 40
        seen = {t[i : i + window] for t in training for i in range(0, len(t) - window)}
        assert not any(t[i : i + window] in seen for t in held for i in range(0, len(t) - window))


@pytest.mark.parametrize(
    "content,words",
    [
        (None, "does not exist"),
        (b"", "0 characters in 1 files"),
        (b" \n" * 9000, "0 characters"),
        (b"too short " * 9, "at least 10,000"),
        (b"\x89PNG\r\n" + bytes(range(256)) * 99, "not UTF-8 text"),
        ("é".encode("latin-1") * 20_000, "not UTF-8 text .byte 0"),
        (b"text\0" * 9000, "NUL"),
    ],
)
def test_what_is_no_corpus(tmp_path, content, words):
    if content is not None:
        (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        corpus.read_folder(tmp_path / "a")
    assert "\n" not in str(caught.value)


def test_an_empty_folder_is_no_corpus(tmp_path):
    with pytest.raises(ValueError, match="0 characters in 0 files"):
        corpus.read_folder(tmp_path)
