"""A scripted model: it wants to say a given text, whatever it is fed; and two vocabularies that spell `</think>` apart.

It has the interface of the real one, so `generate` runs it, and keeps the tokens it was fed in its cache, so a test
also sees that forced tokens really reached the model.
"""

from functools import cache

import torch

from generate import generate
from model import ModelConfig
from tokenizer import SPECIALS, Tokenizer, train_bpe


@cache
def ours_vocabulary():
    """`</think>` and `<think>` are one token each."""
    return train_bpe(["one step a line, two steps: 12 + 34 = 46\nso the answer is 46.\n" * 3], 290)


@cache
def released_vocabulary():
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
        self.fed, self.impl = {}, "torch"

    def new_cache(self, batch_size, max_length):
        class Layer:
            def put(self, row, other, other_row, skip):
                self.history[row] = -1
                self.history[row, : other.history.shape[1] - skip] = other.history[other_row, skip:]

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
        return self._say(history, ids.shape)

    def step(self, tokens, cache, lengths, longest):
        history = cache.layers[1].history
        history[torch.arange(len(tokens)), lengths] = tokens
        for row, n in zip(history, lengths.tolist()):
            row[n + 1 :] = -1
        return self._say(history, (len(tokens), 1))[:, -1]

    def _say(self, history, shape):
        out = torch.zeros(*shape, self.tokenizer.vocab_size)
        for j, row in enumerate(history.tolist()):
            text = [t for t in row if t >= 0]
            if not text or text[0] < 16 + ord("A"):
                continue  # an empty slot
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


def plain(tokenizer, text):
    """Byte tokens, except that "</think>" is the special token where there is one."""
    out = []
    for i, part in enumerate(text.split("</think>")):
        if i:
            out += tokenizer.encode("</think>") if tokenizer.end_think_id is None else [tokenizer.end_think_id]
        out += [id_of(tokenizer, bytes([b])) for b in part.encode()]
    return out
