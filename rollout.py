"""Rollouts: many answers to a few prompts, drawn and written down where the model lives.

The idea. Reinforcement learning reads its own writing: every step asks for thousands of short answers, drawn at random,
and for the probability with which each token was drawn. `generate` answers people: it looks at every token of every row
in Python (budgets, stop rules, who joins next), some 10 microseconds a token. At a thousandth of the size that is
longer than the model itself. So here nothing leaves the device before all rows are done:

    read    each prompt once, padded on the left, then its states and keys are copied for all answers of its group
    draw    a token a row, and its log-probability, by tensors alone; a row that has ended goes on, and nobody listens
    look    now and then: how many rows are still speaking? none: stop. Less than half: their states move to an engine
            of half the slots, so that a few long answers do not keep the whole batch waiting

The step is `Engine.step`, a recorded CUDA graph on a GPU; engines are kept from call to call, because a recording holds
addresses: the weights' too. So a learner that changes its weights in place is spoken with as it is; one that learns in
float32 and speaks in bfloat16 has a copy here, to be refreshed by `follow`. Draws are at the given temperature over all
of the tokenizer's ids: the probabilities written down are those of the draw. (A model may have rows for more ids than
its tokenizer. A learner's softmax has them all; after tuning, nothing is left on the ids that no text has.)

Why this is written by hand and what the library does better: RL frameworks hand this to vLLM, which pages its caches,
spreads over GPUs and gets new weights by a broadcast. Here rollout and learner share one card and one process.
This file must not know rewards or losses.
"""

import copy
import time
from dataclasses import dataclass

import numpy as np

from device import free_bytes  # isort: skip  (before torch)
import torch

from engine import Engine
from sizes import row_bytes

ROWS = {"cpu": 128, "cuda": 2048}  # answers at a time
ROOM = 0.25  # of the GPU's free memory that caches may take
LOOK = 8  # steps between two looks at who is still speaking
SMALLEST = 64  # slots; fewer are not faster
MOST = 8  # engines that are kept


@dataclass
class Sample:
    """One answer. said: all ids after the prompt, the end of the turn included if it `ended` by itself; logprobs
    (len(said),) float32: of each, when it was drawn."""

    prompt: list
    said: list
    logprobs: np.ndarray
    ended: bool


@dataclass
class Pace:
    """What rollouts took so far: answers, tokens said in them, prompts' tokens read (once a group), seconds."""

    samples: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    seconds: float = 0.0

    def rate(self):
        """Tokens said a second; prompts' tokens do not count, their seconds do."""
        return self.tokens / max(1e-9, self.seconds)

    def __str__(self):
        return f"{self.tokens:,} tokens in {self.seconds:.1f} s, {self.rate():,.0f} tokens/s"


def draw(logits, temperature, generator=None):
    """One id a row, (b,), from logits (b, vocab), and its log-probability under softmax(logits / temperature), (b,)
    float32. Drawn by a race: of exponential clocks with rates p the first to ring is i with probability p_i."""
    logprobs = torch.log_softmax(logits.float() / temperature, -1)
    clocks = torch.empty_like(logprobs).exponential_(generator=generator)
    ids = (logprobs - clocks.log()).argmax(-1)
    return ids, logprobs.gather(1, ids[:, None])[:, 0]


