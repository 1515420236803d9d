"""Rows that start, stop and are replaced independently, and one step for all of them: the engine under `generate`.

The idea. A batch is a number of *slots*. Each holds one row: its Mamba states, its keys and values, its length. A row
enters by a prefill, which fills its slot; then each step feeds one token to every slot; a row that ends leaves its slot
to the next that waits, while the others go on (continuous batching, Yu et al. 2022, Orca). What a slot computes does
not depend on its neighbours: only matrix products of another number of slots may round another way.

    start   short prompts together, padded on the left (the padding is another document, which nobody sees), in a
            cache of their own, from which each row is copied into its slot; a long prompt alone, in place, in pieces
    step    one token for every slot, each at its own position
    keep    fewer slots, when nobody waits and few are left (a slot costs the same whether a row is in it or not)

This file must not know sampling, budgets or text.
"""

import copy

import torch

PREFILL = 1024  # positions read in one call: bounds the (row, position, position) mask of a padded batch


def row_of(cache, i):
    """A cache of one row that shares the memory of row i; empty."""
    one = copy.copy(cache)
    one.layers = [None if layer is None else copy.copy(layer) for layer in cache.layers]
    for layer in filter(None, one.layers):
        for name, tensor in vars(layer).items():
            setattr(layer, name, tensor[i : i + 1])
        if hasattr(layer, "forget"):
            layer.forget(torch.ones(1, dtype=torch.bool, device=tensor.device))
    one.batch_size, one.length, one.seq_idx = 1, 0, None
    return one


class Engine:
    """`count` slots of `max_length` positions on the model's device; what is said in them is decided elsewhere."""

    def __init__(self, model, count, max_length):
        self.model = model
        self.cache = model.new_cache(count, max_length)
        self.lengths = [0] * count  # 0: the slot is empty

    @property
    def device(self):
        return self.model.lm_head.weight.device

    def start(self, slots, prompts):
        """Prefill: slots[i] forgets its row and holds prompts[i] (lists of ids, none empty). Returns the stream at the
        last position of each, (len(slots), d), in that order."""
        found = [None] * len(slots)
        short = [i for i, prompt in enumerate(prompts) if len(prompt) <= PREFILL] if len(slots) > 1 else []
        if short:
            together = self._start_together([slots[i] for i in short], [prompts[i] for i in short])
            for i, x in zip(short, together):
                found[i] = x
        for i, (slot, prompt) in enumerate(zip(slots, prompts)):
            if found[i] is None:
                found[i] = self._read(row_of(self.cache, slot), torch.tensor([prompt], device=self.device), None)[0]
            self.lengths[slot] = len(prompt)
        return torch.stack(found)

    def _start_together(self, slots, prompts):
        longest = max(map(len, prompts))
        pads = [longest - len(p) for p in prompts]
        ids = torch.tensor([[0] * pad + list(p) for pad, p in zip(pads, prompts)], device=self.device)
        seq_idx = torch.tensor([[-1] * pad + [0] * len(p) for pad, p in zip(pads, prompts)], device=self.device)
        cache = self.model.new_cache(len(slots), longest)
        x = self._read(cache, ids, seq_idx if any(pads) else None)
        for i, (slot, pad) in enumerate(zip(slots, pads)):
            for layer, source in zip(self.cache.layers, cache.layers):
                if layer is not None:
                    layer.put(slot, source, i, pad)
        return x

    def _read(self, cache, ids, seq_idx):
        """Prefill in pieces; the stream at the last position, (b, d)."""
        for s in range(0, ids.shape[1], PREFILL):
            part = None if seq_idx is None else seq_idx[:, s : s + PREFILL]
            x = self.model.features(ids[:, s : s + PREFILL], cache, part)
        return x[:, -1]

    def step(self, tokens):
        """Feed tokens[i], a list, to slot i; the stream after them, (slots, d). An empty slot takes any token."""
        lengths = torch.tensor(self.lengths, device=self.device)
        x = self.model.step(torch.tensor(tokens, device=self.device), self.cache, lengths, max(self.lengths))
        self.lengths = [n + 1 if n else 0 for n in self.lengths]
        return x

    def stop(self, slot):
        """The slot's row has ended: what is in it will be overwritten."""
        self.lengths[slot] = 0

    def keep(self, slots):
        """Keep only these slots, in this order; they are renumbered."""
        rows = torch.tensor(slots, device=self.device)
        for layer in filter(None, self.cache.layers):
            for name, tensor in vars(layer).items():
                setattr(layer, name, tensor[rows])
        self.cache.batch_size, self.lengths = len(slots), [self.lengths[i] for i in slots]
