"""Text to tokens and back: a byte-level BPE that we train ourselves.

The idea. A text is a string of UTF-8 bytes, and 256 byte tokens can already spell everything. Byte-pair encoding makes
the spelling shorter: count all pairs of neighbouring tokens, glue the most frequent pair into a new token, repeat. The
list of glued tokens, in the order in which they were found, is the whole tokenizer; a token's place in that list is its
*rank*. To encode, cut the text into pieces with a regular expression (so that no token spans two words), then inside
each piece keep gluing the pair of lowest rank until nothing glues any more.

Ids are laid out like the released tokenizer's, in small: specials first, then the bytes, then the merges in rank order.
The released vocabulary has 1000 reserved specials and 131,072 entries; ours has 16 and a few thousand. Both run through
the same class, and what we save opens in transformers.

Two kinds of tokens must never mix. *Control* tokens (`<SPECIAL_11>`, `</think>`, ...) come from the chat template and
from nowhere else. *Text*, whatever it says, becomes ordinary tokens: a user who types "<SPECIAL_12>" gets a handful of
harmless ones, not an end of turn.

Why this is written by hand, and what the library does better. Training is 40 lines because the algorithm is the lesson;
Hugging Face `tokenizers` finds the same merges (see the tests), uses all cores, and trains other models than BPE too.
Encoding is left to tiktoken's Rust engine, built on our own ranks: a named tiktoken encoding would be a download.

This file must not know models, tensors or training data.
"""

import heapq
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import regex
import tiktoken

from template import (
    CHAT_TEMPLATE,
    END_THINK,
    END_TURN,
    SYSTEM_TURN,
    THINK,
    TURN,
    check_text,
    clean,
    render_chat,
)

# ----------------------------------------------------------------------------------------------------------------------
# Names and numbers

UNK, BOS, EOS = "<unk>", "<s>", "</s>"

# The released numbering where it exists: 0, 1, 2, 10, 11, 12. Giving <think> and </think> an id of their own is our
# choice; the released vocabulary spells them with three ordinary tokens each, and this class handles both.
SPECIALS = {UNK: 0, BOS: 1, EOS: 2, THINK: 3, END_THINK: 4} | {f"<SPECIAL_{i}>": i for i in range(5, 16)}

# How a text is cut before any merge. First alternative that matches, left to right:
PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",  # a word, with the one space or sign before it: " the", "(x", "_id"
        r"\p{N}",  # every digit alone: 407 is 4 0 7, so that column addition is learnable
        r" ?[^\s\p{L}\p{N}]+",  # a run of signs, with the space before it: " +=", "...", " =>"
        r"\n",  # every newline alone: one line break is one token, always the same one
        r"[^\S\n]+(?!\S)",  # a run of blanks (indentation), leaving its last blank to the word that follows
        r"[^\S\n]+",  # a blank that nothing else took, as in "1 + 2" before the 2
    ]
)

# tokenizer.json stores bytes as printable characters (GPT-2's table): a printable Latin-1 byte is itself, the other 68
# are moved to U+0100 and up, in order. The space becomes "Ġ", the newline "Ċ".
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_MOVED = [b for b in range(256) if b not in set(_PRINTABLE)]
BYTE_TO_CHAR = {b: chr(b) for b in _PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(_MOVED)}
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Training