class Roller:
    """Speaks with `model`'s weights, or in `dtype` with a copy of them (see `follow`); pace: what it took."""

    def __init__(self, model, tokenizer, dtype=None, rows=None):
        weight = model.lm_head.weight
        self.own = dtype is not None and dtype != weight.dtype
        self.model = copy.deepcopy(model).to(dtype) if self.own else model
        if self.own:
            for a, b in zip(self.model.parameters(), model.parameters()):
                if b.dim() == 1:  # A_log, D, norms ...: few numbers, kept as wide as they are
                    a.data = b.data.clone()
            self.model.requires_grad_(False)
        self.model.eval()
        self.tokenizer, self.device = tokenizer, weight.device
        self.rows = rows or ROWS.get(self.device.type, ROWS["cpu"])
        self.engines, self.pace, self.longest = {}, Pace(), 0

    @torch.no_grad()
    def follow(self, model):
        """Take over the weights of `model`, if these are a copy's."""
        if self.own:
            for a, b in zip(self.model.parameters(), model.parameters()):
                a.copy_(b)

    @torch.no_grad()
    def say(self, prompts, group=1, room=128, temperature=1.0, seed=0):
        """`group` answers of at most `room` tokens to every prompt (lists of ids): a list of `group` Samples a prompt,
        in the order of the prompts. The same seed, prompts and weights give the same answers on the same device."""
        if not prompts or min(map(len, prompts)) == 0 or group < 1 or room < 1 or not temperature > 0:
            raise ValueError(
                f"rollouts need prompts with a token or more, a group and a room of 1 or more, a temperature above 0; "
                f"got {len(prompts)} prompts, group {group}, room {room}, temperature {temperature}"
            )
        start = time.perf_counter()
        was_training, self.model = self.model.training, self.model.eval()
        generator = torch.Generator(self.device).manual_seed(seed)
        longest, limit = max(map(len, prompts)) + room, self.model.config.max_position_embeddings
        if longest > limit:
            raise ValueError(
                f"a prompt of {longest - room} tokens and an answer of {room} would pass the model's {limit} "
                "positions: lower --room"
            )
        if longest > self.longest:  # engines of too few positions are of no use any more
            self.longest, self.engines = -(-longest // 64) * 64, {}
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # alike lengths together: less padding
        found, at_once = [None] * len(prompts), max(1, self._fit() // group)
        for s in range(0, len(order), at_once):
            part = order[s : s + at_once]
            for i, samples in zip(part, self._batch([prompts[i] for i in part], group, room, temperature, generator)):
                found[i] = samples
        self.model.train(was_training)
        flat = [sample for group_ in found for sample in group_]
        self.pace.samples += len(flat)
        self.pace.tokens += sum(len(sample.said) for sample in flat)
        self.pace.prompt_tokens += sum(map(len, prompts))
        self.pace.seconds += time.perf_counter() - start
        return found

    def _fit(self):
        if self.device.type != "cuda":
            return self.rows
        free = free_bytes(self.device)
        a_row = row_bytes(self.model.config, self.longest, self.model.lm_head.weight.element_size())
        held = sum(engine.cache.bytes() for engine in self.engines.values())
        return max(1, min(self.rows, int(ROOM * (free + held) / (3 * a_row))))

    def _engine(self, count):
        if count not in self.engines:
            if len(self.engines) == MOST:  # whose numbers of prompts always differ would pile them up
                self.engines.clear()
            self.engines[count] = Engine(self.model, count, self.longest)
        return self.engines[count]

    def _batch(self, prompts, group, room, temperature, generator):
        """The answers to prompts that are spoken together."""
        cache, pads, x = self._read(prompts)
        rows, n = len(prompts) * group, self.tokenizer.vocab_size
        engine = self._engine(rows)
        _fan_out(cache, pads, engine.cache, group)
        engine.lengths = [len(prompt) for prompt in prompts for _ in range(group)]
        del cache
        eos = self.tokenizer.eos_id
        said = torch.zeros(rows, room, dtype=torch.int64, device=self.device)
        logprobs = torch.zeros(rows, room, device=self.device)
        alive = torch.arange(rows, device=self.device)  # which row a slot holds
        done = torch.zeros(rows, dtype=torch.bool, device=self.device)
        logits = self.model.lm_head(x).float()[:, :n].repeat_interleave(group, 0)
        for t in range(room):
            ids, logprob = draw(logits[:, :n], temperature, generator)
            said[alive, t], logprobs[alive, t] = ids, logprob  # behind a row's end, too: cut off below
            done = done | (ids == eos)
            if t == room - 1:
                break
            if t % LOOK == LOOK - 1:
                left = int((~done).sum())
                if left == 0:
                    break
                smaller = max(SMALLEST, len(done) // 2)
                if left <= smaller < len(done):
                    stay = torch.cat([(~done).nonzero()[:, 0], done.nonzero()[:, 0]])[:smaller].sort().values
                    engine = self._move(engine, stay)
                    alive, done, ids = alive[stay], done[stay], ids[stay]
            logits = engine.step(ids)
        said, logprobs = said.cpu().numpy(), logprobs.cpu().numpy()
        found = []
        for r in range(rows):
            ends = np.flatnonzero(said[r] == eos)
            length = ends[0] + 1 if len(ends) else min(room, t + 1)
            found.append(Sample(prompts[r // group], said[r, :length].tolist(), logprobs[r, :length], len(ends) > 0))
        return [found[i : i + group] for i in range(0, rows, group)]

    def _read(self, prompts):
        """Prefill: (cache, padding of each, features after the last token (b, d))."""
        longest = max(map(len, prompts))
        pads = [longest - len(prompt) for prompt in prompts]
        ids = torch.tensor([[0] * pad + list(p) for pad, p in zip(pads, prompts)], device=self.device)
        doc = torch.tensor([[-1] * pad + [0] * len(p) for pad, p in zip(pads, prompts)], device=self.device)
        cache = self.model.new_cache(len(prompts), longest)
        x = self.model.features(ids, cache, doc if any(pads) else None)
        return cache, pads, x[:, -1]

    def _move(self, engine, stay):
        """The slots `stay` (ascending) of an engine in an engine of so many slots."""
        smaller = self._engine(len(stay))
        for new, old in zip(smaller.cache.layers, engine.cache.layers):
            if new is not None:
                for name, tensor in vars(old).items():
                    torch.index_select(tensor, 0, stay, out=getattr(new, name))
        smaller.lengths = [engine.lengths[i] for i in stay.tolist()]
        return smaller


def _fan_out(cache, pads, target, group):
    """Copy row i of a prefill's cache into rows i * group ... of `target`, keys and values without the padding."""
    pads = torch.tensor(pads, device=cache.layers_device())
    for old, new in zip(cache.layers, target.layers):
        if old is None:
            continue
        for name, tensor in vars(old).items():
            if name in ("k", "v"):  # (b, kv_heads, l, e)
                l = tensor.shape[2]
                places = (torch.arange(l, device=pads.device) + pads[:, None]).clamp_max(l - 1)
                tensor = tensor.gather(2, places[:, None, :, None].expand_as(tensor))
                getattr(new, name)[:, :, :l] = tensor.repeat_interleave(group, 0)
            else:
                getattr(new, name).copy_(tensor.repeat_interleave(group, 0))
