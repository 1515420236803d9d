"""Rows that start, stop and are replaced independently, and one step for all of them: the engine under `generate`.

The idea. A batch is a number of *slots*. Each holds one row: its Mamba states, its keys and values, its length. A row
enters by a prefill, which fills its slot; then each step feeds one token to every slot; a row that ends leaves its slot
to the next that waits, while the others go on (continuous batching, Yu et al. 2022, Orca). What a slot computes does
not depend on its neighbours: only matrix products of another number of slots may round another way.

    start   short prompts together, padded on the left (the padding is another document, which nobody sees), in a
            cache of their own, from which each row is copied into its slot; a long prompt alone, in place, in pieces:
            what a prefill needs besides the cache depends on the piece, not on the prompt
    step    one token for every slot, each at its own position
    keep    fewer slots, when nobody waits and few are left (a slot costs the same whether a row is in it or not)

On a GPU the step is a *CUDA graph*: the 9B's step is some 200 launches, and a processor needs longer to ask for them
one by one than the GPU to run them. So they are recorded once, and replayed as one. A recording holds addresses, not
values: tokens, lengths and caches stay where they are, the shapes too, and nothing in the step may ask the GPU for a
number. `graph=False` runs the same calls one by one, and the tests hold the two together, to the bit.

This file must not know sampling, budgets or text.
"""

import copy

import torch

from sizes import row_bytes, work_bytes

PREFILL = {"cpu": 1024, "cuda": 4096}  # positions read in one call: bounds what is computed and forgotten


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
    """`count` slots of `max_length` positions on the model's device; what is said in them is decided elsewhere.

    piece: positions of a prefill's piece (default: PREFILL). graph: whether steps are recorded (default: on a GPU).
    """

    def __init__(self, model, count, max_length, piece=None, graph=None):
        self.model, self.max_length = model, max_length
        self.cache = model.new_cache(count, max_length)
        self.piece = piece or PREFILL.get(self.device.type, 1024)
        self.lengths = [0] * count  # 0: the slot is empty
        self.recorded = self.device.type == "cuda" if graph is None else graph
        self._prepare()

    def _prepare(self):
        """Places for what the next steps are told, and no recording yet."""
        self._inputs = torch.zeros(2, len(self.lengths), dtype=torch.int64, device=self.device)  # tokens, lengths
        self._graph, self._steps, self._logits = None, 0, None

    @property
    def device(self):
        return self.model.lm_head.weight.device

    def start(self, slots, prompts):
        """Prefill: slots[i] forgets its row and holds prompts[i] (lists of ids, none empty). Returns the logits after
        each, (len(slots), vocab) float32, in that order."""
        for prompt in prompts:
            if not 0 < len(prompt) <= self.max_length:
                raise ValueError(f"a prompt of {len(prompt)} tokens does not fit slots of {self.max_length} positions")
        found = [None] * len(slots)
        short = [i for i, prompt in enumerate(prompts) if len(prompt) <= self.piece] if len(slots) > 1 else []
        for together in self._bundles(short, prompts):
            if len(together) > 1:
                xs = self._start_together([slots[i] for i in together], [prompts[i] for i in together])
                for i, x in zip(together, xs):
                    found[i] = x
        for i, (slot, prompt) in enumerate(zip(slots, prompts)):
            if found[i] is None:
                found[i] = self._read(row_of(self.cache, slot), torch.tensor([prompt], device=self.device), None)[0]
            self.lengths[slot] = len(prompt)
        return self.model.lm_head(torch.stack(found)).float()

    def _bundles(self, short, prompts):
        """The indices in `short`, in runs that are read together: at most `piece` padded tokens, and at most as many
        rows as make a cache of their own no larger than what a piece needs to work in; or one prompt."""
        config, size = self.model.config, self.model.lm_head.weight.element_size()
        room, bundle = work_bytes(config, self.piece, weight_bytes=size), []
        for i in short:
            rows, longest = len(bundle) + 1, max(len(prompts[j]) for j in [*bundle, i])
            if bundle and (longest * rows > self.piece or rows * row_bytes(config, longest, size) > room):
                yield bundle
                bundle = []
            bundle.append(i)
        if bundle:
            yield bundle

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
        for s in range(0, ids.shape[1], self.piece):
            part = None if seq_idx is None else seq_idx[:, s : s + self.piece]
            x = self.model.features(ids[:, s : s + self.piece], cache, part)
        return x[:, -1]

    def step(self, tokens):
        """Feed tokens[i] (a list, or a tensor on the device) to slot i; the logits after them, (slots, vocab) float32,
        to be used before the next step overwrites them. An empty slot takes any token."""
        if max(self.lengths) >= self.max_length:
            slot = self.lengths.index(max(self.lengths))
            raise ValueError(
                f"slot {slot} is full: it has {self.max_length} positions; make the engine's max_length more"
            )
        if torch.is_tensor(tokens):
            self._inputs[0].copy_(tokens)
            self._inputs[1].copy_(torch.tensor(self.lengths))
        else:
            self._inputs.copy_(torch.tensor([tokens, self.lengths]))
        if not self.recorded or self._steps == 0:  # the first step prepares what a recording may not: compiled kernels
            self._logits = self._compute()
        else:
            if self._graph is None:
                self._record()
            self._graph.replay()
        self._steps += 1
        self.lengths = [n + 1 if n else 0 for n in self.lengths]
        return self._logits

    def _compute(self):
        # where steps can be recorded, the mask of the plain attention is as long as it will ever be
        longest = self.max_length - 1 if self.device.type == "cuda" else max(self.lengths)
        return self.model.step(self._inputs[0], self.cache, self._inputs[1], longest)

    def _record(self):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._compute()
        self._graph, self._logits = graph, logits

    def stop(self, slot):
        """The slot's row has ended: what is in it will be overwritten."""
        self.lengths[slot] = 0

    def keep(self, slots):
        """Keep only these slots, in ascending order; they are renumbered. The memory of the others stays reserved."""
        for layer in filter(None, self.cache.layers):
            for name, tensor in vars(layer).items():
                for i, slot in enumerate(slots):
                    if i != slot:
                        tensor[i].copy_(tensor[slot])
                setattr(layer, name, tensor[: len(slots)])
        self.cache.batch_size, self.lengths = len(slots), [self.lengths[i] for i in slots]
        self._prepare()