def train_bpe(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
    """Learn a byte-level BPE from `texts` and return it as a `Tokenizer` with exactly `vocab_size` entries.

    Sennrich et al. 2016 (arXiv 1508.07909), on bytes. Three things make it fast enough to use: each distinct piece is
    merged once and counted as often as it occurs; `where` remembers which pieces hold a pair, so a merge touches only
    those; a heap gives the most frequent pair. Heap entries are not removed when a count falls: an entry that no longer
    tells the true count is put back with the true one when it surfaces.

    The result depends on the texts alone. Among pairs of equal count the one with the smallest (left, right) symbols
    wins; symbols are numbered in the order of the printable characters of tokenizer.json, then by age. That is the rule
    of Hugging Face's BpeTrainer, and the merges are the same.

    Raises ValueError if `vocab_size` leaves no room for specials and bytes, or if the text has too few pairs for it.
    """
    first = len(SPECIALS) + 256
    if not isinstance(vocab_size, int) or vocab_size < first:
        raise ValueError(
            f"vocab_size is {vocab_size}, but {len(SPECIALS)} specials and 256 bytes need at least {first}: raise it."
        )
    if isinstance(texts, str):
        raise ValueError("train_bpe wants an iterable of texts, got one string: wrap it in a list.")
    counts = Counter()
    for text in texts:
        counts.update(regex.findall(PATTERN, check_text(text, "a training text")))

    order = sorted(range(256), key=BYTE_TO_CHAR.get)
    tokens = [bytes([b]) for b in order]  # symbol number -> bytes; grows by one with each merge
    symbol = {t: i for i, t in enumerate(tokens)}
    words = [[symbol[bytes([b])] for b in w.encode("utf-8", "replace")] for w in counts]
    freqs = list(counts.values())

    pair_counts, where = Counter(), defaultdict(set)
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_counts[pair] += freqs[i]
            where[pair].add(i)
    heap = [(-n, pair) for pair, n in pair_counts.items()]
    heapq.heapify(heap)

    while len(tokens) < vocab_size - len(SPECIALS):
        if not heap:
            raise ValueError(
                f"the text has only {len(tokens) - 256} merges in it, too few for vocab_size {vocab_size}: "
                f"lower it to {first + len(tokens) - 256} or give more text."
            )
        count, pair = heapq.heappop(heap)
        if -count != pair_counts[pair]:  # an old entry: put it back with its true count
            if pair_counts[pair] > 0:
                heapq.heappush(heap, (-pair_counts[pair], pair))
            continue
        left, right = pair
        glued = tokens[left] + tokens[right]
        if glued not in symbol:  # rare, but "a"+"bc" and "ab"+"c" would be one token
            symbol[glued] = len(tokens)
            tokens.append(glued)
        new = symbol[glued]

        change = Counter()  # what this merge does to the counts of the pairs around it
        for i in where.pop(pair):
            word, f, j = words[i], freqs[i], 0
            while j < len(word) - 1:
                if word[j] == left and word[j + 1] == right:
                    if j > 0:
                        change[word[j - 1], left] -= f
                        change[word[j - 1], new] += f
                        where[word[j - 1], new].add(i)
                    if j + 2 < len(word):
                        change[right, word[j + 2]] -= f
                        change[new, word[j + 2]] += f
                        where[new, word[j + 2]].add(i)
                    word[j : j + 2] = [new]
                j += 1
        for other, delta in change.items():
            pair_counts[other] += delta
            if delta > 0:
                heapq.heappush(heap, (-pair_counts[other], other))
        pair_counts[pair] = 0  # after the loop: in "aaa" the pair (a, a) is its own neighbour

    merged = {token: first + i for i, token in enumerate(tokens[256:])}
    return Tokenizer({bytes([b]): len(SPECIALS) + b for b in range(256)} | merged, SPECIALS, PATTERN)


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer


class Tokenizer:
    """Byte-level BPE run by tiktoken, with special tokens kept apart from text.

    `ranks` maps every token's bytes to its id, all 256 single bytes among them. `specials` maps names to ids. `pattern`
    is the regular expression that cuts the text. tiktoken glues pairs in the order of the numbers it is given; the ids
    serve as these numbers, with any offset and any gaps. If a file's merge order is not its id order, `merge_order`
    (the tokens, first merged first) says so, and numbers are translated to ids on the way out.

    Attributes: bos_id; eos_id, the end of turn, which stops a generation; pad_id, `<unk>`, which byte-level text never
    produces; think_id and end_think_id. None where the vocabulary has no such token: the released one spells `<think>`
    with ordinary tokens, so look for the text there.

    Raises ValueError if a byte is missing, two tokens share an id, or the pattern does not compile.
    """

    def __init__(
        self,
        ranks: dict[bytes, int],
        specials: dict[str, int],
        pattern: str,
        merge_order: Sequence[bytes] | None = None,
        chat_template: str = CHAT_TEMPLATE,
    ):
        missing = [b for b in range(256) if bytes([b]) not in ranks]
        if missing:
            raise ValueError(
                f"{len(missing)} of the 256 single bytes are not in the vocabulary (first: {missing[0]}), so some "
                "texts could not be encoded: a byte-level BPE is needed."
            )
        ids = [*ranks.values(), *specials.values()]
        if any(not isinstance(i, int) or i < 0 for i in ids) or len(set(ids)) < len(ids):
            raise ValueError(
                f"the vocabulary's {len(ids)} ids are not distinct numbers from 0 up: {len(set(ids))} are distinct, "
                f"the smallest is {min(ids)}; check the file they come from."
            )
        self.ranks, self.specials = dict(ranks), dict(specials)
        self.pattern, self.chat_template = pattern, chat_template
        self._to_id = None if merge_order is None else [ranks[token] for token in merge_order]
        numbers = self.ranks if merge_order is None else {token: i for i, token in enumerate(merge_order)}
        try:
            self._encoding = tiktoken.Encoding("nano2", pat_str=pattern, mergeable_ranks=numbers, special_tokens={})
        except ValueError as error:
            raise ValueError(f"the pattern {pattern!r} is not a regular expression for tiktoken: {error}") from None
        self._bytes: list[bytes | None] = [None] * (max(ids) + 1)
        for token, i in self.ranks.items():
            self._bytes[i] = token
        for name, i in self.specials.items():
            self._bytes[i] = name.encode()
        self._special_ids = set(self.specials.values())
        names = (BOS, END_TURN, UNK, THINK, END_THINK)
        self.bos_id, self.eos_id, self.pad_id, self.think_id, self.end_think_id = map(self.specials.get, names)

    @property
    def vocab_size(self) -> int:
        """Rows that an embedding needs: the largest id plus one."""
        return len(self._bytes)

    # Text

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text. Control tokens never come out, whatever the text says. No `<s>` is added."""
        _check_blanks(check_text(text, "the text to encode"))
        ids = self._encoding.encode_ordinary(text)
        return ids if self._to_id is None else [self._to_id[i] for i in ids]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts. Long ones use all cores; for short ones threads cost more than they give."""
        if len(texts) < 2 or sum(len(check_text(text, "a text to encode")) for text in texts) < 10_000 * len(texts):
            return [self.encode(text) for text in texts]
        for text in texts:
            _check_blanks(text)
        batch = self._encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)
        return batch if self._to_id is None else [[self._to_id[i] for i in ids] for ids in batch]

    def decode_bytes(self, ids: Iterable[int], skip_specials: bool = False) -> bytes:
        """The bytes of `ids`; specials as their names, or dropped. Raises ValueError for an id that has no token."""
        out = []
        for i in map(int, ids):
            if not 0 <= i < len(self._bytes) or self._bytes[i] is None:
                raise ValueError(f"token id {i} is not in this vocabulary of {self.vocab_size}: is it another model's?")
            if not (skip_specials and i in self._special_ids):
                out.append(self._bytes[i])
        return b"".join(out)

    def decode(self, ids: Iterable[int], skip_specials: bool = False) -> str:
        """The text of `ids`. Bytes that are not UTF-8 (a character cut in half) become U+FFFD."""
        return self.decode_bytes(ids, skip_specials).decode("utf-8", errors="replace")

    # Chat

    def encode_chat(self, messages: Sequence[dict], **options) -> list[int]:
        """Ids of a conversation; options as in `render_chat`."""
        return self._encode_pieces(render_chat(messages, **options))

    def _encode_pieces(self, pieces: Sequence[tuple[str, bool]]) -> list[int]:
        """Control pieces become one id each; the text between two of them is encoded in one go.

        `<think>` where the vocabulary has no id for it is ordinary text and is joined with its neighbours, because the
        released tokenizer glues the ">" of "<think>\\n" with the newline.
        """
        ids, text = [], ""
        for piece, control in pieces:
            if not control or (piece in (THINK, END_THINK) and piece not in self.specials):
                text += piece
                continue
            if piece not in self.specials:
                raise ValueError(f"a chat needs the token {piece}; this vocabulary of {self.vocab_size} has none.")
            ids += self.encode(text) if text else []
            ids.append(self.specials[piece])
            text = ""
        return ids + (self.encode(text) if text else [])

    def encode_example(
        self, question: str, trace: str | None, answer: str, system: str = ""
    ) -> tuple[list[int], list[int]]:
        """One training conversation: `(ids, loss_mask)`, the mask 1 on what the model must say and 0 on the prompt.

        The model says `{trace}\\n</think>\\n{answer}\\n<SPECIAL_12>`, or with `trace=None` (reasoning switched off)
        `{answer}\\n<SPECIAL_12>`. The prompt is tokenised by itself, exactly as `encode_chat` gives it at inference.
        """
        ids, start = self.encode_examples([(question, trace, answer, system)])[0]
        return ids, [0] * start + [1] * (len(ids) - start)

    def encode_examples(self, examples: Iterable[Sequence]) -> list[tuple[list[int], int]]:
        """`encode_example` for many `(question, trace, answer[, system])`: a list of `(ids, mask_start)`.

        `ids[mask_start:]` is the response. What is the same in every example is encoded once, so that a million short
        examples take half a minute.
        """
        on, off, out = self._frame(True), self._frame(False), []
        for question, trace, answer, *system in examples:
            if not (isinstance(question, str) and isinstance(answer, str) and isinstance(trace, str | None)):
                raise ValueError(
                    f"question and answer must be strings, trace too or None: got {(question, trace, answer)}."
                )
            begin, turn = off if trace is None else on
            said = [(f"{answer}\n", False), (END_TURN, True)]
            if trace is not None:
                said = [(f"{trace}\n", False), (END_THINK, True), ("\n", False), *said]
            if system and system[0]:
                text = f"System\n{clean(system[0])}\n"
                begin = self._encode_pieces([(SYSTEM_TURN, True), (text, False), (TURN, True)])
            prompt = begin + self.encode(f"User\n{clean(question)}\n") + turn
            out.append((prompt + self._encode_pieces(said), len(prompt)))
        return out

    def _frame(self, thinking: bool) -> tuple[list[int], list[int]]:
        """The constant tokens of a one-turn chat: before the user's text, and from there to the response."""
        pieces = render_chat([{"role": "user", "content": "" if thinking else "/no_think"}])
        user = pieces.index(("User\n\n", False))
        return self._encode_pieces(pieces[:user]), self._encode_pieces(pieces[user + 1 :])

    # Files

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, so that transformers opens the folder too.

        tiktoken glues a pair whenever the result is a token; tokenizer.json lists the pairs that may be glued. So every
        way to cut a token into two tokens is listed, in rank order, and both engines give the same ids.
        """
        order = sorted(self.ranks, key=self._encoding._mergeable_ranks.get)
        text = {token: "".join(map(BYTE_TO_CHAR.get, token)) for token in order}
        merges = [
            [text[token[:k]], text[token[k:]]]
            for token in order
            for k in range(1, len(token))
            if token[:k] in self.ranks and token[k:] in self.ranks
        ]
        vocab = self.specials | {text[token]: i for token, i in self.ranks.items()}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
        model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True}
        tokenizer = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": i, "content": name} | flags for name, i in self.specials.items()],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None,
            "decoder": byte_level,
            "model": model | {"vocab": dict(sorted(vocab.items(), key=lambda kv: kv[1])), "merges": merges},
        }
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        for key, name in (("bos_token", BOS), ("eos_token", END_TURN), ("pad_token", UNK), ("unk_token", UNK)):
            config |= {key: name} if name in self.specials else {}
        _write_json(Path(folder) / "tokenizer_config.json", config | {"chat_template": self.chat_template})
        _write_json(Path(folder) / "tokenizer.json", tokenizer)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a `tokenizer.json` (or a folder that holds one): ours, or a released byte-level BPE of the Tekken kind.

        Only what such a file needs is understood, and the rest is refused: a tokenizer that is *nearly* right makes a
        model that is quietly wrong. A post-processor that would add `<s>` is ignored: the chat format has no `<s>`.

        Raises ValueError, in a sentence, for a missing or damaged file and for any other kind of tokenizer.
        """
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        template = CHAT_TEMPLATE
        if (path.parent / "tokenizer_config.json").is_file():
            saved = _read_json(path.parent / "tokenizer_config.json").get("chat_template")
            template = saved if isinstance(saved, str) else CHAT_TEMPLATE
        data = _read_json(path)
        try:
            ranks, specials, pattern, merge_order = _parse(data, path)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{path} is not a complete tokenizer.json ({type(error).__name__}: {error}).") from None
        return cls(ranks, specials, pattern, merge_order, template)


_LONG = 450_000


def _check_blanks(text: str) -> None:
    """The regex engine gives up inside a run of a million blanks: refuse it before, in a sentence."""
    for i in range(0, len(text) - _LONG + 1, _LONG):
        if text[i : i + _LONG].isspace():
            raise ValueError(f"the text has more than {_LONG:,} blanks in a row at character {i:,}: shorten that run.")


def _parse(data: dict, path: Path):
    """The four arguments of `Tokenizer` from the contents of a tokenizer.json."""
    model = data["model"]
    kind = model.get("type", "BPE")
    if kind != "BPE" or model.get("byte_fallback") or data.get("normalizer"):
        kind += " (byte_fallback)" * bool(model.get("byte_fallback")) + " (normalizer)" * bool(data.get("normalizer"))
        raise ValueError(f"{path} holds a {kind} tokenizer: only a plain byte-level BPE can be read.")
    steps = data["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    kinds = [step.get("type") for step in steps]
    if kinds != ["Split", "ByteLevel"] or steps[1].get("use_regex", True) or steps[1].get("add_prefix_space", True):
        raise ValueError(
            f"{path} cuts text by {kinds}: only a Split by one regular expression, then ByteLevel without a regex or "
            "prefix space of its own, can be read."
        )
    if steps[0]["behavior"] != "Isolated" or steps[0].get("invert") or "Regex" not in steps[0]["pattern"]:
        raise ValueError(f"{path} has a Split that is not an Isolated regular expression: {steps[0]}.")

    vocab = model["vocab"]
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    first_merge: dict[str, int] = {}  # token -> place of the first merge that makes it
    for i, merge in enumerate(merges):
        if len(merge) != 2 or not all(part in vocab for part in (*merge, "".join(merge))):
            raise ValueError(f"merge {i} of {path}, {merge!r}, does not join two vocabulary entries into a third.")
        first_merge.setdefault(merge[0] + merge[1], i)

    specials = {token["content"]: token["id"] for token in data.get("added_tokens") or []}
    ranks = {}
    for text, i in vocab.items():
        if text in specials:
            if specials[text] != i:
                raise ValueError(f"{path} gives {text!r} two ids: {i} in its vocabulary, {specials[text]} as special.")
        elif len(text) == 1 or text in first_merge:
            if not all(c in CHAR_TO_BYTE for c in text):
                raise ValueError(f"{path}: entry {text!r} (id {i}) is not in byte characters, so it is not byte-level.")
            ranks[bytes(map(CHAR_TO_BYTE.get, text))] = i
        elif text.startswith("<") and text.endswith(">"):
            specials[text] = i  # a reserved name that no merge can make: it decodes, and is never encoded
        else:
            raise ValueError(f"{path}: no merge makes the entry {text!r} (id {i}); is the list of merges cut short?")
    place = {bytes(map(CHAR_TO_BYTE.get, text)): i for text, i in first_merge.items() if text not in specials}
    order = sorted(ranks, key=lambda token: (place.get(token, -1), ranks[token]))
    ids = [ranks[token] for token in order]
    return ranks, specials, steps[0]["pattern"]["Regex"], None if ids == sorted(ids) else order


def _read_json(path: Path) -> dict:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; give a folder that holds a tokenizer.json.") from None
    except ValueError as error:  # bad JSON and bad UTF-8 alike
        raise ValueError(f"{path} is not valid JSON ({error}): it is damaged or cut short.") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a JSON {type(data).__name__}, not an object: it is not a tokenizer file.")
    return data


def _write_json(path: Path, data: dict) -> None:
    """All or nothing: write beside the target, flush to disk, then rename over it."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "w", encoding="utf-8") as file:
            json.dump(data, file, ensure_ascii=False, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}; give a folder that can be written to.") from None
    finally:
        beside.unlink(missing_ok=True) if path.parent.is_dir() else None
